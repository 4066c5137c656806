"""FastRPB: a linear transformer that gets its sense of distance from an FFT.

Written after the published code of Zubkov and Gavrilov, "FastRPB: a Scalable Relative Positional Encoding for Long
Sequence Tasks", 2022 (its text was not at hand)::

    x ── norm ──┬── q, k ── phi ── linear attention ──┐
                └── v ──┴──────────┘                 (+)── W_o ──(+ x)── feed-forward ── y
                     └── sum over j of w[i - j] v[j] ─┘

The bias is added beside the attention, not inside its softmax, so the attention may be any: the linear one with SIKF
features (phi = exp) as published, another feature map, or softmax.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.fft_bias import FastRPB
from ..mechanisms.gated_attention import attend
from ..mechanisms.linear_attention import FavorFeatures, LinearAttention, elu_features, sikf_features
from .configs import FastRPBConfig

__all__ = ["FastRPBBlock"]


class FastRPBBlock(nn.Module):
    """Attention plus positional bias, then a GELU feed-forward layer; pre-norm. ``(B, L, D) -> (B, L, D)``."""

    def __init__(self, config: FastRPBConfig) -> None:
        super().__init__()
        c = config
        self.heads, self.causal = c.heads, c.causal
        width = c.qkv_dim // c.heads
        self.norm1, self.norm2 = nn.LayerNorm(c.dim), nn.LayerNorm(c.dim)
        self.qkv = nn.Linear(c.dim, 3 * c.qkv_dim)
        self.out = nn.Linear(c.qkv_dim, c.dim)
        self.fc1, self.fc2 = nn.Linear(c.dim, c.ffn_dim), nn.Linear(c.ffn_dim, c.dim)
        self.dropout = nn.Dropout(c.dropout)
        self.attention_dropout = nn.Dropout(c.attention_dropout)  # on the attention's output: no weights exist here
        self.attention: LinearAttention | None = None
        if c.attention != "softmax":
            maps = {"sikf": sikf_features, "elu": elu_features}
            features: Any = maps.get(c.attention) or FavorFeatures(width, c.features)
            self.attention = LinearAttention(c.heads, width, width, features, causal=c.causal)
        self.weights = nn.Identity()  # a window for `record`, of softmax attention
        self.bias = None
        if c.bias != "none":
            symmetric = c.bias == "symmetric"
            self.bias = FastRPB(c.heads, c.max_positions, symmetric=symmetric, causal=c.causal, layout=c.layout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)``, mask bool ``(B, L)``; returns ``(B, L, D)``."""
        q, k, v = self._heads(self.norm1(x))  # (B, H, L, width) each
        found = self._softmax(q, k, v, mask) if self.attention is None else self.attention(q, k, v, mask)
        found = self.attention_dropout(found.transpose(1, 2))  # (B, L, H, width)
        if self.bias is not None:
            found = found + self.bias(v.transpose(1, 2), mask)
        x = x + self.dropout(self.out(found.flatten(2)))
        return self._feed_forward(x)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """Sums over the features, and the last N values for the bias; with softmax all keys and values, growing."""
        if not self.causal:
            raise ValueError("Attention that looks ahead cannot stream. Build it with causal=True.")
        if self.attention is not None:
            memory: Any = self.attention.initial_state(batch)
        else:
            empty = self.out.weight.new_zeros(batch, self.heads, 0, self.out.in_features // self.heads)
            memory = (empty, empty)
        return {"attention": memory, "bias": None if self.bias is None else self.bias.initial_state(batch)}

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``, equal to the parallel form."""
        memory, heard = state["attention"], state["bias"]
        q, k, v = (t.squeeze(2) for t in self._heads(self.norm1(x_t).unsqueeze(1)))  # (B, H, width)
        if self.attention is None:
            memory = tuple(torch.cat([old, new.unsqueeze(2)], dim=2) for old, new in zip(memory, (k, v), strict=True))
            found = F.scaled_dot_product_attention(q.unsqueeze(2), *memory).squeeze(2)
        else:
            found, memory = self.attention.step(q, k, v, memory)
        found = self.attention_dropout(found)
        if self.bias is not None:
            more, heard = self.bias.step(v, heard)
            found = found + more
        x_t = x_t + self.dropout(self.out(found.flatten(1)))
        return self._feed_forward(x_t), {"attention": memory, "bias": heard}

    def _heads(self, x: Tensor) -> Any:
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, H, L, width)

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.unsqueeze(1).expand(q.shape[:-1])
        return attend(q, k, v, mask=mask, causal=self.causal, on_weights=self.weights)

    def _feed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
