"""The exercise checks of notebook 10."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial import tasks
from longseq_tutorial.classroom import trees
from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.tasks import expressions
from longseq_tutorial.tasks.expressions import MED, SM, VOCABULARY

Values = Sequence[int]


# ------------------------------------------------------------------ exercise 1: the median


def median(values: Values) -> int:
    """The middle of the sorted values, or the mean of the two in the middle, rounded down."""
    return expressions.apply(MED, values)


def check_median(candidate: Callable[..., Any]) -> Verdict:
    """`median(values) -> int`, values a tuple of digits."""
    return check(
        candidate,
        median,
        name="median",
        cases=[
            ((4, 9, 1),),
            ((7,),),
            ((4, 7),),
            ((5, 4),),
            ((9, 0, 8, 3),),
            ((2, 2, 5, 5, 9, 9),),
            ((8, 1, 1, 9, 0, 9, 9),),
        ],
        suspects={
            "the values are not sorted first": lambda v: _middle(v, lambda a, b: (a + b) // 2),
            "of an even number of values you take the lower of the two in the middle, as torch.median does": (
                lambda v: _middle(sorted(v), lambda a, b: a)
            ),
            "of an even number of values you take the upper of the two in the middle": (
                lambda v: _middle(sorted(v), lambda a, b: b)
            ),
            "of an even number of values the mean of the middle two is left unrounded: it has to be a digit again": (
                lambda v: _middle(sorted(v), lambda a, b: (a + b) / 2)
            ),
            "the mean of the middle two is rounded up, and the task rounds down": (
                lambda v: _middle(sorted(v), lambda a, b: (a + b + 1) // 2)
            ),
            "the mean of the middle two is rounded to the nearest, halves to the even digit as round() does": (
                lambda v: _middle(sorted(v), lambda a, b: round((a + b) / 2))
            ),
            "this is the mean, not the median": lambda v: sum(v) // len(v),
        },
        verified="The last operator is in your hands: MIN, MAX and SM are one word of Python each.",
    )


def _middle(values: Values, two: Callable[[int, int], Any]) -> Any:
    half = len(values) // 2
    return values[half] if len(values) % 2 else two(values[half - 1], values[half])


# ------------------------------------------------------------------ exercise 2: a stack evaluates


def evaluate(expression: str) -> int:
    """The value of an expression given as text."""
    return expressions.evaluate(expression)


def check_evaluate(candidate: Callable[..., Any]) -> Verdict:
    """`evaluate(expression) -> int`, expression a text such as "[MAX 2 9 [MIN 4 7 ] 0 ]"."""
    texts = [
        "[MAX 2 9 [MIN 4 7 ] 0 ]",
        "7",
        "[SM 5 6 [SM 8 8 ] 9 ]",
        "[MED 4 7 [MED 9 2 3 ] 6 ]",
        "[MIN [MAX 1 4 ] [MED 3 8 ] 9 ]",
        "[MED [MAX 8 [MIN 3 [SM 9 9 9 ] 6 ] ] 2 [SM 4 4 ] [MED 0 9 ] ]",
    ]
    return check(
        candidate,
        evaluate,
        name="evaluate",
        cases=[(text,) for text in texts],
        suspects={
            "SM is the plain sum; it has to be taken modulo 10": _variant(SM, sum),
            "MED of an even number of arguments takes the lower one of the middle two; "
            "it is the mean of both, rounded down": _variant(MED, lambda v: _middle(sorted(v), lambda a, b: a)),
            "MED of an even number of arguments takes the upper one of the middle two; "
            "it is the mean of both, rounded down": _variant(MED, lambda v: _middle(sorted(v), lambda a, b: b)),
            "MED rounds up; it rounds down": _variant(MED, lambda v: _middle(sorted(v), lambda a, b: (a + b + 1) // 2)),
            "the arguments of MED are not sorted": _variant(MED, lambda v: _middle(v, lambda a, b: (a + b) // 2)),
            "MIN and MAX are exchanged": _walk({**_RULES, "MIN": max, "MAX": min}),
            "only the digits directly under the outermost operator count: the value of an inner list has to become "
            "an argument of the list around it": _outermost,
            "the inner brackets are ignored: all digits go to the outermost operator": _flat,
            "digits are compared as text, so that the value is a str; convert them with int()": (
                lambda text: str(evaluate(text))
            ),
            "a closing bracket ends the whole expression; it ends the innermost open list only": _first_close,
        },
        verified="A stack as deep as the nesting is all the memory it takes, and one pass from left to right.",
    )


_RULES: dict[str, Callable[[Values], Any]] = {
    "MIN": min,
    "MAX": max,
    "SM": lambda values: sum(values) % 10,
    "MED": median,
}


def _walk(rules: dict[str, Callable[[Values], Any]]) -> Callable[[str], Any]:
    """Evaluation by other rules for the operators."""

    def value(node: trees.Node) -> Any:
        return rules[node.name]([value(argument) for argument in node.arguments]) if node.operator else node.value

    return lambda text: value(trees.parse(text))


def _variant(operator: int, rule: Callable[[Values], Any]) -> Callable[[str], Any]:
    return _walk({**_RULES, VOCABULARY[operator].strip("["): rule})


def _outermost(text: str) -> Any:
    root = trees.parse(text)
    digits = [node.value for node in root.arguments if not node.operator]
    return _RULES[root.name](digits) if root.operator else root.value


def _flat(text: str) -> Any:
    root = trees.parse(text)
    return _RULES[root.name]([node.value for node in root.digits]) if root.operator else root.value


def _first_close(text: str) -> Any:
    stack: list[tuple[str, list[int]]] = [("", [])]
    for word in text.split():
        if word.isdigit():
            stack[-1][1].append(int(word))
        elif word.startswith("["):
            stack.append((word.strip("["), []))
        else:
            name, values = stack.pop()
            return _RULES[name](values)
    return stack[0][1][0]


# ------------------------------------------------------------------ exercise 3: how far an operator's arguments are


def argument_distances(expression: str) -> Tensor:
    """For each argument, in order, how many tokens it begins after its operator: int64 (arguments,)."""
    return trees.argument_distances(expression)


def check_argument_distances(candidate: Callable[..., Any]) -> Verdict:
    """`argument_distances(expression) -> int64 (arguments,)`."""
    texts = [
        "[MAX 2 9 [MIN 4 7 ] 0 ]",
        "[SM 1 1 ]",
        "[MED [MIN 1 [MAX 5 6 7 ] 2 ] [SM 3 4 ] 8 9 ]",
        "[MIN [MIN [MIN [MIN 1 2 ] 3 ] 4 ] 5 ]",
    ]
    return check(
        candidate,
        argument_distances,
        name="argument_distances",
        cases=[(text,) for text in texts],
        suspects={
            "the distance is counted from the outermost operator; each argument belongs to the innermost list that is "
            "still open": lambda text: _distances(text, lambda place, opened, _: place - opened[0]),
            "the operator of a nested list is put on the stack before its own distance is taken, so that it is 0": (
                _too_early
            ),
            "this counts arguments, not tokens: a nested list is one argument, but many tokens": _ordinals,
            "nested lists are arguments too: the distance to their operator token is missing": (
                lambda text: _distances(text, lambda place, opened, token: place - opened[-1], digits_only=True)
            ),
            "a closing bracket has to take its operator off the stack": (
                lambda text: _distances(text, lambda place, opened, _: place - opened[-1], pops=False)
            ),
            "closing brackets are counted as arguments": (
                lambda text: _distances(text, lambda place, opened, _: place - opened[-1], closes=True)
            ),
            "closing brackets are left out of the count; they are tokens as well": _without_closes,
        },
        verified="Take the largest of them over a real expression, and compare it with a chunk of 128.",
    )


def _distances(
    text: str,
    measure: Callable[[int, list[int], str], int],
    *,
    pops: bool = True,
    closes: bool = False,
    digits_only: bool = False,
) -> Tensor:
    """The one pass over the tokens, with one thing done otherwise."""
    opened: list[int] = []
    out: list[int] = []
    for place, token in enumerate(text.split()):
        if token == "]":
            if closes and len(opened) > 0:
                out.append(measure(place, opened, token))
            if pops:
                opened.pop()
            continue
        operator = token.startswith("[")
        if opened and not (digits_only and operator):
            out.append(measure(place, opened, token))
        if operator:
            opened.append(place)
    return torch.tensor(out, dtype=torch.int64)


def _too_early(text: str) -> Tensor:
    rest = _distances(text, lambda place, opened, token: 0 if token.startswith("[") else place - opened[-1])
    return torch.cat([torch.zeros(1, dtype=torch.int64), rest])


def _ordinals(text: str) -> Tensor:
    found = [
        (argument.start, number)
        for node in trees.parse(text).operators
        for number, argument in enumerate(node.arguments, start=1)
    ]
    return torch.tensor([number for _, number in sorted(found)], dtype=torch.int64)


def _without_closes(text: str) -> Tensor:
    opened: list[int] = []
    out: list[int] = []
    place = 0
    for token in text.split():
        if token == "]":
            opened.pop()
            continue
        if opened:
            out.append(place - opened[-1])
        if token.startswith("["):
            opened.append(place)
        place += 1
    return torch.tensor(out, dtype=torch.int64)


# ------------------------------------------------------------------ exercise 4: a padded batch and its mask

Sequences = tuple[Tensor, ...]


def pad(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """1-D tensors -> x (batch, longest), padded on the right with 0, and mask (batch, longest), True where real."""
    batch = tasks.collate([(sequence, 0) for sequence in sequences])
    return batch.x, batch.mask


def check_pad(candidate: Callable[..., Any]) -> Verdict:
    """`pad(sequences) -> (x, mask)`."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(7, generator=generator, dtype=torch.float64)
    silent = torch.zeros(3, dtype=torch.float64)  # real samples that are 0: silence is no padding
    return check(
        candidate,
        pad,
        name="pad",
        cases=[
            ((torch.tensor([11, 3, 5, 15]), torch.tensor([7]), torch.tensor([12, 1, 15])),),
            ((torch.tensor([4, 2]),),),
            ((signal, silent, signal[:5]),),
        ],
        suspects={
            "the mask is the wrong way round: True is for real values, here and everywhere in this course": (
                lambda s: (pad(s)[0], ~pad(s)[1])
            ),
            "the mask is made from x != 0, and so calls a silent sample padding; make it from the lengths": (
                lambda s: (pad(s)[0], pad(s)[0] != 0)
            ),
            "the padding is on the left; it belongs on the right": _left,
            "sequences are cut to the shortest; they are padded to the longest": _shortest,
            "the mask is one place too long": (
                lambda s: (pad(s)[0], torch.arange(max(map(len, s))) <= torch.tensor([len(x) for x in s])[:, None])
            ),
            "the mask is not bool: compare, and leave the result as it is": lambda s: (pad(s)[0], pad(s)[1].long()),
            "the mask is not bool, but made of floats": lambda s: (pad(s)[0], pad(s)[1].float()),
            "padding is -1; it is 0": lambda s: (pad(s)[0].masked_fill(~pad(s)[1], -1), pad(s)[1]),
            "tokens and mask are in the wrong order": lambda s: pad(s)[::-1],
        },
        verified="tasks.collate does the same, and keeps the labels beside.",
    )


def _left(sequences: Sequences) -> tuple[Tensor, Tensor]:
    x, mask = pad(tuple(s.flip(0) for s in sequences))
    return x.flip(1), mask.flip(1)


def _shortest(sequences: Sequences) -> tuple[Tensor, Tensor]:
    return pad(tuple(s[: min(map(len, sequences))] for s in sequences))


# ------------------------------------------------------------------ exercise 5: neighbours in a picture, steps apart


def raster_steps(path: Tensor, columns: int) -> Tensor:
    """For each two points of a path that follow each other, how many steps of the sequence lie between them.

    path: int64 (points, 2), as (row, column); columns: of the picture. Returns int64 (points - 1,).
    """
    return _steps(path, columns).diff().abs()


def check_raster_steps(candidate: Callable[..., Any]) -> Verdict:
    """`raster_steps(path, columns) -> int64 (points - 1,)`."""
    bent = torch.tensor([[0, 3], [1, 3], [2, 4], [2, 2], [1, 0], [1, 6], [5, 6]])
    generator = torch.Generator().manual_seed(0)
    far = torch.stack([torch.randint(0, size, (9,), generator=generator) for size in (11, 32)], dim=1)
    return check(
        candidate,
        raster_steps,
        name="raster_steps",
        cases=[(bent, 7), (far, 32), (torch.tensor([[0, 0], [127, 127]]), 128), (torch.tensor([[2, 2]]), 5)],
        suspects={
            "rows and columns are exchanged: a step of one row is `columns` steps of the sequence": (
                lambda path, columns: raster_steps(path.flip(1), columns)
            ),
            "this is the distance in the picture (Pythagoras), which the sequence knows nothing of": (
                lambda path, columns: path.diff(dim=0).double().norm(dim=1)
            ),
            "this counts rows and columns alike: a step of one row is `columns` steps of the sequence": (
                lambda path, columns: path.diff(dim=0).abs().sum(1)
            ),
            "the rows' part and the columns' part each lost their sign before they were added": (
                lambda path, columns: (path.diff(dim=0).abs() * torch.tensor([columns, 1])).sum(1)
            ),
            "the sign is still there: wanted is how far, not which way": (
                lambda path, columns: _steps(path, columns).diff()
            ),
            "these are distances from the path's first point; wanted are those from each point to the next": (
                lambda path, columns: (_steps(path, columns) - _steps(path, columns)[0])[1:].abs()
            ),
            "the columns are left out: this is how many steps the rows alone make": (
                lambda path, columns: path[:, 0].diff().abs() * columns
            ),
            "these are the points' places in the sequence; wanted is how far each is from the next": _steps,
        },
        verified="What stands side by side in a picture stands a row apart in the sequence.",
    )


def _steps(path: Tensor, columns: int) -> Tensor:
    return path[:, 0] * columns + path[:, 1]
