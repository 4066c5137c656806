"""Long convolutions: the slow form that says what is meant, and the FFT form that is fast.

Every mechanism with a fixed influence over time (an EMA, a state space, a positional bias) ends as a
convolution with a kernel as long as the sequence. Done literally that costs ``length**2``; in the frequency
domain it costs ``length * log(length)``.

Letters used throughout: B batch, L length, D channels ("dim"), K kernel length.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import in_pieces

__all__ = [
    "circular_convolution",
    "circular_convolution_plain",
    "good_length",
    "long_convolution",
    "long_convolution_direct",
    "working_dtype",
]

TILE = 512  # steps to turn at once on a CPU: a long sequence turned as a whole leaves the cache with every number
# Numbers to transform at once on a CPU. Up to WHOLE all of them, since each call makes plans first. Larger tensors are
# fetched from the system page by page and given back when freed (by glibc, from 32 MiB on): so pieces, each of which
# takes over the memory of the one before. At least so many channels, since these lie side by side.
WHOLE, PIECE, CHANNELS = 2**22, 2**21, 8


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision kernels and transforms run in: float64 if any input is float64, else float32.

    Half precision is not enough here: a decay of 0.999 is not even representable in bfloat16, and the FFT has
    no half-precision form on a CPU.
    """
    return torch.float64 if any(t.dtype in (torch.float64, torch.complex128) for t in tensors) else torch.float32


def good_length(n: int) -> int:
    """The smallest even number ``>= n`` with no prime factor above 5.

    An FFT splits its length into prime factors; a large prime factor is slow. Rounding 8195 up to 8640 makes the
    transform several times faster, and the extra zeros do no harm. Even, because the real-input FFT halves it.
    """
    if n < 1:
        raise ValueError(f"good_length wanted n >= 1; got {n}.")
    best = 1 << max(1, (n - 1).bit_length())  # the power of two above always qualifies
    five = 1
    while five < best:
        three = five
        while three < best:
            # the smallest power of two, at least 2, that lifts three above n
            candidate = three * max(2, 1 << (-(-n // three) - 1).bit_length())
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


def long_convolution(u: Tensor, kernel: Tensor, *, reverse_kernel: Tensor | None = None) -> Tensor:
    """Convolve each channel with its own kernel, through the FFT.

    Causal part: ``y[t] = sum over lags s >= 0 of kernel[s] * u[t - s]``. With ``reverse_kernel`` the future is
    added: ``y[t] += sum over s >= 0 of reverse_kernel[s] * u[t + s]``; both kernels hold lag 0, so the present
    counts twice, as in Mega's bidirectional EMA. What lies outside the sequence counts as zero (a *linear*
    convolution; an FFT alone would wrap the end around to the beginning).

    Args:
        u: ``(B, L, D)`` real input.
        kernel: ``(D, K)`` for lags 0 .. K-1. Any K >= 1: lags of L and beyond never meet the sequence.
        reverse_kernel: ``(D, K')`` for lags 0, -1, ..; ``None`` for a causal convolution.

    Returns:
        ``(B, L, D)`` in the dtype of ``u``. The work runs in float32 or better, also under autocast.

    Raises:
        ValueError: if the shapes do not fit.
    """
    _check(u, kernel, reverse_kernel)
    length = u.shape[1]
    dtype = working_dtype(u, kernel)
    kernel = kernel[:, :length]
    reach = kernel.shape[1]
    if reverse_kernel is not None:
        reverse_kernel = reverse_kernel[:, :length]
        reach += reverse_kernel.shape[1] - 1
    size = good_length(length + reach - 1)  # long enough that nothing wraps around

    with torch.autocast(u.device.type, enabled=False):
        kernel = kernel.to(dtype)
        if reverse_kernel is not None:
            # On a circle, lag -s is lag size - s: the future sits at the far end, lag 0 stays at 0.
            future = F.pad(reverse_kernel.to(dtype), (0, size - reverse_kernel.shape[1]))
            kernel = F.pad(kernel, (0, size - kernel.shape[1])) + future.flip(-1).roll(1, -1)  # (D, size)
        return circular_convolution(u.to(dtype), kernel, size).to(u.dtype)  # (B, L, D)


def circular_convolution(u: Tensor, kernel: Tensor, size: int) -> Tensor:
    """Convolve on a circle of ``size`` points, where lag -s is lag size - s, and keep the points below L.

    Args:
        u: ``(B, L, D)``, L <= size; beyond L there is silence.
        kernel: ``(G, K)``, K <= size, of the dtype of u: G kernels, each for D / G neighbouring channels; beyond K
            they are zero.
        size: even.

    Returns:
        ``(B, L, D)``; in memory, channels come first.
    """
    if torch.is_grad_enabled() and (u.requires_grad or kernel.requires_grad):
        return _Convolution.apply(u, kernel, size)
    return _convolved(u, kernel, size)


def circular_convolution_plain(u: Tensor, kernel: Tensor, size: int) -> Tensor:
    """The same as :func:`circular_convolution`, same arguments, all channels at once and with autograd's gradients."""
    waves = torch.fft.rfft(kernel, n=size).repeat_interleave(u.shape[2] // len(kernel), 0)
    return torch.fft.irfft(torch.fft.rfft(u.mT, n=size) * waves, n=size)[..., : u.shape[1]].mT


class _Convolution(torch.autograd.Function):
    """Autograd's result, with fewer transforms and passes.

    Autograd takes a real transform back by a complex one, at twice the price, and turns the channels slowly. Here the
    gradients are real transforms too: the convolution's adjoint is a correlation, which conjugates one spectrum.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, kernel: Tensor, size: int) -> Tensor:
        spectra: list[Tensor] = []
        y = _convolved(u, kernel, size, spectra)
        ctx.save_for_backward(u, kernel, *spectra)
        ctx.size = size
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        u, kernel, *spectra = ctx.saved_tensors
        size, (of_u, of_kernel, _) = ctx.size, ctx.needs_input_grad
        if torch.is_grad_enabled():  # somebody wants to differentiate this gradient
            wanted = [t for t, needed in ((u, of_u), (kernel, of_kernel)) if needed]
            y = circular_convolution_plain(u, kernel, size)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
            return next(found) if of_u else None, next(found) if of_kernel else None, None
        du, d_kernel, saved = None, torch.empty_like(kernel) if of_kernel else None, iter(spectra)
        for k, parts in _pieces(u, len(kernel), size):
            waves, together = next(saved), None
            for part in parts:
                heard, spectrum = _waves(grad[part], size), next(saved)
                if of_kernel:
                    if in_pieces(u):  # one sequence after the other: no tensor as large as all
                        product = spectrum[0] * heard[0]
                        for one, other in zip(spectrum[1:], heard[1:], strict=True):
                            product.addcmul_(one, other)
                    else:
                        product = (spectrum * heard).sum(0)
                    if len(product) > len(waves):  # one kernel for several channels
                        product = product.unflatten(0, (len(waves), -1)).sum(1)
                    together = product if together is None else together.add_(product)
                    del product
                if of_u:
                    du = _placed(du, u, part, _steps(_times(heard, waves), size, u.shape[1]))
            if d_kernel is not None and together is not None:
                d_kernel[k] = torch.fft.irfft(together, n=size)[:, : kernel.shape[1]]
        return du, d_kernel, None


def _convolved(u: Tensor, kernel: Tensor, size: int, keep: list[Tensor] | None = None) -> Tensor:
    """The convolution, a piece at a time. To ``keep`` it appends the spectra that the gradient wants, conjugate."""
    y = None
    for k, parts in _pieces(u, len(kernel), size):
        waves, kept = torch.fft.rfft(kernel[k], n=size), []
        for part in parts:
            spectrum = _waves(u[part], size)
            y = _placed(y, u, part, _steps(_times(spectrum, waves, in_place=keep is None), size, u.shape[1]))
            if keep is not None:
                kept.append(spectrum.conj_physical_())
        if keep is not None:
            keep += [waves.conj_physical_(), *kept]
    assert y is not None
    return y


Part = tuple[slice, slice, slice]  # sequences, all of time, channels


def _pieces(u: Tensor, kernels: int, size: int) -> list[tuple[slice, list[Part]]]:
    """What to transform at once: so many kernels, and of their sequences and channels one part after the other."""
    batch, _, dim = u.shape
    each = dim // kernels
    whole = not in_pieces(u) or batch * dim * size <= WHOLE
    most = dim if whole else min(dim, max(CHANNELS, PIECE // (batch * size)))
    rows = batch if whole else max(1, PIECE // (most * size))
    some = max(1, most // each)  # kernels
    pieces = []
    for k in range(0, kernels, some):
        last = min(k + some, kernels)
        parts = [
            (slice(b, b + rows), slice(None), slice(c, min(c + most, last * each)))
            for c in range(k * each, last * each, most)
            for b in range(0, batch, rows)
        ]
        pieces.append((slice(k, last), parts))
    return pieces


def _placed(y: Tensor | None, u: Tensor, part: Part, values: Tensor) -> Tensor:
    """The result y, like u, with a part of it put in its place; y is None at first."""
    if values.shape == u.shape:
        return values
    if y is None:
        y = u.new_empty(u.shape[0], u.shape[2], u.shape[1]).mT  # in memory, channels come first
    y[part] = values
    return y


def _waves(u: Tensor, size: int) -> Tensor:
    """The spectrum of every channel of ``u (B, L, D)``, padded with zeros to ``size``: ``(B, D, size/2 + 1)``."""
    batch, length, dim = u.shape
    rows = u.new_empty(batch, dim, size)  # an FFT is fastest along the last axis
    rows[..., length:] = 0
    tile = TILE if in_pieces(u) else length
    for t in range(0, length, tile):
        rows[..., t : min(t + tile, length)] = u[:, t : t + tile].mT
    return torch.fft.rfft(rows)


def _times(spectrum: Tensor, waves: Tensor, in_place: bool = True) -> Tensor:
    """``(B, D, n/2 + 1)`` times ``(G, n/2 + 1)``, each for D / G channels."""
    grouped, waves = spectrum.unflatten(1, (len(waves), -1)), waves.unsqueeze(1)
    return (grouped.mul_(waves) if in_place else grouped * waves).flatten(1, 2)


def _steps(spectrum: Tensor, size: int, length: int) -> Tensor:
    """Back from the waves, cut to ``length``: ``(B, L, D)``."""
    return torch.fft.irfft(spectrum, n=size)[..., :length].mT


def long_convolution_direct(u: Tensor, kernel: Tensor, *, reverse_kernel: Tensor | None = None) -> Tensor:
    """The same convolution as its definition says it: one shifted copy of the input per lag.

    Costs ``L * K`` per channel. The reference for :func:`long_convolution`; same arguments, same result.
    """
    _check(u, kernel, reverse_kernel)
    length = u.shape[1]
    y = torch.zeros_like(u, dtype=torch.promote_types(u.dtype, kernel.dtype))
    for lag in range(min(kernel.shape[1], length)):
        y[:, lag:] = y[:, lag:] + kernel[:, lag] * u[:, : length - lag]
    if reverse_kernel is not None:
        for lag in range(min(reverse_kernel.shape[1], length)):
            y[:, : length - lag] = y[:, : length - lag] + reverse_kernel[:, lag] * u[:, lag:]
    return y.to(u.dtype)


def _check(u: Tensor, kernel: Tensor, reverse_kernel: Tensor | None) -> None:
    if u.dim() != 3 or u.shape[1] == 0:
        raise ValueError(f"u must be (batch, length >= 1, dim); got {tuple(u.shape)}.")
    for name, k in (("kernel", kernel), ("reverse_kernel", reverse_kernel)):
        if k is not None and (k.dim() != 2 or k.shape[0] != u.shape[2] or k.shape[1] == 0):
            raise ValueError(
                f"{name} must be (dim, lags >= 1) with dim = {u.shape[2]} as in u; got {tuple(k.shape)}. "
                "A kernel laid out (lags, dim) wants .T first."
            )
