"""How a case is measured.

Noise on a machine that others use is larger than most differences, so:

* all candidates run in one process, in turn, round after round, and ratios are taken within a round;
* the figure is processor time on one thread, which does not count what other programs do meanwhile (with more threads,
  and on a GPU, it is the wall clock's);
* the results and gradients of all candidates are compared first: the speed of a wrong answer is void;
* memory is what PyTorch's allocator held at the worst moment above the start, the same in every run.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.classroom import growth_exponent, peak_memory

from .cases import Case
from .limits import Limits, clock, synchronize
from .problems import Candidate, Problem, Size

SHORTEST = 0.02  # seconds: shorter calls are repeated until so much has passed
PATIENCE = 4.0  # seconds a call may take before its rounds are cut to one
LONGEST = 30.0  # seconds: what would take longer is not begun
LONG = 4096  # steps: from here on growth is judged
ROOM = 0.4  # of the machine's memory: what would take more is not begun

Report = Callable[[str], None]


@dataclass
class Row:
    """One candidate at one size. Seconds: one number a round; bytes: above what was held before."""

    candidate: str
    size: Size
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)  # forward and backward; empty where there is no gradient
    forward_bytes: int = 0
    both_bytes: int = 0
    error: float = 0.0  # against ours: the largest of output and gradients
    largest: int = 0  # numbers in the largest tensor that was made on the way
    floor: float | None = None  # seconds that forward and backward cannot fall below on this machine
    forward_floor: float | None = None
    limits: dict[str, float] = field(default_factory=dict)  # the machine's rates in the same run
    part: bool = False  # a piece of ours, timed to learn its share

    def __post_init__(self) -> None:
        self.size = Size(*self.size)  # JSON knows lists only

    @property
    def seconds(self) -> float:
        """Median time of forward and backward, or of forward where that is all there is."""
        return statistics.median(self.both or self.forward)

    @property
    def bytes(self) -> int:
        return self.both_bytes if self.both else self.forward_bytes

    @property
    def above_floor(self) -> float | None:
        """How many times longer than it must: forward and backward."""
        return self.seconds / self.floor if self.floor else None

    @property
    def forward_above_floor(self) -> float | None:
        return statistics.median(self.forward) / self.forward_floor if self.forward_floor else None


def measure(
    case: Case,
    sizes: list[Size],
    rounds: int,
    device: torch.device,
    on_step: Report = lambda step: None,
    on_skip: Report = lambda reason: None,
) -> list[Row]:
    """All rows of one case, from short to long. `on_step` is told what is measured, `on_skip` what is not and why.

    Raises `ValueError` when a candidate does not compute what ours does.
    """
    limits = Limits(device) if case.work is not None else None
    rows: list[Row] = []
    for size in sorted(sizes, key=lambda size: size.length):
        if case.longest is not None and size.length > case.longest:
            continue
        on_step(f"{size}: building")
        problem = case.build(size, device)
        for name in [name for name in problem.candidates if name != "ours"]:
            reason = too_much([row for row in rows if row.candidate == name], size)
            if reason:
                on_skip(f"{name} at {size} is left out: {reason}")
                del problem.candidates[name]
        rows += _measure_one(problem, case, size, rounds, device, limits, on_step)
    return rows


def _measure_one(
    problem: Problem, case: Case, size: Size, rounds: int, device: torch.device, limits: Limits | None, on_step: Report
) -> list[Row]:
    on_step(f"{size}: comparing results")
    errors = compare(problem, case.agree)
    here = {name: Row(name, size, error=errors[name]) for name in problem.candidates}
    here |= {name: Row(name, size, part=True) for name in problem.parts}
    runs = {name: calls(candidate) for name, candidate in (problem.candidates | problem.parts).items()}
    for turn in range(rounds):
        for name, row in here.items():
            if turn and (row.both or row.forward)[0] > PATIENCE:
                continue
            on_step(f"{size}: round {turn + 1} of {rounds}, {name}")
            forward, both = runs[name]
            row.forward.append(seconds_of(forward, device))
            if both is not None:
                row.both.append(seconds_of(both, device))
    for name, row in here.items():
        on_step(f"{size}: memory, {name}")
        forward, both = runs[name]
        row.forward_bytes = peak_memory(forward, device=device)
        if both is not None:
            row.both_bytes = peak_memory(both, device=device)
    ours = here["ours"]
    ours.largest = largest_tensor(runs["ours"][1] or runs["ours"][0])
    if limits is not None and case.work is not None:
        on_step(f"{size}: the limits of this machine")
        forward_work, both_work = case.work(size)
        ours.forward_floor, ours.floor = forward_work.floor(limits), both_work.floor(limits)
        ours.limits = limits.rates()
    return list(here.values())


def too_much(earlier: list[Row], size: Size) -> str | None:
    """Why a candidate should not run at this size, judged by how it grew so far; at first as if it were quadratic."""
    if not earlier:
        return None
    last, before = earlier[-1], earlier[-2] if len(earlier) > 1 else None
    if last.size.length >= size.length:
        return None

    def ahead(value: float, older: float | None) -> float:
        factor = size.length / last.size.length
        if before is None or not older:
            return value * factor**2
        step = last.size.length / before.size.length
        return float(value * max(value / older, 1.0) ** (_log(factor) / _log(step)))

    seconds = ahead(last.seconds, before and before.seconds)
    held = ahead(last.bytes, before and before.bytes)
    if seconds > LONGEST:
        return f"it would take about {seconds:.0f} s a call"
    if held > ROOM * memory_of_machine():
        return f"it would take about {held / 1e9:.0f} GB"
    return None


def _log(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).log())


def memory_of_machine() -> float:
    """Bytes; the GPU's where there is one. Where nobody tells: 8 GB."""
    if torch.cuda.is_available():
        return float(torch.cuda.get_device_properties(0).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8e9


# ---- are they right? -----------------------------------------------------------------------------------------------


def compare(problem: Problem, agree: float) -> dict[str, float]:
    """Each candidate's largest error against ours, relative to the largest number of a result; refuses a wrong one.

    What has no gradient is compared by its output alone; different models only by whether they give numbers.
    """
    truth: list[Tensor] = []
    errors = {}
    for name, candidate in problem.candidates.items():
        y = candidate.run()
        found = [problem.seen(y).detach()]
        if candidate.leaves:
            gradients = candidate.gradients(y, cotangent(y), problem.leaves)
            found += [torch.zeros(()) if g is None else g for g in gradients]
        if not all(bool(t.isfinite().all()) for t in found):
            raise ValueError(f"{name} gives numbers that are not finite. No speed is stated.")
        if not problem.alike:
            errors[name] = 0.0
            continue
        truth = truth or found
        pairs = list(zip(found, truth, strict=bool(candidate.leaves) or not problem.leaves))
        errors[name] = max(float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30) for a, b in pairs)
        if not errors[name] <= agree:
            raise ValueError(
                f"{name} does not compute what ours does: outputs or gradients differ by {errors[name]:.1e} of the "
                f"largest number; wanted at most {agree:.0e}. No speed is stated."
            )
    return errors


def cotangent(y: Tensor) -> Tensor:
    """What the backward pass starts from: not constant, so that no gradient vanishes by symmetry. Laid out like y."""
    return torch.empty_like(y).copy_(torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape))


class Largest(TorchDispatchMode):
    """Watches every operation and remembers the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, tuple | list) else (made,):
            if isinstance(t, Tensor):  # what lies in memory: a view repeats or hides numbers
                self.numbers = max(self.numbers, t.untyped_storage().nbytes() // t.element_size())
        return made


def largest_tensor(run: Callable[[], Any]) -> int:
    """How many numbers the largest tensor holds that `run` makes. What a fused call hides inside does not count."""
    with Largest() as watcher:
        run()
    return watcher.numbers


# ---- seconds -------------------------------------------------------------------------------------------------------


def calls(candidate: Candidate) -> tuple[Callable[[], Any], Callable[[], Any] | None]:
    """What is timed: forward alone, and with backward, which starts from the same numbers in every call."""

    def forward() -> Tensor:
        with torch.no_grad():
            return candidate.run()

    if not candidate.leaves:
        return forward, None
    start = cotangent(forward())

    def both() -> Any:
        return torch.autograd.grad(candidate.run(), candidate.leaves, start, allow_unused=True)

    return forward, both


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call: the fastest of as many as fit into `SHORTEST`, at least one after a first call."""
    now = clock(device)
    best, spent, count = float("inf"), 0.0, 0
    while count < 2 or spent < SHORTEST:
        synchronize(device)
        start = now()
        run()
        synchronize(device)
        seconds = now() - start
        if seconds > PATIENCE / 4:
            return seconds
        best, spent, count = min(best, seconds), spent + seconds, count + 1
    return max(best, 1e-7)


# ---- what follows from the rows ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ratio:
    """A peer's time over ours, round by round."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f} to {self.high:.2f}]"


def ratio(peer: Row, ours: Row) -> Ratio:
    """Of forward and backward; of forward alone where one of the two has no backward."""
    pairs = (peer.both, ours.both) if peer.both and ours.both else (peer.forward, ours.forward)
    each = [a / b for a, b in zip(*pairs, strict=False)]  # a slow peer has fewer rounds
    return Ratio(statistics.median(each), min(each), max(each))


def ratios(rows: list[Row]) -> Iterator[tuple[Row, Ratio]]:
    """Every peer's row with its ratio to ours at the same size."""
    ours = {row.size: row for row in rows if row.candidate == "ours"}
    for row in rows:
        if row.candidate != "ours":
            yield row, ratio(row, ours[row.size])


def growth(rows: list[Row]) -> dict[str, dict[str, float]]:
    """candidate -> fitted exponents of time and memory, forward + backward; three lengths at least.

    Over the lengths from `LONG` on if there are three of them: below, the fixed costs still show.
    """
    found = {}
    for name in dict.fromkeys(row.candidate for row in rows):
        mine = [row for row in rows if row.candidate == name]
        long = [row for row in mine if row.size.length >= LONG]
        mine = long if len(long) >= 3 else mine
        if len(mine) >= 3:
            lengths = [row.size.length for row in mine]
            found[name] = {
                "time": growth_exponent(lengths, [row.seconds for row in mine]).exponent,
                "memory": growth_exponent(lengths, [max(row.bytes, 1) for row in mine]).exponent,
            }
    return found
