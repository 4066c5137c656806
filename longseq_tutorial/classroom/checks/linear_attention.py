"""Checks of chapter 07's exercises: the two products, one step, a safe exponential, random features, the chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.measure import peak_memory
from longseq_tutorial.mechanisms.linear_attention import FavorFeatures, linear_attention, sikf_features

__all__ = [
    "check_chunked_attention",
    "check_favor_features",
    "check_linear_step",
    "check_safe_sikf",
    "check_two_products",
]

EPS = 1e-6


def _draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _positive(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Features as a map would give them."""
    return _draw(*shape, seed=seed, dtype=dtype).exp()


def _same(x: Tensor) -> Tensor:
    return x


def _too_much(candidate: Any, verdict: Verdict, arguments: tuple[Any, ...], most: int, advice: str) -> Verdict:
    """The verdict, or, where one call holds more than ``most`` bytes at once, what to do about it."""
    if not verdict.ok:
        return verdict
    used = peak_memory(lambda: candidate(*arguments))
    if used <= most:
        return verdict
    name = verdict.text.split(":", 1)[0].removeprefix("✓ ")
    return Verdict(
        "wrong", f"✗ {name}: the numbers are right, but it takes too much memory.\n  likely cause: {advice}."
    )


# ---- two products ------------------------------------------------------------------------------------------------


def _two_products(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(phi_q, phi_k, v, _same, eps=EPS)


def _sums(phi_k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return phi_k.mT @ v, phi_k.sum(-2, keepdim=True).mT  # (..., m, d_v), (..., m, 1)


def _divided(
    denominator: Callable[[Tensor, Tensor], Tensor], numerator: Callable[[Tensor, Tensor], Tensor] = lambda q, S: q @ S
) -> Callable[..., Tensor]:
    """The two products with another numerator or denominator."""

    def form(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
        S, z = _sums(phi_k, v)
        return numerator(phi_q, S) / denominator(phi_q, z)

    return form


def check_two_products(candidate: Any) -> Verdict:
    """Exercise 1: ``two_products(phi_q, phi_k, v)``, features ``(B, H, L, m)`` and values ``(B, H, L, d_v)``."""

    def case(length: int, m: int, d_v: int, seed: int, **kind: Any) -> tuple[Tensor, ...]:
        phi = [_positive(2, 2, length, m, seed=seed + i, **kind) for i in range(2)]
        return *phi, _draw(2, 2, length, d_v, seed=seed + 2, **kind)

    verdict = check(
        candidate,
        _two_products,
        name="two_products",
        cases=[case(7, 3, 4, 10), case(1, 2, 2, 20), case(33, 5, 3, 30, dtype=torch.float32)],
        suspects={
            "the denominator is missing: divide by phi(q) . z, z the sum of all phi(k)": _divided(
                lambda q, z: torch.ones_like(q[..., :1])
            ),
            "eps is missing: add 1e-6 to the denominator": _divided(lambda q, z: q @ z),
            "eps is subtracted": _divided(lambda q, z: q @ z - EPS),
            "eps is added to the features of the keys, not once to the denominator": _divided(
                lambda q, z: q @ (z + EPS)
            ),
            "the denominator is the sum of z alone: each query has its own, phi(q) . z": _divided(
                lambda q, z: z.sum(-2, keepdim=True) + EPS
            ),
            "the denominator is the sum of the query's features: it has to be phi(q) . z": _divided(
                lambda q, z: q.sum(-1, keepdim=True) + EPS
            ),
            "divided by the length: the weights have to add up to 1 whatever the features are": lambda q, k, v: (
                q @ (k.mT @ v) / k.shape[-2]
            ),
            "phi(q) and phi(k) are swapped": lambda q, k, v: _two_products(k, q, v),
            "a causal sum: here every query sees every key": lambda q, k, v: linear_attention(
                q, k, v, _same, causal=True, eps=EPS
            ),
            "a softmax over the similarities: they are the weights already, but for the division": lambda q, k, v: (
                torch.softmax(q @ k.mT, -1) @ v
            ),
        },
        verified="And it never held anything of size L x L.",
    )
    long = case(1500, 2, 2, 40)
    advice = "phi(q) phi(k)^T is built, L x L numbers. Multiply phi(k)^T with v first: move the brackets"
    return _too_much(candidate, verdict, long, 2 * 2 * 1500 * 1500, advice)


# ---- one step ------------------------------------------------------------------------------------------------------


def _linear_step(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, S: Tensor, z: Tensor, **part: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """One step, with one part replaced where ``part`` says so."""
    written = part.get("write", lambda k, v: k[..., None] * v[..., None, :])(phi_k, v)
    new_S, new_z = part.get("keep_S", 1.0) * S + written, part.get("keep_z", 1.0) * z + phi_k
    read_S, read_z = (S, z) if part.get("read_old") else (new_S, new_z)
    numerator = (phi_q[..., None] * read_S).sum(-2)
    denominator = (phi_q * (z if part.get("old_z") else read_z)).sum(-1, keepdim=True)
    y = numerator / (denominator + part.get("eps", EPS)) if part.get("divide", True) else numerator
    return y, (S if part.get("return_S") else new_S), (z if part.get("return_z") else new_z)


def check_linear_step(candidate: Any) -> Verdict:
    """Exercise 2: ``linear_step(phi_q, phi_k, v, S, z) -> (y, S, z)``, one time step."""

    def case(batch: int, heads: int, m: int, d_v: int, seed: int) -> tuple[Tensor, ...]:
        phi = [_positive(batch, heads, m, seed=seed + i) for i in range(2)]
        S, z = _draw(batch, heads, m, d_v, seed=seed + 3), _positive(batch, heads, m, seed=seed + 4)
        return *phi, _draw(batch, heads, d_v, seed=seed + 2), S, z

    def wrong(**part: Any) -> Callable[..., Any]:
        return lambda *arguments: _linear_step(*arguments, **part)

    def swapped(k: Tensor, v: Tensor) -> Tensor:
        return v[..., None] * k[..., None, :]

    def reference(phi_q: Tensor, phi_k: Tensor, v: Tensor, S: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _linear_step(phi_q, phi_k, v, S, z)

    return check(
        candidate,
        reference,
        name="linear_step",
        cases=[case(2, 2, 3, 4, 50), case(1, 1, 1, 1, 60), case(2, 1, 5, 2, 70)],
        suspects={
            "y is read from the old S and z: write first, then read, since a query sees its own key": wrong(
                read_old=True
            ),
            "the denominator is read from the old z: add phi(k) to it first": wrong(old_z=True),
            "the old S is returned: the new one has to go on to the next step": wrong(return_S=True),
            "the old z is returned: the new one has to go on to the next step": wrong(return_z=True),
            "S is overwritten: add phi(k) v^T to what is there": wrong(keep_S=0.0),
            "z is overwritten: add phi(k) to what is there": wrong(keep_z=0.0),
            "the denominator is missing: divide by phi(q) . z + 1e-6": wrong(divide=False),
            "eps is missing: add 1e-6 to the denominator": wrong(eps=0.0),
            "the outer product is the wrong way round: row a, column b of S gets phi(k)_a v_b": wrong(write=swapped),
        },
        verified="The state is m * d_v + m numbers a head, after ten tokens and after ten million.",
    )


# ---- an exponential that does not overflow ---------------------------------------------------------------------------


def _safe_sikf(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, sikf_features, eps=0.0)


def _shifted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SIKF of moved queries and keys, without any protection."""
    phi_q, phi_k = q.exp(), k.exp()
    S, z = _sums(phi_k, v)
    return (phi_q @ S) / (phi_q @ z)


def _less(of_q: Any, of_k: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The largest over these axes is taken out of the queries, and of the keys."""
    return lambda q, k, v: _shifted(q - q.amax(of_q, keepdim=True), k - k.amax(of_k, keepdim=True), v)


def check_safe_sikf(candidate: Any) -> Verdict:
    """Exercise 3: ``safe_sikf(q, k, v)``, SIKF attention (eps 0) that survives large entries in single precision."""

    def case(
        length: int, d: int, seed: int, shift: float = 0.0, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, ...]:
        q, k = (_draw(2, 2, length, d, seed=seed + i, dtype=dtype) + shift for i in range(2))
        return q, k, _draw(2, 2, length, 3, seed=seed + 2, dtype=dtype)

    single = torch.float32
    verdict = check(
        candidate,
        _safe_sikf,
        name="safe_sikf",
        cases=[case(9, 4, 80), case(1, 3, 90), case(20, 2, 95, dtype=single)],
        suspects={
            "this is softmax attention, the exponential of a sum: SIKF is the sum of exp(q_a + k_a)": lambda q, k, v: (
                torch.softmax(q @ k.mT, -1) @ v
            ),
            "this is softmax attention, the exponential of a sum, and scaled: SIKF is the sum of exp(q_a + k_a)": (
                lambda q, k, v: torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1) @ v
            ),
            "each key has its own largest taken out, so keys change their weight against one another. Only what all "
            "keys share cancels": lambda q, k, v: _shifted(q, k - k.amax(-1, keepdim=True), v),
            "the largest of each feature is taken out of the queries, over the positions: that changes the weight of "
            "the features. Take the largest over the features, one number for each query": lambda q, k, v: _shifted(
                q - q.amax(-2, keepdim=True), k, v
            ),
            "the largest of each feature is taken out of the keys but not given to the queries: then it does not "
            "cancel. Add it to q, or take one number for the whole head": lambda q, k, v: _shifted(
                q, k - k.amax(-2, keepdim=True), v
            ),
            "scaled by 1/sqrt(d): SIKF has no scale": lambda q, k, v: _shifted(
                q / math.sqrt(q.shape[-1]), k / math.sqrt(q.shape[-1]), v
            ),
            "elu + 1 where exp belongs": lambda q, k, v: linear_attention(
                q, k, v, lambda x: torch.nn.functional.elu(x) + 1, eps=0.0
            ),
            "the denominator is missing": lambda q, k, v: q.exp() @ (k.exp().mT @ v),
        },
        verified="Also for entries of 300, whose exponential no float32 can hold, and where a sequence, a head or a "
        "query lies far below the others.",
    )
    if not verdict.ok:
        return verdict
    q, k, v = case(12, 3, 110, shift=300.0, dtype=single)
    uneven = torch.tensor([-400.0, 0.0]).view(2, 1, 1, 1)  # one sequence far below the other
    heads = uneven.view(1, 2, 1, 1)  # one head
    low = torch.zeros(2, 2, 12, 1)  # one query, and its key
    low[:, :, 0] = -400.0
    large = check(
        candidate,
        _safe_sikf,
        name="safe_sikf",
        cases=[(q, k, v), (q + uneven, k + uneven, v), (q + low, k + low, v), (q + heads, k + heads, v)],
        tolerance=1e-3,
        suspects={
            "exp of the numbers as they are, which overflows in float32 beyond 88: take the largest out before exp, "
            "once for each query and once for all keys of a head": _shifted,
            "the keys are still too large for exp in float32: take the largest out of them too, one number a head": (
                lambda q, k, v: _shifted(q - q.amax(-1, keepdim=True), k, v)
            ),
            "the queries are still too large for exp in float32: take the largest out of each": lambda q, k, v: (
                _shifted(q, k - k.amax((-2, -1), keepdim=True), v)
            ),
            "one largest for the whole batch: a sequence far below it underflows to 0. Each query needs its own, and "
            "the keys of each sequence and head": _less((0, 1, 2, 3), (0, 1, 2, 3)),
            "one largest for the keys of the whole batch: those of a sequence far below it underflow to 0. The keys of "
            "each sequence and head need their own": _less(-1, (0, 1, 2, 3)),
            "one largest for all heads of a sequence: a head far below it underflows to 0. Each query needs its own, "
            "and the keys of each head": _less((1, 2, 3), (1, 2, 3)),
            "one largest for the keys of all heads: those of a head far below it underflow to 0. The keys of each head "
            "need their own": _less(-1, (1, 2, 3)),
            "one largest for all queries of a head: a query far below it underflows to 0. Each query needs its own": (
                _less((-2, -1), (-2, -1))
            ),
        },
        gradients=False,
    )
    return verdict if large.ok else large


# ---- random features -------------------------------------------------------------------------------------------------


def _favor(x: Tensor, projection: Tensor) -> Tensor:
    module = FavorFeatures(projection.shape[1], projection.shape[0]).to(projection.dtype)
    module.projection = projection
    return module(x)


def _random_features(
    x: Tensor,
    w: Tensor,
    *,
    power: float = -0.25,
    half: float = 0.5,
    scaled_square: bool = True,
    square: bool = True,
    outside: float = -0.5,
) -> Tensor:
    """Positive random features with parts of the formula changed."""
    d, m = w.shape[1], w.shape[0]
    scaled = x * d**power
    size = (scaled if scaled_square else x).square().sum(-1, keepdim=True)
    size = size if square else size.sqrt()
    return torch.exp(scaled @ w.mT - half * size) * m**outside


def check_favor_features(candidate: Any) -> Verdict:
    """Exercise 4: ``favor_features(x, projection)``, ``(..., d)`` and ``(m, d)`` to ``(..., m)``."""

    def case(d: int, m: int, length: int, seed: int, **kind: Any) -> tuple[Tensor, ...]:
        return _draw(2, length, d, seed=seed, **kind), _draw(m, d, seed=seed + 1, **kind)

    def wrong(**part: Any) -> Callable[..., Tensor]:
        return lambda x, projection: _random_features(x, projection, **part)

    return check(
        candidate,
        _favor,
        name="favor_features",
        cases=[case(4, 7, 5, 120), case(2, 3, 1, 130), case(3, 5, 6, 140, dtype=torch.float32)],
        suspects={
            "x is not divided by d**(1/4): then it estimates exp(q.k) without the 1/sqrt(d)": wrong(power=0.0),
            "x is divided by sqrt(d): q and k bring the root each, so each gets a fourth root": wrong(power=-0.5),
            "|x|^2 / 2 is missing: the mean of exp(w.x) alone is exp(|x|^2 / 2)": wrong(half=0.0),
            "|x|^2 without the one half": wrong(half=1.0),
            "|x|^2 / 2 has the wrong sign: it is taken off": wrong(half=-0.5),
            "|x|^2 of the x that is not yet divided by d**(1/4)": wrong(scaled_square=False),
            "|x| where |x|^2 belongs": wrong(square=False),
            "1/m where 1/sqrt(m) belongs: query and key bring the root each": wrong(outside=-1.0),
            "1/sqrt(m) is missing": wrong(outside=0.0),
            "1/sqrt(d) where 1/sqrt(m) belongs": lambda x, w: _random_features(x, w, outside=0.0) / w.shape[1] ** 0.5,
        },
        verified="Positive, and on average over projections phi(q).phi(k) is exp(q.k / sqrt(d)).",
    )


# ---- the chunks ------------------------------------------------------------------------------------------------------


def _chunked(phi_q: Tensor, phi_k: Tensor, v: Tensor, chunk: int) -> Tensor:
    return linear_attention(phi_q, phi_k, v, _same, causal=True, eps=EPS)


def _any_weights(weight: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention in which a pair counts ``weight(age, gap)`` times; the key lies age positions, gap chunks behind."""

    def form(phi_q: Tensor, phi_k: Tensor, v: Tensor, chunk: int) -> Tensor:
        position = torch.arange(phi_q.shape[-2])
        i, j = position[:, None], position[None, :]
        count = weight(i - j, i // chunk - j // chunk).to(phi_q.dtype)
        pairs = (phi_q @ phi_k.mT) * count
        return pairs @ v / (pairs.sum(-1, keepdim=True) + EPS)

    return form


def _local_denominator(phi_q: Tensor, phi_k: Tensor, v: Tensor, chunk: int) -> Tensor:
    position = torch.arange(phi_q.shape[-2])
    pairs = (phi_q @ phi_k.mT).tril()
    own = position[:, None] // chunk == position[None, :] // chunk
    return pairs @ v / ((pairs * own).sum(-1, keepdim=True) + EPS)


def check_chunked_attention(candidate: Any) -> Verdict:
    """Exercise 5: ``chunked_attention(phi_q, phi_k, v, chunk)``, causal, any length, linear memory."""

    def case(length: int, chunk: int, m: int, d_v: int, seed: int, **kind: Any) -> tuple[Any, ...]:
        phi = [_positive(2, 2, length, m, seed=seed + i, **kind) for i in range(2)]
        return *phi, _draw(2, 2, length, d_v, seed=seed + 2, **kind), chunk

    verdict = check(
        candidate,
        _chunked,
        name="chunked_attention",
        cases=[
            case(12, 4, 3, 2, 200),
            case(13, 4, 2, 3, 210),
            case(1, 4, 2, 2, 220),
            case(7, 1, 3, 3, 230),
            case(30, 8, 4, 3, 240, dtype=torch.float32),
        ],
        suspects={
            "the chunk's own keys come in twice: the sums S and z must be those of earlier chunks only (an "
            "exclusive cumulative sum)": _any_weights(lambda age, gap: (gap >= 0) * 1 + (gap == 0) * (age >= 0)),
            "future keys of the own chunk are seen: mask its pairs, and let S hold earlier chunks": _any_weights(
                lambda age, gap: gap >= 0
            ),
            "nothing crosses the border of a chunk: add phi(q) S, S the sums of all earlier chunks": _any_weights(
                lambda age, gap: (gap == 0) * (age >= 0)
            ),
            "only the previous chunk is remembered: S has to be summed up over all earlier chunks": _any_weights(
                lambda age, gap: ((gap == 0) & (age >= 0)) | (gap == 1)
            ),
            "S is one chunk late: the last chunk before the query's is missing": _any_weights(
                lambda age, gap: ((gap == 0) & (age >= 0)) | (gap >= 2)
            ),
            "a query does not see its own key: the diagonal belongs to the past (tril, not tril(-1))": _any_weights(
                lambda age, gap: age > 0
            ),
            "the pairs within the own chunk are missing": _any_weights(lambda age, gap: gap >= 1),
            "the denominator holds the own chunk only: z of all earlier chunks belongs to it": _local_denominator,
            "not causal: every query sees every key": lambda q, k, v, chunk: _two_products(q, k, v),
            "eps is missing: add 1e-6 to the denominator": lambda q, k, v, chunk: linear_attention(
                q, k, v, _same, causal=True, eps=0.0
            ),
            "the denominator is missing": lambda q, k, v, chunk: (q @ k.mT).tril() @ v,
            "positions after the last full chunk are wrong: fill the last chunk with zeros, and cut them off": (
                lambda q, k, v, chunk: _any_weights(lambda age, gap: age >= 0)(q, k, v, chunk)[
                    ..., : max(1, q.shape[-2] // chunk * chunk), :
                ]
            ),
        },
        verified="And it held neither L x L nor a state for each position.",
    )
    length, chunk, m = 1024, 16, 48
    advice = (
        "a matrix of all pairs (L x L) or a state for each position (L x m x d_v). Within a chunk C x C pairs are "
        "enough, between chunks one state a chunk"
    )
    return _too_much(candidate, verdict, case(length, chunk, m, m, 250), 30_000_000, advice)
