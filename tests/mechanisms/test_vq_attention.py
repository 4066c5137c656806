import math
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longseq_tutorial.mechanisms import vq_attention as module
from longseq_tutorial.mechanisms.gated_attention import relu2
from longseq_tutorial.mechanisms.vq_attention import (
    VQAttention,
    code_sums,
    codewords,
    nearest_code,
    vq_attention,
    vq_attention_blocks,
    vq_attention_quadratic,
)
from tests import golden_numbers as golden


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length, *, batch=2, heads=2, codes=6, width=3, value_width=5, seed=0):
    """q, k, v and a codebook whose last code of the last head is far from everything: dead, and of huge score."""
    codebook = draw(heads, codes, width, seed=seed + 3)
    codebook[-1, -1] = 1e4
    q, k = draw(2, batch, heads, length, width, seed=seed + 1)
    return q, k, draw(batch, heads, length, value_width, seed=seed + 2), codebook


def values_and_gradients(form, tensors, *args, **options):
    """The output, and the gradient of one random combination of it for each of ``tensors`` (None stays None)."""
    leaves = [t if t is None else t.clone().requires_grad_() for t in tensors]
    *qkv, bias = leaves
    y = form(*qkv, *args, bias=bias, **options)
    wanted = [t for t in leaves if t is not None]
    return [y, *torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), wanted)]


def at_once(*args, working_set=1 << 20, **options):
    """`vq_attention` as a GPU or a compiler has it; with a small working set, in several groups of blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Blocks, "apply", module._blocks_plain)
        patch.setattr(module, "WORKING_SET", working_set)
        return vq_attention(*args, **options)


in_groups = partial(at_once, working_set=300)


def assert_same(got, want, tolerance=1e-10):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- linear = quadratic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 37])
@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exact_window", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_linear_equals_quadratic_with_gradients(length, window, causal, exact_window, biased):
    q, k, v, codebook = inputs(length)
    bias = draw(2, 2 * window + 1, seed=5) if biased else None
    mask = draw(2, length, seed=6) > -0.5
    options = {"causal": causal, "window": window, "exact_window": exact_window}
    for m in (None, mask):
        want = values_and_gradients(vq_attention_quadratic, (q, k, v, bias), codebook, mask=m, **options)
        for block in (None, 1, 4):
            assert_same(
                values_and_gradients(vq_attention, (q, k, v, bias), codebook, mask=m, block=block, **options), want
            )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exact_window", [False, True])
def test_weights_worked_out_again_are_the_same(causal, exact_window, monkeypatch):
    """Those of long sequences are not kept for the gradient."""
    q, k, v, codebook = inputs(61)
    bias = draw(2, 7, seed=5)
    options = {"causal": causal, "window": 3, "block": 5, "exact_window": exact_window}
    want = values_and_gradients(vq_attention, (q, k, v, bias), codebook, **options)
    monkeypatch.setattr(module, "WORKING_SET", 300)
    assert_same(values_and_gradients(vq_attention, (q, k, v, bias), codebook, **options), want)


@pytest.mark.parametrize("form", [at_once, in_groups])
@pytest.mark.parametrize("length", [1, 7, 37])
@pytest.mark.parametrize(("window", "biased"), [(0, False), (0, True), (2, False), (5, True), (40, True)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exact_window", [False, True])
def test_all_blocks_at_once_equal_one_after_the_other_with_gradients(
    form, length, window, biased, causal, exact_window
):
    q, k, v, codebook = inputs(length)
    bias = draw(2, 2 * window + 1, seed=5) if biased else None
    options = {"causal": causal, "window": window, "exact_window": exact_window}
    for mask in (None, draw(2, length, seed=6) > -0.5):
        want = values_and_gradients(vq_attention_quadratic, (q, k, v, bias), codebook, mask=mask, **options)
        for block in (None, 1, 4):
            more = {"mask": mask, "block": block, **options}
            got = values_and_gradients(form, (q, k, v, bias), codebook, **more)
            assert_same(got, want)
            assert_same(got, values_and_gradients(vq_attention, (q, k, v, bias), codebook, **more))


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_into_one_graph(masked):
    q, k, v, codebook = inputs(37)
    bias, mask = draw(2, 7, seed=5), draw(2, 37, seed=6) > -0.5 if masked else None

    def form(q, k, v, codebook, bias):
        return vq_attention(q, k, v, codebook, mask=mask, window=3, bias=bias, block=5)

    want = values_and_gradients(form, (q, k, v, bias), codebook)
    compiled = torch.compile(form, backend="aot_eager", fullgraph=True)
    assert_same(values_and_gradients(compiled, (q, k, v, bias), codebook), want)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exact_window", [False, True])
def test_gradcheck(causal, exact_window):
    q, k, v, codebook = inputs(5, batch=1, value_width=2)
    bias, z = draw(2, 3, seed=5), nearest_code(k, codebook)

    def form(q, v, bias):  # k moves codes, and its straight-through gradient is no derivative: tested above
        options = {"causal": causal, "window": 1, "exact_window": exact_window}
        return vq_attention(q, k, v, codebook, bias=bias, codes=z, **options)

    assert torch.autograd.gradcheck(form, [t.requires_grad_() for t in (q, v, bias)])


@pytest.mark.parametrize("form", [vq_attention, at_once, in_groups])
def test_keys_learn_from_the_window_alone(form):
    """Straight through inside the window, zero where a key is served by the sum of its code."""
    q, k, v, codebook = (t.requires_grad_() for t in inputs(9))
    weight = torch.zeros(2, 2, 9, 5, dtype=torch.float64)
    weight[:, :, 0] = draw(2, 2, 5, seed=4)  # only query 0 is asked
    (grad,) = torch.autograd.grad((form(q, k, v, codebook, window=2) * weight).sum(), k)
    assert (grad[:, :, :3].abs().amax(-1) > 0).all() and grad[:, :, 3:].abs().max() == 0
    y = form(q, k, v, codebook)
    assert torch.autograd.grad(y.sum(), k)[0].abs().max() == 0
    with pytest.raises(RuntimeError):
        torch.autograd.grad(form(q, k, v, codebook, window=2).sum(), codebook)


def test_codes_as_many_as_keys_give_full_attention():
    q, k, v, _ = inputs(13, batch=1)
    full = torch.softmax(q @ k.mT, -1) @ v
    torch.testing.assert_close(vq_attention(q, k, v, k[0]), full)
    torch.testing.assert_close(vq_attention(q, k, v, draw(2, 4, 3), window=12, exact_window=True), full)


# ---- properties ------------------------------------------------------------------------------------------------------

FORMS = {
    "quadratic": vq_attention_quadratic,
    "linear": vq_attention,
    "at once": in_groups,
    "blocks": lambda *args, causal, window, bias, **options: vq_attention_blocks(
        *args, block=3, memory=window, bias=bias[:, None, window:], **options
    )[0],
}


@settings(deadline=None, max_examples=30)
@given(
    name=st.sampled_from(list(FORMS)),
    causal=st.booleans(),
    length=st.integers(1, 12),
    before=st.integers(0, 6),
    after=st.integers(0, 6),
    window=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_padding_never_changes_real_outputs(name, causal, length, before, after, window, seed):
    causal = causal or name == "blocks"
    q, k, v, codebook = inputs(length, seed=seed)
    options = {"causal": causal, "window": window, "bias": draw(2, 2 * window + 1, seed=seed)}
    want = FORMS[name](q, k, v, codebook, **options)
    total, real = before + length + after, slice(before, before + length)
    padded = [torch.full((2, 2, total, t.shape[-1]), math.nan, dtype=torch.float64) for t in (q, k, v)]
    for there, t in zip(padded, (q, k, v), strict=True):
        there[:, :, real] = t
    mask = torch.zeros(2, total, dtype=torch.bool)
    mask[:, real] = True
    got = FORMS[name](*padded, codebook, mask=mask, **options)
    torch.testing.assert_close(got[:, :, real], want)
    if causal:
        assert (got[:, :, :before] == 0).all()  # these queries see nothing real


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(list(FORMS)), cut=st.integers(1, 19), window=st.integers(0, 25), seed=st.integers(0, 999))
def test_causal_means_the_future_does_not_matter(name, cut, window, seed):
    q, k, v, codebook = inputs(20, seed=seed)
    options = {"causal": True, "window": window, "bias": draw(2, 2 * window + 1, seed=seed)}
    want = FORMS[name](q, k, v, codebook, **options)
    k[:, :, cut:], v[:, :, cut:] = 50, -50
    torch.testing.assert_close(FORMS[name](q, k, v, codebook, **options)[:, :, :cut], want[:, :, :cut])


@settings(deadline=None, max_examples=20)
@given(
    causal=st.booleans(),
    length=st.integers(1, 40),
    block=st.integers(1, 45),
    window=st.integers(0, 45),
    codes=st.integers(1, 9),
    working_set=st.sampled_from([1, 300, 3000, 1 << 20]),
    seed=st.integers(0, 999),
)
def test_linear_equals_quadratic_any_shape(causal, length, block, window, codes, working_set, seed):
    q, k, v, codebook = inputs(length, codes=codes, seed=seed)
    options = {"causal": causal, "window": window, "bias": draw(2, 2 * window + 1, seed=seed)}
    want = vq_attention_quadratic(q, k, v, codebook, **options)
    torch.testing.assert_close(vq_attention(q, k, v, codebook, block=block, **options), want)
    torch.testing.assert_close(at_once(q, k, v, codebook, block=block, working_set=working_set, **options), want)


@pytest.mark.parametrize("causal", [False, True])
def test_each_sequence_of_a_batch_is_alone(causal):
    q, k, v, codebook = inputs(11, batch=3)
    mask = draw(3, 11, seed=8) > -0.5
    together = vq_attention(q, k, v, codebook, mask=mask, causal=causal, window=2)
    for i in range(3):
        b = slice(i, i + 1)
        alone = vq_attention(q[b], k[b], v[b], codebook, mask=mask[b], causal=causal, window=2)
        torch.testing.assert_close(together[b], alone)


def test_order_of_keys_does_not_matter_without_window():
    q, k, v, codebook = inputs(17)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(1))
    want = vq_attention(q, k, v, codebook)
    torch.testing.assert_close(vq_attention(q, k[:, :, order], v[:, :, order], codebook), want)


# ---- numerical traps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", [vq_attention, at_once, in_groups])
def test_a_dead_code_of_huge_score_pushes_nothing_below_the_smallest_float(form, causal):
    q, k, v, codebook = (t.float() for t in inputs(50))
    q = q.abs()  # against the far code (1e4, 1e4, 1e4): scores of many thousands, and exp(-thousands) = 0
    y = form(q, k, v, codebook, causal=causal)
    want = vq_attention(q.double(), k.double(), v.double(), codebook.double(), causal=causal)
    assert (q @ codebook[-1, -1]).min() > 200
    assert (y - want).abs().max() < 1e-5


@pytest.mark.parametrize("form", [vq_attention, at_once])
@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_stay_finite(form, causal):
    q, k, v, codebook = (t.float() for t in inputs(50))
    mask = draw(2, 50, seed=6) > 0
    for size in (1e3, 1e6):
        got = values_and_gradients(
            form, (size * q, size * k, v, None), size * codebook, mask=mask, causal=causal, window=3, block=8
        )
        assert all(t.isfinite().all() for t in got)


@pytest.mark.parametrize("form", [vq_attention, at_once])
def test_nothing_cancels_where_the_window_is_nearly_silent(form):
    """Correcting the sums over all codes by subtracting would leave 1e-8 of the weight, below float32's last digit."""
    q, k, v, codebook = inputs(64, codes=2)
    q, codebook = q * 0.1, codebook.clamp(max=1) * 0.1
    bias = torch.full((2, 127), -18.0, dtype=torch.float64)
    bias[:, 63] = -19.0
    options = {"window": 63, "bias": bias}
    want = vq_attention_quadratic(q, k, v, codebook, **options)
    single = [t.float() for t in (q, k, v, codebook)]
    got = form(*single, window=63, bias=bias.float(), block=8)
    assert (got - want).abs().max() < 1e-5
    far_away = form(*single, window=5, bias=bias[:, 58:69].float(), block=8)
    assert (far_away - vq_attention_quadratic(q, k, v, codebook, window=5, bias=bias[:, 58:69])).abs().max() < 1e-5


@pytest.mark.parametrize("form", [vq_attention, at_once])
def test_only_padding_gives_zeros_and_finite_gradients(form):
    q, k, v, codebook = inputs(6)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    for causal in (False, True):
        for window in (0, 2):
            y, *grads = values_and_gradients(form, (q, k, v, None), codebook, mask=mask, causal=causal, window=window)
            assert (y == 0).all() and all(g.isfinite().all() for g in grads)


def test_codes_and_counts_are_float32_under_autocast_and_in_half_precision():
    q, k, v, codebook = (t.float() for t in inputs(3000, codes=50))
    z = nearest_code(k, codebook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(k, codebook), z)
        y = vq_attention(q, k, v, codebook, causal=True, window=3)
    want = vq_attention(q.double(), k.double(), v.double(), codebook.double(), causal=True, window=3, codes=z)
    assert y.dtype == torch.float32 and (y - want).abs().max() < 1e-4
    half = vq_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), codebook, codes=z)
    assert half.dtype == torch.bfloat16
    assert (half - vq_attention(q, k, v, codebook, codes=z)).norm() / half.float().norm() < 2e-2


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest result of any operation."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def largest(form, length):
    q, k, v, codebook = (t.float() for t in inputs(length, batch=1, heads=1, codes=32, width=8, value_width=16))
    with LargestTensor() as seen:
        values_and_gradients(form, (q, k, v, None), codebook)
    return seen.numel


@pytest.mark.parametrize("form", [vq_attention, at_once, partial(at_once, working_set=20_000)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 20}, {"window": 20, "causal": True}])
def test_no_tensor_grows_with_the_square_of_the_length(form, options):
    sizes = [largest(partial(form, **options), length) for length in (2000, 4000)]
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 4000 * 32 * 16  # nor is there one of length * codes * value width
    assert largest(vq_attention_quadratic, 500) >= 500 * 500


class Calls(TorchDispatchMode):
    """Counts the calls of each operation, and notes where their tensors are."""

    def __init__(self):
        super().__init__()
        self.of, self.devices = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func.overloadpacket] += 1
        out = func(*args, **(kwargs or {}))
        self.devices |= {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("exact_window", "masked"), [(False, False), (True, True)])
def test_a_gpu_gets_as_many_calls_for_any_length_and_is_never_waited_for(causal, exact_window, masked, monkeypatch):
    """Tried on "meta" tensors, which are no nearer to the CPU than a GPU's, and have no numbers to look at."""

    def calls(length, device):
        with torch.device(device):
            tensors = [torch.zeros(shape, requires_grad=True) for shape in [(2, 2, length, 4)] * 3 + [(2, 5)]]
            codebook, z = torch.zeros(2, 6, 4), torch.zeros(2, 2, length, dtype=torch.long)
            mask = torch.ones(2, length, dtype=torch.bool) if masked else None
        *qkv, bias = tensors
        with Calls() as counted:
            x = module._Ready.of(*qkv, codebook, z, mask, bias)
            y = module._in_blocks(x, causal, 2, exact_window, None)
            torch.autograd.grad(y.sum(), tensors)
        assert counted.devices == {device}
        return counted.of

    short, long = calls(1000, "meta"), calls(7990, "meta")
    assert short == long and short.total() < 350
    monkeypatch.setattr(module._Blocks, "apply", module._blocks_plain)
    assert torch.ops.aten.lift_fresh not in calls(1000, "cpu")  # torch.tensor(..), which on "meta" is no call at all


def test_no_tensor_of_the_recurrence_grows_but_inputs_and_outputs():
    sizes = []
    for length in (500, 1000):
        q, k, v, codebook = (t.float() for t in inputs(length, batch=1, heads=1, codes=64, width=8, value_width=16))
        with LargestTensor() as seen, torch.no_grad():
            vq_attention_blocks(q, k, v, codebook, block=50, memory=20, codes=nearest_code(k, codebook[:, :1]))
        sizes.append(seen.numel)
    assert sizes == [500 * 16, 1000 * 16]


# ---- block by block, and step by step --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 23])
@pytest.mark.parametrize("block", [1, 4, 30])
@pytest.mark.parametrize("memory", [0, 1, 5, 40])
@pytest.mark.parametrize("exact_window", [False, True])
def test_blocks_equal_the_parallel_form(length, block, memory, exact_window):
    q, k, v, codebook = inputs(length)
    mask = draw(2, length, seed=6) > -0.5
    bias = draw(2, 2 * memory + 1, seed=5)
    options = {"mask": mask, "exact_window": exact_window}
    want = vq_attention_quadratic(q, k, v, codebook, causal=True, window=memory, bias=bias, **options)
    by_distance = bias[:, None, memory:]  # 0 .. memory steps back
    got, state = vq_attention_blocks(q, k, v, codebook, block=block, memory=memory, bias=by_distance, **options)
    torch.testing.assert_close(got, want)
    assert state["v"].shape == (2, 2, memory, 5) and state["mean"].shape == (2, 2, 6, 5)
    counted = state["count"].sum(-1) + state["real"].sum(-1, keepdim=True)
    assert torch.equal(counted, mask.sum(-1, keepdim=True).expand(2, 2))


@pytest.mark.parametrize("memory", [0, 1, 5])
def test_gradients_of_single_steps_equal_those_of_a_window(memory):
    tensors = [*inputs(14)[:3], draw(2, 2 * memory + 1, seed=5)]
    codebook = inputs(14)[3]

    def blocks(q, k, v, codebook, bias):
        return vq_attention_blocks(q, k, v, codebook, block=1, memory=memory, bias=bias[:, None, memory:])[0]

    want = values_and_gradients(vq_attention_quadratic, tensors, codebook, causal=True, window=memory)
    assert_same(values_and_gradients(blocks, tensors, codebook), want)


def test_a_block_without_memory_still_teaches_its_own_keys():
    q, k, v, codebook = inputs(8)
    y, _ = vq_attention_blocks(q, k.requires_grad_(), v, codebook, block=4, memory=0)
    grad = torch.autograd.grad(y[:, :, -1].sum(), k)[0].abs().amax((0, 1, 3))
    assert (grad[4:] > 0).all() and grad[:4].max() == 0


def test_blocks_carry_on_from_any_cut():
    q, k, v, codebook = inputs(31)
    whole, last = vq_attention_blocks(q, k, v, codebook, block=4, memory=3)
    parts, state = [], None
    for a, b in ((0, 1), (1, 9), (9, 10), (10, 31)):
        y, state = vq_attention_blocks(*(t[:, :, a:b] for t in (q, k, v)), codebook, block=4, memory=3, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    for name in last:
        torch.testing.assert_close(state[name], last[name])


def test_a_stopped_cache_stops_the_gradient_of_everything_carried():
    q, k, v, codebook = inputs(12)
    state = vq_attention_blocks(q, k, v.requires_grad_(), codebook, block=4, memory=4)[1]
    for stop in (False, True):
        y, _ = vq_attention_blocks(q, k.requires_grad_(), v, codebook, block=4, memory=4, state=state, stop_cache=stop)
        early = torch.autograd.grad(y[:, :, -1].sum(), k, retain_graph=True)[0][:, :, :8].abs().amax((0, 1, 3))
        assert (early[4:] > 0).all() != stop and early[:4].max() == 0


@pytest.mark.parametrize("window", [0, 3])
@pytest.mark.parametrize("exact_window", [False, True])
def test_step_equals_parallel_and_the_state_keeps_its_size(window, exact_window):
    torch.manual_seed(0)
    attention = VQAttention(2, 6, 3, 5, window, exact_window=exact_window).double()
    q, k, v, _ = inputs(40)
    attention(q, k, v)  # one batch in training makes the codebook
    attention.eval()
    with torch.no_grad():
        want, _ = attention(q, k, v)
        state, steps = attention.initial_state(2), []
        sizes = {name: x.shape for name, x in state.items()}
        for t in range(40):
            y, state = attention.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
            steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 2), want, rtol=0, atol=1e-12)
    assert {name: x.shape for name, x in state.items()} == sizes


@pytest.mark.parametrize("causal", [False, True])
def test_module_is_the_function_with_the_codebook_before_the_update(causal):
    torch.manual_seed(0)
    attention = VQAttention(2, 6, 3, 5, 2, causal=causal, start="normal").double()
    q, k, v, _ = inputs(20)
    codebook = attention.quantizer.codebook
    y, loss = attention(q, k, v)
    bias = torch.cat([torch.zeros(2, 2), attention.bias], 1) if causal else attention.bias
    want = vq_attention_quadratic(q, k, v, codebook, causal=causal, window=2, bias=bias)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(loss, (k - codewords(codebook, nearest_code(k, codebook))).square().sum((1, 3)).mean())
    assert not torch.equal(attention.quantizer.codebook, codebook)
    (y.sum() + loss).backward()
    assert attention.bias.grad.abs().min() > 0


# ---- wrong input -----------------------------------------------------------------------------------------------------


def call(form=vq_attention, **changed):
    arguments = dict(zip(("q", "k", "v", "codebook"), inputs(5), strict=True))
    return form(**{**arguments, **changed})


def stream_of(window):
    attention = VQAttention(1, 2, 3, 3, window)
    x = torch.ones(1, 1, 3)
    attention.step(x, x, x, VQAttention(1, 2, 3, 3, 1).initial_state(1))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: call(q=torch.ones(2, 2, 4, 3)), r"q and k must be \(batch, heads, length, k\) alike"),
        (lambda: call(v=torch.ones(2, 2, 5)), r"v \(batch, heads, length, v\)"),
        (lambda: call(codebook=torch.ones(2, 6, 4)), r"codebook must be .* = \(2, \*, 3\)"),
        (lambda: call(k=torch.ones(2, 5, 3)), r"k must be \(batch, heads, length >= 1, key width\)"),
        (lambda: call(mask=torch.ones(2, 5)), r"mask must be bool \(batch, length\) = \(2, 5\)"),
        (lambda: call(window=-1), "0 or more"),
        (lambda: call(window=2, bias=torch.ones(2, 3)), r"\(heads, 2 \* window \+ 1\) = \(2, 5\)"),
        (lambda: call(codes=torch.ones(2, 2, 5)), "codes must be int64"),
        (lambda: call(block=0), "block must be at least 1"),
        (lambda: call(vq_attention_quadratic, mask=torch.ones(2, 5)), "mask must be bool"),
        (lambda: call(vq_attention_blocks, block=0, memory=1), "block must be at least 1"),
        (lambda: call(vq_attention_blocks, block=2, memory=1, bias=torch.ones(2, 3)), "memory \\+ 1"),
        (lambda: stream_of(2), "remembers 1 tokens; memory is 2"),
        (lambda: VQAttention(1, 2, 3, 3, 2, causal=False).initial_state(1), "cannot stream"),
        (lambda: VQAttention(1, 2, 3, 3, -1), "window >= 0"),
    ],
)
def test_wrong_input_is_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        wrong()


# ---- the authors' numbers --------------------------------------------------------------------------------------------


def tensors(name, start=""):
    """The arrays of a file whose names begin with ``start``, as tensors."""
    return {
        key.removeprefix(start): torch.from_numpy(a) for key, a in golden.load(name).items() if key.startswith(start)
    }


@pytest.mark.parametrize("form", [vq_attention_quadratic, vq_attention])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bidir", {}),
        ("causal", {"causal": True}),
        ("bidir_window", {"window": 3}),
        ("causal_window", {"window": 3, "causal": True}),
        ("bidir_window_exactkeys", {"window": 3, "exact_window": True}),
    ],
)
def test_definition_in_numbers(form, name, options):
    a = tensors("vq_attn_plain_oracle")
    assert torch.equal(nearest_code(a["k"], a["C"]), a["z"])
    bias = a["bias"] if "window" in options else None
    y = form(a["q"] * a["scale"], a["k"], a["v"], a["C"], mask=a["keep"], bias=bias, **options)
    torch.testing.assert_close(y, a[f"{name}_quadratic"], rtol=0, atol=1e-9)


def test_identity_holds_for_other_functions_in_numbers():
    """f(Q K_hat^T) V = f(Q C^T) (Delta V), without any normalisation."""
    a = tensors("vq_attn_plain_oracle")
    sums, numbers = code_sums(a["v"], a["z"], 5, a["keep"])
    assert_same([sums, numbers], [a["bidir_U"], a["bidir_n"]], 1e-9)

    def laplace(x):  # with exact mean and deviation, as the numbers have it; Mega's code rounds both to six digits
        return 0.5 * (1 + torch.erf((x - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))

    for name, f in (("laplace", laplace), ("relu2", relu2)):
        y = f(a["scale"] * a["q"] @ a["C"].mT) @ sums
        torch.testing.assert_close(y, a[f"bidir_{name}_unnormalised"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", ["a_", "b_"])
@pytest.mark.parametrize("stop", [False, True])
def test_authors_recurrence_with_positions_and_gradients(case, stop):
    a = tensors("vq_attn_causal_ref", case)
    heads, width, memory, dim = a["n_head"].item(), a["q"].shape[-1], a["mem_len"].item(), a["d_model"].item()
    scale = width**-0.25
    angle = torch.arange(memory + 1)[:, None] * a["pe_lam"] ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    r = (torch.cat([angle.sin(), angle.cos()], -1) @ a["W_r"] * scale).view(memory + 1, heads, width).transpose(0, 1)
    content, place = ((a[name] * scale).view(heads, 1, width) for name in ("xl_u", "xl_v"))
    q, k, v = (a[name].requires_grad_() for name in "qkv")
    y, state = vq_attention_blocks(
        q + content, k, v, a["C"], block=a["block_len"].item(), memory=memory, bias=(q + place) @ r.mT, stop_cache=stop
    )
    out = y.transpose(1, 2).flatten(2)
    grads = torch.autograd.grad((out * a["cotangent"]).sum(), (q, k, v))
    ending = "_stopcache" if stop else ""
    assert torch.equal(nearest_code(k, a["C"]), a["z"])
    assert_same([out, *grads], [a["out"], *(a[f"grad_{name}{ending}"] for name in "qkv")], 1e-9)
    assert_same([state["mean"], state["count"].double()], [a["final_agg_mean"], a["final_agg_count"]], 1e-9)
