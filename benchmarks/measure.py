"""How a case is measured.

Noise on a machine that others use is larger than most differences, so:

* all candidates run in one process, in turn, round after round, and ratios are taken within a round;
* the figure is processor time on one thread, which does not count what other programs do meanwhile;
* the results and gradients of all candidates are compared first: the speed of a wrong answer is void;
* memory is what PyTorch's allocator held at the worst moment above the start, the same in every run.

On a GPU the time is the wall clock's between two synchronisations.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom import growth_exponent, peak_memory

from .cases import Case, Problem

AGREE = 1e-4  # largest error allowed, relative to the largest number of the result; all is float32
SHORTEST = 0.02  # seconds: shorter calls are repeated until so much has passed
PATIENCE = 4.0  # seconds a call may take before its rounds are cut to one


@dataclass
class Row:
    """One candidate at one length. Seconds: one number a round; bytes: above what was held before."""

    candidate: str
    length: int
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)  # forward and backward
    forward_bytes: int = 0
    both_bytes: int = 0
    error: float = 0.0  # against ours, at the shortest length: the largest of output and gradients

    @property
    def seconds(self) -> float:
        """Median time of forward and backward."""
        return statistics.median(self.both)


def measure(
    case: Case, lengths: list[int], rounds: int, device: torch.device, on_step: Callable[[str], None] = lambda s: None
) -> list[Row]:
    """All rows of one case. `on_step` is told what is being measured.

    Raises `ValueError` when a candidate does not compute what ours does.
    """
    rows: list[Row] = []
    errors: dict[str, float] = {}
    for length in sorted(lengths):
        if case.longest is not None and length > case.longest:
            continue
        problem = case.build(length, device)
        if not errors:
            errors = compare(problem)
        here = {name: Row(name, length, error=errors.get(name, 0.0)) for name in problem.candidates}
        for turn in range(rounds):
            for name, row in here.items():
                if turn and row.both[0] > PATIENCE:
                    continue
                on_step(f"L = {length:,}, round {turn + 1} of {rounds}, {name}")
                row.forward.append(seconds_of(forward_only(problem, name), device))
                row.both.append(seconds_of(forward_and_backward(problem, name), device))
        for name, row in here.items():
            on_step(f"L = {length:,}, memory, {name}")
            row.forward_bytes = peak_memory(forward_only(problem, name), device=device)
            row.both_bytes = peak_memory(forward_and_backward(problem, name), device=device)
        rows += here.values()
    return rows


def compare(problem: Problem) -> dict[str, float]:
    """Each candidate's largest error against the first one, relative to the largest number; refuses a wrong one."""
    truth: list[Tensor] = []
    errors = {}
    for name, candidate in problem.candidates.items():
        y = candidate()
        found = [y, *torch.autograd.grad(y, problem.leaves, cotangent(y), allow_unused=True)]
        found = [torch.zeros(()) if t is None else t for t in found]
        truth = truth or found
        scale = [max(float(t.detach().abs().max()), 1e-30) for t in truth]
        errors[name] = max(float((a - b).abs().max()) / s for a, b, s in zip(found, truth, scale, strict=True))
        if not errors[name] <= AGREE:
            raise ValueError(
                f"{name} does not compute what ours does: outputs or gradients differ by {errors[name]:.1e} of the "
                f"largest number; wanted at most {AGREE:.0e}. No speed is stated."
            )
    return errors


def cotangent(y: Tensor) -> Tensor:
    """What the backward pass starts from: not constant, so that no gradient vanishes by symmetry."""
    return torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view_as(y)


def forward_only(problem: Problem, name: str) -> Callable[[], Any]:
    candidate = problem.candidates[name]

    def run() -> Tensor:
        with torch.no_grad():
            return candidate()

    return run


def forward_and_backward(problem: Problem, name: str) -> Callable[[], Any]:
    candidate = problem.candidates[name]

    def run() -> Any:
        y = candidate()
        return torch.autograd.grad(y, problem.leaves, cotangent(y), allow_unused=True)

    return run


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: the fastest of as many as fit into `SHORTEST`, at least one after a first call."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    best, spent, calls = float("inf"), 0.0, 0
    while calls < 2 or spent < SHORTEST:
        synchronize(device)
        start = clock()
        run()
        synchronize(device)
        now = clock() - start
        if now > PATIENCE:
            return now
        best, spent, calls = min(best, now), spent + now, calls + 1
    return max(best, 1e-7)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(rows: list[Row]) -> Iterator[tuple[str, int, float, float, float]]:
    """(peer, length, median, smallest, largest of peer's time over ours, forward + backward), round by round."""
    ours = {row.length: row for row in rows if row.candidate == "ours"}
    for row in rows:
        if row.candidate != "ours":
            each = [peer / mine for peer, mine in zip(row.both, ours[row.length].both, strict=False)]
            yield row.candidate, row.length, statistics.median(each), min(each), max(each)


def growth(rows: list[Row]) -> dict[str, dict[str, float]]:
    """candidate -> fitted exponents of time and memory, forward + backward, over all its lengths (three at least)."""
    found = {}
    for name in dict.fromkeys(row.candidate for row in rows):
        mine = [row for row in rows if row.candidate == name]
        if len(mine) >= 3:
            lengths = [row.length for row in mine]
            found[name] = {
                "time": growth_exponent(lengths, [row.seconds for row in mine]).exponent,
                "memory": growth_exponent(lengths, [row.both_bytes for row in mine]).exponent,
            }
    return found
