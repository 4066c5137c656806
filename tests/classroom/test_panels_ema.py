"""The EMA panel draws every source it promises to take, says true numbers, and refuses the rest in words."""

import math

import pytest
import torch
from torch import nn

from longseq_tutorial.classroom.panels_ema import EMAMemory, frequency_response, half_life
from longseq_tutorial.mechanisms.ema import DampedEMA, ema_kernel


class Convolution(nn.Module):
    """Some other mechanism with a kernel."""

    def kernel(self, length):
        return torch.linspace(1, 0, length).repeat(3, 1).requires_grad_()


SOURCES = {
    "nothing": lambda: None,
    "ema": lambda: DampedEMA(2, 3),
    "bidirectional": lambda: DampedEMA(2, 1, bidirectional=True, truncation=7),
    "bfloat16": lambda: DampedEMA(1, 2).bfloat16(),
    "module": Convolution,
    "rows": lambda: torch.randn(3, 20),
    "one row": lambda: torch.tensor([1.0, 0.5]),
    "one number": lambda: torch.ones(1),
    "silence": lambda: torch.zeros(2, 9),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_drawn_at_its_extremes(name):
    torch.manual_seed(0)
    panel = EMAMemory(SOURCES[name](), scale="log", signal="fast wave")
    assert panel.error is None, panel.say()
    ends = {
        key: control.high for key, control in panel.controls.items() if hasattr(control, "high") and key != "length"
    }
    panel.set(**ends, length=panel.controls["length"].low, scale="linear", signal="impulse")
    assert panel.error is None, panel.say()
    assert "nan" not in panel.say().lower()


def test_words_tell_the_numbers():
    words = EMAMemory(None, alpha=0.3, delta=0.5, length=64).say()
    assert "q = 0.850" in words
    assert "half-life of 4.3 steps" in words
    assert "gain is 2.0 at frequency 0" in words  # eta * beta / delta
    assert "starts at 0.30" in words


def test_a_trained_module_is_read_afresh_and_stretched():
    ema = DampedEMA(1, 1)
    with torch.no_grad():
        ema.alpha_logit.fill_(-2.0)
        ema.delta_logit.fill_(-1.0)
    panel = EMAMemory(ema)
    alpha, delta, beta, eta = (c.detach().double() for c in ema.coefficients())
    life = half_life(alpha, delta).item()
    stretched = panel._kernel_of(50, channel=0, stretch=4.0)
    torch.testing.assert_close(panel._kernel_of(50, channel=0, stretch=1.0), ema_kernel(alpha, delta, beta, eta, 50)[0])
    want = (alpha * beta * eta).item() * 0.5 ** (torch.arange(50).double() / (4 * life))
    torch.testing.assert_close(stretched, want)
    with torch.no_grad():
        ema.alpha_logit.fill_(3.0)
    assert panel._kernel_of(2, channel=0, stretch=1.0)[0] > 2 * want[0] or want[0] < 0


def test_backward_rows_hear_the_future():
    panel = EMAMemory(DampedEMA(1, 2, bidirectional=True), signal="impulse", length=40)
    for channel, silent in ((0, slice(0, 10)), (1, slice(11, 40))):
        own = {"channel": channel, "stretch": 1.0}
        x, y = panel._respond(panel._kernel_of(40, **own), "impulse", 40, own)
        assert x[10] == 1
        assert y[silent].abs().max() < 1e-12 < y[10].abs()
    assert "looks ahead" in panel.set(channel=1).say()
    assert "looks ahead" not in panel.set(channel=0).say()


def test_half_life_and_frequency_response():
    alpha, delta = torch.tensor([0.5, 1e-3]), torch.tensor([1.0, 1e-4])
    assert half_life(alpha, delta)[0] == pytest.approx(1.0)
    assert half_life(alpha, delta)[1] == pytest.approx(math.log(2) / 1e-7, rel=1e-5)
    frequencies, gain = frequency_response(torch.tensor([[0.5, -0.5], [0.5, 0.5]], dtype=torch.float64))
    assert frequencies[0] == 0 and frequencies[-1] == 0.5
    torch.testing.assert_close(gain[:, [0, -1]], torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (3, TypeError, "DampedEMA"),
        (nn.Linear(2, 2), TypeError, "layer.ema"),
        (torch.ones(2, 3, 4), ValueError, r"\(K,\) or \(E, K\)"),
        (torch.ones(2, 0), ValueError, "not empty"),
        (torch.ones(3, dtype=torch.complex64), ValueError, "real"),
        (torch.tensor([1.0, math.nan]), ValueError, "finite"),
    ],
)
def test_wrong_sources_are_refused_in_words(source, error, words):
    with pytest.raises(error, match=words):
        EMAMemory(source)
