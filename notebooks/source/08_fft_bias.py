# %% [markdown]
# # 08 · FFT positional bias: a weight for every distance
#
# ## The question, and what you will be able to do
#
# Chapter 07 made attention linear by never forming the matrix of scores. But that matrix was also the place where
# chapter 03 kept its knowledge of positions: it added a bias for the distance $i-j$ to every score. No matrix, no
# place for the bias. **Where can a linear attention learn that there is such a thing as order?**
#
# The answer of FastRPB is: *beside* the attention. Add a second sum over all positions, whose weights ask for nothing
# but the distance. That sounds like the $L^2$ weights all over again. But only $2L-1$ of them are different, and this
# redundancy is enough to compute the sum in $L \log L$. Not approximately: exactly.
#
# After this chapter you will be able to
#
# - say what attention without positions cannot tell apart, and add what it lacks;
# - write a bias on distance as a Toeplitz matrix, embed it in a circulant one, and show why the Fourier transform
#   turns that one into a plain list of numbers;
# - choose the length of the FFT: how many points it needs, why, and which lengths are fast;
# - derive the gradient of the weights, and compute it in $L \log L$ too;
# - do the same for images, in the published form and in full, and say what the published form cannot see;
# - name what such a bias can do that attention cannot, and the other way round.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, growth_exponent, peak_memory, quickest, show, use_style
from longseq_tutorial.classroom.checks.fft_bias import (
    check_circle,
    check_lag_gradient,
    check_separable,
    check_toeplitz_matrix,
    check_toeplitz_product,
)
from longseq_tutorial.classroom.panels_fft_bias import BiasOverDistance, drawing, drawn_lags, show_matrix
from longseq_tutorial.mechanisms.fft import good_length
from longseq_tutorial.mechanisms.fft_bias import (
    FastRPB,
    toeplitz_matrix,
    toeplitz_product,
    toeplitz_product_2d,
    toeplitz_product_2d_dense,
    toeplitz_product_2d_full,
    toeplitz_product_2d_full_dense,
    toeplitz_product_dense,
)
from longseq_tutorial.mechanisms.gated_attention import attend
from longseq_tutorial.mechanisms.linear_attention import elu_features, linear_attention, sikf_features

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable

# %% [markdown]
# ## Attention that cannot tell an order
#
# Attention is a sum over keys, and a sum does not care about the order of its terms. Shuffle the tokens, and the same
# outputs come out, shuffled in the same way. "Dog bites man" and "man bites dog" are one and the same bag of words.

# %%
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 9, 4, dtype=torch.float64)  # each (B, H, L, d): 1 sequence, 2 heads, 9 tokens, width 4
order = torch.randperm(9)
shuffled = linear_attention(q[:, :, order], k[:, :, order], v[:, :, order], elu_features)
same_bag = (shuffled - linear_attention(q, k, v, elu_features)[:, :, order]).abs().max()
print("linear attention of shuffled tokens = its own output, shuffled; error", below(same_bag, 1e-12))

# %% [markdown]
# What is missing is a term that knows where it is. FastRPB gives each head one number $w_s$ for every offset $s = i-j$,
# learned like any other parameter, and adds
#
# $$o_i \;=\; \mathrm{attention}(q, k, v)_i \;+\; \sum_{j=0}^{L-1} w_{i-j}\, v_j .$$
#
# In words: position $i$ also reads the value of every position $j$, with a weight that depends on how far $j$ lies
# behind it ($i-j>0$) or ahead of it ($i-j<0$), and on nothing else. Not on what the tokens say, and not on the other
# weights: there is no softmax over $w$, no division by their sum. The attention beside it may be of any kind.
#
# | here | shape | what it is |
# |---|---|---|
# | `v` | $(B, L, H, d)$ | the values, the very same that the attention reads; heads come *after* positions |
# | `lags` | $(H, 2L-1)$ | $w_s$ for $s = -(L-1), \dots, L-1$, at index $s + L - 1$ |
# | `toeplitz_matrix(lags)` | $(H, L, L)$ | $W_{ij} = w_{i-j}$ |
# | `FastRPB.weight` | $(H, 2N-1)$ or $(H, N)$ | the parameter, for sequences of up to $N$ tokens; $(H, N)$: one weight per *distance* |
#
# The system is that of Zubkov and Gavrilov, *FastRPB: a Scalable Relative Positional Encoding for Long Sequence Tasks*
# (2022). We know the mechanism from the authors' published code, which leaves no doubt about it; of their results we
# have no numbers, so this chapter quotes none.
#
# Three lists of weights, for a feeling of what such a term can do. In the matrices, look at which side of the diagonal
# the weights lie, and at what happens along a diagonal; below, at what becomes of the grey signal.

# %%
length = 40
signal = torch.zeros(length, dtype=torch.float64)
signal[6:16], signal[24:27] = 1, -1
fig, axes = plt.subplots(2, 3, figsize=(10, 5.2), height_ratios=[1.5, 1])
uneven, outputs = 0.0, {}
for (upper, lower), preset in zip(axes.T, ("shift", "smooth", "difference"), strict=True):
    matrix = toeplitz_matrix(drawn_lags(preset, {}, length))
    uneven = max(
        [
            uneven,
            *((line - line[0]).abs().max().item() for s in range(1 - length, length) for line in [matrix.diagonal(s)]),
        ]
    )
    outputs[preset] = matrix @ signal
    image = show_matrix(upper, matrix)
    upper.set(title=preset, xlabel="read position j", ylabel="reading position i" if preset == "shift" else "")
    fig.colorbar(image, ax=upper, shrink=0.8)
    lower.plot(signal, color="#999999", marker="", label="before")
    lower.plot(outputs[preset], marker="", color=OKABE_ITO["vermilion"], label="after")
    lower.set(xlabel="position (steps)", ylabel="value" if preset == "shift" else "", ylim=(-1.5, 1.5))
axes[1, 0].legend(fontsize="small", loc="lower left")
moved = torch.equal(outputs["shift"][8:], signal[:-8])
show(
    fig,
    f"""Three 40 by 40 matrices of weights, and a signal of two blocks before and after each. Shift: a single
    diagonal of ones, eight below the main one; the blocks come 8 steps later, unchanged: {moved}. Smooth: a soft
    band around the diagonal; the corners of the blocks are rounded. Difference: +1 on the diagonal, -1 just below
    it; only the edges of the blocks remain, with values from {fmt(outputs["difference"].min())} to
    {fmt(outputs["difference"].max())}. Within each matrix the entries along any diagonal are equal: {uneven == 0}.""",
)

# %% [markdown]
# Weights *below* the diagonal read the past, weights above it the future. And every diagonal has one colour, since
# along it $i-j$ stays the same. A matrix with that property is called a **Toeplitz matrix**; it holds $2L-1$ different
# numbers, one for each diagonal.
#
# ## A slow version, in a few lines
#
# The definition, pair by pair.


# %%
def toeplitz_slow(lags, v):
    """lags (H, 2L-1), v (B, L, H, d) -> (B, L, H, d)."""
    length = v.shape[1]
    y = []
    for i in range(length):  # who reads
        total = torch.zeros_like(v[:, 0])  # (B, H, d)
        for j in range(length):  # who is read
            weight = lags[:, (i - j) + length - 1]  # (H,): offset i - j; offset 0 stands in the middle
            total = total + weight[:, None] * v[:, j]
        y.append(total)
    return torch.stack(y, dim=1)


def random_case(batch, length, heads, width, seed=0):
    """Weights (H, 2L-1) and values (B, L, H, d), float64."""
    g = torch.Generator().manual_seed(seed)
    lags = torch.randn(heads, 2 * length - 1, generator=g, dtype=torch.float64)
    return lags, torch.randn(batch, length, heads, width, generator=g, dtype=torch.float64)


lags, v = random_case(batch=2, length=12, heads=3, width=4)
by_matrix = torch.einsum("hij,bjhd->bihd", toeplitz_matrix(lags), v)
print(
    "pair by pair = the matrix times the values, error", below((toeplitz_slow(lags, v) - by_matrix).abs().max(), 1e-12)
)

knock = torch.zeros(1, 12, 3, 1, dtype=torch.float64)
knock[:, 5] = 1  # a single 1 at position 5
answer = toeplitz_slow(lags, knock)[0, :, :, 0].T  # (H, L)
print("knock at position 5: the answer is w, with offset 0 at position 5:", torch.equal(answer, lags[:, 6:18]))

# %% [markdown]
# $L^2$ products for every channel, like the attention that we wanted to get away from. The matrix form is faster by a
# constant, and needs $L^2$ numbers of memory on top.
#
# ## The identity: a Toeplitz matrix is a corner of a circle
#
# ### From the line to the circle
#
# Imagine positions not on a line but on a circle of $n$ points, so that after the last comes the first. A matrix that
# asks only for the distance *on the circle*, $C_{ij} = c_{(i-j) \bmod n}$, is called **circulant**. Each of its columns
# is the one before, pushed down by one, and what falls out below comes in again on top.
#
# Our $W$ is no circulant: its first column holds $w_0, w_1, \dots$, and its first row holds something else, $w_0,
# w_{-1}, \dots$ But it is a *corner* of one. Take a circle that is long enough, put $w_0, \dots, w_{L-1}$ at its
# beginning, the negative offsets at its *end* (on a circle, one step back from 0 is $n-1$), and zeros between:
#
# $$c = (\,w_0,\; w_1,\; \dots,\; w_{L-1},\;\; 0, \dots, 0,\;\; w_{-(L-1)},\; \dots,\; w_{-1}\,).$$
#
# In the figure the corner is framed. Look at the two light corners far outside the frame, at the top right and at the
# bottom left: there the band closes into a ring. Why will they do no harm?

# %%
length, n = 8, 18
smooth = torch.exp(-0.5 * ((torch.arange(1 - length, length) + 1) / 3.0) ** 2).double()  # a bell around offset -1
smooth[length - 1] = 1.3  # offset 0, made visible
column = F.pad(smooth, (0, n - 2 * length + 1)).roll(1 - length)
i = torch.arange(n)
circulant = column[(i[:, None] - i) % n]  # (n, n)
corner = circulant[:length, :length]
fits = torch.equal(corner, toeplitz_matrix(smooth))

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.6), width_ratios=[1, 1.7, 1.5])
limit = float(circulant.max())
left.imshow(toeplitz_matrix(smooth).numpy(), vmin=0, vmax=limit)
left.set(title=f"Toeplitz, {length} x {length}", xlabel="j", ylabel="i")
middle.imshow(circulant.numpy(), vmin=0, vmax=limit)
middle.add_patch(plt.Rectangle((-0.5, -0.5), length, length, fill=False, edgecolor=OKABE_ITO["vermilion"], linewidth=3))
middle.set(title=f"circulant, {n} x {n}", xlabel="j", ylabel="i")
for ax in (left, middle):
    ax.grid(False)
right.plot(column, linestyle="", marker="o")
right.vlines(range(n), 0, column, color="#999999", linewidth=1)
right.axvspan(length - 0.5, n - length + 0.5, color="#E8E8E2")
right.set(title="first column of the circulant", xlabel="place on the circle", ylabel="weight", ylim=(-0.05, 1.75))
right.text(0, 1.5, "offsets 0, 1, ..", fontsize="small")
right.text(n - 1, 1.5, ".., -2, -1", fontsize="small", ha="right")
right.text((n - 1) / 2, 1.38, "zeros", fontsize="small", ha="center")
show(
    fig,
    f"""An 8 by 8 Toeplitz matrix; an 18 by 18 circulant matrix whose framed upper left corner equals it:
    {fits}; and the circulant's first column: 8 weights for offsets 0 to 7, then {n - 2 * length + 1} zeros, then 7
    weights for offsets -7 to -1, which stand at the end because on a circle -1 lies one step before 0.""",
)

# %% [markdown]
# Because everything to the right of the frame meets only zeros, and everything below it is thrown away: $Wv$ is the
# first $L$ entries of $C$ times $(v, 0, \dots, 0)$. Append zeros to the values, multiply with the circulant, and cut
# off what is beyond $L$. What have we won by making the matrix larger? Circulant matrices have a gift.
#
# ### Waves are what a circle leaves alone
#
# Send a wave around the circle, $u_j = e^{2\pi\mathrm{i} f j/n}$ with a whole number $f$ of turns. It is closed: it
# meets itself without a seam. Now apply $C$, and count with the distance $s = i-j$ instead of $j$:
#
# $$(Cu)_i = \sum_j c_{(i-j)\bmod n}\; e^{2\pi\mathrm{i} f j/n}
# = \sum_{s=0}^{n-1} c_s\; e^{2\pi\mathrm{i} f (i-s)/n}
# = \underbrace{\Big(\sum_{s=0}^{n-1} c_s\, e^{-2\pi\mathrm{i} f s/n}\Big)}_{\hat c_f}\; u_i .$$
#
# In words: out comes the same wave, multiplied by one complex number $\hat c_f$, which says how much it is amplified
# and how far it is turned. Waves are the *eigenvectors* of **every** circulant matrix; only the eigenvalues $\hat c_f$
# differ from one to the next. And $\hat c$, look at the sum, is nothing but the discrete Fourier transform of the first
# column.
#
# Writing $F$ for the transform (it takes a signal apart into waves), all of this is one line:
#
# $$C = F^{-1}\, \mathrm{diag}(\hat c)\; F .$$
#
# Take apart into waves, multiply each wave by its number, put together again. We check it on the circulant of the last
# figure, wave by wave. In the upper row, look at how little of the matrix remains once it is written in waves, and find
# the same numbers in the spectrum. In the lower row, compare what circle and line make of the same wave.

# %%
f = torch.arange(n)
waves = torch.exp(2j * torch.pi * torch.outer(i, f).to(torch.complex128) / n)  # column f: the wave with f turns
eigenvalues = torch.fft.fft(column)  # (n,)
defect = (circulant.to(waves.dtype) @ waves - eigenvalues * waves).abs().max()
print("C u = c_f u for all 18 waves, error", below(defect, 1e-12))

in_waves = torch.linalg.inv(waves) @ circulant.to(waves.dtype) @ waves  # F C F^-1
beside = (in_waves - torch.diag(torch.diagonal(in_waves))).abs().max()
wave = waves[:, 1].real  # one turn
on_circle = circulant @ wave
on_line = toeplitz_matrix(F.pad(smooth, (n - length, n - length))) @ wave  # the same weights on a line of n points
seam = (on_circle - on_line).abs()

fig, axes = plt.subplot_mosaic(
    [["waves"] * 4 + ["diagonal"] * 4 + ["spectrum"] * 4, ["circle"] * 6 + ["line"] * 6], figsize=(10.5, 6)
)
show_matrix(axes["waves"], waves.real)
axes["waves"].set(title="the waves (real part)", xlabel="turns f", ylabel="position")
axes["diagonal"].imshow(in_waves.abs().numpy())
axes["diagonal"].set(title="the circulant, written in waves", xlabel="wave in (turns)", ylabel="wave out (turns)")
axes["diagonal"].grid(False)
for name in ("waves", "diagonal"):
    axes[name].set(xticks=range(0, n, 5), yticks=range(0, n, 5))
axes["spectrum"].plot(eigenvalues.abs(), linestyle="", marker="o")
axes["spectrum"].vlines(range(n), 0, eigenvalues.abs(), color="#999999", linewidth=1)
axes["spectrum"].set(title="its diagonal: the spectrum", xlabel="turns f", ylabel="|c_f|", xticks=range(0, n, 5))
for name, out in (("circle", on_circle), ("line", on_line)):
    axes[name].plot(wave, color="#999999", marker="", label="wave")
    axes[name].plot(out, label="weights times wave")
    axes[name].set(title=f"one wave on the {name}", xlabel="position", ylim=(-6, 6), xticks=range(0, n, 3))
axes["circle"].legend(fontsize="small", loc="lower left")
show(
    fig,
    f"""Above, left: the 18 waves that fit the circle, one in each column. Middle: absolute values of the
    circulant in the basis of these waves: only the diagonal is not zero (beside it {below(beside, 1e-12)}). Right:
    that diagonal, from {fmt(eigenvalues[0].abs())} for 0 turns down to {fmt(eigenvalues.abs().min())} and, in the
    mirror, up again. Below: a wave of one turn. On the circle comes out the same wave, {fmt(eigenvalues[1].abs())}
    times as high and turned by {fmt(eigenvalues[1].angle().rad2deg())} degrees. On a line of 18 positions with the
    same weights the middle is the same (positions 7 to 10: difference {below(seam[7:11].max(), 1e-9)}), but the
    ends differ by up to {fmt(seam.max())}.""",
)

# %% [markdown]
# The line has ends, at which a wave stops being a wave; that is why a Toeplitz matrix itself is *not* diagonal in any
# basis that fits all of them. The circle has no ends. So we go to the circle, and back.
#
# ### How many points?
#
# How long must the circle be? Every offset from $-(L-1)$ to $L-1$ needs a place of its own: that makes $2L-1$ places.
# On a shorter circle two offsets share a place, and what lies far behind is mistaken for what lies ahead: the signal
# *wraps around*. Below, a pulse near the end of 40 positions, and weights that fade slowly into the past and are 0 for
# the future. On the left, look at the beginning of the sequence, before anything has happened. On the right, look for
# the first $n$ without an error.

# %%
length = 40
slow_fade = torch.cat([torch.zeros(length - 1), 0.93 ** torch.arange(length)])[None].double()  # only the past
pulse = torch.zeros(1, length, 1, 1, dtype=torch.float64)
pulse[0, 30:33] = 1
two_sided, anything = random_case(1, length, 1, 1)


def on_a_circle(lags, v, n):
    """The product on a circle of n >= L points; offsets that fall onto the same place add up."""
    length = v.shape[1]
    place = torch.arange(1 - length, length) % n
    column = torch.zeros(lags.shape[0], n, dtype=lags.dtype).index_add(1, place, lags)
    spectrum = torch.fft.rfft(v, n=n, dim=1) * torch.fft.rfft(column).T[None, :, :, None]
    return torch.fft.irfft(spectrum, n=n, dim=1)[:, :length]


points = range(length, 2 * length + 8)
wrong = [(on_a_circle(two_sided, anything, n) - toeplitz_slow(two_sided, anything)).abs().max().item() for n in points]
enough = next(n for n, error in zip(points, wrong, strict=True) if error < 1e-9)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for n, style in ((length, "--"), (length + 12, "-."), (2 * length - 1, "-")):
    left.plot(on_a_circle(slow_fade, pulse, n)[0, :, 0, 0], linestyle=style, label=f"n = {n}")
left.axvspan(29.5, 32.5, color="#E8E8E2", label="the pulse")
left.set(title="a pulse, read by the past only", xlabel="position (steps)", ylabel="output")
left.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0.28, 1))
right.plot(points, np.maximum(wrong, 1e-16))
right.axvline(2 * length - 1, color=OKABE_ITO["vermilion"], linestyle=":", label="2L - 1")
right.set(
    yscale="log", title="largest error, weights for both directions", xlabel="points on the circle n", ylabel="error"
)
right.legend(fontsize="small")
early = {n: on_a_circle(slow_fade, pulse, n)[0, :29, 0, 0].max() for n in (40, 52, 79)}
show(
    fig,
    f"""Left: weights that read the past only meet a pulse at positions 30 to 32 of 40. Before the pulse the output is
    up to {fmt(early[40])} on a circle of 40 points, up to {fmt(early[52])} on one of 52, and {below(early[79], 1e-12)}
    on one of 79. Right: with weights in both directions the largest error against the slow version is at least
    {fmt(min(wrong[: enough - length]))} up to n = {enough - 1} and vanishes at n = {enough}; that is 2L-1:
    {enough == 2 * length - 1}.""",
)

# %% [markdown]
# Exactly $2L-1$, no sooner. A causal bias has only $L$ weights, and still needs the same circle: with $n < 2L-1$ the
# offset $L-1$ would stand where position 0 looks for something *ahead* of it. Zeros on the circle are not waste; they
# are the guarantee that nobody lives there.
#
# ## The fast version
#
# Everything together. One FFT of the weights, one of the values, a product, one FFT back.


# %%
def toeplitz_fast(lags, v, causal=False):
    """lags (H, 2L-1), v (B, L, H, d) -> (B, L, H, d): the same as toeplitz_slow."""
    length = v.shape[1]
    n = good_length(2 * length - 1)  # at least 2L-1 points, and a length that an FFT likes
    if causal:
        lags = torch.cat([torch.zeros_like(lags[:, : length - 1]), lags[:, length - 1 :]], dim=1)
    circle = F.pad(lags, (0, n - 2 * length + 1)).roll(1 - length, -1)  # (H, n): offset 0 first, -1 last
    spectrum = torch.fft.rfft(circle)[:, None]  # (H, 1, n/2 + 1)
    rows = v.permute(0, 2, 3, 1)  # (B, H, d, L): the FFT is fastest along the last axis
    y = torch.fft.irfft(torch.fft.rfft(rows, n=n) * spectrum, n=n)[..., :length]
    return y.permute(0, 3, 1, 2)  # (B, L, H, d)


lags, v = random_case(batch=2, length=12, heads=3, width=4)
print("fast = slow, error", below((toeplitz_fast(lags, v) - toeplitz_slow(lags, v)).abs().max(), 1e-12))
past = toeplitz_slow(lags * (torch.arange(23) >= 11), v)
print("causal: negative offsets dropped, error", below((toeplitz_fast(lags, v, causal=True) - past).abs().max(), 1e-12))

# %% [markdown]
# `rfft` is the transform of *real* signals: half of the waves suffice, since the other half are their mirror images.
# And the transform of the weights is done once per head and serves every sequence and channel: of $B \cdot H \cdot d +
# H$ transforms only $H$ are for the weights.
#
# The authors' code has a flag for the causal form, too, but in its FFT path it zeroes the wrong axis and changes
# nothing; ours drops the negative offsets.
#
# ### Full, symmetric, causal
#
# How many weights does a head need for up to $N$ positions? *Full*: one for each offset, $2N-1$. *Symmetric*: one for
# each distance, $w_{|i-j|}$, so $N$; such a head cannot tell left from right. *Causal*: $N$, for the past and the
# present. The module `FastRPB` offers all three, and starts, like the authors', with weights that are almost zero: at
# first the bias says nothing, and has to be learned.
#
# What a head cannot say shows in the spectrum. If $w_{-s} = w_s$, the imaginary parts of the sum $\hat c_f$ cancel in
# pairs: the eigenvalues are *real*, so each wave is made larger or smaller, perhaps turned upside down, and never
# *moved*. A symmetric head can smooth and sharpen, but it cannot shift.

# %%
torch.manual_seed(0)
for options in ({}, {"symmetric": True}, {"causal": True}):
    module = FastRPB(heads=2, max_length=64, **options).double()
    nn.init.normal_(module.weight)
    with torch.no_grad():
        circle = F.pad(module.lags(64), (0, 1)).roll(1 - 64, -1)
        imaginary = torch.fft.rfft(circle).imag.abs().max().item()
    kind = next(iter(options), "full")
    print(f"{kind:9}  weights per head: {module.weight.shape[1]:3}   spectrum real: {imaginary < 1e-9}")
fresh = FastRPB(heads=2, max_length=64)
print("largest weight of a fresh module", below(fresh.weight.detach().abs().max(), 1e-3))

# %% [markdown]
# Lengths: a sequence shorter than $N$ uses the offsets around the middle. A longer one gets weight 0 for offsets that
# were never learned: the bias then has a horizon, and does not invent anything behind it.

# %%
with torch.no_grad():
    module = FastRPB(heads=2, max_length=64).double()
    nn.init.normal_(module.weight)
    middle, beyond = module.lags(10), module.lags(100)
print("10 tokens use the 19 weights around the middle:", torch.equal(middle, module.weight[:, 63 - 9 : 63 + 10]))
print("100 tokens: offsets of 64 and more weigh", fmt(beyond[:, :36].abs().max() + beyond[:, -36:].abs().max()))

# %% [markdown]
# ### One step at a time
#
# A causal bias can stream: `step` takes the value of one token and a state. But mind what that state is. An EMA (01) or
# a state space (02) folds the whole past into a few numbers, because its kernel is a sum of a few exponentials. A list
# of $N$ *free* weights has no such structure: to apply $w_{50}$ one needs the very value that came 50 steps ago. So the
# state is a window of the last $N-1$ values, and a step costs $N$ products a channel. It is constant, but it is not
# small.

# %%
torch.manual_seed(0)
module = FastRPB(heads=2, max_length=16, causal=True).double()
nn.init.normal_(module.weight)
v = torch.randn(3, 40, 2, 4, dtype=torch.float64)
with torch.no_grad():
    state, stream, sizes = module.initial_state(batch=3), [], set()
    for t in range(40):
        y_t, state = module.step(v[:, t], state)
        stream.append(y_t)
        sizes.add(tuple(state.shape))
    print("streaming = parallel, error", below((torch.stack(stream, dim=1) - module(v)).abs().max(), 1e-12))
print("shape of the state after every one of 40 steps, (batch, N-1, heads, width):", sizes)

# %% [markdown]
# ## They agree: values and gradients
#
# Fast against slow in double precision, at awkward lengths, with the gradients of one fixed random combination of all
# outputs.


# %%
def values_and_gradients(form, lags, v):
    """y, then the gradients with respect to lags and v."""
    inputs = [lags.clone().requires_grad_(), v.clone().requires_grad_()]
    y = form(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


print(f"{'length':>6}  largest relative error of y, of the gradient of the lags, of the gradient of v")
for length in (1, 2, 31, 67):
    case = random_case(2, length, 3, 2, seed=length)
    slow, fast = values_and_gradients(toeplitz_slow, *case), values_and_gradients(toeplitz_fast, *case)
    errors = [((s - f).abs().max() / s.abs().max().clamp(min=1)).item() for s, f in zip(slow, fast, strict=True)]
    print(f"{length:6d}  all three {below(max(errors), 1e-11)}")

# %% [markdown]
# ### What the gradients are
#
# Autograd found them; what *are* they? Let $g_i = \partial\ell/\partial y_i$ be what comes back from the loss. From
# $y_i = \sum_j w_{i-j} v_j$,
#
# $$\frac{\partial \ell}{\partial v_j} = \sum_i w_{i-j}\, g_i, \qquad\qquad
# \frac{\partial \ell}{\partial w_s} = \sum_{b,\,d}\;\sum_{i-j=s} g_i\, v_j .$$
#
# In words. The gradient of a *value* is a Toeplitz product again, with the offsets turned round: what was read from
# behind now hands its blame back behind. The gradient of a *weight* collects all pairs of positions that lie $s$ apart,
# in every sequence and every channel of the head: how well does the blame here go with the value $s$ steps before? That
# is a **correlation**, and correlations are products of spectra too, one of them conjugated. So learning costs $L \log
# L$ like everything else here. (You write it in exercise 5.)

# %%
lags, v = random_case(batch=2, length=12, heads=3, width=4)
_, of_lags, of_v = values_and_gradients(toeplitz_fast, lags, v)
g = torch.randn(v.shape, generator=torch.Generator().manual_seed(3), dtype=v.dtype)  # as in values_and_gradients
turned = toeplitz_fast(lags.flip(-1), g)
pairs = torch.stack(
    [sum((g[:, i] * v[:, i - s]).sum((0, 2)) for i in range(12) if 0 <= i - s < 12) for s in range(-11, 12)], dim=-1
)  # (H, 2L-1)
print("gradient of v    = the product with the offsets turned round, error", below((turned - of_v).abs().max(), 1e-12))
print("gradient of lags = the correlation of g and v, error", below((pairs - of_lags).abs().max(), 1e-12))

# %% [markdown]
# ## How it grows
#
# The matrix and the FFT, forward and backward, on one core: processor time of the fastest of several runs, and the peak
# of memory. Both axes are logarithmic; look at the slopes. (The matrix stops at 2,048 positions, where it begins to
# hurt.)

# %%
width = 8


def learn_once(form, length):
    """One forward and backward pass of one sequence with one head, as a function to measure."""
    lags, v = (t.float().requires_grad_() for t in random_case(1, length, 1, width))
    return lambda: torch.autograd.grad(form(lags, v).sum(), (lags, v))


lengths = {"matrix": [256, 512, 1024, 2048], "FFT": [1024, 4096, 16384, 65536]}
forms = {"matrix": toeplitz_product_dense, "FFT": toeplitz_product}
seconds = {name: [quickest(learn_once(forms[name], size)) for size in lengths[name]] for name in forms}
memory = {name: [peak_memory(learn_once(forms[name], size)) for size in lengths[name]] for name in forms}
time_growth = {name: growth_exponent(lengths[name], seconds[name]).exponent for name in forms}
memory_growth = {name: growth_exponent(lengths[name], memory[name]).exponent for name in forms}

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for name in forms:
    left.plot(lengths[name], [1e3 * s for s in seconds[name]], label=f"{name}: ~ length^{time_growth[name]:.1f}")
    right.plot(lengths[name], [m / 2**20 for m in memory[name]], label=f"{name}: ~ length^{memory_growth[name]:.1f}")
for ax, what in ((left, "time (ms)"), (right, "peak memory (MiB)")):
    ax.set(xscale="log", yscale="log", xlabel="length (steps)", ylabel=what)
    ax.set_xticks([256, 1024, 4096, 16384, 65536], ["256", "1,024", "4,096", "16,384", "65,536"])
    ax.minorticks_off()
    ax.legend()
facts = {
    "time of the matrix grows about quadratically": 1.5 < time_growth["matrix"] < 2.7,
    "time of the FFT about linearly": 0.6 < time_growth["FFT"] < 1.4,
    "memory of the matrix grows quadratically": 1.8 < memory_growth["matrix"] < 2.1,
    "memory of the FFT linearly": 0.9 < memory_growth["FFT"] < 1.1,
    "at 1,024 positions the FFT is at least three times faster": 3 * seconds["FFT"][0] < seconds["matrix"][2],
    "at 65,536 positions the FFT takes less memory than the matrix at 2,048": memory["FFT"][-1] < memory["matrix"][-1],
}
show(
    fig,
    "Time and peak memory of one forward and backward pass against the length, logarithmic, for one head of 8 "
    "channels. " + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items()) + ".",
)

# %% [markdown]
# (Part of the matrix's time is writing it down and, on the way back, adding $L^2$ derivatives up into $2L-1$ numbers.
# Whoever writes the matrix pays for that.)
#
# ### Lengths that an FFT likes
#
# An FFT is fast because it splits its length into factors: 4096 points are twelve splits in two. A length with a large
# prime factor cannot be split all the way, and takes a detour that costs several times as much. $2L-1$ is odd, and
# often prime. But nobody forces us to use exactly $2L-1$ points: *more* zeros do no harm. `good_length` takes the next
# even number without a prime factor above 5. Look at 20 neighbouring lengths, computed with exactly $2L-1$ points and
# with a good number of points. The numbers at the points are the largest prime factors of $2L-1$.

# %%
neighbours = list(range(4090, 4110))


def product_with(n, length):
    """The product with an FFT of n points, as a function to measure."""
    lags, v = (t.float() for t in random_case(1, length, 1, 16))

    def run():
        circle = F.pad(lags, (0, n - 2 * length + 1)).roll(1 - length, -1)
        rows = v.permute(0, 2, 3, 1)
        return torch.fft.irfft(torch.fft.rfft(rows, n=n) * torch.fft.rfft(circle)[:, None], n=n)[..., :length]

    return run


exact = [1e3 * quickest(product_with(2 * size - 1, size), patience=0.02) for size in neighbours]
rounded = [1e3 * quickest(product_with(good_length(2 * size - 1), size), patience=0.02) for size in neighbours]


def largest_prime(number):
    """The largest prime factor."""
    factor, largest = 2, 1
    while number > 1:
        while number % factor == 0:
            number, largest = number // factor, factor
        factor += 1
    return largest


primes = [largest_prime(2 * size - 1) for size in neighbours]
fig, ax = plt.subplots(figsize=(9, 3.4))
ax.plot(neighbours, exact, label="exactly 2L - 1 points")
ax.plot(neighbours, rounded, label="good_length(2L - 1) points")
for size, milliseconds, prime in zip(neighbours, exact, primes, strict=True):
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8}  # the line may pass behind
    place = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
    ax.annotate(str(prime), (size, milliseconds), fontsize=7, bbox=box, **place)
ax.set(xlabel="length L (steps)", ylabel="time (ms)", ylim=(0, 1.2 * max(exact)), xticks=neighbours[::2])
ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
show(
    fig,
    f"""Time of one product for 20 neighbouring lengths, with exactly 2L-1 points, and with a good number of
    points, here {" or ".join(map(str, sorted({good_length(2 * size - 1) for size in neighbours})))}. The largest
    prime factors of 2L-1 go from {min(primes)} to {max(primes)}. The exact length takes, in the median of the 20,
    more than one and a half times as long as the good one: {np.median(exact) > 1.5 * np.median(rounded)}.""",
)

# %% [markdown]
# Which prime it is hardly matters: nearly every length takes the same detour. The jump after 4,096 fits a detour over a
# power of two of points, at least twice $2L-1$, which doubles there. Rounding up is a gain for free: it changes no result,
# and costs a few percent more zeros (in short sequences a tenth, or a handful).

# %% [markdown]
# ## Why this is fast
#
# Count the operations for one channel. A real FFT of $n$ numbers takes about $\tfrac52\, n \log_2 n$ of them. We
# need one there and one back, and $3n$ for the product of the waves; with $n \approx 2L$ that makes, for each of the
# $L$ numbers,
#
# $$10 \log_2 (2L) + 6 \quad\text{operations for the FFT, against}\quad 2L \quad\text{for the matrix.}$$
#
# (The weights' own transform is shared by all sequences and all channels of a head.) And the bytes: the least that
# any method must do is to read $v$ and to write $y$, 8 bytes a number. The FFT does more. The padded values, their
# waves, the product and the padded result are four tensors of twice the length, each of them written once and read
# once: 64 bytes. The matrix reads little but itself, $4L^2$ bytes.

# %%
print(f"{'length':>7}  operations for each number: FFT, matrix, matrix/FFT")
for length in (128, 4096, 65536):
    n = good_length(2 * length - 1)
    by_fft = (5 * n * np.log2(n) + 3 * n) / length
    print(f"{length:7,d}  {by_fft:.0f}, {2 * length:,d}, {fmt(2 * length / by_fft)}")

# %% [markdown]
# Do not expect the clock to repeat these ratios. A processor multiplies matrices at full speed; an FFT has to fetch its
# partners from ever farther away, and gets through fewer operations a second. So the honest **floor** here is neither the
# matrix rate nor the bandwidth, but the FFT itself: a bare `rfft` and `irfft` of as many rows of $n$ numbers, lying
# ready in memory, padded. Whatever we do, we pay that. What we can save is what stands *around* it, and that is, above
# all, **turning** the values: they come as $(B, L, H, d)$, and the FFT wants positions last. Three ways:


# %%
def along_time(lags, v):
    """No turning: the FFT runs along axis 1 as it is. As one would write it first."""
    length = v.shape[1]
    n = good_length(2 * length - 1)
    circle = F.pad(lags, (0, n - 2 * length + 1)).roll(1 - length, -1)  # (H, n)
    waves = torch.fft.rfft(v, n=n, dim=1) * torch.fft.rfft(circle).T[None, :, :, None]
    return torch.fft.irfft(waves, n=n, dim=1)[:, :length]


def turned_in_tiles(lags, v, tile=128):
    """Turned 128 positions at a time, right to the place in the padded rows."""
    batch, length, heads, width = v.shape
    n = good_length(2 * length - 1)
    circle = F.pad(lags, (0, n - 2 * length + 1)).roll(1 - length, -1)  # (H, n)
    rows = v.new_zeros(batch, heads, width, n)
    for t in range(0, length, tile):
        rows[..., t : min(t + tile, length)] = v[:, t : t + tile].permute(0, 2, 3, 1)
    y = torch.fft.irfft(torch.fft.rfft(rows) * torch.fft.rfft(circle)[:, None], n=n)[..., :length]
    return y.permute(0, 3, 1, 2)


ways = {"along time": along_time, "turned as a whole": toeplitz_fast, "turned in tiles": turned_in_tiles}
case = random_case(batch=2, length=300, heads=2, width=3)
dense = values_and_gradients(toeplitz_product_dense, *case)
for name, form in ways.items():
    found = values_and_gradients(form, *case)
    error = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(dense, found, strict=True))
    print(f"{name}: y and both gradients equal the matrix's, error", below(error, 1e-11))

# %% [markdown]
# Now the clock, one core, no gradients. On the left, look for two things: where the matrix (here *ready made*, only the
# product is timed) crosses the FFTs, and how far these stay above the dotted floor. On the right, forward *and* backward:
# the fast version of this chapter, left to autograd, against the package's.

# %%
heads, width, count = 4, 16, [128, 512, 2048, 8192, 32768]  # 64 channels


def turns(length, rows=heads * width):
    """The floor, as a function to measure: transform as many padded rows there and back, and nothing else."""
    n = good_length(2 * length - 1)
    ready = torch.randn(rows, n)
    return lambda: torch.fft.irfft(torch.fft.rfft(ready), n=n)


spent = {name: [] for name in ("matrix, ready made", *ways, "the package", "floor")}
for length in count:
    lags, v = (t.float() for t in random_case(1, length, heads, width))
    for name, form in {**ways, "the package": toeplitz_product}.items():
        spent[name].append(quickest(lambda f=form, a=lags, b=v: f(a, b), patience=0.09))
    spent["floor"].append(quickest(turns(length), patience=0.09))
    if length <= 2048:
        matrix, columns = toeplitz_matrix(lags), v[0].transpose(0, 1).contiguous()  # (H, L, L), (H, L, d)
        spent["matrix, ready made"].append(quickest(lambda a=matrix, b=columns: a @ b, patience=0.09))
nanoseconds = {
    name: [1e9 * s / (heads * width * size) for s, size in zip(times, count, strict=False)]
    for name, times in spent.items()
}
square = torch.randn(1024, 1024)
matrix_rate = 2 * 1024**3 / quickest(lambda: square @ square)
points = good_length(2 * 2048 - 1)
fft_rate = heads * width * 5 * points * np.log2(points) / spent["floor"][2]

longest = count[-1]
lags, v = (t.float().requires_grad_() for t in random_case(1, longest, heads, width))
from_above = torch.randn(1, longest, heads, width)


def there_and_back(form):
    """Forward and backward, as a function to measure."""
    return lambda: torch.autograd.grad(form(lags, v), (lags, v), from_above)


learning = {
    name: 1e3 * quickest(there_and_back(form))
    for name, form in {"turned as a whole, autograd": toeplitz_fast, "the package": toeplitz_product}.items()
}
learning["floor: two there and back"] = 2e3 * quickest(turns(longest))

fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=[1.6, 1])
for name, times in nanoseconds.items():
    style = {"color": "black", "linestyle": ":", "marker": ""} if name == "floor" else {}
    left.plot(count[: len(times)], times, label=name, **style)
left.set(xscale="log", yscale="log", xlabel="length (steps)", ylabel="nanoseconds for each number")
left.set_xticks(count, [f"{size:,}" for size in count])
left.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
left.minorticks_off()
left.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))
right.barh(range(3), learning.values(), height=0.5, color=[OKABE_ITO["orange"], OKABE_ITO["blue"], "#999999"])
right.set(yticks=[], xlabel="time (ms)", title=f"forward and backward, {longest:,} steps", ylim=(2.5, -0.75))
for row, name in enumerate(learning):
    right.text(0, row - 0.27, name, fontsize="small", va="bottom")
ready, package, whole, tiles = (
    nanoseconds[name] for name in ("matrix, ready made", "the package", "turned as a whole", "turned in tiles")
)
facts = {
    "a matrix product does more operations a second than the FFT": matrix_rate > fft_rate,
    "at 128 positions the ready matrix takes at most twice the package's time": ready[0] < 2 * package[0],
    "at 2,048 positions it takes more": ready[2] > package[2],
    "from 2,048 positions on the package stays within ten times of the floor": all(
        p < 10 * f for p, f in zip(package[2:], nanoseconds["floor"][2:], strict=True)
    ),
    "at 32,768 positions turning in tiles takes at most 1.5 times as long as turning as a whole": tiles[-1]
    < 1.5 * whole[-1],
    "there with gradients the package takes less time than autograd": learning["the package"]
    < learning["turned as a whole, autograd"],
}
show(
    fig,
    "Left: time for each number against the length, 64 channels in 4 heads: a ready matrix, the FFT along time, turned "
    "as a whole, turned in tiles, the package, and the floor of bare transforms. Right: forward and backward, left to "
    "autograd and by the package, and their floor. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# Below some hundred positions the matrix, once it is there, is several times faster: do not bother with an FFT. From then
# on its line rises with the length, and the FFTs' far more slowly.
#
# What brought most? For awkward lengths, `good_length`, as seen above. For all others it is the turning. Along time,
# the FFT's neighbours lie 64 numbers apart, and in a long sequence it works far from its floor. Turned as a whole, it
# works close together; but then the turning jumps. For each number it fetches a whole line of memory, which holds the
# neighbouring channels too, and in a long sequence that line has left the cache again when those are wanted. 128
# positions of 64 channels fit the cache, so tiles fetch each line once. In short sequences, which fit the cache anyway,
# there is nothing to win.
#
# The package's form is the third one: on a CPU it turns 512 positions at a time, so that the longer lines of its copies
# make up for a larger share of the cache. In short sequences it is a little slower than the plain forms; it pays in long
# ones, and with gradients.
#
# With gradients a second step counts. Autograd takes an `rfft` back by a *complex* transform of all $n$ waves,
# half of them zeros, and throws the imaginary part away. But we know what the gradients are: a product with the
# offsets turned round, and a correlation. Both are real transforms again. So the package has one `circular_convolution`
# with a backward pass written like that, which turns in tiles in both directions; `toeplitz_product` and the
# `long_convolution` of chapter 01 are a few lines around it. (Only the full bias of an image, below, is left to autograd.)
# Less is kept on the way, too:

# %%
for name, form in {"left to autograd": toeplitz_fast, "the package": toeplitz_product}.items():
    print(
        f"{name + ',':17} there and back, peak memory in sizes of v:",
        fmt(peak_memory(there_and_back(form)) / (4 * v.numel())),
    )

# %% [markdown]
# ## Images: two distances
#
# A picture of $X \times Y$ pixels, read row after row, is a sequence of $XY$ tokens, and there the one-dimensional
# distance is a poor thing: the pixel just below is $Y$ steps away. A pixel has *two* offsets, $x-x'$ and $y-y'$.
#
# **As published**, the bias of an image is *separable*: one list of weights serves both axes, and the two are
# **added**:
#
# $$W_{(x,y),\,(x',y')} = w_{x-x'} + w_{y-y'} .$$
#
# Put that into the sum. The first part does not ask for $y'$, so it meets the whole row $x'$ at once, that is, its sum;
# the second meets the sums of the columns:
#
# $$\mathrm{out}_{x,y} \;=\; \sum_{x'} w_{x-x'} \Big(\sum_{y'} v_{x',y'}\Big) \;+\; \sum_{y'} w_{y-y'} \Big(\sum_{x'} v_{x',y'}\Big).$$
#
# Two short products, of length $X$ and of length $Y$: hardly more than adding up the pixels. (You write it in exercise
# 4.)
#
# **In full**, every pair of offsets has a weight of its own, $w_{x-x',\,y-y'}$. As a matrix that is Toeplitz twice
# over, a Toeplitz matrix of Toeplitz blocks, and the whole argument of this chapter goes through with a *torus* in
# place of the circle: pad both axes, roll both axes, and take a two-dimensional FFT.


# %%
def toeplitz_2d_full(lags, v):
    """lags (H, 2X-1, 2Y-1), v (B, X, Y, H, d) -> (B, X, Y, H, d)."""
    x, y = v.shape[1:3]
    size = good_length(2 * x - 1), good_length(2 * y - 1)
    torus = F.pad(lags, (0, size[1] - 2 * y + 1, 0, size[0] - 2 * x + 1)).roll((1 - x, 1 - y), (-2, -1))
    planes = v.permute(0, 3, 4, 1, 2)  # (B, H, d, X, Y)
    out = torch.fft.irfft2(torch.fft.rfft2(planes, s=size) * torch.fft.rfft2(torus)[:, None], s=size)
    return out[..., :x, :y].permute(0, 3, 4, 1, 2)


g = torch.Generator().manual_seed(0)
v = torch.randn(2, 5, 7, 3, 4, generator=g, dtype=torch.float64)
full = torch.randn(3, 9, 13, generator=g, dtype=torch.float64)
rows, columns = (
    torch.randn(3, 9, generator=g, dtype=torch.float64),
    torch.randn(3, 13, generator=g, dtype=torch.float64),
)
dense = toeplitz_product_2d_full_dense(full, v)
print("2-D FFT = all pairs of pixels written out, error", below((toeplitz_2d_full(full, v) - dense).abs().max(), 1e-11))
apart = toeplitz_product_2d(rows, v, columns) - toeplitz_product_2d_dense(rows, v, columns)
print("separable: two short products = all pairs written out, error", below(apart.abs().max(), 1e-11))
as_full = toeplitz_2d_full(rows[:, :, None] + columns[:, None], v) - toeplitz_product_2d(rows, v, columns)
print("separable = full with w[dx, dy] = w[dx] + w[dy], error", below(as_full.abs().max(), 1e-11))

# %% [markdown]
# What is lost by the sum? In the upper row of the figure you see weights, over the offsets $(x-x', y-y')$: a separable
# bias is always a sum of horizontal and vertical *stripes* (a cross, if the list has a single spike), the full one is
# whatever you like. Below, what each makes of a drawn "5". Look at how much of the 5 is left in the first.

# %%
side = 28
picture = drawing(side)
offset = torch.arange(1 - side, side)
dx, dy = offset[:, None], offset[None]
line = drawn_lags("shift", {}, side)
near = ((dx**2 + dy**2).double() / -4.0).exp()
wide = ((dx**2 + dy**2).double() / -16.0).exp()
weights = {
    "separable: shift by 8": line[:, None] + line,
    "full: shift by (5, -6)": ((dx == 5) & (dy == -6)).double(),
    "full: blur": wide / wide.sum(),
    "full: contrast": near / near.sum() - wide / wide.sum(),
}
v = picture[None, :, :, None, None]
results = {name: toeplitz_product_2d_full(w[None], v)[0, :, :, 0, 0] for name, w in weights.items()}
published = toeplitz_product_2d(line[None], v)[0, :, :, 0, 0]
same = (published - results["separable: shift by 8"]).abs().max()
shifted = torch.zeros_like(picture)
shifted[5:, :-6] = picture[:-5, 6:]
moved = (results["full: shift by (5, -6)"] - shifted).abs().max()

fig, axes = plt.subplots(2, 5, figsize=(11, 4.6))
axes[0, 0].imshow(picture.numpy())
axes[0, 0].set(title="the picture")
axes[1, 0].plot(picture.sum(1), marker="", label="of rows")
axes[1, 0].plot(picture.sum(0), marker="", linestyle="--", label="of columns")
axes[1, 0].set(title="its sums", xlabel="x or y", ylabel="sum")
axes[1, 0].legend(fontsize="x-small", loc="upper right")
axes[1, 0].set_ylim(0, 1.6 * float(picture.sum(1).max()))
for (upper, lower), (name, w) in zip(axes.T[1:], weights.items(), strict=True):
    show_matrix(upper, w[side - 13 : side + 12, side - 13 : side + 12], extent=(-12.5, 12.5, 12.5, -12.5))
    upper.set(title=name, xlabel="y - y'", ylabel="x - x'" if "separable" in name else "")
    lower.imshow(results[name].numpy())
for ax in (axes[0, 0], *axes[1, 1:]):
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
spread = results["separable: shift by 8"]
rank = int(torch.linalg.matrix_rank(spread))
show(
    fig,
    f"""Left: a drawn 5 of 28 by 28 pixels, and the sums of its rows and of its columns. Then four lists of
    weights over both offsets, and their results. Separable, a shift by 8: the weights are a cross of two lines, the
    result only vertical and horizontal stripes: the sums of rows and columns, moved by 8 (as a matrix it has rank
    {rank}). Full, a shift: the 5 has moved 5 down and 6 to the left, error {below(moved, 1e-12)}. Full, blur: a
    soft 5. Full, contrast: a narrow bell minus a wide one; the 5 now has a dark seam, down to
    {fmt(results["full: contrast"].min())}, around strokes of {fmt(results["full: contrast"].max())}.""",
)
print("two short products (as published) = the first of the four, error", below(same, 1e-9))

# %% [markdown]
# The separable form never sees the picture, only its shadows on two walls: the sums of rows and columns. Two pictures
# with the same shadows are one to it, and such pictures are easy to find: the two diagonals of a square.

# %%
slash, backslash = torch.eye(8).flip(0).double(), torch.eye(8).double()
torch.manual_seed(0)
some_line, some_plane = torch.randn(1, 15).double(), torch.randn(1, 15, 15).double()
views = {
    "separable": [toeplitz_product_2d(some_line, s[None, :, :, None, None]) for s in (slash, backslash)],
    "full": [toeplitz_product_2d_full(some_plane, s[None, :, :, None, None]) for s in (slash, backslash)],
}
for name, (first, second) in views.items():
    print(f"{name:9}  / and \\ look the same, for random weights:", bool((first - second).abs().max() < 1e-9))
print(f"weights per head for 32 x 32 pixels: separable {2 * 32 - 1}, full {(2 * 32 - 1) ** 2:,}")

# %% [markdown]
# Is it useless, then? No. It costs almost nothing, in time and in weights, and it does not stand alone: the attention
# beside it looks at contents. "How much ink is there in the row above me?" is a useful thing to know, and the sum of
# rows says it.
#
# ## Beside attention: what it can do, and what only attention can
#
# Now a small and honest experiment. Sequences of 48 tokens, each with a *colour*, one of eight. In each sequence every
# colour has a *secret*, one of eight symbols, drawn afresh; one token of that colour, anywhere, shows it. Every token
# is asked two questions:
#
# - **Shift**: what was the colour 5 tokens back? The answer depends on the distance, and on nothing else.
# - **Recall**: what is the secret of your colour? The answer depends on contents; where it was shown can be anywhere.
#
# The model is a single layer: an embedding (of colour plus what is shown, so a token does *not* know its own secret
# unless it shows it), values, attention and/or bias, and a small read-out. There are no position embeddings. Chance is
# one in eight.

# %%
COLOURS, SECRETS, BACK, LENGTH = 8, 8, 5, 48


def sequences(batch, length, generator):
    """colour and shown secret (B, L), and both answers (B, L); -100 where there is no answer."""
    colour = torch.randint(COLOURS, (batch, length), generator=generator)
    secret = torch.randint(SECRETS, (batch, COLOURS), generator=generator)
    lottery = torch.rand(batch, length, generator=generator)
    shows = torch.zeros(batch, length, dtype=torch.bool)
    for c in range(COLOURS):  # one token of each colour draws the lot
        winner = torch.where(colour == c, lottery, 2.0).argmin(1)
        shows[torch.arange(batch), winner] = True
    mine = secret.gather(1, colour)
    return colour, torch.where(shows, mine, SECRETS), F.pad(colour, (BACK, 0), value=-100)[:, :length], mine


class Reader(nn.Module):
    """One layer: values read by attention, by the bias, or by both."""

    def __init__(self, attention=None, bias=True, heads=4, width=8):
        super().__init__()
        self.heads, self.width, self.attention, dim = heads, width, attention, heads * width
        self.colour, self.shown = nn.Embedding(COLOURS, dim), nn.Embedding(SECRETS + 1, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = FastRPB(heads, LENGTH) if bias else None
        self.out, self.answers = nn.Linear(2 * dim, dim), nn.Linear(dim, COLOURS + SECRETS)

    def forward(self, colour, shown):
        x = self.colour(colour) + self.shown(shown)  # (B, L, D)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.width)).unbind(2)  # each (B, L, H, d)
        read = torch.zeros_like(v)
        if self.attention is not None:
            read = read + self.attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        if self.bias is not None:
            read = read + self.bias(v)  # this line is the whole of FastRPB
        hidden = F.gelu(self.out(torch.cat([x, read.flatten(2)], dim=-1)))
        return self.answers(hidden).split([COLOURS, SECRETS], dim=-1)


def marks(model, length, seed=100):
    """Share of right answers, (shift, recall), on fresh sequences."""
    colour, shown, back, mine = sequences(200, length, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        shift, recall = (logits.argmax(-1) for logits in model(colour, shown))
    asked = back >= 0
    return (shift == back)[asked].float().mean().item(), (recall == mine).float().mean().item()


def train(updates=160, **options):
    """A Reader after so many updates of Adam."""
    torch.manual_seed(0)
    model, g = Reader(**options), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(updates):
        colour, shown, back, mine = sequences(32, LENGTH, g)
        shift, recall = model(colour, shown)
        loss = F.cross_entropy(shift.flatten(0, 1), back.flatten()) + F.cross_entropy(
            recall.flatten(0, 1), mine.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def linear(q, k, v):
    return linear_attention(q, k, v, sikf_features)


readers = {
    "linear attention": train(attention=linear, bias=False),
    "bias": train(bias=True),
    "linear attention + bias": train(attention=linear, bias=True),
    "softmax attention + bias": train(attention=attend, bias=True),
}

# %% [markdown]
# Left, the share of right answers after 160 updates; the dotted line is chance. Look for bars that stay near it. Right,
# what the four heads of "linear attention + bias" have learned: where is the spike?

# %%
scores = {name: marks(model, LENGTH) for name, model in readers.items()}
with torch.no_grad():
    learned = readers["linear attention + bias"].bias.lags(LENGTH)  # (H, 2L-1)
spikes = learned.abs().argmax(-1) - (LENGTH - 1)

fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8), width_ratios=[1.35, 1])
at = np.arange(4)
left.bar(at - 0.2, [s for s, _ in scores.values()], 0.36, label="shift (distance)")
left.bar(at + 0.2, [r for _, r in scores.values()], 0.36, label="recall (contents)", hatch="//")
left.axhline(1 / 8, color="black", linestyle=":", label="chance")
left.set(xticks=at, ylim=(0, 1.35), ylabel="share of right answers")
left.set_xticks(at, ["linear\nattention", "bias", "linear\nattention\n+ bias", "softmax\nattention\n+ bias"])
left.legend(fontsize="small", ncols=3, loc="upper left")
for head in range(4):
    right.plot(range(-12, 13), learned[head, LENGTH - 13 : LENGTH + 12], label=f"head {head}")
right.axvline(BACK, color="#999999", linestyle=":")
right.set(title="learned weights", xlabel="offset i - j (steps)", ylabel="w")
right.legend(fontsize="small")
facts = {
    "linear attention alone answers 95 % of recall": scores["linear attention"][1] > 0.95,
    "but less than 30 % of shift": scores["linear attention"][0] < 0.3,
    "the bias alone answers 95 % of shift": scores["bias"][0] > 0.95,
    "but less than 70 % of recall": scores["bias"][1] < 0.7,
    "linear attention and bias answer 95 % of both": min(scores["linear attention + bias"]) > 0.95,
    "softmax attention and bias too": min(scores["softmax attention + bias"]) > 0.95,
    "the largest learned weight of some head is at offset 5": bool((spikes == BACK).any()),
}
show(
    fig,
    "Share of right answers of four one-layer models to two questions, and the learned weights of four heads over "
    "offsets from -12 to 12. " + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items()) + ".",
)

# %% [markdown]
# A clean division of labour. Attention without positions answers by contents, and can only guess at distances. The bias
# answers by distance, at a glance, and does poorly on contents: it cannot choose whom to read *because of what is
# written there*. (It does better than chance, since it may add up everything that is shown and guess from that, and
# some tokens show their own secret.) Together, in the same layer, over the same values, they have both.
#
# For softmax attention there were two places for a bias. *Inside*, added to the scores (chapter 03), it multiplies the
# weight that contents give: distance and contents bargain over one total of 1. *Beside*, as here, it reads what it reads,
# whatever the query says. The first needs the matrix of scores; the second works with any attention.
#
# And with weights on *relative* offsets, what has been learned at 48 tokens holds for longer sequences, too: 5 back is
# 5 back. That goes for the shift, at least:

# %%
longer = marks(readers["linear attention + bias"], 4 * LENGTH)[0]
print("trained on 48 tokens, asked on 192: more than 90 % of shift right:", longer > 0.9)

# %% [markdown]
# ## Traps
#
# **1 · Nothing is normalised.** Attention weights add up to 1; the weights of the bias add up to whatever they like. A
# small constant weight over a long sequence is a large sum.

# %%
for length in (64, 1024):
    ones = torch.ones(1, 1, length, 2)  # (B, H, L, d)
    read = linear_attention(ones, ones, ones, elu_features).max()
    summed = toeplitz_product(torch.full((1, 2 * length - 1), 0.05), ones.transpose(1, 2)).max()
    print(
        f"{length:5} equal values of 1: attention reads {fmt(read, 3)}, a bias of 0.05 at every offset {fmt(summed, 3)}"
    )

# %% [markdown]
# So start with tiny weights, as the module does, and have a normalisation after the layer.
#
# **2 · Padding speaks.** The sum runs over *all* positions, and an attention mask does not reach it. In the authors'
# code padded values take part; the module here takes the same `mask` as everything in this course, and silences them.

# %%
torch.manual_seed(0)
module = FastRPB(heads=2, max_length=32).double()
nn.init.normal_(module.weight)
v = torch.randn(1, 20, 2, 4, dtype=torch.float64)
padded = torch.cat([v, torch.full((1, 12, 2, 4), 7.0, dtype=torch.float64)], dim=1)
mask = torch.arange(32)[None] < 20
with torch.no_grad():
    careless = (module(padded)[:, :20] - module(v)).abs().max().item()
    careful = (module(padded, mask)[:, :20] - module(v)).abs().max().item()
print("without a mask the padding changes the outputs of real tokens:", careless > 1)
print("with the mask:", below(careful, 1e-12))

# %% [markdown]
# **3 · Causal up to rounding.** As in chapter 01: in the frequency domain everything touches everything, and the future
# cancels out of the past only almost. Tests of causality need a tolerance.
#
# **4 · Half precision.** An FFT adds thousands of numbers; with the eight *significant* bits of bfloat16 little would
# be left of it. The package's transforms run in float32 or better, also under autocast, and return the values' own
# type.

# %%
with torch.autocast("cpu", dtype=torch.bfloat16):
    out = FastRPB(2, 32)(torch.randn(1, 32, 2, 4).bfloat16())
    kept = FastRPB(2, 32).lags(32)
print("weights under autocast:", kept.dtype, " result for bfloat16 values:", out.dtype)

# %% [markdown]
# ## The panel: draw a bias
#
# Choose a preset, and add lines of your own: the five sliders lift the weights at offsets -12, -4, 0, 4 and 12, with
# straight lines between them. You see the weights, the Toeplitz matrix, its spectrum, and what it does. Things to try:
#
# 1. "difference", applied to "step" and to "two waves". Which wave survives? Find it in the spectrum.
# 2. "shift", then tick *symmetric*. What has become of the signal, and of the spectrum?
# 3. "nothing", with +0.5 at offset 4 and -0.5 at offset -4. What does it answer to a step? Now tick *causal*.
# 4. The image, with sum and with product: which of the two still shows a 5?

# %%
panel = BiasOverDistance()
panel

# %%
print(panel.set(preset="difference", input="two waves").say())
print(panel.set(preset="nothing", back_4=0.5, ahead_4=-0.5, input="step").say())
print(panel.set(preset="shift", back_4=0.0, ahead_4=0.0, symmetric=True, input="impulse").say())

# %% [markdown]
# The same panel takes any `FastRPB`, trained or not, or bare `lags`, and an input of yours: here a soft blur of the 5.
# And the bias that we trained above: which offset does it name?

# %%
bare = BiasOverDistance(torch.tensor([0.25, 0.5, 0.25]), drawing(28), input="image, w[dx] * w[dy]")
bare

# %%
print(bare.set(input="image, w[dx] + w[dy]").say())
ours = BiasOverDistance(readers["linear attention + bias"].bias, length=48, input="impulse")
print(
    "some head's words name offset 5:", any("is at offset 5 (5 back)" in ours.set(head=head).say() for head in range(4))
)

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. *Run all* never stops here. The rest of the chapter
# uses the package's functions, whatever you write.
#
# ### Exercise 1 · The matrix
#
# Difficulty: ●○○ · Importance: ●●○ · 10 minutes
#
# Write `my_toeplitz_matrix(lags)`: `lags (H, 2L-1)` to the matrices `(H, L, L)` with $W_{ij} = w_{i-j}$, without a
# loop.
#
# <details><summary>Hint 1</summary>
#
# A tensor can be indexed with a *tensor* of whole numbers: `lags[:, index]` with `index (L, L)` is `(H, L, L)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With `position = torch.arange(L)`, `position[:, None] - position[None, :]` holds $i-j$. At which index stands offset
# 0?
#
# </details>


# %%
def my_toeplitz_matrix(lags):
    """lags (H, 2L-1) -> (H, L, L)."""
    # BEGIN SOLUTION "your turn: index the lags with a table of all offsets"
    length = (lags.shape[-1] + 1) // 2
    position = torch.arange(length)
    return lags[:, position[:, None] - position[None, :] + length - 1]
    # END SOLUTION


# %%
check_toeplitz_matrix(my_toeplitz_matrix)

# %% [markdown]
# ### Exercise 2 · The circle
#
# Difficulty: ●●○ · Importance: ●●● · 10 minutes
#
# Write `my_circle(lags, n)`: `lags (H, 2L-1)` to the first column `(H, n)` of the circulant matrix that has $W$ as its
# upper left corner, for any $n \ge 2L-1$.
#
# <details><summary>Hint 1</summary>
#
# Cut the lags into two parts: offsets $0 \dots L-1$, and offsets $-(L-1) \dots -1$. Which goes where? Where do the
# zeros go?
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.cat([a, zeros, b], dim=-1)` will do. So will one `F.pad` and one `roll`.
#
# </details>


# %%
def my_circle(lags, n):
    """lags (H, 2L-1) -> (H, n), n >= 2L-1."""
    # BEGIN SOLUTION "your turn: offset 0 first, zeros in the middle, negative offsets at the end"
    length = (lags.shape[-1] + 1) // 2
    return F.pad(lags, (0, n - 2 * length + 1)).roll(1 - length, -1)
    # END SOLUTION


# %%
check_circle(my_circle)

# %% [markdown]
# ### Exercise 3 · The product
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `my_toeplitz_product(lags, v)` with `torch.fft.rfft` and `torch.fft.irfft`: `lags (H, 2L-1)`, `v (B, L, H, d)`,
# result `(B, L, H, d)` with $y_i = \sum_j w_{i-j} v_j$ for each head.
#
# <details><summary>Hint 1</summary>
#
# `torch.fft.rfft(v, n=n, dim=1)` transforms along positions and appends the zeros by itself. How large must `n` be?
#
# </details>
# <details><summary>Hint 2</summary>
#
# The spectrum of the circle is `(H, n/2 + 1)`, that of the values `(B, n/2 + 1, H, d)`. Bring the first to a shape that
# spreads over the batch and the channels. Give `irfft` the same `n`, and keep the first $L$ positions.
#
# </details>


# %%
def my_toeplitz_product(lags, v):
    """lags (H, 2L-1), v (B, L, H, d) -> (B, L, H, d)."""
    # BEGIN SOLUTION "your turn: the circle's spectrum times the values' spectrum, and back"
    length = v.shape[1]
    n = 2 * length
    circle = F.pad(lags, (0, 1)).roll(1 - length, -1)  # (H, 2L)
    spectrum = torch.fft.rfft(circle).T[None, :, :, None]  # (1, L+1, H, 1)
    return torch.fft.irfft(torch.fft.rfft(v, n=n, dim=1) * spectrum, n=n, dim=1)[:, :length]
    # END SOLUTION


# %%
check_toeplitz_product(my_toeplitz_product)

# %% [markdown]
# ### Exercise 4 · The shadows of an image
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# Write the published bias of a square image, `separable(lags, v)`: `lags (H, 2S-1)`, one list for both axes, and `v (B,
# S, S, H, d)`, to `(B, S, S, H, d)` with the weights $w_{x-x'} + w_{y-y'}$. Use the package's `toeplitz_product`,
# twice, and build nothing larger than `v`.
#
# <details><summary>Hint 1</summary>
#
# Read the formula in the section on images from the inside: first the sums of the rows, `(B, S, H, d)`. Which axis of
# `v` is $y'$?
#
# </details>
# <details><summary>Hint 2</summary>
#
# What comes from the rows depends on $x$ only: it is a list over $x$, to be spread over $y$. `a[:, :, None] + b[:,
# None]` spreads both.
#
# </details>


# %%
def separable(lags, v):
    """lags (H, 2S-1), v (B, S, S, H, d) -> (B, S, S, H, d)."""
    # BEGIN SOLUTION "your turn: sums of rows and of columns, two products, and their sum"
    rows = toeplitz_product(lags, v.sum(2))  # (B, S, H, d), a list over x
    columns = toeplitz_product(lags, v.sum(1))  # (B, S, H, d), a list over y
    return rows[:, :, None] + columns[:, None]
    # END SOLUTION


# %%
check_separable(separable)

# %% [markdown]
# ### Exercise 5 · The gradient of the weights
#
# Difficulty: ●●● · Importance: ●●○ · 25 minutes
#
# Write `lag_gradient(g, v)`, what `backward` has to compute: `g` and `v`, both `(B, L, H, d)`, to `(H, 2L-1)` with
# $\sum_{b,d} \sum_{i-j=s} g_i v_j$ at index $s + L - 1$, through the FFT and without a loop.
#
# <details><summary>Hint 1</summary>
#
# A correlation is a product of spectra in which one is conjugated. Conjugating a spectrum turns its signal round: whose
# sign of time has to be turned in $i - j$?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Sum over the batch and the channels *in the frequency domain*: then a single transform back per head is left.
#
# </details>
# <details><summary>Hint 3</summary>
#
# What comes back is a circle: offsets $0, 1, \dots$ first, $\dots, -2, -1$ last. A `roll` brings offset 0 to index
# $L-1$.
#
# </details>


# %%
def lag_gradient(g, v):
    """g and v (B, L, H, d) -> (H, 2L-1)."""
    # BEGIN SOLUTION "your turn: conjugate one spectrum, multiply, sum, go back, put the offsets in order"
    length = v.shape[1]
    n = 2 * length
    spectrum = torch.fft.rfft(g, n=n, dim=1) * torch.fft.rfft(v, n=n, dim=1).conj()  # (B, L+1, H, d)
    circle = torch.fft.irfft(spectrum.sum((0, 3)).T, n=n)  # (H, 2L)
    return circle.roll(length - 1, -1)[:, : 2 * length - 1]
    # END SOLUTION


# %%
check_lag_gradient(lag_gradient)

# %% [markdown] tags=["solution-only"]
# Why does the sum over the batch cost nothing? The transform is linear: the sum of the transforms back is the transform
# back of the sum. So of $B \cdot d$ inverse transforms per head one is left. Autograd arrives at the same by summing
# the gradient of the *spectrum*, which all sequences and channels share.

# %% [markdown]
# ## Check against the package, and against the authors' numbers
#
# What this chapter built by hand, against what the package ships.

# %%
lags, v = random_case(batch=2, length=77, heads=3, width=4)
for causal in (False, True):
    ours = toeplitz_fast(lags, v, causal=causal)
    to_fast = (ours - toeplitz_product(lags, v, causal=causal)).abs().max()
    to_dense = (ours - toeplitz_product_dense(lags, v, causal=causal)).abs().max()
    print(f"causal={causal!s:5}  package's fast form {below(to_fast, 1e-12)}, its dense form {below(to_dense, 1e-11)}")
plane = torch.randn(3, 9, 13, dtype=torch.float64)
v = torch.randn(2, 5, 7, 3, 4, dtype=torch.float64)
print("two axes:", below((toeplitz_2d_full(plane, v) - toeplitz_product_2d_full(plane, v)).abs().max(), 1e-12))

# %% [markdown]
# The repository also holds numbers that *the authors' own published code* computed in double precision, for three heads
# and up to $N = 9$ tokens: both kinds of weights, with and without special tokens at the beginning and the end (which
# their code leaves out of the sum), for full and for shorter inputs. `lags` is the weight that each offset really got.
# (For a shorter input their full form reads the offset $L-1$ from the parameter of $-L$; we don't imitate that one
# entry.)

# %%
golden = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"
with np.load(golden / "rpb_1d.npz") as arrays:
    numbers = {key: torch.from_numpy(arrays[key]) for key in arrays.files if arrays[key].ndim}


def error(ours, theirs):
    return (ours.detach() - theirs).abs().max().item()


worst = {"product": 0.0, "module": 0.0}
cases = [key.removesuffix("_lags") for key in numbers if key.endswith("_lags")]
for case in cases:
    begin, length = int(case[case.index("bos") + 3]), int(case[-1])
    lags, v, y, w = (numbers[f"{case}_{part}"] for part in ("lags", "v", "y", "w"))
    core = slice(begin, begin + length)  # what lies between the special tokens
    worst["product"] = max(worst["product"], error(toeplitz_product(lags, v[:, core]), y[:, core]))
    if case.startswith("symmetric") or length == 9:
        module = FastRPB(heads=3, max_length=9, symmetric=case.startswith("symmetric")).double()
        with torch.no_grad():  # their full list stores offset s at index s + 9, and offset 8 at index 0
            module.weight.copy_(w[0] if module.symmetric else w[0].roll(-1, -1))
        worst["module"] = max(worst["module"], error(module(v[:, core]), y[:, core]))
print(f"{len(cases)} cases of the authors' code:", {part: below(size, 1e-9) for part, size in worst.items()})

# %% [markdown]
# A second file holds what their code does not do, or not right, computed from the matrices written out: the causal
# form, the gradients, both forms for images (on $3 \times 5$ pixels, the separable one with a list for each axis), and
# the sum with linear attention.

# %%
with np.load(golden / "rpb_oracles.npz") as arrays:
    oracle = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
lags, v = oracle["lags"].clone().requires_grad_(), oracle["v"].clone().requires_grad_()
y = toeplitz_product(lags, v)
(y * oracle["cotangent"]).sum().backward()
q, k = (oracle[name].transpose(1, 2) for name in "qk")  # attention wants heads before positions
with torch.no_grad():
    attention = {
        f: linear_attention(q, k, v.transpose(1, 2), phi, eps=0).transpose(1, 2)
        for f, phi in (("elu", elu_features), ("sikf", sikf_features))
    }
errors = {
    "both directions": error(y, oracle["y_bidirectional"]),
    "causal": error(toeplitz_product(lags, v, causal=True), oracle["y_causal"]),
    "gradient of lags": error(lags.grad, oracle["grad_lags"]),
    "gradient of v": error(v.grad, oracle["grad_v"]),
    "image, full": error(toeplitz_product_2d_full(oracle["lags2d"], oracle["v2d"]), oracle["y2d_bttb"]),
    "image, separable": error(
        toeplitz_product_2d(oracle["lags_x"], oracle["v2d"], oracle["lags_y"]), oracle["y2d_separable_two_vectors"]
    ),
    "elu attention + bias": error(attention["elu"] + y, oracle["y_elu_plus_bias"]),
    "SIKF attention": error(attention["sikf"], oracle["y_sikf"]),
    "SIKF attention + bias": error(attention["sikf"] + y, oracle["y_sikf_plus_bias"]),
}
for what, size in errors.items():
    print(f"{what:22} {below(size, 1e-9)}")

# %% [markdown]
# ## What to remember
#
# - A bias on distance is a Toeplitz matrix: $W_{ij} = w_{i-j}$, $2L-1$ numbers. FastRPB adds $\sum_j w_{i-j} v_j$ to
#   the output of any attention, per head, without softmax and without normalisation.
# - A Toeplitz matrix is a corner of a circulant one. Waves are the eigenvectors of every circulant matrix, and the FFT
#   of its first column are the eigenvalues: transform, multiply, transform back, $L \log L$.
# - The circle needs $2L-1$ points, also for a causal bias; take the next length that has small prime factors only.
# - Gradients stay in the family: of the values a product with the offsets turned round, of the weights a correlation.
# - Symmetric weights have a real spectrum and cannot shift. Free weights have no small state: streaming keeps a window.
# - Images: the published form adds $w_{x-x'}$ and $w_{y-y'}$ and sees sums of rows and columns only; the full form is a
#   product on a torus.
# - The bias knows *where*, attention knows *what*. A linear attention needs both.
#
# The mechanism and its initial values are those of the authors' published code (Zubkov and Gavrilov, *FastRPB*, 2022).
#
# Next, chapter 09: from mechanisms to models, one diagram and one interface for all of them.
