"""Attention over names of keys: quantise the keys, and attention costs linear time, exactly.

Every key is replaced by the nearest of S *codes*, ``k_hat[j] = C[z[j]]``. Keys with the same code then get the same
weight, so their values can be added up beforehand. With Delta the one-hot matrix of the codes and f any element-wise
function::

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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .fft import working_dtype

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
WORKING_SET = 1 << 20  # scores held at once, in numbers: a few MB, near the processor


# ---- names for keys --------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_code(k: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code nearest to each key: ``k (B, H, L, k)``, ``codebook (H, S, k)`` -> ``(B, H, L)``, int64.

    ``|k - C|^2 = |k|^2 - 2 (k.C - |C|^2 / 2)``, and ``|k|^2`` is the same for all codes: so the nearest code is the one
    with the largest ``k.C - |C|^2 / 2``. In float32 or better, since half precision would choose other codes. Never
    holds all L * S distances at once.
    """
    _check_codebook(k, codebook)
    dtype = working_dtype(k, codebook)
    with torch.autocast(k.device.type, enabled=False):
        codes = codebook.to(dtype)
        half = codes.square().sum(-1).unsqueeze(1) / 2  # (H, 1, S)
        rows = max(1, WORKING_SET // (k.shape[0] * half.numel()))
        # max gives the index along with the value, and does so four times faster than argmax.
        nearest = [(part.to(dtype) @ codes.mT).sub_(half).max(-1).indices for part in k.split(rows, dim=2)]
        return torch.cat(nearest, dim=2)


def codewords(codebook: Tensor, z: Tensor) -> Tensor:
    """Look names up: ``codebook (H, S, k)``, ``z (B, H, L)`` -> ``(B, H, L, k)``."""
    head = torch.arange(codebook.shape[0], device=z.device)[:, None]
    return codebook[head, z]


def straight_through(k: Tensor, k_hat: Tensor) -> Tensor:
    """The value of the codeword, bit for bit, since k - k is exactly 0, with the gradient of the key."""
    return k_hat + (k - k.detach())


def code_sums(v: Tensor, z: Tensor, codes: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each code the sum of the values whose keys bear its name, and their number: ``Delta V`` and ``Delta 1``.

    Args:
        v: ``(B, H, L, v)``; z: ``(B, H, L)``; codes: S.
        mask: bool ``(B, L)``; padding is not counted.

    Returns:
        ``(B, H, S, v)`` and ``(B, H, S)``, in the dtype of v.
    """
    real = None if mask is None else mask[:, None].expand_as(z)
    return _sums(v, z, codes, real)


def perplexity(counts: Tensor) -> Tensor:
    """How many codes are in use, in effect: ``exp(entropy)`` of ``counts (..., S)`` -> ``(...)``, between 1 and S.

    S codes in equal use have perplexity S; one code for everything has 1. No counts at all give 1.
    """
    share = (counts / counts.sum(-1, keepdim=True)).nan_to_num()
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def _sums(v: Tensor, index: Tensor, bins: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add rows of v ``(B, H, L, v)`` into ``bins`` bins by ``index (B, H, L)``: sums (B, H, bins, v), numbers."""
    batch, heads, _, width = v.shape
    first = torch.arange(batch * heads, device=v.device).view(batch, heads, 1) * bins
    where = (index + first).flatten()  # a bin of its own for every sequence and head
    one = v.new_ones(index.shape) if real is None else real.to(v.dtype)
    if real is not None:
        v = v.masked_fill(~real.unsqueeze(-1), 0)
    sums = v.new_zeros(batch * heads * bins, width).index_add(0, where, v.flatten(0, 2))
    numbers = v.new_zeros(batch * heads * bins).index_add(0, where, one.flatten())
    return sums.view(batch, heads, bins, width), numbers.view(batch, heads, bins)


def _running(x: Tensor, backwards: bool) -> Tensor:
    """Cumulative sums along axis 2, block by block; ``cumsum`` is many times slower along any axis but the last."""
    total, parts = torch.zeros_like(x[:, :, 0]), []
    for part in x.unbind(2)[:: -1 if backwards else 1]:
        total = total + part
        parts.append(total)
    return torch.stack(parts[:: -1 if backwards else 1], dim=2)


def _mean_and_log(sums: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean value and log number of each bin. An empty bin is never seen: clamping alone would leave it one key."""
    mean = sums / numbers.clamp(min=1).unsqueeze(-1)
    return mean, torch.where(numbers > 0, numbers.clamp(min=1).log(), NEVER)


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
        x = _Ready.of(q, k, v, codebook, nearest_code(k, codebook), mask, bias, exact_window, window > 0)
        position = torch.arange(q.shape[2], device=q.device)
        offset = position[:, None] - position  # i - j, (L, L)
        scores = _window_scores(x.q @ x.k_hat.mT, x.q, x.near, offset, window, x.bias)  # (B, H, L, L)
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
    subtracted, so nothing cancels. Costs ``L * (S + c + 2w)``; memory stays linear in L, since blocks are worked
    through a few at a time, and worked through again for the gradient.
    """
    _check(q, k, v, codebook, mask, window, bias, codes)
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1; got {block}.")
    wide, window = window, min(window, q.shape[2] - 1)  # no pair is further apart
    bias = None if bias is None else bias[:, wide - window : wide + window + 1]
    with torch.autocast(q.device.type, enabled=False):
        z = nearest_code(k, codebook) if codes is None else codes
        x = _Ready.of(q, k, v, codebook, z, mask, bias, exact_window, window > 0)
        by_position = causal or x.near is not None or bias is not None
        y = _in_blocks(x, causal, window, block) if by_position else _over_codes(x)
        return _blank_unseeing(y, mask, causal).to(v.dtype)


def _over_codes(x: "_Ready") -> Tensor:
    """Every query sees every key: one attention over S codes, each with its keys' mean value and log number."""
    mean, log_number = _mean_and_log(*code_sums(x.v, x.z, x.codebook.shape[1], x.mask))
    # The log number belongs inside the maximum that softmax subtracts: so empty codes, however large their score, do
    # not push all others below the smallest float. Zeros that even out the widths let the fused kernel run on a CPU.
    width, value_width = max(x.q.shape[-1], x.v.shape[-1]), x.v.shape[-1]
    keys = x.codebook.expand(len(x.q), -1, -1, -1)  # (B, H, S, k)
    q, keys, values = (F.pad(t, (0, width - t.shape[-1])) for t in (x.q, keys, mean))
    scores_bias = log_number.unsqueeze(2).expand(-1, -1, q.shape[2], -1)  # (B, H, L, S), a view
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=scores_bias, scale=1.0)[..., :value_width]


def _in_blocks(x: "_Ready", causal: bool, window: int, block: int | None) -> Tensor:
    """Blocks of c queries; block m sees keys ``m*c - w .. (m+1)*c - 1 (+ w)`` one by one, the others through codes."""
    batch, heads, length, _ = x.q.shape
    codes = x.codebook.shape[1]
    c = min(length, max(32, codes // 2)) if block is None else min(block, length)
    blocks = -(-length // c)
    after = 0 if causal else window
    width = window + c + after
    position = torch.arange(length, device=x.q.device)
    bias = None if x.bias is None else x.bias.unsqueeze(1)  # (H, 1, 2w + 1): the same in every block

    def far(which: Tensor, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """Sums over codes for each block, of all keys far from it; ``which (L,)``: the first such block for each key,
        from where its sum is carried on (``backwards``: the last one, and on towards the first)."""
        wanted = (which >= 0) & (which < blocks)
        index = torch.where(wanted, which, 0) * codes + x.z  # (B, H, L)
        real = (wanted if x.mask is None else (wanted & x.mask)[:, None]).expand_as(x.z)
        sums, numbers = _sums(x.v, index, blocks * codes, real)
        return _running(sums.unflatten(2, (blocks, codes)), backwards), _running(
            numbers.unflatten(2, (blocks, codes)), backwards
        )

    sums, numbers = far((position + window) // c + 1)  # what lies before the window of a block
    if not causal:  # and what lies after it
        later = far(torch.div(position - window, c, rounding_mode="floor") - 1, backwards=True)
        sums, numbers = sums + later[0], numbers + later[1]
    mean, log_number = _mean_and_log(sums, numbers)  # (B, H, n, S, v), (B, H, n, S)

    def around(t: Tensor) -> Tensor:
        """The keys near each block, ``(B, H, L, d) -> (B, H, n, width, d)``: overlapping, zeros beyond the ends."""
        return F.pad(t, (0, 0, window, blocks * c - length + after)).unfold(2, width, c).mT

    real = torch.ones(1, length, dtype=torch.bool, device=x.q.device) if x.mask is None else x.mask
    real = F.pad(real, (window, blocks * c - length + after)).unfold(1, width, c).unsqueeze(1)  # (B or 1, 1, n, width)
    offset = position[:c, None] + window - torch.arange(width, device=x.q.device)  # i - j, (c, width)
    seen = (offset >= 0) if causal else torch.ones_like(offset, dtype=torch.bool)

    def attend(
        q: Tensor, real: Tensor, log_number: Tensor, mean: Tensor, k_hat: Tensor, v: Tensor, *w: Tensor
    ) -> Tensor:
        scores = _window_scores(q @ k_hat.mT, q, w[0] if w else None, offset, window, bias)  # (B, H, n, c, width)
        scores = scores.masked_fill(~(real.unsqueeze(3) & seen), NEVER)
        over_codes = (q.flatten(2, 3) @ x.codebook.mT).unflatten(2, q.shape[2:4]) + log_number.unsqueeze(3)
        return _read(scores, v, over_codes, mean)

    blocked = F.pad(x.q, (0, 0, 0, blocks * c - length)).unflatten(2, (blocks, c))  # (B, H, n, c, k)
    near = [around(t) for t in (x.k_hat, x.v, x.near) if t is not None]
    group = max(1, WORKING_SET // (batch * heads * c * (width + codes)))  # blocks worked through at once
    parts = zip(*(t.split(group, dim=2) for t in (blocked, real, log_number, mean, *near)), strict=True)
    again = torch.is_grad_enabled() and blocks > group  # keep no weights for the way back: work them out again
    y = [checkpoint(attend, *p, use_reentrant=False, preserve_rng_state=False) if again else attend(*p) for p in parts]
    return torch.cat(y, dim=2).flatten(2, 3)[:, :, :length]


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
        x = _Ready.of(q, k, v, codebook, z, mask, bias, exact_window, windowed=True)
        keys = x.k_hat if x.near is None else x.near
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
            log_number = torch.where(number > 0, number.clamp(min=1).log(), NEVER)
            over_codes = q_n @ x.codebook.mT + log_number.unsqueeze(2)
            y.append(_read(scores, recent["v"], over_codes, state["mean"]))
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
    sums, numbers = _sums(recent["v"][:, :, :leaving], z, mean.shape[2], real)
    count = count + numbers.long()
    share = count.clamp(min=1).to(mean.dtype).unsqueeze(-1)
    mean = mean + (sums - numbers.unsqueeze(-1) * mean) / share
    window = {name: x[:, leaving:] if name == "real" else x[:, :, leaving:] for name, x in recent.items()}
    return {**window, "mean": mean, "count": count}


# ---- shared by all forms ---------------------------------------------------------------------------------------------


class _Ready(NamedTuple):
    """What all forms work with: in the working precision, and what stands in the padding of k and v, even NaN, is 0."""

    q: Tensor
    k_hat: Tensor  # the codewords, constant
    near: Tensor | None  # keys of the window; None where codewords serve, since nobody asks for a gradient
    v: Tensor
    codebook: Tensor
    z: Tensor
    mask: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        codebook: Tensor,
        z: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        exact_window: bool,
        windowed: bool,
    ) -> "_Ready":
        dtype = working_dtype(q, k, v, codebook)
        q, k, v, codebook = q.to(dtype), k.to(dtype), v.to(dtype), codebook.detach().to(dtype)
        if mask is not None:
            padding = ~mask[:, None, :, None]
            k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        k_hat, near = codewords(codebook, z), None
        if exact_window:
            near = k
        elif k.requires_grad and (windowed or bias is not None):
            near = straight_through(k, k_hat)
        elif k.requires_grad:
            q = q + 0 * k  # changes nothing: it gives k a gradient of zeros instead of none at all
        return cls(q, k_hat, near, v, codebook, z, mask, None if bias is None else bias.to(dtype))


def _window_scores(
    scores: Tensor, q: Tensor, near: Tensor | None, offset: Tensor, window: int, bias: Tensor | None
) -> Tensor:
    """Inside the window, where ``|i - j| <= w``, scores come from the keys ``near``, and the bias is added."""
    inside = offset.abs() <= window
    if near is not None:
        scores = torch.where(inside, q @ near.mT, scores)
    if bias is not None:
        scores = scores + bias[..., offset.clamp(-window, window) + window].masked_fill(~inside, 0)
    return scores


def _read(near: Tensor, v: Tensor, over_codes: Tensor, mean: Tensor) -> Tensor:
    """One softmax over two lists of scores: keys seen one by one, with their values, and codes, with their means."""
    weights = torch.softmax(torch.cat([near, over_codes], dim=-1), dim=-1)
    return weights[..., : v.shape[-2]] @ v + weights[..., v.shape[-2] :] @ mean


def _blank_unseeing(y: Tensor, mask: Tensor | None, causal: bool, known: Tensor | None = None) -> Tensor:
    """Zeros for queries that see nothing real. ``known (B,)``: sequences of which something was seen before."""
    if mask is None:
        return y
    sees = mask.cumsum(1) > 0 if causal else mask.any(1, keepdim=True)  # (B, L) or (B, 1)
    if known is not None:
        sees = sees | known.unsqueeze(1)
    return y.masked_fill(~sees[:, None, :, None], 0)


# ---- the quantiser ---------------------------------------------------------------------------------------------------

STARTS = ("kmeans++", "keys", "normal")


class VectorQuantizer(nn.Module):
    """Gives every key the name of its nearest code, and lets the codes follow the keys.

    A code is the average of the keys that chose it, an exponential moving average over updates::

        code_sum   <-  decay * code_sum   + (1 - decay) * sum of the keys with this code
        code_count <-  decay * code_count + (1 - decay) * their number
        codebook    =  code_sum / max(code_count, 0.01)

    The update happens in training mode, without gradients, after the keys have been named. The keys, in turn, are held
    near their codes by the commitment loss, ``|k - C[z]|^2`` summed over heads and averaged over real tokens, which
    the caller adds to the loss with a small weight (1e-4 in Transformer-VQ). Keep keys normalised (there: length
    ``key_dim ** 0.25``), or loss and codebook may grow without bound.

    Args:
        heads, codes, key_dim: H, S, k.
        decay: gamma, how much of sum and count survives an update.
        start: what the first batch in training makes of the codebook: "kmeans++" spreads the codes over its keys,
            "keys" takes some at random, "normal" keeps small random numbers, as the published code does.
        restart: a code whose count falls below this share of the average count is dead and becomes a random key of the
            batch, with the average count. 0 never restarts; the published code does not.

    Buffers: ``code_sum (H, S, k)``, ``code_count (H, S)``, ``started``. In bfloat16 the averages would stand still, so
    the buffers stay in float32 or better whatever the module is cast to.

    With several processes (torch.distributed) sums and counts are added up over all of them, and replacements come
    from the first. :meth:`all_reduce` is the place to hook in something else.

    Source: Transformer-VQ's published code; ``start`` and ``restart`` are ours.
    """

    code_sum: Tensor
    code_count: Tensor
    started: Tensor

    def __init__(
        self,
        heads: int,
        codes: int,
        key_dim: int,
        decay: float = 0.99,
        *,
        start: str = "kmeans++",
        restart: float = 0.01,
    ) -> None:
        super().__init__()
        if min(heads, codes, key_dim) < 1 or not 0 <= decay < 1 or not 0 <= restart < 1 or start not in STARTS:
            raise ValueError(
                f"wanted heads, codes, key_dim >= 1, decay and restart in [0, 1), start in {STARTS}; got "
                f"heads={heads}, codes={codes}, key_dim={key_dim}, decay={decay}, restart={restart}, start={start!r}."
            )
        self.heads, self.codes, self.key_dim = heads, codes, key_dim
        self.decay, self.start, self.restart = decay, start, restart
        self.register_buffer("code_sum", torch.randn(heads, codes, key_dim) * (heads * codes) ** -0.5)
        self.register_buffer("code_count", torch.ones(heads, codes))
        self.register_buffer("started", torch.tensor(start == "normal"))
        self.codes_seen = nn.Identity()  # a window for `record`: the codes (B, H, L) pass through unchanged

    @property
    def codebook(self) -> Tensor:
        """The codes ``(H, S, k)``, a fresh tensor: a later update does not change it."""
        return self.code_sum / self.code_count.clamp(min=0.01).unsqueeze(-1)

    def perplexity(self) -> Tensor:
        """Codes in use, in effect, for each head ``(H,)``, by the running counts."""
        return perplexity(self.code_count)

    def forward(self, k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``k (B, H, L, k)`` -> its codewords, same shape; the codes ``(B, H, L)``; the commitment loss, a number.

        The codewords are exact in value, and pass their gradient straight through to k. Padding (``mask`` False) gets a
        code too, but enters neither sums, counts nor loss. (The published code averages the loss over padded positions
        as well, each adding 0.) In training, codes and loss belong to the codebook before the update.
        """
        _check_mask(k, mask)
        self.set_up(k, mask)
        codebook = self.codebook
        z = self.codes_seen(nearest_code(k, codebook))
        wide = k.to(working_dtype(k, codebook))
        if mask is not None:
            wide = wide.masked_fill(~mask[:, None, :, None], 0)
        with torch.autocast(k.device.type, enabled=False):
            nearest = codewords(codebook, z).to(wide.dtype)
            error = (wide - nearest).square().sum(-1).sum(1)  # (B, L): over width and heads
            loss = error.mean() if mask is None else error.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
            if self.training:
                self.update(wide, z, mask)
        return straight_through(wide, nearest).to(k.dtype), z, loss

    @torch.no_grad()
    def update(self, k: Tensor, z: Tensor, mask: Tensor | None = None) -> None:
        """Move every code towards the keys that chose it, and restart the dead."""
        sums, numbers = code_sums(k.detach().to(self.code_sum.dtype), z, self.codes, mask)
        for average, new in ((self.code_sum, sums), (self.code_count, numbers)):
            average.mul_(self.decay).add_(self.all_reduce(new.sum(0)), alpha=1 - self.decay)
        usual = self.code_count.mean(-1, keepdim=True).expand_as(self.code_count)
        dead = self.code_count < self.restart * usual
        if dead.any():
            fresh = self._same_everywhere(self._random_keys(k, mask, self.codes))
            self.code_sum.copy_(torch.where(dead.unsqueeze(-1), fresh * usual.unsqueeze(-1), self.code_sum))
            self.code_count.copy_(torch.where(dead, usual, self.code_count))

    @torch.no_grad()
    def set_up(self, k: Tensor, mask: Tensor | None = None) -> None:
        """Begin with codes from these keys, if training has just begun; otherwise nothing."""
        if not self.training or self.started or (mask is not None and not mask.any()):
            return
        draw = self._spread_keys if self.start == "kmeans++" else self._random_keys
        self.set_codebook(self._same_everywhere(draw(k.detach(), mask, self.codes)))

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor) -> None:
        """Use these codes ``(H, S, k)``, each with a count of 1."""
        self.code_sum.copy_(codebook)
        self.code_count.fill_(1)
        self.started.fill_(True)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all processes; x itself where there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(x)
        return x

    def _same_everywhere(self, x: Tensor) -> Tensor:
        """What the first process has."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
            x = torch.zeros_like(x)
        return self.all_reduce(x)

    def _random_keys(self, k: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """``count`` real keys for each head, different ones as far as there are: ``(H, count, k)``."""
        keys = k.transpose(1, 2).flatten(0, 1)  # (B L, H, k)
        keys = keys if mask is None else keys[mask.flatten()]
        shuffled = torch.rand(len(keys), self.heads, device=k.device).argsort(0)  # for each head
        pick = shuffled[torch.arange(count, device=k.device) % len(keys)]
        return keys.gather(0, pick.unsqueeze(-1).expand(-1, -1, self.key_dim)).transpose(0, 1).to(self.code_sum.dtype)

    def _spread_keys(self, k: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """k-means++: each next code is a key, drawn with a chance that grows with its squared distance to the codes."""
        keys = self._random_keys(k, mask, 16 * count)  # (H, 16 S, k): enough to choose from
        chosen = [keys[:, :1]]
        distance = (keys - chosen[0]).square().sum(-1)
        while len(chosen) < count:
            chance = distance + torch.finfo(keys.dtype).tiny  # where every key is a code already, take any
            pick = torch.multinomial(chance, 1).unsqueeze(-1)  # (H, 1, 1)
            chosen.append(keys.gather(1, pick.expand(-1, -1, self.key_dim)))
            distance = torch.minimum(distance, (keys - chosen[-1]).square().sum(-1))
        return torch.cat(chosen, dim=1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "VectorQuantizer":
        """Move and cast as any module, but keep sums and counts in float32 or better."""
        before = {name: self.get_buffer(name) for name in ("code_sum", "code_count")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = self.get_buffer(name)
            if now.dtype in (torch.bfloat16, torch.float16):
                self.register_buffer(name, old.to(now.device))
        return self

    def extra_repr(self) -> str:
        shape = f"{self.heads}, {self.codes}, {self.key_dim}"
        return f"{shape}, decay={self.decay}, start={self.start!r}, restart={self.restart}"


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


def _check_codebook(k: Tensor, codebook: Tensor) -> None:
    if k.dim() != 4 or 0 in k.shape:
        raise ValueError(f"k must be (batch, heads, length >= 1, key width); got {tuple(k.shape)}.")
    if codebook.dim() != 3 or codebook.shape[::2] != k.shape[1::2] or codebook.shape[1] == 0:
        raise ValueError(
            f"codebook must be (heads, codes >= 1, key width) = ({k.shape[1]}, *, {k.shape[3]}) to fit k; "
            f"got {tuple(codebook.shape)}."
        )


def _check_mask(k: Tensor, mask: Tensor | None) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"mask must be bool (batch, length) = {(k.shape[0], k.shape[2])}, True where the token is real; "
            f"got {mask.dtype} {tuple(mask.shape)}. Pass mask.bool(), shaped like that."
        )


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
    _check_codebook(k, codebook)
    if q.shape != k.shape or v.dim() != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            "q and k must be (batch, heads, length, k) alike and v (batch, heads, length, v); "
            f"got {[tuple(x.shape) for x in (q, k, v)]}."
        )
    _check_mask(k, mask)
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
