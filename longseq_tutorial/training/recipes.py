"""The table of recipes: one row a training run, for task x model x {paper, gpu-30min, laptop}.

`paper` repeats published settings, `gpu-30min` is meant for one GPU and an afternoon, `laptop` for two CPU cores and at
most a quarter of an hour. `get(task, model, name)` finds a row, or says why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from .recipe import Recipe, RecipeError, known

TASKS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "speech")
MODELS = ("transformer", "mega", "mega-chunk", "seqboat", "longvq", "fastrpb", "spade")
Settings = dict[str, Any]

# --- paper --------------------------------------------------------------------------------------------------
# The models themselves are published too: models.configs holds them, so these rows change nothing about them.

_MEGA_SOURCE = "Mega paper, hyper-parameter table, and its published scripts"
_SEQBOAT_SOURCE = "SeqBoat's published scripts"
_FASTRPB_SOURCE = (
    "the FastRPB authors' configurations for the Long Range Arena; they read a CLS token, our model pools the mean"
)
_KEYWORDS: Settings = {"source": "sc10", "random_split": True, "normalise": "standard"}

_MEGA_PAPER: Mapping[str, Settings] = {
    "listops": dict(updates=90_000, batch=64, lr=0.001, warmup=3_000),
    "text": dict(updates=25_000, batch=50, accumulate=2, lr=0.004, warmup=10_000),
    "retrieval": dict(updates=91_960, batch=64, accumulate=8, lr=0.003, warmup=10_000, weight_decay=0.04),
    "image": dict(updates=180_000, batch=50, lr=0.01, warmup=9_000, weight_decay=0.02),
    "pathfinder": dict(updates=250_000, batch=128, lr=0.01, warmup=50_000),
    "pathx": dict(updates=125_000, batch=128, accumulate=8, lr=0.01, warmup=25_000, power=2.0),  # 8 GPUs there
    "speech": dict(data=_KEYWORDS, updates=250_000, batch=20, lr=0.01, warmup=10_000, eval_every=1_250),
}
_SEQBOAT_PAPER: Mapping[str, Settings] = {
    **_MEGA_PAPER,
    "listops": dict(updates=90_000, batch=64, lr=0.004, warmup=27_000, weight_decay=0.001),
}
_ARENA: Settings = dict(schedule="rsqrt", initial_lr=0.0, weight_decay=0.1, eps=1e-9, clip=None, eval_every=500)
_FASTRPB_PAPER: Mapping[str, Settings] = {
    # The rate is `base / sqrt(update)` once the warm-up is over, so that its peak is base / sqrt(warmup).
    "listops": dict(_ARENA, updates=10_000, batch=8, lr=0.0125 / math.sqrt(1_000), warmup=1_000),
    "text": dict(_ARENA, data={"length": 1_000}, updates=30_000, batch=8, lr=0.0125 / math.sqrt(8_000), warmup=8_000),
    "retrieval": dict(_ARENA, updates=15_000, batch=8, lr=0.005 / math.sqrt(3_000), warmup=3_000),
    "image": dict(
        epochs=200, batch=96, lr=2.5e-4, warmup=468, schedule="cosine", initial_lr=0.0, weight_decay=0.0, clip=None
    ),
}
_TRANSFORMER_PAPER: Mapping[str, Settings] = {
    "listops": dict(_ARENA, updates=5_000, batch=32, lr=0.05 / math.sqrt(1_000), warmup=1_000),
}


def _paper() -> Iterator[Recipe]:
    for task, settings in _MEGA_PAPER.items():
        for model in ("mega", "mega-chunk"):
            source = f"{_MEGA_SOURCE}: the column of {task}"
            if task == "speech":
                source += ", SC base, published for Mega-chunk; the 10 keywords split by another random generator"
            yield Recipe(task=task, model=model, name="paper", select="best", source=f"{source}.", **settings)
    for task, settings in _SEQBOAT_PAPER.items():
        yield Recipe(task=task, model="seqboat", name="paper", select="best", source=f"{_SEQBOAT_SOURCE}.", **settings)
    for task, settings in _FASTRPB_PAPER.items():
        yield Recipe(task=task, model="fastrpb", name="paper", source=f"{_FASTRPB_SOURCE}.", **settings)
    for task, settings in _TRANSFORMER_PAPER.items():
        yield Recipe(
            task=task,
            model="transformer",
            name="paper",
            source="Long Range Arena, base settings (the Mega paper prints none for its Transformer): 5,000 steps, "
            "rate 0.05 / sqrt(max(step, 1000)) after 1,000 of warm-up. LRA reads a CLS token; our baseline pools the "
            "mean.",
            **settings,
        )


# --- gpu-30min ----------------------------------------------------------------------------------------------
# Larger batches, bf16, a short cosine: about a tenth of the published budget. Chosen by reckoning; a record tells how
# far it got. Models as published, or of Mega's size where nothing was published.

_PLANNED = "planned here for one data-centre GPU and half an hour; not published"

_GPU: Mapping[str, Settings] = {
    "listops": dict(epochs=20, batch=128, lr=0.002, warmup=1_500),
    "text": dict(epochs=30, batch=64, lr=0.004, warmup=1_500),
    "retrieval": dict(epochs=15, batch=64, lr=0.003, warmup=1_500, weight_decay=0.04),
    "image": dict(epochs=60, batch=128, lr=0.008, warmup=2_000, weight_decay=0.02),
    "pathfinder": dict(epochs=40, batch=256, lr=0.008, warmup=5_000),
    "pathx": dict(updates=15_000, batch=32, lr=0.005, warmup=3_000, power=2.0, eval_every=2_500),
    "speech": dict(data={"source": "arabic"}, epochs=120, batch=32, lr=0.006, warmup=600, augment=True),
}
_GPU_SLOWER = {"transformer": 0.1, "fastrpb": 0.25, "spade": 0.5}  # no gates after the norm: they want a lower rate

# Width and depth of Mega's table, for models that were not published on a task.
_MEGA_SIZE: Mapping[str, tuple[int, int]] = {
    "listops": (80, 6),
    "text": (128, 4),
    "retrieval": (128, 6),
    "image": (160, 8),
    "pathfinder": (128, 6),
    "pathx": (64, 4),
    "speech": (64, 6),
}
_LENGTH = {"listops": 2_000, "text": 4_096, "retrieval": 4_000, "image": 1_024, "pathfinder": 1_024, "pathx": 16_384}


def _gpu_size(task: str, model: str) -> Settings:
    dim, layers = _MEGA_SIZE[task]
    dropout = 0.1 if task in ("listops", "text", "retrieval") else 0.0
    wide: Settings = dict(dim=dim, layers=layers, ffn_dim=2 * dim, head_dim=2 * dim, dropout=dropout)
    if model == "transformer":
        return dict(wide, heads=4)
    if model == "spade":
        return dict(wide, heads=4, window=128)
    if model == "fastrpb":
        image = task in ("image", "pathfinder", "pathx")
        side = {"image": 32, "pathfinder": 32, "pathx": 128}
        positions = side[task] if image else _LENGTH.get(task, 16_000)
        layout = "separable" if image else "sequence"
        return dict(wide, heads=4, qkv_dim=dim, max_positions=positions, layout=layout)
    return {}


def _gpu() -> Iterator[Recipe]:
    for task, settings in _GPU.items():
        for model in MODELS:
            if (task, model) in (("pathx", "transformer"), ("speech", "transformer")):
                continue
            yield Recipe(
                task=task,
                model=model,
                name="gpu-30min",
                overrides=_gpu_size(task, model),
                source=f"{_PLANNED}.",
                **{
                    "schedule": "cosine",
                    "precision": "bf16",
                    "compile": True,
                    "select": "best",
                    **settings,
                    "lr": settings["lr"] * _GPU_SLOWER.get(model, 1.0),
                },
            )


# --- laptop -------------------------------------------------------------------------------------------------
# Small models of one width, so that what differs is the mixer.

_TUNED = "chosen here for two CPU cores and at most a quarter of an hour; not published"
_PATCH = ((40, 10), (8, 8))  # 5 ms filters every 1.25 ms, then eight answers a token: one token per 10 ms

_LAPTOP: Mapping[str, Settings] = {
    "listops": dict(
        data={"train": 20_000, "valid": 500, "test": 1_000, "min_length": 50, "max_length": 200},
        updates=1_500,
        batch=32,
        lr=0.003,
        warmup=150,
        eval_every=250,
        source=f"{_TUNED}; short expressions, of 50 to 200 tokens, not the Arena's 500 to 2,000.",
    ),
    "text": dict(
        data={"length": 1_000, "valid": 1_000, "test": 5_000},
        updates=900,
        batch=16,
        lr=0.003,
        warmup=90,
        schedule="cosine",
        eval_every=300,
        source=f"{_TUNED}; the first 1,000 bytes of a review, and not all reviews once.",
    ),
    "speech": dict(epochs=24, batch=32, lr=0.004, warmup=150, schedule="cosine", augment=True, source=f"{_TUNED}."),
}
_LAPTOP_RATE: Mapping[tuple[str, str], float] = {
    ("listops", "transformer"): 0.001,
    ("text", "transformer"): 0.001,
    ("speech", "transformer"): 0.002,
    ("listops", "fastrpb"): 0.002,
    ("text", "fastrpb"): 0.002,
    ("speech", "fastrpb"): 0.002,
    ("listops", "spade"): 0.002,
    ("text", "spade"): 0.002,
    ("speech", "spade"): 0.002,
}
_LAPTOP_LENGTH = {"listops": 200, "text": 1_000, "speech": 128}
_LAPTOP_WINDOW = {"listops": 32, "text": 64, "speech": 25}


def _laptop_size(task: str, model: str) -> Settings:
    length, window = _LAPTOP_LENGTH[task], _LAPTOP_WINDOW[task]
    signal = task == "speech"
    shared: Settings = dict(dim=64, layers=3 if signal else 2, head_dim=128, dropout=0.1)
    if signal:
        shared["patch"] = _PATCH
    gated: Settings = dict(shared, z_dim=32, v_dim=128)
    match model:
        case "transformer":
            return dict(shared, heads=4, ffn_dim=128, dropout=0.1 if signal else 0.0)  # it learns least without
        case "mega":
            return dict(gated, ffn_dim=128, max_positions=length, truncation=None)
        case "mega-chunk":
            return dict(gated, ffn_dim=128, chunk=window, truncation=None)
        case "seqboat":  # no feed-forward layers: one layer more
            return dict(gated, layers=shared["layers"] + 1, window=window, max_positions=length, truncation=None)
        case "longvq":
            return dict(gated, ffn_dim=128, codes=128, window=window)
        case "fastrpb":
            return dict(shared, heads=4, qkv_dim=64, ffn_dim=128, max_positions=length)
        case _:
            return dict(shared, heads=4, ffn_dim=128, window=window, state=32)


def _laptop() -> Iterator[Recipe]:
    for task, settings in _LAPTOP.items():
        for model in MODELS:
            lr = _LAPTOP_RATE.get((task, model), settings["lr"])
            overrides = _laptop_size(task, model)
            yield Recipe(task=task, model=model, name="laptop", overrides=overrides, **{**settings, "lr": lr})


RECIPES: tuple[Recipe, ...] = (*_paper(), *_gpu(), *_laptop())

# --- what is not in the table ---------------------------------------------------------------------------------


def _refused() -> Iterator[tuple[tuple[str, str, str], str]]:
    for task in TASKS:
        yield (task, "longvq", "paper"), "LongVQ's settings are not known to us, and ours is a reconstruction"
        yield (task, "spade", "paper"), "SPADE's settings for the Long Range Arena and speech are not known to us"
        if task not in _FASTRPB_PAPER:
            yield (task, "fastrpb", "paper"), f"the authors' configurations have no {task}"
        if task not in (*_TRANSFORMER_PAPER, "speech"):
            yield (task, "transformer", "paper"), "the settings behind its published figures are not known to us"
        if task not in _LAPTOP:
            short = f"{task} wants more than a quarter of an hour on two cores; try gpu-30min, or shorten it with --set"
            for model in MODELS:
                yield (task, model, "laptop"), short
    yield (
        ("speech", "transformer", "paper"),
        "the Mega paper reports that a Transformer does not fit the memory on 16,000 raw samples and prints no "
        "settings, so there is nothing to repeat; take laptop",
    )
    for task in ("pathx", "speech"):
        yield (task, "transformer", "gpu-30min"), "attention of every sample to every other is what does not scale here"


REFUSED: Mapping[tuple[str, str, str], str] = MappingProxyType(dict(_refused()))


def get(task: str, model: str, name: str) -> Recipe:
    """The row of the table. Raises `RecipeError`, with the nearest name, when there is none."""
    known("task", task, sorted(TASKS))
    known("model", model, sorted(MODELS))
    if (task, model, name) in REFUSED:
        raise RecipeError(f"there is no {name} recipe for {task} with {model}: {REFUSED[task, model, name]}.")
    rows = {r.name: r for r in RECIPES if (r.task, r.model) == (task, model)}
    known(f"recipe for {task} with {model}", name, sorted(rows))
    return rows[name]
