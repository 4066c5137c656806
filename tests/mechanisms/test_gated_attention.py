import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms import gated_attention
from longseq_tutorial.mechanisms.gated_attention import (
    FUNCTIONS,
    GatedAttention,
    RelativeBias,
    RotaryBias,
    attend,
    attend_in_tiles,
    attend_slow,
    attention_weights,
    laplace,
    relu2,
)
from tests import golden_numbers as golden


def qkv(length, z=4, v=3, lead=(2,), seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, length, w, dtype=torch.float64, generator=g) for w in (z, z, v)]


# ---- functions -------------------------------------------------------------------------------------------------


def test_authors_functions_and_slopes():
    arrays = golden.load("mega_attention_functions")
    for name, function in (("laplace", laplace), ("relu2", relu2)):
        x = torch.from_numpy(arrays["x"]).requires_grad_()
        y = function(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        np.testing.assert_allclose(y.detach().numpy(), arrays[name], rtol=0, atol=1e-12)
        np.testing.assert_allclose(slope.numpy(), arrays[f"{name}_grad"], rtol=0, atol=1e-12)


def test_laplace_and_relu2_meet_at_sqrt_one_half_with_the_same_slope():
    x = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    for function, value in ((laplace, 0.5), (relu2, 0.5)):
        y = function(x)
        (slope,) = torch.autograd.grad(y, x)
        assert abs(y.item() - value) < 1e-5
        assert abs(slope.item() - math.sqrt(2)) < 1e-4


# ---- slow form = matrix form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 13])
@pytest.mark.parametrize("masked", [False, True])
def test_loop_equals_matrices_with_gradients(function, causal, length, masked):
    tensors = [*qkv(length), torch.randn(length, length, dtype=torch.float64)]
    weight = torch.randn(2, length, 3, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, length // 2 :] = False
        mask[1, : length // 3] = False
    results = []
    for form in (attend, attend_slow):
        q, k, v, bias = inputs = [t.clone().requires_grad_() for t in tensors]
        y = form(q, k, v, function=function, bias=bias, mask=mask, causal=causal)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "bias", ["none", "square", "simple", "simple, by rows", "simple, not written out", "rotary", "rotary, by rows"]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("length", "tile"), [(1, 1), (7, 8), (7, 90), (13, 40), (13, 52), (13, 10_000)])
def test_tiles_equal_the_whole_with_gradients(monkeypatch, function, causal, bias, masked, length, tile):
    monkeypatch.setattr(gated_attention, "TILE", tile)
    monkeypatch.setattr(gated_attention, "ROWS", 1)
    tensors = [*qkv(length, v=5), torch.randn(length, length, dtype=torch.float64)]
    bias, _, how = bias.partition(", ")
    if how == "not written out":
        monkeypatch.setattr(gated_attention, "_in_place", lambda *inputs: False)
    module = {"simple": RelativeBias(9), "rotary": RotaryBias(4)}.get(bias, torch.nn.Identity()).double()
    weight = torch.randn(2, length, 5, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, length // 2 :] = False
        mask[1, : length // 3] = False
    results = []
    for form in (attend, attend_in_tiles):
        q, k, v, square = inputs = [t.clone().requires_grad_() for t in tensors]
        given = {"none": None, "square": square}.get(bias)
        if bias in ("simple", "rotary"):
            in_tiles = partial(module.rows, length=length) if how == "by rows" else module.distances(length)
            given = module(length) if form is attend else in_tiles
        y = form(q, k, v, function=function, bias=given, mask=mask, causal=causal)
        leaves = [*inputs, *module.parameters()]
        gradients = torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True)
        results.append([y, *(g for g in gradients if g is not None)])
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize(("function", "bias"), [("softmax", "none"), ("softmax", "simple"), ("laplace", "rotary")])
def test_tiles_never_hold_a_square(function, bias, by_rows, causal):
    length, z = 5000, 4
    module = {"simple": RelativeBias(length), "rotary": RotaryBias(z)}.get(bias)
    q, k, v = (torch.randn(1, length, z, requires_grad=True) for _ in range(3))
    with Largest() as largest:
        given = None
        if module is not None:
            given = partial(module.rows, length=length) if by_rows else module.distances(length)
        attend_in_tiles(q, k, v, function=function, bias=given, causal=causal).sum().backward()
    assert largest.numel <= max(gated_attention.TILE, gated_attention.ROWS * length) < length**2 / 16


def test_full_attention_of_the_unit_never_holds_a_square(monkeypatch):
    monkeypatch.setattr(gated_attention, "TILE", 2**12)
    monkeypatch.setattr(gated_attention, "ROWS", 8)
    unit = GatedAttention(4, 2, 6, function="softmax", max_positions=50)
    with Largest() as largest:
        unit(torch.randn(2, 600, 4)).sum().backward()
    assert largest.numel <= 8 * 2 * 600 < 600**2 / 16


@pytest.mark.parametrize("on_weights", [None, lambda weights: weights * 0.5])
def test_a_bias_by_distance_is_the_square_it_spans(on_weights):
    q, k, v = qkv(6)
    line = torch.randn(11, dtype=torch.float64)
    square = torch.stack([line[5 - i : 11 - i] for i in range(6)])
    for function in FUNCTIONS:
        whole = attend(q, k, v, function=function, bias=square, on_weights=on_weights)
        tiled = attend_in_tiles(q, k, v, function=function, bias=line, on_weights=on_weights)
        torch.testing.assert_close(tiled, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", [RelativeBias(4), RotaryBias(4)])
@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_distances_are_the_first_column_and_row_of_the_bias(module, length):
    square = module(length)
    line = torch.cat([square[:, 0].flip(0), square[0, 1:]])
    torch.testing.assert_close(module.distances(length), line)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@settings(deadline=None, max_examples=15)
@given(length=st.integers(1, 12), before=st.integers(0, 5), after=st.integers(0, 5), seed=st.integers(0, 999))
def test_padding_never_changes_real_outputs(function, causal, length, before, after, seed):
    q, k, v = qkv(length, seed=seed)
    want = attend(q, k, v, function=function, causal=causal)
    total = before + length + after
    junk = [torch.full((2, total, t.shape[-1]), 1e3, dtype=torch.float64) for t in (q, k, v)]
    for there, t in zip(junk, (q, k, v), strict=True):
        there[:, before : before + length] = t
    mask = torch.zeros(2, total, dtype=torch.bool)
    mask[:, before : before + length] = True
    got = attend(*junk, function=function, mask=mask, causal=causal)
    torch.testing.assert_close(got[:, before : before + length], want)
    assert got.isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_causal_means_the_future_does_not_matter(function):
    q, k, v = qkv(9)
    want = attend(q, k, v, function=function, causal=True)
    k[:, 5:], v[:, 5:] = 50, -50
    torch.testing.assert_close(attend(q, k, v, function=function, causal=True)[:, :5], want[:, :5])


def test_softmax_rows_sum_to_one_and_laplace_rows_need_not():
    q, k, _ = qkv(11)
    torch.testing.assert_close(attention_weights(q, k).sum(-1), torch.ones(2, 11, dtype=torch.float64))
    weights = attention_weights(q, k, function="laplace")
    assert ((weights >= 0) & (weights <= 1)).all() and weights.sum(-1).std() > 0


def test_hidden_keys_get_no_laplace_weight():
    """laplace(0) = 0.006, so setting a hidden score to 0 before the function would leak; the mask comes after."""
    q, k, _ = qkv(6)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    assert attention_weights(q, k, function="laplace", mask=mask)[..., 4:].abs().max() == 0
    assert laplace(torch.tensor(0.0)) > 0.005


def test_laplace_divides_by_the_keys_a_query_sees():
    q, k, _ = qkv(8)
    mask = torch.tensor([[True] * 5 + [False] * 3] * 2)
    want = laplace((q @ k.transpose(1, 2)) / 5)[..., :5]
    torch.testing.assert_close(attention_weights(q, k, function="laplace", mask=mask)[..., :5], want)
    rows = torch.arange(1, 9, dtype=torch.float64)[:, None]
    want = laplace(q @ k.transpose(1, 2) / rows).tril()
    torch.testing.assert_close(attention_weights(q, k, function="laplace", causal=True), want)


def test_scores_are_float32_or_better_inside_half_precision():
    q, k, v = (t.bfloat16() for t in qkv(64, z=16))
    want = attend(q.double(), k.double(), v.double())
    got = attend(q, k, v)
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 1e-2


# ---- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 6, 9])
def test_relative_bias_is_the_table_read_at_key_minus_query(length):
    bias = RelativeBias(6).double()
    full = bias(length)
    for i in range(length):
        for j in range(length):
            assert full[i, j] == bias.table[max(-5, min(5, j - i)) + 5]
        assert torch.equal(bias.row(i), full[i, : i + 1])


def test_authors_relative_biases():
    arrays = golden.load("mega_relative_position_bias")
    bias = RelativeBias(10).double()
    bias.table.data = torch.from_numpy(arrays["simple_param"])
    for length in (10, 7, 1):
        want = arrays[f"simple_bias_len{length}"]
        np.testing.assert_allclose(bias(length).detach().numpy(), want, rtol=0, atol=1e-12)


def test_authors_rotary_bias():
    arrays = golden.load("mega_relative_position_bias")
    bias = RotaryBias(8).double()
    with torch.no_grad():
        bias.alpha.copy_(torch.from_numpy(arrays["rotary_alpha"][0]))
        bias.beta.copy_(torch.from_numpy(arrays["rotary_beta"][0]))
    for length in (5, 12, 20):
        want = arrays[f"rotary_bias_len{length}"]
        np.testing.assert_allclose(bias(length).detach().numpy(), want, rtol=0, atol=1e-6)


def test_rotary_bias_depends_on_the_distance_only_and_has_no_largest_length():
    bias = RotaryBias(8).double()
    full = bias(300)
    torch.testing.assert_close(full[1:, 1:], full[:-1, :-1])
    torch.testing.assert_close(bias.row(123), full[123, :124])


# ---- the unit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bias", ["simple", "rotary"])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_step_equals_parallel(function, bias, length):
    unit = GatedAttention(5, 4, 6, function=function, bias=bias, max_positions=7, causal=True).double()
    for p in unit.parameters():
        torch.nn.init.normal_(p)
    x, smooth, residual = torch.randn(3, 2, length, 5, dtype=torch.float64)
    state, steps = unit.initial_state(2), []
    for t in range(length):
        y, state = unit.step(x[:, t], state, smooth[:, t], residual[:, t])
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), unit(x, smooth, residual))


@pytest.mark.parametrize("stretch", [1, 4, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7), (3, 11)])
def test_gates_in_stretches_equal_the_plain_ones_with_gradients(monkeypatch, batch, length, dropout, stretch):
    monkeypatch.setattr(gated_attention, "STRETCH", stretch)
    unit = GatedAttention(5, 4, 6, max_positions=11, dropout=dropout, hidden_dropout=dropout).double()
    for p in unit.parameters():
        torch.nn.init.normal_(p)
    inputs = [torch.randn(batch, length, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(length, batch, 5, dtype=torch.float64).transpose(0, 1)  # a gradient that is not contiguous
    results = []
    for plain in (False, True):
        if plain:
            unit.h_proj.register_forward_hook(lambda *seen: None)
        torch.manual_seed(3)
        y = unit(*inputs)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [*inputs, *unit.parameters()])])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def test_whoever_looks_at_the_gates_sees_them_and_changes_nothing():
    unit, x = GatedAttention(4, 2, 6), torch.randn(2, 5, 4)
    y, seen = unit(x), {}
    for name in ("update_gate", "reset_gate"):
        getattr(unit, name).register_forward_hook(lambda _m, _a, gate, name=name: seen.update({name: gate}))
    assert torch.equal(unit(x), y)
    update, _, reset, _ = unit.mx_proj(x).split([4, 2, 6, 4], dim=-1)
    torch.testing.assert_close(seen["update_gate"], update.sigmoid())
    torch.testing.assert_close(seen["reset_gate"], torch.nn.functional.silu(reset))


def test_gates_under_autocast():
    unit, x = GatedAttention(4, 2, 6), torch.randn(2, 5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = unit(x)
    torch.testing.assert_close(y, unit(x), rtol=0.02, atol=0.02)


def test_update_gate_open_and_shut():
    unit = GatedAttention(4, 2, 6).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        unit.mx_proj.bias[:4] = -60.0  # shut: nothing of the candidate passes
        torch.testing.assert_close(unit(x), x)
        unit.mx_proj.bias[:4] = 60.0  # open: nothing of the input passes
        assert (unit(x) - unit(x, residual=torch.zeros_like(x))).abs().max() < 1e-9


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_mask_for_each_pair_allows_any_number_of_keys(function):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, w, dtype=torch.float64, generator=g) for n, w in ((5, 4), (8, 4), (8, 3)))
    bias = torch.randn(5, 8, dtype=torch.float64, generator=g)
    pairs = torch.rand(2, 5, 8, generator=g) < 0.5
    pairs[0, 2] = False  # a query that sees nothing
    y = attend(q, k, v, function=function, bias=bias, mask=pairs)
    torch.testing.assert_close(y, attend_slow(q, k, v, function=function, bias=bias, mask=pairs))
    moved = attend(q, k + 9 * ~pairs[:1, :1].mT, v, function=function, bias=bias, mask=pairs)
    torch.testing.assert_close(moved[0, 0], y[0, 0])  # hidden keys do not matter
    with pytest.raises(ValueError, match="mask must be bool"):
        attend(q, k, v, function=function, mask=pairs[:, :, :5])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: GatedAttention(4, 0, 4), "positive widths"),
        (lambda: GatedAttention(4, 2, 4, function="sigmoid"), "softmax, laplace, relu2"),
        (lambda: GatedAttention(4, 2, 4, bias="alibi"), "'simple' or 'rotary'"),
        (lambda: GatedAttention(4, 3, 4, bias="rotary"), "even"),
        (lambda: GatedAttention(4, 2, 4).initial_state(1), "causal=True"),
        (lambda: GatedAttention(4, 2, 4)(torch.ones(1, 3, 5)), r"\(\*, \*, 4\)"),
        (lambda: RelativeBias(0), ">= 1"),
        (lambda: attend(torch.ones(1, 3, 2), torch.ones(1, 4, 2), torch.ones(1, 4, 2)), "alike"),
        (lambda: attend(*[torch.ones(1, 3, 2)] * 3, bias=torch.ones(2, 2)), r"\(3, 3\)"),
        (lambda: attend(*[torch.ones(1, 3, 2)] * 3, mask=torch.ones(1, 3)), "mask.bool"),
        (lambda: attend_slow(*[torch.ones(1, 3, 2)] * 3, function="linear"), "softmax, laplace, relu2"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
