"""Embed, mix, pool, decide: the frame that every model of the course shares; models differ in their blocks only.

A block is a module with ``forward(x, mask)`` on ``(B, L, D)`` and, if it is causal, ``initial_state(batch)`` and
``step(x_t, state)`` on ``(B, D)``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.devices import in_pieces
from .parts import Norm, mean_pool

__all__ = ["Classifier", "Encoder", "Head", "PairClassifier"]


class Encoder(nn.Module):
    """Embedding, blocks and, for pre-norm blocks, one last norm.

    Args:
        embedding: ``(x, mask) -> (hidden (B, L', D), mask (B, L'))``.
        blocks: the layers, in order.
        final_norm: the last norm, or None (post-norm blocks have normalised already).
        dropout: on the embedded sequence.
    """

    def __init__(
        self, embedding: nn.Module, blocks: Iterable[nn.Module], final_norm: Norm | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(blocks)
        self.final_norm = final_norm

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``x (B, L)`` or ``(B, L, C)`` to hidden states ``(B, L', D)``, zero where padded, and their mask (if any)."""
        _check_mask(x, mask)
        h, mask = self.embedding(x, mask)
        if mask is not None and in_pieces(h) and mask.all():
            mask = None  # it hides nothing, as a CPU can see at once: every part is spared a pass or two
        h = self.dropout(h)
        h = _silence(h, mask)
        for layer in self.layers:
            h = layer(h, mask)
        if self.final_norm is not None:
            h = self.final_norm(h, mask)
        return _silence(h, mask), mask

    def initial_state(self, batch: int) -> list[Any]:
        """One state a block, before the first step. Raises ValueError where a block cannot stream."""
        return [_streaming(layer).initial_state(batch) for layer in self.layers]

    def step(self, x_t: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One time step, ``(B,)`` or ``(B, C)`` to ``(B, D)``; equal to the parallel form of a causal stack."""
        if not hasattr(self.embedding, "step"):
            raise ValueError(
                "A patch embedding reads many samples at once and cannot step by one. Build with patch=()."
            )
        h = _streaming(self.embedding).step(x_t)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            h, now = _streaming(layer).step(h, before)
            after.append(now)
        return (h if self.final_norm is None else self.final_norm(h)), after


class Head(nn.Module):
    """From a pooled vector to logits: linear, dropout, GELU, linear without bias (Mega's published head)."""

    def __init__(self, dim: int, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, classes, bias=False)
        nn.init.xavier_uniform_(self.hidden.weight)
        nn.init.zeros_(self.hidden.bias)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, dim) -> (B, classes)``."""
        return self.out(F.gelu(self.dropout(self.hidden(x))))


class Classifier(nn.Module):
    """One sequence, one label: the mean of the encoder's real positions, then the head."""

    def __init__(self, encoder: Encoder, head: Head) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.pooled = nn.Identity()  # a window for `record`

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x (B, L)`` tokens or samples, or ``(B, L, C)``; mask bool ``(B, L)``; returns logits ``(B, classes)``."""
        return self.head(self.pooled(mean_pool(*self.encoder(x, mask))))


class PairClassifier(nn.Module):
    """Two sequences, one label: both through the same encoder (two towers), then the head on ``[second, first]``.

    Mega joins just the two vectors, in this order. SeqBoat's ``nli_head`` adds two more, ``first * second`` and
    ``first - second``, so their published figures for Retrieval come from different heads.
    """

    def __init__(self, encoder: Encoder, head: Head, nli_head: bool = False) -> None:
        super().__init__()
        self.encoder, self.head, self.nli_head = encoder, head, nli_head
        self.pooled = nn.Identity()

    def forward(self, x1: Tensor, x2: Tensor, *, mask1: Tensor | None = None, mask2: Tensor | None = None) -> Tensor:
        """``x1 (B, L1)``, ``x2 (B, L2)`` and their masks; returns logits ``(B, classes)``."""
        first = mean_pool(*self.encoder(x1, mask1))
        second = mean_pool(*self.encoder(x2, mask2))
        features = [second, first, first * second, first - second] if self.nli_head else [second, first]
        return self.head(self.pooled(torch.cat(features, dim=-1)))


def _streaming(module: nn.Module) -> Any:
    """The module, for calls that type checkers do not know: not every ``nn.Module`` has ``step``."""
    return module


def _silence(h: Tensor, mask: Tensor | None) -> Tensor:
    return h if mask is None else h.masked_fill(~mask.unsqueeze(-1), 0)


def _check_mask(x: Tensor, mask: Tensor | None) -> None:
    if x.dim() not in (2, 3) or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length >= 1) or (batch, length, channels); got {tuple(x.shape)}.")
    if mask is None or (mask.dtype == torch.bool and mask.shape == x.shape[:2]):
        return
    mend = ".bool()" if mask.dtype != torch.bool else ""
    mend += ".squeeze(1)" if mask.dim() == 3 and mask.shape[1] == 1 else ""
    hint = f" Pass mask{mend}." if mend else ""
    raise ValueError(
        f"mask must be bool (batch, length) = {tuple(x.shape[:2])}, True where the token is real; "
        f"got {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}.{hint}"
    )
