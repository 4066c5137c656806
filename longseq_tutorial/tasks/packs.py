"""Reading and writing NumPy archives, plain (`.npz`) or compressed as a whole (`.npz.xz`, `.npz.bz2`).

Nothing is unpickled, a file is written whole or not at all, and whatever is wrong with one that is read is
said in one line.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from .base import DataError

Form = Mapping[str, tuple[str, int]]  # what each array must be: name -> (dtype or kind of dtype, dimensions)

# np.load speaks through many exceptions when a file is not what it seems; all mean the same here.
FAULTS = (
    OSError, EOFError, ValueError, KeyError, SyntaxError, RuntimeError, MemoryError, OverflowError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".bz2": bz2.decompress}


def read_npz(path: Path, form: Form, mend: str) -> dict[str, np.ndarray]:
    """The arrays named in `form`, each checked for dtype and dimensions.

    form: `{"audio": ("int16", 1), "speakers": ("U", 1)}`; a single letter stands for a kind of dtype.
    mend: what to do about a broken file; it ends every message.
    Raises `DataError` for a missing, truncated, corrupt or foreign file.
    """
    try:
        raw = path.read_bytes()
        if path.suffix in _DECOMPRESS:
            raw = _DECOMPRESS[path.suffix](raw)
        loaded = np.load(io.BytesIO(raw), allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise DataError(f"{path} holds one array, not an archive of {', '.join(form)}. {mend}")
        with loaded as archive:
            missing = [name for name in form if name not in archive.files]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it has {', '.join(archive.files)}. {mend}")
            arrays = {name: archive[name] for name in form}
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {mend}") from None
    except FAULTS as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise DataError(f"{path} is damaged or not a NumPy archive ({why}). {mend}") from error
    for name, (dtype, dimensions) in form.items():
        array = arrays[name]
        if not isinstance(array, np.ndarray):  # of a member that is none, NumPy gives the bytes
            raise DataError(f"{path}: {name} must be an array; got a file of another kind. {mend}")
        right = array.dtype.kind == dtype if len(dtype) == 1 else array.dtype == np.dtype(dtype)
        if not right or array.ndim != dimensions:
            raise DataError(
                f"{path}: {name} must be {dtype} with {dimensions} dimension(s); got {array.dtype} with "
                f"{array.ndim}. {mend}"
            )
    return arrays


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write `.npz` (deflated) or `.npz.xz`, atomically; equal arrays give equal bytes.

    Raises `DataError` when the disk refuses.
    """
    buffer = io.BytesIO()
    if path.suffix == ".xz":
        np.savez(buffer, allow_pickle=False, **dict(arrays))
        content = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    else:
        np.savez_compressed(buffer, allow_pickle=False, **dict(arrays))
        content = buffer.getvalue()
    write_atomically(path, content)


def write_atomically(path: Path, content: bytes) -> None:
    """Write data into a folder that is made where it is missing, whole or not at all. Raises `DataError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); free the disk or pass another root.") from error


def replace_file(path: Path, content: bytes) -> None:
    """Write beside `path`, wait until it is on the disk, then give it its name in one step. Raises `OSError`.

    Whoever reads `path`, at any moment and after any crash, finds the old content or the new, never a mixture.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
