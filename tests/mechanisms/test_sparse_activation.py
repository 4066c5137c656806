import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms import sparse_activation
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.gated_attention import laplace, relu2
from longseq_tutorial.mechanisms.sparse_activation import (
    LatentConfigurator,
    SparseActivation,
    compress,
    compress_slow,
    dense_weights,
    extract,
    extract_slow,
    memory_attention,
    memory_attention_slow,
    rope,
)
from longseq_tutorial.models.recorder import record
from tests import golden_numbers as golden

FUNCTIONS = {"softmax": None, "laplace": laplace, "relu2": relu2}


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def array(arrays, key):
    return torch.from_numpy(arrays[key])


def unit(dim=5, z_dim=4, v_dim=6, *, seed=0, **options):
    """A unit with large random parameters, so that every term matters."""
    torch.manual_seed(seed)
    made = SparseActivation(dim, z_dim, v_dim, **{"window": 3, "max_positions": 9, **options}).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_()
    return made


# ---- the configurator --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.names("seqboat_latent_configurator"))
@pytest.mark.parametrize("act_bias", [0.0, 0.7])
def test_authors_configurator(name, act_bias):
    arrays = golden.load(name)
    end = "_actbias0.7" if act_bias else ""
    router = LatentConfigurator(int(arrays["d_model"]), float(arrays["init_temp_scale"]), act_bias).double()
    np.testing.assert_allclose(router.log_temperature.detach(), arrays["temp_param"], rtol=1e-6)
    with torch.no_grad():
        router.log_temperature.copy_(array(arrays, "temp_param"))
    logits = array(arrays, "u")[:, 0].clone().requires_grad_()
    active, confidence = router(logits)
    (confidence * active * array(arrays, "cotangent")[:, 0, :, 0]).sum().backward()
    assert torch.equal(active, array(arrays, f"mask{end}")[:, 0, :, 0])
    for got, want in (
        (confidence, arrays[f"confidence{end}"][:, 0, :, 0]),
        (confidence * active, arrays[f"gated_confidence{end}"][:, 0, :, 0]),
        (logits.grad, arrays[f"grad_u{end}"][:, 0]),
        (router.log_temperature.grad, arrays[f"grad_temp{end}"]),
    ):
        np.testing.assert_allclose(got.detach(), want, rtol=1e-9, atol=1e-10)


def test_ties_and_padding_are_inactive():
    router = LatentConfigurator(4)
    logits = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [0.0, 5.0], [2.0, 1.0]]])
    active, confidence = router(logits, torch.tensor([[True, True, False, True]]))
    assert active.tolist() == [[False, True, False, False]]
    assert confidence[0, 0] == 0.5 and (confidence >= 0.5).all()


def test_the_temperature_softens_but_never_decides():
    logits = draw(2, 50, 2)
    cold, warm = LatentConfigurator(16, scale=0.1), LatentConfigurator(16, scale=3.0)
    assert torch.equal(cold(logits)[0], warm(logits)[0])
    assert (cold(logits)[1] > warm(logits)[1]).all()
    assert warm.log_temperature.item() == pytest.approx(math.log(3.0 * 4))


# ---- compress and extract ----------------------------------------------------------------------------------------


def test_authors_compress_and_extract():
    arrays = golden.load("seqboat_compress_extract")
    x = array(arrays, "x")[:, 0].clone().requires_grad_()
    active = array(arrays, "mask")[:, 0, :, 0]
    packed, index = compress(x, active)
    back = extract(packed, index)
    (back * active.unsqueeze(-1) * array(arrays, "cotangent")[:, 0]).sum().backward()
    assert torch.equal(packed, array(arrays, "compressed")[:, 0])
    assert torch.equal(index, array(arrays, "index")[:, 0, :, 0])
    assert torch.equal(back, array(arrays, "extracted")[:, 0])
    assert torch.equal(x.grad, array(arrays, "grad_x")[:, 0])
    places = compress(torch.arange(1, 11).expand(3, -1).unsqueeze(-1), active)[0]
    assert torch.equal(places, array(arrays, "compressed_positions_1based")[:, 0])
    nobody, _ = compress(x, torch.zeros_like(active))
    assert torch.equal(nobody, array(arrays, "none_compressed")[:, 0])


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, 12), rate=st.floats(0, 1), seed=st.integers(0, 999))
def test_compress_and_extract_equal_their_definitions_and_undo_each_other(length, rate, seed):
    x = draw(3, length, 2, seed=seed)
    active = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)) < rate
    packed, index = compress(x, active)
    for fast, slow in zip((packed, index), compress_slow(x, active), strict=True):
        assert torch.equal(fast, slow)
    assert packed.shape[1] == max(1, int(active.sum(1).max()))
    assert torch.equal(extract(packed, index), x * active.unsqueeze(-1))
    y = draw(*packed.shape[:2], 4, seed=seed + 1)
    assert torch.equal(extract(y, index), extract_slow(y, index))


def test_compress_and_extract_have_exact_gradients():
    x, active = draw(2, 5, 2).requires_grad_(), torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0]]).bool()
    index = compress(x, active)[1]
    assert torch.autograd.gradcheck(lambda x: compress(x, active)[0], x)
    assert torch.autograd.gradcheck(lambda y: extract(y, index), draw(2, 3, 2).requires_grad_())


# ---- working memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "window"), [(1, 1), (1, 5), (2, 1), (7, 2), (13, 3), (12, 4), (5, 9), (11, None)])
@pytest.mark.parametrize("kind", ["plain", "ranks", "positions"])
def test_blocks_equal_the_loop_with_gradients(function, causal, length, window, kind):
    tensors = [draw(2, length, w, seed=w) for w in (4, 5, 3)]
    tensors[1] = draw(2, length, 4, seed=9)
    table = None if kind == "plain" else draw(9, seed=4)
    options = {"function": FUNCTIONS[function], "causal": causal}
    if kind == "positions":
        options["positions"] = torch.cumsum(1 + torch.arange(2 * length).view(2, length) % 3, 1)
        options["valid"] = torch.arange(length) < torch.tensor([[length], [length // 2]])
    weight = draw(2, length, 3, seed=5)
    results = []
    for form in (memory_attention, memory_attention_slow):
        inputs = [t.clone().requires_grad_() for t in (*tensors, *([] if table is None else [table]))]
        q, k, v, *bias = inputs
        y = form(q, k, v, window, bias=bias[0] if bias else None, **options)
        grads = torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        results.append([y, *grads])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", ["softmax", "relu2", "laplace"])
@pytest.mark.parametrize("direction", ["bi", "causal"])
@pytest.mark.parametrize("biased", ["bias", "nobias"])
def test_authors_local_attention(function, direction, biased):
    """Their laplace gives every hidden key in view the weight laplace(0): ours plus that leak is theirs."""
    arrays = golden.load("seqboat_local_attention")
    q, k, v = (array(arrays, name)[:, 0] for name in "qkv")
    keep, window, length = array(arrays, "keep_mask")[:, 0], int(arrays["window"]), q.shape[1]
    causal = direction == "causal"
    # Their function takes queries that are scaled already; ours scales.
    q = q * (math.sqrt(q.shape[-1]) if function == "softmax" else window if causal else 2 * window)
    rows = []
    for i in range(length):  # their bias is any matrix: its row i is our table, centred on i
        table = None
        options = {"function": FUNCTIONS[function], "valid": keep, "causal": causal}
        each = []
        for b in range(2):
            if biased == "bias":
                table = torch.zeros(2 * length - 1, dtype=torch.float64)
                table[length - 1 - i : 2 * length - 1 - i] = array(arrays, "bias")[b, 0, i]
            one = slice(b, b + 1)
            options["valid"] = keep[one]
            each.append(memory_attention(q[one], k[one], v[one], window, bias=table, **options)[0, i])
        rows.append(torch.stack(each))
    ours = torch.stack(rows, 1)
    theirs = array(arrays, f"out_{function}_{direction}_{biased}")[:, 0]
    if function == "laplace":
        leak = laplace(torch.zeros((), dtype=torch.float64))
        last = -(-length // window) * window  # they fill up with zeros to whole blocks, and with -1 beyond these
        for b in range(2):
            for i in range(length):
                first = (i // window - 1) * window
                for j in range(first, first + (2 if causal else 3) * window):
                    apart = j - i
                    near = -window <= apart <= (0 if causal else window)
                    if not (near and 0 <= j < length and keep[b, j]):
                        inside = 0 <= j < last
                        value = v[b, j] if 0 <= j < length else torch.full_like(v[b, 0], 0.0 if inside else -1.0)
                        ours[b, i] += leak * value
    torch.testing.assert_close(ours[keep], theirs[keep], rtol=1e-9, atol=1e-10)


def weights_of(q, k, window, **options):
    """The whole matrix (B, M, M)."""
    seen = []
    memory_attention(q, k, q, window, on_weights=lambda w: seen.append(w) or w, **options)
    return dense_weights(seen, q.shape[1])


def test_authors_relative_bias_with_clamped_ends():
    arrays = golden.load("seqboat_positions")
    for length in (4, 6, 9):
        q = torch.zeros(1, length, 2, dtype=torch.float64)  # no score: the identity as function leaves the bias
        want = array(arrays, f"fast_bias_len{length}")
        for window in (length, None):
            for positions in (None, torch.arange(length).unsqueeze(0) + 5):
                got = weights_of(
                    q, q, window, function=lambda s: s, bias=array(arrays, "fast_param"), positions=positions
                )
                torch.testing.assert_close(got[0], want, rtol=0, atol=1e-12)


def test_authors_rotary_positions():
    arrays = golden.load("seqboat_positions")
    x = array(arrays, "rotary_x")[0]
    torch.testing.assert_close(
        rope(x, torch.arange(12).unsqueeze(0)), array(arrays, "rotary_y")[0], rtol=0, atol=1e-6
    )  # their table is single precision
    q, k = rope(draw(1, 1, 6).expand(1, 30, 6), torch.arange(30).unsqueeze(0)), x[:, :1]
    k = rope(k.expand(1, 30, 6), torch.arange(30).unsqueeze(0) + 4)
    torch.testing.assert_close((q * k).sum(-1), (q * k).sum(-1)[:, :1].expand(1, 30))  # the distance alone


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("window", [1, 3, 4, 20, None])
@pytest.mark.parametrize("tile", [1, 2**20])
def test_dense_weights_are_the_loops_matrix_and_hidden_keys_weigh_exactly_nothing(
    causal, function, window, tile, monkeypatch
):
    monkeypatch.setattr(sparse_activation, "TILE", tile)
    q, k = draw(2, 11, 4), draw(2, 11, 4, seed=1)
    valid = torch.arange(11) < torch.tensor([[11], [6]])
    options = {"function": FUNCTIONS[function], "valid": valid, "causal": causal}
    fast, slow = [], []
    memory_attention(q, k, q, window, on_weights=lambda w: fast.append(w) or w, **options)
    memory_attention_slow(q, k, q, window, on_weights=lambda w: slow.append(w) or w, **options)
    matrix = dense_weights(fast, 11)
    torch.testing.assert_close(matrix, slow[0])
    apart = torch.arange(11) - torch.arange(11)[:, None]
    near = (apart.abs() <= (window or 11)) & ((apart <= 0) if causal else torch.tensor(True))
    assert (matrix[~(near & valid.unsqueeze(1))] == 0).all()
    assert (matrix[(near & valid.unsqueeze(1))] > 0).any()


def test_a_query_that_sees_nothing_reads_zero():
    q = draw(1, 9, 4).requires_grad_()
    valid = torch.tensor([[True] * 2 + [False] * 7])
    for form in (memory_attention, memory_attention_slow):
        y = form(q, q, q, 2, valid=valid)
        assert (y[:, 4:] == 0).all() and (y[:, :4] != 0).all()
        (grad,) = torch.autograd.grad(y.sum(), q)
        assert grad.isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 2])
def test_tiles_of_any_size_give_the_same_values_and_gradients(window, causal, monkeypatch):
    results = []
    for tile in (2**20, 50, 1):
        monkeypatch.setattr(sparse_activation, "TILE", tile)
        q, k, v, bias = inputs = [draw(2, 11, 4, seed=i).requires_grad_() for i in range(3)] + [
            draw(9, seed=8).requires_grad_()
        ]
        places = torch.arange(11).expand(2, -1) * 2
        options = {"function": laplace, "bias": bias, "positions": places, "causal": causal}
        y = memory_attention(q, k, v, window, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize(
    ("bias", "window"), [("global", 16), ("local", 16), ("rotary", 16), ("global", None), ("rotary", None)]
)
def test_no_tensor_grows_with_the_square_of_the_length(bias, window, monkeypatch):
    monkeypatch.setattr(sparse_activation, "TILE", 2**14)
    sizes = []
    for length in (1024, 2048):
        made = SparseActivation(8, 8, 16, window=window, bias=bias, max_positions=length)
        h, logits = torch.randn(1, length, 8), torch.zeros(1, length, 2)
        logits[:, ::2, 1] = 1.0
        with LargestTensor() as largest:
            made(h.requires_grad_(), logits).sum().backward()
        sizes.append(largest.numel)
        per_token = 3 * 16 if window else 32
        assert largest.numel <= max(per_token * length, 2**14)
    assert sizes[1] <= 2 * sizes[0]


# ---- the unit: gradients, masks, batches --------------------------------------------------------------------------


def test_the_gradient_of_the_choice_is_the_one_derived_by_hand():
    """dLoss/du = c (1 - c) / tau * <dLoss/dG, GAU> * (-1, +1) for active tokens, and exactly nothing for the others."""
    made = unit()
    h, logits, cotangent = draw(2, 7, 5), draw(2, 7, 2, seed=1).requires_grad_(), draw(2, 7, 5, seed=2)
    y = made(h, logits)
    (y * cotangent).sum().backward()
    active, c = made.router(logits.detach())
    unscaled = (y / c.unsqueeze(-1)).detach()
    pull = c * (1 - c) / made.router.log_temperature.exp() * (cotangent * unscaled).sum(-1)
    torch.testing.assert_close(logits.grad, pull.unsqueeze(-1) * torch.tensor([-1.0, 1.0], dtype=torch.float64))
    assert active.any() and (~active).any()
    assert (logits.grad[~active] == 0).all() and (logits.grad[active] != 0).all()


def test_a_layer_that_never_wakes_is_silent_and_learns_nothing():
    made = unit()
    h, logits = draw(2, 7, 5).requires_grad_(), torch.tensor([1.0, 0.0], dtype=torch.float64).expand(2, 7, 2)
    logits = logits.clone().requires_grad_()
    y = made(h, logits)
    assert (y == 0).all()
    inputs = [h, logits, *made.parameters()]
    for grad in torch.autograd.grad(y.sum(), inputs, allow_unused=True, materialize_grads=True):
        assert (grad == 0).all()


@pytest.mark.parametrize("window", [2, None])
def test_gradcheck(window):
    made = unit(3, 2, 2, window=window, function=laplace)
    logits = draw(1, 5, 2, seed=3)
    assert torch.autograd.gradcheck(lambda h, u: made(h, u), (draw(1, 5, 3).requires_grad_(), logits.requires_grad_()))


CASES = st.fixed_dictionaries(
    {
        "function": st.sampled_from(list(FUNCTIONS.values())),
        "bias": st.sampled_from(["global", "local", "rotary"]),
        "window": st.sampled_from([1, 2, 5]),
        "causal": st.booleans(),
    }
)


@settings(deadline=None, max_examples=40)
@given(
    options=CASES, length=st.integers(1, 14), before=st.integers(0, 5), after=st.integers(0, 5), seed=st.integers(0, 99)
)
def test_padding_on_either_side_never_changes_real_outputs(options, length, before, after, seed):
    made = unit(**options)
    h, logits = draw(2, length, 5, seed=seed), draw(2, length, 2, seed=seed + 1)
    total = before + length + after
    real = slice(before, before + length)
    wide, wide_logits = torch.full((2, total, 5), 1e3).double(), draw(2, total, 2, seed=7)
    wide[:, real], wide_logits[:, real] = h, logits
    mask = torch.zeros(2, total, dtype=torch.bool)
    mask[:, real] = True
    got = made(wide, wide_logits, mask)
    torch.testing.assert_close(got[:, real], made(h, logits))
    assert (got[~mask] == 0).all()


@settings(deadline=None, max_examples=30)
@given(options=CASES, length=st.integers(2, 14), seed=st.integers(0, 99))
def test_other_samples_in_the_batch_never_matter(options, length, seed):
    """Not so in the authors' code: see the two tests below."""
    made = unit(**options)
    h, logits = draw(3, length, 5, seed=seed), draw(3, length, 2, seed=seed + 1)
    logits[0] = torch.tensor([0.0, 1.0])  # one sample fully active, one fully asleep
    logits[2] = torch.tensor([1.0, 0.0])
    together = made(h, logits)
    for b in range(3):
        torch.testing.assert_close(together[b : b + 1], made(h[b : b + 1], logits[b : b + 1]))


@settings(deadline=None, max_examples=30)
@given(options=CASES, length=st.integers(2, 14), cut=st.integers(1, 13), seed=st.integers(0, 99))
def test_causal_means_the_future_does_not_matter(options, length, cut, seed):
    cut = min(cut, length - 1)
    made = unit(**{**options, "causal": True})
    h, logits = draw(1, length, 5, seed=seed), draw(1, length, 2, seed=seed + 1)
    want = made(h, logits)
    h, logits = h.clone(), logits.clone()
    h[:, cut:], logits[:, cut:] = 30.0, logits[:, cut:].flip(-1)
    torch.testing.assert_close(made(h, logits)[:, :cut], want[:, :cut])


def test_the_window_counts_active_tokens_however_far_apart():
    """Two active tokens a thousand steps apart are neighbours: the gradient of one reaches the other's input."""
    made = unit(window=1)
    h, logits = draw(1, 1000, 5).requires_grad_(), torch.zeros(1, 1000, 2, dtype=torch.float64)
    logits[0, [0, 999], 1] = 1.0
    (grad,) = torch.autograd.grad(made(h, logits)[0, 999].sum(), h)
    assert (grad[0, [0, 999]] != 0).any(-1).all() and (grad[0, 1:999] == 0).all()


def quirky_layer(arrays):
    """The authors' layer of seqboat_quirk_batch_dependence, around our unit: x (B, L, 8) -> (B, L, 8)."""
    ema = DampedEMA(8, 4, bidirectional=True).double()
    made = SparseActivation(8, 6, 12, window=int(arrays["window"]), max_positions=24).double()
    names = {"alpha_logit": "delta", "delta_logit": "alpha", "beta": "beta", "eta": "gamma", "omega": "omega"}
    with torch.no_grad():
        for ours, theirs in names.items():
            parameter = getattr(ema, ours)
            parameter.copy_(array(arrays, f"param.move.{theirs}").reshape(parameter.shape))
        for ours, theirs in (
            (made.kappa, "gamma"),
            (made.mu, "beta"),
            (made.table, "rel_pos_bias.rel_pos_bias"),
            (made.router.log_temperature, "q_router.temp"),
            *((p, n) for n, p in made.named_parameters() if "proj" in n),
        ):
            ours.copy_(array(arrays, f"param.{theirs}"))
    weight, bias = (array(arrays, f"param.hx_proj.{n}") for n in ("weight", "bias"))
    scale, shift = (array(arrays, f"param.norm.norm.{n}") for n in ("weight", "bias"))

    def layer(x):
        h = F.silu(ema(F.layer_norm(x, (8,), scale, shift)))
        logits, hx = F.linear(h, weight, bias).split([2, 8], dim=-1)
        return F.silu(hx + made(h, logits) + x)

    return layer


def test_authors_outputs_alone_are_ours_in_any_company():
    arrays = golden.load("seqboat_quirk_batch_dependence")
    layer = quirky_layer(arrays)
    full, mixed = (golden.batch_first(arrays[name]) for name in ("x_full", "x_mixed"))
    together = layer(torch.cat([full, mixed]))
    for got, want in zip(together, ("out_full_alone", "out_mixed_alone"), strict=True):
        np.testing.assert_allclose(got.detach(), arrays[want][:, 0], rtol=1e-9, atol=1e-10)


def test_the_authors_code_depends_on_the_batch_and_ours_does_not_follow():
    arrays = golden.load("seqboat_quirk_batch_dependence")
    assert np.abs(arrays["out_mixed_with_full"] - arrays["out_mixed_alone"]).max() > 0.05


# ---- always active -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [3, None])
def test_always_active_is_the_unit_with_confidence_one(window):
    made, routed = unit(always_active=True, window=window), unit(window=window)
    made.load_state_dict(routed.state_dict(), strict=False)
    assert made.router is None
    h, awake = draw(2, 9, 5), torch.tensor([0.0, 1.0], dtype=torch.float64).expand(2, 9, 2)
    _, confidence = routed.router(awake)
    torch.testing.assert_close(made(h), routed(h, awake) / confidence.unsqueeze(-1))


def test_always_active_padding_gets_an_output_and_is_seen_by_nobody():
    made = unit(always_active=True, window=2, function=relu2)
    h = draw(1, 9, 5)
    mask = torch.tensor([[True] * 6 + [False] * 3])
    y = made(h, mask=mask)
    torch.testing.assert_close(y[:, :6], made(h[:, :6]))
    assert (y[:, 6:8] != made.h_proj.bias).any()


# ---- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("bias", "window"), [("global", 3), ("global", None), ("local", 2), ("rotary", 1)])
@pytest.mark.parametrize("always", [False, True])
def test_step_equals_parallel(function, bias, window, always):
    made = unit(function=FUNCTIONS[function], bias=bias, window=window, causal=True, always_active=always)
    h, logits = draw(3, 17, 5), draw(3, 17, 2, seed=1)
    logits[0] = torch.tensor([0.0, 1.0])
    logits[2] = torch.tensor([1.0, 0.0])
    state, steps, sizes = made.initial_state(3), [], set()
    for t in range(17):
        before = {name: value.clone() for name, value in state.items()}
        y, new = made.step(h[:, t], None if always else logits[:, t], state)
        assert all(torch.equal(before[name], state[name]) for name in state)  # the given state is left alone
        state = new
        steps.append(y)
        sizes.add(sum(value.numel() for value in state.values()))
    want = made(h) if always else made(h, logits)
    torch.testing.assert_close(torch.stack(steps, 1), want)
    if window is not None:
        assert len(sizes) == 1


def test_a_stream_has_gradients_like_the_parallel_form():
    made = unit(causal=True, window=2)
    h, logits = draw(2, 8, 5).requires_grad_(), draw(2, 8, 2, seed=1).requires_grad_()
    state, steps = made.initial_state(2), []
    for t in range(8):
        y, state = made.step(h[:, t], logits[:, t], state)
        steps.append(y)
    inputs = [h, logits, *made.parameters()]
    for y, w in zip(
        torch.autograd.grad(torch.stack(steps, 1).square().sum(), inputs),
        torch.autograd.grad(made(h, logits).square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(y, w)


# ---- precision, windows, initial values ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("window", [4, None])
def test_autocast_keeps_scores_confidence_and_type(function, window):
    made = unit(function=FUNCTIONS[function], window=window).float()
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(0.5)
    h, logits = draw(2, 33, 5).float(), draw(2, 33, 2, seed=1).float()
    want = made(h, logits)
    seen = []
    made.confidence_seen.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = made(h, logits)
    assert got.dtype == torch.float32 and seen == [torch.float32]
    assert (got - want).norm() / want.norm() < 0.03


def test_windows_show_decisions_confidence_and_weights():
    made = unit(window=3)
    h, logits = draw(1, 9, 5), draw(1, 9, 2, seed=1)
    with record(made) as tape:
        y = made(h, logits)
    assert torch.equal(y, made(h, logits))
    active = tape["active_seen"]
    assert active.shape == tape["confidence_seen"].shape == (1, 9)
    assert torch.equal(active.bool(), (y != 0).any(-1))
    count = int(active.sum())
    matrix = dense_weights(tape["weights"], count)
    torch.testing.assert_close(matrix.sum(-1), torch.ones(1, count, dtype=torch.float64))


def test_initial_values_are_small_and_cut():
    made = SparseActivation(32, 16, 64, window=4, temperature_scale=0.3)
    for p in (made.mx_proj.weight, made.h_proj.weight, made.kappa, made.table):
        assert p.abs().max() <= 0.04
    assert made.mx_proj.weight.std().item() == pytest.approx(0.0176, rel=0.1)  # 0.02, cut at two deviations
    for p in (made.mx_proj.bias, made.h_proj.bias, made.mu):
        assert (p == 0).all()
    assert made.router.log_temperature.exp().item() == pytest.approx(0.3 * math.sqrt(32))
    assert SparseActivation(4, 2, 4, window=5, bias="local").table.shape == (29,)
    assert SparseActivation(4, 2, 4, window=5, bias="rotary").table is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: LatentConfigurator(0), "dim >= 1"),
        (lambda: LatentConfigurator(4, scale=0), "scale > 0"),
        (lambda: LatentConfigurator(4)(torch.ones(1, 3, 3)), "skip and activate"),
        (lambda: LatentConfigurator(4)(torch.ones(1, 3, 2), torch.ones(1, 3)), "mask must be bool"),
        (lambda: compress(torch.ones(1, 3, 2), torch.ones(1, 3)), "active must be bool"),
        (lambda: compress(torch.ones(3, 2), torch.ones(3).bool()), "batch, length"),
        (lambda: extract(torch.ones(1, 2, 2), torch.tensor([[3]])), "that compress returned"),
        (lambda: extract(torch.ones(1, 2, 2), torch.tensor([1])), "index"),
        (lambda: memory_attention(*[torch.ones(1, 3, 2)] * 3, 0), "at least 1"),
        (lambda: memory_attention(torch.ones(1, 3, 2), torch.ones(1, 4, 2), torch.ones(1, 4, 2), 2), "alike"),
        (lambda: memory_attention(*[torch.ones(1, 3, 2)] * 3, 2, bias=torch.ones(4)), r"\(2 P - 1,\)"),
        (lambda: memory_attention(*[torch.ones(1, 3, 2)] * 3, 2, positions=torch.ones(3)), "positions"),
        (lambda: memory_attention_slow(*[torch.ones(1, 3, 2)] * 3, 2, valid=torch.ones(1, 3)), "valid must be bool"),
        (lambda: rope(torch.ones(1, 2, 3), torch.zeros(1, 2)), "even"),
        (lambda: SparseActivation(4, 2, 4, window=0), "window >= 1"),
        (lambda: SparseActivation(4, 2, 4, window=2, bias="alibi"), "global, local, rotary"),
        (lambda: SparseActivation(4, 2, 4, window=None, bias="local"), "needs one"),
        (lambda: SparseActivation(4, 3, 4, window=2, bias="rotary"), "even"),
        (lambda: SparseActivation(4, 2, 4, window=2)(torch.ones(1, 3, 5), torch.ones(1, 3, 2)), r"\(\*, \*, 4\)"),
        (lambda: SparseActivation(4, 2, 4, window=2)(torch.ones(1, 3, 4)), r"\(1, 3, 2\)"),
        (
            lambda: SparseActivation(4, 2, 4, window=2, always_active=True)(torch.ones(1, 3, 4), torch.ones(1, 3, 2)),
            "None if always active",
        ),
        (lambda: SparseActivation(4, 2, 4, window=2).initial_state(1), "causal=True"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
