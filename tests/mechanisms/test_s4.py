import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from longseq_tutorial.mechanisms import s4
from longseq_tutorial.mechanisms.fft import long_convolution
from longseq_tutorial.mechanisms.s4 import (
    KINDS,
    METHODS,
    S4,
    S4D,
    c_from_tilde,
    discretize,
    dplr_dense,
    hippo_legs,
    hippo_legs_nplr,
    s4_kernel,
    s4_kernel_dense,
    s4_recurrent,
    s4_tables,
    s4d_init,
    s4d_kernel,
    s4d_kernel_vandermonde,
    s4d_recurrent,
    tilde_from_c,
)
from tests import golden_numbers as golden

ODD_LENGTHS = [1, 2, 3, 17, 64, 101]
MODULES = {
    "s4d": lambda dim, state=8, **o: S4D(dim, state, **o),
    "s4d bilinear": lambda dim, state=8, **o: S4D(dim, state, "inv", "bilinear", **o),
    "s4": lambda dim, state=8, **o: S4(dim, state, **o),
}


def module(name, dim=3, **options):
    """In double precision, with a dt large enough that a few steps matter."""
    torch.manual_seed(0)
    return MODULES[name](dim, **{"dt_min": 0.02, "dt_max": 0.3, **options}).double()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def diagonal(dim=3, half=4, seed=0):
    """A (stable), B, C, dt."""
    A = torch.complex(-draw(dim, half, seed=seed).exp(), 4 * draw(dim, half, seed=seed + 1))
    B, C = (draw(dim, half, seed=seed + i, dtype=torch.complex128) for i in (2, 3))
    return A, B, C, draw(dim, seed=seed + 4).mul(0.5).exp() / 10


def dplr(dim=2, half=3, seed=0):
    """Lambda, P, B, C, dt."""
    A, B, C, dt = diagonal(dim, half, seed)
    return A, draw(dim, half, seed=seed + 9, dtype=torch.complex128), B, C, dt


def knock(length, dim):
    u = torch.zeros(1, length, dim, dtype=torch.float64)
    u[:, 0] = 1
    return u


def values_and_gradients(form, tensors):
    inputs = [t.clone().requires_grad_() for t in tensors]
    y = form(*inputs)
    return [y, *torch.autograd.grad((y * draw(*y.shape, seed=5)).sum(), inputs)]


def assert_same(left, right, tolerance=1e-10):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(b.detach().abs().max())))


class Largest(TorchDispatchMode):
    """Sees every tensor that comes into being, forward and backward, and keeps the size of the largest."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


# ---- HiPPO and initial values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("N", [2, 4, 10, 64])
def test_legs_is_normal_plus_rank_one(N):
    A, b = hippo_legs(N)
    Lambda, P, B, V = hippo_legs_nplr(N)
    normal = 2 * (V * Lambda @ V.mH).real
    p = 2 * (V @ P).real
    torch.testing.assert_close(normal - torch.outer(p, p), A, rtol=0, atol=1e-10)
    torch.testing.assert_close(2 * (V @ B).real, b, rtol=0, atol=1e-10)
    skew = normal + torch.eye(N) / 2
    assert (skew + skew.T).abs().max() < 1e-10
    full = torch.cat([V, V.conj()], 1)
    torch.testing.assert_close(full.mH @ full, torch.eye(N, dtype=V.dtype), rtol=0, atol=1e-10)
    assert (Lambda.imag < 0).all() and (Lambda.imag.diff() > 0).all()
    assert (P.real > 0).all() and P.imag.abs().max() < 1e-12 and B.imag.abs().max() < 1e-10


def test_the_authors_hippo():
    numbers = {k: torch.from_numpy(v) for k, v in golden.load("s4_hippo_legs_nplr").items()}
    for N in (4, 8, 16, 64):
        A, b = hippo_legs(N)
        Lambda, P, B, V = hippo_legs_nplr(N)
        for ours, theirs in (
            (A, "A"),
            (b, "B"),
            (Lambda, "Lambda_half"),
            (B.abs(), "absB_half"),
            (P.abs(), "absP_half"),
            (P.conj() * B, "conjP_B_half"),
        ):
            torch.testing.assert_close(ours, numbers[f"{theirs}_{N}"], rtol=0, atol=1e-9, msg=f"{theirs} {N}")
        theirs = numbers[f"V_half_{N}"]  # their phases are arbitrary: |overlap| of each pair of columns is 1
        torch.testing.assert_close((V.conj() * theirs).sum(0).abs(), torch.ones(N // 2, dtype=torch.float64))


def test_the_authors_initial_values():
    numbers = {k: torch.from_numpy(v) for k, v in golden.load("s4_s4d_init_N64").items()}
    for kind in KINDS:
        A, B = s4d_init(kind, 64)
        # their "legs" went through single precision
        torch.testing.assert_close(A, numbers[f"A_{kind}"], rtol=1e-6 if kind == "legs" else 0, atol=1e-9)
        if kind != "legs":
            assert (B == 1).all()
    B, theirs = s4d_init("legs", 64)[1], numbers["B_legs"].abs().double()
    torch.testing.assert_close(B.abs(), theirs, rtol=0, atol=2e-4)  # modulus clipped, not the imaginary part
    torch.testing.assert_close(B.abs()[B.abs() < 1.9], theirs[B.abs() < 1.9], rtol=1e-5, atol=0)


# ---- sampled time ----------------------------------------------------------------------------------------------------


def test_zoh_is_exact_for_a_staircase_and_bilinear_close():
    """Against the matrix exponential of the system with its (constant) input as one more state."""
    A, B, _, dt = diagonal(1, 3)
    joint = torch.zeros(4, 4, dtype=torch.complex128)
    joint[:3, :3], joint[:3, 3] = torch.diag(A[0]), B[0]
    exact = torch.linalg.matrix_exp(dt[0] * joint)
    decay, push = discretize(A, B, dt)
    torch.testing.assert_close(torch.diag(decay[0]), exact[:3, :3])
    torch.testing.assert_close(push[0], exact[:3, 3])
    errors = []
    for shorter in (1, 2, 4):
        d = dt / shorter
        errors.append((discretize(A, B, d, "bilinear")[0] - discretize(A, B, d)[0]).abs().max())
    assert errors[0] > 7 * errors[1] > 49 * errors[2]  # third order in dt


@pytest.mark.parametrize("method", METHODS)
def test_what_decays_goes_on_decaying_and_what_stands_still_adds_up(method):
    A, B, _, dt = diagonal(4, 16)
    decay, _ = discretize(A, B, dt * 10, method)
    assert (decay.abs() < 1).all()
    decay, push = discretize(torch.zeros_like(A), B, dt, method)
    torch.testing.assert_close(decay, torch.ones_like(decay))
    torch.testing.assert_close(push, dt.unsqueeze(-1) * B)


# ---- S4D: slow forms = fast form -------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", ODD_LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_two_level_kernel_equals_vandermonde_with_gradients(length, method):
    fast = values_and_gradients(lambda *p: s4d_kernel(*p, length, method), diagonal())
    slow = values_and_gradients(lambda *p: s4d_kernel_vandermonde(*p, length, method), diagonal())
    assert_same(fast, slow)


@pytest.mark.parametrize("length", ODD_LENGTHS)
@pytest.mark.parametrize("method", METHODS)
def test_recurrence_equals_convolution_with_gradients(length, method):
    tensors = [draw(2, length, 3), *diagonal()]
    loop = values_and_gradients(lambda u, *p: s4d_recurrent(u, *p, discretization=method)[0], tensors)
    fast = values_and_gradients(lambda u, *p: long_convolution(u, s4d_kernel(*p, length, method)), tensors)
    assert_same(fast, loop)


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck_of_the_kernel(method):
    inputs = [t.requires_grad_() for t in diagonal(2, 2)]
    assert torch.autograd.gradcheck(lambda *p: s4d_kernel(*p, 7, method), inputs)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 10_000), st.sampled_from(["diagonal", "dplr"]))
def test_state_carries_over_any_cut(first, second, seed, which):
    u = draw(1, first + second, 2, seed=seed)
    system = diagonal(2, 3, seed) if which == "diagonal" else dplr(2, 3, seed)
    run = s4d_recurrent if which == "diagonal" else s4_recurrent
    whole, last = run(u, *system)
    y, state = run(u[:, :first], *system)
    if second:
        more, state = run(u[:, first:], *system, state=state)
        y = torch.cat([y, more], dim=1)
    torch.testing.assert_close(y, whole)
    torch.testing.assert_close(state, last)


def test_the_authors_s4d_kernels():
    numbers = {k: torch.from_numpy(v) for k, v in golden.load("s4_s4d_kernels").items()}
    cases = sorted(key[:-2] for key in numbers if key.endswith("_K"))
    assert len(cases) >= 4
    for case in cases:
        method = case.split("_")[1]
        system = [numbers[f"{case}_{name}"] for name in ("A", "B", "C", "dt")]
        u, want = numbers[f"{case}_u"].transpose(1, 2), numbers[f"{case}_y"].transpose(1, 2)
        kernel = s4d_kernel(*system, 40, method)
        torch.testing.assert_close(kernel, numbers[f"{case}_K"], rtol=0, atol=1e-9)
        torch.testing.assert_close(long_convolution(u, kernel), want, rtol=0, atol=1e-9)
        y, state = s4d_recurrent(u, *system, discretization=method)
        torch.testing.assert_close(y, want, rtol=0, atol=1e-9)
        torch.testing.assert_close(state, numbers[f"{case}_final_state"], rtol=0, atol=1e-9)


def test_dss_is_s4d_with_a_c_that_depends_on_the_length():
    """The diagonal state space with softmax (Gupta et al. 2022), written with our kernel; it counts each state once."""
    numbers = {k: torch.from_numpy(np.asarray(v)) for k, v in golden.load("s4_dss_softmax_kernel").items()}
    A, dt, length = numbers["A"], numbers["dt"], int(numbers["L"])
    x = torch.expm1(dt[:, None] * A * length) * A
    C = numbers["BC"] * A * x.conj() / (x * x.conj() + numbers["eps"])
    kernel = s4d_kernel(A, torch.ones_like(A), C / 2, dt, length)
    torch.testing.assert_close(kernel, numbers["K_oracle"], rtol=0, atol=1e-9)


# ---- S4D: numerical traps --------------------------------------------------------------------------------------------


def test_single_precision_keeps_the_phase_of_fast_modes_over_a_long_kernel():
    """exp(i 128 * 16384) turns by two million radians, of which single precision keeps no fraction."""
    A = torch.tensor([[-1e-3 - 1280.0j]])
    one, dt = torch.ones(1, 1, dtype=torch.complex64), torch.tensor([0.1])
    got = s4d_kernel(A, one, one, dt, 16384)
    wide = [p.to(torch.complex128) for p in (A, one, one)]
    want = s4d_kernel(*wide, dt.double(), 16384)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_a_decay_of_exactly_zero_gives_no_nan(method):
    """Bilinear at dt A = -2: Abar is 0, whose logarithm is not finite."""
    A = torch.tensor([[-20.0 + 0j, -1.0 + 1j]]).requires_grad_()
    one, dt = torch.ones(1, 2, dtype=torch.complex64), torch.tensor([0.1], requires_grad=True)
    kernel = s4d_kernel(A, one, one, dt, 9, method)
    kernel.sum().backward()
    assert A.grad.isfinite().all() and dt.grad.isfinite().all()
    torch.testing.assert_close(kernel, s4d_kernel_vandermonde(A, one, one, dt, 9, method))


def test_no_denormal_numbers_in_powers_or_kernel():
    A, one = torch.tensor([[-9.0 + 2j, -30.0 + 1j]]), torch.ones(1, 2, dtype=torch.complex64)
    tiny = torch.finfo(torch.float32).tiny
    tables = s4._powers(A.to(torch.complex128), torch.arange(400.0, dtype=torch.float64), torch.float32)
    assert tables[0].dtype == torch.float32
    sizes = tables[0].square() + tables[1].square()
    assert ((sizes == 0) | (sizes >= tiny)).all()
    kernel = s4d_kernel(A, one, one, torch.ones(1), 400)
    assert (kernel[:, 300:] == 0).all()


# ---- S4: slow forms = fast form --------------------------------------------------------------------------------------


def kernel_from_c(Lambda, P, B, C, dt, length, kernel):
    return kernel(Lambda, P, B, tilde_from_c(Lambda, P, C, dt, length), dt, length)


@pytest.mark.parametrize("length", [*ODD_LENGTHS, 16, 33])
@pytest.mark.parametrize("block", [1 << 19, 12])
def test_cauchy_equals_krylov_with_gradients(length, block, monkeypatch):
    monkeypatch.setattr(s4, "_BLOCK", block)  # 12: two frequencies at a time, so checkpoints are at work
    Lambda, P, B, C, dt = dplr()
    tensors = (Lambda, P, B, tilde_from_c(Lambda, P, C, dt, length), dt)
    fast = values_and_gradients(lambda *p: s4_kernel(*p, length), tensors)
    slow = values_and_gradients(lambda *p: s4_kernel_dense(*p, length), tensors)
    assert_same(fast, slow, 1e-9)


@pytest.mark.parametrize("length", [1, 2, 17, 64])
def test_recurrence_equals_cauchy_from_the_true_c_with_gradients(length):
    tensors = [draw(2, length, 2), *dplr()]
    loop = values_and_gradients(lambda u, *p: s4_recurrent(u, *p)[0], tensors)
    fast = values_and_gradients(lambda u, *p: long_convolution(u, kernel_from_c(*p, length, kernel=s4_kernel)), tensors)
    assert_same(fast, loop, 1e-9)


def test_gradcheck_of_the_cauchy_kernel(monkeypatch):
    monkeypatch.setattr(s4, "_BLOCK", 4)
    inputs = [t.requires_grad_() for t in dplr(1, 2)]
    assert torch.autograd.gradcheck(lambda *p: kernel_from_c(*p, 6, kernel=s4_kernel), inputs)


def test_tilde_is_what_its_definition_says_and_can_be_undone():
    Lambda, P, B, C, dt = dplr(3, 4)
    for length in (1, 2, 7, 50):
        tilde = tilde_from_c(Lambda, P, C, dt, length)
        dA, _ = dplr_dense(Lambda, P, B, dt)
        full = torch.cat([C, C.conj()], -1)
        want = full - torch.einsum("dn,dnm->dm", full, torch.linalg.matrix_power(dA, length))
        torch.testing.assert_close(tilde, want[:, :4])
        torch.testing.assert_close(c_from_tilde(Lambda, P, tilde, dt, length), C)
        # A C_tilde made for one length makes another kernel at another length.
        wrong = s4_kernel(Lambda, P, B, tilde, dt, length + 1)[:, :length]
        assert (wrong - kernel_from_c(Lambda, P, B, C, dt, length, kernel=s4_kernel)).abs().max() > 1e-3


@pytest.mark.parametrize("block", [1, 2, 5, 8, 13])
def test_tables_are_powers_of_the_dense_matrix_with_gradients(block):
    def as_defined(Lambda, P, B, C, dt):
        """Every power written out, over all N states; the state's numbers are real and imaginary parts in turn."""
        dA, dB = dplr_dense(Lambda, P, B, dt)
        powers = [torch.linalg.matrix_power(dA, n) for n in range(block + 1)]
        full = torch.cat([C, C.conj()], -1)
        half = C.shape[-1]
        reads = torch.stack(
            [torch.einsum("dn,dnm->dm", full, p)[:, :half] for p in powers[1:]], 1
        )  # of half the states
        writes = torch.stack([torch.einsum("dnm,dm->dn", p, dB)[:, :half] for p in powers[block - 1 :: -1]], -1)
        kernel = torch.stack([torch.einsum("dn,dnm,dm->d", full, p, dB).real for p in powers[:-1]], -1)
        a, b = powers[-1][:, :half, :half], powers[-1][:, :half, half:]  # z -> a z + b conj(z)
        squares = [torch.stack([(a + b).real, (b - a).imag], -1), torch.stack([(a + b).imag, (a - b).real], -1)]
        return (
            kernel,
            torch.stack([2 * reads.real, -2 * reads.imag], -1).flatten(-2),
            torch.stack([writes.real, writes.imag], 2).flatten(1, 2),
            torch.stack(squares, 2).flatten(3).flatten(1, 2),
        )

    def flat(tables):
        return torch.cat([t.flatten() for t in tables])

    fast = values_and_gradients(lambda *p: flat(s4_tables(*p, block)), dplr(3, 4))
    slow = values_and_gradients(lambda *p: flat(as_defined(*p)), dplr(3, 4))
    assert_same(fast, slow)


@pytest.mark.parametrize(("dt_min", "dt_max"), [(1e-5, 1e-3), (1e-3, 1e-1), (0.1, 2.0)])
def test_tables_lose_nothing_in_single_precision(dt_min, dt_max):
    torch.manual_seed(0)
    system = [p.detach() for p in S4(32, 64, dt_min=dt_min, dt_max=dt_max).system()]
    wide = [p.to(torch.complex128 if p.is_complex() else torch.float64) for p in system]
    for got, want in zip(s4_tables(*system, 64), s4_tables(*wide, 64), strict=True):
        assert got.dtype == torch.float32
        assert ((got - want).abs().amax() / want.abs().amax()).item() < 5e-6


def test_single_precision_stays_close_over_many_blocks():
    """A hundred blocks, dt so small that none is forgotten: errors of the block's matrix power add up."""
    torch.manual_seed(0)
    layer, u = S4(8, 64, dt_min=1e-4, dt_max=1e-3), torch.randn(1, 6400, 8)
    single = layer(u).detach()
    double = layer.double()(u.double()).detach()
    assert ((single - double).norm() / double.norm()).item() < 1e-4


@pytest.mark.parametrize("case", golden.names("s4_dplr_kernel"))
def test_the_authors_dplr_kernels(case):
    numbers = {k: torch.from_numpy(np.asarray(v)) for k, v in golden.load(case).items()}
    Lambda, P, B, C, tilde, dt = (numbers[k] for k in ("Lambda", "P", "B", "C", "C_tilde", "dt"))
    length, dim = int(numbers["L"]), len(dt)
    same = {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(s4_kernel(Lambda, P, B, tilde, dt, length), numbers["K"], **same)
    torch.testing.assert_close(s4_kernel_dense(Lambda, P, B, tilde, dt, length), numbers["K"], **same)
    torch.testing.assert_close(tilde_from_c(Lambda, P, C, dt, length), tilde, **same)
    torch.testing.assert_close(c_from_tilde(Lambda, P, tilde, dt, length), C, **same)
    for ours, theirs in zip(dplr_dense(Lambda, P, B, dt), ("dA", "dB"), strict=True):
        torch.testing.assert_close(ours, numbers[theirs], **same)
    y, _ = s4_recurrent(knock(length, dim), Lambda, P, B, C, dt)
    torch.testing.assert_close(y[0].T, numbers["K"], **same)
    if length % 2 == 0:  # the Nyquist node in closed form
        signs = (-1.0) ** torch.arange(length)
        torch.testing.assert_close((numbers["K"] * signs).sum(-1), dt * (tilde * B).sum(-1).real, **same)


def test_single_precision_stays_close_at_full_size():
    torch.manual_seed(0)
    layer = S4(4, 64)
    single = layer.kernel(1000)
    double = layer.double().kernel(1000)
    assert single.dtype == torch.float32
    assert ((single - double).abs().amax(-1) / double.abs().amax(-1)).max() < 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_never_a_table_of_channels_by_states_by_lags(name, monkeypatch):
    monkeypatch.setattr(s4, "_BLOCK", 1 << 12)
    dim, state, length = 4, 32, 4096
    layer = MODULES[name](dim, state)
    with Largest() as seen:
        layer(torch.randn(1, length, dim)).square().sum().backward()
    assert seen.numel <= 8 * dim * length  # D * N/2 * L would be twice that, and complex


# ---- the modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("length", ODD_LENGTHS)
def test_step_equals_parallel(name, length):
    layer, u = module(name), draw(2, length, 3)
    state, steps = layer.initial_state(2), []
    for t in range(length):
        y, state = layer.step(u[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), layer(u), rtol=0, atol=1e-10)
    assert state.shape == (2, 3, 4) and state.dtype == torch.complex128


@pytest.mark.parametrize("name", MODULES)
def test_every_parameter_gets_the_same_gradient_from_steps_and_from_the_kernel(name):
    u, gradients = draw(1, 9, 3), []
    for parallel in (True, False):
        layer = module(name)
        state, steps = layer.initial_state(1), []
        for t in range(9):
            y, state = layer.step(u[:, t], state)
            steps.append(y)
        y = layer(u) if parallel else torch.stack(steps, 1)
        (y * draw(1, 9, 3, seed=5)).sum().backward()
        gradients.append([p.grad for p in layer.parameters()])
    assert_same(*gradients)
    assert all(g.abs().max() > 0 for g in gradients[0])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("length", [1, 2, 13, 64, 65, 150])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_blocks_equal_the_convolution_with_the_kernel(name, length, bidirectional):
    """The module runs in blocks; its kernel comes from the Vandermonde or the Cauchy form. They must be one system."""
    layer, u, weight = module(name, bidirectional=bidirectional), draw(2, length, 3), draw(2, length, 3, seed=5)
    u.requires_grad_()
    kernel = layer.kernel(length)
    backward = kernel[3:] if bidirectional else None
    slow = long_convolution(u, kernel[:3], reverse_kernel=backward) + layer.skip * u
    results = []
    for y in (layer(u), slow):
        results.append([y, *torch.autograd.grad((y * weight).sum(), [u, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.detach().abs().max().item() + 1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_the_kernel_does_not_depend_on_how_long_one_asks(name):
    layer = module(name)
    long = layer.kernel(200)
    for length in (1, 2, 13, 128):
        torch.testing.assert_close(layer.kernel(length), long[:, :length], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODULES)
def test_both_directions_share_all_but_c_and_both_see_the_present(name):
    layer = module(name, bidirectional=True)
    forward, backward = layer.kernel(19).split(3)
    y = layer(knock(19, 3).flip(1))[0] - layer.skip * knock(19, 3).flip(1)[0]  # a knock at the last position
    torch.testing.assert_close(y[-1], forward[:, 0] + backward[:, 0], rtol=0, atol=1e-10)
    torch.testing.assert_close(y[:-1], backward[:, 1:].T.flip(0), rtol=0, atol=1e-10)
    u = draw(2, 19, 3)
    want = layer(u).flip(1)
    with torch.no_grad():
        layer.C.copy_(layer.C.roll(3, 0))
    torch.testing.assert_close(layer(u.flip(1)), want)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(list(MODULES)), st.booleans(), st.integers(1, 20), st.integers(0, 9), st.integers(0, 9))
def test_padding_never_touches_real_positions(name, bidirectional, length, left, right):
    layer, u = module(name, bidirectional=bidirectional), draw(1, length, 3)
    padded = torch.full((1, left + length + right, 3), torch.nan, dtype=torch.float64)
    real = slice(left, left + length)
    padded[:, real] = u
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    mask[:, real] = True
    torch.testing.assert_close(layer(padded, mask)[:, real], layer(u), rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from(list(MODULES)), st.integers(2, 40), st.integers(0, 999))
def test_causal_shift_equivariant_and_each_sequence_for_itself(name, length, seed):
    layer, u = module(name), draw(2, length, 3, seed=seed)
    y, cut = layer(u), length // 2
    other = u.clone()
    other[:, cut:] += 10 * draw(2, length - cut, 3, seed=seed + 1)
    torch.testing.assert_close(layer(other)[:, :cut], y[:, :cut], rtol=0, atol=1e-9)
    later = F.pad(u, (0, 0, 3, 0))
    torch.testing.assert_close(layer(later)[:, 3:], y, rtol=0, atol=1e-9)
    torch.testing.assert_close(layer(u[:1]), y[:1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MODULES)
def test_float32_inside_autocast_and_near_enough_in_bfloat16(name):
    torch.manual_seed(0)
    layer, u = MODULES[name](4), torch.randn(2, 100, 4)
    want = layer(u)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kernel, y = layer.kernel(100), layer(u)
        stepped, _ = layer.step(u[:, 0], layer.initial_state(2))
    assert kernel.dtype == torch.float32
    assert (y - want).abs().max() < 1e-4 * want.abs().max()
    assert (stepped - want[:, 0]).abs().max() < 1e-4 * want.abs().max()
    half = layer.bfloat16()
    got, (first, _) = half(u.bfloat16()), half.step(u[:, 0].bfloat16(), half.initial_state(2))
    assert got.dtype == first.dtype == torch.bfloat16
    assert ((got - want).norm() / want.norm()).item() < 3e-2


@pytest.mark.parametrize("name", MODULES)
def test_parameters_are_real_and_start_where_the_papers_say(name):
    torch.manual_seed(0)
    layer = MODULES[name](500, 8, bidirectional=True)
    assert all(not p.is_complex() for p in layer.parameters())
    assert layer.C.shape == (1000, 4, 2)
    assert 0.48 < layer.C.var() < 0.52
    dt = layer.system()[-1]
    assert 1e-3 <= dt.min() < 1.2e-3 and 0.08 < dt.max() <= 0.1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.2
    with torch.no_grad():
        layer.log_real.fill_(3.0)  # whatever training does to them, eigenvalues keep a negative real part
    assert layer.kernel(50).isfinite().all()


def test_the_window_sees_the_kernel_and_changes_nothing():
    layer, seen = module("s4"), []
    layer.kernel_seen.register_forward_hook(lambda m, args, out: seen.append(out))
    y = layer(draw(1, 12, 3))
    assert torch.equal(seen[0], layer.kernel(12))
    assert y.shape == (1, 12, 3)


# ---- the authors' layer and convolution ------------------------------------------------------------------------------


def test_the_authors_minimal_layer():
    """GELU, a linear layer to twice the width and a gate around S4D, as in their stand-alone file."""
    numbers = {k: torch.from_numpy(v) for k, v in golden.load("s4_s4d_minimal_layer").items()}
    layer = S4D(4, 8).double()
    with torch.no_grad():
        for ours, theirs in {"log_real": "log_A_real", "imag": "A_imag", "log_dt": "log_dt", "skip": "D"}.items():
            getattr(layer, ours).copy_(numbers[theirs])
        layer.B.copy_(torch.tensor([1.0, 0.0]).expand_as(layer.B))
        layer.C.copy_(torch.view_as_real(numbers["C"]))
    x = numbers["x"].transpose(1, 2)
    torch.testing.assert_close(layer.kernel(20).detach(), numbers["K"], rtol=0, atol=1e-9)
    y = F.glu(F.linear(F.gelu(layer(x)), numbers["W_out"], numbers["b_out"]))
    torch.testing.assert_close(y.detach(), numbers["y"].transpose(1, 2), rtol=0, atol=1e-9)


def test_the_authors_convolutions_and_their_lag_zero():
    """Both directions holding lag 0 is ours; the authors' backward kernel begins at the next token."""
    numbers = {k: torch.from_numpy(v) for k, v in golden.load("s4_fftconv").items()}
    u, forward, backward = numbers["u"].transpose(1, 2), numbers["k_forward"], numbers["k_backward"]
    skip = numbers["D"] * u
    for name, y in {
        "y_causal": long_convolution(u, forward) + skip,
        "y_bidirectional_symmetric": long_convolution(u, forward, reverse_kernel=backward) + skip,
        "y_bidirectional_s4": long_convolution(u, forward, reverse_kernel=F.pad(backward, (1, 0))) + skip,
    }.items():
        torch.testing.assert_close(y, numbers[name].transpose(1, 2), rtol=0, atol=1e-9, msg=name)
    circular = numbers["y_wrong_circular_no_padding"].transpose(1, 2)
    assert (long_convolution(u, forward) - circular).abs().max() > 0.1


# ---- wrong input -----------------------------------------------------------------------------------------------------


A, B, C, DT = diagonal()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hippo_legs(0), "N >= 1"),
        (lambda: hippo_legs_nplr(5), "conjugate pairs; got 5"),
        (lambda: s4d_init("lin", 1), "even state size"),
        (lambda: s4d_init("fourier", 8), "lin, inv, inv2"),
        (lambda: discretize(A, B, DT, "euler"), "zoh, bilinear; got 'euler'"),
        (lambda: s4d_kernel(A, B, C, DT, 0), "length >= 1"),
        (lambda: s4d_kernel(A, B, C.real, DT, 5), r"complex \(dim, N/2\)"),
        (lambda: s4d_kernel(A[0], B, C, DT, 5), "expand what is shared"),
        (lambda: s4d_kernel(A, B, C, DT[:2], 5), r"dt must be real \(dim,\) = \(3,\)"),
        (lambda: s4d_recurrent(torch.ones(2, 5, 4), A, B, C, DT), "dim = 3 as in A"),
        (lambda: s4_kernel(A, B, B, C, DT, 0), "length >= 1"),
        (lambda: s4_recurrent(torch.ones(2, 3), A, B, B, C, DT), "u must be"),
        (lambda: S4D(0), "dim >= 1"),
        (lambda: S4D(3, discretization="euler"), "zoh, bilinear"),
        (lambda: S4(3, 7), "even state size"),
        (lambda: S4(3, dt_min=0.1, dt_max=0.01), "dt_min <= dt_max"),
        (lambda: S4D(3)(torch.ones(2, 5, 4)), r"dim\) = \(\*, \*, 3\)"),
        (lambda: S4D(3)(torch.ones(2, 5, 3), torch.ones(2, 5)), "mask must be bool"),
        (lambda: S4(3).step(torch.ones(2, 1, 3), None), "one time step"),
        (lambda: S4(3, bidirectional=True).initial_state(1), "S4 needs the future and cannot stream"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()
