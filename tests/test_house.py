"""The house itself: its requirements agree, its imports point one way, its commands do what the README says."""

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import longseq_tutorial
from longseq_tutorial import doctor
from tests import run_all

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "longseq_tutorial"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GROUPS = {
    name: {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    for name, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
}
BREAKERS = {"torchvision", "torchaudio", "torchtext"}
# Modules that a requirement of ours brings by its own contract, under another name.
BROUGHT = {"IPython": "ipywidgets", "traitlets": "ipywidgets", "cycler": "matplotlib", "PIL": "matplotlib"}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def pins() -> dict[str, Version]:
    """Name -> version of constraints.txt; each line must be a plain ``name==version``."""
    found: dict[str, Version] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"([a-z0-9][a-z0-9-]*)==([0-9][0-9a-z.]*)", line)
        assert match, f"constraints.txt: {line!r} is not name==version (lower case, no local part, no path)"
        assert match[1] not in found, f"constraints.txt pins {match[1]} twice"
        found[match[1]] = Version(match[2])
    return found


def sources(*folders: str) -> list[Path]:
    """The package's files, those of ``folders`` inside it if any are given."""
    places = [PACKAGE / folder for folder in folders] or [PACKAGE]
    return sorted(path for place in places for path in ([place] if place.is_file() else place.rglob("*.py")))


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Absolute names of all that a file imports: ``longseq_tutorial.models.mega``, ``torch.nn``."""
    tree = ast.parse(path.read_text())
    folder = path.parent.relative_to(ROOT).parts
    names = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            home = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*home, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


# ---- requirements -------------------------------------------------------------------------------------------


def test_each_requirement_has_a_lower_bound_and_a_pin_within_it():
    pinned = pins()
    for group in ("", "train", "test"):
        for name, requirement in GROUPS[group].items():
            assert [s.operator for s in requirement.specifier] == [">="], f"{requirement}: a lower bound, no more"
            assert name in pinned, f"{name} is required but not in constraints.txt"
            assert pinned[name] in requirement.specifier, f"{name}: {pinned[name]} is pinned, {requirement} wanted"


def test_what_is_required_is_what_was_agreed():
    assert {"torch", "numpy", "matplotlib", "jupyterlab", "ipywidgets", "nbval"} <= set(GROUPS[""])
    assert set(GROUPS) == {"", "train", "test", "bench", "site"}
    assert "2.6" in str(GROUPS[""]["torch"].specifier)
    assert pins()["torch"] == Version("2.13.0")


def test_the_pins_are_the_closure_of_the_requirements_no_more_no_less():
    """Walks the installed distributions from our own requirements down."""
    pinned = set(pins())
    todo = [(name, set(r.extras)) for group in ("", "train", "test") for name, r in GROUPS[group].items()]
    seen: set[tuple[str, str]] = set()  # (distribution, one of its extras or "")
    while todo:
        name, extras = todo.pop()
        for extra in (extras | {""}) - {e for n, e in seen if n == name}:
            seen.add((name, extra))
            for r in map(Requirement, metadata.requires(name) or []):
                if r.marker is None or r.marker.evaluate({"extra": extra}):
                    todo.append((canonicalize_name(r.name), set(r.extras)))
    closure = {name for name, _ in seen}
    cuda = {name for name in closure if name.startswith(("nvidia-", "cuda-")) or name in ("triton",)}
    if sys.platform == "linux":
        assert closure - cuda <= pinned, f"not pinned: {sorted(closure - cuda - pinned)}"
    if sys.platform == "linux" and sys.version_info[:2] == (3, 11):  # what the file says it was made with
        assert pinned <= closure, f"pinned, but nothing needs it: {sorted(pinned - closure)}"


def test_nothing_that_breaks_a_cpu_torch_is_asked_for():
    asked = set(pins()).union(*GROUPS.values())
    assert not asked & BREAKERS
    assert not any(name.startswith("nvidia-") for name in asked)


def test_the_python_range_is_one_and_the_same_everywhere():
    wanted = SpecifierSet(PROJECT["requires-python"])
    inside = [f"3.{minor}" for minor in range(8, 17) if f"3.{minor}" in wanted]
    assert inside == ["3.11", "3.12", "3.13"]
    assert (doctor.OLDEST, doctor.NEWEST) == ((3, 11), (3, 13))
    assert "(3, 11) <= v < (3, 14)" in (ROOT / "Makefile").read_text()
    assert "3.11 to 3.13" in (ROOT / "README.md").read_text()


def test_environment_yml_agrees_with_pyproject_and_constraints():
    text = (ROOT / "environment.yml").read_text()
    environment = yaml.safe_load(text)
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"][0] == "conda-forge"
    python, pip, rest = environment["dependencies"]
    assert Version(python.removeprefix("python=")) in SpecifierSet(PROJECT["requires-python"])
    assert pip == "pip"
    cpu, constraints, project = rest["pip"]
    assert cpu == "--extra-index-url https://download.pytorch.org/whl/cpu"
    assert constraints == "-c constraints.txt"
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", project)[1].split(",")
    assert set(extras) == {"train", "test"}  # the required ones come with the project itself
    gpu = f"# - torch=={pins()['torch']}"
    after_cpu = text.partition(cpu)[2].splitlines()[1:4]
    assert any(line.strip() == gpu for line in after_cpu), f"the GPU line {gpu!r} must stand beside the CPU one"


def test_no_package_index_is_named_but_pytorchs_own():
    for path in [ROOT / name for name in ("Makefile", "environment.yml", "pyproject.toml", "README.md", ".ci/run")]:
        for url in re.findall(r"(?:index-url[ =]+|find-links[ =]+|TORCH_INDEX *\??=)(\S+)", path.read_text()):
            if "://" in url:
                assert url.rstrip("`").startswith("https://download.pytorch.org/whl/cpu"), f"{path.name}: {url}"


# ---- imports ------------------------------------------------------------------------------------------------


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def third_party(names: set[str]) -> set[str]:
    """Distributions behind imported names, the standard library and ourselves left out."""
    found = set()
    for top in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - {"longseq_tutorial"}:
        found.add(canonicalize_name(BROUGHT.get(top) or distributions().get(top, [top])[0]))
    return found


def test_every_third_party_import_of_the_package_is_declared():
    declared = set(GROUPS[""]) | set(GROUPS["train"])
    for path in sources():
        unknown = third_party(imports(path)) - declared
        assert not unknown, f"{path.relative_to(ROOT)} imports {sorted(unknown)}, which pyproject.toml does not declare"


def test_mechanisms_models_and_classroom_import_with_the_required_packages_alone():
    for path in sources("mechanisms", "models", "classroom"):
        extra = third_party(imports(path, top_only=True)) - set(GROUPS[""])
        assert not extra, f"{path.relative_to(ROOT)} needs {sorted(extra)} from an extra as soon as it is imported"


@pytest.mark.parametrize(
    ("part", "allowed"),
    [
        ("mechanisms", {"mechanisms"}),
        ("models", {"mechanisms", "models"}),
        ("tasks", {"tasks"}),
        ("_command.py", set()),
        ("data.py", {"_command", "tasks"}),
        ("training", {"mechanisms", "models", "tasks", "training"}),
        ("train.py", {"tasks", "training"}),
        ("results.py", {"_command", "models", "published", "training"}),
        ("published.py", set()),
        ("doctor.py", set()),
        ("__init__.py", set()),
    ],
)
def test_imports_point_one_way(part, allowed):
    for path in sources(part):
        for name in imports(path):
            if name.startswith("longseq_tutorial.") and name != "longseq_tutorial.__version__":
                assert name.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {name}: that is upward"


def test_a_mechanism_can_be_read_alone():
    for path in sources("mechanisms"):
        ours = {n for n in imports(path) if n.startswith("longseq_tutorial.")}
        shared = ("fft", "blocks", "devices", "vector_quantizer")  # the last is the first half of vq_attention
        others = {n for n in ours if not n.startswith(tuple(f"longseq_tutorial.mechanisms.{name}." for name in shared))}
        assert path.name == "__init__.py" or not others, f"{path.name} imports {sorted(others)}"


def test_importing_the_package_is_light():
    code = "import sys, longseq_tutorial; print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- commands -----------------------------------------------------------------------------------------------


def make(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    ours = ("MAKEFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "MFLAGS", "PORT", "PYTHON", "TORCH_INDEX")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | environ
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@needs_make
def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    listed = make("help").stdout
    assert listed == make().stdout
    for target in set(phony) - {"FORCE"}:
        assert re.search(rf"^  make {target} +\S", listed, re.M), f"make help does not list {target}"


@needs_make
def test_make_lab_serves_this_machine_only_and_takes_a_port():
    shown = make("-n", "lab", "PORT=9123").stdout
    assert "--ServerApp.ip=127.0.0.1 --ServerApp.port=9123" in shown
    assert "--ServerApp.port_retries=0" in shown  # a port that was asked for is that port
    assert "token=" not in shown and "password" not in shown  # Jupyter's own random token stays on
    assert "port_retries" not in make("-n", "lab").stdout


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with what setting up reads, and no environment."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fake_python(folder: Path, script: str) -> str:
    """An interpreter that answers as ``script`` says."""
    path = folder / "fake-python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@needs_make
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('case "$1" in --version) echo "Python 3.9.1";; *) exit 1;; esac', "Python 3.9.1 does not fit"),
        ('case "$2" in *ensurepip*) exit 1;; *) exit 0;; esac', "its venv module is missing"),
    ],
)
def test_an_unfit_python_gets_one_clear_line(bare, script, words):
    done = make("lab", f"PYTHON={fake_python(bare, script)}", cwd=bare)
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert done.returncode != 0
    assert len(said) == 1 and words in said[0]
    assert not (bare / ".venv").exists()


@needs_make
def test_no_python_at_all_gets_one_clear_line(bare):
    done = make("lab", "PYTHON=no-such-python", cwd=bare)
    assert done.returncode != 0
    assert "No 'no-such-python' found" in done.stdout


# Stands in for Python, pip and Jupyter: makes `.venv` when asked to, and writes down each call.
RECORDER = """
echo "$@" >> calls
if [ "$2" = venv ]; then mkdir -p .venv/bin && cp "$0" .venv/bin/python; fi
"""


@needs_make
def test_setting_up_installs_the_pins_once_and_again_when_they_change(bare):
    python = fake_python(bare, RECORDER)
    calls = bare / "calls"

    def installs() -> int:
        done = make(".venv/installed", f"PYTHON={python}", cwd=bare)
        assert done.returncode == 0, done.stdout + done.stderr
        count = calls.read_text().count("pip install")
        calls.write_text("")
        return count

    calls.write_text("")
    make(".venv/installed", f"PYTHON={python}", cwd=bare)
    first = calls.read_text()
    assert "-m venv --clear .venv" in first
    assert "-c constraints.txt -e .[train,test]" in first
    calls.write_text("")
    assert installs() == 0
    later = (bare / ".venv" / "installed").stat().st_mtime + 10
    os.utime(bare / "constraints.txt", (later, later))
    assert installs() == 1
    os.utime(bare / "constraints.txt", (later - 100, later - 100))
    assert installs() == 0
    (bare / ".venv" / "installed").write_text("/where/the/folder/was/before\n")
    assert installs() == 1  # moved or copied: its environment points to the old place


@needs_make
def test_torch_comes_first_from_the_index_that_is_asked_for(bare):
    python = fake_python(bare, RECORDER)
    make(".venv/installed", f"PYTHON={python}", "TORCH_INDEX=https://download.pytorch.org/whl/cpu", cwd=bare)
    first, second = [line for line in (bare / "calls").read_text().splitlines() if "pip install" in line]
    assert first.endswith("-c constraints.txt --no-deps --index-url https://download.pytorch.org/whl/cpu torch")
    assert "-e .[train,test]" in second


@pytest.mark.parametrize("beside", [True, False])
def test_ci_points_to_the_data_beside_the_checkout(tmp_path, beside):
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    if beside:
        (tmp_path / "shared" / "data").mkdir(parents=True)
    stand_in = tmp_path / "bin" / "make"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/sh\necho "$PWD|$*|$LONGSEQ_DATA"\n')
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("LONGSEQ_DATA", None)
    run = [str(checkout / ".ci" / "run")]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    data = str(tmp_path / "shared" / "data") if beside else ""
    assert done.stdout.strip() == f"{checkout}|test|{data}"


# ---- the test command ---------------------------------------------------------------------------------------


def test_the_last_line_tells_what_passed_and_what_did_not():
    good = run_all.Outcome("ruff", True, "ok", 1.0)
    bad = run_all.Outcome("tests", False, "FAILED (3 passed, 1 failures)", 65.0)
    assert run_all.summary([good]) == "PASSED in 0 min 1 s -- ruff: ok"
    line = run_all.summary([good, bad])
    assert line.startswith("FAILED in 1 min 6 s") and line.endswith("ruff: ok; tests: FAILED (3 passed, 1 failures)")


def test_a_stage_that_does_not_exist_is_refused(capsys):
    assert run_all.main(["lint"]) == 2
    assert "No stage lint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "ok", "words"),
    [
        ("def test_a(): pass\ndef test_b():\n    import pytest; pytest.skip('x')\n", True, "1 passed, 1 skipped"),
        ("def test_a(): assert 0\ndef test_b(): pass\n", False, "FAILED (1 passed, 1 failures)"),
        ("", False, "FAILED (0 passed)"),  # nothing collected is no success
    ],
)
def test_a_stage_counts_and_judges(tmp_path, monkeypatch, body, ok, words):
    (tmp_path / "test_it.py").write_text(body)
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setitem(run_all.STAGES, "tests", ["pytest", "-q", "-p", "no:cacheprovider", "test_it.py"])
    outcome = run_all.run_stage("tests", tmp_path)
    assert (outcome.ok, outcome.words) == (ok, words)


def test_notebooks_run_without_network_and_without_the_readers_data(monkeypatch):
    monkeypatch.setenv("LONGSEQ_DATA", "/somewhere")
    environment = run_all.offline()
    assert "LONGSEQ_DATA" not in environment
    code = "import socket; socket.create_connection(('192.0.2.1', 80), 1)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "No network here" in done.stderr


def test_the_notebooks_are_compared_strictly_in_both_variants():
    stage = run_all.STAGES["notebooks"]
    assert "--nbval" in stage and "--nbval-lax" not in stage
    assert "notebooks" in stage  # solutions/ lies inside
    assert (ROOT / "notebooks" / "solutions").is_dir()
    assert (ROOT / stage[stage.index("--nbval-sanitize-with") + 1]).is_file()


# ---- papers -------------------------------------------------------------------------------------------------


def test_the_version_is_one_and_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == longseq_tutorial.__version__
    assert citation["authors"] == [{"name": "The longseq_tutorial authors"}]
    assert metadata.version(PROJECT["name"]) == longseq_tutorial.__version__


def test_the_licences_are_in_place():
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")
    assert "Attribution 4.0 International" in (ROOT / "LICENSE-TEXT").read_text()
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_what_a_page_points_to_exists(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / target).exists(), f"{page} links to {target}, which does not exist"
    targets = set(re.findall(r"\bmake ([a-z]+)\b(?=[`\s]*(?:$|#|`|[A-Z]+=))", text, re.M))
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), f"{page} names make {target}"


def test_the_readmes_table_tells_which_chapters_are_here():
    rows = re.findall(r"^\| (\d\d) \|.*\| (ready|in preparation) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [number for number, _ in rows] == [f"{n:02d}" for n in range(13)]
    here = {path.name[:2] for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert {number for number, status in rows if status == "ready"} == here


def test_the_readme_states_what_the_record_says():
    record = json.loads((ROOT / "results" / "speech-mega-laptop-seed0.json").read_text())
    seconds, accuracy = record["seconds"], record["test"]["accuracy"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"took {seconds:.0f} s and heard {100 * accuracy:.1f} % of the official test split right (seed 0" in readme
    assert seconds < 900 and accuracy >= 0.95 and record["seed"] == 0
