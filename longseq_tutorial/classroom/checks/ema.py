"""Checks of chapter 01's exercises: half-life, one step, the kernel, the convolution, a block with a state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.panels_ema import half_life
from longseq_tutorial.classroom.watching import without_a_loop
from longseq_tutorial.mechanisms.ema import ema_recurrent
from longseq_tutorial.mechanisms.fft import long_convolution

__all__ = [
    "check_causal_convolution",
    "check_ema_block",
    "check_ema_kernel",
    "check_ema_step",
    "check_half_life",
]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _coefficients(dim: int, n: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, delta = torch.sigmoid(_draw(2, dim, n, seed=seed))
    beta, eta = _draw(2, dim, n, seed=seed + 1)
    return alpha, delta, beta, eta


# ---- half-life ---------------------------------------------------------------------------------------------------


def check_half_life(candidate: Any) -> Verdict:
    """Exercise 1: ``half_life(alpha, delta)``, any shape."""
    alpha, delta, _, _ = _coefficients(3, 4, seed=10)
    slow = torch.tensor([1e-2, 1e-3]), torch.tensor([1e-4, 3e-5])  # float32: 1 - alpha * delta rounds
    return check(
        candidate,
        half_life,
        name="half_life",
        cases=[(alpha, delta), (alpha[:1, :1] / 100, delta[:1, :1]), slow],
        suspects={
            "log(1 - alpha*delta) in single precision: for slow decays 1 - alpha*delta rounds to 1 and the small "
            "number is lost. torch.log1p(-alpha * delta) keeps it": lambda a, d: math.log(0.5) / torch.log(1 - a * d),
            "delta is missing: the decay is 1 - alpha*delta, not 1 - alpha": lambda a, d: (
                math.log(0.5) / torch.log1p(-a)
            ),
            "alpha is missing: the decay is 1 - alpha*delta, not 1 - delta": lambda a, d: (
                math.log(0.5) / torch.log1p(-d)
            ),
            "the decay is taken as alpha*delta; it is 1 - alpha*delta": lambda a, d: math.log(0.5) / torch.log(a * d),
            "this is the time to fall to 1/e, not to one half: log(0.5) is missing": lambda a, d: (
                -1 / torch.log1p(-a * d)
            ),
            "this is the time to fall to a tenth: a base-10 logarithm where log(0.5) belongs": lambda a, d: (
                math.log(0.1) / torch.log1p(-a * d)
            ),
            "0.69 / (alpha*delta) is the approximation for slow decays; for fast ones it is off": lambda a, d: (
                math.log(2) / (a * d)
            ),
            "the ratio is upside down: log(q) / log(0.5) instead of log(0.5) / log(q)": lambda a, d: (
                torch.log1p(-a * d) / math.log(0.5)
            ),
        },
        verified="The third case is slow and in float32: there 1 - alpha*delta would have lost the digits.",
    )


# ---- one step ------------------------------------------------------------------------------------------------------


def _step(x_t: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    y, state = ema_recurrent(x_t.unsqueeze(1), alpha, delta, beta, eta, state)
    return y[:, 0], state


def _wrong_step(
    decay: Callable[[Tensor, Tensor], Tensor] = lambda a, d: 1 - a * d,
    push: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda a, d, b: a * b,
    pull: Callable[[Tensor], Tensor] = lambda e: e,
    read_old: bool = False,
    keep_old: bool = False,
) -> Callable[..., Any]:
    """The step with one part replaced."""

    def step(x_t: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, state: Tensor) -> Any:
        new = decay(alpha, delta) * state + push(alpha, delta, beta) * x_t.unsqueeze(-1)
        return (pull(eta) * (state if read_old else new)).sum(-1), state if keep_old else new

    return step


def check_ema_step(candidate: Any) -> Verdict:
    """Exercise 2: ``ema_step(x_t, alpha, delta, beta, eta, state) -> (y_t, new state)``."""

    def case(batch: int, dim: int, n: int, seed: int) -> tuple[Tensor, ...]:
        return _draw(batch, dim, seed=seed), *_coefficients(dim, n, seed + 1), _draw(batch, dim, n, seed=seed + 9)

    return check(
        candidate,
        _step,
        name="ema_step",
        cases=[case(2, 3, 4, 20), case(1, 1, 1, 40), case(3, 2, 5, 60)],
        suspects={
            "y is read from the old state: update the state first, then read": _wrong_step(read_old=True),
            "the old state is returned: the new one has to go on to the next step": _wrong_step(keep_old=True),
            "delta in place of alpha in the weight of the input": _wrong_step(push=lambda a, d, b: d * b),
            "alpha*delta as the weight of the input: delta only damps the past": _wrong_step(
                push=lambda a, d, b: a * d * b
            ),
            "alpha is missing in the weight of the input: it is alpha * beta * x": _wrong_step(push=lambda a, d, b: b),
            "beta is missing: the input enters as alpha * beta * x": _wrong_step(push=lambda a, d, b: a),
            "delta is missing in the decay: 1 - alpha*delta, not 1 - alpha": _wrong_step(decay=lambda a, d: 1 - a),
            "alpha is missing in the decay: 1 - alpha*delta, not 1 - delta": _wrong_step(decay=lambda a, d: 1 - d),
            "the decay is taken as alpha*delta; it is 1 - alpha*delta": _wrong_step(decay=lambda a, d: a * d),
            "eta is missing: y = sum(eta * state), not the plain sum": _wrong_step(pull=torch.ones_like),
            "the two results are swapped: y first, then the state": lambda *args: _step(*args)[::-1],
            "the old state is not used at all: the average has no memory": _wrong_step(
                decay=lambda a, d: torch.zeros_like(a)
            ),
        },
        verified="Called once for each token, it is the streaming form: DampedEMA.step does the same.",
    )


# ---- the kernel ----------------------------------------------------------------------------------------------------


def _kernel(alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, length: int) -> Tensor:
    """Every power written out: the plain truth, whose gradient is exact also where the decay is 0."""
    return _powers_kernel(1 - alpha * delta, eta * alpha * beta, torch.arange(length))


def _powers_kernel(decay: Tensor, weight: Tensor, exponents: Tensor) -> Tensor:
    return (weight.unsqueeze(-1) * decay.unsqueeze(-1) ** exponents).sum(1)


def _log_kernel(alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, length: int) -> Tensor:
    log_power = torch.log(1 - alpha * delta).unsqueeze(-1) * torch.arange(length)
    return ((eta * alpha * beta).unsqueeze(-1) * torch.exp(log_power)).sum(1)


def check_ema_kernel(candidate: Any) -> Verdict:
    """Exercise 3: ``ema_kernel(alpha, delta, beta, eta, length) -> (D, length)``."""
    lengths = torch.arange
    verdict = check(
        candidate,
        _kernel,
        name="ema_kernel",
        cases=[
            (*_coefficients(3, 4, seed=70), 7),
            (*_coefficients(2, 5, seed=80), 1),
            (*_coefficients(1, 1, seed=90), 12),
            (*(c.float() for c in _coefficients(2, 3, seed=100)), 33),
        ],
        suspects={
            "the kernel is reversed in time: lag 0, the largest power, comes first": lambda *a: _kernel(*a).flip(-1),
            "an off-by-one in the power: the input of this very step has not decayed yet, so lag 0 has power 0": (
                lambda a, d, b, e, k: _powers_kernel(1 - a * d, e * a * b, 1 + lengths(k))
            ),
            "eta is missing in the weight eta * alpha * beta": (
                lambda a, d, b, e, k: _powers_kernel(1 - a * d, a * b, lengths(k))
            ),
            "alpha is missing in the weight eta * alpha * beta": (
                lambda a, d, b, e, k: _powers_kernel(1 - a * d, e * b, lengths(k))
            ),
            "beta is missing in the weight eta * alpha * beta": (
                lambda a, d, b, e, k: _powers_kernel(1 - a * d, e * a, lengths(k))
            ),
            "delta and alpha are swapped in the weight of the input: it is eta * alpha * beta": (
                lambda a, d, b, e, k: _powers_kernel(1 - a * d, e * d * b, lengths(k))
            ),
            "alpha*delta in the weight of the input: delta only damps the past": (
                lambda a, d, b, e, k: _powers_kernel(1 - a * d, e * a * d * b, lengths(k))
            ),
            "delta is missing in the decay: 1 - alpha*delta, not 1 - alpha": (
                lambda a, d, b, e, k: _powers_kernel(1 - a, e * a * b, lengths(k))
            ),
            "alpha is missing in the decay: 1 - alpha*delta, not 1 - delta": (
                lambda a, d, b, e, k: _powers_kernel(1 - d, e * a * b, lengths(k))
            ),
            "the decay is taken as alpha*delta; it is 1 - alpha*delta": (
                lambda a, d, b, e, k: _powers_kernel(a * d, e * a * b, lengths(k))
            ),
            "the mean over the n dimensions instead of their sum": lambda *a: _kernel(*a) / a[0].shape[1],
            "1/sqrt(n) belongs to the module DampedEMA; this function takes eta as it is": lambda *a: (
                _kernel(*a) / math.sqrt(a[0].shape[1])
            ),
        },
        verified="The package's ema_kernel gives the same from two short tables of powers.",
    )
    if not verdict.ok:
        return verdict
    one = torch.ones(2, 3, dtype=torch.float64)
    saturated = check(
        candidate,
        _kernel,
        name="ema_kernel",
        cases=[(one, one, *_coefficients(2, 3, seed=110)[2:], 5)],
        suspects={
            "exp(s * log(q)) where alpha*delta has saturated to 1: at lag 0 that is 0 * log(0) = NaN, "
            "but q**0 is 1. Use q**s, or keep alpha*delta below 1": _log_kernel
        },
        gradients=False,
    )
    return verdict if saturated.ok else saturated


# ---- the convolution -----------------------------------------------------------------------------------------------


def _fft_product(u: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Circular convolution on a circle of ``size`` points: (B, size, D)."""
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size).T
    return torch.fft.irfft(spectrum, n=size, dim=1)


def _correlate(u: Tensor, kernel: Tensor) -> Tensor:
    return long_convolution(u.flip(1), kernel).flip(1)


def _no_size(u: Tensor, kernel: Tensor) -> Tensor:
    size = 2 * u.shape[1] - 1
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size).T
    return torch.fft.irfft(spectrum, dim=1)[:, : u.shape[1]]


def _channels_axis(u: Tensor, kernel: Tensor) -> Tensor:
    size = 2 * u.shape[2]
    spectrum = torch.fft.rfft(u, n=size) * torch.fft.rfft(kernel.T, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., : u.shape[2]]


def check_causal_convolution(candidate: Any) -> Verdict:
    """Exercise 4: ``causal_convolution(u, kernel)``, u (B, L, D), kernel (D, L)."""

    def causal_convolution(u: Tensor, kernel: Tensor) -> Tensor:
        return long_convolution(u, kernel)

    def half_padded(u: Tensor, kernel: Tensor) -> Tensor:
        length = u.shape[1]
        return _fft_product(u, kernel, length + length // 2)[:, :length]

    return check(
        candidate,
        causal_convolution,
        name="causal_convolution",
        cases=[
            (_draw(2, 7, 3, seed=120), _draw(3, 7, seed=121)),
            (_draw(1, 12, 2, seed=122), _draw(2, 12, seed=123)),
            (_draw(3, 1, 2, seed=124), _draw(2, 1, seed=125)),
            (_draw(1, 31, 2, seed=126).float(), _draw(2, 31, seed=127).float()),
        ],
        suspects={
            "circular instead of linear convolution: without padding the end wraps around to the beginning. "
            "Give the FFT at least 2L - 1 points": lambda u, k: _fft_product(u, k, u.shape[1]),
            "too little padding: a part of the end still wraps around to the beginning. "
            "Give the FFT at least 2L - 1 points": half_padded,
            "the future leaks into the past: this is correlation, sum of k[s] * u[t + s]. "
            "Is a conjugate or a flip one too many?": _correlate,
            "the kernel is reversed in time": lambda u, k: long_convolution(u, k.flip(-1)),
            "the last L samples are kept instead of the first L": lambda u, k: _fft_product(u, k, 2 * u.shape[1])[
                :, -u.shape[1] :
            ],
            "an off-by-one in the slice: samples 1 to L are kept instead of 0 to L - 1": lambda u, k: _fft_product(
                u, k, 2 * u.shape[1]
            )[:, 1 : u.shape[1] + 1],
            "torch.fft.irfft without n: it cannot know that the length was odd, and assumes an even one": _no_size,
            "a transform along the channels instead of along time": _channels_axis,
            "a plain product in time, position by position: the transforms are missing": lambda u, k: u * k.T,
            "the spectra are added instead of multiplied": lambda u, k: u + k.T,
            "norm='ortho' in every transform: two forward and one inverse leave a factor 1/sqrt(FFT length)": (
                lambda u, k: long_convolution(u, k) / math.sqrt(2 * u.shape[1])
            ),
            "norm='ortho' in every transform: two forward and one inverse leave a factor 1/sqrt(the FFT's length)": (
                lambda u, k: long_convolution(u, k) / math.sqrt(max(1, 2 * u.shape[1] - 1))
            ),
        },
        verified="No sample of the end reaches the beginning.",
    )


# ---- a block with a state ------------------------------------------------------------------------------------------


def _block(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    state: Tensor,
    *,
    first_power: int = 1,
    state_power: int = 0,
    input_power: int = 0,
    oldest_first: bool = True,
    pull: Callable[[Tensor], Tensor] = lambda e: e,
    push: Callable[[Tensor, Tensor], Tensor] = lambda a, b: a * b,
    heard: float = 1.0,
    carried: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The closed form of a block, with one part replaced at a time."""
    length = x.shape[1]
    decay, steps = (1 - alpha * delta).unsqueeze(-1), torch.arange(length)  # (D, n, 1)
    old = torch.einsum("bdn,dnt,dn->btd", state, decay ** (steps + first_power), pull(eta))
    y = long_convolution(x, _kernel(alpha, delta, beta, eta, length)) + heard * old
    ages = (length - 1 - steps if oldest_first else steps) + input_power
    new = torch.einsum("btd,dnt,dn->bdn", x, decay**ages, push(alpha, beta))
    return y, carried * decay.squeeze(-1) ** (length + state_power) * state + new


def check_ema_block(candidate: Any) -> Verdict:
    """Exercise 5: ``ema_block(x, alpha, delta, beta, eta, state) -> (y, new state)``, without a loop over time."""

    def case(batch: int, length: int, dim: int, n: int, seed: int) -> tuple[Tensor, ...]:
        state = _draw(batch, dim, n, seed=seed + 9)
        return _draw(batch, length, dim, seed=seed), *_coefficients(dim, n, seed + 1), state

    def wrong(**part: Any) -> Callable[..., Any]:
        return lambda *args: _block(*args, **part)

    verdict = check(
        candidate,
        ema_recurrent,
        name="ema_block",
        cases=[case(2, 7, 3, 4, 130), case(1, 1, 2, 2, 150), case(3, 12, 1, 5, 170)],
        suspects={
            "nothing of the old state is used, neither in y nor in the new state": wrong(heard=0.0, carried=0.0),
            "the old state is not heard in y: add sum(eta * q**(t+1) * state)": wrong(heard=0.0),
            "the old state is not carried on: the new state lacks q**T * state": wrong(carried=0.0),
            "q**t instead of q**(t+1) on the old state, an off-by-one: it decays once before the first y": wrong(
                first_power=0
            ),
            "an off-by-one in the power on the old state within the new one: T steps, so q**T": wrong(state_power=-1),
            "the old state decays once too often within the new one: T steps, so q**T": wrong(state_power=1),
            "the inputs are weighted in reverse: the newest has decayed least, q**(T-1-t)": wrong(oldest_first=False),
            "an off-by-one in the inputs' powers: the newest has not decayed yet, q**(T-1-t)": wrong(input_power=1),
            "eta is missing where the old state is read": wrong(pull=torch.ones_like),
            "alpha is missing where the inputs enter the new state": wrong(push=lambda a, b: b),
            "beta is missing where the inputs enter the new state": wrong(push=lambda a, b: a),
        },
        verified="So a stream may be cut anywhere, and each piece computed in parallel.",
    )
    return without_a_loop(
        verdict,
        "ema_block",
        candidate,
        case(1, 64, 2, 3, 190),
        case(1, 512, 2, 3, 190),
        "a loop over time. The powers q**0 ... q**T at once, then one convolution and two sums: their number does not "
        "depend on T.",
    )
