"""The panel of notebook 10."""

import pytest
import torch

from longseq_tutorial.classroom.panels_listops import ExpressionTree
from longseq_tutorial.tasks import DataError
from longseq_tutorial.tasks.expressions import encode


def test_draws_an_expression_from_a_seed():
    panel = ExpressionTree(seed=3, longest=20)
    assert panel.error is None
    assert panel.say() == ExpressionTree(seed=3, longest=20).say()
    assert panel.say() != panel.set(seed=4).say()


@pytest.mark.parametrize("longest", [8, 9, 33, 60])
def test_every_length_and_digit_can_be_set(longest):
    panel = ExpressionTree(longest=longest)
    for digit in (0, 1, 40):
        panel.set(digit=digit, to=9, seed=digit)
        assert panel.error is None, panel.say()


def test_says_what_a_changed_digit_does():
    panel = ExpressionTree("[MAX 2 9 [MIN 4 7 ] 0 ]")
    assert "9 tokens, 2 operators on 2 levels, and the value 9." in panel.say()
    assert "stays 9" in panel.set(digit=1, to=5).say()
    assert "Digit 2 changes from 9 to 1: 1 of the 1 operators above it" in panel.set(digit=2, to=1).say()
    assert "becomes 4" in panel.say()


def test_takes_token_ids_of_the_readers_own():
    ids = torch.from_numpy(encode("[SM 5 6 ]").copy())
    assert "the value 1" in ExpressionTree(ids).say()
    assert set(ExpressionTree("7").controls) == {"digit", "to"}


def test_refuses_what_is_no_expression():
    with pytest.raises(DataError, match="still open"):
        ExpressionTree("[MAX 1 2")
