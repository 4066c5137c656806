"""Where a number stopped being finite: the first parameter, module output or gradient, by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..tasks import Batch
from .batches import answer

NOTHING = "a second forward pass was finite (dropout differs)"


class NonFiniteError(ArithmeticError):
    """The loss or a gradient is infinite or not a number; the message says at which update and where first."""


def first_nonfinite(model: nn.Module, batches: Iterable[Batch]) -> str:
    """The first thing in `model` that is not finite, in words: a parameter, an input, a module's output, a gradient.

    Runs the forward pass once more, in the mode the model is in, and looks at every output in the order of
    computation. So call it before the optimiser has altered the parameters. Each process looks by itself.
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} {_what(parameter)}"
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and not tensor.isfinite().all():
                    found.append(f"the output of {name or 'the model'} ({type(module).__name__}) {_what(tensor)}")

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), _alone(model):
            for batch in batches:
                for tensor in batch:
                    if not tensor.isfinite().all():
                        return f"the input batch {_what(tensor)}"
                answer(model, batch)
                if found:
                    return found[0]
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name} {_what(parameter.grad)}"
    return NOTHING


def most_telling(finds: list[str]) -> str:
    """What to report of what each process found: a cause before a gradient, which reaches all of them, and a name."""
    rank = min(range(len(finds)), key=lambda i: (finds[i] == NOTHING, finds[i].startswith("the gradient"), i))
    return finds[rank] if len(finds) == 1 else f"{finds[rank]} (process {rank})"


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Let no module wait for other processes, which may have stopped looking earlier, and move no running average."""
    together = [module for module in model.modules() if getattr(module, "synchronised", False)]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for module in together:
        module.synchronised = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in together:
            module.synchronised = True  # type: ignore[assignment]
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _tensors(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _what(tensor: Tensor) -> str:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    kind = "NaN" if tensor.isnan().any() else "infinite"
    return f"has {bad:,} of {tensor.numel():,} numbers {kind}"
