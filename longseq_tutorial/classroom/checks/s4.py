"""Checks of chapter 02's exercises: bilinear sampling, the kernel, a recall, the generating function, Woodbury."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.panels_s4 import legendre
from longseq_tutorial.classroom.watching import reject, watch
from longseq_tutorial.mechanisms.s4 import discretize, dplr_dense

__all__ = [
    "check_bilinear",
    "check_generating_function",
    "check_recall_kernel",
    "check_s4d_kernel",
    "check_woodbury",
]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex128)


def _eigenvalues(*shape: int, seed: int) -> Tensor:
    """Of a stable system: negative real parts."""
    z = _draw(*shape, seed=seed)
    return torch.complex(-z.real.abs() - 0.2, 3 * z.imag)


# ---- bilinear ------------------------------------------------------------------------------------------------------


def check_bilinear(candidate: Any) -> Verdict:
    """Exercise 1: ``bilinear(A, B, dt) -> (Abar, Bbar)``; A, B ``(D, N/2)`` complex, dt ``(D,)``."""

    def bilinear(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
        return discretize(A, B, dt, "bilinear")

    def wrong(
        decay: Callable[[Tensor], Tensor] = lambda z: (1 + z / 2) / (1 - z / 2),
        push: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda z, B, dt: dt * B / (1 - z / 2),
    ) -> Callable[..., Any]:
        def go(A: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
            step = dt.unsqueeze(-1)
            return decay(step * A), push(step * A, B, step)

        return go

    def case(dim: int, half: int, seed: int) -> tuple[Tensor, ...]:
        dt = 0.05 + _draw(dim, seed=seed + 2).real.abs() / 5
        return _eigenvalues(dim, half, seed=seed), _draw(dim, half, seed=seed + 1), dt

    return check(
        candidate,
        bilinear,
        name="bilinear",
        cases=[case(3, 4, 10), case(1, 1, 20), case(2, 5, 30)],
        suspects={
            "this is zero-order hold, exp(dt A); the bilinear rule is (1 + dt A/2) / (1 - dt A/2)": lambda A, B, dt: (
                discretize(A, B, dt, "zoh")
            ),
            "this is Euler's rule, 1 + dt A: the average over the *new* value is missing": wrong(
                lambda z: 1 + z, lambda z, B, dt: dt * B
            ),
            "this is the backward Euler rule, 1 / (1 - dt A): the average over the *old* value is missing": wrong(
                lambda z: 1 / (1 - z), lambda z, B, dt: dt * B / (1 - z)
            ),
            "dt A where dt A/2 belongs: the average of old and new has a factor 1/2": wrong(
                lambda z: (1 + z) / (1 - z), lambda z, B, dt: dt * B / (1 - z)
            ),
            "Bbar is not divided by 1 - dt A/2: bringing the new value to the left divides everything on the right": (
                wrong(push=lambda z, B, dt: dt * B)
            ),
            "dt is missing in Bbar: the input acts for the time dt": wrong(push=lambda z, B, dt: B / (1 - z / 2)),
            "Bbar has the numerator 1 + dt A/2, which belongs to Abar alone": wrong(
                push=lambda z, B, dt: dt * B * (1 + z / 2) / (1 - z / 2)
            ),
            "Abar is upside down: what should decay explodes": wrong(lambda z: (1 - z / 2) / (1 + z / 2)),
            "the two results are swapped: Abar first, then Bbar": lambda A, B, dt: bilinear(A, B, dt)[::-1],
        },
        verified="Every eigenvalue with a negative real part lands inside the unit circle.",
    )


# ---- the kernel ----------------------------------------------------------------------------------------------------


def _kernel(decay: Tensor, push: Tensor, C: Tensor, length: int) -> Tensor:
    return 2 * _sum_of_powers(decay, C * push, torch.arange(length)).real


def _sum_of_powers(decay: Tensor, weight: Tensor, exponents: Tensor) -> Tensor:
    return (weight.unsqueeze(-1) * decay.unsqueeze(-1) ** exponents).sum(1)


def check_s4d_kernel(candidate: Any) -> Verdict:
    """Exercise 2: ``s4d_kernel(Abar, Bbar, C, length) -> (D, length)`` real; all ``(D, N/2)`` complex."""

    def s4d_kernel(Abar: Tensor, Bbar: Tensor, C: Tensor, length: int) -> Tensor:
        return _kernel(Abar, Bbar, C, length)

    def case(dim: int, half: int, length: int, seed: int) -> tuple[Any, ...]:
        decay = torch.exp(_eigenvalues(dim, half, seed=seed) / 5)
        return decay, _draw(dim, half, seed=seed + 1), _draw(dim, half, seed=seed + 2), length

    return check(
        candidate,
        s4d_kernel,
        name="s4d_kernel",
        cases=[case(3, 4, 7, 40), case(2, 3, 1, 50), case(1, 1, 12, 60)],
        suspects={
            "the other half is missing: each state has a conjugate twin, so twice the real part": lambda a, b, c, k: (
                _kernel(a, b, c, k) / 2
            ),
            "the sum is complex: take twice its real part": lambda a, b, c, k: _sum_of_powers(
                a, c * b, torch.arange(k)
            ),
            "the modulus instead of the real part: a kernel may be negative": lambda a, b, c, k: (
                2 * _sum_of_powers(a, c * b, torch.arange(k)).abs()
            ),
            "the imaginary part instead of the real part": lambda a, b, c, k: (
                2 * _sum_of_powers(a, c * b, torch.arange(k)).imag
            ),
            "the real part is taken of each factor, before the product; take it once, at the end": lambda a, b, c, k: (
                2 * ((c.real * b.real).unsqueeze(-1) * (a.unsqueeze(-1) ** torch.arange(k)).real).sum(1)
            ),
            "C is conjugated: y = C x has no conjugate": lambda a, b, c, k: _kernel(a, b, c.conj(), k),
            "an off-by-one in the power: at lag 0 the input has just come in, so the power is 0": lambda a, b, c, k: (
                _kernel(a, a * b, c, k)
            ),
            "the kernel is reversed in time": lambda a, b, c, k: _kernel(a, b, c, k).flip(-1),
            "Bbar is missing in the weight C * Bbar": lambda a, b, c, k: _kernel(a, torch.ones_like(b), c, k),
            "C is missing in the weight C * Bbar": lambda a, b, c, k: _kernel(a, b, torch.ones_like(c), k),
            "the mean over the states instead of their sum": lambda a, b, c, k: _kernel(a, b, c, k) / a.shape[1],
        },
        verified="The package's s4d_kernel gives the same from two short tables.",
    )


# ---- a recall ------------------------------------------------------------------------------------------------------


def _recall(
    N: int,
    age: float,
    dt: float,
    length: int,
    *,
    at: Callable[[float], float] = lambda age: math.exp(-age),
    faded: bool = True,
    scaled: bool = True,
    first: int = 0,
) -> Tensor:
    r = torch.exp(-dt * (first + torch.arange(length, dtype=torch.float64)))
    table, weights = legendre(N, r.numpy()), legendre(N, at(age))
    if not scaled:
        table = table / torch.sqrt(2 * torch.arange(N, dtype=torch.float64) + 1)
    return dt * (table @ weights) * (r if faded else 1)


def check_recall_kernel(candidate: Any) -> Verdict:
    """Exercise 3: ``recall_kernel(N, age, dt, length) -> (length,)``."""

    def recall_kernel(N: int, age: float, dt: float, length: int) -> Tensor:
        return _recall(N, age, dt, length)

    def wrong(**part: Any) -> Callable[..., Any]:
        return lambda *args: _recall(*args, **part)

    return check(
        candidate,
        recall_kernel,
        name="recall_kernel",
        cases=[(8, 0.7, 0.01, 150), (1, 0.2, 0.1, 9), (5, 1.3, 0.05, 1)],
        suspects={
            "the age itself goes into the polynomials; they want r = exp(-age), which lies in (0, 1)": wrong(
                at=lambda age: age
            ),
            "exp(+age) instead of exp(-age)": wrong(at=math.exp),
            "age is counted in steps: it is a time, the lag l has age l * dt": lambda N, age, dt, length: _recall(
                N, age * dt, dt, length
            ),
            "the factor r = exp(-l * dt) is missing: what the state holds of an input fades with its age": wrong(
                faded=False
            ),
            "sqrt(2n+1) is there once and not twice: both the state and the reading carry it": wrong(scaled=False),
            "an off-by-one: lag 0 has age 0": wrong(first=1),
            "dt is missing: one sample acts for the time dt": lambda N, age, dt, length: (
                _recall(N, age, dt, length) / dt
            ),
        },
        gradients=False,
        verified="A kernel that waits and then strikes, out of states that only fade.",
    )


# ---- the generating function ---------------------------------------------------------------------------------------


def _generating(
    Abar: Tensor,
    Bbar: Tensor,
    C: Tensor,
    length: int,
    *,
    tilde: Callable[[Tensor, Tensor, int], Tensor] = lambda A, C, n: C - C @ torch.linalg.matrix_power(A, n),
    sign: int = -1,
    conjugate: bool = False,
) -> Tensor:
    C = tilde(Abar, C, length)
    C = C.conj() if conjugate else C
    turn = torch.exp(sign * 2j * math.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length)
    one = torch.eye(len(Bbar), dtype=Abar.dtype)
    return torch.linalg.solve(one - turn[:, None, None] * Abar, Bbar.unsqueeze(-1))[..., 0] @ C


def check_generating_function(candidate: Any) -> Verdict:
    """Exercise 4: ``generating_function(Abar, Bbar, C, length) -> (length // 2 + 1,)``, one channel, dense."""

    def generating_function(Abar: Tensor, Bbar: Tensor, C: Tensor, length: int) -> Tensor:
        return _generating(Abar, Bbar, C, length)

    def wrong(**part: Any) -> Callable[..., Any]:
        return lambda *args: _generating(*args, **part)

    def case(half: int, length: int, seed: int) -> tuple[Any, ...]:
        P, B, C = (_draw(1, half, seed=seed + i) for i in (1, 2, 3))
        Abar, Bbar = dplr_dense(_eigenvalues(1, half, seed=seed), P, B, torch.tensor([0.3], dtype=torch.float64))
        return Abar[0], Bbar[0], torch.cat([C, C.conj()], dim=-1)[0], length

    power = torch.linalg.matrix_power
    return check(
        candidate,
        generating_function,
        name="generating_function",
        cases=[case(2, 8, 70), case(3, 5, 80), case(1, 1, 90)],
        suspects={
            "C is used as it is: that is the transform of the endless kernel. The first L lags want "
            "C_tilde = C - C Abar^L": wrong(tilde=lambda A, C, n: C),
            "C_tilde with a plus: what comes after lag L-1 is to be taken away": wrong(
                tilde=lambda A, C, n: C + C @ power(A, n)
            ),
            "Abar^(L-1) in C_tilde: the first lag to be taken away is L": wrong(
                tilde=lambda A, C, n: C - C @ power(A, n - 1)
            ),
            "Abar^(L+1) in C_tilde: the first lag to be taken away is L": wrong(
                tilde=lambda A, C, n: C - C @ power(A, n + 1)
            ),
            "C_tilde is made with Abar where its transpose belongs: C stands on the left, C @ Abar^L": wrong(
                tilde=lambda A, C, n: C - power(A, n) @ C
            ),
            "exp(+2 pi i k / L): torch.fft.rfft turns the other way, exp(-2 pi i k / L)": wrong(sign=1),
            "C is conjugated, as torch.vdot does; y = C x has no conjugate": wrong(conjugate=True),
        },
        gradients=False,  # off the conjugate pairs, ways that agree on them have different derivatives
        verified="Its irfft is the kernel, and no power of Abar but the L-th is needed for it.",
    )


# ---- Woodbury ------------------------------------------------------------------------------------------------------


def _woodbury(
    z: Tensor,
    Lambda: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    sign: int = -1,
    one: Callable[[int], Tensor] = torch.eye,
    inner: int = 1,
    star: Callable[[Tensor], Tensor] = torch.conj,
    middle: bool = True,
    turned: bool = False,
) -> Tensor:
    """The identity for P (N, r), with one part replaced at a time."""
    inverse = 1 / (z.unsqueeze(-1) - Lambda)  # (F, N)
    plain = inverse @ (C * B)
    left = torch.einsum("n,fn,nr->fr", C, inverse, P)
    right = torch.einsum("nr,fn,n->fr", star(P), inverse, B)
    small = one(P.shape[1]) + inner * torch.einsum("nr,fn,ns->frs", star(P), inverse, P)  # (F, r, r)
    small = small.mT if turned else small
    solved = torch.linalg.solve(small, right.unsqueeze(-1))[..., 0] if middle else right
    return plain + sign * (left * solved).sum(-1)


def _each_column_alone(z: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor) -> Tensor:
    plain = (C * B / (z.unsqueeze(-1) - Lambda)).sum(-1)
    return plain + sum(_woodbury(z, Lambda, P[:, i : i + 1], B, C) - plain for i in range(P.shape[1]))


def check_woodbury(candidate: Any) -> Verdict:
    """Exercise 5: ``woodbury(z, Lambda, P, B, C) -> (F,)``: ``C (z - diag(Lambda) + P P^*)^-1 B``, P ``(N, r)``."""

    def woodbury(z: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor) -> Tensor:
        matrix = torch.diag_embed(z.unsqueeze(-1) - Lambda) + P @ P.mH
        return torch.linalg.solve(matrix, B.expand(len(z), -1).unsqueeze(-1))[..., 0] @ C

    def wrong(**part: Any) -> Callable[..., Any]:
        return lambda *args: _woodbury(*args, **part)

    def case(states: int, rank: int, nodes: int, seed: int) -> tuple[Tensor, ...]:
        z = 2j * torch.tan(torch.linspace(0, 1.4, nodes, dtype=torch.float64))
        P, B, C = _draw(states, rank, seed=seed + 1), _draw(states, seed=seed + 2), _draw(states, seed=seed + 3)
        return z, _eigenvalues(states, seed=seed), P, B, C

    verdict = check(
        candidate,
        woodbury,
        name="woodbury",
        cases=[case(5, 2, 7, 100), case(4, 1, 3, 110), case(6, 3, 1, 120)],
        suspects={
            "the correction for P P^* is missing: this is the diagonal system": wrong(sign=0),
            "the correction is added; it has to be taken away": wrong(sign=1),
            "1 - P^* M^-1 P in the middle: the low-rank term is *added* to z - Lambda, so it is 1 + P^* M^-1 P": wrong(
                inner=-1
            ),
            "the 1 in the middle is missing: it is the identity matrix (r, r)": wrong(one=lambda r: torch.zeros(r, r)),
            "a matrix full of ones in the middle; the 1 of the formula is the identity matrix (r, r)": wrong(
                one=lambda r: torch.ones(r, r)
            ),
            "the middle matrix is not inverted at all": wrong(middle=False),
            "the middle matrix is transposed: the row index belongs to P^*, the column index to P": wrong(turned=True),
            "each column of P is treated alone: they interact through the off-diagonal entries of the middle matrix": (
                _each_column_alone
            ),
            "P without its conjugate: P^* is conj(P), transposed": wrong(star=lambda P: P),
            "the conjugates are on the wrong P: C M^-1 P and P^* M^-1 B, in the order of C ... P P^* ... B": (
                lambda z, L, P, B, C: _woodbury(z, L, P.conj(), B, C)
            ),
            "C is conjugated: y = C x has no conjugate": lambda z, L, P, B, C: _woodbury(z, L, P, B, C.conj()),
            "z + Lambda instead of z - Lambda": lambda z, L, P, B, C: _woodbury(z, -L, P, B, C),
        },
        verified="A dense solve needs N^3 operations for every frequency, this one N r^2.",
    )
    if not verdict.ok:
        return verdict
    states = 64
    if watch(candidate, *case(states, 2, 2, 130)).largest < states**2:
        return verdict
    return reject(
        "woodbury",
        f"for N = {states} a matrix of N x N numbers was made.",
        "the dense system was solved. M is diagonal: keep z - Lambda as a vector, divide by it, and invert only the "
        "small matrix (r, r) in the middle.",
    )
