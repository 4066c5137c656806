"""Panels: controls agree with one another, words follow the state, nothing a reader does kills one."""

import math
import re
from typing import Any

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from longseq_tutorial.classroom.panels import Choice, IntSlider, LogSlider, Panel, Slider, Toggle


class Decay(Panel):
    """A panel with each kind of control."""

    title = "How fast <an average> forgets"
    controls = {  # noqa: RUF012
        "alpha": Slider("alpha, weight of the new input", 0.01, 0.99, value=0.3, step=0.01),
        "length": IntSlider("length (steps)", 1, 50, value=20),
        "dt": LogSlider("dt (seconds)", 1e-4, 1.0, value=0.01),
        "scale": Choice("scale", ("linear", "log")),
        "grid": Toggle("grid"),
    }
    drawn = 0

    def figure(self, **state: Any) -> Figure:
        type(self).drawn += 1
        fig = Figure(figsize=(2, 1))
        fig.subplots().plot(range(state["length"]))
        return fig

    def describe(self, **state: Any) -> str:
        return ", ".join(f"{name} is {value}" for name, value in state.items())


def pair(panel: Panel, name: str) -> tuple[Any, Any]:
    slider, box = panel._widgets[name]
    return slider, box


def test_starts_where_its_controls_start() -> None:
    panel = Decay()
    assert panel.state == {"alpha": 0.3, "length": 20, "dt": 0.01, "scale": "linear", "grid": False}
    assert panel.say() == "alpha is 0.3, length is 20, dt is 0.01, scale is linear, grid is False"


def test_start_values_can_be_given() -> None:
    assert Decay(alpha=0.5, scale="log").state["alpha"] == 0.5


def test_set_moves_widgets_words_and_picture() -> None:
    panel = Decay()
    before = panel._picture.value
    assert panel.set(alpha=0.9, length=3, dt=0.5, scale="log", grid=True) is panel
    assert panel.say() == "alpha is 0.9, length is 3, dt is 0.5, scale is log, grid is True"
    for name in ("alpha", "length", "dt"):
        slider, box = pair(panel, name)
        assert slider.value == pytest.approx(panel.state[name])
        assert box.value == panel.state[name]
    assert panel._widgets["scale"][0].value == "log"
    assert panel._widgets["grid"][0].value is True
    assert panel._picture.value != before
    assert "alpha is 0.9" in panel._picture.value and "alpha is 0.9" in panel._text.value


def test_set_draws_once() -> None:
    panel = Decay()
    before = Decay.drawn
    panel.set(alpha=0.9, length=3, dt=0.5, scale="log", grid=True)
    assert Decay.drawn == before + 1


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name, value", [("alpha", 0.77), ("length", 7), ("dt", 0.1)])
def test_slider_and_number_box_follow_each_other(name: str, value: float, which: int) -> None:
    panel = Decay()
    before = Decay.drawn
    pair(panel, name)[which].value = value
    assert pair(panel, name)[1 - which].value == pytest.approx(value)
    assert panel.state[name] == pytest.approx(value)
    assert f"{name} is {value}" in panel.say()
    assert Decay.drawn == before + 1


def test_sliders_report_only_what_a_reader_did() -> None:
    """With continuous updates a browser sends back its own rounding of what it was told."""
    panel = Decay()
    assert not any(pair(panel, name)[0].continuous_update for name in ("alpha", "length", "dt"))


def test_choice_and_toggle_move_the_panel() -> None:
    panel = Decay()
    panel._widgets["scale"][0].value = "log"
    panel._widgets["grid"][0].value = True
    assert "scale is log, grid is True" in panel.say()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"alpha": 1.5}, r"alpha wants a number in \[0.01, 0.99\]; got 1.5"),
        ({"alpha": math.nan}, "got nan"),
        ({"alpha": "a lot"}, "got 'a lot'"),
        ({"alpha": True}, "got True"),
        ({"alpha": None}, "got None"),
        ({"length": 2.5}, "whole number"),
        ({"length": 51}, "got 51"),
        ({"length": True}, "whole number"),
        ({"dt": 0}, "got 0"),
        ({"scale": "cubic"}, r"one of \['linear', 'log'\]; got 'cubic'"),
        ({"grid": 1}, "True or False; got 1"),
    ],
)
def test_set_refuses_bad_values_and_moves_nothing(values: dict[str, Any], words: str) -> None:
    panel = Decay()
    before = panel.state
    with pytest.raises(ValueError, match=words):
        panel.set(scale="log", **values) if "scale" not in values else panel.set(**values)
    assert panel.state == before


def test_unknown_names_are_refused() -> None:
    with pytest.raises(TypeError, match=r"controls alpha, length, dt, scale, grid; got beta"):
        Decay().set(beta=1)
    with pytest.raises(TypeError, match="got beta"):
        Decay(beta=1)


def test_a_panel_without_controls_is_refused() -> None:
    class Empty(Panel):
        pass

    with pytest.raises(TypeError, match="at least one control"):
        Empty()


def test_a_start_outside_its_range_is_refused() -> None:
    class Off(Decay):
        controls = {"alpha": Slider("alpha", 0, 1, value=2)}  # noqa: RUF012

    with pytest.raises(ValueError, match="got 2"):
        Off()


class Fragile(Panel):
    controls = {"x": IntSlider("x", 0, 3, value=1)}  # noqa: RUF012

    def figure(self, x: int) -> Figure:
        if x == 2:
            raise RuntimeError("no <such> size")
        return Figure(figsize=(1, 1))

    def describe(self, x: int) -> str:
        return f"one over x is {1 / x}"


def test_an_error_is_shown_and_survived() -> None:
    panel = Fragile()
    panel.set(x=2)
    assert panel.error == "RuntimeError: no <such> size"
    assert panel.say() == "This setting could not be drawn. RuntimeError: no <such> size"
    assert "no &lt;such&gt; size" in panel._text.value
    assert "<img" not in panel._repr_mimebundle_()["text/html"]
    pair(panel, "x")[0].value = 0
    assert "ZeroDivisionError" in panel.say()
    assert panel.set(x=3).error is None
    assert "one over x" in panel.say() and "<img" in panel._picture.value


def test_forgotten_methods_are_named() -> None:
    class Half(Panel):
        controls = {"x": Toggle("x")}  # noqa: RUF012

    assert "describe(self, x)" in Half().say()


def test_figures_do_not_pile_up() -> None:
    class Drawn(Fragile):
        def figure(self, x: int) -> Figure:
            return plt.subplots(figsize=(1, 1))[0]

    panel, others = Drawn(), plt.get_fignums()  # what another test has left open is not the panel's
    for x in (1, 2, 3, 1):
        panel.set(x=x)
    assert plt.get_fignums() == others


def test_bundle_serves_every_viewer() -> None:
    panel = Decay()
    bundle = panel._repr_mimebundle_()
    assert bundle["text/plain"] == panel.say()
    assert bundle["application/vnd.jupyter.widget-view+json"]["model_id"] == panel._box.model_id
    html = bundle["text/html"]
    assert "How fast &lt;an average&gt; forgets" in html
    assert re.search(r'<img alt="alpha is 0.3, [^"]*" .*src="data:image/png;base64,[A-Za-z0-9+/=]+"', html)


def test_shown_again_it_is_the_same_panel() -> None:
    panel = Decay()
    first, again = panel._repr_mimebundle_(), panel._repr_mimebundle_()
    assert first == again
    panel.set(alpha=0.5)
    view = "application/vnd.jupyter.widget-view+json"
    assert panel._repr_mimebundle_()[view] == first[view]
    assert "alpha is 0.5" in panel._repr_mimebundle_()["text/plain"]


def test_only_core_widgets_and_each_has_a_name() -> None:
    panel = Decay()

    def walk(widget: widgets.Widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    every = list(walk(panel._box))
    assert {widget._model_module for widget in every} == {"@jupyter-widgets/controls"}
    assert not any(isinstance(widget, widgets.Output) for widget in every)
    for name, group in panel._widgets.items():
        label = panel.controls[name].label
        assert group[0].description == label
        assert all(label in (widget.description or widget.tooltip) for widget in group)


def test_a_panel_about_a_module_of_the_reader() -> None:
    class Weights(Panel):
        def __init__(self, layer: torch.nn.Module, **start: Any) -> None:
            self.weight = layer.weight
            self.controls = {"row": IntSlider("row", 0, len(self.weight) - 1, 0)}
            super().__init__(**start)

        def figure(self, row: int) -> Figure:
            fig = Figure()
            fig.subplots().plot(self.weight[row].detach())
            return fig

        def describe(self, row: int) -> str:
            return f"row {row} has {len(self.weight[row])} weights"

    one, other = Weights(torch.nn.Linear(5, 3), row=2), Weights(torch.nn.Linear(7, 9))
    assert (one.say(), one.error) == ("row 2 has 5 weights", None)
    assert other.set(row=8).say() == "row 8 has 7 weights"
    assert one.state == {"row": 2}


@given(st.floats(1e-4, 1.0), st.floats(0.01, 0.99))
def test_any_value_in_range_is_kept_exactly(dt: float, alpha: float) -> None:
    panel = Still()
    panel.set(dt=dt, alpha=alpha)
    assert panel.state["dt"] == dt and panel.state["alpha"] == alpha
    assert panel._widgets["dt"][1].value == dt
    assert panel._widgets["alpha"][0].value == alpha


class Still(Decay):
    """Draws nothing, for tests that set many values."""

    def _redraw(self) -> None:
        self._words = ""
