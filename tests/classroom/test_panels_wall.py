"""The wall's counts against torch's own, its limits, its words, and the costs a reader hands in."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longseq_tutorial.classroom.measure import Cost, peak_memory
from longseq_tutorial.classroom.panels_wall import MECHANISMS, Layer, Wall, in_bytes, in_flops, in_seconds, memory, work
from longseq_tutorial.mechanisms.chunking import chunk_attention
from longseq_tutorial.mechanisms.fft import good_length
from longseq_tutorial.mechanisms.gated_attention import attend


def flops(fn) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9))
def test_attention_does_the_operations_torch_counts(length, batch, heads, width):
    q, k, v = torch.randn(3, batch, heads, length, width)
    layer = Layer(length, batch, heads, width)
    assert work("explicit attention", layer) == flops(lambda: attend(q, k, v))
    assert work("fused attention", layer) == work("explicit attention", layer)


def test_chunks_do_the_operations_torch_counts():
    q, k, v = torch.randn(3, 2, 3, 96, 8)
    layer = Layer(96, batch=2, heads=3, width=8, span=16)
    assert work("chunk attention", layer) == flops(lambda: chunk_attention(q, k, v, 16, attend=attend))


def test_a_span_beyond_the_sequence_is_full_attention():
    layer = Layer(50, span=128)
    assert work("chunk attention", layer) == work("explicit attention", layer)
    assert memory("chunk attention", layer) == memory("explicit attention", layer)


def test_the_largest_tensor_is_what_the_operations_make():
    length, width = 300, 8
    q, k, v = torch.randn(3, 2, 3, length, width)
    layer = Layer(length, batch=2, heads=3, width=width)
    scores = q @ k.transpose(-1, -2)
    assert memory("explicit attention", layer) == scores.numel() * scores.element_size()
    assert peak_memory(lambda: attend(q, k, v)) >= memory("explicit attention", layer)
    spectrum = torch.fft.rfft(torch.randn(2, 3 * width, length), n=good_length(2 * length - 1))
    assert memory("FFT convolution", layer) == spectrum.numel() * spectrum.element_size()
    y = F.scaled_dot_product_attention(q, k, v)
    assert memory("fused attention", layer) == y.numel() * y.element_size()


@pytest.mark.parametrize(
    ("name", "low", "high"), [("fused attention", 2, 2), ("FFT convolution", 1, 1.2), ("recurrence", 1, 1)]
)
def test_growth_of_the_work(name, low, high):
    exponent = math.log2(work(name, Layer(2**15)) / work(name, Layer(2**14)))
    assert low - 1e-9 <= exponent <= high + 1e-9


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(MECHANISMS), st.integers(1, 5000))
def test_batch_and_heads_multiply(name, length):
    one, many = Layer(length), Layer(length, batch=3, heads=5)
    assert memory(name, many) == 15 * memory(name, one)
    assert work(name, many) <= 15 * work(name, one)  # a convolution transforms its kernel once for all of the batch
    assert name == "FFT convolution" or work(name, many) == 15 * work(name, one)


def test_wrong_sizes_and_names_are_refused():
    with pytest.raises(ValueError, match="batch >= 1; got 0"):
        Layer(10, batch=0)
    with pytest.raises(ValueError, match=r"one of explicit attention.*got 'magic'"):
        work("magic", Layer(10))
    with pytest.raises(ValueError, match="one of explicit attention"):
        memory("magic", Layer(10))


def test_units():
    assert [in_bytes(n) for n in (0, 4, 1024, 3 * 2**29, 2.0**62)] == [
        "0 bytes",
        "4.00 bytes",
        "1.00 KiB",
        "1.50 GiB",
        "4.00 EiB",
    ]
    assert [in_flops(n) for n in (6.87e10, 2.1e12)] == ["68.7 GFLOP", "2.10 TFLOP"]
    assert [in_seconds(s) for s in (2.1e-5, 0.0021, 3, 600, 90000)] == ["21 µs", "2.1 ms", "3.0 s", "10 min", "25 h"]


# ---- the panel


def test_it_says_work_and_memory():
    panel = Wall(heads=8, batch=4, length=16000)
    assert panel.error is None
    assert "L = 16,000 (batch 4, 8 heads" in panel.say()
    assert "explicit attention 2.10 TFLOP" in panel.say()
    assert "explicit attention 4.00x" in panel.say()
    words = panel.set(show="memory").say()
    assert "explicit attention 30.5 GiB" in words
    assert "does not fit into 16 GiB" in words
    assert "The score matrix fits into 80 GiB" in panel.set(budget=80).say()


def test_what_fits_is_the_largest_that_fits():
    panel = Wall(show="memory", budget=1, bytes_per_number=4)
    assert "up to L = 16,384" in panel.say()
    assert memory("explicit attention", Layer(16384)) == 2**30 < memory("explicit attention", Layer(16385))


def test_seconds_are_scaled_from_the_longest_measurement():
    panel = Wall({"fused attention": {1024: Cost(0.002, 0), 4096: Cost(0.04, 0)}}, show="seconds")
    assert panel.seconds("fused attention", Layer(4096)) == pytest.approx(0.04)
    assert panel.seconds("fused attention", Layer(8192, batch=2)) == pytest.approx(0.32)
    assert "fused attention 640 ms" in panel.set(length=16384).say()
    assert "4.00x" in panel.say()


def test_a_mechanism_of_the_readers_own_is_carried_on_by_its_exponent():
    panel = Wall({"mine": {256: 1e-4, 512: 3e-4, 1024: 9e-4}}, show="seconds", length=2048)
    assert panel.seconds("mine", Layer(2048, heads=2)) == pytest.approx(54e-4)
    assert "mine 2.7 ms" in panel.say()
    assert panel.error is None


@pytest.mark.parametrize(
    "measured",
    [
        {"mine": {256: 1e-4, 512: 3e-4}},  # two points are no fit
        {"fused attention": {}},
        {"fused attention": {256: 0.0}},
        {"fused attention": {256: math.nan}},
        {"fused attention": {0: 1.0}},
    ],
)
def test_measurements_that_cannot_be_scaled_are_refused(measured):
    with pytest.raises(ValueError, match=r"wants \{length: seconds\}"):
        Wall(measured)


def test_without_measurements_there_are_no_seconds():
    panel = Wall()
    with pytest.raises(ValueError, match="one of"):
        panel.set(show="seconds")
    with pytest.raises(ValueError, match=r"\(none\)"):
        panel.seconds("fused attention", Layer(10))


@pytest.mark.parametrize("length", [256, 1 << 20])
@pytest.mark.parametrize("show", ["work", "memory", "seconds"])
def test_every_end_of_the_sliders_is_drawn(length, show):
    panel = Wall({"explicit attention": {256: 0.001}}, length=length, show=show, span=8192, batch=64, heads=16)
    assert panel.error is None
    assert panel.set(span=16, budget=0.5, bytes_per_number=8).error is None
