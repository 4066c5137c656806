"""The panel of chapter 05: which tokens wake the attention up, and what they read across which distance."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, Control, IntSlider, LogSlider, Panel, Slider
from longseq_tutorial.mechanisms.sparse_activation import SparseActivation, dense_weights
from longseq_tutorial.models.recorder import record

__all__ = ["WhoWakes"]

LONGEST = 1024  # a strip with more tokens than this has more bars than a screen
LETTERED = 120  # up to so many tokens there is room for a label each
FAINT = 0.02  # weights below this draw no arc


_Call = tuple[SparseActivation, Tensor, Tensor | None, Tensor | None]  # a unit, and its h, logits, mask


@dataclass
class _Reading:
    """What one setting gives for one sequence."""

    awake: Tensor  # (L,) bool
    chance: Tensor  # (L,) probability of the choice "activate"
    place: Tensor  # (M,) positions of the awake tokens
    weights: Tensor  # (M, M) row = query, column = key


class WhoWakes(Panel):
    """Which tokens a sparse activation unit lets attend, and who reads whom over which distance.

    Args:
        source: a `SparseActivation`, or any module that holds some. It is run once, on ``inputs``; the panel then works
            on copies of the units, so that the sliders never change the module.
        inputs: what ``source`` is called with: ``h (B, L, D)`` and ``logits (B, L, 2)`` for the unit itself.
        labels: a short name for each position (letters of a text, say).
        start: starting values of the controls.

    Raises:
        TypeError: no such unit inside, or one that was never called.
        ValueError: labels that do not fit, or a sequence too long to draw.
    """

    title = "Who wakes up, and who reads whom"

    def __init__(self, source: nn.Module, *inputs: Any, labels: Sequence[str] | None = None, **start: Any) -> None:
        self.calls = _watch(source, inputs)
        first = next(iter(self.calls.values()))
        batch, length = first[1].shape[:2]
        if length > LONGEST:
            raise ValueError(f"wanted at most {LONGEST} tokens to draw; got {length}. Cut the sequence: x[:, :512].")
        if labels is not None and len(labels) != length:
            raise ValueError(f"wanted a label for each of {length} tokens; got {len(labels)}.")
        self.labels = labels
        unit, _, logits, _ = first
        apart = 1.0 if logits is None else float((logits[..., 1] - logits[..., 0]).abs().max())
        reach = max(1.0, float(np.ceil(1.2 * apart)))
        self.controls: dict[str, Control] = {
            **({"layer": Choice("layer", list(self.calls))} if len(self.calls) > 1 else {}),
            **({"sample": IntSlider("sequence in the batch", 0, batch - 1, 0)} if batch > 1 else {}),
            "skip": Slider("added to the skip logit", -reach, reach, 0.0, step=reach / 50),
            "temperature": LogSlider("temperature (times the learned one)", 0.1, 10.0, 1.0),
            "window": IntSlider("window (awake tokens)", 1, length, min(unit.window or length, length)),
            "query": IntSlider("query (position)", 0, length - 1, self._last_awake(first)),
        }
        super().__init__(**start)

    def _call(self, layer: str) -> _Call:
        return self.calls[layer] if layer else next(iter(self.calls.values()))

    def _last_awake(self, call: _Call) -> int:
        unit, h, logits, mask = call
        awake = torch.ones(h.shape[1]) if mask is None else mask[0]
        if unit.router is not None and logits is not None:
            with torch.no_grad():
                awake = unit.router(logits[:1], None if mask is None else mask[:1])[0][0]
        return int(awake.nonzero().max()) if awake.any() else h.shape[1] // 2

    def reading(self, skip: float, temperature: float, window: int, layer: str = "", sample: int = 0) -> _Reading:
        """Run the chosen unit on the chosen sequence, with these settings."""
        unit, h, logits, mask = self._call(layer)
        unit = copy.deepcopy(unit)
        length = h.shape[1]
        # A unit without a window keeps all awake tokens, whatever their number: that is the slider's right end.
        unit.window = None if unit.window is None and window >= length else window
        one = slice(sample, sample + 1)
        real = torch.ones(length, dtype=torch.bool) if mask is None else mask[sample]
        awake, chance = real, real.double()
        with torch.no_grad(), record(unit) as tape:
            if unit.router is not None and logits is not None:
                unit.router.act_bias += skip
                unit.router.log_temperature.add_(float(np.log(temperature)))
                unit(h[one], logits[one], None if mask is None else mask[one])
                awake, sure = tape["active_seen"][0].bool(), tape["confidence_seen"][0]
                wanted = logits[sample, :, 1] > logits[sample, :, 0] + unit.router.act_bias
                chance = torch.where(wanted, sure, 1 - sure)
            else:
                unit(h[one], None, None if mask is None else mask[one])
        place = awake.nonzero().squeeze(1)
        if unit.router is None:  # then padding asks too, but nobody reads it
            weights = dense_weights(tape.all("weights"), length)[0][place][:, place]
        else:
            weights = dense_weights(tape.all("weights"), max(1, len(place)))[0]
        return _Reading(awake, chance, place, weights[: len(place), : len(place)])

    def figure(self, query: int, **state: Any) -> Figure:
        """Above, how much each token wants to be awake; below, an arc from each awake token to those it reads."""
        it = self.reading(**state)
        length = len(it.awake)
        fig, (top, bottom) = plt.subplots(2, 1, figsize=(10.5, 4.6), height_ratios=(1, 1.5), layout="none")
        fig.subplots_adjust(left=0.065, right=0.985, bottom=0.12, top=0.93, hspace=0.2)
        legend = []
        for who, colour, name in ((it.awake, "vermilion", "awake"), (~it.awake, "sky", "asleep")):
            at = who.nonzero().squeeze(1).numpy()
            top.bar(at, it.chance.numpy()[at], width=0.85, color=OKABE_ITO[colour])
            legend.append(Patch(color=OKABE_ITO[colour], label=f"{name}: {len(at)}"))
        top.axhline(0.5, color="#555555", linewidth=1, linestyle="--", marker="")
        top.set(ylabel="p(activate)", ylim=(0, 1.02))
        top.legend(handles=legend, ncols=2, fontsize="small", loc="lower right", bbox_to_anchor=(1.0, 0.97))
        top.tick_params(labelbottom=False)  # the positions stand below
        self._arcs(bottom, it, query)
        if self.labels is not None and length <= LETTERED:
            size = 9 if length <= 60 else 7
            top.set_xticks(range(length), self.labels, fontsize=size, family="monospace")
            top.tick_params(axis="x", labelbottom=True, length=0, pad=2)
            for label, awake in zip(top.get_xticklabels(), it.awake, strict=True):
                label.set_color(OKABE_ITO["vermilion"] if awake else "#777777")
                label.set_fontweight("bold" if awake else "normal")
        for ax in (top, bottom):
            ax.set_xlim(-0.75, length - 0.25)
            ax.grid(axis="x", visible=False)
        return fig

    def _arcs(self, ax: Axes, it: _Reading, query: int) -> None:
        """Arcs between original positions, as high as the distance, as wide as the weight; the query's stand out."""
        turn = np.linspace(0, np.pi, 61)
        largest = max(float(it.weights.max()) if it.weights.numel() else 0.0, 1e-12)
        place = it.place.numpy()
        for mine in (False, True):
            lines, widths = [], []
            for i, j in (it.weights > FAINT * largest).nonzero().tolist():
                start, end = place[i], place[j]
                if start == end or (start == query) != mine:
                    continue
                along = start + (end - start) * (1 - np.cos(turn)) / 2
                lines.append(np.column_stack([along, abs(end - start) * np.sin(turn)]))
                widths.append(3.0 * float(it.weights[i, j]) / largest)
            colour = OKABE_ITO["blue"] if mine else "#8A8A86"
            ax.add_collection(LineCollection(lines, linewidths=widths, colors=colour, alpha=1.0 if mine else 0.5))
        ax.plot(place, 0 * place, linestyle="", marker="o", markersize=4, markevery=1, color=OKABE_ITO["vermilion"])
        ax.plot([query], [0], linestyle="", marker="D", markersize=8, color=OKABE_ITO["blue"], clip_on=False)
        tall = max(_reach(it), len(it.awake) / 10)  # short arcs stay small
        ax.set(xlabel="position (tokens)", ylabel="distance (tokens)", ylim=(-0.06 * tall, 1.08 * tall))
        ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))

    def describe(self, query: int, **state: Any) -> str:
        """The same in words."""
        it = self.reading(**state)
        count, length = len(it.place), len(it.awake)
        head = f"{count} of {_tokens(length)} {'is' if count == 1 else 'are'} awake ({fmt(100 * count / length)} %)"
        if not count:
            return head + ": nobody attends, and the unit gives zeros."
        unit = self._call(state.get("layer", ""))[0]
        mean = fmt(float(it.chance[it.awake].mean()))
        head += ", as always. " if unit.router is None else f", with confidence {mean} on average. "
        if not it.awake[query]:
            who = f"Query {self._name(query)} is asleep: it reads nothing and gives 0."
        else:
            row = it.weights[int((it.place == query).nonzero()[0])]
            top = int((row >= row.max() - 1e-9).nonzero()[0])  # the first of equals, whatever the rounding
            away = abs(int(it.place[top]) - query)
            who = (
                f"Query {self._name(query)} reads {_keys(int((row > 0).sum()))}, most of it from "
                f"{self._name(int(it.place[top]))}, {_tokens(away)} away, with weight {fmt(float(row[top]))}."
            )
        return f"{head}{who} The longest arc in this window of {state['window']} spans {_tokens(_reach(it))}."

    def _name(self, position: int) -> str:
        return str(position) if self.labels is None else f"{position} ({self.labels[position]!r})"


def _reach(it: _Reading) -> int:
    """The longest distance over which anybody reads."""
    read = it.weights > FAINT * max(float(it.weights.max()) if it.weights.numel() else 0.0, 1e-12)
    return max([int((it.place[i] - it.place[j]).abs()) for i, j in read.nonzero().tolist()], default=0)


def _tokens(number: int) -> str:
    return f"{number} token{'s' * (number != 1)}"


def _keys(number: int) -> str:
    return f"{number} key{'s' * (number != 1)}"


def _watch(source: Any, inputs: tuple[Any, ...]) -> dict[str, _Call]:
    """Every unit inside with the (h, logits, mask) of its last call."""
    units = (
        {name or "unit": m for name, m in source.named_modules() if isinstance(m, SparseActivation)}
        if isinstance(source, nn.Module)
        else {}
    )
    if not units:
        raise TypeError(
            "WhoWakes wants a SparseActivation, or a module that holds one, and then what to call it with; "
            f"got {type(source).__name__}. Pass the unit inside your model, or the whole model."
        )
    given: dict[str, dict[str, Tensor | None]] = {}
    hooks = []
    for name, unit in units.items():

        def keep(_unit: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            given[name] = dict(zip(("h", "logits", "mask"), args, strict=False)) | kwargs

        hooks.append(unit.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            source(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    calls: dict[str, _Call] = {}
    for name, tensors in given.items():
        h, logits, mask = (tensors.get(key) for key in ("h", "logits", "mask"))
        assert h is not None  # the unit ran
        calls[name] = (
            copy.deepcopy(units[name]).double().cpu().eval(),
            h.detach().double().cpu(),
            None if logits is None else logits.detach().double().cpu(),
            None if mask is None else mask.cpu(),
        )
    if not calls:
        raise TypeError(f"{type(source).__name__} ran, but none of its SparseActivation units was called.")
    return calls
