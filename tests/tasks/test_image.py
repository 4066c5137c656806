"""Image: the sample, CIFAR-10 however it came, its JPEG copies, and broken ones."""

import hashlib
import io
import tarfile

import numpy as np
import pooch
import pytest
from PIL import Image

from longseq_tutorial import tasks
from longseq_tutorial.tasks import DataError, cifar
from longseq_tutorial.tasks.base import REPOSITORY_DATA, DataNotFound, write_folder
from longseq_tutorial.tasks.image import SAMPLE, SHAPES
from longseq_tutorial.tasks.packs import read_npz, write_npz

from .served import served

EACH = 20  # pictures in each batch of the small sets here


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch, request):
    """No test here sees the machine's data or network unless it asks for `real_data`."""
    mine = tmp_path / "data"
    mine.mkdir()
    (mine / SAMPLE).write_bytes((REPOSITORY_DATA / SAMPLE).read_bytes())
    for module in ("base", "image"):
        monkeypatch.setattr(f"longseq_tutorial.tasks.{module}.REPOSITORY_DATA", mine)
    if "real_data" in request.fixturenames:
        return
    monkeypatch.delenv("LONGSEQ_DATA", raising=False)
    monkeypatch.setattr(cifar, "PICTURES", EACH)
    monkeypatch.setattr(cifar, "ARCHIVE", "http://127.0.0.1:9/cifar-10-binary.tar.gz")


def batch(number: int) -> bytes:
    """A batch in the official binary form: label, red, green, blue."""
    rng = np.random.default_rng(number)
    records = rng.integers(0, 256, (EACH, cifar.RECORD), dtype=np.uint8)
    records[:, 0] = np.arange(EACH) % 10
    return records.tobytes()


def batches() -> dict[str, bytes]:
    return {name: batch(number) for number, name in enumerate(cifar.BATCHES)}


def archive(content: dict[str, bytes], top: str = "cifar-10-batches-bin/") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as out:
        for name, data in {"readme.html": b"hello", **content}.items():
            info = tarfile.TarInfo(top + name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def content(split) -> list[tuple[bytes, int]]:
    return [(x.numpy().tobytes(), label) for x, label in split]


def test_sample():
    task = tasks.load("image", source="sample")
    config = task.config
    assert (config.kind, config.classes, config.length, config.grid) == ("samples", 10, 1_024, (32, 32))
    assert config.class_names == SHAPES and config.source == "drawn shapes (made by this project)"
    assert (REPOSITORY_DATA / SAMPLE).stat().st_size < 200_000
    assert [len(split) for split in (task.train, task.valid, task.test)] == [170, 40, 40]
    assert np.bincount(task.test.labels).tolist() == [4] * 10


def test_grey_is_pillows(tmp_path):
    """The luma that the published loaders compute, pixel by pixel."""
    raw = np.frombuffer(batch(3), np.uint8).reshape(EACH, -1)
    grey, label = cifar.decode(batch(3), "x", "")
    for record, ours in zip(raw, grey, strict=True):
        colour = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        theirs = np.asarray(Image.fromarray(np.ascontiguousarray(colour)).convert("L"))
        assert (theirs.reshape(-1) == ours).all()
    assert label.tolist() == raw[:, 0].tolist()


def test_archive_and_folders_hold_the_same(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cifar-10-binary.tar.gz").write_bytes(archive(batches()))
    inner = tmp_path / "b" / "cifar-10-batches-bin"
    inner.mkdir(parents=True)
    for name, data in batches().items():
        (inner / name).write_bytes(data)
    found = [
        tasks.load("image", root=root, source="cifar10", valid=10) for root in (tmp_path / "a", tmp_path / "b", inner)
    ]
    for task in found:
        assert [len(split) for split in (task.train, task.valid, task.test)] == [90, 10, 20]
        assert content(task.train) == content(found[0].train) and content(task.test) == content(found[0].test)
    assert found[0].config.class_names == cifar.CLASSES
    assert (
        found[0].config.source == "CIFAR-10 (official data), grey, 10 of the training pictures held out for validation"
    )
    grey, label = cifar.decode(batch(5), "x", "")  # the sixth batch is the test
    assert found[0].test.labels.tolist() == label.tolist()
    assert abs(found[0].test[0][0].numpy() - (grey[0] / 255 - 0.48) / 0.24).max() < 1e-5


def test_numbers_and_tokens(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive(batches()))
    grey = cifar.decode(batch(5), "x", "")[0][0].astype(float)
    for options, wanted in (
        ({"normalise": "s4"}, (grey - 122.6) / 61.0),
        ({"normalise": None}, grey / 255),
        ({"kind": "tokens"}, grey + 1),
    ):
        task = tasks.load("image", root=tmp_path, valid=10, **options)
        assert abs(task.test[0][0].numpy() - wanted).max() < 1e-5
    assert task.config.vocabulary == 257


def test_validation_is_the_same_for_every_seed(tmp_path):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive(batches()))
    one, two = (tasks.load("image", root=tmp_path, valid=30, seed=seed) for seed in (0, 1))
    assert content(one.valid) == content(two.valid)
    none = tasks.load("image", root=tmp_path, valid=0)
    assert (len(none.train), len(none.valid)) == (100, 0)
    pictures = {picture for picture, _ in content(one.train)} | {picture for picture, _ in content(one.valid)}
    assert pictures == {picture for picture, _ in content(none.train)}


def test_download_checks_and_keeps_a_pack(tmp_path, monkeypatch):
    web = tmp_path / "web"
    web.mkdir()
    raw = archive(batches())
    (web / "cifar-10-binary.tar.gz").write_bytes(raw)
    with served(web) as server:
        monkeypatch.setattr(cifar, "ARCHIVE", f"{server.url}/cifar-10-binary.tar.gz")
        with pytest.raises(DataError, match="checksum is another"):
            tasks.load("image", source="cifar10", valid=10)
        monkeypatch.setattr(cifar, "MD5", hashlib.md5(raw).hexdigest())
        task = tasks.load("image", valid=10)
    assert [path.name for path in write_folder(None).iterdir()] == ["cifar10_grey.npz"]
    monkeypatch.setattr(pooch, "retrieve", lambda *_, **__: pytest.fail("the network was asked"))
    assert content(tasks.load("image", valid=10).train) == content(task.train)


def test_no_network_and_no_copy(capsys):
    task = tasks.load("image")
    notice = capsys.readouterr().err
    assert "drawn shapes" in task.config.source and notice.count("\n") == 1 and "Using drawn shapes" in notice
    for source, says in (("cifar10", "get image"), ("cifar10-jpeg", "JPEG copies are not here")):
        with pytest.raises(DataNotFound, match=says):
            tasks.load("image", source=source, download=False)


def test_any_number_only_when_asked(tmp_path, monkeypatch):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive(batches()))
    monkeypatch.setattr(cifar, "PICTURES", 10_000)
    with pytest.raises(DataError, match="10,000 records have 30,730,000"):
        tasks.load("image", root=tmp_path, source="cifar10")
    task = tasks.load("image", root=tmp_path, source="cifar10", verify=False, valid=10)
    assert [len(split) for split in (task.train, task.valid, task.test)] == [90, 10, 20]
    assert "unverified" in task.config.source
    content = changed("data_batch_3.bin", batch(2)[:-1])
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive(content))
    with pytest.raises(DataError, match=r"data_batch_3.bin has 61,459 bytes, not whole records"):
        tasks.load("image", root=tmp_path, source="cifar10", verify=False)


def changed(name: str, data: bytes | None) -> dict[str, bytes]:
    everything = batches()
    everything[name] = data or b""
    if data is None:
        del everything[name]
    return everything


WRONG_LABEL = bytearray(batch(1))
WRONG_LABEL[4 * cifar.RECORD] = 10
FAULTS = {
    "empty batch": (changed("data_batch_2.bin", b""), "data_batch_2.bin has 0 bytes"),
    "cut batch": (changed("data_batch_2.bin", batch(1)[:-1]), "data_batch_2.bin has 61,459 bytes.* 61,460"),
    "label 10": (changed("data_batch_2.bin", bytes(WRONG_LABEL)), "data_batch_2.bin: record 5 has the label 10"),
    "one missing": (changed("test_batch.bin", None), "lacks test_batch.bin"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_archives_and_folders(tmp_path, fault):
    everything, says = FAULTS[fault]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cifar-10-binary.tar.gz").write_bytes(archive(everything))
    (tmp_path / "b").mkdir()
    for name, data in everything.items():
        (tmp_path / "b" / name).write_bytes(data)
    for folder in "ab":
        with pytest.raises(DataError, match=says) as caught:
            tasks.load("image", root=tmp_path / folder, source="cifar10")
        assert "\n" not in str(caught.value)


def test_other_archives(tmp_path):
    path = tmp_path / "cifar-10-binary.tar.gz"
    pickled = archive({"data_batch_1": b"\x80\x02}q", "test_batch": b"\x80\x02}q"}, top="cifar-10-batches-py/")
    for raw, says in (
        (pickled, "is it the binary version"),
        (archive(batches())[:50_000], "not a whole tar archive"),
        (archive({"../x.bin": b"x"}), "leads out of the archive"),
        (archive(batches() | {"cifar-10-batches-bin/test_batch.bin": batch(1)}, top=""), "stands in it twice"),
    ):
        path.write_bytes(raw)
        with pytest.raises(DataError, match=says):
            tasks.load("image", root=tmp_path, source="cifar10")


# The JPEG copies.


def jpeg(seed: int, size: int = 32) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return buffer.getvalue()


def jpeg_pack(**changes: np.ndarray) -> dict[str, np.ndarray]:
    pictures = [jpeg(i) for i in range(6 * EACH)]
    return {
        "jpeg": np.frombuffer(b"".join(pictures), np.uint8),
        "offsets": np.cumsum([0] + [len(picture) for picture in pictures]),
        "label": (np.arange(6 * EACH) % 10).astype(np.uint8),
        "split": np.repeat(np.array([0, 1], np.uint8), [5 * EACH, EACH]),
        "classes": np.array(cifar.CLASSES),
        **changes,
    }


def test_jpeg_copies_are_named_for_what_they_are(tmp_path, monkeypatch):
    write_npz(tmp_path / cifar.JPEG_PACK, jpeg_pack())
    task = tasks.load("image", root=tmp_path, source="cifar10-jpeg", valid=10, normalise=None)
    assert task.config.source.startswith("CIFAR-10 (JPEG copy, not pixel-identical to the official data)")
    with Image.open(io.BytesIO(jpeg(5 * EACH))) as picture:
        assert abs(task.test[0][0].numpy() * 255 - np.asarray(picture.convert("L")).reshape(-1)).max() < 1e-3
    assert (write_folder(None) / cifar.JPEG_CACHE).exists() and not (tmp_path / cifar.JPEG_CACHE).exists()
    monkeypatch.setattr(cifar, "decode_jpeg", lambda *_: pytest.fail("decoded twice"))
    assert content(tasks.load("image", root=tmp_path, valid=10, normalise=None).train) == content(task.train)


FEW = jpeg_pack()
JPEG_FAULTS = {
    "not a picture": ({"jpeg": np.full(len(FEW["jpeg"]), 7, np.uint8)}, "picture 0 is not a whole JPEG"),
    "classes": ({"classes": np.array(cifar.CLASSES[::-1])}, "wanted the classes airplane"),
    "offsets": ({"offsets": FEW["offsets"][:-1]}, "do not fit each other"),
    "label": ({"label": np.full(6 * EACH, 10, np.uint8)}, "ten classes"),
    "parts": ({"split": np.zeros(6 * EACH, np.uint8)}, "does not hold 100 training and 20 test pictures"),
}


@pytest.mark.parametrize("fault", JPEG_FAULTS)
def test_broken_jpeg_packs(tmp_path, fault):
    change, says = JPEG_FAULTS[fault]
    write_npz(tmp_path / cifar.JPEG_PACK, jpeg_pack(**change))
    with pytest.raises(DataError, match=says) as caught:
        tasks.load("image", root=tmp_path, source="cifar10-jpeg")
    assert cifar.JPEG_PACK in str(caught.value)


def test_jpegs_of_another_size_and_cut_ones():
    for raw, says in ((jpeg(0, 64), "got 64 x 64"), (jpeg(0)[:200], "not a whole JPEG"), (b"", "not a whole JPEG")):
        with pytest.raises(DataError, match=says):
            cifar.decode_jpeg(raw, "x")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "web"}, "source must be"),
        ({"kind": "bytes"}, "kind must be"),
        ({"normalise": "loud"}, "normalise must be"),
        ({"valid": 100}, "valid must be from 0 to 99"),
    ],
)
def test_contradictions(tmp_path, options, says):
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(archive(batches()))
    with pytest.raises(DataError, match=says):
        tasks.load("image", root=tmp_path, **options)


def test_broken_sample(tmp_path):
    path = tmp_path / "data" / SAMPLE
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match=r"image_sample.npz is damaged.*git checkout"):
        tasks.load("image", source="sample")


def test_the_real_photographs(real_data):
    """Every 21st of them: the mean and the deviation that the published loaders take off."""
    if not (real_data / cifar.JPEG_PACK).exists():
        pytest.skip("no JPEG pack there")
    pack = read_npz(real_data / cifar.JPEG_PACK, cifar._JPEG_FORM, "")
    assert np.bincount(2 * pack["label"].astype(int) + pack["split"]).tolist() == [5_000, 1_000] * 10
    places = np.flatnonzero(pack["split"] == 0)[::21]
    start, stop = pack["offsets"][:-1], pack["offsets"][1:]
    grey = np.stack([cifar.decode_jpeg(pack["jpeg"][start[i] : stop[i]].tobytes(), str(i)) for i in places])
    assert abs(grey.mean() - 122.6) < 1.5 and abs(grey.std() - 61.0) < 1
