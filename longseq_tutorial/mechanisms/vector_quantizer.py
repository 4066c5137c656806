"""Names for keys: each key is called by the nearest of S *codes*, ``k_hat[j] = C[z[j]]``.

Keys with the same name get the same weight from any query, so what hangs on them can be added up beforehand: that is
what :mod:`~longseq_tutorial.mechanisms.vq_attention` makes of it. Here is how keys get their names and how gradients
pass a choice that has none (:func:`straight_through`), how sums over names are taken (:func:`code_sums`), and how the
codes follow the keys (:class:`VectorQuantizer`).

Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", ICLR 2024, and its published code.

Letters: B batch, H heads, L length, S codes, k and v widths of keys and values.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from .devices import at_once, in_pieces
from .fft import working_dtype

__all__ = ["VectorQuantizer", "code_sums", "codewords", "nearest_code", "perplexity", "straight_through"]

WORKING_SET = 1 << 20  # scores held at once on a CPU, in numbers: a few MB, near the processor


# ---- names for keys --------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest_code(k: Tensor, codebook: Tensor) -> Tensor:
    """The index of the code nearest to each key: ``k (B, H, L, k)``, ``codebook (H, S, k)`` -> ``(B, H, L)``, int64.

    ``|k - C|^2 = |k|^2 - 2 (k.C - |C|^2 / 2)``, and ``|k|^2`` is the same for all codes: so the nearest code is the one
    with the largest ``k.C - |C|^2 / 2``. In float32 or better, since half precision would choose other codes. Never
    holds all L * S distances at once.
    """
    check_codebook(k, codebook)
    dtype = working_dtype(k, codebook)
    with torch.autocast(k.device.type, enabled=False):
        codes = codebook.to(dtype)
        half = codes.square().sum(-1).unsqueeze(1) / 2  # (H, 1, S)
        rows = max(1, at_once(k, WORKING_SET) // (k.shape[0] * half.numel()))
        # max gives the index along with the value, and does so four times faster than argmax.
        nearest = [(part.to(dtype) @ codes.mT).sub_(half).max(-1).indices for part in k.split(rows, dim=2)]
        return torch.cat(nearest, dim=2)


def codewords(codebook: Tensor, z: Tensor) -> Tensor:
    """Look names up: ``codebook (H, S, k)``, ``z (B, H, L)`` -> ``(B, H, L, k)``."""
    head = torch.arange(codebook.shape[0], device=z.device)[:, None]
    return codebook[head, z]


def straight_through(k: Tensor, k_hat: Tensor) -> Tensor:
    """The value of the codeword, bit for bit, since k - k is exactly 0, with the gradient of the key."""
    return k_hat + (k - k.detach())


def code_sums(v: Tensor, z: Tensor, codes: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For each code the sum of the values whose keys bear its name, and their number: ``Delta V`` and ``Delta 1``.

    Args:
        v: ``(B, H, L, v)``; z: ``(B, H, L)``; codes: S.
        mask: bool ``(B, L)``; padding is not counted.

    Returns:
        ``(B, H, S, v)`` and ``(B, H, S)``, in the dtype of v.
    """
    real = None if mask is None else mask[:, None].expand_as(z)
    return sums_in_bins(v, z, codes, real)


def perplexity(counts: Tensor) -> Tensor:
    """How many codes are in use, in effect: ``exp(entropy)`` of ``counts (..., S)`` -> ``(...)``, between 1 and S.

    S codes in equal use have perplexity S; one code for everything has 1. No counts at all give 1.
    """
    share = (counts / counts.sum(-1, keepdim=True)).nan_to_num()
    return torch.exp(-torch.xlogy(share, share).sum(-1))


def sums_in_bins(v: Tensor, index: Tensor, bins: int, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add rows of v ``(B, H, L, v)`` into ``bins`` bins by ``index (B, H, L)``: sums (B, H, bins, v), numbers."""
    batch, heads, _, width = v.shape
    first = torch.arange(batch * heads, device=v.device).view(batch, heads, 1) * bins
    where = (index + first).flatten()  # a bin of its own for every sequence and head
    one = v.new_ones(index.shape) if real is None else real.to(v.dtype)
    if real is not None:
        v = v.masked_fill(~real.unsqueeze(-1), 0)
    sums = v.new_zeros(batch * heads * bins, width).index_add(0, where, v.flatten(0, 2))
    numbers = v.new_zeros(batch * heads * bins).index_add(0, where, one.flatten())
    return sums.view(batch, heads, bins, width), numbers.view(batch, heads, bins)


# ---- the quantiser ---------------------------------------------------------------------------------------------------

STARTS = ("kmeans++", "keys", "normal")


class VectorQuantizer(nn.Module):
    """Gives every key the name of its nearest code, and lets the codes follow the keys.

    A code is the average of the keys that chose it, an exponential moving average over updates::

        code_sum   <-  decay * code_sum   + (1 - decay) * sum of the keys with this code
        code_count <-  decay * code_count + (1 - decay) * their number
        codebook    =  code_sum / max(code_count, 0.01)

    The update happens in training mode, without gradients, after the keys have been named. The keys, in turn, are held
    near their codes by the commitment loss, ``|k - C[z]|^2`` summed over heads and averaged over real tokens, which
    the caller adds to the loss with a small weight (1e-4 in Transformer-VQ). Keep keys normalised (there: length
    ``key_dim ** 0.25``), or loss and codebook may grow without bound.

    Args:
        heads, codes, key_dim: H, S, k.
        decay: gamma, how much of sum and count survives an update.
        start: what the first batch in training makes of the codebook: "kmeans++" spreads the codes over its keys,
            "keys" takes some at random, "normal" keeps small random numbers, as the published code does.
        restart: a code whose count falls below this share of the average count is dead and becomes a random key of the
            batch, with the average count. 0 never restarts; the published code does not.

    Buffers: ``code_sum (H, S, k)``, ``code_count (H, S)``, ``started``, ``draws`` (how often keys were drawn). In
    bfloat16 the averages would stand still, so they stay in float32 or better whatever the module is cast to.

    Several processes (torch.distributed) that share a batch hold one codebook, that of a single process with the whole
    batch: sums and counts are added up over all of them, keys are drawn from all of them, and the loss of each is such
    that their mean is that of the whole batch. :meth:`all_reduce` is the place to hook in something else; with
    ``synchronised`` set to False a process keeps to itself.

    Source: Transformer-VQ's published code; ``start`` and ``restart`` are ours.
    """

    code_sum: Tensor
    code_count: Tensor
    started: Tensor
    draws: Tensor

    def __init__(
        self,
        heads: int,
        codes: int,
        key_dim: int,
        decay: float = 0.99,
        *,
        start: str = "kmeans++",
        restart: float = 0.01,
    ) -> None:
        super().__init__()
        if min(heads, codes, key_dim) < 1 or not 0 <= decay < 1 or not 0 <= restart < 1 or start not in STARTS:
            raise ValueError(
                f"wanted heads, codes, key_dim >= 1, decay and restart in [0, 1), start in {STARTS}; got "
                f"heads={heads}, codes={codes}, key_dim={key_dim}, decay={decay}, restart={restart}, start={start!r}."
            )
        self.heads, self.codes, self.key_dim = heads, codes, key_dim
        self.decay, self.start, self.restart = decay, start, restart
        self.register_buffer("code_sum", torch.randn(heads, codes, key_dim) * (heads * codes) ** -0.5)
        self.register_buffer("code_count", torch.ones(heads, codes))
        self.register_buffer("started", torch.tensor(start == "normal"))
        self.register_buffer("draws", torch.tensor(0))
        self.synchronised = True
        self._begun = False  # whether `started` was seen to be True: to look at it, a GPU must be waited for
        self.codes_seen = nn.Identity()  # a window for `record`: the codes (B, H, L) pass through unchanged

    @property
    def codebook(self) -> Tensor:
        """The codes ``(H, S, k)``, a fresh tensor: a later update does not change it."""
        return self.code_sum / self.code_count.clamp(min=0.01).unsqueeze(-1)

    def perplexity(self) -> Tensor:
        """Codes in use, in effect, for each head ``(H,)``, by the running counts."""
        return perplexity(self.code_count)

    def forward(self, k: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``k (B, H, L, k)`` -> its codewords, same shape; the codes ``(B, H, L)``; the commitment loss, a number.

        The codewords are exact in value, and pass their gradient straight through to k. Padding (``mask`` False) gets a
        code too, but enters neither sums, counts nor loss. (The published code averages the loss over padded positions
        as well, each adding 0.) In training, codes and loss belong to the codebook before the update.
        """
        check_mask(k, mask)
        self.set_up(k, mask)
        codebook = self.codebook
        z = self.codes_seen(nearest_code(k, codebook))
        wide = k.to(working_dtype(k, codebook))
        if mask is not None:
            wide = wide.masked_fill(~mask[:, None, :, None], 0)
        with torch.autocast(k.device.type, enabled=False):
            nearest = codewords(codebook, z).to(wide.dtype)
            error = (wide - nearest).square().sum(-1).sum(1)  # (B, L): over width and heads
            total = error.sum() if mask is None else error.masked_fill(~mask, 0).sum()
            real = error.new_full((), error.numel()) if mask is None else mask.sum()
            if self.training:  # one process's share of the real tokens may be the larger one
                real = self.update(wide, z, mask) / self._processes()[1]
            loss = total / real.clamp(min=1)
        return straight_through(wide, nearest).to(k.dtype), z, loss

    @torch.no_grad()
    def update(self, k: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Move every code towards the keys that chose it, and restart the dead. Returns how many tokens were real."""
        sums, numbers = code_sums(k.detach().to(self.code_sum.dtype), z, self.codes, mask)
        sums, numbers = self.all_reduce(sums.sum(0)), self.all_reduce(numbers.sum(0))
        for average, new in ((self.code_sum, sums), (self.code_count, numbers)):
            average.mul_(self.decay).add_(new, alpha=1 - self.decay)
        real = numbers[0].sum()
        usual = self.code_count.mean(-1, keepdim=True).expand_as(self.code_count)
        dead = (self.code_count < self.restart * usual) & (real > 0)
        # A CPU is asked before it draws. A GPU draws in any case: to wait for its answer would hold up what follows.
        if not in_pieces(dead) or dead.any():
            fresh = self._random_keys(k, mask, self.codes, counts=dead.any())
            self.code_sum.copy_(torch.where(dead.unsqueeze(-1), fresh * usual.unsqueeze(-1), self.code_sum))
            self.code_count.copy_(torch.where(dead, usual, self.code_count))
        return real

    @torch.no_grad()
    def set_up(self, k: Tensor, mask: Tensor | None = None) -> None:
        """Begin with codes from these keys, if training has just begun; otherwise nothing."""
        if not self.training or self._begun:
            return
        self._begun = bool(self.started)
        if self._begun:
            return
        check_codebook(k, self.code_sum)
        if not self.all_reduce(k.new_ones(()) if mask is None else mask.any().to(k.dtype)):
            return  # no token is real: the next batch may be better
        draw = self._spread_keys if self.start == "kmeans++" else self._random_keys
        codebook = draw(k.detach(), mask, self.codes)
        self.set_codebook(self._gather(codebook)[0])  # the first process's: others may round differently

    @torch.no_grad()
    def set_codebook(self, codebook: Tensor) -> None:
        """Use these codes ``(H, S, k)``, each with a count of 1."""
        self.code_sum.copy_(codebook)
        self.code_count.fill_(1)
        self.started.fill_(True)
        self._begun = True

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all processes; x itself where there is one."""
        if self._processes()[1] > 1:
            dist.all_reduce(x)
        return x

    def _processes(self) -> tuple[int, int]:
        """Which process this is, and of how many."""
        if not (self.synchronised and dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(), dist.get_world_size()

    def _gather(self, x: Tensor) -> Tensor:
        """x of every process, ``(processes, *x.shape)``: each puts its own into a sum that is 0 there elsewhere."""
        rank, processes = self._processes()
        slots = x.new_zeros(processes, *x.shape)
        slots[rank] = x
        return self.all_reduce(slots)

    def _random_keys(self, k: Tensor, mask: Tensor | None, count: int, counts: Tensor | int = 1) -> Tensor:
        """``count`` real keys for each head, different ones as far as there are: ``(H, count, k)``.

        A lottery: every token has a ticket, and the smallest win. Tickets depend on the number of the draw and on the
        token's place in the whole batch, of which a process holds every n-th sequence. So all processes choose the keys
        that a single one would. ``counts``: 1, or 0 if nobody will use them, which then leave no trace.
        """
        rank, processes = self._processes()
        batch, heads, length, _ = k.shape
        real = torch.ones(batch, length, dtype=torch.bool, device=k.device) if mask is None else mask
        row = torch.arange(batch, device=k.device)[:, None] * processes + rank
        head = torch.arange(heads, device=k.device)[:, None, None]
        self.draws.add_(counts)
        tickets = _scatter((head << 48) + (row << 32) + real.cumsum(1) + _scatter(self.draws))  # (H, B, L)
        tickets = tickets.masked_fill(~real, LOST).flatten(1)
        keys, tickets = _smallest(k.transpose(0, 1).flatten(1, 2).to(self.code_sum.dtype), tickets, count)
        if processes > 1:
            keys, tickets = (self._gather(x).transpose(0, 1).flatten(1, 2) for x in (keys, tickets))
            keys, tickets = _smallest(keys, tickets, count)
        found = (tickets[0] < LOST).sum().clamp(min=1)  # if fewer than wanted, they are taken again
        return keys[:, torch.arange(count, device=k.device) % found]

    def _spread_keys(self, k: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """k-means++: each next code is a key, drawn with a chance that grows with its squared distance to the codes."""
        keys = self._random_keys(k, mask, 16 * count)  # (H, 16 S, k): enough to choose from
        generator = torch.Generator(keys.device).manual_seed(int(self.draws))
        chosen = [keys[:, :1]]
        distance = (keys - chosen[0]).square().sum(-1)
        while len(chosen) < count:
            chance = distance + torch.finfo(keys.dtype).tiny  # where every key is a code already, take any
            pick = torch.multinomial(chance, 1, generator=generator).unsqueeze(-1)  # (H, 1, 1)
            chosen.append(keys.gather(1, pick.expand(-1, -1, self.key_dim)))
            distance = torch.minimum(distance, (keys - chosen[-1]).square().sum(-1))
        return torch.cat(chosen, dim=1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._begun = False  # look again

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "VectorQuantizer":
        """Move and cast as any module, but keep sums and counts in float32 or better."""
        before = {name: self.get_buffer(name) for name in ("code_sum", "code_count")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            now = self.get_buffer(name)
            if now.dtype in (torch.bfloat16, torch.float16):
                self.register_buffer(name, old.to(now.device))
        return self

    def extra_repr(self) -> str:
        shape = f"{self.heads}, {self.codes}, {self.key_dim}"
        return f"{shape}, decay={self.decay}, start={self.start!r}, restart={self.restart}"


LOST = 2**62  # above all tickets


def _scatter(x: Tensor) -> Tensor:
    """A whole number below 2**62 for each whole number, as if drawn at random, yet the same everywhere (splitmix64)."""
    x = x * -0x61C8864680B583EB  # products wrap around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ (x >> shift)) * factor
    return x & (LOST - 1)


def _smallest(keys: Tensor, tickets: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` keys ``(H, n, k)`` with the smallest tickets ``(H, n)``, in order; filled up with lost ones."""
    short = max(0, count - keys.shape[1])
    keys, tickets = F.pad(keys, (0, 0, 0, short)), F.pad(tickets, (0, short), value=LOST)
    tickets, order = tickets.topk(count, largest=False)
    return keys.gather(1, order.unsqueeze(-1).expand(-1, -1, keys.shape[-1])), tickets


# ---- what is asked of arguments --------------------------------------------------------------------------------------


def check_codebook(k: Tensor, codebook: Tensor) -> None:
    if k.dim() != 4 or 0 in k.shape:
        raise ValueError(f"k must be (batch, heads, length >= 1, key width); got {tuple(k.shape)}.")
    if codebook.dim() != 3 or codebook.shape[::2] != k.shape[1::2] or codebook.shape[1] == 0:
        raise ValueError(
            f"codebook must be (heads, codes >= 1, key width) = ({k.shape[1]}, *, {k.shape[3]}) to fit k; "
            f"got {tuple(codebook.shape)}."
        )


def check_mask(k: Tensor, mask: Tensor | None) -> None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"mask must be bool (batch, length) = {(k.shape[0], k.shape[2])}, True where the token is real; "
            f"got {mask.dtype} {tuple(mask.shape)}. Pass mask.bool(), shaped like that."
        )
