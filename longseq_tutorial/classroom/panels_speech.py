"""The panel of notebook 11: a clip, louder or softer, in more or less noise, and what classifiers make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from longseq_tutorial.classroom.figures import OKABE_ITO, fmt
from longseq_tutorial.classroom.panels import Choice, Panel, Slider
from longseq_tutorial.classroom.sound import Classifier, mix, occlusion, player, probabilities
from longseq_tutorial.tasks import Split

__all__ = ["Listening"]

WINDOW, HOP = 0.05, 0.02  # seconds that are silenced at a time, and from one stretch to the next


class Listening(Panel):
    """Hear a clip, see it, and see the answer; then spoil the clip and look again.

    model: any classifier `(x (B, L), mask (B, L)) -> logits (B, classes)`, the course's or yours; or several to choose
        from, `{name: classifier}`.
    clips: a `Split`, or (1-D tensor, label) pairs. class_names: one for each logit. names: of the clips.
    Raises ValueError when a model's logits do not fit the class names.
    """

    title = "What the model makes of a clip"

    def __init__(
        self,
        model: Classifier | Mapping[str, Classifier],
        /,
        clips: Split | Sequence[tuple[Tensor, int]],
        class_names: Sequence[str],
        names: Sequence[str] | None = None,
        rate: int = 8_000,
        **start: Any,
    ) -> None:
        self.models = dict(model) if isinstance(model, Mapping) else {"the model": model}
        self.class_names, self.rate = tuple(class_names), rate
        self.clips = [clips[i] for i in range(len(clips))]
        self.names = [f"clip {i}" for i in range(len(clips))] if names is None else list(names)
        if not self.clips or len(self.names) != len(self.clips):
            raise ValueError(f"wanted at least one clip and a name for each; got {len(clips)} and {len(self.names)}.")
        if not self.models:
            raise ValueError("wanted a model, or a dictionary of at least one; got none.")
        for each in self.models.values():
            got = tuple(probabilities(each, self.clips[0][0]).shape)
            if got != (len(self.class_names),):
                raise ValueError(
                    f"wanted a model that gives one logit for each of the {len(self.class_names)} class names; "
                    f"got {got} for one clip. Pass class_names of that length."
                )
        labels = [int(label) for _, label in self.clips]
        if not all(0 <= label < len(self.class_names) for label in labels):
            raise ValueError(
                f"wanted labels in 0 to {len(self.class_names) - 1}, one for each class name; got "
                f"{min(labels)} to {max(labels)}."
            )
        self.controls = {
            "clip": Choice("clip", self.names),
            "model": Choice("model", list(self.models)),
            "gain": Slider("louder by (decibels)", -40, 20, 0, step=1),
            "noise": Slider("noise below the speech by (decibels)", -10, 60, 60, step=1),
        }
        self._sound = widgets.HTML()
        super().__init__(**start)

    def spoiled(self, clip: str, gain: float, noise: float, **_: Any) -> tuple[Tensor, int]:
        """The clip `(L,)` as the models hear it, and its label. The same noise for all: white, from one seed."""
        x, label = self.clips[self.names.index(clip)]
        hiss = torch.randn(len(x), generator=torch.Generator().manual_seed(0), dtype=x.dtype)
        return mix(x, hiss, noise) * 10 ** (gain / 20), label

    def figure(self, **state: Any) -> Figure:
        x, label = self.spoiled(**state)
        model = self.models[state["model"]]
        answer = probabilities(model, x)
        middles, falls = self._falls(model, x)
        time = np.arange(len(x)) / self.rate
        fig = plt.figure(figsize=(9.6, 4.2))
        grid = fig.add_gridspec(2, 2, width_ratios=(2.2, 1))
        wave, need, bars = (
            fig.add_subplot(grid[0, 0]),
            fig.add_subplot(grid[1, 0]),
            fig.add_subplot(grid[:, 1]),
        )
        wave.plot(time, x.numpy(), marker="", linewidth=0.6)
        wave.set(ylabel="sample", xlim=(0, float(time[-1])), title=f"{state['clip']}, heard by {state['model']}")
        need.bar(middles.numpy() / self.rate, falls.numpy(), width=0.9 * HOP, color=OKABE_ITO["orange"])
        need.axhline(0, color="black", linewidth=0.8)
        need.set(xlabel="time (s)", ylabel="fall of the logit", xlim=(0, float(time[-1])))
        need.set_title(f"what silencing {1000 * WINDOW:.0f} ms here costs the answer")
        colours = [OKABE_ITO["green"] if i == label else OKABE_ITO["sky"] for i in range(len(answer))]
        bars.barh(range(len(answer)), answer.numpy(), color=colours)
        bars.set(yticks=range(len(answer)), xlim=(0, 1), xlabel="probability", title="green: what was said")
        bars.set_yticklabels(self.class_names)
        bars.invert_yaxis()
        return fig

    def describe(self, **state: Any) -> str:
        x, label = self.spoiled(**state)
        model = self.models[state["model"]]
        answer = probabilities(model, x)
        first, second = answer.topk(2).indices.tolist()
        middles, falls = self._falls(model, x)
        verdict = "right" if first == label else f"wrong: it is {self.class_names[label]!r}"
        return (
            f"{state['clip']}, {fmt(len(x) / self.rate)} s, {state['gain']:+.0f} dB, noise {state['noise']:.0f} dB "
            f"below the speech: {state['model']} hears {self.class_names[first]!r} with probability "
            f"{answer[first]:.2f} ({verdict}), then {self.class_names[second]!r} with {answer[second]:.2f}. "
            f"It needs most what lies around {float(middles[falls.argmax()]) / self.rate:.2f} s."
        )

    def _falls(self, model: Classifier, x: Tensor) -> tuple[Tensor, Tensor]:
        return occlusion(model, x, int(WINDOW * self.rate), int(HOP * self.rate))

    def _layout(self) -> widgets.Widget:
        box = super()._layout()
        box.children = (*box.children[:-2], self._sound, *box.children[-2:])
        return box

    def _redraw(self) -> None:
        super()._redraw()
        state: dict[str, Any] = self._state
        x, _ = self.spoiled(**state)
        self._sound.value = player(x, self.rate, f"{state['clip']} as {state['model']} hears it")
