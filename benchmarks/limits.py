"""What the machine can do at best, measured in the same run, and the work that a mechanism cannot avoid.

The *floor* of a mechanism is the time that its unavoidable work takes at the best rates of this machine: matrix
products at the rate of one large product, tensors read and written at the rate of one large copy, results written into
fresh memory, transcendental functions at the rate of `exp` on numbers in the cache, Fourier transforms at the rate of
one transform of that length. How far an implementation lies above its floor tells what is left to gain.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch

from longseq_tutorial.mechanisms.fft import good_length

from .problems import Size

FLOAT = 4  # bytes; everything is float32
BLOCK = 64  # steps in a block of a linear recurrence
CHUNK = 128  # of chunk attention, windows and causal linear attention
CODES = 512
POLES = 16  # EMA dimensions a channel
STATE = 64  # numbers of state a channel, of S4


# ---- what the machine can do ---------------------------------------------------------------------------------------


def clock(device: torch.device) -> Callable[[], float]:
    """Processor time of one thread, which does not count what others do meanwhile; else the wall clock."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(run: Callable[[], Any], device: torch.device, patience: float = 0.05) -> float:
    """Seconds of the fastest of at least three calls."""
    now, seconds = clock(device), []
    while len(seconds) < 3 or sum(seconds) < patience:
        synchronize(device)
        start = now()
        run()
        synchronize(device)
        seconds.append(max(now() - start, 1e-9))
    return min(seconds)


class Limits:
    """The rates of this machine. Each is measured when it is first asked for; all are at least what a user meets."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.fresh = cache(self._fresh)
        self.transforms = cache(self._transforms)
        self.copy = self._copy()
        self.product = self._product()
        self.exp = self._exp()

    def rates(self) -> dict[str, float]:
        """A second: bytes copied, floating-point operations in a product, exponentials."""
        return {"bytes": self.copy, "flop": self.product, "exp": self.exp}

    def _copy(self) -> float:
        """Bytes a second, read and written, of a copy far larger than the caches."""
        source = torch.ones(1 << 25, device=self.device)  # 128 MiB
        target = torch.ones_like(source)
        return 2 * FLOAT * source.numel() / fastest(lambda: target.copy_(source), self.device)

    def _product(self) -> float:
        """Floating-point operations a second of a matrix product; a GPU is done with a small one before it is awake."""
        n = 1024 if self.device.type == "cpu" else 8192
        a, b = torch.ones(n, n, device=self.device), torch.ones(n, n, device=self.device)
        out = torch.empty_like(a)
        return 2 * n**3 / fastest(lambda: torch.mm(a, b, out=out), self.device)

    def _exp(self) -> float:
        """Exponentials a second, of numbers in the cache; on a GPU of so many that the call itself does not count."""
        x = torch.rand(1 << (16 if self.device.type == "cpu" else 26), device=self.device)
        out = torch.empty_like(x)
        return x.numel() / fastest(lambda: torch.exp(x, out=out), self.device)

    def _fresh(self, count: int) -> float:
        """Seconds to get memory for `count` numbers and to write it: every result pays that."""
        return fastest(lambda: torch.empty(count, device=self.device).fill_(1.0), self.device)

    def _transforms(self, rows: int, length: int) -> float:
        """Seconds of a real Fourier transform of so many rows and its inverse."""
        x = torch.rand(rows, length, device=self.device)
        spectrum = torch.fft.rfft(x)
        there = fastest(lambda: torch.fft.rfft(x), self.device)
        return there + fastest(lambda: torch.fft.irfft(spectrum, n=length), self.device)


# ---- what cannot be avoided ----------------------------------------------------------------------------------------


class Transforms(NamedTuple):
    """So many rows, there and back."""

    rows: int
    length: int


@dataclass
class Work:
    """`products` in FLOP; `moved`: numbers read or written in tensors that exist; `fresh`: the sizes of new results, in
    numbers; `curves`: evaluations of exp, erf, sigmoid."""

    products: float = 0.0
    moved: float = 0.0
    fresh: list[int] = field(default_factory=list)
    curves: float = 0.0
    transforms: list[Transforms] = field(default_factory=list)

    def floor(self, limits: Limits) -> float:
        """Seconds at the machine's best."""
        return (
            self.products / limits.product
            + self.moved * FLOAT / limits.copy
            + sum(limits.fresh(count) for count in self.fresh)
            + self.curves / limits.exp
            + sum(limits.transforms(*t) for t in self.transforms)
        )


Pair = tuple[Work, Work]  # forward; forward and backward


def pair(
    inputs: list[int],
    output: int,
    products: float,
    curves: float = 0,
    between: tuple[int, ...] = (),
    kept: int = 0,
    again: float = 0,
    transforms: tuple[Sequence[Transforms], Sequence[Transforms]] = ((), ()),
) -> Pair:
    """Forward reads its inputs and writes its output. Backward reads them again and the output's gradient, writes a
    gradient for each input, and costs two products for each one of the forward and as many curves once more.

    `between`: what matrix products hand on to one another: it is written and read, and so is its gradient. `kept`: what
    only backward needs. `again`: products that backward repeats, in order to keep nothing large.
    """
    there, both = transforms
    read, handed = sum(inputs), sum(between)
    return (
        Work(products, read + handed, [output, *between], curves, list(there)),
        Work(3 * products + again, 2 * read + output + 3 * handed + kept,
             [output, *inputs, *between, *between, *([kept] if kept else [])], 2 * curves, list(both)),
    )  # fmt: skip


def ema(size: Size, directions: int = 1) -> Pair:
    """In blocks: each block times its own Toeplitz matrix, from and to n states a direction; then the SiLU."""
    count = size.batch * size.length * size.dim
    return pair([count], count, 2 * count * (BLOCK + 2 * POLES * directions), count)


def s4d_layer(size: Size) -> Pair:
    """The same with N real states; then GELU, a layer that doubles the width, and a gate."""
    count = size.batch * size.length * size.dim
    products = 2 * count * (BLOCK + 2 * STATE) + 4 * count * size.dim
    return pair([count], count, products, 2 * count, between=(count, 2 * count))


def convolution(size: Size, kernel: bool = True) -> Pair:
    """Signals and kernels there, outputs back; their gradients likewise. The spectra of the signals are handed on from
    a transform to a product."""
    rows, length = size.batch * size.dim, good_length(2 * size.length - 1)
    signals, kernels = Transforms(rows, length), Transforms(size.dim, length)
    count, spectra = rows * size.length, rows * (length + 2)
    forward = [signals, kernels] if kernel else [signals]  # the kernels' inverse comes in backward
    return pair([count], count, 0, between=(spectra,), transforms=(forward, [*forward, signals]))


def fft_bias(size: Size) -> Pair:
    """One kernel for all channels: only the values have to be transformed."""
    return convolution(size, kernel=False)


def attention(size: Size, seen: int, z: int, v: int, keep: bool) -> Pair:
    """Scores, weights, and their product with the values, for `seen` keys a query. `keep`: the weights are kept for
    backward; else they are worked out again."""
    tokens = size.batch * size.length
    scores = 2 * tokens * seen * z
    products, curves = scores + 2 * tokens * seen * v, tokens * seen
    rest = {"kept": curves} if keep else {"again": scores}
    return pair([tokens * z, tokens * z, tokens * v], tokens * v, products, curves, **rest)


def assignment(size: Size) -> Pair:
    """One product with the codes. Nothing has a gradient."""
    tokens = size.batch * size.length
    work = Work(2 * tokens * CODES * size.dim, tokens * size.dim)
    return work, work


def vq(size: Size, causal: bool = False) -> Pair:
    """Attention to the codes, and when causal to the own block of as many keys; values are twice as wide."""
    return attention(size, CODES * (2 if causal else 1), size.dim, 2 * size.dim, keep=True)


def linear(size: Size) -> Pair:
    """In chunks: pairs inside, a matrix of sums from chunk to chunk; features of queries and keys."""
    count = size.batch * size.length * size.dim
    return pair([count] * 3, count, 2 * count * (2 * CHUNK + 2 * size.dim), 2 * count)


def mega_layer(size: Size) -> Pair:
    """EMA, three linear layers, chunk attention, and the curves of every gate."""
    tokens, dim, z, v = size.batch * size.length, size.dim, size.dim // 2, 2 * size.dim
    layers = 2 * tokens * (dim * v + dim * (2 * dim + z + v) + v * dim)
    inside = 2 * tokens * CHUNK * (z + v)
    smooth = 2 * tokens * dim * (BLOCK + 4 * POLES)
    curves = tokens * (dim + v + (2 * dim + z + v) + CHUNK)
    between = tuple(
        tokens * width for width in (dim, v, 2 * dim + z + v, v, dim)
    )  # EMA, values, gates, found, candidate
    return pair([tokens * dim], tokens * dim, layers + inside + smooth, curves, between, kept=tokens * CHUNK)
