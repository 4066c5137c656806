"""What is measured: one case a mechanism, each with candidates that compute the same thing.

A case is a function `length -> Problem`. Its first candidate is ours; the others are the peers. All candidates of a
problem share the tensors in `leaves`, whose gradients are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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

WIDTH = 64  # channels of every case, so that the costs can be compared
LINEAR, TRANSFORM, QUADRATIC = "linear", "L log L", "quadratic"


@dataclass(frozen=True)
class Problem:
    """Candidates `name -> () -> output`, and the tensors whose gradients count (inputs and parameters)."""

    candidates: dict[str, Callable[[], Tensor]]
    leaves: list[Tensor]


@dataclass(frozen=True)
class Case:
    """`build(length, device)` gives the problem; `growth` is what theory says; `longest` where a peer must stop."""

    build: Callable[[int, torch.device], Problem]
    growth: str
    longest: int | None = None  # of the case itself, for quadratic ones


def tensors(device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers that want gradients; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]


def module_problem(module: nn.Module, length: int, device: torch.device, **call: Any) -> Problem:
    """One of our modules on `(1, length, WIDTH)`."""
    (x,) = tensors(device, (1, length, WIDTH))
    module = module.to(device)
    return Problem({"ours": lambda: module(x, **call)}, [x, *module.parameters()])


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A module with the same weights in every run."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


# ---- convolutions ----------------------------------------------------------------------------------------------


def long_convolution(length: int, device: torch.device) -> Problem:
    u, kernel = tensors(device, (1, length, WIDTH), (WIDTH, length))

    def plain() -> Tensor:
        """The textbook way: one transform of twice the length along the time axis."""
        spectrum = torch.fft.rfft(u, n=2 * length, dim=1) * torch.fft.rfft(kernel, n=2 * length).T
        return torch.fft.irfft(spectrum, n=2 * length, dim=1)[:, :length]

    return Problem({"ours": lambda: fft.long_convolution(u, kernel), "torch rfft of 2L": plain}, [u, kernel])


def damped_ema(length: int, device: torch.device, bidirectional: bool = False) -> Problem:
    return module_problem(seeded(lambda: ema.DampedEMA(WIDTH, 16, bidirectional)), length, device)


def s4d(length: int, device: torch.device) -> Problem:
    return module_problem(seeded(lambda: s4.S4D(WIDTH, 64)), length, device)


def s4_dplr(length: int, device: torch.device) -> Problem:
    return module_problem(seeded(lambda: s4.S4(WIDTH, 64)), length, device)


def toeplitz(length: int, device: torch.device) -> Problem:
    lags, v = tensors(device, (4, 2 * length - 1), (1, length, 4, WIDTH // 4))
    candidates = {"ours": lambda: fft_bias.toeplitz_product(lags, v)}
    if length <= 4096:
        candidates["dense matrix"] = lambda: fft_bias.toeplitz_product_dense(lags, v)
    return Problem(candidates, [lags, v])


# ---- attention ---------------------------------------------------------------------------------------------------


def heads(length: int, device: torch.device, *widths: int) -> list[Tensor]:
    return tensors(device, *((1, 1, length, width) for width in widths))


def full_attention(length: int, device: torch.device) -> Problem:
    q, k, v = heads(length, device, WIDTH, WIDTH, WIDTH)
    return Problem(
        {
            "ours": lambda: gated_attention.attend(q, k, v),
            "torch fused": lambda: F.scaled_dot_product_attention(q, k, v),
        },
        [q, k, v],
    )


def chunk_attention(length: int, device: torch.device, function: str) -> Problem:
    q, k, v = heads(length, device, WIDTH, WIDTH, WIDTH)
    attend = partial(chunking.chunk_attention, chunk=128, attend=gated_attention.attend, function=function)
    return Problem({"ours": lambda: attend(q, k, v)}, [q, k, v])


def window_attention(length: int, device: torch.device) -> Problem:
    q, k, v = heads(length, device, WIDTH, WIDTH, WIDTH)
    return Problem({"ours": lambda: chunking.window_attention(q, k, v, 128)}, [q, k, v])


def vq(length: int, device: torch.device, causal: bool = False) -> Problem:
    q, k, v = heads(length, device, WIDTH, WIDTH, 2 * WIDTH)
    (codebook,) = tensors(device, (1, 512, WIDTH))
    codebook = codebook.detach() / WIDTH**0.5
    q, k = (t.detach().div(WIDTH**0.5).requires_grad_() for t in (q, k))
    return Problem({"ours": lambda: vq_attention.vq_attention(q, k, v, codebook, causal=causal)}, [q, k, v])


def linear(length: int, device: torch.device, causal: bool, favor: bool = False) -> Problem:
    q, k, v = heads(length, device, WIDTH, WIDTH, WIDTH)
    features: Any = linear_attention.elu_features
    if favor:
        features = seeded(lambda: linear_attention.FavorFeatures(WIDTH, 256)).to(device)
    attend = linear_attention.linear_attention
    candidates = {"ours": lambda: attend(q, k, v, features, causal=causal)}
    return Problem(candidates, [q, k, v])


# ---- sparse activation and whole layers ----------------------------------------------------------------------------


def sparse(length: int, device: torch.device) -> Problem:
    """Half of the tokens awake, window 128, bias on original distances."""
    module = seeded(
        lambda: sparse_activation.SparseActivation(
            WIDTH, WIDTH // 2, 2 * WIDTH, window=128, bias="global", max_positions=1024
        )
    ).to(device)
    h, logits = tensors(device, (1, length, WIDTH), (1, length, 2))
    return Problem({"ours": lambda: module(h, logits)}, [h, logits, *module.parameters()])


def mega_layer(length: int, device: torch.device, chunk: int | None) -> Problem:
    config = MegaConfig(
        dim=WIDTH, z_dim=WIDTH // 2, v_dim=2 * WIDTH, n=16, attention="laplace", norm="layernorm", prenorm=True,
        chunk=chunk, max_positions=4096, ffn_dim=WIDTH,
    )  # fmt: skip
    return module_problem(seeded(lambda: MegaLayer(config)), length, device)


def seqboat_layer(length: int, device: torch.device) -> Problem:
    config = SeqBoatConfig(dim=WIDTH, z_dim=WIDTH // 2, v_dim=2 * WIDTH, n=16, window=128, max_positions=1024)
    return module_problem(seeded(lambda: SeqBoatLayer(config)), length, device)


CASES: dict[str, Case] = {
    "convolution": Case(long_convolution, TRANSFORM),
    "ema": Case(damped_ema, TRANSFORM),
    "ema-bidirectional": Case(partial(damped_ema, bidirectional=True), TRANSFORM),
    "s4d": Case(s4d, TRANSFORM),
    "s4": Case(s4_dplr, TRANSFORM),
    "attention": Case(full_attention, QUADRATIC, longest=4096),
    "chunk-softmax": Case(partial(chunk_attention, function="softmax"), LINEAR),
    "chunk-laplace": Case(partial(chunk_attention, function="laplace"), LINEAR),
    "window": Case(window_attention, LINEAR),
    "sparse-activation": Case(sparse, LINEAR),
    "vq": Case(vq, LINEAR),
    "vq-causal": Case(partial(vq, causal=True), LINEAR),
    "linear": Case(partial(linear, causal=False), LINEAR),
    "linear-causal": Case(partial(linear, causal=True), LINEAR),
    "favor": Case(partial(linear, causal=False, favor=True), LINEAR),
    "fft-bias": Case(toeplitz, TRANSFORM),
    "mega-layer": Case(partial(mega_layer, chunk=None), QUADRATIC, longest=4096),
    "mega-chunk-layer": Case(partial(mega_layer, chunk=128), TRANSFORM),
    "seqboat-layer": Case(seqboat_layer, TRANSFORM),
}
