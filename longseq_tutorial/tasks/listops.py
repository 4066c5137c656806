"""ListOps: the value of a long nested list expression, read as a flat sequence of tokens.

The ListOps task of the Long Range Arena, made here from a seed (the language and the rule are in
`expressions.py`), or read from the official files. Ten classes, the value of the expression; the commonest
has a share of about 17 %.

The stream of expressions of a seed is dealt out as test, validation, training, so a larger training part
extends a smaller one and leaves the other two as they are. It is kept on disk in chunks of 1,000: a second
call reads them, a longer one adds to them, and one that was interrupted goes on after the last whole chunk.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from tqdm.auto import tqdm

from .base import REPOSITORY_DATA, DataError, DataNotFound, Split, Task, TaskConfig, read_folders, write_folder
from .expressions import VOCABULARY, Shape, Stream, decode, encode, evaluate
from .packs import read_npz, write_npz

__all__ = ["VOCABULARY", "Shape", "decode", "encode", "evaluate", "load", "make", "read_tsv"]

ARCHIVE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
LENGTH = Shape().max_length
CHUNK = 1_000  # expressions in a file of the cache
SIZES = {"train": 96_000, "valid": 2_000, "test": 2_000}
SAMPLE_SIZES = {"train": 120, "valid": 40, "test": 40}
SOURCES = {
    "generated": "made from a seed by the published rule, 100,000 expressions, about a minute",
    "official": "the Long Range Arena's files, if you have them (an archive of 8.2 GB, no data licence stated)",
    "sample": "200 rows (made by this project), MIT",
}
_LARGEST_ROW = 10_000_000  # bytes; those of the official files have some 30 kB
_MEND = "Delete it, and it is made again."
OFFICIAL_FILES = {"train": "basic_train.tsv", "valid": "basic_val.tsv", "test": "basic_test.tsv"}
_INSIDE = ("", "listops-1000", "listops", "lra_release/listops-1000", "lra_release/lra_release/listops-1000")


_CHUNK_FORM = {
    "tokens": ("uint8", 1),
    "offsets": ("int64", 1),
    "labels": ("uint8", 1),
    "state": ("uint32", 1),
}


def make(seed: int, count: int, shape: Shape, folder: Path, progress: bool = True) -> Split:
    """The first `count` expressions of the stream, read from `folder` as far as they are there, else made.

    A chunk reaches its name only when it is whole, so a killed run leaves nothing half made, and two
    processes that make the same chunk write the same bytes.
    """
    described = json.dumps({"seed": seed, **asdict(shape)}, sort_keys=True)
    home = folder / "listops" / hashlib.sha256(described.encode()).hexdigest()[:12]
    paths = [home / f"{number:05d}.npz" for number in range(-(-count // CHUNK))]
    ready = next((i for i, path in enumerate(paths) if not path.exists()), len(paths))
    chunks = [_read_chunk(path, shape) for path in paths[:ready]]
    if ready < len(paths):
        stream = Stream(seed, shape)
        for path, chunk in zip(paths, chunks, strict=False):
            try:
                stream.resume(chunk["tokens"], chunk["offsets"], chunk["state"])
            except ValueError as error:
                raise DataError(f"{path}: its random numbers cannot go on ({error}). {_MEND}") from error
        total, done = len(paths) * CHUNK, ready * CHUNK
        with tqdm(total=total, initial=done, unit="expr", desc="making ListOps", disable=not progress) as bar:
            for path in paths[ready:]:
                chunks.append(_make_chunk(stream, bar))
                write_npz(path, chunks[-1])
    tokens = np.concatenate([chunk["tokens"] for chunk in chunks])
    lengths = np.concatenate([np.diff(chunk["offsets"]) for chunk in chunks])[:count]
    labels = np.concatenate([chunk["labels"] for chunk in chunks])[:count]
    return Split(tokens, np.concatenate([[0], np.cumsum(lengths)]), labels)


def _make_chunk(stream: Stream, bar: tqdm) -> dict[str, np.ndarray]:
    drawn = []
    for _ in range(CHUNK):
        drawn.append(next(stream))
        bar.update()
    return {
        "tokens": np.frombuffer(b"".join(tokens for tokens, _ in drawn), dtype=np.uint8),
        "offsets": np.cumsum([0] + [len(tokens) for tokens, _ in drawn], dtype=np.int64),
        "labels": np.array([value for _, value in drawn], dtype=np.uint8),
        "state": stream.state(),
    }


def _read_chunk(path: Path, shape: Shape) -> dict[str, np.ndarray]:
    chunk = read_npz(path, _CHUNK_FORM, _MEND)
    tokens, offsets, labels = chunk["tokens"], chunk["offsets"], chunk["labels"]
    fits = len(labels) == CHUNK and len(offsets) == CHUNK + 1 and offsets[-1] == len(tokens)
    if not fits or offsets[0] != 0 or (np.diff(offsets) < 1).any() or len(chunk["state"]) != 625 or labels.max() > 9:
        raise DataError(f"{path} is not a chunk of {CHUNK:,} expressions. {_MEND}")
    lengths = np.diff(offsets)
    if lengths.min() <= shape.min_length or lengths.max() >= shape.max_length or tokens.min() < 1 or tokens.max() > 15:
        raise DataError(
            f"{path} wanted lengths between {shape.min_length:,} and {shape.max_length:,} and tokens 1 to 15; got "
            f"{lengths.min():,} to {lengths.max():,} and {tokens.min()} to {tokens.max()}. {_MEND}"
        )
    try:
        value = evaluate(tokens[: offsets[1]])
    except DataError as error:
        raise DataError(f"{path}: {error} {_MEND}") from None
    if value != labels[0]:
        raise DataError(f"{path}: the first expression has the value {value}; its label is {labels[0]}. {_MEND}")
    return chunk


def read_tsv(path: str | Path, count: int | None = None, desc: str | None = None) -> Split:
    """Read a file of the official archive: a header, then `expression <TAB> value` in each row.

    path: plain, or compressed as `.gz` or `.xz`. count: only so many rows; None reads them all.
    Every row is parsed and its value computed; `DataError` names the file and the row of the first fault.
    """
    path = Path(path)
    sequences: list[bytes] = []
    labels: list[int] = []
    try:
        with _open(path) as file:
            header = file.readline(1_000)
            if header.strip().split(b"\t") != [b"Source", b"Target"]:
                raise DataError(
                    f"{path} is not a ListOps file: its first line should be 'Source<TAB>Target'; got "
                    f"{header[:40].decode('utf-8', 'replace').strip()!r}."
                )
            bar = tqdm(total=count, unit="row", desc=desc or f"reading {path.name}", leave=False, delay=2)
            with bar:
                rows = iter(lambda: file.readline(_LARGEST_ROW), b"")
                for number, line in enumerate(rows, start=2):  # the header is row 1
                    if count is not None and len(labels) == count:
                        break
                    if line.strip():
                        tokens, label = _parse_row(line, f"{path}, row {number}")
                        sequences.append(tokens)
                        labels.append(label)
                        bar.update()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}. Fetch or make the file again.") from error
    if not labels:
        raise DataError(f"{path} has a header and no rows. Fetch the file again.")
    offsets = np.cumsum([0] + [len(tokens) for tokens in sequences], dtype=np.int64)
    return Split(np.frombuffer(b"".join(sequences), dtype=np.uint8), offsets, np.array(labels))


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else open(path, "rb")


def _parse_row(line: bytes, where: str) -> tuple[bytes, int]:
    columns = line.rstrip(b"\r\n").split(b"\t")
    if len(columns) != 2:  # the last row may lack its end of line: its value tells that it is whole
        raise DataError(f"{where}: wanted 'expression<TAB>value'; got {len(columns)} columns.")
    if not (len(columns[1]) == 1 and columns[1].isdigit()):
        raise DataError(f"{where}: the value must be one digit; got {columns[1][:20].decode('utf-8', 'replace')!r}.")
    try:
        tokens = encode(columns[0]).tobytes()
        value = evaluate(tokens)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    if value != int(columns[1]):
        raise DataError(f"{where}: the expression has the value {value}; the row says {int(columns[1])}.")
    return tokens, value


def _official_folder(root: str | Path | None) -> Path:
    folders = read_folders(root)
    for folder in folders:
        for inner in _INSIDE:
            if any((folder / inner / name).exists() for name in OFFICIAL_FILES.values()):
                return folder / inner
    raise DataNotFound(
        f"found no {OFFICIAL_FILES['train']} in {' or '.join(map(str, folders))}, nor in its listops-1000 or "
        f"lra_release. Unpack {ARCHIVE} (a tar file) and pass its folder as root, or use source='generated'."
    )


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "generated",
    train: int | None = None,
    valid: int | None = None,
    test: int | None = None,
    min_length: int = 500,
    max_length: int = 2_000,
    max_depth: int = 10,
    max_args: int = 10,
    progress: bool = True,
) -> Task:
    """ListOps as a `Task`: tokens of a vocabulary of 16, ten classes.

    source: "generated" makes the task from `seed` (the full size takes about a minute, once), "official" reads
    the archive's TSV files from `root`, "sample" the 200 rows in the repository's `data`.
    train, valid, test: how many; None is 96,000, 2,000 and 2,000 (120, 40 and 40 of the sample).
    min_length ... max_args: see `Shape`; for "generated" only. progress: show a bar while generating.
    """
    shape = Shape(min_length, max_length, max_depth, max_args)
    if source not in ("generated", "official", "sample"):
        raise DataError(f"source must be 'generated', 'official' or 'sample'; got {source!r}.")
    if source != "generated" and shape != Shape():
        raise DataError(f"lengths and depth shape generated data; source={source!r} is as it is. Leave them out.")
    whole = SAMPLE_SIZES if source == "sample" else SIZES
    sizes = {part: whole[part] if n is None else n for part, n in zip(whole, (train, valid, test), strict=True)}
    for part, n in sizes.items():
        if n < 1:
            raise DataError(f"{part} must be at least 1; got {n}.")

    if source == "official":
        folder = _official_folder(root)
        parts = {part: _take(folder / OFFICIAL_FILES[part], n) for part, n in sizes.items()}
        described = "ListOps, the official Long Range Arena files"
    else:
        count = sum(sizes.values())
        if source == "sample":
            stream = _take(REPOSITORY_DATA / "listops_sample.tsv.xz", count)
            described = "ListOps, the 200-row sample (made by this project)"
        else:
            stream = make(seed, count, shape, write_folder(root), progress)
            variant = "" if shape == Shape() else f", not the published lengths or depth: {shape}"
            described = f"ListOps by the Long Range Arena's rule, seed {seed} (made by this project){variant}"
        test_end, valid_end = sizes["test"], sizes["test"] + sizes["valid"]
        places = {"test": (0, test_end), "valid": (test_end, valid_end), "train": (valid_end, count)}
        parts = {part: stream.select(np.arange(*place)) for part, place in places.items()}

    config = TaskConfig(
        name="listops",
        kind="tokens",
        classes=10,
        length=max_length,
        vocabulary=len(VOCABULARY),
        class_names=tuple("0123456789"),
        source=described,
    )
    return Task(config, parts["train"], parts["valid"], parts["test"])


def _take(path: Path, count: int) -> Split:
    split = read_tsv(path, count)
    if len(split) < count:
        raise DataError(f"{path} has {len(split):,} rows; {count:,} were wanted. Fetch it again, or ask for fewer.")
    longest = int(split.lengths.argmax())
    if split.lengths[longest] > LENGTH:
        raise DataError(
            f"{path}, expression {longest + 1}: {split.lengths[longest]:,} tokens; the task has at most {LENGTH:,}."
        )
    return split
