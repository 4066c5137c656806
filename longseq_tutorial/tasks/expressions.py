"""The language of ListOps, and the rule by which its expressions are drawn.

    [MAX 2 9 [MIN 4 7 ] 0 ]  has the value  9

The language is Nangia and Bowman's (2018), the rule that of the Long Range Arena (Tay et al. 2021). A node
is an operator with probability 1/4, and then has two to ten arguments, else a digit; nodes at depth 10 are
always digits; a tree is kept if it is more than 500 and fewer than 2,000 tokens long.

One seed and one `Shape` give one endless stream of distinct expressions, the same on every machine: whoever
asks for more of it gets what the others got, and then more.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .base import PAD, DataError

VOCABULARY = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")  # the token id is the place in here
MIN, MAX, MED, SM, CLOSE = range(11, 16)
OPERATOR_SHARE = 0.25  # probability that a node above the depth limit is an operator
PATIENCE = 200_000  # draws in a row without a new expression after which we give up


@dataclass(frozen=True)
class Shape:
    """Which expressions are drawn and kept. The defaults are the published task's."""

    min_length: int = 500  # kept if longer than this ...
    max_length: int = 2_000  # ... and shorter than this, both strictly, as in the published script
    max_depth: int = 10  # nodes at this depth are digits, so at most max_depth - 1 operators nest
    max_args: int = 10  # an operator has 2 to this many arguments

    def __post_init__(self) -> None:
        if self.max_depth < 1 or self.max_args < 2 or self.min_length < 0:
            raise DataError(
                "need max_depth >= 1, max_args >= 2 and min_length >= 0; got "
                f"{self.max_depth}, {self.max_args} and {self.min_length}."
            )
        if self.max_length < self.min_length + 2:
            raise DataError(
                "lengths lie strictly between min_length and max_length, and nothing does between "
                f"{self.min_length} and {self.max_length}. Raise max_length or lower min_length."
            )
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = 2 + self.max_args * longest
        if longest <= self.min_length:
            raise DataError(
                f"depth {self.max_depth} with {self.max_args} arguments gives at most {longest} tokens, and "
                f"min_length={self.min_length} wants more. Lower min_length or raise max_depth."
            )


def apply(operator: int, arguments: Sequence[int]) -> int:
    """The value of one operator: MIN, MAX, MED (the median, rounded down) or SM (the sum modulo 10)."""
    if operator == MIN:
        return min(arguments)
    if operator == MAX:
        return max(arguments)
    if operator == SM:
        return sum(arguments) % 10
    ordered, middle = sorted(arguments), len(arguments) // 2
    return ordered[middle] if len(arguments) % 2 else (ordered[middle - 1] + ordered[middle]) // 2


def evaluate(expression: str | Sequence[int] | np.ndarray) -> int:
    """The value of an expression, given as text (round brackets may be there or not) or as token ids.

    Padding after the end is ignored. Raises `DataError` where the expression is not well formed.
    """
    tokens = encode(expression) if isinstance(expression, str) else expression
    stack: list[tuple[int, list[int]]] = [(CLOSE, [])]  # open operators with their arguments so far
    for position, token in enumerate(bytes(tokens).rstrip(bytes([PAD]))):
        if 1 <= token <= 10:
            stack[-1][1].append(token - 1)
        elif MIN <= token <= SM:
            stack.append((token, []))
        elif token == CLOSE and len(stack) > 1:
            operator, arguments = stack.pop()
            if not arguments:
                raise DataError(f"{VOCABULARY[operator]} closes at token {position} without an argument.")
            stack[-1][1].append(apply(operator, arguments))
        else:
            what = "']' without an open list" if token == CLOSE else f"token id {token}, outside 1 to 15,"
            raise DataError(f"{what} at token {position}.")
    if len(stack) > 1:
        raise DataError(f"{len(stack) - 1} lists are still open at the end; the expression is cut off.")
    values = stack[0][1]
    if len(values) != 1:
        raise DataError(f"an expression has one value; this one has {len(values)}.")
    return values[0]


# Text to ids without a loop over tokens: each operator becomes one letter, then all bytes are mapped at once.
_LETTERS = {b"[MIN": b"m", b"[MAX": b"x", b"[MED": b"d", b"[SM": b"s"}
_NONE = 255
_IDS = bytearray([_NONE] * 256)
for _id, _byte in enumerate(b"0123456789mxds]", start=1):
    _IDS[_byte] = _id


def encode(text: str | bytes) -> np.ndarray:
    """Token ids (uint8) of an expression in text form; round brackets are dropped.

    Raises `DataError` naming the first token that is not in the vocabulary.
    """
    raw: bytes = text.encode() if isinstance(text, str) else text
    short = raw
    for word, letter in _LETTERS.items():
        short = short.replace(word, letter)
    ids = short.translate(bytes(_IDS), b"() ")
    brackets = raw.count(b"(") + raw.count(b")")
    # Without blanks '12' would pass as '1 2', so words are counted; our own letters must not pass either.
    if _NONE in ids or len(ids) + brackets != len(raw.split()) or any(letter in raw for letter in _LETTERS.values()):
        allowed = {*VOCABULARY[1:], "(", ")"}
        words = raw.decode("utf-8", "replace").split()
        unknown = next((text for text in words if text not in allowed), "a line break")
        raise DataError(f"{unknown[:20]!r} is not a ListOps token; known are {' '.join(VOCABULARY[1:])} and ( ).")
    return np.frombuffer(ids, dtype=np.uint8)


def decode(tokens: Sequence[int] | np.ndarray, brackets: bool = False) -> str:
    """The text of token ids, padding left out.

    brackets: write the official files' form, in which each list is a chain of pairs:
    `[MAX 2 9 ]` becomes `( ( ( [MAX 2 ) 9 ) ] )`.
    """
    ids = [int(token) for token in tokens if token != PAD]
    if any(not 0 < token < len(VOCABULARY) for token in ids):
        raise DataError(f"token ids lie in 0 to {len(VOCABULARY) - 1}; got {min(ids)} to {max(ids)}.")
    if not brackets:
        return " ".join(VOCABULARY[token] for token in ids)
    evaluate(ids)  # only a well-formed expression has a bracketed form
    stack: list[list[str]] = [[]]  # for each open list, its parts as text
    for token in ids:
        if MIN <= token <= SM:
            stack.append([VOCABULARY[token]])
            continue
        part = VOCABULARY[token]
        if token == CLOSE:
            parts = [*stack.pop(), part]
            part = "( " * (len(parts) - 1) + parts[0] + "".join(f" {later} )" for later in parts[1:])
        stack[-1].append(part)
    return stack[0][0]


class _TooLong(Exception):
    """A draw reached the maximum length; it cannot be kept, so the rest of it need not be drawn."""


def draw(rng: random.Random, shape: Shape) -> tuple[bytes, int] | None:
    """Draw one tree: `(token ids, value)`, or None if its length is not one we keep."""
    # Only rng.random() is used: its sequence is the one that Python promises to keep across versions.
    uniform, limit = rng.random, shape.max_length
    tokens: list[int] = []

    def node(depth: int) -> int:
        if depth >= shape.max_depth or uniform() > OPERATOR_SHARE:
            digit = int(uniform() * 10)
            tokens.append(digit + 1)
            return digit
        place = len(tokens)
        tokens.append(PAD)  # the operator is drawn after its arguments
        arguments = [node(depth + 1) for _ in range(2 + int(uniform() * (shape.max_args - 1)))]
        operator = MIN + int(uniform() * 4)
        tokens[place] = operator
        tokens.append(CLOSE)
        if len(tokens) >= limit:
            raise _TooLong
        return apply(operator, arguments)

    try:
        value = node(1)
    except _TooLong:
        return None
    return (bytes(tokens), value) if shape.min_length < len(tokens) < limit else None


class Stream:
    """The endless stream of distinct expressions of a seed and a shape: iterates `(token bytes, value)`.

    Raises `DataError` when the shape has too few expressions to go on.
    """

    def __init__(self, seed: int = 0, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()
        self.rng = random.Random(f"listops {seed}")  # text is hashed: neighbouring seeds are unrelated
        self.seen: set[bytes] = set()  # hashes of what was drawn

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return self

    def __next__(self) -> tuple[bytes, int]:
        for _ in range(PATIENCE):
            drawn = draw(self.rng, self.shape)
            if drawn is not None and self._is_new(drawn[0]):
                return drawn
        raise DataError(
            f"no new expression in {PATIENCE:,} draws after {len(self.seen):,} distinct ones: there are too "
            f"few with {self.shape}. Ask for fewer items, or widen the lengths."
        )

    def _is_new(self, tokens: bytes) -> bool:
        digest = hashlib.blake2b(tokens, digest_size=16).digest()
        new = digest not in self.seen
        self.seen.add(digest)
        return new

    def state(self) -> np.ndarray:
        """Where the random numbers stand, (625,) uint32: `resume` needs it beside the expressions."""
        return np.array(self.rng.getstate()[1], dtype=np.uint32)

    def resume(self, tokens: np.ndarray, offsets: np.ndarray, state: np.ndarray) -> None:
        """Go on after expressions drawn earlier, in any order, and the state after the last of them."""
        raw = tokens.tobytes()
        for start, stop in itertools.pairwise(offsets):
            self._is_new(raw[start:stop])
        self.rng.setstate((3, tuple(int(word) for word in state), None))
