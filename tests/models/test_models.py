"""Every model behind the one door: shapes, padding, streaming, mixed precision."""

import pytest
import torch

from longseq_tutorial import models
from longseq_tutorial.models import build, build_encoder
from tests.models.any_task import SAMPLES, SMALL, TOKENS, VARIANTS, inputs, randomised


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


LEFT = [v for v in VARIANTS if v[0] in ("mega", "seqboat") and not v[1].get("sinusoid")]


@pytest.mark.parametrize(("name", "options"), LEFT)
def test_padding_on_the_left_changes_nothing_without_chunks(name, options):
    """With chunks it moves the borders, and it shifts sinusoids: pad on the right there."""
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
