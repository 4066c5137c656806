"""The panel of notebook 12: any layer of any run, on any example, and the pictures it is made of."""

import re
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from longseq_tutorial import models
from longseq_tutorial.classroom import opened
from longseq_tutorial.classroom.figures import PIXELS_PER_INCH
from longseq_tutorial.classroom.panels_learned import Opened, draw_kernels, tokens_figure, waveform_figure
from longseq_tutorial.training import recipes, records

WORDS = tuple("0123456789")
TASKS = {
    "listops": dict(name="listops", kind="tokens", classes=10, length=60, vocabulary=16, sample_rate=0),
    "speech": dict(name="speech", kind="samples", classes=10, length=8000, vocabulary=0, sample_rate=8000),
    "text": dict(name="text", kind="tokens", classes=2, length=300, vocabulary=257, sample_rate=0),
}


def untrained(task, name):
    """A small model of a task, and a record that says so."""
    about = TASKS[task] | {"class_names": WORDS[: TASKS[task]["classes"]], "pairs": False, "source": "", "grid": ()}
    row = recipes.get(task, name, "laptop")
    overrides = {**row.overrides, "dim": 8, "layers": 2, "head_dim": 8}
    config = asdict(models.configure(name, task, **overrides))
    torch.manual_seed(0)
    model = models.build(name, opened.tasks.TaskConfig(**about), **config).eval()
    data = {"min_length": 20, "max_length": 60} if task == "listops" else {"length": about["length"]}
    record = records.Record(
        name=f"{task}-{name}-laptop-seed0", recipe={"model": name, "data": data}, config=config, seed=0,
        task=about, source="", sequences={}, parameters=1, updates=0, history=[], test={"loss": 2.0, "accuracy": 0.1},
        weights_of={}, seconds=0.0, sessions=1, peak_memory={}, device="cpu", device_name="", threads=1, processes=1,
        versions={}, commit="", dirty=False, finished="",
    )  # fmt: skip
    return opened.Run(model, record)


@pytest.fixture(scope="module")
def runs():
    wanted = [("listops", name) for name in models.NAMES] + [
        ("speech", "seqboat"),
        ("speech", "spade"),
        ("text", "longvq"),
    ]
    return {key: untrained(*key) for key in wanted}


@pytest.fixture(scope="module")
def panel(runs):
    return Opened(runs, count=3)


EVERY_VIEW = [("listops", "seqboat"), ("listops", "longvq"), ("speech", "spade")]


@pytest.mark.parametrize("view", Opened.views)
def test_every_view_can_be_drawn(panel, runs, view):
    for task, model in runs if view == "attention map" else EVERY_VIEW:
        said = panel.set(task=task, model=model, layer=1, view=view).say()
        assert panel.error is None, said
        assert said.startswith(f"{model} on {task}, layer 1 of 2, example 0: the model says")
    assert panel._png


def test_what_is_not_there_is_said(panel):
    said = panel.set(task="text", model="mega").say()
    assert said == "There is no run of mega on text here. There are: longvq." and panel.error is None
    said = panel.set(task="listops", model="spade", layer=2, view="memory").say()
    assert "no EMA and no state space" in said
    assert "no EMA and no state space" in panel.set(model="fastrpb", layer=1).say()


def test_the_words_are_the_numbers(panel, runs):
    model, record = runs["listops", "seqboat"]
    x, _ = opened.sample(record, 3)[2]
    mask = torch.ones(1, len(x), dtype=torch.bool)
    first, second = opened.waking(model, x[None], mask).float().mean((1, 2)).tolist()
    said = panel.set(task="listops", model="seqboat", layer=1, example=2, view="token by token").say()
    assert f"Awake, from the lowest layer up: {opened_fmt(first)} %, {opened_fmt(second)} %." in said
    said = panel.set(model="mega", view="memory").say()
    assert "before training" in said
    within = re.search(
        r"within (.+) tokens in the middle channel, (.+) in the longest; before training within (.+) and (.+)\.", said
    )
    assert within and within.groups()[:2] == within.groups()[2:]  # untrained: the same


def opened_fmt(share):
    from longseq_tutorial.classroom import fmt

    return fmt(100 * share)


def test_an_example_is_read_once(panel, runs, monkeypatch):
    panel.set(task="listops", model="mega", layer=1, example=1, view="attention map")
    monkeypatch.setattr(opened, "attention_maps", lambda *a: pytest.fail("read again"))
    assert panel.set(view="how far attention goes").error is None
    assert panel.set(layer=2).error is None


def test_layers_beyond_the_last_are_the_last(runs):
    panel = Opened(
        {("listops", "mega"): runs["listops", "mega"], ("listops", "deep"): untrained("listops", "mega")}, count=1
    )
    assert "layer 2 of 2" in panel.set(layer=2).say()


def test_needs_runs():
    with pytest.raises(ValueError, match="at least one run"):
        Opened({})


# ---- the pictures ------------------------------------------------------------------------------------------------


def bars(fig):
    """The bars under the tokens: (from, to, height), the legend's left out."""
    (ax,) = fig.axes
    lines = [line.get_xydata() for line in ax.get_lines()]
    return [(a[0], b[0], a[1]) for a, b in lines if a[1] > 1]


def test_bars_stand_under_their_tokens():
    marks = torch.zeros(2, 4)
    marks[0, 1], marks[1, 3] = 1, 0.5
    fig = tokens_figure(["[MAX", "4", "[SM", "]"], marks, ["one", "two"])
    (left, right, y), (left2, right2, y2) = bars(fig)
    assert 5 < left < right < 6 and y2 > y  # after "[MAX ", one letter wide
    assert 11 < left2 < right2 < 12
    plt.close(fig)


def test_a_letter_is_as_wide_as_its_place():
    fig = tokens_figure(list("m" * 250), torch.ones(1, 250), ["all"])
    assert len(bars(fig)) == 250
    fig.canvas.draw()
    rows = [text for text in fig.axes[0].texts if text.get_text().startswith("m" * 100)]
    assert len(rows) == 2
    assert fig.dpi == PIXELS_PER_INCH
    assert abs(rows[0].get_window_extent().width - 1100) < 5  # of 100 letters, 11 pixels each
    plt.close(fig)


def test_a_clip_and_its_rows_share_an_axis():
    fig = waveform_figure(torch.randn(800), 8000, torch.rand(3, 10), ["a", "b", "c"], "title")
    top, bottom = fig.axes
    assert bottom.get_xlim() == top.get_xlim() == (0, 0.1)
    assert [t.get_text() for t in bottom.get_yticklabels()] == ["a", "b", "c"]
    plt.close(fig)


def test_kernels_from_the_shortest_to_the_longest():
    fig, ax = plt.subplots()
    decay = torch.tensor(np.linspace(0.5, 0.99, 9))[:, None] ** torch.arange(600)
    reach = draw_kernels(ax, decay, 10, "ms")
    assert (reach.diff() >= 0).all()
    labels = [line.get_label() for line in ax.get_lines()]
    assert labels[0] == "channel 0: 40 ms" and labels[-1].startswith("channel 8: 2,300 ms")
    plt.close(fig)
