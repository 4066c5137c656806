"""The way of a chapter: source -> two notebooks -> strict comparison -> stale, run on the sample chapter."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(__file__).parent / "sample"


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load(ROOT / "notebooks" / "build.py")


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A course of one chapter, built."""
    folder = tmp_path_factory.mktemp("notebooks")
    shutil.copytree(SAMPLE / "source", folder / "source")
    assert build.main(["--folder", str(folder), "build"]) == 0
    return folder


@pytest.fixture
def copy(course: Path, tmp_path: Path) -> Path:
    """The built course, to be spoilt."""
    return Path(shutil.copytree(course, tmp_path / "notebooks"))


def nbval(folder: Path) -> subprocess.CompletedProcess[str]:
    """Compare every output of every notebook in `folder`, strictly."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, "--color=no"]
    command += ["--nbval", "--nbval-current-env", "--rootdir", str(folder), str(folder)]
    command += ["--nbval-sanitize-with", str(ROOT / "notebooks" / "nbval_sanitize.cfg")]
    env = {**build.offline_env(), "CI": ""}  # where CI is set, pytest prints each failure's text twice
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def read(folder: Path, variant: str = "reader") -> nbformat.NotebookNode:
    return nbformat.read(folder / build.VARIANTS[variant] / "01_sample.ipynb", as_version=4)


def test_reader_gets_a_stub_and_solutions_the_code(course: Path) -> None:
    reader, solved = read(course), read(course, "solved")
    stub = next(cell.source for cell in reader.cells if cell.source.startswith("def double"))
    code = next(cell.source for cell in solved.cells if cell.source.startswith("def double"))
    assert '    raise NotImplementedError("your turn: return twice x")' in stub
    assert "return 2 * x" not in stub
    assert "    return 2 * x" in code
    assert "SOLUTION" not in code + stub


def test_both_variants_run_and_say_so(course: Path) -> None:
    words = {v: read(course, v).cells[-1].outputs[0].data["text/plain"] for v in build.VARIANTS}
    assert "not solved yet: your turn: return twice x" in words["reader"]
    assert words["solved"].startswith("✓ double: right.")


def test_time_stands_under_the_title(course: Path) -> None:
    nb = read(course)
    title, _, line = nb.cells[0].source.split("\n")[:3]
    assert title == "# A sample chapter"
    assert line == build.time_line(nb.metadata.longseq.seconds, nb.metadata.longseq.cores)


def test_strict_comparison_passes(course: Path) -> None:
    run = nbval(course)
    assert run.returncode == 0, run.stdout
    assert "12 passed" in run.stdout


def test_strict_comparison_finds_each_changed_output(copy: Path) -> None:
    shutil.rmtree(copy / "solutions")
    nb = read(copy)
    spoilt = {"9.0e-06": "9.1e-06", "0.050": "0.060", "9 at length 3": "8 at length 3", "not solved": "solved"}
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            for holder, key in ((output, "text"), (output.get("data", {}), "text/plain")):
                for old, new in spoilt.items():
                    if key in holder:
                        holder[key] = holder[key].replace(old, new)
    nbformat.write(nb, copy / "01_sample.ipynb")
    run = nbval(copy)
    assert run.returncode == 1
    assert f"{len(spoilt)} failed, 2 passed" in run.stdout and run.stdout.count("Cell outputs differ") == len(spoilt)


def test_rebuild_changes_nothing_but_times(course: Path, copy: Path) -> None:
    source = copy / "source" / "01_sample.py"
    build.build(source, "reader")
    before, after = read(course), read(copy)
    for nb in (before, after):
        for fact in ("seconds", "cell_seconds"):
            nb.metadata.longseq.pop(fact)
        nb.cells[0].source = ""
    assert before == after


def test_fresh_notebooks_are_not_run_again(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--folder", str(course), "build"]) == 0
    assert capsys.readouterr().out.count("fresh") == 2
    assert build.main(["--folder", str(course), "check"]) == 0


def test_changed_source_is_stale(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy / "source" / "01_sample.py"
    source.write_text(source.read_text(encoding="utf-8").replace("Write it.", "Write it down."), encoding="utf-8")
    assert build.main(["--folder", str(copy), "check"]) == 1
    said = capsys.readouterr().out
    assert said.count("its source has changed") == 2
    assert "solutions/01_sample.ipynb" in said


def test_notebook_edited_by_hand_is_stale(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nb = read(copy)
    nb.cells[1].source += "\n# mine"
    nbformat.write(nb, copy / "01_sample.ipynb")
    assert build.main(["--folder", str(copy), "check"]) == 1
    assert "edited by hand" in capsys.readouterr().out


def test_missing_notebook_is_stale(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "solutions" / "01_sample.ipynb").unlink()
    assert build.main(["--folder", str(copy), "check"]) == 1
    assert "never built" in capsys.readouterr().out


def test_failing_cell_stops_the_build_and_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = copy / "source" / "01_sample.py"
    source.write_text(
        source.read_text(encoding="utf-8").replace("use_style()\n", 'use_style()\nraise OSError("no luck")\n'),
        encoding="utf-8",
    )
    old = read(copy)
    assert build.main(["--folder", str(copy), "build"]) == 1
    assert "no luck" in capsys.readouterr().err
    assert read(copy) == old


def test_course_leaves_pages_and_times(course: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert build.main(["--folder", str(course), "course", "--only", "01", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "01_sample" in said.out and " s  01_sample.html" in said.out
    assert "100%" in said.err
    page = (out / "01_sample.html").read_text(encoding="utf-8")
    assert 'alt="Pairs against length' in page
    assert "With alpha = 0.30" in page
    assert re.findall(r'<script[^>]*src="(?!https://[^"]*mathjax)|<link[^>]*href="|<img[^>]*src="(?!data:)', page) == []
    assert re.search(r"<details>\s*<summary>Hint</summary>\s*<p>Twice.</p>\s*</details>", page)


def test_course_names_the_failing_cell(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nb = read(copy)
    nb.cells[2].source = 'raise RuntimeError("torn down")'
    nbformat.write(nb, copy / "01_sample.ipynb")
    assert build.main(["--folder", str(copy), "course", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "torn down" in said.err
    assert "torn down" in (tmp_path / "out" / "01_sample.html").read_text(encoding="utf-8")


def test_unknown_chapter_is_refused(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--folder", str(course), "build", "77"]) == 2
    assert "no chapter '77'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code, words",
    [
        ('# BEGIN SOLUTION "your turn: a"\npass', "no END SOLUTION"),
        ("pass\n# END SOLUTION", "without BEGIN"),
        ('# BEGIN SOLUTION "your turn: a"\n# BEGIN SOLUTION "your turn: b"\n# END SOLUTION', "inside"),
        ('# BEGIN SOLUTION "write it"\npass\n# END SOLUTION', "a marker reads"),
        ("# BEGIN SOLUTION\npass\n# END SOLUTION", "a marker reads"),
    ],
)
def test_broken_markers_are_refused(code: str, words: str) -> None:
    for solved in (True, False):
        with pytest.raises(build.SourceError, match=words):
            build.solution_regions(code, solved, "x.py")


def test_several_regions_and_indentation() -> None:
    code = (
        "class A:\n    def f(self):\n"
        '        # BEGIN SOLUTION "your turn: f"\n        if 1:\n            return 2\n        # END SOLUTION\n\n'
        '    def g(self):\n        # BEGIN SOLUTION "your turn: g"\n        return 3\n        # END SOLUTION'
    )
    stub = build.solution_regions(code, solved=False)
    space: dict = {}
    exec(stub, space)
    for name in "fg":
        with pytest.raises(NotImplementedError, match=f"your turn: {name}"):
            getattr(space["A"](), name)()
    exec(build.solution_regions(code, solved=True), space)
    assert (space["A"]().f(), space["A"]().g()) == (2, 3)


def test_solution_only_cells_and_title(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source = tmp_path / "source" / "05_x.py"
    source.write_text('# %% [markdown]\n# # X\n\n# %% tags=["solution-only"] [markdown]\n# why\n\n# %%\n1\n')
    source.write_text('# %% [markdown]\n# # X\n\n# %% [markdown] tags=["solution-only"]\n# why\n\n# %%\n1\n')
    assert len(build.plan(source, "reader").cells) == 2
    assert len(build.plan(source, "solved").cells) == 3
    source.write_text("# %%\n1\n")
    with pytest.raises(build.SourceError, match="title"):
        build.plan(source, "reader")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=build.offline_env(), capture_output=True, text=True)


@pytest.mark.parametrize(
    "code",
    [
        "import urllib.request as r; r.urlopen('https://example.org', timeout=5)",
        "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)",
        "import socket; socket.socket().connect_ex(('192.0.2.1', 80))",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import socket; socket.create_connection((\"192.0.2.1\", 80))'], check=True)",
    ],
)
def test_no_network_in_a_build(code: str) -> None:
    run = python(code)
    assert run.returncode != 0
    assert "No network here" in run.stderr


def test_loopback_stays_open_in_a_build() -> None:
    code = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); "
        "socket.create_connection(('localhost', s.getsockname()[1])); print('open')"
    )
    assert python(code).stdout == "open\n"


def test_build_sees_no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSEQ_DATA", "somewhere")
    assert "LONGSEQ_DATA" not in build.offline_env()


def test_sanitizer_is_short() -> None:
    text = (ROOT / "notebooks" / "nbval_sanitize.cfg").read_text(encoding="utf-8")
    assert text.count("regex:") == text.count("replace:") == 2
