"""The systems side by side, part by part: what a token costs in each, beside the Transformer, at any length.

`count_parts` lets a stack of layers run once and keeps two books, entry by entry, with the part of the model that each
entry belongs to. One book holds operations: those of matrix products, a multiplication and an addition being two, and
those of FFTs. The other holds the bytes of every tensor from its birth to its death; what it says in the end is what
lay there at the fullest moment. Nothing is timed and nothing is asked of the operating system, so the same model gives
the same numbers on any machine. An operation's own scratch memory is no tensor and is not in the book.

A part is a mechanism, and a mechanism is a file: an entry belongs to the innermost call of a mechanism's file that it
happens in.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, MappingProxyType
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from longseq_tutorial import mechanisms
from longseq_tutorial.classroom.diagrams import KINDS
from longseq_tutorial.classroom.figures import OKABE_ITO, PAPER, fmt
from longseq_tutorial.classroom.panels import Choice, LogSlider, Panel

__all__ = ["MORE_OPERATIONS", "PARTS", "Count", "Systems", "count_parts"]

# part -> its colour, that of the same kind of box in the diagrams
PARTS: Mapping[str, str] = MappingProxyType(
    {
        "memory": KINDS["memory"][0],
        "attention": KINDS["attention"][0],
        "positions": KINDS["position"][0],
        "projections and gates": KINDS["gate"][0],
        "feed-forward": "#8A8A86",
        "input": KINDS["end"][0],
    }
)
REST = "projections and gates"
CROSS = OKABE_ITO["vermilion"]


class Count(NamedTuple):
    """What a part costs in one forward pass: its `operations`, and its `bytes` at the model's fullest moment."""

    operations: int
    bytes: int


Costs = Mapping[int, Mapping[str, Count]]  # length -> part -> what it costs


# ---- operations that torch's counter leaves out ----------------------------------------------------------------------


def _fused(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """PyTorch's own fused attention on a CPU: two products for each query and key."""
    return int(sdpa_flop_count(q, k, v))


def _added(y: Any, a: Any, b: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """A product that is added to what is there: y (.., i, k) += a (.., i, j) times b (.., j, k)."""
    return 2 * math.prod(a) * b[-1]


def _real_fft(x: Any, dim: Sequence[int], *rest: Any, out_shape: Any = None, **options: Any) -> int:
    """A real transform of N numbers takes about 2.5 N log2 N."""
    return _transforms(2.5, x, dim)


def _real_fft_back(x: Any, dim: Sequence[int], *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return _transforms(2.5, out_shape, dim)


def _complex_fft(x: Any, dim: Sequence[int], *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return _transforms(5, x, dim)


def _transforms(factor: float, shape: Any, dim: Sequence[int]) -> int:
    return round(factor * math.prod(shape) * math.log2(math.prod(shape[axis] for axis in dim)))


# For `FlopCounterMode(custom_mapping=...)`: operation -> how much it does, from the shapes of its arguments.
MORE_OPERATIONS: Mapping[Any, Callable[..., int]] = MappingProxyType(
    {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused,
        torch.ops.aten.addmm_: _added,
        torch.ops.aten.baddbmm_: _added,
        torch.ops.aten._fft_r2c: _real_fft,
        torch.ops.aten._fft_c2r: _real_fft_back,
        torch.ops.aten._fft_c2c: _complex_fft,
    }
)


# ---- the two books ---------------------------------------------------------------------------------------------------


def count_parts(stack: nn.Module, tokens: Tensor) -> dict[str, Count]:
    """Let ``stack(tokens)`` run once, without gradients, and return what each part of it cost in all.

    Args:
        stack: a model, or an encoder from `longseq_tutorial.models.build_encoder`, on a CPU.
        tokens: what it reads.

    Returns:
        part -> :class:`Count`, for every part in ``PARTS``; the operations add up to those of the pass, the bytes to
        those of all tensors that were there at the fullest moment (the parameters and ``tokens`` itself apart).
    """
    books = _Books()
    with torch.no_grad(), books:
        stack(tokens)
    return {part: Count(books.operations[part], books.fullest[part]) for part in PARTS}


class _Books(TorchDispatchMode):
    """Sees every operation of PyTorch that happens inside ``with _Books() as books``."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.fullest: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._held: dict[int, tuple[str, int]] = {}  # storage -> whose it is, bytes
        self._total = self._most = 0
        self._formulas = {**flop_registry, **{op: shape_wrapper(count) for op, count in MORE_OPERATIONS.items()}}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        part = "attention" if "scaled_dot_product" in packet.__name__ else _part(sys._getframe(1))
        if packet in self._formulas:
            self.operations[part] += self._formulas[packet](*args, **kwargs, out_val=result)
        for tensor in _tensors((result,)):
            address = _address(tensor)
            given = (_address(each) for each in _tensors((args, tuple(kwargs.values()))))  # a view shares its storage
            if address not in self._held and address not in given:
                self._enter(tensor.untyped_storage(), part)
        if self._total > self._most:
            self._most, self.fullest = self._total, self._now.copy()
        return result

    def _enter(self, storage: torch.UntypedStorage, part: str) -> None:
        self._held[storage._cdata] = part, storage.nbytes()
        self._now[part] += storage.nbytes()
        self._total += storage.nbytes()
        weakref.finalize(storage, self._strike, storage._cdata)

    def _strike(self, address: int) -> None:
        part, nbytes = self._held.pop(address)
        self._now[part] -= nbytes
        self._total -= nbytes


def _tensors(things: Iterable[Any]) -> Iterator[Tensor]:
    for thing in things:
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, list | tuple):
            yield from _tensors(thing)


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _part(frame: FrameType | None) -> str:
    """Whose operation it is that happens in this frame: the first caller that names a part decides."""
    while frame is not None and frame.f_code is not count_parts.__code__:
        part = _named(frame.f_code)
        if part:
            return part
        frame = frame.f_back
    return REST


_MECHANISMS = Path(mechanisms.__file__).parent
_FILES = {
    "ema": "memory",
    "s4": "memory",
    "fft_bias": "positions",
    "chunking": "attention",
    "linear_attention": "attention",
    "vq_attention": "attention",
}
# In these files gates, switches and projections stand beside the attention.
_FUNCTIONS = {
    "gated_attention": {"attend": "attention", "attend_in_tiles": "attention", "GatedAttention": REST},
    "sparse_activation": {"memory_attention": "attention", "SparseActivation": REST},
}


@cache
def _named(code: CodeType) -> str | None:
    """The part that a function belongs to, if its file or its name says so."""
    path, name = Path(code.co_filename), code.co_qualname.split(".")[0]
    if path.parent == _MECHANISMS:
        return _FILES.get(path.stem) or _FUNCTIONS.get(path.stem, {}).get(name)
    if "feedforward" in code.co_qualname.lower().replace("_", ""):
        return "feed-forward"
    if name.endswith("Positions"):
        return "positions"
    return "input" if name.endswith("Embedding") and path.parent.parent == _MECHANISMS.parent else None


# ---- longer than was counted -----------------------------------------------------------------------------------------


def _continued(name: str, costs: Costs, lengths: Iterable[int]) -> dict[int, dict[str, Count]]:
    """The costs at all these lengths; beyond the last one counted by the parabola through the last three.

    In a matrix product, and in a tensor, at most two sizes grow with the length (queries and keys), so a count is a
    polynomial of degree two wherever the length is a multiple of the blocks. The fourth last count has to lie on it,
    to the last digit.
    """
    known = sorted(costs)
    missing = [length for length in lengths if length not in costs]
    whole = {length: dict(parts) for length, parts in costs.items()}
    if not missing:
        return whole
    if min(missing) < known[-1] or len(known) < 4:
        raise ValueError(
            f"wanted {name} counted at every length, or at four or more and at none beyond the longest of these; "
            f"it lacks {missing} and has {known}. Count it there too."
        )

    fourth, *last = known[-4:]
    for part in PARTS:
        for book in (0, 1):
            numbers = [costs[length][part][book] for length in last]
            if _parabola(last, numbers, fourth) != costs[fourth][part][book]:
                raise ValueError(
                    f"wanted counts of {name} that lie on a parabola, to carry them on to {missing[-1]:,} tokens; got "
                    f"{Count._fields[book]} of {part} that do not: {costs[fourth][part][book]:,} at {fourth:,} tokens, "
                    f"then {', '.join(f'{number:,}' for number in numbers)}. Count {name} at {missing} too."
                )
    for length in missing:
        whole[length] = {
            part: Count(
                *(round(_parabola(last, [costs[each][part][book] for each in last], length)) for book in (0, 1))
            )
            for part in PARTS
        }
    return whole


def _parabola(xs: Sequence[int], ys: Sequence[int], x: int) -> Fraction:
    """The value at x of the polynomial through the points, by Lagrange's formula, without rounding."""
    total = Fraction(0)
    for i, y in enumerate(ys):
        others = [other for j, other in enumerate(xs) if j != i]
        total += Fraction(y * math.prod(x - other for other in others), math.prod(xs[i] - other for other in others))
    return total


# ---- the panel -------------------------------------------------------------------------------------------------------


class _Book(NamedTuple):
    place: int  # in `Count`
    unit: str
    title: str  # before the length


BOOKS: Mapping[str, _Book] = MappingProxyType(
    {
        "operations": _Book(0, "thousand operations a token", "operations"),
        "bytes": _Book(1, "kilobytes a token", "bytes held"),
    }
)
TOGETHER = "all together"
OURS: dict[str, Any] = {"marker": "o", "color": "black"}
THEIRS: dict[str, Any] = {"marker": "s", "color": "#555555", "mfc": "none"}
COLUMNS = (1.17, 1.43)  # where the numbers stand beside the picture, in widths of it


class Systems(Panel):
    """One system and one length: what a token costs there, part by part, beside the Transformer.

    Args:
        counts: name -> {length: what `count_parts` returned}. A system that was not counted at the longest lengths is
            carried on by the parabola through its last three counts, if the fourth last lies on it as well.
        beside: the one that the others are compared with.
        start: starting values of the controls.

    Raises:
        ValueError: no counts, none for ``beside``, a single length, or counts that cannot be carried on.
    """

    title = "What a token costs, part by part"

    def __init__(self, counts: Mapping[str, Costs], beside: str = "transformer", **start: Any) -> None:
        self.lengths = sorted({length for costs in counts.values() for length in costs})
        if beside not in counts or not all(counts.values()) or len(self.lengths) < 2:
            got = ", ".join(f"{name} at {len(costs)} lengths" for name, costs in counts.items())
            raise ValueError(
                f"wanted counts, name -> {{length: count_parts(stack, tokens)}}, of {beside!r} and of what is to stand "
                f"beside it, at two lengths or more; got {got or 'none'}."
            )
        self.beside = beside
        self.counted = {name: max(costs) for name, costs in counts.items()}
        self.costs = {name: _continued(name, costs, self.lengths) for name, costs in counts.items()}
        low, high = self.lengths[0], self.lengths[-1]
        self.controls = {
            "system": Choice("system", tuple(counts)),
            "length": LogSlider("length L (tokens)", low, high, min(max(4096, low), high), len(self.lengths) - 1),
        }
        super().__init__(**start)

    def a_token(self, name: str, length: int, book: str = "operations") -> dict[str, float]:
        """What each part costs, divided by the length: operations, or bytes with ``book="bytes"``.

        Raises:
            ValueError: a system, a length or a book that is not there.
        """
        if name not in self.costs or length not in self.lengths or book not in BOOKS:
            raise ValueError(
                f"wanted one of {', '.join(self.costs)}, a length of {self.lengths}, and one of {', '.join(BOOKS)}; "
                f"got {name!r}, {length!r} and {book!r}."
            )
        return {part: count[BOOKS[book].place] / length for part, count in self.costs[name][length].items()}

    def together(self, name: str, length: int, book: str = "operations") -> float:
        """The same for all parts together."""
        return sum(self.a_token(name, length, book).values())

    def crossing(self, name: str, book: str = "operations") -> tuple[tuple[int, int] | None, int]:
        """Between which two lengths a system changes sides with ``beside`` for the last time, and its side after that.

        The side is -1 if it costs less, 1 if more, 0 if the same; the lengths are None if it never changes.
        """
        gaps = [self.together(name, length, book) - self.together(self.beside, length, book) for length in self.lengths]
        sides = [(gap > 0) - (gap < 0) for gap in gaps]
        last = max((i for i, side in enumerate(sides) if side != sides[-1]), default=None)
        return (None if last is None else (self.lengths[last], self.lengths[last + 1])), sides[-1]

    # ---- the picture

    def figure(self, *, system: str, length: float) -> Figure:
        """Draw the parts at this length, and what all together cost at every length."""
        here = self._nearest(length)
        names = [system] if system == self.beside else [system, self.beside]
        fig, axes = plt.subplots(2, 2, figsize=(10.8, 6.4))
        for (left, right), book in zip(axes, BOOKS, strict=True):
            self._draw_parts(left, names, here, book)
            self._draw_lengths(right, names, here, book)
        paper = {"frameon": True, "framealpha": 1, "facecolor": PAPER, "edgecolor": PAPER}  # over the lines behind it
        axes[0, 1].legend(fontsize="small", loc="upper left", **paper)
        return fig

    def _draw_parts(self, ax: Axes, names: Sequence[str], here: int, book: str) -> None:
        """A row for each part: on a logarithmic axis, so that a gap is a ratio."""
        costs = {name: self.a_token(name, here, book) for name in names}
        rows = [part for part in PARTS if any(each[part] for each in costs.values())]
        costs = {name: {**each, TOGETHER: sum(each.values())} for name, each in costs.items()}
        heights = {part: len(rows) - i for i, part in enumerate([*rows, TOGETHER])}
        aside: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "ha": "right", "fontsize": "small"}
        for part, y in heights.items():
            bold = "bold" if part == TOGETHER else "normal"
            values = [each[part] / 1e3 for each in costs.values()]
            ax.plot([x for x in values if x], [y for x in values if x], color="0.7", marker="", zorder=1)
            for x, look, size, column in zip(values, (OURS, THEIRS), (9, 14), COLUMNS, strict=False):
                if x:
                    fill = PARTS.get(part, "black") if look is OURS else "none"
                    ax.plot(x, y, **{**look, "mfc": fill, "mec": look["color"], "ms": size}, linestyle="", zorder=2)
                ax.text(column, y, _number(x), va="center", weight=bold, **aside)
        for name, column in zip(names, COLUMNS, strict=False):
            ax.text(column, len(rows) + 0.65, name, va="baseline", **aside)
        ax.set(xlabel=BOOKS[book].unit, xscale="log", ylim=(-0.6, len(rows) + 0.6))
        ax.set_title(f"{BOOKS[book].title} at {here:,} tokens")
        ax.set_yticks(list(heights.values()), list(heights), fontsize="small")
        low, high = ax.get_xlim()
        ax.set_xlim(low / 1.5, high * 1.5)
        _plain_ticks(ax.xaxis, high / low)

    def _draw_lengths(self, ax: Axes, names: Sequence[str], here: int, book: str) -> None:
        for name, look in zip(names, (OURS, THEIRS), strict=False):
            values = [self.together(name, length, book) / 1e3 for length in self.lengths]
            last = self.lengths.index(self.counted[name])
            ax.plot(self.lengths[: last + 1], values[: last + 1], label=name, **look)
            ax.plot(self.lengths[last:], values[last:], linestyle=":", **look)
            ax.plot(here, values[self.lengths.index(here)], linestyle="", **{**look, "ms": 11})
        ax.axvline(here, color="0.4", linestyle=":", marker="")
        ax.set(xscale="log", yscale="log", xlabel="length L (tokens)", ylabel=BOOKS[book].unit)
        ax.set_title("all together, at every length")
        between, _ = self.crossing(names[0], book)
        if between:
            x, y = self._meeting(names[0], between, book)
            ax.plot(x, y / 1e3, marker="X", ms=13, color=CROSS, mec="white", linestyle="", zorder=5, label="they cross")
        low, high = ax.get_ylim()
        ax.set_ylim(low / 2, high * 4)
        ticks = self.lengths[::3]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.xaxis.minorticks_off()
        _plain_ticks(ax.yaxis, 8 * high / low)

    def _meeting(self, name: str, between: tuple[int, int], book: str) -> tuple[float, float]:
        """Where the drawn lines cross, straight ones between two lengths on logarithmic axes: (length, a token)."""
        ours, theirs = ([math.log(self.together(n, at, book)) for at in between] for n in (name, self.beside))
        before, after = ours[0] - theirs[0], ours[1] - theirs[1]
        share = before / (before - after)
        shorter, longer = between
        return shorter * (longer / shorter) ** share, math.exp(theirs[0] + share * (theirs[1] - theirs[0]))

    # ---- the words

    def describe(self, *, system: str, length: float) -> str:
        """Say both sums with their parts, how they compare, and where they change sides."""
        here = self._nearest(length)
        words = f"{system} at {here:,} tokens"
        if here != length:
            words += f", which is nearest to {length:,g} of the lengths that were counted"
        for book, (_, unit, _) in BOOKS.items():
            said = self._said(system, here, book)
            if system != self.beside:
                said += f"; {self.beside} {self._said(self.beside, here, book)}. {self._compared(system, here, book)}"
            words += f". In {unit}{' at the fullest moment' if book == 'bytes' else ''}: {said}"
        for name in dict.fromkeys((system, self.beside)):
            if here > self.counted[name]:
                words += f". {name} was counted up to {self.counted[name]:,} tokens and is carried on from there"
        return words + "."

    def _said(self, name: str, here: int, book: str) -> str:
        costs = self.a_token(name, here, book)
        parts = ", ".join(f"{part} {_number(cost / 1e3)}" for part, cost in costs.items() if cost)
        return f"{_number(sum(costs.values()) / 1e3)} ({parts})"

    def _compared(self, system: str, here: int, book: str) -> str:
        ratio = self.together(system, here, book) / self.together(self.beside, here, book)
        between, side = self.crossing(system, book)
        what = {-1: "less than", 0: "as much as", 1: "more than"}[side]
        where = f"at every length from {self.lengths[0]:,} tokens on"
        if between:
            where = f"from {between[1]:,} tokens on, but not at {between[0]:,}"
        return f"Here {system} costs {fmt(ratio, 3)} times as much; it costs {what} {self.beside} {where}"

    def _nearest(self, length: float) -> int:
        return min(self.lengths, key=lambda each: abs(math.log(each / length)))


def _plain_ticks(axis: Axis, span: float) -> None:
    """Numbers as one writes them on a logarithmic axis, and enough of them on a short one."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if span < 100 else (1,)))
    axis.set_major_formatter(lambda x, _: f"{x:,g}")
    axis.set_minor_locator(NullLocator())


def _number(x: float) -> str:
    return fmt(x, 3) if x else "–"
