"""Published figures: typed without slips, found, and compared only with what they were measured on."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from longseq_tutorial import models, published, tasks
from longseq_tutorial.published import BENCHMARKS, COSTS, ROWS, benchmark, differences, lookup, mean, table, why_unknown
from longseq_tutorial.tasks import aan, cifar, imdb, speech_commands

# The means that the papers print beside the rows. A slip of a key in a row would show here.
FIVE_TASKS = {
    "Transformer (Arena)": 54.39, "transformer": 59.24, "Reformer": 50.67, "Linformer": 51.36, "BigBird": 55.01,
    "Performer": 51.41, "Luna-256": 61.95, "Local attention": 46.06, "Sparse Transformer": 51.24, "Longformer": 53.46,
    "Linear Transformer": 50.55, "FNet": 55.30, "Nyströmformer": 58.95, "H-Transformer-1D": 61.41,
    "Sinkhorn Transformer": 51.48,
}  # fmt: skip
SIX_TASKS = {
    "S4-v1": 80.48, "S4-v2": 86.09, "S4-v2 (re-run)": 85.86, "S4D-LegS": 84.89, "S4D-Inv": 85.50, "S4D-Lin": 78.39,
    "Liquid-S4": 87.32, "S5": 87.46, "mega": 88.21, "mega-chunk": 85.66,
}  # fmt: skip


def test_the_rows_have_the_means_that_the_papers_print() -> None:
    for model, printed in FIVE_TASKS.items():
        assert mean(model) == pytest.approx(printed, abs=0.011), model
        assert lookup("pathx", model) is not None and lookup("pathx", model).accuracy is None
    for model, printed in SIX_TASKS.items():  # here a failure counts as chance
        assert mean(model, failed=50) == pytest.approx(printed, abs=0.011), model
    complete = set(published.models("listops")) - {"LRU"}  # without its Image, it has no mean of six
    assert complete == FIVE_TASKS.keys() | SIX_TASKS.keys()


def test_every_row_has_a_source_and_a_task_and_stands_once() -> None:
    assert len({(row.task, row.model) for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.task in BENCHMARKS and row.source.split(" (")[0].endswith(("paper", "Arena", "Table 4"))
        assert row.accuracy is None or BENCHMARKS[row.task].chance < row.accuracy < 100
    assert {cost.model for cost in COSTS} <= set(published.models("text"))
    assert {key.removesuffix("-sc10").removesuffix("-sc35") for key in BENCHMARKS} == set(tasks.names())


def test_look_up() -> None:
    row = lookup("listops", "mega")
    assert row is not None and row.accuracy == 63.14 and "Table 2" in row.source
    assert lookup("listops", "transformer").accuracy > lookup("listops", "Transformer (Arena)").accuracy
    assert lookup("speech", "mega-chunk") == lookup("speech-sc10", "mega-chunk") != lookup("speech-sc35", "mega-chunk")
    assert lookup("speech", "transformer").accuracy is None  # it did not fit: known, and no number
    assert lookup("listops", "seqboat") is lookup("nonsense", "mega") is None


@pytest.mark.parametrize("model", ["seqboat", "longvq", "fastrpb", "spade"])
def test_what_could_not_be_checked_is_not_printed(model: str) -> None:
    assert model in models.NAMES and model not in published.models() and model not in table()
    assert model in why_unknown(model).lower() and why_unknown(model, "text") == why_unknown(model)


def test_reasons() -> None:
    assert why_unknown("mega") == why_unknown("mega", "listops") == why_unknown("transformer", "speech") == ""
    assert "Mega-chunk only" in why_unknown("mega", "speech")
    assert "LRU on image" in why_unknown("LRU", "image")
    assert "my-model" in why_unknown("my-model")


def test_means_are_refused_where_they_would_mislead() -> None:
    with pytest.raises(ValueError, match=r"no mean for LRU: its figure on image is not known"):
        mean("LRU")
    assert mean("LRU", ("listops", "text")) == pytest.approx((60.2 + 89.4) / 2)
    with pytest.raises(ValueError, match=r"it failed on pathx\. Say what a failure counts"):
        mean("Performer", ("pathx",))
    assert mean("Performer", ("pathx",), failed=50) == 50


def test_the_table() -> None:
    lines = table(("mega", "transformer", "LRU"), ("image", "pathx")).splitlines()
    assert [line.split() for line in lines] == [
        ["Image", "Path-X"], ["mega", "90.44", "97.98"], ["transformer", "42.94", "fails"], ["LRU", "-", "94.20"],
    ]  # fmt: skip
    assert len(table().splitlines()) == 1 + len(published.models("listops"))
    with pytest.raises(ValueError, match=r"tasks must be of listops, .*; got 'speech'"):
        table(tasks=("speech",))
    with pytest.raises(ValueError, match=r"names must be of .*; got 'seqboat'"):
        table(("mega", "seqboat"))


# ---- when may a figure be compared? The sources are those that the tasks themselves write. -------------------------


def compared(task: tasks.Task, train: int | None = None) -> tuple[str, ...]:
    config = task.config
    return differences(config.name, config.source, config.length, len(task.train) if train is None else train)


def test_expressions(tmp_path: Path) -> None:
    some: dict[str, Any] = {"root": tmp_path, "train": 3, "valid": 1, "test": 1, "progress": False}
    full = tasks.load("listops", **some)
    assert compared(full, train=96_000) == compared(full, train=80_000) == ()
    assert compared(full) == ("trained on 3 sequences, not 96,000",)
    short = tasks.load("listops", **some, min_length=50, max_length=200)
    assert [said.split()[0] for said in compared(short)] == ["other", "at", "trained"]
    assert len(compared(tasks.load("listops", source="sample"), train=96_000)) == 1
    assert not differences("listops", "ListOps, the official Long Range Arena files", 2_000, 96_000)


def test_paths(tmp_path: Path) -> None:
    some: dict[str, Any] = {"root": tmp_path, "train": 2, "valid": 1, "test": 1, "progress": False, "workers": 1}
    assert compared(tasks.load("pathfinder", **some), train=160_000) == ()
    assert len(compared(tasks.load("pathfinder", **some, paddles=6), train=160_000)) == 1
    assert len(compared(tasks.load("pathfinder", source="sample"), train=160_000)) == 1
    assert len(compared(tasks.load("pathx", source="sample"), train=160_000)) == 1
    official = "Pathfinder-32, the official Long Range Arena files (curv_contour_length_{}), 1 empty pictures left out"
    assert not differences("pathfinder", official.format(14), 1_024, 160_000)
    assert differences("pathfinder", official.format(9), 1_024, 160_000)
    made = "Path-X (Pathfinder-128) by the Long Range Arena's rule, seed 3 (made by this project)"
    assert not differences("pathx", made, 16_384, 160_000) and differences("pathfinder", made, 1_024, 160_000)


def test_reviews(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = np.arange(8)
    few = imdb.Reviews(
        np.full(80, 65, np.uint8), 10 * np.arange(9), numbers % 2, numbers, numbers // 4, numbers, numbers
    )
    monkeypatch.setattr(imdb, "find", lambda *_, **__: few)
    assert compared(tasks.load("text", valid=1), train=22_491) == ()
    assert compared(tasks.load("text", valid=0, length=4_000), train=25_000) == ()
    assert compared(tasks.load("text", length=1_000, valid=1), 22_491) == ("at most 1,000 steps a sequence, not 4,000",)
    assert len(compared(tasks.load("text", valid=1, verify=False), train=22_491)) == 1
    assert len(compared(tasks.load("text", source="sample"), train=25_000)) == 1


def test_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(*_: Any, jpeg: bool | None, **__: Any) -> cifar.Photographs:
        label = np.arange(6, dtype=np.uint8)
        return cifar.Photographs(np.zeros((6, 1_024), np.uint8), label, label // 4, bool(jpeg))

    monkeypatch.setattr(cifar, "find", find)
    assert compared(tasks.load("image", source="cifar10", valid=1), train=45_000) == ()
    assert compared(tasks.load("image", source="cifar10", valid=1, kind="tokens"), train=45_000) == ()
    assert len(compared(tasks.load("image", source="cifar10-jpeg", valid=1), train=45_000)) == 1
    assert len(compared(tasks.load("image", source="sample"), train=45_000)) == 1


def test_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, part = np.array([[0, 1], [1, 2], [2, 0]]), np.arange(3)
    few = aan.Papers(np.full(30, 65, np.uint8), 10 * np.arange(4), pairs, part % 2, part)
    monkeypatch.setattr(aan, "find_official", lambda root: Path())
    monkeypatch.setattr(aan, "read_official", lambda *_: few)
    monkeypatch.setattr(aan, "read_mini", lambda *_: few)
    assert compared(tasks.load("retrieval", source="aan"), train=147_086) == ()
    assert len(compared(tasks.load("retrieval", source="aan-mini"), train=147_086)) == 1
    assert len(compared(tasks.load("retrieval", source="sample"), train=147_086)) == 1


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def select(archive: Any, words: tuple[str, ...], **_: Any) -> speech_commands.Clips:
        audio, part = np.ones((3, 16_000), np.int16), np.arange(3, dtype=np.uint8)
        return speech_commands.Clips(audio, part, part, words, 16_000, np.ones((3, 3), np.float32))

    monkeypatch.setattr(speech_commands, "find", lambda *_, **__: SimpleNamespace(by_lists=np.array(True)))
    monkeypatch.setattr(speech_commands, "select", select)
    split_at_random = tasks.load("speech", source="sc10", random_split=True)
    assert compared(split_at_random, train=24_482) == () and benchmark("speech", split_at_random.config.source)
    assert len(compared(tasks.load("speech", source="sc10"), train=24_482)) == 1  # split by speaker: harder
    every_word = tasks.load("speech", source="sc35")
    assert compared(every_word, train=84_843) == ()
    assert benchmark("speech", every_word.config.source) == "speech-sc35" != benchmark("speech")
    assert len(compared(tasks.load("speech", source="sc35", every=2), train=84_843)) == 2
    assert [said.split()[0] for said in compared(tasks.load("speech", source="sample"))] == ["other", "at", "trained"]


def test_what_is_no_published_task() -> None:
    assert benchmark("tiny") is None
    assert differences("tiny", "made by a test", 23, 70) == ("nothing is published for this task",)
