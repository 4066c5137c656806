"""Fetching archives, and reading them without trusting them.

A download goes on where it was interrupted, is checked against the published checksum, and gets its name only when
it is whole. Nothing is ever unpacked by an archive's own paths: members are read by name, and those that are links,
or lie outside the archive, are refused.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from tqdm.auto import tqdm

from .base import DataError, DataNotFound

BLOCK = 2**20  # bytes read from the disk at a time ...
PIECE = 2**15  # ... and from the network: an incomplete piece is lost when the connection ends
TERABYTE = 2**40  # no member of an archive is larger, whatever it says of itself
_FAULTS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, ValueError, OverflowError, RecursionError)


def download(url: str, known_hash: str | None, folder: Path, advice: str) -> Path:
    """The file at `url`, in `folder` under its own name; downloaded if it is not there, resumed if it half is.

    known_hash: "sha256:..." or "md5:...", None where none was published. advice: what else can be done; it ends the
    message. Raises `DataNotFound` without a network, `DataError` when what came is not what was promised.
    """
    try:
        import pooch
    except ImportError:
        raise DataNotFound(f"downloading needs pooch: run `pip install pooch`. {advice}") from None
    pooch.get_logger().setLevel("WARNING")
    name = url.rsplit("/", 1)[-1]
    downloader = _Resuming(folder / f"{name}.part")
    try:
        return Path(pooch.retrieve(url, known_hash=known_hash, fname=name, path=folder, downloader=downloader))
    except ValueError as error:  # the checksum
        raise DataError(
            f"{url} is not the published file: its checksum is another. Try again later. {advice}"
        ) from error
    except OSError as error:  # what requests raises, and a full disk
        why = type(error).__name__
        kept = f" What came so far is kept in {downloader.part}." if downloader.part.exists() else ""
        raise DataNotFound(f"could not download {url} ({why}).{kept} {advice}") from error


class _Resuming:
    """A downloader for pooch that keeps what came in `part`, and asks only for the rest the next time."""

    def __init__(self, part: Path) -> None:
        self.part = part

    def __call__(self, url: str, output_file: Any, pooch: Any, check_only: bool = False) -> None:
        import requests

        done = self.part.stat().st_size if self.part.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
        with requests.get(url, headers=headers, stream=True, timeout=20) as response:
            if done and response.status_code == requests.codes.requested_range_not_satisfiable:
                self.part.unlink()  # longer than the file: not of this file
                return self(url, output_file, pooch)
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                done = 0  # the server begins at the beginning
            total = done + int(response.headers.get("content-length", 0))
            bar = tqdm(
                total=total or None,
                initial=done,
                unit="B",
                unit_scale=True,
                desc=f"downloading {url.rsplit('/', 1)[-1]}",
            )
            with open(self.part, "ab" if done else "wb") as file, bar:
                for block in response.iter_content(PIECE):
                    file.write(block)
                    bar.update(len(block))
        if total and self.part.stat().st_size < total:
            raise ConnectionError("the connection ended early")
        os.replace(self.part, output_file)


class Member:
    """An open member of an archive; whatever reading it raises is one clear line."""

    def __init__(self, file: IO[bytes], explain: Callable[[Exception], DataError]) -> None:
        self._file, self._explain = file, explain

    def read(self, size: int = -1) -> bytes:
        """The next bytes, all of them by default."""
        try:
            return self._file.read(size)
        except _FAULTS as error:
            raise self._explain(error) from error


def tar_members(
    path: Path, wanted: Callable[[str], bool], largest: int, mend: str, desc: str
) -> Iterator[tuple[str, Member, int]]:
    """Name, open file and size of each member of a tar archive (compressed or not) that is `wanted`, in its order.

    largest: no member may be larger. mend: what to do about a broken archive; it ends every message.
    Raises `DataError` for an archive that is cut off, damaged or foreign, and for members that are links, that are
    there twice, or whose paths lead out of it.
    """

    def explain(error: Exception) -> DataError:
        why = " ".join(str(error).split())[:100] or type(error).__name__
        return DataError(f"{path} is not a whole tar archive ({why}). {mend}")

    seen: set[str] = set()
    try:
        bar = tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=desc, leave=False, delay=2)
        with (
            bar,
            open(path, "rb") as raw,
            _decompressed(raw) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                bar.update(raw.tell() - bar.n)
                name = member.name.removeprefix("./")
                if member.name.startswith(("/", "\\")) or ".." in PurePosixPath(name.replace("\\", "/")).parts:
                    raise DataError(f"{path}: the member {name[:80]!r} leads out of the archive. {mend}")
                if not 0 <= member.size <= TERABYTE:  # to pass it over would take for ever
                    raise DataError(f"{path}: {name[:80]} says that it has {member.size:,} bytes. {mend}")
                if not wanted(name):
                    continue
                if name in seen:
                    raise DataError(f"{path}: {name} stands in it twice. {mend}")
                seen.add(name)
                if not member.isreg():
                    raise DataError(f"{path}: {name} is not a plain file. {mend}")
                if member.size > largest:
                    raise DataError(f"{path}: {name} has {member.size:,} bytes; wanted at most {largest:,}. {mend}")
                file = archive.extractfile(member)
                if file is not None:
                    yield name, Member(file, explain), member.size
            while stream.read(BLOCK):  # to the very end, where compressed files keep their checksum
                pass
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist. {mend}") from None
    except _FAULTS as error:
        raise explain(error) from error


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    start = raw.read(6)
    raw.seek(0)
    if start.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if start.startswith(b"\xfd7zXZ"):
        return cast(IO[bytes], lzma.open(raw, "rb"))
    return cast(IO[bytes], bz2.open(raw, "rb")) if start.startswith(b"BZh") else raw


def whole(file: Member, size: int, where: str, mend: str) -> bytes:
    """All bytes of a member. Raises `DataError` when there are fewer than promised."""
    content = file.read()
    if len(content) != size:
        raise DataError(f"{where} is cut off: {len(content):,} of {size:,} bytes. {mend}")
    return content
