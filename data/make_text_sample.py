"""Make `text_sample.npz`: 360 film reviews by a small grammar, for the tasks text and retrieval.

    python data/make_text_sample.py [FILE]

Sixty films that never were, each with a place, a thing, a season and a kind that every review of it speaks of; six
reviews of each, three that like it and three that do not. Films are dealt to training, validation or test, so a
review must be read for its opinion, not for its film. The same file comes out every time.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

from longseq_tutorial.tasks.packs import write_npz

FILMS = {"train": 40, "valid": 10, "test": 10}
REVIEWS = 6  # of each film
PLACES = ("lighthouse", "harbour", "sawmill", "orchard", "tunnel", "glacier", "library", "circus", "bakery", "desert")
THINGS = ("bicycle", "telescope", "violin", "suitcase", "lantern", "typewriter", "compass", "kettle", "mirror", "kite")
KINDS = ("thriller", "comedy", "western", "romance", "documentary", "mystery", "musical", "war film")
SEASONS = ("one winter", "a long summer", "the first days of spring", "a rainy autumn")
OPEN = (
    "I saw this {kind} about the {place} last week", "This is the {kind} in which a {thing} goes missing",
    "A {kind} set in a {place} during {season}", "We rented it because of the {thing} on the cover",
)  # fmt: skip
GOOD = (
    "the pictures of the {place} are beautiful", "every scene with the {thing} is a delight", "the ending moved me",
    "the music carries {season} wonderfully", "the cast is superb", "it never loses its pace", "I laughed and I cried",
    "the dialogue is sharp and true", "it is the best {kind} in years", "I would gladly watch it again",
)  # fmt: skip
BAD = (
    "the pictures of the {place} are dull", "every scene with the {thing} drags on", "the ending makes no sense",
    "the music ruins {season} completely", "the cast looks bored", "it loses its pace at once", "I nearly fell asleep",
    "the dialogue is flat and false", "it is the worst {kind} in years", "I want my two hours back",
)  # fmt: skip
FILLER = (
    "The story begins at the {place} and stays there", "Much of it takes place in {season}",
    "A stranger brings the {thing} to the {place}", "It runs for about {minutes} minutes",
    "They say it was filmed in {weeks} weeks", "Half of it has no words at all",
)  # fmt: skip
TURN_GOOD = ("Some scenes are slow, but ", "I expected little, and yet ", "Others may disagree; for me ", "")
TURN_BAD = ("Some scenes are fine, but ", "I expected much, and yet ", "Others may disagree; for me ", "")


def main(path: Path) -> None:
    rng = np.random.default_rng(257)
    tuples = list(itertools.product(PLACES, THINGS, KINDS, SEASONS))
    films = [tuples[i] for i in rng.permutation(len(tuples))[: sum(FILMS.values())]]
    parts = [number for number, count in enumerate(FILMS.values()) for _ in range(count)]
    rows = [
        (review(rng, films[film], bool(i % 2)), i % 2, parts[film], film)
        for film in range(len(films))
        for i in range(REVIEWS)
    ]
    texts = [text.encode() for text, *_ in rows]
    arrays = {
        "text": np.frombuffer(b"".join(texts), np.uint8),
        "offsets": np.cumsum([0] + [len(text) for text in texts], dtype=np.int64),
        "label": np.array([row[1] for row in rows], np.uint8),
        "split": np.array([row[2] for row in rows], np.uint8),
        "movie_id": np.array([row[3] for row in rows], np.int32),
    }
    write_npz(path, arrays)
    print(f"{path}: {len(rows)} reviews, {path.stat().st_size / 1024:.0f} KiB")


def review(rng: np.random.Generator, film: tuple[str, str, str, str], good: bool) -> str:
    """One review: an opening, facts and opinions in a drawn order, now and then a line break as on the web."""
    words = dict(zip(("place", "thing", "kind", "season"), film, strict=True))
    words |= {"minutes": str(rng.integers(70, 190)), "weeks": str(rng.integers(3, 30))}
    opinions = list(rng.choice(GOOD if good else BAD, rng.integers(2, 7), replace=False))
    facts = list(rng.choice(FILLER, rng.integers(1, 6), replace=False))
    turn = str(rng.choice(TURN_GOOD if good else TURN_BAD))
    sentences = [turn + opinions[0], *opinions[1:], *facts]
    sentences = [str(rng.choice(OPEN)), *(sentences[i] for i in rng.permutation(len(sentences)))]
    text = ""
    for sentence in sentences:
        said = sentence.format(**words)
        text += ("<br /><br />" if text and rng.random() < 0.15 else " " if text else "") + said[0].upper() + said[1:]
        text += str(rng.choice([".", ".", ".", "!"]))
    return text


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "text_sample.npz")
