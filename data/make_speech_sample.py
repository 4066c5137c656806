"""Make `speech_sample_8k.npz.xz`: the digits zero to nine in many synthetic voices, with espeak-ng.

    python data/make_speech_sample.py [FILE]

Needs the program espeak-ng (`apt install espeak-ng`; the committed file was made with version 1.51). The same
version gives the same file: the voices are drawn from a fixed seed, and espeak-ng repeats itself exactly.

A speaker here is an accent with a voice variant, a pitch and a rate. Each speaks the ten digits once. Variants,
that is timbres, are dealt to training, validation or test, so the test is spoken in voices never heard before.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longseq_tutorial.tasks.packs import write_npz
from longseq_tutorial.tasks.speech import DIGITS

RATE = 8_000  # samples a second in the file
MU = 8.0  # of the companding: fine steps for quiet samples, coarse ones for loud
SPEAKERS = {"train": 72, "valid": 12, "test": 12}
ACCENTS = ("en-us", "en-us-nyc", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
VARIANTS = {
    "train": ("m1", "m3", "m4", "m7", "m8", "f1", "f2", "f4", "klatt", "klatt3", "Alicia", "Andy", "Denis",
              "Diogo", "Hugo", "Lee", "Mike", "anika", "belinda", "grandma", "grandpa", "norbert", "rob",
              "sandro", "shelby", "travis", "zac"),
    "valid": ("m2", "m6", "f3", "Annie", "klatt2", "steph"),
    "test": ("m5", "f5", "Jacky", "linda", "victor", "klatt4"),
}  # fmt: skip


def main(path: Path) -> None:
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed; `apt install espeak-ng` (or your system's package) mends that.")
    rng = np.random.default_rng(2021)
    clips, digit, speaker, split, names = [], [], [], [], []
    for number, (part, count) in enumerate(SPEAKERS.items()):
        for index in tqdm(range(count), desc=part, unit="speaker"):
            accent = ACCENTS[index % len(ACCENTS)]
            variant = VARIANTS[part][index % len(VARIANTS[part])]
            pitch, speed = int(rng.integers(25, 76)), int(rng.integers(160, 241))
            for label, word in enumerate(DIGITS):
                clips.append(trim(resample(*speak(word, f"{accent}+{variant}", pitch, speed))))
                digit.append(label)
                speaker.append(len(names))
                split.append(number)
            names.append(f"{accent}+{variant} pitch {pitch} rate {speed}")

    coded = [compand(clip) for clip in clips]
    arrays = {
        "q": np.concatenate(coded),
        "offsets": np.cumsum([0] + [len(clip) for clip in coded], dtype=np.int64),
        "mu": np.array(MU, dtype=np.float32),
        "digit": np.array(digit, dtype=np.uint8),
        "speaker": np.array(speaker, dtype=np.uint8),
        "speakers": np.array(names),
        "split": np.array(split, dtype=np.uint8),
        "sample_rate": np.array(RATE, dtype=np.int64),
    }
    write_npz(path, arrays)
    seconds = len(arrays["q"]) / RATE
    print(f"{path}: {len(clips)} clips, {seconds:.0f} s, {path.stat().st_size / 2**20:.2f} MiB")


def speak(text: str, voice: str, pitch: int, speed: int) -> tuple[np.ndarray, int]:
    """What espeak-ng says: float samples in [-1, 1], and their rate."""
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", text]
    sound = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(sound)) as file:
        rate = file.getframerate()
        samples = file.readframes(len(sound) // 2)  # the header of a streamed file does not know its length
    return np.frombuffer(samples, dtype="<i2") / 32768, rate


def resample(x: np.ndarray, rate: int, half_width: int = 32) -> np.ndarray:
    """Band-limited interpolation at 8 kHz: a windowed sinc that passes what lies below 3.8 kHz.

    Sample n of the result is the sum of x[k] h(n rate / RATE - k), with h the low-pass filter.
    """
    times = np.arange(int(len(x) * RATE / rate)) * rate / RATE
    taps = np.arange(-half_width + 1, half_width + 1)
    places = np.floor(times).astype(int)[:, None] + taps  # (samples, taps)
    distance = times[:, None] - places
    cutoff = 2 * 3_800 / rate  # as a share of the old Nyquist frequency
    window = np.i0(9.0 * np.sqrt(np.clip(1 - (distance / half_width) ** 2, 0, None))) / np.i0(9.0)
    kernel = cutoff * np.sinc(cutoff * distance) * window
    padded = np.pad(x, half_width)
    return (padded[places + half_width] * kernel).sum(axis=1)


def trim(x: np.ndarray, margin: float = 0.01) -> np.ndarray:
    """Cut the silence at both ends (below 1 % of the peak), but for `margin` seconds."""
    loud = np.flatnonzero(np.abs(x) > 0.01 * np.abs(x).max())
    pad = int(margin * RATE)
    return x[max(loud[0] - pad, 0) : loud[-1] + pad]


def compand(x: np.ndarray) -> np.ndarray:
    """One byte a sample: sign(x) log(1 + mu |x|) / log(1 + mu), with the peak at 127."""
    x = x / np.abs(x).max()
    return np.round(127 * np.sign(x) * np.log1p(MU * np.abs(x)) / np.log1p(MU)).astype(np.int8)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "speech_sample_8k.npz.xz")
