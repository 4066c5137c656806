"""The multi-dimensional damped exponential moving average (EMA) of Mega.

Each of D channels is expanded to n numbers, each of the n runs an EMA of its own, and a weighted sum brings them
back to one number. With the paper's symbols, for one channel (all of ``alpha, delta, beta, eta`` have n entries)::

    h[t] = (1 - alpha * delta) * h[t-1] + alpha * beta * x[t]          h[-1] = 0
    y[t] = sum(eta * h[t])

Unrolled, y is a convolution of x with ``k[s] = sum(eta * alpha * beta * (1 - alpha * delta)**s)``: one FFT does it. Cut
into blocks that hand on a state, it is a few small matrix products: faster still, and linear in L.

Source: Ma et al., "Mega: Moving Average Equipped Gated Attention", ICLR 2023, section 3.

Paper and published code differ in names: the code's parameter ``delta`` is the logit of the paper's alpha, and its
``alpha`` the logit of the paper's delta. Here the paper's names hold. The code also scales ``eta`` by ``1/sqrt(n)``
and adds a skip term ``omega * x``, which the paper leaves out: :class:`DampedEMA` does both, the functions neither.

Letters: B batch, L length, D channels, n EMA dimensions per channel.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Tables, block_recurrence
from .fft import long_convolution, working_dtype

__all__ = ["DampedEMA", "decay_powers", "ema_blocks", "ema_fft", "ema_kernel", "ema_recurrent", "ema_tables"]


# ---- the slow form -------------------------------------------------------------------------------------------


def ema_recurrent(
    x: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The EMA as its definition says it, one time step after the other.

    Args:
        x: ``(B, L, D)``.
        alpha, delta, beta, eta: ``(D, n)``; alpha and delta already in (0, 1).
        state: ``(B, D, n)``, what an earlier part of the sequence left behind; ``None`` for the beginning.

    Returns:
        ``y (B, L, D)`` and the state ``(B, D, n)`` after the last step, to carry on from.
    """
    _check(x, alpha, delta, beta, eta)
    decay, push = 1 - alpha * delta, alpha * beta  # (D, n) each
    h = x.new_zeros(x.shape[0], *alpha.shape) if state is None else state  # (B, D, n)
    y = []
    for t in range(x.shape[1]):
        h = decay * h + push * x[:, t, :, None]
        y.append((h * eta).sum(-1))  # (B, D)
    return torch.stack(y, dim=1), h


# ---- the fast forms ------------------------------------------------------------------------------------------


def decay_powers(alpha: Tensor, delta: Tensor, exponents: Tensor) -> Tensor:
    """``(1 - alpha * delta) ** exponents`` for alpha, delta ``(D, n)`` and whole exponents ``(K,)``: ``(D, n, K)``.

    Three traps are avoided. ``log1p`` keeps slow decays exact, where ``1 - alpha*delta`` would round to 1. A decay
    that has saturated to exactly 0 still gives ``0**0 = 1`` and no NaN. And powers too small to matter are set to 0:
    left alone they become denormal numbers, which a CPU multiplies many times more slowly.
    """
    tiny = torch.finfo(alpha.dtype).eps / 2
    log_decay = torch.log1p(-(alpha * delta).clamp(max=1 - tiny))  # (D, n), <= 0
    log_power = log_decay.unsqueeze(-1) * exponents.to(alpha.dtype)  # (D, n, K)
    smallest = math.log(torch.finfo(alpha.dtype).tiny) / 2  # half, so that a product of two powers is normal too
    return torch.exp(log_power).masked_fill(log_power < smallest, 0.0)


def ema_kernel(alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, length: int) -> Tensor:
    """What an input of 1 at time 0 leaves behind at times 0 .. length-1.

    ``k[s] = sum over n of eta * alpha * beta * (1 - alpha*delta)**s``. Evaluating every power of every decay would
    take ``D * n * length`` exponentials; writing ``s = a * block + b`` turns it into two short tables of powers and
    one matrix product, since ``q**s = q**(a*block) * q**b``.

    Args:
        alpha, delta, beta, eta: ``(D, n)``; alpha and delta already in (0, 1).
        length: number of lags, at least 1.

    Returns:
        ``(D, length)``, in float32 or better.
    """
    if length < 1:
        raise ValueError(f"ema_kernel wanted length >= 1; got {length}.")
    dtype = working_dtype(alpha, delta, beta, eta)
    with torch.autocast(alpha.device.type, enabled=False):
        alpha, delta, beta, eta = (p.to(dtype) for p in (alpha, delta, beta, eta))
        block = math.isqrt(length - 1) + 1  # sqrt(length), rounded up: both tables equally short
        steps = torch.arange(block, device=alpha.device)
        coarse = decay_powers(alpha, delta, steps * block)  # (D, n, block): powers 0, block, 2 block, ..
        fine = decay_powers(alpha, delta, steps)  # (D, n, block): powers 0, 1, 2, ..
        weight = (eta * alpha * beta).unsqueeze(-1)  # (D, n, 1)
        table = (weight * coarse).transpose(1, 2) @ fine  # (D, a, b)
        return table.flatten(1)[:, :length]


def ema_fft(x: Tensor, alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor) -> Tensor:
    """The EMA as one long convolution: same arguments and same y as :func:`ema_recurrent` from the beginning.

    Costs ``B * D * L log L`` instead of L steps in a row. Returns ``(B, L, D)`` in the dtype of x.
    """
    _check(x, alpha, delta, beta, eta)
    return long_convolution(x, ema_kernel(alpha, delta, beta, eta, x.shape[1]))


def ema_tables(alpha: Tensor, delta: Tensor, beta: Tensor, eta: Tensor, block: int) -> Tables:
    """What the EMA does in a block of steps: see :class:`~longseq_tutorial.mechanisms.blocks.Tables`.

    All come from the powers 0 .. block of the decay ``q``: inputs enter with weight ``alpha * beta`` and have decayed
    until the block ends; the state that entered has decayed t + 1 times when output t reads it with ``eta``.
    """
    powers = decay_powers(alpha, delta, torch.arange(block + 1, device=alpha.device))  # (D, n, C + 1)
    write = (alpha * beta).unsqueeze(-1) * powers[..., :block]
    kernel = (eta.unsqueeze(1) @ write).squeeze(1)  # (D, C)
    read = eta.unsqueeze(-1) * powers[..., 1:]
    return Tables(kernel, read.mT, write.flip(-1), powers[..., block])


def ema_blocks(
    x: Tensor,
    alpha: Tensor,
    delta: Tensor,
    beta: Tensor,
    eta: Tensor,
    state: Tensor | None = None,
    reverse: Sequence[Tensor] | None = None,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The EMA in blocks of steps: same arguments and results as :func:`ema_recurrent`, the state included.

    Costs ``B * D * L * (C + 2n)`` multiplications in matrix products, C = 64 being the block. Unlike an FFT it never
    lets the future touch the past, not even by a rounding error.

    Args:
        reverse: alpha, delta, beta, eta of a second EMA that runs from the end; then there is no state to hand on.
        skip: ``(D,)``, adds ``skip * x`` to y. In the kernel it costs nothing; by itself, several trips through memory.
    """
    _check(x, alpha, delta, beta, eta)
    dtype = working_dtype(x, alpha, delta, beta, eta)
    with torch.autocast(x.device.type, enabled=False):
        there = _tables((alpha, delta, beta, eta), dtype, skip)
        y, state = block_recurrence(x.to(dtype), there, _tables(reverse, dtype) if reverse else None, state)
        return y.to(x.dtype), state


def _tables(coefficients: Sequence[Tensor], dtype: torch.dtype, skip: Tensor | None = None) -> Callable[[int], Tables]:
    alpha, delta, beta, eta = (p.to(dtype) for p in coefficients)

    def make(block: int) -> Tables:
        tables = ema_tables(alpha, delta, beta, eta, block)
        if skip is None:
            return tables
        return tables._replace(kernel=tables.kernel + F.pad(skip.to(dtype).unsqueeze(1), (0, block - 1)))

    return make


# ---- the module ----------------------------------------------------------------------------------------------


class DampedEMA(nn.Module):
    """The damped EMA with learned coefficients and a skip: ``y = ema(x) + omega * x``. Mega puts a SiLU after it.

    Args:
        dim: D, number of channels.
        n: EMA dimensions per channel (the paper uses 16).
        bidirectional: add a second EMA, with coefficients of its own, that runs from the end. Both see the present.
        truncation: cut the kernel after this many lags, as the published configurations do to save time; ``None``
            keeps all of them. A truncated EMA is no recurrence, so it cannot stream.

    Parameters have shape ``(E, n)`` with E = D, or 2D when bidirectional (rows D.. run backwards): ``alpha_logit``,
    ``delta_logit``, ``beta``, ``eta``, and ``omega (D,)``. Initial values as in Mega's published code: a half-life of
    at most a few steps; long memory is learned.
    """

    def __init__(self, dim: int, n: int = 16, bidirectional: bool = False, truncation: int | None = None) -> None:
        super().__init__()
        if dim < 1 or n < 1 or (truncation is not None and truncation < 1):
            raise ValueError(
                f"wanted dim >= 1, n >= 1, truncation >= 1 or None; got dim={dim}, n={n}, truncation={truncation}."
            )
        self.dim, self.n, self.bidirectional, self.truncation = dim, n, bidirectional, truncation
        rows = 2 * dim if bidirectional else dim
        self.alpha_logit = nn.Parameter(torch.empty(rows, n))
        self.delta_logit = nn.Parameter(torch.empty(rows, n))
        self.beta = nn.Parameter(torch.empty(rows, n))
        self.eta = nn.Parameter(torch.empty(rows, n))
        self.omega = nn.Parameter(torch.empty(dim))
        self.kernel_seen = nn.Identity()  # a window for `record`: the kernel passes through unchanged
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as the published code does: beta starts with alternating signs."""
        nn.init.normal_(self.alpha_logit, std=0.2)
        nn.init.normal_(self.delta_logit, std=0.2)
        nn.init.normal_(self.beta, std=0.02)
        with torch.no_grad():
            self.beta[:, 0::2] += 1
            self.beta[:, 1::2] -= 1
        nn.init.normal_(self.eta)
        nn.init.normal_(self.omega)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``alpha, delta, beta, eta``, each ``(E, n)``, ready for the functions above; float32 or better."""
        dtype = working_dtype(self.alpha_logit)
        alpha, delta = torch.sigmoid(self.alpha_logit.to(dtype)), torch.sigmoid(self.delta_logit.to(dtype))
        return alpha, delta, self.beta.to(dtype), self.eta.to(dtype) / math.sqrt(self.n)

    def kernel(self, length: int) -> Tensor:
        """The kernel(s) for a sequence of this length: ``(E, K)``, K = length or the truncation if that is shorter."""
        lags = length if self.truncation is None else min(length, self.truncation)
        return self.kernel_seen(ema_kernel(*self.coefficients(), lags))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D) -> (B, L, D)``. Where ``mask (B, L)`` is False the EMA hears silence."""
        _check_input(x, self.dim, mask)
        heard = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)
        whole = self.truncation is None or self.truncation >= x.shape[1]  # nothing is cut off
        if whole and self.kernel_seen._forward_hooks:
            self.kernel(x.shape[1])  # somebody is recording: show the kernel, which blocks can do without
        if whole:
            coefficients = self.coefficients()
            alpha, delta, beta, eta = (p[: self.dim] for p in coefficients)
            back = [p[self.dim :] for p in coefficients] if self.bidirectional else None
            if mask is None:
                return ema_blocks(x, alpha, delta, beta, eta, reverse=back, skip=self.omega)[0]
            y, _ = ema_blocks(heard, alpha, delta, beta, eta, reverse=back)
        else:  # a kernel cut off is no recurrence
            forwards, backwards = self.kernel(x.shape[1]).tensor_split((self.dim,))
            y = long_convolution(heard, forwards, reverse_kernel=backwards if self.bidirectional else None)
        return y + self.omega.to(x.dtype) * x

    def initial_state(self, batch: int) -> Tensor:
        """The state ``(batch, D, n)`` before the first step: zeros. Its size does not depend on the length."""
        self._check_streaming()
        return torch.zeros(batch, self.dim, self.n, dtype=working_dtype(self.beta), device=self.beta.device)

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``x_t (B, D)`` and the state give ``y_t (B, D)``, as in the parallel form, and a new state."""
        self._check_streaming()
        if x_t.dim() != 2 or x_t.shape[1] != self.dim:
            raise ValueError(f"x_t must be (batch, dim) = (*, {self.dim}), one time step; got {tuple(x_t.shape)}.")
        alpha, delta, beta, eta = self.coefficients()
        state = (1 - alpha * delta) * state + alpha * beta * x_t.unsqueeze(-1).to(beta.dtype)  # (B, D, n)
        y = (state * eta).sum(-1)  # (B, D)
        return y.to(x_t.dtype) + self.omega.to(x_t.dtype) * x_t, state

    def _check_streaming(self) -> None:
        if self.bidirectional:
            raise ValueError(
                "A bidirectional EMA needs the future and cannot stream. Build it with bidirectional=False."
            )
        if self.truncation is not None:
            raise ValueError(
                f"A kernel cut after {self.truncation} lags is no recurrence, so step() could not equal forward(). "
                "Build it with truncation=None."
            )

    def extra_repr(self) -> str:
        return f"{self.dim}, n={self.n}, bidirectional={self.bidirectional}, truncation={self.truncation}"


def _check(x: Tensor, *coefficients: Tensor) -> None:
    shapes = {tuple(c.shape) for c in coefficients}
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length >= 1, dim); got {tuple(x.shape)}.")
    if len(shapes) != 1 or len(next(iter(shapes))) != 2 or next(iter(shapes))[0] != x.shape[2]:
        raise ValueError(
            f"alpha, delta, beta, eta must all be (dim, n) with dim = {x.shape[2]} as in x; got {sorted(shapes)}."
        )


def _check_input(x: Tensor, dim: int, mask: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != dim:
        raise ValueError(f"x must be (batch, length >= 1, dim) = (*, *, {dim}); got {tuple(x.shape)}.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(
            f"mask must be bool (batch, length) = {tuple(x.shape[:2])}, True where the token is real; "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )
