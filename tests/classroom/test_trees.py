"""ListOps expressions as trees: parsed as the task evaluates them, measured, changed and drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_tutorial.classroom.trees import argument_distances, parse, tree_figure, with_digit
from longseq_tutorial.tasks import DataError
from longseq_tutorial.tasks.expressions import Shape, Stream, encode, evaluate

SMALL = "[MAX 2 9 [MIN 4 7 ] 0 ]"


def drawn(seed: int, longest: int = 60) -> bytes:
    return next(Stream(seed, Shape(longest // 2, longest, 5, 6)))[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_tree_has_the_values_and_places_of_its_tokens(seed):
    tokens = drawn(seed)
    root = parse(np.frombuffer(tokens, dtype=np.uint8))
    assert (root.start, root.stop, root.depth) == (0, len(tokens), 1)
    for node in root.walk():
        assert node.value == evaluate(tokens[node.start : node.stop])
        assert all(argument.depth == node.depth + 1 for argument in node.arguments)
    assert len(root.operators) * 2 + len(root.digits) == len(tokens)


def test_text_ids_lists_and_padded_tensors_are_the_same_expression():
    ids = encode(SMALL)
    padded = torch.cat([torch.from_numpy(ids.copy()).long(), torch.zeros(3, dtype=torch.int64)])
    for given_as in (SMALL, ids, ids.tolist(), padded):
        root = parse(given_as)
        assert (root.name, root.value, root.stop) == ("MAX", 9, len(ids))


def test_a_digit_alone_is_a_tree():
    root = parse("7")
    assert (root.name, root.value, root.operators) == ("7", 7, [])
    assert argument_distances("7").tolist() == []


@pytest.mark.parametrize("wrong", ["", "[MAX 2", "[MAX ]", "2 3", "[FOO 1 ]", [12, 3, 99], [-1]])
def test_what_is_no_expression_is_refused(wrong):
    with pytest.raises(DataError):
        parse(wrong)


def test_distances():
    assert argument_distances(SMALL).tolist() == [1, 2, 3, 1, 2, 7]
    assert argument_distances(SMALL).dtype == torch.int64


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1_000), st.integers(0, 9), st.randoms(use_true_random=False))
def test_a_changed_digit_gives_the_value_of_the_changed_tokens(seed, digit, choose):
    tokens = bytearray(drawn(seed))
    root = parse(np.frombuffer(bytes(tokens), dtype=np.uint8))
    which = choose.randrange(len(root.digits))
    before = [node.value for node in root.walk()]
    after = with_digit(root, which, digit)
    tokens[root.digits[which].start] = digit + 1
    assert after.value == evaluate(bytes(tokens))
    assert [node.value for node in root.walk()] == before


@pytest.mark.parametrize(("which", "digit"), [(-1, 0), (5, 0), (0, 10)])
def test_a_digit_that_is_not_there_is_refused(which, digit):
    with pytest.raises(ValueError, match="wanted which in 0 to 4"):
        with_digit(parse(SMALL), which, digit)


@pytest.mark.parametrize("seed", [0, 1])
def test_trees_of_any_size_are_drawn(seed):
    for root in (parse("7"), parse(SMALL), parse(np.frombuffer(next(Stream(seed))[0], dtype=np.uint8))):
        fig = tree_figure(root, {root.start: (root.value + 1) % 10})
        assert fig.axes[0].get_ylabel() == "level"
        plt.close(fig)
