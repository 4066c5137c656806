"""Chapter 01's checks take the solution, see the stub, and name the cause of every plausible mistake."""

import math

import pytest
import torch

from longseq_tutorial.classroom.checks.ema import (
    check_causal_convolution,
    check_ema_block,
    check_ema_kernel,
    check_ema_step,
    check_half_life,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms.ema import ema_fft, ema_kernel, ema_recurrent
from longseq_tutorial.mechanisms.fft import long_convolution

# ---- the solutions, as a reader may write them -------------------------------------------------------------------


def half_life(alpha, delta):
    return math.log(0.5) / torch.log1p(-alpha * delta)


def ema_step(x_t, alpha, delta, beta, eta, state):
    state = (1 - alpha * delta) * state + alpha * beta * x_t[..., None]
    return (eta * state).sum(-1), state


def kernel(alpha, delta, beta, eta, length):
    return ((eta * alpha * beta)[..., None] * (1 - alpha * delta)[..., None] ** torch.arange(length)).sum(1)


def convolution(u, kernel):
    size = 2 * u.shape[1]
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size).T
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, : u.shape[1]]


def block(x, alpha, delta, beta, eta, state):
    length, t = x.shape[1], torch.arange(x.shape[1])
    q = (1 - alpha * delta)[..., None]
    y = convolution(x, kernel(alpha, delta, beta, eta, length))
    y = y + torch.einsum("bdn,dnt->btd", state, eta[..., None] * q ** (t + 1))
    new = torch.einsum("btd,dnt->bdn", x, (alpha * beta)[..., None] * q ** (length - 1 - t))
    return y, q[..., 0] ** length * state + new


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_half_life: half_life,
    check_ema_step: ema_step,
    check_ema_kernel: kernel,
    check_causal_convolution: convolution,
    check_ema_block: block,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    assert_accepts(check_half_life, lambda a, d: math.log(2) / -torch.log1p(-a * d))
    assert_accepts(
        check_ema_kernel, lambda a, d, b, e, k: ema_kernel(a, d, b, e, k) if a.max() < 1 else kernel(a, d, b, e, k)
    )
    assert_accepts(check_causal_convolution, long_convolution)


def odd_size(u, kernel):
    size = 2 * u.shape[1] - 1
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size).T
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, : u.shape[1]]


def test_the_smallest_padding_is_accepted():
    assert_accepts(check_causal_convolution, odd_size)


# ---- wrong answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda a, d: math.log(0.5) / torch.log(1 - a * d), ["log1p"]),
        (lambda a, d: math.log(0.5) / torch.log1p(-a), ["delta is missing"]),
        (lambda a, d: math.log(0.5) / torch.log1p(-d), ["alpha is missing"]),
        (lambda a, d: math.log(0.5) / torch.log(a * d), ["1 - alpha*delta"]),
        (lambda a, d: -1 / torch.log1p(-a * d), ["1/e"]),
        (lambda a, d: math.log(2) / (a * d), ["approximation"]),
        (lambda a, d: math.log(2) / torch.log1p(-a * d), ["sign"]),
        (lambda a, d: torch.log1p(-a * d) / math.log(0.5), ["upside down"]),
        (lambda a, d: (math.log(0.5) / torch.log1p(-a * d)).ceil(), ["values are wrong"]),
        (lambda a, d: float((math.log(0.5) / torch.log1p(-a * d)).mean()), ["float"]),
    ],
)
def test_half_life_mistakes(wrong, words):
    assert_rejects(check_half_life, wrong, *words)


def step_with(q=lambda a, d: 1 - a * d, push=lambda a, d, b: a * b, read=None):
    def step(x_t, alpha, delta, beta, eta, state):
        new = q(alpha, delta) * state + push(alpha, delta, beta) * x_t[..., None]
        return (read or (lambda eta, old, new: (eta * new).sum(-1), new))[0](eta, state, new), new

    return step


def in_place(x_t, alpha, delta, beta, eta, state):
    state *= 1 - alpha * delta
    state += alpha * beta * x_t[..., None]
    return (eta * state).sum(-1), state


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (step_with(read=[lambda eta, old, new: (eta * old).sum(-1)]), ["old state"]),
        (lambda *a: (ema_step(*a)[0], a[5]), ["old state is returned"]),
        (step_with(push=lambda a, d, b: d * b), ["delta in place of alpha"]),
        (step_with(push=lambda a, d, b: b), ["alpha is missing in the weight"]),
        (step_with(push=lambda a, d, b: a), ["beta is missing"]),
        (step_with(q=lambda a, d: 1 - a), ["delta is missing in the decay"]),
        (step_with(q=lambda a, d: a * d), ["1 - alpha*delta"]),
        (step_with(read=[lambda eta, old, new: new.sum(-1)]), ["eta is missing"]),
        (step_with(read=[lambda eta, old, new: (eta * new).mean(-1)]), ["scale", "1/the size of axis 1"]),
        (step_with(read=[lambda eta, old, new: (eta * new).sum(-1) / eta.shape[1] ** 0.5]), ["1/sqrt("]),
        (step_with(read=[lambda eta, old, new: eta * new]), ["shape"]),
        (lambda *a: ema_step(*a)[::-1], ["swapped"]),
        (lambda *a: ema_step(*a)[0], ["2 results"]),
        (lambda *a: ema_step(*(t.detach() for t in a)), ["gradient"]),
        (in_place, ["in place"]),
    ],
)
def test_step_mistakes(wrong, words):
    assert_rejects(check_ema_step, wrong, *words)


def kernel_with(q=lambda a, d: 1 - a * d, weight=lambda a, d, b, e: e * a * b, lags=torch.arange):
    return lambda a, d, b, e, k: (weight(a, d, b, e)[..., None] * q(a, d)[..., None] ** lags(k)).sum(1)


def kernel_by_logarithms(a, d, b, e, k):
    return ((e * a * b)[..., None] * torch.exp(torch.arange(k) * torch.log(1 - a * d)[..., None])).sum(1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda *a: kernel(*a).flip(-1), ["reversed in time"]),
        (kernel_with(lags=lambda k: torch.arange(1, k + 1)), ["off-by-one"]),
        (kernel_with(weight=lambda a, d, b, e: a * b), ["eta is missing"]),
        (kernel_with(weight=lambda a, d, b, e: e * b), ["alpha is missing"]),
        (kernel_with(weight=lambda a, d, b, e: e * a), ["beta is missing"]),
        (kernel_with(weight=lambda a, d, b, e: e * d * b), ["delta and alpha are swapped"]),
        (kernel_with(q=lambda a, d: 1 - a), ["delta is missing in the decay"]),
        (kernel_with(q=lambda a, d: a * d), ["1 - alpha*delta"]),
        (lambda *a: kernel(*a) / math.sqrt(a[0].shape[1]), ["1/sqrt(n)"]),
        (lambda *a: kernel(*a) / a[0].shape[1], ["mean"]),
        (lambda *a: kernel(*a).T, ["shape"]),
        (kernel_with(lags=lambda k: torch.arange(k + 1)), ["shape"]),
        (lambda *a: kernel(*(t.float() if torch.is_tensor(t) else t for t in a)), ["dtype"]),
        (kernel_by_logarithms, ["NaN", "q**0 is 1"]),
    ],
)
def test_kernel_mistakes(wrong, words):
    assert_rejects(check_ema_kernel, wrong, *words)


def convolution_with(size=lambda n: 2 * n, keep=lambda y, n: y[:, :n], flip=False, conjugate=False, n_back=True):
    def convolve(u, kernel):
        length = u.shape[1]
        points = size(length)
        k = torch.fft.rfft(kernel.flip(-1) if flip else kernel, n=points).T
        spectrum = torch.fft.rfft(u, n=points, dim=1) * (k.conj() if conjugate else k)
        return keep(torch.fft.irfft(spectrum, n=points if n_back else None, dim=1), length)

    return convolve


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (convolution_with(size=lambda n: n), ["circular instead of linear"]),
        (convolution_with(size=lambda n: n + n // 2), ["too little padding"]),
        (convolution_with(keep=lambda y, n: y[:, -n:]), ["last L samples"]),
        (convolution_with(flip=True), ["reversed in time"]),
        (convolution_with(conjugate=True), ["future leaks into the past"]),
        (lambda u, k: convolution(u.flip(1), k).flip(1), ["future leaks into the past"]),
        (convolution_with(size=lambda n: 2 * n - 1, n_back=False), ["without n"]),
        (lambda u, k: u * k.T, ["transforms are missing"]),
        (convolution_with(keep=lambda y, n: y), ["shape"]),
        (convolution_with(keep=lambda y, n: y[:, 1 : n + 1]), ["off-by-one", "samples 1 to L"]),
        (
            lambda u, k: torch.fft.ifft(
                torch.fft.fft(u, 2 * u.shape[1], 1) * torch.fft.fft(k, 2 * u.shape[1]).T, dim=1
            )[:, : u.shape[1]],
            ["dtype"],
        ),
        (lambda u, k: torch.fft.irfft(torch.fft.rfft(u, dim=1) * torch.fft.rfft(k), dim=1), ["shape"]),
        (lambda u, k: -convolution(u, k), ["sign"]),
    ],
)
def test_convolution_mistakes(wrong, words):
    assert_rejects(check_causal_convolution, wrong, *words)


def block_with(
    heard=lambda t: t + 1, kept=lambda n: n, aged=lambda n, t: n - 1 - t, pull=lambda e: e, push=lambda a, b: a * b
):
    def go(x, alpha, delta, beta, eta, state):
        length, t = x.shape[1], torch.arange(x.shape[1])
        q = (1 - alpha * delta)[..., None]
        y = ema_fft(x, alpha, delta, beta, eta)
        if heard is not None:
            y = y + torch.einsum("bdn,dnt->btd", state, pull(eta)[..., None] * q ** heard(t))
        new = torch.einsum("btd,dnt->bdn", x, push(alpha, beta)[..., None] * q ** aged(length, t))
        return y, new if kept is None else q[..., 0] ** kept(length) * state + new

    return go


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (block_with(heard=None), ["not heard in y"]),
        (block_with(kept=None), ["not carried on"]),
        (block_with(heard=None, kept=None), ["nothing of the old state"]),
        (block_with(heard=lambda t: t), ["q**t instead of q**(t+1)"]),
        (block_with(kept=lambda n: n - 1), ["off-by-one"]),
        (block_with(kept=lambda n: n + 1), ["once too often"]),
        (block_with(aged=lambda n, t: t), ["in reverse"]),
        (block_with(aged=lambda n, t: n - t), ["off-by-one in the inputs' powers"]),
        (block_with(pull=torch.ones_like), ["eta is missing"]),
        (block_with(push=lambda a, b: b), ["alpha is missing"]),
        (block_with(push=lambda a, b: a), ["beta is missing"]),
        (lambda *a: block(*a)[0], ["2 results"]),
        (lambda *a: (ema_recurrent(*a)[0], a[5]), ["result 2 of 2"]),
        (lambda *a: tuple(r.double() for r in block(*(t.float() for t in a))), ["float32"]),
    ],
)
def test_block_mistakes(wrong, words):
    assert_rejects(check_ema_block, wrong, *words)


def test_a_block_with_a_loop_over_time_is_seen():
    assert_rejects(check_ema_block, ema_recurrent, "values are right", "loop over time")
