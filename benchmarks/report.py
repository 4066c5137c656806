"""The tables, the JSON record and the plots of a benchmark."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from longseq_tutorial.training.machine import commit, device_name, utc_now, versions

from . import peers
from .cases import CASES, GROWTH, STEP
from .measure import Row, growth, ratios
from .targets import Target, Verdict

BUSY = 0.05  # more of the machine than that in others' hands: with several threads, the numbers are not to be believed


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
        "peers": peers.installed(),
        "commit": revision,
        "dirty": dirty,
        "started": utc_now(),
    }


# ---- tables --------------------------------------------------------------------------------------------------------


def table(name: str, rows: list[Row]) -> str:
    """A case in a terminal: one line a candidate and size, then the growth."""
    lines = [f"{name} (theory: {CASES[name].growth})"]
    first = "a step" if name.startswith(STEP) else "forward"
    beside = {(row.candidate, row.size): ratio for row, ratio in ratios(rows)}
    lines.append(f"  {'':24}{'length':>8}{first:>11}{'+ backward':>12}{'memory':>11}{'+ backward':>12}  time over ours")
    for row in rows:
        ratio = beside.get((row.candidate, row.size))
        both = (milliseconds(row.seconds), megabytes(row.both_bytes)) if row.both else ("-", "-")
        note = f"  {ratio}" if ratio else f"  {floors(row)} times the floor" if row.floor else ""
        lines.append(
            f"  {row.candidate:24}{row.size.length:8,}{milliseconds(statistics.median(row.forward)):>11}{both[0]:>12}"
            f"{megabytes(row.forward_bytes):>11}{both[1]:>12}{note}"
        )
    found = next((row.limits for row in reversed(rows) if row.limits), None)
    if found:
        lines.append(
            f"  the floor: {found['flop'] / 1e9:.0f} GFLOP/s in products, {found['bytes'] / 1e9:.1f} GB/s in copies, "
            f"{found['exp'] / 1e9:.2f} G exp/s"
        )
    for candidate, exponents in growth(rows).items():
        lines.append(
            f"  {candidate}: time grows like L^{exponents['time']:.2f}, memory like L^{exponents['memory']:.2f}"
        )
    return "\n".join([*lines, *(f"  not reached: {missed}" for missed in too_steep(name, rows))])


def too_steep(name: str, rows: list[Row]) -> list[str]:
    """What of ours grows faster than its kind may."""
    most = GROWTH[CASES[name].growth]
    exponents = growth(rows).get("ours", {})
    return [f"{what} like L^{p:.2f}, wanted {most}" for what, p in exponents.items() if most is not None and p > most]


COLUMNS = (22, 17, 11, 26, 11, 24, 6, 7, 12, 8)
TITLES = (
    "case",
    "size",
    "ours",
    "best peer",
    "its time",
    "ratio [least to most]",
    "bar",
    "memory",
    "x floor",
    "largest",
)


def target_title() -> str:
    """`memory`: ours over the peer's. `x floor`: ours over the machine's best, forward / and backward. `largest`: our
    largest tensor over the input."""
    return cells(TITLES)


def target_line(verdict: Verdict) -> str:
    """One row of the table of targets; a second line says what was missed."""
    target, ours, peer = verdict.target, verdict.ours, verdict.peer
    inputs = math.prod(target.size)
    line = cells(
        (
            target.case,
            str(target.size),
            milliseconds(ours.seconds),
            peer.candidate if peer else "-",
            milliseconds(peer.seconds) if peer else "-",
            str(verdict.ratio) if verdict.ratio else "-",
            f"{target.bar:g}" if target.bar is not None else "-",
            f"{ours.bytes / peer.bytes:.2f}" if peer and peer.bytes else "-",
            floors(ours) if ours.floor else "-",
            f"{ours.largest / inputs:.1f}",
        )
    )
    lines = [f"{line}  {outcome(verdict)}", *verdict.failed]
    if verdict.share is not None and target.share is not None:
        lines.append(f"{target.share[0]} takes {verdict.share:.0%} of our time")
    return "\n    ".join(lines)


def outcome(verdict: Verdict) -> str:
    """In one word: the median decides. Where some rounds fell short of the bar, it says so."""
    target = verdict.target
    if verdict.failed:
        return "not reached"
    if target.bar is None and target.floor is None and target.forward_floor is None and target.share is None:
        return "(no bar)"
    if verdict.ratio is not None and target.bar is not None and verdict.ratio.low < target.bar:
        return "reached, not in every round"
    return "reached"


def floors(row: Row) -> str:
    """Forward / forward and backward."""
    return " / ".join("-" if times is None else f"{times:.1f}" for times in (row.forward_above_floor, row.above_floor))


def cells(words: Iterable[str]) -> str:
    return "".join(f"{word:{width}}" for word, width in zip(words, COLUMNS, strict=True))


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"


def megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


# ---- record --------------------------------------------------------------------------------------------------------


def write(path: Path, head: dict[str, Any], name: str, rows: list[Row], **more: Any) -> None:
    """Put a case into the record: every sample of every row, beside the machine's description. Others are kept."""
    record = read(path)
    record["cases"][name] = {"machine": head, "growth": growth(rows), "rows": [asdict(row) for row in rows], **more}
    record["cases"] = {each: record["cases"][each] for each in CASES if each in record["cases"]}
    _save(path, record)


def write_target(path: Path, head: dict[str, Any], verdict: Verdict, rows: list[Row], **more: Any) -> None:
    """The same for one row of the table of targets."""
    record = read(path)
    target = verdict.target
    record["targets"][key(target)] = {
        "machine": head,
        "case": target.case,
        "size": list(target.size),
        "bar": target.bar,
        "peer": verdict.peer.candidate if verdict.peer else None,
        "ratio": asdict(verdict.ratio) if verdict.ratio else None,
        "times_floor": verdict.ours.above_floor,
        "times_forward_floor": verdict.ours.forward_above_floor,
        "missed": verdict.failed,
        "rows": [asdict(row) for row in rows],
        **more,
    }
    _save(path, record)


def key(target: Target) -> str:
    return f"{target.case} {target.size}"


def read(path: Path) -> dict[str, Any]:
    """A record, or an empty one. Raises `ValueError` for a file that is none, or was written by another version."""
    try:
        found = {"cases": {}, "targets": {}} | (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
        for entry in (*found["cases"].values(), *found["targets"].values()):
            rows_of(entry)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"wanted a record that this version wrote; got {path}, which cannot be read ({error}). Move it away, or "
            "choose another with --out."
        ) from error
    return found


def rows_of(entry: dict[str, Any]) -> list[Row]:
    """The rows of a case or a target of a record."""
    return [Row(**row) for row in entry["rows"]]


def _save(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot_growth(path: Path, record: Path) -> bool:
    """Time and memory against length, ours of every recorded case, on logarithmic axes. False: nothing to draw."""
    cases = {
        name: [row for row in rows_of(case) if row.candidate == "ours"] for name, case in read(record)["cases"].items()
    }
    if not cases:
        return False
    plt = _pyplot()
    fig, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    colors = plt.colormaps["tab10"].colors
    styles = [(color, line) for line in ("-", "--", ":") for color in colors]
    for (name, mine), (color, line) in zip(cases.items(), styles, strict=False):
        lengths = [row.size.length for row in mine]
        style = {"color": color, "linestyle": line, "marker": ".", "label": name}
        axes[0].loglog(lengths, [row.seconds for row in mine], **style)
        axes[1].loglog(lengths, [row.bytes for row in mine], **style)
    axes[0].set(xlabel="length", ylabel="seconds, forward + backward", title="time")
    axes[1].set(xlabel="length", ylabel="bytes above the start", title="peak memory")
    marks = sorted({row.size.length for mine in cases.values() for row in mine})
    for axis in axes:
        axis.set_xticks(marks, [f"{mark:,}" for mark in marks])
        axis.set_xticks([], minor=True)
    axes[1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return True


def plot_targets(path: Path, record: Path) -> bool:
    """Each target's ratio with its interval, beside its bar. False: nothing to draw."""
    rows = {name: entry for name, entry in read(record)["targets"].items() if entry["ratio"]}
    if not rows:
        return False
    plt = _pyplot()
    fig, axis = plt.subplots(figsize=(9, 1 + 0.28 * len(rows)), layout="constrained")
    for place, entry in enumerate(rows.values()):
        low, mid, high = (entry["ratio"][name] for name in ("low", "median", "high"))
        color = "tab:red" if entry["missed"] else "tab:blue"
        axis.errorbar(mid, place, xerr=[[mid - low], [high - mid]], fmt="o", color=color, capsize=3)
        if entry["bar"]:
            axis.plot(entry["bar"], place, "|", color="black", markersize=14)
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="best peer's time over ours (| the bar; red: a bar was missed)")
    marks = [m for m in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axis.get_xlim()[0] <= m <= axis.get_xlim()[1]]
    axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(rows)), [f"{name} · {entry['peer']}" for name, entry in rows.items()], fontsize=7)
    axis.invert_yaxis()
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return True


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
