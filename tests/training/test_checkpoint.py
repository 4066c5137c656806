"""Checkpoints: complete, atomic, checked when read, never unpickled."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longseq_tutorial.training import CheckpointError, checkpoint
from longseq_tutorial.training.checkpoint import NEWEST, PREVIOUS


def model_and_optimizer(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    model[2].weight = torch.nn.Parameter(model[0].weight.detach().T.clone())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_model_and_moments_come_back(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(0, 3)
    checkpoint.save(tmp_path, checkpoint.pack(model, optimizer), {"update": 3, "loss": 0.1 + 0.2})
    tensors, state, warning = checkpoint.load(tmp_path)
    assert state == {"update": 3, "loss": 0.1 + 0.2} and warning == ""
    other, other_optimizer = model_and_optimizer(1, 1)
    checkpoint.unpack(tensors, other, other_optimizer)
    torch.manual_seed(9)
    x = torch.randn(5, 3)
    for m, o in ((model, optimizer), (other, other_optimizer)):  # the next step is the same to the last bit
        m(x).square().sum().backward()
        o.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(0, 0)
    other, other_optimizer = model_and_optimizer(1, 2)
    checkpoint.unpack(checkpoint.pack(model, optimizer), other, other_optimizer)
    assert not other_optimizer.state_dict()["state"]


def test_tied_weights_are_stored() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters())
    assert {"model.0.weight", "model.1.weight"} <= checkpoint.pack(model, optimizer).keys()


def test_a_checkpoint_of_another_model_is_refused() -> None:
    tensors = checkpoint.pack(*model_and_optimizer(0, 1))
    small = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        checkpoint.unpack(tensors, small, torch.optim.AdamW(small.parameters()))


def test_random_states_come_back(tmp_path: Path) -> None:
    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), torch.randn(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002

    draw(), random.gauss(0, 1), np.random.standard_normal()  # leave a second Gaussian waiting  # noqa: NPY002
    checkpoint.save(tmp_path, checkpoint.random_states(), {})
    expected = draw(), random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
    tensors, _, _ = checkpoint.load(tmp_path)
    assert all(state.dtype == torch.uint8 for state in tensors.values())
    checkpoint.restore_random_states(tensors)
    assert expected == (draw(), random.gauss(0, 1), np.random.standard_normal())  # noqa: NPY002


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for update in (1, 2, 3):
        checkpoint.save(tmp_path, {"x": torch.tensor(update)}, {"update": update})
    assert sorted(p.name for p in tmp_path.iterdir()) == [PREVIOUS, NEWEST]
    assert checkpoint.load(tmp_path)[1] == {"update": 3}
    (tmp_path / NEWEST).unlink()
    assert checkpoint.load(tmp_path)[1] == {"update": 2}
    checkpoint.remove(tmp_path)
    assert not checkpoint.exists(tmp_path)


@pytest.mark.parametrize("call", range(14))
def test_a_crash_in_any_system_call_of_a_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    monkeypatch.setattr(checkpoint, "LARGEST", 200_000 + 600)
    for update in (1, 2):
        checkpoint.save(tmp_path, {**big(update), "x": torch.tensor(update)}, {"update": update})
    count = 0

    def dying(original: Any) -> Any:
        def function(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count > call:  # from here on, nothing reaches the disk any more
                raise KeyboardInterrupt
            return original(*arguments)

        return function

    with monkeypatch.context() as patch:
        for name in ("replace", "fsync", "open"):
            patch.setattr(os, name, dying(getattr(os, name)))
        try:
            checkpoint.save(tmp_path, {**big(3), "x": torch.tensor(3)}, {"update": 3})
        except KeyboardInterrupt:
            pass
    assert (count <= call) == (call == 13), "the last of these crashes would come after the save"
    tensors, state, warning = checkpoint.load(tmp_path)
    assert state["update"] == tensors["x"].item() and state["update"] in (2, 3) and warning == ""


def broken(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = bytearray()
    elif how == "truncated":
        del data[-7:]
    elif how == "header only":
        del data[100:]
    elif how == "a flipped bit":
        data[-5] ^= 4
    elif how == "a changed counter":
        data = bytearray(bytes(data).replace(rb"\"update\": 2", rb"\"update\": 7"))
    elif how == "text":
        data = bytearray(b"this is no checkpoint at all")
    assert bytes(data) != path.read_bytes()
    path.write_bytes(data)


def big(update: int) -> dict[str, torch.Tensor]:
    """Three tensors of 400 bytes, the last of which never changes."""
    names = ("model.a", "optimizer.a.exp_avg", "best.a")
    return {name: torch.full((100,), float(update if name != "best.a" else 0)) for name in names}


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "LARGEST", 200_000 + 600)


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint.part-*"))


def test_what_does_not_fit_one_file_lies_in_several(tmp_path: Path, small_files: None) -> None:
    for update in (1, 2, 3):
        checkpoint.save(tmp_path, big(update), {"update": update})
        tensors, state, warning = checkpoint.load(tmp_path)
        assert state == {"update": update} and warning == ""
        assert tensors.keys() == big(update).keys()
        assert all(torch.equal(tensors[name], value) for name, value in big(update).items())
    assert len(parts(tmp_path)) == 4, "model and moments of the last two; what is older is gone"
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 1_500
    checkpoint.save(tmp_path, {"x": torch.zeros(1)}, {})  # the next run may be small
    checkpoint.save(tmp_path, {"x": torch.zeros(1)}, {})
    assert not parts(tmp_path)
    checkpoint.save(tmp_path, big(4), {})
    checkpoint.remove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_unchanged_parts_are_not_written_again(tmp_path: Path, small_files: None) -> None:
    ordered = dict(sorted(big(1).items()))  # the best weights first: a part, not the last file
    checkpoint.save(tmp_path, ordered, {})
    before = {path.name: path.stat().st_mtime_ns for path in parts(tmp_path)}
    checkpoint.save(tmp_path, dict(sorted(big(2).items())), {})
    after = {path.name: path.stat().st_mtime_ns for path in parts(tmp_path)}
    assert len(before.keys() & after.keys()) == 2 and all(after[name] == time for name, time in before.items())


def test_a_lost_or_broken_part_means_the_previous_checkpoint(tmp_path: Path, small_files: None) -> None:
    checkpoint.save(tmp_path, big(1), {"update": 1})
    old = parts(tmp_path)
    checkpoint.save(tmp_path, big(2), {"update": 2})
    new = [path for path in parts(tmp_path) if path not in old]
    new[0].write_bytes(new[0].read_bytes()[:-1])
    tensors, state, warning = checkpoint.load(tmp_path)
    assert state == {"update": 1} and "corrupt" in warning and tensors["model.a"][0] == 1
    new[0].unlink()
    assert checkpoint.load(tmp_path)[1] == {"update": 1}
    for path in old:
        path.unlink()
    with pytest.raises(CheckpointError, match="without --resume"):
        checkpoint.load(tmp_path)


HOW = ["empty", "truncated", "header only", "a flipped bit", "a changed counter", "text"]


@pytest.mark.parametrize("how", HOW)
def test_a_broken_checkpoint_is_noticed_and_the_previous_one_taken(tmp_path: Path, how: str) -> None:
    for update in (1, 2):
        checkpoint.save(tmp_path, {"x": torch.arange(9.0)}, {"update": update})
    broken(tmp_path / NEWEST, how)
    _, state, warning = checkpoint.load(tmp_path)
    assert state == {"update": 1}
    assert "corrupt" in warning and f"Going on from {PREVIOUS}" in warning and "\n" not in warning


@pytest.mark.parametrize("how", HOW)
def test_nothing_whole_left_is_one_clear_line(tmp_path: Path, how: str) -> None:
    checkpoint.save(tmp_path, {"x": torch.arange(9.0)}, {"update": 2})
    broken(tmp_path / NEWEST, how)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path)
    assert "corrupt" in str(caught.value) and "without --resume" in str(caught.value) and "\n" not in str(caught.value)


def test_other_peoples_files_and_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        checkpoint.load(tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / NEWEST)
    with pytest.raises(CheckpointError, match="not written by this project"):
        checkpoint.load(tmp_path)


def test_equal_content_is_equal_bytes_and_types_survive(tmp_path: Path) -> None:
    tensors = {"x": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(3), "b": torch.tensor([True])}
    for name in "ab":
        checkpoint.write_safetensors(tmp_path / name, tensors, {key: [1, None] for key in "zyxwvu"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read, about = checkpoint.read_safetensors(tmp_path / "a")
    assert read["x"].dtype == torch.bfloat16 and read["n"].shape == () and about["u"] == [1, None]
