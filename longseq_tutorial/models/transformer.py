"""The Transformer everybody knows, as the quadratic baseline: what the other models are measured against.

Pre-norm blocks of multi-head softmax attention (torch's fused call) and a GELU feed-forward layer, with sinusoidal
positions added to the input of the first block. Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .configs import TransformerConfig

__all__ = ["SinusoidalPositions", "TransformerBlock"]


class SinusoidalPositions(nn.Module):
    """Add ``[sin(t w), cos(t w)]`` with frequencies ``w = 10000**(-2a/D)``: ``(B, L, D) -> (B, L, D)``, any L."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self._table(torch.arange(x.shape[1], device=x.device), x)

    def initial_state(self, batch: int) -> int:
        """The position counter."""
        return 0

    def step(self, x_t: Tensor, state: int) -> tuple[Tensor, int]:
        """One time step ``(B, D)``."""
        return x_t + self._table(torch.tensor([state], device=x_t.device), x_t)[0], state + 1

    @staticmethod
    def _table(position: Tensor, like: Tensor) -> Tensor:
        half = like.shape[-1] // 2
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        frequency = torch.exp(torch.arange(half, device=like.device, dtype=wide) * (-math.log(10000.0) / half))
        angle = position.to(wide).unsqueeze(-1) * frequency  # (positions, D/2)
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(like.dtype)


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; ``(B, L, D) -> (B, L, D)``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.causal, self.rate = c.heads, c.causal, c.dropout
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.qkv = nn.Linear(c.dim, 3 * c.dim)
        self.out = nn.Linear(c.dim, c.dim)
        self.fc1, self.fc2 = nn.Linear(c.dim, c.ffn_dim), nn.Linear(c.ffn_dim, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.weights = nn.Identity()  # a window for `record`

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._heads(self.norm1(x))  # (B, H, L, D/H) each
        visible = self._visible(x.shape[1], mask)
        if (
            self.weights._forward_hooks
        ):  # somebody is looking: the fused call hides its weights, so compute them beside it
            self._show_weights(q, k, visible)
        # With no mask at all the fused call knows causality by itself, and needs no L x L tensor for it.
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible if mask is not None else None,
            is_causal=self.causal and mask is None,
            dropout_p=self.rate if self.training else 0.0,
        )
        x = x + self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return x + self._feed_forward(x)

    def initial_state(self, batch: int) -> tuple[Tensor, Tensor]:
        """Empty caches of keys and values, ``(batch, heads, 0, D/heads)``: they grow with every step."""
        if not self.causal:
            raise ValueError("Attention that looks ahead cannot stream. Build it with causal=True.")
        empty = self.out.weight.new_zeros(batch, self.heads, 0, self.out.in_features // self.heads)
        return empty, empty

    def step(self, x_t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One time step ``(B, D)``, equal to the parallel form."""
        q, k, v = self._heads(self.norm1(x_t).unsqueeze(1))
        keys, values = torch.cat([state[0], k], dim=2), torch.cat([state[1], v], dim=2)
        y = F.scaled_dot_product_attention(q, keys, values)  # (B, H, 1, D/H)
        x_t = x_t + self.dropout(self.out(y.transpose(1, 2).flatten(1)))
        return x_t + self._feed_forward(x_t), (keys, values)

    def _heads(self, x: Tensor) -> Any:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, L, D/H)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _visible(self, length: int, mask: Tensor | None) -> Tensor | None:
        """Which key each query may see, bool ``(B or 1, 1, L or 1, L)``; only padding may end up seeing padding."""
        device = self.out.weight.device
        past = torch.ones(length, length, dtype=torch.bool, device=device).tril() if self.causal else None
        if mask is None:
            return past
        if past is None:  # one row serves all queries; a sequence of padding alone sees itself
            return (mask | ~mask.any(-1, keepdim=True))[:, None, None, :]
        return (mask[:, None, None, :] & past) | torch.eye(length, dtype=torch.bool, device=device)

    def _show_weights(self, q: Tensor, k: Tensor, visible: Tensor | None) -> None:
        with torch.no_grad():
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            self.weights(torch.softmax(scores, dim=-1))
