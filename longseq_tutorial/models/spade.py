"""SPADE: a state space model at the bottom, which hears everything, and cheap local attention in every layer.

Written after the published code of Zuo et al., "Efficient Long Sequence Modeling via State Space Augmented
Transformer", 2022::

    first layer      x ── norm ──┬── S4 ──────────────── norm ──┐
                                 │                              ├── join ──(+ x)── feed-forward ── y
                                 └── local attention ─── norm ──┘
    other layers     x ── norm ───── local attention ───────────────(+ x)── feed-forward ── y

One global layer is enough: once every token carries a trace of the whole sequence, nearby attention passes it on. The
paper's settings for the Long Range Arena were not at hand; of the settings here only the structure is published.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.chunking import BucketedBias, chunk_attention, chunk_step, window_attention, window_step
from ..mechanisms.fft import long_convolution
from ..mechanisms.gated_attention import attend
from ..mechanisms.s4 import S4
from .configs import SpadeConfig

__all__ = ["FixedConvolution", "LocalAttention", "SpadeDecoder", "SpadeLayer", "spade_layers"]


class FixedConvolution(nn.Module):
    """A global branch whose kernel is given, and learns nothing: ``y = kernel * u + skip * u``, causal.

    Args:
        kernel: ``(D, K)``; longer sequences are refused, since what the kernel does later is not known.
        skip: ``(D,)``.
    """

    kernel: Tensor
    skip: Tensor

    def __init__(self, kernel: Tensor, skip: Tensor) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel, persistent=False)
        self.register_buffer("skip", skip, persistent=False)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D) -> (B, L, D)``; where ``mask (B, L)`` is False it hears silence."""
        if u.shape[1] > self.kernel.shape[1]:
            raise ValueError(f"This kernel has {self.kernel.shape[1]} lags; got a sequence of {u.shape[1]} steps.")
        heard = u if mask is None else u.masked_fill(~mask.unsqueeze(-1), 0)
        return long_convolution(heard, self.kernel) + self.skip * u


class LocalAttention(nn.Module):
    """Multi-head attention in a sliding window or in chunks: ``(B, L, D) -> (B, L, D)``; projections have no bias.

    ``bias`` gives the relative bias ``(H, 2w + 1)`` for a window w. All layers of a stack share that of the first, so
    here it is only referred to: registered twice, it would be saved twice.
    """

    def __init__(self, config: SpadeConfig, bias: Callable[[int], Tensor]) -> None:
        super().__init__()
        c = config
        self.heads, self.local, self.window, self.causal = c.heads, c.local, c.window, c.causal
        self.q, self.k, self.v, self.o = (nn.Linear(c.dim, c.dim, bias=False) for _ in range(4))
        for linear, gain in ((self.q, 0.5**0.5), (self.k, 0.5**0.5), (self.v, 0.5**0.5), (self.o, 1.0)):
            nn.init.xavier_uniform_(linear.weight, gain)
        self.dropout = nn.Dropout(c.attention_dropout)
        self.weights = nn.Identity()  # a window for `record`
        self._bias = (bias,)  # in a tuple: not registered

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)``, mask bool ``(B, L)``; returns ``(B, L, D)``."""
        q, k, v = (self._split(linear(x)) for linear in (self.q, self.k, self.v))  # (B, H, L, D/H)
        if self.local == "window":
            local = partial(window_attention, q, k, v, self.window, bias=self._table(self.window))
        else:
            square = self._square(min(self.window, x.shape[1])).unsqueeze(1)  # (H, 1, C, C): the same in every chunk
            local = partial(chunk_attention, q, k, v, self.window, bias=square)
        local = partial(local, mask=mask, causal=self.causal)
        if self.weights._forward_hooks:  # somebody is looking: the fused call hides its weights, so show them beside it
            with torch.no_grad():
                local(attend=attend, on_weights=self.weights)
        dropped = {"attend": attend, "on_weights": self.dropout} if self.training and self.dropout.p else {}
        return self.o(local(**dropped).transpose(1, 2).flatten(2))

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """None: nothing is remembered before the first step; later at most ``window`` keys and values."""
        if not self.causal:
            raise ValueError("Attention that looks ahead cannot stream. Build it with causal=True.")
        return None

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One time step ``(B, D)``, equal to the parallel form."""
        q, k, v = (self._split(linear(x_t).unsqueeze(1)).squeeze(2) for linear in (self.q, self.k, self.v))
        if self.local == "window":
            y, state = window_step(q, k, v, state, self.window, self._table(self.window))
        else:
            y, state = chunk_step(q, k, v, state, self.window, self._square(self.window))
        return self.o(y.flatten(1)), state

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _table(self, window: int) -> Tensor:
        """The bias of offsets key minus query, -window .. window: ``(H, 2 * window + 1)``."""
        return self._bias[0](window)

    def _square(self, block: int) -> Tensor:
        """The bias within a chunk, ``(H, C, C)``: neighbouring rows are neighbouring stretches of the table."""
        return self._table(block - 1).unfold(-1, block, 1).flip(-2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, local={self.local!r}, window={self.window}, causal={self.causal}"


class SpadeLayer(nn.Module):
    """One layer: local attention, in the first layers joined with a global branch, then a ReLU feed-forward layer.

    Args:
        config: see :class:`~longseq_tutorial.models.configs.SpadeConfig`.
        bias: the relative bias that all layers share.
        global_branch: ``(x, mask) -> (B, L, D)``, S4 in the published model; None for a layer without.
    """

    def __init__(
        self, config: SpadeConfig, bias: Callable[[int], Tensor], global_branch: nn.Module | None = None
    ) -> None:
        super().__init__()
        c = config
        self.mode, self.s4_weight = c.mode, c.s4_weight
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.attention = LocalAttention(c, bias)
        self.global_branch = global_branch
        if global_branch is not None and c.mode != "stack":
            self.norm_global, self.norm_local = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        if global_branch is not None and c.mode == "concat":
            self.aggregate = nn.Linear(2 * c.dim, c.dim)
        self.fc1, self.fc2 = nn.Linear(c.dim, c.ffn_dim), nn.Linear(c.ffn_dim, c.dim)
        self.dropout, self.hidden_dropout = nn.Dropout(c.dropout), nn.Dropout(c.hidden_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)``, mask bool ``(B, L)``; returns ``(B, L, D)``."""
        normed = self.norm1(x)
        if self.global_branch is None:
            found = self.attention(normed, mask)
        elif self.mode == "stack":
            found = self.attention(self.global_branch(normed, mask), mask)
        else:
            found = self._join(self.global_branch(normed, mask), self.attention(normed, mask))
        return self._feed_forward(x + self.dropout(found))

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The S4 state, of fixed size, and at most a window of keys and values."""
        branch: Any = self.global_branch
        return {
            "global": None if branch is None else branch.initial_state(batch),
            "attention": self.attention.initial_state(batch),
        }

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``, equal to the parallel form."""
        branch: Any = self.global_branch
        far, cache, normed = state["global"], state["attention"], self.norm1(x_t)
        if branch is None:
            found, cache = self.attention.step(normed, cache)
        else:
            heard, far = branch.step(normed, far)
            found, cache = self.attention.step(heard if self.mode == "stack" else normed, cache)
            if self.mode != "stack":
                found = self._join(heard, found)
        return self._feed_forward(x_t + self.dropout(found)), {"global": far, "attention": cache}

    def _join(self, heard: Tensor, found: Tensor) -> Tensor:
        """S4's output and the attention's, normed first: their sizes have nothing to do with each other."""
        heard, found = self.norm_global(heard), self.norm_local(found)
        if self.mode == "add":
            return self.s4_weight * heard + (1 - self.s4_weight) * found
        return self.aggregate(torch.cat([heard, found], dim=-1))

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.fc2(self.hidden_dropout(F.relu(self.fc1(self.norm2(x))))))


class SpadeDecoder(nn.Module):
    """Layers one after the other, without embedding and last norm: ``(B, L, D) -> (B, L, D)``."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)``, mask bool ``(B, L)``; returns ``(B, L, D)``."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


def spade_layers(config: SpadeConfig, branches: list[nn.Module] | None = None) -> list[nn.Module]:
    """The whole stack: S4 in the first ``s4_layers`` layers (or these ``branches``), one relative bias for all."""
    c = config
    bias = BucketedBias(c.heads, c.buckets, c.max_distance, bidirectional=not c.causal)
    if branches is None:
        branches = [S4(c.dim, c.state, bidirectional=not c.causal) for _ in range(c.s4_layers)]
        for branch in branches:
            branch.requires_grad_(not c.s4_frozen)
    without = [None] * (c.layers - len(branches))
    layers: list[nn.Module] = [SpadeLayer(c, bias, branch) for branch in [*branches, *without]]
    layers[0].bias = bias  # the one place where it is registered
    return layers
