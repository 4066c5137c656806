"""Papers of the ACL Anthology Network and which of them cite each other: the official pairs, and a small real set.

The official files are part of the Long Range Arena's archive: `new_aan_pairs.train.tsv`, `.eval.tsv` and `.test.tsv`,
five columns without a header: label, two identifiers, two texts. The texts are the printed form of Python bytes: they
begin with b' and hold a line break as a backslash and an n. That belongs to the published task; `undo=True` takes it
away.

The small set (`aan_mini.npz.xz`, described in `data/README.md`) has other papers of the same network, with links
of its own. Its texts are CC BY-NC-SA 3.0, the collection CC BY 4.0.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .base import DataError, DataNotFound, read_folders, write_folder
from .downloads import download, tar_members
from .packs import read_npz, write_npz

ARCHIVE = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
FILES = {"train": "new_aan_pairs.train.tsv", "valid": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
PAIRS = {"train": 147_086, "valid": 18_090, "test": 17_437}
MINI = "aan_mini.npz.xz"
_INSIDE = ("", "tsv_data", "aan", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
_MEMBER = re.compile(r"(?:[^/]+/)*tsv_data/(new_aan_pairs\.(?:train|eval|test)\.tsv)")
_LARGEST_LINE = 50_000_000  # bytes of a row; papers have some tens of thousands
_LARGEST_FILE = 60 * 2**30  # bytes of an unpacked file
_MEND = "Delete it or put a good copy in its place."
_FORM = {
    "text": ("uint8", 1), "offsets": ("int64", 1), "pairs": ("int32", 2), "label": ("uint8", 1), "split": ("uint8", 1),
}  # fmt: skip
_MINI_FORM = _FORM | {"pairs": ("int16", 2)}


@dataclass(frozen=True)
class Papers:
    """Documents, each once, and labelled pairs of them."""

    text: np.ndarray  # (bytes,) uint8
    offsets: np.ndarray  # (documents + 1,) int64
    pairs: np.ndarray  # (pairs, 2) which documents
    label: np.ndarray  # (pairs,) uint8: 1 where one cites the other
    split: np.ndarray  # (pairs,) uint8: 0 training, 1 validation, 2 test


def find_official(root: str | Path | None) -> Path:
    """The folder of the official files. Raises `DataNotFound`."""
    folders = read_folders(root)
    for folder in folders:
        for inner in _INSIDE:
            if any((folder / inner / name).exists() for name in FILES.values()):
                return folder / inner
    raise DataNotFound(
        f"found no {FILES['train']} in {' or '.join(map(str, folders))}, nor in its tsv_data, aan or lra_release. With "
        "a network and 30 GB of disk, run `python -m longseq_tutorial.data get retrieval`; or unpack "
        f"{ARCHIVE} (a tar file) and pass its folder as root, or use source='imdb-pairs' or 'sample'."
    )


def fetch(root: str | Path | None = None) -> Path:
    """Download the Arena's archive (8.2 GB, resumed if interrupted), keep its three files of pairs; their folder.

    Raises `DataNotFound` without a network.
    """
    folder = write_folder(root)
    advice = "Run the same again to go on, or use source='imdb-pairs' or 'sample'."
    archive = download(ARCHIVE, None, folder, advice)  # no checksum was published; the reader counts and checks rows
    unpack(archive, folder / "tsv_data")
    archive.unlink()
    return folder / "tsv_data"


def unpack(archive: Path, folder: Path) -> None:
    """Write the three files of pairs, under their own names, into `folder`. Nothing else is unpacked.

    They get their names only when all three are whole, so that where one is found, nothing is missing.
    """
    mend = "Delete it, and it is downloaded again."
    whole: dict[Path, Path] = {}  # each file, and its name until all are there
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, file, size in tar_members(
            archive, lambda name: bool(_MEMBER.fullmatch(name)), _LARGEST_FILE, mend, "unpacking pairs"
        ):
            target = folder / name.rsplit("/", 1)[-1]
            if target in whole:
                raise DataError(f"{archive}: {target.name} stands in it twice. {mend}")
            temporary = whole[target] = target.with_name(f"{target.name}.{os.getpid()}.tmp")
            with open(temporary, "wb") as out:
                shutil.copyfileobj(file, out, 2**20)
            if temporary.stat().st_size != size:
                raise DataError(f"{archive}: {name} is cut off. {mend}")
        missing = [name for name in FILES.values() if folder / name not in whole]
        if missing:
            raise DataError(f"{archive} lacks {', '.join(missing)}. {mend}")
        for target, temporary in whole.items():
            os.replace(temporary, target)
    except OSError as error:
        raise DataError(
            f"cannot write into {folder} ({error.strerror}); free the disk or pass another root."
        ) from error
    finally:
        for temporary in whole.values():
            temporary.unlink(missing_ok=True)


def read_official(folder: Path, length: int, undo: bool = False, verify: bool = True) -> Papers:
    """The official pairs, each text cut to `length` bytes. Reading takes minutes; the result is kept and found again.

    undo: take the printed form of Python bytes away. verify: the published numbers of pairs must be there.
    Raises `DataError` naming the file and row of the first fault.
    """
    stats = [[name, (folder / name).stat().st_size, (folder / name).stat().st_mtime_ns] for name in FILES.values()
             if (folder / name).exists()]  # fmt: skip
    key = json.dumps([str(folder.resolve()), stats, length, undo])
    kept = write_folder(None) / f"aan_pairs_{hashlib.sha256(key.encode()).hexdigest()[:12]}.npz"
    if kept.exists():
        mend = "Delete it, and it is made again."
        papers = _checked(Papers(**read_npz(kept, _FORM, mend)), kept, mend)
    else:
        papers = _read_files(folder, length, undo)
        with contextlib.suppress(DataError):  # a folder that cannot be written only costs the minutes again
            write_npz(kept, {name: getattr(papers, name) for name in _FORM})
    counts = dict(zip(FILES, np.bincount(papers.split, minlength=3).tolist(), strict=True))
    if verify and counts != PAIRS:
        raise DataError(
            f"{folder} holds {', '.join(f'{n:,}' for n in counts.values())} pairs; the official files have "
            f"{', '.join(f'{n:,}' for n in PAIRS.values())}. Fetch them again, or pass verify=False to use these."
        )
    return papers


def _read_files(folder: Path, length: int, undo: bool) -> Papers:
    documents: dict[bytes, int] = {}
    pairs, labels, parts = [], [], []
    for part, name in enumerate(FILES.values()):
        path = folder / name
        try:
            with open(path, "rb") as file:
                bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=f"reading {name}", delay=2)
                row = 0
                with bar:
                    while line := file.readline(_LARGEST_LINE):
                        row += 1
                        bar.update(len(line))
                        label, first, second = _parse_row(line, f"{path}, row {row}", undo)
                        pairs.append([documents.setdefault(text[:length], len(documents)) for text in (first, second)])
                        labels.append(label)
                        parts.append(part)
        except OSError as error:
            raise DataError(f"cannot read {path} ({error.strerror}). Fetch it again.") from error
        if not row:
            raise DataError(f"{path} is empty. Fetch it again.")
    return Papers(
        text=np.frombuffer(b"".join(documents), np.uint8),
        offsets=np.cumsum([0] + [len(text) for text in documents], dtype=np.int64),
        pairs=np.array(pairs, np.int32),
        label=np.array(labels, np.uint8),
        split=np.array(parts, np.uint8),
    )


def _parse_row(line: bytes, where: str, undo: bool) -> tuple[int, bytes, bytes]:
    """Label and both texts of a row. Quotes are ordinary characters."""
    columns = line.rstrip(b"\r\n").split(b"\t")
    whole = line.endswith(b"\n") or re.fullmatch(rb"b(['\"]).*\1", columns[-1])  # a last row may lack its end of line
    if len(columns) != 5 or not whole:
        got = f"{len(columns)} columns" if len(columns) != 5 else "no end of line: the file is cut off"
        raise DataError(f"{where}: wanted label, two identifiers and two texts; got {got}.")
    if columns[0] not in (b"0.0", b"1.0", b"0", b"1"):
        raise DataError(f"{where}: the label must be 0.0 or 1.0; got {columns[0][:20].decode('utf-8', 'replace')!r}.")
    texts = [_undone(text, where) if undo else text for text in columns[3:]]
    if not all(texts):
        raise DataError(f"{where}: a text is empty.")
    return int(columns[0][:1]), texts[0], texts[1]


def _undone(text: bytes, where: str) -> bytes:
    """What b'...' stands for."""
    try:
        value = ast.literal_eval(text.decode("ascii"))
    except (ValueError, SyntaxError, UnicodeDecodeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, bytes):
        raise DataError(f"{where}: wanted a text in the form b'...'; got {text[:20].decode('utf-8', 'replace')!r}.")
    return value


def read_mini(root: str | Path | None) -> Papers:
    """The small set. Raises `DataNotFound` when it is not in the data folders."""
    folders = read_folders(root)
    path = next((folder / MINI for folder in folders if (folder / MINI).exists()), None)
    if path is None:
        raise DataNotFound(f"found no {MINI} in {' or '.join(map(str, folders))}; use source='imdb-pairs' or 'sample'.")
    return _checked(Papers(**read_npz(path, _MINI_FORM, _MEND)), path, _MEND)


def _checked(papers: Papers, where: Path, mend: str) -> Papers:
    """Refuse arrays that do not fit each other."""
    count, offsets, pairs = len(papers.label), papers.offsets, papers.pairs
    if (
        not len(pairs) == count == len(papers.split) > 0
        or pairs.shape[1] != 2
        or len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != len(papers.text)
        or (np.diff(offsets) < 1).any()
        or pairs.min() < 0
        or pairs.max() >= len(offsets) - 1
        or papers.label.max() > 1
        or np.unique(papers.split).tolist() != [0, 1, 2]
    ):
        raise DataError(f"{where}: its arrays do not fit each other. {mend}")
    return papers
