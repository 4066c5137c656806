"""Panels of chapter 03, and its diagram: who looks at whom, what the gates let through, and the Mega layer drawn.

Both panels take any module that holds `GatedAttention` units (the unit itself, a Mega layer, a whole classifier) with
an input for it, or plain tensors: queries and keys for the one, input, candidate and gate for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import Tensor, nn

from longseq_tutorial.classroom.figures import OKABE_ITO, PAPER, fmt
from longseq_tutorial.classroom.panels import Choice, IntSlider, Panel, Slider, Toggle
from longseq_tutorial.mechanisms.gated_attention import FUNCTIONS, GatedAttention, attend

__all__ = ["GateMix", "WhoLooksAtWhom", "mega_diagram"]

LONGEST = 1024  # a map with more rows than this has more pixels than a screen


@dataclass
class _Look:
    """What one attention was asked: everything that decides who looks at whom."""

    attend: Callable[..., Tensor]
    q: Tensor  # (N, L, z), all leading axes in one
    k: Tensor
    bias: Tensor  # ends in (C, C), C = L unless the attention is chunked
    mask: Tensor  # (N, L)
    function: str
    causal: bool


class WhoLooksAtWhom(Panel):
    """The map of attention weights, with its function, direction and bias in the reader's hands.

    Args:
        source: a module with `GatedAttention` units, or queries ``(L, z)`` or ``(..., L, z)``.
        given: the input of the module, or keys of the queries' shape.
        mask: bool, as the module takes it, or ``(..., L)`` for tensors; True = real.
        bias: ``(L, L)``, only beside tensors; by default minus the distance ``|j - i|`` (times a strength of 0).
        labels: a short name for each position (letters of a text, say).
        attend: only beside tensors: a function with the arguments of ``gated_attention.attend``; yours, perhaps.
        start: starting values of the controls.

    Raises:
        TypeError, ValueError: something that cannot be shown; the message says what is wanted.
    """

    title = "Who looks at whom"

    def __init__(
        self,
        source: nn.Module | Tensor,
        given: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        labels: Sequence[str] | None = None,
        attend: Callable[..., Tensor] = attend,
        **start: Any,
    ) -> None:
        if isinstance(source, nn.Module):
            if bias is not None:
                raise ValueError("a module brings its own bias; wanted no bias beside it. Hand in q and k instead.")
            self.looks = _watch(source, given, mask)
            strength = 1.0
        else:
            self.looks = {"q k": _from_tensors(source, given, mask, bias, attend)}
            strength = 0.0 if bias is None else 1.0
        length = max(look.q.shape[1] for look in self.looks.values())
        if length > LONGEST:
            raise ValueError(f"wanted at most {LONGEST} positions to draw; got {length}. Cut the sequence: x[:, :512].")
        if labels is not None and len(labels) != length:
            raise ValueError(f"wanted a label for each of {length} positions; got {len(labels)}.")
        self.labels = labels
        first = next(iter(self.looks.values()))
        layers = {"layer": Choice("attention layer", list(self.looks))} if len(self.looks) > 1 else {}
        batch = max(len(look.q) for look in self.looks.values())
        self.controls = {
            **layers,
            "function": Choice("function", FUNCTIONS, first.function),
            "causal": Toggle("causal: look at the past only", first.causal),
            "strength": Slider("bias strength (times)", 0.0, 4.0, strength, step=0.05),
            "query": IntSlider("query (position)", 0, length - 1, length // 2),
            **({"sequence": IntSlider("sequence in the batch", 0, batch - 1, 0)} if batch > 1 else {}),
        }
        super().__init__(**start)

    def weights(self, function: str, causal: bool, strength: float, layer: str = "", sequence: int = 0) -> Tensor:
        """The map ``(L, L)``: what attention makes of an identity as its values is the matrix of its weights."""
        look = self.looks[layer] if layer else next(iter(self.looks.values()))
        q, k, mask = (t[sequence : sequence + 1] for t in (look.q, look.k, look.mask))
        one = torch.eye(q.shape[1], dtype=q.dtype).unsqueeze(0)
        return look.attend(q, k, one, function=function, bias=strength * look.bias, mask=mask, causal=causal)[0]

    def figure(self, query: int, **state: Any) -> Figure:
        weights = self.weights(**state).numpy()
        query = min(query, len(weights) - 1)
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0), layout="none")
        fig.subplots_adjust(left=0.07, right=0.985, bottom=0.13, top=0.91, wspace=0.28)  # fixed: twice as quick
        scale = PowerNorm(0.5, vmin=0, vmax=max(float(weights.max()), 1e-9))  # small weights stay visible
        picture = left.imshow(weights, norm=scale, aspect="equal")
        left.grid(False)
        left.axhline(query, color=OKABE_ITO["vermilion"], linewidth=1.2, marker="")
        fig.colorbar(picture, ax=left, shrink=0.75, label="weight (square-root scale)")
        left.set(xlabel="key (position)", ylabel="query (position)", title=f"all queries, {state['function']}")
        row = weights[query]
        right.stairs(row, np.arange(len(row) + 1) - 0.5, fill=True, color=OKABE_ITO["blue"])
        right.axvline(query, color=OKABE_ITO["vermilion"], linestyle="--", linewidth=1.2, marker="", label="the query")
        right.set(xlabel="key (position)", ylabel="weight", title=f"query {self._name(query)}")
        right.set_xlim(-0.75, len(row) - 0.25)
        right.set_ylim(0, None)
        right.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0)
        if self.labels is not None and len(self.labels) <= 48:
            for axis in (left.xaxis, left.yaxis, right.xaxis):
                axis.set_ticks(range(len(self.labels)), self.labels, fontsize=6.5)
                axis.set_tick_params(length=0)
        return fig

    def describe(self, query: int, **state: Any) -> str:
        weights = self.weights(**state)
        query = min(query, len(weights) - 1)
        row = weights[query]
        total = float(row.sum())
        way = "causal" if state["causal"] else "both directions"
        head = f"{state['function']}, {way}, bias times {fmt(state['strength'])}. Query {self._name(query)}: "
        if total <= 0:
            return head + "all its weights are 0: it reads nothing at all."
        share = row / total
        entropy = float(-(share * share.clamp(min=1e-300).log2()).sum())
        reach = float((share * (torch.arange(len(row)) - query).abs()).sum())
        top = int((row >= row.max() - 1e-9).nonzero()[0])  # the first of equals, whatever the rounding
        return (
            f"{head}its weights add up to {fmt(total)}; the largest, {fmt(float(row[top]))}, is on key "
            f"{self._name(top)}. "
            f"Entropy {fmt(entropy)} bits, as if spread evenly over {fmt(2**entropy)} of {len(row)} keys; "
            f"mean distance {fmt(reach)} steps."
        )

    def _name(self, position: int) -> str:
        return str(position) if self.labels is None else f"{position} ({self.labels[position]!r})"


class GateMix(Panel):
    """What the update gate makes of one channel: input, candidate, and the output between them.

    Args:
        source: a module with a `GatedAttention` unit (the first is shown), or the input ``(L, D)`` or ``(B, L, D)``.
        given: the input of the module, or the candidate H of the same shape as the input.
        update: beside tensors, the update gate in [0, 1], of the same shape.
        mask: beside a module, bool ``(B, L)``.
        start: starting values of the controls.
    """

    title = "What the update gate lets through"

    def __init__(
        self,
        source: nn.Module | Tensor,
        given: Tensor,
        update: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        **start: Any,
    ) -> None:
        if isinstance(source, nn.Module):
            self.x, self.candidate, gate = _watch_gates(source, given, mask)
        elif update is None:
            raise TypeError("wanted input, candidate and update gate; got no update gate. GateMix(x, candidate, phi)")
        else:
            self.x, self.candidate, gate = (t.detach().double().cpu() for t in (source, given, update))
        if not self.x.shape == self.candidate.shape == gate.shape or self.x.dim() not in (2, 3) or not len(self.x):
            raise ValueError(
                "input, candidate and update gate must have one shape, (L, D) or (B, L, D); "
                f"got {[tuple(t.shape) for t in (self.x, self.candidate, gate)]}."
            )
        if not bool(((gate >= 0) & (gate <= 1)).all()):
            raise ValueError("the update gate must lie in [0, 1]; got values outside. Pass torch.sigmoid(logit).")
        if self.x.dim() == 3:
            self.x, self.candidate, gate = self.x[0], self.candidate[0], gate[0]
        self.logit = torch.logit(gate, eps=1e-12)
        self.controls = {
            "channel": IntSlider("channel", 0, self.x.shape[1] - 1, 0),
            "shift": Slider("added to the gate's logit", -8.0, 8.0, 0.0, step=0.25),
        }
        super().__init__(**start)

    def figure(self, channel: int, shift: float) -> Figure:
        x, h, phi, y = (curve.numpy() for curve in self._curves(channel, shift))
        fig, (top, bottom) = plt.subplots(2, 1, figsize=(7.4, 4.6), sharex=True, height_ratios=(2, 1), layout="none")
        fig.subplots_adjust(left=0.1, right=0.985, bottom=0.11, top=0.92, hspace=0.1)
        steps, every = range(len(x)), len(x) // 40 + 1
        top.fill_between(steps, x, h, color=OKABE_ITO["sky"], alpha=0.25, label="between x and H")
        top.plot(steps, x, label="x, the input", linestyle="--", markevery=every)
        top.plot(steps, h, label="H, the candidate", linestyle=":", markevery=every)
        top.plot(steps, y, label="y, the output", linewidth=2.2, markevery=every)
        top.set(ylabel=f"channel {channel}")
        top.legend(ncols=4, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0))
        bottom.plot(steps, phi, color=OKABE_ITO["purple"], marker="v", markevery=every)
        bottom.set(xlabel="position (steps)", ylabel="update gate φ", ylim=(-0.05, 1.05))
        return fig

    def describe(self, channel: int, shift: float) -> str:
        x, h, phi, y = self._curves(channel, shift)
        inside = bool(((y >= torch.minimum(x, h) - 1e-9) & (y <= torch.maximum(x, h) + 1e-9)).all())
        everywhere = float(torch.sigmoid(self.logit + shift).mean())
        return (
            f"Channel {channel}, logit shifted by {fmt(shift)}: the gate is {fmt(float(phi.mean()))} on average, from "
            f"{fmt(float(phi.min()))} to {fmt(float(phi.max()))} ({fmt(everywhere)} over all channels). The output is "
            f"{fmt(_rms(y - x))} away from the input and {fmt(_rms(y - h))} from the candidate (root mean square), "
            f"and {'lies between the two at every step' if inside else 'leaves the space between them'}."
        )

    def _curves(self, channel: int, shift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, h = self.x[:, channel], self.candidate[:, channel]
        phi = torch.sigmoid(self.logit[:, channel] + shift)
        return x, h, phi, phi * h + (1 - phi) * x


# -------------------------------------------------------------------- looking into a module


def _units(module: nn.Module) -> dict[str, GatedAttention]:
    """The gated attention units inside, by name."""
    units = {name or "attention": m for name, m in module.named_modules() if isinstance(m, GatedAttention)}
    if not units:
        raise TypeError(
            f"wanted a module with GatedAttention units inside; {type(module).__name__} has none. "
            "Hand in its queries and keys instead: WhoLooksAtWhom(q, k), each (length, z)."
        )
    return units


@contextmanager
def _spied(unit: GatedAttention, seen: list[dict[str, Any]]) -> Iterator[None]:
    """Keep what `unit` hands to its attention while the block runs; nothing it computes changes."""
    plain = unit.attend

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append({"attend": plain, "q": q, "k": k, **options})
        return plain(q, k, v, **options)

    unit.attend = spy
    try:
        yield
    finally:
        unit.attend = plain


def _run(module: nn.Module, x: Tensor, mask: Tensor | None) -> None:
    """One forward pass in eval mode, after which the module is as it was."""
    if not isinstance(x, Tensor):
        raise TypeError(f"wanted the module's input, a tensor; got {type(x).__name__}.")
    training = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            module(x) if mask is None else module(x, mask=mask)
    finally:
        for m, was in training.items():
            m.training = was


def _watch(module: nn.Module, x: Tensor, mask: Tensor | None) -> dict[str, _Look]:
    looks = {}
    for name, unit in _units(module).items():
        seen: list[dict[str, Any]] = []
        with _spied(unit, seen):
            _run(module, x, mask)
        if not seen:
            continue  # a unit that this input does not reach
        asked = seen[-1]
        q = _flat(asked["q"])
        looks[name] = _Look(
            attend=asked["attend"],
            q=q,
            k=_flat(asked["k"]),
            bias=asked["bias"].detach().double().cpu(),
            mask=torch.ones(q.shape[:2], dtype=torch.bool) if asked["mask"] is None else asked["mask"].cpu(),
            function=asked["function"],
            causal=asked["causal"],
        )
    return looks


def _watch_gates(module: nn.Module, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Input, candidate and update gate of the first unit in `module`."""
    unit = next(iter(_units(module).values()))
    gates: list[Tensor] = []
    ends: list[tuple[Tensor, Tensor]] = []

    def at_the_end(_unit: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], y: Tensor) -> None:
        residual = named.get("residual", arguments[2] if len(arguments) > 2 else None)
        ends.append((arguments[0] if residual is None else residual, y))

    hooks = [
        unit.update_gate.register_forward_hook(lambda _m, _a, gate: gates.append(gate)),
        unit.register_forward_hook(at_the_end, with_kwargs=True),
    ]
    try:
        _run(module, x, mask)
    finally:
        for hook in hooks:
            hook.remove()
    gate = gates[-1].double().cpu()
    before, after = (t.double().cpu() for t in ends[-1])
    return before, before + (after - before) / gate.clamp(min=1e-12), gate  # y = x + gate (H - x), solved for H


def _from_tensors(
    q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None, attend: Callable[..., Tensor]
) -> _Look:
    if not isinstance(q, Tensor) or not isinstance(k, Tensor):
        raise TypeError(
            "wanted a module and its input, or queries and keys as tensors (..., length, z); "
            f"got {type(q).__name__} and {type(k).__name__}."
        )
    if q.dim() < 2 or q.shape != k.shape or not q.shape[-2]:
        raise ValueError(f"queries and keys must be (..., length, z) alike; got {tuple(q.shape)}, {tuple(k.shape)}.")
    length = q.shape[-2]
    step = torch.arange(length, dtype=torch.float64)
    bias = -(step[None] - step[:, None]).abs() if bias is None else bias.detach().double().cpu()
    if bias.shape != (length, length):
        raise ValueError(f"bias must be (length, length) = {(length, length)}; got {tuple(bias.shape)}.")
    if mask is None:
        mask = torch.ones(q.shape[:-1], dtype=torch.bool)
    if mask.dtype != torch.bool or mask.shape != q.shape[:-1]:
        raise ValueError(f"mask must be bool {tuple(q.shape[:-1])}, True = real; got {mask.dtype} {tuple(mask.shape)}.")
    return _Look(attend, _flat(q), _flat(k), bias, mask.reshape(-1, length).cpu(), "softmax", False)


def _flat(t: Tensor) -> Tensor:
    """All leading axes in one, in double precision: ``(N, L, z)``."""
    return t.detach().double().cpu().reshape(-1, *t.shape[-2:])


def _rms(t: Tensor) -> float:
    return math.sqrt(float(t.square().mean()))


# -------------------------------------------------------------------- the diagram


def mega_diagram() -> Figure:
    """The Mega layer as boxes and arrows, in the words of the code."""
    fig, ax = plt.subplots(figsize=(9.4, 4.9))
    ax.set(xlim=(0, 18.8), ylim=(0, 9.8))
    ax.axis("off")

    def box(x: float, y: float, text: str, colour: str, width: float = 2.2, height: float = 1.0) -> None:
        ax.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0.02,rounding_size=0.18",
                facecolor=PAPER,
                edgecolor=OKABE_ITO[colour],
                linewidth=2,
            )
        )
        ax.text(x, y, text, ha="center", va="center", fontsize=9.5)

    def line(
        *points: tuple[float, float], arrow: bool = True, word: str = "", at: tuple[float, float] = (0, 0)
    ) -> None:
        xs, ys = zip(*points, strict=True)
        ax.plot(xs[:-1] if arrow else xs, ys[:-1] if arrow else ys, color="black", linewidth=1.2, marker="")
        if arrow:
            style = {"arrowstyle": "-|>", "color": "black", "linewidth": 1.2, "shrinkA": 0, "shrinkB": 0}
            ax.annotate("", points[-1], points[-2], arrowprops=style)
        if word:
            ax.text(*at, word, ha="center", va="center", fontsize=9.5, style="italic")

    ax.text(0.35, 5, "x", ha="center", va="center", fontsize=12)
    box(2.0, 5, "norm", "black", width=1.5)
    box(4.6, 5, "EMA, SiLU", "green")
    box(8.6, 8.6, "values\nSiLU", "blue")
    box(8.6, 6.9, "queries, keys\nshared Z", "blue", width=2.6)
    box(8.6, 5.0, "reset gate\nSiLU", "orange")
    box(8.6, 3.3, "candidate's\nown part", "black")
    box(8.6, 1.6, "update gate φ\nsigmoid", "vermilion", width=2.4)
    box(12.2, 7.75, "attention\none head", "blue")
    box(12.2, 5.0, "times", "orange", width=1.3)
    box(14.6, 4.15, "add, SiLU\nH", "black")
    box(16.9, 1.6, "φ H + (1−φ) x", "vermilion", width=2.7)
    line((0.65, 5), (1.25, 5))
    line((2.75, 5), (3.5, 5))
    line((3.1, 5), (3.1, 8.6), (7.5, 8.6))
    line((5.7, 5), (7.5, 5), word="s", at=(6.1, 5.3))
    for height, edge in ((6.9, 7.3), (3.3, 7.5), (1.6, 7.4)):
        line((6.5, 5), (6.5, height), (edge, height))
    line((9.7, 8.6), (10.4, 8.6), (10.4, 8.0), (11.1, 8.0))
    line((9.9, 6.9), (10.4, 6.9), (10.4, 7.5), (11.1, 7.5))
    line((12.2, 7.25), (12.2, 5.5), word="found", at=(12.85, 6.4))
    line((9.7, 5.0), (11.55, 5.0))
    line((12.85, 5.0), (13.1, 5.0), (13.1, 4.4), (13.5, 4.4))
    line((9.7, 3.3), (13.1, 3.3), (13.1, 3.9), (13.5, 3.9))
    line((15.7, 4.15), (16.9, 4.15), (16.9, 2.1))
    line((9.8, 1.6), (15.55, 1.6))
    line((0.9, 5), (0.9, 0.4), (16.9, 0.4), (16.9, 1.1))
    ax.text(13.0, 0.72, "x, the residual path: before the norm", ha="center", fontsize=9.5, style="italic")
    line((18.25, 1.6), (18.65, 1.6))
    ax.text(18.5, 2.0, "y", ha="center", va="center", fontsize=12)
    return fig
