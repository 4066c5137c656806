"""The exercise checks of notebook 11."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longseq_tutorial.classroom.exercises import Verdict, check
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
