"""Attention to a part of the sequence: within chunks, or within a window that slides along.

*Chunks* cut the sequence into blocks and attend within each, never across. The cost falls from ``L**2`` to
``L * chunk``; what is lost is everything that crosses a border, and in Mega-chunk the EMA beneath carries it across.
Source: Ma et al., "Mega", ICLR 2023, section 3.4 (Mega-chunk).

A *window* slides: query i sees the keys at a distance of at most ``window``, so there are no borders, and each layer
passes news on by ``window`` positions. As blocks it is three shifted views of the keys, the block before, the query's
own and the next, and again one call. That is how LongT5 (Guo et al., 2022) and SPADE (Zuo et al., 2022) compute local
attention; SPADE adds T5's bias, one learned number for a *bucket* of distances.

Letters: B batch, H heads, L length, C block length, N = ceil(L / C) blocks, K keys a block sees (2C or 3C), w window,
z and v widths.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .devices import at_once, in_pieces

__all__ = [
    "BucketedBias",
    "chunk_attention",
    "chunk_attention_slow",
    "chunk_step",
    "fused_attention",
    "split_chunks",
    "t5_bucket",
    "window_attention",
    "window_attention_slow",
    "window_step",
]

Attend = Callable[..., Tensor]
Watcher = Callable[[Tensor], Tensor]
Cache = tuple[Tensor, Tensor]  # the keys (..., seen, z) and values (..., seen, v) a stream still remembers

# Scores worked on at once on a CPU, 4 MiB in float32. Larger tensors are fetched from the system page by page.
GROUP = 2**20
TILE = 2**18  # the same in `_Windows`, which passes over them more often: 1 MiB, half of a common second-level cache
ROWS = 32  # queries a block has there at most: the fewer, the fewer hidden keys among those around it
ENOUGH = 2**15  # and scores of a sequence there at least: it goes through them one sequence at a time


# ---- chunks ----------------------------------------------------------------------------------------------------------


def split_chunks(x: Tensor, chunk: int, axis: int = -2) -> Tensor:
    """Cut ``axis`` into blocks: ``(..., L, d) -> (..., N, C, d)``, with zeros after the end to fill the last block."""
    axis = axis % x.dim()
    missing = -x.shape[axis] % chunk
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, missing))
    return x.unflatten(axis, (-1, chunk))


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int,
    *,
    function: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    on_weights: Watcher | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """Attention within consecutive blocks of ``chunk`` positions, as one call on a reshaped batch.

    The blocks are counted from position 0. Padding on the right touches no real token; padding on the left shifts the
    borders, and so changes who sees whom.

    Args:
        q, k: ``(..., L, z)``; v: ``(..., L, v)``. Any L: a last block that is not full is padded and masked here.
        chunk: C, block length. A sequence no longer than that is attended in full.
        function, causal, on_weights: handed to ``attend``.
        bias: ``(C, C)``, or ``(L, L)`` when L < C; the same in every block.
        mask: bool, ``(..., L)`` or ``(B, L)`` for q of more leading axes; True where the token is real.
        attend: what to do within a block; default :func:`fused_attention`, which knows softmax only. Mega hands in
            :func:`longseq_tutorial.mechanisms.gated_attention.attend`.

    Returns:
        ``(..., L, v)`` in the dtype of v.
    """
    mask, block = _check_chunk(q, k, v, chunk, bias, mask)
    length, dtype = q.shape[-2], v.dtype
    if mask is not None:
        mask = mask.expand(q.shape[:-1])
    elif length % block:
        mask = torch.ones(q.shape[:-1], dtype=torch.bool, device=q.device)  # the fill of the last block is not real
    q, k, v = (split_chunks(x, block) for x in (q, k, v))  # (..., N, C, ·)
    if mask is not None:
        mask = split_chunks(mask.unsqueeze(-1), block)  # (..., N, C, 1), fill is False
    attend = fused_attention if attend is None else attend

    def look(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = None if mask is None else mask.squeeze(-1)
        return attend(q, k, v, function=function, bias=bias, mask=mask, causal=causal, on_weights=on_weights)

    group = _group(q, block, on_weights)
    y = _look_at_each(look, *(_groups(x, group) for x in (q, k, v, mask) if x is not None))
    return y.flatten(-3, -2)[..., :length, :].to(dtype)


def chunk_attention_slow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: int,
    *,
    function: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    on_weights: Watcher | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """One block after the other. The reference for :func:`chunk_attention`; same arguments, same result."""
    mask, block = _check_chunk(q, k, v, chunk, bias, mask)
    attend = fused_attention if attend is None else attend
    parts = []
    for start in range(0, q.shape[-2], block):
        inside = slice(start, start + block)  # the last one may be shorter
        qc, kc, vc = (x[..., inside, :] for x in (q, k, v))
        size = qc.shape[-2]
        parts.append(
            attend(
                qc,
                kc,
                vc,
                function=function,
                bias=None if bias is None else bias[..., :size, :size],
                mask=None if mask is None else mask[..., inside].expand(qc.shape[:-1]),
                causal=causal,
                on_weights=on_weights,
            )
        )
    return torch.cat(parts, dim=-2)


def chunk_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    state: Cache | None,
    chunk: int,
    bias: Tensor | None = None,
    *,
    function: str = "softmax",
    attend: Attend | None = None,
) -> tuple[Tensor, Cache]:
    """One time step of causal chunk attention; equal to :func:`chunk_attention` with ``causal=True``.

    Args:
        q_t, k_t: ``(..., z)``; v_t: ``(..., v)``.
        state: what the last step returned; None at the beginning. At a border everything is forgotten, so it never
            holds more than ``chunk`` keys and values.
        bias: ``(C, C)``.

    Returns:
        ``y_t (..., v)`` and the new state.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}.")
    if bias is not None and bias.shape[-2:] != (chunk, chunk):
        raise ValueError(f"bias must end in (chunk, chunk) = {(chunk, chunk)}; got {tuple(bias.shape)}.")
    full = state is not None and state[0].shape[-2] == chunk
    keys, values = _remember(None if full else state, k_t, v_t)
    seen = keys.shape[-2]
    row = None if bias is None else bias[..., seen - 1 : seen, :seen]  # (..., 1, seen)
    return _attend_one(q_t, keys, values, row, function, attend), (keys, values)


# ---- a window that slides --------------------------------------------------------------------------------------------


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    function: str = "softmax",
    on_weights: Watcher | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """Query i attends to the keys j with ``|i - j| <= window``; causal: ``0 <= i - j <= window``.

    Cut into blocks as long as the window, a query finds all its keys in three blocks: the one before its own, its own
    and the next (causal: the first two). So the keys are three shifted views of the same blocks side by side, and one
    call attends ``N`` blocks of ``(C, 3C)`` scores: ``3 w L`` numbers, never ``L * L``. Which of them lie in the window
    depends on key minus query alone.

    Args:
        q, k: ``(..., L, z)``; v: ``(..., L, v)``. Any L, also shorter than the window.
        window: w >= 0, how far a query sees to each side; ``2w + 1`` keys, itself among them (causal: ``w + 1``).
        bias: a number for every distance, ``(2w + 1,)`` or ``(H, 2w + 1)`` for q ``(..., H, L, z)``: key j - query i
            stands at index ``(j - i) + w``, so index w is the query's own position, smaller ones lie in the past.
        mask: bool, ``(..., L)`` or ``(B, L)`` for q of more leading axes; True where the token is real. Padding never
            changes what a real token gets, on whichever side it is.
        causal: look at the past and the present only.
        function, on_weights: handed to ``attend``.
        attend: what to do with a block of queries and its keys; default :func:`fused_attention`, which knows softmax
            only. (On a CPU, with a bias that learns, :class:`_Windows` takes its place and computes the same.) For
            laplace and relu2 hand in :func:`longseq_tutorial.mechanisms.gated_attention.attend`. It gets
            q ``(..., N, C, z)``, k and v ``(..., N, K, ·)`` and a mask for each pair, ``(..., N, C, K)``.

    Returns:
        ``(..., L, v)`` in the dtype of v. A hidden key gets a weight of exactly 0. (Under softmax a padded query that
        sees nothing real reads itself.)
    """
    real = _check_window(q, k, v, window, bias, mask)
    length, dtype = q.shape[-2], v.dtype
    reach = min(window, length - 1)  # beyond the sequence there is nothing to see
    plain = attend is None and on_weights is None and function == "softmax"
    if plain and bias is not None and _written_out(q, k, v, bias):
        return _window_by_tiles(q, k, v, bias[..., window - reach : window + reach + 1], real, causal)
    block = max(reach, 1)
    width = (2 if causal else 3) * block  # K
    offset = torch.arange(block + width - 1, device=q.device) - (2 * block - 1)  # every key minus query in this view
    inside = (offset.abs() <= reach) & ((offset <= 0) | (not causal))

    if bias is not None:
        bias = bias[..., window - reach : window + reach + 1]
        bias = F.pad(bias, (2 * block - 1 - reach, width - block - 1 - reach))  # one number for each of `offset`
        bias = _along_diagonals(bias, block).unsqueeze(-3)  # (1, C, K) or (H, 1, C, K): the same in every block
        # What lies outside the window can be said by the bias too, under softmax, once for all blocks.
        within = bias.masked_fill(~_along_diagonals(inside, block), -torch.inf)

    attend = fused_attention if attend is None else attend

    def look(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        """q (..., n, C, z); the others have a block more at each end (causal: at the beginning)."""
        k, v = (_side_by_side(x, width // block) for x in (k, v))  # (..., n, K, ·)
        if real is None:
            return attend(q, k, v, function=function, bias=within, mask=None, causal=False, on_weights=on_weights)
        real = _side_by_side(real, width // block)
        visible = real.mT & _along_diagonals(inside, block)  # (..., n, C, K): not padding, not fill, in the window
        if mask is not None and function == "softmax":  # weights sum to 1: a query that sees nothing reads itself
            visible = visible | (~visible.any(-1, keepdim=True) & _along_diagonals(offset == 0, block))
        return attend(q, k, v, function=function, bias=bias, mask=visible, causal=False, on_weights=on_weights)

    q, k, v, real = (split_chunks(x, block) for x in (q, k, v, real.unsqueeze(-1)))  # (..., N, C, ·)
    group = _group(q, width, on_weights)
    keys, values, reals = (_overlapping(x, group, causal) for x in (k, v, real))
    seen: list[Tensor | None] = list(reals)
    if bias is not None and mask is None and attend is fused_attention:  # in the midst only the window hides a key
        for g in range(1, len(seen)):
            if ((g + 1) * group + (0 if causal else 1)) * block <= length:
                seen[g] = None
    y = _look_at_each(look, _groups(q, group), keys, values, seen)
    return y.flatten(-3, -2)[..., :length, :].to(dtype)


def window_attention_slow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    function: str = "softmax",
    on_weights: Watcher | None = None,
    attend: Attend | None = None,
) -> Tensor:
    """One query after the other, over the keys in its window. The reference for :func:`window_attention`.

    Same arguments, same result; ``on_weights`` sees the row of one query at a time.
    """
    real = _check_window(q, k, v, window, bias, mask)
    attend = fused_attention if attend is None else attend
    length, rows = q.shape[-2], []
    for i in range(length):
        first, last = max(0, i - window), i if causal else min(length - 1, i + window)
        seen = slice(first, last + 1)
        visible = real[..., None, seen]  # (..., 1, keys)
        if function == "softmax":
            itself = torch.arange(first, last + 1, device=q.device) == i
            visible = visible | (~visible.any(-1, keepdim=True) & itself)
        row = None if bias is None else bias[..., None, first - i + window : last - i + window + 1]
        rows.append(
            attend(
                q[..., i : i + 1, :],
                k[..., seen, :],
                v[..., seen, :],
                function=function,
                bias=row,
                mask=visible,
                causal=False,
                on_weights=on_weights,
            )
        )
    return torch.cat(rows, dim=-2)


def window_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    state: Cache | None,
    window: int,
    bias: Tensor | None = None,
    *,
    function: str = "softmax",
    attend: Attend | None = None,
) -> tuple[Tensor, Cache]:
    """One time step of causal window attention; equal to :func:`window_attention` with ``causal=True``.

    Args:
        q_t, k_t: ``(..., z)``; v_t: ``(..., v)``.
        state: what the last step returned; None at the beginning. It holds the last ``window`` keys and values, oldest
            first: as one comes in, the oldest goes.
        bias: ``(2w + 1,)`` or ``(H, 2w + 1)``, as in :func:`window_attention`.

    Returns:
        ``y_t (..., v)`` and the new state.
    """
    _check_table(q_t.unsqueeze(-2), window, bias)
    keys, values = _remember(state, k_t, v_t)
    seen = keys.shape[-2]
    row = None if bias is None else bias[..., None, window + 1 - seen : window + 1]  # (..., 1, seen)
    y = _attend_one(q_t, keys, values, row, function, attend)
    drop = max(0, seen - window)
    return y, (keys[..., drop:, :], values[..., drop:, :])


def _overlapping(blocks: Tensor, group: int, causal: bool) -> list[Tensor]:
    """The blocks in groups, each with the last block before it and, unless causal, the first one behind it.

    Before the first block and after the last stand zeros. (Slices of groups, not of the whole: the gradient of a slice
    is as long as what it was cut from.)
    """
    groups = _groups(blocks, group)
    nothing = torch.zeros_like(blocks[..., :1, :, :])
    before = [nothing, *(g[..., -1:, :, :] for g in groups[:-1])]
    behind = [*(g[..., :1, :, :] for g in groups[1:]), nothing]
    return [torch.cat([b, g] if causal else [b, g, a], dim=-3) for b, g, a in zip(before, groups, behind, strict=True)]


def _side_by_side(blocks: Tensor, shifts: int) -> Tensor:
    """``shifts`` neighbouring blocks as one: ``(..., n + shifts - 1, C, d) -> (..., n, shifts * C, d)``."""
    count = blocks.shape[-3] - shifts + 1
    return torch.cat([blocks[..., s : s + count, :, :] for s in range(shifts)], dim=-2)


def _along_diagonals(line: Tensor, block: int) -> Tensor:
    """Lay one number for each offset, ``(..., C + K - 1)``, along the diagonals of ``(..., C, K)``.

    Neighbouring rows are neighbouring windows of the line: row i, column m holds entry ``C - 1 - i + m``.
    """
    return line.unfold(-1, line.shape[-1] - block + 1, 1).flip(-2)


# ---- a long sequence, a group of blocks at a time --------------------------------------------------------------------


def _group(q: Tensor, width: int, on_weights: Watcher | None) -> int:
    """How many of the blocks of q ``(..., N, C, z)``, each with ``width`` keys, to work on at once.

    All of them if somebody wants to see the weights.
    """
    blocks, scores = q.shape[-3], q[..., 0].numel() * width
    if on_weights is not None:
        return blocks
    return max(1, min(blocks, at_once(q, GROUP) * blocks // max(1, scores)))


def _groups(blocks: Tensor, group: int) -> Sequence[Tensor]:
    """``group`` blocks at a time; all of them as they are, since the gradient of a split is pieced together again."""
    return [blocks] if group >= blocks.shape[-3] else blocks.split(group, dim=-3)


def _look_at_each(look: Callable[..., Tensor], queries: Sequence[Tensor], *parts: Sequence[Tensor | None]) -> Tensor:
    """``look`` at the first of all parts, at the second of all, and so on; the results side by side."""
    groups = list(zip(queries, *parts, strict=True))
    first = look(*groups[0])
    if len(groups) == 1:
        return first
    if first.requires_grad:
        return torch.cat([first, *(look(*group) for group in groups[1:])], dim=-3)
    y = first.new_empty(*first.shape[:-3], sum(part.shape[-3] for part in queries), *first.shape[-2:])
    places = y.split(first.shape[-3], dim=-3)  # nothing to remember, so nothing is held twice
    places[0].copy_(first)
    del first
    for place, group in zip(places[1:], groups[1:], strict=True):
        place.copy_(look(*group))
    return y


# ---- a window whose bias learns, on a CPU ----------------------------------------------------------------------------


def _written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> bool:
    """Whether `_Windows` is for it: a bias that learns, which torch's CPU kernel refuses, no rounding, and sequences so
    long that one of them is worth a turn of its loop."""
    exact = {x.dtype for x in (q, k, v, bias)} in ({torch.float32}, {torch.float64})
    learns = bias.requires_grad and torch.is_grad_enabled()
    enough = q.shape[-2] * bias.shape[-1] >= ENOUGH
    return enough and learns and exact and in_pieces(q) and not torch.is_autocast_enabled("cpu")


def _window_by_tiles(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, real: Tensor, causal: bool) -> Tensor:
    """:func:`window_attention` by :class:`_Windows`, with a bias ``(2r + 1,)`` or ``(H, 2r + 1)`` for a reach r."""
    shape, length, reach = v.shape, q.shape[-2], bias.shape[-1] // 2
    parts = -(-reach // ROWS)  # blocks that a reach takes
    block = -(-reach // parts) if parts else 1
    back, ahead, future = parts * block, 0 if causal else parts * block, 0 if causal else reach
    # A number for each key minus query in sight of a block, 1 - C - back .. C - 1 + ahead; outside the window -inf.
    line = bias[..., : reach + 1 + future]
    line = F.pad(line, (back + block - 1 - reach, ahead + block - 1 - future), value=-torch.inf)
    squares = _along_diagonals(line, block)
    real = real.expand(shape[:-1]).unsqueeze(-1)
    fill = -length % block
    q = F.pad(q, (0, 0, 0, fill)) if fill else q
    k, v, real = (F.pad(x, (0, 0, back, fill + ahead)) for x in (k, v, real))
    q, k, v, squares, real = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v, squares, real))
    return _Windows.apply(q, k, v, squares, real.squeeze(-1), back)[:, :length].reshape(shape)


class _Windows(torch.autograd.Function):
    """Softmax attention of M sequences, each cut into n blocks of C queries that see the K keys around them.

    q ``(M, n C, z)``; k ``(M, n C + K - C, z)`` and v alike: the first block sees the first K of them, and its query i
    is key ``itself + i``; real ``(M, n C + K - C)``; squares ``(1 or H, C, K)``, the bias of each head in turn, -inf
    where the window hides a key. Neighbouring blocks see the same keys through views, which need no copies; about a
    megabyte of scores is made, masked and summed up in the cache, and only the weights W are kept. In the gradient of a
    softmax, ``sum(dW W)`` over K keys is ``sum(dY Y)`` over v numbers::

        dV = W^T dY      dS = W (dY V^T - sum(dY Y))      dQ = dS K / sqrt(z)      dK = dS^T Q / sqrt(z)
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, squares: Tensor, real: Tensor, itself: int) -> Tensor:
        (_, block, width), scale = squares.shape, 1 / math.sqrt(q.shape[-1])
        y, weights = v.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(*q.shape[:2], width)
        for m, rows, seen in _tiles(q, squares):
            keys, values, visible = (x[m, seen].unfold(0, width, block) for x in (k, v, real))
            some, kept = (x[m, rows].unflatten(0, (-1, block)) for x in (q, weights))
            scores = torch.baddbmm(squares[m % len(squares)], some, keys, alpha=scale)  # (n, C, K)
            if not visible.all():
                scores.masked_fill_(~visible.unsqueeze(1), -torch.inf)
                own = scores[..., itself : itself + block].diagonal(dim1=1, dim2=2)  # a view
                own.masked_fill_(scores.amax(-1) == -torch.inf, 0)  # nothing real in sight: it reads itself
            torch.softmax(scores, dim=-1, out=kept)
            y[m, rows] = (kept @ values.mT).flatten(0, 1)
        ctx.save_for_backward(q, k, v, squares, y, weights)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, squares, y, weights = ctx.saved_tensors
        dq, dk, dv, d_squares = torch.empty_like(q), *(torch.zeros_like(x) for x in (k, v, squares))
        (_, block, width), scale = squares.shape, 1 / math.sqrt(q.shape[-1])
        sums = (dy * y).sum(-1, keepdim=True)
        for m, rows, seen in _tiles(q, squares):
            keys, values = (x[m, seen].unfold(0, width, block) for x in (k, v))
            some, kept, d_some, shift = (x[m, rows].unflatten(0, (-1, block)) for x in (q, weights, dy, sums))
            d_scores = torch.baddbmm(shift, d_some, values, beta=-1).mul_(kept)
            dq[m, rows] = (d_scores @ keys.mT).mul_(scale).flatten(0, 1)
            d_squares[m % len(squares)] += d_scores.sum(0)
            for first in range(0, width, block):  # the keys of a block, at each of their places among the K
                at = slice(seen.start + first, seen.stop - width + block + first)
                for into, left, right, alpha in ((dk, d_scores, some, scale), (dv, kept, d_some, 1)):
                    left = left[..., first : first + block].mT
                    into[m, at].unflatten(0, (-1, block)).baddbmm_(left, right, alpha=alpha)
        return dq, dk, dv, d_squares, None, None


def _tiles(q: Tensor, squares: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Of each of the sequences q ``(M, n C, z)`` some blocks at a time: m, their queries, and the keys around them."""
    _, block, width = squares.shape
    size = max(1, TILE // (block * width)) * block
    for m in range(len(q)):
        for first in range(0, q.shape[1], size):
            last = min(first + size, q.shape[1])
            yield m, slice(first, last), slice(first, last + width - block)


# ---- streaming: what both steps share --------------------------------------------------------------------------------


def _remember(state: Cache | None, k_t: Tensor, v_t: Tensor) -> Cache:
    """The caches with the newest key and value at their end."""
    new = (k_t.unsqueeze(-2), v_t.unsqueeze(-2))
    if state is None:
        return new
    keys, values = (torch.cat([old.to(x.dtype), x], dim=-2) for old, x in zip(state, new, strict=True))
    return keys, values


def _attend_one(
    q_t: Tensor, keys: Tensor, values: Tensor, row: Tensor | None, function: str, attend: Attend | None
) -> Tensor:
    """One query ``(..., z)`` against everything remembered: ``(..., v)``."""
    visible = torch.ones((1,) * (keys.dim() - 2) + (1, keys.shape[-2]), dtype=torch.bool, device=keys.device)
    attend = fused_attention if attend is None else attend
    y = attend(
        q_t.unsqueeze(-2), keys, values, function=function, bias=row, mask=visible, causal=False, on_weights=None
    )
    return y.squeeze(-2)


# ---- one call ----------------------------------------------------------------------------------------------------


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    function: str = "softmax",
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    on_weights: Watcher | None = None,
) -> Tensor:
    """Softmax attention through torch's fused call; arguments and result as in ``gated_attention.attend``.

    The fused call never shows its weights: ``on_weights`` must be None and ``function`` "softmax". A mask with as many
    axes as q, ``(..., queries, keys)``, says for each pair whether it is seen; every query must then see something.
    """
    if function != "softmax" or on_weights is not None:
        raise ValueError(
            f"The fused call does softmax only and hides its weights; got function={function!r}"
            f"{', on_weights' if on_weights is not None else ''}. Pass attend=gated_attention.attend."
        )
    if bias is None and mask is None:
        return _in_four_axes(q, k, v, None, causal)
    length = q.shape[-2]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if causal else None
    allowed = past
    if mask is not None and mask.dim() == q.dim():
        allowed = mask if past is None else mask & past
    elif mask is not None:
        allowed = mask.unsqueeze(-2) if past is None else mask.unsqueeze(-2) & past  # (..., C or 1, C)
        nothing = ~allowed.any(-1, keepdim=True)  # only padding in sight: let it look at the padding, nobody reads it
        allowed = allowed | (nothing if past is None else nothing & past)
    if bias is None:
        return _in_four_axes(q, k, v, allowed)
    if bias.requires_grad and torch.is_grad_enabled() and q.device.type == "cpu":
        # Torch's CPU kernel refuses a bias that learns, and what it does instead takes more passes than these.
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)  # (..., C, K)
        scores += bias.to(q.dtype)
        if allowed is not None:
            scores.masked_fill_(~allowed, -torch.inf)
        return torch.softmax(scores, dim=-1) @ v
    offset = bias.to(q.dtype)
    if allowed is not None:
        offset = offset.masked_fill(~allowed, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=offset)


def _in_four_axes(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool = False) -> Tensor:
    """Torch's call for heads of blocks, too: its fused kernels take four axes, and with five it makes all scores."""
    if q.dim() <= 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal)
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    q, k, v = (x.expand(*lead, *x.shape[-2:]).flatten(0, -4) for x in (q, k, v))
    if seen is not None:
        seen = seen.expand(*lead, *seen.shape[-2:]).flatten(0, -4)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal).unflatten(0, lead[:-1])


# ---- T5's buckets, SPADE's bias --------------------------------------------------------------------------------------


def t5_bucket(offset: Tensor, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> Tensor:
    """The bucket of each offset key minus query: near distances one by one, far ones in ever wider classes.

    With n the distance and ``half = buckets / 2`` (causal), the first half of the buckets hold one distance each,
    ``n = 0, 1, .., half - 1``; the others grow by a constant factor up to ``max_distance``, and the last holds
    everything beyond::

        bucket = half + floor(log(n / half) / log(max_distance / half) * (buckets - half))

    Causal: keys in the future fall into bucket 0. Bidirectional: one half of the buckets for each direction, shared out
    like that; the upper half is for keys after the query.

    Args:
        offset: whole numbers j - i, any shape.
        buckets: how many; even, at least 2 (bidirectional: a multiple of 4).
        max_distance: from here on all distances share a bucket; larger than the number of exact ones.

    Returns:
        int64 in 0 .. buckets - 1, the shape of ``offset``. Source: Raffel et al., "T5", JMLR 2020, and its code.
    """
    share = buckets // 2 if bidirectional else buckets  # buckets for one direction
    exact = share // 2
    if share < 2 or buckets % (4 if bidirectional else 2) or max_distance <= exact:
        raise ValueError(
            f"wanted an even number of buckets in each direction, and max_distance above the {exact} distances that "
            f"have a bucket of their own; got buckets={buckets}, max_distance={max_distance}, "
            f"bidirectional={bidirectional}."
        )
    if offset.is_floating_point() or offset.dtype == torch.bool:
        raise ValueError(f"offset must be whole numbers, key minus query; got {offset.dtype}. Pass offset.long().")
    offset = offset.long()
    distance = offset.abs() if bidirectional else (-offset).clamp(min=0)
    factors = torch.log(distance.clamp(min=1).double() / exact) / math.log(max_distance / exact)
    wide = exact + (factors * (share - exact) + 1e-9).long()  # 1e-9: on a boundary no machine rounds below it
    bucket = torch.where(distance < exact, distance, wide.clamp(max=share - 1))
    return bucket + share * (offset > 0) if bidirectional else bucket


class BucketedBias(nn.Module):
    """T5's relative bias for a window: a learned number for every head and bucket of distances.

    ``window_attention(q, k, v, w, bias=BucketedBias(H)(w))``. However wide the window, there are ``buckets * H``
    numbers to learn.

    Args:
        heads: H.
        buckets, max_distance, bidirectional: see :func:`t5_bucket`. ``bidirectional=False`` spends no buckets on the
            future, so it is for causal attention.

    Parameter ``table (buckets, heads)``, laid out as in T5 and SPADE's published code.
    """

    def __init__(self, heads: int, buckets: int = 32, max_distance: int = 128, bidirectional: bool = True) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"BucketedBias wanted heads >= 1; got {heads}.")
        t5_bucket(torch.zeros(1, dtype=torch.long), buckets, max_distance, bidirectional)  # refuses what cannot be
        self.buckets, self.max_distance, self.bidirectional = buckets, max_distance, bidirectional
        self.table = nn.Parameter(torch.empty(buckets, heads))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, window: int) -> Tensor:
        """The bias ``(H, 2 * window + 1)``, key minus query from -window to window."""
        offset = torch.arange(-window, window + 1, device=self.table.device)
        return self.table[t5_bucket(offset, self.buckets, self.max_distance, self.bidirectional)].T

    def extra_repr(self) -> str:
        heads = self.table.shape[1]
        return f"{heads}, buckets={self.buckets}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"


# ---- what the doors refuse -------------------------------------------------------------------------------------------


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask with as many axes as ``q[..., 0]``, its missing ones (heads) of size 1."""
    if q.dim() < 2 or q.shape[-2] == 0 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"q and k must be (..., L, z) alike and v (..., L, v), L >= 1; got {[tuple(t.shape) for t in (q, k, v)]}."
        )
    if mask is None:
        return None
    if mask.dtype != torch.bool or mask.shape[-1] != q.shape[-2] or mask.shape[0] != q.shape[0]:
        raise ValueError(
            f"mask must be bool (batch, length) = {(q.shape[0], q.shape[-2])}, True where the token is real; "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )
    return mask.view(mask.shape[0], *(1,) * (q.dim() - 1 - mask.dim()), *mask.shape[1:])


def _check_chunk(
    q: Tensor, k: Tensor, v: Tensor, chunk: int, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, int]:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}.")
    mask = _check(q, k, v, mask)
    block = min(chunk, q.shape[-2])
    if bias is not None and bias.shape[-2:] != (block, block):
        raise ValueError(f"bias must end in (block, block) = {(block, block)}; got {tuple(bias.shape)}.")
    return mask, block


def _check_window(q: Tensor, k: Tensor, v: Tensor, window: int, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which tokens are real, ``(..., L)`` with axes of size 1 where all are alike."""
    mask = _check(q, k, v, mask)
    _check_table(q, window, bias)
    if mask is not None:
        return mask
    return torch.ones((1,) * (q.dim() - 2) + q.shape[-2:-1], dtype=torch.bool, device=q.device)


def _check_table(q: Tensor, window: int, bias: Tensor | None) -> None:
    if window < 0:
        raise ValueError(f"window must be at least 0, the distance a query sees to each side; got {window}.")
    if bias is None:
        return
    heads = q.shape[-3] if q.dim() > 2 else None
    if bias.shape[-1:] != (2 * window + 1,) or not (bias.dim() == 1 or (bias.dim() == 2 and bias.shape[0] == heads)):
        wanted = f"({2 * window + 1},)" + ("" if heads is None else f" or ({heads}, {2 * window + 1})")
        raise ValueError(
            f"bias must hold a number for each offset j - i from -window to window: {wanted}; got {tuple(bias.shape)}."
        )
