# %% [markdown]
# # 09 · The models: eight mechanisms, six systems
#
# ## The question, and what you will be able to do
#
# You have built eight mechanisms, each by itself: two memories (EMA, S4), attention made narrow, sparse, coarse or linear
# (chunks, activation, codes, feature maps), gates, and a bias without a matrix. The published systems are sentences made
# of these words. **What do they have in common, and what exactly makes them different?**
#
# After this chapter you will be able to
#
# - draw each of the systems from memory, in five boxes or six;
# - build any of them with one call, train it, stream it, and look inside;
# - say what a token costs in each, in parameters, operations and bytes, counted and measured;
# - say how far a token hears, by measuring it with gradients;
# - say what a system has to carry from one step to the next.

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from torch.utils.flop_counter import FlopCounterMode

from longseq_tutorial.classroom import below, fmt, peak_memory, show, use_style
from longseq_tutorial.classroom.checks.models import check_mega_layer_parameters, check_products_a_token
from longseq_tutorial.classroom.diagrams import draw_diagram, legend_of_kinds, system_diagrams
from longseq_tutorial.classroom.panels_systems import MORE_OPERATIONS, Systems, count_parts
from longseq_tutorial.models import NAMES, auxiliary_loss, build, build_encoder
from longseq_tutorial.models.configs import SpadeConfig
from longseq_tutorial.models.spade import spade_layers
from longseq_tutorial.tasks import TaskConfig

use_style()
torch.set_num_threads(1)  # what is counted here does not depend on it; what fused attention takes for itself would

# %% [markdown]
# ## One picture each
#
# Read each diagram from the bottom to the top. Blue is what hears the whole sequence cheaply, orange is attention, green
# decides how much of something is taken, pink knows about positions. Look for the pair of blue and orange, and ask what
# the orange box was spared by the blue one; in one picture pink plays blue's part. (Five pictures for seven names: Mega
# and Mega-chunk differ in how far their attention sees, and the baseline, the Transformer, has nothing blue: it attends
# to everything.)

# %%
fig, axes = plt.subplots(2, 3, figsize=(11.5, 8.6))
diagrams = system_diagrams()
for ax, (name, (nodes, edges)) in zip(axes.flat, diagrams.items(), strict=False):
    draw_diagram(ax, nodes, edges, name)
axes.flat[-1].axis("off")
axes.flat[-1].legend(handles=legend_of_kinds(), loc="center")
sentences = []
for name, (nodes, _) in diagrams.items():
    colours = {
        kind: [box[2].replace("\n", " ") for box in nodes.values() if box[3] == kind]
        for kind in ("memory", "attention")
    }
    sentences.append(
        f"{name}: {len(nodes)} boxes, blue: {', '.join(colours['memory']) or 'none'}, orange: {colours['attention'][0]}"
    )
show(
    fig, "Five diagrams of boxes and arrows, input x at the bottom, output y at the top. " + ". ".join(sentences) + "."
)

# %% [markdown]
# **Mega** (chapters 01 and 03). The EMA smooths what came in, and everything that decides reads the smoothed copy:
# queries, keys, both gates, and half of the candidate. Values come from the input itself. The update gate is the
# residual connection. *Mega-chunk* (04) is the same picture with attention kept inside blocks; news crosses a border in
# the blue box only.
#
# **SeqBoat** (05). No update gate, no feed-forward layer. Every token passes the EMA and a linear map; a switch decides
# which ones attend besides. Those are packed together, attend among each other, and go back to their places, weighed by the
# switch's confidence.
#
# **LongVQ** (06). *Our reconstruction*: of the paper we know the abstract. Mega's frame, and attention that reads a codebook:
# keys are replaced by the nearest of a few hundred codes, so that values can be added up by code beforehand. Near pairs are
# computed one by one, with a bias.
#
# **FastRPB with SIKF** (07, 08). Linear attention, which cannot tell an order, and beside it a weight for every distance,
# applied by FFT. Here the pink box hears everything as well.
#
# **SPADE** (02, 04). S4 beside local attention in the lowest layer; the layers above have local attention only. Once every
# token carries a trace of the whole, neighbours pass it on.
#
# ## One door
#
# All of them stand behind the same function: a name, a task, and whatever you want to change. In goes a batch and its mask,
# out come logits; embedding, pooling and head are the same for all, so a difference between two models is a difference
# between their mixers.

# %%
task = TaskConfig(name="letters", kind="tokens", classes=4, length=64, vocabulary=27, source="made here")
small = {
    "mega": {"z_dim": 16, "v_dim": 64, "ffn_dim": 64, "max_positions": 256},
    "mega-chunk": {"z_dim": 16, "v_dim": 64, "ffn_dim": 64, "chunk": 16},
    "seqboat": {"z_dim": 16, "v_dim": 64, "window": 16, "max_positions": 256},
    "longvq": {"z_dim": 16, "v_dim": 64, "ffn_dim": 64, "codes": 32, "window": 8},
    "fastrpb": {"heads": 2, "qkv_dim": 32, "ffn_dim": 64, "max_positions": 256},
    "spade": {"heads": 2, "ffn_dim": 64, "window": 16, "state": 16},
    "transformer": {"heads": 2, "ffn_dim": 64},
}
torch.manual_seed(0)
x = torch.randint(1, 27, (3, 64))
mask = torch.arange(64) < torch.tensor([[64], [40], [1]])
print("names:", ", ".join(NAMES))
for name in NAMES:
    model = build(name, task, dim=32, layers=2, head_dim=32, **small[name]).eval()
    with torch.no_grad():
        logits, padded = model(x, mask), model(torch.where(mask, x, 0), mask)
    print(
        f"{name:12} logits {tuple(logits.shape)}; what stands in the padding does not matter: {torch.equal(logits, padded)}"
    )

# %% [markdown]
# Built with `causal=True`, each is a stack that can stream: one token in, one hidden state out, the same as if the whole
# sequence had been there at once.

# %%
tokens = torch.randint(1, 27, (2, 150))
carried = {}
for name in NAMES:
    torch.manual_seed(0)
    stack = build_encoder(name, task, dim=32, layers=2, causal=True, **small[name]).double().eval()
    with torch.no_grad():
        whole, _ = stack(tokens)
        state, error, most, carried[name] = stack.initial_state(2), 0.0, 0, {}
        for t in range(tokens.shape[1]):
            h, state = stack.step(tokens[:, t], state)
            error = max(error, float((h - whole[:, t]).abs().max()))
            leaves = torch.utils._pytree.tree_leaves(state)
            numbers = sum(part.numel() for part in leaves if isinstance(part, torch.Tensor)) // 2  # for one sequence
            most = max(most, numbers)
            if t + 1 in (10, 50, 100, 150):
                carried[name][t + 1] = most
    print(f"{name:12} step by step = at once, error", below(error, 1e-8))

# %% [markdown]
# And this is what each has to *carry* from one token to the next, as numbers for one sequence: the most so far. In the
# figure, look for the lines that go on rising: who keeps everything that was ever said?

# %%
fig, ax = plt.subplots()
for name, sizes in carried.items():
    ax.plot(list(sizes), list(sizes.values()), label=name)
ax.set(xlabel="tokens read", ylabel="numbers carried", yscale="log", xticks=[10, 50, 100, 150])
ax.legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
growing = [name for name, sizes in carried.items() if sizes[150] > sizes[100]]
show(
    fig,
    "The most numbers that a stream has carried after 10, 50, 100 and 150 tokens, seven models, logarithmic. Still growing between 100 and "
    f"150 tokens: {', '.join(growing)}. The others have stopped: "
    + ", ".join(f"{name} at {sizes[150]:,}" for name, sizes in carried.items() if name not in growing)
    + ".",
)

# %% [markdown]
# Full attention keeps every key and value, for ever. All others have made their peace with forgetting, each in its own way: by
# age (EMA, S4), by border (chunks, windows), by names (codes), by summing up (linear attention). FastRPB carries a window of past
# values because it has a free weight for each distance: there is no smaller memory for that.
#
# ## Where each mechanism sits
#
# The table is read off the models themselves: which classes of `longseq_tutorial.mechanisms` they contain, and how often.

# %%
for name in NAMES:
    model = build(name, task, dim=32, layers=2, **small[name])
    found: dict[str, int] = {}
    for module in model.modules():
        where = type(module).__module__
        if where.startswith("longseq_tutorial.mechanisms"):
            key = f"{type(module).__name__} ({where.rsplit('.', 1)[1]})"
            found[key] = found.get(key, 0) + 1
    print(
        f"{name:12}",
        ", ".join(f"{count} x {key}" for key, count in found.items()) or "none of ours: torch's own attention",
    )

# %% [markdown]
# Chunks and windows are functions, not modules, so they do not show in this list: Mega-chunk hands `chunk_attention` to its
# gated unit, SPADE calls `window_attention`.
#
# ## What a token costs
#
# ### By hand
#
# With $z$ and $v$ the widths of queries and values, a query costs $2(z+v)$ operations for each thing that it looks at:
# a product with a key, and a weighted value. So the price of attention is a question of *how many things*:
#
# | | things a query looks at |
# |---|---|
# | full attention | $L$ |
# | chunks of $C$ | $C$ |
# | a window of $w$ | $2w+1$ (computed: $3w$) |
# | activation at rate $r$ | $r\,(2w+1)$ (computed: $3rw$), on average |
# | $S$ codes, blocks of $c$, a window of $w$ | $S + c + 2w$ |
# | $m$ features | $2\,m\,v$ operations to write and as many to read instead, whatever the length |
#
# ### Counted while it runs
#
# A formula can forget something, so let us watch. We take one layer of each system, 64 channels wide, and let it read
# sequences of 16 tokens, of 32, and so on. `count_parts` keeps two books meanwhile. One is of *operations*: those of
# matrix products, a multiplication and an addition being two, and those of FFTs, $2.5\,N \log_2 N$ for $N$ real
# numbers. The other is of *bytes*: it notes every tensor when it is born and strikes it out when it dies. What we want
# to know is the fullest moment: so much a forward pass without gradients holds, apart from the parameters. Nothing is
# timed here, and the machine's other business is in neither book.
#
# In the table and the figure look at what happens from left to right: a number *per token* that stays the same means
# linear growth. Two oddities: SeqBoat's fresh parameters wake about half of the tokens, at each length a different half,
# so its numbers waver; and most of FastRPB's parameters are its weights for distances, up to 16,384, for four heads.

# %%
LENGTHS = (1024, 4096, 16384)
one_layer = {
    "mega": {"z_dim": 32, "v_dim": 128, "ffn_dim": 128, "max_positions": 1024, "attention": "laplace"},
    "mega-chunk": {"z_dim": 32, "v_dim": 128, "ffn_dim": 128, "chunk": 128, "attention": "laplace"},
    "seqboat": {"z_dim": 32, "v_dim": 128, "window": 128, "max_positions": 4096},
    "longvq": {"z_dim": 32, "v_dim": 128, "ffn_dim": 128, "codes": 256, "window": 64},
    "fastrpb": {"heads": 4, "qkv_dim": 64, "ffn_dim": 128, "max_positions": 16384},
    "spade": {"heads": 4, "ffn_dim": 128, "window": 128},
    "transformer": {"heads": 4, "ffn_dim": 128},
}
torch.manual_seed(3)  # one whose counts lie far from where a figure of the table would round the other way
line = torch.randint(1, 27, (1, 65536))
stacks, counts, cost = {}, {}, {}
for name in NAMES:
    torch.manual_seed(0)
    stacks[name] = build_encoder(name, task, dim=64, layers=1, **one_layer[name]).eval()
    longest = 8192 if name in ("mega", "transformer") else 16384  # four times the length, sixteen times the wait
    counts[name] = {2**k: count_parts(stacks[name], line[:, : 2**k]) for k in range(4, 15) if 2**k <= longest}
    cost[name] = {
        book: [sum(getattr(c, book) for c in counts[name][n].values()) / n for n in LENGTHS if n <= longest]
        for book in ("operations", "bytes")
    }

print(f"{'':24}thousand operations a token    kilobytes a token, at most")
print(f"{'':12}parameters" + 2 * f"{'':6}{'1k':>6}{'4k':>7}{'16k':>7}")
for name, c in cost.items():
    operations, held = ("".join(f"{x / 1e3:7.{d}f}" for x in c[book]) for book, d in (("operations", 0), ("bytes", 1)))
    print(f"{name:12}{sum(p.numel() for p in stacks[name].layers.parameters()):10,}{'':5}{operations:21}{'':5}{held}")

# %% [markdown]
# Can these books be trusted? PyTorch has instruments of its own: a counter of operations, and a profiler that notes
# what the allocator hands out, which the course's `peak_memory` reads. The one is exact if we tell it of what it does
# not know (the FFTs, its own fused attention on a CPU). The other *measures*, so it also sees what an operation takes
# for itself within a single call and shows to nobody.

# %%
same, larger = True, []
for name, stack in stacks.items():
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(MORE_OPERATIONS)) as counter:
        stack(line[:, :4096])
    parts = counts[name][4096].values()
    same = same and counter.get_total_flops() == sum(part.operations for part in parts)
    with torch.no_grad():
        measured = peak_memory(lambda stack=stack: stack(line[:, :4096]))
    more = measured / sum(part.bytes for part in parts) - 1
    if more > 0.01:
        larger.append(f"{name}, by {100 * more:.0f} %")
print("operations: PyTorch's counter says the same, to the last one:", same)
print("bytes: the allocator handed out over a hundredth more than our book holds:", "; ".join(larger) or "nowhere")

# %% [markdown]
# SPADE's fullest moment lies inside PyTorch's fused call (chapter 04), which takes almost a megabyte for itself,
# however long the sequence. All others agree with what was measured.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0))
for name, c in cost.items():
    left.plot(LENGTHS[: len(c["operations"])], [o / 1e3 for o in c["operations"]], label=name)
    right.plot(LENGTHS[: len(c["bytes"])], [b / 1e3 for b in c["bytes"]], label=name)
left.set(title="operations", ylabel="thousand operations a token")
right.set(title="memory at the fullest moment, forward", ylabel="kilobytes a token")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="length (tokens)")
    ax.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    ax.minorticks_off()
right.set_yticks([3, 10], ["3", "10"])
right.legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
ratio = {name: c["operations"][1] / c["operations"][0] for name, c in cost.items()}
rising = [name for name, r in ratio.items() if r > 1.5]
memory = {name: c["bytes"][-1] / c["bytes"][0] for name, c in cost.items()}
least = min(c["bytes"][1] for c in cost.values())
show(
    fig,
    "Operations and bytes for each token of one layer against the length, logarithmic. From 1,024 to 4,096 tokens the "
    f"operations a token rise by more than half in: {', '.join(rising)}. In all others they rise by less than a "
    f"twentieth: {max(r for n, r in ratio.items() if n not in rising) < 1.05}. The bytes a token rise in none: "
    f"{max(memory.values()) < 1.05}. The fewest bytes a token at 4,096 tokens, {fmt(least, 3)}, has: "
    f"{' and '.join(name for name, c in cost.items() if c['bytes'][1] == least)}.",
)

# %% [markdown]
# In the left picture the two quadratic models climb; all others lie flat, or even fall, where something has to be
# prepared once whatever the length (the tables of SPADE's S4). FastRPB rises by a hair: that is the logarithm in its
# FFT. In the right picture nobody climbs, not even full attention: that is the work of tiles and fused calls (chapters
# 03 and 04). The map is never held, but it is still computed. Who falls there works in a space of fixed size, which
# ever more tokens share. And look who lies at the bottom: when it reads a long sequence in one pass without gradients,
# the Transformer no longer runs out of memory. It runs out of time.
#
# ### The panel: part by part
#
# Choose a system and a length. On the left you see what a token costs there, part by part: filled circles are the
# system, open squares the Transformer, and on the logarithmic axis a gap is a ratio. Colours are those of the diagrams,
# with grey for the feed-forward layer; only LongVQ's codes, blue there, are booked with the attention that reads them.
# Bytes stand with the part that made the tensor; a part that held nothing at the fullest moment is missing. On the right
# you see all parts together at every length, and a cross where the two lines meet for the last time.
#
# Nothing is computed when you drag: everything has been counted beforehand, here for two lengths more. Only the
# quadratic models would keep us waiting. Their lines go on as dots: in a matrix product, or a tensor, at most two sizes
# grow with the length, so the count is a polynomial of degree two in it (once the length is a multiple of every block),
# and three counts fix it. The panel insists that the fourth lies on it, to the last digit.
#
# Things to try:
#
# 1. *mega-chunk*, from 16 tokens to 65,536. Which part of the Transformer runs away, and which parts of Mega-chunk
#    follow?
# 2. *spade*, from long to short. Which part gets dearer by the token, and what is it that fewer tokens have to pay for?
# 3. *fastrpb*. One part goes on growing. By how much at each doubling?

# %%
for name in ("mega-chunk", "seqboat", "longvq", "fastrpb", "spade"):
    for length in (32768, 65536):
        counts[name][length] = count_parts(stacks[name], line[:, :length])
panel = Systems(counts, system="mega-chunk")
panel

# %%
print(panel.set(system="spade", length=65536).say(), "\n")
print(panel.set(length=64).say(), "\n")
fft = [panel.a_token("fastrpb", length)["positions"] for length in panel.lengths]
growth = ", ".join(dict.fromkeys(fmt((after - before) / 1e3) for before, after in pairwise(fft)))
print("fastrpb's positions, at every doubling: thousand operations a token more,", growth)
print("\nthe blanks of the table, at 16,384 tokens, thousand operations and kilobytes a token:")
for name in ("mega", "transformer"):
    print(f"{name:12}", *(fmt(panel.together(name, 16384, book) / 1e3, 4) for book in ("operations", "bytes")))

# %% [markdown]
# **A question for the panel.** From some length on, every system does fewer operations than the Transformer, but for
# one. Which one, which of its parts is to blame, and how can that be, when the two read the same number of keys?
#
# <details><summary>Answer</summary>
#
# Mega: its line runs above the Transformer's, in parallel, for ever. Both attend to everything, but a pair of tokens
# costs $2(z+v)$, and Mega's one head has $z + v = 32 + 128$ where the Transformer's four heads have $64 + 64$ together:
# 320 operations for a pair instead of 256. On top of it come the gates. Mega spends this for a better model, not for a
# cheaper one; Mega-chunk keeps the gates and the EMA, and looks at 128 keys.
#
# </details>
#
# Two warnings before you choose by such numbers. The books of operations hold matrix products and FFTs only:
# exponentials, norms and carrying numbers around are not in them (`make bench` measures those, in seconds). And a cheap
# token is no bargain if it did not hear what it needed. So:
#
# ## How far does a token hear?
#
# The gradient of one output with respect to all inputs says who is heard, and how loudly. For each model we take two
# layers with fresh parameters, 96 tokens, windows and chunks of 16, and add up two random inputs. In the gated units
# (Mega, Mega-chunk, LongVQ, SeqBoat) attention begins almost silent: its output weights are turned up fifty times, so
# compare shapes, not brightness, between models. Each picture is a matrix: row = who listens, column = who is heard,
# brightness on a logarithmic scale. Look for borders, bands, and full squares.

# %%
LONG = 96


def hearing(layers):
    """Size of d output i / d input j over two inputs, ``(LONG, LONG)``, each row relative to its largest entry."""
    total = torch.zeros(LONG, LONG)
    for _ in range(2):
        h = embedded = torch.randn(1, LONG, 16, requires_grad=True)
        for layer in layers:
            h = layer(h)
        direction = torch.randn(16)
        for i in range(LONG):
            (gradient,) = torch.autograd.grad(h[0, i] @ direction, embedded, retain_graph=True)
            total[i] += gradient[0].norm(dim=-1)
    return total / total.amax(1, keepdim=True)


narrow = {
    "mega": {"z_dim": 8, "v_dim": 32, "ffn_dim": 32},
    "mega-chunk": {"z_dim": 8, "v_dim": 32, "ffn_dim": 32, "chunk": 16},
    "seqboat": {"z_dim": 8, "v_dim": 32, "window": 16},
    "longvq": {"z_dim": 8, "v_dim": 32, "ffn_dim": 32, "codes": 16, "window": 8},
    "fastrpb": {"heads": 2, "qkv_dim": 16, "ffn_dim": 32, "max_positions": LONG},
    "spade": {"heads": 2, "ffn_dim": 32, "window": 16, "state": 32},
    "transformer": {"heads": 2, "ffn_dim": 32},
}
heard = {}
for name in NAMES:
    torch.manual_seed(1)
    layers = build_encoder(name, task, dim=16, layers=2, **narrow[name]).layers.eval()
    with torch.no_grad():
        for key, p in layers.named_parameters():
            if key.endswith("h_proj.weight"):
                p.mul_(50)  # the gated units begin almost silent; turn their attention up to hear it
    heard[name] = hearing(layers)
torch.manual_seed(1)
windows = spade_layers(SpadeConfig(dim=16, layers=2, heads=2, ffn_dim=32, window=16), branches=[])  # without S4
heard["spade, no S4"] = hearing(windows)
fig, axes = plt.subplots(2, 4, figsize=(11, 5.6), sharex=True, sharey=True)
for ax, (name, matrix) in zip(axes.flat, heard.items(), strict=True):
    image = ax.imshow(matrix.clamp(min=1e-9).log10().numpy(), vmin=-6, vmax=0)
    ax.set(title=name, xticks=[0, 32, 64], yticks=[0, 32, 64])
    ax.grid(False)
fig.supxlabel("heard: input (position)", fontsize="medium")
fig.supylabel("listens: output (position)", fontsize="medium")
fig.colorbar(image, ax=axes, label="gradient, log10 of its share of the loudest", shrink=0.8)
middle = LONG // 2
reach = {name: int((matrix[middle] > 1e-6).nonzero().sub(middle).abs().max()) for name, matrix in heard.items()}
everyone = [name for name, distance in reach.items() if distance == middle]
show(
    fig,
    "Eight 96 by 96 matrices. The token in the middle hears, louder than a millionth of the loudest, to a distance of: "
    + "; ".join(f"{name} {distance}" for name, distance in reach.items())
    + f". All the way to the ends ({middle}): {', '.join(everyone)}.",
)

# %% [markdown]
# The glowing band along the diagonal is the EMA, or S4: as fresh parameters have it, an EMA fades within a few dozen tokens;
# training can slow it down (chapter 01). What lies beyond the band is attention's work. Full attention fills the square; so
# do the codes of LongVQ. Mega-chunk has the band and little else: what stands beyond a chunk's border reaches it through the
# EMA only, and at the band's edges the chunks show as steps. SeqBoat's window counts *awake* tokens, so some rows listen far
# beyond the band, and most do not. FastRPB hears everyone,
# like the Transformer. And without S4, SPADE's windows reach 16 positions a layer and stop there; one S4 beneath fills the
# square.
#
# Whether a model *uses* what it can hear is another question: chapter 12 opens trained ones.
#
# ## An auxiliary wish
#
# One of the models asks for something in training. LongVQ's quantisers want keys to stay near their codes, and say so by a
# loss of their own. `auxiliary_loss(model)` collects such wishes after a forward pass; the training loop adds them to the
# task's loss, so you meet this function only in a loop of your own.

# %%
for name in ("longvq", "mega"):
    torch.manual_seed(0)
    model = build(name, task, dim=32, layers=2, **small[name])
    model(x, mask)
    asked = bool(auxiliary_loss(model) > 0)
    model.eval()(x, mask)
    print(f"{name}: asks for something in training: {asked}; in evaluation: {bool(auxiliary_loss(model) > 0)}")

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · What a Mega layer weighs
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# Count the parameters of a bidirectional Mega layer (EMA, gated attention with a simple bias, LayerNorm; no feed-forward)
# of width `dim`, with `n` averages a channel, widths `z` and `v`, and a bias table for `positions` positions. Write
# `mega_layer_parameters(dim, n, z, v, positions)`, a whole number.
#
# <details><summary>Hint 1</summary>
#
# The EMA: four numbers for each average, for each channel, for each direction; and one skip weight a channel, which both
# directions share.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Three linear layers with biases: values `dim -> v`, everything that reads the EMA `dim -> dim + z + v + dim`, and back
# `v -> dim`. Two scales and two shifts of width `z`. A table of `2 positions - 1`. A LayerNorm has two vectors.
#
# </details>


# %%
def mega_layer_parameters(dim, n, z, v, positions):
    """Whole numbers -> the number of parameters of a Mega layer."""
    # BEGIN SOLUTION "your turn: EMA, three linear layers, scales and shifts, bias table, norm"
    ema = 2 * dim * 4 * n + dim
    linear = (dim + 1) * v + (dim + 1) * (2 * dim + z + v) + (v + 1) * dim
    return ema + linear + 4 * z + (2 * positions - 1) + 2 * dim
    # END SOLUTION


# %%
check_mega_layer_parameters(mega_layer_parameters)

# %% [markdown]
# ### Exercise 2 · How many things a query looks at
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Turn the table of "What a token costs" into a function: `products_a_token(kind, length, z, v, size)` gives the operations
# of attention's matrix products for one token, as a number, with a multiplication and an addition counted as two. `kind` is
# "full", "chunk" (`size` is $C$), "window" (`size` is $w$; count the $2w+1$ that are needed, and no ends of the sequence) or
# "features" (`size` is $m$; leave $z$ out, the features are given).
#
# <details><summary>Hint 1</summary>
#
# A score is a product of width $z$: $2z$ operations. Adding a weighted value costs $2v$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Linear attention without `causal`: each key's features times its value goes into the state, $2mv$; each query reads the
# state, $2mv$ again.
#
# </details>


# %%
def products_a_token(kind, length, z, v, size):
    """-> operations for one token."""
    # BEGIN SOLUTION "your turn: how many things does one query look at?"
    if kind == "features":
        return 4 * size * v
    things = {"full": length, "chunk": size, "window": 2 * size + 1}[kind]
    return 2 * things * (z + v)
    # END SOLUTION


# %%
check_products_a_token(products_a_token)

# %% [markdown]
# ## What to remember
#
# - Every system but Mega itself pairs something cheap that hears everything (EMA, S4, a Toeplitz bias, codes) with
#   attention that has been made affordable: cut (chunks, windows), called rarely (activation), or made coarse (codes,
#   feature maps). Mega pairs it with full attention.
# - Same frame, different mixer: embedding, pooling and head are shared, so comparisons are about the middle.
# - Operations per token that do not depend on the length, a state that stops growing, a receptive field that fills the
#   square: these three can be measured before anything is trained.
# - Mega and SeqBoat are built after the published code, SPADE after its decoder, FastRPB after its authors' code; LongVQ is our
#   reconstruction from an abstract.
#
# Next, [chapter 10](10_long_range_arena.ipynb): the tasks that were made to tell such models apart.
