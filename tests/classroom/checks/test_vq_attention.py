"""Chapter 06's checks take the solution, see the stub, and name the cause of every plausible mistake."""

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.vq_attention import (
    check_attend_over_codes,
    check_causal_block,
    check_code_sums,
    check_nearest,
    check_quantise,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms import vq_attention as package

# ---- the solutions, as a reader may write them -----------------------------------------------------------------------


def nearest(k, codebook):
    return (k @ codebook.mT - codebook.square().sum(-1).unsqueeze(1) / 2).argmax(-1)


def code_sums(v, z, codes):
    onehot = F.one_hot(z, codes).to(v.dtype)
    return onehot.mT @ v, onehot.sum(2)


def words(codebook, z):
    return codebook[torch.arange(codebook.shape[0])[:, None], z]


def quantise(k, codebook):
    c = words(codebook, nearest(k, codebook)).detach()
    return c + (k - k.detach()), (k - c).square().sum((1, 3)).mean()


def attend_over_codes(q, codebook, sums, counts):
    scores = (q @ codebook.mT + counts.log().unsqueeze(2)).masked_fill((counts == 0).unsqueeze(2), -torch.inf)
    return torch.softmax(scores, -1) @ (sums / counts.clamp(min=1).unsqueeze(-1))


def causal_block(q, z, v, codebook, sums, counts):
    recent = (q @ words(codebook, z).mT).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)
    older = q @ codebook.mT + counts.log().unsqueeze(2)
    weights = torch.softmax(torch.cat([recent, older], -1), -1)
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    new_sums, new_counts = code_sums(v, z, codebook.shape[1])
    return weights @ torch.cat([v, mean], 2), sums + new_sums, counts + new_counts


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_nearest: nearest,
    check_code_sums: code_sums,
    check_quantise: quantise,
    check_attend_over_codes: attend_over_codes,
    check_causal_block: causal_block,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    assert_accepts(check_nearest, package.nearest_code)
    assert_accepts(check_nearest, lambda k, c: torch.cdist(k, c.expand(len(k), -1, -1, -1)).argmin(-1))
    assert_accepts(check_code_sums, package.code_sums)


# ---- wrong answers ---------------------------------------------------------------------------------------------------


def distance(k, codebook):
    return (k.unsqueeze(3) - codebook.unsqueeze(1)).square().sum(-1)


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (lambda k, c: distance(k, c).argmin(-1), ["names are right", "square out"]),
        (lambda k, c: distance(k, c).argmax(-1), ["farthest"]),
        (lambda k, c: (k @ c.mT).argmax(-1), ["long codes win"]),
        (lambda k, c: (k @ c.mT - c.square().sum(-1).unsqueeze(1)).argmax(-1), ["short codes win"]),
        (lambda k, c: (k.unsqueeze(3) - c.unsqueeze(1)).abs().sum(-1).argmin(-1), ["absolute differences"]),
        (lambda k, c: (F.normalize(k, dim=-1) @ F.normalize(c, dim=-1).mT).argmax(-1), ["angle"]),
        (lambda k, c: nearest(k, c[:1].expand_as(c)), ["head 0"]),
        (lambda k, c: distance(k, c).min(-1).values, ["dtype"]),
        (lambda k, c: distance(k, c).min(-1), ["one result"]),
        (lambda k, c: nearest(k, c).int(), ["dtype"]),
        (lambda k, c: (k.unsqueeze(3) - c).square().sum(-1).argmin(-1), ["raised"]),
    ],
)
def test_nearest_mistakes(wrong, cause):
    assert_rejects(check_nearest, wrong, *cause)


def written_over(v, z, codes):
    sums, counts = v.new_zeros(*v.shape[:2], codes, v.shape[3]), v.new_zeros(*v.shape[:2], codes)
    for t in range(v.shape[2]):
        for b in range(v.shape[0]):
            for h in range(v.shape[1]):
                sums[b, h, z[b, h, t]] = v[b, h, t]
                counts[b, h, z[b, h, t]] = 1
    return sums, counts


def shared(dims):
    return lambda *a: tuple(x.sum(dims, keepdim=True).expand_as(x) for x in code_sums(*a))


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (written_over, ["writes, it does not add"]),
        (lambda v, z, s: (code_sums(v, z, s)[0] / code_sums(v, z, s)[1].clamp(min=1)[..., None], code_sums(v, z, s)[1]),
         ["mean of each code"]),
        (shared((0,)), ["sequences share"]),
        (shared((1,)), ["heads share"]),
        (shared((0, 1)), ["sequences and heads share"]),
        (lambda *a: code_sums(*a)[::-1], ["swapped"]),
        (lambda *a: code_sums(*a)[0], ["2 results"]),
        (lambda v, z, s: (F.one_hot(z, s).to(v.dtype).mT @ v, F.one_hot(z, s).sum(2)), ["result 2 of 2", "dtype"]),
        (lambda v, z, s: code_sums(v.detach(), z, s), ["no gradient reaches v"]),
    ],
)  # fmt: skip
def test_code_sums_mistakes(wrong, cause):
    assert_rejects(check_code_sums, wrong, *cause)


def quantise_with(keys=lambda k, c: c + (k - k.detach()), loss=lambda e: e.sum((1, 3)).mean(), detach=True):
    def go(k, codebook):
        c = words(codebook, nearest(k, codebook))
        c = c.detach() if detach else c
        return keys(k, c), loss((k - c).square())

    return go


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (quantise_with(lambda k, c: c + k), ["lacks the subtraction"]),
        (quantise_with(lambda k, c: k * 1), ["unquantised"]),
        (quantise_with(lambda k, c: c), ["gradient with respect to k"]),
        (quantise_with(lambda k, c: k + (c - k).detach()), ["bit for bit"]),
        (quantise_with(loss=lambda e: e.mean()), ["mean over everything"]),
        (quantise_with(loss=lambda e: e.sum()), ["sum over everything"]),
        (quantise_with(loss=lambda e: e.sum(-1).mean()), ["mean over the heads"]),
        (quantise_with(loss=lambda e: e.mean(-1).sum(1).mean()), ["over the width"]),
        (quantise_with(loss=lambda e: e.sum(-1).sqrt().sum(1).mean()), ["its square"]),
        (quantise_with(detach=False), ["codebook.detach() is missing"]),
        (lambda k, c: quantise(k, c)[::-1], ["swapped"]),
        (lambda k, c: quantise(k.detach(), c), ["no gradient"]),
    ],
)
def test_quantise_mistakes(wrong, cause):
    assert_rejects(check_quantise, wrong, *cause)


def over_codes_with(log_count=None, mean=None, scale=1.0):
    def go(q, codebook, sums, counts):
        log = counts.log() if log_count is None else log_count(counts)
        values = sums / counts.clamp(min=1).unsqueeze(-1) if mean is None else mean(sums, counts)
        return torch.softmax(q @ codebook.mT * scale + log.unsqueeze(2), -1) @ values

    return go


def largest_of_all(q, codebook, sums, counts):
    scores = q @ codebook.mT
    weight = torch.exp(scores - scores.max(-1, keepdim=True).values)
    return weight @ sums / (weight @ counts[..., None])


def no_largest(q, codebook, sums, counts):
    weight = torch.exp(q @ codebook.mT)
    return weight @ sums / (weight @ counts[..., None])


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (over_codes_with(torch.zeros_like), ["counts are missing"]),
        (over_codes_with(lambda n: n.clamp(min=1).log()), ["counts as one key"]),
        (over_codes_with(mean=lambda sums, n: sums), ["sums where means belong"]),
        (over_codes_with(lambda n: torch.where(n > 0, n, -torch.inf)), ["not its logarithm"]),
        (over_codes_with(scale=3**-0.5), ["sqrt(d)"]),
        (over_codes_with(mean=lambda sums, n: sums / n.unsqueeze(-1)), ["NaN"]),
        (lambda q, c, u, n: torch.exp(q @ c.mT) @ u, ["not normalised"]),
        (largest_of_all, ["Hide the empty codes first"]),
        (no_largest, ["Hide the empty codes first"]),
    ],
)
def test_attend_over_codes_mistakes(wrong, cause):
    assert_rejects(check_attend_over_codes, wrong, *cause)


def block_with(diagonal=1, cache=True, newest=False, own=True, carried=lambda old, new: old + new):
    def go(q, z, v, codebook, sums, counts):
        new_sums, new_counts = code_sums(v, z, codebook.shape[1])
        after = carried(sums, new_sums), carried(counts, new_counts)
        u, n = after if newest else (sums, counts)
        hidden = torch.ones(q.shape[2], q.shape[2]).triu(diagonal).bool()
        a = torch.exp((q @ words(codebook, z).mT).masked_fill(hidden, -torch.inf)) * own
        b = torch.exp(q @ codebook.mT) * cache
        return (a @ v + b @ u) / (a.sum(-1, keepdim=True) + b @ n[..., None]), *after

    return go


def two_softmaxes(q, z, v, codebook, sums, counts):
    y, *rest = block_with(cache=False)(q, z, v, codebook, sums, counts)
    return y + attend_over_codes(q, codebook, sums, counts).nan_to_num(), *rest


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (block_with(diagonal=99), ["own future is seen"]),
        (block_with(diagonal=0), ["its own key"]),
        (block_with(cache=False), ["not read"]),
        (block_with(newest=True), ["counted twice"]),
        (block_with(newest=True, own=False), ["own future is seen"]),
        (block_with(carried=lambda old, new: new), ["this block alone"]),
        (block_with(carried=lambda old, new: old * 1), ["old sums are returned"]),
        (two_softmaxes, ["one denominator"]),
        (lambda *a: causal_block(*a)[0], ["3 results"]),
        (lambda *a: tuple(x.detach() for x in causal_block(*a)), ["gradient"]),
    ],
)
def test_causal_block_mistakes(wrong, cause):
    assert_rejects(check_causal_block, wrong, *cause)
