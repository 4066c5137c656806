"""The FFT form of a Toeplitz product is the product: values, gradients, masks, streams, images, authors' numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longseq_tutorial.mechanisms import fft_bias
from longseq_tutorial.mechanisms.fft_bias import (
    FastRPB,
    toeplitz_matrix,
    toeplitz_product,
    toeplitz_product_2d,
    toeplitz_product_2d_dense,
    toeplitz_product_2d_full,
    toeplitz_product_2d_full_dense,
    toeplitz_product_dense,
)
from tests import golden_numbers as golden

ODD_LENGTHS = [1, 2, 3, 17, 64, 101]
GRIDS = [(1, 1), (1, 5), (4, 1), (2, 3), (7, 7), (5, 11)]
SETTINGS = [{"symmetric": s, "causal": c} for s in (False, True) for c in (False, True)]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def awake(module, seed=0):
    """The same module with weights that matter: fresh ones are almost zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(*p.shape, seed=seed))
    return module.double()


def values_and_gradients(form, *inputs):
    inputs = [t.clone().requires_grad_() for t in inputs]
    y = form(*inputs)
    return [y, *torch.autograd.grad((y * draw(*y.shape, seed=99)).sum(), inputs)]


def assert_same(form, other, *inputs):
    pairs = zip(values_and_gradients(form, *inputs), values_and_gradients(other, *inputs), strict=True)
    for got, want in pairs:
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


# ---- slow form = fast form ----------------------------------------------------------------------------------


def test_the_matrix_is_the_definition():
    lags = torch.arange(7.0)
    matrix = toeplitz_matrix(lags)
    assert all(matrix[i, j] == lags[(i - j) + 3] for i in range(4) for j in range(4))
    v = draw(1, 4, 1, 2)
    y = toeplitz_product_dense(lags[None].double(), v)
    for i in range(4):
        torch.testing.assert_close(y[0, i, 0], sum(lags[i - j + 3].double() * v[0, j, 0] for j in range(4)))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_fft_equals_dense_with_gradients(length, causal):
    lags, v = draw(3, 2 * length - 1), draw(2, length, 3, 4, seed=1)
    assert_same(
        lambda w, v: toeplitz_product(w, v, causal=causal),
        lambda w, v: toeplitz_product_dense(w, v, causal=causal),
        lags,
        v,
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_2d_equals_dense_with_gradients(grid):
    x, y = grid
    v = draw(2, x, y, 3, 2)
    assert_same(toeplitz_product_2d_full, toeplitz_product_2d_full_dense, draw(3, 2 * x - 1, 2 * y - 1, seed=1), v)
    two = draw(3, 2 * x - 1, seed=2), v, draw(3, 2 * y - 1, seed=3)
    assert_same(toeplitz_product_2d, toeplitz_product_2d_dense, *two)
    if x == y:
        assert_same(toeplitz_product_2d, toeplitz_product_2d_dense, two[0], v)
        torch.testing.assert_close(toeplitz_product_2d(two[0], v), toeplitz_product_2d(two[0], v, two[0]))


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (5, 2)], ids=str)
def test_separable_is_a_full_bias_of_sums(grid):
    x, y = grid
    rows, columns, v = draw(2, 2 * x - 1), draw(2, 2 * y - 1, seed=1), draw(1, x, y, 2, 3, seed=2)
    both = rows[:, :, None] + columns[:, None]
    torch.testing.assert_close(toeplitz_product_2d(rows, v, columns), toeplitz_product_2d_full(both, v))


@pytest.mark.parametrize("piece", [1, 2 * 17 * 4 * 2, 10**9])
def test_any_number_of_heads_at_a_time(piece, monkeypatch):
    monkeypatch.setattr(fft_bias, "PIECE", piece)
    plane, image = draw(5, 5, 7), draw(2, 3, 4, 5, 4, seed=1)
    assert_same(toeplitz_product_2d_full, toeplitz_product_2d_full_dense, plane, image)


def test_gradcheck():
    lags, v = draw(2, 9).requires_grad_(), draw(2, 5, 2, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(toeplitz_product, (lags, v))
    assert torch.autograd.gradgradcheck(lambda w, v: toeplitz_product(w, v, causal=True), (lags, v))
    lags, v = draw(1, 3, 5).requires_grad_(), draw(1, 2, 3, 1, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(toeplitz_product_2d_full, (lags, v))


def test_gradient_of_the_lags_is_a_correlation():
    length, lags, v, g = 6, draw(2, 11).requires_grad_(), draw(3, 6, 2, 4, seed=1), draw(3, 6, 2, 4, seed=2)
    (got,) = torch.autograd.grad((toeplitz_product(lags, v) * g).sum(), lags)
    for offset in range(1 - length, length):
        pairs = [(i, i - offset) for i in range(length) if 0 <= i - offset < length]
        want = sum((g[:, i] * v[:, j]).sum((0, 2)) for i, j in pairs)
        torch.testing.assert_close(got[:, offset + length - 1], want)


# ---- what a Toeplitz matrix has to do ------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(0, 10), st.integers(0, 10), st.integers(0, 10_000))
def test_a_shifted_input_gives_the_shifted_output(length, before, after, seed):
    """With silence around it, wherever the input stands its answer stands."""
    total = length + before + after
    lags, v = draw(1, 2 * total - 1, seed=seed), draw(1, length, 1, 2, seed=seed + 1)
    stand = F.pad(v, (0, 0, 0, 0, before, after))
    start = F.pad(v, (0, 0, 0, 0, 0, before + after))
    moved, home = toeplitz_product(lags, stand), toeplitz_product(lags, start)
    torch.testing.assert_close(moved[:, before : before + length], home[:, :length])


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 60), st.data())
def test_causal_never_hears_the_future(length, data):
    cut = data.draw(st.integers(1, length - 1))
    lags, v = draw(2, 2 * length - 1), draw(1, length, 2, 2, seed=1)
    other = v.clone()
    other[:, cut:] += 100 * draw(1, length - cut, 2, 2, seed=2)
    calm, shocked = (toeplitz_product(lags, t, causal=True) for t in (v, other))
    torch.testing.assert_close(calm[:, :cut], shocked[:, :cut], rtol=0, atol=1e-10)
    assert (calm[:, cut:] - shocked[:, cut:]).abs().max() > 1e-3
    assert (toeplitz_product(lags, v)[:, :cut] - toeplitz_product(lags, other)[:, :cut]).abs().max() > 1e-3


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.integers(0, 10_000))
def test_sequences_of_a_batch_do_not_meet(length, seed):
    lags, v = draw(2, 2 * length - 1, seed=seed), draw(3, length, 2, 4, seed=seed + 1)
    together = toeplitz_product(lags, v)
    for b in range(3):
        torch.testing.assert_close(together[b], toeplitz_product(lags, v[b : b + 1])[0])
    torch.testing.assert_close(together[:, :, 1:], toeplitz_product(lags[1:], v[:, :, 1:]))  # nor do heads


def test_nothing_wraps_around():
    """A value at the end, read by weights that only look one step back: nobody sees it."""
    lags = torch.zeros(1, 2 * 50 - 1, dtype=torch.float64)
    lags[0, 50] = 1  # offset 1
    v = torch.zeros(1, 50, 1, 1, dtype=torch.float64)
    v[0, -1] = 1
    assert toeplitz_product(lags, v).abs().max() < 1e-14


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("layout", ["sequence", "separable", "full"])
def test_no_tensor_grows_with_the_square_of_the_length(layout):
    side = {"sequence": 64 * 64}.get(layout, 64)
    module, v = FastRPB(1, side, layout=layout), torch.randn(1, 64 * 64, 1, 2, requires_grad=True)
    with Largest() as seen:
        module(v).sum().backward()
    assert v.numel() <= seen.numel <= 12 * v.numel() < (64 * 64) ** 2 / 100


def test_lengths_without_small_factors_are_padded_to_good_ones(monkeypatch):
    asked = []
    for name in ("rfft", "irfft", "rfft2", "irfft2"):
        original = getattr(torch.fft, name)

        def spy(x, n=None, s=None, name=name, original=original):
            asked.append((s or [n or x.shape[-1]])[-1])
            return original(x, **({"s": s} if name.endswith("2") else {"n": n}))

        monkeypatch.setattr(torch.fft, name, spy)
    toeplitz_product(torch.zeros(1, 2 * 4099 - 1), torch.zeros(1, 4099, 1, 1))
    toeplitz_product_2d_full(torch.zeros(1, 1, 2 * 4099 - 1), torch.zeros(1, 1, 4099, 1, 1))
    assert len(asked) == 6
    for size in asked:
        rest = size
        for p in (2, 3, 5):
            while rest % p == 0:
                rest //= p
        assert rest == 1 and 2 * 4099 - 1 <= size < 2 * 4099 * 1.1


# ---- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sequence", "separable", "full"])
def test_float32_inside_autocast_and_for_bfloat16(layout):
    module = awake(FastRPB(2, 16, layout=layout)).float()
    v = torch.randn(2, 16 if layout == "sequence" else 256, 2, 3)
    want = module.double()(v.double())
    module.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(v.requires_grad_())
        lags = module.lags(*[16] * (2 if layout == "full" else 1))
        y.square().sum().backward()
    assert lags.dtype == y.dtype == torch.float32
    assert (y - want).abs().max() < 1e-4 * want.abs().max()
    assert module.weight.grad.dtype == torch.float32 and module.weight.grad.isfinite().all()
    half = module(v.bfloat16())  # bfloat16 loses digits on its way in and out, never in between
    assert torch.equal(half, module(v.bfloat16().float()).bfloat16())
    assert (half - want).norm() < 1e-2 * want.norm()
    assert module.double()(v.double()).dtype == torch.float64


def test_dense_forms_run_in_float32_under_autocast():
    lags, v = torch.randn(2, 31), torch.randn(1, 16, 2, 3)
    plane, image = torch.randn(2, 7, 7), torch.randn(1, 4, 4, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = [
            (toeplitz_product(lags, v), toeplitz_product_dense(lags, v)),
            (toeplitz_product_2d(plane[:, 0], image), toeplitz_product_2d_dense(plane[:, 0], image)),
            (toeplitz_product_2d_full(plane, image), toeplitz_product_2d_full_dense(plane, image)),
        ]
    for fast, dense in pairs:
        torch.testing.assert_close(fast, dense, rtol=1e-4, atol=1e-4)


# ---- the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_lags_are_what_the_options_promise(options):
    module = awake(FastRPB(2, 5, **options))
    lags = module.lags(5)
    assert lags.shape == (2, 9)
    assert module.weight.numel() == 2 * (5 if options["symmetric"] or options["causal"] else 9)
    if options["causal"]:
        assert not lags[:, :4].any()
        torch.testing.assert_close(lags[:, 4:], module.weight)
    elif options["symmetric"]:
        torch.testing.assert_close(lags, lags.flip(-1))
        torch.testing.assert_close(lags[:, 4:], module.weight)
    else:
        torch.testing.assert_close(lags, module.weight)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 15, 31])
def test_shorter_sequences_use_the_middle_and_longer_ones_add_zeros(length, options):
    module = awake(FastRPB(2, 7, **options))
    middle, lags = module.lags(7), module.lags(length)
    assert lags.shape == (2, 2 * length - 1)
    for offset in range(1 - length, length):
        want = middle[:, offset + 6] if abs(offset) < 7 else torch.zeros(2, dtype=torch.float64)
        torch.testing.assert_close(lags[:, offset + length - 1], want)
    v = draw(2, length, 2, 3)
    torch.testing.assert_close(module(v), toeplitz_product_dense(lags, v))


@pytest.mark.parametrize("symmetric", [False, True])
def test_full_layout_lags(symmetric):
    module = awake(FastRPB(2, 3, symmetric=symmetric, layout="full"))
    assert module.weight.shape == ((2, 3, 3) if symmetric else (2, 5, 5))
    lags = module.lags(2, 4)
    assert lags.shape == (2, 3, 7)
    for dx in range(-1, 2):
        for dy in range(-3, 4):
            if abs(dy) > 2:
                want = torch.zeros(2, dtype=torch.float64)
            else:
                want = module.weight[:, abs(dx), abs(dy)] if symmetric else module.weight[:, dx + 2, dy + 2]
            torch.testing.assert_close(lags[:, dx + 1, dy + 3], want)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("layout", ["separable", "full"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6), (7, 3)], ids=str)
def test_images_come_row_after_row(layout, grid, symmetric):
    module = awake(FastRPB(2, 6, symmetric=symmetric, layout=layout))
    x, y = grid
    v = draw(2, x * y, 2, 3)
    image = v.view(2, x, y, 2, 3)
    if layout == "full":
        want = toeplitz_product_2d_full_dense(module.lags(x, y), image)
    else:
        want = toeplitz_product_2d_dense(module.lags(x), image, module.lags(y))
    torch.testing.assert_close(module(v, shape=grid), want.flatten(1, 2))
    if x == y:
        torch.testing.assert_close(module(v), module(v, shape=grid))


def test_initial_weights_follow_the_published_formula():
    torch.manual_seed(0)
    for options in (*SETTINGS, {"layout": "separable"}, {"layout": "full", "symmetric": True}):
        module = FastRPB(200, 9, **options)
        w = module.weight.double()
        line = w if w.dim() == 2 else w[:, 0]
        start = 0 if line.shape[1] == 9 else 8
        step = line[:, start + 1] - line[:, start]  # 1e-5 * a
        assert -1e-9 < step.min() and step.max() < 1.0001e-5 and 0.3e-5 < step.mean() < 0.7e-5
        assert 0.7e-6 < line[:, start].std() < 1.4e-6  # 1e-6 * b
        offsets = torch.arange(9.0, dtype=torch.float64)
        want = line[:, start, None] + step[:, None] * offsets
        torch.testing.assert_close(line[:, start:], want, rtol=0, atol=1e-10)
        lags = module.lags(9) if w.dim() == 2 else module.lags(9, 9)
        if not options.get("causal"):  # both directions start alike
            torch.testing.assert_close(lags, lags.flip(tuple(range(1, lags.dim()))))


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@settings(deadline=None, max_examples=15)
@given(length=st.integers(1, 20), left=st.integers(0, 7), right=st.integers(0, 7))
def test_padding_never_touches_real_positions(options, length, left, right):
    module = awake(FastRPB(2, 12, **options))
    v = draw(1, length, 2, 3)
    padded = torch.full((1, left + length + right, 2, 3), torch.nan, dtype=torch.float64)
    padded[:, left : left + length] = v
    mask = torch.zeros(1, left + length + right, dtype=torch.bool)
    mask[:, left : left + length] = True
    torch.testing.assert_close(module(padded, mask)[:, left : left + length], module(v))


def test_padded_values_get_no_gradient():
    module, v = awake(FastRPB(1, 9)), draw(1, 9, 1, 2).requires_grad_()
    mask = torch.arange(9)[None] < 6
    (module(v, mask)[:, :6]).square().sum().backward()
    assert not v.grad[:, 6:].any() and v.grad[:, :6].abs().min() > 0


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 30])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("longest", [1, 7])
def test_step_equals_parallel_with_a_constant_window(length, symmetric, longest):
    module, v = awake(FastRPB(3, longest, symmetric=symmetric, causal=True)), draw(2, length, 3, 4)
    state, steps = module.initial_state(2), []
    for t in range(length):
        y, state = module.step(v[:, t], state)
        steps.append(y)
        assert state.shape == (2, longest - 1, 3, 4)
    torch.testing.assert_close(torch.stack(steps, 1), module(v), rtol=0, atol=1e-12)


def test_step_in_bfloat16_keeps_its_window_in_float32():
    module = FastRPB(2, 4, causal=True)
    y, state = module.step(torch.randn(1, 2, 3).bfloat16(), module.initial_state(1))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


def test_the_lags_pass_through_a_window():
    module, seen = awake(FastRPB(2, 5, symmetric=True)), []
    module.lags_seen.register_forward_hook(lambda m, args, out: seen.append(out))
    module(draw(1, 4, 2, 3))
    torch.testing.assert_close(seen[0], module.lags(4))


def test_every_parameter_learns():
    """An echo after three steps is found by gradient descent, through the FFT."""
    module = FastRPB(1, 24).double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    for update in range(150):
        v = draw(8, 24, 1, 1, seed=update)
        wanted = F.pad(v, (0, 0, 0, 0, 3, 0))[:, :24]
        loss = (module(v) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05 and module.lags(24)[0].argmax() == 23 + 3


# ---- wrong input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: toeplitz_matrix(torch.ones(3, 4)), ValueError, "odd number of offsets"),
        (lambda: toeplitz_product(torch.ones(2, 9), torch.ones(1, 2, 5, 3)), ValueError, r"= \(5, 3\).*\(2, 9\)"),
        (lambda: toeplitz_product(torch.ones(2, 8), torch.ones(1, 5, 2, 3)), ValueError, r"= \(2, 9\).*got \(2, 8\)"),
        (lambda: toeplitz_product(torch.ones(2, 9), torch.ones(5, 2, 3)), ValueError, r"v.transpose\(1, 2\)"),
        (lambda: toeplitz_product(torch.ones(2, 0), torch.ones(1, 0, 2, 3)), ValueError, "at least one position"),
        (lambda: toeplitz_product(torch.ones(2, 9), torch.ones(1, 5, 2, 3).long()), TypeError, "floating point"),
        (lambda: toeplitz_product_2d(torch.ones(2, 9), torch.ones(1, 5, 4, 2, 3)), ValueError, "lags_y"),
        (lambda: toeplitz_product_2d(torch.ones(2, 7), torch.ones(1, 5, 5, 2, 3)), ValueError, r"\(2, 9\)"),
        (lambda: toeplitz_product_2d_full(torch.ones(2, 9, 9), torch.ones(1, 5, 4, 2, 3)), ValueError, r"\(2, 9, 7\)"),
        (lambda: FastRPB(0, 4), ValueError, "heads >= 1"),
        (lambda: FastRPB(2, 0), ValueError, "max_length >= 1"),
        (lambda: FastRPB(2, 4, layout="grid"), ValueError, "sequence, separable, full; got 'grid'"),
        (lambda: FastRPB(2, 4, layout="full", causal=True), ValueError, "Only a sequence has a past"),
        (lambda: FastRPB(2, 4)(torch.ones(1, 3, 4)), ValueError, r"\(\*, \*, 2, \*\)"),
        (lambda: FastRPB(2, 4)(torch.ones(1, 3, 5, 4)), ValueError, r"\(\*, \*, 2, \*\)"),
        (lambda: FastRPB(2, 4)(torch.ones(1, 3, 2, 4), torch.ones(1, 3)), ValueError, "mask must be bool"),
        (lambda: FastRPB(2, 4)(torch.ones(1, 4, 2, 4), shape=(2, 2)), ValueError, "has no shape"),
        (lambda: FastRPB(2, 4, layout="full")(torch.ones(1, 6, 2, 4)), ValueError, r"X \* Y = length = 6"),
        (lambda: FastRPB(2, 4).initial_state(1), ValueError, "cannot stream"),
        (lambda: FastRPB(2, 4).step(torch.ones(1, 2, 3), torch.ones(1, 3, 2, 3)), ValueError, "cannot stream"),
        (lambda: FastRPB(2, 4, causal=True).step(torch.ones(1, 1, 2, 3), torch.ones(1)), ValueError, "one time step"),
        (
            lambda: FastRPB(2, 4, causal=True).step(torch.ones(1, 2, 3), torch.ones(1, 4, 2, 3)),
            ValueError,
            "state must",
        ),
    ],
)
def test_wrong_input_is_refused_in_words(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


# ---- the authors' numbers, and dense oracles -----------------------------------------------------------------


def close(got, array):
    torch.testing.assert_close(got, torch.from_numpy(array), rtol=0, atol=1e-9)


CASES = [
    (kind, bos, eos, length) for kind in ("full", "symmetric") for bos in (0, 1) for eos in (0, 1) for length in (9, 6)
]


@pytest.mark.parametrize(("kind", "bos", "eos", "length"), CASES)
def test_authors_values(kind, bos, eos, length):
    """Their begin and end tokens are left out of the sum and get 0: that is what slicing does."""
    arrays = golden.load("rpb_1d")
    case = {key: arrays[f"{kind}_bos{bos}_eos{eos}_L{length}_{key}"] for key in ("w", "lags", "v", "y")}
    lags, v = torch.from_numpy(case["lags"]), torch.from_numpy(case["v"])
    core = v[:, bos : bos + length]
    y = torch.zeros_like(v)
    y[:, bos : bos + length] = toeplitz_product(lags, core)
    close(y, case["y"])

    module = FastRPB(3, 9, symmetric=kind == "symmetric").double()
    w = torch.from_numpy(case["w"])[0]
    with torch.no_grad():
        # their full vector holds offset m - 9 at index m, and offset 8 at index 0
        module.weight.copy_(w if kind == "symmetric" else w.roll(-1, -1))
    ours = module.lags(length)
    if kind == "full" and length < 9:  # for a shorter input they read offset L-1 from the weight of offset -L
        torch.testing.assert_close(ours[:, :-1], lags[:, :-1])
        torch.testing.assert_close(lags[:, -1], module.lags(9)[:, 8 - length])
    else:
        torch.testing.assert_close(ours, lags)
        close(module(core), case["y"][:, bos : bos + length])


def test_oracle_values_and_gradients():
    arrays = golden.load("rpb_oracles")
    lags, v = (torch.from_numpy(arrays[key]).requires_grad_() for key in ("lags", "v"))
    y = toeplitz_product(lags, v)
    close(y, arrays["y_bidirectional"])
    close(toeplitz_product(lags, v, causal=True), arrays["y_causal"])
    (y * torch.from_numpy(arrays["cotangent"])).sum().backward()
    close(lags.grad, arrays["grad_lags"])
    close(v.grad, arrays["grad_v"])


def test_oracle_images():
    arrays = golden.load("rpb_oracles")
    lags, rows, columns, v = (torch.from_numpy(arrays[key]) for key in ("lags2d", "lags_x", "lags_y", "v2d"))
    close(toeplitz_product_2d_full(lags, v), arrays["y2d_bttb"])
    close(toeplitz_product_2d(rows, v, columns), arrays["y2d_separable_two_vectors"])


def test_added_to_linear_attention():
    """Attention written out here: features elu + 1 or exp, sums over keys, no epsilon; then the bias on top."""
    arrays = golden.load("rpb_oracles")
    q, k, v = (torch.from_numpy(arrays[key]) for key in ("q", "k", "v"))
    module = FastRPB(2, 12).double()
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(arrays["lags"]))

    def attention(feature):
        scores = torch.einsum("bihd,bjhd->bhij", feature(q), feature(k))
        return torch.einsum("bhij,bjhd->bihd", scores / scores.sum(-1, keepdim=True), v)

    close(attention(torch.exp), arrays["y_sikf"])
    close(attention(torch.exp) + module(v), arrays["y_sikf_plus_bias"])
    close(attention(lambda x: F.elu(x) + 1) + module(v), arrays["y_elu_plus_bias"])
