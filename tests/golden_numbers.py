"""Reading the authors' numbers (tests/golden) in our conventions."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # where the authors' numbers have to come out


def load(name: str) -> dict[str, np.ndarray]:
    """All arrays of one file."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def names(start: str) -> list[str]:
    """The files that begin with ``start``."""
    return sorted(path.stem for path in GOLDEN.glob(f"{start}*.npz"))


def batch_first(array: np.ndarray) -> Tensor:
    """Time-first ``(L, B, D)`` to a contiguous ``(B, L, D)`` tensor of its own."""
    return torch.from_numpy(np.ascontiguousarray(np.swapaxes(array, 0, 1)))


def state_dict(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters and the batch-norm statistics before the call, under the authors' names."""
    return {
        key.split(".", 1)[1]: value
        for key, value in arrays.items()
        if key.startswith(("param.", "buffer.", "buffer_before."))
    }


def layer_options(name: str) -> dict[str, Any]:
    """The keywords of ``official.mega_layer``, which the files carry in their names."""
    chunk = re.search(r"chunk(\d+)", name)
    options: dict[str, Any] = {
        "attention": next(f for f in ("softmax", "laplace", "relu2") if f in name),
        "norm": next(n for n in ("layernorm", "batchnorm", "scalenorm", "rmsnorm") if n in name),
        "prenorm": "prenorm" in name,
        "bidirectional": "causal" not in name,
        "bias": "rotary" if "rotary" in name else "simple",
        "chunk": int(chunk[1]) if chunk else None,
    }
    if name == "mega_layer_laplace_chunk4_batchnorm_prenorm_bi_eval":
        options["truncation"] = 6
    if name == "mega_block_laplace_batchnorm_prenorm_eval":
        options["chunk"] = 4
    return options


def seqboat_options(name: str) -> dict[str, Any]:
    """The keywords of ``official.seqboat_layer``, likewise."""
    return {
        "attention": next(f for f in ("softmax", "laplace", "relu2") if f in name),
        "window": None if "fullattention" in name else 4,
        "bias": next((b for b in ("local", "rotary") if b in name), "global"),
        "norm": next((n for n in ("batchnorm", "scalenorm") if n in name), "layernorm"),
        "prenorm": "postnorm" not in name,
        "bidirectional": "causal" not in name,
        "truncation": 8 if name.endswith("train") else None,
    }


def tolerance(name: str) -> float:
    """1e-9; the authors' rotary tables are single precision."""
    return 1e-6 if "rotary" in name else 1e-9
