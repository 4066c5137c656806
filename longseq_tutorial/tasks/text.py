"""Text: is a film review positive? Read byte by byte, up to 4,096 of them.

The task of the Long Range Arena on the IMDB reviews, official training and test parts (`imdb.py` finds or downloads
them). The Arena has no validation part and chooses by the test; here whole films are held out of training instead,
so that no review of a film that was trained on is used to choose. Without a copy and without a network there is the
project's own sample, reviews put together by a small grammar.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

from . import imdb
from .base import REPOSITORY_DATA, DataError, DataNotFound, Split, Task, TaskConfig
from .packs import read_npz

SAMPLE = "text_sample.npz"
CLASS_NAMES = ("negative", "positive")
VOCABULARY = 257  # 256 bytes, one above the padding
SOURCES = {
    "imdb": "Large Movie Review Dataset v1.0, 50,000 reviews, 84 MB; no licence stated, cite Maas et al. 2011",
    "sample": "360 reviews by a grammar (made by this project), MIT",
}
_SAMPLE_FORM = {
    "text": ("uint8", 1), "offsets": ("int64", 1), "label": ("uint8", 1), "split": ("uint8", 1),
    "movie_id": ("int32", 1),
}  # fmt: skip


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "auto",
    download: bool = True,
    verify: bool = True,
    length: int = 4_096,
    valid: int = 2_500,
    test: int | None = None,
) -> Task:
    """Film reviews as a `Task`: tokens byte + 1 of a vocabulary of 257, two classes.

    source: "imdb" is the real reviews, "sample" those of a grammar, in the repository; "auto" takes the real ones, and
    the sample with a printed notice when they are neither here nor to be had. `task.config.source` says which it was.
    download, verify: see `imdb.find`.
    length: reviews are cut to this many bytes (the Arena: 1,000 to 4,000; S4: 4,096, which cuts 2.8 % of them).
    valid: at least so many training reviews are held out to choose by, whole films at a time; 0 trains on all.
    test: so many test reviews, evenly spaced, so that both classes and all kinds of films keep their share; None: all.
    seed: nothing here is drawn; it is taken so that all tasks load alike.
    """
    if source not in ("auto", *SOURCES):
        raise DataError(f"source must be 'auto', 'imdb' or 'sample'; got {source!r}.")
    if length < 1:
        raise DataError(f"length must be at least 1 byte; got {length}.")
    if test is not None and test < 1:
        raise DataError(f"test must be at least 1 review, or None for all; got {test}.")
    reviews = None
    if source != "sample":
        try:
            reviews = imdb.find(root, download=download, verify=verify)
        except DataNotFound as missing:
            if source == "imdb":
                raise
            print(f"No real reviews: {missing} Using the sample instead.", file=sys.stderr)
    if reviews is None:
        text, offsets, label, part, _ = sample()
        described = "reviews by a grammar (made by this project)"
    else:
        text, offsets, label = reviews.text, reviews.offsets, reviews.label
        held = held_out(reviews.movie_id, reviews.split == 0, valid)
        part = np.where(reviews.split == 1, 2, np.where(held, 1, 0))
        if not (part == 0).any():
            raise DataError(
                f"no reviews are left to train on with valid={valid}; there are {int((part != 2).sum()):,}."
            )
        kind = "IMDB reviews" if verify else "reviews like IMDB's, unverified"
        said = (
            f"{int(held.sum()):,} training reviews of whole films held out for validation" if valid else "none held out"
        )
        described = f"{kind}, official split, {said}"
    split = Split(text, offsets, label, length, shift=1)
    training, validation, testing = (split.select(part == number) for number in range(3))
    if test is not None and test < len(testing):
        some = np.zeros(len(testing), dtype=bool)
        some[np.arange(test) * len(testing) // test] = True
        testing = testing.select(some)
        described += f", {test:,} of the test reviews"
    config = TaskConfig(
        name="text",
        kind="tokens",
        classes=2,
        length=length,
        vocabulary=VOCABULARY,
        class_names=CLASS_NAMES,
        source=f"{described}, first {length:,} bytes",
    )
    return Task(config, training, validation, testing)


def held_out(film: np.ndarray, candidates: np.ndarray, least: int) -> np.ndarray:
    """Which reviews are held out (bool): all of so many films that at least `least` of the candidates are.

    The films are chosen by a hash of their number: the same ones everywhere, however the reviews are ordered.
    """
    if least < 0:
        raise DataError(f"valid must be at least 0; got {least}.")
    numbers, counts = np.unique(film[candidates], return_counts=True)
    order = np.argsort([hashlib.sha1(str(number).encode()).hexdigest() for number in numbers])
    before = np.concatenate([[0], np.cumsum(counts[order])[:-1]]) if len(order) else np.zeros(0)
    return candidates & np.isin(film, numbers[order[before < least]])


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The reviews in the repository: text, offsets, label, part (0, 1, 2) and film."""
    path = REPOSITORY_DATA / SAMPLE
    mend = "Get it back with `git checkout`, or make it with data/make_text_sample.py."
    pack = read_npz(path, _SAMPLE_FORM, mend)
    count = len(pack["label"])
    sizes = {len(pack["offsets"]) - 1, count, len(pack["split"]), len(pack["movie_id"])}
    if len(sizes) > 1 or not count or pack["offsets"][-1] != len(pack["text"]) or pack["label"].max() > 1:
        raise DataError(f"{path}: its arrays do not fit each other. {mend}")
    return pack["text"], pack["offsets"], pack["label"], pack["split"], pack["movie_id"]
