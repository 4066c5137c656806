"""Looking inside: record attention weights, gates and kernels of any model while it runs.

The mechanisms pass whatever is worth seeing through an ``nn.Identity``. Normally that does nothing at all; inside
``with record(model) as tape:`` a hook on each of them keeps a detached copy. No number changes either way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["Tape", "record"]


class Tape:
    """What was recorded: tensors under the dotted name of the window they passed.

    ``tape[name]`` is the tensor of the last call, ``tape.all(name)`` the list of all calls, ``tape.names("weights")``
    the names that end in "weights" (all names without an argument). A name that is unique by its ending may be
    shortened to it.
    """

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Keep a detached copy, since a later in-place change must not rewrite what was seen."""
        self._seen.setdefault(name, []).append(value.detach().clone())

    def names(self, ending: str = "") -> list[str]:
        """Names recorded so far, in the order of their first appearance."""
        return [n for n in self._seen if not ending or n == ending or n.endswith("." + ending)]

    def all(self, name: str) -> list[Tensor]:
        """Every tensor that passed under this name, one per call."""
        found = [name] if name in self._seen else self.names(name)
        if len(found) != 1:
            raise KeyError(
                f"{name!r} names {len(found)} recordings; wanted one of: {', '.join(self._seen) or '(nothing yet)'}."
            )
        return self._seen[found[0]]

    def __getitem__(self, name: str) -> Tensor:
        return self.all(name)[-1]

    def __contains__(self, name: str) -> bool:
        return name in self._seen or len(self.names(name)) == 1

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __repr__(self) -> str:
        rows = [f"  {name}: {len(seen)} x {tuple(seen[-1].shape)}" for name, seen in self._seen.items()]
        return "\n".join(["Tape of", *rows]) if rows else "Tape, empty"


@contextmanager
def record(model: nn.Module) -> Iterator[Tape]:
    """Record what passes through the windows of ``model`` during the block.

    Example::

        with record(model) as tape:
            model(x, mask)
        tape["encoder.layers.0.mega.attention.weights"]      # (B, L, L), or (B, chunks, C, C)

    Raises:
        ValueError: if the model has no window to look through.
    """
    windows = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Identity)]
    if not windows:
        raise ValueError(
            f"{type(model).__name__} has nothing to record: wanted a module with nn.Identity windows, as all "
            "mechanisms of this course have."
        )
    tape = Tape()
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: tape.add(name, output))
        for name, module in windows
    ]
    try:
        yield tape
    finally:
        for hook in hooks:
            hook.remove()
