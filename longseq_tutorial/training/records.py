"""One JSON record a run and its final weights: written, read, checked, and turned back into a model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .. import models
from ..tasks import TaskConfig
from ..tasks.packs import replace_file
from .checkpoint import CheckpointError, read_safetensors, write_safetensors


class RecordError(ValueError):
    """A record or its weights cannot be read. One line: what is wrong, and where."""


@dataclass(frozen=True)
class Record:
    """What a finished run was, where it ran, and what came out."""

    name: str  # <task>-<model>-<recipe>-seed<k>, the name of its files
    recipe: dict[str, Any]  # every field of the Recipe
    config: dict[str, Any]  # every field of the model's configuration, the published ones included
    seed: int  # decides the initial weights, the order of the data, dropout and augmentation
    task: dict[str, Any]  # every field of the TaskConfig
    source: str  # which data exactly; belongs beside every accuracy
    sequences: dict[str, int]  # how many in train, valid, test
    parameters: int  # numbers the optimiser may change
    updates: int  # how many it made
    history: list[dict[str, Any]]  # a row an epoch (and an evaluation): update, epoch, train, valid, lr, seconds
    test: dict[str, float]  # loss and accuracy, measured once, at the end
    weights_of: dict[str, Any]  # which update the saved weights are of, and by which rule
    seconds: float  # training and evaluation, all sessions of the run together
    sessions: int  # 1 + how often it was resumed
    peak_memory: dict[str, int]  # bytes: resident, and on the GPU
    device: str  # "cpu" or "cuda"
    device_name: str
    threads: int  # of torch on the CPU, each process
    processes: int
    versions: dict[str, str]
    commit: str  # "unknown" outside git
    dirty: bool  # whether tracked files differed from the commit
    finished: str  # UTC
    cpu_seconds: float = 0.0  # processor time, all threads, processes and sessions together; 0: not measured
    format: int = field(default=1)

    def __post_init__(self) -> None:
        for key, kind in _KINDS.items():
            value = getattr(self, key)
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise RecordError(f"a record's {key} must be {_said(kind)}; got {value!r}.")
        if self.format != 1:
            raise RecordError(f"this version reads records of format 1; got {self.format}.")
        for key in ("loss", "accuracy"):
            if not isinstance(self.test.get(key), (int, float)):
                raise RecordError(f"a record's test must hold {key} as a number; got {self.test!r}.")
        for row in self.history:
            if not isinstance(row, dict) or not {"update", "epoch", "seconds"} <= row.keys():
                raise RecordError(f"each row of a record's history needs update, epoch, seconds; got {row!r}.")

    @property
    def model(self) -> str:
        """The model's name."""
        return str(self.recipe["model"])

    def __str__(self) -> str:
        return (
            f"{self.name}: test accuracy {self.test['accuracy']:.2%} on {self.source or self.task['name']}, "
            f"{self.parameters:,} parameters, {self.updates:,} updates in {self.seconds:.0f} s on {self.device_name}"
        )


_KINDS: dict[str, Any] = {
    **dict.fromkeys(("name", "source", "device", "device_name", "commit", "finished"), str),
    **dict.fromkeys(("recipe", "config", "task", "sequences", "test", "weights_of", "peak_memory", "versions"), dict),
    **dict.fromkeys(("seed", "parameters", "updates", "sessions", "threads", "processes", "format"), int),
    "history": list,
    "seconds": (int, float),
    "cpu_seconds": (int, float),
    "dirty": bool,
}


def _said(kind: Any) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join(k.__name__ for k in kinds)


def write_record(record: Record, model: nn.Module, folder: Path) -> Path:
    """Write `<name>.safetensors` (float32 weights, configuration in the metadata) and `<name>.json`; return the latter.

    Both atomically, the record last: where there is a record, its weights are complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: (tensor.detach().float() if tensor.is_floating_point() else tensor.detach()).cpu().clone()
        for name, tensor in model.state_dict().items()
    }
    about = {"name": record.name, "model": record.model, "config": record.config, "task": record.task}
    write_safetensors(folder / f"{record.name}.safetensors", weights, about)
    path = folder / f"{record.name}.json"
    replace_file(path, (json.dumps(dataclasses.asdict(record), indent=1) + "\n").encode())
    return path


def read_record(path: str | Path) -> Record:
    """The record in a JSON file. Raises `RecordError` when it is missing, no JSON, or lacks or misnames a field."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecordError(f"cannot read {path} ({error.strerror}).") from error
    except ValueError as error:
        raise RecordError(f"{path} is not a JSON record ({error}).") from error
    if not isinstance(content, dict):
        raise RecordError(f"{path} is not a record: wanted a JSON object, got a {type(content).__name__}.")
    fields = dataclasses.fields(Record)
    missing = sorted(f.name for f in fields if f.default is dataclasses.MISSING and f.name not in content)
    extra = sorted(content.keys() - {f.name for f in fields})
    if missing or extra:
        raise RecordError(f"{path} is not a record: missing {missing or 'nothing'}, unknown {extra or 'nothing'}.")
    try:
        return Record(**content)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error


def load_run(path: str | Path) -> tuple[nn.Module, Record]:
    """The trained model, in eval mode, and the record of a run.

    path: the run's `.json` or `.safetensors`, or both without the ending. The model is built from the metadata
    of the weights. Raises `RecordError` when either file is missing, broken, or does not belong to the other.
    """
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    record = read_record(stem.with_name(stem.name + ".json"))
    weights_path = stem.with_name(stem.name + ".safetensors")
    if not weights_path.exists():
        raise RecordError(f"{weights_path} is missing: a run is a .json and a .safetensors side by side.")
    try:
        weights, about = read_safetensors(weights_path)
        if about["name"] != record.name:
            raise RecordError(f"{weights_path} holds {about['name']}, its record {record.name}.")
        task = TaskConfig(**{**about["task"], "class_names": tuple(about["task"]["class_names"])})
        model = models.build(about["model"], task, **about["config"])
        model.load_state_dict(weights)
    except (CheckpointError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise RecordError(f"{weights_path} cannot be loaded: {reason}") from error
    return model.eval(), record
