# %% [markdown]
# # Why long sequences
#
# A second of speech is 16,000 numbers. A film review has thousands of characters. A small grey picture, read row by
# row, is a line of 16,384 pixels. A model that reads such sequences has to carry something from the first step to the
# last, and attention, the tool everybody reaches for, lets every step look at every other. That is its strength, and
# its price.
#
# This notebook measures the price on your machine, looks at what the cheap ways out give up, and draws the map of the
# course: eight mechanisms that keep the long view and pay less for it.

# %% [markdown]
# ## The question
#
# *What exactly becomes too expensive when a sequence grows, and what do we lose when we simply look less far?*
#
# When you close this notebook you will be able to
#
# - count the operations and the bytes of an attention layer before running it, and say what fits into a memory;
# - measure how time and memory grow with the length, and read the growth as one number, the exponent;
# - explain why a fused kernel cures the memory of attention and not its time;
# - write exact attention that never holds the $L \times L$ matrix;
# - say what a chunk or a window cannot see, and find your way through the course.
#
# You need PyTorch and softmax attention, and nothing else. Throughout, $L$ is the length of the sequence, and
# $q, k, v$ are the queries, keys and values of attention. [All letters](#The-letters) stand in a table further down.

# %%
import math

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from longseq_tutorial import published
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, growth_exponent, peak_memory, quickest, show, use_style
from longseq_tutorial.classroom.measure import Cost
from longseq_tutorial.classroom.panels_wall import MECHANISMS, Layer, Wall, in_bytes, in_flops, memory, work
from longseq_tutorial.mechanisms.chunking import chunk_attention
from longseq_tutorial.mechanisms.ema import ema_fft, ema_recurrent
from longseq_tutorial.mechanisms.fft import long_convolution, long_convolution_direct
from longseq_tutorial.mechanisms.gated_attention import attend, attend_slow

use_style()

# %% [markdown]
# ## How long is long?
#
# Here are the sequences of this course: the six tasks of the Long Range Arena (LRA; Tay et al., ICLR 2021), the benchmark
# on which long-sequence models have been compared ever since, and a clip of Speech Commands (Warden, 2018). None of them
# is exotic. All are read step by step, with no tokeniser and no spectrogram to shorten them.
#
# Attention compares every position with every other, so it makes $L \cdot L$ scores. A score in float32 takes 4 bytes.
# Let us see what one head needs for one sequence. In the figure, watch the gap between the two bars: the input is as
# small as ever, its scores are not.

# %%
LENGTHS = {
    "Image, Pathfinder: 32 x 32 pixels": 32 * 32,
    "ListOps: nested operations, tokens": 2000,
    "Text, Retrieval: review or article, bytes": 4000,
    "Speech: one second, samples": 16000,
    "Path-X: 128 x 128 pixels": 128 * 128,
}
for name, length in LENGTHS.items():
    print(f"{name:42} L = {length:6,}   scores of one head: {in_bytes(4 * length**2):>9}")

# %%
fig, ax = plt.subplots(figsize=(7.5, 3.6))
rows = range(len(LENGTHS))
ax.barh([row + 0.2 for row in rows], [4 * n for n in LENGTHS.values()], 0.38, label="the input: 4 L bytes", hatch="//")
ax.barh([row - 0.2 for row in rows], [4 * n * n for n in LENGTHS.values()], 0.38, label="the scores: 4 L² bytes")
ax.set_yticks(rows, LENGTHS)
ax.set(xscale="log", xlabel="bytes (each grid line is 32 times the one before)", xlim=(1024, 2**32))
ax.set_xticks([2**10, 2**15, 2**20, 2**25, 2**30], ["1 KiB", "32 KiB", "1 MiB", "32 MiB", "1 GiB"])
ax.minorticks_off()
ax.legend(loc="upper center", bbox_to_anchor=(0.4, 1.16), ncol=2, frameon=False)
show(
    fig,
    f"Bars for five kinds of sequence. The input takes {in_bytes(4 * 1024)} to {in_bytes(4 * 16384)}; the attention scores of one "
    f"head take {in_bytes(4 * 1024**2)} for 1,024 pixels, {in_bytes(4 * 4000**2)} for a review of 4,000 bytes and "
    f"{in_bytes(4 * 16384**2)} for the 16,384 pixels of Path-X.",
)

# %% [markdown]
# The scores of a single head on a single Path-X picture fill a gibibyte. A model has several heads, several layers, a
# batch, and for training it keeps the scores until the gradient has passed. This is why, in the LRA paper's own table,
# Path-X stands as "fail" beside every model.
#
# For text there is an easy way out: cut it off. But nearly half of the IMDB reviews are longer than 1,024 bytes, and
# whoever cuts decides beforehand that the end does not matter.

# %% [markdown]
# ## The wall, counted
#
# Before measuring, count. Let $q, k$ be $(L, z)$ and $v$ be $(L, v)$: $L$ positions, $z$ numbers in a query or key, $v$
# in a value. One head computes
#
# $$ S = \frac{q k^\top}{\sqrt z}, \qquad A = \operatorname{softmax}(S), \qquad y = A v . $$
#
# In words: every query meets every key in a dot product; each row of scores becomes weights that sum to 1; each output
# is the mean of the values with these weights.
#
# A dot product of $z$ numbers is $z$ multiplications and about as many additions, so we count $2z$ operations (FLOP).
# There are $L \cdot L$ of them. The second product is the same with $v$ in place of $z$:
#
# $$ \text{FLOP} = 2 L^2 z + 2 L^2 v, \qquad \text{bytes of } S = b \, L^2 \quad (b \text{ bytes a number}). $$
#
# The softmax adds a few operations for each score, which is little against $2z + 2v$. With $B$ sequences and $H$ heads
# both lines are multiplied by $B H$. Note what is *not* there: nothing in these formulas asks how long the dependencies
# in the data are. The price is for the possibility.
#
# Do we count right? PyTorch can count the operations of its own matrix products, and the bytes that it hands out:

# %%
L, z, width = 500, 64, 32
q, k, v = torch.randn(L, z), torch.randn(L, z), torch.randn(L, width)
with FlopCounterMode(display=False) as counter:
    attend(q, k, v)
print(f"our formula: {2 * L**2 * z + 2 * L**2 * width:,} FLOP")
print(f"torch counts {counter.get_total_flops():,} FLOP")
print(f"our formula: {4 * L**2:,} bytes of scores")
print(f"torch needs  {peak_memory(lambda: q @ k.T):,} bytes")

# %% [markdown]
# And the rival? A **long convolution** gives each channel a kernel as long as the sequence,
#
# $$ y_t = \sum_{s=0}^{t} k_s \, x_{t-s} , $$
#
# in words: the output at time $t$ is a weighted sum of all inputs so far, and the weight depends only on how long ago
# an input was. Like attention it reaches from the first step to the last. *Unlike* attention its weights are the same
# for every sequence: it cannot decide by content where to look. Keep this in mind when you see how cheap it is.
#
# Literally it costs $2 L^2$ a channel too. But a convolution is a product of spectra, and the fast Fourier transform
# (FFT) takes about $\tfrac{5}{2} N \log_2 N$ operations for $N$ real numbers. Notebook 01 derives this step by step.
# Here we only convince ourselves that the fast things compute what the slow ones say, in float64:

# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 101, 8, dtype=torch.float64)  # three tensors (batch, length, width)
kernel = torch.randn(8, 101, dtype=torch.float64)  # a kernel as long as the sequence for each channel
slow = attend_slow(q, k, v)  # one query at a time
print("explicit attention, error", below((attend(q, k, v) - slow).abs().max(), 1e-12))
print("fused attention,    error", below((F.scaled_dot_product_attention(q, k, v) - slow).abs().max(), 1e-12))
slow = long_convolution_direct(v, kernel)  # one lag at a time
print("FFT convolution,    error", below((long_convolution(v, kernel) - slow).abs().max(), 1e-12))

# %% [markdown]
# ## The wall, measured
#
# Now on your machine. Four ways to mix a sequence, all with 64 numbers a position, in float32, forward only:
#
# - **explicit attention**: the three lines above, with the matrix in memory;
# - **fused attention**: `torch.nn.functional.scaled_dot_product_attention`. It computes the same numbers tile by tile
#   and never holds the matrix (the idea of FlashAttention; Dao et al., 2022);
# - **chunk attention**: the sequence cut into blocks of 128, attention within each;
# - **FFT convolution**: 64 channels, each with a kernel as long as the sequence.
#
# The lengths double from 256 to 16,384. Explicit attention stops at 4,096: at 16,384 its matrix alone takes 1 GiB, and
# as we shall see it holds two of them at once. A course should not push your machine into swapping.
#
# A word on measuring. We use one core, and the processor's own time (`process_time`) instead of the clock's: other
# programs on your machine do not count. Of several runs we keep the fastest, as noise only ever adds. Memory is what
# PyTorch's allocator held at the worst moment, above the inputs.

# %%
WIDTH = 64
RIVALS = {  # name -> (what to run on q, k, v (1, 1, L, 64) and kernel (64, L), the longest L)
    "explicit attention": (lambda q, k, v, kernel: attend(q, k, v), 4096),
    "fused attention": (lambda q, k, v, kernel: F.scaled_dot_product_attention(q, k, v), 16384),
    "chunk attention": (lambda q, k, v, kernel: chunk_attention(q, k, v, 128), 16384),
    "FFT convolution": (lambda q, k, v, kernel: long_convolution(v[0], kernel), 16384),
}


def cost(run, inputs):
    """The processor seconds of the fastest of several calls, and the peak memory of one more."""
    return Cost(quickest(lambda: run(*inputs)), peak_memory(lambda: run(*inputs)))


measured = {name: {} for name in RIVALS}  # name -> {length: Cost}


def measure(length):
    """Measure every rival that goes as far as this length."""
    inputs = (*torch.randn(3, 1, 1, length, WIDTH), torch.randn(WIDTH, length))  # q, k, v, kernel
    for name, (run, longest) in RIVALS.items():
        if length <= longest:
            measured[name][length] = cost(run, inputs)


torch.set_num_threads(1)  # one core: the work itself, not how it is shared out
for length in (256, 512, 1024, 2048, 4096):
    measure(length)
print("measured up to 4,096:", ", ".join(measured))

# %% [markdown]
# And the two longest, which explicit attention sits out:

# %%
for length in (8192, 16384):
    measure(length)
print("lengths measured:", {name: len(costs) for name, costs in measured.items()})

# %% [markdown]
# Your numbers, in milliseconds and mebibytes. (They differ from machine to machine, so this is the one cell whose
# output the course's tests do not compare.)

# %% tags=["nbval-ignore-output"]
# not compared: seconds of this machine
print(f"{'L':>6}", *(f"{name:>24}" for name in measured))
for length in measured["fused attention"]:
    cells = [costs.get(length) for costs in measured.values()]
    print(
        f"{length:6,}", *(f"{c.seconds * 1e3:9.2f} ms {c.bytes / 2**20:7.2f} MiB" if c else f"{'—':>24}" for c in cells)
    )

# %% [markdown]
# A table of costs hides its law. Suppose that the cost is $c \, L^p$. Then
#
# $$ \log \text{cost} = \log c + p \, \log L , $$
#
# a straight line in a plot with two logarithmic axes, and its slope is the exponent $p$. In words: doubling the length
# multiplies the cost by $2^p$: by two if $p = 1$, by four if $p = 2$. We fit $p$ by least squares from $L = 512$ on
# (below that, the fixed cost of calling PyTorch shows) and give its standard error in the legend.
#
# What to look for in the figure: which lines are parallel, and where they would stand at the right edge. The dashed
# piece is *not measured*: it carries explicit attention on to 16,384 with the fitted exponent. (Where a line is bent, as
# when the matrix outgrows a cache, one exponent is too steep for what follows, and the dashed end too high.)

# %%
time_growth, memory_growth = {}, {}
for name, costs in measured.items():
    long = [length for length in costs if length >= 512]
    time_growth[name] = growth_exponent(long, [costs[length].seconds for length in long])
    memory_growth[name] = growth_exponent(long, [costs[length].bytes for length in long])

fig, ax = plt.subplots(figsize=(7.5, 4.4))
for name, costs in measured.items():
    line = ax.plot(list(costs), [c.seconds for c in costs.values()], label=f"{name}: p = {time_growth[name]}")[0]
    last = max(costs)
    if last < 16384:
        beyond = [last, 16384]
        guess = [costs[last].seconds * (length / last) ** time_growth[name].exponent for length in beyond]
        ax.plot(beyond, guess, "--", color=line.get_color(), marker="", label="extrapolated with that p, not measured")
ax.set(xscale="log", yscale="log", xlabel="length L (positions)", ylabel="processor time (s)")
ax.set_xticks(list(measured["fused attention"]), [f"{length:,}" for length in measured["fused attention"]])
ax.minorticks_off()
ax.legend(fontsize="small")
quadratic = 1.6 < time_growth["fused attention"].exponent < 2.4
near_linear = all(time_growth[name].exponent < 1.7 for name in ("chunk attention", "FFT convolution"))
show(
    fig,
    "Processor time against length, both axes logarithmic, four lines. Fused attention is straight, its fitted exponent "
    f"near 2: {quadratic}. Explicit attention lies above it, with an exponent near 2 or more: "
    f"{time_growth['explicit attention'].exponent > 1.6}; beyond 4,096 it is extrapolated, not measured. "
    f"Chunk attention and FFT convolution rise much less steeply, with exponents below 1.7: {near_linear}.",
)

# %% [markdown]
# Here are the findings as facts that should hold on any machine:

# %%
at = {name: costs[16384] for name, costs in measured.items() if 16384 in costs}
ratio = at["fused attention"].seconds / at["FFT convolution"].seconds
print("explicit attention is quadratic or worse:       ", time_growth["explicit attention"].exponent > 1.6)
print("fused attention is quadratic in time:           ", quadratic)
print("chunks and FFT convolution stay below 1.7:      ", near_linear)
print("at 16,384 fused attention costs over 5x the FFT:", ratio > 5)

# %% [markdown]
# Two details are worth a thought. Explicit attention often comes out *steeper* than 2 although its FLOP are exactly
# quadratic: once the matrix no longer fits into the processor's caches, every number of it travels to main memory and
# back, and for each new large matrix the operating system has to hand out fresh pages. Bytes cost time, not only FLOP.
# And the FFT comes out above 1: the $\log L$, and the same caches.
#
# Now the memory. What to look for: one line leaves the others, and it is not the fused one.

# %%
fig, ax = plt.subplots(figsize=(7.5, 4.2))
for name, costs in measured.items():
    ax.plot(list(costs), [c.bytes for c in costs.values()], label=f"{name}: p = {memory_growth[name]}")
lengths = list(measured["fused attention"])
ax.plot(
    lengths, [4 * n * n for n in lengths], ":", color="0.3", marker="", label="one score matrix, 4 L² bytes (computed)"
)
ax.set(xscale="log", yscale="log", xlabel="length L (positions)", ylabel="peak memory above the inputs (bytes)")
ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
ax.set_yticks([2**17, 2**20, 2**25, 2**30], ["128 KiB", "1 MiB", "32 MiB", "1 GiB"])
ax.minorticks_off()
ax.legend(fontsize="small")
per_pair = measured["explicit attention"][4096].bytes / 4096**2
show(
    fig,
    f"Peak memory against length, both axes logarithmic. Explicit attention rises with exponent "
    f"{fmt(memory_growth['explicit attention'].exponent)} and holds {fmt(per_pair)} bytes for each pair of positions. "
    f"FFT convolution rises with exponent {fmt(memory_growth['FFT convolution'].exponent)}. Fused attention rises no "
    f"faster than linearly: {memory_growth['fused attention'].exponent < 1.2}.",
)

# %%
print(f"explicit attention holds {fmt(per_pair)} bytes a pair: {fmt(per_pair / 4)} float32 matrices at once")
print("fused attention grows at most linearly:            ", memory_growth["fused attention"].exponent < 1.2)
print("at 16,384 it holds less than 1/50 of the matrix:   ", at["fused attention"].bytes < 4 * 16384**2 / 50)

# %% [markdown]
# The explicit form holds two matrices at its worst moment: the scores, and the weights that softmax makes of them. (The
# queries are scaled, not the scores, or there would be a third.) The fused form holds none. This is the first lesson of the course: **fused attention cures the memory and leaves the time.** The
# number of dot products is what it was, only nobody stores them. On a GPU it is some factor faster, the line lies
# lower, and it has the same slope. A constant factor buys you a length; the slope takes it back: to read twice as far,
# you need four times the machine.

# %% [markdown]
# ## What a shorter view loses
#
# If every position looks at $c$ others instead of at all $L$, the cost falls from $L^2$ to $L \cdot c$. That is what
# chunks and windows do. What do they lose?
#
# Let us not draw what we believe but ask the functions themselves. Output $y_i$ *sees* input $x_j$ if changing $x_j$
# changes $y_i$: if the derivative $\partial y_i / \partial x_j$ is not zero. PyTorch gives us all these derivatives at
# once, for any function. All six below are causal: they look at the past and the present only, so nothing above
# the diagonal can be seen anyway.

# %%
N, C = 32, 8  # length, and the reach of a chunk or window


def sees(f):
    """Which output depends on which input: bool (N, N), row = output, column = input."""
    torch.manual_seed(0)
    x = 0.3 * torch.randn(1, N, 2, dtype=torch.float64)  # small, so that no softmax comes near 0 or 1
    derivative = torch.autograd.functional.jacobian(f, x)  # (1, N, 2, 1, N, 2): every output by every input
    return derivative.abs().amax(dim=(0, 2, 3, 5)) > 1e-9


def full(x):
    return attend(x, x, x, causal=True)


def chunk(x):
    return chunk_attention(x, x, x, C, causal=True)


def window(x):
    distance = torch.arange(N)[:, None] - torch.arange(N)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=(distance >= 0) & (distance < C))


def ema(x):  # an average that forgets a fifth at every step: a convolution, and a recurrence
    one = torch.ones(2, 1, dtype=x.dtype)
    return ema_fft(x, 0.4 * one, 0.5 * one, one, one)


VIEWS = {
    "full attention": full,
    f"chunks of {C}": chunk,
    f"window of {C}": window,
    f"two layers of window {C}": lambda x: window(x + window(x)),
    "EMA: convolution or recurrence": ema,
    f"EMA, then chunks of {C}": lambda x: chunk(ema(x)),
}
seen = {name: sees(f) for name, f in VIEWS.items()}
past = N * (N + 1) // 2
for name, view in seen.items():
    print(
        f"{name:32} sees {100 * int(view.sum()) / past:4.0f} % of its past; the last sees the first: {bool(view[-1, 0])}"
    )

# %%
stacked = sees(lambda x: chunk(x + chunk(x)))
print("what the first position of the second chunk sees:", int(seen[f"chunks of {C}"][C].sum()), "position, itself")
print("two layers of chunks see more than one:          ", not torch.equal(stacked, seen[f"chunks of {C}"]))

# %%
fig, axes = plt.subplots(2, 3, figsize=(8.2, 5.8), sharex=True, sharey=True)
for ax, (name, view) in zip(axes.flat, seen.items(), strict=True):
    ax.imshow(view, vmin=0, vmax=1, interpolation="nearest")
    ax.set_title(name, fontsize="medium")
    ax.grid(False)
    ax.set_xticks(range(0, N, C))
    ax.set_yticks(range(0, N, C))
for ax in axes[-1]:
    ax.set_xlabel("input position")
for ax in axes[:, 0]:
    ax.set_ylabel("output position")
show(
    fig,
    f"Six squares of {N} by {N} positions, row = output, column = input, bright where the output depends on the input. "
    f"Full attention: the whole lower triangle. Chunks of {C}: four small triangles on the diagonal. Window of {C}: a "
    f"band along the diagonal, {seen[f'window of {C}'][-1].sum()} positions wide. Two window layers: a band of "
    f"{seen[f'two layers of window {C}'][-1].sum()}. EMA, and EMA followed by chunks: the whole lower triangle again.",
)

# %% [markdown]
# A chunk forgets everything at its border: the first position of a chunk sees nothing but itself, and *stacking more
# such layers changes nothing*, since no layer crosses a border. A window slides, so each layer adds its reach; to see
# across 16,384 positions with a window of 128 would take over a hundred layers. The moving average sees its whole past,
# in one layer, at linear cost.
#
# And the last picture is the idea behind half of this course: **let something cheap carry information across, and let
# attention, in chunks, look closely at what arrives.** That is Mega-chunk.
#
# But to see is not to see well. How much of the first input is left in an average that keeps four fifths at each step?

# %%
x = torch.zeros(1, 65, 1, dtype=torch.float64)
x[0, 0] = 1.0  # one click, then silence
one = torch.ones(1, 1, dtype=torch.float64)
echo, state = ema_recurrent(x, 0.4 * one, 0.5 * one, one, one)
for lag in (8, 16, 32, 64):
    print(f"after {lag:2} steps {fmt(float(echo[0, lag, 0] / echo[0, 0, 0]))} of the click is left")
print("numbers remembered between steps:", state.numel())

# %% [markdown]
# A recurrence keeps a state of fixed size and squeezes the whole past into it; full attention, when it generates step
# by step, keeps every key and value it has ever seen, and its memory grows. One forgets, the other pays. All
# eight mechanisms of this course live between these two.

# %% [markdown]
# ## What it is worth: published results
#
# Is it worth the trouble? This is from Table 2 of the Mega paper (Ma et al., ICLR 2023, arXiv 2209.10655): test accuracy
# in percent on LRA, and, for training on Text at length 4K, speed and peak memory relative to the Transformer. The
# Transformer and S4 rows are the re-runs by Mega's authors. These are *their* numbers, not ours. (`published` keeps such
# figures, each with its source.)

# %%
MODELS = {"transformer": "Transformer", "S4-v2 (re-run)": "S4-v2", "mega": "Mega", "mega-chunk": "Mega-chunk"}
costs = {cost.model: cost for cost in published.COSTS}
print(published.table(list(MODELS)), "\n")
for model, name in MODELS.items():
    speed, peak = costs[model].speed, costs[model].memory
    print(f"{name:12} average {published.mean(model):.1f}, {speed} times the speed, {peak} of the memory")

# %% [markdown]
# Mind the averages: as in the paper, the Transformer's is over five tasks, as Path-X failed (chance level, or it does not
# fit), the others' over six. In the figure, look at the left for how much the long view is worth, task by task, and at
# the right for what it costs.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.9), width_ratios=(3, 2))
offsets = {"Transformer": (8, -4), "S4-v2": (6, 8), "Mega": (8, 4), "Mega-chunk": (-36, -15)}
accuracies = {
    name: [published.lookup(task, model).accuracy for task in published.ARENA] for model, name in MODELS.items()
}
for shift, (model, name) in enumerate(MODELS.items()):
    values = [math.nan if a is None else a for a in accuracies[name]]
    places = [task + 0.17 * (shift - 1.5) for task in range(len(values))]  # side by side, so that none hides another
    line = left.plot(places, values, linestyle="", markersize=7, label=name)[0]
    price = costs[model].speed, costs[model].memory
    right.plot(*price, linestyle="", marker=line.get_marker(), color=line.get_color(), markersize=9)
    right.annotate(name, price, xytext=offsets[name], textcoords="offset points", fontsize="small")
left.set(ylabel="test accuracy (%)", ylim=(30, 102))
left.set_xticks(range(6), [published.BENCHMARKS[task].title for task in published.ARENA], rotation=30)
left.legend(fontsize="small", loc="lower right")
right.set(xlabel="training speed (Transformer = 1)", ylabel="peak memory (Transformer = 1)")
right.set(xlim=(0.5, 7), ylim=(0, 1.1))
gap = min(m - t for m, t in zip(accuracies["Mega"], accuracies["Transformer"], strict=True) if t is not None)
chunks, full = costs["mega-chunk"], costs["mega"]
show(
    fig,
    "Published LRA results. Left, accuracy by task: Mega lies above the Transformer on all five tasks that both solve, by "
    f"{fmt(gap, 3)} points or more; on Path-X the Transformer has no point, Mega {accuracies['Mega'][-1]}. Right, "
    f"training speed and memory: Mega-chunk {chunks.speed} times as fast in {chunks.memory} of the memory, Mega "
    f"{full.speed} times in {full.memory}.",
)

# %% [markdown]
# The surprise is that the cheaper models are also the *better* ones. The usual explanation: S4 and Mega have it built in
# that near and far differ and that the past fades smoothly, which plain attention has to learn from the data. So this course is
# not about approximating attention at a discount. It is about giving a model a memory.
#
# The two Mega rows hold the other lesson. Chunks (of 128 positions; of 4,096 on Path-X) nearly double the speed and more
# than halve the memory. They cost nothing to speak of on Text, but four points and more on ListOps, Image and Path-X: what
# crosses a border matters more for some data than for others.

# %% [markdown]
# ## The map of the course
#
# Eight mechanisms, each built from nothing in its own notebook, and five published systems (Mega in two forms) made of
# them. A dot says: this system is made with that mechanism. Read down a column to see what a system is made of: most
# of them join something cheap that reaches everywhere to attention that looks closely.

# %%
NOTEBOOKS = {  # notebook -> (cost in the length L, the systems that use it)
    "01  EMA": ("L log L", ("Mega", "Mega-chunk", "SeqBoat")),
    "02  S4 convolution": ("L log L", ("LongVQ", "SPADE")),
    "03  gated attention": ("L²", ("Mega", "Mega-chunk", "SeqBoat")),
    "04  chunks and windows": ("L c", ("Mega-chunk", "SeqBoat", "SPADE")),
    "05  sparse activation": ("active steps only", ("SeqBoat",)),
    "06  VQ attention": ("L × codes", ("LongVQ",)),
    "07  kernel linear attention": ("L × features", ("FastRPB",)),
    "08  FFT positional bias": ("L log L", ("FastRPB",)),
}
SYSTEMS = ("Mega", "Mega-chunk", "SeqBoat", "LongVQ", "FastRPB", "SPADE")

fig, ax = plt.subplots(figsize=(9.0, 4.4))
for row, (price, users) in enumerate(NOTEBOOKS.values()):
    ax.plot([0, len(SYSTEMS) - 1], [row, row], color="0.85", marker="", linewidth=1, zorder=1)
    for system in users:
        ax.scatter(SYSTEMS.index(system), row, s=170, color=OKABE_ITO["blue"], zorder=2)
    ax.text(len(SYSTEMS) - 0.4, row, price, va="center")
ax.text(len(SYSTEMS) - 0.4, -0.85, "cost in L", va="center", weight="bold")
ax.set_yticks(range(len(NOTEBOOKS)), NOTEBOOKS)
ax.set_xticks(range(len(SYSTEMS)), [name.replace("FastRPB", "FastRPB\n+ SIKF") for name in SYSTEMS], fontsize="medium")
ax.set(xlim=(-0.5, len(SYSTEMS) + 1.1), ylim=(len(NOTEBOOKS) - 0.5, -1.2))
ax.xaxis.tick_top()
ax.tick_params(length=0)
ax.grid(False)
for spine in ax.spines.values():
    spine.set_visible(False)
show(
    fig,
    "The map: a table of eight mechanisms against six models. "
    + ". ".join(
        f"{name.split('  ')[1]} (notebook {name[:2]}) in {', '.join(users)}" for name, (_, users) in NOTEBOOKS.items()
    )
    + ".",
)

# %% [markdown]
# | notebook | you build or do | state |
# |---|---|---|
# | 00 Why long sequences | measure the wall; the map | you are here |
# | [01 EMA](01_ema.ipynb) | a damped moving average: recurrence = kernel = FFT convolution; streaming | **ready** |
# | [02 S4 convolution](02_s4_convolution.ipynb) | HiPPO, discretisation, S4D and S4 | **ready** |
# | [03 Gated attention](03_gated_attention.ipynb) | the single-head gated unit; softmax, laplace, relu²; position biases | **ready** |
# | [04 Chunking](04_chunking.ipynb) | chunk and sliding-window attention; what crosses a border, and how | **ready** |
# | [05 Sparse activation](05_sparse_activation.ipynb) | compute only where it matters; gradients through a discrete choice | **ready** |
# | [06 VQ attention](06_vq_attention.ipynb) | linear time that is *exactly* attention over quantised keys | **ready** |
# | [07 Kernel linear attention](07_linear_attention.ipynb) | feature maps; parallel = chunked = recurrent | **ready** |
# | [08 FFT positional bias](08_fft_bias.ipynb) | a Toeplitz bias as a circulant embedding | **ready** |
# | [09 The models](09_the_models.ipynb) | the published systems: one diagram, one table, one API | **ready** |
# | [10 Long Range Arena](10_long_range_arena.ipynb) | the six tasks, looked at and measured; seven models in miniature; the records of real runs | **ready** |
# | [11 Speech](11_speech.ipynb) | spoken digits from the raw waveform: seven models, what they listen for, how far back | **ready** |
# | [12 What they learned](12_what_they_learned.ipynb) | inside trained models: memories, maps, codes; parts switched off | **ready** |
#
# Seven models have been trained on ListOps, text and speech (10 to 12). The order of the table is the order of the argument,
# but 01, 03, 04 make Mega-chunk by themselves, and 06, 07, 08 can each be read after 03. If you are in a hurry: 01 and 11.
#
# ### How to use a notebook
#
# **Run it.** Every cell runs in seconds on two processor cores, with no network. Change numbers and run again: the
# functions are small, and *Run all* always reaches the end, solved or not.
#
# **Panels** are figures with sliders. Each slider has a number box beside it for exact values, and below the picture
# stands in words what it shows. Every panel can also be driven by a line of code, `panel.set(...)`, and takes your own
# functions or modules in place of ours.
#
# **Exercises** leave you a function that raises `NotImplementedError("your turn: ...")`. Fill it in, run the cell, then
# the check below it. A check never stops the notebook: it says that nothing is there yet, or what is wrong and what the
# likely cause is, or what it has verified. Hints are folded away; so are the solutions, in `notebooks/solutions/`.
#
# ### The letters
#
# | letter | name | meaning | in the papers |
# |---|---|---|---|
# | $B$ | batch | sequences at a time | |
# | $L$ | length | positions of a sequence | $n$ in Mega, $L$ in S4 |
# | $D$ | dim | channels: numbers at each position | $d$ |
# | $H$ | heads | attention heads; Mega has one | $h$ |
# | $z$ | z_dim | width of a query or key | $z$ in Mega, $d_k$ elsewhere |
# | $v$ | v_dim | width of a value | $v$ in Mega, $d_v$ elsewhere |
# | $n$ | n | numbers an EMA remembers for each channel | $h$ in Mega |
# | $c$ | chunk | length of a chunk, or reach of a window | $c$ in Mega |
#
# Tensors are `(batch, length, dim)`, with heads `(batch, heads, length, dim)`, kernels `(dim, length)`. A `mask` is
# boolean, `(batch, length)`, and `True` where a position is real.

# %% [markdown]
# ## The panel
#
# The wall, for a layer of your size. Choose the length, the batch, the heads, the bytes of a number, and how many keys
# a chunk or window shows to a query; read the work or the largest tensor of each mechanism. (The recurrence is the moving
# average of notebook 01 with 16 numbers a channel.) We hand in the costs
# measured above, so it can also scale them to **seconds on your machine**: choose *seconds*. Hand in your own with
# `Wall({"my mechanism": {256: 0.001, 512: 0.002, 1024: 0.004}})`: any name, lengths and seconds for one head.

# %%
panel = Wall(measured, width=WIDTH)
panel

# %%
print(panel.set(length=16000, heads=8, batch=4).say(), "\n")
print(panel.set(show="memory").say(), "\n")
print(panel.set(bytes_per_number=2, budget=80).say())

# %% [markdown]
# Four seconds of speech at once, eight narrow heads, and the scores of *one layer* fill 30 GiB; in half precision, 15.
# A large accelerator with 80 GiB would hold those of five layers, with nothing else on it. As for the work, chunks of
# 128 need less than a hundredth of what full attention needs, the convolution and the recurrence less still.
#
# In *seconds* the panel scales each of your measurements in proportion to the work. So fused attention takes, at twice
# the length, exactly four times as long:

# %%
small = Layer(16000, batch=4, heads=8, width=WIDTH, bytes_per_number=2)
print("layers whose scores fit into 80 GiB:       ", 80 * 2**30 // memory("explicit attention", small))
shares = {name: work(name, small) / work("explicit attention", small) for name in MECHANISMS[2:]}
print("the others' share of full attention's work:", ", ".join(f"{name} {fmt(s)}" for name, s in shares.items()))

near, far = (panel.seconds("fused attention", Layer(length, width=WIDTH)) for length in (65536, 131072))
print("fused attention at twice the length takes: ", fmt(far / near), "times as long")
print("at L = 131,072 those are operations:       ", in_flops(work("fused attention", Layer(131072, width=WIDTH))))
print("the seconds of this machine are drawn:     ", panel.set(show="seconds").error is None)
print(panel.set(show="work", length=131072, heads=1, batch=1).say())

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · Count the bytes
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Write `score_bytes(batch, heads, length, bytes_per_number)`: how many bytes do the attention scores of one layer take,
# if they are stored? A whole number.
#
# <details><summary>Hint 1</summary>
#
# Every query meets every key once: how many pairs are there in one head, for one sequence?
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Each head of each sequence of the batch has a matrix of its own.
#
# </details>


# %%
def score_bytes(batch, heads, length, bytes_per_number):
    """Whole numbers -> bytes of the score matrices, a whole number."""
    # BEGIN SOLUTION "your turn: count the numbers, then the bytes"
    return batch * heads * length * length * bytes_per_number
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.wall import check_score_bytes

check_score_bytes(score_bytes)

# %% [markdown]
# ### Exercise 2 · What fits
#
# Difficulty: ●●○ · Importance: ●●○ · 10 minutes
#
# Now the other way round. You have `budget` bytes. Write `longest_length(budget, batch, heads, bytes_per_number,
# copies)`: the largest whole $L$ whose score matrices fit, if `copies` of them are alive at the same time. (We measured
# two in the explicit form.) Filling the budget exactly still fits; if nothing fits, the answer is 0.
#
# <details><summary>Hint 1</summary>
#
# Solve your formula of exercise 1, times `copies`, for the length.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `math.isqrt(n)` is the largest whole number whose square is at most `n`; `//` divides and rounds down.
#
# </details>


# %%
def longest_length(budget, batch, heads, bytes_per_number, copies):
    """Whole numbers -> the largest length that fits, a whole number."""
    # BEGIN SOLUTION "your turn: solve the count of bytes for the length"
    return math.isqrt(budget // (batch * heads * bytes_per_number * copies))
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.wall import check_longest_length

check_longest_length(longest_length)

# %% [markdown]
# ### Exercise 3 · Exact attention without the matrix
#
# Difficulty: ●●● · Importance: ●●● · 20 minutes
#
# How can the fused call do without the matrix? Because no query needs another query's scores. Write
# `attend_in_blocks(q, k, v, block)`: take `block` queries at a time, compute *their* scores against *all* keys, their
# softmax, their outputs; go on to the next block.
#
# `q` and `k` are `(..., L, z)`, `v` is `(..., L, v)`, the result is `(..., L, v)` and equals softmax attention exactly.
# The last block may be shorter. The check also watches every tensor that you make: none may be as large as $L \times L$.
#
# <details><summary>Hint 1</summary>
#
# `q.split(block, dim=-2)` gives the blocks, the last one shorter if need be.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Within a block the formula is the usual one: scores `(block, L)`, divided by $\sqrt z$, softmax over the *keys* (the
# last axis), times `v`. Then join the outputs along the length.
#
# </details>


# %%
def attend_in_blocks(q, k, v, block):
    """q, k (..., L, z), v (..., L, v), a whole number -> (..., L, v), softmax attention, never L x L in memory."""
    # BEGIN SOLUTION "your turn: one block of queries after the other, each against all keys"
    outputs = []
    for rows in q.split(block, dim=-2):  # (..., block, z)
        scores = rows @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (..., block, L)
        outputs.append(torch.softmax(scores, dim=-1) @ v)  # (..., block, v)
    return torch.cat(outputs, dim=-2)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.wall import check_attend_in_blocks

check_attend_in_blocks(attend_in_blocks)

# %% [markdown] tags=["solution-only"]
# This is exact, since the softmax runs along a row and each row is whole. Its memory is `block · L` instead of $L^2$:
# linear. (For *training*, autograd would still keep every block's weights; a fused kernel computes them a second time
# in its backward pass instead.)
#
# The fused kernels cut the keys into blocks as well. Then no row is whole, and they carry a running maximum and a
# running sum from block to block, and correct the earlier part whenever the maximum rises. With the scores of the first
# blocks summed to $s$ under the maximum $m$, and a new block with maximum $m'$, the sum becomes
# $s \, e^{m - \max(m, m')} + \sum e^{S - \max(m, m')}$: the *online softmax*.

# %% [markdown]
# ### Exercise 4 · An exponent of your own
#
# Difficulty: ●●○ · Importance: ●●○ · 10 minutes
#
# Every chapter fits an exponent. Write `fit_exponent(lengths, values)`, both float64 tensors `(m,)`: the slope $p$ of the
# least-squares line through the points $(\log L, \log \text{value})$. With $X = \log L$, $Y = \log \text{value}$ and bars
# for means,
#
# $$ p = \frac{\sum (X - \bar X)(Y - \bar Y)}{\sum (X - \bar X)^2} . $$
#
# In words: how $Y$ moves along with $X$, divided by how much $X$ moves.
#
# <details><summary>Hint 1</summary>
#
# Take both logarithms first. The base does not matter: it divides out.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# Subtract the mean from each; then it is one sum of products over one sum of squares.
#
# </details>


# %%
def fit_exponent(lengths, values):
    """float64 (m,), (m,) -> the exponent, a number."""
    # BEGIN SOLUTION "your turn: the slope of the line through the logarithms"
    x, y = lengths.log(), values.log()
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (x * x).sum()
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.wall import check_fit_exponent

check_fit_exponent(fit_exponent)

# %% [markdown]
# ## What to remember
#
# - Attention makes $B H L^2$ scores: $2 L^2 z + 2 L^2 v$ operations a head, and, if they are stored, $b L^2$ bytes. One
#   head at 16,384 positions: 1 GiB in float32.
# - A fused kernel computes the same numbers without storing them: its memory is linear, its time is still quadratic.
#   The query blocks of exercise 3 are the heart of it (Dao et al., *FlashAttention*, 2022, section 3.1).
# - A long convolution by FFT costs about $L \log L$ and a recurrence $L$. They see their whole past, with weights that
#   do not depend on what they read.
# - Chunks and windows cost $L \cdot c$. Chunks never see across a border, however many layers there are; windows reach
#   a little further with each layer.
# - A cheap memory that crosses, and attention that looks closely: that pair is the plan of Mega (Ma et al., 2023,
#   section 3) and, in one form or another, of most systems in this course.
# - Cost is a slope in a log-log plot. A faster machine lowers the line; only another mechanism turns it.
#
# Next: [01 EMA](01_ema.ipynb), the oldest memory there is, and how a loop becomes a convolution.
