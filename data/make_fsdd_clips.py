"""Make `fsdd_clips.npz`: twenty recordings of the Free Spoken Digit Dataset, for listening without a network.

    LONGSEQ_DATA=FOLDER python data/make_fsdd_clips.py [FILE]

FOLDER holds the dataset (see `data/README.md`); without it, it is downloaded. Two clips of each digit, all take 0
and therefore of the official test, chosen by a rule that looks at no sound and no model: the six speakers take
turns. The samples are unchanged. The dataset is by Z. Jackson and contributors, licence CC BY-SA 4.0, and so is
the file made here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from longseq_tutorial.tasks import fsdd
from longseq_tutorial.tasks.packs import write_npz

TAKE = 0  # takes 0 to 4 are the official test: no training sees them
PER_DIGIT = 2


def main(path: Path) -> None:
    recordings = fsdd.find()
    chosen = [
        _clip(recordings, digit, (PER_DIGIT * digit + i) % len(recordings.speakers))
        for digit in range(10)
        for i in range(PER_DIGIT)
    ]
    clips = [recordings.audio[recordings.offsets[i] : recordings.offsets[i + 1]] for i in chosen]
    arrays = {
        "audio": np.concatenate(clips),
        "offsets": np.cumsum([0] + [len(clip) for clip in clips], dtype=np.int64),
        "digit": recordings.digit[chosen],
        "speaker": recordings.speaker[chosen],
        "speakers": recordings.speakers,
        "take": recordings.take[chosen],
        "sample_rate": np.array(fsdd.RATE, dtype=np.int64),
    }
    write_npz(path, arrays)
    print(f"{path}: {len(clips)} clips, {path.stat().st_size / 1024:.0f} KiB")


def _clip(recordings: fsdd.Recordings, digit: int, speaker: int) -> int:
    found = (recordings.digit == digit) & (recordings.speaker == speaker) & (recordings.take == TAKE)
    return int(np.flatnonzero(found)[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "fsdd_clips.npz")
