"""The Pathfinder task: its cache, interruptions, helpers, sample, the official files, and broken ones."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, pathfinder
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound
from longseq_tutorial.tasks.contours import SHAPES, label_of
from longseq_tutorial.tasks.pathfinder import SAMPLES, make, sample

SMALL = {"train": 300, "valid": 50, "test": 40, "progress": False}
EASY = {"paddles": 4}  # pictures that are made ten times as fast


def content(split) -> list[tuple[bytes, int]]:
    return [(x.numpy().tobytes(), label) for x, label in split]


def test_small_task(tmp_path):
    task = tasks.load("pathfinder", root=tmp_path, **SMALL)
    config = task.config
    assert (config.name, config.kind, config.classes, config.length, config.grid) == (
        "pathfinder", "samples", 2, 1_024, (32, 32)
    )  # fmt: skip
    assert config.source == "Pathfinder-32 by the Long Range Arena's rule, seed 0 (made by this project)"
    assert [len(split) for split in (task.train, task.valid, task.test)] == [300, 50, 40]
    x, label = task.train[0]
    assert x.shape == (1_024,) and x.min() == -1 and x.max() == 1 and label in (0, 1)
    parts = [content(split) for split in (task.train, task.valid, task.test)]
    assert len({picture for part in parts for picture, _ in part}) == 390


def test_tokens_lie_above_the_padding(tmp_path):
    samples = tasks.load("pathfinder", root=tmp_path, **SMALL)
    tokens = tasks.load("pathfinder", root=tmp_path, kind="tokens", **SMALL)
    assert tokens.config.vocabulary == 257
    x, y = tokens.train[3][0], samples.train[3][0]
    assert x.min() == 1 and x.max() == 256
    assert ((x - 1) / 127.5 - 1 - y).abs().max() < 1e-6


def test_a_larger_task_extends_a_smaller_one(tmp_path):
    small = tasks.load("pathfinder", root=tmp_path, **SMALL, **EASY)
    chunk = next(tmp_path.rglob("00000.npz"))
    before = chunk.read_bytes(), chunk.stat().st_mtime_ns
    large = tasks.load("pathfinder", root=tmp_path, **(SMALL | {"train": 1_500}), **EASY)
    assert (chunk.read_bytes(), chunk.stat().st_mtime_ns) == before  # read, not made again
    assert content(large.test) == content(small.test) and content(large.valid) == content(small.valid)
    assert content(large.train)[:300] == content(small.train)
    assert "4 paddles a path, not the published 14" in small.config.source


def test_seed_decides_everything_and_helpers_change_nothing(tmp_path):
    folders = [tmp_path / name for name in "abc"]
    shape = pathfinder.dataclasses.replace(SHAPES[32], paddles=3)
    results = []
    for folder, seed, workers in zip(folders, (3, 3, 4), (1, 2, 1), strict=True):
        results.append(make(seed, 4_500, shape, folder, progress=False, workers=workers))
    files = [sorted(path.read_bytes() for path in folder.rglob("*.npz")) for folder in folders]
    assert files[0] == files[1] != files[2] and len(files[0]) == 5
    assert (results[0][0] == results[1][0]).all() and results[0][0].shape == (4_500, 1_024)


def test_a_killed_run_leaves_only_whole_chunks_and_goes_on(tmp_path):
    script = (
        "import sys; from pathlib import Path; from longseq_tutorial import tasks;"
        "tasks.load('pathfinder', root=sys.argv[1], paddles=3, workers=2)"
    )
    root, killed, straight = Path(__file__).parents[2], tmp_path / "killed", tmp_path / "straight"
    killed.mkdir()
    straight.mkdir()
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(killed)],
        env=os.environ | {"PYTHONPATH": str(root)}, cwd=root, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while len(list(killed.rglob("0*.npz"))) < 3 and time.monotonic() < deadline and run.poll() is None:
            time.sleep(0.02)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
    whole = sorted(path.name for path in killed.rglob("0*.npz"))
    assert len(whole) >= 3
    options = {"paddles": 3, "train": 3_900, "valid": 50, "test": 50, "progress": False}
    resumed = tasks.load("pathfinder", root=killed, **options)
    assert content(resumed.train) == content(tasks.load("pathfinder", root=straight, **options).train)


def test_much_data_are_mapped_from_a_file(tmp_path, monkeypatch):
    shape = pathfinder.dataclasses.replace(SHAPES[32], paddles=3)
    images, labels = make(0, 1_200, shape, tmp_path, progress=False)
    monkeypatch.setattr(pathfinder, "_SMALL", 1)
    for _ in range(2):  # made, then found
        mapped, again = make(0, 1_200, shape, tmp_path, progress=False)
        assert isinstance(mapped, np.memmap) and (mapped == images).all() and (again == labels).all()
    next(tmp_path.rglob("1200.u8")).write_bytes(b"cut")
    assert (make(0, 1_200, shape, tmp_path, progress=False)[0] == images).all()


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other", "labels", "fewer"])
def test_a_broken_chunk_is_one_clear_line(tmp_path, damage):
    tasks.load("pathfinder", root=tmp_path, **SMALL, **EASY)
    chunk = next(tmp_path.rglob("00000.npz"))
    raw = chunk.read_bytes()
    if damage in ("labels", "fewer"):
        with np.load(chunk) as archive:
            arrays = dict(archive)
        arrays["labels"] = 1 - arrays["labels"] if damage == "labels" else arrays["labels"][:-1]
        np.savez(chunk, **arrays)
    else:
        middle = len(raw) // 2
        flipped = raw[:middle] + bytes([raw[middle] ^ 255]) + raw[middle + 1 :]
        chunk.write_bytes({"cut": raw[:middle], "flip": flipped, "empty": b"", "other": b"not numpy"}[damage])
    with pytest.raises(DataError, match=r"00000.npz.*Delete it, and it is made again") as caught:
        tasks.load("pathfinder", root=tmp_path, **SMALL, **EASY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "size"), [("pathfinder", 32), ("pathx", 128)])
def test_samples(name, size):
    task = tasks.load(name, source="sample")
    assert task.config.name == name and task.config.grid == (size, size)
    assert "made by this project" in task.config.source
    assert (REPOSITORY_DATA / SAMPLES[size]).stat().st_size < 200_000
    pictures = sample(size)
    assert (label_of(pictures.paths, pictures.dots) == pictures.labels).all()
    assert sum(map(len, (task.train, task.valid, task.test))) == len(pictures.labels)


def test_pathx_is_pathfinder_at_128(tmp_path):
    task = tasks.load("pathx", root=tmp_path, train=4, valid=2, test=2, paddles=3, progress=False)
    assert (task.config.name, task.config.length) == ("pathx", 16_384)
    other = tasks.load("pathfinder", root=tmp_path, size=128, train=4, valid=2, test=2, paddles=3)
    assert content(task.train) == content(other.train)
    assert "settings of this project's own" not in task.config.source


# The official files.


def png(pixels: np.ndarray, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def official(root: Path, batches: int = 2, each: int = 6, size: int = 32) -> Path:
    """A small archive in the official form; pixel (0, 0) counts the pictures, the label is its parity."""
    home = root / f"pathfinder{size}" / "curv_contour_length_14"
    for batch in (10, 9)[:batches]:
        (home / "imgs" / str(batch)).mkdir(parents=True)
        (home / "metadata").mkdir(exist_ok=True)
        lines = []
        for i in range(each):
            pixels = np.zeros((size, size), np.uint8)
            pixels[0, 0] = number = i + (each if batch == 10 else 0)
            (home / "imgs" / str(batch) / f"sample_{i}.png").write_bytes(png(pixels))
            lines.append(f"imgs/{batch} sample_{i}.png {i} {number % 2} 1.0 14 4 2 0.5 1 1")
        (home / "metadata" / f"{batch}.npy").write_text("\n".join(lines) + "\n")
    return home


SIZES = {"train": 8, "valid": 2, "test": 2, "progress": False}


@pytest.mark.parametrize("inner", ["", "lra_release", "lra_release/lra_release", "pathfinder"])
def test_official_files_are_found_wherever_root_points(tmp_path, inner):
    official(tmp_path / inner)
    task = tasks.load("pathfinder", root=tmp_path, source="official", kind="tokens", **SIZES)
    assert [len(split) for split in (task.train, task.valid, task.test)] == [8, 2, 2]
    numbers = [int(x[0]) - 1 for split in (task.train, task.valid, task.test) for x, _ in split]
    assert numbers == list(range(12))  # metadata files in the order of their numbers, parts by position
    assert task.train.labels.tolist() == [0, 1] * 4
    assert task.config.source == "Pathfinder-32, the official Long Range Arena files (curv_contour_length_14)"
    with pytest.raises(DataError, match="has 12 pictures; 200,000 were wanted"):
        tasks.load("pathfinder", root=tmp_path, source="official", progress=False)


def test_official_metadata_of_newer_generators(tmp_path):
    home = official(tmp_path, batches=1)
    rows = [["imgs/10", f"sample_{i}.png", str(i), str(i % 2), "1.0"] for i in range(6)]
    np.save(home / "metadata" / "10.npy", np.array(rows))
    task = tasks.load("pathfinder", root=home, source="official", train=4, valid=1, test=1, progress=False)
    assert task.train.labels.tolist() == [0, 1, 0, 1]


def test_an_empty_picture_is_passed_over_and_counted(tmp_path):
    home = official(tmp_path)
    (home / "imgs" / "9" / "sample_3.png").write_bytes(b"")
    task = tasks.load("pathfinder", root=tmp_path, source="official", **SIZES)
    assert len(task.train) == 7 and "1 empty pictures left out" in task.config.source


def test_more_than_one_empty_picture_is_a_broken_copy(tmp_path):
    """Left out in silence, they would leave nothing to train on, and let two parts share a picture."""
    home = official(tmp_path)
    (home / "imgs" / "9" / "sample_3.png").write_bytes(b"")
    with pytest.raises(DataError, match="no pictures are left to train on: 1 are empty"):
        tasks.load("pathfinder", root=tmp_path, source="official", train=1, valid=5, test=6, progress=False)
    (home / "imgs" / "10" / "sample_1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"has 2 empty pictures among the first .* wanted at most 1"):
        tasks.load("pathfinder", root=tmp_path, source="official", **SIZES)


NOISE = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
LINE = "imgs/9 sample_0.png 0 1 1.0 14 4 2 0.5 1 1\n"
BROKEN = {
    "empty metadata": ("metadata/9.npy", b"", "9.npy is empty"),
    "foreign metadata": ("metadata/9.npy", b"\x00\x01PNG", "9.npy, line 1: wanted"),
    "path outside": ("metadata/9.npy", LINE.replace("imgs/9", "../../9").encode(), "9.npy, line 1: wanted"),
    "absolute path": ("metadata/9.npy", LINE.replace("imgs/9", "/etc").encode(), "9.npy, line 1: wanted"),
    "label 2": ("metadata/9.npy", (LINE + LINE.replace(" 0 1 ", " 0 2 ")).encode(), "9.npy, line 2: .*label of 0 or 1"),
    "cut line": ("metadata/9.npy", LINE.encode()[:19], "9.npy, line 1: wanted"),
    "pickled": (
        "metadata/9.npy",
        (lambda b: (np.save(b, np.array([{}], dtype=object), allow_pickle=True), b.getvalue())[1])(io.BytesIO()),
        "9.npy is damaged or holds Python objects",
    ),
    "numbers": (
        "metadata/9.npy",
        (lambda b: (np.save(b, np.zeros((2, 11))), b.getvalue())[1])(io.BytesIO()),
        "must hold a table of text",
    ),
    "broken array": ("metadata/9.npy", b"\x93NUMPY\x01\x00\x10\x00{'shape': (     \n", "9.npy is damaged"),
    "no picture": ("metadata/9.npy", LINE.replace("sample_0", "sample_77").encode(), "cannot read .*sample_77.png"),
    "cut picture": ("imgs/9/sample_2.png", png(NOISE)[:-400], "sample_2.png is not a whole PNG"),
    "end cut off": ("imgs/9/sample_2.png", png(NOISE)[:-13], "sample_2.png is not a whole PNG"),
    "foreign picture": ("imgs/9/sample_2.png", b"GIF89a", "sample_2.png is not a whole PNG"),
    "16 bits": (
        "imgs/9/sample_2.png",
        png(NOISE.astype(np.uint16) * 257, "I;16"),
        "sample_2.png: wanted .* of 8 bits.* I;16",
    ),
    "named twice": ("metadata/9.npy", (LINE * 2).encode(), "names 9/sample_0.png twice"),
    "other size": ("imgs/9/sample_2.png", png(np.zeros((64, 64), np.uint8)), "sample_2.png: wanted 32 x 32.*64 x 64"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_official_files_are_one_clear_line(tmp_path, fault):
    where, raw, says = BROKEN[fault]
    home = official(tmp_path)
    (home / where).write_bytes(raw)
    with pytest.raises(DataError, match=says) as caught:
        tasks.load("pathfinder", root=tmp_path, source="official", **SIZES)
    assert "\n" not in str(caught.value)


def test_no_official_files(tmp_path):
    with pytest.raises(DataNotFound, match=r"found no pathfinder32/curv_contour_length_14/metadata .*lra_release.gz"):
        tasks.load("pathfinder", root=tmp_path, source="official")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "web"}, "source must be"),
        ({"size": 48}, "size must be one of 32, 64, 128, 256"),
        ({"kind": "bytes"}, "kind must be"),
        ({"train": 0}, "train must be at least 1"),
        ({"source": "sample", "train": 161}, "at most 160"),
        ({"source": "sample", "size": 64}, "the sample has sizes 32 and 128"),
        ({"source": "official", "paddles": 7}, "6, 9 or 14"),
        ({"paddles": 2}, "paddles must be at least 3"),
        ({"workers": 0, "train": 9_000, "paddles": 3}, "workers must be at least 1"),
    ],
)
def test_contradictions(tmp_path, options, says):
    with pytest.raises(DataError, match=says):
        tasks.load("pathfinder", root=tmp_path, **({"train": 5, "valid": 2, "test": 2} | options))
