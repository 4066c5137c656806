"""Build the notebooks from their sources, tell which are stale, and run the whole course.

    python notebooks/build.py build              every notebook that is stale, both variants
    python notebooks/build.py build 01 03        only these
    python notebooks/build.py check              exit code 1 and the reason for each stale notebook
    python notebooks/build.py course [--only 01] run the notebooks in order; HTML, times, trained model

A chapter has one source, `source/NN_name.py`: a jupytext percent script with solved exercises. From it
come `NN_name.ipynb`, where each region between `# BEGIN SOLUTION "your turn: ..."` and `# END SOLUTION`
is replaced by `raise NotImplementedError("your turn: ...")`, and `solutions/NN_name.ipynb`, which keeps it.
Both are executed top to bottom in a fresh kernel without a network and stored with their outputs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

FORMAT = 1  # of what this file makes of a source: raise it when that changes, and every notebook is stale
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VARIANTS = {"reader": "", "solved": "solutions"}  # variant -> folder below the notebooks
WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)

BEGIN = re.compile(r'^(?P<indent>\s*)# BEGIN SOLUTION "(?P<message>your turn: [^"]+)"\s*$')
END = re.compile(r"^\s*# END SOLUTION\s*$")


class SourceError(Exception):
    """A chapter's source that does not follow the rules."""


# ------------------------------------------------------------------ source -> notebook without outputs


def sources(folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """Return the chapters' sources in order; `wanted` holds numbers ("01") or beginnings of names."""
    found = sorted((folder / "source").glob("[0-9][0-9]_*.py"))
    for name in wanted or []:
        if not any(path.stem.startswith(name) for path in found):
            raise SourceError(f"no chapter {name!r} in {folder / 'source'}; there are {[p.stem for p in found]}.")
    return [path for path in found if not wanted or any(path.stem.startswith(name) for name in wanted)]


def target(source: Path, variant: str) -> Path:
    """Return where the notebook of `source` belongs."""
    return source.parent.parent / VARIANTS[variant] / f"{source.stem}.ipynb"


def digest(source: Path) -> str:
    """Return a fingerprint of the source and of the format that this file gives it."""
    return hashlib.sha256(f"{FORMAT}\n{source.read_text(encoding='utf-8')}".encode()).hexdigest()[:16]


def solution_regions(code: str, solved: bool, where: str = "") -> str:
    """Keep (`solved`) the solution regions of a cell without their markers, or put stubs in their place."""
    lines: list[str] = []
    opened: str | None = None
    for line in code.splitlines():
        begin = BEGIN.match(line)
        if begin:
            if opened is not None:
                raise SourceError(f"{where}: BEGIN SOLUTION inside a solution: {line.strip()}")
            opened = line
            if not solved:
                lines.append(f'{begin["indent"]}raise NotImplementedError("{begin["message"]}")')
        elif END.match(line):
            if opened is None:
                raise SourceError(f"{where}: END SOLUTION without BEGIN SOLUTION")
            opened = None
        elif "BEGIN SOLUTION" in line or "END SOLUTION" in line:
            raise SourceError(
                f'{where}: a marker reads # BEGIN SOLUTION "your turn: ..." or # END SOLUTION; got: {line.strip()}'
            )
        elif solved or opened is None:
            lines.append(line)
    if opened is not None:
        raise SourceError(f"{where}: no END SOLUTION for {opened.strip()}")
    return "\n".join(lines)


def plan(source: Path, variant: str) -> NotebookNode:
    """Return the notebook that `source` yields for `variant`: no outputs, no measured time yet."""
    solved = variant == "solved"
    draft = jupytext.read(source, fmt="py:percent")
    cells = []
    for cell in draft.cells:
        tags = cell.metadata.get("tags", [])
        if "solution-only" in tags and not solved:
            continue
        text = cell.source
        if cell.cell_type == "code":
            text = solution_regions(text, solved, where=source.name)
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cells.append(make(text, metadata={"tags": tags} if tags else {}))
    if not cells or cells[0].cell_type != "markdown" or not cells[0].source.startswith("# "):
        raise SourceError(f"{source.name}: the first cell has to be markdown and to start with the title, '# ...'")
    for cell, name in zip(cells, _cell_ids(cells), strict=True):
        cell.id = name
    nb = nbformat.v4.new_notebook(cells=cells)
    nb.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
            "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
            "longseq": {"source": f"source/{source.name}", "digest": digest(source), "variant": variant},
        }
    )
    return nb


def _cell_ids(cells: list[NotebookNode]) -> Iterator[str]:
    """Name each cell by its content, so that a change renames that cell only."""
    seen: dict[str, int] = {}
    for cell in cells:
        name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"


def time_line(seconds: int, cores: int) -> str:
    """Return the line under a notebook's title that states the measured time of its run."""
    return f"*Measured: all cells run in {seconds} s on {cores} CPU cores.*"


def state_time(nb: NotebookNode) -> None:
    """Put the measured time that the metadata holds under the title."""
    facts = nb.metadata.longseq
    title, _, rest = nb.cells[0].source.partition("\n")
    line = time_line(facts.seconds, facts.cores)
    nb.cells[0].source = f"{title}\n\n{line}\n{rest}".rstrip("\n")


# ------------------------------------------------------------------ running


def execute(
    nb: NotebookNode, folder: Path, env: dict[str, str], timeout: int, on_cell: Callable[[], Any] = lambda: None
) -> list[float]:
    """Run `nb` in place in a fresh kernel that starts in `folder`; return the seconds of each code cell."""
    started = 0.0
    seconds: list[float] = []

    def start(cell: NotebookNode, cell_index: int) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(cell: NotebookNode, cell_index: int, execute_reply: dict[str, Any]) -> None:
        seconds.append(time.perf_counter() - started)
        on_cell()

    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        store_widget_state=True,
        coalesce_streams=True,
        on_cell_execute=start,
        on_cell_executed=stop,
    )
    client.execute(env=env)
    return seconds


def offline_env() -> dict[str, str]:
    """Return the environment in which notebooks are built: no network, no data beyond the repository's."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LONGSEQ_")}
    return _with_python_path(env, HERE / "offline", ROOT)


def _with_python_path(env: dict[str, str], *folders: Path) -> dict[str, str]:
    parts = [*map(str, folders), env.get("PYTHONPATH", "")]
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, parts))}


def tidy(nb: NotebookNode, stem: str, language: NotebookNode) -> NotebookNode:
    """Take out what differs from run to run for no reason: kernel details and random widget names."""
    nb.metadata.language_info = language
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
    text = json.dumps(nb)
    models = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    for number, model in enumerate(models):
        name = f"{stem}/{nb.metadata.longseq.variant}/{number}"
        text = text.replace(model, hashlib.sha256(name.encode()).hexdigest()[:32])
    return nbformat.from_dict(json.loads(text))


# ------------------------------------------------------------------ build, check


def stale(source: Path, variant: str) -> str | None:
    """Return why the notebook of `source` is stale, or None when it is what the source yields."""
    path = target(source, variant)
    if not path.exists():
        return "was never built"
    nb = nbformat.read(path, as_version=4)
    facts = nb.metadata.get("longseq", {})
    if facts.get("digest") != digest(source):
        return "its source has changed since it was built"
    wanted = plan(source, variant)
    wanted.metadata.longseq = facts
    state_time(wanted)
    if [_identity(cell) for cell in nb.cells] != [_identity(cell) for cell in wanted.cells]:
        return "its cells are not what the source yields: it was edited by hand; edit the source"
    return None


def _identity(cell: NotebookNode) -> tuple[Any, ...]:
    return cell.cell_type, cell.id, cell.source, tuple(cell.metadata.get("tags", []))


def build(source: Path, variant: str, timeout: int = 120) -> Path:
    """Make and run the notebook of `source`, and store it with its outputs."""
    nb = plan(source, variant)
    language = nb.metadata.language_info
    path = target(source, variant)
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = execute(nb, path.parent, offline_env(), timeout)
    facts = nb.metadata.longseq
    facts.seconds = max(1, math.ceil(sum(seconds)))
    facts.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts.cell_seconds = " ".join(f"{each:.1f}" for each in seconds)
    nb = tidy(nb, source.stem, language)
    state_time(nb)
    nbformat.validate(nb)
    path.write_text(nbformat.writes(nb), encoding="utf-8")
    return path


def build_all(folder: Path, wanted: list[str], force: bool) -> int:
    """Build what is stale (all with `force`); return the exit code."""
    failed = False
    for source in sources(folder, wanted):
        for variant in VARIANTS:
            path = target(source, variant)
            name = path.relative_to(folder)
            reason = "forced" if force else stale(source, variant)
            if reason is None:
                print(f"fresh   {name}")
                continue
            print(f"running {name} ({reason})", flush=True)
            try:
                build(source, variant)
            except FAILURES as error:
                failed = True
                print(f"FAILED  {name}\n{error}", file=sys.stderr)
                continue
            facts = nbformat.read(path, as_version=4).metadata.longseq
            slowest = max(map(float, facts.cell_seconds.split()), default=0.0)
            size = path.stat().st_size / 1e6
            print(f"built   {name}: {facts.seconds} s, slowest cell {slowest:.1f} s, {size:.2f} MB")
    return int(failed)


def check_all(folder: Path, wanted: list[str]) -> int:
    """Name each stale notebook with its reason; return the exit code."""
    chapters = sources(folder, wanted)
    reasons = [
        f"stale: {target(source, variant).relative_to(folder)}: {reason}"
        for source in chapters
        for variant in VARIANTS
        if (reason := stale(source, variant))
    ]
    print("\n".join(reasons) or f"{len(chapters)} chapters, both variants: all fresh")
    if reasons:
        print("Mend: make notebooks")
    return int(bool(reasons))


# ------------------------------------------------------------------ the course


def course(folder: Path, wanted: list[str], out: Path, solved: bool) -> int:
    """Run the notebooks as they lie there, in order; leave HTML and what they write in `out`."""
    from tqdm import tqdm

    variant = "solved" if solved else "reader"
    chapters = sources(folder, wanted)
    out.mkdir(parents=True, exist_ok=True)
    env = _with_python_path({**os.environ, "LONGSEQ_OUT": str(out)}, ROOT)
    notebooks = [nbformat.read(target(source, variant), as_version=4) for source in chapters]
    total = sum(cell.cell_type == "code" for nb in notebooks for cell in nb.cells)
    rows, messages = [], []
    with tqdm(total=total, unit="cell", dynamic_ncols=True) as bar:
        for source, nb in zip(chapters, notebooks, strict=True):
            bar.set_description(source.stem)
            start, verdict = time.perf_counter(), "ok"
            try:
                execute(nb, target(source, variant).parent, env, timeout=1800, on_cell=bar.update)
            except FAILURES as error:
                verdict = "FAILED"
                messages.append(f"{source.stem} stopped at this cell:\n{error}")
            page = out / f"{source.stem}.html"
            page.write_text(to_html(nb, source.stem), encoding="utf-8")
            rows.append((source.stem, verdict, time.perf_counter() - start, page.name))
    _print_table(rows)
    models = sorted(out.rglob("*.safetensors"))
    print(f"\nIn {out}:", ", ".join(str(model.relative_to(out)) for model in models) or "no trained model")
    if any(source.stem.startswith("11") for source in chapters) and not models:
        messages.append("notebook 11 ran but left no trained model (*.safetensors) in LONGSEQ_OUT.")
    for message in messages:
        print(f"\n{message}", file=sys.stderr)
    return int(bool(messages))


def _print_table(rows: list[tuple[str, str, float, str]]) -> None:
    width = max((len(row[0]) for row in rows), default=0)
    print(f"\n{'notebook':{width}}  {'':6}  {'time':>7}  page")
    for stem, verdict, seconds, page in rows:
        print(f"{stem:{width}}  {verdict:6}  {seconds:5.1f} s  {page}")
    print(f"{'all':{width}}  {'':6}  {sum(row[2] for row in rows):5.1f} s")


def to_html(nb: NotebookNode, title: str) -> str:
    """Return one HTML page that holds everything and needs no network; a panel appears as its picture and its words."""
    from nbconvert import HTMLExporter

    sys.path.insert(0, str(HERE))  # our neighbour is found however this file was loaded
    from mathml import with_mathml

    nb = nbformat.from_dict(json.loads(json.dumps(nb)))
    nb.metadata.pop("widgets", None)
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(VIEW, None)
    page, _ = HTMLExporter(exclude_anchor_links=True).from_notebook_node(nb, resources={"metadata": {"name": title}})
    page = re.sub(r'<script src="[^"]*/require[^"]*"></script>', "", page)  # for live widgets only
    page = re.sub(r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", "", page, flags=re.S)
    return re.sub(r'<script type="module">.*?</script>', "", page, flags=re.S)  # for Mermaid diagrams only


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=HERE, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="build what is stale")
    make.add_argument("chapters", nargs="*", metavar="NN")
    make.add_argument("--force", action="store_true", help="build fresh ones too")
    look = commands.add_parser("check", help="say what is stale")
    look.add_argument("chapters", nargs="*", metavar="NN")
    run = commands.add_parser("course", help="run the notebooks in order, without a browser")
    run.add_argument("--only", nargs="+", default=[], metavar="NN", help="only these chapters")
    run.add_argument("--out", type=Path, default=ROOT / "course-output", help="where pages and model go")
    run.add_argument("--solutions", action="store_true", help="run the solved notebooks")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    os.environ.setdefault("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment, no other
    try:
        if options.command == "build":
            return build_all(folder, options.chapters, options.force)
        if options.command == "check":
            return check_all(folder, options.chapters)
        return course(folder, options.only, options.out.resolve(), options.solutions)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
