"""The Large Movie Review Dataset: found on this machine, or downloaded, as bytes.

50,000 film reviews of the Internet Movie Database, half for training and half for the test, half of each positive
(7 to 10 stars) and half negative (1 to 4), collected by A. Maas et al. (ACL 2011). The authors state no licence and
ask to be cited; the reviews belong to their writers. They are no part of this repository.

They are looked for as a pack (`imdb_bytes.npz.xz` or `imdb_bytes.npz`, described in `data/README.md`), as the
unpacked `aclImdb` folder, or as the archive itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .base import DataError, DataNotFound, read_folders, write_folder
from .downloads import download, tar_members, whole
from .packs import read_npz, write_npz

ARCHIVE = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
SHA256 = "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe"
PACKS = ("imdb_bytes.npz.xz", "imdb_bytes.npz")
EACH = 12_500  # reviews of each part and label
_NAME = re.compile(r"(?:aclImdb/)?(train|test)/(pos|neg)/(\d{1,6})_(\d{1,2})\.txt")
_URLS = re.compile(r"(?:aclImdb/)?(train|test)/urls_(pos|neg)\.txt")
_FILM = re.compile(rb"/title/tt(\d{1,9})(?:/|$)")
_LARGEST = 10_000_000  # bytes of a single file; the longest review has 14 kB, a list of addresses 600 kB
_MEND = "Delete it or put a good copy in its place."
_FORM = {
    "text": ("uint8", 1), "offsets": ("int64", 1), "label": ("uint8", 1), "rating": ("uint8", 1),
    "split": ("uint8", 1), "review_id": ("int32", 1), "movie_id": ("int32", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Reviews:
    """The reviews: the bytes of review i are `text[offsets[i] : offsets[i + 1]]`."""

    text: np.ndarray  # (bytes,) uint8, UTF-8, `<br />` included
    offsets: np.ndarray  # (reviews + 1,) int64
    label: np.ndarray  # (reviews,) uint8: 1 is positive
    rating: np.ndarray  # (reviews,) uint8 stars
    split: np.ndarray  # (reviews,) uint8: 0 training, 1 test
    review_id: np.ndarray  # (reviews,) int32: the number in the file name
    movie_id: np.ndarray  # (reviews,) int32: the film, as its address at IMDb has it

    def __len__(self) -> int:
        return len(self.label)


def find(root: str | Path | None = None, *, download: bool = True, verify: bool = True) -> Reviews:
    """The reviews from a pack, a folder or the archive in the data folders, else downloaded.

    root: see `base.read_folders`. download: False never touches the network. verify: check that all 50,000 are there;
    False takes any number.
    Raises `DataNotFound` when there are none, `DataError` when what is there is broken.
    """
    for folder in read_folders(root):
        for name in PACKS:
            if (folder / name).exists():
                return _checked(read_pack(folder / name), folder / name, verify)
        for inner in (folder / "aclImdb", folder):
            if (inner / "train" / "pos").is_dir():
                return _checked(read_folder(inner), inner, verify)
        archive = folder / ARCHIVE.rsplit("/", 1)[-1]
        if archive.exists():
            return _checked(read_archive(archive), archive, verify)
    if not download:
        raise DataNotFound(f"the IMDB reviews are not here. {advice(root)}")
    return fetch(root)


def fetch(root: str | Path | None = None) -> Reviews:
    """Download the official archive (84 MB), check it, and keep its labelled reviews as a pack.

    Raises `DataNotFound` without a network.
    """
    folder = write_folder(root)
    archive = download(ARCHIVE, f"sha256:{SHA256}", folder, advice(root))
    reviews = _checked(read_archive(archive), archive, verify=True)
    write_npz(folder / "imdb_bytes.npz", {field.name: getattr(reviews, field.name) for field in fields(reviews)})
    archive.unlink()
    return reviews


def advice(root: str | Path | None) -> str:
    """What to do where there are no reviews."""
    place = "root" if root is not None else "LONGSEQ_DATA"
    return (
        "With a network, run `python -m longseq_tutorial.data get text`; without, put "
        f"{ARCHIVE.rsplit('/', 1)[-1]}, its unpacked folder aclImdb or {PACKS[0]} into a folder and name it in "
        f"{place}, or use source='sample'."
    )


def read_pack(path: Path) -> Reviews:
    """Reviews from a pack. Raises `DataError` where the file or its arrays are not right."""
    reviews = Reviews(**read_npz(path, _FORM, _MEND))
    count = len(reviews)
    if {len(getattr(reviews, name)) for name in _FORM if name not in ("text", "offsets")} != {count}:
        raise DataError(f"{path}: its arrays disagree on the number of reviews. {_MEND}")
    faults = {
        "there are no reviews": count == 0,
        "its arrays disagree on the number of reviews": len(reviews.offsets) != count + 1,
        "offsets do not rise from 0 to the end of the text": len(reviews.offsets) == 0
        or reviews.offsets[0] != 0
        or reviews.offsets[-1] != len(reviews.text)
        or bool((np.diff(reviews.offsets) < 1).any()),
        "a label is neither 0 nor 1, or a part neither training nor test": bool(
            (reviews.label > 1).any() or (reviews.split > 1).any()
        ),
        "a review is labelled against its stars": bool(
            ((reviews.rating >= 7) != (reviews.label == 1)).any()
            or np.isin(reviews.rating, (0, 5, 6)).any()
            or (reviews.rating > 10).any()
        ),
    }
    for fault, there in faults.items():
        if there:
            raise DataError(f"{path}: {fault}. {_MEND}")
    return reviews


def read_folder(folder: Path) -> Reviews:
    """Reviews from the unpacked archive; other files are left alone."""

    def files() -> Iterator[tuple[str, bytes]]:
        places = [folder / part / inner for part in ("train", "test") for inner in ("", "pos", "neg")]
        paths = [path for place in places for path in sorted(place.glob("*.txt"))]
        for path in tqdm(paths, desc="reading reviews", unit="file", leave=False, delay=2):
            try:
                if path.stat().st_size > _LARGEST:
                    raise DataError(f"{path} has over {_LARGEST:,} bytes; a review has fewer.")
                yield path.relative_to(folder).as_posix(), path.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}.") from error

    return _gather(files(), str(folder))


def read_archive(path: Path) -> Reviews:
    """Reviews from the archive, read by their names without unpacking it."""
    mend = "Delete it, and it is downloaded again."
    members = tar_members(
        path, lambda name: bool(_NAME.fullmatch(name) or _URLS.fullmatch(name)), _LARGEST, mend, "reading reviews"
    )
    return _gather(((name, whole(file, size, f"{path}: {name}", mend)) for name, file, size in members), str(path))


def _gather(files: Iterable[tuple[str, bytes]], where: str) -> Reviews:
    """Put named files together, sorted by part, label and number. Raises `DataError` for what is missing or wrong."""
    reviews: dict[tuple[int, int, int], tuple[int, bytes]] = {}
    films: dict[tuple[int, int], list[int]] = {}
    for name, content in files:
        if match := _URLS.fullmatch(name):
            key = (int(match[1] == "test"), int(match[2] == "pos"))
            if key in films:
                raise DataError(f"{where}: there are two lists {match[1]}/urls_{match[2]}.txt. {_MEND}")
            found = [_FILM.search(line) for line in content.splitlines()]
            if not all(found):
                row = next(i for i, film in enumerate(found, start=1) if not film)
                raise DataError(f"{where}: {name}, line {row}, is no film's address (.../title/tt0012345/...).")
            films[key] = [int(film[1]) for film in found if film]
        elif match := _NAME.fullmatch(name):
            part, label, number, rating = int(match[1] == "test"), int(match[2] == "pos"), int(match[3]), int(match[4])
            if (rating >= 7) != bool(label) or rating in (0, 5, 6) or rating > 10:
                raise DataError(f"{where}: {name} lies among the {match[2]} reviews and has {rating} stars.")
            if not content.strip():
                raise DataError(f"{where}: {name} is empty.")
            if (part, label, number) in reviews:
                raise DataError(f"{where}: there are two reviews {match[1]}/{match[2]}/{number}.")
            reviews[part, label, number] = rating, content
    if not reviews:
        raise DataError(f"{where} holds no review named like train/pos/127_10.txt. {_MEND}")
    keys = sorted(reviews)
    for part, label, number in keys:
        if number >= len(films.get((part, label), ())):
            name = f"{('train', 'test')[part]}/urls_{('neg', 'pos')[label]}.txt"
            raise DataError(f"{where}: {name} names no film for review {number}. {_MEND}")
    texts = [reviews[key][1] for key in keys]
    return Reviews(
        text=np.frombuffer(b"".join(texts), np.uint8),
        offsets=np.cumsum([0] + [len(text) for text in texts], dtype=np.int64),
        label=np.array([label for _, label, _ in keys], np.uint8),
        rating=np.array([reviews[key][0] for key in keys], np.uint8),
        split=np.array([part for part, _, _ in keys], np.uint8),
        review_id=np.array([number for _, _, number in keys], np.int32),
        movie_id=np.array([films[part, label][number] for part, label, number in keys], np.int32),
    )


def _checked(reviews: Reviews, where: Path | str, verify: bool) -> Reviews:
    counts = np.bincount(2 * reviews.split.astype(int) + reviews.label, minlength=4)
    if verify and counts.tolist() != [EACH] * 4:
        raise DataError(
            f"{where} holds {', '.join(f'{n:,}' for n in counts)} reviews (training negative, positive, test negative, "
            f"positive) instead of {EACH:,} each. {_MEND[:-1]}, or pass verify=False to use what is there."
        )
    return reviews
