"""What a run asks of the machine: reproducible arithmetic, signals, facts for the record."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longseq_tutorial.training import machine


def test_facts() -> None:
    device = torch.device("cpu")
    assert machine.versions()["torch"] == torch.__version__
    assert machine.device_name(device)
    assert machine.peak_memory(device)["rss"] > 50 * 2**20
    assert machine.utc_now().endswith("+00:00")


def test_commit_is_that_of_this_repository_or_unknown() -> None:
    commit, dirty = machine.commit()
    here = Path(machine.__file__).parent
    tracked = subprocess.run(["git", "ls-files", "--error-unmatch", "machine.py"], cwd=here, capture_output=True)
    if tracked.returncode:
        assert (commit, dirty) == ("unknown", False)
    else:
        assert len(commit) == 40
        clean = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=here).returncode == 0
        assert dirty is not clean


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.commit() == ("unknown", False)


def test_reproducible_is_put_back() -> None:
    with machine.reproducible(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory is True  # type: ignore[attr-defined]


THREADS = """
import torch
torch.set_num_threads(2)
from longseq_tutorial.training import machine
with machine.reproducible(torch.device("cpu")):
    tiny = torch.full((4_000_000,), 1e-30)          # large enough that both threads take part
    print(int((tiny * 1e-12 != 0).sum()))           # 1e-42 is denormal
    index = torch.randint(0, 50, (200_000,))
    sums = []
    for _ in range(5):
        table = torch.zeros(50, requires_grad=True)
        (table[index] * torch.linspace(0, 1, 200_000)).sum().backward()
        sums.append(table.grad)
    print(all(torch.equal(sums[0], s) for s in sums))
"""


def test_threads_flush_denormals_and_add_in_a_fixed_order() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, env=environment, check=True)
    supported = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    assert done.stdout.split() == ["0" if supported else "4000000", "True"]


def test_an_interrupt_is_a_flag_first_and_an_exception_then(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with machine.Interrupt() as interrupt:
        assert not interrupt.seen
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.seen
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert "stopping after this update" in capfd.readouterr().err


def test_one_process_may_train_in_one_precision_after_another() -> None:
    for precision in ("float32", "bf16", "float32"):
        accelerator = machine.make_accelerator(precision, cpu=True)
        with accelerator.autocast():
            y = torch.ones(2, 2) @ torch.ones(2, 2)
        assert y.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
