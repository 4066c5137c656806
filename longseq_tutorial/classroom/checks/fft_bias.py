"""Checks of chapter 08's exercises: the matrix, the circle, the product, the separable image, the lags' gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.watching import reject, watch
from longseq_tutorial.mechanisms import fft_bias

__all__ = [
    "check_circle",
    "check_lag_gradient",
    "check_separable",
    "check_toeplitz_matrix",
    "check_toeplitz_product",
]


LONG = 100  # positions: the FFT needs a few dozen operations on 2 LONG numbers


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _by_fft(candidate: Any, verdict: Verdict, name: str, long: tuple[Tensor, Tensor]) -> Verdict:
    """The verdict, or, where the way of one head and channel over LONG positions is another, what to do about it."""
    if not verdict.ok:
        return verdict
    seen = watch(torch.enable_grad()(candidate), *long)  # a reader may differentiate
    if seen.largest >= LONG**2:
        cause = "an L x L matrix"
    elif seen.operations >= 2 * LONG:
        cause = "a loop over positions or offsets"
    else:
        return verdict
    return reject(name, "not through the FFT.", f"{cause}. Transform, multiply, transform back.")


# ---- the matrix --------------------------------------------------------------------------------------------------


def _by_index(index: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Tensor], Tensor]:
    """The matrix whose entry (i, j) is the lag at ``index(i, j, L)``."""

    def matrix(lags: Tensor) -> Tensor:
        length = (lags.shape[-1] + 1) // 2
        position = torch.arange(length)
        return lags[:, index(position[:, None], position[None], length)]

    return matrix


def check_toeplitz_matrix(candidate: Any) -> Verdict:
    """Exercise 1: ``toeplitz_matrix(lags)``, ``(H, 2L-1)`` to ``(H, L, L)``."""

    def toeplitz_matrix(lags: Tensor) -> Tensor:
        return fft_bias.toeplitz_matrix(lags)

    return check(
        candidate,
        toeplitz_matrix,
        name="toeplitz_matrix",
        cases=[(_draw(2, 9, seed=1),), (_draw(1, 1, seed=2),), (_draw(3, 5, seed=3),), (_draw(1, 13, seed=4).float(),)],
        suspects={
            "rows and columns are exchanged: row i is who reads, column j is who is read, and the offset is i - j": (
                _by_index(lambda i, j, n: j - i + n - 1)
            ),
            "the index is i - j without L - 1: negative offsets then count from the end of the list, "
            "and offset 0 reads its beginning": _by_index(lambda i, j, n: i - j),
            "the distance |i - j| in place of the offset i - j: before and after are no longer told apart": (
                _by_index(lambda i, j, n: (i - j).abs() + n - 1)
            ),
            "i + j in place of i - j: constant along the other diagonals (a Hankel matrix)": (
                _by_index(lambda i, j, n: i + j)
            ),
            "the upper triangle is 0: that is the causal bias, and this one looks both ways": lambda lags: (
                fft_bias.toeplitz_matrix(lags).tril()
            ),
        },
        verified="Each diagonal holds one number.",
    )


# ---- the circle --------------------------------------------------------------------------------------------------


def _circle(lags: Tensor, n: int) -> Tensor:
    """Offset 0 first, zeros in the middle, negative offsets at the end."""
    length = (lags.shape[-1] + 1) // 2
    return torch.cat([lags[:, length - 1 :], lags.new_zeros(len(lags), n - 2 * length + 1), lags[:, : length - 1]], -1)


def check_circle(candidate: Any) -> Verdict:
    """Exercise 2: ``circle(lags, n)``, ``(H, 2L-1)`` to the first column ``(H, n)`` of the circulant matrix."""

    def circle(lags: Tensor, n: int) -> Tensor:
        return _circle(lags, n)

    def parts(lags: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        length = (lags.shape[-1] + 1) // 2
        return lags[:, length - 1 :], lags.new_zeros(len(lags), n - 2 * length + 1), lags[:, : length - 1]

    def from_parts(order: Callable[[Tensor, Tensor, Tensor], list[Tensor]]) -> Callable[[Tensor, int], Tensor]:
        return lambda lags, n: torch.cat(order(*parts(lags, n)), -1)

    return check(
        candidate,
        circle,
        name="circle",
        cases=[
            (_draw(2, 9, seed=10), 12),
            (_draw(1, 7, seed=11), 7),
            (_draw(3, 1, seed=12), 4),
            (_draw(2, 5, seed=13).float(), 6),
        ],
        suspects={
            "the negative offsets stand in reverse: offset -1 is one step before offset 0, so it comes last": (
                from_parts(lambda past, zeros, future: [past, zeros, future.flip(-1)])
            ),
            "the zeros are at the end: the negative offsets have to reach the end of the circle, "
            "the zeros stand between": from_parts(lambda past, zeros, future: [past, future, zeros]),
            "the lags are only padded: offset 0 has to come first (a roll by -(L-1) is missing)": lambda lags, n: F.pad(
                lags, (0, n - lags.shape[-1])
            ),
            "rolled the wrong way: offset 0, at index L-1, has to move to index 0": lambda lags, n: F.pad(
                lags, (0, n - lags.shape[-1])
            ).roll(lags.shape[-1] // 2, -1),
            "an off-by-one in the roll: not offset 0 but a neighbour came first": lambda lags, n: F.pad(
                lags, (0, n - lags.shape[-1])
            ).roll(-(lags.shape[-1] // 2) - 1, -1),
            "past and future are exchanged: column 0 holds lags 0, 1, 2, ... going down": lambda lags, n: _circle(
                lags.flip(-1), n
            ),
            "the negative offsets are missing: that is the causal bias": from_parts(
                lambda past, zeros, future: [past, zeros, torch.zeros_like(future)]
            ),
        },
        verified="Its FFT is the list of the circulant matrix's eigenvalues.",
    )


# ---- the product -------------------------------------------------------------------------------------------------


def _wrapped(lags: Tensor, v: Tensor, n: int) -> Tensor:
    """The product on a circle of n points, where offsets that meet add up."""
    length = v.shape[1]
    place = torch.arange(1 - length, length) % n
    column = lags.new_zeros(len(lags), n).index_add(1, place, lags)
    spectrum = torch.fft.rfft(v, n=n, dim=1) * torch.fft.rfft(column).T[None, :, :, None]
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, :length]


def _unrolled(lags: Tensor, v: Tensor) -> Tensor:
    n = 2 * v.shape[1]
    spectrum = torch.fft.rfft(lags, n=n).T[None, :, :, None]
    return torch.fft.irfft(torch.fft.rfft(v, n=n, dim=1) * spectrum, n=n, dim=1)[:, : v.shape[1]]


def _no_size(lags: Tensor, v: Tensor) -> Tensor:
    """irfft takes the length for an even one."""
    n = 2 * v.shape[1] - 1
    spectrum = torch.fft.rfft(v, n=n, dim=1) * torch.fft.rfft(_circle(lags, n)).T[None, :, :, None]
    return torch.fft.irfft(spectrum, dim=1)[:, : v.shape[1]]


def check_toeplitz_product(candidate: Any) -> Verdict:
    """Exercise 3: ``toeplitz_product(lags, v)``, ``(H, 2L-1)`` and ``(B, L, H, d)`` to ``(B, L, H, d)``."""
    product = fft_bias.toeplitz_product

    def toeplitz_product(lags: Tensor, v: Tensor) -> Tensor:
        return product(lags, v)

    def case(batch: int, length: int, heads: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
        return _draw(heads, 2 * length - 1, seed=seed), _draw(batch, length, heads, width, seed=seed + 1)

    long = case(1, LONG, 1, 1, 55)
    verdict = check(
        candidate,
        toeplitz_product,
        name="toeplitz_product",
        cases=[
            case(2, 7, 3, 3, 20),
            case(1, 1, 2, 2, 30),
            case(2, 12, 1, 2, 40),
            tuple(t.float() for t in case(1, 31, 2, 1, 50)),
            long,
        ],
        suspects={
            "a circle of L points: the far end wraps around. Give the FFT at least 2L - 1 points": lambda w, v: (
                _wrapped(w, v, v.shape[1])
            ),
            "a circle that is too short: a part of the far end still wraps around. "
            "Give the FFT at least 2L - 1 points": lambda w, v: _wrapped(w, v, v.shape[1] + v.shape[1] // 2),
            "a circle of 2L - 2 points, one too few: the two farthest offsets meet": lambda w, v: _wrapped(
                w, v, max(1, 2 * v.shape[1] - 2)
            ),
            "past and future are exchanged: the transposed matrix, sum of w[j - i] * v[j]. "
            "Is a flip or a conjugate one too many?": lambda w, v: product(w.flip(-1), v),
            "the lags are transformed as they are: on the circle offset 0 has to come first": _unrolled,
            "torch.fft.irfft without n: it cannot know that the length was odd, and assumes an even one": _no_size,
            "the upper triangle is missing: that is the causal bias, and this one looks both ways": lambda w, v: (
                product(w, v, causal=True)
            ),
            "all heads use the weights of the first one": lambda w, v: product(w[:1].expand_as(w), v),
            "a product position by position: the transforms are missing": lambda w, v: (
                w[:, v.shape[1] - 1 :].T[None, :, :, None] * v
            ),
        },
        verified="No L x L matrix was needed.",
    )
    return _by_fft(candidate, verdict, "toeplitz_product", long)


# ---- the separable image -----------------------------------------------------------------------------------------


def _each_line(lags: Tensor, v: Tensor) -> Tensor:
    """Every row convolved by itself, every column by itself: nothing is summed over the other axis."""
    matrix = fft_bias.toeplitz_matrix(lags)
    return torch.einsum("hxi,biyhd->bxyhd", matrix, v) + torch.einsum("hyj,bxjhd->bxyhd", matrix, v)


def _in_turn(lags: Tensor, v: Tensor) -> Tensor:
    matrix = fft_bias.toeplitz_matrix(lags)
    return torch.einsum("hxi,hyj,bijhd->bxyhd", matrix, matrix, v)


def check_separable(candidate: Any) -> Verdict:
    """Exercise 4: ``separable(lags, v)``, ``(H, 2S-1)`` and ``(B, S, S, H, d)`` to ``(B, S, S, H, d)``."""
    product = fft_bias.toeplitz_product

    def separable(lags: Tensor, v: Tensor) -> Tensor:
        return fft_bias.toeplitz_product_2d(lags, v)

    def joined(rows: Tensor, columns: Tensor) -> Tensor:
        return rows[:, :, None] + columns[:, None]

    def case(batch: int, side: int, heads: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
        return _draw(heads, 2 * side - 1, seed=seed), _draw(batch, side, side, heads, width, seed=seed + 1)

    large = case(1, 16, 1, 1, 85)
    verdict = check(
        candidate,
        separable,
        name="separable",
        cases=[case(2, 4, 2, 3, 60), case(1, 1, 1, 2, 70), case(1, 5, 3, 1, 80), large],
        suspects={
            "rows and columns are exchanged: the sum over y is a list over x, and has to spread over y": lambda w, v: (
                joined(product(w, v.sum(1)), product(w, v.sum(2)))
            ),
            "nothing is summed over the other axis: w[x - x'] holds for every y' of row x', "
            "so it meets the sum of that row": _each_line,
            "one axis after the other: that multiplies w[x-x'] and w[y-y'], the published bias adds them": _in_turn,
            "means in place of sums over the other axis": lambda w, v: joined(
                product(w, v.mean(2)), product(w, v.mean(1))
            ),
            "only the first axis: w[y - y'] is missing": lambda w, v: (
                product(w, v.sum(2))[:, :, None].expand_as(v).clone()
            ),
            "only the second axis: w[x - x'] is missing": lambda w, v: (
                product(w, v.sum(1))[:, None].expand_as(v).clone()
            ),
            "past and future are exchanged": lambda w, v: fft_bias.toeplitz_product_2d(w.flip(-1), v),
        },
        verified="For an image of S x S pixels that is two products of length S.",
    )
    if not verdict.ok or watch(torch.enable_grad()(candidate), *large).largest <= large[1].numel():
        return verdict
    return reject(
        "separable",
        "something larger than v was built.",
        "a padded image, or a matrix for all pairs of pixels. Sum over one axis first: what is left is short.",
    )


# ---- the gradient of the lags ------------------------------------------------------------------------------------


def _correlation(g: Tensor, v: Tensor, n: int | None = None) -> Tensor:
    """``sum over b, d and all i - j = offset of g[i] * v[j]``, on a circle of n points."""
    length = v.shape[1]
    n = n or 2 * length - 1
    spectrum = (torch.fft.rfft(g, n=n, dim=1) * torch.fft.rfft(v, n=n, dim=1).conj()).sum((0, 3)).T
    circle = torch.fft.irfft(spectrum, n=n)
    return circle[:, torch.arange(1 - length, length) % n]


def check_lag_gradient(candidate: Any) -> Verdict:
    """Exercise 5: ``lag_gradient(g, v)``, both ``(B, L, H, d)``, to ``(H, 2L-1)``."""

    def lag_gradient(g: Tensor, v: Tensor) -> Tensor:
        return _correlation(g, v)

    def convolved(g: Tensor, v: Tensor) -> Tensor:
        return _correlation(g, v.flip(1))

    def per_channel(g: Tensor, v: Tensor) -> Tensor:
        return _correlation(g.sum(3, keepdim=True), v.sum(3, keepdim=True))

    def per_batch(g: Tensor, v: Tensor) -> Tensor:
        return _correlation(g.sum(0, keepdim=True), v.sum(0, keepdim=True))

    def case(batch: int, length: int, heads: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
        shape = (batch, length, heads, width)
        return _draw(*shape, seed=seed), _draw(*shape, seed=seed + 1)

    long = case(1, LONG, 1, 1, 120)
    verdict = check(
        candidate,
        lag_gradient,
        name="lag_gradient",
        cases=[case(2, 6, 2, 3, 90), case(1, 1, 1, 2, 100), case(3, 11, 1, 2, 110), long],
        suspects={
            "g and v are exchanged: offset i - j stands at the index of j - i": lambda g, v: _correlation(v, g),
            "a convolution in place of a correlation: the conjugate of v's spectrum is missing": convolved,
            "a circle of L points: far offsets fall onto near ones. Give the FFT at least 2L - 1 points": lambda g, v: (
                _correlation(g, v, v.shape[1])
            ),
            "the offsets are not in order: on the circle offset 0 comes first, here it stands in the middle": (
                lambda g, v: _correlation(g, v).roll(1 - v.shape[1], -1)
            ),
            "the negative offsets are missing": lambda g, v: (
                _correlation(g, v) * (torch.arange(2 * v.shape[1] - 1) >= v.shape[1] - 1)
            ),
            "the channels are summed before the product: each channel of g meets its own channel of v": per_channel,
            "the sequences are summed before the product: each sequence of g meets its own sequence of v": per_batch,
            "the mean over the channels in place of their sum": lambda g, v: _correlation(g, v) / v.shape[3],
            "the mean over the batch in place of its sum": lambda g, v: _correlation(g, v) / v.shape[0],
        },
        verified="It is what autograd finds for the weights.",
    )
    return _by_fft(candidate, verdict, "lag_gradient", long)
