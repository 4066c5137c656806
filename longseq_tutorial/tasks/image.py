"""Image: what is in the picture? A grey photograph of 32 x 32 read pixel by pixel, 1,024 steps, ten classes.

The task of the Long Range Arena on CIFAR-10 (`cifar.py` finds or downloads it). Without a copy and without a network
there is the project's own sample, drawn shapes, a far easier task.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from . import cifar
from .base import REPOSITORY_DATA, DataError, DataNotFound, Split, Task, TaskConfig
from .packs import read_npz

SAMPLE = "image_sample.npz"
SHAPES = ("disc", "ring", "square", "frame", "triangle", "cross", "bars", "columns", "checks", "corner")
SPLIT_SEED = 42  # of the division into training and validation, which S4 and Mega draw with the same seed
LEVELS = {"mega": (0.48, 0.24), "s4": (122.6 / 255, 61.0 / 255)}  # mean and deviation that are taken off, of 0 to 1
SOURCES = {
    "cifar10": "CIFAR-10, binary version, 60,000 photographs, 170 MB; no licence stated, cite Krizhevsky 2009",
    "cifar10-jpeg": "JPEG copies of CIFAR-10 (about 6 grey levels off), if you have the pack; no licence stated",
    "sample": "250 drawn shapes (made by this project), MIT",
}
_SAMPLE_FORM = {"grey": ("uint8", 2), "label": ("uint8", 1), "split": ("uint8", 1)}


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "auto",
    download: bool = True,
    verify: bool = True,
    valid: int = 5_000,
    kind: str = "samples",
    normalise: str | None = "mega",
) -> Task:
    """Grey pictures as a `Task`: one pixel a step, ten classes.

    source: "cifar10" is the official data, "cifar10-jpeg" a pack of JPEG copies, "sample" drawn shapes, in the
    repository; "auto" takes the first of these that is here or to be had. `task.config.source` says which it was.
    download: False never touches the network. verify: all 60,000 must be there; False takes any number.
    valid: so many of the 50,000 training pictures are held out at random to choose by; 0 trains on all.
    kind: "samples" gives real numbers, "tokens" pixel + 1, so that black is not padding (the Arena reads tokens).
    normalise: for samples: "mega" is (x / 255 - 0.48) / 0.24, "s4" the same with 122.6 and 61 of 255, None x / 255.
    seed: nothing here is drawn from it; validation is the same for every seed.
    """
    if source not in ("auto", *SOURCES):
        raise DataError(f"source must be 'auto', {', '.join(map(repr, SOURCES))}; got {source!r}.")
    if kind not in ("samples", "tokens"):
        raise DataError(f"kind must be 'samples' or 'tokens'; got {kind!r}.")
    if normalise is not None and normalise not in LEVELS:
        raise DataError(f"normalise must be 'mega', 's4' or None; got {normalise!r}.")
    photographs = None
    if source != "sample":
        jpeg = {"auto": None, "cifar10": False, "cifar10-jpeg": True}[source]
        try:
            photographs = cifar.find(root, download=download, jpeg=jpeg, verify=verify)
        except DataNotFound as missing:
            if source != "auto":
                raise
            print(f"No real photographs: {missing} Using drawn shapes instead.", file=sys.stderr)
    if photographs is None:
        grey, label, part = sample()
        names, described = SHAPES, "drawn shapes (made by this project)"
    else:
        grey, label, names = photographs.grey, photographs.label, cifar.CLASSES
        part = np.where(photographs.split == 1, 2, 0)
        training = np.flatnonzero(part == 0)
        if not 0 <= valid < len(training):
            raise DataError(f"valid must be from 0 to {len(training) - 1:,}; got {valid}.")
        part[np.random.default_rng(SPLIT_SEED).permutation(training)[:valid]] = 1
        kind_of = "JPEG copy, not pixel-identical to the official data" if photographs.jpeg else "official data"
        kind_of += "" if verify else ", unverified"
        described = f"CIFAR-10 ({kind_of}), grey, {valid:,} of the training pictures held out for validation"
    offsets = np.arange(len(label) + 1, dtype=np.int64) * cifar.SIZE**2
    if kind == "tokens":
        split = Split(grey.reshape(-1), offsets, label, shift=1)
    else:
        mean, deviation = LEVELS[normalise] if normalise else (0.0, 1.0)
        split = Split(grey.reshape(-1), offsets, label, scale=1 / (255 * deviation), shift=-mean / deviation)
    train, valid_part, test = (split.select(part == number) for number in range(3))
    config = TaskConfig(
        name="image",
        kind=kind,
        classes=10,
        length=cifar.SIZE**2,
        vocabulary=257 if kind == "tokens" else 0,
        class_names=names,
        source=described,
        grid=(cifar.SIZE, cifar.SIZE),
    )
    return Task(config, train, valid_part, test)


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pictures in the repository: grey (n, 1024), label and part (0, 1, 2)."""
    path = REPOSITORY_DATA / SAMPLE
    mend = "Get it back with `git checkout`, or make it with data/make_image_sample.py."
    pack = read_npz(path, _SAMPLE_FORM, mend)
    grey, label, part = pack["grey"], pack["label"], pack["split"]
    if not len(grey) == len(label) == len(part) > 0 or grey.shape[1] != cifar.SIZE**2 or label.max() > 9:
        raise DataError(f"{path}: its arrays do not fit each other. {mend}")
    return grey, label, part
