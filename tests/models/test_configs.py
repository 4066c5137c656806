"""The published sizes, and what a configuration refuses."""

import dataclasses

import pytest
import torch

from longseq_tutorial.models import NAMES, build, build_encoder, configure
from tests.models.any_task import SAMPLES, TOKENS, AnyTask

# Parameters of the authors' classes (counted by running them); token tables left out for the three token tasks.
PUBLISHED = {
    "listops": (10, False, 600_658, 578_170),
    "text": (2, False, 957_204, 926_212),
    "retrieval": (2, True, 1_451_806, 1_405_318),
    "image": (10, False, 2_839_096, 2_824_760),
    "pathfinder": (2, False, 1_386_874, 1_376_122),
    "pathx": (2, False, 381_948, 283_644),
    "speech": (10, False, None, 343_134),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_sizes_equal_the_published_code(task):
    classes, pairs, full, chunked = PUBLISHED[task]
    tokens = task in ("listops", "text", "retrieval")
    config = AnyTask(task, "tokens" if tokens else "samples", classes, 20 if tokens else 0, pairs)
    for name, want in (("mega", full), ("mega-chunk", chunked)):
        model = build(name, config)
        table = model.encoder.embedding.table.weight.numel() if tokens else 0
        if want is not None:
            assert sum(p.numel() for p in model.parameters()) - table == want


SEQBOAT = {  # classes, and parameters likewise
    "listops": (10, 406_756),
    "text": (2, 599_564),
    "retrieval": (2, 1_024_298),
    "image": (10, 1_810_001),
    "pathfinder": (2, 892_301),
    "pathx": (2, 729_097),
    "speech": (10, 298_841),
}


@pytest.mark.parametrize("task", SEQBOAT)
def test_sizes_of_seqboat_equal_the_published_code(task):
    classes, want = SEQBOAT[task]
    tokens = task in ("listops", "text", "retrieval")
    config = AnyTask(task, "tokens" if tokens else "samples", classes, 20 if tokens else 0, task == "retrieval")
    model = build("seqboat", config)
    table = model.encoder.embedding.table.weight.numel() if tokens else 0
    assert sum(p.numel() for p in model.parameters()) - table == want


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: build("mamba", TOKENS),
            "wanted one of: mega, mega-chunk, seqboat, longvq, fastrpb, spade, transformer",
        ),
        (lambda: build("mega", TOKENS, width=3), "no setting 'width'"),
        (lambda: build("mega", TOKENS, patch=((4, 4),)), "this task has tokens"),
        (lambda: build("mega", SAMPLES, patch=((2, 4),)), "kernel >= stride"),
        (lambda: build("mega", SAMPLES, patch=(2, 4)), "patch wants"),
        (lambda: build("mega", TOKENS, dropout=1.0), "dropout is a dropout rate"),
        (lambda: build("mega", TOKENS, layers=0), "layers must be a whole number, at least 1"),
        (lambda: build("mega", TOKENS, layers=2.5), "layers must be a whole number"),
        (lambda: build("mega", TOKENS, truncation=0), "truncation must be a whole number"),
        (lambda: build("mega", TOKENS, dim=True), "dim must be a whole number"),
        (lambda: build("mega", TOKENS, prenorm=1), "prenorm must be of type bool"),
        (lambda: build("mega", TOKENS, norm=None), "norm must be of type str"),
        (lambda: build("mega", TOKENS, dropout="a lot"), "dropout is a dropout rate"),
        (lambda: build("mega", TOKENS, z_dim=5, bias="rotary"), "must be even"),
        (lambda: build("mega", TOKENS, attention="cosine"), "softmax, laplace, relu2"),
        (lambda: build("seqboat", TOKENS, attention="cosine"), "softmax, laplace, relu2"),
        (lambda: build("seqboat", TOKENS, bias="simple"), "bias must be 'global', 'local' or 'rotary'"),
        (lambda: build("seqboat", TOKENS, bias="local", window=None), "give a window"),
        (lambda: build("seqboat", TOKENS, bias="rotary", z_dim=5), "z_dim must be even"),
        (lambda: build("seqboat", TOKENS, sinusoid=True, dim=7), "dim must be even"),
        (lambda: build("seqboat", TOKENS, temperature=0), "temperature must be a number > 0"),
        (lambda: build("seqboat", TOKENS, temperature=True), "temperature must be a number > 0"),
        (lambda: build("seqboat", TOKENS, window=0), "window must be a whole number, at least 1"),
        (lambda: build("seqboat", TOKENS, hidden_dropout=1), "hidden_dropout is a dropout rate"),
        (lambda: build_encoder("seqboat", TOKENS).initial_state(1), "cannot stream"),
        (lambda: build("transformer", TOKENS, dim=10, heads=4), r"multiple of 2 \* heads"),
        (lambda: build("mega", TOKENS)(torch.ones(2, 5)), "wanted integers"),
        (lambda: build("mega", TOKENS)(torch.ones(2, 5).long(), torch.ones(2, 5).long()), "Pass mask.bool()"),
        (lambda: build("mega", TOKENS)(torch.ones(2, 5).long(), torch.ones(2, 1, 5)), r"mask.bool\(\).squeeze\(1\)"),
        (lambda: build("mega", TOKENS)(torch.ones(2, 0).long()), "length >= 1"),
        (lambda: build_encoder("mega", TOKENS).initial_state(1), "cannot stream"),
        (lambda: build_encoder("transformer", TOKENS).initial_state(1), "causal=True"),
    ],
)
def test_wrong_input_is_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_configurations_are_frozen_and_every_field_has_a_reason():
    import inspect

    from longseq_tutorial.models import configs

    for kind in (configs.MegaConfig, configs.SeqBoatConfig, configs.TransformerConfig):
        config = kind()
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.dim = 3
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            line = next(row for row in source.splitlines() if row.strip().startswith(f"{field.name}:"))
            assert "  # " in line, f"{kind.__name__}.{field.name} has no reason behind it"


@pytest.mark.parametrize("name", NAMES)
def test_overrides_replace_the_published_values(name):
    usual, changed = configure(name, "listops"), configure(name, "listops", layers=9)
    assert changed == dataclasses.replace(usual, layers=9) and usual.layers != 9
