"""The panels of chapter 03: they show what attention does, for any module or tensors, and refuse the rest clearly."""

import math
import re

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from longseq_tutorial.classroom import panels
from longseq_tutorial.classroom.panels_attention import GateMix, WhoLooksAtWhom, mega_diagram
from longseq_tutorial.mechanisms.gated_attention import (
    FUNCTIONS,
    GatedAttention,
    attend_slow,
    attention_weights,
)
from longseq_tutorial.models import record
from longseq_tutorial.models.configs import MegaConfig
from longseq_tutorial.models.mega import MegaBlock, MegaLayer


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Figures are made in every test, but turned into pixels only where that is the point: it takes longest."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(panels, "png_bytes", lambda fig: b"")


def sequence(batch=2, length=13, dim=6, seed=0):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**options):
    torch.manual_seed(0)
    config = MegaConfig(**{"dim": 6, "n": 2, "z_dim": 4, "v_dim": 8, "ffn_dim": 8, "max_positions": 32, **options})
    made = MegaLayer(config).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


# ---- who looks at whom


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"chunk": 4}, {"bias": "rotary"}], ids=str)
def test_shows_the_weights_that_the_module_uses(function, options):
    module, x = layer(attention=function, **options), sequence()
    mask = torch.arange(13)[None] < torch.tensor([[13], [9]])
    panel = WhoLooksAtWhom(module, x, mask=mask, sequence=1)
    with record(module) as tape:
        module(x, mask)
    used = tape["attention.weights"][1]
    if "chunk" in options:  # (4 chunks, 4, 4) on the diagonal of the map; the last one is cut
        used = torch.block_diag(*used)[:13, :13]
    shown = panel.weights(function, options.get("causal", False), 1.0, sequence=1)
    torch.testing.assert_close(shown[:9], used[:9])
    assert panel.error is None and panel.state["function"] == function


def test_takes_queries_and_keys_and_a_reader_s_own_attention():
    q, k = sequence(1, 7, 4)[0], sequence(1, 7, 4, seed=1)[0]
    bias = sequence(1, 7, 7, seed=2)[0]
    panel = WhoLooksAtWhom(q, k, bias=bias, attend=attend_slow)
    want = attention_weights(q[None], k[None], function="laplace", bias=2 * bias, causal=True)[0]
    torch.testing.assert_close(panel.weights("laplace", True, 2.0), want)
    heads = WhoLooksAtWhom(sequence().unflatten(-1, (2, 3)).transpose(1, 2), sequence().view(2, 2, 13, 3))
    assert heads.controls["sequence"].high == 3  # two sequences of two heads


def test_every_layer_of_a_model_can_be_chosen():
    config = MegaConfig(dim=6, n=2, z_dim=4, v_dim=8, ffn_dim=8, max_positions=32)
    model = torch.nn.Sequential(MegaBlock(config), MegaBlock(config)).double()
    panel = WhoLooksAtWhom(model, sequence())
    assert [panel.set(layer=name).error for name in panel.controls["layer"].options] == [None, None]


def test_describes_entropy_and_reach():
    q = torch.zeros(8, 2, dtype=torch.float64)
    panel = WhoLooksAtWhom(q, q)
    said = panel.set(query=0).say()
    assert "Entropy 3.0 bits" in said and "8.0 of 8 keys" in said and "mean distance 3.5" in said
    said = panel.set(causal=True).say()
    assert "Entropy 0 bits" in said and "key 0" in said
    assert "reads nothing at all" in panel.set(function="relu2").say()
    named = WhoLooksAtWhom(q, q, labels=list("abcdefgh")).set(query=2)
    assert "Query 2 ('c')" in named.say()


def test_draws_every_setting_and_leaves_no_figure_open():
    panel = WhoLooksAtWhom(layer(), sequence())
    plt.close("all")
    for function in FUNCTIONS:
        panel.set(function=function, causal=True, strength=3.5, query=12)
        assert panel.error is None and len(panel.say()) > 60
    assert not plt.get_fignums()


def test_the_module_is_left_as_it_was():
    module = layer().train()
    attend_before = module.attention.attend
    WhoLooksAtWhom(module, sequence())
    GateMix(module, sequence())
    assert module.training and module.attention.training and module.attention.attend is attend_before
    assert all(not m._forward_hooks for m in module.modules())
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "words"),
    [
        ((torch.nn.Linear(6, 6).double(), sequence()), {}, TypeError, "GatedAttention"),
        (("q", "k"), {}, TypeError, "queries and keys as tensors"),
        ((sequence()[0], sequence()[0, :5]), {}, ValueError, "alike"),
        ((sequence()[0], sequence()[0]), {"bias": torch.zeros(3, 3)}, ValueError, "bias must be"),
        ((sequence()[0], sequence()[0]), {"mask": torch.ones(13)}, ValueError, "mask must be bool"),
        ((sequence()[0], sequence()[0]), {"labels": "abc"}, ValueError, "a label for each of 13"),
        ((torch.zeros(2000, 1), torch.zeros(2000, 1)), {}, ValueError, "at most 1024"),
        ((layer(), sequence()), {"bias": torch.zeros(13, 13)}, ValueError, "its own bias"),
    ],
)
def test_refuses_what_it_cannot_show(arguments, options, kind, words):
    with pytest.raises(kind, match=re.escape(words)):
        WhoLooksAtWhom(*arguments, **options)


# ---- the gates


def test_gate_mix_of_a_module_is_its_output():
    unit = GatedAttention(6, 4, 8, max_positions=32).double()
    torch.nn.init.normal_(unit.mx_proj.weight)
    x = sequence()
    panel = GateMix(unit, x)
    for channel in (0, 5):
        _, _, _, y = panel._curves(channel, 0.0)
        torch.testing.assert_close(y, unit(x)[0, :, channel].detach())
    assert "lies between the two at every step" in panel.set(shift=-3.0).say()


@pytest.mark.parametrize("prenorm", [True, False])
def test_gate_mix_of_a_layer_uses_the_residual(prenorm):
    module, x = layer(prenorm=prenorm, norm="rmsnorm"), sequence()
    panel = GateMix(module, x)
    torch.testing.assert_close(panel.x, x[0])
    y = panel.x + torch.sigmoid(panel.logit) * (panel.candidate - panel.x)
    torch.testing.assert_close(y if prenorm else module.norm(y).detach(), module(x)[0].detach())


def test_gate_mix_takes_three_tensors():
    x, h = sequence(1, 5, 2)[0], sequence(1, 5, 2, seed=1)[0]
    panel = GateMix(x, h, torch.full((5, 2), 0.25, dtype=torch.float64))
    assert "the gate is 0.25 on average" in panel.say()
    shifted = 1 / (1 + math.exp(math.log(3) - 1))
    assert f"{shifted:.2f} on average" in panel.set(shift=1.0).say()


def test_gate_mix_refuses_what_is_no_gate():
    x = sequence(1, 5, 2)[0]
    with pytest.raises(TypeError, match="no update gate"):
        GateMix(x, x)
    with pytest.raises(ValueError, match="one shape"):
        GateMix(x, x[:3], torch.sigmoid(x))
    with pytest.raises(ValueError, match=re.escape("[0, 1]")):
        GateMix(x, x, 3 * x)


def test_the_diagram_is_a_figure():
    fig = mega_diagram()
    assert isinstance(fig, Figure) and len(fig.axes[0].patches) == 11
    plt.close(fig)
