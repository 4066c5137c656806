"""The SeqBoat layer is what its diagram says; the authors' numbers are in tests/test_official.py."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.models import build, build_encoder, record
from longseq_tutorial.models.configs import SeqBoatConfig
from longseq_tutorial.models.parts import mean_pool
from longseq_tutorial.models.seqboat import ScaledPositions, SeqBoatLayer
from tests import golden_numbers as golden
from tests.models.any_task import SMALL, TOKENS, AnyTask, inputs, randomised


def config(**more):
    return SeqBoatConfig(**{**SMALL["seqboat"], "window": 3, **more})


def boat(**more):
    return randomised(SeqBoatLayer(config(**more)))


def undecided(x, **more):
    """A layer that wakes up for half of the tokens of x."""
    layer = boat(prenorm=True, **more)
    with torch.no_grad():
        logits = layer.hx_proj(F.silu(layer.ema(layer.norm(x))))[..., :2]
        layer.hx_proj.bias[0] += (logits[..., 1] - logits[..., 0]).median() + 1e-3
    return layer


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("always_active", [False, True])
def test_layer_is_the_sum_of_three_paths_under_a_silu(prenorm, causal, always_active):
    layer = boat(prenorm=prenorm, causal=causal, always_active=always_active)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    normed = layer.norm(x) if prenorm else x
    h = F.silu(layer.ema(normed))
    projected = layer.hx_proj(h)
    logits, hx = (None, projected) if always_active else (projected[..., :2], projected[..., 2:])
    y = F.silu(hx + layer.attention(h, logits) + x)
    torch.testing.assert_close(layer(x), y if prenorm else layer.norm(y))


@pytest.mark.parametrize("mask", [None, torch.arange(11).expand(2, 11) < torch.tensor([[11], [6]])])
def test_who_is_not_chosen_passes_by_the_attention(mask):
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    layer = undecided(x)
    with record(layer) as tape:
        y = layer(x, mask)
    asleep = ~tape["active_seen"].bool()
    assert asleep.any() and not asleep.all() and (mask is None or asleep[~mask].all())
    plain = F.silu(layer.hx_proj(F.silu(layer.ema(layer.norm(x), mask)))[..., 2:] + x)
    torch.testing.assert_close(y[asleep], plain[asleep])
    assert (y - plain)[~asleep].abs().amin(-1).max() > 1e-6


def test_the_gradient_reaches_the_switch_of_the_chosen_only():
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    layer = undecided(x)
    h = F.silu(layer.ema(layer.norm(x))).detach()
    logits = layer.hx_proj(h)[..., :2].detach().requires_grad_()
    active, _ = layer.attention.router(logits)
    assert 0 < active.sum() < 9
    layer.attention(h, logits).sum().backward()
    assert logits.grad[active].abs().amax(-1).min() > 0 and logits.grad[~active].abs().max() == 0


def test_dropout_stands_where_the_published_code_has_it():
    both, past = (SeqBoatLayer(config(dropout=0.5, causal=causal)) for causal in (False, True))
    assert (both.attention.dropout.p, both.sum_dropout.p) == (0.5, 0.0)  # on what the attention found
    assert (past.attention.dropout.p, past.sum_dropout.p) == (0.0, 0.5)  # on its sum with the linear path
    x = torch.randn(2, 6, 8)
    for layer in (both, past):
        assert not torch.equal(layer(x), layer(x))
        layer.eval()
        assert torch.equal(layer(x), layer(x))


def test_first_values_are_those_of_the_published_code():
    torch.manual_seed(0)
    layer = SeqBoatLayer(SeqBoatConfig(dim=64, temperature=0.3))
    assert layer.attention.router.log_temperature.item() == pytest.approx(math.log(0.3 * 8))
    for weight, std in [
        (layer.hx_proj.weight, 0.02),
        (layer.attention.mx_proj.weight, 0.02),
        (layer.attention.kappa, 0.02),
        (layer.ema.alpha_logit, 0.2),
        (layer.ema.delta_logit, 0.2),
        (layer.ema.eta, 1.0),
        (layer.ema.omega, 1.0),
    ]:
        assert weight.abs().max() <= 2 * std + 1e-6 and 0.7 * std < weight.std() < 1.05 * std
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    assert (layer.ema.beta - signs).abs().max() <= 0.0401
    assert layer.hx_proj.bias.abs().max() == 0


@pytest.mark.parametrize("bias", ["global", "local", "rotary"])
def test_stream_goes_on_for_long_in_a_state_that_stays(bias):
    layer = boat(causal=True, bias=bias, max_positions=20)
    x = torch.randn(2, 70, 8, dtype=torch.float64)
    want, state, sizes = layer(x), layer.initial_state(2), set()
    for t in range(70):
        y, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y, want[:, t])
        sizes.add(sum(part.numel() for part in [state["ema"], *state["attention"].values()]))
    assert len(sizes) == 1


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor) and "empty" not in str(func):
                Largest.numel = max(Largest.numel, part.numel())
        return out


@pytest.mark.parametrize("bias", ["global", "local"])
def test_memory_grows_with_the_length_alone(bias):
    layer = SeqBoatLayer(config(bias=bias, max_positions=4096))
    sizes = []
    for length in (1024, 4096):
        Largest.numel = 0
        with Largest():
            layer(torch.randn(1, length, 8)).sum().backward()
        sizes.append(Largest.numel)
    assert sizes[1] < 4096 * 4096 / 30 and sizes[1] <= 4.5 * sizes[0]


def test_absolute_positions_are_the_authors_and_stream():
    arrays = golden.load("seqboat_positions")
    positions = ScaledPositions(6).double()
    assert positions.scale.item() == pytest.approx(arrays["sinusoid_scale_init"].item())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    wave = torch.from_numpy(arrays["sinusoid_len5_dim6"])
    positions.scale.data = torch.from_numpy(arrays["sinusoid_scale_init"])
    torch.testing.assert_close(positions(x) - x, wave.expand(2, 5, 6), rtol=0, atol=1e-12)
    state = positions.initial_state(2)
    for t in range(5):
        y, state = positions.step(x[:, t], state)
        torch.testing.assert_close(y, positions(x)[:, t])
    positions(x).sum().backward()
    assert positions.scale.grad.item() == pytest.approx(2 * wave.sum().item() / positions.scale.item())


def test_nli_head_reads_product_and_difference():
    model = randomised(build("seqboat", AnyTask("retrieval", pairs=True), **SMALL["seqboat"]))
    x1, x2 = inputs(TOKENS), inputs(TOKENS, length=7)
    with record(model) as tape:
        assert model(x1, x2).shape == (3, 4)
    first, second = mean_pool(*model.encoder(x1)), mean_pool(*model.encoder(x2))
    torch.testing.assert_close(tape["pooled"], torch.cat([second, first, first * second, first - second], dim=-1))
    plain = randomised(build("seqboat", AnyTask("retrieval", pairs=True), **SMALL["seqboat"], nli_head=False))
    plain.encoder = model.encoder
    with record(plain) as tape:
        plain(x1, x2)
    torch.testing.assert_close(tape["pooled"], torch.cat([second, first], dim=-1))


def test_published_stack_has_no_feed_forward_and_positions_for_signals_only():
    text, image = build_encoder("seqboat", AnyTask("text")), build_encoder("seqboat", AnyTask("image", kind="samples"))
    assert [type(block) for block in text.layers] == [SeqBoatLayer] * 4 and text.final_norm is None
    assert [type(block) for block in image.layers] == [ScaledPositions] + [SeqBoatLayer] * 8
    assert image.final_norm.kind == "batchnorm"


def test_a_sample_is_independent_of_fully_active_neighbours():
    quiet = torch.randn(1, 12, 8, dtype=torch.float64)
    layer = undecided(quiet)
    with record(layer) as tape:
        alone = layer(quiet)
    assert not tape["active_seen"].all()
    loud = quiet.clone().requires_grad_()
    for _ in range(400):  # look for a sample that is active everywhere
        logits = layer.hx_proj(F.silu(layer.ema(layer.norm(loud))))[..., :2]
        (slope,) = torch.autograd.grad((logits[..., 1] - logits[..., 0]).clamp(max=0.1).sum(), loud)
        loud = (loud + 0.5 * slope).detach().requires_grad_()
    with record(layer) as tape:
        together = layer(torch.cat([loud.detach(), quiet]))
    assert tape["active_seen"][0].all()
    torch.testing.assert_close(together[1:], alone)
