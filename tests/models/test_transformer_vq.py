"""Transformer-VQ's layer against attention over quantised keys written out; the reference's numbers: test_official."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms.vq_attention import codewords, nearest_code
from longseq_tutorial.models import record
from longseq_tutorial.models.transformer_vq import TransformerVQLayer
from tests.models.any_task import randomised

SIZES = dict(heads=2, key_dim=4, value_dim=5, codes=7, block=4, memory=3)


def vq(**more):
    torch.manual_seed(1)
    layer = randomised(TransformerVQLayer(6, **{**SIZES, **more}))
    layer.quantizer.set_codebook(torch.randn_like(layer.quantizer.code_sum))
    return layer


def rms(x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def written_out(layer, x, mask=None):
    """The definition, pair by pair: one softmax over all keys of the past, an L x L matrix, no blocks and no sums.

    Keys get their gradient straight through from the pairs that the layer computes one by one, as it says.
    """
    heads, dk, dv, tau = layer.heads, layer.key_dim, layer.value_dim, math.sqrt(layer.key_dim)
    batch, length, _ = x.shape
    n = rms(x) * layer.gain + layer.bias
    k, v, g = torch.split(n @ layer.w_kvg, [heads * dk, heads * dv, heads * dv], dim=-1)
    q = (n @ layer.w_q).view(batch, length, heads, dk).transpose(1, 2)
    k = k.view(batch, length, heads, dk).transpose(1, 2)
    q, k = rms(q) / math.sqrt(tau), rms(k) / math.sqrt(tau)
    v = F.silu(v).view(batch, length, heads, dv).transpose(1, 2)
    codebook = layer.quantizer.codebook
    k_hat = codewords(codebook, nearest_code(k, codebook))
    k_through = k_hat + (k - k.detach())
    i, j = torch.arange(length)[:, None], torch.arange(length)
    near = j >= i // layer.block * layer.block - layer.memory
    u, w = (p.view(heads, 1, dk) / math.sqrt(tau) for p in (layer.u, layer.w))
    scores = torch.where(near, (q + u) @ k_through.mT, (q + u) @ k_hat.mT)
    rate = layer.pe_lam ** (-torch.arange(0, layer.dim, 2, dtype=x.dtype) / layer.dim)
    angle = (i - j).clamp(min=0).unsqueeze(-1) * rate  # (L, L, D/2)
    wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
    r = (wave @ layer.w_r).view(length, length, heads, dk) / math.sqrt(tau)
    position = torch.einsum("bhik,ijhk->bhij", q + w, r)
    scores = scores + torch.where(i - j <= layer.memory, position, 0.0)
    visible = (j <= i) if mask is None else (j <= i) & mask[:, None, None, :]
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1)
    found = (weights.nan_to_num(0.0) @ v).transpose(1, 2).flatten(2)
    return (found * F.silu(g)) @ layer.w_o


@pytest.mark.parametrize("length", [1, 2, 4, 13, 23])
@pytest.mark.parametrize(("block", "memory", "heads"), [(4, 3, 2), (3, 0, 1), (5, 9, 2), (30, 2, 1), (1, 1, 2)])
def test_equals_attention_written_out_with_every_gradient(length, block, memory, heads):
    layer = vq(block=block, memory=memory, heads=heads)
    start = torch.randn(2, length, 6, dtype=torch.float64)
    cotangent, results = torch.randn(2, length, 6, dtype=torch.float64), []
    for form in (layer, lambda x: written_out(layer, x)):
        x = start.clone().requires_grad_()
        y = form(x)
        slopes = torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()], materialize_grads=True)
        results.append([y, *slopes])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_wherever_it_is(side):
    layer = vq()
    x = torch.randn(2, 13, 6, dtype=torch.float64)
    noise = torch.full((2, 5, 6), 50.0, dtype=torch.float64)
    parts = [noise, x] if side == "left" else [x, noise]
    mask = torch.cat([torch.full(p.shape[:2], p is x) for p in parts], dim=1)
    padded = torch.cat(parts, dim=1)
    torch.testing.assert_close(layer(padded, mask)[mask].view(2, 13, 6), layer(x))
    torch.testing.assert_close(layer.mix(padded, mask)[1], layer.mix(x)[1])
    torch.testing.assert_close(layer(padded, mask)[mask], written_out(layer, padded, mask)[mask])


def test_the_future_and_the_neighbours_change_nothing():
    layer = vq()
    x = torch.randn(3, 17, 6, dtype=torch.float64)
    want = layer(x)
    torch.testing.assert_close(layer(x[1:2]), want[1:2])
    other = x.clone()
    other[:, 9:] = 7 * torch.randn_like(other[:, 9:])
    torch.testing.assert_close(layer(other)[:, :9], want[:, :9], rtol=0, atol=1e-12)


def test_steps_and_pieces_equal_the_whole_in_a_state_that_stays():
    layer = vq()
    x = torch.randn(2, 41, 6, dtype=torch.float64)
    want, state, sizes = layer(x), layer.initial_state(2), set()
    for t in range(41):
        y, state = layer.step(x[:, t], state)
        torch.testing.assert_close(y, want[:, t])
        sizes.add(sum(part.numel() for part in state.values()))
    assert len(sizes) == 1
    pieces, state = [], None
    for piece in x.split([7, 1, 19, 14], dim=1):
        y, _, state = layer.mix(piece, state=state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), want)


def test_the_codebook_moves_in_training_only_and_the_loss_pulls_the_keys():
    layer = TransformerVQLayer(6, **SIZES, start="keys", decay=0.5)
    x = torch.randn(4, 20, 6)
    layer.eval()
    before = layer.quantizer.codebook
    layer(x)
    assert torch.equal(layer.quantizer.codebook, before)
    layer.train()
    _, first, _ = layer.mix(x)
    for _ in range(5):
        _, loss, _ = layer.mix(x)
    assert not torch.equal(layer.quantizer.codebook, before)
    assert loss < first  # each code is now nearer to the mean of its keys
    loss.backward()
    keys = slice(0, SIZES["heads"] * SIZES["key_dim"])
    assert layer.w_kvg.grad[:, keys].abs().max() > 0
    assert layer.w_kvg.grad[:, keys.stop :].abs().max() == 0 and layer.w_q.grad is None


def test_a_stopped_cache_stops_the_gradient_and_no_value():
    flowing, stopped = vq(), vq(stop_cache=True)
    stopped.load_state_dict(flowing.state_dict())
    start, slopes = torch.randn(1, 12, 6, dtype=torch.float64), []
    for layer in (flowing, stopped):
        x = start.clone().requires_grad_()
        y = layer(x)
        slopes.append(torch.autograd.grad(y[0, 11].sum(), x)[0])
    torch.testing.assert_close(flowing(start), stopped(start))
    assert slopes[0][0, :8].abs().min() > 0 and slopes[1][0, :8].abs().max() == 0 and slopes[1][0, 8:].abs().min() > 0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(part, torch.Tensor) and "empty" not in str(func):
                Largest.numel = max(Largest.numel, part.numel())
        return out


def test_memory_grows_with_the_length_alone():
    layer, sizes = TransformerVQLayer(6, **{**SIZES, "block": 32, "memory": 16}), []
    for length in (512, 2048):
        Largest.numel = 0
        with Largest():
            layer(torch.randn(1, length, 6)).sum().backward()
        sizes.append(Largest.numel)
    assert sizes[1] < 2048 * 2048 / 30 and sizes[1] <= 4.5 * sizes[0]


def test_bfloat16_autocast_stays_close_and_trains():
    layer = TransformerVQLayer(6, **SIZES)
    layer.quantizer.set_codebook(4**0.25 * F.normalize(torch.randn(2, 7, 4), dim=-1))
    layer.eval()
    x = torch.randn(2, 13, 6)
    want = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = layer(x)
    assert (got - want).norm() / want.norm() < 0.2  # a key between two codes may take the other one
    layer.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, loss, _ = layer.mix(x)
    (y.float().square().sum() + loss).backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in layer.parameters())


def test_recording_changes_nothing():
    layer = vq()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    with record(layer) as tape:
        y = layer(x)
    assert torch.equal(y, layer(x))
    assert tape["codes_seen"].shape == (2, 2, 9) and tape["gate"].shape == (2, 9, 10)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: TransformerVQLayer(5, **SIZES), "even dim"),
        (lambda: TransformerVQLayer(6, **{**SIZES, "block": 0}), "positive widths, codes and block"),
        (lambda: TransformerVQLayer(6, **{**SIZES, "memory": -1}), "memory >= 0"),
        (lambda: TransformerVQLayer(6, **SIZES, pe_lam=1), "pe_lam > 1"),
        (lambda: TransformerVQLayer(6, **SIZES, decay=2.0), "decay"),
        (lambda: vq()(torch.randn(2, 3, 5)), r"x must be \(batch, length >= 1, dim\)"),
        (lambda: vq()(torch.randn(2, 0, 6)), "length >= 1"),
        (lambda: vq()(torch.randn(2, 3, 6), torch.ones(2, 3)), "mask must be bool"),
        (lambda: vq().step(torch.randn(2, 3, 6), {}), "one time step"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
