import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms import chunking
from longseq_tutorial.mechanisms.chunking import (
    BucketedBias,
    chunk_attention,
    chunk_attention_slow,
    chunk_step,
    fused_attention,
    split_chunks,
    t5_bucket,
    window_attention,
    window_attention_slow,
    window_step,
)
from longseq_tutorial.mechanisms.gated_attention import FUNCTIONS, attend, laplace, relu2
from tests import golden_numbers

look_at_each = chunking._look_at_each


def qkv(length, lead=(2,), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, length, w, dtype=torch.float64, generator=g) for w in (4, 4, 3)]


@pytest.fixture(autouse=True, params=[0, 2**30], ids=["written-out", "torch"])
def window_form(request, monkeypatch):
    """Every test sees both forms of a window whose bias learns: on a CPU the length decides."""
    monkeypatch.setattr(chunking, "ENOUGH", request.param)


class Largest(TorchDispatchMode):
    """Counts the numbers in the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def chunk_by_chunk(q, k, v, chunk, *, function, bias, mask, causal):
    """The reference: a Python loop over the blocks, each attended in full."""
    parts = []
    for start in range(0, q.shape[-2], chunk):
        block = slice(start, min(start + chunk, q.shape[-2]))
        size = block.stop - block.start
        parts.append(
            attend(
                *(t[..., block, :] for t in (q, k, v)),
                function=function,
                bias=None if bias is None else bias[:size, :size],
                mask=None if mask is None else mask[..., block],
                causal=causal,
            )
        )
    return torch.cat(parts, dim=-2)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 30), chunk=st.integers(1, 12), real=st.integers(1, 30), seed=st.integers(0, 999))
def test_one_reshaped_call_equals_the_loop_over_blocks(function, causal, length, chunk, real, seed):
    q, k, v = qkv(length, seed=seed)
    block = min(chunk, length)
    bias = torch.randn(block, block, dtype=torch.float64)
    mask = (torch.arange(length) < real).expand(2, length)
    for m in (None, mask):
        got = chunk_attention(q, k, v, chunk, function=function, bias=bias, mask=m, causal=causal, attend=attend)
        want = chunk_by_chunk(q, k, v, chunk, function=function, bias=bias, mask=m, causal=causal)
        real_ones = slice(None) if m is None else m  # what padding itself comes to is nobody's business
        torch.testing.assert_close(got[real_ones], want[real_ones])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_call_equals_matrices_with_gradients(causal, biased, masked):
    tensors = qkv(11)
    bias = torch.randn(4, 4, dtype=torch.float64) if biased else None
    mask = torch.arange(11).expand(2, 11) < torch.tensor([[6], [11]]) if masked else None
    weight = torch.randn(2, 11, 3, dtype=torch.float64) if mask is None else mask.unsqueeze(-1).double()
    results = []
    for how in (None, attend):
        inputs = [t.clone().requires_grad_() for t in tensors]
        y = chunk_attention(*inputs, 4, bias=bias, mask=mask, causal=causal, attend=how)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


def test_heads_and_a_batch_mask():
    q, k, v = qkv(10, lead=(2, 3))
    mask = torch.arange(10).expand(2, 10) < torch.tensor([[7], [10]])
    got = chunk_attention(q, k, v, 4, mask=mask)
    for h in range(3):
        want = chunk_attention(q[:, h], k[:, h], v[:, h], 4, mask=mask)
        torch.testing.assert_close(got[:, h], want)


def test_nothing_crosses_a_border():
    q, k, v = qkv(12)
    v.requires_grad_()
    y = chunk_attention(q, k, v, 4)
    (grad,) = torch.autograd.grad(y[:, 4:8].sum(), v)
    assert grad[:, 4:8].abs().min() > 0
    assert grad[:, :4].abs().max() == 0 and grad[:, 8:].abs().max() == 0


def test_memory_grows_with_length_times_chunk_not_length_squared():
    q, k, v = (t.requires_grad_() for t in qkv(1024, lead=(1,)))
    with Largest() as seen:
        chunk_attention(q, k, v, 16, function="laplace", attend=attend).sum().backward()
    assert seen.numel <= 1024 * 16


@pytest.mark.parametrize("length", [1, 4, 5])
def test_split_chunks_fills_with_zeros(length):
    x = torch.ones(2, length, 3)
    y = split_chunks(x, 4)
    assert y.shape == (2, -(-length // 4), 4, 3)
    assert y.sum() == x.sum()
    assert torch.equal(y.flatten(1, 2)[:, :length], x)


# ---- chunks: slow form, streaming --------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 25), chunk=st.integers(1, 9), causal=st.booleans(), left=st.booleans(), pad=st.integers(0, 5)
)
def test_chunk_slow_and_fast_agree_in_values_and_gradients(function, length, chunk, causal, left, pad):
    real = torch.arange(length) >= pad if left else torch.arange(length) < length - pad
    mask = torch.stack([real, torch.ones(length, dtype=torch.bool)])
    block = min(chunk, length)
    bias = torch.randn(block, block, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    compare(chunk_attention, chunk_attention_slow, length, chunk, bias, mask, causal=causal, function=function)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (7, 3), (13, 5), (6, 9)])
def test_chunk_steps_equal_the_parallel_form_and_never_hold_more_than_a_chunk(function, length, chunk):
    q, k, v = qkv(length, lead=(2, 3))
    bias = torch.randn(chunk, chunk, dtype=torch.float64)
    block = min(chunk, length)
    want = chunk_attention(q, k, v, chunk, bias=bias[:block, :block], causal=True, function=function, attend=attend)
    state = None
    for t in range(length):
        y, state = chunk_step(
            q[..., t, :], k[..., t, :], v[..., t, :], state, chunk, bias, function=function, attend=attend
        )
        torch.testing.assert_close(y, want[..., t, :], rtol=1e-10, atol=1e-12)
        assert state[0].shape[-2] == t % chunk + 1


# ---- the window --------------------------------------------------------------------------------------------------


def compare(fast, slow, length, size, bias, mask, *, causal, function, lead=(2,), tolerance=1e-9):
    """Both forms on one problem: outputs of real tokens, and every gradient."""
    tensors = [*qkv(length, lead, seed=length), bias]
    weight = torch.randn(*lead, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    if mask is not None:
        weight = weight * mask.view(mask.shape[0], *(1,) * (len(lead) - 1), length, 1)
    results = []
    for form in (fast, slow):
        for how in (None, attend) if function == "softmax" else (attend,):
            inputs = [t.clone().requires_grad_() for t in tensors]
            y = form(*inputs[:3], size, bias=inputs[3], mask=mask, causal=causal, function=function, attend=how)
            assert y.isfinite().all()
            results.append([y * (weight != 0), *torch.autograd.grad((y * weight).sum(), inputs)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def dense_window(q, k, v, window, *, bias, mask, causal, function):
    """The definition with an (L, L) matrix: scores, what is visible, weights, and nothing reshaped."""
    length = q.shape[-2]
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]  # j - i
    visible = (offset.abs() <= window) & ((offset <= 0) if causal else torch.ones_like(offset, dtype=torch.bool))
    visible = visible & mask[:, None, :]
    scores = q @ k.mT
    shift = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            if abs(j - i) <= window:
                shift[i, j] = bias[j - i + window]
    if function == "softmax":
        weights = torch.softmax((scores / math.sqrt(q.shape[-1]) + shift).masked_fill(~visible, -1e300), dim=-1)
    else:
        squash = laplace if function == "laplace" else relu2
        weights = squash(scores / visible.sum(-1, keepdim=True).clamp(min=1) + shift)
    return weights.masked_fill(~visible, 0) @ v


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 0), (1, 3), (2, 1), (11, 0), (11, 3), (12, 4), (13, 50), (17, 16)])
def test_window_is_its_definition(function, causal, length, window):
    q, k, v = qkv(length)
    bias = torch.randn(2 * window + 1, dtype=torch.float64)
    mask = torch.stack([torch.arange(length) >= length // 3, torch.arange(length) < length - length // 3])
    options = {"bias": bias, "mask": mask, "causal": causal, "function": function}
    want = dense_window(q, k, v, window, **options)
    for form in (window_attention, window_attention_slow):
        got = form(q, k, v, window, attend=attend, **options)
        torch.testing.assert_close(got[mask], want[mask], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(1, 25),
    window=st.integers(0, 30),
    causal=st.booleans(),
    left=st.booleans(),
    pad=st.integers(0, 30),
)
def test_window_slow_and_fast_agree_in_values_and_gradients(function, length, window, causal, left, pad):
    real = torch.arange(length) >= pad if left else torch.arange(length) < length - pad
    mask = torch.stack([real, torch.ones(length, dtype=torch.bool)])
    bias = torch.randn(2 * window + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(window))
    compare(window_attention, window_attention_slow, length, window, bias, mask, causal=causal, function=function)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_window_with_heads_a_bias_each_and_a_batch_mask(function, causal):
    mask = torch.arange(14) < torch.tensor([[14], [9]])
    bias = torch.randn(3, 9, dtype=torch.float64)
    compare(window_attention, window_attention_slow, 14, 4, bias, mask, causal=causal, function=function, lead=(2, 3))
    q, k, v = qkv(14, lead=(2, 3))
    options = {"mask": mask, "causal": causal, "function": function, "attend": attend}
    together = window_attention(q, k, v, 4, bias=bias, **options)
    for h in range(3):
        alone = window_attention(q[:, h], k[:, h], v[:, h], 4, bias=bias[h], **options)
        torch.testing.assert_close(together[:, h], alone)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_window_gradients_are_those_of_finite_differences(causal, length):
    inputs = [t.requires_grad_() for t in qkv(length)]
    table = torch.randn(7, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0, length // 2 + 1 :] = False

    def f(q, k, v, table):
        return window_attention(q, k, v, 3, bias=table, mask=mask, causal=causal)[mask]

    assert torch.autograd.gradcheck(f, (*inputs, table))


@pytest.mark.parametrize("function", FUNCTIONS)
@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 20),
    window=st.integers(0, 8),
    left=st.integers(0, 11),
    right=st.integers(0, 11),
    causal=st.booleans(),
)
def test_padding_a_window_on_either_side_changes_nothing(function, length, window, left, right, causal):
    tensors = qkv(length, seed=length)
    bias = torch.randn(2 * window + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    options = {"bias": bias, "causal": causal, "function": function, "attend": attend}
    alone = window_attention(*tensors, window, **options)
    # what stands in the padding must not matter either
    padded = [
        torch.cat([50 + t[:, :1].expand(-1, left, -1), t, t[:, :1].expand(-1, right, -1) - 50], 1) for t in tensors
    ]
    mask = torch.zeros(2, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    got = window_attention(*padded, window, mask=mask, **options)
    torch.testing.assert_close(got[:, left : left + length], alone, rtol=1e-10, atol=1e-11)


@settings(deadline=None, max_examples=20)
@given(length=st.integers(1, 20), chunk=st.integers(1, 8), right=st.integers(0, 11), causal=st.booleans())
def test_padding_chunks_on_the_right_changes_nothing(length, chunk, right, causal):
    tensors = qkv(length, seed=length)
    alone = chunk_attention(*tensors, chunk, causal=causal)
    padded = [torch.cat([t, 50 + t[:, :1].expand(-1, right, -1)], dim=1) for t in tensors]
    mask = (torch.arange(length + right) < length).expand(2, -1)
    got = chunk_attention(*padded, chunk, mask=mask, causal=causal)
    torch.testing.assert_close(got[:, :length], alone, rtol=1e-10, atol=1e-11)


def test_padding_chunks_on_the_left_moves_the_borders():
    q, k, v = qkv(8)
    alone = chunk_attention(q, k, v, 4)
    for left in (1, 4):
        padded = [F.pad(t, (0, 0, left, 0)) for t in (q, k, v)]
        mask = (torch.arange(8 + left) >= left).expand(2, -1)
        moved = (chunk_attention(*padded, 4, mask=mask)[:, left:] - alone).abs().max()
        assert moved > 0.1 if left % 4 else moved < 1e-12


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
def test_exactly_the_keys_in_the_window_are_seen(function, causal):
    """Also to the last bit: what is out of sight has a weight of exactly 0, whatever it holds."""
    q, k, v = (t / 4 for t in qkv(23))  # laplace is positive, but far from its middle rounds to 0
    inside = torch.arange(23)[None, :] - torch.arange(23)[:, None]
    inside = (inside.abs() <= 4) & ((inside <= 0) | (not causal))
    options = {"causal": causal, "function": function, "attend": attend}
    weights = window_attention(q, k, torch.eye(23, dtype=torch.float64).expand(2, 23, 23), 4, **options)
    assert (weights[:, ~inside] == 0).all()
    if function != "relu2":  # which may ignore what it sees
        assert (weights[:, inside] > 0).all()
    elsewhere = [torch.cat([x[:, :12], 1e6 + x[:, 12:]], dim=1) for x in (q, k, v)]
    last = 12 if causal else 8
    same = window_attention(*elsewhere, 4, **options)[:, :last] == window_attention(q, k, v, 4, **options)[:, :last]
    assert same.all()


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_moves_with_the_sequence_and_keeps_batch_members_apart(causal):
    q, k, v = qkv(20)
    y = window_attention(q, k, v, 3, causal=causal)
    later = window_attention(*(t[:, 5:] for t in (q, k, v)), 3, causal=causal)
    torch.testing.assert_close(later[:, 3:], y[:, 8:], rtol=1e-12, atol=1e-13)  # where both see the same
    alone = window_attention(*(t[1:] for t in (q, k, v)), 3, causal=causal)
    torch.testing.assert_close(alone, y[1:], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_as_wide_as_the_sequence_it_is_full_attention(function):
    q, k, v = qkv(9)
    for causal in (False, True):
        want = attend(q, k, v, function=function, causal=causal)
        for window in (8, 9, 40):
            got = window_attention(q, k, v, window, causal=causal, function=function, attend=attend)
            torch.testing.assert_close(got, want)


def test_weights_can_be_watched_and_changed():
    q, k, v = qkv(10)
    shapes = []

    def halve(weights):
        shapes.append(tuple(weights.shape))
        return weights / 2

    y = window_attention(q, k, v, 3, on_weights=halve, attend=attend)
    torch.testing.assert_close(2 * y, window_attention(q, k, v, 3))
    assert shapes == [(2, 4, 3, 9)]
    torch.testing.assert_close(y, window_attention_slow(q, k, v, 3, on_weights=lambda w: w / 2, attend=attend))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("window", [0, 1, 4, 30])
def test_window_steps_equal_the_parallel_form_in_constant_memory(function, window):
    q, k, v = qkv(13, lead=(2, 3))
    bias = torch.randn(3, 2 * window + 1, dtype=torch.float64)
    want = window_attention(q, k, v, window, bias=bias, causal=True, function=function, attend=attend)
    state = None
    for t in range(13):
        y, state = window_step(
            q[..., t, :], k[..., t, :], v[..., t, :], state, window, bias, function=function, attend=attend
        )
        torch.testing.assert_close(y, want[..., t, :], rtol=1e-10, atol=1e-12)
        assert state[0].shape == (2, 3, min(t + 1, window), 4) and state[1].shape[-2] == min(t + 1, window)


def test_a_stream_learns_as_the_parallel_form_does():
    tensors = [t.requires_grad_() for t in qkv(9)]
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 9, 3, dtype=torch.float64)
    parallel = window_attention(*tensors, 3, bias=bias, causal=True)
    state, steps = None, []
    for t in range(9):
        y, state = window_step(*(x[:, t] for x in tensors), state, 3, bias)
        steps.append(y)
    inputs = [*tensors, bias]
    want = torch.autograd.grad((parallel * weight).sum(), inputs)
    got = torch.autograd.grad((torch.stack(steps, dim=1) * weight).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"function": "laplace", "attend": attend}])
def test_window_memory_grows_with_length_times_window(causal, options):
    largest = []
    for length in (512, 1024):
        q, k, v = (t.requires_grad_() for t in qkv(length, lead=(1, 2)))
        bias = torch.randn(2, 33, dtype=torch.float64, requires_grad=True)
        mask = (torch.arange(length) < length - 5).expand(1, length)
        with Largest() as seen:
            window_attention(q, k, v, 16, bias=bias, mask=mask, causal=causal, **options).sum().backward()
        largest.append(seen.numel)
        assert seen.numel <= 2 * length * 3 * 16
        assert bias.grad.abs().sum() > 0
    assert largest[1] == 2 * largest[0]


@pytest.mark.parametrize("form", [window_attention, chunk_attention])
def test_half_precision_and_autocast(form):
    q, k, v = (t.float() for t in qkv(40))
    want = form(q, k, v, 8)
    low = form(q.bfloat16(), k.bfloat16(), v.bfloat16(), 8)
    assert low.dtype == torch.bfloat16
    assert want.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = form(q, k, v, 8)
    assert cast.dtype == torch.float32
    for got in (low, cast):
        assert (got.float() - want).abs().max() < 0.05


# ---- T5's buckets, SPADE's local attention -------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["causal", "bidir"])
def test_buckets_are_those_of_the_published_code(direction):
    arrays = golden_numbers.load("spade_local_attention")
    for key, reach, buckets, farthest in (
        ("buckets_rel_m12_p12", 12, 8, 6),
        ("buckets32_128_rel_m520_p520", 520, 32, 128),
    ):
        offset = torch.arange(-reach, reach + 1)
        got = t5_bucket(offset, buckets, farthest, bidirectional=direction == "bidir")
        assert got.tolist() == arrays[f"{direction}_{key}"].tolist()


@settings(deadline=None)
@given(quarter=st.integers(1, 20), farther=st.integers(1, 300), both=st.booleans())
def test_buckets_widen_with_the_distance_and_are_all_in_range(quarter, farther, both):
    buckets = 4 * quarter
    exact = quarter if both else 2 * quarter
    bucket = t5_bucket(-torch.arange(0, 1000), buckets, exact + farther, both)  # into the past
    assert bucket[:exact].tolist() == list(range(exact))
    assert (bucket.diff() >= 0).all() and bucket.max() == (buckets // 2 if both else buckets) - 1
    assert (bucket[exact + farther :] == bucket.max()).all()
    ahead = t5_bucket(torch.arange(1, 1000), buckets, exact + farther, both)
    assert torch.equal(ahead, bucket[1:] + buckets // 2) if both else (ahead == 0).all()


@pytest.mark.parametrize("direction", ["causal", "bidir"])
def test_local_attention_of_spade(direction):
    """Window attention, bucketed bias and four projections are SPADE's local attention, as its authors computed it."""
    arrays = {
        key.split("_", 1)[1]: torch.from_numpy(value) if value.ndim else int(value)
        for key, value in golden_numbers.load("spade_local_attention").items()
        if key.startswith(direction)
    }
    causal, heads = direction == "causal", arrays["n_heads"]
    bias = BucketedBias(heads, arrays["num_buckets"], arrays["max_distance"], bidirectional=not causal).double()
    with torch.no_grad():
        bias.table.copy_(arrays["bias_table"])

    def split_heads(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, L, d/H)

    q, k, v = (split_heads(F.linear(arrays["x"], arrays[f"W_{name}"])) for name in "qkv")
    for form in (window_attention, window_attention_slow):
        found = form(q, k, v, arrays["radius"], bias=bias(arrays["radius"]), mask=arrays["keep"], causal=causal)
        y = F.linear(found.transpose(1, 2).flatten(2), arrays["W_o"])
        error = (y - arrays["y"])[arrays["keep"]].abs().max()
        assert error < 1e-9


def test_bucketed_bias_learns_one_number_a_bucket():
    bias = BucketedBias(2, 8, 6).double()
    table = bias(9)
    assert table.shape == (2, 19)
    table[:, 9 + 6 :].sum().backward()  # distances 6 .. 9 ahead share the last bucket
    assert bias.table.grad.nonzero()[:, 0].unique().tolist() == [7]
    assert bias.table.grad[7].tolist() == [4.0, 4.0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: chunk_attention(q, k, v, 0), "at least 1"),
        (lambda q, k, v: chunk_attention(q, k[:, :3], v, 2), "alike"),
        (lambda q, k, v: chunk_attention(q, k, v, 2, mask=torch.ones(2, 6)), "mask must be bool"),
        (lambda q, k, v: chunk_attention(q, k, v, 2, bias=torch.ones(3, 3)), r"\(2, 2\)"),
        (lambda q, k, v: chunk_attention(q, k, v, 2, function="laplace"), "attend=gated_attention.attend"),
        (lambda q, k, v: chunk_attention_slow(q, k, v, 2, bias=torch.ones(3, 3)), r"\(2, 2\)"),
        (lambda q, k, v: chunk_step(q[:, 0], k[:, 0], v[:, 0], None, 0), "at least 1"),
        (lambda q, k, v: chunk_step(q[:, 0], k[:, 0], v[:, 0], None, 2, torch.ones(3, 3)), r"\(2, 2\)"),
        (lambda q, k, v: window_attention(q, k, v, -1), "at least 0"),
        (lambda q, k, v: window_attention(q[:, :0], k[:, :0], v[:, :0], 1), "L >= 1"),
        (lambda q, k, v: window_attention(q, k, v[:, :5], 1), "alike"),
        (lambda q, k, v: window_attention(q, k, v, 2, mask=torch.ones(2, 6)), "mask must be bool"),
        (lambda q, k, v: window_attention(q, k, v, 2, bias=torch.ones(4)), r"\(5,\) or \(2, 5\); got \(4,\)"),
        (lambda q, k, v: window_attention(q, k, v, 2, bias=torch.ones(3, 5)), r"\(2, 5\); got \(3, 5\)"),
        (lambda q, k, v: window_attention(q, k, v, 2, function="relu2"), "attend=gated_attention.attend"),
        (lambda q, k, v: window_attention_slow(q, k, v, 2, bias=torch.ones(4)), "offset j - i"),
        (lambda q, k, v: window_step(q[:, 0], k[:, 0], v[:, 0], None, 2, torch.ones(2)), r"\(5,\)"),
        (lambda q, k, v: t5_bucket(torch.arange(3), 6), "even number of buckets"),
        (lambda q, k, v: t5_bucket(torch.arange(3), 8, 2), "max_distance above the 2"),
        (lambda q, k, v: t5_bucket(torch.ones(3)), "whole numbers"),
        (lambda q, k, v: BucketedBias(0), "heads >= 1"),
        (lambda q, k, v: BucketedBias(1, buckets=7), "even number of buckets"),
        (lambda q, k, v: fused_attention(q, k, v, on_weights=lambda w: w), "hides its weights"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call(*qkv(6))


# ---- a group of blocks at a time -------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("scores", "rows"), [(1, 1), (300, 2), (1000, 4)])
def test_groups_of_blocks_change_nothing_in_values_or_gradients(monkeypatch, function, causal, masked, scores, rows):
    """Two sequences, three heads, blocks of 5: groups of one block, of a few, with a rest; each border is crossed."""
    monkeypatch.setattr(chunking, "GROUP", scores)
    monkeypatch.setattr(chunking, "TILE", scores)
    monkeypatch.setattr(chunking, "ROWS", rows)
    groups = []
    monkeypatch.setattr(chunking, "_look_at_each", lambda look, *p: groups.append(len(p[0])) or look_at_each(look, *p))
    mask = torch.stack([torch.arange(43) >= 7, torch.arange(43) < 29]) if masked else None
    options = {"causal": causal, "function": function, "lead": (2, 3)}
    compare(chunk_attention, chunk_attention_slow, 43, 5, torch.randn(5, 5, dtype=torch.float64), mask, **options)
    compare(window_attention, window_attention_slow, 43, 5, torch.randn(3, 11, dtype=torch.float64), mask, **options)
    assert min(groups) > 1  # it was really done in groups
    q, k, v = qkv(43, lead=(2, 3))
    for fast, slow in ((chunk_attention, chunk_attention_slow), (window_attention, window_attention_slow)):
        options = {"mask": mask, "causal": causal, "function": function, "attend": attend}  # no gradient: one result
        seen = slice(None) if mask is None else mask[:, None].expand(2, 3, 43)
        torch.testing.assert_close(fast(q, k, v, 5, **options)[seen], slow(q, k, v, 5, **options)[seen])


@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_that_learns_takes_the_written_out_form_and_no_other(monkeypatch, masked):
    """It pays where it is allowed to, and equals the form for every device, in values and gradients."""
    monkeypatch.setattr(chunking, "ENOUGH", 200 * 141)
    calls = []
    by_tiles = chunking._window_by_tiles
    monkeypatch.setattr(chunking, "_window_by_tiles", lambda *args: calls.append(args) or by_tiles(*args))
    q, k, v = (t.requires_grad_() for t in qkv(200, lead=(2, 3)))
    bias = torch.randn(3, 141, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(200) < torch.tensor([[200], [70]]) if masked else None  # the last queries see nothing real
    found = []
    for written_out in (True, False):
        with monkeypatch.context() as patch:
            if not written_out:
                patch.setattr(chunking, "_written_out", lambda *args: False)
            y = window_attention(q, k, v, 70, bias=bias, mask=mask)
        found.append([y, *torch.autograd.grad(y.sin().sum(), [q, k, v, bias])])
    assert len(calls) == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        window_attention(q, k, v, 70, bias=bias, mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        window_attention(q.float(), k.float(), v.float(), 70, bias=bias.float(), mask=mask)
    window_attention(q, k, v, 70, bias=bias, mask=mask, attend=attend)
    window_attention(*(t[..., :199, :] for t in (q, k, v)), 70, bias=bias)  # too short
    assert len(calls) == 1


def test_no_tensor_of_a_long_sequence_holds_more_scores_than_a_group(monkeypatch):
    monkeypatch.setattr(chunking, "GROUP", 2**12)
    q, k, v = (t.requires_grad_() for t in qkv(2048, lead=(1,)))
    for form in (chunk_attention, window_attention):
        with Largest() as seen:
            form(q, k, v, 16, function="laplace", attend=attend).sum().backward()
        assert seen.numel <= 2048 * 6  # q, k, v themselves are larger than a group of scores


def test_who_watches_the_weights_sees_all_of_them_at_once(monkeypatch):
    monkeypatch.setattr(chunking, "GROUP", 1)
    for form, keys in ((chunk_attention, 4), (window_attention, 12)):
        seen = []
        form(*qkv(12), 4, attend=attend, on_weights=lambda w, seen=seen: seen.append(w.shape) or w)
        assert seen == [(2, 3, 4, keys)]
