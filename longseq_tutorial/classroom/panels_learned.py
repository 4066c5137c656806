"""The panel of notebook 12, and its pictures: any layer of any trained model, on any example."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from longseq_tutorial.classroom import opened
from longseq_tutorial.classroom.figures import OKABE_ITO, PAPER, PIXELS_PER_INCH, fmt
from longseq_tutorial.classroom.opened import Run
from longseq_tutorial.classroom.panels import Choice, IntSlider, Panel
from longseq_tutorial.tasks import Split

__all__ = ["Opened", "draw_kernels", "draw_map", "tokens_figure", "waveform_figure"]

COLUMNS = 100  # characters in a line of `tokens_figure`
ADVANCE = 11  # pixels from a character to the next: whole ones, or hinting would shift the text against its bars
MONOSPACE = 0.602  # width of a character of DejaVu Sans Mono, as a share of its size
INKS = tuple(OKABE_ITO[name] for name in ("blue", "orange", "green", "vermilion", "purple", "sky"))


# ---- pictures --------------------------------------------------------------------------------------------------------


def tokens_figure(pieces: Sequence[str], marks: Tensor, names: Sequence[str]) -> Figure:
    """Text with bars under its tokens: one line of bars for each row of ``marks (rows, L)``, from 0 (none) to 1 (full).

    pieces: a word for each token; single characters are set without spaces between them. names: of the rows.
    """
    gap = 0 if all(len(piece) == 1 for piece in pieces) else 1
    places, line, column = [], 0, 0
    for piece in pieces:
        if column + len(piece) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(piece) + gap
    rows, lines = len(marks), line + 1
    pitch = 1.35 + 0.25 * rows  # lines of text from one to the next
    letter = ADVANCE / PIXELS_PER_INCH  # inches
    size = 72 * letter / MONOSPACE  # points
    heights = lines * pitch + 2.2
    fig = plt.figure(figsize=((COLUMNS + 2) * letter, heights * size / 72), layout="none", dpi=PIXELS_PER_INCH)
    ax = fig.add_axes((0, 0, 1, 1))
    ax.set(xlim=(-1, COLUMNS + 1), ylim=(heights, 0))
    ax.axis("off")
    words = [[" "] * COLUMNS for _ in range(lines)]
    for (row, column), piece in zip(places, pieces, strict=True):
        words[row][column : column + len(piece)] = piece
    style: dict[str, Any] = {"family": "DejaVu Sans Mono", "fontsize": size, "va": "center", "parse_math": False}
    for row, letters in enumerate(words):
        ax.text(0, 2.3 + row * pitch, "".join(letters), **style)
    column = 0
    for name, ink in zip(names, INKS, strict=False):
        ax.plot([column, column + 2], [0.7, 0.7], color=ink, linewidth=0.26 * size, marker="", solid_capstyle="butt")
        ax.text(column + 2.8, 0.7, name, va="center", fontsize=0.85 * size)
        column += 5 + len(name)
    for mark, ink, number in zip(marks.tolist(), INKS, range(rows), strict=False):
        for (row, column), piece, strength in zip(places, pieces, mark, strict=True):
            if strength > 0.02:
                y = 2.9 + row * pitch + 0.25 * number
                ends = [column + 0.04, column + len(piece) - 0.04]
                ax.plot(ends, [y, y], color=ink, alpha=min(1.0, strength), linewidth=0.18 * size, marker="",
                        solid_capstyle="butt")  # fmt: skip
    return fig


def waveform_figure(x: Tensor, rate: int, marks: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """A clip ``(L,)`` and, on the same time axis, one row for each row of ``marks (rows, tokens)``, from 0 to 1."""
    fig, (top, bottom) = plt.subplots(2, 1, figsize=(8.6, 3.2), sharex=True, height_ratios=(1.3, 1))
    seconds = len(x) / rate
    top.plot(np.arange(len(x)) / rate, x.numpy(), marker="", linewidth=0.6)
    top.set(ylabel="sample", title=title)
    bottom.imshow(marks.numpy(), aspect="auto", extent=(0, seconds, len(marks) + 0.5, 0.5), vmin=0, vmax=1)
    bottom.set(xlabel="time (s)", yticks=range(1, len(marks) + 1), xlim=(0, seconds))
    bottom.set_yticklabels(names)
    bottom.grid(False)
    return fig


def draw_map(ax: plt.Axes, weights: Tensor, step: float = 1.0, unit: str = "tokens") -> None:
    """Attention ``(L, L)``, row = query; the square root of each weight's share of its row, so that faint ones show."""
    share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    end = step * len(weights)
    ax.imshow(share.sqrt().numpy(), extent=(0, end, end, 0), vmin=0)
    ax.set(xlabel=f"key ({unit})", ylabel=f"query ({unit})")
    ax.grid(False)


def draw_kernels(ax: plt.Axes, kernel: Tensor, step: float = 1.0, unit: str = "tokens") -> Tensor:
    """Five channels of a kernel ``(D, K)``, from the shortest to the longest; returns the reach of each channel."""
    reach = opened.reach(kernel)
    order = reach.argsort(stable=True)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        channel = int(order[round(share * (len(order) - 1))])
        size = kernel[channel].abs() / kernel[channel].abs().max()
        lags = step * np.arange(1, len(size) + 1)
        ax.plot(lags, size.numpy(), label=f"channel {channel}: {fmt(step * float(reach[channel]))} {unit}")
    ax.set(xscale="log", yscale="log", ylim=(1e-4, 1.5), xlabel=f"lag ({unit})", ylabel="size, the largest is 1")
    ax.legend(fontsize="small", title="90 % of the weight within", bbox_to_anchor=(1.02, 1), loc="upper left")
    return reach


# ---- the panel -------------------------------------------------------------------------------------------------------


class _Reading(NamedTuple):
    """What a model does with an example."""

    x: Tensor  # (L,)
    label: int
    answer: int
    sure: float
    maps: list[Tensor]  # a layer: (H, L', L')
    awake: Tensor | None  # (layers, L') bool, of SeqBoat
    codes: Tensor | None  # (layers, L'), of LongVQ


class Opened(Panel):
    """A task, a model, one of its layers, an example: its attention, its memory, and what it does token by token.

    runs: (task, model name) -> `Run`, the course's (`load_runs()`) or yours (`load_runs(Path("runs"), "my-recipe")`).
    examples: task -> what to read; by default `opened.sample`.
    Raises ValueError without runs.
    """

    title = "A trained model, opened"
    views = ("attention map", "how far attention goes", "memory", "token by token")

    def __init__(
        self,
        runs: Mapping[tuple[str, str], Run],
        examples: Mapping[str, Split] | None = None,
        count: int = 10,
        **start: Any,
    ) -> None:
        if not runs:
            raise ValueError("wanted at least one run, (task, model) -> Run; got none. Pass load_runs(folder).")
        self.runs = dict(runs)
        tasks = list(dict.fromkeys(task for task, _ in self.runs))
        names = list(dict.fromkeys(model for _, model in self.runs))
        self.examples = dict(examples or {})
        for (task, _), run in self.runs.items():
            if task not in self.examples:
                self.examples[task] = opened.sample(run.record, count)
        layers = max(len(_depth(run.model)) for run in self.runs.values())
        shortest = min(len(self.examples[task]) for task in tasks)
        self.controls = {
            "task": Choice("task", tasks),
            "model": Choice("model", names),
            "layer": IntSlider("layer, from below", 1, layers, 1),
            "example": IntSlider("example", 0, shortest - 1, 0),
            "view": Choice("look at", self.views),
        }
        self._read: dict[tuple[str, str, int], _Reading] = {}
        super().__init__(**start)

    def figure(self, *, task: str, model: str, layer: int, example: int, view: str) -> Figure:
        if (task, model) not in self.runs:
            return _note(f"There is no run of {model} on {task} here.")
        run = self.runs[task, model]
        step, unit = opened.step_size(run.record)
        reading, place = self._reading(task, model, example), self._layer(task, model, layer)
        if view == "memory":
            return self._memory_figure(run, place)
        if place >= len(reading.maps):
            return _note(f"Layer {place + 1} has no attention.")
        weights = reading.maps[place]
        if view == "attention map":
            heads = len(weights)
            size = (5.0, 4.6) if heads == 1 else (2.9 * heads, 3.4)
            fig, axes = plt.subplots(1, heads, figsize=size, squeeze=False)
            for head, ax in enumerate(axes[0]):
                draw_map(ax, weights[head], step, unit)
                ax.set_title(f"head {head + 1}" if heads > 1 else f"{model} on {task}, layer {place + 1}")
                if head:
                    ax.set_ylabel("")
            return fig
        if view == "how far attention goes":
            return _profile_figure(weights, step, unit)
        marks, names = self._marks(reading, weights)
        if run.record.task["kind"] == "samples":
            return waveform_figure(reading.x, run.record.task["sample_rate"], marks, names, _said(run, reading))
        return tokens_figure(opened.pieces(run.record, reading.x)[:600], marks[:, :600], names)

    def describe(self, *, task: str, model: str, layer: int, example: int, view: str) -> str:
        if (task, model) not in self.runs:
            there = ", ".join(name for where, name in self.runs if where == task)
            return f"There is no run of {model} on {task} here. There are: {there}."
        run = self.runs[task, model]
        step, unit = opened.step_size(run.record)
        reading, place = self._reading(task, model, example), self._layer(task, model, layer)
        which = f"{model} on {task}, layer {place + 1} of {len(_depth(run.model))}, example {example}"
        said = f"{which}: {_said(run, reading)}. "
        if view == "memory":
            return said + self._memory_words(run, place)
        if place >= len(reading.maps):
            return f"{said} This layer has no attention."
        weights = reading.maps[place]
        profile = opened.distance_profile(weights).cumsum(0)
        if view == "token by token":
            return said + self._token_words(run, reading, place)
        if not weights.any():
            return f"{said}Nobody attends here: no token is awake."
        half = int((profile < 0.5).sum())
        even = opened.distance_profile(torch.ones_like(weights)).cumsum(0)
        words = (
            f"Half of the attention stays within {fmt(step * half, 3)} {unit} of the query; if it were spread evenly, "
            f"within {fmt(step * int((even < 0.5).sum()), 3)}. "
        )
        if view == "attention map":
            received = weights.sum((0, 1))
            share = float(received.max() / received.sum())
            place_read = fmt(step * int(received.argmax()), 3)
            words += f"The key that is read most gets {fmt(100 * share)} % of all attention, at {place_read} {unit}."
        else:
            words += f"Itself: {fmt(100 * float(profile[0]))} %."
        return said + words

    # ---- what the views need

    def _layer(self, task: str, model: str, layer: int) -> int:
        return min(layer, len(_depth(self.runs[task, model].model))) - 1

    def _reading(self, task: str, model: str, example: int) -> _Reading:
        key = task, model, example
        if key not in self._read:
            run, (x, label) = self.runs[task, model], self.examples[task][example]
            batch, mask = x[None], torch.ones(1, len(x), dtype=torch.bool)
            logits = opened.predictions(run.model, _batch(batch, mask))[0]
            awake = opened.waking(run.model, batch, mask)[:, 0] if run.record.model == "seqboat" else None
            named = opened.codes(run.model, batch, mask)[:, 0] if run.record.model == "longvq" else None
            maps = opened.attention_maps(run.model, batch, mask)
            answer = int(logits.argmax())
            sure = float(torch.softmax(logits, -1)[answer])
            if len(self._read) > 8:
                self._read.pop(next(iter(self._read)))
            self._read[key] = _Reading(x, int(label), answer, sure, maps, awake, named)
        return self._read[key]

    def _marks(self, reading: _Reading, weights: Tensor) -> tuple[Tensor, list[str]]:
        """What stands under the tokens: who is awake in each layer; else how much each token is read in this one."""
        if reading.awake is not None:
            return reading.awake.float(), [f"awake in layer {i + 1}" for i in range(len(reading.awake))]
        received = weights.sum((0, 1))
        return (received / received.max().clamp(min=1e-30))[None], ["how much it is read"]

    def _token_words(self, run: Run, reading: _Reading, place: int) -> str:
        if reading.awake is not None:
            rates = ", ".join(f"{fmt(100 * float(layer.float().mean()))} %" for layer in reading.awake)
            return f"Awake, from the lowest layer up: {rates}."
        if reading.codes is not None:
            numbers = torch.bincount(reading.codes[place])
            return (
                f"Its {len(reading.codes[place])} keys go by {int((numbers > 0).sum())} codes here; the commonest "
                f"stands for {int(numbers.max())} of them."
            )
        received = reading.maps[place].sum((0, 1))
        step, unit = opened.step_size(run.record)
        if run.record.task["kind"] == "samples":
            return f"Read most: what lies around {fmt(step * int(received.argmax()), 3)} {unit}."
        words = opened.pieces(run.record, reading.x)
        top = [f"{words[i]!r} at {i}" for i in received.topk(min(3, len(received))).indices.tolist()]
        return f"Read most: {', '.join(top)}."

    def _memory_figure(self, run: Run, place: int) -> Figure:
        found = _memory(run, place)
        if found is None:
            return _note(f"Layer {place + 1} of {run.record.model} has no EMA and no state space.")
        step, unit = opened.step_size(run.record)
        fig, ax = plt.subplots(figsize=(8.4, 3.8))
        draw_kernels(ax, found, step, unit)
        return fig

    def _memory_words(self, run: Run, place: int) -> str:
        found = _memory(run, place)
        if found is None:
            return "This layer has no EMA and no state space."
        step, unit = opened.step_size(run.record)
        reach = step * opened.reach(found).double()
        start = step * opened.reach(_memory(Run(opened.fresh(run.record), run.record), place)).double()  # type: ignore[arg-type]
        return (
            f"90 % of a kernel's weight lies within {fmt(float(reach.median()))} {unit} in the middle channel, "
            f"{fmt(float(reach.max()))} in the longest; before training within {fmt(float(start.median()))} and "
            f"{fmt(float(start.max()))}."
        )


def _depth(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers, without what only adds positions."""
    return [layer for layer in model.encoder.layers if any(True for _ in layer.children())]  # type: ignore[union-attr]


def _memory(run: Run, place: int) -> Tensor | None:
    """The kernel of a layer ``(D or 2 D, K)``, as long as the longest sequence; None where there is no memory."""
    inside = opened.memories(_depth(run.model)[place])
    if not inside:
        return None
    return opened.kernels(inside[0], _positions(run))


def _positions(run: Run) -> int:
    stride = math.prod(step for _, step in run.record.config["patch"])
    return -(-int(run.record.task["length"]) // stride)


def _batch(x: Tensor, mask: Tensor) -> Any:
    from longseq_tutorial.tasks import Batch

    return Batch(x, mask, torch.zeros(len(x), dtype=torch.long))


def _said(run: Run, reading: _Reading) -> str:
    names = run.record.task["class_names"]
    verdict = "right" if reading.answer == reading.label else f"wrong: it is {names[reading.label]!r}"
    return f"the model says {names[reading.answer]!r} with probability {reading.sure:.2f} ({verdict})"


def _profile_figure(weights: Tensor, step: float, unit: str) -> Figure:
    fig, ax = plt.subplots()
    distances = step * np.arange(weights.shape[-1])
    for head, each in enumerate(weights):
        name = "this layer" if len(weights) == 1 else f"head {head + 1}"
        ax.plot(distances, opened.distance_profile(each[None]).cumsum(0).numpy(), label=name)
    even = opened.distance_profile(torch.ones_like(weights)).cumsum(0)
    ax.plot(distances, even.numpy(), color="#8A8A86", linestyle=":", marker="", label="evenly spread")
    ax.set(xlabel=f"distance between query and key ({unit})", ylabel="share of attention within", ylim=(0, 1.02))
    ax.set_xscale("symlog", linthresh=step)
    ax.set_xlim(left=0)
    ax.legend(loc="upper left")
    return fig


def _note(text: str) -> Figure:
    fig, ax = plt.subplots(figsize=(7, 1.4))
    ax.text(0.5, 0.5, "\n".join(textwrap.wrap(text, 70)), ha="center", va="center", transform=ax.transAxes)
    ax.axis("off")
    fig.set_facecolor(PAPER)
    return fig
