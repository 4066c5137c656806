"""Text: the sample, the reviews however they came, films held out, and broken copies."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pooch
import pytest

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, imdb
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound, write_folder
from longseq_tutorial.tasks.packs import write_npz
from longseq_tutorial.tasks.text import SAMPLE, held_out

from .served import served


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch, request):
    """No test here sees the machine's data or network unless it asks for `real_data`."""
    if "real_data" in request.fixturenames:
        return
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / SAMPLE).write_bytes((REPOSITORY_DATA / SAMPLE).read_bytes())
    for module in ("base", "text"):
        monkeypatch.setattr(f"longseq_tutorial.tasks.{module}.REPOSITORY_DATA", mine)
    monkeypatch.setattr(imdb, "ARCHIVE", "http://127.0.0.1:9/aclImdb_v1.tar.gz")


def files(each: int = 6) -> dict[str, bytes]:
    """A small aclImdb: review i of a part is about film i // 2; test films are others."""
    content: dict[str, bytes] = {"aclImdb/README": b"hello", "aclImdb/train/unsup/0_0.txt": b"unlabelled"}
    for part, first in (("train", 100), ("test", 200)):
        for word, stars in (("pos", 9), ("neg", 2)):
            for i in range(each):
                text = f"{part} {word} {i} is a film<br />über all"
                content[f"aclImdb/{part}/{word}/{i}_{stars}.txt"] = text.encode()
            addresses = [f"http://www.imdb.com/title/tt{first + i // 2:07d}/usercomments" for i in range(each)]
            content[f"aclImdb/{part}/urls_{word}.txt"] = "\n".join(addresses).encode() + b"\n"
    return content


def archive(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(content: dict[str, bytes], folder: Path) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def said(split) -> list[tuple[str, int]]:
    return [(bytes((x - 1).tolist()).decode(), label) for x, label in split]


OPTIONS = {"source": "imdb", "verify": False, "valid": 3}


def test_sample():
    task = tasks.load("text", source="sample")
    config = task.config
    assert (config.kind, config.vocabulary, config.classes, config.length) == ("tokens", 257, 2, 4_096)
    assert "made by this project" in config.source
    assert (REPOSITORY_DATA / SAMPLE).stat().st_size < 200_000
    assert [len(split) for split in (task.train, task.valid, task.test)] == [240, 60, 60]
    for split in (task.train, task.valid, task.test):
        assert np.bincount(split.labels).tolist() == [len(split) // 2] * 2
    text, _ = said(task.train)[0]
    assert text.isprintable() and text[0].isupper()
    assert len({text for split in (task.train, task.valid, task.test) for text, _ in said(split)}) == 360


def test_sample_can_be_learned_from_its_words():
    """Word counts and a linear model: the labels belong to the texts."""
    task = tasks.load("text", source="sample")
    words = sorted({word for text, _ in said(task.train) for word in text.lower().split()})
    place = {word: i for i, word in enumerate(words)}

    def counts(split):
        table = np.zeros((len(split), len(words)))
        for row, (text, _) in zip(table, said(split), strict=True):
            for word in text.lower().split():
                if word in place:
                    row[place[word]] += 1
        return table

    x, y = counts(task.train), 2.0 * task.train.labels - 1
    weights = np.linalg.solve(x.T @ x + 5 * np.eye(len(words)), x.T @ y)
    assert ((counts(task.test) @ weights > 0) == task.test.labels).mean() > 0.85


def test_archive_folder_and_pack_hold_the_same(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "aclImdb_v1.tar.gz").write_bytes(archive(files()))
    unpack(files(), tmp_path / "b")
    (tmp_path / "c").mkdir()
    reviews = imdb.find(tmp_path / "a", verify=False)
    write_npz(tmp_path / "c" / "imdb_bytes.npz.xz", {name: getattr(reviews, name) for name in imdb._FORM})
    tasks_ = [tasks.load("text", root=tmp_path / name, **OPTIONS) for name in ("a", "b", "b/aclImdb", "c")]
    for task in tasks_:
        assert [len(split) for split in (task.train, task.valid, task.test)] == [8, 4, 12]
        assert said(task.train) == said(tasks_[0].train) and said(task.valid) == said(tasks_[0].valid)
    text, label = said(tasks_[0].test)[-1]
    assert (text, label) == ("test pos 5 is a film<br />über all", 1)
    assert "unverified" in tasks_[0].config.source and "4 training reviews" in tasks_[0].config.source


def test_whole_films_are_held_out(tmp_path):
    unpack(files(20), tmp_path)
    reviews = imdb.find(tmp_path, verify=False)
    training = reviews.split == 0
    held = held_out(reviews.movie_id, training, 7)
    assert held.sum() == 8  # films have four reviews each
    assert not set(reviews.movie_id[held]) & set(reviews.movie_id[training & ~held])
    shuffled = np.random.default_rng(0).permutation(len(held))
    assert (held_out(reviews.movie_id[shuffled], training[shuffled], 7) == held[shuffled]).all()
    assert not held_out(reviews.movie_id, training, 0).any()
    everything = tasks.load("text", root=tmp_path, **(OPTIONS | {"valid": 0}))
    assert [len(split) for split in (everything.train, everything.valid, everything.test)] == [40, 0, 40]
    with pytest.raises(DataError, match="no reviews are left to train on"):
        tasks.load("text", root=tmp_path, **(OPTIONS | {"valid": 40}))


def test_length_cuts_bytes(tmp_path):
    unpack(files(), tmp_path)
    task = tasks.load("text", root=tmp_path, length=5, **OPTIONS)
    assert task.config.length == 5 and "first 5 bytes" in task.config.source
    assert {text for text, _ in said(task.train)} == {"train"}


def test_some_test_reviews_are_spread_over_all() -> None:
    whole, some = tasks.load("text", source="sample").test, tasks.load("text", source="sample", test=7)
    assert "7 of the test reviews" in some.config.source and len(some.test) == 7
    rows = [next(i for i in range(len(whole)) if whole[i][0].equal(some.test[k][0])) for k in range(7)]
    assert rows == [k * len(whole) // 7 for k in range(7)]
    assert len(tasks.load("text", source="sample", test=10_000).test) == len(whole)
    with pytest.raises(DataError, match="at least 1 review, or None for all; got 0"):
        tasks.load("text", source="sample", test=0)


def test_incomplete_sets_are_refused(tmp_path):
    unpack(files(), tmp_path)
    with pytest.raises(DataError, match=r"holds 6, 6, 6, 6 reviews .* instead of 12,500 each.*verify=False"):
        tasks.load("text", root=tmp_path, source="imdb")


def test_download_checks_and_keeps_a_pack(tmp_path, monkeypatch):
    web = tmp_path / "web"
    web.mkdir()
    raw = archive(files())
    (web / "aclImdb_v1.tar.gz").write_bytes(raw)
    monkeypatch.setattr(imdb, "EACH", 6)
    with served(web) as server:
        monkeypatch.setattr(imdb, "ARCHIVE", f"{server.url}/aclImdb_v1.tar.gz")
        with pytest.raises(DataError, match="checksum is another"):
            tasks.load("text")
        assert not list(write_folder(None).iterdir())
        monkeypatch.setattr(imdb, "SHA256", hashlib.sha256(raw).hexdigest())
        task = tasks.load("text", valid=2)
    assert task.config.source.startswith("IMDB reviews, official split, 4 training reviews of whole films")
    assert [path.name for path in write_folder(None).iterdir()] == ["imdb_bytes.npz"]
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: pytest.fail("the network was asked"))
    assert said(tasks.load("text", valid=2).train) == said(task.train)


def test_no_network_and_no_copy(capsys):
    task = tasks.load("text")
    notice = capsys.readouterr().err
    assert task.config.source.startswith("reviews by a grammar") and notice.count("\n") == 1
    assert "LONGSEQ_DATA" in notice and "Using the sample instead" in notice
    for options in ({}, {"download": False}):
        with pytest.raises(DataNotFound, match="get text"):
            tasks.load("text", source="imdb", **options)


def changed(**changes: bytes | None) -> dict[str, bytes]:
    """The small set with files replaced (`None`: taken away); _ stands for /."""
    content = files()
    for name, data in changes.items():
        path = "aclImdb/" + name.replace("__", "/") + ".txt"
        content.pop(path, None)
        if data is not None:
            content[path] = data
    return content


FAULTS = {
    "empty review": (changed(train__pos__2_9=b" \n"), "train/pos/2_9.txt is empty"),
    "mislabelled": (changed(train__pos__3_2=b"I liked it"), "3_2.txt lies among the pos reviews and has 2 stars"),
    "five stars": (changed(train__neg__9_5=b"so so"), "has 5 stars"),
    "twice": (changed(train__pos__2_8=b"again"), "two reviews train/pos/2"),
    "no films": (changed(train__urls_pos=None), "train/urls_pos.txt names no film for review 0"),
    "too few films": (changed(test__urls_neg=b"http://www.imdb.com/title/tt0000001/x\n"), "names no film for review 1"),
    "foreign films": (changed(test__urls_neg=b"hello\n" * 6), "urls_neg.txt, line 1, is no film's address"),
    "nothing": ({"aclImdb/README": b"hello"}, "holds no review named like"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_archives_and_folders(tmp_path, fault):
    content, says = FAULTS[fault]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "aclImdb_v1.tar.gz").write_bytes(archive(content))
    unpack(content, tmp_path / "b")
    (tmp_path / "b" / "aclImdb" / "train" / "pos").mkdir(parents=True, exist_ok=True)
    for folder in "ab":
        with pytest.raises(DataError, match=says) as caught:
            tasks.load("text", root=tmp_path / folder, **OPTIONS)
        assert "\n" not in str(caught.value)


def test_a_list_of_films_that_is_there_twice_is_refused(tmp_path):
    films = files()["aclImdb/train/urls_pos.txt"]
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(archive({**files(), "train/urls_pos.txt": films}))
    with pytest.raises(DataError, match=r"two lists train/urls_pos\.txt"):
        tasks.load("text", root=tmp_path, **OPTIONS)


def test_harmful_archive(tmp_path):
    content = {**files(), "../../train/pos/77_9.txt": b"escaped"}
    (tmp_path / "aclImdb_v1.tar.gz").write_bytes(archive(content))
    with pytest.raises(DataError, match="leads out of the archive"):
        tasks.load("text", root=tmp_path, **OPTIONS)
    assert not list(tmp_path.rglob("77_9.txt"))


BROKEN_PACKS = {
    "label": ({"label": np.full(24, 2, np.uint8)}, "neither 0 nor 1"),
    "against the stars": ({"rating": np.full(24, 9, np.uint8)}, "labelled against its stars"),
    "too few": ({"movie_id": np.zeros(3, np.int32)}, "disagree on the number"),
    "too few labels": ({"label": np.zeros(3, np.uint8)}, "disagree on the number"),
    "eleven stars": ({"rating": np.full(24, 11, np.uint8), "label": np.ones(24, np.uint8)}, "against its stars"),
    "offsets": ({"offsets": np.arange(25)}, "offsets do not rise"),
    "floats": ({"text": np.zeros(9)}, "text must be uint8"),
}


@pytest.mark.parametrize("fault", BROKEN_PACKS)
def test_broken_packs(tmp_path, fault):
    change, says = BROKEN_PACKS[fault]
    unpack(files(), tmp_path / "b")
    reviews = imdb.find(tmp_path / "b", verify=False)
    write_npz(tmp_path / "imdb_bytes.npz", {name: getattr(reviews, name) for name in imdb._FORM} | change)
    with pytest.raises(DataError, match=says) as caught:
        tasks.load("text", root=tmp_path, **OPTIONS)
    assert "imdb_bytes.npz" in str(caught.value)


def test_broken_sample(tmp_path):
    path = tmp_path / "data" / SAMPLE
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"text_sample.npz is damaged.*git checkout"):
        tasks.load("text", source="sample")


@pytest.mark.parametrize(
    ("options", "says"),
    [({"source": "web"}, "source must be"), ({"length": 0}, "at least 1 byte"), ({"valid": -1}, "valid must be")],
)
def test_contradictions(tmp_path, options, says):
    unpack(files(), tmp_path)
    with pytest.raises(DataError, match=says):
        tasks.load("text", root=tmp_path, **(OPTIONS | options))


def test_the_real_reviews(real_data):
    if not any((real_data / name).exists() for name in imdb.PACKS):
        pytest.skip("no IMDB pack there")
    task = tasks.load("text", root=real_data, source="imdb")
    assert len(task.train) + len(task.valid) == len(task.test) == 25_000
    assert 2_500 <= len(task.valid) < 2_600
    assert np.bincount(task.test.labels).tolist() == [12_500, 12_500]
    assert task.train.lengths.max() == 4_096
    cut = np.concatenate([split.lengths == 4_096 for split in (task.train, task.valid, task.test)]).mean()
    assert 0.027 < cut < 0.029  # the share that the specification gives
