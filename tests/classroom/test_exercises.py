"""The check engine: it takes right answers, refuses wrong ones with the cause, and never raises."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, assert_accepts, assert_rejects, assert_unsolved, check


def conv(x: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution: x (batch, length), kernel (length,)."""
    rows = [(x[:, : t + 1] * kernel[: t + 1].flip(0)).sum(1) for t in range(x.shape[1])]
    return torch.stack(rows, 1)


def circular(x: Tensor, kernel: Tensor) -> Tensor:
    length = x.shape[1]
    return torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(kernel), n=length)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


CASES = [(double(2, 7), double(7)), (double(1, 1), double(1)), (double(3, 5), double(5))]
SINGLE = [(double(2, 7).float(), double(7).float())]


def check_conv(candidate: Any) -> Verdict:
    return check(
        candidate,
        conv,
        cases=CASES + SINGLE,
        suspects={
            "the kernel is reversed": lambda x, kernel: conv(x, kernel.flip(0)),
            "circular instead of linear convolution": circular,
        },
        verified="It is causal.",
    )


def test_right_answer_says_what_was_verified() -> None:
    verdict = check_conv(lambda x, kernel: conv(x, kernel) * 1.0)
    assert verdict.ok and verdict.state == "right"
    assert "4 cases" in verdict.text and "(2, 7)" in verdict.text and "float32, float64" in verdict.text
    assert "below 1e-09 and 0.0001" in verdict.text
    assert "gradients of x, kernel" in verdict.text
    assert verdict.text.endswith("It is causal.")
    assert repr(verdict) == verdict.text
    assert_accepts(check_conv, conv)


def test_unsolved() -> None:
    def stub(x: Tensor, kernel: Tensor) -> Tensor:
        raise NotImplementedError("your turn: convolve")

    assert_unsolved(check_conv, stub)
    assert repr(check_conv(stub)) == "… stub: not solved yet: your turn: convolve"
    assert not check_conv(stub).ok


def in_place(x: Tensor, kernel: Tensor) -> Tensor:
    y = conv(x, kernel)
    x.mul_(2)
    return y


def in_place_view(x: Tensor, kernel: Tensor) -> Tensor:
    y = conv(x, kernel)
    kernel[0] = 0
    return y


def out_of_range(x: Tensor, kernel: Tensor) -> Tensor:
    y = conv(x, kernel)
    return y[:, x.shape[1]]


def edge(where: int) -> Callable[[Tensor, Tensor], Tensor]:
    def wrong(x: Tensor, kernel: Tensor) -> Tensor:
        y = conv(x, kernel)
        change = torch.zeros_like(y)
        change[:, where] = 1.0
        return y + change

    return wrong


def forgets(x: Tensor, kernel: Tensor) -> Tensor:
    return x * kernel[0]


def tampered_gradient(x: Tensor, kernel: Tensor) -> Tensor:
    y = conv(x, kernel)
    return y + (y * 0.5 - (y * 0.5).detach())


def late(x: Tensor, kernel: Tensor) -> Tensor:
    return torch.nn.functional.pad(conv(x, kernel), (1, 0))[:, :-1]


WRONG: list[tuple[Any, list[str]]] = [
    (lambda x, kernel: conv(x, kernel.flip(0)), ["likely cause: the kernel is reversed", "first at [0, 0]", "largest"]),
    (circular, ["circular instead of linear convolution"]),
    (lambda x, kernel: -conv(x, kernel), ["sign is wrong"]),
    (lambda x, kernel: 0.5 * conv(x, kernel), ["scale", "0.50", "times what is wanted."]),
    (lambda x, kernel: conv(x, kernel) / x.shape[1] ** 0.5, ["1/sqrt(the size of axis 1 of x)"]),
    (lambda x, kernel: conv(x, kernel) * x.shape[0], ["which is the size of axis 0 of x"]),
    (lambda x, kernel: conv(x, kernel).flip(1), ["reversed along axis 1"]),
    (lambda x, kernel: conv(x, kernel).flip(0), ["reversed along axis 0"]),
    (late, ["off-by-one", "late along axis 1"]),
    (lambda x, kernel: conv(x, kernel).roll(1, 1), ["rolled around by one step along axis 1"]),
    (lambda x, kernel: conv(x, kernel).T, ["shape: wanted (2, 7), got (7, 2)", "axes 0 and 1 are swapped"]),
    (lambda x, kernel: conv(x, kernel)[:, :-1], ["shape: wanted (2, 7), got (2, 6)"]),
    (lambda x, kernel: conv(x, kernel).float(), ["dtype: wanted torch.float64, got torch.float32"]),
    (lambda x, kernel: conv(x.float(), kernel.float()).to(x.dtype), ["computed in float32", "dtype=x.dtype"]),
    (lambda x, kernel: conv(x, kernel).detach(), ["values are right", "no gradient reaches x and kernel"]),
    (lambda x, kernel: conv(x.detach(), kernel), ["no gradient reaches x.", ".detach()"]),
    (tampered_gradient, ["the gradient with respect to x is not", "largest error"]),
    (in_place, ["changed its input x in place", "new tensor"]),
    (in_place_view, ["changed its input kernel in place"]),
    (out_of_range, ["IndexError", "in the line: return y[:, x.shape[1]]", "look at: the range of an index"]),
    (edge(0), ["only the first position along axis 1 is wrong"]),
    (edge(-1), ["only the last position along axis 1 is wrong"]),
    (forgets, ["only the first position along axis 1 is right"]),
    (lambda x, kernel: conv(x, kernel) / 0, ["NaN or infinite", "first at [0, 0]"]),
    (lambda x, kernel: None, ["returned None", "return"]),
    (lambda x, kernel: (conv(x, kernel), 1), ["got tuple", "one result"]),
    (lambda x, kernel: conv(x, kernel).numpy(), ["got ndarray", "torch functions"]),
    (lambda x, kernel: torch.from_numpy(conv(x, kernel).numpy()), ["torch functions all the way"]),
    (lambda x: x, ["cannot be called with (x, kernel)", "parameters of the stub"]),
    (lambda x, kernel: undefined_name, ["NameError", "typing error"]),  # noqa: F821
    (lambda x, kernel: x @ kernel[:-1], ["RuntimeError", ".shape"]),
    (lambda x, kernel: conv(x, kernel).to(torch.complex128), ["got torch.complex128"]),
    (lambda x, kernel: "later", ["got str"]),
    (lambda x, kernel: conv(x, kernel).to_sparse(), ["cannot be compared"]),
    (lambda x, kernel: conv(x, kernel).to("meta"), ["cannot be compared"]),
    (None, ["wanted a function, got NoneType"]),
    (torch.zeros(3), ["wanted a function, got Tensor"]),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_answer_is_explained(number: int) -> None:
    wrong, words = WRONG[number]
    assert_rejects(check_conv, wrong, *words)


def test_case_is_described() -> None:
    text = check_conv(lambda x, kernel: x).text
    assert text.startswith("✗ <lambda>: for x (2, 7) float64, kernel (7,) float64\n")


def test_wrong_only_for_some_sizes_is_found_there() -> None:
    def odd_only(x: Tensor, kernel: Tensor) -> Tensor:
        return conv(x, kernel) if x.shape[1] != 5 else conv(x, kernel) + 1

    assert_rejects(check_conv, odd_only, "x (3, 5)")


def test_a_suspect_that_raises_matches_the_same_error() -> None:
    def fails_at_one(x: Tensor) -> Tensor:
        if len(x) == 1:
            raise IndexError("1")
        return x

    def examine(candidate: Any) -> Verdict:
        cases = [(double(3),), (double(1),)]
        return check(candidate, lambda x: x * 1, cases=cases, suspects={"length 1 was forgotten": fails_at_one})

    assert_rejects(examine, lambda x: fails_at_one(x), "IndexError", "length 1 was forgotten")


def test_a_suspect_that_is_right_is_never_named() -> None:
    verdict = check(lambda x: x + 1, lambda x: x, cases=[(double(3),)], suspects={"nothing at all": lambda x: x})
    assert "nothing at all" not in verdict.text


def test_suspects_are_named_in_order() -> None:
    same = {"first": lambda x: x + 1, "second": lambda x: x + 1}
    assert_rejects(lambda f: check(f, lambda x: x, cases=[(double(3),)], suspects=same), lambda x: x + 1, "first")


def test_in_a_tuple_the_wrong_part_is_named() -> None:
    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.cumsum(0), x.sum()

    def examine(candidate: Any) -> Verdict:
        return check(candidate, pair, cases=[(double(5),), (double(2),)])

    assert_accepts(examine, pair)
    assert_rejects(examine, lambda x: (x.cumsum(0), -x.sum()), "result 2 of 2", "sign is wrong")
    assert_rejects(examine, lambda x: (x.cumsum(0).flip(0), x.sum()), "result 1 of 2", "reversed along axis 0")
    assert_rejects(examine, lambda x: x.cumsum(0), "wanted 2 results; got one Tensor")
    assert_rejects(examine, lambda x: (x.cumsum(0), float(x.sum())), "wanted a tensor of shape ()")


@pytest.mark.parametrize(
    "truth, wrong, words",
    [
        (lambda n: n * (n + 1) // 2, lambda n: n * n, "wanted 15; got 25"),
        (lambda n: 2.0**-n, lambda n: 2.0**n, "wanted 0.03125; got 32"),
        (lambda n: n > 3, lambda n: n < 3, "wanted True; got False"),
        (lambda n: n > 3, lambda n: 1, "wanted True; got 1"),
        (lambda n: "yes", lambda n: "no", "wanted 'yes'; got 'no'"),
        (lambda n: n, lambda n: "5", "wanted a number; got '5'"),
    ],
)
def test_numbers_and_words(truth: Any, wrong: Any, words: str) -> None:
    assert_accepts(lambda f: check(f, truth, cases=[(5,)]), truth)
    assert_rejects(lambda f: check(f, truth, cases=[(5,)]), wrong, words)


def test_whole_numbers_and_booleans_are_compared_exactly() -> None:
    examine = lambda f: check(f, lambda x: x.argsort(), cases=[(double(6),)])  # noqa: E731
    assert_accepts(examine, lambda x: x.argsort())
    assert_rejects(examine, lambda x: x.argsort(descending=True), "reversed along axis 0")
    mask = lambda f: check(f, lambda x: x > 0, cases=[(double(6),)])  # noqa: E731
    assert_rejects(mask, lambda x: x < 0, "sign is wrong")
    assert_rejects(mask, lambda x: (x > 0).float(), "dtype")


def test_wanted_infinities_are_right() -> None:
    def mask(x: Tensor) -> Tensor:
        return x.masked_fill(x < 0, -torch.inf)

    assert_accepts(lambda f: check(f, mask, cases=[(double(9),)]), mask)
    assert_rejects(lambda f: check(f, mask, cases=[(double(9),)]), lambda x: x.masked_fill(x < 0, -1e9), "wrong")


def test_inputs_and_random_state_are_left_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    before = [tuple(tensor.clone() for tensor in case) for case in CASES]
    for wrong, _ in WRONG:
        check_conv(wrong)
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(a, b) for x, y in zip(before, CASES, strict=True) for a, b in zip(x, y, strict=True))


def test_random_answers_are_compared_under_one_seed() -> None:
    assert_accepts(lambda f: check(f, lambda x: x + torch.rand(3), cases=[(double(3),)]), lambda x: torch.rand(3) + x)


def test_gradients_are_asked_for_even_inside_no_grad() -> None:
    with torch.no_grad():
        assert_rejects(check_conv, lambda x, kernel: conv(x, kernel).detach(), "no gradient")


def test_gradients_need_not_be_asked_for() -> None:
    examine = lambda f: check(f, conv, cases=CASES, gradients=False)  # noqa: E731
    assert_accepts(examine, lambda x, kernel: conv(x, kernel).detach())


def test_tolerance() -> None:
    examine = lambda f: check(f, conv, cases=CASES, tolerance=1e-2, gradients=False)  # noqa: E731
    assert_accepts(examine, lambda x, kernel: conv(x, kernel) + 1e-3)
    assert_rejects(examine, lambda x, kernel: conv(x, kernel) + 1.0, "values are wrong")


def test_modules_can_be_candidates() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, 9]

    verdict = check(Twice(), lambda x: 2 * x, cases=[(double(2, 3),)])
    assert "✗ Twice" in verdict.text and "in the line: return x[:, 9]" in verdict.text


def test_mistakes_of_the_chapter_are_raised() -> None:
    with pytest.raises(ValueError, match="at least one case"):
        check(conv, conv, cases=[])
    with pytest.raises(ValueError, match="all of one length"):
        check(conv, conv, cases=[CASES[0], (1,)])
    with pytest.raises(ValueError, match=r"the reference itself fails on x \(2,\)"):
        check(conv, conv, cases=[(torch.zeros(2), torch.zeros(2))])


def test_keyboard_interrupt_passes() -> None:
    def stopped(x: Tensor, kernel: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_conv(stopped)


def test_helpers_fail_when_they_should() -> None:
    with pytest.raises(AssertionError, match="refused the solution"):
        assert_accepts(check_conv, circular)
    with pytest.raises(AssertionError, match="took a wrong answer for right"):
        assert_rejects(check_conv, conv, "anything")
    with pytest.raises(AssertionError, match=r"lacks \['sunshine'\]"):
        assert_rejects(check_conv, circular, "circular", "sunshine")
    with pytest.raises(TypeError, match="wants words"):
        assert_rejects(check_conv, circular)
    with pytest.raises(AssertionError, match="did not see"):
        assert_unsolved(check_conv, conv)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
    st.builds(lambda n: torch.full((n,), torch.nan), st.integers(0, 3)),
    st.builds(lambda n: torch.zeros(2, n), st.integers(0, 8)),
    st.builds(lambda n: np.zeros(n), st.integers(0, 3)),
    st.just(torch.zeros(2, 7, dtype=torch.bool)),
    st.just(object()),
)


@settings(max_examples=60, deadline=None)
@given(ANYTHING)
def test_whatever_is_returned_gets_a_verdict(value: Any) -> None:
    verdict = check_conv(lambda x, kernel: value)
    assert not verdict.ok and verdict.text.startswith("✗")


@pytest.mark.parametrize(
    "error", [ValueError(), AssertionError("no"), RecursionError("deep"), MemoryError(), StopIteration()]
)
def test_whatever_is_raised_gets_a_verdict(error: Exception) -> None:
    def raises(x: Tensor, kernel: Tensor) -> Tensor:
        raise error

    assert_rejects(check_conv, raises, type(error).__name__, "in the line: raise error")
