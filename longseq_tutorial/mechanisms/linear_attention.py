"""Kernel linear attention: write the similarity of query and key as a product of features, then move the brackets.

Softmax attention weighs key j for query i with ``exp(q_i . k_j / sqrt(d))``. Any other positive similarity that is a
*product of features*, ``sim(q, k) = phi(q) . phi(k)``, lets the sum over the keys be done once for all queries::

    y_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps)         quadratic: a weight for every pair
        = phi(q_i) S / (phi(q_i).z + eps)    S = sum_j phi(k_j) v_j^T,  z = sum_j phi(k_j)          linear

Causal, S and z are sums over ``j <= i``: running sums, that is, a recurrent network with a matrix as its state.
Source: Katharopoulos et al., "Transformers are RNNs", ICML 2020 (equation, elu + 1, eps). FAVOR+: Choromanski et al.,
"Rethinking Attention with Performers", ICLR 2021. SIKF: Zubkov and Gavrilov 2022, as in their published code.

A *feature map* is any callable of one tensor, ``(..., d) -> (..., m)``, applied to queries and keys alike. One whose
features can overflow may also carry ``log_features(x)``, the logarithm of what it returns: the fast and the
recurrent form then take the largest logarithms out before the exponential. What they take out cancels: see
:func:`linear_attention`.

Letters: B batch, H heads, L length, d width of queries and keys, m features, d_v width of values, C chunk length.
Tensors may have any leading axes; in this house they are ``(B, H, L, d)``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .devices import at_once
from .fft import working_dtype

__all__ = [
    "FavorFeatures",
    "LinearAttention",
    "LinearState",
    "elu_features",
    "linear_attention",
    "linear_attention_quadratic",
    "linear_attention_recurrent",
    "linear_attention_step",
    "linear_attention_weights",
    "sikf_features",
]

FeatureMap = Callable[[Tensor], Tensor]

CHUNK = 128  # keys that are compared pair by pair in the causal fast form; longer ago they are in the state
BLOCK = 2**19  # numbers in one tensor of pairs on a CPU: 2 MB in float32, about what its cache holds


# ---- feature maps ----------------------------------------------------------------------------------------------


def elu_features(x: Tensor) -> Tensor:
    """``elu(x) + 1``: x + 1 above 0, exp(x) below. Positive, smooth, ``(..., d) -> (..., d)``, never below float32."""
    return F.elu(x.to(working_dtype(x))) + 1


def sikf_features(x: Tensor) -> Tensor:
    """SIKF, the shift-invariant kernel function: ``exp(x)``, element by element, ``(..., d) -> (..., d)``.

    A constant added to all entries of a query, or the same one to all keys, makes one factor; normalising cancels it.
    The similarity is ``sum_a exp(q_a + k_a)``, a sum of exponentials. It is not softmax's, the exponential of a sum.
    """
    return sikf_log_features(x).exp()


def sikf_log_features(x: Tensor) -> Tensor:
    """The logarithm of :func:`sikf_features`: x itself, in float32 or better."""
    return x.to(working_dtype(x))


sikf_features.log_features = sikf_log_features  # type: ignore[attr-defined]


class FavorFeatures(nn.Module):
    """FAVOR+, positive random features of softmax: the mean of ``phi(q).phi(k)`` is ``exp(q.k / sqrt(d))``.

    ``phi(x) = exp(w x' - |x'|^2 / 2) / sqrt(m)`` with ``x' = x / d**(1/4)`` and the m random rows w of ``projection``.
    The variance grows like ``exp(|q' + k'|^2)``: the estimate is good for short vectors and hopeless for long ones.

    Args:
        dim: d.
        features: m; None for ``d ln d``, the published default.
        orthogonal: draw rows in blocks of d that are perpendicular to one another (less variance), with the lengths of
            independent Gaussian rows. False: plain Gaussian rows.
        row_signs: turn each orthogonal row around or not, at random. A QR decomposition as libraries compute it
            returns signs that are no accident (its first entry is never positive), which biases the estimate by up to
            tens of percent; with random signs each row points in a uniformly random direction. False only to see that.
        generator: where the randomness comes from; None for torch's own.
    """

    projection: Tensor

    def __init__(
        self,
        dim: int,
        features: int | None = None,
        *,
        orthogonal: bool = True,
        row_signs: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        features = max(1, round(dim * math.log(max(dim, 1)))) if features is None else features
        if dim < 1 or features < 1:
            raise ValueError(f"FavorFeatures wanted dim >= 1 and features >= 1; got dim={dim}, features={features}.")
        self.dim, self.features, self.orthogonal, self.row_signs = dim, features, orthogonal, row_signs
        self.register_buffer("projection", torch.empty(features, dim))
        self.redraw(generator)

    @torch.no_grad()
    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw a new projection ``(m, d)`` in place: now and then in training, never between two calls to compare."""
        device = "cpu" if generator is None else generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, device=device, generator=generator)

        rows = normal(self.features, self.dim)
        if self.orthogonal:
            lengths = rows.norm(dim=1, keepdim=True)  # of Gaussian rows: near sqrt(d)
            blocks = -(-self.features // self.dim)
            rows = torch.linalg.qr(normal(blocks, self.dim, self.dim)).Q.flatten(0, 1)[: self.features]
            if self.row_signs:
                rows = rows * normal(self.features, 1).sign()
            rows = rows * lengths
        self.projection.copy_(rows)

    def log_features(self, x: Tensor) -> Tensor:
        """``(..., d) -> (..., m)``: the logarithm of the features, in float32 or better."""
        projected, half_square = self._project(x)
        return projected - (half_square + 0.5 * math.log(self.features))

    def forward(self, x: Tensor) -> Tensor:
        """``(..., d) -> (..., m)``, all positive."""
        return self.log_features(x).exp()

    def published_features(self, x: Tensor, *, query: bool, small: float = 1e-4) -> Tensor:
        """The features of the published codes, ``(exp(.. - largest) + small) / sqrt(m)``, for comparison with them.

        ``largest`` is the largest projection of a query, or of all keys of a head (so a future key moves the past,
        in the size of ``small``). ``small`` comes after it and does not cancel; :meth:`forward` needs neither.
        """
        projected, half_square = self._project(x)
        largest = projected.amax(-1 if query else (-2, -1), keepdim=True).detach()
        return (torch.exp(projected - half_square - largest) + small) / math.sqrt(self.features)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be (..., dim) = (..., {self.dim}); got {tuple(x.shape)}.")
        dtype = working_dtype(x)
        with torch.autocast(x.device.type, enabled=False):
            scaled = x.to(dtype) * self.dim**-0.25
            return scaled @ self.projection.to(dtype).T, scaled.square().sum(-1, keepdim=True) / 2

    def extra_repr(self) -> str:
        return f"{self.dim}, features={self.features}, orthogonal={self.orthogonal}, row_signs={self.row_signs}"


# ---- the slow form ---------------------------------------------------------------------------------------------


def linear_attention_weights(
    q: Tensor,
    k: Tensor,
    feature_map: FeatureMap,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The matrix of weights that linear attention implies and never builds: ``(..., L, L)``, in float32 or better.

    Row i holds ``phi(q_i).phi(k_j) / (sum_j phi(q_i).phi(k_j) + eps)``; a row that sees nothing is 0. Nothing is
    stabilised here: features beyond the range of floats overflow.
    """
    keep = _check(q, k, None, mask, causal, eps)
    phi_q = _features(feature_map, q, plain=True)
    phi_k = _features(feature_map, k if keep is None else k.masked_fill(~keep, 0), plain=True)
    phi_k = phi_k if keep is None else phi_k.masked_fill(~keep, 0)
    with torch.autocast(q.device.type, enabled=False):
        similarity = phi_q @ phi_k.transpose(-1, -2)  # (..., L, L)
        similarity = similarity.tril() if causal else similarity
        return _divide(similarity, similarity.sum(-1, keepdim=True) + eps)


def linear_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """The definition: a weight for every pair. The reference for :func:`linear_attention`, with its arguments."""
    keep = _check(q, k, v, mask, causal, eps)
    weights = linear_attention_weights(q, k, feature_map, mask=mask, causal=causal, eps=eps)
    with torch.autocast(q.device.type, enabled=False):
        values = v.to(weights.dtype) if keep is None else v.to(weights.dtype).masked_fill(~keep, 0)
        return (weights @ values).to(v.dtype)


# ---- the fast form ---------------------------------------------------------------------------------------------


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """Linear attention in time and memory that grow linearly with L.

    Without ``causal``: two matrix products, through S and z. With ``causal``: the pairs within chunks of 128, and from
    all earlier chunks their sums S and z; nothing of size ``(L, L)`` or ``(L, m, d_v)``.

    Where the map has ``log_features``, the largest of each feature over the keys, c, is taken out of the keys and given
    to the queries; the largest over the features of what results, o, is taken out of each query, and eps is multiplied
    by the same ``exp(-o)``. All of it cancels: the result is the plain formula's, without its overflow. Causal, c is a
    *running* largest, so that no future key can push the past below the range of floats.

    Args:
        q, k: ``(..., L, d)``, heads before the length: ``(B, H, L, d)``. Without ``causal`` q may have another length.
        v: ``(..., L, d_v)``.
        feature_map: ``(..., d) -> (..., m)``, for queries and keys: :func:`elu_features`, :func:`sikf_features`,
            a :class:`FavorFeatures`, or any callable of one tensor that treats each token alone.
        mask: bool ``(B, L)``, True where the key is real. The features of a padded key are 0, so it weighs nothing.
        causal: query i sees keys 0 .. i only.
        eps: added to the denominator.

    Returns:
        ``(..., L, d_v)`` in the dtype of v. Sums run in float32 or better, also under autocast. A query that sees no
        key reads 0.

    Raises:
        TypeError: a feature map that cannot be called.
        ValueError: shapes that do not fit, a mask that is not bool, a negative eps, a map that loses positions.
    """
    keep = _check(q, k, v, mask, causal, eps)
    logs = _log_features(feature_map) is not None
    # One segment of chunks after the other, small enough that its features and pairs stay in the processor's cache.
    block = at_once(q, BLOCK) // max(1, q[..., 0, 0].numel())
    size = CHUNK * max(1, block // CHUNK**2)
    keeps = [None] * -(-k.shape[-2] // size) if keep is None else keep.split(size, dim=-2)
    queries, keys = q.split(size, dim=-2), list(zip(k.split(size, dim=-2), v.split(size, dim=-2), keeps, strict=True))
    y, sums = [], None
    if causal:
        for own_q, (own_k, own_v, own_keep) in zip(queries, keys, strict=True):
            phi_q, phi_k, values = _prepare(own_q, own_k, own_v, own_keep, feature_map)
            with torch.autocast(q.device.type, enabled=False):
                own, sums = _causal(phi_q, phi_k, _with_ones(values), logs, eps, sums, CHUNK)
            y.append(own)
    else:
        for own_k, own_v, own_keep in keys:
            _, phi_k, values = _prepare(None, own_k, own_v, own_keep, feature_map)
            with torch.autocast(q.device.type, enabled=False):
                sums = _add(phi_k, _with_ones(values), logs, sums)
        assert sums is not None
        for own_q in queries:
            phi_q = _features(feature_map, own_q)
            with torch.autocast(q.device.type, enabled=False):
                y.append(_read(phi_q, logs, eps, sums))
    return torch.cat(y, dim=-2).to(v.dtype)


Sums = tuple[Tensor, Tensor]  # S and z side by side (..., m, d_v + 1), and their offset (..., 1, m), as in LinearState


def _with_ones(values: Tensor) -> Tensor:
    """Values with a column of ones, which will sum up to z: ``(..., L, d_v + 1)``."""
    return F.pad(values, (0, 1), value=1.0)


def _nothing(phi_k: Tensor, values: Tensor, logs: bool) -> Sums:
    """The sums before the first key."""
    state = torch.zeros_like(phi_k[..., 0, :, None] * values[..., :1, :])
    return state, torch.full_like(phi_k[..., :1, :], _lowest(phi_k.dtype) if logs else 0.0).detach()


def _add(phi_k: Tensor, values: Tensor, logs: bool, sums: Sums | None) -> Sums:
    """What a segment of keys adds to the sums, all on one scale if the features come as logarithms."""
    state, offset = sums or _nothing(phi_k, values, logs)
    if logs:
        largest = torch.maximum(offset, _largest(phi_k, -2))
        state = state * torch.exp(offset - largest).transpose(-1, -2)
        phi_k, offset = torch.exp(phi_k - largest), largest
    return state + phi_k.transpose(-1, -2) @ values, offset


def _read(phi_q: Tensor, logs: bool, eps: float, sums: Sums) -> Tensor:
    """Every query reads from the same sums."""
    state, offset = sums
    small: Tensor | float = eps
    if logs:
        phi_q, small = _queries(phi_q + offset, eps)
    dtype = working_dtype(phi_q, state)
    return _normalise(phi_q.to(dtype) @ state.to(dtype), small)


def _causal(
    phi_q: Tensor, phi_k: Tensor, values: Tensor, logs: bool, eps: float, sums: Sums | None, chunk: int
) -> tuple[Tensor, Sums]:
    """A segment of N chunks at once, after the sums of all segments before it; y and the sums for the next."""
    state, offset = sums or _nothing(phi_k, values, logs)
    length, chunk = phi_q.shape[-2], min(chunk, phi_q.shape[-2])
    q, k, v = _split(phi_q, chunk), _split(phi_k, chunk, -torch.inf if logs else 0.0), _split(values, chunk)
    small: Tensor | float = eps
    if logs:
        earlier = offset.unsqueeze(-3)  # (..., 1, 1, m)
        largest = torch.maximum(torch.cummax(_largest(k, -2), dim=-3).values, earlier)  # (..., N, 1, m): so far
        before = torch.cat([earlier, largest[..., :-1, :, :]], dim=-3)
        # A chunk's early queries read what is scaled by the largest of the whole chunk. Should a feature rise within
        # one chunk by more than half the range of floats, they would read zeros: then smaller chunks.
        lowest, seen = _lowest(k.dtype), k.detach()
        floor = torch.maximum(before, seen[..., :1, :])  # the largest that the first query of each chunk sees
        if bool((floor <= lowest).any()):  # nothing, where all is padding so far: then the first key that is none
            real = (seen > lowest).any(-1, keepdim=True).int()
            floor = torch.where(floor > lowest, floor, seen.take_along_dim(real.argmax(-2, keepdim=True), dim=-2))
        rise = (largest - floor.clamp(min=lowest)).max()
        if chunk > 1 and bool(rise > -math.log(torch.finfo(k.dtype).tiny) / 2):
            return _causal(phi_q, phi_k, values, logs, eps, sums, max(1, chunk // 8))
        k = torch.exp(k - largest)
        q, small = _queries(q + largest, eps)
        shrink = torch.exp(before - largest).transpose(-1, -2).unbind(-3)  # N times (..., m, 1)
        offset = largest[..., -1, :, :]
    states = []
    for n, own in enumerate((k.transpose(-1, -2) @ v).unbind(-3)):  # (..., m, d_v + 1): S and z of each chunk
        state = state * shrink[n] if logs else state
        states.append(state)
        state = state + own
    # The two large results are changed in place: fetching fresh memory from the system takes longer than filling it.
    pairs = (q @ k.transpose(-1, -2)).tril_()  # (..., N, C, C)
    y = _normalise((pairs @ v).add_(q @ torch.stack(states, dim=-3)), small)  # (..., N, C, d_v)
    return y.flatten(-3, -2)[..., :length, :], (state, offset)


# ---- the recurrent form ----------------------------------------------------------------------------------------


class LinearState(NamedTuple):
    """What causal linear attention remembers, whatever the length: ``S (..., m, d_v)``, ``z (..., m)``, and the
    logarithm ``offset (..., m)`` of a factor taken out of both (0 unless the map has ``log_features``)."""

    S: Tensor
    z: Tensor
    offset: Tensor


def linear_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: FeatureMap,
    *,
    mask: Tensor | None = None,
    eps: float = 1e-6,
    state: LinearState | None = None,
) -> tuple[Tensor, LinearState]:
    """Causal linear attention as a recurrent network, one position after the other.

    Arguments as for :func:`linear_attention`; ``state`` is what an earlier part of the sequence left behind. Returns
    ``y (..., L, d_v)`` and the state after the last position.
    """
    keep, logs = _check(q, k, v, mask, True, eps), _log_features(feature_map) is not None
    phi_q, phi_k, values = _prepare(q, k, v, keep, feature_map)
    steps = zip(*(x.split(1, dim=-2) for x in (phi_q, phi_k, _with_ones(values))), strict=True)
    y, sums = [], None if state is None else _to_sums(state)
    with torch.autocast(q.device.type, enabled=False):
        for phi_q_t, phi_k_t, v_t in steps:
            sums = _add(phi_k_t, v_t, logs, sums)  # write,
            y.append(_read(phi_q_t, logs, eps, sums))  # then read
    assert sums is not None
    return torch.cat(y, dim=-2).to(v.dtype), _to_state(sums)


def linear_attention_step(
    q_t: Tensor,
    k_t: Tensor,
    v_t: Tensor,
    feature_map: FeatureMap,
    state: LinearState | None = None,
    *,
    eps: float = 1e-6,
) -> tuple[Tensor, LinearState]:
    """One time step: ``q_t, k_t (..., d)``, ``v_t (..., d_v)`` to ``y_t (..., d_v)`` and the state to go on with."""
    q, k, v = q_t.unsqueeze(-2), k_t.unsqueeze(-2), v_t.unsqueeze(-2)
    y, state = linear_attention_recurrent(q, k, v, feature_map, eps=eps, state=state)
    return y.squeeze(-2), state


def _to_sums(state: LinearState) -> Sums:
    return torch.cat([state.S, state.z.unsqueeze(-1)], dim=-1), state.offset.unsqueeze(-2)


def _to_state(sums: Sums) -> LinearState:
    return LinearState(sums[0][..., :-1], sums[0][..., -1], sums[1].squeeze(-2))


class LinearAttention(nn.Module):
    """Linear attention as a module: it holds the feature map (and its projection), and can stream.

    Args:
        heads, dim, v_dim: H, d and d_v of the queries, keys and values it will meet; the state's size.
        feature_map, causal, eps: see :func:`linear_attention`.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        v_dim: int,
        feature_map: FeatureMap = elu_features,
        *,
        causal: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if min(heads, dim, v_dim) < 1:
            raise ValueError(f"LinearAttention wanted positive sizes; got heads={heads}, dim={dim}, v_dim={v_dim}.")
        self.heads, self.dim, self.v_dim, self.causal, self.eps = heads, dim, v_dim, causal, eps
        self.feature_map = feature_map
        # Windows for `record`: the weights never exist, but linear_attention_weights gives them from these two.
        self.queries, self.keys = nn.Identity(), nn.Identity()
        self.register_buffer("_place", torch.empty(0), persistent=False)  # knows the device and the dtype

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q, k ``(B, H, L, d)``, v ``(B, H, L, d_v)``, mask bool ``(B, L)`` with True = real; ``(B, H, L, d_v)``."""
        q, k = self.queries(q), self.keys(k)
        return linear_attention(q, k, v, self.feature_map, mask=mask, causal=self.causal, eps=self.eps)

    def initial_state(self, batch: int) -> LinearState:
        """The state before the first step, ``S (batch, H, m, d_v)`` and ``z (batch, H, m)``: it never grows."""
        if not self.causal:
            raise ValueError("Linear attention that looks ahead cannot stream. Build it with causal=True.")
        place = self._place
        assert isinstance(place, Tensor)
        with torch.no_grad():
            features = _features(self.feature_map, place.new_zeros(batch, self.heads, 1, self.dim))
            values = features.new_zeros(batch, self.heads, 1, self.v_dim + 1)
            return _to_state(_nothing(features, values, _log_features(self.feature_map) is not None))

    def step(self, q_t: Tensor, k_t: Tensor, v_t: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        """One time step: q_t, k_t ``(B, H, d)``, v_t ``(B, H, d_v)``; returns y_t ``(B, H, d_v)`` and the state."""
        if not self.causal:
            raise ValueError("Linear attention that looks ahead cannot stream. Build it with causal=True.")
        return linear_attention_step(q_t, k_t, v_t, self.feature_map, state, eps=self.eps)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim={self.dim}, v_dim={self.v_dim}, causal={self.causal}"


# ---- shared ----------------------------------------------------------------------------------------------------


def _lowest(dtype: torch.dtype) -> float:
    """Stands for the logarithm of nothing: so low that exp gives 0, and finite, so that differences are no NaN."""
    return torch.finfo(dtype).min / 2


def _largest(logs: Tensor, axis: int) -> Tensor:
    return logs.detach().amax(axis, keepdim=True).clamp(min=_lowest(logs.dtype))


def _queries(logs: Tensor, eps: float) -> tuple[Tensor, Tensor | float]:
    """``exp(logs)`` divided by its largest feature, and eps divided by the same."""
    largest = _largest(logs, -1)  # (..., 1)
    return torch.exp(logs - largest), eps * torch.exp(-largest) if eps else 0.0


def _normalise(sums: Tensor, small: Tensor | float) -> Tensor:
    """The last column is the denominator of the others."""
    return _divide(sums[..., :-1], sums[..., -1:] + small)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 / 0 is 0: who sees nothing reads nothing."""
    return numerator / denominator.masked_fill(denominator == 0, 1)


def _split(x: Tensor, chunk: int, fill: float = 0.0) -> Tensor:
    """Cut the length into chunks: ``(..., L, d) -> (..., N, C, d)``; ``fill`` completes the last."""
    missing = -x.shape[-2] % chunk
    return (F.pad(x, (0, 0, 0, missing), value=fill) if missing else x).unflatten(-2, (-1, chunk))


def _log_features(feature_map: FeatureMap) -> FeatureMap | None:
    return getattr(feature_map, "log_features", None)


def _features(feature_map: FeatureMap, x: Tensor, *, plain: bool = False) -> Tensor:
    """Features ``(..., L, m)`` in float32 or better; their logarithms, if the map has them and not ``plain``."""
    if not callable(feature_map):
        raise TypeError(f"feature_map must be callable, (..., d) -> (..., m); got {type(feature_map).__name__}.")
    features = (feature_map if plain else _log_features(feature_map) or feature_map)(x)
    if features.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"a feature map must keep every axis but the last, {tuple(x.shape)} -> {(*x.shape[:-1], 'm')}; "
            f"got {tuple(features.shape)}."
        )
    return features.to(working_dtype(x, features))


def _prepare(
    q: Tensor | None, k: Tensor, v: Tensor, keep: Tensor | None, feature_map: FeatureMap
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of q and k (or their logarithms) and values, in one dtype, without any trace of the padding."""
    if keep is not None:
        k, v = k.masked_fill(~keep, 0), v.masked_fill(~keep, 0)
    phi_k = _features(feature_map, k)
    phi_q = phi_k if q is None else _features(feature_map, q)
    if keep is not None:
        phi_k = phi_k.masked_fill(~keep, 0 if _log_features(feature_map) is None else -torch.inf)
    dtype = working_dtype(phi_q, phi_k, v)
    return phi_q.to(dtype), phi_k.to(dtype), v.to(dtype)


def _check(q: Tensor, k: Tensor, v: Tensor | None, mask: Tensor | None, causal: bool, eps: float) -> Tensor | None:
    """Refuse what does not fit; return the mask as ``(..., L, 1)``, ready to be used on keys and values."""
    got = [tuple(x.shape) for x in (q, k, *(() if v is None else (v,)))]
    if q.dim() < 2 or k.dim() < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1] or 0 in q.shape:
        raise ValueError(f"q and k must be (..., length >= 1, dim), alike but for the length; got {got}.")
    if k.shape[-2] == 0 or (causal and q.shape[-2] != k.shape[-2]):
        raise ValueError(f"q and k must be of one length >= 1 when causal, k never empty; got {got}.")
    if v is not None and v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must be (..., length, v_dim) with the axes of k; got q, k, v {got}. Heads come first.")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or positive; got {eps}.")
    if mask is None:
        return None
    wanted = (*k.shape[: k.dim() - 2][:1], k.shape[-2])
    if mask.dtype != torch.bool or mask.shape != wanted:
        raise ValueError(
            f"mask must be bool (batch, length) = {wanted}, True where the token is real; "
            f"got {mask.dtype} {tuple(mask.shape)}."
        )
    return mask.view(*wanted[:-1], *(1,) * (k.dim() - 2 - len(wanted[:-1])), wanted[-1], 1)
