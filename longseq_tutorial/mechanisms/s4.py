"""Structured state spaces: S4D (diagonal) and full S4 (diagonal plus low rank).

Each of D channels drives a linear differential equation with a state of N numbers, and reads its output from it::

    x'(t) = A x(t) + B u(t)          y(t) = C x(t) + skip * u(t)

Sampled every ``dt``, that is a recurrence ``x[t] = Abar x[t-1] + Bbar u[t]``, hence a convolution with the kernel
``k[s] = C Abar**s Bbar``. The art is in choosing A (HiPPO) and in computing k without ever looking at L states.

The system is real, so its complex states come in conjugate pairs. Everywhere below **one member of each pair is
kept, that with the negative imaginary part**: A, B, C, P, Lambda are ``(D, N/2)`` complex, and a sum over all N states
is twice the real part of the sum over the half.

Sources: Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022 (S4); Gu et al., "On
the Parameterization and Initialization of Diagonal State Space Models", NeurIPS 2022 (S4D); and their published code.

Letters: B batch, L length, D channels, N state size (even), h = N/2.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .blocks import BLOCK, Tables, block_recurrence
from .devices import at_once
from .fft import good_length, working_dtype

__all__ = [
    "S4",
    "S4D",
    "c_from_tilde",
    "discretize",
    "dplr_dense",
    "hippo_legs",
    "hippo_legs_nplr",
    "s4_kernel",
    "s4_kernel_dense",
    "s4_recurrent",
    "s4_tables",
    "s4d_init",
    "s4d_kernel",
    "s4d_kernel_vandermonde",
    "s4d_recurrent",
    "s4d_tables",
    "tilde_from_c",
]

KINDS = ("lin", "inv", "inv2", "quad", "real", "legs")
METHODS = ("zoh", "bilinear")
_BLOCK = 1 << 19  # numbers in one table of `s4_kernel` on a CPU: small enough for a cache, large enough to keep it busy


# ---- what to remember: HiPPO and its relatives ---------------------------------------------------------------------


def hippo_legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: the system whose state holds the Legendre coefficients of its whole past.

    Returns ``A (N, N)`` and ``B (N,)``, real, float64. ``A[n, k]`` is ``-sqrt((2n+1)(2k+1))`` below the diagonal,
    ``-(n+1)`` on it, 0 above; ``B[n] = sqrt(2n+1)``. Source: S4 paper, equation 2.
    """
    if N < 1:
        raise ValueError(f"hippo_legs wanted N >= 1; got {N}.")
    n = torch.arange(N, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    return -torch.outer(root, root).tril(-1) - torch.diag(n + 1), root


def hippo_legs_nplr(N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """HiPPO-LegS as normal plus low rank: ``A = V_full (diag(Lambda_full) - P_full P_full^*) V_full^*``.

    Adding ``p p^T`` with ``p[n] = sqrt(n + 1/2)`` makes A equal to -1/2 plus a skew-symmetric matrix, which a unitary V
    diagonalises. Returned are one of each conjugate pair, the most negative imaginary part first:

        ``Lambda (N/2,)``, ``P = V^* p (N/2,)``, ``B = V^* b (N/2,)``, ``V (N, N/2)``; complex128, N even.

    Eigenvectors have arbitrary phases. Here they are turned so that P is real and positive; then B is too, as
    ``b = sqrt(2) p``, and the result is the same on every machine. Source: S4 paper, theorem 1.
    """
    _even(N)
    A, b = hippo_legs(N)
    p = b / math.sqrt(2)
    normal = A + torch.outer(p, p)
    skew = (normal - normal.T) / 2  # drops the -1/2 on the diagonal, exactly
    frequency, V = torch.linalg.eigh(-1j * skew)  # Hermitian: real eigenvalues, ascending
    frequency, V = frequency[: N // 2], V[:, : N // 2]
    P = V.mH @ p.to(V.dtype)
    V = V * (P / P.abs())  # turn each column; V^* p turns back and becomes |P|
    return torch.complex(torch.full_like(frequency, -0.5), frequency), P.abs() + 0j, V.mH @ b.to(V.dtype), V


def s4d_init(kind: str, N: int) -> tuple[Tensor, Tensor]:
    """Initial eigenvalues of a diagonal system, and its input weights: ``A, B``, each ``(N/2,)`` complex128.

    With n = 0 .. N/2-1, the real part is -1/2 (but for "real"), the imaginary part minus

    ======  ==========================  ==================================================
    lin     ``pi n``                    evenly spaced: a damped Fourier series
    inv     ``N/pi (N/(2n+1) - 1)``     close to the eigenvalues of "legs"
    inv2    ``N/pi (N/(n+1) - 1)``
    quad    ``(1+2n)**2 / pi``
    real    0, with ``A = -(n+1)``      plain exponential decays
    legs    that of HiPPO-LegS          the normal part of :func:`hippo_legs_nplr`
    ======  ==========================  ==================================================

    B is 1, and for "legs" ``V^* b`` with the modulus clipped to 2. (The published code clips the imaginary part, which
    depends on the arbitrary phases of the eigenvectors; the large entries come out almost alike.) Source: S4D paper,
    section 4.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    _even(N)
    n = torch.arange(N // 2, dtype=torch.float64)
    if kind == "legs":
        A, _, B, _ = hippo_legs_nplr(N)
        return A, B.abs().clamp(max=2) + 0j
    if kind == "real":
        return -(n + 1) + 0j, torch.ones_like(n) + 0j
    imaginary = {
        "lin": math.pi * n,
        "inv": N / math.pi * (N / (2 * n + 1) - 1),
        "inv2": N / math.pi * (N / (n + 1) - 1),
        "quad": (1 + 2 * n) ** 2 / math.pi,
    }[kind]
    return torch.complex(torch.full_like(n, -0.5), -imaginary), torch.ones_like(n) + 0j


# ---- from continuous to sampled time -------------------------------------------------------------------------------


def discretize(A: Tensor, B: Tensor, dt: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """The sampled system of a diagonal one: ``Abar, Bbar``, each ``(D, N/2)``.

    "zoh" (zero-order hold) is exact for an input that stands still between samples: ``exp(dt A)`` and
    ``(exp(dt A) - 1) / A * B``. "bilinear" replaces the exponential by ``(1 + dt A/2) / (1 - dt A/2)``, with
    ``dt B / (1 - dt A/2)``. Both map the left half plane into the unit circle: what decays goes on decaying. A, B are
    ``(D, N/2)`` complex; dt ``(D,)`` is the time between samples.
    """
    if method not in METHODS:
        raise ValueError(f"discretization must be one of {', '.join(METHODS)}; got {method!r}.")
    dt = dt.unsqueeze(-1)
    z = dt * A
    if method == "bilinear":
        return (1 + z / 2) / (1 - z / 2), dt * B / (1 - z / 2)
    still = z == 0  # (exp(z) - 1) / z tends to 1
    gain = torch.where(still, 1.0, torch.expm1(z) / torch.where(still, 1.0, z))
    return torch.exp(z), dt * B * gain


# ---- S4D: the slow forms -------------------------------------------------------------------------------------------


def s4d_recurrent(
    u: Tensor, A: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor | None = None, discretization: str = "zoh"
) -> tuple[Tensor, Tensor]:
    """The diagonal system one time step after the other: ``x = Abar x + Bbar u[t]``, ``y[t] = 2 Re sum(C x)``.

    Takes u ``(B, L, D)`` real; A, B, C ``(D, N/2)`` complex; dt ``(D,)``; and the state ``(B, D, N/2)`` complex that an
    earlier part left behind, ``None`` for the beginning. Returns ``y (B, L, D)`` and the state after the last step.
    """
    _check(A, B, C, dt=dt, u=u)
    decay, push = discretize(A, B, dt, discretization)
    x = torch.zeros(u.shape[0], *decay.shape, dtype=decay.dtype, device=u.device) if state is None else state
    y = []
    for t in range(u.shape[1]):
        x = decay * x + push * u[:, t, :, None]  # (B, D, N/2)
        y.append(2 * (C * x).sum(-1).real)  # (B, D)
    return torch.stack(y, dim=1), x


def s4d_kernel_vandermonde(
    A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str = "zoh"
) -> Tensor:
    """The kernel as its definition says it: every power of every eigenvalue, a ``(D, N/2, length)`` complex table.

    ``k[s] = 2 Re sum over n of C Bbar Abar**s``. Such a table of powers is a Vandermonde matrix. Arguments and result
    as in :func:`s4d_kernel`.
    """
    _check(A, B, C, dt=dt, length=length)
    decay, push = discretize(A, B, dt, discretization)
    ones = torch.ones_like(decay).unsqueeze(-1)
    # Products and not `decay ** s`, which for a complex decay of 0 says that 0**0 is NaN.
    powers = torch.cat([ones, decay.unsqueeze(-1).expand(-1, -1, length - 1)], dim=-1).cumprod(-1)  # (D, N/2, length)
    return 2 * ((C * push).unsqueeze(-1) * powers).sum(1).real


# ---- S4D: the fast form --------------------------------------------------------------------------------------------


def s4d_kernel(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int, discretization: str = "zoh") -> Tensor:
    """What an input of 1 at time 0 leaves behind at times 0 .. length-1, from two short tables.

    As ``Abar**(a * block + b) = Abar**(a * block) * Abar**b``, about ``2 sqrt(length)`` powers of each eigenvalue are
    enough, and the sum over states becomes a product of two real matrices whose inner axis holds the N real and
    imaginary parts. Nothing of size ``D * N * length`` exists. Takes A, B, C ``(D, N/2)`` complex, one of each
    conjugate pair, and dt ``(D,)`` real; returns ``(D, length)`` real, in float32 or better.
    """
    _check(A, B, C, dt=dt, length=length)
    dtype = working_dtype(A, B, C, dt)
    with torch.autocast(A.device.type, enabled=False):
        rate, push = _rate_and_push(A, B, dt, discretization)
        block = math.isqrt(length - 1) + 1  # sqrt(length), rounded up: both tables equally short
        steps = torch.arange(block, device=A.device, dtype=torch.float64)
        fine = _powers(rate, steps, dtype)  # (D, N/2, b): powers 0, 1, 2, ..
        coarse = _weighted(2 * C * push, *_powers(rate, steps[: -(-length // block)] * block, dtype), sign=-1)
        # Re(p q) = Re p Re q - Im p Im q, with 0, block, 2 block, .. and 0, 1, 2, ..: (D, a, N) @ (D, N, b)
        return (coarse.mT @ torch.stack(fine, dim=2).flatten(1, 2)).flatten(1)[:, :length]


def s4d_tables(A: Tensor, B: Tensor, C: Tensor, dt: Tensor, block: int, discretization: str = "zoh") -> Tables:
    """What the diagonal system does in a block of steps: see :class:`~longseq_tutorial.mechanisms.blocks.Tables`.

    The state is kept as N real numbers, real and imaginary parts in turn; arguments as for :func:`s4d_kernel`.
    """
    _check(A, B, C, dt=dt, length=block)
    dtype = working_dtype(A, B, C, dt)
    with torch.autocast(A.device.type, enabled=False):
        rate, push = _rate_and_push(A, B, dt, discretization)
        steps = torch.arange(block + 1, device=A.device, dtype=torch.float64)
        real, imag = _powers(rate, steps, dtype)  # (D, N/2, C + 1)
        write = _weighted(push, real[..., :-1], imag[..., :-1])  # (D, N, C)
        read = _weighted(2 * C, real, imag, sign=-1)  # (D, N, C + 1); 2 Re(c x) = 2 Re c Re x - 2 Im c Im x
        kernel = (read[..., :1].mT @ write).squeeze(1)
        return Tables(kernel, read[..., 1:].mT, write.flip(-1), torch.complex(real[..., -1], imag[..., -1]))


def _rate_and_push(A: Tensor, B: Tensor, dt: Tensor, discretization: str) -> tuple[Tensor, Tensor]:
    """``log(Abar)`` and ``Bbar``, in double precision: a fast mode turns by thousands of radians in a long kernel."""
    A, B, dt = A.to(torch.complex128), B.to(torch.complex128), dt.double()
    decay, push = discretize(A, B, dt, discretization)
    if discretization == "zoh":
        return dt.unsqueeze(-1) * A, push  # without a detour
    return torch.log(torch.where(decay == 0, torch.finfo(torch.float32).tiny, decay)), push


def _powers(rate: Tensor, exponents: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``exp(rate * exponents)`` for rate ``(D, h)`` and exponents ``(K,)``: real and imaginary parts, ``(D, h, K)``.

    A complex ``exp`` is an order of magnitude slower than a real one with a cosine and a sine. Powers too small to
    matter become 0; as denormal numbers they would slow every product down.
    """
    log_size = rate.real.unsqueeze(-1) * exponents
    angle = rate.imag.unsqueeze(-1) * exponents
    smallest = math.log(torch.finfo(dtype).tiny) / 2  # half, so that a product of two powers is normal too
    size = torch.exp(log_size.to(dtype)).masked_fill(log_size < smallest, 0.0)
    return size * torch.cos(angle).to(dtype), size * torch.sin(angle).to(dtype)


def _weighted(weight: Tensor, real: Tensor, imag: Tensor, sign: int = 1) -> Tensor:
    """``weight (D, h)`` times powers ``(D, h, K)``: real part and (sign) imaginary part in turn, ``(D, N, K)`` real."""
    wr, wi = weight.real.to(real.dtype).unsqueeze(-1), weight.imag.to(real.dtype).unsqueeze(-1)
    return torch.stack([wr * real - wi * imag, sign * (wr * imag + wi * real)], dim=2).flatten(1, 2)


# ---- S4: diagonal plus low rank, the slow forms --------------------------------------------------------------------


def dplr_dense(Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled DPLR system as full matrices: ``Abar (D, N, N)``, ``Bbar (D, N)``, complex.

    ``A = diag(Lambda) - P P^*`` over all N states, the given half first and then its conjugates, discretised with the
    bilinear rule: ``Abar = (1 - dt A/2)^-1 (1 + dt A/2)``, ``Bbar = (1 - dt A/2)^-1 dt B``.
    """
    _check(Lambda, P, B, dt=dt)
    Lambda, P, B = (torch.cat([v, v.conj()], dim=-1) for v in (Lambda, P, B))  # (D, N)
    half_step = dt[:, None, None] / 2 * (torch.diag_embed(Lambda) - P.unsqueeze(-1) * P.conj().unsqueeze(-2))
    one = torch.eye(Lambda.shape[-1], dtype=Lambda.dtype, device=Lambda.device)
    pushed = torch.linalg.solve(one - half_step, (dt.unsqueeze(-1) * B).unsqueeze(-1)).squeeze(-1)
    return torch.linalg.solve(one - half_step, one + half_step), pushed


def s4_recurrent(
    u: Tensor, Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The DPLR system one time step after the other, in N operations a step and not N**2.

    The bilinear rule says ``(1 - dt A/2) x[t] = (1 + dt A/2) x[t-1] + dt B u[t]``; as the right matrix is 2 minus the
    left one, ``x[t] = (1 - dt A/2)^-1 (2 x[t-1] + dt B u[t]) - x[t-1]``. For that inverse see `_half_step`.
    Arguments and results as in :func:`s4d_recurrent`; C is the true output vector.
    """
    _check(Lambda, P, B, C, dt=dt, u=u)
    x = torch.zeros(u.shape[0], *B.shape, dtype=B.dtype, device=u.device) if state is None else state
    inverse, column, row = _half_step(Lambda, P, dt)
    y = []
    for t in range(u.shape[1]):
        v = 2 * x + dt.unsqueeze(-1) * B * u[:, t, :, None]  # (B, D, N/2)
        x = inverse * v - column * 2 * (row * v).sum(-1, keepdim=True).real - x
        y.append(2 * (C * x).sum(-1).real)
    return torch.stack(y, dim=1), x


def _half_step(Lambda: Tensor, P: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(1 - dt A/2)^-1`` as ``v -> inverse * v - column * 2 Re sum(row * v)``, three vectors ``(D, N/2)``.

    That matrix is diagonal plus rank one; so is its inverse, by the Woodbury identity (here: Sherman-Morrison).
    """
    half = dt.unsqueeze(-1) / 2
    inverse = 1 / (1 - half * Lambda)
    row = P.conj() * inverse
    return inverse, half * inverse * P / (1 + half * 2 * (row * P).sum(-1, keepdim=True).real), row


def c_from_tilde(Lambda: Tensor, P: Tensor, C_tilde: Tensor, dt: Tensor, length: int) -> Tensor:
    """Undo :func:`tilde_from_c`: the true C ``(D, N/2)`` of a C_tilde made for ``length``."""
    _check(Lambda, P, C_tilde, dt=dt, length=length)
    dA, _ = dplr_dense(Lambda, P, P, dt)
    full = torch.cat([C_tilde, C_tilde.conj()], dim=-1).unsqueeze(-1)  # (D, N, 1)
    one = torch.eye(dA.shape[-1], dtype=dA.dtype, device=dA.device)
    return torch.linalg.solve((one - torch.linalg.matrix_power(dA, length)).mT, full)[:, : C_tilde.shape[-1], 0]


def s4_kernel_dense(Lambda: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, dt: Tensor, length: int) -> Tensor:
    """The S4 kernel as its definition says it, ``k[s] = C Abar**s Bbar``, with full matrices, one lag after another.

    Costs ``length * N**2`` a channel. Arguments and result as in :func:`s4_kernel`.
    """
    C = c_from_tilde(Lambda, P, C_tilde, dt, length)
    dA, x = dplr_dense(Lambda, P, B, dt)  # x (D, N): the state after a knock
    kernel = []
    for _ in range(length):
        kernel.append(2 * (C * x[:, : C.shape[-1]]).sum(-1).real)
        x = (dA @ x.unsqueeze(-1)).squeeze(-1)
    return torch.stack(kernel, dim=-1)


# ---- S4: the fast form ---------------------------------------------------------------------------------------------


def tilde_from_c(Lambda: Tensor, P: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    """``C_tilde = (1 - Abar**length)^T C``: the C whose *endless* kernel has the first ``length`` lags of C's as its
    transform at the ``length``-th roots of unity. ``(D, N/2)`` complex.

    The power comes from repeated squaring, in double precision.
    """
    _check(Lambda, P, C, dt=dt, length=length)
    with torch.autocast(C.device.type, enabled=False):
        Abar, _ = _real_dense(Lambda, P, P, dt)
        c = _reals(C.to(torch.complex128).conj())  # Re sum(c z) is then a product of real vectors
        power = torch.linalg.matrix_power(Abar, length)  # (D, N, N)
        left = c - (c.unsqueeze(-2) @ power).squeeze(-2)
        return torch.view_as_complex(left.unflatten(-1, (-1, 2))).conj().to(C.dtype)


def s4_tables(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, block: int) -> Tables:
    """What full S4 does in a block of steps: see :class:`~longseq_tutorial.mechanisms.blocks.Tables`.

    Within a block no Cauchy kernel is needed: all comes from powers of numbers. Write ``Abar = M - k r``, M diagonal, k
    a column, r a row. Of n factors either none is ``k r``, or one is the first from the left to be so:

        ``Abar**n = M**n - sum over s < n of (M**(n-1-s) k) (r Abar**s)``

    To the left of it M alone acts, to the right anything. Read with r, that says of the rows ``r Abar**n`` that each is
    ``r M**n`` less a sum over the rows before it, weighted with the numbers ``r M**j k``: a triangular system, solved
    in one call. With these rows, the formula gives whatever else is asked for. The state is kept as N real numbers,
    real and imaginary parts in turn. C is the true one.
    """
    return _s4_tables(Lambda, P, B, [C], dt, block)[0]


def _s4_tables(Lambda: Tensor, P: Tensor, B: Tensor, Cs: Sequence[Tensor], dt: Tensor, block: int) -> list[Tables]:
    """The tables of several systems that differ in C only, R of them: the powers of ``Abar`` serve all."""
    _check(Lambda, P, B, *Cs, dt=dt, length=block)
    dtype = working_dtype(Lambda, P, B, *Cs, dt)
    narrow = torch.complex128 if dtype == torch.float64 else torch.complex64
    with torch.autocast(B.device.type, enabled=False):
        dt, (Lambda, P, B, *Cs) = dt.double(), (v.to(torch.complex128) for v in (Lambda, P, B, *Cs))
        inverse, column, row = _half_step(Lambda, P, dt)
        m, column = 2 * inverse - 1, 4 * column  # Abar = 2 (1 - dt A/2)^-1 - 1, and Bbar = dt/2 (1 + Abar) B
        push = dt.unsqueeze(-1) / 2 * (B + m * B - column * (row * B).sum(-1, keepdim=True).real)
        ahead = [C * m - (C * column).sum(-1, keepdim=True).real * row for C in Cs]  # C Abar
        powers = _geometric(m, block, narrow)  # (D, C, h): m**t
        mirrored = powers.conj().resolve_conj()
        moved, pushed = (_reals(powers * v.to(narrow).unsqueeze(1)) for v in (column, push))  # M**t k, M**t Bbar

        def read_by(c: Tensor) -> tuple[Tensor, Tensor]:
            """``c M**t (D, C, N)``, and how much of each earlier row to take off: ``c M**(t-1-s) k (D, C, C)``."""
            # Re sum(c z) is a product of real numbers: those of conj(c) and of z.
            c = c.to(narrow).unsqueeze(1).conj().resolve_conj()
            return _reals(mirrored * c), _below(moved @ _reals(c).mT)

        alone, earlier = read_by(row)
        rows = torch.linalg.solve_triangular(earlier, alone, upper=False, unitriangular=True)  # r Abar**t
        write = torch.baddbmm(pushed, _below(rows @ _reals(push.to(narrow)).unsqueeze(-1)), moved, alpha=-1)
        whole = torch.baddbmm(_turn(powers[:, -1] * m.to(narrow)), moved.flip(1).mT, rows, alpha=-1)
        late = write.flip(1).mT
        tables = []
        for C, next_c in zip(Cs, ahead, strict=True):
            alone, earlier = read_by(next_c)
            # 2, since half of the states stands for all. (It also makes the gradient of `alone` a tensor of its own: a
            # slice of a larger one may begin between the parts of a complex number, which autograd refuses.)
            read = torch.baddbmm(alone, earlier, rows, beta=2, alpha=-2)
            kernel = 2 * (write @ _reals(C.to(narrow).conj()).unsqueeze(-1)).squeeze(-1)
            tables.append(Tables(kernel, read, late, whole))
        return tables


def _geometric(ratio: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """``ratio (D, h)`` to the powers 0 .. count-1, ``(D, count, h)``: all that are known, times the next one."""
    powers, n = torch.ones_like(ratio, dtype=dtype).unsqueeze(1), 1
    while n < count:
        powers = torch.cat([powers, powers * ratio.to(dtype).unsqueeze(1)], dim=1)
        n, ratio = 2 * n, ratio * ratio
    return powers[:, :count]


def _below(numbers: Tensor) -> Tensor:
    """``(D, C, 1) -> (D, C, C)``: each number on a diagonal of its own, the first just below the main one."""
    steps = numbers.shape[1]
    by_distance = F.pad(numbers[:, : steps - 1, 0], (steps, 0))  # distances -(C-1) .. C-1
    return by_distance.unfold(1, steps, 1).flip(2)


def _reals(z: Tensor) -> Tensor:
    """Complex ``(.., h)`` as real ``(.., N)``: real and imaginary parts in turn."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


def _real_dense(Lambda: Tensor, P: Tensor, B: Tensor, dt: Tensor) -> tuple[Tensor, Tensor]:
    """The sampled DPLR system over real numbers, float64: ``Abar (D, N, N)``, ``Bbar (D, N)``.

    ``Abar = 2 (1 - dt A/2)^-1 - 1`` is what `_half_step` says, and ``Bbar = dt/2 (Abar + 1) B``: no system of equations
    to solve. Of each pair z there are Re z and Im z, in turn.
    """
    Lambda, P, B, dt = *(v.to(torch.complex128) for v in (Lambda, P, B)), dt.double()
    inverse, column, row = _half_step(Lambda, P, dt)
    column, b = (_reals(v).unsqueeze(-1) for v in (4 * column, B))
    Abar = _turn(2 * inverse - 1) - column * _reals(row.conj()).unsqueeze(-2)
    return Abar, (dt[:, None, None] / 2 * (b + Abar @ b)).squeeze(-1)


def _turn(m: Tensor) -> Tensor:
    """What multiplies each pair z by its m ``(D, h)``: ``[[Re m, -Im m], [Im m, Re m]]`` along the diagonal."""
    squares = torch.stack([m.real, -m.imag, m.imag, m.real], dim=1).unflatten(1, (2, 2))  # (D, 2, 2, h)
    return torch.diag_embed(squares, dim1=1, dim2=3).flatten(3).flatten(1, 2)  # (D, h, 2, h, 2) on the way


def s4_kernel(Lambda: Tensor, P: Tensor, B: Tensor, C_tilde: Tensor, dt: Tensor, length: int) -> Tensor:
    """The kernel of full S4, computed in the frequency domain and transformed back.

    The kernel's discrete Fourier transform at frequency k is ``C_tilde (1 - w Abar)^-1 Bbar``, the system's response to
    ``w = exp(-2 pi i k / length)``. For a DPLR system, with ``z = 2 (1 - w) / (1 + w) = 2 i tan(pi k / length)`` and
    the Cauchy sums ``c(v) = sum over all N of dt v / (z - dt Lambda)``, Woodbury makes of it

        ``2 / (1 + w) * (c(B C_tilde) - c(B P^*) c(P C_tilde) / (1 + c(P P^*)))``.

    Where ``w = -1`` (Nyquist, even lengths) that is infinity times 0; its limit is ``dt Re sum(C_tilde B)`` over the
    half. The sums are evaluated for a block of frequencies at a time, and once more in the backward pass, so that
    nothing of size ``D * N * length`` is ever held. Takes ``(D, N/2)`` complex vectors (C_tilde belongs to ``length``,
    see :func:`tilde_from_c`) and dt ``(D,)`` real; returns ``(D, length)`` real, in float32 or better.
    """
    _check(Lambda, P, B, C_tilde, dt=dt, length=length)
    dtype = working_dtype(Lambda, P, B, C_tilde, dt)
    with torch.autocast(B.device.type, enabled=False):
        wide = torch.complex128 if dtype == torch.float64 else torch.complex64
        Lambda, P, B, C_tilde, dt = *(v.to(wide) for v in (Lambda, P, B, C_tilde)), dt.to(dtype)
        poles = dt.unsqueeze(-1) * Lambda  # (D, N/2)
        tops = torch.stack([B * C_tilde, B * P.conj(), P * C_tilde, P * P.conj()], dim=1) * dt[:, None, None]
        # Numerators of the conjugate pairs, joined: v / (z - p) + v' / (z - p') = (first z + second) / ..., real each.
        tops = 2 * torch.cat([tops.real, -(tops * poles.conj().unsqueeze(1)).real], dim=1)  # (D, 8, N/2)
        k = torch.arange((length + 1) // 2, dtype=torch.float64, device=B.device)  # below Nyquist
        tangent = torch.tan(math.pi / length * k).to(dtype)
        blocks = tangent.split(max(1, at_once(poles, _BLOCK) // poles.numel()))
        response = _response
        if torch.is_grad_enabled() and len(blocks) > 1:  # forget the sums, compute them again on the way back
            response = partial(checkpoint, _response, use_reentrant=False, preserve_rng_state=False)
        spectrum = [response(tops, poles, t) for t in blocks]
        if length % 2 == 0:
            nyquist = dt * (C_tilde * B).sum(-1).real
            spectrum.append(torch.complex(nyquist, torch.zeros_like(nyquist)).unsqueeze(-1))
        return torch.fft.irfft(torch.cat(spectrum, dim=-1), n=length)


def _response(tops: Tensor, poles: Tensor, tangent: Tensor) -> Tensor:
    """The bracket above at ``z = 2 i tangent``: tops ``(D, 8, h)``, poles ``(D, h)``, tangent ``(F,)`` -> ``(D, F)``.

    A pair's denominator is ``(z - p)(z - p') = |p|**2 - |z|**2 - 2 Re(p) z``, with z on the imaginary axis. With the
    real and the imaginary part of its inverse, the sums over the states are real matrix products.
    """
    z = 2 * tangent
    near = (poles.real.square() + poles.imag.square()).unsqueeze(-1) - z.square()  # (D, h, F)
    damping = 2 * poles.real.unsqueeze(-1) * z
    inverse = (near.square() + damping.square()).reciprocal()
    real, imag = tops @ (near * inverse), tops @ (damping * inverse)  # (D, 8, F) each
    sums = torch.complex(real[:, 4:] - z * imag[:, :4], imag[:, 4:] + z * real[:, :4])  # (D, 4, F)
    k00, k01, k10, k11 = sums.unbind(1)
    return torch.complex(torch.ones_like(tangent), tangent) * (k00 - k01 * k10 / (1 + k11))


# ---- the modules ---------------------------------------------------------------------------------------------------


class _StateSpace(nn.Module):
    """What S4D and S4 share: shapes, masks, the convolution with a skip, streaming.

    Complex parameters are stored as pairs of real numbers, ``(..., 2)``: optimisers, averaging, ``.bfloat16()`` and
    checkpoints then need to know nothing of complex numbers. Eigenvalues are ``-exp(log_real) + i imag``: the real part
    cannot become positive, no kernel can explode. Bidirectional: a second C (rows D.. of it) reads the same kind of
    states run from the end; A, B, dt are shared.

    A subclass names its system's vectors (`system`) and the three forms that take them: kernel, blocks, steps.
    """

    _kernel: Callable[..., Tensor]
    _tables: Callable[..., list[Tables]]  # takes a C for each direction
    _steps: Callable[..., tuple[Tensor, Tensor]]

    def _block(self, length: int) -> int:
        """Steps in a block: the tables cost as much as they have steps, the scan as much as there are blocks."""
        return BLOCK

    def __init__(self, dim: int, A: Tensor, B: Tensor, bidirectional: bool, dt_min: float, dt_max: float) -> None:
        super().__init__()
        if dim < 1 or not 0 < dt_min <= dt_max:
            raise ValueError(f"wanted dim >= 1 and 0 < dt_min <= dt_max; got dim={dim}, dt {dt_min} .. {dt_max}.")
        self.dim, self.state, self.bidirectional = dim, 2 * len(A), bidirectional
        rows = 2 * dim if bidirectional else dim
        self.log_real = nn.Parameter(torch.log(-A.real).float().repeat(dim, 1))
        self.imag = nn.Parameter(A.imag.float().repeat(dim, 1))
        self.B = nn.Parameter(torch.view_as_real(B).float().repeat(dim, 1, 1))
        self.C = nn.Parameter(torch.randn(rows, len(A), 2) * math.sqrt(0.5))
        self.log_dt = nn.Parameter(math.log(dt_min) + torch.rand(dim) * math.log(dt_max / dt_min))
        self.skip = nn.Parameter(torch.randn(dim))
        self.kernel_seen = nn.Identity()  # a window for `record`: the kernel passes through unchanged

    def kernel(self, length: int) -> Tensor:
        """The kernel(s) for a sequence of this length: ``(D, length)``, or ``(2D, length)`` when bidirectional."""
        system = self.system()
        if self.bidirectional:  # all but C serve both directions
            system = tuple(p if p.shape[0] == 2 * self.dim else torch.cat([p, p]) for p in system)
        return self.kernel_seen(self._kernel(*system, length))

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D) -> (B, L, D)``. Where ``mask (B, L)`` is False the system hears silence."""
        if u.dim() != 3 or u.shape[1] == 0 or u.shape[2] != self.dim:
            raise ValueError(f"u must be (batch, length >= 1, dim) = (*, *, {self.dim}); got {tuple(u.shape)}.")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != u.shape[:2]):
            raise ValueError(
                f"mask must be bool (batch, length) = {tuple(u.shape[:2])}, True where the token is real; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        heard = u if mask is None else u.masked_fill(~mask.unsqueeze(-1), 0)
        if self.kernel_seen._forward_hooks:
            self.kernel(u.shape[1])  # somebody is recording: show the kernel, which blocks can do without
        *shared, C, dt = self.system()
        made: dict[int, list[Tables]] = {}  # block -> the tables of each direction, which have most in common

        def tables(block: int) -> list[Tables]:
            if block not in made:
                made[block] = self._tables(*shared, C.split(self.dim), dt, block)
            return made[block]

        skip = self.skip.to(dt.dtype) if mask is None else torch.zeros_like(dt)  # in the kernel it costs nothing

        def there(block: int) -> Tables:
            first = tables(block)[0]
            return first._replace(kernel=first.kernel + F.pad(skip.unsqueeze(1), (0, block - 1)))

        back = (lambda block: tables(block)[-1]) if self.bidirectional else None
        with torch.autocast(u.device.type, enabled=False):
            y, _ = block_recurrence(heard.to(working_dtype(u, C)), there, back, block=self._block(u.shape[1]))
        return y.to(u.dtype) if mask is None else y.to(u.dtype) + self.skip.to(u.dtype) * u

    def initial_state(self, batch: int) -> Tensor:
        """The state ``(batch, D, N/2)`` before the first step: complex zeros. Its size is the same for any length."""
        self._check_streaming()
        dtype = torch.complex128 if working_dtype(self.C) == torch.float64 else torch.complex64
        return torch.zeros(batch, self.dim, self.state // 2, dtype=dtype, device=self.C.device)

    def step(self, u_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``u_t (B, D)`` and the state give ``y_t (B, D)``, as in the parallel form, and a new state."""
        self._check_streaming()
        if u_t.dim() != 2 or u_t.shape[1] != self.dim:
            raise ValueError(f"u_t must be (batch, dim) = (*, {self.dim}), one time step; got {tuple(u_t.shape)}.")
        y, state = self._steps(u_t.unsqueeze(1).to(working_dtype(self.C)), *self.system(), state)
        return y[:, 0].to(u_t.dtype) + self.skip.to(u_t.dtype) * u_t, state

    def system(self) -> tuple[Tensor, ...]:
        """``A, B, C, dt`` of S4D, ``Lambda, P, B, C, dt`` of S4, ready for the functions above; float32 or better."""
        dtype = working_dtype(self.log_dt)
        eigenvalues = torch.complex(-torch.exp(self.log_real.to(dtype)), self.imag.to(dtype))
        pairs = (getattr(self, name) for name in ("P", "B", "C") if hasattr(self, name))
        vectors = (torch.view_as_complex(each.to(dtype)) for each in pairs)
        return eigenvalues, *vectors, torch.exp(self.log_dt.to(dtype))

    def _check_streaming(self) -> None:
        if self.bidirectional:
            raise ValueError(
                f"A bidirectional {type(self).__name__} needs the future and cannot stream. "
                "Build it with bidirectional=False."
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, state={self.state}, bidirectional={self.bidirectional}"


class S4D(_StateSpace):
    """The diagonal state space with learned A, B, C, dt and a skip: ``y = k * u + skip * u``.

    What follows it in published models (GELU, a linear layer, a gate) belongs to the models.

    Args:
        dim: D, number of channels.
        state: N, real numbers of state a channel (N/2 complex ones are stored).
        kind: how A starts, see :func:`s4d_init`.
        discretization: "zoh" or "bilinear".
        bidirectional: add the same system run from the end, read with a C of its own. Both directions see the present
            (lag 0), as in the EMA; the authors' code lets the backward kernel begin at the next token.
        dt_min, dt_max: dt starts log-uniform between them; memory reaches over about ``1/dt`` steps.

    Parameters: ``log_real, imag (D, N/2)``, ``B (D, N/2, 2)``, ``C (D or 2D, N/2, 2)``, ``log_dt, skip (D,)``. The
    paper calls the skip D.
    """

    def __init__(
        self,
        dim: int,
        state: int = 64,
        kind: str = "lin",
        discretization: str = "zoh",
        bidirectional: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
    ) -> None:
        if discretization not in METHODS:
            raise ValueError(f"discretization must be one of {', '.join(METHODS)}; got {discretization!r}.")
        super().__init__(dim, *s4d_init(kind, state), bidirectional, dt_min, dt_max)
        self.kind, self.discretization = kind, discretization
        self._kernel = partial(s4d_kernel, discretization=discretization)
        self._steps = partial(s4d_recurrent, discretization=discretization)

    def _tables(self, A: Tensor, B: Tensor, Cs: Sequence[Tensor], dt: Tensor, block: int) -> list[Tables]:
        return [s4d_tables(A, B, C, dt, block, self.discretization) for C in Cs]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}, discretization={self.discretization!r}"


class S4(_StateSpace):
    """Full S4: the HiPPO-LegS system itself, diagonal plus rank one, bilinear, with a skip.

    Stored is the true C, and C_tilde is made from it for the length at hand. So every length is exact, and streaming
    needs no preparation. (The published code stores C_tilde for one internal length, which must then be kept with the
    weights and doubled when a longer sequence comes.)

    Args:
        dim, state, bidirectional, dt_min, dt_max: as in :class:`S4D`.

    Parameters: as in :class:`S4D`, and ``P (D, N/2, 2)``; ``A = diag(Lambda) - P P^*`` cannot become unstable.
    """

    def __init__(
        self, dim: int, state: int = 64, bidirectional: bool = False, dt_min: float = 1e-3, dt_max: float = 1e-1
    ) -> None:
        Lambda, P, B, _ = hippo_legs_nplr(state)
        super().__init__(dim, Lambda, B, bidirectional, dt_min, dt_max)
        self.P = nn.Parameter(torch.view_as_real(P).float().repeat(dim, 1, 1))
        self._kernel, self._tables, self._steps = _kernel_of_c, _s4_tables, s4_recurrent

    def _block(self, length: int) -> int:
        return BLOCK if length > 4096 else BLOCK // 2  # every step of its tables is dear


def _kernel_of_c(Lambda: Tensor, P: Tensor, B: Tensor, C: Tensor, dt: Tensor, length: int) -> Tensor:
    size = good_length(length)  # a length the FFT likes; what lies beyond is cut off
    return s4_kernel(Lambda, P, B, tilde_from_c(Lambda, P, C, dt, size), dt, size)[:, :length]


# ---- checks --------------------------------------------------------------------------------------------------------


def _even(N: int) -> None:
    if N < 2 or N % 2:
        raise ValueError(f"wanted an even state size N >= 2, as complex states come in conjugate pairs; got {N}.")


def _check(*vectors: Tensor, dt: Tensor, u: Tensor | None = None, length: int = 1) -> None:
    shapes = {tuple(v.shape) for v in vectors}
    if len(shapes) != 1 or vectors[0].dim() != 2 or not all(v.is_complex() for v in vectors):
        got = [f"{tuple(v.shape)} {v.dtype}".replace("torch.", "") for v in vectors]
        raise ValueError(
            f"eigenvalues and vectors must all be complex (dim, N/2) of one shape; got {', '.join(got)}. "
            "One member of each conjugate pair; expand what is shared by all channels."
        )
    if dt.shape != vectors[0].shape[:1] or dt.is_complex():
        raise ValueError(f"dt must be real (dim,) = ({vectors[0].shape[0]},); got {tuple(dt.shape)} {dt.dtype}.")
    if length < 1:
        raise ValueError(f"wanted length >= 1; got {length}.")
    if u is not None and (u.dim() != 3 or u.shape[1] == 0 or u.shape[2] != vectors[0].shape[0]):
        raise ValueError(
            f"u must be (batch, length >= 1, dim) with dim = {vectors[0].shape[0]} as in A; got {tuple(u.shape)}."
        )
