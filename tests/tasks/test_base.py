"""The contract: configs, splits, batches, folders, names and options."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, Split, TaskConfig, collate
from longseq_tutorial.tasks.base import read_folders, write_folder


def split_of(*sequences: list[int], length: int | None = None) -> Split:
    values = np.array([token for sequence in sequences for token in sequence], dtype=np.uint8)
    offsets = np.cumsum([0] + [len(sequence) for sequence in sequences])
    return Split(values, offsets, np.arange(len(sequences)), length)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "text"}, "'tokens' or 'samples'"),
        ({"vocabulary": 0}, "vocabulary > 0"),
        ({"sample_rate": 8000}, "sample_rate 0"),
        ({"kind": "samples"}, "sample_rate > 0"),
        ({"grid": (2, 4)}, "9 pixels together"),
        ({"kind": "samples", "vocabulary": 0, "sample_rate": 9, "grid": (3, 3)}, "sample_rate > 0 or a grid"),
        ({"classes": 1}, "classes >= 2"),
        ({"length": 0}, "length >= 1"),
        ({"class_names": ("a",)}, "as many class_names; got 1"),
    ],
)
def test_config_refuses_contradictions(change, says):
    right = {"name": "t", "kind": "tokens", "classes": 2, "length": 9, "vocabulary": 16}
    TaskConfig(**right)
    with pytest.raises(DataError, match=says):
        TaskConfig(**(right | change))


def test_split_items_lengths_and_labels():
    split = split_of([1, 2, 3], [4], [5, 6])
    assert len(split) == 3
    assert [(x.tolist(), label) for x, label in split] == [([1, 2, 3], 0), ([4], 1), ([5, 6], 2)]
    assert split[0][0].dtype == torch.int64
    assert split.lengths.tolist() == [3, 1, 2]
    assert split.labels.tolist() == [0, 1, 2]
    assert split[-1][0].tolist() == [5, 6]
    for index in (3, -4):
        with pytest.raises(IndexError):
            split[index]


def test_split_cuts_to_length_selects_and_pickles():
    split = split_of([1, 2, 3], [4], [5, 6], length=2)
    assert split.lengths.tolist() == [2, 1, 2]
    assert split[0][0].tolist() == [1, 2]
    part = pickle.loads(pickle.dumps(split.select(split.labels != 1)))
    assert [(x.tolist(), label) for x, label in part] == [([1, 2], 0), ([5, 6], 2)]
    assert len(split.select(np.array([], dtype=int))) == len(split.select([])) == 0


def test_pictures_need_no_sample_rate():
    config = TaskConfig("t", "samples", 2, 9, grid=[3, 3])  # a record gives lists back
    assert config.grid == (3, 3)
    assert TaskConfig("t", "tokens", 2, 9, vocabulary=257, grid=(3, 3)).grid == (3, 3)


def test_small_values_become_numbers_when_they_are_read():
    values, offsets, labels = np.array([0, 255, 51], np.uint8), np.array([0, 2, 3]), np.array([0, 1])
    bytes_above_padding = Split(values, offsets, labels, shift=1)
    assert bytes_above_padding[0][0].tolist() == [1, 256] and bytes_above_padding[0][0].dtype == torch.int64
    pixels = Split(values, offsets, labels, scale=2 / 255, shift=-1)
    assert pixels[0][0].tolist() == [-1, 1] and pixels[1][0].item() == pytest.approx(-0.6)
    each = Split(values.astype(np.int16), offsets, labels, scale=np.array([0.5, 2]), shift=np.array([1.0, 0]))
    assert each[0][0].tolist() == [1, 128.5] and each.select([1])[0][0].tolist() == [102]
    assert each[0][0].dtype == torch.float32
    with pytest.raises(DataError, match=r"scale must be one number, or one for each of 2; got \(3,\)"):
        Split(values, offsets, labels, scale=np.ones(3))


def test_items_are_copies():
    split = split_of([1, 2, 3])
    split[0][0].zero_()
    assert split[0][0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("offsets", "labels", "says"),
    [
        ([0, 2], [0, 0], "2 offsets, 2 labels"),
        ([0, 5], [0], "to <= 4"),
        ([-1, 2], [0], "-1 to 2"),
        ([0, 3, 2], [0, 0], "1 of them not rising"),
        ([0, 2, 2], [0, 0], "1 of them not rising"),
    ],
)
def test_split_refuses_what_does_not_fit(offsets, labels, says):
    with pytest.raises(DataError, match=says):
        Split(np.zeros(4, np.uint8), np.array(offsets), np.array(labels))


@given(st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=9), min_size=1, max_size=6))
def test_collate_pads_right_and_the_mask_is_the_truth(sequences):
    batch = collate(list(split_of(*sequences)))
    longest = max(map(len, sequences))
    assert batch.x.shape == batch.mask.shape == (len(sequences), longest)
    assert (batch.x.dtype, batch.mask.dtype, batch.label.dtype) == (torch.int64, torch.bool, torch.int64)
    assert batch.mask.sum(1).tolist() == [len(sequence) for sequence in sequences]
    for i, sequence in enumerate(sequences):
        assert batch.x[i][batch.mask[i]].tolist() == sequence
        assert batch.x[i].tolist() == sequence + [0] * (longest - len(sequence))
    assert batch.label.tolist() == list(range(len(sequences)))


def test_collate_keeps_samples_as_float():
    batch = collate([(torch.tensor([0.5, -0.5]), 1), (torch.tensor([1.0]), 0)])
    assert batch.x.dtype == torch.float32
    assert batch.x.tolist() == [[0.5, -0.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    "items",
    [
        [],
        [(torch.zeros(0), 0)],
        [(torch.zeros(2, 2), 0)],
        [(torch.zeros(2), 0), (torch.zeros(2, dtype=torch.int64), 0)],
    ],
)
def test_collate_refuses(items):
    with pytest.raises(DataError):
        collate(items)


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGSEQ_DATA", str(tmp_path))
    own = write_folder(None)
    assert read_folders(None) == [tmp_path, own]  # read from the shared folder, written only to our own
    assert own != tmp_path
    other = tmp_path / "other"
    other.mkdir()
    assert read_folders(other) == [other] == [write_folder(other)]
    monkeypatch.delenv("LONGSEQ_DATA")
    assert read_folders(None) == [own]


def test_folders_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"root must name a folder.*does not exist"):
        read_folders(tmp_path / "none")
    with pytest.raises(DataError, match="is a file"):
        write_folder(tmp_path / "file")
    monkeypatch.setenv("LONGSEQ_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match="LONGSEQ_DATA must name a folder"):
        read_folders(None)


def test_names_options_and_mistakes():
    assert tasks.names() == ("listops", "text", "retrieval", "image", "pathfinder", "pathx", "speech")
    assert tasks.options("speech")["normalise"] == "rms"
    with pytest.raises(DataError, match=r"unknown task .speach.; choose from listops, .*, speech"):
        tasks.load("speach")
    with pytest.raises(DataError, match=r"no option 'lenght'; it has .*length"):
        tasks.load("speech", lenght=3)
    for wrong in ({"train": "many"}, {"train": True}, {"train": 2.5}, {"seed": "x"}, {"root": 3}):
        with pytest.raises(DataError, match=f"{next(iter(wrong))} must be"):
            tasks.load("listops", **wrong)


def test_sources_say_size_or_licence_of_each():
    for name in tasks.names():
        known = tasks.sources(name)
        assert "sample" in known and all(known.values())
        assert tasks.options(name)["source"] in {"auto", *known}
        assert "made by this project" in tasks.load(name, source="sample").config.source  # offline, for every task


def test_every_message_is_one_line():
    assert str(DataError("two\n   lines")) == "two lines"
