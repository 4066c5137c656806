"""Measuring what a function costs, and how that cost grows with the length.

Time is the median of several runs, or, where other programs share the machine, the processor time of the fastest
(`quickest`). Memory is what PyTorch's allocator held at the worst moment above
what it held before: on a CPU from the profiler's record of every allocation and release (temporaries
inside an operation count, the inputs do not), on a GPU from `torch.cuda.max_memory_allocated`. The
memory of a function on a CPU is therefore the same in every run; the time is not.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Cost", "Growth", "growth_exponent", "peak_memory", "quickest", "time_and_memory"]


class Cost(NamedTuple):
    """What one call costs: `seconds` (median) and `bytes` (peak above the start)."""

    seconds: float
    bytes: int


class Growth(NamedTuple):
    """`exponent` p of a cost that grows like length**p, and the standard `error` of the fit."""

    exponent: float
    error: float

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def time_and_memory(
    fn: Callable[[], Any], *, repeats: int = 5, warmup: int = 1, device: str | torch.device = "cpu"
) -> Cost:
    """Measure `fn()`: median seconds of `repeats` calls, and the peak memory of one more call.

    Args:
        fn: the call to measure, without arguments; wrap yours: `lambda: attend(q, k, v)`.
        repeats: how many timed calls.
        warmup: calls before the first timed one (threads start, caches fill, kernels compile).
        device: where `fn` computes, "cpu" or a CUDA device.

    Raises:
        ValueError: `repeats` below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"time_and_memory wants repeats >= 1 and warmup >= 0; got repeats={repeats}, warmup={warmup}.")
    device = torch.device(device)
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        _synchronize(device)
        start = time.perf_counter()
        fn()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Cost(statistics.median(seconds), peak_memory(fn, device=device))


def quickest(fn: Callable[[], Any], *, patience: float = 0.1) -> float:
    """Return the processor seconds of the fastest of at least two calls of `fn()`, on a CPU.

    The processor's own clock does not count what other programs do meanwhile, and noise only ever adds: the fastest
    call is the cleanest. Use one thread (`torch.set_num_threads(1)`), since the clock adds up all of them.

    Args:
        fn: the call to measure, without arguments.
        patience: short calls are repeated until so many seconds are spent.
    """
    # Where that clock ticks too coarsely (Windows: 16 ms), the wall clock must do.
    fine = time.get_clock_info("process_time").resolution < 1e-5
    clock = time.process_time if fine else time.perf_counter
    seconds: list[float] = []
    while len(seconds) < 2 or sum(seconds) < patience:
        start = clock()
        fn()
        seconds.append(max(clock() - start, 1e-7))
    return min(seconds)


def peak_memory(fn: Callable[[], Any], *, device: str | torch.device = "cpu") -> int:
    """Return the most bytes that one call of `fn()` holds at once in PyTorch's allocator.

    The result counts as long as `fn` holds it; what existed before does not. Memory that NumPy or a
    library takes for itself is not seen.
    """
    device = torch.device(device)
    return _cuda_peak(fn, device) if device.type == "cuda" else _cpu_peak(fn)


def growth_exponent(lengths: Sequence[float], values: Sequence[float]) -> Growth:
    """Fit values = c · length**p and return p with its standard error.

    A straight line is fitted through log(value) against log(length) by least squares; its slope is
    the exponent: 2 for a quadratic cost, 1 for a linear one.

    Args:
        lengths: at least three different positive numbers.
        values: as many positive numbers: seconds, bytes, ...

    Raises:
        ValueError: fewer than three points, different counts, or a number that is not positive.
    """
    x, y = np.asarray(lengths, dtype=float), np.asarray(values, dtype=float)
    if x.ndim != 1 or x.shape != y.shape or len(np.unique(x)) < 3:
        raise ValueError(
            "growth_exponent wants at least three different lengths and one value for each; "
            f"got lengths {x.shape} and values {y.shape}."
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError(
            "growth_exponent wants positive, finite lengths and values (it takes logarithms); "
            f"got lengths {x.tolist()} and values {y.tolist()}."
        )
    x, y = np.log(x), np.log(y)
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / spread
    residual = y - y.mean() - slope * (x - x.mean())
    error = np.sqrt((residual**2).sum() / (len(x) - 2) / spread)
    return Growth(float(slope), float(error))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cuda_peak(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    fn()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(fn: Callable[[], Any]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own log would land in the notebook
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profiler:
        fn()
    recorded = profiler.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in recorded if event.name() == "[memory]"]
    held = np.cumsum([nbytes for _, nbytes in sorted(changes, key=lambda change: change[0])])
    return max(0, int(held.max())) if len(held) else 0
