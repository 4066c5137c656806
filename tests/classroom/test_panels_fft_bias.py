"""The panel of chapter 08 draws every source it promises to take, says true numbers, and refuses the rest in words."""

import math
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from longseq_tutorial.classroom import panels, use_style
from longseq_tutorial.classroom.panels_fft_bias import (
    PRESETS,
    PRODUCT,
    SEQUENCES,
    SUM,
    BiasOverDistance,
    drawing,
    drawn_lags,
    gain_of,
)
from longseq_tutorial.mechanisms.fft_bias import FastRPB, toeplitz_product_2d_dense, toeplitz_product_dense


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Figures are made in every test, but turned into pixels only where that is the point: it takes longest."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(panels, "png_bytes", lambda fig: b"")


class Ramp(nn.Module):
    """Some other mechanism with weights over offsets."""

    def lags(self, length):
        return torch.linspace(-1, 1, 2 * length - 1).repeat(3, 1).requires_grad_()


SOURCES = {
    "nothing": lambda: None,
    "sequence": lambda: FastRPB(2, 20),
    "causal": lambda: FastRPB(1, 700, causal=True),
    "symmetric": lambda: FastRPB(3, 1, symmetric=True),
    "separable": lambda: FastRPB(2, 28, layout="separable"),
    "bfloat16": lambda: FastRPB(2, 8).bfloat16(),
    "module": Ramp,
    "rows": lambda: torch.randn(3, 31),
    "one row": lambda: torch.randn(9),
    "one number": lambda: torch.ones(1),
    "silence": lambda: torch.zeros(2, 9),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_draws_at_its_extremes(name):
    torch.manual_seed(0)
    panel = BiasOverDistance(SOURCES[name](), input="noise")
    assert panel.error is None, panel.say()
    sliders = {key: control for key, control in panel.controls.items() if hasattr(control, "high")}
    panel.set(**{key: c.high for key, c in sliders.items()}, causal=True, symmetric=True)
    assert panel.error is None, panel.say()
    panel.set(**{key: c.low for key, c in sliders.items()}, causal=False)
    assert panel.error is None, panel.say()
    assert "nan" not in panel.say().lower()


@pytest.mark.parametrize(
    ("preset", "kind"),
    [*((preset, "noise") for preset in PRESETS), *(("decay", kind) for kind in (*SEQUENCES, SUM, PRODUCT))],
)
def test_every_preset_and_every_input(preset, kind):
    panel = BiasOverDistance(preset=preset, input=kind, length=8)
    assert panel.error is None and len(panel.say()) > 60, panel.say()


def test_draws_sequences_and_images_without_a_warning():
    use_style()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        panel = BiasOverDistance(input=SUM)
        assert panel.error is None and panel._png
        assert panel.set(input="noise").error is None and panel._png
    assert not plt.get_fignums()


def test_words_tell_the_numbers():
    said = BiasOverDistance(preset="shift", input="impulse", length=40).say()
    assert "79 weights stand for a matrix of 40 x 40 entries" in said
    assert "largest in size, 1.0, is at offset 8 (8 back)" in said and "0 % reads the future" in said
    assert "The gain is 1.0 at frequency 0, 1.0 for the fastest wave" in said
    assert "from 0 to 1.0" in said
    said = BiasOverDistance(preset="smooth").say()
    assert "add up to 1.0" in said and "Both directions weigh alike" in said and "(here)" in said
    assert "All of them are 0" in BiasOverDistance(preset="nothing").say()
    difference = BiasOverDistance(preset="difference").say()
    assert "add up to 0." in difference and "gain is 0 at frequency 0, 2.0 for the fastest" in difference


def test_effect_is_the_matrix_product():
    for kind in ("noise", SUM, PRODUCT):
        panel = BiasOverDistance(preset="random", back_4=0.7, ahead_12=-0.4)
        state = {k: v for k, v in panel.state.items() if k not in ("input", "length")}
        x, y, lags = panel._effect(kind, 20, state)
        torch.testing.assert_close(lags, panel.lags(len(x), **state))
        if kind == "noise":
            want = toeplitz_product_dense(lags[None], x[None, :, None, None])[0, :, 0, 0]
        elif kind == SUM:
            want = toeplitz_product_2d_dense(lags[None], x[None, :, :, None, None])[0, :, :, 0, 0]
        else:
            matrix = torch.stack([lags.flip(0)[27 - i : 55 - i] for i in range(28)])
            want = matrix @ x @ matrix.T
        torch.testing.assert_close(y, want)


def test_sliders_toggles_and_presets_shape_the_weights():
    offsets = torch.arange(-29, 30)
    panel = BiasOverDistance(preset="nothing", back_4=0.8, here=0.4)
    state = {k: v for k, v in panel.state.items() if k not in ("input", "length")}
    lags = panel.lags(30, **state)
    assert lags[offsets == 4] == pytest.approx(0.8) and lags[offsets == 2] == pytest.approx(0.6)
    assert lags[offsets == 8] == pytest.approx(0.4) and lags[offsets == -2] == pytest.approx(0.2)
    assert not lags[offsets.abs() >= 20].any()
    mirrored = panel.lags(30, **{**state, "symmetric": True})
    torch.testing.assert_close(mirrored, mirrored.flip(0))
    torch.testing.assert_close(mirrored[29:], lags[29:])
    causal = panel.lags(30, **{**state, "causal": True})
    assert not causal[:29].any() and torch.equal(causal[29:], lags[29:])
    with pytest.raises(ValueError, match="preset must be"):
        drawn_lags("wave", {}, 5)


def test_a_trained_module_is_read_afresh():
    module = FastRPB(2, 6)
    panel = BiasOverDistance(module)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[1, 5 + 2] = 3.0
    assert "All of them are 0" in panel.set(length=8).say()
    assert "3.0, is at offset 2 (2 back)" in panel.set(head=1).say()


def test_takes_an_input_of_the_reader():
    x = torch.linspace(0, 5, 33)
    said = BiasOverDistance(torch.ones(1), x).say()
    assert "the input, the result runs from 0 to 5.0" in said
    image = BiasOverDistance(torch.ones(1), drawing(17).float())
    assert image.error is None and image.state["input"] == "yours" and "33 weights" in image.say()


def test_gain_is_that_of_a_wave_far_from_the_ends():
    lags = drawn_lags("random", {}, 6)
    frequencies, gain = gain_of(lags)
    some = 37
    t = torch.arange(-5, 6, dtype=torch.float64)
    wave = torch.exp(-2j * math.pi * frequencies[some] * t)
    torch.testing.assert_close(gain[some], (lags * wave).sum().abs())


def test_the_drawing_is_a_stroke_on_an_empty_page():
    picture = drawing()
    assert picture.shape == (28, 28) and picture.min() == 0 and picture.max() == 1
    assert 0.05 < picture.mean() < 0.3 and not picture[:, :3].any()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "FastRPB"),
        ((nn.Linear(2, 2),), TypeError, "layer.bias"),
        ((torch.ones(2, 4),), ValueError, "odd number of offsets"),
        ((torch.ones(2, 3, 5),), ValueError, r"\(H, 2L-1\)"),
        ((torch.ones(2, 0),), ValueError, "odd"),
        ((torch.ones(3, dtype=torch.complex64),), ValueError, "real"),
        ((torch.tensor([1.0, math.nan, 0.0]),), ValueError, "finite"),
        ((FastRPB(2, 4, layout="full"),), ValueError, "2-D offset"),
        ((None, torch.ones(3, 4)), ValueError, r"image \(S, S\)"),
        ((None, torch.ones(1000)), ValueError, "at most 512"),
        ((None, "noise"), ValueError, "got str"),
    ],
)
def test_wrong_sources_are_refused_in_words(arguments, error, words):
    with pytest.raises(error, match=words):
        BiasOverDistance(*arguments)
