"""The order of the data: a pure function of seed and epoch, complete, shared out evenly, and resumable anywhere."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longseq_tutorial import tasks
from longseq_tutorial.tasks import Batch, PairBatch, PairSplit, Task, TaskConfig, collate
from longseq_tutorial.training.batches import (
    answer,
    collate_to,
    epoch_batches,
    evaluation_batches,
    generator,
    round_length,
    to_device,
    training_batches,
)

from . import tiny

LENGTHS = np.random.default_rng(0).integers(1, 1000, 1013)


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 1000), st.booleans())
def test_an_epoch_holds_each_sequence_once(batch: int, seed: int, epoch: int, bucket: bool) -> None:
    batches = epoch_batches(LENGTHS, batch, seed=seed, epoch=epoch, bucket=bucket)
    assert len(batches) == len(LENGTHS) // batch and {len(b) for b in batches} == {batch}
    assert len(np.unique(np.concatenate(batches))) == batch * len(batches)


@pytest.mark.parametrize("bucket", [True, False])
def test_order_depends_on_seed_and_epoch_only(bucket: bool) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        np.random.seed(epoch)  # noqa: NPY002  # global generators must not matter
        return np.concatenate(epoch_batches(LENGTHS, 16, seed=seed, epoch=epoch, bucket=bucket)).tolist()

    assert order(3, 5) == order(3, 5)
    assert order(3, 5) != order(3, 6) and order(3, 5) != order(4, 5)


def test_buckets_save_padding_and_still_mix() -> None:
    def padding(bucket: bool) -> float:
        batches = epoch_batches(LENGTHS, 16, seed=0, epoch=0, bucket=bucket)
        return sum(len(b) * LENGTHS[b].max() for b in batches) / sum(LENGTHS[b].sum() for b in batches)

    assert padding(True) < 1.1 < 1.6 < padding(False)
    first, second = ([set(b) for b in epoch_batches(LENGTHS, 16, seed=0, epoch=e, bucket=True)] for e in (0, 1))
    assert not any(b in second for b in first)
    means = [LENGTHS[list(b)].mean() for b in first]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3, "short sequences must not all come first"


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("start", [0, 3, 8, 11, 16, 19])
def test_going_on_anywhere_gives_the_batches_that_were_left(start: int) -> None:
    options = dict(batch=8, accumulate=2, augment=True, seed=4, stop=20)  # 8 updates an epoch
    whole = list(training_batches(tiny.task(), **options))
    torch.rand(3)
    rest = list(training_batches(tiny.task(), start=start, **options))
    assert len(whole) == 20 and len(rest) == 20 - start
    assert all(same(a, b) for old, new in zip(whole[start:], rest, strict=True) for a, b in zip(old, new, strict=True))


def test_batches_leave_the_generator_that_dropout_uses_alone() -> None:
    before = torch.get_rng_state()
    list(training_batches(tiny.task(), batch=8, augment=True, seed=0, stop=10))
    assert torch.equal(before, torch.get_rng_state())


def test_processes_and_pieces_share_an_update() -> None:
    def sequences(pieces: list[Batch]) -> list[list[int]]:
        return sorted(row[mask].tolist() for piece in pieces for row, mask in zip(piece.x, piece.mask, strict=True))

    alone = [sequences(pieces) for pieces in training_batches(tiny.task(), batch=8, seed=0, stop=9)]
    shares = [
        list(training_batches(tiny.task(), batch=8, accumulate=2, seed=0, stop=9, rank=rank, processes=2))
        for rank in (0, 1)
    ]
    assert [len(piece.label) for piece in shares[0][0]] == [2, 2]
    assert [sequences(a + b) for a, b in zip(*shares, strict=True)] == alone


def test_workers_change_nothing() -> None:
    options = dict(batch=8, augment=True, seed=1, stop=4)
    plain, worked = (list(training_batches(tiny.task(), workers=n, **options)) for n in (0, 1))
    assert all(same(a[0], b[0]) for a, b in zip(plain, worked, strict=True))


def test_augmentation_is_of_the_step_and_only_when_asked() -> None:
    options = dict(batch=70, seed=0, stop=2)
    plain, again, changed = (
        list(training_batches(tiny.task(), augment=augment, **options)) for augment in (False, True, True)
    )
    assert same(again[0][0], changed[0][0]) and not torch.equal(plain[0][0].x, changed[0][0].x)
    assert torch.equal(plain[0][0].mask, changed[0][0].mask)


def test_evaluation_sees_everything_once() -> None:
    part = tiny.split(31, 0)
    for processes in (1, 3):
        batches = [b for r in range(processes) for b in evaluation_batches(part, 8, rank=r, processes=processes)]
        assert sorted(int(n) for b in batches for n in b.mask.sum(1)) == sorted(part.lengths.tolist())


def pairs(count: int = 40) -> PairSplit:
    documents = tiny.split(20, 3)
    rng = np.random.default_rng(4)
    return PairSplit(documents, rng.integers(0, 20, (count, 2)), rng.integers(0, 3, count))


def test_pairs_are_batched_by_their_longer_side() -> None:
    split = pairs()
    task = Task(TaskConfig("tiny", "tokens", 3, 23, vocabulary=4, pairs=True), split, split, split)
    for workers in (0, 1):
        (batch,), *_ = training_batches(task, batch=8, seed=0, stop=2, workers=workers)
        assert isinstance(batch, PairBatch) and len(batch.x) == len(batch.x2) == 8
        assert isinstance(to_device(batch, torch.device("cpu")), PairBatch)
    lengths = split.lengths
    buckets = epoch_batches(lengths, 8, seed=0, epoch=0, bucket=True)
    assert sum(np.ptp(lengths[b]) for b in buckets) < sum(
        np.ptp(lengths[b]) for b in epoch_batches(lengths, 8, seed=0, epoch=0, bucket=False)
    )
    seen = sum(len(batch.label) for batch in evaluation_batches(split, 8))
    assert seen == len(split)


def test_a_compiler_sees_few_lengths() -> None:
    assert [round_length(n, 40) for n in (1, 2, 3, 5, 6, 7, 9, 13, 17, 25, 33, 40, 50)] == [
        *(1, 2, 3, 6, 6, 8, 12, 16, 24, 32, 40, 40, 50)
    ]
    options = dict(batch=8, seed=0, stop=20)
    plain, padded = (list(training_batches(tiny.task(), few_lengths=few, **options)) for few in (False, True))
    assert len({pieces[0].x.shape[1] for pieces in padded}) < len({pieces[0].x.shape[1] for pieces in plain})
    for (a,), (b,) in zip(plain, padded, strict=True):
        length = a.x.shape[1]
        assert b.x.shape == b.mask.shape == (8, round_length(length, 23))
        assert same(a, Batch(b.x[:, :length], b.mask[:, :length], b.label))
        assert not b.mask[:, length:].any() and b.mask.dtype == torch.bool and not b.x[:, length:].any()


def test_a_compiler_sees_few_lengths_of_augmented_clips() -> None:
    task = tasks.load("speech", source="sample")
    batches = training_batches(task, batch=16, seed=0, stop=20, augment=True, few_lengths=True)
    lengths = {pieces[0].x.shape[1] for pieces in batches}
    assert (
        lengths <= {round_length(n, task.config.length) for n in range(1, task.config.length + 1)} and len(lengths) > 1
    )


def test_batches_are_augmented_where_they_are_used() -> None:
    seen: list[torch.device] = []
    task = dataclasses.replace(tiny.task(), augment=lambda batch, _: seen.append(batch.x.device) or batch)
    list(training_batches(task, batch=8, seed=0, stop=2, augment=True, device=torch.device("meta")))
    assert [device.type for device in seen] == ["meta", "meta"]


def test_a_compiler_sees_pairs_of_one_length() -> None:
    items = [((torch.ones(n, dtype=torch.long), torch.ones(m, dtype=torch.long)), 0) for n, m in ((5, 9), (3, 2))]
    batch = collate_to(40, items)
    assert batch.x.shape == batch.mask.shape == batch.x2.shape == batch.mask2.shape == (2, 12)
    assert batch.mask.sum(1).tolist() == [5, 3] and batch.mask2.sum(1).tolist() == [9, 2]


def test_answer_calls_a_model_of_sequences_and_one_of_pairs() -> None:
    class Sizes(torch.nn.Module):
        def forward(self, x, x2=None, *, mask1=None, mask2=None):
            return x, x2, mask1, mask2

    split = pairs()
    batch = collate([split[i] for i in range(3)])
    assert all(
        a is b for a, b in zip(answer(Sizes(), batch), (batch.x, batch.x2, batch.mask, batch.mask2), strict=True)
    )
    single = collate([tiny.split(3, 0)[i] for i in range(3)])
    assert answer(Sizes(), single)[:2] == (single.x, single.mask)


def test_generators_differ_by_key() -> None:
    draw = {key: torch.rand(1, generator=generator(*key)).item() for key in [(0, 1), (1, 0), (0, 0, 1), (0, 1, 1)]}
    assert len(set(draw.values())) == 4
    assert draw[0, 1] == torch.rand(1, generator=generator(0, 1)).item()
