"""Panels of chapter 06: a codebook that learns in two dimensions, and attention rebuilt from codes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, Panel, Slider, Toggle
from longseq_tutorial.mechanisms.vq_attention import (
    VectorQuantizer,
    code_sums,
    nearest_code,
    perplexity,
    vq_attention_quadratic,
)

__all__ = ["CodebookLearning", "RebuiltAttention", "draw_codebook", "fit_codebook", "islands", "misplaced"]

STARTS = ("normal", "keys", "kmeans++")
LONGEST = 512  # rows of a map that still have a pixel each
COLOURS = [OKABE_ITO[name] for name in ("blue", "orange", "green", "vermilion", "purple", "sky", "yellow")]


def islands(count: int = 600, seed: int = 0) -> Tensor:
    """Keys in two dimensions ``(count, 2)``: five islands of different size and population, far from the origin."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[4.0, 1.0], [6.5, 1.5], [5.0, 4.0], [1.0, 4.5], [7.5, 5.0]], dtype=torch.float64)
    spread = torch.tensor([0.5, 0.25, 0.8, 0.4, 0.15], dtype=torch.float64)
    member = torch.multinomial(torch.tensor([4.0, 3.0, 4.0, 2.0, 1.0]), count, replacement=True, generator=g)
    noise = torch.randn(count, 2, generator=g, dtype=torch.float64)
    return centres[member] + spread[member, None] * noise


def fit_codebook(k: Tensor, codes: int, rounds: int = 10, seed: int = 0) -> Tensor:
    """The best ``codes`` names for fixed keys ``(N, d)``: k-means++ and a few rounds of k-means -> ``(codes, d)``.

    It is the package's quantiser without memory: with decay 0 each update moves a code to the mean of its keys.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        quantizer = VectorQuantizer(1, codes, k.shape[-1], decay=0.0).to(k.dtype)
        for _ in range(rounds):
            quantizer(k[None, None])
    return quantizer.codebook[0]


def misplaced(true: Tensor, rebuilt: Tensor) -> float:
    """The share of attention that lies on the wrong keys: half the absolute difference of two maps, mean over rows."""
    return float((true - rebuilt).abs().sum(-1).mean() / 2)


# ---- a codebook that learns ------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """What a codebook did: codes after each update ``(steps + 1, S, 2)`` and the mean squared distance of all keys."""

    codebooks: Tensor
    errors: list[float]


class CodebookLearning(Panel):
    """Codes among keys of two dimensions, update by update, with the share of keys that each code names.

    Args:
        keys: ``(N, 2)`` or ``(..., 2)``, at least two different points; ``None``: five islands.
        steps: updates to look at; each sees ``batch`` keys drawn at random.
        most_codes: end of the slider for the number of codes.
        start: values that replace the controls' own.

    Raises:
        TypeError: keys that are no tensor.
        ValueError: keys that are not points in the plane, not finite, or all the same.
    """

    title = "A codebook learns its keys"

    def __init__(
        self,
        keys: Tensor | None = None,
        *,
        steps: int = 100,
        most_codes: int = 32,
        batch: int = 128,
        **start: Any,
    ) -> None:
        self.keys = islands() if keys is None else _points(keys)
        self.steps, self.batch = steps, batch
        self.run = lru_cache(maxsize=64)(self._run)  # a step of the slider costs a picture, not a training
        self.controls: Mapping[str, Control] = {
            "step": IntSlider("updates", 0, steps, min(20, steps)),
            "codes": IntSlider("codes S", 1, most_codes, min(12, most_codes)),
            "start": Choice("first codes", STARTS, "normal"),
            "decay": Slider("decay of the averages", 0.0, 0.99, 0.9, step=0.01),
            "restart": Toggle("dead codes restart at a key", False),
        }
        super().__init__(**start)

    def _run(self, codes: int, start: str, decay: float, restart: bool) -> _Run:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            quantizer = VectorQuantizer(1, codes, 2, decay, start=start, restart=0.05 if restart else 0.0).double()
            quantizer.set_up(self.keys[None, None])
            codebooks = [quantizer.codebook[0]]
            for _ in range(self.steps):
                pick = torch.randint(len(self.keys), (self.batch,))
                quantizer(self.keys[pick][None, None])
                codebooks.append(quantizer.codebook[0])
        return _Run(torch.stack(codebooks), [self._error(codebook) for codebook in codebooks])

    def _names(self, codebook: Tensor) -> Tensor:
        return nearest_code(self.keys[None, None], codebook[None])[0, 0]

    def _error(self, codebook: Tensor) -> float:
        return float((self.keys - codebook[self._names(codebook)]).square().sum(-1).mean())

    def _counts(self, codebook: Tensor) -> Tensor:
        return torch.bincount(self._names(codebook), minlength=len(codebook))

    def figure(self, step: int, codes: int, start: str, decay: float, restart: bool) -> Figure:
        run = self.run(codes, start, decay, restart)
        counts = self._counts(run.codebooks[step])
        fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.7), width_ratios=(1.35, 1, 1), layout="none")
        fig.subplots_adjust(left=0.06, right=0.985, bottom=0.14, top=0.92, wspace=0.34)  # fixed: twice as quick
        draw_codebook(left, self.keys, run.codebooks[: step + 1])
        left.set(title=f"after {step} updates")
        middle.bar(
            range(codes), (counts.sort(descending=True).values / len(self.keys)).numpy(), color=OKABE_ITO["blue"]
        )
        middle.axhline(1 / codes, color="#777777", linestyle=":", label="equal use")
        middle.set(title=f"codes in use: {int((counts > 0).sum())} of {codes}", xlabel="code, by size")
        middle.set(ylabel="share of the keys")
        middle.legend(fontsize="small")
        right.plot(run.errors, marker="", color=OKABE_ITO["blue"])
        right.plot(step, run.errors[step], marker="o", color=OKABE_ITO["vermilion"])
        right.set(title="distance to the own code", xlabel="updates", ylabel="mean squared distance")
        right.set_ylim(bottom=0)
        return fig

    def describe(self, step: int, codes: int, start: str, decay: float, restart: bool) -> str:
        run = self.run(codes, start, decay, restart)
        counts = self._counts(run.codebooks[step])
        spread = float((self.keys - self.keys.mean(0)).square().sum(-1).mean())
        moved = (run.codebooks[step] - run.codebooks[0]).norm(dim=-1)
        return (
            f"{len(self.keys)} keys, {codes} codes that began as "
            f"{ {'normal': 'small random numbers', 'keys': 'random keys', 'kmeans++': 'keys far apart'}[start] }. "
            f"After {step} of {self.steps} updates {int((counts > 0).sum())} of the codes name at least one key; "
            f"perplexity {fmt(float(perplexity(counts)))}. The mean squared distance from a key to its code is "
            f"{fmt(run.errors[step])}, {fmt(run.errors[step] / spread)} of the keys' variance; it began at "
            f"{fmt(run.errors[0])} and ends at {fmt(run.errors[-1])}. "
            f"So far codes have moved by {fmt(float(moved.mean()))} on average, the farthest by "
            f"{fmt(float(moved.max()))}."
        )


def draw_codebook(ax: Axes, keys: Tensor, path: Tensor) -> None:
    """Keys ``(N, 2)``, the codes ``(steps, S, 2)`` with the way they came, and the region that each of them names.

    Codes in use are discs, unused ones crosses.
    """
    codebook = path[-1]
    names = nearest_code(keys[None, None], codebook[None])[0, 0]
    used = torch.bincount(names, minlength=len(codebook)) > 0
    every = torch.cat([keys, codebook])
    low, high = every.min(0).values, every.max(0).values
    margin = 0.06 * (high - low).max()
    (x0, y0), (x1, y1) = (low - margin).tolist(), (high + margin).tolist()
    grid = torch.cartesian_prod(*(torch.linspace(a, b, 110, dtype=keys.dtype) for a, b in ((y0, y1), (x0, x1))))
    regions = nearest_code(grid.flip(-1)[None, None], codebook[None])[0, 0].view(110, 110)
    colours = ListedColormap(COLOURS)
    ax.imshow(
        regions % len(COLOURS), cmap=colours, vmin=0, vmax=len(COLOURS) - 1, alpha=0.22, origin="lower",
        extent=(x0, x1, y0, y1), aspect="equal",
    )  # fmt: skip
    xs, ys = np.linspace(x0, x1, 110), np.linspace(y0, y1, 110)
    inside = [(regions == code).double().numpy() for code in regions.unique().tolist()]
    for region in inside if len(inside) > 1 else ():  # colours repeat, so neighbours may share one
        ax.contour(xs, ys, region, levels=[0.5], colors="#777777", linewidths=0.6)
    ax.grid(False)
    ax.scatter(keys[:, 0].numpy(), keys[:, 1].numpy(), s=5, c=[COLOURS[i] for i in (names % len(COLOURS)).tolist()])
    for i in range(len(codebook)):
        ax.plot(*path[:, i].T, marker="", color="#555555", linewidth=0.7)
    ax.plot(*codebook[used].T, linestyle="", marker="o", color="black", markersize=6, markeredgecolor="white")
    ax.plot(*codebook[~used].T, linestyle="", marker="X", color="white", markersize=7, markeredgecolor="black")
    ax.set(xlabel="first number of a key", ylabel="second number")


# ---- attention rebuilt from codes ------------------------------------------------------------------------------------


class RebuiltAttention(Panel):
    """The true map of attention beside the one over quantised keys, for any number of codes.

    The codebook is fitted to the keys shown: the best case for its size. Queries are divided by ``sqrt(d)``.

    Args:
        q, k: queries and keys ``(L, d)``, or ``(..., L, d)``: then there is a slider for the leading axes.
        start: values that replace the controls' own.

    Raises:
        TypeError: something that is no tensor.
        ValueError: shapes that do not fit, numbers that are not finite, or more than 512 positions.
    """

    title = "Attention rebuilt from codes"

    def __init__(self, q: Tensor, k: Tensor, **start: Any) -> None:
        self.q, self.k = _queries_and_keys(q, k)
        lead, length, _ = self.q.shape
        self.sizes = [2**i for i in range(length.bit_length()) if 2**i < length] + [length]
        self.fit = lru_cache(maxsize=None)(lambda head, codes: fit_codebook(self.k[head], codes))
        self.weights = lru_cache(maxsize=256)(self._weights)
        self.controls: Mapping[str, Control] = {
            "codes": Choice("codes S", self.sizes, self.sizes[len(self.sizes) // 2]),
            "window": IntSlider("window with exact keys (steps)", 0, min(32, length - 1), 0),
            "causal": Toggle("causal: look at the past only", False),
            "query": IntSlider("query (position)", 0, length - 1, length // 2),
            **({"head": IntSlider("sequence or head", 0, lead - 1, 0)} if lead > 1 else {}),
        }
        super().__init__(**start)

    def _weights(self, codes: int, window: int, causal: bool, head: int = 0) -> Tensor:
        """The map ``(L, L)`` over quantised keys; 0 codes stand for the true one. Values 1 show where weights are."""
        q, k = self.q[head][None, None], self.k[head][None, None]
        one = torch.eye(q.shape[2], dtype=q.dtype)[None, None]
        codebook = self.fit(head, codes or 1)[None]
        near = q.shape[2] if codes == 0 else window
        exact = near > 0
        return vq_attention_quadratic(q, k, one, codebook, causal=causal, window=near, exact_window=exact)[0, 0]

    def _errors(self, **state: Any) -> list[float]:
        true = self.weights(0, **state)
        return [misplaced(true, self.weights(size, **state)) for size in self.sizes]

    def figure(self, codes: int, query: int, **state: Any) -> Figure:
        true, rebuilt = self.weights(0, **state), self.weights(codes, **state)
        fig, axes = plt.subplots(1, 4, figsize=(11.5, 3.3), layout="none")
        fig.subplots_adjust(left=0.05, right=0.99, bottom=0.15, top=0.91, wspace=0.42)  # fixed: twice as quick
        scale = PowerNorm(0.5, vmin=0, vmax=float(true.max()))  # small weights stay visible
        for ax, weights, title in ((axes[0], true, "true"), (axes[1], rebuilt, f"rebuilt from {codes} codes")):
            ax.imshow(weights, norm=scale, aspect="equal")
            ax.axhline(query, color=OKABE_ITO["vermilion"], linewidth=1, marker="")
            ax.set(title=title, xlabel="key (position)", ylabel="query (position)")
            ax.grid(False)
        edges = np.arange(len(true) + 1) - 0.5
        axes[2].stairs(true[query].numpy(), edges, fill=True, color=OKABE_ITO["sky"], label="true")
        axes[2].stairs(rebuilt[query].numpy(), edges, color=OKABE_ITO["vermilion"], label="rebuilt")
        axes[2].set(title=f"what query {query} reads", xlabel="key (position)", ylabel="weight")
        axes[2].legend(fontsize="small")
        errors = self._errors(**state)
        axes[3].plot(self.sizes, errors)
        axes[3].plot(codes, errors[self.sizes.index(codes)], marker="o", markersize=9, color=OKABE_ITO["vermilion"])
        axes[3].set(xscale="log", title="attention misplaced", xlabel="codes S", ylabel="share")
        axes[3].set_ylim(bottom=0)
        return fig

    def describe(self, codes: int, query: int, **state: Any) -> str:
        true, rebuilt = self.weights(0, **state), self.weights(codes, **state)
        head, window = state.get("head", 0), state["window"]
        z = nearest_code(self.k[head][None, None], self.fit(head, codes)[None])
        numbers = code_sums(self.k[head][None, None], z, codes)[1][0, 0]
        wrong = dict(zip(self.sizes, map(fmt, self._errors(**state)), strict=True))
        near = f", keys at most {window} steps away unquantised" if window else ""
        most = int(true[query].argmax())
        return (
            f"{self.q.shape[1]} positions, keys of width {self.q.shape[2]}, {codes} codes, of which "
            f"{int((numbers > 0).sum())} are in use{near}. On average {wrong[codes]} of the attention lies on "
            f"wrong keys; with 1 code it is {wrong[1]}, with {self.sizes[-1]} it is {wrong[self.sizes[-1]]}. "
            f"Query {query} reads most from key {most}, with weight {fmt(float(true[query, most]))}; "
            f"rebuilt, that key gets {fmt(float(rebuilt[query, most]))}."
        )


# ---- what comes in ---------------------------------------------------------------------------------------------------


def _points(keys: Any) -> Tensor:
    """Keys as (N, 2) float64, or an error that says what was wanted."""
    if not isinstance(keys, Tensor):
        raise TypeError(f"CodebookLearning wants keys as a tensor (N, 2), or nothing; got {type(keys).__name__}.")
    if keys.dim() < 2 or keys.shape[-1] != 2 or keys.is_complex():
        raise ValueError(
            f"keys must be points in the plane, real (N, 2); got {keys.dtype} {tuple(keys.shape)}. "
            "Of wider keys show two directions: keys @ torch.pca_lowrank(keys, 2)[2]."
        )
    points = keys.detach().double().cpu().flatten(0, -2)
    if not points.isfinite().all() or len(points.unique(dim=0)) < 2:
        raise ValueError("keys must be finite and not all the same point.")
    return points


def _queries_and_keys(q: Any, k: Any) -> tuple[Tensor, Tensor]:
    """Both as (N, L, d) float64, q divided by sqrt(d)."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor):
            raise TypeError(f"RebuiltAttention wants {name} as a tensor (L, d) or (..., L, d); got {type(x).__name__}.")
    if q.shape != k.shape or q.dim() < 2 or 0 in q.shape or q.is_complex():
        raise ValueError(f"q and k must be (..., L, d) alike and real; got {tuple(q.shape)} and {tuple(k.shape)}.")
    if not 2 <= q.shape[-2] <= LONGEST:
        raise ValueError(f"wanted 2 to {LONGEST} positions to draw; got {q.shape[-2]}. Cut them: q[..., :256, :].")
    q, k = (x.detach().double().cpu().reshape(-1, *x.shape[-2:]) for x in (q, k))
    if not (q.isfinite().all() and k.isfinite().all()):
        raise ValueError("q and k must be finite; got NaN or infinity.")
    return q / q.shape[-1] ** 0.5, k
