"""Spoken words of one second each: what all the keyword data have in common.

Clips are kept as 16-bit samples, in memory or in a file that is mapped, and brought to their level when they are
read. They are cut or padded with silence to one second.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .base import DataError, Split
from .packs import read_npz

LEVEL = 0.1  # RMS that "rms" brings a clip to
BLOCK = 500  # clips that are looked at together
_FORM = {
    "q": ("int8", 2), "peak": ("int16", 1), "mu": ("float64", 0), "label": ("uint8", 1), "words": ("U", 1),
    "sample_rate": ("int64", 0),
}  # fmt: skip
_MEND = "Delete it or put a good copy in its place."


@dataclass(frozen=True)
class Clips:
    """Clip i is `audio[place[i]]`, the word `words[label[i]]`; without `place` it is `audio[i]`."""

    audio: np.ndarray  # (n or more, samples) int16
    label: np.ndarray  # (n,) uint8
    split: np.ndarray  # (n,) uint8: 0 training, 1 validation, 2 test
    words: tuple[str, ...]
    rate: int  # samples a second
    levels: np.ndarray  # (n, 3) float32: mean, RMS about the mean, and largest distance from it, of samples in [-1, 1]
    place: np.ndarray | None = None  # (n,) rows of audio, so that a choice of mapped clips need not be copied

    def __len__(self) -> int:
        return len(self.label)


def read_pack(path: Path, extra: dict[str, tuple[str, int]] | None = None) -> tuple[Clips, dict[str, np.ndarray]]:
    """Clips from a companded pack (see `data/README.md`), and the further arrays that were asked for.

    `split` is training throughout where the pack has none. Raises `DataError` where the file is not right.
    """
    pack = read_npz(path, {**_FORM, **(extra or {})}, _MEND)
    q, peak, label, words = pack["q"], pack["peak"], pack["label"], tuple(map(str, pack["words"]))
    faults = {
        "there are no clips": len(q) == 0 or q.shape[1] == 0,
        "its arrays disagree on the number of clips": not len(q) == len(peak) == len(label)
        or any(len(pack[name]) != len(q) for name in extra or {}),
        f"a label is outside the {len(words)} words": bool(len(label) and label.max() >= len(words)),
        "the companding constant is not from 0 to 65,535": not 0 <= pack["mu"] <= 65_535,
        "a peak is negative, or a code is -128": bool((peak < 0).any() or (q == -128).any()),
        f"the rate is {int(pack['sample_rate'])} samples a second": pack["sample_rate"] < 1,
        "a word stands there twice, or there is only one": len(set(words)) < max(2, len(words)),
        "a part is none of training, validation and test": "split" in pack and bool((pack["split"] > 2).any()),
    }
    for fault, there in faults.items():
        if there:
            raise DataError(f"{path}: {fault}. {_MEND}")
    audio = np.empty(q.shape, np.int16)
    for start in range(0, len(q), BLOCK):
        part = slice(start, start + BLOCK)
        audio[part] = expand(q[part], float(pack["mu"]), peak[part])
    split = pack.get("split", np.zeros(len(q), np.uint8))
    clips = Clips(audio, label, split, words, int(pack["sample_rate"]), measure(audio))
    return clips, {name: pack[name] for name in extra or {}}


def expand(q: np.ndarray, mu: float, peak: np.ndarray) -> np.ndarray:
    """One-byte codes (n, samples) to int16: y = q / 127, sign(y) ((1 + mu)^|y| - 1) / mu, times the clip's peak."""
    y = q.astype(np.float32) / 127
    if mu > 0:
        y = np.sign(y) * np.expm1(np.abs(y) * np.float32(np.log1p(mu))) / np.float32(mu)
    return np.rint(y * peak[:, None].astype(np.float32)).astype(np.int16)


def measure(audio: np.ndarray) -> np.ndarray:
    """What `Clips.levels` holds, block by block."""
    levels = np.empty((len(audio), 3), np.float32)
    for start in range(0, len(audio), BLOCK):
        x = audio[start : start + BLOCK].astype(np.float32) / 32768
        mean = x.mean(1, dtype=np.float64)
        x -= mean[:, None]
        levels[start : start + len(x)] = np.stack([mean, np.sqrt(np.square(x).mean(1)), np.abs(x).max(1)], 1)
    return levels


def as_splits(clips: Clips, length: int, normalise: str | None) -> tuple[Split, Split, Split]:
    """Training, validation and test, brought to the level that `normalise` names.

    "rms": each clip to mean 0 and a level of 0.1, "peak": each to a largest sample of 1, "standard": all with the mean
    and the deviation of the training clips (as S4 does, but with one number for all moments), None: as recorded.
    """
    count, samples = len(clips), clips.audio.shape[1]
    mean, level, peak = clips.levels.astype(np.float64).T
    scale, shift = np.ones(count), np.zeros(count)
    if normalise == "standard":
        train = clips.split == 0
        centre = mean[train].mean()
        deviation = np.sqrt((level[train] ** 2 + mean[train] ** 2).mean() - centre**2)
        scale[:], shift[:] = 1 / max(deviation, 1e-9), -centre / max(deviation, 1e-9)
    elif normalise == "rms":
        scale = np.minimum(LEVEL / np.maximum(level, 1e-9), 1 / np.maximum(peak, 1e-9))  # loud peaks are never clipped
        scale = np.where(peak > 0, scale, 1.0)
        shift = -mean * scale
    elif normalise == "peak":
        largest = np.maximum(np.abs(peak), 1e-9)
        scale = np.where(peak > 0, 1 / largest, 1.0)
        shift = -mean * scale
    place = np.arange(count) if clips.place is None else clips.place
    offsets = np.arange(len(clips.audio) + 1, dtype=np.int64) * samples
    labels, scales, shifts = np.zeros(len(clips.audio), np.int64), np.ones(len(clips.audio)), np.zeros(len(clips.audio))
    labels[place], scales[place], shifts[place] = clips.label, scale / 32768, shift
    whole = Split(clips.audio.reshape(-1), offsets, labels, length, scale=scales, shift=shifts)
    train_part, valid, test = (whole.select(place[clips.split == number]) for number in range(3))
    return train_part, valid, test


def one_second(samples: np.ndarray, rate: int) -> np.ndarray:
    """The clip cut, or padded with silence, to `rate` samples."""
    result = np.zeros(rate, np.int16)
    result[: min(len(samples), rate)] = samples[:rate]
    return result


def write_audio(path: Path, clips: Iterable[np.ndarray]) -> int:
    """Write clips one after the other into a file of raw int16, whole or not at all; how many there were."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for clip in clips:
                file.write(clip.astype("<i2").tobytes())
                count += 1
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); free the disk or pass another root.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return count


def map_audio(path: Path, count: int, samples: int) -> np.ndarray:
    """The clips of such a file, (count, samples), mapped. Raises `DataError` when its size is another."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}). Delete the files beside it, and make it anew."
        ) from error
    if size != 2 * count * samples:
        raise DataError(f"{path} has {size:,} bytes; wanted {2 * count * samples:,}. Delete it, and it is made again.")
    return np.memmap(path, "<i2", "r", shape=(count, samples))
