"""Say what is wrong with this environment, and the exact mend: ``python -m longseq_tutorial.doctor``.

Facts are gathered first, whatever may crash in a process of its own; each check is then a pure function from
:class:`Facts` to a list of :class:`Finding`. Only the standard library is imported, and no syntax newer than
Python 3.8 is run, so that the doctor still speaks where the patient cannot.

Exit code 0: the course runs (there may be warnings). 1: something must be mended first.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OLDEST, NEWEST = (3, 11), (3, 13)
NOT_OURS = ("torchvision", "torchaudio", "torchtext")
NAMES = re.compile(r"([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. An ``error`` keeps the course from running, a ``warning`` does not."""

    level: str
    what: str
    mend: str


@dataclass(frozen=True)
class Facts:
    """All that the checks look at. The defaults describe a machine with nothing to complain of."""

    python: tuple[int, ...] = (3, 11, 0)
    executable: str = "python"
    needed: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name -> (lowest version, extra or "")
    installed: Mapping[str, str] = field(default_factory=dict)  # name -> version
    broken: Mapping[str, str] = field(default_factory=dict)  # module that does not import -> last line of its error
    imported_from: str | None = str(ROOT)  # where `import longseq_tutorial` leads from another folder
    cuda_build: str | None = None  # the CUDA that torch was built for
    cuda_usable: bool = False
    gpu: str | None = None  # an NVIDIA GPU, as its driver names it
    threads: int | None = None  # what torch will use
    cores: int = 1  # what this process may use
    kernel: str | None = "python"  # the interpreter behind Jupyter's kernel "python3"
    widgets_frontend: bool = True
    unwritable: tuple[str, ...] = ()
    memory: int | None = None  # bytes free; None where the system does not tell
    disk: int | None = None
    environ: Mapping[str, str] = field(default_factory=dict)


# ---- the checks: pure --------------------------------------------------------------------------------------


def install(facts: Facts, what: str = '-c constraints.txt -e ".[train,test]"') -> str:
    """The command that installs ``what`` into the interpreter that was examined."""
    return f'cd "{ROOT}" && "{facts.executable}" -m pip install {what}'


def version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.13.0+cpu"`` gives ``(2, 13, 0)``. No trailing zeros."""
    found = re.match(r"\d+(\.\d+)*", text)
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_python(facts: Facts) -> list[Finding]:
    """Python within the range that is tested."""
    if OLDEST <= tuple(facts.python[:2]) <= NEWEST:
        return []
    have, low, high = (".".join(map(str, v)) for v in (facts.python, OLDEST, NEWEST))
    mend = "Install one of these, then in this folder: make clean && make lab PYTHON=python3.12"
    return [Finding("error", f"Python {have} is outside {low} to {high}.", mend)]


def check_packages(facts: Facts) -> list[Finding]:
    """Every requirement installed, and new enough."""
    findings = []
    for extra, level, use in (
        ("", "error", "The course needs"),
        ("train", "error", "Training (notebooks 10 and 11) needs"),
        ("test", "warning", "`make test` and `make notebooks` need"),
    ):
        wrong = []
        for name, (lowest, group) in facts.needed.items():
            have = facts.installed.get(name)
            if group == extra and have is None:
                wrong.append(f"{name} (missing)")
            elif group == extra and have is not None and version(have) < version(lowest):
                wrong.append(f"{name} >= {lowest} (found {have})")
        if wrong:
            findings.append(Finding(level, f"{use} {', '.join(wrong)}.", install(facts)))
    return findings


def check_project(facts: Facts) -> list[Finding]:
    """Notebooks, wherever they run, import this copy of the package."""
    if facts.imported_from is None:
        return [Finding("error", "Notebooks cannot import longseq_tutorial: it is not installed.", install(facts))]
    if Path(facts.imported_from).resolve() != ROOT:
        what = f"Notebooks import another copy of longseq_tutorial, in {facts.imported_from}."
        return [Finding("error", what, install(facts, "--no-deps -e ."))]
    return []


def check_imports(facts: Facts) -> list[Finding]:
    """What is installed also imports. The usual cause of a failure is a mix of builds."""
    findings = []
    for module, error in facts.broken.items():
        if module in NOT_OURS:
            what = f"{module} does not fit this torch ({error}). The course does not need it."
            mend = f'"{facts.executable}" -m pip uninstall -y {module}'
        elif re.search(r"lib(cu|nv|nccl)\w*\.|CUDA", error):
            what = f"{module} was built for CUDA libraries that are not here ({error})."
            mend = install(facts, "--force-reinstall -c constraints.txt torch")
        elif module == "torch" or "numpy" in error.lower():
            what = f"{module} does not import ({error}): its build does not fit its neighbours."
            mend = install(facts, f"--force-reinstall -c constraints.txt {' '.join(sorted({module, 'numpy'}))}")
        else:
            what = f"{module} does not import ({error})."
            mend = install(facts, f"--force-reinstall --no-deps -c constraints.txt {module}")
        findings.append(Finding("error", what, mend))
    return findings


def check_gpu(facts: Facts) -> list[Finding]:
    """A GPU that is there gets used."""
    if facts.gpu is None or facts.cuda_usable or "torch" in facts.broken or "torch" not in facts.installed:
        return []
    if facts.cuda_build is None:
        what = f"{facts.gpu} is here, but torch {facts.installed['torch']} was built without CUDA."
        mend = "Install the CUDA build that https://pytorch.org/get-started/locally names for your driver."
    else:
        what = f"{facts.gpu} is here, but torch, built for CUDA {facts.cuda_build}, cannot use it."
        mend = "Update the NVIDIA driver (nvidia-smi shows its CUDA), or unset CUDA_VISIBLE_DEVICES."
    return [Finding("warning", what, mend)]


def check_kernel(facts: Facts) -> list[Finding]:
    """Jupyter runs notebooks with this interpreter."""
    mend = f'"{facts.executable}" -m ipykernel install --sys-prefix --name python3'
    if "ipykernel" in facts.broken or "jupyterlab" not in facts.installed:
        return []  # said already
    if facts.kernel is None:
        return [Finding("error", "Jupyter has no kernel named python3.", mend)]
    if os.path.abspath(facts.kernel) != os.path.abspath(facts.executable):
        return [Finding("error", f"Notebooks would run with {facts.kernel}, not with {facts.executable}.", mend)]
    return []


def check_widgets(facts: Facts) -> list[Finding]:
    """JupyterLab can draw the panels."""
    if facts.widgets_frontend or "ipywidgets" not in facts.installed:
        return []
    mend = (
        install(facts, "--force-reinstall --no-deps -c constraints.txt jupyterlab_widgets") + "  # then reload the page"
    )
    return [Finding("error", "JupyterLab lacks the widgets' frontend: panels would show as bare text.", mend)]


def check_places(facts: Facts) -> list[Finding]:
    """Folders that must be written to can be, and LONGSEQ_DATA points somewhere."""
    findings = []
    for place in facts.unwritable:
        if Path(place) == ROOT:
            mend = f'sudo chown -R "$USER" "{place}", or clone the course into a folder of your own.'
        else:
            mend = "Let Jupyter keep its files elsewhere: export JUPYTER_DATA_DIR=/tmp/jupyter-data"
        findings.append(Finding("error", f"No right to write in {place}.", mend))
    data = facts.environ.get("LONGSEQ_DATA")
    if data and not Path(data).is_dir():
        mend = "Correct it, or unset LONGSEQ_DATA: data then come over the network, or from data/."
        findings.append(Finding("error", f"LONGSEQ_DATA={data} is no folder.", mend))
    return findings


def check_resources(facts: Facts) -> list[Finding]:
    """Enough memory, disk and threads."""
    findings = []
    if facts.memory is not None and facts.memory < 2 * GIB:
        what = f"Only {facts.memory / GIB:.1f} GiB of memory are free; notebook 00 and training want 2."
        findings.append(Finding("warning", what, "Shut down other kernels and programs before you run them."))
    if facts.disk is not None and facts.disk < GIB:
        what = f"Only {facts.disk / GIB:.1f} GiB of disk are free; data and checkpoints want 1."
        findings.append(Finding("warning", what, f'Free some. What takes most here: du -sh "{ROOT}"/* | sort -h'))
    asked = facts.environ.get("OMP_NUM_THREADS", "")
    mend = f"export OMP_NUM_THREADS={facts.cores}"
    if asked and not (asked.isdigit() and int(asked) > 0):
        findings.append(Finding("warning", f"OMP_NUM_THREADS={asked} is no number of threads.", mend))
    elif facts.threads is not None and facts.threads > facts.cores:
        what = f"torch would run {facts.threads} threads on the {facts.cores} cores it may use, and be slower."
        findings.append(Finding("warning", what, mend))
    elif facts.threads == 1 and facts.cores > 1:
        what = f"torch runs on 1 thread of {facts.cores} possible: training takes longer than it need."
        findings.append(Finding("warning", what, mend))
    return findings


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    check_python,
    check_packages,
    check_project,
    check_imports,
    check_gpu,
    check_kernel,
    check_widgets,
    check_places,
    check_resources,
)


def examine(facts: Facts) -> list[Finding]:
    """All findings, errors first. With the wrong Python only that is said: all else follows from it."""
    first = check_python(facts)
    if first:
        return first
    return sorted((f for check in CHECKS for f in check(facts)), key=lambda f: f.level != "error")


def report(facts: Facts, findings: list[Finding]) -> str:
    """What the command prints. A mend that serves several findings is spelt out once."""
    lines = [f"Python {'.'.join(map(str, facts.python))} at {facts.executable}"]
    if "torch" in facts.installed:
        device = facts.gpu if facts.cuda_usable else "no GPU in use"
        lines.append(f"torch {facts.installed['torch']}, {facts.threads} threads, {device}")
    said: set[str] = set()
    for finding in findings:
        mend = "the same" if finding.mend in said else finding.mend
        lines += ["", f"[{finding.level}] {finding.what}", f"  mend: {mend}"]
        said.add(finding.mend)
    errors = sum(f.level == "error" for f in findings)
    warnings = len(findings) - errors
    if not findings:
        lines.append(f"All is well: {len(CHECKS)} checks passed.")
    else:
        ready = "The course does not run yet" if errors else "The course runs"
        lines += [
            "",
            f"{ready}: {errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}.",
        ]
    return "\n".join(lines)


# ---- the facts: from this machine --------------------------------------------------------------------------


def parse_requirements(pyproject: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """``{"torch": ("2.6", ""), "tyro": ("0.9.17", "train"), ...}`` from a parsed pyproject.toml."""
    project = pyproject["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    needed = {}
    for extra, lines in groups.items():
        for line in lines if extra not in ("bench", "site") else ():  # the course runs without these
            found = NAMES.match(line)
            if found:
                needed[found.group(1).lower()] = (found.group(2), extra)
    return needed


def _installed(names: list[str]) -> dict[str, str]:
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _ask(code: str, cwd: str | None = None) -> tuple[dict[str, Any], str]:
    """Run ``code`` in a process of its own: the JSON of its last line, and its last word of complaint."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=180, check=False
        )
    except subprocess.TimeoutExpired:
        return {}, "it did not answer within three minutes"
    if done.returncode == 0:
        return json.loads(done.stdout.strip().splitlines()[-1]), ""
    words = done.stderr.strip().splitlines()
    return {}, words[-1] if words else f"it died with exit code {done.returncode}"


def _torch() -> tuple[dict[str, Any], str]:
    return _ask(
        "import json, torch; torch.ones(2, 2) @ torch.ones(2, 2); torch.from_numpy(torch.ones(1).numpy()); "
        "print(json.dumps(dict(cuda_build=torch.version.cuda, cuda_usable=torch.cuda.is_available(), "
        "threads=torch.get_num_threads())))"
    )


def _broken(names: list[str]) -> dict[str, str]:
    """The modules of ``names`` that do not import, each with the last line of its error."""
    code = (
        "import importlib, json\nbroken = {}\n"
        f"for name in {names!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except BaseException as error:\n"
        "        broken[name] = (str(error).strip() or type(error).__name__).splitlines()[-1]\n"
        "print(json.dumps(broken))"
    )
    broken, failure = _ask(code)
    if not failure:
        return broken
    if len(names) == 1:
        return {names[0]: failure}
    return {name: error for one in names for name, error in _broken([one]).items()}  # one of them crashed: which?


def _imported_from() -> str | None:
    """Where ``import longseq_tutorial`` leads from a folder that is not the project's."""
    code = "import json, longseq_tutorial as m; print(json.dumps({'file': m.__file__}))"
    with tempfile.TemporaryDirectory() as elsewhere:
        answer, failure = _ask(code, cwd=elsewhere)
    return None if failure or not answer["file"] else str(Path(answer["file"]).parent.parent)


def _jupyter() -> tuple[str | None, bool, str | None]:
    """Kernel python3's interpreter, whether the widgets' frontend is there, and Jupyter's runtime folder."""
    answer, failure = _ask(
        "import json, os, sys\n"
        "from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel\n"
        "from jupyter_core.paths import jupyter_path, jupyter_runtime_dir\n"
        "try: kernel = KernelSpecManager().get_kernel_spec('python3').argv[0]\n"
        "except NoSuchKernel: kernel = None\n"
        "if kernel in ('python', 'python3', 'python%d.%d' % sys.version_info[:2]): kernel = sys.executable\n"
        "part = ('labextensions', '@jupyter-widgets', 'jupyterlab-manager', 'package.json')\n"
        "found = any(os.path.exists(os.path.join(path, *part)) for path in jupyter_path())\n"
        "print(json.dumps(dict(kernel=kernel, frontend=found, runtime=jupyter_runtime_dir())))"
    )
    if failure:
        return None, False, None
    return answer["kernel"], answer["frontend"], answer["runtime"]


def _gpu() -> str | None:
    """The name of the first NVIDIA GPU, asked of its driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        command = [tool, "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _writable(folder: Path) -> bool:
    """Whether a file can be made in ``folder``, or in the nearest parent that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cores() -> int:
    """Cores this process may use: the affinity mask and a container's quota count, not the machine's size."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        count = min(count, -(-int(quota[0]) // int(quota[1])))
    return max(count, 1)


def free_memory() -> int | None:
    """Bytes that may still be taken, within a container's limit; ``None`` where the system does not tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"))
    free = int(found.group(1)) * 1024 if found else None
    limit, used = (_read(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdigit() and used.isdigit():
        rest = int(limit) - int(used)
        free = rest if free is None else min(free, rest)
    return free


def gather() -> Facts:
    """Look at this machine. Takes some seconds: torch is imported, in a process of its own."""
    if sys.version_info[:2] < OLDEST:
        return Facts(python=tuple(sys.version_info[:3]), executable=sys.executable)
    import tomllib

    needed = parse_requirements(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    installed = _installed([*needed, *NOT_OURS])
    torch, failure = _torch() if "torch" in installed else ({}, "")
    modules = [name for name in ("numpy", "matplotlib", "ipywidgets", "ipykernel", *NOT_OURS) if name != "torch"]
    present = [name for name in modules if name in installed or (name == "ipykernel" and "jupyterlab" in installed)]
    broken = {**({"torch": failure} if failure else {}), **_broken(present)}
    kernel, frontend, runtime = _jupyter() if "jupyterlab" in installed else (None, False, None)
    places = [ROOT, *([Path(runtime)] if runtime else [])]
    return Facts(
        python=tuple(sys.version_info[:3]),
        executable=sys.executable,
        needed=needed,
        installed=installed,
        broken=broken,
        imported_from=_imported_from(),
        cuda_build=torch.get("cuda_build"),
        cuda_usable=torch.get("cuda_usable", False),
        gpu=_gpu(),
        threads=torch.get("threads"),
        cores=cores(),
        kernel=kernel,
        widgets_frontend=frontend,
        unwritable=tuple(str(place) for place in places if not _writable(place)),
        memory=free_memory(),
        disk=shutil.disk_usage(ROOT).free,
        environ=dict(os.environ),
    )


def main() -> int:
    """Examine, report; the exit code is 1 where something must be mended first."""
    facts = gather()
    findings = examine(facts)
    print(report(facts, findings))
    return int(any(finding.level == "error" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
