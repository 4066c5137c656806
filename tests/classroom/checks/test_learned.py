"""The checks of chapter 12: they take the solutions, and name the cause of plausible mistakes."""

import math

import pytest
import torch

from longseq_tutorial.classroom import opened
from longseq_tutorial.classroom.checks.learned import (
    check_codes_in_use,
    check_control,
    check_distance_profile,
    check_half_life,
    check_paired_fall,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved

CHECKS = [check_codes_in_use, check_control, check_distance_profile, check_half_life, check_paired_fall]


def half_life(alpha, delta):
    return -math.log(2) / torch.log1p(-alpha * delta)


def distance_profile(weights, mask):
    length, found = len(mask), []
    for distance in range(length):
        total = weights.new_zeros(())
        for i in range(length):
            row = weights[i] / weights[i].sum() if mask[i] else None
            for j in {i - distance, i + distance}:
                if row is not None and 0 <= j < length:
                    total = total + row[j]
        found.append(total / mask.sum())
    return torch.stack(found)


def codes_in_use(codes, mask):
    shares = torch.bincount(codes[mask]).double() / mask.sum()
    shares = shares[shares > 0]
    return float(2 ** -(shares * shares.log2()).sum())


def control(active, mask, noise):
    chosen = torch.zeros_like(active)
    for row, (wake, real, score) in enumerate(zip(active, mask, noise, strict=True)):
        places = real.nonzero().squeeze(1)
        best = score[places].topk(int((wake & real).sum())).indices
        chosen[row, places[best]] = True
    return chosen


def paired_fall(before, after):
    change = before.double() - after.double()
    n = len(change)
    return float(change.mean()), math.sqrt(float((change - change.mean()).square().sum()) / (n - 1) / n)


SOLUTIONS = [codes_in_use, control, distance_profile, half_life, paired_fall]


@pytest.mark.parametrize(("exercise", "solution"), list(zip(CHECKS, SOLUTIONS, strict=True)))
def test_solutions(exercise, solution):
    assert_accepts(exercise, solution)


@pytest.mark.parametrize("exercise", CHECKS)
def test_stubs(exercise):
    def stub(*arguments):
        raise NotImplementedError("your turn: think")

    assert_unsolved(exercise, stub)


def test_the_packages_own_profile_is_a_solution():
    assert_accepts(check_distance_profile, lambda weights, mask: opened.distance_profile(weights[None], mask))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda a, d: -1 / torch.log1p(-a * d), ["1/e"]),
        (lambda a, d: -math.log(2) / torch.log1p(-a), ["plain average"]),
        (lambda a, d: -math.log(2) / torch.log(a * d), ["taken for the decay"]),
        (lambda a, d: -math.log(2) / torch.log(1 - a * d), ["rounded to 1"]),
        (lambda a, d: math.log(2) / (a * d), ["slow averages only"]),
        (lambda a, d: -half_life(a, d), ["sign"]),
        (lambda a, d: half_life(a.detach(), d), ["alpha", "graph is cut"]),
    ],
)
def test_other_times(wrong, words):
    assert_rejects(check_half_life, wrong, *words)


def at_distance(rows, queries, count):
    length = rows.shape[1]
    apart = (queries[:, None] - torch.arange(length)).abs()
    return torch.stack([rows[apart == d].sum() for d in range(length)]) / count


def normal(w):
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda w, m: at_distance(w[m], torch.arange(len(m))[m], m.sum()), ["not brought to sum 1"]),
        (lambda w, m: at_distance(normal(w), torch.arange(len(m)), len(m)), ["padded queries"]),
        (lambda w, m: at_distance(normal(w)[m], torch.arange(len(m))[m], len(m)), ["number of real queries"]),
        (lambda w, m: at_distance(normal(w)[m], torch.arange(len(m))[m], 1), ["sum over queries"]),
        (lambda w, m: at_distance(normal(w).tril()[m], torch.arange(len(m))[m], m.sum()), ["before the query"]),
        (
            lambda w, m: torch.stack(
                [
                    x.mean() if len(x) else w.new_zeros(())
                    for x in (
                        normal(w)[m][(torch.arange(len(m))[m, None] - torch.arange(len(m))).abs() == d]
                        for d in range(len(m))
                    )
                ]
            ),
            ["mean over the pairs"],
        ),
        (
            lambda w, m: at_distance((w / w.sum(0).clamp(min=1e-30))[m], torch.arange(len(m))[m], m.sum()),
            ["along the queries"],
        ),
    ],
)
def test_other_profiles(wrong, words):
    assert_rejects(check_distance_profile, wrong, *words)


def entropy(codes, mask):
    return math.log(codes_in_use(codes, mask))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda z, m: codes_in_use(z, torch.ones_like(m)), ["padding"]),
        (lambda z, m: float(len(z[m].unique())), ["occur at all"]),
        (entropy, ["take exp"]),
        (lambda z, m: 2 ** entropy(z, m), ["2**"]),
        (lambda z, m: math.exp(entropy(z, m) / math.log(2)), ["in bits under exp"]),
        (lambda z, m: float(m.sum() ** 2 / torch.bincount(z[m]).square().sum()), ["1 / sum"]),
        (lambda z, m: sum(codes_in_use(a, b) for a, b in zip(z, m, strict=True)) / len(z), ["mean over sequences"]),
    ],
)
def test_other_counts(wrong, words):
    assert_rejects(check_codes_in_use, wrong, *words)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda a, m, r: control(a, torch.ones_like(m), r), ["padding is woken"]),
        (lambda a, m, r: control(a, m, 1 - r), ["smallest noise"]),
        (lambda a, m, r: (r < (a & m).sum(1, keepdim=True) / m.sum(1, keepdim=True)) & m, ["a coin"]),
        (lambda a, m, r: a & m, ["own choice"]),
        (lambda a, m, r: control(a.flatten()[None], m.flatten()[None], r.flatten()[None]).view_as(a), ["whole batch"]),
        (lambda a, m, r: control(a, m, r).double(), ["dtype"]),
        (lambda a, m, r: control(a, m, r.masked_fill(a, 0)), ["only tokens that slept"]),
    ],
)
def test_unfair_controls(wrong, words):
    assert_rejects(check_control, wrong, *words)


def spread(right):
    p = float(right.double().mean())
    return math.sqrt(p * (1 - p) / len(right))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda b, a: (paired_fall(b, a)[0], math.hypot(spread(b), spread(a))), ["independent samples"]),
        (lambda b, a: (paired_fall(b, a)[0], spread(b)), ["accuracy before"]),
        (lambda b, a: (paired_fall(b, a)[0], spread(a)), ["accuracy after"]),
        (lambda b, a: (paired_fall(b, a)[0], paired_fall(b, a)[1] * math.sqrt(len(a))), ["smaller by sqrt(n)"]),
        (lambda b, a: (paired_fall(b, a)[0], paired_fall(b, a)[1] / math.sqrt(len(a))), ["divided by n instead"]),
        (lambda b, a: (paired_fall(a, b)[0], paired_fall(a, b)[1]), ["before minus after"]),
        (lambda b, a: tuple(100 * x for x in paired_fall(b, a)), ["percent"]),
        (lambda b, a: paired_fall(b, a)[0], ["2 results"]),
    ],
)
def test_other_falls(wrong, words):
    assert_rejects(check_paired_fall, wrong, *words)
