"""The rules that every built notebook of the course keeps. Each is a function: notebook -> complaints.

`complaints(nb, stem, size)` applies them all. `test_rules.py` applies it to the course, and to a small notebook
that breaks each rule in turn.
"""

import ast
import json
import re
from collections.abc import Iterator

from nbformat import NotebookNode

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"

SPINE = (
    "The question",
    "A slow version",
    "The identity",
    "The fast version",
    "They agree",
    "How it grows",
    "The panel",
    "Exercises",
    "Check against the package",
    "What to remember",
)
LIGHT_SPINE = ("The question", "What to remember")

CELL_SECONDS = 20
NOTEBOOK_SECONDS = 60
WORDS = 500
FIGURES = 3
BYTES = 1_500_000
MARKED_SHARE = 0.05
MARKER = re.compile(r"nbval[-_](ignore[-_]output|skip|raises[-_]exception|check[-_]output)|raises-exception", re.I)
REASON = re.compile(r"^\s*# not compared: \S.{9,}", re.M)
EXERCISE = re.compile(r"^### Exercise \d+ · \S.*$", re.M)
DIFFICULTY = re.compile(r"Difficulty: (●○○|●●○|●●●) · Importance: (●○○|●●○|●●●) · \d+ minutes")
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(home|root|tmp|work|usr|Users|mnt|opt|private|var)/\w|[A-Z]:\\\w")
BASE64 = re.compile(r"base64,[A-Za-z0-9+/=]+")
FORBIDDEN = {
    r"\binteract(ive|ive_output|_manual)?\s*\(": "interact",
    r"\bwidgets\.Output\b|\bimport\s.*\bOutput\b": "the Output widget",
    r"%matplotlib\s+(widget|notebook|ipympl)|\bipympl\b": "ipympl",
}


def is_mechanism(stem: str) -> bool:
    """Notebooks 01 to 08 build a mechanism each, and keep the whole spine."""
    return "01" <= stem[:2] <= "08"


def complaints(nb: NotebookNode, stem: str, size: int) -> list[str]:
    """Return what the notebook breaks, as sentences. `size` is its file's, in bytes."""
    rules = (ran, clean_outputs, spine, prose_and_figures, alt_texts, times, widgets, panels, exercises, marks)
    found = [text for rule in rules for text in rule(nb, stem)]
    if size >= BYTES:
        found.append(f"size: {size / 1e6:.2f} MB; wanted less than {BYTES / 1e6} MB")
    return found


def ran(nb: NotebookNode, stem: str) -> Iterator[str]:
    """Executed top to bottom: counts 1..n, none missing (nbval compares nothing in a cell without one)."""
    counts = [cell.execution_count for cell in code_cells(nb)]
    if not counts or counts != list(range(1, len(counts) + 1)):
        yield f"execution counts: wanted 1 to {len(counts)}, got {counts}"


def clean_outputs(nb: NotebookNode, stem: str) -> Iterator[str]:
    """No errors, no stderr, no paths of the machine that built it, no bare matplotlib objects."""
    for number, output in outputs(nb):
        where = f"outputs: code cell {number}"
        if output.output_type == "error":
            yield f"{where} holds an error: {output.ename}"
        if output.output_type == "stream" and output.name == "stderr":
            yield f"{where} writes to stderr: {output.text[:80]!r}"
        text = BASE64.sub("", texts(output))
        if MACHINE_PATH.search(text):
            yield f"{where} shows a path of this machine: {MACHINE_PATH.search(text).group()!r}"
        if "This setting could not be drawn" in text:
            yield f"{where} holds a panel that could not be drawn"
        if re.search(r"<Figure size|matplotlib\.\w+\.", text):
            yield f"{where} shows a bare matplotlib object; end the line with `;` or call show(fig, alt)"
    for cell in code_cells(nb):
        for pattern, name in FORBIDDEN.items():
            if re.search(pattern, cell.source):
                yield f"source: {name} is used; panels are built on classroom.Panel"


def spine(nb: NotebookNode, stem: str) -> Iterator[str]:
    """The headings that every chapter shares, in order; the first section says what one will be able to do."""
    wanted = SPINE if is_mechanism(stem) else LIGHT_SPINE
    headings = re.findall(r"^## (.+)$", prose(nb), re.M)
    position = 0
    for start in wanted:
        places = [place for place in range(position, len(headings)) if headings[place].startswith(start)]
        if not places:
            yield f"spine: no heading '## {start}…' after '{headings[position - 1] if position else nb_title(nb)}'"
        else:
            position = places[0] + 1
    first = re.search(r"^## The question.*?(?=^## |\Z)", prose(nb), re.M | re.S)
    if first and "able to" not in first.group():
        yield "spine: 'The question' does not say what the reader will be able to do ('able to')"


def prose_and_figures(nb: NotebookNode, stem: str) -> Iterator[str]:
    """Enough words to explain, enough figures to see."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|<[^>]+>|https?://\S+", " ", prose(nb), flags=re.S)
    count = len(re.findall(r"[A-Za-z][\w'’-]*", text))
    if count < WORDS:
        yield f"prose: {count} words; wanted at least {WORDS}"
    figures = sum("image/png" in output.get("data", {}) for _, output in outputs(nb))
    if figures < FIGURES:
        yield f"figures: {figures}; wanted at least {FIGURES}"


def alt_texts(nb: NotebookNode, stem: str) -> Iterator[str]:
    """Every picture has a description of at least 40 characters, also those in markdown."""
    for number, output in outputs(nb):
        data = output.get("data", {})
        pictures = re.findall(r"<img\b[^>]*>", data.get("text/html", ""))
        if ("image/png" in data and not pictures) or any(kind in data for kind in ("image/jpeg", "image/svg+xml")):
            yield f"alt: code cell {number} shows a picture without a description; use show(fig, alt)"
        for picture in pictures:
            alt = re.search(r'\balt="([^"]*)"', picture)
            if alt is None or len(alt.group(1)) < 40:
                yield f"alt: code cell {number}: {alt.group(1) if alt else 'no alt text'!r} is no description"
    for image in re.findall(r"!\[([^\]]*)\]\(", prose(nb)):
        if len(image) < 40:
            yield f"alt: a markdown image is described as {image!r} only"


def times(nb: NotebookNode, stem: str) -> Iterator[str]:
    """No cell above 20 s, no notebook above 60 s, and the time stated at the top is the measured one."""
    facts = nb.metadata.get("longseq", {})
    seconds = [float(each) for each in facts.get("cell_seconds", "").split()]
    if len(seconds) != len(code_cells(nb)):
        yield f"times: {len(seconds)} cell times for {len(code_cells(nb))} code cells; build it again"
        return
    for number, each in enumerate(seconds, start=1):
        if each > CELL_SECONDS:
            yield f"times: code cell {number} took {each:.0f} s; wanted at most {CELL_SECONDS}"
    if facts.seconds > NOTEBOOK_SECONDS or sum(seconds) > NOTEBOOK_SECONDS:
        yield f"times: the notebook took {max(facts.seconds, sum(seconds)):.0f} s; wanted at most {NOTEBOOK_SECONDS}"
    if abs(facts.seconds - sum(seconds)) > 1 + 0.05 * len(seconds):
        yield f"times: {facts.seconds} s are stated, the cells add up to {sum(seconds):.1f} s"
    stated = re.search(r"^\*Measured: all cells run in (\d+) s on \d+ CPU cores\.\*$", nb.cells[0].source, re.M)
    if not stated or int(stated.group(1)) != facts.seconds:
        yield f"times: the first cell does not state the measured {facts.seconds} s"


def widgets(nb: NotebookNode, stem: str) -> Iterator[str]:
    """Widget metadata that a viewer can restore: version 2.0, whole models, no reference into nothing."""
    shown = [output.data[VIEW] for _, output in outputs(nb) if VIEW in output.get("data", {})]
    stored = nb.metadata.get("widgets", {})
    if not stored:
        if shown:
            yield "widgets: panels are shown but their state is not stored"
        return
    state = stored.get(STATE, {})
    if (state.get("version_major"), state.get("version_minor")) != (2, 0):
        yield f"widgets: wanted state of version 2.0 under {STATE}"
    models = state.get("state", {})
    for name, model in models.items():
        keys = {"model_name": str, "model_module": str, "model_module_version": str, "state": dict}
        wrong = [key for key, kind in keys.items() if not isinstance(model.get(key), kind)]
        if wrong:
            yield f"widgets: model {name} lacks {wrong}"
        if model.get("model_name") == "OutputModel":
            yield "widgets: an Output widget is stored; panels do without"
    for view in shown:
        if view.get("model_id") not in models or (view.get("version_major"), view.get("version_minor")) != (2, 0):
            yield f"widgets: a view shows the model {view.get('model_id')}, which is not stored"
    for name in set(re.findall(r'"IPY_MODEL_([^"]+)"', json.dumps(models))) - set(models):
        yield f"widgets: a model refers to {name}, which is not stored"


def panels(nb: NotebookNode, stem: str) -> Iterator[str]:
    """Every panel shown is also driven in a cell of its own, so that its words are compared."""
    driven = set(re.findall(r"\b(\w+)\.set\(", "\n".join(cell.source for cell in code_cells(nb))))
    count = 0
    for number, cell in enumerate(code_cells(nb), start=1):
        views = [output for output in cell.outputs if VIEW in output.get("data", {})]
        if not views:
            continue
        count += 1
        name = shown_name(cell.source)
        if len(views) > 1 or name is None:
            yield f"panels: code cell {number} has to show one panel, by its name (or name.show()) on its last line"
        elif name not in driven:
            yield f"panels: {name} is shown but never driven; add a cell: print({name}.set(...).say())"
        if any(not output.data.get("text/plain") or "text/html" not in output.data for output in views):
            yield f"panels: code cell {number} shows a widget without its words and picture; use classroom.Panel"
    if not count and is_mechanism(stem):
        yield "panels: none; wanted at least one"


def shown_name(source: str) -> str | None:
    """Return the variable that a cell's last line shows: `panel` or `panel.show()`."""
    last = ast.parse(source).body[-1]
    node = last.value if isinstance(last, ast.Expr) else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "show":
        node = node.func.value
    return node.id if isinstance(node, ast.Name) else None


def exercises(nb: NotebookNode, stem: str) -> Iterator[str]:
    """Each exercise: difficulty, minutes, folded hints, a stub (solved in the solutions), a check at a cell's end."""
    solved = nb.metadata.get("longseq", {}).get("variant") == "solved"
    parts = split_exercises(nb)
    if is_mechanism(stem) and not 3 <= len(parts) <= 5:
        yield f"exercises: {len(parts)}; wanted three to five"
    for title, cells in parts:
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        code = [cell for cell in cells if cell.cell_type == "code"]
        if not DIFFICULTY.search(text):
            yield f"exercises: {title}: wanted a line 'Difficulty: ●○○ · Importance: ●●● · 10 minutes'"
        hints = re.findall(r"<details>\s*<summary>.+?</summary>.+?</details>", text, re.S)
        if not hints:
            yield f"exercises: {title}: no hint in <details><summary>Hint</summary> … </details>"
        stubs = [cell for cell in code if 'raise NotImplementedError("your turn: ' in cell.source]
        if bool(stubs) == solved:
            yield f"exercises: {title}: " + ("is not solved in the solutions" if solved else "no stub to fill in")
        checks = [cell for cell in code if re.search(r"^check_\w+\(.*\)\s*$", cell.source, re.M | re.S)]
        words = [texts(output) for cell in checks for output in cell.outputs]
        verdict = "✓" if solved else "not solved yet"
        if not checks:
            yield f"exercises: {title}: no cell that ends in check_…(…)"
        elif not any(verdict in word for word in words):
            yield f"exercises: {title}: the check says {words}; wanted {verdict!r}"


def split_exercises(nb: NotebookNode) -> list[tuple[str, list[NotebookNode]]]:
    """Return (heading, cells) of each exercise; one ends where the next heading of its level or above stands."""
    parts: list[tuple[str, list[NotebookNode]]] = []
    inside = False
    for cell in nb.cells:
        if cell.cell_type == "markdown" and re.search(r"^#{1,3} ", cell.source, re.M):
            heading = EXERCISE.search(cell.source)
            inside = heading is not None
            if heading:
                parts.append((heading.group()[4:], []))
        if inside:
            parts[-1][1].append(cell)
    return parts


def marks(nb: NotebookNode, stem: str) -> Iterator[str]:
    """At most one cell in twenty is not compared, and each of those says why."""
    cells = code_cells(nb)
    marked = [c for c in cells if MARKER.search(" ".join(c.metadata.get("tags", []))) or MARKER.search(c.source)]
    if len(marked) > MARKED_SHARE * len(cells):
        yield f"marks: {len(marked)} of {len(cells)} code cells are not compared; wanted at most 5 %"
    for cell in marked:
        if not REASON.search(cell.source):
            yield "marks: a cell is not compared and does not say why: '# not compared: <reason>'"


# -------------------------------------------------------------------- reading a notebook


def code_cells(nb: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def outputs(nb: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Yield (number of the code cell, output)."""
    for number, cell in enumerate(code_cells(nb), start=1):
        for output in cell.outputs:
            yield number, output


def texts(output: NotebookNode) -> str:
    """Return everything in an output that is text."""
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")])


def prose(nb: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in nb.cells if cell.cell_type == "markdown")


def nb_title(nb: NotebookNode) -> str:
    return nb.cells[0].source.partition("\n")[0] if nb.cells else "(empty)"
