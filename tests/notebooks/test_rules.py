"""Every notebook of the course keeps the rules, and every rule refuses a notebook that breaks it."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(NOTEBOOKS / "build.py")
rules = load(Path(__file__).parent / "rules.py")

SOURCES = build.sources(NOTEBOOKS)
BUILT = [pytest.param(s, v, id=f"{s.stem}-{v}") for s in SOURCES for v in build.VARIANTS]


# -------------------------------------------------------------------- the course


@pytest.mark.parametrize("source, variant", BUILT)
def test_notebook_is_fresh(source: Path, variant: str) -> None:
    reason = build.stale(source, variant)
    assert reason is None, f"{build.target(source, variant).relative_to(ROOT)}: {reason}. Mend: make notebooks"


@pytest.mark.parametrize("source, variant", BUILT)
def test_notebook_keeps_the_rules(source: Path, variant: str) -> None:
    path = build.target(source, variant)
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    broken = rules.complaints(nb, path.stem, path.stat().st_size)
    assert not broken, f"{path.relative_to(ROOT)}:\n" + "\n".join(broken)


def test_no_notebook_without_a_source() -> None:
    wanted = {build.target(source, variant) for source in SOURCES for variant in build.VARIANTS}
    orphans = set(NOTEBOOKS.rglob("*.ipynb")) - wanted
    assert not [path for path in orphans if ".ipynb_checkpoints" not in path.parts]


def test_chapters_are_numbered_once() -> None:
    numbers = [source.stem[:2] for source in SOURCES]
    assert len(numbers) == len(set(numbers))


# -------------------------------------------------------------------- the rules themselves

ALT = "Weight against lag: it falls from 0.3 at lag 0 to 0.05 at lag 5, a straight line on a log scale."
PICTURE = f'<img alt="{ALT}" src="data:image/png;base64,AAAA">'
CELLS = 31  # code cells of the good notebook
WORDS = "With alpha = 0.30 the weight at lag 5 is 0.050, and it falls."


def figure_cell() -> nbformat.NotebookNode:
    data = {"image/png": "AAAA", "text/html": PICTURE, "text/plain": ALT}
    return new_code_cell("show(fig, alt)", outputs=[new_output("display_data", data)])


def good(variant: str = "reader") -> nbformat.NotebookNode:
    """A notebook that keeps every rule, as small as that can be."""
    view = {"model_id": "a", "version_major": 2, "version_minor": 0}
    panel = {rules.VIEW: view, "text/plain": WORDS, "text/html": PICTURE}
    cells = [new_markdown_cell("# EMA\n\n*Measured: all cells run in 12 s on 2 CPU cores.*")]
    for start in rules.SPINE:
        words = "In the end you will be able to see it. " * 8
        cells.append(new_markdown_cell(f"## {start}, in one sentence\n\n{words}"))
        if start == "How it grows":
            cells += [figure_cell(), figure_cell(), figure_cell()]
        if start == "The panel":
            cells.append(new_code_cell("panel", outputs=[new_output("execute_result", panel)]))
            cells.append(new_code_cell("print(panel.set(alpha=0.9).say())", outputs=[new_output("stream", text=WORDS)]))
        if start == "Exercises":
            for number in (1, 2, 3):
                cells += exercise_cells(number, variant)
    cells += [new_code_cell(f"{number}") for number in range(20)]
    code = [cell for cell in cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count
    nb = new_notebook(cells=cells)
    model = {"model_name": "VBoxModel", "model_module": "@jupyter-widgets/controls", "model_module_version": "2.0.0"}
    states = {
        "a": {**model, "state": {"children": ["IPY_MODEL_b"]}},
        "b": {**model, "model_name": "HTMLModel", "state": {"value": "words"}},
    }
    nb.metadata = nbformat.from_dict(
        {
            "longseq": {"variant": variant, "seconds": 12, "cores": 2, "cell_seconds": " ".join(["0.4"] * len(code))},
            "widgets": {rules.STATE: {"state": states, "version_major": 2, "version_minor": 0}},
        }
    )
    return nb


def exercise_cells(number: int, variant: str) -> list[nbformat.NotebookNode]:
    header = (
        f"### Exercise {number} · Double\n\nDifficulty: ●●○ · Importance: ●○○ · 10 minutes\n\nWrite it.\n\n"
        "<details><summary>Hint</summary>\n\nTwice.\n\n</details>"
    )
    solved = variant == "solved"
    body = "    return 2 * x" if solved else '    raise NotImplementedError("your turn: double x")'
    verdict = "✓ f: right." if solved else "… f: not solved yet: your turn: double x"
    return [
        new_markdown_cell(header),
        new_code_cell(f"def f(x):\n{body}"),
        new_code_cell("check_f(f)", outputs=[new_output("execute_result", {"text/plain": verdict})]),
    ]


def code(nb: nbformat.NotebookNode, start: str) -> nbformat.NotebookNode:
    """Return the first code cell whose source begins with `start`."""
    return next(cell for cell in nb.cells if cell.cell_type == "code" and cell.source.startswith(start))


def replace(nb: nbformat.NotebookNode, old: str, new: str) -> None:
    for cell in nb.cells:
        cell.source = cell.source.replace(old, new)


def stream(nb: nbformat.NotebookNode, text: str, name: str = "stdout") -> None:
    code(nb, "0").outputs = [new_output("stream", text=text, name=name)]


def models(nb: nbformat.NotebookNode) -> dict:
    return nb.metadata.widgets[rules.STATE].state


def ten_exercises(nb: nbformat.NotebookNode) -> None:
    place = next(i for i, cell in enumerate(nb.cells) if cell.source.startswith("### Exercise 1"))
    extra = [cell for number in range(4, 7) for cell in copy.deepcopy(nb.cells[place : place + 3])]
    nb.cells[place:place] = extra


def mark(nb: nbformat.NotebookNode, count: int, comment: str) -> None:
    for number in range(count):
        cell = code(nb, f"{number}")
        cell.metadata["tags"] = ["nbval-ignore-output"]
        cell.source += comment


def error_output(nb: nbformat.NotebookNode) -> None:
    code(nb, "0").outputs = [new_output("error", ename="ValueError", evalue="no", traceback=[])]


BREAKERS: dict[str, tuple[Callable[[nbformat.NotebookNode], object], str]] = {
    "no execution counts": (lambda nb: [c.update(execution_count=None) for c in rules.code_cells(nb)], "counts"),
    "one count missing": (lambda nb: code(nb, "panel").update(execution_count=None), "counts"),
    "run out of order": (lambda nb: code(nb, "panel").update(execution_count=99), "counts"),
    "an error stored": (error_output, "holds an error: ValueError"),
    "stderr": (lambda nb: stream(nb, "UserWarning", "stderr"), "stderr"),
    "a path": (lambda nb: stream(nb, "saved to /home/someone/x.pt"), "path of this machine"),
    "a bare figure": (lambda nb: stream(nb, "<Figure size 640x480 with 1 Axes>"), "bare matplotlib"),
    "a panel that failed": (lambda nb: stream(nb, "This setting could not be drawn. X"), "could not be drawn"),
    "interact": (lambda nb: code(nb, "0").update(source="interact(f, x=1)"), "interact is used"),
    "Output": (lambda nb: code(nb, "0").update(source="widgets.Output()"), "Output widget"),
    "ipympl": (lambda nb: code(nb, "0").update(source="%matplotlib widget"), "ipympl"),
    "a heading missing": (lambda nb: replace(nb, "## The identity", "## Identity"), "'## The identity…'"),
    "headings out of order": (lambda nb: replace(nb, "## The question", "## How it grows"), "'## The question…'"),
    "no aim": (lambda nb: replace(nb, "able to", "going to"), "able to"),
    "little prose": (lambda nb: replace(nb, "you will be able to see it. " * 1, "able to "), "prose"),
    "few figures": (lambda nb: code(nb, "show").update(outputs=[]), "figures: 2"),
    "no alt text": (
        lambda nb: code(nb, "show").outputs[0].data.update({"text/html": '<img src="data:image/png;base64,AAAA">'}),
        "no alt text",
    ),
    "short alt text": (
        lambda nb: code(nb, "show").outputs[0].data.update({"text/html": PICTURE.replace(ALT, "A figure.")}),
        "is no description",
    ),
    "a png alone": (lambda nb: code(nb, "show").outputs[0].data.pop("text/html"), "without a description"),
    "an svg": (lambda nb: code(nb, "show").outputs[0].data.update({"image/svg+xml": "<svg/>"}), "without a descr"),
    "a markdown image": (lambda nb: replace(nb, "# EMA", "# EMA\n![map](data:,)"), "markdown image"),
    "no times": (lambda nb: nb.metadata.pop("longseq"), "cell times"),
    "a slow cell": (
        lambda nb: nb.metadata.longseq.update(seconds=33, cell_seconds="21.0" + " 0.4" * (CELLS - 1)),
        "took 21 s",
    ),
    "a slow notebook": (
        lambda nb: nb.metadata.longseq.update(seconds=62, cell_seconds="2.0 " * CELLS),
        "the notebook took 62 s",
    ),
    "times that do not add up": (
        lambda nb: nb.metadata.longseq.update(cell_seconds="1.0 " * CELLS),
        f"add up to {CELLS}.0 s",
    ),
    "another time stated": (lambda nb: replace(nb, "in 12 s", "in 5 s"), "does not state"),
    "no time stated": (lambda nb: replace(nb, "*Measured", "Measured"), "does not state"),
    "state not stored": (lambda nb: nb.metadata.pop("widgets"), "not stored"),
    "wrong state version": (lambda nb: nb.metadata.widgets[rules.STATE].update(version_major=1), "version 2.0"),
    "half a model": (lambda nb: models(nb)["b"].pop("model_module"), "lacks ['model_module']"),
    "dangling reference": (lambda nb: models(nb).pop("b"), "refers to b"),
    "dangling view": (lambda nb: code(nb, "panel").outputs[0].data[rules.VIEW].update(model_id="z"), "the model z"),
    "an Output model": (lambda nb: models(nb)["b"].update(model_name="OutputModel"), "Output widget"),
    "a panel not driven": (lambda nb: replace(nb, "panel.set(", "panel.move("), "never driven"),
    "a nameless panel": (lambda nb: code(nb, "panel").update(source="Decay()"), "by its name"),
    "a raw widget": (lambda nb: code(nb, "panel").outputs[0].data.pop("text/html"), "use classroom.Panel"),
    "no panel": (lambda nb: code(nb, "panel").update(outputs=[]), "panels: none"),
    "two exercises": (lambda nb: replace(nb, "### Exercise 3 ·", "### Interlude ·"), "exercises: 2"),
    "six exercises": (ten_exercises, "exercises: 6"),
    "no difficulty": (lambda nb: replace(nb, "Difficulty: ●●○", "Difficulty: ●●●●"), "wanted a line"),
    "no minutes": (lambda nb: replace(nb, "10 minutes", "soon"), "wanted a line"),
    "no hint": (lambda nb: replace(nb, "details>", "div>"), "no hint"),
    "no stub": (lambda nb: replace(nb, "raise NotImplementedError", "return print"), "no stub"),
    "no check": (lambda nb: replace(nb, "check_f(f)", "f(1)"), "no cell that ends in check"),
    "a check that was not shown": (
        lambda nb: code(nb, "check_f").update(outputs=[]),
        "wanted 'not solved yet'",
    ),
    "many marks": (lambda nb: mark(nb, 3, "\n# not compared: a timing of this machine"), f"3 of {CELLS}"),
    "a mark without a reason": (lambda nb: mark(nb, 1, ""), "does not say why"),
    "a marker comment": (lambda nb: code(nb, "0").update(source="# NBVAL_SKIP\n0"), "does not say why"),
}


@pytest.mark.parametrize("variant", list(build.VARIANTS))
def test_good_notebook_is_accepted(variant: str) -> None:
    assert rules.complaints(good(variant), "01_ema", 10_000) == []


@pytest.mark.parametrize("name", BREAKERS)
def test_rule_refuses(name: str) -> None:
    breaks, words = BREAKERS[name]
    nb = good()
    breaks(nb)
    broken = rules.complaints(nb, "01_ema", 10_000)
    assert any(words in text for text in broken), f"{name}: {broken}"


def test_rule_refuses_a_heavy_file() -> None:
    assert any(text.startswith("size") for text in rules.complaints(good(), "01_ema", 1_600_000))


def test_rule_refuses_stubs_in_the_solutions() -> None:
    nb = good()
    nb.metadata.longseq.variant = "solved"
    broken = rules.complaints(nb, "01_ema", 10_000)
    assert sum("not solved in the solutions" in text for text in broken) == 3
    assert sum("wanted '✓'" in text for text in broken) == 3


def test_every_rule_is_broken_once() -> None:
    """A rule without a notebook that breaks it might refuse nothing."""
    kinds = {"execution counts", "outputs", "source", "spine", "prose", "figures", "alt", "times", "widgets"}
    kinds |= {"panels", "exercises", "marks"}
    seen = set()
    for breaks, words in BREAKERS.values():
        nb = good()
        breaks(nb)
        seen |= {text.split(":")[0] for text in rules.complaints(nb, "01_ema", 10_000) if words in text}
    assert kinds <= seen


def test_light_chapters_need_less() -> None:
    nb = good()
    nb.cells = [cell for cell in nb.cells if not cell.source.startswith(("## The identity", "## Exercises"))]
    assert rules.complaints(nb, "01_ema", 10_000)
    assert rules.complaints(nb, "00_why", 10_000) == []
