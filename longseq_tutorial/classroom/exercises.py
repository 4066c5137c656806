"""Checks of exercises: they never stop a notebook, and they say what is wrong and why it may be.

A chapter writes one `check_...` function for each exercise, by calling `check`::

    def check_ema_kernel(candidate):
        return check(
            candidate,
            ema_kernel,                                   # the truth: the package's own function
            cases=[(alpha, delta, beta, eta, 7), ...],    # argument tuples; float64, odd sizes, length 1
            suspects={
                "the kernel is reversed in time": lambda *a: ema_kernel(*a).flip(-1),
                "phi**(t+1) instead of phi**t: an off-by-one": ...,
            },
        )

It runs the candidate on each case and compares type, shape, dtype, values, gradients, and whether the
inputs were left alone. A *suspect* is what a plausible mistake would give: when the candidate gives
exactly that, its sentence is named as the likely cause. Some mistakes need no suspect: a wrong sign, a
constant factor, a reversed or shifted or transposed result, float32 inside.

The answer is a `Verdict`, whose text is the same on every machine: it names bounds, not last digits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.causes import likely_cause
from longseq_tutorial.classroom.comparing import (
    Case,
    Run,
    call,
    describe,
    gradients,
    parameter_names,
    structure_complaint,
    tolerance_for,
    value_complaint,
)

__all__ = ["Verdict", "assert_accepts", "assert_rejects", "assert_unsolved", "check"]


@dataclass(frozen=True)
class Verdict:
    """What a check found: `state` is "right", "wrong" or "unsolved"; `text` says it to the reader."""

    state: str
    text: str

    @property
    def ok(self) -> bool:
        """Whether the exercise is solved."""
        return self.state == "right"

    def __repr__(self) -> str:
        return self.text


def check(
    candidate: Any,
    reference: Callable[..., Any],
    *,
    cases: Sequence[Sequence[Any]],
    suspects: Mapping[str, Callable[..., Any]] | None = None,
    name: str = "",
    gradients: bool = True,
    tolerance: float | None = None,
    verified: str = "",
) -> Verdict:
    """Compare `candidate` with `reference` on every case, and explain the first difference.

    Args:
        candidate: the reader's function (or module).
        reference: the truth, called with the same arguments. Deterministic.
        cases: argument tuples, all of one length. Tensors, numbers, anything; tensors are cloned for each call.
        suspects: sentence that names a cause -> function that gives what this mistake would give.
        name: how messages call the candidate; by default its own name.
        gradients: also compare the gradients with respect to every floating-point tensor argument.
        tolerance: largest error allowed, relative to the largest value wanted; by default 1e-9 in
            float64 and 1e-4 in float32. Gradients get a hundred times as much.
        verified: what else holds when the answer is right, said at the end of the verdict.

    Returns:
        A `Verdict`. No exception of the candidate's leaves this function (Ctrl-C does).

    Raises:
        ValueError: no cases, cases of different lengths, or a reference that fails on one: mistakes of the
            chapter, not of the reader.
    """
    if not cases or len({len(case) for case in cases}) != 1:
        raise ValueError(
            "check wants at least one case, a tuple of arguments, and all of one length; "
            f"got lengths {[len(case) for case in cases]}."
        )
    title = name or getattr(candidate, "__name__", type(candidate).__name__)
    if not callable(candidate):
        return Verdict("wrong", f"✗ {title}: wanted a function, got {type(candidate).__name__}. Pass it uncalled.")
    exam = _Exam(title, candidate, reference, [tuple(case) for case in cases], dict(suspects or {}), tolerance)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        return exam.examine(gradients, verified)


@dataclass
class _Exam:
    """One candidate before its cases."""

    title: str
    candidate: Callable[..., Any]
    reference: Callable[..., Any]
    cases: list[Case]
    suspects: dict[str, Callable[..., Any]]
    tolerance: float | None
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = parameter_names(self.reference, len(self.cases[0]))

    def examine(self, with_gradients: bool, verified: str) -> Verdict:
        truths = [self._truth(case) for case in self.cases]
        runs: list[Run] = []
        for case in self.cases:
            run = call(self.candidate, case, self.names)
            if isinstance(run.error, NotImplementedError):
                return Verdict("unsolved", f"… {self.title}: not solved yet: {run.error}")
            runs.append(run)
        for run, truth, case in zip(runs, truths, self.cases, strict=True):
            try:
                complaint = self._complaint(run, truth)
                if complaint:
                    cause = likely_cause(runs, truths, self.cases, self.names, self.suspects, self.tolerance)
                    return self._wrong(case, complaint, cause)
            except Exception as error:  # a sparse tensor, another device, a type of the reader's own
                return self._wrong(case, f"the result cannot be compared with what was wanted: {_first_line(error)}")
            if run.changed:
                return self._wrong(case, _changed_input(run.changed))
        reached: list[str] = []
        for case in self.cases if with_gradients else []:
            wanted = gradients(self.reference, case, self.names)
            complaint = self._gradient_complaint(case, wanted)
            if complaint:
                return self._wrong(case, complaint)
            reached += [name for name in wanted if name not in reached]
        return Verdict("right", self._praise(truths, reached, verified))

    def _truth(self, case: Case) -> Run:
        run = call(self.reference, case, self.names)
        if run.error is not None:
            raise ValueError(f"check: the reference itself fails on {describe(case, self.names)}.") from run.error
        return run

    def _complaint(self, run: Run, truth: Run) -> str:
        if run.error is not None:
            return self._explain(run.error, run.line)
        complaint = structure_complaint(run.result, truth.result)
        if complaint:
            return complaint
        count = len(truth.values)
        for number, (got, wanted) in enumerate(zip(run.values, truth.values, strict=True), start=1):
            complaint = value_complaint(got, wanted, tolerance_for(wanted, self.tolerance))
            if complaint:
                return f"result {number} of {count}: {complaint}" if count > 1 else complaint
        return ""

    def _explain(self, error: Exception, line: str) -> str:
        if isinstance(error, TypeError) and not line:
            return f"it cannot be called with ({', '.join(self.names)}): {error}. Keep the parameters of the stub."
        where = f"\n  in the line: {line}" if line else ""
        return f"it raised {type(error).__name__}: {_first_line(error)}{where}\n  look at: {_advice(error)}"

    def _gradient_complaint(self, case: Case, wanted: dict[str, Tensor]) -> str:
        if not wanted:
            return ""
        try:
            got = gradients(self.candidate, case, self.names)
        except Exception as error:
            return (
                f"the values are right, but with gradients it raised {type(error).__name__}: {_first_line(error)}\n"
                f"  look at: {_advice(error)}"
            )
        lost = [name for name in wanted if name not in got]
        if lost:
            return (
                f"the values are right, but no gradient reaches {' and '.join(lost)}. Somewhere the graph is cut: "
                ".detach(), .data, .item(), .numpy(), torch.tensor(...) of a tensor, or torch.no_grad()."
            )
        for name, grad in wanted.items():
            complaint = value_complaint(got[name], grad, 100 * tolerance_for(grad, self.tolerance))
            if complaint:
                return f"the values are right, but the gradient with respect to {name} is not: {complaint}"
        return ""

    def _wrong(self, case: Case, complaint: str, cause: str = "") -> Verdict:
        likely = f"\n  likely cause: {cause}." if cause else ""
        return Verdict("wrong", f"✗ {self.title}: for {describe(case, self.names)}\n  {complaint}{likely}")

    def _praise(self, truths: list[Run], reached: list[str], verified: str) -> str:
        results = [value for truth in truths for value in truth.values]
        tensors = [value for value in results if isinstance(value, Tensor)]
        bounds: dict[float, str] = {}
        for value in results:
            allowed = tolerance_for(value, self.tolerance)
            if allowed:
                bounds[allowed] = f"{allowed:g}"
        agree = f"errors below {' and '.join(bounds[key] for key in sorted(bounds))}" if bounds else "equal"
        shapes = ", ".join(map(str, sorted({tuple(value.shape) for value in tensors})))
        dtypes = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors}))
        what = f" (results {shapes} in {dtypes})" if tensors else ""
        also = f", and the gradients of {', '.join(reached)}" if reached else ""
        cases = f"{len(self.cases)} case{'s' * (len(self.cases) > 1)}"
        text = f"✓ {self.title}: right.\n  verified on {cases}{what}: {agree}, inputs unchanged{also}."
        return f"{text}\n  {verified}" if verified else text


def _changed_input(names: tuple[str, ...]) -> str:
    return (
        f"the result is right, but it changed its input {' and '.join(names)} in place. "
        "Make a new tensor (y = x * 2) where you now write into the old one (x *= 2, x[...] = ...)."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else "(no message)"


def _advice(error: Exception) -> str:
    text = str(error)
    if isinstance(error, NameError):
        return "a name that this cell does not know: a typing error, or a variable of another cell."
    if "in-place" in text or "inplace" in text:
        return "a tensor that is changed in place (x *= 2, x[...] = ...); make a new one instead."
    if "numpy" in text:
        return "torch functions all the way: NumPy cuts the gradient."
    if isinstance(error, IndexError):
        return "the range of an index: the first and the last turn of the loop."
    if "size" in text or "shape" in text or "dimension" in text or "broadcast" in text:
        return "the .shape of each tensor in that line: print them, two do not fit."
    if "dtype" in text or "Float" in text or "Double" in text:
        return "new tensors: make them with dtype=x.dtype, device=x.device."
    return "that line, with this case's arguments in a cell of your own."


# -------------------------------------------------------------------- for the tests of checks


def assert_accepts(check_function: Callable[[Any], Verdict], solution: Any) -> None:
    """Fail unless the check finds `solution` right."""
    verdict = check_function(solution)
    if not verdict.ok:
        raise AssertionError(f"the check refused the solution:\n{verdict}")


def assert_unsolved(check_function: Callable[[Any], Verdict], stub: Any) -> None:
    """Fail unless the check calls `stub` unsolved."""
    verdict = check_function(stub)
    if verdict.state != "unsolved" or "not solved yet" not in verdict.text:
        raise AssertionError(f"the check did not see that the stub is unsolved:\n{verdict}")


def assert_rejects(check_function: Callable[[Any], Verdict], wrong: Any, *words: str) -> None:
    """Fail unless the check refuses `wrong` with a message that holds every one of `words` (at least one)."""
    if not words:
        raise TypeError("assert_rejects wants words that the message must hold: those that name the cause.")
    verdict = check_function(wrong)
    if verdict.state != "wrong":
        raise AssertionError(f"the check took a wrong answer for {verdict.state}:\n{verdict}")
    missing = [word for word in words if word.lower() not in verdict.text.lower()]
    if missing:
        raise AssertionError(f"the check's message lacks {missing}:\n{verdict}")
