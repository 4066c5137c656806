"""Checks of chapter 12's exercises: half-lives, distances of attention, codes in use, a fair control, a fall."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check

__all__ = [
    "check_codes_in_use",
    "check_control",
    "check_distance_profile",
    "check_half_life",
    "check_paired_fall",
]


def _uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _real(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


# ---- how long an average remembers -----------------------------------------------------------------------------------


def _half_life(alpha: Tensor, delta: Tensor) -> Tensor:
    return math.log(0.5) / torch.log1p(-alpha * delta)


def check_half_life(candidate: Any) -> Verdict:
    """Exercise 1: ``half_life(alpha, delta)``, both (D, n) in (0, 1) -> (D, n), in steps."""
    return check(
        candidate,
        _half_life,
        name="half_life",
        cases=[
            (0.05 + 0.9 * _uniform(5, 3, seed=1), 0.05 + 0.9 * _uniform(5, 3, seed=2)),
            (_uniform(1, 1, seed=3), _uniform(1, 1, seed=4)),
            (torch.full((2, 2), 1e-9, dtype=torch.float64), torch.full((2, 2), 1e-8, dtype=torch.float64)),
        ],
        suspects={
            "the time to fall to 1/e; a half-life is the time to fall to 1/2": lambda a, d: -1 / torch.log1p(-a * d),
            "the decay of a plain average, 1 - alpha: the damped one keeps 1 - alpha * delta": lambda a, d: (
                math.log(0.5) / torch.log1p(-a)
            ),
            "alpha * delta taken for the decay: it is what is lost in a step, 1 - alpha * delta is kept": lambda a, d: (
                math.log(0.5) / torch.log(a * d)
            ),
            "log(1 - x) of a number so small that 1 - x is rounded to 1: log1p(-x) does not lose it": lambda a, d: (
                math.log(0.5) / torch.log(1 - a * d)
            ),
            "ln 2 / (alpha * delta), which is right for slow averages only": lambda a, d: math.log(2) / (a * d),
            "the logarithm without ln(1/2) above it": lambda a, d: 1 / torch.log1p(-a * d),
        },
        verified="The last case has half-lives of 10^16 steps, which log(1 - x) would call infinite.",
    )


# ---- how far attention goes ------------------------------------------------------------------------------------------


def _profile(weights: Tensor, mask: Tensor) -> Tensor:
    length = len(mask)
    rows = weights[mask] / weights[mask].sum(-1, keepdim=True)  # (real, L)
    apart = (torch.arange(length)[mask, None] - torch.arange(length)).abs()
    return torch.zeros(length, dtype=weights.dtype).index_add(0, apart.flatten(), rows.flatten()) / len(rows)


def check_distance_profile(candidate: Any) -> Verdict:
    """Exercise 2: ``distance_profile(weights, mask)``, (L, L) and bool (L,) -> (L,), which sums to 1."""

    def by_distance(rows: Tensor, queries: Tensor, count: float) -> Tensor:
        length = rows.shape[1]
        steps = (queries[:, None] - torch.arange(length)).abs()
        return torch.zeros(length, dtype=rows.dtype).index_add(0, steps.flatten(), rows.flatten()) / count

    def even(weights: Tensor) -> Tensor:
        return weights / weights.sum(-1, keepdim=True)

    def pairs(weights: Tensor, mask: Tensor) -> Tensor:
        queries = torch.arange(len(mask))[mask]
        ones = by_distance(torch.ones_like(weights)[mask], queries, 1.0)
        return by_distance(even(weights)[mask], queries, 1.0) / ones.clamp(min=1)

    def past(weights: Tensor, mask: Tensor) -> Tensor:
        rows = even(weights)[mask].tril() if bool(mask.all()) else even(weights).tril()[mask]
        return by_distance(rows, torch.arange(len(mask))[mask], float(mask.sum()))

    hidden = _uniform(6, 6, seed=12)
    hidden[:, 4:] = 0.0
    return check(
        candidate,
        _profile,
        name="distance_profile",
        cases=[
            (_uniform(7, 7, seed=11), torch.ones(7, dtype=torch.bool)),
            (hidden, torch.arange(6) < 4),
            (torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)),
        ],
        suspects={
            "rows are not brought to sum 1 first, so loud queries count more": lambda w, m: by_distance(
                w[m], torch.arange(len(m))[m], float(m.sum())
            ),
            "padded queries are counted": lambda w, m: by_distance(even(w), torch.arange(len(m)), float(len(m))),
            "divided by the length instead of the number of real queries": lambda w, m: by_distance(
                even(w)[m], torch.arange(len(m))[m], float(len(m))
            ),
            "a mean over the pairs at each distance: wanted is the share of a query's attention that goes there": pairs,
            "only keys before the query: distances run both ways": past,
            "the sum over queries: divide by how many there are": lambda w, m: by_distance(
                even(w)[m], torch.arange(len(m))[m], 1.0
            ),
            "rows brought to sum 1 along the queries (dim 0) instead of the keys": lambda w, m: by_distance(
                (w / w.sum(0, keepdim=True).clamp(min=1e-30))[m], torch.arange(len(m))[m], float(m.sum())
            ),
        },
        gradients=False,
        verified="It sums to 1: nothing is lost, whatever the weights' function.",
    )


# ---- how many codes are in use ---------------------------------------------------------------------------------------


def _in_use(codes: Tensor, mask: Tensor) -> float:
    share = torch.unique(codes[mask], return_counts=True)[1].double() / int(mask.sum())
    return float(torch.exp(-(share * share.log()).sum()))


def check_codes_in_use(candidate: Any) -> Verdict:
    """Exercise 3: ``codes_in_use(codes, mask)``, long and bool (B, L) -> a number, the perplexity."""

    def shares(codes: Tensor, mask: Tensor) -> Tensor:
        return torch.unique(codes[mask], return_counts=True)[1].double() / int(mask.sum())

    def entropy(codes: Tensor, mask: Tensor) -> float:
        p = shares(codes, mask)
        return float(-(p * p.log()).sum())

    some = (8 * _uniform(3, 20, seed=21) ** 2).long()
    padded = some.masked_fill(~_real([20, 9, 3], 20), 0)
    return check(
        candidate,
        _in_use,
        name="codes_in_use",
        cases=[
            (padded, _real([20, 9, 3], 20)),
            (torch.arange(12).view(2, 6) % 5 * 40, torch.ones(2, 6, dtype=torch.bool)),
            (torch.tensor([[127]]), torch.ones(1, 1, dtype=torch.bool)),
        ],
        suspects={
            "padding is counted": lambda z, m: _in_use(z, torch.ones_like(m)),
            "how many codes occur at all: a code that names one key weighs as much as one that names a thousand": (
                lambda z, m: float(len(shares(z, m)))
            ),
            "the entropy itself: take exp of it": entropy,
            "the entropy in bits under exp: exp belongs to natural logarithms, 2** to log2": lambda z, m: math.exp(
                entropy(z, m) / math.log(2)
            ),
            "2** of an entropy in nats: 2** belongs to log2, exp to natural logarithms": (
                lambda z, m: 2 ** entropy(z, m)
            ),
            "1 / sum(p**2), another way to count: wanted is exp of the entropy": lambda z, m: float(
                1 / shares(z, m).square().sum()
            ),
            "the mean over sequences of each one's own perplexity: count all sequences together": lambda z, m: (
                sum(_in_use(a[None], b[None]) for a, b in zip(z, m, strict=True)) / len(z)
            ),
        },
        gradients=False,
        verified="With 5 codes in use equally (nearly, in the second case) it is close to 5; with one, exactly 1.",
    )


# ---- a fair control --------------------------------------------------------------------------------------------------


def _control(active: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    rank = noise.masked_fill(~mask, -1.0).argsort(1, descending=True).argsort(1)
    return rank < (active & mask).sum(1, keepdim=True)


def check_control(candidate: Any) -> Verdict:
    """Exercise 4: ``control(active, mask, noise)``, bool, bool and float (B, L) -> bool (B, L)."""

    def ranked(noise: Tensor, number: Tensor) -> Tensor:
        return noise.argsort(1, descending=True).argsort(1) < number

    def among(active: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
        order = noise.masked_fill(~mask, -1.0).flatten().argsort(descending=True).argsort()
        return (order < int((active & mask).sum())).view_as(active)

    mask = _real([9, 5, 2], 9)
    active = (_uniform(3, 9, seed=31) > 0.5) & mask
    active[2] = False
    one = torch.ones(1, 1, dtype=torch.bool)
    return check(
        candidate,
        _control,
        name="control",
        cases=[
            (active, mask, _uniform(3, 9, seed=32)),
            (one, one, _uniform(1, 1, seed=33)),
            (mask, mask, _uniform(3, 9, seed=34)),
        ],
        suspects={
            "padding is woken: silence its noise first, or sort it to the end": lambda a, m, r: ranked(
                r, (a & m).sum(1, keepdim=True)
            ),
            "as many in the whole batch, not in each sequence: then long ones lose what short ones gain": among,
            "the smallest noise instead of the largest": lambda a, m, r: ranked(
                (-r).masked_fill(~m, -2.0), (a & m).sum(1, keepdim=True)
            ),
            "the average number for all sequences: each keeps its own": lambda a, m, r: (
                ranked(r.masked_fill(~m, -1.0), (a & m).sum(1).double().mean().round()) & m
            ),
            "a coin for each token: that gives the number only on average, not exactly": lambda a, m, r: (
                (r < ((a & m).sum(1, keepdim=True) / m.sum(1, keepdim=True))) & m
            ),
            "only tokens that slept are woken: a random choice may hit those that were awake": lambda a, m, r: (
                ranked(r.masked_fill(~m | a, -1.0), (a & m).sum(1, keepdim=True)) & m
            ),
            "the model's own choice: nothing was drawn": lambda a, m, r: a & m,
        },
        gradients=False,
        verified="Each sequence wakes exactly as many tokens as before, and never its padding.",
    )


# ---- a fall, and how sure we are of it -------------------------------------------------------------------------------


def _fall(before: Tensor, after: Tensor) -> tuple[float, float]:
    change = before.double() - after.double()
    return float(change.mean()), float(change.std() / math.sqrt(len(change)))


def check_paired_fall(candidate: Any) -> Verdict:
    """Exercise 5: ``paired_fall(before, after)``, bool (n,) each -> the fall and its standard error, two numbers."""

    def share(right: Tensor) -> float:
        return float(right.double().mean())

    def binomial(p: float, n: int) -> float:
        return p * (1 - p) / n

    before = _uniform(60, seed=41) < 0.7
    after = before & (_uniform(60, seed=42) < 0.8) | (_uniform(60, seed=43) < 0.05)
    return check(
        candidate,
        _fall,
        name="paired_fall",
        cases=[(before, after), (after[:13], before[:13]), (before[:7], before[:7])],
        suspects={
            "the error of two independent samples: these are the same sequences twice, so take the differences": (
                lambda b, a: (
                    _fall(b, a)[0],
                    math.sqrt(binomial(share(b), len(b)) + binomial(share(a), len(a))),
                )
            ),
            "the error of the accuracy before, not of the fall": lambda b, a: (
                _fall(b, a)[0],
                math.sqrt(binomial(share(b), len(b))),
            ),
            "the error of the accuracy after, not of the fall": lambda b, a: (
                _fall(b, a)[0],
                math.sqrt(binomial(share(a), len(a))),
            ),
            "the standard deviation of the differences: the error of their mean is smaller by sqrt(n)": lambda b, a: (
                _fall(b, a)[0],
                _fall(b, a)[1] * math.sqrt(len(b)),
            ),
            "divided by n instead of sqrt(n)": lambda b, a: (_fall(b, a)[0], _fall(b, a)[1] / math.sqrt(len(b))),
            "the variance without its square root": lambda b, a: (_fall(b, a)[0], _fall(b, a)[1] ** 2),
            "the deviation with n instead of n - 1 below it": lambda b, a: (
                _fall(b, a)[0],
                _fall(b, a)[1] * math.sqrt((len(b) - 1) / len(b)),
            ),
            "the sign: a fall is before minus after": lambda b, a: (-_fall(b, a)[0], _fall(b, a)[1]),
            "in percent: a share between 0 and 1 was wanted": lambda b, a: tuple(100 * part for part in _fall(b, a)),
        },
        gradients=False,
        verified="A model compared with itself falls by 0, with an error of 0.",
    )
