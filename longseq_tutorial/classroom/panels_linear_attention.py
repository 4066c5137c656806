"""The panel of chapter 07: the attention that a feature map implies, beside softmax's, and how far apart they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from longseq_tutorial.classroom.figures import fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, LogSlider, Panel, Slider, Toggle
from longseq_tutorial.mechanisms.linear_attention import (
    FavorFeatures,
    elu_features,
    linear_attention,
    sikf_features,
)

__all__ = ["ImpliedAttention", "implied_weights", "kinds_of_tokens", "relative_error", "softmax_weights"]

LONGEST = 512  # a map with more rows has more pixels than the screen has room for
MAPS = ("elu + 1", "SIKF: exp", "FAVOR+", "FAVOR+, raw QR")


def softmax_weights(q: Tensor, k: Tensor, *, causal: bool = False) -> Tensor:
    """What softmax attention weighs: ``softmax(q k^T / sqrt(d))``, ``(..., L, d)`` twice to ``(..., L, L)``."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return torch.softmax(scores, dim=-1)


def implied_weights(q: Tensor, k: Tensor, feature_map: Callable[[Tensor], Tensor], *, causal: bool = False) -> Tensor:
    """What linear attention with this map weighs: its output where the values are the rows of an identity."""
    one = torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-2], -1, -1)
    return linear_attention(q, k, one, feature_map, causal=causal, eps=0.0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The size of the difference of two matrices as a share of the size of the wanted one (Frobenius norms)."""
    return float((got - wanted).norm() / wanted.norm())


def kinds_of_tokens(length: int = 48, dim: int = 16, kinds: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(length, dim)`` of tokens that come in kinds: both are their kind's vector plus some noise.

    So there is something to attend to: the other tokens of one's own kind. Four in a row are of one kind.
    """
    g = torch.Generator().manual_seed(seed)
    rounds = -(-length // (4 * kinds))
    kind = torch.cat([torch.randperm(kinds, generator=g) for _ in range(rounds)]).repeat_interleave(4)[:length]
    centre = torch.randn(kinds, dim, generator=g, dtype=torch.float64)[kind]
    q, k = (centre + 0.3 * torch.randn(length, dim, generator=g, dtype=torch.float64) for _ in range(2))
    return q, k


class ImpliedAttention(Panel):
    """The matrix of weights that linear attention never builds, beside softmax's matrix, and the difference.

    Args:
        q, k: ``(L, d)``, or ``(..., L, d)`` with a choice of the head; ``None`` for an example of tokens in six kinds.
        feature_map: one more map to choose, yours: any callable ``(..., d) -> (..., m)``.
        start: values that replace the controls' own starting values.

    Raises:
        TypeError, ValueError: tensors that cannot be shown or a map that cannot be called; the message says which.
    """

    title = "The attention a feature map implies"

    def __init__(
        self,
        q: Tensor | None = None,
        k: Tensor | None = None,
        *,
        feature_map: Callable[[Tensor], Tensor] | None = None,
        **start: Any,
    ) -> None:
        self.q, self.k = _heads(*(kinds_of_tokens() if q is None and k is None else (q, k)))
        if feature_map is not None and not callable(feature_map):
            raise TypeError(
                f"feature_map must be callable, (..., d) -> (..., m); got {type(feature_map).__name__}. "
                "Pass the function itself, without calling it."
            )
        self.own = feature_map
        heads = len(self.q)
        several: dict[str, Control] = {"head": IntSlider("head", 0, heads - 1, 0)} if heads > 1 else {}
        self.controls = {
            "map": Choice("feature map", MAPS + (("yours",) if feature_map is not None else ())),
            "features": LogSlider("number of random features (FAVOR+)", 1.0, 4096.0, 64.0),
            "draw": IntSlider("draw of the random features", 0, 20, 0),
            "scale": Slider("scale of q and k (times)", 0.0, 4.0, 1.0, 0.05),
            "causal": Toggle("causal: look at the past only", False),
            **several,
        }
        super().__init__(**start)

    def matrices(
        self, map: str, features: float, draw: int, scale: float, causal: bool, head: int = 0
    ) -> tuple[Tensor, Tensor, int]:
        """Softmax's weights, the implied ones, both ``(L, L)``, and the number of features."""
        q, k = scale * self.q[head], scale * self.k[head]
        feature_map = self._map(map, max(1, round(features)), draw)
        with torch.no_grad():
            m = feature_map(q[:1]).shape[-1]
            return softmax_weights(q, k, causal=causal), implied_weights(q, k, feature_map, causal=causal), m

    def figure(self, map: str, scale: float, **state: Any) -> Figure:
        """Softmax, the map, and their difference, as three pictures with one scale."""
        wanted, got, _ = self.matrices(map, scale=scale, **state)
        fig, axes = plt.subplots(1, 3, figsize=(10.2, 3.6), layout="none")
        fig.subplots_adjust(left=0.06, right=0.895, bottom=0.14, top=0.9, wspace=0.16)
        most = max(float(wanted.max()), float(got.max()), 1e-9)
        norm = PowerNorm(0.5, vmin=0, vmax=most)  # the square root: small weights stay visible
        for ax, matrix, title in zip(
            axes, (wanted, got, (got - wanted).abs()), ("softmax", map, "difference, absolute"), strict=True
        ):
            image = ax.imshow(matrix.numpy(), norm=norm)
            ax.set(title=title, xlabel="key (position)")
            ax.grid(False)
        axes[0].set_ylabel("query (position)")
        for ax in axes[1:]:
            ax.tick_params(labelleft=False)
        fig.colorbar(image, cax=fig.add_axes((0.912, 0.2, 0.014, 0.62)), label="weight")
        return fig

    def describe(self, map: str, scale: float, causal: bool, **state: Any) -> str:
        """The same in words."""
        wanted, got, m = self.matrices(map, scale=scale, causal=causal, **state)
        bits = [_entropy(weights) for weights in (wanted, got)]
        return (
            f"{map} with {m} feature{'s' * (m != 1)}, q and k times {fmt(scale)}, "
            f"{'causal' if causal else 'both directions'}: the implied weights differ from softmax's by "
            f"{fmt(100 * relative_error(got, wanted))} % of their size. Of {wanted.shape[-1]} keys a query of softmax "
            f"reads, on average, as from {fmt(2 ** bits[0])} equally weighted ones, here as from {fmt(2 ** bits[1])}. "
            f"Largest weight: softmax {fmt(float(wanted.max()))}, here {fmt(float(got.max()))}."
        )

    def _map(self, name: str, features: int, draw: int) -> Callable[[Tensor], Tensor]:
        if name == "yours":
            assert self.own is not None
            return self.own
        if name == "elu + 1":
            return elu_features
        if name == "SIKF: exp":
            return sikf_features
        generator = torch.Generator().manual_seed(draw)
        return FavorFeatures(self.q.shape[-1], features, row_signs=name == "FAVOR+", generator=generator)


def _heads(q: Any, k: Any) -> tuple[Tensor, Tensor]:
    """Both as ``(heads, L, d)`` in float64, or an error that says what was wanted."""
    for x in (q, k):
        if not isinstance(x, Tensor):
            raise TypeError(f"wanted tensors q and k, (..., length, dim), or neither; got {type(x).__name__}.")
    if q.dim() < 2 or q.shape != k.shape or q.numel() == 0 or q.is_complex() or k.is_complex():
        raise ValueError(f"q and k must be real and (..., length, dim), alike; got {tuple(q.shape)}, {tuple(k.shape)}.")
    if q.shape[-2] > LONGEST:
        raise ValueError(f"wanted at most {LONGEST} positions to draw; got {q.shape[-2]}. Cut: q[..., :{LONGEST}, :].")
    if not (q.isfinite().all() and k.isfinite().all()):
        raise ValueError("q and k must be finite; got NaN or infinity.")
    q, k = (x.detach().double().cpu().reshape(-1, *x.shape[-2:]) for x in (q, k))
    return q, k


def _entropy(weights: Tensor) -> float:
    """Bits of a row, averaged over the rows; negative weights (a map may have them) count by their size."""
    share = weights.abs() / weights.abs().sum(-1, keepdim=True).clamp(min=1e-300)
    return float(-(share * share.clamp(min=1e-300).log2()).sum(-1).mean())
