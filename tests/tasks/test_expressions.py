"""The ListOps language against a truth computed on trees, and the sampler against the published statistics."""

import itertools
import random
from statistics import median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longseq_tutorial.tasks import DataError
from longseq_tutorial.tasks.expressions import (
    MIN,
    SM,
    VOCABULARY,
    Shape,
    Stream,
    decode,
    draw,
    encode,
    evaluate,
)

TRUTH = {"[MIN": min, "[MAX": max, "[MED": lambda v: int(median(v)), "[SM": lambda v: sum(v) % 10}
TREES = st.recursive(
    st.integers(0, 9),
    lambda node: st.tuples(st.sampled_from(sorted(TRUTH)), st.lists(node, min_size=1, max_size=5)),
    max_leaves=40,
)


def text_of(tree) -> str:
    if isinstance(tree, int):
        return str(tree)
    return " ".join([tree[0], *map(text_of, tree[1]), "]"])


def bracketed(tree) -> str:
    """The official files' form, straight from the tree: a chain of pairs, closed from the left."""
    if isinstance(tree, int):
        return str(tree)
    chain = tree[0]
    for part in [*map(bracketed, tree[1]), "]"]:
        chain = f"( {chain} {part} )"
    return chain


def value_of(tree) -> int:
    return tree if isinstance(tree, int) else TRUTH[tree[0]]([value_of(part) for part in tree[1]])


@given(TREES)
def test_evaluate_encode_and_decode_agree_with_the_tree(tree):
    text, tokens = text_of(tree), encode(text_of(tree))
    assert evaluate(text) == evaluate(tokens) == value_of(tree)
    assert decode(tokens) == text
    assert decode(tokens, brackets=True) == bracketed(tree)
    assert (encode(bracketed(tree)) == tokens).all()
    assert evaluate(np.pad(tokens, (0, 3))) == value_of(tree)  # padding is no part of it


def test_a_worked_example_and_the_vocabulary():
    assert VOCABULARY == tuple("<pad> 0 1 2 3 4 5 6 7 8 9 [MIN [MAX [MED [SM ]".split())
    assert encode("[MAX 2 9 [MIN 4 7 ] 0 ]").tolist() == [12, 3, 10, 11, 5, 8, 15, 1, 15]
    assert evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert evaluate("[MED 1 4 ]") == 2  # 2.5, rounded down
    assert evaluate("[SM 9 9 9 ]") == 7


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "this one has 0"),
        ("1 2", "this one has 2"),
        ("[MAX 1 2", "1 lists are still open"),
        ("]", "'\\]' without an open list"),
        ("[MAX ]", "without an argument"),
        ("[MAX 12 ]", "'12' is not a ListOps token"),
        ("[FIRST 1 2 ]", "'\\[FIRST'"),
        ("[MAX m ]", "'m'"),
        ("[MAX 1é ]", "'1é'"),
    ],
)
def test_what_is_not_an_expression_is_refused(text, says):
    with pytest.raises(DataError, match=says):
        evaluate(text)


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(DataError, match="token id 16"):
        evaluate([MIN, 16, 15])
    with pytest.raises(DataError, match="token ids lie in 0 to 15"):
        decode([MIN, 99, 15])


def levels(tokens: bytes) -> int:
    """How many lists nest."""
    depth = deepest = 0
    for token in tokens:
        depth += (MIN <= token <= SM) - (token == 15)
        deepest = max(deepest, depth)
    return deepest


@given(
    seed=st.integers(0, 2**32),
    low=st.integers(0, 30),
    room=st.integers(2, 60),
    depth=st.integers(1, 5),
    args=st.integers(2, 6),
)
def test_what_is_drawn_has_the_shape_and_the_value(seed, low, room, depth, args):
    if 2 + args * (2 + args) <= low or depth < 3:
        low = 0  # else nothing that shallow is long enough
    shape = Shape(low, low + room, depth, args)
    rng = random.Random(seed)
    for tokens, value in filter(None, (draw(rng, shape) for _ in range(50))):
        assert low < len(tokens) < low + room
        assert levels(tokens) <= depth - 1
        assert evaluate(tokens) == value


def test_statistics_are_the_published_tasks():
    """Against figures measured on 2,000 trees of the published script; tolerances are 5 standard errors."""
    count, draws, kept = 2_000, 0, []
    rng = random.Random("statistics")
    while len(kept) < count:
        drawn = draw(rng, Shape())
        draws += 1
        if drawn is not None:
            kept.append(drawn)

    def near(share, expected, n=count):
        assert abs(share - expected) < 5 * np.sqrt(2 * expected * (1 - expected) / n), (share, expected)

    near(count / draws, 0.086, draws)
    lengths = np.array([len(tokens) for tokens, _ in kept])
    assert abs(lengths.mean() - 1032) < 5 * np.sqrt(2 / count) * lengths.std()
    for quantile, length in ((0.05, 537), (0.25, 707), (0.5, 937), (0.75, 1297), (0.95, 1840)):
        near((lengths <= length).mean(), quantile)
    published = [0.162, 0.090, 0.071, 0.084, 0.090, 0.094, 0.072, 0.078, 0.091, 0.168]
    for label, expected in enumerate(published):
        near(np.mean([value == label for _, value in kept]), expected)
    for operator in range(MIN, SM + 1):
        near(np.mean([tokens[0] == operator for tokens, _ in kept]), 0.25)
    tokens = np.frombuffer(b"".join(tokens for tokens, _ in kept), np.uint8)
    shares = np.bincount(tokens, minlength=16) / len(tokens)
    assert shares[0] == 0
    assert np.abs(shares[1:11] - 0.0716).max() < 0.001
    assert np.abs(shares[11:15] - 0.0355).max() < 0.001
    assert abs(shares[15] - 0.142) < 0.001
    assert {levels(tokens) for tokens, _ in kept} == {9}


def test_stream_is_distinct_reproducible_and_its_seeds_unrelated():
    shape = Shape(5, 40)
    first, again, other = (list(itertools.islice(Stream(seed, shape), 600)) for seed in (0, 0, 1))
    assert first == again
    assert len(set(first)) == 600
    assert first[0] != other[0]
    assert first[:3] == [  # the stream must not change with Python, platform or our own edits
        (encode(text).tobytes(), value) for text, value in FIRST_OF_SEED_0
    ]


FIRST_OF_SEED_0 = [
    ("[SM [MED 1 9 9 8 8 6 ] 4 8 3 ]", 3),
    ("[MED 7 1 [MED 2 5 0 4 [MED 0 8 ] [MED 1 7 1 0 ] ] 4 [MAX [MAX 3 4 2 7 0 ] 5 6 9 ] ]", 4),
    ("[MAX 3 7 9 3 1 [MIN 9 5 7 ] 8 0 ]", 9),
]


def test_stream_goes_on_after_a_pause():
    shape = Shape(5, 40)
    whole = list(itertools.islice(Stream(7, shape), 500))
    stream = Stream(7, shape)
    start = list(itertools.islice(stream, 300))
    later = Stream(7, shape)
    tokens = np.frombuffer(b"".join(tokens for tokens, _ in start), np.uint8)
    later.resume(tokens, np.cumsum([0] + [len(tokens) for tokens, _ in start]), stream.state())
    assert start + list(itertools.islice(later, 200)) == whole


def test_stream_says_when_there_are_no_more(monkeypatch):
    monkeypatch.setattr("longseq_tutorial.tasks.expressions.PATIENCE", 2_000)
    stream = Stream(0, Shape(0, 2))  # single digits only
    assert {value for _, value in itertools.islice(stream, 10)} == set(range(10))
    with pytest.raises(DataError, match="after 10 distinct ones"):
        next(stream)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_length": 501},
        {"max_depth": 0},
        {"max_args": 1},
        {"min_length": -1},
        {"max_depth": 3},  # at most 122 tokens, and more than 500 are wanted
    ],
)
def test_shapes_that_hold_nothing_are_refused(wrong):
    with pytest.raises(DataError):
        Shape(**wrong)
