# %% [markdown]
# # 02 · S4: a state that is told what to remember
#
# ## The question, and what you will be able to do
#
# Chapter 01 ended with a defeat. A moving average fades, and a sum of sixteen of them could not learn the simplest
# echo: wait fifty steps, then strike. Its state was a handful of numbers that nobody had told *what to hold*.
#
# So let us ask properly. You may keep $N$ numbers, refreshed at every step by a linear rule. **Which $N$ numbers tell
# the most about everything you have heard so far?** The answer is old mathematics, the coefficients of the past in a
# family of polynomials. The surprise is that they can be kept up to date by a linear differential equation
# (*HiPPO*). From there to a layer that is fast on long sequences is a chain of four ideas, each a line or two, and
# together they are called S4.
#
# After this chapter you will be able to
#
# - drive a state of 64 numbers with speech, and play back the speech from the state;
# - turn a differential equation into a recurrence, in two ways, and say what each does to its eigenvalues;
# - write the diagonal form S4D as a loop and as a convolution, and compute its kernel from two short tables;
# - derive full S4 in four steps: normal plus low rank, generating function, Cauchy sums, Woodbury;
# - train a state space on the echo, and run what it has learned at half the sampling rate.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, growth_exponent, peak_memory, quickest, show, use_style
from longseq_tutorial.classroom.checks.s4 import (
    check_bilinear,
    check_generating_function,
    check_recall_kernel,
    check_s4d_kernel,
    check_woodbury,
)
from longseq_tutorial.classroom.panels_s4 import StateMemory, legendre
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.fft import long_convolution
from longseq_tutorial.mechanisms.s4 import (
    S4,
    S4D,
    c_from_tilde,
    discretize,
    dplr_dense,
    hippo_legs,
    hippo_legs_nplr,
    s4_kernel,
    s4_kernel_dense,
    s4_recurrent,
    s4d_init,
    s4d_kernel,
    s4d_kernel_vandermonde,
    s4d_recurrent,
    tilde_from_c,
)
from longseq_tutorial.tasks import load

use_style()
torch.set_num_threads(1)  # everything here is small, and one core keeps the timings comparable

# %% [markdown]
# ## What N numbers can hold
#
# Take a stretch of the past, and squeeze it onto the interval from 0 (the oldest) to 1 (now). On that interval live the
# Legendre polynomials $p_0, p_1, p_2, \dots$: a constant, a slope, a bow, and so on, each orthogonal to all others.
# Write the past as a sum of them and keep the first $N$ coefficients,
#
# $$x_n = \int_0^1 u(r)\, p_n(r)\, dr, \qquad u(r) \approx \sum_{n<N} x_n\, p_n(r).$$
#
# No other polynomial of that degree comes closer to the past, on average over it: that is what orthogonality buys.
# But as time goes on, every old sample moves to another place on the interval. Must all integrals be done anew at
# every step? That they need not is the discovery behind HiPPO: the coefficients obey
#
# $$\frac{d x}{d t} = \frac1t\,\bigl(A\, x + B\, u\bigr), \qquad
# A_{nk} = -\begin{cases}\sqrt{(2n+1)(2k+1)} & n > k\\ n+1 & n = k\\ 0 & n < k\end{cases}, \qquad B_n = \sqrt{2n+1} .$$
#
# In words: the change of the $N$ numbers follows from the $N$ numbers themselves and the sample that comes in. Nothing
# else of the past is needed. The $1/t$ is the squeezing: one more sample matters much to a short past and little to a
# long one. (This is the scaled Legendre measure, *LegS*; $A$ and $B$ are `hippo_legs(N)`, equation 2 of the S4 paper.)
#
# We run it. In the time $\tau = \log t$ the factor $1/t$ disappears, and for an input that stands still between two
# samples the equation is solved exactly by a matrix exponential.


# %%
def legs_state(u, N):
    """u (L,), one sample after the other -> the state (N,) at the end."""
    A, B = hippo_legs(N)
    rest = torch.linalg.solve(A, B)  # where a constant input u comes to rest: -rest * u
    t = torch.arange(1, len(u), dtype=torch.float64)
    advance = torch.linalg.matrix_exp(torch.log((t + 1) / t)[:, None, None] * A)  # from t to t + 1: (L-1, N, N)
    x = -rest * u[0]
    for step, value in zip(advance, u[1:], strict=True):
        x = step @ (x + rest * value) - rest * value
    return x


speech = load("speech", source="sample")  # the project's own sample: digits spoken by a synthesiser
waveform, digit = speech.train[33]
waveform = waveform.double().flatten()
clip = waveform[1408:1664]  # 256 samples, 32 ms
clip = clip / clip.abs().max()
state = legs_state(clip, 128)
print("spoken digit:", int(digit), "· samples of the past:", len(clip), "· numbers kept:", len(state))

# %% [markdown]
# Does the state really hold Legendre coefficients? They can be computed directly, as integrals over the 256 steps of the
# staircase. And because $A$ is lower triangular, the first $n$ numbers never look at the later ones: the first 16 numbers
# of a state of 128 *are* the state of 16. Below, the past is played back from the first 16, 32 and 64 numbers. Look
# at what is missing when there are too few.


# %%
def projection(u, N):
    """The same coefficients by integration; the integral of P_n is (P_{n+1} - P_{n-1}) / (2n + 1)."""
    edges = 2 * np.arange(len(u) + 1) / len(u) - 1
    P = np.polynomial.legendre.legvander(edges, N)
    n = np.arange(1, N)
    primitive = np.concatenate([P[:, 1:2], (P[:, 2:] - P[:, : N - 1]) / (2 * n + 1)], axis=1) / 2
    return u @ torch.from_numpy(np.diff(primitive, axis=0) * np.sqrt(2 * np.arange(N) + 1))


print(
    "the differential equation has kept the Legendre coefficients, error",
    below((state - projection(clip, 128)).abs().max(), 1e-9),
)

middles = (np.arange(256) + 0.5) / 256
table = legendre(128, middles)  # (256, 128): column n is p_n
milliseconds = torch.arange(-256, 0) / 8


def lost(n, past=clip, x=state):
    """Relative error of the past rebuilt from the first n numbers."""
    return ((table[:, :n] @ x[:n] - past).norm() / past.norm()).item()


fig, axes = plt.subplots(3, 1, figsize=(6, 3.8), sharex=True, sharey=True)
for ax, n in zip(axes, (16, 32, 64), strict=True):
    ax.plot(milliseconds, clip, marker="", color="#999999", label="what was said")
    ax.plot(milliseconds, table[:, :n] @ state[:n], marker="", label=f"rebuilt from {n} numbers")
    ax.set(ylabel="pressure", ylim=(-1.2, 1.9))
    ax.legend(fontsize="small", loc="upper left", ncols=2)
axes[-1].set(xlabel="time (ms, now = 0)")
show(
    fig,
    f"""Thirty-two milliseconds of a spoken three, 256 samples, and the same rebuilt from the state. From 16 numbers the
    relative error is {fmt(lost(16))}: only a slow wave is left. From 32 it is {fmt(lost(32))}: every swing of the voice is
    there. From 64 it is {fmt(lost(64))}: what is still missing is fast and small.""",
)

# %% [markdown]
# Two hundred and fifty-six samples have gone by one at a time, none was stored, and thirty-two numbers still know
# every swing of the voice. What is lost is what wiggles too fast for the polynomials at hand.
#
# So the price depends on the signal. A smooth past is cheap, a rough one dear. Look at the slopes.

# %%
steps = torch.arange(256, dtype=torch.float64)
pasts = {
    "two slow waves": torch.sin(2 * math.pi * steps / 128) + torch.sin(2 * math.pi * steps / 50 + 1),
    "speech": clip,
    "white noise": torch.randn(256, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
}
counts = list(range(1, 129))
fig, ax = plt.subplots(figsize=(6.5, 3.2))
errors = {}
for name, past in pasts.items():
    x = projection(past, 128)
    errors[name] = [lost(n, past, x) for n in counts]
    ax.plot(counts, errors[name], markevery=16, label=name)
ax.set(yscale="log", xlabel="numbers kept", ylabel="relative error of the rebuilt past", ylim=(5e-4, 2))
ax.legend()
show(
    fig,
    f"""Relative error against the number of coefficients kept, logarithmic. Two slow waves fall from 1 to
    {fmt(errors["two slow waves"][31])} within 32 numbers; speech needs 32 to reach {fmt(errors["speech"][31])} and then falls
    slowly; white noise is still at {fmt(errors["white noise"][127])} with 128 numbers, half as many as it has samples.""",
)
print("waves below 0.02 with 32 numbers:", errors["two slow waves"][31] < 0.02)
print("noise still above 0.5 with 128:", errors["white noise"][127] > 0.5)

# %% [markdown]
# ### Without a clock
#
# The factor $1/t$ makes the rule a different one at every step, and then it is no convolution. S4 simply drops it:
#
# $$x'(t) = A\,x(t) + B\,u(t), \qquad y(t) = C\,x(t).$$
#
# What does the state hold now? Drop a short knock into this system and watch: after the time $s$ the $n$-th number is at
# $e^{-s}\,p_n(e^{-s})$. So
#
# $$x_n(t) = \int_0^\infty u(t-s)\; p_n(e^{-s})\; e^{-s}\, ds .$$
#
# In words: again Legendre coefficients, but of the past seen through $r = e^{-s}$, as through a wide-angle lens. What has
# just happened fills most of the picture, and everything that is long ago crowds at the rim, $r \to 0$. This memory
# is elastic: sharp for the new, blurred for the old, and it has no end.
#
# Time needs a unit now. A sample lasts `dt`, and `dt` decides how many samples fit into the sharp part: about
# $1/\mathtt{dt}$. Look at where the rebuilt curve loses the true one when `dt` is a hundredth, and when it is a
# thirtieth.


# %%
def elastic_state(u, N, dt):
    """Drive x' = A x + B u with u (L,), exactly for a staircase; the state (N,) at the end."""
    A, B = hippo_legs(N)
    advance = torch.linalg.matrix_exp(dt * A)
    rest = torch.linalg.solve(A, B)
    x = torch.zeros(N, dtype=torch.float64)
    for value in u:
        x = advance @ (x + rest * value) - rest * value
    return x


heard = waveform[:1664] / waveform[1408:1664].abs().max()  # everything up to now, not only the last 32 ms
ages = torch.arange(255.5, 0, -1, dtype=torch.float64)  # in samples, oldest first
fig, axes = plt.subplots(2, 1, figsize=(6, 2.9), sharex=True, sharey=True)
by_age = {}
for ax, dt in zip(axes, (1 / 100, 1 / 30), strict=True):
    rebuilt = legendre(64, torch.exp(-dt * ages)) @ elastic_state(heard, 64, dt)
    by_age[dt] = [
        ((rebuilt - clip)[part].norm() / clip[part].norm()).item() for part in (slice(0, 64), slice(192, 256))
    ]
    ax.plot(milliseconds, clip, marker="", color="#999999", label="what was said")
    ax.plot(milliseconds, rebuilt, marker="", label=f"rebuilt from 64 numbers, dt = 1/{1 / dt:.0f}")
    ax.set(ylabel="pressure", ylim=(-1.2, 1.9))
    ax.legend(fontsize="small", loc="upper left", ncols=2)
axes[-1].set(xlabel="time (ms, now = 0)")
show(
    fig,
    f"""The same 32 ms rebuilt from an elastic memory of 64 numbers. With dt = 1/100 the relative error is
    {fmt(by_age[0.01][1])} in the newest 8 ms and {fmt(by_age[0.01][0])} in the oldest. With dt = 1/30 it is
    {fmt(by_age[1 / 30][1])} in the newest and {fmt(by_age[1 / 30][0])} in the oldest, where the rebuilt curve has lost the
    swings of the voice.""",
)
print("the newest part is sharper with the larger dt:", by_age[1 / 30][1] < by_age[0.01][1])
print("the oldest part is sharper with the smaller dt:", by_age[1 / 30][0] > by_age[0.01][0])

# %% [markdown]
# That is what `dt` means in all of S4: **how far back the memory looks**. A layer has many channels, each with a `dt`
# of its own, drawn between 0.001 and 0.1: some channels see ten steps sharply, others a thousand. And `dt` is learned.
#
# ## From flowing time to samples
#
# A computer has samples $u_0, u_1, \dots$, so the differential equation must become a step $x_t = \bar A x_{t-1} + \bar B
# u_t$. Two ways are in use.
#
# **Zero-order hold** (ZOH): pretend that the input stands still for the time $\Delta$ = `dt`. Then the solution is exact,
#
# $$\bar A = e^{\Delta A}, \qquad \bar B = A^{-1}\bigl(e^{\Delta A} - 1\bigr) B .$$
#
# **Bilinear**: over a step, replace $x$ on the right side of the equation by the mean of its old and its new value,
# $x_t = x_{t-1} + \tfrac\Delta2 A\,(x_{t-1} + x_t) + \Delta B u_t$, and solve for the new:
#
# $$\bar A = \Bigl(1 - \tfrac\Delta2 A\Bigr)^{-1}\Bigl(1 + \tfrac\Delta2 A\Bigr), \qquad
# \bar B = \Bigl(1 - \tfrac\Delta2 A\Bigr)^{-1} \Delta B .$$
#
# It needs no exponential of a matrix, only a division, and we will be grateful for that. (Exercise 1.) For a diagonal
# $A$ both are formulas for single complex numbers. Left, one oscillating eigenvalue answers a slow wave, sampled
# coarsely. Right, where a column of eigenvalues with real part $-\frac12$ goes. Look for who leaves the unit circle.

# %%
eigenvalue, coarse = torch.tensor([[-0.5 + 5j]], dtype=torch.complex128), 0.25
one = torch.ones_like(eigenvalue)


def answer(dt, method):
    """The real part of the state of x' = a x + u, u a slow wave, at the times dt, 2 dt, ... up to 6."""
    t = dt * torch.arange(1, round(6 / dt) + 1, dtype=torch.float64)
    u = torch.sin(1.5 * (t - dt / 2))
    if method == "euler":
        decay, push = 1 + dt * eigenvalue, dt * one
    else:
        decay, push = discretize(eigenvalue, one, torch.tensor([dt], dtype=torch.float64), method)
    x, trace = torch.zeros((), dtype=torch.complex128), []
    for value in u:
        x = decay[0, 0] * x + push[0, 0] * value
        trace.append(x.real)
    return t, torch.stack(trace)


fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), width_ratios=(3, 2))
t, truth = answer(coarse / 200, "zoh")
left.plot(t, truth, marker="", color="black", label="flowing time")
deviation = {}
for method in ("zoh", "bilinear", "euler"):
    t, sampled = answer(coarse, method)
    deviation[method] = ((sampled - truth[199::200]).norm() / truth[199::200].norm()).item()
    shown = 6 if method == "euler" else len(t)  # Euler's leaves the picture
    left.plot(t[:shown], sampled[:shown], linestyle=":", markersize=4, label=method)
left.set(title="one eigenvalue, -0.5 + 5i, dt = 0.25", xlabel="time", ylabel="real part of the state", ylim=(-0.6, 0.4))
left.legend(fontsize="small", ncols=2, loc="lower right")
column = torch.complex(torch.full((61,), -0.5), torch.linspace(-90, 90, 61)).to(torch.complex128)[None]
tenth = torch.tensor([0.1], dtype=torch.float64)
images = {m: discretize(column, torch.ones_like(column), tenth, m)[0][0] for m in ("zoh", "bilinear")}
images["euler"] = 1 + 0.1 * column[0]
circle = torch.linspace(0, 2 * math.pi, 200)
right.plot(circle.cos(), circle.sin(), marker="", color="#999999", linewidth=1)
for method, image in images.items():
    right.plot(image.real, image.imag, linestyle="", markevery=1, markersize=4, label=method)
right.set(title="-0.5 + iω after one step, dt = 0.1", xlabel="real part", ylabel="imaginary part")
right.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
largest = {method: image.abs().max().item() for method, image in images.items()}
show(
    fig,
    f"""Left: against the solution in flowing time, ZOH is off by {fmt(deviation["zoh"])} and bilinear by
    {fmt(deviation["bilinear"])} of it, while Euler's rule grows away: after 24 steps it is off by a factor of
    {fmt(deviation["euler"])}. Right: a column of eigenvalues from -90i to 90i becomes, with ZOH, points on a circle of
    radius {fmt(largest["zoh"], 3)}, going around {fmt(18 / (2 * math.pi))} times; with bilinear points inside the unit circle,
    crowding towards -1; with Euler's rule a column again, up to {fmt(largest["euler"])} from the origin.""",
)

# %% [markdown]
# Euler's simple $1 + \Delta A$ leaves the circle, and a kernel made of its powers explodes. The other two map the whole
# left half plane *into* the circle: whatever decays in flowing time decays in samples. They differ for fast
# eigenvalues: ZOH winds the column around the circle (a frequency above half the sampling rate comes back as a slower
# one, as wheels do in films), bilinear squeezes all frequencies into one turn.
#
# ## A slow version
#
# Now, the layer. $A$ is a matrix, but most matrices are diagonal if one looks at them in the right coordinates, and
# then the $N$ numbers do not talk to each other at all. Suppose that $A$ is diagonal, with complex eigenvalues. That is
# **S4D**, and we will come back to what the supposition costs.
#
# The matrix is real, so complex eigenvalues come in conjugate pairs, and the two halves of a pair stay mirror images for
# ever. We keep one of each pair, the one with negative imaginary part, and double the real part of the output:
#
# $$x_t = \bar A \odot x_{t-1} + \bar B\, u_t, \qquad y_t = 2\,\mathrm{Re}\sum_{n=1}^{N/2} C_n\, x_{t,n} .$$
#
# | here | papers (Gu et al. 2022, S4 and S4D) | shape | what it is |
# |---|---|---|---|
# | `A` or `Lambda` | $A$, $\Lambda$ | $(D, N/2)$ complex | eigenvalues in flowing time; $-e^{a} + ib$, so that they decay |
# | `B`, `C` | $B$, $C$ | $(D, N/2)$ complex | how the input enters the state, how the output is read |
# | `dt` | $\Delta$ | $(D,)$ | time between samples, $e^{\text{log dt}}$ |
# | `skip` | $D$ | $(D,)$ | the input straight to the output; the papers call it $D$, we count channels with that letter |
# | $\bar A, \bar B$ | $\bar A, \bar B$ | $(D, N/2)$ | the same for samples, from `discretize` |
# | `P` | $P$ (and $Q = P$) | $(D, N/2)$ | the low-rank part of full S4 |
# | `C_tilde` | $\tilde C$ | $(D, N/2)$ | $C$ prepared for one length |
# | `z` | $\frac2\Delta\frac{1-\omega}{1+\omega}$ | (frequencies,) | where the response is evaluated; ours is the paper's times $\Delta$ |


# %%
def s4d_slow(u, A, B, C, dt):
    """u (B, L, D); A, B, C (D, N/2) complex; dt (D,) -> y (B, L, D)."""
    decay = torch.exp(dt[:, None] * A)  # (D, N/2): zero-order hold
    push = (decay - 1) / A * B
    x = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype)  # (B, D, N/2): the state
    y = []
    for t in range(u.shape[1]):
        x = decay * x + push * u[:, t, :, None]
        y.append(2 * (C * x).sum(-1).real)  # (B, D)
    return torch.stack(y, dim=1)


def random_system(dim, half, seed=0):
    """A with negative real parts, B, C, dt, in double precision."""
    g = torch.Generator().manual_seed(seed)
    draws = torch.randn(4, dim, half, 2, generator=g, dtype=torch.float64)
    A = torch.complex(-draws[0, ..., 0].exp(), -3 * draws[0, ..., 1].abs())
    B, C = torch.view_as_complex(draws[1]), torch.view_as_complex(draws[2])
    return A, B, C, draws[3, :, 0, 0].exp() / 10


# %% [markdown]
# Knock, and listen. Left, a plain decay and two pairs, each ringing at its own pitch and fading at its own pace. Right, their sum.

# %%
trio = [
    torch.tensor([v], dtype=torch.complex128) for v in ([-0.3 - 0.0j, -0.5 - 4j, -1.2 - 9j], [1, 1, 1], [0.2, 0.8, 0.9])
]
tenth = torch.tensor([0.1], dtype=torch.float64)
knock = torch.zeros(1, 80, 1, dtype=torch.float64)
knock[0, 0, 0] = 1
echo = s4d_slow(knock, *trio, tenth)[0, :, 0]
fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), sharey=True)
for j in range(3):
    left.plot(
        s4d_slow(knock, *(v[:, j : j + 1] for v in trio), tenth)[0, :, 0],
        label=f"eigenvalue {trio[0][0, j].item():.1f}",
    )
left.set(title="three eigenvalues", xlabel="time after the knock (steps)", ylabel="output")
left.legend(fontsize="small")
right.plot(echo)
right.set(title="their sum", xlabel="time after the knock (steps)")
crossings = int((echo[1:].sign() != echo[:-1].sign()).sum())
show(
    fig,
    f"""Answers to a single 1. Left: a plain decay, a damped wave with a period of {fmt(2 * math.pi / 0.4)} steps and a faster
    one with a period of {fmt(2 * math.pi / 0.9)} steps. Right: their sum changes its sign {crossings} times in 80 steps; a sum of
    three real decays can do so twice at most.""",
)

# %% [markdown]
# An EMA is the special case in which all eigenvalues are real. A sum of $n$ such decays crosses zero at most $n - 1$
# times. Complex eigenvalues *turn*, and things that turn can cancel for a while and then add up. That is how a linear
# state learns to wait.
#
# ## The identity: the same convolution as before
#
# Unroll the recurrence, exactly as in chapter 01. An input that is $s$ steps old has been multiplied by $\bar A$ exactly
# $s$ times:
#
# $$y_t = \sum_{s=0}^{t} k_s\, u_{t-s}, \qquad k_s = C \bar A^s \bar B = 2\,\mathrm{Re}\sum_n C_n \bar B_n\, \bar A_n^s .$$
#
# Nothing here asked $\bar A$ to be diagonal. The middle form holds for any matrix, also for HiPPO itself. So we can
# ask the elastic memory a precise question, *what was there 100 steps ago?* The past at age $s_0$ is
# $\sum_n x_n\, p_n(e^{-s_0})$: read the state with $C_n = p_n(e^{-s_0})$. Look at where the kernel sits and how it
# sharpens as $N$ grows.

# %%
dt, asked = 0.01, 100
fig, ax = plt.subplots(figsize=(6.5, 3.2))
strikes = {}
for N in (8, 32, 64):
    A, B = hippo_legs(N)
    advance = torch.linalg.matrix_exp(dt * A)
    x = torch.linalg.solve(A, (advance - torch.eye(N)) @ B)  # ZOH's Bbar: the state after a knock
    reading = legendre(N, math.exp(-dt * asked))
    kernel = []
    for _ in range(300):
        kernel.append(reading @ x)
        x = advance @ x
    kernel = torch.stack(kernel)
    strikes[N] = int(kernel.argmax()), int((kernel > kernel.max() / 2).sum())
    ax.plot(kernel, marker="", label=f"N = {N}", linestyle={8: ":", 32: "--", 64: "-"}[N])
ax.axvline(asked, color="#999999", linestyle=":")
ax.set(xlabel="lag (steps)", ylabel="weight", title="read with C = p(exp(-1)): what was there 100 steps ago?")
ax.legend()
show(
    fig,
    f"""Three kernels over 300 lags. With N = 8 a broad hill with its top at lag {strikes[8][0]}, {strikes[8][1]} steps wide at half
    of its height; with N = 32 a peak at {strikes[32][0]}, {strikes[32][1]} wide; with N = 64 at {strikes[64][0]},
    {strikes[64][1]} wide. Elsewhere they ripple around zero.""",
)

# %% [markdown]
# There it is: wait, then strike. No sum of sixteen plain averages could do that, and here it is not even learned, it is
# read off a theorem. Now the identity itself, loop against sum, for a random diagonal system:

# %%
system = random_system(dim=3, half=4)
A, B, C, dt = system
u = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
decay, push = discretize(A, B, dt)
kernel = torch.stack([2 * (C * push * decay**s).sum(-1).real for s in range(60)], dim=-1)  # (D, 60)
by_sum = torch.stack(
    [sum(kernel[:, s] * u[:, t - s] for s in range(t + 1)) for t in range(60)], dim=1
)  # the definition, two loops
print("loop over time = sum over lags, error", below((s4d_slow(u, *system) - by_sum).abs().max(), 1e-12))

# %% [markdown]
# ## The fast version
#
# The convolution we have: `long_convolution` of chapter 01, padded so that the end does not leak into the beginning.
# What is new is the kernel. Its table of powers $\bar A_n^s$ is called a **Vandermonde matrix**: for $D$ channels,
# $N/2$ states and $L$ lags, $D \times N/2 \times L$ complex numbers, thirty-two times as many as the kernel itself when
# $N = 64$. But powers multiply, and the trick of the EMA works again: with $s = a\,c + b$ and $c \approx \sqrt L$,
#
# $$k_{ac+b} = \mathrm{Re}\sum_n \underbrace{2 C_n \bar B_n \bar A_n^{ac}}_{\text{coarse}}\;\underbrace{\bar A_n^{b}}_{\text{fine}},
# \qquad \mathrm{Re}(p\,q) = \mathrm{Re}\,p\,\mathrm{Re}\,q - \mathrm{Im}\,p\,\mathrm{Im}\,q .$$
#
# Two short tables; and the sum over states, written with real and imaginary parts, is one real matrix product whose inner
# axis has length $N$.


# %%
def s4d_fast(u, A, B, C, dt):
    """The same arguments and the same result as s4d_slow."""
    return long_convolution(u, s4d_kernel(A, B, C, dt, u.shape[1]))


wide = random_system(dim=16, half=32)
length = 4096
single = [p.to(torch.complex64 if p.is_complex() else torch.float32) for p in wide]
forms = (s4d_kernel_vandermonde, s4d_kernel)
seconds = [quickest(lambda f=f: f(*single, length)) for f in forms]
memory = [peak_memory(lambda f=f: f(*single, length)) for f in forms]
block = math.isqrt(length - 1) + 1
print(f"powers: {16 * 32 * length:,} in the Vandermonde matrix, {2 * 16 * 32 * block:,} in two short tables")
print("the same kernel, error", below((forms[0](*wide, length) - forms[1](*wide, length)).abs().max(), 1e-10))
print("more than three times as fast:", seconds[0] > 3 * seconds[1])
print("peak memory less than a tenth:", memory[1] < memory[0] / 10)

# %% [markdown]
# ### Where to start
#
# Diagonal it is, then; but with which eigenvalues? The S4D paper gives a small menu, all with real part $-\frac12$ but
# one, and they differ in the imaginary parts, that is, in pitch: `lin` $\pi n$, evenly spaced, a damped Fourier series;
# `inv` and `quad`, dense at the bottom and sparse at the top; `real`, no turning at all; and `legs`, taken from HiPPO.
# Look at how the points spread over the circle, and at the shape of the sum of all states below.

# %%
kinds = ("lin", "inv", "quad", "legs", "real")
step = torch.tensor([0.03], dtype=torch.float64)
fig, axes = plt.subplots(2, 5, figsize=(9, 3.8), height_ratios=(3, 2), sharey="row")
periods, changes = {}, {}
for kind, (top, bottom) in zip(kinds, axes.T, strict=True):
    A, B = (v[None] for v in s4d_init(kind, 32))
    decay, _ = discretize(A, B, step)
    top.plot(circle.cos(), circle.sin(), marker="", color="#999999", linewidth=1)
    both = torch.cat([decay[0], decay[0].conj()])
    top.plot(both.real, both.imag, linestyle="", markersize=3, markevery=1, color=OKABE_ITO["vermilion"])
    top.set(title=kind, aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    k = s4d_kernel(A, B, torch.ones_like(A), step, 150)[0]
    bottom.plot(k / k.abs().max(), marker="")
    bottom.set(xlabel="lag (steps)", ylim=(-0.5, 1.1))
    turning = A.imag.abs()[A.imag != 0] * 0.03
    periods[kind] = [2 * math.pi / turning.max().item(), 2 * math.pi / turning.min().item()] if len(turning) else []
    changes[kind] = int((k[1:].sign() != k[:-1].sign()).sum())
for row, label in zip(axes[:, 0], ("imaginary part", "sum of all states"), strict=True):
    row.set_ylabel(label)
show(
    fig,
    f"""Five columns. Top, the sampled eigenvalues for N = 32 and dt = 0.03 in the unit circle; bottom, the sum of all states
    as a kernel, scaled to 1. lin: evenly along the right side, periods of {fmt(periods["lin"][0])} to
    {fmt(periods["lin"][1])} steps; its kernel is a train of pulses, one every {fmt(periods["lin"][1])} steps. inv and legs:
    dense near 1, a few points far around; quad: spread over the whole circle, the fast ones far apart; slowest periods of inv, quad and legs: {fmt(periods["inv"][1])}, {fmt(periods["quad"][1])} and
    {fmt(periods["legs"][1])} steps. real: on the real axis; its kernel changes sign {changes["real"]} times.""",
)

# %% [markdown]
# The evenly spaced `lin` adds up to a pulse that comes back, as a Fourier series must. `inv` and `legs` have a few fast
# eigenvalues for the new and many slow ones for the old, which is the wide-angle lens again. `quad` begins as slowly, but
# its steps widen so fast that most of its eigenvalues are fast: with this `dt` several turn by more than half a circle a
# step, and look like slower ones.
#
# ## Full S4: when HiPPO will not be diagonal
#
# We supposed that $A$ is diagonal in the right coordinates. For HiPPO these coordinates exist, and they are useless. The
# matrix of eigenvectors becomes singular at a breathtaking pace: to go there and back costs as many digits as its
# *condition number* has.

# %%
condition = {}
for N in (4, 8, 16):
    _, vectors = torch.linalg.eig(hippo_legs(N)[0])
    condition[N] = torch.linalg.cond(vectors).item()
    print(f"N = {N:2d}: condition number of the eigenvectors about 10^{round(math.log10(condition[N]))}")
print(
    "already beyond what double precision can carry at N = 32:",
    torch.linalg.cond(torch.linalg.eig(hippo_legs(32)[0])[1]).item() > 1e16,
)

# %% [markdown]
# ### Step 1: normal plus low rank
#
# But look at $A$: below the diagonal there is $-\sqrt{2n+1}\sqrt{2k+1}$, the corner of a matrix of rank one. Add *half*
# of the full rank-one matrix, $p\,p^\top$ with $p_n = \sqrt{n+\frac12}$. Below the diagonal half of $A$ remains, above
# it the same appears with the other sign, and on it $-\frac12$:
#
# $$A + p\,p^\top = -\tfrac12 + \text{(skew-symmetric)} .$$
#
# Skew-symmetric matrices are the best-natured there are: purely imaginary eigenvalues, and eigenvectors that are
# orthonormal, $V^{-1} = V^*$, condition number 1. In these coordinates
#
# $$A \;\to\; \Lambda - P P^*, \qquad \Lambda = -\tfrac12 + i\,\omega \text{ diagonal}, \quad P = V^* p, \quad B \to V^* B .$$
#
# Diagonal minus something of rank one: *DPLR*. The three pictures show it, for $N = 16$, on one scale.

# %%
A, b = hippo_legs(16)
p = b / math.sqrt(2)
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.3), sharey=True)
for ax, matrix, title in zip(
    axes,
    (A, A + torch.outer(p, p), -torch.outer(p, p)),
    ("A: HiPPO", "= -1/2 + skew-symmetric", "+ a matrix of rank one"),
    strict=True,
):
    image = ax.imshow(matrix, vmin=-24, vmax=24)
    ax.set(title=title, xlabel="k")
    ax.grid(False)
axes[0].set_ylabel("n")
fig.colorbar(image, ax=axes, label="entry", shrink=0.9, extend="both")
normal = A + torch.outer(p, p) + torch.eye(16) / 2
Lambda, P, B, V = hippo_legs_nplr(16)
full = torch.cat([V, V.conj()], dim=1)
facts = {
    "the middle one plus 1/2 is skew-symmetric": (normal + normal.T).abs().max(),
    "its eigenvectors are orthonormal": (full.mH @ full - torch.eye(16)).abs().max(),
    "put together again they give A": (
        2 * (V * Lambda @ V.mH).real - torch.outer(2 * (V @ P).real, 2 * (V @ P).real) - A
    )
    .abs()
    .max(),
}
show(
    fig,
    f"""Three 16 by 16 matrices on one colour scale. Left, A: zero above the diagonal, negative below, down to
    {fmt(A.min())}. Middle, A + p p^T: positive above the diagonal, negative below, mirror images. Right, -p p^T, which is
    negative everywhere. The middle and the right one add up to the left one.""",
)
for fact, size in facts.items():
    print(f"{fact}, error {below(size, 1e-10)}")

# %% [markdown]
# The low-rank part couples all states again, so $\bar A^s$ has no simple form any more, and a kernel of length $L$ seems
# to need $L$ products with a full matrix. S4's remaining three steps avoid all but a handful of them, by computing not the
# kernel itself but its Fourier transform.
#
# ### Step 2: the generating function
#
# Collect all lags in one function, $\hat K(\omega) = \sum_s k_s\,\omega^s$. At $\omega_j = e^{-2\pi i j/L}$ its values are the
# discrete Fourier transform of the kernel, and one inverse FFT brings the kernel back. Summed to infinity it would be a
# geometric series of matrices, $C(1 - \omega\bar A)^{-1}\bar B$: all powers gone, one inverse instead. We need only the
# first $L$ terms, so subtract the tail: from lag $L$ on it is the same series once more, with $\bar A^L$ in front, and
# $\omega^L = 1$ at these nodes. So
#
# $$\hat K(\omega) = \tilde C\,\bigl(1 - \omega\bar A\bigr)^{-1}\bar B, \qquad \tilde C = C\,\bigl(1 - \bar A^L\bigr) .$$
#
# A single power is left, the $L$-th, and repeated squaring gets it in $\log_2 L$ products. You will write this in
# exercise 4.
#
# ### Step 3: from the circle to the imaginary axis
#
# Put the bilinear $\bar A$ and $\bar B$ in, and multiply through by $1 - \frac\Delta2 A$. The inverses merge:
#
# $$\bigl(1-\omega\bar A\bigr)^{-1}\bar B = \frac{2}{1+\omega}\,\bigl(z - \Delta A\bigr)^{-1} \Delta B,
# \qquad z = 2\,\frac{1-\omega}{1+\omega} = 2i\tan\frac{\pi j}{L} .$$
#
# In words: the response of the sampled system on the unit circle is the response of the system in flowing time on the
# imaginary axis, where frequencies live. (Here is why bilinear was worth having.)
#
# ### Step 4: Woodbury and Cauchy
#
# Left to invert, for every frequency: $z - \Delta\Lambda + \Delta P P^*$, diagonal plus rank one. Woodbury's identity does it:
#
# $$\bigl(M + P P^*\bigr)^{-1} = M^{-1} - \frac{M^{-1} P\; P^* M^{-1}}{1 + P^* M^{-1} P} .$$
#
# (Here with $M = z - \Delta\Lambda$, and $\Delta P P^*$ in place of $P P^*$: each $\Delta$ goes into one of the sums below.
# Products such as $\tilde C P$ are taken entry by entry.) With $M$ diagonal, everything is a sum of the form $c(v) = \sum_n \Delta v_n/(z - \Delta\Lambda_n)$, a **Cauchy** sum:
#
# $$\hat K(\omega) = \frac{2}{1+\omega}\left[c(\tilde C B) - \frac{c(\tilde C P)\; c(P^* B)}{1 + c(P^* P)}\right] .$$
#
# Four sums of $N$ terms for each frequency. No matrix anywhere.
#
# **One node needs care.** For even $L$ there is $\omega = -1$ (the *Nyquist* frequency): $z$ is infinite, and the formula
# reads $\infty \cdot 0$. In floating point it survives only if $e^{-i\pi}$ is *not* quite $-1$. The limit is simple: for
# large $z$ the bracket tends to $\sum_n \Delta\,\tilde C_n B_n / z$, and $2/(1+\omega) = 1 + z/2$, so
# $\hat K(-1) = \frac\Delta2 \sum_n \tilde C_n B_n$ over all $N$ states.


# %%
def s4_by_hand(Lambda, P, B, C_tilde, dt, length):
    """One channel: Lambda, P, B, C_tilde (N,) complex with all conjugates, dt a number -> kernel (length,)."""
    j = torch.arange((length + 1) // 2, dtype=torch.float64)  # all nodes below Nyquist
    omega = torch.exp(-2j * math.pi * j / length)
    z = 2 * (1 - omega) / (1 + omega)

    def cauchy(v):
        return (dt * v / (z[:, None] - dt * Lambda)).sum(-1)

    bracket = cauchy(C_tilde * B) - cauchy(C_tilde * P) * cauchy(P.conj() * B) / (1 + cauchy(P.conj() * P))
    spectrum = 2 / (1 + omega) * bracket
    if length % 2 == 0:
        spectrum = torch.cat([spectrum, dt / 2 * (C_tilde * B).sum()[None]])
    return torch.fft.irfft(spectrum, n=length)


def both_halves(v):
    return torch.cat([v, v.conj()], dim=-1)


N, dt = 32, torch.tensor([0.02], dtype=torch.float64)
Lambda, P, B, _ = (v[None] for v in hippo_legs_nplr(N))
C = torch.randn(1, N // 2, generator=torch.Generator().manual_seed(2), dtype=torch.complex128)
dA, dB = (m[0] for m in dplr_dense(Lambda, P, B, dt))  # (N, N) and (N,): half, then conjugates
for length in (1, 2, 77, 256):
    powers, x = [], dB
    for _ in range(length):
        powers.append((both_halves(C)[0] @ x).real)  # C Abar^s Bbar, one dense product after the other
        x = dA @ x
    krylov = torch.stack(powers)
    C_tilde = both_halves(C)[0] - both_halves(C)[0] @ torch.linalg.matrix_power(dA, length)
    steps = {
        "Cauchy and Woodbury": s4_by_hand(*(both_halves(v)[0] for v in (Lambda, P, B)), C_tilde, dt[0], length),
        "the package": s4_kernel(Lambda, P, B, tilde_from_c(Lambda, P, C, dt, length), dt, length)[0],
    }
    worst = max((k - krylov).abs().max().item() for k in steps.values())
    print(f"length {length:3d}: both give the dense kernel, error {below(worst, 1e-11)}")

# %% [markdown]
# The package's `s4_kernel` does the same for all channels. It joins conjugate pairs into real arithmetic, and it evaluates
# the sums for a block of frequencies at a time (in training once more on the way back), so that no table of
# $D \times N \times L$ ever exists. Where the published code stores $\tilde C$, which belongs to one length, our `S4` keeps
# the true $C$ and makes $\tilde C$ when the length is known: every length is exact, and streaming needs no set-up.
#
# ### What the low rank is worth
#
# S4D-LegS keeps $\Lambda$ and drops $P$. Is it still HiPPO? The S4D paper proves that it is in the limit of large $N$, if
# $B$ is halved. Here is the very first Legendre state, $e^{-s}$, as the diagonal system draws it with steps of 0.01 (ZOH).
# Look at what surrounds the smooth curve, and what becomes of it.

# %%
dt = torch.tensor([0.01], dtype=torch.float64)
s = 0.01 * torch.arange(301, dtype=torch.float64)
hippo = torch.exp(-s[:-1]) - torch.exp(-s[1:])  # exp(-s), integrated over each step
fig, ax = plt.subplots(figsize=(6, 3.1))
hash_size, unsampled = {}, {}
for N in (16, 64, 256):
    Lambda, _, B, V = (v[None] for v in hippo_legs_nplr(N))
    drawn = s4d_kernel(Lambda, B / 2, V[:, 0], dt, 300)[0]
    hash_size[N] = ((drawn - hippo).norm() / hippo.norm()).item()
    flowing = (torch.exp(Lambda[0] * s[:-1, None]) @ (V[0, 0] * B[0])).real  # exp(s Lambda), not sampled
    unsampled[N] = ((flowing - torch.exp(-s[:-1])).norm() / torch.exp(-s[:-1]).norm()).item()
    ax.plot(s[:-1], 100 * drawn, marker="", linewidth=1, label=f"diagonal, N = {N}")
ax.plot(s[:-1], 100 * hippo, marker="", color="black", linestyle="--", label="HiPPO")
ax.set(xlabel="age s", ylabel="weight of the past in state 0", ylim=(-0.6, 2.4))
ax.legend(fontsize="small", ncols=2)
show(
    fig,
    f"""The kernel of the first Legendre state. Dashed, HiPPO's smooth decay exp(-s). Solid, the diagonal system: the same
    decay under a hash of oscillations, off by {fmt(hash_size[16])}, relative, with N = 16, by {fmt(hash_size[64])} with N = 64, and
    by {fmt(hash_size[256])} with N = 256, where it lies on the dashed curve but for the first steps.""",
)
print(
    "four times the states, less than half the deviation:",
    hash_size[64] < hash_size[16] / 2 and hash_size[256] < hash_size[64] / 2,
)
print("in flowing time, without sampling, it stays above a half for each N:", min(unsampled.values()) > 0.5)

# %% [markdown]
# In flowing time the hash never becomes smaller, only faster; but sampling averages over each step, and no longer hears it.
# With the 16 to 64 states of real layers S4D-LegS is thus a noisy relative of HiPPO. Trained, it comes close to S4 all the
# same in the published comparisons: a good *start* is what counts, the rest is learned.
#
# ## They agree: values and gradients
#
# Fast and slow, values and the gradient of one fixed random combination of all outputs with respect to every argument,
# complex ones included, in double precision and at awkward lengths.


# %%
def values_and_gradients(form, arguments):
    inputs = [tensor.clone().requires_grad_() for tensor in arguments]
    y = form(*inputs)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)]


def worst_error(first, second):
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in zip(first, second, strict=True))


A, B, C, dt = random_system(dim=3, half=4)
P = torch.randn(3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.complex128)
for length in (1, 2, 101, 256):
    u = torch.randn(2, length, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    loop = values_and_gradients(s4d_slow, (u, A, B, C, dt))
    fast = values_and_gradients(s4d_fast, (u, A, B, C, dt))
    tilde = tilde_from_c(A, P, C, dt, length)
    dense = values_and_gradients(lambda *v, n=length: s4_kernel_dense(*v, n), (A, P, B, tilde, dt))
    cauchy = values_and_gradients(lambda *v, n=length: s4_kernel(*v, n), (A, P, B, tilde, dt))
    print(
        f"length {length:3d}: S4D, y and five gradients {below(worst_error(fast, loop), 1e-9)};"
        f" S4, kernel and five gradients {below(worst_error(cauchy, dense), 1e-9)}"
    )

# %% [markdown]
# ## How it grows
#
# Four ways to a kernel or an output, on one core: the loop over time, the Vandermonde matrix, the two short tables, and
# the Cauchy sums of full S4 (with its $\tilde C$). First time, on logarithmic axes, then memory in training. Look at the
# slopes, and at how far apart the parallel lines are.

# %%
torch.manual_seed(0)
dim, N = 8, 32
diagonal = [p.detach() for p in S4D(dim, N).system()]
lowrank = [p.detach() for p in S4(dim, N).system()]


def cauchy_kernel(Lambda, P, B, C, dt, length):
    return s4_kernel(Lambda, P, B, tilde_from_c(Lambda, P, C, dt, length), dt, length)


ways = {
    "loop (S4D)": (lambda n: s4d_recurrent(torch.ones(1, n, dim), *diagonal), [512, 1024, 2048, 4096]),
    "Vandermonde": (lambda n: s4d_kernel_vandermonde(*diagonal, n), [1024, 2048, 4096, 8192]),
    "two tables": (lambda n: s4d_kernel(*diagonal, n), [4096, 16384, 65536]),
    "Cauchy (S4)": (lambda n: cauchy_kernel(*lowrank, n), [4096, 16384, 65536]),
}
fig, ax = plt.subplots(figsize=(9, 3.6))
times, growth = {}, {}
for name, (way, lengths) in ways.items():
    times[name] = {n: quickest(lambda way=way, n=n: way(n)) for n in lengths}
    growth[name] = growth_exponent(lengths, list(times[name].values())).exponent
    ax.plot(lengths, [1e3 * t for t in times[name].values()], label=f"{name}: time ~ length^{growth[name]:.1f}")
ax.set(xscale="log", yscale="log", xlabel="length (steps)", ylabel="time (ms)")
ax.set_xticks([512, 2048, 8192, 32768], ["512", "2,048", "8,192", "32,768"])
ax.minorticks_off()
fig.legend(fontsize="small", loc="outside right upper")
facts = {
    "loop: about linear": 0.7 < growth["loop (S4D)"] < 1.4,
    "Vandermonde: linear or worse": 0.6 < growth["Vandermonde"] < 2.2,
    "two tables: linear at most": growth["two tables"] < 1.3,
    "Cauchy: linear at most": growth["Cauchy (S4)"] < 1.3,
    "at 4,096 steps two tables are at least 20 times faster than the loop": (
        times["loop (S4D)"][4096] > 20 * times["two tables"][4096]
    ),
    "and faster than Vandermonde": times["Vandermonde"][4096] > times["two tables"][4096],
    "S4 costs more than S4D": times["Cauchy (S4)"][65536] > times["two tables"][65536],
}
show(
    fig,
    "Time against length on logarithmic axes, 8 channels with N = 32. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)


# %% [markdown]
# The loop is linear and slow, for the reason we know: a queue of tiny operations. The Vandermonde matrix is linear too, and
# pays a complex power for every state and lag. The two tables have hardly begun to feel the length: there are only
# $\sqrt L$ powers to compute, and the rest is one matrix product. Full S4 pays its four Cauchy sums at every frequency,
# linear again, well above S4D and well below the loop.


# %%
def memory_to_learn(kernel, system, length):
    """Peak bytes of one forward and backward pass, for each number of the kernel."""
    inputs = [p.clone().requires_grad_() for p in system]
    return peak_memory(lambda: kernel(*inputs, length).sum().backward()) / (dim * length)


held = {
    (name, n): memory_to_learn(kernel, system, n)
    for name, kernel, system in (
        ("Vandermonde", s4d_kernel_vandermonde, diagonal),
        ("two tables", s4d_kernel, diagonal),
        ("Cauchy", cauchy_kernel, lowrank),
    )
    for n in (4096, 32768)
}
print("bytes held in training for each number of the kernel, at lengths 4,096 and 32,768")
print("  Vandermonde: more than 500, both times:", min(held["Vandermonde", n] for n in (4096, 32768)) > 500)
print(
    "  two tables: fewer than 60, and fewer still when longer:",
    60 > held["two tables", 4096] > held["two tables", 32768],
)
print("  Cauchy sums in blocks: less than half when longer:", held["Cauchy", 32768] < held["Cauchy", 4096] / 2)

# %% [markdown]
# Four bytes is what the number itself takes. The Vandermonde matrix holds hundreds for it, as many as there are states and
# passes. The two tables are so short that they hardly count beside the result. (The convolution itself comes on top in
# each case: an FFT, $L \log L$.) The blocks of the Cauchy sums have a fixed size, so their share falls the longer the
# sequence gets. (Published implementations of full S4 that keep the whole Cauchy table hold gigabytes at a length of
# 16,384 with 64 channels.)

# %% [markdown]
# ## Why this is fast
#
# Chapter 01 has counted an FFT, cut time into blocks of 64 steps, and measured a floor. (It called their length $C$. Here
# $C$ reads the state, so a block has $\ell$ steps.) All of it holds here. What is
# new are three bills that an EMA does not have to pay: powers of *complex* numbers, states that *turn*, and a matrix that is
# *not diagonal*.
#
# **Complex powers.** The kernel's definition asks for $D \cdot \frac N2 \cdot L$ powers $e^{s\Delta A}$. A processor
# multiplies and adds many billion times a second, but an exponential is a little program of its own, and a complex one is
# often written with much less care than a real one. Three ways to the same kernel, in the order in which one finds them:
#
# 1. the complex exponential of every power;
# 2. the same powers as $e^{\text{real part}}$ times a cosine and a sine: only real functions, made for speed;
# 3. the two tables: about $2\sqrt L$ powers of each eigenvalue in place of $L$, computed as in 2, and for the rest
#    $2N$ operations a lag in a matrix product.


# %%
from longseq_tutorial.mechanisms.blocks import Tables, block_recurrence_plain

dim, N, length = 32, 64, 4096
diagonal, lowrank = ([p.detach() for p in layer.system()] for layer in (S4D(dim, N), S4(dim, N)))
lags = torch.arange(length)


def weights_and_rates(A, B, C, dt):
    _, push = discretize(A, B, dt)
    return (2 * C * push)[..., None], (dt[:, None] * A)[..., None]  # (D, N/2, 1) each


def complex_exponentials(*system):
    weight, rate = weights_and_rates(*system)
    return (weight * torch.exp(rate * lags)).real.sum(1)


def real_functions(*system):
    weight, rate = weights_and_rates(*system)
    size, angle = torch.exp(rate.real * lags), rate.imag * lags
    return (weight.real * size * torch.cos(angle) - weight.imag * size * torch.sin(angle)).sum(1)


kernels = {
    "complex exp": complex_exponentials,
    "exp, cos, sin": real_functions,
    "two tables": lambda *system: s4d_kernel(*system, length),
}
seconds_for_kernel = {name: quickest(lambda f=f: f(*diagonal)) for name, f in kernels.items()}
wide = [p[:4].to(torch.complex128 if p.is_complex() else torch.float64) for p in diagonal]  # four channels
truth = complex_exponentials(*wide)
wrong = max((f(*wide) - truth).abs().max() for f in kernels.values())
print("the same kernel three times, error", below(wrong, 1e-9))
print(f"powers: {dim * N // 2 * length:,} twice, then {dim * N // 2 * 2 * math.isqrt(length):,}")
for first, second in (("complex exp", "exp, cos, sin"), ("exp, cos, sin", "two tables")):
    faster = seconds_for_kernel[first] > 1.3 * seconds_for_kernel[second]
    print(f"'{second}' at least 1.3 times as fast as '{first}':", faster)

# %% [markdown]
# **States that turn.** In blocks, $y = T x + V h$ and $h' = q^{\ell} h + W x$ as in chapter 01, with complex $V$, $W$ and $h$. But
# matrix products want real numbers. So a state is written down as the pair $(\mathrm{Re}\,h, \mathrm{Im}\,h)$, two columns
# of $V$ are $2\,\mathrm{Re}(C\bar A^{t+1})$ and $-2\,\mathrm{Im}(C\bar A^{t+1})$, and two rows of $W$ the real and the
# imaginary part of $\bar A^{s}\bar B$. S4D with $N/2$ complex states then *is* an EMA with $N$ real ones, for all the large
# products; only where a state crosses into the next block does $q^{\ell}$ multiply it as a complex number. The bill for each number
# of a channel: $2(\ell + 2N)$ operations, 384 for $N = 64$.
#
# **A matrix that is not diagonal.** Which of this needs $\bar A$ to be diagonal? Nothing! $V$ holds $C\bar A^{t+1}$, $W$ holds
# $\bar A^s \bar B$, and the state crosses a block by $\bar A^{64}$, whatever $\bar A$ is. And the powers come cheaply, by
# *doubling*: whoever has $\bar B, \dots, \bar A^{m-1}\bar B$ and $\bar A^m$ multiplies the one by the other, and has twice
# as many. Six doublings make 64. No generating function, no Cauchy sums, no Woodbury: HiPPO's own matrix will do, the one
# whose eigenvectors are useless.


# %%
def doubled(Abar, Bbar, C, block):
    """Any real system, Abar (D, N, N), Bbar and C (D, N): what it does in a block, a power of two, of steps."""
    power, write, read = Abar, Bbar[..., None], C[:, None] @ Abar  # Abar; Bbar; C Abar
    while write.shape[2] < block:
        write = torch.cat([write, power @ write], dim=2)  # (D, N, m) -> (D, N, 2m)
        read = torch.cat([read, read @ power], dim=1)  # (D, m, N) -> (D, 2m, N)
        power = power @ power
    return Tables(kernel=(C[:, None] @ write)[:, 0], read=read, write=write.flip(-1), decay=power)


A, B = hippo_legs(64)
half, one = 0.01 / 2 * A, torch.eye(64, dtype=A.dtype)
Abar, Bbar = torch.linalg.solve(one - half, one + half), torch.linalg.solve(one - half, 0.01 * B)  # bilinear
reading = legendre(64, math.exp(-1))  # what was there 100 steps ago?
u = torch.randn(1, 512, 1, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
in_blocks, last = block_recurrence_plain(u, lambda block: doubled(Abar[None], Bbar[None], reading[None], block))
x, y = torch.zeros_like(B), []
for value in u[0, :, 0]:
    x = Abar @ x + Bbar * value
    y.append(reading @ x)
print("HiPPO itself, in blocks = step by step, error", below((in_blocks[0, :, 0] - torch.stack(y)).abs().max(), 1e-9))
print("and the state at the end, error", below((last[0, 0] - x).abs().max(), 1e-9))

# %% [markdown]
# The package's `s4_tables` needs no matrix power at all but the last. For there Woodbury still earns its bread: it writes
# $\bar A$ down, without solving anything, as a diagonal minus a column times a row, $\bar A = M - k\,r$. Take a power apart
# from the left, one factor at a time:
#
# $$\bar A^n = M^n - k\,r\bar A^{n-1} - M k\,r\bar A^{n-2} - \dots \;=\;
#   M^n - \sum_{t < n} \big(M^{n-1-t} k\big)\,\big(r \bar A^t\big) .$$
#
# That is a diagonal and *one product of two thin matrices*, $N \times n$ and $n \times N$, if only the rows $r \bar A^t$ were
# known. Read the whole formula with $r$, and it says how to get them:
#
# $$r\bar A^n + \sum_{t < n} \big(r M^{n-1-t} k\big)\; r \bar A^t = r M^n .$$
#
# Each row is $rM^n$, powers of numbers, less the rows before it, with weights that are numbers too: $\ell$ equations, a triangle,
# solved in one call for all $N$ columns. The same formula then gives $C\bar A^{t+1}$ and $\bar A^s \bar B$. Nothing is squared,
# which would double the errors of phase each time, and only $M$ needs double precision.

# %%
torch.manual_seed(0)
m, k, r = torch.rand(N).double(), torch.randn(N).double(), torch.randn(N).double() / N
dense = torch.diag(m) - torch.outer(k, r)
rows_as_defined = torch.stack([r @ torch.linalg.matrix_power(dense, t) for t in range(13)])

powers = m ** torch.arange(13)[:, None]  # (13, N)
weight = (r * powers) @ k  # r M^j k
triangle = torch.stack([torch.cat([weight[:n].flip(0), torch.zeros(13 - n)]) for n in range(13)]) + torch.eye(13)
rows = torch.linalg.solve_triangular(triangle, r * powers, upper=False)
thirteenth = torch.diag(m**13) - (powers.flip(0) * k).T @ rows
print("thirteen rows from one triangle, error", below((rows - rows_as_defined).abs().max(), 1e-12))
print(
    "the thirteenth power, a diagonal and a thin product, error",
    below((thirteenth - torch.linalg.matrix_power(dense, 13)).abs().max(), 1e-12),
)

# %% [markdown]
# The bill: $\ell^2 N$ operations for the triangle and three thin products, about $7N^3$ for each channel where $\ell = N$,
# *whatever the length* (below 4,096 steps the package halves $\ell$: then the tables are what costs). And for each number
# $2(\ell + 2N)$ as before, plus $2N^2/\ell$ for the state that crosses a block by a full matrix: 512 in all. The Cauchy sums need $N/2$ fractions
# at each of $L/2$ frequencies, about ten operations each and thirty more to sum them up, which is more already; and the FFTs
# follow.
#
# Now the clock. Left, the three kernels of above. Right, the whole layer, forward, for each number of a sequence:
# convolutions, blocks, and the floor of the blocks, that is, the time that a plain matrix product of as many operations
# takes on this machine, and the time to copy 8 bytes. Look at who wins where.

# %%
square, large = torch.randn(1024, 1024), torch.randn(2**23)
an_operation = quickest(lambda: square @ square) / (2 * 1024**3)
a_byte = quickest(lambda: large.clone()) / (2 * 4 * large.numel())
lengths = [1024, 8192, 65536]
torch.manual_seed(0)
s4d_layer, s4_layer = S4D(dim, N), S4(dim, N)
ways = {
    "S4D: two tables, FFT": lambda u: long_convolution(u, s4d_kernel(*diagonal, u.shape[1])),
    "S4D: blocks": s4d_layer,
    "S4: Cauchy, FFT": lambda u: long_convolution(u, cauchy_kernel(*lowrank, u.shape[1])),
    "S4: blocks": s4_layer,
}
cost = {}
with torch.no_grad():
    for name, way in ways.items():
        inputs = [torch.randn(1, n, dim) for n in lengths]
        cost[name] = [quickest(lambda way=way, u=u: way(u)) / u.numel() for u in inputs]
floor = {
    "S4D": 2 * (64 + 2 * N) * an_operation + 8 * a_byte,
    "S4": (2 * (64 + 2 * N) + 2 * N**2 / 64) * an_operation + 8 * a_byte,
}

fig, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3), width_ratios=(2, 3))
left.plot([1e9 * t / (dim * length) for t in seconds_for_kernel.values()], list(kernels), linestyle="", markersize=9)
left.invert_yaxis()
left.margins(0.2)
left.set(xscale="log", xlabel="ns for each lag", title="S4D, 4,096 lags")
for name, seconds in cost.items():
    right.plot(lengths, [1e9 * t for t in seconds], label=name)
for name, height in floor.items():
    right.axhline(1e9 * height, color="black", linestyle=":" if name == "S4D" else "--", label=f"{name}: floor", lw=1)
right.set(xscale="log", yscale="log", xlabel="length (steps)", ylabel="ns for each number", title="the layers")
right.set_xticks(lengths, [f"{n:,}" for n in lengths])
right.set_yticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
right.minorticks_off()
fig.legend(*right.get_legend_handles_labels(), fontsize="small", loc="outside right upper")
d_fft, d_blocks, s_fft, s_blocks = cost.values()
facts = {
    "at 1,024 steps S4D by FFT is faster than in blocks": d_fft[0] < d_blocks[0],
    "at 65,536 steps S4D in blocks is faster than by FFT": d_blocks[-1] < d_fft[-1],
    "and full S4 in blocks more than 1.5 times as fast as by Cauchy sums": s_fft[-1] > 1.5 * s_blocks[-1],
    "both blocks need less time for each number than at 1,024 steps": (
        d_blocks[-1] < d_blocks[0] and s_blocks[-1] < s_blocks[0]
    ),
    "and are then within 20 times of their floors": (
        d_blocks[-1] < 20 * floor["S4D"] and s_blocks[-1] < 20 * floor["S4"]
    ),
}
show(
    fig,
    "Left: points, the time for each lag of an S4D kernel by complex exponentials, by real functions, by two tables, "
    "each to the left of the one before. Right: time for each number against the length, 32 channels with N = 64, for S4D and S4, "
    "each as a convolution and in blocks, and two floors below. "
    + "; ".join(f"{fact}: {holds}" for fact, holds in facts.items())
    + ".",
)
held = {}
for name, way in ways.items():
    u = torch.randn(1, 16384, dim, requires_grad=True)
    parameters = lowrank if "S4:" in name else diagonal
    for p in parameters:
        p.requires_grad_()
    held[name] = peak_memory(lambda way=way, u=u: way(u).sum().backward())
print("memory to learn from 16,384 steps, blocks against convolution")
print("  S4D: less than two thirds:", held["S4D: blocks"] < held["S4D: two tables, FFT"] * 2 / 3)
print("  full S4: less than three quarters:", held["S4: blocks"] < held["S4: Cauchy, FFT"] * 3 / 4)

# %% [markdown]
# What brought most? For S4D's kernel the two tables, once the complex exponential is gone; and with such a kernel the FFT is a
# good form. At a thousand steps it *beats* the blocks, whose tables cost the same for any length and are not yet paid off; at
# 65,536 they have overtaken it, and learning with them takes less memory. For full S4 it was to leave the Cauchy sums for a few
# thin products: a fixed price, and the longer the sequence, the smaller its share, while each frequency of the Cauchy sums costs
# what it costs.
#
# The distance to the floor that remains is the tables, the channels' way from the last axis to the first and back, and in
# full S4 the state: its way through a full matrix is one thin product after another, which no processor does at full speed.
# The kernel stays what one looks at and reasons with; `S4D` and `S4` run in blocks.
#
# ## The echo, once more
#
# Chapter 01 left us with a target that no EMA liked: white noise in, the same noise fifty steps later out. Now three
# layers try, one channel each and without their skips, 300 updates: the damped EMA with 64 averages; S4D with 64 eigenvalues
# that are kept on the real axis; and S4D with 32 conjugate pairs that start as a Fourier series, with `dt` = 1/32, so that
# the fastest wave turns by about half a circle a step. All three carry 64 numbers. Look at the kernels they end with.


# %%
def learn_echo(layer, delay=50, updates=300, length=512):
    """Fit `layer` to an echo; the relative error of every update."""
    torch.manual_seed(1)
    layer.double()
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(updates):
        x = torch.randn(8, length, 1, dtype=torch.float64)
        wanted = F.pad(x, (0, 0, delay, 0))[:, :length]
        loss = (layer(x) - wanted).square().mean() / wanted.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


torch.manual_seed(0)
layers = {
    "EMA": DampedEMA(1, n=64),
    "S4D, real": S4D(1, 128, "real", dt_min=1 / 32, dt_max=1 / 32),
    "S4D, lin": S4D(1, 64, "lin", dt_min=1 / 32, dt_max=1 / 32),
}
layers["S4D, real"].imag.requires_grad_(False)  # it may not begin to turn
for skip in (layers["EMA"].omega, layers["S4D, real"].skip, layers["S4D, lin"].skip):
    torch.nn.init.zeros_(skip).requires_grad_(False)
with torch.no_grad():
    before = layers["S4D, lin"].double().kernel(150)[0]
remaining = {name: float(np.mean(learn_echo(layer)[-20:])) for name, layer in layers.items()}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.1))
axes[0].plot(before, marker="", color="#999999", linestyle="--", label="S4D, lin: before")
for ax, names in zip(axes, (["S4D, lin"], ["EMA", "S4D, real"]), strict=True):
    for name in names:
        with torch.no_grad():
            ax.plot(layers[name].kernel(150)[0], marker="", label=f"{name}: after")
    ax.axvline(50, color="#999999", linestyle=":")
    ax.set(xlabel="lag (steps)")
    ax.legend(fontsize="small")
axes[0].set(ylabel="weight")
axes[1].set(ylabel="weight (mind the scale)")
with torch.no_grad():
    learned = layers["S4D, lin"].kernel(150)[0]
show(
    fig,
    f"""Kernels after learning an echo of 50 steps. Left, S4D that started as a Fourier series: a single spike at lag
    {int(learned.argmax())}, more than 0.8 high: {bool(learned.max() > 0.8)}, and next to nothing elsewhere. Right, the EMA and S4D
    with real eigenvalues: low hills. Relative errors: S4D lin below 0.1: {remaining["S4D, lin"] < 0.1}; S4D real above 0.8:
    {remaining["S4D, real"] > 0.8}; EMA above 0.8: {remaining["EMA"] > 0.8}.""",
)

# %% [markdown]
# The same number of numbers, the same training. What makes the difference is that the eigenvalues may turn, and that they
# start out turning.
#
# ### At half the rate
#
# Because the layer is a differential equation underneath, it knows nothing of samples. Give it a recording with half the
# sampling rate, double `dt`, and it is the *same* system in flowing time: an echo after 50 samples becomes one after
# 25. Nothing has to be trained again. (This is how S4 models classify speech at a rate they were not trained on.)

# %%
with torch.no_grad():
    A, B, C, dt = layers["S4D, lin"].system()
    halved = s4d_kernel(A, B, C, 2 * dt, 75)[0]
print("largest weight at lag", int(learned.argmax()), "before, and with dt doubled at lag", int(halved.argmax()))

# %% [markdown]
# ### One step at a time
#
# Both layers stream. S4D multiplies $N/2$ complex numbers a step. Full S4 has a full matrix $\bar A$, which would be $N^2$
# products; but $\bar A$ is a product of *diagonal plus rank one* and the inverse of such, so Woodbury makes it a
# few times $N$ here as well (`s4_recurrent`). The state does not grow, and the result is that of the convolution.
#
# So there are three ways through a sequence: all steps at once, one at a time, and the blocks in between, which the modules
# take in `forward`. They are the same function.

# %%
u = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
for layer in (S4D(3, 16).double(), S4(3, 16).double()):
    with torch.no_grad():
        parallel = layer(u)
        state, stream = layer.initial_state(batch=2), []
        for t in range(u.shape[1]):
            y_t, state = layer.step(u[:, t], state)
            stream.append(y_t)
        convolution = long_convolution(u, layer.kernel(u.shape[1])) + layer.skip * u
    print(type(layer).__name__)
    print("  streaming = blocks, error", below((torch.stack(stream, dim=1) - parallel).abs().max(), 1e-10))
    print("  convolution with its kernel = blocks, error", below((convolution - parallel).abs().max(), 1e-10))
    print("  complex numbers carried from step to step, per sequence:", state[0].numel())
try:
    S4(3, bidirectional=True).initial_state(batch=2)
except ValueError as refusal:
    print("bidirectional:", refusal)

# %% [markdown]
# Classifiers use both directions: a second $C$ reads the same kind of states run from the end. In our layers both kernels
# hold lag 0, as in the EMA, so the present counts twice; the published S4 lets its backward kernel begin one step later.
#
# ## Traps
#
# **1 · A length in the parameters.** $\tilde C$ made for one length is wrong for another, silently.

# %%
torch.manual_seed(0)
Lambda, P, B, C, dt = (p.detach() for p in S4(1, 16, dt_min=0.01, dt_max=0.01).double().system())
stored = tilde_from_c(Lambda, P, C, dt, 60)
short = s4_kernel(Lambda, P, B, stored, dt, 60)
wrong = s4_kernel(Lambda, P, B, stored, dt, 120)[:, :60]
mended = tilde_from_c(Lambda, P, c_from_tilde(Lambda, P, stored, dt, 60), dt, 120)
right = s4_kernel(Lambda, P, B, mended, dt, 120)[:, :60]
scale = short.abs().max()
print(
    "C_tilde of length 60 used for 120, relative error above 0.1:", ((wrong - short).abs().max() / scale).item() > 0.1
)
print("through the true C, relative error", below((right - short).abs().max() / scale, 1e-9))

# %% [markdown]
# **2 · Phase in single precision.** A fast eigenvalue turns by thousands of radians within a long kernel. A float32 angle of
# a hundred thousand has hardly two decimals left. The package forms the angles in double precision (the tables are short, it
# costs nothing) and returns float32.

# %%
fast_mode, step = torch.tensor([[-0.01 - 1234.5j]]), torch.tensor([0.0371])
unit = torch.ones_like(fast_mode)
truth = s4d_kernel(*(v.to(torch.complex128) for v in (fast_mode, unit, unit)), step.double(), 16384)
_, push = discretize(fast_mode, unit, step)
naive = 2 * (push[..., None] * torch.exp(step * fast_mode * torch.arange(16384.0))).sum(1).real
ours = s4d_kernel(fast_mode, unit, unit, step, 16384)
scale = truth.abs().max()
print("angles in float32, relative error above 0.001:", ((naive - truth).abs().max() / scale).item() > 1e-3)
print("the package in float32, relative error", below((ours - truth).abs().max() / scale, 1e-4))

# %% [markdown]
# **3 · A positive real part.** One eigenvalue on the wrong side of the axis and the kernel explodes. So the real part is stored
# as the logarithm of its negative, and no update can push it across.

# %%
runaway = torch.tensor([[0.5 - 3j]], dtype=torch.complex128)
k = s4d_kernel_vandermonde(
    runaway, torch.ones_like(runaway), torch.ones_like(runaway), torch.tensor([0.1]).double(), 1000
)
print("real part +0.5: last lag beyond 10^18:", k[0, -100:].abs().max().item() > 1e18)
pushed = S4D(1, 16)
with torch.no_grad():
    pushed.log_real += 5
    print("the module's, pushed hard: still finite:", bool(pushed.kernel(1000).isfinite().all()))

# %% [markdown]
# **4 · The unpadded FFT**, $0^0$, denormals, half precision: all of chapter 01's traps are here as well, and are avoided in
# the same way. A new one beside them: complex *parameters* confuse optimisers, averaging and mixed precision, so each is
# stored as a pair of real numbers.
#
# ## The panel: drag the eigenvalues
#
# Top left the eigenvalues of one step in the unit circle; top right the kernel of the question *what was there so many steps
# ago?* (the best that any $C$ can do); below its frequency response, and a past rebuilt from the state alone. Things to try:
#
# 1. `lin`: the kernel strikes twice. When does the second strike come, and which slider moves it?
# 2. `real`: how many directions of the past does the state tell apart, for all its numbers?
# 3. Turn the imaginary parts up until points cross to the left half of the circle: which pasts are rebuilt worse, which better?
# 4. `bilinear` with a large `dt`: where do the fast eigenvalues go?

# %%
panel = StateMemory()
panel

# %%
print(panel.set(kind="real", states=64).say())
print(panel.set(kind="legs", asked=80).say())
print(panel.set(kind="lin", states=32, dt=0.2, method="bilinear", signal="noise").say())

# %% [markdown]
# It also takes any `S4D` or `S4`, and a past of your own. Here is the layer that learned the echo, with the speech from the
# beginning of this chapter.

# %%
trained = StateMemory(layers["S4D, lin"], past=clip, length=200)
trained

# %%
print(trained.set(stretch=0.5).say())

# %% [markdown]
# ## Exercises
#
# From easy to hard. Each check says what is wrong and, often, why. *Run all* never stops here. The rest of the chapter uses
# the package's functions, whatever you write.
#
# ### Exercise 1 · Bilinear
#
# Difficulty: ●○○ · Importance: ●●○ · 10 minutes
#
# Write `bilinear(A, B, dt)`: eigenvalues and input weights `(D, N/2)`, complex, and `dt (D,)`, to $\bar A$ and $\bar B$,
# both `(D, N/2)`.
#
# <details><summary>Hint 1</summary>
#
# Start from $x_t = x_{t-1} + \frac\Delta2 A(x_{t-1} + x_t) + \Delta B u_t$ and bring $x_t$ to the left.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `dt` belongs to channels, the first axis of `A`: `dt[:, None]`.
#
# </details>


# %%
def bilinear(A, B, dt):
    """A, B (D, N/2) complex, dt (D,) -> Abar, Bbar (D, N/2)."""
    # BEGIN SOLUTION "your turn: solve the averaged step for the new state"
    half = dt[:, None] / 2 * A
    return (1 + half) / (1 - half), dt[:, None] * B / (1 - half)
    # END SOLUTION


# %%
check_bilinear(bilinear)

# %% [markdown]
# ### Exercise 2 · The kernel
#
# Difficulty: ●●○ · Importance: ●●● · 10 minutes
#
# Write `my_s4d_kernel(Abar, Bbar, C, length)`: sampled system, all `(D, N/2)` complex, to the kernel `(D, length)`, real. The
# Vandermonde matrix is fine here.
#
# <details><summary>Hint 1</summary>
#
# $k_s = 2\,\mathrm{Re}\sum_n C_n \bar B_n \bar A_n^s$. `Abar[..., None] ** torch.arange(length)` is `(D, N/2, length)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `.real` once, at the very end; the product of two real parts is not the real part of the product.
#
# </details>


# %%
def my_s4d_kernel(Abar, Bbar, C, length):
    """Abar, Bbar, C (D, N/2) complex -> (D, length) real."""
    # BEGIN SOLUTION "your turn: powers of Abar, weighted with C * Bbar, summed over the states, twice the real part"
    powers = Abar[..., None] ** torch.arange(length)  # (D, N/2, length)
    return 2 * ((C * Bbar)[..., None] * powers).sum(1).real
    # END SOLUTION


# %%
check_s4d_kernel(my_s4d_kernel)

# %% [markdown]
# ### Exercise 3 · What was there?
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# The elastic memory, read with $C_n = p_n(e^{-s_0})$, answers what was there the time $s_0$ ago. Write its kernel in closed form,
# without any matrix: `recall_kernel(N, age, dt, length)` gives `(length,)`, float64. `age` is $s_0$ in units of time, and lag $l$
# has the age $l \cdot$ `dt`. A sample acts for the time `dt`.
#
# <details><summary>Hint 1</summary>
#
# After the time $s$ a knock has left $e^{-s} p_n(e^{-s})$ in state $n$ (section *Without a clock*).
#
# </details>
# <details><summary>Hint 2</summary>
#
# `legendre(N, r)` with $r$ of shape `(length,)` is the table `(length, N)` of all $p_n(r)$; with a number, it is `(N,)`.
#
# </details>


# %%
def recall_kernel(N, age, dt, length):
    """The weight of each lag in the answer to "what was there `age` ago?" -> (length,)."""
    # BEGIN SOLUTION "your turn: sum over n of p_n(exp(-age)) times what lag l has left in state n"
    r = torch.exp(-dt * torch.arange(length, dtype=torch.float64))
    return dt * r * (legendre(N, r) @ legendre(N, math.exp(-age)))
    # END SOLUTION


# %%
check_recall_kernel(recall_kernel)

# %% [markdown]
# ### Exercise 4 · The generating function
#
# Difficulty: ●●● · Importance: ●●○ · 25 minutes
#
# Step 2 of full S4, with dense matrices, for one channel: `generating_function(Abar, Bbar, C, length)` with `Abar (N, N)`, `Bbar`
# and `C (N,)`, complex, gives the kernel's discrete Fourier transform as `torch.fft.rfft` would: `(length // 2 + 1,)`.
#
# <details><summary>Hint 1</summary>
#
# First $\tilde C = C - C\bar A^L$ with `torch.linalg.matrix_power`. `C @ matrix`: the row vector stands on the left.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A batch of matrices, one for each frequency: `torch.eye(N) - omega[:, None, None] * Abar`, then `torch.linalg.solve` with
# `Bbar[:, None]`.
#
# </details>


# %%
def generating_function(Abar, Bbar, C, length):
    """Abar (N, N), Bbar, C (N,), complex -> (length // 2 + 1,) complex."""
    # BEGIN SOLUTION "your turn: C_tilde, the nodes omega, one solve for each"
    C_tilde = C - C @ torch.linalg.matrix_power(Abar, length)
    omega = torch.exp(-2j * math.pi * torch.arange(length // 2 + 1, dtype=torch.float64) / length)
    matrices = torch.eye(len(C)) - omega[:, None, None] * Abar  # (F, N, N)
    return torch.linalg.solve(matrices, Bbar[:, None])[..., 0] @ C_tilde
    # END SOLUTION


# %%
check_generating_function(generating_function)

# %% [markdown] tags=["solution-only"]
# Why may the last axis be contracted with $\tilde C$ at the end? The solve gives $(1-\omega\bar A)^{-1}\bar B$, a vector for each
# frequency, and $\tilde C$ is the same for all of them.

# %% [markdown]
# ### Exercise 5 · Woodbury, with any rank
#
# Difficulty: ●●● · Importance: ●●● · 25 minutes
#
# HiPPO-LegS needs a correction of rank one, its relatives (a Fourier version, for one) of rank two. Write
# `woodbury(z, Lambda, P, B, C)` for `P (N, r)`: with `z (F,)` and `Lambda, B, C (N,)`, all complex, give
# $C\,(z - \Lambda + P P^*)^{-1} B$ for every $z$, `(F,)`, without any inverse of an $N \times N$ matrix. (Here $\Delta = 1$, and
# all $N$ states are given.) With $M = z - \Lambda$, the identity is now one of small matrices:
#
# $$(M + PP^*)^{-1} = M^{-1} - M^{-1}P\,\bigl(1 + P^* M^{-1} P\bigr)^{-1} P^* M^{-1} .$$
#
# <details><summary>Hint 1</summary>
#
# `inverse = 1 / (z[:, None] - Lambda)` is $M^{-1}$ for all $z$ at once, `(F, N)`. Then come four products: $C M^{-1} B$ is `(F,)`,
# $C M^{-1} P$ and $P^* M^{-1} B$ are `(F, r)`, $P^* M^{-1} P$ is `(F, r, r)`.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.einsum("nr,fn,ns->frs", P.conj(), inverse, P)` is the last of them. Add `torch.eye(r)` and use `torch.linalg.solve`.
#
# </details>


# %%
def woodbury(z, Lambda, P, B, C):
    """z (F,), P (N, r), Lambda, B, C (N,), complex -> C (z - Lambda + P P*)^-1 B, (F,)."""
    # BEGIN SOLUTION "your turn: four products with the diagonal inverse, and one small solve"
    inverse = 1 / (z[:, None] - Lambda)  # (F, N)
    CP = torch.einsum("n,fn,nr->fr", C, inverse, P)
    PB = torch.einsum("nr,fn,n->fr", P.conj(), inverse, B)
    PP = torch.einsum("nr,fn,ns->frs", P.conj(), inverse, P)
    small = torch.linalg.solve(torch.eye(P.shape[1]) + PP, PB[..., None])[..., 0]  # (F, r)
    return inverse @ (C * B) - (CP * small).sum(-1)
    # END SOLUTION


# %%
check_woodbury(woodbury)

# %% [markdown]
# ## Check against the package, and against the authors' numbers
#
# What this chapter built by hand, against what the package ships:

# %%
A, B, C, dt = random_system(dim=3, half=4)
u = torch.randn(2, 77, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
print(
    "our loop = package's loop:",
    below((s4d_slow(u, A, B, C, dt) - s4d_recurrent(u, A, B, C, dt)[0]).abs().max(), 1e-12),
)
C_tilde = tilde_from_c(
    A, P3 := torch.randn(3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(7)), C, dt, 77
)
by_hand = torch.stack([s4_by_hand(*(both_halves(v[d]) for v in (A, P3, B, C_tilde)), dt[d], 77) for d in range(3)])
print("our four steps = package's kernel:", below((by_hand - s4_kernel(A, P3, B, C_tilde, dt, 77)).abs().max(), 1e-10))
with torch.no_grad():
    module = S4D(3, 8).double()
    by_hand = s4d_slow(u, *module.system()) + module.skip * u
    print("the module, by hand:", below((by_hand - module(u)).abs().max(), 1e-12))

# %% [markdown]
# The repository also holds numbers that *the authors' own published code* computed in double precision: kernels, outputs and
# last states of S4D for two initialisations and both discretisations; DPLR kernels of even and odd length with their
# $\tilde C$ and dense matrices; the HiPPO matrices and their eigenvalues; and their small stand-alone layer, which puts a
# GELU, a linear layer and a gate behind the convolution.

# %%
golden = Path(longseq_tutorial.__file__).parents[1] / "tests" / "golden"


def numbers(name):
    with np.load(golden / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(np.asarray(arrays[key])) for key in arrays}


def off(ours, theirs):
    return (ours.detach() - theirs).abs().max().item()


theirs = numbers("s4_hippo_legs_nplr")
errors = [off(hippo_legs_nplr(n)[0], theirs[f"Lambda_half_{n}"]) for n in (4, 8, 16, 64)]
errors += [off(hippo_legs(n)[0], theirs[f"A_{n}"]) for n in (4, 8, 16, 64)]
print(f"{'HiPPO: matrices and eigenvalues, N = 4, 8, 16, 64':52} {below(max(errors), 1e-9)}")

theirs = numbers("s4_s4d_kernels")
for case in ("lin_zoh", "lin_bilinear", "inv_zoh", "inv_bilinear"):
    method = case.split("_")[1]
    A, B, C, dt, u = (theirs[f"{case}_{key}"] for key in ("A", "B", "C", "dt", "u"))
    y, last = s4d_recurrent(u.mT, A, B, C, dt, discretization=method)  # they keep channels before time
    k = s4d_kernel(A, B, C, dt, 40, method)
    errors = [off(k, theirs[f"{case}_K"]), off(y.mT, theirs[f"{case}_y"]), off(last, theirs[f"{case}_final_state"])]
    errors.append(off(long_convolution(u.mT, k).mT, theirs[f"{case}_y"]))
    print(f"{f'S4D, {case}: kernel, loop, convolution, state':52} {below(max(errors), 1e-9)}")

for case in ("a", "b"):
    theirs = numbers(f"s4_dplr_kernel_{case}")
    Lambda, P, B, C, tilde, dt, K = (theirs[key] for key in ("Lambda", "P", "B", "C", "C_tilde", "dt", "K"))
    n = int(theirs["L"])
    knocks = torch.zeros(1, n, len(dt), dtype=torch.float64)
    knocks[:, 0] = 1
    errors = [
        off(s4_kernel(Lambda, P, B, tilde, dt, n), K),
        off(s4_recurrent(knocks, Lambda, P, B, C, dt)[0][0].T, K),
        off(tilde_from_c(Lambda, P, C, dt, n), tilde),
        off(dplr_dense(Lambda, P, B, dt)[0], theirs["dA"]),
    ]
    print(f"{f'S4, length {n}: kernel, steps, C_tilde, matrix':52} {below(max(errors), 1e-9)}")

theirs = numbers("s4_s4d_minimal_layer")
layer = S4D(4, 8).double()
with torch.no_grad():
    for ours, name in {"log_real": "log_A_real", "imag": "A_imag", "log_dt": "log_dt", "skip": "D"}.items():
        getattr(layer, ours).copy_(theirs[name])
    layer.B.copy_(torch.tensor([1.0, 0.0]).expand_as(layer.B))  # their B is 1
    layer.C.copy_(torch.view_as_real(theirs["C"]))
y = F.glu(F.linear(F.gelu(layer(theirs["x"].mT)), theirs["W_out"], theirs["b_out"]))
print(f"{'their layer: S4D, GELU, linear, gate':52} {below(off(y.mT, theirs['y']), 1e-9)}")

# %% [markdown]
# ## What to remember
#
# - HiPPO: the first $N$ Legendre coefficients of the past obey a linear differential equation (S4 paper, equation 2). Without its
#   $1/t$ the memory is elastic, sharp for the new and blurred for the old, and `dt` sets how far it looks, about $1/$`dt` steps.
# - ZOH ($e^{\Delta A}$) and bilinear ($\frac{1+\Delta A/2}{1-\Delta A/2}$) both keep what decays inside the unit circle.
# - S4D: complex diagonal $A$, recurrence = convolution with $k_s = 2\,\mathrm{Re}\sum C\bar B\bar A^s$; two tables of $\sqrt L$ powers, one
#   real matrix product, an FFT (S4D paper, sections 3 and 4). Turning eigenvalues can wait and strike; real ones cannot.
# - S4: HiPPO's eigenvectors are useless, but $A$ is normal plus rank one. Generating function, circle to axis, Woodbury: four Cauchy
#   sums a frequency, with the Nyquist node in closed form (S4 paper, section 3).
# - $\tilde C = C(1-\bar A^L)$ belongs to one length. Keep $C$.
# - In blocks any $\bar A$ will do: six squarings give all its powers up to 64, at a price that does not depend on the length.
# - One system, many uses: convolution or blocks for training, steps for streaming, another `dt` for another sampling rate.
#
# Next, chapter 03: a memory like this decides by age alone what it keeps; gated attention looks at contents.
