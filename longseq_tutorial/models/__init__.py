"""The systems of the course, one file each, all behind one door: :func:`build`."""

from dataclasses import fields, replace
from typing import Any, Protocol

from torch import nn

from .classifier import Classifier, Encoder, Head, PairClassifier
from .configs import Config, MegaConfig, SeqBoatConfig, published
from .mega import MegaBlock
from .parts import Norm, PatchEmbedding, SampleEmbedding, TokenEmbedding
from .recorder import Tape, record
from .seqboat import ScaledPositions, SeqBoatLayer
from .transformer import SinusoidalPositions, TransformerBlock

__all__ = ["NAMES", "Tape", "TaskLike", "build", "build_encoder", "record"]

NAMES = ("mega", "mega-chunk", "seqboat", "transformer")


class TaskLike(Protocol):
    """What a model must know of a task; ``tasks.TaskConfig`` has it. See there for the meaning."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def classes(self) -> int: ...
    @property
    def vocabulary(self) -> int: ...
    @property
    def pairs(self) -> bool: ...


def build(name: str, task: TaskLike, **overrides: Any) -> nn.Module:
    """Build a classifier for a task: ``(x (B, L), mask (B, L)) -> logits (B, classes)``.

    Args:
        name: "mega", "mega-chunk", "seqboat" or "transformer".
        task: what is read and how many classes there are.
        overrides: any field of the model's configuration, in place of the published value; e.g. ``layers=2``.

    Raises:
        ValueError: for an unknown model or field, or a contradiction between fields.
    """
    config = configure(name, task.name, **overrides)
    encoder = _encoder(config, task)
    nli_head = isinstance(config, SeqBoatConfig) and config.nli_head
    vectors = (4 if nli_head else 2) if task.pairs else 1
    head = Head(vectors * config.dim, config.head_dim, task.classes, config.dropout)
    return PairClassifier(encoder, head, nli_head) if task.pairs else Classifier(encoder, head)


def build_encoder(name: str, task: TaskLike, **overrides: Any) -> Encoder:
    """The same without pooling and head: ``(x, mask) -> (hidden (B, L, D), mask)``; with ``causal=True`` it streams."""
    return _encoder(configure(name, task.name, **overrides), task)


def configure(name: str, task_name: str, **overrides: Any) -> Config:
    """The configuration :func:`build` uses: the published one for the task with ``overrides`` put in."""
    config = published(name, task_name)
    known = [f.name for f in fields(config)]
    for key in overrides:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}; wanted one of: {', '.join(known)}.")
    if "patch" in overrides:
        try:
            overrides["patch"] = tuple((int(k), int(s)) for k, s in overrides["patch"])
        except (TypeError, ValueError):
            raise ValueError(
                f"patch wants (kernel, stride) pairs, ((40, 10), (8, 8)); got {overrides['patch']!r}."
            ) from None
    return replace(config, **overrides)


def _encoder(config: Config, task: TaskLike) -> Encoder:
    if task.kind == "tokens":
        if config.patch:
            raise ValueError("patches cut a signal; this task has tokens. Leave patch=().")
        embedding: nn.Module = TokenEmbedding(task.vocabulary, config.dim)
    elif config.patch:
        embedding = PatchEmbedding(config.dim, config.patch)
    else:
        embedding = SampleEmbedding(config.dim)
    if isinstance(config, MegaConfig | SeqBoatConfig):
        final = Norm(config.norm, config.dim) if config.prenorm else None
        if isinstance(config, MegaConfig):
            return Encoder(embedding, [MegaBlock(config) for _ in range(config.layers)], final, config.dropout)
        boats = [SeqBoatLayer(config) for _ in range(config.layers)]
        first = [ScaledPositions(config.dim)] if config.sinusoid else []
        return Encoder(embedding, [*first, *boats], final, config.dropout)
    blocks = [SinusoidalPositions(), *(TransformerBlock(config) for _ in range(config.layers))]
    return Encoder(embedding, blocks, Norm("layernorm", config.dim), config.dropout)
