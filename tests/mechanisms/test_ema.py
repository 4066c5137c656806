import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from longseq_tutorial.mechanisms.ema import DampedEMA, decay_powers, ema_blocks, ema_fft, ema_kernel, ema_recurrent
from longseq_tutorial.mechanisms.fft import long_convolution_direct
from tests import golden_numbers as golden

ODD_LENGTHS = [1, 2, 3, 17, 64, 101]


def coefficients(dim, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    alpha, delta = torch.rand(2, dim, n, dtype=torch.float64, generator=g) * 0.98 + 0.01
    beta, eta = torch.randn(2, dim, n, dtype=torch.float64, generator=g)
    return alpha, delta, beta, eta


def module_of(arrays, bidirectional, truncation=None):
    """The authors' parameters in our module; their delta is the paper's alpha, their alpha the paper's delta."""
    dim, n = arrays["param.omega"].size, arrays["param.delta"].shape[1]
    ema = DampedEMA(dim, n, bidirectional=bidirectional, truncation=truncation).double()
    names = {"alpha_logit": "delta", "delta_logit": "alpha", "beta": "beta", "eta": "gamma", "omega": "omega"}
    with torch.no_grad():
        for ours, theirs in names.items():
            p = getattr(ema, ours)
            p.copy_(torch.from_numpy(arrays[f"param.{theirs}"]).reshape(p.shape))
    return ema, names


# ---- slow form = fast form ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ODD_LENGTHS)
@pytest.mark.parametrize("n", [1, 4])
def test_recurrence_equals_fft_and_blocks_with_gradients(length, n):
    x = torch.randn(2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for form in (lambda *a: ema_recurrent(*a)[0], ema_fft, lambda *a: ema_blocks(*a)[0]):
        inputs = [t.clone().requires_grad_() for t in (x, *coefficients(3, n))]
        y = form(*inputs)
        results.append([y, *torch.autograd.grad((y * weight).sum(), inputs)])
    for slow, fft, blocks in zip(*results, strict=True):
        torch.testing.assert_close(fft, slow, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(blocks, slow, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", [ema_recurrent, ema_blocks])
@settings(deadline=None, max_examples=40)
@given(first=st.integers(1, 150), second=st.integers(0, 150), seed=st.integers(0, 10_000))
def test_state_carries_over_any_cut(form, first, second, seed):
    x = torch.randn(1, first + second, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    c = coefficients(2, 3, seed)
    whole, last = ema_recurrent(x, *c)
    y1, state = form(x[:, :first], *c)
    if second:
        y2, state = form(x[:, first:], *c, state=state)
        y1 = torch.cat([y1, y2], dim=1)
    torch.testing.assert_close(y1, whole)
    torch.testing.assert_close(state, last)


def test_kernel_is_the_response_to_an_impulse():
    c = coefficients(3, 4)
    x = torch.zeros(1, 30, 3, dtype=torch.float64)
    x[:, 0] = 1
    torch.testing.assert_close(ema_kernel(*c, 30), ema_recurrent(x, *c)[0][0].T)


def test_constant_input_settles_at_the_sum_of_the_kernel():
    """sum of alpha*beta*eta*q**t over all t = sum of beta*eta/delta."""
    alpha, delta, beta, eta = coefficients(2, 3)
    y, _ = ema_recurrent(torch.ones(1, 3000, 2, dtype=torch.float64), alpha, delta, beta, eta)
    torch.testing.assert_close(y[0, -1], (beta * eta / delta).sum(-1), rtol=1e-6, atol=1e-6)


# ---- numerical traps -----------------------------------------------------------------------------------------


def test_a_decay_saturated_to_zero_gives_no_nan_at_lag_0():
    """Both logits beyond 17: in single precision 1 - alpha*delta is exactly 0, and 0**0 has to be 1."""
    ema = DampedEMA(2, 3)
    with torch.no_grad():
        ema.alpha_logit.fill_(40.0)
        ema.delta_logit.fill_(40.0)
    kernel = ema.kernel(9)
    kernel.sum().backward()
    _, _, beta, eta = ema.coefficients()
    torch.testing.assert_close(kernel[:, 0], (beta * eta).sum(-1))
    assert kernel[:, 1:].abs().max() < 1e-5
    assert all(p.grad is None or p.grad.isfinite().all() for p in ema.parameters())


def test_slow_decays_keep_their_half_life_in_single_precision():
    alpha = torch.full((1, 1), 1e-4)
    delta = torch.full((1, 1), 1e-3)  # q = 1 - 1e-7, which rounds to 1 - 1.2e-7
    steps = torch.tensor([1_000_000])
    want = (1 - 1e-7) ** 1_000_000
    assert abs(decay_powers(alpha, delta, steps).item() - want) < 1e-5


def test_no_denormal_numbers_in_powers_or_kernel():
    alpha = torch.full((1, 2), 0.9)
    delta = torch.full((1, 2), 0.9)
    powers = decay_powers(alpha, delta, torch.arange(400))
    kernel = ema_kernel(alpha, delta, torch.ones(1, 2), torch.ones(1, 2), 400)
    tiny = torch.finfo(torch.float32).tiny
    for values in (powers, kernel):
        assert ((values == 0) | (values.abs() >= tiny)).all()


def test_two_level_kernel_equals_every_power_written_out():
    alpha, delta, beta, eta = coefficients(5, 7)
    for length in (1, 2, 3, 10, 1000, 1025):
        q = 1 - alpha * delta
        want = torch.stack([(alpha * beta * eta * q**t).sum(-1) for t in range(length)], dim=-1)
        torch.testing.assert_close(ema_kernel(alpha, delta, beta, eta, length), want, rtol=1e-10, atol=1e-12)


def test_float32_inside_autocast():
    ema = DampedEMA(4)
    x = torch.randn(1, 300, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel, y = ema.kernel(300), ema(x)
    assert kernel.dtype == torch.float32
    want = ema.double()(x.double())
    assert (y - want).abs().max() < 1e-4 * want.abs().max()


def test_bfloat16_module_stays_close():
    ema = DampedEMA(4, truncation=64)
    want = ema(x := torch.randn(2, 100, 4))
    got = ema.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got - want).norm() / want.norm() < 1e-2


# ---- the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_step_equals_parallel(length):
    ema = DampedEMA(3, 5).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    state, steps = ema.initial_state(2), []
    for t in range(length):
        y, state = ema.step(x[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), ema(x), rtol=0, atol=1e-12)
    assert state.shape == (2, 3, 5)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", ODD_LENGTHS)
@pytest.mark.parametrize("truncation", [None, 3, 1000])
def test_module_equals_the_convolution_with_its_kernel(bidirectional, length, truncation):
    """A whole EMA runs in blocks, a truncated one through the FFT; one that cuts nothing off counts as whole."""
    ema = DampedEMA(3, 5, bidirectional, truncation).double()
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 3, dtype=torch.float64)
    kernel = ema.kernel(length)
    direct = long_convolution_direct(x, kernel[:3], reverse_kernel=kernel[3:] if bidirectional else None)
    results = []
    for y in (ema(x), direct + ema.omega * x):
        results.append([y, *torch.autograd.grad((y * weight).sum(), [x, *ema.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_future_never_touches_the_past_not_even_by_rounding():
    ema, x = DampedEMA(4), torch.randn(1, 200, 4)
    want = ema(x)[:, :131].clone()
    x[:, 131:] = 1e6
    assert torch.equal(ema(x)[:, :131], want)


def test_bidirectional_is_symmetric():
    """Swap the two halves of the parameters and turn time round: the output turns round."""
    ema = DampedEMA(3, 4, bidirectional=True).double()
    x = torch.randn(2, 19, 3, dtype=torch.float64)
    want = ema(x).flip(1)
    with torch.no_grad():
        for p in (ema.alpha_logit, ema.delta_logit, ema.beta, ema.eta):
            p.copy_(p.roll(3, 0))
    torch.testing.assert_close(ema(x.flip(1)), want)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("left", [0, 3])
def test_padding_never_touches_real_positions(bidirectional, left):
    ema = DampedEMA(3, 4, bidirectional=bidirectional).double()
    x = torch.randn(1, 11, 3, dtype=torch.float64)
    padded = torch.full((1, 20, 3), torch.nan, dtype=torch.float64)
    padded[:, left : left + 11] = x
    mask = torch.zeros(1, 20, dtype=torch.bool)
    mask[:, left : left + 11] = True
    torch.testing.assert_close(ema(padded, mask)[:, left : left + 11], ema(x))


def test_truncation_cuts_the_kernel_and_forbids_streaming():
    ema = DampedEMA(2, 3, truncation=8).double()
    assert ema.kernel(50).shape == (2, 8)
    assert ema.kernel(5).shape == (2, 5)
    x = torch.zeros(1, 50, 2, dtype=torch.float64)
    x[:, 0] = 1
    assert ema(x)[:, 8:].abs().max() < 1e-12
    with pytest.raises(ValueError, match="truncation=None"):
        ema.initial_state(1)


def test_no_stale_kernel_after_parameters_change_in_eval_mode():
    """The authors' module caches its kernel in eval mode; ours has nothing to go stale, and backward works twice."""
    ema = DampedEMA(2, 3).eval()
    x = torch.randn(1, 9, 2)
    before = ema(x)
    for _ in range(2):
        ema(x).sum().backward()
    with torch.no_grad():
        ema.eta.mul_(-1)
    after = ema(x)
    torch.testing.assert_close(after - ema.omega * x, -(before - ema.omega * x), rtol=1e-4, atol=1e-5)


def test_initial_half_lives_are_a_few_steps():
    torch.manual_seed(0)
    alpha, delta, beta, _ = DampedEMA(64, 16).coefficients()
    half_life = math.log(0.5) / torch.log(1 - alpha * delta)
    assert 1 < half_life.min() and half_life.max() < 8
    assert beta[:, 0].mean() > 0.9 and beta[:, 1].mean() < -0.9


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: DampedEMA(0), "dim >= 1"),
        (lambda: DampedEMA(3, truncation=0), "truncation >= 1"),
        (lambda: DampedEMA(3)(torch.ones(2, 5, 4)), r"dim\) = \(\*, \*, 3\)"),
        (lambda: DampedEMA(3)(torch.ones(2, 5, 3), torch.ones(2, 5)), "mask must be bool"),
        (lambda: DampedEMA(3).step(torch.ones(2, 1, 3), None), "one time step"),
        (lambda: DampedEMA(3, bidirectional=True).initial_state(1), "cannot stream"),
        (lambda: ema_fft(torch.ones(1, 4, 2), *[torch.ones(3, 2)] * 4), "dim = 2"),
        (lambda: ema_kernel(*[torch.ones(3, 2)] * 4, 0), "length >= 1"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- the authors' numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["unidirectional", "bidirectional"])
def test_authors_values_and_gradients(direction):
    arrays = golden.load(f"mega_ema_{direction}")
    ema, names = module_of(arrays, direction == "bidirectional")
    x = golden.batch_first(arrays["x"]).requires_grad_()
    y = F.silu(ema(x))
    torch.testing.assert_close(y, golden.batch_first(arrays["y"]), rtol=0, atol=1e-9)
    (y * golden.batch_first(arrays["cotangent"])).sum().backward()
    torch.testing.assert_close(x.grad, golden.batch_first(arrays["grad_x"]), rtol=0, atol=1e-9)
    for ours, theirs in names.items():
        grad = getattr(ema, ours).grad
        want = torch.from_numpy(arrays[f"grad.{theirs}"]).reshape(grad.shape)
        torch.testing.assert_close(grad, want, rtol=0, atol=1e-9, msg=f"gradient of {ours}")


@pytest.mark.parametrize("direction", ["unidirectional", "bidirectional"])
def test_authors_kernel_padding_and_truncation(direction):
    arrays = golden.load(f"mega_ema_{direction}")
    two = direction == "bidirectional"
    ema, _ = module_of(arrays, two)
    x = golden.batch_first(arrays["x"])
    np.testing.assert_allclose(ema.kernel(33).detach().numpy(), arrays["kernel"], rtol=0, atol=1e-9)
    padded = F.silu(ema(x, ~torch.from_numpy(arrays["padding_mask"])))
    torch.testing.assert_close(padded, golden.batch_first(arrays["y_padded"]), rtol=0, atol=1e-9)
    short, _ = module_of(arrays, two, truncation=8)
    torch.testing.assert_close(F.silu(short(x)), golden.batch_first(arrays["y_trunc8"]), rtol=0, atol=1e-9)


def test_authors_states_and_stepwise_outputs():
    arrays = golden.load("mega_ema_unidirectional")
    ema, _ = module_of(arrays, False)
    x = golden.batch_first(arrays["x"])
    state, steps, states = ema.initial_state(2), [], {}
    for t in range(33):
        y, state = ema.step(x[:, t], state)
        steps.append(F.silu(y))
        states[t + 1] = state
    torch.testing.assert_close(torch.stack(steps, 1), golden.batch_first(arrays["y_recurrent"]), rtol=0, atol=1e-9)
    for t, key in ((20, "state_after_20"), (33, "state_final")):
        np.testing.assert_allclose(states[t].detach().numpy(), arrays[key], rtol=0, atol=1e-9)
