"""The loop: it learns, repeats itself to the last bit, stops and goes on, and refuses what it should."""

import dataclasses
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longseq_tutorial import models
from longseq_tutorial.models import classifier
from longseq_tutorial.tasks import Batch
from longseq_tutorial.training import (
    CheckpointError,
    NonFiniteError,
    RecipeError,
    Record,
    Unfinished,
    checkpoint,
    evaluate,
    fit,
    load_run,
    loop,
)
from longseq_tutorial.training.run import Progress

from . import tiny


def train(out: Path, task: Any = None, **options: Any) -> Record:
    recipe = options.pop("recipe", None) or tiny.recipe()
    return fit(recipe, out=out, task=task or tiny.task(), progress=False, cpu=True, **options)


def weights(out: Path, name: str = "tiny-mega-test-seed0") -> dict[str, torch.Tensor]:
    return checkpoint.read_safetensors(out / f"{name}.safetensors")[0]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Press Ctrl-C during update number `update`."""
    original = loop.train_update

    def pressing(run: Any, pieces: list[Batch]) -> list[float]:
        if run.progress.update == update:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, pieces)

    monkeypatch.setattr(loop, "train_update", pressing)


@pytest.mark.parametrize("model", models.NAMES)
def test_every_model_learns(tmp_path: Path, model: str) -> None:
    recipe = tiny.recipe(model=model, overrides=tiny.MODELS[model], epochs=10, augment=False)
    record = train(tmp_path, tiny.task(300), recipe=recipe)
    assert record.test["accuracy"] > 0.9, "the commonest of three tokens is easy"
    assert record.history[0]["valid"]["accuracy"] < 0.7, "the first row is measured before training"
    assert len(record.history) == 11 and record.history[-1]["epoch"] == 10


def test_a_seed_decides_everything(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(len(folder)), np.random.rand(3)  # noqa: NPY002  # what came before must not matter
        train(tmp_path / folder, seed=seed)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c", "tiny-mega-test-seed1"))


@pytest.mark.parametrize("update", [0, 7, 8, 13, 30])
def test_interrupted_and_resumed_is_the_same_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, update)
        with pytest.raises(Unfinished, match=f"after update {update + 1} of 32") as stopped:
            train(tmp_path / "parts")
    assert stopped.value.why == "interrupt"
    torch.rand(5)
    resumed = train(tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert resumed.sessions == 2 and resumed.test == whole.test

    def untimed(record: Record) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in record.history]

    assert untimed(whole) == untimed(resumed)
    assert not checkpoint.exists(tmp_path / "parts" / whole.name), "a finished run needs no checkpoint"


@pytest.mark.parametrize("model", sorted(set(models.NAMES) - {"mega", "transformer"}))
def test_every_model_goes_on_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Noise, codebooks, batch statistics: whatever a model remembers, a resumed run remembers."""
    more = {"seqboat": {"norm": "batchnorm", "prenorm": True}, "longvq": {"codes": 24, "decay": 0.5}}
    overrides = {**tiny.MODELS[model], "dropout": 0.1, **more.get(model, {})}
    recipe = tiny.recipe(model=model, overrides=overrides, epochs=2, warmup=1, select="best")
    whole = train(tmp_path / "whole", recipe=recipe)
    for update in (0, 9):  # one before any codebook has settled, one in the middle of the second epoch
        with monkeypatch.context() as patch:
            stop_at(patch, update)
            with pytest.raises(Unfinished):
                train(tmp_path / "parts", recipe=recipe, resume=True)
    resumed = train(tmp_path / "parts", recipe=recipe, resume=True)
    name = f"tiny-{model}-test-seed0"
    assert resumed.sessions == 3 and resumed.test == whole.test
    assert same(weights(tmp_path / "whole", name), weights(tmp_path / "parts", name))
    if model == "longvq":
        assert weights(tmp_path / "parts", name)["encoder.layers.0.longvq.attention.quantizer.draws"] > 2, "codes died"


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile without code generation, which would take a C++ compiler and its time. Notes what it was given."""
    original, seen = torch.compile, []

    def compile(model: torch.nn.Module, **options: Any) -> Any:
        seen.append(model)
        return original(model, **options, backend="eager")

    monkeypatch.setattr(torch, "compile", compile)
    return seen


def test_a_compiled_model_is_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_compiler: list[Any]
) -> None:
    small = {"model": "transformer", "overrides": tiny.MODELS["transformer"], "epochs": 1, "augment": False}
    name = "tiny-transformer-test-seed0"
    plain = train(tmp_path / "plain", recipe=tiny.recipe(**small))
    assert not quick_compiler
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Unfinished):
            train(tmp_path / "compiled", recipe=tiny.recipe(**small, compile=True))
    names = checkpoint.load(tmp_path / "compiled" / name)[0]
    assert "model.head.out.weight" in names and not any("_orig_mod" in key for key in names)
    compiled = train(tmp_path / "compiled", recipe=tiny.recipe(**small, compile=True), resume=True)
    assert len(quick_compiler) == 2, "one for each session"
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "something was compiled"
    assert compiled.test["loss"] == pytest.approx(plain.test["loss"], rel=1e-3)
    assert weights(tmp_path / "compiled", name).keys() == weights(tmp_path / "plain", name).keys()
    model, _ = load_run(tmp_path / "compiled" / name)
    with models.record(model) as tape:
        model(torch.ones(1, 5, dtype=torch.int64))
    assert tape.names("weights")


def test_what_is_compiled_is_in_one_piece(tmp_path: Path, quick_compiler: list[Any]) -> None:
    """Also where codes are set up, or a new session has to look whether they are."""
    recipe = tiny.recipe(model="longvq", overrides=tiny.MODELS["longvq"], epochs=1, augment=False, compile=True)
    counters = torch._dynamo.utils.counters
    with pytest.raises(Unfinished):
        train(tmp_path, recipe=recipe, max_seconds=0)
    counters.clear()
    train(tmp_path, recipe=recipe, resume=True)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_a_compiler_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found.\nAnd much more about it.")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: original(model, **options, backend=refusing))
    recipe = tiny.recipe(model="transformer", overrides=tiny.MODELS["transformer"], compile=True)
    said = r"torch.compile failed: .*No working C\+\+ compiler.*compile=false"
    with pytest.raises(RecipeError, match=said) as caught:
        train(tmp_path, recipe=recipe)
    assert "\n" not in str(caught.value)


def test_an_update_waits_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "in_pieces", lambda x: False)  # a CPU is also asked whether a mask hides anything
    original, asked = loop.train_update, []

    def watched(run: Any, pieces: list[Batch]) -> list[float]:
        with monkeypatch.context() as patch:
            for name in ("tolist", "__bool__", "__int__", "__float__"):
                answer = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda t, n=name, answer=answer: (asked.append(n), answer(t))[1])
            return original(run, pieces)

    monkeypatch.setattr(loop, "train_update", watched)
    updates = train(tmp_path, recipe=tiny.recipe(epochs=1)).updates
    assert asked == ["tolist"] * updates


# Every evaluation has four batches: number 11 is in the validation after update 16, number 22 in the test.
@pytest.mark.parametrize(("evaluated", "update"), [(2, 0), (11, 16), (22, 32)])
@pytest.mark.parametrize("select", ["last", "best"])
def test_stopped_inside_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluated: int, update: int, select: str
) -> None:
    recipe = tiny.recipe(select=select, lr=0.1)
    whole = train(tmp_path / "whole", recipe=recipe)
    original, seen = loop.evaluation_batches, 0

    def pressing(*args: Any, **options: Any) -> Any:
        nonlocal seen
        for part in original(*args, **options):
            seen += 1
            if seen == evaluated:
                os.kill(os.getpid(), signal.SIGINT)
            yield part

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluation_batches", pressing)
        with pytest.raises(Unfinished, match=f"after update {update} of 32") as stopped:
            train(tmp_path / "parts", recipe=recipe)
    assert stopped.value.why == "interrupt" and seen in (evaluated, evaluated + 1), "the evaluation did not go on"
    resumed = train(tmp_path / "parts", recipe=recipe, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert [row["valid"] for row in whole.history] == [row["valid"] for row in resumed.history]
    assert whole.test == resumed.test


def test_a_session_without_time_still_gets_one_thing_done(tmp_path: Path) -> None:
    recipe, sessions = tiny.recipe(epochs=1), 0
    while True:
        sessions += 1
        try:
            record = train(tmp_path / "parts", recipe=recipe, max_seconds=0, resume=True)
            break
        except Unfinished as stopped:
            assert stopped.why == "time" and sessions < 20
    assert record.updates == 8 and record.sessions == sessions
    assert record.test == train(tmp_path / "whole", recipe=recipe).test


def test_the_best_weights_survive_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny.recipe(select="best", lr=0.3, eval_every=3)  # a rate too high: the last is not the best
    whole = train(tmp_path / "whole", recipe=recipe)
    best = max((row for row in whole.history if row["valid"]), key=lambda row: row["valid"]["accuracy"])
    assert whole.weights_of == {"update": best["update"], "rule": "best"}
    with monkeypatch.context() as patch:
        stop_at(patch, 28)
        with pytest.raises(Unfinished):
            train(tmp_path / "parts", recipe=recipe)
    assert train(tmp_path / "parts", recipe=recipe, resume=True).test == whole.test
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_time_is_up(tmp_path: Path) -> None:
    with pytest.raises(Unfinished, match="after update 1 of 32 \\(time\\)") as stopped:
        train(tmp_path, max_seconds=0)
    assert stopped.value.why == "time"
    assert train(tmp_path, resume=True, max_seconds=600).updates == 32


def test_making_the_data_takes_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + made[0])

    def slowly(*_: Any) -> Any:
        made[0] += 3_600
        return tiny.task()

    monkeypatch.setattr(loop, "load_task", slowly)
    with pytest.raises(Unfinished, match=r"\(time\)"):
        fit(tiny.recipe(), out=tmp_path, progress=False, cpu=True, max_seconds=1_800)


def test_finished_and_unfinished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Unfinished):
        train(tmp_path, max_seconds=0)
    with pytest.raises(CheckpointError, match="Add --resume to go on with it, --overwrite to start again"):
        train(tmp_path)
    first = train(tmp_path, overwrite=True)
    assert first.sessions == 1
    assert train(tmp_path, resume=True) == first
    assert "is finished already" in capsys.readouterr().out
    assert train(tmp_path / "new", resume=True).updates == 32
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": {"lr": 0.02}}, "there lr is 0.01, here 0.02"),
        ({"recipe": {"overrides": {**tiny.SMALL, "dim": 8}}}, "there overrides is"),
        ({"task": 80}, "there training sequences is 70, here 80"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Unfinished):
        train(tmp_path, max_seconds=0)
    with pytest.raises(CheckpointError, match=message) as caught:
        train(
            tmp_path, tiny.task(changes.get("task", 70)), recipe=tiny.recipe(**changes.get("recipe", {})), resume=True
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="there seed is 0, here 1"):
        (tmp_path / "tiny-mega-test-seed0").rename(tmp_path / "tiny-mega-test-seed1")
        train(tmp_path, seed=1, resume=True)


def test_a_broken_checkpoint_costs_a_few_updates_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "whole")
    folder = tmp_path / "parts" / "tiny-mega-test-seed0"
    for _ in range(3):
        with pytest.raises(Unfinished):
            train(tmp_path / "parts", max_seconds=0, resume=True)
    newest = folder / checkpoint.NEWEST
    newest.write_bytes(newest.read_bytes()[:-1])
    train(tmp_path / "parts", resume=True)
    said = capsys.readouterr().out
    assert "truncated or corrupt" in said and "going on after update 2 of 32" in said
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_pieces_make_the_same_update(tmp_path: Path) -> None:
    for pieces in (1, 2, 4):
        train(
            tmp_path / str(pieces), recipe=tiny.recipe(overrides=tiny.SMALL, accumulate=pieces, augment=False, epochs=1)
        )
    whole, parts = weights(tmp_path / "1"), weights(tmp_path / "4")
    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)
    assert not same(whole, parts)


def test_clipping_bounds_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    step = torch.optim.AdamW.step

    def spying(self: torch.optim.AdamW, *rest: Any) -> Any:
        norms.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm().item())
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spying)
    train(tmp_path / "free", recipe=tiny.recipe(clip=None, epochs=1))
    free, norms[:] = list(norms), []
    train(tmp_path / "clipped", recipe=tiny.recipe(clip=0.01, epochs=1))
    assert min(free) > 0.02 and max(norms) <= 0.01 * (1 + 1e-5)


def test_numbers_that_break_are_named_and_never_enter_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_update

    def breaking(run: Any, pieces: list[Batch]) -> list[float]:
        if run.progress.update == 5:
            with torch.no_grad():
                run.bare_model.head.hidden.weight[0, 0] = torch.nan
        return original(run, pieces)

    monkeypatch.setattr(loop, "train_update", breaking)
    with pytest.raises(NonFiniteError, match=r"update 5: .* parameter head.hidden.weight has 1 of 256 numbers NaN"):
        train(tmp_path, save_every=0)
    tensors, state, _ = checkpoint.load(tmp_path / "tiny-mega-test-seed0")
    assert state["progress"]["update"] == 5
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        ("mega", "mega.ema"),
        ("mega-chunk", "mega.attention.v_proj"),
        ("seqboat", "attention.mx_proj"),
        ("longvq", "longvq.v_proj"),
        ("fastrpb", "qkv"),
        ("spade", "global_branch"),
        ("transformer", "fc1"),
    ],
)
def test_where_numbers_break_is_named_in_every_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, layer: str
) -> None:
    original = loop.train_update

    def breaking(run: Any, pieces: list[Batch]) -> list[float]:
        if run.progress.update == 2:
            broken = run.bare_model.encoder.layers[-1].get_submodule(layer)
            broken.register_forward_hook(lambda module, inputs, output: output * torch.inf)
        return original(run, pieces)

    monkeypatch.setattr(loop, "train_update", breaking)
    recipe = tiny.recipe(model=model, overrides=tiny.MODELS[model], epochs=1)
    with pytest.raises(NonFiniteError, match=r"^update 2: ") as caught:
        train(tmp_path, recipe=recipe, save_every=0)
    named = re.search(
        r"the output of encoder\.layers\.\d\.([a-z_.0-9]+) \(\w+\) has [\d,]+ of [\d,]+ numbers", str(caught.value)
    )
    assert named and named[1] == layer


def test_bf16_trains_and_leaves_float32(tmp_path: Path) -> None:
    record = train(tmp_path, tiny.task(300), recipe=tiny.recipe(precision="bf16", epochs=6, augment=False))
    assert record.test["accuracy"] > 0.8
    assert {t.dtype for t in weights(tmp_path).values()} == {torch.float32}


def test_evaluation_leaves_the_mode_and_the_generators_alone() -> None:
    task = tiny.task()
    model = models.build("mega", task.config, **tiny.SMALL, dropout=0.5).train()
    before = torch.get_rng_state()
    first, again = (evaluate(model, task.valid, batch=n) for n in (7, 30))
    assert model.training and torch.equal(before, torch.get_rng_state())
    assert first == pytest.approx(again, rel=1e-5)


def test_tensorboard_and_json_agree(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = train(tmp_path)
    events = EventAccumulator(str(tmp_path / record.name)).Reload()
    valid = [row["valid"]["accuracy"] for row in record.history if row["valid"]]
    assert [event.value for event in events.Scalars("valid/accuracy")] == pytest.approx(valid)
    assert len(events.Scalars("train/loss_of_update")) == 32
    assert json.loads((tmp_path / f"{record.name}.json").read_text())["updates"] == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 71}, "must not exceed the 70 training sequences"),
        ({"overrides": {"dimm": 3}}, "cannot build mega for tiny: mega has no setting 'dimm'"),
        ({"warmup": 32}, "warm-up must end before"),
    ],
)
def test_recipes_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(tmp_path, recipe=tiny.recipe(**changes))


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="choose --out"):
        train(tmp_path / "file")


def test_processor_time_is_counted_through_all_sessions(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(Unfinished):
            train(tmp_path, max_seconds=0, resume=True)
    before = checkpoint.load(tmp_path / "tiny-mega-test-seed0")[1]["progress"]["cpu_seconds"]
    started = time.process_time()
    record = train(tmp_path, resume=True)
    assert 0 < before < record.cpu_seconds <= before + time.process_time() - started


def test_progress_tells_throughput_memory_and_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tiny.recipe(epochs=1), out=tmp_path, task=tiny.task(), progress=True, cpu=True)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert re.search(r"8/8 \[\d\d:\d\d, \d\d:\d\d left, .*update.*, loss \d.*, \d+ sequences/s, \d+\.\d\d GB", last), (
        last
    )


def test_every_field_of_progress_survives(tmp_path: Path) -> None:
    with pytest.raises(Unfinished):
        train(tmp_path, recipe=tiny.recipe(select="best"), max_seconds=0)
    _, state, _ = checkpoint.load(tmp_path / "tiny-mega-test-seed0")
    assert state["progress"].keys() == {f.name for f in dataclasses.fields(Progress)}
