"""A task and a recipe small enough to train in a second: which of three tokens is the commonest?"""

from typing import Any

import numpy as np
import torch

from longseq_tutorial.tasks import Batch, Split, Task, TaskConfig
from longseq_tutorial.training import Recipe

SMALL = {"dim": 16, "layers": 1, "z_dim": 8, "v_dim": 16, "ffn_dim": 16, "n": 4, "head_dim": 16}

_OTHER = {"dim": 16, "layers": 1, "ffn_dim": 16, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "mega": SMALL,
    "mega-chunk": {**SMALL, "chunk": 8},
    "seqboat": {key: value for key, value in SMALL.items() if key != "ffn_dim"} | {"window": 8},
    "longvq": {**SMALL, "codes": 8, "window": 4},
    "fastrpb": {**_OTHER, "heads": 2, "qkv_dim": 16, "max_positions": 32},
    "spade": {**_OTHER, "heads": 2, "state": 8, "window": 8},
    "transformer": {**_OTHER, "heads": 2},
}


def split(count: int, seed: int, longest: int = 23) -> Split:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, longest + 1, count)
    labels = rng.integers(0, 3, count)
    pieces = [
        np.where(rng.random(n) < 0.6, label + 1, rng.integers(1, 4, n))
        for n, label in zip(lengths, labels, strict=True)
    ]
    return Split(np.concatenate(pieces).astype(np.uint8), np.concatenate([[0], np.cumsum(lengths)]), labels)


def noise(batch: Batch, generator: torch.Generator) -> Batch:
    """Replace a tenth of the tokens."""
    change = torch.rand(batch.x.shape, generator=generator) < 0.1
    other = torch.randint(1, 4, batch.x.shape, generator=generator)
    return batch._replace(x=torch.where(change & batch.mask, other, batch.x))


def task(train: int = 70) -> Task:
    config = TaskConfig("tiny", "tokens", 3, 23, vocabulary=4, class_names=("a", "b", "c"), source="made by a test")
    return Task(config, split(train, 1), split(30, 2), split(30, 3), augment=noise)


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "task": "tiny",
        "model": "mega",
        "name": "test",
        "overrides": {**SMALL, "dropout": 0.1},
        "epochs": 4,
        "batch": 8,
        "lr": 0.01,
        "warmup": 3,
        "augment": True,
    }
    return Recipe(**{**fields, **changes})
