"""What is measured: one case a mechanism, each with candidates that compute the same thing.

A case is a function `(size, device) -> Problem`. Its first candidate is ours; the others are what PyTorch itself offers
and, where they are installed, other packages (`peers.py`). All candidates share the leaves of the problem, so outputs
and gradients can be compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longseq_tutorial import models
from longseq_tutorial.mechanisms import (
    chunking,
    ema,
    fft,
    fft_bias,
    gated_attention,
    linear_attention,
    s4,
    sparse_activation,
    vq_attention,
)
from longseq_tutorial.models.configs import MegaConfig, SeqBoatConfig
from longseq_tutorial.models.mega import MegaLayer
from longseq_tutorial.models.seqboat import SeqBoatLayer

from . import limits, peers
from .limits import CHUNK, CODES, POLES, STATE, Pair
from .problems import Candidate, Problem, Size, seeded, tensors

LINEAR, TRANSFORM, QUADRATIC = "linear", "L log L", "quadratic"
GROWTH = {LINEAR: 1.1, TRANSFORM: 1.2, QUADRATIC: None}  # the largest exponent allowed, of time and of memory


@dataclass(frozen=True)
class Case:
    """`build(size, device)` gives the problem; `growth` is what theory says; `longest` where ours must stop; `work` is
    what cannot be avoided, forward and with backward. `agree`: the largest error allowed, relative to the largest
    number of the result: all is float32, and what the others compute is not exact either."""

    build: Callable[[Size, torch.device], Problem]
    growth: str
    longest: int | None = None
    work: Callable[[Size], Pair] | None = None
    agree: float = 1e-4


# ---- convolutions and recurrences ------------------------------------------------------------------------------


def long_convolution(size: Size, device: torch.device) -> Problem:
    length = size.length
    u, kernel = tensors(device, size, (size.dim, length))

    def plain() -> Tensor:
        """The textbook way: one transform of twice the length, along the last axis."""
        spectrum = torch.fft.rfft(u.mT, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length].mT

    runs = {"ours": lambda: fft.long_convolution(u, kernel), "torch rfft of 2L": plain}
    return Problem.of([u, kernel], runs).beside(peers.fftconvolve(u, kernel))


def damped_ema(size: Size, device: torch.device, bidirectional: bool = False) -> Problem:
    """With what Mega puts after it, the skip and a SiLU."""
    module = seeded(lambda: ema.DampedEMA(size.dim, POLES, bidirectional)).to(device)
    (x,) = tensors(device, size)
    problem = Problem.of([x, *module.parameters()], {"ours": lambda: F.silu(module(x))})
    return problem.beside(peers.mega_ema(module, x), peers.lfilter(module, x))


class StateSpaceLayer(nn.Module):
    """What S4's authors put around it: GELU, a layer to twice the width, and one half as the gate of the other."""

    def __init__(self, mechanism: nn.Module, dim: int) -> None:
        super().__init__()
        self.mechanism, self.out = mechanism, nn.Linear(dim, 2 * dim)

    def forward(self, u: Tensor) -> Tensor:
        return F.glu(self.out(F.gelu(self.mechanism(u))))


def state_space(size: Size, device: torch.device, full: bool) -> Problem:
    """S4D, or S4 in full."""
    mechanism = s4.S4 if full else s4.S4D
    layer = seeded(lambda: StateSpaceLayer(mechanism(size.dim, STATE), size.dim)).to(device)
    (u,) = tensors(device, size)
    problem = Problem.of([u, *layer.parameters()], {"ours": lambda: layer(u)})
    return problem.beside(peers.s4(layer, u) if full else peers.s4d(layer, u))


def toeplitz(size: Size, device: torch.device) -> Problem:
    """FastRPB: one bias for each distance, the same for all channels."""
    length = size.length
    lags, v = tensors(device, (1, 2 * length - 1), (size.batch, length, 1, size.dim))

    def plain() -> Tensor:
        """The circulant embedding of 2L, transformed along the time axis."""
        circle = torch.cat([lags[0, length - 1 :], lags.new_zeros(1), lags[0, : length - 1]])  # lag 0, 1, .., -2, -1
        spectrum = torch.fft.rfft(circle)[:, None, None] * torch.fft.rfft(v, n=2 * length, dim=1)
        return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length]

    runs = {
        "ours": lambda: fft_bias.toeplitz_product(lags, v),
        "torch rfft of 2L": plain,
        "dense matrix": lambda: fft_bias.toeplitz_product_dense(lags, v),
    }
    return Problem.of([lags, v], runs)


# ---- attention ---------------------------------------------------------------------------------------------------


def heads(size: Size, device: torch.device, *widths: int) -> list[Tensor]:
    """One head of each width."""
    return tensors(device, *((size.batch, 1, size.length, width) for width in widths))


def full_attention(size: Size, device: torch.device, z: Callable[[int], int], v: Callable[[int], int]) -> Problem:
    """Softmax attention; z and v give the widths of queries and values for D channels."""
    query, key, value = heads(size, device, z(size.dim), z(size.dim), v(size.dim))
    runs = {
        "ours": lambda: gated_attention.attend_in_tiles(query, key, value),
        "torch fused": lambda: F.scaled_dot_product_attention(query, key, value),
    }
    return Problem.of([query, key, value], runs)


def chunk_attention(size: Size, device: torch.device, function: str) -> Problem:
    """As in Mega-chunk: one head, queries of D/2, values of 2D, a learned bias."""
    z, v = size.dim // 2, 2 * size.dim
    table = seeded(lambda: gated_attention.RelativeBias(CHUNK)).to(device)
    query, key, value = tensors(device, *((size.batch, size.length, width) for width in (z, z, v)))
    inside = min(CHUNK, size.length)

    def ours() -> Tensor:
        return chunking.chunk_attention(
            query, key, value, CHUNK, function=function, bias=table(inside), attend=gated_attention.attend
        )

    def fused() -> Tensor:
        q, k, v = (x.unflatten(1, (-1, inside)) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=table(inside)).flatten(1, 2)

    runs = {"ours": ours}
    if function == "softmax" and size.length % inside == 0:
        runs["torch fused"] = fused
    problem = Problem.of([query, key, value, table.table], runs)
    return problem.beside(peers.chunks(function, table, query, key, value))


def window_attention(size: Size, device: torch.device) -> Problem:
    # PyTorch's own flex_attention has no gradient on a CPU; on a GPU it is for compiled code. So no peer of torch's.
    query, key, value = heads(size, device, size.dim, size.dim, size.dim)
    problem = Problem.of([query, key, value], {"ours": lambda: chunking.window_attention(query, key, value, CHUNK)})
    return problem.beside(peers.window(CHUNK, query, key, value))


def assignment(size: Size, device: torch.device) -> Problem:
    """The nearest of 512 codes. Compared are the distances, since two codes may be equally near."""
    keys, codebook = (t.detach() for t in tensors(device, (size.batch, 1, size.length, size.dim), (1, CODES, size.dim)))

    def distance(codes: Tensor) -> Tensor:
        return (keys - vq_attention.codewords(codebook, codes.view(keys.shape[:3]))).square().sum(-1)

    runs = {
        "ours": lambda: vq_attention.nearest_code(keys, codebook),
        "torch cdist": lambda: torch.cdist(keys, codebook).argmin(-1),
    }
    return Problem.of([], runs, seen=distance).beside(peers.quantizer(keys, codebook))


def vq(size: Size, device: torch.device, causal: bool = False) -> Problem:
    """Attention over quantised keys; the codes are known to all candidates. The keys get no gradient, by definition."""
    query, key, value = heads(size, device, size.dim, size.dim, 2 * size.dim)
    (codebook,) = tensors(device, (1, CODES, size.dim))
    codebook = codebook.detach() / size.dim**0.5
    query, key = (t.detach() / size.dim**0.5 for t in (query, key))
    query.requires_grad_()
    codes = vq_attention.nearest_code(key, codebook)
    quantised = vq_attention.codewords(codebook, codes)

    def ours() -> Tensor:
        return vq_attention.vq_attention(query, key, value, codebook, causal=causal, codes=codes)

    def fused() -> Tensor:
        return F.scaled_dot_product_attention(query, quantised, value, is_causal=causal, scale=1.0)

    return Problem.of([query, value], {"ours": ours, "torch fused": fused})


def linear(size: Size, device: torch.device, causal: bool) -> Problem:
    query, key, value = heads(size, device, size.dim, size.dim, size.dim)
    features = linear_attention.elu_features
    runs = {"ours": lambda: linear_attention.linear_attention(query, key, value, features, causal=causal)}
    return Problem.of([query, key, value], runs).beside(peers.linear(causal, query, key, value))


def favor(size: Size, device: torch.device) -> Problem:
    query, key, value = heads(size, device, size.dim, size.dim, size.dim)
    features = seeded(lambda: linear_attention.FavorFeatures(size.dim, 4 * size.dim)).to(device)
    query, key = ((t.detach() / 2).requires_grad_() for t in (query, key))  # random features are for short vectors
    runs = {"ours": lambda: linear_attention.linear_attention(query, key, value, features)}
    return Problem.of([query, key, value], runs).beside(peers.favor(features.projection, query, key, value))


# ---- sparse activation and whole layers ----------------------------------------------------------------------------


def sparse(size: Size, device: torch.device) -> Problem:
    """Half of the tokens awake, window 128, bias on original distances."""
    module = seeded(
        lambda: sparse_activation.SparseActivation(
            size.dim, size.dim // 2, 2 * size.dim, window=CHUNK, bias="global", max_positions=1024
        )
    ).to(device)
    h, logits = tensors(device, size, (size.batch, size.length, 2))
    return Problem.of([h, logits, *module.parameters()], {"ours": lambda: module(h, logits)})


def mega_layer(size: Size, device: torch.device, chunk: int | None) -> Problem:
    config = MegaConfig(
        dim=size.dim, z_dim=size.dim // 2, v_dim=2 * size.dim, n=POLES, attention="laplace", norm="layernorm",
        prenorm=True, chunk=chunk, max_positions=4096, ffn_dim=size.dim,
    )  # fmt: skip
    layer = seeded(lambda: MegaLayer(config)).to(device)
    (x,) = tensors(device, size)
    problem = Problem.of([x, *layer.parameters()], {"ours": lambda: layer(x)})
    return problem.beside(peers.mega_layer(layer, x, config))


def seqboat_layer(size: Size, device: torch.device) -> Problem:
    """Beside it its EMA alone, which once took nearly all of the time."""
    config = SeqBoatConfig(
        dim=size.dim, z_dim=size.dim // 2, v_dim=2 * size.dim, n=POLES, window=CHUNK, max_positions=1024
    )
    layer = seeded(lambda: SeqBoatLayer(config)).to(device)
    (x,) = tensors(device, size)
    problem = Problem.of([x, *layer.parameters()], {"ours": lambda: layer(x)})
    problem.parts["EMA"] = Candidate(lambda: F.silu(layer.ema(x)), [x, *layer.ema.parameters()])
    return problem


# ---- training steps ------------------------------------------------------------------------------------------------

TASK = SimpleNamespace(name="benchmark", kind="tokens", classes=10, vocabulary=32, pairs=False)
STEP_LAYERS = 2


def training_step(size: Size, device: torch.device, name: str, beside: tuple[str, ...] = ("transformer",)) -> Problem:
    """One step of a two-layer classifier: forward, loss, backward, AdamW. The quadratic baseline beside it."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(TASK.vocabulary, (size.batch, size.length), generator=generator).to(device)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    answers = torch.randint(TASK.classes, (size.batch,), generator=generator).to(device)

    def step_of(name: str) -> Candidate:
        dropout = {"dropout": 0.0}
        model: Any = seeded(lambda: models.build(name, TASK, dim=size.dim, layers=STEP_LAYERS, **dropout)).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> Tensor:
            with torch.enable_grad():
                loss = F.cross_entropy(model(tokens, mask), answers)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Candidate(step, [])

    names = {"ours": name} | {other.capitalize(): other for other in beside if other != name}
    return Problem({label: step_of(each) for label, each in names.items()}, [], alike=False)


CASES: dict[str, Case] = {
    "convolution": Case(long_convolution, TRANSFORM, work=limits.convolution),
    "ema": Case(damped_ema, LINEAR, work=limits.ema),
    "ema-bidirectional": Case(
        partial(damped_ema, bidirectional=True), LINEAR, work=partial(limits.ema, directions=2)
    ),
    # At thousands of steps float32 shows. (Against float64, ours is off by 2e-5 in both, the peer by 1e-3 in full S4.)
    "s4d": Case(partial(state_space, full=False), LINEAR, work=limits.s4d_layer, agree=1e-3),
    "s4": Case(partial(state_space, full=True), LINEAR, work=limits.s4d_layer, agree=5e-3),
    "attention": Case(
        partial(full_attention, z=lambda dim: dim, v=lambda dim: dim), QUADRATIC, longest=4096,
        work=lambda size: limits.attention(size, size.length, size.dim, size.dim, keep=False),
    ),
    "attention-wide-values": Case(
        partial(full_attention, z=lambda dim: dim // 2, v=lambda dim: 2 * dim), QUADRATIC, longest=4096,
        work=lambda size: limits.attention(size, size.length, size.dim // 2, 2 * size.dim, keep=False),
    ),
    "chunk-softmax": Case(
        partial(chunk_attention, function="softmax"), LINEAR,
        work=lambda size: limits.attention(size, CHUNK, size.dim // 2, 2 * size.dim, keep=True),
    ),
    "chunk-laplace": Case(
        partial(chunk_attention, function="laplace"), LINEAR,
        work=lambda size: limits.attention(size, CHUNK, size.dim // 2, 2 * size.dim, keep=True),
    ),
    "window": Case(
        window_attention, LINEAR,
        work=lambda size: limits.attention(size, 2 * CHUNK + 1, size.dim, size.dim, keep=True),
    ),
    "sparse-activation": Case(sparse, LINEAR),
    "vq-assignment": Case(assignment, LINEAR, work=limits.assignment),
    "vq": Case(vq, LINEAR, work=limits.vq, agree=1e-3),
    "vq-causal": Case(partial(vq, causal=True), LINEAR, work=partial(limits.vq, causal=True)),
    "linear": Case(partial(linear, causal=False), LINEAR),
    "linear-causal": Case(partial(linear, causal=True), LINEAR, work=limits.linear),
    # The published code adds 1e-4 to features that it has scaled to at most 1; ours does not.
    "favor": Case(favor, LINEAR, agree=3e-2),
    "fft-bias": Case(toeplitz, TRANSFORM, work=limits.fft_bias),
    "mega-layer": Case(partial(mega_layer, chunk=None), QUADRATIC, longest=4096),
    "mega-chunk-layer": Case(partial(mega_layer, chunk=CHUNK), LINEAR, work=limits.mega_layer),
    "seqboat-layer": Case(seqboat_layer, LINEAR),
}  # fmt: skip

QUADRATIC_MODELS = ("mega", "transformer")
STEP = "step-"  # "step-mega": one training step of that model
CASES |= {
    STEP + name: Case(
        partial(training_step, name=name),
        QUADRATIC if name in QUADRATIC_MODELS else LINEAR,
        longest=4096 if name in QUADRATIC_MODELS else None,
    )
    for name in models.NAMES
}
