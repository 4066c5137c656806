"""The panel of notebook 11."""

import pytest
import torch
from torch import nn

from longseq_tutorial.classroom.panels_speech import Listening
from longseq_tutorial.classroom.sound import real_clips

WORDS = ("quiet", "loud")


class Loudness(nn.Module):
    """Answers "loud" above a level of 0.05; it is no model of ours."""

    def forward(self, x, mask):
        level = (x.square().sum(1) / mask.sum(1)).sqrt()
        return torch.stack([torch.zeros_like(level), 100 * (level - 0.05)], dim=1)


@pytest.fixture
def panel():
    tone = 0.1 * torch.sin(torch.arange(4_001) / 5)
    return Listening(Loudness(), [(tone, 1), (0.1 * tone, 0)], WORDS)


def test_hears_a_clip_and_says_what_it_heard(panel):
    assert panel.error is None
    assert "'loud'" in panel.say() and "(right)" in panel.say()
    assert "wrong: it is 'loud'" in panel.set(gain=-30).say()
    assert "'quiet'" in panel.set(clip="clip 1", gain=0).say()


def test_every_setting_can_be_drawn(panel):
    for noise in (-10, 0, 60):
        for gain in (-40, 20):
            panel.set(noise=noise, gain=gain)
            assert panel.error is None, panel.say()


def test_what_it_plays_is_what_the_model_hears(panel):
    before = panel._sound.value
    assert before.startswith("<audio controls")
    assert panel.set(noise=0)._sound.value != before
    assert panel.set(noise=60)._sound.value == before


def test_the_same_setting_says_the_same(panel):
    said = panel.set(noise=3).say()
    assert panel.set(noise=20).set(noise=3).say() == said


def test_several_models_to_choose_from():
    deaf = lambda x, mask: torch.tensor([[1.0, 0.0]]).expand(len(x), -1)  # noqa: E731
    tone = 0.1 * torch.sin(torch.arange(900) / 5)
    panel = Listening({"ear": Loudness(), "stone": deaf}, [(tone, 1)], WORDS)
    assert "ear hears 'loud'" in panel.say()
    assert "stone hears 'quiet'" in panel.set(model="stone").say() and panel.error is None
    with pytest.raises(ValueError, match="model wants one of"):
        panel.set(model="eye")
    with pytest.raises(ValueError, match="at least one; got none"):
        Listening({}, [(tone, 1)], WORDS)
    with pytest.raises(ValueError, match="each of the 3 class names"):
        Listening({"ear": Loudness()}, [(tone, 1)], ("a", "b", "c"))


def test_takes_a_split_and_names():
    clips, names = real_clips()
    ten = nn.AdaptiveAvgPool1d(10)
    panel = Listening(lambda x, mask: ten(x), clips, list("0123456789"), names, clip=names[-1])
    assert panel.error is None
    assert panel.say().startswith(names[-1])


def test_refuses_what_does_not_fit():
    wanted = r"one logit for each of the 3 class names; got \(2,\)"
    with pytest.raises(ValueError, match=wanted):
        Listening(Loudness(), [(torch.ones(80), 0)], ("a", "b", "c"))
    with pytest.raises(ValueError, match="at least one clip and a name for each; got 0 and 0"):
        Listening(Loudness(), [], WORDS)
    with pytest.raises(ValueError, match="wanted labels in 0 to 1, one for each class name; got 0 to 2"):
        Listening(Loudness(), [(torch.ones(80), 0), (torch.ones(80), 2)], WORDS)
