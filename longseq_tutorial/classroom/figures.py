"""Figures of the course: one style, and no figure without a description in words.

`use_style()` sets the style once at the top of a notebook; `show(fig, alt)` puts a figure into the
output together with its description. The description is what a reader who cannot see the picture
gets, and what the notebook tests compare: pictures differ from machine to machine, facts do not.
So put the figure's key numbers into it, rounded with `fmt` or stated as a bound with `below`.
"""

from __future__ import annotations

import base64
import html
import io
import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

__all__ = ["OKABE_ITO", "below", "fmt", "image_html", "png_bytes", "show", "use_style"]

# Okabe & Ito, "Color Universal Design" (2008): told apart with every common colour vision.
OKABE_ITO: dict[str, str] = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "vermilion": "#D55E00",
    "purple": "#CC79A7",
    "sky": "#56B4E9",
    "black": "#000000",
    "yellow": "#F0E442",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
PAPER = "#FCFCFA"  # opaque and light: black ink stays readable on JupyterLab's dark theme as well

SHORTEST_ALT = 40
DENSE = 30  # points in a line
PIXELS_PER_INCH = 120  # drawn; shown at 96, so a figure stays sharp on a dense screen and light on disk


def use_style() -> None:
    """Set the course's one plot style for every figure made afterwards.

    Okabe–Ito colours, each with its own marker (never colour alone), cividis for images, a light
    grid, and an opaque light background: one picture has to serve JupyterLab's light and dark theme.
    """
    plt.style.use("default")
    mpl.rcParams.update(
        {
            "axes.prop_cycle": cycler(color=list(OKABE_ITO.values())) + cycler(marker=list(MARKERS)),
            "image.cmap": "cividis",
            "figure.figsize": (7.0, 3.8),
            "figure.dpi": PIXELS_PER_INCH,
            "figure.facecolor": PAPER,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.1,  # inches: a margin of paper, for the dark theme
            "figure.constrained_layout.w_pad": 0.1,
            "savefig.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "grid.color": "#D9D9D4",
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.6,
            "lines.markersize": 5.0,
            "font.size": 10.5,
            "legend.frameon": False,
            "image.interpolation": "nearest",
        }
    )


def show(fig: Figure, alt: str) -> None:
    """Show `fig` with its description `alt`, and close it.

    The output holds an `<img>` with the description as its alt text, the bare PNG for viewers that
    drop HTML, and the description as plain text.

    Args:
        fig: a matplotlib figure.
        alt: what the figure shows, in words, with its key numbers: at least 40 characters.

    Raises:
        TypeError: `fig` is not a matplotlib figure.
        ValueError: `alt` is missing or too short.
    """
    from IPython.display import display

    alt = _checked_alt(fig, alt)
    png = png_bytes(fig)
    plt.close(fig)
    bundle = {
        "text/html": image_html(png, alt),
        "image/png": base64.b64encode(png).decode("ascii"),
        "text/plain": alt,
    }
    display(bundle, raw=True)


def image_html(png: bytes, alt: str) -> str:
    """Return an `<img>` that holds `png` itself, with `alt` as its alt text."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img alt="{html.escape(alt)}" style="max-width: 100%" src="data:image/png;base64,{data}">'


def png_bytes(fig: Figure) -> bytes:
    """Return `fig` as a PNG with a palette of at most 256 colours: half the plain file's size."""
    from PIL import Image  # matplotlib itself requires Pillow

    plain = io.BytesIO()
    _thin_markers(fig)
    opaque = PAPER if to_rgba(fig.get_facecolor())[3] < 1 else fig.get_facecolor()
    fig.savefig(plain, format="png", dpi=PIXELS_PER_INCH, facecolor=opaque)
    picture = Image.open(plain).convert("RGB")
    light = io.BytesIO()
    resolution = (PIXELS_PER_INCH, PIXELS_PER_INCH)
    picture.quantize(256, dither=Image.Dither.NONE).save(light, format="png", dpi=resolution)
    return light.getvalue()


def _thin_markers(fig: Figure) -> None:
    """Space the markers of dense lines evenly, unless the author has: one for each point hides the line."""
    for ax in fig.axes:
        for line in ax.get_lines():
            if line.get_linestyle() == "None":
                continue  # a cloud of points: each of them counts
            if np.size(line.get_xdata()) > DENSE and line.get_markevery() is None:
                line.set_markevery(0.1)  # of the axes' diagonal


def fmt(value: float, digits: int = 2) -> str:
    """Return `value` rounded to `digits` significant digits, as one writes it in a sentence.

    `fmt(0.012345)` is "0.012", `fmt(123456)` "120,000", `fmt(1.5e-7)` "1.5e-07".
    """
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    size = math.floor(math.log10(abs(rounded)))
    if size < -4 or size > 8:
        return f"{rounded:.{digits - 1}e}"
    return f"{rounded:,.{max(0, digits - 1 - size)}f}"


def below(value: float, bound: float) -> str:
    """State an error as a fact that holds on every machine: "below 1e-10", or that it is not.

    The last digits of a rounding error differ from processor to processor, the bound does not.
    """
    value = float(value)
    if abs(value) < bound:
        return f"below {bound:g}"
    return f"NOT below {bound:g}: it is {value:.3g}"


def _checked_alt(fig: Figure, alt: str) -> str:
    if not isinstance(fig, Figure):
        raise TypeError(
            f"show wants a matplotlib Figure first; got {type(fig).__name__}. Pass `fig` of `fig, ax = plt.subplots()`."
        )
    if not isinstance(alt, str) or len(" ".join(alt.split())) < SHORTEST_ALT:
        got = repr(alt) if isinstance(alt, str) else type(alt).__name__
        raise ValueError(
            f"show wants a description (alt) of at least {SHORTEST_ALT} characters; got {got}. "
            "Say what the axes are, what one sees, and the key numbers, rounded with fmt(...)."
        )
    return " ".join(alt.split())
