"""Records: written, read, checked, and turned back into the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longseq_tutorial.tasks import collate
from longseq_tutorial.training import Record, RecordError, evaluate, fit, load_run, read_record

from . import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("results")
    return folder, fit(tiny.recipe(epochs=1), seed=5, out=folder, task=tiny.task(), progress=False, cpu=True)


def test_a_record_holds_what_it_should(run: tuple[Path, Record]) -> None:
    folder, record = run
    assert record == read_record(folder / "tiny-mega-test-seed5.json")
    assert (record.seed, record.updates, record.model, record.source) == (5, 8, "mega", "made by a test")
    assert record.sequences == {"train": 70, "valid": 30, "test": 30}
    assert record.device == "cpu" and record.threads == torch.get_num_threads() and record.processes == 1
    assert record.seconds > 0 and record.peak_memory["rss"] > 0 and record.sessions == 1
    assert record.config["dim"] == 16 and record.recipe["overrides"]["dim"] == 16
    assert [row["update"] for row in record.history] == [0, 8]
    assert record.history[-1]["train"].keys() == record.history[-1]["valid"].keys() == {"loss", "accuracy"}
    assert record.weights_of == {"update": 8, "rule": "last"}
    assert "made by a test" in str(record)
    assert record.cpu_seconds > 0


def test_records_from_before_processor_time_was_counted_can_be_read(run: tuple[Path, Record], tmp_path: Path) -> None:
    path = copied(run, tmp_path)
    change(path, cpu_seconds="gone")
    assert read_record(path).cpu_seconds == 0.0


@pytest.mark.parametrize("ending", [".json", ".safetensors", ""])
def test_the_model_comes_back(run: tuple[Path, Record], ending: str) -> None:
    folder, record = run
    model, again = load_run(folder / f"tiny-mega-test-seed5{ending}")
    assert again == record and not model.training
    assert sum(p.numel() for p in model.parameters()) == record.parameters
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert evaluate(model, tiny.task().test) == pytest.approx(record.test)
    batch = collate([tiny.task().test[i] for i in range(3)])
    assert model(batch.x, batch.mask).shape == (3, 3)


def copied(run: tuple[Path, Record], folder: Path) -> Path:
    for path in run[0].glob("tiny*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / "tiny-mega-test-seed5.json"


def change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**content, **fields}.items() if v != "gone"}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": "5"}, "seed must be int; got '5'"),
        ({"seed": "gone"}, "missing \\['seed'\\], unknown nothing"),
        ({"extra": 1}, "missing nothing, unknown \\['extra'\\]"),
        ({"test": {"loss": 1.0}}, "test must hold accuracy as a number"),
        ({"history": [{"update": 1}]}, "each row of a record's history needs"),
        ({"dirty": 1}, "dirty must be bool; got 1"),
        ({"format": 2}, "records of format 1; got 2"),
        ({"name": "other"}, "holds tiny-mega-test-seed5, its record other"),
    ],
)
def test_wrong_records_are_refused(
    run: tuple[Path, Record], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    path = copied(run, tmp_path)
    change(path, **fields)
    with pytest.raises(RecordError, match=message):
        load_run(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "no json"])
def test_no_json_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(RecordError, match="is not a") as caught:
        read_record(path)
    assert "\n" not in str(caught.value)


def test_missing_and_broken_files(run: tuple[Path, Record], tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot read"):
        load_run(tmp_path / "nothing.json")
    path = copied(run, tmp_path)
    weights = path.with_suffix(".safetensors")
    data = weights.read_bytes()
    weights.write_bytes(data[:-3])
    with pytest.raises(RecordError, match="truncated or corrupt"):
        load_run(path)
    weights.unlink()
    with pytest.raises(RecordError, match="is missing"):
        load_run(path)
