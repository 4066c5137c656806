"""Trained models opened: maps that give back what attention found, parts that are really off, times that are right."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial import models, tasks, training
from longseq_tutorial.classroom import opened
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.gated_attention import GatedAttention
from longseq_tutorial.mechanisms.linear_attention import LinearAttention
from longseq_tutorial.mechanisms.s4 import S4
from longseq_tutorial.mechanisms.sparse_activation import SparseActivation
from longseq_tutorial.mechanisms.vq_attention import VQAttention
from longseq_tutorial.models.spade import LocalAttention
from longseq_tutorial.models.transformer import TransformerBlock

LETTERS = tasks.TaskConfig(name="letters", kind="tokens", classes=4, length=40, vocabulary=12)
SOUND = tasks.TaskConfig(name="sound", kind="samples", classes=3, length=200, sample_rate=8000)
SMALL = {
    "mega": {"z_dim": 4, "v_dim": 12, "ffn_dim": 8},
    "mega-chunk": {"z_dim": 4, "v_dim": 12, "ffn_dim": 8, "chunk": 5},
    "seqboat": {"z_dim": 4, "v_dim": 12, "window": 3},
    "longvq": {"z_dim": 4, "v_dim": 12, "ffn_dim": 8, "codes": 6, "window": 2},
    "fastrpb": {"heads": 2, "qkv_dim": 8, "ffn_dim": 8, "max_positions": 40},
    "spade": {"heads": 2, "ffn_dim": 8, "window": 3, "state": 8},
    "transformer": {"heads": 2, "ffn_dim": 8},
}


def built(name, task=LETTERS, **more):
    torch.manual_seed(1)
    model = models.build(name, task, dim=8, layers=2, head_dim=8, **{**SMALL[name], **more}).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith(("h_proj.weight", "kappa", "mx_proj.weight")):
                p.mul_(30)  # gated units begin almost silent
    return model


def batch(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    items = [(torch.randint(1, 12, (n,), generator=generator), n % 4) for n in lengths]
    return tasks.collate(items)


# ---- attention --------------------------------------------------------------------------------------------------


def seen(model, x, mask):
    """What goes into and comes out of every module, in one call."""
    found = {}
    hooks = [m.register_forward_hook(lambda m, a, o: found.update({m: (a, o)})) for m in model.modules()]
    with torch.no_grad():
        model(x, mask)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def rebuilt(module, weights, found):
    """What attention gives, from the map alone; and what the module gave."""
    if isinstance(module, TransformerBlock):
        (x, *_), _ = found[module]
        v = module._heads(module.norm1(x))[2]
        return (weights @ v[0]).transpose(0, 1).flatten(1), found[module.out][0][0][0]
    if isinstance(module, GatedAttention):
        v = F.silu(found[module.v_proj][1])[0]
        return (weights[0] @ v) * found[module.reset_gate][1][0], found[module.h_proj][0][0][0]
    if isinstance(module, LocalAttention):
        v = module._split(found[module.v][1])[0]
        return module.o((weights @ v).transpose(0, 1).flatten(1)), found[module][1][0]
    if isinstance(module, LinearAttention):
        return weights @ found[module][0][2][0], found[module][1][0]
    if isinstance(module, VQAttention):
        return (weights @ found[module][0][2][0]), found[module][1][0][0]
    (h, *_), y = found[module]
    _, _, v, reset = module._project(h[0], torch.arange(h.shape[1]))
    active, confidence = found[module.router][1]
    y_again = module.h_proj((weights[0] @ v) * reset) * (active * confidence)[0, :, None]
    return y_again, y[0]


KINDS = (TransformerBlock, GatedAttention, LocalAttention, LinearAttention, VQAttention, SparseActivation)


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("length", [1, 2, 7, 23, 30])
def test_a_map_times_the_values_is_what_attention_found(name, length):
    model, (x, mask, _) = built(name), batch(length)
    maps, found = opened.attention_maps(model, x, mask), seen(model, x, mask)
    modules = [module for module in model.modules() if isinstance(module, KINDS)]
    assert len(maps) == len(modules) >= 2
    for weights, module in zip(maps, modules, strict=True):
        assert weights.shape[1:] == (length, length)
        again, truth = rebuilt(module, weights, found)
        assert torch.allclose(again, truth, atol=1e-10)


@pytest.mark.parametrize("local", ["window", "chunk"])
def test_spade_in_windows_and_in_chunks(local):
    model, (x, mask, _) = built("spade", local=local, window=4), batch(19)
    apart = (torch.arange(19)[:, None] - torch.arange(19)).abs()
    same = torch.arange(19)[:, None] // 4 == torch.arange(19) // 4
    hidden = apart > 4 if local == "window" else ~same
    for weights in opened.attention_maps(model, x, mask):
        assert torch.allclose(weights.sum(-1), torch.ones(2, 19).double())
        assert (weights[:, hidden] == 0).all() and (weights[:, ~hidden] > 0).all()


def test_maps_of_a_signal_have_a_row_for_each_patch():
    model = built("transformer", SOUND, patch=((8, 4), (4, 4)))
    x, mask = torch.randn(1, 100).double(), torch.ones(1, 100, dtype=torch.bool)
    assert [tuple(w.shape) for w in opened.attention_maps(model, x, mask)] == [(2, 7, 7)] * 2
    assert opened.positions(model, x, mask).shape == (1, 7)


def test_maps_are_for_one_sequence():
    x, mask, _ = batch(3, 5)
    with pytest.raises(ValueError, match=r"wanted one sequence \(1, L\); got \(2, 5\)"):
        opened.attention_maps(built("mega"), x, mask)


def test_distance_profile():
    even = opened.distance_profile(torch.ones(1, 3, 3))
    assert torch.allclose(even, torch.tensor([3, 4, 2]).double() / 9)
    weights = torch.rand(2, 4, 6, 6)
    weights[1, 2, 5] = 0  # a query that reads nothing is left out
    assert math.isclose(float(opened.distance_profile(weights).sum()), 1, rel_tol=1e-6)
    assert opened.distance_profile(torch.eye(5)[None]).tolist() == [1, 0, 0, 0, 0]
    assert opened.distance_profile(torch.zeros(1, 4, 4)).sum() == 0
    first = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [1, 0, 0]]])
    assert opened.distance_profile(first, torch.tensor([True, True, False])).tolist() == [0.5, 0.5, 0]


# ---- memories ---------------------------------------------------------------------------------------------------


def test_half_lives():
    ema = DampedEMA(3, 4, bidirectional=True).double()
    lives = opened.half_lives(ema)
    alpha, delta, _, _ = ema.coefficients()
    assert lives.shape == (6, 4)
    assert torch.allclose((1 - alpha * delta) ** lives, torch.full((6, 4), 0.5).double())


def test_reach_of_a_kernel_that_is_known():
    decay = torch.tensor([[0.5], [0.99]]) ** torch.arange(1000)
    assert opened.reach(decay * torch.tensor([[1.0], [-3.0]])).tolist() == [4, 230]  # 1 - phi**n >= 0.9
    assert opened.reach(decay[:, :1]).tolist() == [1, 1]
    assert opened.reach(torch.tensor([[0.0, 0, 1]]), 0.5).tolist() == [3]


def test_memories_in_order_and_their_kernels():
    assert [type(m) for m in opened.memories(built("seqboat"))] == [DampedEMA] * 2
    (s4,) = opened.memories(built("spade"))
    assert isinstance(s4, S4) and opened.kernels(s4, 9).shape == (16, 9)
    assert opened.memories(built("transformer")) == []


# ---- parts switched off -------------------------------------------------------------------------------------------


def answers(model, data):
    with torch.no_grad():
        return model(data.x, data.mask)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("part", ["memory", "attention", "bias"])
def test_a_part_comes_off_and_goes_back(name, part, mean):
    model, data = built(name), batch(9, 14, 30)
    whole = answers(model, data)
    with opened.switched_off(model, part, mean) as places:
        without = answers(model, data)
    expected = {
        "memory": {"mega": 2, "mega-chunk": 2, "seqboat": 2, "longvq": 2, "spade": 1}.get(name, 0),
        "attention": 2,
        "bias": 2 if name == "fastrpb" else 0,
    }
    assert places == expected[part]
    assert torch.equal(whole, answers(model, data))
    assert torch.equal(without, whole) == (places == 0)


def test_switched_off_is_the_same_as_parameters_of_zero():
    data = batch(12, 20)
    for name, part, ending in (
        ("mega", "memory", "ema.eta"),
        ("spade", "memory", "global_branch.C"),
        ("mega", "attention", "h_proj"),
        ("longvq", "attention", "h_proj"),
        ("seqboat", "attention", "attention.h_proj"),
        ("spade", "attention", "attention.o.weight"),
        ("transformer", "attention", ".out"),
        ("fastrpb", "bias", "bias.weight"),
    ):
        model = built(name)
        with opened.switched_off(model, part):
            off = answers(model, data)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if key.startswith("encoder.layers") and (key.endswith(ending) or f"{ending}." in key):
                    p.zero_()
        assert torch.allclose(off, answers(model, data), atol=1e-12), name


def test_the_mean_is_over_real_positions():
    model, data = built("mega"), batch(6, 17)
    captured = []
    with opened.switched_off(model, "attention", mean=True):
        first = model.encoder.layers[0].mega.attention.h_proj
        hook = first.register_forward_hook(lambda m, a, o: captured.append((a[0], o)))
        answers(model, data)
        hook.remove()
    inside, given = captured[0]
    wanted = F.linear(inside, first.weight, first.bias)[data.mask].mean(0)
    assert torch.allclose(given, wanted.expand_as(given))
    longer = tasks.Batch(F.pad(data.x, (0, 5)), F.pad(data.mask, (0, 5)), data.label)
    with opened.switched_off(model, "memory", mean=True):
        assert torch.allclose(answers(model, data), answers(model, longer))


def test_an_unknown_part():
    with pytest.raises(ValueError, match="part must be one of memory, attention, bias; got 'gate'"):
        opened.switched_off(built("mega"), "gate").__enter__()


def test_rewiring():
    model, data = built("seqboat"), batch(9, 14, 30)
    whole, awake = answers(model, data), opened.waking(model, data.x, data.mask)
    assert awake.shape == (2, 3, 30) and not awake[:, ~data.mask].any()
    with opened.rewired(model, lambda active, mask: active):
        assert torch.equal(answers(model, data), whole)
    with opened.rewired(model, lambda active, mask: torch.ones_like(active)):
        assert torch.equal(opened.waking(model, data.x, data.mask), data.mask.expand(2, -1, -1))
    with opened.rewired(model, lambda active, mask: torch.zeros_like(active)):
        nobody = answers(model, data)
    with opened.switched_off(model, "attention"):
        assert torch.equal(answers(model, data), nobody)
    assert torch.equal(answers(model, data), whole)
    with pytest.raises(ValueError, match="no switch to rewire"), opened.rewired(built("mega"), lambda a, m: a):
        pass


def test_codes():
    model, data = built("longvq"), batch(9, 14)
    named = opened.codes(model, data.x, data.mask)
    assert named.shape == (2, 2, 14) and 0 <= int(named.min()) and int(named.max()) < 6
    assert len(opened.quantizers(model)) == 2 and len(opened.biases(built("fastrpb"))) == 2


# ---- what they read -----------------------------------------------------------------------------------------------


def test_predictions_in_any_order_of_lengths():
    model, data = built("longvq"), batch(30, 3, 11, 30, 1, 24)
    assert torch.allclose(opened.predictions(model, data, size=2), answers(model, data), atol=1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two updates on short expressions: a record and its weights."""
    out = tmp_path_factory.mktemp("runs")
    short = dict(train=64, valid=8, test=8, min_length=10, max_length=40)
    recipe = training.Recipe(
        task="listops", model="mega", name="laptop", data=short, updates=2, batch=8, lr=0.01, warmup=1,
        overrides=dict(dim=8, layers=1, z_dim=4, v_dim=8, ffn_dim=8, head_dim=8, truncation=None), source="here",
    )  # fmt: skip
    record = training.fit(recipe, seed=3, out=out, data=out, cpu=True, progress=False)
    return out, record


def test_runs_their_start_and_their_test(run):
    folder, record = run
    ((key, found),) = opened.load_runs(folder, seed=3).items()
    assert key == ("listops", "mega") and found.record == record
    assert opened.load_runs(folder, seed=0) == {}
    start = opened.fresh(record)
    assert not start.training
    changed = [(a - b).abs().max() for a, b in zip(start.parameters(), found.model.parameters(), strict=True)]
    assert 0 < max(changed) < 0.05  # two updates away
    again = opened.fresh(record)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), again.parameters(), strict=True))

    split = opened.sample(record, 8)
    whole = tasks.load("listops", root=folder, progress=False, **record.recipe["data"])
    assert [x.tolist() for x, _ in (split[i] for i in range(8))] == [whole.test[i][0].tolist() for i in range(8)]
    data = tasks.collate([split[i] for i in range(8)])
    right = (opened.predictions(found.model, data).argmax(1) == data.label).double().mean()
    assert math.isclose(float(right), record.test["accuracy"])
    assert opened.pieces(record, split[0][0])[0] in ("[MIN", "[MAX", "[MED", "[SM")
    assert opened.step_size(record) == (1, "tokens")


def test_samples_of_speech_and_text(run):
    _, record = run
    text = training.records.Record(
        **{**vars(record), "task": {**record.task, "name": "text"}, "recipe": {"data": {"length": 50}}}
    )
    split = opened.sample(text, 4)
    assert len(split) == 4 and int(split.lengths.max()) <= 50
    assert "".join(opened.pieces(text, split[0][0])).isprintable() and opened.step_size(text) == (1, "bytes")
    heard = {**record.task, "name": "speech", "kind": "samples", "sample_rate": 8000}
    config = {**record.config, "patch": [[40, 10], [8, 8]]}
    speech = training.records.Record(**{**vars(record), "task": heard, "config": config, "recipe": {"data": {}}})
    assert len(opened.sample(speech)) == 20 and opened.step_size(speech) == (10, "ms")
    other = training.records.Record(**{**vars(record), "task": {**record.task, "name": "image"}})
    with pytest.raises(ValueError, match="listops, speech or text; got one on 'image'"):
        opened.sample(other)


def test_a_byte_without_a_character_is_a_dot(run):
    _, record = run
    text = training.records.Record(**{**vars(record), "task": {**record.task, "name": "text"}})
    assert opened.pieces(text, torch.from_numpy(np.array([ord("a") + 1, 11, 256]))) == ["a", "·", "·"]
