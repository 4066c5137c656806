"""What every task looks like to the models and the training loop.

A task is a frozen description (`TaskConfig`) and three `Split`s of labelled sequences. A split keeps all its
sequences in one flat array, so a hundred thousand of them cost one allocation, or none when the array is a
memory map; `collate` turns a list of items into one right-padded batch with its mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    kind: str  # "tokens" (int64 ids) or "samples" (float32 in [-1, 1])
    classes: int  # width of the logits
    length: int  # no sequence is longer than this
    vocabulary: int = 0  # number of token ids, the padding id 0 included; 0 for samples
    sample_rate: int = 0  # samples a second; 0 for tokens
    class_names: tuple[str, ...] = ()  # what label i means, in words
    pairs: bool = False  # True when an item is two sequences with one label
    source: str = ""  # which data exactly; belongs beside every accuracy

    def __post_init__(self) -> None:
        if self.kind not in ("tokens", "samples"):
            raise DataError(f"kind must be 'tokens' or 'samples'; got {self.kind!r}.")
        if self.classes < 2 or self.length < 1:
            raise DataError(f"need classes >= 2 and length >= 1; got {self.classes} and {self.length}.")
        if (self.kind == "tokens") != (self.vocabulary > 0) or (self.kind == "samples") != (self.sample_rate > 0):
            raise DataError(
                f"a {self.kind} task needs "
                + ("vocabulary > 0 and sample_rate 0" if self.kind == "tokens" else "sample_rate > 0, vocabulary 0")
                + f"; got vocabulary {self.vocabulary}, sample_rate {self.sample_rate}."
            )
        if self.class_names and len(self.class_names) != self.classes:
            raise DataError(f"{self.classes} classes need as many class_names; got {len(self.class_names)}.")


class Batch(NamedTuple):
    """One right-padded batch."""

    x: torch.Tensor  # (batch, length) int64 tokens or float32 samples; padding is 0
    mask: torch.Tensor  # (batch, length) bool, True where x is real
    label: torch.Tensor  # (batch,) int64


class Split:
    """Labelled sequences: `len(split)`, `split[i] -> (1-D tensor, int)`, `.lengths`, `.labels`.

    values: one flat array, uint8 tokens or float32 samples (a memory map will do).
    offsets: (n + 1,) int64; sequence i is `values[offsets[i] : offsets[i + 1]]`.
    labels: (n,) integers.
    length: sequences are cut to this many elements, None leaves them whole.
    Raises `DataError` when the three do not fit each other.
    """

    def __init__(self, values: np.ndarray, offsets: np.ndarray, labels: np.ndarray, length: int | None = None) -> None:
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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside a split of {len(self)} items.")
        start = self.starts[index]
        sequence = self.values[start : start + self.lengths[index]]
        # Tokens are kept as bytes and samples as float32; both are copied, so no caller can alter the split.
        dtype = np.float32 if np.issubdtype(sequence.dtype, np.floating) else np.int64
        return torch.from_numpy(np.array(sequence, dtype=dtype)), int(self.labels[index])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int] | np.ndarray) -> Split:
        """The items at `indices` (integers, or one bool per item), sharing the flat array."""
        chosen = np.arange(len(self))[np.asarray(indices)]
        part = object.__new__(Split)
        part.values = self.values
        part.starts, part.lengths, part.labels = (
            self.starts[chosen],
            self.lengths[chosen],
            self.labels[chosen],
        )
        return part

    def __repr__(self) -> str:
        longest = int(self.lengths.max()) if len(self) else 0
        return f"Split({len(self):,} sequences, longest {longest:,})"


@dataclass(frozen=True)
class Task:
    """A task ready to train on. `augment(batch, generator) -> Batch` alters *training* batches at random."""

    config: TaskConfig
    train: Split
    valid: Split
    test: Split
    augment: Callable[[Batch, torch.Generator], Batch] | None = None


def collate(items: Sequence[tuple[torch.Tensor, int]]) -> Batch:
    """Put items side by side, padded on the right with 0 to the longest of them.

    items: `(1-D tensor, label)` pairs, as a `Split` gives them. Raises `DataError` for an empty list, an
    empty sequence, or sequences that are not 1-D and of one dtype.
    """
    if not items:
        raise DataError("a batch needs at least one item; got an empty list.")
    sequences = [sequence for sequence, _ in items]
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
    return Batch(x, mask, torch.tensor([label for _, label in items], dtype=torch.int64))


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
