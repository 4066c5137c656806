# %% [markdown]
# # 04 · Chunking: attention with a short view
#
# Chapter 03 ended with attention that compares every position with every other. This chapter gives up most of those
# comparisons, on purpose, and then asks what was lost: not in principle, but measured, position by position.

# %% [markdown]
# ## The question
#
# Let every position look at a few others only, and the cost falls from $L^2$ to $L$ times a few. There are two plain
# ways to choose the few. A **chunk** cuts the sequence into blocks, and a position sees its own block. A **window**
# slides along, and a position sees its neighbours up to a distance. Both throw the far away away. So:
# **what information still crosses a border, and what carries it across?** Mega-chunk and SPADE, two systems of this
# course, are two answers.
#
# After this chapter you will be able to
#
# - write chunk attention and window attention as a loop, and then as reshapes around *one* call, for any length;
# - say why the window's keys are three shifted views of the same blocks, and why no $L \times L$ matrix is ever made;
# - predict what padding does to chunks (on the left: harm) and to windows (nothing);
# - measure the receptive field of any layer or stack with a single backward pass, and read it;
# - say how far news travels in $n$ layers of chunks, of windows, and with an EMA or a state space beneath.
#
# | here | Mega (Ma et al., ICLR 2023, section 3.4) | SPADE, LongT5 | what it is |
# |---|---|---|---|
# | `chunk`, $c$ | chunk size $c$ | | length of a block; nothing crosses its borders |
# | `window`, $w$ | | radius $r$ | farthest key to each side: $|i-j| \le w$ |
# | `table` | relative bias $b_{\mathrm{rel}}$ | T5 bias, in buckets | a learned number for each distance $j - i$ |
# | `beneath` | the EMA, run first | the S4 branch, run beside | what sees the whole sequence at linear cost |

# %%
import math
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial import official
from longseq_tutorial.classroom import (
    OKABE_ITO,
    below,
    fmt,
    growth_exponent,
    peak_memory,
    quickest,
    show,
    use_style,
)
from longseq_tutorial.classroom.checks.chunking import (
    check_causal_bucket,
    check_chunk_attention,
    check_first_felt,
    check_window_attention,
    check_window_mask,
)
from longseq_tutorial.classroom.panels_chunking import ReceptiveField, draw_field, felt
from longseq_tutorial.mechanisms.chunking import (
    BucketedBias,
    chunk_attention,
    chunk_attention_slow,
    t5_bucket,
    window_attention,
    window_attention_slow,
    window_step,
)
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.gated_attention import attend
from longseq_tutorial.mechanisms.s4 import S4D
from longseq_tutorial.models.configs import MegaConfig
from longseq_tutorial.models.mega import MegaLayer

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable


def largest(a, b):
    """The largest absolute difference of two tensors."""
    return (a - b).abs().max().item()


# %% [markdown]
# ## A slow version
#
# Softmax attention, as in chapter 03: $O = \mathrm{softmax}(QK^\top/\sqrt z + B)\,V$. First in chunks: take a block,
# attend within it as if there were nothing else, go on to the next.


# %%
def chunk_slow(q, k, v, chunk):
    """q, k (B, L, z), v (B, L, v) -> (B, L, v), one block after the other."""
    blocks = []
    for start in range(0, q.shape[1], chunk):
        own = slice(start, start + chunk)  # the last one may be shorter
        scores = q[:, own] @ k[:, own].mT / math.sqrt(q.shape[-1])
        blocks.append(scores.softmax(-1) @ v[:, own])
    return torch.cat(blocks, dim=1)


# %% [markdown]
# Then with a window: take a query, gather the keys at a distance of at most $w$, attend to those. A learned `table` adds a
# number for each distance: key $j$ minus query $i$ runs from $-w$ to $w$, so $j - i$ stands at index $(j - i) + w$. When
# `causal`, only the keys up to the query's own position count.


# %%
def window_slow(q, k, v, window, table, causal=False):
    """q, k (B, L, z), v (B, L, v), table (2w + 1,) -> (B, L, v), one query after the other."""
    found, length = [], q.shape[1]
    for i in range(length):
        first, last = max(0, i - window), i if causal else min(length - 1, i + window)
        keys = slice(first, last + 1)
        scores = (k[:, keys] @ q[:, i, :, None])[..., 0] / math.sqrt(q.shape[-1])  # (B, keys)
        scores = scores + table[first - i + window : last - i + window + 1]
        found.append((scores.softmax(-1)[..., None] * v[:, keys]).sum(1))
    return torch.stack(found, dim=1)


# %% [markdown]
# What may a query look at? Ask the functions: with the unit vectors as values, attention returns its own weights. In the
# pictures, follow the row of position 8 (the line), the first one of the second chunk, and compare who is in sight of it.

# %%
N, C = 24, 8  # positions; length of a chunk, and radius of the window
nothing, unit = torch.zeros(1, N, 1), torch.eye(N)[None]
no_bias = torch.zeros(2 * C + 1)
causal_chunk = chunk_attention(nothing, nothing, unit, C, causal=True)[0]
views_of_8 = {
    "chunks of 8": chunk_slow(nothing, nothing, unit, C)[0],
    "chunks of 8, causal": causal_chunk,
    "window of radius 8": window_slow(nothing, nothing, unit, C, no_bias)[0],
    "window, causal": window_slow(nothing, nothing, unit, C, no_bias, causal=True)[0],
}
fig, axes = plt.subplots(1, 4, figsize=(11, 3.1), sharey=True)
for ax, (name, weights) in zip(axes, views_of_8.items(), strict=True):
    ax.imshow(weights > 0, vmin=0, vmax=1)
    ax.axhline(C, color=OKABE_ITO["vermilion"], linewidth=1.2, marker="")
    ax.grid(False)
    ax.set(title=name, xlabel="key j (position)", xticks=(0, 8, 16), yticks=(0, 8, 16))
axes[0].set(ylabel="query i (position)")
in_sight = {name: int((weights[C] > 0).sum()) for name, weights in views_of_8.items()}
show(
    fig,
    f"Four squares of {N} by {N}, row = query, column = key, bright where the weight is not zero. "
    + "; ".join(f"{name}: query 8 sees {count} key{'s' * (count != 1)}" for name, count in in_sight.items())
    + ". Chunks are squares along the diagonal, a window is a band.",
)

# %% [markdown]
# Chunks treat positions unequally: query 8 sits right behind a border. Under a causal mask it sees a single key, itself,
# and whatever stood one step before it might as well not exist. A window has no borders; only near the two ends of the
# sequence does a query see less.
#
# ## The identity
#
# ### 1 · A loop over chunks is a reshape
#
# The blocks of the loop never speak to each other, and neither do the sequences of a batch. So make the blocks a batch:
#
# $$ (B,\; L,\; z) \;\longrightarrow\; (B,\; L/c,\; c,\; z), \qquad
#    \mathrm{scores}\ (B,\; L/c,\; c,\; c): \quad \tfrac{L}{c} \cdot c^2 = L\,c \text{ numbers instead of } L^2 . $$
#
# In words: neighbours in time stay neighbours in memory, so cutting the axis in two moves nothing at all. It is a new way of
# reading the same numbers.

# %%
x = torch.arange(12.0).reshape(1, 12, 1)
blocks = x.unflatten(1, (-1, 4))
print(blocks[0, :, :, 0].int().tolist())
print("the same memory, nothing copied:", blocks.data_ptr() == x.data_ptr())

# %% [markdown]
# ### 2 · A window is three shifted views
#
# For the window a reshape is not enough, since every query has a set of keys of its own. But neighbouring queries have
# *nearly* the same ones. Cut the sequence into blocks as long as the window, $w$. Query $i = nw + a$ is number $a$ of block
# $n$, with $0 \le a < w$. The first and the last key that it may see are
#
# $$ i - w \;=\; (n-1)\,w + a \;\ge\; (n-1)\,w, \qquad\quad i + w \;=\; (n+1)\,w + a \;\le\; (n+2)\,w - 1 . $$
#
# In words: from wherever in its block a query looks, its window begins no earlier than the block before and ends no later
# than the block after. **Three blocks hold all the keys**: the block before, its own, and the next. (A causal window needs
# the first two.) And the three, for all blocks at once, are three views of one array, each shifted by a block.
#
# Now number the $3w$ keys in sight of a block $m = 0 \dots 3w - 1$. Key $m$ is position $j = (n-1)w + m$, and so
#
# $$ j - i \;=\; (n-1)\,w + m - nw - a \;=\; m - w - a . $$
#
# The block number $n$ has cancelled! Which keys lie in the window, and what bias they get, is the *same* small
# $(w, 3w)$ picture in every block. In the figure: left the whole matrix; the bright band is needed, and the
# grey corners are computed along with it, since whole blocks are. Right, the block of queries between the two lines, with
# the distances $j - i$ of its keys; what lies outside the band is struck out.

# %%
w, blocks_shown = 4, 5
place = torch.arange(w * blocks_shown)
distance = place[None, :] - place[:, None]  # j - i
computed = (place[None, :] // w - place[:, None] // w).abs() <= 1
needed = distance.abs() <= w
a, m = torch.arange(w)[:, None], torch.arange(3 * w)[None, :]
local = m - w - a
for n in range(1, blocks_shown - 1):  # the claim: every inner block has this picture
    assert torch.equal(distance[n * w : (n + 1) * w, (n - 1) * w : (n + 2) * w], local)
assert not (needed & ~computed).any()

fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.6), width_ratios=(1, 1.7))
left.imshow(computed.int() + needed.int(), vmin=0, vmax=2)
left.hlines((2 * w - 0.5, 3 * w - 0.5), -0.5, len(place) - 0.5, color=OKABE_ITO["vermilion"], linewidth=1.4)
left.set(xlabel="key j (position)", ylabel="query i (position)", title="needed, and computed")
left.set(xticks=range(0, 20, 4), yticks=range(0, 20, 4))
right.imshow(torch.where(local.abs() <= w, local.double(), torch.nan), vmin=-w, vmax=w)
for row in range(w):
    for column in range(3 * w):
        inside = bool(local[row, column].abs() <= w)
        shade = "white" if inside and local[row, column] < 1 else "black"
        text = f"{int(local[row, column]):d}" if inside else "×"
        right.text(column, row, text, ha="center", va="center", color=shade if inside else "#999999", fontsize=9)
for border in (w - 0.5, 2 * w - 0.5):
    right.axvline(border, color=OKABE_ITO["vermilion"], linewidth=1.4, marker="")
right.set(xlabel="key m in sight of the block: before, own, next", ylabel="query a in its block")
right.set(title="one block of queries: the distances j − i", xticks=range(0, 12, 2), yticks=range(4))
for ax in (left, right):
    ax.grid(False)
used = (2 * w + 1) / (3 * w)
show(
    fig,
    f"Left: 20 by 20 positions with a window of radius 4; for every block of queries three "
    f"blocks of keys are computed (grey and bright), of which a bright band is needed; two lines frame the third block. Right: that "
    f"block of 4 queries and its 12 keys, each cell with its distance from -4 to 4, the {int((local.abs() > w).sum())} "
    f"cells outside the window struck out. {fmt(100 * used)} % of what is computed is used.",
)

# %% [markdown]
# The band is a parallelogram in a rectangle of $w \times 3w$: $2w+1$ of $3w$ cells in a row are used, about two thirds.
# That is the price for whole blocks, and it is well paid, since whole blocks multiply fast. (SPADE, following LongT5, takes
# blocks of $r + 1$ for a radius $r$. Any block at least as long as the window will do.)
#
# ### 3 · The ends are blocks too
#
# The first block has no block before it, the last has none behind, and the length need not divide. Fill up with zeros, and
# *hide* the fill: a key of zeros has a score of 0, not of nothing, and $e^0 = 1$ is a weight like any other.
#
# ## The fast version
#
# For chunks, two reshapes around one call. (Here for lengths that divide; any length is exercise 3.)


# %%
def chunk_fast(q, k, v, chunk):
    """The same as chunk_slow, when the length is a multiple of the chunk."""
    q, k, v = (x.unflatten(1, (-1, chunk)) for x in (q, k, v))  # (B, N, C, ·)
    return F.scaled_dot_product_attention(q, k, v).flatten(1, 2)  # (B, L, v)


# %% [markdown]
# For the window, here in its causal form with two views, before and own (both directions are exercise 5). Read the shapes
# in the comments: the longest axis is only ever split, never squared.


# %%
def two_views(x, window):
    """(B, L, d) -> (B, N, 2w, d): each block behind the one before it; zeros at both ends of the sequence."""
    padded = F.pad(x, (0, 0, window, -x.shape[1] % window))
    blocks = padded.unflatten(1, (-1, window))  # (B, N + 1, w, d)
    return torch.cat([blocks[:, :-1], blocks[:, 1:]], dim=2)


def causal_window_fast(q, k, v, window, table):
    """The same as window_slow with causal=True; any length, window at least 1."""
    length = q.shape[1]
    a, m = torch.arange(window)[:, None], torch.arange(2 * window)[None, :]
    distance = m - window - a  # j - i, (w, 2w), the same for every block
    inside = (distance >= -window) & (distance <= 0)
    real = two_views(torch.ones(1, length, 1), window).mT > 0  # (1, N, 1, 2w): False for zeros before the beginning
    bias = table[(distance + window).clamp(0, 2 * window)]
    bias = torch.where(inside & real, bias, -torch.inf)  # (1, N, w, 2w)
    q = F.pad(q, (0, 0, 0, -length % window)).unflatten(1, (-1, window))  # (B, N, w, z)
    y = F.scaled_dot_product_attention(q, two_views(k, window), two_views(v, window), attn_mask=bias)
    return y.flatten(1, 2)[:, :length]


# %% [markdown]
# The package has all of it for any length, on both sides, with padding, heads, a bias for each head, and other functions than
# softmax (through `attend=`). Hidden keys get a weight of exactly 0, also under laplace, which divides by the number of keys
# *in sight*:

# %%
torch.manual_seed(0)
q, k = (torch.randn(1, 10, 4, dtype=torch.float64) for _ in range(2))
unit = torch.eye(10, dtype=torch.float64)[None]
for function in ("softmax", "laplace", "relu2"):
    weights = window_attention(q, k, unit, 2, function=function, attend=attend)[0]
    far = (torch.arange(10)[None, :] - torch.arange(10)[:, None]).abs() > 2
    print(f"{function:8} largest weight out of sight: {fmt(weights[far].max())};", end=" ")
    print("in sight:", "above 0" if weights[~far].max() > 0 else "NOTHING")

# %% [markdown]
# ## They agree
#
# Values and every gradient, in double precision, for lengths that divide and lengths that don't, shorter than the window
# and as short as 1. A fixed random combination of all outputs is differentiated, so that no error hides in a sum.


# %%
def values_and_gradients(form, tensors):
    """The output and the gradients with respect to every tensor."""
    inputs = [t.clone().requires_grad_() for t in tensors]
    y = form(*inputs)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)]


def worst(first, second, tensors):
    """The largest difference of two forms, over the output and all gradients."""
    results = (values_and_gradients(form, tensors) for form in (first, second))
    return max(largest(a, b) for a, b in zip(*results, strict=True) if a is not None or b is not None)


for length in (1, 2, 7, 24, 61):
    g = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, length, width, generator=g, dtype=torch.float64) for width in (4, 4, 3))
    table = torch.randn(2 * 8 + 1, generator=g, dtype=torch.float64)
    errors = {
        "chunks": worst(partial(chunk_slow, chunk=8), partial(chunk_attention, chunk=8), (q, k, v)),
        "window": worst(
            lambda q, k, v, t: window_slow(q, k, v, 8, t),
            lambda q, k, v, t: window_attention(q, k, v, 8, bias=t),
            (q, k, v, table),
        ),
        "causal window, ours": worst(
            lambda q, k, v, t: window_slow(q, k, v, 8, t, causal=True),
            lambda q, k, v, t: causal_window_fast(q, k, v, 8, t),
            (q, k, v, table),
        ),
    }
    if length % 8 == 0:
        errors["chunks, ours"] = worst(partial(chunk_slow, chunk=8), partial(chunk_fast, chunk=8), (q, k, v))
    print(f"length {length:2}:", "; ".join(f"{name} {below(error, 1e-11)}" for name, error in errors.items()))

# %% [markdown]
# ## What padding does
#
# Sequences of a batch are padded to one length. On the *right* that is harmless: the padding is masked, and the borders stay
# where they were. On the *left* every real token moves, and the borders do not move with it. Below, the same words with
# no padding and with two positions of it (dots); a colour is a chunk of five. Who is together with whom?

# %%
text, size, longest = "she sells sea shells", 5, 16
g = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(1, 24, width, generator=g, dtype=torch.float64) for width in (8, 8, 4))


def moved_by_padding(attention, left, right):
    """How much the outputs of the 24 real tokens change, relative to their size, when padding is put around them."""
    padded = [F.pad(t, (0, 0, left, right), value=3.0) for t in (q, k, v)]
    mask = torch.zeros(1, left + 24 + right, dtype=torch.bool)
    mask[:, left : left + 24] = True
    alone = attention(q, k, v, 8)
    return ((attention(*padded, 8, mask=mask)[:, left : left + 24] - alone).norm() / alone.norm()).item()


pads = list(range(longest + 1))
moved = {
    "chunks, padded on the left": [moved_by_padding(chunk_attention, p, 0) for p in pads],
    "chunks, padded on the right": [moved_by_padding(chunk_attention, 0, p) for p in pads],
    "window, padded on the left": [moved_by_padding(window_attention, p, 0) for p in pads],
}
fig, (left, right) = plt.subplots(1, 2, figsize=(10.8, 3.3), width_ratios=(1.25, 1))
tones = [OKABE_ITO[name] for name in ("sky", "orange", "green", "purple", "yellow")]
for row, shift in enumerate((0, 2)):
    for position, letter in enumerate("·" * shift + text):
        box = plt.Rectangle((position, -1.6 * row), 0.94, 1, color=tones[position // size], alpha=0.55)
        left.add_patch(box)
        left.text(position + 0.47, 0.5 - 1.6 * row, letter.replace(" ", "␣"), ha="center", va="center")
    left.text(-0.4, 0.5 - 1.6 * row, f"{shift} padded", ha="right", va="center")
left.set(xlim=(-5, 23), ylim=(-2.2, 1.8), title="chunks of 5, counted from position 0")
left.axis("off")
for name, change in moved.items():
    right.plot(pads, change, label=name)
right.set(xlabel="padding (positions)", ylabel="relative change of real outputs", xticks=range(0, 17, 4))
right.set(ylim=(-0.05, 1.45), title="chunks of 8, window of radius 8")
right.legend(fontsize="small", loc="upper center")
spared = [p for p in pads if moved["chunks, padded on the left"][p] < 1e-12]
show(
    fig,
    f"Left: 'she sells sea shells' in chunks of five letters, without padding and with two padded positions in front; "
    f"the second time every chunk holds other letters. Right: how much the outputs of the real tokens change. Chunks "
    f"padded on the left change by up to {fmt(max(moved['chunks, padded on the left']))} of their size, and not at all "
    f"only at {', '.join(map(str, spared))}. Chunks padded on the right: {below(max(moved['chunks, padded on the right']), 1e-12)}; "
    f"a window, padded on the left: {below(max(moved['window, padded on the left']), 1e-12)}.",
)

# %% [markdown]
# Unless the padding is a whole number of chunks, other tokens sit together, and the outputs change. This is no mistake of
# an implementation: where a border falls is part of the answer of a chunked model. Pad on the right, as this course does
# (and Mega's code does for text), or put up with it. A window only counts distances, and padding changes none of them.
#
# ## How it grows
#
# Per sequence and head, full attention computes $L \cdot L$ scores, chunks $L \cdot c$, a window $L \cdot 3w$ (and uses
# $2w+1$ of them in a row). We take $c = 128$ and $w = 64$, so that a position sees about as much in either, and measure
# processor time and peak memory, on one core. Full attention is the plain kind that makes its matrix; it stops at 4,096.
# Compare the slopes first.

# %%
forms = {
    "full attention": (lambda q, k, v: attend(q, k, v), (512, 1024, 2048, 4096)),
    "window of radius 64": (lambda q, k, v: window_attention(q, k, v, 64), (1024, 2048, 4096, 8192, 16384)),
    "chunks of 128": (lambda q, k, v: chunk_attention(q, k, v, 128), (1024, 2048, 4096, 8192, 16384)),
}
seconds, bytes_held = {}, {}
for name, (form, lengths) in forms.items():
    seconds[name], bytes_held[name] = {}, {}
    for length in lengths:
        torch.manual_seed(0)
        inputs = torch.randn(3, 1, length, 64)
        seconds[name][length] = quickest(lambda form=form, inputs=inputs: form(*inputs))
        bytes_held[name][length] = peak_memory(lambda form=form, inputs=inputs: form(*inputs))


def exponent(cost):
    return growth_exponent(list(cost), list(cost.values())).exponent


# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.7))
for name in forms:
    axes[0].plot(list(seconds[name]), [1e3 * s for s in seconds[name].values()], label=name)
    axes[1].plot(list(bytes_held[name]), [b / 2**20 for b in bytes_held[name].values()], label=name)
axes[0].set(ylabel="time (ms)", title="time, forward")
axes[1].set(ylabel="peak memory (MiB)", title="memory, forward")
for ax in axes:
    ax.set(xscale="log", yscale="log", xlabel="length (positions)")
    ax.set_xticks([512, 1024, 2048, 4096, 8192, 16384], ["512", "1k", "2k", "4k", "8k", "16k"])
    ax.xaxis.minorticks_off()
axes[0].legend(fontsize="small")
facts = {
    "time of full attention, exponent above 1.6": exponent(seconds["full attention"]) > 1.6,
    "of the window and of chunks, below 1.4": max(
        exponent(seconds[n]) for n in ("window of radius 64", "chunks of 128")
    )
    < 1.4,
    "memory of full attention, exponent 1.9 to 2.1": 1.9 < exponent(bytes_held["full attention"]) < 2.1,
    "of the window and of chunks, below 1.2": all(
        exponent(bytes_held[n]) < 1.2 for n in ("window of radius 64", "chunks of 128")
    ),
    "at 4,096 the window is more than three times faster than full attention": (
        seconds["full attention"][4096] > 3 * seconds["window of radius 64"][4096]
    ),
    "and chunks are faster than the window": seconds["chunks of 128"][4096] < seconds["window of radius 64"][4096],
}
for fact, holds in facts.items():
    print(f"{fact}: {holds}")
show(
    fig,
    "Time and peak memory against length, logarithmic, three lines each: full attention steep, a window of radius 64 "
    "and chunks of 128 with half its slope. " + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items()) + ".",
)

# %% [markdown]
# On these axes doubling the length doubles the cost of the two short-sighted forms and quadruples that of the matrix. Chunks
# are the cheapest thing there is: when the length divides, nothing is copied and nothing masked. The window pays for its three views, each key and
# value being read in three blocks, and for the third of the scores that it hides. (In the end its memory bends below a straight
# line: from some thousand positions on the package works on a group of blocks at a time, of which more below. For chunks, whose
# fused call makes no scores to be spared, it rises half as much again above the line, where the results of two groups are put together.)
#
# And at a given length, the cost is proportional to the width. Full attention is the widest window:

# %%
inputs = torch.randn(3, 1, 1024, 64)
widths = (32, 64, 128, 256)
held = [
    peak_memory(lambda w=w: window_attention(*inputs, w)) - peak_memory(lambda: window_attention(*inputs, 1))
    for w in widths
]
print(
    "memory above that of the narrowest window, w = 32 to 256: exponent 0.8 to 1.2:",
    0.8 < growth_exponent(widths, held).exponent < 1.2,
)

# %% [markdown]
# ## Why this is fast
#
# Count what one position costs. A query that sees $n$ keys takes $2nz$ operations for its scores, $2nv$ for its output, and $n$
# exponentials; and the numbers of $q$, $k$, $v$ and of the output have to be moved once:
#
# $$ \underbrace{2n\,(z + v)}_{\text{operations}} \;+\; \underbrace{n}_{\text{exp or erf}} \;+\;
#    \underbrace{4\,(2z + 2v)}_{\text{bytes}}, \qquad n = c \ \text{ in chunks}, \quad n = 2w + 1 \ \text{ in a window.} $$
#
# In words: nothing here knows of $L$. That is the way there; the way back takes twice the products again, since each has two
# factors that want a gradient, and moves the gradients, too. With three rates of this very machine, those of a large matrix
# product, of the exponential, and of copying, we have a **floor** that no form gets below on one core.
#
# Now, the three views compute $3w$ scores where $2w + 1$ are needed. Would it not be better to compute only those? Here is a form that
# does: beside every query it puts the keys of its own window, and not one more.


# %%
def window_gathered(q, k, v, window):
    """The same as window_slow without a bias and not causal, for all queries at once; wastes no score."""
    real = F.pad(torch.ones_like(k[..., :1]), (0, 0, window, window)).unfold(1, 2 * window + 1, 1)
    k, v = (F.pad(x, (0, 0, window, window)).unfold(1, 2 * window + 1, 1) for x in (k, v))  # (B, L, ·, 2w + 1)
    scores = q[:, :, None] @ k / math.sqrt(q.shape[-1])  # (B, L, 1, 2w + 1)
    return (scores.masked_fill(real == 0, -torch.inf).softmax(-1) @ v.mT)[:, :, 0]


q, k, v = (torch.randn(2, 61, width, dtype=torch.float64) for width in (4, 4, 3))
error = worst(partial(window_gathered, window=8), partial(window_attention, window=8), (q, k, v))
print("own keys for every query = three views, values and gradients:", below(error, 1e-11))

# %% [markdown]
# In the left figure, compare it with the loop over queries, with the package's three views, and with the floor of the scores that
# are *needed*. The right one is about long sequences, for chunks with laplace: all chunks in one call is what we called the fast
# version; the other line, in groups, is explained below it. Both measure the way there and back, as in training.

# %%
W, C_LONG, Z_LONG = 64, 128, 32
large, matrix, scores = torch.randn(2**23), torch.randn(1024, 1024), torch.randn(2**18)
operations_a_second = 2 * 1024**3 / quickest(lambda: matrix @ matrix)
bytes_a_second = 8 * large.numel() / quickest(lambda: large.clone())
exp, erf = (quickest(lambda f=f: f(scores), patience=0.03) / scores.numel() for f in (torch.exp, torch.erf))


def floor_of(keys, width, functions):
    """Seconds for a position, there and back: the products three times; what is read and written once or twice."""
    moved = 4 * (4 + 7) * width  # q, k, v, y there; q, k, v, the gradient of y and three gradients back; float32
    return 3 * 2 * keys * 2 * width / operations_a_second + keys * functions + moved / bytes_a_second


def there_and_back(form, length, width):
    """Seconds for a position."""
    leaves = [torch.randn(1, length, width, requires_grad=True) for _ in range(3)]
    return quickest(lambda: torch.autograd.grad(form(*leaves).sum(), leaves), patience=0.05) / length


no_table = torch.zeros(2 * W + 1)
OWN, SHARED = "own keys for every query", "three views"
windows = {
    "query by query": (partial(window_slow, window=W, table=no_table), (512, 1024)),
    OWN: (partial(window_gathered, window=W), (1024, 4096)),
    SHARED: (partial(window_attention, window=W), (1024, 4096, 16384)),
}
in_laplace = partial(chunk_attention, chunk=C_LONG, function="laplace", attend=attend)
ways = {
    "all chunks in one call": partial(in_laplace, on_weights=lambda weights: weights),  # who watches gets all at once
    "in groups of chunks": in_laplace,
}
a_window = {name: [there_and_back(form, length, 64) for length in lengths] for name, (form, lengths) in windows.items()}
long_lengths = (4096, 16384, 65536)
a_chunk = {name: [there_and_back(form, length, Z_LONG) for length in long_lengths] for name, form in ways.items()}

views_floor, chunks_floor = floor_of(2 * W + 1, 64, exp), floor_of(C_LONG, Z_LONG, erf + exp)  # exp: laplace's slope

fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.9))
for name, times in a_window.items():
    left.plot(windows[name][1], [1e6 * t for t in times], label=name)
for name, times in a_chunk.items():
    right.plot(long_lengths, [1e6 * t for t in times], label=name)
for ax, floor in ((left, views_floor), (right, chunks_floor)):
    ax.axhline(1e6 * floor, color="black", linestyle=":", marker="", label="floor")
    ax.set(xscale="log", xlabel="length (positions)", ylabel="microseconds for each position")
    ax.set_xticks([1024, 4096, 16384, 65536][ax is right :][:3], ["1k", "4k", "16k", "64k"][ax is right :][:3])
    ax.minorticks_off()
    ax.legend(fontsize="small")
left.set(yscale="log", title="a window of radius 64", xlim=(400, 20000))
left.set_yticks([1, 3, 10, 30, 100, 300], ["1", "3", "10", "30", "100", "300"])
right.set(title="chunks of 128, laplace", ylim=(0, None))
own, three = a_window[OWN], a_window[SHARED]
at_once, groups = a_chunk.values()
facts = {
    "at 1,024 the loop over queries takes more than five times as long as the three views": (
        a_window["query by query"][-1] > 5 * three[0]
    ),
    "at 4,096 own keys for every query take more than three times as long": own[1] > 3 * three[1],
    "at 16,384 the three views are within ten times of the floor": three[-1] < 10 * views_floor,
    "chunks at 65,536 are faster in groups": groups[-1] < at_once[-1],
    "in groups a position at 65,536 costs less than twice as much as at 4,096": groups[-1] < 2 * groups[0],
    "and is within eight times of the floor": groups[-1] < 8 * chunks_floor,
}
show(
    fig,
    "Time for each position against the length, there and back, one core, floors dotted. Left a window of radius 64: query by query, own keys for "
    "every query, three views. Right chunks of 128 with laplace: all in one call, and in groups. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# Left: **the step that brought most is to share.** Own keys for every query need a third fewer operations than three views, and
# still take several times as long. Where? Measure the two halves of the way:

# %%
inputs = torch.randn(3, 1, 4096, 64)
there = {name: quickest(lambda f=f: f(*inputs), patience=0.05) for name, (f, _) in list(windows.items())[1:]}
print("there alone, own keys take less than three times as long:", there[OWN] < 3 * there[SHARED])
held = {}
for name in (OWN, SHARED):
    leaves = [x.clone().requires_grad_() for x in inputs]
    form = windows[name][0]
    held[name] = peak_memory(lambda form=form, leaves=leaves: torch.autograd.grad(form(*leaves).sum(), leaves))
print("there and back, memory is more than five times as large:", held[OWN] > 5 * held[SHARED])

# %% [markdown]
# The way there is no worse: the windows of neighbouring queries overlap in memory, `unfold` only describes that, and nothing
# is copied. But on the way *back* every query hands each of its $2w + 1$ keys a gradient of its own, $L\,(2w+1)\,z$ numbers, written
# out and added up afterwards. With three views a block of queries shares its keys, and one product of two matrices adds up
# the gradients of a whole block while they are made.
#
# Right: the same formula, and yet a position becomes dearer in a long sequence. The count has not changed, but the scores of all
# chunks, $Lc$ numbers in one tensor, have become so many that their memory is fetched from the system anew each time, page by
# page. So the package hands over a **group** of chunks at a time, about a
# million scores (for a window, with a block more at each end), and memory that one group gives back the next one takes. For
# laplace, `attend` goes further within a group: it works in the two tiles of memory of chapter 03, and makes each tile
# once more on the way back; the lower line has that in it. `window_attention` takes groups as well.
#
# And where does it stand? Within a few times of the floor, and not at it. What remains is passes over the scores (divide, hide,
# subtract, erf, add, halve, and their way back), and for the window the third of the scores that it computes and hides.

# %% [markdown]
# ## What crosses a border
#
# ### Asking with gradients
#
# Masks say what one layer of *attention* may look at. What an output has *felt* after several layers, with other things beneath
# and beside, is better measured than believed. Output $y_i$ feels input $x_j$ if a small change of $x_j$ changes it:
#
# $$ F_{ij} = \left\| \frac{\partial (r^\top y_i)}{\partial x_j} \right\| , \qquad r \text{ a fixed random vector.} $$
#
# One row of $F$ is one backward pass: differentiate output $i$. All rows are $L$ passes, or a single one with a trick. Sequences
# in a batch do not know of each other. So put $L$ copies of $x$ into a batch, and ask copy $i$ about its output $i$ only.


# %%
def receptive_field(layer, x):
    """layer (B, L, D) -> (B, L, D), x (L, D) -> (L, L): how strongly output i (row) feels input j (column)."""
    copies = x.expand(len(x), *x.shape).clone().requires_grad_()  # (L, L, D): copy, position, channel
    y = layer(copies)
    each = torch.arange(len(x))
    r = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0), dtype=y.dtype)
    (gradient,) = torch.autograd.grad((y[each, each] @ r).sum(), copies)
    return gradient.norm(dim=-1)


# %% [markdown]
# Something to ask: a small layer, a residual connection around attention, with room for something **beneath** it that
# looks first. With nothing beneath, $s = x$.


# %%
class LocalLayer(nn.Module):
    """x + W_o attention(W_q s, W_k s, W_v s), where s = beneath(x), or x itself."""

    def __init__(self, dim, attention, beneath=None):
        super().__init__()
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_x = nn.Linear(dim, dim, bias=False)
        self.attention, self.beneath = attention, beneath

    def forward(self, x):
        s = x if self.beneath is None else self.beneath(x)
        return x + self.to_x(self.attention(*self.to_qkv(s).chunk(3, dim=-1)))


def stack(attention, layers=1, beneath=None, dim=8, seed=0):
    """A stack of layers in double precision; `beneath` makes what lies beneath each."""
    torch.manual_seed(seed)
    made = (LocalLayer(dim, attention, beneath() if beneath else None) for _ in range(layers))
    return nn.Sequential(*made).double()


L, C = 64, 8
asked = torch.randn(L, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
in_chunks, in_window = partial(chunk_attention, chunk=C), partial(window_attention, window=C)
place = torch.arange(L)
distance = place[None, :] - place[:, None]  # j - i
same_chunk = place[None, :] // C == place[:, None] // C

# %% [markdown]
# ### Attention alone
#
# Above one layer, below three. In the pictures a colour is the size of the gradient, on a logarithmic scale within each row;
# blank means exactly nothing. Look at what three layers change in each column.

# %%
alone = {
    "chunks": in_chunks,
    "chunks, causal": partial(in_chunks, causal=True),
    "window": in_window,
    "window, causal": partial(in_window, causal=True),
}
fields = {(name, n): receptive_field(stack(f, n), asked) for name, f in alone.items() for n in (1, 3)}
fig, axes = plt.subplots(2, 4, figsize=(10.6, 5.6), sharex=True, sharey=True)
for column, name in enumerate(alone):
    for row, n in enumerate((1, 3)):
        image = draw_field(axes[row, column], fields[name, n])
        axes[row, column].set(title=f"{name}, {n} layer{'s' * (n > 1)}", xticks=(0, 24, 48), yticks=(0, 24, 48))
for ax in axes[-1]:
    ax.set(xlabel="input (position)")
for ax in axes[:, 0]:
    ax.set(ylabel="output (position)")
fig.colorbar(image, ax=axes, shrink=0.7, label="gradient: log10 of its share of the row's largest")
past = distance <= 0
for n in (1, 3):
    assert torch.equal(fields["chunks", n] > 0, same_chunk)
    assert torch.equal(fields["chunks, causal", n] > 0, same_chunk & past)
    assert not (fields["window", n] > 0)[distance.abs() > n * C].any()
    assert (fields["window", n] > 0)[distance.abs() <= n * C].all()
    assert torch.equal(fields["window, causal", n] > 0, (distance.abs() <= n * C) & past)
show(
    fig,
    f"Eight receptive fields, output against input, {L} positions. Chunks of {C}: {L // C} squares on the diagonal, the same "
    f"squares after three layers, to the last cell. Window of radius {C}: a band that reaches {C} to each side after one "
    f"layer and {3 * C} after three, fainter towards its edges. The causal forms are the lower halves.",
)
for name in alone:
    shares = [100 * (fields[name, n] > 0).double().mean().item() for n in (1, 3)]
    print(f"{name:15} felt pairs: {fmt(shares[0])} % after one layer, {fmt(shares[1])} % after three")

# %% [markdown]
# The squares do not grow. **No layer of chunks crosses a border, so no number of them does.** A model of chunks alone reads a
# long document as a pile of short ones that never meet.
#
# The band grows by $w$ with each layer: what reached $j$ is passed on from $j$. Three layers of radius 8 reach 24. It
# grows, but slowly, and it fades on the way: the outermost cells have a single path leading there, the middle very many.
# To reach across 16,384 positions with a radius of 128 takes 128 layers.
#
# ### With something beneath
#
# Now let an EMA run over the whole sequence before each attention, as in Mega-chunk. Its cost is linear in $L$, too (chapter 01), and it has never heard of
# chunks. Or a state space, the S4D of chapter 02: SPADE has an S4 beside the attention of its first layer or, in one
# variant, beneath it. *One layer each:*

# %%
beneath = {
    "EMA": lambda: DampedEMA(8, 4, bidirectional=True),
    "causal EMA": lambda: DampedEMA(8, 4),
    "S4D": lambda: S4D(8, 16, bidirectional=True),
}
carried = {
    "chunks on an EMA": stack(in_chunks, 1, beneath["EMA"]),
    "causal chunks on a causal EMA": stack(partial(in_chunks, causal=True), 1, beneath["causal EMA"]),
    "window on an EMA": stack(in_window, 1, beneath["EMA"]),
    "chunks on S4D": stack(in_chunks, 1, beneath["S4D"]),
}
fields |= {(name, 1): receptive_field(layer, asked) for name, layer in carried.items()}
fig, axes = plt.subplots(1, 4, figsize=(11.4, 3.3), sharey=True)
for ax, name in zip(axes, carried, strict=True):
    image = draw_field(ax, fields[name, 1])
    ax.set(title=name.replace(" on ", "\non "), xlabel="input (position)", xticks=(0, 24, 48), yticks=(0, 24, 48))
    ax.title.set_fontsize(9.5)
axes[0].set(ylabel="output (position)")
fig.colorbar(image, ax=axes, shrink=0.8, label="gradient (log10 of share)")
crossing = {name: float((felt(fields[name, 1]) & ~same_chunk).double().sum() / (~same_chunk).sum()) for name in carried}
past_only = crossing["causal chunks on a causal EMA"]
show(
    fig,
    "Receptive fields of one layer with something beneath the attention. Chunks on an EMA: no longer squares; "
    f"{fmt(100 * crossing['chunks on an EMA'])} % of the pairs across borders are felt, fading with the distance, in "
    f"horizontal stripes of a chunk's width. Causal: {fmt(100 * past_only)} % of them, all in the past. Window on an EMA: a band with a halo, "
    f"{fmt(100 * crossing['window on an EMA'])} %. Chunks on S4D: {fmt(100 * crossing['chunks on S4D'])} %, with hardly any fading.",
)

# %% [markdown]
# The borders are open: colour runs out over them in every direction. Why in horizontal *stripes*, and why do they jump at
# borders? What the EMA brings to one member of a chunk, attention hands to all of them. So the rows of a chunk look alike: each has felt what its luckiest member felt.
#
# How strong is it, and how far? One row of those pictures, output 36, with borders marked:

# %%
middle = 36
fig, ax = plt.subplots(figsize=(9.2, 3.9))
rows = {"chunks alone": fields["chunks", 1], "window alone, 3 layers": fields["window", 3]}
rows |= {name: fields[name, 1] for name in ("chunks on an EMA", "window on an EMA", "chunks on S4D")}
for name, field in rows.items():
    share = field[middle] / field[middle].max()
    thick = dict(linewidth=3, zorder=5) if name == "chunks alone" else dict(markevery=4)
    ax.plot(torch.where(share > 1e-12, share, torch.nan), label=name, **thick)
for border in range(0, L + 1, C):
    ax.axvline(border - 0.5, color="#BBBBBB", linewidth=0.8, linestyle=":", marker="")
ax.set(yscale="log", ylim=(1e-6, 3), xlabel="input (position)", ylabel=f"gradient of output {middle} (share)")
fig.legend(fontsize="small", loc="outside right upper")
far = {name: (field[middle, 0] / field[middle].max()).item() for name, field in rows.items()}
ema_fades = far["chunks on an EMA"] < far["chunks on S4D"] / 10
show(
    fig,
    f"Sensitivity of output {middle} to every input, logarithmic. Chunks alone: only positions 32 to 39. Three layers of a "
    f"window: 12 to 60, then nothing. On an EMA: everywhere, in straight lines downwards, {fmt(far['chunks on an EMA'], 1)} of "
    f"the largest at input 0. On S4D: {fmt(far['chunks on S4D'], 1)} at input 0. The state space is more than ten "
    f"times stronger there: {ema_fades}.",
)
print("at distance 36 the fresh EMA is less than a tenth of S4D:", ema_fades)

# %% [markdown]
# Straight lines on a logarithmic axis are exponential decay: this is the EMA's forgetting, seen from above. A fresh EMA has a
# half-life of a few steps (chapter 01), so 36 steps away little is left; it has to *learn* to remember. The state space was
# built to remember, and hardly fades.
#
# So there are two ways to reach far: hop by hop through many layers of windows, or in one step through something beneath. And
# the reach, in tokens, against depth? Felt means here: more than a millionth of the row's largest.

# %%
L_long = 128
long = torch.randn(L_long, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
towers = {
    "chunks": (in_chunks, None),
    "window": (in_window, None),
    "chunks on an EMA": (in_chunks, beneath["EMA"]),
    "window on an EMA": (in_window, beneath["EMA"]),
}
depths = (1, 2, 3, 4, 5, 6)
centre = L_long // 2
reach = {name: [] for name in (*towers, "window, any gradient at all")}


def farthest(seen):
    """The largest distance from the middle at which something is felt."""
    return int((seen.nonzero()[:, 0] - centre).abs().max())


for name, (attention, carrier) in towers.items():
    for n in depths:
        field = receptive_field(stack(attention, n, carrier), long)
        reach[name].append(farthest(felt(field, 1e-6)[centre]))
        if name == "window":
            reach["window, any gradient at all"].append(farthest(field[centre] > 0))
fig, ax = plt.subplots(figsize=(8.6, 3.8))
for name, steps in reach.items():
    ax.plot(depths, steps, label=name, linestyle="--" if "at all" in name else "-")
ax.axhline(centre, color="#999999", linestyle=":", marker="")
ax.set(xlabel="layers", ylabel="reach of the middle output (tokens)", xticks=depths)
fig.legend(fontsize="small", loc="outside right upper")
in_name = reach["window, any gradient at all"]
show(
    fig,
    f"Reach in tokens against the number of layers, {L_long} positions, seen from the middle. Chunks: "
    f"{reach['chunks'][0]} at every depth. Window, any gradient at all: {', '.join(map(str, in_name))}, a straight line; "
    f"but above a millionth only {reach['window'][-1]} after six layers. With an EMA beneath the reach is longer from the "
    f"start, {reach['chunks on an EMA'][0]} and {reach['window on an EMA'][0]}, and grows until it meets the ends of the sequence (dotted).",
)
print("chunks never grow:", len(set(reach["chunks"])) == 1)
print("a window grows by its radius a layer:", in_name == [n * C for n in depths])
print("but above a millionth it falls behind that:", reach["window"][-1] < in_name[-1])
ahead = zip(reach["chunks on an EMA"], reach["window"], strict=True)
print("chunks on an EMA reach farther than a window in every depth:", all(a > b for a, b in ahead))

# %% [markdown]
# The window's line has a second one below it. On paper six layers of radius 8 reach 48 tokens; but the outermost is connected by
# one single path of six hops, and every hop is one weight among seventeen. What an output feels *in effect* is a good deal
# narrower than what it is allowed to feel. And the EMA is not only wider on paper: it carries in a single hop.
#
# ### To feel is not yet to use
#
# A gradient that is not zero can still be useless. So a test that can be failed: position 0 holds a bit, the 23 positions
# after it hold only noise, and the *last* position must tell the bit. Chunks of 8, causal, so two borders lie between. Four
# models, 180 small updates each. Before running it: which of them can, which cannot?


# %%
def learns_to_tell(attention, layers, carrier=None, length=24, dim=16, updates=180):
    """The trained model, and its share of right answers in the last 20 batches, each of them new."""
    torch.manual_seed(0)
    made = (LocalLayer(dim, attention, carrier() if carrier else None) for _ in range(layers))
    model = nn.Sequential(nn.Linear(2, dim), *made, nn.Linear(dim, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    right = []
    for _ in range(updates):
        bit = torch.randint(0, 2, (32,)) * 2.0 - 1
        x = torch.randn(32, length, 2)
        x[..., 0] = 0  # channel 0: the bit, once; channel 1: noise
        x[:, 0, 0] = bit
        answer = model(x)[:, -1, 0]
        loss = F.softplus(-bit * answer).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append((answer * bit > 0).float().mean().item())
    return model, sum(right[-20:]) / 20


models = {
    "chunks, 4 layers": (partial(in_chunks, causal=True), 4),
    "window of radius 8, 2 layers": (partial(in_window, causal=True), 2),
    "window of radius 8, 4 layers": (partial(in_window, causal=True), 4),
    "chunks on an EMA, 2 layers": (partial(in_chunks, causal=True), 2, lambda: DampedEMA(16, 4)),
}
for name, model in models.items():
    trained, share = learns_to_tell(*model)
    verdict = "tells it" if share > 0.95 else "guesses" if share < 0.6 else "is UNDECIDED"
    print(f"{name:30} {verdict}")


def far_weight(model):
    """The largest weight that any EMA of the model gives to what is 16 steps old or older."""
    kernels = [layer.beneath.kernel(24) for layer in model if isinstance(layer, LocalLayer)]
    return max(kernel[:, 16:].abs().max().item() for kernel in kernels)


fresh, _ = learns_to_tell(*models["chunks on an EMA, 2 layers"], updates=1)
print(
    "training has made the EMA's weights beyond 16 steps at least three times larger:",
    far_weight(trained) > 3 * far_weight(fresh),
)

# %% [markdown]
# Four layers of chunks guess, whatever they learn: the bit is behind two borders. Two layers of windows reach 16 back, and the
# bit is 23 away; four reach 32. And chunks on an EMA tell it with two layers. A fresh EMA is forgetful, but training
# lengthens its memory when the task asks for it.
#
# ### In Mega-chunk itself
#
# Now the real thing: the package's `MegaLayer` with chunks of 8, norm, gates and all. We measure it, then silence its EMA
# ($\eta = 0$; the skip $\omega x$ stays) and measure again.

# %%
torch.manual_seed(0)
config = MegaConfig(dim=8, n=4, z_dim=8, v_dim=16, chunk=8, norm="layernorm", prenorm=True)
mega = MegaLayer(config).double().eval()
with torch.no_grad():
    for weight in mega.attention.parameters():
        weight.add_(0.3 * torch.randn_like(weight))  # a layer is born nearly blind; give it something to look for
speaking = receptive_field(mega, asked)
with torch.no_grad():
    mega.ema.eta.zero_()
silent = receptive_field(mega, asked)
crossed = felt(speaking) & ~same_chunk
print("with its EMA, pairs felt across borders:", fmt(100 * (crossed.sum() / (~same_chunk).sum()).item()), "%")
print("EMA silenced, pairs felt across borders:", int((silent[~same_chunk] > 0).sum()))
print("EMA silenced, within chunks everything is felt:", bool((silent[same_chunk] > 0).all()))

# %% [markdown]
# In Mega-chunk the EMA is the only path between chunks. Here that is, to the last digit: take it away, and the gradient
# across every border is exactly 0.
#
# ## A bias for far distances: SPADE's buckets
#
# A window of radius 511, as SPADE uses for language, would need a table of 1,023 numbers a head, and most of them would be
# learned from few examples. Does a word care whether another is 301 or 302 steps away? T5's answer, which SPADE takes over: near
# distances one by one, far ones in **buckets** that grow by a constant factor. With $n$ the distance, $h$ the number of exact
# buckets, $b$ the number of all in that direction and $n_{\max}$ the distance up to which they are told apart:
#
# $$ \mathrm{bucket}(n) = n \ \text{ if } n < h, \qquad \text{else} \quad
#    h + \left\lfloor \frac{\log(n/h)}{\log(n_{\max}/h)}\,(b - h) \right\rfloor, \ \text{ but at most } b - 1 . $$
#
# In words: half of the buckets hold one distance each; the rest divide the way from $h$ to $n_{\max}$ into equal *ratios*. In
# both directions, half of all buckets belong to keys behind the query, half to keys ahead. Left: the buckets; look at how long
# the stairs become, and that the last begins before $n_{\max}$, as it is one of the $b$. Right: what a bias made of them looks like for a window, here with random numbers to be learned.

# %%
far = torch.arange(-200, 201)
both, causal = t5_bucket(far), t5_bucket(far, bidirectional=False)
fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6))
left.step(far, both, where="mid", label="both directions", marker="")
left.step(far[far <= 0], causal[far <= 0], where="mid", label="causal", linestyle="--", marker="")
left.set(xlabel="key minus query, j − i (steps)", ylabel="bucket", title="32 buckets up to distance 128")
left.legend(fontsize="small")
torch.manual_seed(3)
bias = BucketedBias(heads=2)
with torch.no_grad():
    bias.table.normal_()
    tables = bias(150)  # (H, 301)
for head, line in enumerate(tables):
    right.step(range(-150, 151), line, where="mid", label=f"head {head}", marker="", linestyle=("-", "--")[head])
right.set(xlabel="key minus query, j − i (steps)", ylabel="bias", title="a bias for a window of radius 150")
right.legend(fontsize="small")
counts = torch.bincount(causal[far <= 0])
exact, widest = int((counts == 1).sum()), int(counts[:-1].max())
show(
    fig,
    f"Left: bucket against offset. In both directions distances 0 to 7 have a bucket each, then the stairs widen, and the "
    f"last begins at {int(far[both == both.max()].min())}; keys ahead use buckets {int(both[far > 0].min())} to {int(both.max())}, keys behind 0 to {int(both[far < 0].max())}. "
    f"Causal: {exact} buckets hold one distance, the widest before the last holds {widest}. Right: two bias tables of "
    f"{tables.shape[1]} distances, fine steps near the query and broad ones far from it, made of 32 numbers a head.",
)
print("numbers to learn for one head, radius 511: table", 2 * 511 + 1, "- buckets", bias.table.shape[0])

# %% [markdown]
# Through the package, the bias is the `bias=` of a window: `window_attention(q, k, v, w, bias=BucketedBias(heads)(w))`.
# Gradients reach the table through the small $(w, 3w)$ picture. Below we check all of it against SPADE's authors.
#
# ## One step at a time
#
# A causal window streams in constant memory: keep the last $w$ keys and values; as one comes in, the oldest goes. (Chunks do
# the same with a cache that is emptied at each border: `chunk_step`.)

# %%
torch.manual_seed(0)
q, k, v = (torch.randn(2, 40, width, dtype=torch.float64) for width in (4, 4, 3))
table = torch.randn(2 * 6 + 1, dtype=torch.float64)
state, stream, sizes = None, [], []
for t in range(40):
    y_t, state = window_step(q[:, t], k[:, t], v[:, t], state, 6, table)
    stream.append(y_t)
    sizes.append(state[0].shape[1])
at_once = window_attention(q, k, v, 6, bias=table, causal=True)
print("step by step = at once:", below(largest(torch.stack(stream, dim=1), at_once), 1e-12))
print("keys held:", sizes[:9], "... and never more than", max(sizes))

# %% [markdown]
# ## The panel
#
# Choose what attention looks at, how far, how many layers, and whether an EMA lies beneath. Left is the mask of a single layer; in
# the middle the receptive field of the whole stack, measured as above; right one row of it. Things to try:
#
# 1. Chunks: move from one layer to six. Then switch the EMA on.
# 2. With the EMA on, which half-life do you need for output 63 to feel input 0 with more than 1 % of its strongest?
# 3. A window of radius 8 against chunks of 16: which sees more pairs after one layer, which after three?

# %%
panel = ReceptiveField()
panel

# %%
print(panel.set(layers=6).say())
print(panel.set(beneath="EMA", layers=1).say())
print(panel.set(sight="window", beneath="nothing", layers=3, causal=True).say())

# %% [markdown]
# The same panel measures anything that maps a sequence to a sequence: our Mega layer, whose EMA is still silenced, or a stack of yours.

# %%
yours = ReceptiveField(mega, asked, position=36)
yours

# %%
print(yours.set(position=40).say())
deeper = ReceptiveField(stack(partial(in_chunks, causal=True), 2, lambda: S4D(8, 16)), asked, position=63)
print(deeper.say())

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. The chapter never depends on your answers.
#
# ### Exercise 1 · Who sees whom
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Write `window_mask(length, window, causal)`: a boolean matrix `(length, length)`, row = query, column = key, `True` where the
# key is at a distance of at most `window` and, when causal, not in the future.
#
# <details><summary>Hint 1</summary>
#
# `torch.arange(length)[None, :] - torch.arange(length)[:, None]` is $j - i$ for all pairs at once.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Two conditions, joined with `&`. In the causal case a query sees itself.
#
# </details>


# %%
def window_mask(length, window, causal):
    """-> bool (length, length), row = query, column = key."""
    # BEGIN SOLUTION "your turn: compare key minus query with the window"
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]  # j - i
    if causal:
        return (offset >= -window) & (offset <= 0)
    return offset.abs() <= window
    # END SOLUTION


# %%
check_window_mask(window_mask)

# %% [markdown]
# ### Exercise 2 · How far back?
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Causal attention alone, nothing beneath. Which is the first input that output `position` feels after `layers` layers? Write
# `first_felt(position, layers, size)` and return two whole numbers: for chunks of length `size`, and for a causal window of radius `size`.
#
# <details><summary>Hint 1</summary>
#
# Look at the eight pictures of *Attention alone*: what do three layers change in the column of the causal chunks?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A position's chunk begins at the last multiple of `size` that is not beyond it. And no sequence begins before 0.
#
# </details>


# %%
def first_felt(position, layers, size):
    """Whole numbers -> (first input felt with chunks, first input felt with a window)."""
    # BEGIN SOLUTION "your turn: one of the two does not depend on the number of layers"
    return position - position % size, max(0, position - layers * size)
    # END SOLUTION


# %%
check_first_felt(first_felt)

# %% [markdown]
# ### Exercise 3 · Chunks for any length
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# `chunk_fast` refuses a length that is not a multiple of the chunk. Write one that does not, without a loop: softmax attention in
# chunks for `q, k (B, L, z)` and `v (B, L, v)`. Fill up the last chunk and see to it that nobody looks at the fill.
#
# <details><summary>Hint 1</summary>
#
# `-length % chunk` positions are missing. `F.pad(x, (0, 0, 0, missing))` adds zeros at the end of the length axis.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.arange(length + missing) < length`, cut into chunks like everything else, says which keys are real. Scores of the others
# become $-\infty$ before the softmax. Cut the result back to `length`.
#
# </details>


# %%
def my_chunk_attention(q, k, v, chunk):
    """q, k (B, L, z), v (B, L, v), any L -> (B, L, v)."""
    # BEGIN SOLUTION "your turn: pad, cut into chunks, hide the fill, attend, put together again"
    length = q.shape[1]
    missing = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, chunk)) for x in (q, k, v))  # (B, N, C, ·)
    real = (torch.arange(length + missing) < length).view(-1, 1, chunk)  # (N, 1, C)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    weights = scores.masked_fill(~real, -torch.inf).softmax(-1)
    return (weights @ v).flatten(1, 2)[:, :length]
    # END SOLUTION


# %%
check_chunk_attention(my_chunk_attention)

# %% [markdown]
# ### Exercise 4 · Buckets
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# T5's buckets for one direction, by the formula above. `distance` holds whole numbers $n \ge 0$ (steps into the past); return the
# bucket of each, `int64`, the same shape. Half of the buckets are exact: $h = b/2$.
#
# <details><summary>Hint 1</summary>
#
# Compute the second case for all distances (with `distance.clamp(min=1)`, since $\log 0$ is no number), and choose with `torch.where`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `.floor().long()`, and at the end `.clamp(max=buckets - 1)`: beyond `max_distance` everything shares the last bucket.
#
# </details>


# %%
def my_causal_bucket(distance, buckets, max_distance):
    """Whole numbers >= 0, any shape -> int64 in 0 .. buckets - 1."""
    # BEGIN SOLUTION "your turn: exact for the first half, logarithmic for the second"
    half = buckets // 2
    ratio = torch.log(distance.clamp(min=1).double() / half) / math.log(max_distance / half)
    wide = half + (ratio * (buckets - half)).floor().long()
    return torch.where(distance < half, distance, wide.clamp(max=buckets - 1))
    # END SOLUTION


# %%
check_causal_bucket(my_causal_bucket)

# %% [markdown]
# ### Exercise 5 · The window, in both directions
#
# Difficulty: ●●● · Importance: ●●● · 30 minutes
#
# Write `my_window_attention(q, k, v, window, table)`: softmax attention to the keys with $|j - i| \le$ `window` (at
# least 1), with the bias `table (2 * window + 1,)`, for any length, as three views around one call. The check also looks at the largest
# tensor you make: an $L \times L$ matrix with most of it hidden does not count.
#
# <details><summary>Hint 1</summary>
#
# Start from `two_views` and `causal_window_fast`. Which zeros must be added at the *end* so that there is a block after the last?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Pad with `window` zeros in front and `missing + window` behind: $N + 2$ blocks. The views are `blocks[:, :-2]`, `blocks[:, 1:-1]` and
# `blocks[:, 2:]`.
#
# </details>
#
# <details><summary>Hint 3</summary>
#
# $j - i = m - w - a$ as before, with $m$ up to $3w - 1$; the band is $|j - i| \le w$. Build `real` from a tensor of ones, sent
# through the same three views.
#
# </details>


# %%
def my_window_attention(q, k, v, window, table):
    """q, k (B, L, z), v (B, L, v), table (2 * window + 1,) -> (B, L, v)."""
    # BEGIN SOLUTION "your turn: three views of the blocks, the band and the bias by m - w - a, one call"
    length = q.shape[1]
    missing = -length % window

    def three_views(x):
        blocks = F.pad(x, (0, 0, window, missing + window)).unflatten(1, (-1, window))  # (B, N + 2, w, ·)
        return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2)  # (B, N, 3w, ·)

    offset = torch.arange(3 * window)[None, :] - window - torch.arange(window)[:, None]  # j - i, (w, 3w)
    real = three_views(torch.ones(1, length, 1)).mT > 0  # (1, N, 1, 3w)
    bias = table[(offset + window).clamp(0, 2 * window)]
    bias = torch.where((offset.abs() <= window) & real, bias, -torch.inf)
    q = F.pad(q, (0, 0, 0, missing)).unflatten(1, (-1, window))
    y = F.scaled_dot_product_attention(q, three_views(k), three_views(v), attn_mask=bias)
    return y.flatten(1, 2)[:, :length]
    # END SOLUTION


# %%
check_window_attention(my_window_attention)

# %% [markdown] tags=["solution-only"]
# Why is no query of the fill left with nothing to see, which would give NaN? A query of the fill stands at most $w - 1$ positions behind
# the last real one, so that one lies in its window. With *padding inside* the sequence this argument fails; there the
# package lets such a query read itself.

# %% [markdown]
# ## Check against the package
#
# First the package against itself: slow and fast form, all three functions, heads, padding on either side, a bias for each head, both
# directions; outputs and every gradient.


# %%
def forms_differ(slow, fast, size, bias, function, causal):
    """The largest difference of two forms over outputs of real tokens and all gradients."""
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(2, 3, 29, width, generator=g, dtype=torch.float64) for width in (4, 4, 3)] + [bias]
    mask = torch.stack([torch.arange(29) >= 6, torch.arange(29) < 21])  # padded left, padded right
    weight = torch.randn(2, 3, 29, 3, generator=g, dtype=torch.float64) * mask[:, None, :, None]
    results = []
    for form in (slow, fast):
        q, k, v, b = inputs = [t.clone().requires_grad_() for t in tensors]
        y = form(q, k, v, size, bias=b, mask=mask, causal=causal, function=function, attend=attend)
        results.append([y * (weight != 0), *torch.autograd.grad((y * weight).sum(), inputs)])
    return max(largest(a, b) for a, b in zip(*results, strict=True))


g = torch.Generator().manual_seed(6)
for name, slow, fast, bias in (
    ("chunks", chunk_attention_slow, chunk_attention, torch.randn(5, 5, generator=g, dtype=torch.float64)),
    ("window", window_attention_slow, window_attention, torch.randn(3, 11, generator=g, dtype=torch.float64)),
):
    for function in ("softmax", "laplace", "relu2"):
        error = max(forms_differ(slow, fast, 5, bias, function, causal) for causal in (False, True))
        print(f"{name}, {function:8} {below(error, 1e-11)}")

# %% [markdown]
# ### Against SPADE's authors
#
# The repository holds numbers that the published code of SPADE (Zuo et al., 2022) computed in double precision: inputs, projections, the
# table of the buckets, and the outputs of its local attention, causal with radius 4 and in both directions with radius 3. Its local
# attention is what this chapter built: four projections, a window, a bucketed bias. Our slow loop knows one head at a time, so it runs
# once for each.

# %%
GOLDEN = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"
with np.load(GOLDEN / "spade_local_attention.npz") as file:
    numbers = {key: torch.as_tensor(file[key]) for key in file.files}

for direction in ("causal", "bidir"):
    theirs = {key.split("_", 1)[1]: value for key, value in numbers.items() if key.startswith(direction)}
    heads, radius, is_causal = int(theirs["n_heads"]), int(theirs["radius"]), direction == "causal"
    bias = BucketedBias(heads, int(theirs["num_buckets"]), int(theirs["max_distance"]), bidirectional=not is_causal)
    bias = bias.double()
    with torch.no_grad():
        bias.table.copy_(theirs["bias_table"])
    table = bias(radius).detach()  # (H, 2r + 1)
    projected = [theirs["x"] @ theirs[f"W_{name}"].T for name in "qkv"]
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected)  # (B, H, L, d / H)
    found = window_attention(q, k, v, radius, bias=table, mask=theirs["keep"], causal=is_causal)
    y = found.transpose(1, 2).flatten(2) @ theirs["W_o"].T
    keep = theirs["keep"]  # rows of padded queries mean nothing
    by_hand = torch.stack(
        [window_slow(q[:1, h], k[:1, h], v[:1, h], radius, table[h], is_causal) for h in range(heads)], 1
    )
    y_slow = by_hand.transpose(1, 2).flatten(2) @ theirs["W_o"].T  # the first sequence has no padding
    offsets = torch.arange(-12, 13)
    same = torch.equal(t5_bucket(offsets, 8, 6, bidirectional=not is_causal), theirs["buckets_rel_m12_p12"])
    far = torch.equal(
        t5_bucket(torch.arange(-520, 521), bidirectional=not is_causal), theirs["buckets32_128_rel_m520_p520"]
    )
    print(f"{direction:6} package: {below(largest(y[keep], theirs['y'][keep]), 1e-9)};", end=" ")
    print(f"our loop: {below(largest(y_slow, theirs['y'][:1]), 1e-9)}; buckets equal: {same and far}")

# %% [markdown]
# ### Against Mega's authors
#
# And two Mega layers in chunks, of four with laplace and of five with softmax and padding, with the numbers of *their* published code:
# output, and the gradient of the input and of every parameter.


# %%
def batch_first(array):
    """The authors' (L, B, D) as our (B, L, D)."""
    return torch.from_numpy(np.ascontiguousarray(array.swapaxes(0, 1)))


CHUNKED = {
    "mega_layer_laplace_chunk4_batchnorm_prenorm_bi_eval": dict(
        attention="laplace", norm="batchnorm", prenorm=True, chunk=4, truncation=6
    ),
    "mega_layer_softmax_chunk5_scalenorm_postnorm_bi_padded": dict(
        attention="softmax", norm="scalenorm", prenorm=False, chunk=5
    ),
}
for name, options in CHUNKED.items():
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    kept = ("param.", "buffer_before.", "buffer.")
    parameters = {key.split(".", 1)[1]: value for key, value in arrays.items() if key.startswith(kept)}
    layer = official.mega_layer(parameters, bidirectional=True, **options).train(bool(arrays["train_mode"]))
    x = batch_first(arrays["x"]).requires_grad_()
    mask = ~torch.from_numpy(arrays["padding_mask"]) if "padding_mask" in arrays else None  # theirs: True = padding
    y = layer(x, mask=mask)
    (y * batch_first(arrays["cotangent"])).sum().backward()
    ours = official.authors_names(layer, gradients=True)
    wanted = {key[5:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("grad.")}
    gradients = max(largest(ours[key], wanted[key]) for key in wanted)
    gradients = max(gradients, largest(x.grad, batch_first(arrays["grad_x"])))
    real = slice(None) if mask is None else mask
    output = largest(y.detach()[real], batch_first(arrays["out"])[real])
    print(f"chunk {options['chunk']}, {options['attention']:8} output {below(output, 1e-9)};", end=" ")
    print(f"{len(wanted) + 1} gradients {below(gradients, 1e-9)}")

# %% [markdown]
# ## What to remember
#
# - Chunk attention is a reshape: $L\,c$ scores, nothing copied, nothing crosses a border, **however many layers** (Mega, section 3.4).
# - A window's keys are three shifted views of blocks as long as the window; the band and the bias are one small picture,
#   the same in every block, because $j - i = m - w - a$. $3w$ scores a query, $2w + 1$ of them used (LongT5, SPADE).
# - Fill and padding must be *hidden*: zeros have weights too. Padding on the left moves chunk borders and changes the outputs;
#   a window does not notice it.
# - A receptive field can be measured in one backward pass: $L$ copies, each asked about one output. Windows grow by $w$ a layer;
#   chunks don't grow.
# - An EMA or a state space beneath opens every border in one layer. It fades as the carrier forgets: that is Mega-chunk, and SPADE.
# - Far distances can share a bias: buckets that grow by a constant factor (T5, SPADE).
# - Both forms stream with a bounded cache: the last $w$ keys, or at most one chunk.
#
# Next, chapter 05: attention that wakes up only where it is needed, sparse modular activation.
