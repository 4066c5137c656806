"""The table, the JSON record and the plot of a benchmark."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longseq_tutorial.training.machine import commit, device_name, utc_now, versions

from .cases import CASES
from .measure import Row, growth, ratios


def header(device: torch.device, threads: int) -> dict[str, Any]:
    """What a reader must know of the machine to believe a number."""
    revision, dirty = commit()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": threads,
        "load": load,
        "versions": versions(),
        "commit": revision,
        "dirty": dirty,
        "started": utc_now(),
    }


def table(name: str, rows: list[Row]) -> str:
    """A case in a terminal: one line a candidate and length, then the growth."""
    lines = [f"{name} (theory: {CASES[name].growth})"]
    beside = {(peer, length): (mid, low, high) for peer, length, mid, low, high in ratios(rows)}
    lines.append(
        f"  {'':18}{'length':>8}{'forward':>11}{'+ backward':>12}{'memory':>11}{'+ backward':>12}  time over ours"
    )
    for row in rows:
        ratio = beside.get((row.candidate, row.length))
        lines.append(
            f"  {row.candidate:18}{row.length:8,}{milliseconds(min(row.forward)):>11}{milliseconds(row.seconds):>12}"
            f"{megabytes(row.forward_bytes):>11}{megabytes(row.both_bytes):>12}"
            + (f"  {ratio[0]:.2f} [{ratio[1]:.2f} to {ratio[2]:.2f}]" if ratio else "")
        )
    for candidate, exponents in growth(rows).items():
        lines.append(
            f"  {candidate}: time grows like L^{exponents['time']:.2f}, memory like L^{exponents['memory']:.2f}"
        )
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def write(path: Path, head: dict[str, Any], found: dict[str, list[Row]]) -> None:
    """The record: every sample of every row, beside the machine's description. Older cases of the file are kept."""
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"] if path.exists() else {}
    for name, rows in found.items():
        cases[name] = {"machine": head, "growth": growth(rows), "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {name: cases[name] for name in CASES if name in cases}
    path.write_text(json.dumps({"cases": ordered}, indent=1) + "\n", encoding="utf-8")


def plot(path: Path, record: Path) -> None:
    """Time and memory against length, ours of every recorded case, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = json.loads(record.read_text(encoding="utf-8"))["cases"]
    fig, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    styles = [(c, s) for s in ("-", "--", ":") for c in plt.colormaps["tab10"].colors[:7]]  # type: ignore[attr-defined]
    for (name, case), (color, line) in zip(cases.items(), styles, strict=False):
        mine = [row for row in case["rows"] if row["candidate"] == "ours"]
        lengths = [row["length"] for row in mine]
        style = {"color": color, "linestyle": line, "marker": ".", "label": name}
        axes[0].loglog(lengths, [sorted(row["both"])[len(row["both"]) // 2] for row in mine], **style)
        axes[1].loglog(lengths, [row["both_bytes"] for row in mine], **style)
    axes[0].set(xlabel="length", ylabel="seconds, forward + backward", title="time, one thread")
    axes[1].set(xlabel="length", ylabel="bytes above the start", title="peak memory")
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    fig.savefig(path, dpi=120)
    plt.close(fig)
