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

__all__ = [
    "FASTRPB",
    "LONGVQ",
    "MEGA",
    "SEQBOAT",
    "TRANSFORMER",
    "Config",
    "FastRPBConfig",
    "LongVQConfig",
    "MegaConfig",
    "SeqBoatConfig",
    "SpadeConfig",
    "TransformerConfig",
    "published",
]


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


@dataclass(frozen=True)
class LongVQConfig:
    """Our reconstruction of LongVQ: Mega's frame around attention to quantised keys."""

    dim: int = 128  # width of the model (D)
    layers: int = 4  # blocks, each a LongVQ layer and a feed-forward layer
    z_dim: int = 64  # width of queries and keys (z)
    v_dim: int = 256  # width of values (v)
    ffn_dim: int = 256  # hidden width of the feed-forward layer
    memory: str = "ema"  # the structured memory: "ema" or "s4d"
    n: int = 16  # EMA dimensions a channel
    state: int = 64  # S4D: numbers of state a channel (N)
    codes: int = 256  # size of the codebook (S)
    window: int = 64  # pairs this near are computed one by one, with a learned bias (w)
    exact_window: bool = False  # within the window use the keys as they are
    commitment: float = 1e-3  # weight of the loss that holds keys near their codes; Transformer-VQ: 1e-4
    decay: float = 0.99  # of the codebook's moving average
    norm: str = "layernorm"  # layernorm, batchnorm, scalenorm or rmsnorm
    prenorm: bool = False  # norm before each layer instead of after it
    causal: bool = False  # see the past only; needed for streaming
    dropout: float = 0.0  # on embeddings, the memory's output, candidates, feed-forward output, head
    hidden_dropout: float = 0.0  # on values and inside the feed-forward layer
    head_dim: int = 256  # hidden width of the classifier's head
    patch: tuple[tuple[int, int], ...] = ()  # (kernel, stride) stages that read a signal in patches; (): by sample

    def __post_init__(self) -> None:
        _check_common(self)
        _require(self.memory in ("ema", "s4d"), f"memory must be 'ema' or 's4d'; got {self.memory!r}.")
        _require(self.norm in NORMS, f"norm must be one of {', '.join(NORMS)}; got {self.norm!r}.")
        _require(self.state % 2 == 0, f"S4D's states come in conjugate pairs: state must be even; got {self.state}.")
        _require(self.commitment >= 0, f"commitment is the weight of a loss: 0 or more; got {self.commitment!r}.")
        _require(0 <= self.decay < 1, f"decay must lie in [0, 1); got {self.decay!r}.")


@dataclass(frozen=True)
class FastRPBConfig:
    """A linear transformer with FastRPB; published with SIKF features."""

    dim: int = 128  # width of the model (D)
    layers: int = 4  # blocks
    heads: int = 8  # attention heads (H)
    qkv_dim: int = 128  # queries, keys and values, all heads together; a multiple of heads
    ffn_dim: int = 512  # hidden width of the feed-forward layer
    attention: str = "sikf"  # feature map of linear attention: "sikf", "elu" or "favor"; or "softmax", quadratic
    features: int = 256  # random features of "favor"
    bias: str = "full"  # FastRPB: a weight for each offset, "full" or "symmetric"; "none" to leave it out
    max_positions: int = 1024  # offsets that have a weight (N); for images the side
    layout: str = "sequence"  # or "separable" (published for images) or "full", for pixels row after row
    sinusoid: bool = False  # add absolute positions to the embedding
    causal: bool = False  # see the past only; needed for streaming
    dropout: float = 0.0  # on embeddings, both sub-layers' outputs, head
    attention_dropout: float = 0.0  # on what attention found
    head_dim: int = 256  # hidden width of the classifier's head
    patch: tuple[tuple[int, int], ...] = ()  # (kernel, stride) stages that read a signal in patches; (): by sample

    def __post_init__(self) -> None:
        _check_common(self)
        kinds = ("sikf", "elu", "favor", "softmax")
        _require(self.attention in kinds, f"attention must be one of {', '.join(kinds)}; got {self.attention!r}.")
        biases = ("full", "symmetric", "none")
        _require(self.bias in biases, f"bias must be one of {', '.join(biases)}; got {self.bias!r}.")
        layouts = ("sequence", "separable", "full")
        _require(self.layout in layouts, f"layout must be one of {', '.join(layouts)}; got {self.layout!r}.")
        _require(
            not self.causal or self.layout == "sequence",
            f"an image has no past: causal=True wants layout='sequence'; got {self.layout!r}.",
        )
        _require(
            self.qkv_dim % self.heads == 0,
            f"qkv_dim must be a multiple of heads; got qkv_dim={self.qkv_dim}, heads={self.heads}.",
        )
        _require(
            not self.sinusoid or self.dim % 2 == 0,
            f"a sinusoid is pairs of sine and cosine: dim must be even; got {self.dim}.",
        )


@dataclass(frozen=True)
class SpadeConfig:
    """SPADE: S4 beside local attention at the bottom, local attention above."""

    dim: int = 128  # width of the model (D)
    layers: int = 4  # layers
    heads: int = 4  # attention heads; dim must be a multiple
    ffn_dim: int = 512  # hidden width of the feed-forward layer; published: 4 D
    local: str = "window"  # local attention: a sliding "window", or a "chunk" as in Mega-chunk
    window: int = 128  # how far a query sees to either side; or the length of a chunk
    mode: str = "concat"  # how S4 and attention join: "concat", "add" or "stack"
    s4_weight: float = 0.5  # S4's share in mode "add"
    s4_layers: int = 1  # layers with S4, from the bottom; published: 1
    s4_frozen: bool = False  # leave S4 as it was drawn: the authors found that training it gains little
    state: int = 64  # S4's numbers of state a channel (N)
    buckets: int = 32  # classes of distances in the relative bias
    max_distance: int = 128  # farther ones share a class
    causal: bool = False  # see the past only; needed for streaming
    dropout: float = 0.0  # on embeddings, both sub-layers' outputs, head
    attention_dropout: float = 0.0  # on attention weights
    hidden_dropout: float = 0.0  # inside the feed-forward layer
    head_dim: int = 256  # hidden width of the classifier's head
    patch: tuple[tuple[int, int], ...] = ()  # (kernel, stride) stages that read a signal in patches; (): by sample

    def __post_init__(self) -> None:
        _check_common(self)
        _require(self.local in ("window", "chunk"), f"local must be 'window' or 'chunk'; got {self.local!r}.")
        modes = ("concat", "add", "stack")
        _require(self.mode in modes, f"mode must be one of {', '.join(modes)}; got {self.mode!r}.")
        _require(
            self.dim % self.heads == 0, f"dim must be a multiple of heads; got dim={self.dim}, heads={self.heads}."
        )
        _require(0 <= self.s4_weight <= 1, f"s4_weight is a share, in [0, 1]; got {self.s4_weight!r}.")
        _require(
            self.s4_layers <= self.layers,
            f"s4_layers counts layers from the bottom: at most layers={self.layers}; got {self.s4_layers}.",
        )
        _require(self.state % 2 == 0, f"S4's states come in conjugate pairs: state must be even; got {self.state}.")


Config = MegaConfig | SeqBoatConfig | LongVQConfig | FastRPBConfig | SpadeConfig | TransformerConfig


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

# LongVQ's own settings are not known to us: these are Mega's sizes and norms, where ours begins.
LONGVQ: Mapping[str, LongVQConfig] = MappingProxyType(
    {
        task: LongVQConfig(
            dim=c.dim,
            layers=c.layers,
            z_dim=c.z_dim,
            v_dim=c.v_dim,
            ffn_dim=c.ffn_dim,
            head_dim=c.head_dim,
            norm=c.norm,
            prenorm=c.prenorm,
            dropout=c.dropout,
        )
        for task, c in MEGA.items()
    }
)

# FastRPB, from the authors' training configurations for the Long Range Arena, with these differences: they read a CLS
# token instead of the mean, share the weights of ListOps' layers, and cut Text to 1,000 bytes.
FASTRPB: Mapping[str, FastRPBConfig] = MappingProxyType(
    {
        "listops": FastRPBConfig(dim=512, layers=6, heads=8, qkv_dim=512, ffn_dim=2048, max_positions=2000),
        "text": FastRPBConfig(dim=256, layers=4, heads=4, qkv_dim=256, ffn_dim=1024, max_positions=4096),
        "retrieval": FastRPBConfig(dim=128, layers=4, heads=4, qkv_dim=128, ffn_dim=512, max_positions=4000),
        "image": FastRPBConfig(
            dim=128,
            layers=1,
            heads=8,
            qkv_dim=64,
            ffn_dim=128,
            max_positions=32,
            layout="separable",
            sinusoid=True,
            dropout=0.3,
            attention_dropout=0.2,
        ),
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
    tables: dict[str, tuple[Mapping[str, Config], Config]] = {
        "mega": (MEGA, MegaConfig()),
        "seqboat": (SEQBOAT, SeqBoatConfig()),
        "longvq": (LONGVQ, LongVQConfig()),
        "fastrpb": (FASTRPB, FastRPBConfig()),
        "spade": ({}, SpadeConfig()),
        "transformer": (TRANSFORMER, TransformerConfig()),
    }
    if name == "mega-chunk":
        return replace(MEGA.get(task, MegaConfig()), chunk=MEGA_CHUNK.get(task, 128))
    if name not in tables:
        wanted = ("mega", "mega-chunk", "seqboat", "longvq", "fastrpb", "spade", "transformer")
        raise ValueError(f"no model is called {name!r}; wanted one of: {', '.join(wanted)}.")
    settings, default = tables[name]
    return settings.get(task, default)
