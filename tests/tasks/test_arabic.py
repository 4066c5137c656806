"""Arabic Speech Commands: the authors' repository by its CSV files, the packs, and broken files."""

import bz2
import io

import numpy as np
import pytest

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, arabic
from longseq_tutorial.tasks.arabic import FILES, PACKS, WORDS20
from longseq_tutorial.tasks.base import DataNotFound

from .test_speech_commands import wav

MORE = ("close", "zoom in", "zoom out", *(f"word{letter}" for letter in "abcdefghijklmnopq"))


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch, request):
    if "real_data" in request.fixturenames:
        return
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    mine = tmp_path / "data"
    mine.mkdir()
    monkeypatch.setattr("longseq_tutorial.tasks.base.REPOSITORY_DATA", mine)


def repository(root, words=WORDS20 + MORE, header="file,class", prefix="dataset/"):
    """A copy in the authors' form: speakers 1 and 2 train, 3 chooses, 4 tests; one take each."""
    rows = {"train": [header], "valid": [header], "test": [header]}
    for i, word in enumerate(words):
        for speaker, part in ((1, "train"), (2, "train"), (3, "valid"), (4, "test")):
            name = f"{speaker:08d}_NO_01.wav"
            (root / "dataset" / word).mkdir(parents=True, exist_ok=True)
            (root / "dataset" / word / name).write_bytes(wav(800, seed=10 * i + speaker))
            rows[part].append(f"{prefix}{word}/{name},{word}")
    for part, lines in rows.items():
        (root / FILES[part]).write_text("\n".join(line for line in lines if line) + "\n")
    return root


@pytest.mark.parametrize(("header", "prefix"), [("file,class", "dataset/"), ("", "./dataset/"), ("path,word", "")])
@pytest.mark.parametrize("packed", [False, True], ids=["git", "zip"])
def test_the_authors_repository(tmp_path, header, prefix, packed):
    """As git clone gives it, and as the zip files of it that go round: another folder, another one inside."""
    root = repository(tmp_path / f"arabic-speech-commands-dataset{'-master' * packed}", header=header, prefix=prefix)
    if packed:
        (root / "dataset").rename(root / "inner")
        (root / "dataset").mkdir()
        (root / "inner").rename(root / "dataset" / "dataset")
    task = tasks.load("speech", root=tmp_path, source="arabic", verify=False)
    assert [len(split) for split in (task.train, task.valid, task.test)] == [40, 20, 20]
    assert task.config.class_names == WORDS20 and task.config.length == 16_000
    assert task.config.source == "Arabic Speech Commands, 20 words, unverified, official speaker-disjoint parts"
    every = tasks.load("speech", root=root, source="arabic40", verify=False, normalise=None)
    assert every.config.classes == 40 and every.config.class_names[:20] == WORDS20
    x, label = every.test[21]
    assert every.config.class_names[label] == MORE[1] == "zoom in"
    assert (x[800:] == 0).all() and (x[:800] != 0).any()


FAULTS = {
    "no rows": ("train.csv", "file,class\n", "train.csv names no recordings"),
    "foreign row": ("val.csv", "file,class\nhello,yes\n", "val.csv, row 2: wanted a file such as"),
    "path outside": ("val.csv", "file,class\n../../../etc/yes.wav,yes\n", "val.csv, row 2: wanted a file"),
    "mislabelled": ("test.csv", "file,class\ndataset/yes/00000004_NO_01.wav,no\n", "04_NO_01.wav is labelled 'no'"),
    "speaker twice": ("test.csv", "file,class\ndataset/yes/00000003_NO_01.wav,yes\n", "speaker 00000003 is in valid"),
    "first row cut": ("val.csv", "dataset/yes/00000003_NO_01.w,yes\n", "val.csv, row 1: wanted a file such as"),
    "row twice": ("val.csv", "dataset/yes/00000003_NO_01.wav,yes\n" * 2, "00000003_NO_01.wav is named twice"),
    "no training": ("train.csv", "file,class\ndataset/close/00000001_NO_01.wav,close\n", "nothing to train on"),
    "lost file": ("test.csv", "file,class\ndataset/yes/00000009_NO_01.wav,yes\n", "cannot read yes/00000009_NO_01.wav"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_repositories(tmp_path, fault):
    name, text, says = FAULTS[fault]
    repository(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=says) as caught:
        tasks.load("speech", root=tmp_path, source="arabic", verify=False)
    assert "\n" not in str(caught.value)


def test_incomplete_parts_only_when_asked(tmp_path, monkeypatch):
    """A CSV file that ends early at the end of a row still names every word."""
    repository(tmp_path)
    with pytest.raises(DataError, match="wanted 180 clips of each word in the train part; got 2 of 'zero'"):
        tasks.load("speech", root=tmp_path, source="arabic")
    monkeypatch.setattr(arabic, "CLIPS", {"train": 2, "valid": 1, "test": 1})
    assert "unverified" not in tasks.load("speech", root=tmp_path, source="arabic").config.source
    rows = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(rows[:-1]) + "\n")
    with pytest.raises(
        DataError, match=r"wanted 2 clips of each word in the train part; got 1 of 'wordq'.*verify=False"
    ):
        tasks.load("speech", root=tmp_path, source="arabic40")


def test_missing_words_broken_clips_and_no_copy(tmp_path):
    repository(tmp_path / "few", words=WORDS20[:5])
    with pytest.raises(DataError, match="wanted 20 words; got 5"):
        tasks.load("speech", root=tmp_path / "few", source="arabic", verify=False)
    root = repository(tmp_path / "cut")
    clip = root / "dataset" / "yes" / "00000001_NO_01.wav"
    clip.write_bytes(clip.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"00000001_NO_01.wav is cut off"):
        tasks.load("speech", root=root, source="arabic", verify=False)
    with pytest.raises(DataNotFound, match="git clone"):
        tasks.load("speech", source="arabic", verify=False)


def test_two_packs_hold_other_words(tmp_path):
    names = [f"{letter}{i}" for letter in "ab" for i in range(20)]
    arrays = {
        "q": np.ones((6, 160), np.int8), "peak": np.full(6, 99, np.int16), "mu": np.array(0.0),
        "label": np.zeros(6, np.uint8), "split": np.repeat(np.arange(3, dtype=np.uint8), 2),
        "speaker": np.zeros(6, np.int32), "sample_rate": np.array(160),
    }  # fmt: skip

    def put(name: str, words: list[str]) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, words=np.array(words), **arrays)
        (tmp_path / name).write_bytes(bz2.compress(buffer.getvalue()))

    put(PACKS[0], names[:20])
    put(PACKS[1], names[20:])
    assert tasks.load("speech", root=tmp_path, source="arabic40", verify=False).config.class_names == tuple(names)
    put(PACKS[1], names[:20])
    with pytest.raises(DataError, match="must hold other words"):
        tasks.load("speech", root=tmp_path, source="arabic40", verify=False)


def test_the_real_pack(real_data):
    if not (real_data / PACKS[0]).exists():
        pytest.skip("no Arabic pack there")
    clips, said = arabic.find(real_data)
    assert np.bincount(clips.split).tolist() == [3_600, 1_200, 1_200] and clips.words == WORDS20
    assert clips.audio.shape == (6_000, 16_000) and "8-bit copy" in said
