"""The panel of chapter 08: a weight for every distance, its Toeplitz matrix, its spectrum, and what it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, Panel, Slider, Toggle
from longseq_tutorial.mechanisms.fft_bias import (
    toeplitz_matrix,
    toeplitz_product,
    toeplitz_product_2d,
    toeplitz_product_2d_full,
)

__all__ = ["BiasOverDistance", "drawing", "drawn_lags", "gain_of", "show_matrix"]

PRESETS = ("nothing", "shift", "smooth", "difference", "decay", "random")
SEQUENCES = ("step", "impulse", "noise", "two waves")
SUM, PRODUCT = "image, w[dx] + w[dy]", "image, w[dx] * w[dy]"
YOURS = "yours"
POINTS = (-12, -4, 0, 4, 12)  # offsets with a slider; straight lines between them, 0 from 20 on
REACH = 20
LONGEST = 512
SIDE = 28  # pixels
FREQUENCIES = 512


def drawing(side: int = SIDE) -> Tensor:
    """A hand-drawn "5" on ``(side, side)`` pixels, float64 in [0, 1]: 1 on the stroke, 0 away from it."""
    pen = [
        (0.22, 0.74),
        (0.22, 0.32),
        (0.46, 0.30),
        (0.42, 0.55),
        (0.52, 0.70),
        (0.66, 0.68),
        (0.78, 0.52),
        (0.74, 0.28),
    ]
    stroke = torch.tensor(pen, dtype=torch.float64)  # (row, column), in fractions of the side
    center = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    pixel = torch.stack(torch.meshgrid(center, center, indexing="ij"), dim=-1)[:, :, None]  # (side, side, 1, 2)
    start, along = stroke[:-1], stroke[1:] - stroke[:-1]
    share = (((pixel - start) * along).sum(-1) / along.square().sum(-1)).clamp(0, 1)  # nearest point of each line
    distance = (pixel - start - share.unsqueeze(-1) * along).norm(dim=-1).amin(-1)
    return (1.6 - distance / 0.035).clamp(0, 1)


def drawn_lags(preset: str, heights: Mapping[int, float], length: int) -> Tensor:
    """Weights for offsets ``-(L-1) .. L-1``: a preset, plus straight lines through ``{offset: height}``, float64.

    Presets: "nothing"; "shift" by 8 steps; "smooth", a bell of total weight 1; "difference" from the step before;
    "decay" in both directions; "random".
    """
    offset = torch.arange(1 - length, length)
    if preset == "shift":
        lags = (offset == 8).double()
    elif preset == "smooth":
        bell = torch.exp(-0.5 * (offset.double() / 3) ** 2)
        lags = bell / bell.sum()
    elif preset == "difference":
        lags = (offset == 0).double() - (offset == 1).double()
    elif preset == "decay":
        lags = 0.15 * 0.85 ** offset.abs().double()
    elif preset == "random":
        noise = torch.randn(2 * LONGEST - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        lags = 0.2 * noise[offset + LONGEST - 1]
    elif preset == "nothing":
        lags = torch.zeros(2 * length - 1, dtype=torch.float64)
    else:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}.")
    places = sorted({-REACH: 0.0, REACH: 0.0, **heights}.items())
    lines = np.interp(offset.numpy(), [p for p, _ in places], [h for _, h in places], left=0.0, right=0.0)
    return lags + torch.from_numpy(lines)


def gain_of(lags: Tensor, count: int = FREQUENCIES) -> tuple[Tensor, Tensor]:
    """How much the weights ``(..., 2L-1)`` amplify each wave, far from the sequence's ends.

    Returns:
        Frequencies from 0 to 0.5 cycles a step, ``(F,)`` with ``F > count``, and gains ``(..., F)``. Where the lags
        begin changes only the phase, so they are transformed as they are.
    """
    size = 2 * max(count, lags.shape[-1])
    return torch.fft.rfftfreq(size, dtype=lags.dtype), torch.fft.rfft(lags, n=size).abs()


def show_matrix(ax: Axes, matrix: Tensor, **options: Any) -> Any:
    """Draw a matrix of weights with 0 in the middle of the colours; returns the image, for a colour bar."""
    limit = float(matrix.abs().max()) or 1.0
    image = ax.imshow(matrix.numpy(), vmin=-limit, vmax=limit, **options)
    ax.grid(False)
    return image


class BiasOverDistance(Panel):
    """Weights over offsets, the matrix that they stand for, their spectrum, and their effect.

    Args:
        source: where the weights come from.

            - ``None``: a preset;
            - a :class:`~longseq_tutorial.mechanisms.fft_bias.FastRPB` for sequences or separable images, trained or
              not, or any other module with ``lags(length) -> (H, 2L-1)``: choose the head;
            - lags ``(2N-1,)`` or ``(H, 2N-1)``, real.

            In all three cases five sliders add straight lines of your own.
        x: what the weights are applied to, beside the signals that the panel knows: a sequence ``(L,)`` or an image
            ``(S, S)`` of at most 64 x 64 pixels.
        start: values that replace the controls' own starting values.

    Raises:
        TypeError: another kind of source.
        ValueError: lags or an input of another shape, complex, empty, or not finite.
    """

    title = "A weight for every distance"

    def __init__(self, source: nn.Module | Tensor | None = None, x: Tensor | None = None, **start: Any) -> None:
        self._lags_of, own = _read(source)
        self._x = None if x is None else _checked_input(x)
        own_input = () if self._x is None else (YOURS,)
        self.controls: Mapping[str, Control] = {
            **own,
            **{_name(p): Slider(f"add at offset {p} ({_where(p)})", -1.0, 1.0, 0.0, 0.05) for p in POINTS},
            "symmetric": Toggle("symmetric: the past's weights in both directions"),
            "causal": Toggle("causal: no weights for the future"),
            "length": IntSlider("length (steps)", 8, LONGEST, 64),
            "input": Choice(
                "applied to", (*own_input, *SEQUENCES, SUM, PRODUCT), own_input[0] if own_input else "step"
            ),
        }
        super().__init__(**start)

    def lags(self, length: int, symmetric: bool, causal: bool, **own: Any) -> Tensor:
        """The weights ``(2 length - 1,)`` for this state of the controls, float64."""
        heights = {p: own.pop(_name(p)) for p in POINTS}
        lags = self._lags_of(length, **own) + drawn_lags("nothing", heights, length)
        if symmetric:
            lags = torch.cat([lags[length:].flip(0), lags[length - 1 :]])
        if causal:
            lags = torch.cat([torch.zeros_like(lags[: length - 1]), lags[length - 1 :]])
        return lags

    def figure(self, input: str, length: int, **own: Any) -> Figure:
        """Weights and matrix above, gain and effect below."""
        x, y, lags = self._effect(input, length, own)
        fig = plt.figure(figsize=(9.6, 5.6))
        rows: Any = fig.subfigures(2, 1)
        above, below = rows
        weights, matrix = above.subplots(1, 2, width_ratios=[1.7, 1])
        reach = len(lags) // 2
        weights.plot(range(-reach, reach + 1), lags, marker="", drawstyle="steps-mid")
        weights.axvline(0, color="#999999", linewidth=0.8)
        weights.set(
            title="weights w", xlabel="offset i - j (steps); right of 0: the past", ylabel="weight", xmargin=0.02
        )
        image = show_matrix(matrix, toeplitz_matrix(lags))
        matrix.set(title="the matrix w[i - j]", xlabel="read position j", ylabel="reading position i")
        above.colorbar(image, ax=matrix)
        shape = [1, 1.4] if x.dim() == 1 else [1.4, 1, 1]
        spectrum, *effect = below.subplots(1, len(shape), width_ratios=shape)
        frequencies, gain = gain_of(lags)
        spectrum.plot(frequencies, gain, marker="")
        spectrum.set(title="spectrum", xlabel="frequency (cycles per step)", ylabel="gain")
        spectrum.set_ylim(bottom=0)
        if x.dim() == 2:
            for ax, picture, title in zip(effect, (x, y), ("before", "after"), strict=True):
                ax.imshow(picture.numpy())
                ax.set(title=title, xticks=[], yticks=[])
                ax.grid(False)
        else:
            effect[0].plot(x, color="#999999", marker="", label="before")
            effect[0].plot(y, color=OKABE_ITO["vermilion"], marker="", label="after")
            effect[0].set(title=f"applied to: {input}", xlabel="position (steps)", ylabel="value")
            effect[0].legend(fontsize="small")
        return fig

    def describe(self, input: str, length: int, **own: Any) -> str:
        """The same in words."""
        x, y, lags = self._effect(input, length, own)
        reach = len(lags) // 2
        size = lags.abs()
        total = float(size.sum())
        words = [f"{len(lags)} weights stand for a matrix of {reach + 1} x {reach + 1} entries."]
        if total == 0:
            return f"{words[0]} All of them are 0, and so is what comes out."
        top = int(size.argmax()) - reach
        words.append(
            f"The largest in size, {fmt(float(lags[top + reach]))}, is at offset {top} ({_where(top)}); "
            f"all together add up to {fmt(_settled(float(lags.sum()), total))}."
        )
        words.append(f"Of their absolute sum {fmt(100 * float(size[:reach].sum()) / total)} % reads the future.")
        if bool((lags == lags.flip(0)).all()):
            words.append("Both directions weigh alike, so waves change in size only, never in place.")
        frequencies, gains = gain_of(lags)
        gain = [_settled(g, total) for g in gains.tolist()]
        peak = int((gains >= (1 - 1e-6) * gains.max()).nonzero()[0])
        where = f"at a period of {fmt(1 / float(frequencies[peak]))} steps" if peak else "at frequency 0"
        words.append(
            f"The gain is {fmt(gain[0])} at frequency 0, {fmt(gain[-1])} for the fastest wave (period 2), "
            f"and largest, {fmt(gain[peak])}, {where}."
        )
        scale = total * float(x.abs().max())
        low, high = (fmt(_settled(float(end), scale)) for end in (y.min(), y.max()))
        words.append(f"Applied to the {'input' if input == YOURS else input}, the result runs from {low} to {high}.")
        return " ".join(words)

    def _effect(self, input: str, length: int, own: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """The input, what the weights make of it, and the weights, as long as the input needs them."""
        if input == YOURS and self._x is not None:
            x = self._x
        else:
            x = drawing() if input in (SUM, PRODUCT) else _sequence(input, length)
        lags = self.lags(len(x), **own)
        if x.dim() == 1:
            return x, toeplitz_product(lags[None], x[None, :, None, None])[0, :, 0, 0], lags
        image = x[None, :, :, None, None]
        if input == SUM:
            return x, toeplitz_product_2d(lags[None], image)[0, :, :, 0, 0], lags
        return x, toeplitz_product_2d_full((lags[:, None] * lags)[None], image)[0, :, :, 0, 0], lags


# ---- where the weights come from: each gives (length, **own controls) -> (2 length - 1,) float64 -------------------

LagsOf = Callable[..., Tensor]


def _read(source: Any) -> tuple[LagsOf, dict[str, Control]]:
    """The function that gives a source's weights, and the controls it adds."""
    if source is None:
        return lambda length, preset: drawn_lags(preset, {}, length), {"preset": Choice("preset", PRESETS, "smooth")}
    if isinstance(source, Tensor):
        rows = _checked_lags(source)
        own_length = (rows.shape[1] + 1) // 2

        def cut(length: int, head: int) -> Tensor:
            room = length - own_length  # beyond the given offsets the weights are 0
            return torch.nn.functional.pad(rows[head], (room, room))

        return cut, _head(len(rows))
    if callable(getattr(source, "lags", None)):
        module = source

        def read_afresh(length: int, head: int) -> Tensor:
            with torch.no_grad():
                return _checked_lags(module.lags(length), length)[head]

        with torch.no_grad():
            return read_afresh, _head(len(_checked_lags(module.lags(8), 8)))
    raise TypeError(
        "BiasOverDistance wants a FastRPB, another module with lags(length), lags (H, 2L-1), or nothing; "
        f"got {type(source).__name__}. Pass the bias inside your model, e.g. layer.bias."
    )


def _head(heads: int) -> dict[str, Control]:
    return {"head": IntSlider("head", 0, heads - 1, 0)}


def _checked_lags(lags: Any, length: int | None = None) -> Tensor:
    """Lags as (H, 2L-1) in float64, or an error that says what was wanted."""
    wanted = "(H, 2L-1)" if length is None else f"(H, {2 * length - 1})"
    fits = isinstance(lags, Tensor) and lags.dim() in (1, 2) and lags.shape[-1] % 2 == 1 and not lags.is_complex()
    if not fits or lags.numel() == 0 or (length is not None and lags.shape[-1] != 2 * length - 1):
        got = f"{tuple(lags.shape)} {lags.dtype}" if isinstance(lags, Tensor) else type(lags).__name__
        raise ValueError(
            f"lags must be real and {wanted}, an odd number of offsets; got {got}. "
            "A bias with a weight for every 2-D offset has no single line of weights."
        )
    rows = lags.detach().double().cpu().reshape(-1, lags.shape[-1])
    if not rows.isfinite().all():
        raise ValueError("lags must be finite; got NaN or infinity.")
    return rows


def _checked_input(x: Any) -> Tensor:
    square = isinstance(x, Tensor) and x.dim() == 2 and x.shape[0] == x.shape[1] and 1 <= x.shape[0] <= 64
    line = isinstance(x, Tensor) and x.dim() == 1 and 1 <= len(x) <= LONGEST
    if not (square or line) or x.is_complex() or not x.isfinite().all():
        got = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"x must be a sequence (L,) of at most {LONGEST} steps or an image (S, S) of at most 64 x 64 pixels, "
            f"real and finite; got {got}."
        )
    return x.detach().double().cpu()


# ---- small things ----------------------------------------------------------------------------------------------------


def _sequence(name: str, length: int) -> Tensor:
    t = torch.arange(length, dtype=torch.float64)
    if name == "impulse":
        return (t == length // 2).double()
    if name == "step":
        return (t >= length // 3).double()
    if name == "noise":
        return torch.randn(LONGEST, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:length]
    return torch.sin(2 * math.pi * t / 32) + 0.5 * torch.sin(2 * math.pi * t / 5)


def _name(offset: int) -> str:
    return f"ahead_{-offset}" if offset < 0 else f"back_{offset}" if offset else "here"


def _where(offset: int) -> str:
    return f"{-offset} ahead" if offset < 0 else f"{offset} back" if offset else "here"


def _settled(value: float, scale: float) -> float:
    """0 where a value is rounding noise beside the scale: its digits differ from machine to machine."""
    return 0.0 if abs(value) < 1e-9 * scale else value
