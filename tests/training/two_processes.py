"""What `accelerate launch` starts twice: every case trained, by each process with its half of every batch.

    accelerate launch --multi_gpu --num_processes 2 ... -m tests.training.two_processes FOLDER

Leaves in FOLDER, beside the records, what each process holds in the end: `<case>.rank<k>.safetensors`.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longseq_tutorial.models.parts import Norm
from longseq_tutorial.train import main as main_of_train
from longseq_tutorial.training import NonFiniteError, Record, checkpoint, fit, loop
from longseq_tutorial.training.run import Run

from . import tiny
from .test_train import arguments

LONGVQ = {**tiny.SMALL, "codes": 24, "window": 4, "decay": 0.5, "commitment": 0.1}
BATCHNORM = {"norm": "batchnorm", "prenorm": True, "attention": "laplace"}
ATTENTION = {"dim": 16, "layers": 1, "ffn_dim": 16, "head_dim": 16, "heads": 2}
CASES: dict[str, dict[str, Any]] = {  # no dropout: each process draws its own
    "mega": dict(overrides=tiny.SMALL),
    # A bias before a batch norm has no gradient but rounding errors, which Adam without a larger eps would blow up.
    "batchnorm": dict(overrides={**tiny.SMALL, **BATCHNORM}, eps=1e-3),
    "longvq": dict(model="longvq", overrides=LONGVQ),
    "longvq-batchnorm": dict(
        model="longvq", overrides={**LONGVQ, "norm": "batchnorm", "memory": "s4d", "state": 8}, eps=1e-3
    ),
    "fastrpb": dict(model="fastrpb", overrides={**ATTENTION, "qkv_dim": 16, "max_positions": 32}),
    "spade": dict(model="spade", overrides={**ATTENTION, "state": 8, "window": 8}),
    "transformer": dict(model="transformer", overrides=ATTENTION),
    "compiled": dict(model="transformer", overrides=ATTENTION, compile=True),
}
NOISY = {"seqboat": dict(model="seqboat", overrides={k: v for k, v in tiny.SMALL.items() if k != "ffn_dim"})}


def train(case: str, out: Path) -> Record:
    """Train a case, and keep what this process holds in the end."""
    original = Run.finish

    def finish(run: Run, test: dict[str, float]) -> Record:
        rank = run.accelerator.process_index
        checkpoint.write_safetensors(out / f"{case}.rank{rank}.safetensors", run.bare_model.state_dict(), {})
        return original(run, test)

    recipe = tiny.recipe(name=case, epochs=3, lr=0.003, augment=False, **{**CASES, **NOISY}[case])
    Run.finish, compiler = finish, torch.compile  # type: ignore[method-assign]
    torch.compile = partial(compiler, backend="eager")  # type: ignore[assignment]  # quick; needs no C++ compiler
    try:
        return fit(recipe, out=out, task=tiny.task(), progress=False, cpu=True)
    finally:
        Run.finish, torch.compile = original, compiler  # type: ignore[method-assign]


def command_line(out: Path) -> int:
    """The exit code of the command itself."""
    (out / "data").mkdir(exist_ok=True)
    return main_of_train([*arguments(out / "data", out), "model.dropout=0.0"])


def breaks_in_one_process(out: Path) -> str:
    """What is said when a layer of the second process gives infinite numbers."""
    original = loop.train_update

    def breaking(run: Run, pieces: Any) -> list[float]:
        if run.progress.update == 2 and run.accelerator.process_index == 1:
            run.bare_model.encoder.layers[0].feed_forward.fc1.register_forward_hook(lambda *a: a[2] * torch.inf)
        return original(run, pieces)

    loop.train_update = breaking
    try:
        train("longvq-batchnorm", out)
    except NonFiniteError as error:
        return str(error)
    finally:
        loop.train_update = original
    return ""


def norms() -> dict[str, Any]:
    """Outputs, gradients and running statistics, in float64, of a batch norm over rows shared unevenly."""
    torch.manual_seed(0)
    norm, x, weight = Norm("batchnorm", 3).double(), 1e4 + torch.randn(4, 5, 3).double(), torch.randn(4, 5, 3).double()
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2])[:, None]
    rank, processes = 0, 1
    if torch.distributed.is_initialized():
        rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x.requires_grad_()
    mine = slice(rank, None, processes)
    y = norm(x[mine], mask[mine])
    (y * weight[mine]).square().sum().backward()
    named = {"y": y, "x": x.grad[mine], "weight": norm.norm.weight.grad, "bias": norm.norm.bias.grad}
    return {key: tensor.detach().tolist() for key, tensor in {**named, **dict(norm.norm.named_buffers())}.items()}


def main(out: Path) -> None:
    """Everything that two processes do."""
    torch.set_num_threads(1)
    for case in (*CASES, *NOISY):
        train(case, out)
    said = breaks_in_one_process(out / "broken")
    rank = torch.distributed.get_rank()
    (out / f"rank{rank}.json").write_text(json.dumps({"said": said, "norm": norms()}))
    assert command_line(out) == 0  # comes last, as it takes leave of the other process
    assert not torch.distributed.is_initialized()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
