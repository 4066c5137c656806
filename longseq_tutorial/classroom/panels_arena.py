"""The panel of notebook 10: any task, example by example, as a person sees it and as a model reads it.

The functions that draw one example are also what the notebook's own figures are made with.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from longseq_tutorial import tasks
from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, IntSlider, Panel, Toggle
from longseq_tutorial.tasks import Split, Task, TaskConfig, expressions, pathfinder

__all__ = [
    "ARENA", "TaskBrowser", "as_text", "draw_bytes", "draw_nesting", "draw_paths", "draw_picture", "draw_sequence",
    "nesting", "recorded", "samples",
]  # fmt: skip

ARENA = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
BYTES = 257  # vocabulary of texts: a byte's id is one above the byte
LINE = 112  # characters of a text in a line ...
LINES = 8  # ... and lines that are shown of it


def samples() -> dict[str, Task]:
    """The Arena's six tasks, each as the sample that lies in the repository: no network, no other data."""
    return {name: tasks.load(name, source="sample") for name in ARENA}


# ---- what an example is ---------------------------------------------------------------------------------------------


def as_text(ids: Tensor) -> str:
    """The text of a sequence of byte ids (byte + 1); what is no UTF-8 becomes a replacement character."""
    return bytes((ids - 1).clamp(0, 255).tolist()).decode("utf-8", "replace")


def nesting(ids: Tensor) -> np.ndarray:
    """How many lists are open after each token of a ListOps expression: int64 (length,)."""
    opens, closes = ids >= expressions.MIN, ids == expressions.CLOSE
    steps: np.ndarray = (opens & ~closes).long().sub(closes.long()).cumsum(0).numpy()
    return steps


def recorded(pixels: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
    """The two paths (2, paddles + 1, 2) and the dots (2, 2) of a Pathfinder picture of the samples; else None.

    pixels: (size * size,) from -1 to 1. Coordinates are (row, column).
    """
    found = _recorded(len(pixels)).get(_grey(pixels).tobytes())
    if found is None:
        return None
    pictures, number = found
    return pictures.paths[number].astype(int), pictures.dots[number].astype(int)


def _grey(pixels: Tensor) -> np.ndarray:
    grey: np.ndarray = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return grey


@cache
def _recorded(length: int) -> dict[bytes, tuple[pathfinder.Pictures, int]]:
    size = round(length**0.5)
    if size not in pathfinder.SAMPLES:
        return {}
    pictures = pathfinder.sample(size)
    return {image.tobytes(): (pictures, number) for number, image in enumerate(pictures.images)}


# ---- how it is drawn ------------------------------------------------------------------------------------------------


def draw_bytes(ax: Axes, ids: Tensor, width: int = LINE) -> None:
    """A text, wrapped, as much as fits into a few lines of so many characters."""
    wrapped = textwrap.wrap(as_text(ids), width)
    if len(wrapped) > LINES:
        wrapped = [*wrapped[: LINES - 1], wrapped[LINES - 1][: width - 2] + " …"]
    shown = "\n".join(wrapped).replace("$", r"\$")  # no mathematics
    ax.text(0, 1, shown, va="top", ha="left", family="monospace", fontsize=8.6, linespacing=1.35)
    ax.axis("off")


def draw_nesting(ax: Axes, ids: Tensor) -> None:
    """How deep a ListOps expression is nested at each token."""
    depth = nesting(ids)
    ax.fill_between(np.arange(len(depth)), depth, step="post", color=OKABE_ITO["sky"], alpha=0.5, linewidth=0)
    ax.step(np.arange(len(depth)), depth, where="post", color=OKABE_ITO["blue"], linewidth=0.9, marker="")
    ax.set(xlabel="token", ylabel="open lists", ylim=(0, None), xlim=(0, len(depth)))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def draw_picture(ax: Axes, pixels: Tensor, grid: tuple[int, ...]) -> None:
    """A sequence of pixels put back into its rows."""
    ax.imshow(pixels.reshape(grid).numpy(), cmap="gray")
    ax.set(xlabel="column", ylabel="row", xticks=_ends(grid[1]), yticks=_ends(grid[0]))
    ax.grid(False)


def _ends(count: int) -> tuple[int, ...]:
    return (0, count // 2, count - 1)


def draw_paths(ax: Axes, paths: np.ndarray, dots: np.ndarray) -> None:
    """Both paths of a Pathfinder picture, paths (2, points, 2) as (row, column), and rings around its two dots."""
    for path, name, style in zip(paths, ("orange", "sky"), ("-", "--"), strict=True):
        ax.plot(path[:, 1], path[:, 0], style, color=OKABE_ITO[name], linewidth=1.6, marker="")
    ax.plot(
        dots[:, 1], dots[:, 0], "o", color=OKABE_ITO["vermilion"], markersize=11, markerfacecolor="none",
        markeredgewidth=1.8,
    )  # fmt: skip


def draw_sequence(ax: Axes, sequence: Tensor, config: TaskConfig) -> None:
    """What a model reads: a row of numbers, token ids as points or pixels as a line, with no sign where rows end."""
    steps, values = np.arange(len(sequence)), sequence.numpy()
    if config.kind == "tokens":
        ax.plot(steps, values, ".", markersize=2.5, markevery=1, color=OKABE_ITO["black"])
        ax.set(ylabel="token id", ylim=(-0.03 * config.vocabulary, 1.03 * config.vocabulary))
    else:
        ax.plot(steps, values, color=OKABE_ITO["black"], linewidth=0.6 if len(sequence) < 5_000 else 0.2, marker="")
        ax.set(ylabel="value")
    ax.set(xlabel="step", xlim=(-0.01 * len(sequence), 1.01 * len(sequence)))
    ax.locator_params(axis="y", nbins=4)


# ---- the panel ------------------------------------------------------------------------------------------------------


class TaskBrowser(Panel):
    """Look through tasks: above an example as a person would see it, below the numbers that a model reads.

    tasks: a `Task` of your own, or several, `{name: Task}`; None takes the repository's samples of the six tasks of
    the Long Range Arena. Examples come from the training part, evenly spaced, as many as the smallest task has (at
    most `most`). Tasks of bytes, of ListOps expressions, of pictures and of waveforms are known; any other is shown
    as numbers.
    Raises `TypeError` for what is no task, `ValueError` for a task without examples.
    """

    title = "Six tasks, example by example (click the slider, then use the arrow keys)"

    def __init__(self, tasks: Task | Mapping[str, Task] | None = None, *, most: int = 40, **start: Any) -> None:
        found = samples() if tasks is None else {tasks.config.name: tasks} if isinstance(tasks, Task) else dict(tasks)
        for name, task in found.items():
            if not isinstance(task, Task):
                raise TypeError(f"wanted a Task, as tasks.load gives it; got {type(task).__name__} for {name!r}.")
            if not len(task.train):
                raise ValueError(f"wanted a task with training examples; {name!r} has none.")
        if not found:
            raise ValueError("wanted at least one task; got none.")
        self.tasks = found
        self.count = min(most, *(len(task.train) for task in found.values()))
        self.controls = {
            "task": Choice("task", tuple(found)),
            "example": IntSlider("example", 1, max(self.count, 2), 1),
            "answer": Toggle("show the answer", False),
        }
        super().__init__(**start)

    def figure(self, task: str, example: int, answer: bool) -> Figure:
        config, (item, label) = self.tasks[task].config, self._item(task, example)
        parts = list(item) if config.pairs else [item]
        title = f"{task}: {_name(config, label)}" if answer else task
        if config.grid:
            fig, (seen, read) = plt.subplots(1, 2, figsize=(9.6, 3.1), width_ratios=(1, 2.4))
            draw_picture(seen, item, config.grid)
            traced = recorded(item) if answer and config.classes == 2 else None
            if traced is not None:
                draw_paths(seen, *traced)
            draw_sequence(read, item, config)
            seen.set_title(title)
            read.set_title(f"{len(item):,} steps")
            return fig
        fig, axes = plt.subplots(2, len(parts), figsize=(9.6, 4.3), height_ratios=(1.25, 1), squeeze=False)
        for (seen, read), part in zip(axes.T, parts, strict=True):
            if config.vocabulary == BYTES:
                draw_bytes(seen, part, LINE // len(parts) - 4 * (len(parts) - 1))
            elif _is_expression(config):
                draw_nesting(seen, part)
            else:
                seen.axis("off")
            draw_sequence(read, part, config)
            read.set_title(f"{len(part):,} steps")
        axes[0, 0].set_title(title)
        return fig

    def describe(self, task: str, example: int, answer: bool) -> str:
        config, (item, label) = self.tasks[task].config, self._item(task, example)
        lengths = " and ".join(f"{len(part):,}" for part in (item if config.pairs else [item]))
        said = f"{task}, example {min(example, self.count)} of {self.count}: {lengths} steps. {_facts(config, item)}"
        return f"{said} The answer: {_name(config, label)}." if answer else f"{said} The answer is hidden."

    def _item(self, task: str, example: int) -> tuple[Any, int]:
        split: Split = self.tasks[task].train
        return split[(min(example, self.count) - 1) * len(split) // self.count]


def _is_expression(config: TaskConfig) -> bool:
    return config.kind == "tokens" and config.vocabulary == len(expressions.VOCABULARY)


def _name(config: TaskConfig, label: int) -> str:
    return config.class_names[label] if config.class_names else str(label)


def _facts(config: TaskConfig, item: Any) -> str:
    """One measured sentence about an example that does not give the answer away."""
    if config.pairs:
        first, second = (set(as_text(part).lower().split()) for part in item)
        return f"The two texts have {len(first & second)} words in common."
    if config.vocabulary == BYTES:
        return f"As text it has {len(as_text(item).split())} words."
    if _is_expression(config):
        lists = int((item >= expressions.MIN).sum() - (item == expressions.CLOSE).sum())
        return f"{lists} lists, nested {nesting(item).max()} deep."
    if not config.grid:
        return f"Numbers from {fmt(float(item.min()))} to {fmt(float(item.max()))}."
    said = f"As a picture {config.grid[0]} rows of {config.grid[1]} pixels."
    traced = recorded(item) if config.classes == 2 else None
    if traced is None:
        return said
    (row, column), (row2, column2) = traced[1]
    apart = abs((row - row2) * config.grid[1] + column - column2)
    return f"{said} Its two dots are {fmt(np.hypot(row - row2, column - column2))} pixels and {apart:,} steps apart."
