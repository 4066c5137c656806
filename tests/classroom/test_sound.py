"""Real clips, occlusion, noise and the player of notebook 11."""

import base64
import io
import wave

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_tutorial.classroom.sound import (
    answers,
    contributions,
    delayed,
    mix,
    occlusion,
    player,
    probabilities,
    real_clips,
)
from longseq_tutorial.tasks import fsdd
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound


def test_twenty_clips_of_the_official_test_two_of_each_digit():
    clips, names = real_clips()
    assert np.bincount(clips.labels).tolist() == [2] * 10
    assert len(set(names)) == 20
    assert all(name.endswith("_0") and int(name[0]) == label for name, label in zip(names, clips.labels, strict=True))
    assert (REPOSITORY_DATA / "fsdd_clips.npz").stat().st_size < 200_000


def test_clips_are_prepared_as_the_options_say():
    loud, _ = real_clips({"normalise": "peak", "length": 2_000, "valid_takes": [5]})
    assert loud.lengths.max() == 2_000
    assert all(float(x.abs().max()) == pytest.approx(1) for x, _ in loud)
    assert float(real_clips()[0][3][0].square().mean().sqrt()) == pytest.approx(0.1, rel=1e-3)


def test_clips_are_those_of_the_dataset_where_it_is_at_hand():
    try:
        whole = fsdd.find(download=False)
    except DataNotFound:  # anything else wrong with it fails
        pytest.skip("the Free Spoken Digit Dataset is not on this machine")
    where = {whole.name(i): i for i in range(len(whole))}
    part = fsdd.read_pack(REPOSITORY_DATA / "fsdd_clips.npz")
    for i in range(len(part)):
        j = where[part.name(i)]
        there = whole.audio[whole.offsets[j] : whole.offsets[j + 1]]
        assert np.array_equal(part.audio[part.offsets[i] : part.offsets[i + 1]], there)


def energy_model(x, mask):
    """Two classes: energy in the first half of the clip, energy in the second."""
    half = x.shape[1] // 2
    return torch.stack([x[:, :half].square().sum(1), x[:, half:].square().sum(1)], dim=1)


def test_occlusion_finds_the_part_that_the_answer_stands_on():
    x = torch.zeros(1_000)
    x[600:650] = 1.0
    middles, falls = occlusion(energy_model, x, 100, 50)
    assert middles.shape == falls.shape
    assert 550 <= int(middles[falls.argmax()]) <= 700
    assert float(falls[middles < 500].abs().max()) == 0


@pytest.mark.parametrize("length", [1, 7, 400, 401])
def test_occlusion_takes_clips_of_any_length(length):
    middles, falls = occlusion(energy_model, torch.ones(length), 400, 160)
    assert len(middles) == len(falls) >= 1


def test_probabilities_of_one_clip_and_of_several():
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    several = probabilities(energy_model, x)
    assert several.shape == (3, 2)
    assert torch.allclose(several[1], probabilities(energy_model, x[1]))
    assert torch.allclose(several.sum(1), torch.ones(3))


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_answers_come_in_the_order_of_the_clips(batch):
    def model(x, mask):
        return torch.stack([mask.sum(1), (x * mask).sum(1)], dim=1)

    clips = [torch.full((length,), float(length)) for length in (5, 1, 9, 2, 2, 7)]
    logits = answers(model, clips, batch)
    assert logits[:, 0].tolist() == [5, 1, 9, 2, 2, 7]
    assert logits[:, 1].tolist() == [25, 1, 81, 4, 4, 49]


@pytest.mark.parametrize("length", [1, 7, 40])
def test_contributions_of_a_linear_model_are_what_silencing_costs(length):
    weight = torch.randn(40, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def model(x, mask):
        return (x * mask) @ weight[: x.shape[1]]

    x = torch.randn(length, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = contributions(model, x)
    logits = model(x[None], torch.ones(1, length, dtype=torch.bool))[0]
    assert found.shape == x.shape and not found.requires_grad and not x.requires_grad
    assert torch.allclose(found.sum(), logits.max() - logits.mean())
    middles, falls = occlusion(model, x, 4, 2)
    sums = torch.stack([found[max(0, m - 2) : m + 2].sum() for m in middles.tolist()])
    assert torch.allclose(sums, falls)
    assert torch.allclose(contributions(model, x, steps=5), found)


def test_on_the_way_from_silence_contributions_add_up():
    x = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits = energy_model(x[None], None)[0]
    wanted = logits.max() - logits.mean()  # silence has none
    assert torch.allclose(contributions(energy_model, x, steps=4).sum(), wanted)
    assert torch.allclose(contributions(energy_model, x).sum(), 2 * wanted)  # the slope of a square at its end
    with pytest.raises(ValueError, match="at least one step from silence to the clip; got 0"):
        contributions(energy_model, x, steps=0)


def test_contributions_work_without_gradients_switched_on():
    with torch.no_grad():
        found = contributions(energy_model, torch.ones(10))
    assert torch.equal(found, torch.tensor([1.0] * 5 + [-1.0] * 5))  # 2 x**2 / 2 each, for and against


def test_delayed():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert delayed(x, 2).tolist() == [0, 0, 1, 2, 3]
    assert delayed(x, 0).tolist() == [1, 2, 3]
    assert delayed(x, -2).tolist() == [3]
    with pytest.raises(ValueError, match="at least one of 3 samples to stay; got a shift by -3"):
        delayed(x, -3)


@settings(max_examples=25, deadline=None)
@given(st.floats(-20, 60), st.integers(2, 200), st.integers(0, 99))
def test_noise_lies_so_many_decibels_below_the_clip(decibels, length, seed):
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(2, 2, length, generator=generator, dtype=torch.float64)
    added = mix(x, 3 * noise, decibels) - x
    ratio = 20 * torch.log10(x.square().mean(1).sqrt() / added.square().mean(1).sqrt())
    assert torch.allclose(ratio, torch.full_like(ratio, decibels), atol=1e-6)


def test_the_player_holds_the_clip_and_clips_what_is_too_loud():
    html = player(torch.tensor([0.0, 0.5, -2.0, 2.0]), 8_000, "a clip")
    data = base64.b64decode(html.split("base64,")[1].split('"')[0])
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (8_000, 1, 2)
        samples = np.frombuffer(file.readframes(4), dtype="<i2")
    assert samples.tolist() == [0, 16384, -32767, 32767]
    assert 'aria-label="a clip"' in html
