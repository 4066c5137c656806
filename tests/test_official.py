"""Our modules with the authors' parameters give the authors' numbers: outputs, gradients, statistics, streaming."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from longseq_tutorial import official
from longseq_tutorial.mechanisms import sparse_activation
from longseq_tutorial.models import record
from tests import golden_numbers as golden

LAYERS, BLOCKS = golden.names("mega_layer"), golden.names("mega_block")
LEAKING = "seqboat_layer_laplace_globalpos_layernorm_prenorm"  # a habit of the authors' code that ours does not share
SEQBOATS = [name for name in golden.names("seqboat_layer") if name != LEAKING]


def close(got, want, tolerance=1e-9, what=""):
    np.testing.assert_allclose(got.detach().cpu().numpy(), want, rtol=0, atol=tolerance, err_msg=what)


def layer(name, arrays, device="cpu"):
    if name.startswith("seqboat"):
        module = official.seqboat_layer(golden.state_dict(arrays), **golden.seqboat_options(name))
    else:
        make = official.mega_block if name in BLOCKS else official.mega_layer
        module = make(golden.state_dict(arrays), **golden.layer_options(name))
    assert not module.training
    module.train(bool(arrays.get("train_mode", False)))
    mask = None if "padding_mask" not in arrays else ~torch.from_numpy(arrays["padding_mask"]).to(device)
    return module.to(device), golden.batch_first(arrays["x"]).to(device), mask


@pytest.mark.parametrize("device", golden.DEVICES)
@pytest.mark.parametrize("name", LAYERS + BLOCKS + SEQBOATS)
def test_outputs_and_every_gradient(name, device):
    compare(name, device)


def compare(name, device="cpu"):
    arrays, tolerance = golden.load(name), golden.tolerance(name)
    module, x, mask = layer(name, arrays, device)
    x.requires_grad_()
    y = module(x, mask=mask)
    close(y.transpose(0, 1), arrays["out"], tolerance)
    if "cotangent" not in arrays:
        assert name in BLOCKS  # the files of whole blocks hold outputs only
        return
    (y * golden.batch_first(arrays["cotangent"]).to(device)).sum().backward()
    close(x.grad.transpose(0, 1), arrays["grad_x"], tolerance, "input")
    gradients = official.authors_names(module, gradients=True)
    wanted = {k.removeprefix("grad."): v for k, v in arrays.items() if k.startswith("grad.")}
    assert gradients.keys() == wanted.keys()
    for parameter, want in wanted.items():
        close(gradients[parameter], want, tolerance, parameter)
    after = official.authors_names(module)
    for key, want in arrays.items():
        if key.startswith("buffer_after."):
            close(after[key.removeprefix("buffer_after.")], want, tolerance, key)


@pytest.mark.parametrize("name", LAYERS)
def test_what_the_recorder_sees_is_what_the_authors_saw(name):
    arrays = golden.load(name)
    module, x, mask = layer(name, arrays)
    with record(module) as tape:
        y = module(x, mask=mask)
    close(y.transpose(0, 1), arrays["out"], golden.tolerance(name))
    weights = tape["weights"]
    weights = weights.unsqueeze(1) if weights.dim() == 3 else weights  # (B, chunks, C, C)
    close(weights, arrays["attn_weights"], golden.tolerance(name))


@pytest.mark.parametrize("name", [n for n in LAYERS if "causal" in n])
def test_token_by_token(name):
    arrays = golden.load(name)
    module, x, _ = layer(name, arrays)
    state, steps = module.initial_state(x.shape[0]), []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = module.step(x[:, t], state)
            steps.append(y)
    close(torch.stack(steps), arrays.get("out_incremental", arrays["out"]), golden.tolerance(name))


@dataclass(frozen=True)
class Model:
    task: str
    options: dict


MODELS = {
    "mega_model_text_chunk5_autopad": Model(
        "text", dict(attention="softmax", norm="layernorm", prenorm=False, chunk=5)
    ),
    "mega_model_text_full": Model("text", dict(attention="softmax", norm="scalenorm", prenorm=False)),
    "mega_model_retrieval_two_tower": Model("retrieval", dict(attention="softmax", norm="scalenorm", prenorm=False)),
}


def build_model(name):
    arrays, model = golden.load(name), MODELS[name]
    made = official.mega_classifier(
        golden.state_dict(arrays), task=model.task, bidirectional=True, truncation=10, **model.options
    )
    return made, arrays


def tokens(arrays, which=""):
    x = torch.from_numpy(arrays[f"tokens{which}"])
    return x, torch.arange(x.shape[1]) < torch.from_numpy(arrays[f"lengths{which}"])[:, None]


@pytest.mark.parametrize("device", golden.DEVICES)
@pytest.mark.parametrize("name", [n for n in MODELS if "text" in n])
def test_whole_text_classifier(name, device):
    model, arrays = build_model(name)
    x, mask = (tensor.to(device) for tensor in tokens(arrays))
    with record(model.to(device)) as tape:
        logits = model(x, mask=mask)
    close(logits, arrays["logits"])
    close(tape["pooled"], arrays["sentence_rep"])


# ---- SeqBoat -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SEQBOATS, LEAKING])
def test_the_switch_decides_as_the_authors_did(name):
    arrays = golden.load(name)
    if "probs" not in arrays:  # their variant that always attends
        return
    module, x, mask = layer(name, arrays)
    with record(module) as tape:
        module(x, mask=mask)
    np.testing.assert_array_equal(tape["active_seen"].bool().numpy(), arrays["active_mask"][:, 0])
    close(tape["confidence_seen"], arrays["probs"][:, 0].max(-1))


def test_a_layer_that_never_wakes_up_gives_its_attention_no_gradient():
    name = "seqboat_layer_relu2_globalpos_layernorm_none_active"
    module, x, _ = layer(name, golden.load(name))
    module(x).sum().backward()
    gradients = official.authors_names(module, gradients=True)
    idle = ("gamma", "beta", "h_proj.weight", "h_proj.bias", "mx_proj.weight", "q_router.temp")
    assert all(gradients[parameter].abs().max() == 0 for parameter in idle)
    assert gradients["hx_proj.weight"][:2].abs().max() == 0, "nothing can ever wake it up through the switch"
    assert gradients["hx_proj.weight"][2:].abs().max() > 0


def leaky(q, k, v, window, *, function, bias, positions, valid, causal, on_weights):
    """memory_attention as the authors' code does it: hidden scores become 0, and laplace(0) is more than nothing."""
    assert not causal and window < q.shape[1]
    length = q.shape[1]
    total = length + -length % window

    def views(x, beyond):
        """Each block of keys with its neighbours; ``beyond`` fills the blocks outside the sequence."""
        x = torch.nn.functional.pad(x, (0, 0, 0, total - length))
        x = torch.nn.functional.pad(x, (0, 0, window, window), value=beyond)
        return x.unfold(1, 3 * window, window).transpose(2, 3)  # (B, N, 3 w, d)

    queries = torch.nn.functional.pad(q, (0, 0, 0, total - length)).unflatten(1, (-1, window))
    rank = torch.arange(window)[:, None] - torch.arange(3 * window) + window  # i - j
    seen = views(valid.unsqueeze(-1).double(), 0).transpose(2, 3).bool() & (rank.abs() <= window)
    there, here = views(positions.unsqueeze(-1), 0).transpose(2, 3), positions.unsqueeze(-1)
    here = torch.nn.functional.pad(here, (0, 0, 0, total - length)).unflatten(1, (-1, window))
    scores = queries @ views(k, -1.0).transpose(2, 3) / (2 * window) + bias[there - here + len(bias) // 2]
    weights = function(scores.masked_fill(~seen, 0.0))
    return (weights @ views(v, -1.0)).flatten(1, 2)[:, :length]


def test_hidden_keys_do_not_leak_as_the_authors_do(monkeypatch):
    arrays = golden.load(LEAKING)
    module, x, _ = layer(LEAKING, arrays)
    assert np.abs(module(x).transpose(0, 1).detach().numpy() - arrays["out"]).max() > 1e-3
    monkeypatch.setattr(sparse_activation, "memory_attention", leaky)
    compare(LEAKING)  # the leak is all the difference, in values and in every gradient


def uncompressed(self, h, logits, mask=None):
    """SparseActivation.forward as the authors' code does it: one fully active sample, and nothing is compressed."""
    active, confidence = self.router(logits, mask)
    if not active.all(1).any():
        return forward(self, h, logits, mask)
    time = torch.arange(h.shape[1]).expand(active.shape)
    return (confidence * active).unsqueeze(-1) * self._attend(h, time, active)


forward = sparse_activation.SparseActivation.forward


def test_neighbours_in_the_batch_change_nothing_as_they_do_with_the_authors(monkeypatch):
    arrays = golden.load("seqboat_quirk_batch_dependence")
    options = dict(attention="softmax", window=2, bias="global", norm="layernorm", prenorm=True, bidirectional=True)
    module = official.seqboat_layer(golden.state_dict(arrays), **options)
    mixed, full = golden.batch_first(arrays["x_mixed"]), golden.batch_first(arrays["x_full"])
    together = module(torch.cat([mixed, full]))
    close(together[:1].transpose(0, 1), arrays["out_mixed_alone"])
    close(together[1:].transpose(0, 1), arrays["out_full_alone"])
    assert np.abs(arrays["out_mixed_alone"] - arrays["out_mixed_with_full"]).max() > 0.05
    monkeypatch.setattr(sparse_activation.SparseActivation, "forward", uncompressed)
    close(module(torch.cat([mixed, full]))[:1].transpose(0, 1), arrays["out_mixed_with_full"])


def seqboat_model(name, **options):
    arrays = golden.load(name)
    options = dict(attention="softmax", bias="global", window=int(arrays["window"]), **options)
    model = official.seqboat_classifier(
        golden.state_dict(arrays), prenorm=False, bidirectional=True, truncation=10, **options
    )
    return model, arrays


def test_whole_seqboat_text_classifier():
    model, arrays = seqboat_model("seqboat_model_text", task="text", norm="layernorm")
    x, mask = tokens(arrays)
    with record(model) as tape:
        logits = model(x, mask=mask)
    close(logits, arrays["logits"])
    close(tape["pooled"], arrays["sentence_rep"])
    hidden, _ = model.encoder(x, mask)
    close(hidden.transpose(0, 1), arrays["last_hidden"])


def test_seqboats_two_towers_join_product_and_difference_too(monkeypatch):
    model, arrays = seqboat_model("seqboat_model_retrieval_nli_head", task="retrieval", norm="scalenorm", nli_head=True)
    (x1, mask1), (x2, mask2) = tokens(arrays, "0"), tokens(arrays, "1")

    def compare(rows):
        with record(model) as tape:
            logits = model(x1, x2, mask1=mask1, mask2=mask2)
        first, second = arrays["rep0"], arrays["rep1"]
        joined = np.concatenate([second, first, first * second, first - second], axis=-1)
        close(logits[rows], arrays["logits"][rows])
        close(tape["pooled"][rows], joined[rows])
        return np.abs(logits.detach().numpy() - arrays["logits"]).max()

    # The second document is active from end to end: in the authors' code that changes the first, its neighbour.
    assert compare(slice(1, None)) > 1e-3
    monkeypatch.setattr(sparse_activation.SparseActivation, "forward", uncompressed)
    compare(slice(None))


@pytest.mark.parametrize("bias", ["global", "local", "rotary"])
def test_seqboat_classifiers_of_signals_take_the_authors_names(bias):
    """The authors' pixel and audio models: the text model's names and shapes, a signal's embedding, positions added."""
    state = golden.state_dict(golden.load("seqboat_model_text"))
    del state["encoder.encoder.embed_tokens.embed.weight"]
    rng = np.random.default_rng(0)
    inside = "encoder.encoder."
    state |= {inside + "embed_tokens.weight": rng.normal(size=8), inside + "embed_tokens.bias": rng.normal(size=8)}
    state |= {inside + "pos_emb.scale": np.array([0.7]), inside + "pos_emb.inv_freq": np.ones(4, dtype=np.float32)}
    for norm in ("layers.0.mega_layer.norm.norm.", "layers.1.mega_layer.norm.norm.", "final_norm.norm."):
        for part in ("weight", "bias", "running_mean", "running_var"):
            state[inside + norm + part] = rng.uniform(0.5, 1.5, size=8)
    tables = [name for name in state if name.endswith("rel_pos_bias")]
    for name in tables:
        if bias == "rotary":
            del state[name]
        elif bias == "local":
            state[name] = rng.normal(size=6 * 3 - 1)
    options = dict(attention="relu2", norm="batchnorm", prenorm=True, bidirectional=True, window=3, bias=bias)
    model = official.seqboat_classifier(state, task="audio", **options)
    x = torch.randn(2, 16, dtype=torch.float64)
    with record(model) as tape:
        assert model(x).shape == (2, 10)
    assert len(tape.names("active_seen")) == 2
    embedded, _ = model.encoder.embedding(x)
    frequency = 10000.0 ** (-np.arange(0, 8, 2) / 8)
    angle = np.arange(16)[:, None] * frequency
    close(
        model.encoder.layers[0](embedded) - embedded,
        0.7 * np.tile(np.hstack([np.sin(angle), np.cos(angle)]), (2, 1, 1)),
    )
    back = official.authors_names(model)
    assert back.keys() == state.keys() - {inside + "pos_emb.inv_freq"}
    for name, values in back.items():
        np.testing.assert_array_equal(values.numpy(), state[name], err_msg=name)


def test_of_a_local_bias_the_middle_is_read():
    """It holds 6 w - 1 numbers, of which 2 w + 1 can be reached: the others get no gradient, here as there."""
    name = "seqboat_layer_relu2_localpos_batchnorm_prenorm_train"
    arrays = golden.load(name)
    module, x, _ = layer(name, arrays)
    assert module.attention.table.shape == (23,)  # w = 4
    module(x).sum().backward()
    table = "rel_pos_bias.rel_pos_bias"
    np.testing.assert_array_equal(official.authors_names(module)[table].numpy(), arrays[f"param.{table}"])
    gradient = official.authors_names(module, gradients=True)[table].numpy()
    assert gradient.shape == (23,) and not gradient[:11].any() and not gradient[20:].any() and gradient[11:20].any()
    np.testing.assert_array_equal(arrays[f"grad.{table}"][:11], 0)
    np.testing.assert_array_equal(arrays[f"grad.{table}"][20:], 0)


# ---- Transformer-VQ ----------------------------------------------------------------------------------------------


def vq(change=None, **options):
    arrays = golden.load("vq_layer_ref")
    sizes = {
        ours: int(arrays[theirs]) for ours, theirs in [("heads", "n_head"), ("key_dim", "d_k"), ("value_dim", "d_v")]
    }
    sizes |= {"block": int(arrays["block_len"]), "memory": int(arrays["mem_len"]), "pe_lam": float(arrays["pe_lam"])}
    names = ("ln_gain", "ln_bias", "W_q", "W_kvg", "W_r", "W_o", "xl_u", "xl_v", "C")
    state = {name: arrays[name] for name in names} | (change or {})
    return official.vq_layer({k: v for k, v in state.items() if v is not None}, **(sizes | options)), arrays, state


def test_transformer_vq_layer_its_codes_and_its_loss():
    module, arrays, _ = vq()
    assert not module.training
    x = torch.from_numpy(arrays["x"])
    with record(module) as tape:
        y, loss, _ = module.mix(x)
    close(y, arrays["y_oracle64"])
    close(module(x), arrays["y_ref"], 1e-5)  # its norm runs in single precision, and so does what follows from it
    np.testing.assert_array_equal(tape["codes_seen"].numpy(), arrays["z"])
    close(loss, arrays["l_commit_per_block"].mean(), 1e-5)


def test_transformer_vq_layer_steps():
    module, arrays, _ = vq()
    state, steps = module.initial_state(2), []
    for x_t in torch.from_numpy(arrays["x"]).unbind(1):
        y, state = module.step(x_t, state)
        steps.append(y)
    close(torch.stack(steps, 1), arrays["y_oracle64"])


def test_transformer_vq_names_go_there_and_back():
    module, arrays, state = vq()
    back = official.authors_names(module)
    assert back.keys() == state.keys()
    for name, want in state.items():
        np.testing.assert_array_equal(back[name].numpy(), want)
    module(torch.from_numpy(arrays["x"])).sum().backward()
    gradients = official.authors_names(module, gradients=True)
    assert gradients.keys() == state.keys() - {"C"}  # a codebook follows the keys, and has no gradient
    assert all(gradients[name].shape == state[name].shape for name in gradients)


# ---- SPADE -------------------------------------------------------------------------------------------------------


def spade(mode, change=None, **options):
    arrays = golden.load("spade_layer")
    mine = {name.removeprefix(f"{mode}_"): a for name, a in arrays.items() if name.startswith(f"{mode}_")}
    state = {name: a for name, a in mine.items() if name.startswith("layer")} | (change or {})
    keywords = {
        "heads": int(arrays["n_heads"]),
        "radius": int(arrays["radius"]),
        "num_buckets": int(arrays["num_buckets"]),
        "max_distance": int(arrays["max_distance"]),
        "s4_kernel": mine["S4_K"],
        "s4_skip": mine["S4_D"],
        "s4_weight": float(arrays["s4_weight"]),
    }
    module = official.spade_decoder({n: a for n, a in state.items() if a is not None}, mode=mode, **keywords | options)
    return module, mine, state


SPADE_MODES = [mode for mode in ("concat", "add", "stack") if f"{mode}_x" in golden.load("spade_layer")]


@pytest.mark.parametrize("mode", SPADE_MODES)
def test_spade_layers_and_their_branches(mode):
    module, arrays, _ = spade(mode)
    x = torch.from_numpy(arrays["x"])
    first, second = module.layers
    close(first.global_branch(first.norm1(x)), arrays["s4_out"])
    if mode != "stack":
        close(first.attention(first.norm1(x)), arrays["local_out"])
    close(first(x), arrays["y0"])
    close(second(first(x)), arrays["y1"])
    close(module(x), arrays["y1"])


def test_spade_is_not_given_the_kernel_that_forgets_the_conjugates():
    """Without its compiled extensions, the authors' code sums over half of the states only."""
    _, arrays, _ = spade("concat")
    wrong, _, _ = spade("concat", s4_kernel=arrays["S4_K_buggy_fallback"])
    assert np.abs(wrong(torch.from_numpy(arrays["x"])).detach().numpy() - arrays["y1"]).max() > 1e-2


def test_spade_names_go_there_and_back_and_gradients_flow():
    module, arrays, state = spade("concat")
    back = official.authors_names(module)
    assert back.keys() == state.keys()
    for name, want in state.items():
        np.testing.assert_array_equal(back[name].numpy(), want)
    module(torch.from_numpy(arrays["x"])).square().sum().backward()
    gradients = official.authors_names(module, gradients=True)
    assert gradients.keys() == state.keys()
    assert all(g.abs().max() > 0 for g in gradients.values())


def test_spade_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"missing \['layer1.fc2.bias'\]"):
        spade("concat", change={"layer1.fc2.bias": None})
    with pytest.raises(ValueError, match="mode must be one of concat, add, stack"):
        sizes = {"heads": 2, "radius": 3, "num_buckets": 8, "max_distance": 6}
        official.spade_decoder(spade("concat")[2], mode="mix", **sizes, s4_kernel=0, s4_skip=0)
    module = spade("concat")[0]
    with pytest.raises(ValueError, match="This kernel has 16 lags; got a sequence of 17 steps"):
        module(torch.zeros(1, 17, 8, dtype=torch.float64))


# ---- both towers, and refusals ----------------------------------------------------------------------------------


def test_two_tower_classifier_joins_second_then_first():
    model, arrays = build_model("mega_model_retrieval_two_tower")
    (x1, mask1), (x2, mask2) = tokens(arrays, "0"), tokens(arrays, "1")
    with record(model) as tape:
        logits = model(x1, x2, mask1=mask1, mask2=mask2)
    close(logits, arrays["logits"])
    close(tape["pooled"], np.concatenate([arrays["rep1"], arrays["rep0"]], axis=-1))


def test_classifiers_of_signals_take_the_authors_names():
    """The authors' pixel and audio models: built from names and shapes of the text model with a signal's embedding."""
    arrays = golden.load("mega_model_text_full")
    state = golden.state_dict(arrays)
    del state["encoder.encoder.embed_tokens.embed.weight"]
    rng = np.random.default_rng(0)
    state |= {"encoder.encoder.embed_tokens.weight": rng.normal(size=8)}
    state |= {"encoder.encoder.embed_tokens.bias": rng.normal(size=8)}
    options = dict(attention="softmax", norm="scalenorm", prenorm=False, bidirectional=True)
    model = official.mega_classifier(state, task="audio", **options)
    x = torch.randn(2, 16, dtype=torch.float64)
    assert model(x).shape == (2, 2)
    embedded, _ = model.encoder.embedding(x)
    want = (
        x.numpy()[..., None] * state["encoder.encoder.embed_tokens.weight"] + state["encoder.encoder.embed_tokens.bias"]
    )
    close(embedded, want)


def test_names_go_there_and_back():
    arrays = golden.load("mega_layer_softmax_full_layernorm_prenorm_bi")
    state = golden.state_dict(arrays)
    module = official.mega_layer(state, **golden.layer_options("mega_layer_softmax_full_layernorm_prenorm_bi"))
    back = official.authors_names(module)
    assert back.keys() == state.keys()
    for name, want in state.items():
        assert back[name].shape == want.shape
        np.testing.assert_array_equal(back[name].numpy(), want)


def test_dtype_follows_the_arrays():
    arrays = golden.load("mega_layer_softmax_full_layernorm_prenorm_bi")
    state = {k: torch.from_numpy(v).float() for k, v in golden.state_dict(arrays).items()}
    module = official.mega_layer(state, attention="softmax", norm="layernorm", prenorm=True, bidirectional=True)
    y = module(golden.batch_first(arrays["x"]).float())
    assert y.dtype == torch.float32
    assert np.abs(y.detach().transpose(0, 1).numpy() - arrays["out"]).max() < 1e-4


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"v_proj.weight": None}, {}, "lacks v_proj.weight"),
        ({"h_proj.bias": None}, {}, "missing .*h_proj.bias"),
        ({"extra.weight": np.ones(3)}, {}, "not used .*extra.weight"),
        ({"h_proj.bias": np.ones(9)}, {}, r"h_proj.bias wants shape \(8,\); got \(9,\)"),
        ({}, {"norm": "scalenorm"}, "Check norm"),
        ({}, {"chunk": 7}, "fits chunk=24"),
        ({}, {"attention": "gelu"}, "attention must be one of"),
        ({"h_proj.bias": np.ones(8, dtype=np.float32)}, {}, "one floating-point dtype"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(change, options, words):
    name = "mega_layer_softmax_full_layernorm_prenorm_bi"
    state = golden.state_dict(golden.load(name)) | change
    state = {k: v for k, v in state.items() if v is not None}
    with pytest.raises(ValueError, match=words):
        official.mega_layer(state, **(golden.layer_options(name) | options))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"hx_proj.weight": None}, {}, "lacks hx_proj.weight"),
        ({"q_router.temp": None}, {}, "missing .*q_router.temp"),
        ({"hx_proj.weight": np.ones((8, 8)), "hx_proj.bias": np.ones(8)}, {}, "not used .*q_router.temp"),
        ({"rel_pos_bias.rel_pos_bias": None}, {}, "missing .*rel_pos_bias"),
        ({}, {"bias": "rotary"}, "not used .*rel_pos_bias.*Check norm, bias"),
        ({}, {"bias": "local"}, "window=4 wants a local bias of 6 .* = 23 numbers; got 47, which fits window=8"),
        ({}, {"bias": "local", "window": None}, "give a window"),
        ({}, {"norm": "scalenorm"}, "Check norm"),
        ({}, {"attention": "gelu"}, "attention must be one of"),
        ({"h_proj.bias": np.ones(9)}, {}, r"h_proj.bias wants shape \(8,\); got \(9,\)"),
    ],
)
def test_a_state_dict_that_does_not_fit_seqboat_is_refused_by_name(change, options, words):
    name = "seqboat_layer_softmax_globalpos_layernorm_postnorm_padded"
    state = {k: v for k, v in (golden.state_dict(golden.load(name)) | change).items() if v is not None}
    with pytest.raises(ValueError, match=words):
        official.seqboat_layer(state, **(golden.seqboat_options(name) | options))


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"C": None}, {}, "lacks C"),
        ({}, {"heads": 3}, "heads=3 and key_dim=6 want C"),
        ({}, {"key_dim": 4}, "heads=2 and key_dim=4 want C"),
        ({}, {"value_dim": 9}, r"W_kvg wants shape \(12, 48\); got \(12, 52\)"),
        ({"W_v": np.ones((12, 12))}, {}, "not used .*W_v"),
        ({"W_o": np.ones((20, 11))}, {}, "W_o wants shape"),
        ({}, {"memory": -1}, "memory >= 0"),
    ],
)
def test_a_state_dict_that_does_not_fit_transformer_vq_is_refused_by_name(change, options, words):
    with pytest.raises(ValueError, match=words):
        vq(change, **options)


def test_wrong_calls_are_refused_in_words():
    state = golden.state_dict(golden.load("seqboat_model_text"))
    options = dict(attention="softmax", norm="layernorm", prenorm=False, bidirectional=True, bias="global", window=3)
    with pytest.raises(ValueError, match=r"wants a head of 16 inputs; .* has 8"):
        official.seqboat_classifier(state, task="retrieval", **options)
    with pytest.raises(ValueError, match="goes with task='retrieval'"):
        official.seqboat_classifier(state, task="text", nli_head=True, **options)
    with pytest.raises(TypeError, match=r"missing keywords: \['window'\]; unknown keywords: \['chunk'\]"):
        official.seqboat_classifier(state, task="text", **{k: v for k, v in options.items() if k != "window"}, chunk=3)
    with pytest.raises(ValueError, match="task must be"):
        official.mega_classifier({}, task="video")
    with pytest.raises(TypeError, match="missing keywords"):
        official.mega_block(golden.state_dict(golden.load(BLOCKS[0])), attention="softmax")
    with pytest.raises(ValueError, match="wanted a module made by"):
        official.authors_names(torch.nn.Linear(2, 2))
