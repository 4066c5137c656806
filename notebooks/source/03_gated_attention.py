# %% [markdown]
# # Gated attention: one head is enough
#
# Chapter 01 gave us a memory that fades. It smooths, it never picks. This chapter builds the part of Mega that
# picks: attention with a *single* head, made strong by two gates. At the end the EMA and the attention are put
# together, and the sum is a Mega layer that agrees with the authors' own numbers.

# %% [markdown]
# ## The question
#
# A softmax head reads one weighted mean a query: its weights add up to 1, so what it spends on one key it takes from
# the others. If a position needs two things at once, say the word before it and the subject of the sentence, one
# head has to blend them. The usual answer is to buy more heads. Each brings a map of $L \times L$ weights of its own.
#
# Mega keeps one head and asks differently. Much of what heads are spent on is *nearby*, and the EMA has that already.
# For the rest, let each position decide, channel by channel, **which part of what the head found to use**
# (the reset gate) and **how much of it to take at all** (the update gate). Is one head then enough?
#
# After this chapter you will be able to
#
# * write gated attention as a loop over queries and as a handful of matrix products, and show that both agree;
# * say what sharing one projection between queries and keys costs and saves, exactly;
# * choose between softmax, laplace and relu², and know where the constants of laplace come from;
# * mask padding and future correctly for each of them, which is not the same thing three times;
# * build a Mega layer from its parts, run it step by step, and look inside while it runs.
#
# The letters: $L$ positions, $D$ channels of the model, $z$ width of queries and keys, $v$ width of values.

# %%
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial import official
from longseq_tutorial.classroom import (
    below,
    fmt,
    growth_exponent,
    peak_memory,
    quickest,
    show,
    time_and_memory,
    use_style,
)
from longseq_tutorial.classroom.checks.gated_attention import (
    check_attend_step,
    check_bell_through,
    check_bias_matrix,
    check_gate_mix,
    check_squashed_weights,
)
from longseq_tutorial.classroom.panels_attention import GateMix, WhoLooksAtWhom, mega_diagram
from longseq_tutorial.mechanisms.chunking import chunk_attention
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.gated_attention import (
    GatedAttention,
    RelativeBias,
    RotaryBias,
    attend,
    attend_in_tiles,
    attend_slow,
    attention_weights,
    laplace,
    relu2,
)
from longseq_tutorial.models import record
from longseq_tutorial.models.configs import MegaConfig
from longseq_tutorial.models.mega import MegaLayer
from longseq_tutorial.models.parts import Norm

use_style()


def largest(a, b):
    """The largest absolute difference of two tensors."""
    return (a - b).abs().max().item()


# %% [markdown]
# ## A slow version
#
# Here is the whole unit for one sequence, one query at a time. Two inputs go in: `x`, the sequence, and `s`, a smoothed
# copy of it (in Mega the EMA of `x`; for now anything of the same shape). Read it aloud:
#
# 1. one narrow view `z` of `s` becomes the query and the key; the values come from `x`;
# 2. the query scores every key, a learned number for the distance is added, softmax makes weights of the scores;
# 3. what was **found** is the weighted mean of the values;
# 4. the **reset** gate multiplies it, channel by channel, before it enters the candidate;
# 5. the **update** gate mixes the candidate with the input.

# %%
D, Z, V, P = 6, 4, 8, 16  # channels, width of q and k, width of v, distances the table knows


def slow_gated_attention(x, s, w):
    """x, s (L, D) -> (L, D)."""
    z = F.silu(s @ w.W_z + w.b_z)
    q, k = z * w.kappa[0] + w.mu[0], z * w.kappa[1] + w.mu[1]
    v = F.silu(x @ w.W_v + w.b_v)
    y, keys = [], range(len(x))
    for i in range(len(x)):
        score = torch.stack([q[i] @ k[j] / math.sqrt(Z) + w.table[(j - i) + P - 1] for j in keys])
        weight = score.exp() / score.exp().sum()
        found = sum(weight[j] * v[j] for j in keys)
        reset = F.silu(s[i] @ w.W_r + w.b_r)
        candidate = F.silu(s[i] @ w.W_h + (found * reset) @ w.U_h + w.b_h)
        update = torch.sigmoid(s[i] @ w.W_u + w.b_u)
        y.append(update * candidate + (1 - update) * x[i])
    return torch.stack(y)


# %% [markdown]
# Parameters of a comfortable size, so that every term matters, and a sequence of eleven positions:

# %%
torch.manual_seed(3)


def normal(*shape, std=1.0):
    return (std * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


widths = {"z": Z, "v": V, "r": V, "h": D, "u": D}
w = SimpleNamespace(
    **{f"W_{name}": normal(D, width, std=0.6) for name, width in widths.items()},
    **{f"b_{name}": normal(width, std=0.3) for name, width in widths.items()},
    U_h=normal(V, D, std=0.5),
    kappa=normal(2, Z, std=1.5),
    mu=normal(2, Z),
    table=normal(2 * P - 1),
)
x, s = (torch.randn(11, D, dtype=torch.float64) for _ in range(2))

y_slow = slow_gated_attention(x, s, w)
print("out:", tuple(y_slow.shape), " finite:", bool(y_slow.isfinite().all()))

# %% [markdown]
# Names here, in the paper (Ma et al., *Mega*, ICLR 2023, section 3), and in the authors' code:
#
# | here | paper | authors' code | what it is |
# |---|---|---|---|
# | `s` | $X'$ | output of `move` | the EMA of $X$ (with its SiLU) |
# | `z` | $Z$ | part of `mx_proj` | the shared view for queries and keys |
# | `kappa`, `mu` | $\kappa, \mu$ | `gamma`, `beta` | scale and shift that make $Q$ and $K$ from $Z$ |
# | `reset` | $\gamma$ | part of `mx_proj` | reset gate, a SiLU |
# | `update` | $\varphi$ | part of `mx_proj` | update gate, a sigmoid |
# | `candidate` | $\hat H$, here $H$ | `h_proj` and part of `mx_proj` | what would replace the input |
# | `table` | $b_{\mathrm{rel}}$ | `rel_pos_bias` | a learned number for every distance |
#
# Beware of `gamma`: in the paper it is the reset gate, in the code it is $\kappa$. And the code gives `h_proj` a bias
# beside the candidate's own, where the paper has one for both; the sum is the same.

# %% [markdown]
# ## The identity
#
# Nothing in the loop needs to be a loop. Four small identities turn it into matrix products, and each of them also
# says something about what the unit can and cannot do.
#
# ### 1 · All scores are one product
#
# $$ S = \tfrac{1}{\sqrt z}\, Q K^\top + B, \qquad O = \mathrm{softmax}(S)\, V $$
#
# In words: row $i$ of $S$ holds query $i$ against all keys, so two nested loops of dot products are one matrix product,
# and the weighted means of all queries are another. This is softmax attention as you know it, with one head.
# The division by $\sqrt z$ keeps the spread of a sum of $z$ products near 1, whatever $z$.
#
# ### 2 · One projection, read twice
#
# Ordinary attention learns two projections of $D$ channels to $z$. Mega learns one, $Z$, and reads it twice:
#
# $$ Q = Z \odot \kappa_q + \mu_q, \qquad K = Z \odot \kappa_k + \mu_k . $$
#
# Multiply out what a query and a key then say to each other:
#
# $$ q_i \cdot k_j = \underbrace{z_i^\top\, \mathrm{diag}(\kappa_q \odot \kappa_k)\, z_j}_{\text{alike or not: symmetric}}
#   \;+\; \underbrace{a_i}_{\text{query's own}} + \underbrace{b_j}_{\text{key's own}} + c $$
#
# $$ a = Z(\kappa_q \odot \mu_k),\qquad b = Z(\kappa_k \odot \mu_q),\qquad c = \mu_q\cdot\mu_k . $$
#
# The first term does not care who asks: $i$ likes $j$ as much as $j$ likes $i$. The second is the same for every key, so
# softmax does not even see it. The third is a key's popularity. All asymmetry of content therefore comes from two
# columns of numbers: the difference $S - S^\top$ has rank 2 at most, where two separate projections reach rank $2z$.

# %%
torch.manual_seed(0)
length, width = 40, 8
projection = torch.randn(24, width, dtype=torch.float64) / 5
view = F.silu(torch.randn(length, 24, dtype=torch.float64) @ projection)
kappa, mu = torch.randn(2, width, dtype=torch.float64), torch.randn(2, width, dtype=torch.float64)
q, k = view * kappa[0] + mu[0], view * kappa[1] + mu[1]
shared = q @ k.T

alike = view @ torch.diag(kappa[0] * kappa[1]) @ view.T
a, b, c = view @ (kappa[0] * mu[1]), view @ (kappa[1] * mu[0]), mu[0] @ mu[1]
error = largest(shared, alike + a[:, None] + b[None, :] + c)
print("the terms add up to the scores:", below(error, 1e-12))
error = largest(shared.softmax(-1), (alike + b[None, :]).softmax(-1))
print("softmax without the query's own term:", below(error, 1e-12))

separate = torch.randn(length, width, dtype=torch.float64) @ torch.randn(width, length, dtype=torch.float64)
for name, scores in (("shared Z", shared), ("separate projections", separate)):
    print(f"rank of S - S^T, {name}:", int(torch.linalg.matrix_rank(scores - scores.T)))


def query_key_parameters(d, z):
    """(shared, separate): numbers to learn for queries and keys, biases included."""
    return (d + 1) * z + 4 * z, 2 * (d + 1) * z


saved, full = query_key_parameters(128, 64)
print(f"D = 128, z = 64: {saved:,} parameters instead of {full:,}, {fmt(100 * saved / full)} %")

# %% [markdown]
# So sharing saves nearly half of the parameters, and pays with *direction*. Content alone cannot say "look at the word
# before": if that scores high for $(i, i-1)$, then, popularity apart, it scores as high for $(i-1, i)$. This holds whatever
# $s$ is, smoothed or not.
# Direction has to come from elsewhere: from the bias, which knows $j - i$; from a causal mask; and from the EMA, which
# brings the nearby past to every position without asking attention at all.
#
# ### 3 · Position is a table read along diagonals
#
# $$ B_{ij} = \mathrm{table}[(j - i) + P - 1] \qquad i \text{ the query}, j \text{ the key}. $$
#
# One learned number for every distance: $2P-1$ of them instead of $L^2$. Along a diagonal $j - i$ is constant, and so is
# $B$: a Toeplitz matrix. The middle of the table, index $P-1$, is distance 0; to its left stand keys in the past, to its
# right those in the future. (The authors stop with an error when $L > P$; here the table's ends are repeated.)
#
# For language models Mega's code has a second kind, a *rotary bias*. Two learned vectors $\alpha, \beta$ are turned by angles
# that grow with the position, and the bias is their product:
#
# $$ B_{ij} = \langle R_i\, \alpha,\; R_j\, \beta \rangle = \langle \alpha,\; R_{j-i}\, \beta \rangle . $$
#
# Turning back by $i$ and forward by $j$ is turning by $j - i$, so this too depends on the distance alone. It needs $2z$
# numbers and has no largest length. The paper calls it RoPE; but RoPE turns the queries and the keys, whereas this
# never touches them: it is a bias, added to the scores.
#
# Look for the diagonals in the two matrices, and for how the curves go on where the table ends.

# %%
torch.manual_seed(5)
simple, rotary = RelativeBias(24).double(), RotaryBias(16).double()
with torch.no_grad():  # make both of a visible size
    simple.table.copy_(torch.randn(47).cumsum(0) / 6)
    rotary.alpha.normal_(std=0.5), rotary.beta.normal_(std=0.5)
matrices = {"simple (P = 24)": simple(32).detach(), "rotary (z = 16)": rotary(32).detach()}

fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4), width_ratios=(1, 1, 1.25))
for ax, (name, matrix) in zip(axes[:2], matrices.items(), strict=True):
    ax.imshow(matrix)
    ax.grid(False)
    ax.set(title=name, xlabel="key j (position)", ylabel="query i (position)")
offsets = np.arange(-31, 32)
for name, matrix in matrices.items():
    along = [matrix.diagonal(int(o)) for o in offsets]
    assert max(float(d.max() - d.min()) for d in along) < 1e-12  # every diagonal holds a single number
    axes[2].plot(offsets, [float(d[0]) for d in along], label=name, markevery=4)
axes[2].set(xlabel="offset j − i (steps)", ylabel="bias", title="the number on each diagonal")
axes[2].legend(fontsize="small")
flat = matrices["simple (P = 24)"]
show(
    fig,
    "Two 32 by 32 bias matrices, both constant along every diagonal, and the number on each diagonal against the "
    f"offset j - i. The simple table of 47 numbers is flat beyond offset 23 (all equal: "
    f"{bool((flat[0, 23:] == flat[0, 23]).all())}); the rotary bias goes on waving, from "
    f"{fmt(float(matrices['rotary (z = 16)'].min()))} to {fmt(float(matrices['rotary (z = 16)'].max()))}.",
)

# %% [markdown]
# Both matrices are striped parallel to the diagonal: the bias says how far, never where. The simple table repeats its
# last number beyond offset 23, since it has learned none; the rotary one has a value for every distance.
#
# ### 4 · The gate is a weighted mean of old and new
#
# $$ Y = \varphi \odot H + (1 - \varphi) \odot X = X + \varphi \odot (H - X), \qquad 0 < \varphi < 1 . $$
#
# In words: in each channel the output lies between the input and the candidate. A shut gate ($\varphi = 0$) hands the input
# on, an open one replaces it. The right-hand form shows a residual connection whose step size is learned, for each
# position and channel; this is why a Mega layer has no other residual around it. Unlike $X + H$ it cannot pile up: a
# mean is never larger than the larger of the two.

# %%
torch.manual_seed(1)
steady, added = (torch.ones(200, dtype=torch.float64) for _ in range(2))
for _ in range(64):  # sixty-four layers, each with a candidate between -1 and 3
    candidate = 4 * torch.rand(200, dtype=torch.float64) - 1
    gate = torch.rand(200, dtype=torch.float64)
    steady, added = steady + gate * (candidate - steady), added + candidate
print("after 64 layers, mixed by the gate: within [-1, 3]:", bool(((steady >= -1) & (steady <= 3)).all()))
print("after 64 layers, simply added: mean", fmt(float(added.mean())), "- above 3:", bool(added.mean() > 3))

# %% [markdown]
# ### And the claim: one head can do what many do
#
# The Mega paper argues (section 3) that nothing is lost: if the reset gate may be any function of the input, then for
# every input there is a gate with which one head returns exactly what several heads return. The construction takes one
# line. In channel $c$ at position $i$ the several heads found $m_{ic}$, our one head found $o_{ic}$. Set the gate to the quotient:
#
# $$ \gamma_{ic} = m_{ic} / o_{ic} \quad\Rightarrow\quad \gamma \odot O = M . $$
#
# Let us take the claim seriously, in both directions. First, could one head do it *without* a gate, if its weights were
# not softmax but the best of all numbers, found by least squares? Then with the gate.

# %%
torch.manual_seed(0)
L, width = 12, 16  # positions, channels of the values: eight for each of two heads
qs, ks = (torch.randn(2, L, 4, dtype=torch.float64) for _ in range(2))
values = torch.randn(L, width, dtype=torch.float64)
first, second = attention_weights(qs, ks)  # (L, L) each
many = torch.cat([first @ values[:, :8], second @ values[:, 8:]], dim=-1)  # (L, 16), what two heads find

best = torch.linalg.lstsq(values.T, many.T).solution.T  # (L, L): any weights at all, even negative
miss = ((best @ values - many).norm() / many.norm()).item()
print(f"one head, no gate, the best weights there are: misses by {fmt(100 * miss)} %")

one = attention_weights(*torch.randn(2, L, 4, dtype=torch.float64)) @ values  # a head that knows nothing of the two
gate = many / one
print("any one head with the gate:", below(largest(gate * one, many), 1e-12))
print(f"that gate: median size {fmt(gate.abs().median().item())}, largest {fmt(gate.abs().max().item())}")

fig, ax = plt.subplots(figsize=(7, 3.2))
sizes = gate.abs().flatten().sort().values
ax.semilogy(torch.linspace(0, 100, len(sizes)), sizes, marker="")
ax.axhline(1, color="black", linewidth=0.8, marker="")
ax.set(xlabel="share of positions and channels (%)", ylabel="size of the gate needed", title="What the proof asks for")
big = (gate.abs() > 10).double().mean().item()
show(
    fig,
    f"The sizes of the {len(sizes)} gate values that make one arbitrary head equal to two heads, sorted, on a logarithmic "
    f"scale. Half of them lie below {fmt(gate.abs().median().item())}; {fmt(100 * big)} % lie above 10, the largest at "
    f"{fmt(gate.abs().max().item())}.",
)

# %% [markdown]
# One set of weights cannot serve channels that want different keys: here a query has 12 weights to please 16 channels.
# (With more keys than channels, free weights could; those of a softmax, positive and adding up to 1, in general not.)
# With a gate for each channel it is exact, whatever the one head looked at.
#
# That is also the weak spot of the argument, and the curve shows it. The gate had to know the answer, and where the
# head happened to find almost nothing the gate had to be huge. A real reset gate is a SiLU of a linear map of $s_i$. So
# read the claim as it is meant: a gate removes the *ceiling* of a single head, it does not promise that training gets
# there. How far it gets is for experiments to say. In the paper's table of the Long Range Arena, Mega with its one head
# averages 88.21 over six tasks, the multi-head Transformer 59.24 over five, failing the sixth. That difference belongs
# to the whole layer, not to the gates alone: in the paper's ablation accuracy falls sharply without the EMA.

# %% [markdown]
# ## From scores to weights: softmax, laplace, relu²
#
# Softmax compares: it divides by the sum over keys, so a row of weights always adds up to 1, and a query that finds
# nothing still has to spend its 1 somewhere. The other two judge every key on its own:
#
# $$ \mathrm{relu}^2(x) = \max(x, 0)^2, \qquad
#    \mathrm{laplace}(x) = \tfrac12\Big(1 + \mathrm{erf}\Big(\frac{x - \mu}{\sigma\sqrt 2}\Big)\Big),\quad
#    \mu = \sqrt{\tfrac12},\; \sigma = \sqrt{\tfrac1{4\pi}} . $$
#
# relu² works well, but neither its value nor its slope is bounded, and in the paper it trained less steadily. Mega
# wanted its shape without its temper. The Laplace function is the running integral of a bell curve, so it is a smooth step from 0 to 1; two numbers
# place it. They are fixed by two conditions: at one point it shall have the *value* and the *slope* of relu². At
# $x = \sqrt{1/2}$ relu² is $\tfrac12$ with slope $\sqrt 2$. A step is at one half at its middle, so $\mu = \sqrt{1/2}$; its
# slope there is $1/(\sigma\sqrt{2\pi})$, and setting that to $\sqrt 2$ gives $\sigma = 1/\sqrt{4\pi}$.
#
# (The paper prints $\sqrt 2$ as the meeting point. There relu² is already 2, and laplace never exceeds 1: a misprint. The
# code writes the two constants out as 0.707107 and 0.282095.)
#
# In the figure, look at where the two curves touch, and at what happens to the right of that point.

# %%
grid = torch.linspace(-1, 2.2, 321, dtype=torch.float64, requires_grad=True)
meeting = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
facts = {}
for name, function in (("laplace", laplace), ("relu²", relu2)):
    curve = function(grid)
    (slope,) = torch.autograd.grad(curve.sum(), grid)
    left.plot(grid.detach(), curve.detach(), label=name, markevery=40)
    right.plot(grid.detach(), slope, label=name, markevery=40)
    at = function(meeting)
    facts[name] = (at.item(), torch.autograd.grad(at, meeting)[0].item(), curve.max().item(), slope.max().item())
for ax, height, title in ((left, 0.5, "value"), (right, math.sqrt(2), "slope")):
    ax.plot([meeting.item()], [height], "*", color="black", markersize=12, label="at sqrt(1/2)", zorder=5)
    ax.axvline(math.sqrt(2), color="grey", linestyle=":", marker="", label="at sqrt(2), as printed")
    ax.set(xlabel="score after scaling and bias", ylabel=title, title=title)
left.legend(fontsize="small")
(v1, s1, top1, steep1), (v2, s2, top2, steep2) = facts["laplace"], facts["relu²"]
show(
    fig,
    "Value and slope of laplace and relu squared. At sqrt(1/2) both have the value "
    f"{fmt(v1)} (difference {below(v1 - v2, 1e-5)}) and the slope {fmt(s1, 3)} (difference {below(s1 - s2, 1e-4)}). "
    f"To the right laplace bends to 1 and its slope falls from {fmt(steep1, 3)}, while relu squared reaches "
    f"{fmt(top2)} with slope {fmt(steep2)} at 2.2.",
)
print("laplace stays within [0, 1]:", bool(((laplace(1e3 * grid) >= 0) & (laplace(1e3 * grid) <= 1)).all()))
print(
    "at sqrt(2), relu² is",
    fmt(relu2(torch.tensor(2.0).sqrt()).item()),
    "and laplace",
    fmt(laplace(2.0**0.5 * torch.ones(())).item()),
)

# %% [markdown]
# Left of the star the two are hard to tell apart; right of it one saturates and the other runs away. That is all laplace
# is for: weights in $[0, 1]$, gradients never steeper than $\sqrt 2$.
#
# Without a sum to divide by, something else must keep long sequences in range. Both divide the *scores* by $n_i$, the number
# of keys that query $i$ can see; the bias is added afterwards and not divided:
#
# $$ A_{ij} = f\big( q_i \cdot k_j / n_i + B_{ij} \big) . $$
#
# The rows do not add up to 1. That can be a strength, for a query may find nothing, or much:

# %%
torch.manual_seed(0)
q, k = (2.5 * torch.randn(48, 8, dtype=torch.float64) for _ in range(2))
for name in ("softmax", "laplace", "relu2"):
    total = attention_weights(q, k, function=name).sum(-1)
    print(f"{name:8} a row adds up to {fmt(total.min().item())} .. {fmt(total.max().item())}")

# %% [markdown]
# Which to take? The paper's ablation (test accuracy, Text / Image of the Long Range Arena): softmax 90.43 / 89.87, relu²
# 90.08 / 90.22, laplace 90.22 / 90.43. Its advice: softmax for language, laplace for images and sound.
#
# ## What may be seen
#
# Two things hide keys: padding, and the future. For softmax a hidden score is set to $-\infty$ *before* the function. For the
# other two hidden weights are set to 0 *after* it. It is tempting to set a hidden score to 0 first, as that "says nothing".
# But $\mathrm{laplace}(0) > 0$: a small weight, for every padded position, and there may be thousands of them.

# %%
torch.manual_seed(2)
q, k, v = (torch.randn(1, 1000, width, dtype=torch.float64) for width in (8, 8, 5))
real = torch.arange(1000)[None] < 100  # a hundred real positions, the rest is padding
alone = attend(q[:, :100], k[:, :100], v[:, :100], function="laplace")

scores = (q @ k.mT) / 100
leaky = laplace(scores.masked_fill(~real[:, None, :], 0.0)) @ v
padded = attend(q, k, v, function="laplace", mask=real)
print("laplace(0) =", fmt(laplace(torch.zeros(())).item()))
moved = ((leaky[:, :100] - alone).norm() / alone.norm()).item()
print(f"mask before the function: padding changes the outputs by {fmt(100 * moved)} %")
print("mask after the function: by", below(largest(padded[:, :100], alone), 1e-12))

# %% [markdown]
# The count $n_i$ has to see the same keys as the mask: with padding it is the number of *real* keys, with a causal mask
# $i + 1$, with both the real ones among the first $i + 1$. Divide by $L$ instead, and adding padding would change the answer.
#
# One corner remains: a query that sees nothing but padding. Softmax of a row of $-\infty$ is $0/0$. The padding mask is then
# dropped for that row, as the authors do for a chunk that is all padding: the query averages over padding, nobody reads
# its output, and no NaN gets out. Laplace and relu² simply find nothing.

# %%
nothing = torch.zeros(1, 4, dtype=torch.bool)
q, k = (torch.randn(1, 4, 3, dtype=torch.float64) for _ in range(2))
naive = torch.softmax((q @ k.mT).masked_fill(~nothing[:, None, :], -torch.inf), dim=-1)
print("naive softmax gives NaN:", bool(naive.isnan().all()))
for name in ("softmax", "laplace", "relu2"):
    row = attention_weights(q, k, function=name, mask=nothing)[0, 0]
    print(f"{name:8} all finite: {bool(row.isfinite().all())}, row adds up to {fmt(row.sum().item(), 1)}")

# %% [markdown]
# A last point of care. Models are trained in 16 bits; scores, bias and function want at least 32. The package widens the
# scores, computes in float32, and narrows the result. Compared with the same inputs in double precision:

# %%
torch.manual_seed(0)
q, k = (torch.randn(1, 256, 64).bfloat16() for _ in range(2))
bias = torch.randn(256, 256)
exact = attention_weights(q.double(), k.double(), bias=bias.double())
careful = attention_weights(q, k, bias=bias)
careless = torch.softmax(q @ k.mT / 8 + bias.bfloat16(), dim=-1)
errors = [((each.double() - exact).norm() / exact.norm()).item() for each in (careful, careless)]
print("result in", careful.dtype, "- relative error below 1 %:", errors[0] < 0.01)
print("bfloat16 throughout is at least 1.5 times worse:", errors[1] > 1.5 * errors[0])

# %% [markdown]
# ## The fast version
#
# Now the loop disappears. The four projections of `s` become one matrix with the columns $[u \mid z \mid r \mid h]$, which is how
# both the authors and the package store them (`mx_proj`): one large product instead of four. (The package multiplies by the four
# slices of that matrix all the same: what is cut apart on the way there has to be pieced together on the way back.)


# %%
def fast_gated_attention(x, s, w):
    """x, s (..., L, D) -> (..., L, D)."""
    length = x.shape[-2]
    columns = torch.cat([w.W_u, w.W_z, w.W_r, w.W_h], dim=1)  # (D, D + z + v + D)
    shift = torch.cat([w.b_u, w.b_z, w.b_r, w.b_h])
    u, z, r, h = (s @ columns + shift).split([D, Z, V, D], dim=-1)
    q, k = (F.silu(z) * w.kappa[n] + w.mu[n] for n in (0, 1))
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]  # j - i
    weights = torch.softmax(q @ k.mT / math.sqrt(Z) + w.table[offset + P - 1], dim=-1)  # (..., L, L)
    found = weights @ F.silu(x @ w.W_v + w.b_v)
    candidate = F.silu(h + (found * F.silu(r)) @ w.U_h)
    return x + torch.sigmoid(u) * (candidate - x)


# %% [markdown]
# The package's module is the same with a batch axis, masks and a choice of function. Its parameters are ours, transposed
# as `nn.Linear` likes them; `functional_call` runs it with tensors of our choice, so gradients can reach `w`.

# %%
unit = GatedAttention(D, Z, V, max_positions=P).double()


def as_module_parameters(w):
    """Our parameters under the names of the package's module."""
    return {
        "v_proj.weight": w.W_v.T,
        "v_proj.bias": w.b_v,
        "mx_proj.weight": torch.cat([w.W_u, w.W_z, w.W_r, w.W_h], dim=1).T,
        "mx_proj.bias": torch.cat([w.b_u, w.b_z, w.b_r, w.b_h]),
        "h_proj.weight": w.U_h.T,
        "h_proj.bias": torch.zeros(D, dtype=torch.float64),  # that bias is in mx_proj
        "kappa": w.kappa,
        "mu": w.mu,
        "bias.table": w.table,
    }


def package_gated_attention(x, s, w):
    return functional_call(unit, as_module_parameters(w), (x[None],), {"smooth": s[None]})[0]


# %% [markdown]
# ## They agree
#
# Same values, and the same gradient for `x`, `s` and every parameter. A fixed random combination of all outputs is
# differentiated, so that no error can hide in a sum.

# %%
torch.manual_seed(7)
inputs = {"x": x.clone().requires_grad_(), "s": s.clone().requires_grad_(), **vars(w)}
direction = torch.randn(11, D, dtype=torch.float64)


def values_and_gradients(function):
    y = function(inputs["x"], inputs["s"], w)
    return y.detach(), torch.autograd.grad((y * direction).sum(), list(inputs.values()))


y_slow, slow = values_and_gradients(slow_gated_attention)
for name, function in (("fast", fast_gated_attention), ("package", package_gated_attention)):
    y, grads = values_and_gradients(function)
    worst = max(largest(g, h) for g, h in zip(grads, slow, strict=True))
    print(f"{name:8} values {below(largest(y, y_slow), 1e-12)}; {len(grads)} gradients {below(worst, 1e-11)}")

# %% [markdown]
# And attention by itself: the package keeps a loop over queries, `attend_slow`, beside the matrix form `attend`, with the same
# arguments. All three functions, with and without a future to hide, with and without padding (on either side):


# %%
def worst_difference(function, causal, masked):
    """The largest difference of loop and matrices over values and gradients."""
    torch.manual_seed(0)
    arguments = [torch.randn(2, 13, width, dtype=torch.float64, requires_grad=True) for width in (4, 4, 3)]
    bias = torch.randn(13, 13, dtype=torch.float64, requires_grad=True)
    mask = torch.stack([torch.arange(13) < 9, torch.arange(13) >= 5]) if masked else None
    results = []
    for form in (attend, attend_slow):
        y = form(*arguments, function=function, bias=bias, mask=mask, causal=causal)
        results.append([y, *torch.autograd.grad(y.square().sum(), [*arguments, bias])])
    return max(largest(a, b) for a, b in zip(*results, strict=True))


for name in ("softmax", "laplace", "relu2"):
    worst = [worst_difference(name, causal, masked) for causal in (False, True) for masked in (False, True)]
    print(f"{name:8} full, padded, causal, causal and padded: each {below(max(worst), 1e-11)}")

# %% [markdown]
# ## Put together: the Mega layer
#
# An EMA that smooths, a head that picks, two gates. The diagram is the layer in its pre-norm form. Follow the two ways that
# lead around the attention: the norm's output goes to the *values* unsmoothed, and the input itself goes to the last box.

# %%
show(
    mega_diagram(),
    "Diagram of a Mega layer. x goes through a norm, then an EMA with SiLU to give s. From s come queries and keys (a shared "
    "Z), reset gate, the candidate's own part and the update gate; the values come from the norm's output. Attention finds, "
    "the reset gate multiplies, the candidate's part is added, SiLU gives H. The last box mixes phi H + (1 - phi) x, where "
    "x is the layer's input from before the norm, and gives y.",
)

# %% [markdown]
# What we look *for* is smoothed (queries, keys and gates come from `s`), what we carry home is not (values come from the
# normed input). As code, from the parts we have, it is three lines:


# %%
class MyMegaLayer(torch.nn.Module):
    """EMA, then gated attention, then the gated mix with the input. (B, L, D) -> (B, L, D)."""

    def __init__(self, dim, n, z_dim, v_dim, max_positions, function):
        super().__init__()
        self.norm = Norm("layernorm", dim)
        self.ema = DampedEMA(dim, n, bidirectional=True)
        self.attention = GatedAttention(dim, z_dim, v_dim, function=function, max_positions=max_positions)

    def forward(self, x, mask=None):
        normed = self.norm(x, mask)
        smooth = F.silu(self.ema(normed, mask))
        return self.attention(normed, smooth=smooth, residual=x, mask=mask)


torch.manual_seed(0)
config = MegaConfig(
    dim=16, n=4, z_dim=8, v_dim=32, max_positions=64, attention="laplace", norm="layernorm", prenorm=True
)
packaged = MegaLayer(config).double()
mine = MyMegaLayer(16, 4, 8, 32, 64, "laplace").double()
mine.load_state_dict(packaged.state_dict())  # the parts have the same names

batch = torch.randn(3, 50, 16, dtype=torch.float64)
mask = torch.arange(50)[None] < torch.tensor([[50], [37], [1]])
weight = torch.randn(3, 50, 16, dtype=torch.float64)
results = []
for layer in (mine, packaged):
    y = layer(batch, mask)
    results.append([y, *torch.autograd.grad((y * weight).sum(), list(layer.parameters()))])
worst = max(largest(a, b) for a, b in zip(*results, strict=True))
print(f"mine = the package's, values and {len(results[0]) - 1} gradients:", below(worst, 1e-12))

c = config
formula = {
    "EMA": 4 * (2 * c.dim) * c.n + c.dim,  # alpha, delta, beta, eta in two directions; omega
    "values": (c.dim + 1) * c.v_dim,
    "gates, Z, candidate": (c.dim + 1) * (2 * c.dim + c.z_dim + c.v_dim),
    "found to candidate": (c.v_dim + 1) * c.dim,
    "kappa, mu": 4 * c.z_dim,
    "relative bias": 2 * c.max_positions - 1,
    "norm": 2 * c.dim,
}
counted = sum(parameter.numel() for parameter in packaged.parameters())
print("parameters, as the formula says:", sum(formula.values()) == counted, f"({counted:,})")

# %% [markdown]
# ### Looking inside
#
# Every mechanism of the course passes what is worth seeing through a window, an `nn.Identity`. `record` opens the windows for
# the length of a `with` block. No number changes. Here is a layer as it is born, with softmax:

# %%
torch.manual_seed(0)
newborn = MegaLayer(MegaConfig(dim=16, n=4, z_dim=8, v_dim=32, max_positions=64, norm="layernorm", prenorm=True))
newborn = newborn.double()
with record(newborn) as tape, torch.no_grad():
    seen = newborn(batch)
print(tape)
print("recording changed nothing:", bool((seen == newborn(batch)).all()))

# %%
weights, phi = tape["attention.weights"][0], tape["update_gate"][0]
bits = -(weights * weights.log2()).sum(-1)
fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6))
picture = left.imshow(weights, vmin=0)
left.grid(False)
fig.colorbar(picture, ax=left, label="weight")
left.set(xlabel="key (position)", ylabel="query (position)", title="attention of a newborn layer")
right.hist(phi.flatten(), bins=np.linspace(0, 1, 41))
right.set(xlabel="update gate φ", ylabel="count (positions × channels)", title="its update gate", xlim=(0, 1))
assert (phi - 0.5).abs().max() < 0.15 and bits.min() > 0.98 * math.log2(50)
show(
    fig,
    f"Left: the 50 by 50 attention map of a freshly made layer, all weights between {fmt(weights.min().item())} and "
    f"{fmt(weights.max().item())}, nearly the even 1/50 = 0.02. Right: its update gate, all values between "
    f"{fmt(phi.min().item())} and {fmt(phi.max().item())}.",
)
print(
    "every query looks at nearly everything: entropy above 98 % of log2(50):", bool(bits.min() > 0.98 * math.log2(50))
)

# %% [markdown]
# Queries and keys start near zero, so the map is even and attention begins as an average over the whole sequence. The faint
# stripes are the bias table. The update gate starts at one half: every layer begins by mixing equal parts of its input and of
# its candidate. What training makes of this, chapter 12 looks at.
#
# ### One step at a time
#
# A causal layer can also stream: hand it one position, get one output, and a state to go on with. The EMA's state has a fixed
# size. Full attention has to keep every key and value; in chunks (the next chapter) it keeps at most one chunk.


# %%
def stream(layer, x):
    """Feed x (B, L, D) step by step; returns the outputs and the largest number of keys held."""
    state, outputs, held = layer.initial_state(len(x)), [], 0
    for t in range(x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y)
        held = max(held, state["attention"]["k"].shape[1])
    return torch.stack(outputs, dim=1), held


for name, chunk in (("full", None), ("chunks of 8", 8)):
    torch.manual_seed(4)
    config = MegaConfig(dim=16, n=4, z_dim=8, v_dim=32, max_positions=64, causal=True, chunk=chunk, attention="laplace")
    layer = MegaLayer(config).double().eval()
    with torch.no_grad():
        whole = layer(batch)
        parts, held = stream(layer, batch)
        changed = batch.clone()
        changed[:, 30:] += 5  # another future
        past = layer(changed)[:, :30]
    print(
        f"{name:12} step by step = at once: {below(largest(parts, whole), 1e-12)}; keys held at most: {held}; "
        f"another future changes the past by {below(largest(past, whole[:, :30]), 1e-12)}"
    )

# %% [markdown]
# ## How it grows
#
# One head makes one map instead of many, and that is a constant factor. The map itself still has $L^2$ entries. Let us
# measure both facts, and glance at the next chapter's remedy: attention inside chunks of 128 only. In the figure, compare
# slopes rather than heights: on these axes a slope of 2 is quadratic growth, a slope of 1 is linear.


# %%
def question(length, heads=None, z=64, v=64):
    """Random queries, keys, values, in float32; split into heads if asked."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, length, width) for width in (z, z, v)]
    if heads:
        tensors = [t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in tensors]  # (1, heads, L, width / heads)
    return tensors


forms = {
    "full attention": (attend, (512, 1024, 2048, 4096)),
    "chunks of 128": (lambda q, k, v: chunk_attention(q, k, v, 128, attend=attend), (512, 1024, 2048, 4096, 8192)),
}
threads = torch.get_num_threads()
torch.set_num_threads(1)  # one thread waits for no other: steadier times on a busy machine
costs = {}
for name, (form, lengths) in forms.items():
    costs[name] = {}
    for length in lengths:
        once = partial(form, *question(length))
        costs[name][length] = time_and_memory(once, repeats=3 if length >= 4096 else 5)
torch.set_num_threads(threads)


def exponent(cost, what):
    return growth_exponent(list(cost), [getattr(c, what) for c in cost.values()]).exponent


for name, cost in costs.items():
    print(f"{name}: memory grows with exponent {fmt(exponent(cost, 'bytes'))}")
full_time, chunk_time = (exponent(cost, "seconds") for cost in costs.values())
print("time of full attention grows with an exponent above 1.5:", full_time > 1.5)
print("that of chunks with a smaller one:", chunk_time < full_time)
at_4096 = {name: cost[4096].seconds for name, cost in costs.items()}
print("at length 4096 chunks are at least 5 times faster:", at_4096["full attention"] > 5 * at_4096["chunks of 128"])

eight_heads, one_head = question(1024, heads=8), question(1024)
split, single = peak_memory(lambda: attend(*eight_heads)), peak_memory(lambda: attend(*one_head))
print("eight heads against one, peak memory at length 1024: about 8 times as much:", 6 < split / single < 10)

# %%
fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.6))
for name, cost in costs.items():
    axes[0].loglog(list(cost), [1e3 * c.seconds for c in cost.values()], label=name)
    axes[1].loglog(list(cost), [c.bytes / 2**20 for c in cost.values()], label=name)
axes[0].set(xlabel="length (positions)", ylabel="time (ms)", title="time, forward")
axes[1].set(xlabel="length (positions)", ylabel="peak memory (MiB)", title="memory, forward")
for ax in axes:
    ax.set_xticks([512, 1024, 2048, 4096, 8192], ["512", "1k", "2k", "4k", "8k"])
    ax.xaxis.minorticks_off()
axes[0].legend()
ratio = costs["full attention"][4096].bytes / costs["chunks of 128"][4096].bytes
cheaper = costs["chunks of 128"][8192].bytes < costs["full attention"][4096].bytes
show(
    fig,
    "Time and peak memory against length on logarithmic axes: straight lines in memory, with slope "
    f"{fmt(exponent(costs['full attention'], 'bytes'))} for full attention and "
    f"{fmt(exponent(costs['chunks of 128'], 'bytes'))} for chunks of 128; in time a steep line and a flatter one. "
    f"At length 4096 full attention holds more than ten times as much: {ratio > 10}; chunks at "
    f"8192 still hold less than full attention at 4096: {cheaper}.",
)

# %% [markdown]
# In memory the line of full attention is exactly twice as steep: doubling the length quadruples the map, in chunks it
# doubles. Time follows, with some noise, and is often steeper still: a map that no longer fits the caches is slower to
# write, number by number. What chunks give up is everything beyond their borders, and in Mega-chunk
# it is the EMA that carries news across. That is chapter 04.

# %% [markdown]
# ## Why this is fast
#
# `attend` is the matrix form of *The fast version*: make the map, use it, done. It does nearly all of its work in two matrix
# products, which is what processors are built for. And still most of its time goes elsewhere. Count, for one pair of a query
# and a key:
#
# $$ \underbrace{2z + 2v}_{\text{operations, in two products}} \;+\; \underbrace{1}_{\text{erf or exp}} \;+\;
#    \underbrace{8\,p}_{\text{bytes, in } p \text{ passes over the map}} . $$
#
# In words: the score is a sum of $z$ products, the pair's share of the output another $v$ multiplications and additions, and
# one hard function is taken of the score. Those have to be. The rest is traffic: dividing, adding the bias, subtracting
# the mean and so on are *passes*, and each reads a map of $L^2$ numbers and writes a new one. At 4,096 positions a map is
# 64 MiB. No cache holds that; worse, memory that is new has to be fetched from the system page by page, and many
# machines take longer to fetch a number than to compute it.
#
# The remedy changes no formula. No query needs another query's row. So take some queries, as many as make **a tile of about one
# megabyte** of scores, finish them, and take the next: every pass then runs over numbers that are still in the cache.
# The bias comes in tiles, too, straight from its table, and no $L \times L$ square is ever made:


# %%
def in_tiles(q, k, v, rows_of_bias, size=2**18):
    """q, k (L, z), v (L, v) -> (L, v), laplace; rows_of_bias(first, last) -> (last - first, L)."""
    length, found = len(q), []
    for first in range(0, length, max(1, size // length)):
        last = min(first + max(1, size // length), length)
        scores = q[first:last] @ k.mT / length + rows_of_bias(first, last)
        found.append(laplace(scores) @ v)
    return torch.cat(found)


position = RelativeBias(256).double()
torch.manual_seed(0)
q, k, v = (torch.randn(1100, width, dtype=torch.float64) for width in (8, 8, 5))
square, rows = position(1100), partial(position.rows, length=1100)
error = largest(in_tiles(q, k, v, rows), attend(q, k, v, function="laplace", bias=square))
print("in tiles = at once:", below(error, 1e-12), "- a tile is", 2**18 // 1100, "queries against 1100 keys")

# %% [markdown]
# The way *back* needs the weights again, and keeping them would mean keeping the map: so each tile is made once more when its
# turn comes, for one more product and one more erf a pair. The package has two forms of this:
#
# - **Rows of the bias**, as above, in `attend_in_tiles`: autograd makes a tile over again, and then goes back through it.
#   This takes any bias that can be asked for by rows.
# - **Two tiles of memory**: forward and backward are written out, each pass writes over one of the same two tiles, and no new
#   memory is asked for. The bias may be a square that is there already, or, better, its $2L - 1$ numbers, one for each distance:
#   then it is laid out where a tile needs it, once for the whole batch. Nothing of size $L \times L$ exists, and this is how a
#   `GatedAttention` looks at a long sequence.
#
# And softmax *without* a bias has a tiled form inside PyTorch, `scaled_dot_product_attention`. On a processor its lean
# kernel wants queries and values of one width, else it makes the whole map after all; Mega's values are wider than its
# queries. Zeros help: a product with zeros is zero, so queries and keys may be widened at will, if the scale
# $1/\sqrt z$ is the old one. Values and all gradients, the table's among them:

# %%
wide = [torch.randn(1, 1100, width, dtype=torch.float64) for width in (8, 8, 5)]
for name, bias_of in (("softmax", False), ("softmax", True), ("laplace", True), ("relu2", True)):
    results = []
    for form in (attend, attend_in_tiles):
        inputs = [t.clone().requires_grad_() for t in wide]
        bias = (position.distances(1100) if form is attend_in_tiles else position(1100)) if bias_of else None
        y = form(*inputs, function=name, bias=bias)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs + [position.table] * bias_of)])
    worst = max(largest(a, b) for a, b in zip(*results, strict=True))
    print(
        f"{name:8} {'with a bias' if bias_of else 'no bias':12} {len(results[0]) - 1} gradients: {below(worst, 1e-11)}"
    )

# %% [markdown]
# How far from the best possible is that? Measure a **floor** on this very machine: the time of a large matrix product
# with as many operations, plus the time of as many erf (or exp) of numbers that lie in the cache. The $L(2z+2v)$ numbers
# which must be read and written are next to nothing beside $L^2$ pairs. No program gets below it with float32 on one core. Left,
# laplace with a bias; right, softmax without, where PyTorch's call stands as anybody would write it, and with zeros
# added. In both, look at which lines stay level as the map outgrows the cache, and at their distance from the dotted one.

# %%
Z_WIDE, V_WIDE = 64, 256  # Mega's: the values are wider
lengths = [512, 1024, 2048, 4096]
threads = torch.get_num_threads()
torch.set_num_threads(1)
matrix, tile, whole = torch.randn(1024, 1024), torch.randn(2**18), torch.randn(2**24)  # 4, 1 and 64 MiB
operations_a_second = 2 * 1024**3 / quickest(lambda: matrix @ matrix)
hard = {"laplace": torch.erf, "softmax": torch.exp}
hard = {name: quickest(lambda f=f: f(tile), patience=0.03) / tile.numel() for name, f in hard.items()}
floor = {name: 2 * (Z_WIDE + V_WIDE) / operations_a_second + seconds for name, seconds in hard.items()}
a_pass = {len(x): quickest(lambda x=x: x + 1, patience=0.03) / len(x) for x in (tile, whole)}  # one number, one pass
table = RelativeBias(4096).requires_grad_(False)


def zeros_added(q, k, v):
    """Softmax by PyTorch's call, with queries as wide as the values. (B, L, z), (B, L, z), (B, L, v) -> (B, L, v)."""
    q_wide, k_wide = (F.pad(x, (0, v.shape[-1] - x.shape[-1])).unsqueeze(1) for x in (q, k))  # its kernel wants heads
    return F.scaled_dot_product_attention(q_wide, k_wide, v.unsqueeze(1), scale=q.shape[-1] ** -0.5).squeeze(1)


laplace_attention = partial(attend, function="laplace")
ways = {
    ("laplace", "whole map"): lambda *qkv: laplace_attention(
        *qkv, bias=table(qkv[0].shape[1]), on_weights=lambda weights: weights
    ),
    ("laplace", "tiles, rows of the bias"): lambda *qkv: attend_in_tiles(
        *qkv, function="laplace", bias=partial(table.rows, length=qkv[0].shape[1])
    ),
    ("laplace", "two tiles of memory"): lambda *qkv: attend_in_tiles(
        *qkv, function="laplace", bias=table.distances(qkv[0].shape[1])
    ),
    ("softmax", "whole map"): attend,
    ("softmax", "PyTorch's call"): F.scaled_dot_product_attention,
    ("softmax", "the same, zeros added"): zeros_added,
    ("softmax", "two tiles of memory"): attend_in_tiles,
}
inputs = {n: [torch.randn(1, n, width) for width in (Z_WIDE, Z_WIDE, V_WIDE)] for n in lengths}
a_pair = {way: [quickest(partial(f, *inputs[n]), patience=0.03) / n**2 for n in lengths] for way, f in ways.items()}
held = {way: peak_memory(partial(f, *inputs[4096])) for way, f in ways.items()}
torch.set_num_threads(threads)

fig, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True)
for ax, name in zip(axes, ("laplace", "softmax"), strict=True):
    for (function, way), times in a_pair.items():
        if function == name:
            ax.plot(lengths, [1e9 * t for t in times], label=way)
    ax.axhline(1e9 * floor[name], color="black", linestyle=":", marker="", label="floor")
    ax.set(
        xscale="log", xlabel="length (positions)", title=f"{name}, {'with' if name == 'laplace' else 'without'} a bias"
    )
    ax.set_xticks(lengths, ["512", "1k", "2k", "4k"])
    ax.xaxis.minorticks_off()
    ax.legend(fontsize="small")
axes[0].set(ylabel="nanoseconds for each pair", ylim=(0, None))
laplace_map, rows_times, two_tiles, _, torch_call, _, own_tiles = a_pair.values()
bytes_map, bytes_rows, bytes_two, _, bytes_torch, bytes_zeros, bytes_own = held.values()
facts = {
    "one pass over a fresh map of 64 MiB takes at least twice as long, for each number, as over a tile": (
        a_pass[2**24] > 2 * a_pass[2**18]
    ),
    "laplace at 4,096, both forms in tiles are faster than the whole map": max(rows_times[-1], two_tiles[-1])
    < laplace_map[-1],
    "and within six times of the floor": max(rows_times[-1], two_tiles[-1]) < 6 * floor["laplace"],
    "writing over two tiles is not the slower one": two_tiles[-1] < 1.25 * rows_times[-1],
    "from 1,024 to 4,096 a pair in tiles does not become dearer by half": rows_times[-1] < 1.5 * rows_times[1]
    and two_tiles[-1] < 1.5 * two_tiles[1],
    "both hold less than a tenth of what the whole map does": max(bytes_rows, bytes_two) < bytes_map / 10,
    "softmax at 4,096, two tiles are faster than PyTorch's call": own_tiles[-1] < torch_call[-1],
    "they, and the zeros too, take less than a quarter of its memory": max(bytes_own, bytes_zeros) < bytes_torch / 4,
}
show(
    fig,
    "Time for each pair of query and key against the length, queries of width 64 and values of width 256, one core, with the floor "
    "as a dotted line. Left laplace, as a whole map, in tiles with rows of the bias, and in two tiles of memory; right softmax, as a "
    "whole map, PyTorch's call, the same with zeros added, and in two tiles. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# Left first. Up to 512 positions the map *is* one tile, and all forms are near each other. At a few tiles they are still
# close, and which is ahead depends on the machine. As it grows the whole map climbs, and tiles stay level, about twice the
# floor where these pages were made. What brought most is no formula but **never touching the map as a whole**: a pass over a fresh map takes at
# least twice as long for each number as one over a tile, and laplace makes half a dozen. To ask for no new memory even
# within a tile pays mostly on the way back, which comes next. What remains above the floor is passes, in the cache, and
# products of narrow tiles, which are slower than a large square one.
#
# On the right PyTorch's call makes the map, too, since the widths differ. With zeros added it becomes a tiled kernel, level like
# ours on the left. But zeros are not free: they widen the first product from 64 to 256, and some of those on the way back. So
# the package adds them on a GPU only; on a CPU its own two tiles serve softmax as well. (Softmax takes fewer passes than laplace,
# so here the map itself does well for long, in time. In memory it does not.)
#
# And the way back? There each tile is made a second time. Count it, forward and backward together:

# %%
torch.set_num_threads(1)
training, from_above = {}, torch.randn(1, 2048, V_WIDE)
for way in list(ways)[:3]:
    leaves = [x.clone().requires_grad_() for x in inputs[2048]]

    def once(way=way, leaves=leaves):
        torch.autograd.grad(ways[way](*leaves), leaves, from_above)

    training[way[1]] = quickest(once), peak_memory(once)
torch.set_num_threads(threads)
whole_time, whole_bytes = training.pop("whole map")
for name, most_time, most_bytes in (("tiles, rows of the bias", 3, 1 / 5), ("two tiles of memory", 2, 1 / 5)):
    tile_time, tile_bytes = training[name]
    print(f"{name}, with the way back, 2,048 positions, against the whole map:")
    print(f"  less than {most_time} times the time: {tile_time < most_time * whole_time},", end=" ")
    print(f"less than {fmt(most_bytes)} of the memory: {tile_bytes < most_bytes * whole_bytes}")

# %% [markdown]
# In time nothing is won at this length: what is saved on the way there, the second making spends on the way back. In two tiles of
# memory it comes out about even; with rows of the bias autograd's passes cost more than that. In memory it is not
# even at all, and that is what decides on a long sequence: time still grows like $L^2$, memory
# like $L$. So `GatedAttention` attends in tiles unless told otherwise. (When somebody records the weights, or drops some of them
# at random, they are made in one piece after all.)

# %% [markdown]
# ## The panel
#
# *Who looks at whom* shows the map of any gated attention, and the weights of one query. Hand it a module that holds a
# `GatedAttention` (the unit, a Mega layer, a whole classifier) with an input, or simply queries and keys of your own.
#
# Here is a unit reading letters. Each letter has a random code; queries and keys share one `Z`, so we expect letters to look
# at their likes. Change the function; make it causal; raise the bias until position beats content.

# %%
text = "she sells sea shells by the sea shore"
torch.manual_seed(1)
codes = torch.randn(128, 32)
letters = torch.stack([codes[ord(letter)] for letter in text])[None]
reader = GatedAttention(32, 16, 64, max_positions=64)
with torch.no_grad():
    reader.mx_proj.weight.normal_(std=0.3)
    reader.kappa.normal_(mean=1.2, std=0.2)  # both scales positive: like seeks like
    reader.bias.table.copy_(-0.5 * torch.arange(-63, 64).abs())  # near is better than far
panel = WhoLooksAtWhom(reader, letters, labels=list(text), strength=0.0)
panel

# %%
print(panel.set(query=18).say())
print(panel.set(strength=1.0).say())
print(panel.set(strength=0.0, function="laplace", causal=True).say())
print(panel.set(function="relu2").say())

likes = torch.tensor([letter == text[18] for letter in text])
row = {name: panel.weights(name, False, 0.0)[18] for name in ("softmax", "laplace", "relu2")}
print(
    f"softmax: the {int(likes.sum())} letters {text[18]!r} get {fmt(100 * row['softmax'][likes].sum().item())} % of the weight"
)
print("laplace: the smallest weight is above 0:", bool(row["laplace"].min() > 0))
print("relu2: keys with a weight of exactly 0:", int((row["relu2"] == 0).sum()), "of", len(text))

# %% [markdown]
# Without a bias, the `l` at position 18 looks at the four `l` of the text and hardly at anything else. With the bias, it
# keeps to the nearby ones: the mean distance shrinks. Under laplace each weight is judged alone: every key gets at least a
# little, and the sum is whatever it is; relu² gives exactly 0 to those with a negative score.
#
# The second panel is about the update gate of the same unit: input, candidate, and the output between the two. The slider adds
# to the gate's logit. Push it down and the layer becomes a copy of its input; push it up and the input is forgotten.

# %%
gates = GateMix(reader, letters)
gates

# %%
print(gates.set(shift=-6.0).say())
print(gates.set(shift=6.0).say())

# %% [markdown]
# Both panels also take what you make yourself: `WhoLooksAtWhom(q, k)` with tensors `(length, z)`, if you like with
# `attend=` your own function of the same arguments, and `GateMix(x, candidate, phi)` with three tensors of one shape.

# %%
chain = WhoLooksAtWhom(
    5 * torch.eye(6), torch.eye(6).roll(1, dims=0), attend=attend_slow
)  # i asks for what i + 1 offers
print(chain.set(query=2, function="relu2").say())

# %% [markdown]
# ## Exercises
#
# Five, from easy to hard. After each check the chapter goes on with the package's functions, so *Run all* works at any time.
#
# ### Exercise 1 · Distances from a table
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# `table` holds $2P - 1$ numbers, for the offsets $-(P-1) \dots P-1$. Return the bias matrix `(length, length)` with
# `B[i, j] = ` the number for offset $j - i$; `length` is at most $P$.
#
# <details><summary>Hint 1</summary>
#
# Two index vectors, `torch.arange(length)[None, :]` and `[:, None]`, make a matrix of offsets by subtraction. Which of the two
# is the key?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Offset 0 stands in the middle of the table, at index $P - 1$, for every `length`. $P$ follows from `len(table)`.
#
# </details>


# %%
def bias_matrix(table, length):
    """table (2P - 1,), length <= P -> (length, length), row = query, column = key."""
    # BEGIN SOLUTION "your turn: read the table at j - i, with offset 0 in its middle"
    position = torch.arange(length)
    offset = position[None, :] - position[:, None]  # j - i
    return table[offset + len(table) // 2]
    # END SOLUTION


# %%
check_bias_matrix(bias_matrix)

# %% [markdown]
# ### Exercise 2 · Two gates
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Everything that comes after attention. `found` is what the head found; `reset` and `update` are logits, straight from the
# projection; `candidate` is the candidate's own part, before its SiLU; `weight` is $U_h$ as `F.linear` wants it. Apply the reset
# gate (a SiLU) to what was found, make the candidate $H$, and mix it with `x` by the update gate (a sigmoid).
#
# <details><summary>Hint 1</summary>
#
# $H = \mathrm{silu}\big(\text{candidate} + (\text{found} \odot \mathrm{silu}(r))\,U_h\big)$: add first, one SiLU around the sum.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# An open gate, $\varphi = 1$, takes $H$. There is no residual besides the mix.
#
# </details>


# %%
def gate_mix(found, reset, update, candidate, x, weight):
    """found, reset (..., v); update, candidate, x (..., D); weight (D, v) -> (..., D)."""
    # BEGIN SOLUTION "your turn: reset what was found, make the candidate, mix it with x"
    h = F.silu(candidate + F.linear(found * F.silu(reset), weight))
    phi = torch.sigmoid(update)
    return phi * h + (1 - phi) * x
    # END SOLUTION


# %%
check_gate_mix(gate_mix)

# %% [markdown]
# ### Exercise 3 · Where laplace comes from
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# Suppose you had wanted the smooth step to touch relu² somewhere else, or to touch another function. Given a `point`, and
# the `value` and the `slope` wanted there, return mean and deviation of the normal distribution function
# $F(x) = \Phi\big((x - \mu)/\sigma\big)$ that meets both conditions. ($\Phi$ is the standard one; laplace is this $F$.) All three
# arguments are tensors of one shape, values in $(0, 1)$, slopes positive.
#
# <details><summary>Hint 1</summary>
#
# Call $w = (\text{point} - \mu)/\sigma$. The first condition is $\Phi(w) = \text{value}$: it gives $w$, and nothing else is in it.
# The inverse of $\Phi$ is `torch.special.ndtri`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# $F'(x) = \frac{1}{\sigma}\, \frac{1}{\sqrt{2\pi}}\, e^{-w^2/2}$. Set it to `slope` and solve for $\sigma$; then $\mu$ from $w$.
#
# </details>


# %%
def bell_through(point, value, slope):
    """Three tensors of one shape -> (mean, std), both of that shape."""
    # BEGIN SOLUTION "your turn: first w from the value, then the deviation from the slope, then the mean"
    w = torch.special.ndtri(value)
    std = torch.exp(-w.square() / 2) / math.sqrt(2 * math.pi) / slope
    return point - std * w, std
    # END SOLUTION


# %%
check_bell_through(bell_through)

# %% [markdown] tags=["solution-only"]
# At $\sqrt{1/2}$ the value is one half, so $w = 0$ and everything collapses to $\mu = \sqrt{1/2}$, $\sigma = 1/\sqrt{4\pi}$. That choice
# of point makes the constants pretty; the general recipe is just as short.

# %% [markdown]
# ### Exercise 4 · Weights behind masks
#
# Difficulty: ●●● · Importance: ●●● · 20 minutes
#
# The weights of laplace and relu², with padding and future hidden: $f(q_i \cdot k_j / n_i + B_{ij})$ for visible keys, exactly 0 for
# the others. `squash` is the function $f$, to be called on a tensor. $n_i$ is the number of keys query $i$ sees, at least 1. `mask` is
# `True` where a key is real.
#
# <details><summary>Hint 1</summary>
#
# First make one boolean `visible`, `(B, L, L)`: row = query, column = key. `mask[:, None, :]` says which *columns* are real; a
# lower triangle with its diagonal (`tril()`) is the past and the present. Everything else follows from `visible`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `visible.sum(-1, keepdim=True)` counts; `clamp(min=1)` helps the rows that see nothing. (A division by zero may
# leave the values right and ruin the gradient.) Hide after the function.
#
# </details>


# %%
def squashed_weights(q, k, bias, mask, causal, squash):
    """q, k (B, L, z), bias (L, L), mask bool (B, L) -> (B, L, L); squash is laplace or relu2."""
    # BEGIN SOLUTION "your turn: visible, its count, the scores, the function, and only then the mask"
    length = q.shape[-2]
    past = torch.ones(length, length, dtype=torch.bool)
    visible = mask[:, None, :] & (past.tril() if causal else past)  # (B, L, L)
    count = visible.sum(-1, keepdim=True).clamp(min=1)
    weights = squash(q @ k.mT / count + bias)
    return weights.masked_fill(~visible, 0.0)
    # END SOLUTION


# %%
check_squashed_weights(squashed_weights)

# %% [markdown]
# ### Exercise 5 · One query and a cache
#
# Difficulty: ●●● · Importance: ●●○ · 20 minutes
#
# Causal softmax attention, one position at a time. The caches hold keys and values of all $t$ positions so far, oldest first. A new
# position brings `q_t`, `k_t`, `v_t`: return what it finds, and both caches grown by one. Add the bias from `table`, as in exercise 1
# (it is long enough: $P > t$).
#
# <details><summary>Hint 1</summary>
#
# A position also sees itself: let the caches grow first. `torch.cat([keys, k_t[:, None]], dim=1)`.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The $t + 1$ keys have the offsets $-t, \dots, -1, 0$: a slice of the table that *ends* with its middle.
#
# </details>


# %%
def attend_step(q_t, k_t, v_t, keys, values, table):
    """q_t, k_t (B, z), v_t (B, v), keys (B, t, z), values (B, t, v) -> found (B, v), keys, values (t + 1 long)."""
    # BEGIN SOLUTION "your turn: grow the caches, score, add the bias, softmax over the keys"
    keys = torch.cat([keys, k_t[:, None]], dim=1)  # (B, t + 1, z)
    values = torch.cat([values, v_t[:, None]], dim=1)
    t, middle = keys.shape[1] - 1, len(table) // 2
    scores = (keys @ q_t[:, :, None])[..., 0] / math.sqrt(q_t.shape[-1]) + table[middle - t : middle + 1]
    weights = torch.softmax(scores, dim=-1)  # (B, t + 1)
    return (weights[:, None] @ values)[:, 0], keys, values
    # END SOLUTION


# %%
check_attend_step(attend_step)

# %% [markdown]
# ## Check against the package
#
# The repository holds numbers that the authors' own code gave, run in double precision on a CPU: complete layers with random
# parameters, their outputs, their attention weights, and the gradient of every parameter (`tests/golden`, with a note on where
# they come from). `official.mega_layer` puts the authors' arrays into our `MegaLayer`. File by file, output, attention map
# and every gradient have to agree to 1e-9. For the rotary bias the bound is wider, since the authors build its table of
# sines in single precision.

# %%
GOLDEN = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"
LAYERS = {  # file -> how the authors had built that layer
    "softmax_full_layernorm_prenorm_bi": dict(attention="softmax", norm="layernorm"),
    "laplace_full_batchnorm_prenorm_bi_train": dict(attention="laplace", norm="batchnorm"),
    "laplace_chunk4_batchnorm_prenorm_bi_eval": dict(attention="laplace", norm="batchnorm", chunk=4, truncation=6),
    "relu2_full_rmsnorm_prenorm_bi_padded": dict(attention="relu2", norm="rmsnorm"),
    "softmax_chunk5_scalenorm_postnorm_bi_padded": dict(attention="softmax", norm="scalenorm", prenorm=False, chunk=5),
    "softmax_chunk5_layernorm_prenorm_causal_rotary": dict(
        attention="softmax", norm="layernorm", chunk=5, bidirectional=False, bias="rotary"
    ),
}


def batch_first(array):
    """The authors' (L, B, D) as our (B, L, D)."""
    return torch.from_numpy(np.ascontiguousarray(array.swapaxes(0, 1)))


def authors_layer(name):
    """The arrays of one file, and our layer holding the parameters in it."""
    with np.load(GOLDEN / f"mega_layer_{name}.npz") as file:
        arrays = dict(file)
    kept = ("param.", "buffer_before.", "buffer.")
    state = {key.split(".", 1)[1]: value for key, value in arrays.items() if key.startswith(kept)}
    options = {"prenorm": True, "bidirectional": True, **LAYERS[name]}
    layer = official.mega_layer(state, **options)
    return arrays, layer.train(bool(arrays["train_mode"]))


def compare(name):
    """The largest differences: outputs, attention weights, gradients of all parameters and the input."""
    arrays, layer = authors_layer(name)
    x = batch_first(arrays["x"]).requires_grad_()
    mask = ~torch.from_numpy(arrays["padding_mask"]) if "padding_mask" in arrays else None  # theirs: True = padding
    with record(layer) as tape:
        y = layer(x, mask=mask)
    (y * batch_first(arrays["cotangent"])).sum().backward()
    theirs = {key[5:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("grad.")}
    ours = official.authors_names(layer, gradients=True)
    assert theirs.keys() == ours.keys()
    gradients = [largest(ours[key], theirs[key]) for key in theirs] + [largest(x.grad, batch_first(arrays["grad_x"]))]
    weights = tape["attention.weights"].reshape(arrays["attn_weights"].shape)
    return largest(y, batch_first(arrays["out"])), largest(weights, torch.from_numpy(arrays["attn_weights"])), gradients


print(f"{'file mega_layer_...':48} {'output':13} {'map':13} gradients")
for name in LAYERS:
    out, weights, gradients = compare(name)
    bound = 1e-6 if "rotary" in name else 1e-9
    print(f"{name:48} {below(out, bound)}   {below(weights, bound)}   {len(gradients)} {below(max(gradients), bound)}")

# %% [markdown]
# Full and in chunks, padded, causal, in training and in evaluation, before and after the norm. The smaller pieces have files of
# their own: the two functions with their slopes, and both kinds of bias. And the causal layer was also decoded token by token by
# the authors; our `step` has to give the same.

# %%
with np.load(GOLDEN / "mega_attention_functions.npz") as file:
    points = torch.from_numpy(file["x"]).requires_grad_()
    for name, function in (("laplace", laplace), ("relu2", relu2)):
        y = function(points)
        (slope,) = torch.autograd.grad(y.sum(), points)
        errors = largest(y, torch.from_numpy(file[name])), largest(slope, torch.from_numpy(file[f"{name}_grad"]))
        print(f"{name}: values and slopes {below(max(errors), 1e-12)}")

with np.load(GOLDEN / "mega_relative_position_bias.npz") as file:
    simple, rotary = RelativeBias(10).double(), RotaryBias(8).double()
    with torch.no_grad():
        simple.table.copy_(torch.from_numpy(file["simple_param"]))
        rotary.alpha.copy_(torch.from_numpy(file["rotary_alpha"][0]))
        rotary.beta.copy_(torch.from_numpy(file["rotary_beta"][0]))
    worst = max(largest(simple(n), torch.from_numpy(file[f"simple_bias_len{n}"])) for n in (10, 7, 1))
    print("simple bias, lengths 10, 7, 1:", below(worst, 1e-12))
    worst = max(largest(rotary(n), torch.from_numpy(file[f"rotary_bias_len{n}"])) for n in (5, 12, 20))
    print("rotary bias, lengths 5, 12, 20:", below(worst, 1e-6))

arrays, layer = authors_layer("softmax_chunk5_layernorm_prenorm_causal_rotary")
with torch.no_grad():
    outputs, held = stream(layer, batch_first(arrays["x"]))
print(
    "step by step:", below(largest(outputs, batch_first(arrays["out_incremental"])), 1e-6), "- keys held at most:", held
)

# %% [markdown]
# ## What to remember
#
# * **One head, two gates.** The reset gate (SiLU) picks from what the head found, channel by channel; the update gate (sigmoid)
#   mixes the candidate with the input. It *is* the residual connection. (*Mega*, section 3, the equations of the gated unit.)
# * **One shared projection** $Z$, scaled and shifted twice, makes queries and keys: half the parameters, and scores that
#   are symmetric but for each key's popularity. Direction comes from the bias, the causal mask and the EMA.
# * **laplace** is a bell curve's running integral, placed to touch relu² in value and slope at $\sqrt{1/2}$; it is bounded by 1. It and
#   relu² divide the scores by the number of *visible* keys and are not normalised.
# * **Masks**: softmax before the function, with $-\infty$; laplace and relu² after it, with 0, since laplace(0) is not 0.
# * **Position** is a bias that depends on $j - i$ alone: a table, or (rotary) two turned vectors.
# * **A Mega layer** is norm → EMA → gated attention → mix. Queries, keys and gates read the smoothed sequence, values the sharp one.
# * The map still costs $L^2$ in time; one head makes it smaller, not linear. In **tiles** of a megabyte it never exists as a
#   whole, so memory grows like $L$. On the way there long sequences are faster, too; on the way back the second making of
#   each tile takes that gain again.
#
# Next, chapter 04 cuts the map into chunks, and asks what crosses a border, and how.
