import pytest
import torch

from longseq_tutorial.models import build, build_encoder
from longseq_tutorial.models.configs import FastRPBConfig
from longseq_tutorial.models.fastrpb import FastRPBBlock
from tests.models.any_task import SAMPLES, SMALL, TOKENS, inputs

FAST = SMALL["fastrpb"]


@pytest.mark.parametrize("attention", ["sikf", "elu", "favor", "softmax"])
def test_without_a_bias_the_order_does_not_matter_with_it_it_does(attention):
    x = inputs(TOKENS)
    shuffled = x[:, torch.randperm(13)]
    model = build("fastrpb", TOKENS, **FAST, attention=attention, bias="none").double().eval()
    torch.testing.assert_close(model(x), model(shuffled))
    model = build("fastrpb", TOKENS, **FAST, attention=attention).double().eval()
    for layer in model.encoder.layers:
        torch.nn.init.normal_(layer.bias.weight)
    assert (model(x) - model(shuffled)).abs().max() > 1e-3


def test_the_bias_starts_close_to_nothing_and_learns():
    model = build("fastrpb", TOKENS, **FAST).double()
    assert all(layer.bias.weight.abs().max() < 1e-2 for layer in model.encoder.layers)
    model(inputs(TOKENS)).sum().backward()
    assert all(layer.bias.weight.grad.abs().max() > 0 for layer in model.encoder.layers)


def test_the_published_image_model_reads_a_square():
    model = build("fastrpb", SAMPLES, **FAST | {"max_positions": 4, "layout": "separable"}).double().eval()
    assert model(torch.randn(2, 16, dtype=torch.float64)).shape == (2, 4)
    with pytest.raises(ValueError, match="shape must be"):
        model(torch.randn(2, 13, dtype=torch.float64))


@pytest.mark.parametrize("attention", ["sikf", "elu", "favor"])
def test_the_state_does_not_grow_beyond_the_offsets_that_have_a_weight(attention):
    options = FAST | {"max_positions": 4, "attention": attention}
    encoder = build_encoder("fastrpb", TOKENS, **options, causal=True).eval()
    state, sizes = encoder.initial_state(1), []
    for t in range(9):
        _, state = encoder.step(torch.tensor([1 + t]), state)
        sizes.append(sum(t.numel() for layer in state for t in (*layer["attention"], layer["bias"])))
    assert len(set(sizes[1:])) == 1


def test_block_equals_its_formula():
    block = FastRPBBlock(FastRPBConfig(dim=6, heads=2, qkv_dim=4, ffn_dim=5, max_positions=16)).double().eval()
    torch.nn.init.normal_(block.bias.weight)
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    q, k, v = block.qkv(block.norm1(x)).view(1, 7, 3, 2, 2).unbind(2)  # (1, 7, H, 2)
    found = torch.empty(1, 7, 2, 2, dtype=torch.float64)
    for head in range(2):
        for i in range(7):
            weights = torch.exp(q[0, i, head] + k[0, :, head]).sum(-1)  # sum over a of exp(q_a + k_a)
            weights = weights / (weights.sum() + 1e-6)
            distance = block.bias.lags(7)[head, torch.arange(i, i - 7, -1) + 6]
            found[0, i, head] = (weights + distance) @ v[0, :, head]
    h = x + block.out(found.flatten(2))
    want = h + block.fc2(torch.nn.functional.gelu(block.fc1(block.norm2(h))))
    torch.testing.assert_close(block(x), want)
