"""Speech Commands: the official archive, found or downloaded, and the packs of parts of it.

105,829 recordings of 35 English words, at most a second at 16 kHz, by P. Warden (arXiv:1804.03209), version 0.02,
licence CC BY 4.0. The archive names its test and its validation files in two lists; the rule behind them is a hash
of the speaker, so that no speaker is in two parts.

SC35 is all words with the official lists. SC10 is ten of them: the published figures for it (S4, CKConv, Mega) drop
clips that are not exactly a second long and split at random, 70 : 15 : 15, so that a speaker may be in all parts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .base import DataError, DataNotFound, read_folders, write_folder
from .clips import Clips, map_audio, measure, one_second, read_pack, write_audio
from .downloads import download as fetch_file
from .downloads import tar_members, whole
from .fsdd import decode_wav
from .packs import read_npz, write_npz

ARCHIVE = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
SHA256 = "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"
RATE = 16_000
COUNTS = {"train": 84_843, "valid": 9_981, "test": 11_005}
WORDS10 = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
WORDS35 = tuple(
    "bed cat down five forward go house left marvin no on right sheila tree up visual yes backward bird dog eight "
    "follow four happy learn nine off one seven six stop three two wow zero".split()
)
# What the packs hold, and what is said of it: never the published tasks.
_RESPLIT = "ten words, the official test clips only, re-split by speaker"
PACKS = {
    "sc10-test": ("sc10_test_16k.npz.xz", f"Speech Commands v0.02, {_RESPLIT}"),
    "sc10-test-8k": ("sc10_test_8k.npz.xz", f"Speech Commands v0.02 at 8 kHz, {_RESPLIT}"),
    "sc3-v001": ("sc3_v001_16k.npz.xz", "Speech Commands v0.01, the words bed, cat and happy, official rule"),
    "sc30-sample": ("sc30_sample_16k.npz.xz", "Speech Commands v0.01, ten clips of each of 30 words, official rule"),
}
_NAME = re.compile(
    r"(?:SpeechCommands/)?(?:speech_commands_v0\.02/)?([a-z]{2,12})/([0-9a-z]{1,16}_nohash_\d{1,3}\.wav)"
)
_LISTS = re.compile(r"(?:SpeechCommands/)?(?:speech_commands_v0\.02/)?(testing|validation)_list\.txt")
_INSIDE = ("", "speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02", "speech_commands")
_LARGEST = 2_000_000  # bytes of a single file; a clip has 32 kB, a list 250 kB
_MEND = "Delete it, and it is fetched again."
_INDEX_FORM = {
    "names": ("U", 1), "label": ("uint8", 1), "part": ("uint8", 1), "length": ("int32", 1), "levels": ("float32", 2),
    "by_lists": ("bool", 0),
}  # fmt: skip


@dataclass(frozen=True)
class Archive:
    """All 35 words. `part` is 0, 1, 2 by the official lists, or by the rule where there are no lists."""

    audio: np.ndarray  # (n, 16000) int16, mapped
    names: np.ndarray  # (n,) "word/speaker_nohash_k.wav"
    label: np.ndarray  # (n,) uint8, the place in WORDS35
    part: np.ndarray  # (n,) uint8
    length: np.ndarray  # (n,) int32 samples before padding
    levels: np.ndarray  # (n, 3), see Clips
    by_lists: np.ndarray  # () bool: whether the lists were there


def hash_part(name: str) -> int:
    """The official rule: 0 training, 1 validation (10 %), 2 test (10 %), by a hash of what stands before `_nohash_`."""
    speaker = re.sub(r"_nohash_.*$", "", name.rsplit("/", 1)[-1])
    number = int(hashlib.sha1(speaker.encode()).hexdigest(), 16) % 2**27
    percentage = number * 100 / (2**27 - 1)
    return 1 if percentage < 10 else 2 if percentage < 20 else 0


def find(root: str | Path | None = None, *, download: bool = True, verify: bool = True) -> Archive:
    """The official recordings: as read before, from a folder or the archive in the data folders, or downloaded.

    Reading the archive takes some minutes and leaves two files behind, `speech_commands.i16` (3.4 GB) and
    `speech_commands.npz`, which later calls map into memory.
    Raises `DataNotFound` when there are none, `DataError` when what is there is broken or incomplete (with verify).
    """
    own = write_folder(root)
    for folder in dict.fromkeys([*read_folders(root), own]):
        if (folder / "speech_commands.npz").exists():
            return _checked(_read_index(folder), folder / "speech_commands.npz", verify)
    for folder in read_folders(root):
        for inner in _INSIDE:
            home = folder / inner
            if any(next((home / word).glob("*_nohash_*.wav"), None) for word in WORDS35):
                return _make(_from_folder(home), own, home, verify)
        archive = folder / ARCHIVE.rsplit("/", 1)[-1]
        if archive.exists():
            return _make(_from_archive(archive), own, archive, verify)
    if not download:
        raise DataNotFound(f"Speech Commands is not here. {advice(root)}")
    archive = fetch_file(ARCHIVE, f"sha256:{SHA256}", own, advice(root))
    made = _make(_from_archive(archive), own, archive, verify)
    archive.unlink()
    return made


def advice(root: str | Path | None) -> str:
    """What to do where there are no recordings."""
    place = "root" if root is not None else "LONGSEQ_DATA"
    return (
        "With a network and 6 GB of disk, run `python -m longseq_tutorial.data get speech source=sc35`; without, "
        f"put {ARCHIVE.rsplit('/', 1)[-1]} or its unpacked folder speech_commands_v0.02 into a folder and name it in "
        f"{place}."
    )


def select(archive: Archive, words: tuple[str, ...], *, random_split: bool = False, seed: int = 0) -> Clips:
    """The clips of some words, labelled in that order.

    random_split: drop clips that are not exactly a second long and divide the rest 70 : 15 : 15 within each word, as
    the published SC10 does (its exact draw is not repeated); else the official parts.
    """
    place = np.array([words.index(word) if word in words else -1 for word in WORDS35])
    label = place[archive.label]
    chosen = np.flatnonzero((label >= 0) & ((archive.length == RATE) | (not random_split)))
    if not len(chosen):
        raise DataError(f"there are no clips of the words {', '.join(words)}.")
    label, part = label[chosen], archive.part[chosen]
    if random_split:
        rng = np.random.default_rng([seed, 10])
        part = np.zeros(len(chosen), np.uint8)
        for word in range(len(words)):
            rows = np.flatnonzero(label == word)
            rows = rng.permutation(rows[np.argsort(archive.names[chosen[rows]])])  # however they came
            part[rows[: round(0.15 * len(rows))]] = 2
            part[rows[round(0.15 * len(rows)) : round(0.3 * len(rows))]] = 1
    return Clips(archive.audio, label.astype(np.uint8), part, words, RATE, archive.levels[chosen], chosen)


def find_pack(source: str, root: str | Path | None = None) -> tuple[Clips, str]:
    """One of `PACKS` from the data folders, and what it is. Raises `DataNotFound` when it is not there."""
    name, described = PACKS[source]
    folders = read_folders(root)
    path = next((folder / name for folder in folders if (folder / name).exists()), None)
    if path is None:
        raise DataNotFound(f"found no {name} in {' or '.join(map(str, folders))}; this source is for who has the pack.")
    has_split = source != "sc30-sample"
    clips, extra = read_pack(path, {"filename": ("U", 1)} | ({"split": ("uint8", 1)} if has_split else {}))
    split = extra["split"] if has_split else np.array([hash_part(str(file)) for file in extra["filename"]], np.uint8)
    return replace(clips, split=split), described


# --- reading -----------------------------------------------------------------------------------------------------

_Files = Iterable[tuple[str, bytes]]


def _from_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    members = tar_members(
        path, lambda name: bool(_NAME.fullmatch(name) or _LISTS.fullmatch(name)), _LARGEST, _MEND, "reading recordings"
    )
    for name, file, size in members:
        yield name, whole(file, size, f"{path}: {name}", _MEND)


def _from_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    paths = [*folder.glob("*_list.txt"), *(path for word in WORDS35 for path in sorted((folder / word).glob("*.wav")))]
    for path in tqdm(paths, desc="reading recordings", unit="clip", leave=False, delay=2):
        try:
            if path.stat().st_size > _LARGEST:
                raise DataError(f"{path} has over {_LARGEST:,} bytes; a clip of a second has fewer.")
            yield path.relative_to(folder).as_posix(), path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}.") from error


def _make(files: _Files, own: Path, where: Path, verify: bool) -> Archive:
    """Write the clips and the index of them into `own`, the index last: where it is, the clips are whole."""
    names: list[str] = []
    seen: set[str] = set()
    lengths: list[int] = []
    levels: list[np.ndarray] = []
    lists: dict[str, set[str]] = {}

    def clips() -> Iterator[np.ndarray]:
        for name, content in files:
            if match := _LISTS.fullmatch(name):
                lists[match[1]] = set(content.decode("utf-8", "replace").split())
            elif (match := _NAME.fullmatch(name)) and match[1] in WORDS35:
                samples = decode_wav(content, f"{where}: {name}", RATE)
                names.append(f"{match[1]}/{match[2]}")
                if names[-1] in seen:
                    raise DataError(f"{where}: there are two clips {names[-1]}. {_MEND}")
                seen.add(names[-1])
                lengths.append(len(samples))
                clip = one_second(samples, RATE)
                levels.append(measure(clip[None])[0])
                yield clip

    count = write_audio(own / "speech_commands.i16", clips())
    try:
        return _indexed(own, where, verify, count, names, lengths, levels, lists)
    except DataError:
        (own / "speech_commands.i16").unlink(missing_ok=True)  # 3.4 GB that nothing would read
        raise


def _indexed(
    own: Path,
    where: Path,
    verify: bool,
    count: int,
    names: list[str],
    lengths: list[int],
    levels: list[np.ndarray],
    lists: dict[str, set[str]],
) -> Archive:
    """The index of the clips that were written, once they are found to be right."""
    if not count:
        raise DataError(f"{where} holds no recording named like yes/0a7c2a8d_nohash_0.wav. {_MEND}")
    if len(lists) == 1:
        raise DataError(f"{where} lacks testing_list.txt or validation_list.txt. {_MEND}")
    by_lists = bool(lists)
    if not by_lists:  # the rule gives the same parts
        for part_name, number in (("validation", 1), ("testing", 2)):
            lists[part_name] = {name for name in names if hash_part(name) == number}
    missing = sorted((lists["testing"] | lists["validation"]) - set(names))
    if missing:
        raise DataError(
            f"{where}: {len(missing):,} clips of the lists are not there, first {missing[0][:60]!r}. {_MEND}"
        )
    both = sorted(lists["testing"] & lists["validation"])
    if both:
        raise DataError(f"{where}: {both[0]} stands in both lists. {_MEND}")
    part = [2 if name in lists["testing"] else 1 if name in lists["validation"] else 0 for name in names]
    index = {
        "names": np.array(names),
        "label": np.array([WORDS35.index(name.split("/")[0]) for name in names], np.uint8),
        "part": np.array(part, np.uint8),
        "length": np.array(lengths, np.int32),
        "levels": np.array(levels, np.float32),
        "by_lists": np.array(by_lists),
    }
    archive = Archive(map_audio(own / "speech_commands.i16", count, RATE), **index)
    _checked(archive, where, verify)
    write_npz(own / "speech_commands.npz", index)
    return archive


def _read_index(folder: Path) -> Archive:
    path = folder / "speech_commands.npz"
    index = read_npz(path, _INDEX_FORM, "Delete it, and it is made again.")
    if (
        {len(array) for name, array in index.items() if name != "by_lists"} != {len(index["names"])}
        or len(index["names"]) == 0
        or index["levels"].shape[1] != 3
        or index["part"].max() > 2
        or index["label"].max() > 34
    ):
        raise DataError(f"{path}: its arrays do not fit each other. Delete it, and it is made again.")
    return Archive(map_audio(folder / "speech_commands.i16", len(index["names"]), RATE), **index)


def _checked(archive: Archive, where: Path, verify: bool) -> Archive:
    counts = dict(zip(COUNTS, np.bincount(archive.part, minlength=3).tolist(), strict=True))
    if verify and counts != COUNTS:
        raise DataError(
            f"{where} holds {', '.join(f'{n:,}' for n in counts.values())} clips for training, validation and test; "
            f"the official archive has {', '.join(f'{n:,}' for n in COUNTS.values())}. {_MEND[:-1]}, or pass "
            "verify=False to use what is there."
        )
    return archive
