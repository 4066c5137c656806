"""Measurements: exact where they can be (memory, the fit), sane where they cannot (time)."""

import numpy as np
import pytest
import torch

from longseq_tutorial.classroom.measure import growth_exponent, peak_memory, quickest, time_and_memory


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_exact_power_law(power: float) -> None:
    lengths = [256, 512, 1024, 4096]
    growth = growth_exponent(lengths, [3e-7 * n**power for n in lengths])
    assert growth.exponent == pytest.approx(power, abs=1e-12)
    assert growth.error == pytest.approx(0, abs=1e-7)


def test_standard_error_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    x = np.log([100, 200, 400, 800, 1600])
    y = 1.7 * x + 0.1 * rng.standard_normal(5)
    growth = growth_exponent(np.exp(x), np.exp(y))
    coefficients, covariance = np.polyfit(x, y, 1, cov=True)
    assert growth.exponent == pytest.approx(coefficients[0])
    assert growth.error == pytest.approx(np.sqrt(covariance[0, 0]))


def test_standard_error_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    lengths = np.array([256, 512, 1024, 2048, 4096, 8192])
    hits = 0
    for _ in range(300):
        growth = growth_exponent(lengths, lengths**2.0 * np.exp(0.2 * rng.standard_normal(6)))
        hits += abs(growth.exponent - 2) < 2.78 * growth.error  # 95 % of Student's t with 4 degrees of freedom
    assert 0.9 < hits / 300 < 0.99


def test_growth_in_words() -> None:
    assert str(growth_exponent([1, 2, 4], [1, 4, 16])) == "2.00 ± 0.00"


@pytest.mark.parametrize(
    "lengths, values, words",
    [
        ([1, 2], [1, 2], "at least three"),
        ([1, 2, 3], [1, 2], "one value for each"),
        ([2, 2, 2], [1, 2, 3], "three different"),
        ([1, 2, 3], [1, 0, 3], "positive"),
        ([1, 2, -3], [1, 2, 3], "positive"),
        ([1, 2, 3], [1, 2, float("nan")], "finite"),
    ],
)
def test_growth_refuses_what_cannot_be_fitted(lengths: list, values: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        growth_exponent(lengths, values)


def test_memory_counts_every_living_tensor() -> None:
    x = torch.zeros(1000)

    def one() -> torch.Tensor:
        return x + 1

    def two() -> torch.Tensor:
        return (x + 1) * 2  # the sum lives until the product exists

    def freed() -> None:
        for _ in range(5):
            x + 1

    assert peak_memory(one) == pytest.approx(4000, abs=64)
    assert peak_memory(two) == pytest.approx(8000, abs=128)
    assert peak_memory(freed) == pytest.approx(4000, abs=64)


def test_memory_of_attention_is_quadratic_and_repeatable() -> None:
    def explicit(length: int) -> int:
        q = torch.randn(1, length, 16)
        return peak_memory(lambda: (q @ q.mT).softmax(-1) @ q)

    lengths = [128, 256, 512]
    first = [explicit(length) for length in lengths]
    assert first == [explicit(length) for length in lengths]
    assert first[0] >= 2 * 128 * 128 * 4  # scores, and their softmax
    assert growth_exponent(lengths, first).exponent == pytest.approx(2, abs=0.1)


def test_memory_sees_the_backward_pass() -> None:
    x = torch.zeros(1000, requires_grad=True)
    assert peak_memory(lambda: x.exp().sum().backward()) >= 8000  # exp(x) is kept for its gradient


def test_memory_of_nothing_is_zero() -> None:
    kept = [torch.zeros(10_000)]
    assert peak_memory(lambda: None) == 0
    assert peak_memory(kept.clear) == 0


def test_memory_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """The profiler's own log would land in the notebook, with the time in it."""
    peak_memory(lambda: torch.zeros(10))
    assert capfd.readouterr() == ("", "")


def test_calls_are_counted() -> None:
    calls = []
    cost = time_and_memory(lambda: calls.append(torch.zeros(100)), repeats=4, warmup=2)
    assert len(calls) == 4 + 2 + 1
    assert cost.seconds > 0
    assert cost.bytes >= 400


def test_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 10.0, 13.0, 20.0, 120.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert time_and_memory(lambda: None, repeats=3, warmup=0).seconds == 3.0


@pytest.mark.parametrize("kwargs", [{"repeats": 0}, {"warmup": -1}])
def test_refuses_impossible_counts(kwargs: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="wants repeats >= 1"):
        time_and_memory(lambda: None, **kwargs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_a_gpu() -> None:
    x = torch.zeros(1 << 20, device="cuda")
    cost = time_and_memory(lambda: (x + 1) * 2, device="cuda")
    assert cost.bytes == 2 * 4 << 20


def test_quickest_is_the_fastest_call_and_repeats_short_ones():
    calls = []
    seconds = quickest(lambda: calls.append(sum(range(2000))), patience=0.005)
    assert len(calls) > 2 and seconds > 0
    calls.clear()
    assert quickest(lambda: calls.append(sum(range(200_000))), patience=0) > 0 and len(calls) == 2
