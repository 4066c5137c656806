"""ListOps expressions as trees: parsed, measured, drawn. For notebook 10.

A tree holds what a flat list of tokens hides: which tokens belong together, how far apart they stand, and the
value of every part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from longseq_tutorial.classroom.figures import OKABE_ITO
from longseq_tutorial.tasks.expressions import CLOSE, MIN, VOCABULARY, apply, encode, evaluate

Tokens = str | Sequence[int] | np.ndarray | Tensor


@dataclass
class Node:
    """An operator with its arguments, or a digit."""

    operator: int  # the token id; 0 for a digit
    value: int  # what this part of the expression comes to
    start: int  # place of its first token
    stop: int  # place after its last token
    depth: int  # 1 for the root
    arguments: list[Node] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in the order of their first tokens."""
        yield self
        for argument in self.arguments:
            yield from argument.walk()

    @property
    def digits(self) -> list[Node]:
        """All digits below, from left to right."""
        return [node for node in self.walk() if not node.operator]

    @property
    def operators(self) -> list[Node]:
        """All operators, this node included, in the order of their tokens."""
        return [node for node in self.walk() if node.operator]

    @property
    def name(self) -> str:
        """ "MAX", "MED" ... or the digit."""
        return VOCABULARY[self.operator].strip("[") if self.operator else str(self.value)


def token_ids(expression: Tokens) -> list[int]:
    """The token ids of an expression, given as text or as ids; padding after its end is left out.

    Raises `tasks.DataError` when it is not a well-formed expression.
    """
    ids = encode(expression) if isinstance(expression, str) else expression
    ids = [int(token) for token in ids]
    while ids and ids[-1] == 0:
        ids.pop()
    if not all(0 <= token < len(VOCABULARY) for token in ids):
        ids = [min(max(token, 0), 255) for token in ids]  # for the message of `evaluate`
    evaluate(ids)
    return ids


def parse(expression: Tokens) -> Node:
    """The tree of an expression. Raises `tasks.DataError` when it is not well formed."""
    root: Node | None = None
    open_nodes: list[Node] = []
    for place, token in enumerate(token_ids(expression)):
        depth = len(open_nodes) + 1
        if token == CLOSE:
            node = open_nodes.pop()
            node.stop = place + 1
            node.value = apply(node.operator, [argument.value for argument in node.arguments])
            continue
        is_operator = token >= MIN
        node = Node(token if is_operator else 0, 0 if is_operator else token - 1, place, place + 1, depth)
        if open_nodes:
            open_nodes[-1].arguments.append(node)
        else:
            root = node
        if is_operator:
            open_nodes.append(node)
    assert root is not None  # `evaluate` refused an empty expression
    return root


def argument_distances(tokens: Tokens) -> Tensor:
    """For each argument, in the order of the tokens, how many places it begins after its operator: (arguments,)."""
    distances = [(argument.start, argument.start - node.start) for node in parse(tokens).operators
                 for argument in node.arguments]  # fmt: skip
    return torch.tensor([distance for _, distance in sorted(distances)], dtype=torch.int64)


def with_digit(root: Node, which: int, digit: int) -> Node:
    """The tree after digit number `which` (from 0, left to right) has become `digit`; `root` stays as it is."""
    count = len(root.digits)
    if not 0 <= which < count or not 0 <= digit <= 9:
        raise ValueError(f"wanted which in 0 to {count - 1} and digit in 0 to 9; got {which} and {digit}.")
    target = root.digits[which].start

    def copy(node: Node) -> Node:
        if not node.start <= target < node.stop:
            return node
        if not node.operator:
            return replace(node, value=digit)
        arguments = [copy(argument) for argument in node.arguments]
        value = apply(node.operator, [argument.value for argument in arguments])
        return replace(node, arguments=arguments, value=value)

    return copy(root)


def draw_tree(ax: Axes, root: Node, before: Mapping[int, int] | None = None, title: str = "") -> None:
    """Draw a tree: operators with their values, digits below, all digits from left to right.

    before: values that nodes had earlier, by place of their first token; a node whose value is another now is
    marked, with both values.
    """
    before = before or {}
    places = _layout(root)
    crowded = len(root.digits) > 70  # then words would overlap
    size = float(np.clip(320 / max(len(root.digits), 1), 6.0, 11.0))
    for node in root.operators:
        for argument in node.arguments:
            x, y = zip(places[node.start], places[argument.start], strict=True)
            changed = before.get(argument.start, argument.value) != argument.value
            colour, width = (OKABE_ITO["vermilion"], 2.2) if changed else ("#8A8A86", 0.9)
            ax.plot(x, y, color=colour, linewidth=width, marker="", zorder=1)
    for node in root.walk():
        old = before.get(node.start, node.value)
        ink = OKABE_ITO["vermilion"] if old != node.value else OKABE_ITO["blue" if node.operator else "black"]
        if crowded:
            ax.plot(*places[node.start], marker="s" if node.operator else ".", color=ink, markersize=3)
            continue
        value = f"{old} → {node.value}" if old != node.value else str(node.value)
        text = f"{node.name}\n{value}" if node.operator else value
        box = {"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": ink, "linewidth": 1.1}
        ax.text(*places[node.start], text, ha="center", va="center", color=ink, fontsize=size,
                bbox=box if node.operator else {**box, "edgecolor": "none", "pad": 0.05}, zorder=2)  # fmt: skip
    levels = max(node.depth for node in root.walk())
    ax.set(xlim=(-0.8, max(x for x, _ in places.values()) + 0.8), ylim=(-levels - 0.6, -0.4), title=title)
    ax.set(xticks=[], yticks=[-level for level in range(1, levels + 1)], ylabel="level")
    ax.set_yticklabels([str(level) for level in range(1, levels + 1)])
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)


def tree_figure(root: Node, before: Mapping[int, int] | None = None, title: str = "") -> plt.Figure:
    """A figure of one tree, as wide and high as it needs."""
    levels = max(node.depth for node in root.walk())
    width = float(np.clip(0.34 * len(root.digits), 5.0, 10.5))
    fig, ax = plt.subplots(figsize=(width, 1.0 + 0.75 * levels))
    draw_tree(ax, root, before, title)
    return fig


def _layout(root: Node) -> dict[int, tuple[float, float]]:
    """Where each node goes: digits side by side, an operator above the middle of its arguments."""
    places: dict[int, tuple[float, float]] = {}
    for column, node in enumerate(root.digits):
        places[node.start] = (float(column), -float(node.depth))
    for node in reversed(root.operators):  # arguments come before their operator
        xs = [places[argument.start][0] for argument in node.arguments]
        places[node.start] = ((xs[0] + xs[-1]) / 2, -float(node.depth))
    return places
