"""The tasks: data made or loaded, split, and ready to batch.

`load(name)` gives a `Task`; `names()` lists what there is. Every failure is a `DataError` of one line.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np

from .base import Batch, DataError, PairBatch, PairSplit, Split, Task, TaskConfig, collate

__all__ = [
    "Batch", "DataError", "PairBatch", "PairSplit", "Split", "Task", "TaskConfig", "collate", "load", "names",
    "options", "sources",
]  # fmt: skip

_TASKS = (
    "listops",
    "text",
    "retrieval",
    "image",
    "pathfinder",
    "pathx",
    "speech",
)  # one module each, with a function `load`
_MOST = 100_000_000  # items of a part; more than any disk holds


def names() -> tuple[str, ...]:
    """The names that `load` knows."""
    return _TASKS


def options(name: str) -> dict[str, Any]:
    """The options that `load(name, ...)` takes beside root and seed, with their defaults."""
    parameters = inspect.signature(_module(name).load).parameters
    return {key: p.default for key, p in parameters.items() if key not in ("root", "seed")}


def sources(name: str) -> dict[str, str]:
    """The sources that `load(name, source=...)` knows: what each is, how large, and under which licence."""
    return dict(_module(name).SOURCES)


def load(name: str, *, root: str | Path | None = None, seed: int = 0, **chosen: Any) -> Task:
    """Load a task, making or downloading its data where they are not there yet.

    name: one of `names()`. root: a folder to read from and write to; by default data are read from
    LONGSEQ_DATA (if set) and `data/downloads`, and written to the latter. seed: decides generated data.
    chosen: the task's own options, see `options(name)` and the task's module.
    Raises `DataError` for an unknown task or option and for anything wrong with the data.
    """
    known = options(name)
    hints = typing.get_type_hints(_module(name).load)
    for key, value in {"root": root, "seed": seed, **chosen}.items():
        if key not in hints:
            raise DataError(f"task {name!r} has no option {key!r}; it has {', '.join(known)}.")
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise DataError(f"{name}: {key} must be {wanted}; got {value!r}.")
        most = _MOST if key in ("train", "valid", "test") else 2**62
        if key != "seed" and isinstance(value, int) and value > most:
            raise DataError(f"{name}: {key} must be at most {most:,}; got {value:,}.")
    if seed < 0:
        raise DataError(f"seed must be at least 0; got {seed}.")
    task: Task = _module(name).load(root=root, seed=seed, **chosen)
    if not len(task.train):
        raise DataError(f"{name} has nothing to train on; got {task.config.source}. Add training data there.")
    return task


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a plain annotation such as `int | None`; others are not judged here."""
    union = isinstance(hint, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if not all(isinstance(kind, type) for kind in kinds):
        return True
    if isinstance(value, bool):  # True is an int to Python, but no number of examples
        return bool in kinds
    return isinstance(value, kinds) or (int in kinds and isinstance(value, np.integer))


def _module(name: str) -> Any:
    if name not in _TASKS:
        raise DataError(f"unknown task {name!r}; choose from {', '.join(_TASKS)}.")
    return importlib.import_module(f"{__name__}.{name}")
