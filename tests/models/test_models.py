"""Every model behind the one door: shapes, padding, streaming, published sizes, recording."""

from dataclasses import dataclass

import pytest
import torch

from longseq_tutorial import models
from longseq_tutorial.models import build, build_encoder, record


@dataclass(frozen=True)
class AnyTask:
    name: str = "made-up"
    kind: str = "tokens"
    classes: int = 4
    vocabulary: int = 11
    pairs: bool = False


TOKENS, SAMPLES = AnyTask(), AnyTask(kind="samples", vocabulary=0)
SMALL = {
    "mega": dict(dim=8, layers=2, z_dim=4, v_dim=12, ffn_dim=10, n=3, head_dim=6, max_positions=64),
    "mega-chunk": dict(dim=8, layers=2, z_dim=4, v_dim=12, ffn_dim=10, n=3, head_dim=6, chunk=5),
    "transformer": dict(dim=8, layers=2, heads=2, ffn_dim=10, head_dim=6),
}
VARIANTS = [("mega", {}), ("mega-chunk", {}), ("transformer", {})] + [
    (name, dict(attention=attention, norm=norm, prenorm=prenorm, bias=bias))
    for name in ("mega", "mega-chunk")
    for attention, norm, prenorm, bias in [
        ("laplace", "batchnorm", True, "simple"),
        ("relu2", "rmsnorm", True, "rotary"),
        ("softmax", "scalenorm", False, "rotary"),
    ]
]


def inputs(task, batch=3, length=13):
    if task.kind == "tokens":
        return torch.randint(1, task.vocabulary, (batch, length))
    return torch.randn(batch, length, dtype=torch.float64)


def randomised(module):
    """Every parameter away from its initial value, so that every term matters."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = p.data + 0.3 * torch.randn(p.shape, generator=g)
    return module.double().eval()


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("task", [TOKENS, SAMPLES], ids=["tokens", "samples"])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_any_length_gives_logits_and_finite_gradients(name, options, task, length):
    model = build(name, task, **SMALL[name], **options).double()
    logits = model(inputs(task, length=length))
    assert logits.shape == (3, 4)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("task", [TOKENS, SAMPLES], ids=["tokens", "samples"])
@pytest.mark.parametrize("amount", [1, 2, 9])
def test_padding_on_the_right_changes_nothing(name, options, task, amount):
    model = randomised(build(name, task, **SMALL[name], **options))
    x = inputs(task)
    padded = torch.cat([x, torch.ones(3, amount, dtype=x.dtype)], dim=1)
    mask = torch.arange(13 + amount).expand(3, -1) < 13
    torch.testing.assert_close(model(padded, mask), model(x))


@pytest.mark.parametrize(("name", "options"), [v for v in VARIANTS if v[0] == "mega"])
def test_padding_on_the_left_changes_nothing_without_chunks(name, options):
    """With chunks it moves the borders, and it shifts the Transformer's sinusoids: pad on the right there."""
    model = randomised(build(name, TOKENS, **SMALL[name], **options))
    x = inputs(TOKENS)
    padded = torch.cat([torch.ones(3, 4, dtype=x.dtype), x], dim=1)
    mask = torch.arange(17).expand(3, -1) >= 4
    torch.testing.assert_close(model(padded, mask), model(x))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_items_of_a_batch_do_not_meet(name, options):
    model = randomised(build(name, TOKENS, **SMALL[name], **options))
    x = inputs(TOKENS)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("task", [TOKENS, SAMPLES], ids=["tokens", "samples"])
def test_causal_stack_streams(name, options, task):
    encoder = randomised(build_encoder(name, task, **SMALL[name], **options, causal=True))
    x = inputs(task, length=17)
    want, _ = encoder(x)
    state, steps = encoder.initial_state(3), []
    for t in range(17):
        y, state = encoder.step(x[:, t], state)
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), want)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_causal_stack_cannot_see_the_future(name, options):
    encoder = randomised(build_encoder(name, TOKENS, **SMALL[name], **options, causal=True))
    x = inputs(TOKENS)
    want, _ = encoder(x)
    x[:, 7:] = 3
    torch.testing.assert_close(encoder(x)[0][:, :7], want[:, :7])


def test_chunked_state_stays_small_while_the_full_one_grows():
    def floats(state):
        if isinstance(state, torch.Tensor):
            return state.numel()
        return sum(floats(s) for s in (state.values() if isinstance(state, dict) else state))

    sizes = {}
    for name in ("mega", "mega-chunk"):
        encoder = randomised(build_encoder(name, TOKENS, **SMALL[name], causal=True))
        state = encoder.initial_state(1)
        for t in range(50):
            _, state = encoder.step(inputs(TOKENS, batch=1, length=1)[:, 0], state)
            sizes[name, t] = floats(state)
    assert max(sizes["mega-chunk", t] for t in range(50)) == sizes["mega-chunk", 4]
    assert sizes["mega", 49] > 5 * sizes["mega-chunk", 49]


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_recording_sees_weights_and_changes_nothing(name, options):
    model = build(name, TOKENS, **SMALL[name], **options).double().eval()
    x, mask = inputs(TOKENS), torch.arange(13).expand(3, 13) < 10
    want = model(x, mask)
    with record(model) as tape:
        got = model(x, mask)
    assert torch.equal(got, want)
    weights = [tape[n] for n in tape.names("weights")]
    assert len(weights) == 2
    for w in weights:
        assert not w.requires_grad
        if options.get("attention", "softmax") == "softmax":
            torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    if name != "transformer":
        assert len(tape.names("kernel_seen")) == len(tape.names("update_gate")) == 2
    length = len(tape)
    model(x, mask)
    assert len(tape) == length and all(len(tape.all(n)) == 1 for n in tape)


def test_recorder_says_what_it_knows():
    with pytest.raises(ValueError, match="nothing to record"), record(torch.nn.Linear(2, 2)):
        pass
    model = build("mega", TOKENS, **SMALL["mega"])
    with record(model) as tape:
        model(inputs(TOKENS))
    with pytest.raises(KeyError, match="names 2 recordings"):
        tape["weights"]
    assert "layers.1.mega.attention.weights" in tape
    assert "encoder.layers.0.mega.attention.weights: 1 x (3, 13, 13)" in repr(tape)


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


def test_pairs_are_two_towers():
    model = randomised(build("mega", AnyTask(pairs=True), **SMALL["mega"]))
    x1, x2 = inputs(TOKENS), inputs(TOKENS, length=7)
    assert model(x1, x2).shape == (3, 4)
    assert not torch.allclose(model(x1, x2), model(x2, x1))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build("mamba", TOKENS), "wanted one of: mega, mega-chunk, transformer"),
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


def test_patched_signals():
    for name in models.NAMES:
        model = randomised(build(name, SAMPLES, **SMALL[name], patch=((6, 4), (3, 2))))
        x = inputs(SAMPLES, length=50)
        mask = torch.arange(50).expand(3, 50) < torch.tensor([[50], [33], [8]])
        got = model(x, mask)
        torch.testing.assert_close(got[1:2], model(x[1:2, :33]))
        torch.testing.assert_close(got[2:], model(x[2:, :8]))


@pytest.mark.parametrize(("name", "options"), VARIANTS)
@pytest.mark.parametrize("task", [TOKENS, SAMPLES], ids=["tokens", "samples"])
def test_bfloat16_autocast_stays_close_and_trains(name, options, task):
    torch.manual_seed(0)
    model = build(name, task, **SMALL[name], **options)
    x = inputs(task).to(torch.long if task.kind == "tokens" else torch.float32)
    mask = torch.arange(13).expand(3, 13) < torch.tensor([[13], [10], [4]])
    model.eval()
    want = model(x, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(x, mask)
    assert (got - want).norm() / want.norm() < 3e-2
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(x, mask).float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
