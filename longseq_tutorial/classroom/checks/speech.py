"""The exercise checks of notebook 11."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.filters import centre_and_width, half_rate
from longseq_tutorial.classroom.sound import mix
from longseq_tutorial.models.parts import mean_pool

_GENERATOR = torch.Generator().manual_seed(11)


def _normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=_GENERATOR, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------ exercise 1: patches


def patches(x: Tensor, size: int) -> Tensor:
    """`(B, L) -> (B, ceil(L / size), size)`, the last patch filled up with zeros on the right."""
    return F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))


_PATCH_CASES = [
    (_normal(2, 12), 4),
    (_normal(3, 13), 5),
    (_normal(1, 7), 7),
    (_normal(2, 3), 8),
    (_normal(2, 9, dtype=torch.float32), 2),
]


def check_patches(candidate: Callable[..., Any]) -> Verdict:
    """`patches(x, size) -> (B, ceil(L / size), size)`."""
    return check(
        candidate,
        patches,
        name="patches",
        cases=_PATCH_CASES,
        suspects={
            "the samples that do not fill a patch are dropped; fill the last patch up with zeros": (
                lambda x, size: x[:, : x.shape[1] // size * size].reshape(len(x), -1, size)
            ),
            "only full patches are taken, so the end of a clip is dropped, and a clip shorter than a patch altogether; "
            "fill up with zeros first": _only_full,
            "the zeros are put before the signal; they belong after it, on the right": (
                lambda x, size: F.pad(x, (-x.shape[1] % size, 0)).unflatten(1, (-1, size))
            ),
            "there is a patch of nothing but zeros when the length divides: pad by -L % size, not by size - L % size": (
                lambda x, size: F.pad(x, (0, size - x.shape[1] % size)).unflatten(1, (-1, size))
            ),
            "a patch holds every so-manieth sample instead of neighbours: the axes of the reshape are in the wrong "
            "order": lambda x, size: F.pad(x, (0, -x.shape[1] % size)).unflatten(1, (size, -1)).transpose(1, 2),
            "the patches are columns; wanted (batch, patches, size)": (
                lambda x, size: patches(x, size).transpose(1, 2)
            ),
            "patches overlap by one sample": _overlapping,
            "the last patch is filled up with the last sample instead of zeros": _repeated,
        },
        verified="A linear map of these is what Conv1d with kernel = stride computes.",
    )


def _only_full(x: Tensor, size: int) -> Tensor:
    starts = range(0, x.shape[1] - size + 1, size)
    return torch.stack([x[:, start : start + size] for start in starts], dim=1)


def _overlapping(x: Tensor, size: int) -> Tensor:
    step = max(1, size - 1)
    count = -(-x.shape[1] // size)
    return F.pad(x, (0, size * count)).unfold(1, size, step)[:, :count]


def _repeated(x: Tensor, size: int) -> Tensor:
    missing = -x.shape[1] % size
    return torch.cat([x, x[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, size))


# ------------------------------------------------------------------ exercise 2: the mean over real tokens

_POOL_CASES = [
    (_normal(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)),
    (_normal(3, 4, 2), torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)),
    (_normal(1, 1, 4), torch.ones(1, 1, dtype=torch.bool)),
    (_normal(2, 7, 3, dtype=torch.float32), torch.arange(7) < torch.tensor([[6], [2]])),
]


def check_pool(candidate: Callable[..., Any]) -> Verdict:
    """`pool(h, mask) -> (B, D)`."""

    def total(h: Tensor, mask: Tensor) -> Tensor:
        return (h * mask[..., None]).sum(1)

    return check(
        candidate,
        mean_pool,
        name="pool",
        cases=_POOL_CASES,
        suspects={
            "the mask is not used: padding takes part in the mean": lambda h, mask: h.mean(1),
            "the sum over real tokens is divided by the padded length; divide by the number of real tokens": (
                lambda h, mask: total(h, mask) / h.shape[1]
            ),
            "padding takes part in the sum, and only the count is right": (
                lambda h, mask: h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
            ),
            "a sequence without a real token gives 0/0; let the count be at least 1": (
                lambda h, mask: total(h, mask) / mask.sum(1, keepdim=True)
            ),
            "the count is one too large, as if every sequence had a padded token more": (
                lambda h, mask: total(h, mask) / (mask.sum(1, keepdim=True) + 1)
            ),
            "this is the sum; divide by the number of real tokens": total,
            "the mask is the wrong way round: True is real": lambda h, mask: mean_pool(h, ~mask),
            "the count is taken over the whole batch, not for each sequence": (
                lambda h, mask: total(h, mask) / mask.sum().clamp(min=1)
            ),
            "this is the maximum over real tokens, not the mean": (
                lambda h, mask: h.masked_fill(~mask[..., None], -torch.inf).amax(1)
            ),
            "only the last real token is taken": _last_real,
        },
        verified="A clip alone and the same clip padded now give the same vector.",
    )


def _last_real(h: Tensor, mask: Tensor) -> Tensor:
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    return h[torch.arange(len(h)), last]


# ------------------------------------------------------------------ exercise 3: noise at so many decibels

_MIX_CASES = [
    (_normal(2, 50), 3 * _normal(2, 50), 10.0),
    (0.1 * _normal(3, 21), _normal(3, 21), 0.0),
    (_normal(2, 33), 0.5 * _normal(2, 33), -6.0),
    (_normal(2, 64, dtype=torch.float32), _normal(2, 64, dtype=torch.float32), 20.0),
]


def check_mix(candidate: Callable[..., Any]) -> Verdict:
    """`mix(x, noise, decibels) -> (B, L)`."""

    def level(x: Tensor) -> Tensor:
        return x.square().mean(-1, keepdim=True).sqrt()

    def with_factor(factor: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
        return lambda x, noise, decibels: x + noise * factor(x, noise, decibels)

    return check(
        candidate,
        mix,
        name="mix",
        cases=_MIX_CASES,
        suspects={
            "decibels become a ratio by 10 ** (dB / 10), which is for power; levels want dB / 20": with_factor(
                lambda x, noise, d: level(x) / level(noise) * 10 ** (-d / 10)
            ),
            "the sign: the noise lies so many decibels below the signal, so more decibels mean less noise": with_factor(
                lambda x, noise, d: level(x) / level(noise) * 10 ** (d / 20)
            ),
            "the noise is taken to have level 1; divide it by its own level": with_factor(
                lambda x, noise, d: level(x) * 10 ** (-d / 20)
            ),
            "the level of the signal is left out: noise has to be that far below *this* clip": with_factor(
                lambda x, noise, d: 10 ** (-d / 20) / level(noise)
            ),
            "neither level is measured: the noise is only scaled by the decibels": with_factor(
                lambda x, noise, d: torch.as_tensor(10 ** (-d / 20), dtype=x.dtype)
            ),
            "the ratio of the powers is used for the ratio of the levels: a square root is missing": with_factor(
                lambda x, noise, d: (level(x) / level(noise)) ** 2 * 10 ** (-d / 20)
            ),
            "one level is measured for the whole batch; each clip has its own": with_factor(
                lambda x, noise, d: x.square().mean().sqrt() / noise.square().mean().sqrt() * 10 ** (-d / 20)
            ),
            "exp(-dB / 20) is used; decibels are powers of ten": with_factor(
                lambda x, noise, d: level(x) / level(noise) * torch.exp(torch.tensor(-d / 20, dtype=x.dtype))
            ),
            "the noise alone is returned; add it to the signal": (
                lambda x, noise, d: noise * level(x) / level(noise) * 10 ** (-d / 20)
            ),
        },
        verified="10 dB more is a third of the noise's level, 20 dB a tenth.",
    )


# ------------------------------------------------------------------ exercise 4: where a filter listens

_BANK_CASES = [  # float32, as learned filters are: places of a maximum times a number are float32 in torch
    (_normal(filters, taps, dtype=torch.float32), rate)
    for filters, taps, rate in ((5, 40, 8_000), (3, 16, 16_000), (1, 2, 100), (2, 1_024, 8_000))
]


def _spectrum(bank: Tensor) -> Tensor:
    return torch.fft.rfft(bank, n=1_024).abs()


def check_centre_and_width(candidate: Callable[..., Any]) -> Verdict:
    """`centre_and_width(bank, rate) -> centre (D,), width (D,)`, in hertz, on a grid of `rate / 1024`."""

    def judged(power: Callable[[Tensor], Tensor], unit: Callable[[float], float]) -> Callable[..., Any]:
        def suspect(bank: Tensor, rate: float) -> tuple[Tensor, Tensor]:
            p, step = power(bank), unit(rate)
            return p.argmax(-1) * step, p.sum(-1) / p.amax(-1) * step

        return suspect

    def squared(bank: Tensor) -> Tensor:
        return _spectrum(bank).square()

    def per_sample(rate: float) -> float:
        return rate / 1_024

    return check(
        candidate,
        lambda bank, rate: centre_and_width(bank, rate),
        name="centre_and_width",
        cases=_BANK_CASES,
        gradients=False,
        suspects={
            "the width is measured on |H|; power is |H| squared": judged(_spectrum, per_sample),
            "both are left in bins of the FFT; a bin is rate / 1024 hertz wide": judged(squared, lambda rate: 1.0),
            "the grid is taken as rate / 513, the number of bins of rfft; they reach only up to rate / 2, so a bin is "
            "rate / 1024": judged(squared, lambda rate: rate / 513),
            "the filters are not padded with zeros to 1024, so the grid is as coarse as rate / K: rfft(bank, n=1024)": (
                lambda bank, rate: _coarse(bank, rate)
            ),
            "the centre is the mean of the frequencies, weighted by power; wanted where the answer is strongest": (
                lambda bank, rate: (_centroid(bank, rate), centre_and_width(bank, rate)[1])
            ),
            "the width is counted at half the largest power; wanted the sum of the power over its largest": (
                lambda bank, rate: (centre_and_width(bank, rate)[0], _half_power(bank, rate))
            ),
            "the sum is divided by the largest power of all filters; each filter has its own": (
                lambda bank, rate: (
                    centre_and_width(bank, rate)[0],
                    squared(bank).sum(-1) / squared(bank).max() * rate / 1_024,
                )
            ),
            "the result is (width, centre); wanted (centre, width)": lambda bank, rate: centre_and_width(bank, rate)[
                ::-1
            ],
        },
        verified="The figure of the filter banks was measured with this.",
    )


def _coarse(bank: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    return centre_and_width(bank, rate, n=bank.shape[-1])


def _centroid(bank: Tensor, rate: float) -> Tensor:
    power = _spectrum(bank).square()
    grid = torch.arange(power.shape[-1], dtype=power.dtype) * rate / 1_024
    return (power * grid).sum(-1) / power.sum(-1)


def _half_power(bank: Tensor, rate: float) -> Tensor:
    power = _spectrum(bank).square()
    return (power >= power.amax(-1, keepdim=True) / 2).sum(-1) * rate / 1_024


# ------------------------------------------------------------------ exercise 5: half the samples

_HALF_CASES = [
    (_normal(3, 1, 8),),
    (_normal(2, 3, 2),),
    (_normal(4, 4, 40),),
    (_normal(1, 1, 6, dtype=torch.float32),),
]


def check_half_rate(candidate: Callable[..., Any]) -> Verdict:
    """`half_rate(bank (D, C, K)) -> (D, C, K / 2)`."""
    return check(
        candidate,
        half_rate,
        name="half_rate",
        cases=_HALF_CASES,
        suspects={
            "every second tap is taken, and the other half of the filter thrown away; both taps of a pair meet the "
            "same sample, so their sum counts": lambda bank: bank[..., ::2],
            "every second tap is taken, the other one of each pair": lambda bank: bank[..., 1::2],
            "every second tap is doubled; the two taps of a pair differ: sum them": lambda bank: 2 * bank[..., ::2],
            "this is the mean of each pair; held samples come twice, so the taps add up": lambda bank: bank.unflatten(
                -1, (-1, 2)
            ).mean(-1),
            "tap k is summed with tap k + K / 2, not with its neighbour": lambda bank: bank.unflatten(-1, (2, -1)).sum(
                -2
            ),
            "all neighbours are summed, so pairs overlap: one result for every *two* taps": lambda bank: (
                bank[..., :-1] + bank[..., 1:]
            ),
            "the pairs begin one tap too late: taps 0 and 1 are the first pair": lambda bank: (
                bank.roll(-1, -1).unflatten(-1, (-1, 2)).sum(-1)
            ),
            "the second tap of a pair is subtracted; add it": lambda bank: bank[..., ::2] - bank[..., 1::2],
            "only the first half of the filter is kept": lambda bank: bank[..., : bank.shape[-1] // 2],
        },
        verified="At half the stride these answer as the old ones do to samples held twice.",
    )
