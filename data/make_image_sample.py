"""Make `image_sample.npz`: 250 grey pictures of 32 x 32, ten kinds of drawn shapes.

    python data/make_image_sample.py [FILE]

Shapes of any size, place and contrast before a background that grows lighter to one side, with a little noise. The
same file comes out every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from longseq_tutorial.tasks.image import SHAPES
from longseq_tutorial.tasks.packs import write_npz

SIZE = 32
EACH = {"train": 17, "valid": 4, "test": 4}  # of each kind


def main(path: Path) -> None:
    rng = np.random.default_rng(1_024)
    rows = [
        (picture(rng, name), label, part)
        for part, count in enumerate(EACH.values())
        for label, name in enumerate(SHAPES)
        for _ in range(count)
    ]
    arrays = {
        "grey": np.stack([row[0].reshape(-1) for row in rows]),
        "label": np.array([row[1] for row in rows], np.uint8),
        "split": np.array([row[2] for row in rows], np.uint8),
    }
    write_npz(path, arrays)
    print(f"{path}: {len(rows)} pictures, {path.stat().st_size / 1024:.0f} KiB")


def picture(rng: np.random.Generator, name: str) -> np.ndarray:
    """One picture, (32, 32) uint8."""
    y, x = np.mgrid[:SIZE, :SIZE]
    radius = rng.uniform(5, 11)
    v, u = y - rng.uniform(radius, SIZE - radius), x - rng.uniform(radius, SIZE - radius)
    largest = np.maximum(abs(u), abs(v))
    period, thick = rng.uniform(4, 9), radius / 3
    shape = {
        "disc": u**2 + v**2 < radius**2,
        "ring": abs(np.hypot(u, v) - radius + thick / 2) < thick / 2,
        "square": largest < radius * 0.9,
        "frame": abs(largest - radius + thick / 2) < thick / 2,
        "triangle": (v < radius) & (v > 2 * abs(u) - radius),
        "cross": (np.minimum(abs(u), abs(v)) < thick / 2) & (largest < radius),
        "bars": v % period < period / 2,
        "columns": u % period < period / 2,
        "checks": (u % period < period / 2) ^ (v % period < period / 2),
        "corner": (u > 0) & (v > 0),
    }[name]
    background, contrast = rng.uniform(60, 190), rng.uniform(40, 110) * rng.choice([-1, 1])
    slope = rng.uniform(-1, 1, 2)
    grey = background + contrast * shape + slope[0] * (y - 16) + slope[1] * (x - 16)
    noisy = grey + rng.normal(0, 3, grey.shape)
    return (np.clip(noisy, 0, 255) // 4 * 4).astype(np.uint8)  # 64 levels: the file stays small


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "image_sample.npz")
