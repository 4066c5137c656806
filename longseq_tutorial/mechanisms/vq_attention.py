"""Attention over names of keys: quantise the keys, and attention costs linear time, exactly.

Every key is replaced by the nearest of S *codes*, ``k_hat[j] = C[z[j]]``; how keys get these names stands in
:mod:`~longseq_tutorial.mechanisms.vector_quantizer`. Keys with the same code then get the same weight, so their values
can be added up beforehand. With Delta the one-hot matrix of the codes and f any element-wise function::

    f(Q K_hat^T) V  =  f(Q C^T) (Delta V)          (L x L) (L x v)  =  (L x S) (S x v)

Nothing is approximated after the quantisation: the linear forms here equal quadratic attention over quantised keys,
in values and in gradients. A score that depends on the distance i - j breaks the factorisation; it is allowed inside
a window of bounded width, whose pairs are computed one by one.

Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", ICLR 2024, and its published code.
LongVQ (IJCAI 2024) puts such an attention above a structured memory; its text was not at hand beyond the abstract, and
no code of it is known to us. What this project calls LongVQ is therefore a reconstruction from this mechanism.

**Gradients.** The codes are a discrete choice and get none. A key gets the gradient of its codeword, "straight
through", from the pairs that are computed one by one; where it is served through the sums of its code it gets none,
as in the published code. (The full straight-through gradient would cost L*L again.) Values and queries get the exact
gradient everywhere. The codebook is never trained by gradients: it follows the keys as a moving average.

Letters: B batch, H heads, L length, S codes, k and v widths of keys and values, w window, c block, n blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .devices import at_once, in_pieces
from .fft import working_dtype
from .vector_quantizer import (
    WORKING_SET,
    VectorQuantizer,
    check_codebook,
    check_mask,
    code_sums,
    codewords,
    nearest_code,
    perplexity,
    straight_through,
    sums_in_bins,
)

__all__ = [
    "VQAttention",
    "VectorQuantizer",
    "code_sums",
    "codewords",
    "empty_state",
    "nearest_code",
    "perplexity",
    "straight_through",
    "vq_attention",
    "vq_attention_blocks",
    "vq_attention_quadratic",
]

NEVER = -1e30  # the score of what must not be seen. Not -inf: a row of nothing else would become NaN


# ---- attention: the slow form ----------------------------------------------------------------------------------------


def vq_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    bias: Tensor | None = None,
    exact_window: bool = False,
) -> Tensor:
    """Softmax attention over quantised keys, pair by pair: the reference. Arguments and result: :func:`vq_attention`.

    Costs ``L * L`` in time and memory.
    """
    _check(q, k, v, codebook, mask, window, bias)
    with torch.autocast(q.device.type, enabled=False):
        x = _Ready.of(q, k, v, codebook, nearest_code(k, codebook), mask, bias)
        position = torch.arange(q.shape[2], device=q.device)
        offset = position[:, None] - position  # i - j, (L, L)
        inside = (offset.abs() <= window) & (window > 0 or exact_window or bias is not None)
        near, far = (x.q @ keys.mT for keys in (x.keys(exact_window), codewords(x.codebook, x.z)))
        if x.bias is not None:
            near = near + x.bias[..., offset.clamp(-window, window) + window]
        scores = torch.where(inside, near, far)  # (B, H, L, L)
        visible = offset >= 0 if causal else torch.ones_like(offset, dtype=torch.bool)
        if mask is not None:
            visible = visible & mask[:, None, None, :]
        y = torch.softmax(scores.masked_fill(~visible, NEVER), dim=-1) @ x.v
        return _blank_unseeing(y, mask, causal).to(v.dtype)


# ---- attention: the fast forms ---------------------------------------------------------------------------------------


def vq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int = 0,
    bias: Tensor | None = None,
    exact_window: bool = False,
    codes: Tensor | None = None,
    block: int | None = None,
) -> Tensor:
    """Softmax attention over quantised keys in linear time: equal to :func:`vq_attention_quadratic`.

    ``out[i] = sum_j softmax_j(q[i] . k_hat[j] + bias[i - j]) v[j]``; nothing is scaled, so scale q beforehand.

    Args:
        q, k: ``(B, H, L, k)``; k is not quantised yet. v: ``(B, H, L, v)``. Any L.
        codebook: ``(H, S, k)``. No gradient flows into it.
        mask: bool ``(B, L)``, True where the token is real. A query that sees nothing real gives zeros.
        causal: query i sees keys 0 .. i only.
        window: w. Pairs with ``|i - j| <= w`` form the window, in which keys get their straight-through gradient and
            ``bias`` and ``exact_window`` hold. With w = 0 and neither of these there is no window: all pairs go through
            the codes and k gets the gradient zero (a commitment loss has to train it).
        bias: ``(H, 2w + 1)``, added to the scores of the window: offset ``i - j`` at index ``(i - j) + w``. A causal
            call uses the offsets 0 .. w.
        exact_window: the window uses the keys as they are, and codewords are used outside only.
        codes: ``(B, H, L)``, the nearest codes if they are known already.
        block: c, how many queries share one sum of what lies outside their window. Changes the cost, not the result.

    Returns:
        ``(B, H, L, v)`` in the dtype of v; the work runs in float32 or better, also under autocast.

    Without window and not causal, one fused attention over S mean values does it, with the log of each code's number
    added to its score. Otherwise, blocks of c queries: they see the ``c + 2w`` keys around them (causal: ``c + w``)
    one by one and all others through sums over the codes, cumulated from the left and from the right: nothing is ever
    subtracted, so nothing cancels. Costs ``L * (S + c + 2w)``; memory stays linear in L, since only so many blocks are
    worked through at a time, and worked through again for the gradient (which, on a CPU, has none of its own).
    """
    _check(q, k, v, codebook, mask, window, bias, codes)
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1; got {block}.")
    wide, window = window, min(window, q.shape[2] - 1)  # no pair is further apart
    bias = None if bias is None else bias[:, wide - window : wide + window + 1]
    with torch.autocast(q.device.type, enabled=False):
        z = nearest_code(k, codebook) if codes is None else codes
        x = _Ready.of(q, k, v, codebook, z, mask, bias)
        by_position = causal or exact_window or bias is not None or (window > 0 and k.requires_grad)
        y = _in_blocks(x, causal, window, exact_window, block) if by_position else _over_codes(x)
        return _blank_unseeing(y, mask, causal).to(v.dtype)


def _over_codes(x: "_Ready") -> Tensor:
    """Every query sees every key: one attention over S codes, each with its keys' mean value and log number."""
    sums, numbers = code_sums(x.v, x.z, x.codebook.shape[1], x.mask)
    mean = sums / numbers.clamp(min=1).unsqueeze(-1)
    q = _touched(x.q, x.k)
    # The log number belongs inside the maximum that softmax subtracts: so empty codes, however large their score, do
    # not push all others below the smallest float. Zeros that even out the widths let the fused kernel run on a CPU.
    width, value_width = max(x.q.shape[-1], x.v.shape[-1]), x.v.shape[-1]
    keys = x.codebook.expand(len(x.q), -1, -1, -1)  # (B, H, S, k)
    q, keys, values = (F.pad(t, (0, width - t.shape[-1])) for t in (q, keys, mean))
    scores_bias = _log(numbers).unsqueeze(2).expand(-1, -1, q.shape[2], -1)  # (B, H, L, S), a view
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=scores_bias, scale=1.0)[..., :value_width]


def _touched(q: Tensor, k: Tensor) -> Tensor:
    """q unchanged, but k gets a gradient of zeros instead of none."""
    return q + 0 * k if k.requires_grad else q


def _in_blocks(x: "_Ready", causal: bool, window: int, exact_window: bool, block: int | None) -> Tensor:
    """Blocks of c queries; block m sees keys ``m*c - w .. (m+1)*c - 1 (+ w)`` one by one, the others through codes."""
    batch, heads, length, _ = x.q.shape
    codes = x.codebook.shape[1]
    c = min(length, max(32, codes // 2) if block is None else block)
    # What an offset i - j adds to its score, laid out for row i and column j of a block: (H, c, width).
    bias = x.v.new_zeros(heads, 2 * window + 1) if x.bias is None else x.bias
    by_offset = F.pad(bias[:, window:] if causal else bias, (0, c - 1))
    by_offset = F.pad(by_offset, (c - 1, 0), value=NEVER if causal else 0)
    added = by_offset.unfold(-1, by_offset.shape[-1] - c + 1, 1).flip(-1)
    inside = None  # the window, of the same width
    if window > 0 or exact_window or x.bias is not None:
        offset = window + torch.arange(c, device=x.q.device)[:, None] - torch.arange(added.shape[-1], device=x.q.device)
        inside = offset.abs() <= window
    hidden = None
    if x.mask is not None:
        hidden = x.v.new_zeros(batch, heads, length).masked_fill(~x.mask.unsqueeze(1), NEVER).flatten(0, 1)
    k_hat, codebook = codewords(x.codebook, x.z), x.codebook.expand(batch, -1, -1, -1)
    q, k, v, z, k_hat, codebook = (t.flatten(0, 1) for t in (x.q, x.k, x.v, x.z, k_hat, codebook))  # (B H, ..)
    walk = _Walk(length, c, window, None if causal else window, exact_window)
    # On a CPU one block after the other, in its cache. A GPU would wait for thousands of small calls, and a compiler
    # would write them all out: for these, all blocks at once.
    blocks = _Blocks.apply if in_pieces(q) else _blocks_plain
    return blocks(walk, v, z, q, k, k_hat, codebook, added, hidden, inside).unflatten(0, (batch, heads))


@dataclass(frozen=True)
class _Walk:
    """Which of L keys a block of c queries sees one by one, and which it is the first to see through their codes."""

    length: int
    block: int
    before: int  # how far the window reaches
    after: int | None  # None: nothing after the query is seen at all
    exact_window: bool

    @property
    def blocks(self) -> range:
        return range(-(-self.length // self.block))

    def _cut(self, start: int, stop: int) -> slice:
        return slice(*(min(max(0, each), self.length) for each in (start, stop)))

    def rows(self, m: int) -> slice:
        return self._cut(m * self.block, (m + 1) * self.block)

    def near(self, m: int) -> slice:
        return self._cut(m * self.block - self.before, (m + 1) * self.block + (self.after or 0))

    def part(self, m: int) -> tuple[Any, slice, slice]:
        """What a block at an end of the sequence has of ``(.., c, width)``."""
        rows, near, start = self.rows(m), self.near(m), m * self.block - self.before
        return ..., slice(rows.stop - rows.start), slice(near.start - start, near.stop - start)

    def ways(self) -> list[tuple[range, Callable[[int], slice]]]:
        """From the left, and from the right: the order of the blocks, and the keys that join the sums at each."""

        def left(m: int) -> slice:
            return self._cut((m - 1) * self.block - self.before, m * self.block - self.before)

        def right(m: int) -> slice:
            return self._cut((m + 1) * self.block + self.before, (m + 2) * self.block + self.before)

        return [(self.blocks, left)] + ([] if self.after is None else [(self.blocks[::-1], right)])


class _Scores(NamedTuple):
    """What scores are made of; N = B * H."""

    q: Tensor  # (N, L, k)
    k: Tensor
    k_hat: Tensor
    codebook: Tensor  # (N, S, k)
    added: Tensor  # (H, c, width)
    hidden: Tensor | None  # (N, L): NEVER for padding
    inside: Tensor | None  # (c, width); None: no window

    def keys(self, near: slice) -> Tensor:
        """What a block looks at, ``(N, S + near, k)``: all codes, then the codewords of the keys near it."""
        return torch.cat([self.codebook, self.k_hat[:, near]], dim=1)

    def weights(self, walk: "_Walk", m: int, log_numbers: Tensor) -> Tensor:
        """One softmax over both: ``(N, c, S + near)``."""
        q, near, part = self.q[:, walk.rows(m)], walk.near(m), walk.part(m)
        scores = q @ self.keys(near).mT
        over_codes, one_by_one = scores.tensor_split((self.codebook.shape[1],), dim=-1)
        over_codes += log_numbers[:, m]
        if walk.exact_window and self.inside is not None:
            one_by_one.copy_(torch.where(self.inside[part], q @ self.k[:, near].mT, one_by_one))
        one_by_one.unflatten(0, (-1, len(self.added))).add_(self.added[part])
        if self.hidden is not None:
            one_by_one += self.hidden[:, None, near]
        return torch.softmax(scores, dim=-1)


def _blocks_plain(walk: _Walk, v: Tensor, z: Tensor, *parts: Any) -> Tensor:
    """Values ``(N, L, v)``, codes ``(N, L)`` and what scores are made of to outputs ``(N, L, v)``: all blocks at once.

    So the number of calls is the same for any length. Only where there are more scores than should be held are the
    blocks cut into groups, one after the other, and their weights worked out again for the gradient.
    """
    x = _Scores(*parts)
    (many, codes, _), (heads, c, width) = x.codebook.shape, x.added.shape
    room = max(1, at_once(v, WORKING_SET) // (many * c * (codes + width)))
    groups = -(-len(walk.blocks) // room)
    size = -(-len(walk.blocks) // groups)
    length = groups * size * c  # empty blocks at the end fill up the last group
    # With exact_window, the keys of the window. Else zeros, for their gradient alone: it goes straight to the keys.
    k = x.k if walk.exact_window else x.k - x.k.detach()
    q = F.pad(_touched(x.q, x.k) if x.inside is None else x.q, (0, 0, 0, length - walk.length))
    hidden = v.new_zeros(heads, walk.length) if x.hidden is None else x.hidden
    mean, numbers = _far_plain(v, z, x.hidden, codes, walk, groups * size)

    def group(
        q: Tensor, mean: Tensor, log_numbers: Tensor, k_hat: Tensor, k: Tensor, v: Tensor, hidden: Tensor
    ) -> Tensor:
        """``(N, size * c, ..)``, ``(N, size, ..)`` and the keys near these blocks to outputs ``(N, size * c, v)``."""
        over_codes = (q @ x.codebook.mT).unflatten(1, (size, c)) + log_numbers  # (N, size, c, S)
        q = q.unflatten(1, (size, c))
        k_hat, k, v, hidden = (_windows(t, width, c) for t in (k_hat, k, v, hidden))  # (N, size, width, ..)
        near = q @ k_hat.mT  # (N, size, c, width)
        if x.inside is not None and walk.exact_window:
            near = torch.where(x.inside, q @ k.mT, near)
        elif x.inside is not None and k.requires_grad:
            near = near + x.inside * (q.detach() @ k.mT)
        added = x.added.unsqueeze(1) + hidden.mT.unflatten(0, (-1, heads))  # (B or 1, H, size, c, width)
        near = (near.unflatten(0, (-1, heads)) + added).flatten(0, 1)
        weights = torch.softmax(torch.cat([over_codes, near], dim=-1), dim=-1)
        over_codes, near = weights.split((codes, width), dim=-1)
        return (over_codes @ mean + near @ v).flatten(1, 2)

    by_group = [t.unflatten(1, (groups, -1)).unbind(1) for t in (q, mean, _log(numbers).unsqueeze(2))]
    ends, reach = (0, 0, walk.before, length + (walk.after or 0) - walk.length), size * c + width - c
    for t, beyond in ((x.k_hat, 0), (k, 0), (v, 0), (hidden.unsqueeze(-1), NEVER)):
        by_group.append(_windows(F.pad(t, ends, value=beyond), reach, size * c).unbind(1))
    work = group
    if torch.is_grad_enabled() and groups > 1:
        work = partial(checkpoint, group, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([work(*each) for each in zip(*by_group, strict=True)], dim=1)[:, : walk.length]


def _windows(x: Tensor, width: int, step: int) -> Tensor:
    """What is seen of ``(N, L, d)`` through a window that moves on by ``step``: ``(N, n, width, d)``, a view."""
    return x.unfold(1, width, step).movedim(-1, 2)


def _far_plain(
    v: Tensor, z: Tensor, hidden: Tensor | None, codes: int, walk: _Walk, blocks: int
) -> tuple[Tensor, Tensor]:
    """For each block, mean value and number of the keys far from it, by code: ``(N, n, S, v)`` and ``(N, n, S)``.

    A key joins the sum of its code at the first block that has left it behind its window, and stays in those of all
    blocks after it. From the right it is the same, in a mirror.
    """
    real = None if hidden is None else (hidden == 0).unsqueeze(0)
    position = torch.arange(walk.length, device=z.device)
    ways = []
    for i in [position] if walk.after is None else [position, blocks * walk.block - 1 - position]:
        first = ((i + walk.before) // walk.block + 1).clamp(max=blocks)  # none: a block beyond the last
        joining = sums_in_bins(v.unsqueeze(0), (first * codes + z).unsqueeze(0), (blocks + 1) * codes, real)
        ways.append([t.squeeze(0).unflatten(1, (-1, codes)).cumsum(1)[:, :-1] for t in joining])
    sums, numbers = ways[0]
    if walk.after is not None:
        sums, numbers = (a + b.flip(1) for a, b in zip(*ways, strict=True))
    return sums / numbers.clamp(min=1).unsqueeze(-1), numbers


# ---- the same, one block after the other, near the processor ---------------------------------------------------------


class _Blocks(torch.autograd.Function):
    """Arguments and result of :func:`_blocks_plain`, one block at a time.

    Kept for the way back are the mean values of the codes, ``S / c`` numbers for each of v; the weights only where they
    are few, else they are worked out again.
    """

    @staticmethod
    def forward(ctx: Any, walk: _Walk, v: Tensor, z: Tensor, *parts: Any) -> Tensor:
        scores, y, weights = _Scores(*parts), torch.empty_like(v), []
        (many, codes, _), width = scores.codebook.shape, scores.added.shape[-1]
        z = z + torch.arange(many, device=z.device)[:, None] * codes  # each sequence and head has codes of its own
        mean, numbers = _far(v, z, scores.hidden, codes, walk)
        log_numbers = _log(numbers).unsqueeze(2)
        keep = many * walk.length * (codes + width) <= WORKING_SET
        for m in walk.blocks:
            w = scores.weights(walk, m, log_numbers)
            y[:, walk.rows(m)] = (w[..., :codes] @ mean[:, m]).baddbmm_(w[..., codes:], v[:, walk.near(m)])
            weights += [w] if keep else []
        ctx.walk, ctx.parts = walk, len(parts)
        ctx.save_for_backward(*parts, v, z, y, mean, numbers, *weights)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):  # it may run inside the autocast of the forward pass
            return _Blocks._gradients(ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        scores, walk = _Scores(*ctx.saved_tensors[: ctx.parts]), ctx.walk
        v, z, y, mean, numbers, *weights = ctx.saved_tensors[ctx.parts :]
        codes, log_numbers = mean.shape[2], _log(numbers).unsqueeze(2)
        share = (1 / numbers.clamp(min=1)).unsqueeze(2)  # of a sum in its mean
        dv, dq, dk = torch.zeros_like(v), torch.empty_like(scores.q), torch.zeros_like(scores.k)
        d_sums, d_added = torch.empty_like(mean), scores.added.new_zeros(len(v), *scores.added.shape[1:])
        for m in walk.blocks:
            rows, near, part = walk.rows(m), walk.near(m), walk.part(m)
            w = weights[m] if weights else scores.weights(walk, m, log_numbers)
            given, d = dy[:, rows], torch.empty_like(w)
            torch.bmm(given, mean[:, m].mT, out=d[..., :codes])
            torch.bmm(given, v[:, near].mT, out=d[..., codes:])
            d.sub_((given * y[:, rows]).sum(-1, keepdim=True)).mul_(w)  # back through the softmax
            torch.bmm((w[..., :codes] * share[:, m]).mT, given, out=d_sums[:, m])
            dv[:, near].baddbmm_(w[..., codes:].mT, given)
            keys, d_near = scores.keys(near), d[..., codes:]
            torch.bmm(d, keys, out=dq[:, rows])
            d_added[part] += d_near
            if scores.inside is not None:  # the keys of the window learn, straight through their codewords or directly
                d_near *= scores.inside[part]
                dk[:, near].baddbmm_(d_near.mT, scores.q[:, rows])
                if walk.exact_window:
                    dq[:, rows] += d_near @ (scores.k[:, near] - keys[:, codes:])
        d_added = d_added.unflatten(0, (-1, len(scores.added))).sum(0)
        return None, _far_back(dv, d_sums, z, walk), None, dq, dk, None, None, d_added, None, None


def _far(v: Tensor, z: Tensor, hidden: Tensor | None, codes: int, walk: _Walk) -> tuple[Tensor, Tensor]:
    """What :func:`_far_plain` gives: a block's sums are those of the block before, and of the keys that join them."""
    real = torch.ones_like(z, dtype=v.dtype) if hidden is None else (hidden == 0).to(v.dtype)
    sums = v.new_zeros(len(v), len(walk.blocks), codes, v.shape[-1])
    numbers = v.new_zeros(sums.shape[:-1])
    for order, joining in walk.ways():
        total, number = torch.zeros_like(sums[:, 0]), torch.zeros_like(numbers[:, 0])
        for m in order:
            keys = joining(m)
            index = z[:, keys].flatten()
            total.view(-1, v.shape[-1]).index_add_(0, index, v[:, keys].flatten(0, 1))
            number.view(-1).index_add_(0, index, real[:, keys].flatten())
            sums[:, m] += total
            numbers[:, m] += number
    return sums.div_(numbers.clamp(min=1).unsqueeze(-1)), numbers


def _far_back(dv: Tensor, d_sums: Tensor, z: Tensor, walk: _Walk) -> Tensor:
    """A sum that a key joins is carried on to all later blocks: so it gets the gradients of them all. Adds to dv."""
    for order, joining in walk.ways():
        total = torch.zeros_like(d_sums[:, 0])
        for m in order[::-1]:
            total += d_sums[:, m]
            dv[:, joining(m)] += F.embedding(z[:, joining(m)], total.flatten(0, 1))
    return dv


# ---- block by block, with a state ------------------------------------------------------------------------------------


def vq_attention_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    *,
    block: int,
    memory: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    exact_window: bool = False,
    stop_cache: bool = False,
    state: dict[str, Tensor] | None = None,
    codes: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal attention over quantised keys, one block after the other: Transformer-VQ's recurrence.

    A block of queries sees one by one the keys of its own block and of the ``memory`` tokens before it, and everything
    older through a mean value and a number for each code. Values equal ``vq_attention(causal=True)``; the state has
    the same size after any length.

    Args:
        q, k, v, codebook, mask, codes: as in :func:`vq_attention`, for the L tokens that follow those of ``state``.
        block: length of a block; the last may be shorter.
        memory: M, tokens before the block that are still seen one by one.
        bias: anything that broadcasts to ``(B, H, L, M + 1)``: entry d of row i is added to the score of query i with
            the key d steps before it. So positions may depend on the query, as in Transformer-XL; older keys get none.
        exact_window: pairs at most M apart use the key as it is.
        stop_cache: stop the gradient of the state at the beginning of every block.
        state: what the tokens before have left; ``None`` at the beginning.

    Returns:
        ``(B, H, L, v)`` and the new state: ``k, z, v, real`` of the last M tokens, ``mean (B, H, S, v)`` and
        ``count (B, H, S)`` of all older ones.

    All pairs computed one by one, up to ``M + block - 1`` apart, give keys their straight-through gradient.
    """
    _check(q, k, v, codebook, mask, memory, None, codes)
    if block < 1:
        raise ValueError(f"block must be at least 1; got {block}.")
    batch, heads, length, _ = q.shape
    if bias is not None:
        try:
            bias = bias.expand(batch, heads, length, memory + 1)
        except RuntimeError:
            raise ValueError(
                f"bias must broadcast to (batch, heads, length, memory + 1) = {(batch, heads, length, memory + 1)}; "
                f"got {tuple(bias.shape)}."
            ) from None
    with torch.autocast(q.device.type, enabled=False):
        z = nearest_code(k, codebook) if codes is None else codes
        x = _Ready.of(q, k, v, codebook, z, mask, bias)
        keys = x.keys(exact_window)
        real = torch.ones(batch, length, dtype=torch.bool, device=q.device) if mask is None else mask
        if state is None:
            state = empty_state(batch, codebook, memory, v.shape[-1], x.v.dtype)
        elif state["v"].shape[2] != memory:
            raise ValueError(f"the state remembers {state['v'].shape[2]} tokens; memory is {memory}. They must agree.")
        begun = state["real"].any(1) | (state["count"].sum((1, 2)) > 0)  # something real before these tokens
        biases = [None] * -(-length // block) if x.bias is None else x.bias.split(block, dim=2)
        parts = zip(
            *(t.split(block, dim=2) for t in (x.q, keys, z, x.v)), real.split(block, dim=1), biases, strict=True
        )
        y = []
        for q_n, k_n, z_n, v_n, real_n, bias_n in parts:
            if stop_cache:
                state = {name: part.detach() for name, part in state.items()}
            recent = {  # M + block keys
                "k": torch.cat([state["k"], k_n], dim=2),
                "z": torch.cat([state["z"], z_n], dim=2),
                "v": torch.cat([state["v"], v_n], dim=2),
                "real": torch.cat([state["real"], real_n], dim=1),
            }
            rows, columns = q_n.shape[2], recent["k"].shape[2]
            offset = torch.arange(memory, memory + rows, device=q.device)[:, None] - torch.arange(
                columns, device=q.device
            )  # i - j: (block, M + block)
            scores, close = q_n @ recent["k"].mT, offset <= memory
            if exact_window:
                scores = torch.where(close, scores, q_n @ codewords(x.codebook, recent["z"]).mT)
            if bias_n is not None:
                index = offset.clamp(0, memory).expand(batch, heads, rows, columns)
                scores = scores + bias_n.gather(3, index).masked_fill(~close, 0)
            scores = scores.masked_fill(~(recent["real"][:, None, None, :] & (offset >= 0)), NEVER)
            number = state["count"].to(x.v.dtype)
            over_codes = q_n @ x.codebook.mT + _log(number).unsqueeze(2)
            weights = torch.softmax(torch.cat([scores, over_codes], dim=-1), dim=-1)  # one softmax over two lists
            y.append(weights[..., :columns] @ recent["v"] + weights[..., columns:] @ state["mean"])
            state = _forget(recent, state, rows)
        return _blank_unseeing(torch.cat(y, dim=2), mask, True, begun).to(v.dtype), state


def empty_state(
    batch: int, codebook: Tensor, memory: int, value_dim: int, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The state of :func:`vq_attention_blocks` before the first token: nothing remembered, nothing counted."""
    heads, codes, width = codebook.shape
    zeros = codebook.new_zeros
    dtype = working_dtype(codebook) if dtype is None else dtype
    return {
        "k": zeros(batch, heads, memory, width, dtype=dtype),
        "z": zeros(batch, heads, memory, dtype=torch.long),
        "v": zeros(batch, heads, memory, value_dim, dtype=dtype),
        "real": zeros(batch, memory, dtype=torch.bool),
        "mean": zeros(batch, heads, codes, value_dim, dtype=dtype),
        "count": zeros(batch, heads, codes, dtype=torch.long),  # whole numbers: exact after any length
    }


def _forget(recent: dict[str, Tensor], state: dict[str, Tensor], leaving: int) -> dict[str, Tensor]:
    """The oldest ``leaving`` tokens go from the window into the means of their codes."""
    mean, count = state["mean"], state["count"]
    z = recent["z"][:, :, :leaving]
    real = recent["real"][:, None, :leaving].expand_as(z)
    sums, numbers = sums_in_bins(recent["v"][:, :, :leaving], z, mean.shape[2], real)
    count = count + numbers.long()
    share = count.clamp(min=1).to(mean.dtype).unsqueeze(-1)
    mean = mean + (sums - numbers.unsqueeze(-1) * mean) / share
    window = {name: x[:, leaving:] if name == "real" else x[:, :, leaving:] for name, x in recent.items()}
    return {**window, "mean": mean, "count": count}


# ---- shared by all forms ---------------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """What all forms work with: in the working precision, and what stands in the padding of k and v, even NaN, is 0."""

    q: Tensor
    k: Tensor
    v: Tensor
    codebook: Tensor
    z: Tensor
    mask: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, codebook: Tensor, z: Tensor, mask: Tensor | None, bias: Tensor | None
    ) -> "_Ready":
        dtype = working_dtype(q, k, v, codebook)
        q, k, v, codebook = q.to(dtype), k.to(dtype), v.to(dtype), codebook.detach().to(dtype)
        if mask is not None:
            padding = ~mask[:, None, :, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        return cls(q, k, v, codebook, z, mask, None if bias is None else bias.to(dtype))

    def keys(self, exact_window: bool) -> Tensor:
        """What stands for the keys of the window."""
        return self.k if exact_window else straight_through(self.k, codewords(self.codebook, self.z))


def _blank_unseeing(y: Tensor, mask: Tensor | None, causal: bool, known: Tensor | None = None) -> Tensor:
    """Zeros for queries that see nothing real. ``known (B,)``: sequences of which something was seen before."""
    if mask is None:
        return y
    sees = mask.cumsum(1) > 0 if causal else mask.any(1, keepdim=True)  # (B, L) or (B, 1)
    if known is not None:
        sees = sees | known.unsqueeze(1)
    return y.masked_fill(~sees[:, None, :, None], 0)


def _log(numbers: Tensor) -> Tensor:
    """The log of how many keys bear a name. An unused code is never seen: clamping alone would leave it one key."""
    return numbers.clamp(min=1).log().masked_fill(numbers == 0, NEVER)


# ---- the module ------------------------------------------------------------------------------------------------------


class VQAttention(nn.Module):
    """Attention over quantised keys with a codebook of its own and a learned bias for the near: fast, and streaming.

    Args:
        heads, codes, key_dim, value_dim: H, S, k, v.
        window: w; pairs at most w apart form the window of :func:`vq_attention`, with a learned bias for each distance.
        causal: see the past and the present only; needed to stream.
        exact_window: the window uses the keys as they are.
        quantizer: further options of :class:`VectorQuantizer`.
    """

    def __init__(
        self,
        heads: int,
        codes: int,
        key_dim: int,
        value_dim: int,
        window: int,
        *,
        causal: bool = True,
        exact_window: bool = False,
        **quantizer: Any,
    ) -> None:
        super().__init__()
        if window < 0 or value_dim < 1:
            raise ValueError(f"wanted window >= 0 and value_dim >= 1; got window={window}, value_dim={value_dim}.")
        self.value_dim, self.window, self.causal, self.exact_window = value_dim, window, causal, exact_window
        self.quantizer = VectorQuantizer(heads, codes, key_dim, **quantizer)
        self.bias = nn.Parameter(torch.empty(heads, window + 1 if causal else 2 * window + 1))  # by distance i - j
        nn.init.normal_(self.bias, std=0.02)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """q, k ``(B, H, L, k)``, v ``(B, H, L, v)`` -> ``(B, H, L, v)`` and the commitment loss."""
        self.quantizer.set_up(k, mask)
        codebook = self.quantizer.codebook  # before the update: the one that names the keys
        _, z, loss = self.quantizer(k, mask)
        y = vq_attention(
            q,
            k,
            v,
            codebook,
            mask=mask,
            causal=self.causal,
            window=self.window,
            bias=F.pad(self.bias, (self.window, 0)) if self.causal else self.bias,
            exact_window=self.exact_window,
            codes=z,
        )
        return y, loss

    def initial_state(self, batch: int) -> dict[str, Tensor]:
        """The state before the first step: the last w tokens, and a mean value and a number for each code."""
        if not self.causal:
            raise ValueError("Attention that looks ahead cannot stream. Build it with causal=True.")
        dtype = working_dtype(self.bias, self.quantizer.code_sum)
        return empty_state(batch, self.quantizer.codebook, self.window, self.value_dim, dtype)

    def step(self, q_t: Tensor, k_t: Tensor, v_t: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One time step: q_t, k_t ``(B, H, k)``, v_t ``(B, H, v)`` -> ``(B, H, v)`` and a new state."""
        y, state = vq_attention_blocks(
            q_t.unsqueeze(2),
            k_t.unsqueeze(2),
            v_t.unsqueeze(2),
            self.quantizer.codebook,
            block=1,
            memory=self.window,
            bias=self.bias.unsqueeze(1),
            exact_window=self.exact_window,
            state=state,
        )
        return y.squeeze(2), state

    def extra_repr(self) -> str:
        return f"window={self.window}, causal={self.causal}, exact_window={self.exact_window}"


# ---- what is asked of arguments --------------------------------------------------------------------------------------


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codebook: Tensor,
    mask: Tensor | None,
    window: int,
    bias: Tensor | None,
    codes: Tensor | None = None,
) -> None:
    check_codebook(k, codebook)
    if q.shape != k.shape or v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "q and k must be (batch, heads, length, k) alike and v (batch, heads, length, v); "
            f"got {[tuple(x.shape) for x in (q, k, v)]}."
        )
    check_mask(k, mask)
    if window < 0:
        raise ValueError(f"a window reaches 0 or more positions; got {window}.")
    wanted = (k.shape[1], 2 * window + 1)
    if bias is not None and bias.shape != wanted:
        raise ValueError(
            f"bias must be (heads, 2 * window + 1) = {wanted}, offset i - j at index (i - j) + window; "
            f"got {tuple(bias.shape)}."
        )
    if codes is not None and (codes.shape != k.shape[:3] or codes.dtype != torch.long):
        raise ValueError(
            f"codes must be int64 (batch, heads, length) = {tuple(k.shape[:3])}, as from nearest_code; "
            f"got {codes.dtype} {tuple(codes.shape)}."
        )
