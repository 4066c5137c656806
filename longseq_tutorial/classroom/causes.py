"""From a wrong result to its likely cause.

First the mistakes that a chapter foresaw (its suspects), then those that happen in any exercise: a sign, a
reversal, an off-by-one, a transpose, a scale, float32 inside; at last, where the wrong values lie.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.comparing import (
    Case,
    Run,
    call,
    close,
    structure_complaint,
    tolerance_for,
    wrong_places,
)
from longseq_tutorial.classroom.figures import fmt

Change = Callable[[Tensor], Tensor]


def likely_cause(
    runs: Sequence[Run],
    truths: Sequence[Run],
    cases: Sequence[Case],
    names: list[str],
    suspects: Mapping[str, Callable[..., Any]],
    tolerance: float | None = None,
) -> str:
    """Return the first sentence whose mistake gives what the candidate gave on every case; "" if none does.

    Args:
        runs: what the candidate gave, one for each case.
        truths: what was wanted.
        cases: the arguments.
        names: their names.
        suspects: sentence -> function that gives what this mistake would give.
        tolerance: as in `exercises.check`.
    """
    for sentence, mistake in suspects.items():
        outcomes = [call(mistake, case, names) for case in cases]
        if _same(runs, outcomes, tolerance) and not _same(truths, outcomes, tolerance):
            return sentence
    runs, truths = _only_wrong_results(runs, truths, tolerance)
    if not runs:
        return ""
    for sentence, change in _everyday_mistakes(truths[0].values):
        outcomes = [_changed(truth, change) for truth in truths]
        if not _same(truths, outcomes, tolerance) and _same(runs, outcomes, tolerance):
            return sentence
    return (
        _constant_factor(runs, truths, cases, names, tolerance)
        or _low_precision(runs, truths)
        or _place_of_errors(runs, truths, tolerance)
    )


def _same(runs: Sequence[Run], outcomes: Sequence[Run], tolerance: float | None) -> bool:
    """Return whether both gave the same on every case: equal values, or an error of the same type."""
    for one, other in zip(runs, outcomes, strict=True):
        if one.error is not None or other.error is not None:
            if type(one.error) is not type(other.error):
                return False
        elif len(one.values) != len(other.values):
            return False
        elif not all(close(a, b, _loose(b, tolerance)) for a, b in zip(one.values, other.values, strict=True)):
            return False
    return True


def _loose(wanted: Any, tolerance: float | None) -> float:
    """A mistake may be computed another way than the reader's, so rounding gets a little more room."""
    allowed = tolerance_for(wanted, tolerance)
    return max(allowed, 1e-7) if allowed else 0.0


def _only_wrong_results(
    runs: Sequence[Run], truths: Sequence[Run], tolerance: float | None
) -> tuple[list[Run], list[Run]]:
    """Keep of each run those results that are wrong on some case; nothing when they cannot be compared."""
    for run, truth in zip(runs, truths, strict=True):
        if run.error is not None or structure_complaint(run.result, truth.result):
            return [], []
    wrong = [
        number
        for number in range(len(truths[0].values))
        if not all(
            close(run.values[number], truth.values[number], tolerance_for(truth.values[number], tolerance))
            for run, truth in zip(runs, truths, strict=True)
        )
    ]
    if any(not isinstance(truth.values[number], Tensor) for truth in truths for number in wrong):
        return [], []

    def keep(group: Sequence[Run]) -> list[Run]:
        return [Run([run.values[number] for number in wrong]) for run in group]

    return keep(runs), keep(truths)


def _everyday_mistakes(values: list[Any]) -> Iterator[tuple[str, Change]]:
    """Yield (sentence, what the mistake makes of a right result) for mistakes of any exercise."""
    axes = range(max((value.ndim for value in values), default=0))
    yield "the sign is wrong", _negated
    for axis in axes:
        yield f"the result is reversed along axis {axis}", _reversed(axis)
        for step, way in ((1, "late"), (-1, "early")):
            yield f"an off-by-one: the result comes one step too {way} along axis {axis}", _shifted(axis, step)
        for step in (1, -1):
            yield (
                f"the result is rolled around by one step along axis {axis}: circular instead of linear",
                _rolled(axis, step),
            )
    for first, second in itertools.combinations(axes, 2):
        sentence = f"axes {first} and {second} are swapped: a transpose is missing or one too many"
        yield sentence, _transposed(first, second)


def _negated(y: Tensor) -> Tensor:
    return ~y if y.dtype == torch.bool else -y


def _reversed(axis: int) -> Change:
    return lambda y: y.flip(axis)


def _rolled(axis: int, step: int) -> Change:
    return lambda y: y.roll(step, axis)


def _transposed(first: int, second: int) -> Change:
    return lambda y: y.transpose(first, second)


def _shifted(axis: int, step: int) -> Change:
    def shift(y: Tensor) -> Tensor:
        moved = y.roll(step, axis)
        if y.shape[axis]:
            moved.select(axis, 0 if step > 0 else -1).zero_()
        return moved

    return shift


def _changed(truth: Run, change: Change) -> Run:
    try:
        return Run([change(value) for value in truth.values])
    except (IndexError, RuntimeError) as error:  # this result has no such axis
        return Run([], error=error)


def _constant_factor(
    runs: Sequence[Run], truths: Sequence[Run], cases: Sequence[Case], names: list[str], tolerance: float | None
) -> str:
    """Name the factor when every value is the same multiple of what is wanted, case by case."""
    known = []
    for run, truth, case in zip(runs, truths, cases, strict=True):
        pairs = list(zip(run.values, truth.values, strict=True))
        if all(not wanted.numel() or not wanted.any() for _, wanted in pairs):
            continue  # zero times anything is zero: such a case tells nothing
        factor = _factor(pairs, tolerance)
        if factor is None:
            return ""
        known.append((case, factor))
    off = [factor for _, factor in known if abs(factor - 1) > 1e-6]
    if not off or all(value.numel() < 2 for truth in truths for value in truth.values):
        return ""  # a single number is always some multiple of another
    sizes = _power_of_a_size(known, names)
    return f"a scale is missing or doubled: every value is {fmt(off[0], 4)} times what is wanted{sizes}"


def _factor(pairs: list[tuple[Tensor, Tensor]], tolerance: float | None) -> float | None:
    if any(not b.is_floating_point() or a.dtype != b.dtype or a.shape != b.shape for a, b in pairs):
        return None
    got = torch.cat([a.reshape(-1).double() for a, _ in pairs])
    wanted = torch.cat([b.reshape(-1).double() for _, b in pairs])
    if not bool(torch.isfinite(got).all() and torch.isfinite(wanted).all()):
        return None
    factor = float(got @ wanted / (wanted @ wanted))
    allowed = max(tolerance_for(b, tolerance) for _, b in pairs)
    return factor if abs(factor) > 1e-6 and close(got, factor * wanted, allowed) else None


def _power_of_a_size(known: list[tuple[Case, float]], names: list[str]) -> str:
    """Say of which size of an argument the factor is a power, if it is on every case."""
    powers = ((0.5, "sqrt({})"), (-0.5, "1/sqrt({})"), (1.0, "{}"), (-1.0, "1/{}"))
    for position, argument in enumerate(known[0][0]):
        for axis in range(argument.ndim if isinstance(argument, Tensor) else 0):
            sizes = [case[position].shape[axis] for case, _ in known if case[position].ndim > axis]
            if len(sizes) < len(known) or max(sizes) < 2:
                continue
            for power, form in powers:
                if all(abs(f - n**power) < 1e-5 * abs(f) for n, (_, f) in zip(sizes, known, strict=True)):
                    what = form.format(f"the size of axis {axis} of {names[position]}")
                    return f", which is {what} ({max(sizes)} at most)"
    return ""


def _low_precision(runs: Sequence[Run], truths: Sequence[Run]) -> str:
    pairs = [pair for r, t in zip(runs, truths, strict=True) for pair in zip(r.values, t.values, strict=True)]
    double = any(wanted.dtype in (torch.float64, torch.complex128) for _, wanted in pairs)
    if double and all(close(got, wanted, 1e-4, same_dtype=False) for got, wanted in pairs):
        return (
            "something inside is computed in float32: the result agrees to a few digits only. "
            "Look for .float(), torch.float32, or a new tensor made without dtype=x.dtype"
        )
    return ""


def _place_of_errors(runs: Sequence[Run], truths: Sequence[Run], tolerance: float | None) -> str:
    """Say where the wrong values lie when they lie together: only at the first step, only at the last, ..."""
    maps = []
    for run, truth in zip(runs, truths, strict=True):
        for got, wanted in zip(run.values, truth.values, strict=True):
            if got.shape != wanted.shape or got.dtype != wanted.dtype:
                return ""
            maps.append(wrong_places(got, wanted, tolerance_for(wanted, tolerance)))
    maps = [wrong for wrong in maps if wrong.any()]
    for axis in range(min((wrong.ndim for wrong in maps), default=0)):
        long = [wrong for wrong in maps if wrong.shape[axis] > 1]  # with one position, first and last are the same
        rows = [wrong.movedim(axis, 0).reshape(wrong.shape[axis], -1).any(1) for wrong in long]
        if not rows:
            continue
        for word, end in (("first", 0), ("last", -1)):
            if all(bool(row[end]) and int(row.sum()) == 1 for row in rows):
                return f"only the {word} position along axis {axis} is wrong: look at the edge"
        if all(not row[0] and bool(row[1:].all()) for row in rows):
            return f"only the first position along axis {axis} is right: what is carried to the next is not"
    return ""
