"""What can be chosen when a model is built, and the published choices.

Each configuration is a frozen dataclass that refuses contradictions when it is made.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from ..mechanisms.gated_attention import FUNCTIONS
from .parts import NORMS

__all__ = ["MEGA", "SEQBOAT", "TRANSFORMER", "Config", "MegaConfig", "SeqBoatConfig", "TransformerConfig", "published"]


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_common(c: "Config") -> None:
    for field in fields(c):
        value, default = getattr(c, field.name), field.default
        if value is None and "None" in str(field.type):
            continue
        if isinstance(default, bool | str):
            kind = type(default)
            _require(isinstance(value, kind), f"{field.name} must be of type {kind.__name__}; got {value!r}.")
        elif field.name.endswith("dropout"):
            fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
            _require(fits, f"{field.name} is a dropout rate and must lie in [0, 1); got {value!r}.")
        elif isinstance(default, int) or default is None:
            whole = isinstance(value, int) and not isinstance(value, bool)
            _require(whole and value >= 1, f"{field.name} must be a whole number, at least 1; got {value!r}.")
    for stage in c.patch:
        _require(
            len(stage) == 2 and stage[0] >= stage[1] >= 1,
            f"patch wants (kernel, stride) pairs with kernel >= stride >= 1; got {stage}.",
        )


@dataclass(frozen=True)
class MegaConfig:
    """A Mega classifier. Letters in brackets are the symbols of the papers and of the notebooks."""

    dim: int = 128  # width of the model (D)
    layers: int = 4  # blocks, each a Mega layer and a feed-forward layer
    z_dim: int = 64  # width of queries and keys (z)
    v_dim: int = 256  # width of values (v); published: 2 D
    ffn_dim: int = 256  # hidden width of the feed-forward layer; published: 2 D
    n: int = 16  # EMA dimensions a channel (the paper's h)
    truncation: int | None = None  # lags kept of the EMA kernel; None: all; published: 1024 mostly
    chunk: int | None = None  # attention stays in blocks of this length (Mega-chunk); None: full attention
    max_positions: int = 1024  # distances the relative bias tells apart without chunks
    attention: str = "softmax"  # softmax for text, laplace for pixels and sound
    bias: str = "simple"  # positions: "simple" (a learned number a distance) or "rotary"
    norm: str = "layernorm"  # layernorm, batchnorm, scalenorm or rmsnorm
    prenorm: bool = False  # norm before each layer instead of after it
    causal: bool = False  # see the past only; needed for streaming
    dropout: float = 0.0  # on embeddings, EMA output, candidates, feed-forward output, head
    attention_dropout: float = 0.0  # on attention weights
    hidden_dropout: float = 0.0  # on values and inside the feed-forward layer
    head_dim: int = 256  # hidden width of the classifier's head; published: 2 D
    patch: tuple[tuple[int, int], ...] = ()  # (kernel, stride) stages that read a signal in patches; (): by sample

    def __post_init__(self) -> None:
        _check_common(self)
        _require(
            self.attention in FUNCTIONS, f"attention must be one of {', '.join(FUNCTIONS)}; got {self.attention!r}."
        )
        _require(self.bias in ("simple", "rotary"), f"bias must be 'simple' or 'rotary'; got {self.bias!r}.")
        _require(self.norm in NORMS, f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}.")
        _require(
            self.bias != "rotary" or self.z_dim % 2 == 0,
            f"a rotary bias turns pairs: z_dim must be even; got {self.z_dim}.",
        )


@dataclass(frozen=True)
class SeqBoatConfig:
    """A SeqBoat classifier: no feed-forward layers; the attention wakes up only where a learned switch says so."""

    dim: int = 128  # width of the model (D)
    layers: int = 4  # SeqBoat layers
    z_dim: int = 64  # width of queries and keys (z)
    v_dim: int = 256  # width of values (v); published: 2 D
    n: int = 16  # EMA dimensions a channel
    truncation: int | None = None  # lags kept of the EMA kernel; None: all; published: 1024 mostly
    window: int | None = 128  # activated tokens a query sees to either side (w); None: all of them
    max_positions: int = 1024  # original distances the global bias tells apart
    attention: str = "softmax"  # softmax for text, relu2 for pixels and sound
    bias: str = "global"  # of activated tokens: "global" (original distance), "local" (compressed), "rotary" (RoPE)
    sinusoid: bool = False  # absolute positions added to the embedding, times a learned number; published for signals
    temperature: float = 1.0  # the switch starts at this times sqrt(D); higher: less decided (s)
    always_active: bool = False  # no switch: every token attends (what the sparse model is compared with)
    norm: str = "layernorm"  # layernorm, batchnorm, scalenorm or rmsnorm
    prenorm: bool = False  # norm before each layer instead of after it
    causal: bool = False  # see the past only; needed for streaming
    dropout: float = 0.0  # on embeddings, EMA output, attention output, head
    attention_dropout: float = 0.0  # on attention weights
    hidden_dropout: float = 0.0  # on values
    head_dim: int = 256  # hidden width of the classifier's head; published: 2 D
    nli_head: bool = False  # pairs: the head also reads product and difference of the two vectors
    patch: tuple[tuple[int, int], ...] = ()  # (kernel, stride) stages that read a signal in patches; (): by sample

    def __post_init__(self) -> None:
        _check_common(self)
        _require(
            self.attention in FUNCTIONS, f"attention must be one of {', '.join(FUNCTIONS)}; got {self.attention!r}."
        )
        _require(
            self.bias in ("global", "local", "rotary"),
            f"bias must be 'global', 'local' or 'rotary'; got {self.bias!r}.",
        )
        _require(self.norm in NORMS, f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}.")
        _require(
            self.bias != "local" or self.window is not None,
            "a local bias holds one number for each distance in the window: give a window, or take bias='global'.",
        )
        _require(
            self.bias != "rotary" or self.z_dim % 2 == 0,
            f"rotary positions turn pairs: z_dim must be even; got {self.z_dim}.",
        )
        _require(
            not self.sinusoid or self.dim % 2 == 0,
            f"a sinusoid is pairs of sine and cosine: dim must be even; got {self.dim}.",
        )
        number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        _require(
            number and 0 < self.temperature < math.inf,
            f"temperature must be a number > 0; got {self.temperature!r}.",
        )


@dataclass(frozen=True)
class TransformerConfig:
    """The quadratic baseline: pre-norm, multi-head softmax attention, sinusoidal positions."""

    dim: int = 128  # width of the model (D)
    layers: int = 4  # blocks
    heads: int = 4  # attention heads; dim must be a multiple
    ffn_dim: int = 512  # hidden width of the feed-forward layer
    causal: bool = False  # see the past only; needed for streaming
    dropout: float = 0.0  # on embeddings, attention weights, both sub-layers' outputs, head
    head_dim: int = 256  # hidden width of the classifier's head
    patch: tuple[tuple[int, int], ...] = ()  # (kernel, stride) stages that read a signal in patches; (): by sample

    def __post_init__(self) -> None:
        _check_common(self)
        _require(
            self.dim % (2 * self.heads) == 0,
            f"dim must be a multiple of 2 * heads (pairs of sine and cosine); got dim={self.dim}, heads={self.heads}.",
        )


Config = MegaConfig | SeqBoatConfig | TransformerConfig


def _mega(dim: int, layers: int, z: int, positions: int, fn: str, norm: str, pre: bool, **more: Any) -> MegaConfig:
    return MegaConfig(
        dim=dim,
        layers=layers,
        z_dim=z,
        v_dim=2 * dim,
        ffn_dim=2 * dim,
        head_dim=2 * dim,
        max_positions=positions,
        attention=fn,
        norm=norm,
        prenorm=pre,
        **{"truncation": 1024, **more},
    )


# Mega, paper table and published scripts; the chunk lengths of Mega-chunk stand in MEGA_CHUNK.
MEGA: Mapping[str, MegaConfig] = MappingProxyType(
    {
        #                     D  layers z  positions function norm pre-norm
        "listops": _mega(80, 6, 64, 2002, "softmax", "layernorm", False, dropout=0.1),
        "text": _mega(128, 4, 64, 4002, "softmax", "scalenorm", False, dropout=0.1),
        "retrieval": _mega(128, 6, 64, 4002, "softmax", "scalenorm", False, dropout=0.1),
        "image": _mega(160, 8, 96, 1024, "laplace", "batchnorm", True),
        "pathfinder": _mega(128, 6, 64, 1024, "laplace", "batchnorm", True),
        "pathx": _mega(64, 4, 32, 16384, "laplace", "batchnorm", True, truncation=4096),
        "speech": _mega(60, 6, 30, 16000, "laplace", "batchnorm", True, truncation=1000),
    }
)
MEGA_CHUNK: Mapping[str, int] = MappingProxyType({"pathx": 4096, "speech": 1000})  # every other task: 128


def _seqboat(
    dim: int, layers: int, z: int, positions: int, fn: str, norm: str, pre: bool, temperature: float, **more: Any
) -> SeqBoatConfig:
    return SeqBoatConfig(
        dim=dim,
        layers=layers,
        z_dim=z,
        v_dim=2 * dim,
        head_dim=2 * dim,
        max_positions=positions,
        attention=fn,
        norm=norm,
        prenorm=pre,
        sinusoid=pre,
        temperature=temperature,
        **{"truncation": 1024, **more},
    )


# SeqBoat, the settings of its published scripts (renll/SeqBoat); windows of 128 but for Path-X.
SEQBOAT: Mapping[str, SeqBoatConfig] = MappingProxyType(
    {
        #                        D  layers z  positions function norm pre-norm temperature
        "listops": _seqboat(80, 6, 64, 2002, "softmax", "layernorm", False, 0.3, dropout=0.1),
        "text": _seqboat(128, 4, 64, 4002, "softmax", "scalenorm", False, 0.3, dropout=0.1, bias="local"),
        "retrieval": _seqboat(128, 6, 64, 4002, "softmax", "scalenorm", False, 0.3, dropout=0.1, nli_head=True),
        "image": _seqboat(160, 8, 96, 1024, "relu2", "batchnorm", True, 0.4),
        "pathfinder": _seqboat(128, 6, 64, 1024, "relu2", "batchnorm", True, 1.0),
        # The script runs 4 layers, its README speaks of 6.
        "pathx": _seqboat(128, 4, 64, 16384, "relu2", "batchnorm", True, 1.0, window=256, truncation=16384),
        "speech": _seqboat(60, 8, 30, 16000, "relu2", "batchnorm", True, 1.0, bias="local", truncation=4000),
    }
)

# The Transformer of the Long Range Arena's own table, where it has one.
TRANSFORMER: Mapping[str, TransformerConfig] = MappingProxyType(
    {
        "listops": TransformerConfig(dim=512, layers=4, heads=8, ffn_dim=1024, dropout=0.1, head_dim=1024),
        "text": TransformerConfig(dim=256, layers=4, heads=4, ffn_dim=1024, dropout=0.1, head_dim=1024),
        "retrieval": TransformerConfig(dim=128, layers=4, heads=4, ffn_dim=512, dropout=0.1, head_dim=512),
        "image": TransformerConfig(dim=32, layers=1, heads=1, ffn_dim=64, dropout=0.3, head_dim=64),
    }
)


def published(name: str, task: str) -> Config:
    """The published configuration of a model for a task, or the model's defaults where nothing was published.

    Raises:
        ValueError: for a model that does not exist.
    """
    if name == "mega":
        return MEGA.get(task, MegaConfig())
    if name == "mega-chunk":
        return replace(MEGA.get(task, MegaConfig()), chunk=MEGA_CHUNK.get(task, 128))
    if name == "seqboat":
        return SEQBOAT.get(task, SeqBoatConfig())
    if name == "transformer":
        return TRANSFORMER.get(task, TransformerConfig())
    raise ValueError(f"no model is called {name!r}; wanted one of: mega, mega-chunk, seqboat, transformer.")
