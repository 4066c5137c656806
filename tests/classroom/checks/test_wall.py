"""The checks of chapter 00 take right answers, and name the cause of plausible wrong ones."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.wall import (
    check_attend_in_blocks,
    check_fit_exponent,
    check_longest_length,
    check_score_bytes,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved

CHECKS = (check_score_bytes, check_longest_length, check_attend_in_blocks, check_fit_exponent)


@pytest.mark.parametrize("check", CHECKS)
def test_a_stub_is_unsolved(check):
    def stub(*arguments):
        raise NotImplementedError("your turn: write it")

    assert_unsolved(check, stub)


# ---- exercise 1


def test_score_bytes_takes_the_count():
    assert_accepts(check_score_bytes, lambda batch, heads, length, size: length**2 * heads * batch * size)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda b, h, n, s: b * h * n * s, "once instead of twice"),
        (lambda b, h, n, s: b * n * n * s, "heads are missing"),
        (lambda b, h, n, s: h * n * n * s, "batch is missing"),
        (lambda b, h, n, s: n**2 * s, "heads and batch are missing"),
        (lambda b, h, n, s: b * h * n**2, "counts numbers, not bytes"),
        (lambda b, h, n, s: b * h * n**2 * s * 8, "bits"),
        (lambda b, h, n, s: b * h * (n * (n + 1) // 2) * s, "causal mask"),
        (lambda b, h, n, s: b * h * (n * (n - 1) // 2) * s, "half of the pairs"),
        (lambda b, h, n, s: b * h * 2 * n * s, "doubled, not squared"),
        (lambda b, h, n, s: b * h * n**2 * s / 2**20, "MiB"),
        (lambda b, h, n, s: b * h * n**2 * s / 2**30, "GiB"),
        (lambda b, h, n, s: None, "return"),
        (lambda b, h, n: b * h * n**2, "cannot be called"),
    ],
)
def test_score_bytes_names_the_cause(wrong, words):
    assert_rejects(check_score_bytes, wrong, words)


# ---- exercise 2


def longest_length(budget, batch, heads, size, copies):
    return math.isqrt(budget // (batch * heads * size * copies))


def by_search(budget, batch, heads, size, copies):
    low, high = 0, budget + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if batch * heads * size * copies * middle**2 <= budget else (low, middle)
    return low


def test_longest_length_takes_a_formula_and_a_search():
    assert_accepts(check_longest_length, longest_length)
    assert_accepts(check_longest_length, by_search)
    assert_accepts(check_longest_length, lambda m, b, h, s, k: int(math.sqrt(m / (b * h * s * k))))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda m, b, h, s, k: m // (b * h * s * k), "square root is missing"),
        (lambda m, b, h, s, k: math.sqrt(m / (b * h * s * k)), "not rounded down"),
        (lambda m, b, h, s, k: round(math.sqrt(m / (b * h * s * k))), "nearest"),
        (lambda m, b, h, s, k: math.ceil(math.sqrt(m / (b * h * s * k))), "rounded up"),
        (lambda m, b, h, s, k: math.isqrt(max(0, m - 1) // (b * h * s * k)), "exactly still fits"),
        (lambda m, b, h, s, k: longest_length(m, b, h, s, k) - 1, "one position less"),
        (lambda m, b, h, s, k: longest_length(m, b, h, s, k) + 1, "one position more"),
        (lambda m, b, h, s, k: longest_length(m, b, h, s, 1), "copies is missing"),
        (lambda m, b, h, s, k: longest_length(m, b, 1, s, k), "heads is missing"),
        (lambda m, b, h, s, k: longest_length(m, 1, h, s, k), "batch is missing"),
        (lambda m, b, h, s, k: longest_length(m, b, h, 1, k), "bytes_per_number is missing"),
        (lambda m, b, h, s, k: longest_length(m // 8, b, h, s, k), "bits"),
    ],
)
def test_longest_length_names_the_cause(wrong, words):
    assert_rejects(check_longest_length, wrong, words)


# ---- exercise 3


def weighted(q, k, v, scale=None, dim=-1):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=dim) @ v


def attend_in_blocks(q, k, v, block):
    return torch.cat([weighted(rows, k, v) for rows in q.split(block, dim=-2)], dim=-2)


def into_a_buffer(q, k, v, block):
    y = q.new_empty(*q.shape[:-1], v.shape[-1])
    for start in range(0, q.shape[-2], block):
        y[..., start : start + block, :] = weighted(q[..., start : start + block, :], k, v)
    return y


def fused_by_block(q, k, v, block):
    return torch.cat([F.scaled_dot_product_attention(rows, k, v) for rows in q.split(block, dim=-2)], dim=-2)


def online(q, k, v, block):
    """Keys in blocks too, with a running maximum and sum: the way of the fused kernels."""
    outputs = []
    for rows in q.split(block, dim=-2):
        top = torch.full_like(rows[..., :1], -torch.inf)
        total, y = torch.zeros_like(top), torch.zeros(*rows.shape[:-1], v.shape[-1], dtype=v.dtype)
        for keys, values in zip(k.split(block, dim=-2), v.split(block, dim=-2), strict=True):
            scores = rows @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
            new = torch.maximum(top, scores.amax(-1, keepdim=True))
            power, keep = torch.exp(scores - new), torch.exp(top - new)
            total, y, top = total * keep + power.sum(-1, keepdim=True), y * keep + power @ values, new
        outputs.append(y / total)
    return torch.cat(outputs, dim=-2)


@pytest.mark.parametrize("right", [attend_in_blocks, into_a_buffer, fused_by_block, online])
def test_blocks_in_any_right_way_are_taken(right):
    assert_accepts(check_attend_in_blocks, right)


def own_block_only(q, k, v, block):
    parts = zip(q.split(block, -2), k.split(block, -2), v.split(block, -2), strict=True)
    return torch.cat([weighted(*part) for part in parts], dim=-2)


def a_softmax_for_each_block_of_keys(q, k, v, block):
    return sum(weighted(q, keys, values) for keys, values in zip(k.split(block, -2), v.split(block, -2), strict=True))


def last_block_missing(q, k, v, block):
    full = q.shape[-2] // block * block
    return attend_in_blocks(q, k, v, block)[..., :full, :]


def last_block_zero(q, k, v, block):
    y = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=v.dtype)
    for number in range(q.shape[-2] // block):
        rows = slice(number * block, (number + 1) * block)
        y[..., rows, :] = weighted(q[..., rows, :], k, v)
    return y


def last_block_only(q, k, v, block):
    for rows in q.split(block, dim=-2):
        y = weighted(rows, k, v)
    return y


def a_big_buffer(q, k, v, block):
    weights = torch.zeros(*q.shape[:-1], q.shape[-2], dtype=q.dtype)
    for start in range(0, q.shape[-2], block):
        rows = slice(start, start + block)
        scores = q[..., rows, :] @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        weights[..., rows, :] = torch.softmax(scores, dim=-1)
    return weights @ v


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (own_block_only, ["chunk attention", "all keys"]),
        (a_softmax_for_each_block_of_keys, ["softmax of its own"]),
        (lambda q, k, v, block: weighted(q, k, v, scale=1.0), ["1/sqrt(z) is missing"]),
        (lambda q, k, v, block: weighted(q, k, v, scale=1 / q.shape[-1]), ["1/z instead"]),
        (lambda q, k, v, block: weighted(q, k, v, scale=v.shape[-1] ** -0.5), ["width of the values"]),
        (lambda q, k, v, block: weighted(q, k, v, scale=q.shape[-2] ** -0.5), ["length instead"]),
        (
            lambda q, k, v, block: torch.cat([weighted(rows, k, v, dim=-2) for rows in q.split(block, -2)], -2),
            ["over the queries"],
        ),
        (lambda q, k, v, block: q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) @ v, ["softmax is missing"]),
        (last_block_missing, ["last block", "missing"]),
        (last_block_zero, ["last block", "zero"]),
        (last_block_only, ["only the last block"]),
        (lambda q, k, v, block: attend_in_blocks(k, q, v, block), ["exchanged"]),
        (lambda q, k, v, block: weighted(q, k, v), ["length x length", "Take a block"]),
        (a_big_buffer, ["length x length", "buffer"]),
        (lambda q, k, v, block: F.scaled_dot_product_attention(q, k, v), ["likely cause", "block"]),
        (lambda q, k, v, block: attend_in_blocks(q.detach(), k, v, block), ["no gradient reaches q"]),
        (lambda q, k, v, block: attend_in_blocks(q.float(), k.float(), v.float(), block), ["dtype"]),
    ],
)
def test_blocks_in_a_wrong_way_are_explained(wrong, words):
    assert_rejects(check_attend_in_blocks, wrong, *words)


# ---- exercise 4


def fit_exponent(lengths, values):
    x, y = lengths.log(), values.log()
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x * x).sum()


def polyfit(x, y, which=0):
    return np.polyfit(x.numpy(), y.numpy(), 1)[which]


def test_an_exponent_may_be_a_tensor_or_a_number_in_any_logarithm():
    assert_accepts(check_fit_exponent, fit_exponent)
    assert_accepts(check_fit_exponent, lambda x, y: polyfit(x.log10(), y.log10()))
    assert_accepts(check_fit_exponent, lambda x, y: float(fit_exponent(x, y)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x, y: polyfit(x, y), "no logarithms"),
        (lambda x, y: polyfit(x, y.log()), "of the lengths too"),
        (lambda x, y: polyfit(x.log(), y), "of the values too"),
        (lambda x, y: polyfit(x.log(), y.log(), 1), "intercept"),
        (lambda x, y: fit_exponent(y, x), "axes are swapped"),
        (lambda x, y: (x.log() * y.log()).sum() / (x.log() ** 2).sum(), "through the origin"),
        (lambda x, y: torch.log(y[-1] / y[0]) / torch.log(x[-1] / x[0]), "first and the last point"),
        (lambda x, y: torch.log(y[-1] / y[-2]) / torch.log(x[-1] / x[-2]), "last two points"),
        (lambda x, y: (y.log().diff() / x.log().diff()).mean(), "averaged"),
        (lambda x, y: np.corrcoef(x.log().numpy(), y.log().numpy())[0, 1], "correlation"),
        (lambda x, y: y.log(), "wanted a number"),
    ],
)
def test_a_wrong_exponent_is_explained(wrong, words):
    assert_rejects(check_fit_exponent, wrong, words)
