"""The checks of chapter 08 accept what is right, however it is written, and name the cause of what is wrong."""

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.fft_bias import (
    check_circle,
    check_lag_gradient,
    check_separable,
    check_toeplitz_matrix,
    check_toeplitz_product,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms import fft_bias


def matrix(lags):
    length = (lags.shape[-1] + 1) // 2
    position = torch.arange(length)
    return lags[:, position[:, None] - position[None] + length - 1]


def circle(lags, n):
    length = (lags.shape[-1] + 1) // 2
    return F.pad(lags, (0, n - lags.shape[-1])).roll(1 - length, -1)


def product_with(n=lambda length: 2 * length, make=circle, keep=lambda y, length: y[:, :length], n_back=True):
    def product(lags, v):
        length = v.shape[1]
        points = n(length)
        spectrum = torch.fft.rfft(make(lags, points)).T[None, :, :, None]
        y = torch.fft.irfft(torch.fft.rfft(v, n=points, dim=1) * spectrum, n=points if n_back else None, dim=1)
        return keep(y, length)

    return product


def separable(lags, v):
    rows, columns = fft_bias.toeplitz_product(lags, v.sum(2)), fft_bias.toeplitz_product(lags, v.sum(1))
    return rows[:, :, None] + columns[:, None]


def gradient(g, v):
    length = v.shape[1]
    n = 2 * length
    spectrum = torch.fft.rfft(g, n=n, dim=1) * torch.fft.rfft(v, n=n, dim=1).conj()
    return torch.fft.irfft(spectrum.sum((0, 3)).T, n=n).roll(length - 1, -1)[:, : 2 * length - 1]


def by_autograd(product):
    def gradient(g, v):
        lags = torch.zeros(v.shape[2], 2 * v.shape[1] - 1, dtype=v.dtype, requires_grad=True)
        return torch.autograd.grad((product(lags, v) * g).sum(), lags, create_graph=True)[0]

    return gradient


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_toeplitz_matrix: matrix,
    check_circle: circle,
    check_toeplitz_product: product_with(),
    check_separable: separable,
    check_lag_gradient: gradient,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    assert_accepts(check_toeplitz_matrix, lambda w: w.flip(-1).unfold(-1, (w.shape[-1] + 1) // 2, 1).flip(-2))
    assert_accepts(check_toeplitz_product, fft_bias.toeplitz_product)
    assert_accepts(check_toeplitz_product, product_with(n=lambda length: 2 * length - 1))
    assert_accepts(check_separable, fft_bias.toeplitz_product_2d)
    assert_accepts(check_lag_gradient, by_autograd(fft_bias.toeplitz_product))


# ---- wrong answers -------------------------------------------------------------------------------------------------


def hankel(w):
    position = torch.arange((w.shape[-1] + 1) // 2)
    return w[:, position[:, None] + position[None]]


def no_middle(w):
    position = torch.arange((w.shape[-1] + 1) // 2)
    return w[:, position[:, None] - position[None]]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda w: matrix(w).mT, ["rows and columns are exchanged"]),
        (no_middle, ["without L - 1"]),
        (hankel, ["Hankel"]),
        (lambda w: matrix(torch.cat([w[:, w.shape[1] // 2 + 1 :].flip(-1), w[:, w.shape[1] // 2 :]], -1)), ["|i - j|"]),
        (lambda w: matrix(w).tril(), ["causal"]),
        (lambda w: matrix(w)[0], ["shape"]),
        (lambda w: matrix(w.detach()), ["gradient"]),
        (lambda w: -matrix(w), ["sign"]),
    ],
)
def test_matrix_mistakes(wrong, words):
    assert_rejects(check_toeplitz_matrix, wrong, *words)


def parts(w, n):
    half = w.shape[-1] // 2
    return w[:, half:], w.new_zeros(len(w), n - w.shape[-1]), w[:, :half]


def in_order(order):
    return lambda w, n: torch.cat(order(*parts(w, n)), -1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (in_order(lambda past, zeros, future: [past, zeros, future.flip(-1)]), ["in reverse"]),
        (in_order(lambda past, zeros, future: [past, future, zeros]), ["zeros are at the end"]),
        (in_order(lambda past, zeros, future: [future, past, zeros]), ["only padded"]),
        (lambda w, n: F.pad(w, (0, n - w.shape[1])).roll(w.shape[1] // 2, -1), ["rolled the wrong way"]),
        (lambda w, n: F.pad(w, (0, n - w.shape[1])).roll(-(w.shape[1] // 2) - 1, -1), ["off-by-one"]),
        (lambda w, n: circle(w.flip(-1), n), ["past and future are exchanged"]),
        (in_order(lambda past, zeros, future: [past, zeros, 0 * future]), ["causal"]),
        (lambda w, n: circle(w, w.shape[1]), ["shape"]),
    ],
)
def test_circle_mistakes(wrong, words):
    assert_rejects(check_circle, wrong, *words)


def folded(lags, n):
    """Offsets on a circle that may be too short for them."""
    length = (lags.shape[-1] + 1) // 2
    return lags.new_zeros(len(lags), n).index_add(1, torch.arange(1 - length, length) % n, lags)


def pair_by_pair(lags, v):
    length = v.shape[1]
    rows = [sum(lags[:, i - j + length - 1, None] * v[:, j] for j in range(length)) for i in range(length)]
    return torch.stack(rows, dim=1)


def row_by_row(lags, v):
    length = v.shape[1]
    turned = lags.flip(-1).T[None, :, :, None]
    return torch.stack([(turned[:, length - 1 - i : 2 * length - 1 - i] * v).sum(1) for i in range(length)], dim=1)


def conjugate(lags, v):
    n = 2 * v.shape[1]
    spectrum = torch.fft.rfft(circle(lags, n)).conj().T[None, :, :, None]
    return torch.fft.irfft(torch.fft.rfft(v, n=n, dim=1) * spectrum, n=n, dim=1)[:, : v.shape[1]]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (product_with(n=lambda length: length, make=folded), ["circle of L points"]),
        (product_with(n=lambda length: length + length // 2, make=folded), ["too short"]),
        (product_with(n=lambda length: max(1, 2 * length - 2), make=folded), ["one too few"]),
        (conjugate, ["past and future are exchanged"]),
        (product_with(make=lambda w, n: F.pad(w, (0, n - w.shape[1]))), ["offset 0 has to come first"]),
        (lambda w, v: fft_bias.toeplitz_product(w, v, causal=True), ["causal"]),
        (lambda w, v: product_with()(w[:1].expand(len(w), -1), v), ["first one"]),
        (lambda w, v: w[:, v.shape[1] - 1 :].T[None, :, :, None] * v, ["transforms are missing"]),
        (product_with(keep=lambda y, length: y), ["shape"]),
        (product_with(n=lambda length: 2 * length - 1, n_back=False), ["irfft without n"]),
        (lambda w, v: product_with()(w, v).detach(), ["gradient"]),
        (lambda w, v: product_with()(w, v) / v.shape[1], ["size of axis"]),
        (fft_bias.toeplitz_product_dense, ["values are right", "not through the FFT", "an L x L matrix"]),
        (lambda w, v: torch.einsum("hij,bjhd->bihd", matrix(w), v), ["not through the FFT", "an L x L matrix"]),
        (pair_by_pair, ["not through the FFT", "a loop over positions"]),
        (row_by_row, ["not through the FFT", "a loop over positions"]),
    ],
)
def test_product_mistakes(wrong, words):
    assert_rejects(check_toeplitz_product, wrong, *words)


def lines(w, v):
    m = matrix(w)
    return torch.einsum("hxi,biyhd->bxyhd", m, v) + torch.einsum("hyj,bxjhd->bxyhd", m, v)


def image_of(rows, columns):
    return rows[:, :, None] + columns[:, None]


P = fft_bias.toeplitz_product


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda w, v: image_of(P(w, v.sum(1)), P(w, v.sum(2))), ["rows and columns are exchanged"]),
        (lines, ["nothing is summed"]),
        (lambda w, v: torch.einsum("hxi,hyj,bijhd->bxyhd", matrix(w), matrix(w), v), ["adds them"]),
        (lambda w, v: image_of(P(w, v.mean(2)), P(w, v.mean(1))), ["means"]),
        (lambda w, v: P(w, v.sum(2))[:, :, None] + 0 * v, ["only the first axis"]),
        (lambda w, v: P(w, v.sum(1))[:, None] + 0 * v, ["only the second axis"]),
        (lambda w, v: separable(w.flip(-1), v), ["past and future"]),
        (lambda w, v: P(w, v.sum(2)), ["shape"]),
        (fft_bias.toeplitz_product_2d_dense, ["values are right", "larger than v", "all pairs of pixels"]),
        (
            lambda w, v: fft_bias.toeplitz_product_2d_full(w[:, :, None] + w[:, None], v),
            ["values are right", "larger than v", "a padded image"],
        ),
    ],
)
def test_separable_mistakes(wrong, words):
    assert_rejects(check_separable, wrong, *words)


def offset_by_offset(g, v):
    """As the chapter checks it: a sum over i for each s."""
    n = v.shape[1]
    ends = [(max(0, s), n + min(0, s)) for s in range(1 - n, n)]
    sums = [(g[:, a:b] * v[:, n - b : n - a]).sum((0, 1, 3)) for a, b in ends]
    return torch.stack(sums, dim=-1)


def every_pair(g, v):
    n = v.shape[1]
    sums = [sum((g[:, i] * v[:, i - s]).sum((0, 2)) for i in range(n) if 0 <= i - s < n) for s in range(1 - n, n)]
    return torch.stack(sums, dim=-1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (by_autograd(fft_bias.toeplitz_product_dense), ["values are right", "not through the FFT", "an L x L matrix"]),
        (offset_by_offset, ["not through the FFT", "a loop over positions"]),
        (every_pair, ["not through the FFT", "a loop over positions"]),
        (lambda g, v: gradient(v, g), ["g and v are exchanged"]),
        (lambda g, v: gradient(g, v.flip(1)), ["conjugate"]),
        (lambda g, v: gradient(g, v).roll(1 - v.shape[1], -1), ["not in order"]),
        (
            lambda g, v: F.pad(gradient(g, v)[:, v.shape[1] - 1 :], (v.shape[1] - 1, 0)),
            ["negative offsets are missing"],
        ),
        (lambda g, v: gradient(g.sum(3, True), v.sum(3, True)), ["channels are summed before"]),
        (lambda g, v: gradient(g.sum(0, True), v.sum(0, True)), ["sequences are summed before"]),
        (lambda g, v: gradient(g, v) / v.shape[3], ["mean over the channels"]),
        (lambda g, v: gradient(g, v) / v.shape[0], ["mean over the batch"]),
        (lambda g, v: gradient(g, v)[:, v.shape[1] - 1 :], ["shape"]),
        (
            lambda g, v: torch.fft.irfft(
                (torch.fft.rfft(g, dim=1) * torch.fft.rfft(v, dim=1).conj()).sum((0, 3)).T, n=v.shape[1]
            )[:, torch.arange(1 - v.shape[1], v.shape[1])],
            ["circle of L points"],
        ),
    ],
)
def test_gradient_mistakes(wrong, words):
    assert_rejects(check_lag_gradient, wrong, *words)
