"""The authors' parameter names -> our modules, so that released checkpoints and recorded numbers can be loaded.

Each function takes a state dict under the authors' names (numpy arrays or tensors) and returns our module holding it,
in the dtype given, in eval mode, ready to call as ``module(x, mask=mask)`` with ``x (batch, length, dim)`` and ``mask``
True where the token is real. Sizes are read off the arrays. :func:`authors_names` goes the other way.

Source of the names: the published code of Mega (facebookresearch/mega). Where the paper and that code differ in a name,
the code's is meant here: its ``delta`` is the paper's alpha, its ``alpha`` the paper's delta, and the ``gamma`` in its
EMA the paper's eta.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .models.classifier import Classifier, Encoder, Head, PairClassifier
from .models.configs import MegaConfig
from .models.mega import MegaBlock, MegaLayer
from .models.parts import Norm, SampleEmbedding, TokenEmbedding

__all__ = ["authors_names", "mega_block", "mega_classifier", "mega_layer"]

StateDict = Mapping[str, Any]
M = TypeVar("M", bound=nn.Module)

# Ours -> theirs, as the start of a dotted name; the longest match counts. Inside a Mega layer:
LAYER = {
    "ema.alpha_logit": "move.delta",
    "ema.delta_logit": "move.alpha",
    "ema.beta": "move.beta",
    "ema.eta": "move.gamma",
    "ema.omega": "move.omega",
    "attention.kappa": "gamma",
    "attention.mu": "beta",
    "attention.v_proj": "v_proj",
    "attention.mx_proj": "mx_proj",
    "attention.h_proj": "h_proj",
    "attention.bias.table": "rel_pos_bias.rel_pos_bias",
    "attention.bias.alpha": "rel_pos_bias.alpha",
    "attention.bias.beta": "rel_pos_bias.beta",
    "norm.norm": "norm.norm",
    "norm.scale": "norm.norm.scalar",
}
FEED_FORWARD = {"norm.norm": "norm.norm", "norm.scale": "norm.norm.scalar", "fc1": "fc1", "fc2": "fc2"}
BLOCK = {f"mega.{ours}": f"mega_layer.{theirs}" for ours, theirs in LAYER.items()} | {
    f"feed_forward.{ours}": f"nffn.{theirs}" for ours, theirs in FEED_FORWARD.items()
}
# The authors' models wrap the encoder twice: model.encoder.encoder.
INSIDE = "encoder.encoder."
CLASSIFIER = {
    "encoder.final_norm.norm": INSIDE + "final_norm.norm",
    "encoder.final_norm.scale": INSIDE + "final_norm.norm.scalar",
    "head.hidden": "classifier.0.0",
    "head.out": "sentence_projection_layer",
}


def mega_layer(
    state_dict: StateDict,
    *,
    attention: str,
    norm: str,
    prenorm: bool,
    bidirectional: bool,
    chunk: int | None = None,
    truncation: int | None = None,
    bias: str = "simple",
) -> MegaLayer:
    """A ``MovingAverageGatedAttention`` of the authors as our :class:`~longseq_tutorial.models.mega.MegaLayer`.

    Args:
        state_dict: names ``move.delta``, ``v_proj.weight``, ``norm.norm.weight`` ...
        attention: "softmax", "laplace" or "relu2".
        norm: "layernorm", "batchnorm", "scalenorm" or "rmsnorm".
        prenorm, bidirectional: as built by the authors.
        chunk, truncation: length of the attention chunks and of the EMA kernel; None for no limit.
        bias: "simple" or "rotary".

    Raises:
        ValueError: if a name is missing or left over, or a shape does not fit; all of them are listed.
    """
    options = dict(attention=attention, norm=norm, prenorm=prenorm, chunk=chunk, truncation=truncation, bias=bias)
    arrays = _tensors(state_dict)
    return _fill(MegaLayer(_config(arrays, "", causal=not bidirectional, **options)), arrays, LAYER)


def mega_block(state_dict: StateDict, **same: Any) -> MegaBlock:
    """A ``MegaSentenceEncoderLayer``: names ``mega_layer.*`` and ``nffn.*``; keywords as :func:`mega_layer`."""
    arrays = _tensors(state_dict)
    return _fill(MegaBlock(_config(arrays, "mega_layer.", **_options(same))), arrays, BLOCK)


def mega_classifier(state_dict: StateDict, *, task: str, **same: Any) -> Classifier | PairClassifier:
    """A whole classifier of the authors (``LRAModel``, ``SCRawModel``).

    Args:
        state_dict: names ``encoder.encoder.layers.0.mega_layer.*``, ``classifier.0.0.*`` ...
        task: "text" and "retrieval" read tokens, "pixels" and "audio" read numbers; retrieval is called as
            ``module(x1, x2, mask1=, mask2=)``.
        same: the keywords of :func:`mega_layer`.
    """
    if task not in ("text", "retrieval", "pixels", "audio"):
        raise ValueError(f"task must be 'text', 'retrieval', 'pixels' or 'audio'; got {task!r}.")
    arrays = _tensors(state_dict)
    layers = 0
    while any(name.startswith(f"{INSIDE}layers.{layers}.") for name in arrays):
        layers += 1
    _need(
        arrays, f"{INSIDE}layers.0.mega_layer.move.omega", "classifier.0.0.weight", "sentence_projection_layer.weight"
    )
    config = _config(arrays, f"{INSIDE}layers.0.mega_layer.", **_options(same))
    names = dict(CLASSIFIER)
    for i in range(layers):
        names |= {f"encoder.layers.{i}.{ours}": f"{INSIDE}layers.{i}.{theirs}" for ours, theirs in BLOCK.items()}
    # Tokens are embedded by embed_tokens.embed.weight, numbers by embed_tokens.weight and embed_tokens.bias.
    table = next((n for n in arrays if n.startswith(INSIDE + "embed_tokens.") and n.endswith(".weight")), "")
    if task in ("text", "retrieval"):
        _need(arrays, table or INSIDE + "embed_tokens.embed.weight")
        names["encoder.embedding.table"] = table.removesuffix(".weight")
        embedding: nn.Module = TokenEmbedding(arrays[table].shape[0], config.dim)
    else:
        _need(arrays, table or INSIDE + "embed_tokens.weight")
        names["encoder.embedding"] = table.removesuffix(".weight")
        embedding = SampleEmbedding(config.dim)
    final = Norm(config.norm, config.dim) if config.prenorm else None
    encoder = Encoder(embedding, [MegaBlock(config) for _ in range(layers)], final)
    width, inputs = arrays["classifier.0.0.weight"].shape
    head = Head(inputs, width, arrays["sentence_projection_layer.weight"].shape[0])
    model = PairClassifier(encoder, head) if task == "retrieval" else Classifier(encoder, head)
    return _fill(model, arrays, names)


def authors_names(module: nn.Module, *, gradients: bool = False) -> dict[str, Tensor]:
    """A module's parameters and buffers, or the gradients of its parameters, under the authors' names and shapes.

    Raises:
        ValueError: if the module was not made by a function of this file.
    """
    names, shapes = getattr(module, "_authors_names", None), getattr(module, "_authors_shapes", None)
    if names is None or shapes is None:
        raise ValueError(f"wanted a module made by longseq_tutorial.official; got a plain {type(module).__name__}.")
    own: dict[str, Tensor | None] = (
        {n: p.grad for n, p in module.named_parameters()} if gradients else dict(module.state_dict())
    )
    return {names[n]: t.reshape(shapes[names[n]]) for n, t in own.items() if n in names and t is not None}


def _options(same: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of mega_layer as fields of a configuration."""
    known = {"attention", "norm", "prenorm", "bidirectional", "chunk", "truncation", "bias"}
    missing, unknown = {"attention", "norm", "prenorm", "bidirectional"} - set(same), set(same) - known
    if missing or unknown:
        raise TypeError(f"missing keywords: {sorted(missing)}; unknown keywords: {sorted(unknown)}.")
    options = dict(same)
    return {"causal": not options.pop("bidirectional"), **options}


def _config(arrays: Mapping[str, Tensor], prefix: str, **options: Any) -> MegaConfig:
    """Read the sizes off one layer's arrays."""
    _need(arrays, *(prefix + n for n in ("move.delta", "move.omega", "v_proj.weight", "gamma")))
    feed_forward = prefix.replace("mega_layer.", "nffn.") + "fc1.weight"
    table = arrays.get(prefix + "rel_pos_bias.rel_pos_bias")
    positions = 1 if table is None else (table.numel() + 1) // 2
    chunk = options.get("chunk")
    if chunk is not None and table is not None and positions != chunk:
        raise ValueError(
            f"chunk={chunk} wants a relative bias of {2 * chunk - 1} numbers; got {table.numel()}, "
            f"which fits chunk={positions}."
        )
    return MegaConfig(
        dim=arrays[prefix + "move.omega"].numel(),
        n=arrays[prefix + "move.delta"].shape[1],
        z_dim=arrays[prefix + "gamma"].shape[1],
        v_dim=arrays[prefix + "v_proj.weight"].shape[0],
        ffn_dim=arrays[feed_forward].shape[0] if feed_forward in arrays else 1,
        max_positions=positions,
        **options,
    )


def _fill(module: M, arrays: Mapping[str, Tensor], names: Mapping[str, str]) -> M:
    """Copy the arrays in; every array must be used, every parameter filled."""
    dtypes = {t.dtype for t in arrays.values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(f"wanted one floating-point dtype in the state dict; got {sorted(map(str, dtypes))}.")
    module = module.to(dtypes.pop())
    ours = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    theirs = {name: _translate(name, names) for name in ours}
    missing = sorted(set(theirs.values()) - set(arrays))
    surplus = sorted(n for n in set(arrays) - set(theirs.values()) if not n.endswith("num_batches_tracked"))
    if missing or surplus:
        raise ValueError(
            f"the state dict does not fit: missing {missing or 'nothing'}; not used {surplus or 'nothing'}. "
            "Check norm, bias, task and the prefix of the names."
        )
    for name, there in theirs.items():
        if arrays[there].numel() != ours[name].numel():
            raise ValueError(f"{there} wants shape {tuple(ours[name].shape)}; got {tuple(arrays[there].shape)}.")
    module.load_state_dict({n: arrays[t].reshape(ours[n].shape) for n, t in theirs.items()}, strict=False)
    module._authors_names = theirs  # type: ignore[assignment]
    module._authors_shapes = {t: tuple(arrays[t].shape) for t in theirs.values()}  # type: ignore[assignment]
    return module.eval()


def _translate(name: str, names: Mapping[str, str]) -> str:
    """Our dotted name in the authors' words."""
    found = max((o for o in names if name == o or name.startswith(o + ".")), key=len, default=None)
    if found is None:
        raise ValueError(f"no name of the authors' is known for our {name!r}.")
    return names[found] + name[len(found) :]


def _tensors(state_dict: StateDict) -> dict[str, Tensor]:
    return {n: torch.as_tensor(np.asarray(a)) if not isinstance(a, Tensor) else a for n, a in state_dict.items()}


def _need(arrays: Mapping[str, Tensor], *names: str) -> None:
    absent = [n for n in names if n not in arrays]
    if absent:
        raise ValueError(f"the state dict lacks {', '.join(absent)}. Names begin: {', '.join(list(arrays)[:3])} ...")
