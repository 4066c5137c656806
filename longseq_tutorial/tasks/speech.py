"""Speech: which word was spoken, from the raw waveform.

By default the data are the Free Spoken Digit Dataset at 8,000 samples a second with its official split, takes 0 to 4
for the test and the others for training, of which takes 5 to 9 are held out to choose by (`fsdd.py` finds or downloads
it). Without a copy and without a network there is the project's own sample, digits spoken by espeak-ng in many voices.

Other sources are keywords at 16,000 samples a second: Speech Commands (`speech_commands.py`) and Arabic Speech
Commands (`arabic.py`). `SOURCES` lists them all; `task.config.source` says which it was, and how it was split.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from . import arabic, fsdd, speech_commands
from .augment import augment
from .base import REPOSITORY_DATA, DataError, DataNotFound, Split, Task, TaskConfig
from .clips import Clips, as_splits
from .packs import read_npz

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = fsdd.RATE
TEST_TAKES = range(5)
LEVEL = 0.1  # RMS that clips are brought to
SAMPLE = "speech_sample_8k.npz.xz"
SOURCES = {
    "fsdd": "Free Spoken Digit Dataset, 3,000 clips, 8 kHz, 16 MB; CC BY-SA 4.0",
    "sample": "960 digits by espeak-ng (made by this project), 8 kHz, MIT",
    "sc10": "Speech Commands v0.02, ten words, 16 kHz, 2.4 GB; CC BY 4.0",
    "sc35": "Speech Commands v0.02, all 35 words, 16 kHz, 2.4 GB; CC BY 4.0",
    "arabic": "Arabic Speech Commands, 20 words, 6,000 clips, 16 kHz, 390 MB to clone; CC BY 4.0",
    "arabic40": "Arabic Speech Commands, all 40 words, 12,000 clips, 16 kHz, 390 MB to clone; CC BY 4.0",
    **{name: f"{said}, if you have the pack; CC BY 4.0" for name, (_, said) in speech_commands.PACKS.items()},
}
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
    length: int | None = None,
    normalise: str | None = "rms",
    random_split: bool = False,
    every: int = 1,
) -> Task:
    """Spoken words as a `Task`: float32 samples, one class a word.

    source: "fsdd" is the real recordings of ten digits, "sample" the espeak-ng voices in the repository; "auto" takes
    the real ones, and the sample with a printed notice when they are neither here nor to be had. The others are in
    `SOURCES`. `task.config.source` says which it was.
    download, verify: see `fsdd.find`, `speech_commands.find` and `arabic.find`.
    valid_takes: FSDD's takes for validation; `()` trains on all of takes 5 to 49 and leaves validation empty.
    length: clips are cut to this many samples; None is one second (of FSDD's 3,000 clips, 20 are longer).
    normalise: "rms" brings every clip to mean 0 and a level of 0.1, "peak" to a largest sample of 1, "standard" all of
    them to the training clips' mean and deviation (keywords only), None leaves them as recorded.
    random_split: SC10 only: clips of exactly a second, divided at random, 70 : 15 : 15, by `seed`, as the published
    SC10 is, with the same speakers in all parts; else the official parts.
    every: keywords only: keep every second sample (2) and so on, unfiltered, as S4 tests a 16 kHz model at 8 kHz.
    """
    if source not in ("auto", *SOURCES):
        raise DataError(f"source must be 'auto', {', '.join(map(repr, SOURCES))}; got {source!r}.")
    if normalise not in ("rms", "peak", "standard", None):
        raise DataError(f"normalise must be 'rms', 'peak', 'standard' or None; got {normalise!r}.")
    if length is not None and length < 1:
        raise DataError(f"length must be at least 1 sample; got {length}.")
    if random_split and source != "sc10":
        raise DataError(f"random_split is for source='sc10'; got source={source!r}.")
    if source not in ("auto", "fsdd", "sample"):
        clips, described = _keywords(source, root, download, verify, random_split, seed)
        return _keyword_task(clips, described, length, normalise, every)
    if normalise == "standard" or every != 1:
        raise DataError(f"normalise='standard' and every={every} are for keywords; source={source!r} has digits.")
    length = RATE if length is None else length
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


def _keywords(
    source: str, root: str | Path | None, download: bool, verify: bool, random_split: bool, seed: int
) -> tuple[Clips, str]:
    """The clips of a source, and what they are."""
    if source in speech_commands.PACKS:
        return speech_commands.find_pack(source, root)
    if source.startswith("arabic"):
        return arabic.find(root, 40 if source == "arabic40" else 20, verify=verify)
    archive = speech_commands.find(root, download=download, verify=verify)
    words = speech_commands.WORDS10 if source == "sc10" else speech_commands.WORDS35
    kind = f"Speech Commands v0.02, {len(words)} words{'' if verify else ', unverified'}"
    parts = f"official {'lists' if archive.by_lists else 'rule'}, by speaker"
    parts = f"random 70 : 15 : 15 split, seed {seed}, not by speaker" if random_split else parts
    return speech_commands.select(archive, words, random_split=random_split, seed=seed), f"{kind}, {parts}"


def _keyword_task(clips: Clips, described: str, length: int | None, normalise: str | None, every: int) -> Task:
    if every < 1 or clips.rate % every:
        raise DataError(f"every must divide the rate of {clips.rate:,} samples a second; got {every}.")
    if every > 1:
        chosen = clips.audio if clips.place is None else clips.audio[clips.place]
        clips = replace(clips, audio=np.ascontiguousarray(chosen[:, ::every]), rate=clips.rate // every, place=None)
        described += f", every {every}. sample"
    length = clips.audio.shape[1] if length is None else min(length, clips.audio.shape[1])
    train, valid, test = as_splits(clips, length, normalise)
    config = TaskConfig(
        name="speech",
        kind="samples",
        classes=len(clips.words),
        length=length,
        sample_rate=clips.rate,
        class_names=clips.words,
        source=described,
    )
    # The same changes in milliseconds as at 8 kHz.
    later = partial(augment, limit=length, shift_samples=(-clips.rate // 40, clips.rate // 10))
    return Task(config, train, valid, test, later)


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
