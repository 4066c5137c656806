# %% [markdown]
# # 11 · Speech, from the waveform
#
# ## The question
#
# Sound reaches a computer as numbers, thousands a second. For decades one turned them into spectrograms first, because
# no model could read that many. Can the models of this course read the numbers themselves, and learn what to listen for?
#
# Here they do: each of them hears which digit somebody says. You watch one learn within seconds; then you take all
# seven, trained on one core of an ordinary processor on recorded voices, listen to what they hear, ask what they have
# learned, and spoil their input until they fail. Afterwards you will be able to
#
# * say what a waveform is, and count why attention over its samples is hopeless;
# * read it in two other ways: in patches, and with kernels as long as the clip;
# * train a classifier on raw sound, and read the records of such trainings honestly;
# * hold learned filters against a mel filter bank, and say how far back a model listens, in milliseconds;
# * measure what a model needs of a clip, and what it stands: noise, shifts, half the samples missing.

# %%
import copy
import math
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Audio
from torch import nn

import longseq_tutorial
from longseq_tutorial import models, published, results, tasks, training
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, show, use_style
from longseq_tutorial.classroom.filters import centre_and_width, half_rate, kernels, mel_bank, memory
from longseq_tutorial.classroom.panels_speech import Listening
from longseq_tutorial.classroom.sound import (
    SOURCE,
    answers,
    contributions,
    delayed,
    mix,
    occlusion,
    real_clips,
)
from longseq_tutorial.mechanisms.ema import ema_kernel
from longseq_tutorial.mechanisms.s4 import s4d_init, s4d_kernel
from longseq_tutorial.models.parts import PatchEmbedding
from longseq_tutorial.models.transformer import SinusoidalPositions
from longseq_tutorial.training import recipes

use_style()
torch.set_flush_denormal(True)
torch.set_num_threads(1)  # the models here are so small that a second thread would mostly wait for the first
RESULTS = Path(longseq_tutorial.__file__).parents[1] / "results"
RATE = 8000  # samples a second
GREY = "#8A8A86"

# %% [markdown]
# ## A clip
#
# A microphone measures air pressure; a sound card writes it down at even intervals. Each number is a **sample**. At
# 8,000 samples a second everything up to 4,000 Hz is caught, which is what a telephone gives: enough to understand
# speech. Twenty recordings by real people lie in this repository. Listen to one of them.

# %%
clips, names = real_clips()
print(f"{len(clips)} clips: {SOURCE}")
x, label = clips[10]
print(names[10], "·", f"{len(x):,} samples, {len(x) / RATE:.2f} s")
Audio(x.numpy(), rate=RATE)

# %% [markdown]
# In the figure the same clip stands twice: all of it, and forty milliseconds out of the vowel. Look at the second
# picture for something that repeats.

# %%
start = int(x.square().unfold(0, 320, 40).mean(1).argmax()) * 40
voiced = x[start : start + 320]
correlation = np.correlate(voiced.numpy(), voiced.numpy(), mode="full")[len(voiced) - 1 :]
period = 25 + int(correlation[25:160].argmax())  # between 50 and 320 Hz

fig, (whole, close) = plt.subplots(1, 2, figsize=(8.4, 2.6), width_ratios=(1.5, 1))
whole.plot(np.arange(len(x)) / RATE, x, marker="", linewidth=0.6)
whole.axvspan(start / RATE, (start + 320) / RATE, color=OKABE_ITO["orange"], alpha=0.4)
whole.set(xlabel="time (s)", ylabel="sample", title=f"{names[10]}, all of it")
close.plot(np.arange(320) / RATE * 1000, voiced, markersize=2.5, linewidth=1)
close.set(xlabel="time (ms)", ylabel="sample", title="the orange part: 320 samples")
show(
    fig,
    f"A spoken digit as a waveform, {len(x):,} samples in {len(x) / RATE:.2f} s: loud and quiet stretches. Close up, the "
    f"loudest 40 ms are a pattern that repeats about every {1000 * period / RATE:.0f} ms: the vocal folds open and close "
    f"{RATE / period:.0f} times a second.",
)

# %% [markdown]
# Two time scales are in it, far apart. The pitch and the colour of a vowel live within **milliseconds**, tens of
# samples. The word lives in the order of its sounds, over **half a second**, thousands of samples. That is what makes
# raw sound a task for long sequences.
#
# ## Sixteen thousand steps a second
#
# How long is long? Our digits have 8,000 samples a second; Speech Commands, the set on which such models are compared,
# has 16,000, and its clips last up to a second. Let us count what one layer of the width used below has to do for one
# second, in four ways: full attention on samples; attention in chunks of 1,000 samples, as in notebook 04; a
# convolution with a kernel as long as the clip, by FFT, as in notebooks 01 and 02; and attention between patches of
# 10 ms, of which more in a moment. (Counted as multiplications; a real FFT of $N$ numbers as $1.25\,N\log_2 N$ of them.)

# %%
D, Z, V = 64, 32, 128  # width, queries and keys, values: those of the trained models below


def attention_cost(length, seen):
    """Weights, and products, of one head in which each of `length` tokens sees `seen` of them."""
    return length * seen, length * seen * (Z + V)


def convolution_cost(length):
    """No weights; a kernel, a signal and a product of 2 L numbers, there and back, in each of D channels."""
    n = 2 * length
    return 0, round(D * (3 * 1.25 * n * math.log2(n) + 2 * n))


print(f"{'one second, one layer':34}{'weights':>13}{'in float32':>12}{'products':>17}")
for rate in (8_000, 16_000):
    for how, (weights, products) in {
        f"attention, {rate:,} samples": attention_cost(rate, rate),
        "  the same in chunks of 1,000": attention_cost(rate, 1_000),
        f"a convolution, {rate:,} samples": convolution_cost(rate),
        "attention, 100 patches of 10 ms": attention_cost(100, 100),
    }.items():
        print(f"{how:34}{weights:13,}{4 * weights / 2**20:8,.1f} MiB{products:17,}")
full, chunked, by_kernel = (
    attention_cost(16_000, 16_000)[1],
    attention_cost(16_000, 1_000)[1],
    convolution_cost(16_000)[1],
)
print(f"at 16,000 steps full attention does {full / chunked:.0f} times the work of chunks, ", end="")
print(f"and {fmt(full / by_kernel)} times that of the convolution")
batch, layers = recipes.get("speech", "mega", "paper").batch, models.configs.published("mega", "speech").layers
print(f"weights of a batch of {batch} in {layers} layers: {batch * layers * 4 * 16_000**2 / 2**30:.0f} GiB")

# %% [markdown]
# Nearly a gigabyte of weights for each clip, head and layer; and for a batch, all layers together, more than most GPUs
# hold (the last line takes batch and layers of the Mega paper's model). A fused kernel that never keeps the weights
# (notebook 03) saves the memory, but not one of the products. And doubling the rate, which one hardly hears in speech,
# makes full attention four times as dear; chunks and the convolution about twice, and patches of 10 ms not at all. That
# is what "hopeless" means here: not that it cannot be computed, but that one pays for comparing each sample with each,
# where neighbours say nearly the same.
#
# What has been published on ten words of Speech Commands, sample by sample:

# %%
for row in published.ROWS:
    if row.task == "speech-sc10":
        said = "failed" if row.accuracy is None else f"{row.accuracy:.2f} %"
        print(f"{row.model:18}{said:>9}   {row.note}")
print("Source:", published.lookup("speech-sc10", "mega-chunk").source)

# %% [markdown]
# Two of these ideas, then: patches, and long kernels.
#
# ## From samples to tokens
#
# A **patch embedding** is the idea that fits a CPU: cut the signal into patches of $P$ samples, and map each patch to
# one vector, with a linear map that is learned like everything else,
#
# $$
# h_t = W\,(x_{tP},\, x_{tP+1},\, \dots,\, x_{tP+P-1})^\top + b, \qquad W \in \mathbb{R}^{D \times P}.
# $$
#
# In words: each of the $D$ rows of $W$ is a short waveform, a *filter*; the token says how much of each filter is in
# the patch. The sequence becomes $P$ times shorter, attention $P^2$ times cheaper. It is no spectrogram: nobody tells
# the filters to be sines.
#
# This is also exactly what a strided convolution computes when its stride equals its kernel. Values and gradients, in
# view:

# %%
torch.manual_seed(0)
P, D = 16, 5
convolution = nn.Conv1d(1, D, kernel_size=P, stride=P).double()
signal = torch.randn(2, 7 * P, dtype=torch.float64)

as_convolution = convolution(signal.unsqueeze(1)).transpose(1, 2)  # (2, 7, D)
W = convolution.weight.squeeze(1).detach().clone().requires_grad_()  # (D, P)
as_linear_map = signal.unflatten(1, (-1, P)) @ W.T + convolution.bias  # (2, 7, P) @ (P, D)
weights = torch.randn(2, 7, D, dtype=torch.float64)
(conv_grad,) = torch.autograd.grad((as_convolution * weights).sum(), convolution.weight)
(map_grad,) = torch.autograd.grad((as_linear_map * weights).sum(), W)
print("difference of the values:   ", below((as_convolution - as_linear_map).abs().max().detach(), 1e-12))
print("difference of the gradients:", below((conv_grad.squeeze(1) - map_grad).abs().max(), 1e-12))

# %% [markdown]
# Two things go wrong with one linear map of neat patches. A sound that straddles a border is cut in two; so kernels
# may be **wider than the stride** and overlap. And a linear map cannot say "there is a tone of 500 Hz, in whatever
# phase", since the phase changes the sign of its answer; so a **nonlinearity** follows, and a second, coarser stage
# that sums up. That is `models.parts.PatchEmbedding`: a chain of `(kernel, stride)` stages, GELU between them, a
# layer norm at the end. Each stage is padded on the left by `kernel - stride`, so no token hears what comes after its
# own patch; and at the end a signal is filled up on the right to a whole number of patches.
#
# Which samples does a token hear? Ask the gradient.

# %%
stages = recipes.get("speech", "mega", "laptop").overrides["patch"]  # what all seven models below read with
torch.manual_seed(0)
embedding = PatchEmbedding(8, stages).double()
print("patch length:", embedding.patch, "samples,", f"{1000 * embedding.patch / RATE:.0f} ms")
noise = torch.randn(1, 810, dtype=torch.float64, requires_grad=True)
tokens, _ = embedding(noise)
print(f"{noise.shape[1]} samples become {tokens.shape[1]} tokens")
(heard,) = torch.autograd.grad((tokens[0, 6] * torch.randn(8, dtype=torch.float64)).sum(), noise)
places = heard[0].nonzero().squeeze(1)
own = f"{6 * embedding.patch} to {7 * embedding.patch - 1}"
print(f"token 6 stands for samples {own} and hears {int(places[0])} to {int(places[-1])}")

# %% [markdown]
# Everything it hears lies in its own patch or before it.
#
# One token for every 10 ms: a second becomes a hundred of them, and the attention over it ten thousand weights. The
# price is a decision, taken before anything is learned: what is shorter than a patch must be caught by its filters,
# and *where* in the patch it was is lost unless the second stage keeps it. A patch of 100 ms would be cheaper
# still, and could swallow a whole consonant.
#
# ## Or a kernel as long as the clip
#
# The other way leaves the samples alone. S4 and its relatives read them one by one; a layer's kernel is as long as
# the clip, and the FFT makes that affordable (the count above). What can such a kernel hear? Take one mode of S4D
# (notebook 02), $k_t \propto e^{A\,\Delta t}$ with a complex $A$: it rings at the frequency
# $\operatorname{Im}(A)\,\Delta / 2\pi$ times the sample rate, and dies away at a pace set by $\operatorname{Re}(A)$. That
# is a tuning fork: a **filter of a filter bank**, which costs two numbers however long it rings. The decays of an EMA
# are real, so it does not ring. In the figure look at the left for the two shapes, at the right for which
# frequencies get through.

# %%
A, B = s4d_init("lin", 64)  # 32 modes, each of a conjugate pair, A_n = -1/2 ± i pi n
modes = torch.tensor([5, 10, 20, 31])
dt = torch.full((len(modes),), 0.0125)
forks = s4d_kernel(A[modes, None], B[modes, None], torch.ones(len(modes), 1, dtype=A.dtype), dt, RATE // 2)  # (4, L)
tau = RATE * torch.tensor([0.001, 0.005, 0.02])  # EMAs that forget in 1, 5 and 20 ms
decay = -torch.expm1(-1 / tau)[:, None]  # alpha * delta = 1 - q
means = ema_kernel(decay / 0.9, torch.full_like(decay, 0.9), torch.ones_like(decay), torch.ones_like(decay), RATE // 2)

ring, (fork_peak, fork_width) = A.imag[modes].abs() * dt * RATE / (2 * math.pi), centre_and_width(forks, RATE, n=2**15)
mean_peak, _ = centre_and_width(means, RATE, n=2**15)
print("S4D's modes answer most at", ", ".join(f"{f:.0f}" for f in fork_peak), "Hz")
print("as Im(A) dt says, to 2 Hz:", bool((ring - fork_peak).abs().max() < 2))
print("EMAs answer most at 0 Hz: ", bool((mean_peak == 0).all()))

fig, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.2))
time = np.arange(480) / RATE * 1000
left.plot(time, forks[0, :480] / forks[0].abs().max(), marker="", label="a mode of S4D")
left.plot(time, means[2, :480] / means[2].max(), marker="", label="an EMA")
left.set(xlabel="lag (ms)", ylabel="weight, largest 1")
left.legend()
frequency = np.fft.rfftfreq(2**13, 1 / RATE)
for bank, colour, name in ((forks, OKABE_ITO["blue"], "modes of S4D"), (means, OKABE_ITO["orange"], "EMAs")):
    size = torch.fft.rfft(bank, n=2**13).abs()
    size = 20 * torch.log10(size / size.amax(1, keepdim=True))
    for i, row in enumerate(size):
        style = "-" if name == "EMAs" else "--"
        right.plot(frequency / 1000, row, color=colour, linestyle=style, marker="", label=None if i else name)
right.set(xlabel="frequency (kHz)", ylabel="answer (dB)", xlim=(0, 2.5), ylim=(-40, 2))
right.legend(bbox_to_anchor=(1, 0.5), loc="center left")
show(
    fig,
    f"Left, over 60 ms: a mode of S4D is a wave of {float(ring[0]):.0f} Hz that dies away, an EMA only falls. Right, answer against "
    f"frequency in decibels: the four modes of S4D peak at {', '.join(f'{f:.0f}' for f in fork_peak)} Hz, each about "
    f"{float(fork_width[0]):.0f} Hz wide; the three EMAs, of 1, 5 and 20 ms, answer most at 0 Hz and less the higher the tone.",
)

# %% [markdown]
# So a stack of S4 layers can make itself a spectrogram and go on from there, as finely in time as the samples are. An
# EMA, run over samples, smooths them; on its own it could hardly tell a whistle from a hum but by how loud it comes
# through. Mega's answer is to put attention behind it, in chunks; ours is to put filters before it.
#
# ## The task
#
# The **Free Spoken Digit Dataset** (Jackson and contributors, CC BY-SA 4.0) has 3,000 recordings, six people who say
# each digit fifty times. Takes 0 to 4 are the official test. `tasks.load("speech")` downloads it, or finds your copy
# through `LONGSEQ_DATA`. A notebook that must run without a network cannot rely on that, so the miniature below takes
# the sample that this repository brings along, and says so: digits spoken by the program espeak-ng in 96 synthetic
# voices. The voices of the test are not among those of the training.

# %%
task = tasks.load("speech", source="sample")
print(task.config.source)
for part in ("train", "valid", "test"):
    split = getattr(task, part)
    print(f"{part:>5}: {len(split)} clips, {split.lengths.min() / RATE:.2f} to {split.lengths.max() / RATE:.2f} s")
speak = {int(label): i for i, label in enumerate(task.test.labels)}
Audio(task.test[speak[7]][0].numpy(), rate=RATE)

# %% [markdown]
# Clean and a little mechanical: this was a "seven". A model that learns these voices has learned these voices; we come
# back to that.
#
# ## A classifier within a minute
#
# The model is the Mega of this course, unchanged, with the patch embedding in front: `models.build("mega", task.config,
# patch=...)`. Mega's EMA runs over all tokens in both directions, its attention sees the whole clip, and the class is
# read from the mean over all real tokens. The recipe holds everything; `training.fit` does the rest.

# %%
recipe = training.Recipe(
    task="speech", model="mega", name="miniature",
    overrides=dict(dim=48, layers=2, z_dim=24, v_dim=96, ffn_dim=96, head_dim=96, n=8, max_positions=256,
                   truncation=None, norm="layernorm", patch=((40, 20), (8, 4))),
    epochs=3, batch=16, lr=0.006, warmup=40, source="chosen for this notebook",
)  # fmt: skip
scratch = tempfile.TemporaryDirectory()
out = Path(os.environ.get("LONGSEQ_OUT") or scratch.name)
mini = training.fit(recipe, seed=0, out=out, overwrite=True, task=task, cpu=True, progress=False)
print(f"{mini.parameters:,} parameters, {mini.updates} updates of {recipe.batch} clips")
print("left behind:", ", ".join(sorted(path.name for path in out.glob(f"{mini.name}.*"))))

# %%
rows = [row for row in mini.history if row["valid"]]
fig, ax = plt.subplots()
epochs = [row["epoch"] for row in rows]
ax.plot(epochs, [100 * row["valid"]["accuracy"] for row in rows], label="validation: voices never heard")
ax.plot(epochs[1:], [100 * row["train"]["accuracy"] for row in rows[1:]], label="training, during the epoch")
ax.axhline(10, color="#8A8A86", linestyle=":", label="chance")
ax.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(0, 100), xticks=epochs)
ax.legend(loc="lower right", bbox_to_anchor=(1, 0.12))
show(
    fig,
    f"Accuracy of the miniature on synthetic voices against epochs: it begins at chance, 10 %, and is above 50 % after "
    f"{recipe.epochs} epochs on voices it never heard: {rows[-1]['valid']['accuracy'] > 0.5}.",
)
print("test accuracy, voices never heard, above 50 % (chance: 10 %):", mini.test["accuracy"] > 0.5)

# %% [markdown]
# Within seconds, from raw samples, on a few hundred clips. Now for people.
#
# ## Seven models, recorded voices
#
# From a terminal, this trains the course's reference model (`make train` is the same); put any of the seven names in
# its place:
#
# ```
# python -m longseq_tutorial.train --task speech --model mega --recipe laptop
# ```
#
# All seven were run for the repository, and what they left lies in `results/`: **records**, and weights. A record is
# what makes a number checkable. Read one before you believe its accuracy.

# %%
NAMES = recipes.MODELS
heard_by, records = {}, {}
for name in NAMES:
    heard_by[name], records[name] = training.load_run(RESULTS / f"speech-{name}-laptop-seed0")
record = records["mega"]
counts = ", ".join(f"{count:,} {part}" for part, count in record.sequences.items())
print("data:      ", record.source)
print("clips:     ", counts)
print(
    "reads with:", f"patches {record.config['patch']}, width {record.config['dim']}, {record.config['layers']} layers"
)
print("training:  ", f"{record.updates:,} updates, {record.seconds / 60:.1f} minutes, all evaluations included")
print("machine:   ", f"{record.device_name}, {record.threads} thread(s), torch {record.versions['torch']}")
print("weights of:", f"update {record.weights_of['update']:,}, chosen by: {record.weights_of['rule']}")
same = {(r.source, r.recipe["epochs"], r.recipe["batch"], r.seed) for r in records.values()}
print("the same data, epochs, batch and seed for all seven:", len(same) == 1)

# %% [markdown]
# And the seven beside each other. Each hears the same clips in the same order, through the same kind of patch
# embedding and with the same kind of head; what differs is what stands between them. (`longvq` is our reconstruction;
# notebook 06 says from what. The minutes are the processor's, all of training and evaluation on one thread: they say that each
# fits an ordinary machine. What a step costs as sequences grow, notebook 09 measures.)

# %%
clips, names = real_clips(record.recipe["data"])  # prepared as in the trainings
waves, labels = [x for x, _ in clips], torch.tensor([label for _, label in clips])
words = record.task["class_names"]
config = tasks.TaskConfig(**{**record.task, "class_names": tuple(words)})
logits = {name: answers(model, waves) for name, model in heard_by.items()}
right = {name: int((each.argmax(1) == labels).sum()) for name, each in logits.items()}


def share_right(model, sounds):
    """Percent of the twenty clips that a model hears right, after something was done to them."""
    return 100 * float((answers(model, sounds, 20).argmax(1) == labels).float().mean())


def error_of(r):
    """Standard error of a record's test accuracy, in points."""
    return 100 * math.sqrt(r.test["accuracy"] * (1 - r.test["accuracy"]) / r.sequences["test"])


print(f"{'model':13}{'parameters':>11}{'minutes':>9}{'official test (%)':>19}{'clips below':>15}")
for name, r in records.items():
    test = f"{100 * r.test['accuracy']:.1f} ± {error_of(r):.1f}"
    print(f"{name:13}{r.parameters:11,}{r.cpu_seconds / 60:9.1f}{test:>19}{right[name]:>9} of {len(clips)}")
by_test = sorted(records, key=lambda name: -records[name].test["accuracy"])
first, second, last = (records[by_test[i]].test["accuracy"] for i in (0, 1, -1))
for said, gap, noise in (
    ("first and second", first - second, math.hypot(error_of(records[by_test[0]]), error_of(records[by_test[1]]))),
    ("first and last", first - last, math.hypot(error_of(records[by_test[0]]), error_of(records[by_test[-1]]))),
):
    print(
        f"{said} are {100 * gap:.1f} points apart, {'more' if 100 * gap > 2 * noise else 'not more'} than twice",
        end=" ",
    )
    print(f"the standard error of that difference ({noise:.1f})")

# %% [markdown]
# Read such a table slowly. A test of three hundred clips cannot separate models that differ by a clip or two; each
# row is one seed; and no model's rate or width was sought as carefully as its authors would have. It shows that each
# mechanism of this course, in a small model, learns to hear words from samples, and not which is "the best".
#
# What the accuracy is *not*, in any row: a measure of how well a model understands strangers. FSDD's official split
# divides **takes, not people**: the same six speakers are heard in training and in the test, saying the same words.
# The hard question, a new voice, is not asked. We ask it below.
#
# One more thing. The test of each of these runs was measured once, at the end. But while the recipe was being found,
# the test figures of a few earlier tries were seen too, and so the test is not quite as fresh as it sounds. A record
# cannot tell you that; its authors have to.
#
# In the next figure look at the left for how soon each model gets going, and at the right for the distance between
# training and validation: training clips are altered at random (faster, slower, shifted, louder, softer, in noise),
# validation clips are as they are.

# %%
fig, (left, close) = plt.subplots(1, 2, figsize=(9.4, 3.6))
half = {}
for name, r in records.items():
    rows, (colour, marker) = [row for row in r.history if row["valid"]], results.STYLE[name]
    left.plot(
        [row["epoch"] for row in rows],
        [100 * row["valid"]["accuracy"] for row in rows],
        color=colour,
        marker=marker,
        markersize=3.5,
        label=name,
    )
    half[name] = next(row["epoch"] for row in rows if row["valid"]["accuracy"] > 0.5)
    final = next(row for row in reversed(r.history) if row["train"] and row["valid"])
    close.plot(
        [100 * (1 - final["train"]["accuracy"])],
        [100 * (1 - final["valid"]["accuracy"])],
        color=colour,
        marker=marker,
        linestyle="none",
        markersize=8,
        label=name,
    )
limit = 1.1 * max(*close.get_xlim(), *close.get_ylim())
close.plot([0, limit], [0, limit], color=GREY, linestyle=":", marker="")
left.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(0, 101))
left.legend(loc="lower right", fontsize=8)
close.set(
    xlabel="errors on altered training clips (%)", ylabel="errors in validation (%)", xlim=(0, limit), ylim=(0, limit)
)
close.set_title("at the end")
soon, late = min(half, key=half.get), max(half, key=half.get)
show(
    fig,
    f"Left: validation accuracy against epochs for seven models. {soon} is the first to pass 50 %, by epoch {half[soon]:.0f}, "
    f"{late} the last, by epoch {half[late]:.0f}. Right: errors at the end, validation against training, with the "
    f"diagonal where both would be equal.",
)

# %% [markdown]
# ## What they make of real clips
#
# The twenty clips of this repository are take 0 of the official test: no model was trained on them. They were chosen by
# a rule that looks at no sound and no answer, two of each digit, the speakers taking turns. In the figure each row is a
# clip, each column a model, and the colour is the probability that it gives to what was really said. Dark spots are
# what to look for: do they stand in columns, a weak model, or in rows, a hard clip?

# %%
given = torch.stack([each.softmax(1)[torch.arange(len(labels)), labels] for each in logits.values()], dim=1)  # (20, 7)
fig, ax = plt.subplots(figsize=(5.6, 5.0))
picture = ax.imshow(given, aspect="auto", vmin=0, vmax=1)
fig.colorbar(picture, label="probability of the right word")
ax.set(xticks=range(len(NAMES)), yticks=range(len(names)))
ax.set_xticklabels(NAMES, rotation=35, ha="right")
ax.set_yticklabels(names, fontsize=8)
ax.grid(False)
show(
    fig,
    f"Probability of the right word, 20 clips by seven models. Of these {given.numel()}, {int((given > 0.9).sum())} are above "
    f"0.9 and {int((given < 0.5).sum())} below 0.5.",
)
for name, each in logits.items():
    for clip, said, word in zip(names, labels, each.argmax(1), strict=True):
        if said != word:
            print(f"{name} hears {words[word]!r} in {clip}")
print("wrong in all:", len(clips) * len(NAMES) - sum(right.values()), "of", len(clips) * len(NAMES))

# %% [markdown]
# Listen: first to the clip that the seven are least sure of together, then to two others.

# %%
hardest = int(given.mean(1).argmin())
print("least sure:", names[hardest])
Audio(waves[hardest].numpy(), rate=RATE)

# %%
print(names[6])
Audio(waves[6].numpy(), rate=RATE)

# %%
print(names[15])
Audio(waves[15].numpy(), rate=RATE)

# %% [markdown]
# ### Which digits are confused?
#
# A record keeps the loss and the accuracy of its test, not which clip went wrong, so a confusion matrix has to be made
# anew. On twenty clean clips there is little to confuse. We therefore make the task harder in two ways. At the left, the
# twenty clips in noise 10 dB below the speech, each twice. At the right, **strangers**: the 120 clips of
# the synthetic voices' test, which none of these models has ever met. Both are summed over the seven models. Look for
# bright spots off the diagonal, and for columns: a word that is heard whatever was said.


# %%
def in_noise(decibels, take=0):
    """The clips in white noise so far below each; the same noise for every model and level, another for every take."""
    hiss = [torch.randn(len(x), generator=torch.Generator().manual_seed(100 * take + i)) for i, x in enumerate(waves)]
    return [mix(x, noise, decibels) for x, noise in zip(waves, hiss, strict=True)]


prepared = {key: value for key, value in record.recipe["data"].items() if key in ("normalise", "length")}
strangers = tasks.load("speech", source="sample", **prepared).test
voices, spoken = [x for x, _ in strangers], torch.from_numpy(strangers.labels)


def confusion(clips, said):
    """Rows: what was said. Columns: what was heard. Summed over the models; and the share that each has right."""
    table, share = torch.zeros(10, 10), {}
    for name, model in heard_by.items():
        heard = answers(model, clips, batch=20).argmax(1)
        table.index_put_((said, heard), torch.ones(len(said)), accumulate=True)
        share[name] = float((heard == said).float().mean())
    return table, share


tables = {}
tables["in noise"], _ = confusion(in_noise(10.0) + in_noise(10.0, take=1), labels.repeat(2))
tables["strangers"], known_by = confusion(voices, spoken)
fig, axes = plt.subplots(1, 2, figsize=(9.4, 4.2))
for ax, (title, table) in zip(axes, tables.items(), strict=True):
    ax.imshow(table / table.sum(1, keepdim=True), vmin=0, vmax=1)
    ax.set(xticks=range(10), yticks=range(10), xlabel="heard", title=f"{title}, {int(table.sum())} answers")
    ax.set_xticklabels(words, rotation=45, ha="right")
    ax.set_yticklabels(words)
    ax.grid(False)
axes[0].set_ylabel("said")
fig.colorbar(axes[1].images[0], ax=axes, label="share of the row")
off = {title: 1 - float(table.diag().sum() / table.sum()) for title, table in tables.items()}


def five(share):
    """A share in percent, to the next five."""
    return 5 * round(20 * share)


show(
    fig,
    f"Two confusion matrices, what was said against what seven models heard. In noise 10 dB below the speech about "
    f"{five(off['in noise'])} % lie off the diagonal, among strangers about {five(off['strangers'])} %.",
)
for title, table in tables.items():
    wrong = table - torch.diag(table.diag())
    most = [divmod(int(i), 10) for i in wrong.flatten().topk(3).indices]
    print(f"{title}, most often:", ", ".join(f"{words[a]!r} heard as {words[b]!r}" for a, b in most))
    print(f"{title}, heard too often:", repr(words[int(wrong.sum(0).argmax())]))
worse = sum(1 - share > 2 * (1 - records[name].test["accuracy"]) for name, share in known_by.items())
print(
    f"models that err more than twice as often on strangers as on the test of the people they know: {worse} of {len(NAMES)}"
)
print("every model better than chance on strangers:", min(known_by.values()) > 0.1 + 2 * math.sqrt(0.09 / len(spoken)))

# %% [markdown]
# In noise the errors fall into a column: whatever was said, one word is heard too often. It is the one that begins and
# ends with a hiss, and white noise *is* a hiss. A pretty explanation; so let us try to break it. A hiss lies high. If
# that is all, noise below 2 kHz should not make the models hear that word.


# %%
def low_passed(x, limit=2_000):
    """Without what lies above `limit` hertz."""
    spectrum = torch.fft.rfft(x)
    return torch.fft.irfft(spectrum * (torch.fft.rfftfreq(len(x), 1 / RATE) < limit), n=len(x))


favourite, errors = int((tables["in noise"] - torch.diag(tables["in noise"].diag())).sum(0).argmax()), {}
for band, part in {"below 2 kHz": low_passed, "above 2 kHz": lambda hiss: hiss - low_passed(hiss)}.items():
    table, _ = confusion(
        [mix(x, part(noisy - x), 10.0) for x, noisy in zip(waves, in_noise(10.0), strict=True)], labels
    )
    wrong = table - torch.diag(table.diag())
    errors[band] = float(wrong[:, favourite].sum() / wrong.sum())
    print(f"noise {band}: more than a quarter of the errors are {words[favourite]!r}: {errors[band] > 0.25}")
print(f"its share of the errors is larger with noise above 2 kHz: {errors['above 2 kHz'] > errors['below 2 kHz']}")

# %% [markdown]
# Half broken. Noise without any hiss still makes them hear that word, if less; so hiss is part of the reason and not all
# of it. An explanation of a network is worth what is left of it after one has tried.
#
# The strangers are clean, without noise, and said by a program that never mumbles, and yet. What the models learned from
# six people carries over to voices that no human has, but far from fully. Nothing in their test accuracy said so, because
# nothing in the test asked. That is no fault of the records, which name their data and their split; it is a fault of
# whoever quotes a number without them.
#
# (With the dataset at hand, `task = tasks.load("speech")` and then `answers(model, [x for x, _ in task.test])` gives the
# matrix of all 300 clips of the official test.)
#
# ## What they have learned to listen for
#
# The first stage of each model holds 64 filters of 40 taps, 5 ms each. What does each answer to? Two numbers a filter:
# the frequency of its strongest answer, its **centre**, and the **width** of its band: that of a perfect rectangular
# band that lets as much of white noise through. Exercise 4 lets you measure both.
#
# We hold them against the bank that engineers would have put there: 64 triangles at even steps of **mel**, a scale of
# pitch as the ear has it, $m = 2595 \log_{10}(1 + f / 700)$: nearly even below 1 kHz, logarithmic above. In the figure,
# look at the left: does the line of sorted centres bend like the mel curve, or run straight like random filters? At the
# right: how wide are the bands?


# %%
def first_stage(m):
    """Its filters (D, K), without their mean: clips have none, so no answer depends on it."""
    taps = m.encoder.embedding.filters[0].weight[:, 0].detach()
    return taps - taps.mean(1, keepdim=True)


def untrained(name):
    """The model as its training began, from the record's seed."""
    torch.manual_seed(records[name].seed)
    return models.build(name, config, **records[name].config).eval()


banks = {name: centre_and_width(first_stage(m), RATE) for name, m in heard_by.items()}
fresh = centre_and_width(first_stage(untrained("mega")), RATE)
count = len(fresh[0])
mel_centres, mel_widths = mel_bank(count, RATE)

fig, (left, right_ax) = plt.subplots(1, 2, figsize=(9.4, 3.8))
for name, (centre, width) in banks.items():
    colour, marker = results.STYLE[name]
    left.plot(np.arange(count), np.sort(centre) / 1000, color=colour, marker="", linewidth=1.1, label=name)
    right_ax.plot(centre / 1000, width, color=colour, marker=marker, linestyle="none", markersize=2.5)
left.plot(
    np.arange(count), np.sort(fresh[0]) / 1000, color=GREY, linestyle=":", marker="", label="before training (mega)"
)
left.plot(np.arange(count), mel_centres / 1000, color=GREY, linestyle="--", marker="", linewidth=2.6, label="mel bank")
left.set(xlabel="filter, sorted", ylabel="centre (kHz)")
left.legend(fontsize=8)
right_ax.plot(mel_centres / 1000, mel_widths, color=GREY, linestyle="--", marker="", linewidth=2.6, label="mel bank")
finest = RATE / stages[0][0]
right_ax.axhline(finest, color=GREY, linestyle=":", label=f"1 / 5 ms = {finest:.0f} Hz")
right_ax.set(xlabel="centre (kHz)", ylabel="width (Hz)", yscale="log")
right_ax.legend(fontsize=8)

even = np.linspace(0, RATE / 2, count + 2)[1:-1]
to_mel = {name: np.abs(np.sort(c) - mel_centres).mean() for name, (c, _) in banks.items()}
to_even = {name: np.abs(np.sort(c) - even).mean() for name, (c, _) in banks.items()}
low = {name: float((c < 1000).float().mean()) for name, (c, _) in banks.items()}
nearer = sum(to_mel[name] < to_even[name] for name in NAMES)
narrower = sum(float(w.median()) < float(fresh[1].median()) for _, w in banks.values())
show(
    fig,
    f"Left: centres of the {count} filters of seven models, sorted, with the curve of a mel bank and the random filters of the "
    f"start. {nearer} of {len(NAMES)} models lie nearer to the mel curve than to a straight line. Below 1 kHz lie "
    f"{100 * (mel_centres < 1000).mean():.0f} % of a mel bank, {100 * float((fresh[0] < 1000).float().mean()):.0f} % of the random filters, "
    f"and of the learned ones {100 * min(low.values()):.0f} to {100 * max(low.values()):.0f} %. Right: width against centre; the mel bank "
    f"falls to {mel_widths[0]:.0f} Hz, filters of 5 ms cannot follow it below about {finest:.0f} Hz.",
)
band = np.arange(0, RATE // 2 + 1, 500)  # edges; a centre at 4 kHz falls into the last one
every, bank = (
    np.histogram(np.clip(c, 0, RATE / 2 - 1), band)[0]
    for c in (np.concatenate([c for c, _ in banks.values()]), mel_centres)
)
print("filters from 0 to 4 kHz, for each 500 Hz: mel bank", *bank, "  learned, all seven together", *every)
lowest = [int((c < 500).sum()) for c, _ in banks.values()]
print(f"below 500 Hz: mel bank {bank[0]}, spread evenly {count // 8}, learned {min(lowest)} to {max(lowest)}")
assert set(every.argsort()[-2:]) == {1, 2} and every[6:].sum() < every[0], (
    "the text says: from 0.5 to 1.5 kHz, thin above 3"
)
assert bank.argmax() == 0 and max(lowest) < 0.7 * bank[0], "the text says: few, where a mel bank is densest"
print(f"models whose sorted centres lie nearer to the mel curve than to a straight line: {nearer} of {len(NAMES)}")
print(f"models whose median filter is narrower than before training: {narrower} of {len(NAMES)}")
print(
    f"median centre: mel bank {np.median(mel_centres):.0f} Hz, before training {float(fresh[0].median()):.0f} Hz, learned "
    f"{min(float(c.median()) for c, _ in banks.values()):.0f} to {max(float(c.median()) for c, _ in banks.values()):.0f} Hz"
)
narrowest = min(float(w.min()) for _, w in banks.values())
print(f"the narrowest of all learned filters: {narrowest:.0f} Hz")
narrow_mel = float((torch.as_tensor(mel_widths) < finest).float().mean())
print(f"share of the mel bank that is narrower than {finest:.0f} Hz: {100 * narrow_mel:.0f} %")

# %% [markdown]
# Nobody asked for it, but random filters have become band filters, packed most densely between 0.5 and 1.5 kHz, where
# the lower resonances of the mouth lie, and thin above 3 kHz. Below 0.5 kHz, where a mel bank is densest, they are few.
# A bank made for speech thins out upwards because the ear does; here ten digits and the error of a guess drew it.
#
# They are not a mel bank, though, and cannot be one. Whoever looks at a signal for $T$ seconds cannot tell frequencies
# nearer than about $1/T$: that is the dotted line. The learned filters come down to it and stop there, while the mel
# bank, made with windows of 25 ms or so, lies under it (the last line says how much of it). What a finer ear would do
# in the filters, these models must do in the layers above: the second stage looks at eight such answers in a row,
# 10 ms, and after it come the long kernels.
#
# ### How far back they listen
#
# Four of the seven models carry an EMA in each layer, and SPADE an S4 in its lowest. How long are their kernels in
# milliseconds? For each channel, take the lag within which nine tenths of its weight lie (in absolute value, within a
# second). In the figure look at how far training has moved them, and compare with the durations that matter: a token,
# a sound of speech, a word.

# %%
patch_ms = 1000 * embedding.patch / RATE
within = RATE // embedding.patch  # tokens in a second
reach = {}
for name in NAMES:
    found = kernels(heard_by[name], within), kernels(untrained(name), within)
    if found[0]:
        reach[name] = [patch_ms * torch.cat([memory(k) for k in each.values()]).double().numpy() for each in found]
word = 1000 * float(np.median([len(x) for x in waves])) / RATE

fig, ax = plt.subplots(figsize=(8.4, 3.6))
for place, (after, before) in enumerate(reach.values()):
    for values, y, colour in ((before, place + 0.17, GREY), (after, place - 0.17, OKABE_ITO["blue"])):
        low_end, middle, high_end = np.quantile(values, (0.05, 0.5, 0.95))
        ax.plot([low_end, high_end], [y, y], color=colour, marker="", linewidth=4, solid_capstyle="butt", alpha=0.55)
        ax.plot([middle], [y], color=colour, marker="o", markersize=7)
ax.axvline(word, color=OKABE_ITO["vermilion"], linestyle="--", label="a word here, median")
ax.plot([], [], color=GREY, marker="o", label="before training")
ax.plot([], [], color=OKABE_ITO["blue"], marker="o", label="after training")
ax.set(
    xscale="log", xlabel="lag that holds 90 % of a kernel (ms)", yticks=range(len(reach)), ylim=(-0.6, len(reach) - 0.4)
)
ax.set_yticklabels(reach)
ax.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
ax.set_xticks([], minor=True)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
said = "; ".join(f"{name} {np.median(a):.0f} ms (before {np.median(b):.0f})" for name, (a, b) in reach.items())
show(
    fig,
    f"How far back kernels reach, on a logarithmic axis in milliseconds: median and the middle 90 % of channels. Medians: {said}. "
    f"The median word lasts {word:.0f} ms.",
)
emas = [name for name in reach if name != "spade"]
print("EMAs: in every model the median stays shorter than a word:", all(np.median(reach[n][0]) < word for n in emas))
moved = [np.median(after) / np.median(before) for after, before in (reach[n] for n in emas)]
print(
    f"training made it longer in {sum(m > 1 for m in moved)} of {len(emas)}, nowhere by more than half:",
    max(moved) < 1.5,
)
print("SPADE's S4: its longest kernels reach farther than those of any EMA:", end=" ")
print(bool(np.quantile(reach["spade"][0], 0.9) > max(np.quantile(reach[n][0], 0.9) for n in emas)))
dt_of_spade = torch.exp(next(m.log_dt for m in heard_by["spade"].modules() if hasattr(m, "log_dt")).detach())
scale = patch_ms / dt_of_spade
print(f"SPADE's time constants 1/dt: {fmt(float(scale.min()))} to {fmt(float(scale.max()))} ms")

# %% [markdown]
# An EMA begins with decays that forget within a few tokens, and training, though it lengthens them where it can,
# leaves it at that scale: it gathers a stretch of a syllable, and leaves what spans the word to the attention and to the
# mean at the end. S4 is built the other way: its time constants are spread on purpose, from a few tokens to more than any
# clip lasts, so that some channel has the right one before anything is learned. Notebook 12 looks at more kernels.
#
# ### Where they listen
#
# What does a model *need* of a clip? Two ways to ask. **Silence** 50 ms of it, and see how far the score of its answer
# falls; then the next 50 ms, and so on. That needs no gradient and asks any model, but each stretch costs a pass.
# Or take the **gradient** once: to first order, the score $s$ of a clip $x$ loses
#
# $$
# s(x) - s(x \text{ silenced in } T) \;\approx\; \sum_{t \in T} x_t\, \frac{\partial s}{\partial x_t},
# $$
#
# sample times gradient, summed over the stretch. (The score is the answer's logit less the mean of all ten.) One
# backward pass answers for all stretches at once; that is **gradient saliency**. It is exact where the model is linear.
# Where it is not, one may take the mean of the gradients at several points on the straight way from silence to the
# clip, $x/16$, $3x/16$ and so on: *integrated gradients*. Which of the two tells what silencing would? In the figure,
# each row is a model. Compare the three pictures, and look where on the waveform the bright stretches lie.

# %%
shown = 14
x = waves[shown]
window, hop = int(0.05 * RATE), int(0.02 * RATE)
pictures = {"one gradient": [], "eight gradients on the way": [], "silenced": []}
for model in heard_by.values():
    middles, falls = occlusion(model, x, window, hop)
    stretches = [slice(max(0, m - window // 2), m + window // 2) for m in middles.tolist()]
    for title, steps in (("one gradient", 1), ("eight gradients on the way", 8)):
        each = contributions(model, x, steps)
        pictures[title].append(torch.stack([each[stretch].sum() for stretch in stretches]))
    pictures["silenced"].append(falls)
agree = {
    title: np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(rows, pictures["silenced"], strict=True)])
    for title, rows in pictures.items()
}

fig, axes = plt.subplots(2, 3, figsize=(10.0, 4.0), height_ratios=(1, 2.4), sharex=True)
for column, (title, rows) in enumerate(pictures.items()):
    axes[0, column].plot(np.arange(len(x)) / RATE, x, marker="", linewidth=0.5)
    axes[0, column].set(title=title, yticks=[])
    rows = torch.stack([row / row.abs().max() for row in rows])
    axes[1, column].imshow(rows, aspect="auto", extent=(0, len(x) / RATE, len(rows) - 0.5, -0.5), vmin=-1, vmax=1)
    axes[1, column].grid(False)
    axes[1, column].set(xlabel="time (s)", yticks=range(len(NAMES)))
    axes[1, column].set_yticklabels(NAMES if column == 0 else [""] * len(NAMES))
fig.colorbar(axes[1, 2].images[0], ax=axes[1], label="largest 1")
one, way, _ = agree.values()
show(
    fig,
    f"The clip {names[shown]} three times, and below it, one row a model, how much each stretch of 50 ms matters for the answer: by one "
    f"gradient, by eight on the way from silence, and by silencing it. One gradient correlates with silencing above one half in "
    f"{(one > 0.5).sum()} of {len(one)} models, eight in {(way > 0.5).sum()}.",
)
loud = torch.stack([x[stretch].square().mean().sqrt() for stretch in stretches])
needed = torch.stack([row / row.abs().max() for row in pictures["silenced"]]).mean(0)
print(
    f"correlation with silencing above 0.5: one gradient in {(one > 0.5).sum()}, eight in {(way > 0.5).sum()} of {len(one)} models"
)
print("eight agree better than one in", (way > one).sum(), "of", len(one))
print(f"together the models need most what lies around {int(middles[needed.argmax()]) / RATE:.2f} s;", end=" ")
print(f"the loudest stretch lies around {int(middles[loud.argmax()]) / RATE:.2f} s")

# %% [markdown]
# A gradient is honest about an infinitesimal change; silence is a large one, and normalisation, gates and softmax
# bend in between. A model that is sure of its answer may hardly care about any small change: then a single gradient
# shows what happens to be left, not what the answer stands on. Where the pictures differ, believe the silence: it is
# the experiment itself. And all three say what *this answer* stands on, not what the model "understands".
#
# ## How far does it reach?
#
# Four experiments, measured now, all on the twenty clips and all seven models. Before each, say what you expect.
#
# First **noise**: white noise so many decibels below the speech; at 0 dB both are equally strong. Training heard noise
# of 20 to 50 dB below. Where will the lines begin to fall?

# %%
levels = (30, 20, 10, 5, 0, -5, -10)
shares = {name: [] for name in NAMES}
for decibels in levels:
    spoiled = in_noise(float(decibels))
    for name, model in heard_by.items():
        shares[name].append(share_right(model, spoiled))
mean = np.mean(list(shares.values()), axis=0)
fig, ax = plt.subplots()
for name in NAMES:
    colour, marker = results.STYLE[name]
    ax.plot(levels, shares[name], color=colour, marker=marker, label=name)
ax.axhline(10, color=GREY, linestyle=":", label="chance")
ax.axvspan(20, 31, color=GREY, alpha=0.12)
ax.set(
    xlabel="noise below the speech by (dB)", ylabel=f"right on {len(clips)} clips (%)", ylim=(0, 102), xlim=(31, -11)
)
ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
show(
    fig,
    f"Right answers against the level of white noise, from 30 dB below the speech to 10 dB above it; shaded, what training "
    f"heard. Over all models about {five(mean[0] / 100)} % are right at 30 dB, {five(mean[2] / 100)} % at 10 dB, {five(mean[4] / 100)} % at 0 dB, {five(mean[-1] / 100)} % at -10 dB.",
)
print(
    f"at 20 dB, the edge of what was trained, still at least nine tenths of what is right at 30 dB: {mean[1] >= 0.9 * mean[0]}"
)
print(f"at -10 dB less than half of it: {mean[-1] < mean[0] / 2}")

# %% [markdown]
# Models are robust against what they were trained with, and not much further. The panel below lets you hear such
# clips: judge for yourself how far *you* would follow.
#
# Second, **time**. A recording begins when somebody presses a key; the word is the same whether it comes 5 or 200 ms
# later. Convolutions, relative biases and the mean at the end do not care for the hour. But three things may:
# the border of the patches, which falls elsewhere in the word when the shift is no multiple of 10 ms; absolute
# positions (the Transformer's, and SeqBoat's); and the silence, which takes part in the mean.

# %%
shifts = (0, 40, 400, 800, 1600)  # samples; 800 is what training did at most
kept = {name: [share_right(model, [delayed(x, s) for x in waves]) for s in shifts] for name, model in heard_by.items()}
mean_kept = np.mean(list(kept.values()), axis=0)
print(f"{'later by':13}" + "".join(f"{1000 * s / RATE:7.0f} ms" for s in shifts))
for name, row in kept.items():
    print(f"{name:13}" + "".join(f"{share:8.0f} %" for share in row))
print(
    "up to 100 ms, as in training, the mean stays within 5 points of the start:",
    bool(abs(mean_kept[:4] - mean_kept[0]).max() <= 5),
)
lost = {name: row[0] - row[-1] for name, row in kept.items()}
more = [name for name in NAMES if lost[name] > 1.5 * 100 / len(clips)]
print("lost more than a clip at 200 ms:", ", ".join(more) or "none")
waves_of = {n: [p for p in m.modules() if isinstance(p, SinusoidalPositions)] for n, m in heard_by.items()}
absolute = [name for name in NAMES if waves_of[name]]
size = float(waves_of["seqboat"][0].scale.detach())
print(f"add a wave for each absolute place: {', '.join(absolute)} (seqboat's is multiplied by {size:.2f})")
assert more == ["transformer"] and absolute == ["transformer", "seqboat"] and lost["seqboat"] <= 0, "the text says so"

# %% [markdown]
# One step of this table is one clip, so read it for what is large. Shifts are among the alterations of the training, up
# to 100 ms; that, as much as any relative bias, is why little happens there. Beyond, only the Transformer loses more
# than a clip. It adds a wave for each absolute place, and has never met a word at such a place. That cannot be the
# whole reason: SeqBoat adds such a wave, too, times a learned number, and loses nothing.
#
# ### Every second sample
#
# Third, and harder. S4's authors test a model trained at 16 kHz on clips of which **every second sample is dropped**,
# without any training on such clips. What should happen?
#
# Take S4 first. Its kernel is a system in continuous time, looked at in steps of $\Delta$. If samples come half as
# often, double $\Delta$, and the same system is looked at half as often; its frequencies *in hertz* stay where they
# were. The tuning forks from above:

# %%
half_forks = s4d_kernel(A[modes, None], B[modes, None], torch.ones(len(modes), 1, dtype=A.dtype), 2 * dt, RATE // 4)
half_peak, _ = centre_and_width(half_forks, RATE / 2, n=2**14)
print("rate 8 kHz, dt:   ", ", ".join(f"{f:.0f} Hz" for f in fork_peak))
print("rate 4 kHz, 2 dt: ", ", ".join(f"{f:.0f} Hz" for f in half_peak))
same = centre_and_width(forks, RATE / 2, n=2**15)[0]
print("rate 4 kHz, dt:   ", ", ".join(f"{f:.0f} Hz" for f in same), "(nobody told the model)")

# %% [markdown]
# Published on the 35 words of Speech Commands, without retraining: S4 falls from 96.08 % at 16 kHz to 91.32 % at 8 kHz,
# S4D-LegS from 95.83 to 91.08; ordinary convolutional networks, whose filters have no $\Delta$, from 95.51 to 7.26, or
# from 77.86 to 8.74 (S4D paper, Gu et al., NeurIPS 2022, Table 11, as quoted in the Liquid-S4 paper, Table 4; the
# caption there speaks of validation accuracy). They lose because every tap now meets the wrong
# sample: to them the word is said twice as fast and an octave higher.
#
# Our models read with such filters. So *straight*, at 4 kHz, expect ruin. But a filter can be resampled too. Hold each of
# the 4,000 samples twice, and both taps of a pair meet the same number:
#
# $$
# \sum_{k=0}^{K-1} w_k\, x_{\lfloor k/2 \rfloor} \;=\; \sum_{j=0}^{K/2-1} (w_{2j} + w_{2j+1})\, x_j .
# $$
#
# In words: sum neighbouring taps, halve the stride, and the filters hear at 4 kHz exactly what the old ones hear in the
# held signal. It is the doubled $\Delta$ of a filter bank. (Everything above the first stage lives on tokens of 10 ms,
# and does not notice, SPADE's S4 included.) It cannot bring back what is gone: all above 2 kHz, and, since nobody
# filtered it out first, that part now lies **folded** onto the rest: a hiss at 3 kHz sounds as 1 kHz. To tell the two
# apart, the last two ways take away what lies above 2 kHz *before* anything is dropped, so that nothing can fold: once
# at the full rate, once with every second sample then dropped.


# %%
def at_half_rate(model):
    """The same model for every second sample: neighbouring taps summed, the first stride halved."""
    other = copy.deepcopy(model)
    first, ((kernel, stride), *rest) = other.encoder.embedding.filters[0], other.encoder.embedding.stages
    bank = nn.Conv1d(1, first.out_channels, kernel // 2, stride // 2)
    bank.weight, bank.bias = nn.Parameter(half_rate(first.weight.detach())), first.bias
    other.encoder.embedding.filters[0], other.encoder.embedding.stages = bank, ((kernel // 2, stride // 2), *rest)
    return other


dropped = [x[::2] for x in waves]
ways = {
    "all samples": (lambda m: m, waves),
    "every second, straight": (lambda m: m, dropped),
    "every second, filters resampled": (at_half_rate, dropped),
    "all, without what is above 2 kHz": (lambda m: m, [low_passed(x) for x in waves]),
    "the same, then every second, resampled": (at_half_rate, [low_passed(x)[::2] for x in waves]),
}
scores = {
    way: {name: share_right(change(model), sounds) for name, model in heard_by.items()}
    for way, (change, sounds) in ways.items()
}
held = answers(heard_by["mega"], [x.repeat_interleave(2) for x in dropped])
at_4_khz = answers(at_half_rate(heard_by["mega"]), dropped)
print("filters resampled = samples held twice, error of the logits:", below((held - at_4_khz).abs().max(), 1e-3))

fig, ax = plt.subplots(figsize=(8.6, 3.6))
for i, (way, row) in enumerate(scores.items()):
    ax.plot(
        np.arange(len(NAMES)) + 0.13 * (i - 2),
        [row[name] for name in NAMES],
        linestyle="none",
        markersize=8,
        label=way,
    )
ax.axhline(10, color=GREY, linestyle=":", marker="")
ax.set(xticks=range(len(NAMES)), ylabel=f"right on {len(clips)} clips (%)", ylim=(0, 103))
ax.set_xticklabels(NAMES)
ax.grid(axis="x", visible=False)
ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.35), ncols=2, fontsize=9)
overall = {way: float(np.mean(list(row.values()))) for way, row in scores.items()}
show(
    fig,
    "Right answers of seven models in five ways: "
    + "; ".join(f"{way}, about {five(share / 100)} % over all models" for way, share in overall.items())
    + ".",
)
whole, straight, resampled, muffled, unfolded = overall.values()
print("straight, less than half is right:", straight < 50)
print(
    "resampling the filters brings back more than half of what was lost:", resampled - straight > (whole - straight) / 2
)
print("of the rest, folding costs more than what is missing:", unfolded - resampled > whole - muffled)
print("without folding, half the samples do as well as all of them, to 3 points:", abs(unfolded - muffled) <= 3)

# %% [markdown]
# So it was not the missing samples, and hardly the missing band. It was the filters' wrong idea of a step, and after
# that the folding, which a filter before the dropping prevents; telephones have one. (S4's authors drop without a filter,
# which makes their figure above the more remarkable.)
#
# The lesson of S4's test is not that attention or patches are worse. It is that a model should know what a step *is*.
# A state space carries its step as a number and can be told; filters carry it in the spacing of their taps, and can be
# told by resampling them. A model that counts steps alone, and is told nothing, hears another word.
#
# Fourth, **loudness**. Say a word from across the room and it is the same word. Every clip was brought to one level
# before training, and altered by 6 dB at most. What if a clip comes in 30 dB softer, and nobody turns it up?

# %%
for gain in (0, -30):
    heard = [share_right(model, [x * 10 ** (gain / 20) for x in waves]) for model in heard_by.values()]
    print(f"{gain:+4d} dB: more than half of the clips right in {sum(h > 50 for h in heard)} of {len(NAMES)} models")

# %% [markdown]
# Nothing is wrong with the models; they were handed what they were never shown. `tasks.load` brings every clip to one
# level, and whoever uses a model has to do the same.
#
# ## Sixteen thousand samples, and strangers
#
# The official way to ask the harder question exists. **Speech Commands** (v0.02; Warden) has 105,829 clips of 35 words
# at 16 kHz by thousands of people, and its lists put each speaker into one part only. **Arabic Speech Commands**
# (Ghandoura, Hjabo and Al Dakkak, 2021) is smaller, 16,000 samples a clip too, thirty speakers, and its parts share none
# of them. The published SC10 figures above come from yet another split, drawn at random, with the same voices in all
# parts: in that they are like FSDD's, and a figure by speaker is not to be held against them.
#
# Reading 16,000 samples *one by one* wants a GPU. The recipes are in the table:

# %%
for name in ("mega-chunk", "seqboat", "spade"):
    r = recipes.get("speech", name, "gpu-30min")
    print(
        f"{name:11} {dict(r.data)}, {r.epochs} epochs, batch {r.batch}, rate {r.lr:g}, {r.precision}, patch {r.overrides.get('patch', '(), sample by sample')}"
    )
print("arabic:", tasks.speech.SOURCES["arabic"])
print("sc10:  ", tasks.speech.SOURCES["sc10"])
chunk = models.configs.published("mega-chunk", "speech").chunk
print(f"Mega-chunk on a second of 16 kHz: {16_000 // chunk} chunks of {chunk:,}")
try:
    recipes.get("speech", "transformer", "gpu-30min")
except training.RecipeError as refused:
    print("transformer:", refused)

# %% [markdown]
# With a GPU (and the cells of this notebook run there as well: `training.fit` finds it once `cpu=True` is gone):
#
# ```
# git clone https://github.com/abdulkaderghandoura/arabic-speech-commands-dataset
# export LONGSEQ_DATA=$PWD
# python -m longseq_tutorial.data show speech source=arabic
# python -m longseq_tutorial.train --task speech --model mega-chunk --recipe gpu-30min
# python -m longseq_tutorial.results
# ```
#
# The recipe asks for the data source `arabic` by itself (for others: `--set data.source=sc10`). `--max-time 9m` stops
# cleanly after nine minutes and `--resume` goes on, so it can be done in pieces. The half-rate test is
# `training.evaluate` of a model, changed as above or not, on `tasks.load("speech", source="arabic", every=2)`, which
# drops every second sample. Whatever comes out is a record like those above, with its split in it.
#
# ## The panel
#
# Choose a clip and a model, make the clip softer or louder, add noise, and see the answer; with a live kernel you hear
# what the model hears. `Listening(model, clips, class_names)` takes any classifier `(x, mask) -> logits`, or several by
# name, and any clips: record yourself at 8 kHz and pass the samples.

# %%
panel = Listening(heard_by, clips, words, names, model="mega")
panel

# %%
print(panel.set(clip=names[14]).say())
print(panel.set(noise=10).say())
print(panel.set(noise=-5).say())
print(panel.set(noise=60, model="spade").say())
print(panel.set(gain=-30).say())

# %% [markdown]
# The waveform and the ten probabilities stand side by side; under the waveform, what silencing each stretch of 50 ms
# costs. Find the stretch that the answer stands on, listen to it, and ask yourself which sound it is.
#
# ## Exercises
#
# ### Exercise 1 · Patches
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Cut signals `x (B, L)` into patches of `size` neighbouring samples: `(B, ceil(L / size), size)`. Fill the last patch
# up with zeros, on the right.
#
# <details><summary>Hint 1</summary>
#
# How many zeros are missing to the next multiple? In Python `-L % size` is exactly that, and 0 when nothing is missing.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `torch.nn.functional.pad(x, (0, n))` puts `n` zeros behind the last axis; then `unflatten` or `reshape`.
#
# </details>


# %%
def patches(x, size):
    """x (B, L) -> (B, ceil(L / size), size), the last patch filled up with zeros."""
    # BEGIN SOLUTION "your turn: zeros on the right to a multiple of size, then cut"
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % size))
    return padded.unflatten(1, (-1, size))
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.speech import check_patches

check_patches(patches)

# %% [markdown]
# ### Exercise 2 · The mean over what is real
#
# Difficulty: ●●○ · Importance: ●●● · 10 minutes
#
# Clips have different lengths, a batch has one. The classifier reads its answer from the mean over the **real** tokens
# of each clip: `h (B, L, D)`, `mask (B, L)` bool, result `(B, D)`. A clip without any real token gives zeros, not NaN.
#
# <details><summary>Hint 1</summary>
#
# `mask.unsqueeze(-1)` is `(B, L, 1)` and multiplies `h` position by position.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Divide by the number of real tokens of *this* clip, and let that number be at least 1: `.clamp(min=1)`.
#
# </details>


# %%
def pool(h, mask):
    """h (B, L, D), mask (B, L) bool, True = real -> the mean over real positions (B, D)."""
    # BEGIN SOLUTION "your turn: sum over real positions, divided by how many there are"
    real = mask.unsqueeze(-1).to(h.dtype)
    return (h * real).sum(1) / real.sum(1).clamp(min=1)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.speech import check_pool

check_pool(pool)

# %% [markdown]
# ### Exercise 3 · So many decibels of noise
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# Add noise `decibels` below the signal. The **level** of a clip is its root mean square,
# $\sqrt{\tfrac1L \sum_t x_t^2}$, and a ratio of levels $r$ is $20 \log_{10} r$ decibels. `x` and `noise` are `(B, L)`;
# each clip has its own level, and so has each noise. The noise curve above was measured with this.
#
# <details><summary>Hint 1</summary>
#
# First bring the noise to the level of the clip: divide by its own level, multiply by the clip's.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Then `decibels` lower: multiply by `10 ** (-decibels / 20)`. Keep the time axis with `keepdim=True` so that it
# broadcasts.
#
# </details>


# %%
def mixed(x, noise, decibels):
    """x, noise (B, L) -> x with the noise added, `decibels` below the level of each clip."""
    # BEGIN SOLUTION "your turn: measure both levels, scale the noise, add"
    level_x = x.square().mean(-1, keepdim=True).sqrt()
    level_noise = noise.square().mean(-1, keepdim=True).sqrt()
    return x + noise * (level_x / level_noise) * 10 ** (-decibels / 20)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.speech import check_mix

check_mix(mixed)

# %% [markdown]
# ### Exercise 4 · What a filter listens to
#
# Difficulty: ●●○ · Importance: ●●● · 20 minutes
#
# For each filter of `bank (D, K)`, the two numbers of the figure above, in hertz: its **centre**, the frequency of its
# strongest answer, and its **width**, the sum of its power over all frequencies, divided by its largest power, times
# the spacing of the frequencies. Take the spectrum with zeros up to 1,024 samples.
#
# <details><summary>Hint 1</summary>
#
# `torch.fft.rfft(bank, n=1024)` is `(D, 513)`, complex; power is its absolute value squared. Bin `i` lies at
# `i * rate / 1024` hertz.
#
# </details>
# <details><summary>Hint 2</summary>
#
# `argmax(-1)` is a bin, not yet a frequency. `sum(-1) / amax(-1)` is a number of bins, not yet a width.
#
# </details>


# %%
def centre_and_band(bank, rate):
    """bank (D, K), rate in samples a second -> centre (D,), width (D,), in hertz."""
    # BEGIN SOLUTION "your turn: the power spectrum; where it is largest; its sum over its maximum"
    power = torch.fft.rfft(bank, n=1024).abs().square()
    bin_width = rate / 1024
    return power.argmax(-1) * bin_width, power.sum(-1) / power.amax(-1) * bin_width
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.speech import check_centre_and_width

check_centre_and_width(centre_and_band)

# %% [markdown]
# ### Exercise 5 · Half the samples
#
# Difficulty: ●●● · Importance: ●●○ · 20 minutes
#
# A bank of filters `(D, C, K)`, K even, was learned at some rate. Give the bank `(D, C, K / 2)` which, at half the
# stride, answers to a signal of half the rate as the old one answers to that signal with each sample held twice. The
# result must let gradients through: one may want to go on training at the new rate.
#
# <details><summary>Hint 1</summary>
#
# Write out the sum over taps for a signal $a, a, b, b, c, c$. Which taps meet $a$?
#
# </details>
# <details><summary>Hint 2</summary>
#
# Neither every second tap (that forgets half of the filter) nor the mean of a pair (held samples come twice).
#
# </details>


# %%
def resampled_bank(bank):
    """(D, C, K) -> (D, C, K / 2)."""
    # BEGIN SOLUTION "your turn: the two taps of a pair meet the same sample"
    return bank[..., 0::2] + bank[..., 1::2]
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.speech import check_half_rate

check_half_rate(resampled_bank)

# %% [markdown]
# ## What to remember
#
# * A waveform is thousands of samples a second; what a word is lies over thousands of them, what a vowel is within tens.
#   Attention pays for the square of that number.
# * Patches make the sequence P times shorter and attention P² times cheaper; overlap, a nonlinearity and a second stage
#   let them say "this sound, whatever its phase". Long kernels read every sample: S4's ring, like the filters of a
#   bank; an EMA's only smooth.
# * Learned filters crowd where the mouth's lower resonances are, a mel bank still lower; who looks for 5 ms cannot tell
#   100 Hz from 200.
# * A model stands what it was trained with, and little more: noise, loudness. Shifts are easier: at twice the trained
#   shift only the Transformer lost more than a clip.
# * Know what a step is: a state space is told of a new rate by its step, filters by resampling them.
# * A record names data, split, seed, time and machine. FSDD's test is other takes of the same six people; they are not
#   other people.
#
# Where the papers say it: Mega (Ma et al., ICLR 2023) on raw Speech Commands; S4 (Gu, Goel and Ré, ICLR 2022) on raw
# speech and on half the rate.
#
# Next, [chapter 12](12_what_they_learned.ipynb): what trained models have learned, and what their quality costs.
