"""Data from the command line: what there is, fetch it, make it, look at it.

python -m longseq_tutorial.data list
python -m longseq_tutorial.data get speech source=sc35
python -m longseq_tutorial.data make pathfinder train=20000 valid=2000 test=2000
python -m longseq_tutorial.data show listops source=sample

`option=value` are the options of `tasks.load`. A download or a making that was interrupted goes on when the same line
is given again. Whatever is wrong is said in one line, with exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import tasks
from ._command import run
from .tasks import DataError, PairSplit, Split, Task
from .tasks.base import DataNotFound, read_folders, write_folder

MADE = ("listops", "pathfinder", "pathx")  # the tasks whose data are made
REAL = {
    "listops": "official", "text": "imdb", "retrieval": "aan", "image": "cifar10", "pathfinder": "official",
    "pathx": "official", "speech": "fsdd",
}  # fmt: skip  # what `get` gets where nothing else is said
SHADES = " .:-=+*#%@"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m longseq_tutorial.data", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("list", "get", "make", "show"))
    parser.add_argument("task", nargs="?", help=f"one of {', '.join(tasks.names())}")
    parser.add_argument("options", nargs="*", metavar="option=value", help="an option of tasks.load")
    parser.add_argument("--root", help="folder to read from and write to (default: LONGSEQ_DATA, data/downloads)")
    parser.add_argument("--seed", type=int, default=0, help="decides generated data (default: 0)")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "list":
            _list(chosen.root)
            return 0
        if chosen.task is None:
            raise DataError(f"{chosen.command} needs a task; choose from {', '.join(tasks.names())}.")
        options = dict(_option(text) for text in chosen.options)
        tasks.options(chosen.task)  # an unknown name is refused before anything else
        if chosen.command == "get":
            options = {"source": REAL[chosen.task]} | options
            _fetch(chosen.task, options, chosen.root)
        elif chosen.command == "make" and chosen.task not in MADE:
            raise DataError(
                f"{chosen.task} is recorded, not made; use `get {chosen.task}`. `make` makes {', '.join(MADE)}."
            )
        elif chosen.command == "make":
            options = {"source": "generated"} | options
        _show(tasks.load(chosen.task, root=chosen.root, seed=chosen.seed, **options))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; what was finished is kept", file=sys.stderr)
        return 130
    return 0


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise DataError(f"options have the form option=value; got {text!r}.")
    if key in ("root", "seed"):
        raise DataError(f"{key} is given as --{key} {value}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return key, value  # plain words need no quotes


def _fetch(task: str, options: dict[str, Any], root: str | None) -> None:
    """What `tasks.load` would not fetch by itself: eight gigabytes."""
    if task == "retrieval" and options["source"] == "aan" and options.get("download", True):
        from .tasks import aan

        try:
            aan.find_official(root)
        except DataNotFound:
            aan.fetch(root)


def _list(root: str | None) -> None:
    for name in tasks.names():
        options = ", ".join(f"{key}={value!r}" for key, value in tasks.options(name).items())
        print(f"{name}: {options}")
        known = tasks.sources(name)
        for source, said in known.items():
            print(f"    {source:<{max(map(len, known))}}  {said}")
    print(f"read from:  {', '.join(map(str, read_folders(root)))}")
    print(f"written to: {write_folder(root)}")


def _show(task: Task) -> None:
    config = task.config
    print(f"{config.name}: {config.source}")
    if config.kind == "tokens":
        unit = f"tokens of {config.vocabulary}"
    else:
        unit = f"samples at {config.sample_rate:,} Hz" if config.sample_rate else "one number a pixel"
    what = "pairs, each side " if config.pairs else ""
    print(f"{config.kind}: {what}{unit}, at most {config.length:,}; {config.classes} classes")
    for name, split in (("train", task.train), ("valid", task.valid), ("test", task.test)):
        print(f"{name:>5}: {_summary(split, config.classes)}")
    _show_first(task)


def _show_first(task: Task) -> None:
    """The first training item, as far as letters can show it."""
    config = task.config
    item, label = task.train[0]
    said = config.class_names[label] if config.class_names else str(label)
    if isinstance(task.train, PairSplit):
        (one, two), _ = task.train[0]
        print(f"first: {_as_text(one.numpy())} | {_as_text(two.numpy())} = {said}")
    elif config.grid:
        print(f"first: {said}")
        print(_as_picture(item.numpy().reshape(config.grid)))
    elif config.name == "listops":
        from .tasks.listops import decode

        text = decode(item.numpy())
        print(f"first: {text[:70]}{' ...' if len(text) > 70 else ''} = {said}")
    elif config.kind == "tokens":
        print(f"first: {_as_text(item.numpy())} = {said}")
    else:
        print(f"first: {len(item) / config.sample_rate:.2f} s, peak {float(item.abs().max()):.2f} = {said}")


def _as_text(tokens: np.ndarray, width: int = 70) -> str:
    text = bytes((tokens[: 2 * width] - 1).astype(np.uint8).tolist()).decode("utf-8", "replace")
    return "".join(letter if letter.isprintable() else " " for letter in text[:width]) + " ..." * (len(text) > width)


def _as_picture(grey: np.ndarray, rows: int = 32) -> str:
    """The picture in letters, two columns for each row, for letters are twice as high as wide."""
    step = max(1, grey.shape[0] // rows)
    small = (
        grey[: len(grey) // step * step].reshape(grey.shape[0] // step, step, grey.shape[1] // step, step).max((1, 3))
    )
    shade = (small - small.min()) / max(float(np.ptp(small)), 1e-9) * (len(SHADES) - 1)
    return "\n".join("".join(SHADES[int(value)] * 2 for value in row).rstrip() for row in shade)


def _summary(split: Split, classes: int) -> str:
    if not len(split):
        return "none"
    low, middle, high = np.percentile(split.lengths, [0, 50, 100]).astype(int)
    share = np.bincount(split.labels, minlength=classes) / len(split)
    items = "pairs" if isinstance(split, PairSplit) else "sequences"
    return (
        f"{len(split):>7,} {items}, lengths {low:,} to {high:,}, median {middle:,}; "
        f"commonest class {100 * share.max():.1f} %"
    )


if __name__ == "__main__":
    run(main)
