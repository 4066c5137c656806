"""Sparse modular activation: attention that wakes up for some tokens only, as in SeqBoat.

A *latent configurator* reads two numbers for each token and decides: skip, or activate. Only the active tokens are
packed together and attend, each to the ``window`` nearest *active* tokens on either side; the result goes back to
where they came from, scaled by the configurator's confidence. With tau a learned temperature::

    p = softmax(logits / tau)         active = p[1] > p[0]         confidence = max(p)
    packed = compress(h, active)
    [z, r, v] = silu(packed W + b)    q = z * kappa[0] + mu[0]     k = z * kappa[1] + mu[1]
    y = confidence * extract((memory_attention(q, k, v) * r) U + c)            0 where inactive

The decision itself has no gradient; the confidence has, and through it the configurator learns (top-1 routing).
Source: Ren et al., "Sparse Modular Activation for Efficient Sequence Modeling", NeurIPS 2023, and its published code.

Where we differ from that code, on purpose: hidden keys get no weight at all (there the Laplace function gives them
0.006), and we always compress (there one fully active sample in the batch makes all others attend in original
positions). Its table for compressed distances holds ``6 w - 1`` numbers, of which ``[3w-1 : 5w]`` are ever read; so
does ours, that sizes and weights may be compared.

Letters: B batch, L length, D channels, M active tokens of the fullest sample, z and v widths, w window.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .devices import at_once, uncompiled
from .fft import working_dtype

__all__ = [
    "LatentConfigurator",
    "SparseActivation",
    "compress",
    "compress_slow",
    "dense_weights",
    "extract",
    "extract_slow",
    "memory_attention",
    "memory_attention_slow",
    "rope",
]

BIASES = ("global", "local", "rotary")
TILE = 2**20  # scores computed at a time on a CPU

State = dict[str, Tensor]


# ---- the decision ------------------------------------------------------------------------------------------------


class LatentConfigurator(nn.Module):
    """Turns two logits for each token, (skip, activate), into a decision and a confidence.

    Args:
        dim: D of the layer; the temperature tau starts at ``scale * sqrt(dim)``.
        scale: see dim. A higher temperature makes softer confidences, nearer to 1/2.
        act_bias: added to the skip logit: positive numbers make activation rarer.

    The only parameter is ``log_temperature (1,)``. Nothing is random, and nothing asks for a certain rate.
    """

    def __init__(self, dim: int, scale: float = 1.0, act_bias: float = 0.0) -> None:
        super().__init__()
        if dim < 1 or scale <= 0:
            raise ValueError(f"LatentConfigurator wanted dim >= 1 and scale > 0; got dim={dim}, scale={scale}.")
        self.act_bias = act_bias
        self.log_temperature = nn.Parameter(torch.tensor([math.log(scale * math.sqrt(dim))]))

    def forward(self, logits: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``logits (B, L, 2)``, mask ``(B, L)`` bool -> active ``(B, L)`` bool, confidence ``(B, L)`` in [1/2, 1].

        A tie means inactive, and so does padding. The confidence is that of the choice made, active or not, in
        float32 or better.
        """
        if logits.dim() != 3 or logits.shape[-1] != 2:
            raise ValueError(f"logits must be (batch, length, 2), skip and activate; got {tuple(logits.shape)}.")
        _check_flags("mask", mask, logits)
        dtype = working_dtype(logits)
        shifted = logits.to(dtype) + F.pad(logits.new_full((1,), self.act_bias, dtype=dtype), (0, 1))
        p = torch.softmax(shifted / self.log_temperature.to(dtype).exp(), dim=-1)  # (B, L, 2)
        active = p[..., 1] > p[..., 0]
        return (active if mask is None else active & mask), p.max(-1).values


# ---- compress and extract ------------------------------------------------------------------------------------------


def compress_slow(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of :func:`compress`: walk along each sample, and append what is active."""
    _check_sequence(x, active)
    index = torch.zeros(active.shape, dtype=torch.long, device=x.device)
    rows = []
    for b in range(x.shape[0]):
        taken = []
        for t in range(x.shape[1]):
            if active[b, t]:
                taken.append(x[b, t])
                index[b, t] = len(taken)
        rows.append(taken)
    longest = max(1, *(len(taken) for taken in rows))
    filler = x.new_zeros(x.shape[2])
    return torch.stack([torch.stack(taken + [filler] * (longest - len(taken))) for taken in rows]), index


def compress(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Pack the active tokens of every sample together, in order.

    Args:
        x: ``(B, L, D)``.
        active: bool ``(B, L)``.

    Returns:
        packed ``(B, M, D)``, where M is the largest number of active tokens in a sample, at least 1; samples with
        fewer end in rows of zeros. And index ``(B, L)``: the rank of each active token, from 1; 0 for the others.
    """
    _check_sequence(x, active)
    index = active.cumsum(1) * active  # (B, L)
    longest = max(1, int(index.max()))
    source, slot = _addresses(index, longest)
    return _moved(x, source, slot, longest), index


def extract_slow(y: Tensor, index: Tensor) -> Tensor:
    """The definition of :func:`extract`."""
    _check_index(y, index)
    nothing = y.new_zeros(y.shape[2])
    return torch.stack([torch.stack([y[b, i - 1] if i else nothing for i in row]) for b, row in enumerate(index)])


def extract(y: Tensor, index: Tensor) -> Tensor:
    """Put packed rows back where they came from: ``y (B, M, d)`` and index ``(B, L)`` -> ``(B, L, d)``, 0 elsewhere."""
    _check_index(y, index)
    source, slot = _addresses(index, y.shape[1])
    return _moved(y, slot, source, index.shape[1])


def _addresses(index: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Where the active tokens stand in ``x.flatten(0, 1)``, and where in ``packed.flatten(0, 1)``."""
    sample, time = index.nonzero(as_tuple=True)
    return sample * index.shape[1] + time, sample * longest + index[sample, time] - 1


def _moved(x: Tensor, source: Tensor, target: Tensor, length: int) -> Tensor:
    """Rows of ``x.flatten(0, 1)`` at other places of ``(B * length, D)``, zeros elsewhere: ``(B, length, D)``."""
    rows = x.flatten(0, 1).index_select(0, source)
    return x.new_zeros(x.shape[0] * length, x.shape[2]).index_copy(0, target, rows).unflatten(0, (-1, length))


# ---- working memory: attention over the packed tokens ----------------------------------------------------------------


def memory_attention_slow(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    *,
    function: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
    on_weights: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The definition of :func:`memory_attention`: one query after the other. Here ``on_weights`` sees ``(B, M, M)``."""
    _check_attention(q, k, v, window, bias, positions, valid)
    batch, length = q.shape[:2]
    weights = []
    for b in range(batch):
        place = range(length) if positions is None else positions[b].tolist()
        for i in range(length):
            row = q.new_zeros(length)
            first = 0 if window is None else max(0, i - window)
            last = i if causal else length - 1 if window is None else min(length - 1, i + window)
            seen = [j for j in range(first, last + 1) if valid is None or valid[b, j]]
            if seen:
                score = k[b, seen] @ q[b, i]  # (keys seen,)
                offset: Tensor | float = 0.0
                if bias is not None:
                    reach = bias.shape[0] // 2
                    offset = bias[[max(-reach, min(reach, place[j] - place[i])) + reach for j in seen]]
                if function is None:
                    found = torch.softmax(score / math.sqrt(q.shape[-1]) + offset, dim=0)
                else:
                    count = len(seen) if window is None else window if causal else 2 * window
                    found = function(score / count + offset)
                row = row.index_copy(0, torch.tensor(seen, device=q.device), found)
            weights.append(row)
    matrix = torch.stack(weights).view(batch, length, length)
    return (matrix if on_weights is None else on_weights(matrix)) @ v


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    *,
    function: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    valid: Tensor | None = None,
    causal: bool = False,
    on_weights: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention over packed tokens: token i sees token j if ``|i - j| <= window``, counted among the *packed* ones.

    Args:
        q, k: ``(B, M, z)``; v: ``(B, M, v)``.
        window: w. A query sees ``2 w + 1`` keys with its own, or ``w + 1`` when causal. None: all of them.
        function: None for softmax of ``q k / sqrt(z) + bias``. Otherwise an element-wise function, such as Laplace,
            of ``q k / l + bias``, with l = 2 w (causal: w), or the number of keys the query sees if window is None.
        bias: ``(2 P - 1,)``, a number for each distance ``j - i`` from -(P-1) to P-1; farther ones share the ends.
        positions: long ``(B, M)``, where the tokens stood originally: the bias then counts *original* distances.
            None: it counts packed ones (ranks).
        valid: bool ``(B, M)``, False for rows that only fill up. They are seen by nobody.
        causal: look back only.
        on_weights: applied to the weights before they meet the values, some blocks ``(B, N, C, K)`` at a time, or
            without a window some queries ``(B, C, M)``. :func:`dense_weights` lays them out as a matrix.

    Returns:
        ``(B, M, v)`` in the dtype of v; zeros for a query that sees nothing. Scores run in float32 or better.

    With a window the cost is ``B M w`` in time and memory, whatever the bias: no M x M matrix is ever built. Without
    one time is quadratic, memory still linear: queries go in tiles, whose scores are computed anew for the gradient
    (so ``on_weights`` then sees them twice).
    """
    _check_attention(q, k, v, window, bias, positions, valid)
    length = q.shape[1]
    ranks = torch.arange(length, device=q.device)
    if valid is None:
        valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)

    if window is None:
        rows = max(1, at_once(q, TILE) // (q.shape[0] * length))

        def tile(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, start: int) -> Tensor:
            apart = ranks - ranks[start : start + rows, None]  # (C, M): j - i
            visible = valid.unsqueeze(1) & (apart <= 0) if causal else valid.unsqueeze(1)  # (B, C or 1, M)
            if positions is not None:
                apart = positions.unsqueeze(1) - positions[:, start : start + rows, None]  # (B, C, M)
            queries = q[:, start : start + rows]
            return _read(queries, k, v, function, None, bias, apart, visible, on_weights)

        if rows >= length:
            return tile(q, k, v, bias, 0)
        tiles = [checkpoint(tile, q, k, v, bias, start, use_reentrant=False) for start in range(0, length, rows)]
        return torch.cat(tiles, dim=1)

    block = min(window, length)
    queries, keys, values = _blocks(q, block), _around(k, block, causal), _around(v, block, causal)
    count, view = keys.shape[1:3]  # N, K
    # The view of block n begins one block before it (if there are several): key m and query c are m - before - c apart.
    before = block if count > 1 else 0
    steps = torch.arange(view, device=q.device) - before - ranks[:block, None]  # (C, K)
    near = (steps <= 0) & (steps >= -window) if causal else steps.abs() <= window
    parts = [queries, keys, values, _around(valid.unsqueeze(-1), block, causal).transpose(2, 3)]  # ..., (B, N, 1, K)
    if positions is not None:
        place = positions.int().unsqueeze(-1)
        parts += [_around(place, block, causal).transpose(2, 3), _blocks(place, block)]  # (B, N, 1, K), (B, N, C, 1)

    def group(q: Tensor, k: Tensor, v: Tensor, real: Tensor, *place: Tensor) -> Tensor:
        apart = place[0] - place[1] if place else steps
        return _read(q, k, v, function, window if causal else 2 * window, bias, apart, near & real, on_weights)

    # A group of blocks at a time: small tensors are reused while warm, large ones come cold from the system.
    many = max(1, at_once(q, TILE) // (q.shape[0] * block * view))
    y = [group(*some) for some in zip(*(part.split(many, dim=1) for part in parts), strict=True)]
    return torch.cat(y, dim=1).flatten(1, 2)[:, :length]


def dense_weights(pieces: Tensor | Sequence[Tensor], length: int) -> Tensor:
    """Lay out what ``on_weights`` saw in one call of :func:`memory_attention` as a matrix ``(B, M, M)``.

    For looking at: row = query, column = key, both ranks among the active tokens. ``length`` is M; ``pieces`` is all
    that it saw (``tape.all("weights")`` of a recording), or the one tensor where there was only one.
    """
    blocks = pieces if isinstance(pieces, Tensor) else torch.cat(list(pieces), dim=1)
    if blocks.dim() == 3:  # no window: complete rows already
        return blocks
    count, block, view = blocks.shape[1:]
    starts = block * torch.arange(count, device=blocks.device) - (block if count > 1 else 0)
    key = starts[:, None] + torch.arange(view, device=blocks.device)  # (N, K)
    key = key.clamp(-1, length) + 1  # columns 0 and length + 1 collect what lies outside
    wide = blocks.new_zeros(*blocks.shape[:3], length + 2)
    wide.scatter_add_(3, key[None, :, None].expand(blocks.shape), blocks)
    return wide.flatten(1, 2)[:, :length, 1:-1]


def rope(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: turn pair (2a, 2a + 1) of ``x (B, M, z)`` by the angle ``position * 10000**(-2 a / z)``.

    Positions are ``(B, M)``. The product of a query and a key so turned depends on their distance alone.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rope turns pairs, so it wanted an even width; got {x.shape[-1]}.")
    dtype = working_dtype(x)
    rate = 10000.0 ** (-torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) / x.shape[-1])  # (z/2,)
    angle = positions.unsqueeze(-1).to(dtype) * rate  # (B, M, z/2)
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    function: Callable[[Tensor], Tensor] | None,
    divisor: int | None,
    bias: Tensor | None,
    apart: Tensor,
    visible: Tensor,
    on_weights: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Queries ``(..., C, z)`` read keys ``(..., K, z)`` where visible; ``apart`` (key minus query) reads the bias."""
    if function is None:
        scale: float | Tensor = math.sqrt(q.shape[-1])
    else:
        scale = visible.sum(-1, keepdim=True).clamp(min=1) if divisor is None else divisor
    scores = (q / scale) @ k.transpose(-1, -2)  # (..., C, K)
    wide = scores.to(working_dtype(scores))
    if bias is not None:
        reach = bias.shape[0] // 2
        place = (apart + reach).clamp_(0, 2 * reach)
        wide = wide + bias.index_select(0, place.flatten()).view(place.shape)  # faster than bias[place], also backward
    if function is None:
        wide = torch.softmax(wide.masked_fill(~visible, torch.finfo(wide.dtype).min), dim=-1)
    else:
        wide = function(wide)
    weights = wide.masked_fill(~visible, 0.0).to(v.dtype)  # after the function: a hidden key has exactly no weight
    return (weights if on_weights is None else on_weights(weights)) @ v


def _blocks(x: Tensor, block: int) -> Tensor:
    """``(B, M, d) -> (B, N, C, d)``, zeros (False) at the end to fill up."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % block)).unflatten(1, (-1, block))


def _around(x: Tensor, block: int, causal: bool) -> Tensor:
    """Each block with its neighbours: ``(B, M, d) -> (B, N, 3 C, d)``; causal 2 C; a single block alone."""
    blocks = _blocks(x, block)
    if blocks.shape[1] == 1:
        return blocks
    wide = F.pad(blocks, (0, 0, 0, 0, 1, 1))
    views = [wide[:, :-2], blocks] if causal else [wide[:, :-2], blocks, wide[:, 2:]]
    return torch.cat(views, dim=2)


# ---- the unit ------------------------------------------------------------------------------------------------------


class SparseActivation(nn.Module):
    """The attention unit of SeqBoat behind its switch; the layer around it adds the EMA, the sum and the SiLU.

    Args:
        dim, z_dim, v_dim: D, width of queries and keys, width of values.
        window: w, how many *active* tokens to each side are remembered; None for all.
        function: None for softmax, or an element-wise function: see :func:`memory_attention`.
        bias: "global" (a number per original distance), "local" (per distance among the active tokens; needs a
            window, and reads the 2 w + 1 numbers in the middle of its 6 w - 1), or "rotary" (no numbers: queries and
            keys are turned by their original positions).
        max_positions: P of the global bias; farther distances share the values at its ends.
        causal: look back only.
        dropout, attention_dropout, hidden_dropout: on what comes out of h_proj, on the weights, on the values.
        temperature_scale, act_bias: see :class:`LatentConfigurator`.
        always_active: no configurator and no confidence; every token attends.
    """

    def __init__(
        self,
        dim: int,
        z_dim: int,
        v_dim: int,
        *,
        window: int | None,
        function: Callable[[Tensor], Tensor] | None = None,
        bias: str = "global",
        max_positions: int = 1024,
        causal: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        temperature_scale: float = 1.0,
        act_bias: float = 0.0,
        always_active: bool = False,
    ) -> None:
        super().__init__()
        if min(dim, z_dim, v_dim, max_positions) < 1 or (window is not None and window < 1):
            raise ValueError(
                "SparseActivation wanted widths and max_positions >= 1, and window >= 1 or None; got "
                f"dim={dim}, z_dim={z_dim}, v_dim={v_dim}, max_positions={max_positions}, window={window}."
            )
        if bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}; got {bias!r}.")
        if bias == "local" and window is None:
            raise ValueError("A local bias holds a number per place in the window, so it needs one; got window=None.")
        if bias == "rotary" and z_dim % 2:
            raise ValueError(f"A rotary bias turns pairs, so it wanted an even z_dim; got {z_dim}.")
        self.dim, self.z_dim, self.v_dim = dim, z_dim, v_dim
        self.window, self.function, self.bias, self.causal = window, function, bias, causal
        self.router = None if always_active else LatentConfigurator(dim, temperature_scale, act_bias)
        self.mx_proj = nn.Linear(dim, z_dim + v_dim + v_dim)  # shared z, reset gate, values
        self.h_proj = nn.Linear(v_dim, dim)
        self.kappa = nn.Parameter(torch.empty(2, z_dim))  # row 0 makes the query from z, row 1 the key
        self.mu = nn.Parameter(torch.zeros(2, z_dim))
        numbers = {"global": 2 * max_positions - 1, "local": 6 * (window or 0) - 1, "rotary": 0}[bias]
        self.table = nn.Parameter(torch.empty(numbers)) if numbers else None
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        # Windows for `record`: tensors pass through them unchanged.
        self.active_seen, self.confidence_seen, self.weights = nn.Identity(), nn.Identity(), nn.Identity()
        for p in (self.mx_proj.weight, self.h_proj.weight, self.kappa, self.table):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.mx_proj.bias)
        nn.init.zeros_(self.h_proj.bias)

    def forward(self, h: Tensor, logits: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """``h (B, L, D)``, ``logits (B, L, 2)``, mask ``(B, L)`` bool -> ``(B, L, D)``, zeros where inactive.

        With ``always_active`` there are no logits, and padding gets an output too, though nobody attends to it.
        """
        if h.dim() != 3 or h.shape[1] == 0 or h.shape[2] != self.dim:
            raise ValueError(f"h must be (batch, length >= 1, dim) = (*, *, {self.dim}); got {tuple(h.shape)}.")
        _check_flags("mask", mask, h)
        self._check_logits(h, logits)
        if self.router is None or logits is None:
            time = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
            return self._attend(h, time, mask)
        active, confidence = self.router(logits, mask)
        self.active_seen(active.to(confidence.dtype))
        confidence = self.confidence_seen(confidence)
        # How many are active differs from batch to batch: torch.compile would make new code for each number.
        y = uncompiled(self._attend_active)(h, active)
        return (confidence.unsqueeze(-1) * y).to(h.dtype)

    def initial_state(self, batch: int) -> State:
        """An empty memory of the last w + 1 active tokens of each sample: keys, values, original positions, how many.

        Its size never changes (unless window is None: then everything has to be remembered).
        """
        if not self.causal:
            raise ValueError("Attention that looks ahead cannot stream. Build it with causal=True.")
        slots = 1 if self.window is None else self.window + 1
        counts = torch.zeros(batch, dtype=torch.long, device=self.mu.device)
        return {
            "k": self.mu.new_zeros(batch, slots, self.z_dim),
            "v": self.mu.new_zeros(batch, slots, self.v_dim),
            "position": counts[:, None].expand(-1, slots),  # original positions of the keys; the newest comes last
            "filled": counts,  # how many slots hold a token
            "time": counts,
        }

    def step(self, h_t: Tensor, logits_t: Tensor | None, state: State) -> tuple[Tensor, State]:
        """One time step, ``h_t (B, D)`` and ``logits_t (B, 2)`` -> ``y_t (B, D)`` as in the parallel form, new state.

        Only samples whose token is active do any work, and only they change their memory: the oldest token falls out.
        """
        if h_t.dim() != 2 or h_t.shape[1] != self.dim:
            raise ValueError(f"h_t must be (batch, dim) = (*, {self.dim}), one time step; got {tuple(h_t.shape)}.")
        self._check_logits(h_t, logits_t)
        time = state["time"]
        active = torch.ones_like(time, dtype=torch.bool)
        confidence = torch.ones_like(h_t[:, 0])
        if self.router is not None and logits_t is not None:
            active, confidence = (x.squeeze(1) for x in self.router(logits_t.unsqueeze(1)))
            self.active_seen(active.to(confidence.dtype))
            confidence = self.confidence_seen(confidence)
        awake = active.nonzero().squeeze(1)  # (R,): the samples at work
        y = torch.zeros_like(h_t)
        state = dict(state, time=time + 1)
        if not len(awake):
            return y, state

        if self.window is None and int(state["filled"].max()) == state["k"].shape[1]:  # full: twice the slots
            for name in ("k", "v", "position"):
                state[name] = torch.cat([torch.zeros_like(state[name]), state[name]], dim=1)
        q, k, v, reset = self._project(h_t[awake].unsqueeze(1), time[awake].unsqueeze(1))  # (R, 1, ·)
        for name, new in (("k", k), ("v", v), ("position", time[awake].unsqueeze(1))):
            moved = torch.cat([state[name][awake, 1:], new.to(state[name].dtype)], dim=1)  # (R, slots, ·)
            state[name] = state[name].index_copy(0, awake, moved)
        slots = state["k"].shape[1]
        filled = (state["filled"][awake] + 1).clamp(max=slots)
        state["filled"] = state["filled"].index_copy(0, awake, filled)
        apart = torch.arange(slots, device=q.device) - (slots - 1)  # 0 for the newest: the query's own
        visible = (apart > -filled.unsqueeze(1)).unsqueeze(1)  # (R, 1, slots)
        if self.bias == "global":
            apart = (state["position"][awake] - time[awake].unsqueeze(1)).unsqueeze(1)  # (R, 1, slots)
        keys, values = state["k"][awake].to(q.dtype), state["v"][awake].to(v.dtype)
        found = _read(q, keys, values, self.function, self.window, self._distances, apart, visible, self._on_weights)
        found = self.dropout(self.h_proj(found * reset)).squeeze(1)  # (R, D)
        found = confidence[awake].unsqueeze(-1) * found
        return y.index_copy(0, awake, found.to(y.dtype)), state

    @property
    def _distances(self) -> Tensor | None:
        """What a key adds at each distance that is told apart; of a local table the part that can be reached."""
        if self.bias != "local" or self.table is None:
            return self.table
        window = (len(self.table) + 1) // 6  # that it was made for: a panel may look through another one
        return self.table[3 * window - 1 : 5 * window]

    def _project(self, packed: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z, reset, v = F.silu(self.mx_proj(packed)).split([self.z_dim, self.v_dim, self.v_dim], dim=-1)
        q, k = (z * self.kappa[i] + self.mu[i] for i in (0, 1))
        if self.bias == "rotary":
            q, k = rope(q, time), rope(k, time)
        return q, k, self.hidden_dropout(v), reset

    def _attend_active(self, h: Tensor, active: Tensor) -> Tensor:
        """The unit for the active ones of ``h (B, L, D)`` by themselves: ``(B, L, D)``, zeros for the others."""
        # `compress` and `extract`, but asking only once how many are active, and where: each time a GPU is waited for.
        index = active.cumsum(1) * active  # (B, L)
        counts = index.amax(1, keepdim=True)
        longest = max(1, int(counts.max()))
        source, slot = _addresses(index, longest)
        packed = _moved(h, source, slot, longest)  # (B, M, D)
        valid = torch.arange(longest, device=h.device) < counts  # (B, M)
        time = torch.arange(h.shape[1], device=h.device).expand(index.shape).unsqueeze(-1)
        time = _moved(time, source, slot, longest).squeeze(-1)  # (B, M): where the active tokens stood
        return _moved(self._attend(packed, time, valid), slot, source, h.shape[1])

    def _attend(self, packed: Tensor, time: Tensor, valid: Tensor | None) -> Tensor:
        """The gated attention unit on ``(B, M, D)`` tokens that stood at ``time (B, M)``."""
        q, k, v, reset = self._project(packed, time)
        found = memory_attention(
            q,
            k,
            v,
            self.window,
            function=self.function,
            bias=self._distances,
            positions=time if self.bias == "global" else None,
            valid=valid,
            causal=self.causal,
            on_weights=self._on_weights,
        )
        return self.dropout(self.h_proj(found * reset))

    def _on_weights(self, weights: Tensor) -> Tensor:
        return self.attention_dropout(self.weights(weights))

    def _check_logits(self, h: Tensor, logits: Tensor | None) -> None:
        wanted = None if self.router is None else (*h.shape[:-1], 2)
        got = None if logits is None else tuple(logits.shape)
        if got != wanted:
            raise ValueError(f"logits must be {wanted} (skip, activate; None if always active); got {got}.")

    def extra_repr(self) -> str:
        name = "softmax" if self.function is None else getattr(self.function, "__name__", "custom")
        return f"window={self.window}, function={name}, bias={self.bias!r}, causal={self.causal}"


# ---- checks --------------------------------------------------------------------------------------------------------


def _check_flags(name: str, flags: Tensor | None, x: Tensor) -> None:
    if flags is not None and (flags.dtype != torch.bool or flags.shape != x.shape[:2]):
        raise ValueError(
            f"{name} must be bool (batch, length) = {tuple(x.shape[:2])}, True where the token is to count; "
            f"got {flags.dtype} {tuple(flags.shape)}. Pass {name}.bool(), shaped like that."
        )


def _check_sequence(x: Tensor, active: Tensor) -> None:
    if x.dim() != 3 or x.shape[1] == 0:
        raise ValueError(f"x must be (batch, length >= 1, dim); got {tuple(x.shape)}.")
    _check_flags("active", active, x)


def _check_index(y: Tensor, index: Tensor) -> None:
    if y.dim() != 3 or index.dim() != 2 or index.shape[0] != y.shape[0]:
        raise ValueError(f"y must be (batch, M, d) and index (batch, L); got {tuple(y.shape)}, {tuple(index.shape)}.")
    if int(index.min()) < 0 or int(index.max()) > y.shape[1]:
        raise ValueError(
            f"index must hold ranks 1 .. M = {y.shape[1]}, or 0; got {int(index.min())} .. {int(index.max())}. "
            "Pass the index that compress returned."
        )


def _check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    bias: Tensor | None,
    positions: Tensor | None,
    valid: Tensor | None,
) -> None:
    if q.dim() != 3 or q.shape[1] == 0 or q.shape != k.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        got = [tuple(t.shape) for t in (q, k, v)]
        raise ValueError(f"q and k must be (batch, M >= 1, z) alike and v (batch, M, v); got {got}.")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None for all; got {window}.")
    if bias is not None and (bias.dim() != 1 or bias.shape[0] % 2 == 0):
        raise ValueError(f"bias must be (2 P - 1,), one number per distance, 0 midway; got {tuple(bias.shape)}.")
    if positions is not None and positions.shape != q.shape[:2]:
        raise ValueError(f"positions must be (batch, M) = {tuple(q.shape[:2])}; got {tuple(positions.shape)}.")
    _check_flags("valid", valid, q)
