"""One process a case: memory, threads and caches start clean, and a case that dies takes no other with it.

The child is this module: `python -m benchmarks.children REQUEST`. Both ends speak JSON, one message a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .problems import Size


@dataclass
class Request:
    """What a child is to measure. `device` is "cpu" or "cuda"; `keep_memory`: what it frees stays with it."""

    case: str
    sizes: list[Size]
    rounds: int
    threads: int
    device: str
    keep_memory: bool = False


# How glibc is told not to give memory back: nothing is mapped for itself, and the end of the heap is never cut off.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


@dataclass
class Answer:
    """What came back: rows as dictionaries, what was left out and why, or what went wrong."""

    rows: list[dict[str, Any]]
    skipped: list[str]
    others: float | None = None  # the share of the machine that other programs used meanwhile
    wrong: str | None = None


def ask(request: Request, seconds: float, on_step: Callable[[str], None] = lambda step: None) -> Answer:
    """Let a child measure, for so many seconds at most."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(request.threads), "MKL_NUM_THREADS": str(request.threads)}
    environment |= KEEP_MEMORY if request.keep_memory else {}
    with tempfile.TemporaryFile("w+", encoding="utf-8") as complaints:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.children", json.dumps(asdict(request))],
            stdout=subprocess.PIPE, stderr=complaints, text=True, env=environment, cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert child.stdout is not None
        late = threading.Event()
        alarm = threading.Timer(seconds, lambda: (late.set(), child.kill()))
        alarm.start()
        answer = None
        try:
            for line in child.stdout:
                message = json.loads(line)
                if "step" in message:
                    on_step(message["step"])
                else:
                    answer = Answer(**message)
            child.wait()
        finally:
            alarm.cancel()
            if child.poll() is None:  # Ctrl-C, or an error of ours
                child.kill()
                child.wait()
        if answer is not None:
            return answer
        complaints.seek(0)
        last = (complaints.read().strip().splitlines() or ["it said nothing"])[-1]
    why = f"stopped after {seconds:.0f} s" if late.is_set() else f"ended with code {child.returncode}: {last}"
    return Answer([], [], wrong=why)


def main() -> None:
    """The child's side."""
    out, sys.stdout = sys.stdout, sys.stderr  # what others print must not mix with the messages

    def say(**message: Any) -> None:
        print(json.dumps(message), file=out, flush=True)

    import torch

    from .cases import CASES
    from .measure import measure

    request = Request(**json.loads(sys.argv[1]))
    torch.set_num_threads(request.threads)
    torch.set_flush_denormal(True)
    answer = Answer([], [])
    before = _ticks()
    try:
        rows = measure(
            CASES[request.case], [Size(*size) for size in request.sizes], request.rounds, torch.device(request.device),
            lambda step: say(step=step), answer.skipped.append,
        )  # fmt: skip
        answer.rows = [asdict(row) for row in rows]
    except (ValueError, RuntimeError) as error:
        answer.wrong = str(error)
    after = _ticks()
    if before and after and after[0] > before[0]:
        mine = sum(os.times()[:2]) * os.sysconf("SC_CLK_TCK")
        answer.others = max(0.0, (after[1] - before[1] - mine) / (after[0] - before[0]))
    say(**asdict(answer))


def _ticks() -> tuple[int, int] | None:
    """(ticks of all processors, those that were busy) since the machine started; Linux only."""
    try:
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return sum(numbers), sum(numbers) - numbers[3] - numbers[4]  # all but idle and waiting for a disk


if __name__ == "__main__":
    main()
