"""The table of records."""

from pathlib import Path

import pytest

from longseq_tutorial import results
from longseq_tutorial.training import fit

from . import tiny


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs"
    record = fit(tiny.recipe(epochs=1), out=folder, task=tiny.task(), progress=False, cpu=True)
    monkeypatch.chdir(tmp_path)
    assert results.main([]) == results.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == lines[2:] and lines[0].startswith("run")
    assert record.name in lines[1] and f"{record.test['accuracy']:.2%}" in lines[1] and "made by a test" in lines[1]


def test_nothing_and_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path)]) == 0
    assert "no records in" in capsys.readouterr().out
    assert results.main([str(tmp_path / "no")]) == 2
    (tmp_path / "bad.json").write_text("{")
    assert results.main([str(tmp_path)]) == 2
    assert results.main(["--bad"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and "is no folder" in errors[0] and "bad.json" in errors[1] and "--bad" in errors[2]
