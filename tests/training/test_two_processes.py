"""Several processes are one with the whole batch: the same losses, codebooks and batch statistics, to rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longseq_tutorial.training import Record, checkpoint, read_record
from longseq_tutorial.training.diagnose import NOTHING, most_telling

from . import two_processes
from .test_train import NAME
from .two_processes import CASES, NOISY

LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave, all cases in one launch: importing torch twice takes longer than training."""
    out = tmp_path_factory.mktemp("two")
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    command = [*LAUNCH, "-m", "tests.training.two_processes", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def held(folder: Path, case: str, rank: int) -> dict[str, torch.Tensor]:
    return checkpoint.read_safetensors(folder / f"{case}.rank{rank}.safetensors")[0]


def assert_same_curve(one: Record, shared: Record) -> None:
    assert (one.processes, shared.processes) == (1, 2) and shared.cpu_seconds > 0
    assert len(one.history) == len(shared.history) > 2
    for alone, together in zip(one.history, shared.history, strict=True):
        for part in ("train", "valid"):
            if alone[part]:
                assert together[part] == pytest.approx(alone[part], rel=2e-4, abs=1e-6)
    assert shared.test == pytest.approx(one.test, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_with_twice_the_batch(two: Path, tmp_path: Path, case: str) -> None:
    one = two_processes.train(case, tmp_path)
    assert_same_curve(one, read_record(next(two.glob(f"tiny-*-{case}-seed0.json"))))
    mine, theirs = held(tmp_path, case, 0), held(two, case, 0)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-2, atol=1e-3, msg=lambda said, n=name: f"{n}: {said}")
    if case == "longvq":
        draws = [int(tensor) for name, tensor in mine.items() if name.endswith("draws")]
        assert min(draws) > 3, "codes died and were drawn anew, or this proves little"


@pytest.mark.slow
def test_the_command_itself(two: Path, tmp_path: Path) -> None:
    assert two_processes.command_line(tmp_path) == 0
    assert_same_curve(*(read_record(folder / f"{NAME}.json") for folder in (tmp_path, two)))


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *NOISY])
def test_processes_hold_the_same_bits(two: Path, case: str) -> None:
    first, second = held(two, case, 0), held(two, case, 1)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_batch_statistics_are_those_of_the_whole_batch(two: Path) -> None:
    alone = two_processes.norms()
    ranks = [json.loads((two / f"rank{rank}.json").read_text())["norm"] for rank in (0, 1)]
    for name in ("y", "x"):  # rows in turns
        together = [row for pair in zip(ranks[0][name], ranks[1][name], strict=True) for row in pair]
        torch.testing.assert_close(torch.tensor(together), torch.tensor(alone[name]), rtol=1e-9, atol=1e-9)
    for name in ("weight", "bias"):  # each process has what came from its own rows
        together = torch.tensor(ranks[0][name]) + torch.tensor(ranks[1][name])
        torch.testing.assert_close(together, torch.tensor(alone[name]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for rank in ranks:
            torch.testing.assert_close(torch.tensor(rank[name]), torch.tensor(alone[name]))


@pytest.mark.slow
def test_numbers_that_break_in_one_process_are_named_by_all(two: Path) -> None:
    for rank in (0, 1):
        said = json.loads((two / f"rank{rank}.json").read_text())["said"]
        assert said.startswith("update 2: the loss or its gradient is not finite; ")
        assert "the output of encoder.layers.0.feed_forward.fc1 (Linear)" in said and "(process 1)" in said


def test_a_cause_is_told_before_its_consequence() -> None:
    gradient, output = "the gradient of a has", "the output of b has"
    assert most_telling([gradient, output]) == f"{output} (process 1)"
    assert most_telling([NOTHING, gradient]) == f"{gradient} (process 1)"
    assert most_telling([NOTHING]) == NOTHING
