"""A table of training records.

python -m longseq_tutorial.results            what `results` and `runs` hold
python -m longseq_tutorial.results DIR ...    what these folders hold
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .training.records import Record, RecordError, read_record

FOLDERS = ("results", "runs")  # ours, and the reader's own
_COLUMNS = ("run", "test", "best valid", "parameters", "updates", "minutes", "memory", "device", "data")


def records(folders: Iterable[str | Path]) -> list[Record]:
    """All records in these folders, by name. Raises `RecordError` for a folder that is missing or a broken record."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise RecordError(f"{folder} is no folder; name one that holds records.")
        found += [read_record(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: record.name)


def table(found: Sequence[Record]) -> str:
    """The records as a table, one a line."""
    rows = [_COLUMNS, *map(_row, found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _row(record: Record) -> tuple[str, ...]:
    valid = [row["valid"]["accuracy"] for row in record.history if row.get("valid")]
    return (
        record.name,
        f"{record.test['accuracy']:.2%}",
        f"{max(valid):.2%}" if valid else "",
        f"{record.parameters:,}",
        f"{record.updates:,}",
        f"{record.seconds / 60:.1f}",
        f"{max(record.peak_memory.values(), default=0) / 2**30:.1f} GiB",
        f"{record.device_name}, {record.processes} x {record.threads} threads"
        if record.device == "cpu"
        else record.device_name,
        record.source,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit code 2 with one line when something cannot be read."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print((__doc__ or "").strip())
        return 0
    unknown = [argument for argument in argv if argument.startswith("-")]
    if unknown:
        print(f"unknown flag {unknown[0]}; give folders that hold records, or nothing.", file=sys.stderr)
        return 2
    folders = argv or [folder for folder in FOLDERS if Path(folder).is_dir()]
    try:
        found = records(folders)
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    print(table(found) if found else f"no records in {', '.join(folders) or ' or '.join(FOLDERS)} yet.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
