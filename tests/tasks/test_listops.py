"""The ListOps task: its cache, interruptions, the official files and what can be wrong with them."""

import gzip
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, listops
from longseq_tutorial.tasks.base import REPOSITORY_DATA
from longseq_tutorial.tasks.listops import CHUNK, Shape, decode, evaluate, make, read_tsv

SHORT = {"min_length": 5, "max_length": 60}
SMALL = {"train": 300, "valid": 50, "test": 40, "progress": False}
HEADER = b"Source\tTarget\r\n"
ROW = b"( ( ( [MAX 2 ) 9 ) ] )\t9\r\n"


def content(split) -> list[tuple[bytes, int]]:
    return [(x.numpy().astype(np.uint8).tobytes(), label) for x, label in split]


def test_small_task(tmp_path):
    task = tasks.load("listops", root=tmp_path, **SMALL, **SHORT)
    assert (task.config.kind, task.config.vocabulary, task.config.classes) == ("tokens", 16, 10)
    assert task.config.length == 60
    assert "seed 0" in task.config.source and "not the published lengths" in task.config.source
    assert [len(split) for split in (task.train, task.valid, task.test)] == [300, 50, 40]
    parts = [content(split) for split in (task.train, task.valid, task.test)]
    assert all(evaluate(list(tokens)) == label for part in parts for tokens, label in part)
    assert len({tokens for part in parts for tokens, _ in part}) == 390  # no expression twice, in any part
    assert max(split.lengths.max() for split in (task.train, task.valid, task.test)) < 60


def test_published_lengths_are_the_default(tmp_path):
    task = tasks.load("listops", root=tmp_path, **SMALL)
    assert task.config.length == 2_000
    assert task.config.source == "ListOps by the Long Range Arena's rule, seed 0 (made by this project)"
    assert task.train.lengths.min() > 500 and task.train.lengths.max() < 2_000


def test_a_larger_task_extends_a_smaller_one(tmp_path):
    small = tasks.load("listops", root=tmp_path, **SMALL, **SHORT)
    chunk = next(tmp_path.rglob("00000.npz"))
    before = chunk.read_bytes(), chunk.stat().st_mtime_ns
    large = tasks.load("listops", root=tmp_path, **(SMALL | {"train": 1_500}), **SHORT)
    assert (chunk.read_bytes(), chunk.stat().st_mtime_ns) == before  # read, not made again
    assert content(large.test) == content(small.test)
    assert content(large.valid) == content(small.valid)
    assert content(large.train)[:300] == content(small.train)


def test_seed_decides_everything(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    for folder, seed in zip(folders, (3, 3, 4), strict=True):
        folder.mkdir()
        tasks.load("listops", root=folder, seed=seed, **SMALL, **SHORT)
    one, same, other = (next(folder.rglob("00000.npz")).read_bytes() for folder in folders)
    assert one == same != other


def test_a_killed_run_leaves_only_whole_chunks_and_goes_on(tmp_path):
    script = (
        "import sys; from pathlib import Path; from longseq_tutorial.tasks.listops import Shape, make;"
        "make(0, 1_000_000, Shape(5, 60), Path(sys.argv[1]))"
    )
    root = Path(__file__).parents[2]
    killed = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(killed)], env=environment, cwd=root, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(killed.rglob("0*.npz"))) < 2 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.02)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    whole = len(list(killed.rglob("0*.npz")))
    assert whole >= 2
    count = (whole + 1) * CHUNK
    resumed = make(0, count, Shape(5, 60), killed, progress=False)
    straight = make(0, count, Shape(5, 60), tmp_path / "straight", progress=False)
    assert content(resumed) == content(straight)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "labels"])
def test_a_broken_chunk_is_one_clear_line(tmp_path, damage):
    tasks.load("listops", root=tmp_path, **SMALL, **SHORT)
    chunk = next(tmp_path.rglob("00000.npz"))
    raw = chunk.read_bytes()
    if damage == "labels":
        with np.load(chunk) as archive:
            arrays = dict(archive)
        arrays["labels"] = arrays["labels"][:-1]
        np.savez(chunk, **arrays)
    else:
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]
        chunk.write_bytes({"cut": raw[:middle], "flip": flipped, "empty": b"", "other": b"not numpy"}[damage])
    with pytest.raises(DataError, match=r"00000.npz.*Delete it, and it is made again") as caught:
        tasks.load("listops", root=tmp_path, **SMALL, **SHORT)
    assert "\n" not in str(caught.value)


FOREIGN = {
    "tokens": (lambda a: {"tokens": np.full_like(a["tokens"], 200)}, "tokens 1 to 15; got .* 200 to 200"),
    "labels": (lambda a: {"labels": (a["labels"] + 1) % 10}, "the first expression has the value"),
    "no expression": (lambda a: {"tokens": np.full_like(a["tokens"], 15)}, "without an open list"),
    "lengths": (lambda a: {"tokens": a["tokens"][:CHUNK], "offsets": np.arange(CHUNK + 1)}, "wanted lengths between 5"),
    "random numbers": (lambda a: {"state": np.full(625, 4_000_000_000, np.uint32)}, "its random numbers cannot go on"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOREIGN)
def test_a_chunk_of_something_else_is_one_clear_line(tmp_path, fault):
    change, says = FOREIGN[fault]
    make(0, CHUNK, Shape(5, 60), tmp_path, progress=False)
    chunk = next(tmp_path.rglob("00000.npz"))
    with np.load(chunk) as archive:
        arrays = dict(archive)
    np.savez(chunk, **(arrays | change(arrays)))
    with pytest.raises(DataError, match=says) as caught:
        make(0, CHUNK + 1, Shape(5, 60), tmp_path, progress=False)
    assert "00000.npz" in str(caught.value) and str(caught.value).endswith("Delete it, and it is made again.")


# The official files.


def official(folder: Path, name: str = "train", rows: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"basic_{name}.tsv"
    path.write_bytes(HEADER + ROW * rows)
    return path


@pytest.mark.parametrize("inner", ["", "listops-1000", "listops", "lra_release", "lra_release/lra_release"])
def test_official_files_are_found_wherever_root_points(tmp_path, inner):
    folder = tmp_path / inner / ("listops-1000" if inner.startswith("lra") else "")
    for name, rows in (("train", 5), ("val", 3), ("test", 2)):
        official(folder, name, rows)
    task = tasks.load("listops", root=tmp_path, source="official", train=5, valid=3, test=2)
    assert [len(split) for split in (task.train, task.valid, task.test)] == [5, 3, 2]
    assert task.train[0][0].tolist() == [12, 3, 10, 15]
    assert task.config.source == "ListOps, the official Long Range Arena files"
    with pytest.raises(DataError, match=r"basic_train.tsv has 5 rows; 96,000 were wanted"):
        tasks.load("listops", root=tmp_path, source="official")


def test_no_official_files(tmp_path):
    with pytest.raises(tasks.DataError, match=r"found no basic_train.tsv in .*lra_release.gz"):
        tasks.load("listops", root=tmp_path, source="official")


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize(("suffix", "pack"), [(".tsv", bytes), (".tsv.gz", gzip.compress), (".tsv.xz", lzma.compress)])
def test_line_ends_and_compression(tmp_path, end, suffix, pack):
    path = tmp_path / f"rows{suffix}"
    for last in (b"\r\n\r\n", b"\r\n", b""):
        path.write_bytes(pack((HEADER + ROW + ROW.strip() + last).replace(b"\r\n", end)))
        assert content(read_tsv(path)) == [(bytes([12, 3, 10, 15]), 9)] * 2


BROKEN = {
    "empty file": (b"", "its first line should be"),
    "no header": (ROW, "its first line should be"),
    "foreign": (b"\x89PNG\r\n\x1a\n\0\0\0", "its first line should be"),
    "no rows": (HEADER, "has a header and no rows"),
    "cut in a row": (HEADER + ROW + ROW[:-9], "row 3: wanted"),
    "cut before the value": (HEADER + ROW + ROW[:-3], "row 3: the value must be one digit"),
    "three columns": (HEADER + b"1\t1\t1\r\n", "row 2: .*got 3 columns"),
    "label not a digit": (HEADER + ROW + ROW.replace(b"\t9", b"\tnine"), "row 3: the value must be one digit"),
    "label above nine": (HEADER + ROW.replace(b"\t9", b"\t10"), "row 2: the value must be one digit; got '10'"),
    "wrong label": (HEADER + ROW * 4 + ROW.replace(b"\t9", b"\t8"), "row 6: .* value 9; the row says 8"),
    "unknown operator": (HEADER + b"[FIRST 1 2 ]\t1\r\n", "row 2: '\\[FIRST' is not a ListOps token"),
    "unclosed list": (HEADER + b"[MAX 1 2\t2\r\n", "row 2: 1 lists are still open"),
    "not text": (HEADER + b"\xff\xfe\t1\r\n", "row 2: .* is not a ListOps token"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_files_name_the_row(tmp_path, fault):
    raw, says = BROKEN[fault]
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=says) as caught:
        read_tsv(path)
    assert "basic_train.tsv" in str(caught.value) and "\n" not in str(caught.value)


def test_a_row_without_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(listops, "_LARGEST_ROW", 1_000)
    (tmp_path / "rows.tsv").write_bytes(HEADER + ROW + b"[MAX 1 " * 300 + b"]" * 300 + b"\t1\r\n")
    with pytest.raises(DataError, match="row 3: wanted 'expression<TAB>value'; got 1 columns"):
        read_tsv(tmp_path / "rows.tsv")


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_broken_compression(tmp_path, suffix, pack):
    path = tmp_path / f"rows.tsv{suffix}"
    whole = pack(HEADER + ROW * 200)
    for raw in (whole[:-10], whole[: len(whole) // 2] + b"\0\0\0\0" + whole[len(whole) // 2 + 4 :], b"plain text"):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=r"rows.tsv"):
            read_tsv(path)


def test_missing_file_and_too_long_an_expression(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*none.tsv"):
        read_tsv(tmp_path / "none.tsv")
    for name in ("train", "val", "test"):
        path = official(tmp_path, name)
        path.write_bytes(HEADER + b"[MAX" + b" 1" * 1_999 + b" ]\t1\r\n")
    with pytest.raises(DataError, match="expression 1: 2,001 tokens"):
        tasks.load("listops", root=tmp_path, source="official", train=1, valid=1, test=1)


def test_sample(tmp_path):
    task = tasks.load("listops", source="sample")
    assert [len(split) for split in (task.train, task.valid, task.test)] == [120, 40, 40]
    assert "made by this project" in task.config.source
    assert (REPOSITORY_DATA / "listops_sample.tsv.xz").stat().st_size < 200_000
    with pytest.raises(DataError, match="has 200 rows; 1,080 were wanted"):
        tasks.load("listops", source="sample", train=1_000)


def test_rows_written_as_the_official_files_write_them(tmp_path):
    """The sample's text is what decode gives back, character by character."""
    path = REPOSITORY_DATA / "listops_sample.tsv.xz"
    rows = lzma.decompress(path.read_bytes()).decode().split("\r\n")[1:-1]
    again = [f"{decode(x.numpy(), brackets=True)}\t{label}" for x, label in read_tsv(path)]
    assert again == rows


def test_the_reference_sample(real_data):
    """500 rows that were made by another program by the same rule."""
    path = real_data / "listops_sample.tsv.xz"
    if not path.exists():
        pytest.skip("no listops_sample.tsv.xz there")
    split = read_tsv(path)
    assert len(split) == 500
    assert split.lengths.min() > 500 and split.lengths.max() < 2_000


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "web"}, "source must be"),
        ({"train": 0}, "train must be at least 1"),
        ({"source": "sample", "max_length": 100, "min_length": 5}, "source='sample' is as it is"),
    ],
)
def test_contradictions(options, says):
    with pytest.raises(DataError, match=says):
        tasks.load("listops", **options)
