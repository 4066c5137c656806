import pytest
import torch

from longseq_tutorial.models import build, build_encoder
from longseq_tutorial.models.configs import SpadeConfig
from longseq_tutorial.models.spade import spade_layers
from tests.models.any_task import SMALL, TOKENS, inputs

SPADE = SMALL["spade"] | {"window": 2}


def reach(model, length=40, at=20):
    """Positions whose embedding the hidden state at ``at`` depends on."""
    x = torch.randn(1, length, 8, dtype=torch.float64, requires_grad=True)
    h = x
    for layer in model:
        h = layer(h)
    (gradient,) = torch.autograd.grad(h[0, at].sum(), x)
    return set(gradient[0].abs().sum(-1).nonzero().squeeze(1).tolist())


def stack(**options):
    config = SpadeConfig(dim=8, layers=2, heads=2, ffn_dim=10, state=6, **options)
    return [layer.double() for layer in spade_layers(config)]


@pytest.mark.parametrize("mode", ["concat", "add", "stack"])
def test_one_layer_of_s4_hears_everything(mode):
    assert reach(stack(window=2, mode=mode)) == set(range(40))
    assert reach(stack(window=2, mode=mode, causal=True)) == set(range(21))


def test_without_s4_news_travels_by_windows():
    assert reach(stack(window=2)[1:]) == set(range(18, 23))
    layers = spade_layers(SpadeConfig(dim=8, layers=2, heads=2, ffn_dim=10, window=2), branches=[])
    assert reach([layer.double() for layer in layers]) == set(range(16, 25))


def test_all_layers_share_one_relative_bias_saved_once():
    model = build("spade", TOKENS, **SPADE)
    assert [name for name in model.state_dict() if "bias.table" in name] == ["encoder.layers.0.bias.table"]
    model(inputs(TOKENS)).sum().backward()
    whole = model.encoder.layers[0].bias.table.grad.clone()
    assert whole.abs().max() > 0
    first, second = model.encoder.layers
    assert first.attention._bias[0] is second.attention._bias[0] is first.bias


def test_a_frozen_s4_stays_as_it_was_drawn():
    model = build("spade", TOKENS, **SPADE, s4_frozen=True)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen and all("global_branch" in name for name in frozen)
    model(inputs(TOKENS)).sum().backward()
    assert all(p.grad is None for p in model.encoder.layers[0].global_branch.parameters())


def test_dropout_at_the_weights_acts_in_training_only():
    model = build("spade", TOKENS, **SPADE, attention_dropout=0.5).double()
    x = inputs(TOKENS)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_the_state_does_not_grow():
    encoder = build_encoder("spade", TOKENS, **SPADE, causal=True).eval()
    state, sizes = encoder.initial_state(1), []
    for t in range(12):
        _, state = encoder.step(torch.tensor([1 + t % 10]), state)
        sizes.append(sum(t.numel() for layer in state for t in layer["attention"]))
    assert sizes[2:] == sizes[2:3] * 10
