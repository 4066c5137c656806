# %% [markdown]
# # 12 · What they learned
#
# ## The question
#
# You have built the mechanisms, put them together, and seen the systems trained. Now open the trained ones.
# **What did training make of the freedom that we gave it?** How far do the memories reach, what does attention look at,
# which tokens wake, what do the codes stand for, and what does FastRPB know about distance? And then the harder question:
# how much of what we see there is *why* the model answers as it does?
#
# After this chapter you will be able to
#
# - read the time scales of an EMA and of a state space off their parameters, and say which of them training moved;
# - lay out any attention of this course as a matrix, and sum a thousand matrices up in one curve;
# - say which tokens a switch wakes, and which contexts a code stands for, against what chance would give;
# - switch a part of a trained model off, measure the fall, and say how sure you are of it;
# - tell what a picture of a model's inside shows from what it does not.
#
# Everything here is read from the records and weights in `results/`: the runs of the recipe `laptop`, each of which took
# minutes on a processor, without a GPU. They are small models on short versions of the tasks. What they learned is real; that
# larger ones learn the same is not said.

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from longseq_tutorial import results
from longseq_tutorial.classroom import OKABE_ITO, fmt, opened, show, use_style
from longseq_tutorial.classroom.panels_learned import Opened, draw_map, tokens_figure, waveform_figure
from longseq_tutorial.tasks import Batch, collate
from longseq_tutorial.tasks.expressions import VOCABULARY

use_style()
torch.set_flush_denormal(True)
torch.set_num_threads(1)  # the models are small; and numbers do not depend on how many threads there are

runs = opened.load_runs()
TASKS = tuple(dict.fromkeys(task for task, _ in runs))
MODELS = {task: [model for where, model in runs if where == task] for task in TASKS}
rows = results.summary([run.record for run in runs.values()])
print(f"{'task':9}{'model':13}{'test':>7}{'parameters':>12}{'updates':>9}")
for row in rows:
    print(f"{row.task:9}{row.model:13}{row.accuracy:6.1f} %{row.parameters:12,}{row.updates:9,}")
for task in TASKS:
    first = next(row for row in rows if row.task == task)
    print(f"\n{task}, chance {first.chance:.0f} %: {first.data}")

# %% [markdown]
# Keep this table in mind: nobody can look into a model for what it did not learn. Where a figure of the table lies near
# chance, or near a known shortcut (on ListOps the first token alone gives a third, chapter 10), a beautiful map is a
# map of little.
#
# What do we give them to read? Only what lies in the repository, so that every cell runs without a network:
#
# - **ListOps**: the first expressions of the very test that the records speak of, made again from its seed;
# - **speech**: twenty recordings of the official test of the Free Spoken Digit Dataset;
# - **text**: reviews put together by the project's own grammar. The models were trained on *real* reviews, which may not
#   be shipped. So here they read a text that they were not made for: good enough to watch them, no measure of their skill.

# %%
samples = {task: opened.sample(runs[task, MODELS[task][0]].record, 150) for task in TASKS}
batches = {task: collate([split[i] for i in range(len(split))]) for task, split in samples.items()}
for task, batch in batches.items():
    step, unit = opened.step_size(runs[task, MODELS[task][0]].record)
    size = f"{fmt(step)} {unit}" if step > 1 else f"one of its {unit}"
    print(f"{task:8} {len(batch.x):4} sequences; one position of a model is {size}")

# %% [markdown]
# The same seed gives the same start: `opened.fresh(record)` builds a model as it was before its first update. So everything
# below can be held against where it began. That comparison is the first of this chapter's habits. A pattern that an
# untrained model shows as well was not learned.
#
# ## Memories, by time scale
#
# An average with decay $\varphi = 1 - \alpha\delta$ keeps $\varphi^t$ of an input for $t$ steps. It has forgotten half when
# $\varphi^t = \tfrac12$, that is, after
#
# $$ t_{1/2} = \frac{\ln \tfrac12}{\ln(1 - \alpha\delta)} $$
#
# steps, its **half-life**. In words: the closer the decay is to one, the longer the memory; halving $\alpha\delta$ a little
# more than doubles it. Mega's EMAs begin, by their published initial values, with half-lives of a few steps. In the figure
# each dot is one average of one model (every fifth is drawn), at its half-life before training and after it. On the diagonal
# nothing has moved. Look for dots far from it, and for a layer, or a direction of time, that left it as a whole.

# %%
with_ema = {task: next(m for m in ("mega", "seqboat", "longvq") if m in MODELS[task]) for task in TASKS}
fig, axes = plt.subplots(1, len(TASKS), figsize=(9.8, 3.5))
said = []
for ax, (task, name) in zip(axes, with_ema.items(), strict=True):
    model, record = runs[task, name]
    step, unit = opened.step_size(record)
    changes = []
    both = zip(opened.memories(model), opened.memories(opened.fresh(record)), strict=True)
    for layer, (ema, begun) in enumerate(both, start=1):
        now, then = step * opened.half_lives(ema), step * opened.half_lives(begun)  # (2 D, n): forwards, backwards
        ax.plot(
            then.flatten()[::5],
            now.flatten()[::5],
            linestyle="none",
            marker=".",
            markersize=2.5,
            label=f"layer {layer}",
        )
        ratio = now / then
        changes.append(ratio)
        ways = [
            f"{way} {fmt(float(part.median()), 3)}" for way, part in zip(("→", "←"), ratio.split(ema.dim), strict=True)
        ]
        print(
            f"{task:8} {name} layer {layer}: half-lives from {fmt(float(now.min()))} to {fmt(float(now.max()))} {unit}; "
            f"times the start's, in the middle: {', '.join(ways)}"
        )
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="#55554F", linestyle=":", marker="")
    ax.set(xlabel=f"half-life before training ({unit})", ylabel=f"after ({unit})", title=f"{name} on {task}")
    ax.legend(fontsize="small", markerscale=4, loc="upper left")
    every = torch.cat(changes)
    assert task == "text" or float(now.max()) < 12 * step, "the text says: some steps"
    within = float(((every > 0.8) & (every < 1.25)).double().mean())
    said.append(f"{name} on {task}: {100 * within:.0f} % of them changed by less than a quarter")
show(
    fig,
    "Half-lives of a fifth of the averages of a trained model against their half-lives before training, one panel a task; "
    "a dotted diagonal. " + "; ".join(said) + ".",
)

# %% [markdown]
# Half-lives say what each average *could* remember. Whether it is listened to, $\eta$ decides: a kernel is the weighted sum
# of its averages. So the fairer question is about the kernel itself: **within how many lags lies 90 % of its weight?** This
# reach can be asked of a state space as well, S4 in SPADE, whose parameters do not show it so directly (chapter 02).
#
# The next figure asks it of every kernel of every trained model that has a memory, and of the same models before training.
# A bar spans the middle 80 % of the channels, the white tick is the middle channel; the thin grey bar on its left is the start.
# Look for bars that stand apart from their grey neighbour.

# %%
RECALLING = [name for name in ("mega", "seqboat", "longvq", "spade") if any(name in MODELS[task] for task in TASKS)]


def all_kernels(model, record):
    """The kernels of each layer with a memory, as long as the longest sequence."""
    stride = int(np.prod([s for _, s in record.config["patch"]], dtype=int))
    length = -(-record.task["length"] // stride)
    return [opened.kernels(memory, length) for memory in opened.memories(model)]


found, reshaped = {}, {}
for task in TASKS:
    for name in RECALLING:
        if name in MODELS[task]:
            model, record = runs[task, name]
            step, _ = opened.step_size(record)
            now, then = all_kernels(model, record), all_kernels(opened.fresh(record), record)
            found[task, name] = tuple([step * opened.reach(k).double() for k in layers] for layers in (now, then))
            reshaped[task, name] = [
                float(((a - b).norm(dim=1) / b.norm(dim=1)).median()) for a, b in zip(now, then, strict=True)
            ]

fig, axes = plt.subplots(1, len(TASKS), figsize=(10.6, 3.9))
colours = dict(zip(RECALLING, OKABE_ITO.values(), strict=False))
for ax, task in zip(axes, TASKS, strict=True):
    place, ticks, names = 0.0, [], []
    for name in RECALLING:
        for layer, (now, then) in enumerate(zip(*found.get((task, name), ((), ())), strict=True), start=1):
            for values, where, ink, wide in ((then, place - 0.3, "#9A9A94", 3), (now, place, colours[name], 8)):
                low, middle, high = np.quantile(values, (0.1, 0.5, 0.9))
                ax.vlines(where, low, high, color=ink, linewidth=wide)
                ax.plot(where, middle, marker="_", color="white", markersize=wide, markeredgewidth=1.5)
            ticks, names, place = [*ticks, place], [*names, f"{name} {layer}"], place + 1
    _, unit = opened.step_size(runs[task, MODELS[task][0]].record)
    ax.set(yscale="log", ylabel=f"90 % of the weight within ({unit})", title=task, xticks=ticks)
    ax.set_xticklabels(names, rotation=60, ha="right", fontsize="small")
    ax.grid(axis="x", visible=False)
print(f"{'reach, middle channel':26}{'start':>8}{'trained':>9}            by more than half        kernel")
moved = {}
for (task, name), (now, then) in found.items():
    _, unit = opened.step_size(runs[task, name].record)
    for layer, (a, b) in enumerate(zip(now, then, strict=True), start=1):
        ratio = a / b
        moved[task, name, layer] = float(((ratio > 1.5) | (ratio < 1 / 1.5)).double().mean())
        longer, shorter = (100 * float(x.double().mean()) for x in (ratio > 1.5, ratio < 1 / 1.5))
        print(
            f"{task:8} {name:8} layer {layer}  {fmt(float(b.median())):>8}{fmt(float(a.median())):>9} {unit:7}"
            f"{longer:5.0f} % longer, {shorter:3.0f} % shorter, changed by {100 * reshaped[task, name][layer - 1]:3.0f} %"
        )
usual = [x for (task, name), x in reshaped.items() if task != "text" and name in ("mega", "seqboat")]
assert min(min(x) for x in usual) > 0.3, "the text says: the shapes of the kernels changed"
assert min(min(x.median() for x in found["listops", "spade"][w]) for w in (0, 1)) > 5 * max(
    x.median() for x in found["listops", "mega"][0]
), "the text says: S4 reaches much further than an EMA"
most = max(moved, key=moved.get)
least = min(moved, key=moved.get)
show(
    fig,
    "Reach of the kernels of every layer with a memory, trained beside untrained, logarithmic. The most channels moved in "
    f"{most[1]} on {most[0]}, layer {most[2]} ({100 * moved[most]:.0f} %), the fewest in {least[1]} on {least[0]}, layer "
    f"{least[2]} ({100 * moved[least]:.0f} %).",
)

# %% [markdown]
# Two different worlds. An EMA of these models keeps nine tenths of its weight within some ten steps, and the minutes of
# training have hardly changed that: most averages kept their decay to within a quarter. What training did change is the
# *shape* of the kernels (the last column: the norm of the difference, relative to the start). It re-weighed the averages
# that it found, by $\beta$ and $\eta$, and left their decays nearly alone. A longer training may do more; this one did not.
#
# S4 comes with a long memory built in: its kernels span a large part of the sequence before anybody has trained it. The
# authors of SPADE noticed that training S4 gains them little. That is one way to see why: it *starts* where an EMA has to get.
#
# So a far look, in these models, is the business of S4 or of attention. Which of the two do they use? That needs more than
# looking at kernels; we return to it.
#
# ## What attention looks at
#
# `opened.attention_maps(model, x, mask)` gives a matrix for each layer and head, whatever the mechanism: blocks and
# windows are laid out where they belong, SeqBoat's chosen tokens are put back to where they stood, and LongVQ's attention
# over codes is handed the identity matrix as values, and so returns its own weights. (Attention is linear in its values:
# that trick opens any of them.) One row is one query; bright is where it reads.
#
# Here are maps of a last layer, one input of each task (Mega's, where its run is recorded). Look for stripes: a vertical one is a key that everybody reads, a
# diagonal one a fixed distance.

# %%
chosen = {
    task: next(m for m in ("mega", "transformer", "mega-chunk", "seqboat") if m in MODELS[task]) for task in TASKS
}
maps = {}
fig, axes = plt.subplots(1, len(TASKS), figsize=(10.6, 3.9))
for ax, (task, name) in zip(axes, chosen.items(), strict=True):
    model, record = runs[task, name]
    x = samples[task][0][0][: 80 if task == "text" else None]  # a picture of noise is a large file
    maps[task] = opened.attention_maps(model, x[None], torch.ones(1, len(x), dtype=torch.bool))
    draw_map(ax, maps[task][-1][0], *opened.step_size(record))
    ax.set_title(f"{name} on {task}")
shares = []
for task, layers in maps.items():
    rows_of = layers[-1][0] / layers[-1][0].sum(-1, keepdim=True)
    received = rows_of.mean(0)
    shares.append(
        f"on {task} the most read tenth of the keys gets {100 * float(received.topk(max(1, len(received) // 10)).values.sum()):.0f} %"
    )
show(fig, "Attention maps of the last layer, one input a task, rows are queries. " + "; ".join(shares) + ".")

# %% [markdown]
# In words, for ListOps. Take three queries of the expression and ask for the keys that they read most; then sum up over
# all queries and a few expressions which *kinds* of tokens read which, beside what an even spread would give.

# %%
KINDS = ("digit", "operator", "bracket")


def kind(token):
    """0 for a digit, 1 for an operator, 2 for a closing bracket."""
    return 0 if token <= 10 else 2 if VOCABULARY[token] == "]" else 1


task = "listops"
x, _ = samples[task][0]
words = opened.pieces(runs[task, chosen[task]].record, x)
print(" ".join(words[:40]), "...")
for query in (0, len(words) // 2, len(words) - 1):
    row = maps[task][-1][0, query] / maps[task][-1][0, query].sum()
    best = ", ".join(f"{words[j]} at {j} ({100 * float(row[j]):.0f} %)" for j in row.topk(3).indices.tolist())
    print(f"the query {words[query]} at {query} reads most: {best}")


def by_kind(model, count=3):
    """Share of the attention of each kind of query that goes to each kind of key, over layers and heads, and evenly."""
    read, even = torch.zeros(3, 3), torch.zeros(3, 3)
    for i in range(count):
        x, _ = samples["listops"][i]
        is_kind = torch.nn.functional.one_hot(torch.tensor([kind(int(token)) for token in x]), 3).float()  # (L, 3)
        for weights in opened.attention_maps(model, x[None], torch.ones(1, len(x), dtype=torch.bool)):
            share = (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)).mean(0)  # (L, L)
            read += is_kind.T @ share @ is_kind
            even += is_kind.T @ (share.sum(-1, keepdim=True) / len(x)).expand(-1, len(x)) @ is_kind
    return (read / read.sum(1, keepdim=True)).numpy(), (even / even.sum(1, keepdim=True)).numpy()


print(f"\n{'% of attention to':30}" + "".join(f"{k:>10}" for k in KINDS))
shown = {name: runs[task, name].model for name in MODELS[task]}
shown |= {f"{chosen[task]}, start": opened.fresh(runs[task, chosen[task]].record)}
for name, model in shown.items():
    read, even = by_kind(model)
    if "mega" in (name, chosen["listops"]):
        more = float(read[:, 1].mean() / even[:, 1].mean())
        assert name != "mega" or more > 2, "the text says: operators, far more often"
        assert "start" not in name or more < 1.3, "the text says: not before training"
    for i, who in enumerate(KINDS):
        print(f"{name if i == 0 else '':14}from {who:10}" + "".join(f"{100 * value:10.0f}" for value in read[i]))
print(f"{'evenly spread':14}from anyone   " + "".join(f"{100 * value:10.0f}" for value in even.mean(0)))

# %% [markdown]
# Mega, trained on ListOps, reads operators far more often than an even spread would, whoever asks; before training it did not.
# The three queries above say which ones: those at the head of the expression, wherever the query stands. That is the
# vertical stripe at the left of the map. Is Mega alone in this? Ask each model for the share of its attention that goes to the
# first four tokens.

# %%
HEAD = 4
head = {}
few = [samples["listops"][i][0] for i in range(4)]
for name in MODELS["listops"]:
    layers = torch.zeros(len(opened.attention_maps(runs["listops", name].model, few[0][None], few[0][None] > 0)))
    for x in few:
        for number, weights in enumerate(opened.attention_maps(runs["listops", name].model, x[None], x[None] > 0)):
            share = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
            layers[number] += float(share[..., :HEAD].sum() / share.sum().clamp(min=1e-30)) / len(few)
    head[name] = layers.tolist()
    print(
        f"{name:12} " + ", ".join(f"{100 * layer:.0f} %" for layer in head[name]) + " of the attention, layer by layer"
    )
print(f"{'evenly':12} {100 * np.mean([HEAD / len(x) for x in few]):.0f} %")
after = max(max(head["fastrpb"]), max(head["transformer"]))
assert min(max(head["mega"]), max(head["longvq"])) > max(0.5, after), "the text says: most of it, and the first two"
assert min(max(head["fastrpb"]), max(head["transformer"])) > 0.25 and max(head["seqboat"]) < 0.25

# %% [markdown]
# In Mega and LongVQ there is a layer that spends most of its attention on four tokens out of a hundred; the Transformer and
# FastRPB come after them. They have all found the same thing, and chapter 10 knows what it is: the first token is the operator at the root
# of the tree, and who knows nothing else gets about a third of the answers right, which is about what these models get. The map
# shows a reader of headlines. It does not show a model that evaluates an expression.
#
# (In Mega-chunk and SPADE most places cannot look so far: what they know of the head has to come to them by EMA or S4. And SeqBoat,
# which could, hardly does. Keep that in mind.)
#
# One map is one input. To say something about a *model*, sum up: exercise 2 asks for the share of attention that goes how
# far. The figure adds it up from near to far, over layers, heads and several inputs. The dotted line is what attention
# would give that looks at everything alike. A curve above it prefers the near, a curve on it has no preference.


# %%
def profile(model, task, count):
    """Cumulative distance profiles ``(layers, distances)``, averaged over inputs in which the layer attends at all."""
    read = [
        opened.attention_maps(model, x[None], torch.ones(1, len(x), dtype=torch.bool)) for x, _ in few_of(task, count)
    ]
    longest = max(layers[0].shape[-1] for layers in read)
    curves = []
    for layer in zip(*read, strict=True):
        each = [opened.distance_profile(weights).cumsum(0) for weights in layer if weights.any()]
        wide = [torch.cat([c, c[-1:].expand(longest - len(c))]) for c in each] or [torch.zeros(longest)]
        curves.append(torch.stack(wide).mean(0))
    return torch.stack(curves).numpy()


def few_of(task, count):
    """The first so many inputs of a task."""
    return [samples[task][i] for i in range(count)]


def evenly(task, count):
    """The same of attention that looks at everything alike."""
    lengths = [
        opened.positions(runs[task, MODELS[task][0]].model, x[None], torch.ones(1, len(x), dtype=torch.bool))
        for x, _ in few_of(task, count)
    ]
    plain = [opened.distance_profile(torch.ones(1, m.shape[1], m.shape[1])).cumsum(0) for m in lengths]
    longest = max(len(c) for c in plain)
    return torch.stack([torch.cat([c, c[-1:].expand(longest - len(c))]) for c in plain]).mean(0).numpy()


fig, axes = plt.subplots(1, len(TASKS), figsize=(10.6, 3.8), sharey=True)
print(f"{'half of the attention within':30}  layer by layer, from below")
for ax, task in zip(axes, TASKS, strict=True):
    count = 1 if task == "text" else 3
    plain = evenly(task, count)
    for name in MODELS[task]:
        model, record = runs[task, name]
        step, unit = opened.step_size(record)
        curves = profile(model, task, count)
        awake = curves[:, -1] > 0.5  # layers in which anybody attends
        if awake.any():
            colour, marker = results.STYLE[name]
            mean = curves[awake].mean(0)
            ax.plot(step * np.arange(len(mean)), mean, color=colour, marker=marker, markersize=4, label=name)
        halves = [fmt(step * int((c < 0.5).sum()), 3) if on else "nobody" for c, on in zip(curves, awake, strict=True)]
        print(f"{task:8} {name:12} ({unit})".ljust(30), "  ", ", ".join(halves))
    print(f"{task:8} evenly ({unit})".ljust(30), "  ", fmt(step * int((plain < 0.5).sum()), 3))
    if task == "speech":
        print(f"{'':8} of this, within 50 ms, in %; evenly spread, {100 * plain[5]:.0f}:")
        near = {}
        for name in ("mega", "seqboat", "mega-chunk"):
            both = runs[task, name].model, opened.fresh(runs[task, name].record)
            now, then = (profile(m, task, count) for m in both)
            line = [
                ", ".join(f"{100 * c[5]:.0f}" if c[-1] > 0.5 else "nobody" for c in curves) for curves in (now, then)
            ]
            print(f"{'':8} {name:12} {line[0]}; before training {line[1]}")
            near[name] = now[:, 5]
            assert then[then[:, -1] > 0.5, 5].min() > 0.9 * plain[5], "the text says: before training neither did"
        assert max(near["mega"].max(), near["seqboat"].max()) < 0.1 * plain[5], "the text says: away from what is near"
        assert near["mega-chunk"][:2].max() < 0.6 * plain[5] < near["mega-chunk"][2], "the text says: two lower layers"
    if task == "text":
        x, _ = samples[task][0]
        alone = opened.waking(runs[task, "seqboat"].model, x[None], torch.ones(1, len(x), dtype=torch.bool))
        assert int(alone.sum()) == 1, "the text says: a single waking byte"
    ax.plot(step * np.arange(len(plain)), plain, color="#55554F", linestyle=":", marker="", linewidth=2, label="evenly")
    ax.set(xlabel=f"distance ({unit})", title=task, ylim=(0, 1.02))
    ax.set_xscale("symlog", linthresh=step)
    ax.set_xlim(left=0)
axes[0].set_ylabel("share of attention within")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
show(
    fig,
    "Share of the attention that stays within a distance, against the distance, one curve a model, one panel a task, and a "
    "dotted line for attention spread evenly. The printed lines above give the distance that holds half of it.",
)

# %% [markdown]
# Chunks and windows stay near because they must. More telling are the others, which may look anywhere. Where a curve lies on
# the dotted line, attention has no use for distance. And on speech Mega and SeqBoat do the *opposite* of what one expects:
# their attention keeps away from what is near, and rises only beyond some tens of milliseconds. Before training neither did;
# Mega-chunk, inside its chunks, has learned the same in its two lower layers. One reading lies at hand: the near past is what
# the EMA delivers anyway, so attention is free for the rest. It fits the picture; the picture does not prove it. (SeqBoat's
# line at the top on text is a single waking byte that reads itself.)
#
# ## Who wakes
#
# SeqBoat decides for each token whether it may attend (chapter 05). Nothing in its loss asks for a certain rate, so whatever
# rate we find is where training left it. Here it is for each layer, beside the rate before training.


# %%
def percent(share):
    """A share in percent; with a digit more where it would look like nothing."""
    return f"{100 * share:.1f} %" if 0 < share < 0.01 else f"{100 * share:.0f} %"


rates = {}
for task in TASKS:
    if "seqboat" not in MODELS[task]:
        continue
    model, record = runs[task, "seqboat"]
    few = Batch(*(part[: 20 if task == "text" else 40] for part in batches[task]))
    real = opened.positions(model, few.x, few.mask)
    awake = opened.waking(model, few.x, few.mask)
    begun = opened.waking(opened.fresh(record), few.x, few.mask)
    rates[task] = [float(layer[real].float().mean()) for layer in awake]
    start = [float(layer[real].float().mean()) for layer in begun]
    print(f"{task:8} awake, from the lowest layer: " + ", ".join(percent(r) for r in rates[task]))
    print(f"{'':8}      before training:           " + ", ".join(percent(r) for r in start))
assert "text" not in rates or (rates["text"][0] == rates["text"][2] == 0 and 300 < 1 / rates["text"][1] < 600), (
    "the text says: one byte in some four hundred, in the second layer"
)

# %% [markdown]
# And who are they? On ListOps there are only fifteen kinds of tokens, so a table can be drawn. In the figure look along
# each row: a row of one colour is a layer that wakes without regard to the token.

# %%
model, record = runs["listops", "seqboat"]
few = Batch(*(part[:40] for part in batches["listops"]))
awake = opened.waking(model, few.x, few.mask)
by_token = torch.stack(
    [torch.stack([layer[few.x == token].float().mean() for token in range(1, 16)]) for layer in awake]
)

fig, ax = plt.subplots(figsize=(9.0, 2.8))
picture = ax.imshow(100 * by_token.numpy(), vmin=0, vmax=100, aspect="auto")
fig.colorbar(picture, label="awake (%)")
ax.set(xticks=range(15), yticks=range(len(awake)), xlabel="token", ylabel="layer")
ax.set_xticklabels(VOCABULARY[1:16])
ax.set_yticklabels([str(i + 1) for i in range(len(awake))])
ax.grid(False)
spread = by_token.amax(1) - by_token.amin(1)
choosy = int(spread.argmax())
most, least = int(by_token[choosy].argmax()), int(by_token[choosy].argmin())
show(
    fig,
    f"How often each of the fifteen tokens of ListOps is awake, in each of {len(awake)} layers. Layer {choosy + 1} tells them "
    f"apart most: {VOCABULARY[1 + most]} is awake in {100 * float(by_token[choosy, most]):.0f} % of its places, "
    f"{VOCABULARY[1 + least]} in {100 * float(by_token[choosy, least]):.0f} %.",
)
assert float(by_token[0].max()) < 0.05 and float(by_token[1, -1]) < 0.05, "the text says: nobody; no brackets"
assert float(by_token[1, 10]) > 0.9 > 0.8 > float(by_token[1].sort().values[-2]), "the text says: nearly every [MIN"
assert 0.35 < float(awake[2][few.mask].float().mean()) < 0.7, "the text says: about every second token"
for i, layer in enumerate(awake, start=1):
    shares = []
    for number, name in enumerate(KINDS):
        which = torch.tensor([kind(token) == number if token else False for token in range(16)])[few.x]
        shares.append(f"{name}s {100 * float(layer[which].float().mean()):.0f} %")
    print(f"layer {i}: awake are", ", ".join(shares))

# %% [markdown]
# A rate hides *where*. Here is one expression with a bar under each token that is awake, one colour a layer.

# %%
x, _ = samples["listops"][0]
awake = opened.waking(model, x[None], torch.ones(1, len(x), dtype=torch.bool))[:, 0]
fig = tokens_figure(opened.pieces(record, x), awake.float(), [f"layer {i + 1}" for i in range(len(awake))])
show(
    fig,
    f"A ListOps expression of {len(x)} tokens with bars under the tokens that wake: "
    + ", ".join(f"layer {i + 1} wakes {int(layer.sum())}" for i, layer in enumerate(awake))
    + ".",
)

# %% [markdown]
# The same for a review of the grammar. Look for bars at all: before training they stood under most tokens in the first layer.

# %%
task = "text" if ("text", "seqboat") in runs else "listops"
model, record = runs[task, "seqboat"]
x, _ = samples[task][1]
x = x[:400]
awake = opened.waking(model, x[None], torch.ones(1, len(x), dtype=torch.bool))[:, 0]
words = opened.pieces(record, x)
fig = tokens_figure(words, awake.float(), [f"layer {i + 1}" for i in range(len(awake))])
show(
    fig,
    f"The beginning of a sample of {task}, {len(x)} tokens, with bars under those that wake: "
    + ", ".join(f"layer {i + 1} wakes {int(layer.sum())}" for i, layer in enumerate(awake))
    + ".",
)
classes = {"letters": str.isalpha, "spaces": str.isspace, "others": lambda c: not (c.isalpha() or c.isspace())}
assert task != "text" or max(rates["text"]) < 0.01, "the text says: hardly anybody"
for i, layer in enumerate(awake, start=1):
    told = [
        f"{name} {100 * float(layer[torch.tensor([bool(test(w)) for w in words])].float().mean()):.0f} %"
        for name, test in classes.items()
        if any(test(w) for w in words)
    ]
    print(f"layer {i}: awake are", ", ".join(told))

# %% [markdown]
# And for a waveform, ten milliseconds a token. Compare the rows with the loudness above them.

# %%
model, record = runs["speech", "seqboat"]
clip, label = samples["speech"][10]
awake = opened.waking(model, clip[None], torch.ones(1, len(clip), dtype=torch.bool))[:, 0]
fig = waveform_figure(
    clip, record.task["sample_rate"], awake.float(), [f"layer {i + 1}" for i in range(len(awake))], "bright: awake"
)
loud_rate, quiet_rate = torch.zeros(len(awake)), torch.zeros(len(awake))
for x, _ in (samples["speech"][i] for i in range(len(samples["speech"]))):
    up = opened.waking(model, x[None], torch.ones(1, len(x), dtype=torch.bool))[:, 0].float()
    level = torch.nn.functional.pad(x, (0, -len(x) % 80)).view(-1, 80).square().mean(1)
    loud = level > level.median()
    loud_rate += up[:, loud].mean(1) / len(samples["speech"])
    quiet_rate += up[:, ~loud].mean(1) / len(samples["speech"])
show(
    fig,
    f"A spoken {record.task['class_names'][label]!r} as a waveform, and below it which tokens of 10 ms wake in which of "
    f"{len(awake)} layers: "
    + ", ".join(f"layer {i + 1} {100 * float(a.float().mean()):.0f} %" for i, a in enumerate(awake))
    + ".",
)
assert all(quiet_rate[1:3] > loud_rate[1:3] + 0.1), "the text says: more often in the quieter half"
assert all(0.65 < rate < 0.75 for rate in rates["speech"][1:3]), "the text says: seven tokens in ten"
for i, (a, b) in enumerate(zip(loud_rate, quiet_rate, strict=True), start=1):
    print(
        f"layer {i}: awake in the louder half of a clip {100 * float(a):.0f} %, in the quieter half {100 * float(b):.0f} %"
    )

# %% [markdown]
# The pictures invite stories. On ListOps nobody wakes in the first layer; the second wakes at nearly every `[MIN` and passes
# over the closing brackets; the third is awake at about every second token and has favourites among the digits. On these
# made-up reviews hardly anybody wakes: before training the lowest layer let six tokens in ten attend, now one byte in some
# four hundred wakes in the second layer, and none in the others. (It was trained on real reviews; whether it sleeps there,
# too, this does not say.) On speech the two middle layers are awake at seven tokens in ten, and more often in the *quieter*
# half of a clip than in the louder one. Do they listen for something there, or has nobody ever asked them to sleep? And do
# the chosen tokens *matter*? Both are questions about causes, and wait for the last part.
#
# ## What the codes stand for
#
# LongVQ (our reconstruction, chapter 06) gives every key one of 128 names. How many of them does it use? The count of codes
# that occur at all says little, since one that names a single key counts like one that names a thousand. The **perplexity**,
# $\exp(-\sum_c p_c \ln p_c)$ with $p_c$ the share of keys that code $c$ names, is the number of codes that *equal* use would
# need to be as varied.
#
# And what does a name say? If you know a key's code, how many bits do you learn about the token that stands there, or the
# ones beside it, or the place in the sequence? That is the mutual information, $I(C; T) = H(T) - H(T \mid C)$. Counted on a
# finite sample it is always too large, so each number is reduced by what the same count gives after the codes were shuffled.


# %%
def bits(codes_of, targets, seed=0):
    """Mutual information of two lists of whole numbers, less that after shuffling, in bits: what is known beyond chance."""

    def information(a, b):
        table = torch.zeros(int(a.max()) + 1, int(b.max()) + 1, dtype=torch.double)
        table.index_put_((a, b), torch.ones(len(a), dtype=torch.double), accumulate=True)
        joint = table / len(a)
        apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return float((joint * (joint / apart.clamp(min=1e-300)).clamp(min=1e-300).log2())[joint > 0].sum())

    order = torch.randperm(len(codes_of), generator=torch.Generator().manual_seed(seed))
    return information(codes_of, targets) - information(codes_of[order], targets)


def entropy(targets):
    """In bits."""
    p = torch.bincount(targets).double() / len(targets)
    return float(-(p[p > 0] * p[p > 0].log2()).sum())


def asked(task, x, mask):
    """What a code might tell, for each real position of ``x (B, L)``: name -> whole numbers."""
    place = torch.arange(x.shape[1]).expand_as(x)
    if task == "speech":
        level = torch.nn.functional.pad(x, (0, -x.shape[1] % 80)).view(len(x), -1, 80).square().mean(2)  # (B, L')
        edges = level[mask].quantile(torch.linspace(0, 1, 9)[1:-1])
        digit = batches["speech"].label[: len(x), None].expand_as(level)
        place = torch.arange(level.shape[1]).expand_as(level) // 10
        named = {
            "loudness (8 levels)": torch.bucketize(level, edges),
            "tenth of a second": place,
            "the digit said": digit,
        }
    else:
        before, behind = x.roll(1, 1), x.roll(-1, 1)
        before[:, 0], behind[:, -1] = 0, 0
        named = {"the token": x, "the one before": before, "the one behind": behind, "place (steps of 20)": place // 20}
    return {name: values[mask].long() for name, values in named.items()}


learned = {}
for task in TASKS:
    if "longvq" not in MODELS[task]:
        continue
    model, record = runs[task, "longvq"]
    few = Batch(*(part[: 20 if task == "text" else 40] for part in batches[task]))
    real = opened.positions(model, few.x, few.mask)
    layers = opened.codes(model, few.x, few.mask)
    targets = asked(task, few.x, real)
    start = opened.codes(opened.fresh(record), few.x, few.mask)
    print(f"{task}: {int(real.sum()):,} keys, {record.config['codes']} codes")
    print(f"{'  bits about':26}" + "".join(f"{name:>22}" for name in targets))
    print(f"{'  there are':26}" + "".join(f"{entropy(values):22.1f}" for values in targets.values()))
    for i, layer in enumerate(layers, start=1):
        told = "".join(f"{bits(layer[real], values):22.1f}" for values in targets.values())
        share = torch.bincount(layer[real]).double() / int(real.sum())
        here = float(torch.exp(-torch.special.xlogy(share, share).sum()))
        print(f"  layer {i}, {here:3.0f} codes in use  " + told)
        learned[task, i] = [bits(layer[real], values) for values in targets.values()]
        if i == 1:
            learned[task, 0] = [bits(start[0][real], values) for values in targets.values()]
            print("  the same before training" + "".join(f"{told:22.1f}" for told in learned[task, 0]))

assert learned["listops", 1][0] < learned["listops", 0][0] + 0.1, "the text says: not better names of tokens"
assert learned["speech", 3][2] > learned["speech", 1][2] + 0.1 > learned["speech", 0][2] + 0.3, (
    "the text says: the word"
)

# %% [markdown]
# Read the table from the line "there are": so many bits one would have to be told to know the token, or its neighbour, without
# any code. Then compare each trained layer with the line "the same before training". Keys are made from the token that stands
# there, so even a random codebook tells something about it. On ListOps training has *not* made the codes of the first layer
# better names of tokens; if anything, worse. Nobody asked for names of tokens. What did it ask for? On speech the codes do tell
# more than before, and those of the highest layer know most about the word. (With a grain of salt: there are two clips of each
# digit. Whatever tells one clip from the others, a voice for instance, tells the digit as well.)
#
# The figure sorts the commonest codes by their favourite token, bright where many of a code's keys are. Look for rows with a
# single bright square, if there are any: there a code would *be* a token. Printed below are contexts, the key's own token
# between angle brackets.

# %%
model, record = runs["listops", "longvq"]
few = Batch(*(part[:40] for part in batches["listops"]))
layers = opened.codes(model, few.x, few.mask)
fig, axes = plt.subplots(1, len(layers), figsize=(10.2, 4.4))
purest = []
for number, (ax, layer) in enumerate(zip(np.atleast_1d(axes), layers, strict=True), start=1):
    table = torch.zeros(record.config["codes"], 16)
    table.index_put_((layer[few.mask], few.x[few.mask]), torch.ones(int(few.mask.sum())), accumulate=True)
    largest = table.sum(1).topk(24).indices
    largest = largest[table.sum(1)[largest] >= 10]
    shares = table[largest, 1:] / table[largest, 1:].sum(1, keepdim=True)
    order = shares.argmax(1).argsort(stable=True)
    picture = ax.imshow(shares[order].numpy(), vmin=0, vmax=0.7, aspect="auto")
    purest.append(float(shares.max()))
    ax.set(xticks=range(15), yticks=[], title=f"layer {number}", xlabel="token that stands there")
    ax.set_xticklabels(VOCABULARY[1:16], rotation=60, fontsize="small")
    ax.grid(False)
fig.colorbar(picture, ax=axes, label="share of the code's keys")
np.atleast_1d(axes)[0].set_ylabel("code, the 24 commonest")
show(
    fig,
    "Which tokens the 24 commonest codes of LongVQ stand for on ListOps: each row a code, bright where many of its keys are. "
    "The largest share of one token among a code's keys: "
    + ", ".join(f"{100 * p:.0f} % in layer {number}" for number, p in enumerate(purest, start=1))
    + ".",
)
assert 0.5 < max(purest) < 0.62, "the text says: the purest to little more than half"
layer = layers[0]
print("layer 1, the commonest codes, with the contexts in which they stand most often:")
for code in torch.bincount(layer[few.mask]).topk(8).indices.tolist():
    contexts: dict[str, int] = {}
    for b, t in ((layer == code) & few.mask).nonzero().tolist():
        around = [
            VOCABULARY[int(few.x[b, s])] if 0 <= s < few.x.shape[1] and few.mask[b, s] else "·"
            for s in (t - 1, t, t + 1)
        ]
        text = f"{around[0]} <{around[1]}> {around[2]}"
        contexts[text] = contexts.get(text, 0) + 1
    total = sum(contexts.values())
    best = sorted(contexts.items(), key=lambda item: (-item[1], item[0]))[:4]
    if total:
        print(
            f"  code {code:3}, {total:4} keys: " + ";  ".join(f"{text} ({100 * n / total:.0f} %)" for text, n in best)
        )

# %% [markdown]
# None of these codes belongs to one token (the purest to little more than half), and no context stands out: most codes are
# a mixture that we have no word for. But there are exceptions, and we know from the maps where to look for them. Which codes do the
# *first tokens* of the expressions get, and which of those codes hardly any other token?

# %%
few = batches["listops"]
clear, bearing = [], []
for number, layer in enumerate(opened.codes(model, few.x, few.mask), start=1):
    names, firsts = layer[:, 0].unique(return_counts=True)
    places = torch.stack([((layer == code) & few.mask).sum() for code in names])
    own = (firsts >= 5) & (firsts > 0.8 * places)  # given to first tokens, and to hardly anything else
    clear.append(int(own.sum()))
    bearing.append(int(firsts[own].sum()))
    print(
        f"layer {number}: {clear[-1]} such codes; {bearing[-1]} of the {len(few.x)} first tokens bear one of them,",
        end=" ",
    )
    print(f"and {int(places[own].sum()) - bearing[-1]} other tokens")
    for code in names[own].tolist():
        operators = few.x[layer[:, 0] == code, 0].bincount(minlength=16).tolist()
        print(f"  code {code:3}:", ", ".join(f"{n} {VOCABULARY[token]}" for token, n in enumerate(operators) if n))
        if operators[11] > sum(operators) / 2:
            most_min = operators[11] / int((few.x[:, 0] == 11).sum())
assert clear == [4, 0] and bearing[0] > 0.9 * len(few.x), "the text says: four, in the first layer; nearly all heads"
assert most_min > 0.6 and head["longvq"][0] > 0.5, "the text says: most [MIN share one; most of the attention"

# %% [markdown]
# In the first layer there are four names that are given to heads of expressions and to hardly anything else, and nearly every
# head bears one of them. Most of the attention of that layer goes to the head, as we have seen. So these codes stand first of
# all for a *place* that attention has to tell apart, and a little for the operator (most `[MIN` share one). The values still
# know exactly which operator it is.
#
# On text the same table holds bytes. Below, the key's own character stands between brackets.

# %%
if ("text", "longvq") not in runs:
    print("There is no run of LongVQ on text among the records.")
else:
    model, record = runs["text", "longvq"]
    few = Batch(*(part[:40] for part in batches["text"]))
    layer = opened.codes(model, few.x, few.mask)[0]
    lines = [opened.pieces(record, x[real]) for x, real in zip(few.x, few.mask, strict=True)]
    for code in torch.bincount(layer[few.mask]).topk(10).indices.tolist():
        contexts = {}
        for b, t in ((layer == code) & few.mask).nonzero().tolist():
            text = "".join(lines[b][max(0, t - 3) : t]) + "[" + lines[b][t] + "]" + "".join(lines[b][t + 1 : t + 3])
            contexts[text] = contexts.get(text, 0) + 1
        best = sorted(contexts.items(), key=lambda item: (-item[1], item[0]))[:5]
        print(f"code {code:3}, {sum(contexts.values()):4} keys: " + "   ".join(repr(text)[1:-1] for text, _ in best))

# %% [markdown]
# Where the character between the brackets is the same in all five, the code is a letter; where it varies and the surroundings
# agree, it is a context; where neither does, the code merges what need not be told apart as a key.
#
# ## What FastRPB knows about distance
#
# Beside its linear attention, which cannot tell an order, FastRPB has a free number for every offset, head and layer
# (chapter 08). It starts almost at zero, with a faint slope away from the middle. In the figure: what training drew, over
# the offset of key and query. Look for a peak at the middle, for a slope, for a difference between left and right.

# %%
with_bias = [task for task in TASKS if "fastrpb" in MODELS[task]]
depth = max(len(opened.biases(runs[task, "fastrpb"].model)) for task in with_bias)
fig, axes = plt.subplots(len(with_bias), depth, figsize=(3.1 * depth, 2.1 * len(with_bias)), squeeze=False)
for ax in axes.flat:
    ax.axis("off")
for line, task in zip(axes, with_bias, strict=True):
    model, record = runs[task, "fastrpb"]
    step, unit = opened.step_size(record)
    begun = opened.biases(opened.fresh(record))
    for number, (ax, bias, start) in enumerate(zip(line, opened.biases(model), begun, strict=False), start=1):
        offset = torch.arange(1 - bias.max_length, bias.max_length)
        ax.axis("on")
        for head, weights in enumerate(bias.weight.detach(), start=1):
            every = 1 + len(offset) // 500  # a picture needs no more points
            ax.plot(step * offset[::every], weights[::every], linewidth=0.9, marker="", label=f"head {head}")
        ax.plot(
            step * offset, start.weight.detach().mean(0), color="black", linestyle=":", marker="", label="start, mean"
        )
        ax.set_title(f"{task}, layer {number}")
        size, size_then = bias.weight.detach().abs().mean(), start.weight.detach().abs().mean()
        near = bias.weight.detach().abs()[:, offset.abs() <= 5].mean() / size
        lean = (
            bias.weight.detach()[:, offset > 0].abs().sum() / bias.weight.detach()[:, offset != 0].abs().sum()
        ) * 100
        grown = float(size / size_then)
        assert 5 < grown < 7.5 if task == "text" else grown > 30, (
            "the text says: five- to sevenfold; orders of magnitude"
        )
        assert task != "listops" or lean > 65, "the text says: to the right"
        print(
            f"{task:8} layer {number}: mean size {fmt(float(size / size_then))} times the start's; offsets up to 5 are "
            f"{fmt(float(near))} times the mean; {float(lean):.0f} % of the weight lies on the side of the past"
        )
    line[0].set_ylabel("weight")
    line[0].set_xlabel(f"query minus key ({unit})")
fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
show(
    fig,
    "The weight that FastRPB has learned for each offset between query and key, one line a head, one panel a layer and task, "
    "and the start, close to zero. How much they have grown and where, is printed beside.",
)

# %% [markdown]
# On ListOps and speech the weights have grown by one or two orders of magnitude, on text five- to sevenfold, smoothly along
# the offset for the most part: neighbouring offsets never were told to be alike, the data made them so. On speech the heads
# share the work, some add what others subtract, over waves of a quarter of a second and more. On ListOps most of the weight
# lies to the right, on keys *before* the query, and in the second layer it grows with the distance: the farther back, the
# louder. From most places, far back is where the head of the expression stands. It is the same news that Mega fetched by
# attention, brought by another road.
#
# ## Quality against cost
#
# Every record knows what its run cost. Left, accuracy over the processor's minutes of training, right, over parameters. Vertical
# bars are one standard error, from the finite test alone: look first whether two models differ at all.

# %%
show(results.plot(rows), results.describe(rows))

# %%
fig, axes = plt.subplots(1, len(TASKS), figsize=(10.6, 3.4))
for ax, task in zip(axes, TASKS, strict=True):
    for row in (row for row in rows if row.task == task):
        colour, marker = results.STYLE[row.model]
        ax.errorbar(
            row.memory / 2**20,
            row.accuracy,
            row.sampling,
            color=colour,
            marker=marker,
            linestyle="none",
            label=row.model,
        )
    ax.set(title=task, xlabel="peak memory (MiB)")
axes[0].set_ylabel("test accuracy (%)")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
sizes = [row.memory / 2**20 for row in rows]
for task in ("listops", "speech"):
    alike = [row.memory for row in rows if row.task == task]
    assert max(alike) < 1.6 * min(alike), "the text says: differences nearly drown"
show(
    fig,
    "Test accuracy against the peak memory of the whole process, Python and the data included, one panel a task: from "
    f"{fmt(min(sizes))} to {fmt(max(sizes))} MiB.",
)

# %% [markdown]
# The memory is that of the whole process, with Python, PyTorch and the data in it. On ListOps and speech, with a hundred or two
# hundred positions, differences between models nearly drown in what they have in common: a short sequence has a small square.
# With the thousand positions of text they begin to show. Chapter 09 measures how they grow.
#
# As for accuracy: where the bars overlap, the order of the models is a matter of luck, of this seed and of this test. The width
# of the models is the same throughout, their learning rates are not, and nobody has tuned them all with equal care. A plot of
# quality against cost is fair to runs, not to ideas.
#
# ## What the figures do not show
#
# All of the above is *looking*. A map says where weights are large. It does not say that the answer depends on them: what
# is read may be the same everywhere, or be thrown away by the next gate, or be known from elsewhere. To find out, one has
# to **intervene**: change one thing inside the model, and measure what becomes of the answer.
#
# ### A part switched off
#
# Three interventions on trained models: the memory passes on only its skip, $\omega$ times what it reads now; what attention
# found is replaced by zeros; or by its own mean, so that it is blind, but of a size that the next layer knows. FastRPB can
# also lose its bias. For each the fall of the accuracy in points, with the standard error of this fall on these sequences
# (exercise 5 says how), and in parentheses how many answers changed, right or wrong.

# %%
short = batches["listops"].mask.sum(1).argsort(stable=True)[:80]  # the shorter ones, for speed
few = Batch(*(part[short] for part in batches["listops"]))


def answer(task, name, batch, part=None, mean=False):
    """The answers (B,), with a part of the model switched off; None where it has no such part."""
    model = runs[task, name].model
    if part is None:
        return opened.predictions(model, batch).argmax(1)
    with opened.switched_off(model, part, mean) as places:
        return opened.predictions(model, batch).argmax(1) if places else None


def fall(before, after):
    """Before minus after, and its standard error, both in points."""
    change = before.double() - after.double()
    return 100 * float(change.mean()), 100 * float(change.std()) / len(change) ** 0.5


WAYS = {"memory off": ("memory", False), "attention off": ("attention", False), "attention's mean": ("attention", True), "bias off": ("bias", False)}  # fmt: skip
falls, changed = {}, {}


def switch_off(task, batch):
    """Each part of each model in turn: print the falls, and keep them."""
    print(f"{task}, {len(batch.x)} sequences: right before, the fall in points, and (answers changed)")
    for name in MODELS[task]:
        whole = answer(task, name, batch)
        right, line = whole == batch.label, []
        for way, (part, mean) in WAYS.items():
            after = answer(task, name, batch, part, mean)
            if after is not None:
                falls[task, name, way] = fall(right, after == batch.label)
                changed[task, name, way] = int((after != whole).sum())
                line.append("{}: {:.0f} ± {:.0f} ({})".format(way, *falls[task, name, way], changed[task, name, way]))
        print(f"  {name:12}{100 * float(right.double().mean()):4.0f} %   " + "   ".join(line))


switch_off("listops", few)

# %%
switch_off("speech", batches["speech"])
assert falls["listops", "mega", "attention off"][0] > 10 and falls["listops", "mega", "memory off"][0] > 5
assert abs(falls["listops", "seqboat", "attention off"][0]) < 5 < falls["listops", "seqboat", "memory off"][0]
assert 5 <= changed["listops", "seqboat", "attention off"] <= 11, "the text says: one in ten"
gated = ("mega", "mega-chunk", "seqboat", "longvq")
assert min(falls["speech", name, "memory off"][0] for name in gated) > 50
assert max(falls["speech", name, "attention off"][0] for name in gated) < 45
assert abs(falls["speech", "mega-chunk", "attention off"][0]) < 6 < falls["speech", "longvq", "attention off"][0] < 25

# %%
fig, axes = plt.subplots(1, 2, figsize=(10.4, 3.8))
for ax, task in zip(axes, ("listops", "speech"), strict=True):
    names = MODELS[task]
    for i, way in enumerate(WAYS):
        having = [j for j, name in enumerate(names) if (task, name, way) in falls]
        values = np.array([falls[task, names[j], way] for j in having])
        place = np.array(having) + 0.2 * (i - 1.5)
        ax.errorbar(place, values[:, 0], yerr=values[:, 1], linestyle="none", capsize=2, label=way)
    ax.axhline(0, color="#55554F", linewidth=0.8)
    ax.set(title=f"{task}", xticks=range(len(names)))
    ax.set_xticklabels(names, rotation=40, ha="right")
axes[0].set_ylabel("fall of the accuracy (points)")
axes[1].legend(fontsize="small", bbox_to_anchor=(1.02, 1), loc="upper left")
worst = {task: max((k for k in falls if k[0] == task), key=lambda k: falls[k][0]) for task in ("listops", "speech")}
show(
    fig,
    "How far the accuracy falls when a part of a trained model is switched off, with standard errors, models side by side. "
    + " ".join(
        f"On {task} the deepest fall: {key[1]}, {key[2]}, {falls[key][0]:.0f} points." for task, key in worst.items()
    ),
)

# %% [markdown]
# Three observations, each of which no map could have given.
#
# **On speech the EMA carries the models.** Without its memory Mega, Mega-chunk, SeqBoat and LongVQ are lost; without attention
# most clips are still heard right. In Mega-chunk the loss of attention changes next to nothing, though it has as sharp a
# preference for distances as any; LongVQ, whose codes knew so much about the word, misses a few clips of twenty.
#
# **On ListOps SeqBoat gains nothing by its attention.** We have just looked at who wakes there, and found patterns: one
# operator, favourite digits. Switched off, about one answer in ten changes, as often for the better as for the worse: the
# accuracy stays. Mega, with the same kind of EMA, does need its attention. Both end at about the same accuracy: the headline
# can be had by different means.
#
# **How one switches off matters.** Zeros and the mean do not always agree. Neither is *the* right way: zeros may be a size that
# the next layer has never met, and a mean may carry half of the message.
#
# ### Does waking matter?
#
# SeqBoat wakes some tokens more than others. It is tempting to say: because they are the important ones. That is a
# correlation, and a claim about causes. Test it. The same model, the same number of waking tokens in each sequence and
# layer, but *other* tokens: drawn at random (exercise 4), or nobody at all, or everybody.

# %%
noise = torch.Generator().manual_seed(0)


def at_random(active, mask):
    """As many real tokens as are awake, in each sequence, drawn at random."""
    score = torch.rand(active.shape, generator=noise).masked_fill(~mask, -1)
    return score.argsort(1, descending=True).argsort(1) < (active & mask).sum(1, keepdim=True)


CHOICES = {
    "as many at random": at_random,
    "those that slept": lambda active, mask: ~active & mask,
    "nobody": lambda active, mask: torch.zeros_like(active),
    "everybody": lambda active, mask: mask,
}
rewiring = {}
for task, batch in (("listops", few), ("speech", batches["speech"])):
    whole = answer(task, "seqboat", batch) == batch.label
    model = runs[task, "seqboat"].model
    line = []
    for name, choose in CHOICES.items():
        with opened.rewired(model, choose):
            after = opened.predictions(model, batch).argmax(1) == batch.label
        rewiring[task, name] = fall(whole, after)
        line.append("{}: {:.0f} ± {:.0f}".format(name, *rewiring[task, name]))
    print(
        f"{task}, {len(batch.x)} sequences, {100 * float(whole.double().mean()):.0f} % right. Fall when awake are",
        "   ".join(line),
    )
assert max(abs(drop) for (task, _), (drop, _) in rewiring.items() if task == "listops") < 5, (
    "the text says: no difference"
)
assert round(rewiring["speech", "nobody"][0]) == 5, "the text says: one clip of twenty"
assert rewiring["speech", "as many at random"][0] == rewiring["speech", "those that slept"][0] == 0, "it says: none"

# %% [markdown]
# On ListOps the accuracy does not tell who wakes, nor whether anybody does: the pattern that we saw is real, and adds nothing
# to it. On speech putting everybody to sleep costs one clip of twenty, which may be chance, and waking *others*, as many,
# costs none. So the rate is no measure of importance, and a table of who wakes is no table of what matters.
#
# (A fair warning about the warning: twenty clips are few, and here the standard error does not say so: "0 ± 0" only means
# that none of twenty changed, which a true fall of 14 points would still show one time in twenty. And a model of this size
# that was trained for longer might come to need the choice; chapter 05 explains by which gradient it would learn it.)
#
# ### Does being read matter?
#
# The same question about attention. Take an expression; hide one token at a time from the model (its place is masked, so
# nobody hears it), and see how much the probabilities of the ten answers move. If attention explained the answer, the
# tokens that are read most would be the ones that are missed most. In the figure each dot is a token.


# %%
def missed(model, x):
    """How far the probabilities move when each token is hidden in turn: half the sum of all changes, ``(L,)``."""
    length = len(x)
    mask = ~torch.eye(length + 1, length, dtype=torch.bool)
    mask[length] = True
    p = torch.softmax(opened.predictions(model, Batch(x.expand(length + 1, -1), mask, x)), -1)
    return 0.5 * (p[:length] - p[length]).abs().sum(1)


def ranks(values):
    """Places in the order of size, as numbers; equal values share the mean of their places."""
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1).double() - 1) / 2


def correlation(a, b):
    """Spearman's: the correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


fig, axes = plt.subplots(1, 2, figsize=(10, 3.7))
examined = [name for name in ("mega", "seqboat", "spade") if name in MODELS["listops"]][:2]
shortest = np.argsort(samples["listops"].lengths, kind="stable")[:6].tolist()
related, idle = {}, 0
for ax, name in zip(axes, examined, strict=True):
    model = runs["listops", name].model
    related[name] = []
    for i in shortest:
        x, _ = samples["listops"][i]
        ones = torch.ones(1, len(x), dtype=torch.bool)
        received = torch.stack([w.mean((0, 1)) for w in opened.attention_maps(model, x[None], ones)]).mean(0)
        effect = missed(model, x)
        idle += int(((received > 5 / len(x)) & (effect < 0.02)).sum()) if name == "mega" else 0
        related[name].append(correlation(received, effect))
        ax.plot(100 * received, effect, linestyle="none", markersize=3.5)
    ax.set(xlabel="attention received (% of all)", title=f"{name} on listops", ylabel="missed: change of the answer")
show(
    fig,
    "Each dot a token of one of six ListOps expressions: attention received against the change of the answer when it is "
    "hidden. Rank correlations within an expression, on average: "
    + ", ".join(f"{name} {np.mean(values):.1f}" for name, values in related.items())
    + ".",
)
assert 0.2 < np.mean(related["mega"]) < 0.9 and idle > 0, (
    "the text says: related, some read by all and missed by nobody"
)
assert np.mean(related["seqboat"]) > 0.1, "the text says: and yet a correlation"
for name, values in related.items():
    print(f"{name}: rank correlation within each expression", ", ".join(f"{v:.1f}" for v in values))

# %% [markdown]
# In Mega the two are related, and far from the same: some of the tokens that are read most are missed by nobody. (And hiding a
# token takes it from the EMA and from the pooling as well, so part of what is missed was never attention's.) SeqBoat's
# attention does not help here, as we now know, and yet a weak correlation comes out. What the model misses and what its
# attention happens to look at have a common cause, the tokens themselves.
#
# Whether attention explains anything was argued in public (Jain and Wallace, "Attention is not Explanation", 2019; Wiegreffe
# and Pinter, "Attention is not not Explanation", 2019). For this course the practical answer is enough: **look at the map to get
# an idea, intervene to test it.**
#
# ### And besides
#
# - **One seed.** Each run was made once. Another seed gives other codes, other waking tokens, perhaps other time scales;
#   the standard errors above are about the sequences, not about the seeds.
# - **Small models, short tasks.** 64 channels, two to four layers, minutes of training.
# - **What is switched off was relied upon, not needed.** A model that had been trained without the part might do as well:
#   that is another experiment, and the table at the top holds some of it.
# - **A missing effect can have two causes.** The part is not used, or the rest stands in for it.
#
# ## The panel
#
# All runs, layer by layer. Choose the task, the model, a layer, an example, and what to look at. Give it runs of your own
# with `Opened(opened.load_runs(Path("runs"), recipe="..."))`.

# %%
panel = Opened(runs, {task: split.select(np.arange(min(10, len(split)))) for task, split in samples.items()})
panel

# %%
print(panel.set(task="listops", model="seqboat", layer=3, view="token by token").say(), "\n")
print(panel.set(task="speech", model="spade", layer=1, view="memory").say(), "\n")
print(panel.set(task="listops", model="longvq", layer=1, view="token by token").say(), "\n")
print(panel.set(task=TASKS[-1], model="seqboat", layer=2, view="how far attention goes").say(), "\n")
print(panel.set(task="speech", model="mega", layer=2, example=4, view="attention map").say())

# %% [markdown]
# ## Exercises
#
# ### Exercise 1 · How long an average remembers
#
# Difficulty: ●○○ · Importance: ●●● · 5 minutes
#
# Write `half_life(alpha, delta)`: after how many steps has an average with these coefficients, both `(D, n)` and in (0, 1),
# forgotten half of what it was given? A tensor `(D, n)` of steps, not rounded.
#
# <details><summary>Hint 1</summary>
#
# In each step it keeps `1 - alpha * delta`. Solve `(1 - alpha * delta) ** t = 1/2` for t.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# For very slow averages `1 - alpha * delta` is rounded to 1. `torch.log1p(-x)` is `log(1 - x)` without that loss.
#
# </details>


# %%
def half_life(alpha, delta):
    """alpha, delta (D, n) in (0, 1) -> half-lives (D, n), in steps."""
    # BEGIN SOLUTION "your turn: solve (1 - alpha delta)^t = 1/2 for t"
    return -np.log(2) / torch.log1p(-alpha * delta)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.learned import check_half_life

check_half_life(half_life)

# %% [markdown]
# ### Exercise 2 · How far attention goes
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# Write `distance_profile(weights, mask)`. `weights (L, L)` is one attention map, row = query; `mask (L,)` is bool, `True` for
# real positions. Bring each row to sum 1 (a Laplace function does not), and give, for each distance $0, 1, \dots, L-1$, the
# share of a real query's attention that goes exactly so far, to either side, averaged over the real queries. `(L,)`, sum 1.
#
# <details><summary>Hint 1</summary>
#
# `(torch.arange(L)[:, None] - torch.arange(L)).abs()` holds the distance of every pair.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `torch.zeros(L).index_add(0, distances, values)` adds each value to the entry of its distance.
#
# </details>


# %%
def distance_profile(weights, mask):
    """weights (L, L), mask (L,) bool -> (L,), entry d for the keys d steps away; sums to 1."""
    # BEGIN SOLUTION "your turn: rows of sum 1, added up by distance"
    place = torch.arange(len(mask))
    share = weights[mask] / weights[mask].sum(-1, keepdim=True)  # (real queries, L)
    apart = (place[mask, None] - place).abs()
    total = torch.zeros(len(mask), dtype=weights.dtype).index_add(0, apart.flatten(), share.flatten())
    return total / mask.sum()
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.learned import check_distance_profile

check_distance_profile(distance_profile)

# %% [markdown]
# ### Exercise 3 · Codes in use
#
# Difficulty: ●●○ · Importance: ●●○ · 10 minutes
#
# Write `codes_in_use(codes, mask)`: the perplexity of the codes `(B, L)`, whole numbers, over all real positions of the
# batch. A number: 1 if all keys have one name, $S$ if $S$ names are used equally.
#
# <details><summary>Hint 1</summary>
#
# Count each code among the real positions; divide by how many there are; that is $p_c$.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# A code that does not occur adds 0 to the entropy, but `0 * log(0)` is not a number: leave it out.
#
# </details>


# %%
def codes_in_use(codes, mask):
    """codes (B, L) long, mask (B, L) bool -> the effective number of codes."""
    # BEGIN SOLUTION "your turn: exp of the entropy of the shares"
    share = torch.bincount(codes[mask]).double() / mask.sum()
    share = share[share > 0]
    return float(torch.exp(-(share * share.log()).sum()))
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.learned import check_codes_in_use

check_codes_in_use(codes_in_use)

# %% [markdown]
# ### Exercise 4 · A fair control
#
# Difficulty: ●●○ · Importance: ●●● · 15 minutes
#
# "These tokens matter" is tested against *as many others*. Write `control(active, mask, noise)`: for each sequence, as many
# real tokens as are active there, namely those with the largest `noise`. All `(B, L)`: `active` and `mask` bool, `noise`
# between 0 and 1; the result is bool.
#
# <details><summary>Hint 1</summary>
#
# Give padding a noise below all others first.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# `noise.argsort(1, descending=True).argsort(1)` is each token's rank, 0 for the largest.
#
# </details>


# %%
def control(active, mask, noise):
    """active, mask bool (B, L), noise (B, L) in [0, 1) -> bool (B, L)."""
    # BEGIN SOLUTION "your turn: the k tokens with the largest noise, k from each sequence"
    rank = noise.masked_fill(~mask, -1.0).argsort(1, descending=True).argsort(1)
    return rank < (active & mask).sum(1, keepdim=True)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.learned import check_control

check_control(control)

# %% [markdown]
# ### Exercise 5 · A fall, and how sure we are
#
# Difficulty: ●●○ · Importance: ●●● · 10 minutes
#
# Write `paired_fall(before, after)`: `before (n,)` says which answers were right, `after (n,)` which are right after an
# intervention *on the same sequences*; both bool. Return the fall of the accuracy, a share, and its standard error: two
# numbers.
#
# <details><summary>Hint 1</summary>
#
# For each sequence the difference is 1, 0 or -1. The fall is their mean.
#
# </details>
#
# <details><summary>Hint 2</summary>
#
# The standard error of a mean is the standard deviation (with $n - 1$) divided by $\sqrt n$. Two separate errors added up
# would be larger: they forget that both times the same sequences were asked.
#
# </details>


# %%
def paired_fall(before, after):
    """bool (n,), bool (n,) -> the fall of the accuracy and its standard error."""
    # BEGIN SOLUTION "your turn: the mean of the differences, and its error"
    change = before.double() - after.double()
    return float(change.mean()), float(change.std() / len(change) ** 0.5)
    # END SOLUTION


# %%
from longseq_tutorial.classroom.checks.learned import check_paired_fall

check_paired_fall(paired_fall)

# %% [markdown]
# ## What to remember
#
# - Begin with the start: a pattern counts as learned only against the untrained model, rebuilt from its seed.
# - A half-life is $\ln\tfrac12 / \ln(1-\alpha\delta)$ (Mega, section 3). A kernel's reach asks the fairer question, of any memory. In
#   minutes of training the EMAs here kept their decays and re-weighed them; S4's long reach was there from the beginning.
# - Any attention is a matrix: hand it the identity as values. Many matrices are one curve: the share of attention against the
#   distance, beside that of an even spread.
# - A rate of waking, a perplexity of codes, bits of information: each wants its control, equal in number, shuffled, or untrained.
# - On ListOps every road led to the head of the expression: Mega's map, LongVQ's four clear codes, FastRPB's slope. That is
#   what most of the accuracy of these models is made of.
# - What is visible may be of no use: SeqBoat on ListOps has a pattern of waking, and is right as often without it. Only an
#   intervention tells, with an error bar; and it tells what *this* model relies upon, not what the task requires.
# - One seed, small models, short tasks: that much belongs beside every sentence above.
#
# ### Sources
#
# - Ma et al., "Mega: Moving Average Equipped Gated Attention", ICLR 2023: the damped EMA and its initial values.
# - Gu, Goel and Ré, "Efficiently Modeling Long Sequences with Structured State Spaces", ICLR 2022; Zuo et al., "Efficient Long
#   Sequence Modeling via State Space Augmented Transformer", 2022: S4, and SPADE.
# - Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", NeurIPS 2023: the switch.
# - Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", ICLR 2024: the codes that LongVQ, our
#   reconstruction, uses.
# - Zubkov and Gavrilov, "FastRPB: a Scalable Relative Positional Encoding for Long Sequence Tasks", 2022.
# - Jain and Wallace, "Attention is not Explanation", NAACL 2019; Wiegreffe and Pinter, "Attention is not not Explanation",
#   EMNLP 2019.
#
# This is the last chapter. You have built eight mechanisms, seen them agree with their authors' numbers, trained the systems and
# opened them. Train one of your own, with another seed or another task, and open it: the panel takes it.
