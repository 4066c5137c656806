"""torch.compile takes every model whole, and what it makes computes the same.

The backend is aot_eager: all that torch.compile does before it writes code, for which it wants a C++ compiler and time.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from longseq_tutorial import models
from longseq_tutorial.mechanisms import devices
from longseq_tutorial.training import machine
from tests.models.any_task import SMALL, TOKENS, inputs

OPTIONS = {
    "mega": dict(attention="laplace", norm="batchnorm", prenorm=True),
    "seqboat": dict(window=3),
    "longvq": dict(window=3),
    "spade": dict(window=3),
}


def step(compute, model, x, mask):
    logits = compute(x, mask)
    (logits.square().sum() + models.auxiliary_loss(model)).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [logits.detach(), *gradients, *(b.clone() for b in model.buffers())]


@pytest.mark.parametrize("name", models.NAMES)
def test_one_graph_computes_the_same(name, monkeypatch, whole=True):
    plain, model = (models.build(name, TOKENS, **SMALL[name], **OPTIONS.get(name, {})).double() for _ in range(2))
    x = inputs(TOKENS, length=37)
    mask = torch.arange(37).expand(3, 37) < torch.tensor([[37], [20], [4]])
    step(plain, plain, x, mask)  # codebooks begin
    model.load_state_dict(plain.state_dict())
    for one in (
        plain,
        model,
    ):  # as a session of training does: what was loaded is looked at before anything is compiled
        step(one, one, x, mask)
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **options: original(m, backend="aot_eager", **options))
    compiled = machine.compiled(model)
    counters.clear()
    for _ in range(2):  # what the first step changes, the second one reads
        for got, want in zip(step(compiled, model, x, mask), step(plain, plain, x, mask), strict=True):
            torch.testing.assert_close(got, want)
    # Only in SeqBoat a size depends on the numbers, that of the active tokens: their attention is left out.
    assert bool(counters["graph_break"]) == (name == "seqboat" or not whole)


def test_many_tiles_are_left_alone(monkeypatch):
    monkeypatch.setattr(devices, "LARGE", 2 * 37 * 3)  # two queries a tile
    test_one_graph_computes_the_same("mega", monkeypatch, whole=False)


def test_another_number_of_active_tokens_is_not_compiled_anew(monkeypatch):
    model, original = models.build("seqboat", TOKENS, **SMALL["seqboat"], window=3), torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **options: original(m, backend="aot_eager", **options))
    compiled = machine.compiled(model)
    counters.clear()
    made = []
    for _ in range(4):
        compiled(inputs(TOKENS, length=37)).sum().backward()
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] < 12 and made[1:] == made[1:2] * 3, made
