"""The command: `python -m benchmarks [targets] [CASE ...]`, or `make bench ONLY="CASE ..."`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import peers, report
from .cases import CASES
from .children import Answer, Request, ask
from .measure import Row
from .problems import Size
from .targets import TARGETS, judge

HERE = Path(__file__).resolve().parent
WIDTH = 64  # channels of every case when growth is measured, so that the costs can be compared
TABLE = "targets"  # the word that asks for the table of targets


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record. 0: all went well; 1: something was wrong or a bar missed; 2: a word not understood."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "cases", nargs="*", metavar="CASE",
        help=f"what to measure; all when none. '{TABLE}': at the sizes of the table of targets, all cases or those "
        f"named with it. The cases: {', '.join(CASES)}",
    )  # fmt: skip
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=5, help="how often every candidate has its turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1200, help="seconds that one case may take")
    parser.add_argument(
        "--keep-memory", action="store_true",
        help="what is freed stays with the process instead of going back to the system (glibc alone): then it is not "
        "fetched again page by page, which costs large tensors more than small ones, whoever computes",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=None, help="the JSON record; the plots lie beside it")
    options = parser.parse_args(arguments)
    names = [name for name in options.cases if name != TABLE]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}. There are: {', '.join(CASES)}; and {TABLE}.")
    if min(options.lengths) < 1 or options.rounds < 1 or options.threads < 1 or options.limit <= 0:
        parser.error("lengths, rounds and threads must be at least 1, and the limit more than 0.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = f"{device.type}-{options.threads}-thread{'s' * (options.threads > 1)}"
    out = options.out or HERE / "records" / f"{machine}{'-memory-kept' * options.keep_memory}.json"
    try:
        report.read(out)  # before minutes of measuring, not after
    except ValueError as error:
        parser.error(str(error))
    head = report.header(device, options.threads) | {"memory_kept": options.keep_memory}
    say_who_is_there(head["peers"])
    measure_all = measure_targets if TABLE in options.cases else measure_growth
    before = out.stat().st_mtime_ns if out.exists() else None
    failed = measure_all(names, options, device, head, out)
    if out.exists() and out.stat().st_mtime_ns != before:
        report.plot_growth(out.with_name(f"{out.stem}-growth.png"), out)
        report.plot_targets(out.with_name(f"{out.stem}-targets.png"), out)
        print(f"recorded in {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}, plots beside it")
    return 1 if failed else 0


def say_who_is_there(found: dict[str, str]) -> None:
    """Beside whom we are measured."""
    there = ", ".join(f"{name} {version}" for name, version in found.items())
    print(f"Compared with torch {torch.__version__}{', ' + there if there else ''}.")
    missing = [name for name in peers.PACKAGES if name not in found]
    if missing:
        print(f"Not installed, so not compared: {', '.join(missing)}. `make bench PEERS=1` installs them.")
    for name in found:
        if peers.load(name) is None:
            print(f"{name} is installed but does not run here: {peers.why[name]}.")


def measure_growth(names: list[str], options: Any, device: torch.device, head: dict[str, Any], out: Path) -> int:
    """Each case at every length; how many went wrong or grew too fast."""
    failed = 0
    for name in names or CASES:
        answer = _ask(name, [Size(1, length, WIDTH) for length in options.lengths], options, device, name)
        if answer.wrong:
            print(f"{name}: {answer.wrong}", file=sys.stderr)
            failed += 1
            continue
        rows = [Row(**row) for row in answer.rows]
        failed += bool(report.too_steep(name, rows))
        print(report.table(name, rows))
        print(*(f"  {line}" for line in _remarks(answer, options)), "", sep="\n", flush=True)
        report.write(out, head, name, rows, others=answer.others, skipped=answer.skipped)
    return failed


def measure_targets(names: list[str], options: Any, device: torch.device, head: dict[str, Any], out: Path) -> int:
    """The table of targets; how many rows missed a bar or went wrong."""
    failed = 0
    print(report.target_title(), flush=True)
    for target in TARGETS:
        if names and target.case not in names:
            continue
        answer = _ask(target.case, [target.size], options, device, report.key(target))
        try:
            if answer.wrong:
                raise ValueError(f"{report.key(target)}: {answer.wrong}")
            rows = [Row(**row) for row in answer.rows]
            verdict = judge(target, rows)
        except ValueError as error:
            print(error, file=sys.stderr, flush=True)
            failed += 1
            continue
        failed += not verdict.reached
        print(report.target_line(verdict), *(f"    {line}" for line in _remarks(answer, options)), sep="\n", flush=True)
        report.write_target(out, head, verdict, rows, others=answer.others)
    return failed


def _ask(name: str, sizes: list[Size], options: Any, device: torch.device, title: str) -> Answer:
    request = Request(name, sizes, options.rounds, options.threads, device.type, options.keep_memory)
    with tqdm(bar_format="{desc} {elapsed}", desc=title, leave=False, disable=not sys.stderr.isatty()) as bar:
        return ask(request, options.limit, lambda step: bar.set_description_str(f"{title}: {step}"))


def _remarks(answer: Answer, options: Any) -> list[str]:
    """What was left out, and whether the numbers can be believed."""
    busy = answer.others or 0.0
    loud = [f"others used {busy:.0%} of this machine meanwhile: with several threads, do not believe these numbers"]
    return [*answer.skipped, *(loud if options.threads > 1 and busy > report.BUSY else [])]


if __name__ == "__main__":
    sys.exit(main())
