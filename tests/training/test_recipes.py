"""The table of recipes: complete, as published where it says so, and closed to contradictions."""

import dataclasses
import json
import math
import re
from itertools import product
from typing import Any

import pytest
import torch

from longseq_tutorial import models, tasks
from longseq_tutorial.tasks import TaskConfig
from longseq_tutorial.training import RECIPES, Recipe, RecipeError, get, recipes
from longseq_tutorial.training.recipe import change, parse_settings
from longseq_tutorial.training.recipes import REFUSED

CONFIGS = {
    "listops": TaskConfig("listops", "tokens", 10, 2000, vocabulary=16),
    "text": TaskConfig("text", "tokens", 2, 4096, vocabulary=257),
    "retrieval": TaskConfig("retrieval", "tokens", 2, 4000, vocabulary=257, pairs=True),
    "image": TaskConfig("image", "samples", 10, 1024, grid=(32, 32)),
    "pathfinder": TaskConfig("pathfinder", "samples", 2, 1024, grid=(32, 32)),
    "pathx": TaskConfig("pathx", "samples", 2, 16384, grid=(128, 128)),
    "speech": TaskConfig("speech", "samples", 10, 8000, sample_rate=8000),
}
NAMES = ("paper", "gpu-30min", "laptop")
ALL = list(product(recipes.TASKS, recipes.MODELS, NAMES))
LAPTOP = [(task, model) for task in ("listops", "text", "speech") for model in models.NAMES]


def test_tasks_and_models_are_all_there_are() -> None:
    assert set(recipes.MODELS) == set(models.NAMES) and set(recipes.TASKS) == set(CONFIGS) == set(tasks.names())


def test_every_combination_is_there_or_refused_with_a_reason() -> None:
    rows = {(r.task, r.model, r.name) for r in RECIPES}
    assert len(rows) == len(RECIPES) and not rows & set(REFUSED)
    assert rows | set(REFUSED) == set(ALL)
    for key, why in REFUSED.items():
        with pytest.raises(RecipeError, match=re.escape(f"there is no {key[2]} recipe for {key[0]} with {key[1]}: ")):
            get(*key)
        assert len(why) > 20


def test_every_model_runs_on_a_laptop_and_on_a_gpu() -> None:
    rows = {(r.task, r.model, r.name) for r in RECIPES}
    assert {(task, model, "laptop") for task, model in LAPTOP} <= rows
    quadratic = {("pathx", "transformer"), ("speech", "transformer")}
    assert {(t, m, "gpu-30min") for t, m in product(CONFIGS, models.NAMES) if (t, m) not in quadratic} <= rows


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.run_name)
def test_the_settings_exist_and_fit_each_other(recipe: Recipe) -> None:
    assert recipe.source.endswith(".") and get(recipe.task, recipe.model, recipe.name) is recipe
    with torch.device("meta"):
        models.build(recipe.model, CONFIGS[recipe.task], **recipe.overrides)
    assert set(recipe.data) <= set(tasks.options(recipe.task))


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        # Mega paper and scripts: updates, batch, lr, warm-up, weight decay; D, layers, z, v, function, norm, pre-norm
        ("listops", (90_000, 64, 0.001, 3_000, 0.01, 80, 6, 64, 160, "softmax", "layernorm", False)),
        ("text", (25_000, 50, 0.004, 10_000, 0.01, 128, 4, 64, 256, "softmax", "scalenorm", False)),
        ("retrieval", (91_960, 64, 0.003, 10_000, 0.04, 128, 6, 64, 256, "softmax", "scalenorm", False)),
        ("image", (180_000, 50, 0.01, 9_000, 0.02, 160, 8, 96, 320, "laplace", "batchnorm", True)),
        ("pathfinder", (250_000, 128, 0.01, 50_000, 0.01, 128, 6, 64, 256, "laplace", "batchnorm", True)),
        ("pathx", (125_000, 128, 0.01, 25_000, 0.01, 64, 4, 32, 128, "laplace", "batchnorm", True)),
        ("speech", (250_000, 20, 0.01, 10_000, 0.01, 60, 6, 30, 120, "laplace", "batchnorm", True)),
    ],
)
def test_paper_holds_the_published_figures(task: str, expected: tuple[Any, ...]) -> None:
    for model in ("mega", "mega-chunk"):
        r = get(task, model, "paper")
        c = models.configure(model, task, **r.overrides)
        ours = (r.updates, r.batch, r.lr, r.warmup, r.weight_decay)
        ours += (c.dim, c.layers, c.z_dim, c.v_dim, c.attention, c.norm, c.prenorm)
        assert ours == expected
        assert (r.betas, r.eps, r.clip, r.precision) == ((0.9, 0.98), 1e-8, 1.0, "float32")
        assert (r.schedule, r.initial_lr, r.augment, r.select) == ("linear", 1e-7, False, "best")
        assert r.power == (2.0 if task == "pathx" else 1.0)
        assert c.chunk == (None if model == "mega" else {"pathx": 4096, "speech": 1000}.get(task, 128))


def test_seqboat_departs_from_mega_in_listops_alone() -> None:
    for task in CONFIGS:
        ours, megas = get(task, "seqboat", "paper"), get(task, "mega", "paper")
        changed = {k for k, v in ours.as_dict().items() if v != megas.as_dict()[k]} - {"model", "source"}
        assert changed == ({"lr", "warmup", "weight_decay"} if task == "listops" else set())
    r = get("listops", "seqboat", "paper")
    assert (r.lr, r.warmup, r.weight_decay) == (0.004, 27_000, 0.001)


def test_fastrpb_follows_the_arenas_schedule() -> None:
    peaks = {"listops": (0.0125, 1_000, 10_000), "text": (0.0125, 8_000, 30_000), "retrieval": (0.005, 3_000, 15_000)}
    for task, (base, warmup, updates) in peaks.items():
        r = get(task, "fastrpb", "paper")
        assert (r.batch, r.updates, r.warmup, r.schedule) == (8, updates, warmup, "rsqrt")
        assert r.lr == pytest.approx(base / math.sqrt(warmup))


def test_the_arenas_transformer() -> None:
    r = get("listops", "transformer", "paper")
    assert (r.updates, r.batch, r.schedule, r.warmup) == (5_000, 32, "rsqrt", 1_000)
    assert r.lr == pytest.approx(0.05 / math.sqrt(1_000))  # 0.05 / sqrt(step) at the end of the warm-up


BAD: list[tuple[dict[str, Any], str]] = [
    ({"epochs": None}, "either epochs or updates; got epochs=None, updates=None"),
    ({"updates": 5}, "either epochs or updates; got epochs=4, updates=5"),
    ({"epochs": 0}, "epochs must be a whole number"),
    ({"batch": 8.0}, "batch must be a whole number"),
    ({"batch": True}, "batch must be a whole number"),
    ({"accumulate": 3}, "equal pieces; got batch=8, accumulate=3"),
    ({"lr": -1}, "lr must be a number > 0; got -1"),
    ({"lr": math.nan}, "lr must be a number > 0"),
    ({"lr": 1e-9}, "initial_lr must not exceed lr"),
    ({"epochs": None, "updates": 5, "warmup": 5}, "must end before the run does; got warmup=5 of 5"),
    ({"schedule": "step"}, "one of linear, cosine, rsqrt; got 'step'"),
    ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
    ({"clip": 0}, "clip must be a number > 0, or None"),
    ({"precision": "fp16"}, "one of float32, bf16; got 'fp16'"),
    ({"augment": "yes"}, "augment must be True or False"),
    ({"select": "middle"}, "one of last, best"),
    ({"name": "../up"}, "it becomes a file name"),
    ({"overrides": [1]}, "overrides must be a mapping"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_contradictions_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"task": "t", "model": "m", "name": "n", "epochs": 4, "batch": 8}
    Recipe(**good)
    with pytest.raises(RecipeError) as caught:
        Recipe(**{**good, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_length_of_a_run() -> None:
    r = Recipe(task="t", model="m", name="n", epochs=4, batch=8)
    assert r.total_updates(70) == 32
    assert dataclasses.replace(r, epochs=None, updates=5).total_updates(70) == 5
    with pytest.raises(RecipeError, match="must not exceed the 7 training sequences; got 8"):
        r.total_updates(7)
    with pytest.raises(RecipeError, match="warmup=32 of 32 updates"):
        dataclasses.replace(r, warmup=32).total_updates(70)


def test_a_recipe_cannot_be_altered() -> None:
    r = get("speech", "mega", "laptop")
    with pytest.raises(dataclasses.FrozenInstanceError):
        r.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        r.overrides["dim"] = 3  # type: ignore[index]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.run_name)
def test_through_json_and_back(recipe: Recipe) -> None:
    fields = json.loads(json.dumps(recipe.as_dict()))
    assert Recipe(**fields).as_dict() == recipe.as_dict() == fields


def test_changes() -> None:
    r = get("listops", "mega", "laptop")
    new = change(
        r, parse_settings(("lr=0.5", "model.dim=32", "data.train=100", "epochs=2", "augment=true", "clip=none"))
    )
    assert (new.lr, new.overrides["dim"], new.data["train"], new.augment, new.clip) == (0.5, 32, 100, True, None)
    assert (new.epochs, new.updates) == (2, None)
    assert new.name.startswith("laptop+lr=0.5+model.dim=32") and "changed: lr" in new.source
    assert change(r, {}) == r and change(r, {"name": "mine", "lr": 1.0}).name == "mine"
    assert change(r, parse_settings(("model.patch=((16,8),(4,2))",))).overrides["patch"] == ((16, 8), (4, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: get("speach", "mega", "paper"),
            "unknown task 'speach'; choose from image, listops, pathfinder, pathx, retrieval, speech, text.",
        ),
        (lambda: get("speech", "mega-chunky", "paper"), "Did you mean mega-chunk?"),
        (lambda: get("speech", "mega", "papre"), "unknown recipe for speech with mega 'papre'"),
        (lambda: change(get("speech", "mega", "paper"), {"lrr": 1}), "unknown setting 'lrr'"),
        (lambda: change(get("speech", "mega", "paper"), {"lr": "fast"}), "lr must be a number > 0; got 'fast'"),
        (lambda: parse_settings(("lr",)), "--set wants key=value, e.g. --set lr=0.01; got 'lr'"),
    ],
)
def test_misspelling_is_met_with_the_nearest_name(call: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        call()
    assert message in str(caught.value)
