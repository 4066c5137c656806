"""Transformer-VQ's layer: gated attention over quantised keys, causal, in linear time and with a state that stays.

Written like Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", ICLR 2024, and its published
code; what is called ``x_t`` there (x tilde) is ``normed`` here::

    x ── norm ──┬── queries q ─────────────────────┐
                ├── keys k ── nearest codes k_hat ─┼── attention, block by block ── times gate ── W_o ── y
                ├── values v, silu ────────────────┘                                   │
                └── gate, silu ────────────────────────────────────────────────────────┘

A model adds y to x; there is no feed-forward layer, two of these take the place of a Transformer block. The sub-layer
alone is what stands here: the published models (Enwik8, PG-19, ImageNet64) are not part of this course.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanisms.fft import working_dtype
from ..mechanisms.vq_attention import VectorQuantizer, empty_state, vq_attention_blocks

__all__ = ["TransformerVQLayer"]

EPS = 1e-6


class TransformerVQLayer(nn.Module):
    """One gated attention unit of Transformer-VQ, without dropout and residual around it: ``(B, L, D) -> (B, L, D)``.

    With H heads, ``rms(x) = x / sqrt(mean(x^2) + 1e-6)`` and tau the square root of the key width::

        n = rms(x) * gain + bias
        q = rms(n W_q) / sqrt(tau)      k = rms(n W_k) / sqrt(tau)      rms for each head: so |k| = tau ** 0.5
        v = silu(n W_v)                 gate = silu(n W_g)
        score of query i and key j = (q_i + u) . k_hat_j + (q_i + w) . r_{i-j}        the last for i - j <= memory only
        y = (attention * gate) W_o

    where ``r_d`` is a sinusoid of the distance d times ``W_r``, and u and w are learned, as in Transformer-XL; all
    three are divided by sqrt(tau), too.

    Args:
        dim: D, even.
        heads, key_dim, value_dim, codes: H, width of a head's keys and values, codes of each head.
        block, memory: queries work in blocks; distances up to ``memory`` have a position of their own.
        pe_lam: the longest wavelength of the sinusoid is 2 pi times this, about.
        position_dropout: on the sinusoid.
        stop_cache: no gradient through what earlier blocks left behind, as published; by default it flows.
        quantizer: options of :class:`~longseq_tutorial.mechanisms.vq_attention.VectorQuantizer`.

    All matrices are ``(in, out)``, without biases: ``w_q``, ``w_kvg`` (keys, values, gates side by side), ``w_r``,
    ``w_o``.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        key_dim: int,
        value_dim: int,
        codes: int,
        block: int,
        memory: int,
        pe_lam: float = 100_000.0,
        position_dropout: float = 0.0,
        stop_cache: bool = False,
        **quantizer: Any,
    ) -> None:
        super().__init__()
        if min(dim, heads, key_dim, value_dim, codes, block) < 1 or dim % 2 or memory < 0 or pe_lam <= 1:
            raise ValueError(
                "TransformerVQLayer wanted an even dim, positive widths, codes and block, memory >= 0 and pe_lam > 1; "
                f"got dim={dim}, heads={heads}, key_dim={key_dim}, value_dim={value_dim}, codes={codes}, "
                f"block={block}, memory={memory}, pe_lam={pe_lam}."
            )
        self.dim, self.heads, self.key_dim, self.value_dim = dim, heads, key_dim, value_dim
        self.block, self.memory, self.pe_lam, self.stop_cache = block, memory, pe_lam, stop_cache
        self.gain, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.w_q = nn.Parameter(torch.empty(dim, heads * key_dim))
        self.w_kvg = nn.Parameter(torch.empty(dim, heads * (key_dim + 2 * value_dim)))
        self.w_r = nn.Parameter(torch.empty(dim, heads * key_dim))
        self.w_o = nn.Parameter(torch.empty(heads * value_dim, dim))
        self.u, self.w = nn.Parameter(torch.zeros(heads * key_dim)), nn.Parameter(torch.zeros(heads * key_dim))
        self.quantizer = VectorQuantizer(heads, codes, key_dim, **quantizer)
        self.position_dropout = nn.Dropout(position_dropout)
        self.gate = nn.Identity()  # a window for `record`
        for matrix in (self.w_q, self.w_kvg, self.w_r, self.w_o):
            nn.init.normal_(matrix, std=matrix.shape[0] ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``x (B, L, D)``, mask bool ``(B, L)`` with True = real; returns ``(B, L, D)``. For the loss: :meth:`mix`."""
        return self.mix(x, mask)[0]

    def mix(
        self, x: Tensor, mask: Tensor | None = None, state: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The output ``(B, L, D)``, the commitment loss (a number, to be added with a small weight) and the new state.

        ``state`` is what an earlier part of the sequence left behind, to train on long sequences piece by piece. In
        training the codebook moves with every call, after the keys have been given their codes.
        """
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (batch, length >= 1, dim) = (*, *, {self.dim}); got {tuple(x.shape)}.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            raise ValueError(
                f"mask must be bool (batch, length) = {tuple(x.shape[:2])}, True where the token is real; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        q, k, v, gate = self._project(x)
        self.quantizer.set_up(k, mask)
        codebook = self.quantizer.codebook  # before it moves: the one that gives the names
        _, codes, loss = self.quantizer(k, mask)
        u, bias = self._positions(q)
        found, state = vq_attention_blocks(
            q + u,
            k,
            v,
            codebook,
            block=self.block,
            memory=self.memory,
            mask=mask,
            bias=bias,
            stop_cache=self.stop_cache,
            state=state,
            codes=codes,
        )  # (B, H, L, v)
        return self._out(found, gate), loss, state

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The last ``memory`` tokens, and a mean value and a number for each code: of the same size for ever."""
        codebook = self.quantizer.codebook
        return empty_state(batch, codebook, self.memory, self.value_dim, working_dtype(self.w_q, codebook))

    def step(self, x_t: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One time step ``(B, D)``, equal to the parallel form in eval mode. The codebook stays as it is."""
        if x_t.dim() != 2 or x_t.shape[1] != self.dim:
            raise ValueError(f"x_t must be (batch, dim) = (*, {self.dim}), one time step; got {tuple(x_t.shape)}.")
        q, k, v, gate = self._project(x_t.unsqueeze(1))
        u, bias = self._positions(q)
        codebook = self.quantizer.codebook
        found, state = vq_attention_blocks(q + u, k, v, codebook, block=1, memory=self.memory, bias=bias, state=state)
        return self._out(found, gate).squeeze(1), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys ``(B, H, L, k)``, values ``(B, H, L, v)`` and the gate ``(B, L, H v)``."""
        normed = _rms(x) * self.gain + self.bias
        widths = [self.heads * width for width in (self.key_dim, self.value_dim, self.value_dim)]
        k, v, gate = (normed @ self.w_kvg).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (normed @ self.w_q, k, v))
        return self._shrink(_rms(q)), self._shrink(_rms(k)), F.silu(v), self.gate(F.silu(gate))

    def _positions(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """``u (H, 1, k)``, and what the distance 0 .. memory adds to a query's scores, ``(B, H, L, memory + 1)``."""
        dtype = working_dtype(q)
        with torch.autocast(q.device.type, enabled=False):  # scores in full precision, as those of the keys
            u, w = (self._shrink(p.to(dtype)).view(self.heads, 1, -1) for p in (self.u, self.w))
            rate = torch.arange(0, self.dim, 2, device=q.device, dtype=dtype) * (-math.log(self.pe_lam) / self.dim)
            angle = torch.arange(self.memory + 1, device=q.device, dtype=dtype).unsqueeze(-1) * rate.exp()
            wave = self.position_dropout(torch.cat([angle.sin(), angle.cos()], dim=-1))  # (M + 1, D)
            r = self._shrink(wave @ self.w_r.to(dtype)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            return u, (q + w) @ r.mT  # r (H, M + 1, k)

    def _shrink(self, x: Tensor) -> Tensor:
        """Divide by the square root of tau, the fourth root of the key width."""
        return x * self.key_dim**-0.25

    def _out(self, found: Tensor, gate: Tensor) -> Tensor:
        return (found.transpose(1, 2).flatten(2) * gate) @ self.w_o

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, block={self.block}, memory={self.memory}, pe_lam={self.pe_lam:g}"


def _rms(x: Tensor) -> Tensor:
    """Divide by the root mean square of the last axis, in float32 or better."""
    wide = x.to(working_dtype(x))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)
