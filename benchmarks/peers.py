"""Other packages that compute what ours compute, given our numbers.

None of them is needed: `peers.txt` lists them, `make bench PEERS=1` installs them into a folder of their own and
compares with them too. Each function returns `{name: candidate}`, empty where the package is not installed or cannot
take that length. Some are single files of a package, run by path, because the package itself wants a great deal more.

Left out: mega-pytorch's EMA, because all channels share its decays, so that its parameters have no counterpart in ours
(and it is many times slower than the published code). On a CPU PyTorch's flex_attention has no gradient. In place of
Mega's own code, which cannot be installed by name, stands the port of it in transformers.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import sys
import warnings
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longseq_tutorial.mechanisms.linear_attention import elu_features
from longseq_tutorial.mechanisms.s4 import tilde_from_c

from .problems import Candidate, copied

Found = dict[str, Candidate]

# package -> the module that is used, or the file inside the package
PACKAGES = {
    "transformers": "transformers.models.deprecated.mega.modeling_mega",
    "espnet": "espnet2/asr/state_spaces/s4.py",
    "popgym": "popgym/baselines/models/s4d.py",
    "performer-pytorch": "performer_pytorch.performer_pytorch",
    "local-attention": "local_attention",
    "vector-quantize-pytorch": "vector_quantize_pytorch",
    "fla-core": "fla/ops/linear_attn/naive.py",
    "scipy": "scipy.signal",
}


why: dict[str, str] = {}  # package -> what its import said, if it failed


@cache
def load(package: str) -> ModuleType | None:
    """The module of a peer, or None if it is not there or does not run here."""
    target = PACKAGES[package]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # some print while imported
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
            return importlib.import_module(target) if not target.endswith(".py") else _by_path(target)
    except Exception as error:
        why[package] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        return None
    finally:
        logging.disable(logging.NOTSET)


def _by_path(file: str) -> ModuleType:
    """Run one file of an installed package without importing the package."""
    top, _, rest = file.partition("/")
    spec = importlib.util.find_spec(top)  # finds it, does not run it
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{top} is not installed")
    path = Path(next(iter(spec.submodule_search_locations))) / rest
    named = importlib.util.spec_from_file_location("peer_" + path.stem, path)
    if named is None or named.loader is None:
        raise ImportError(f"{path} cannot be read")
    module = importlib.util.module_from_spec(named)
    sys.modules[named.name] = module
    named.loader.exec_module(module)
    return module


def installed() -> dict[str, str]:
    """package -> version, of those that are there."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


# ---- Mega ----------------------------------------------------------------------------------------------------------


def _mega_config(module: Any, dim: int, **more: Any) -> Any:
    from transformers.models.deprecated.mega.configuration_mega import MegaConfig  # type: ignore[import-not-found]

    settings = {
        "hidden_size": dim, "ema_projection_size": module.n, "bidirectional": module.bidirectional,
        "dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    return MegaConfig(**settings, **more)


def _ema_weights(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """Its names for the coefficients of our EMA."""
    ours = {
        "damping_factor": module.alpha_logit, "decay_factor": module.delta_logit,
        "ema_expansion_matrix": module.beta, "kernel_projection_matrix": module.eta, "residual_weight": module.omega,
    }  # fmt: skip
    return {prefix + name: value for name, value in ours.items()}


def mega_ema(module: Any, x: Tensor) -> Found:
    """The published EMA with its SiLU, in its own layout (length, batch, dim)."""
    mega = load("transformers")
    if mega is None:
        return {}
    peer = mega.MegaMultiDimensionDampedEma(_mega_config(module, module.dim))
    return {
        "transformers": copied(peer, [x.transpose(0, 1)], _ema_weights(module), lambda x: peer(x)[0].transpose(0, 1))
    }


def mega_layer(layer: Any, x: Tensor, config: Any) -> Found:
    """The published layer."""
    mega, length = load("transformers"), x.shape[1]
    if mega is None or (config.chunk is not None and length > config.chunk and length % config.chunk):
        return {}
    attention = layer.attention
    settings = _mega_config(
        layer.ema, config.dim, intermediate_size=config.v_dim, shared_representation_size=config.z_dim,
        use_chunking=config.chunk is not None, chunk_size=config.chunk or -1,
        max_positions=attention.bias.max_positions, normalization_type=config.norm, attention_activation="laplace",
        relative_positional_bias="simple",
    )  # fmt: skip
    peer = mega.MegaMovingAverageGatedAttention(settings)
    weights = _ema_weights(layer.ema, "ema_gate.") | {
        "qk_weight": attention.kappa, "qk_bias": attention.mu, "rel_pos_bias.rel_pos_bias": attention.bias.table,
        "norm.norm.weight": layer.norm.norm.weight, "norm.norm.bias": layer.norm.norm.bias,
    }  # fmt: skip
    for name in ("v_proj", "mx_proj", "h_proj"):
        linear = getattr(attention, name)
        weights |= {f"{name}.weight": linear.weight, f"{name}.bias": linear.bias}
    return {"transformers": copied(peer, [x.transpose(0, 1)], weights, lambda x: peer(x)[0].transpose(0, 1))}


def chunks(function: str, table: Any, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """Attention inside blocks, with a learned bias: Mega's own, and local-attention with no look at its neighbours."""
    block, length = table.max_positions, q.shape[1]
    if length % block:
        return {}
    found: Found = {}
    mega = load("transformers")
    if mega is not None:
        from transformers.models.deprecated.mega.configuration_mega import MegaConfig

        config = MegaConfig(
            hidden_size=8, shared_representation_size=q.shape[-1], use_chunking=True, chunk_size=block,
            max_positions=block, attention_activation=function, relative_positional_bias="simple",
        )  # fmt: skip
        peer = mega.MegaMovingAverageGatedAttention(config)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.unflatten(1, (-1, block)) for x in (q, k, v))
            return (peer.attention_function(q, k, None, None) @ v).flatten(1, 2)

        found["transformers"] = copied(peer, [q, k, v], {"rel_pos_bias.rel_pos_bias": table.table}, attend)
    local = load("local-attention")
    if local is not None and function == "softmax":
        near = local.LocalAttention(block, look_backward=0, look_forward=0, use_rotary_pos_emb=False)
        leaves = [q, k, v, table.table]
        found["local-attention"] = Candidate(lambda: near(q, k, v, attn_bias=table(block)[None]), leaves)
    return found


def window(reach: int, q: Tensor, k: Tensor, v: Tensor) -> Found:
    local = load("local-attention")
    if local is None or q.shape[2] % reach:
        return {}
    near = local.LocalAttention(reach, look_backward=1, look_forward=1, exact_windowsize=True, use_rotary_pos_emb=False)
    return {"local-attention": Candidate(lambda: near(q, k, v), [q, k, v])}


# ---- convolutions and recurrences ----------------------------------------------------------------------------------


def lfilter(module: Any, x: Tensor) -> Found:
    """n recurrences of first order a channel, in C, one after the other; forward only, one direction."""
    signal = load("scipy")
    if signal is None or module.bidirectional or x.device.type != "cpu":
        return {}

    def run() -> Tensor:
        with torch.no_grad():
            alpha, delta, beta, eta = module.coefficients()
            decay, weight = (1 - alpha * delta).tolist(), (alpha * beta * eta).tolist()
            columns = x.transpose(1, 2).contiguous().numpy()
            y = torch.empty(x.shape[2], x.shape[0], x.shape[1])
            for channel in range(x.shape[2]):
                rows = columns[:, channel]
                pairs = zip(decay[channel], weight[channel], strict=True)
                y[channel] = torch.from_numpy(sum(signal.lfilter([w], [1.0, -q], rows) for q, w in pairs))
            return F.silu(y.permute(1, 2, 0) + module.omega * x)

    return {"scipy lfilter": Candidate(run, [])}


def fftconvolve(u: Tensor, kernel: Tensor) -> Found:
    """Forward only."""
    signal = load("scipy")
    if signal is None or u.device.type != "cpu":
        return {}
    rows, taps = u.detach().mT.numpy(), kernel.detach()[None].numpy()

    def run() -> Tensor:
        return torch.from_numpy(signal.fftconvolve(rows, taps, axes=-1)[..., : u.shape[1]]).mT

    return {"scipy fftconvolve": Candidate(run, [])}


def _s4_weights(layer: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Names in S4's published code for our parameters: of the layer, and of its kernel."""
    mechanism = layer.mechanism
    outside = {"D": mechanism.skip, "output_linear.0.weight": layer.out.weight, "output_linear.0.bias": layer.out.bias}
    inside = {"log_dt": mechanism.log_dt, "B": mechanism.B, "C": mechanism.C}
    return outside, {f"kernel.kernel.{name}": value for name, value in inside.items()}


def s4d(layer: Any, u: Tensor) -> Found:
    """Two copies of the authors' code, both with the Vandermonde matrix written out."""
    found: Found = {}
    for package in ("popgym", "espnet"):
        code = load(package)
        if code is None:
            continue
        mechanism = layer.mechanism
        peer = code.S4(mechanism.dim, mechanism.state, transposed=False, mode="diag", measure="diag-lin", disc="zoh")
        outside, inside = _s4_weights(layer)
        inside |= {"kernel.kernel.inv_A_real": mechanism.log_real, "kernel.kernel.A_imag": mechanism.imag}
        found[package] = copied(peer, [u], outside | inside, lambda u, peer=peer: peer(u)[0])  # type: ignore[misc]
    return found


def s4(layer: Any, u: Tensor) -> Found:
    """The authors' code in full, with the Cauchy matrix written out. Its C is made for one length beforehand.

    Without a compiled kernel, espnet's copy sums over one member of each conjugate pair and forgets the other. So it is
    given both, as if they were twice as many: then it computes what it should, at the cost of the authors' own.
    """
    code = load("espnet")
    if code is None:
        return {}
    mechanism, length = layer.mechanism, u.shape[1]
    peer = code.S4(mechanism.dim, 2 * mechanism.state, l_max=length, transposed=False, mode="nplr", real_tolerance=1e-6)
    Lambda, P, _, C, dt = mechanism.system()
    tilde = torch.view_as_real(tilde_from_c(Lambda, P, C, dt, length))
    outside, inside = _s4_weights(layer)
    mirror = tilde.new_tensor([1.0, -1.0])  # conjugation, of (real, imaginary)
    for name, pairs in {"B": mechanism.B, "C": tilde, "P": mechanism.P}.items():
        inside[f"kernel.kernel.{name}"] = torch.cat([pairs, pairs * mirror], dim=-2)
    inside["kernel.kernel.inv_w_real"] = mechanism.log_real.repeat(1, 2)
    inside["kernel.kernel.w_imag"] = torch.cat([mechanism.imag, -mechanism.imag], dim=-1)
    peer.kernel.kernel.L.fill_(length)  # tells it that its C is ready
    return {"espnet": copied(peer, [u], outside | inside, lambda u: peer(u)[0])}


# ---- codes and features --------------------------------------------------------------------------------------------


def quantizer(keys: Tensor, codebook: Tensor) -> Found:
    package = load("vector-quantize-pytorch")
    if package is None:
        return {}
    peer = package.VectorQuantize(dim=keys.shape[-1], codebook_size=codebook.shape[1]).to(keys.device).eval()
    peer._codebook.embed.copy_(codebook)

    def run() -> Tensor:
        with torch.no_grad():
            return peer(keys.flatten(0, 1))[1]

    return {"vector-quantize-pytorch": Candidate(run, [])}


def linear(causal: bool, q: Tensor, k: Tensor, v: Tensor) -> Found:
    """elu + 1; causal: in chunks of 64 (fla), and with every running sum written out (performer)."""
    found: Found = {}
    fla, performer = load("fla-core"), load("performer-pytorch")

    def chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fla.naive_chunk_linear_attn(elu_features(q), elu_features(k), v, scale=1.0, normalize=True)  # type: ignore[union-attr]

    if fla is not None and causal and q.shape[2] % 64 == 0:
        own = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]  # its layout: heads third
        origin = [t.transpose(1, 2) for t in (q, k, v)]
        found["fla-core"] = Candidate(lambda: chunked(*own).transpose(1, 2), own, origin)
    if performer is not None:
        attend = performer.causal_linear_attention_noncuda if causal else performer.linear_attention
        found["performer-pytorch"] = Candidate(lambda: attend(elu_features(q), elu_features(k), v), [q, k, v])
    return found


def favor(projection: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Found:
    performer = load("performer-pytorch")
    if performer is None:
        return {}
    peer = performer.FastAttention(q.shape[-1], len(projection)).to(q.device)
    peer.projection_matrix.copy_(projection)
    return {"performer-pytorch": Candidate(lambda: peer(q, k, v), [q, k, v])}
