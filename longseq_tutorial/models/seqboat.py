"""SeqBoat: an exponential moving average that every token passes, and attention that wakes up only where it helps.

Written like the figure of the published code (renll/SeqBoat; Ren et al., "Sparse Modular Activation for Efficient
Sequence Modeling", NeurIPS 2023)::

    x ──norm── EMA ── SiLU ── h ──┬── linear ── two logits ── switch: attend or skip, and how surely (c)
    │                             ├── gated attention over the tokens that were switched on ── times c ──┐
    │                             └── linear ───────────────────────────────────────────────────────────(+)── SiLU ── y
    └────────────────────────────────────────────────────────────────────────────────────────────────────┘

What differs from Mega: the values, too, come from the EMA's output; no update gate, but a plain sum under a SiLU; no
feed-forward layer. The text of the paper was not at hand when this was written: the structure is that of the code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.ema import DampedEMA
from ..mechanisms.gated_attention import laplace, relu2
from ..mechanisms.sparse_activation import SparseActivation
from .configs import SeqBoatConfig
from .parts import Norm
from .transformer import SinusoidalPositions

__all__ = ["ScaledPositions", "SeqBoatLayer"]


class SeqBoatLayer(nn.Module):
    """EMA, then gated attention for the tokens that the layer's own switch chooses. ``(B, L, D) -> (B, L, D)``.

    A token that is not chosen gets ``silu(W h + x)``: no attention, no cost for it. Padding is never chosen.
    """

    def __init__(self, config: SeqBoatConfig) -> None:
        super().__init__()
        c = config
        self.dim, self.prenorm = c.dim, c.prenorm
        self.norm = Norm(c.norm, c.dim)
        self.ema = DampedEMA(c.dim, c.n, bidirectional=not c.causal, truncation=c.truncation)
        self.dropout = nn.Dropout(c.dropout)
        self.logits = 0 if c.always_active else 2  # what the first projection gives the switch to decide by
        self.hx_proj = nn.Linear(c.dim, self.logits + c.dim)
        self.attention = SparseActivation(
            c.dim,
            c.z_dim,
            c.v_dim,
            window=c.window,
            function={"softmax": None, "laplace": laplace, "relu2": relu2}[c.attention],
            bias=c.bias,
            max_positions=c.max_positions,
            causal=c.causal,
            temperature_scale=c.temperature,
            # The published code drops the attention's output alone, or, causal, the sum it goes into.
            dropout=0.0 if c.causal else c.dropout,
            attention_dropout=c.attention_dropout,
            hidden_dropout=c.hidden_dropout,
            always_active=c.always_active,
        )
        self.sum_dropout = nn.Dropout(c.dropout if c.causal else 0.0)
        _cut_normal(self.hx_proj.weight, 0.02)
        nn.init.zeros_(self.hx_proj.bias)
        _cut_ema(self.ema)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x (B, L, D)``, mask bool ``(B, L)`` with True = real; returns ``(B, L, D)``."""
        normed = self.norm(x, mask) if self.prenorm else x
        h = self.dropout(F.silu(self.ema(normed, mask)))
        logits, hx = self._split(h)
        y = F.silu(self.sum_dropout(hx + self.attention(h, logits, mask)) + x)
        return y if self.prenorm else self.norm(y, mask)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The EMA's state and the attention's memory of the last activated tokens: both of a size that stays."""
        return {"ema": self.ema.initial_state(batch), "attention": self.attention.initial_state(batch)}

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``, equal to the parallel form."""
        normed = self.norm(x_t) if self.prenorm else x_t
        smooth, ema = self.ema.step(normed, state["ema"])
        h = self.dropout(F.silu(smooth))
        logits, hx = self._split(h)
        found, memory = self.attention.step(h, logits, state["attention"])
        y = F.silu(self.sum_dropout(hx + found) + x_t)
        return (y if self.prenorm else self.norm(y)), {"ema": ema, "attention": memory}

    def _split(self, h: Tensor) -> tuple[Tensor | None, Tensor]:
        """What the switch decides by, ``(..., 2)`` or None, and the linear path, ``(..., D)``."""
        logits, hx = self.hx_proj(h).split([self.logits, self.dim], dim=-1)
        return (logits if self.logits else None), hx


class ScaledPositions(SinusoidalPositions):
    """Sines and cosines of the position times one learned number, added: ``(B, L, D) -> (B, L, D)``, any L."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), dim**-0.5))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.scale * super().forward(torch.zeros_like(x))

    def step(self, x_t: Tensor, state: int) -> tuple[Tensor, int]:
        """One time step ``(B, D)``."""
        wave, state = super().step(torch.zeros_like(x_t), state)
        return x_t + self.scale * wave, state


def _cut_normal(parameter: Tensor, std: float) -> Tensor:
    """Fill with a normal distribution cut at two deviations, as the published code does everywhere."""
    return nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)


def _cut_ema(ema: DampedEMA) -> None:
    """Mega's initial values with the tails cut off."""
    for parameter, std in ((ema.alpha_logit, 0.2), (ema.delta_logit, 0.2), (ema.eta, 1.0), (ema.omega, 1.0)):
        _cut_normal(parameter, std)
    with torch.no_grad():
        ema.beta.copy_(ema.beta.sign() + _cut_normal(torch.empty_like(ema.beta), 0.02))
