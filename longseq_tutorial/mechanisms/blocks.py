"""Linear recurrences computed block by block: small matrix products instead of a step at a time or an FFT.

An EMA and a diagonal state space model are the same thing: per channel, a few numbers (the state) that decay and take
in the input, and an output read off them. With N numbers of state and decay q, for one channel::

    h[t] = q * h[t-1] + write * x[t]           y[t] = sum(read * h[t])

Cut time into blocks of C steps. What a block's outputs owe to its own inputs is a Toeplitz matrix of the kernel's first
C values; what they owe to everything earlier passes through the state that entered the block::

    y_block = Toeplitz x_block + Read h_in          h_out = decay * h_in + Write x_block

So a block costs ``C * (C + 2N)`` multiplications a channel, all in matrix products, and the whole sequence L/C times
that: linear in L, with a state of N numbers to carry on from. Two-sided filters cost hardly more: the Toeplitz matrix
is full instead of triangular, and a second state runs from the end.

:func:`block_recurrence_plain` says this in a page of torch, all blocks at once. :func:`block_recurrence` computes the
same numbers, gradients included, a stretch of about a megabyte at a time, so that what it works on stays in the
processor's cache: on a CPU, writing to fresh memory costs more than the arithmetic.

Letters: B batch, L length, D channels, N numbers of state, C block length, J = L // C blocks.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .devices import in_pieces

__all__ = ["BLOCK", "Tables", "block_recurrence", "block_recurrence_plain"]

BLOCK = 64  # steps: long enough to keep the loop over blocks short, short enough that C * C stays cheap
STRETCH = 2**20  # bytes of input worked on at once on a CPU: half of a common second-level cache
TILE = 64  # channels worked on at once on a CPU: each has tables of its own, which want to be in the cache too


class Tables(NamedTuple):
    """What a recurrence does within and across a block of C steps; time runs away from the incoming state.

    Attributes:
        kernel: ``(D, C)``, what an input adds to the outputs 0 .. C-1 steps later.
        read: ``(D, C, N)``, what the state that enters the block adds to each output.
        write: ``(D, N, C)``, what each input leaves in the state at the end of the block.
        decay: ``(D, N)``, what a whole block leaves of the state; ``(D, N / 2)`` complex, where the state's numbers are
            pairs (real, imaginary) next to each other; or ``(D, N, N)``, a matrix that maps the state (row = after).
    """

    kernel: Tensor
    read: Tensor
    write: Tensor
    decay: Tensor


def block_recurrence(
    x: Tensor,
    tables: Callable[[int], Tables],
    reverse_tables: Callable[[int], Tables] | None = None,
    state: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The outputs of a recurrence over ``x (B, L, D)``, and the state after its last step.

    Args:
        x: ``(B, L, D)``, L >= 1, of the dtype of the tables.
        tables: block length -> :class:`Tables`; asked for ``block``, and for what is left of L when cut into blocks.
        reverse_tables: the same for a second recurrence, which runs from the end; it sees the present too.
        state: ``(B, D, N)``, what an earlier part of the sequence left behind; None for the beginning.
        block: C. Any value gives the same numbers.

    Returns:
        ``y (B, L, D)`` and the state ``(B, D, N)``. With ``reverse_tables`` there is nothing to carry on from: the
        state is that of the first recurrence at the end of the last block, filled up with zeros.
    """
    return _run(_Blocks.apply, x, tables, reverse_tables, state, block)


def block_recurrence_plain(
    x: Tensor,
    tables: Callable[[int], Tables],
    reverse_tables: Callable[[int], Tables] | None = None,
    state: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """The same as :func:`block_recurrence`, same arguments, with every block in memory at once."""
    return _run(_blocks_plain, x, tables, reverse_tables, state, block)


def _run(
    blocks: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    tables: Callable[[int], Tables],
    reverse_tables: Callable[[int], Tables] | None,
    state: Tensor | None,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Cut the sequence into whole blocks and hand them to ``blocks``."""
    if x.dim() != 3 or x.shape[1] < 1 or block < 1:
        raise ValueError(f"wanted x (batch, length >= 1, dim) and block >= 1; got {tuple(x.shape)} and {block}.")
    length = x.shape[1]
    block = min(block, length)
    whole = tables(block)
    h = x.new_zeros(x.shape[0], x.shape[2], whole.write.shape[1]) if state is None else state  # (B, D, N)
    h = h.transpose(0, 1)
    if reverse_tables is not None:
        if state is not None:
            raise ValueError("A recurrence that also runs from the end has no state to go on from; got one.")
        reverse = reverse_tables(block)
        if length % block:  # silence after the end changes nothing before it
            x = F.pad(x, (0, 0, 0, -length % block))
        # Its time runs the other way. (Both may share the decay, and torch.compile wants each tensor once: a view.)
        against = reverse.read.flip(1), reverse.write.flip(2), reverse.decay.view_as(reverse.decay)
        y, h = blocks(x, _toeplitz(whole, reverse), *whole[1:], *against, h)
        return y[:, :length], h.transpose(0, 1)
    head = length % block  # a few steps by themselves, so that the state at the end is the true one
    parts = []
    if head:
        first = tables(head)
        y, h = _blocks_plain(x[:, :head], _toeplitz(first, None), *first[1:], None, None, None, h)
        parts.append(y)
    y, h = blocks(x[:, head:], _toeplitz(whole, None), *whole[1:], None, None, None, h)
    parts.append(y)
    return torch.cat(parts, dim=1) if head else y, h.transpose(0, 1)


def _toeplitz(forward: Tables, reverse: Tables | None) -> Tensor:
    """``(D, C, C)``, row = output, column = input: the kernel of each distance on its diagonal."""
    kernel = forward.kernel
    steps = kernel.shape[1]
    if reverse is None:
        ahead, now = kernel.new_zeros(len(kernel), steps - 1), kernel[:, :1]
    else:
        ahead, now = reverse.kernel[:, 1:].flip(1), kernel[:, :1] + reverse.kernel[:, :1]
    by_distance = torch.cat([ahead, now, kernel[:, 1:]], dim=1)  # (D, 2C - 1): distances -(C-1) .. C-1
    return by_distance.unfold(1, steps, 1).flip(2)  # each row is a stretch of it, read backwards


def _blocks_plain(
    x: Tensor,
    toeplitz: Tensor,
    read: Tensor,
    write: Tensor,
    decay: Tensor,
    read_back: Tensor | None,
    write_back: Tensor | None,
    decay_back: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor]:
    """Whole blocks of x ``(B, J*C, D)`` from the state h ``(D, B, N)`` on: outputs, and the state after the last."""
    x = x.unflatten(1, (-1, toeplitz.shape[1])).permute(3, 1, 0, 2)  # (D, J, B, C)
    entering, h = _scan(_times(x, write), decay, h)  # (D, J, B, N)
    y = _times(x, toeplitz) + _times(entering, read)
    if read_back is not None and write_back is not None and decay_back is not None:
        written = _times(x, write_back).flip(1)
        entering, _ = _scan(written, decay_back, torch.zeros_like(written[:, 0]))
        y = y + _times(entering.flip(1), read_back)
    return y.permute(2, 1, 3, 0).flatten(1, 2), h


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """``(D, J, B, in)`` times the transpose of ``(D, out, in)``: one matrix product a channel."""
    return (x.flatten(1, 2) @ matrix.mT).unflatten(1, x.shape[1:3])


def _scan(written: Tensor, decay: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """From what each block writes ``(D, J, B, N)``: the states that enter the blocks, and the last one."""
    entering = []
    for j in range(written.shape[1]):
        entering.append(h)
        h = _decayed(h, decay) + written[:, j]
    return torch.stack(entering, dim=1), h


def _decayed(h: Tensor, decay: Tensor) -> Tensor:
    """The state ``(D, B, N)`` a block later, before anything new is written."""
    if decay.dim() == 3:
        return h @ decay.mT
    if not decay.is_complex():
        return h * decay.unsqueeze(1)
    return torch.view_as_real(_pairs(h.contiguous()) * decay.unsqueeze(1)).flatten(-2)


# ---- the same, a stretch at a time -----------------------------------------------------------------------------


class _Blocks(torch.autograd.Function):
    """Arguments and results of :func:`_blocks_plain`. Saved for the backward pass: x, and the state at each boundary.

    The gradient is the same algebra mirrored in time: what an output is to the state that reads it, the gradient of a
    written state is to the input. One pass over time carries the states that flow along with it; where a second
    recurrence runs against it, a first pass the other way collects that one's states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        toeplitz: Tensor,
        read: Tensor,
        write: Tensor,
        decay: Tensor,
        read_back: Tensor | None,
        write_back: Tensor | None,
        decay_back: Tensor | None,
        h: Tensor,
    ) -> tuple[Tensor, Tensor]:
        work = _Stretches(x, toeplitz.shape[1])
        states, reverse = work.boundaries(write), None
        states[:, 0] = h
        if write_back is not None:
            reverse = work.boundaries(write_back)
            reverse[:, -1] = 0
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        for c in work.tiles:
            taken = {}  # what both passes need is turned once
            if reverse is not None and write_back is not None and decay_back is not None:
                for a, b in reversed(work.stretches):
                    taken[a] = block = work.take(x, c, a, b)
                    _carry(reverse[c], a, b, block @ write_back[c].mT, decay_back[c], back=True)
            for a, b in work.stretches:
                block = taken.pop(a) if taken else work.take(x, c, a, b)  # (d, j * B, C)
                _carry(states[c], a, b, block @ write[c].mT, decay[c])
                out = (block @ toeplitz[c].mT).baddbmm_(_rows(states[c], a, b), read[c].mT)
                if reverse is not None and read_back is not None:
                    out.baddbmm_(_rows(reverse[c], a + 1, b + 1), read_back[c].mT)
                work.put(y, c, a, b, out)
        ctx.save_for_backward(x, toeplitz, read, write, decay, read_back, write_back, decay_back, states, reverse)
        return y, states[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(dy.device.type, enabled=False):  # it may run inside the autocast of the forward pass
            return _Blocks._gradients(ctx, dy, dh)

    @staticmethod
    def _gradients(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, toeplitz, read, write, decay, read_back, write_back, decay_back, states, reverse = ctx.saved_tensors
        work = _Stretches(x, toeplitz.shape[1])
        d_toeplitz, d_read, d_write = (x.new_zeros(each.shape) for each in (toeplitz, read, write))
        # At each boundary, the gradient of the state there; it flows against the state.
        d_states, there = work.boundaries(write), _adjoint(decay)
        d_states[:, -1] = dh
        if reverse is not None:
            d_read_back, d_write_back = (x.new_zeros(each.shape) for each in (read_back, write_back))
            d_reverse, here = work.boundaries(write_back), _adjoint(decay_back)
            d_reverse[:, 0] = 0
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for c in work.tiles:
            taken = {}  # what both passes need is turned once
            if reverse is not None:
                for a, b in work.stretches:
                    taken[a] = d_block = work.take(dy, c, a, b)
                    _carry(d_reverse[c], a, b, d_block @ read_back[c], here[c])
            for a, b in reversed(work.stretches):
                d_block = taken.pop(a) if taken else work.take(dy, c, a, b)  # (d, j * B, C)
                block = work.take(x, c, a, b)
                _carry(d_states[c], a, b, d_block @ read[c], there[c], back=True)
                written = _rows(d_states[c], a + 1, b + 1)
                d_out = (d_block @ toeplitz[c]).baddbmm_(written, write[c])
                d_toeplitz[c].baddbmm_(d_block.mT, block)
                d_read[c].baddbmm_(d_block.mT, _rows(states[c], a, b))
                d_write[c].baddbmm_(written.mT, block)
                if reverse is not None:
                    written = _rows(d_reverse[c], a, b)
                    d_out.baddbmm_(written, write_back[c])
                    d_read_back[c].baddbmm_(d_block.mT, _rows(reverse[c], a + 1, b + 1))
                    d_write_back[c].baddbmm_(written.mT, block)
                work.put(dx, c, a, b, d_out)
        d_decay = _grad_decay(d_states[:, 1:], states[:, :-1], decay)
        grads = dx, d_toeplitz, d_read, d_write, d_decay
        if reverse is None:
            return *grads, None, None, None, d_states[:, 0]
        d_decay_back = _grad_decay(d_reverse[:, :-1], reverse[:, 1:], decay_back)
        return *grads, d_read_back, d_write_back, d_decay_back, d_states[:, 0]


class _Stretches:
    """Cuts ``(B, J*C, D)`` into pieces small enough for the cache: tiles of channels c, and of these stretches of whole
    blocks a .. b-1. All of time comes before the next channels, so that a tile's tables stay in the cache as well.
    """

    def __init__(self, x: Tensor, block: int) -> None:
        self.batch, length, self.dim = x.shape
        self.block, self.blocks = block, length // block
        on_cpu = in_pieces(x)
        tile = min(TILE, self.dim) if on_cpu else self.dim
        bytes_a_block = self.batch * tile * block * x.element_size()
        size = max(1, STRETCH // bytes_a_block) if on_cpu else self.blocks
        self.tiles = [slice(d, min(d + tile, self.dim)) for d in range(0, self.dim, tile)]
        self.stretches = [(a, min(a + size, self.blocks)) for a in range(0, self.blocks, size)]

    def boundaries(self, write: Tensor) -> Tensor:
        """Room for the state before each block and after the last, ``(D, J + 1, B, N)``."""
        return write.new_empty(self.dim, self.blocks + 1, self.batch, write.shape[1])

    def take(self, x: Tensor, c: slice, a: int, b: int) -> Tensor:
        """The input of a stretch, channels first: ``(d, (b - a) * B, C)``."""
        together = self._there(x, c, a, b).transpose(0, 1).contiguous()  # (j, B, C, d)
        # What is left to do is to transpose a matrix, at which torch is fastest. A view would not do: unless each
        # channel's matrix lies in one piece, torch multiplies the channels one after the other.
        return together.flatten(0, 2).T.contiguous().unflatten(1, (-1, self.block))

    def put(self, y: Tensor, c: slice, a: int, b: int, values: Tensor) -> None:
        """The reverse of `take`."""
        self._there(y, c, a, b).copy_(values.unflatten(1, (b - a, self.batch)).permute(2, 1, 3, 0))

    def _there(self, x: Tensor, c: slice, a: int, b: int) -> Tensor:
        """``(B, j, C, d)``, a view."""
        return x[:, a * self.block : b * self.block, c].unflatten(1, (b - a, self.block))


def _rows(states: Tensor, a: int, b: int) -> Tensor:
    """The states at boundaries a .. b-1, ``(D, (b - a) * B, N)``."""
    return states[:, a:b].flatten(1, 2)


def _carry(states: Tensor, a: int, b: int, written: Tensor, decay: Tensor, *, back: bool = False) -> None:
    """From the state at boundary a (back: b) and what blocks a .. b-1 write: the states at the boundaries after it."""
    after = states[:, a:b] if back else states[:, a + 1 : b + 1]
    after.copy_(written.view_as(after))
    at = (_pairs(states) if decay.is_complex() else states)[:, a : b + 1]  # (d, j + 1, B, N)
    (_one_by_one if in_pieces(states) else _by_doubling)(at, decay, back)


def _one_by_one(at: Tensor, decay: Tensor, back: bool) -> None:
    """Each boundary takes what the one before it leaves: the least arithmetic, in j calls."""
    matrix, factor = decay.mT.contiguous(), decay.unsqueeze(1)  # as it lies, a product of few rows takes half the time
    for before, here in pairwise(at.unbind(1)[::-1] if back else at.unbind(1)):
        if decay.dim() == 3:
            here.add_(torch.bmm(before, matrix))
        else:
            here.addcmul_(factor, before)


def _by_doubling(at: Tensor, decay: Tensor, back: bool) -> None:
    """The same in log2(j) calls over all boundaries, for a GPU, where a call may take longer than its arithmetic.

    After calls with steps of 1, 2, 4, .., each boundary holds what the last 2, 4, 8, .. have left there.
    """
    step = 1
    while step < at.shape[1]:
        before, here = (at[:, step:], at[:, :-step]) if back else (at[:, :-step], at[:, step:])
        if decay.dim() == 3:
            left, decay = (before.flatten(1, 2) @ decay.mT).view_as(here), decay @ decay
        else:
            left, decay = before * decay[:, None, None], decay * decay
        here += left
        step *= 2


def _adjoint(decay: Tensor) -> Tensor:
    """What takes a state's gradient back over a block: the conjugate, or of a matrix the transpose."""
    return decay.mT if decay.dim() == 3 else decay.conj().resolve_conj()


def _pairs(x: Tensor) -> Tensor:
    """Numbers next to each other as complex ones: ``(.., 2n) -> (.., n)``."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _grad_decay(d_states: Tensor, states: Tensor, decay: Tensor) -> Tensor:
    """A block multiplies its state by the decay: sum of (gradient of what leaves) * conj(what enters)."""
    if decay.dim() == 3:
        return d_states.flatten(1, 2).mT @ states.flatten(1, 2)
    if decay.is_complex():
        d_states, states = _pairs(d_states), _pairs(states)
    return (d_states * states.conj()).sum((1, 2))
