"""The quadratic baseline against attention written out."""

import math

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.models import record
from longseq_tutorial.models.configs import TransformerConfig
from longseq_tutorial.models.transformer import SinusoidalPositions, TransformerBlock
from tests.models.any_task import SMALL, randomised


def written_out(block, x, mask, causal):
    """The block with its attention as a loop over heads, in plain products."""
    q, k, v = block.qkv(block.norm1(x)).split(8, dim=-1)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(4)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -torch.inf)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        heads.append(torch.softmax(scores, -1) @ v[..., part])
    x = x + block.out(torch.cat(heads, -1))
    return x + block.fc2(F.gelu(block.fc1(block.norm2(x))))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_block_equals_attention_written_out_with_gradients(causal, masked):
    block = randomised(TransformerBlock(TransformerConfig(**SMALL["transformer"], causal=causal)))
    mask = torch.arange(9).expand(2, 9) < torch.tensor([[9], [5]]) if masked else None
    weight = torch.randn(2, 9, 8, dtype=torch.float64)
    if masked:
        weight = weight * mask.unsqueeze(-1)
    start, results = torch.randn(2, 9, 8, dtype=torch.float64), []
    for form in (lambda x: block(x, mask), lambda x: written_out(block, x, mask, causal)):
        x = start.clone().requires_grad_()
        y = form(x)
        results.append([y * weight, *torch.autograd.grad((y * weight).sum(), [x, *block.parameters()])])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_of_padding_alone_stays_finite(causal):
    block = randomised(TransformerBlock(TransformerConfig(**SMALL["transformer"], causal=causal)))
    x, mask = torch.randn(2, 5, 8, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.bool)
    with record(block) as tape:
        assert block(x, mask).isfinite().all()
    assert tape["weights"].isfinite().all()


def test_positions_are_sines_and_cosines():
    x = torch.zeros(1, 7, 6, dtype=torch.float64)
    table = SinusoidalPositions()(x)[0]
    frequency = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    torch.testing.assert_close(table[5], torch.cat([(5 * frequency).sin(), (5 * frequency).cos()]))
    state = 0
    for t in range(7):
        y, state = SinusoidalPositions().step(x[:, t], state)
        torch.testing.assert_close(y[0], table[t])
