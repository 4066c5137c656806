"""What can be said of a GPU without one: everything is on the device, few calls, none that waits for an answer."""

import json
import subprocess
import sys

import pytest

from longseq_tutorial.models import NAMES
from tests.models.any_task import SMALL

# SeqBoat asks each layer how many tokens are active, and which.
WAITS = {"seqboat": 2 * SMALL["seqboat"]["layers"]}


@pytest.fixture(scope="module")
def steps():
    """For every model what a training step does at a length of 1,024 and at one of 16,384."""
    child = [sys.executable, "-m", "tests.models.elsewhere"]  # its pretended device stays with its process
    done = subprocess.run(child, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind_on_another_device(steps, name):
    assert [step["astray"] for step in steps[name]] == [[], []]


@pytest.mark.parametrize("name", NAMES)
def test_nobody_waits_for_an_answer(steps, name):
    assert max(step["waits"] for step in steps[name]) <= WAITS.get(name, 0)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_sixteen_times_as_long_takes_hardly_more_calls(steps, name):
    short, long = steps[name]
    assert short["operations"] < 1_500, short["most"]
    tiles = 2 if name == "mega" else 1  # full attention: 268 million scores here, and no tensor of so many
    assert long["operations"] < 1.2 * tiles * short["operations"], long["most"]
