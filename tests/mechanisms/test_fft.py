import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_tutorial.mechanisms import fft
from longseq_tutorial.mechanisms.fft import (
    circular_convolution,
    circular_convolution_plain,
    good_length,
    long_convolution,
    long_convolution_direct,
)

LENGTHS = [1, 2, 3, 7, 16, 31, 64, 97, 300]  # the last is turned in more than one tile


def smooth(n: int) -> bool:
    for p in (2, 3, 5):
        while n % p == 0:
            n //= p
    return n == 1


@settings(deadline=None)
@given(st.integers(1, 20_000))
def test_good_length_is_the_smallest_even_5_smooth_number(n):
    best = good_length(n)
    assert best >= n and best % 2 == 0 and smooth(best)
    assert not any(smooth(m) for m in range(n + n % 2, best, 2))


def test_good_length_refuses_nothing():
    with pytest.raises(ValueError, match="n >= 1"):
        good_length(0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("lags", [1, 5, 97, 130])
@pytest.mark.parametrize("two_sided", [False, True])
def test_fft_equals_definition_with_gradients(length, lags, two_sided):
    generator = torch.Generator().manual_seed(length * 1000 + lags)
    u = torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
    kernels = torch.randn(2, 3, lags, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, length, 3, dtype=torch.float64, generator=generator)
    results = []
    for form in (long_convolution, long_convolution_direct):
        inputs = [t.clone().requires_grad_() for t in (u, *kernels)]
        y = form(inputs[0], inputs[1], reverse_kernel=inputs[2] if two_sided else None)
        grads = torch.autograd.grad((y * weight).sum(), inputs[: 3 if two_sided else 2])
        results.append([y, *grads])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-11)


def test_gradients_can_be_differentiated():
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    k, r = (torch.randn(3, n, dtype=torch.float64, generator=generator, requires_grad=True) for n in (4, 6))
    assert torch.autograd.gradgradcheck(lambda u, k, r: long_convolution(u, k, reverse_kernel=r), (u, k, r))
    assert torch.autograd.gradgradcheck(lambda u: long_convolution(u, k.detach()), (u,))
    assert torch.autograd.gradgradcheck(lambda k: long_convolution(u.detach(), k), (k,))


@pytest.mark.parametrize("kernels", [1, 3, 12])
@pytest.mark.parametrize(("piece", "channels"), [(1, 1), (1, 3), (200, 2), (300, 5), (1000, 1), (10**6, 8)])
def test_pieces_change_nothing(monkeypatch, kernels, piece, channels):
    """Kernels, channels and sequences, some at a time: values, gradients, and gradients of these."""
    monkeypatch.setattr(fft, "WHOLE", 0)
    monkeypatch.setattr(fft, "PIECE", piece)
    monkeypatch.setattr(fft, "CHANNELS", channels)
    u = torch.randn(5, 9, 12, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(kernels, 13, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 9, 12, dtype=torch.float64, requires_grad=True)
    results = []
    for form in (circular_convolution, circular_convolution_plain):
        with torch.no_grad():
            alone = form(u, kernel, 24)
        y = form(u, kernel, 24)
        grads = torch.autograd.grad((y * weight).sum(), (u, kernel), retain_graph=True)
        assert not any(g.requires_grad for g in grads)
        (of_u,) = torch.autograd.grad((form(u, kernel.detach(), 24) * weight).sum(), u)
        (of_kernel,) = torch.autograd.grad((form(u.detach(), kernel, 24) * weight).sum(), kernel)
        first = torch.autograd.grad((y * weight).sum(), (u, kernel), create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), (u, kernel, weight))
        results.append([alone, y, *grads, of_u, of_kernel, *first, *second])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_a_long_sequence_makes_no_tensor_of_all_channels(monkeypatch):
    """On a CPU, nothing that is made on the way is larger than a piece."""
    largest = []

    def watched(u, size):
        largest.append(u.shape[0] * u.shape[2] * size)
        return waves(u, size)

    waves = fft._waves
    monkeypatch.setattr(fft, "_waves", watched)
    u, kernel = torch.randn(1, 2**16, 64), torch.randn(64, 2**16)
    long_convolution(u, kernel)
    assert max(largest) <= fft.PIECE and len(largest) == 4
    largest.clear()
    long_convolution(u[:, : 2**14], kernel)
    assert len(largest) == 1


def test_nothing_wraps_around():
    """A circular convolution would bring the end of the sequence back to its beginning."""
    u = torch.zeros(1, 10, 1, dtype=torch.float64)
    u[0, -1] = 1
    y = long_convolution(u, torch.ones(1, 10, dtype=torch.float64))
    assert y[0, :-1].abs().max() < 1e-12


def test_linear_in_the_input():
    u, v = torch.randn(2, 1, 33, 4, dtype=torch.float64)
    k = torch.randn(4, 33, dtype=torch.float64)
    torch.testing.assert_close(long_convolution(2 * u - v, k), 2 * long_convolution(u, k) - long_convolution(v, k))


def test_precision_under_autocast_and_in_bfloat16():
    u, k = torch.randn(1, 200, 2), torch.randn(2, 200) / 20
    want = long_convolution_direct(u.double(), k.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = long_convolution(u, k)
    assert inside.dtype == torch.float32
    assert (inside - want).abs().max() < 1e-5
    half = long_convolution(u.bfloat16(), k)
    assert half.dtype == torch.bfloat16
    assert (half - long_convolution_direct(u.bfloat16().double(), k.double())).abs().max() < 0.02


@pytest.mark.parametrize(
    ("u", "kernel", "reverse", "words"),
    [
        (torch.ones(5, 3), torch.ones(3, 5), None, "u must be"),
        (torch.ones(1, 0, 3), torch.ones(3, 5), None, "length >= 1"),
        (torch.ones(1, 5, 3), torch.ones(5, 3), None, r"\.T first"),
        (torch.ones(1, 5, 3), torch.ones(3, 5), torch.ones(2, 5), "reverse_kernel must be"),
    ],
)
def test_wrong_shapes_say_how_to_mend(u, kernel, reverse, words):
    for form in (long_convolution, long_convolution_direct):
        with pytest.raises(ValueError, match=words):
            form(u, kernel, reverse_kernel=reverse)
