"""Trained models opened: their memories by time scale, their attention as matrices, parts of them switched off.

For notebook 12. Everything here works on any model of `models.build`, trained or not, and changes none for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import longseq_tutorial
from longseq_tutorial import models, tasks, training
from longseq_tutorial.classroom.sound import real_clips
from longseq_tutorial.mechanisms.ema import DampedEMA
from longseq_tutorial.mechanisms.fft_bias import FastRPB
from longseq_tutorial.mechanisms.gated_attention import GatedAttention
from longseq_tutorial.mechanisms.linear_attention import LinearAttention, linear_attention_weights
from longseq_tutorial.mechanisms.s4 import S4, S4D
from longseq_tutorial.mechanisms.sparse_activation import LatentConfigurator, SparseActivation, dense_weights
from longseq_tutorial.mechanisms.vq_attention import VectorQuantizer, VQAttention, vq_attention_quadratic
from longseq_tutorial.models.longvq import LongVQLayer
from longseq_tutorial.models.spade import LocalAttention
from longseq_tutorial.models.transformer import TransformerBlock
from longseq_tutorial.tasks.expressions import VOCABULARY, Shape, Stream
from longseq_tutorial.training import Record

__all__ = [
    "RESULTS",
    "Run",
    "attention_maps",
    "biases",
    "codes",
    "distance_profile",
    "fresh",
    "half_lives",
    "kernels",
    "load_runs",
    "memories",
    "pieces",
    "positions",
    "predictions",
    "quantizers",
    "reach",
    "rewired",
    "sample",
    "step_size",
    "switched_off",
    "waking",
]

RESULTS = Path(longseq_tutorial.__file__).parents[1] / "results"


class Run(NamedTuple):
    """A trained model, in eval mode, and the record of its training."""

    model: nn.Module
    record: Record


def load_runs(folder: Path | None = None, recipe: str = "laptop", seed: int = 0) -> dict[tuple[str, str], Run]:
    """The runs of a recipe in a folder (default: `RESULTS`), by (task, model), ordered by task and model."""
    found = {}
    for path in (folder or RESULTS).glob(f"*-{recipe}-seed{seed}.json"):
        run = Run(*training.load_run(path))
        found[run.record.task["name"], run.record.model] = run
    return dict(sorted(found.items(), key=lambda item: (item[0][0], models.NAMES.index(item[0][1]))))


def fresh(record: Record) -> nn.Module:
    """The model as it was before its first update: built anew with the run's seed. In eval mode."""
    config = tasks.TaskConfig(**{**record.task, "class_names": tuple(record.task["class_names"])})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.seed)
        return models.build(record.model, config, **record.config).eval()


# ---- what they read ------------------------------------------------------------------------------------------------


def sample(record: Record, count: int | None = None) -> tasks.Split:
    """Sequences that the model was not trained on, from the repository alone, prepared as in the run.

    * ListOps: the first ``count`` (default 200) of the very test that the record speaks of, made from its seed.
    * speech: the twenty recordings of `real_clips`, all from the official test.
    * text: reviews by the project's grammar, cut as in the run. The models were trained on *real* reviews: these are
      another kind of text, on which their accuracy says little.
    """
    options, name = record.recipe["data"], record.task["name"]
    if name == "speech":
        split = real_clips(options)[0]
    elif name == "text":
        whole = tasks.load("text", source="sample", length=options.get("length", 4_096), valid=0)
        split = whole.test
    elif name == "listops":
        shape = Shape(**{key: options[key] for key in ("min_length", "max_length") if key in options})
        drawn = [next(stream) for stream in [Stream(options.get("seed", 0), shape)] for _ in range(count or 200)]
        offsets = np.cumsum([0] + [len(tokens) for tokens, _ in drawn])
        values = np.frombuffer(b"".join(tokens for tokens, _ in drawn), dtype=np.uint8)
        split = tasks.Split(values, offsets, np.array([label for _, label in drawn]))
    else:
        raise ValueError(f"wanted a run on listops, speech or text; got one on {name!r}, of which no sample fits.")
    return split if count is None else split.select(np.arange(min(count, len(split))))


def positions(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Which of the positions that the layers see are real, bool ``(B, L')``: patches are fewer than samples."""
    with torch.no_grad():
        found = model.encoder.embedding(x, mask)[1]  # type: ignore[operator,union-attr]
    return found


def step_size(record: Record) -> tuple[float, str]:
    """How much of its task one position of the model is, and in what: (10, "ms"), (1, "bytes") or (1, "tokens")."""
    if record.task["kind"] == "tokens":
        return 1.0, "bytes" if record.task["name"] in ("text", "retrieval") else "tokens"
    stride = math.prod(step for _, step in record.config["patch"])
    return 1000 * stride / record.task["sample_rate"], "ms"


def pieces(record: Record, x: Tensor) -> list[str]:
    """The words for the tokens of one sequence: a ListOps token, or the character of a byte (· if it has none)."""
    if record.task["name"] == "listops":
        return [VOCABULARY[int(token)] for token in x]
    return [chr(byte) if 32 <= (byte := int(token) - 1) < 127 else "·" for token in x]


@torch.no_grad()
def predictions(model: nn.Module, batch: tasks.Batch, size: int = 50) -> Tensor:
    """Logits ``(B, classes)``, ``size`` sequences of similar length at a time: little time is spent on padding."""
    order = batch.mask.sum(1).argsort(stable=True)
    found = []
    for some in order.split(size):
        longest = int(batch.mask[some].any(0).nonzero().max()) + 1
        found.append(model(batch.x[some, :longest], batch.mask[some, :longest]))
    return torch.cat(found)[order.argsort()]


# ---- memories --------------------------------------------------------------------------------------------------------


def memories(model: nn.Module) -> list[nn.Module]:
    """The EMAs and state spaces of a model, from the lowest layer to the highest."""
    return [module for module in model.modules() if isinstance(module, DampedEMA | S4 | S4D)]


def half_lives(ema: DampedEMA) -> Tensor:
    """After how many steps each average of an EMA has forgotten half: ``(E, n)``.

    E is D, or 2 D in both directions (rows D.. run backwards). With the decay ``phi = 1 - alpha * delta`` it is
    ``ln(1/2) / ln(phi)``.
    """
    alpha, delta, _, _ = ema.coefficients()
    return (math.log(0.5) / torch.log1p(-alpha * delta)).detach()


@torch.no_grad()
def kernels(memory: nn.Module, length: int) -> Tensor:
    """The kernels of an EMA or a state space: ``(D, K)``, or ``(2 D, K)`` in both directions; without the skip."""
    return memory.kernel(length)  # type: ignore[operator]


def reach(kernel: Tensor, share: float = 0.9) -> Tensor:
    """The number of lags that hold this share of a kernel's weight (sizes, not signs): ``(D, K) -> (D,)``, 1 to K."""
    weight = kernel.abs().double().cumsum(-1)
    return (weight < share * weight[:, -1:]).sum(-1) + 1


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_maps(model: nn.Module, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Who reads from whom, for one sequence: a matrix ``(H, L, L)`` for each layer; row = query, column = key.

    ``x (1, L)`` and ``mask (1, L)``, as the model takes them. Whatever the layers do with blocks, windows, chosen
    tokens or codes is laid out at the original positions; where nothing is read, or nobody wakes, stands 0. With a
    Laplace function rows need not sum to 1. FastRPB's map is that of its linear attention, without the bias.

    Raises ValueError for more than one sequence: they would be filled up to one length.
    """
    if x.shape[0] != 1:
        raise ValueError(f"attention_maps wanted one sequence (1, L); got {tuple(x.shape)}.")
    handed: dict[nn.Module, tuple[Any, ...]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: handed.update({module: args}))
        for module in model.modules()
        if isinstance(module, VQAttention)
    ]
    try:
        with torch.no_grad(), models.record(model) as tape:
            model(x, mask)
    finally:
        for hook in hooks:
            hook.remove()
    length = positions(model, x, mask).shape[1]
    maps = []
    for name, module in model.named_modules():
        if isinstance(module, SparseActivation):
            maps.append(_among_the_waking(tape, name, length))
        elif isinstance(module, LocalAttention):
            maps.append(_blocks(tape[f"{name}.weights"][0], length, module.local == "window"))
        elif isinstance(module, GatedAttention):
            weights = tape[f"{name}.weights"]
            maps.append(_blocks(weights, length, False) if module.chunk else weights)
        elif isinstance(module, TransformerBlock):
            maps.append(tape[f"{name}.weights"][0])
        elif isinstance(module, LinearAttention):
            q, k = (tape[f"{name}.{which}"] for which in ("queries", "keys"))
            maps.append(linear_attention_weights(q, k, module.feature_map, eps=module.eps)[0])
        elif isinstance(module, VQAttention):
            maps.append(_over_codes(module, *handed[module])[0])
    return maps


def _among_the_waking(tape: models.Tape, name: str, length: int) -> Tensor:
    """The weights of chosen tokens, put back to where those stand: ``(1, L, L)``."""
    active = tape[f"{name}.active_seen"][0]
    place = active.nonzero().squeeze(1)  # (M,)
    square = active.new_zeros(length, length)
    if len(place):
        square[place[:, None], place] = dense_weights(tape.all(f"{name}.weights"), len(place))[0]
    return square.unsqueeze(0)


def _blocks(weights: Tensor, length: int, window: bool) -> Tensor:
    """Blocks ``(H, N, C, K)``: of chunks (K = C, the own one) or windows (K = 3 C, neighbours too) as ``(H, L, L)``."""
    _, count, block, view = weights.shape
    key = torch.arange(count)[:, None] * block + torch.arange(view) - (block if window else 0)  # (N, K)
    key = key.clamp(-1, length) + 1  # columns 0 and length + 1 collect what lies outside
    wide = weights.new_zeros(*weights.shape[:3], length + 2)
    wide.scatter_add_(3, key[None, :, None].expand(weights.shape), weights)
    return wide.flatten(1, 2)[:, :length, 1:-1]


@torch.no_grad()
def _over_codes(module: VQAttention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The weights that attention over codes implies: handed the identity as values, it gives back its weights."""
    identity = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], -1)
    return vq_attention_quadratic(
        q,
        k,
        identity,
        module.quantizer.codebook,
        mask=mask,
        window=module.window,
        bias=module.bias,
        exact_window=module.exact_window,
    )


def distance_profile(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Which share of the attention goes how far: ``(..., L, L) -> (L,)``, entry d for the keys d steps away.

    Every query counts alike: rows are brought to sum 1 first, rows of zeros left out. ``mask (L,)`` leaves out queries.
    """
    length = weights.shape[-1]
    total = weights.sum(-1, keepdim=True)
    reading = total > 0 if mask is None else (total > 0) & mask[:, None]
    rows = torch.where(reading, weights / total.clamp(min=1e-30), 0.0).flatten(0, -3).sum(0).double()  # (L, L)
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    profile = torch.zeros(length, dtype=torch.double).index_add(0, apart.flatten(), rows.flatten())
    return profile / reading.sum().clamp(min=1)


# ---- decisions and codes ---------------------------------------------------------------------------------------------


@torch.no_grad()
def waking(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Which tokens each SeqBoat layer wakes, bool ``(layers, B, L)``. Padding never wakes."""
    with models.record(model) as tape:
        model(x, mask)
    return torch.stack([tape[name] for name in tape.names("active_seen")]).bool()


@torch.no_grad()
def codes(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """The codes that each LongVQ layer gives its keys, ``(layers, B, L)``, those of padding included. (One head.)"""
    with models.record(model) as tape:
        model(x, mask)
    return torch.stack([tape[name][:, 0] for name in tape.names("codes_seen")])


def quantizers(model: nn.Module) -> list[VectorQuantizer]:
    """The quantisers of a LongVQ model, from the lowest layer to the highest."""
    return [module for module in model.modules() if isinstance(module, VectorQuantizer)]


def biases(model: nn.Module) -> list[FastRPB]:
    """The positional biases of a FastRPB model, from the lowest layer to the highest."""
    return [module for module in model.modules() if isinstance(module, FastRPB)]


# ---- interventions ---------------------------------------------------------------------------------------------------


@contextmanager
def switched_off(model: nn.Module, part: str, mean: bool = False) -> Iterator[int]:
    """Run the model without a part of it, inside the block; yields in how many places that part was found.

    part: "memory": EMAs and state spaces pass on what they read now (times their skip) and remember nothing;
    "attention": what attention found is replaced by zeros; "bias": the same with FastRPB's positional sums.
    mean: replace what is lost by its own mean over the real positions of the batch instead of zeros: still blind, but
    of a size that the next layer knows.
    """
    kinds: dict[str, tuple[type[nn.Module], ...]] = {
        "memory": (DampedEMA, S4, S4D),
        "attention": (LinearAttention, LocalAttention, SparseActivation),
        "bias": (FastRPB,),
    }
    if part not in kinds:
        raise ValueError(f"part must be one of {', '.join(kinds)}; got {part!r}.")
    real: list[Tensor | None] = [None]  # the mask of the call that is running

    def blind(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        kept = torch.zeros_like(output)
        if isinstance(module, DampedEMA | S4 | S4D):
            kept = (module.omega if isinstance(module, DampedEMA) else module.skip) * args[0]
        if not mean:
            return kept
        lost = output - kept
        lost = lost.transpose(1, 2) if isinstance(module, LinearAttention) else lost  # (B, L, ...)
        average = lost.flatten(0, 1).mean(0) if real[0] is None else lost[real[0]].mean(0)
        average = average.expand_as(lost)
        return kept + (average.transpose(1, 2) if isinstance(module, LinearAttention) else average)

    found = [module for module in model.modules() if isinstance(module, kinds[part])]
    if part == "attention":  # these hold what attention found in a linear layer of their own, behind the gate
        found += [module.h_proj for module in model.modules() if isinstance(module, GatedAttention | LongVQLayer)]
        found += [module.out for module in model.modules() if isinstance(module, TransformerBlock)]
    with ExitStack() as stack:
        for layer in model.encoder.layers:  # type: ignore[union-attr]
            stack.callback(layer.register_forward_pre_hook(lambda _, args: real.__setitem__(0, args[1])).remove)
        for module in found:
            stack.callback(module.register_forward_hook(blind).remove)
        yield len(found)


@contextmanager
def rewired(model: nn.Module, choose: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Let SeqBoat's layers wake other tokens than they would, inside the block.

    choose: ``(active (B, L), mask (B, L)) -> bool (B, L)``, called once a layer with what its switch decided. The
    confidence stays that of the switch's own decision.
    """

    def other(module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        active, confidence = output
        mask = args[1] if len(args) > 1 and args[1] is not None else torch.ones_like(active)
        return choose(active, mask) & mask, confidence

    switches = [module for module in model.modules() if isinstance(module, LatentConfigurator)]
    if not switches:
        raise ValueError(f"{type(model).__name__} has no switch to rewire; wanted a SeqBoat that is not always active.")
    with ExitStack() as stack:
        for switch in switches:
            stack.callback(switch.register_forward_hook(other).remove)
        yield
