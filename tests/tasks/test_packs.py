"""Packs: written whole or not at all, read with one clear line for whatever is wrong."""

import bz2
import io
import lzma
import os
import zipfile

import numpy as np
import pytest

from longseq_tutorial.tasks import DataError
from longseq_tutorial.tasks.packs import read_npz, write_atomically, write_npz

FORM = {"audio": ("int16", 1), "names": ("U", 1), "rate": ("int64", 0)}
GOOD = {
    "audio": np.arange(2_000, dtype=np.int16),
    "names": np.array(["a", "bc"]),
    "rate": np.array(8_000, dtype=np.int64),
}


def zipped(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["p.npz", "p.npz.xz"])
def test_what_is_written_is_read_and_the_bytes_repeat(tmp_path, name):
    path = tmp_path / "new" / name
    write_npz(path, GOOD)
    read = read_npz(path, FORM, "mend")
    assert all((read[key] == GOOD[key]).all() for key in FORM)
    first = path.read_bytes()
    write_npz(path, GOOD)
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == [name]  # no other file is left behind


def test_bzip2_and_further_arrays_are_read(tmp_path):
    path = tmp_path / "p.npz.bz2"
    path.write_bytes(bz2.compress(zipped(**GOOD, more=np.zeros(3))))
    assert set(read_npz(path, FORM, "mend")) == set(FORM)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(DataError, match=r"cannot write .*No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


WHOLE = lzma.compress(zipped(**GOOD))
MIDDLE = len(WHOLE) // 2
BROKEN = {
    "empty": b"",
    "not xz": b"hello, I am no archive",
    "truncated": WHOLE[:MIDDLE],
    "without its end": WHOLE[:-1],
    "one bit flipped": WHOLE[:MIDDLE] + bytes([WHOLE[MIDDLE] ^ 1]) + WHOLE[MIDDLE + 1 :],
    "xz of text": lzma.compress(b"hello"),
    "xz of half a zip": lzma.compress(zipped(**GOOD)[:900]),
    "a single array": lzma.compress((lambda b: (np.save(b, GOOD["audio"]), b.getvalue())[1])(io.BytesIO())),
    "pickled objects": lzma.compress(zipped(**(GOOD | {"names": np.array([{}, None], dtype=object)}))),
    "missing array": lzma.compress(zipped(audio=GOOD["audio"], rate=GOOD["rate"])),
    "wrong dtype": lzma.compress(zipped(**(GOOD | {"audio": np.zeros(3, np.float32)}))),
    "wrong byte order": lzma.compress(zipped(**(GOOD | {"audio": np.zeros(3, ">i2")}))),
    "wrong dimensions": lzma.compress(zipped(**(GOOD | {"audio": np.zeros((3, 2), np.int16)}))),
    "wrong kind": lzma.compress(zipped(**(GOOD | {"names": np.zeros(2)}))),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_packs_are_one_clear_line(tmp_path, fault):
    path = tmp_path / "p.npz.xz"
    path.write_bytes(BROKEN[fault])
    with pytest.raises(DataError) as caught:
        read_npz(path, FORM, "Fetch it again.")
    message = str(caught.value)
    assert message.startswith(str(path)) and message.endswith("Fetch it again.") and "\n" not in message


def test_messages_say_what_was_wanted_and_what_came(tmp_path):
    path = tmp_path / "p.npz.xz"
    for fault, says in {
        "missing array": "lacks names; it has audio, rate",
        "wrong dtype": "audio must be int16 with 1 dimension.*got float32",
        "wrong dimensions": "got int16 with 2",
    }.items():
        path.write_bytes(BROKEN[fault])
        with pytest.raises(DataError, match=says):
            read_npz(path, FORM, "")


def test_missing_file_and_folder_in_its_place(tmp_path):
    with pytest.raises(DataError, match=r"does not exist. Fetch"):
        read_npz(tmp_path / "none.npz", FORM, "Fetch it.")
    with pytest.raises(DataError, match="damaged or not a NumPy archive"):
        read_npz(tmp_path, FORM, "Fetch it.")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_damage_is_a_data_error_or_harmless(tmp_path, save):
    """Bytes changed at random: whatever NumPy's reader raises, ours says it in its own way."""
    buffer = io.BytesIO()
    save(buffer, **(GOOD | {"audio": GOOD["audio"][:50]}))
    whole, path, rng = buffer.getvalue(), tmp_path / "p.npz", np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        raw = np.frombuffer(whole, np.uint8).copy()
        raw[rng.integers(0, len(raw), rng.integers(1, 5))] = rng.integers(256)
        path.write_bytes(raw.tobytes())
        try:
            read_npz(path, FORM, "mend")
        except DataError:
            refused += 1
    assert refused > 250


def header(text: str) -> bytes:
    """The beginning of an array in NumPy's form, with any header."""
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n"


FOREIGN_MEMBERS = {
    "no array": b"hello",
    "more numbers than can be counted": header(f"{{'descr': '<i2', 'fortran_order': False, 'shape': ({10**30},)}}"),
    "open bracket": header("{'descr': '<i2', 'shape': ("),
    "open quotes": header("'''"),
}


@pytest.mark.parametrize("fault", FOREIGN_MEMBERS)
def test_members_that_are_no_arrays_are_one_clear_line(tmp_path, fault):
    path = tmp_path / "p.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("audio.npy", FOREIGN_MEMBERS[fault])
    with pytest.raises(DataError, match=r"p\.npz") as caught:
        read_npz(path, {"audio": ("int16", 1)}, "Fetch it again.")
    assert str(caught.value).endswith("Fetch it again.") and "\n" not in str(caught.value)
