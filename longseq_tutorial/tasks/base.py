"""What every task looks like to the models and the training loop.

A task is a frozen description (`TaskConfig`) and three `Split`s of labelled sequences. A split keeps all its
sequences in one flat array, so a hundred thousand of them cost one allocation, or none when the array is a
memory map; `collate` turns a list of items into one right-padded batch with its mask.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch

REPOSITORY_DATA = Path(__file__).resolve().parents[2] / "data"
PAD = 0  # the token id of padding in every token task; padded samples are 0.0


class DataError(ValueError):
    """Something is wrong with data: a name, a path, an option, or what a file holds.

    The message is one line: what was wanted, what came, how to mend it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DataNotFound(DataError):
    """The data are not on this machine (and could not be fetched). Anything that *is* there is not to blame."""


@dataclass(frozen=True)
class TaskConfig:
    """What a model must know about a task to be built for it. Contradictions raise `DataError`."""

    name: str  # the name given to tasks.load
    kind: str  # "tokens" (int64 ids) or "samples" (float32: waveforms in [-1, 1], or standardised values)
    classes: int  # width of the logits
    length: int  # no sequence is longer than this
    vocabulary: int = 0  # number of token ids, the padding id 0 included; 0 for samples
    sample_rate: int = 0  # samples a second; 0 for tokens and for pixels
    class_names: tuple[str, ...] = ()  # what label i means, in words
    pairs: bool = False  # True when an item is two sequences with one label
    source: str = ""  # which data exactly; belongs beside every accuracy
    grid: tuple[int, int] | tuple[()] = ()  # (rows, columns) where a sequence is a picture, read row by row

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))  # a record gives lists back
        if self.kind not in ("tokens", "samples"):
            raise DataError(f"kind must be 'tokens' or 'samples'; got {self.kind!r}.")
        if self.classes < 2 or self.length < 1:
            raise DataError(f"need classes >= 2 and length >= 1; got {self.classes} and {self.length}.")
        tokens, rate = self.kind == "tokens", self.sample_rate > 0
        if tokens != (self.vocabulary > 0) or rate != (not tokens and not self.grid):
            wanted = "vocabulary > 0 and sample_rate 0" if tokens else "vocabulary 0, and sample_rate > 0 or a grid"
            raise DataError(
                f"a {self.kind} task needs {wanted}; got vocabulary {self.vocabulary}, sample_rate "
                f"{self.sample_rate}, grid {self.grid}."
            )
        if self.grid and (len(self.grid) != 2 or self.grid[0] * self.grid[1] != self.length):
            raise DataError(f"grid must be (rows, columns) of {self.length} pixels together; got {self.grid}.")
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(f"{self.classes} classes need as many class_names; got {len(self.class_names)}.")


class Batch(NamedTuple):
    """One right-padded batch."""

    x: torch.Tensor  # (batch, length) int64 tokens or float32 samples; padding is 0
    mask: torch.Tensor  # (batch, length) bool, True where x is real
    label: torch.Tensor  # (batch,) int64


class PairBatch(NamedTuple):
    """One batch of pairs, each side padded for itself: what a task with `pairs=True` gives."""

    x: torch.Tensor  # (batch, length) the first of each pair
    mask: torch.Tensor  # (batch, length) bool
    label: torch.Tensor  # (batch,) int64
    x2: torch.Tensor  # (batch, length 2) the second of each pair
    mask2: torch.Tensor  # (batch, length 2) bool


class Split:
    """Labelled sequences: `len(split)`, `split[i] -> (1-D tensor, int)`, `.lengths`, `.labels`.

    values: one flat array, uint8 tokens or float32 samples (a memory map will do).
    offsets: (n + 1,) int64; sequence i is `values[offsets[i] : offsets[i + 1]]`.
    labels: (n,) integers.
    length: sequences are cut to this many elements, None leaves them whole.
    scale, shift: where scale is given, items are float32 `values * scale + shift` (both one number, or one for each
        sequence), so pixels and 16-bit audio stay as small as they are; where not, integers become int64
        `values + shift`, so bytes can lie one above the padding.
    Raises `DataError` when these do not fit each other.
    """

    def __init__(
        self,
        values: np.ndarray,
        offsets: np.ndarray,
        labels: np.ndarray,
        length: int | None = None,
        scale: float | np.ndarray | None = None,
        shift: float | np.ndarray = 0,
    ) -> None:
        offsets = np.asarray(offsets, dtype=np.int64)
        if values.ndim != 1 or offsets.ndim != 1 or len(offsets) != len(labels) + 1:
            raise DataError(
                f"a split needs flat values and one offset more than labels; got values {values.shape}, "
                f"{len(offsets)} offsets, {len(labels)} labels."
            )
        if offsets[0] < 0 or offsets[-1] > len(values) or (np.diff(offsets) < 1).any():
            raise DataError(
                f"offsets must rise from >= 0 to <= {len(values)}, the number of values; got "
                f"{offsets[0]} to {offsets[-1]}, {int((np.diff(offsets) < 1).sum())} of them not rising."
            )
        self.values = values
        self.starts = offsets[:-1]
        self.lengths: np.ndarray = np.diff(offsets)
        if length is not None:
            self.lengths = np.minimum(self.lengths, length)
        self.labels: np.ndarray = np.asarray(labels, dtype=np.int64)
        self.scale, self.shift = scale, shift
        for name, number in (("scale", scale), ("shift", shift)):
            if isinstance(number, np.ndarray) and number.shape != self.labels.shape:
                raise DataError(f"{name} must be one number, or one for each of {len(self)}; got {number.shape}.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a split of {len(self)} items.")
        start = self.starts[index]
        sequence = self.values[start : start + self.lengths[index]]
        # Whatever is kept is copied, so no caller can alter the split.
        floating = self.scale is not None or np.issubdtype(sequence.dtype, np.floating)
        item = np.array(sequence, dtype=np.float32 if floating else np.int64)
        for number, apply in ((self.scale, np.multiply), (self.shift, np.add)):
            if number is not None:
                factor = number[index] if isinstance(number, np.ndarray) else number
                apply(item, item.dtype.type(factor), out=item)
        return torch.from_numpy(item), int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int] | np.ndarray) -> Split:
        """The items at `indices` (integers, or one bool per item), sharing the flat array."""
        chosen = _chosen(len(self), indices)
        part = copy.copy(self)
        part.starts, part.lengths, part.labels = self.starts[chosen], self.lengths[chosen], self.labels[chosen]
        if isinstance(self.scale, np.ndarray):
            part.scale = self.scale[chosen]
        if isinstance(self.shift, np.ndarray):
            part.shift = self.shift[chosen]
        return part

    def __repr__(self) -> str:
        longest = int(self.lengths.max()) if len(self) else 0
        return f"Split({len(self):,} sequences, longest {longest:,})"


class PairSplit(Split):
    """Labelled pairs of sequences: like `Split`, but `split[i] -> ((1-D tensor, 1-D tensor), int)`.

    documents: a `Split` that holds each sequence once, however many pairs it is in; its labels do not matter.
    pairs: (n, 2) which two documents; labels: (n,) integers. `lengths` holds the longer one of each pair.
    Raises `DataError` when these do not fit each other.
    """

    def __init__(self, documents: Split, pairs: np.ndarray, labels: np.ndarray) -> None:
        self.documents, self.scale, self.shift = documents, documents.scale, documents.shift
        self.pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        self.labels = np.asarray(labels, dtype=np.int64)
        if len(self.pairs) != len(self.labels):
            raise DataError(f"each pair needs a label; got {len(self.pairs)} pairs, {len(self.labels)} labels.")
        if len(self.pairs) and not 0 <= self.pairs.min() <= self.pairs.max() < len(documents):
            raise DataError(
                f"pairs must name documents 0 to {len(documents) - 1}; got {self.pairs.min()} to {self.pairs.max()}."
            )
        self.lengths = documents.lengths[self.pairs].max(1) if len(self.pairs) else np.zeros(0, np.int64)

    def __getitem__(self, index: int) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a split of {len(self)} pairs.")
        first, second = self.pairs[index]
        return (self.documents[first][0], self.documents[second][0]), int(self.labels[index])

    def select(self, indices: Sequence[int] | np.ndarray) -> PairSplit:
        """The pairs at `indices` (integers, or one bool per pair), sharing the documents."""
        chosen = _chosen(len(self), indices)
        return PairSplit(self.documents, self.pairs[chosen], self.labels[chosen])

    def __repr__(self) -> str:
        longest = int(self.lengths.max()) if len(self) else 0
        return f"PairSplit({len(self):,} pairs, longest {longest:,})"


def _chosen(count: int, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """As integers; none at all are no integers to numpy, unless told."""
    return np.arange(count)[np.asarray(indices, dtype=None if len(indices) else np.intp)]


@dataclass(frozen=True)
class Task:
    """A task ready to train on. `augment(batch, generator) -> Batch` alters *training* batches at random."""

    config: TaskConfig
    train: Split
    valid: Split
    test: Split
    augment: Callable[[Batch, torch.Generator], Batch] | None = None


@overload
def collate(items: Sequence[tuple[torch.Tensor, int]]) -> Batch: ...
@overload
def collate(items: Sequence[tuple[tuple[torch.Tensor, torch.Tensor], int]]) -> PairBatch: ...
def collate(items: Sequence[Any]) -> Batch | PairBatch:
    """Put items side by side, padded on the right with 0 to the longest of them.

    items: `(1-D tensor, label)`, as a `Split` gives them, or `((1-D tensor, 1-D tensor), label)`, as a `PairSplit`
    does. Raises `DataError` for an empty list, an empty sequence, or sequences that are not 1-D and of one dtype.
    """
    if not items:
        raise DataError("a batch needs at least one item; got an empty list.")
    label = torch.tensor([label for _, label in items], dtype=torch.int64)
    if not isinstance(items[0][0], tuple):
        return Batch(*_side_by_side([sequence for sequence, _ in items]), label)
    x, mask = _side_by_side([pair[0] for pair, _ in items])
    x2, mask2 = _side_by_side([pair[1] for pair, _ in items])
    return PairBatch(x, mask, label, x2, mask2)


def _side_by_side(sequences: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequences padded on the right, (batch, length), and the mask of what is real."""
    for sequence in sequences:
        if sequence.ndim != 1 or not len(sequence) or sequence.dtype != sequences[0].dtype:
            raise DataError(
                f"items must be non-empty 1-D tensors of one dtype ({sequences[0].dtype}); "
                f"got shape {tuple(sequence.shape)}, {sequence.dtype}."
            )
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    x = torch.full((len(sequences), longest), PAD, dtype=sequences[0].dtype)
    for row, sequence in zip(x, sequences, strict=True):
        row[: len(sequence)] = sequence
    mask = torch.arange(longest) < lengths[:, None]  # (batch, length)
    return x, mask


def read_folders(root: str | Path | None) -> list[Path]:
    """Where data are looked for: `root` alone if given, else LONGSEQ_DATA (if set), then `data/downloads`.

    Raises `DataError` when a folder that was named does not exist.
    """
    if root is not None:
        return [_existing(Path(root), "root")]
    folders = []
    if os.environ.get("LONGSEQ_DATA"):
        folders.append(_existing(Path(os.environ["LONGSEQ_DATA"]), "LONGSEQ_DATA"))
    return [*folders, write_folder(None)]


def write_folder(root: str | Path | None) -> Path:
    """Where downloads and generated data go: `root`, or the repository's `data/downloads`, made if missing.

    LONGSEQ_DATA is only ever read, so a shared or read-only folder stays as it is.
    """
    if root is not None:
        return _existing(Path(root), "root")
    home = REPOSITORY_DATA if REPOSITORY_DATA.is_dir() else Path.home() / ".cache" / "longseq_tutorial"
    folder = home / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {folder} ({error.strerror}); pass root= a folder you can write to.") from error
    return folder


def _existing(folder: Path, name: str) -> Path:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{name} must name a folder; {str(folder)!r} {what}. Make it, or correct {name}.")
    return folder
