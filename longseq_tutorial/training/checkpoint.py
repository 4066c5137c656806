"""Everything a run needs to go on, in a safetensors file, written so that no crash can leave half of it.

Tensors: `model.<name>` (parameters and buffers), `optimizer.<parameter>.<moment>`, `best.<name>` where the
recipe keeps the best epoch's weights, and `random.<source>`, the states of all random number generators as
bytes. Counters, running metrics and the recipe are JSON in the file's metadata. Nothing is ever unpickled.

No file is larger than `LARGEST`, so that a checkpoint can be mailed, committed or carried where that is asked for. What
is more lies in further files beside it, named after their content: what has not changed is not written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor, nn

from ..tasks.packs import replace_file

NEWEST = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"
PART = "checkpoint.part-{}.safetensors"
LARGEST = 15_000_000  # bytes of a file, unless a single tensor is larger


class CheckpointError(ValueError):
    """A checkpoint cannot be used: broken, or of another run. One line: what is wrong, how to mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically: whoever reads `path` finds the old content or the new, never a mixture.

    about: JSON-able. It becomes a single entry of the file's metadata, because the format keeps several in no
    fixed order, and equal runs should leave equal bytes.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({**about, "sha256": _digest(plain, about)})
    replace_file(path, safetensors_torch.save(plain, {"about": text}))


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of a file that `write_safetensors` wrote.

    Raises `CheckpointError` when the file is truncated, has flipped bits, or was written by something else.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = json.loads(metadata["about"])
        written = about.pop("sha256")
    except (SafetensorError, OSError, RuntimeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt ({error}).") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} was not written by this project: its metadata does not describe it.") from error
    if written != _digest(tensors, about):
        raise CheckpointError(f"{path} is corrupt: its content does not match its checksum.")
    return tensors, about


def save(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Make `tensors` and `state` (JSON-able) the newest checkpoint in `folder`; the one before is kept as well."""
    folder.mkdir(parents=True, exist_ok=True)
    *parts, last = split(tensors)
    names = [PART.format(_digest(part, {})[:16]) for part in parts]
    for name, part in zip(names, parts, strict=True):
        if not (folder / name).exists():
            write_safetensors(folder / name, part, {})
    # At every moment a complete file has one of the two names: a kill between the two steps leaves PREVIOUS.
    if (folder / NEWEST).exists():
        os.replace(folder / NEWEST, folder / PREVIOUS)
    write_safetensors(folder / NEWEST, last, {**state, "parts": names} if names else state)
    _sweep(folder)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The newest checkpoint that can be read: (tensors, state, a line to show or "").

    When the newest is missing or broken the previous one is taken, and the line says so.
    Raises `CheckpointError` when there is none, or none that can be read.
    """
    problems = []
    for name in (NEWEST, PREVIOUS):
        if not (folder / name).exists():
            continue
        try:
            tensors, state = read_safetensors(folder / name)
            for further in state.pop("parts", ()):
                tensors |= read_safetensors(folder / further)[0]
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return tensors, state, f"{problems[0]} Going on from {name} instead." if problems else ""
    if not problems:
        raise CheckpointError(f"there is no checkpoint in {folder}; start without --resume.")
    raise CheckpointError(" ".join(problems) + f" Remove {folder} and start again without --resume.")


def exists(folder: Path) -> bool:
    """Whether `folder` holds a checkpoint, whole or not."""
    return (folder / NEWEST).exists() or (folder / PREVIOUS).exists()


def remove(folder: Path) -> None:
    """Delete the checkpoints in `folder`, and what a killed save may have left."""
    for path in [folder / NEWEST, folder / PREVIOUS, *folder.glob(PART.format("*")), *folder.glob("checkpoint*.tmp")]:
        path.unlink(missing_ok=True)


def split(tensors: Mapping[str, Tensor], largest: int | None = None) -> list[dict[str, Tensor]]:
    """The tensors in groups, in order, none larger than `largest` bytes where that can be; at least one group.

    Where there are several, model, optimizer and best weights do not mix, as they change at different times.
    """
    largest = largest or LARGEST - 200_000  # a file has a header, too
    if sum(tensor.nbytes for tensor in tensors.values()) <= largest:
        return [dict(tensors)]
    groups: list[dict[str, Tensor]] = []
    size, kind = 0, ""
    for name, tensor in tensors.items():
        if size + tensor.nbytes > largest or name.partition(".")[0] != kind:
            groups.append({})
            size, kind = 0, name.partition(".")[0]
        groups[-1][name] = tensor
        size += tensor.nbytes
    return groups


def _sweep(folder: Path) -> None:
    """Delete the parts that no checkpoint refers to any more."""
    used: set[str] = set()
    for name in (NEWEST, PREVIOUS):
        if (folder / name).exists():
            try:
                used |= set(_about(folder / name).get("parts", ()))
            except (SafetensorError, OSError, KeyError, ValueError):
                return  # broken: leave everything where it is
    for path in folder.glob(PART.format("*")):
        if path.name not in used:
            path.unlink()


def _about(path: Path) -> dict[str, Any]:
    """The description in a safetensors file, without its tensors."""
    with safe_open(path, framework="pt", device="cpu") as file:
        about: dict[str, Any] = json.loads(file.metadata()["about"])
    return about


def pack(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Model and optimizer as named tensors. The optimizer must hold all parameters of `model`, in order."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    for i, moments in optimizer.state_dict()["state"].items():
        for moment, tensor in moments.items():
            tensors[f"optimizer.{names[i]}.{moment}"] = torch.as_tensor(tensor)
    # Two names for one storage (tied weights) would be refused by safetensors: each gets its own bytes.
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put what `pack` returned back, in place. Raises `CheckpointError` when it does not fit the model."""
    try:
        model.load_state_dict(part(tensors, "model."))
        state = optimizer.state_dict()
        state["state"] = {}
        for i, (name, _) in enumerate(model.named_parameters()):
            moments = {key: value for key, value in part(tensors, f"optimizer.{name}.").items() if "." not in key}
            if moments:
                state["state"][i] = moments
        optimizer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the checkpoint does not fit this model ({reason}).") from error


def random_states() -> dict[str, Tensor]:
    """The states of torch's, numpy's and Python's generators (and CUDA's), as uint8 tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    as_json = {
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": random.getstate(),
    }
    states = {key: torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8) for key, value in as_json.items()}
    states["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: Mapping[str, Tensor]) -> None:
    """Set all generators back to what `random_states` returned."""
    texts = {key: json.loads(bytes(states[key].tolist()).decode()) for key in ("numpy", "python")}
    name, keys, *rest = texts["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = texts["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> str:
    """SHA-256 over names, types, shapes and bytes: the format itself notices missing bytes, but no flipped bit."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
