"""The command: `python -m benchmarks [CASE ...]`, or `make bench ONLY="CASE ..."`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .cases import CASES
from .measure import Row, measure
from .report import header, plot, table, write

HERE = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, record. 0: all measured; 1: a candidate was wrong; 2: a word was not understood."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"what to measure; all when none: {', '.join(CASES)}")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--rounds", type=int, default=5, help="how often every candidate has its turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="the JSON record; the plot lies beside it")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}. There are: {', '.join(CASES)}.")
    if min(options.lengths) < 1 or options.rounds < 1 or options.threads < 1:
        parser.error("lengths, rounds and threads must be at least 1.")
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or HERE / "records" / f"{device.type}-{options.threads}-thread.json"
    head, wrong = header(device, options.threads), 0
    for name in options.cases or CASES:
        with tqdm(bar_format="{desc} {elapsed}", desc=name, leave=False, disable=not sys.stderr.isatty()) as bar:
            try:
                rows: list[Row] = measure(
                    CASES[name],
                    options.lengths,
                    options.rounds,
                    device,
                    lambda step, bar=bar, name=name: bar.set_description_str(f"{name}: {step}"),  # type: ignore[misc]
                )
            except ValueError as error:
                print(f"{name}: {error}", file=sys.stderr)
                wrong += 1
                continue
        print(table(name, rows) + "\n", flush=True)
        write(out, head, {name: rows})
    if out.exists():
        plot(out.with_suffix(".png"), out)
        print(f"recorded in {out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
