"""The machine under a run: device, reproducibility, signals, and what a record says of it."""

from __future__ import annotations

import datetime
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

PACKAGES = ("torch", "numpy", "accelerate", "safetensors")


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the packages that decide the numbers."""
    from .. import __version__

    found = {"python": platform.python_version(), "longseq_tutorial": __version__}
    return found | {name: metadata.version(name) for name in PACKAGES}


def commit() -> tuple[str, bool]:
    """(the git commit this package is at, whether tracked files differ from it); ("unknown", False) without git."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, timeout=20)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy may lie inside somebody else's repository
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return "unknown", False


def device_name(device: torch.device) -> str:
    """The device in words: a GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Most memory this process has held so far, in bytes: resident ("rss"), and on the GPU ("cuda")."""
    peak = {}
    try:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # kilobytes everywhere but on macOS
        peak["rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows has no such call
        peak["rss"] = 0
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def utc_now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def make_accelerator(precision: str, cpu: bool) -> Accelerator:
    """Hugging Face accelerate for this run: a CUDA device where there is one, else the CPU; float32 or bf16.

    Apple's GPU is left alone: not every complex operation of ours exists there.
    """
    AcceleratorState._reset_state()  # a process keeps one precision for ever otherwise; a notebook trains twice
    mixed = {"float32": "no", "bf16": "bf16"}[precision]
    return Accelerator(cpu=cpu or not torch.cuda.is_available(), mixed_precision=mixed)


def leave_group() -> None:
    """Take leave of the other processes, if there are any. Whoever just ends is now and then killed by his threads."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


LENGTHS = 64  # as many lengths of a batch may be compiled; torch would give up after 8


def compiled(model: nn.Module) -> Any:
    """What computes the same as `model`, on its parameters, by code that torch.compile makes for each shape."""
    import torch._dynamo  # takes seconds, so not at the top

    torch._dynamo.reset()  # what another run of this process compiled is not counted here
    torch._dynamo.config.recompile_limit = LENGTHS
    return torch.compile(model, dynamic=False)


@contextmanager
def compiler_errors(kind: type[Exception]) -> Iterator[None]:
    """Say in one line, as a `kind`, that torch.compile failed: mostly for want of a C++ compiler."""
    try:
        yield
    except RuntimeError as error:
        if not any(base.__name__ == "TorchDynamoException" for base in type(error).__mro__):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        reason = lines[0] if lines else type(error).__name__
        mend = "Set compile=false (--set compile=false), or install what it misses."
        raise kind(f"torch.compile failed: {reason.rstrip('.')[:300]}. {mend}") from error


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """On a CPU the same seed gives the same bits, and numbers too small to matter cost no time.

    Without this, the gradient of an indexed tensor is added up by several threads in no fixed order.
    Denormal numbers (below 1e-38, as EMA decays soon are) are flushed to zero: the CPU is many times slower on them.
    """
    torch.set_flush_denormal(True)  # where the CPU has it; threads started later inherit it
    debug: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), debug.fill_uninitialized_memory
    torch.use_deterministic_algorithms(device.type == "cpu", warn_only=True)
    debug.fill_uninitialized_memory = False  # a debugging aid that costs a pass over memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        debug.fill_uninitialized_memory = before[1]


class Interrupt:
    """Turns Ctrl-C (and a polite kill) into a flag, so that the loop stops between two updates and can save.

    A second Ctrl-C raises `KeyboardInterrupt` at once.
    """

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # signals reach no other thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True
        os.write(2, b"\nstopping after this update; once more to stop at once\n")  # print is not safe in here
