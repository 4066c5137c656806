"""Records as a table and as a plot: grouped, held against published figures only where that is fair, and legible."""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from longseq_tutorial import models, published, results
from longseq_tutorial.classroom import figures
from longseq_tutorial.results import Row, describe, plot, summary, table
from longseq_tutorial.training import Record, fit
from longseq_tutorial.training.records import write_record
from tests.training import tiny

FULL = "IMDB reviews, official split, 2,509 training reviews of whole films held out for validation, first 4,096 bytes"
SIZES = {"train": 22_491, "valid": 2_509, "test": 25_000}
DAYS = itertools.count()


def run(model: str = "mega", accuracy: float = 0.85, **changes: Any) -> Record:
    """A record as training writes them, of reviews at full length unless said otherwise."""
    task = {"name": "text", "classes": 2, "length": 4_096, "pairs": False, **changes.pop("task", {})}
    recipe = {"task": task["name"], "model": model, "name": "laptop", "batch": 50, "source": "prose"}
    recipe |= changes.pop("recipe", {})
    seed = changes.get("seed", 0)
    fields: dict[str, Any] = dict(
        name=f"{task['name']}-{model}-{recipe['name']}-seed{seed}", recipe=recipe, config={"dim": 8}, seed=seed,
        task=task, source=FULL, sequences=SIZES, parameters=200_000, updates=1_000, history=[],
        test={"loss": 0.5, "accuracy": accuracy}, weights_of={"update": 1_000, "rule": "last"}, seconds=600.0,
        sessions=1, peak_memory={"rss": 2**30}, device="cpu", device_name="Some Processor", threads=2, processes=1,
        versions={}, commit="unknown", dirty=False, finished=f"2026-01-01T{next(DAYS):06}",
    )  # fmt: skip
    return Record(**{**fields, **changes})


def short(model: str = "mega", accuracy: float = 0.75, **changes: Any) -> Record:
    """The same at 1,000 bytes."""
    return run(model, accuracy, task={"length": 1_000}, source=FULL.replace("4,096", "1,000"), **changes)


def on_gpu(model: str = "mega", **changes: Any) -> Record:
    peak = {"rss": 2**30, "cuda": 5 * 2**30}
    return run(model, device="cuda", device_name="Some GPU", peak_memory=peak, **changes)


def only(found: list[Record]) -> Row:
    rows = summary(found)
    assert len(rows) == 1
    return rows[0]


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_seeds_share_a_row() -> None:
    row = only([run(accuracy=a, seed=s, seconds=t) for s, a, t in ((2, 0.9, 500.0), (0, 0.8, 700.0), (1, 0.85, 600.0))])
    assert row.seeds == (0, 1, 2) and row.seconds == 600
    assert row.accuracy == pytest.approx(85) and row.spread == pytest.approx(5)
    assert row.sampling == pytest.approx(100 * math.sqrt(0.85 * 0.15 / 25_000))
    assert row.gap == pytest.approx(85 - 90.43) and row.comparable and row.chance == 50
    assert row.steps == 1_000 * 50 * 4_096 and row.memory == 2**30 and row.machine == "cpu x 2"
    assert only([run()]).spread is None


def test_a_seed_that_was_run_again_counts_once() -> None:
    first, second = run(accuracy=0.6), run(accuracy=0.9)
    for found in ([first, second], [second, first]):
        assert only(found).accuracy == pytest.approx(90) and only(found).seeds == (0,)


def test_generated_data_may_differ_in_their_seed() -> None:
    rule = "ListOps by the Long Range Arena's rule, seed {} (made by this project)"
    listops = {"name": "listops", "classes": 10, "length": 2_000}
    sizes = {"train": 96_000, "valid": 2_000, "test": 2_000}
    row = only([run(seed=s, task=listops, source=rule.format(s), sequences=sizes) for s in (0, 1)])
    assert (
        row.data == rule.replace(", seed {}", "")
        and row.comparable
        and row.reference == published.lookup("listops", "mega")
    )


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": {"name": "paper"}},
        {"recipe": {"lr": 0.1}},
        {"config": {"dim": 16}},
        {"model": "mega-chunk"},
        {"source": "reviews by a grammar (made by this project), first 4,096 bytes"},
        {"task": {"length": 1_000}},
        {"sequences": {**SIZES, "train": 100}},
        {"device_name": "Another Processor"},
        {"threads": 8},
    ],
)
def test_what_differs_does_not_share_a_row(other: dict[str, Any]) -> None:
    assert len(summary([run(), run(seed=1, **other)])) == 2
    assert len(summary([run(), run(seed=1, recipe={"source": "other prose"})])) == 1


def test_the_published_figure_and_whether_it_may_be_compared() -> None:
    assert only([short()]).differences == ("at most 1,000 steps a sequence, not 4,000",)
    assert only([short()]).gap == pytest.approx(75 - 90.43) and not only([short()]).comparable
    unknown = only([run("seqboat")])
    assert unknown.reference is None and unknown.gap is None and "SeqBoat" in unknown.as_dict()["why_unknown"]
    speech = {"name": "speech", "classes": 10, "length": 8_000}
    failed = only([run("transformer", task=speech, source="FSDD, official split")])
    assert failed.reference is not None and failed.reference.accuracy is None and failed.gap is None


def test_speech_is_held_against_as_many_words() -> None:
    source = "Speech Commands v0.02, 35 words, official lists, by speaker"
    words = {"name": "speech", "classes": 35, "length": 16_000}
    row = only([run("mega-chunk", task=words, source=source, sequences={"train": 84_843, "test": 11_005})])
    assert row.benchmark == "speech-sc35" and row.reference is None and row.comparable
    assert "mega-chunk on speech-sc35 was found" in table([row])


def test_time_and_memory_are_those_of_the_device() -> None:
    assert only([run(cpu_seconds=900.0)]).minutes == 15
    assert only([run(cpu_seconds=0.0)]).minutes == 10 and only([run()]).cpu_seconds is None
    assert only([run(cpu_seconds=900.0), run(seed=1)]).cpu_seconds is None  # half a mean is none
    gpu = only([on_gpu(cpu_seconds=900.0)])
    assert gpu.minutes == 10 and gpu.memory == 5 * 2**30 and gpu.machine == "Some GPU"
    assert only([run(task={"pairs": True})]).steps == 2 * only([run()]).steps


# ---- the table -----------------------------------------------------------------------------------------------------


def test_the_table_holds_every_figure_and_its_reasons() -> None:
    found = [run("mega", 0.85), run("transformer", 0.7, seed=1), run("transformer", 0.6), run("spade"), short("mega")]
    text = table(summary([*found, on_gpu("mega-chunk", recipe={"name": "gpu-30min"}, cpu_seconds=1_200.0)]))
    cells = [line.split() for line in text.splitlines()]
    assert [
        "mega",
        "laptop",
        "90.43",
        "[1]",
        "85.0",
        "-5.4",
        "1",
        "10.0",
        "1.00",
        "0.20",
        "205",
        "cpu",
        "x",
        "2",
    ] in cells
    assert ["transformer", "laptop", "65.21", "[1]", "65.0", "±7.1", "-0.2", "2"] in [line[:8] for line in cells]
    assert ["spade", "laptop", *results.UNKNOWN.split(), "85.0", "1"] in [line[:8] for line in cells]
    assert ["mega", "laptop", "90.43", "[1]", "75.0", "(-15.4)"] in [line[:6] for line in cells]
    assert ["20.0", "5.00", "0.20", "205", "Some", "GPU"] in [line[-6:] for line in cells]
    notes = " ".join(text.split())
    assert "chance 50.0 %; 22,491 sequences to train on, 25,000 to test" in notes
    assert "(gap) on text is no comparison: at most 1,000 steps a sequence, not 4,000." in notes
    assert "[1] Mega paper" in notes and "Table 2" in notes and "re-run by Mega's authors" in notes
    assert f"{results.UNKNOWN}: spade: {published.why_unknown('spade')}." in notes
    assert "cpu: Some Processor." in notes


def test_nothing_is_explained_that_is_not_there() -> None:
    text = table(summary([run("mega")]))
    assert "±" not in text and "(gap)" not in text and "not known" not in text and "[2]" not in text


def test_every_model_by_every_recipe_fits_a_terminal() -> None:
    recipes = ("laptop", "gpu-30min", "paper")
    found = [run(m, 0.8, seed=s, recipe={"name": r}) for m in models.NAMES for r in recipes for s in (0, 1)]
    found += [on_gpu(m, recipe={"name": "paper"}, cpu_seconds=90_000.0, seconds=86_400.0) for m in models.NAMES]
    found += [short(m) for m in models.NAMES] + [run("my-model", source="")]
    found += [on_gpu(processes=4, recipe={"name": "laptop+warmup=150+model.dim=64"})]
    text = table(summary(found))
    assert max(map(len, text.splitlines())) <= results.WIDTH
    assert sum(line.split()[0] in (*models.NAMES, "my-model") for line in text.splitlines() if line) == 5 * 7 + 2
    assert re.search(r"\blaptop\S*\.\.\. ", text) and "Some GPU x 4" in text  # long names give way


# ---- the plot ------------------------------------------------------------------------------------------------------


def dashed(ax: Any) -> list[float]:
    return [line.get_ydata()[0] for line in ax.get_lines() if line.get_linestyle() == "--"]


def points(ax: Any) -> list[tuple[float, float]]:
    marked = [line for line in ax.get_lines() if line.get_marker() not in ("None", "none", None)]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in marked]


def test_models_keep_the_colours_and_markers_of_the_course() -> None:
    assert list(results.STYLE) == list(models.NAMES)
    assert list(results.STYLE.values()) == list(zip(figures.OKABE_ITO.values(), figures.MARKERS, strict=True))[:7]


def test_the_plot_has_a_line_of_panels_for_each_data_and_machine() -> None:
    rows = summary([run("mega", cpu_seconds=900.0), run("spade", 0.8, cpu_seconds=1_800.0), short("mega"), on_gpu()])
    fig = plot(rows)
    assert isinstance(fig, Figure) and len(fig.axes) == 2 * 3
    gpu, _, full, parameters, cut, _ = fig.axes
    assert points(full) == [(15.0, 85.0), (30.0, 80.0)] and full.get_xlabel() == "CPU minutes of training"
    assert points(parameters) == [(0.2, 85.0), (0.2, 80.0)] and parameters.get_xlabel() == "parameters, millions"
    assert points(gpu) == [(10.0, 85.0)] and gpu.get_xlabel() == "minutes of training"
    assert points(cut) == [(10.0, 75.0)]
    assert dashed(full) == dashed(gpu) == [90.43] and dashed(cut) == []  # published on these data, or not at all
    assert "first 1,000 bytes" in cut.get_title(loc="left") and "chance 50 %" in cut.get_title(loc="left")
    low, high = full.get_ylim()
    assert low < 50 and high > 90.43
    fig.draw_without_rendering()  # what the layout or a font refuses shows here


def test_wall_clock_and_processor_time_are_never_in_one_panel() -> None:
    fig = plot(summary([run("mega", cpu_seconds=900.0), run("spade"), run("transformer", cpu_seconds=600.0)]))
    assert [ax.get_xlabel().split(" of")[0] for ax in fig.axes[::2]] == ["CPU minutes", "minutes"]
    assert [len(points(ax)) for ax in fig.axes[::2]] == [2, 1]


def test_models_far_above_chance_are_told_apart() -> None:
    speech = {"name": "speech", "classes": 10, "length": 8_000}
    found = [run(m, a, task=speech, source="FSDD, official split") for m, a in (("mega", 0.98), ("spade", 0.97))]
    low, high = plot(summary(found)).axes[0].get_ylim()
    assert 90 < low < 97 and 98 < high < 100


def test_recipes_of_one_panel_are_told_apart() -> None:
    rows = summary([run(), run("spade"), run(recipe={"name": "paper"}, accuracy=0.9)])
    fig = plot(rows)
    fills = {line.get_fillstyle() for line in fig.axes[0].get_lines() if line.get_marker() in "oP"}
    assert fills == {"full", "none"}
    assert {"mega", "spade", "laptop", "paper", "published"} <= {t.get_text() for t in fig.legends[0].get_texts()}


def test_the_plot_is_described_in_words() -> None:
    said = describe(summary([run("mega", 0.85, cpu_seconds=900.0), run("transformer", 0.65, cpu_seconds=300.0)]))
    assert "chance 50 %" in said and "mega (laptop) 85.0 % in 15.0 CPU minutes" in said
    assert "most accurate is mega, the cheapest transformer. Published: mega 90.4, transformer 65.2." in said


def test_nothing_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="at least one row; got none"):
        plot([])


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "runs"
    record = fit(tiny.recipe(epochs=1), out=folder, task=tiny.task(), progress=False, cpu=True)
    monkeypatch.chdir(tmp_path)
    assert results.main([]) == results.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :] and out.startswith("tiny: 3 classes, chance 33.3 %")
    assert "made by a test" in out and f"{100 * record.test['accuracy']:.1f}" in out and results.UNKNOWN in out
    assert results.main(["--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["accuracy"] == pytest.approx(100 * record.test["accuracy"]) and row["reference"] is None
    assert row["comparable"] is False and row["seeds"] == [0] and row["cpu_seconds"] == record.cpu_seconds
    for ending, begin in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        assert results.main(["--plot", f"cost{ending}"]) == 0
        assert (tmp_path / f"cost{ending}").read_bytes().startswith(begin)
        assert "Test accuracy against the cost" in capsys.readouterr().err
        assert b"Test accuracy against the cost" in (tmp_path / f"cost{ending}").read_bytes()  # for screen readers


def test_the_repository_s_own_records_are_read() -> None:
    folder = Path(__file__).parent.parent / "results"
    rows = summary(results.records([folder]))
    assert rows and all(row.chance / 2 < row.accuracy <= 100 for row in rows)
    assert max(map(len, table(rows).splitlines())) <= results.WIDTH


def test_nothing_and_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(tmp_path)]) == 0
    assert "no records in" in capsys.readouterr().out
    assert results.main([str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert results.main([str(tmp_path), "--plot", str(tmp_path / "cost.png")]) == 2
    assert results.main([str(tmp_path), "--plot", str(tmp_path / "cost.gif")]) == 2
    assert results.main([str(tmp_path), "--plot"]) == 2
    assert results.main([str(tmp_path / "no")]) == 2
    assert results.main(["--bad"]) == 2
    (tmp_path / "bad.json").write_text("{")
    assert results.main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    wanted = (
        "nothing to draw",
        "ends in .png or .svg; got",
        "expected one argument",
        "is no folder",
        "--bad",
        "bad.json",
    )
    assert len(errors) == len(wanted)
    for error, part in zip(errors, wanted, strict=True):
        assert part in error
    assert not list(tmp_path.glob("cost.*"))


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.build("mega", tiny.task().config, **tiny.SMALL)
    write_record(run(), model, tmp_path)
    assert results.main([str(tmp_path), "--plot", str(tmp_path / "no" / "cost.png")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "cost.png" in err
