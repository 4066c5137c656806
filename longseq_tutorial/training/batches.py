"""Which sequences make up which update: a pure function of (seed, epoch).

Nothing here remembers anything, so a run that stopped in the middle of an epoch goes on with exactly the
batches it would have had, and any number of processes shares out the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ..tasks import Batch, PairBatch, Split, Task, collate

AHEAD = 4  # batches that each worker prepares ahead, so that a GPU need not wait
POOL = 32  # batches sorted by length together: larger saves more padding, smaller mixes more


def generator(*key: int) -> torch.Generator:
    """A torch generator whose numbers depend on `key` (seed, purpose, step ...) and on nothing else."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def epoch_batches(lengths: np.ndarray, batch: int, *, seed: int, epoch: int, bucket: bool) -> list[np.ndarray]:
    """The index batches of one epoch, in order: each (batch,), no index twice, the incomplete last one left out.

    With `bucket`, sequences of like length share a batch: the shuffled epoch is cut into pools of `POOL`
    batches, each pool is sorted by length, and all batches are shuffled again. Which sequences meet still
    changes every epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    if bucket:
        pools = [order[i : i + POOL * batch] for i in range(0, len(order), POOL * batch)]
        order = np.concatenate([pool[np.argsort(lengths[pool], kind="stable")] for pool in pools])
    batches = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]
    if bucket:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def training_batches(
    task: Task,
    *,
    batch: int,
    accumulate: int = 1,
    bucket: bool = True,
    augment: bool = False,
    seed: int = 0,
    start: int = 0,
    stop: int,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    few_lengths: bool = False,
    device: torch.device | None = None,
) -> Iterator[list[Batch]]:
    """For each update from `start` to `stop - 1`, this process's share of it, in `accumulate` pieces.

    An update always sees `batch` sequences in all, however many processes and pieces they are spread over.
    Each process takes every `processes`-th one, so that all of them get the same mix of lengths. With `few_lengths`
    batches are padded to one of two lengths an octave, since each new one would be compiled anew. On a `device` they
    arrive before they are augmented, which is a hundred small operations on a large batch.
    """
    order = _Pieces(task.train.lengths, batch, accumulate, bucket, seed, start, stop, rank, processes)
    loader: DataLoader[Batch] = DataLoader(
        task.train,  # type: ignore[arg-type]  # a Split is a sequence, which is all a DataLoader asks for
        batch_sampler=order,  # type: ignore[arg-type]
        collate_fn=partial(collate_to, task.config.length) if few_lengths else collate,
        num_workers=workers,  # one set of them for the whole run: an epoch's end is no gap
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin_memory,
        generator=generator(seed),  # its own: a loader must not draw from the numbers that dropout uses
    )
    group: list[Batch] = []
    update = start
    for piece in loader:
        piece = piece if device is None else to_device(piece, device)
        if augment and task.augment is not None:
            piece = task.augment(piece, generator(seed, update, len(group), rank))
            if few_lengths:  # it may have become longer or shorter
                piece = round_up(piece, task.config.length)
        group.append(piece)
        if len(group) == accumulate:
            yield group
            group, update = [], update + 1


@dataclass(frozen=True)
class _Pieces:
    """The indices of every piece that one process sees, in order; an epoch is drawn up when it begins."""

    lengths: np.ndarray
    batch: int
    accumulate: int
    bucket: bool
    seed: int
    start: int
    stop: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[np.ndarray]:
        update, per_epoch = self.start, len(self.lengths) // self.batch
        while update < self.stop:
            epoch, done = divmod(update, per_epoch)
            order = epoch_batches(self.lengths, self.batch, seed=self.seed, epoch=epoch, bucket=self.bucket)
            order = order[done : done + self.stop - update]
            for indices in order:
                yield from np.split(indices[self.rank :: self.processes], self.accumulate)
            update += len(order)


def evaluation_batches(split: Split, batch: int, *, rank: int = 0, processes: int = 1) -> Iterator[Batch]:
    """Every item of `split` once, batched by length so that little is padded; this process's share of them."""
    order = np.argsort(split.lengths, kind="stable")
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    for indices in batches[rank::processes]:
        yield collate([split[int(i)] for i in indices])


def round_length(length: int, longest: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24 ... or `longest`, where that comes first."""
    power = 1 << (length - 1).bit_length()
    rounded = 3 * power // 4 if 4 * length <= 3 * power and power > 2 else power
    return max(length, min(rounded, longest))


def collate_to(longest: int, items: Any) -> Any:
    """`collate`, then `round_up`."""
    return round_up(collate(items), longest)


def round_up(batch: Any, longest: int) -> Any:
    """The batch with sequences padded to a `round_length`; both sides of pairs to the same one.

    (Of the batches of IMDB's pairs under one in a hundred has sides that differ. They would want six lengths more.)
    """
    length = round_length(max(tensor.shape[1] for tensor in batch if tensor.dim() > 1), longest)

    def pad(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2:  # labels
            return tensor
        more = length - tensor.shape[1]
        return F.pad(tensor, (*(0, 0) * (tensor.dim() - 2), 0, more))

    return type(batch)(*map(pad, batch))


def answer(model: nn.Module, batch: Batch | PairBatch) -> torch.Tensor:
    """The model's logits for a batch, (batch, classes), whether it holds sequences or pairs of them."""
    if isinstance(batch, PairBatch):
        return model(batch.x, batch.x2, mask1=batch.mask, mask2=batch.mask2)
    return model(batch.x, batch.mask)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied while the device still computes where that is possible."""
    return type(batch)(*(tensor.to(device, non_blocking=True) for tensor in batch))
