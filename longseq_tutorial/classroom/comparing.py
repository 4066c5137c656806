"""Calling a reader's function on a case, and comparing what it gives with what was wanted.

`exercises.check` is made of these parts; nothing here knows of exercises or causes.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Case = tuple[Any, ...]

# Agreement asked for, relative to the largest value wanted (or to 1, if that is larger).
TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 1e-4, torch.complex64: 1e-4}


@dataclass(frozen=True)
class Run:
    """One call of one function on one case.

    Attributes:
        values: its results in a flat list (of tuples and lists, the parts).
        result: what it returned, as it was.
        error: what it raised instead, or None.
        line: the line of its own source that raised; "" when the call itself did not fit.
        changed: names of the tensor arguments that it changed in place.
    """

    values: list[Any]
    result: Any = None
    error: Exception | None = None
    line: str = ""
    changed: tuple[str, ...] = ()


def parameter_names(function: Callable[..., Any], count: int) -> list[str]:
    """Return the names of the first `count` positional parameters of `function`, as far as it has them."""
    names: list[str] = []
    with contextlib.suppress(TypeError, ValueError):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                names.append(parameter.name)
    return (names + [f"argument {position + 1}" for position in range(len(names), count)])[:count]


def call(function: Callable[..., Any], case: Case, names: list[str]) -> Run:
    """Call `function` on copies of the arguments, with the same random numbers every time."""
    arguments = tuple(_copy(argument) for argument in case)
    torch.manual_seed(0)
    try:
        result = function(*arguments)
        values = [_copy(value) for value in leaves(result)]
    except Exception as error:
        return Run([], error=error, line=_failing_line(error, function))
    changed = tuple(
        name
        for name, before, after in zip(names, case, arguments, strict=True)
        if isinstance(before, Tensor) and not _identical(before, after)
    )
    return Run(values, result=result, changed=changed)


def gradients(function: Callable[..., Any], case: Case, names: list[str]) -> dict[str, Tensor]:
    """Return d(a fixed random combination of the results) / d(argument), for each argument that has one."""
    arguments = tuple(_copy(argument, gradient=True) for argument in case)
    inputs = {
        name: argument
        for name, argument in zip(names, arguments, strict=True)
        if isinstance(argument, Tensor) and argument.requires_grad
    }
    torch.manual_seed(0)
    results = leaves(function(*arguments))
    outputs = [leaf for leaf in results if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not inputs or not outputs:
        return {}
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        real = torch.view_as_real(output) if output.is_complex() else output
        weights = torch.randn(real.shape, generator=generator, dtype=torch.float64).to(real.dtype)
        total = total + (real * weights).sum()
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return {name: grad for name, grad in zip(inputs, grads, strict=True) if grad is not None}


def leaves(result: Any) -> Iterator[Any]:
    """Yield the parts of nested tuples and lists, in order; anything else is one part."""
    if isinstance(result, (tuple, list)):
        for part in result:
            yield from leaves(part)
    else:
        yield result


# -------------------------------------------------------------------- are they the same?


def tolerance_for(wanted: Any, tolerance: float | None) -> float:
    """Return the relative error allowed for `wanted`: 0 for whole numbers, else `tolerance` or its dtype's."""
    if isinstance(wanted, Tensor) and not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0
    if tolerance is not None:
        return tolerance
    return TOLERANCE.get(wanted.dtype, 1e-2) if isinstance(wanted, Tensor) else 1e-9


def close(got: Any, wanted: Any, allowed: float, same_dtype: bool = True) -> bool:
    """Return whether `got` equals `wanted` in shape, dtype and, up to `allowed`, value."""
    if isinstance(wanted, Tensor):
        if not isinstance(got, Tensor) or got.shape != wanted.shape:
            return False
        if same_dtype and got.dtype != wanted.dtype:
            return False
        return not bool(wrong_places(got, wanted, allowed).any())
    first, second = as_number(got), as_number(wanted)
    if first is None or second is None:
        return type(got) is type(wanted) and bool(got == wanted)
    if not math.isfinite(second):
        return str(first) == str(second)
    return abs(first - second) <= allowed * max(1.0, abs(second))


def wrong_places(got: Tensor, wanted: Tensor, allowed: float) -> Tensor:
    """Return a boolean tensor, True where `got` is off by more than `allowed` times the largest value wanted."""
    if allowed == 0.0:
        return got != wanted
    wide = torch.complex128 if wanted.is_complex() or got.is_complex() else torch.float64
    got, wanted = got.to(wide), wanted.to(wide)
    finite = torch.isfinite(wanted)
    size = wanted[finite].abs().max().item() if finite.any() else 0.0
    same = (got == wanted) | (torch.isnan(wanted.abs()) & torch.isnan(got.abs()))
    return ~((got - wanted).abs() <= allowed * max(1.0, size)) & ~same


def structure_complaint(got: Any, wanted: Any) -> str:
    """Say what is wrong with the kind of result: None, a tuple, an array instead of a tensor; "" if nothing."""
    if got is None and wanted is not None:
        return "it returned None. Is the `return` missing?"
    if isinstance(wanted, (tuple, list)):
        if not isinstance(got, (tuple, list)) or len(got) != len(wanted):
            had = f"{len(got)} results" if isinstance(got, (tuple, list)) else f"one {type(got).__name__}"
            return f"wanted {len(wanted)} results; got {had}."
        return next((text for g, w in zip(got, wanted, strict=True) if (text := structure_complaint(g, w))), "")
    if isinstance(wanted, Tensor) and not isinstance(got, Tensor):
        mend = "Return one result, not several" if isinstance(got, (tuple, list)) else "Stay with torch functions"
        return f"wanted a tensor of shape {tuple(wanted.shape)}; got {type(got).__name__}. {mend}."
    if isinstance(wanted, (bool, str)) and type(got) is not type(wanted):
        return f"wanted {wanted!r}; got {short(got)}."
    if as_number(wanted) is not None and as_number(got) is None:
        return f"wanted a number; got {short(got)}."
    return ""


def value_complaint(got: Any, wanted: Any, allowed: float) -> str:
    """Say what is wrong with one result of the right kind: shape, dtype, NaN, values; "" if nothing."""
    if close(got, wanted, allowed):
        return ""
    if not isinstance(wanted, Tensor):
        return f"wanted {short(wanted)}; got {short(got)}."
    if got.shape != wanted.shape:
        return f"shape: wanted {tuple(wanted.shape)}, got {tuple(got.shape)}."
    if got.dtype != wanted.dtype:
        return f"dtype: wanted {wanted.dtype}, got {got.dtype}. Make new tensors with dtype=x.dtype."
    unwanted = ~torch.isfinite(got) & torch.isfinite(wanted)
    if unwanted.any():
        return (
            f"{int(unwanted.sum())} of {got.numel()} values are NaN or infinite, the first at {_at(_first(unwanted))}. "
            "Look for 0/0, log(0), exp of a large number, or a softmax over a row that is masked throughout."
        )
    wrong = wrong_places(got, wanted, allowed)
    place = _first(wrong)
    return (
        f"{int(wrong.sum())} of {got.numel()} values are wrong, the first at {_at(place)}: "
        f"got {short(got[place])}, wanted {short(wanted[place])}; largest error {short(_largest_error(got, wanted))}."
    )


# -------------------------------------------------------------------- in words


def describe(case: Case, names: list[str]) -> str:
    """Return the arguments of a case in words: "x (2, 7, 4) float64, length=7"."""
    return ", ".join(_describe_argument(name, value) for name, value in zip(names, case, strict=True))


def short(value: Any) -> str:
    """Return a value in at most 60 characters; numbers with four digits."""
    number = as_number(value)
    if number is not None:
        return f"{number:.4g}"
    if isinstance(value, Tensor):
        return str(value.item()) if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_number(value: Any) -> float | None:
    """Return a real number as a float; None for anything else, and for booleans."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool:
        return float(value)
    if isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
        return float(value)
    return None


def _describe_argument(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{name} {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if callable(value):
        return f"{name}={getattr(value, '__name__', type(value).__name__)}"
    return f"{name}={short(value)}"


def _copy(value: Any, *, gradient: bool = False) -> Any:
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        return copy.requires_grad_(True) if gradient and (value.is_floating_point() or value.is_complex()) else copy
    return value.copy() if isinstance(value, np.ndarray) else value


def _failing_line(error: Exception, function: Callable[..., Any]) -> str:
    target = getattr(function, "forward", function)
    code = getattr(target, "__code__", None)
    trace, line = error.__traceback__, ""
    while trace is not None and code is not None:
        if trace.tb_frame.f_code.co_filename == code.co_filename:
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip() or line
        trace = trace.tb_next
    return line


def _identical(before: Tensor, after: Tensor) -> bool:
    if before.shape != after.shape or before.dtype != after.dtype:
        return False
    before, after = before.detach(), after.detach()
    return bool(((before == after) | ((before != before) & (after != after))).all())


def _largest_error(got: Tensor, wanted: Tensor) -> float:
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    return float((got.to(wide) - wanted.to(wide)).abs().nan_to_num(nan=math.inf).max())


def _first(places: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in places.nonzero()[0])


def _at(place: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, place))}]" if place else "the only one"
