"""Attention inside chunks: cut the sequence into blocks, attend within each, never across.

The cost falls from ``L**2`` to ``L * chunk``. What is lost is everything that crosses a border; in Mega-chunk the EMA
beneath carries it across. Source: Ma et al., "Mega", ICLR 2023, section 3.5 (Mega-chunk).

Letters: B batch, H heads, L length, C chunk length, N = ceil(L / C) chunks, z and v widths.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["chunk_attention", "fused_attention", "split_chunks"]


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
    on_weights: Callable[[Tensor], Tensor] | None = None,
    attend: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Attention within consecutive blocks of ``chunk`` positions, as one call on a reshaped batch.

    Args:
        q, k: ``(..., L, z)``; v: ``(..., L, v)``. Any L: a last block that is not full is padded and masked here.
        chunk: C, block length. A sequence no longer than that is attended in full.
        function, causal, on_weights: handed to ``attend``.
        bias: ``(C, C)``, or ``(L, L)`` when L < C; the same in every block.
        mask: bool, ``(..., L)`` or ``(B, L)`` for q of more leading axes; True where the token is real.
        attend: what to do within a block; default :func:`fused_attention`, which knows softmax only. Mega hands in
            :func:`longseq_tutorial.mechanisms.gated_attention.attend`.

    Returns:
        ``(..., L, v)``.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}.")
    if q.dim() < 2 or q.shape != k.shape or v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"q and k must be (..., L, z) alike and v (..., L, v); got {[tuple(t.shape) for t in (q, k, v)]}."
        )
    length = q.shape[-2]
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape[-1] != length or mask.shape[0] != q.shape[0]:
            raise ValueError(
                f"mask must be bool (batch, length) = {(q.shape[0], length)}, True where the token is real; "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        mask = mask.view(mask.shape[0], *(1,) * (q.dim() - 1 - mask.dim()), *mask.shape[1:]).expand(q.shape[:-1])
    block = min(chunk, length)
    if bias is not None and bias.shape[-2:] != (block, block):
        raise ValueError(f"bias must end in (block, block) = {(block, block)}; got {tuple(bias.shape)}.")
    if mask is None and length % block:
        mask = torch.ones(q.shape[:-1], dtype=torch.bool, device=q.device)  # the fill of the last block is not real
    q, k, v = (split_chunks(x, block) for x in (q, k, v))  # (..., N, C, ·)
    if mask is not None:
        mask = split_chunks(mask.unsqueeze(-1), block).squeeze(-1)  # (..., N, C), fill is False
    attend = fused_attention if attend is None else attend
    y = attend(q, k, v, function=function, bias=bias, mask=mask, causal=causal, on_weights=on_weights)
    return y.flatten(-3, -2)[..., :length, :]


def fused_attention(
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
    """Softmax attention through torch's fused call; arguments and result as in ``gated_attention.attend``.

    The fused call never shows its weights: ``on_weights`` must be None and ``function`` "softmax".
    """
    if function != "softmax" or on_weights is not None:
        raise ValueError(
            f"The fused call does softmax only and hides its weights; got function={function!r}"
            f"{', on_weights' if on_weights is not None else ''}. Pass attend=gated_attention.attend."
        )
    if bias is None and mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    length = q.shape[-2]
    past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril() if causal else None
    allowed = past
    if mask is not None:
        allowed = mask.unsqueeze(-2) if past is None else mask.unsqueeze(-2) & past  # (..., C or 1, C)
        nothing = ~allowed.any(-1, keepdim=True)  # only padding in sight: let it look at the padding, nobody reads it
        allowed = allowed | (nothing if past is None else nothing & past)
    if bias is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    offset = bias.to(q.dtype)
    if allowed is not None:
        offset = offset.masked_fill(~allowed, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=offset)
