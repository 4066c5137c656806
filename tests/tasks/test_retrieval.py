"""Retrieval: pairs and their batches, the official files, the stand-ins by their names, and broken files."""

import io
import tarfile

import numpy as np
import pytest
import torch

from longseq_tutorial import tasks
from longseq_tutorial.data import main
from longseq_tutorial.tasks import DataError, PairBatch, PairSplit, aan, collate, imdb
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound, Split
from longseq_tutorial.tasks.packs import write_npz
from longseq_tutorial.tasks.retrieval import draw_pairs

from .served import served
from .test_text import files, unpack


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch, request):
    """No test here sees the machine's data or network unless it asks for `real_data`."""
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / "text_sample.npz").write_bytes((REPOSITORY_DATA / "text_sample.npz").read_bytes())
    for module in ("base", "text"):
        monkeypatch.setattr(f"longseq_tutorial.tasks.{module}.REPOSITORY_DATA", mine)
    if "real_data" in request.fixturenames:
        return
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    monkeypatch.setattr(imdb, "ARCHIVE", "http://127.0.0.1:9/aclImdb_v1.tar.gz")
    monkeypatch.setattr(aan, "ARCHIVE", "http://127.0.0.1:9/lra_release.gz")


def said(split) -> list[tuple[str, str, int]]:
    return [(*(bytes((x - 1).tolist()).decode() for x in pair), label) for pair, label in split]


# Pairs.


def pairs_of(*lengths: int) -> PairSplit:
    documents = Split(np.arange(sum(lengths)) % 9 + 1, np.cumsum([0, *lengths]), np.zeros(len(lengths)))
    return PairSplit(documents, [[0, 1], [2, 0], [1, 1]], [1, 0, 1])


def test_pairs_and_their_batches():
    split = pairs_of(3, 5, 2)
    assert len(split) == 3 and split.lengths.tolist() == [5, 3, 5]
    (one, two), label = split[1]
    assert (len(one), len(two), label) == (2, 3, 0)
    batch = collate(list(split))
    assert isinstance(batch, PairBatch)
    assert batch.x.shape == batch.mask.shape == (3, 5) and batch.x2.shape == batch.mask2.shape == (3, 5)
    assert batch.mask.sum(1).tolist() == [3, 2, 5] and batch.mask2.sum(1).tolist() == [5, 3, 5]
    assert batch.label.tolist() == [1, 0, 1]
    assert torch.equal(batch.x2[1][batch.mask2[1]], two)
    part = split.select(split.labels == 1)
    assert len(part) == 2 and part.documents is split.documents
    with pytest.raises(IndexError):
        split[3]


@pytest.mark.parametrize(
    ("pairs", "labels", "says"), [([[0, 1]], [1, 0], "each pair needs a label"), ([[0, 3]], [1], "documents 0 to 2")]
)
def test_pairs_refuse_what_does_not_fit(pairs, labels, says):
    with pytest.raises(DataError, match=says):
        PairSplit(pairs_of(3, 5, 2).documents, pairs, labels)


# Pairs of reviews.


def test_sample():
    task = tasks.load("retrieval", source="sample")
    config = task.config
    assert (config.kind, config.vocabulary, config.classes, config.pairs) == ("tokens", 257, 2, True)
    assert config.source.startswith("same-film pairs of reviews by a grammar (made by this project)")
    assert config.class_names == ("different films", "same film")
    assert [len(split) for split in (task.train, task.valid, task.test)] == [240, 60, 60]
    for split in (task.train, task.valid, task.test):
        assert isinstance(split, PairSplit) and split.labels.mean() == 0.5
        assert (split.pairs[:, 0] != split.pairs[:, 1]).all()


def test_drawn_pairs_keep_the_rule():
    rng = np.random.default_rng(0)
    film, label = rng.integers(0, 40, 300), rng.integers(0, 2, 300)
    places = np.arange(50, 300)
    pairs, same = draw_pairs(np.random.default_rng(1), places, film, label, 2_001)
    assert pairs.shape == (2_001, 2) and pairs.min() >= 50
    assert ((film[pairs[:, 0]] == film[pairs[:, 1]]) == same).all() and (pairs[:, 0] != pairs[:, 1]).all()
    opinions = label[pairs].sum(1)
    for number in range(3):  # both pleased, both displeased, one of each: as often in either class
        assert abs((opinions[same == 1] == number).mean() - (opinions[same == 0] == number).mean()) < 0.01
    again = draw_pairs(np.random.default_rng(1), places, film, label, 2_001)
    assert (again[0] == pairs).all()
    for wrong in (np.zeros(300, int), np.arange(300)):
        with pytest.raises(DataError, match="need at least two films"):
            draw_pairs(rng, places, wrong, label, 10)


def test_pairs_of_reviews_share_no_film_between_the_parts(tmp_path):
    unpack(files(40), tmp_path)
    options = {"source": "imdb-pairs", "verify": False, "train": 60, "valid": 20, "test": 30}
    task = tasks.load("retrieval", root=tmp_path, **options)
    assert task.config.source.startswith("IMDB same-film pairs, a stand-in for the Long Range Arena's, seed 0")
    reviews = imdb.find(tmp_path, verify=False)
    films = [set(reviews.movie_id[split.pairs].ravel()) for split in (task.train, task.valid, task.test)]
    assert not (films[0] & films[1] or films[0] & films[2] or films[1] & films[2])
    other = tasks.load("retrieval", root=tmp_path, seed=1, **options)
    assert said(other.train) != said(task.train) == said(tasks.load("retrieval", root=tmp_path, **options).train)


def test_auto_says_what_it_took(tmp_path, capsys):
    assert "by a grammar" in tasks.load("retrieval").config.source
    assert "using source='sample', a stand-in" in capsys.readouterr().err
    unpack(files(40), tmp_path / "b")
    task = tasks.load("retrieval", root=tmp_path / "b", verify=False, train=4, valid=4, test=4)
    assert "IMDB same-film pairs" in task.config.source
    official(tmp_path / "b")
    assert "official" in tasks.load("retrieval", root=tmp_path / "b", verify=False).config.source


# The official files.

ROWS = (
    "1.0\tP01-1001\tP02-1002\tb'He said \"no\\n'\tb\"It's \\xe2 b\"\n"
    "0.0\tP01-1001\tP03-1003\tb'He said \"no\\n'\tb'third'\n"
)


def official(folder, rows: str = ROWS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in aan.FILES.values():
        (folder / name).write_text(rows)


@pytest.mark.parametrize("inner", ["", "tsv_data", "lra_release/lra_release/tsv_data"])
def test_official_files_are_found_and_quotes_are_letters(tmp_path, inner):
    official(tmp_path / "r" / inner)
    for _ in range(2):  # read, then found again
        task = tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False)
        assert sorted(said(task.train)) == [
            ("b'He said \"no\\n'", 'b"It\'s \\xe2 b"', 1),
            ("b'He said \"no\\n'", "b'third'", 0),
        ]
    assert len(task.train.documents) == 3  # each document once
    assert task.config.source.startswith("ACL Anthology Network, the official Long Range Arena pairs, unverified")
    undone = tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False, undo_repr=True)
    (one, two), _ = next(item for item in undone.train if item[1] == 1)
    assert bytes((one - 1).tolist()) == b'He said "no\n' and bytes((two - 1).tolist()) == b"It's \xe2 b"
    short = tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False, length=4, train=1)
    assert short.train.lengths.max() == 4 and len(short.train) == 1


def test_incomplete_and_missing_files(tmp_path):
    official(tmp_path / "r")
    with pytest.raises(DataError, match=r"holds 2, 2, 2 pairs; the official files have 147,086, 18,090, 17,437"):
        tasks.load("retrieval", root=tmp_path / "r", source="aan")
    with pytest.raises(DataError, match="train must be at most 2"):
        tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False, train=3)
    (tmp_path / "r" / "new_aan_pairs.eval.tsv").unlink()
    with pytest.raises(DataError, match=r"cannot read .*new_aan_pairs.eval.tsv"):
        tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False)
    with pytest.raises(DataNotFound, match=r"found no new_aan_pairs.train.tsv .*get retrieval"):
        tasks.load("retrieval", source="aan")


FAULTS = {
    "empty": ("", "train.tsv is empty"),
    "four columns": (ROWS + "1.0\tA\tB\tb'x'\n", "row 3: wanted label.*got 4 columns"),
    "label": (ROWS + "2.0\tA\tB\tb'x'\tb'y'\n", "row 3: the label must be 0.0 or 1.0; got '2.0'"),
    "header": ("label\tid1\tid2\ttext1\ttext2\n" + ROWS, "row 1: the label must be"),
    "cut": (ROWS[:-3], "row 2: .*no end of line"),
    "cut in plain text": (ROWS + "1.0\tA\tB\tsome text\tand mor", "row 3: .*no end of line"),
    "empty text": (ROWS + "1.0\tA\tB\t\tb'y'\n", "row 3: a text is empty"),
    "foreign": ("\x89PNG\r\n\x1a\n", "row 1: wanted label"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_files_name_the_row(tmp_path, fault):
    rows, says = FAULTS[fault]
    official(tmp_path / "r")
    (tmp_path / "r" / "new_aan_pairs.train.tsv").write_text(rows, newline="")
    with pytest.raises(DataError, match=says) as caught:
        tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False)
    assert "new_aan_pairs.train.tsv" in str(caught.value) and "\n" not in str(caught.value)


def test_a_last_row_may_lack_its_end_of_line(tmp_path):
    official(tmp_path / "r", ROWS)
    whole = tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False)
    official(tmp_path / "s", ROWS.rstrip("\n"))
    last = tasks.load("retrieval", root=tmp_path / "s", source="aan", verify=False)
    assert len(whole.train) == len(last.train) == 2
    for one, other in zip(whole.train[1][0], last.train[1][0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("text", ["plain words", "b'open", "[1, 2]", "__import__('os')", "'no bytes'"])
def test_only_printed_bytes_are_undone(tmp_path, text):
    official(tmp_path / "r", f"1.0\tA\tB\tb'x'\t{text}\n")
    with pytest.raises(DataError, match=r"row 1: wanted a text in the form b'\.\.\.'"):
        tasks.load("retrieval", root=tmp_path / "r", source="aan", verify=False, undo_repr=True)


def lra(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TSV = {f"lra_release/lra_release/tsv_data/{name}": ROWS.encode() for name in aan.FILES.values()}


def test_fetching_keeps_the_three_files_only(tmp_path, monkeypatch):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "lra_release.gz").write_bytes(lra({"lra_release/listops-1000/basic_train.tsv": b"x", **TSV}))
    root = tmp_path / "r"
    root.mkdir()
    with served(tmp_path / "web") as server:
        monkeypatch.setattr(aan, "ARCHIVE", f"{server.url}/lra_release.gz")
        aan.fetch(root)
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*.*")) == sorted(
        f"tsv_data/{name}" for name in aan.FILES.values()
    )
    assert len(tasks.load("retrieval", root=root, source="aan", verify=False).train) == 2


def test_broken_and_harmful_archives(tmp_path):
    path = tmp_path / "lra_release.gz"
    for raw, says in (
        (lra({"lra_release/README": b"x"}), "lacks new_aan_pairs.train.tsv"),
        (lra(TSV)[:-40], "not a whole tar archive"),
        (lra({f"../{name}": data for name, data in TSV.items()}), "leads out of the archive"),
        (b"", "not a whole tar archive"),
        (lra(TSV | {f"again/{name}": data for name, data in TSV.items()}), "stands in it twice"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=says):
            aan.unpack(path, tmp_path / "out" / "tsv_data")
        assert not list((tmp_path / "out").rglob("*.tsv*"))


def test_an_archive_that_ends_early_leaves_no_half_set_behind(tmp_path, monkeypatch):
    """Where one of the three files is found, `get` takes the set for whole; so none may stand alone."""
    names, noise = list(TSV), np.random.default_rng(0).bytes(50_000)
    whole = lra({names[0]: ROWS.encode(), "noise": noise, names[1]: ROWS.encode(), names[2]: ROWS.encode()})
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "lra_release.gz").write_bytes(whole)
    root = tmp_path / "r"
    root.mkdir()
    (root / "lra_release.gz").write_bytes(whole[:-300])
    line = ["get", "retrieval", "verify=False", "--root", str(root)]
    with served(tmp_path / "web") as server:
        monkeypatch.setattr(aan, "ARCHIVE", f"{server.url}/lra_release.gz")
        assert main(line) == 2 and not list(root.rglob("*.tsv"))
        (root / "lra_release.gz").unlink()  # as the message says
        assert main(line) == 0


# The small set.


def test_mini_is_named_for_what_it_is(tmp_path):
    arrays = {
        "text": np.frombuffer(b"onetwothree", np.uint8),
        "offsets": np.array([0, 3, 6, 11]),
        "pairs": np.array([[0, 1], [1, 2], [2, 0]], np.int16),
        "label": np.array([1, 0, 1], np.uint8),
        "split": np.array([0, 1, 2], np.uint8),
    }
    write_npz(tmp_path / aan.MINI, arrays)
    task = tasks.load("retrieval", root=tmp_path, source="aan-mini")
    assert said(task.test) == [("three", "one", 1)]
    assert "a stand-in for the Long Range Arena's pairs" in task.config.source
    for change in (
        {"label": np.array([1, 0, 2], np.uint8)},
        {"offsets": np.zeros(0, np.int64)},
        {"offsets": np.array([1, 3, 6, 11])},
        {"pairs": np.array([[0, 1], [1, 3], [2, 0]], np.int16)},
        {"split": np.array([1, 1, 2], np.uint8)},
    ):
        write_npz(tmp_path / aan.MINI, arrays | change)
        with pytest.raises(DataError, match=r"aan_mini.npz.xz: its arrays do not fit"):
            tasks.load("retrieval", root=tmp_path, source="aan-mini")
    with pytest.raises(DataNotFound, match="found no aan_mini"):
        tasks.load("retrieval", source="aan-mini")


def test_the_real_stand_ins(real_data):
    if not (real_data / aan.MINI).exists():
        pytest.skip("no aan_mini there")
    task = tasks.load("retrieval", root=real_data, source="aan-mini")
    assert [len(split) for split in (task.train, task.valid, task.test)] == [4_414, 552, 552]
    pairs = tasks.load("retrieval", root=real_data, source="imdb-pairs", train=2_000, valid=200, test=400)
    assert [len(split) for split in (pairs.train, pairs.valid, pairs.test)] == [2_000, 200, 400]
    assert pairs.train.labels.mean() == 0.5


@pytest.mark.parametrize(
    ("options", "says"),
    [({"source": "web"}, "source must be"), ({"length": 0}, "at least 1 byte"), ({"train": 0}, "train must be")],
)
def test_contradictions(options, says):
    with pytest.raises(DataError, match=says):
        tasks.load("retrieval", **({"source": "sample"} | options))
