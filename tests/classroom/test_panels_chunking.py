"""The panel of chapter 04 measures what it says, at every end of its controls, and refuses the rest in words."""

import re

import pytest
import torch
from torch import nn

from longseq_tutorial.classroom.panels_chunking import LENGTH, ReceptiveField, felt, receptive_field
from longseq_tutorial.mechanisms.chunking import window_attention
from longseq_tutorial.mechanisms.ema import DampedEMA

SETTINGS = {"sight": "chunk", "size": 8, "layers": 1, "causal": False, "beneath": "nothing", "half_life": 3.0}


def x(length=20, dim=3):
    return torch.randn(length, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# ---- the measure itself


def test_one_backward_pass_gives_the_jacobian():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).double()

    def f(x):
        return window_attention(x, x, layer(x), 2)

    given = x(7)
    jacobian = torch.autograd.functional.jacobian(lambda t: f(t[None])[0], given)  # (7, 3, 7, 3)
    probe = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = torch.einsum("iajb,a->ijb", jacobian, probe).norm(dim=-1)
    torch.testing.assert_close(receptive_field(f, given), want)


def test_what_chunks_and_windows_feel_is_exact():
    place = torch.arange(LENGTH)
    offset = place[None, :] - place[:, None]
    panel = ReceptiveField()
    for size, layers, causal in ((8, 1, False), (5, 4, True), (1, 2, False), (32, 6, True)):
        past = (offset <= 0) | (not causal)
        field = panel.field(**{**SETTINGS, "size": size, "layers": layers, "causal": causal})
        assert torch.equal(felt(field), (place[None, :] // size == place[:, None] // size) & past)
        field = panel.field(**{**SETTINGS, "sight": "window", "size": size, "layers": layers, "causal": causal})
        reached = field > 0
        assert not (reached & ~((offset.abs() <= layers * size) & past)).any()
        assert (reached.diagonal(-min(layers * size, LENGTH - 1))).all()  # as far as it can


def test_an_ema_beneath_crosses_every_border_and_fades_with_its_half_life():
    panel = ReceptiveField()
    far = []
    for half_life in (2.0, 20.0):
        field = panel.field(**{**SETTINGS, "causal": True, "beneath": "EMA", "half_life": half_life})
        assert (field.triu(1) < 1e-12 * field.max()).all()
        far.append(float(field[60, 10] / field[60].max()))
    assert 1e-9 < far[0] < 1e-5 < far[1]


# ---- the panel


@pytest.mark.parametrize("sight", ["chunk", "window"])
@pytest.mark.parametrize("beneath", ["nothing", "EMA"])
def test_every_control_at_its_ends(sight, beneath):
    panel = ReceptiveField(sight=sight, beneath=beneath)
    for end in ("low", "high"):
        ends = {name: getattr(c, end) for name, c in panel.controls.items() if hasattr(c, end)}
        for causal in (False, True):
            panel.set(**ends, causal=causal)
            assert panel.error is None, panel.say()
            assert "nan" not in panel.say().lower()


def test_words_tell_the_reach():
    panel = ReceptiveField(size=8)
    assert "12 % of all pairs. Output" in panel.say()
    assert "Output 32 feels inputs 32 to 39, 0 tokens back and 7 tokens ahead" in panel.say()
    assert "reach is 7 tokens back and 7 tokens ahead" in panel.say()
    words = panel.set(sight="window", size=5, layers=3, causal=True, position=40).say()
    assert "Output 40 feels inputs 25 to 40, 15 tokens back and 0 tokens ahead" in words
    assert "reach is 15 tokens back and 0 tokens ahead" in words
    assert "Output 0 feels input 0 alone" in panel.set(position=0).say()
    assert "63 tokens back and 0 tokens ahead" in panel.set(beneath="EMA", half_life=10.0).say()


def test_any_module_of_the_readers():
    ema = DampedEMA(3, 2).double()
    panel = ReceptiveField(ema, x(), position=19)
    assert panel.error is None
    assert set(panel.controls) == {"position"}
    assert "0 tokens ahead, and" in panel.say()
    batched = ReceptiveField(ema, x().expand(4, -1, -1), position=19)
    assert batched.say() == panel.say()
    assert ReceptiveField(lambda t: 2 * t, x().float()).say().startswith("Output 10 feels input 10 alone")
    assert "no input at all" in ReceptiveField(lambda t: t * 0, x()).say()


def test_a_module_in_training_is_asked_without_dropout_and_left_as_it_was():
    module = nn.Sequential(nn.Dropout(0.5), DampedEMA(3, 2)).double()
    module[1].eval()
    panel = ReceptiveField(module, x())
    assert panel.error is None
    assert module.training and module[0].training and not module[1].training
    assert (panel.field() == panel.field()).all()


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ((3, x()), TypeError, "or nothing; got int"),
        ((None, x()), TypeError, "wanted no input"),
        ((nn.Identity(),), TypeError, "its input, a tensor"),
        ((nn.Identity(), torch.ones(5, dtype=torch.long)), ValueError, "real input (L, D)"),
        ((nn.Identity(), torch.ones(5, 3, dtype=torch.long)), ValueError, "comes out of the embedding"),
        ((nn.Identity(), torch.ones(300, 2)), ValueError, "at most 256"),
        ((lambda t: t.sum(1), x()), ValueError, "an output for each position"),
        ((lambda t: t[:, ::2], x()), ValueError, "got (1, 10, 3)"),
    ],
)
def test_refuses_what_it_cannot_ask(arguments, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        ReceptiveField(*arguments)
