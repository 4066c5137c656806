"""Data from the command line: what there is, fetch it, make it, look at it.

python -m longseq_tutorial.data list
python -m longseq_tutorial.data get speech
python -m longseq_tutorial.data make listops train=2000 valid=500 test=500
python -m longseq_tutorial.data show listops source=sample

`option=value` are the options of `tasks.load`. Whatever is wrong is said in one line, with exit code 2.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import tasks
from .tasks import DataError, Split, Task
from .tasks.base import read_folders, write_folder


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
            options = _fetched(chosen.task) | options
        elif chosen.command == "make" and chosen.task != "listops":
            raise DataError(f"{chosen.task} is recorded, not made; use `get {chosen.task}`. `make listops` makes data.")
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
    except (ValueError, SyntaxError):
        return key, value  # plain words need no quotes


def _fetched(task: str) -> dict[str, Any]:
    """The options that take the real data rather than a stand-in."""
    return {"listops": {"source": "official"}, "speech": {"source": "fsdd"}}[task]


def _list(root: str | None) -> None:
    for name in tasks.names():
        options = ", ".join(f"{key}={value!r}" for key, value in tasks.options(name).items())
        print(f"{name}: {options}")
    print(f"read from:  {', '.join(map(str, read_folders(root)))}")
    print(f"written to: {write_folder(root)}")


def _show(task: Task) -> None:
    config = task.config
    print(f"{config.name}: {config.source}")
    unit = f"samples at {config.sample_rate:,} Hz" if config.kind == "samples" else f"tokens of {config.vocabulary}"
    print(f"{config.kind}: {unit}, at most {config.length:,}; {config.classes} classes")
    for name, split in (("train", task.train), ("valid", task.valid), ("test", task.test)):
        print(f"{name:>5}: {_summary(split, config.classes)}")
    if config.kind == "tokens":
        from .tasks.listops import decode

        tokens, label = task.train[0]
        text = decode(tokens.numpy())
        print(f"first: {text[:70]}{' ...' if len(text) > 70 else ''} = {config.class_names[label]}")


def _summary(split: Split, classes: int) -> str:
    if not len(split):
        return "none"
    low, middle, high = np.percentile(split.lengths, [0, 50, 100]).astype(int)
    share = np.bincount(split.labels, minlength=classes) / len(split)
    return (
        f"{len(split):>7,} sequences, lengths {low:,} to {high:,}, median {middle:,}; "
        f"commonest class {100 * share.max():.1f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
