"""Mega's single-head gated attention: one attention head, made strong by gates and by the averages it reads.

Ordinary attention uses many heads; here a reset gate multiplies what a single head found, and an update gate decides,
channel by channel, how much of it replaces the input. Queries and keys come from *one* shared narrow projection.
Source: Ma et al., "Mega: Moving Average Equipped Gated Attention", ICLR 2023, section 3.

Letters: B batch, L length, D channels, z width of queries and keys, v width of values. Queries, keys and values may
have any leading axes: ``(..., L, z)`` and ``(..., L, v)``.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .devices import at_once, in_pieces, uncompiled

__all__ = [
    "FUNCTIONS",
    "GatedAttention",
    "GatedUnit",
    "RelativeBias",
    "RotaryBias",
    "attend",
    "attend_in_tiles",
    "attend_slow",
    "attention_weights",
    "laplace",
    "relu2",
]

# The mean and deviation of the Laplace function, with the digits of the published code. The exact values,
# sqrt(1/2) and sqrt(1/(4 pi)), make its value and slope equal to those of relu squared at x = sqrt(1/2).
LAPLACE_MEAN = 0.707107
LAPLACE_STD = 0.282095

FUNCTIONS = ("softmax", "laplace", "relu2")
TILE = 2**18  # scores worked on at once on a CPU: 1 MiB in float32, half of a common second-level cache
FEW = 8  # tiles that a compiler may write out
ROWS = 256  # but at least so many queries: thinner matrix products are slow
STRETCH = 512  # positions whose gates are worked on at once
BiasRows = Callable[[int, int], Tensor]  # the rows first .. last-1 of a bias, (last - first, L)


def laplace(x: Tensor) -> Tensor:
    """The distribution function of a bell curve with mean 0.707107 and deviation 0.282095: between 0 and 1, any shape.

    A bounded stand-in for squared ReLU. (The Mega paper prints sqrt(2) as the point where both meet; there relu2 is
    already 2 and this at most 1. They meet at sqrt(1/2).)
    """
    return 0.5 * (1 + torch.erf((x - LAPLACE_MEAN) / (LAPLACE_STD * math.sqrt(2))))


def relu2(x: Tensor) -> Tensor:
    """``max(x, 0) ** 2``, any shape."""
    return F.relu(x).square()


# ---- attention: the slow form and the matrix form --------------------------------------------------------------


def attend_slow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    function: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    on_weights: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention one query at a time, over the keys it may see. The reference for :func:`attend`; same arguments.

    ``on_weights`` is applied to the matrix of weights, as in :func:`attend`.
    """
    _check(q, k, v, function, bias, mask)
    length, keys = q.shape[-2], k.shape[-2]
    rows = []
    pairs = torch.ones((), dtype=torch.bool, device=q.device) if mask is None else _each_pair(mask, q)
    pairs = pairs.expand(*q.shape[:-1], keys)
    for i in range(length):
        visible = pairs[..., i, :].clone()
        if causal:
            visible[..., i + 1 :] = False
        score = (q[..., i, None, :] * k).sum(-1)  # (..., L): query i against every key
        offset = 0.0 if bias is None else bias[..., i, :]
        if function == "softmax":
            nothing = ~visible.any(-1, keepdim=True)  # only padding in sight: see attention_weights
            seen = visible | (nothing & (torch.arange(keys, device=q.device) <= (i if causal else keys)))
            power = torch.exp(score / math.sqrt(q.shape[-1]) + offset).masked_fill(~seen, 0.0)
            row = power / power.sum(-1, keepdim=True)
        else:
            count = visible.sum(-1, keepdim=True).clamp(min=1)
            squash = laplace if function == "laplace" else relu2
            row = squash(score / count + offset).masked_fill(~visible, 0.0)
        rows.append(row)
    weights = torch.stack(rows, dim=-2)  # (..., L, L)
    if on_weights is not None:
        weights = on_weights(weights)
    return torch.stack([(weights[..., i, :, None] * v).sum(-2) for i in range(length)], dim=-2)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    function: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """How much each query reads from each key.

    * softmax: ``softmax(q k^T / sqrt(z) + bias)`` over the visible keys.
    * laplace, relu2: ``f(q k^T / count + bias)``, where count is the number of keys the query sees (at least 1); these
      weights are *not* normalised. Hidden keys are set to 0 *after* the function, since ``laplace(0) > 0``.

    Args:
        q, k: ``(..., L, z)``.
        function: "softmax", "laplace" or "relu2".
        bias: ``(L, L)`` or anything that broadcasts to the scores, added after scaling; row = query, column = key.
        mask: bool ``(..., L)``, True where the key is real; or one answer for each pair of query and key, with as many
            axes as the scores. Then there may be more or fewer keys, k ``(..., K, z)`` and the mask ``(..., L, K)``.
        causal: query i sees keys 0 .. i only.

    Returns:
        ``(..., L, L)``, or ``(..., L, K)``, in the dtype of q. Scores and softmax run in float32 or better. A query
        that would see nothing but padding attends to the padding under softmax (weights have to sum to 1); only
        padding comes into that.
    """
    _check(q, k, None, function, bias, mask)
    length = q.shape[-2]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if causal else None
    return _weights(q, k, function, bias, None if mask is None else _each_pair(mask, q), past)


def _weights(
    q: Tensor, k: Tensor, function: str, bias: Tensor | None, visible: Tensor | None, past: Tensor | None
) -> Tensor:
    """See :func:`attention_weights`; visible ``(..., 1 or L, K)`` are real keys, past ``(L, K)`` those not ahead."""
    visible = _in_sight(visible, past, function)  # (..., 1 or L, K)
    whole = q.dtype in (torch.float32, torch.float64)
    if function == "softmax" and whole:
        q = q / math.sqrt(q.shape[-1])  # fewer numbers to divide than scores; in half precision it would round them
    scores = q @ k.transpose(-1, -2)  # (..., L, K)
    wide = scores if scores.dtype == torch.float64 else scores.float()

    if function == "softmax":
        wide = wide if whole else wide / math.sqrt(q.shape[-1])
        if bias is not None:
            wide += bias  # fresh numbers, of which no gradient has need: they can be written over
        if visible is not None:
            wide.masked_fill_(~visible, -torch.inf)
        return torch.softmax(wide, dim=-1).to(q.dtype)

    if visible is None:
        wide = wide / k.shape[-2]
    else:
        wide = wide / visible.sum(-1, keepdim=True).clamp(min=1)
    wide = wide if bias is None else wide + bias
    weights = laplace(wide) if function == "laplace" else relu2(wide)
    if visible is not None:
        weights = weights.masked_fill(~visible, 0.0)
    return weights.to(q.dtype)


def _in_sight(visible: Tensor | None, past: Tensor | None, function: str) -> Tensor | None:
    """Which pairs count; under softmax, rows with nothing real in sight drop the padding mask."""
    if visible is None or past is None:
        both = past if visible is None else visible
    else:
        both = visible & past
    if visible is None or both is None or function != "softmax":
        return both
    everything = ~both.any(-1, keepdim=True)
    return both | (everything if past is None else everything & past)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    function: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    on_weights: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Full attention with matrix products: ``attention_weights(q, k) @ v``.

    On a CPU the functions that are not softmax take :class:`_Tiles`, which computes just that with less traffic.

    Args:
        q, k, function, bias, mask, causal: see :func:`attention_weights`.
        v: ``(..., L, v)``.
        on_weights: applied to the weights before they meet the values: dropout, or somebody looking.

    Returns:
        ``(..., L, v)``.
    """
    _check(q, k, v, function, bias, mask)
    if on_weights is None and function != "softmax" and _in_place(q, k, v, bias):
        return _written_out(q, k, v, function, bias, mask, causal)
    weights = attention_weights(q, k, function=function, bias=bias, mask=mask, causal=causal)
    return (weights if on_weights is None else on_weights(weights)) @ v


def attend_in_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    function: str = "softmax",
    bias: Tensor | BiasRows | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    on_weights: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The same as :func:`attend`, a tile of queries at a time: time still grows like ``L**2``, memory only like L.

    A tile of scores is made, used and forgotten while it is in the processor's cache; the backward pass makes it once
    more. Softmax without a bias, where queries and values are equally wide, is torch's own fused call, which works like
    this too; with zeros that make them equally wide on a GPU.

    Args:
        bias: as in :func:`attend`. Or, so that the square never exists: a number for each distance, ``(2L - 1,)``, key
            j minus query i at index ``(j - i) + L - 1``; or a function ``(first, last) -> (last - first, L)`` that
            gives some rows.
        on_weights: wants to see the weights, so all of them are made: the call goes to :func:`attend`.
    """
    length = q.shape[-2]
    rows = max(1, at_once(q, TILE) // max(1, q[..., 0].numel()))
    square, rows_of = (None, bias) if callable(bias) else (bias, None)
    if square is not None and square.shape == (2 * length - 1,):
        rows_of, square = partial(_laid_out, square), None
    if on_weights is not None or rows >= length or (mask is not None and mask.dim() == q.dim()):
        square = rows_of(0, length) if rows_of else square
        return attend(q, k, v, function=function, bias=square, mask=mask, causal=causal, on_weights=on_weights)
    _check(q, k, v, function, square, mask)
    # To make queries as wide as the values, as the fused kernel wants it, costs more on a CPU than the kernel saves.
    alike = q.shape[-1] == v.shape[-1] or q.device.type != "cpu"
    if function == "softmax" and bias is None and (mask is None or not causal) and alike:
        return _fused(q, k, v, mask, causal)
    if not callable(bias) and _in_place(q, k, v, bias):
        return _written_out(q, k, v, function, bias, mask, causal)

    def tile(first: int, last: int) -> Tensor:
        keys = last if causal else length  # keys in sight of these queries
        past = torch.ones(last - first, keys, dtype=torch.bool, device=q.device).tril(first) if causal else None
        real = None if mask is None else mask[..., None, :keys]
        some = rows_of(first, last) if rows_of else None if square is None else square[..., first:last, :]
        some = None if some is None else some[..., :keys]
        return _weights(q[..., first:last, :], k[..., :keys, :], function, some, real, past) @ v[..., :keys, :]

    bounds = [(first, min(first + rows, length)) for first in range(0, length, rows)]

    def tiles() -> Tensor:
        if not torch.is_grad_enabled():
            return torch.cat([tile(*b) for b in bounds], dim=-2)
        return torch.cat([checkpoint(tile, *b, use_reentrant=False, preserve_rng_state=False) for b in bounds], dim=-2)

    # A compiler writes the work of every tile anew. Where there are many that takes minutes, and gains nothing.
    return (uncompiled(tiles) if len(bounds) > FEW else tiles)()


# ---- tiles with a written backward pass ------------------------------------------------------------------------


def _in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether :class:`_Tiles` can do it: on a CPU, in one dtype that needs no rounding, one bias for all."""
    return _exact(q, k, v) and (bias is None or bias.dim() == 1 or bias.numel() == q.shape[-2] * k.shape[-2])


def _exact(*tensors: Tensor) -> bool:
    """All on a CPU and in one dtype that needs no rounding."""
    alike = {t.dtype for t in tensors} in ({torch.float32}, {torch.float64})
    return alike and in_pieces(tensors[0]) and not torch.is_autocast_enabled("cpu")


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, function: str, bias: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor:
    """:func:`attend` by :class:`_Tiles`: all leading axes as one."""
    length, keys = q.shape[-2], k.shape[-2]
    if bias is not None:
        bias = (bias if bias.dim() == 1 else bias.reshape(length, keys)).to(q.dtype)
    if mask is not None:
        mask = (
            _each_pair(mask, q).expand(*q.shape[:-2], -1, -1).reshape(-1, length if mask.dim() == q.dim() else 1, keys)
        )
    flat = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    return _Tiles.apply(*flat, bias, mask, function, causal).view(*q.shape[:-1], v.shape[-1])


class _Tiles(torch.autograd.Function):
    """Attention of n sequences: several short ones at a time, or some queries of a long one.

    q ``(n, L, z)``, k ``(n, K, z)``, v ``(n, K, v)``, bias ``(L, K)`` or, a number for each distance, ``(2L - 1,)``,
    mask ``(n, 1 or L, K)``. Nothing of size L * K is kept: backward makes each tile once more. Everything happens in
    two tiles of memory, since new memory costs more than the arithmetic; the bias of a tile is laid out once for all
    sequences. With W the weights, f the function of the scores S, and c the count that divides them::

        dV = W^T dY      dW = dY V^T      dS = dW f'(S)      dQ = dS K / c      dK = dS^T Q / c
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        function: str,
        causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, mask)
        ctx.how = function, causal
        y = v.new_empty(*q.shape[:2], v.shape[-1])
        for at in _tiles(q, k, bias, causal):
            torch.bmm(_weigh(q, k, mask, function, at).weights, v[at.some, at.keys], out=y[at.some, at.rows])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, mask = ctx.saved_tensors
        function, causal = ctx.how
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
        d_bias = None if bias is None else torch.zeros_like(bias)
        for at in _tiles(q, k, bias, causal):
            tile = _weigh(q, k, mask, function, at)
            some, rows, keys = at.some, at.rows, at.keys
            if rows.start == 0:  # what this tile does not write, the next ones add to
                dk[some, keys.stop :], dv[some, keys.stop :] = 0, 0
            add = int(rows.start > 0)
            dv[some, keys].baddbmm_(tile.weights.mT, dy[some, rows], beta=add)
            d_scores = _through(function, tile, torch.bmm(dy[some, rows], v[some, keys].mT, out=tile.free))
            if d_bias is not None:
                if some.start == 0:
                    d_rows = d_bias[rows, keys] if at.spare is None else at.spare.zero_()
                for one in d_scores:
                    d_rows += one
                if some.stop == len(q) and at.spare is not None:
                    for i, row in enumerate(d_rows, rows.start):
                        _row(d_bias, i, keys.stop).add_(row)
            dk[some, keys].baddbmm_(d_scores.mT, tile.scaled, beta=add)
            dq[some, rows] = torch.bmm(d_scores, k[some, keys]).div_(tile.divisor)
        return dq, dk, dv, d_bias, None, None, None


class _Where(NamedTuple):
    """Some sequences, some of their queries and the keys in sight."""

    some: slice
    rows: slice
    keys: slice
    past: Tensor | None  # if only the past is in sight
    bias: Tensor | None
    memory: list[Tensor]  # for two tiles of scores
    spare: Tensor | None  # for the gradient of a bias that had to be laid out


class _Weighed(NamedTuple):
    weights: Tensor
    kept: Tensor  # what the slope of the function is read from
    free: Tensor  # memory to write on, once the weights are used
    scaled: Tensor  # the queries, divided by the count
    divisor: Tensor | float  # the count


def _tiles(q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> Iterator[_Where]:
    """Whole sequences as long as they are short, else rows of one: the same rows of every sequence in turn."""
    (n, length), keys = q.shape[:2], k.shape[1]
    many, most = max(1, min(n, TILE // (length * keys))), min(length, max(ROWS, TILE // keys))
    line = bias is not None and bias.dim() == 1
    memory = [q.new_empty(many * most * keys) for _ in range(4 if line else 2)]
    for first in range(0, length, most):
        rows = slice(first, min(first + most, length))
        seen = slice(0, rows.stop if causal else keys)
        size = rows.stop - first, seen.stop
        past = torch.ones(size, dtype=torch.bool).tril(first) if causal else None
        offset = spare = None
        if bias is not None and line:
            offset, spare = (m[: math.prod(size)].view(size) for m in memory[2:])
            torch.stack([_row(bias, i, seen.stop) for i in range(first, rows.stop)], out=offset)
        elif bias is not None:
            offset = bias[rows, seen]
        for b in range(0, n, many):
            some = slice(b, min(b + many, n))
            shape = some.stop - b, *size
            tiles = [m[: math.prod(shape)].view(shape) for m in memory[:2]]
            yield _Where(some, rows, seen, past, offset, tiles, spare)


def _weigh(q: Tensor, k: Tensor, mask: Tensor | None, function: str, at: _Where) -> _Weighed:
    """The weights of one tile, as in :func:`_weights`."""
    visible = None if mask is None else mask[at.some, at.rows if mask.shape[1] > 1 else slice(None), at.keys]
    visible = _in_sight(visible, at.past, function)
    count: Tensor | float = k.shape[1]
    if function == "softmax":
        count = math.sqrt(q.shape[-1])
    elif visible is not None:
        count = visible.sum(-1, keepdim=True).clamp(min=1)
    scaled, keys, (scores, other) = q[at.some, at.rows] / count, k[at.some, at.keys].mT, at.memory
    if at.bias is None:
        torch.bmm(scaled, keys, out=scores)
    else:
        torch.baddbmm(at.bias, scaled, keys, out=scores)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)  # where all three functions are 0, and flat
    if function == "softmax":
        weights = torch.softmax(scores, dim=-1, out=other)
        return _Weighed(weights, weights, scores, scaled, count)
    if function == "laplace":
        scores.sub_(LAPLACE_MEAN).mul_(1 / (LAPLACE_STD * math.sqrt(2)))
        weights = torch.erf(scores, out=other).add_(1).mul_(0.5)
    else:
        weights = torch.square(scores.relu_(), out=other)
    return _Weighed(weights, scores, weights, scaled, count)


def _through(function: str, tile: _Weighed, d_weights: Tensor) -> Tensor:
    """The gradient of the scores from that of the weights; both are overwritten."""
    if function == "softmax":
        d_weights.sub_(torch.einsum("nij,nij->ni", d_weights, tile.weights).unsqueeze(-1))
        return d_weights.mul_(tile.weights)
    if function == "laplace":
        slope = tile.kept.square_().neg_().exp_().mul_(1 / (LAPLACE_STD * math.sqrt(2 * math.pi)))
        return d_weights.mul_(slope)
    return d_weights.mul_(tile.kept.mul_(2))


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Torch's fused softmax attention; its lean kernel on a CPU wants four axes and one width."""
    shape, scale = v.shape, 1 / math.sqrt(q.shape[-1])
    width = max(q.shape[-1], v.shape[-1])
    q, k, v = (F.pad(x, (0, width - x.shape[-1])).flatten(0, -3).unsqueeze(1) for x in (q, k, v))  # (B.., 1, L, width)
    visible = None
    if mask is not None:
        visible = (mask | ~mask.any(-1, keepdim=True)).flatten(0, -2)[:, None, None, :]  # (B.., 1, 1, L)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=causal, scale=scale)
    return y[..., : shape[-1]].reshape(shape)


# ---- a bias that depends on the distance alone -----------------------------------------------------------------


def _laid_out(line: Tensor, first: int, last: int) -> Tensor:
    """The rows first .. last-1 of the square ``bias[i, j] = line[(j - i) + L - 1]``, from line ``(2L - 1,)``."""
    length = (len(line) + 1) // 2
    # Windows of the line, one step apart: the first one is the row of the last query. (Only what is contiguous is
    # flipped row by row in memory too: else torch would lay the result out by columns, and all that reads it is slow.)
    return line[length - last : 2 * length - 1 - first].unfold(0, length, 1).contiguous().flip(0)


def _row(line: Tensor, i: int, keys: int) -> Tensor:
    """Row i of that square, as far as key ``keys - 1``: a view of the line."""
    start = (len(line) - 1) // 2 - i
    return line[start : start + keys]


# ---- positions -------------------------------------------------------------------------------------------------


class RelativeBias(nn.Module):
    """A learned number for every distance: ``bias[i, j] = table[(j - i) + P - 1]``, i the query, j the key.

    Args:
        max_positions: P; the table holds offsets -(P-1) .. P-1. Offsets beyond share the last value at their end.
    """

    def __init__(self, max_positions: int) -> None:
        super().__init__()
        if max_positions < 1:
            raise ValueError(f"RelativeBias wanted max_positions >= 1; got {max_positions}.")
        self.max_positions = max_positions
        self.table = nn.Parameter(torch.empty(2 * max_positions - 1))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, length: int) -> Tensor:
        """The bias ``(length, length)``, row = query, column = key."""
        return self.rows(0, length, length)

    def distances(self, length: int) -> Tensor:
        """What a key adds at each distance from its query, -(length-1) .. length-1: ``(2 * length - 1,)``."""
        beyond = max(0, length - self.max_positions)
        first, last = self.table[:1].expand(beyond), self.table[-1:].expand(beyond)
        here = self.max_positions - 1 + beyond  # the index of distance 0
        return torch.cat([first, self.table, last])[here - length + 1 : here + length]

    def rows(self, first: int, last: int, length: int) -> Tensor:
        """What the queries first .. last-1 add to the keys 0 .. length-1: ``(last - first, length)``."""
        return _laid_out(self.distances(length), first, last)

    def row(self, i: int) -> Tensor:
        """Row i of the bias up to the diagonal, ``(i + 1,)``: what query i adds to keys 0 .. i."""
        return self.distances(i + 1)[: i + 1]


class RotaryBias(nn.Module):
    """A bias from two learned vectors, turned by an angle that grows with the position: ``<R_i alpha, R_j beta>``.

    It depends on ``j - i`` alone and has no largest length. It is a bias, added to the scores: unlike RoPE it leaves
    queries and keys as they are. Pairs are (a, a + z/2), with angle ``position * 10000**(-a / (z/2))``. Source: Mega's
    published code, used for its language models.

    Args:
        dim: z, even.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"RotaryBias wanted an even dim >= 2, since it turns pairs; got {dim}.")
        self.alpha = nn.Parameter(torch.empty(dim))
        self.beta = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.alpha, std=0.02)
        nn.init.normal_(self.beta, std=0.02)

    def forward(self, length: int) -> Tensor:
        """The bias ``(length, length)``."""
        return self.rows(0, length, length)

    def distances(self, length: int) -> Tensor:
        """What a key adds at each distance from its query, -(length-1) .. length-1: ``(2 * length - 1,)``."""
        distance = torch.arange(1 - length, length, device=self.alpha.device)
        return self._rotate(self.beta, distance) @ self.alpha  # turning both alike changes nothing: only j - i is left

    def rows(self, first: int, last: int, length: int) -> Tensor:
        """What the queries first .. last-1 add to the keys 0 .. length-1: ``(last - first, length)``."""
        position = torch.arange(length, device=self.alpha.device)
        return self._rotate(self.alpha, position[first:last]) @ self._rotate(self.beta, position).T

    def row(self, i: int) -> Tensor:
        """Row i of the bias up to the diagonal, ``(i + 1,)``."""
        position = torch.arange(i + 1, device=self.alpha.device)
        return self._rotate(self.beta, position) @ self._rotate(self.alpha, position[-1:])[0]

    @staticmethod
    def _rotate(x: Tensor, position: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        pair = torch.arange(half, device=x.device, dtype=x.dtype)
        angle = position.to(x.dtype).unsqueeze(-1) * 10000.0 ** (-pair / half)  # (positions, z/2)
        cos, sin = angle.cos(), angle.sin()
        first, second = x[:half], x[half:]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)  # (positions, z)


# ---- the unit ----------------------------------------------------------------------------------------------------


class GatedUnit(nn.Module):
    """The gates of Mega's unit around any attention: :class:`GatedAttention`, and LongVQ's layer. With s the smoothed
    input and O what attention found::

        H = silu(s W_h + (O * silu(s W_r)) U_h)             candidate: the reset gate picks from what attention found
        Y = u * H + (1 - u) * residual,   u = sigmoid(s W_u)    update gate: how much of it to take

    A subclass makes the parts.
    """

    widths: list[int]  # of the update gate, the shared z, the reset gate and the candidate: D, z, v, D
    mx_proj: nn.Linear  # all four of them, (B, L, D) -> (B, L, D + z + v + D)
    h_proj: nn.Linear  # U_h
    dropout: nn.Dropout  # on the candidate
    update_gate: nn.Identity  # windows for `record`
    reset_gate: nn.Identity

    def _projections(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of the update gate, of the shared z, of the reset gate and of the candidate.

        A product for each: one for all, cut apart, would have to be pieced together again in the backward pass.
        """
        return list(zip(self.mx_proj.weight.split(self.widths), self.mx_proj.bias.split(self.widths), strict=True))

    def _gates(self, smooth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        update, _, reset, candidate = self._projections()
        u, r, c = (F.linear(smooth, *projection) for projection in (update, reset, candidate))
        return self.update_gate(torch.sigmoid(u)), self.reset_gate(F.silu(r)), c

    def _gated(self, smooth: Tensor, residual: Tensor, found: Tensor) -> Tensor:
        """What is made of that which attention found: ``(B, L, D)``."""
        plain = self.h_proj._forward_hooks or self.h_proj._forward_pre_hooks  # who hooks into h_proj wants it called
        if plain or not _exact(smooth, residual, found, self.h_proj.bias):
            u, r, c = self._gates(smooth)
            h = self.dropout(F.silu(c + self.h_proj(found * r)))
            return residual + u * (h - residual)
        if self.update_gate._forward_hooks or self.reset_gate._forward_hooks:  # somebody is recording
            with torch.no_grad():
                self._gates(smooth)
        keep = self.dropout(torch.ones_like(residual)) if self.training and self.dropout.p > 0 else None
        inputs = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (smooth, residual, found, keep))
        update, _, reset, candidate = self._projections()
        parameters = *update, *reset, *candidate, self.h_proj.weight, self.h_proj.bias
        return _Gates.apply(*inputs, *parameters).view(residual.shape)


class GatedAttention(GatedUnit):
    """The gated attention unit of Mega. With x the input and s a smoothed copy of it (Mega: its EMA)::

        Z = silu(s W_z)      Q = Z * kappa_q + mu_q      K = Z * kappa_k + mu_k      V = silu(x W_v)
        O = attention(Q, K, V)                              one head
        H = silu(s W_h + (O * silu(s W_r)) U_h)             candidate: the reset gate picks from what attention found
        Y = u * H + (1 - u) * residual,   u = sigmoid(s W_u)    update gate: how much of it to take

    Args:
        dim, z_dim, v_dim: D, width of queries and keys, width of values.
        function: "softmax", "laplace" or "relu2".
        bias: "simple" (:class:`RelativeBias`, holding ``max_positions``) or "rotary" (:class:`RotaryBias`).
        max_positions: distances the simple bias can tell apart; with chunks, the chunk length.
        causal: look at the past and the present only.
        dropout, attention_dropout, hidden_dropout: on the candidate, on the weights, on the values.
        attend: how to attend, :func:`attend_in_tiles` or a function with the arguments of :func:`attend` that sees less
            than everything, such as chunk attention.
        chunk: the length of the blocks ``attend`` keeps apart, or None; streaming needs to know it.

    ``forward(x)`` alone is the unit without an EMA: ``smooth`` and ``residual`` default to x.
    """

    def __init__(
        self,
        dim: int,
        z_dim: int,
        v_dim: int,
        *,
        function: str = "softmax",
        bias: str = "simple",
        max_positions: int = 1024,
        causal: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        attend: Callable[..., Tensor] = attend_in_tiles,
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        if min(dim, z_dim, v_dim) < 1:
            raise ValueError(f"GatedAttention wanted positive widths; got dim={dim}, z_dim={z_dim}, v_dim={v_dim}.")
        if function not in FUNCTIONS:
            raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}; got {function!r}.")
        if bias not in ("simple", "rotary"):
            raise ValueError(f"bias must be 'simple' or 'rotary'; got {bias!r}.")
        self.dim, self.z_dim, self.v_dim = dim, z_dim, v_dim
        self.widths = [dim, z_dim, v_dim, dim]
        self.function, self.causal, self.chunk, self.attend = function, causal, chunk, attend
        self.v_proj = nn.Linear(dim, v_dim)
        self.mx_proj = nn.Linear(dim, sum(self.widths))
        self.h_proj = nn.Linear(v_dim, dim)
        self.kappa = nn.Parameter(torch.empty(2, z_dim))  # row 0 makes the query from Z, row 1 the key
        self.mu = nn.Parameter(torch.zeros(2, z_dim))
        self.bias: RelativeBias | RotaryBias = RelativeBias(max_positions) if bias == "simple" else RotaryBias(z_dim)
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        # Windows for `record`: tensors pass through them unchanged.
        self.weights, self.update_gate, self.reset_gate = nn.Identity(), nn.Identity(), nn.Identity()
        for linear in (self.v_proj, self.mx_proj, self.h_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.kappa, std=0.02)

    def forward(
        self, x: Tensor, smooth: Tensor | None = None, residual: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """All ``(B, L, D)``, mask ``(B, L)`` bool with True = real; returns ``(B, L, D)``."""
        if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] != self.dim:
            raise ValueError(f"x must be (batch, length >= 1, dim) = (*, *, {self.dim}); got {tuple(x.shape)}.")
        smooth = x if smooth is None else smooth
        residual = x if residual is None else residual
        q, k = self._queries_and_keys(smooth)
        v = self.hidden_dropout(F.silu(self.v_proj(x)))  # (B, L, v)
        length = q.shape[1]
        # Full attention lays the bias out as it needs it; others want a square.
        full = self.attend is attend_in_tiles
        bias = self.bias.distances(length) if full else self.bias(min(length, self.chunk or length))
        look = partial(self.attend, q, k, v, function=self.function, bias=bias, mask=mask, causal=self.causal)
        if self.weights._forward_hooks:  # somebody is recording: show the weights beside, so that nothing changes
            with torch.no_grad():
                look(on_weights=self.weights)
        dropping = self.training and self.attention_dropout.p > 0
        found = look(on_weights=self.attention_dropout if dropping else None)  # (B, L, v)
        return self._gated(smooth, residual, found)

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """Empty caches of keys ``(batch, 0, z)`` and values ``(batch, 0, v)``, and the position 0.

        They grow by one a step: full attention has to remember everything. With chunks they are emptied at each border
        and never hold more than a chunk.
        """
        if not self.causal:
            raise ValueError("Attention that looks ahead cannot stream. Build it with causal=True.")
        like = self.mu
        return {"k": like.new_zeros(batch, 0, self.z_dim), "v": like.new_zeros(batch, 0, self.v_dim)}

    def step(
        self,
        x_t: Tensor,
        state: dict[str, Tensor],
        smooth_t: Tensor | None = None,
        residual_t: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One time step, all ``(B, D)``; equal to the parallel form. Returns ``y_t (B, D)`` and the new caches."""
        smooth_t = x_t if smooth_t is None else smooth_t
        residual_t = x_t if residual_t is None else residual_t
        q, k = self._queries_and_keys(smooth_t.unsqueeze(1))
        v = self.hidden_dropout(F.silu(self.v_proj(x_t.unsqueeze(1))))
        if self.chunk is not None and state["k"].shape[1] == self.chunk:  # a new chunk begins: forget the last
            state = {name: cache[:, :0] for name, cache in state.items()}
        keys = torch.cat([state["k"].to(k.dtype), k], dim=1)  # (B, seen, z)
        values = torch.cat([state["v"].to(v.dtype), v], dim=1)
        seen = keys.shape[1]
        scores = q @ keys.transpose(1, 2)  # (B, 1, seen)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        wide = wide / (math.sqrt(self.z_dim) if self.function == "softmax" else seen) + self.bias.row(seen - 1)
        if self.function == "softmax":
            weights = torch.softmax(wide, dim=-1)
        else:
            weights = laplace(wide) if self.function == "laplace" else relu2(wide)
        found = self.attention_dropout(self.weights(weights.to(v.dtype))) @ values  # (B, 1, v)
        y = self._gated(smooth_t.unsqueeze(1), residual_t.unsqueeze(1), found)
        return y.squeeze(1), {"k": keys, "v": values}

    def _queries_and_keys(self, smooth: Tensor) -> tuple[Tensor, Tensor]:
        shared = F.silu(F.linear(smooth, *self._projections()[1]))  # (B, L, z)
        q, k = (shared * self.kappa[i] + self.mu[i] for i in (0, 1))
        return q, k

    def extra_repr(self) -> str:
        return f"function={self.function!r}, causal={self.causal}, chunk={self.chunk}"


# ---- the gates with a written backward pass ----------------------------------------------------------------------


class _Gates(torch.autograd.Function):
    """What follows the attention, some positions at a time; s the smoothed input, X the residual, O what was found::

        u = sigmoid(s W_u)      R = s W_r      C = s W_h + (O * silu(R)) U_h      Y = X + u * (silu(C) - X)

    One operation after the other makes a dozen tensors as long as the sequence, each written and read again. Here three
    are kept, u, R and C; everything else lives and dies in the processor's cache. All ``(N, width)``; keep ``(N, D)``,
    of dropout, multiplies silu(C).
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, x: Tensor, found: Tensor, keep: Tensor | None, *parameters: Tensor) -> Tensor:
        w_u, b_u, w_r, b_r, w_c, b_c, w_h, b_h = parameters
        u, c, y = (torch.empty_like(x) for _ in range(3))
        r = torch.empty_like(found)
        for at in _stretches(x):
            torch.addmm(b_u, s[at], w_u.T, out=u[at]).sigmoid_()
            torch.addmm(b_r, s[at], w_r.T, out=r[at])
            torch.addmm(b_c + b_h, s[at], w_c.T, out=c[at]).addmm_(F.silu(r[at]).mul_(found[at]), w_h.T)
            h = F.silu(c[at]) if keep is None else F.silu(c[at]).mul_(keep[at])
            torch.lerp(x[at], h, u[at], out=y[at])
        ctx.save_for_backward(s, x, found, keep, w_u, w_r, w_c, w_h, u, r, c)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        s, x, found, keep, w_u, w_r, w_c, w_h, u, r, c = ctx.saved_tensors
        ds, dx, d_found = (torch.empty_like(t) for t in (s, x, found))
        d_wu, d_wr, d_wc, d_wh = (torch.zeros_like(w) for w in (w_u, w_r, w_c, w_h))
        d_bu, d_br, d_bc = (w.new_zeros(len(w)) for w in (w_u, w_r, w_c))
        sigmoid_backward, silu_backward = torch.ops.aten.sigmoid_backward, torch.ops.aten.silu_backward
        for at in _stretches(x):
            reset, h, d_h = F.silu(r[at]), F.silu(c[at]), dy[at] * u[at]
            torch.sub(dy[at], d_h, out=dx[at])
            if keep is not None:
                h, d_h = h.mul_(keep[at]), d_h.mul_(keep[at])
            d_u = sigmoid_backward(h.sub_(x[at]).mul_(dy[at]), u[at])
            d_c = silu_backward(d_h, c[at])
            d_gated = d_c @ w_h
            torch.mul(d_gated, reset, out=d_found[at])
            d_r = silu_backward(d_gated.mul_(found[at]), r[at])
            torch.mm(d_u, w_u, out=ds[at]).addmm_(d_r, w_r).addmm_(d_c, w_c)
            for d_weight, d_bias, d in zip((d_wu, d_wr, d_wc), (d_bu, d_br, d_bc), (d_u, d_r, d_c), strict=True):
                d_weight.addmm_(d.T, s[at])
                d_bias += d.sum(0)
            d_wh.addmm_(d_c.T, reset.mul_(found[at]))
        return ds, dx, d_found, None, d_wu, d_bu, d_wr, d_br, d_wc, d_bc, d_wh, d_bc


def _stretches(x: Tensor) -> list[slice]:
    return [slice(a, a + STRETCH) for a in range(0, len(x), STRETCH)]


# ---- what the doors refuse ---------------------------------------------------------------------------------------


def _each_pair(mask: Tensor, q: Tensor) -> Tensor:
    """The mask as ``(..., 1 or L, keys)``."""
    return mask if mask.dim() == q.dim() else mask.unsqueeze(-2)


def _check(q: Tensor, k: Tensor, v: Tensor | None, function: str, bias: Tensor | None, mask: Tensor | None) -> None:
    if function not in FUNCTIONS:
        raise ValueError(f"function must be one of {', '.join(FUNCTIONS)}; got {function!r}.")
    paired = mask is not None and mask.dim() == q.dim()  # then the number of keys is free
    alike = q.shape[:-2] + q.shape[-1:] == k.shape[:-2] + k.shape[-1:] and (paired or q.shape == k.shape)
    if q.dim() < 2 or not alike or (v is not None and v.shape[:-1] != k.shape[:-1]):
        got: Any = (tuple(q.shape), tuple(k.shape), None if v is None else tuple(v.shape))
        raise ValueError(f"q and k must be (..., L, z) alike and v (..., L, v); got {got}.")
    scores = (q.shape[-2], k.shape[-2])
    if bias is not None and bias.shape[-2:] != scores:
        raise ValueError(f"bias must end in (L, L) = {scores}; got {tuple(bias.shape)}.")
    if mask is None:
        return
    if mask.dtype != torch.bool or (mask.shape[-2:] != scores if paired else mask.shape != q.shape[:-1]):
        raise ValueError(
            f"mask must be bool (..., length) = {tuple(q.shape[:-1])}, True where the token is real; "
            f"got {mask.dtype} {tuple(mask.shape)}. Pass mask.bool(), shaped like that."
        )
