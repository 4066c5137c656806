"""The panel of chapter 01: what one channel of an EMA, or of any long kernel, remembers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from longseq_tutorial.classroom.figures import fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, LogSlider, Panel, Slider
from longseq_tutorial.mechanisms.ema import ema_kernel
from longseq_tutorial.mechanisms.fft import long_convolution

__all__ = ["EMAMemory", "frequency_response", "half_life"]

SIGNALS = ("impulse", "step", "slow wave", "fast wave", "noisy step")
WIDEST = 2048  # lags: enough to see a half-life of several hundred steps run out
FREQUENCIES = 512


def half_life(alpha: Tensor, delta: Tensor) -> Tensor:
    """Steps after which an input's share of the state has halved: ``q**h = 1/2`` with ``q = 1 - alpha * delta``.

    ``log1p`` keeps it exact for slow decays, where ``1 - alpha * delta`` would round to 1 and the half-life to
    infinity. Any shape; for small ``alpha * delta`` it is close to ``0.69 / (alpha * delta)``.
    """
    return math.log(0.5) / torch.log1p(-alpha * delta)


def frequency_response(kernel: Tensor, count: int = FREQUENCIES) -> tuple[Tensor, Tensor]:
    """How much a convolution with ``kernel (..., K)`` amplifies each frequency.

    Returns:
        Frequencies from 0 to 0.5 cycles a step, ``(F,)`` with ``F > count``, and gains ``(..., F)``: the absolute
        value of the kernel's Fourier transform, zero padded so that the curve is smooth.
    """
    size = 2 * max(count, kernel.shape[-1])
    return torch.fft.rfftfreq(size, dtype=kernel.dtype), torch.fft.rfft(kernel, n=size).abs()


class EMAMemory(Panel):
    """One channel's kernel, its frequency response, and what it makes of a signal.

    Args:
        source: where the kernel comes from.

            - ``None``: one EMA dimension, whose alpha, delta, beta and eta are sliders;
            - a :class:`~longseq_tutorial.mechanisms.ema.DampedEMA`, trained or not (any module with
              ``coefficients()`` that returns alpha, delta, beta, eta of shape ``(E, n)``): choose the channel, and
              stretch its half-lives;
            - any other module with ``kernel(length) -> (E, K)``;
            - a kernel ``(K,)`` or ``(E, K)``, real.
        start: values that replace the controls' own starting values.

    Raises:
        TypeError: another kind of source.
        ValueError: a kernel of another shape, complex, empty, or not finite.
    """

    title = "What one EMA channel remembers"

    def __init__(self, source: nn.Module | Tensor | None = None, **start: Any) -> None:
        self._kernel_of, own, longest = _read(source)
        self.controls: Mapping[str, Control] = {
            **own,
            "length": IntSlider("length (steps)", min(8, longest), longest, min(64, longest)),
            "signal": Choice("signal", SIGNALS, "noisy step"),
            "scale": Choice("scale of kernel and gain", ("linear", "log")),
        }
        super().__init__(**start)

    def figure(self, length: int, signal: str, scale: str, **own: Any) -> Figure:
        """Three views of one kernel, side by side."""
        kernel = self._kernel_of(length, **own)
        x, y = self._respond(kernel, signal, length, own)
        fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.1))
        _draw_kernel(left, kernel, scale)
        frequencies, gain = frequency_response(kernel)
        _draw_gain(middle, frequencies, gain, scale)
        right.plot(x, marker="", color="#999999", label="signal")
        right.plot(y, marker="", label="response")
        right.set(title=f"response to: {signal}", xlabel="time (steps)", ylabel="value")
        right.legend(fontsize="small")
        return fig

    def describe(self, length: int, signal: str, scale: str, **own: Any) -> str:
        """The same in words."""
        kernel = self._kernel_of(length, **own)
        frequencies, gains = frequency_response(kernel)
        gain = gains.tolist()
        peak = int((gains >= (1 - 1e-6) * gains.max()).nonzero()[0])  # the first, where the response is flat
        where = (
            f": {fmt(gain[peak])} at a period of {fmt(1 / float(frequencies[peak]))} steps"
            if peak
            else " at frequency 0"
        )
        faded = bool(kernel[-1].abs() < 1e-6 * kernel.abs().max())
        last = "has faded to less than a millionth" if faded else f"is at {fmt(float(kernel[-1]))}"
        end = float(self._respond(kernel, signal, length, own)[1][-1])
        size = kernel.abs()
        words = [
            self._about(own),
            f"The kernel starts at {fmt(float(kernel[0]))} and at its last lag, {len(kernel) - 1}, {last};",
            f"its weights add up to {fmt(float(kernel.sum()))}.",
        ]
        if size.sum() > 0:
            within = int((size.cumsum(0) < size.sum() / 2).sum()) + 1
            words.append(f"Half of its absolute weight lies in the first {_count(within, 'lag')}.")
        words += [
            f"The gain is {fmt(gain[0])} at frequency 0, {fmt(gain[-1])} for the fastest wave (period 2),",
            f"and largest{where}.",
            f"The response to the {signal} ends at {fmt(end)}.",
        ]
        return " ".join(words)

    def _respond(self, kernel: Tensor, signal: str, length: int, own: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The signal and what the kernel makes of it; a row that looks ahead hears it from its end."""
        x = _signal(signal, length)
        turn = (0,) if self._looks_ahead(own) else ()
        y = long_convolution(x.flip(turn)[None, :, None], kernel[None])[0, :, 0]
        return x, y.flip(turn)

    def _looks_ahead(self, own: Mapping[str, Any]) -> bool:
        return isinstance(self._kernel_of, _Averages) and own["channel"] >= self._kernel_of.forward_rows

    def _about(self, own: Mapping[str, Any]) -> str:
        if "alpha" in own:
            alpha, delta = own["alpha"], own["delta"]
            life = float(half_life(torch.tensor(alpha), torch.tensor(delta)))
            return (
                f"With alpha = {fmt(alpha)} and delta = {fmt(delta)} each step keeps q = {fmt(1 - alpha * delta, 3)} "
                f"of the state: a half-life of {fmt(life)} steps."
            )
        if isinstance(self._kernel_of, _Averages):
            lives = self._kernel_of.half_lives(own["channel"], own["stretch"])
            return (
                f"Row {own['channel']} {'looks ahead and ' if self._looks_ahead(own) else ''}"
                f"sums {_count(len(lives), 'average')}, "
                f"of half-life {fmt(float(lives.min()))} to {fmt(float(lives.max()))} steps."
            )
        return f"Row {own['channel']}."


# ---- where kernels come from: each gives (length, **own controls) -> (K,) float64, K <= length -----------------------

KernelOf = Callable[..., Tensor]


def _read(source: Any) -> tuple[KernelOf, dict[str, Control], int]:
    """The kernel function of a source, the controls it adds, and the longest length it can draw."""
    if source is None:
        return _one_average, dict(_ONE_AVERAGE), WIDEST
    if isinstance(source, Tensor):
        rows = _checked(source)
        return _Rows(lambda length: rows[:, :length]), _channel(len(rows)), rows.shape[1]
    if callable(getattr(source, "coefficients", None)):
        averages = _Averages(source)
        stretch = LogSlider("half-lives, times", 0.1, 100.0, 1.0)
        return averages, {**_channel(averages.rows), "stretch": stretch}, WIDEST
    if callable(getattr(source, "kernel", None)):
        return _Rows(source.kernel), _channel(len(_checked(source.kernel(8)))), WIDEST
    raise TypeError(
        "EMAMemory wants a DampedEMA, another module with kernel(length), a kernel tensor (E, K), or nothing; "
        f"got {type(source).__name__}. Pass the EMA inside your model, e.g. layer.ema."
    )


_ONE_AVERAGE: dict[str, Control] = {
    "alpha": Slider("alpha, weight of the new input", 0.01, 1.0, 0.3, 0.01),
    "delta": Slider("delta, damping of the past", 0.01, 1.0, 0.5, 0.01),
    "beta": Slider("beta, on the way in", -2.0, 2.0, 1.0, 0.1),
    "eta": Slider("eta, on the way out", -2.0, 2.0, 1.0, 0.1),
}


def _one_average(length: int, alpha: float, delta: float, beta: float, eta: float) -> Tensor:
    a, d, b, e = (torch.tensor([[c]], dtype=torch.float64) for c in (alpha, delta, beta, eta))
    return ema_kernel(a, d, b, e, length)[0]


class _Averages:
    """Kernels of a module with coefficients, read afresh at each call: a module that trains on shows it."""

    def __init__(self, module: Any) -> None:
        self.module = module
        shapes = [tuple(getattr(c, "shape", ())) for c in module.coefficients()]
        if len(shapes) != 4 or len(set(shapes)) != 1 or len(shapes[0]) != 2:
            raise ValueError(
                f"coefficients() must give alpha, delta, beta, eta, all of one shape (E, n); got {shapes}."
            )
        self.rows: int = shapes[0][0]
        self.forward_rows = module.dim if getattr(module, "bidirectional", False) else self.rows

    def half_lives(self, channel: int, stretch: float) -> Tensor:
        alpha, delta, _, _ = self._row(channel)
        return half_life(alpha, delta)[0] * stretch

    def __call__(self, length: int, channel: int, stretch: float) -> Tensor:
        alpha, delta, beta, eta = self._row(channel)
        slower = -torch.expm1(torch.log1p(-(alpha * delta).clamp(max=1 - 1e-16)) / stretch)  # 1 - q**(1/stretch)
        truncation = getattr(self.module, "truncation", None)
        return ema_kernel(alpha, slower / alpha, beta, eta, min(length, truncation or length))[0]

    def _row(self, channel: int) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return tuple(c[channel : channel + 1].detach().double().cpu() for c in self.module.coefficients())


class _Rows:
    """Kernels given as rows: a tensor, or what a module's kernel(length) returns."""

    def __init__(self, kernels: Callable[[int], Tensor]) -> None:
        self.kernels = kernels

    def __call__(self, length: int, channel: int) -> Tensor:
        with torch.no_grad():
            return _checked(self.kernels(length))[channel, :length]


def _checked(kernel: Tensor) -> Tensor:
    """A kernel as (E, K) in float64, or an error that says what was wanted."""
    if not isinstance(kernel, Tensor) or kernel.dim() not in (1, 2) or kernel.numel() == 0 or kernel.is_complex():
        got = f"{tuple(kernel.shape)} {kernel.dtype}" if isinstance(kernel, Tensor) else type(kernel).__name__
        raise ValueError(f"a kernel must be real and (K,) or (E, K), not empty; got {got}. Pick one: kernel[0].")
    rows = kernel.detach().double().cpu().reshape(-1, kernel.shape[-1])
    if not rows.isfinite().all():
        raise ValueError("a kernel must be finite; got NaN or infinity. See 'Traps' in chapter 01 for usual causes.")
    return rows


def _channel(rows: int) -> dict[str, Control]:
    return {"channel": IntSlider("channel (row of the kernel)", 0, rows - 1, 0)}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _draw_kernel(ax: Axes, kernel: Tensor, scale: str) -> None:
    if scale == "log" and kernel.abs().max() > 0:
        ax.plot(kernel.abs(), marker="")
        ax.set(yscale="log", ylabel="weight, absolute")
        ax.set_ylim(bottom=max(float(kernel.abs().max()) * 1e-8, 1e-300))
    else:
        ax.plot(kernel, marker="")
        ax.axhline(0, color="#999999", linewidth=0.8)
        ax.set(ylabel="weight")
    ax.set(title="kernel", xlabel="lag (steps)")


def _draw_gain(ax: Axes, frequencies: Tensor, gain: Tensor, scale: str) -> None:
    if scale == "log" and gain.max() > 0:
        ax.plot(frequencies[1:], gain[1:], marker="")
        ax.set(xscale="log", yscale="log")
        ax.set_ylim(bottom=max(float(gain.min()), float(gain.max()) * 1e-6) / 2)
    else:
        ax.plot(frequencies, gain, marker="")
        ax.set_ylim(bottom=0)
    ax.set(title="frequency response", xlabel="frequency (cycles per step)", ylabel="gain")


def _signal(name: str, length: int) -> Tensor:
    t = torch.arange(length, dtype=torch.float64)
    step = (t >= length // 4).double()
    if name == "impulse":
        return (t == length // 4).double()
    if name == "step":
        return step
    if name == "noisy step":
        noise = torch.randn(WIDEST, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return step + 0.4 * noise.repeat(-(-length // WIDEST))[:length]
    return torch.sin(2 * math.pi * t / (length / 2 if name == "slow wave" else 4))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"
