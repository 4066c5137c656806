"""Speech: the sample, the real recordings where they are, every way to find them, and broken ones."""

import io
import lzma
import shutil
import tempfile
import wave
import zipfile
from pathlib import Path

import numpy as np
import pooch
import pytest
import torch

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, collate, fsdd
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound, write_folder
from longseq_tutorial.tasks.packs import read_npz, write_npz
from longseq_tutorial.tasks.speech import DIGITS, SAMPLE, expand, normalised

TAKES = (0, 4, 5, 9, 10, 49)  # two of the test, two of validation, two of training


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """No test here sees the machine's data or network unless it asks for `real_data`."""
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    mine = tmp_path / "data"
    mine.mkdir()
    shutil.copy(REPOSITORY_DATA / SAMPLE, mine)
    for module in ("base", "speech"):
        monkeypatch.setattr(f"longseq_tutorial.tasks.{module}.REPOSITORY_DATA", mine)

    def no_network(*_, **__):
        raise ConnectionError("no network in tests")

    monkeypatch.setattr(pooch, "retrieve", no_network)


def arrays(rng: np.random.Generator | None = None) -> dict[str, np.ndarray]:
    """A small set in the form of FSDD's pack: 10 digits, 2 speakers, 6 takes."""
    rng = rng or np.random.default_rng(0)
    keys = [(d, s, t) for d in range(10) for s in range(2) for t in TAKES]
    lengths = rng.integers(20, 60, len(keys))
    return {
        "audio": rng.integers(-3000, 3000, lengths.sum()).astype(np.int16),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "digit": np.array([d for d, _, _ in keys], np.uint8),
        "speaker": np.array([s for _, s, _ in keys], np.uint8),
        "speakers": np.array(["ann", "bob"]),
        "take": np.array([t for _, _, t in keys], np.uint8),
        "sample_rate": np.array(8_000, np.int64),
    }


def recordings() -> fsdd.Recordings:
    return fsdd.Recordings(**{key: value for key, value in arrays().items() if key != "sample_rate"})


@pytest.fixture
def small(monkeypatch) -> fsdd.Recordings:
    """The small set, taken for the official one."""
    monkeypatch.setattr(fsdd, "FINGERPRINT", fsdd.fingerprint(recordings()))
    return recordings()


def wav(samples: np.ndarray, rate: int = 8_000, width: int = 2, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def write_wavs(data: fsdd.Recordings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(data)):
        (folder / data.name(i)).write_bytes(wav(data.audio[data.offsets[i] : data.offsets[i + 1]]))


# The sample.


def test_sample():
    task = tasks.load("speech", source="sample")
    config = task.config
    assert (config.kind, config.classes, config.sample_rate, config.length) == ("samples", 10, 8_000, 8_000)
    assert config.class_names == DIGITS
    assert config.source == "espeak-ng sample (made by this project)"
    assert (REPOSITORY_DATA / SAMPLE).stat().st_size < 2_000_000
    assert sum(map(len, (task.train, task.valid, task.test))) >= 600
    for split in (task.train, task.valid, task.test):
        assert len(set(np.bincount(split.labels))) == 1  # as many of each digit
        assert split.lengths.min() > 800 and split.lengths.max() <= 8_000
    for x, _ in task.test:
        assert x.dtype == torch.float32 and x.abs().max() <= 1
        assert abs(x.mean()) < 1e-3
        assert float(x.square().mean().sqrt()) == pytest.approx(0.1, rel=1e-3) or x.abs().max() > 0.999


def test_sample_voices_are_not_shared_between_the_parts():
    form = {"speaker": ("uint8", 1), "speakers": ("U", 1), "split": ("uint8", 1)}
    pack = read_npz(REPOSITORY_DATA / SAMPLE, form, "")
    variants = [
        {str(pack["speakers"][s]).split("+")[1].split()[0] for s in pack["speaker"][pack["split"] == part]}
        for part in range(3)
    ]
    assert all(variants)
    assert not (variants[0] & variants[1] or variants[0] & variants[2] or variants[1] & variants[2])


def test_sample_can_be_learned_from_its_waveform():
    """A linear model on a coarse spectrogram: the labels belong to the sounds, and unheard voices are understood."""
    task = tasks.load("speech", source="sample")

    def features(split):
        window = torch.hann_window(256)
        rows = []
        for x, _ in split:
            spectrum = torch.stft(x, 256, 80, window=window, return_complex=True).abs().clamp(min=1e-3).log()
            rows.append(torch.nn.functional.adaptive_avg_pool2d(spectrum[None], (40, 6)).flatten())
        return torch.stack(rows)

    train, test = features(task.train), features(task.test)
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std
    target = torch.nn.functional.one_hot(torch.tensor(task.train.labels), 10).float()
    weights = torch.linalg.solve(train.T @ train + 100 * torch.eye(train.shape[1]), train.T @ (target - 0.1))
    correct = (test @ weights).argmax(1) == torch.tensor(task.test.labels)
    assert correct.float().mean() > 0.85


def test_broken_sample_is_one_clear_line(tmp_path):
    path = tmp_path / "data" / SAMPLE
    path.write_bytes(path.read_bytes()[:50_000])
    with pytest.raises(DataError, match=r"speech_sample_8k.npz.xz is damaged.*git checkout"):
        tasks.load("speech", source="sample")
    path.unlink()
    with pytest.raises(DataError, match="does not exist"):
        tasks.load("speech", source="sample")


# Decoding and levels.


def test_expand_undoes_companding():
    codes = np.arange(-127, 128).astype(np.int8)
    x = expand(codes, 8.0)
    assert x[[0, 127, 254]].tolist() == pytest.approx([-1, 0, 1])
    assert (np.diff(x) > 0).all()
    back = np.round(127 * np.sign(x) * np.log1p(8 * np.abs(x)) / np.log1p(8))
    assert (back == codes).all()


def test_levels():
    rng = np.random.default_rng(0)
    clip = (0.02 * rng.standard_normal(5_000) + 0.01).astype(np.float32)
    assert normalised(clip, None) is clip
    assert np.abs(normalised(clip, "peak")).max() == pytest.approx(1)
    level = normalised(clip, "rms")
    assert (level.mean(), level.std()) == pytest.approx((0, 0.1), abs=1e-6)
    click = np.zeros(5_000, np.float32)
    click[7] = 0.5
    assert np.abs(normalised(click, "rms")).max() <= 1  # a lone click is not driven beyond full scale
    for how in ("rms", "peak"):
        assert not normalised(np.zeros(5, np.float32), how).any()


def test_full_scale_samples_stay_within_one(tmp_path, small):
    data = arrays() | {"audio": np.full(len(arrays()["audio"]), -32768, np.int16)}
    write_npz(tmp_path / fsdd.PACK, data)
    task = tasks.load("speech", root=tmp_path, verify=False, normalise=None)
    assert task.train[0][0].tolist() == [-1.0] * len(task.train[0][0])


# Finding the recordings.


def test_pack_folder_and_archive_hold_the_same(tmp_path, small):
    write_npz(tmp_path / fsdd.PACK, arrays())
    write_wavs(small, tmp_path / "recordings")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        for path in (tmp_path / "recordings").iterdir():
            archive.write(path, f"free-spoken-digit-dataset-26eb9aa/recordings/{path.name}")
        archive.writestr("free-spoken-digit-dataset-26eb9aa/README.md", "hello")
    read = [
        fsdd.read_pack(tmp_path / fsdd.PACK),
        fsdd.read_wavs(tmp_path / "recordings"),
        fsdd.read_zip(tmp_path / "archive.zip"),
    ]
    assert {fsdd.fingerprint(found) for found in read} == {fsdd.FINGERPRINT}


@pytest.mark.parametrize(
    "inner", ["", "recordings", "fsdd/recordings", "free-spoken-digit-dataset-master/recordings", "fsdd"]
)
def test_wav_folders_are_found(tmp_path, small, inner, monkeypatch):
    folder = tmp_path / "copy"
    write_wavs(small, folder / inner)
    (folder / inner / "notes.txt").write_text("left alone")
    monkeypatch.setenv("LONGSEQ_DATA", str(folder))
    task = tasks.load("speech", source="fsdd")
    assert [len(split) for split in (task.train, task.valid, task.test)] == [40, 40, 40]


def test_split_by_takes(tmp_path, small):
    write_npz(tmp_path / fsdd.PACK, arrays())
    task = tasks.load("speech", root=tmp_path, normalise=None)
    data = arrays()

    def clips(*takes):
        chosen = [i for i in range(len(data["take"])) if data["take"][i] in takes]
        return [
            ((data["audio"][data["offsets"][i] : data["offsets"][i + 1]] / 32768).tolist(), data["digit"][i])
            for i in chosen
        ]

    for split, takes in ((task.test, (0, 4)), (task.valid, (5, 9)), (task.train, (10, 49))):
        assert [(x.tolist(), label) for x, label in split] == clips(*takes)
    everything = tasks.load("speech", root=tmp_path, valid_takes=())
    assert [len(split) for split in (everything.train, everything.valid, everything.test)] == [80, 0, 40]
    assert "none held out" in everything.config.source
    short = tasks.load("speech", root=tmp_path, length=30)
    assert short.config.length == 30 and short.train.lengths.max() == 30


def test_other_recordings_only_when_asked(tmp_path):
    write_npz(tmp_path / fsdd.PACK, arrays())
    with pytest.raises(DataError, match=r"does not hold the official recordings: 120 clips of 3,000.*verify=False"):
        tasks.load("speech", root=tmp_path)
    assert "unverified" in tasks.load("speech", root=tmp_path, verify=False).config.source


def test_one_changed_sample_is_noticed(tmp_path, small):
    data = arrays()
    data["audio"][77] += 1
    write_npz(tmp_path / fsdd.PACK, data)
    with pytest.raises(DataError, match="official recordings"):
        fsdd.find(tmp_path)


def test_download_checks_and_keeps_a_pack(small, tmp_path, monkeypatch):
    calls = []

    def retrieve(url, known_hash, path, downloader):
        calls.append(url)
        target = Path(path) / "fsdd.zip"
        with zipfile.ZipFile(target, "w") as archive:
            for i in range(len(small)):
                samples = small.audio[small.offsets[i] : small.offsets[i + 1]]
                archive.writestr(f"../../../escape/recordings/{small.name(i)}", wav(samples))
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    task = tasks.load("speech")
    assert "FSDD" in task.config.source
    assert calls == [fsdd.ARCHIVE] and fsdd.COMMIT in fsdd.ARCHIVE
    assert [path.name for path in write_folder(None).iterdir()] == [fsdd.PACK]  # and nothing escaped
    assert not list(tmp_path.rglob("escape"))
    tasks.load("speech", source="fsdd")
    assert len(calls) == 1  # the second time it is here


def test_a_download_that_is_something_else(monkeypatch, small):
    def retrieve(url, known_hash, path, downloader):
        target = Path(path) / "fsdd.zip"
        target.write_bytes(b"<html>please log in</html>")
        return str(target)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(DataError, match="not a whole zip archive"):
        tasks.load("speech")
    assert not list(write_folder(None).iterdir())


def test_no_network_and_no_copy(capsys):
    task = tasks.load("speech")
    notice = capsys.readouterr().err
    assert task.config.source.startswith("espeak-ng sample")
    assert notice.count("\n") == 1
    assert "ConnectionError" in notice and "LONGSEQ_DATA" in notice and "espeak-ng sample instead" in notice
    for options in ({}, {"download": False}):
        with pytest.raises(DataNotFound, match="get speech"):
            tasks.load("speech", source="fsdd", **options)


def test_download_false_never_calls_pooch(monkeypatch):
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: pytest.fail("the network was asked"))
    assert "sample" in tasks.load("speech", download=False).config.source


def test_a_broken_copy_is_never_passed_over(tmp_path):
    (tmp_path / fsdd.PACK).write_bytes(b"broken")
    with pytest.raises(DataError, match="damaged"):
        tasks.load("speech", root=tmp_path)


# Broken copies.

SHORT_OFFSETS = arrays()["offsets"].copy()
SHORT_OFFSETS[-1] += 1
FALLING = arrays()["offsets"].copy()
FALLING[5] = FALLING[7]
BROKEN_PACKS = {
    "rate": ({"sample_rate": np.array(16_000, np.int64)}, "sample_rate is 16000, wanted 8000"),
    "offsets beyond the samples": ({"offsets": SHORT_OFFSETS}, "offsets do not rise"),
    "offsets fall": ({"offsets": FALLING}, "offsets do not rise"),
    "too few takes": ({"take": np.zeros(3, np.uint8)}, "disagree on the number of clips"),
    "digit 10": ({"digit": np.full(120, 10, np.uint8)}, "a digit is above 9"),
    "unknown speaker": ({"speaker": np.full(120, 2, np.uint8)}, "a speaker is outside the 2 names"),
    "float audio": ({"audio": np.zeros(9, np.float32)}, "audio must be int16"),
    "empty": (
        {"digit": np.zeros(0, np.uint8), "take": np.zeros(0, np.uint8), "speaker": np.zeros(0, np.uint8),
         "offsets": np.zeros(0, np.int64), "audio": np.zeros(0, np.int16)},
        "there are no clips",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN_PACKS)
def test_broken_packs(tmp_path, fault):
    change, says = BROKEN_PACKS[fault]
    write_npz(tmp_path / fsdd.PACK, arrays() | change)
    with pytest.raises(DataError, match=says) as caught:
        fsdd.find(tmp_path, verify=False)
    assert fsdd.PACK in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_pack(tmp_path):
    write_npz(tmp_path / fsdd.PACK, arrays())
    raw = (tmp_path / fsdd.PACK).read_bytes()
    for cut in (0, 10, len(raw) // 2, len(raw) - 4):
        (tmp_path / fsdd.PACK).write_bytes(raw[:cut])
        with pytest.raises(DataError, match="damaged or not a NumPy archive"):
            fsdd.find(tmp_path)


CLIP = np.arange(50, dtype="<i2")
BROKEN_WAVS = {
    "empty": (b"", "not a whole WAV file"),
    "text": (b"hello", "not a whole WAV file"),
    "cut": (wav(CLIP)[:-20], "cut off: 40 of 50 samples"),
    "cut in the header": (wav(CLIP)[:30], "not a whole WAV file"),
    "no samples": (wav(CLIP[:0]), "cut off: 0 of 0"),
    "16 kHz": (wav(CLIP, rate=16_000), "got 16000 Hz"),
    "8 bit": (wav(CLIP, width=1), "got 8000 Hz, 8 bit"),
    "stereo": (wav(CLIP, channels=2), "16 bit, 2."),
}


@pytest.mark.parametrize("fault", BROKEN_WAVS)
def test_broken_wavs_name_the_file(tmp_path, fault):
    raw, says = BROKEN_WAVS[fault]
    (tmp_path / "3_ann_7.wav").write_bytes(raw)
    with pytest.raises(DataError, match=says) as caught:
        fsdd.find(tmp_path, verify=False)
    assert "3_ann_7.wav" in str(caught.value)


def test_recordings_that_are_there_twice_and_too_many_speakers(tmp_path):
    for name in ("3_ann_7.wav", "3_ann_07.wav"):
        (tmp_path / name).write_bytes(wav(CLIP))
    with pytest.raises(DataError, match=r"two recordings 3_ann_7\.wav"):
        fsdd.find(tmp_path, verify=False)
    (tmp_path / "many").mkdir()
    for i in range(257):  # a speaker's number is kept in one byte
        (tmp_path / "many" / f"3_{chr(97 + i // 26)}{chr(97 + i % 26)}_7.wav").write_bytes(wav(CLIP[:4]))
    with pytest.raises(DataError, match="wanted at most 256 speakers; got 257"):
        fsdd.find(tmp_path / "many", verify=False)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(DataError, match=r"cannot write into .*Read-only file system"):
        fsdd.fetch(tmp_path)


def test_broken_archives(tmp_path, small):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/recordings/1_ann_0.wav", wav(CLIP))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="not a whole zip"):
        fsdd.read_zip(path)
    damaged = bytearray(whole)
    damaged[60] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError):
        fsdd.read_zip(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x/recordings/1_ann_0.wav", wav(CLIP) * 50)
    path.write_bytes(path.read_bytes()[:75] + bytes(8) + path.read_bytes()[83:])
    with pytest.raises(DataError, match="not a whole zip"):
        fsdd.read_zip(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/1_ann_é.wav", b"x")
    path.write_bytes(path.read_bytes().replace("é".encode(), b"\xff\xff"))
    with pytest.raises(DataError, match="not a whole zip"):
        fsdd.read_zip(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.md", "no recordings")
    with pytest.raises(DataError, match=r"no recording named like 7_theo_12.wav"):
        fsdd.read_zip(path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "web"}, "source must be"),
        ({"normalise": "loud"}, "normalise must be"),
        ({"length": 0}, "at least 1 sample"),
        ({"valid_takes": (4, 5)}, r"5 to 49 .* got \[4, 5\]"),
        ({"valid_takes": "ab"}, "valid_takes must be takes"),
        ({"valid_takes": range(5, 50)}, "no recordings are left to train on"),
    ],
)
def test_contradictions(tmp_path, small, options, says):
    write_npz(tmp_path / fsdd.PACK, arrays())
    with pytest.raises(DataError, match=says):
        tasks.load("speech", root=tmp_path, **options)


def test_task_augments_its_batches():
    task = tasks.load("speech", source="sample", length=3_000)
    batch = collate([task.train[i] for i in range(4)])
    changed = task.augment(batch, torch.Generator().manual_seed(1))
    assert changed.x.shape[1] <= 3_000
    assert torch.equal(changed.label, batch.label)


# The real recordings.


def test_real_recordings_and_their_split(real_data):
    task = tasks.load("speech", root=real_data, source="fsdd")
    assert task.config.source.startswith("FSDD, official split")
    assert [len(split) for split in (task.train, task.valid, task.test)] == [2_400, 300, 300]
    assert np.bincount(task.test.labels).tolist() == [30] * 10
    assert (
        int((task.train.lengths == 8_000).sum())
        + int((task.valid.lengths == 8_000).sum())
        + int((task.test.lengths == 8_000).sum())
        >= 20
    )  # the clips that were cut
    assert max(float(x.abs().max()) for x, _ in task.test) <= 1
    clips = [x.numpy().tobytes() for split in (task.train, task.valid, task.test) for x, _ in split]
    assert len(set(clips)) == 3_000


def test_real_recordings_as_wav_files_have_the_same_fingerprint(real_data, tmp_path):
    packed = fsdd.find(real_data)
    write_wavs(packed, tmp_path / "recordings")
    assert fsdd.fingerprint(fsdd.find(tmp_path)) == fsdd.FINGERPRINT
    (tmp_path / "recordings" / "7_theo_12.wav").unlink()
    with pytest.raises(DataError, match="2,999 clips of 3,000"):
        fsdd.find(tmp_path)


def test_real_pack_cut_off(real_data, tmp_path):
    raw = (real_data / fsdd.PACK).read_bytes()
    (tmp_path / fsdd.PACK).write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="damaged"):
        tasks.load("speech", root=tmp_path)
    (tmp_path / fsdd.PACK).write_bytes(lzma.compress(b"something else"))
    with pytest.raises(DataError, match="not a NumPy archive"):
        tasks.load("speech", root=tmp_path)


def test_any_damage_to_a_wav_file_is_a_data_error_or_harmless():
    whole, rng, refused = wav(CLIP), np.random.default_rng(0), 0
    for _ in range(500):
        raw = np.frombuffer(whole, np.uint8).copy()
        raw[rng.integers(0, 48, 2)] = rng.integers(256)
        try:
            fsdd.decode_wav(raw.tobytes(), "x.wav")
        except DataError:
            refused += 1
    assert refused > 250
