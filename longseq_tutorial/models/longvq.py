"""LongVQ, reconstructed: a structured memory that hears everything, and attention over quantised keys.

**This is our reconstruction.** The paper (LongVQ, IJCAI 2024) is known to us by its abstract only, and we know of no
published code and no figures of it. The abstract says: an SSM-like structured memory joined with attention; vector
quantisation compresses what is global into a codebook of fixed length, so that attention costs linear time; a local
window with an added bias tells near from far. The rest here is taken from systems whose details are public: the frame
of gates from Mega (Ma et al., ICLR 2023), the quantised attention from Transformer-VQ (Lingle, ICLR 2024)::

    x ──norm──┬──────────────── values ─────────────────┐
              └── EMA or S4D ── SiLU ── s ── gates, queries, keys ── attention over codes ── gates ── mix with x ── y

So results of this model are results of this model, and not of the paper's.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.ema import DampedEMA
from ..mechanisms.gated_attention import GatedUnit
from ..mechanisms.s4 import S4D
from ..mechanisms.vq_attention import VQAttention
from .configs import LongVQConfig
from .mega import FeedForward
from .parts import Norm

__all__ = ["LongVQBlock", "LongVQLayer"]

EPS = 1e-6  # Transformer-VQ's


class LongVQLayer(GatedUnit):
    """Memory, then gated attention over quantised keys: ``(B, L, D) -> (B, L, D)``. With x the normed input::

        s = silu(memory(x))        Z = silu(s W_z)       q, k = rms(Z * kappa + mu) / z**(1/4)       V = silu(x W_v)
        O = softmax(q k_hat + bias within the window) V                         k_hat: the nearest code of each key
        H = silu(s W_h + (O * silu(s W_r)) U_h)          y = u * H + (1 - u) * input,   u = sigmoid(s W_u)

    In training, ``auxiliary`` holds the last call's commitment loss times its weight, to be added to the loss:
    :func:`longseq_tutorial.models.auxiliary_loss` collects it.
    """

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__()
        c = config
        self.prenorm, self.commitment = c.prenorm, c.commitment
        self.widths = [c.dim, c.z_dim, c.v_dim, c.dim]  # update gate, shared z, reset gate, candidate
        self.norm = Norm(c.norm, c.dim)
        self.memory: DampedEMA | S4D = (
            DampedEMA(c.dim, c.n, bidirectional=not c.causal)
            if c.memory == "ema"
            else S4D(c.dim, c.state, bidirectional=not c.causal)
        )
        self.v_proj = nn.Linear(c.dim, c.v_dim)
        self.mx_proj = nn.Linear(c.dim, sum(self.widths))
        self.h_proj = nn.Linear(c.v_dim, c.dim)
        self.kappa = nn.Parameter(torch.empty(2, c.z_dim))  # row 0 makes the query from Z, row 1 the key
        self.mu = nn.Parameter(torch.zeros(2, c.z_dim))
        self.attention = VQAttention(
            1, c.codes, c.z_dim, c.v_dim, c.window, causal=c.causal, exact_window=c.exact_window, decay=c.decay
        )
        self.dropout, self.hidden_dropout = nn.Dropout(c.dropout), nn.Dropout(c.hidden_dropout)
        self.update_gate, self.reset_gate = nn.Identity(), nn.Identity()  # windows for `record`
        self.auxiliary: Tensor | None = None
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.kappa)  # its scale goes out again in rms(); small numbers would drown in EPS

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)``, mask bool ``(B, L)``; returns ``(B, L, D)``."""
        normed = self.norm(x, mask) if self.prenorm else x
        smooth = self.dropout(F.silu(self.memory(normed, mask)))
        q, k = self._queries_and_keys(smooth)
        v = self.hidden_dropout(F.silu(self.v_proj(normed)))
        found, loss = self.attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), mask)  # one head
        self.auxiliary = self.commitment * loss if self.training else None
        y = self._gated(smooth, x, found.squeeze(1))
        return y if self.prenorm else self.norm(y, mask)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """The memory's state, the window, and a mean value and a number for each code: all of fixed size."""
        return {"memory": self.memory.initial_state(batch), "attention": self.attention.initial_state(batch)}

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``, equal to the parallel form in eval mode."""
        normed = self.norm(x_t) if self.prenorm else x_t
        smooth, memory = self.memory.step(normed, state["memory"])
        smooth = self.dropout(F.silu(smooth))
        q, k = self._queries_and_keys(smooth)
        v = self.hidden_dropout(F.silu(self.v_proj(normed)))
        found, cache = self.attention.step(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), state["attention"])
        y = self._gated(smooth, x_t, found.squeeze(1))
        return (y if self.prenorm else self.norm(y)), {"memory": memory, "attention": cache}

    def _queries_and_keys(self, smooth: Tensor) -> tuple[Tensor, Tensor]:
        shared = F.silu(F.linear(smooth, *self._projections()[1]))
        # Keys of one length keep codebook and commitment loss bounded (Transformer-VQ).
        q, k = (_rms(shared * self.kappa[i] + self.mu[i]) * self.widths[1] ** -0.25 for i in (0, 1))
        return q, k


class LongVQBlock(nn.Module):
    """A LongVQ layer, then Mega's feed-forward layer."""

    def __init__(self, config: LongVQConfig) -> None:
        super().__init__()
        self.longvq = LongVQLayer(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D) -> (B, L, D)``."""
        return self.feed_forward(self.longvq(x, mask), mask)

    def initial_state(self, batch: int) -> dict[str, Any]:
        """See :meth:`LongVQLayer.initial_state`."""
        return self.longvq.initial_state(batch)

    def step(self, x_t: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """One time step ``(B, D)``."""
        y, state = self.longvq.step(x_t, state)
        return self.feed_forward(y), state


def _rms(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
