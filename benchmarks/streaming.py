"""A stream of 100,000 tokens through every causal stack: does its memory stay, does it say what the parallel form says?

    python -m benchmarks.streaming [--tokens 100000] [MODEL ...]

Every model has a process of its own. It steps through the tokens one by one in float64, then reads the same sequence at
once; the last thousand outputs of both are compared. Prints a table and writes `records/streaming.json` beside this
file. A quarter of a minute to two minutes a model on one core: Python's overhead for each step, hardly arithmetic.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.models import build_encoder
from longseq_tutorial.tasks import TaskConfig

TASK = TaskConfig("streaming", "tokens", 2, 100_000, vocabulary=17)
SMALL: dict[str, Any] = dict(dim=32, layers=2, ffn_dim=32, head_dim=32, causal=True)
GATED: dict[str, Any] = {**SMALL, "z_dim": 16, "v_dim": 32, "n": 8}
MODELS: dict[str, dict[str, Any]] = {  # all that are linear in the length; what they keep fills up within 300 tokens
    "mega-chunk": {**GATED, "chunk": 64},
    "seqboat": {key: value for key, value in GATED.items() if key != "ffn_dim"} | {"window": 64},
    "longvq": {**GATED, "codes": 64, "window": 64},
    "fastrpb": {**SMALL, "heads": 2, "qkv_dim": 32, "max_positions": 256},
    "spade": {**SMALL, "heads": 2, "state": 16, "window": 64},
}
EARLY = 1_000  # tokens within which whatever is kept has reached its size
COMPARED = 1_000  # outputs at the end


def numbers(state: Any) -> int:
    """How many numbers lie in the tensors somewhere inside a state."""
    if isinstance(state, Tensor):
        return state.numel()
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return sum(map(numbers, parts))


@torch.inference_mode()
def stream(name: str, tokens: int) -> dict[str, Any]:
    """Step through `tokens` random tokens, and compare: sizes in numbers and bytes, seconds, the largest deviation."""
    torch.manual_seed(0)
    model = build_encoder(name, TASK, **MODELS[name]).double().eval()
    x = torch.randint(1, TASK.vocabulary, (1, tokens))
    state: Any = model.initial_state(1)
    last, largest, seen = [], {"early": 0, "late": 0}, {}
    started = time.process_time()
    for t in range(tokens):
        h, state = model.step(x[:, t], state)
        if t < EARLY:
            largest["early"] = max(largest["early"], numbers(state))
        if t >= tokens - COMPARED:
            largest["late"] = max(largest["late"], numbers(state))
            last.append(h)
        if t + 1 in (EARLY, tokens):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            seen[t + 1] = {"peak": peak, "seconds": time.process_time() - started}
    whole, _ = model(x)
    first, end = seen.get(EARLY, seen[tokens]), seen[tokens]
    return {
        "model": name,
        "tokens": tokens,
        "state_early": largest["early"],
        "state_late": largest["late"],
        "growth_of_peak_memory": end["peak"] - first["peak"],
        "seconds_a_token_early": first["seconds"] / min(EARLY, tokens),
        "seconds_a_token": end["seconds"] / tokens,
        "largest_deviation": float((torch.stack(last, 1) - whole[:, -len(last) :]).abs().max()),
        "largest_output": float(whole.abs().max()),
    }


def main(arguments: list[str] | None = None) -> int:
    """0 when every state stayed as it was and every stream equals the parallel form, else 1."""
    parser = argparse.ArgumentParser(prog="benchmarks.streaming", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"all when none: {', '.join(MODELS)}")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records" / "streaming.json")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"no causal stack {', '.join(sorted(unknown))} here. There are: {', '.join(MODELS)}.")
    if options.tokens < 2:
        parser.error("--tokens must be at least 2.")
    rows = []
    print(f"{'model':12} {'numbers in the state':>24} {'peak grew by':>14} {'a token':>9} {'deviation':>10}")
    for name in options.models or MODELS:
        with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (1,)) as alone:
            row = alone.apply(stream, (name, options.tokens))
        rows.append(row)
        state, grown = f"{row['state_early']:,} -> {row['state_late']:,}", row["growth_of_peak_memory"] / 2**20
        time_and_deviation = f"{row['seconds_a_token'] * 1e6:>6.0f} us {row['largest_deviation']:>10.1e}"
        print(f"{name:12} {state:>24} {grown:>11.2f} MB {time_and_deviation}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    fine = [row["state_late"] <= row["state_early"] and row["largest_deviation"] < 1e-8 for row in rows]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
