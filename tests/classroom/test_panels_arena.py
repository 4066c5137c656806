"""The panel of notebook 10 that looks through tasks."""

import dataclasses

import numpy as np
import pytest
import torch

from longseq_tutorial.classroom import panels_arena
from longseq_tutorial.classroom.panels_arena import ARENA, TaskBrowser, as_text, nesting, recorded, samples
from longseq_tutorial.tasks import Split, Task, TaskConfig, contours, expressions


@pytest.fixture(scope="module")
def six():
    return samples()


def made(kind="tokens", count=3, **more):
    """A small task of the reader's own."""
    settings = {"vocabulary": 7} if kind == "tokens" else {"sample_rate": 100}
    config = TaskConfig("mine", kind, 2, 5, **{**settings, **more})
    values = np.arange(5 * count, dtype=np.uint8) % 7 if kind == "tokens" else np.linspace(-1, 1, 5 * count)
    split = Split(values.astype(np.uint8 if kind == "tokens" else np.float32), np.arange(count + 1) * 5, [0] * count)
    return Task(config, split, split, split)


def test_the_samples_are_the_arenas_six_tasks_and_come_from_the_repository(six):
    assert tuple(six) == ARENA and all("made by this project" in task.config.source for task in six.values())
    assert [len(six[name].train[0][0]) for name in ("image", "pathfinder", "pathx")] == [1024, 1024, 16384]


@pytest.mark.parametrize("task", ARENA)
def test_every_task_can_be_looked_at(six, task):
    panel = TaskBrowser({task: six[task]})
    assert panel.error is None and "The answer is hidden." in panel.say()
    _, label = panel._item(task, 40)
    panel.set(example=40, answer=True)
    assert panel.error is None and panel.say().endswith(f"The answer: {six[task].config.class_names[label]}.")


def test_the_words_give_measured_facts(six):
    panel = TaskBrowser(six)
    item, _ = panel._item("listops", 1)
    assert f"{len(item):,} steps. {sum(11 <= int(t) <= 14 for t in item)} lists" in panel.say()
    assert "32 rows of 32 pixels" in panel.set(task="pathfinder").say()
    (row, column), (row2, column2) = recorded(panel._item("pathfinder", 1)[0])[1]
    assert f"{abs((row - row2) * 32 + column - column2):,} steps apart" in panel.say()


def test_nesting_counts_the_open_lists():
    ids = torch.from_numpy(expressions.encode("[MAX 2 [MIN 4 7 ] 0 ]").astype(np.int64))
    assert nesting(ids).tolist() == [1, 1, 2, 2, 2, 1, 1, 0]


def test_text_is_what_the_bytes_say():
    ids = torch.tensor(list("naïve".encode())) + 1
    assert as_text(ids) == "naïve"
    assert "�" in as_text(ids[:3])  # cut within a character


@pytest.mark.parametrize("task", ["pathfinder", "pathx"])
def test_the_recorded_paths_belong_to_the_picture(six, task):
    size = six[task].config.grid[0]
    for pixels, label in six[task].test:
        paths, dots = recorded(pixels)
        assert contours.label_of(paths[None], dots[None])[0] == label
        assert all(pixels.reshape(size, size)[tuple(dot)] > 0 for dot in dots)  # a dot is bright


def test_pictures_that_were_never_recorded_have_no_paths(six):
    assert recorded(torch.zeros(1024)) is None and recorded(torch.zeros(36)) is None
    assert TaskBrowser({"image": six["image"]}, answer=True).error is None


def test_takes_a_task_of_the_readers_own():
    panel = TaskBrowser(made())
    assert panel.error is None and "mine, example 1 of 3: 5 steps." in panel.say()
    assert "0" in panel.set(answer=True, example=3).say().split("The answer:")[1]
    assert "Numbers from -1.0 to" in TaskBrowser(made("samples")).say()
    assert TaskBrowser(made(count=1)).set(example=2).error is None


def test_takes_bytes_that_no_font_or_formula_can_read(monkeypatch):
    task = made()
    shout = np.frombuffer(b"$\\frac{$ 100 $ ^_" * 60, np.uint8)
    split = Split(shout, np.array([0, len(shout)]), [1], shift=1)
    config = dataclasses.replace(task.config, vocabulary=257, length=len(shout))
    assert TaskBrowser(Task(config, split, split, split)).error is None


def test_refuses_what_is_no_task(six):
    with pytest.raises(TypeError, match=r"wanted a Task.*got Split"):
        TaskBrowser({"mine": six["text"].train})
    with pytest.raises(ValueError, match="at least one task"):
        TaskBrowser({})
    empty = dataclasses.replace(six["text"], train=six["text"].train.select(np.zeros(240, bool)))
    with pytest.raises(ValueError, match="has none"):
        TaskBrowser(empty)
    with pytest.raises(ValueError, match="task wants one of"):
        TaskBrowser(six).set(task="speech")


def test_examples_are_spread_over_the_training_part(six):
    panel = TaskBrowser(six, task="image")
    assert panel.count == 40 == min(len(task.train) for task in six.values())
    labels = {panel._item("image", example)[1] for example in range(1, 41)}
    assert labels == set(range(10))  # the sample is sorted by class
    assert panels_arena.TaskBrowser(six, most=5).count == 5
