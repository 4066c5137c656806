"""The authors' parameter names -> our modules, so that released checkpoints and recorded numbers can be loaded.

Each function takes a state dict under the authors' names (numpy arrays or tensors) and returns our module holding it,
in the dtype given, in eval mode, ready to call as ``module(x, mask=mask)`` with ``x (batch, length, dim)`` and ``mask``
True where the token is real. Sizes are read off the arrays. :func:`authors_names` goes the other way.

Source of the names: the published code of Mega (facebookresearch/mega), and of SeqBoat (renll/SeqBoat). Where paper and
code differ in a name, the code's is meant: its ``delta`` is the paper's alpha, its ``alpha`` the paper's delta, and the
``gamma`` in its EMA the paper's eta. SPADE's names are those of its published decoder. The arrays of Transformer-VQ
(transformer-vq/transformer_vq) bear the names of their symbols.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .models.classifier import Classifier, Encoder, Head, PairClassifier
from .models.configs import MegaConfig, SeqBoatConfig, SpadeConfig
from .models.mega import MegaBlock, MegaLayer
from .models.parts import Norm, SampleEmbedding, TokenEmbedding
from .models.seqboat import ScaledPositions, SeqBoatLayer
from .models.spade import FixedConvolution, SpadeDecoder, spade_layers
from .models.transformer_vq import TransformerVQLayer

__all__ = [
    "authors_names",
    "mega_block",
    "mega_classifier",
    "mega_layer",
    "seqboat_classifier",
    "seqboat_layer",
    "spade_decoder",
    "vq_layer",
]

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
# A SeqBoat layer names its parts as Mega does, and has a switch.
SEQBOAT = LAYER | {
    "hx_proj": "hx_proj",
    "attention.router.log_temperature": "q_router.temp",
    "attention.table": "rel_pos_bias.rel_pos_bias",
}
VQ_LAYER = {
    "gain": "ln_gain",
    "bias": "ln_bias",
    "w_q": "W_q",
    "w_kvg": "W_kvg",
    "w_r": "W_r",
    "w_o": "W_o",
    "u": "xl_u",
    "w": "xl_v",
    "quantizer.code_sum": "C",
}
# Counters: not in the arrays, or not needed.
SPADE_LAYER = {
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
    "attention": "self_attn",
    "norm_global": "norm_global",
    "norm_local": "norm_local",
    "aggregate": "aggregate",
    "fc1": "fc1",
    "fc2": "fc2",
}
COUNTERS = ("num_batches_tracked", "quantizer.code_count", "quantizer.started", "quantizer.draws")
# The authors' models wrap the encoder twice: model.encoder.encoder.
INSIDE = "encoder.encoder."
FIRST_LAYER = INSIDE + "layers.0.mega_layer."
CLASSIFIER = {
    "encoder.layers.0.scale": INSIDE + "pos_emb.scale",
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
    return _fill(MegaBlock(_config(arrays, "mega_layer.", **_options(mega_layer, same))), arrays, BLOCK)


def mega_classifier(state_dict: StateDict, *, task: str, **same: Any) -> Classifier | PairClassifier:
    """A whole classifier of the authors (``LRAModel``, ``SCRawModel``).

    Args:
        state_dict: names ``encoder.encoder.layers.0.mega_layer.*``, ``classifier.0.0.*`` ...
        task: "text" and "retrieval" read tokens, "pixels" and "audio" read numbers; retrieval is called as
            ``module(x1, x2, mask1=, mask2=)``.
        same: the keywords of :func:`mega_layer`.
    """
    arrays = _whole_model(state_dict, task)
    config = _config(arrays, FIRST_LAYER, **_options(mega_layer, same))
    return _classifier(arrays, task, config, MegaBlock, BLOCK)


def seqboat_layer(
    state_dict: StateDict,
    *,
    attention: str,
    window: int | None,
    bias: str,
    norm: str,
    prenorm: bool,
    bidirectional: bool,
    truncation: int | None = None,
) -> SeqBoatLayer:
    """A ``SeqBoatUnit`` of the authors as our :class:`~longseq_tutorial.models.seqboat.SeqBoatLayer`.

    A state dict without ``q_router`` whose ``hx_proj`` has D outputs is their variant that always attends.

    Args:
        state_dict: names ``move.delta``, ``hx_proj.weight``, ``q_router.temp`` ...
        attention: "softmax", "laplace" or "relu2". With laplace the authors' code lets masked entries leak through a
            window (``laplace(0) > 0``); ours does not, so the numbers differ there.
        window: activated tokens seen to either side; None for all.
        bias: "global" (distance in the original sequence), "local" (among the activated tokens) or "rotary".
        norm, prenorm, bidirectional, truncation: as for :func:`mega_layer`.

    Raises:
        ValueError: if a name is missing or left over, or a shape does not fit; all of them are listed.
    """
    arrays = _tensors(state_dict)
    options = dict(attention=attention, window=window, bias=bias, norm=norm, prenorm=prenorm, truncation=truncation)
    config = _seqboat_config(arrays, "", causal=not bidirectional, **options)
    return _fill(SeqBoatLayer(config), arrays, SEQBOAT)


def seqboat_classifier(
    state_dict: StateDict, *, task: str, nli_head: bool = False, **same: Any
) -> Classifier | PairClassifier:
    """A whole SeqBoat classifier of the authors.

    Args:
        state_dict: names ``encoder.encoder.layers.0.mega_layer.*`` as in Mega; ``encoder.encoder.pos_emb.scale`` where
            the model was built with absolute positions.
        task: as for :func:`mega_classifier`.
        nli_head: retrieval only: the head was trained on product and difference of the two vectors as well.
        same: the keywords of :func:`seqboat_layer`.
    """
    arrays = _whole_model(state_dict, task)
    config = _seqboat_config(arrays, FIRST_LAYER, **_options(seqboat_layer, same))
    block = {ours: f"mega_layer.{theirs}" for ours, theirs in SEQBOAT.items()}
    return _classifier(arrays, task, config, SeqBoatLayer, block, nli_head)


def vq_layer(
    state_dict: StateDict, *, heads: int, key_dim: int, value_dim: int, block: int, memory: int, pe_lam: float
) -> TransformerVQLayer:
    """A ``VQAttention`` of Transformer-VQ as our :class:`~longseq_tutorial.models.transformer_vq.TransformerVQLayer`.

    Args:
        state_dict: ``ln_gain``, ``ln_bias``, ``W_q``, ``W_kvg``, ``W_r``, ``W_o`` (matrices ``(in, out)``), ``xl_u``,
            ``xl_v`` and the codebook ``C (heads, codes, key_dim)``.
        heads, key_dim, value_dim: the sizes of the authors' ``n_head``, ``d_k`` and ``d_v``.
        block, memory: their ``block_len`` and ``mem_len``.
        pe_lam: base of the sinusoid's wavelengths.

    Raises:
        ValueError: if a name is missing or left over, or a shape does not fit; all of them are listed.
    """
    arrays = _tensors(state_dict)
    _need(arrays, *VQ_LAYER.values())
    codebook, (dim, queries) = arrays["C"], arrays["W_q"].shape
    wanted = (heads, codebook.shape[-2], key_dim)
    if codebook.shape != wanted or queries != heads * key_dim:
        raise ValueError(
            f"heads={heads} and key_dim={key_dim} want C {wanted} and W_q {(dim, heads * key_dim)}; "
            f"got {tuple(codebook.shape)} and {(dim, queries)}."
        )
    layer = TransformerVQLayer(
        dim,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        codes=codebook.shape[1],
        block=block,
        memory=memory,
        pe_lam=pe_lam,
    )
    layer.quantizer.set_codebook(torch.zeros(wanted))  # a count of 1 for each code, so that C is its own sum
    return _fill(layer, arrays, VQ_LAYER)


def spade_decoder(
    state_dict: StateDict,
    *,
    mode: str,
    heads: int,
    radius: int,
    num_buckets: int,
    max_distance: int,
    s4_kernel: Any,
    s4_skip: Any,
    s4_weight: float = 0.5,
) -> SpadeDecoder:
    """A stack of SPADE's decoder layers, causal, as our :class:`~longseq_tutorial.models.spade.SpadeDecoder`.

    Args:
        state_dict: names ``layer0.self_attn.q.weight``, ``layer0.fc1.weight``, ``layer1. ...``; all but the S4 branch.
        mode: how the first layer joins its branches, "concat", "add" or "stack".
        heads, radius, num_buckets, max_distance: of the local attention and its bias.
        s4_kernel: ``(D, K)`` or ``(1, D, K)``, the S4 kernel itself; s4_skip: ``(D,)`` or ``(1, D)``.
        s4_weight: S4's share in mode "add".

    Raises:
        ValueError: if a name is missing or left over, or a shape does not fit; all of them are listed.
    """
    arrays = _tensors(state_dict)
    _need(arrays, "layer0.self_attn.q.weight", "layer0.fc1.weight")
    layers = 0
    while f"layer{layers}.self_attn.q.weight" in arrays:
        layers += 1
    hidden, dim = arrays["layer0.fc1.weight"].shape
    config = SpadeConfig(
        dim=dim,
        layers=layers,
        heads=heads,
        ffn_dim=hidden,
        window=radius,
        mode=mode,
        s4_weight=s4_weight,
        buckets=num_buckets,
        max_distance=max_distance,
        causal=True,
    )
    given = _tensors({"kernel": s4_kernel, "skip": s4_skip})
    branch = FixedConvolution(given["kernel"].reshape(dim, -1), given["skip"].reshape(dim))
    names = {"layers.0.bias.table": "layer0.self_attn.relative_attention_bias.weight"}
    for i in range(layers):
        names |= {f"layers.{i}.{ours}": f"layer{i}.{theirs}" for ours, theirs in SPADE_LAYER.items()}
    return _fill(SpadeDecoder(spade_layers(config, [branch])), arrays, names)


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


def _options(like: Callable[..., nn.Module], same: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of ``mega_layer`` or ``seqboat_layer`` as fields of a configuration."""
    parameters = dict(signature(like).parameters)
    del parameters["state_dict"]
    missing = {name for name, p in parameters.items() if p.default is p.empty} - set(same)
    unknown = set(same) - set(parameters)
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


def _seqboat_config(arrays: Mapping[str, Tensor], prefix: str, **options: Any) -> SeqBoatConfig:
    """Read the sizes off one layer's arrays."""
    _need(arrays, *(prefix + n for n in ("move.delta", "move.omega", "hx_proj.weight", "h_proj.weight", "gamma")))
    dim = arrays[prefix + "move.omega"].numel()
    table = arrays.get(prefix + "rel_pos_bias.rel_pos_bias")
    config = SeqBoatConfig(
        dim=dim,
        n=arrays[prefix + "move.delta"].shape[1],
        z_dim=arrays[prefix + "gamma"].shape[1],
        v_dim=arrays[prefix + "h_proj.weight"].shape[1],
        max_positions=1 if table is None else (table.numel() + 1) // 2,
        always_active=arrays[prefix + "hx_proj.weight"].shape[0] == dim,
        sinusoid=INSIDE + "pos_emb.scale" in arrays,
        **options,
    )
    if config.bias == "local" and table is not None and table.numel() != 6 * (config.window or 0) - 1:
        raise ValueError(
            f"window={config.window} wants a local bias of 6 * window - 1 = {6 * (config.window or 0) - 1} numbers; "
            f"got {table.numel()}, which fits window={(table.numel() + 1) / 6:g}."
        )
    return config


def _whole_model(state_dict: StateDict, task: str) -> dict[str, Tensor]:
    """The arrays of a classifier, after a first look at whether they are those of one."""
    if task not in ("text", "retrieval", "pixels", "audio"):
        raise ValueError(f"task must be 'text', 'retrieval', 'pixels' or 'audio'; got {task!r}.")
    arrays = _tensors(state_dict)
    arrays.pop(INSIDE + "pos_emb.inv_freq", None)  # fixed numbers, which we compute
    _need(arrays, FIRST_LAYER + "move.omega", "classifier.0.0.weight", "sentence_projection_layer.weight")
    return arrays


def _classifier(
    arrays: Mapping[str, Tensor],
    task: str,
    config: MegaConfig | SeqBoatConfig,
    block: Callable[[Any], nn.Module],
    block_names: Mapping[str, str],
    nli_head: bool = False,
) -> Classifier | PairClassifier:
    """Embedding, layers as counted in the arrays, head: built and filled."""
    if nli_head and task != "retrieval":
        raise ValueError(f"nli_head=True compares two sequences: it goes with task='retrieval'; got {task!r}.")
    names = dict(CLASSIFIER)
    blocks: list[nn.Module] = []
    if isinstance(config, SeqBoatConfig) and config.sinusoid:
        blocks.append(ScaledPositions(config.dim))
    start = len(blocks)
    while any(name.startswith(f"{INSIDE}layers.{len(blocks) - start}.") for name in arrays):
        theirs = f"{INSIDE}layers.{len(blocks) - start}."
        names |= {f"encoder.layers.{len(blocks)}.{name}": theirs + there for name, there in block_names.items()}
        blocks.append(block(config))
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
    encoder = Encoder(embedding, blocks, Norm(config.norm, config.dim) if config.prenorm else None)
    width, inputs = arrays["classifier.0.0.weight"].shape
    wanted = config.dim * ((4 if nli_head else 2) if task == "retrieval" else 1)
    if inputs != wanted:
        raise ValueError(
            f"task={task!r} with nli_head={nli_head} wants a head of {wanted} inputs; classifier.0.0.weight has "
            f"{inputs}. Check task and nli_head."
        )
    head = Head(inputs, width, arrays["sentence_projection_layer.weight"].shape[0])
    model = PairClassifier(encoder, head, nli_head) if task == "retrieval" else Classifier(encoder, head)
    return _fill(model, arrays, names)


def _fill(module: M, arrays: Mapping[str, Tensor], names: Mapping[str, str]) -> M:
    """Copy the arrays in; every array must be used, every parameter filled."""
    dtypes = {t.dtype for t in arrays.values() if t.is_floating_point()}
    if len(dtypes) != 1:
        raise ValueError(f"wanted one floating-point dtype in the state dict; got {sorted(map(str, dtypes))}.")
    module = module.to(dtypes.pop())
    ours = {k: v for k, v in module.state_dict().items() if not k.endswith(COUNTERS)}
    theirs = {name: _translate(name, names) for name in ours}
    missing = sorted(set(theirs.values()) - set(arrays))
    surplus = sorted(n for n in set(arrays) - set(theirs.values()) if not n.endswith(COUNTERS))
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
