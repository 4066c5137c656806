"""CIFAR-10 in grey: found on this machine, or downloaded.

60,000 photographs of 32 x 32 pixels in ten classes, by A. Krizhevsky (2009). The authors state no licence, and the
pictures come from a collection that was withdrawn: use them to learn and to compare, and ship them nowhere. They are no
part of this repository.

The official archive is read in its binary form, which needs no unpickling. A pack of JPEG copies
(`cifar10_jpeg.npz.xz`, described in `data/README.md`) is read too, and always named for what it is: its pixels are
about 6 grey levels off.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .base import DataError, DataNotFound, read_folders, write_folder
from .downloads import download as fetch_file
from .downloads import tar_members, whole
from .packs import read_npz, write_npz

PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FOLDER = "cifar-10-batches-bin"
BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")  # the last one is the test
PICTURES = 10_000  # in each batch
SIZE = 32
RECORD = 1 + 3 * SIZE**2  # bytes: the label, then the red, the green and the blue plane
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PACK = "cifar10_grey.npz"  # what a download leaves behind
JPEG_PACK = "cifar10_jpeg.npz.xz"
JPEG_CACHE = "cifar10_jpeg_grey.npz"
_NAME = re.compile(rf"(?:{FOLDER}/)?(data_batch_[1-5]\.bin|test_batch\.bin)")
_MEND = "Delete it or put a good copy in its place."
_FORM = {"grey": ("uint8", 2), "label": ("uint8", 1), "split": ("uint8", 1)}
_JPEG_FORM = {
    "jpeg": ("uint8", 1), "offsets": ("int64", 1), "label": ("uint8", 1), "split": ("uint8", 1), "classes": ("U", 1),
}  # fmt: skip


@dataclass(frozen=True)
class Photographs:
    """Grey photographs, row by row."""

    grey: np.ndarray  # (n, 1024) uint8
    label: np.ndarray  # (n,) uint8, the place in CLASSES
    split: np.ndarray  # (n,) uint8: 0 training, 1 test
    jpeg: bool = False  # True for the JPEG copies


def find(
    root: str | Path | None = None, *, download: bool = True, jpeg: bool | None = None, verify: bool = True
) -> Photographs:
    """The photographs from the official binary files in the data folders, from the JPEG pack there, or downloaded.

    root: see `base.read_folders`. download: False never touches the network.
    jpeg: False wants the official ones, True the JPEG copies, None takes what is here.
    verify: there must be 50,000 and 10,000; False takes any number.
    Raises `DataNotFound` when there are none, `DataError` when what is there is broken.
    """
    for folder in read_folders(root) if not jpeg else ():
        if (folder / PACK).exists():
            arrays = read_npz(folder / PACK, _FORM, _MEND)
            return _whole(Photographs(arrays["grey"], arrays["label"], arrays["split"]), folder / PACK, verify)
        for inner in (folder / FOLDER, folder):
            if any((inner / name).exists() for name in BATCHES):
                return read_folder(inner, verify)
        archive = folder / ARCHIVE.rsplit("/", 1)[-1]
        if archive.exists():
            return read_archive(archive, verify)
    for folder in read_folders(root) if jpeg is not False else ():
        if (folder / JPEG_PACK).exists():
            return read_jpeg_pack(folder / JPEG_PACK, write_folder(None), verify)
    if not download or jpeg:
        what = "the JPEG copies are" if jpeg else "CIFAR-10 is"
        raise DataNotFound(f"{what} not here. {advice(root)}")
    return fetch(root)


def fetch(root: str | Path | None = None) -> Photographs:
    """Download the official binary archive (170 MB), check it, and keep the grey photographs as a pack.

    Raises `DataNotFound` without a network.
    """
    folder = write_folder(root)
    archive = fetch_file(ARCHIVE, f"md5:{MD5}", folder, advice(root))
    photographs = read_archive(archive)
    write_npz(folder / PACK, {name: getattr(photographs, name) for name in _FORM})
    archive.unlink()
    return photographs


def advice(root: str | Path | None) -> str:
    """What to do where there are no photographs."""
    place = "root" if root is not None else "LONGSEQ_DATA"
    return (
        "With a network, run `python -m longseq_tutorial.data get image`; without, put "
        f"{ARCHIVE.rsplit('/', 1)[-1]}, its unpacked folder {FOLDER} or {JPEG_PACK} into a folder and name it in "
        f"{place}, or use source='sample'."
    )


def read_folder(folder: Path, verify: bool = True) -> Photographs:
    """Photographs from the unpacked binary archive."""
    batches = {}
    for name in BATCHES:
        path = folder / name
        if not path.exists():
            raise DataError(f"{folder} lacks {name}. {_MEND}")
        try:
            if path.stat().st_size > PICTURES * RECORD:
                raise DataError(f"{path} has {path.stat().st_size:,} bytes; wanted {PICTURES * RECORD:,}. {_MEND}")
            batches[name] = decode(path.read_bytes(), str(path), _MEND, verify)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}.") from error
    return _gather(batches)


def read_archive(path: Path, verify: bool = True) -> Photographs:
    """Photographs from the binary archive, read by the names of its files without unpacking it."""
    mend = "Delete it, and it is downloaded again."
    batches = {}
    for name, file, size in tar_members(
        path, lambda name: bool(_NAME.fullmatch(name)), PICTURES * RECORD, mend, "reading photographs"
    ):
        where, batch = f"{path}: {name}", name.rsplit("/", 1)[-1]
        if batch in batches:
            raise DataError(f"{path}: {batch} stands in it twice. {mend}")
        batches[batch] = decode(whole(file, size, where, mend), where, mend, verify)
    missing = [name for name in BATCHES if name not in batches]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; is it the binary version? {mend}")
    return _gather(batches)


def decode(content: bytes, where: str, mend: str, verify: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Grey pixels (n, 1024) and labels (n,) of one batch. Raises `DataError` naming `where` and the record."""
    if len(content) != PICTURES * RECORD and verify:
        raise DataError(f"{where} has {len(content):,} bytes; {PICTURES:,} records have {PICTURES * RECORD:,}. {mend}")
    if not content or len(content) % RECORD:
        raise DataError(f"{where} has {len(content):,} bytes, not whole records of {RECORD:,}. {mend}")
    records = np.frombuffer(content, np.uint8).reshape(-1, RECORD)
    labels = records[:, 0].copy()
    if labels.max() >= len(CLASSES):
        first = int(np.argmax(labels >= len(CLASSES)))
        raise DataError(f"{where}: record {first + 1} has the label {labels[first]}; there are 0 to 9. {mend}")
    red, green, blue = records[:, 1:].reshape(-1, 3, SIZE**2).astype(np.uint32).swapaxes(0, 1)
    return to_grey(red, green, blue), labels


def to_grey(red: np.ndarray, green: np.ndarray, blue: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, (299 R + 587 G + 114 B) / 1000, rounded as Pillow does it in 16 bits."""
    return ((19_595 * red + 38_470 * green + 7_471 * blue + 0x8000) >> 16).astype(np.uint8)


def _gather(batches: dict[str, tuple[np.ndarray, np.ndarray]]) -> Photographs:
    grey, label = (np.concatenate([batches[name][i] for name in BATCHES]) for i in range(2))
    test = len(batches[BATCHES[-1]][1])
    split = np.repeat(np.arange(2, dtype=np.uint8), [len(label) - test, test])
    return Photographs(grey, label, split)


def read_jpeg_pack(path: Path, cache: Path, verify: bool = True) -> Photographs:
    """Photographs from the pack of JPEG copies; decoding takes some seconds and is kept in the folder `cache`."""
    try:
        digest = np.frombuffer(hashlib.sha256(path.read_bytes()).digest(), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
    kept, form = cache / JPEG_CACHE, {**_FORM, "of": ("uint8", 1)}
    if kept.exists():
        arrays = read_npz(kept, form, "Delete it, and it is made again.")
        if np.array_equal(arrays.pop("of"), digest):
            return _whole(Photographs(arrays["grey"], arrays["label"], arrays["split"], jpeg=True), kept, verify)
    pack = read_npz(path, _JPEG_FORM, _MEND)
    offsets, count = pack["offsets"], len(pack["label"])
    if tuple(pack["classes"]) != CLASSES:
        raise DataError(f"{path}: wanted the classes {', '.join(CLASSES)}; got {', '.join(pack['classes'])}. {_MEND}")
    if not len(offsets) - 1 == count == len(pack["split"]) or offsets[0] != 0 or offsets[-1] != len(pack["jpeg"]):
        raise DataError(f"{path}: its arrays do not fit each other. {_MEND}")
    grey = np.empty((count, SIZE**2), np.uint8)
    for i in tqdm(range(count), desc="decoding photographs", unit="picture", leave=False, delay=2):
        grey[i] = decode_jpeg(pack["jpeg"][offsets[i] : offsets[i + 1]].tobytes(), f"{path}, picture {i}")
    photographs = _whole(Photographs(grey, pack["label"], pack["split"], jpeg=True), path, verify)
    with contextlib.suppress(DataError):  # a folder that cannot be written only costs the seconds again
        write_npz(kept, {name: getattr(photographs, name) for name in _FORM} | {"of": digest})
    return photographs


def decode_jpeg(content: bytes, where: str) -> np.ndarray:
    """The grey pixels of a JPEG of 32 x 32, row by row. Raises `DataError` naming `where` otherwise."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("reading the JPEG copies needs Pillow: run `pip install pillow`.") from None
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as picture:
            got = picture.size
            if got == (SIZE, SIZE):  # nothing of another size is ever decoded
                return np.asarray(picture.convert("RGB").convert("L"), np.uint8).reshape(-1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where} is not a whole JPEG picture ({error}). {_MEND}") from error
    raise DataError(f"{where}: wanted {SIZE} x {SIZE} pixels; got {got[0]} x {got[1]}. {_MEND}")


def _whole(photographs: Photographs, where: Path, verify: bool) -> Photographs:
    """Refuse photographs that are not in the right form or, to be verified, not 60,000."""
    grey, label, split = photographs.grey, photographs.label, photographs.split
    counts = np.bincount(split, minlength=2).tolist()
    wanted = [(len(BATCHES) - 1) * PICTURES, PICTURES] if verify else counts
    right = len(grey) == len(label) == len(split) > 0 and grey.shape[1] == SIZE**2 and len(counts) == 2 and all(counts)
    if not right or counts != wanted or label.max() > 9:
        raise DataError(
            f"{where} does not hold {wanted[0]:,} training and {wanted[1]:,} test pictures of ten classes; got "
            f"{counts}, {grey.shape}. {_MEND}"
        )
    return photographs
