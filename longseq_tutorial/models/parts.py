"""What all models share below their blocks: normalisation, embeddings and pooling.

Letters: B batch, L length, D width of the model, C channels of a signal. ``mask`` is bool ``(B, L)``, True = real.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ..mechanisms.fft import working_dtype

__all__ = ["NORMS", "BatchNorm", "Norm", "PatchEmbedding", "SampleEmbedding", "TokenEmbedding", "mean_pool"]

NORMS = ("layernorm", "batchnorm", "scalenorm", "rmsnorm")
EPS = 1e-5


class Norm(nn.Module):
    """One of the four normalisations of Mega, over the last axis; ``kind`` is a name from ``NORMS``.

    * layernorm, rmsnorm: as in torch, with weight (and bias) per channel.
    * scalenorm: ``s * x / sqrt(mean(x**2) + eps)`` with one learned number s. (Mega's code; the paper that introduced
      the name divides by the norm instead of the root mean square.)
    * batchnorm: statistics per channel over batch and time, of real tokens only: padding must not leak into them.
      Several processes that share a batch have common ones.
    """

    def __init__(self, kind: str, dim: int) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {kind!r}.")
        self.kind = kind
        if kind == "layernorm":
            self.norm: nn.Module = nn.LayerNorm(dim, eps=EPS)
        elif kind == "rmsnorm":
            self.norm = nn.RMSNorm(dim, eps=EPS)
        elif kind == "batchnorm":
            self.norm = BatchNorm(dim, eps=EPS)
        else:
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D) -> (B, L, D)``; ``(B, D)`` works too, for streaming."""
        if self.kind == "scalenorm":
            return self.scale * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        if self.kind != "batchnorm":
            return self.norm(x)
        return self.norm(x, mask)


class BatchNorm(nn.BatchNorm1d):
    """torch's batch norm over the last axis, with a mask, and with common statistics where processes share a batch.

    ``torch.nn.SyncBatchNorm`` has the latter on GPUs alone; this works on a CPU as well, in float32 or better, with the
    same parameters and buffers as in a single process. With ``synchronised`` set to False a process keeps to itself.
    """

    synchronised = True

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(B, L, D)`` and bool ``(B, L)`` -> ``(B, L, D)``, 0 where padded; any shape ``(..., D)`` without a mask."""
        together = self.synchronised and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not self.training or (mask is None and not together):
            return super().forward(x.flatten(0, -2)).view_as(x)
        if mask is not None and not together and not torch.compiler.is_compiling():  # compiled shapes must be known
            return torch.zeros_like(x).masked_scatter(mask.unsqueeze(-1), super().forward(x[mask]).to(x.dtype))
        real = torch.ones_like(x[..., :1], dtype=torch.bool) if mask is None else mask.unsqueeze(-1)  # (B, L, 1)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(working_dtype(x)).masked_fill(~real, 0)
            real = real.to(wide.dtype)
            add = _SumOverProcesses.apply if together else _same
            number = add(real.sum())
            mean = add(wide.flatten(0, -2).sum(0)) / number
            centred = (wide - mean) * real  # before squaring: large means would drown small deviations
            variance = add(centred.square().flatten(0, -2).sum(0)) / number
            y = torch.addcmul(self.bias, centred, torch.rsqrt(variance + self.eps) * self.weight) * real
        self._remember(mean.detach(), variance.detach() * number / (number - 1).clamp(min=1))
        return y.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics follow, as torch does."""
        buffers: Any = self.running_mean, self.running_var, self.num_batches_tracked
        buffers[2].add_(1)
        for average, new in zip(buffers[:2], (mean, variance), strict=True):
            average.lerp_(new.to(average.dtype), self.momentum or 1 / float(buffers[2]))


def _same(x: Tensor) -> Tensor:
    return x


class _SumOverProcesses(torch.autograd.Function):
    """The sum of x over all processes. What reaches the sum in any of them reaches x: gradients add up as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class TokenEmbedding(nn.Module):
    """A learned vector for each token: ``(B, L) -> (B, L, D)``, standard deviation ``1/sqrt(D)``."""

    def __init__(self, vocabulary: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.table.weight, std=dim**-0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(B, L)`` of any integer type, and the mask, which passes through."""
        if x.is_floating_point() or x.dim() != 2:
            raise ValueError(
                f"This model reads tokens: wanted integers (batch, length); got {x.dtype} {tuple(x.shape)}."
            )
        return self.table(x.long()), mask

    def step(self, x_t: Tensor) -> Tensor:
        """``(B,) -> (B, D)``."""
        return self.table(x_t.long())


class SampleEmbedding(nn.Module):
    """Each number of a signal times a learned vector, plus another: ``(B, L)`` or ``(B, L, C)`` to ``(B, L, D)``.

    One position per pixel or audio sample, as Mega reads images and raw speech.
    """

    def __init__(self, dim: int, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, dim))
        self.bias = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias, std=0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The signal and its mask, which passes through."""
        return _channels_last(x, len(self.weight)).to(self.weight.dtype) @ self.weight + self.bias, mask

    def step(self, x_t: Tensor) -> Tensor:
        """``(B,)`` or ``(B, C)`` to ``(B, D)``."""
        return self.forward(x_t.view(x_t.shape[0], 1, -1))[0].squeeze(1)


class PatchEmbedding(nn.Module):
    """Learned filters over stretches of the signal: one token for every few samples instead of one for each.

    A chain of strided convolutions, each followed by GELU (all but the last) and, at the end, a layer norm. Token t
    sees its own stretch of samples and, where kernels are wider than strides, some before it; none after it.

    Args:
        dim: D.
        stages: ``(kernel, stride)`` of each convolution; the patch length is the product of the strides.
        channels: C of the signal.
        level: root mean square of the signals to come; they are divided by it. A GELU bends nothing much smaller than
            1, and filters without a bend cannot tell loud from quiet.
    """

    def __init__(self, dim: int, stages: Sequence[tuple[int, int]], channels: int = 1, level: float = 0.1) -> None:
        super().__init__()
        if not stages or any(kernel < stride or stride < 1 for kernel, stride in stages):
            raise ValueError(
                f"patch stages must be (kernel, stride) pairs with kernel >= stride >= 1; got {list(stages)}."
            )
        self.stages = tuple((int(k), int(s)) for k, s in stages)
        self.channels, self.level = channels, level
        widths = [channels] + [dim] * len(self.stages)
        self.filters = nn.ModuleList(
            nn.Conv1d(c, d, kernel, stride)
            for c, d, (kernel, stride) in zip(widths, widths[1:], self.stages, strict=False)
        )
        self.norm = nn.LayerNorm(dim)

    @property
    def patch(self) -> int:
        """Samples a token."""
        length = 1
        for _, stride in self.stages:
            length *= stride
        return length

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``(B, L)`` or ``(B, L, C)`` to ``(B, ceil(L / patch), D)``; a token is real if any of its samples is."""
        h = _channels_last(x, self.channels) / self.level  # (B, L, C)
        if mask is not None:
            h = h.masked_fill(~mask.unsqueeze(-1), 0)
        h = F.pad(h.transpose(1, 2), (0, -x.shape[1] % self.patch))  # (B, C, a whole number of patches)
        for i, (conv, (kernel, stride)) in enumerate(zip(self.filters, self.stages, strict=True)):
            h = conv(F.pad(h, (kernel - stride, 0)))
            h = F.gelu(h) if i + 1 < len(self.filters) else h
        if mask is not None:
            mask = F.pad(mask, (0, -mask.shape[1] % self.patch)).unflatten(1, (-1, self.patch)).any(-1)
        return self.norm(h.transpose(1, 2)), mask


def mean_pool(h: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over real positions: ``(B, L, D) -> (B, D)``. A sequence without a real position gives zeros."""
    if mask is None:
        return h.mean(1)
    total = h.masked_fill(~mask.unsqueeze(-1), 0).sum(1)
    return total / mask.sum(1, keepdim=True).clamp(min=1).to(h.dtype)


def _channels_last(x: Tensor, channels: int) -> Tensor:
    """The signal as ``(B, L, C)``."""
    x = x.unsqueeze(-1) if x.dim() == 2 else x
    if not x.is_floating_point() or x.dim() != 3 or x.shape[-1] != channels:
        raise ValueError(
            f"This model reads signals: wanted floats (batch, length) or (batch, length, {channels}); "
            f"got {x.dtype} {tuple(x.shape)}."
        )
    return x
