"""The panel of linear attention draws what it promises to take, says true numbers, and refuses the rest in words."""

import pytest
import torch

from longseq_tutorial.classroom.figures import fmt
from longseq_tutorial.classroom.panels_linear_attention import (
    ImpliedAttention,
    implied_weights,
    kinds_of_tokens,
    relative_error,
    softmax_weights,
)
from longseq_tutorial.mechanisms.linear_attention import (
    FavorFeatures,
    elu_features,
    linear_attention_weights,
    sikf_features,
)

SOURCES = {
    "example": lambda: {},
    "heads": lambda: {"q": torch.randn(2, 3, 9, 4), "k": torch.randn(2, 3, 9, 4)},
    "yours": lambda: {"q": torch.randn(7, 4), "k": torch.randn(7, 4), "feature_map": lambda x: x.square()},
    "one token": lambda: {"q": torch.randn(1, 1), "k": torch.randn(1, 1)},
    "far out": lambda: {"q": 300 * torch.randn(8, 4), "k": 300 * torch.randn(8, 4)},
    "half": lambda: {"q": torch.randn(5, 4).bfloat16().requires_grad_(), "k": torch.randn(5, 4).bfloat16()},
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_is_drawn_with_every_map_at_its_extremes(name):
    torch.manual_seed(0)
    panel = ImpliedAttention(**SOURCES[name]())
    for choice in panel.controls["map"].options:
        for end in ("low", "high") if name == "heads" or choice != "FAVOR+, raw QR" else ():
            ends = {key: getattr(c, end) for key, c in panel.controls.items() if hasattr(c, end)}
            panel.set(map=choice, causal=end == "high", **ends)
            assert panel.error is None, panel.say()
            assert "nan" not in panel.say().lower()


def test_words_tell_the_numbers():
    q, k = kinds_of_tokens()
    for name, feature_map in (("elu + 1", elu_features), ("SIKF: exp", sikf_features)):
        for causal in (False, True):
            words = ImpliedAttention(map=name, scale=0.5, causal=causal).say()
            wanted = softmax_weights(q / 2, k / 2, causal=causal)
            got = linear_attention_weights(q / 2, k / 2, feature_map, causal=causal, eps=0)
            assert f"by {fmt(100 * relative_error(got, wanted))} % of their size" in words
            assert f"softmax {fmt(float(wanted.max()))}, here {fmt(float(got.max()))}" in words
            assert "with 16 features" in words
            assert ("causal" in words) == causal


def test_features_draws_and_signs_matter_for_favor_only():
    panel = ImpliedAttention(map="FAVOR+", features=32, scale=0.5)
    base = panel.say()
    assert "32 features" in base
    assert panel.set(draw=1).say() != base
    assert panel.set(draw=0).say() == base
    assert panel.set(map="FAVOR+, raw QR").say().split(":", 1)[1] != base.split(":", 1)[1]
    elu = panel.set(map="elu + 1").say()
    assert panel.set(features=999, draw=3).say() == elu


def test_scale_zero_makes_every_attention_even():
    panel = ImpliedAttention(scale=0.0)
    for name in ("elu + 1", "SIKF: exp", "FAVOR+"):
        words = panel.set(map=name).say()
        assert "Of 48 keys" in words and "as from 48 equally weighted ones, here as from 48." in words


def test_implied_weights_are_the_weights():
    q, k = kinds_of_tokens(20, 4)
    favor = FavorFeatures(4, 8, generator=torch.Generator().manual_seed(0))
    for feature_map in (elu_features, sikf_features, favor):
        for causal in (False, True):
            got = implied_weights(q, k, feature_map, causal=causal)
            torch.testing.assert_close(got, linear_attention_weights(q, k, feature_map, causal=causal, eps=0))
    want = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], torch.eye(20).double()[None])[0]
    torch.testing.assert_close(softmax_weights(q, k), want)
    assert relative_error(2 * want, want) == pytest.approx(1)


x = torch.ones(5, 4)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: ImpliedAttention(x), TypeError, "wanted tensors q and k"),
        (lambda: ImpliedAttention("q", x), TypeError, "got str"),
        (lambda: ImpliedAttention(x, x[:3]), ValueError, "alike"),
        (lambda: ImpliedAttention(x[0], x[0]), ValueError, "length, dim"),
        (lambda: ImpliedAttention(x / 0, x), ValueError, "finite"),
        (lambda: ImpliedAttention(torch.ones(600, 2), torch.ones(600, 2)), ValueError, "at most 512"),
        (lambda: ImpliedAttention(x, x, feature_map=3), TypeError, "without calling it"),
        (lambda: ImpliedAttention(map="yours"), ValueError, "map"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_words(call, kind, words):
    with pytest.raises(kind, match=words):
        call()
