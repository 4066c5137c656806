"""Train a model from the command line.

    python -m longseq_tutorial.train --task speech --model mega --recipe laptop
    accelerate launch --multi_gpu --num_processes 2 -m longseq_tutorial.train --task listops ...

The second form starts two processes, on two GPUs or, where there is none, on the CPU. (`accelerate launch --cpu`
starts a single process unless it is given MPI.) A recipe's batch is shared out, so results are the same to rounding.

Whatever is wrong with the request is said in one line on stderr, with exit code 2.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .tasks import DataError
from .training import CheckpointError, NonFiniteError, RecipeError, RecordError, Unfinished, fit, recipe, recipes
from .training.machine import leave_group

_Name = Annotated[str, tyro.conf.arg(metavar="NAME")]
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


class CommandError(ValueError):
    """Something is wrong with the command itself."""


@dataclass(frozen=True)
class Arguments:
    """Train a model by a recipe; the record and the weights end up in --out."""

    task: _Name = ""  # what to learn: listops, text, retrieval, image, pathfinder, pathx, speech
    model: _Name = ""  # what learns it: transformer, mega, mega-chunk, seqboat, longvq, fastrpb, spade
    recipe: _Name = ""  # how: laptop, gpu-30min, paper
    seed: int = 0  # decides weights, order of the data, dropout and augmentation
    out: Path = Path("runs")  # where the record goes; checkpoints and TensorBoard files in a folder of the run's name
    resume: bool = False  # go on from the last checkpoint
    overwrite: bool = False  # start again where an unfinished run lies
    max_time: Annotated[str, tyro.conf.arg(metavar="TIME")] = ""  # save and stop after this long: 90s, 9m, 1.5h
    save_every: Annotated[str, tyro.conf.arg(metavar="TIME")] = "60s"  # time between two checkpoints
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = (
        None  # folder of the data; else LONGSEQ_DATA, data/downloads
    )
    set: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = ()  # e.g. lr=0.01 model.dim=32 data.train=1000
    threads: int = 0  # CPU threads; 0 leaves it to torch
    workers: int = 0  # processes that prepare batches; 4 or so keep a fast GPU fed
    cpu: bool = False  # leave a GPU alone
    list: bool = False  # show all recipes and stop


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0: finished, or stopped at --max-time. 1: the numbers or the disk failed. 2: refused. 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    torch.set_flush_denormal(True)  # before torch starts its threads, which inherit it
    try:
        arguments = parse(argv)
        if arguments.list:
            print(table())
            return 0
        return _train(arguments, argv)
    except (CommandError, RecipeError, DataError, CheckpointError, RecordError) as error:
        return _complain(str(error), 2)
    except NonFiniteError as error:
        return _complain(f"{error} A lower lr or a longer warm-up may help.", 1)
    except OSError as error:  # a full disk, a folder that is read only
        return _complain(f"{type(error).__name__}: {error}", 1)
    except KeyboardInterrupt:
        return _complain(f"interrupted. Go on from the last checkpoint, if one was made, with: {_again(argv)}", 130)
    finally:
        leave_group()


def _train(arguments: Arguments, argv: Sequence[str]) -> int:
    for key in ("task", "model", "recipe"):
        if not getattr(arguments, key):
            raise CommandError(f"--{key} is missing; --list shows all tasks, models and recipes.")
    chosen = recipes.get(arguments.task, arguments.model, arguments.recipe)
    chosen = recipe.change(chosen, recipe.parse_settings(arguments.set))
    for key in ("seed", "threads", "workers"):
        if not 0 <= getattr(arguments, key) < 2**32:
            raise CommandError(f"--{key} must be a whole number >= 0; got {getattr(arguments, key)}.")
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        print("note: accelerate started one process only; give --multi_gpu instead of --cpu for more.", file=sys.stderr)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        record = fit(
            chosen,
            seed=arguments.seed,
            out=arguments.out,
            resume=arguments.resume,
            overwrite=arguments.overwrite,
            max_seconds=_seconds("--max-time", arguments.max_time) if arguments.max_time else None,
            save_every=_seconds("--save-every", arguments.save_every),
            data=arguments.data,
            workers=arguments.workers,
            cpu=arguments.cpu,
        )
    except Unfinished as stop:
        line = f"{stop}. Go on with: {_again(argv)}"
        if stop.why == "interrupt":
            return _complain(line, 130)
        if _is_main():
            print(line)
        return 0
    if _is_main():
        print(record)
    return 0


def parse(argv: Sequence[str]) -> Arguments:
    """The typed arguments. Raises `CommandError`, in one line, for what tyro reports in a box."""
    given = Counter(argument.split("=")[0] for argument in argv if argument.startswith("--"))
    for flag, times in given.items():
        if times > 1:  # the last one would win in silence
            raise CommandError(f"{flag} was given {times} times; give it once, with all its values behind it.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Arguments, args=list(argv), prog="python -m longseq_tutorial.train")
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise CommandError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """What a box of tyro's says: title, rule, message, rule, suggestions ... -> message and nearest flag."""
    text = re.sub(r"[╭╮╰╯│]", " ", box).replace("─", "-")  # the box is of ASCII or of Unicode, as stdout likes it
    sections = [" ".join(part.split()) for part in re.split(r"-{3,}", text)]
    near = re.search(r"Perhaps you meant:\s+(--[a-z-]+)", text)
    message = (sections[1] if len(sections) > 1 else sections[0]).rstrip(".")
    return message + (f". Did you mean {near[1]}?" if near else ".") + " --help lists all flags."


def _seconds(flag: str, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if not match:
        raise CommandError(f"{flag} wants a time such as 90s, 9m or 1.5h; got {text!r}.")
    return float(match[1]) * _UNITS[match[2]]


def table() -> str:
    """All recipes, one a line."""
    head = ("task", "model", "recipe", "length", "batch", "lr", "warm-up", "schedule", "decay", "precision", "source")
    rows = [head]
    for r in recipes.RECIPES:
        length = f"{r.epochs} epochs" if r.epochs else f"{r.updates:,} updates"
        rest = f"{r.weight_decay:g}", r.precision, r.source.split(":")[0].split(";")[0]
        rows.append((r.task, r.model, r.name, length, str(r.batch), f"{r.lr:.4g}", f"{r.warmup:,}", r.schedule, *rest))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    missing: dict[tuple[str, str], list[str]] = {}  # the same reason for several models or tasks is one line
    for (task, model, name), why in recipes.REFUSED.items():
        missing.setdefault((name, why), []).append(f"{task} {model}")
    refused = [f"no {name} for {', '.join(which)}: {why}." for (name, why), which in missing.items()]
    return "\n".join([*lines, "", *refused])


def _again(argv: Sequence[str]) -> str:
    kept = [a for a in argv if a not in ("--resume", "--overwrite")]
    return shlex.join(["python", "-m", "longseq_tutorial.train", *kept, "--resume"])


def _complain(line: str, code: int) -> int:
    if _is_main():
        print(" ".join(line.split()), file=sys.stderr)
    return code


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
