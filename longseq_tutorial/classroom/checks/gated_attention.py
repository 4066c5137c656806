"""Checks of chapter 03: the relative bias, the gates, the Laplace function, masked weights, one step with a cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.mechanisms.gated_attention import RelativeBias, attention_weights, laplace, relu2

__all__ = [
    "attend_step",
    "bell_through",
    "bias_matrix",
    "check_attend_step",
    "check_bell_through",
    "check_bias_matrix",
    "check_gate_mix",
    "check_squashed_weights",
    "gate_mix",
    "squashed_weights",
]


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# -------------------------------------------------------------------- 1: the relative bias


def bias_matrix(table: Tensor, length: int) -> Tensor:
    """The truth of exercise 1: ``table (2P-1,)`` read at ``(j - i) + P - 1``, ``(length, length)``, length <= P."""
    return functional_call(RelativeBias((len(table) + 1) // 2), {"table": table}, (length,))


def check_bias_matrix(candidate: Any) -> Verdict:
    """Check a function ``(table, length) -> (length, length)``."""

    def read(index: Callable[[Tensor, int, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
        def mistake(table: Tensor, length: int) -> Tensor:
            step = torch.arange(length)
            return table[index(step[None, :] - step[:, None], (len(table) + 1) // 2, length)]

        return mistake

    return check(
        candidate,
        bias_matrix,
        name="bias_matrix",
        cases=[
            (_random(13), 7),
            (_random(13, seed=1), 4),
            (_random(13, seed=2), 1),
            (_random(1, seed=3), 1),
            (_random(9, seed=4, dtype=torch.float32), 5),
        ],
        suspects={
            "the bias is transposed: row i is the query and column j the key, so the offset is j - i, not i - j": read(
                lambda d, p, length: p - 1 - d
            ),
            "offset 0 is looked for at length - 1; it stands in the middle of the table, at P - 1, "
            "whatever the length": read(lambda d, p, length: d + length - 1),
            "an off-by-one: offset 0 stands at P - 1, since the table starts at offset -(P - 1), not at -P": read(
                lambda d, p, length: (d + p).clamp(max=2 * p - 2)
            ),
            "P - 1 is not added: a negative index counts from the end of the table": read(lambda d, p, length: d),
            "the table is read at the absolute distance |j - i|: one direction is lost": read(
                lambda d, p, length: d.abs() + p - 1
            ),
            "the offset is taken modulo the length: that is a circulant matrix; "
            "here the first position is far from the last": read(lambda d, p, length: d % length + p - 1),
            "the index of the key alone: an absolute position, the same row for every query": read(
                lambda d, p, length: torch.arange(length).expand(length, length)
            ),
        },
        verified="Every diagonal holds one number of the table: a Toeplitz matrix, with row = query.",
    )


# -------------------------------------------------------------------- 2: the two gates


def gate_mix(found: Tensor, reset: Tensor, update: Tensor, candidate: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The truth of exercise 2. found, reset ``(..., v)``; update, candidate, x ``(..., D)``; weight ``(D, v)``.

    ``reset`` and ``update`` are logits: SiLU and sigmoid are still to come.
    """
    h = F.silu(candidate + F.linear(found * F.silu(reset), weight))
    phi = torch.sigmoid(update)
    return phi * h + (1 - phi) * x


def _gate_variant(
    reset_gate: Callable[[Tensor], Tensor] = F.silu,
    update_gate: Callable[[Tensor], Tensor] = torch.sigmoid,
    hidden: Callable[[Tensor, Tensor], Tensor] = lambda c, a: F.silu(c + a),
    mix: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda phi, h, x: phi * h + (1 - phi) * x,
) -> Callable[..., Tensor]:
    def mistake(found: Tensor, reset: Tensor, update: Tensor, candidate: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        h = hidden(candidate, F.linear(found * reset_gate(reset), weight))
        return mix(update_gate(update), h, x)

    return mistake


def check_gate_mix(candidate: Any) -> Verdict:
    """Check a function ``(found, reset, update, candidate, x, weight) -> (..., D)``."""

    def case(*lead: int, d: int, v: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        widths = (v, v, d, d, d)
        inputs = [2 * _random(*lead, w, seed=seed + i, dtype=dtype) for i, w in enumerate(widths)]
        return (*inputs, _random(d, v, seed=seed + 9, dtype=dtype))

    return check(
        candidate,
        gate_mix,
        name="gate_mix",
        cases=[
            case(2, 5, d=3, v=7, seed=0),
            case(1, 1, d=4, v=4, seed=20),
            case(2, 3, d=4, v=2, seed=40, dtype=torch.float32),
        ],
        suspects={
            "the update gate is the wrong way round: phi open (1) takes the candidate H, "
            "phi closed (0) keeps the input": _gate_variant(mix=lambda phi, h, x: (1 - phi) * h + phi * x),
            "a residual too many: x + phi * H adds; the gate mixes, H grows as x shrinks": _gate_variant(
                mix=lambda phi, h, x: x + phi * h
            ),
            "the input is lost: phi * H without (1 - phi) * x": _gate_variant(mix=lambda phi, h, x: phi * h),
            "an ordinary residual beside the gated mix: the gate is the residual connection already": _gate_variant(
                mix=lambda phi, h, x: x + phi * h + (1 - phi) * x
            ),
            "the update gate is used as a raw logit: the sigmoid is missing": _gate_variant(update_gate=lambda u: u),
            "the update gate is a SiLU: it can leave [0, 1], and then the mix is no average; "
            "it wants a sigmoid": _gate_variant(update_gate=F.silu),
            "the reset gate is a sigmoid: in Mega it is a SiLU, which may also amplify and flip": _gate_variant(
                reset_gate=torch.sigmoid
            ),
            "the reset gate is used as a raw logit: its SiLU is missing": _gate_variant(reset_gate=lambda r: r),
            "the reset gate is missing: what attention found goes through unfiltered": _gate_variant(
                reset_gate=torch.ones_like
            ),
            "the SiLU around the candidate is missing": _gate_variant(hidden=lambda c, a: c + a),
            "the candidate's own part is missing: H = silu(candidate + what was found)": _gate_variant(
                hidden=lambda c, a: F.silu(a)
            ),
            "the SiLU is taken of one part only: add first, then SiLU": _gate_variant(
                hidden=lambda c, a: c + F.silu(a)
            ),
            "tanh instead of SiLU around the candidate": _gate_variant(hidden=lambda c, a: torch.tanh(c + a)),
        },
        verified="Where the update gate is shut the input comes through untouched; where it is open, H replaces it.",
    )


# -------------------------------------------------------------------- 3: two conditions, two numbers


def bell_through(point: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The truth of exercise 3: mean and deviation of the normal distribution function through ``(point, value)``
    with that ``slope``; all of one shape, values in (0, 1), slopes > 0."""
    w = torch.special.ndtri(value)
    std = torch.exp(-w.square() / 2) / math.sqrt(2 * math.pi) / slope
    return point - std * w, std


def check_bell_through(candidate: Any) -> Verdict:
    """Check a function ``(point, value, slope) -> (mean, std)``."""

    def height(w: Tensor) -> Tensor:
        return torch.exp(-w.square() / 2) / math.sqrt(2 * math.pi)

    def bell(
        deviation: Callable[[Tensor, Tensor], Tensor], mean: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    ) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        centre = mean or (lambda point, std, w: point - std * w)

        def mistake(point: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
            w = torch.special.ndtri(value)
            std = deviation(w, slope)
            return centre(point, std, w), std

        return mistake

    def right(w: Tensor, slope: Tensor) -> Tensor:
        return height(w) / slope

    half = torch.tensor(0.5, dtype=torch.float64)
    return check(
        candidate,
        bell_through,
        name="bell_through",
        cases=[
            (half.sqrt(), half, half.sqrt() * 2),
            (
                torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64),
                torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
                torch.tensor([0.2, 1.5, 0.7], dtype=torch.float64),
            ),
        ],
        suspects={
            "the two results are in the wrong order: first the mean, then the deviation": lambda *a: bell_through(*a)[
                ::-1
            ],
            "the mean is always put at the point: that is right only where the value is 1/2": bell(
                right, lambda point, std, w: point
            ),
            "the mean is on the wrong side of the point: where the value is above 1/2, the mean lies to the left": bell(
                right, lambda point, std, w: point + std * w
            ),
            "the deviation takes the slope for the one at the mean; at a value other than 1/2 the bell is "
            "already lower, by exp(-w**2 / 2)": bell(lambda w, slope: 1 / (math.sqrt(2 * math.pi) * slope)),
            "the factor sqrt(2 pi) of the bell curve's height is missing": bell(
                lambda w, slope: torch.exp(-w.square() / 2) / slope
            ),
            "the variance is returned (or used), not the deviation: a square root is missing": bell(
                lambda w, slope: right(w, slope) ** 2
            ),
            "the variance is returned, not its square root, the deviation": lambda p, v, s: (
                bell_through(p, v, s)[0],
                bell_through(p, v, s)[1] ** 2,
            ),
            "the deviation grows with the slope; a steep curve is a narrow one: divide by the slope": bell(
                lambda w, slope: height(w) * slope
            ),
            "a sqrt(2) too many: erf's argument has it, the normal distribution's deviation does not": bell(
                lambda w, slope: math.sqrt(2) * right(w, slope)
            ),
            "a sqrt(2) too few: the bell's height is 1 / (sqrt(2 pi) std), that of erf is not": bell(
                lambda w, slope: right(w, slope) / math.sqrt(2)
            ),
        },
        verified="At the point sqrt(1/2) with value 1/2 and slope sqrt(2) it gives 0.707107 and 0.282095: "
        "the constants of the published code.",
    )


# -------------------------------------------------------------------- 4: weights that are not normalised


def squashed_weights(
    q: Tensor, k: Tensor, bias: Tensor, mask: Tensor, causal: bool, squash: Callable[[Tensor], Tensor]
) -> Tensor:
    """The truth of exercise 4: ``attention_weights`` with laplace or relu2. ``(B, L, z)``, mask ``(B, L)``."""
    return attention_weights(q, k, function=squash.__name__, bias=bias, mask=mask, causal=causal)


def _past(length: int, causal: bool) -> Tensor:
    every = torch.ones(length, length, dtype=torch.bool)
    return every.tril() if causal else every


def _count(visible: Tensor) -> Tensor:
    return visible.sum(-1, keepdim=True).clamp(min=1)


def _weights_variant(
    *,
    visible: Callable[[Tensor, int, bool], Tensor] | None = None,
    count: Callable[[Tensor, Tensor, int, bool], Tensor | float] | None = None,
    scores: Callable[[Tensor, Tensor | float, Tensor], Tensor] = lambda s, n, b: s / n + b,
    apply: Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None,
    width: bool = False,
) -> Callable[..., Tensor]:
    def usual_visible(mask: Tensor, length: int, causal: bool) -> Tensor:
        return mask[:, None, :] & _past(length, causal)

    def usual_apply(s: Tensor, seen: Tensor, squash: Callable[[Tensor], Tensor]) -> Tensor:
        return squash(s).masked_fill(~seen, 0.0)

    def mistake(
        q: Tensor, k: Tensor, bias: Tensor, mask: Tensor, causal: bool, squash: Callable[[Tensor], Tensor]
    ) -> Tensor:
        length = q.shape[-2]
        seen = (visible or usual_visible)(mask, length, causal)
        n: Tensor | float = _count(seen) if count is None else count(seen, mask, length, causal)
        if width:
            n = math.sqrt(q.shape[-1])
        s = scores(q @ k.transpose(-1, -2), n, bias)
        return (apply or usual_apply)(s, seen, squash)

    return mistake


def check_squashed_weights(candidate: Any) -> Verdict:
    """Check a function ``(q, k, bias, mask, causal, squash) -> (B, L, L)``; squash is laplace or relu2."""

    def case(
        length: int, causal: bool, squash: Callable[[Tensor], Tensor], seed: int, dtype: torch.dtype = torch.float64
    ) -> tuple[Any, ...]:
        q, k = (3 * _random(2, length, 3, seed=seed + i, dtype=dtype) for i in (0, 1))
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[0, length - length // 3 :] = False  # padding on the right
        mask[1, : length // 4] = False  # and on the left, where a causal query sees nothing
        return q, k, 0.5 * _random(length, length, seed=seed + 2, dtype=dtype), mask, causal, squash

    v = _weights_variant
    suspects: dict[str, Callable[..., Tensor]] = {
        "the mask comes before the function: a hidden score set to 0 becomes laplace(0) = 0.006, not 0. "
        "Hide after the function": v(apply=lambda s, seen, f: f(s.masked_fill(~seen, 0.0))),
        "the mask comes before the bias and the function: a hidden score of 0 still becomes f(bias). "
        "Hide after the function": _mask_before_bias,
        "the scores are divided by L instead of the number of visible keys": v(count=lambda seen, m, n, c: float(n)),
        "the scores are divided by the number of real keys: under a causal mask query i sees fewer, "
        "a number of its own for each row": v(count=lambda seen, m, n, c: _count(m[:, None, :])),
        "the scores are divided by i + 1 (or L): padding among those keys is not visible and does not count": v(
            count=lambda seen, m, n, c: _count(_past(n, c))
        ),
        "the scores are divided by sqrt(z): that is softmax's scale; laplace and relu2 divide by the number of "
        "visible keys": v(width=True),
        "the scores are not divided by the number of visible keys": v(count=lambda seen, m, n, c: 1.0),
        "the bias is divided by the count too; it is added after the division": v(scores=lambda s, n, b: (s + b) / n),
        "the bias is missing": v(scores=lambda s, n, b: s / n),
        "the bias is transposed: its row is the query": v(scores=lambda s, n, b: s / n + b.mT),
        "the causal mask hides the diagonal: a query may look at its own position (tril(), not tril(-1))": v(
            visible=lambda m, n, c: m[:, None, :] & (_past(n, c).tril(-1) if c else _past(n, c))
        ),
        "the causal mask hides the past and shows the future: tril, not triu (row = query, column = key)": v(
            visible=lambda m, n, c: m[:, None, :] & _past(n, c).mT
        ),
        "the mask is read the wrong way round: True means real": v(
            visible=lambda m, n, c: ~m[:, None, :] & _past(n, c)
        ),
        "the padding mask hides rows (queries); it has to hide columns (keys): mask[:, None, :]": v(
            visible=lambda m, n, c: m[:, :, None] & _past(n, c)
        ),
        "the padding mask is not applied": v(visible=lambda m, n, c: _past(n, c).expand(len(m), n, n)),
        "the causal mask is not applied": v(visible=lambda m, n, c: m[:, None, :].expand(len(m), n, n)),
        "the count is right, but the hidden keys keep their weights: multiply by the mask after the function": v(
            apply=lambda s, seen, f: f(s)
        ),
        "the weights are normalised to add up to 1: laplace and relu2 are used as they come": v(
            apply=lambda s, seen, f: _normalised(f(s).masked_fill(~seen, 0.0))
        ),
    }
    return check(
        candidate,
        squashed_weights,
        name="squashed_weights",
        cases=[
            case(7, False, laplace, 0),
            case(7, True, laplace, 10),
            case(6, False, relu2, 20),
            case(5, True, relu2, 30),
            case(1, True, laplace, 40),
            case(9, True, laplace, 50, torch.float32),
        ],
        suspects=suspects,
        verified="Hidden keys get exactly 0, and each row counts its own visible keys.",
    )


def _mask_before_bias(
    q: Tensor, k: Tensor, bias: Tensor, mask: Tensor, causal: bool, squash: Callable[[Tensor], Tensor]
) -> Tensor:
    seen = mask[:, None, :] & _past(q.shape[-2], causal)
    return squash((q @ k.transpose(-1, -2)).masked_fill(~seen, 0.0) / _count(seen) + bias)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)


# -------------------------------------------------------------------- 5: one query and a cache


def attend_step(
    q_t: Tensor, k_t: Tensor, v_t: Tensor, keys: Tensor, values: Tensor, table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The truth of exercise 5: causal softmax attention of one new position, and the caches grown by it.

    q_t, k_t ``(B, z)``, v_t ``(B, v)``, keys ``(B, t, z)``, values ``(B, t, v)``, table ``(2P-1,)`` with P > t.
    """
    keys = torch.cat([keys, k_t[:, None]], dim=1)
    values = torch.cat([values, v_t[:, None]], dim=1)
    now = keys.shape[1] - 1
    middle = len(table) // 2
    scores = torch.einsum("bz,bjz->bj", q_t, keys) / math.sqrt(q_t.shape[-1]) + table[middle - now : middle + 1]
    return torch.einsum("bj,bjv->bv", torch.softmax(scores, dim=-1), values), keys, values


def _step_variant(
    *,
    scale: Callable[[int, int], float] = lambda z, seen: 1 / math.sqrt(z),
    bias: Callable[[Tensor, int, int], Tensor | float] = lambda table, p, now: table[p - now : p + 1],
    axis: int = -1,
    own: bool = True,
    grow: bool = True,
    front: bool = False,
    normalise: bool = True,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A step with one mistake. p is the index of offset 0, now that of the present position."""

    def mistake(
        q_t: Tensor, k_t: Tensor, v_t: Tensor, keys: Tensor, values: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs = ((keys, k_t), (values, v_t))
        grown = [torch.cat([n[:, None], c] if front else [c, n[:, None]], dim=1) for c, n in pairs]
        used = grown if own else [keys, values]
        seen, p = used[0].shape[1], len(table) // 2
        offset = bias(table, p, grown[0].shape[1] - 1)
        if isinstance(offset, Tensor) and not own:
            offset = offset[:seen]
        scores = torch.einsum("bz,bjz->bj", q_t, used[0]) * scale(q_t.shape[-1], seen) + offset
        weights = torch.softmax(scores, dim=axis) if normalise else scores.exp()
        found = torch.einsum("bj,bjv->bv", weights, used[1])
        return (found, *(grown if grow else (keys, values)))

    return mistake


def check_attend_step(candidate: Any) -> Verdict:
    """Check a function ``(q_t, k_t, v_t, keys, values, table) -> found, keys, values``."""

    def case(seen: int, positions: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        shapes = ((3, 4), (3, 4), (3, 5), (3, seen, 4), (3, seen, 5), (2 * positions - 1,))
        return tuple(2 * _random(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes))

    v = _step_variant
    return check(
        candidate,
        attend_step,
        name="attend_step",
        cases=[case(6, 9, 0), case(0, 9, 10), case(1, 2, 20), case(4, 7, 30, torch.float32)],
        suspects={
            "the new key and value join the caches only after the query has looked: a position also sees itself": v(
                own=False
            ),
            "the scale 1 / sqrt(z) is missing": v(scale=lambda z, seen: 1.0),
            "the scores are divided by z, not by sqrt(z)": v(scale=lambda z, seen: 1 / z),
            "the scores are divided by the square root of the number of keys; it is z, the width of a key": v(
                scale=lambda z, seen: 1 / math.sqrt(seen)
            ),
            "the scores are divided by the number of keys: that is for laplace and relu2": v(
                scale=lambda z, seen: 1 / seen
            ),
            "softmax runs over the wrong axis: over the batch, not over the keys": v(axis=0),
            "the weights are not normalised: exp without the division by its sum": v(normalise=False),
            "the bias looks into the future: it was read at i - j. Keys before the query have j - i < 0: they stand "
            "left of the middle of the table": v(bias=lambda table, p, now: table[p : p + now + 1].flip(0)),
            "the bias is read from the middle to the right: those are the offsets 0 .. t of keys in the future": v(
                bias=lambda table, p, now: table[p : p + now + 1]
            ),
            "the bias is in the wrong order: the oldest key is first in the cache and has the offset -t": v(
                bias=lambda table, p, now: table[p - now : p + 1].flip(0)
            ),
            "an off-by-one in the bias: the present position has offset 0, the middle of the table": v(
                bias=_one_too_far
            ),
            "the bias is read from the start of the table: that is offset -(P - 1), not -t": v(
                bias=lambda table, p, now: table[: now + 1]
            ),
            "the bias is missing": v(bias=lambda table, p, now: 0.0),
            "what was found is right, but the caches that come back have not grown": v(grow=False),
            "the new key was put in front of the cache; the cache is in order of time, so it goes to the end": v(
                front=True
            ),
        },
        verified="Called once for each position it gives what causal attention gives for the whole sequence.",
    )


def _one_too_far(table: Tensor, p: int, now: int) -> Tensor:
    return torch.cat([table[:1], table])[p - now : p + 1]
