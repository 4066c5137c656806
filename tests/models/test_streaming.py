"""Streaming over long sequences: equal to the parallel form, in a memory that does not grow.

`python -m benchmarks.streaming` takes 100,000 tokens through every one of these models, in minutes.
"""

import json

import pytest
import torch
from torch import Tensor

from benchmarks import streaming
from longseq_tutorial.models import build_encoder
from tests.models.any_task import SMALL, TOKENS, inputs, randomised

LONG = 500  # many blocks of the EMA, dozens of windows and chunks
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


def causal(case, **more):
    name = case.removesuffix("-s4d").removesuffix("-chunk") if case != "mega-chunk" else case
    return randomised(build_encoder(name, TOKENS, **SMALL[name] | CASES[case] | {"causal": True} | more))


@torch.inference_mode()
def stream(model, x):
    """All outputs, one step at a time, and the bytes of the state after each."""
    state, outputs, sizes = model.initial_state(len(x)), [], []
    for t in range(x.shape[1]):
        h, state = model.step(x[:, t], state)
        outputs.append(h)
        sizes.append(sum(part.nbytes for part in tensors(state)))
    return torch.stack(outputs, 1), sizes


@pytest.mark.parametrize("case", CASES)
def test_hundreds_of_tokens(case):
    model, x = causal(case), inputs(TOKENS, batch=2, length=LONG)
    outputs, sizes = stream(model, x)
    torch.testing.assert_close(outputs, model(x)[0], rtol=1e-8, atol=1e-8)
    assert max(sizes[60:]) <= max(sizes[:60]), "the state stopped growing long ago"


@pytest.mark.slow
def test_a_hundred_thousand_tokens():
    """The model with the cheapest step, since each token costs a call from Python."""
    model, x = causal("seqboat", layers=1), inputs(TOKENS, batch=1, length=100_000)
    outputs, sizes = stream(model, x)
    torch.testing.assert_close(outputs, model(x)[0], rtol=1e-8, atol=1e-8)
    assert max(sizes[1_000:]) <= max(sizes[:1_000])


def test_the_script_that_streams_on(tmp_path):
    out = tmp_path / "streaming.json"
    assert streaming.main(["mega-chunk", "--tokens", "150", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["tokens"] == 150 and row["largest_deviation"] < 1e-12 < row["largest_output"]
    assert set(streaming.MODELS) <= {name.removesuffix("-s4d") for name in CASES}
    with pytest.raises(SystemExit):
        streaming.main(["mega"])


def test_the_quadratic_baseline_does_grow():
    model = build_encoder("transformer", TOKENS, **SMALL["transformer"], causal=True).eval()
    state, sizes = model.initial_state(1), []
    for t in range(5):
        _, state = model.step(torch.tensor([1 + t]), state)
        sizes.append(sum(part.numel() for part in tensors(state)))
    assert sizes == sorted(set(sizes))
