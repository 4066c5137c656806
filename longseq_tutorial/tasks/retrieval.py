"""Retrieval: do two documents belong together? Each is read byte by byte by the same encoder, then compared.

The task of the Long Range Arena is whether one of two papers of the ACL Anthology Network cites the other (`aan.py`
reads the official files). They are 8 GB to download, so there are two stand-ins, which are named for what they are and
are not that task:

* "imdb-pairs": are two reviews about the same film? As large as one likes, and learned from names and rare words.
* "aan-mini": real citations, but of 1,664 other papers: small, to show the two towers at work.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from . import aan, imdb, text
from .base import DataError, DataNotFound, PairSplit, Split, Task, TaskConfig

SIZES = {"train": 40_000, "valid": 4_000, "test": 8_000}  # of the pairs that are drawn
SAMPLE_SIZES = {"train": 240, "valid": 60, "test": 60}
SOURCES = {
    "aan": "ACL Anthology Network, 182,613 pairs, in the Long Range Arena's archive of 8.2 GB; no data licence stated",
    "imdb-pairs": "two IMDB reviews, same film or not (a stand-in): pairs drawn from the data of task text",
    "aan-mini": "1,664 other ACL papers (a stand-in), if you have the pack; CC BY 4.0, texts CC BY-NC-SA 3.0",
    "sample": "two reviews by a grammar, same film or not (made by this project), MIT",
}
NAMES = {"aan": ("unrelated", "one cites the other"), "films": ("different films", "same film")}


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "auto",
    download: bool = True,
    verify: bool = True,
    length: int = 4_000,
    train: int | None = None,
    valid: int | None = None,
    test: int | None = None,
    undo_repr: bool = False,
) -> Task:
    """Pairs of documents as a `Task` with `pairs=True`: tokens byte + 1 of a vocabulary of 257, two classes.

    source: "aan" is the official task, "imdb-pairs", "aan-mini" and "sample" are the stand-ins; "auto" takes the
    official files if they are here, else the reviews' pairs, else the sample, and says on stderr which it took.
    download: False never touches the network; 8 GB are only fetched by `python -m longseq_tutorial.data get retrieval`.
    verify: the official numbers of pairs and reviews must be there.
    length: each document is cut to this many bytes.
    train, valid, test: how many pairs; None: all of the official ones, else 40,000, 4,000 and 8,000 (240, 60 and 60
    of the sample). Pairs of reviews are drawn from `seed`.
    undo_repr: take away the b'...' around the official texts, which the published task keeps.
    """
    if source not in ("auto", *SOURCES):
        raise DataError(f"source must be 'auto', {', '.join(map(repr, SOURCES))}; got {source!r}.")
    if length < 1:
        raise DataError(f"length must be at least 1 byte; got {length}.")
    sizes = {"train": train, "valid": valid, "test": test}
    for part, n in sizes.items():
        if n is not None and n < 1:
            raise DataError(f"{part} must be at least 1; got {n}.")
    if source == "auto":
        source = _what_is_here(root, download, verify)
    if source in ("aan", "aan-mini"):
        if source == "aan":
            papers = aan.read_official(aan.find_official(root), length, undo_repr, verify)
            described = "ACL Anthology Network, the official Long Range Arena pairs"
            described += "" if verify else ", unverified"
            described += ", b'...' taken away" if undo_repr else ""
        else:
            papers = aan.read_mini(root)
            described = "aan-mini: citations among 1,664 ACL papers, a stand-in for the Long Range Arena's pairs"
        documents = _documents(papers.text, papers.offsets, length)
        whole = PairSplit(documents, papers.pairs, papers.label)
        parts = {}
        for number, (part, n) in enumerate(sizes.items()):
            places = np.flatnonzero(papers.split == number)
            if n is not None and n > len(places):
                raise DataError(f"{part} must be at most {len(places):,}; got {n}.")
            # The files are sorted; a part of them must not be.
            parts[part] = whole.select(np.random.default_rng(number).permutation(places)[:n])
        names = NAMES["aan"]
    else:
        parts, described = _films(root, source, download, verify, length, sizes, seed)
        names = NAMES["films"]
    config = TaskConfig(
        name="retrieval",
        kind="tokens",
        classes=2,
        length=length,
        vocabulary=text.VOCABULARY,
        class_names=names,
        pairs=True,
        source=f"{described}, first {length:,} bytes of each",
    )
    return Task(config, parts["train"], parts["valid"], parts["test"])


def _what_is_here(root: str | Path | None, download: bool, verify: bool) -> str:
    try:
        aan.find_official(root)
        return "aan"
    except DataNotFound:
        pass
    try:
        imdb.find(root, download=download, verify=verify)
        chosen = "imdb-pairs"
    except DataNotFound:
        chosen = "sample"
    print(f"No official pairs of papers here: using source={chosen!r}, a stand-in.", file=sys.stderr)
    return chosen


def _documents(values: np.ndarray, offsets: np.ndarray, length: int) -> Split:
    return Split(values, offsets, np.zeros(len(offsets) - 1, np.int64), length, shift=1)


def _films(
    root: str | Path | None,
    source: str,
    download: bool,
    verify: bool,
    length: int,
    sizes: dict[str, int | None],
    seed: int,
) -> tuple[dict[str, PairSplit], str]:
    """Pairs of reviews for each part, and what they are."""
    if source == "sample":
        values, offsets, label, part, film = text.sample()
        described = "same-film pairs of reviews by a grammar (made by this project)"
    else:
        reviews = imdb.find(root, download=download, verify=verify)
        values, offsets, label, film = reviews.text, reviews.offsets, reviews.label, reviews.movie_id
        part = np.where(reviews.split == 1, 2, 0)
        in_both = np.isin(film, np.intersect1d(film[part == 0], film[part == 2]))
        part[in_both] = -1  # a film of both official parts is left out
        part[text.held_out(film, part == 0, int(0.1 * (part == 0).sum()))] = 1
        described = f"IMDB same-film pairs, a stand-in for the Long Range Arena's, seed {seed}"
        described += "" if verify else ", unverified"
    documents = _documents(values, offsets, length)
    parts = {}
    for number, (name, n) in enumerate(sizes.items()):
        count = n if n is not None else (SAMPLE_SIZES if source == "sample" else SIZES)[name]
        rng = np.random.default_rng([seed, number])
        pairs, same = draw_pairs(rng, np.flatnonzero(part == number), film, label, count)
        parts[name] = PairSplit(documents, pairs, same)
    return parts, described


def draw_pairs(
    rng: np.random.Generator, places: np.ndarray, film: np.ndarray, label: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """`count` pairs of reviews among `places`, (count, 2), every second about one film, and their labels.

    Pairs about one film are drawn uniformly over the films that have two reviews. Each has a partner about two films
    with the same two opinions, so that opinions give nothing away.
    Raises `DataError` where no film has two reviews, or all reviews are about one.
    """
    places = places[np.argsort(film[places], kind="stable")]
    films, start, number = np.unique(film[places], return_index=True, return_counts=True)
    several = np.flatnonzero(number >= 2)
    if not len(several) or len(films) < 2:
        raise DataError("need at least two films, and one with two reviews, to draw pairs from.")
    half = -(-count // 2)
    chosen = rng.choice(several, half)
    first = rng.integers(0, number[chosen])
    second = (first + 1 + rng.integers(0, number[chosen] - 1)) % number[chosen]
    same = np.stack([places[start[chosen] + first], places[start[chosen] + second]], 1)  # (half, 2)
    different = np.empty_like(same)
    by_opinion = [places[label[places] == opinion] for opinion in (0, 1)]
    left = np.arange(half)
    for _ in range(100):
        for side in range(2):
            for opinion in (0, 1):
                rows = left[label[same[left, side]] == opinion]
                if len(rows):
                    different[rows, side] = rng.choice(by_opinion[opinion], len(rows))
        left = left[film[different[left, 0]] == film[different[left, 1]]]
        if not len(left):
            break
    else:
        raise DataError("too few films of each opinion to draw pairs about two films.")
    pairs = np.concatenate([same, different])
    labels = np.repeat(np.array([1, 0], np.uint8), half)
    order = rng.permutation(2 * half)[:count]
    return pairs[order], labels[order]
