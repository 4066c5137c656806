"""How much to work on at once, which depends on the device, and what torch.compile had better leave alone.

A CPU is fastest on what stays in its cache, a megabyte or so. A GPU has no such cache, but each call to it takes some
microseconds however little there is to do: few large calls, then, as large as the memory bears.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["LARGE", "at_once", "in_pieces", "uncompiled"]

Work = TypeVar("Work", bound=Callable[..., object])

LARGE = 2**26  # numbers: 256 MiB in float32, of which a mechanism holds a few at a time


def in_pieces(x: Tensor) -> bool:
    """Whether to work on small pieces: x is on a CPU, and nobody compiles, who would have to compile every piece."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def at_once(x: Tensor, on_cpu: int) -> int:
    """How many numbers one tensor of a piece of work should have: ``on_cpu``, or ``LARGE`` where few are better."""
    return on_cpu if in_pieces(x) else LARGE


def uncompiled(work: Work) -> Work:
    """``work``, which torch.compile is to call as it is. (Asked for while compiling: it takes a second to load.)"""
    return torch.compiler.disable(work) if torch.compiler.is_compiling() else work
