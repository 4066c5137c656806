"""Speech: which digit was spoken, from the raw waveform at 8,000 samples a second.

The data are the Free Spoken Digit Dataset with its official split, takes 0 to 4 for the test and the others for
training, of which takes 5 to 9 are held out to choose by (`fsdd.py` finds or downloads it). Without a copy and
without a network there is the project's own sample, digits spoken by espeak-ng in many voices.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from . import fsdd
from .augment import augment
from .base import REPOSITORY_DATA, DataError, DataNotFound, Split, Task, TaskConfig
from .packs import read_npz

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = fsdd.RATE
TEST_TAKES = range(5)
LEVEL = 0.1  # RMS that clips are brought to
SAMPLE = "speech_sample_8k.npz.xz"
_SAMPLE_FORM = {
    "q": ("int8", 1), "offsets": ("int64", 1), "mu": ("float32", 0), "digit": ("uint8", 1), "split": ("uint8", 1),
    "sample_rate": ("int64", 0),
}  # fmt: skip


def load(
    *,
    root: str | Path | None = None,
    seed: int = 0,
    source: str = "auto",
    download: bool = True,
    verify: bool = True,
    valid_takes: Iterable[int] = range(5, 10),
    length: int = 8_000,
    normalise: str | None = "rms",
) -> Task:
    """Spoken digits as a `Task`: float32 samples in [-1, 1], ten classes.

    source: "fsdd" is the real recordings, "sample" the espeak-ng voices in the repository; "auto" takes the real
    ones, and the sample with a printed notice when they are neither here nor to be had. `task.config.source`
    says which it was. download, verify: see `fsdd.find`.
    valid_takes: FSDD's takes for validation; `()` trains on all of takes 5 to 49 and leaves validation empty.
    length: clips are cut to this many samples (of FSDD's 3,000 clips, 20 are longer than a second).
    normalise: "rms" brings every clip to mean 0 and a level of 0.1, "peak" to a largest sample of 1, None leaves
    it as recorded.
    seed: nothing here is drawn; it is taken so that all tasks load alike.
    """
    if source not in ("auto", "fsdd", "sample"):
        raise DataError(f"source must be 'auto', 'fsdd' or 'sample'; got {source!r}.")
    if normalise not in ("rms", "peak", None):
        raise DataError(f"normalise must be 'rms', 'peak' or None; got {normalise!r}.")
    if length < 1:
        raise DataError(f"length must be at least 1 sample; got {length}.")
    parts = None
    if source != "sample":
        try:
            parts, described = _real(root, download, verify, valid_takes)
        except DataNotFound as missing:
            if source == "fsdd":
                raise
            print(f"No real speech: {missing} Using the espeak-ng sample instead.", file=sys.stderr)
    if parts is None:
        parts, described = _sample(), "espeak-ng sample (made by this project)"
    audio, offsets, labels, part = parts
    offsets = np.asarray(offsets, dtype=np.int64)
    waveforms = np.empty(len(audio), dtype=np.float32)
    for start, stop in zip(offsets[:-1], np.minimum(offsets[1:], offsets[:-1] + length), strict=True):
        waveforms[start:stop] = normalised(audio[start:stop], normalise)
    whole = Split(waveforms, offsets, labels, length)
    train, valid, test = (whole.select(part == number) for number in range(3))
    config = TaskConfig(
        name="speech",
        kind="samples",
        classes=10,
        length=length,
        sample_rate=RATE,
        class_names=DIGITS,
        source=described,
    )
    return Task(config, train, valid, test, partial(augment, limit=length))


def normalised(x: np.ndarray, how: str | None) -> np.ndarray:
    """One clip, samples in [-1, 1], brought to the level that `how` names (see `load`); silence stays silent."""
    if how is None:
        return x
    if how == "rms":
        x = x - x.mean(dtype=np.float64)
    peak, level = float(np.abs(x).max()), float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
    if peak == 0:
        return x
    gain = 1 / peak if how == "peak" else min(LEVEL / level, 1 / peak)  # loud peaks are never clipped
    return np.clip(x * gain, -1, 1)


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # float audio, offsets, labels, 0/1/2 for each clip


def _real(root: str | Path | None, download: bool, verify: bool, valid_takes: Iterable[int]) -> tuple[_Parts, str]:
    try:
        held_out = sorted({int(take) for take in valid_takes})
    except (TypeError, ValueError):
        raise DataError(f"valid_takes must be takes such as range(5, 10); got {valid_takes!r}.") from None
    if any(take not in range(5, 50) for take in held_out):
        raise DataError(f"valid_takes must lie in 5 to 49 (0 to 4 are the official test); got {held_out}.")
    recordings = fsdd.find(root, download=download, verify=verify)
    part = np.where(np.isin(recordings.take, TEST_TAKES), 2, np.where(np.isin(recordings.take, held_out), 1, 0))
    if not (part == 0).any():
        raise DataError(f"no recordings are left to train on with validation takes {held_out}.")
    kind = "FSDD" if verify else "recordings like FSDD's, unverified"
    held = f"takes {', '.join(map(str, held_out))} held out" if held_out else "none held out"
    described = f"{kind}, official split (test: takes 0 to 4), {held} for validation"
    audio = recordings.audio.astype(np.float32) / 32768
    return (audio, recordings.offsets, recordings.digit, part), described


def _sample() -> _Parts:
    path = REPOSITORY_DATA / SAMPLE
    mend = "Get it back with `git checkout`, or make it with data/make_speech_sample.py."
    pack = read_npz(path, _SAMPLE_FORM, mend)
    offsets, clips = pack["offsets"], len(pack["digit"])
    if (
        not len(offsets) - 1 == clips == len(pack["split"])
        or offsets[-1] != len(pack["q"])
        or pack["digit"].max() > 9
        or pack["sample_rate"] != RATE
    ):
        raise DataError(f"{path}: its arrays do not fit each other. {mend}")
    return expand(pack["q"], float(pack["mu"])), offsets, pack["digit"], pack["split"]


def expand(q: np.ndarray, mu: float) -> np.ndarray:
    """Undo companding: one-byte codes to samples in [-1, 1], (exp(|y| log(1 + mu)) - 1) / mu with y = q / 127."""
    y = q.astype(np.float32) / 127
    return np.sign(y) * np.expm1(np.abs(y) * np.float32(np.log1p(mu))) / np.float32(mu)
