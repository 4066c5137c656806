"""What is compared: candidates that compute the same thing from the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Size(NamedTuple):
    """How large a problem is: sequences, their length, channels."""

    batch: int
    length: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.length:,} x {self.dim}"


@dataclass
class Candidate:
    """One way to compute it.

    `leaves` are what the gradient is asked for; none for what has no gradient. A peer keeps its numbers in tensors of
    its own, arranged in its own way: then `origin` holds, for each of its leaves, where it comes from, as a function of
    the problem's leaves. Its gradients are carried back along it before they are compared, outside of what is timed.
    """

    run: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    origin: Sequence[Tensor] | None = None

    def gradients(self, y: Tensor, cotangent: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the problem's leaves, `wanted`."""
        own = torch.autograd.grad(y, self.leaves, cotangent, allow_unused=True)
        if self.origin is None:
            return list(own)
        pairs = [(t, g) for t, g in zip(self.origin, own, strict=True) if g is not None]
        return list(
            torch.autograd.grad(
                [t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, retain_graph=True
            )
        )


@dataclass
class Problem:
    """Candidates by name; the first is ours. `leaves` are the inputs and parameters whose gradients count.

    `seen` is applied to each output before outputs are compared. `alike = False` where the candidates are different
    models and only their cost is compared. `parts` are pieces of ours, timed beside it to learn their share.
    """

    candidates: dict[str, Candidate]
    leaves: list[Tensor]
    seen: Callable[[Tensor], Tensor] = lambda y: y
    alike: bool = True
    parts: dict[str, Candidate] = field(default_factory=dict)

    @classmethod
    def of(cls, leaves: Sequence[Tensor], runs: dict[str, Callable[[], Tensor]], **more: Any) -> Problem:
        """A problem whose candidates all use `leaves` as they are."""
        return cls({name: Candidate(run, leaves) for name, run in runs.items()}, list(leaves), **more)

    def beside(self, *peers: dict[str, Candidate]) -> Problem:
        """The same with more candidates; each of `peers` is empty where that peer cannot run."""
        for found in peers:
            self.candidates |= found
        return self


def tensors(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers that want gradients; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def seeded(make: Callable[[], nn.Module]) -> Any:
    """A module with the same weights in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def copied(
    module: nn.Module,
    inputs: Sequence[Tensor],
    weights: dict[str, Tensor],
    run: Callable[..., Tensor],
    forward_only: bool = False,
) -> Candidate:
    """A peer's module with our numbers put into it.

    Args:
        module: the peer's.
        inputs: our inputs, arranged as the peer wants them.
        weights: its parameters by name, each as a function of ours.
        run: called with copies of the inputs.
    """
    own = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in inputs]
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            if named[name].numel() != value.numel():
                raise ValueError(f"{name} of the peer is {tuple(named[name].shape)}, ours {tuple(value.shape)}.")
            named[name].copy_(value.reshape(named[name].shape))
    module.to(own[0].device)
    if forward_only:
        return Candidate(lambda: run(*own), [])
    shaped = [value.reshape(named[name].shape) for name, value in weights.items()]
    return Candidate(lambda: run(*own), [*own, *(named[name] for name in weights)], [*inputs, *shaped])
