# %% [markdown]
# # 06 · VQ attention: keys that share a name
#
# ## The question, and what you will be able to do
#
# In a library of a million books, nobody compares a question with every single page. Books stand on shelves, shelves
# have names, and one reads the names. Attention compares every query with every key, $L^2$ times. **What if the keys
# had names too, a few hundred in all?** Then $L$ queries meet $S$ names, and the cost is $L \cdot S$. The surprise of
# this chapter is that after the naming *nothing* is approximated any more: attention over named keys, done in linear
# time, equals attention over named keys done in quadratic time, up to rounding.
#
# After this chapter you will be able to
#
# - build a vector quantiser from nothing: nearest code, straight-through gradient, commitment, a codebook that follows
#   its keys, and what to do about codes that nobody uses;
# - derive $f(Q\hat K^\top)V = f(QC^\top)(\Delta V)$ in one line, and say which scores it allows and which it forbids;
# - write attention over codes in six lines, causal by running sums, with an exact window, and as a stream whose state
#   never grows;
# - step around its numerical traps: rounded codewords, empty codes, phantom counts, and differences of large numbers;
# - say what is lost, and how that depends on the number of codes and on the shape of the cloud of keys.
#
# **Where it comes from.** The mechanism is that of *Transformer-VQ* (Lucas D. Lingle, ICLR 2024), whose code is public;
# we compare with its numbers below. The course needs it for *LongVQ* (IJCAI 2024), which joins such an attention with a
# structured memory of the kind you met in chapters 01 and 02. Of LongVQ we know the abstract only, and no published
# code. So what this project calls LongVQ is a *reconstruction*, built on Transformer-VQ's exact mechanism, and we say
# so wherever it appears.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial.classroom import below, fmt, growth_exponent, peak_memory, quickest, show, use_style
from longseq_tutorial.classroom.checks.vq_attention import (
    check_attend_over_codes,
    check_causal_block,
    check_code_sums,
    check_nearest,
    check_quantise,
)
from longseq_tutorial.classroom.panels_vq import (
    CodebookLearning,
    RebuiltAttention,
    draw_codebook,
    fit_codebook,
    islands,
    misplaced,
)
from longseq_tutorial.mechanisms.vq_attention import (
    VectorQuantizer,
    VQAttention,
    code_sums,
    nearest_code,
    perplexity,
    vq_attention,
    vq_attention_blocks,
    vq_attention_quadratic,
)

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable

# %% [markdown]
# ## Same key, same weight
#
# Take a sentence and give every *letter* a key: equal letters, equal keys. Left is the map of attention weights, row by
# row what one position reads. Look for columns that are the same. On the right each letter stands once, with the
# *total* weight of its columns.

# %%
text = "the rain in spain stays mainly in the plain"
letters = sorted(set(text))
z = torch.tensor([letters.index(letter) for letter in text])  # (L,): the name of each key

torch.manual_seed(0)
codebook = torch.randn(len(letters), 6, dtype=torch.float64)  # one key for each letter
keys = codebook[z]  # (L, 6)
queries = 1.2 * codebook[z] + 0.3 * torch.randn(len(text), 6, dtype=torch.float64)
values = torch.randn(len(text), 5, dtype=torch.float64)
weights = torch.softmax(queries @ keys.T, dim=-1)  # (L, L)
by_letter = weights @ F.one_hot(z).double()  # (L, S): add up the columns of each letter

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), width_ratios=(2, 1))
left.imshow(weights.sqrt(), aspect="auto")
left.set(xlabel="key", ylabel="query (position)", title=f"{len(text)} keys, {len(letters)} different ones")
left.set_xticks(range(len(text)), list(text), fontsize=7)
right.imshow(by_letter.sqrt(), aspect="auto")
right.set(xlabel="letter", title="the same weights, by letter")
right.set_xticks(range(len(letters)), ["␣" if letter == " " else letter for letter in letters], fontsize=8)
for ax in (left, right):
    ax.grid(False)
spread = max((weights[:, z == s] - weights[:, z == s][:, :1]).abs().max().item() for s in range(len(letters)))
show(
    fig,
    f"""Left: attention weights of {len(text)} positions as a map, brighter for larger. Columns of equal letters are equal,
    they differ by {fmt(spread)}. Right: {len(letters)} columns, one for each letter, holding the total weight.""",
)
print("rank of the left map:", int(torch.linalg.matrix_rank(weights)), "with", len(text), "columns")

# %% [markdown]
# A query cannot tell equal keys apart. It reads all of them with one and the same weight, so their *values* may as well
# be added up before anybody asks. Below: the plain way, and the way through letters, with a sum of values and a number
# for each letter.

# %%
of_letter = F.one_hot(z).double().T  # (S, L): row s marks the positions of letter s
sums, counts = of_letter @ values, of_letter.sum(1)  # (S, 5), (S,)
power = torch.exp(queries @ codebook.T)  # (L, S): no key appears here, only letters
through_letters = (power @ sums) / (power @ counts)[:, None]
print("through letters = key by key, error", below((through_letters - weights @ values).abs().max(), 1e-12))

# %% [markdown]
# So attention is linear in $L$ whenever keys repeat. Real keys do not repeat: they are points in a continuous space, no two
# the same. The programme of this chapter: first *make* them repeat (a quantiser), then spend the rest on the
# identity you have just seen, in all the forms a model needs.
#
# | here | symbol | shape | what it is |
# |---|---|---|---|
# | `codebook` | $C$ | $(H, S, d)$ | $S$ codes for each head; in this text also $(S, d)$ |
# | `z` | $z_j$ | $(B, H, L)$ | name of key $j$: the index of its nearest code |
# | `k_hat` | $\hat k_j = C_{z_j}$ | $(B, H, L, d)$ | the codeword that stands for key $j$ |
# | one-hot | $\Delta$ | $(S, L)$ | $\Delta_{sj} = 1$ where $z_j = s$ |
# | `sums`, `counts` | $U = \Delta V$, $n = \Delta 1$ | $(B, H, S, e)$, $(B, H, S)$ | values added up by name, and how many |
# | `decay` | $\gamma$ | | memory of the codebook's averages, 0.99 in Transformer-VQ |
# | `window` | $w$ | | pairs with $\lvert i-j\rvert \le w$ may know their distance |
#
# ## The quantiser, from nothing
#
# A **codebook** is a list of $S$ points. A key's name is the number of the point nearest to it:
#
# $$z_j = \operatorname{argmin}_s \lVert k_j - C_s \rVert^2, \qquad \hat k_j = C_{z_j}.$$
#
# In words: look for the closest code, and pretend the key stood there.


# %%
def nearest(k, codebook):
    """k (L, d), codebook (S, d) -> the index of the nearest code (L,)."""
    distance = (k[:, None] - codebook).square().sum(-1)  # (L, S)
    return distance.argmin(-1)


# %% [markdown]
# ### A codebook that follows its keys
#
# Where should the codes be? In the middle of the keys that bear their name. And as a model trains, its keys move, so the
# middle has to be found again and again. The recipe is old: k-means, made patient by two moving averages (chapter 01!),
# one of the *sum* of the keys that chose a code and one of their *number*:
#
# $$m_s \leftarrow \gamma\, m_s + (1-\gamma) \sum_{j:\, z_j = s} k_j, \qquad
#   n_s \leftarrow \gamma\, n_s + (1-\gamma)\, \lvert\{j : z_j = s\}\rvert, \qquad
#   C_s = \frac{m_s}{\max(n_s,\, 0.01)} .$$
#
# No gradient is involved. (The published code writes the same update as a loss that is minimised by plain gradient
# descent with learning rate 1; it comes to the same.) Six lines:


# %%
def follow(keys, total, number, decay):
    """One update: keys (N, d), running sums (S, d) and numbers (S,) -> new sums and numbers."""
    z = nearest(keys, total / number.clamp(min=0.01)[:, None])
    chosen = F.one_hot(z, len(number)).double()  # (N, S)
    total = decay * total + (1 - decay) * chosen.T @ keys
    number = decay * number + (1 - decay) * chosen.sum(0)
    return total, number


# %% [markdown]
# Live, in two dimensions: 600 keys on five islands, 12 codes that begin as keys drawn at random, each update with a
# fresh handful of 128 keys. Discs are codes, thin dark lines the way they came, colours and thin grey borders the region
# that a code names (colours repeat). Look at what the codes do to the borders, and at how the islands are divided up.

# %%
cloud = islands()
torch.manual_seed(4)
total, number = cloud[torch.randperm(len(cloud))[:12]].clone(), torch.ones(12, dtype=torch.float64)
theirs = VectorQuantizer(1, 12, 2, decay=0.9, restart=0).double()
theirs.set_codebook(total[None])
path = [total.clone()]
for _ in range(60):
    batch = cloud[torch.randint(len(cloud), (128,))]
    total, number = follow(batch, total, number, decay=0.9)
    path.append(total / number.clamp(min=0.01)[:, None])
    theirs(batch[None, None])
path = torch.stack(path)  # (61, 12, 2)


def error_of(codebook):
    """Mean squared distance of a key to its code."""
    return (cloud - codebook[nearest(cloud, codebook)]).square().sum(-1).mean().item()


fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.8), sharey=True)
for ax, step in zip(axes, (0, 10, 60), strict=True):
    draw_codebook(ax, cloud, path[: step + 1])
    ax.set(title=f"after {step} updates")
axes[1].set_ylabel("")
axes[2].set_ylabel("")
show(
    fig,
    f"""Keys on five islands, and 12 codes after 0, 10 and 60 updates with the way each has come. The codes drift to the
    middle of the keys they name and the mean squared distance of a key to its code falls from {fmt(error_of(path[0]))} to
    {fmt(error_of(path[10]))} and {fmt(error_of(path[60]))}.""",
)
print("by hand = the package's VectorQuantizer, error", below((path[60] - theirs.codebook[0]).abs().max(), 1e-10))

# %% [markdown]
# Each code sits down among its own. Dense islands are shared by several, and a code whose region has become too large
# lets the neighbours take the margin.
#
# ### Dead codes
#
# Now the same with a beginning that looks harmless: small random numbers around the origin. The islands are elsewhere.
# Whichever code happens to be nearest wins *all* keys of an island, moves there, and keeps them. The others are never
# asked, so they never learn: they are **dead**. How many names are really in use? Counting is too coarse, since a code
# with one key counts as much as one with a thousand. The **perplexity** weighs them: $\exp(-\sum_s p_s \log p_s)$ with
# $p_s$ the share of keys that bear name $s$. All equal: $S$. One for all: 1.
#
# Three ways to begin, and one way to mend: **restart** a code whose count has fallen far below the average, by putting it
# on a random key of the batch. Look at which curves reach the top, and how soon.

# %%
beginnings = {
    "small random numbers": {"start": "normal", "restart": 0.0},
    "random keys": {"start": "keys", "restart": 0.0},
    "k-means++": {"start": "kmeans++", "restart": 0.0},
    "small random, with restarts": {"start": "normal", "restart": 0.05},
}
in_use, left_over = {}, {}
for name, options in beginnings.items():
    torch.manual_seed(1)
    quantizer = VectorQuantizer(1, 32, 2, decay=0.9, **options).double()
    in_use[name] = []
    for _ in range(80):
        quantizer(cloud[torch.randint(len(cloud), (128,))][None, None])
        names = nearest(cloud, quantizer.codebook[0])
        in_use[name].append(perplexity(torch.bincount(names, minlength=32)).item())
    left_over[name] = error_of(quantizer.codebook[0])

fig, ax = plt.subplots(figsize=(8.5, 3.6))
for name, curve in in_use.items():
    ax.plot(range(1, 81), curve, label=name)
ax.axhline(32, color="#999999", linestyle=":", marker="")
ax.set(xlabel="updates", ylabel="perplexity", title="codes in use, of 32", ylim=(0, 34))
fig.legend(fontsize="small", loc="outside right upper")
facts = {
    "small random numbers end with less than a quarter of the codes in use": in_use["small random numbers"][-1] < 8,
    "keys end above 20": in_use["random keys"][-1] > 20,
    "k-means++ ends above 20": in_use["k-means++"][-1] > 20,
    "restarts lift small random numbers above 20": in_use["small random, with restarts"][-1] > 20,
}
show(
    fig,
    "Perplexity of 32 codes over 80 updates for four ways to begin. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)
print(
    "the dead cost: distance with small random numbers, at least five times that of k-means++:",
    left_over["small random numbers"] > 5 * left_over["k-means++"],
)

# %% [markdown]
# Begin with data, and watch the perplexity: a codebook of 512 of which 20 are in use is a codebook of 20. (k-means++ draws
# the first code at random among the keys, and each further one with a chance proportional to the squared distance from
# those it has.) The published code begins with small random numbers and never restarts; there all keys are normalised
# to one fixed length, so that none lies far off. The package's `VectorQuantizer` begins with
# k-means++ and restarts; both can be switched off.
#
# ### Straight through: a gradient for a discrete choice
#
# $\hat k$ is a step function of $k$: nudge a key, and its name stays the same, almost always. The true gradient is zero,
# and a zero gradient teaches nothing. The **straight-through** estimator pretends, on the way back only, that the
# quantiser was not there: $\partial \hat k/\partial k := 1$. Written with `detach`, there are three ways that look alike.
# Two are traps. Look at the forward value.

# %%
torch.manual_seed(0)
k = (30 * torch.randn(1000, 4)).requires_grad_()  # float32, as in training
C = 30 * torch.randn(16, 4)
c = C[nearest(k.detach(), C)]  # the codewords
spellings = {
    "c + k": c + k,
    "k + (c - k).detach()": k + (c - k).detach(),
    "c + (k - k.detach())": c + (k - k.detach()),
}
for spelling, k_hat in spellings.items():
    (gradient,) = torch.autograd.grad(k_hat.sum(), k)
    same = (k_hat == c).all().item()
    print(
        f"{spelling:22} is the codeword bit for bit: {same!s:6} passes the gradient on: {bool((gradient == 1).all())}"
    )

# %% [markdown]
# The first adds the key on top (a public port of Transformer-VQ to PyTorch does just that): not a quantiser at all. The
# second is right on paper, but $c - k$ has been rounded, and adding $k$ back does not undo it. The third subtracts a number
# from itself, which is exactly 0 in any precision. Only then are equal names equal keys, bit for bit, and "linear equals
# quadratic" can be tested without excuses.
#
# ### Commitment
#
# Codes follow their keys, but nothing tells a key to stay near its code, and the straight-through gradient is only as true
# as the two are close. So a small **commitment loss** pulls keys towards their codes:
#
# $$\ell = \frac{1}{\#\text{tokens}} \sum_{\text{tokens}} \sum_{\text{heads}} \lVert k - \mathrm{sg}(\hat k) \rVert^2,
#   \qquad \frac{\partial \ell}{\partial k} = \frac{2\,(k - \hat k)}{\#\text{tokens}},$$
#
# where sg, *stop gradient*, treats the codeword as a constant. Transformer-VQ adds it with weight $10^{-4}$. One tempting
# variant does nothing at all: a loss that pulls *codes* to keys, but is written with the straight-through output.

# %%
k = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
C = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
c = C[nearest(k.detach(), C.detach())]
commitment = (k - c.detach()).square().sum(-1).mean()
(pull,) = torch.autograd.grad(commitment, k)
print(
    "gradient of the commitment = 2 (k - c) / tokens, error",
    below((pull - 2 * (k - c) / 50).detach().abs().max(), 1e-15),
)
straight = c.detach() + (k - k.detach())  # what the quantiser hands on
useless = (straight - k.detach()).square().sum(-1).mean()
print("does the variant reach the codes at all?", torch.autograd.grad(useless, C, allow_unused=True)[0] is not None)

# %% [markdown]
# What happens without it? A small task: every key has a target, and what counts is how far its *codeword* ends up from it,
# $\lVert\hat k - t\rVert^2$. Straight through, the push on a key is $2(\hat k - t)$. Note what is missing in there: $k$ itself. A key
# whose codeword is off target is pushed on and on, however far it has run already. 300 keys on the islands, each its own
# target to begin with, 12 codes, 300 steps downhill. Look at the axes: where have the keys gone?

# %%
targets = islands(300)
runs = {}
for beta in (0.0, 0.25, 1.0):
    torch.manual_seed(0)
    moving, quantizer = targets.clone().requires_grad_(), VectorQuantizer(1, 12, 2, decay=0.9).double()
    distance, missed = [], []
    for _ in range(300):
        k_hat, _, commitment = quantizer(moving[None, None])
        task = (k_hat[0, 0] - targets).square().sum(-1).mean()
        (push,) = torch.autograd.grad(task + beta * commitment, moving)
        with torch.no_grad():
            moving -= 0.025 * len(targets) * push
        distance.append(commitment.item() ** 0.5)
        missed.append(task.item())
    runs[beta] = moving.detach(), quantizer.codebook[0], distance, missed

fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.6))
for ax, beta in zip(axes, (0.0, 1.0), strict=False):
    draw_codebook(ax, runs[beta][0], runs[beta][1][None])
    ax.set(title=f"commitment {beta:g}: after 300 steps")
for beta, (_, _, distance, _) in runs.items():
    axes[2].plot(distance, label=f"commitment {beta:g}")
axes[2].set(xlabel="steps", ylabel="distance from key to code", title="who runs away", ylim=(0, None))
axes[2].legend(fontsize="small")
low, high = targets.min(0).values - 0.5, targets.max(0).values + 0.5
outside = {beta: int(((keys < low) | (keys > high)).any(-1).sum()) for beta, (keys, *_) in runs.items()}
facts = {
    "without commitment more than 10 keys lie outside a box around all targets": outside[0.0] > 10,
    "with commitment 1 none does": outside[1.0] == 0,
    "without commitment the distance grows by more than a half": runs[0.0][2][-1] > 1.5 * runs[0.0][2][0],
    "and the task gets worse": runs[0.0][3][-1] > 1.2 * runs[0.0][3][0],
    "with commitment 1 the distance falls": runs[1.0][2][-1] < runs[1.0][2][0],
    "and the task gets better": runs[1.0][3][-1] < 0.8 * runs[1.0][3][0],
}
show(
    fig,
    "Left and middle: keys and codes after 300 steps without commitment, and with commitment 1. "
    "Right: root mean square distance of keys to codes over 300 steps, for three commitments. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# Left to the straight-through gradient alone, keys run off past their targets, the codes follow, and in the end the task
# is done worse than at the start. With the pull in place every key finds a rest where push and pull cancel,
# $k - \hat k = (t - \hat k)/\beta$: the larger $\beta$, the closer to its code.
#
# Two habits keep the pair stable. Keys are *normalised* before they are named (Transformer-VQ: to length $d^{1/4}$): keys
# that may grow without bound outrun their codes, and loss and codebook grow with them. And padding must not vote: a padded
# position enters neither sums nor counts nor loss, or it would win a code of its own.
#
# ## A slow version, in ten lines
#
# Attention over named keys, one query at a time. Everything fast below must equal this. (One sequence, one head; nothing is
# divided by $\sqrt d$, whoever wants that scales $q$.)


# %%
def attention_slow(q, k, v, codebook):
    """q, k (L, d), v (L, e), codebook (S, d) -> (L, e)."""
    k_hat = codebook[nearest(k, codebook)]  # (L, d)
    rows = []
    for query in q:
        power = torch.exp(k_hat @ query)  # (L,): one score for every key
        rows.append(power @ v / power.sum())
    return torch.stack(rows)


# %% [markdown]
# ## The identity: names can be pulled out
#
# Row $i$ of attention without its denominator is $\sum_j f(q_i \cdot \hat k_j)\, v_j$, with $f = \exp$. Sort the keys by
# name. All keys of one name have the same score:
#
# $$\sum_{j=1}^{L} f(q_i \cdot \hat k_j)\, v_j
#   \;=\; \sum_{s=1}^{S}\; \sum_{j:\, z_j = s} f(q_i \cdot C_s)\, v_j
#   \;=\; \sum_{s=1}^{S} f(q_i \cdot C_s) \underbrace{\sum_{j:\, z_j = s} v_j}_{U_s}.$$
#
# That is all. With matrices: $\hat K = \Delta^\top C$, so $Q\hat K^\top = (QC^\top)\Delta$. Each column of $\Delta$ holds a
# single 1, so multiplying by $\Delta$ only *picks columns*. And an element-wise function does not care whether columns are
# picked before or after it:
#
# $$f(Q\hat K^\top)\,V \;=\; f\big((QC^\top)\Delta\big)V \;=\; f(QC^\top)\,\Delta V .$$
#
# In words: score the names, not the keys, and let each name answer with the sum of its values. It holds for *any*
# element-wise $f$; softmax uses it twice, with $V$ above the line and with ones below it.

# %%
torch.manual_seed(0)
L, S, d, e = 60, 7, 4, 3
q, k, v = (torch.randn(L, n, dtype=torch.float64) for n in (d, d, e))
C = torch.randn(S, d, dtype=torch.float64)
Delta = F.one_hot(nearest(k, C), S).T.double()  # (S, L)
K_hat = Delta.T @ C
functions = {
    "exp": torch.exp,
    "squared relu": lambda x: F.relu(x).square(),
    "Laplace (chapter 03)": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2)))),
}
for name, f in functions.items():
    gap = f(q @ K_hat.T) @ v - f(q @ C.T) @ (Delta @ v)
    print(f"{name:22} f(Q K_hat^T) V = f(Q C^T) (Delta V), error", below(gap.abs().max(), 1e-10))
position = torch.arange(L)
by_distance = q @ K_hat.T - 0.1 * (position[:, None] - position).abs()
columns = torch.unique((q @ K_hat.T).T.round(decimals=9), dim=0).shape[0]
now = torch.unique(by_distance.T.round(decimals=9), dim=0).shape[0]
print(f"different columns of scores: {columns}; after a bias by distance: {now}")

# %% [markdown]
# The last line shows what the identity forbids. A score may depend on the query and on the *name* of the key, on nothing
# else. A bias that depends on the distance $i-j$ makes all $L$ columns different again, and the sum no longer factors. We will
# allow such a bias inside a window of bounded width, and pay for those pairs one by one.
#
# ## The fast version
#
# ### Over codes


# %%
def attention_over_codes(q, k, v, codebook):
    """The same arguments and the same result as attention_slow."""
    names = F.one_hot(nearest(k, codebook), len(codebook)).to(v.dtype)  # (L, S)
    sums, counts = names.T @ v, names.sum(0)  # (S, e), (S,): the length is gone
    power = torch.exp(q @ codebook.T)  # (L, S)
    return (power @ sums) / (power @ counts)[:, None]


print(
    "over codes = key by key, error",
    below((attention_over_codes(q, k, v, C) - attention_slow(q, k, v, C)).abs().max(), 1e-12),
)

# %% [markdown]
# ### Trap: an empty code, and the maximum
#
# `exp` of a large score overflows, so softmax subtracts the row's largest score first. *Which* largest? Suppose a dead code
# lies far out, where no key is. Its score may be huge, its count is 0. Subtract its score, and every real term becomes
# $e^{-\text{hundreds}} = 0$ in float32. Two ways that fail, and one that holds:

# %%
torch.manual_seed(0)
near = torch.randn(40, 4)
far_code = torch.full((1, 4), 300.0)
book = torch.cat([fit_codebook(near, 5), far_code])  # code 5 is dead
asking, say = torch.randn(40, 4).abs(), torch.randn(40, 3)
names = F.one_hot(nearest(near, book), 6).float()
sums, counts = names.T @ say, names.sum(0)
scores = asking @ book.T  # (40, 6)
truth = attention_slow(asking.double(), near.double(), say.double(), book.double())


def softmax_of(scores):
    power = torch.exp(scores - scores.amax(-1, keepdim=True))
    return power / power.sum(-1, keepdim=True)


mean = sums / counts.clamp(min=1)[:, None]
power = torch.exp(scores - scores.amax(-1, keepdim=True))
attempts = {
    "the maximum over all codes": (power @ sums) / (power @ counts)[:, None],
    "log(clamp(count, 1)) added to the score": softmax_of(scores + counts.clamp(min=1).log()) @ mean,
    "log(count), and -1e30 where it is 0": softmax_of(
        scores + torch.where(counts > 0, counts.clamp(min=1).log(), -1e30)
    )
    @ mean,
}
for what, got in attempts.items():
    verdict = "NaN" if got.isnan().any() else below((got - truth).abs().max(), 1e-5)
    print(f"{what:42} error: {verdict if 'NOT' not in verdict else 'large'}")

# %% [markdown]
# The third line is how the package does it: each code answers with the *mean* of its values, and the *logarithm of its
# count* is added to its score, since $n\,e^{x} = e^{x + \log n}$. Empty codes get $-10^{30}$: out of the sum *and* out of the
# maximum. ($-\infty$ would do as well, until a row has nothing else; then it gives NaN.) The second line left the empty code a
# phantom key of value 0. In this form everything is one ordinary softmax over $S$ keys, and torch's fused attention
# computes it in one call.
#
# ### A window that knows distances
#
# Near positions deserve better than their name: let pairs with $\lvert i-j\rvert\le w$ add a learned bias $b_{i-j}$ to their
# score. Everything else stays as it is, so *correct* what the codes have already counted:
#
# $$\sum_j e^{q_i\cdot\hat k_j + b_{ij}}\, v_j \;=\; \sum_s e^{q_i \cdot C_s}\, U_s \;+\!
#   \sum_{\lvert i-j\rvert\le w}\! e^{q_i\cdot\hat k_j}\,\big(e^{b_{i-j}}-1\big)\, v_j ,$$
#
# and the same with ones for the denominator. In words: take everybody at face value, then add for the few who are near what
# they deserve beyond it. Exact, for any bias, at the price of $2w+1$ extra pairs a query.


# %%
def with_window(q, k, v, codebook, bias):
    """bias (2w + 1,): added to the score of query i and key j with i - j = -w .. w. Otherwise as attention_over_codes."""
    z = nearest(k, codebook)
    names, k_hat = F.one_hot(z, len(codebook)).to(v.dtype), codebook[z]
    power = torch.exp(q @ codebook.T)
    above, below_line = power @ (names.T @ v), power @ names.sum(0)
    w, length = len(bias) // 2, len(q)
    for offset in range(-w, w + 1):  # i - j
        i = torch.arange(max(0, offset), min(length, length + offset))
        j = i - offset
        extra = torch.exp((q[i] * k_hat[j]).sum(-1)) * (torch.exp(bias[offset + w]) - 1)
        above = above.index_add(0, i, extra[:, None] * v[j])
        below_line = below_line.index_add(0, i, extra)
    return above / below_line[:, None]


def package(form, q, k, v, codebook, **options):
    """A form of the package, for one sequence and one head."""
    if "bias" in options:
        options["bias"] = options["bias"][None]
    return form(*(x[None, None] for x in (q, k, v)), codebook[None], **options)[0, 0]


torch.manual_seed(0)
bias = torch.randn(9, dtype=torch.float64)
want = package(vq_attention_quadratic, q, k, v, C, window=4, bias=bias)
print("correction = pair by pair, error", below((with_window(q, k, v, C, bias) - want).abs().max(), 1e-12))
hush = torch.full((2 * L - 1,), -18.0)  # everybody is near, and nearly silenced
hush[L - 1] = -19.0  # oneself a little more
single = [x.float() for x in (q * 0.3, k, v, C)]
want = package(vq_attention_quadratic, *(x.double() for x in single), window=L - 1, bias=hush.double())
gaps = {
    "by correction": with_window(*single, hush) - want,
    "the package": package(vq_attention, *single, window=L - 1, bias=hush) - want,
}
for who, gap in gaps.items():
    good = bool(gap.isfinite().all() and gap.abs().max() < 1e-4)
    print(f"float32, window nearly silenced, {who:13} error below 1e-4: {good}")

# %% [markdown]
# The second half is the trap that hides in the word *correct*. If the bias silences the near (here by a factor $e^{-18}$), the
# correction subtracts from a large number almost all of it, and float32 keeps seven digits. A learned bias seldom goes
# that far, but with *exact* keys in the window, where the weight $e^{q\cdot\hat k}$ is replaced by $e^{q \cdot k}$, it may.
# The package therefore never subtracts. It cuts the queries into blocks of $c$; a block sees the $c + 2w$ keys around
# it one by one, and *everything outside* through sums over codes, cumulated from the left end up to where its window
# begins, and from the right end down to where it stops. Sums of what one wants instead of a difference of what one does
# not want.
#
# ### Causal, by running sums
#
# A query may see the past only. So the sums over names must stop at the query: $U$ becomes a running sum. One per position
# would be $L \cdot S \cdot e$ numbers; one per *block* is enough, if the keys of the query's own block are seen one by one.
# Below: sums of each block, cumulated, and pushed on by one block, so that a block reads what was before it. (An *exclusive*
# cumulative sum.) Look: no loop.


# %%
def attention_causal(q, k, v, codebook, block):
    """As attention_over_codes, but query i sees keys 0 .. i. L must be a multiple of block here."""
    n, S = len(q) // block, len(codebook)
    z = nearest(k, codebook)
    q, k_hat, v = (x.view(n, block, -1) for x in (q, codebook[z], v))
    names = F.one_hot(z, S).to(v.dtype).view(n, block, S)
    ends = torch.cat([names.mT @ v, names.sum(1)[..., None]], dim=-1).cumsum(0)  # (n, S, e + 1): sums, and counts
    before = torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])  # what the blocks before have left
    near = torch.exp(q @ k_hat.mT).tril()  # (n, block, block): the own block, up to the diagonal
    both = torch.exp(q @ codebook.T) @ before  # (n, block, e + 1)
    above = near @ v + both[..., :-1]
    below_line = near.sum(-1) + both[..., -1]
    return (above / below_line[..., None]).flatten(0, 1)


want = package(vq_attention_quadratic, q, k, v, C, causal=True)
for block in (1, 4, 12, 60):
    gap = (attention_causal(q, k, v, C, block) - want).abs().max()
    print(f"causal in blocks of {block:2d} = query by query, error {below(gap, 1e-12)}")

# %% [markdown]
# The size of the block changes the cost, never the result. Small blocks mean many sums, large blocks many pairs; the package
# takes half the number of codes. It also adds the causal window: there the block sees the $w$ keys before it as well.
#
# Transformer-VQ itself goes block by block with a *state*: the last $M$ tokens, kept one by one, and a mean value and a count
# for each code, of everything older. When a block is done, the tokens that fall out of the memory are added to the means
# of their names. That is `vq_attention_blocks`, and you will write its heart in exercise 5.
#
# ### One token at a time
#
# With blocks of length 1 the same is a stream. `VQAttention` bundles quantiser, window bias and both forms. What it carries
# from token to token is a window and $S$ means, never more.

# %%
torch.manual_seed(0)
layer = VQAttention(heads=2, codes=16, key_dim=4, value_dim=3, window=5).double()
q4, k4 = torch.randn(2, 1, 2, 200, 4, dtype=torch.float64)
v4 = torch.randn(1, 2, 200, 3, dtype=torch.float64)
layer(q4, k4, v4)  # in training mode: the first batch makes the codebook
layer.eval()
with torch.no_grad():
    parallel, _ = layer(q4, k4, v4)
    state, stream = layer.initial_state(batch=1), []
    size = sum(part.numel() for part in state.values())
    for t in range(200):
        y_t, state = layer.step(q4[:, :, t], k4[:, :, t], v4[:, :, t], state)
        stream.append(y_t)
print("streaming = parallel, error", below((torch.stack(stream, dim=2) - parallel).abs().max(), 1e-12))
print("numbers carried after 0 tokens:", size, "- after 200:", sum(part.numel() for part in state.values()))
print("of 200 tokens", int(state["count"][0, 0].sum()), "are behind names,", int(state["real"].sum()), "in the window")

# %% [markdown]
# ## They agree: values and gradients
#
# Awkward lengths, double precision: outputs, and the gradients of one random combination of all outputs. `q`, `v` and the
# bias get the exact gradient. For `k` there is something to decide.
#
# **Which keys learn?** Straight through, a key would get the gradient of its codeword from *every* query. But the fast form
# never meets single keys outside the window, it meets sums; and to hand each key its own share would cost $L^2$ again. So
# keys learn from the pairs that are computed one by one, those in the window, and from the commitment loss. The published
# code decides the same way. Our quadratic form is written to mean the same: inside the window straight through,
# outside a constant. So all gradients can be compared.


# %%
def values_and_gradients(form, q, k, v, bias, codebook, **options):
    """y, then the gradients with respect to q, k, v and the bias."""
    inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    y = package(form, *inputs[:3], codebook, bias=inputs[3], **options)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def batch_of(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(length, n, generator=g, dtype=torch.float64) for n in (4, 4, 3)]


bias = torch.randn(11, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
for causal in (False, True):
    for exact in (False, True):
        worst = 0.0
        for length in (1, 2, 101, 257):
            options = {"causal": causal, "window": 5, "exact_window": exact}
            slow = values_and_gradients(vq_attention_quadratic, *batch_of(length), bias, C, **options)
            fast = values_and_gradients(vq_attention, *batch_of(length), bias, C, **options)
            worst = max(worst, *((s - f).abs().max().item() for s, f in zip(slow, fast, strict=True)))
        kind = f"{'causal' if causal else 'both ways'}, window of {'exact keys' if exact else 'codewords'}"
        print(f"{kind:34} y and the gradients of q, k, v, bias: {below(worst, 1e-10)}")

# %% [markdown]
# And seen: one query, number 30 of 60. How strongly does its output pull at each key, in the fast form with a window of 5, and
# in a quadratic form that passes every gradient straight through?

# %%
q, k, v = batch_of(60)
pulls = {}
for name, window in (("fast form, window of 5", 5), ("every pair straight through", 59)):
    leaf = k.clone().requires_grad_()
    y = package(vq_attention, q, leaf, v, C, window=window)
    (gradient,) = torch.autograd.grad(y[30].sum(), leaf)
    pulls[name] = gradient.norm(dim=-1)

fig, ax = plt.subplots(figsize=(9, 3.2))
for shift, (name, pull) in zip((-0.2, 0.2), pulls.items(), strict=True):
    ax.bar(torch.arange(60) + shift, pull, width=0.4, label=name)
ax.axvspan(24.5, 35.5, color="#999999", alpha=0.2, label="window of query 30")
ax.set(xlabel="key (position)", ylabel="size of its gradient")
ax.legend(fontsize="small")
fast, full = pulls.values()
outside = torch.cat([fast[:25], fast[36:]])
show(
    fig,
    f"""Size of the gradient that the output of query 30 sends to each of 60 keys. Fast form: {fmt(outside.max())} outside the
    window from 25 to 35, and there the same as straight through, to {below((fast - full)[25:36].abs().max(), 1e-12)}.
    Straight through for every pair: all {int((full > 0).sum())} keys get some.""",
)

# %% [markdown]
# Far keys are read, but not taught. That is the price of speed. They do not stay ignorant, though: the same weights make all
# keys, and what these learn from near pairs serves the far ones too.
#
# ## How it grows
#
# Against torch's own fused attention on the quantised keys (`scaled_dot_product_attention`): the same numbers, forward and
# backward, on one core, 64 codes. Look at the slopes first, then at where the lines cross.

# %%
lengths = [1024, 2048, 4096, 8192]
book = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0)) * 0.3


def there_and_back(form, length):
    """A function of no arguments: one pass forward and one backward."""
    g = torch.Generator().manual_seed(1)
    inputs = [(torch.randn(1, 1, length, 32, generator=g) * 0.3).requires_grad_() for _ in range(3)]
    return lambda: torch.autograd.grad(form(*inputs).sum(), inputs, allow_unused=True)


def fused(q, k, v):
    """torch's fused attention over quantised keys."""
    head = book[0][nearest_code(k, book)]
    return F.scaled_dot_product_attention(q, head, v, scale=1.0)


forms = {
    "fused attention": fused,
    "over codes": lambda q, k, v: vq_attention(q, k, v, book),
    "over codes, causal": lambda q, k, v: vq_attention(q, k, v, book, causal=True),
    "over codes, window 32": lambda q, k, v: vq_attention(q, k, v, book, window=32),
}
times = {name: [quickest(there_and_back(form, n), patience=0.05) for n in lengths] for name, form in forms.items()}
growth = {name: growth_exponent(lengths, seconds).exponent for name, seconds in times.items()}
x = torch.randn(3, 1, 1, 2048, 32, generator=torch.Generator().manual_seed(2))
same = (fused(*x) - vq_attention(*x, book)).abs().max()

fig, ax = plt.subplots(figsize=(8.5, 3.9))
for name, seconds in times.items():
    ax.plot(lengths, [1e3 * s for s in seconds], label=f"{name}: time ~ length^{growth[name]:.1f}")
ax.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="time, there and back (ms)")
ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
ax.minorticks_off()
fig.legend(fontsize="small", loc="outside right upper")
facts = {
    "fused attention: about quadratic": 1.6 < growth["fused attention"] < 2.5,
    "over codes: about linear": 0.6 < growth["over codes"] < 1.4,
    "causal: about linear": 0.6 < growth["over codes, causal"] < 1.4,
    "with a window: about linear": 0.6 < growth["over codes, window 32"] < 1.4,
    "at 8,192 over codes is at least five times faster": times["fused attention"][-1] > 5 * times["over codes"][-1],
    "the same result": same < 1e-5,
}
show(
    fig,
    "Time for a forward and a backward pass against length, 1,024 to 8,192 tokens, logarithmic axes. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# In memory, fused attention is a fair match: it never stores the $L \times L$ map either, only the plain quadratic form
# does. The block forms hold the scores of one block at a time, on the way back too, which is written out by hand. Only where all
# weights together are few, up to about a million numbers, are they kept for the gradient; where they are many, each block works
# them out *again*, which costs a little time and keeps the memory small.

# %%
sizes = [512, 1024, 2048, 4096]
plain = [peak_memory(there_and_back(lambda q, k, v: vq_attention_quadratic(q, k, v, book), n)) for n in sizes[:3]]
print("pair by pair: memory grows about quadratically:", 1.7 < growth_exponent(sizes[:3], plain).exponent < 2.1)
for name in forms:
    memory = [peak_memory(there_and_back(forms[name], n)) for n in sizes]
    print(f"{name + ':':23} linearly or less: {growth_exponent(sizes, memory).exponent < 1.15}")

# %% [markdown]
# ## Why this is fast
#
# Count what one token costs, with $S$ codes, keys of width $d$ and values of width $e$. Its key is named: $2Sd$ operations.
# Its query is scored against the codes, another $2Sd$, and reads their mean values, $2Se$. Softmax wants $S$ exponentials.
# The numbers that must come from memory and go back are $q$, $k$, $v$ and $y$, four bytes each:
#
# $$\underbrace{2S(2d + e)}_{\text{operations}} \qquad \underbrace{S}_{\text{exponentials}} \qquad
#   \underbrace{4\,(2d + 2e)}_{\text{bytes}} .$$
#
# In words: nothing here depends on $L$. Attention over single keys has $L$ in the place of $S$ (and saves the naming), so the
# identity itself is the step that brings most: a factor of about $L/S$. Means and codes, $4S(d + e)$ bytes, are read by
# every query, but they are small enough to stay beside the processor.
#
# The **floor** below is what this very machine needs for so many operations in a plain matrix product, so many
# exponentials on numbers in its cache, and copying so many bytes. The causal form has more to do than the floor says: the pairs
# in its own block, and $S$ means *for each block*, a table that grows with the length.
#
# The package saves in three more places. Look at them on the right, where each pair does the same work:
#
# - **One fused call.** Mean values and log-counts make attention over codes an ordinary softmax, so torch's fused call can do
#   it tile by tile. In plain steps, scores, weights and quotients are $L \times S$ tables that travel to memory and back.
# - **Names by `max`.** `max` hands out the largest value and its place together; `argmax`, asked for less, takes longer.
# - **Running sums block by block.** `cumsum` along a middle axis walks through memory in long strides. A loop that adds one
#   block's table to the total reads it as it lies, and so does the package.

# %%
wide, S = 64, 256
g = torch.Generator().manual_seed(0)
book = 0.3 * torch.randn(1, S, wide, generator=g)
lengths = [1024, 2048, 4096, 8192]
inputs = [0.3 * torch.randn(3, 1, 1, length, wide, generator=g) for length in lengths]


def plain_steps(q, k, v):
    """Attention over codes with every table written out."""
    sums, counts = code_sums(v, nearest_code(k, book), S)
    scores = q @ book.mT
    power = torch.exp(scores - scores.amax(-1, keepdim=True)) * counts.unsqueeze(2)
    return (power / power.sum(-1, keepdim=True)) @ (sums / counts.clamp(min=1).unsqueeze(-1))


def added_up(tables):
    """Running sums along the first axis, one addition for each block."""
    total, parts = torch.zeros_like(tables[0]), []
    for table in tables:
        total = total + table
        parts.append(total)
    return torch.stack(parts)


def largest(rows):
    """The place of the largest number of each row, which comes along with its value."""
    return rows.max(-1).indices


square, large, small = torch.randn(1024, 1024), torch.randn(2**23), torch.randn(2**16)
operations_a_second = 2 * 1024**3 / quickest(lambda: square @ square)
bytes_a_second = 2 * large.numel() * 4 / quickest(lambda: large.clone())
exponentials_a_second = small.numel() / quickest(lambda: small.exp())
floor = (
    2 * S * 3 * wide / operations_a_second + S / exponentials_a_second + 16 * wide / bytes_a_second
)  # seconds a token

ways = {
    "fused attention": fused,
    "over codes, causal": lambda q, k, v: vq_attention(q, k, v, book, causal=True),
    "over codes, plain steps": plain_steps,
    "over codes, the package": lambda q, k, v: vq_attention(q, k, v, book),
}
with torch.no_grad():
    seconds = {name: [quickest(lambda f=f, x=x: f(*x)) for x in inputs] for name, f in ways.items()}

scored, tables = inputs[-1][1] @ book.mT, torch.randn(64, S, wide, generator=g)  # (1, 1, L, S); one table a block
names = nearest_code(inputs[-1][1], book)
pairs = {
    "names: argmax, max": (lambda: scored.argmax(-1), lambda: largest(scored)),
    "running sums: cumsum, by block": (lambda: tables.cumsum(0), lambda: added_up(tables)),
}
saved = {name: quickest(before) / quickest(after) for name, (before, after) in pairs.items()}
saved["codes: plain steps, fused call"] = (
    seconds["over codes, plain steps"][-1] / seconds["over codes, the package"][-1]
)

fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), width_ratios=(3, 2))
for name, times in seconds.items():
    left.plot(lengths, [1e6 * t / length for t, length in zip(times, lengths, strict=True)], label=name)
left.plot(lengths, [1e6 * floor] * len(lengths), "k:", marker="", label="floor of the package's form")
left.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="microseconds a token, forward")
left.set_xticks(lengths, [f"{length:,}" for length in lengths])
left.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
left.minorticks_off()
left.legend(fontsize="small")
right.barh([name.replace(": ", "\n") for name in saved], list(saved.values()), height=0.5)
right.axvline(1, color="#999999", linestyle=":")
right.set(xlabel="time of the first over time of the second", title="the same work, two ways")

best = seconds["over codes, the package"]
q, k, v = inputs[0]
gaps = {
    "argmax and max": float((scored.argmax(-1) != largest(scored)).sum()),
    "cumsum and by block": float((tables.cumsum(0) - added_up(tables)).abs().max()),
    "plain steps and fused call": float((plain_steps(q, k, v) - vq_attention(q, k, v, book)).abs().max()),
}
facts = {
    "at 8,192 tokens over codes is at least four times faster than fused attention": seconds["fused attention"][-1]
    > 4 * best[-1],
    "its time for each token does not rise from 2,048 to 8,192 by more than half": best[-1] / 4 < 1.5 * best[1],
    "it stays within 20 times of the floor": best[-1] / lengths[-1] < 20 * floor,
    "argmax takes longer than max": saved["names: argmax, max"] > 1,
    "cumsum takes longer than adding block by block": saved["running sums: cumsum, by block"] > 1,
    "the same results": max(gaps.values()) < 1e-3,
}
show(
    fig,
    "Left: time for each token against length, forward, 256 codes, width 64: fused attention on named keys, over codes causal, "
    "in plain steps and by the package, and the floor. Right: ratios of the times of two ways to do the same work. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)
with torch.no_grad():
    many = inputs[-1][1]
    share = (quickest(lambda: nearest_code(many, book)) + quickest(lambda: code_sums(many, names, S))) / best[-1]
    whole = peak_memory(lambda: nearest(many[0, 0, :1024], book[0]))
    by_score = peak_memory(lambda: nearest_code(many[:, :, :1024], book))
print("naming, and adding up by name, take at least a fifth of the package's time:", share > 0.2)
print("naming 1,024 keys by all differences, as in the beginning, needs 50 times the memory:", whole > 50 * by_score)

# %% [markdown]
# Fused attention climbs with the length, the forms over codes stay level. torch's fused call is no slow rival: the package makes
# the very same call. It simply has $S$ keys to see instead of $L$.
#
# What lies between the package and the floor? A good part is what the floor counts as nothing: finding the largest of $S$
# numbers, and adding values up by name. The causal form has to write and read its means as well: with blocks of $c = S/2$
# queries, a table of $S$ means for each block is *twice as many numbers as all values*. Smaller blocks would make it larger
# still, larger ones mean more pairs; that is why $c$ goes with $S$. Otherwise a block is cheap: *one* product scores its queries
# against the codes and the codewords near them, laid side by side, and one softmax weighs both. These scores, $c\,(S + c)$ numbers
# for a block (with a window, a little more), are used while they are in the cache; memory never holds all $L\,(S + c)$.

# %% [markdown]
# ## What is lost
#
# The identity is exact *over quantised keys*. The loss is in the quantising. Two questions: how far does a key move when it is
# named, and how much attention goes astray for it?
#
# How many codes cover a cloud of keys? Think of tiles. To halve the distance to the nearest code on a line takes twice as
# many codes, in a plane four times, in $D$ dimensions $2^D$ times: the distance shrinks like $S^{-1/D}$. Left: Gaussian clouds
# in 1, 2, 4 and 8 dimensions, best codebooks, and fitted slopes. Right: attention of 256 positions, the share that lands on
# wrong keys, for a Gaussian cloud in 8 dimensions and for keys that come in 12 kinds (think of words) with some
# scatter.

# %%
g = torch.Generator().manual_seed(0)
sizes = [4, 8, 16, 32, 64, 128]
slopes = {}
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for D in (1, 2, 4, 8):
    points = torch.randn(2048, D, generator=g)
    distances = []
    for size in sizes:
        book = fit_codebook(points, size)
        apart = (points - book[nearest_code(points[None, None], book[None])[0, 0]]).square().sum(-1).mean()
        distances.append((apart / D).sqrt().item())
    slopes[D] = growth_exponent(sizes, distances).exponent
    halves = distances[-1] / distances[0]  # of the last D, 8
    left.plot(sizes, distances, label=f"{D} dimension{'s' * (D > 1)}: slope {slopes[D]:.2f}")
left.set(xscale="log", yscale="log", xlabel="codes S", ylabel="distance to the code", title="naming moves a key")
left.set_xticks(sizes, [str(size) for size in sizes])
left.minorticks_off()
left.legend(fontsize="small")

kinds = torch.randn(12, 8, generator=g)
kind = torch.randint(12, (256,), generator=g)
clouds = {
    "a Gaussian cloud": torch.randn(256, 8, generator=g),
    "12 kinds": kinds[kind] + 0.2 * torch.randn(256, 8, generator=g),
}
questions = torch.randn(256, 8, generator=g) * 0.7
sizes = [2, 4, 8, 16, 32, 64, 128]
astray = {}
for name, points in clouds.items():
    true = torch.softmax(questions @ points.T, dim=-1)
    astray[name] = []
    for size in sizes:
        book = fit_codebook(points, size)
        rebuilt = torch.softmax(questions @ book[nearest_code(points[None, None], book[None])[0, 0]].T, dim=-1)
        astray[name].append(misplaced(true, rebuilt))
    right.plot(sizes, astray[name], label=name)
right.set(xscale="log", xlabel="codes S", ylabel="share of attention", title="attention misplaced", ylim=(0, None))
right.set_xticks(sizes, [str(size) for size in sizes])
right.minorticks_off()
right.legend(fontsize="small")
facts = {
    "in 1 dimension the distance falls about like 1/S": -1.25 < slopes[1] < -0.8,
    "in 2 dimensions about like S^(-1/2)": -0.6 < slopes[2] < -0.4,
    "in 4 about like S^(-1/4)": -0.32 < slopes[4] < -0.2,
    "in 8 about like S^(-1/8)": -0.18 < slopes[8] < -0.09,
    "in 8, from 4 to 128 codes, it does not halve": halves > 0.5,
    "16 codes for 12 kinds misplace less than a third of what they do in the cloud": (
        astray["12 kinds"][3] < astray["a Gaussian cloud"][3] / 3
    ),
}
show(
    fig,
    "Left: distance from a key to its code against the number of codes. Right: share of attention on wrong keys. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# This is the price list. In one or two dimensions codes are cheap: the slopes are those of the tiles. In eight, thirty-two times
# the codes do not even halve the distance, and in the 128 dimensions of Transformer-VQ's keys a *shapeless* cloud could not be
# covered at all. VQ attention lives on keys that are *not* a shapeless cloud: keys that come in kinds. That is what the
# commitment loss is for, and why one watches the perplexity. And the near, where details matter most, gets a window, if one
# likes with exact keys.
#
# How does that compare with its neighbours in this course? The EMA (01) forgets by age. Chunks (04) never see what is across
# the border. VQ attention forgets *who exactly* it was: it remembers for ever what the keys named 17 said on average.
#
# ## The panel: a codebook that learns
#
# The same islands. The slider walks through the updates. Things to try:
#
# 1. Begin with small random numbers and 12 codes: how many are in use after 100 updates? Then let dead codes restart.
# 2. Set the decay to 0.99: why is the codebook late?
# 3. Give 32 codes to five islands: where do the codes go?

# %%
panel = CodebookLearning(start="kmeans++")
panel

# %%
print(panel.set(start="normal", step=100).say())
print(panel.set(restart=True).say())

# %% [markdown]
# It takes any keys in two dimensions, so also two directions of your own model's keys: `CodebookLearning(keys)`.
#
# ### Attention rebuilt from codes
#
# True attention beside the one that codes rebuild. Keys and queries below are letters again, now with some scatter, so that
# no two keys are equal. How many codes does a sentence need? Move `codes` and watch the curve; then let a window keep
# its exact keys.

# %%
g = torch.Generator().manual_seed(3)
scattered = keys + 0.25 * torch.randn(keys.shape, generator=g, dtype=torch.float64)
rebuilt = RebuiltAttention(queries * math.sqrt(6), scattered, codes=4)
rebuilt

# %%
print(rebuilt.set(codes=16).say())
print(rebuilt.set(codes=4, window=3, causal=True).say())

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. *Run all* never stops here. Shapes are now the package's:
# batch $B$ and heads $H$ come first, and each head has a codebook of its own.
#
# ### Exercise 1 · The nearest code
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Write `my_nearest(k, codebook)`: `k (B, H, L, d)` and `codebook (H, S, d)` to names `(B, H, L)`, int64. Without a tensor of
# size $L \times S \times d$, as the one-liner of the text made it.
#
# <details><summary>Hint 1</summary>
#
# $\lVert k - C\rVert^2 = \lVert k\rVert^2 - 2\,k\cdot C + \lVert C\rVert^2$. One of the three terms does not matter for
# the choice.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `k @ codebook.mT` is `(B, H, L, S)`. The codes' squares are `(H, S)`; they need an axis for the length.
#
# </details>


# %%
def my_nearest(k, codebook):
    """k (B, H, L, d), codebook (H, S, d) -> (B, H, L), int64."""
    # BEGIN SOLUTION "your turn: the largest k.C - |C|^2 / 2"
    half = codebook.square().sum(-1).unsqueeze(1) / 2  # (H, 1, S)
    return (k @ codebook.mT - half).argmax(-1)
    # END SOLUTION


# %%
check_nearest(my_nearest)

# %% [markdown]
# ### Exercise 2 · Sums by name
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Write `my_code_sums(v, z, codes)`: values `(B, H, L, e)` and names `(B, H, L)` to the sums $\Delta V$, `(B, H, S, e)`, and the
# counts $\Delta 1$, `(B, H, S)`, both in the dtype of `v`.
#
# <details><summary>Hint 1</summary>
#
# `F.one_hot(z, codes)` is `(B, H, L, S)`, of whole numbers; `.to(v.dtype)` makes it fit a product.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Without the one-hot matrix: `torch.zeros(...).scatter_add(2, index, v)`, where `index` is `z` spread over the width.
#
# </details>


# %%
def my_code_sums(v, z, codes):
    """v (B, H, L, e), z (B, H, L) -> sums (B, H, S, e), counts (B, H, S)."""
    # BEGIN SOLUTION "your turn: add up the values of each name, and count them"
    index = z.unsqueeze(-1).expand_as(v)
    sums = v.new_zeros(*v.shape[:2], codes, v.shape[-1]).scatter_add(2, index, v)
    counts = v.new_zeros(*v.shape[:2], codes).scatter_add(2, z, torch.ones_like(v[..., 0]))
    return sums, counts
    # END SOLUTION


# %%
check_code_sums(my_code_sums)

# %% [markdown]
# ### Exercise 3 · Straight through
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `quantise(k, codebook)`: return the codewords `(B, H, L, d)`, *bit for bit* in value and with the gradient of the key,
# and the commitment loss: squared distance, summed over width and heads, mean over batch and length. Nothing may reach the
# codebook by gradient. You may use the package's `nearest_code`.
#
# <details><summary>Hint 1</summary>
#
# Looking up with heads: `codebook[torch.arange(H)[:, None], z]` pairs each head with its own names.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Three spellings stand in the text; one is bit for bit.
#
# </details>


# %%
def quantise(k, codebook):
    """k (B, H, L, d), codebook (H, S, d) -> k_hat (B, H, L, d), loss ()."""
    # BEGIN SOLUTION "your turn: look up the codewords, pass the gradient through, measure the distance"
    z = nearest_code(k, codebook)
    words = codebook.detach()[torch.arange(codebook.shape[0])[:, None], z]
    loss = (k - words).square().sum((1, 3)).mean()
    return words + (k - k.detach()), loss
    # END SOLUTION


# %%
check_quantise(quantise)

# %% [markdown]
# ### Exercise 4 · Attention over codes
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `attend_over_codes(q, codebook, sums, counts)`: softmax attention of `q (B, H, L, d)` over all keys, which you know only by
# their `sums (B, H, S, e)` and `counts (B, H, S)`. Some codes are empty, and one of those may have an enormous score. Scores are
# taken as they come, without $\sqrt d$.
#
# <details><summary>Hint 1</summary>
#
# Mean of the values, logarithm of the count, one softmax.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `counts.log()` is $-\infty$ where a code is empty, which is just right inside a softmax. Mind the mean of no values.
#
# </details>


# %%
def attend_over_codes(q, codebook, sums, counts):
    """q (B, H, L, d), codebook (H, S, d), sums (B, H, S, e), counts (B, H, S) -> (B, H, L, e)."""
    # BEGIN SOLUTION "your turn: means, log counts, softmax"
    scores = q @ codebook.mT + counts.log().unsqueeze(2)  # (B, H, L, S)
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    return torch.softmax(scores, dim=-1) @ mean
    # END SOLUTION


# %%
check_attend_over_codes(attend_over_codes)

# %% [markdown]
# ### Exercise 5 · A causal block, with what came before
#
# Difficulty: ●●● · Importance: ●●○ · 25 minutes
#
# A stream arrives in blocks. Write `causal_block(q, z, v, codebook, sums, counts)`: queries `(B, H, L, d)` of this block, the names
# `(B, H, L)` and values `(B, H, L, e)` of its keys, and what all earlier blocks have left, `sums (B, H, S, e)` and
# `counts (B, H, S)`. Query $i$ sees everything earlier, and of its own block the keys $0 \dots i$. Return `y (B, H, L, e)`, the
# new sums and the new counts. At the very beginning all counts are 0.
#
# <details><summary>Hint 1</summary>
#
# Two lists of scores, recent keys and codes; *one* softmax over both (`torch.cat` along the last axis).
#
# </details>
# <details><summary>Hint 2</summary>
#
# Behind the weights stand values and means: `torch.cat([v, mean], dim=2)`. Add this block to the sums *after* reading them.
#
# </details>


# %%
def causal_block(q, z, v, codebook, sums, counts):
    """One block: y (B, H, L, e), new sums (B, H, S, e), new counts (B, H, S)."""
    # BEGIN SOLUTION "your turn: recent keys one by one, older ones by name, one softmax; then the new sums"
    length = q.shape[2]
    words = codebook[torch.arange(codebook.shape[0])[:, None], z]  # (B, H, L, d)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    recent = (q @ words.mT).masked_fill(future, -torch.inf)  # (B, H, L, L)
    older = q @ codebook.mT + counts.log().unsqueeze(2)  # (B, H, L, S)
    weights = torch.softmax(torch.cat([recent, older], dim=-1), dim=-1)
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    y = weights @ torch.cat([v, mean], dim=2)
    new_sums, new_counts = code_sums(v, z, codebook.shape[1])
    return y, sums + new_sums, counts + new_counts
    # END SOLUTION


# %%
check_causal_block(causal_block)

# %% [markdown] tags=["solution-only"]
# A query always sees its own key, so the softmax never has an empty row, not even in the first block, where every older score
# is $-\infty$. The package carries means instead of sums: they stay of the size of a value however long the stream is, and
# counts as whole numbers, exact for ever.

# %% [markdown]
# ## Check against the package, and against the authors' numbers
#
# First what this chapter built by hand, against what the package ships.

# %%
q, k, v = batch_of(60, seed=7)
hand_made = {
    "key by key": (attention_slow(q, k, v, C), {}),
    "over codes": (attention_over_codes(q, k, v, C), {}),
    "with a window": (with_window(q, k, v, C, bias), {"window": 5, "bias": bias}),
    "causal": (attention_causal(q, k, v, C, 12), {"causal": True}),
}
for name, (by_hand, options) in hand_made.items():
    print(
        f"{name:14} by hand = the package, error",
        below((by_hand - package(vq_attention, q, k, v, C, **options)).abs().max(), 1e-12),
    )

# %% [markdown]
# The repository also holds numbers that *Transformer-VQ's own published code* computed in double precision. One file follows
# a codebook of two heads through three updates, with padding: names, codewords, commitment loss and its gradient, sums and
# counts. (Its loss is averaged over padded positions too, each of which adds 0; ours over real ones. Hence a factor below.)

# %%
golden = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"


def arrays(name, start=""):
    """The arrays of a golden file whose names begin so, as tensors."""
    with np.load(golden / f"{name}.npz") as stored:
        return {key.removeprefix(start): torch.from_numpy(stored[key]) for key in stored.files if key.startswith(start)}


numbers = arrays("vq_codes")
quantizer = VectorQuantizer(2, 6, 4, decay=float(numbers["gamma"]), start="normal", restart=0).double()
quantizer.code_sum.copy_(numbers["c_sum0"])
quantizer.code_count.copy_(numbers["c_count0"])
for t in range(3):
    step = arrays("vq_codes", f"step{t}_")
    k, mask = step["vecs"].requires_grad_(), step["mask"].bool()
    k_hat, z, loss = quantizer(k, mask)
    loss = loss * mask.double().mean()
    errors = [
        (k_hat - step["quantized"])[mask[:, None].expand_as(z)],
        loss - step["l_commit"],
        torch.autograd.grad(loss, k)[0] - step["grad_commit_vecs"],
        quantizer.code_sum - step["c_sum_next"],
        quantizer.code_count - step["c_count_next"],
    ]
    worst = max(e.abs().max().item() for e in errors)
    print(f"update {t}: names equal: {torch.equal(z, step['z'].long())}; everything else {below(worst, 1e-9)}")

# %% [markdown]
# The other runs its attention over 24 tokens: blocks of 4 with a memory of 4, and blocks of 3 with a memory of 6.
# Positions enter there as in Transformer-XL: recent pairs get an extra score $(q_i + b)\cdot r_{i-j}$, with $r$ a
# projected sinusoid of the distance, and every score uses $q_i + a$, with two learned vectors $a$, $b$ for each head
# (`xl_u`, `xl_v` in the file). Both fit through the doors of `vq_attention_blocks`: $q + a$ as the query, the extra
# score as `bias`. We compare the output, the state after the last block, and the gradients, once with gradients through
# the carried state and once with the state cut off at every block (`stop_cache`).

# %%
for case in ("a_", "b_"):
    n = arrays("vq_attn_causal_ref", case)
    heads, width, memory, dim = int(n["n_head"]), n["q"].shape[-1], int(n["mem_len"]), int(n["d_model"])
    scale = width**-0.25
    angle = torch.arange(memory + 1)[:, None] * float(n["pe_lam"]) ** (-torch.arange(0, dim, 2).double() / dim)
    r = torch.cat([angle.sin(), angle.cos()], dim=-1) @ n["W_r"] * scale  # (memory + 1, H d)
    r = r.view(memory + 1, heads, width).transpose(0, 1)  # (H, memory + 1, d)
    content, place = ((n[name] * scale).view(heads, 1, width) for name in ("xl_u", "xl_v"))
    for stop in (False, True):
        q, k, v = (n[name].clone().requires_grad_() for name in "qkv")
        y, state = vq_attention_blocks(
            q + content,
            k,
            v,
            n["C"],
            block=int(n["block_len"]),
            memory=memory,
            bias=(q + place) @ r.mT,
            stop_cache=stop,
        )
        y = y.transpose(1, 2).flatten(2)  # heads side by side
        gradients = torch.autograd.grad((y * n["cotangent"]).sum(), (q, k, v))
        ending = "_stopcache" if stop else ""
        errors = [y - n["out"], state["mean"] - n["final_agg_mean"], state["count"] - n["final_agg_count"]]
        errors += [g - n[f"grad_{name}{ending}"] for g, name in zip(gradients, "qkv", strict=True)]
        worst = max(x.abs().max().item() for x in errors)
        how = "cut off" if stop else "with gradient"
        print(f"blocks of {int(n['block_len'])}, memory {memory}, state {how}: {below(worst, 1e-9)}")

# %% [markdown]
# And the plain definition, computed once densely in NumPy: padding, a window with bias, exact keys in the window, and a
# codebook with a dead code far away.

# %%
n = arrays("vq_attn_plain_oracle")
definitions = {
    "bidir_quadratic": {},
    "causal_quadratic": {"causal": True},
    "bidir_window_quadratic": {"window": 3, "bias": n["bias"]},
    "causal_window_quadratic": {"window": 3, "bias": n["bias"], "causal": True},
    "bidir_window_exactkeys_quadratic": {"window": 3, "bias": n["bias"], "exact_window": True},
}
for name, options in definitions.items():
    y = vq_attention(n["q"] * n["scale"], n["k"], n["v"], n["C"], mask=n["keep"], **options)
    print(f"{name:34} {below((y - n[name]).abs().max(), 1e-9)}")

# %% [markdown]
# ## What to remember
#
# - Equal keys get equal weights, so values can be added up *by name*: $f(Q\hat K^\top)V = f(QC^\top)(\Delta V)$, for every
#   element-wise $f$. Exact over quantised keys; cost $L \cdot S$ (Transformer-VQ, its central identity).
# - The quantiser: nearest code; $\hat k = C_z + (k - \mathrm{sg}\,k)$, bit for bit; commitment holds keys near codes; codes
#   follow keys as moving averages with $\gamma = 0.99$. Begin with data, watch the perplexity, restart the dead.
# - Mean value and log count for each code, $-10^{30}$ for empty ones: one ordinary softmax over $S$ keys, and a dead code
#   cannot drown the rest.
# - Positions only in a window. Causal: cumulated sums by block; streaming: $S$ means, $S$ counts, and the window.
#   Never subtract what you can avoid adding.
# - Keys learn from the window and from the commitment, not through the sums.
# - What is lost is *who exactly*: distance to the code falls like $S^{-1/D}$. It pays for keys that come in kinds.
# - LongVQ, known to us by its abstract, sets this above a structured memory; ours is a reconstruction.
#
# Next, chapter 07: another way to pull the sum out of the softmax, by features instead of names, linear attention.
