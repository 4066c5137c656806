"""Mega: an exponential moving average that smooths, a gated attention that reads what was smoothed.

Written like Figure 2 of Ma et al., "Mega: Moving Average Equipped Gated Attention", ICLR 2023::

    x ──norm──┬──────────────── values ──────┐
              └── EMA ── SiLU ── s ── gates, queries, keys ── attention ── gates ── mix with x ── y

With ``chunk`` set, the attention stays inside blocks of that length (Mega-chunk); the EMA still runs over everything.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.chunking import chunk_attention
from ..mechanisms.ema import DampedEMA
from ..mechanisms.gated_attention import GatedAttention, attend, attend_in_tiles
from .configs import LongVQConfig, MegaConfig
from .parts import Norm

__all__ = ["FeedForward", "MegaBlock", "MegaLayer"]


class MegaLayer(nn.Module):
    """EMA, then gated attention; the update gate is the residual connection. ``(B, L, D) -> (B, L, D)``."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        c = config
        self.prenorm = c.prenorm
        self.norm = Norm(c.norm, c.dim)
        self.ema = DampedEMA(c.dim, c.n, bidirectional=not c.causal, truncation=c.truncation)
        self.dropout = nn.Dropout(c.dropout)
        self.attention = GatedAttention(
            c.dim,
            c.z_dim,
            c.v_dim,
            function=c.attention,
            bias=c.bias,
            max_positions=c.max_positions if c.chunk is None else c.chunk,
            causal=c.causal,
            dropout=c.dropout,
            attention_dropout=c.attention_dropout,
            hidden_dropout=c.hidden_dropout,
            attend=attend_in_tiles if c.chunk is None else partial(chunk_attention, chunk=c.chunk, attend=attend),
            chunk=c.chunk,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x, mask) if self.prenorm else x
        smooth = self.dropout(F.silu(self.ema(normed, mask)))
        y = self.attention(normed, smooth=smooth, residual=x, mask=mask)
        return y if self.prenorm else self.norm(y, mask)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The EMA's state, of fixed size, and the attention's caches (at most a chunk long when chunked)."""
        return {"ema": self.ema.initial_state(batch), "attention": self.attention.initial_state(batch)}

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``, equal to the parallel form."""
        normed = self.norm(x_t) if self.prenorm else x_t
        smooth, ema = self.ema.step(normed, state["ema"])
        smooth = self.dropout(F.silu(smooth))
        y, cache = self.attention.step(normed, state["attention"], smooth_t=smooth, residual_t=x_t)
        return (y if self.prenorm else self.norm(y)), {"ema": ema, "attention": cache}


class FeedForward(nn.Module):
    """``x + W2 silu(W1 norm(x))``, or with the norm at the end; position by position."""

    def __init__(self, config: MegaConfig | LongVQConfig) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.norm = Norm(config.norm, config.dim)
        self.fc1 = nn.Linear(config.dim, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim)
        self.hidden_dropout = nn.Dropout(config.hidden_dropout)
        self.dropout = nn.Dropout(config.dropout)
        for linear in (self.fc1, self.fc2):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        normed = self.norm(x, mask) if self.prenorm else x
        y = x + self.dropout(self.fc2(self.hidden_dropout(F.silu(self.fc1(normed)))))
        return y if self.prenorm else self.norm(y, mask)


class MegaBlock(nn.Module):
    """A Mega layer, then a feed-forward layer."""

    def __init__(self, config: MegaConfig) -> None:
        super().__init__()
        self.mega = MegaLayer(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.feed_forward(self.mega(x, mask), mask)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The state of the Mega layer; a feed-forward layer has none."""
        return self.mega.initial_state(batch)

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``."""
        y, state = self.mega.step(x_t, state)
        return self.feed_forward(y), state
