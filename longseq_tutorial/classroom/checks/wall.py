"""Checks of chapter 00, the quadratic wall."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.measure import growth_exponent
from longseq_tutorial.classroom.watching import Watched
from longseq_tutorial.mechanisms.chunking import chunk_attention
from longseq_tutorial.mechanisms.gated_attention import attend

__all__ = ["check_attend_in_blocks", "check_fit_exponent", "check_longest_length", "check_score_bytes"]


# -------------------------------------------------------------------- exercise 1: bytes of the score matrix


def score_bytes(batch: int, heads: int, length: int, bytes_per_number: int) -> int:
    """Bytes of the attention scores: one number for each pair of positions, in each head of each sequence."""
    return batch * heads * length * length * bytes_per_number


def check_score_bytes(candidate: Any) -> Verdict:
    """Check ``score_bytes(batch, heads, length, bytes_per_number) -> bytes``."""
    return check(
        candidate,
        score_bytes,
        name="score_bytes",
        cases=[(2, 3, 5, 4), (1, 1, 16384, 4), (7, 8, 1000, 2), (1, 16, 1, 8)],
        suspects={
            "length enters once instead of twice: every query meets every key": lambda b, h, n, s: b * h * n * s,
            "heads are missing: each head has a score matrix of its own": lambda b, h, n, s: b * n * n * s,
            "batch is missing: each sequence has score matrices of its own": lambda b, h, n, s: h * n * n * s,
            "heads and batch are missing: each head of each sequence has its own matrix": lambda b, h, n, s: n * n * s,
            "it counts numbers, not bytes: bytes_per_number is missing": lambda b, h, n, s: b * h * n * n,
            "these are bits: a byte is 8 of them": lambda b, h, n, s: 8 * b * h * n * n * s,
            "half of the matrix: a causal mask hides one half, but the tensor has room for both": (
                lambda b, h, n, s: b * h * s * n * (n + 1) // 2
            ),
            "half of the pairs: the pair (i, j) and the pair (j, i) have different scores": (
                lambda b, h, n, s: b * h * s * n * (n - 1) // 2
            ),
            "the size of length is doubled, not squared": lambda b, h, n, s: b * h * 2 * n * s,
            "the result is in MiB, not in bytes": lambda b, h, n, s: b * h * n * n * s / 2**20,
            "the result is in GiB, not in bytes": lambda b, h, n, s: b * h * n * n * s / 2**30,
        },
        gradients=False,
        verified="So one head at 16,384 positions needs 1 GiB in float32, before a single value is read.",
    )


# -------------------------------------------------------------------- exercise 2: what fits


def longest_length(budget: int, batch: int, heads: int, bytes_per_number: int, copies: int) -> int:
    """The largest length whose score matrices, `copies` of them alive at once, fit into `budget` bytes."""
    return math.isqrt(budget // (batch * heads * bytes_per_number * copies))


def check_longest_length(candidate: Any) -> Verdict:
    """Check ``longest_length(budget, batch, heads, bytes_per_number, copies) -> length``."""

    def real(budget: int, batch: int, heads: int, size: int, copies: int) -> float:
        return math.sqrt(budget / (batch * heads * size * copies))

    return check(
        candidate,
        longest_length,
        name="longest_length",
        cases=[
            (2**30, 1, 1, 4, 1),  # fits exactly
            (2**34, 4, 8, 2, 3),
            (2**34 - 1, 1, 4, 4, 1),  # one byte short of fitting exactly
            (1000, 1, 1, 4, 2),
            (3, 1, 1, 4, 1),  # nothing fits
        ],
        suspects={
            "the square root is missing: the matrix has length times length numbers": (
                lambda m, b, h, s, k: m // (b * h * s * k)
            ),
            "it is not rounded down: a length is a whole number, and the next one up no longer fits": real,
            "it is rounded to the nearest length, which may be one too long to fit": lambda *a: round(real(*a)),
            "it is rounded up: that length no longer fits": lambda *a: math.ceil(real(*a)),
            "off by one: a matrix that fills the budget exactly still fits": (
                lambda m, b, h, s, k: max(0, math.isqrt(max(0, m - 1) // (b * h * s * k)))
            ),
            "off by one: one position less than what fits": lambda *a: math.floor(real(*a)) - 1,
            "off by one: one position more than what fits": lambda *a: math.floor(real(*a)) + 1,
            "copies is missing: several matrices are alive at once": lambda m, b, h, s, k: longest_length(
                m, b, h, s, 1
            ),
            "heads is missing: each head has a score matrix of its own": (
                lambda m, b, h, s, k: longest_length(m, b, 1, s, k)
            ),
            "batch is missing: each sequence has its own matrices": lambda m, b, h, s, k: longest_length(m, 1, h, s, k),
            "bytes_per_number is missing: the budget is in bytes": lambda m, b, h, s, k: longest_length(m, b, h, 1, k),
            "budget is taken for bits: it is in bytes": lambda m, b, h, s, k: longest_length(m // 8, b, h, s, k),
        },
        gradients=False,
        verified="Four times the memory buys only twice the length.",
    )


# -------------------------------------------------------------------- exercise 3: exact attention without L x L


class _Fused(Watched):
    """Also remembers the most queries handed to a fused call, which hides its scores."""

    queries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func):
            self.queries = max(self.queries, args[0].shape[-2])
        return super().__torch_dispatch__(func, types, args, kwargs)


def check_attend_in_blocks(candidate: Any) -> Verdict:
    """Check ``attend_in_blocks(q, k, v, block)``: exact softmax attention that never makes an L x L tensor."""
    verdict = check(
        candidate,
        lambda q, k, v, block: attend(q, k, v),
        name="attend_in_blocks",
        cases=[
            (*_qkv(2, 12, 4, 3), 4),
            (*_qkv(1, 13, 5, 5), 4),  # the last block is not full
            (*_qkv(3, 7, 2, 6), 1),
            (*_qkv(2, 5, 3, 2), 8),  # one block holds everything
            (*_qkv(1, 1, 4, 4), 2),
        ],
        suspects=_ATTENTION_SUSPECTS,
        verified="On 257 positions, in blocks of 8, no tensor as large as length x length was made.",
    )
    return _without_the_matrix(candidate, verdict) if verdict.ok else verdict


def _without_the_matrix(candidate: Callable[..., Tensor], verdict: Verdict) -> Verdict:
    """Run a right candidate once more, at a length where an L x L tensor stands out, and look for one."""
    length, block = 257, 8
    q, k, v = _qkv(1, length, 4, 4)
    with torch.no_grad(), _Fused() as seen:
        candidate(q[0], k[0], v[0], block)
    if seen.queries > block:
        return Verdict(
            "wrong",
            f"✗ attend_in_blocks: the values are right, but all {seen.queries} queries went to the fused call at "
            f"once\n  likely cause: block is not used. Write the loop over blocks of {block} queries yourself.",
        )
    if seen.largest >= length * length:
        return Verdict(
            "wrong",
            f"✗ attend_in_blocks: the values are right, but for length {length} and block {block} it made a tensor of "
            f"{seen.largest:,} numbers, as large as length x length = {length * length:,}\n  likely cause: the full "
            "score matrix (or a mask, or a buffer of its size) is still built. Take a block of queries first, and "
            "compute the scores of that block only.",
        )
    return verdict


def _qkv(batch: int, length: int, z: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(17 * length + z)

    def draw(width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=generator, dtype=torch.float64)

    return 2 * draw(z), draw(z), draw(v)


def _weighted(q: Tensor, k: Tensor, v: Tensor, scale: float, axis: int = -1) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=axis) @ v


def _softmax_per_block_of_keys(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    parts = zip(k.split(block, dim=1), v.split(block, dim=1), strict=True)
    return torch.stack([_weighted(q, keys, values, q.shape[-1] ** -0.5) for keys, values in parts]).sum(0)


def _softmax_over_the_queries_of_a_block(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    blocks = [_weighted(rows, k, v, q.shape[-1] ** -0.5, axis=-2) for rows in q.split(block, dim=1)]
    return torch.cat(blocks, dim=1)


def _last_block_left_empty(q: Tensor, k: Tensor, v: Tensor, block: int) -> Tensor:
    y = attend(q, k, v)
    full = q.shape[1] // block * block
    return torch.cat([y[:, :full], torch.zeros_like(y[:, full:])], dim=1)


_ATTENTION_SUSPECTS: dict[str, Callable[..., Any]] = {
    "keys and values are cut into blocks as well: that is chunk attention, where a query sees its own block only; "
    "here every query sees all keys": lambda q, k, v, block: chunk_attention(q, k, v, block),
    "keys are cut into blocks too, and each block of keys has a softmax of its own: the weights of a query have to "
    "sum to 1 over all keys": _softmax_per_block_of_keys,
    "the scores are not scaled: 1/sqrt(z) is missing": lambda q, k, v, block: _weighted(q, k, v, 1.0),
    "the scores are scaled by 1/z instead of 1/sqrt(z)": lambda q, k, v, block: _weighted(q, k, v, 1 / q.shape[-1]),
    "the scores are scaled by the width of the values; it is the width of queries and keys that counts": (
        lambda q, k, v, block: _weighted(q, k, v, v.shape[-1] ** -0.5)
    ),
    "the scores are scaled by the length instead of the width z": (
        lambda q, k, v, block: _weighted(q, k, v, q.shape[-2] ** -0.5)
    ),
    "the softmax runs over the queries of a block instead of over the keys: dim=-2 instead of dim=-1": (
        _softmax_over_the_queries_of_a_block
    ),
    "the softmax is missing: these are raw scores": (
        lambda q, k, v, block: (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) @ v
    ),
    "the last block, which is not full, is missing: its rows stayed zero": _last_block_left_empty,
    "the last block, which is not full, is missing": lambda q, k, v, block: attend(q, k, v)[
        :, : q.shape[1] // block * block
    ],
    "only the last block of queries is returned: collect the blocks and join them along the length": (
        lambda q, k, v, block: attend(q, k, v)[:, (q.shape[1] - 1) // block * block :]
    ),
    "queries and keys are exchanged: rows belong to queries, columns to keys": lambda q, k, v, block: attend(k, q, v),
}


# -------------------------------------------------------------------- exercise 4: an exponent


def check_fit_exponent(candidate: Any) -> Verdict:
    """Check ``fit_exponent(lengths, values)``: the least-squares slope of log values against log lengths."""

    def polyfit(x: Tensor, y: Tensor, which: int = 0) -> float:
        return float(np.polyfit(x.numpy(), y.numpy(), 1)[which])

    return check(
        candidate,
        lambda lengths, values: growth_exponent(lengths.tolist(), values.tolist()).exponent,
        name="fit_exponent",
        cases=_growths(),
        suspects={
            "no logarithms: this is the slope of the values themselves": polyfit,
            "only the values are logarithms: take the logarithm of the lengths too": lambda x, y: polyfit(x, y.log()),
            "only the lengths are logarithms: take the logarithm of the values too": lambda x, y: polyfit(x.log(), y),
            "this is the intercept, log c; the exponent is the slope": lambda x, y: polyfit(x.log(), y.log(), 1),
            "the axes are swapped: the values are to be explained by the lengths": lambda x, y: polyfit(
                y.log(), x.log()
            ),
            "the line is forced through the origin: subtract the means first, or fit an intercept": (
                lambda x, y: float((x.log() * y.log()).sum() / x.log().square().sum())
            ),
            "only the first and the last point are used: least squares uses all of them": (
                lambda x, y: float((y[-1] / y[0]).log() / (x[-1] / x[0]).log())
            ),
            "only the last two points are used: least squares uses all of them": (
                lambda x, y: float((y[-1] / y[-2]).log() / (x[-1] / x[-2]).log())
            ),
            "the slopes between neighbours are averaged: that is not the least-squares line": (
                lambda x, y: float((y.log().diff() / x.log().diff()).mean())
            ),
            "this is the correlation, not the slope": lambda x, y: float(
                torch.corrcoef(torch.stack([x.log(), y.log()]))[0, 1]
            ),
        },
        gradients=False,
        verified="It agrees with classroom.growth_exponent, which every chapter uses.",
    )


def _growths() -> list[tuple[Tensor, Tensor]]:
    """Costs that grow exactly quadratically, linearly with noise, like L log L, and a falling one."""
    short, long = [torch.tensor(x, dtype=torch.float64) for x in ([3, 7, 20], [256, 400, 1024, 4096, 9000])]
    noise = torch.tensor([1.1, 0.8, 1.3, 0.9, 1.05], dtype=torch.float64)
    return [
        (short, 3e-9 * short**2),
        (long, 2e-6 * long * noise),
        (long, 1e-8 * long * long.log2() * noise.flip(0)),
        (long, 5 / long * noise),
    ]
