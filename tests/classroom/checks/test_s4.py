"""Chapter 02's checks accept right answers, and name the cause of plausible wrong ones."""

import math

import pytest
import torch

from longseq_tutorial.classroom.checks.s4 import (
    check_bilinear,
    check_generating_function,
    check_recall_kernel,
    check_s4d_kernel,
    check_woodbury,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.classroom.panels_s4 import legendre
from longseq_tutorial.mechanisms.s4 import discretize

# ---- solutions, written as a reader would ----------------------------------------------------------------------------


def bilinear(A, B, dt):
    half = dt[:, None] / 2 * A
    return (1 + half) / (1 - half), dt[:, None] * B / (1 - half)


def kernel(Abar, Bbar, C, length):
    powers = Abar[..., None] ** torch.arange(length)
    return 2 * ((C * Bbar)[..., None] * powers).sum(1).real


def recall(N, age, dt, length):
    r = torch.exp(-dt * torch.arange(length, dtype=torch.float64))
    return dt * r * (legendre(N, r.numpy()) @ legendre(N, math.exp(-age)))


def generating(Abar, Bbar, C, length, power=torch.linalg.matrix_power, sign=-1):
    C = C - C @ power(Abar, length)
    out = []
    for k in range(length // 2 + 1):
        w = torch.exp(torch.tensor(sign * 2j * math.pi * k / length, dtype=torch.complex128))
        out.append(C @ torch.linalg.solve(torch.eye(len(C)) - w * Abar, Bbar))
    return torch.stack(out)


def woodbury(z, Lambda, P, B, C, star=torch.conj, sign=-1, one=torch.eye, inner=1):
    inverse = 1 / (z[:, None] - Lambda)
    CP = (C * inverse) @ P
    PB = (inverse * B) @ star(P)
    PP = star(P).T @ (inverse[..., None] * P)
    middle = torch.linalg.inv(one(P.shape[1]) + inner * PP)
    return inverse @ (C * B) + sign * (CP[:, None] @ middle @ PB[..., None])[:, 0, 0]


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_bilinear: bilinear,
    check_s4d_kernel: kernel,
    check_recall_kernel: recall,
    check_generating_function: generating,
    check_woodbury: woodbury,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    def by_cumulated_products(a, b, c, length):
        powers = torch.cat([torch.ones_like(a)[..., None], a[..., None].expand(*a.shape, length - 1)], -1).cumprod(-1)
        return (2 * torch.einsum("dn,dn,dnl->dl", c, b, powers)).real

    def by_the_kernel(Abar, Bbar, C, length):
        x, k = Bbar, []
        for _ in range(length):
            k.append((C @ x).real)
            x = Abar @ x
        return torch.fft.rfft(torch.stack(k))

    assert_accepts(check_s4d_kernel, by_cumulated_products)
    assert_accepts(check_generating_function, by_the_kernel)


# ---- wrong answers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda A, B, dt: discretize(A, B, dt, "zoh"), ["zero-order hold"]),
        (lambda A, B, dt: (1 + dt[:, None] * A, dt[:, None] * B), ["Euler"]),
        (lambda A, B, dt: (1 / (1 - dt[:, None] * A), dt[:, None] * B / (1 - dt[:, None] * A)), ["backward Euler"]),
        (
            lambda A, B, dt: ((1 + dt[:, None] * A) / (1 - dt[:, None] * A), dt[:, None] * B / (1 - dt[:, None] * A)),
            ["factor 1/2"],
        ),
        (lambda A, B, dt: (bilinear(A, B, dt)[0], dt[:, None] * B), ["not divided"]),
        (lambda A, B, dt: (bilinear(A, B, dt)[0], bilinear(A, B, dt)[1] / dt[:, None]), ["dt is missing"]),
        (lambda A, B, dt: (1 / bilinear(A, B, dt)[0], bilinear(A, B, dt)[1]), ["upside down"]),
        (lambda A, B, dt: bilinear(A, B, dt)[::-1], ["swapped"]),
        (lambda A, B, dt: bilinear(A, B, dt)[0], ["2 results"]),
        (lambda A, B, dt: ((1 + dt * A / 2) / (1 - dt * A / 2), B), ["size"]),
        (lambda A, B, dt: bilinear(A.detach(), B, dt), ["gradient"]),
    ],
)
def test_bilinear_mistakes(wrong, words):
    assert_rejects(check_bilinear, wrong, *words)


def kernel_with(weight=lambda b, c: c * b, lags=torch.arange, part=lambda y: 2 * y.real):
    return lambda a, b, c, k: part((weight(b, c)[..., None] * a[..., None] ** lags(k)).sum(1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (kernel_with(part=lambda y: y.real), ["conjugate twin"]),
        (kernel_with(part=lambda y: y), ["dtype"]),
        (kernel_with(part=lambda y: 2 * y.abs()), ["modulus"]),
        (kernel_with(part=lambda y: 2 * y.imag), ["imaginary part"]),
        (kernel_with(weight=lambda b, c: c.conj() * b), ["C is conjugated"]),
        (kernel_with(weight=lambda b, c: c), ["Bbar is missing"]),
        (kernel_with(weight=lambda b, c: b), ["C is missing"]),
        (kernel_with(lags=lambda k: 1 + torch.arange(k)), ["off-by-one"]),
        (kernel_with(lags=lambda k: torch.arange(k).flip(0)), ["reversed in time"]),
        (
            lambda a, b, c, k: 2 * ((c.real * b.real)[..., None] * (a[..., None] ** torch.arange(k)).real).sum(1),
            ["each factor"],
        ),
        (lambda *a: kernel(*a).T, ["shape"]),
    ],
)
def test_kernel_mistakes(wrong, words):
    assert_rejects(check_s4d_kernel, wrong, *words)


def recall_with(at=lambda age, dt: math.exp(-age), fade=lambda r: r, dt=lambda dt: dt, first=0):
    def go(N, age, step, length):
        r = torch.exp(-step * torch.arange(first, first + length, dtype=torch.float64))
        return dt(step) * fade(r) * (legendre(N, r.numpy()) @ legendre(N, at(age, step)))

    return go


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (recall_with(at=lambda age, dt: age), ["exp(-age)"]),
        (recall_with(at=lambda age, dt: math.exp(age)), ["exp(+age)"]),
        (recall_with(at=lambda age, dt: math.exp(-age * dt)), ["counted in steps"]),
        (recall_with(fade=lambda r: 1), ["fades with its age"]),
        (recall_with(dt=lambda dt: 1), ["dt is missing"]),
        (recall_with(first=1), ["off-by-one"]),
        (lambda *a: recall(*a).float(), ["dtype"]),
    ],
)
def test_recall_mistakes(wrong, words):
    assert_rejects(check_recall_kernel, wrong, *words)


def once_scaled(N, age, dt, length):
    r = torch.exp(-dt * torch.arange(length, dtype=torch.float64))
    plain = legendre(N, r.numpy()) / torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    return dt * r * (plain @ legendre(N, math.exp(-age)))


def endless(Abar, Bbar, C, length):
    return generating(Abar, Bbar, C, length, power=lambda A, n: torch.zeros_like(A))


@pytest.mark.parametrize(
    ("check", "wrong", "words"),
    [
        (check_recall_kernel, once_scaled, ["sqrt(2n+1)"]),
        (check_generating_function, endless, ["endless kernel"]),
        (
            check_generating_function,
            lambda *a: generating(*a, power=lambda A, n: -torch.linalg.matrix_power(A, n)),
            ["with a plus"],
        ),
        (
            check_generating_function,
            lambda *a: generating(*a, power=lambda A, n: torch.linalg.matrix_power(A, n - 1)),
            ["Abar^(L-1)"],
        ),
        (
            check_generating_function,
            lambda *a: generating(*a, power=lambda A, n: torch.linalg.matrix_power(A, n).T),
            ["transpose"],
        ),
        (check_generating_function, lambda *a: generating(*a, sign=1), ["rfft turns the other way"]),
        (check_generating_function, lambda *a: generating(*a)[:-1], ["shape"]),
        (check_woodbury, lambda z, L, P, B, C: (C * B / (z[:, None] - L)).sum(-1), ["correction", "missing"]),
        (check_woodbury, lambda z, L, P, B, C: woodbury(z, L, P.conj(), B, C), ["wrong P"]),
        (check_woodbury, lambda z, L, P, B, C: woodbury(z, L, P, B, C.conj()), ["C is conjugated"]),
        (check_woodbury, lambda z, L, P, B, C: woodbury(z, -L, P, B, C), ["z + Lambda"]),
    ],
)
def test_frequency_mistakes(check, wrong, words):
    assert_rejects(check, wrong, *words)


def column_by_column(z, L, P, B, C):
    plain = (C * B / (z[:, None] - L)).sum(-1)
    return plain + sum(woodbury(z, L, P[:, [i]], B, C) - plain for i in range(P.shape[1]))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda *a: woodbury(*a, sign=1), ["taken away"]),
        (lambda *a: woodbury(*a, inner=-1), ["1 - P^*"]),
        (lambda *a: woodbury(*a, one=lambda r: torch.zeros(r, r)), ["1 in the middle is missing"]),
        (lambda *a: woodbury(*a, one=lambda r: torch.ones(r, r)), ["identity matrix"]),
        (lambda *a: woodbury(*a, star=lambda P: P), ["without its conjugate"]),
        (lambda *a: woodbury(*(t.detach() for t in a)), ["gradient"]),
        (column_by_column, ["each column of P is treated alone"]),
    ],
)
def test_woodbury_mistakes(wrong, words):
    assert_rejects(check_woodbury, wrong, *words)


def test_a_dense_solve_is_seen():
    def dense(z, L, P, B, C):
        system = torch.diag_embed(z[:, None] - L) + P @ P.mH
        return torch.linalg.solve(system, B.expand(len(z), -1)[..., None])[..., 0] @ C

    assert_rejects(check_woodbury, dense, "values are right", "dense system")
