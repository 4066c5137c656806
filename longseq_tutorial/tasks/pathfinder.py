"""Pathfinder: do the two dots lie on one path, or on two? Read pixel by pixel, 32 x 32 = 1,024 steps.

The task of the Long Range Arena, made here from a seed (the pictures and their rule are in `contours.py`), or read
from the official files. Two classes, as common as each other. `pathx.py` is the same task at 128 x 128.

The pictures of a seed come in chunks, each made from its own random numbers, so several processes can share the
work. The stream is dealt out as test, validation, training: a larger training part extends a smaller one and leaves
the other two as they are. A chunk reaches its name on the disk only when it is whole: a run that was interrupted
goes on after the chunks that are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from . import contours
from .base import REPOSITORY_DATA, DataError, DataNotFound, Split, Task, TaskConfig, read_folders, write_folder
from .contours import SHAPES, Pictures, Shape
from .packs import FAULTS, read_npz, write_npz

__all__ = ["SHAPES", "Pictures", "Shape", "load", "make", "read_official", "sample"]

ARCHIVE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
SIZES = {"train": 160_000, "valid": 20_000, "test": 20_000}
SAMPLE_SIZES = {32: {"train": 160, "valid": 40, "test": 40}, 128: {"train": 40, "valid": 10, "test": 10}}
SAMPLES = {32: "pathfinder_sample.npz", 128: "pathx_sample.npz"}
SOURCES = {
    "generated": "made from a seed by the published rule, 200,000 pictures, some minutes",
    "official": "the Long Range Arena's files, if you have them (an archive of 8.2 GB, no data licence stated)",
    "sample": "240 pictures (made by this project), MIT",
}
DIFFICULTIES = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}  # by paddles in a path
CHUNKS = {32: 1_000, 64: 500, 128: 250, 256: 100}  # pictures in a file of the cache: some seconds' work
CLASS_NAMES = ("two paths", "one path")
_SMALL = 2**30  # bytes of pictures that are held in memory; more are mapped from a file
_WORTH_HELPERS = 4  # chunks to make from which on other processes help
_FORM = {
    "images": ("uint8", 2), "labels": ("uint8", 1), "paths": ("uint8", 4), "dots": ("uint8", 3),
    "margins": ("uint8", 1),
}  # fmt: skip
_EMPTY = 1_000  # official pictures of which at most one may be an empty file; the archive has one in 600,000
_PNG_LIMIT = 1_000_000  # bytes of an official picture; real ones have under 10 kB


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "generated",
    size: int = 32,
    paddles: int = 14,
    train: int | None = None,
    valid: int | None = None,
    test: int | None = None,
    kind: str = "samples",
    workers: int | None = None,
    progress: bool = True,
) -> Task:
    """Pathfinder as a `Task`: one pixel a step, two classes.

    source: "generated" makes the task from `seed`, "official" reads the archive's pictures from `root`, "sample" the
    few in the repository's `data`.
    size: 32 and 128 are the published tasks; 64 and 256 have settings of this project's own.
    paddles: strokes in a path: 14 is the published hard set, 9 and 6 are the easier ones.
    train, valid, test: how many; None is 160,000, 20,000 and 20,000 (and all that the sample has).
    kind: "samples" gives pixels from -1 to 1; "tokens" gives pixel + 1, so that black is not padding.
    workers: processes that make pictures; None: one for each core. progress: show a bar.
    """
    if source not in ("generated", "official", "sample"):
        raise DataError(f"source must be 'generated', 'official' or 'sample'; got {source!r}.")
    if size not in SHAPES:
        raise DataError(f"size must be one of {', '.join(map(str, SHAPES))}; got {size}.")
    if source == "sample" and (size not in SAMPLES or paddles != 14):
        raise DataError(f"the sample has sizes 32 and 128 and 14 paddles; got size={size}, paddles={paddles}.")
    if source == "official" and paddles not in DIFFICULTIES:
        raise DataError(f"the official sets have 6, 9 or 14 paddles; got {paddles}.")
    if paddles < 3:
        raise DataError(f"paddles must be at least 3; got {paddles}.")
    whole = SAMPLE_SIZES[size] if source == "sample" else SIZES
    sizes = {part: whole[part] if n is None else n for part, n in zip(whole, (train, valid, test), strict=True)}
    for part, n in sizes.items():
        if n < 1 or (source == "sample" and n > whole[part]):
            raise DataError(
                f"{part} must be at least 1{f' and at most {whole[part]}' * (source == 'sample')}; got {n}."
            )

    name = "pathx" if size == 128 else "pathfinder"
    said = {32: "Pathfinder-32", 64: "Pathfinder-64", 128: "Path-X (Pathfinder-128)", 256: "Pathfinder-256"}[size]
    order = ("train", "valid", "test") if source == "official" else ("test", "valid", "train")
    count = sum(sizes.values())
    if source == "official":
        images, labels, left_out = read_official(root, size, paddles, count, progress)
        sizes["train"] -= count - len(labels)  # the archive has an empty file among its easy pictures
        if sizes["train"] < 1:
            raise DataError(f"no pictures are left to train on: {left_out} are empty. Ask for more with train=.")
        described = f"{said}, the official Long Range Arena files ({DIFFICULTIES[paddles]})"
        described += f", {left_out} empty pictures left out" if left_out else ""
    elif source == "sample":
        pictures = sample(size)
        images, labels = pictures.images[:count], pictures.labels[:count]
        described = f"{said}, the {len(pictures.labels)}-picture sample (made by this project)"
    else:
        shape = dataclasses.replace(SHAPES[size], paddles=paddles)
        images, labels = make(seed, count, shape, write_folder(root), progress=progress, workers=workers)
        described = f"{said} by the Long Range Arena's rule, seed {seed} (made by this project)"
        if size in (64, 256):
            described = f"{said} with settings of this project's own, seed {seed} (made by this project)"
        if paddles != 14:
            described += f", {paddles} paddles a path, not the published 14"
    whole_split = pixels(images.reshape(-1), labels, size, kind)
    parts, start = {}, 0
    for part in order:
        parts[part] = whole_split.select(np.arange(start, start + sizes[part]))
        start += sizes[part]
    config = TaskConfig(
        name=name,
        kind=kind,
        classes=2,
        length=size**2,
        vocabulary=257 if kind == "tokens" else 0,
        class_names=CLASS_NAMES,
        source=described,
        grid=(size, size),
    )
    return Task(config, parts["train"], parts["valid"], parts["test"])


def pixels(images: np.ndarray, labels: np.ndarray, size: int, kind: str) -> Split:
    """Flat uint8 pictures as a `Split`: float32 from -1 to 1, or tokens pixel + 1."""
    offsets = np.arange(len(labels) + 1, dtype=np.int64) * size**2
    if kind == "tokens":
        return Split(images, offsets, labels, shift=1)
    if kind == "samples":
        return Split(images, offsets, labels, scale=2 / 255, shift=-1)
    raise DataError(f"kind must be 'samples' or 'tokens'; got {kind!r}.")


def sample(size: int = 32) -> Pictures:
    """The pictures in the repository, with their paths: 240 of 32 x 32, or 60 of 128 x 128."""
    mend = "Get it back with `git checkout`, or make it with data/make_pathfinder_samples.py."
    return _checked(REPOSITORY_DATA / SAMPLES[size], sum(SAMPLE_SIZES[size].values()), SHAPES[size], mend)


# --- made --------------------------------------------------------------------------------------------------------


def make(
    seed: int, count: int, shape: Shape, folder: Path, *, progress: bool = True, workers: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` pictures of the stream, (count, pixels) uint8, and their labels, read from `folder` or made.

    A killed run leaves nothing half made, and two processes that make the same chunk write the same bytes.
    """
    home, number = _home(seed, shape, folder), -(-count // CHUNKS[shape.size])
    missing = [i for i in range(number) if not _chunk_path(home, i).exists()]
    if missing:
        _make_chunks(seed, shape, folder, missing, number, progress, workers)
    return _gather(home, count, shape, progress)


def _home(seed: int, shape: Shape, folder: Path) -> Path:
    described = json.dumps({"seed": seed, **dataclasses.asdict(shape)}, sort_keys=True)
    return folder / "pathfinder" / f"{shape.size}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def _chunk_path(home: Path, number: int) -> Path:
    return home / f"{number:05d}.npz"


def _make_chunk(seed: int, shape: Shape, home: Path, number: int) -> None:
    rng = np.random.default_rng([seed, shape.size, number])
    pictures = contours.draw(rng, CHUNKS[shape.size], shape)
    write_npz(_chunk_path(home, number), pictures._asdict())


def _make_chunks(
    seed: int, shape: Shape, folder: Path, missing: list[int], number: int, progress: bool, workers: int | None
) -> None:
    """Make the chunks that are missing, with other processes beside this one when there is enough to do."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1; got {workers}.")
    helpers = min(cores if workers is None else workers, len(missing)) - 1 if len(missing) >= _WORTH_HELPERS else 0
    home, chunk = _home(seed, shape, folder), CHUNKS[shape.size]
    processes = []
    for share in range(1, helpers + 1):
        work = {"seed": seed, "shape": dataclasses.asdict(shape), "folder": str(folder.resolve())}
        work["chunks"] = missing[share :: helpers + 1]
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-c", f"from {__name__} import _help; _help()", json.dumps(work)]
        # In a session of their own: Ctrl-C reaches this process, which ends them.
        processes.append(
            subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        )
    bar = tqdm(
        total=number * chunk, initial=(number - len(missing)) * chunk, unit="picture",
        desc=f"making Pathfinder-{shape.size}", disable=not progress,
    )  # fmt: skip
    waiting = set(missing)

    def count_finished() -> None:
        there = {i for i in waiting if _chunk_path(home, i).exists()}
        waiting.difference_update(there)
        bar.update(len(there) * chunk)

    try:
        with bar:
            for i in missing[:: helpers + 1]:
                _make_chunk(seed, shape, home, i)
                count_finished()
            while any(process.poll() is None for process in processes):
                time.sleep(0.05)
                count_finished()
            for i in sorted(waiting):  # a helper that broke down leaves its share to us
                if not _chunk_path(home, i).exists():
                    _make_chunk(seed, shape, home, i)
            count_finished()
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _help() -> None:
    """What a helping process does: its share of the chunks, as long as the process that started it lives."""
    work, parent = json.loads(sys.argv[1]), os.getppid()
    shape = Shape(**{**work["shape"], "margins": tuple(work["shape"]["margins"])})
    home = _home(work["seed"], shape, Path(work["folder"]))
    try:
        for number in work["chunks"]:
            if os.getppid() == parent and not _chunk_path(home, number).exists():
                _make_chunk(work["seed"], shape, home, number)
    except (KeyboardInterrupt, DataError):
        sys.exit(1)  # the parent says what is wrong


def _gather(home: Path, count: int, shape: Shape, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """All pictures in one array: in memory, or where that would be much, in a file that is mapped."""
    chunk, area = CHUNKS[shape.size], shape.size**2
    labels = np.empty(count, np.uint8)
    flat = home / f"{count}.u8"
    if count * area <= _SMALL:
        images: np.ndarray = np.empty((count, area), np.uint8)
        for start, pictures in _chunks(home, count, shape, progress):
            images[start : start + chunk] = pictures.images[: count - start]
            labels[start : start + chunk] = pictures.labels[: count - start]
        return images, labels
    small = home / f"{count}.labels.npz"  # written after the pictures: where it is, they are whole
    if not (flat.exists() and flat.stat().st_size == count * area and small.exists()):
        temporary = flat.with_name(f"{flat.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                for start, pictures in _chunks(home, count, shape, progress):
                    file.write(pictures.images[: count - start].tobytes())
                    labels[start : start + chunk] = pictures.labels[: count - start]
            os.replace(temporary, flat)
        except OSError as error:
            raise DataError(f"cannot write {flat} ({error.strerror}); free the disk or pass another root.") from error
        finally:
            temporary.unlink(missing_ok=True)
        write_npz(small, {"labels": labels})
    labels = read_npz(small, {"labels": ("uint8", 1)}, "Delete it, and it is made again.")["labels"]
    return np.memmap(flat, np.uint8, "r", shape=(count, area)), labels


def _chunks(home: Path, count: int, shape: Shape, progress: bool) -> Iterator[tuple[int, Pictures]]:
    chunk = CHUNKS[shape.size]
    starts = range(0, count, chunk)
    for start in tqdm(starts, desc="reading pictures", unit="file", leave=False, delay=2, disable=not progress):
        path = _chunk_path(home, start // chunk)
        yield start, _checked(path, chunk, shape, "Delete it, and it is made again.")


def _checked(path: Path, count: int, shape: Shape, mend: str) -> Pictures:
    pictures = Pictures(**read_npz(path, _FORM, mend))
    wanted = ((count, shape.size**2), (count,), (count, 2, shape.paddles + 1, 2), (count, 2, 2), (count,))
    if tuple(array.shape for array in pictures) != wanted:
        raise DataError(f"{path} is not {count:,} pictures of {shape.size} x {shape.size}. {mend}")
    try:
        right = (contours.label_of(pictures.paths, pictures.dots) == pictures.labels).all()
    except DataError:
        right = False
    if not right:
        raise DataError(f"{path}: a label is not what the recorded paths say. {mend}")
    return pictures


# --- official ----------------------------------------------------------------------------------------------------

_INSIDE = ("", "lra_release", "lra_release/lra_release", "pathfinder", "..")
_LINE = re.compile(r"imgs/(\d{1,6}) sample_(\d{1,6})\.png \d+ ([01])(?:\.0)?(?: \S+)*")


def read_official(
    root: str | Path | None, size: int, paddles: int, count: int, progress: bool = True
) -> tuple[np.ndarray, np.ndarray, int]:
    """The first `count` official pictures, their labels, and how many empty files were passed over.

    Raises `DataNotFound` where the folder is not there, `DataError` naming the file and line of the first fault.
    """
    home = _official_home(root, size, DIFFICULTIES[paddles])
    images, labels, left_out = np.empty((count, size**2), np.uint8), np.empty(count, np.uint8), 0
    done, most = 0, max(1, count // _EMPTY)
    seen: set[Path] = set()
    with tqdm(
        total=count, unit="picture", desc=f"reading {home.parent.name}", leave=False, disable=not progress
    ) as bar:
        for path, label in _metadata(home):
            if done == count:
                break
            try:
                content = path.read_bytes() if path.stat().st_size <= _PNG_LIMIT else b"x"
            except OSError as error:
                raise DataError(f"cannot read {path} ({error.strerror}). Unpack the archive again.") from error
            if path in seen:
                raise DataError(f"{home / 'metadata'} names {path.parent.name}/{path.name} twice. Unpack it again.")
            seen.add(path)
            if not content:  # the archive holds one such file
                left_out += 1
                if left_out > most:
                    raise DataError(
                        f"{home} has {left_out} empty pictures among the first {done + left_out:,}, such as {path}; "
                        f"wanted at most {most}. Unpack the archive again."
                    )
                continue
            images[done], labels[done] = decode_png(content, size, str(path)), label
            done += 1
            bar.update()
    if done < max(1, count - left_out):
        raise DataError(f"{home} has {done:,} pictures; {count:,} were wanted. Unpack it again, or ask for fewer.")
    return images[:done], labels[:done], left_out


def _official_home(root: str | Path | None, size: int, difficulty: str) -> Path:
    folders = read_folders(root)
    for folder in folders:
        for inner in _INSIDE:
            home = folder / inner / f"pathfinder{size}" / difficulty
            if (home / "metadata").is_dir():
                return home
        if folder.name == f"pathfinder{size}" and (folder / difficulty / "metadata").is_dir():
            return folder / difficulty
        if folder.name == difficulty and (folder / "metadata").is_dir():
            return folder
    raise DataNotFound(
        f"found no pathfinder{size}/{difficulty}/metadata in {' or '.join(map(str, folders))}. Unpack {ARCHIVE} "
        "(a tar file) and pass its folder as root, or use source='generated'."
    )


def _metadata(home: Path) -> Iterator[tuple[Path, int]]:
    """Path and label of each picture, in the order of the files' numbers."""
    files = [path for path in (home / "metadata").iterdir() if re.fullmatch(r"\d{1,6}\.npy", path.name)]
    if not files:
        raise DataError(f"{home / 'metadata'} has no files named like 0.npy. Unpack the archive again.")
    for path in sorted(files, key=lambda path: int(path.stem)):
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}). Unpack the archive again.") from error
        for number, line in enumerate(_lines(content, path), start=1):
            match = _LINE.fullmatch(line)
            if not match:
                raise DataError(
                    f"{path}, line {number}: wanted 'imgs/0 sample_0.png 0 <label> ...' with a label of 0 or 1; got "
                    f"{line[:60]!r}. Unpack the archive again."
                )
            batch, sample_number, label = match.groups()
            yield home / "imgs" / batch / f"sample_{sample_number}.png", int(label)


def _lines(content: bytes, path: Path) -> list[str]:
    """The rows of a metadata file: text in the official archive, a real NumPy array from newer generators."""
    if content.startswith(b"\x93NUMPY"):
        try:
            rows = np.load(io.BytesIO(content), allow_pickle=False)
        except FAULTS as error:
            why = " ".join(str(error).split())[:120]
            raise DataError(f"{path} is damaged or holds Python objects ({why}). Unpack it again.") from error
        if rows.ndim != 2 or rows.dtype.kind != "U":
            raise DataError(f"{path} must hold a table of text; got {rows.dtype} {rows.shape}. Unpack it again.")
        return [" ".join(row) for row in rows]
    lines = [" ".join(line.split()) for line in content.decode("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{path} is empty. Unpack the archive again.")
    return lines


_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # of Pillow; it cuts 16 bits off above 255


def decode_png(content: bytes, size: int, where: str) -> np.ndarray:
    """The grey pixels of a PNG of size x size, row by row. Raises `DataError` naming `where` otherwise."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading pictures needs Pillow: run `pip install pillow`.") from None
    if not content.rstrip(b"\0").endswith(b"IEND\xaeB`\x82"):
        raise DataError(f"{where} is not a whole PNG picture (its end is missing). Unpack the archive again.")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as picture:
            got, kind = picture.size, picture.mode
            if got == (size, size) and kind in _MODES:  # nothing of another size is ever decoded
                return np.asarray(picture.convert("L"), np.uint8).reshape(-1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is not a whole PNG picture ({error}). Unpack the archive again.") from error
    raise DataError(f"{where}: wanted {size} x {size} pixels of 8 bits; got {got[0]} x {got[1]}, mode {kind}.")
