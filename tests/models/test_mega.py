"""The Mega layer is what its diagram says; the authors' numbers are in tests/test_official.py."""

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.models.configs import MegaConfig
from longseq_tutorial.models.mega import FeedForward, MegaBlock, MegaLayer
from tests.models.any_task import SMALL, randomised


def config(**more):
    return MegaConfig(**{**SMALL["mega"], **more})


@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_layer_is_norm_ema_silu_and_gated_attention(prenorm, chunk):
    layer = randomised(MegaLayer(config(prenorm=prenorm, chunk=chunk)))
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    normed = layer.norm(x) if prenorm else x
    y = layer.attention(normed, smooth=F.silu(layer.ema(normed)), residual=x)
    torch.testing.assert_close(layer(x), y if prenorm else layer.norm(y))


@pytest.mark.parametrize("prenorm", [False, True])
def test_feed_forward_works_position_by_position(prenorm):
    layer = randomised(FeedForward(config(prenorm=prenorm)))
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:, 2:3], layer(x[:, 2:3]))
    normed = layer.norm(x) if prenorm else x
    y = x + layer.fc2(F.silu(layer.fc1(normed)))
    torch.testing.assert_close(layer(x), y if prenorm else layer.norm(y))


def test_chunks_meet_through_the_ema_only():
    block = randomised(MegaBlock(config(chunk=4, causal=True)))
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    (reach,) = torch.autograd.grad(block(x)[0, 9].sum(), x)
    assert reach[0, 0].abs().max() > 0  # carried over two borders
    with torch.no_grad():
        block.mega.ema.eta.zero_()
    (reach,) = torch.autograd.grad(block(x)[0, 9].sum(), x)
    assert reach[0, :8].abs().max() == 0 and reach[0, 8].abs().max() > 0


def test_dropout_is_off_in_eval_and_on_in_training():
    layer = MegaLayer(config(dropout=0.5, attention_dropout=0.5, hidden_dropout=0.5))
    x = torch.randn(2, 6, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
