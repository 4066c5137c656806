"""Make `pathfinder_sample.npz` and `pathx_sample.npz`: a few pictures of each, with their paths.

    python data/make_pathfinder_samples.py [FOLDER]

The pictures are drawn from seed 1; see `longseq_tutorial/tasks/contours.py` for the rule.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from longseq_tutorial.tasks import contours
from longseq_tutorial.tasks.packs import write_npz
from longseq_tutorial.tasks.pathfinder import SAMPLE_SIZES, SAMPLES


def main(folder: Path) -> None:
    for size, name in SAMPLES.items():
        count = sum(SAMPLE_SIZES[size].values())
        pictures = contours.draw(np.random.default_rng([1, size]), count, contours.SHAPES[size])
        write_npz(folder / name, pictures._asdict())
        print(f"{folder / name}: {count} pictures, {(folder / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
