"""Training records as a table, beside what was published, and as a plot of quality against cost.

    python -m longseq_tutorial.results                      what `results` and `runs` hold
    python -m longseq_tutorial.results DIR ...              what these folders hold
    python -m longseq_tutorial.results --plot cost.svg      also draw accuracy against cost (.png or .svg)
    python -m longseq_tutorial.results --json               the rows of the table as JSON

A row stands for the runs of one model by one recipe on the same data and machine, with different seeds. A published
figure stands beside it; the gap is in parentheses where `published.differences` finds the data to differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from . import models, published
from ._command import run
from .training.records import Record, RecordError, read_record

if TYPE_CHECKING:  # drawing is asked for seldom, and matplotlib is slow to load
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDERS = ("results", "runs")  # ours, and the reader's own
WIDTH = 120  # columns of a terminal
UNKNOWN = "not known to us"
# The model's colour and marker in every plot, those of the notebooks' style: told apart by every colour vision.
STYLE = dict(
    zip(
        models.NAMES,
        (
            ("#0072B2", "o"),
            ("#E69F00", "s"),
            ("#009E73", "^"),
            ("#D55E00", "D"),
            ("#CC79A7", "v"),
            ("#56B4E9", "P"),
            ("#000000", "X"),
        ),
        strict=True,
    )
)
_OTHER = ("#666666", "*")  # a model of the reader's own
_Fill = Literal["full", "none", "left", "bottom"]
_FILLS: tuple[_Fill, ...] = (
    "full",
    "none",
    "left",
    "bottom",
)  # one recipe after the other, where a panel holds several


class CommandError(ValueError):
    """Something is wrong with the command itself."""


@dataclass(frozen=True)
class Row:
    """The runs of one model by one recipe, on the same data and the same machine. Accuracies are in percent."""

    task: str
    data: str  # the source, without the seed that generated it
    model: str
    recipe: str
    device: str  # "cpu" or "cuda"
    machine: str  # "cpu x 2" (threads of all processes), or the GPU's name, "x 2" of them
    device_name: str
    seeds: tuple[int, ...]  # of a seed that was run twice, the later run counts
    accuracy: float  # on the test part, mean over seeds
    spread: float | None  # standard deviation over seeds; None for a single one
    sampling: float  # standard error of one run's accuracy, because the test part is finite
    classes: int
    trained: int  # sequences
    tested: int
    benchmark: str  # the published task that is nearest, a key of published.BENCHMARKS; else the task
    reference: published.Row | None  # the published figure
    differences: tuple[str, ...]  # in what the data are not the published ones
    seconds: float  # of training and evaluation, mean over seeds
    cpu_seconds: float | None  # of all threads together; None where a record does not say
    memory: int  # largest peak, in bytes: of the GPU, on a CPU of the process
    parameters: int
    updates: int
    steps: int  # positions read in training, at most: updates x batch x longest sequence

    @property
    def chance(self) -> float:
        """Percent right of an even guess."""
        return 100 / self.classes

    @property
    def minutes(self) -> float:
        """What training took of the machine: all threads together on a CPU if that was recorded, else wall clock."""
        return (self.cpu_seconds if self.device == "cpu" and self.cpu_seconds else self.seconds) / 60

    @property
    def gap(self) -> float | None:
        """Ours less the published figure, in points; None where there is none."""
        known = self.reference is not None and self.reference.accuracy is not None
        return self.accuracy - self.reference.accuracy if known else None  # type: ignore[union-attr,operator]

    @property
    def comparable(self) -> bool:
        """Whether the data are the published task's, so that the gap means something."""
        return not self.differences

    def as_dict(self) -> dict[str, Any]:
        """Every field and property, for JSON."""
        more = {key: getattr(self, key) for key in ("chance", "gap", "comparable")}
        return {**dataclasses.asdict(self), **more, "why_unknown": published.why_unknown(self.model, self.benchmark)}


# ---- records to rows -----------------------------------------------------------------------------------------------


def records(folders: Iterable[str | Path]) -> list[Record]:
    """All records in these folders, by name. Raises `RecordError` for a folder that is missing or a broken record."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RecordError(f"{folder} is no folder; name one that holds records.")
        found += [read_record(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: record.name)


def summary(found: Iterable[Record]) -> list[Row]:
    """The records as rows, by task, data, model and recipe; runs that differ in their seed alone share a row."""
    groups: dict[tuple[str, ...], dict[int, Record]] = {}
    for record in sorted(found, key=lambda record: record.finished):  # the later run of a seed replaces the earlier
        groups.setdefault(_same(record), {})[record.seed] = record
    rows = [_row([runs[seed] for seed in sorted(runs)]) for runs in groups.values()]
    return sorted(rows, key=_order)


def _same(record: Record) -> tuple[str, ...]:
    """What runs have in common that are repetitions of each other. `source` of a recipe is prose, and may be edited."""
    settings = {key: value for key, value in record.recipe.items() if key != "source"}
    about = json.dumps([settings, record.config, record.sequences, record.task["length"]], sort_keys=True)
    return record.task["name"], _data(record), about, record.device_name, _machine(record)


def _data(record: Record) -> str:
    return re.sub(r", seed \d+", "", record.source)


def _machine(record: Record) -> str:
    if record.device == "cpu":
        return f"cpu x {record.threads * record.processes}"
    return record.device_name + (f" x {record.processes}" if record.processes > 1 else "")


def _order(row: Row) -> tuple[Any, ...]:
    tasks = [*published.BENCHMARKS, "speech"]  # the Arena's order, then ours
    place = tasks.index(row.task) if row.task in tasks else len(tasks)
    known = models.NAMES.index(row.model) if row.model in models.NAMES else len(models.NAMES)
    return place, not row.comparable, *_block(row), row.machine, row.device_name, row.recipe, known, row.model


def _row(runs: Sequence[Record]) -> Row:
    last = max(runs, key=lambda run: run.finished)
    accuracies = [100 * run.test["accuracy"] for run in runs]
    share, tested = statistics.mean(accuracies) / 100, last.sequences["test"]
    cpu = [run.cpu_seconds for run in runs if run.cpu_seconds]
    task, length = last.task["name"], last.task["length"]
    nearest = published.benchmark(task, last.source) or task
    return Row(
        task=task,
        data=_data(last),
        model=last.model,
        recipe=str(last.recipe["name"]),
        device=last.device,
        machine=_machine(last),
        device_name=last.device_name,
        seeds=tuple(run.seed for run in runs),
        accuracy=100 * share,
        spread=statistics.stdev(accuracies) if len(runs) > 1 else None,
        sampling=100 * math.sqrt(share * (1 - share) / tested),
        classes=last.task["classes"],
        trained=last.sequences["train"],
        tested=tested,
        benchmark=nearest,
        reference=published.lookup(nearest, last.model),
        differences=published.differences(task, last.source, length, last.sequences["train"]),
        seconds=statistics.mean(run.seconds for run in runs),
        cpu_seconds=statistics.mean(cpu) if len(cpu) == len(runs) else None,
        memory=max(_peak(run) for run in runs),
        parameters=last.parameters,
        updates=last.updates,
        steps=last.updates * int(last.recipe["batch"]) * length * (2 if last.task["pairs"] else 1),
    )


def _peak(run: Record) -> int:
    return run.peak_memory.get("cuda" if run.device == "cuda" else "rss", 0)


# ---- the table -----------------------------------------------------------------------------------------------------

_HEAD = (
    "model", "recipe", "published", "ours", "gap", "seeds", "min", "CPU min", "GiB", "M param", "M steps", "device"
)  # fmt: skip
_LEFT = (0, 1, 11)  # columns of words


def table(rows: Sequence[Row]) -> str:
    """The rows as text: a block for each task and its data, then the notes that they need. At most `WIDTH` columns."""
    sources = list(dict.fromkeys(row.reference.source for row in rows if row.reference))
    cells = [_cells(row, sources) for row in rows]
    widths = [max(len(line[i]) for line in (_HEAD, *cells)) for i in range(len(_HEAD))]
    spare = WIDTH - sum(widths) - 2 * (len(widths) - 1)
    widths[1] = max(len("gpu-30min"), widths[1] + min(spare, 0))  # recipes that were changed have long names
    blocks = []
    for _, group in groupby(zip(rows, cells, strict=True), key=lambda pair: _block(pair[0])):
        members = list(group)
        row = members[0][0]
        title = (
            f"{row.task}: {row.classes} classes, chance {row.chance:.1f} %; "
            f"{row.trained:,} sequences to train on, {row.tested:,} to test"
        )
        lines = [title, *_wrapped(row.data or "(no source given)", "  ")]
        lines += [_line(line, widths) for line in (_HEAD, *(line for _, line in members))]
        blocks.append("\n".join(lines))
    return "\n\n".join([*blocks, "\n".join(line for note in _notes(rows, sources) for line in _wrapped(note))])


def _block(row: Row) -> tuple[Any, ...]:
    """What the rows of a block, and the panels of a plot, share."""
    return row.task, row.data, row.trained, row.tested


def _cells(row: Row, sources: Sequence[str]) -> tuple[str, ...]:
    said, reference = UNKNOWN, row.reference
    if reference is not None:
        figure = "fails" if reference.accuracy is None else f"{reference.accuracy:.2f}"
        said = f"{figure} [{sources.index(reference.source) + 1}]"
    gap = "" if row.gap is None else f"{row.gap:+.1f}"
    return (
        row.model,
        row.recipe,
        said,
        f"{row.accuracy:.1f}" + (f" ±{row.spread:.1f}" if row.spread is not None else ""),
        gap if row.comparable or not gap else f"({gap})",
        str(len(row.seeds)),
        _minutes(row.seconds),
        _minutes(row.cpu_seconds) if row.cpu_seconds else "",
        f"{row.memory / 2**30:.2f}",
        f"{row.parameters / 1e6:.2f}",
        f"{row.steps / 1e6:,.0f}",
        row.machine.removeprefix("NVIDIA "),
    )


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds < 6_000 else f"{seconds / 60:,.0f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    pairs = enumerate(zip(cells, widths, strict=True))
    cut = [(i, cell if len(cell) <= width else f"{cell[: width - 3]}...", width) for i, (cell, width) in pairs]
    return "  ".join(cell.ljust(width) if i in _LEFT else cell.rjust(width) for i, cell, width in cut).rstrip()


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent or "  ", break_on_hyphens=False)


def _notes(rows: Sequence[Row], sources: Sequence[str]) -> Iterator[str]:
    """What a reader must know to read the table."""
    yield (
        "published, ours: test accuracy in percent; gap: ours less published, in points. Chance: 1 / classes; always "
        "naming the commonest class may do better."
    )
    if any(row.spread is not None for row in rows):
        yield "±: standard deviation over the seeds."
    for task, group in groupby(rows, key=lambda row: row.task):
        yield f"{task}: a finite test part alone moves a figure by {_sampling(list(group))} (one standard error)."
    for task, group in groupby(rows, key=lambda row: row.task):
        why = list(
            dict.fromkeys("; ".join(row.differences) for row in group if row.gap is not None and row.differences)
        )
        for reason in why:
            yield f"(gap) on {task} is no comparison: {reason}."
    for number, source in enumerate(sources, start=1):
        noted = {(r.reference.model, r.reference.note) for r in rows if r.reference and r.reference.source == source}
        remarks = "; ".join(f"{model}: {note}" for model, note in sorted(noted) if note)
        yield f"[{number}] {source}.{f' {remarks}.' if remarks else ''}"
    unknown: dict[str, None] = {}
    for row in rows:
        if row.reference is None:
            on = "" if all(r.reference is None for r in rows if r.model == row.model) else f" on {row.task}"
            unknown[f"{row.model}{on}: {published.why_unknown(row.model, row.benchmark)}."] = None
    for reason in sorted(unknown):
        yield f"{UNKNOWN}: {reason}"
    names = dict.fromkeys(row.device_name for row in rows if row.device == "cpu")
    yield (
        "min: wall clock, training and evaluation; CPU min: all threads together; GiB: peak memory, on a CPU with "
        "Python and the data in it; M steps: positions read in training, at most (updates x batch x longest sequence)."
        + (f" cpu: {', '.join(names)}." if names else "")
    )


def _sampling(rows: Sequence[Row]) -> str:
    low, high = min(row.sampling for row in rows), max(row.sampling for row in rows)
    return f"{high:.1f} points" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f} points"


# ---- the plot ------------------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row]) -> Figure:
    """Accuracy against cost, a line of panels for each task, data and machine: left over time, right over parameters.

    Time is `Row.minutes`. The y axis begins at
    chance, unless all models lie close together far above it. Vertical bars: one standard error. A dashed line is the
    published figure of the model in its colour, drawn only where the data are the published ones.
    Raises `ValueError` without rows.
    """
    if not rows:
        raise ValueError("nothing to draw: wanted at least one row; got none. Pass summary(records([...])).")
    from matplotlib.figure import Figure

    panels = _panels(rows)
    fig = Figure(figsize=(8.2, 2.9 * len(panels) + 0.7), layout="constrained")
    axes = fig.subplots(len(panels), 2, squeeze=False, sharey="row")
    for (left, right), members in zip(axes, panels, strict=True):
        _panel(left, members, [row.minutes for row in members], f"{_clock(members)} of training")
        _panel(right, members, [row.parameters / 1e6 for row in members], "parameters, millions")
        left.set_ylabel("test accuracy (%)")
        first = members[0]
        title = f"{first.task}, {first.classes} classes (chance {first.chance:.0f} %), on {first.machine}"
        left.set_title("\n".join([title, *textwrap.wrap(first.data, 118)]), loc="left", fontsize=8, wrap=False)
        right.tick_params(labelleft=False)
    handles = _legend(rows)
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9)
    return fig


def _panels(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows whose cost was measured alike, on the same machine and by the same clock."""

    def alike(row: Row) -> tuple[Any, ...]:
        return *_block(row), row.machine, row.device_name, _clock([row])

    return [
        list(group) for _, group in groupby(sorted(rows, key=lambda row: (*_order(row)[:-3], _clock([row]))), alike)
    ]


def _clock(rows: Sequence[Row]) -> str:
    """In what `Row.minutes` are measured."""
    return "CPU minutes" if all(row.device == "cpu" and row.cpu_seconds for row in rows) else "minutes"


def _fills(rows: Iterable[Row]) -> dict[str, _Fill]:
    """How the markers of each recipe are filled."""
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    return {recipe: _FILLS[i % len(_FILLS)] for i, recipe in enumerate(recipes)}


def _panel(ax: Axes, rows: Sequence[Row], costs: Sequence[float], label: str) -> None:
    fills = _fills(rows)
    for row, cost in zip(rows, costs, strict=True):
        colour, marker = STYLE.get(row.model, _OTHER)
        ax.errorbar(cost, row.accuracy, yerr=_error(row), color=colour, linewidth=1.2, marker="none", zorder=2)
        ax.plot(
            cost,
            row.accuracy,
            color=colour,
            marker=marker,
            markersize=8,
            fillstyle=fills[row.recipe],
            linestyle="none",
            zorder=3,
        )
        if row.comparable and row.reference is not None and row.reference.accuracy is not None:
            ax.axhline(row.reference.accuracy, color=colour, linestyle="--", linewidth=1.1, zorder=1)
    ax.set(xlabel=label, xlim=(0, 1.12 * max(costs)), ylim=_limits(rows))
    ax.axhline(rows[0].chance, color="#888888", linewidth=1.0, linestyle=":", zorder=1)
    ax.grid(color="#D9D9D4", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _error(row: Row) -> float:
    """One standard error of the mean over seeds, and at least that of the test part, which all seeds share."""
    return max(row.sampling, (row.spread or 0) / math.sqrt(len(row.seeds)))


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """From just below chance; from the models only, where they would all stick to the upper edge."""
    lines = [r.reference.accuracy for r in rows if r.comparable and r.reference and r.reference.accuracy is not None]
    low = min([*lines, *(row.accuracy - _error(row) for row in rows)])
    high = max([*lines, *(row.accuracy + _error(row) for row in rows)])
    chance = rows[0].chance
    floor = low if low - chance > 4 * (high - low) else min(low, chance)
    edge = 0.08 * max(high - floor, 1)
    return floor - edge, high + edge


def _legend(rows: Sequence[Row]) -> list[Any]:
    from matplotlib.lines import Line2D

    names = [name for name in (*STYLE, *(row.model for row in rows)) if any(row.model == name for row in rows)]
    handles = []
    for name in dict.fromkeys(names):
        colour, marker = STYLE.get(name, _OTHER)
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=8, linestyle="none", label=name))
    fills = [_fills(panel) for panel in _panels(rows)]
    for recipe, fill in dict.fromkeys(pair for panel in fills if len(panel) > 1 for pair in panel.items()):
        handles.append(Line2D([], [], color="#666666", marker="o", linestyle="none", fillstyle=fill, label=recipe))
    if any(row.comparable and row.gap is not None for row in rows):
        handles.append(Line2D([], [], color="#666666", linestyle="--", label="published"))
    if any(_limits(panel)[0] < panel[0].chance for panel in _panels(rows)):
        handles.append(Line2D([], [], color="#888888", linestyle=":", label="chance"))
    return handles


def describe(rows: Sequence[Row]) -> str:
    """What the plot shows, in words: for `classroom.show`, and for readers who do not see the picture."""
    said = ["Test accuracy against the cost of training, left in minutes, right in parameters."]
    for panel in _panels(rows):
        best = max(panel, key=lambda row: row.accuracy)
        cheapest = min(panel, key=lambda row: row.minutes)
        lines = {f"{r.model} {r.reference.accuracy:.1f}" for r in panel if r.comparable and r.reference and r.gap}
        points = "; ".join(_point(row) for row in panel)
        said.append(
            f"{best.task} on {best.machine}, chance {best.chance:.0f} %: {points}. The most accurate is {best.model}, "
            f"the cheapest {cheapest.model}." + (f" Published: {', '.join(sorted(lines))}." if lines else "")
        )
    return " ".join(said)


def _point(row: Row) -> str:
    return f"{row.model} ({row.recipe}) {row.accuracy:.1f} % in {row.minutes:.1f} {_clock([row])}"


# ---- the command ---------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}. --help lists all flags.")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    said, _, rest = (__doc__ or "").partition("\n\n")
    parser = _Parser(
        prog="python -m longseq_tutorial.results",
        description=said,
        epilog=textwrap.dedent(rest),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help=f"folders of records; else {' and '.join(FOLDERS)}")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy against cost into a .png or .svg")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    arguments = parser.parse_args(argv)
    if arguments.plot is not None and arguments.plot.suffix.lower() not in (".png", ".svg"):
        raise CommandError(f"--plot wants a file that ends in .png or .svg; got {arguments.plot}.")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit code 2 with one line when something is wrong with the request, a record, or the file."""
    try:
        arguments = _parse(argv)
        folders = arguments.folders or [folder for folder in FOLDERS if Path(folder).is_dir()]
        rows = summary(records(folders))
        if arguments.plot is not None:
            _draw(rows, arguments.plot)
    except (CommandError, RecordError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps([row.as_dict() for row in rows], indent=1))
    else:
        print(table(rows) if rows else f"no records in {', '.join(folders) or ' or '.join(FOLDERS)} yet.")
    return 0


def _draw(rows: Sequence[Row], path: Path) -> None:
    if not rows:
        raise CommandError("there are no records, so there is nothing to draw. Train something first.")
    plot(rows).savefig(path, dpi=150, metadata={"Description": describe(rows)})
    print(f"drawn to {path}: {describe(rows)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
