"""Augmentation: what each change does, that padding stays silent, that a seed repeats it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_tutorial.tasks import DataError, collate
from longseq_tutorial.tasks.augment import add_noise, augment, change_speed, scale, shift

LIMIT = 400


def batch_of(*lengths: int):
    return collate([(torch.randn(n, dtype=torch.float64), i) for i, n in enumerate(lengths)])


def test_speed_one_and_shift_zero_change_nothing():
    batch = batch_of(7, 5, 1)
    for changed in (change_speed(batch, torch.ones(3), LIMIT), shift(batch, torch.zeros(3).long(), LIMIT)):
        assert torch.equal(changed.x, batch.x)
        assert torch.equal(changed.mask, batch.mask)
        assert torch.equal(changed.label, batch.label)


def test_speed_reads_between_the_samples():
    batch = collate([(torch.tensor([0.0, 2.0, 4.0, 6.0]), 0), (torch.tensor([1.0, 3.0]), 1)])
    faster = change_speed(batch, torch.tensor([2.0, 1.0]), LIMIT)
    assert faster.x.tolist() == [[0.0, 4.0], [1.0, 3.0]]
    slower = change_speed(batch, torch.tensor([0.5, 0.5]), LIMIT)
    assert slower.x[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 6]  # held at the last sample
    assert slower.x[1].tolist() == [1, 2, 3, 3, 0, 0, 0, 0]
    assert slower.mask.sum(1).tolist() == [8, 4]


def test_speed_moves_the_frequency():
    time = torch.arange(4_000, dtype=torch.float64) / 8_000
    batch = collate([(torch.sin(2 * torch.pi * 400 * time), 0)])
    x = change_speed(batch, torch.tensor([1.25]), 8_000).x[0]
    assert len(x) == 3_200
    assert torch.fft.rfft(x).abs().argmax() * 8_000 / len(x) == pytest.approx(500)


def test_shift_puts_silence_before_or_cuts_the_start():
    batch = collate([(torch.tensor([1.0, 2.0, 3.0]), 0), (torch.tensor([4.0, 5.0]), 1)])
    later = shift(batch, torch.tensor([2, 0]), LIMIT)
    assert later.x.tolist() == [[0, 0, 1, 2, 3], [4, 5, 0, 0, 0]]
    assert later.mask.sum(1).tolist() == [5, 2]
    earlier = shift(batch, torch.tensor([-1, -9]), LIMIT)
    assert earlier.x.tolist() == [[2, 3], [5, 0]]  # one sample always stays
    assert earlier.mask.sum(1).tolist() == [2, 1]
    assert shift(batch, torch.tensor([2, 9]), 4).x.tolist() == [[0, 0, 1, 2], [0, 0, 0, 0]]


def test_scale_and_noise_levels():
    batch = batch_of(4_000, 2_000)
    assert torch.allclose(scale(batch, torch.tensor([2.0, -1.0])).x[1], -batch.x[1])
    noisy = add_noise(batch, torch.tensor([20.0, 40.0]), torch.Generator().manual_seed(0))
    for i, decibels in enumerate((20, 40)):
        real = batch.mask[i]
        ratio = (noisy.x - batch.x)[i][real].square().mean() / batch.x[i][real].square().mean()
        assert -10 * ratio.log10() == pytest.approx(decibels, abs=0.5)
    assert not noisy.x[~batch.mask].any()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(0, 2**31))
def test_augment_keeps_the_contract_and_repeats_itself(lengths, seed):
    batch = batch_of(*lengths)
    before = batch.x.clone()
    one, two = (augment(batch, torch.Generator().manual_seed(seed), limit=LIMIT, shift_samples=(-20, 80)) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(batch.x, before)  # nothing is changed in place
    assert one.x.shape == one.mask.shape and one.x.shape[1] <= LIMIT
    assert one.x.dtype == batch.x.dtype and one.x.isfinite().all()
    count = one.mask.sum(1, keepdim=True)
    assert count.min() >= 1
    assert torch.equal(one.mask, torch.arange(one.mask.shape[1]) < count)  # still padded on the right
    assert not one.x[~one.mask].any()
    assert torch.equal(one.label, batch.label)


def test_generator_moves_on_and_clips_differ():
    batch = collate([(torch.ones(300), 0), (torch.ones(300), 1)])
    generator = torch.Generator().manual_seed(0)
    first, second = (augment(batch, generator, limit=LIMIT) for _ in "ab")
    assert first.x.shape != second.x.shape or not torch.equal(first.x, second.x)
    assert not torch.equal(first.x[0], first.x[1])


def test_refusals():
    batch = batch_of(5, 4)
    tokens = collate([(torch.tensor([1, 2]), 0)])
    with pytest.raises(DataError, match="waveforms"):
        augment(tokens, torch.Generator(), limit=LIMIT)
    with pytest.raises(DataError, match=r"speed must hold one number for each clip, \(2,\); got \(3,\)"):
        change_speed(batch, torch.ones(3), LIMIT)
    with pytest.raises(DataError, match=r"speed must be positive; got 0.0"):
        change_speed(batch, torch.tensor([1.0, 0.0]), LIMIT)
