"""Long convolutions: the slow form that says what is meant, and the FFT form that is fast.

Every mechanism with a fixed influence over time (an EMA, a state space, a positional bias) ends as a
convolution with a kernel as long as the sequence. Done literally that costs ``length**2``; in the frequency
domain it costs ``length * log(length)``.

Letters used throughout: B batch, L length, D channels ("dim"), K kernel length.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["good_length", "long_convolution", "long_convolution_direct", "working_dtype"]


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
        circle = F.pad(kernel.to(dtype), (0, size - kernel.shape[1]))  # (D, size)
        if reverse_kernel is not None:
            # On a circle, lag -s is lag size - s: the future sits at the far end, lag 0 stays at 0.
            future = F.pad(reverse_kernel.to(dtype), (0, size - reverse_kernel.shape[1]))
            circle = circle + future.flip(-1).roll(1, -1)
        spectrum = torch.fft.rfft(circle)  # (D, size/2 + 1)
        rows = u.to(dtype).transpose(1, 2)  # (B, D, L): the FFT is fastest along the last axis
        y = torch.fft.irfft(torch.fft.rfft(rows, n=size) * spectrum, n=size)[..., :length]
        return y.transpose(1, 2).to(u.dtype)  # (B, L, D)


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
