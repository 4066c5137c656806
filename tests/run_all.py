"""Run every check of the project, stage by stage, and end on one line that says what passed.

    python tests/run_all.py                  all stages
    python tests/run_all.py ruff tests       only these

A failing stage does not stop the later ones, so one run shows everything that is wrong. Exit code 0 only when
every stage passed, and no stage passes by having found nothing to do.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

STAGES: dict[str, list[str]] = {
    "ruff": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "mypy": ["mypy"],
    # A few workers only: each holds torch, and more of them would only wait for the cores.
    "tests": ["pytest", "tests", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"],
    # Strict: each output of each cell is compared, in the reader's notebooks and in the solved ones.
    "notebooks": [
        *("pytest", "notebooks", "-q", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300"),
        *("--nbval-sanitize-with", "notebooks/nbval_sanitize.cfg"),
    ],
}


def offline() -> dict[str, str]:
    """The environment in which notebooks were built: no network, no data beyond the repository's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LONGSEQ_")}
    path = [str(ROOT / "notebooks" / "offline"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, path))}


@dataclass(frozen=True)
class Outcome:
    """What one stage came to: its name, whether it passed, a few words, and its seconds."""

    name: str
    ok: bool
    words: str
    seconds: float


def count(report: Path) -> str:
    """Put the numbers of a JUnit report in words: ``"212 passed, 3 skipped"``."""
    suite = ET.parse(report).getroot().find("testsuite")
    if suite is None:
        return "no report"
    number = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    passed = number["tests"] - number["failures"] - number["errors"] - number["skipped"]
    parts = [f"{passed} passed"]
    parts += [f"{number[key]} {key}" for key in ("failures", "errors", "skipped") if number[key]]
    return ", ".join(parts)


def run_stage(name: str, folder: Path) -> Outcome:
    """Run one stage with its output in view. pytest exits with 5, a failure, where it collected nothing."""
    command = [sys.executable, "-m", *STAGES[name]]
    report = folder / f"{name}.xml"
    if STAGES[name][0] == "pytest":
        command.append(f"--junitxml={report}")
    print(f"\n== {name}: {' '.join(STAGES[name])}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env=offline() if name == "notebooks" else None).returncode
    words = "ok" if code == 0 else "FAILED"
    if report.exists():
        words = count(report) if code == 0 else f"FAILED ({count(report)})"
    return Outcome(name, code == 0, words, time.monotonic() - start)


def summary(outcomes: list[Outcome]) -> str:
    """One line: the verdict, each stage's words, the minutes in total."""
    verdict = "PASSED" if all(o.ok for o in outcomes) else "FAILED"
    minutes, seconds = divmod(round(sum(o.seconds for o in outcomes)), 60)
    return f"{verdict} in {minutes} min {seconds} s -- " + "; ".join(f"{o.name}: {o.words}" for o in outcomes)


def main(names: list[str]) -> int:
    """Run the stages named, or all; return the exit code (2 for a stage that does not exist)."""
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        print(f"No stage {', '.join(unknown)}. The stages are: {', '.join(STAGES)}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        outcomes = [run_stage(name, Path(folder)) for name in names or STAGES]
    print("\n" + summary(outcomes))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
