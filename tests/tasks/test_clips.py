"""Keyword clips: packs, levels, and files of raw audio."""

import numpy as np
import pytest

from longseq_tutorial.tasks import DataError
from longseq_tutorial.tasks.clips import (
    Clips,
    as_splits,
    expand,
    map_audio,
    measure,
    one_second,
    read_pack,
    write_audio,
)
from longseq_tutorial.tasks.packs import write_npz


def pack(**changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "q": rng.integers(-127, 128, (12, 50)).astype(np.int8),
        "peak": rng.integers(100, 32_767, 12).astype(np.int16),
        "mu": np.array(8.0),
        "label": (np.arange(12) % 3).astype(np.uint8),
        "words": np.array(["a", "b", "c"]),
        "split": np.repeat(np.arange(3, dtype=np.uint8), 4),
        "sample_rate": np.array(50),
        **changes,
    }


def clips(audio: np.ndarray) -> Clips:
    count = len(audio)
    split = (np.arange(count) % 3).astype(np.uint8)
    return Clips(audio, np.zeros(count, np.uint8), split, ("a", "b"), audio.shape[1], measure(audio))


def test_packs_are_expanded(tmp_path):
    write_npz(tmp_path / "p.npz.xz", pack())
    read, extra = read_pack(tmp_path / "p.npz.xz", {"split": ("uint8", 1)})
    assert read.audio.dtype == np.int16 and read.audio.shape == (12, 50)
    assert (read.words, read.rate) == (("a", "b", "c"), 50)
    assert read.split.tolist() == extra["split"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    y = pack()["q"] / 127
    wanted = np.sign(y) * (9 ** abs(y) - 1) / 8 * pack()["peak"][:, None]
    assert abs(read.audio - wanted).max() <= 0.51


def test_without_companding_codes_are_shares_of_the_peak():
    q = np.array([[-127, 0, 127]], np.int8)
    assert expand(q, 0.0, np.array([1_000], np.int16)).tolist() == [[-1_000, 0, 1_000]]


FAULTS = {
    "label": ({"label": np.full(12, 3, np.uint8)}, "outside the 3 words"),
    "too few peaks": ({"peak": np.zeros(3, np.int16)}, "disagree on the number of clips"),
    "too few parts": ({"split": np.zeros(3, np.uint8)}, "disagree on the number of clips"),
    "part": ({"split": np.full(12, 3, np.uint8)}, "none of training, validation and test"),
    "negative": ({"mu": np.array(-1.0)}, "companding constant is not from 0"),
    "no constant": ({"mu": np.array(np.inf)}, "companding constant is not from 0"),
    "code below the peak": ({"q": np.full((12, 50), -128, np.int8)}, "a code is -128"),
    "negative peak": ({"peak": np.full(12, -5, np.int16)}, "a peak is negative"),
    "no rate": ({"sample_rate": np.array(0)}, "the rate is 0 samples"),
    "a word twice": ({"words": np.array(["a", "b", "a"])}, "a word stands there twice"),
    "nothing": ({"q": np.zeros((0, 50), np.int8)}, "there are no clips"),
    "floats": ({"q": np.zeros((12, 50))}, "q must be int8"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_packs(tmp_path, fault):
    change, says = FAULTS[fault]
    write_npz(tmp_path / "p.npz", pack(**change))
    with pytest.raises(DataError, match=says) as caught:
        read_pack(tmp_path / "p.npz", {"split": ("uint8", 1)})
    assert "p.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["rms", "peak", "standard", None])
def test_levels(how):
    rng = np.random.default_rng(0)
    audio = (rng.standard_normal((60, 400)) * rng.uniform(100, 3_000, (60, 1)) + 50).astype(np.int16)
    audio[0] = 0  # silence stays silent
    audio[3] = 0
    audio[3, 7] = 30_000  # a lone click is not driven beyond full scale
    parts = as_splits(clips(audio), 400, how)
    x = np.stack([item.numpy() for part in parts for item, _ in part])
    assert x.shape == (60, 400) and x.dtype == np.float32
    rest = np.stack([item.numpy() for item, _ in parts[1]])  # no click there, no silence
    if how == "rms":
        assert abs(rest.mean(1)).max() < 1e-5 and abs(rest.std(1) - 0.1).max() < 1e-5 and abs(x).max() <= 1 + 1e-6
    elif how == "peak":
        assert abs(abs(rest).max(1) - 1).max() < 1e-5 and abs(x).max() <= 1 + 1e-6
    elif how == "standard":
        train = np.stack([item.numpy() for item, _ in parts[0]])
        assert abs(train.mean()) < 1e-4 and abs(train.std() - 1) < 1e-3
    else:
        assert abs(rest * 32_768 - audio[1::3]).max() < 1e-2
    assert not x[0].any() or how == "standard"


def test_one_second_pads_and_cuts():
    assert one_second(np.array([1, 2], np.int16), 4).tolist() == [1, 2, 0, 0]
    assert one_second(np.arange(9, dtype=np.int16), 4).tolist() == [0, 1, 2, 3]


def test_audio_files_are_written_whole_or_not_at_all(tmp_path):
    audio = np.random.default_rng(0).integers(-9, 9, (7, 20)).astype(np.int16)
    path = tmp_path / "a.i16"
    assert write_audio(path, iter(audio)) == 7
    mapped = map_audio(path, 7, 20)
    assert isinstance(mapped, np.memmap) and (mapped == audio).all()

    def broken():
        yield audio[0]
        raise DataError("a clip is broken")

    with pytest.raises(DataError, match="a clip is broken"):
        write_audio(path, broken())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.i16"] and path.stat().st_size == 280
    with pytest.raises(DataError, match=r"a.i16 has 280 bytes; wanted 320"):
        map_audio(path, 8, 20)
    with pytest.raises(DataError, match="cannot read"):
        map_audio(tmp_path / "none", 1, 1)
