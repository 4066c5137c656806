import copy

import pytest
import torch

from longseq_tutorial.mechanisms.vq_attention import VectorQuantizer
from longseq_tutorial.models import auxiliary_loss, build, build_encoder
from longseq_tutorial.models.configs import LongVQConfig
from longseq_tutorial.models.longvq import LongVQLayer
from tests.models.any_task import SMALL, TOKENS, inputs

LONGVQ = SMALL["longvq"] | {"window": 2}


def test_the_commitment_loss_is_asked_for_in_training_only():
    model = build("longvq", TOKENS, **LONGVQ, commitment=0.5).double()
    x = inputs(TOKENS)
    model(x)
    asked = auxiliary_loss(model)
    losses = [layer.longvq.auxiliary for layer in model.encoder.layers]
    torch.testing.assert_close(asked, losses[0] + losses[1])
    asked.backward()
    assert model.encoder.layers[0].longvq.kappa.grad[1].abs().max() > 0, "it pulls at the keys"
    assert model.encoder.layers[0].longvq.kappa.grad[0].abs().max() > 0, (
        "and, through the memory of the next layer, more"
    )
    model.eval()
    model(x)
    assert auxiliary_loss(model) == 0.0
    assert auxiliary_loss(torch.nn.Linear(2, 2)) == 0.0


def test_its_weight_scales_it():
    x, losses = inputs(TOKENS), []
    for weight in (1e-3, 2e-3):
        torch.manual_seed(0)
        model = build("longvq", TOKENS, **LONGVQ, commitment=weight).double()
        model(x)
        losses.append(auxiliary_loss(model).item())
    assert losses[1] == pytest.approx(2 * losses[0])


def test_the_codebook_follows_the_keys_in_training_and_rests_in_eval():
    model = build("longvq", TOKENS, **LONGVQ)
    quantizers = [m for m in model.modules() if isinstance(m, VectorQuantizer)]
    model.eval()(inputs(TOKENS))
    before = copy.deepcopy([q.code_sum for q in quantizers])
    model(inputs(TOKENS))
    assert all(torch.equal(a, q.code_sum) for a, q in zip(before, quantizers, strict=True))
    model.train()(inputs(TOKENS))
    assert all(not torch.equal(a, q.code_sum) for a, q in zip(before, quantizers, strict=True))


def test_keys_have_one_length_whatever_the_scale():
    layer = LongVQLayer(LongVQConfig(dim=8, z_dim=16, v_dim=8, codes=4, window=2)).double()
    for scale in (1.0, 10.0, 100.0):
        q, k = layer._queries_and_keys(scale * torch.randn(2, 9, 8, dtype=torch.float64))
        for vectors in (q, k):
            torch.testing.assert_close(
                vectors.norm(dim=-1), torch.full((2, 9), 2.0, dtype=torch.float64), rtol=1e-2, atol=0
            )


@pytest.mark.parametrize("memory", ["ema", "s4d"])
def test_the_state_does_not_grow(memory):
    encoder = build_encoder("longvq", TOKENS, **LONGVQ, memory=memory, causal=True).eval()
    state, sizes = encoder.initial_state(1), []
    for t in range(8):
        _, state = encoder.step(torch.tensor([1 + t]), state)
        sizes.append(sum(t.numel() for layer in state for t in (layer["memory"], *layer["attention"].values())))
    assert len(set(sizes)) == 1


def test_the_reconstruction_says_that_it_is_one():
    from longseq_tutorial.models import longvq

    assert "our reconstruction" in longvq.__doc__
