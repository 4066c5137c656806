# %% [markdown]
# # 07 · Kernel linear attention: move the brackets
#
# ## The question, and what you will be able to do
#
# Softmax attention asks every query to look at every key, $L \times L$ times. Chapter 06 made the keys few. This chapter
# leaves the keys alone and asks about the *exponential* between them: **what if the weight of a pair were a product, one
# factor from the query and one from the key?** Then the keys could be summed up once, before any query arrives. The
# whole trick is a pair of brackets, moved. What it costs is the subject of the second half.
#
# After this chapter you will be able to
#
# - write attention with any feature map, and turn its quadratic form into a linear one, values and gradients equal;
# - compute the causal form three ways, as running sums, in chunks, and as a recurrent network with a matrix as its state,
#   and say how much such a matrix can remember;
# - say what elu + 1, SIKF and FAVOR+ approximate and what they do not, with measured errors;
# - take the danger out of an exponential with factors that cancel, eps and the future included;
# - spot random features that are not as random as they look.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial.classroom import (
    below,
    fmt,
    growth_exponent,
    peak_memory,
    quickest,
    show,
    use_style,
)
from longseq_tutorial.classroom.checks.linear_attention import (
    check_chunked_attention,
    check_favor_features,
    check_linear_step,
    check_safe_sikf,
    check_two_products,
)
from longseq_tutorial.classroom.panels_linear_attention import (
    ImpliedAttention,
    implied_weights,
    kinds_of_tokens,
    relative_error,
    softmax_weights,
)
from longseq_tutorial.mechanisms.linear_attention import (
    FavorFeatures,
    LinearAttention,
    elu_features,
    linear_attention,
    linear_attention_quadratic,
    linear_attention_recurrent,
    sikf_features,
)

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable


def seeded(seed):
    """A source of randomness that starts anew."""
    return torch.Generator().manual_seed(seed)


# %% [markdown]
# ## From softmax to feature maps
#
# Take softmax attention apart. Query $i$ gives key $j$ a weight, and divides by the sum of its weights:
#
# $$y_i = \frac{\sum_j \operatorname{sim}(q_i, k_j)\, v_j}{\sum_j \operatorname{sim}(q_i, k_j)}, \qquad
# \operatorname{sim}(q, k) = e^{q \cdot k / \sqrt d}.$$
#
# Nothing in the first formula insists on the exponential. Any similarity will do that is never negative, so that the
# weights are an average. Choose one of the form
#
# $$\operatorname{sim}(q, k) = \phi(q) \cdot \phi(k) = \sum_{a=1}^m \phi_a(q)\, \phi_a(k), \qquad \phi \ge 0.$$
#
# In words: a **feature map** $\phi$ turns a query or a key of $d$ numbers into $m$ features, and two tokens are similar
# when they are strong in the same features. (A similarity that can be written like this is called a *kernel*, hence the
# name of the chapter.) Three maps will accompany us:
#
# | map | $\phi(x)$ | $m$ | where from |
# |---|---|---|---|
# | elu + 1 | $x + 1$ above zero, $e^x$ below, entry by entry | $d$ | Katharopoulos et al., *Transformers are RNNs*, ICML 2020 |
# | SIKF | $e^x$, entry by entry | $d$ | Zubkov and Gavrilov 2022, with FastRPB (chapter 08) |
# | FAVOR+ | $e^{w_a \cdot x' - \lVert x'\rVert^2/2} / \sqrt m$ for $m$ random $w_a$, with $x' = x/d^{1/4}$ | any | Choromanski et al., *Rethinking Attention with Performers*, ICLR 2021 |
#
# SIKF we know from its authors' published code; no result numbers of it are known to us, and we quote none.
#
# | here | in formulas | shape |
# |---|---|---|
# | `q`, `k`, `v` | $q_i$, $k_j$, $v_j$ | $(B, H, L, d)$ twice, and $(B, H, L, d_v)$ |
# | `phi_q`, `phi_k` | $\phi(q_i)$, $\phi(k_j)$ | $(B, H, L, m)$ |
# | `S` | $S = \sum_j \phi(k_j)\, v_j^\top$ | $(B, H, m, d_v)$ |
# | `z` | $z = \sum_j \phi(k_j)$ | $(B, H, m)$ |
# | `eps` | $\varepsilon$, a small number added to the denominator | $10^{-6}$ |
#
# What do such similarities look like? In two dimensions we can walk around: the query points to 60°, a key of the same
# length turns once around the circle. Look for two things: *where* each curve has its peak, and how near to zero it comes
# on the far side.

# %%
degrees = torch.arange(360, dtype=torch.float64)
turning = 2 * torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], dim=-1)  # (360, 2): keys
query = turning[60:61]
favor_2d = FavorFeatures(2, 64, generator=seeded(0))
similarity = {
    "softmax": torch.exp(query @ turning.T / math.sqrt(2))[0],
    "elu + 1": (elu_features(query) @ elu_features(turning).T)[0],
    "SIKF": (sikf_features(query) @ sikf_features(turning).T)[0],
    "FAVOR+, 64 features": (favor_2d(query) @ favor_2d(turning).T)[0],
}
similarity = {name: s / s.mean() for name, s in similarity.items()}
peak = {name: int(s.argmax()) for name, s in similarity.items()}
contrast = {name: float(s.max() / s.min()) for name, s in similarity.items()}

fig, ax = plt.subplots(figsize=(8, 3.8))
for name, s in similarity.items():
    ax.plot(degrees, s, markevery=30, label=f"{name}: peak at {peak[name]}°")
ax.axvline(60, color="#999999", linestyle=":", label="the query")
ax.set(xlabel="direction of the key (degrees)", ylabel="similarity (mean 1)", xticks=range(0, 361, 60))
ax.legend(fontsize="small")
show(
    fig,
    f"""Similarity of a query at 60 degrees with a key of length 2 in each direction, each curve scaled to mean 1. Softmax
    peaks at {peak["softmax"]} degrees, its largest value {fmt(contrast["softmax"])} times its smallest. elu + 1 peaks at
    {peak["elu + 1"]} degrees and is flat (ratio {fmt(contrast["elu + 1"])}); SIKF peaks at {peak["SIKF"]} degrees (ratio
    {fmt(contrast["SIKF"])}), nearest to the axis in which the query is largest. FAVOR+ with 64 random features follows
    softmax in outline, with its peak off at {peak["FAVOR+, 64 features"]} degrees and too high.""",
)

# %% [markdown]
# Softmax finds the key that points *the same way*. elu + 1 and SIKF do not: they have a sense of axes, prefer keys that are
# large where the query is large, and keep a good part of their weight for keys that point elsewhere. FAVOR+ means to be
# softmax, and is, up to noise; here a single draw of 64 features exaggerates the peak and moves it. Keep this picture in
# mind while we make all of them fast.
#
# ## A slow version, in ten lines
#
# One query after the other, straight from the formula. Causal, a query sees the keys up to its own.


# %%
def attention_slow(q, k, v, phi, causal=False, eps=1e-6):
    """q, k (B, H, L, d), v (B, H, L, d_v) -> (B, H, L, d_v)."""
    y = []
    for i in range(q.shape[2]):
        seen = i + 1 if causal else k.shape[2]
        weight = (phi(q[:, :, i : i + 1]) * phi(k[:, :, :seen])).sum(-1, keepdim=True)  # (B, H, seen, 1)
        y.append((weight * v[:, :, :seen]).sum(2) / (weight.sum(2) + eps))  # (B, H, d_v)
    return torch.stack(y, dim=2)


# %% [markdown]
# The matrix of weights shows what a map sees. Our example is 48 tokens of six kinds, four of a kind in a row, each kind
# at two places; query and key of a token are its kind's vector plus some noise. There is something to find, the other
# tokens of one's own kind, and softmax finds it: blocks. Look for the blocks in the other three, and for what is there in
# their place.

# %%
q48, k48 = kinds_of_tokens()  # (48, 16) each
maps = {
    "elu + 1": elu_features,
    "SIKF": sikf_features,
    "FAVOR+, 64 features": FavorFeatures(16, 64, generator=seeded(1)),
}
pictures = {"softmax": softmax_weights(q48, k48)}
pictures |= {name: implied_weights(q48, k48, phi) for name, phi in maps.items()}


def stripes(weights):
    """How much of a matrix's unevenness is the same in all rows: 1 if every query reads the same."""
    uneven = weights - 1 / weights.shape[-1]
    return float(uneven.mean(0).square().mean() / uneven.square().mean())


fig, axes = plt.subplots(1, 4, figsize=(11, 3.3), sharey=True)
scale = PowerNorm(0.5, vmin=0, vmax=float(pictures["softmax"].max()))
for ax, (name, weights) in zip(axes, pictures.items(), strict=True):
    image = ax.imshow(weights.numpy(), norm=scale)
    ax.set(title=name, xlabel="key (position)")
    ax.grid(False)
axes[0].set_ylabel("query (position)")
fig.colorbar(image, ax=axes, label="weight", shrink=0.8)
striped = {name: stripes(weights) for name, weights in pictures.items()}
show(
    fig,
    f"""Four matrices of weights for the same 48 queries and keys. Softmax: bright 4 by 4 blocks where kinds agree. elu + 1:
    nearly even, faint vertical stripes. SIKF: clearer stripes, some blocks. FAVOR+: blocks of the right places, grainy.
    The part of the unevenness that all queries share (stripes): softmax {fmt(striped["softmax"])}, elu + 1
    {fmt(striped["elu + 1"])}, SIKF {fmt(striped["SIKF"])}, FAVOR+ {fmt(striped["FAVOR+, 64 features"])}.""",
)
for name, weights in pictures.items():
    print(f"{name:20} rank of the matrix: {int(torch.linalg.matrix_rank(weights))}")

# %% [markdown]
# A vertical stripe is a *popular* key, one that every query reads. For elu + 1 and SIKF that is more than half of what
# distinguishes the keys; who asks matters less than who is asked. And the ranks say how much the matrix can express at
# all: a product of an $L\times m$ and an $m \times L$ matrix has rank at most $m$. That is the price. Now for what it buys.
#
# ## The identity: move the brackets
#
# Write the numerator with $\phi(q) \cdot \phi(k) = \phi(q)^\top \phi(k)$, and look at what depends on $i$:
#
# $$\sum_j \big(\phi(q_i)^\top \phi(k_j)\big)\, v_j^\top \;=\; \phi(q_i)^\top \underbrace{\sum_j \phi(k_j)\, v_j^\top}_{S},
# \qquad \sum_j \phi(q_i)^\top\phi(k_j) \;=\; \phi(q_i)^\top \underbrace{\sum_j \phi(k_j)}_{z} .$$
#
# In words: the query does not depend on $j$, so it can wait outside the sum. What remains inside, $S$ and $z$, is the
# *same for every query*. Compute it once, then let each query read:
#
# $$y_i = \frac{\phi(q_i)^\top S}{\phi(q_i)^\top z + \varepsilon}.$$
#
# As matrices it is one line of school algebra, $(\Phi_q \Phi_k^\top)\, V = \Phi_q\, (\Phi_k^\top V)$: same factors, same
# order, other brackets. The left side makes an $L \times L$ matrix on its way, the right side one of $m \times d_v$. (With
# softmax there is no such freedom: its exponential stands *around* the product $\Phi_q\Phi_k^\top$.)
#
# By hand, for $L = 3$, $m = 2$ and one value channel:

# %%
phi_q = [[1.0, 2.0], [0.5, 1.0], [3.0, 0.0]]
phi_k = [[1.0, 0.5], [2.0, 1.0], [0.0, 4.0]]
value = [10.0, 20.0, 30.0]
S = [sum(phi_k[j][a] * value[j] for j in range(3)) for a in range(2)]
for i in range(3):
    pairs = sum((phi_q[i][0] * phi_k[j][0] + phi_q[i][1] * phi_k[j][1]) * value[j] for j in range(3))
    print(f"query {i}: pair by pair {pairs}, through S {phi_q[i][0] * S[0] + phi_q[i][1] * S[1]}")

# %% [markdown]
# How many multiplications? Pair by pair $L^2 (m + d_v)$, through $S$ about $2 L m d_v$. Both are equal at
# $L = 2 m d_v / (m + d_v)$, which for $m = d_v$ is $m$: as soon as a sequence is longer than the number of features, the
# brackets pay.

# %%
m = d_v = 64
for length in (64, 1024, 16384):
    pairs, through_state = length**2 * (m + d_v), 2 * length * m * d_v
    print(
        f"L = {length:6,}: {pairs:15,} pair by pair, {through_state:12,} through S: {pairs // through_state} times less"
    )

# %% [markdown]
# ## The fast version
#
# ### Everything at once: two products
#
# Without a causal mask that is the whole algorithm. A small elegance: append a column of ones to $v$, and the last column
# of $S$ is $z$. Numerator and denominator then come out of the same two products.


# %%
def attention_full(q, k, v, phi, eps=1e-6):
    """The same arguments and the same result as attention_slow."""
    phi_q, phi_k = phi(q), phi(k)  # (B, H, L, m)
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # (B, H, L, d_v + 1)
    state = phi_k.mT @ v  # (B, H, m, d_v + 1): S, and z beside it
    y = phi_q @ state  # (B, H, L, d_v + 1)
    return y[..., :-1] / (y[..., -1:] + eps)


def example(length, seed=0, dim=4, v_dim=5, dtype=torch.float64):
    """q, k (2, 2, length, dim) and v (2, 2, length, v_dim), the same for the same seed."""
    return [
        torch.randn(2, 2, length, w, generator=seeded(seed + i), dtype=dtype) for i, w in enumerate((dim, dim, v_dim))
    ]


q, k, v = example(60)
for name, phi in (("elu + 1", elu_features), ("SIKF", sikf_features)):
    error = (attention_full(q, k, v, phi) - attention_slow(q, k, v, phi)).abs().max()
    print(f"{name}: two products = pair by pair, error", below(error, 1e-12))

# %% [markdown]
# ### Causal: running sums
#
# A causal query must not read keys from the future, so there is no one $S$ for all. But the sums that query $i$ needs
# differ from those of query $i-1$ by a single key:
#
# $$S_i = S_{i-1} + \phi(k_i)\, v_i^\top, \qquad z_i = z_{i-1} + \phi(k_i), \qquad
# y_i = \frac{\phi(q_i)^\top S_i}{\phi(q_i)^\top z_i + \varepsilon}.$$
#
# In words: write the new pair into the matrix, then read from it. The obvious parallel form is a cumulative sum over all
# positions. It is correct, and it is a trap: it holds the matrix $S_i$ of *every* position at once.


# %%
def attention_cumsum(q, k, v, phi, eps=1e-6):
    """Causal; correct, and far too large."""
    phi_q, phi_k = phi(q), phi(k)
    S = (phi_k[..., :, None] * v[..., None, :]).cumsum(2)  # (B, H, L, m, d_v)!
    z = phi_k.cumsum(2)  # (B, H, L, m)
    return torch.einsum("bhlm,bhlmd->bhld", phi_q, S) / ((phi_q * z).sum(-1, keepdim=True) + eps)


error = (attention_cumsum(q, k, v, elu_features) - attention_slow(q, k, v, elu_features, causal=True)).abs().max()
print("cumulative sums = pair by pair, error", below(error, 1e-12))
qkv = [torch.randn(1, 1, 1024, 64) for _ in range(3)]
ratio = peak_memory(lambda: attention_cumsum(*qkv, elu_features)) / qkv[0].nbytes
print("peak memory, as a multiple of q: more than 60 times:", ratio > 60)

# %% [markdown]
# ### Chunks: pairs nearby, sums far away
#
# The way out is a compromise between the two forms. Cut the sequence into chunks of $C$ positions. *Within* a chunk work
# pair by pair, with the causal mask: $C \times C$ is small. For everything in *earlier* chunks use the sums, of which we
# need only one per chunk. The figure shows who does what for $L = 24$ and $C = 6$; look at how little of the square
# is left to the pairs, and think of $L = 16{,}384$, $C = 128$.

# %%
i, j = torch.arange(24)[:, None], torch.arange(24)[None, :]
who = torch.where(j > i, 0, torch.where(i // 6 == j // 6, 2, 1))
fig, ax = plt.subplots(figsize=(6.4, 3.9))
colours = [plt.get_cmap("cividis")(level) for level in (0.0, 0.5, 1.0)]
ax.imshow(who.numpy())
ax.grid(False)
ax.set(xlabel="key (position)", ylabel="query (position)", xticks=range(0, 24, 6), yticks=range(0, 24, 6))
for colour, label in zip(colours[::-1], ("pair by pair", "through S and z", "the future: nothing"), strict=True):
    ax.plot([], [], linestyle="", marker="s", markersize=10, color=colour, markeredgecolor="black", label=label)
fig.legend(loc="outside right center")
share = 16384 * 129 / 2 / (16384 * 16385 / 2)
show(
    fig,
    f"""A 24 by 24 square of queries and keys in chunks of 6. Four small triangles on the diagonal, {int((who == 2).sum())} pairs,
    are computed pair by pair; the {int((who == 1).sum())} pairs to their left go through the sums of earlier chunks; the
    {int((who == 0).sum())} above the diagonal are the future. For 16,384 positions and chunks of 128 only
    {fmt(100 * share)} % of the visible pairs are computed as pairs.""",
)


# %%
def attention_chunked(q, k, v, phi, chunk=64, eps=1e-6):
    """Causal, any length: the same result as attention_slow(..., causal=True)."""
    length = q.shape[2]
    v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    # Zeros fill the last chunk: as *features* they weigh nothing. N chunks of C positions:
    q, k, v = (F.pad(x, (0, 0, 0, -length % chunk)).unflatten(2, (-1, chunk)) for x in (phi(q), phi(k), v))
    pairs = (q @ k.mT).tril()  # (B, H, N, C, C)
    sums = k.mT @ v  # (B, H, N, m, d_v + 1): of each chunk
    before = F.pad(sums, (0, 0, 0, 0, 1, 0))[:, :, :-1].cumsum(2)  # of all earlier chunks: moved by one, then summed
    y = pairs @ v + q @ before  # (B, H, N, C, d_v + 1)
    return (y[..., :-1] / (y[..., -1:] + eps)).flatten(2, 3)[:, :, :length]


slow = attention_slow(q, k, v, elu_features, causal=True)
for chunk in (1, 7, 60, 64):
    error = (attention_chunked(q, k, v, elu_features, chunk) - slow).abs().max()
    print(f"length 60 in chunks of {chunk:2}: error", below(error, 1e-12))
ratio = peak_memory(lambda: attention_chunked(*qkv, elu_features)) / qkv[0].nbytes
print("peak memory, as a multiple of q: less than 20 times:", ratio < 20)

# %% [markdown]
# One detail deserves a second look. The sums that a chunk reads are those of *earlier* chunks, an exclusive cumulative
# sum, made by moving everything one place before summing. Subtracting each chunk's own sum afterwards would be the same
# in school algebra, but not in floating point: a huge key of the own chunk would come in and go out again, and leave its
# rounding error with queries that must not know it.
#
# ### One token at a time: a recurrent network with a matrix as its state
#
# Read the causal formulas once more: a state, an update, an output. That is a recurrent network. Its state is a matrix of
# $m \times d_v$ numbers (and the vector $z$), whatever came before and however long it was.

# %%
stream = LinearAttention(heads=2, dim=4, v_dim=5, feature_map=elu_features, causal=True).double()
state, outputs = stream.initial_state(batch=2), []
for t in range(q.shape[2]):
    y_t, state = stream.step(q[:, :, t], k[:, :, t], v[:, :, t], state)
    outputs.append(y_t)
print("streaming = pair by pair, error", below((torch.stack(outputs, dim=2) - slow).abs().max(), 1e-12))
print("numbers carried from step to step, per head:", state.S[0, 0].numel() + state.z[0, 0].numel())

# %% [markdown]
# Softmax attention streams too, but it must keep every key and value it has seen; this one keeps 24 numbers.
# Something must give. A matrix can be *overfull*. Let us store $n$ random pairs of key and value, then ask for each value
# with exactly its own key as the query, and see how far the answer is from what was stored, on average over the
# values' own size (1 is as bad as answering zero). Look for how many pairs each memory bears, and at the dashed lines.

# %%
stored = [1, 2, 4, 8, 16, 32, 64, 128]
readers = {
    "elu + 1, 16 features": elu_features,
    "SIKF, 16 features": sikf_features,
    "FAVOR+, 64 features": FavorFeatures(16, 64, generator=seeded(0)),
    "FAVOR+, 1024 features": FavorFeatures(16, 1024, generator=seeded(0)),
}
trials = [
    (torch.randn(40, n, 16, generator=seeded(n)), torch.randn(40, n, 8, generator=seeded(n + 500))) for n in stored
]
missed = {
    name: [(linear_attention(k_, k_, v_, phi, eps=0) - v_).square().mean().item() for k_, v_ in trials]
    for name, phi in readers.items()
}
exact = {
    scale: [
        (F.scaled_dot_product_attention(scale * k_, scale * k_, v_) - v_).square().mean().item() for k_, v_ in trials
    ]
    for scale in (1, 2)
}
fig, ax = plt.subplots(figsize=(8, 4))
for name, errors in missed.items():
    ax.plot(stored, errors, label=name)
for scale, errors in exact.items():
    ax.plot(stored, errors, linestyle="--", label="softmax" + f", q and k times {scale}" * (scale > 1))
ax.set(xscale="log", xlabel="pairs stored", ylabel="mean squared error of an answer")
ax.set_xticks(stored, stored)
ax.minorticks_off()
fig.legend(loc="outside right upper", fontsize="small")
at = stored.index(16)
show(
    fig,
    f"""Error of a recalled value against the number of stored pairs, 1 to 128, keys of 16 numbers. With one pair all
    errors are {below(max(e[0] for e in (*missed.values(), *exact.values())), 1e-6)}.
    With 16 pairs: elu + 1 {fmt(missed["elu + 1, 16 features"][at])}, SIKF {fmt(missed["SIKF, 16 features"][at])}, FAVOR+
    {fmt(missed["FAVOR+, 64 features"][at])} with 64 and {fmt(missed["FAVOR+, 1024 features"][at])} with 1024 features,
    softmax {fmt(exact[1][at])}, and softmax of keys and queries twice as long {fmt(exact[2][at])}. Every curve rises with
    the number of pairs: {all(e[-1] > e[at] > e[0] for e in (*missed.values(), *exact.values()))}.""",
)
order = sorted(missed, key=lambda name: missed[name][at])
print("best to worst at 16 pairs:", "; ".join(order))

# %% [markdown]
# Positive features overlap: every key is a little similar to every other, so every answer is a mixture with all that was
# stored. More features help, softmax itself (dashed) is the limit FAVOR+ works towards, and that limit has a move the
# others lack: twice the length of queries and keys makes its weights far sharper, and the error nearly vanishes. Remember
# that move; it comes back as FAVOR+'s undoing.
#
# ## They agree: values and gradients
#
# Four forms, three maps, awkward lengths (1, 2, a prime, one above four chunks). We compare outputs, and the gradients
# of one fixed random combination of them with respect to $q$, $k$ and $v$, all in double precision.


# %%
def values_and_gradients(form, tensors):
    """y, then the gradients with respect to q, k, v."""
    inputs = [x.clone().requires_grad_() for x in tensors]
    y = form(*inputs)
    weights = torch.randn(y.shape, generator=seeded(3), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def largest_difference(ones, others):
    """Relative to the size of what is compared."""
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(ones, others, strict=True))


random_map = FavorFeatures(4, 9, generator=seeded(0)).double()
print("largest error of y and of the gradients with respect to q, k, v")
for name, phi in (("elu + 1", elu_features), ("SIKF", sikf_features), ("FAVOR+", random_map)):
    for length in (1, 2, 101, 257):
        tensors = example(length, seed=length)
        full = values_and_gradients(lambda *a, phi=phi: attention_slow(*a, phi), tensors)
        causal = values_and_gradients(lambda *a, phi=phi: attention_slow(*a, phi, causal=True), tensors)
        errors = [
            largest_difference(values_and_gradients(lambda *a, phi=phi: attention_full(*a, phi), tensors), full),
            largest_difference(values_and_gradients(lambda *a, phi=phi: attention_chunked(*a, phi), tensors), causal),
            largest_difference(
                values_and_gradients(lambda *a, phi=phi: linear_attention_recurrent(*a, phi)[0], tensors), causal
            ),
        ]
        print(f"  {name:8} length {length:3}: two products, chunks, recurrence: {below(max(errors), 1e-10)}")

# %% [markdown]
# ## How it grows
#
# Forward passes on one core, four heads of 32 channels: the package's linear attention, full and causal, against torch's
# *fused* softmax attention, the best opponent there is, which avoids the $L \times L$ matrix in memory but not in
# arithmetic. And our quadratic reference, which avoids neither. Look at the slopes, and then for the length at which the
# lines cross: that is where linear attention begins to pay.

# %%
lengths = {
    "linear": [128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "linear, causal": [128, 256, 512, 1024, 2048, 4096, 8192, 16384],
    "fused softmax, causal": [128, 256, 512, 1024, 2048, 4096],
    "quadratic form": [128, 256, 512, 1024, 2048],
}
forms = {
    "linear": lambda q, k, v: linear_attention(q, k, v, elu_features),
    "linear, causal": lambda q, k, v: linear_attention(q, k, v, elu_features, causal=True),
    "fused softmax, causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "quadratic form": lambda q, k, v: linear_attention_quadratic(q, k, v, elu_features, causal=True),
}
seconds, peaks = {}, {}
for name, form in forms.items():
    seconds[name], peaks[name] = [], []
    for length in lengths[name]:
        tensors = [torch.randn(1, 4, length, 32, generator=seeded(i)) for i in range(3)]
        seconds[name].append(quickest(lambda: form(*tensors), patience=0.08))  # noqa: B023
        peaks[name].append(peak_memory(lambda: form(*tensors)))  # noqa: B023
grows = {name: growth_exponent(lengths[name][3:], seconds[name][3:]).exponent for name in ("linear", "linear, causal")}
grows |= {name: growth_exponent(lengths[name][2:], seconds[name][2:]).exponent for name in list(forms)[2:]}
holds = {name: growth_exponent(lengths[name][-3:], peaks[name][-3:]).exponent for name in forms}

ratio = np.log(seconds["linear, causal"][:6]) - np.log(seconds["fused softmax, causal"])  # above 0: linear is slower
cross = 2 ** np.interp(0.0, -ratio, np.log2(lengths["fused softmax, causal"]))  # where it falls through 0

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
for name in forms:
    left.plot(lengths[name], [1e3 * s for s in seconds[name]], label=f"{name}: ~ L^{grows[name]:.1f}")
    right.plot(lengths[name], [b / 1e6 for b in peaks[name]], label=f"{name}: ~ L^{holds[name]:.1f}")
left.axvline(cross, color="#999999", linestyle=":", label=f"causal lines cross near {fmt(cross, 1)}")
left.set(title="time", ylabel="time (ms)")
right.set(title="memory", ylabel="peak memory beside q, k, v (MB)")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="length (tokens)")
    ax.set_xticks([128, 512, 2048, 8192], ["128", "512", "2,048", "8,192"])
    ax.minorticks_off()
    ax.legend(fontsize="small")
facts = {
    "linear: nearer to linear than to quadratic in time": 0.5 < grows["linear"] < 1.5,
    "linear, causal: nearer to linear than to quadratic in time": 0.5 < grows["linear, causal"] < 1.5,
    "fused softmax: about quadratic in time": 1.5 < grows["fused softmax, causal"] < 2.6,
    "quadratic form: about quadratic in time": 1.5 < grows["quadratic form"] < 3.4,
    "memory of both linear forms: linear or less": max(holds["linear"], holds["linear, causal"]) < 1.05,
    "memory of the quadratic form: quadratic": 1.9 < holds["quadratic form"] < 2.1,
    "at 128 tokens fused softmax is ahead of linear causal attention": (
        seconds["fused softmax, causal"][0] < seconds["linear, causal"][0]
    ),
    "at 4,096 tokens linear causal attention is ahead of fused softmax": (
        seconds["linear, causal"][5] < seconds["fused softmax, causal"][5]
    ),
}
show(
    fig,
    "Time and memory against length on logarithmic axes. " + "; ".join(f"{f}: {h}" for f, h in facts.items()) + ".",
)

# %% [markdown]
# So the promise holds. (The package works through long sequences in segments that fit a processor's cache: here, up to
# 8,192 tokens, causal attention needs at most about 5 MB beside its output. Beyond that the peak is the output itself,
# held twice: in segments, and put together.) But there is a footnote that is often left out: *below some hundreds of
# tokens the fused softmax is faster*. (The legend names the crossing on the machine that built this page; wider heads
# and more features push it up.) Its arithmetic is quadratic, but it is one well-made call, and a chunk of 128 positions
# is quadratic inside as well. Linear attention is for *long* sequences.

# %% [markdown]
# ## Why this is fast
#
# Two extremes do the same job: compare every pair, or keep a running sum at every position. Chunks of $C$ positions lie
# between them, so let us send one bill for all. For one position, with $m$ features and $d_v$ values:
#
# $$\text{operations} = \underbrace{2\,C\,(m + d_v)}_{\text{pairs of the own chunk}} + \underbrace{4\,m\,d_v}_{\text{write
# into } S \text{, read from it}}, \qquad
# \text{bytes} = \underbrace{4\,(2m + 2d_v)}_{q,\,k,\,v,\,y} + \underbrace{8\,m\,d_v / C}_{S \text{, stored and fetched}} .$$
#
# In words: pairs cost more arithmetic the longer the chunk, and every chunk costs one matrix $S$ that goes to memory and
# comes back. ($z$ is too small to count; the half of a chunk's pairs that lies in the future is computed and thrown away.)
# The bill for a sequence of 16,384:


# %%
def bill(C, m=64, d_v=64):
    """Operations and bytes for one position, in chunks of C."""
    return 2 * C * (m + d_v) + 4 * m * d_v, 4 * (2 * m + 2 * d_v) + 8 * m * d_v / C


for C, name in ((1, "running sums"), (16, ""), (128, "the package"), (1024, ""), (16384, "every pair")):
    operations, moved = bill(C)
    print(f"chunks of {C:6,}: {operations:9,} operations, {moved:8,.0f} bytes   {name}")

# %% [markdown]
# Running sums need the least arithmetic of all, and lose: a matrix per position is thirty times more to carry than the
# sequence itself, for two operations a number. From one position to 128 in a chunk the arithmetic triples and the traffic
# all but vanishes. That is a good trade on any processor, because arithmetic in products of matrices is what it has
# plenty of.
#
# The least that *any* form with chunks of 128 can take is its operations at the speed of a large matrix product, its
# bytes at the speed of a plain copy, and $2m$ exponentials for the features. All three speeds can be measured on this very
# machine: their sum is the **floor**. Left, each form against the length, one head of 64 channels; look at who keeps
# level, and how far above the floor. Right, the form in chunks from *The fast version* at 4,096 positions, with chunks
# from 4 to 4,096; look at both ends, and at the dotted line: that is the bill, paid at the measured speeds.

# %%
square, large, small = torch.randn(1024, 1024), torch.randn(2**23), torch.randn(2**16)
copied = torch.empty_like(large)
operation_time = quickest(lambda: square @ square) / (2 * 1024**3)
byte_time = quickest(lambda: copied.copy_(large)) / (2 * large.nbytes)
exponential_time = quickest(lambda: small.exp()) / small.numel()


def at_best(C, width=64):
    """Nanoseconds for each number of one head, if nothing but the bill had to be paid."""
    operations, moved = bill(C)
    return 1e9 * (operations * operation_time + moved * byte_time + 2 * width * exponential_time) / width


def nanoseconds(form, tensors):
    return 1e9 * quickest(lambda: form(*tensors), patience=0.06) / tensors[0].numel()


one_head = {L: [torch.randn(1, 1, L, 64, generator=seeded(i)) for i in range(3)] for L in (256, 1024, 4096, 16384)}
ways = {  # and up to which length our patience reaches
    "running sums": (lambda *qkv: attention_cumsum(*qkv, elu_features), 4096),
    "one token at a time": (lambda *qkv: linear_attention_recurrent(*qkv, elu_features), 1024),
    "chunks of 128, all at once": (lambda *qkv: attention_chunked(*qkv, elu_features, 128), 16384),
    "the package: segments of chunks": (lambda *qkv: linear_attention(*qkv, elu_features, causal=True), 16384),
}
took = {name: {L: nanoseconds(f, t) for L, t in one_head.items() if L <= end} for name, (f, end) in ways.items()}
chunks = [4, 16, 32, 64, 128, 256, 512, 1024, 4096]
by_chunk = {C: nanoseconds(lambda *qkv: attention_chunked(*qkv, elu_features, C), one_head[4096]) for C in chunks}  # noqa: B023

fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for name, times in took.items():
    left.plot(list(times), list(times.values()), label=name)
left.plot(list(one_head), [at_best(128)] * 4, "k:", marker="", label="floor")
left.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="nanoseconds for each number of y")
left.set_xticks(list(one_head), [f"{L:,}" for L in one_head])
right.plot(chunks, list(by_chunk.values()), label="chunks of C, all at once")
right.plot(chunks, [at_best(C) for C in chunks], "k:", marker="", label="its bill")
right.set(xscale="log", xlabel="C (positions in a chunk), length 4,096")
right.set_xticks([4, 16, 64, 256, 1024, 4096], ["4", "16", "64", "256", "1,024", "4,096"])
left.set_yticks([3, 10, 30, 100, 300, 1000], ["3", "10", "30", "100", "300", "1,000"])
for ax in (left, right):
    ax.minorticks_off()
    ax.legend(fontsize="small")
package, at_once = took["the package: segments of chunks"], took["chunks of 128, all at once"]
facts = {
    "at 4,096 tokens running sums take at least 8 times as long as chunks": (
        took["running sums"][4096] > 8 * at_once[4096]
    ),
    "one token at a time takes at least 5 times as long as chunks": took["one token at a time"][1024]
    > 5 * at_once[1024],
    "the package's time for each number does not rise by half from 1,024 to 16,384": package[16384]
    < 1.5 * package[1024],
    "at 16,384 it is within 10 times of the floor": package[16384] < 10 * at_best(128),
    "and takes at most one and a half times as long as all chunks at once": package[16384] < 1.5 * at_once[16384],
    "chunks of 4 take at least 3 times as long as chunks of 128": by_chunk[4] > 3 * by_chunk[128],
    "a single chunk of 4,096 at least 4 times": by_chunk[4096] > 4 * by_chunk[128],
}
show(
    fig,
    "Time for each number on logarithmic axes. Left against the length: running sums and one token at a time at the top, "
    "chunks all at once and the package far below, the floor under all. Right against the chunk's length: high at both "
    "ends, lowest in the middle, like the bill. " + "; ".join(f"{f}: {h}" for f, h in facts.items()) + ".",
)

# %% [markdown]
# The step that brought most is the one from a state per position to a state per chunk: the same algebra, more
# operations, and many times faster. The right panel says how much care the choice of $C$ needs: hardly any, between 32 and
# 256 the valley is wide. At its right edge it is the pairs, as billed. At its left edge there is an $S$ for every four
# positions, which this form writes, pads, sums and reads again, in many tiny products: there it lies farthest above its
# bill.
#
# The second step is no algebra at all. *All at once*, the pairs of 16,384 positions are a tensor of 8 MB, fresh memory
# that the system must hand out page by page. The package takes segments of several chunks, whose tensors stay in the
# cache and are used again, and hands the sums on. How much time that saves depends on the machine: compare the right ends
# of the two lower lines. What it saves in memory does not. But a training step cannot forget as freely, since the backward
# pass needs features and pairs again; so we count both.

# %%
held = {}
for kind, length in (("a forward pass", 16384), ("forward and backward", 16384)):
    tensors = [x.clone().requires_grad_(kind != "a forward pass") for x in one_head[length]]
    for name in ("chunks of 128, all at once", "the package: segments of chunks"):

        def run(form=ways[name][0], tensors=tensors):
            y = form(*tensors)
            return torch.autograd.grad(y.sum(), tensors) if y.requires_grad else y

        held[name] = peak_memory(run)
    at_once_bytes, package_bytes = held.values()
    print(f"{kind}: the package holds less at its peak: {package_bytes < at_once_bytes};", end=" ")
    print(f"less than half: {package_bytes < at_once_bytes / 2}")

# %% [markdown]
# In a forward pass segments hold less than half of the memory; in training they save a little, and the features and pairs
# of the whole sequence remain.
#
# What is left between the package and the floor? Products of 128 by 64 do not reach the speed of one of 1,024 by 1,024;
# elu, the one added to it, the triangle and the division each walk over their tensor once more; and the sums are handed
# from chunk to chunk in a loop, which short sequences feel most. Note also what the floor is *not*: a floor for softmax.
# Torch's fused call computes every visible pair, half of $L$ for the average query, but it does so with great skill, and
# below the crossing in the figure of *How it grows* it wins.

# %% [markdown]
# ## What each map approximates, and what it does not
#
# ### elu + 1: nothing, on purpose
#
# elu + 1 was chosen because it is positive, cheap, and has a gradient everywhere. It approximates no known similarity. The
# hope is that *training* arranges queries and keys such that its weak contrast suffices. In the published table of the
# Long Range Arena (chapter 10) that is not absurd: over the tasks a linear Transformer averages 50.46, the Performer
# (FAVOR+) 51.18 and the softmax Transformer 53.66 (with Path-X, which none of the three learns, counted as chance).
#
# ### SIKF: a sum of exponentials
#
# SIKF stands for *shift-invariant kernel function*. Softmax does not care if the same number is added to all scores of a
# query. $\phi = \exp$ inherits a form of this: adding $c$ to every entry of a query multiplies its features by $e^c$,
# above and below the fraction line. The similarity it implies is
#
# $$\operatorname{sim}(q, k) = \sum_a e^{q_a}\, e^{k_a} = \sum_a e^{q_a + k_a}
# \quad\text{a sum of exponentials, while softmax has}\quad e^{\sum_a q_a k_a / \sqrt d}
# \quad\text{the exponential of a sum.}$$
#
# The difference is easily underrated. In softmax the entries *multiply* and evidence adds up inside the exponent: a key has
# to agree in many entries. In SIKF each entry speaks for itself and the loudest wins: for long vectors
# $\log \operatorname{sim} \approx \max_a (q_a + k_a)$. And as a sum of separate terms it knows nothing of signs: two large
# negative entries, a perfect agreement for softmax, count for next to nothing.

# %%
torch.manual_seed(0)
a, b, values = torch.randn(3, 1, 1, 20, 6, dtype=torch.float64)
moved = linear_attention(a + 7, b - 3, values, sikf_features, eps=0)
still = linear_attention(a, b, values, sikf_features, eps=0)
print(
    "SIKF, all entries of all queries + 7, of all keys - 3: output moves by", below((moved - still).abs().max(), 1e-12)
)
pair = torch.tensor([[-3.0, -3.0]])
print("query and key both (-3, -3) against (-3, -3) and (3, 3):")
for name, sim in (
    ("softmax", lambda x, y: torch.exp((x * y).sum() / math.sqrt(2))),
    ("SIKF", lambda x, y: torch.exp(x + y).sum()),
):
    print(f"  {name:8} same {fmt(sim(pair, pair))}, opposite {fmt(sim(pair, -pair))}")
loud = [(torch.log(torch.exp(s * (a + b)).sum(-1)) / s - (a + b).amax(-1)).abs().max().item() for s in (1, 10, 100)]
print(
    "log SIKF, per scale, minus the largest q_a + k_a, for q and k times 1, 10, 100:",
    ", ".join(fmt(x, 1) for x in loud),
)

# %% [markdown]
# ### FAVOR+: softmax, on average
#
# FAVOR+ wants softmax itself. Its seed is one integral. For a vector $w$ of independent normal numbers and any fixed $s$,
#
# $$\mathbb{E}\, e^{w \cdot s} = e^{\lVert s \rVert^2 / 2}.$$
#
# Put $s = q' + k'$ with $q' = q/d^{1/4}$, $k' = k/d^{1/4}$, so that $q'\cdot k' = q \cdot k/\sqrt d$. Since
# $\lVert q'+k' \rVert^2 = \lVert q'\rVert^2 + 2\,q'\cdot k' + \lVert k'\rVert^2$,
#
# $$e^{q \cdot k/\sqrt d} = \mathbb{E}_w \Big[ e^{w\cdot q' - \lVert q'\rVert^2/2}\;\; e^{w\cdot k' - \lVert k'\rVert^2/2} \Big].$$
#
# In words: the similarity of softmax is the *average* of a product, one factor from the query, one from the key. Average
# over $m$ random $w$ instead of all, give each factor its share $1/\sqrt m$, and there is the feature map. All its
# features are positive, and it is unbiased.
#
# Unbiased is not accurate. The same integral, taken of the square, gives the spread of a single term: relative to its mean
# it has the variance $e^{\lVert q' + k'\rVert^2} - 1$, so $m$ independent terms have the relative error
#
# $$\sqrt{\frac{e^{\lVert q'+k'\rVert^2} - 1}{m}}.$$
#
# Left, we measure that: 256 features, vectors of growing length, 2,000 draws each. Right, what becomes of the whole matrix of
# weights for our 48 tokens, against the number of features, for three scales of queries and keys. Look at how the same
# number of features serves the three scales.

# %%
norms = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], dtype=torch.float64)
features, draws, dim = 256, 2000, 8
w = torch.randn(draws, features, dim, generator=seeded(2), dtype=torch.float64)
half = torch.ones(dim, dtype=torch.float64) / math.sqrt(dim) / 2  # q' = k' = s / 2, |s| = norms
terms = torch.exp(2 * norms[:, None, None] * (w @ half) - norms[:, None, None].square() / 4)  # (7, draws, features)
estimate = terms.mean(-1) / torch.exp(norms.square() / 4)[:, None]  # 1 on average
spread = estimate.sub(1).square().mean(-1).sqrt()
formula = torch.sqrt(torch.expm1(norms.square()) / features)

counts = [16, 64, 256, 1024, 4096]
scales = (0.25, 0.5, 1.0)
error_of = {
    s: [
        np.mean(
            [
                relative_error(
                    implied_weights(s * q48, s * k48, FavorFeatures(16, count, generator=seeded(draw))),
                    softmax_weights(s * q48, s * k48),
                )
                for draw in range(8)
            ]
        )
        for count in counts
    ]
    for s in scales
}
typical = {s: (s * (q48[:, None] + k48) / 2).norm(dim=-1).mean().item() for s in scales}  # |q' + k'|; d ** (1/4) = 2
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
left.plot(norms, spread, linestyle="", label="measured, 2,000 draws")
left.plot(norms, formula, marker="", color="black", linestyle="--", label="the formula")
left.set(yscale="log", xlabel="|q' + k'|", ylabel="relative error of one similarity", title="256 features")
for s in scales:
    right.plot(counts, error_of[s], label=f"q, k times {s}: |q' + k'| about {fmt(typical[s])}")
right.plot(
    counts, [0.3 * (c / 16) ** -0.5 for c in counts], marker="", color="black", linestyle="--", label="~ 1 / sqrt(m)"
)
right.set(xscale="log", yscale="log", xlabel="features m", ylabel="relative error of the weights", title="48 tokens")
right.set_xticks(counts, [f"{c:,}" for c in counts])
right.minorticks_off()
right.set_ylim(bottom=1e-3)  # room for the legend
for ax in (left, right):
    ax.legend(fontsize="small")
match = (spread / formula - 1).abs()[norms <= 1.5].max().item()
show(
    fig,
    f"""Left: relative error of one estimated similarity with 256 features against the length of q' + k': from
    {fmt(spread[0])} at 0.25 to {fmt(spread[2])} at 1 and {fmt(spread[-1], 1)} at 3, on the formula's curve within
    {"a tenth" if match < 0.1 else "MORE than a tenth"} up to 1.5. Right: relative error of the weights of 48 tokens against
    the number of features, 16 to 4,096. Times 0.25: {fmt(error_of[0.25][0])} falling to {fmt(error_of[0.25][-1])}. Times
    0.5: {fmt(error_of[0.5][0])} to {fmt(error_of[0.5][-1])}. Times 1: {fmt(error_of[1.0][0])} to {fmt(error_of[1.0][-1])}.""",
)
for size in (1.0, 2.0, 4.0):
    print(f"features for a tenth of error at |q' + k'| = {size:.0f}: {fmt(100 * math.expm1(size**2))}")

# %% [markdown]
# For short vectors FAVOR+ is excellent and improves like $1/\sqrt m$. For long ones it is hopeless: the number of features
# needed grows like $e^{\lVert q'+k'\rVert^2}$, and queries and keys with entries of size 1 and 64 channels have
# $\lVert q'+k'\rVert \approx 4$. Long vectors are exactly what makes softmax sharp, the move from the memory experiment.
# So FAVOR+ is accurate where attention is nearly uniform, and fails where attention *points*. (For so long vectors even the
# measured error on the left is itself uncertain: the rare draws that matter most do not come up.)
#
# ### Random features that were not random enough
#
# FAVOR+ draws its $w_a$ *orthogonally*: rows of one block of $d$ are perpendicular to one another, which spreads them more
# evenly and lowers the variance. Take a $d \times d$ matrix of normal numbers, let a QR decomposition make it orthogonal,
# and give the rows the lengths of normal vectors. That is what the published codes do. The catch: a QR decomposition is only
# unique up to signs, and the usual algorithm does not flip coins for them.

# %%
corner = torch.linalg.qr(torch.randn(1000, 4, 4, generator=seeded(0))).Q[:, 0, 0]
print("1,000 random 4 x 4 matrices; Q's first entry is positive in", int((corner > 0).sum()), "of them")

# %% [markdown]
# Never! So the first row always points into the same half of space, and the rows are not uniformly random directions. The
# cure is one line: **turn each row around or not, by a coin of its own.** A row and its opposite are then equally likely,
# and each row is uniform over all directions. `FavorFeatures` does that; `row_signs=False` shows the raw version.
#
# How much does it matter? We estimate $e^{q\cdot k/\sqrt d}$ with $\lVert q' + k'\rVert = 1$ very often and average: the
# average of an unbiased estimator comes to the true value, up to an error bar (here two standard errors) that we can
# compute. Look at which points lie off the zero line by many error bars.


# %%
def bias(dim, direction, blocks, signs):
    """Mean relative error of exp(q.k / sqrt(d)), and its standard error, over many orthogonal blocks."""
    module = FavorFeatures(dim, blocks * dim, row_signs=signs, generator=seeded(dim)).double()
    x = direction / direction.norm() / 2 * dim**0.25  # q = k, |q' + k'| = 1
    products = module(x).square() * module.features  # one estimate a row
    ratios = products.view(blocks, dim).mean(-1) / torch.exp(x @ x / math.sqrt(dim))
    return ratios.mean().item() - 1, ratios.std().item() / math.sqrt(blocks)


cases = {
    "d = 4, (1, 1, 1, 1)": (4, torch.ones(4), 40_000),
    "d = 4, first axis": (4, torch.eye(4)[0], 40_000),
    "d = 4, last axis": (4, torch.eye(4)[3], 40_000),
    "d = 16, (1, .., 1)": (16, torch.ones(16), 8_000),
    "d = 64, (1, .., 1)": (64, torch.ones(64), 1_500),
}
measured = {
    signs: {name: bias(dim, along.double(), blocks, signs) for name, (dim, along, blocks) in cases.items()}
    for signs in (False, True)
}
fig, ax = plt.subplots(figsize=(8.5, 3.8))
for shift, (signs, label) in zip((-0.12, 0.12), ((False, "raw QR"), (True, "random row signs")), strict=True):
    means, errors = zip(*measured[signs].values(), strict=True)
    position = np.arange(len(cases)) + shift
    ax.errorbar(position, 100 * np.array(means), yerr=200 * np.array(errors), linestyle="", capsize=4, label=label)
ax.axhline(0, color="black", linewidth=0.8)
ax.set_xticks(range(len(cases)), list(cases), fontsize="small")
ax.set(ylabel="bias of the estimate (%)")
ax.legend()
worst = max(abs(mean) / error for mean, error in measured[True].values())
surest = min(abs(measured[False][name][0]) / measured[False][name][1] for name in cases)
raw = {name: 100 * mean for name, (mean, _) in measured[False].items()}
show(
    fig,
    f"""Bias of the estimate of exp(q.k / sqrt(d)) at |q' + k'| = 1 with error bars of two standard errors. Raw QR: about
    {fmt(raw["d = 4, (1, 1, 1, 1)"])} % for d = 4 along (1, 1, 1, 1), {fmt(raw["d = 4, first axis"])} % along the first axis,
    {fmt(raw["d = 4, last axis"])} % along the last, {fmt(raw["d = 16, (1, .., 1)"])} % for d = 16 and
    {fmt(raw["d = 64, (1, .., 1)"], 1)} % for d = 64. With random row signs every point is within four standard errors of
    zero: {worst < 4}.""",
)
print("raw QR is off by more than ten standard errors in every case:", surest > 10)
print("with row signs, never by more than four:", worst < 4)

# %% [markdown]
# A bias does not average out: with raw QR more features lead, confidently, to the wrong matrix. And it is quiet. Nothing
# crashes. It shows only to those who measure, with error bars.
#
# ## An exponential that cannot overflow
#
# SIKF and FAVOR+ are exponentials, and float32 ends at $e^{88}$. Entries of that size do occur, early in training or
# after a bad step.

# %%
q32, k32, v32 = (x.float() for x in example(200, seed=40))
plain = attention_chunked(q32 + 100, k32, v32, torch.exp)
print("exp as it is, queries + 100: all outputs finite:", bool(plain.isfinite().all()))

# %% [markdown]
# Softmax implementations subtract the row's maximum, and it cancels. What may we subtract here? From a *query*, any number
# $o_i$ of its own: $e^{-o_i}$ multiplies its numerator and its denominator alike. From the *keys*, one number $c_a$ per
# *feature*, the same for all keys, if we add it to the queries' feature $a$ in return:
#
# $$e^{q_{ia} + k_{ja}} = e^{o_i}\; e^{(q_{ia} + c_a) - o_i}\; e^{k_{ja} - c_a}, \qquad
# c_a = \max_j k_{ja}, \quad o_i = \max_a\, (q_{ia} + c_a).$$
#
# In words: but for $e^{o_i}$, which cancels, no exponent on the right is above zero, so nothing overflows; and each query
# has a feature that is exactly 1, where some key has one too, so not everything vanishes. Only $\varepsilon$ needs care.
# The fraction is unchanged if numerator and denominator are both divided by $e^{o_i}$, and the denominator *contains*
# $\varepsilon$, so it becomes $\varepsilon e^{-o_i}$. Leave it alone, or add a constant to the features after stabilising, as
# published codes do, and the result depends on what was subtracted.
#
# A map tells the package that it can be treated like this by carrying `log_features`. Any other callable is used as it is.

# %%
safe = linear_attention(q32 + 100, k32 + 300, v32, sikf_features, causal=True)
exactly = attention_slow(*(x.double() for x in (q32, k32, v32)), torch.exp, causal=True, eps=0)
print("with offsets that cancel, queries + 100 and keys + 300: error", below((safe - exactly).abs().max(), 1e-3))
big_eps = linear_attention(q, k, v, sikf_features, eps=0.5)
print(
    "an eps that matters is kept, error",
    below((big_eps - attention_slow(q, k, v, torch.exp, eps=0.5)).abs().max(), 1e-12),
)

# %% [markdown]
# ### Causal: whose maximum?
#
# In the causal form a maximum over *all* positions looks into the future. It cancels, so what harm can it do? This one: let
# the last key be enormous. Then every earlier key minus that maximum underflows to exactly zero, and the past, which must
# not know the last key, is wiped out by it.


# %%
def causal_with_one_maximum(q, k, v, eps=1e-6):
    """Stabilised with the largest of the whole sequence, in the future as well."""
    c = k.amax((2, 3), keepdim=True)
    o = (q + c).amax(-1, keepdim=True)
    phi_q, phi_k = torch.exp(q + c - o), torch.exp(k - c)
    pairs = (phi_q @ phi_k.mT).tril()
    return pairs @ v / (pairs.sum(-1, keepdim=True) + eps * torch.exp(-o))


shock = k32.clone()
shock[:, :, -1] += 200
for name, form in (
    ("one maximum", causal_with_one_maximum),
    ("package", lambda q, k, v: linear_attention(q, k, v, sikf_features, causal=True)),
):
    past = slice(0, -1)
    change = (form(q32, shock, v32) - form(q32, k32, v32))[:, :, past].abs().max().item()
    change = math.inf if math.isnan(change) else change
    print(f"{name:12} the future key moves the past: {'not beyond rounding' if change < 1e-5 else 'YES, badly'}")

# %% [markdown]
# The package uses a *running* maximum. Each chunk is scaled by the largest value up to its own end; when a later chunk finds
# a larger one, the sums it takes over are scaled down by the difference. The streaming form does the same step by step and
# carries the logarithm of the factor along as a third part of its state. One hole remains: within a chunk the early keys do
# share a maximum with later ones. Should a feature rise within one chunk by more than half the range of floats, as in this
# experiment, the package sees it and takes smaller chunks.
#
# ## The panel: the attention a feature map implies
#
# Left softmax, in the middle what the map makes of the same queries and keys, right the difference. Things to try:
#
# 1. Choose FAVOR+ and turn the scale up from 0.25. When do the blocks dissolve? How many features bring them back?
# 2. At scale 4 compare softmax with SIKF: what has become of the blocks, and what of the stripes?
# 3. Hold everything and change the draw: how much of what you see is chance?

# %%
panel = ImpliedAttention(map="FAVOR+", features=256, scale=0.5)
panel

# %%
print(panel.set(scale=1.0).say())
print(panel.set(map="SIKF: exp", scale=2.0, causal=True).say())

# %% [markdown]
# It takes queries and keys of your own, one head or many, and a map of your own, any callable. Here is one: the square of
# the rectified entries.

# %%
own = ImpliedAttention(
    torch.stack([q48, -q48]), torch.stack([k48, k48]), feature_map=lambda x: x.relu().square() + 1e-3, map="yours"
)
own

# %%
print(own.set(head=0).say())
print(own.set(head=1).say())

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. *Run all* never stops here. The rest of the chapter
# uses the package's functions, whatever you write.
#
# ### Exercise 1 · Two products
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Write `two_products(phi_q, phi_k, v)`: features `(B, H, L, m)` twice and values `(B, H, L, d_v)` to `(B, H, L, d_v)`,
# every query reading all keys, with $\varepsilon = 10^{-6}$ added to the denominator. Nothing of size $L\times L$, please: the check
# measures.
#
# <details><summary>Hint 1</summary>
#
# First $S$, `(B, H, m, d_v)`, and $z$, `(B, H, m)`. `phi_k.mT` swaps the last two axes.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The denominator is one number per query, `(B, H, L, 1)`: `phi_q @ z[..., None]`.
#
# </details>


# %%
def two_products(phi_q, phi_k, v):
    """phi_q, phi_k (B, H, L, m), v (B, H, L, d_v) -> (B, H, L, d_v)."""
    # BEGIN SOLUTION "your turn: sum up the keys, then let every query read"
    S = phi_k.mT @ v
    z = phi_k.sum(-2)
    return (phi_q @ S) / (phi_q @ z[..., None] + 1e-6)
    # END SOLUTION


# %%
check_two_products(two_products)

# %% [markdown]
# ### Exercise 2 · One step
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Write one time step of the recurrent form: features `phi_q`, `phi_k` `(B, H, m)` and the value `v (B, H, d_v)` of this
# token, and the state `S (B, H, m, d_v)`, `z (B, H, m)`, to `y (B, H, d_v)` and the new `S` and `z`. Again
# $\varepsilon = 10^{-6}$. Don't change the given state in place.
#
# <details><summary>Hint 1</summary>
#
# Write, then read. The outer product $\phi(k)\, v^\top$ is `phi_k[..., :, None] * v[..., None, :]`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Reading is a vector times a matrix: `(phi_q[..., None, :] @ S)[..., 0, :]`.
#
# </details>


# %%
def linear_step(phi_q, phi_k, v, S, z):
    """One token: phi_q, phi_k (B, H, m), v (B, H, d_v), S (B, H, m, d_v), z (B, H, m) -> y (B, H, d_v), S, z."""
    # BEGIN SOLUTION "your turn: write the pair into S and z, then read with the query"
    S = S + phi_k[..., :, None] * v[..., None, :]
    z = z + phi_k
    y = (phi_q[..., None, :] @ S)[..., 0, :]
    return y / ((phi_q * z).sum(-1, keepdim=True) + 1e-6), S, z
    # END SOLUTION


# %%
check_linear_step(linear_step)

# %% [markdown]
# ### Exercise 3 · An exponential that cannot overflow
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# Write `safe_sikf(q, k, v)`: SIKF attention of every query over all keys, $\varepsilon = 0$, in the precision given, `q` and
# `k` `(B, H, L, d)`, `v` `(B, H, L, d_v)`. It must also be right for entries around 300 in float32, and where one sequence,
# one head or one query lies far below the others.
#
# <details><summary>Hint 1</summary>
#
# What may be taken out of a query: one number for each query. Out of the keys: something that *all* keys of a head share.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `x.amax(-1, keepdim=True)` is the largest over the last axis, `x.amax((-2, -1), keepdim=True)` over the last two. With
# $\varepsilon = 0$ there is nothing else to scale.
#
# </details>


# %%
def safe_sikf(q, k, v):
    """q, k (B, H, L, d), v (B, H, L, d_v) -> (B, H, L, d_v)."""
    # BEGIN SOLUTION "your turn: take the largest out of q and k before exp, such that it cancels"
    phi_q = torch.exp(q - q.amax(-1, keepdim=True))
    phi_k = torch.exp(k - k.amax((-2, -1), keepdim=True))
    return (phi_q @ (phi_k.mT @ v)) / (phi_q @ phi_k.sum(-2)[..., None])
    # END SOLUTION


# %%
check_safe_sikf(safe_sikf)

# %% [markdown] tags=["solution-only"]
# One number per head is the simplest choice. It can still underflow, when a query is large exactly where all keys are
# small: then its largest product pairs two features that are both far below their maxima. One number per *feature* of the
# keys, given to the queries before their own maximum is taken, closes that gap; the package does it so.

# %% [markdown]
# ### Exercise 4 · Positive random features
#
# Difficulty: ●●○ · Importance: ●●○ · 10 minutes
#
# Write `favor_features(x, projection)`: vectors `(..., d)` and the rows $w_a$ as `(m, d)` to features `(..., m)`,
# $\phi_a(x) = e^{w_a\cdot x' - \lVert x'\rVert^2/2}/\sqrt m$ with $x' = x/d^{1/4}$. No stabilisation.
#
# <details><summary>Hint 1</summary>
#
# Scale $x$ first and use the scaled one everywhere. All $w_a \cdot x'$ at once: `x @ projection.T`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `x.square().sum(-1, keepdim=True)` keeps the axis, so that it can be subtracted from all $m$ features.
#
# </details>


# %%
def favor_features(x, projection):
    """x (..., d), projection (m, d) -> (..., m)."""
    # BEGIN SOLUTION "your turn: scale x, project, subtract half its square, exponentiate, share 1/sqrt(m)"
    m, d = projection.shape
    x = x / d**0.25
    return torch.exp(x @ projection.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(m)
    # END SOLUTION


# %%
check_favor_features(favor_features)

# %% [markdown]
# ### Exercise 5 · Chunks
#
# Difficulty: ●●● · Importance: ●●● · 30 minutes
#
# Write the causal form in chunks yourself, without looking up: `chunked_attention(phi_q, phi_k, v, chunk)`, features
# `(B, H, L, m)`, any length, also one that `chunk` does not divide, $\varepsilon = 10^{-6}$. A loop over the chunks is
# welcome; a loop over positions is not, nor anything of size $L \times L$ or $L \times m \times d_v$.
#
# <details><summary>Hint 1</summary>
#
# With a loop: keep $S$ and $z$ of everything before the chunk. For a chunk: `pairs = (q_c @ k_c.mT).tril()`, then
# `pairs @ v_c + q_c @ S`. Update $S$ and $z$ *afterwards*.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The denominator needs both parts too: the row sums of `pairs`, plus `q_c @ z`.
#
# </details>
# <details><summary>Hint 3</summary>
#
# Slices do not mind running over the end: `x[..., start : start + chunk, :]` of the last chunk is simply shorter.
#
# </details>


# %%
def chunked_attention(phi_q, phi_k, v, chunk):
    """phi_q, phi_k (B, H, L, m), v (B, H, L, d_v), causal -> (B, H, L, d_v)."""
    # BEGIN SOLUTION "your turn: pairs within the chunk, S and z for everything before it"
    S = phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[-1], v.shape[-1])
    z = phi_k.new_zeros(*phi_k.shape[:2], phi_k.shape[-1], 1)
    y = []
    for start in range(0, v.shape[2], chunk):
        q_c, k_c, v_c = (x[:, :, start : start + chunk] for x in (phi_q, phi_k, v))
        pairs = (q_c @ k_c.mT).tril()
        y.append((pairs @ v_c + q_c @ S) / (pairs.sum(-1, keepdim=True) + q_c @ z + 1e-6))
        S, z = S + k_c.mT @ v_c, z + k_c.sum(2)[..., None]
    return torch.cat(y, dim=2)
    # END SOLUTION


# %%
check_chunked_attention(chunked_attention)

# %% [markdown] tags=["solution-only"]
# Loop or cumulative sum? Both are linear. The loop holds one state at a time and waits $L/C$ times; the cumulative sum
# holds $L/C$ states and waits once. The package takes the middle way: segments of several
# chunks, as many as a processor's cache holds; the products of a segment at once, its states in a loop, and the last
# state handed on to the next segment.

# %% [markdown]
# ## Check against the package, and against the authors' numbers
#
# Our forms against the package's, with a padding mask as well: a padded key has features 0, so it adds nothing to $S$ or
# $z$. (Masking the *values* alone would not do: the padding would still sit in the denominator. One widely used code
# makes that mistake.)

# %%
q, k, v = example(131, seed=9)
mask = torch.ones(2, 131, dtype=torch.bool)
mask[0, 100:] = False
for name, phi in (("elu + 1", elu_features), ("SIKF", sikf_features), ("FAVOR+", random_map)):
    ours = attention_full(q, k, v, phi), attention_chunked(q, k, v, phi)
    theirs = linear_attention(q, k, v, phi), linear_attention(q, k, v, phi, causal=True)
    short = attention_full(*(x[:1, :, :100] for x in (q, k, v)), phi)
    padded = linear_attention(q, k, v, phi, mask=mask)[:1, :, :100]
    print(f"{name:8} full, causal: {below(largest_difference(ours, theirs), 1e-12)};", end=" ")
    print("padded = cut off:", below((padded - short).abs().max(), 1e-12))

# %% [markdown]
# The repository also holds numbers that other people's published code computed in double precision: the linear attention of
# idiap's *fast-transformers* (elu + 1; outputs, and states after 5 and after all 11 tokens), SIKF as its authors' code
# computes it, and *performer-pytorch* (FAVOR+). Those files keep heads behind the length, ours before it. Two peculiarities
# have to be matched: SIKF's authors take one offset out of both $q$ and $k$ and leave $\varepsilon$ as it is, so we feed them
# the moved vectors; performer-pytorch adds $10^{-4}$ to its features after stabilising (`published_features`), and, causal,
# $10^{-6}$ to every entry of $z$, which equals our $\varepsilon$ for queries whose features add up to 1.

# %%
golden = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"


def numbers_of(name):
    with np.load(golden / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(array)) for key, array in arrays.items()}


def error(ours, theirs):
    return below((ours - theirs).abs().max(), 1e-9)


n = numbers_of("linattn_elu_sikf_dpfp")
q, k, v = (n[name].transpose(1, 2) for name in ("q", "k", "v"))
keep = n["keep"].bool()
y = linear_attention(q, k, v, elu_features, mask=keep).transpose(1, 2)
print("elu + 1, full, padded   ", error(y, n["elu_noncausal_masked"]))
y = linear_attention(q, k, v, elu_features, causal=True).transpose(1, 2)
print("elu + 1, causal         ", error(y, n["elu_causal"]))
_, state = linear_attention_recurrent(*(x[:, :, :5] for x in (q, k, v)), elu_features)
print("  S and z after 5 tokens", error(state.S, n["elu_S_after_5"]), "and", error(state.z, n["elu_z_after_5"]))
_, state = linear_attention_recurrent(*(x[:, :, 5:] for x in (q, k, v)), elu_features, state=state)
print("  S and z after 11      ", error(state.S, n["elu_final_S"]), "and", error(state.z, n["elu_final_z"]))
for name, causal in (("full", False), ("causal", True)):
    y = linear_attention(q, k, v, sikf_features, causal=causal, eps=0).transpose(1, 2)
    print(f"SIKF, {name:18}", error(y, n[f"sikf_{name}_noeps"]))
offset = q.mean((2, 3), keepdim=True) + k.mean((2, 3), keepdim=True)
y = linear_attention(q - offset, k - offset, v, sikf_features, mask=keep).transpose(1, 2)
print("SIKF, with its offset   ", error(y, n["sikf_full_offset_eps1e-6"]))

n = numbers_of("linattn_favor_rff")
q, k, v = n["q"], n["k"], n["v"]
theirs = FavorFeatures(4, 9).double()
theirs.projection.copy_(n["projection"])
phi_q, phi_k = theirs.published_features(q, query=True), theirs.published_features(k, query=False)
print("FAVOR+, features        ", error(phi_q, n["phi_q"]), "and", error(phi_k, n["phi_k"]))


def ready(features):
    """The map for features that are there already."""
    return features


print("FAVOR+, full            ", error(linear_attention(phi_q, phi_k, v, ready, eps=0), n["y_noncausal"]))
shares = phi_q / phi_q.sum(-1, keepdim=True)
print("FAVOR+, causal          ", error(linear_attention(shares, phi_k, v, ready, causal=True), n["y_causal"]))
bare = linear_attention(q, k, v, theirs, eps=0)
print("their 1e-4 moves the output: by more than 1e-6:", (bare - n["y_noncausal"]).abs().max().item() > 1e-6)

# %% [markdown]
# ## What to remember
#
# - If the weight of a pair is a product of features, $(\Phi_q\Phi_k^\top)V = \Phi_q(\Phi_k^\top V)$: time and memory linear in
#   $L$ (Katharopoulos et al. 2020, section 3). It pays from some hundreds of tokens on, not before.
# - Causal: running sums. In chunks for training (pairs within, sums between; never a state per position), as a recurrent
#   network with an $m \times d_v$ state for streaming. All forms are one function, gradients included.
# - The matrix of weights has rank at most $m$, the memory holds few associations, and positive features overlap.
# - elu + 1 approximates nothing; SIKF is a sum of exponentials, not the exponential of a sum; FAVOR+ is softmax on average,
#   with a relative error of $\sqrt{(e^{\lVert q'+k'\rVert^2}-1)/m}$ (Choromanski et al. 2021 for the estimator).
# - Orthogonal features straight from QR are biased by up to tens of percent; random row signs cure it.
# - Stabilise with what cancels: a number per query, a number per feature of the keys, and the same factor on
#   $\varepsilon$. Causal, only a *running* maximum keeps the future out.
#
# Next, chapter 08: linear attention knows no positions. FastRPB gives it some, as one long convolution.
