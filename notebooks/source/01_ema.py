# %% [markdown]
# # 01 · EMA: the damped exponential moving average
#
# ## The question, and what you will be able to do
#
# Attention lets every position look at every other one, and pays for it with the square of the length. This chapter
# asks the opposite question: **what is the least a model can carry along and still feel the past?** The answer is one
# number that is refreshed at every step, a *moving average*. It is the first half of Mega, it needs no pairs of
# positions at all, and it turns out to be three things at once: a recurrence, a convolution, and a product of
# spectra.
#
# After this chapter you will be able to
#
# - write the multi-dimensional damped EMA as a loop, and say what each of its four coefficients does;
# - unroll the loop into a kernel, and compute it for a whole sequence at once with an FFT that does not wrap around;
# - carry its state from one piece of a stream to the next, and get exactly the parallel result;
# - read off a half-life and a frequency response, and say what such a memory keeps and what it must lose;
# - recognise the five numerical traps that wait in these few lines.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial.classroom import below, fmt, growth_exponent, peak_memory, quickest, show, use_style
from longseq_tutorial.classroom.checks.ema import (
    check_causal_convolution,
    check_ema_block,
    check_ema_kernel,
    check_ema_step,
    check_half_life,
)
from longseq_tutorial.classroom.panels_ema import EMAMemory, frequency_response, half_life
from longseq_tutorial.mechanisms.ema import DampedEMA, ema_fft, ema_kernel, ema_recurrent
from longseq_tutorial.mechanisms.fft import good_length, long_convolution, long_convolution_direct

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable

# %% [markdown]
# ## One number that remembers
#
# A sensor is noisy and you want to know its level *now*. Keep one number $h$ and, at each step, move it a little
# towards what you see:
#
# $$h_t = \alpha\, x_t + (1-\alpha)\, h_{t-1}, \qquad 0 < \alpha < 1 .$$
#
# In words: the new value is $\alpha$ parts of what has just arrived and $1-\alpha$ parts of what was known before.
# That is the whole exponential moving average (EMA). Small $\alpha$: calm and slow. Large $\alpha$: quick and nervous.
#
# One knob for two things is one too few. $\alpha$ decides how much of the *new* comes in, and, with no choice left,
# how fast the *old* goes. The **damped** EMA cuts the tie with a second number $\delta$ between 0 and 1:
#
# $$h_t = \alpha\, x_t + (1-\alpha\delta)\, h_{t-1} .$$
#
# With $\delta = 1$ it is the plain EMA. With a smaller $\delta$ the past is dimmed more slowly, while the new comes in
# as strongly as before. (The paper calls $\delta$ a damping factor.) We will write $q = 1-\alpha\delta$ for what
# survives one step: the *decay*.
#
# In the figure, look left at how late the calm curve notices the jump, and right at where each curve ends.


# %%
def one_number(x, alpha, delta=1.0):
    """A damped EMA of a 1-D signal, one step after the other."""
    h, trace = 0.0, []
    for value in x.tolist():
        h = alpha * value + (1 - alpha * delta) * h
        trace.append(h)
    return torch.tensor(trace, dtype=torch.float64)


torch.manual_seed(0)
steps = 120
level = (torch.arange(steps) >= 30).double()
signal = level + 0.35 * torch.randn(steps, dtype=torch.float64)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
left.plot(signal, color="#BBBBBB", marker="", label="signal")
arrivals = {}
for alpha in (0.5, 0.05):
    left.plot(one_number(signal, alpha), markevery=10, label=f"alpha = {alpha}")
    arrivals[alpha] = int((one_number(level, alpha)[30:] >= 0.9).nonzero()[0]) + 1
left.set(title="plain: alpha does two jobs", xlabel="time (steps)", ylabel="value")
ends = {}
for delta in (1.0, 0.5, 0.25):
    trace = one_number(level, 0.2, delta)
    ends[delta] = trace[-1].item()
    right.plot(trace, markevery=10, label=f"alpha = 0.2, delta = {delta}")
right.set(title="damped: the past fades more slowly", xlabel="time (steps)", ylabel="value")
for ax in (left, right):
    ax.legend(fontsize="small")
show(
    fig,
    f"""Left: a noisy jump from 0 to 1 at step 30 and two plain averages of it. Without the noise the one with alpha 0.5
    is 90 % there after {arrivals[0.5]} steps, the one with alpha 0.05, much smoother, after {arrivals[0.05]}.
    Right: the noiseless jump with alpha 0.2 and three dampings. The curves leave together and settle at
    {fmt(ends[1.0])} for delta 1, {fmt(ends[0.5])} for delta 0.5 and {fmt(ends[0.25])} for delta 0.25: at 1/delta.""",
)

# %% [markdown]
# On the left, smoothness is paid for with lateness: no choice of $\alpha$ gives both. On the right all three leave
# the ground with the same slope, $\alpha$, and settle at $1/\delta$: less damping makes the average *sum* more of the
# past. (Why $1/\delta$? At rest $h = \alpha + (1-\alpha\delta)h$.) A small $\delta$ is how a large $\alpha$ can
# still have a long memory.
#
# ### From one number to many
#
# A single decay sees a single time scale. So Mega gives each of the $D$ channels a small orchestra of $n$ averages
# (16 in the paper), each with its own $\alpha_j$ and $\delta_j$. The input is spread over them with weights
# $\beta_j$, and their states are brought back to one number with weights $\eta_j$. For one channel:
#
# $$h_{t,j} = \alpha_j \beta_j\, x_t + (1-\alpha_j\delta_j)\, h_{t-1,j}, \qquad y_t = \sum_{j=1}^{n} \eta_j\, h_{t,j}.$$
#
# In words: $\beta$ *expands* the scalar, each of the $n$ numbers decays at its own pace, $\eta$ *projects* back.
# Weights of opposite sign subtract a slow average from a fast one, and that opens more shapes than plain forgetting.
#
# | here | paper (Ma et al., *Mega*, ICLR 2023, section 3) | shape | what it does | in the published code |
# |---|---|---|---|---|
# | `alpha` | $\alpha$ | $(D, n)$, in (0, 1) | weight of the new input | sigmoid of the parameter called `delta` |
# | `delta` | $\delta$ | $(D, n)$, in (0, 1) | damping of the past | sigmoid of the parameter called `alpha` |
# | `beta` | $\beta$ | $(D, n)$ | expands one number to $n$ | `beta` |
# | `eta` | $\eta$ | $(D, n)$ | projects $n$ numbers to one | `gamma`, divided by $\sqrt n$ |
# | `omega` | (absent) | $(D,)$ | a skip, $\omega x_t$ added to $y_t$ | `omega` |
# | $q$ | $1-\alpha\odot\delta$ | $(D, n)$ | what survives one step | `q` |
#
# Paper and published code differ in exactly those last cells: two names are exchanged, and the code adds the factor
# $1/\sqrt n$, the skip, and a SiLU behind it. The functions of this chapter follow the paper; the module `DampedEMA`
# adds the scale and the skip.
#
# ## A slow version, in ten lines
#
# The definition, step by step. Read it against the two formulas above.


# %%
def ema_slow(x, alpha, delta, beta, eta):
    """x (B, L, D), coefficients (D, n) -> y (B, L, D)."""
    h = x.new_zeros(x.shape[0], *alpha.shape)  # (B, D, n): the state
    y = []
    for t in range(x.shape[1]):
        expanded = beta * x[:, t, :, None]  # (B, D, n): one number becomes n
        h = alpha * expanded + (1 - alpha * delta) * h  # n damped averages
        y.append((eta * h).sum(-1))  # (B, D): and n become one
    return torch.stack(y, dim=1)


def random_coefficients(dim, n, seed=0):
    """alpha, delta in (0, 1), beta, eta of any sign; all (dim, n), float64."""
    g = torch.Generator().manual_seed(seed)
    alpha, delta = torch.sigmoid(torch.randn(2, dim, n, generator=g, dtype=torch.float64))
    beta, eta = torch.randn(2, dim, n, generator=g, dtype=torch.float64)
    return alpha, delta, beta, eta


# %% [markdown]
# The best way to question a machine that only ever adds and scales is to knock on it once: send in a single 1 and
# listen. Below, one channel with $n = 3$ averages, fast, middling and slow, with weights of mixed sign. Look at how
# the three plain decays on the left make a sum on the right that first rises, although none of its parts does.

# %%
alpha, delta, beta, eta = (
    torch.tensor([row], dtype=torch.float64)
    for row in ([0.7, 0.6, 0.5], [0.9, 0.25, 0.06], [1.0, 1.0, 1.0], [-1.2, 1.2, 0.4])
)
knock = torch.zeros(1, 60, 1, dtype=torch.float64)
knock[0, 0, 0] = 1
echo = ema_slow(knock, alpha, delta, beta, eta)[0, :, 0]
lives = half_life(alpha, delta)[0].tolist()

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
for j in range(3):
    weighted = ema_slow(knock, *(c[:, j : j + 1] for c in (alpha, delta, beta, eta)))[0, :, 0]
    left.plot(weighted, markevery=6, label=f"average {j}: half-life {fmt(lives[j])} steps")
left.set(title="three averages, each times its eta", xlabel="time after the knock (steps)", ylabel="value")
left.legend(fontsize="small")
right.plot(echo, markevery=6)
right.set(title="their sum: the output", xlabel="time after the knock (steps)")
show(
    fig,
    f"""Answers to a single 1 at time 0. Left: three exponential decays with half-lives {fmt(lives[0])}, {fmt(lives[1])}
    and {fmt(lives[2])} steps, the fastest with a negative weight. Right: their sum starts at {fmt(echo[0])}, rises to
    {fmt(echo.max())} at step {int(echo.argmax())} and then fades slowly, to {fmt(echo[-1])} at step 59.""",
)

# %% [markdown]
# So $n$ averages are more than one with a better half-life: they can *wait a moment* and then remember. Still, each
# part is a decaying exponential, and we will see below what no sum of them can do.
#
# What must be kept between two steps? Only $h$: $D \times n$ numbers, the same after ten steps and after ten million.
#
# ## The identity: a loop is a convolution
#
# The loop is slow for one reason only: step $t$ waits for step $t-1$. Unroll it and the waiting disappears. Put the
# equation for $h_{t-1}$ into the one for $h_t$, then the one for $h_{t-2}$, and so on:
#
# $$\begin{aligned}
# h_t &= \alpha\beta\, x_t + q\, h_{t-1} \\
#     &= \alpha\beta\, x_t + q\,\alpha\beta\, x_{t-1} + q^2 h_{t-2} \\
#     &= \alpha\beta \sum_{s=0}^{t} q^s\, x_{t-s}.
# \end{aligned}$$
#
# An input that is $s$ steps old has been multiplied by $q$ exactly $s$ times; the input of this very step, not yet.
# Apply $\eta$ and add over the $n$ dimensions:
#
# $$y_t = \sum_{s=0}^{t} k_s\, x_{t-s}, \qquad k_s = \sum_{j=1}^{n} \eta_j\, \alpha_j\, \beta_j\, q_j^{\,s}.$$
#
# In words: the output is the same weighted sum of the past at every position, and the weights, the **kernel** $k$,
# depend on the *age* $s$ of an input alone. Applying one list of weights at every position is a convolution.
#
# First for a single average, in plain Python, so that nothing is hidden:

# %%
a, d, b, e = 0.3, 0.5, 2.0, -1.0
kernel_by_hand = torch.tensor([[e * a * b * (1 - a * d) ** s for s in range(60)]], dtype=torch.float64)
heard = ema_slow(knock, *(torch.tensor([[c]], dtype=torch.float64) for c in (a, d, b, e)))[0, :, 0]
print("kernel by hand = the answer to a knock, error", below((kernel_by_hand[0] - heard).abs().max(), 1e-12))

coefficients = random_coefficients(dim=3, n=4)
x = torch.randn(2, 60, 3, dtype=torch.float64)
y_loop = ema_slow(x, *coefficients)
y_sum = long_convolution_direct(x, ema_kernel(*coefficients, 60))  # the sum over s, written as a loop over lags
print("loop over time = convolution with the kernel, error", below((y_loop - y_sum).abs().max(), 1e-12))

# %% [markdown]
# A linear map from $L$ numbers to $L$ numbers is an $L \times L$ matrix. Knock at every position, one after the other,
# collect the answers as columns, and you can *see* the convolution. Look for three things: what is above the
# diagonal, what happens along a diagonal, and how the first column relates to all the others.

# %%
knocks = torch.eye(40, dtype=torch.float64)[:, :, None]  # 40 sequences, sequence i is 1 at time i
matrix = ema_slow(knocks, alpha, delta, beta, eta)[:, :, 0].T  # (output time, input time)
above = matrix.triu(1).abs().max().item()
uneven = max((diagonal - diagonal[0]).abs().max().item() for i in range(40) for diagonal in [matrix.diagonal(-i)])

fig, ax = plt.subplots(figsize=(5.4, 4.4))
image = ax.imshow(matrix)
ax.set(xlabel="input time i (steps)", ylabel="output time t (steps)", title="weight of input i in output t")
ax.grid(False)
fig.colorbar(image, label="weight")
show(
    fig,
    f"""The EMA of the previous figure as a 40 by 40 matrix. Everything above the diagonal is {fmt(above)}: the future has
    no weight. Along each diagonal all weights are equal, to {below(uneven, 1e-12)}. The first column is the kernel,
    every other column the same kernel pushed down.""",
)

# %% [markdown]
# Zero above the diagonal: **causal**. Constant along diagonals: only the age counts, such a matrix is called
# *Toeplitz*. The 1600 entries hold 40 different numbers, and zeros. That redundancy is what the fast version lives on.
#
# ## The fast version
#
# ### A product of spectra, and its catch
#
# The convolution theorem: the Fourier transform turns convolution into a product, frequency by frequency. So instead
# of $L^2$ products: transform $x$ and $k$ with an FFT ($L \log L$ each), multiply $L$ pairs, transform back.
#
# The catch: the *discrete* transform believes that time is a circle. After the last sample comes the first. What
# should fade away beyond the end comes in again at the beginning. Here is a knock at time 50 of 64, convolved on the
# circle and convolved properly. Look at the first fifty steps, in which nothing has happened yet.

# %%
length = 64
wide = [torch.tensor([[c]], dtype=torch.float64) for c in (0.25, 0.23, 1.0, 1.0)]
kernel = ema_kernel(*wide, length)[0]
late = torch.zeros(length, dtype=torch.float64)
late[50] = 1
circular = torch.fft.irfft(torch.fft.rfft(late) * torch.fft.rfft(kernel), n=length)
linear = long_convolution(late[None, :, None], kernel[None])[0, :, 0]
loop = ema_slow(late[None, :, None], *wide)[0, :, 0]
leak = circular[:50].abs().max().item()

fig, ax = plt.subplots()
ax.plot(circular, markevery=4, label="FFT of length L: a circle")
ax.plot(linear, markevery=4, label="FFT of a padded length: a line")
ax.axvline(50, color="#999999", linestyle=":", label="the knock")
ax.set(xlabel="time (steps)", ylabel="output")
ax.legend()
show(
    fig,
    f"""A 1 arrives at time 50 of 64. Padded, the output is 0 before time 50 and decays after it. On the circle the tail that
    runs out at time 63 comes back at time 0: {fmt(leak)} at its largest, {fmt(leak / kernel[0])} of the kernel's
    height, before anything has arrived.""",
)
print("padded FFT = loop, error", below((linear - loop).abs().max(), 1e-12))
print("circle = loop?", "no: the end leaks into the beginning" if leak > 1e-3 else "yes")

# %% [markdown]
# A causal model has just heard its own future. The cure is cheap: append zeros, so that the tail runs into silence
# instead of into the beginning. An input of length $L$ and a kernel of length $L$ make an output of length $2L-1$; on
# a circle of at least $2L-1$ points nothing meets its own tail. Keep the first $L$ samples, drop the rest. You will
# write it in exercise 4.
#
# Not every length above $2L-1$ is equally good: an FFT splits its length into prime factors and is slow where a
# large prime is left. `good_length` rounds up to a number with factors 2, 3 and 5 only.

# %%
for wanted in (127, 2 * 4099 - 1, 2 * 10007 - 1):
    print(f"at least {wanted} points: take {good_length(wanted)}")

# %% [markdown]
# ### The kernel, with few exponentials
#
# Now the kernel itself is the expensive part! $k$ needs $q^s$ for $D \times n \times L$ combinations; exponentials are
# costly, and the table is $n$ times larger than the sequence. But powers multiply: $q^{a\cdot c + b} =
# q^{a\cdot c}\, q^b$. Write each lag as $s = a \cdot c + b$, as you would write 47 as four tens and seven, with
# $c \approx \sqrt L$. Two short lists of powers then hold everything:

# %%
q, c = 0.9, 4
tens, ones = q ** (c * torch.arange(3.0)), q ** torch.arange(4.0)  # powers 0, 4, 8 and powers 0, 1, 2, 3
table = torch.outer(tens, ones)  # row a, column b: q ** (4 a + b)
print("12 powers from 3 + 4:", torch.allclose(table.flatten(), q ** torch.arange(12.0)))

dim, n, length = 64, 16, 4096
many = [c.float() for c in random_coefficients(dim, n)]


def kernel_every_power(alpha, delta, beta, eta, length):
    """The definition, all powers at once: a table of (D, n, length)."""
    powers = torch.exp(torch.log1p(-alpha * delta)[..., None] * torch.arange(length))
    return torch.einsum("dn,dnl->dl", eta * alpha * beta, powers)


error = (kernel_every_power(*many, length) - ema_kernel(*many, length)).abs().max()
block = math.isqrt(length - 1) + 1
kernels = (kernel_every_power, ema_kernel)
seconds = [quickest(lambda f=f: f(*many, length)) for f in kernels]
memory = [peak_memory(lambda f=f: f(*many, length)) for f in kernels]
print(f"exponentials: {dim * n * length:,} for every power, {2 * dim * n * block:,} for two short lists")
print("the same kernel, error", below(error, 1e-5), "(float32)")
print("more than twice as fast:", seconds[0] > 2 * seconds[1])
print("peak memory less than a fifth:", memory[1] < memory[0] / 5)

# %% [markdown]
# And the sum over the $n$ dimensions becomes a matrix product of the two lists, for which processors are built: that is
# what `ema_kernel` of the package does. The whole fast EMA is then one line, a kernel and a convolution:


# %%
def ema_fast(x, alpha, delta, beta, eta):
    """The same arguments and the same result as ema_slow."""
    return long_convolution(x, ema_kernel(alpha, delta, beta, eta, x.shape[1]))


# %% [markdown]
# ### Both directions
#
# A classifier may look ahead: it has the whole sequence. Mega then runs a second EMA, with coefficients of its own,
# from the end to the beginning, and adds the two:
#
# $$y_t = \sum_{s \ge 0} k^{\rightarrow}_s\, x_{t-s} \;+\; \sum_{s \ge 0} k^{\leftarrow}_s\, x_{t+s}.$$
#
# Both sums begin at $s = 0$, so the present is counted twice, once with each kernel: that is how the authors do it,
# and we keep it. On the circle of the FFT the two kernels fit into *one*: lag $-s$ is the point $s$ steps before the
# end. One transform serves both directions.

# %%
forward, backward = random_coefficients(3, 4, seed=1), random_coefficients(3, 4, seed=2)
there = ema_slow(x, *forward)
back = ema_slow(x.flip(1), *backward).flip(1)  # turn time around, run, turn it back
k_forward, k_backward = ema_kernel(*forward, 60), ema_kernel(*backward, 60)
both = long_convolution(x, k_forward, reverse_kernel=k_backward)
print("two loops = one convolution, error", below((there + back - both).abs().max(), 1e-12))

middle = torch.zeros(1, 61, 3, dtype=torch.float64)
middle[:, 30] = 1
answer = long_convolution(middle, k_forward, reverse_kernel=k_backward)[0]
twice = answer[30] - (k_forward[:, 0] + k_backward[:, 0])
print("at the knock itself both kernels speak: k→[0] + k←[0], error", below(twice.abs().max(), 1e-12))

# %% [markdown]
# ### One step at a time, for ever
#
# Convolution is for training, when the whole sequence is there. When samples arrive one by one, the recurrence is
# the better form: $D \times n$ numbers of state, a few multiplications a step, nothing grows. The module has both, and
# they are the same function. (Only in the causal form: an average that starts from the end cannot start before the
# end is known, and the module says so.)

# %%
torch.manual_seed(1)
ema = DampedEMA(dim=3, n=4).double()
with torch.no_grad():
    parallel = ema(x)
    state, stream = ema.initial_state(batch=2), []
    for t in range(x.shape[1]):
        y_t, state = ema.step(x[:, t], state)
        stream.append(y_t)
print("streaming = parallel, error", below((torch.stack(stream, dim=1) - parallel).abs().max(), 1e-12))
print("numbers carried from step to step, per sequence:", state[0].numel())
try:
    DampedEMA(dim=3, bidirectional=True).initial_state(batch=2)
except ValueError as refusal:
    print("bidirectional:", refusal)

# %% [markdown]
# ## They agree: values and gradients
#
# Two functions that agree in value can still learn differently if a gradient is cut or wrong. So we compare both:
# outputs, and the gradient of one fixed random combination of all outputs with respect to every argument, in double
# precision, for lengths chosen to be awkward (1, 2, a prime, one above a power of two).


# %%
def values_and_gradients(form, x, coefficients):
    """y, then the gradients with respect to x, alpha, delta, beta, eta."""
    inputs = [tensor.clone().requires_grad_() for tensor in (x, *coefficients)]
    y = form(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


print(f"{'length':>6}  largest error of y and of the gradients with respect to x, alpha, delta, beta, eta")
for length in (1, 2, 101, 513):
    x = torch.randn(2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    slow = values_and_gradients(ema_slow, x, coefficients)
    fast = values_and_gradients(ema_fast, x, coefficients)
    errors = [((s - f).abs().max() / s.abs().max().clamp(min=1)).item() for s, f in zip(slow, fast, strict=True)]
    print(f"{length:6d}  all six {below(max(errors), 1e-10)}")

# %% [markdown]
# ## How it grows
#
# Three ways to the same numbers, timed on one core of this machine (the processor time of the fastest of several
# runs), up to 16,384 steps: the loop, the convolution as its definition says it (every output a sum over all lags), and
# the FFT. Both axes are logarithmic, so that a power law is a
# straight line and its slope the exponent. Look at the slopes first, then at the heights.

# %%
dim, n = 8, 4
some = [c.float() for c in random_coefficients(dim, n)]
lengths = [1024, 2048, 4096, 8192, 16384]


def direct(x):
    """Every output as a sum over all lags: L * L products a channel, in one call of PyTorch."""
    kernel = ema_kernel(*some, x.shape[1])
    return F.conv1d(F.pad(x.mT, (x.shape[1] - 1, 0)), kernel.flip(-1)[:, None], groups=dim).mT


forms = {"loop": lambda x: ema_recurrent(x, *some)[0], "direct convolution": direct, "FFT": lambda x: ema_fft(x, *some)}
times = {name: [] for name in forms}
for length in lengths:
    x = torch.randn(1, length, dim)
    for name, form in forms.items():
        times[name].append(quickest(lambda form=form, x=x: form(x)))
agree = (
    (forms["loop"](x) - forms["direct convolution"](x)).abs().max(),
    (forms["loop"](x) - forms["FFT"](x)).abs().max(),
)

growth = {name: growth_exponent(lengths, seconds).exponent for name, seconds in times.items()}
fig, ax = plt.subplots()
for name, seconds in times.items():
    ax.plot(lengths, [1e3 * s for s in seconds], label=f"{name}: time ~ length^{growth[name]:.1f}")
ax.set(xscale="log", yscale="log", xlabel="length (steps)", ylabel="time (ms)")
ax.set_xticks(lengths, [f"{length:,}" for length in lengths])
ax.minorticks_off()
ax.legend()
facts = {
    "loop: about linear": 0.7 < growth["loop"] < 1.4,
    "direct convolution: quadratic or worse": 1.5 < growth["direct convolution"] < 3.4,
    "FFT: about linear, L log L": 0.6 < growth["FFT"] < 1.6,
    "at 16,384 steps the FFT is at least five times faster than the loop": times["loop"][-1] > 5 * times["FFT"][-1],
    "at 16,384 steps the FFT is at least five times faster than the direct form": (
        times["direct convolution"][-1] > 5 * times["FFT"][-1]
    ),
    "all three give the same": max(agree) < 1e-4,
}
show(
    fig,
    "Time against length from 1,024 to 16,384 steps on logarithmic axes, for one sequence of 8 channels. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# The loop is *linear*, as it should be, and yet slow: $L$ rounds of tiny operations, each round waiting for the last.
# Most of the time goes into starting them, not into arithmetic, as the next cell shows. More cores do not help a
# queue. The direct convolution has nothing to wait for and is ahead while $L$ is small, until its $L^2$ catches up.
# (Should your exponent lie well above 2: rows that outgrow a memory cache cost extra, beside the counting of products.)
# The FFT has both virtues: no queue, and $L \log L$.

# %%
wide = [c.float() for c in random_coefficients(4 * dim, n)]
narrow_time = quickest(lambda: ema_recurrent(torch.ones(1, 1024, dim), *some))
wide_time = quickest(lambda: ema_recurrent(torch.ones(1, 1024, 4 * dim), *wide))
print(
    "the loop with four times the channels takes less than two and a half times as long:", wide_time < 2.5 * narrow_time
)

# %% [markdown]
#
# And memory, with the gradients that training needs? Both grow in proportion to the length. But the loop must keep
# its $n$ states of *every* step for the way back; the convolution never has them.

# %%
x = torch.randn(1, 1024, dim)


def memory_to_learn(form, n):
    """Peak bytes of one forward and backward pass."""
    inputs = [c.float().requires_grad_() for c in random_coefficients(dim, n)]
    return peak_memory(lambda: form(x, *inputs).sum().backward())


few, many_averages = 4, 32
loop = [memory_to_learn(lambda *args: ema_recurrent(*args)[0], n) for n in (few, many_averages)]
fft = [memory_to_learn(ema_fft, n) for n in (few, many_averages)]
print(f"from n = {few} to n = {many_averages}")
print("  the loop's memory grows more than threefold:", loop[1] > 3 * loop[0])
print("  the FFT's memory grows by less than a half: ", fft[1] < 1.5 * fft[0])

# %% [markdown]
# ## Why this is fast, and what is faster still
#
# The FFT is not the end of it. Count what it does for one channel: it takes the $L$ numbers apart into waves and puts
# them together again, twice as many as there are because of the padding, and every one of the $\log_2 2L$ rounds walks
# through all of them. Processors are bad at walking and good at something else: **small matrix products**. Can an EMA
# be made of those?
#
# Cut time into blocks of $C = 64$ steps. Inside a block, outputs owe something to the block's own inputs, and all the
# rest to the state $h$ that entered it:
#
# $$y_{\text{block}} = T\,x_{\text{block}} + V\,h, \qquad h' = q^{C} h + W\,x_{\text{block}} .$$
#
# $T$ is a triangle that holds the first 64 values of the kernel along its diagonals. $V$ reads the state:
# $V_{tj} = \eta_j q_j^{t+1}$. $W$ writes it: an input $s$ steps before the block's end has decayed $s$ times. All three
# come from the same short table of powers. In the figure, follow one input from the left: where does it act within its
# block, and what of it is left at the end? (Purple is positive, orange negative, each table on its own scale.)

# %%
from longseq_tutorial.mechanisms.blocks import block_recurrence_plain
from longseq_tutorial.mechanisms.ema import ema_blocks, ema_tables

many = [c.float() for c in random_coefficients(64, 16)]  # 64 channels with 16 averages each, as in Mega
tables = ema_tables(*many, block=64)
i = torch.arange(64)
triangle = torch.where(i[:, None] >= i, tables.kernel[:, (i[:, None] - i).clamp(min=0)], 0.0)  # (64, C, C)
fig, axes = plt.subplots(1, 3, figsize=(10, 3.6), width_ratios=[3, 1.2, 3])
for ax, table, name in zip(
    axes, (triangle[0], tables.read[0], tables.write[0]), ("T", "V: read", "W: write"), strict=True
):
    limit = float(table.abs().max())
    image = ax.imshow(table.numpy(), vmin=-limit, vmax=limit, cmap="PuOr", aspect="auto", interpolation="nearest")
    ax.set(title=name)
    ax.grid(False)
axes[0].set(xlabel="input in the block", ylabel="output in the block")
axes[1].set(xlabel="state", ylabel="output in the block")
axes[2].set(xlabel="input in the block", ylabel="state")
late = tables.write[0, :, 48:].abs().sum() / tables.write[0].abs().sum()
show(
    fig,
    f"""Three tables of one channel. T, 64 by 64: nothing above the diagonal ({float(triangle[0].triu(1).abs().max()):g} at
    most), the kernel's values along the diagonals below. V, 64 outputs by 16 states: strong at the top, fading
    downwards as the state decays. W, 16 states by 64 inputs: the last quarter of the inputs holds
    {"more than half" if late > 0.5 else "LESS than half"} of all weight, older ones have decayed before the block ends.""",
)

# %% [markdown]
# Written with these tables, the whole sequence is two large products and a loop over $L/64$ states in between. The
# package does just this in `block_recurrence_plain`; here it is in full, for the beginning of a sequence whose length is
# a multiple of 64.


# %%
def ema_in_blocks(x, alpha, delta, beta, eta, C=64):
    """x (B, L, D), L a multiple of C -> (B, L, D)."""
    kernel, read, write, decay = ema_tables(alpha, delta, beta, eta, block=C)
    i = torch.arange(C)
    toeplitz = torch.where(i[:, None] >= i, kernel[:, (i[:, None] - i).clamp(min=0)], 0.0)  # (D, C, C)
    blocks = x.unflatten(1, (-1, C)).permute(3, 1, 0, 2)  # (D, blocks, B, C): a product for each channel
    written = blocks @ write.mT.unsqueeze(1)  # (D, blocks, B, n): what each block leaves in the state
    h, entering = torch.zeros_like(written[:, 0]), []
    for j in range(blocks.shape[1]):  # the only loop: one short step a block
        entering.append(h)
        h = decay.unsqueeze(1) * h + written[:, j]
    y = blocks @ toeplitz.mT.unsqueeze(1) + torch.stack(entering, 1) @ read.mT.unsqueeze(1)  # (D, blocks, B, C)
    return y.permute(2, 1, 3, 0).flatten(1, 2)


awkward = torch.randn(2, 448, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
loop = values_and_gradients(ema_slow, awkward, coefficients)
for name, form in {"in blocks, above": ema_in_blocks, "the package's": lambda *a: ema_blocks(*a)[0]}.items():
    found = values_and_gradients(form, awkward, coefficients)
    error = max((a - b).abs().max() / a.abs().max().clamp(min=1) for a, b in zip(loop, found, strict=True))
    print(f"{name}: y and all gradients equal the loop's, error", below(error, 1e-10))

# %% [markdown]
# Now the bill, for one number of one channel. The products cost $2(C + 2n)$ operations: 192 for $C = 64$ and the 16
# averages of Mega, whatever the length. The three FFTs of chapter 00 need about $15 \log_2 2L$: 165 at a thousand steps and
# 225 at sixteen thousand, much the same. But this is arithmetic of the kind that a processor does at full speed, on data that stay in its cache, and linear in $L$. The least that any method must do is to
# read $x$ and write $y$: 8 bytes.
#
# So there is a **floor**, which we can measure on this very machine: the time that a plain matrix product of so many
# operations takes, plus the time to copy so many bytes. In the figure, look at the distance of each line from it.

# %%
width, n = 64, 16
lengths = [1024, 4096, 16384]
threads = torch.get_num_threads()
torch.set_num_threads(1)
square = torch.randn(1024, 1024)
operations_a_second = 2 * 1024**3 / quickest(lambda: square @ square)
large = torch.randn(2**23)
bytes_a_second = 2 * large.numel() * 4 / quickest(lambda: large.clone())
ways = {
    "FFT": lambda x: ema_fft(x, *many),
    "blocks, all at once": lambda x: block_recurrence_plain(x, lambda C: ema_tables(*many, block=C))[0],
    "blocks, a megabyte at a time": lambda x: ema_blocks(x, *many)[0],
}
inputs = [torch.randn(1, L, width) for L in lengths]
seconds = {name: [quickest(lambda f=f, x=x: f(x)) for x in inputs] for name, f in ways.items()}
floor = [L * width * (2 * (64 + 2 * n) / operations_a_second + 8 / bytes_a_second) for L in lengths]
torch.set_num_threads(threads)

fig, ax = plt.subplots()
for name, times in seconds.items():
    ax.plot(lengths, [1e9 * t / (L * width) for t, L in zip(times, lengths, strict=True)], label=name)
ax.plot(lengths, [1e9 * t / (L * width) for t, L in zip(floor, lengths, strict=True)], "k:", marker="", label="floor")
ax.set(xscale="log", yscale="log", xlabel="length (steps)", ylabel="nanoseconds for each number", xticks=lengths)
ax.set_xticks(lengths, [f"{L:,}" for L in lengths])
ax.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
ax.minorticks_off()
ax.legend()
best = seconds["blocks, a megabyte at a time"]
facts = {
    "at 16,384 steps the last form is at least one and a half times faster than the FFT": seconds["FFT"][-1]
    > 1.5 * best[-1],
    "and within 15 times of the floor": best[-1] < 15 * floor[-1],
    "its time for each number does not rise from 4,096 to 16,384 steps by more than half": best[-1] / 4
    < 1.5 * best[-2],
}
show(
    fig,
    "Time for each number of the sequence against the length, 64 channels, 16 averages each: FFT, blocks all at once, "
    "blocks a megabyte at a time, and the floor below. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)

# %% [markdown]
# What brought most? That depends on the length. In short sequences the tables are not yet paid off, and the FFT may win.
# At some thousand steps it is the step from the FFT to products of 64 by 64. In long ones it is a step that no formula
# shows: doing the blocks *a megabyte at a time*. A result that is written to fresh memory has to be fetched from the system page by
# page, and on many machines that takes longer than computing it; results that fit the processor's cache are there
# already. (With more channels the package takes 64 of them at a time: each has tables of its own, which want to stay in the cache
# as well.) What remains above the floor is mostly turning the channels of $x$ from the last axis to the first, and back;
# and in short sequences the tables, whose price does not depend on the length.
#
# Three gifts come with the blocks: a state at every border, so a stream can be taken up anywhere; a backward pass that
# is the same algebra mirrored, and saves only $n$ numbers for every 64 steps; and a causality that is exact, since no wave
# ever carries the future into the past. `DampedEMA` works like this. The FFT remains for kernels that are not made of
# decays: kernels cut off after a number of lags, or drawn freely, as in chapter 08.

# %% [markdown]
# ## What it remembers, and what it forgets
#
# ### Half-life
#
# After how many steps is half of an input forgotten? After $T$, where $q^{T} = \tfrac12$, so
#
# $$T = \frac{\log \tfrac12}{\log(1-\alpha\delta)} \;\approx\; \frac{0.69}{\alpha\delta} \quad\text{for small } \alpha\delta .$$
#
# In words: the half-life is about $0.7$ divided by the *product* of the two coefficients. Neither alone sets the
# memory. Where does Mega start? Both coefficients are sigmoids of a number near 0, so both begin near $\tfrac12$.

# %%
torch.manual_seed(0)
fresh = DampedEMA(dim=64, n=16)
with torch.no_grad():
    start_alpha, start_delta, _, _ = fresh.coefficients()
    start = half_life(start_alpha, start_delta)
kept = (1 - start_alpha * start_delta) ** 100
print(f"initial half-lives: {fmt(start.min())} to {fmt(start.max())} steps, {fmt(start.median())} in the middle")
print("an input 100 steps old counts, at best,", below(kept.max(), 1e-4), "of a new one")

# %% [markdown]
# A fresh Mega layer has the memory of a goldfish. Whatever it knows about the far past, it will have to *learn* to
# keep. We come to that in a moment.
#
# ### An experiment: one bit, then noise
#
# Send in one bit, $+1$ or $-1$. Then only noise, of standard deviation $\sigma = 0.05$. After $t$ more steps, guess the bit from
# the sign of the average. The bit's trace is $\alpha q^t$; the noise collected since has variance
# $\alpha^2 \sigma^2 (1-q^{2t})/(1-q^2)$. So the guess is right with probability
#
# $$P(t) = \Phi\!\left(\frac{q^t}{\sigma}\sqrt{\frac{1-q^2}{1-q^{2t}}}\right),$$
#
# with $\Phi$ the normal distribution function. $\alpha$ has cancelled: how *loudly* one listens does not matter, since
# the noise gets just as loud. We try it 4,000 times for each of four half-lives. Look at where each curve
# falls below 90 %, and whether four times the half-life buys four times the reach.

# %%
noise, trials, steps = 0.05, 4000, 300
lives = torch.tensor([2.0, 8.0, 32.0, 128.0])
decay = 0.5 ** (1 / lives)
g = torch.Generator().manual_seed(0)
bit = torch.randint(0, 2, (trials, 1, 1), generator=g) * 2.0 - 1
x = torch.cat([bit, noise * torch.randn(trials, steps, 1, generator=g)], dim=1).expand(-1, -1, 4)  # (4000, 301, 4)
ones = torch.ones(4, 1)
y = ema_fft(x, 0.5 * ones, 2 * (1 - decay[:, None]), ones, ones)  # alpha 0.5, delta chosen for the half-life
right = (y.sign() == bit).float().mean(0)[1:]  # (300, 4): share of right guesses, t = 1 .. 300

t = torch.arange(1, steps + 1)[:, None]
ratio = decay**t / noise * torch.sqrt((1 - decay**2) / (1 - decay ** (2 * t)))
theory = torch.special.ndtr(ratio)
reach = [(theory[:, i] >= 0.9).sum().item() for i in range(4)]
never_forgets = torch.special.ndtr(1 / (noise * t[:, 0].sqrt()))  # the limit q -> 1: a plain sum
farthest = (never_forgets >= 0.9).sum().item()
fig, ax = plt.subplots(figsize=(9, 3.8))
for i, life in enumerate(lives.tolist()):
    (line,) = ax.plot(t, theory[:, i], marker="", label=f"half-life {life:.0f}: 90 % up to {reach[i]} steps")
    ax.plot(t[4::12], right[4::12, i], linestyle="", color=line.get_color(), marker="os^D"[i])
ax.plot(t, never_forgets, marker="", color="black", linestyle="--", label=f"never forgets: up to {farthest} steps")
ax.set(xlabel="steps since the bit", ylabel="share of right guesses", title="points: 4,000 trials; lines: the formula")
fig.legend(fontsize="small", loc="outside right upper")
gap = (right - theory).abs().max().item()
show(
    fig,
    f"""Share of right guesses of a bit against the steps since it came. A guess is right in 90 % of the cases up to
    {reach[0]}, {reach[1]}, {reach[2]} and {reach[3]} steps for half-lives 2, 8, 32 and 128, and up to {farthest} steps for
    a sum that never forgets. Trials and formula differ by {"less than 0.05" if gap < 0.05 else "MORE than 0.05"}
    everywhere.""",
)
print("sixty-four times the half-life, reach times", fmt(reach[3] / reach[0]))

# %% [markdown]
# There are two ways to lose. A short memory has forgotten the bit. A long one remembers it *together with everything
# since*: the noise of hundreds of steps piles up beside it. So reach grows with the half-life, but more slowly, and
# even a sum that never forgets (dashed) drowns in the end.
#
# And this is the point to take along: **an EMA cannot choose.** The bit that mattered and the noise that did not fade
# by the same $q$, decided before the sequence began. To keep *this* token because of what it says takes something
# that looks at contents: the gated attention of chapter 03. Mega has both, and lets each do what it does best.
#
# ### The same thing in frequencies
#
# Feed in a wave $e^{i\omega t}$ ($\omega$ is a frequency here, not the skip). A convolution only scales and delays it, by the kernel's Fourier transform. For our sum
# of geometric series that is
#
# $$K(\omega) = \sum_{s\ge0} k_s\, e^{-i\omega s} = \sum_{j=1}^n \frac{\eta_j\alpha_j\beta_j}{1 - q_j\, e^{-i\omega}},
# \qquad K(0) = \sum_j \frac{\eta_j\beta_j}{\delta_j}.$$
#
# In words: slow waves ($\omega \to 0$) pass with gain $\eta\beta/\delta$, and the faster the wave, the larger the
# denominator, the less passes: one average is a **low-pass filter**. Left: three of them, scaled to gain 1. Dots mark
# where half of the power is lost. Right: a fast average minus a slow one.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
cutoff_period = {}
for life in (2, 8, 32):
    q = 0.5 ** (1 / life)
    frequencies, gain = frequency_response((1 - q) * q ** torch.arange(2048, dtype=torch.float64))
    cutoff = math.acos(2 - (q + 1 / q) / 2) / (2 * math.pi)  # from |K|^2 = K(0)^2 / 2
    cutoff_period[life] = 1 / cutoff
    (line,) = left.plot(frequencies[1:], gain[1:], marker="", label=f"half-life {life}")
    left.plot(cutoff, math.sqrt(0.5), marker="o", color=line.get_color())
left.set(xscale="log", yscale="log", title="one average: low-pass", xlabel="frequency (cycles per step)", ylabel="gain")
left.legend(fontsize="small")

q_fast, q_slow = 0.5 ** (1 / 2), 0.5 ** (1 / 32)
s = torch.arange(2048, dtype=torch.float64)
difference = (1 - q_fast) * q_fast**s - (1 - q_slow) * q_slow**s
_, gain = frequency_response(difference)
omega = 2 * math.pi * frequencies
formula = (1 - q_fast) / (1 - q_fast * torch.exp(-1j * omega)) - (1 - q_slow) / (1 - q_slow * torch.exp(-1j * omega))
peak = int(gain.argmax())
right.plot(frequencies[1:], gain[1:], marker="")
right.set(
    xscale="log",
    title="half-life 2 minus half-life 32: band-pass",
    xlabel="frequency (cycles per step)",
    ylabel="gain (linear)",
)
show(
    fig,
    f"""Gain against frequency. Left: single averages with half-lives 2, 8 and 32 let slow waves through and lose half of
    the power at periods of {fmt(cutoff_period[2])}, {fmt(cutoff_period[8])} and {fmt(cutoff_period[32])} steps: about nine
    half-lives. Right: the difference of two averages stops slow waves as well (gain {below(gain[0], 1e-6)} at
    frequency 0) and lets most through, {fmt(gain[peak])}, near a period of {fmt(1 / frequencies[peak], 1)} steps.""",
)
print("the kernel's FFT = the formula, error", below((gain - formula.abs()).abs().max(), 1e-6))

# %% [markdown]
# A rule of thumb falls out: an average of half-life $T$ lets waves through whose period is longer than about
# $2\pi T/\log 2 \approx 9T$. And with opposite signs two averages notice *change* at a chosen tempo and ignore the
# constant level. (The authors start $\beta$ with alternating signs, $+1, -1, +1, \dots$ As $\eta$ is drawn around zero, a fresh
# layer would have both signs in any case.)
#
# ## Learning a long memory
#
# The half-lives start at a few steps. Can gradient descent find a memory of 128? A small live training: white noise in,
# and as target an average whose half-life is 128. Four dimensions, 300 updates of Adam. Look left at which
# dimension learns to remember, and at how suddenly.


# %%
def learn(target, n, updates=300, length=1024):
    """Fit a DampedEMA(1, n) to the convolution with `target` (1, length); returns it, half-lives and losses."""
    torch.manual_seed(0)
    ema = DampedEMA(1, n).double()
    optimizer = torch.optim.Adam(ema.parameters(), lr=0.05, betas=(0.9, 0.98))  # the authors' betas
    lives, losses = [], []
    for _ in range(updates):
        x = torch.randn(8, length, 1, dtype=torch.float64)
        wanted = long_convolution(x, target)
        loss = (ema(x) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            lives.append(half_life(*ema.coefficients()[:2])[0])
        losses.append(loss.item())
    return ema, torch.stack(lives), losses


lags = torch.arange(1024, dtype=torch.float64)
slow_average = (0.5 ** (lags / 128))[None]
slow_average = slow_average / slow_average.norm()
untrained = learn(slow_average, n=4, updates=1)[0]
trained, lives, losses = learn(slow_average, n=4)

fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
for j in range(4):
    left.plot(lives[:, j], markevery=30, label=f"dimension {j}")
left.axhline(128, color="#999999", linestyle=":", label="target")
left.set(yscale="log", xlabel="updates", ylabel="half-life (steps)", title="half-lives while learning")
left.legend(fontsize="small")
with torch.no_grad():
    right.plot(untrained.kernel(400)[0], marker="", linestyle="--", label="before")
    right.plot(trained.kernel(400)[0], markevery=40, label="after")
right.plot(slow_average[0, :400], marker="", color="black", linestyle=":", label="target")
right.set(xlabel="lag (steps)", ylabel="weight", title="kernels", ylim=(-0.1, 0.2))
right.legend(fontsize="small")
longest = lives.max(1).values
when = int((longest > 64).nonzero()[0])
doubling = (when - int((longest > 8).nonzero()[0])) / 3  # updates for each factor of two between 8 and 64
show(
    fig,
    f"""Left: half-lives of four dimensions over 300 updates, logarithmic. All start at {fmt(lives[0].min())} to
    {fmt(lives[0].max())} steps. One of them climbs, passes 64
    {"within the first 150 updates" if when < 150 else "LATE"} and
    settles {"within a tenth of 128" if abs(longest[-1] / 128 - 1) < 0.1 else "AWAY from 128"}; the others stay short.
    Right: the kernel before training is gone after a few steps, after it lies on the target.""",
)
quiet = [i for i in range(4) if lives[-1, i] < 10]
print("the relative error falls", below(np.mean(losses[-20:]), 1e-2), "from above 1:", losses[0] > 1)
print("while it climbs, the half-life doubles in fewer than 15 updates:", doubling < 15)
print("dimensions that stayed below a half-life of 10:", len(quiet), "of 4")

# %% [markdown]
# It can. One dimension goes the whole way, and three stay short: nothing in the task needs them.
#
# Why is the climb a straight line on a logarithmic axis? The parameters are the *logits* of $\alpha$ and $\delta$, and far
# down its tail a sigmoid is an exponential. Logits that sink at Adam's steady pace make $\alpha\delta$ shrink, and so the
# half-life grow, by a constant *factor* per update. Had we learned $q$ itself, the way from 0.75 to 0.995 would have
# needed ever finer steps.
#
# Now a target that no EMA likes: an *exact echo* of what came 50 steps ago. Sixteen dimensions this time.

# %%
echo = (lags == 50).double()[None]
_, echo_lives, echo_losses = learn(echo, n=16)
print("echo after 50 steps: relative error still above 0.8:", min(echo_losses) > 0.8)

# %% [markdown]
# Always predicting zero would give an error of 1, so it has learned next to nothing. Real decays of both signs can cancel
# into a broad hump, as in our second figure, and no more. To wait and then strike takes decays that *oscillate*, with
# complex $q$: that is the state space of chapter 02. Or it takes a mechanism that can point: attention.
#
# ## Traps
#
# These formulas are short, and each of the following has bitten someone. All five are shown live; the package's
# `ema_kernel` and `long_convolution` step around the first four, no FFT can avoid the last, and the blocks of
# `DampedEMA` do not have it.
#
# **1 · $0^0$.** A gate that saturates gives $\alpha\delta = 1$, so $q = 0$. Powers written as $e^{s \log q}$ then compute
# $0 \cdot \log 0 = 0 \cdot (-\infty)$ at lag 0.

# %%
sure = torch.sigmoid(torch.full((1, 1), 40.0))  # exactly 1 in float32
one = torch.ones(1, 1)
print("exp(s log q):", torch.exp(torch.arange(3) * torch.log(1 - sure * sure)).tolist()[0])
print("the package:", [round(v, 6) for v in ema_kernel(sure, sure, one, one, 3)[0].tolist()])

# %% [markdown]
# **2 · $1-\alpha\delta$ that rounds to 1.** A very slow decay is a number very close to 1, and there a float has its
# coarsest steps. `log1p(-z)` computes $\log(1-z)$ without ever forming $1-z$.

# %%
slow_alpha, slow_delta = torch.tensor(1e-4), torch.tensor(3e-4)
naive = math.log(0.5) / torch.log(1 - slow_alpha * slow_delta)
print("half-life through log(1 - z):  ", fmt(naive))
print("half-life through log1p(-z):   ", fmt(half_life(slow_alpha, slow_delta)))

# %% [markdown]
# **3 · Denormals.** A fast decay soon reaches numbers below $10^{-38}$. Such *denormal* floats are zero for every
# purpose except one: many processors handle them in a slow path, several times slower. The package sets powers that
# small to an honest 0.

# %%
fast = torch.full((1, 1), 0.97, dtype=torch.float64)
naive_powers = ((1 - fast * fast) ** torch.arange(64)).float()
ours = ema_kernel(fast.float(), fast.float(), one, one, 64)
tiny = torch.finfo(torch.float32).tiny
for name, powers in (("naive", naive_powers), ("package", ours)):
    print(f"{name}: denormal numbers among 64 powers:", bool(((powers != 0) & (powers.abs() < tiny)).any()))

# %% tags=["nbval-ignore-output"]
# not compared: by how much denormals slow down depends on the processor (on some, not at all)
healthy, sick = torch.full((1 << 20,), 0.5), torch.full((1 << 20,), tiny / 3)
cost = [quickest(lambda v=v: v * 0.75) for v in (healthy, sick)]
print(f"on this machine a product with denormals takes {cost[1] / cost[0]:.1f} times as long")

# %% [markdown]
# **4 · Half precision.** bfloat16 has eight bits of mantissa. It has no 0.999 and no 257, so neither the decay nor the
# lag can be written down. Kernels and FFTs therefore run in float32 or better, also under autocast.

# %%
print("0.999 in bfloat16:", torch.tensor(0.999, dtype=torch.bfloat16).item())
print("lag 257 in bfloat16:", int(torch.tensor(257).bfloat16().item()))
with torch.autocast("cpu", dtype=torch.bfloat16):
    print("the package's kernel under autocast:", ema_kernel(one / 2, one / 2, one, one, 9).dtype)

# %% [markdown]
# **5 · Causal up to rounding.** In the frequency domain every output touches every input; causality comes from exact
# cancellation, and floats cancel only almost. A gigantic value in the future moves the past by a rounding error. The
# loop keeps the past exactly. Tests of causality with an FFT need a tolerance.

# %%
torch.manual_seed(0)
calm = torch.randn(1, 400, 3)
shock = calm.clone()
shock[:, 300:] += 1000
single = [c.float() for c in coefficients]
moved = {f.__name__: (f(calm, *single) - f(shock, *single))[:, :300].abs().max().item() for f in (ema_slow, ema_fast)}
print("loop: the past moves by exactly", fmt(moved["ema_slow"]))
print("FFT:  the past moves:", moved["ema_fast"] > 0, "but by", below(moved["ema_fast"], 1e-2), "for a shock of 1,000")
in_blocks = (ema_blocks(calm, *single)[0] - ema_blocks(shock, *single)[0])[:, :300].abs().max().item()
print("blocks: the past moves by exactly", fmt(in_blocks))

# %% [markdown]
# Two more, told in a sentence each. The published module *caches* its kernel in evaluation mode and never notices that
# new weights were loaded, so ours does not cache. And the published configurations *truncate* the kernel (1,024 lags in
# most tasks) when they run in parallel but not when they stream, so beyond that length the two differ; our module
# refuses to stream with a truncated kernel.
#
# ## The panel: what one EMA channel remembers
#
# Left the kernel, in the middle which frequencies pass, right what becomes of a signal. Things to try:
#
# 1. Turn `alpha` up and `delta` down so that the half-life stays: what changes in the response, what does not?
# 2. Choose the logarithmic scale: what shape must every single average have?
# 3. Choose the fast wave: which `alpha` and `delta` silence it?

# %%
panel = EMAMemory()
panel

# %%
print(panel.set(alpha=0.9, delta=0.167, length=128).say())
print(panel.set(signal="fast wave", scale="log").say())

# %% [markdown]
# The same panel takes any `DampedEMA`, so also one that has been trained, or a bare kernel tensor `(E, K)`. Here is the
# one that learned a half-life of 128. `stretch` multiplies all its half-lives.

# %%
learned = EMAMemory(trained, length=512, signal="step")
learned

# %%
print(learned.set(stretch=0.1).say())
bare = EMAMemory(echo[:, :64], signal="impulse")
print(bare.say())

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. *Run all* never stops here. The rest of the chapter
# uses the package's functions, whatever you write.
#
# ### Exercise 1 · Half-life
#
# Difficulty: ●○○ · Importance: ●●○ · 5 minutes
#
# Write `half_life(alpha, delta)`: after how many steps has an input's share of the state halved? `alpha` and `delta` are
# tensors of one shape; so is the result. Make it exact for *slow* decays in float32 too (trap 2).
#
# <details><summary>Hint 1</summary>
#
# Solve $(1-\alpha\delta)^h = \tfrac12$ for $h$: take the logarithm of both sides.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.log1p(z)` is $\log(1+z)$, exact for small $z$.
#
# </details>


# %%
def my_half_life(alpha, delta):
    """Tensors of one shape, alpha * delta in (0, 1) -> steps, the same shape."""
    # BEGIN SOLUTION "your turn: solve (1 - alpha * delta) ** h = 1/2 for h"
    return math.log(0.5) / torch.log1p(-alpha * delta)
    # END SOLUTION


# %%
check_half_life(my_half_life)

# %% [markdown]
# ### Exercise 2 · One step
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Write one step of the recurrence, for streaming: the input `x_t (B, D)` and the `state (B, D, n)` give the output
# `y_t (B, D)` and the new state `(B, D, n)`. The coefficients are `(D, n)`. Don't change the given state in place: somebody
# may still need it.
#
# <details><summary>Hint 1</summary>
#
# It is the inside of the loop of `ema_slow`. `x_t[..., None]` is `(B, D, 1)` and spreads over the $n$ dimensions.
#
# </details>
# <details><summary>Hint 2</summary>
#
# First the new state, then read $y_t$ from the *new* one: the present counts.
#
# </details>


# %%
def ema_step(x_t, alpha, delta, beta, eta, state):
    """x_t (B, D), coefficients (D, n), state (B, D, n) -> y_t (B, D), new state (B, D, n)."""
    # BEGIN SOLUTION "your turn: update the state, then project it to one number"
    state = (1 - alpha * delta) * state + alpha * beta * x_t[..., None]
    return (eta * state).sum(-1), state
    # END SOLUTION


# %%
check_ema_step(ema_step)

# %% [markdown]
# ### Exercise 3 · The kernel
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `ema_kernel(alpha, delta, beta, eta, length)`: coefficients `(D, n)` to the kernel `(D, length)`,
# $k_s = \sum_j \eta_j\alpha_j\beta_j q_j^s$. The table of all powers is fine here. It should also survive gates that
# have saturated to exactly 1 (trap 1).
#
# <details><summary>Hint 1</summary>
#
# `torch.arange(length)` are the lags. Bring $q$ to `(D, n, 1)`, and the powers are `(D, n, length)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# The weight $\eta\alpha\beta$ is `(D, n)`; multiply, and sum over axis 1. Tensor `**` knows that $0^0 = 1$.
#
# </details>


# %%
def my_ema_kernel(alpha, delta, beta, eta, length):
    """All (D, n), alpha and delta in (0, 1] -> (D, length)."""
    # BEGIN SOLUTION "your turn: powers of 1 - alpha * delta, weighted with eta * alpha * beta, summed over n"
    lags = torch.arange(length)
    powers = (1 - alpha * delta)[..., None] ** lags  # (D, n, length)
    return ((eta * alpha * beta)[..., None] * powers).sum(1)
    # END SOLUTION


# %%
check_ema_kernel(my_ema_kernel)

# %% [markdown] tags=["solution-only"]
# Why not the fast way? This one is exact, also in its gradient at $q = 0$, but it builds a table of $D \times n \times$
# length. The package's `ema_kernel` multiplies two tables of $D \times n \times \sqrt{\text{length}}$.

# %% [markdown]
# ### Exercise 4 · Convolution without wrap-around
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `causal_convolution(u, kernel)` with `torch.fft.rfft` and `torch.fft.irfft`: `u (B, L, D)`, `kernel (D, L)`, result
# `(B, L, D)` with $y_t = \sum_{s\le t} k_s u_{t-s}$ in each channel.
#
# <details><summary>Hint 1</summary>
#
# `torch.fft.rfft(u, n=size, dim=1)` transforms along time and pads with zeros to `size` by itself. How large must `size`
# be for nothing to wrap around?
#
# </details>
# <details><summary>Hint 2</summary>
#
# The kernel's time is its *last* axis, that of `u` the middle one: a transpose is due. Give `irfft` the same `n=size`.
#
# </details>


# %%
def causal_convolution(u, kernel):
    """u (B, L, D), kernel (D, L) -> (B, L, D)."""
    # BEGIN SOLUTION "your turn: transform both with enough room, multiply, transform back, keep the first L"
    length = u.shape[1]
    size = 2 * length
    spectrum = torch.fft.rfft(u, n=size, dim=1) * torch.fft.rfft(kernel, n=size).T  # (B, size/2 + 1, D)
    return torch.fft.irfft(spectrum, n=size, dim=1)[:, :length]
    # END SOLUTION


# %%
check_causal_convolution(causal_convolution)

# %% [markdown]
# ### Exercise 5 · A block, with what came before
#
# Difficulty: ●●● · Importance: ●●○ · 25 minutes
#
# A stream arrives in blocks of $T$ samples. Within a block we want the parallel form, between blocks the state. Write
# `ema_block(x, alpha, delta, beta, eta, state)`: `x (B, T, D)` and the state `(B, D, n)` that the previous block left,
# to `y (B, T, D)` and the new state, **without a loop over time**. You may use the package's `ema_kernel` and
# `long_convolution`.
#
# The state is one more input, long before the first: split $y$ and the new state into what this block's $x$ contributes
# and what the old state does. How often has the old state decayed when the *first* output of the block reads it?
#
# <details><summary>Hint 1</summary>
#
# Unroll again, now from a state $h$ that is not zero:
# $y_t = (k * x)_t + \sum_j \eta_j q_j^{t+1} h_j$ for $t = 0 \dots T-1$.
#
# </details>
# <details><summary>Hint 2</summary>
#
# New state: $q^T h + \alpha\beta \sum_{t=0}^{T-1} q^{T-1-t}\, x_t$. The newest input has not decayed yet.
#
# </details>
# <details><summary>Hint 3</summary>
#
# `torch.einsum("bdn,dnt->btd", state, table)` sums over the $n$ dimensions for each time.
#
# </details>


# %%
def ema_block(x, alpha, delta, beta, eta, state):
    """x (B, T, D), coefficients (D, n), state (B, D, n) -> y (B, T, D), new state (B, D, n)."""
    # BEGIN SOLUTION "your turn: the convolution of this block, plus what the old state adds; then the new state"
    length = x.shape[1]
    q = (1 - alpha * delta)[..., None]  # (D, n, 1)
    t = torch.arange(length)
    old = torch.einsum("bdn,dnt->btd", state, eta[..., None] * q ** (t + 1))
    y = long_convolution(x, ema_kernel(alpha, delta, beta, eta, length)) + old
    new = torch.einsum("btd,dnt->bdn", x, (alpha * beta)[..., None] * q ** (length - 1 - t))
    return y, q[..., 0] ** length * state + new
    # END SOLUTION


# %%
check_ema_block(ema_block)

# %% [markdown] tags=["solution-only"]
# This is more than streaming. Cut a long sequence into blocks, compute each in parallel, and pass only the states from
# block to block: for a fixed block the work grows linearly with the length, and the queue is only as long as the number
# of blocks. Fast implementations of EMAs and state spaces are built like this.

# %% [markdown]
# ## Check against the package, and against the authors' numbers
#
# What this chapter built by hand, against what the package ships: the loop, the fast form, and the module, which
# divides `eta` by $\sqrt n$ and adds $\omega x$.

# %%
x = torch.randn(2, 77, 3, dtype=torch.float64)
print(
    "our loop = package's loop:",
    below((ema_slow(x, *coefficients) - ema_recurrent(x, *coefficients)[0]).abs().max(), 1e-12),
)
print("our fast form = package's:", below((ema_fast(x, *coefficients) - ema_fft(x, *coefficients)).abs().max(), 1e-12))
with torch.no_grad():
    module = DampedEMA(3, n=4).double()
    alpha, delta = torch.sigmoid(module.alpha_logit), torch.sigmoid(module.delta_logit)
    by_hand = ema_slow(x, alpha, delta, module.beta, module.eta / math.sqrt(4)) + module.omega * x
    print("the module, by hand:", below((by_hand - module(x)).abs().max(), 1e-12))

# %% [markdown]
# The repository also holds numbers that *the authors' own published code* computed in double precision: inputs,
# parameters under the authors' names (mind the exchange of `alpha` and `delta`), outputs, states after 20 and after all
# 33 steps, and the gradient of every parameter. Their module ends in a SiLU, so we put one behind ours.

# %%
golden = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"
THEIRS = {"alpha_logit": "delta", "delta_logit": "alpha", "beta": "beta", "eta": "gamma", "omega": "omega"}


def batch_first(array):
    """The authors keep time first, (L, B, D); we keep the batch first."""
    return torch.from_numpy(array).transpose(0, 1).contiguous()


def error(ours, theirs):
    """The largest difference from an array of the authors'."""
    theirs = torch.as_tensor(theirs)
    return (ours.detach() - theirs.reshape(ours.shape)).abs().max().item()


for direction in ("unidirectional", "bidirectional"):
    with np.load(golden / f"mega_ema_{direction}.npz") as arrays:
        numbers = dict(arrays)
    module = DampedEMA(dim=6, n=4, bidirectional=direction == "bidirectional").double()
    with torch.no_grad():
        for ours, theirs in THEIRS.items():
            parameter = getattr(module, ours)
            parameter.copy_(torch.from_numpy(numbers[f"param.{theirs}"]).reshape(parameter.shape))
    x = batch_first(numbers["x"]).requires_grad_()
    y = F.silu(module(x))
    (y * batch_first(numbers["cotangent"])).sum().backward()
    errors = {
        "kernel": error(module.kernel(33), numbers["kernel"]),
        "output": error(y, batch_first(numbers["y"])),
        "padded": error(
            F.silu(module(x, ~torch.from_numpy(numbers["padding_mask"]))), batch_first(numbers["y_padded"])
        ),
        "gradient of x": error(x.grad, batch_first(numbers["grad_x"])),
    }
    errors |= {f"gradient of {k}": error(getattr(module, k).grad, numbers[f"grad.{v}"]) for k, v in THEIRS.items()}
    if direction == "unidirectional":
        state = None
        for start, stop, name in ((0, 20, "state_after_20"), (20, 33, "state_final")):
            _, state = ema_recurrent(x[:, start:stop], *module.coefficients(), state)
            errors[name] = error(state, numbers[name])
    print(direction)
    for what, size in errors.items():
        print(f"  {what:24} {below(size, 1e-9)}")

# %% [markdown]
# ## What to remember
#
# - A damped EMA carries $n$ numbers a channel: $h_t = \alpha\beta x_t + (1-\alpha\delta)h_{t-1}$, $y_t = \sum \eta h_t$
#   (Mega paper, section 3). $\alpha$ lets the new in, $\alpha\delta$ lets the old go.
# - The loop *is* a convolution with $k_s = \sum_j \eta_j\alpha_j\beta_j(1-\alpha_j\delta_j)^s$: powers from two short
#   tables, then an FFT with at least $2L-1$ points, since the FFT's time is a circle.
# - Three forms, one function: the loop for streaming (constant state), the FFT ($L\log L$, no queue), and blocks with a
#   state in between: linear, small matrix products, exactly causal. `DampedEMA` runs in blocks.
# - Half-life $\approx 0.69/(\alpha\delta)$; Mega starts at a few steps and *learns* the long ones. One average is a
#   low-pass for periods above about nine half-lives; differences make band-passes.
# - It forgets by age, never by content, and it cannot wait and then strike. State spaces (02) and attention (03) can.
# - Float traps: $0^0$, $1-\alpha\delta$ near 1, denormals, half precision, causality only up to rounding.
#
# Next, chapter 02: the same idea with complex decays and a theory of what to remember, S4.
