"""What learned filters and kernels answer to: frequencies in hertz, memories in steps. For notebook 11.

Letters: D filters, C channels, K taps (weights) of each, W its lags in a kernel.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.s4 import S4, S4D

__all__ = ["centre_and_width", "half_rate", "hertz", "kernels", "mel", "mel_bank", "memory"]


def mel(frequency: np.ndarray | float) -> np.ndarray:
    """Hertz to mel, `2595 log10(1 + f / 700)` (O'Shaughnessy, "Speech Communication", 1987): even steps of pitch."""
    return 2595 * np.log10(1 + np.asarray(frequency, dtype=float) / 700)


def hertz(pitch: np.ndarray | float) -> np.ndarray:
    """Mel to hertz, the inverse of `mel`."""
    return 700 * (10 ** (np.asarray(pitch, dtype=float) / 2595) - 1)


def mel_bank(filters: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres and widths `(filters,)` in hertz of the usual bank of triangular filters, from 0 to `rate / 2`.

    The corners are even steps in mel; each triangle reaches from its neighbours' centre to centre, and its equivalent
    rectangular width is half of that.
    """
    corners = hertz(np.linspace(0, mel(rate / 2), filters + 2))
    return corners[1:-1], (corners[2:] - corners[:-2]) / 2


def centre_and_width(bank: Tensor, rate: float, n: int = 1024) -> tuple[Tensor, Tensor]:
    """At which frequency each filter answers most, and how wide a band it answers to: `(D,)` each, in hertz.

    bank: `(D, K)` taps. rate: samples a second. n: length of the FFT; its grid is `rate / n` hertz.
    The width is the equivalent rectangular one: that of a filter which lets as much power of white noise through, but
    answers to all of its band as strongly as this one does at its centre.
    """
    power = torch.fft.rfft(bank, n=n).abs().square()  # (D, n // 2 + 1)
    step = rate / n
    return power.argmax(-1).to(power) * step, power.sum(-1) / power.amax(-1) * step


def half_rate(bank: Tensor) -> Tensor:
    """Filters for every second sample, `(..., K) -> (..., K / 2)`: each tap is the sum of two neighbours.

    On a signal x these answer exactly as `bank` does on x with each sample held twice, at half the stride.
    Raises ValueError for an odd K.
    """
    if bank.shape[-1] % 2:
        raise ValueError(f"wanted an even number of taps, to be summed in pairs; got {bank.shape[-1]}. Pad by a zero.")
    return bank.unflatten(-1, (-1, 2)).sum(-1)


def kernels(model: nn.Module, length: int) -> dict[str, Tensor]:
    """The long kernels of a model: name of the module -> `(E, length)`, without gradient.

    E is the width, or twice that, forwards and backwards. Of an EMA or a state space; a model without has none.
    """
    with torch.no_grad():
        return {
            name: module.kernel(length)
            for name, module in model.named_modules()
            if isinstance(module, DampedEMA | S4 | S4D)
        }


def memory(kernel: Tensor, share: float = 0.9) -> Tensor:
    """Within how many lags `share` of a kernel's weight, in absolute value, lies: `(E, W) -> (E,)`, 1 to W."""
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1; got {share}.")
    weight = kernel.abs().double().cumsum(-1)
    return 1 + (weight < share * weight[..., -1:]).sum(-1)
