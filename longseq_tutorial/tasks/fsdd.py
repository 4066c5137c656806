"""The Free Spoken Digit Dataset: found on this machine, or downloaded, and checked to be the real one.

3,000 recordings of the digits zero to nine, 50 takes by each of 6 speakers, 8 kHz, 16 bit, mono, by Z. Jackson
and contributors, https://github.com/Jakobovski/free-spoken-digit-dataset, licence CC BY-SA 4.0. The
whole is not part of this repository.

It is looked for as a pack, `fsdd_8k.npz.xz` (one flat array of samples, described in `data/README.md`), or as
the official `recordings` folder of WAV files. GitHub makes its archives anew from time to time, so their bytes
have no lasting checksum; what is checked is a SHA-256 over the decoded recordings and their names.
"""

from __future__ import annotations

import hashlib
import io
import re
import tempfile
import wave
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .base import DataError, DataNotFound, read_folders, write_folder
from .packs import FAULTS, read_npz, write_npz

COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"  # of 2024-05-02
PAGE = "https://github.com/Jakobovski/free-spoken-digit-dataset"
ARCHIVE = f"{PAGE}/archive/{COMMIT}.zip"
FINGERPRINT = "5322a890831e768963f5c8df2669fa196e2f77ffbc4515222a10dfc0424a1f89"
PACK = "fsdd_8k.npz.xz"
RATE = 8_000
CLIPS = 3_000
_NAME = re.compile(r"(\d)_([a-z]+)_(\d{1,2})\.wav")  # digit, speaker, take
_INSIDE = ("recordings", "fsdd/recordings", "free-spoken-digit-dataset*/recordings", "fsdd", ".")
_LARGEST = 1_000_000  # bytes of a single WAV file; the largest real one has 37 kB
_FORM = {
    "audio": ("int16", 1), "offsets": ("int64", 1), "digit": ("uint8", 1), "speaker": ("uint8", 1),
    "speakers": ("U", 1), "take": ("uint8", 1), "sample_rate": ("int64", 0),
}  # fmt: skip


@dataclass(frozen=True)
class Recordings:
    """The recordings: clip i is `audio[offsets[i] : offsets[i + 1]]`, take `take[i]` of `digit[i]`."""

    audio: np.ndarray  # (samples,) int16
    offsets: np.ndarray  # (clips + 1,) int64
    digit: np.ndarray  # (clips,) uint8
    speaker: np.ndarray  # (clips,) uint8, the place in speakers
    speakers: np.ndarray  # (speakers,) text
    take: np.ndarray  # (clips,) uint8

    def __len__(self) -> int:
        return len(self.digit)

    def name(self, index: int) -> str:
        """The official file name of a clip."""
        return f"{self.digit[index]}_{self.speakers[self.speaker[index]]}_{self.take[index]}.wav"


def find(root: str | Path | None = None, *, download: bool = True, verify: bool = True) -> Recordings:
    """The recordings from a pack or a folder of WAV files in the data folders, else downloaded.

    root: see `base.read_folders`. download: False never touches the network. verify: check that they are the
    official 3,000, sample by sample; False takes any recordings of the same form.
    Raises `DataNotFound` when there are none, `DataError` when what is there is broken or not the official set.
    """
    for folder in read_folders(root):
        if (folder / PACK).exists():
            return _checked(read_pack(folder / PACK), folder / PACK, verify)
        for pattern in _INSIDE:
            for inner in sorted(folder.glob(pattern)) if pattern != "." else [folder]:
                if any(_NAME.fullmatch(path.name) for path in inner.glob("?_*_*.wav")):
                    return _checked(read_wavs(inner), inner, verify)
    if not download:
        raise DataNotFound(f"the Free Spoken Digit Dataset is not here. {_advice(root)}")
    return fetch(root)


def fetch(root: str | Path | None = None) -> Recordings:
    """Download the official archive (about 16 MB), check its recordings and keep them as a pack.

    Nothing is unpacked to the disk: the recordings are read out of the archive by their names.
    Raises `DataNotFound` without a network.
    """
    try:
        import pooch
    except ImportError:
        raise DataNotFound(f"downloading needs pooch: run `pip install pooch`. {_advice(root)}") from None
    folder = write_folder(root)
    pooch.get_logger().setLevel("WARNING")
    try:
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".fsdd-")
    except OSError as error:
        raise DataError(f"cannot write into {folder} ({error.strerror}); pass another root.") from error
    with temporary as scratch:
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=20)
        try:
            archive = pooch.retrieve(ARCHIVE, known_hash=None, path=scratch, downloader=downloader)
        except OSError as error:  # what requests raises, and a full disk
            why = type(error).__name__
            raise DataNotFound(f"could not download {ARCHIVE} ({why}). {_advice(root)}") from error
        recordings = _checked(read_zip(Path(archive)), ARCHIVE, verify=True)
    arrays = {key: getattr(recordings, key) for key in _FORM if key != "sample_rate"}
    write_npz(folder / PACK, arrays | {"sample_rate": np.array(RATE, dtype=np.int64)})
    return recordings


def _advice(root: str | Path | None) -> str:
    place = "root" if root is not None else "LONGSEQ_DATA"
    return (
        f"With a network, run `python -m longseq_tutorial.data get speech`; without, put {PACK} or the "
        f"`recordings` folder of {PAGE} into a folder and name it in {place}, or use source='sample'."
    )


def read_pack(path: Path) -> Recordings:
    """Recordings from a pack. Raises `DataError` where the file or its arrays are not right."""
    mend = "Delete it or put a good copy in its place."
    arrays = read_npz(path, _FORM, mend)
    rate = int(arrays.pop("sample_rate"))
    recordings = Recordings(**arrays)
    offsets, clips = recordings.offsets, len(recordings)
    faults = {
        f"sample_rate is {rate}, wanted {RATE}": rate != RATE,
        "there are no clips": clips == 0,
        f"digit, speaker, take and offsets disagree on the number of clips ({clips}, {len(recordings.speaker)}, "
        f"{len(recordings.take)}, {len(offsets) - 1})": not (
            clips == len(recordings.speaker) == len(recordings.take) == len(offsets) - 1
        ),
        f"offsets do not rise from 0 to the {len(recordings.audio):,} samples": len(offsets) == 0
        or offsets[0] != 0
        or offsets[-1] != len(recordings.audio)
        or bool((np.diff(offsets) < 1).any()),
        "a digit is above 9": bool((recordings.digit > 9).any()),
        f"a speaker is outside the {len(recordings.speakers)} names": bool(
            (recordings.speaker >= len(recordings.speakers)).any()
        ),
    }
    for fault, there in faults.items():
        if there:
            raise DataError(f"{path}: {fault}. {mend}")
    return recordings


def read_wavs(folder: Path) -> Recordings:
    """Recordings from a folder of files named `digit_speaker_take.wav`; other files are left alone."""
    paths = [path for path in sorted(folder.glob("*.wav")) if _NAME.fullmatch(path.name)]
    bar = tqdm(paths, desc="reading recordings", unit="clip", leave=False, delay=2)
    return _gather((path.name, decode_wav(_read(path), str(path))) for path in bar)


def read_zip(path: Path) -> Recordings:
    """Recordings from the official archive, read by name without unpacking it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [
                info
                for info in archive.infolist()
                if _NAME.fullmatch(info.filename.rsplit("/", 1)[-1]) and info.file_size <= _LARGEST
            ]
            members.sort(key=lambda info: info.filename)
            return _gather(
                (info.filename.rsplit("/", 1)[-1], decode_wav(archive.read(info), f"{path}: {info.filename}"))
                for info in members
            )
    except DataError:
        raise
    except FAULTS as error:
        raise DataError(f"{path} is not a whole zip archive ({error}). Download it again.") from error


def decode_wav(content: bytes, where: str, rate: int = RATE) -> np.ndarray:
    """The int16 samples of a 16-bit, mono WAV file of that rate. Raises `DataError` naming `where` otherwise."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            got = (file.getframerate(), 8 * file.getsampwidth(), file.getnchannels())
            promised, frames = file.getnframes(), file.readframes(file.getnframes())
    except (wave.Error, EOFError, ValueError, RuntimeError) as error:
        raise DataError(f"{where} is not a whole WAV file ({error or 'cut off'}). Fetch it again.") from error
    if got != (rate, 16, 1):
        raise DataError(f"{where}: wanted {rate} Hz, 16 bit, 1 channel; got {got[0]} Hz, {got[1]} bit, {got[2]}.")
    if promised == 0 or len(frames) != 2 * promised:
        raise DataError(f"{where} is cut off: {len(frames) // 2} of {promised} samples. Fetch it again.")
    return np.frombuffer(frames, dtype="<i2").astype(np.int16)


def fingerprint(recordings: Recordings) -> str:
    """SHA-256 over the recordings in the order of their names: name, number of samples, samples."""
    digest = hashlib.sha256()
    audio = recordings.audio.astype("<i2", copy=False)
    for name, index in sorted((recordings.name(index), index) for index in range(len(recordings))):
        clip = audio[recordings.offsets[index] : recordings.offsets[index + 1]]
        digest.update(f"{name} {len(clip)}\n".encode())
        digest.update(clip.tobytes())
    return digest.hexdigest()


def _checked(recordings: Recordings, where: Path | str, verify: bool) -> Recordings:
    if verify and fingerprint(recordings) != FINGERPRINT:
        raise DataError(
            f"{where} does not hold the official recordings: {len(recordings):,} clips of {CLIPS:,}, with other "
            "names or samples. Delete it to download them afresh, or pass verify=False to use what is there."
        )
    return recordings


def _gather(clips: Iterable[tuple[str, np.ndarray]]) -> Recordings:
    """Put named clips into one flat array. Raises `DataError` when there are none."""
    fields, pieces = [], []
    for name, clip in clips:
        match = _NAME.fullmatch(name)
        if match:
            fields.append(match.groups())
            pieces.append(clip)
    if not pieces:
        raise DataError("found no recording named like 7_theo_12.wav (digit, speaker, take).")
    keys = [(int(digit), name, int(take)) for digit, name, take in fields]
    if len(set(keys)) < len(keys):
        digit, name, take = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"there are two recordings {digit}_{name}_{take}.wav; keep one of them.")
    digits, names, takes = zip(*keys, strict=True)
    speakers, speaker = np.unique(np.array(names), return_inverse=True)
    if len(speakers) > 256:
        raise DataError(f"wanted at most 256 speakers; got {len(speakers)}.")
    return Recordings(
        audio=np.concatenate(pieces),
        offsets=np.cumsum([0] + [len(piece) for piece in pieces], dtype=np.int64),
        digit=np.array(digits, dtype=np.uint8),
        speaker=speaker.astype(np.uint8),
        speakers=speakers,
        take=np.array(takes, dtype=np.uint8),
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} has over {_LARGEST:,} bytes; a recording of one digit has fewer.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
