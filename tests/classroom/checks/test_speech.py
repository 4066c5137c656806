"""Each check of notebook 11 accepts its solution and names the cause of plausible mistakes."""

import math

import numpy as np
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.speech import (
    check_centre_and_width,
    check_half_rate,
    check_mix,
    check_patches,
    check_pool,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved


def stub(*arguments):
    raise NotImplementedError("your turn: write it")


# ------------------------------------------------------------------ 1: patches


def patches(x, size):
    count = math.ceil(x.shape[1] / size)
    padded = torch.cat([x, x.new_zeros(len(x), count * size - x.shape[1])], dim=1)
    return padded.reshape(len(x), count, size)


def test_patches_accepts_the_solution_and_unfold():
    assert_accepts(check_patches, patches)
    assert_accepts(check_patches, lambda x, size: F.pad(x, (0, -x.shape[1] % size)).unfold(1, size, size))
    assert_unsolved(check_patches, stub)


def test_patches_rejects():
    def looped_over_full_ones(x, size):
        return torch.stack([x[:, i : i + size] for i in range(0, x.shape[1] - size + 1, size)], dim=1)

    wrong = {
        "dropped": lambda x, size: x[:, : len(x[0]) // size * size].view(len(x), len(x[0]) // size, size),
        "before the signal": lambda x, size: F.pad(x, (-x.shape[1] % size, 0)).unfold(1, size, size),
        "when the length divides": lambda x, size: F.pad(x, (0, size - x.shape[1] % size)).unfold(1, size, size),
        "instead of neighbours": lambda x, size: (
            F.pad(x, (0, -x.shape[1] % size)).reshape(len(x), size, -1).transpose(1, 2)
        ),
        "columns": lambda x, size: patches(x, size).mT,
        "overlap by one": lambda x, size: torch.stack(
            [
                F.pad(x, (0, size))[:, i * max(1, size - 1) : i * max(1, size - 1) + size]
                for i in range(math.ceil(x.shape[1] / size))
            ],
            dim=1,
        ),
        "with the last sample": lambda x, size: F.pad(x[:, None], (0, -x.shape[1] % size), mode="replicate")[
            :, 0
        ].unfold(1, size, size),
        "no gradient": lambda x, size: patches(x.detach(), size),
    }
    for words, function in wrong.items():
        assert_rejects(check_patches, function, words)
    assert_rejects(check_patches, looped_over_full_ones, "only full patches")


# ------------------------------------------------------------------ 2: pool


def pool(h, mask):
    weight = mask.unsqueeze(-1).to(h.dtype)
    return (h * weight).sum(1) / weight.sum(1).clamp(min=1)


def test_pool_accepts_the_solution():
    assert_accepts(check_pool, pool)
    assert_unsolved(check_pool, stub)


def test_pool_rejects():
    def real(h, mask):
        return (h * mask.unsqueeze(-1)).sum(1)

    wrong = {
        "padding takes part in the mean": lambda h, mask: h.mean(dim=1),
        "divided by the padded length": lambda h, mask: (h * mask.unsqueeze(-1)).mean(1),
        "only the count is right": lambda h, mask: h.sum(1) / mask.sum(1).clamp(min=1).unsqueeze(-1),
        "gives 0/0": lambda h, mask: real(h, mask) / mask.sum(1).unsqueeze(-1),
        "one too large": lambda h, mask: real(h, mask) / (1 + mask.sum(1).unsqueeze(-1)),
        "this is the sum": real,
        "wrong way round": lambda h, mask: pool(h, ~mask),
        "over the whole batch": lambda h, mask: real(h, mask) / mask.sum(),
        "maximum": lambda h, mask: torch.where(mask.unsqueeze(-1), h, -torch.inf).max(1).values,
        "last real token": lambda h, mask: torch.stack(
            [row[m.nonzero()[-1, 0] if m.any() else 0] for row, m in zip(h, mask, strict=True)]
        ),
        "shape": lambda h, mask: pool(h, mask).unsqueeze(1),
    }
    for words, function in wrong.items():
        assert_rejects(check_pool, function, words)


# ------------------------------------------------------------------ 3: mix


def rms(x):
    return x.pow(2).mean(1, keepdim=True).sqrt()


def mix(x, noise, decibels):
    wanted = rms(x) / 10 ** (decibels / 20)
    return x + noise * (wanted / rms(noise))


def test_mix_accepts_the_solution():
    assert_accepts(check_mix, mix)
    assert_unsolved(check_mix, stub)


def test_mix_rejects():
    wrong = {
        "which is for power": lambda x, n, d: x + n * rms(x) / rms(n) / 10 ** (d / 10),
        "more decibels mean less noise": lambda x, n, d: x + n * rms(x) / rms(n) * 10 ** (d / 20),
        "taken to have level 1": lambda x, n, d: x + n * rms(x) / 10 ** (d / 20),
        "level of the signal is left out": lambda x, n, d: x + n / rms(n) / 10 ** (d / 20),
        "neither level": lambda x, n, d: x + n / 10 ** (d / 20),
        "square root is missing": lambda x, n, d: x + n * (rms(x) / rms(n)) ** 2 / 10 ** (d / 20),
        "for the whole batch": lambda x, n, d: x + n * x.pow(2).mean().sqrt() / n.pow(2).mean().sqrt() / 10 ** (d / 20),
        "powers of ten": lambda x, n, d: x + n * rms(x) / rms(n) * math.exp(-d / 20),
        "the noise alone": lambda x, n, d: mix(x, n, d) - x,
    }
    for words, function in wrong.items():
        assert_rejects(check_mix, function, words)


# ------------------------------------------------------------------ 4: centre and width


def power(bank, n=1024):
    return torch.fft.fft(bank, n=n)[:, : n // 2 + 1].abs() ** 2


def centre_and_width(bank, rate):
    p = power(bank)
    grid = torch.from_numpy(np.fft.rfftfreq(1024, 1 / rate)).to(bank)
    best = p.max(dim=1)
    return grid[best.indices], p.sum(1) / best.values * (rate / 1024)


def test_centre_and_width_accepts_the_solution():
    assert_accepts(check_centre_and_width, centre_and_width)
    assert_unsolved(check_centre_and_width, stub)


def test_centre_and_width_rejects():
    def from_size(bank, rate):
        p = power(bank).sqrt()
        return p.argmax(1) * rate / 1024, p.sum(1) / p.amax(1) * rate / 1024

    def on_grid(step, n=1024):
        def wrong(bank, rate):
            p = power(bank, n or bank.shape[1])
            return p.argmax(1) * step(rate, bank), p.sum(1) / p.amax(1) * step(rate, bank)

        return wrong

    def centroid(bank, rate):
        p = power(bank)
        grid = torch.arange(513, dtype=p.dtype) * rate / 1024
        return p @ grid / p.sum(1), centre_and_width(bank, rate)[1]

    def half_power(bank, rate):
        p = power(bank)
        return p.argmax(1) * rate / 1024, (p / p.amax(1, keepdim=True) >= 0.5).sum(1) * rate / 1024

    wrong = {
        "power is |H| squared": from_size,
        "left in bins": on_grid(lambda rate, bank: 1.0),
        "number of bins of rfft": on_grid(lambda rate, bank: rate / 513),
        "as coarse as rate / K": on_grid(lambda rate, bank: rate / bank.shape[1], n=None),
        "weighted by power": centroid,
        "counted at half": half_power,
        "of all filters": lambda b, rate: (
            centre_and_width(b, rate)[0],
            power(b).sum(1) / power(b).max() * rate / 1024,
        ),
        "wanted (centre, width)": lambda b, rate: centre_and_width(b, rate)[::-1],
    }
    for words, function in wrong.items():
        assert_rejects(check_centre_and_width, function, words)


# ------------------------------------------------------------------ 5: half the rate


def half_rate(bank):
    return bank[..., ::2] + bank[..., 1::2]


def test_half_rate_accepts_the_solution():
    assert_accepts(check_half_rate, half_rate)
    assert_accepts(check_half_rate, lambda bank: 2 * F.avg_pool1d(bank, 2))
    assert_unsolved(check_half_rate, stub)


def test_half_rate_rejects():
    wrong = {
        "the other half of the filter thrown away": lambda bank: bank[:, :, ::2],
        "the other one of each pair": lambda bank: bank[:, :, 1::2],
        "doubled": lambda bank: bank[:, :, ::2] + bank[:, :, ::2],
        "the mean of each pair": lambda bank: F.avg_pool1d(bank, 2),
        "tap k + K / 2": lambda bank: bank[..., : bank.shape[-1] // 2] + bank[..., bank.shape[-1] // 2 :],
        "overlap": lambda bank: bank.unfold(-1, 2, 1).sum(-1),
        "one tap too late": lambda bank: half_rate(torch.cat([bank[..., 1:], bank[..., :1]], dim=-1)),
        "subtracted": lambda bank: bank[..., ::2] - bank[..., 1::2],
        "first half of the filter": lambda bank: bank.chunk(2, dim=-1)[0],
        "no gradient": lambda bank: half_rate(bank.detach()),
    }
    for words, function in wrong.items():
        assert_rejects(check_half_rate, function, words)
