"""The learning rate of every update, and the optimiser it drives.

Source: the Mega paper's training set-up and its published scripts (linear warm-up, linear decay, Adam with
decoupled weight decay on all parameters). The tests hold both to numbers the authors' code gave.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

SCHEDULES = ("linear", "cosine", "rsqrt")


def learning_rate(
    update: int,
    *,
    lr: float,
    warmup: int,
    total: int,
    schedule: str = "linear",
    initial_lr: float = 1e-7,
    power: float = 1.0,
) -> float:
    """The learning rate of update number `update`, which counts the updates already finished (0, 1, ...).

    Up to `warmup` it climbs from `initial_lr` to the peak `lr` along (update / warmup) ** power. Then

    - "linear": straight down to 0 at `total`, as in the Mega paper;
    - "cosine": down half a cosine to 0 at `total`;
    - "rsqrt": lr * sqrt(warmup / update), as in the Long Range Arena; it never reaches 0.

    Raises `ValueError` for an unknown schedule.
    """
    if warmup and update <= warmup:
        return initial_lr + update**power * (lr - initial_lr) / warmup**power
    left = max(0.0, (total - update) / max(1, total - warmup))  # 1 at the end of the warm-up, 0 at the end
    if schedule == "linear":
        return lr * left
    if schedule == "cosine":
        return lr * 0.5 * (1.0 - math.cos(math.pi * left))
    if schedule == "rsqrt":
        return lr * math.sqrt(max(1, warmup) / max(1, update))
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}.")


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.AdamW:
    """AdamW on all parameters in one group: norms, biases, EMA and position parameters decay like the rest.

    The authors' Adam adds eps before the bias correction, torch's after it: about 1e-8 apart, no matter here.
    """
    return torch.optim.AdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
