"""A recipe: everything that decides one training run, and what may be changed about it.

`change(recipe, {"lr": 0.01, "model.dim": 64})` makes a variant; the recipes themselves are rows of `recipes.py`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .schedule import SCHEDULES

PRECISIONS = ("float32", "bf16")
SELECTIONS = ("last", "best")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+=,_-]*")


class RecipeError(ValueError):
    """A recipe that does not exist or contradicts itself. One line: what was wanted, what came, how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, completely. Contradictions raise `RecipeError`."""

    task: str  # what is learned: a name of tasks.load
    model: str  # what learns it: a name of models.build
    name: str  # "laptop", "paper": the budget or the origin
    overrides: Mapping[str, Any] = field(default_factory=dict)  # where the model departs from models.configs
    data: Mapping[str, Any] = field(default_factory=dict)  # options of tasks.load, e.g. how much data
    epochs: int | None = None  # passes over the training part; or else ...
    updates: int | None = None  # ... steps of the optimiser; exactly one of the two is given
    batch: int = 32  # sequences an update sees, over all processes and pieces together
    accumulate: int = 1  # pieces each process cuts its share into when it does not fit the memory at once
    bucket: bool = True  # sequences of like length share a batch, so that little is padded
    lr: float = 1e-3  # the peak learning rate
    warmup: int = 0  # updates until the peak; attention and EMA start badly at full rate
    schedule: str = "linear"  # what follows the peak: linear or cosine to 0, rsqrt
    power: float = 1.0  # shape of the warm-up; 2 stays low for longer
    initial_lr: float = 1e-7  # rate of the very first update
    weight_decay: float = 0.01  # decoupled, on all parameters, as published
    betas: tuple[float, float] = (0.9, 0.98)  # 0.98 forgets old gradient sizes sooner than torch's 0.999
    eps: float = 1e-8  # keeps Adam's quotient finite
    clip: float | None = 1.0  # largest norm of the whole gradient; None leaves it alone
    precision: str = "float32"  # or bf16: autocast, for GPUs
    compile: bool = False  # let torch.compile fuse the model: pays on a GPU, after a first minute of compiling
    eval_every: int | None = None  # updates between validations; None: at the end of each epoch
    augment: bool = False  # let the task alter training batches at random
    select: str = "last"  # which weights are tested and kept: the last, or those best in validation
    source: str = ""  # where the figures come from

    def __post_init__(self) -> None:
        for key in ("overrides", "data"):
            value: Any = getattr(self, key)
            _require(isinstance(value, Mapping), f"{key} must be a mapping", value, "pass a dictionary")
            object.__setattr__(self, key, MappingProxyType(dict(value)))
        betas: Any = self.betas
        object.__setattr__(self, "betas", tuple(betas) if isinstance(betas, list) else betas)
        for key, (ok, wanted) in _RULES.items():
            _require(ok(getattr(self, key)), f"{key} must be {wanted}", getattr(self, key))
        given = f"epochs={self.epochs}, updates={self.updates}"
        one = (self.epochs is None) != (self.updates is None)
        _require(one, "give either epochs or updates", given, "set the other to None")
        _require(
            self.batch % self.accumulate == 0,
            "batch must divide into `accumulate` equal pieces",
            f"batch={self.batch}, accumulate={self.accumulate}",
        )
        _require(self.initial_lr <= self.lr, "initial_lr must not exceed lr", f"{self.initial_lr} > {self.lr}")
        if self.updates is not None:
            self._check_warmup(self.updates)

    def _check_warmup(self, total: int) -> None:
        got = f"warmup={self.warmup} of {total} updates"
        _require(self.warmup < total, "the warm-up must end before the run does", got, "lower warmup or train longer")

    def total_updates(self, sequences: int) -> int:
        """How many updates the run makes on `sequences` training sequences. Raises `RecipeError` if it makes none."""
        _require(
            sequences >= self.batch,
            f"batch must not exceed the {sequences} training sequences",
            self.batch,
            "lower batch",
        )
        if self.updates is not None:
            return self.updates
        total = (self.epochs or 0) * (sequences // self.batch)
        self._check_warmup(total)
        return total

    def as_dict(self) -> dict[str, Any]:
        """Every field, as JSON gives it back (lists for tuples)."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {key: plain(value) for key, value in values.items()}

    @property
    def run_name(self) -> str:
        """`<task>-<model>-<recipe>`."""
        return f"{self.task}-{self.model}-{self.name}"


def _whole(least: int) -> Any:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least


def _number(v: Any) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v)


def _beta_pair(v: Any) -> bool:
    return isinstance(v, tuple) and len(v) == 2 and all(_number(b) and 0 <= b < 1 for b in v)


_RULES: dict[str, tuple[Any, str]] = {
    "name": (
        lambda v: isinstance(v, str) and _NAME.fullmatch(v),
        "letters, digits and . + = , _ - (it becomes a file name)",
    ),
    "epochs": (lambda v: v is None or _whole(1)(v), "a whole number >= 1, or None"),
    "updates": (lambda v: v is None or _whole(1)(v), "a whole number >= 1, or None"),
    "batch": (_whole(1), "a whole number >= 1"),
    "accumulate": (_whole(1), "a whole number >= 1"),
    "bucket": (lambda v: isinstance(v, bool), "True or False"),
    "lr": (lambda v: _number(v) and v > 0, "a number > 0"),
    "warmup": (_whole(0), "a whole number of updates >= 0"),
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "power": (lambda v: _number(v) and v > 0, "a number > 0"),
    "initial_lr": (lambda v: _number(v) and v >= 0, "a number >= 0"),
    "weight_decay": (lambda v: _number(v) and v >= 0, "a number >= 0"),
    "betas": (_beta_pair, "two numbers in [0, 1)"),
    "eps": (lambda v: _number(v) and v > 0, "a number > 0"),
    "clip": (lambda v: v is None or (_number(v) and v > 0), "a number > 0, or None"),
    "precision": (lambda v: v in PRECISIONS, f"one of {', '.join(PRECISIONS)}"),
    "eval_every": (lambda v: v is None or _whole(1)(v), "a whole number of updates >= 1, or None"),
    "compile": (lambda v: isinstance(v, bool), "True or False"),
    "augment": (lambda v: isinstance(v, bool), "True or False"),
    "select": (lambda v: v in SELECTIONS, f"one of {', '.join(SELECTIONS)}"),
}


def _require(ok: Any, wanted: str, got: Any, mend: str = "") -> None:
    if not ok:
        got = got if isinstance(got, str) and "=" in got else repr(got)
        raise RecipeError(f"{wanted}; got {got}{'. ' + mend[0].upper() + mend[1:] if mend else ''}.")


def plain(value: Any) -> Any:
    """`value` as JSON would give it back: dictionaries, lists, numbers, text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (tuple, list)) else value


def change(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A variant of a recipe, named after its changes: keys are fields, `model.<setting>` or `data.<option>`.

    Raises `RecipeError` for a key that does not exist and for whatever the recipe refuses.
    """
    fields: dict[str, Any] = {}
    overrides, data = dict(recipe.overrides), dict(recipe.data)
    free = [f.name for f in dataclasses.fields(Recipe) if f.name not in ("task", "model", "overrides", "data")]
    for key, value in settings.items():
        group, _, inner = key.partition(".")
        if group in ("model", "data") and inner:
            (overrides if group == "model" else data)[inner] = value
        else:
            known("setting", key, [*free, "model.<setting>", "data.<option>"])
            fields[key] = value
    if "epochs" in fields and "updates" not in fields:
        fields["updates"] = None
    if "updates" in fields and "epochs" not in fields:
        fields["epochs"] = None
    if settings and "name" not in fields:
        suffix = "".join(f"+{key}={value}" for key, value in settings.items())
        fields["name"] = recipe.name + re.sub(r"[^A-Za-z0-9.+=,_-]+", "_", suffix)[:120]
    if settings and "source" not in fields:
        fields["source"] = f"{recipe.source.rstrip('.')}; changed: {', '.join(settings)}."
    return dataclasses.replace(recipe, overrides=overrides, data=data, **fields)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("lr=0.01", "augment=false")` -> `{"lr": 0.01, "augment": False}`; what is no Python literal stays text."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        _require(equals and key and text, "--set wants key=value, e.g. --set lr=0.01", pair)
        words = {"true": True, "false": False, "none": None}
        try:
            settings[key] = words[text.lower()] if text.lower() in words else ast.literal_eval(text)
        except (ValueError, SyntaxError):
            settings[key] = text
    return settings


def known(what: str, name: str, names: list[str]) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(f"unknown {what} {name!r}; choose from {', '.join(names)}.{hint}")
