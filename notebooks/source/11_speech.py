# %% [markdown]
# # 11 · Speech, from the waveform
#
# ## The question
#
# Sound reaches a computer as numbers, thousands a second. For decades one turned them into spectrograms first, because
# no model could read that many. Can a model of this course read the numbers themselves, and learn what to listen for?
#
# Here it does: a Mega classifier hears which digit somebody says. You watch one learn within seconds, then you take a
# model that was trained for five minutes on recorded voices, listen to what it hears, and look at what it has
# learned. Afterwards you will be able to
#
# * say what a waveform is, and why it is so long;
# * turn samples into tokens with a *learned* patch embedding, and say what that costs and what it loses;
# * train a classifier on raw sound, and read a record of such a training honestly;
# * look inside it: its filters, its memory, its attention, and what it needs of a clip;
# * tell how far its skill reaches, and where it ends.

# %%
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
from longseq_tutorial import models, tasks, training
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, show, use_style
from longseq_tutorial.classroom.panels_speech import Listening
from longseq_tutorial.classroom.sound import SOURCE, mix, probabilities, real_clips
from longseq_tutorial.models.parts import PatchEmbedding

use_style()
torch.set_flush_denormal(True)
torch.set_num_threads(1)  # the models here are so small that a second thread would mostly wait for the first
ROOT = Path(longseq_tutorial.__file__).parents[1]
RATE = 8000  # samples a second

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

fig, (whole, close) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(1.5, 1))
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
# How long? Speech Commands, the set on which such models are compared, has 16,000 samples a second. One second of it in
# one attention layer, one head:

# %%
samples = 16_000
print(f"attention weights: {samples**2:,}, in float32 {4 * samples**2 / 2**30:.1f} GiB for each clip, head and layer")
products = samples * math.log2(samples)
print(f"an FFT convolution over it: about {products:,.0f} products, {samples**2 / products:.0f} times fewer")

# %% [markdown]
# The Mega paper reads them one by one, with attention in chunks of 1,000 samples, and reports 96.92 % on ten words
# (97.30 % with a larger model); a Transformer with full attention did not fit into the memory of its GPU. (Ma et al.,
# ICLR 2023.) On a CPU and in minutes we need one more idea.
#
# ## From samples to tokens
#
# The idea is a **patch embedding**: cut the signal into patches of $P$ samples, and map each patch to one vector, with a
# linear map that is learned like everything else,
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
stages = ((40, 20), (8, 4))
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
# What does a longer patch cost? In the figure, look at how quickly the attention over a second of sound becomes small,
# and at what is left over for time: a patch of 100 ms could swallow a consonant whole.

# %%
patch = np.array([1, 2, 5, 10, 20, 40, 80, 160, 320, 800])
count = np.ceil(8000 / patch)
fig, ax = plt.subplots()
ax.loglog(1000 * patch / RATE, count, label="tokens")
ax.loglog(1000 * patch / RATE, count**2, label="attention weights")
ax.axvline(1000 * embedding.patch / RATE, color="#8A8A86", linestyle=":", label="the patch used below")
ax.set(xlabel="patch (ms)", ylabel="for one second at 8 kHz")
ax.legend()
show(
    fig,
    f"Tokens and attention weights for one second of sound against the length of a patch, both axes logarithmic: "
    f"sample by sample {count[0]:,.0f} tokens and {count[0] ** 2:,.0f} weights; with patches of {embedding.patch} "
    f"samples, 10 ms, {count[6]:,.0f} tokens and {count[6] ** 2:,.0f} weights.",
)

# %% [markdown]
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
                   truncation=None, norm="layernorm", patch=stages),
    epochs=4, batch=16, lr=0.006, warmup=40, source="chosen for this notebook",
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
# ## Five minutes, recorded voices
#
# From a terminal, this trains the course's reference model (`make train` is the same):
#
# ```
# python -m longseq_tutorial.train --task speech --model mega --recipe cpu-5min
# ```
#
# It was run once for the repository, and what it left lies in `results/`: a **record** and the weights. A record is
# what makes a number checkable. Read it before you believe the accuracy.

# %%
model, record = training.load_run(ROOT / "results" / "speech-mega-cpu-5min-seed0")
counts = ", ".join(f"{count:,} {part}" for part, count in record.sequences.items())
print("data:      ", record.source)
print("clips:     ", counts)
print(
    "model:     ",
    f"{record.parameters:,} parameters, patch {record.config['patch']}, {record.config['layers']} layers, width {record.config['dim']}",
)
print(
    "training:  ",
    f"{record.updates:,} updates, {record.seconds / 60:.1f} minutes, all evaluations included, seed {record.seed}",
)
print("machine:   ", f"{record.device_name}, {record.threads} thread(s), torch {record.versions['torch']}")
print("weights of:", f"update {record.weights_of['update']:,}, chosen by: {record.weights_of['rule']}")
print("test:      ", f"{100 * record.test['accuracy']:.1f} % of the official test, measured once, at the end")
right = round(record.test["accuracy"] * record.sequences["test"])
error = 100 * math.sqrt(record.test["accuracy"] * (1 - record.test["accuracy"]) / record.sequences["test"])
print("           ", f"{right} of {record.sequences['test']} clips; standard error {error:.1f} points")

# %% [markdown]
# What the figure of the last line is *not*: a measure of how well the model understands strangers. The official split
# divides takes, not people; the same six speakers are heard in training and in the test.
#
# And "once" holds for this run alone. While the recipe was being found, the test figures of a few earlier tries were
# seen too, and so the test is not quite as fresh as it sounds. A record cannot tell you that; its authors have to.
#
# In the next figure look at the distance between the two curves: training is measured on clips that are altered at
# random (faster, slower, shifted, louder, softer, in noise) where the recipe asks for it, validation on clips as they
# are.

# %%
rows = [row for row in record.history if row["valid"]]
learned = [row for row in record.history if row["train"]]
fig, (left, right_ax) = plt.subplots(1, 2, figsize=(9.6, 3.5))
for ax, key, scale in ((left, "loss", 1), (right_ax, "accuracy", 100)):
    ax.plot(
        [row["epoch"] for row in rows], [scale * row["valid"][key] for row in rows], markersize=3.5, label="validation"
    )
    ax.plot(
        [row["epoch"] for row in learned],
        [scale * row["train"][key] for row in learned],
        markersize=3.5,
        label="training",
    )
    ax.set(xlabel="epoch")
left.set(ylabel="loss (nats)", yscale="log")
right_ax.set(ylabel="accuracy (%)", ylim=(0, 101))
right_ax.axhline(100 * record.test["accuracy"], color=OKABE_ITO["vermilion"], linestyle="--", label="test, at the end")
right_ax.legend(loc="lower right")
half = next(row["epoch"] for row in rows if row["valid"]["accuracy"] > 0.5)
show(
    fig,
    f"The five-minute run: loss (left, logarithmic) and accuracy (right) against epochs, for training and validation. "
    f"Validation passes 50 % by epoch {half:.0f} and ends at {100 * rows[-1]['valid']['accuracy']:.1f} %; the test at the end "
    f"gives {100 * record.test['accuracy']:.1f} %. Augmented training clips: {record.recipe['augment']}.",
)

# %% [markdown]
# ## What it makes of real clips
#
# The twenty clips of this repository are take 0 of the official test: the model has never been trained on them. They
# were chosen by a rule that looks at no sound and no answer, two of each digit, the speakers taking turns.

# %%
clips, names = real_clips(record.recipe["data"])  # prepared as in its training
words = record.task["class_names"]
answers = [probabilities(model, x) for x, _ in clips]
hits = sum(int(answer.argmax()) == label for answer, (_, label) in zip(answers, clips, strict=True))
print(f"{hits} of {len(clips)} right")
for name, answer, (_, label) in zip(names, answers, clips, strict=True):
    first, second = answer.topk(2).indices.tolist()
    if first != label:
        print(f"  {name}: heard {words[first]!r}, then {words[second]!r}; it is {words[label]!r}")

image = torch.stack(answers)
fig, ax = plt.subplots(figsize=(6.4, 5.2))
picture = ax.imshow(image, aspect="auto", vmin=0, vmax=1)
fig.colorbar(picture, label="probability")
ax.set(xticks=range(10), yticks=range(len(names)), xlabel="what the model hears")
ax.set_xticklabels(words, rotation=45, ha="right")
ax.set_yticklabels(names, fontsize=8)
ax.grid(False)
sure = sum(bool(answer.max() > 0.9) for answer in answers)
show(
    fig,
    f"Probabilities of the ten words, one row a clip, two clips of each digit in order: a bright staircase along the "
    f"diagonal. {hits} of {len(clips)} clips are heard right; in {sure} the model gives its answer more than 90 %.",
)

# %% [markdown]
# Listen to three of them: the one it is least sure of, and two others.

# %%
certainty = [float(answer[label]) for answer, (_, label) in zip(answers, clips, strict=True)]
hardest = int(np.argmin(certainty))
print("least sure:", names[hardest])
Audio(clips[hardest][0].numpy(), rate=RATE)

# %%
print(names[6])
Audio(clips[6][0].numpy(), rate=RATE)

# %%
print(names[15])
Audio(clips[15][0].numpy(), rate=RATE)

# %% [markdown]
# ## What it has learned to listen for
#
# **Filters.** The first stage holds a bank of short waveforms. What frequency does each of them answer to? In the
# figure the filters are sorted by the frequency of their strongest response; look at how they spread over the band,
# beside the random filters that the training began with.

# %%
filters = model.encoder.embedding.filters[0].weight[:, 0].detach()  # (D, kernel)
config = tasks.TaskConfig(**{**record.task, "class_names": tuple(record.task["class_names"])})
torch.manual_seed(record.seed)
fresh = models.build(record.model, config, **record.config).encoder.embedding.filters[0].weight[:, 0].detach()
FREQUENCIES = np.fft.rfftfreq(512, 1 / RATE)


def response(bank):
    """(D, kernel) -> size of each filter's answer to each frequency, the largest 1, sorted by where that is."""
    size = torch.fft.rfft(bank - bank.mean(1, keepdim=True), n=512).abs().numpy()
    size /= size.max(1, keepdims=True)
    return size[np.argsort(size.argmax(1))]


def width(bank):
    """The share of the band in which a filter answers at least half as strongly as at its best; its mean over filters."""
    return (response(bank) > 0.5).mean()


fig, axes = plt.subplots(1, 2, figsize=(9.4, 3.8), sharey=True)
for ax, bank, title in zip(axes, (fresh, filters), ("before training", "after training"), strict=True):
    ax.imshow(response(bank).T, aspect="auto", origin="lower", extent=(0, len(bank), 0, RATE / 2000), vmin=0, vmax=1)
    ax.set(xlabel="filter, sorted", title=title)
    ax.grid(False)
axes[0].set_ylabel("frequency (kHz)")
best = FREQUENCIES[response(filters).argmax(1)]
before = FREQUENCIES[response(fresh).argmax(1)]
show(
    fig,
    f"Frequency responses of the {len(filters)} filters of the first stage ({filters.shape[1]} samples each), sorted by "
    f"their best frequency, random ones before training on the left. Before training the median of the best frequencies is "
    f"{np.median(before):.0f} Hz; afterwards {np.median(best):.0f} Hz, and {100 * (best < 1000).mean():.0f} % of the filters "
    f"answer best below 1 kHz, against {100 * (before < 1000).mean():.0f} % at the start.",
)
print(
    "filters that answer best below 1 kHz:",
    f"{100 * (before < 1000).mean():.0f} % before, {100 * (best < 1000).mean():.0f} % after",
)
print(
    "share of the band that a filter answers to:",
    f"{100 * width(fresh):.0f} % before, {100 * width(filters):.0f} % after",
)

# %% [markdown]
# Nobody asked for it, but the random filters have become band filters, each for a narrower range of frequencies, and
# packed more densely in the lower part of the band, where the voice and the lowest resonances of the mouth lie. A
# spectrogram made for speech has that shape as well, because the ear has it. Here the digits alone drew it.
#
# **Memory.** In each layer the EMA carries the past of a clip (and, running backwards, its future) to every token. Its
# decays $q = 1 - \alpha\delta$ were learned as well; a decay $q$ forgets down to $1/e$ in $-1/\ln q$ tokens. In the
# figure, look at how far training has moved them, and compare with the length of a word.

# %%
patch_ms = 1000 * model.encoder.embedding.patch / RATE


def memories(m):
    """Time to forget down to 1/e, in ms, of all EMA dimensions of a model."""
    found = []
    for layer in m.encoder.layers:
        alpha, delta, _, _ = layer.mega.ema.coefficients()
        found.append((-patch_ms / torch.log1p(-alpha * delta)).flatten())
    return torch.cat(found).detach().numpy()


torch.manual_seed(record.seed)
at_first, at_last = memories(models.build(record.model, config, **record.config)), memories(model)
bins = np.geomspace(min(at_first.min(), at_last.min()), max(at_last.max(), at_first.max()), 50)
fig, ax = plt.subplots()
ax.hist(at_first, bins=bins, histtype="step", linewidth=1.6, color="#8A8A86", label="before training")
ax.hist(at_last, bins=bins, color=OKABE_ITO["sky"], label="after training")
ax.set(xscale="log", xlabel="time to forget down to 1/e (ms)", ylabel="EMA dimensions")
ax.set_xticks([20, 30, 40, 60, 80], ["20", "30", "40", "60", "80"])
ax.set_xticks([], minor=True)
ax.legend()
show(
    fig,
    f"Histogram of the memories of all {len(at_last):,} EMA dimensions, in milliseconds, logarithmic. Before training they "
    f"all lie between {fmt(at_first.min())} and {fmt(at_first.max())} ms; after it they reach from {fmt(at_last.min())} to "
    f"{fmt(at_last.max())} ms, with the median at {fmt(np.median(at_last))} ms.",
)
print("the longest memory has become longer:", bool(at_last.max() > at_first.max()))
word = 1000 * float(np.median([len(x) for x, _ in clips])) / RATE
print(f"but even it is shorter than half a clip ({word:.0f} ms at the median):", bool(at_last.max() < word / 2))

# %% [markdown]
# The averages have moved little: each gathers a stretch of a syllable, none a whole word. The EMA keeps to its
# neighbourhood; for what spans the word there are the attention and the mean at the end.
#
# **Attention.** `models.record` keeps what passes while a clip is heard. In the figure each row is a token that asks,
# each column a token that it looks at; below stands the waveform on the same time axis. Columns would be *moments* that
# are looked at from everywhere; diagonals are fixed *distances*, whatever is said there. Which do you see?

# %%
shown = 6
x, label = clips[shown]
with torch.no_grad(), models.record(model) as tape:
    model(x[None], torch.ones(1, len(x), dtype=torch.bool))
maps = [tape[name][0] for name in tape.names("weights")]  # one (tokens, tokens) a layer
seconds = maps[0].shape[-1] * patch_ms / 1000
fig, axes = plt.subplots(2, len(maps), figsize=(3.4 * len(maps), 4.4), height_ratios=(3, 1), sharex=True, squeeze=False)
for layer, weights in enumerate(maps):
    axes[0, layer].imshow(
        weights, aspect="auto", extent=(0, seconds, seconds, 0), vmin=0, vmax=float(weights.quantile(0.99))
    )
    axes[0, layer].set_title(f"layer {layer + 1}")
    axes[0, layer].grid(False)
    axes[1, layer].plot(np.arange(len(x)) / RATE, x, marker="", linewidth=0.5)
    axes[1, layer].set(xlabel="time (s)")
axes[0, 0].set_ylabel("the token that asks (s)")
axes[1, 0].set_ylabel("sample")


def explained(weights, group):
    """Which share of the variance of `weights` is between the groups of places that `group` numbers."""
    value, group = weights.flatten().numpy(), group.flatten().numpy() - int(group.min())
    mean = np.bincount(group, value) / np.bincount(group)
    return float(mean[group].var() / value.var())


place = torch.arange(len(maps[0]))
by_distance = [explained(weights, place[:, None] - place) for weights in maps]
by_moment = [explained(weights, place.expand(len(place), -1)) for weights in maps]
show(
    fig,
    f"Attention weights of each layer for {names[shown]}, {maps[0].shape[-1]} tokens of {patch_ms:.0f} ms, with the waveform below. "
    f"The distance alone explains {', '.join(f'{100 * r:.1f} %' for r in by_distance)} of the variance of the weights "
    f"in layers 1 to {len(maps)}, the moment alone {', '.join(f'{100 * r:.0f} %' for r in by_moment)}.",
)
print("by distance, in every layer, more than nine tenths:", min(by_distance) > 0.9)
for layer, (distance, moment) in enumerate(zip(by_distance, by_moment, strict=True), start=1):
    print(
        f"layer {layer}: variance explained by distance {100 * distance:.1f} %, by the moment looked at {100 * moment:.0f} %"
    )

# %% [markdown]
# Before one tells a story about a map, one has to ask what kind of map it is. In this model they are diagonals: nearly
# all of the attention is settled by the *distance* between two tokens, that is by the learned relative bias, and hardly
# any by what is said there. One reason stands in notebook 03: with the laplace function Mega divides the products of
# queries and keys by the length, but not the bias. In minutes, on single words, attention has become one more filter
# with fixed taps, longer than the EMA's. That is a finding about this model and no other; notebook 12 looks at more.
#
# And a map shows where a model *looks*, not what it *needs*. For that, take something away: silence 50 ms of the
# clip, and see how far the logit of its answer falls; then the next 50 ms, and so on. This asks any model, ours or not,
# and needs no gradient. The panel below does it for every clip.
#
# ## How far does it reach?
#
# Three experiments, measured now. First **noise**: white noise so many decibels below the speech; at 0 dB both are
# equally strong. In the figure look for where the answers begin to fail, and compare with the noise that the training
# used, 20 to 50 dB below the speech.

# %%
levels = np.arange(40, -11, -5)
share = []
for decibels in levels:
    good = 0
    for i, (x, label) in enumerate(clips):
        hiss = torch.randn(3, len(x), generator=torch.Generator().manual_seed(i))  # three noises a clip
        good += int((probabilities(model, mix(x.expand(3, -1), hiss, float(decibels))).argmax(1) == label).sum())
    share.append(100 * good / (3 * len(clips)))
fig, ax = plt.subplots()
ax.plot(levels, share)
ax.axhline(10, color="#8A8A86", linestyle=":", label="chance")
ax.set(xlabel="noise below the speech by (dB)", ylabel=f"right answers on {len(clips)} clips (%)", ylim=(0, 102))
ax.invert_xaxis()
ax.legend()
show(
    fig,
    f"Right answers against the level of white noise, from 40 dB below the speech to 10 dB above it. At 40 dB at least 80 % "
    f"are right: {share[0] >= 80}; at 10 dB above the speech fewer than half as many: {share[-1] < share[0] / 2}.",
)

# %% [markdown]
# A model is robust against what it was trained with, and not much further. The panel lets you hear such clips: judge
# for yourself how far *you* would follow.
#
# Second, **loudness**. Say a word from across the room and it is the same word. Every clip was brought to one level
# before training, and altered by 6 dB at most. What if a clip comes in 30 dB softer, and nobody turns it up?

# %%
for gain in (0, -10, -30):
    good = sum(int(probabilities(model, x * 10 ** (gain / 20)).argmax()) == label for x, label in clips)
    print(f"{gain:+4d} dB: {'more' if good > len(clips) / 2 else 'not more'} than half of the clips right")

# %% [markdown]
# Nothing is wrong with the model; it was handed what it was never shown. `tasks.load` brings every clip to one level,
# and whoever uses the model has to do the same.
#
# Third, **strangers**: the synthetic voices of the sample, which this model has never met.

# %%
prepared = {key: value for key, value in record.recipe["data"].items() if key in ("normalise", "length")}
heard = training.evaluate(model, tasks.load("speech", source="sample", **prepared).test)
print("better than chance on synthetic voices (10 %):", heard["accuracy"] > 0.1 + 2 * math.sqrt(0.09 / len(task.test)))
print(
    "errs more than twice as often as on the people it knows:",
    1 - heard["accuracy"] > 2 * (1 - record.test["accuracy"]),
)

confusion = torch.zeros(10, 10)
for x, label in task.test:
    confusion[label, int(probabilities(model, x).argmax())] += 1
fig, ax = plt.subplots(figsize=(5.6, 4.6))
picture = ax.imshow(confusion)
fig.colorbar(picture, label="clips (12 of each digit)")
ax.set(xticks=range(10), yticks=range(10), xlabel="what the model hears", ylabel="what was said")
ax.set_xticklabels(words, rotation=45, ha="right")
ax.set_yticklabels(words)
ax.grid(False)
off = 1 - float(confusion.diag().sum() / confusion.sum())
show(
    fig,
    f"What the model trained on six people makes of 12 synthetic voices, what was said against what is heard, 12 clips "
    f"a digit. The diagonal stands out, and more than one clip in twenty lies off it: {off > 0.05}.",
)

# %% [markdown]
# What it learned from six people carries over to voices that no human has, and yet it errs more than twice as often on
# them, although they are clean and without noise. Nothing in its test accuracy said so, because nothing in the test
# asked. That is not a fault of the record, which names its data and its split; it is a fault of whoever quotes the
# number without them. A split by speaker asks the harder question.
#
# ## The panel
#
# Choose a clip, make it softer or louder, add noise, and see the answer; with a live kernel you hear what the model
# hears. `Listening(model, clips, class_names)` takes any classifier `(x, mask) -> logits` and any clips: record
# yourself at 8 kHz and pass the samples.

# %%
panel = Listening(model, clips, words, names)
panel

# %%
print(panel.set(clip=names[14]).say())
print(panel.set(noise=10).say())
print(panel.set(noise=-5).say())
print(panel.set(noise=60, gain=-30).say())

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
# ## What to remember
#
# * A waveform is thousands of samples a second; what a word is lies over thousands of them, what a vowel is within tens.
# * A patch embedding is a learned linear map of short stretches, a strided convolution. It makes the sequence P times
#   shorter and attention P² times cheaper. Mega's paper needs none: it reads 16,000 samples in chunks of 1,000.
# * Overlap, a nonlinearity and a second stage let it say "this sound, whatever its phase".
# * Mean pooling counts real tokens only; padding must not change an answer.
# * A record names data, split, seed, time and machine. An accuracy without them is a rumour.
# * A test measures what it asks: other takes of the same six people are not other people.
#
# Next, notebook 12: what trained models have learned, and what their quality costs.
