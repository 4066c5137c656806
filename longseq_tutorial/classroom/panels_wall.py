"""The quadratic wall, counted: work and memory of one layer at any length, and seconds where somebody measured.

The counts are of the forward pass and of its leading terms: a multiplication and an addition are two operations
(FLOP), the softmax and other terms that grow no faster than the named ones are left out. Width is the same for
queries, keys and values; a convolution or recurrence of the same size has ``heads * width`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from longseq_tutorial.classroom.figures import fmt
from longseq_tutorial.classroom.measure import growth_exponent
from longseq_tutorial.classroom.panels import Choice, IntSlider, LogSlider, Panel
from longseq_tutorial.mechanisms.fft import good_length

__all__ = ["MECHANISMS", "Layer", "Wall", "in_bytes", "in_flops", "in_seconds", "memory", "work"]

SHORTEST, LONGEST = 256, 1 << 20
# Some costs are equal; a thin line on a wide one shows both.
_LINE_WIDTHS = {"explicit attention": 6, "fused attention": 3.5, "chunk attention": 5, "FFT convolution": 2.5}


@dataclass(frozen=True)
class Layer:
    """The size of one layer.

    Attributes:
        length: L, positions of the sequence.
        batch: B, sequences at a time.
        heads: H; a convolution or recurrence has ``heads * width`` channels.
        width: numbers of one head's query, key or value (z = v).
        bytes_per_number: 4 for float32, 2 for half precision.
        span: keys that a query sees in chunk or window attention (c).
        n: EMA dimensions of a channel, for the recurrence.
    """

    length: int
    batch: int = 1
    heads: int = 1
    width: int = 64
    bytes_per_number: int = 4
    span: int = 128
    n: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"Layer wants {name} >= 1; got {value}.")

    @property
    def rows(self) -> int:
        """Rows of the score matrix in all: one for each query of each head of each sequence."""
        return self.batch * self.heads * self.length


def _full_work(layer: Layer) -> float:
    return 4 * layer.rows * layer.length * layer.width  # q k^T: 2 L L z; weights v: 2 L L v


def _chunk_work(layer: Layer) -> float:
    return 4 * layer.rows * min(layer.span, layer.length) * layer.width


def _fft_work(layer: Layer) -> float:
    # A real transform of N numbers takes about 2.5 N log2 N. One for the input and one back for each sequence, one
    # for the kernel; between them N/2 products of complex numbers, 6 operations each.
    size = good_length(2 * layer.length - 1)
    transform = 2.5 * size * math.log2(size)
    return layer.heads * layer.width * (transform + layer.batch * (2 * transform + 3 * size))


def _recurrent_work(layer: Layer) -> float:
    return 5 * layer.rows * layer.width * layer.n  # a step of one state: decay h + push x is 3, its share in y is 2


def _scores(layer: Layer) -> int:
    return layer.rows * layer.length * layer.bytes_per_number


def _chunk_scores(layer: Layer) -> int:
    return layer.rows * min(layer.span, layer.length) * layer.bytes_per_number


def _result(layer: Layer) -> int:
    return layer.rows * layer.width * layer.bytes_per_number


def _spectrum(layer: Layer) -> int:
    size = good_length(2 * layer.length - 1)
    return layer.batch * layer.heads * layer.width * (size // 2 + 1) * 2 * layer.bytes_per_number


# name -> (operations of one forward pass, bytes of the largest tensor it makes)
_COUNTS: dict[str, tuple[Callable[[Layer], float], Callable[[Layer], int]]] = {
    "explicit attention": (_full_work, _scores),
    "fused attention": (_full_work, _result),
    "chunk attention": (_chunk_work, _chunk_scores),
    "FFT convolution": (_fft_work, _spectrum),
    "recurrence": (_recurrent_work, _result),
}
MECHANISMS = tuple(_COUNTS)


def work(mechanism: str, layer: Layer) -> float:
    """Return the operations (FLOP) of one forward pass of this layer.

    Args:
        mechanism: one of `MECHANISMS`. Chunk attention stands for window attention of the same span as well.
        layer: its size.

    Raises:
        ValueError: a mechanism whose work is not known here.
    """
    return _counts(mechanism)[0](layer)


def memory(mechanism: str, layer: Layer) -> int:
    """Return the bytes of the largest tensor of one forward pass: scores, spectrum, or merely the result.

    Args and errors as in :func:`work`. An implementation may hold several of these at once.
    """
    return _counts(mechanism)[1](layer)


def _counts(mechanism: str) -> tuple[Callable[[Layer], float], Callable[[Layer], int]]:
    if mechanism not in _COUNTS:
        raise ValueError(f"mechanism wants one of {', '.join(MECHANISMS)}; got {mechanism!r}.")
    return _COUNTS[mechanism]


# -------------------------------------------------------------------- numbers with a unit


def in_bytes(count: float) -> str:
    """Return bytes as one says them: `in_bytes(2**30)` is "1.00 GiB"."""
    return _scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"))


def in_flops(count: float) -> str:
    """Return operations as one says them: `in_flops(6.9e10)` is "69.0 GFLOP"."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP"))


def in_seconds(seconds: float) -> str:
    """Return a duration as one says it: `in_seconds(0.0021)` is "2.1 ms"."""
    if seconds >= 7200:
        return f"{fmt(seconds / 3600)} h"
    if seconds >= 120:
        return f"{fmt(seconds / 60)} min"
    if seconds >= 1:
        return f"{fmt(seconds)} s"
    return f"{fmt(seconds * 1e3)} ms" if seconds >= 1e-3 else f"{fmt(seconds * 1e6)} µs"


def _scaled(count: float, base: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if count < base:
            return f"{fmt(count, 3)} {unit}"
        count /= base
    return f"{fmt(count, 3)} {units[-1]}"


# -------------------------------------------------------------------- the panel


class Wall(Panel):
    """What one layer costs at the length you choose: operations, memory, and seconds on the machine you measured.

    Args:
        measured: name -> {length: seconds}; instead of seconds also anything with an attribute ``seconds``, such as
            a `Cost`. Measured with batch 1, one head (``width`` channels), float32 and chunks of 128. The names of
            `MECHANISMS` are scaled by their operations from the longest length measured; any other name, of your
            own mechanism, by the exponent fitted to at least three lengths. Without it the panel counts only.
        width: numbers of one head's query, key or value.
        start: starting values of the controls.

    Raises:
        ValueError: a measurement that is empty, not positive, or too short to fit.
    """

    title = "The wall"

    def __init__(
        self, measured: Mapping[str, Mapping[int, Any]] | None = None, *, width: int = 64, **start: Any
    ) -> None:
        self.width = width
        self.measured = {name: _as_seconds(name, costs) for name, costs in (measured or {}).items()}
        self.controls = {
            "length": LogSlider("length L (positions)", SHORTEST, LONGEST, 16384),
            "batch": IntSlider("batch B (sequences)", 1, 64, 1),
            "heads": IntSlider("heads H", 1, 16, 1),
            "bytes_per_number": Choice("bytes per number", (2, 4, 8), 4),
            "span": LogSlider("chunk or window c (keys a query sees)", 16, 8192, 128),
            "budget": LogSlider("memory of the device (GiB)", 0.5, 512, 16),
            "show": Choice("show", ("work", "memory", "seconds") if self.measured else ("work", "memory")),
        }
        super().__init__(**start)

    def seconds(self, name: str, layer: Layer) -> float:
        """Return how long a forward pass of this layer takes on the machine measured: scaled, not measured.

        Raises:
            ValueError: a name that was not measured.
        """
        if name not in self.measured:
            raise ValueError(f"wanted a measured name, one of {', '.join(self.measured) or '(none)'}; got {name!r}.")
        costs = self.measured[name]
        longest = max(costs)
        if name in MECHANISMS:
            # The default span was measured; another span changes the work, and so the seconds, in proportion.
            return costs[longest] * work(name, layer) / work(name, Layer(longest, width=self.width))
        exponent = growth_exponent(list(costs), list(costs.values())).exponent
        return costs[longest] * (layer.length / longest) ** exponent * layer.batch * layer.heads

    def figure(self, **state: Any) -> Figure:
        """Draw the chosen cost of every mechanism against the length, and mark the chosen length."""
        here, show = self._layer(state), state["show"]
        lengths = np.unique(np.geomspace(SHORTEST, LONGEST, 40).round().astype(int)).tolist()
        fig, ax = plt.subplots(figsize=(8.2, 4.2))
        for name in self._names(show):
            values = [self._value(show, name, replace(here, length=each)) for each in lengths]
            (line,) = ax.plot(lengths, values, label=name, markevery=6, linewidth=_LINE_WIDTHS.get(name, 1.5))
            ax.plot(here.length, self._value(show, name, here), color=line.get_color(), marker=line.get_marker(), ms=10)
        ax.axvline(here.length, color="0.4", linestyle=":", marker="")
        if show == "memory":
            label = f"device: {fmt(state['budget'])} GiB"
            ax.axhline(state["budget"] * 2**30, color="0.2", linestyle="--", marker="", label=label)
        unit = {"work": "operations (FLOP)", "memory": "largest tensor (bytes)", "seconds": "seconds (scaled)"}[show]
        ax.set(xscale="log", yscale="log", xlabel="length L (positions)", ylabel=unit)
        ticks = [2**k for k in range(8, 21, 2)]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize="small")
        ax.minorticks_off()
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        return fig

    def describe(self, **state: Any) -> str:
        """Say the chosen cost of every mechanism, how it grows, and what fits."""
        here, show = self._layer(state), state["show"]
        say = {"work": in_flops, "memory": in_bytes, "seconds": in_seconds}[show]
        verb = {"work": "does", "memory": "has as its largest tensor", "seconds": "would take"}[show]
        values = {name: self._value(show, name, here) for name in self._names(show)}
        words = (
            f"One layer at L = {here.length:,} (batch {here.batch}, {here.heads} head{'s' * (here.heads > 1)} "
            f"of width {here.width}, {here.bytes_per_number} bytes a number, c = {here.span:,}) {verb}: "
        )
        words += "; ".join(f"{name} {say(value)}" for name, value in values.items()) + ". "
        if show == "memory":
            return words + self._what_fits(here, state["budget"])
        double = replace(here, length=2 * here.length)
        words += "Twice the length costs "
        words += "; ".join(
            f"{name} {fmt(self._value(show, name, double) / value, 3)}x" for name, value in values.items()
        )
        return f"{words}. Seconds are scaled from what was measured, in float32." if show == "seconds" else f"{words}."

    def _what_fits(self, here: Layer, budget: float) -> str:
        room = int(budget * 2**30)
        longest = math.isqrt(room // (here.batch * here.heads * here.bytes_per_number))
        verdict = "fits" if _scores(here) <= room else "does not fit"
        return (
            f"The score matrix {verdict} into {fmt(budget)} GiB; there it fits up to L = {longest:,}. "
            f"It is {fmt(_scores(here) / _result(here), 3)} times as large as the result of the layer."
        )

    def _layer(self, state: Mapping[str, Any]) -> Layer:
        length, span = round(state["length"]), round(state["span"])
        return Layer(length, state["batch"], state["heads"], self.width, state["bytes_per_number"], span)

    def _names(self, show: str) -> tuple[str, ...]:
        return tuple(self.measured) if show == "seconds" else MECHANISMS

    def _value(self, show: str, name: str, layer: Layer) -> float:
        if show == "seconds":
            return self.seconds(name, layer)
        return work(name, layer) if show == "work" else memory(name, layer)


def _as_seconds(name: str, costs: Mapping[int, Any]) -> dict[int, float]:
    """Return {length: seconds} of one measurement, or say what is wrong with it."""
    seconds = {int(length): float(getattr(cost, "seconds", cost)) for length, cost in costs.items()}
    few = len(seconds) < (1 if name in MECHANISMS else 3)
    if few or min(seconds) < 1 or not all(math.isfinite(each) and each > 0 for each in seconds.values()):
        raise ValueError(
            f"measured[{name!r}] wants {{length: seconds}}, all positive, and at least three lengths unless the name "
            f"is one of {', '.join(MECHANISMS)}; got {seconds}."
        )
    return seconds
