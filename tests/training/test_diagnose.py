"""The first thing that is not finite is named."""

from typing import Any

import pytest
import torch
from torch import nn

from longseq_tutorial.tasks import Batch
from longseq_tutorial.training.diagnose import first_nonfinite


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, mask: Any = None) -> torch.Tensor:
        return self.head(torch.exp(self.second(torch.relu(self.first(x)))))


def batch(value: float = 1.0) -> Batch:
    return Batch(torch.full((3, 4), value), torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))


def test_a_parameter() -> None:
    model = Small()
    with torch.no_grad():
        model.second.weight[1, 2] = torch.nan
    assert first_nonfinite(model, [batch()]) == "parameter second.weight has 1 of 16 numbers NaN"


def test_the_input() -> None:
    assert first_nonfinite(Small(), [batch(), batch(torch.inf)]) == "the input batch has 12 of 12 numbers infinite"


def test_the_first_output() -> None:
    model = Small()
    with torch.no_grad():
        model.first.weight.fill_(1e30)
        model.second.weight.fill_(1e30)
    assert first_nonfinite(model, [batch()]).startswith("the output of second (Linear) has 12 of 12")


def test_a_gradient_when_the_forward_pass_is_sound() -> None:
    model = Small()
    model(batch().x).sum().backward()
    assert model.second.bias.grad is not None
    model.second.bias.grad[0] = torch.inf
    assert first_nonfinite(model, [batch()]) == "the gradient of second.bias has 1 of 4 numbers infinite"


def test_nothing_found_is_said_and_no_hook_stays() -> None:
    model = Small()
    assert "was finite" in first_nonfinite(model, [batch()])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_of_the_model_stays(mode: bool) -> None:
    model = Small().train(mode)
    first_nonfinite(model, [batch()])
    assert model.training is mode
