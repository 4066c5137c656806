"""Chapter 05's checks take the solution, see the stub, and name the cause of every plausible mistake."""

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.sparse_activation import (
    check_choice_gradient,
    check_compress,
    check_extract,
    check_gate,
    check_remember,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms import sparse_activation as package

# ---- the solutions, as a reader may write them -------------------------------------------------------------------


def gate(logits, log_temperature):
    p = torch.softmax(logits / log_temperature.exp(), dim=-1)
    active = p[..., 1] > p[..., 0]
    return active, p.amax(-1) * active


def extract(y, index):
    padded = F.pad(y, (0, 0, 1, 0))
    return torch.stack([rows[ranks] for rows, ranks in zip(padded, index, strict=True)])


def compress(x, active):
    index = active.cumsum(1) * active
    longest = max(1, int(index.max()))
    packed = x.new_zeros(x.shape[0], longest + 1, x.shape[2])
    packed = packed.scatter(1, index[..., None].expand_as(x), x)
    return packed[:, 1:], index


def choice_gradient(logits, log_temperature, attended, upstream):
    tau = log_temperature.exp()
    p = torch.softmax(logits / tau, dim=-1)
    slope = p[..., 0] * p[..., 1] / tau * (p[..., 1] > p[..., 0])
    pull = slope * torch.einsum("bld,bld->bl", upstream, attended)
    return pull[..., None] * torch.tensor([-1.0, 1.0], dtype=pull.dtype)


def remember(keys, filled, new, active):
    moved = torch.cat([keys[:, 1:], new[:, None]], dim=1)
    return torch.where(active[:, None, None], moved, keys), torch.minimum(filled + active, torch.tensor(keys.shape[1]))


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_gate: gate,
    check_extract: extract,
    check_compress: compress,
    check_choice_gradient: choice_gradient,
    check_remember: remember,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    assert_accepts(check_gate, lambda u, t: (u.argmax(-1) == 1, gate(u, t)[1]))

    def by_autograd(logits, log_temperature, attended, upstream):
        with torch.enable_grad():
            u = logits.clone().requires_grad_()
            y = gate(u, log_temperature)[1][..., None] * attended
            return torch.autograd.grad((y * upstream).sum(), u)[0]

    assert_accepts(check_choice_gradient, by_autograd)


# ---- wrong answers -------------------------------------------------------------------------------------------------


def gate_with(decide=lambda p: p[..., 1] > p[..., 0], soften=lambda u, t: u / t.exp(), finish=None, dim=-1):
    def wrong(u, t):
        p = torch.softmax(soften(u, t), dim=dim)
        active = decide(p) if dim == -1 else u[..., 1] > u[..., 0]
        return active, (finish or (lambda p, a: p.amax(-1) * a))(p, active)

    return wrong


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (gate_with(decide=lambda p: p[..., 1] >= p[..., 0]), ["ties"]),
        (gate_with(decide=lambda p: p[..., 0] > p[..., 1]), ["swapped"]),
        (gate_with(soften=lambda u, t: u / t), ["exponential"]),
        (gate_with(soften=lambda u, t: u * t.exp()), ["multiplied"]),
        (gate_with(soften=lambda u, t: u), ["temperature is missing"]),
        (gate_with(finish=lambda p, a: p.amax(-1)), ["sleeping tokens too"]),
        (gate_with(finish=lambda p, a: a.to(p.dtype)), ["confidence is missing"]),
        (gate_with(dim=1), ["along the sequence"]),
        (lambda u, t: gate(u.detach(), t), ["no gradient reaches"]),
        (lambda u, t: gate(u, t)[1], ["2 results"]),
        (lambda u, t: gate(u.float(), t.float()), ["dtype"]),
    ],
)
def test_gate_mistakes(wrong, words):
    assert_rejects(check_gate, wrong, *words)


def rows(y, index):
    return torch.stack([row[ranks] for row, ranks in zip(y, index, strict=True)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda y, i: rows(y, i - 1), ["last row"]),
        (lambda y, i: rows(y, (i - 1).clamp(min=0)), ["first row"]),
        (lambda y, i: rows(y, i.clamp(max=y.shape[1] - 1)) * (i > 0)[..., None], ["off-by-one"]),
        (lambda y, i: extract(y[:1].expand_as(y), i), ["first sample"]),
        (lambda y, i: rows(y, i), ["IndexError"]),
        (lambda y, i: extract(y, i).detach(), ["no gradient reaches"]),
        (lambda y, i: extract(y, i).transpose(1, 2), ["shape"]),
    ],
)
def test_extract_mistakes(wrong, words):
    assert_rejects(check_extract, wrong, *words)


def compress_with(index=None, cut=None, packed=None):
    def wrong(x, active):
        there, ranks = compress(x, active)
        return (packed(x, there) if packed else there), (index(active) if index else ranks)

    return wrong


def right_aligned(x, active):
    packed, index = compress(x, active)
    return torch.stack([p.roll(int(packed.shape[1] - i.max()), 0) for p, i in zip(packed, index, strict=True)]), index


def waste_kept(x, active):
    packed, index = compress(x, active)
    return F.pad(packed, (0, 0, 1, 0)), index


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (compress_with(index=lambda a: (a.cumsum(1) - 1) * a), ["from 0"]),
        (compress_with(index=lambda a: a.cumsum(1)), ["keep a rank"]),
        (compress_with(index=lambda a: a.cumsum(0) * a), ["over the batch"]),
        (right_aligned, ["zeros come last"]),
        (compress_with(packed=lambda x, p: F.pad(p, (0, 0, 0, x.shape[1] - p.shape[1]))), ["cut it to M"]),
        (waste_kept, ["waste bin"]),
        (lambda x, a: (x * a[..., None], compress(x, a)[1]), ["nothing is packed"]),
        (lambda x, a: (compress(x.flip(1), a.flip(1))[0], compress(x.flip(1), a.flip(1))[1].flip(1)), ["last first"]),
        (lambda x, a: (x[a][None], compress(x, a)[1]), ["shape"]),
        (lambda x, a: compress(x.detach(), a), ["no gradient reaches"]),
    ],
)
def test_compress_mistakes(wrong, words):
    assert_rejects(check_compress, wrong, *words)


def gradient_with(slope=lambda p, tau: p[..., 0] * p[..., 1] / tau, signs=(-1.0, 1.0), asleep=False, sum_=torch.sum):
    def wrong(logits, log_temperature, attended, upstream):
        tau = log_temperature.exp()
        p = torch.softmax(logits / tau, dim=-1)
        pull = slope(p, tau) * sum_(upstream * attended, -1)
        pull = pull if asleep else pull * (p[..., 1] > p[..., 0])
        return pull[..., None] * torch.tensor(signs, dtype=pull.dtype)

    return wrong


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (gradient_with(asleep=True), ["sleeping tokens get a gradient"]),
        (gradient_with(slope=lambda p, tau: p[..., 0] * p[..., 1]), ["1/tau is missing"]),
        (gradient_with(slope=lambda p, tau: p[..., 0] * p[..., 1] * tau), ["multiplies"]),
        (gradient_with(slope=lambda p, tau: p.amax(-1) / tau), ["only c"]),
        (gradient_with(slope=lambda p, tau: p.amin(-1) / tau), ["only 1 - c"]),
        (gradient_with(slope=lambda p, tau: 1 / tau), ["softmax is missing"]),
        (gradient_with(signs=(1.0, -1.0)), ["exchanged"]),
        (gradient_with(signs=(0.0, 1.0)), ["only the activate logit"]),
        (gradient_with(signs=(1.0, 1.0)), ["same sign"]),
        (gradient_with(sum_=torch.mean), ["averaged"]),
        (lambda *a: choice_gradient(*a)[..., 1], ["shape"]),
    ],
)
def test_choice_gradient_mistakes(wrong, words):
    assert_rejects(check_choice_gradient, wrong, *words)


def in_place(keys, filled, new, active):
    keys[active, :-1] = keys[active, 1:].clone()
    keys[active, -1] = new[active]
    return keys, (filled + active).clamp(max=keys.shape[1])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda k, f, n, a: remember(k, f, n, a.any().expand_as(a)), ["one active sample"]),
        (lambda k, f, n, a: remember(k, f, n * a[:, None], torch.ones_like(a)), ["values are wrong"]),
        (
            lambda k, f, n, a: (torch.cat([k[:, 1:], (n * a[:, None])[:, None]], 1), remember(k, f, n, a)[1]),
            ["row of zeros"],
        ),
        (lambda k, f, n, a: (torch.cat([k, n[:, None]], 1), f + a), ["ever forgotten"]),
        (
            lambda k, f, n, a: (
                torch.where(a[:, None, None], torch.cat([n[:, None], k[:, :-1]], 1), k),
                remember(k, f, n, a)[1],
            ),
            ["stands first"],
        ),
        (lambda k, f, n, a: (remember(k, f, n, a)[0], f + a), ["beyond the number of slots"]),
        (lambda k, f, n, a: (remember(k, f, n, a)[0], f), ["not counted up"]),
        (lambda k, f, n, a: (remember(k, f, n, a)[0], (f + 1).clamp(max=k.shape[1])), ["sleeping samples too"]),
        (in_place, ["in place"]),
    ],
)
def test_remember_mistakes(wrong, words):
    assert_rejects(check_remember, wrong, *words)


def test_a_loop_is_seen():
    def one_by_one(keys, filled, new, active):
        samples = zip(keys, filled, new, active, strict=True)
        found = [remember(*(part[None] for part in sample)) for sample in samples]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    assert_rejects(check_compress, package.compress_slow, "values are right", "loop over positions")
    assert_rejects(check_extract, package.extract_slow, "values are right", "loop over positions")
    assert_rejects(check_remember, one_by_one, "values are right", "loop over the batch")
