"""Chapter 07's checks take the solution, see the stub, and name the cause of every plausible mistake."""

import math

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.linear_attention import (
    check_chunked_attention,
    check_favor_features,
    check_linear_step,
    check_safe_sikf,
    check_two_products,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms.linear_attention import linear_attention, sikf_features

# ---- the solutions, as a reader may write them -------------------------------------------------------------------


def two_products(phi_q, phi_k, v):
    S = phi_k.transpose(-1, -2) @ v
    z = phi_k.sum(-2)
    return (phi_q @ S) / (phi_q @ z[..., None] + 1e-6)


def linear_step(phi_q, phi_k, v, S, z):
    S = S + phi_k[..., :, None] * v[..., None, :]
    z = z + phi_k
    numerator = torch.einsum("bhm,bhmd->bhd", phi_q, S)
    return numerator / ((phi_q * z).sum(-1, keepdim=True) + 1e-6), S, z


def safe_sikf(q, k, v):
    phi_q = torch.exp(q - q.amax(-1, keepdim=True))
    phi_k = torch.exp(k - k.amax((-2, -1), keepdim=True))
    return phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2)[..., None])


def favor_features(x, projection):
    m, d = projection.shape
    x = x / d**0.25
    return torch.exp(x @ projection.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(m)


def chunked(phi_q, phi_k, v, chunk):
    length = v.shape[-2]
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    missing = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(-2, (-1, chunk)) for x in (phi_q, phi_k, v))
    states = k.mT @ v
    before = F.pad(states, (0, 0, 0, 0, 1, 0))[..., :-1, :, :].cumsum(-3)
    y = (q @ k.mT).tril() @ v + q @ before
    y = y[..., :-1] / (y[..., -1:] + 1e-6)
    return y.flatten(-3, -2)[..., :length, :]


def chunked_loop(phi_q, phi_k, v, chunk):
    S = phi_k.new_zeros(*phi_k.shape[:-2], phi_k.shape[-1], v.shape[-1])
    z = phi_k.new_zeros(*phi_k.shape[:-2], phi_k.shape[-1], 1)
    out = []
    for start in range(0, v.shape[-2], chunk):
        q, k, w = (x[..., start : start + chunk, :] for x in (phi_q, phi_k, v))
        pairs = (q @ k.mT).tril()
        out.append((pairs @ w + q @ S) / (pairs.sum(-1, keepdim=True) + q @ z + 1e-6))
        S, z = S + k.mT @ w, z + k.sum(-2)[..., None]
    return torch.cat(out, dim=-2)


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_two_products: two_products,
    check_linear_step: linear_step,
    check_safe_sikf: safe_sikf,
    check_favor_features: favor_features,
    check_chunked_attention: chunked,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    assert_accepts(check_chunked_attention, chunked_loop)
    assert_accepts(check_safe_sikf, lambda q, k, v: linear_attention(q, k, v, sikf_features, eps=0))

    def by_feature(q, k, v):
        """The largest of each feature out of the keys, and given to the queries."""
        c = k.amax(-2, keepdim=True)
        q = q + c
        phi_q, phi_k = torch.exp(q - q.amax(-1, keepdim=True)), torch.exp(k - c)
        return phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2)[..., None])

    assert_accepts(check_safe_sikf, by_feature)
    assert_accepts(
        check_favor_features,
        lambda x, w: (
            F.softmax(torch.zeros(len(w), dtype=x.dtype), 0).sqrt()
            * torch.exp(x @ w.T / w.shape[1] ** 0.25 - (x**2).sum(-1, keepdim=True) / (2 * w.shape[1] ** 0.5))
        ),
    )


# ---- wrong answers -------------------------------------------------------------------------------------------------


def products_with(denominator, eps=1e-6):
    return lambda q, k, v: (q @ (k.mT @ v)) / (denominator(q, k) + eps)


def quadratic(q, k, v):
    pairs = q @ k.mT
    return pairs @ v / (pairs.sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda q, k, v: q @ (k.mT @ v), ["denominator is missing"]),
        (products_with(lambda q, k: q @ k.sum(-2)[..., None], eps=0), ["eps is missing"]),
        (products_with(lambda q, k: q @ k.sum(-2)[..., None], eps=-1e-6), ["eps is subtracted"]),
        (products_with(lambda q, k: q @ (k.sum(-2) + 1e-6)[..., None], eps=0), ["eps is added to the features"]),
        (products_with(lambda q, k: k.sum((-2, -1))[..., None, None]), ["sum of z alone"]),
        (products_with(lambda q, k: q.sum(-1, keepdim=True)), ["query's features"]),
        (lambda q, k, v: two_products(k, q, v), ["swapped"]),
        (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, ["softmax"]),
        (lambda q, k, v: q @ (k.mT @ v) / k.shape[-2], ["length"]),
        (lambda q, k, v: chunked(q, k, v, 4), ["causal"]),
        (lambda q, k, v: two_products(q, k, v).detach(), ["gradient"]),
        (lambda q, k, v: q * (k.mT @ v), ["raised"]),
        (quadratic, ["too much memory", "move the brackets"]),
    ],
)
def test_two_products_mistakes(wrong, words):
    assert_rejects(check_two_products, wrong, *words)


def step_with(
    write=True, read=None, divide=True, keep=True, returns=lambda S, z, new_S, new_z: (new_S, new_z), eps=1e-6
):
    def step(phi_q, phi_k, v, S, z):
        new_S = (S if keep else 0) + phi_k[..., :, None] * v[..., None, :]
        new_z = (z if keep else 0) + phi_k
        a, b = (new_S, new_z) if read is None else read(S, z, new_S, new_z)
        y = (phi_q[..., None, :] @ a)[..., 0, :]
        return (y / ((phi_q * b).sum(-1, keepdim=True) + eps) if divide else y), *returns(S, z, new_S, new_z)

    return step


def step_in_place(phi_q, phi_k, v, S, z):
    S += phi_k[..., :, None] * v[..., None, :]
    z += phi_k
    return (phi_q[..., None, :] @ S)[..., 0, :] / ((phi_q * z).sum(-1, keepdim=True) + 1e-6), S, z


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (step_with(read=lambda S, z, a, b: (S, z)), ["old S and z"]),
        (step_with(read=lambda S, z, a, b: (a, z)), ["old z: add"]),
        (step_with(returns=lambda S, z, a, b: (S, b)), ["old S is returned"]),
        (step_with(returns=lambda S, z, a, b: (a, z)), ["old z is returned"]),
        (step_with(divide=False), ["denominator is missing"]),
        (step_with(eps=0), ["eps is missing"]),
        (step_with(returns=lambda S, z, a, b: (a,)), ["3 results"]),
        (lambda q, k, v, S, z: linear_step(q, k, v, 0 * S, z), ["S is overwritten"]),
        (lambda q, k, v, S, z: linear_step(q, k, v, S, 0 * z), ["z is overwritten"]),
        (lambda q, k, v, S, z: linear_step(k, q, v, S, z), ["values are wrong"]),
        (step_in_place, ["in place"]),
    ],
)
def test_step_mistakes(wrong, words):
    assert_rejects(check_linear_step, wrong, *words)


def attention_of(q, k, v):
    phi_q, phi_k = q.exp(), k.exp()
    return phi_q @ (phi_k.mT @ v) / (phi_q @ phi_k.sum(-2)[..., None])


def less(q=lambda q: 0, k=lambda k: 0):
    return lambda a, b, v: attention_of(a - q(a), b - k(b), v)


def most(*axes):
    return lambda x: x.amax(axes, keepdim=True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (attention_of, ["overflows in float32"]),
        (less(q=most(-1)), ["keys are still too large"]),
        (less(k=most(-2, -1)), ["queries are still too large"]),
        (less(q=most(-1), k=most(-1)), ["each key has its own"]),
        (less(q=most(-2), k=most(-2, -1)), ["out of the queries, over the positions"]),
        (less(q=most(-1), k=most(-2)), ["not given to the queries"]),
        (less(q=most(-1), k=lambda k: k.max()), ["whole batch"]),
        (less(q=lambda q: q.max(), k=most(-2, -1)), ["whole batch"]),
        (less(q=lambda q: q.max(), k=lambda k: k.max()), ["whole batch"]),
        (less(q=most(-2, -1), k=most(-2, -1)), ["all queries of a head"]),
        (less(q=most(1, 2, 3), k=most(1, 2, 3)), ["all heads of a sequence"]),
        (less(q=most(1, 2, 3), k=most(-2, -1)), ["all heads of a sequence", "Each query needs its own"]),
        (less(q=most(-1), k=most(1, 2, 3)), ["keys of all heads"]),
        (lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v, ["exponential of a sum"]),
        (lambda q, k, v: torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v, ["exponential of a sum", "scaled"]),
        (lambda q, k, v: safe_sikf(q / q.shape[-1] ** 0.5, k / q.shape[-1] ** 0.5, v), ["no scale"]),
        (lambda q, k, v: q.exp() @ (k.exp().mT @ v), ["denominator is missing"]),
        (lambda q, k, v: safe_sikf(q.clamp(max=80), k.clamp(max=80), v), ["wrong"]),
    ],
)
def test_safe_sikf_mistakes(wrong, words):
    assert_rejects(check_safe_sikf, wrong, *words)


def favor_with(root=0.25, square=lambda raw, x: (x**2).sum(-1, keepdim=True) / 2, outside=lambda m, d: m**-0.5):
    def features(raw, w):
        m, d = w.shape
        x = raw / d**root
        return torch.exp(x @ w.T - square(raw, x)) * outside(m, d)

    return features


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (favor_with(root=0), ["not divided by d**(1/4)"]),
        (favor_with(root=0.5), ["divided by sqrt(d)"]),
        (favor_with(square=lambda raw, x: 0), ["is missing: the mean"]),
        (favor_with(square=lambda raw, x: (x**2).sum(-1, keepdim=True)), ["one half"]),
        (favor_with(square=lambda raw, x: -(x**2).sum(-1, keepdim=True) / 2), ["wrong sign"]),
        (favor_with(square=lambda raw, x: (raw**2).sum(-1, keepdim=True) / 2), ["not yet divided"]),
        (favor_with(square=lambda raw, x: x.norm(dim=-1, keepdim=True) / 2), ["|x| where |x|^2"]),
        (favor_with(outside=lambda m, d: 1 / m), ["1/m where"]),
        (favor_with(outside=lambda m, d: 1), ["1/sqrt(m) is missing"]),
        (favor_with(outside=lambda m, d: d**-0.5), ["1/sqrt(d) where"]),
        (lambda x, w: favor_features(x, w).mT, ["shape"]),
        (lambda x, w: favor_features(x, w).log(), ["values are wrong"]),
    ],
)
def test_favor_mistakes(wrong, words):
    assert_rejects(check_favor_features, wrong, *words)


def chunks_with(before=None, mask=lambda pairs: pairs.tril(), own=1.0, z_too=True):
    def form(phi_q, phi_k, v, chunk):
        length = v.shape[-2]
        v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        q, k, v = (F.pad(x, (0, 0, 0, -length % chunk)).unflatten(-2, (-1, chunk)) for x in (phi_q, phi_k, v))
        states = k.mT @ v
        exclusive = states.cumsum(-3) - states
        S = exclusive if before is None else before(states, exclusive)
        if not z_too:
            S = torch.cat([S[..., :-1], 0 * S[..., -1:]], dim=-1)
        y = own * mask(q @ k.mT) @ v + q @ S
        return (y[..., :-1] / (y[..., -1:] + 1e-6)).flatten(-3, -2)[..., :length, :]

    return form


def shifted(states, by):
    return F.pad(states, (0, 0, 0, 0, by, 0))[..., : states.shape[-3], :, :]


def every_state(phi_q, phi_k, v, chunk):
    """The running sums of every position at once."""
    S = (phi_k[..., None] * v[..., None, :]).cumsum(-3)
    numerator = (phi_q[..., None, :] @ S)[..., 0, :]
    return numerator / ((phi_q * phi_k.cumsum(-2)).sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (chunks_with(before=lambda s, e: s.cumsum(-3)), ["come in twice"]),
        (chunks_with(mask=lambda p: p), ["future keys of the own chunk"]),
        (chunks_with(before=lambda s, e: s.cumsum(-3), own=0.0), ["future keys of the own chunk"]),
        (chunks_with(before=lambda s, e: 0 * s), ["nothing crosses"]),
        (chunks_with(before=lambda s, e: shifted(s, 1)), ["only the previous chunk"]),
        (chunks_with(before=lambda s, e: shifted(e, 1)), ["one chunk late"]),
        (chunks_with(mask=lambda p: p.tril(-1)), ["own key"]),
        (chunks_with(own=0.0), ["pairs within the own chunk"]),
        (chunks_with(z_too=False), ["denominator holds the own chunk only"]),
        (lambda q, k, v, c: two_products(q, k, v), ["not causal"]),
        (lambda q, k, v, c: (q @ k.mT).tril() @ v, ["denominator is missing"]),
        (lambda q, k, v, c: (q.unflatten(-2, (-1, c)) @ k.mT.unflatten(-1, (-1, c)))[c], ["raised"]),
        (lambda q, k, v, c: q.unflatten(-2, (-1, c)) @ k.unflatten(-2, (-1, c)).mT, ["shape"]),
        (every_state, ["too much memory", "state for each position"]),
        (
            lambda q, k, v, c: (q @ k.mT).tril() @ v / ((q @ k.mT).tril().sum(-1, keepdim=True) + 1e-6),
            ["too much memory", "L x L"],
        ),
    ],
)
def test_chunk_mistakes(wrong, words):
    assert_rejects(check_chunked_attention, wrong, *words)
