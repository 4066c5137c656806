"""Does it hold here? `python -m benchmarks.holds`: every model on this machine's device against the CPU in float64.

The first thing to run on a new device, before anything is timed or trained. A model of the size that `gpu-30min` trains
on Text, with two layers, answers and learns one step in float64, float32 and bfloat16 (autocast), with `--compile` also
as torch.compile makes it; the answers and the gradients are compared with those of the CPU in float64.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longseq_tutorial import models
from longseq_tutorial.mechanisms.vector_quantizer import VectorQuantizer
from longseq_tutorial.tasks import TaskConfig
from longseq_tutorial.training import machine, recipes

TASK = TaskConfig(name="text", kind="tokens", classes=2, length=4096, vocabulary=257)
# The error allowed, relative to the norm: of the answers, and of all gradients together. Rounding moves a token over
# SeqBoat's threshold and a key to another code, and then more than the last digits differ.
ALLOWED = {"float64": (1e-9, 1e-8), "float32": (1e-4, 1e-2), "bf16": (2e-2, 1e-1)}


class Outcome(NamedTuple):
    """How one model did in one precision."""

    model: str
    precision: str
    compiled: bool
    answers: float  # relative error of the logits
    gradients: float  # likewise of all gradients together
    seconds: float  # of the first step, compilation included
    wrong: str = ""  # why there are no numbers

    @property
    def fine(self) -> bool:
        """Whether both errors are allowed; a NaN is not."""
        answers, gradients = ALLOWED[self.precision]
        return self.answers <= answers and self.gradients <= gradients


def batch(length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four sequences of random tokens, one of them a quarter shorter: tokens, mask, labels."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(1, TASK.vocabulary, (4, length), generator=draw)
    mask = torch.ones(4, length, dtype=torch.bool)
    mask[1, length - length // 4 :] = False
    return x.masked_fill(~mask, 0), mask, torch.tensor([0, 1, 0, 1])


def build(name: str) -> nn.Module:
    """The model without dropout, the same in every call; its codes start as they are, not from keys of the batch."""
    torch.manual_seed(0)
    recipe = recipes.get(TASK.name, name, "gpu-30min")
    off = {key: 0.0 for key in models.configure(name, TASK.name).__dict__ if "dropout" in key}
    model = models.build(name, TASK, **{**recipe.overrides, **off, "layers": 2})
    for module in model.modules():
        if isinstance(module, VectorQuantizer):  # as after the first update of a run
            module.set_codebook(module.codebook)
    return model


def step(model: nn.Module, bare: nn.Module, length: int, device: torch.device, bf16: bool) -> list[Tensor]:
    """Logits, and all gradients as one vector, both float64 on the CPU."""
    x, mask, label = (t.to(device) for t in batch(length))
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = model(x, mask)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    (F.cross_entropy(wide, label) + models.auxiliary_loss(bare)).backward()
    gradients = [p.grad.flatten() for p in bare.parameters() if p.grad is not None]
    return [t.detach().double().cpu() for t in (wide, torch.cat(gradients))]


def outcomes(name: str, length: int, device: torch.device, compiled: bool) -> Iterator[Outcome]:
    """One model in every precision."""
    truth = build(name).double()
    want = step(truth, truth, length, torch.device("cpu"), False)
    for precision in ALLOWED:
        for compiling in (False, True) if compiled and precision != "float64" else (False,):
            bare = build(name).to(device, torch.float64 if precision == "float64" else torch.float32)
            model = machine.compiled(bare) if compiling else bare
            started = time.perf_counter()
            errors, wrong = [math.nan, math.nan], ""
            try:
                got = step(model, bare, length, device, precision == "bf16")
                errors = [float((g - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
            except Exception as error:  # no memory, no kernel, no compiler: the others may hold, and time there is dear
                wrong = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            yield Outcome(name, precision, compiling, *errors, time.perf_counter() - started, wrong)


def main(arguments: list[str] | None = None) -> int:
    """0 when all hold, 1 when one does not, 2 for a word that is not understood."""
    parser = argparse.ArgumentParser(prog="benchmarks.holds", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"all when none: {', '.join(models.NAMES)}")
    # Above the 1,024 lags that the EMA of Mega and SeqBoat keeps: below, no kernel is cut off, and the FFT would go
    # untried. From about 4,100 on full attention is cut into tiles on a GPU.
    parser.add_argument("--length", type=int, default=2500)
    parser.add_argument("--compile", action="store_true", help="also what torch.compile makes: a minute a model")
    options = parser.parse_args(arguments)
    if unknown := set(options.models) - set(models.NAMES):
        parser.error(f"no model {', '.join(sorted(unknown))}. There are: {', '.join(models.NAMES)}.")
    if options.length < 8:
        parser.error("--length must be at least 8.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{machine.device_name(device)}, torch {torch.__version__}, {options.length:,} tokens; errors against the CPU"
    )
    print(f"{'model':12} {'precision':18} {'answers':>9} {'gradients':>10} {'first step':>11}")
    failed = 0
    for name in options.models or models.NAMES:
        for one in outcomes(name, options.length, device, options.compile):
            failed += not one.fine
            how = one.precision + (", compiled" if one.compiled else "")
            print(
                f"{one.model:12} {how:18} {one.answers:9.1e} {one.gradients:10.1e} {one.seconds:9.2f} s"
                f"{'' if one.fine else f'   {one.wrong}' if one.wrong else '   too far'}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
