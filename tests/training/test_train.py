"""The command line: one clear line for every mistake, and runs that survive being killed."""

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longseq_tutorial import train
from longseq_tutorial.training import RECIPES, checkpoint

SMALL = "name=tiny data.train=64 data.valid=16 data.test=16 data.min_length=3 data.max_length=40 batch=8 warmup=5"
SMALL += " model.dim=16 model.layers=1 model.z_dim=8 model.v_dim=16 model.ffn_dim=16 model.n=4 model.head_dim=16"
NAME = "listops-mega-tiny-seed0"


def arguments(data: Path, out: Path, *more: str, updates: int = 16) -> list[str]:
    base = ["--task", "listops", "--model", "mega", "--recipe", "laptop", "--cpu"]
    settings = [*SMALL.split(), f"updates={updates}", f"eval_every={updates // 2}"]
    return [*base, "--data", str(data), "--out", str(out), *more, "--set", *settings]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], code: int = 2) -> str:
    assert train.main(argv) == code
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert len(lines) == 1 and "Traceback" not in said.err, said.err
    return lines[0]


CPU = ["--task", "listops", "--model", "mega", "--recipe", "laptop"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--taks", "speech"], "Unrecognized options: --taks, speech. Did you mean --task?"),
        (["--resum"], "Did you mean --resume?"),
        (["--set", "lr=1", "--set", "epochs=2"], "--set was given 2 times"),
        (["--seed", "x"], "--seed"),
        (["--task"], "Missing value for argument '--task'"),
        ([], "--task is missing; --list shows all"),
        (["--task", "listops", "--model", "mega"], "--recipe is missing"),
        (["--task", "speach", "--model", "mega", "--recipe", "paper"], "unknown task 'speach'"),
        (["--task", "speech", "--model", "mgea", "--recipe", "paper"], "Did you mean mega?"),
        (["--task", "speech", "--model", "mega", "--recipe", "papier"], "Did you mean paper?"),
        (["--task", "speech", "--model", "transformer", "--recipe", "paper"], "does not fit the memory"),
        ([*CPU, "--set", "lr"], "--set wants key=value"),
        ([*CPU, "--set", "lrr=1"], "unknown setting 'lrr'"),
        ([*CPU, "--set", "epochs=2", "updates=2"], "give either epochs or updates"),
        ([*CPU, "--set", "warmup=9999"], "the warm-up must end before the run does"),
        ([*CPU, "--max-time", "soon"], "--max-time wants a time such as 90s, 9m or 1.5h; got 'soon'"),
        ([*CPU, "--seed", "-1"], "--seed must be a whole number >= 0; got -1"),
        ([*CPU, "--data", "/no/such/folder"], "/no/such/folder"),
        ([*CPU, "--set", "data.trian=9"], "has no option 'trian'"),
        ([*CPU, "--set", "data.source=sample"], "source='sample' is as it is"),
        ([*CPU, "--set", "model.dimm=3"], "cannot build mega for listops: mega has no setting 'dimm'"),
        ([*CPU, "--set", "model.norm=nrom"], "norm must be one of"),
        ([*CPU, "--set", "model.dim=wide"], "dim must be a whole number"),
        ([*CPU, "--set", "accumulate=3"], "equal pieces"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert message in refused(capsys, argv)


def test_a_data_file_cut_short(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train.main(arguments(tmp_path, tmp_path, "--max-time", "0s"))  # makes the data, then stops
    capsys.readouterr()
    chunk = next((tmp_path / "listops").rglob("*.npz"))
    whole = chunk.read_bytes()
    for damaged in (whole[:-100], whole[:2000] + b"??" + whole[2002:], b""):
        chunk.write_bytes(damaged)
        assert chunk.name in refused(capsys, arguments(tmp_path, tmp_path, "--overwrite"))


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert not stopped.value.code and "--max-time" in capsys.readouterr().out
    assert train.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1 + len(RECIPES)] == "" and len(lines) < len(RECIPES) + 20
    assert any("no paper for speech transformer" in line and "does not fit" in line for line in lines)


def test_stop_resume_finish(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    assert train.main(arguments(data, tmp_path, "--max-time", "0s")) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "after update 1 of 16 (time)" in said and said.endswith("--resume")
    assert "--overwrite" in refused(capsys, arguments(data, tmp_path))
    assert "there updates is 16, here 32" in refused(capsys, arguments(data, tmp_path, "--resume", updates=32))
    assert train.main(arguments(data, tmp_path, "--resume")) == 0
    assert "going on after update 1 of 16" in capsys.readouterr().out
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["sessions"] == 2


@pytest.mark.slow
def test_the_whole_command_and_ctrl_c(data: Path, tmp_path: Path) -> None:
    """In a process of its own: Ctrl-C saves, says how to go on, and exits with 130."""
    command = [sys.executable, "-m", "longseq_tutorial.train", *arguments(data, tmp_path, updates=100_000)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    events = tmp_path / NAME
    while process.poll() is None and not list(events.glob("events*")):
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error, error
    assert "(interrupt), everything saved" in error.splitlines()[-1] and error.rstrip().endswith("--resume")
    assert checkpoint.exists(events)


@pytest.mark.slow
def test_killed_at_random_moments(data: Path, tmp_path: Path) -> None:
    """Real processes, real SIGKILL, a save after every update: the final weights are those of a run left alone."""
    context = multiprocessing.get_context("forkserver")
    # So that a new process costs no import (torch imports some of itself with the first optimiser).
    context.set_forkserver_preload(["longseq_tutorial.train", "torch._dynamo", "torch.utils.tensorboard"])
    updates = 60

    def start(out: Path, *more: str) -> multiprocessing.process.BaseProcess:
        argv = arguments(data, out, "--save-every", "0s", *more, updates=updates)
        process = context.Process(target=train.main, args=(argv,))
        process.start()
        return process

    reference = start(tmp_path / "whole")
    reference.join(120)
    seconds = json.loads((tmp_path / "whole" / f"{NAME}.json").read_text())["seconds"]
    whole = (tmp_path / "whole" / f"{NAME}.safetensors").read_bytes()

    rng = random.Random(0)
    folder, done = tmp_path / "parts" / NAME, tmp_path / "parts" / f"{NAME}.json"

    def newest() -> int:
        try:
            return (folder / checkpoint.NEWEST).stat().st_mtime_ns
        except OSError:  # not there yet, or at this moment between its two names
            return 0

    kills = 0
    for _ in range(5):
        before = newest()
        process = start(tmp_path / "parts", "--resume")
        while process.exitcode is None and newest() in (0, before):  # until it got a little further ...
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.1) * seconds)  # ... and at any moment after that
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
    last = start(tmp_path / "parts", "--resume")
    last.join(120)
    assert kills >= 3, "the run was too quick to be killed"
    assert (tmp_path / "parts" / f"{NAME}.safetensors").read_bytes() == whole
    assert not list(tmp_path.rglob("*.tmp")), "what a killed save left is cleared up"
    record = json.loads(done.read_text())
    assert record["updates"] == updates and record["history"][-1]["update"] == updates
