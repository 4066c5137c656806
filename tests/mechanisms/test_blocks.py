import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longseq_tutorial.mechanisms import blocks
from longseq_tutorial.mechanisms.blocks import Tables, block_recurrence, block_recurrence_plain

DOUBLE = torch.float64


def draw(kind, dim=3, n=4, seed=0, requires_grad=True):
    """decay, write, read ``(D, n)`` of a stable recurrence, real or complex; "matrix": decay ``(D, n, n)``."""
    g = torch.Generator().manual_seed(seed)
    decay = torch.rand(dim, n, dtype=DOUBLE, generator=g) * 0.5 + 0.45
    write, read = (torch.randn(dim, n, dtype=DOUBLE, generator=g) for _ in range(2))
    if kind == "complex":
        decay = torch.polar(decay, 3 * torch.rand(dim, n, dtype=DOUBLE, generator=g))
        write, read = (torch.complex(t, torch.randn(dim, n, dtype=DOUBLE, generator=g)) for t in (write, read))
    if kind == "matrix":
        decay = 0.3 * torch.randn(dim, n, n, dtype=DOUBLE, generator=g)
    return [t.requires_grad_(requires_grad) for t in (decay, write, read)]


def tables(decay, write, read):
    """The block tables of ``h = decay h + write x, y = Re(sum(read h))``, straight from the definition."""

    def make(block):
        if decay.dim() == 3:
            powers = [torch.linalg.matrix_power(decay, s) for s in range(block + 1)]  # (D, n, n) each
            writes = torch.stack([(p @ write.unsqueeze(-1)).squeeze(-1) for p in powers[:-1]], -1)  # (D, n, C)
            reads = torch.stack([(read.unsqueeze(-2) @ p).squeeze(-2) for p in powers[1:]], 1)  # (D, C, n)
            return Tables((read.unsqueeze(-1) * writes).sum(1), reads, writes.flip(-1), powers[-1])
        powers = decay.unsqueeze(-1) ** torch.arange(block + 1)  # (D, n, C + 1)
        kernel = ((read * write).unsqueeze(-1) * powers[..., :block]).sum(1)
        reads = read.unsqueeze(-1) * powers[..., 1:]
        writes = write.unsqueeze(-1) * powers[..., :block].flip(-1)
        if decay.is_complex():
            # Re(r h) = Re r Re h - Im r Im h
            reads = torch.stack([reads.real, -reads.imag], 2).flatten(1, 2)
            writes = torch.stack([writes.real, writes.imag], 2).flatten(1, 2)
            kernel = kernel.real
        return Tables(kernel, reads.mT, writes, powers[..., block])

    return make


def flat(h):
    return torch.view_as_real(h).flatten(-2) if h.is_complex() else h


def zeros(parameters):
    return torch.zeros(2, *parameters[1].shape, dtype=parameters[1].dtype)


def step_by_step(x, decay, write, read, h):
    y = []
    for t in range(x.shape[1]):
        moved = torch.einsum("dij,bdj->bdi", decay, h) if decay.dim() == 3 else decay * h
        h = moved + write * x[:, t, :, None]
        y.append((read * h).sum(-1).real)
    return torch.stack(y, 1), h


@pytest.fixture(params=["plain", "stretches", "doubling"])
def form(request, monkeypatch):
    """All blocks at once; a stretch at a time, several even here; and how a GPU carries states over the boundaries."""
    monkeypatch.setattr(blocks, "STRETCH", 800)  # bytes
    monkeypatch.setattr(blocks, "TILE", 2)  # of 3 channels
    if request.param == "doubling":
        monkeypatch.setattr(blocks, "STRETCH", 3200)
        monkeypatch.setattr(blocks, "_one_by_one", blocks._by_doubling)
    return block_recurrence_plain if request.param == "plain" else block_recurrence


@pytest.mark.parametrize("kind", ["real", "complex", "matrix"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 37, 70])
@pytest.mark.parametrize("begun", [False, True])
def test_blocks_equal_steps_with_state_and_gradients(kind, length, begun, form):
    parameters = draw(kind)
    x = torch.randn(2, length, 3, dtype=DOUBLE, requires_grad=True)
    h0 = torch.randn(2, 3, 4, dtype=parameters[1].dtype) * begun
    h0.requires_grad_()
    weight, state_weight = torch.randn(2, length, 3, dtype=DOUBLE), torch.randn_like(flat(h0).detach())
    results = []
    for y, h in (
        step_by_step(x, *parameters, h0),
        form(x, tables(*parameters), state=flat(h0) if begun else None, block=8),
    ):
        h = flat(h)
        scalar = (y * weight).sum() + (h * state_weight).sum()
        leaves = [x, *parameters, *([h0] if begun else [])]
        results.append([y, h, *torch.autograd.grad(scalar, leaves)])
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["real", "complex", "matrix"])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 37, 70])
def test_two_directions(kind, length, form):
    there, back = draw(kind), draw(kind, n=5, seed=1)  # they need not have as many states
    x = torch.randn(2, length, 3, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(2, length, 3, dtype=DOUBLE)
    slow = step_by_step(x, *there, zeros(there))[0] + step_by_step(x.flip(1), *back, zeros(back))[0].flip(1)
    fast = form(x, tables(*there), tables(*back), block=8)[0]
    leaves = [x, *there, *back]
    for a, b in zip(
        [fast, *torch.autograd.grad((fast * weight).sum(), leaves)],
        [slow, *torch.autograd.grad((slow * weight).sum(), leaves)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(length=st.integers(1, 40), block=st.integers(1, 20), cut=st.integers(1, 39))
def test_any_block_and_any_cut_give_the_same(length, block, cut):
    make = tables(*draw("complex", requires_grad=False))
    x = torch.randn(2, length, 3, dtype=DOUBLE)
    want, last = block_recurrence(x, make, block=length)
    got, h = block_recurrence(x, make, block=block)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(h, last)
    cut = min(cut, length)
    first, h = block_recurrence(x[:, :cut], make, block=block)
    pieces = [first]
    if cut < length:
        second, h = block_recurrence(x[:, cut:], make, state=h, block=block)
        pieces.append(second)
    torch.testing.assert_close(torch.cat(pieces, 1), want)
    torch.testing.assert_close(h, last)


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_gradcheck(kind):
    parameters = draw(kind, dim=2, n=2)
    x = torch.randn(1, 9, 2, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *p: block_recurrence(x, tables(*p), block=4), (x, *parameters))


def test_the_past_is_exact_whatever_comes():
    """No transform, no rounding from the future: changing it changes nothing before, not even the last bit."""
    make = tables(*draw("real", requires_grad=False))
    x = torch.randn(1, 50, 3, dtype=DOUBLE)
    want = block_recurrence(x, make, block=8)[0]
    x[:, 33:] = 1e6
    assert torch.equal(block_recurrence(x, make, block=8)[0][:, :33], want[:, :33])


def test_refusals():
    make = tables(*draw("real"))
    x = torch.randn(2, 5, 3, dtype=DOUBLE)
    with pytest.raises(ValueError, match="wanted x \\(batch, length >= 1, dim\\) and block >= 1; got \\(2, 0, 3\\)"):
        block_recurrence(x[:, :0], make)
    with pytest.raises(ValueError, match="got \\(2, 5, 3\\) and 0"):
        block_recurrence(x, make, block=0)
    with pytest.raises(ValueError, match="no state to go on from"):
        block_recurrence(x, make, make, torch.zeros(2, 3, 4, dtype=DOUBLE))
