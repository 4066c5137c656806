"""Learning rate and optimiser against the numbers the authors' code gave."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longseq_tutorial.training.schedule import SCHEDULES, learning_rate, make_optimizer

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "mega_schedule_and_adam.npz")
TASKS = sorted(name.removesuffix("_lr") for name in GOLDEN.files if name.endswith("_lr"))


@pytest.mark.parametrize("task", TASKS)
def test_the_authors_schedule(task: str) -> None:
    lr, warmup, total, power, initial = GOLDEN[f"{task}_config"].tolist()
    ours = [
        learning_rate(int(t), lr=lr, warmup=int(warmup), total=int(total), power=power, initial_lr=initial)
        for t in GOLDEN[f"{task}_steps"]
    ]
    np.testing.assert_allclose(ours, GOLDEN[f"{task}_lr"], rtol=1e-12, atol=1e-18)


def test_the_authors_adam() -> None:
    lr, beta1, beta2, eps, decay = GOLDEN["adam_config"].tolist()
    parameter = torch.nn.Parameter(torch.from_numpy(GOLDEN["adam_param0"]))
    optimizer = make_optimizer([parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    for gradient, expected in zip(GOLDEN["adam_grads"], GOLDEN["adam_trajectory"], strict=True):
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        # 2e-8 apart by the place of eps, as the description of these numbers says.
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=5e-8)


def test_one_group_holds_every_parameter() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    groups = make_optimizer(model.parameters(), lr=0.1, weight_decay=0.03).param_groups
    assert len(groups) == 1 and len(groups[0]["params"]) == 4 and groups[0]["weight_decay"] == 0.03


@given(st.sampled_from(SCHEDULES), st.integers(0, 50), st.integers(51, 300), st.sampled_from([0.5, 1.0, 2.0]))
def test_up_to_the_peak_then_down(schedule: str, warmup: int, total: int, power: float) -> None:
    rates = [
        learning_rate(t, lr=0.1, warmup=warmup, total=total, schedule=schedule, power=power) for t in range(total + 3)
    ]
    peak = rates[warmup]
    assert peak == pytest.approx(0.1)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert all(rate > 0 for rate in rates[1:total])
    if schedule != "rsqrt":
        assert rates[total] == rates[total + 2] == 0


def test_half_way() -> None:
    at = {s: learning_rate(60, lr=1.0, warmup=20, total=100, schedule=s) for s in SCHEDULES}
    assert at == pytest.approx({"linear": 0.5, "cosine": 0.5, "rsqrt": (20 / 60) ** 0.5})
    assert learning_rate(40, lr=1.0, warmup=20, total=100, schedule="cosine") > 0.75


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="linear, cosine, rsqrt; got 'step'"):
        learning_rate(1, lr=0.1, warmup=0, total=2, schedule="step")
