"""FFT positional bias (FastRPB): a learned weight for every distance, applied to the values in ``L log L``.

Attention that knows no positions gets a second, additive term: for each head one number ``w`` per offset, and::

    out[i] = attention(q, k, v)[i] + sum over j of w[i - j] * v[j]

The matrix ``W[i, j] = w[i - j]`` is constant along its diagonals: a *Toeplitz* matrix. It holds ``2L - 1`` different
numbers, and it is a corner of a *circulant* matrix, which the Fourier transform turns into a diagonal one. So the sum
costs two FFTs per channel and no ``L x L`` matrix ever exists. There is no softmax on ``w`` and no normalisation; the
term is added to any attention, quadratic or linear.

Source: Zubkov and Gavrilov, "FastRPB: a Scalable Relative Positional Encoding for Long Sequence Tasks", 2022, known to
us by the authors' published code. Their code has a causal flag without effect in its FFT path; ours has one.

Letters: B batch, L length, H heads, d width of a head. A grid of X rows and Y columns stands for an image.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .devices import at_once
from .fft import circular_convolution, good_length, working_dtype

__all__ = [
    "FastRPB",
    "toeplitz_matrix",
    "toeplitz_product",
    "toeplitz_product_2d",
    "toeplitz_product_2d_dense",
    "toeplitz_product_2d_full",
    "toeplitz_product_2d_full_dense",
    "toeplitz_product_dense",
]

PIECE = 2**17  # numbers to transform at once on a CPU; padding and spectrum make that a few MiB
LAYOUTS = ("sequence", "separable", "full")


# ---- the slow form -------------------------------------------------------------------------------------------


def toeplitz_matrix(lags: Tensor) -> Tensor:
    """The matrix that ``lags (..., 2L-1)`` stand for: ``W[i, j] = lags[(i - j) + L - 1]``, ``(..., L, L)``."""
    if lags.dim() == 0 or lags.shape[-1] % 2 == 0:
        raise ValueError(f"lags must be (..., 2L-1), an odd number of offsets; got {tuple(lags.shape)}.")
    length = (lags.shape[-1] + 1) // 2
    position = torch.arange(length, device=lags.device)
    return lags[..., position[:, None] - position + length - 1]


def toeplitz_product_dense(lags: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """The bias as a product with all ``L * L`` weights written out: the reference, same arguments, same result."""
    _check(lags, v, 1)
    weights = toeplitz_matrix(_past_only(lags) if causal else lags)  # (H, L, L)
    return _dense("hij,bjhd->bihd", weights, v)


def toeplitz_product_2d_dense(lags: Tensor, v: Tensor, lags_y: Tensor | None = None) -> Tensor:
    """The reference for :func:`toeplitz_product_2d`: ``W[(x,y), (x',y')] = lags[x-x'] + lags_y[y-y']`` written out."""
    rows, columns = toeplitz_matrix(lags), toeplitz_matrix(_second_axis(lags, v, lags_y))  # (H, X, X), (H, Y, Y)
    weights = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (H, X, Y, X', Y')
    return _dense("hxyij,bijhd->bxyhd", weights, v)


def toeplitz_product_2d_full_dense(lags: Tensor, v: Tensor) -> Tensor:
    """The reference for :func:`toeplitz_product_2d_full`: ``W[(x,y), (x',y')] = lags[x-x', y-y']`` written out."""
    _check(lags, v, 2)
    x, y = (torch.arange(side, device=v.device) for side in v.shape[1:3])
    dx = x[:, None, None, None] - x[None, None, :, None] + len(x) - 1  # (X, 1, X', 1)
    dy = y[None, :, None, None] - y[None, None, None, :] + len(y) - 1  # (1, Y, 1, Y')
    return _dense("hxyij,bijhd->bxyhd", lags[:, dx, dy], v)


def _dense(equation: str, weights: Tensor, v: Tensor) -> Tensor:
    dtype = working_dtype(weights, v)
    with torch.autocast(v.device.type, enabled=False):
        return torch.einsum(equation, weights.to(dtype), v.to(dtype)).to(v.dtype)


# ---- the fast form -------------------------------------------------------------------------------------------


def toeplitz_product(lags: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """``y[i] = sum over j of w[i - j] * v[j]`` for every head, through the FFT.

    Args:
        lags: ``(H, 2L-1)``, the weight of offset ``i - j`` at index ``(i - j) + L - 1``: index 0 reads the last
            position from the first, the middle one is offset 0.
        v: ``(B, L, H, d)``. All d channels of a head share its weights.
        causal: drop the negative offsets, which read the future.

    Returns:
        ``(B, L, H, d)`` in the dtype of v. The work runs in float32 or better, also under autocast.

    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if v is not floating point.
    """
    _check(lags, v, 1)
    return _sequence_product(_past_only(lags) if causal else lags, v)


def toeplitz_product_2d(lags: Tensor, v: Tensor, lags_y: Tensor | None = None) -> Tensor:
    """The separable bias of an image, as published: ``W[(x,y), (x',y')] = w[x - x'] + w[y - y']``, a *sum*.

    ``w[x-x']`` does not ask for the column, so it meets the sum of the whole row: two short products suffice.

    Args:
        lags: ``(H, 2S-1)``, one vector for both axes of a square image, as the authors have it.
        v: ``(B, S, S, H, d)``; with ``lags_y`` any ``(B, X, Y, H, d)``.
        lags_y: ``(H, 2Y-1)``, a vector of its own for the second axis; lags is then ``(H, 2X-1)``.

    Returns:
        ``(B, X, Y, H, d)`` in the dtype of v.
    """
    lags_y = _second_axis(lags, v, lags_y)
    wide = v.to(working_dtype(lags, lags_y, v))  # sums over a whole row want more than half precision
    rows, columns = _sequence_product(lags, wide.sum(2)), _sequence_product(lags_y, wide.sum(1))  # (B, X or Y, H, d)
    return (rows[:, :, None] + columns[:, None]).to(v.dtype)


def toeplitz_product_2d_full(lags: Tensor, v: Tensor) -> Tensor:
    """Every 2-D offset has a weight of its own: ``W[(x,y), (x',y')] = w[x - x', y - y']``, by a 2-D FFT.

    Such a matrix is called block Toeplitz with Toeplitz blocks. Not in the published system, whose sum cannot tell a
    diagonal neighbour from the rest of its row and column.

    Args:
        lags: ``(H, 2X-1, 2Y-1)``, offset ``(x-x', y-y')`` at index ``(x-x' + X-1, y-y' + Y-1)``.
        v: ``(B, X, Y, H, d)``.

    Returns:
        ``(B, X, Y, H, d)`` in the dtype of v.
    """
    _check(lags, v, 2)
    grid = v.shape[1:3]
    size = [good_length(2 * n - 1) for n in grid]
    with torch.autocast(v.device.type, enabled=False):
        torus = _circle(lags, size, working_dtype(lags, v))
        spectrum = torch.fft.rfft2(torus).unsqueeze(1)  # (H, 1, ..): one for every sequence and channel
        rows = v.to(torus.dtype).movedim((-2, -1), (1, 2))  # (B, H, d, X, Y)
        # Large images a few heads at a time: on a CPU nearer to the caches, anywhere less memory.
        heads = max(1, at_once(v, PIECE) * v.shape[-2] // max(1, v.numel()))
        y = [
            torch.fft.irfft2(torch.fft.rfft2(some, s=size) * waves, s=size)[..., : grid[0], : grid[1]]
            for some, waves in zip(rows.split(heads, dim=1), spectrum.split(heads), strict=True)
        ]
        return torch.cat(y, dim=1).movedim((1, 2), (-2, -1)).to(v.dtype)


def _sequence_product(lags: Tensor, v: Tensor) -> Tensor:
    """The fast product along one axis: lags ``(H, 2L-1)`` and v ``(B, L, H, d)``."""
    size = good_length(2 * v.shape[1] - 1)  # so long that nothing wraps around
    with torch.autocast(v.device.type, enabled=False):
        circle = _circle(lags, [size], working_dtype(lags, v))
        # (B, L, H * d): a kernel for d neighbours
        y = circular_convolution(v.flatten(2).to(circle.dtype), circle, size)
        return y.unflatten(2, v.shape[2:]).to(v.dtype)


def _circle(lags: Tensor, size: list[int], dtype: torch.dtype) -> Tensor:
    """Lags ``(H, 2n-1, ..)`` on circles of ``size`` points: offset 0 comes first, -s lies s steps before the end."""
    offsets = lags.shape[1:]
    room = [zeros for most, points in zip(offsets, size, strict=True) for zeros in (points - most, 0)]
    padded = F.pad(lags.to(dtype), room[::-1])  # wants the last axis first
    return padded.roll([-(most // 2) for most in offsets], tuple(range(1, lags.dim())))


def _past_only(lags: Tensor) -> Tensor:
    """The same lags with 0 for every negative offset."""
    future = lags.shape[-1] // 2
    return F.pad(lags[..., future:], (future, 0))


# ---- the module ----------------------------------------------------------------------------------------------


class FastRPB(nn.Module):
    """The learned positional bias: add its output to that of any attention, before the heads are joined.

    Args:
        heads: H.
        max_length: N, the longest sequence (for images: the longest side) that has a weight for each of its offsets.
            Shorter ones use the offsets around the middle; in longer ones, offsets of N and beyond weigh 0.
        symmetric: one weight per distance, ``w[|i-j|]``, instead of one per offset.
        causal: only the present and the past; sequences only.
        layout: "sequence"; or, for images whose pixels come row after row, "separable" (the published sum of a row
            term and a column term) or "full" (a weight for every 2-D offset).

    The parameter ``weight`` holds, per head, offsets ``-(N-1) .. N-1``: ``(H, 2N-1)``, or ``(H, 2N-1, 2N-1)`` in the
    layout "full". Symmetric or causal, only ``0 .. N-1``. Initial values as in the published code,
    ``1e-5 * a * |offset| + 1e-6 * b`` with ``a ~ U(0, 1)`` and ``b ~ N(0, 1)`` per head: close to nothing. (For "full",
    which is not published, ``|offset|`` is the sum over both axes.)

    The bias hears every token that the mask does not silence, and its sum is not normalised: it grows with the length
    and with the values.
    """

    def __init__(
        self, heads: int, max_length: int, *, symmetric: bool = False, causal: bool = False, layout: str = "sequence"
    ) -> None:
        super().__init__()
        if heads < 1 or max_length < 1:
            raise ValueError(f"FastRPB wanted heads >= 1 and max_length >= 1; got {heads} and {max_length}.")
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}.")
        if causal and layout != "sequence":
            raise ValueError(f"Only a sequence has a past; got causal=True with layout={layout!r}. Drop one of them.")
        self.heads, self.max_length = heads, max_length
        self.symmetric, self.causal, self.layout = symmetric, causal, layout
        axes = 2 if layout == "full" else 1
        offsets = max_length if symmetric or causal else 2 * max_length - 1
        self.weight = nn.Parameter(torch.empty(heads, *[offsets] * axes))
        self.lags_seen = nn.Identity()  # a window for `record`: the lags pass through unchanged
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, almost zero."""
        offset = torch.arange(self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device)
        if not (self.symmetric or self.causal):
            offset = (offset - (self.max_length - 1)).abs()
        if self.layout == "full":
            offset = offset[:, None] + offset
        with torch.no_grad():
            shape = (self.heads, *[1] * offset.dim())
            slope, level = torch.rand(shape).to(self.weight), torch.randn(shape).to(self.weight)
            self.weight.copy_(1e-5 * slope * offset + 1e-6 * level)

    def lags(self, *grid: int) -> Tensor:
        """The weight of every offset on a grid of this size: ``lags(L)`` gives ``(H, 2L-1)``; float32 or better.

        In the layout "full", ``lags(X, Y)`` gives ``(H, 2X-1, 2Y-1)``; in the layout "separable", ``lags(X)`` gives
        those of one axis.
        """
        w = self.weight.to(working_dtype(self.weight))
        room = []  # for F.pad, which wants the last axis first; negative room cuts away
        for axis, length in enumerate(grid, start=1):
            if self.causal:
                w = F.pad(w, (self.max_length - 1, 0))
            elif self.symmetric:
                w = torch.cat([w.narrow(axis, 1, self.max_length - 1).flip(axis), w], dim=axis)
            room += [length - self.max_length] * 2
        return self.lags_seen(F.pad(w, room[::-1]))

    def forward(self, v: Tensor, mask: Tensor | None = None, shape: tuple[int, int] | None = None) -> Tensor:
        """``v (B, L, H, d)`` to ``(B, L, H, d)``. Where ``mask (B, L)`` is False the bias hears silence.

        For images L is X * Y, row after row; ``shape`` is (X, Y), by default a square.
        """
        if v.dim() != 4 or v.shape[1] == 0 or v.shape[2] != self.heads:
            raise ValueError(
                f"v must be (batch, length >= 1, heads, d) = (*, *, {self.heads}, *); got {tuple(v.shape)}."
            )
        if mask is not None and (mask.dtype != torch.bool or mask.shape != v.shape[:2]):
            raise ValueError(
                f"mask must be bool (batch, length) = {tuple(v.shape[:2])}, True where the token is real; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        if shape is not None and self.layout == "sequence":
            raise ValueError(
                f"A sequence has no shape; got shape={shape}. Build FastRPB with layout='separable' or 'full'."
            )
        heard = v if mask is None else v.masked_fill(~mask[:, :, None, None], 0)
        if self.layout == "sequence":
            return toeplitz_product(self.lags(v.shape[1]), heard)
        x, y = self._sides(v.shape[1], shape)
        image = heard.unflatten(1, (x, y))  # (B, X, Y, H, d)
        if self.layout == "full":
            return toeplitz_product_2d_full(self.lags(x, y), image).flatten(1, 2)
        rows = self.lags(x)
        return toeplitz_product_2d(rows, image, None if x == y else self.lags(y)).flatten(1, 2)

    def _sides(self, length: int, shape: tuple[int, int] | None) -> tuple[int, int]:
        x, y = (math.isqrt(length),) * 2 if shape is None else shape
        if x * y != length:
            raise ValueError(f"shape must be (X, Y) with X * Y = length = {length}, or None for a square; got {shape}.")
        return x, y

    def initial_state(self, batch: int) -> Tensor:
        """Silence before the first step: ``(batch, N-1, H, 1)``, the last N-1 values, oldest first.

        The window takes on the values' width with the first step, and then neither it nor the work of a step, N
        products a channel, grows. A free weight per distance has no smaller memory than that.
        """
        if not self.causal:
            raise ValueError("A bias that looks ahead cannot stream. Build it with causal=True.")
        dtype = working_dtype(self.weight)
        return torch.zeros(batch, self.max_length - 1, self.heads, 1, dtype=dtype, device=self.weight.device)

    def step(self, v_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One time step: ``v_t (B, H, d)`` gives ``y_t (B, H, d)``, as in the parallel form, and a new state."""
        if not self.causal:
            raise ValueError("A bias that looks ahead cannot stream. Build it with causal=True.")
        if v_t.dim() != 3 or v_t.shape[1] != self.heads:
            raise ValueError(
                f"v_t must be (batch, heads, d) = (*, {self.heads}, *), one time step; got {tuple(v_t.shape)}."
            )
        window = (v_t.shape[0], self.max_length - 1, self.heads)
        if state.dim() != 4 or state.shape[:3] != window or state.shape[3] not in (1, v_t.shape[2]):
            raise ValueError(
                f"state must be (batch, N-1, heads, d) = {(*window, v_t.shape[2])}, or come from initial_state; "
                f"got {tuple(state.shape)}."
            )
        dtype = working_dtype(self.weight, v_t)
        with torch.autocast(v_t.device.type, enabled=False):
            past = state.to(dtype).expand(-1, -1, -1, v_t.shape[2])
            seen = torch.cat([past, v_t.to(dtype).unsqueeze(1)], dim=1)  # (B, N, H, d), oldest first
            y = torch.einsum("hn,bnhd->bhd", self.weight.to(dtype).flip(-1), seen)
        return y.to(v_t.dtype), seen[:, 1:]

    def extra_repr(self) -> str:
        return (
            f"{self.heads}, {self.max_length}, symmetric={self.symmetric}, causal={self.causal}, layout={self.layout!r}"
        )


# ---- what is refused -----------------------------------------------------------------------------------------


def _check(lags: Tensor, v: Tensor, axes: int) -> None:
    letters = ("L",) if axes == 1 else ("X", "Y")
    if v.dim() != axes + 3 or 0 in v.shape[1:-2]:
        raise ValueError(
            f"v must be (B, {', '.join(letters)}, H, d), at least one position long; got {tuple(v.shape)}. "
            "Heads come after positions here: attention's (B, H, L, d) wants v.transpose(1, 2)."
        )
    if not v.is_floating_point():
        raise TypeError(f"v must be floating point; got {v.dtype}.")
    wanted = (v.shape[-2], *(2 * n - 1 for n in v.shape[1:-2]))
    if lags.shape != wanted:
        raise ValueError(
            f"lags must be (H, {', '.join(f'2{letter}-1' for letter in letters)}) = {wanted} for v {tuple(v.shape)}; "
            f"got {tuple(lags.shape)}."
        )


def _second_axis(lags: Tensor, v: Tensor, lags_y: Tensor | None) -> Tensor:
    """The lags of the second axis, after a look at all shapes."""
    if v.dim() != 5 or 0 in v.shape[1:3] or (lags_y is None and v.shape[1] != v.shape[2]):
        square = "S, S" if lags_y is None else "X, Y"
        raise ValueError(
            f"v must be (B, {square}, H, d), at least one pixel; got {tuple(v.shape)}. "
            "An image that is no square wants a second vector, lags_y (H, 2Y-1)."
        )
    lags_y = lags if lags_y is None else lags_y
    _check(lags, v[:, :, 0], 1)
    _check(lags_y, v[:, 0], 1)
    return lags_y
