"""What a function does on its way is counted: operations, and the largest tensor."""

import torch

from longseq_tutorial.classroom.exercises import Verdict
from longseq_tutorial.classroom.watching import reject, watch, without_a_loop


def test_operations_and_the_largest_result_are_seen():
    x = torch.ones(5)
    outer = watch(lambda x: (x[:, None] * x).sum(), x)
    assert outer.largest == 25
    once, thrice = watch(lambda x: x + 1, x), watch(lambda x: [x + 1 for _ in range(3)], x)
    assert (once.operations, thrice.operations, once.largest) == (1, 3, 5)


def test_results_in_tuples_count_and_none_is_no_harm():
    assert watch(lambda x: torch.topk(x, 2), torch.arange(7.0)).largest == 2
    assert watch(lambda: None).largest == 0


def test_a_rejection_says_that_the_values_were_right():
    verdict = reject("f", "it is slow.", "a loop.")
    assert not verdict.ok and verdict.text == "✗ f: the values are right, but it is slow.\n  likely cause: a loop."


def test_a_loop_is_rejected_and_what_was_wrong_stays_wrong():
    right, wrong = Verdict("right", "fine"), Verdict("wrong", "no")

    def loop(x):
        return sum(part + 1 for part in x)

    few, many = (torch.ones(3),), (torch.ones(30),)
    assert without_a_loop(right, "f", lambda x: x + 1, few, many, "a loop.") is right
    assert without_a_loop(wrong, "f", loop, few, many, "a loop.") is wrong
    verdict = without_a_loop(right, "f", loop, few, many, "a loop.")
    assert verdict.state == "wrong" and verdict.text.endswith("likely cause: a loop.")
