"""Speech Commands: the official archive and its lists, SC10 and SC35, the packs by their names, and broken files."""

import hashlib
import io
import lzma
import tarfile
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, collate, speech_commands
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound, write_folder
from longseq_tutorial.tasks.packs import write_npz
from longseq_tutorial.tasks.speech_commands import WORDS10, WORDS35, hash_part

from .served import served


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch, request):
    """No test here sees the machine's data or network unless it asks for `real_data`."""
    if "real_data" in request.fixturenames:
        return
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    mine = tmp_path / "data"
    mine.mkdir()
    monkeypatch.setattr("longseq_tutorial.tasks.base.REPOSITORY_DATA", mine)
    monkeypatch.setattr(speech_commands, "ARCHIVE", "http://127.0.0.1:9/speech_commands_v0.02.tar.gz")


def wav(samples: int = 16_000, rate: int = 16_000, seed: int = 0, width: int = 2) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        audio = np.random.default_rng(seed).integers(-3_000, 3_000, samples).astype("<i2")
        file.writeframes(audio.tobytes() if width == 2 else bytes(samples))
    return buffer.getvalue()


def files(words: tuple[str, ...] = WORDS10, each: int = 7) -> dict[str, bytes]:
    """A small official archive: clip k of a word is by speaker k; clip 0 is for the test, clip 1 for choosing."""
    content = {"_background_noise_/pink_noise.wav": wav(99_000), "LICENSE": b"CC BY 4.0", "README.md": b"hello"}
    lists: dict[str, list[str]] = {"testing_list.txt": [], "validation_list.txt": []}
    for i, word in enumerate(words):
        for k in range(each):
            name = f"{word}/{k:08x}_nohash_{k % 2}.wav"
            content[name] = wav(16_000 if k != 2 else 12_345, seed=100 * i + k)
            if k < 2:
                lists[("testing_list.txt", "validation_list.txt")[k]].append(name)
    return content | {name: ("\n".join(lines) + "\n").encode() for name, lines in lists.items()}


def archive(content: dict[str, bytes], top: str = "./") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as out:
        for name, data in content.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def unpack(content: dict[str, bytes], folder: Path) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def put(content: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "speech_commands_v0.02.tar.gz").write_bytes(archive(content))
    return folder


def sounds(split) -> list[tuple[bytes, int]]:
    return sorted((x.numpy().tobytes(), label) for x, label in split)


SC10 = {"source": "sc10", "verify": False}


def test_sc10_from_archive_and_folders(tmp_path):
    put(files(), tmp_path / "a")
    unpack(files(), tmp_path / "b")
    unpack(files(), tmp_path / "c" / "SpeechCommands" / "speech_commands_v0.02")
    found = [tasks.load("speech", root=tmp_path / name, **SC10) for name in "abc"]
    for task in found:
        assert [len(split) for split in (task.train, task.valid, task.test)] == [50, 10, 10]
        assert all(
            sounds(one) == sounds(two)
            for one, two in zip((task.train, task.test), (found[0].train, found[0].test), strict=True)
        )
    config = found[0].config
    assert (config.name, config.kind, config.classes, config.length, config.sample_rate) == (
        "speech", "samples", 10, 16_000, 16_000
    )  # fmt: skip
    assert config.class_names == WORDS10
    assert config.source == "Speech Commands v0.02, 10 words, unverified, official lists, by speaker"
    assert found[0].train.lengths.tolist() == [16_000] * 50  # short clips are padded
    assert any((x[12_345:] == x[-1]).all() for x, _ in found[0].train)


def test_what_was_read_is_found_again(tmp_path, monkeypatch):
    root = put(files(), tmp_path / "a")
    first = tasks.load("speech", root=root, **SC10)
    assert sorted(path.name for path in root.iterdir()) == [
        "speech_commands.i16", "speech_commands.npz", "speech_commands_v0.02.tar.gz",
    ]  # fmt: skip
    monkeypatch.setattr(speech_commands, "decode_wav", lambda *_: pytest.fail("read twice"))
    assert sounds(tasks.load("speech", root=root, **SC10).train) == sounds(first.train)
    (root / "speech_commands.i16").write_bytes(b"cut")
    with pytest.raises(DataError, match=r"speech_commands.i16 has 3 bytes.*Delete it, and it is made again"):
        tasks.load("speech", root=root, **SC10)


def test_labels_belong_to_their_sounds(tmp_path):
    task = tasks.load("speech", root=put(files(), tmp_path / "a"), normalise=None, **SC10)
    for x, label in task.test:
        wanted = np.frombuffer(wav(seed=100 * label)[44:], "<i2") / 32_768
        assert abs(x.numpy() - wanted).max() < 1e-6


def test_sc35_has_the_order_of_s4(tmp_path):
    root = put(files(WORDS35, 3), tmp_path / "a")
    task = tasks.load("speech", root=root, source="sc35", verify=False)
    assert task.config.classes == 35 and task.config.class_names == WORDS35
    assert WORDS35[0] == "bed" and WORDS35[-1] == "zero" and len(set(WORDS35)) == 35
    assert [len(split) for split in (task.train, task.valid, task.test)] == [35, 35, 35]
    ten = tasks.load("speech", root=root, **SC10)
    assert len(ten.train) == 10
    x, label = ten.test[3]
    assert (x.numpy() == task.test[list(task.test.labels).index(WORDS35.index(WORDS10[label]))][0].numpy()).all()


def test_sc10_at_random_as_published(tmp_path):
    root = put(files(each=21), tmp_path / "a")
    one, same, other = (tasks.load("speech", root=root, random_split=True, seed=seed, **SC10) for seed in (0, 0, 1))
    # 20 clips of each word are a whole second; the short one is dropped.
    assert [len(split) for split in (one.train, one.valid, one.test)] == [140, 30, 30]
    assert np.bincount(one.test.labels).tolist() == [3] * 10
    assert sounds(one.train) == sounds(same.train) != sounds(other.train)
    assert "random 70 : 15 : 15 split, seed 0, not by speaker" in one.config.source


def test_every_second_sample_and_standard_level(tmp_path):
    root = put(files(), tmp_path / "a")
    whole = tasks.load("speech", root=root, normalise="standard", **SC10)
    half = tasks.load("speech", root=root, normalise="standard", every=2, **SC10)
    assert (half.config.sample_rate, half.config.length) == (8_000, 8_000)
    assert "every 2. sample" in half.config.source
    assert torch.equal(half.test[4][0], whole.test[4][0][::2])
    x = torch.stack([item for item, _ in whole.train])
    assert abs(float(x.mean())) < 1e-4 and abs(float(x.std()) - 1) < 1e-3
    short = tasks.load("speech", root=root, length=1_000, **SC10)
    assert short.config.length == 1_000 and short.train.lengths.max() == 1_000


def test_augmentation_keeps_the_length(tmp_path):
    task = tasks.load("speech", root=put(files(), tmp_path / "a"), **SC10)
    batch = collate([task.train[i] for i in range(4)])
    changed = task.augment(batch, torch.Generator().manual_seed(0))
    assert changed.x.shape[1] <= 16_000 and torch.equal(changed.label, batch.label)


def test_download_checks_and_keeps_two_files(tmp_path, monkeypatch):
    web = put(files(), tmp_path / "web")
    raw = (web / "speech_commands_v0.02.tar.gz").read_bytes()
    monkeypatch.setattr(speech_commands, "COUNTS", {"train": 50, "valid": 10, "test": 10})
    with served(web) as server:
        monkeypatch.setattr(speech_commands, "ARCHIVE", f"{server.url}/speech_commands_v0.02.tar.gz")
        with pytest.raises(DataError, match="checksum is another"):
            tasks.load("speech", source="sc10")
        monkeypatch.setattr(speech_commands, "SHA256", hashlib.sha256(raw).hexdigest())
        task = tasks.load("speech", source="sc10")
    assert "unverified" not in task.config.source
    assert sorted(path.name for path in write_folder(None).iterdir()) == ["speech_commands.i16", "speech_commands.npz"]


def test_no_network_and_incomplete(tmp_path):
    for options in ({}, {"download": False}):
        with pytest.raises(DataNotFound, match="get speech source=sc35"):
            tasks.load("speech", source="sc10", **options)
    with pytest.raises(DataError, match=r"holds 50, 10, 10 clips .* 84,843, 9,981, 11,005.*verify=False"):
        tasks.load("speech", root=put(files(), tmp_path / "a"), source="sc10")


def changed(**changes: bytes | None) -> dict[str, bytes]:
    content = files(("yes", "no"), 3)
    for name, data in changes.items():
        path = {"clip": "yes/00000002_nohash_0.wav", "test": "testing_list.txt", "valid": "validation_list.txt"}[name]
        content.pop(path)
        if data is not None:
            content[path] = data
    return content


TESTS = files(("yes", "no"), 3)["testing_list.txt"]
FAULTS = {
    "empty clip": (changed(clip=b""), "00000002_nohash_0.wav is not a whole WAV"),
    "cut clip": (changed(clip=wav()[:-100]), "00000002_nohash_0.wav is cut off"),
    "foreign clip": (changed(clip=b"OggS" + bytes(100)), "00000002_nohash_0.wav is not a whole WAV"),
    "8 kHz": (changed(clip=wav(rate=8_000)), "wanted 16000 Hz.*got 8000 Hz"),
    "no list": (changed(valid=None), "lacks testing_list.txt or validation_list.txt"),
    "foreign list": (
        changed(test=b"yes/nobody_nohash_0.wav\n"),
        "1 clips of the lists are not there, first 'yes/nobody",
    ),
    "in both lists": (changed(valid=TESTS), "stands in both lists"),
    "nothing": ({"README.md": b"x", "testing_list.txt": b"", "validation_list.txt": b""}, "holds no recording"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_archives(tmp_path, fault):
    content, says = FAULTS[fault]
    root = put(content, tmp_path / "a")
    with pytest.raises(DataError, match=says) as caught:
        tasks.load("speech", root=root, **SC10)
    assert "\n" not in str(caught.value)
    assert not (root / "speech_commands.npz").exists() and not list(root.glob("*.tmp"))


def test_harmful_and_cut_archives(tmp_path):
    root = put(files(), tmp_path / "a")
    path = root / "speech_commands_v0.02.tar.gz"
    whole = path.read_bytes()
    for raw, says in (
        (whole[: len(whole) // 2], "not a whole tar archive"),
        (archive({"../yes/0_nohash_0.wav": wav()}, top=""), "leads out of the archive"),
        (b"<html>", "not a whole tar archive"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=says):
            tasks.load("speech", root=root, **SC10)
    assert [entry.name for entry in root.iterdir()] == [path.name]


def test_the_order_of_an_archive_changes_no_random_split(tmp_path):
    put(dict(sorted(files().items(), reverse=True)), tmp_path / "a")
    unpack(files(), tmp_path / "b")
    one, two = (tasks.load("speech", root=tmp_path / name, random_split=True, **SC10) for name in "ab")
    assert sounds(one.test) == sounds(two.test) and sounds(one.train) == sounds(two.train)


def test_what_is_refused_leaves_no_file_behind(tmp_path):
    root = put(files(), tmp_path / "a")
    with pytest.raises(DataError, match="pass verify=False"):
        tasks.load("speech", root=root, source="sc10")
    assert [path.name for path in root.iterdir()] == ["speech_commands_v0.02.tar.gz"]


def test_nothing_to_train_on(tmp_path):
    """A set of which only the test and the validation clips are there."""
    content = {name: data for name, data in files().items() if "_list" in name or name.split("/")[-1] < "00000002"}
    with pytest.raises(DataError, match="nothing to train on"):
        tasks.load("speech", root=put(content, tmp_path / "a"), **SC10)


@pytest.mark.parametrize("keep", [slice(0), slice(3)], ids=["no clips", "two levels"])
def test_a_foreign_index_is_one_clear_line(tmp_path, keep):
    root = put(files(), tmp_path / "a")
    tasks.load("speech", root=root, **SC10)
    with np.load(root / "speech_commands.npz") as archive:
        index = dict(archive)
    if keep == slice(0):
        index = {name: array[keep] if array.ndim else array for name, array in index.items()}
    else:
        index["levels"] = index["levels"][:, :2]
    write_npz(root / "speech_commands.npz", index)
    with pytest.raises(DataError, match=r"speech_commands\.npz: its arrays do not fit"):
        tasks.load("speech", root=root, **SC10)


def test_a_clip_that_is_there_twice_is_refused(tmp_path):
    content = files()
    name = "yes/00000003_nohash_1.wav"
    for top in ("", "speech_commands_v0.02/"):
        content[top + name] = wav(seed=7)
    root = put(content, tmp_path / "a")
    with pytest.raises(DataError, match=f"two clips {name}"):
        tasks.load("speech", root=root, **SC10)


def test_the_rule_keeps_a_speaker_in_one_part():
    parts = [hash_part(f"{i:08x}_nohash_{k}.wav") for i in range(2_000) for k in (0, 3)]
    assert parts[::2] == parts[1::2]
    shares = np.bincount(parts, minlength=3) / len(parts)
    assert abs(shares - [0.8, 0.1, 0.1]).max() < 0.03


def test_without_lists_the_rule_decides(tmp_path):
    content = {name: data for name, data in files(("yes",), 60).items() if not name.endswith("_list.txt")}
    unpack(content, tmp_path)
    task = tasks.load("speech", root=tmp_path, **SC10)
    parts = [hash_part(name) for name in content if name.startswith("yes/")]
    assert [len(split) for split in (task.train, task.valid, task.test)] == np.bincount(parts, minlength=3).tolist()
    assert "official rule, by speaker" in task.config.source


def test_packs_are_named_for_what_they_are(tmp_path):
    arrays = {
        "q": np.zeros((6, 16_000), np.int8) + np.arange(6, dtype=np.int8)[:, None],
        "peak": np.full(6, 1_000, np.int16),
        "mu": np.array(8.0),
        "label": np.arange(6, dtype=np.uint8),
        "words": np.array(WORDS10),
        "filename": np.array([f"{i:08x}_nohash_0.wav" for i in range(6)]),
        "split": np.array([0, 0, 1, 1, 2, 2], np.uint8),
        "sample_rate": np.array(16_000),
    }
    write_npz(tmp_path / "sc10_test_16k.npz.xz", arrays)
    task = tasks.load("speech", root=tmp_path, source="sc10-test")
    assert task.config.source == "Speech Commands v0.02, ten words, the official test clips only, re-split by speaker"
    assert task.test.labels.tolist() == [4, 5]
    with pytest.raises(DataNotFound, match="found no sc3_v001"):
        tasks.load("speech", root=tmp_path, source="sc3-v001")
    del arrays["split"]
    write_npz(tmp_path / "sc30_sample_16k.npz.xz", arrays)
    task = tasks.load("speech", root=tmp_path, source="sc30-sample")
    parts = [hash_part(str(name)) for name in arrays["filename"]]
    assert [len(split) for split in (task.train, task.valid, task.test)] == np.bincount(parts, minlength=3).tolist()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "sc20"}, "source must be"),
        ({"source": "sc35", "random_split": True}, "random_split is for source='sc10'"),
        ({"every": 3}, "every must divide the rate"),
        ({"every": 0}, "every must divide the rate"),
        ({"source": "fsdd", "every": 2}, "are for keywords"),
        ({"source": "sample", "normalise": "standard"}, "are for keywords"),
    ],
)
def test_contradictions(tmp_path, options, says):
    with pytest.raises(DataError, match=says):
        tasks.load("speech", root=put(files(each=3), tmp_path / "a"), **(SC10 | options))


def test_the_rule_is_the_official_lists(real_data):
    for name, part in (("validation", 1), ("testing", 2)):
        path = real_data / f"speech_commands_v0.02_{name}_list.txt.xz"
        if not path.exists():
            pytest.skip(f"no {path.name} there")
        lines = lzma.decompress(path.read_bytes()).decode().split()
        assert len(lines) == speech_commands.COUNTS[{1: "valid", 2: "test"}[part]]
        assert {hash_part(line) for line in lines} == {part}
        assert {line.split("/")[0] for line in lines} == set(WORDS35)


def test_the_real_packs(real_data):
    for source, counts in (("sc10-test-8k", [2_755, 746, 573]), ("sc30-sample", None)):
        if not (real_data / speech_commands.PACKS[source][0]).exists():
            pytest.skip("no packs there")
        task = tasks.load("speech", root=real_data, source=source)
        sizes = [len(split) for split in (task.train, task.valid, task.test)]
        assert sizes == counts if counts else sum(sizes) == 300
    assert REPOSITORY_DATA.is_dir()
