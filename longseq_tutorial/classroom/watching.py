"""What a function does on its way, not only what comes out: an exercise may ask for no loop, or for no L x L matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longseq_tutorial.classroom.exercises import Verdict

__all__ = ["Watched", "reject", "watch", "without_a_loop"]


class Watched(TorchDispatchMode):
    """Counts torch's operations while it is entered, and remembers the size of the largest result, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def watch(function: Callable[..., Any], *arguments: Any) -> Watched:
    """Call ``function(*arguments)`` without gradients, and watch."""
    with torch.no_grad(), Watched() as seen:
        function(*arguments)
    return seen


def reject(name: str, but: str, cause: str) -> Verdict:
    """The verdict on a solution whose values are right but whose way is not what was asked for."""
    return Verdict("wrong", f"✗ {name}: the values are right, but {but}\n  likely cause: {cause}")


def without_a_loop(
    verdict: Verdict, name: str, solution: Callable[..., Any], few: tuple[Any, ...], many: tuple[Any, ...], cause: str
) -> Verdict:
    """Reject a right solution whose operations grow from the arguments ``few`` to the longer ones ``many``."""
    if not verdict.ok:
        return verdict
    short, long = (watch(solution, *arguments).operations for arguments in (few, many))
    if long <= 2 * short:
        return verdict
    return reject(name, f"a short input took {short:,} operations and a long one {long:,}.", cause)
