"""The panel of chapter 02 draws every source it promises to take, says true numbers, and refuses the rest in words."""

import math

import pytest
import torch
from torch import nn

from longseq_tutorial.classroom.panels_s4 import SIGNALS, StateMemory, legendre, memory_directions
from longseq_tutorial.mechanisms.s4 import KINDS, S4, S4D

SOURCES = {
    "nothing": lambda: None,
    "s4d": lambda: S4D(2, 8),
    "bilinear": lambda: S4D(1, 2, "real", "bilinear"),
    "bidirectional": lambda: S4D(2, 8, "inv", bidirectional=True),
    "bfloat16": lambda: S4D(2, 4).bfloat16(),
    "s4": lambda: S4(2, 8),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_drawn_at_its_extremes(name):
    torch.manual_seed(0)
    panel = StateMemory(SOURCES[name]())
    assert panel.error is None, panel.say()
    for end in ("low", "high"):
        panel.set(**{key: getattr(c, end) for key, c in panel.controls.items() if hasattr(c, end)})
        assert panel.error is None, panel.say()
        assert "nan" not in panel.say().lower()
    for key, control in panel.controls.items():
        for option in getattr(control, "options", ()):
            assert "nan" not in panel.set(**{key: option}).say().lower()
            assert panel.error is None, panel.say()


def test_polynomials_are_orthonormal():
    r = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    table = legendre(6, r.numpy())
    torch.testing.assert_close(table.T @ table / 20000, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-5)
    assert legendre(3, 1.0).tolist() == pytest.approx([1, math.sqrt(3), math.sqrt(5)])
    assert legendre(4, 0.3).shape == (4,)


def test_words_tell_the_numbers():
    words = StateMemory(kind="lin", states=8, dt=0.1, length=64, signal="two waves").say()
    assert "7 eigenvalues" in words  # three conjugate pairs, and 0, which has no twin
    assert f"half-lives from {math.log(2) / 0.05:.0f}" in words  # exp(-dt/2) a step
    assert f"to {2 * math.pi / (0.1 * math.pi):.0f} steps" in words  # the slowest turns by pi dt a step
    assert "the state's 7 real numbers tell 7 directions apart" in words


def test_slow_and_fast_eigenvalues_move_as_the_sliders_say():
    panel = StateMemory(kind="lin", states=4, dt=0.1)
    _, before, _ = panel._system(8, panel.state)
    _, after, _ = panel._system(8, {**panel.state, "real": 2.0, "imag": 3.0})
    torch.testing.assert_close(after.log().real, 2 * before.log().real)
    torch.testing.assert_close(after.log().imag, 3 * before.log().imag)


@pytest.mark.parametrize("make", [lambda: S4D(2, 8, "inv"), lambda: S4(2, 8), lambda: S4D(2, 8, "lin", "bilinear")])
def test_a_module_is_read_with_its_own_c(make):
    torch.manual_seed(0)
    layer = make().double()
    panel = StateMemory(layer, length=40, channel=1, reading="its own C")
    _, _, kernel, _ = panel._look(
        40, "its own C", 0, {k: panel.state[k] for k in ("channel", "real", "imag", "stretch")}
    )
    torch.testing.assert_close(kernel, layer.kernel(40)[1].detach())
    with torch.no_grad():
        layer.C.mul_(2)
    _, _, twice, _ = panel._look(
        40, "its own C", 0, {k: panel.state[k] for k in ("channel", "real", "imag", "stretch")}
    )
    torch.testing.assert_close(twice, 2 * kernel)


def test_what_the_state_tells_apart_is_rebuilt_and_the_rest_is_not():
    echoes = torch.zeros(3, 10, dtype=torch.float64)
    echoes[0, 2], echoes[1, 5], echoes[2, 7] = 1.0, 0.5, 1e-6  # the third too faint
    basis = memory_directions(echoes)
    assert basis.shape == (2, 10)
    rebuilt = basis.T @ (basis @ torch.ones(10, dtype=torch.float64))
    assert rebuilt.round().tolist() == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    # Asked for a step that is remembered exactly, the kernel is a single 1 there.
    assert (basis.T @ basis[:, 5]).argmax() == 5


def test_more_states_rebuild_more_and_a_signal_of_ones_own_is_taken():
    past = torch.randn(300, generator=torch.Generator().manual_seed(0))  # no structure to guess from
    errors = []
    for states in (8, 32, 64):
        panel = StateMemory(past=past, kind="legs", states=states, signal="yours", length=100, dt=0.02)
        u = past[-100:].double().flip(0)
        basis = panel._look(100, "what was there?", 0, {k: panel.state[k] for k in panel.state})[3]
        errors.append(((basis.T @ (basis @ u) - u).norm() / u.norm()).item())
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] > 0.8 > errors[2]


def test_every_kind_and_signal_says_finite_words():
    for kind in KINDS:
        panel = StateMemory(kind=kind, dt=0.5, states=64, length=16)
        assert "nan" not in panel.say() and "inf" not in panel.say().replace("inv", "")
    for signal in SIGNALS:
        assert signal in StateMemory(signal=signal).say()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: StateMemory(3), TypeError, "S4D, an S4, or nothing"),
        (lambda: StateMemory(nn.Linear(2, 2)), TypeError, "layer.ssm"),
        (lambda: StateMemory(past=torch.ones(2, 50)), ValueError, r"\(L,\) of at least 8"),
        (lambda: StateMemory(past=torch.ones(3)), ValueError, "at least 8"),
        (lambda: StateMemory(past=torch.zeros(50)), ValueError, "silence"),
        (lambda: StateMemory(past=torch.full((50,), math.nan)), ValueError, "finite"),
    ],
)
def test_wrong_sources_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
