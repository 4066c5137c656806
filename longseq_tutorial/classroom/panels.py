"""Interactive figures on core ipywidgets, each of which also says in words what it shows.

A panel is a class with controls and two pure methods::

    class Decay(Panel):
        title = "How fast an EMA forgets"
        controls = {
            "alpha": Slider("alpha, weight of the new input", 0.01, 0.99, value=0.3),
            "length": IntSlider("length (steps)", 8, 256, value=64),
            "scale": Choice("scale", ("linear", "log")),
        }

        def figure(self, alpha, length, scale):    # state -> matplotlib Figure
            ...

        def describe(self, alpha, length, scale):  # state -> the same, in words, with its key numbers
            ...

    panel = Decay()
    panel                                   # shows it: controls, picture, words
    print(panel.set(alpha=0.9).say())       # drives it, and prints what it now says

A panel about a module or a tensor takes it in its own `__init__`, any that fits, and reads the
controls' ranges off it; it ends with `super().__init__()`. Why no `interact` and no `Output` widget:
their pictures live in messages that no test can compare and some frontends drop. Here the picture is
an `<img>` inside an HTML widget, so it is stored with the notebook, is shown without a kernel, and the
words beside it are compared like any other output.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import ipywidgets as widgets
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from longseq_tutorial.classroom.figures import image_html, png_bytes

__all__ = ["Choice", "Control", "IntSlider", "LogSlider", "Panel", "Slider", "Toggle"]

LABEL = {"description_width": "17em"}
WIDE = "40em"


@dataclass(frozen=True)
class Slider:
    """A real number in [low, high]: a slider and a number box that always agree.

    `step` is by how much one key press moves it; by default a hundredth of the range.
    """

    label: str
    low: float
    high: float
    value: float
    step: float | None = None

    def accept(self, name: str, value: Any) -> float:
        return _number_between(name, value, self.low, self.high)

    def build(self) -> tuple[widgets.Widget, ...]:
        step = self.step or (self.high - self.low) / 100
        limits = {"min": self.low, "max": self.high, "step": step, "value": self.value}
        slider = widgets.FloatSlider(**limits, **_slider_look(self.label))
        box = widgets.BoundedFloatText(**limits, **_box_look(self.label))
        return slider, box


@dataclass(frozen=True)
class IntSlider:
    """A whole number in [low, high]: a slider and a number box that always agree."""

    label: str
    low: int
    high: int
    value: int
    step: int = 1

    def accept(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or int(_number_between(name, value, self.low, self.high)) != value:
            raise ValueError(f"{name} wants a whole number in [{self.low}, {self.high}]; got {value!r}.")
        return int(value)

    def build(self) -> tuple[widgets.Widget, ...]:
        limits = {"min": self.low, "max": self.high, "value": self.value}
        slider = widgets.IntSlider(step=self.step, **limits, **_slider_look(self.label))
        box = widgets.BoundedIntText(**limits, **_box_look(self.label))
        return slider, box


@dataclass(frozen=True)
class LogSlider:
    """A positive number in [low, high] on a logarithmic slider, with a number box that always agrees.

    `steps` is how many key presses lead from one end to the other.
    """

    label: str
    low: float
    high: float
    value: float
    steps: int = 60

    def accept(self, name: str, value: Any) -> float:
        return _number_between(name, value, self.low, self.high)

    def build(self) -> tuple[widgets.Widget, ...]:
        low, high = math.log10(self.low), math.log10(self.high)
        scale = {"base": 10, "min": low, "max": high, "step": (high - low) / self.steps, "value": self.value}
        limits = {"min": self.low, "max": self.high, "value": self.value}
        slider = widgets.FloatLogSlider(**scale, **_slider_look(self.label))
        box = widgets.BoundedFloatText(**limits, **_box_look(self.label))
        return slider, box


@dataclass(frozen=True)
class Choice:
    """One of several options (strings or numbers) in a dropdown; the first unless `value` says otherwise."""

    label: str
    options: Sequence[Any]
    value: Any = None

    def accept(self, name: str, value: Any) -> Any:
        if value not in self.options:
            raise ValueError(f"{name} wants one of {list(self.options)}; got {value!r}.")
        return value

    def build(self) -> tuple[widgets.Widget, ...]:
        options = [(str(option), option) for option in self.options]
        look = {"style": LABEL, "layout": widgets.Layout(width="auto", min_width="24em"), "tooltip": self.label}
        return (widgets.Dropdown(description=self.label, options=options, value=self.start, **look),)

    @property
    def start(self) -> Any:
        return self.options[0] if self.value is None else self.value


@dataclass(frozen=True)
class Toggle:
    """Yes or no: a checkbox."""

    label: str
    value: bool = False

    def accept(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} wants True or False; got {value!r}.")
        return value

    def build(self) -> tuple[widgets.Widget, ...]:
        return (widgets.Checkbox(description=self.label, value=self.value, indent=False, layout=_width("auto")),)


Control = Slider | IntSlider | LogSlider | Choice | Toggle


class Panel:
    """An interactive figure. Subclass it: `controls`, `figure(**state)` and `describe(**state)`.

    Attributes:
        title: one line above the controls.
        controls: name -> control. On the class, or set on `self` before `super().__init__()`.
        error: what went wrong at the last redraw, or None.

    Args:
        start: values that replace the controls' own starting values.

    Raises:
        TypeError: no controls, or an unknown name in `start`.
        ValueError: a starting value that its control does not accept.
    """

    title: str = ""
    controls: Mapping[str, Control] = {}

    def __init__(self, **start: Any) -> None:
        if not self.controls:
            raise TypeError(
                f"{type(self).__name__} wants at least one control; got none. "
                'Set controls = {"name": Slider(...)} on the class, or on self before super().__init__().'
            )
        self.error: str | None = None
        self._png = b""
        self._words = ""
        self._syncing = False
        self._state = {
            name: control.accept(name, control.start if isinstance(control, Choice) else control.value)
            for name, control in self.controls.items()
        }
        self._widgets = {name: control.build() for name, control in self.controls.items()}
        self._picture = widgets.HTML()
        self._text = widgets.HTML()
        self._box = self._layout()
        self._state.update(self._accepted(start))
        self._refresh()
        for name, group in self._widgets.items():
            for widget in group:
                widget.observe(lambda change, name=name: self._moved(name, change["new"]), names="value")

    def figure(self, *args: Any, **state: Any) -> Figure:
        """Return the picture for this state. Pure: it depends on its arguments and on nothing it changes."""
        raise NotImplementedError(f"{type(self).__name__} has no figure(self, {', '.join(self.controls)}) yet.")

    def describe(self, *args: Any, **state: Any) -> str:
        """Return in words, with the key numbers, what the picture for this state shows."""
        raise NotImplementedError(f"{type(self).__name__} has no describe(self, {', '.join(self.controls)}) yet.")

    @property
    def state(self) -> dict[str, Any]:
        """The controls' values now, as a new dict."""
        return dict(self._state)

    def set(self, **values: Any) -> Self:
        """Move controls, redraw once, and return the panel itself, so that `.say()` can follow.

        Raises:
            TypeError: a name that no control has.
            ValueError: a value outside what the control accepts. Nothing moves then.
        """
        self._state.update(self._accepted(values))
        self._refresh()
        return self

    def say(self) -> str:
        """Return what the panel now says in words."""
        return self._words

    def show(self) -> None:
        """Display the panel (the same as naming it on a cell's last line)."""
        from IPython.display import display

        display(self)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """The live widget; for viewers without widgets the picture; and the words, which tests compare."""
        bundle = {"text/plain": self._words, "text/html": self._static_html()}
        widget = self._box._repr_mimebundle_() or {}
        bundle.update({kind: value for kind, value in widget.items() if kind != "text/plain"})
        return bundle

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self._state.items())})"

    def _accepted(self, values: Mapping[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(values) - set(self.controls))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} has the controls {', '.join(self.controls)}; got {', '.join(unknown)}."
            )
        return {name: self.controls[name].accept(name, value) for name, value in values.items()}

    def _layout(self) -> widgets.Widget:
        rows: list[widgets.Widget] = []
        if self.title:
            rows.append(widgets.HTML(f"<strong>{html.escape(self.title)}</strong>"))
        rows += [widgets.HBox(group, layout=widgets.Layout(flex_flow="row wrap")) for group in self._widgets.values()]
        return widgets.VBox([*rows, self._picture, self._text])

    def _moved(self, name: str, value: Any) -> None:
        """A reader moved one of the widgets of control `name`."""
        if self._syncing:
            return
        if isinstance(value, float):
            value = float(f"{value:.10g}")  # 0.30000000000000004 is noise of the slider's arithmetic
        self._state[name] = value
        self._refresh()

    def _refresh(self) -> None:
        """Bring both widgets of every control, the picture and the words to the present state."""
        self._syncing = True
        try:
            for name, group in self._widgets.items():
                for widget in group:
                    if widget.value != self._state[name]:
                        widget.value = self._state[name]
        finally:
            self._syncing = False
        self._redraw()

    def _redraw(self) -> None:
        try:
            words = " ".join(str(self.describe(**self._state)).split())
            fig = self.figure(**self._state)
            self._png = png_bytes(fig)
            plt.close(fig)
            self.error = None
        except Exception as error:  # a reader's module may refuse a setting; the panel lives on
            self.error = f"{type(error).__name__}: {error}"
            words = f"This setting could not be drawn. {self.error}"
            self._png = b""
        self._words = words
        self._picture.value = image_html(self._png, words) if self._png else ""
        self._text.value = f'<div role="status" aria-live="polite">{html.escape(words)}</div>'

    def _static_html(self) -> str:
        title = f"<p><strong>{html.escape(self.title)}</strong></p>" if self.title else ""
        picture = image_html(self._png, self._words) if self._png else ""
        return f"{title}{picture}<p>{html.escape(self._words)}</p>"


def _number_between(name: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not low <= number <= high:
        raise ValueError(f"{name} wants a number in [{low:g}, {high:g}]; got {value!r}.")
    return number


def _width(width: str) -> widgets.Layout:
    return widgets.Layout(width=width)


def _slider_look(label: str) -> dict[str, Any]:
    """The slider reports when it is let go, or a key was pressed.

    With `continuous_update` it would also report each value that it is told, rounded to its own steps, and so
    undo what the number box or `Panel.set` gave exactly.
    """
    look = {"style": LABEL, "layout": widgets.Layout(width=WIDE, max_width="100%")}
    return {"description": label, "tooltip": label, "readout": False, "continuous_update": False, **look}


def _box_look(label: str) -> dict[str, Any]:
    """The box's own label has no width: the slider beside it shows the words, a screen reader reads them."""
    look = {"style": {"description_width": "0px"}, "layout": _width("8em")}
    return {"description": label, "tooltip": f"{label}: type a value", **look}
