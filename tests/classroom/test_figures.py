"""show() lets no figure pass without words; the words, not the pixels, are what is compared."""

import base64
import io
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.core import display_functions
from PIL import Image

from longseq_tutorial.classroom import figures
from longseq_tutorial.classroom.figures import OKABE_ITO, below, fmt, image_html, png_bytes, show, use_style

ALT = 'Weight against lag: from 0.3 at lag 0 it falls below 0.01 after "ten" steps & stays there.'


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What was displayed."""
    bundles: list[dict[str, str]] = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: bundles.append(bundle))
    return bundles


@pytest.fixture
def fig():
    use_style()
    figure, ax = plt.subplots()
    ax.plot([0, 1, 4])
    yield figure
    plt.close("all")


def test_show_gives_one_bundle_with_words_and_picture(shown, fig) -> None:
    show(fig, ALT)
    (bundle,) = shown
    assert set(bundle) == {"text/html", "image/png", "text/plain"}
    assert bundle["text/plain"] == ALT
    alt = re.search(r'<img alt="([^"]*)"', bundle["text/html"])
    assert alt and "&quot;ten&quot; steps &amp; stays" in alt.group(1)
    assert bundle["image/png"] in bundle["text/html"]
    assert Image.open(io.BytesIO(base64.b64decode(bundle["image/png"]))).format == "PNG"


def test_show_closes_the_figure(shown, fig) -> None:
    show(fig, ALT)
    assert not plt.fignum_exists(fig.number)


@pytest.mark.parametrize("alt", ["", "   ", "A figure.", "figure" + " " * 60, None, 3])
def test_show_refuses_a_missing_description(shown, fig, alt) -> None:
    with pytest.raises(ValueError, match=r"wants a description .* got .*Say what"):
        show(fig, alt)
    assert shown == []


def test_show_refuses_what_is_no_figure(shown, fig) -> None:
    with pytest.raises(TypeError, match=r"wants a matplotlib Figure first; got Axes"):
        show(fig.axes[0], ALT)


def test_show_publishes_through_ipython(fig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle that a frontend gets is ours, untouched by formatters."""
    sent: list[dict] = []
    monkeypatch.setattr(display_functions, "publish_display_data", lambda data, metadata=None, **kw: sent.append(data))
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.instance()
    try:
        show(fig, ALT)
    finally:
        InteractiveShell.clear_instance()
    assert sent[0]["text/plain"] == ALT


def test_line_breaks_in_the_description_do_not_matter(shown, fig) -> None:
    show(fig, ALT.replace(" ", "\n   "))
    assert shown[0]["text/plain"] == ALT


def test_png_is_light_and_opaque(fig) -> None:
    plain = io.BytesIO()
    fig.savefig(plain, format="png", dpi=figures.PIXELS_PER_INCH)
    png = png_bytes(fig)
    assert len(png) < 0.7 * len(plain.getvalue())
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P" and "transparency" not in image.info


def test_transparent_figure_becomes_opaque(fig) -> None:
    fig.patch.set_alpha(0.0)
    corner = Image.open(io.BytesIO(png_bytes(fig))).convert("RGB").getpixel((0, 0))
    assert min(corner) > 240


def test_colour_maps_survive_the_palette() -> None:
    use_style()
    fig, ax = plt.subplots()
    ax.imshow(np.linspace(0, 1, 256).reshape(16, 16))
    plain = io.BytesIO()
    fig.savefig(plain, format="png", dpi=figures.PIXELS_PER_INCH)
    light = np.asarray(Image.open(io.BytesIO(png_bytes(fig))).convert("RGB"), dtype=int)
    exact = np.asarray(Image.open(plain).convert("RGB"), dtype=int)
    assert np.abs(light - exact).mean() < 2
    assert np.percentile(np.abs(light - exact), 99) < 16
    plt.close(fig)


def test_style_pairs_each_colour_with_its_own_marker() -> None:
    use_style()
    cycle = list(plt.rcParams["axes.prop_cycle"])
    assert [entry["color"] for entry in cycle] == list(OKABE_ITO.values())
    assert len({entry["marker"] for entry in cycle}) == len(cycle) == 8
    assert plt.rcParams["image.cmap"] == "cividis"


def test_markers_of_dense_lines_are_spaced() -> None:
    use_style()
    fig, ax = plt.subplots()
    (dense,), (sparse,) = ax.plot(range(500)), ax.plot(range(5))
    (own,) = ax.plot(range(400), markevery=100)
    (cloud,) = ax.plot(range(400), "o")
    png_bytes(fig)
    assert (dense.get_markevery(), sparse.get_markevery(), own.get_markevery()) == (0.1, None, 100)
    assert cloud.get_markevery() is None
    plt.close(fig)


def test_image_html_escapes() -> None:
    assert image_html(b"x", '<b> "q"').startswith('<img alt="&lt;b&gt; &quot;q&quot;"')


@pytest.mark.parametrize(
    "value, digits, text",
    [
        (0.012345, 2, "0.012"),
        (123456, 2, "120,000"),
        (1.5e-7, 2, "1.5e-07"),
        (0, 2, "0"),
        (3.14159, 3, "3.14"),
        (999.9, 2, "1,000"),
        (0.9999, 2, "1.0"),
        (-2.55, 1, "-3"),
        (7, 1, "7"),
        (2.5e12, 2, "2.5e+12"),
        (float("inf"), 2, "inf"),
        (float("nan"), 2, "nan"),
    ],
)
def test_fmt(value: float, digits: int, text: str) -> None:
    assert fmt(value, digits) == text


def test_below_states_a_fact() -> None:
    assert below(3e-16, 1e-12) == "below 1e-12"
    assert below(-3e-16, 1e-12) == "below 1e-12"
    assert below(2e-3, 1e-12).startswith("NOT below 1e-12: it is 0.002")
    assert below(float("nan"), 1e-12).startswith("NOT below")
