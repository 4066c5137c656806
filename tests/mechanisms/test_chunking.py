import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms.chunking import chunk_attention, fused_attention, split_chunks
from longseq_tutorial.mechanisms.gated_attention import FUNCTIONS, attend


def qkv(length, lead=(2,), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, length, w, dtype=torch.float64, generator=g) for w in (4, 4, 3)]


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
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.numel = max(self.numel, t.numel())
            return out

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


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k, v: chunk_attention(q, k, v, 0), "at least 1"),
        (lambda q, k, v: chunk_attention(q, k[:, :3], v, 2), "alike"),
        (lambda q, k, v: chunk_attention(q, k, v, 2, mask=torch.ones(2, 6)), "mask must be bool"),
        (lambda q, k, v: chunk_attention(q, k, v, 2, bias=torch.ones(3, 3)), r"\(2, 2\)"),
        (lambda q, k, v: chunk_attention(q, k, v, 2, function="laplace"), "attend=gated_attention.attend"),
        (lambda q, k, v: fused_attention(q, k, v, on_weights=lambda w: w), "hides its weights"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call(*qkv(6))
