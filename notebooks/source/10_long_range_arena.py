# %% [markdown]
# # 10 · The Long Range Arena
#
# ## The question
#
# The notebooks before this one build mechanisms. Does any of them help a model to *use* a long input? In 2021 Tay
# and colleagues put that question into the form of six tasks, the **Long Range Arena**, and for years most models
# for long sequences were compared on it. A task is interesting here if its answer depends on things that stand far
# apart, and if no shortcut gives the answer away.
#
# This notebook looks at all six: first at what a person would see, then at the row of numbers that a model gets. For
# each it measures how far apart the things are that have to meet. Then seven models learn a small problem before your
# eyes, and the records of longer runs are read with the care that such tables need. Afterwards you will be able to
#
# * say what each of the six tasks asks for, and what makes it hard;
# * measure *how* long-range a task is, and say what a score on it proves;
# * batch sequences of different lengths so that padding changes no answer;
# * read a table of accuracies, the published one and ours, without being misled by it;
# * start a run on a laptop, on a GPU or on several, and go on where it stopped.

# %%
import collections
import itertools
import random
import re
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import functional as F

import longseq_tutorial
from longseq_tutorial import models, published, results, tasks, training
from longseq_tutorial.classroom import OKABE_ITO, below, fmt, show, use_style
from longseq_tutorial.classroom.panels_arena import (
    TaskBrowser,
    as_text,
    draw_bytes,
    draw_paths,
    draw_picture,
    draw_sequence,
    samples,
)
from longseq_tutorial.classroom.panels_listops import ExpressionTree
from longseq_tutorial.classroom.trees import parse, tree_figure, with_digit
from longseq_tutorial.tasks import expressions, pathfinder
from longseq_tutorial.training import batches, recipes

use_style()
torch.set_flush_denormal(True)
torch.set_num_threads(1)  # the models here are so small that a second thread would mostly wait for the first
ROOT = Path(longseq_tutorial.__file__).parents[1]

# %% [markdown]
# ## Six tasks
#
# | task | what is read | longest input | classes | what it asks |
# | --- | --- | --- | --- | --- |
# | ListOps | a nested list expression, as tokens | 2,000 | 10 | its value |
# | Text | a film review, byte by byte | 4,096 | 2 | is it favourable? |
# | Retrieval | two scientific papers, byte by byte | 2 × 4,000 | 2 | does one cite the other? |
# | Image | a grey picture, pixel by pixel | 1,024 | 10 | what does it show? |
# | Pathfinder | a 32×32 picture, pixel by pixel | 1,024 | 2 | are the two dots joined by a dashed line? |
# | Path-X | the same at 128×128 | 16,384 | 2 | the same |
#
# The metric is plain accuracy on the test part, everywhere. Nothing is given but the flat sequence: a model that reads
# a picture is not told where a row ends. Source: Tay et al., "Long Range Arena: A Benchmark for Efficient
# Transformers", ICLR 2021.
#
# `tasks.load(name)` loads any of them. This notebook takes `source="sample"`, the few examples that lie in the
# repository, so that it runs without a network. Three of the six samples are made by the genuine rule; the other three
# are stand-ins, and say so:

# %%
six = samples()
for name, task in six.items():
    print(f"{name:11}{task.config.source}")

# %% [markdown]
# The expressions and the paths are the real thing, only few. The reviews and pictures of the sample are made up, and far
# easier than real ones: they show what a model reads, and no accuracy on them means anything. With the real data at hand
# (`python -m longseq_tutorial.data list`) the same calls load those.
#
# What has been reached on the real tasks? `published` holds the figures that were checked against a paper's text. An
# "x" in the papers, here "fails", means that a model stayed at chance or did not fit into its authors' memory.

# %%
SHOWN = ("Transformer (Arena)", "transformer", "S4-v2", "mega", "mega-chunk")
print(published.table(SHOWN))
for name in SHOWN:
    five = published.mean(name, published.ARENA[:5])
    print(
        f"{name:21}mean of six, a failure counting 50: {published.mean(name, failed=50):.2f}; without Path-X: {five:.2f}"
    )
print()
for source in dict.fromkeys(published.lookup("listops", name).source for name in SHOWN):
    print("source:", source)
for name in ("transformer", "mega", "mega-chunk"):
    print(f"{name}: {published.lookup('pathx', name).note}")

# %% [markdown]
# Two averages, and papers print either. The Arena's own leaves Path-X out for all; a Transformer's five-task mean beside
# a six-task mean looks as if both meant the same. Always ask how many tasks an average is over.
#
# In the figure, look at two things: how the tasks differ in the room they leave above chance, and where full and
# chunked attention part.

# %%
ARENA = published.ARENA
TITLES = [published.BENCHMARKS[task].title for task in ARENA]
CHANCE = [published.BENCHMARKS[task].chance for task in ARENA]
PUBLISHED = {
    name: np.array([published.lookup(task, name).accuracy for task in ARENA], dtype=float)  # a failure becomes NaN
    for name in SHOWN
}
fig, ax = plt.subplots(figsize=(8.2, 4.0))
ax.bar(range(6), CHANCE, width=0.72, color="#DDDDD8", label="chance")
for offset, (model, row) in zip(np.linspace(-0.26, 0.26, len(PUBLISHED)), PUBLISHED.items(), strict=True):
    ax.plot(np.arange(6) + offset, row, linestyle="none", markersize=7, label=model)
ax.set(ylabel="test accuracy (%)", ylim=(0, 100), xticks=range(6))
ax.set_xticklabels(TITLES)
ax.grid(axis="x", visible=False)
ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=3)
mega, chunked = PUBLISHED["mega"], PUBLISHED["mega-chunk"]
lost = dict(zip(TITLES, mega - chunked, strict=True))
most_lost = sorted(lost, key=lost.get, reverse=True)[:3]
show(
    fig,
    f"Published test accuracy on the six tasks, above bars for chance. Mega is the highest on every task here; on "
    f"ListOps even it stays at {mega[0]:.2f} %, while it is above 90 % on the other five. Chunked attention loses "
    f"most on {', '.join(f'{task} ({lost[task]:.1f} points)' for task in most_lost)}.",
)
assert (mega == np.nanmax(list(PUBLISHED.values()), axis=0)).all() and (mega[1:] > 90).all()

# %% [markdown]
# Five of the tasks have been brought above 90 %. ListOps has not: the best figure in this table is hardly above 63 %.
# It looks the simplest of all, ten digits and four operators, and no world knowledge in it. What makes it hard?
#
# ## ListOps: a tree, written in a line
#
# An **expression** is a digit, or a list: an operator, two to ten expressions, and a closing bracket.
#
# $$
# E \;\to\; 0 \mid 1 \mid \dots \mid 9 \;\mid\; [o\; E\, E \cdots E\; ] \qquad
# o \in \{\texttt{MIN}, \texttt{MAX}, \texttt{MED}, \texttt{SM}\}
# $$
#
# In words: whatever stands where a digit could stand may itself be a list, so lists nest. `MIN` and `MAX` are what
# they say, `SM` is the sum modulo 10, and `MED` the median; of an even number of arguments it is the mean of the two
# in the middle, rounded down, so that the value is a digit again. The value of the whole is therefore always one of
# ten digits: ten classes. The language is Nangia and Bowman's ("ListOps: A Diagnostic Dataset for Latent Tree
# Learning", 2018); the Arena made its expressions long.
#
# A model sees this:

# %%
small = "[MAX 4 [MIN 8 3 ] [SM 7 [MED 2 9 6 1 ] 5 ] 0 ]"
ids = expressions.encode(small)
print(small)
print(ids.tolist())
print("the four operators and the bracket:", dict(zip(expressions.VOCABULARY[11:], range(11, 16), strict=True)))
print("value:", expressions.evaluate(ids))

# %% [markdown]
# A token is a number from 1 to 15, and 0 is kept for padding. What the model has to recover is the tree that the
# brackets stand for. In the figure each operator shows the value of its part; follow the values upwards.

# %%
tree = parse(small)
sm = next(node for node in tree.operators if node.name == "SM")
show(
    tree_figure(tree),
    f"The tree of {small}: at the root MAX with the value {tree.value}, below it the digits 4 and 0, a MIN with the "
    f"value {tree.arguments[1].value} and an SM with the value {sm.value}, which holds a MED with the value "
    f"{sm.arguments[1].value}.",
)

# %% [markdown]
# Now step by step. A list can be evaluated when its closing bracket is reached, so the brackets give the order. Watch
# the last column: how many lists are still open, each with values that must not be forgotten.

# %%
for node in sorted(tree.operators, key=lambda node: node.stop):
    values = [argument.value for argument in node.arguments]
    still_open = sum(other.start < node.start and other.stop > node.stop for other in tree.operators)
    print(
        f"token {node.stop - 1:2}: ']' closes {node.name:3} of token {node.start:2}, {node.stop - 1 - node.start:2} back: "
        f"{node.name} of {values} is {node.value}; still open: {still_open}"
    )

# %% [markdown]
# `MED` of 2, 9, 6, 1 sorts to 1, 2, 6, 9; the middle two are 2 and 6, their mean 4. Then 7 + 4 + 5 = 16, and modulo 10
# that is 6, and `MAX` of 4, 3, 6, 0 is 6. You have just done the task. Nobody can do it without keeping, for each list
# that is still open, what was found in it so far: a **stack**. You write that in exercise 2.
#
# ### Drawn from a seed
#
# The Arena's expressions are drawn by chance, and the rule is short. A node is an operator with probability
# 1/4, else a digit; an operator gets two to ten arguments, all equally likely; nodes at level 10 are always digits. An
# expression is kept if it has more than 500 and fewer than 2,000 tokens.
#
# How long is an expression before that last condition? An operator has six arguments on average, and each is an
# operator with probability 1/4. So from level to level the number of operators grows by $6 \cdot \tfrac14 = 1.5$, and
# the expected length $\ell_d$ of a node at level $d$ follows from that of its arguments:
#
# $$
# \ell_{10} = 1, \qquad \ell_d = \tfrac34 \cdot 1 + \tfrac14\,(2 + 6\,\ell_{d+1}) .
# $$
#
# In words: with probability 3/4 a node is one token; otherwise it is an operator, a bracket, and six arguments.

# %%
expected = 1.0
for _ in range(9):
    expected = 0.75 + 0.25 * (2 + 6 * expected)

stream = expressions.Stream(seed=0)
kept = list(itertools.islice(stream, 600))
chance, draws = random.Random("how many are kept"), 3000
survivors = sum(expressions.draw(chance, expressions.Shape()) is not None for _ in range(draws))
print(f"expected length of a draw: {expected:.0f} tokens")
print(f"kept by their length: {100 * survivors / draws:.0f} % of the draws")
print("the first expression begins", expressions.decode(kept[0][0])[:60], "... and has the value", kept[0][1])

# %% [markdown]
# The average draw has some 130 tokens, but three quarters of all draws are a single digit; few are long enough.
# Selecting long ones selects deep ones. The next cell parses six hundred that were kept.
#
# A generator that looks right can be wrong in ways that matter: a probability the wrong way round, a median rounded
# up, an off-by-one in the depth. So we hold its statistics against those of another implementation of the published
# rule (2,000 kept expressions). In the figure, look for bars that leave their reference.

# %%
REFERENCE_LABELS = np.array([16.2, 9.0, 7.1, 8.4, 9.0, 9.4, 7.2, 7.8, 9.1, 16.8])  # % of the values 0 ... 9
REFERENCE_LENGTHS = {5: 537, 25: 707, 50: 937, 75: 1297, 95: 1840}  # percentile -> tokens
REFERENCE_COUNT = 2_000

trees = [parse(np.frombuffer(tokens, dtype=np.uint8)) for tokens, _ in kept]
lengths = np.array([tree.stop for tree in trees])
labels = np.array([tree.value for tree in trees])
levels = np.array([max(node.depth for node in tree.operators) for tree in trees])
roots = collections.Counter(tree.name for tree in trees)

share = 100 * np.bincount(labels, minlength=10) / len(trees)
spread = np.sqrt(REFERENCE_LABELS * (100 - REFERENCE_LABELS) * (1 / len(trees) + 1 / REFERENCE_COUNT))
ours = np.percentile(lengths, list(REFERENCE_LENGTHS))
off = np.abs(ours / list(REFERENCE_LENGTHS.values()) - 1)

fig, (left, middle, right) = plt.subplots(1, 3, figsize=(10.4, 3.4), width_ratios=(1.3, 1.2, 0.8))
left.hist(lengths, bins=range(500, 2001, 100), color=OKABE_ITO["sky"], edgecolor="white")
for length in REFERENCE_LENGTHS.values():
    left.axvline(length, color=OKABE_ITO["vermilion"], linestyle="--", linewidth=1.2)
left.set(xlabel="length (tokens)", ylabel="expressions", title="dashed: reference percentiles")
middle.bar(range(10), share, color=OKABE_ITO["sky"])
middle.errorbar(range(10), REFERENCE_LABELS, 2 * spread, fmt="D", markersize=4, color=OKABE_ITO["vermilion"])
middle.set(xlabel="value of the expression", ylabel="share (%)", xticks=range(10), title="diamonds: reference")
names = ("MIN", "MAX", "MED", "SM")
right.bar(names, [100 * roots[name] / len(trees) for name in names], color=OKABE_ITO["sky"])
right.axhline(25, color=OKABE_ITO["vermilion"], linestyle="--")
right.set(ylabel="share (%)", title="operator at the root")
show(
    fig,
    f"Statistics of {len(trees):,} generated expressions. Lengths pile up just above 500 and thin out to 2,000, median "
    f"{np.median(lengths):.0f}; each percentile shown is within {100 * off.max():.0f} % of its reference. Of the "
    f"values, 0 has a share of {share[0]:.0f} % and 9 of {share[9]:.0f} %, the others {share[1:9].min():.0f} to "
    f"{share[1:9].max():.0f} %. Each root operator has about a quarter.",
)
print(
    "all value shares within 3 standard errors of the reference:",
    bool((np.abs(share - REFERENCE_LABELS) < 3 * spread).all()),
)
quarter = 3 * np.sqrt(0.25 * 0.75 / len(trees))
print(
    "root operators uniform within 3 standard errors:", all(abs(roots[n] / len(trees) - 0.25) < quarter for n in names)
)
print("levels of nested operators:", sorted(set(levels.tolist())))

# %% [markdown]
# Two facts to keep. Every single expression uses all nine levels of nesting: so much of the length comes from depth.
# And the values are not uniform: `MIN` pulls towards 0, `MAX` towards 9. Who always answers with the commonest value
# is right in about one case of six, not one of ten. That is the figure to beat, *majority class*, not chance.
#
# ### How long-range is it?
#
# "Long-range" can be measured. For each argument count the tokens between it and its operator; for each operator the
# tokens to its closing bracket. In the figure, look at where the curves cross 128, the chunk of Mega-chunk: what lies
# to the right can never be inside one chunk together with its operator, and only the EMA can carry anything across.

# %%
CHUNK = 128
arguments = [
    [(a.depth, a.start - node.start) for node in tree.operators for a in node.arguments] for tree in trees[:300]
]
level, distance = np.concatenate(arguments).T
distances, farthest = np.sort(distance), np.array([max(far for _, far in pairs) for pairs in arguments])
brackets = np.sort([node.stop - 1 - node.start for tree in trees[:300] for node in tree.operators])

fig, ax = plt.subplots()
for values, name, colour, style in (
    (distances, "one of its arguments", "blue", "-"),
    (brackets, "its closing bracket", "green", "--"),
):
    beyond = 1 - np.arange(len(values)) / len(values)
    ax.loglog(values, beyond, style, marker="", color=OKABE_ITO[colour], label=f"from an operator to {name}")
ax.axvline(CHUNK, color=OKABE_ITO["vermilion"], linestyle=":", label=f"a chunk of {CHUNK}")
ax.set(xlabel="distance (tokens)", ylabel="share at least so far apart")
ax.legend()
far, never = (distances > CHUNK).mean(), (brackets > CHUNK).mean()
show(
    fig,
    f"Share of arguments, and of closing brackets, that stand at least so many tokens after their operator, both axes "
    f"logarithmic. Half of the arguments begin within {np.median(distances):.0f} tokens and half of the lists end within "
    f"{np.median(brackets):.0f}; the tails fall slowly: {100 * far:.0f} % of the arguments and {100 * never:.0f} % of the "
    f"closing brackets are further than a chunk of {CHUNK} tokens, and the farthest bracket is {brackets[-1]:,} tokens away.",
)
print(f"arguments farther than {CHUNK} tokens from their operator: {100 * far:.1f} %")
print("every expression has some:", bool((farthest > CHUNK).all()))
print(
    "their mean level in the tree:",
    fmt(level[distance > CHUNK].mean()),
    "against",
    fmt(level.mean()),
    "of all arguments",
)

# %% [markdown]
# Most of the work is local: most arguments stand right beside their operator, and a chunk holds many complete lists.
# But each expression also has a few arguments hundreds of tokens away, and they stand near the root, where the answer
# is decided. A few far ones, and one cannot do without them: that is a fair description of long-range dependence, and
# not only in this task.
#
# And which tokens matter? Change one digit at random and see whether the answer changes.

# %%
rng = np.random.default_rng(0)
changed, touched = [], []
for tree in trees[:200]:
    for which in rng.integers(len(tree.digits), size=4):
        digit = (tree.digits[which].value + rng.integers(1, 10)) % 10
        changed.append(with_digit(tree, int(which), int(digit)).value != tree.value)
        touched.append(tree.digits[which].depth)
changed, touched = np.array(changed), np.array(touched)
print(f"of {len(changed):,} changed digits, {changed.sum()} changed the answer: {100 * changed.mean():.1f} %")
assert 0.01 < changed.mean() < 0.015, "the text says: one in eighty, a dozen in a thousand"
print("their mean level in the tree:", fmt(touched[changed].mean(), 2), "against", fmt(touched.mean(), 2), "of all")

# %% [markdown]
# About one digit in eighty matters, and those that do stand high in the tree. The rest disappears: under a `MAX` that
# has a 9 elsewhere, nothing else counts. So what could teach a model the far-away structure comes from a dozen tokens
# in a thousand, and it cannot know which ones without having understood the tree. A panel near the end lets you
# watch changes die.
#
# ## Text: a review, letter by letter
#
# The reviews are those of the Internet Movie Database (Maas et al., 2011). Transformers usually read them as words; the
# Arena gives **bytes**. A review of 700 words becomes a sequence of some four thousand, and the first thing a model has
# to find out is what a word is. Here is one of the sample's:

# %%
review, label = six["text"].train[9]
fig, (words_ax, ids_ax) = plt.subplots(2, 1, figsize=(9.6, 4.0), height_ratios=(1, 1.1))
draw_bytes(words_ax, review)
draw_sequence(ids_ax, review, six["text"].config)
words_ax.set_title(f"for us: {len(as_text(review).split())} words")
ids_ax.set_title(f"for the model: {len(review)} numbers")
show(
    fig,
    f"Above, a made-up review of {len(as_text(review).split())} words; below, the same as {len(review)} numbers between 1 "
    f"and 256, byte + 1. Most lie between 98 and 123, the small letters; the row of points at 33 is the blanks.",
)
print(
    "it begins", review[:12].tolist(), "=", repr(as_text(review[:12])), "and is", six["text"].config.class_names[label]
)
print(
    "letters and blanks make up more than nine tenths:",
    sum(c.isalpha() or c == " " for c in as_text(review)) > 0.9 * len(review),
)

# %% [markdown]
# How much must be put together before anything is known? We let a reader look through a window of a few bytes and judge
# a review by *which* windows occur in it, not where (naive Bayes: each window's log-odds, added up). It learns from the
# sample's training part and is tested on films it has not seen.


# %%
def windows(ids, width):
    """All stretches of so many bytes, each once."""
    return {bytes(ids[i : i + width].tolist()) for i in range(len(ids) - width + 1)} if width > 1 else set(ids.tolist())


def log_odds(task, width):
    """How much each window speaks for label 1: log of its share among those reviews less that among the others."""
    counts, total = [collections.Counter(), collections.Counter()], np.bincount(task.train.labels)
    for ids, label in task.train:
        counts[label].update(windows(ids - 1, width))
    known = counts[0].keys() | counts[1].keys()
    share = [{w: (count[w] + 1) / (n + 2) for w in known} for count, n in zip(counts, total, strict=True)]
    return {w: float(np.log(share[1][w] / share[0][w])) for w in known}


for width in (1, 2, 3, 5):
    odds = log_odds(six["text"], width)
    verdicts = [
        (sum(odds.get(w, 0.0) for w in windows(ids - 1, width)) > 0) == label for ids, label in six["text"].test
    ]
    print(f"windows of {width}: {100 * np.mean(verdicts):.0f} % of the {len(verdicts)} test reviews")

# %% [markdown]
# Single bytes say nothing, and three together say everything: this sample is solved by a list of syllables, order and
# distance play no part. Real reviews are not written by a grammar of ten phrases. But the shape of the problem is the
# same. Something has to turn neighbouring letters into evidence, and something has to add up evidence from anywhere in
# the text. In the next figure, look at how the evidence is spread over the review.

# %%
WIDTH = 5
odds = log_odds(six["text"], WIDTH)


def evidence(ids):
    """The log-odds of the window at each place, repetitions included."""
    ids = (ids - 1).tolist()
    return np.array([odds.get(bytes(ids[i : i + WIDTH]), 0.0) for i in range(len(ids) - WIDTH + 1)])


def telling(ids):
    """Places whose window occurs at least e**2 times as often in one class as in the other."""
    return np.flatnonzero(np.abs(evidence(ids)) > 2)


weight = evidence(review)
fig, ax = plt.subplots(figsize=(9.2, 2.9))
ax.bar(np.arange(len(weight)), weight, width=1.0, color=np.where(weight > 0, OKABE_ITO["blue"], OKABE_ITO["vermilion"]))
ax.set(xlabel="byte", ylabel="log-odds for 'positive'")
between = [np.ptp(telling(ids)) / len(ids) for ids, _ in six["text"].train if len(telling(ids))]
places = telling(review)
show(
    fig,
    f"The same review, the evidence of each window of {WIDTH} bytes at its place: {len(places)} windows, in a few groups "
    f"with long silences between, tell much; the first and the last of them are {np.ptp(places)} of {len(review)} bytes apart.",
)
print("of a review's length, from the first telling window to the last, median:", fmt(np.median(between)))

# %% [markdown]
# So Text asks for two ranges: five bytes or so to read a word, and the whole review to weigh it. A **mean over the
# sequence** can do the second, as far as opinions simply add up. It cannot tell when one sentence takes back another:
# "some scenes are slow, but …".
#
# ## Retrieval: two texts that never see each other
#
# Does one paper cite the other? Both are read by the same encoder, **each by itself**; only two vectors meet at the end,
# in a small classifier. Cross-attention between the two would be easy, and is not allowed: the task asks whether a
# model can press four thousand bytes into one vector that still knows what the text is about.
#
# The official pairs come in an archive of eight gigabytes. The sample has a stand-in: are two reviews about the same
# film? In the figure, each axis is one text, and a point says that the same six bytes stand at both places. Look for
# slanted strokes: passages that both share.


# %%
def matches(first, second, width=6):
    """Places (i, j) where both texts have the same `width` bytes."""
    places = collections.defaultdict(list)
    for j in range(len(second) - width + 1):
        places[bytes((second[j : j + width] - 1).tolist())].append(j)
    found = [(i, j) for i in range(len(first) - width + 1) for j in places[bytes((first[i : i + width] - 1).tolist())]]
    return np.array(found).reshape(-1, 2)


pairs = six["retrieval"]
same = next(i for i in range(len(pairs.train)) if pairs.train.labels[i] == 1)
other = next(i for i in range(len(pairs.train)) if pairs.train.labels[i] == 0)
fig, axes = plt.subplots(1, 2, figsize=(9.0, 4.2))
shared = []
for ax, which in zip(axes, (same, other), strict=True):
    (first, second), label = pairs.train[which]
    found = matches(first, second)
    shared.append(len(found))
    ax.plot(*found.T, ".", markersize=2.5, markevery=1, color=OKABE_ITO["blue" if label else "vermilion"])
    ax.set(xlabel="byte of the first text", ylabel="byte of the second", xlim=(0, len(first)), ylim=(0, len(second)))
    ax.set_title(pairs.config.class_names[label])
show(
    fig,
    f"Dot plots of two pairs of texts: a point where the same six bytes stand in both. The pair about one film has "
    f"{shared[0]} such places and the pair about two films {shared[1]}; both show slanted strokes, shared phrases, at "
    f"places that have nothing to do with each other in the two texts.",
)

# %% [markdown]
# Shared phrases are in both pictures, because reviewers repeat each other. What counts is *which* are shared: a name, not
# a turn of phrase. A simple reader adds up the rarity of the words that both texts have and compares with a threshold.


# %%
def vocabulary(ids):
    return set(re.findall("[a-z]+", as_text(ids).lower()))


documents = [vocabulary(pairs.train.documents[i][0]) for i in np.unique(pairs.train.pairs)]
number_with = collections.Counter(word for document in documents for word in document)


def rarity_shared(first, second):
    return sum(
        np.log(len(documents) / number_with[w]) for w in vocabulary(first) & vocabulary(second) if number_with[w]
    )


scores = np.array([rarity_shared(*both) for both, _ in pairs.train])
threshold = max(np.unique(scores), key=lambda c: ((scores >= c) == pairs.train.labels).mean())
right = [(rarity_shared(*both) >= threshold) == label for both, label in pairs.test]
print(f"rare words shared: {100 * np.mean(right):.0f} % of the {len(right)} test pairs, where chance is 50 %")
width = models.configure("mega", "retrieval").dim
print(
    f"what meets in Mega's published size: 2 x {width} numbers, made from up to 2 x {published.BENCHMARKS['retrieval'].length:,} bytes"
)

# %% [markdown]
# The reader compares *all* words of one text with all of the other. The two towers cannot: each must decide what is worth
# keeping before it knows what it will be compared with. That is the difficulty here, more than the length. The distance
# from a name in one text to the same name in the other is, for the model, the way through both encoders.
#
# ## Image: where is up?
#
# CIFAR-10's small photographs in grey, read row by row: 1,024 numbers, from dark to bright. The sample has drawn shapes in
# their place. On the left you see at once what it is; on the right is all that a model sees. The third panel measures how
# alike two pixels are that stand so many steps apart. Look at where it rises again.

# %%
pixels = torch.stack([six["image"].train[i][0] for i in range(len(six["image"].train))])  # (pictures, 1024)
contrast = pixels - pixels.mean(1, keepdim=True)
variance = contrast.square().mean()
alike = np.array([(contrast[:, k:] * contrast[:, :-k]).mean() / variance for k in range(1, 101)])  # lags 1 to 100

shown = next(i for i in range(len(pixels)) if six["image"].config.class_names[six["image"].train.labels[i]] == "cross")
fig, (seen, read, lags) = plt.subplots(1, 3, figsize=(10.6, 3.1), width_ratios=(0.8, 1.3, 1.3))
draw_picture(seen, pixels[shown], (32, 32))
seen.set_title("for us")
draw_sequence(read, pixels[shown], six["image"].config)
read.set_title("for the model")
lags.plot(range(1, 101), alike, marker="", color=OKABE_ITO["blue"])
for row in (32, 64, 96):
    lags.axvline(row, color=OKABE_ITO["vermilion"], linestyle=":", linewidth=1.2)
lags.set(xlabel="steps apart", ylabel="correlation", title="dotted: one row, two, three")
show(
    fig,
    f"A drawn cross as a picture of 32 by 32, and as a sequence of 1,024 numbers in which it is a row of spikes. Right, "
    f"the correlation of two pixels against their distance in steps: {fmt(alike[0])} for neighbours, falling to "
    f"{fmt(alike[15])} at 16 steps, and back to {fmt(alike[31])} at 32 steps, one row below.",
)
print("the pixel one row below is as telling as the neighbour:", bool(alike[31] > 0.9 * alike[0]))
print("the pixel half a row on tells little:", bool(alike[15] < 0.3 * alike[0]))

# %% [markdown]
# In a picture a pixel has four neighbours. In the sequence two of them are one step away and the other two thirty-two, and
# nothing says so: a model must learn the width of the picture from the data. An EMA that decays smoothly blurs along the
# row; a kernel that *oscillates* with a period of 32 steps, as S4's can (notebook 02), looks straight down a column. And
# a line from top to bottom spans all 1,024 steps.
#
# ## Pathfinder: follow the line
#
# Two dots, some dashed lines. Do the dots lie on the ends of *one* line? The stimulus is older than the Arena (Linsley et
# al., 2018) and was made so that nothing but following a line helps. Below are a yes and a no, with the paths that the
# generator recorded when it drew them. In the lower row, look at where a path goes when it is written as steps.

# %%
pictures = pathfinder.sample(32)


def steps_of(paths, size):
    """Places in the sequence of points (row, column): int64 (..., points)."""
    return paths[..., 0].astype(int) * size + paths[..., 1]


def clearance(paths):
    """How near the two paths of a picture come to each other, in pixels."""
    return np.linalg.norm(paths[0][:, None].astype(int) - paths[1][None], axis=-1).min()


gaps = np.array([clearance(paths) for paths in pictures.paths])  # we show pictures that are easy to see
yes, no = (int(np.where(pictures.labels == label, gaps, 0).argmax()) for label in (1, 0))
fig, axes = plt.subplots(2, 3, figsize=(8.6, 5.2), height_ratios=(1.25, 1))
for (above, under), which, title in zip(axes.T, (yes, no), ("yes: one path", "no: two paths"), strict=False):
    image = torch.from_numpy(pictures.images[which] / 255.0)
    draw_picture(above, image, (32, 32))
    draw_paths(above, pictures.paths[which].astype(int), pictures.dots[which].astype(int))
    above.set_title(title)
    for path, name, style in zip(pictures.paths[which], ("orange", "sky"), ("-", "--"), strict=True):
        under.plot(steps_of(path, 32), style, color=OKABE_ITO[name], marker=".")
    under.set(xlabel="stroke of the path", ylabel="place (step)", ylim=(0, 1024))
bare, flat = axes[:, 2]
draw_picture(bare, torch.from_numpy(pictures.images[yes] / 255.0), (32, 32))
bare.set_title("the yes, as it is given")
draw_sequence(flat, torch.from_numpy(pictures.images[yes] / 255.0), six["pathfinder"].config)

places = steps_of(pictures.paths, 32)  # (pictures, 2, points)
jump, span = np.abs(np.diff(places)), np.ptp(places, axis=-1)
show(
    fig,
    f"Two Pathfinder pictures with their paths traced: in the first both dots lie on one path, in the second on two. "
    f"Below, the place in the sequence of each stroke's end along the path: it wanders up and down over hundreds of "
    f"steps. Over all {len(pictures.labels)} pictures of the sample the next stroke is {np.median(jump):.0f} steps away at "
    f"the median, and a path covers {np.median(span):.0f} of 1,024 steps. Right, the same picture as it is given.",
)
print("strokes in a path:", pictures.paths.shape[2] - 1)
print(
    "median steps from one stroke's end to the next:",
    f"{np.median(jump):.0f}",
    "of a path from end to end:",
    f"{np.median(span):.0f}",
)

# %% [markdown]
# Fourteen short strokes with gaps between, and other lines around: to answer, one has to go from stroke to stroke, and
# each hop is a jump of some rows up or down. Fourteen times, and a single wrong hop gives the other answer. No one
# place in the picture tells anything.
#
# Is there a shortcut? The most obvious: dots on one path might be nearer to each other, or farther. Take the best
# threshold there is, chosen with the answers in sight:


# %%
def best_threshold(distance, label):
    """Accuracy of the better of 'below c' and 'not below c', for the best c: an upper bound for any such rule."""
    return max(max(np.mean((distance < c) == label), np.mean((distance >= c) == label)) for c in np.unique(distance))


def dots_apart(pictures):
    return np.hypot(*(pictures.dots[:, 0].astype(int) - pictures.dots[:, 1].astype(int)).T)


def ink(pictures):
    return pictures.images.astype(float).mean(1)


for name, measured in (("distance between the dots", dots_apart(pictures)), ("amount of ink", ink(pictures))):
    print(f"best rule by the {name}: {100 * best_threshold(measured, pictures.labels):.0f} %")
luck = 50 + 100 / np.sqrt(len(pictures.labels))  # two standard errors above one half
print(f"two standard errors above chance on {len(pictures.labels)} pictures: {luck:.0f} %")

# %% [markdown]
# Hardly better than a coin, although the threshold was chosen after the fact, which alone lifts it above one half. This is
# why a Pathfinder score means more than most: between 50 % and a path followed there is little to earn.
#
# ## Path-X: sixteen thousand steps
#
# The same task at 128 × 128 pixels. For a person the picture is, if anything, easier. For a model the sequence is
# sixteen times longer. Look at the step axis in the middle panel.

# %%
large = pathfinder.sample(128)
places_x = steps_of(large.paths, 128)
jump_x, span_x = np.abs(np.diff(places_x)), np.ptp(places_x, axis=-1)
which = int(np.flatnonzero(large.labels == 1)[0])
on = next(j for j in (0, 1) if (large.paths[which, j, 0] == large.dots[which, 0]).all())  # the path with the dots

fig, (seen, along, read) = plt.subplots(1, 3, figsize=(10.6, 3.3), width_ratios=(1, 1, 1.4))
image = torch.from_numpy(large.images[which] / 255.0)
draw_picture(seen, image, (128, 128))
draw_paths(seen, large.paths[which].astype(int), large.dots[which].astype(int))
along.plot(places_x[which, on], color=OKABE_ITO["orange" if on == 0 else "sky"], marker=".")
along.axhspan(places_x[which, on, 0], places_x[which, on, 0] + CHUNK, color=OKABE_ITO["vermilion"])
along.set(xlabel="stroke of the path", ylabel="place (step)", ylim=(0, 128 * 128), title=f"red: a chunk of {CHUNK}")
draw_sequence(read, image, six["pathx"].config)
show(
    fig,
    f"A Path-X picture whose dots lie on one path, that path's places in the sequence, and the sequence. From one "
    f"stroke to the next it is {np.median(jump_x):.0f} steps at the median over the sample, and a path covers "
    f"{np.median(span_x):,.0f} of 16,384 steps; a chunk of {CHUNK} is a single row, a hairline in the middle panel.",
)
L = 128 * 128
print(f"steps from stroke to stroke: {np.median(jump_x) / np.median(jump):.0f} times Pathfinder's at the median")
print(
    f"attention weights of one head in one layer: {L**2:,}, in float32 {L**2 * 4 / 2**30:.0f} GiB; Pathfinder {1024**2 * 4 / 2**20:.0f} MiB"
)
print(
    f"strokes whose next one lies within {CHUNK} steps: {100 * (jump_x < CHUNK).mean():.0f} %; in Pathfinder {100 * (jump < CHUNK).mean():.0f} %"
)
print(
    f"paths that span more than 4,096 steps, the chunk that Mega-chunk was given here: {100 * (span_x > 4096).mean():.0f} %"
)

# %% [markdown]
# What do 16,384 steps mean? As sound at 16 kHz they are one second. As text, six pages. For full attention they are a
# quarter of a billion weights for each head, layer and picture; for a chunk of 128, a world of single rows that never see
# each other. Mega-chunk was given chunks of 4,096 here, and still most paths do not fit into one. And for
# gradient descent they are a signal that says "right" or "wrong" once, at the end of a chain of fourteen hops of several
# rows each. Every model of the Arena's own paper failed here.
#
# ## Side by side
#
# Now all six in one figure. The grey bar is the sequence. The left mark is how far the *nearest* things are apart that
# have to be put together, the right mark how far the farthest; both medians over the samples. Compare the marks with
# the dotted line, a chunk of 128.


# %%
def spread(ids):
    return np.ptp(telling(ids)) if len(telling(ids)) else 0


reach = {  # task -> typical length, near, far
    "listops": (np.median(lengths), np.median(distances), np.median(farthest)),
    "text": (
        np.median(six["text"].train.lengths),
        np.median([len(word) for ids, _ in six["text"].train for word in as_text(ids).split()]),
        np.median([spread(ids) for ids, _ in six["text"].train]),
    ),
    "retrieval": (
        np.median([len(a) + len(b) for (a, b), _ in pairs.train]),
        np.median([len(word) for (a, _), _ in pairs.train for word in as_text(a).split()]),
        np.median([len(a) + len(b) for (a, b), _ in pairs.train]),
    ),
    "image": (1024, 32, 31 * 32),
    "pathfinder": (1024, np.median(jump), np.median(span)),
    "pathx": (L, np.median(jump_x), np.median(span_x)),
}
WHAT = {
    "listops": "operator to argument · to its farthest",
    "text": "a word · first to last telling word (sample)",
    "retrieval": "a word · through both texts (sample)",
    "image": "one row down · first row to last",
    "pathfinder": "stroke to stroke · whole path",
    "pathx": "stroke to stroke · whole path",
}
fig, ax = plt.subplots(figsize=(9.4, 3.9))
for row, (task, (length, near, distant)) in enumerate(reach.items()):
    ax.barh(row, length, color="#DDDDD8", height=0.62)
    ax.plot([near, distant], [row, row], color=OKABE_ITO["blue"], marker="", linewidth=2)
    ax.plot(near, row, "o", color=OKABE_ITO["blue"], markersize=8)
    ax.plot(distant, row, "D", color=OKABE_ITO["vermilion"], markersize=8)
    ax.text(24_000, row, WHAT[task], va="center", fontsize=8.5)
ax.axvline(CHUNK, color=OKABE_ITO["black"], linestyle=":", linewidth=1.2)
ax.set(xscale="log", xlim=(1, 20_000), xlabel="steps", yticks=range(6))
ax.set_yticklabels(TITLES)
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
said = "; ".join(
    f"{title} {fmt(near)} and {distant:,.0f}" for title, (_, near, distant) in zip(TITLES, reach.values(), strict=True)
)
show(
    fig,
    f"For each task the length of a sequence as a grey bar, the nearest distance that matters as a disc and the farthest "
    f"as a diamond, in steps on a logarithmic axis. Near and far: {said}. In all six the farthest is beyond a chunk of {CHUNK}; "
    f"only on Path-X the nearest is, too.",
)
assert all(distant > CHUNK for _, _, distant in reach.values())
assert [task for task, (_, near, _) in reach.items() if near > CHUNK] == ["pathx"]

# %% [markdown]
# This is one answer to what "long-range" means: not that the input is long, but that the near mark and the far mark are
# both needed. A mechanism that sees only near things (a chunk, a window, a short kernel) misses the right mark; one that
# averages over everything loses the left one. Most systems of notebook 09 put two mechanisms together, one for
# each. And Path-X is by itself: there even the *nearest* hop is out of a small chunk's sight.
#
# ## What does a score prove?
#
# A model can do well without doing what we hoped. Before a score means anything, one asks what a reader gets who
# takes a shortcut. We ask it of ListOps, where the genuine task is at hand. Our reader knows the tree, but only its top:
# the root operator, and `levels` levels below it. Where it may not look further down it guesses: it takes the value of an
# operator there at random from the values that such operators have in other expressions, evaluates the rest correctly,
# does so a hundred times, and gives the commonest answer.

# %%
half = len(trees) // 2
seen, unseen = trees[:half], trees[half:]
values_of = collections.defaultdict(list)
for tree in seen:
    for node in tree.operators:
        values_of[node.operator].append(node.value)
values_of = {operator: np.array(values) for operator, values in values_of.items()}
DRAWS = 100


def guess(node, levels, rng):
    """(DRAWS,) possible values of a node for a reader who may look `levels` levels below it."""
    if not node.operator:
        return np.full(DRAWS, node.value)
    if levels == 0:
        return rng.choice(values_of[node.operator], DRAWS)
    arguments = np.stack([guess(argument, levels - 1, rng) for argument in node.arguments])  # (arguments, DRAWS)
    if node.operator == expressions.MIN:
        return arguments.min(0)
    if node.operator == expressions.MAX:
        return arguments.max(0)
    if node.operator == expressions.SM:
        return arguments.sum(0) % 10
    ordered, count = np.sort(arguments, axis=0), len(arguments)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) // 2


def shallow_accuracy(levels):
    rng = np.random.default_rng(levels)
    answers = [np.bincount(guess(tree, levels, rng), minlength=10).argmax() for tree in unseen]
    return 100 * np.mean([answer == tree.value for answer, tree in zip(answers, unseen, strict=True)])


reading = list(range(10))
accuracy = np.array([shallow_accuracy(k) for k in reading])
commonest = collections.Counter(tree.value for tree in seen).most_common(1)[0][0]
majority = 100 * np.mean([tree.value == commonest for tree in unseen])
error = np.sqrt(accuracy * (100 - accuracy) / len(unseen))  # standard error, in points

# %% [markdown]
# In the figure, look at where the published scores meet the curve.

# %%
fig, ax = plt.subplots(figsize=(9.6, 4.0))
ax.errorbar(reading, accuracy, 2 * error, capsize=3, label="reader of the top of the tree\n(two standard errors)")
for model, style in (("mega", "-"), ("mega-chunk", "--"), ("Transformer (Arena)", "-.")):
    ax.axhline(
        PUBLISHED[model][0], color=OKABE_ITO["vermilion"], linestyle=style, linewidth=1.3, label=f"{model}, published"
    )
ax.axhline(majority, color="#8A8A86", linestyle=":", label="majority class")
ax.set(xlabel="levels read below the root operator", ylabel="accuracy (%)", ylim=(0, 102), xticks=reading)
ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
transformer = PUBLISHED["Transformer (Arena)"][0]
show(
    fig,
    f"Accuracy of a reader that knows only the top of the tree, on {len(unseen)} expressions. The root operator alone "
    f"gives {accuracy[0]:.0f} %, the majority class {majority:.0f} %; one level more {accuracy[1]:.0f} %, two "
    f"{accuracy[2]:.0f} %, all nine {accuracy[9]:.0f} %. The published Transformer lies at the root operator's "
    f"accuracy, Mega between one level and two.",
)
print("the root operator alone beats the majority class:", bool(accuracy[0] - 2 * error[0] > majority))
print(
    "the published Transformer is within two standard errors of it:",
    bool(abs(accuracy[0] - transformer) < 2 * error[0]),
)
print("Mega's 63.14 lies between the readers of one and of two levels:", bool(accuracy[1] < mega[0] < accuracy[2]))

# %% [markdown]
# The root operator is the **first token**. Who reads one token of a thousand, and knows which values the four
# operators tend to take, is as good as the published Transformer. That does not prove that the Transformer reads
# nothing else; it does say that its score is no evidence of anything more. And the best figure in the table
# corresponds to understanding the first level or two of nine. It is a real achievement, since at the first levels the
# arguments are far away, and it leaves the greater part of the task unsolved. Rank such scores by what they prove,
# not by their distance from 100.
#
# ## From expressions to batches
#
# Expressions have different lengths, and a tensor is a rectangle. `tasks.collate` pads on the right with 0 and hands
# over a **mask**, `True` where a token is real. The mask is part of the data from here on: no model of the course lets
# padding touch the result.

# %%
scratch = tempfile.TemporaryDirectory()
official = tasks.load("listops", root=scratch.name, train=990, valid=5, test=5, progress=False)
print(official.config.source)
batch = tasks.collate([official.train[i] for i in range(16)])
print(
    "x",
    tuple(batch.x.shape),
    batch.x.dtype,
    " mask",
    tuple(batch.mask.shape),
    batch.mask.dtype,
    " label",
    tuple(batch.label.shape),
)


def padding(groups):
    """Which share of all positions is padding when these groups of indices are batches."""
    filled = sum(official.train.lengths[group].sum() for group in groups)
    return 1 - filled / sum(len(group) * official.train.lengths[group].max() for group in groups)


as_they_come = batches.epoch_batches(official.train.lengths, 16, seed=0, epoch=0, bucket=False)
bucketed = batches.epoch_batches(official.train.lengths, 16, seed=0, epoch=0, bucket=True)
wasted, saved = padding(as_they_come), padding(bucketed)

fig, axes = plt.subplots(1, 2, figsize=(9.2, 2.9), sharex=True)
for ax, group, title in zip(axes, (as_they_come[3], bucketed[3]), ("drawn at random", "of like length"), strict=True):
    mask = tasks.collate([official.train[int(i)] for i in group]).mask
    wide = torch.zeros(16, 2000)
    wide[:, : mask.shape[1]] = 0.55
    wide[:, : mask.shape[1]][mask] = 1
    ax.imshow(wide, aspect="auto", vmin=0, vmax=1)
    ax.set(xlabel="position (tokens)", ylabel="expression in the batch", yticks=(0, 5, 10, 15), title=title)
    ax.grid(False)
show(
    fig,
    f"The masks of two batches of 16 expressions; yellow is real, grey padding, dark blue outside the tensor. Drawn at "
    f"random, the batch is as wide as its longest member, and over an epoch {100 * wasted:.0f} % of all positions are padding. With "
    f"expressions of like length together it is {100 * saved:.0f} %.",
)

# %% [markdown]
# Padding costs time and memory, for attention even quadratically. Putting expressions of like length together saves
# nearly all of it; `training` does so and still mixes the groups anew in each epoch.
#
# Saving padding is a matter of speed. That padding *changes nothing* is a matter of being right, and has to be tested:
# the logits of an expression alone must be the logits it gets in a batch.

# %%
torch.manual_seed(0)
small_mega = dict(dim=32, layers=2, z_dim=16, v_dim=64, ffn_dim=64, head_dim=64, chunk=16, dropout=0.0)
model = models.build("mega-chunk", official.config, **small_mega).eval()
with torch.no_grad():
    together = model(batch.x, batch.mask)  # (16, 10)
    alone = torch.cat([model(official.train[i][0].unsqueeze(0)) for i in range(16)])
print("difference between alone and in a padded batch:", below((alone - together).abs().max(), 1e-4))
unmasked = model(batch.x, torch.ones_like(batch.mask))
print("without the mask it is larger than 0.01:", bool((unmasked - alone).abs().max() > 0.01))

# %% [markdown]
# ## Seven models, in miniature
#
# Now every model of notebook 09 learns something before your eyes: the course's small sizes (those of the `laptop`
# recipe below) on a small problem. To fit into seconds we change the data, not the language: the same grammar and
# operators, but fewer than 30 tokens and at most two nested operators. So this is *not* the Arena's task, and its accuracy
# must never stand in the table above; the loaded task says so itself.
#
# Training is a loop of six lines. Whatever else `longseq_tutorial.train` does (checkpoints, several GPUs, validation,
# records) is wrapped around these. On a GPU the same cell makes ten times as many updates.

# %%
short = tasks.load(
    "listops",
    root=scratch.name,
    train=4000,
    valid=1,
    test=1,
    min_length=4,
    max_length=30,
    max_depth=3,
    progress=False,
)
print(short.config.source)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COMPARED = 40  # updates that every machine makes, and that are compared
UPDATES = 10 * COMPARED if DEVICE.type == "cuda" else COMPARED


def miniature(name):
    """The loss of each update of a model of the laptop recipe's size, on short expressions: (UPDATES,)."""
    recipe = recipes.get("listops", name, "laptop")
    torch.manual_seed(0)
    model = models.build(name, short.config, **recipe.overrides).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3 * recipe.lr, betas=recipe.betas)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: min(1.0, (update + 1) / 10))
    losses = []
    for (batch,) in batches.training_batches(short, batch=32, bucket=False, seed=0, stop=UPDATES):
        x, mask, label = batches.to_device(batch, DEVICE)
        loss = F.cross_entropy(model(x, mask), label) + models.auxiliary_loss(model)  # a codebook asks for something
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        losses.append(loss.item())
    size = sum(p.numel() for p in model.parameters())
    print(f"{name:12}{size:8,} parameters; the loss falls:", np.mean(losses[-10:]) < np.mean(losses[:10]))
    return np.array(losses)


curves = {name: miniature(name) for name in ("transformer", "fastrpb")}

# %% [markdown]
# The first two have attention alone: the Transformer's softmax, with fixed waves for positions added to the tokens, and
# the linear attention of FastRPB with a learned bias for each distance. Next the two Megas, whose EMA runs before
# attention looks.

# %%
curves |= {name: miniature(name) for name in ("mega", "mega-chunk")}

# %% [markdown]
# SeqBoat computes attention only where its configurator asks for it.

# %%
curves |= {"seqboat": miniature("seqboat")}

# %% [markdown]
# SPADE has S4 beside the attention of its bottom layer.

# %%
curves |= {"spade": miniature("spade")}

# %% [markdown]
# And LongVQ, in our reconstruction, attends to a codebook.

# %%
curves |= {"longvq": miniature("longvq")}

# %% [markdown]
# Two lines to hold the curves against. Who knows only how often each value occurs has the **entropy** of the values as
# its loss. Who knows the first token, the root operator, has the mean entropy of the values given it. In the figure,
# look at which curves get below the first line within forty updates, and whether any reaches the second.


# %%
def entropy(values):
    share = np.bincount(values, minlength=10) / len(values)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


first = np.array([int(tokens[0]) for tokens, _ in short.train])
blind = entropy(short.train.labels)
first_token = sum((first == t).mean() * entropy(short.train.labels[first == t]) for t in np.unique(first))

fig, ax = plt.subplots(figsize=(8.2, 4.2))
for name in models.NAMES:
    losses, (colour, marker) = curves[name], results.STYLE[name]
    smooth = np.convolve(losses, np.ones(8) / 8, mode="valid")  # means of eight updates
    ax.plot(np.arange(8, len(losses) + 1), smooth, color=colour, marker=marker, label=name)
ax.axhline(blind, color="#8A8A86", linestyle=":", label="shares of the values only")
ax.axhline(first_token, color="#8A8A86", linestyle="--", label="first token only")
ax.set(xlabel="update", ylabel="training loss (nats, mean of 8 updates)")
ax.legend(ncols=2, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
end = {name: losses[COMPARED - 10 : COMPARED].mean() for name, losses in curves.items()}
learning = [name for name in models.NAMES if end[name] < blind - 0.05]
show(
    fig,
    f"Training loss of seven models over the first updates on short expressions. The loss of knowing only the values' "
    f"shares is {blind:.2f}, that of the first token {first_token:.2f}. After {COMPARED} updates clearly below the "
    f"former: {', '.join(learning)}.",
)
print("clearly below the shares of the values:", ", ".join(learning))
print("the Transformer is the last to learn something:", max(end, key=end.get) == "transformer")
assert min(end.values()) > first_token, "the text says: none has reached the second line after forty updates"

# %% [markdown]
# None has reached the second line after forty updates. They are a race's first metres, and what they show is only who
# starts at once. Models in which neighbours are
# mixed before anything is compared (an EMA, S4), or weighted by their distance, begin to read within seconds. The
# Transformer knows positions only as vectors added to its tokens, and must first learn to use them. That is no verdict: the learning rates are the
# recipes' tripled, one seed was drawn, and the real task begins where this one ends.
#
# ## Records of real runs
#
# The runs below took minutes, not seconds: the `laptop` recipe, on a CPU, for the models on two tasks. **ListOps** with
# expressions of 50 to 200 tokens, and **Text** with the first 1,000 bytes of real reviews. Each run left a record in
# `results/`, and `longseq_tutorial.results` makes tables of records. The same table in a terminal:
# `python -m longseq_tutorial.results`.

# %%
everything = results.records([ROOT / "results"])
runs = [run for run in everything if run.recipe["name"] == "laptop" and run.task["name"] in ("listops", "text")]
rows = results.summary(runs)
print(
    results.table(rows) if rows else "No run of the laptop recipe has been recorded yet: the commands below make one."
)

# %% [markdown]
# Read the notes before the numbers. The gap to the published figure stands in parentheses, because it is **no
# comparison**: shorter sequences are another task, and for ListOps an easier one, so a gap can even come out positive.
# For SeqBoat, LongVQ, FastRPB and SPADE there is nothing to compare with: we know of no published figure that we could
# check, and print none from memory.
#
# What *can* be compared is the seven with each other: same data, same number of updates, the same width, though not the
# same number of parameters (column M param). In the figure, look at the shape first: who learns early, who late, and
# who was still rising when the budget was spent. At the left three readers without any nesting are drawn as lines. One
# names the commonest value; one knows the first token; and one is linear: for each first token it adds up evidence from
# the two tokens behind it, the last digit or bracket inside, and how often each token occurs, wherever that is.


# %%
def without_nesting(x):
    """What the linear reader sees of tokens (L,): counts, and tokens at three places, in a block for the first token."""
    seen = F.one_hot(x.long(), 16).double()  # (L, 16)
    known = torch.cat([seen.sum(0) / 10, seen[1], seen[2], seen[-2], torch.ones(1)])
    return torch.outer(seen[0, 11:15], known).flatten()  # 11 to 14 are the operators


def simple_readers(data):
    """Test accuracy in %: the best answer for the first token; the linear reader; the commonest value."""
    few = {**data, "valid": 1, "train": 2999}  # a seed's expressions are dealt out beginning with the test part
    task = tasks.load("listops", root=scratch.name, **few, progress=False)
    learned, values = task.train, task.train.labels.astype(int)
    first = np.array([int(tokens[0]) for tokens, _ in learned])
    best = {token: np.bincount(values[first == token]).argmax() for token in np.unique(first)}
    X, tested = (torch.stack([without_nesting(x) for x, _ in part]) for part in (learned, task.test))
    ridge = X.T @ X + 10 * torch.eye(X.shape[1], dtype=X.dtype)  # least squares, and weights that stay small
    scores = tested @ torch.linalg.solve(ridge, X.T @ F.one_hot(torch.from_numpy(values), 10).double())
    answers = [best[int(tokens[0])] for tokens, _ in task.test], scores.argmax(1).numpy(), np.bincount(values).argmax()
    return [100 * np.mean(answer == task.test.labels) for answer in answers]


LISTOPS = dict(recipes.get("listops", "mega", "laptop").data)
first_only, linear, commonest_only = simple_readers(LISTOPS)
LINES = {
    "listops": {"linear, no nesting": linear, "first token only": first_only, "commonest value": commonest_only},
    "text": {"chance": 50.0},
}
fig, axes = plt.subplots(1, 2, figsize=(10.4, 4.4))
for ax, (task, lines) in zip(axes, LINES.items(), strict=True):
    guides = {}
    for run in sorted((run for run in runs if run.task["name"] == task), key=lambda run: models.NAMES.index(run.model)):
        measured = [row for row in run.history if row["valid"]]
        colour, marker = results.STYLE[run.model]
        ax.plot(
            [row["update"] for row in measured], [100 * row["valid"]["accuracy"] for row in measured],
            color=colour, marker=marker, label=run.model,
        )  # fmt: skip
    for (name, height), style in zip(lines.items(), ("-.", "--", ":")[-len(lines) :], strict=True):
        guides[name] = ax.axhline(height, color="#8A8A86", linestyle=style)
    ax.legend(guides.values(), guides.keys(), loc="lower right", fontsize=9)
    ax.set(xlabel="update", ylabel="validation accuracy (%)", title=f"{task}, laptop recipe")
entries = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
if entries:
    fig.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=7, fontsize=9)
final = {task: {row.model: row.accuracy for row in rows if row.task == task} for task in LINES}
said = [
    f"{task}: test accuracy at the end " + ", ".join(f"{model} {accuracy:.1f} %" for model, accuracy in known.items())
    for task, known in final.items()
    if known
]
show(
    fig,
    f"Validation accuracy against updates of the laptop runs, left ListOps with short expressions, right Text with 1,000 "
    f"bytes. On ListOps the first token alone gives {first_only:.0f} %, the linear reader {linear:.0f} % and the commonest "
    f"value {commonest_only:.0f} %. {'. '.join(said) or 'No run is recorded yet'}.",
)
print("validation accuracy, how it changed in the last third of the updates, in points:")
for task in LINES:
    risen = []
    for run in sorted((run for run in runs if run.task["name"] == task), key=lambda run: models.NAMES.index(run.model)):
        measured = [(row["update"], 100 * row["valid"]["accuracy"]) for row in run.history if row["valid"]]
        before = [reached for update, reached in measured if update <= 2 / 3 * run.updates][-1]
        risen.append(f"{run.model} {measured[-1][1] - before:+.1f}")
    print(f"{task}: {', '.join(risen) or 'no run is recorded yet'}")

# %% [markdown]
# On ListOps the curves have lain flat for the last third, to the two points or so by which five hundred expressions
# waver, near the line of the first token. On Text all but Mega-chunk were still rising when the budget was spent.
#
# Which differences are differences? The test part is finite: of $n$ sequences, a share $p$ right has a standard error of
# $\sqrt{p(1-p)/n}$, and the difference of two such shares the root of the sum of the squares. The next cell puts the models
# in order and says, for each, whether it is told apart from the best one by more than two standard errors. (Another
# seed moves a result, too, and two standard errors of the test part do not cover that: mind the table's column of seeds.)

# %%
for task in LINES:
    ranked = sorted((row for row in rows if row.task == task), key=lambda row: -row.accuracy)
    conditions = {(row.data, row.trained, row.tested, row.updates, row.steps) for row in ranked}
    print(f"{task}: the same data and number of updates for all: {len(conditions) <= 1}")
    for row in ranked:
        apart = ranked[0].accuracy - row.accuracy > 2 * np.hypot(ranked[0].sampling, row.sampling)
        verdict = "the best" if row is ranked[0] else "behind the best" if apart else "not told apart from the best"
        if task == "listops":
            more = row.accuracy - 2 * row.sampling > first_only
            verdict += "; above the reader of the first token" if more else "; NOT above the reader of the first token"
        print(f"{task:8} {row.model:12} {row.accuracy:5.1f} ± {row.sampling:.1f} %  {verdict}")
best = max((row.accuracy - 2 * row.sampling for row in rows if row.task == "listops"), default=0)
print(f"listops: the linear reader, without nesting, gets {linear:.0f} %; any model above that by more:", best > linear)
missing = {(task, name) for task in LINES for name in models.NAMES} - {(row.task, row.model) for row in rows}
print("not run yet:", ", ".join(f"{task} with {name}" for task, name in sorted(missing)) or "nothing")

# %% [markdown]
# Hold the ListOps rows against the reader of the first token, not against chance: what lies below that line shows
# nothing more than the root operator. What lies above it need not be nesting: the linear reader gets as much on this
# test as our best model, from the first three tokens, the last and mere counts. No row shows that a tree was
# understood. And keep apart what the record supports from what it does not. It says: *at this size, in this many
# updates, on this data, with these seeds, these models came out so*. It does not say which mechanism is better on the
# Arena: rates were chosen by family and not tuned for each model, and a model that learns slowly may end higher.
#
# ## From here to the published conditions
#
# Three recipes lead from a laptop to the paper: `laptop` (a quarter of an hour on two cores at most), `gpu-30min` (one
# data-centre GPU, the published data, a fraction of the published budget) and `paper` (the published settings, where
# they are known). What changes between them, for Mega-chunk on ListOps:

# %%
ladder = [recipes.get("listops", "mega-chunk", name) for name in ("laptop", "gpu-30min", "paper")]
print(f"{'':16}" + "".join(f"{recipe.name:>12}" for recipe in ladder))
for field in (
    "updates",
    "epochs",
    "batch",
    "lr",
    "warmup",
    "schedule",
    "weight_decay",
    "precision",
    "compile",
    "select",
):
    print(
        f"{field:16}"
        + "".join(
            f"{format(value, '.4g') if isinstance(value := getattr(recipe, field), float) else value!s:>12}"
            for recipe in ladder
        )
    )
for field in ("layers", "dim", "z_dim", "v_dim", "n", "chunk", "dropout"):
    settings = [getattr(models.configure("mega-chunk", "listops", **recipe.overrides), field) for recipe in ladder]
    print(f"model.{field:10}" + "".join(f"{value!s:>12}" for value in settings))
read = []
for recipe in ladder:
    sequences = recipe.data.get("train", published.BENCHMARKS["listops"].train)
    longest = recipe.data.get("max_length", published.BENCHMARKS["listops"].length)
    read.append(recipe.total_updates(sequences) * recipe.batch * longest / 1e6)
print(
    f"{'million tokens':16}"
    + "".join(f"{tokens:12,.0f}" for tokens in read)
    + "   (at most: updates x batch x longest)"
)
print(f"{'x laptop':16}" + "".join(f"{tokens / read[0]:12,.0f}" for tokens in read))
for recipe in ladder:
    print(f"\n{recipe.name}: {recipe.source}\n    data: {dict(recipe.data) or 'the task as published'}")

# %% [markdown]
# The last lines of the table are the honest measure of how far a laptop run is from the paper. Which recipes exist for which task? `L` is laptop, `G` is gpu-30min, `P` is paper; a missing letter has
# its reason, which `recipes.get` gives.

# %%
LETTERS = {"laptop": "L", "gpu-30min": "G", "paper": "P"}
print(f"{'':12}" + "".join(f"{name:>13}" for name in models.NAMES))
for task in ARENA:
    have = {name: {r.name for r in training.RECIPES if (r.task, r.model) == (task, name)} for name in models.NAMES}
    print(
        f"{task:12}"
        + "".join(f"{''.join(s if n in have[name] else '.' for n, s in LETTERS.items()):>13}" for name in models.NAMES)
    )
for combination in (("listops", "longvq", "paper"), ("pathx", "transformer", "gpu-30min")):
    try:
        recipes.get(*combination)
    except training.RecipeError as reason:
        print(reason)

# %% [markdown]
# From a terminal, in the folder of the repository:
#
# ```
# python -m longseq_tutorial.train --task listops --model mega-chunk --recipe laptop
# python -m longseq_tutorial.train --task listops --model mega-chunk --recipe gpu-30min --max-time 9m
# python -m longseq_tutorial.train --task listops --model mega-chunk --recipe gpu-30min --max-time 9m --resume
# python -m longseq_tutorial.train --task listops --model mega-chunk --recipe paper
# accelerate launch --multi_gpu --num_processes 4 -m longseq_tutorial.train --task pathx --model mega-chunk --recipe paper
# python -m longseq_tutorial.results
# ```
#
# `--max-time 9m` saves and stops after nine minutes, and `--resume` goes on as if nothing had happened, as often as it
# takes: half an hour of GPU time may come in pieces. `accelerate launch` starts one process a GPU; a recipe's batch is
# shared out among them, so the result does not depend on their number but for rounding. Each run leaves a record, and
# the table above grows by a row. Where the data are the published ones, the parentheses around the gap go away by themselves.
#
# ## The panel
#
# Look at tasks. Choose one, click the slider, and move through its examples with the arrow keys; guess the answer before you
# show it. For the two path tasks "show the answer" also traces the paths. `TaskBrowser(task)` takes any task of
# `tasks.load`, the real data for instance, and several as a dictionary.

# %%
browser = TaskBrowser()
browser

# %%
print(browser.set(task="pathfinder", example=5).say())
print(browser.set(answer=True).say())
print(browser.set(task="retrieval", example=12).say())

# %% [markdown]
# The second panel is for ListOps alone: an expression drawn from a seed that you choose, and what happens when one of its
# digits becomes another one. The path along which values change is marked; mostly it ends after a step or two.
# `ExpressionTree("[MAX 2 9 ]")` takes an expression of your own, as text or as token ids.

# %%
panel = ExpressionTree()
panel

# %%
print(panel.set(seed=7, longest=40, digit=2, to=9).say())
print(panel.set(longest=60, digit=9, to=0).say())

# %%
own = ExpressionTree(small)
own

# %%
for digit in (1, 4, 9):
    print(own.set(digit=digit, to=9).say())

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · The truncated median
#
# Difficulty: ●○○ · Importance: ●●○ · 5 minutes
#
# `MIN`, `MAX` and `SM` are one word of Python each. Write `MED`: the middle of the sorted values; for an even number of
# them the mean of the two in the middle, rounded down. `values` is a tuple of digits, the result an int.
#
# <details><summary>Hint 1</summary>
#
# `sorted(values)` gives a sorted list and leaves the tuple alone.
#
# </details>
# <details><summary>Hint 2</summary>
#
# With `n` values the two in the middle are at `(n - 1) // 2` and `n // 2`; for odd `n` both are the same place.
#
# </details>


# %%
def median(values):
    """A tuple of digits -> their median, rounded down to a digit."""
    # BEGIN SOLUTION "your turn: sort, then take the middle, or the mean of the middle two rounded down"
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) // 2
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.long_range_arena import check_median

check_median(median)

# %% [markdown]
# ### Exercise 2 · A stack evaluates
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Evaluate an expression in one pass from left to right. `expression` is a text such as `"[MAX 2 9 [MIN 4 7 ] 0 ]"`, its
# tokens are separated by blanks. This is what a model has to imitate: watch how much you have to remember, and
# for how long.
#
# <details><summary>Hint 1</summary>
#
# Keep a stack of open lists, each with its operator and the values found so far. A digit goes to the list on top. What
# happens at `]`?
#
# </details>
# <details><summary>Hint 2</summary>
#
# At `]` take the top list off, apply its operator, and append the value to the list that is now on top. Begin with a
# bottom list without an operator: at the end it holds the answer, also when the whole expression is one digit.
#
# </details>


# %%
def evaluate(expression):
    """The text of an expression -> its value, an int."""
    # BEGIN SOLUTION "your turn: one pass, with a stack of the open lists"
    rules = {"[MIN": min, "[MAX": max, "[SM": lambda values: sum(values) % 10, "[MED": median}
    stack = [(None, [])]  # open lists: operator, values so far
    for word in expression.split():
        if word in rules:
            stack.append((word, []))
        elif word == "]":
            operator, values = stack.pop()
            stack[-1][1].append(rules[operator](values))
        else:
            stack[-1][1].append(int(word))
    return stack[0][1][0]
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.long_range_arena import check_evaluate

check_evaluate(evaluate)

# %% [markdown]
# ### Exercise 3 · How far is an argument?
#
# Difficulty: ●●○ · Importance: ●●○ · 15 minutes
#
# The curve of distances above came from this function: for each argument (a digit or a nested list), in the order of
# the tokens, how many tokens it begins after its operator. In `[MAX 2 9 [MIN 4 7 ] 0 ]` the distances are
# 1, 2, 3 (the nested list), 1, 2 (inside it) and 7. Return an int64 tensor.
#
# <details><summary>Hint 1</summary>
#
# The stack of exercise 2 again; now it holds the *places* of the open operators.
#
# </details>
# <details><summary>Hint 2</summary>
#
# A nested list is an argument of the list around it: take its distance before you put its own place on the stack.
#
# </details>


# %%
def argument_distances_mine(expression):
    """The text of an expression -> int64 (arguments,), distances in tokens."""
    # BEGIN SOLUTION "your turn: the places of the open operators on a stack"
    places, found = [], []
    for place, word in enumerate(expression.split()):
        if word == "]":
            places.pop()
            continue
        if places:
            found.append(place - places[-1])
        if word.startswith("["):
            places.append(place)
    return torch.tensor(found)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.long_range_arena import check_argument_distances

check_argument_distances(argument_distances_mine)

# %% [markdown]
# ### Exercise 4 · A batch and its mask
#
# Difficulty: ●○○ · Importance: ●●● · 10 minutes
#
# Put 1-D tensors of different lengths side by side: `x (batch, longest)`, padded on the right with 0, in the dtype of
# the sequences, and `mask (batch, longest)`, bool, `True` where a value is real. It has to work for token ids and for
# sound, where a real sample can be 0.
#
# <details><summary>Hint 1</summary>
#
# `sequences[0].new_zeros(batch, longest)` has the right dtype; fill it row by row.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Compare `torch.arange(longest)`, a row, with the lengths, a column: broadcasting makes a rectangle.
#
# </details>


# %%
def pad(sequences):
    """A tuple of 1-D tensors -> x (batch, longest) and mask (batch, longest), True = real."""
    # BEGIN SOLUTION "your turn: zeros, filled row by row, and a mask from the lengths"
    lengths_of = torch.tensor([len(sequence) for sequence in sequences])
    x = sequences[0].new_zeros(len(sequences), int(lengths_of.max()))
    for row, sequence in zip(x, sequences, strict=True):
        row[: len(sequence)] = sequence
    return x, torch.arange(x.shape[1]) < lengths_of[:, None]
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.long_range_arena import check_pad

check_pad(pad)

# %% [markdown]
# ### Exercise 5 · Neighbours, steps apart
#
# Difficulty: ●○○ · Importance: ●●○ · 10 minutes
#
# The distances of Pathfinder came from this one. A path is a list of points in a picture, an int64 tensor `(points, 2)` of
# rows and columns; the picture is read row by row and has `columns` columns. Give, for each two points that follow each
# other, how many steps of the sequence lie between them, as an int64 tensor `(points - 1,)`. From (0, 3) straight
# down to (1, 3) it is `columns` steps.
#
# <details><summary>Hint 1</summary>
#
# First the place of each point in the sequence: all full rows before it, then its column.
#
# </details>
# <details><summary>Hint 2</summary>
#
# Take the difference of *places*, then the absolute value. Up and to the right is not as far as up and to the left.
#
# </details>


# %%
def raster_steps(path, columns):
    """int64 (points, 2) as (row, column), and the picture's columns -> int64 (points - 1,)."""
    # BEGIN SOLUTION "your turn: places in the sequence, then their differences"
    place = path[:, 0] * columns + path[:, 1]
    return (place[1:] - place[:-1]).abs()
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.long_range_arena import check_raster_steps

check_raster_steps(raster_steps)

# %% [markdown]
# ## What to remember
#
# * The Long Range Arena is six classification tasks of 1,024 to 16,384 steps; the metric is accuracy, and averages are
#   over five tasks or over six. Ask which. (Tay et al. 2021; Mega paper, Table 2)
# * Long-range means that near things *and* far things must meet: in ListOps most arguments are beside their operator,
#   some in each expression hundreds of tokens away; in a flat picture the neighbour below is a whole row off.
# * Pathfinder and Path-X are chains: fourteen hops, each of which must be right. On Path-X a hop alone is longer than a
#   chunk of 128.
# * Ask of any score what a shortcut would get. The first token of ListOps alone gives a third and more, as much as the
#   published Transformer.
# * Padding may cost time; it must not change an answer. Test that.
# * A figure without its data, length, budget, seeds and test size is not a result. Ours on short ListOps and 1,000 bytes
#   compare models with each other, and not with the published table.
#
# Next, [chapter 11](11_speech.ipynb): the same machinery on sound, sixteen thousand numbers a second.
