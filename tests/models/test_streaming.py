"""Streaming over hundreds of tokens: equal to the parallel form, in a memory that does not grow."""

import pytest
import torch
from torch import Tensor

from longseq_tutorial.models import build_encoder
from tests.models.any_task import SMALL, TOKENS, inputs, randomised

LONG = 333  # several blocks of the EMA, dozens of windows and chunks
CASES = {
    "mega-chunk": {},
    "seqboat": {"window": 5},
    "longvq": {"window": 3},
    "longvq-s4d": {"window": 3, "memory": "s4d"},
    "fastrpb": {"max_positions": 40},
    "spade": {"window": 6},
    "spade-chunk": {"window": 7, "local": "chunk", "mode": "add"},
}


def tensors(state) -> list[Tensor]:
    """All tensors somewhere inside a state."""
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [t for part in parts for t in tensors(part)]


@pytest.mark.parametrize("case", CASES)
def test_hundreds_of_tokens(case):
    name = case.removesuffix("-s4d").removesuffix("-chunk") if case != "mega-chunk" else case
    options = SMALL[name] | CASES[case] | {"causal": True}
    model = randomised(build_encoder(name, TOKENS, **options))
    x = inputs(TOKENS, batch=2, length=LONG)
    with torch.no_grad():
        whole, _ = model(x)
        state, sizes = model.initial_state(2), []
        for t in range(LONG):
            h, state = model.step(x[:, t], state)
            torch.testing.assert_close(h, whole[:, t], rtol=1e-8, atol=1e-8)
            sizes.append(sum(part.numel() for part in tensors(state)))
    assert sizes[60:] and max(sizes[60:]) <= max(sizes[:60]), "the state stopped growing long ago"


def test_the_quadratic_baseline_does_grow():
    model = build_encoder("transformer", TOKENS, **SMALL["transformer"], causal=True).eval()
    state, sizes = model.initial_state(1), []
    for t in range(5):
        _, state = model.step(torch.tensor([1 + t]), state)
        sizes.append(sum(part.numel() for part in tensors(state)))
    assert sizes == sorted(set(sizes))
