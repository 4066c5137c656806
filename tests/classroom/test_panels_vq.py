"""The panels of chapter 06: every control at its ends, numbers that are true, foreign input refused."""

import math

import pytest
import torch

from longseq_tutorial.classroom.panels_vq import CodebookLearning, RebuiltAttention, fit_codebook, islands, misplaced
from longseq_tutorial.mechanisms.vq_attention import VQAttention


def ends(panel, **kept):
    """Every control at its low end, then at its high end (choices: first and last)."""
    for which in (0, 1):
        state = {}
        for name, control in panel.controls.items():
            if hasattr(control, "options"):
                state[name] = control.options[-which]
            elif hasattr(control, "low"):
                state[name] = (control.low, control.high)[which]
            else:
                state[name] = bool(which)
        panel.set(**{**state, **kept})
        yield panel


KEYS = {
    "islands": lambda: None,
    "two points": lambda: torch.tensor([[0.0, 0.0], [1.0, 1.0]]),
    "a line": lambda: torch.linspace(0, 1, 50)[:, None].expand(50, 2),
    "heads, with gradient": lambda: torch.randn(2, 3, 10, 2, requires_grad=True),
}


@pytest.mark.parametrize("name", KEYS)
def test_every_end_of_every_control_is_drawn(name):
    torch.manual_seed(0)
    panel = CodebookLearning(KEYS[name](), steps=12, most_codes=8)
    for _ in ends(panel):
        assert panel.error is None, panel.say()
        assert "nan" not in panel.say().lower()


def test_codebook_words_tell_the_numbers():
    keys = torch.tensor([[0.0, 0.0], [0.0, 2.0], [10.0, 0.0], [10.0, 2.0]])
    words = CodebookLearning(keys, steps=3, most_codes=4, codes=1, start="keys", decay=0.0, step=3).say()
    assert "4 keys, 1 codes that began as random keys" in words
    assert "1 of the codes name at least one key; perplexity 1.0" in words
    panel = CodebookLearning(keys, steps=3, most_codes=4, codes=4, start="kmeans++", step=0)
    assert "4 of the codes" in panel.say() and "perplexity 4.0" in panel.say()
    assert "to its code is 0" in panel.say()


def test_dead_codes_of_a_bad_start_and_their_restart():
    bad = {"codes": 16, "start": "normal", "step": 100}
    panel = CodebookLearning(**bad)
    used = [int((panel._counts(panel.run(16, "normal", 0.9, r).codebooks[-1]) > 0).sum()) for r in (False, True)]
    assert used[0] < 8 < used[1]
    assert f"{used[0]} of the codes name" in panel.say()
    assert f"{used[1]} of the codes name" in panel.set(restart=True).say()


def test_the_panel_leaves_the_random_numbers_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    CodebookLearning(steps=3)
    fit_codebook(islands(50), 4)
    assert torch.equal(torch.rand(1), want)


def test_fitted_codes_are_means_of_their_keys():
    keys = islands(200)
    codebook = fit_codebook(keys, 5, rounds=50)
    names = torch.cdist(keys, codebook).argmin(1)
    means = torch.stack([keys[names == i].mean(0) for i in range(5)])
    torch.testing.assert_close(codebook, means)


def heads(length=20, width=3, lead=()):
    return torch.randn(2, *lead, length, width, generator=torch.Generator().manual_seed(0)).unbind(0)


@pytest.mark.parametrize("lead", [(), (2, 2)])
@pytest.mark.parametrize("length", [2, 20])
def test_maps_are_drawn_at_every_end(length, lead):
    panel = RebuiltAttention(*heads(length, lead=lead))
    for _ in ends(panel):
        assert panel.error is None, panel.say()
        assert "nan" not in panel.say().lower()


def test_maps_are_softmax_and_as_many_codes_as_keys_rebuild_it():
    q, k = heads()
    panel = RebuiltAttention(q, k)
    true = torch.softmax((q @ k.T).double() / math.sqrt(3), -1)
    torch.testing.assert_close(panel.weights(0, window=0, causal=False), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(panel.weights(20, window=0, causal=False), true, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(panel.weights(2, window=19, causal=False), true, rtol=1e-5, atol=1e-6)
    flat = torch.full_like(true, 1 / 20)
    torch.testing.assert_close(panel.weights(1, window=0, causal=False), flat)
    assert panel.weights(4, window=0, causal=True).triu(1).abs().max() == 0


def test_words_tell_the_share_misplaced():
    q, k = heads()
    words = RebuiltAttention(q, k, codes=20, query=3).say()
    true = torch.softmax((q @ k.T).double() / math.sqrt(3), -1)
    assert "20 codes, of which 20 are in use" in words
    assert f"Query 3 reads most from key {int(true[3].argmax())}" in words
    assert misplaced(true, true) == 0
    assert misplaced(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])) == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: CodebookLearning([1, 2]), TypeError, "tensor"),
        (lambda: CodebookLearning(torch.ones(4, 3)), ValueError, "pca_lowrank"),
        (lambda: CodebookLearning(torch.ones(4, 2)), ValueError, "not all the same"),
        (lambda: CodebookLearning(torch.tensor([[0.0, 1.0], [math.nan, 1.0]])), ValueError, "finite"),
        (lambda: RebuiltAttention(VQAttention(1, 2, 3, 3, 0), torch.ones(2, 2)), TypeError, "q as a tensor"),
        (lambda: RebuiltAttention(torch.ones(4, 2), torch.ones(4, 3)), ValueError, "alike"),
        (lambda: RebuiltAttention(torch.ones(600, 2), torch.ones(600, 2)), ValueError, "2 to 512"),
        (lambda: RebuiltAttention(torch.ones(3, 2) / 0, torch.ones(3, 2)), ValueError, "finite"),
    ],
)
def test_foreign_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call()
