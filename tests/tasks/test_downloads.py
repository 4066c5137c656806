"""Downloads that are interrupted, changed or refused, and archives that are broken or mean harm."""

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest

from longseq_tutorial.tasks import DataError
from longseq_tutorial.tasks.base import DataNotFound
from longseq_tutorial.tasks.downloads import download, tar_members, whole

from .served import served

CONTENT = np.random.default_rng(0).bytes(300_000)
HASH = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "file.bin").write_bytes(CONTENT)
    (tmp_path / "here").mkdir()
    with served(tmp_path / "web") as state:
        yield state


def test_a_file_comes_whole_and_only_once(server, tmp_path, capsys):
    for _ in range(2):
        path = download(f"{server.url}/file.bin", HASH, tmp_path / "here", "")
        assert path == tmp_path / "here" / "file.bin" and path.read_bytes() == CONTENT
    assert server.ranges == [""]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["file.bin"]
    assert "file.bin" in capsys.readouterr().err  # progress was shown


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_goes_on(server, tmp_path, resumes):
    server.break_after, server.resumes = 100_000, resumes
    with pytest.raises(
        DataNotFound, match=r"could not download .*What came so far is kept in .*file.bin.part. Help."
    ) as e:
        download(f"{server.url}/file.bin", HASH, tmp_path / "here", "Help.")
    assert "\n" not in str(e.value)
    part = tmp_path / "here" / "file.bin.part"
    kept = part.read_bytes()
    assert 60_000 < len(kept) <= 100_000 and CONTENT.startswith(kept)
    server.break_after = None
    assert download(f"{server.url}/file.bin", HASH, tmp_path / "here", "").read_bytes() == CONTENT
    assert server.ranges[-1] == f"bytes={len(kept)}-" and not part.exists()


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    (tmp_path / "here" / "file.bin.part").write_bytes(b"x" * 400_000)
    assert download(f"{server.url}/file.bin", HASH, tmp_path / "here", "").read_bytes() == CONTENT


def test_another_file_is_refused(server, tmp_path):
    (tmp_path / "web" / "file.bin").write_bytes(b"<html>please log in</html>")
    with pytest.raises(DataError, match="its checksum is another") as caught:
        download(f"{server.url}/file.bin", HASH, tmp_path / "here", "")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "here").iterdir())


def test_no_such_file_and_no_network(server, tmp_path):
    for url in (f"{server.url}/none.bin", "http://127.0.0.1:9/file.bin"):
        with pytest.raises(DataNotFound, match=r"could not download .*Advice") as caught:
            download(url, HASH, tmp_path / "here", "Advice.")
        assert "\n" not in str(caught.value)


# Archives.


def tar(*members: tuple[str, bytes | str], mode: str = "w:gz") -> bytes:
    """An archive of (name, content); a content of type str makes a link to that place."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def members(path) -> list[tuple[str, bytes]]:
    found = tar_members(path, lambda name: name.endswith(".txt"), 1_000, "Mend.", "reading")
    return [(name, whole(file, size, name, "Mend.")) for name, file, size in found]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_wanted_members_are_read(tmp_path, mode):
    (tmp_path / "a").write_bytes(tar(("./x/1.txt", b"one"), ("x/2.bin", b"two"), ("x/3.txt", b"three"), mode=mode))
    assert members(tmp_path / "a") == [("x/1.txt", b"one"), ("x/3.txt", b"three")]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]  # nothing was unpacked


def extended(record: bytes) -> bytes:
    """A header that alters the next one."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    return info.tobuf() + record.ljust(512, b"\0")


_long = tarfile.TarInfo("././@LongLink")
_long.type, _long.size = tarfile.GNUTYPE_LONGNAME, 2
LONG_NAME = _long.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")
GOOD = tar(*((f"x/{i}.txt", np.random.default_rng(i).bytes(900)) for i in range(9)))
HARM = {
    "absolute": (tar(("/etc/1.txt", b"x")), "leads out of the archive"),
    "upwards": (tar(("x/../../1.txt", b"x")), "leads out of the archive"),
    "upwards, not wanted": (tar(("../1.bin", b"x"), ("1.txt", b"x")), "leads out of the archive"),
    "link": (tar(("x/1.txt", "/etc/passwd")), "x/1.txt is not a plain file"),
    "huge": (tar(("x/1.txt", bytes(1_001))), "has 1,001 bytes; wanted at most 1,000"),
    "twice": (tar(("x/1.txt", b"x"), ("x/1.txt", b"y")), "x/1.txt stands in it twice"),
    "larger than any disk": (
        extended(b"30 size=99999999999999999999\n") + tar(("1.bin", b"x"), mode="w"),
        "1.bin says",
    ),
    "names without end": (LONG_NAME * 3_000, "not a whole tar archive"),
    "empty": (b"", "not a whole tar archive"),
    "text": (b"hello, I am no archive", "not a whole tar archive"),
    "gzip of text": (gzip.compress(b"hello"), "not a whole tar archive"),
    "cut": (GOOD[: len(GOOD) // 2], "not a whole tar archive"),
    "end cut off": (GOOD[:-30], "not a whole tar archive"),
    "flipped": (GOOD[:4_000] + bytes([GOOD[4_000] ^ 255]) + GOOD[4_001:], "not a whole tar archive"),
}


@pytest.mark.parametrize("fault", HARM)
def test_broken_and_harmful_archives_are_one_clear_line(tmp_path, fault):
    raw, says = HARM[fault]
    (tmp_path / "a.tar.gz").write_bytes(raw)
    with pytest.raises(DataError, match=says) as caught:
        members(tmp_path / "a.tar.gz")
    assert "a.tar.gz" in str(caught.value) and str(caught.value).endswith("Mend.") and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


def test_no_archive(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        members(tmp_path / "none")
