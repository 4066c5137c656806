"""Formulas for pages that have to read well without a network: TeX in markdown becomes MathML, which browsers set.

JupyterLab brings its own MathJax; a plain HTML page would have to fetch it from the web.
"""

from __future__ import annotations

import re

from latex2mathml.converter import convert

# What is left alone, then what is a formula: fenced code, code spans, escaped dollars, $$...$$, $...$.
PIECES = re.compile(
    r"(?P<keep>```.*?```|`[^`\n]*`|\\\$)"
    r"|\$\$(?P<block>.+?)\$\$"
    r"|(?<![\w$])\$(?P<inline>[^\s$](?:[^$`\n]|\n(?!\n))*?)\$(?![\d$])",
    re.DOTALL,
)
# latex2mathml knows `split`, not `aligned`; the two set the same.
RENAMED = (("{aligned}", "{split}"), (r"\operatorname", r"\mathrm"), (r"\lvert", "|"), (r"\rvert", "|"))
# Characters that markdown would read as its own marks, inside a table or a line.
MARKS = (("|", "&#x7C;"), ("*", "&#x2A;"), ("_", "&#x5F;"), ("~", "&#x7E;"), ("`", "&#x60;"))


def with_mathml(markdown: str) -> str:
    """Return the text with each formula as a `<math>` element, and everything else as it was."""
    return PIECES.sub(_replace, markdown)


def _replace(match: re.Match[str]) -> str:
    if match["keep"] is not None:
        return match[0]
    block = match["block"] is not None
    tex = " ".join((match["block"] if block else match["inline"]).split())
    for known, other in RENAMED:
        tex = tex.replace(known, other)
    math = convert(tex, display="block" if block else "inline")
    math = re.sub(r"&(?!#?\w+;)", "&amp;", math)
    for mark, code in MARKS:
        math = math.replace(mark, code)
    return math
