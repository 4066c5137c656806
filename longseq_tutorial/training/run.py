"""What surrounds the training loop: set-up, checkpoints, progress on the screen and in TensorBoard, the record."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from .. import models
from ..tasks import Task
from . import checkpoint, machine
from .checkpoint import CheckpointError
from .recipe import Recipe, RecipeError, plain
from .records import Record, read_record, write_record
from .schedule import make_optimizer

WISHES = ("", "save", "time", "interrupt")  # what a process may want after an update; the later, the stronger


class Unfinished(Exception):
    """The run stopped before its end and left a checkpoint. `why` is "time" or "interrupt"."""

    def __init__(self, why: str, update: int, total: int, folder: Path) -> None:
        self.why = why
        super().__init__(f"stopped after update {update:,} of {total:,} ({why}), everything saved in {folder}")


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside its tensors."""

    update: int = 0  # updates finished
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # loss, correct, sequences since the last row
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # the best validation so far: update, loss, accuracy
    seconds: float = 0.0  # of all sessions up to this one
    cpu_seconds: float = 0.0  # likewise, what the processors worked for it, all processes and threads together
    sessions: int = 0  # this one included
    peak_memory: dict[str, int] = field(default_factory=dict)


class Run:
    """Model, optimiser and progress of one run. `loop.fit` drives it.

    Raises `RecipeError` where recipe, task, model and number of processes do not fit each other.
    """

    def __init__(self, recipe: Recipe, task: Task, *, seed: int, out: Path, deadline: float, cpu: bool) -> None:
        self.recipe, self.task, self.seed, self.out = recipe, task, seed, out
        self.name = f"{recipe.run_name}-seed{seed}"
        self.folder = out / self.name
        self.started = self.last_save = time.monotonic()
        self.cpu_started = time.process_time()
        self.deadline = deadline  # on time.monotonic's clock
        self.total = recipe.total_updates(len(task.train))
        self.per_epoch = len(task.train) // recipe.batch
        self.accelerator = machine.make_accelerator(recipe.precision, cpu)
        self.device: torch.device = self.accelerator.device
        shares = self.accelerator.num_processes * recipe.accumulate
        if recipe.batch % shares:
            raise RecipeError(
                f"batch={recipe.batch} does not divide over {self.accelerator.num_processes} processes with "
                f"accumulate={recipe.accumulate}; make it a multiple of {shares}."
            )
        set_seed(seed)
        self.config = model_settings(recipe)
        try:
            self.bare_model: nn.Module = models.build(recipe.model, task.config, **recipe.overrides)
        except (ValueError, TypeError, RuntimeError) as error:
            raise RecipeError(f"cannot build {recipe.model} for {recipe.task}: {error}") from error
        if self.accelerator.num_processes > 1:
            set_seed(seed, device_specific=True)  # same weights everywhere, but each process its own dropout
        optimizer = make_optimizer(
            self.bare_model.parameters(),
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.eps,
            weight_decay=recipe.weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(self.bare_model, optimizer)
        if isinstance(self.model, DistributedDataParallel):  # codebooks and batch statistics agree by themselves
            self.model.broadcast_buffers = False
        self.uncompiled = self.model
        if recipe.compile:  # for training alone: the bare model keeps its names, its hooks, its windows for `record`
            self.model = machine.compiled(self.model)
        self.start = (0, 0)  # updates and rows of the history when this session began
        self.rate = 0.0  # learning rate of the last update
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] = {}
        self._bar: Any = None
        self._writer: Any = None

    # --- where the run stands --------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether all updates are made."""
        return self.progress.update == self.total

    @property
    def epoch_ends(self) -> bool:
        """Whether the last update was the last of an epoch."""
        return self.progress.update % self.per_epoch == 0

    @property
    def validation_due(self) -> bool:
        """Whether to validate after this update."""
        return self.done or self.progress.update % (self.recipe.eval_every or self.per_epoch) == 0

    @property
    def row_due(self) -> bool:
        """Whether the history still wants a row about this update."""
        written = bool(self.progress.history) and self.progress.history[-1]["update"] == self.progress.update
        return not written and (self.epoch_ends or self.validation_due)

    @property
    def moved(self) -> bool:
        """Whether this session has made an update or written a row."""
        return (self.progress.update, len(self.progress.history)) != self.start

    @property
    def learner(self) -> Any:
        """What the coming update trains: the model, but uncompiled where a session begins.

        LongVQ then looks whether its codes have begun, and may draw them. Code that is compiled meanwhile stays in
        pieces for as long as the session lasts.
        """
        return self.uncompiled if self.progress.update == self.start[0] else self.model

    @property
    def late(self) -> bool:
        """Whether the time given is over."""
        return time.monotonic() > self.deadline

    @property
    def seconds(self) -> float:
        """How long the run has taken, all its sessions together."""
        return self.progress.seconds + time.monotonic() - self.started

    def save_due(self, every: float) -> str:
        """ "save" when the last checkpoint is more than `every` seconds old, else ""."""
        return "save" if time.monotonic() - self.last_save > every else ""

    def agree(self, wish: str) -> str:
        """The strongest wish of all processes: they must save or stop at the same update."""
        if self.accelerator.num_processes == 1:
            return wish
        mine = torch.tensor([WISHES.index(wish)], device=self.device)
        return WISHES[int(self.accelerator.gather(mine).max())]

    # --- progress ----------------------------------------------------------------------------------------------

    def advance(self, score: list[float]) -> None:
        """Count a finished update and show it."""
        p = self.progress
        p.update += 1
        p.sums = [a + b for a, b in zip(p.sums, score, strict=True)]
        self._log("train/loss_of_update", score[0] / score[2], every=max(1, self.total // 2_000))
        self._bar.update()
        if not self._bar.disable:
            mean = means(p.sums)
            updates_a_second = (p.update - self._bar.initial) / (self._bar.format_dict["elapsed"] or math.inf)
            memory = machine.peak_memory(self.device)
            self._bar.set_postfix_str(
                f"loss {mean['loss']:.3f}, accuracy {mean['accuracy']:.1%}, "
                f"{updates_a_second * self.recipe.batch:.0f} sequences/s, "
                f"{memory.get('cuda', memory['rss']) / 1e9:.2f} GB",
                refresh=False,
            )

    def add_row(self, valid: dict[str, float] | None) -> None:
        """Add to the history: training since the last row, and `valid` where it was measured."""
        p = self.progress
        train = means(p.sums) if p.sums[2] else None
        row = {"update": p.update, "epoch": p.update / self.per_epoch, "lr": self.rate, "seconds": self.seconds}
        p.history.append(row | {"train": train, "valid": valid})
        p.sums = [0.0, 0.0, 0.0]
        said = f"update {p.update:>6,}/{self.total:,}  epoch {row['epoch']:6.2f}  {row['seconds']:5.0f} s"
        for part, metrics in (("train", train), ("valid", valid)):
            for key, value in (metrics or {}).items():
                self._log(f"{part}/{key}", value)
            if metrics:
                said += f"  {part}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:6.2%}"
        self._log("lr", self.rate)
        if not self._bar.disable:
            self._bar.write(said)
        if valid and self.recipe.select == "best" and valid["accuracy"] > p.best.get("accuracy", -1.0):
            p.best = {"update": p.update, **valid}
            self.best_weights = {name: t.detach().clone() for name, t in self.bare_model.state_dict().items()}

    @contextmanager
    def bar(self, show: bool) -> Iterator[None]:
        """A progress bar over all updates, and a TensorBoard writer in the run's folder."""
        main = self.accelerator.is_main_process
        if main:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self.progress.update or None)
        self._bar = tqdm(
            total=self.total,
            initial=self.progress.update,
            desc=f"{self.recipe.task} {self.recipe.model}",
            unit="update",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}"
            "{postfix}]",
            disable=not (show and main),
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 10.0,  # a log file wants few lines
        )
        try:
            yield
        finally:
            self._bar.close()
            if self._writer is not None:
                self._writer.close()

    def _log(self, key: str, value: float, every: int = 1) -> None:
        if self._writer is not None and self.progress.update % every == 0:
            self._writer.add_scalar(key, value, self.progress.update)

    # --- checkpoints and the end -------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued here."""
        return {
            **self.recipe.as_dict(),
            "seed": self.seed,
            "source of the data": self.task.config.source,
            "training sequences": len(self.task.train),
            "processes": self.accelerator.num_processes,
        }

    def open(self, *, resume: bool, overwrite: bool) -> Record | None:
        """Start, or go on from a checkpoint; or return the record of a run that is finished already.

        Raises `CheckpointError` when the checkpoint is broken or another run's, or would be lost.
        """
        record_path = self.out / f"{self.name}.json"
        unfinished = checkpoint.exists(self.folder)
        self.accelerator.wait_for_everyone()  # all have looked before the first one changes anything
        if unfinished and resume:
            self._restore()
        elif unfinished and not overwrite:
            raise CheckpointError(
                f"an unfinished run lies in {self.folder}. Add --resume to go on with it, --overwrite to start again."
            )
        elif resume and record_path.exists():
            record = read_record(record_path)
            self._refuse_other({**record.recipe, "seed": record.seed}, record_path)
            self._say(f"{self.name} is finished already: {record_path}")
            return record
        else:
            if resume:
                self._say(f"no checkpoint in {self.folder} yet: starting at the beginning")
            self._clear_folder()
        self.progress.sessions += 1
        self.start = (self.progress.update, len(self.progress.history))
        return None

    def _clear_folder(self) -> None:
        if not self.accelerator.is_main_process:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {self.folder} ({error.strerror}); choose --out.") from error
        checkpoint.remove(self.folder)
        for old in self.folder.glob("events.out.tfevents.*"):  # TensorBoard would draw two runs as one
            old.unlink()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        states = gather_object([checkpoint.random_states()])
        cpu_seconds = self._cpu_seconds()
        self.last_save = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        tensors = checkpoint.pack(self.bare_model, self.optimizer.optimizer)
        tensors |= {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        for rank, named in enumerate(states):
            tensors |= {f"random.{rank}.{name}": state for name, state in named.items()}
        progress = dataclasses.asdict(self.progress)
        progress |= {"seconds": self.seconds, "cpu_seconds": cpu_seconds, "peak_memory": self._peak_memory()}
        checkpoint.save(self.folder, tensors, {"run": self.identity(), "progress": progress, "rate": self.rate})

    def _restore(self) -> None:
        tensors, state, warning = checkpoint.load(self.folder)
        if warning:
            self._say(warning)
        self._refuse_other(state["run"], self.folder)
        checkpoint.unpack(tensors, self.bare_model, self.optimizer.optimizer)
        self.progress = Progress(**state["progress"])
        self.rate = state["rate"]
        self.best_weights = checkpoint.part(tensors, "best.")
        checkpoint.restore_random_states(checkpoint.part(tensors, f"random.{self.accelerator.process_index}."))
        self._say(f"going on after update {self.progress.update:,} of {self.total:,}")

    def _refuse_other(self, theirs: dict[str, Any], where: Path) -> None:
        for key, ours in self.identity().items():
            if key != "source" and key in theirs and theirs[key] != ours:
                raise CheckpointError(
                    f"{where} is of another run: there {key} is {theirs[key]!r}, here {ours!r}. Use the settings it "
                    "was started with, another --out, or --overwrite."
                )

    def take_selected_weights(self) -> None:
        """Put the weights of the best validation back, where the recipe asks for them."""
        if self.best_weights:
            self.bare_model.load_state_dict(self.best_weights)

    def finish(self, test: dict[str, float]) -> Record:
        """Write the record and the final weights, and delete the checkpoints."""
        p, task = self.progress, self.task
        commit, dirty = machine.commit()
        splits = {"train": task.train, "valid": task.valid, "test": task.test}
        cpu_seconds = self._cpu_seconds()
        record = Record(
            name=self.name,
            recipe=self.recipe.as_dict(),
            config=self.config,
            seed=self.seed,
            task=plain(dataclasses.asdict(task.config)),
            source=task.config.source,
            sequences={name: len(split) for name, split in splits.items()},
            parameters=sum(p.numel() for p in self.bare_model.parameters() if p.requires_grad),
            updates=p.update,
            history=p.history,
            test=test,
            weights_of={"update": p.best["update"] if p.best else p.update, "rule": self.recipe.select},
            seconds=self.seconds,
            cpu_seconds=cpu_seconds,
            sessions=p.sessions,
            peak_memory=self._peak_memory(),
            device=self.device.type,
            device_name=machine.device_name(self.device),
            threads=torch.get_num_threads(),
            processes=self.accelerator.num_processes,
            versions=machine.versions(),
            commit=commit,
            dirty=dirty,
            finished=machine.utc_now(),
        )
        for key, value in test.items():
            self._log(f"test/{key}", value)
        if self.accelerator.is_main_process:
            write_record(record, self.bare_model, self.out)
            checkpoint.remove(self.folder)
            for leftover in self.out.glob(f"{self.name}.*.tmp"):  # of a session killed while it wrote its record
                leftover.unlink()
        self.accelerator.wait_for_everyone()
        return record

    def _cpu_seconds(self) -> float:
        """Processor time of the run so far, all sessions and processes together. Every process must ask."""
        here = time.process_time() - self.cpu_started
        return self.progress.cpu_seconds + sum(gather_object([here]))

    def _peak_memory(self) -> dict[str, int]:
        now, before = machine.peak_memory(self.device), self.progress.peak_memory
        return {key: max(value, before.get(key, 0)) for key, value in now.items()}

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            print(line, flush=True)


def model_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of the recipe's model, the published ones included. Raises `RecipeError` for one that is wrong."""
    try:
        config = models.configure(recipe.model, recipe.task, **recipe.overrides)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"cannot build {recipe.model} for {recipe.task}: {error}") from error
    settings: dict[str, Any] = plain(dataclasses.asdict(config))
    return settings


def means(sums: list[float]) -> dict[str, float]:
    """[summed loss, correct, sequences] -> mean loss and accuracy."""
    return {"loss": sums[0] / sums[2], "accuracy": sums[1] / sums[2]}
