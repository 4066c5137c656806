import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))

from mathml import PIECES, with_mathml  # noqa: E402


def test_formulas_become_mathml_and_the_rest_stays():
    text = "Let $h_t = q\\,h_{t-1}$ be.\n\n$$y = \\sum_s k_s$$\n\nCosts \\$3 and $5, in `$code$`:\n```\n$x$\n```"
    got = with_mathml(text)
    assert got.count("<math") == 2 and 'display="block"' in got
    assert got.startswith("Let <math") and got.endswith("Costs \\$3 and $5, in `$code$`:\n```\n$x$\n```")


def test_nothing_in_a_formula_can_be_read_as_markdown():
    got = with_mathml(r"| a | $|x|_1 * \beta_{i}$ |")
    assert got.count("|") == 3 and "*" not in got and "_" not in got


def test_aligned_lines_become_a_table_of_rows():
    got = with_mathml(r"$$\begin{aligned} a &= b \\ c &= d \end{aligned}$$")
    assert got.count("<mtr>") == 2


@pytest.mark.parametrize("source", sorted((NOTEBOOKS / "source").glob("*.py")), ids=lambda p: p.stem)
def test_every_formula_of_the_course_is_set(source):
    for cell in jupytext.read(source).cells:
        if cell.cell_type == "markdown":
            for match in PIECES.finditer(cell.source):
                if match["keep"] is None:
                    math = with_mathml(match[0])
                    ET.fromstring(math)
                    assert "\\" not in math, f"not understood: {match[0]}"
