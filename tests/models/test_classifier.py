"""The frame that all models share."""

import pytest
import torch

from longseq_tutorial.models import build, record
from longseq_tutorial.models.parts import mean_pool
from tests.models.any_task import SAMPLES, SMALL, TOKENS, AnyTask, inputs, randomised


def test_pairs_are_two_towers():
    model = randomised(build("mega", AnyTask(pairs=True), **SMALL["mega"]))
    x1, x2 = inputs(TOKENS), inputs(TOKENS, length=7)
    assert model(x1, x2).shape == (3, 4)
    assert not torch.allclose(model(x1, x2), model(x2, x1))


def test_logits_are_the_head_of_the_mean_of_the_real_positions():
    model = randomised(build("mega", TOKENS, **SMALL["mega"]))
    x, mask = inputs(TOKENS), torch.arange(13).expand(3, 13) < torch.tensor([[13], [5], [1]])
    hidden, kept = model.encoder(x, mask)
    assert torch.equal(kept, mask) and hidden[~mask].abs().max() == 0
    with record(model) as tape:
        logits = model(x, mask)
    torch.testing.assert_close(tape["pooled"], mean_pool(hidden, mask))
    torch.testing.assert_close(logits, model.head(tape["pooled"]))


def test_two_towers_join_the_second_then_the_first():
    model = randomised(build("mega", AnyTask(pairs=True), **SMALL["mega"]))
    x1, x2 = inputs(TOKENS), inputs(TOKENS, length=7)
    mask1 = torch.arange(13).expand(3, 13) < 9
    with record(model) as tape:
        model(x1, x2, mask1=mask1)
    second, first = tape["pooled"].split(8, dim=-1)
    torch.testing.assert_close(first, mean_pool(*model.encoder(x1, mask1)))
    torch.testing.assert_close(second, mean_pool(*model.encoder(x2)))


def test_a_patch_embedding_refuses_to_step():
    encoder = build("mega", SAMPLES, **SMALL["mega"], patch=((4, 4),), causal=True).encoder
    with pytest.raises(ValueError, match="cannot step by one"):
        encoder.step(torch.randn(3), encoder.initial_state(3))
