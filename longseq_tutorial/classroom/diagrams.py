"""Block diagrams of models, all in one visual language: colour and shape say what kind of part a box is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from longseq_tutorial.classroom.figures import OKABE_ITO

__all__ = ["KINDS", "draw_diagram", "legend_of_kinds", "system_diagrams"]

Node = tuple[float, float, str, str]  # x, y (both in boxes), label, kind
Edge = tuple[str, str]

# kind -> (colour, what it is called in the legend)
KINDS: Mapping[str, tuple[str, str]] = {
    "memory": (OKABE_ITO["sky"], "memory: hears everything"),
    "attention": (OKABE_ITO["orange"], "attention"),
    "gate": (OKABE_ITO["green"], "gate or switch"),
    "position": (OKABE_ITO["purple"], "positions"),
    "plain": ("#DDDDDD", "norm, projection, sum"),
    "end": ("white", "input, output"),
}
ACROSS = 1.45  # neighbours in a row are farther apart than rows: room for words, and for arrows
WIDTH, HEIGHT = 1.08, 0.56  # of a box


def draw_diagram(ax: Axes, nodes: Mapping[str, Node], edges: Sequence[Edge], title: str) -> None:
    """Draw boxes and arrows into ``ax``.

    Args:
        nodes: name -> (x, y, label, kind). One unit is the distance of two neighbouring boxes; y grows upwards.
        edges: pairs of names, from -> to. An arrow bends where another box would lie in its way.
        title: above the diagram.

    Raises:
        ValueError: for a kind that is not one of ``KINDS``, or an edge to a box that is not there.
    """
    nodes = {name: (ACROSS * x, y, label, kind) for name, (x, y, label, kind) in nodes.items()}
    for x, y, label, kind in nodes.values():
        if kind not in KINDS:
            raise ValueError(f"the kind of a box must be one of {', '.join(KINDS)}; got {kind!r} for {label!r}.")
        ax.add_patch(
            FancyBboxPatch(
                (x - WIDTH / 2, y - HEIGHT / 2),
                WIDTH,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=KINDS[kind][0],
                edgecolor="#444444",
                linewidth=1.0,
                zorder=2,
            )
        )
        ax.text(x, y, label, ha="center", va="center", fontsize=7, zorder=3, linespacing=1.0)
    for start, end in edges:
        missing = [name for name in (start, end) if name not in nodes]
        if missing:
            raise ValueError(f"an arrow names {', '.join(missing)}; the boxes are {', '.join(nodes)}.")
        _arrow(ax, nodes, start, end)
    xs, ys = [n[0] for n in nodes.values()], [n[1] for n in nodes.values()]
    ax.set(xlim=(min(xs) - 0.7, max(xs) + 0.7), ylim=(min(ys) - 0.6, max(ys) + 0.6), title=title)
    ax.set_aspect("equal")
    ax.axis("off")


def _arrow(ax: Axes, nodes: Mapping[str, Node], start: str, end: str) -> None:
    (x0, y0, *_), (x1, y1, *_) = nodes[start], nodes[end]
    vertical = abs(y1 - y0) > HEIGHT
    if vertical:
        up = 1 if y1 > y0 else -1
        a, b = (x0, y0 + up * HEIGHT / 2), (x1, y1 - up * HEIGHT / 2)
    else:
        right = 1 if x1 > x0 else -1
        a, b = (x0 + right * WIDTH / 2, y0), (x1 - right * WIDTH / 2, y1)
    in_the_way = [
        name for name, (x, y, *_) in nodes.items() if name not in (start, end) and _between((x0, y0), (x1, y1), (x, y))
    ]
    bend = 0.0
    if in_the_way:  # round it: an upward arrow to the left of what is in its way bends left
        bend = 0.35 if vertical else -0.6
    ax.add_patch(
        FancyArrowPatch(
            a,
            b,
            arrowstyle="-|>",
            mutation_scale=9,
            color="#444444",
            linewidth=1.0,
            connectionstyle=f"arc3,rad={bend}",
            zorder=1,
        )
    )


def _between(a: tuple[float, float], b: tuple[float, float], p: tuple[float, float]) -> bool:
    """Whether p lies close to the straight line from a to b."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = dx * dx + dy * dy
    t = ((p[0] - a[0]) * dx + (p[1] - a[1]) * dy) / length if length else 0.0
    near = abs(a[0] + t * dx - p[0]) < WIDTH / 2 and abs(a[1] + t * dy - p[1]) < HEIGHT / 2
    return 0.05 < t < 0.95 and near


def legend_of_kinds() -> list[Patch]:
    """Handles for a legend that tells what the colours mean."""
    return [Patch(facecolor=colour, edgecolor="#444444", label=name) for colour, name in KINDS.values()]


def system_diagrams() -> dict[str, tuple[dict[str, Node], list[Edge]]]:
    """The systems of the course, one layer each: title -> (boxes, arrows) for :func:`draw_diagram`."""
    mega: dict[str, Node] = {
        "x": (0, 0, "x", "end"),
        "norm": (0, 1, "norm", "plain"),
        "ema": (1, 1, "EMA", "memory"),
        "s": (2, 1, "SiLU", "plain"),
        "values": (0, 2.2, "values", "plain"),
        "qk": (1, 2.2, "queries,\nkeys", "plain"),
        "bias": (2, 3.4, "bias", "position"),
        "attention": (1, 3.4, "attention\n(chunks)", "attention"),
        "reset": (2, 2.2, "reset\ngate", "gate"),
        "update": (3, 2.2, "update\ngate", "gate"),
        "line": (3, 3.4, "linear", "plain"),
        "h": (1, 4.6, "candidate", "plain"),
        "mix": (2, 4.6, "mix\nwith x", "gate"),
        "ff": (3, 4.6, "feed-\nforward", "plain"),
        "y": (3, 5.6, "y", "end"),
    }
    mega_edges: list[Edge] = [
        ("x", "norm"),
        ("norm", "ema"),
        ("ema", "s"),
        ("norm", "values"),
        ("s", "qk"),
        ("s", "reset"),
        ("s", "update"),
        ("s", "line"),
        ("values", "attention"),
        ("qk", "attention"),
        ("bias", "attention"),
        ("attention", "h"),
        ("reset", "h"),
        ("line", "h"),
        ("h", "mix"),
        ("update", "mix"),
        ("mix", "ff"),
        ("ff", "y"),
    ]
    longvq: dict[str, Node] = mega | {
        "ema": (1, 1, "EMA or\nS4D", "memory"),
        "codes": (0, 3.4, "nearest\ncodes", "memory"),
        "bias": (2, 3.4, "bias,\nwindow", "position"),
        "attention": (1, 3.4, "attention\n(codes)", "attention"),
    }
    by_code = [("values", "codes"), ("qk", "codes"), ("codes", "attention")]
    longvq_edges = [edge for edge in mega_edges if edge != ("values", "attention")] + by_code
    return {
        "Mega and Mega-chunk": (mega, mega_edges),
        "SeqBoat": (
            {
                "x": (0, 0, "x", "end"),
                "norm": (0, 1, "norm", "plain"),
                "ema": (1, 1, "EMA", "memory"),
                "s": (2, 1, "SiLU", "plain"),
                "switch": (3, 2.2, "switch", "gate"),
                "pack": (2, 2.2, "pack the\nawake", "gate"),
                "line": (1, 2.2, "linear", "plain"),
                "bias": (3, 3.4, "bias", "position"),
                "attention": (2, 3.4, "attention\n(window)", "attention"),
                "unpack": (2, 4.6, "unpack,\ntimes c", "gate"),
                "sum": (1, 4.6, "sum, + x,\nSiLU", "plain"),
                "y": (1, 5.6, "y", "end"),
            },
            [
                ("x", "norm"),
                ("norm", "ema"),
                ("ema", "s"),
                ("s", "switch"),
                ("s", "pack"),
                ("s", "line"),
                ("switch", "pack"),
                ("pack", "attention"),
                ("bias", "attention"),
                ("attention", "unpack"),
                ("unpack", "sum"),
                ("line", "sum"),
                ("sum", "y"),
            ],
        ),
        "LongVQ (our reconstruction)": (longvq, longvq_edges),
        "FastRPB with SIKF": (
            {
                "x": (0, 0, "x", "end"),
                "norm": (0, 1, "norm", "plain"),
                "values": (0, 2.2, "values", "plain"),
                "qk": (1, 2.2, "queries,\nkeys", "plain"),
                "phi": (2, 2.2, "exp\n(SIKF)", "plain"),
                "toeplitz": (0, 3.4, "Toeplitz\nby FFT", "position"),
                "attention": (2, 3.4, "linear\nattention", "attention"),
                "sum": (2, 4.6, "sum,\n+ x", "plain"),
                "ff": (3, 4.6, "feed-\nforward", "plain"),
                "y": (3, 5.6, "y", "end"),
            },
            [
                ("x", "norm"),
                ("norm", "values"),
                ("norm", "qk"),
                ("qk", "phi"),
                ("phi", "attention"),
                ("values", "attention"),
                ("values", "toeplitz"),
                ("toeplitz", "sum"),
                ("attention", "sum"),
                ("sum", "ff"),
                ("ff", "y"),
            ],
        ),
        "SPADE, first layer": (
            {
                "x": (0, 0, "x", "end"),
                "norm": (0, 1, "norm", "plain"),
                "s4": (0, 2.2, "S4", "memory"),
                "qkv": (1, 2.2, "queries,\nkeys, val.", "plain"),
                "bias": (2, 3.4, "bucketed\nbias", "position"),
                "attention": (1, 3.4, "attention\n(window)", "attention"),
                "n1": (0, 4.6, "norm", "plain"),
                "n2": (1, 4.6, "norm", "plain"),
                "join": (2, 4.6, "join,\n+ x", "plain"),
                "ff": (3, 4.6, "feed-\nforward", "plain"),
                "y": (3, 5.6, "y", "end"),
            },
            [
                ("x", "norm"),
                ("norm", "s4"),
                ("norm", "qkv"),
                ("qkv", "attention"),
                ("bias", "attention"),
                ("s4", "n1"),
                ("attention", "n2"),
                ("n1", "join"),
                ("n2", "join"),
                ("join", "ff"),
                ("ff", "y"),
            ],
        ),
    }
