"""The systems of the course, one file each, all behind one door: :func:`build`."""

from dataclasses import fields, replace
from typing import Any, Protocol

from torch import Tensor, nn

from .classifier import Classifier, Encoder, Head, PairClassifier
from .configs import Config, FastRPBConfig, LongVQConfig, MegaConfig, SeqBoatConfig, SpadeConfig, published
from .fastrpb import FastRPBBlock
from .longvq import LongVQBlock
from .mega import MegaBlock
from .parts import Norm, PatchEmbedding, SampleEmbedding, TokenEmbedding
from .recorder import Tape, record
from .seqboat import ScaledPositions, SeqBoatLayer
from .spade import spade_layers
from .transformer import SinusoidalPositions, TransformerBlock

__all__ = ["NAMES", "Tape", "TaskLike", "auxiliary_loss", "build", "build_encoder", "record"]

NAMES = ("mega", "mega-chunk", "seqboat", "longvq", "fastrpb", "spade", "transformer")


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
        name: one of ``NAMES``.
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
    blocks, final = _blocks(config)
    return Encoder(embedding, blocks, final, config.dropout)


def _blocks(config: Config) -> tuple[list[nn.Module], Norm | None]:
    """The stack and, for pre-norm blocks, the last norm."""
    last = Norm("layernorm", config.dim)
    if isinstance(config, SpadeConfig):
        return spade_layers(config), last
    if isinstance(config, FastRPBConfig):
        first: list[nn.Module] = [SinusoidalPositions()] if config.sinusoid else []
        return [*first, *(FastRPBBlock(config) for _ in range(config.layers))], last
    if isinstance(config, MegaConfig | SeqBoatConfig | LongVQConfig):
        final = Norm(config.norm, config.dim) if config.prenorm else None
        if isinstance(config, MegaConfig):
            return [MegaBlock(config) for _ in range(config.layers)], final
        if isinstance(config, LongVQConfig):
            return [LongVQBlock(config) for _ in range(config.layers)], final
        first = [ScaledPositions(config.dim)] if config.sinusoid else []
        return [*first, *(SeqBoatLayer(config) for _ in range(config.layers))], final
    return [SinusoidalPositions(), *(TransformerBlock(config) for _ in range(config.layers))], last


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """What the layers ask to be added to the loss of the call just made; 0 where none asks.

    LongVQ's quantisers do: their keys must stay near the codes. Works on any module; a layer that was called more than
    once (two towers) reports its last call.
    """
    asked = [each for module in model.modules() if (each := getattr(module, "auxiliary", None)) is not None]
    return sum(asked) if asked else 0.0
