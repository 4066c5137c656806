"""Path-X: Pathfinder at 128 x 128, so that a path must be followed through a sequence of 16,384 pixels.

The task of the Long Range Arena at which every model of its paper failed. See `pathfinder.py`, which does the work.
"""

from __future__ import annotations

from pathlib import Path

from . import pathfinder
from .base import Task

SOURCES = {
    **pathfinder.SOURCES,
    "generated": "made from a seed by the published rule, 200,000 pictures, about an hour on two cores",
    "sample": "60 pictures (made by this project), MIT",
}


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "generated",
    paddles: int = 14,
    train: int | None = None,
    valid: int | None = None,
    test: int | None = None,
    kind: str = "samples",
    workers: int | None = None,
    progress: bool = True,
) -> Task:
    """Path-X as a `Task`: `pathfinder.load` at size 128, see there. The full size takes about an hour to make, once."""
    return pathfinder.load(
        root=root,
        seed=seed,
        source=source,
        size=128,
        paddles=paddles,
        train=train,
        valid=valid,
        test=test,
        kind=kind,
        workers=workers,
        progress=progress,
    )
