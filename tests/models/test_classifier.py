"""The frame that all models share."""

import pytest
import torch

from longseq_tutorial.models import NAMES, build, record
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


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_that_hides_nothing_is_spared(name):
    model = randomised(build(name, TOKENS, **SMALL[name])).eval()
    x, everything = inputs(TOKENS), torch.ones(3, 13, dtype=torch.bool)
    given = []
    model.encoder.layers[0].register_forward_pre_hook(lambda _, arguments: given.append(arguments[1]))
    assert torch.equal(model(x, everything), model(x)) and given == [None, None]
    model(x, everything.clone().index_fill(1, torch.tensor([12]), False))
    assert given[2] is not None


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
