"""Make `listops_sample.tsv.xz`: 200 ListOps rows in the form of the official files.

    python data/make_listops_sample.py [FILE]

The rows are the first 200 expressions of seed 1, so the same file comes out every time.
"""

from __future__ import annotations

import itertools
import lzma
import sys
from pathlib import Path

from longseq_tutorial.tasks.listops import Stream, decode
from longseq_tutorial.tasks.packs import write_atomically

ROWS = 200


def main(path: Path) -> None:
    rows = ["Source\tTarget\r\n"]
    for tokens, value in itertools.islice(Stream(seed=1), ROWS):
        rows.append(f"{decode(tokens, brackets=True)}\t{value}\r\n")
    write_atomically(path, lzma.compress("".join(rows).encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path}: {ROWS} rows, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "listops_sample.tsv.xz")
