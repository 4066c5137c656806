# %% [markdown]
# # 05 · Sparse modular activation: attention that wakes up when it is needed
#
# ## The question, and what you will be able to do
#
# Attention asks every token to look around. Most tokens have no reason to. In *“We left Lisbon before dawn”* the *f* of
# *before* follows from its neighbours; an average of the last few letters (chapter 01) says all there is to say. Now and
# then comes a token for which it matters what stood far away. So: **can a layer decide, token by token, whether to attend
# at all, and learn that decision?**
#
# SeqBoat does. A tiny *latent configurator* wakes some tokens up. Only these attend, and only to one another: packed
# together, as if the sleepers between them did not exist. This buys two things. The cost falls with the share of tokens
# awake. And a window of a few *awake* tokens may span any distance in the text, which no window in the text can.
#
# It also raises a puzzle: a decision is a step, and a step has no slope. What is there to learn from?
#
# After this chapter you will be able to
#
# - decide with a tempered softmax, and say what temperature changes and what it does not;
# - compress the awake tokens of a batch and extract them again, without a loop;
# - attend within a window of awake tokens, in linear time and memory, with distances in the text or among the awake;
# - derive the gradient of the discrete choice by hand, and say what it cannot teach;
# - stream with a memory of constant size, and name two ways in which a batch or a mask can quietly spoil a result.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, growth_exponent, peak_memory, quickest, show, use_style
from longseq_tutorial.classroom.checks.sparse_activation import (
    check_choice_gradient,
    check_compress,
    check_extract,
    check_gate,
    check_remember,
)
from longseq_tutorial.classroom.panels_sparse_activation import WhoWakes
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.gated_attention import laplace, relu2
from longseq_tutorial.mechanisms.sparse_activation import (
    LatentConfigurator,
    SparseActivation,
    compress,
    compress_slow,
    extract,
    extract_slow,
    memory_attention,
    memory_attention_slow,
    rope,
)

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable


def draw(*shape, seed=0):
    """Random numbers in double precision, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# %% [markdown]
# ## The latent configurator
#
# Each token comes with two numbers, the logits $u = (u_0, u_1)$: how much speaks for *skip*, how much for *activate*. (In
# SeqBoat a linear map of the layer's state makes them.) A softmax with a learned temperature $\tau$
# turns them into probabilities, and then the larger one simply wins:
#
# $$p = \mathrm{softmax}(u/\tau), \qquad \text{active} \iff p_1 > p_0, \qquad c = \max(p_0, p_1).$$
#
# In words: no dice are thrown. The token with $p_1 = 0.51$ is awake, the one with $0.49$ asleep, every time. What remains
# of the probability is the **confidence** $c$, between one half and one. It scales what the attention of an awake token
# has found:
#
# $$y_t = \begin{cases} c_t \cdot \mathrm{GAU}(h)_t & \text{active} \\ 0 & \text{asleep.}\end{cases}$$
#
# GAU is a gated attention unit, as in chapter 03. Here are four tokens by hand. The third is a tie: it sleeps.

# %%
logits = torch.tensor([[[0.2, 1.4], [0.9, 0.6], [0.5, 0.5], [-1.0, 2.0]]], dtype=torch.float64)  # (1, 4, 2)
tau = 2.0
p = torch.exp(logits / tau) / torch.exp(logits / tau).sum(-1, keepdim=True)
for u, (skip, activate) in zip(logits[0].tolist(), p[0].tolist(), strict=True):
    word = "awake " if activate > skip else "asleep"
    print(f"u = {u!s:12}  p(activate) = {fmt(activate)}  {word}  confidence {fmt(max(skip, activate))}")

configurator = LatentConfigurator(dim=4).double()  # its temperature starts at sqrt(dim) = 2
with torch.no_grad():
    active, confidence = configurator(logits)
print(
    "the package agrees:",
    torch.equal(active, p[..., 1] > p[..., 0]),
    below((confidence - p.amax(-1)).abs().max(), 1e-6),
)

# %% [markdown]
# Only the difference $u_1 - u_0$ counts, since $p_1 = \sigma\big((u_1-u_0)/\tau\big)$ with the logistic function $\sigma$.
# The figure shows the *gate*, $c$ for the awake and 0 for the sleepers, for three temperatures. Look at where it jumps, how
# high, and what the temperature does on the right of the jump.

# %%
difference = torch.linspace(-3, 3, 601, dtype=torch.float64)
pairs = torch.stack([torch.zeros_like(difference), difference], dim=-1)[None]  # (1, 601, 2)
fig, ax = plt.subplots()
at_one = {}
with torch.no_grad():
    for temperature in (0.3, 1.0, 3.0):
        configurator.log_temperature.fill_(float(np.log(temperature)))
        active, confidence = configurator(pairs)
        gate = (confidence * active)[0]
        at_one[temperature] = gate[400].item()
        ax.plot(difference, gate, markevery=60, label=f"temperature {temperature}")
ax.set(xlabel="logit difference: activate minus skip", ylabel="gate", ylim=(-0.03, 1.03))
ax.legend()
show(
    fig,
    f"""The gate against the logit difference for temperatures 0.3, 1 and 3. All are 0 up to difference 0 and jump to one half
    just after it. At difference 1 they are at {fmt(at_one[0.3])}, {fmt(at_one[1.0])} and {fmt(at_one[3.0])}: the colder,
    the sooner near 1.""",
)

# %% [markdown]
# The temperature never changes *who* is awake, only how firmly: hot, all confidences stay near one half; cold, near one.
# And mark the jump. A token on the verge does not fade in: it comes in at half strength.
#
# | here | in the published code | what it is |
# |---|---|---|
# | `logits` | first two outputs of `hx_proj` | $u$: for skip, for activate |
# | `log_temperature` | `q_router.temp` | $\log\tau$, one number a layer; starts at $\log(s\sqrt D)$ ($D$: the layer's width; $s$: a setting, `temperature_scale`, 1 unless told) |
# | `active`, `confidence` | argmax and max of the tempered softmax | the decision, and $c$ |
# | `compress`, `extract` | `compress_seq`, `extract` | pack the awake together, and put them back |
# | `window` | `chunk` size | $w$: how many awake tokens to each side |
# | `kappa`, `mu` | `gamma`, `beta` | make queries and keys of one shared $z$, as in chapter 03 |
#
# The source is SeqBoat: *Sparse Modular Activation for Efficient Sequence Modeling*, NeurIPS 2023 (arXiv 2306.11197), and
# its published code (renll/SeqBoat). We knew abstract, figure and code; the derivations here are our own.
#
# ## A slow version: search for company
#
# What does an awake token see? *The $w$ nearest awake tokens to its left, the $w$ nearest to its right, and itself.* Taken
# literally that is a search: walk in both directions, pass the sleepers by, stop when $w$ are found.


# %%
def attend_by_search(q, k, v, active, window):
    """q, k (B, L, z), v (B, L, d), active (B, L) -> (B, L, d): softmax over the nearest awake tokens."""
    y = torch.zeros_like(v)
    for b, t in active.nonzero().tolist():
        seen = [t]
        for direction in (-1, 1):
            s, found = t + direction, 0
            while 0 <= s < q.shape[1] and found < window:
                if active[b, s]:
                    seen.append(s)
                    found += 1
                s += direction
        weights = torch.softmax(k[b, seen] @ q[b, t] / q.shape[-1] ** 0.5, dim=0)
        y[b, t] = weights @ v[b, seen]
    return y


# %% [markdown]
# Compare with an ordinary sliding window. Left, each token may see 3 tokens to either side. Right, each *awake* token may
# see 3 awake ones to either side; 16 of 64 are awake, in two groups with a long silence between. Every bright square is
# one pair. Look at how far from the diagonal the squares on the right come, and at how many rows are empty.

# %%
length, window = 64, 3
active = torch.zeros(1, length, dtype=torch.bool)
active[0, [2, 3, 5, 8, 9, 12, 14, 15, 44, 46, 47, 51, 53, 56, 58, 61]] = True


def who_sees_whom(active, window):
    """(1, L) -> (L, L) bool, by asking the search: a value of 1 at one place shows up wherever that place is seen."""
    flat = torch.zeros(1, active.shape[1], 1, dtype=torch.float64)
    return attend_by_search(flat, flat, torch.eye(active.shape[1], dtype=torch.float64)[None], active, window)[0] > 0


everyone = torch.ones_like(active)
fig, axes = plt.subplots(1, 2, figsize=(9, 4.4), sharey=True)
reach, pairs = {}, {}
for ax, who, name in zip(axes, (everyone, active), ("a window of tokens", "a window of awake tokens"), strict=True):
    sees = who_sees_whom(who, window)
    i, j = sees.nonzero(as_tuple=True)
    reach[name], pairs[name] = int((i - j).abs().max()), int(sees.sum())
    ax.imshow(sees)
    ax.grid(False)
    ax.set(title=name, xlabel="key (position)")
axes[0].set(ylabel="query (position)")
(by_token, by_awake), (every, few) = reach.values(), pairs.values()
show(
    fig,
    f"""Two maps of who may see whom among 64 tokens. Left, a sliding window of 3: a band along the diagonal, {every}
    pairs, none farther than {by_token} apart. Right, the window counts awake tokens: {int((~active).sum())} of the 64 rows are empty,
    {few} pairs in all, the farthest {by_awake} apart, across the silence.""",
)

# %% [markdown]
# The same window, a quarter of the pairs, and ten times the distance. How far can it reach? There is no bound: an entry
# leaves the window only when new tokens wake up, however long that takes. The price: what sleeps is never seen. (In SeqBoat
# an EMA runs beneath, over *all* tokens, so what a sleeper knew has already passed into its neighbours' states.)
#
# ## The identity: a window in the text is a window of ranks
#
# The search is needless, because every awake token can know its **rank**, its number among the awake, counted from 1:
#
# $$\text{index}_t = \text{active}_t \cdot \sum_{s\le t} \text{active}_s .$$
#
# In words: count the awake tokens up to and including $t$, and keep the count where $t$ itself is awake; 0 means asleep.
# Between the tokens of rank 4 and rank 6 there is exactly one other awake token, whatever lies between them in the text.
# So “among the $w$ nearest awake ones” is nothing but
#
# $$|\,\text{index}_t - \text{index}_s\,| \le w .$$

# %%
word = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]], dtype=torch.bool)
index = word * word.cumsum(1)
print("active:", word.int()[0].tolist())
print("index: ", index[0].tolist())

index = active * active.cumsum(1)
rank_rule = (index[0, :, None] - index[0, None, :]).abs() <= window
rank_rule &= active[0, :, None] & active[0, None, :]
print("search and rank give the same map:", torch.equal(rank_rule, who_sees_whom(active, window)))

# %% [markdown]
# Ranks have a second use: they are *addresses*. Let $M$ be the number of awake tokens of the fullest sequence in the batch.
# **Compress** writes token $t$ to row $\text{index}_t$ of a small array of $M$ rows, and **extract** reads row
# $\text{index}_t$ back to position $t$; sleepers get zeros. One undoes the other on the awake:
#
# $$\mathrm{extract}(\mathrm{compress}(x)) = \text{active} \cdot x .$$

# %%
x = torch.tensor([[10.0, 11, 12, 13, 14, 15, 16, 17], [20.0, 21, 22, 23, 24, 25, 26, 27]])[..., None]  # (2, 8, 1)
awake = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0, 0, 0]], dtype=torch.bool)
packed, index = compress(x, awake)
print("packed:   ", packed[..., 0].tolist())
print("index:    ", index.tolist())
print("extracted:", extract(packed, index)[..., 0].tolist())
for fast, slow in zip(compress(x, awake), compress_slow(x, awake), strict=True):
    print("package = its loop:", torch.equal(fast, slow))
print("extract = its loop:", torch.equal(extract(packed, index), extract_slow(packed, index)))

# %% [markdown]
# The second sequence has one awake token, so its packed rows end in zeros, and these must never be seen: they are marked as
# not `valid`. (If nobody is awake anywhere, $M$ counts as 1, and there is one row of zeros.)
#
# ## The fast version: pack, attend in a band, unpack
#
# On packed tokens the map is an ordinary band: $|i-j|\le w$. A band needs no $M\times M$ matrix. Cut the packed sequence into
# blocks of $w$; a query of block $b$ finds all it may see in blocks $b-1$, $b$ and $b+1$. So each block asks its three
# blocks with one matrix product, and a mask keeps the band. In the figure look at how much of what is computed is used.

# %%
packed_length, block = 24, 4
i, j = torch.arange(packed_length)[:, None], torch.arange(packed_length)[None]
computed = (i // block - j // block).abs() <= 1
used = (i - j).abs() <= block
fig, ax = plt.subplots(figsize=(4.9, 4.4))
ax.imshow(computed.int() + used.int(), vmin=0, vmax=2)
ax.set_xticks(torch.arange(packed_length + 1)[::block] - 0.5, range(0, packed_length + 1, block))
ax.set_yticks(torch.arange(packed_length + 1)[::block] - 0.5, range(0, packed_length + 1, block))
ax.grid(True, color="white", linewidth=1.2)
ax.set_axisbelow(False)
ax.set(xlabel="key (rank)", ylabel="query (rank)", title="window 4: computed (grey), used (bright)")
inside = bool((used & ~computed).sum() == 0)
show(
    fig,
    f"""A map of 24 by 24 packed tokens in blocks of 4. The three blocks around each query are computed, the band of ranks at
    most 4 apart is used. The band lies inside the computed blocks: {inside}. {fmt(100 * float(used.sum() / computed.sum()))}
    percent of the computed scores are used.""",
)

# %% [markdown]
# About three quarters of what is computed is used. In a long sequence the share is $(2w+1)/3w$: three quarters for this
# window, two thirds for a wide one. What lies outside the three blocks is never touched. Scores take $3w$ numbers for each
# of $M$ awake tokens: linear in $M$. The package's `memory_attention` does this, and with it the whole fast form is three
# lines. In the real unit compression comes even first: queries, keys and values are only ever *made* for tokens that are
# awake.


# %%
def attend_packed(q, k, v, active, window):
    """The same arguments and the same result as attend_by_search."""
    packed, index = compress(torch.cat([q, k, v], dim=-1), active)  # (B, M, 2 z + d)
    q, k, v = packed.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
    valid = torch.arange(packed.shape[1]) < index.amax(1, keepdim=True)  # (B, M): rows that hold a token
    return extract(memory_attention(q, k, v, window, valid=valid), index)


# %% [markdown]
# ### How far is far?
#
# A packed token has two positions: its rank, and where it stood in the text. So there are two distances, and SeqBoat has a
# bias for each, added to the scores. **Global** (Image, Pathfinder, ListOps and others in the published scripts): a learned
# number for each distance $t_j - t_i$ *in the text*. **Local** (Text and speech): a learned number for each difference of
# ranks, from $-w$ to $w$. For language models queries and keys are turned by their text positions instead: true **rotary**
# positions, as `rope` does.
#
# The published code first builds the global bias for all $L \times L$ pairs and then picks from it; at 16,384 tokens that is a
# gigabyte a layer, and the linear memory is gone. Looking up $t_j - t_i$ for the $3w$ keys of each awake token is enough.

# %%
length, window = 40, 4
h, u = draw(1, length, 8, seed=1), draw(1, length, 2, seed=2)
awake = u[..., 1] > u[..., 0]
packed, index = compress(h, awake)
positions = compress(torch.arange(length)[None, :, None], awake)[0][..., 0]  # (1, M): where they stood
table = draw(2 * length - 1, seed=3)  # a number for each distance -39 .. 39
looked_up = memory_attention(packed, packed, packed, window, bias=table, positions=positions)
distance = positions[:, None, :] - positions[:, :, None]  # (1, M, M): only for this check
scores = packed @ packed.mT / 8**0.5 + table[distance + length - 1]
rank = torch.arange(packed.shape[1])
scores = scores.masked_fill((rank[:, None] - rank).abs() > window, -torch.inf)
print(
    "bias looked up in the window = bias of the whole map:",
    below((looked_up - scores.softmax(-1) @ packed).abs().max(), 1e-12),
)
turned = [(rope(packed, positions + shift) @ rope(packed, positions + shift).mT) for shift in (0, 100)]
print("rotary scores see only the distance:", below((turned[0] - turned[1]).abs().max(), 1e-10))

# %% [markdown]
# ## They agree: values and gradients
#
# The search against the packed form, in double precision, with the gradient of a fixed random combination of the outputs
# with respect to $q$, $k$ and $v$; awkward lengths, several windows, two sequences with different numbers of tokens awake.


# %%
def values_and_gradients(form, tensors, *rest):
    """The result, then the gradients with respect to the tensors."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    y = form(*inputs, *rest)
    return [y.detach(), *torch.autograd.grad((y * draw(*y.shape, seed=9)).sum(), inputs)]


for length, window in ((1, 1), (2, 3), (37, 1), (37, 4), (64, 100)):
    tensors = [draw(2, length, width, seed=width) for width in (4, 5, 3)]
    tensors[1] = draw(2, length, 4, seed=7)
    awake = torch.rand(2, length, generator=torch.Generator().manual_seed(5)) < torch.tensor([[0.3], [0.9]])
    awake[0, 0] = True
    slow = values_and_gradients(attend_by_search, tensors, awake, window)
    fast = values_and_gradients(attend_packed, tensors, awake, window)
    worst = max((s - f).abs().max().item() for s, f in zip(slow, fast, strict=True))
    print(f"length {length:3d}, window {window:3d}: values and gradients of q, k, v {below(worst, 1e-10)}")

# %% [markdown]
# ## How a gradient reaches a discrete choice
#
# Now the puzzle. The decision is a step: nudging $u$ changes nothing, or everything. Its derivative is 0 wherever it exists.
# But the output of an awake token is $y = c\,a$, where $a$ is what its attention found, and $c$ *does* depend smoothly on $u$.
# While the token is awake, $c = p_1 = \sigma\big((u_1-u_0)/\tau\big)$. Two steps of the chain rule:
#
# $$\frac{\partial \mathcal L}{\partial c} = \left\langle \frac{\partial \mathcal L}{\partial y},\, a \right\rangle, \qquad
# \frac{\partial c}{\partial u_1} = \frac{c(1-c)}{\tau} = -\frac{\partial c}{\partial u_0},$$
#
# and together
#
# $$\frac{\partial \mathcal L}{\partial u} = \frac{c(1-c)}{\tau}\,\left\langle \frac{\partial \mathcal L}{\partial y},\, a\right\rangle
# \cdot (-1, +1).$$
#
# Read the scalar product as a question: *would more of what the attention found lower the loss?* If yes it is negative,
# and descent raises $u_1$: the token becomes more sure. If not, $u_1$ falls, and one day crosses $u_0$: the token
# falls asleep. For a sleeping token $y = 0$ whatever $c$ may be. **It gets no gradient at all**, and cannot find out whether
# attention would help by now.
#
# One layer, three tokens, the second asleep. The loss wants *twice* what the first token gives, and nothing from the others:
# so attention helps the first and harms the third. Every number first by hand, then by autograd:

# %%
torch.manual_seed(7)
unit = SparseActivation(dim=4, z_dim=2, v_dim=4, window=1).double()  # its temperature starts at 2
with torch.no_grad():
    for name, parameter in unit.named_parameters():
        if not name.startswith("router"):
            parameter.normal_()  # the small initial values would make small numbers
h = draw(1, 3, 4, seed=11)
u = torch.tensor([[[0.3, 1.1], [0.6, 0.2], [-0.4, 0.9]]], dtype=torch.float64, requires_grad=True)
y = unit(h, u)
target = torch.tensor([2.0, 0.0, 0.0])[:, None] * y.detach()
loss = 0.5 * (y - target).square().sum()
loss.backward()

tau = unit.router.log_temperature.exp().item()
by_hand = torch.zeros(3, 2, dtype=torch.float64)
for t, (u0, u1) in enumerate(u[0].tolist()):
    if u1 <= u0:
        print(f"token {t}: asleep, output {fmt(y[0, t].detach().abs().max())}, gradient (0, 0)")
        continue
    c = 1 / (1 + np.exp(-(u1 - u0) / tau))
    found = y[0, t].detach() / c  # a: what the attention found
    helps = float((y[0, t] - target[0, t]).detach() @ found)  # <dLoss/dy, a>
    pull = c * (1 - c) / tau * helps
    by_hand[t] = torch.tensor([-pull, pull])
    print(f"token {t}: c = {fmt(c)}, <dLoss/dy, a> = {fmt(helps)}, gradient ({fmt(-pull)}, {fmt(pull)})")
print("autograd says the same:", below((by_hand - u.grad[0]).abs().max(), 1e-12))

# %% [markdown]
# ### Two tokens and a change of fortune
#
# An experiment with nothing but the configurator. Two tokens, both awake, whose attention finds a fixed $a$. For the first
# $a$ is just what the loss wants, for the second the opposite; plain gradient descent moves only the logits. After
# 150 updates the roles are exchanged. Look at what each does before the dashed line, and what each does after.

# %%
configurator = LatentConfigurator(dim=1).double()  # temperature 1
u = torch.tensor([[[0.0, 0.6], [0.0, 0.6]]], dtype=torch.float64, requires_grad=True)
wants = torch.tensor([[1.0, -1.0]], dtype=torch.float64)  # how the loss likes each token's output
descent, gates, differences = torch.optim.SGD([u], lr=0.05), [], []
for update in range(450):
    if update == 150:
        wants = -wants
    active, confidence = configurator(u)
    gate = confidence * active  # a = 1: the output is the gate itself
    gates.append(gate[0].detach())
    differences.append((u[0, :, 1] - u[0, :, 0]).detach())
    descent.zero_grad()
    (-(wants * gate).sum()).backward()
    descent.step()
gates, differences = torch.stack(gates), torch.stack(differences)
asleep_at = [int((gates[:, t] == 0).nonzero()[0]) for t in (0, 1)]

fig, ax = plt.subplots(figsize=(8, 3.6))
for t, name in enumerate(("helpful at first", "harmful at first")):
    ax.plot(gates[:, t], markevery=30, label=f"token {t}: {name}")
ax.axvline(150, color="#555555", linestyle="--", linewidth=1, marker="")
ax.text(154, 0.25, "roles exchanged")
ax.set(xlabel="update", ylabel="gate", ylim=(-0.04, 1.04))
ax.legend(loc="upper right")
show(
    fig,
    f"""The gates of two tokens during 450 updates, both starting at {fmt(gates[0, 0])}. Token 0 rises to {fmt(gates[150, 0])}
    by update 150, where the roles are exchanged, then falls and is asleep from update {asleep_at[0]} on. Token 1 falls at once,
    is asleep from update {asleep_at[1]} on, and stays at {fmt(gates[-1, 1])} although it would be helpful after 150.""",
)
moved = (differences[-1, 1] - differences[asleep_at[1], 1]).abs().item()
print("while asleep, token 1's logit difference stays at", fmt(differences[-1, 1]), "and moves by exactly", fmt(moved))

# %% [markdown]
# Both sentences of the derivation are in this picture. Awake tokens follow the loss. A sleeping one is deaf: after the
# exchange its attention would help, and it never learns of it. In a network its logits still move, though for other reasons:
# they come from a *shared* projection, which the awake tokens train, and from a state that the layers below change.
#
# And if **no** token of a layer is awake? Then nothing is left to share.

# %%
torch.manual_seed(0)
layer = SparseActivation(dim=4, z_dim=2, v_dim=4, window=2).double()
h = draw(1, 9, 4).requires_grad_()
u = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 9, 2).clone().requires_grad_()  # skip, everywhere
y = layer(h, u)
gradients = torch.autograd.grad(y.sum(), [h, u, *layer.parameters()], materialize_grads=True, allow_unused=True)
print("output exactly zero:", bool((y == 0).all()))
print(
    "gradients of input, logits and all",
    len(gradients) - 2,
    "parameters exactly zero:",
    all(not g.any() for g in gradients),
)

# %% [markdown]
# A dead layer: it gives nothing and learns nothing. SeqBoat has no loss that asks for a certain rate and nothing random that
# could wake a token by chance. What remains in our hands is where the journey starts. That is the next experiment.
#
# ## Learning to stay awake
#
# A task for which almost all tokens are irrelevant: in a stream of letters, *at each capital name the capital before it; at
# everything else, say nothing*. The reader below is our unit between an embedding and a linear map, without any EMA: each
# letter's logits depend on that letter alone. Its window is 2 tokens, causal, with the local bias. It learns on texts in
# which 40 % are capitals. Then we test it on texts with ever fewer, where the capital before is far away.
#
# The loss is the squared error of the 26 scores, with zeros wanted where nothing is to be said.

# %%
ALPHABET = " .," + "abcdefghijklmnopqrstuvwxyz" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FIRST_CAPITAL = ALPHABET.index("A")


def letters(batch, length, share, generator):
    """Random text (B, L), where capitals stand (B, L), and the answer (B, L): 1 .. 26 for A .. Z, 0 for nothing."""
    capital = torch.rand(batch, length, generator=generator) < share
    lower = torch.randint(0, FIRST_CAPITAL, (batch, length), generator=generator)
    upper = torch.randint(FIRST_CAPITAL, len(ALPHABET), (batch, length), generator=generator)
    text = torch.where(capital, upper, lower)
    latest = torch.where(capital, torch.arange(length), -1).cummax(1).values  # the last capital up to here
    before = F.pad(latest, (1, 0), value=-1)[:, :-1]
    found = text.gather(1, before.clamp(min=0)) - FIRST_CAPITAL + 1
    return text, capital, torch.where(capital & (before >= 0), found, 0)


class Reader(nn.Module):
    """Letters (B, L) -> scores of the 26 capitals (B, L, 26), through attention alone."""

    def __init__(self, awake, always_active=False):
        super().__init__()
        self.embed = nn.Embedding(len(ALPHABET), 32)
        self.choose = nn.Linear(32, 2)
        self.unit = SparseActivation(
            32, 16, 32, window=2, bias="local", causal=True, temperature_scale=0.3, always_active=always_active
        )
        self.name = nn.Linear(32, 26, bias=False)
        with torch.no_grad():
            self.choose.weight.mul_(0.3)
            self.choose.bias.copy_(torch.tensor([0.0, awake]))  # a head start for "activate"

    def forward(self, text):
        h = self.embed(text)
        return self.name(self.unit(h, None if self.unit.router is None else self.choose(h)))


def is_awake(reader, text):
    """(B, L) bool."""
    if reader.unit.router is None:
        return torch.ones_like(text, dtype=torch.bool)
    with torch.no_grad():
        u = reader.choose(reader.embed(text))
    return u[..., 1] > u[..., 0]


def learn(awake, always_active=False, updates=160):
    """Train a reader; returns it and, for each update, the shares of capitals and of other letters awake."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    reader = Reader(awake, always_active).double()
    optimizer = torch.optim.Adam(reader.parameters(), lr=0.01)
    shares = []
    for _ in range(updates):
        text, capital, answer = letters(32, 64, 0.4, generator)
        wanted = F.one_hot(answer, 27)[..., 1:]  # nothing to say: 26 zeros
        loss = (reader(text) - wanted).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        up = is_awake(reader, text)
        shares.append([up[capital].double().mean().item(), up[~capital].double().mean().item()])
    return reader, torch.tensor(shares)


trained, course = learn(awake=2.0)

# %%
half, half_course = learn(awake=0.0)

# %%
restless, _ = learn(awake=2.0, always_active=True)

# %% [markdown]
# Three readers: one that starts with everybody awake, one that starts with about half of the letters awake (by the chance
# of its initial weights), and, for comparison, one whose tokens are *always* active: the same unit and the same window of 2,
# without a configurator. Left, who is awake during training, for the first two. Right, how many capitals
# each names correctly when capitals get rare.

# %%
densities = (0.3, 0.1, 0.03)


def score(reader, share):
    """Share of capitals named correctly in fresh texts of 300 letters."""
    text, _, answer = letters(64, 300, share, torch.Generator().manual_seed(1))
    with torch.no_grad():
        right = reader(text).argmax(-1) + 1 == answer
    return right[answer > 0].double().mean().item()


readers = {"starts awake": trained, "starts half asleep": half, "always active": restless}
scores = {name: [score(reader, share) for share in densities] for name, reader in readers.items()}
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for shares, name in ((course, "starts awake"), (half_course, "starts half asleep")):
    left.plot(shares[:, 0], markevery=20, label=f"{name}: capitals")
    left.plot(shares[:, 1], markevery=20, label=f"{name}: the rest")
left.set(xlabel="update", ylabel="share awake", ylim=(-0.03, 1.03), title="who is awake")
left.legend(fontsize="x-small", loc="center right")
for name, values in scores.items():
    right.plot([1 / share for share in densities], values, label=name)
right.set(
    xscale="log", ylim=(-0.03, 1.03), xlabel="mean distance to the capital before (letters)", title="capitals named"
)
right.set_xticks([1 / share for share in densities], [f"{1 / share:.0f}" for share in densities])
right.minorticks_off()
right.legend(fontsize="small", loc="center right", bbox_to_anchor=(1.0, 0.62))
facts = {
    "at the end all other letters of the first reader sleep": course[-1, 1] < 0.02,
    "and nearly all its capitals are awake": course[-1, 0] > 0.95,
    "it names nearly all capitals at a mean distance of 33 letters": scores["starts awake"][2] > 0.9,
    "the second reader ends with less than nine tenths of the capitals awake": half_course[-1, 0] < 0.9,
    "the always active one names less than a quarter at a mean distance of 33": scores["always active"][2] < 0.25,
}
show(
    fig,
    "Left: the share of tokens awake during 160 updates, for capitals and other letters, in two readers. Right: the share "
    "of capitals named correctly against the mean distance, for three readers. "
    + "; ".join(f"{fact}: {bool(holds)}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# Much can be read off here.
#
# *Nobody asked for sparsity.* There is no penalty on activity. Other letters want zeros, attention gives them anything but:
# harmful, so they fall asleep. Capitals need what attention finds: helpful, so they stay.
#
# *Sleep makes memory.* With the small letters asleep, the window of 2 holds the two last *capitals*, and then distance no longer
# matters. The always active reader has the same window and sees two letters back: at 30 % capitals that is enough for
# about half of them, at 3 % it is hopeless.
#
# *Sleep is a trap.* In the second reader some capitals were asleep before attention had learned anything. They get no
# gradient, they are never stored as keys, and so the capital *after* them is answered wrongly, which makes its attention
# look harmful and may put it to sleep as well, and so on, up to a collapse of the whole layer. Starting awake makes this rare,
# not impossible. The first reader has lost a capital too: its curve ends near 25 of 26, and its errors stand at that letter
# or at the capital right after it:

# %%
text, _, answer = letters(64, 300, 0.03, torch.Generator().manual_seed(1))
awake_letter = is_awake(trained, torch.arange(len(ALPHABET))[None])[0]  # by the letter alone
with torch.no_grad():
    wrong = (answer > 0) & (trained(text).argmax(-1) + 1 != answer)
before = (answer - 1).clamp(min=0) + FIRST_CAPITAL  # the capital that was asked for
sleepy = ~awake_letter[text] | ~awake_letter[before]
print("every error is at a sleeping capital or right after one:", bool(sleepy[wrong].all()))

# %% [markdown]
# And one more, easily missed: a token is remembered only if it is awake, and it stays awake only if attention helps *itself*.
# In our task every capital both stores and asks. A token that had something to tell but nothing to ask would
# get no reason to stay awake.
#
# ## How it grows
#
# ### With the rate
#
# What does a layer cost if a share $r$ of its tokens is awake? Projections, scores and values are all made for awake
# tokens only, so it should be a straight line in $r$. One sequence of 4,096 tokens, forward and backward, relative
# to everybody awake; the dotted line is proportionality.

# %%
torch.manual_seed(0)
length = 4096
unit = SparseActivation(dim=64, z_dim=32, v_dim=128, window=64, max_positions=length)
h = torch.randn(1, length, 64)
lottery = torch.rand(1, length)
rates = [0.02, 0.1, 0.25, 0.5, 0.75, 1.0]


def learn_once(rate):
    u = torch.stack([lottery, torch.full_like(lottery, rate)], dim=-1)  # awake where the lottery number is below rate
    unit(h.clone().requires_grad_(), u).sum().backward()


seconds = [quickest(lambda rate=rate: learn_once(rate)) for rate in rates]
memory = [peak_memory(lambda rate=rate: learn_once(rate)) for rate in rates]
fig, ax = plt.subplots()
ax.plot(rates, [s / seconds[-1] for s in seconds], label="time")
ax.plot(rates, [m / memory[-1] for m in memory], label="memory")
ax.plot([0, 1], [0, 1], color="#777777", linestyle=":", marker="", label="proportional")
ax.set(xlabel="share of tokens awake", ylabel="cost, relative to all awake")
ax.legend()
facts = {
    "at a quarter awake, time is below a half": seconds[2] < 0.5 * seconds[-1],
    "memory below two fifths": memory[2] < 0.4 * memory[-1],
    "at a tenth awake, time is below two fifths": seconds[1] < 0.4 * seconds[-1],
    "memory below a fifth": memory[1] < 0.2 * memory[-1],
}
show(
    fig,
    "Time and peak memory of one update against the share of tokens awake, relative to all awake: nearly straight lines, close "
    "to proportional. " + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items()) + ".",
)

# %% [markdown]
# Both lines are nearly straight. What is left at the far left is the part that every token costs, awake or not: reading the
# decisions, and writing zeros.
#
# ### With the length
#
# Half of the tokens awake, up to 16,384 of them, with the *global* bias, the one for which the published code builds the
# whole $L\times L$ table. With a window everything should be linear. Without one (`window=None`), time must be quadratic, but
# memory need not be: queries go in tiles of a fixed size, whose scores are made anew for the gradient.

# %%
lengths = {64: [1024, 2048, 4096, 8192, 16384], None: [1024, 2048, 4096, 8192]}
times, bytes_held = {}, {}
for window, sizes in lengths.items():
    times[window], bytes_held[window] = [], []
    for size in sizes:
        torch.manual_seed(0)
        unit = SparseActivation(dim=16, z_dim=8, v_dim=16, window=window, max_positions=size)
        h, u = torch.randn(1, size, 16), torch.zeros(1, size, 2)
        u[:, ::2, 1] = 1.0

        def forward_and_backward(unit=unit, h=h, u=u):
            unit(h, u).sum().backward()

        times[window].append(quickest(forward_and_backward))
        bytes_held[window].append(peak_memory(forward_and_backward))
time_growth = {w: growth_exponent(lengths[w][-4:], times[w][-4:]).exponent for w in lengths}
memory_growth = {w: growth_exponent(lengths[w][-4:], bytes_held[w][-4:]).exponent for w in lengths}

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
for window, name in ((64, "window 64"), (None, "all awake tokens")):
    left.plot(lengths[window], [1e3 * s for s in times[window]], label=f"{name}: ~ length^{time_growth[window]:.1f}")
    right.plot(
        lengths[window], [b / 2**20 for b in bytes_held[window]], label=f"{name}: ~ length^{memory_growth[window]:.1f}"
    )
whole_table = [4 * size**2 / 2**20 for size in lengths[64]]
right.plot(lengths[64], whole_table, linestyle=":", label="an L × L table alone")
left.set(ylabel="time (ms)")
right.set(ylabel="peak memory (MiB)")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="length (tokens)")
    ax.set_xticks(lengths[64], [f"{size // 1024}k" for size in lengths[64]])
    ax.minorticks_off()
    ax.legend(fontsize="small")
facts = {
    "window: time about linear": 0.6 < time_growth[64] < 1.4,
    "window: memory about linear": 0.8 < memory_growth[64] < 1.15,
    "all awake: time well above linear": time_growth[None] > 1.4,
    "all awake: memory at most linear": memory_growth[None] < 1.15,
    "at 16,384 the window's memory is below a tenth of an L × L table": bytes_held[64][-1]
    < 0.1 * whole_table[-1] * 2**20,
}
show(
    fig,
    "Time and peak memory of one update against the length from 1,024 to 16,384, half of the tokens awake, on logarithmic "
    "axes. " + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items()) + ".",
)

# %% [markdown]
# Look at the right: the dotted line is what the table alone would take, before any attention. Beside it the window's memory
# is small change, and the tiles make even full attention affordable in memory, though not in time.
#
# ### In a stream
#
# Causal, one token at a time, the memory is a queue: first in, first out. An awake token enters its key and value, the
# oldest of $w + 1$ falls out, then it attends to what is there. A sleeping token changes nothing and costs nothing. Each
# sequence of a batch has its own queue, so none waits for another. (The published code recomputes its history in this mode
# and says that its single-file version cannot do single steps.)

# %%
torch.manual_seed(0)
unit = SparseActivation(dim=8, z_dim=4, v_dim=8, window=8, causal=True, max_positions=600).double()
h, u = draw(2, 600, 8, seed=21), draw(2, 600, 2, seed=22)
u[0, :, 1] -= torch.where(
    (torch.arange(600) > 100) & (torch.arange(600) < 400), 5.0, 1.0
)  # a long silence in the first
with torch.no_grad():
    state, stream, ages, sizes = unit.initial_state(batch=2), [], [], set()
    for t in range(600):
        y_t, state = unit.step(h[:, t], u[:, t], state)
        stream.append(y_t)
        sizes.add(sum(part.numel() for part in state.values()))
        oldest = state["position"].gather(1, (9 - state["filled"].clamp(min=1))[:, None])[:, 0]
        ages.append(torch.where(state["filled"] > 0, t - oldest, 0))
    parallel = unit(h, u)
ages = torch.stack(ages)
print("streaming = parallel:", below((torch.stack(stream, dim=1) - parallel).abs().max(), 1e-12))
print("numbers held, at every one of 600 steps:", sorted(sizes))

# %% [markdown]
# How far back does the memory reach at each moment? The figure shows the age of the oldest key in the queue, for a
# sequence with a long silence and for one without, and for a sliding window of as many tokens. Look at the slope during the
# silence.

# %%
fig, ax = plt.subplots(figsize=(8, 3.6))
ax.plot(ages[:, 0], markevery=60, label="silent from 100 to 400")
ax.plot(ages[:, 1], markevery=60, label="about half awake throughout")
ax.plot(torch.arange(600).clamp(max=8), markevery=60, label="sliding window of 8 tokens")
ax.set(xlabel="time (tokens)", ylabel="age of the oldest key (tokens)")
ax.legend(fontsize="small")
show(
    fig,
    f"""The age of the oldest key in a queue of 9 against time. In the sequence that is silent between 100 and 400 it grows by
    one each step up to {int(ages[:, 0].max())} tokens; in the one half awake it never exceeds {int(ages[:, 1].max())}; in a
    sliding window of tokens it is always 8.""",
)

# %% [markdown]
# During the silence the memory simply waits: no decay as in an EMA, no border as with chunks. One old key leaves with
# each token that wakes up; the last of them is gone after nine. This is what the authors' claim of a theoretically
# infinite attention span rests on: a constant number of slots, and no bound on how long they are held.

# %% [markdown]
# ## Why this is fast
#
# Count what the unit does for one awake token, forward. With widths $D$ of the layer, $z$ of queries and keys, $v$ of the
# values, in operations:
#
# $$\underbrace{2D(z+2v) + 2vD}_{\text{projections}} \;+\; \underbrace{2\,(2w+1)(z+v)}_{\text{scores and values in the band}}$$
#
# and besides one exponential for each of the $2w+1$ scores and each of the $z+2v$ numbers that pass a SiLU. A token asleep
# costs none of this, only bytes: its logits are read, its zeros are written. So the bill for a whole sequence is
# $r L$ times these numbers, plus $4D\,(1+r)+8$ bytes for each token. $L$ stands there once, and never squared.
#
# Every factor of that bill can be lost by a careless line. Here are two ways to lose one. The first computes everything for
# everybody, and hides afterwards what nobody should see: the shortest code, and the mask does make it right. The second packs,
# as we do, but takes the global bias as the published code does, from a table of all $L\times L$ pairs.


# %%
from longseq_tutorial.mechanisms.ema import ema_kernel
from longseq_tutorial.mechanisms.fft import long_convolution
from longseq_tutorial.models.configs import SeqBoatConfig
from longseq_tutorial.models.seqboat import SeqBoatLayer

NOWHERE = -(10**6)  # the rank of rows that hold no token: far from everything


def project(unit, h):
    """Queries, keys, values and the reset gate, as in the unit."""
    z, reset, v = F.silu(unit.mx_proj(h)).split([unit.z_dim, unit.v_dim, unit.v_dim], dim=-1)
    return z * unit.kappa[0] + unit.mu[0], z * unit.kappa[1] + unit.mu[1], v, reset


def square_of_biases(unit, length):
    """(L, L): the bias of every pair of positions."""
    t = torch.arange(length)
    return unit.table[t - t[:, None] + len(unit.table) // 2]


def all_pairs(unit, h, u):
    """Everybody attends to everybody; a mask hides the sleepers, and what lies outside the window of ranks."""
    active, confidence = unit.router(u)
    q, k, v, reset = project(unit, h)
    rank = active.cumsum(1)
    hidden = ~active[:, None] | ((rank[:, :, None] - rank[:, None]).abs() > unit.window)  # (B, L, L)
    scores = q @ k.mT / unit.z_dim**0.5 + square_of_biases(unit, h.shape[1])
    found = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1) @ v
    return (confidence * active)[..., None] * unit.h_proj(found * reset)


def packed_but_square(unit, h, u):
    """Only the awake, in blocks, but with a bias picked from an L by L table."""
    active, confidence = unit.router(u)
    packed, index = compress(h, active)
    w, rows, time = unit.window, packed.shape[1], torch.arange(h.shape[1])[None, :, None]
    time, _ = compress(time.expand(*index.shape, 1), active)  # (B, M, 1): where they stood
    rank = torch.arange(rows)[None, :, None]
    rank = torch.where(rank < index.amax(1)[:, None, None], rank, NOWHERE)  # (B, M, 1)

    def blocks(x, around, fill=0):  # (B, M, d) -> (B, N, w or 3 w, d)
        return F.pad(x, (0, 0, around, around - rows % -w), value=fill).unfold(1, w + 2 * around, w).mT

    q, k, v, reset = project(unit, packed)
    bias = square_of_biases(unit, h.shape[1])[blocks(time, 0), blocks(time, w).mT]  # (B, N, w, 3 w)
    apart = blocks(rank, 0, NOWHERE) - blocks(rank, w, NOWHERE).mT
    scores = blocks(q, 0) @ blocks(k, w).mT / unit.z_dim**0.5 + bias
    found = scores.masked_fill(apart.abs() > w, -torch.inf).softmax(-1) @ blocks(v, w)
    y = unit.h_proj(found.flatten(1, 2)[:, :rows] * reset)
    return confidence[..., None] * extract(y, index)


torch.manual_seed(0)
small = SparseActivation(dim=6, z_dim=4, v_dim=8, window=5, max_positions=101).double()
inputs = [draw(2, 101, 6, seed=51), draw(2, 101, 2, seed=52)]
fast = values_and_gradients(lambda h, u: small(h, u), inputs)
for name, form in {"all pairs, masked": all_pairs, "packed, L by L bias": packed_but_square}.items():
    slow = values_and_gradients(lambda h, u, form=form: form(small, h, u), inputs)
    worst = max((s - f).abs().max() for s, f in zip(slow, fast, strict=True))
    print(f"{name}: output and gradients equal the package's, error", below(worst, 1e-12))

# %% [markdown]
# All three compute the same thing. Now the clock, one thread, every second token awake, windows of 128. The **floor** beneath is our
# bill at the prices of this very machine: the rate of a large matrix product for the operations, the rate of `exp` on
# numbers that stay in the cache, and the rate of a large copy for the bytes. Look at which lines climb with the
# length, and at the distance of the package's from the floor.

# %%
torch.manual_seed(0)
config = SeqBoatConfig(dim=64, z_dim=32, v_dim=128, n=16, window=128, max_positions=16384)
boat = SeqBoatLayer(config)
unit = boat.attention
square, large, little = torch.randn(1024, 1024), torch.randn(2**23), torch.rand(2**16)
cached = torch.empty_like(little)
operations_a_second = 2 * 1024**3 / quickest(lambda: square @ square)
bytes_a_second = 2 * 4 * large.numel() / quickest(lambda: large.clone())
exps_a_second = little.numel() / quickest(lambda: torch.exp(little, out=cached))

D, z, v, w = config.dim, config.z_dim, config.v_dim, config.window
operations = 2 * D * (z + 2 * v) + 2 * v * D + 2 * (2 * w + 1) * (z + v)
exps = 2 * w + 1 + z + 2 * v
floor_of_one = 0.5 * (operations / operations_a_second + exps / exps_a_second) + (4 * D * 1.5 + 8) / bytes_a_second

sizes = [1024, 2048, 4096, 8192, 16384]
ways = {"all pairs, masked": all_pairs, "packed, L × L bias": packed_but_square, "the package": lambda f, h, u: f(h, u)}
seconds = {name: [] for name in ways}
with torch.no_grad():
    for size in sizes:
        h, u = torch.randn(1, size, D), torch.zeros(1, size, 2)
        u[:, ::2, 1] = 1.0  # every second token is awake
        for name, way in ways.items():
            if name == "the package" or size <= 4096:
                seconds[name].append(quickest(lambda way=way, h=h, u=u: way(unit, h, u)))

fig, ax = plt.subplots()
for name, times in seconds.items():
    ax.plot(sizes[: len(times)], [1e6 * t / n for t, n in zip(times, sizes, strict=False)], label=name)
ax.plot(sizes, [1e6 * floor_of_one] * len(sizes), "k:", marker="", label="floor")
ax.set(xscale="log", yscale="log", xlabel="length (tokens)", ylabel="microseconds for each token")
ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
ax.set_yticks([1, 10, 100], ["1", "10", "100"])
ax.minorticks_off()
ax.legend()
masked, with_square, ours = (seconds[name] for name in ways)
facts = {
    "at 4,096 tokens the package is at least 4 times faster than all pairs": masked[2] > 4 * ours[2],
    "and at least twice as fast as with the L by L bias": with_square[2] > 2 * ours[2],
    "its time for each token does not rise from 4,096 to 16,384 by more than half": ours[4] / 4 < 1.5 * ours[2],
    "and is within 15 times of the floor": ours[4] < 15 * floor_of_one * sizes[4],
}
show(
    fig,
    "Time for each token against the length, half of the tokens awake: all pairs masked and packed with an L by L bias, up to "
    "4,096 tokens; the package's form, up to 16,384; and the floor below, a level line. "
    + "; ".join(f"{fact}: {bool(holds)}" for fact, holds in facts.items())
    + ".",
)
# %% [markdown]
# The upper lines climb: whatever is made for all pairs costs $L$ a token. The package's line stays level. **Which step
# brought most?** And what lies between the package and the floor? The floor counts each score once. In fact the scores
# go through memory several times: adding the bias, hiding, softmax and hiding again each read and write all $3w$ of them. The cell
# compares the steps, and times these passes alone, on as many numbers.

# %%
packing, looking_up = masked[2] / with_square[2], with_square[2] / ours[2]
print("at 4,096 tokens, packing makes the unit faster:", packing > 1.2)
print("then, looking up the bias of the window only makes it faster by a larger factor:", looking_up > packing)
print("of the L by L table the window reads", fmt(100 * 2048 * 3 * w / 4096**2), "percent")
held = []
with torch.no_grad():
    h, u = torch.randn(1, 4096, D), torch.zeros(1, 4096, 2)
    u[:, ::2, 1] = 1.0
    for way in ways.values():
        held.append(peak_memory(lambda way=way: way(unit, h, u)))
print("memory is at most a fifth of that of either other form:", 5 * held[2] < min(held[:2]))

band, far_off = torch.randn(16, w, 3 * w), torch.rand(16, w, 3 * w) < 1 / 3  # 2,048 tokens awake: 16 blocks


def passes():
    """What happens to the scores between the two products."""
    scores = (band + band).masked_fill(far_off, torch.finfo(band.dtype).min)
    return scores.softmax(-1).masked_fill(far_off, 0.0)


on_scores = quickest(passes)
print("the passes over the scores take more time than the whole floor:", on_scores > floor_of_one * 4096)
print("and more than a tenth of the unit's time:", on_scores > 0.1 * ours[2])

# %% [markdown]
# So the step that gives the mechanism its name is not the one that brought most here. With half of the tokens asleep
# packing spares at most three quarters of the pairs. The look-up spares all pairs that no window holds: of $L^2$ only $3wrL$ are
# left, fewer than one in twenty at this length, and ever fewer as the sequence grows. The rarer the awake, the more packing
# brings in its turn.
#
# The distance to the floor is honest, too: attention in windows is products of modest size with many passes between
# them, and in plain PyTorch each pass is a trip of its own. A kernel that keeps the scores of a block at hand from the first product to
# the second, as fused attention does, would save those trips.
#
# ### And the average beneath
#
# The unit is one part of a SeqBoat layer; beneath it an EMA runs over *all* tokens, awake or not, in both directions. Packing
# saves nothing there. The published code makes its kernel by raising each of the $2Dn$ decays to each of $L$ powers, and convolves by
# FFT. Chapter 01 has two better ways: the powers as a product of two short tables, then the FFT; or no long kernel at all,
# blocks of a few dozen steps and a state between them, as `DampedEMA` does it. Here is the whole layer, forward and
# backward, with each of the three. Look at how much of each bar the EMA takes.


# %%
def every_power(alpha, delta, beta, eta, length):
    """The EMA's kernel, (2 D, length), with an exponential for each decay and each power."""
    decay = (1 - alpha * delta).log()[..., None] * torch.arange(length)
    return ((eta * alpha * beta)[..., None] * decay.exp()).sum(1)


def by_fft(x, kernel):
    """The EMA of both directions as a convolution."""
    ahead, back = kernel(*boat.ema.coefficients(), x.shape[1]).split(D)
    return long_convolution(x, ahead, reverse_kernel=back) + boat.ema.omega * x


x, pull = draw(1, 4096, D, seed=61).float(), draw(1, 4096, D, seed=62).float()
with torch.no_grad():
    u = boat.hx_proj(F.silu(boat.ema(x)))[..., :2]
    boat.hx_proj.bias[0] = (u[..., 1] - u[..., 0]).median()  # half of the tokens awake
    target = boat.ema(x)
    for name, kernel in {"every power": every_power, "two tables": ema_kernel}.items():
        print(f"FFT, {name}: the same as in blocks, error", below((by_fft(x, kernel) - target).abs().max(), 1e-3))

averages = {
    "every power,\nthen FFT": lambda: by_fft(x, every_power),
    "two tables,\nthen FFT": lambda: by_fft(x, ema_kernel),
    "in blocks\n(the package)": lambda: boat.ema(x),
}
taken = {name: quickest(lambda form=form: form().backward(pull)) for name, form in averages.items()}
whole = quickest(lambda: boat(x).backward(pull))
rest = whole - taken["in blocks\n(the package)"]
shares = [t / (t + rest) for t in taken.values()]

fig, ax = plt.subplots(figsize=(8, 3.2))
ax.barh(list(taken), [1e3 * t for t in taken.values()], color=OKABE_ITO["blue"], label="EMA")
ax.barh(
    list(taken), [1e3 * rest] * 3, left=[1e3 * t for t in taken.values()], color=OKABE_ITO["orange"], label="all else"
)
ax.invert_yaxis()
ax.set(xlabel="milliseconds, forward and backward")
ax.grid(False, axis="y")
ax.legend()
facts = {
    "with every power the EMA takes more than three fifths of the layer": shares[0] > 0.6,
    "in blocks less than half": shares[2] < 0.5,
    "and the whole layer is at least twice as fast": taken["every power,\nthen FFT"] + rest > 2 * whole,
}
show(
    fig,
    "Bars of the time of one SeqBoat layer, forward and backward, 4,096 tokens, half of them awake, split into its EMA and all "
    "else, for three ways to compute the EMA. "
    + "; ".join(f"{fact}: {bool(holds)}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# With every power the layer is an EMA with some attention on top, and making that attention sparse could hardly be
# noticed. Two tables remove nearly all of that; the blocks halve what is left, and keep a state for streams besides. With
# either the EMA is the smaller part, and only then does a smaller rate make the *layer* faster: first cut what all tokens
# pay, then what some are spared.
#
# ## Two cautionary tales
#
# Both were found by running the published code; the numbers are in the repository, and our code behaves differently, on
# purpose.
#
# ### The company you keep
#
# The published code takes a shortcut. If *any* sequence in the batch is active throughout, $M = L$ and nothing would be saved,
# so it skips compression, for the whole batch. Harmless for the full sequence. But for every *other* one the window now
# counts text positions instead of ranks: the sleepers between count, though they are hidden. What a sequence gets
# depends on who else is in the batch.
#
# The recording: a layer with window 2 (norm, EMA, SiLU, then logits and a linear part $hx$ from one projection, our unit, sum, SiLU),
# one sequence that is partly active, computed alone and beside one that is fully active. We build that layer around our
# unit, and imitate the shortcut with an always active twin that gets the decision as its mask.

# %%
golden = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"


def authors(name):
    """The arrays of one file of the authors' numbers, as tensors."""
    with np.load(golden / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}


numbers = authors("seqboat_quirk_batch_dependence")
p = {key.removeprefix("param."): value for key, value in numbers.items() if key.startswith("param.")}
ema = DampedEMA(8, n=4, bidirectional=True).double()
units = [SparseActivation(8, 6, 12, window=2, max_positions=24, always_active=yes).double() for yes in (False, True)]
with torch.no_grad():
    for ours, theirs in (
        ("alpha_logit", "delta"),
        ("delta_logit", "alpha"),
        ("beta", "beta"),
        ("eta", "gamma"),
        ("omega", "omega"),
    ):
        getattr(ema, ours).copy_(p[f"move.{theirs}"].reshape(getattr(ema, ours).shape))
    for unit in units:
        for ours, theirs in ((unit.kappa, "gamma"), (unit.mu, "beta"), (unit.table, "rel_pos_bias.rel_pos_bias")):
            ours.copy_(p[theirs])
        for name in ("mx_proj.weight", "mx_proj.bias", "h_proj.weight", "h_proj.bias"):
            unit.get_parameter(name).copy_(p[name])
    units[0].router.log_temperature.copy_(p["q_router.temp"])


def seqboat_layer(x, shortcut=False):
    """x (B, L, 8) -> (B, L, 8), and the decisions (B, L)."""
    h = F.silu(ema(F.layer_norm(x, (8,), p["norm.norm.weight"], p["norm.norm.bias"])))
    u, hx = F.linear(h, p["hx_proj.weight"], p["hx_proj.bias"]).split([2, 8], dim=-1)
    active, confidence = units[0].router(u)
    if shortcut and active.all(1).any():
        found = units[1](h, mask=active) * (confidence * active)[..., None]  # a window in the text, sleepers hidden
    else:
        found = units[0](h, u)
    return F.silu(hx + found + x), active


mixed, full = numbers["x_mixed"].transpose(0, 1), numbers["x_full"].transpose(0, 1)
both = torch.cat([mixed, full])
theirs_alone, theirs_together = numbers["out_mixed_alone"][:, 0], numbers["out_mixed_with_full"][:, 0]
with torch.no_grad():
    ours_alone, active = seqboat_layer(mixed)
    ours_together = seqboat_layer(both)[0]
    imitated = seqboat_layer(both, shortcut=True)[0]
print("theirs: alone and in company differ by up to", fmt((theirs_alone - theirs_together).abs().max()))
print("ours:   alone and in company differ by", below((ours_alone[0] - ours_together[0]).abs().max(), 1e-12))
print("ours, in any company = theirs alone:", below((ours_together[0] - theirs_alone).abs().max(), 1e-9))
print("with the shortcut imitated = theirs in company:", below((imitated[0] - theirs_together).abs().max(), 1e-9))

# %% [markdown]
# Where do the two results differ? Where the window of 2 in the text contains fewer awake tokens than the window of 2 among
# the awake.

# %%
change = (theirs_alone - theirs_together).abs().amax(-1)
fig, ax = plt.subplots(figsize=(8, 3.2))
for who, colour, name in ((active[0], "vermilion", "awake"), (~active[0], "sky", "asleep")):
    at = who.nonzero()[:, 0]
    ax.bar(at, change[at], color=OKABE_ITO[colour], label=name)
    ax.plot(at, torch.full_like(at, -0.004, dtype=torch.float64), linestyle="", marker="s", color=OKABE_ITO[colour])
ax.set(xlabel="position", ylabel="largest change", title="the same sequence, alone and beside a fully active one")
ax.set_xticks(range(10))
ax.legend()
show(
    fig,
    f"""By how much the published code's output changes, at each of 10 positions, when another sequence joins the batch.
    {int(active.sum())} tokens are awake, and {int((change > 1e-6).sum())} of them change, by up to {fmt(change.max())}; sleeping tokens
    change by {fmt(change[~active[0]].max())}.""",
)

# %% [markdown]
# Nothing crashes, no test with a batch of one ever sees it, and at evaluation the accuracy can depend on how sequences were
# batched. The lesson goes beyond this code: *test that a result does not depend on its company.* It is one line, and in our
# tests it is a property of every mechanism.
#
# ### A zero that is not nothing
#
# Chapter 03 warned of it: $\mathrm{laplace}(0) \ne 0$. In its windows the published code sets hidden scores to 0 *before* the
# function. For relu² that is fine, $\mathrm{relu}^2(0) = 0$. With laplace every hidden key in the three blocks gets a
# little weight: those outside the band, rows that hold no token, and even what lies beyond the ends of the sequence, where
# keys and values are filled with $-1$. If that is right, then *our output plus that leak* must be theirs, to the last digit:

# %%
numbers = authors("seqboat_local_attention")
q, k, v = (numbers[name][:, 0] for name in "qkv")  # (2, 11, ·)
keep, w = numbers["keep_mask"][:, 0], int(numbers["window"])
theirs = numbers["out_laplace_bi_nobias"][:, 0]
ours = memory_attention(2 * w * q, k, v, w, function=laplace, valid=keep)  # their queries come divided by 2 w
each = laplace(torch.zeros((), dtype=torch.float64))  # the weight of a hidden key
blocks = -(-11 // w)
values = torch.full((2, (blocks + 2) * w, 5), -1.0, dtype=torch.float64)  # a block of -1 before and after
values[:, w:-w] = 0  # zeros fill the last block
values[:, w : w + 11] = v
leaked = torch.zeros_like(ours)
for i in range(11):
    for j in range((i // w - 1) * w, (i // w + 2) * w):  # all keys that the three blocks hold
        seen = (keep[:, j] if 0 <= j < 11 else torch.zeros(2, dtype=torch.bool)) & (abs(i - j) <= w)
        leaked[:, i] += each * torch.where(seen[:, None], 0.0, values[:, j + w])
print("weight of each hidden key:", fmt(each))
print("ours and theirs differ by up to", fmt((ours - theirs)[keep].abs().max()))
print("ours plus the leak = theirs:", below((ours + leaked - theirs)[keep].abs().max(), 1e-9))

# %% [markdown]
# (The published scripts use softmax and relu² only, so their results are not touched.) Mask *after* the function, then a
# hidden key weighs exactly nothing, whatever the function.
#
# ## The panel: who wakes up, and who reads whom
#
# The trained reader on a sentence it has never seen. Above, each letter's wish to be awake; below, arcs from the awake to
# those they read. The blue diamond is the query; put it on another letter. Things to try:
#
# 1. Lower what is added to the skip logit, step by step. Who wakes first? When does the longest arc break, and why?
# 2. Change the temperature. What moves, what does not?
# 3. Widen the window. More arcs appear; does the query still read most from the same letter?

# %%
sentence = (
    "We left Lisbon before dawn, slept past Tangier and Oran, woke in sight of Malta, and ten days later saw Crete."
)
text = torch.tensor([[ALPHABET.index(letter) for letter in sentence]])
panel = WhoWakes(trained, text, labels=list(sentence))
panel

# %%
print(panel.set(query=sentence.index("T"), window=1).say())
print(panel.set(query=sentence.index("o")).say())
with torch.no_grad():
    answers = trained(text)[0].argmax(-1)
capitals = [t for t, letter in enumerate(sentence) if letter.isupper()]
print({sentence[t]: ALPHABET[FIRST_CAPITAL + int(answers[t])] for t in capitals[1:]})

# %% [markdown]
# The last line is what the reader answers at each capital after the first. The panel takes any `SparseActivation` with its
# inputs, or any model that holds some, with the model's input. Here is the always active twin: the same window, and no arc
# longer than it.

# %%
busy = WhoWakes(restless, text, labels=list(sentence))
busy

# %%
print(busy.set(query=sentence.index("C")).say())
own = WhoWakes(layer, draw(1, 30, 4, seed=31), draw(1, 30, 2, seed=32))
print(own.set(temperature=0.1).say())

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. *Run all* never stops here. The rest of the chapter
# uses the package's functions, whatever you write.
#
# ### Exercise 1 · The gate
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Write `gate(logits, log_temperature)`: `logits (B, L, 2)` for skip and activate, `log_temperature (1,)`. Return `active`
# `(B, L)` bool (a tie sleeps) and the gate `(B, L)`: the confidence where active, 0 elsewhere.
#
# <details><summary>Hint 1</summary>
#
# The temperature is `log_temperature.exp()`; the softmax runs over the last axis.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `a * b` of a float and a bool tensor keeps the numbers where b is True.
#
# </details>


# %%
def gate(logits, log_temperature):
    """logits (B, L, 2), log_temperature (1,) -> active (B, L) bool, gate (B, L)."""
    # BEGIN SOLUTION "your turn: a tempered softmax, the strict comparison, the larger probability where active"
    p = torch.softmax(logits / log_temperature.exp(), dim=-1)
    active = p[..., 1] > p[..., 0]
    return active, p.amax(-1) * active
    # END SOLUTION


# %%
check_gate(gate)

# %% [markdown]
# ### Exercise 2 · Extract
#
# Difficulty: ●○○ · Importance: ●●○ · 10 minutes
#
# Write `my_extract(y, index)`: `y (B, M, d)` are packed rows, `index (B, L)` holds ranks 1 … M, and 0 for sleepers. Return
# `(B, L, d)`: to each position its row, to sleepers zeros. No loop over positions.
#
# <details><summary>Hint 1</summary>
#
# Rank 0 should read a row of zeros. Put one *before* the others, and ranks become row numbers.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `rows.gather(1, where)` wants `where` in the shape of the result: `index[..., None].expand(-1, -1, d)`.
#
# </details>


# %%
def my_extract(y, index):
    """y (B, M, d), index (B, L) -> (B, L, d)."""
    # BEGIN SOLUTION "your turn: a row of zeros in front, then gather by rank"
    rows = F.pad(y, (0, 0, 1, 0))  # (B, 1 + M, d): row 0 is zero
    return rows.gather(1, index[..., None].expand(-1, -1, y.shape[2]))
    # END SOLUTION


# %%
check_extract(my_extract)

# %% [markdown]
# ### Exercise 3 · Compress
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `my_compress(x, active)`: `x (B, L, D)`, `active (B, L)` bool. Return `packed (B, M, D)`, the awake tokens in order
# and zeros after them, where M is the largest count in the batch but at least 1; and `index (B, L)`, the ranks. No loop.
#
# <details><summary>Hint 1</summary>
#
# Ranks: a running count along the sequence, times `active`. M is their maximum.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Scatter into M + 1 rows, so that all sleepers land in row 0, a waste bin, and drop that row.
#
# </details>


# %%
def my_compress(x, active):
    """x (B, L, D), active (B, L) bool -> packed (B, M, D), index (B, L)."""
    # BEGIN SOLUTION "your turn: ranks, then scatter each token to its rank"
    index = active.cumsum(1) * active
    longest = max(1, int(index.max()))
    rows = x.new_zeros(x.shape[0], longest + 1, x.shape[2])
    rows = rows.scatter(1, index[..., None].expand_as(x), x)  # all sleepers write to row 0
    return rows[:, 1:], index
    # END SOLUTION


# %%
check_compress(my_compress)

# %% [markdown] tags=["solution-only"]
# This is how the published code does it. It moves every token, the sleepers to the waste bin. The package picks the awake ones
# first (`nonzero`, `index_select`, `index_copy`), so that its cost, too, falls with the rate.

# %% [markdown]
# ### Exercise 4 · The gradient of the choice
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `choice_gradient(logits, log_temperature, attended, upstream)` without autograd: `attended (B, L, D)` is what attention
# found, before the confidence; `upstream (B, L, D)` is $\partial\mathcal L/\partial y$. Return $\partial\mathcal L/\partial u$,
# `(B, L, 2)`.
#
# <details><summary>Hint 1</summary>
#
# The formula stands in “How a gradient reaches a discrete choice”. The scalar product is over the channels.
#
# </details>
# <details><summary>Hint 2</summary>
#
# What do sleeping tokens get? `torch.stack([-pull, pull], dim=-1)` makes the last axis.
#
# </details>


# %%
def choice_gradient(logits, log_temperature, attended, upstream):
    """logits (B, L, 2), log_temperature (1,), attended and upstream (B, L, D) -> (B, L, 2)."""
    # BEGIN SOLUTION "your turn: c (1 - c) / tau times the scalar product, for the awake, with two signs"
    tau = log_temperature.exp()
    p = torch.softmax(logits / tau, dim=-1)
    slope = p[..., 0] * p[..., 1] / tau * (p[..., 1] > p[..., 0])  # c (1 - c) / tau, 0 for sleepers
    pull = slope * (upstream * attended).sum(-1)  # (B, L)
    return torch.stack([-pull, pull], dim=-1)
    # END SOLUTION


# %%
check_choice_gradient(choice_gradient)

# %% [markdown]
# ### Exercise 5 · The memory of a stream
#
# Difficulty: ●●● · Importance: ●●○ · 20 minutes
#
# Write one update of the queue, `remember(keys, filled, new, active)`: `keys (B, S, z)` holds the last S awake keys of each
# sequence, the newest last; `filled (B,)` says how many of the slots are in use; `new (B, z)` is this step's key,
# `active (B,)` who is awake. Return the new `keys` and `filled`. Sequences that sleep keep everything as it is. No loop, and
# don't change the given tensors.
#
# <details><summary>Hint 1</summary>
#
# First for one sequence: drop the first key, append the new one. `torch.cat([keys[:, 1:], new[:, None]], dim=1)` does it for
# all.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.where(active[:, None, None], moved, keys)` chooses sequence by sequence. And a full queue stays at S.
#
# </details>


# %%
def remember(keys, filled, new, active):
    """keys (B, S, z), filled (B,), new (B, z), active (B,) bool -> keys, filled."""
    # BEGIN SOLUTION "your turn: shift and append for the awake, nothing for the others, count up to S"
    moved = torch.cat([keys[:, 1:], new[:, None]], dim=1)
    return torch.where(active[:, None, None], moved, keys), (filled + active).clamp(max=keys.shape[1])
    # END SOLUTION


# %%
check_remember(remember)

# %% [markdown]
# ## Check against the package, and against the authors' numbers
#
# What this chapter built by hand, against the package; then the parts of the published layer, computed by the authors' own
# code in double precision and stored in the repository: the configurator at two initial temperatures, with and without a bias
# on the decision, with its gradients; compress and extract; attention in the window for softmax and relu², both
# directions; two kinds of position: the table of distances, in which offsets beyond its ends take the end's number ("ends
# shared"), and the rotary turn. (Their sine table is in single precision, so there we ask for less.)

# %%
tensors = [draw(2, 50, 4, seed=seed) for seed in (41, 42, 43)]
awake = draw(2, 50, seed=44) > 0
packed, index = compress(torch.cat(tensors, dim=-1), awake)
valid = torch.arange(packed.shape[1]) < index.amax(1, keepdim=True)
looped = extract(memory_attention_slow(*packed.split(4, dim=-1), 5, valid=valid), index)
print("our search = the package's loop:", below((attend_by_search(*tensors, awake, 5) - looped).abs().max(), 1e-12))


def error(ours, theirs):
    """The largest difference from an array of the authors'."""
    return (ours.detach() - theirs.reshape(ours.shape)).abs().max().item()


errors = {}
for scale in (0.3, 1.0):
    numbers = authors(f"seqboat_latent_configurator_s{scale}")
    for act_bias, end in ((0.0, ""), (0.7, "_actbias0.7")):
        configurator = LatentConfigurator(16, scale, act_bias).double()
        with torch.no_grad():
            configurator.log_temperature.copy_(numbers["temp_param"])
        u = numbers["u"][:, 0].clone().requires_grad_()
        active, confidence = configurator(u)
        (confidence * active * numbers["cotangent"][:, 0, :, 0]).sum().backward()
        errors[f"configurator s={scale}{end}"] = max(
            error(confidence, numbers[f"confidence{end}"]),
            error(active.double(), numbers[f"mask{end}"].double()),
            error(u.grad, numbers[f"grad_u{end}"]),
            error(configurator.log_temperature.grad, numbers[f"grad_temp{end}"]),
        )

numbers = authors("seqboat_compress_extract")
x = numbers["x"][:, 0].clone().requires_grad_()
packed, index = compress(x, numbers["mask"][:, 0, :, 0])
back = extract(packed, index)
(back * numbers["cotangent"][:, 0]).sum().backward()
errors["compress and extract"] = max(
    error(packed, numbers["compressed"]), error(back, numbers["extracted"]), error(x.grad, numbers["grad_x"])
)

numbers = authors("seqboat_local_attention")
q, k, v = (numbers[name][:, 0] for name in "qkv")
keep, w = numbers["keep_mask"][:, 0], int(numbers["window"])
for name, function in (("softmax", None), ("relu2", relu2)):
    for way in ("bi", "causal"):
        scale = q.shape[-1] ** 0.5 if function is None else w if way == "causal" else 2 * w  # theirs come scaled
        ours = memory_attention(scale * q, k, v, w, function=function, valid=keep, causal=way == "causal")
        errors[f"window, {name}, {way}"] = error(ours[keep], numbers[f"out_{name}_{way}_nobias"][:, 0][keep])

numbers = authors("seqboat_positions")
still = torch.zeros(1, 9, 2, dtype=torch.float64)  # no scores: with the identity as function the weights are the bias
bias = memory_attention(
    still, still, torch.eye(9)[None].double(), None, function=lambda s: s, bias=numbers["fast_param"]
)
errors["bias, ends shared"] = error(bias, numbers["fast_bias_len9"])
for what, size in errors.items():
    print(f"  {what:32} {below(size, 1e-9)}")
turned = rope(numbers["rotary_x"][0], torch.arange(12)[None])
print(f"  {'rotary positions':32} {below(error(turned, numbers['rotary_y']), 1e-6)}")

# %% [markdown]
# ## What to remember
#
# - A **latent configurator** decides token by token: $p = \mathrm{softmax}(u/\tau)$, awake if $p_1 > p_0$, and the confidence
#   $c = \max p$ scales the result. Deterministic; $\tau$ sets how firm, never who. (SeqBoat, abstract and architecture figure.)
# - **Ranks are addresses**: $\text{index} = \text{active}\cdot\mathrm{cumsum}(\text{active})$. Compress, attend in a band of $w$
#   ranks, extract. Cost $r L w$ with rate $r$; no $L\times L$ tensor, also with the global bias.
# - **The window counts awake tokens**, so a constant memory may span any distance. What sleeps is never seen.
# - **The gradient of the choice** flows through $c$ alone: $\frac{c(1-c)}{\tau}\langle \partial\mathcal L/\partial y, a\rangle(-1,+1)$.
#   Helpful: wake; harmful: sleep. Sleepers get none, a dead layer stays dead: start awake, and watch the rates.
# - **Stream** with a queue of $w+1$ keys and values for each sequence: constant size, equal to the parallel form.
# - **Test for company and for zeros**: a result must not depend on the rest of the batch, and a mask belongs *after* the
#   function.
#
# Next, chapter 06: attention in linear time that is exact, if keys come from a codebook.
