"""The panel of notebook 10: a ListOps expression as a tree, and how far the change of one digit travels."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from longseq_tutorial.classroom.panels import IntSlider, Panel
from longseq_tutorial.classroom.trees import Node, Tokens, parse, tree_figure, with_digit
from longseq_tutorial.tasks.expressions import Shape, Stream, decode

__all__ = ["ExpressionTree"]


class ExpressionTree(Panel):
    """An expression, the value of each of its parts, and what becomes of them when one digit is another.

    expression: your own, as text (`"[MAX 2 9 [MIN 4 7 ] 0 ]"`) or as token ids; None draws one from a seed, at
    most so many tokens long, by the task's rule with at most four nested operators of two to five arguments.
    Raises `tasks.DataError` where the expression is not well formed.
    """

    title = "An expression, its tree, and how far a change travels"

    def __init__(self, expression: Tokens | None = None, **start: Any) -> None:
        self.root = None if expression is None else parse(expression)
        digits = 40 if self.root is None else len(self.root.digits)
        drawn = {
            "seed": IntSlider("seed of the expression", 0, 9_999, 4),
            "longest": IntSlider("longest expression (tokens)", 8, 60, 32),
        }
        change = {
            "digit": IntSlider("change which digit (0: none)", 0, digits, 0),
            "to": IntSlider("into", 0, 9, 0),
        }
        self.controls = change if self.root is not None else drawn | change
        super().__init__(**start)

    def figure(self, **state: Any) -> Figure:
        before, after, _ = self._trees(**state)
        return tree_figure(after, {node.start: node.value for node in before.walk()})

    def describe(self, **state: Any) -> str:
        before, after, which = self._trees(**state)
        levels = max(node.depth for node in before.walk())
        said = (
            f"{_text(before)} has {before.stop} tokens, {len(before.operators)} operators on "
            f"{levels - 1} levels, and the value {before.value}."
        )
        if which is None:
            return said
        old, new = before.digits[which].value, after.digits[which].value
        above = [node for node in before.operators if node.start <= before.digits[which].start < node.stop]
        values = {node.start: node.value for node in after.walk()}
        moved = sum(values[node.start] != node.value for node in above)
        kept = "stays" if after.value == before.value else "becomes"
        return (
            f"{said} Digit {which + 1} changes from {old} to {new}: {moved} of the {len(above)} operators above it "
            f"come to another value, and the whole {kept} {after.value}."
        )

    def _trees(self, digit: int, to: int, seed: int = 0, longest: int = 0) -> tuple[Node, Node, int | None]:
        """Before, after, and which digit changes; the last digit stands in for those beyond the end."""
        root = self.root or _drawn(seed, longest)
        if digit == 0:
            return root, root, None
        which = min(digit, len(root.digits)) - 1
        return root, with_digit(root, which, to), which


def _drawn(seed: int, longest: int) -> Node:
    shape = Shape(min_length=longest // 2, max_length=longest + 1, max_depth=5, max_args=5)
    return parse(next(Stream(seed, shape))[0])


def _text(root: Node) -> str:
    text = decode(_ids(root))
    return text if len(text) <= 160 else f"{text[:150]} …"


def _ids(node: Node) -> list[int]:
    if not node.operator:
        return [node.value + 1]
    return [node.operator, *(token for argument in node.arguments for token in _ids(argument)), 15]
