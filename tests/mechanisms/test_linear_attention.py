import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms import linear_attention as module_file
from longseq_tutorial.mechanisms.linear_attention import (
    CHUNK,
    FavorFeatures,
    LinearAttention,
    elu_features,
    linear_attention,
    linear_attention_quadratic,
    linear_attention_recurrent,
    linear_attention_step,
    linear_attention_weights,
    sikf_features,
)
from tests import golden_numbers as golden

ODD_LENGTHS = [1, 2, 3, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 45]


def identity(x):
    """For features that are there already."""
    return x


def favor(dim=3, features=7, seed=0, **options):
    return FavorFeatures(dim, features, generator=torch.Generator().manual_seed(seed), **options).double()


MAPS = {
    "elu": elu_features,
    "sikf": sikf_features,
    "favor": favor(),
    "exp": torch.exp,
    "lambda": lambda x: torch.cat([x.relu(), (-x).relu()], dim=-1) + 0.01,
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def qkv(length, seed=0, batch=2, heads=2, dim=3, v_dim=4, dtype=torch.float64):
    return tuple(
        draw(batch, heads, length, width, seed=10 * seed + i, dtype=dtype) for i, width in enumerate((dim, dim, v_dim))
    )


def some_mask(length, seed=0, batch=2):
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)) > 0.3


def with_gradients(form, inputs, seed=5):
    """y, and the gradients of a fixed random combination of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = form(*inputs)
    return [y, *torch.autograd.grad((y * draw(*y.shape, seed=seed)).sum(), inputs)]


def agree(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-10, "atol": 1e-11}))


# ---- all forms agree, in values and gradients --------------------------------------------------------------------


@pytest.mark.parametrize("length", ODD_LENGTHS)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("masked", [False, True])
def test_parallel_chunked_quadratic_and_recurrent_agree(name, length, masked):
    mask = some_mask(length) if masked else None
    for causal in (False, True):
        options = {"mask": mask, "causal": causal}
        fast = with_gradients(lambda *a, o=options: linear_attention(*a, MAPS[name], **o), qkv(length))
        slow = with_gradients(lambda *a, o=options: linear_attention_quadratic(*a, MAPS[name], **o), qkv(length))
        agree(fast, slow)
    if length < 50:
        stream = with_gradients(lambda *a: linear_attention_recurrent(*a, MAPS[name], mask=mask)[0], qkv(length))
        agree(stream, slow)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("chunks", [1, 2])
def test_segments_hand_their_state_on(name, chunks, monkeypatch):
    """Long sequences are worked off in segments of whole chunks; here very short ones, with a leap in the middle."""
    monkeypatch.setattr(module_file, "BLOCK", chunks * 4 * CHUNK * CHUNK)
    length, mask = 5 * CHUNK + 3, some_mask(5 * CHUNK + 3)
    mask[0, :200] = False
    q, k, v = qkv(length)
    k[:, :, 300:] += 4
    for causal in (False, True):
        options = {"mask": mask, "causal": causal}
        fast = with_gradients(lambda *a, o=options: linear_attention(*a, MAPS[name], **o), (q, k, v))
        slow = with_gradients(lambda *a, o=options: linear_attention_quadratic(*a, MAPS[name], **o), (q, k, v))
        agree(fast, slow)
    if name in ("sikf", "favor"):
        k[:, :, 300:] += 2000
        fast = linear_attention(q, k, v, MAPS[name], mask=mask, causal=True)
        agree([fast], [linear_attention_recurrent(q, k, v, MAPS[name], mask=mask)[0]], rtol=1e-7, atol=1e-9)
        agree([fast[:, :, :300]], [slow[0][:, :, :300]])


@pytest.mark.parametrize("name", ["elu", "sikf", "favor"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(name, causal):
    inputs = [x.requires_grad_() for x in qkv(5, batch=1, heads=1)]
    assert torch.autograd.gradcheck(lambda *a: linear_attention(*a, MAPS[name], causal=causal, eps=0.1), inputs)
    assert torch.autograd.gradcheck(lambda *a: linear_attention_recurrent(*a, MAPS[name], eps=0.1)[0], inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_a_learned_map(causal):
    torch.manual_seed(0)
    learned = nn.Sequential(nn.Linear(3, 5), nn.Softplus()).double()
    results = []
    for form in (linear_attention, linear_attention_quadratic):
        learned.zero_grad()
        form(*qkv(150), learned, causal=causal).square().sum().backward()
        results.append([p.grad.clone() for p in learned.parameters()])
    agree(*results)
    assert all(g.abs().max() > 0 for g in results[0])
    inputs, mask = qkv(150), some_mask(150)
    for x in inputs[1:]:
        x.masked_fill_(~mask[:, None, :, None], torch.nan)
    learned.zero_grad()
    linear_attention(*inputs, learned, mask=mask, causal=causal).sum().backward()  # padding must not reach the map
    assert all(p.grad.isfinite().all() for p in learned.parameters())


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["elu", "sikf", "favor", "lambda"]),
    causal=st.booleans(),
    left=st.integers(0, 9),
    right=st.integers(0, 9),
)
def test_padding_never_touches_real_positions(length, seed, name, causal, left, right):
    inputs = qkv(length, seed, batch=1)
    real = slice(left, left + length)
    padded = [torch.full((1, 2, left + length + right, x.shape[-1]), torch.nan, dtype=x.dtype) for x in inputs]
    for whole, x in zip(padded, inputs, strict=True):
        whole[:, :, real] = x
    mask = torch.zeros(1, left + length + right, dtype=torch.bool)
    mask[:, real] = True
    y = linear_attention(*padded, MAPS[name], mask=mask, causal=causal)[:, :, real]
    torch.testing.assert_close(y, linear_attention(*inputs, MAPS[name], causal=causal), rtol=1e-9, atol=1e-11)


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(2, 300),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["elu", "sikf", "favor", "lambda"]),
    size=st.sampled_from([1.0, 30.0, 1000.0, 1e6]),
)
def test_the_future_never_moves_the_past(length, seed, name, size):
    """However large the future is: its features must not push those of the past out of the range of floats."""
    cut = 1 + seed % (length - 1)
    inputs = qkv(length, seed)
    shock = [x.clone() for x in inputs]
    for i, x in enumerate(shock):
        x[:, :, cut:] += size * draw(*x[:, :, cut:].shape, seed=seed + i)
    before = linear_attention(*inputs, MAPS[name], causal=True)
    after = linear_attention(*shock, MAPS[name], causal=True)
    torch.testing.assert_close(after[:, :, :cut], before[:, :, :cut], rtol=1e-9, atol=1e-12)
    assert after.isfinite().all()
    torch.testing.assert_close(after, linear_attention_recurrent(*shock, MAPS[name])[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["elu", "sikf", "favor"])
def test_sequences_and_heads_do_not_meet(name, causal):
    q, k, v = qkv(140)
    k[1] += 500.0 if name == "sikf" else 3.0  # a maximum over the whole batch would drown the other sequence
    whole = linear_attention(q, k, v, MAPS[name], causal=causal)
    for b in range(2):
        for h in range(2):
            alone = linear_attention(q[b, h], k[b, h], v[b, h], MAPS[name], causal=causal)
            torch.testing.assert_close(whole[b, h], alone, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    first=st.integers(1, 20),
    second=st.integers(1, 20),
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["elu", "sikf", "favor"]),
)
def test_the_state_carries_over_any_cut(first, second, seed, name):
    inputs = qkv(first + second, seed)
    whole, last = linear_attention_recurrent(*inputs, MAPS[name])
    y, state = linear_attention_recurrent(*(x[:, :, :first] for x in inputs), MAPS[name])
    z, state = linear_attention_recurrent(*(x[:, :, first:] for x in inputs), MAPS[name], state=state)
    torch.testing.assert_close(torch.cat([y, z], dim=2), whole)
    agree(state, last)


def test_order_of_keys_does_not_matter_without_causal():
    q, k, v = qkv(77)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(0))
    for feature_map in MAPS.values():
        y = linear_attention(q, k[:, :, order], v[:, :, order], feature_map)
        torch.testing.assert_close(y, linear_attention(q, k, v, feature_map))


def test_queries_of_another_sequence():
    q, _, _ = qkv(7, seed=1)
    _, k, v = qkv(150)
    mask = some_mask(150)
    for feature_map in MAPS.values():
        y = linear_attention(q, k, v, feature_map, mask=mask)
        assert y.shape == (2, 2, 7, 4)
        torch.testing.assert_close(y, linear_attention_quadratic(q, k, v, feature_map, mask=mask))


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_query_that_sees_nothing_reads_zero(name, eps):
    mask = torch.ones(2, 140, dtype=torch.bool)
    mask[0, :133] = False  # padding on the left, over more than a chunk
    mask[1] = False
    inputs = [x.requires_grad_() for x in qkv(140)]
    for causal in (False, True):
        fast = linear_attention(*inputs, MAPS[name], mask=mask, causal=causal, eps=eps)
        slow = linear_attention_quadratic(*inputs, MAPS[name], mask=mask, causal=causal, eps=eps)
        torch.testing.assert_close(fast, slow)
        assert not fast[1].any()
        assert not fast[0, :, :133].any() or not causal
        assert all(g.isfinite().all() for g in torch.autograd.grad(fast.sum(), inputs))
    stream, _ = linear_attention_recurrent(*inputs, MAPS[name], mask=mask, eps=eps)
    torch.testing.assert_close(stream, slow)


# ---- what is taken out cancels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_sikf_ignores_a_constant_added_to_a_query_or_to_all_keys(causal):
    q, k, v = qkv(150)
    base = linear_attention(q, k, v, sikf_features, causal=causal, eps=0)
    moved = linear_attention(q + 1000 * draw(2, 2, 150, 1), k - 5000, v, sikf_features, causal=causal, eps=0)
    torch.testing.assert_close(moved, base, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
def test_eps_is_scaled_with_the_features(shift):
    """An eps that counts, treated as if nothing had been taken out."""
    q, k, v = qkv(140)
    k = k + shift
    for causal in (False, True):
        want = linear_attention_quadratic(q, k, v, torch.exp, causal=causal, eps=10.0)
        torch.testing.assert_close(linear_attention(q, k, v, sikf_features, causal=causal, eps=10.0), want)
    torch.testing.assert_close(linear_attention_recurrent(q, k, v, sikf_features, eps=10.0)[0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_single_precision_far_outside_its_range(causal):
    """exp(300) is no float32; the result is one, and it is right."""
    q, k, v = qkv(300)
    q, k = 10 * q + 200, 10 * k + 300
    want = linear_attention_quadratic(q - 200, k - 300, v, torch.exp, causal=causal, eps=0)
    inputs = [x.float().requires_grad_() for x in (q, k, v)]
    got = linear_attention(*inputs, sikf_features, causal=causal)
    assert (got - want).abs().max() < 1e-3  # 500 in float32 is known to 3e-5
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), inputs))
    assert not linear_attention(*inputs, torch.exp, causal=causal).isfinite().all()  # so there was something to mend


def test_a_steep_rise_within_a_chunk_is_exact_with_its_gradients():
    """Keys that rise by 2000 within one chunk: no common factor fits them all, smaller chunks do."""
    q, k, v = qkv(100, batch=1)
    k = k + torch.linspace(-1000, 1000, 100)[:, None]
    k[..., 1] = k[..., 1].flip(-1)
    fast = with_gradients(lambda *a: linear_attention(*a, sikf_features, causal=True), (q, k, v))
    slow = with_gradients(lambda *a: linear_attention_recurrent(*a, sikf_features)[0], (q, k, v))
    agree(fast, slow, rtol=1e-9, atol=1e-9)
    assert all(x.isfinite().all() for x in fast)


@pytest.mark.parametrize("name", ["sikf", "favor"])
def test_small_chunks_are_taken_only_where_needed(name, monkeypatch):
    """Neither padding nor keys that are small throughout look like a steep rise."""
    taken = []
    causal = module_file._causal

    def recorded(*args):
        taken.append(args[-1])
        return causal(*args)

    monkeypatch.setattr(module_file, "_causal", recorded)
    q, k, v = qkv(2 * CHUNK + 30)
    for left, right in ((0, 0), (5, 40), (200, 0), (2 * CHUNK + 30, 0)):
        mask = torch.ones(2, 2 * CHUNK + 30, dtype=torch.bool)
        mask[:, :left] = False
        mask[:, mask.shape[1] - right :] = False
        linear_attention(q, k, v, MAPS[name], mask=mask, causal=True)
    if name == "sikf":
        linear_attention(q, k - 5000, v, MAPS[name], causal=True)
    assert set(taken) == {CHUNK}
    k[:, :, :14] *= 3000  # after which the features of FAVOR+ rise, and some of SIKF as well
    linear_attention(q, k, v, MAPS[name], causal=True)
    assert min(taken) < CHUNK


# ---- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elu", "sikf", "favor"])
@pytest.mark.parametrize("causal", [False, True])
def test_float32_sums_under_autocast_and_in_half_precision(name, causal):
    q, k, v = (x.bfloat16() for x in qkv(3000, batch=1, heads=1, dtype=torch.float32))
    want = linear_attention(q.double(), k.double(), v.double(), MAPS[name], causal=causal)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_attention(q, k, v, MAPS[name], causal=causal)
        slow = linear_attention_quadratic(q, k, v, MAPS[name], causal=causal)
        step, state = linear_attention_step(q[..., 0, :], k[..., 0, :], v[..., 0, :], MAPS[name])
    assert got.dtype == slow.dtype == step.dtype == torch.bfloat16 and state.S.dtype == torch.float32
    assert (got - want).abs().max() < 0.01 * want.abs().max()  # bfloat16 sums would stop growing after 256 ones
    assert (slow - want).abs().max() < 0.01 * want.abs().max()
    torch.testing.assert_close(linear_attention(q, k, v, MAPS[name], causal=causal), got)


def test_dtypes_stay():
    for dtype in (torch.float32, torch.float64):
        for form in (linear_attention, linear_attention_quadratic):
            assert form(*qkv(9, dtype=dtype), elu_features).dtype == dtype
    assert elu_features(torch.tensor(-5.0).bfloat16()).dtype == torch.float32
    assert linear_attention_weights(*qkv(4)[:2], elu_features).dtype == torch.float64


# ---- the cost --------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns, views of one element's storage apart."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, min(x.numel(), x.untyped_storage().nbytes() // x.element_size()))
        return out


@pytest.mark.parametrize("name", ["elu", "sikf", "favor"])
@pytest.mark.parametrize("causal", [False, True])
def test_no_tensor_of_length_squared_nor_of_a_state_per_position(name, causal):
    largest = []
    for length in (1024, 2048):
        q, k, v = (draw(1, 1, length, 16, dtype=torch.float32).requires_grad_() for _ in range(3))
        feature_map = favor(16, 16) if name == "favor" else MAPS[name]
        with Largest() as seen:
            linear_attention(q, k, v, feature_map, causal=causal).sum().backward()
        assert seen.numel <= length * CHUNK < length * 16 * 16
        largest.append(seen.numel)
    assert largest[1] == 2 * largest[0]


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["elu", "sikf", "favor"])
@pytest.mark.parametrize("length", [1, 2, 131])
def test_module_step_equals_parallel_in_constant_memory(name, length):
    module = LinearAttention(2, 3, 4, MAPS[name], causal=True).double()
    q, k, v = qkv(length)
    state, y = module.initial_state(2), []
    sizes = {tuple(part.shape) for part in state}
    for t in range(length):
        y_t, state = module.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
        y.append(y_t)
        assert {tuple(part.shape) for part in state} == sizes
    torch.testing.assert_close(torch.stack(y, dim=2), module(q, k, v), rtol=1e-10, atol=1e-12)


def test_module_holds_its_map():
    module = LinearAttention(2, 3, 4, FavorFeatures(3, 5))
    assert module.state_dict().keys() == {"feature_map.projection"}
    q, k, v = qkv(9, dtype=torch.float32)
    mask = some_mask(9)
    seen = []
    module.keys.register_forward_hook(lambda *a: seen.append(a[-1]))
    torch.testing.assert_close(
        module(q, k, v, mask), linear_attention(q, k, v, module.feature_map, mask=mask), rtol=0, atol=0
    )
    assert torch.equal(seen[0], k)
    with pytest.raises(ValueError, match="causal=True"):
        module.initial_state(1)
    with pytest.raises(ValueError, match="causal=True"):
        module.step(q[:, :, 0], k[:, :, 0], v[:, :, 0], None)


# ---- FAVOR+ ----------------------------------------------------------------------------------------------------------


def test_favor_is_the_exponential_of_its_logarithm_and_positive():
    x = draw(2, 5, 3)
    features = MAPS["favor"](x)
    assert features.shape == (2, 5, 7) and (features > 0).all()
    torch.testing.assert_close(features.log(), MAPS["favor"].log_features(x))


@pytest.mark.parametrize("options", [{}, {"orthogonal": False}])
def test_favor_estimates_softmax_without_bias(options):
    """The mean over many draws, within five standard errors, which are small: a thousandth."""
    for dim in (2, 4):
        q = torch.ones(dim, dtype=torch.float64) / 2 / dim**0.25  # |q' + k'| = 1 below
        many = favor(dim, 400_000 // dim * dim, **options)
        products = many(q).square() * many.features
        blocks = products.view(-1, dim).mean(-1) if options == {} else products
        error = blocks.std() / math.sqrt(len(blocks))
        want = math.exp(q @ q / math.sqrt(dim))
        assert error < 0.005 * want
        assert abs(blocks.mean() - want) < 5 * error


def test_raw_qr_is_biased_and_row_signs_cure_it():
    q = torch.ones(4, dtype=torch.float64) / 2 / 4**0.25
    want = math.exp(q @ q / 2)
    raw, signed = (favor(4, 400_000, row_signs=signs)(q).square().sum() for signs in (False, True))
    assert raw < 0.85 * want  # 18.5 % too small
    assert abs(signed / want - 1) < 0.02


def test_orthogonal_rows_lengths_and_draws():
    module = favor(4, 10)
    for block in (module.projection[:4], module.projection[4:8], module.projection[8:]):
        directions = block / block.norm(dim=1, keepdim=True)
        torch.testing.assert_close(directions @ directions.T, torch.eye(len(block)).double(), atol=1e-6, rtol=0)
    assert module.projection.norm(dim=1).std() > 0.1  # the lengths of Gaussian rows, not all alike
    before = module.projection.clone()
    module.redraw(torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.projection, before, rtol=1e-6, atol=1e-6)  # drawn as float32 before
    module.redraw(torch.Generator().manual_seed(1))
    assert (module.projection - before).abs().max() > 0.1
    assert FavorFeatures(64).features == round(64 * math.log(64))
    assert FavorFeatures(1).features == 1


def test_favor_error_falls_with_features_and_rises_with_length_of_vectors():
    q, k = draw(60, 8), draw(60, 8, seed=1)

    def error(scale, features):
        wanted = torch.softmax(scale**2 * q @ k.T / math.sqrt(8), dim=-1)
        got = [
            linear_attention_weights(scale * q, scale * k, favor(8, features, seed=s), eps=0) - wanted for s in range(5)
        ]
        return sum(g.norm() / wanted.norm() for g in got).item() / 5

    assert error(0.5, 16) > 2 * error(0.5, 512)
    assert error(0.5, 512) < 0.1 < 0.2 < error(1.5, 512)


# ---- wrong inputs ----------------------------------------------------------------------------------------------------

one = torch.ones(2, 2, 5, 3)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda f: f(one, one[..., :2], one, elu_features), ValueError, "q and k must be"),
        (lambda f: f(one, one[:1], one, elu_features), ValueError, "q and k must be"),
        (lambda f: f(one, one, one[..., :4, :], elu_features), ValueError, "v must be"),
        (lambda f: f(one[..., :0, :], one, one, elu_features), ValueError, "length >= 1"),
        (lambda f: f(one, one, one, elu_features, eps=-1.0), ValueError, "eps must be"),
        (
            lambda f: f(one, one, one, elu_features, mask=torch.ones(2, 5)),
            ValueError,
            r"bool \(batch, length\) = \(2, 5\)",
        ),
        (
            lambda f: f(one, one, one, elu_features, mask=torch.ones(2, 2, 5).bool()),
            ValueError,
            r"got torch.bool \(2, 2, 5\)",
        ),
        (lambda f: f(one, one, one, lambda x: x.sum(-2)), ValueError, "keep every axis but the last"),
        (lambda f: f(one, one, one, "elu"), TypeError, "feature_map must be callable"),
    ],
)
@pytest.mark.parametrize("form", [linear_attention, linear_attention_quadratic, linear_attention_recurrent])
def test_wrong_input_is_refused_in_words(form, call, kind, words):
    with pytest.raises(kind, match=words):
        call(form)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear_attention(one[..., :3, :], one, one, elu_features, causal=True), "one length"),
        (lambda: FavorFeatures(0), "dim >= 1"),
        (lambda: FavorFeatures(3, 0), "features >= 1"),
        (lambda: FavorFeatures(4)(one), r"\(\.\.\., 4\)"),
        (lambda: LinearAttention(2, 0, 3), "positive sizes"),
    ],
)
def test_other_wrong_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- the authors' numbers --------------------------------------------------------------------------------------------


def heads_first(array):
    return torch.from_numpy(array).transpose(1, 2)


def near(got, want):
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=1e-9)


def test_published_elu():
    numbers = golden.load("linattn_elu_sikf_dpfp")
    q, k, v = (heads_first(numbers[name]) for name in "qkv")
    mask = torch.from_numpy(numbers["keep"]).bool()
    near(linear_attention(q, k, v, elu_features, mask=mask).transpose(1, 2), numbers["elu_noncausal_masked"])
    near(linear_attention(q, k, v, elu_features, causal=True).transpose(1, 2), numbers["elu_causal"])
    _, state = linear_attention_recurrent(q[:, :, :5], k[:, :, :5], v[:, :, :5], elu_features)
    near(state.S, numbers["elu_S_after_5"])
    near(state.z, numbers["elu_z_after_5"])
    y, state = linear_attention_recurrent(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], elu_features, state=state)
    near(state.S, numbers["elu_final_S"])
    near(state.z, numbers["elu_final_z"])
    near(y.transpose(1, 2), numbers["elu_causal"][:, 5:])


def test_published_sikf():
    numbers = golden.load("linattn_elu_sikf_dpfp")
    q, k, v = (heads_first(numbers[name]) for name in "qkv")
    mask = torch.from_numpy(numbers["keep"]).bool()
    near(linear_attention(q, k, v, sikf_features, eps=0).transpose(1, 2), numbers["sikf_full_noeps"])
    near(linear_attention(q, k, v, sikf_features, causal=True, eps=0).transpose(1, 2), numbers["sikf_causal_noeps"])
    # The authors take this offset out of both and leave eps as it is: their numbers are those of the moved q and k.
    offset = q.mean((-2, -1), keepdim=True) + k.mean((-2, -1), keepdim=True)
    near(offset.transpose(1, 2), numbers["sikf_offset"])
    moved = linear_attention(q - offset, k - offset, v, sikf_features, mask=mask)
    near(moved.transpose(1, 2), numbers["sikf_full_offset_eps1e-6"])
    near(sikf_features(torch.from_numpy(numbers["q"])) + 1e-3, numbers["sikf_lra_jax_phi_q"])


def dpfp(x, nu=1):
    """Deterministic parameter-free projection: products of neighbouring rectified entries."""
    both = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([both * both.roll(r, -1) for r in range(1, nu + 1)], dim=-1)


def test_published_maps_that_any_callable_can_be():
    numbers = golden.load("linattn_elu_sikf_dpfp")
    q = torch.from_numpy(numbers["q"])
    near(dpfp(q), numbers["dpfp1_q"])
    near(dpfp(q, 2), numbers["dpfp2_q"])
    near((q * 4**-0.25).relu() + 1e-3, numbers["relu_generalised_phi_q"])
    heads = [heads_first(numbers[name]) for name in "qkv"]
    for causal in (False, True):
        near(linear_attention(*heads, dpfp, causal=causal), linear_attention_quadratic(*heads, dpfp, causal=causal))


def test_published_favor():
    numbers = golden.load("linattn_favor_rff")
    q, k, v = (torch.from_numpy(numbers[name]) for name in "qkv")
    module = FavorFeatures(4, 9).double()
    module.projection.copy_(torch.from_numpy(numbers["projection"]))
    phi_q, phi_k = module.published_features(q, query=True), module.published_features(k, query=False)
    near(phi_q, numbers["phi_q"])
    near(phi_k, numbers["phi_k"])
    near((q * 4**-0.25 @ module.projection.T).relu() + 1e-3, numbers["phi_relu_q"])
    near(linear_attention(phi_q, phi_k, v, identity, eps=0), numbers["y_noncausal"])
    # Their causal denominator adds 1e-6 to every entry of z: that is our eps, for queries whose features add up to 1.
    shares = phi_q / phi_q.sum(-1, keepdim=True)
    near(linear_attention(shares, phi_k, v, identity, causal=True), numbers["y_causal"])
    # Without the small constant their features, normalised, are ours.
    bare = [module.published_features(x, query=x is q, small=0.0) for x in (q, k)]
    near(linear_attention(*bare, v, identity, eps=0), linear_attention(q, k, v, module, eps=0))


def cosformer(x, most):
    """Rectified entries times the cosine and the sine of the position, so that weights fall off with distance."""
    angle = math.pi / 2 * torch.arange(1, x.shape[-2] + 1, dtype=x.dtype)[:, None] / most
    return torch.cat([x.relu() * angle.sin(), x.relu() * angle.cos()], dim=-1)


@pytest.mark.parametrize("case", ["full_equal", "full_cross", "causal"])
def test_published_cosformer(case):
    """A map that knows positions goes in as features that are there already."""
    numbers = golden.load("linattn_cosformer")

    def heads(array):  # (L, B, 2 * 3) -> (B, 2, L, 3)
        return torch.from_numpy(array).unflatten(-1, (2, 3)).permute(1, 2, 0, 3)

    q, k, v = (heads(numbers[f"{case}_{name}"]) for name in "qkv")
    most = max(q.shape[-2], k.shape[-2])
    phi_q, phi_k = cosformer(q, most), cosformer(k, most)
    y = linear_attention(phi_q, phi_k, v, identity, causal=case == "causal", eps=0)  # they clamp, at 1e-6
    near(y.permute(2, 0, 1, 3).flatten(-2), numbers[f"{case}_y_ref"])
