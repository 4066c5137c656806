"""Our modules with the authors' parameters give the authors' numbers: outputs, gradients, statistics, streaming."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from longseq_tutorial import official
from longseq_tutorial.models import record
from tests import golden_numbers as golden

LAYERS, BLOCKS = golden.names("mega_layer"), golden.names("mega_block")


def close(got, want, tolerance=1e-9, what=""):
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=tolerance, err_msg=what)


def layer(name, arrays):
    make = official.mega_block if name in BLOCKS else official.mega_layer
    module = make(golden.state_dict(arrays), **golden.layer_options(name))
    assert not module.training
    module.train(bool(arrays.get("train_mode", False)))
    mask = None if "padding_mask" not in arrays else ~torch.from_numpy(arrays["padding_mask"])
    return module, golden.batch_first(arrays["x"]), mask


@pytest.mark.parametrize("name", LAYERS + BLOCKS)
def test_outputs_and_every_gradient(name):
    arrays, tolerance = golden.load(name), golden.tolerance(name)
    module, x, mask = layer(name, arrays)
    x.requires_grad_()
    y = module(x, mask=mask)
    close(y.transpose(0, 1), arrays["out"], tolerance)
    if "cotangent" not in arrays:
        assert name in BLOCKS  # the files of whole blocks hold outputs only
        return
    (y * golden.batch_first(arrays["cotangent"])).sum().backward()
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


@pytest.mark.parametrize("name", [n for n in MODELS if "text" in n])
def test_whole_text_classifier(name):
    model, arrays = build_model(name)
    x, mask = tokens(arrays)
    with record(model) as tape:
        logits = model(x, mask=mask)
    close(logits, arrays["logits"])
    close(tape["pooled"], arrays["sentence_rep"])


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


def test_wrong_calls_are_refused_in_words():
    with pytest.raises(ValueError, match="task must be"):
        official.mega_classifier({}, task="video")
    with pytest.raises(TypeError, match="missing keywords"):
        official.mega_block(golden.state_dict(golden.load(BLOCKS[0])), attention="softmax")
    with pytest.raises(ValueError, match="wanted a module made by"):
        official.authors_names(torch.nn.Linear(2, 2))
