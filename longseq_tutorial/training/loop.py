"""The training loop: fit a model to a task as a recipe says, and write down what happened.

Device, precision and several processes are Hugging Face accelerate's business. The order of the data and the
learning rate are decided here, and what surrounds the loop (checkpoints, progress, the record) is in `run.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from .. import models, tasks
from ..tasks import Batch, Split, Task
from . import machine
from .batches import answer, evaluation_batches, to_device, training_batches
from .diagnose import NonFiniteError, first_nonfinite, most_telling
from .machine import Interrupt, reproducible
from .recipe import Recipe, RecipeError
from .records import Record
from .run import Run, Unfinished, model_settings
from .schedule import learning_rate


def fit(
    recipe: Recipe,
    *,
    seed: int = 0,
    out: str | Path = "runs",
    resume: bool = False,
    overwrite: bool = False,
    max_seconds: float | None = None,
    save_every: float = 60.0,
    data: str | Path | None = None,
    workers: int = 0,
    cpu: bool = False,
    progress: bool = True,
    task: Task | None = None,
) -> Record:
    """Train, evaluate, and leave `<name>.json` and `<name>.safetensors` in `out`; return the record.

    recipe: what to do. seed: decides the weights, the order of the data, dropout and augmentation.
    out: folder of the record; checkpoints and TensorBoard files lie in `out/<name>`.
    resume: go on from the last checkpoint, if there is one. overwrite: start anew where an unfinished run lies.
    max_seconds: save and stop so long after the call; making the data counts. save_every: seconds between checkpoints.
    data: folder of the data, see `tasks.load`. task: train on this instead of loading one.
    workers: processes that prepare batches. cpu: leave a GPU alone. progress: show a bar and a line an epoch.

    Raises `Unfinished` when it stopped early, `NonFiniteError` when the numbers broke, and `RecipeError`,
    `DataError`, `CheckpointError` or `RecordError` when it cannot start.
    """
    deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
    model_settings(recipe)  # a wrong one is said before data are made
    if task is None:
        task = load_task(recipe, data)
    run = Run(recipe, task, seed=seed, out=Path(out), deadline=deadline, cpu=cpu)
    finished = run.open(resume=resume, overwrite=overwrite)
    if finished is not None:
        return finished
    with Interrupt() as interrupt, reproducible(run.device), run.bar(progress):

        def stop() -> str:
            # However short the time, a session gets one thing done, so that many short ones reach the end.
            return "interrupt" if interrupt.seen else "time" if run.late and run.moved else ""

        def save_and_stop(wish: str) -> Unfinished:
            run.save()
            return Unfinished(wish, run.progress.update, run.total, run.folder)

        def validate() -> None:
            """Add the row of this update. An evaluation that was cut short is made anew by the next session."""
            valid = evaluate_run(run, task.valid, stop) if run.validation_due else None
            if run.validation_due and valid is None:
                raise save_and_stop(run.agree(stop()))
            run.add_row(valid)

        if run.row_due:  # update 0: chance level, and proof that evaluation works
            validate()
        for pieces in batches(run, workers):
            with machine.compiler_errors(RecipeError):
                run.advance(train_update(run, pieces))
            if run.row_due:
                validate()
            wish = run.agree(stop() or run.save_due(save_every))
            if wish in ("time", "interrupt") and not run.done:
                raise save_and_stop(wish)
            if wish:
                run.save()
        run.save()  # before the weights of the best validation take the place of the last ones
        run.take_selected_weights()
        test = evaluate_run(run, task.test, stop)
        if test is None:
            raise Unfinished(run.agree(stop()), run.progress.update, run.total, run.folder)
        return run.finish(test)


def load_task(recipe: Recipe, root: str | Path | None = None) -> Task:
    """The recipe's task with the recipe's options. Raises `DataError`."""
    try:
        return tasks.load(recipe.task, root=root, **recipe.data)
    except TypeError as error:
        raise tasks.DataError(f"{recipe.task} cannot be loaded with {dict(recipe.data)}: {error}.") from error


def batches(run: Run, workers: int = 0) -> Any:
    """This process's share of every update that is still to come."""
    return training_batches(
        run.task,
        batch=run.recipe.batch,
        accumulate=run.recipe.accumulate,
        bucket=run.recipe.bucket,
        augment=run.recipe.augment,
        seed=run.seed,
        start=run.progress.update,
        stop=run.total,
        rank=run.accelerator.process_index,
        processes=run.accelerator.num_processes,
        workers=workers,
        pin_memory=run.device.type == "cuda",
        few_lengths=run.recipe.compile,
        device=run.device,
    )


def train_update(run: Run, pieces: list[Batch]) -> list[float]:
    """One update of the weights from one batch, given in pieces. Returns [summed loss, correct, sequences].

    Raises `NonFiniteError`, and leaves the weights as they were, when the loss or the gradient is not finite.
    """
    accelerator, recipe, model = run.accelerator, run.recipe, run.learner
    pieces = [to_device(piece, run.device) for piece in pieces]
    scores = torch.zeros(3, device=run.device)
    for i, batch in enumerate(pieces):
        more_to_come = i + 1 < len(pieces)  # processes exchange gradients only once these are complete
        with accelerator.no_sync(model) if more_to_come else nullcontext():
            logits = answer(model, batch)  # (batch, classes)
            loss = F.cross_entropy(logits.float(), batch.label) + models.auxiliary_loss(run.bare_model)
            accelerator.backward(loss / len(pieces))
        scores += score(logits, batch.label)
    norm = accelerator.clip_grad_norm_(run.model.parameters(), recipe.clip or math.inf)
    # The one question of an update: a GPU answers when it has done all before, and nothing is launched meanwhile. What
    # comes after it, the optimiser's step, is still going on while the next batch is fetched.
    *sums, norm = torch.cat([accelerator.reduce(scores), norm.view(1)]).tolist()
    if not math.isfinite(sums[0] + norm):
        where = most_telling(gather_object([first_nonfinite(run.bare_model, pieces)]))
        raise NonFiniteError(f"update {run.progress.update}: the loss or its gradient is not finite; {where}.")
    set_learning_rate(run)
    run.optimizer.step()
    run.optimizer.zero_grad()
    return sums


def set_learning_rate(run: Run) -> None:
    """Give the optimiser the rate of the coming update."""
    recipe = run.recipe
    run.rate = learning_rate(
        run.progress.update,
        lr=recipe.lr,
        warmup=recipe.warmup,
        total=run.total,
        schedule=recipe.schedule,
        initial_lr=recipe.initial_lr,
        power=recipe.power,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = run.rate


@torch.no_grad()
def score(logits: Tensor, label: Tensor) -> Tensor:
    """[summed cross entropy, correct answers, sequences] of a batch: what adds up over batches and processes."""
    loss = F.cross_entropy(logits.float(), label, reduction="sum")
    correct = (logits.argmax(-1) == label).sum()
    return torch.stack([loss, correct.to(loss.dtype), loss.new_tensor(len(label))])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch: int = 64,
    accelerator: Accelerator | None = None,
    stop: Callable[[], Any] | None = None,
) -> dict[str, float] | None:
    """Mean cross entropy and accuracy of `model` on a whole split: {"loss": ..., "accuracy": ...}.

    With an accelerator, several processes share the work and all get the result. `stop` is asked before every batch:
    once it says something true to any process, all of them return None.
    """
    rank, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = torch.zeros(4, device=device)  # loss, correct, sequences, and how many processes were stopped
    for part in evaluation_batches(split, batch, rank=rank, processes=processes):
        if stop is not None and stop():
            total[3] = 1
            break
        part = to_device(part, device)
        total[:3] += score(answer(model, part), part.label)
    model.train(training)
    loss, correct, sequences, stopped = (accelerator.reduce(total) if accelerator else total).tolist()
    return None if stopped else {"loss": loss / sequences, "accuracy": correct / sequences}


def evaluate_run(run: Run, split: Split, stop: Callable[[], Any]) -> dict[str, float] | None:
    """`evaluate` the run's model, in batches no larger than training's; None if stopped."""
    batch = run.recipe.batch // run.recipe.accumulate // run.accelerator.num_processes
    # The bare model: a wrapped one would wait for the other processes, which may have fewer batches, and a compiled
    # one would be compiled once more.
    return evaluate(run.bare_model, split, batch=max(1, batch), accelerator=run.accelerator, stop=stop)
