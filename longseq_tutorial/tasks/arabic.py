"""Arabic Speech Commands: found on this machine, as a copy of the authors' repository or as packs.

12,000 recordings of 40 Arabic words by 30 speakers, ten times each, exactly a second at 16 kHz, by A. Ghandoura,
F. Hjabo and O. Al Dakkak (Engineering Applications of Artificial Intelligence, 2021), licence CC BY 4.0. The official
parts, in three CSV files, share no speaker. The shape is that of Speech Commands.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .base import DataError, DataNotFound, read_folders
from .clips import Clips, measure, one_second, read_pack
from .fsdd import decode_wav

PAGE = "https://github.com/abdulkaderghandoura/arabic-speech-commands-dataset"
PACKS = ("asc20a_16k.npz.bz2", "asc20b_16k.npz.bz2")
WORDS20 = tuple(
    "zero one two three four five six seven eight nine yes no up down left right start stop forward backward".split()
)
RATE = 16_000
FILES = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
CLIPS = {"train": 180, "valid": 60, "test": 60}  # of each word: 18, 6 and 6 speakers, ten times each
_INSIDE = ("", "arabic-speech-commands-dataset", "arabic-speech-commands-dataset-master", "arabic_speech_commands")
_WAV = re.compile(r"(?:\w+/)?([A-Za-z][A-Za-z _]{0,19})/([\w-]{1,60}\.wav)")  # dataset/zoom in/speaker_.._take.wav
_LARGEST = 2_000_000
_MEND = "Fetch it again."


def find(root: str | Path | None = None, words: int = 20, *, verify: bool = True) -> tuple[Clips, str]:
    """The clips of 20 or 40 words, and what they are.

    verify: check that the official number of each word is in each part; False takes any number.
    Raises `DataNotFound` when there are none, `DataError` when what is there is broken or incomplete.
    """
    said = (
        f"Arabic Speech Commands, {words} words{{}}{'' if verify else ', unverified'}, official speaker-disjoint parts"
    )
    folders = read_folders(root)
    for folder in folders:
        for inner in _INSIDE:
            home = folder / inner
            if all((home / name).exists() for name in FILES.values()):
                return _checked(read_folder(home, words), home, verify), said.format("")
        if (folder / PACKS[0]).exists():
            return _checked(_read_packs(folder, words), folder, verify), said.format(" (8-bit copy)")
    place = "root" if root is not None else "LONGSEQ_DATA"
    raise DataNotFound(
        f"found no Arabic Speech Commands in {' or '.join(map(str, folders))}. Run `git clone {PAGE}` (390 MB) in a "
        f"folder and name that folder in {place}, or put {PACKS[0]} there."
    )


def _checked(clips: Clips, where: Path, verify: bool) -> Clips:
    for part, (name, wanted) in enumerate(CLIPS.items()):
        counts = np.bincount(clips.label[clips.split == part], minlength=len(clips.words))
        if verify and (counts != wanted).any():
            word = int(np.argmax(counts != wanted))
            raise DataError(
                f"{where}: wanted {wanted} clips of each word in the {name} part; got {counts[word]:,} of "
                f"{clips.words[word]!r}. {_MEND[:-1]}, or pass verify=False to use what is there."
            )
    return clips


def _read_packs(folder: Path, words: int) -> Clips:
    form = {"split": ("uint8", 1), "speaker": ("int32", 1)}
    parts = [read_pack(folder / name, form) for name in (PACKS if words == 40 else PACKS[:1])]
    first = parts[0][0]
    if len(parts) == 1:
        return first
    second = parts[1][0]
    if set(first.words) & set(second.words) or first.rate != second.rate:
        raise DataError(f"{folder}: {' and '.join(PACKS)} must hold other words at one rate. {_MEND}")
    return Clips(
        np.concatenate([first.audio, second.audio]),
        np.concatenate([first.label, second.label + np.uint8(len(first.words))]),
        np.concatenate([first.split, second.split]),
        first.words + second.words,
        first.rate,
        np.concatenate([first.levels, second.levels]),
    )


def read_folder(folder: Path, words: int) -> Clips:
    """Clips from a copy of the authors' repository, by its three CSV files. Raises `DataError` for the first fault."""
    rows = [(part, *row) for part, name in enumerate(FILES.values()) for row in _read_csv(folder / name)]
    found = sorted({word for _, word, _, _ in rows})
    known = WORDS20 if words == 20 else WORDS20 + tuple(word for word in found if word not in WORDS20)
    rows = [row for row in rows if row[1] in known]
    speakers: dict[str, int] = {}
    for part, _, name, _ in rows:
        speaker = re.split(r"[_-]", name)[0]
        if speakers.setdefault(speaker, part) != part:
            raise DataError(
                f"{folder}: speaker {speaker} is in {list(FILES)[speakers[speaker]]} and {list(FILES)[part]}."
            )
    paths = [path for *_, path in rows]
    if len(set(paths)) < len(paths):
        raise DataError(f"{folder}: {Counter(paths).most_common(1)[0][0]} is named twice in its CSV files. {_MEND}")
    if len(known) != words or {row[1] for row in rows} != set(known):
        raise DataError(f"{folder}: wanted {words} words; got {len(found)}: {', '.join(found)[:80]}. {_MEND}")
    audio = np.empty((len(rows), RATE), np.int16)
    for i, (_, word, name, path) in enumerate(tqdm(rows, desc="reading recordings", unit="clip", leave=False, delay=2)):
        try:
            if path.stat().st_size > _LARGEST:
                raise DataError(f"{path} has over {_LARGEST:,} bytes; a clip of a second has fewer.")
            audio[i] = one_second(decode_wav(path.read_bytes(), str(path), RATE), RATE)
        except OSError as error:
            raise DataError(f"cannot read {word}/{name} at {path}: {error.strerror}. {_MEND}") from error
    label = np.array([known.index(word) for _, word, _, _ in rows], np.uint8)
    return Clips(audio, label, np.array([part for part, *_ in rows], np.uint8), known, RATE, measure(audio))


def _read_csv(path: Path) -> list[tuple[str, str, Path]]:
    """Word, file name and place of each clip in a CSV file with a column of files and one of classes."""
    try:
        table = list(csv.reader(io.StringIO(path.read_text("utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path} ({error}). {_MEND}") from error
    header = bool(table) and not any("/" in cell or "\\" in cell for cell in table[0])  # no paths
    rows = []
    for number, cells in enumerate(table[header:], start=1 + header):
        if not any(cell.strip() for cell in cells):
            continue
        matches = [_WAV.fullmatch(cell.strip().removeprefix("./").replace("\\", "/")) for cell in cells]
        match = next((m for m in matches if m), None)
        if match is None:
            raise DataError(
                f"{path}, row {number}: wanted a file such as dataset/yes/name.wav; got {cells[:2]}. {_MEND}"
            )
        word, name = match.groups()
        if len(cells) > 1 and word not in [cell.strip() for cell in cells]:
            raise DataError(f"{path}, row {number}: {word}/{name} is labelled {cells[1]!r}. {_MEND}")
        places = [path.parent / inner / word / name for inner in ("dataset", "dataset/dataset", ".")]
        rows.append((word, name, next((place for place in places if place.exists()), places[0])))
    if not rows:
        raise DataError(f"{path} names no recordings. {_MEND}")
    return rows
