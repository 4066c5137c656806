"""Frequencies and memories of filters: what notebook 11 measures with."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from longseq_tutorial import models, tasks
from longseq_tutorial.classroom.filters import centre_and_width, half_rate, hertz, kernels, mel, mel_bank, memory
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.s4 import S4, S4D

RATE = 8_000


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.floats(0, 20_000))
def test_mel_and_back(frequency):
    assert hertz(mel(frequency)) == pytest.approx(frequency, abs=1e-6)


def test_a_thousand_hertz_are_a_thousand_mel():
    assert mel(1_000) == pytest.approx(1_000, abs=0.1)
    assert mel(0) == 0


def test_a_mel_bank_is_even_in_mel_and_widens():
    centres, widths = mel_bank(40, RATE)
    assert centres.shape == widths.shape == (40,)
    assert np.allclose(np.diff(mel(centres)), mel(centres[0]))
    assert (np.diff(widths) > 0).all() and 0 < centres[0] and centres[-1] < RATE / 2


@pytest.mark.parametrize("frequency", [250.0, 1_000.0, 3_125.0])
def test_the_centre_of_a_tone_and_the_width_of_its_window(frequency):
    time = torch.arange(400, dtype=torch.float64) / RATE
    tone = torch.sin(2 * torch.pi * frequency * time)[None]
    centre, width = centre_and_width(tone, RATE, n=4_096)
    assert float(centre) == pytest.approx(frequency, abs=RATE / 4_096)
    assert float(width) == pytest.approx(RATE / 400, rel=0.02)  # a stretch of T seconds cannot tell closer than 1 / T


def test_a_click_answers_to_the_whole_band():
    _, width = centre_and_width(F.one_hot(torch.tensor([0]), 7).double(), RATE)
    assert float(width) == pytest.approx(RATE / 2, rel=0.01)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100), st.integers(0, 99))
def test_louder_filters_are_no_other_filters(factor, seed):
    bank = normal(3, 20, seed=seed)
    for one, other in zip(centre_and_width(bank, RATE), centre_and_width(-factor * bank, RATE), strict=True):
        assert torch.allclose(one.double(), other.double())


@pytest.mark.parametrize("length", [1, 7, 40, 41])
def test_filters_at_half_rate_are_the_filters_on_held_samples(length):
    bank, x = normal(3, 2, 8), normal(2, 2, length, seed=1)
    held = x.repeat_interleave(2, dim=-1)
    wanted = F.conv1d(F.pad(held, (6, 8)), bank, stride=2)
    got = F.conv1d(F.pad(x, (3, 4)), half_rate(bank), stride=1)
    assert torch.allclose(got, wanted, atol=1e-12)


def test_half_rate_refuses_an_odd_number():
    with pytest.raises(ValueError, match="wanted an even number of taps, to be summed in pairs; got 5"):
        half_rate(torch.ones(2, 5))


def test_the_kernels_of_a_model():
    task = tasks.TaskConfig(name="speech", kind="samples", classes=2, length=64, sample_rate=RATE)
    mega = models.build("mega", task, dim=4, layers=2, z_dim=4, v_dim=8, ffn_dim=8, n=2, head_dim=4)
    found = kernels(mega, 9)
    assert len(found) == 2 and {tuple(kernel.shape) for kernel in found.values()} == {(8, 9)}
    ema = mega.encoder.layers[1].mega.ema
    assert torch.equal(list(found.values())[1], ema.kernel(9)) and not list(found.values())[1].requires_grad
    assert kernels(nn.Linear(2, 2), 5) == {}


@pytest.mark.parametrize("module", [DampedEMA(3, 2), S4(3, 4, bidirectional=True), S4D(3, 4)])
def test_kernels_of_every_long_convolution(module):
    (kernel,) = kernels(nn.Sequential(module), 17).values()
    assert kernel.shape == (6 if getattr(module, "bidirectional", False) else 3, 17)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_the_memory_of_an_exponential(decay):
    kernel = -3 * decay ** torch.arange(4_000, dtype=torch.float64)
    wanted = np.log(0.1) / np.log(decay)  # 1 - decay**k = 0.9
    assert int(memory(kernel[None])) == int(np.ceil(wanted - 1e-9))


def test_the_memory_of_a_click_and_of_a_late_echo():
    assert memory(torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]])).tolist() == [1, 4]
    with pytest.raises(ValueError, match="share must lie between 0 and 1; got 1"):
        memory(torch.ones(1, 3), 1)
