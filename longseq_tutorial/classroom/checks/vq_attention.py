"""Checks of chapter 06's exercises: nearest code, sums per code, straight through, attention over codes, a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.watching import watch
from longseq_tutorial.mechanisms.vq_attention import code_sums, codewords, nearest_code, straight_through

__all__ = [
    "check_attend_over_codes",
    "check_causal_block",
    "check_code_sums",
    "check_nearest",
    "check_quantise",
]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _keys(batch: int, heads: int, length: int, width: int, codes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Keys, and a codebook whose last code is long: large products with many keys, and far from all of them."""
    k, codebook = _draw(batch, heads, length, width, seed=seed), _draw(heads, codes, width, seed=seed + 1)
    codebook[:, -1] *= 6
    return k, codebook


# ---- the nearest code ------------------------------------------------------------------------------------------------


def _by(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Names by the smallest score; codebook comes as (H, 1, S, d), k as (B, H, L, 1, d)."""
    return lambda k, codebook: score(k.unsqueeze(3), codebook.unsqueeze(1)).argmin(-1)


def _first_head(k: Tensor, codebook: Tensor) -> Tensor:
    return nearest_code(k, codebook[:1].expand_as(codebook))


def check_nearest(candidate: Any) -> Verdict:
    """Exercise 1: ``nearest(k, codebook)``, k (B, H, L, d), codebook (H, S, d) -> (B, H, L), int64."""

    def nearest(k: Tensor, codebook: Tensor) -> Tensor:
        return nearest_code(k, codebook)

    verdict = check(
        candidate,
        nearest,
        name="nearest",
        cases=[_keys(2, 3, 7, 4, 6, 10), _keys(1, 1, 1, 2, 3, 20), tuple(t.float() for t in _keys(1, 2, 12, 3, 5, 30))],
        suspects={
            "the farthest code: argmax of a distance, or argmin of a score": _by(
                lambda k, c: -(k - c).square().sum(-1)
            ),
            "the largest product k.C: long codes win although they are far. |C|^2 / 2 must be taken off": _by(
                lambda k, c: -(k * c).sum(-1)
            ),
            "|C|^2 instead of |C|^2 / 2 beside k.C (or k.C without its factor 2): short codes win": _by(
                lambda k, c: c.square().sum(-1) - (k * c).sum(-1)
            ),
            "|C| where |C|^2 belongs: the square is missing": _by(lambda k, c: c.norm(dim=-1) / 2 - (k * c).sum(-1)),
            "the sum of absolute differences; the squared distance was asked for": _by(
                lambda k, c: (k - c).abs().sum(-1)
            ),
            "the angle instead of the distance: keys and codes were normalised": _by(
                lambda k, c: -torch.cosine_similarity(k, c, dim=-1)
            ),
            "every head uses the codebook of head 0": _first_head,
        },
        verified="And nothing of size length x codes x width was made on the way.",
    )
    if not verdict.ok:
        return verdict
    if watch(candidate, *_keys(1, 1, 50, 40, 30, 35)).largest < 50 * 30 * 40:
        return verdict
    return Verdict(
        "wrong",
        "✗ nearest: the names are right, but a tensor of size length x codes x width was made on the way.\n"
        "  likely cause: the difference k - C of every pair. Multiply the square out: k @ codebook.mT is enough.",
    )


# ---- sums per code ---------------------------------------------------------------------------------------------------


def _sums(v: Tensor, z: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    return code_sums(v, z, codes)


def _last_wins(v: Tensor, z: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    sums, counts = torch.zeros_like(_sums(v, z, codes)[0]), torch.zeros_like(_sums(v, z, codes)[1])
    for t in range(v.shape[2]):
        index = z[:, :, t : t + 1]
        sums = sums.scatter(2, index.unsqueeze(-1).expand(-1, -1, -1, v.shape[3]), v[:, :, t : t + 1])
        counts = counts.scatter(2, index, 1.0)
    return sums, counts


def _mixed(dims: tuple[int, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
    def mixed(v: Tensor, z: Tensor, codes: int) -> tuple[Tensor, Tensor]:
        sums, counts = _sums(v, z, codes)
        whole = sums.sum(dims, keepdim=True).expand_as(sums), counts.sum(dims, keepdim=True).expand_as(counts)
        return whole[0].clone(), whole[1].clone()

    return mixed


def check_code_sums(candidate: Any) -> Verdict:
    """Exercise 2: ``code_sums(v, z, codes)`` -> sums (B, H, S, e) and counts (B, H, S) in the dtype of v."""

    def case(batch: int, heads: int, length: int, width: int, codes: int, seed: int) -> tuple[Tensor, Tensor, int]:
        k, codebook = _keys(batch, heads, length, 2, codes, seed)
        return _draw(batch, heads, length, width, seed=seed + 5), nearest_code(k, codebook), codes

    single = case(1, 2, 9, 3, 4, 60)
    return check(
        candidate,
        _sums,
        name="code_sums",
        cases=[case(2, 3, 11, 4, 5, 40), case(1, 1, 1, 2, 3, 50), (single[0].float(), *single[1:])],
        suspects={
            "the last key of each code wins: out[index] = v writes, it does not add. index_add or scatter_add do": (
                _last_wins
            ),
            "the mean of each code instead of its sum": lambda v, z, s: (
                _sums(v, z, s)[0] / _sums(v, z, s)[1].clamp(min=1).unsqueeze(-1),
                _sums(v, z, s)[1],
            ),
            "the batch's sequences share their sums: give each its own bins": _mixed((0,)),
            "the heads share their sums: give each its own bins": _mixed((1,)),
            "sequences and heads share their sums: give each its own bins": _mixed((0, 1)),
            "the two results are swapped: sums first, then counts": lambda *a: _sums(*a)[::-1],
            "the names are shifted by one: codes are counted from 0": lambda v, z, s: tuple(
                x.roll(1, 2) for x in _sums(v, z, s)
            ),
        },
        verified="In the text's symbols: Delta V and Delta 1. The length is gone.",
    )


# ---- straight through ------------------------------------------------------------------------------------------------


def _quantise(k: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    nearest = codewords(codebook.detach(), nearest_code(k, codebook))
    return straight_through(k, nearest), (k - nearest).square().sum(-1).sum(1).mean()


def _loss(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The right keys with a loss made otherwise from the squared differences (B, H, L, d)."""

    def wrong(k: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        k_hat, _ = _quantise(k, codebook)
        return k_hat, change((k - k_hat.detach()).square())

    return wrong


def check_quantise(candidate: Any) -> Verdict:
    """Exercise 3: ``quantise(k, codebook)`` -> codewords with a straight-through gradient, and the commitment loss."""
    verdict = check(
        candidate,
        _quantise,
        name="quantise",
        cases=[_keys(2, 3, 7, 4, 6, 70), _keys(1, 1, 1, 2, 3, 80), tuple(t.float() for t in _keys(1, 2, 9, 3, 4, 90))],
        suspects={
            "codeword plus key: C + k lacks the subtraction. The forward value has to be C alone": lambda k, c: (
                _quantise(k, c)[0] + k,
                _quantise(k, c)[1],
            ),
            "the keys themselves come out, unquantised": lambda k, c: (k + 0, _quantise(k, c)[1]),
            "the two results are swapped: keys first, then the loss": lambda k, c: _quantise(k, c)[::-1],
            "the loss is the mean over the width d as well; the squared distance sums over it": _loss(
                lambda e: e.mean(-1).sum(1).mean()
            ),
            "the loss is the mean over the heads as well; it sums over them": _loss(lambda e: e.sum(-1).mean()),
            "the loss is the mean over everything: sum over width and heads, mean over batch and length": _loss(
                torch.mean
            ),
            "the loss is the sum over everything: over batch and length it is a mean": _loss(torch.sum),
            "the loss takes the distance; its square was asked for": _loss(lambda e: e.sum(-1).sqrt().sum(1).mean()),
        },
        verified="Forward the codeword, backward the key, and nothing for the codebook.",
    )
    return verdict if not verdict.ok else _leaves_codebook_alone(candidate, verdict)


def _leaves_codebook_alone(candidate: Any, verdict: Verdict) -> Verdict:
    """A gradient that nobody wanted is seen by asking for it."""
    k, codebook = (t.requires_grad_() for t in _keys(1, 2, 5, 3, 4, 100))
    for what, result in zip(("keys", "loss"), candidate(k, codebook), strict=True):
        (grad,) = torch.autograd.grad(result.sum(), codebook, allow_unused=True, retain_graph=True)
        if grad is not None and bool((grad != 0).any()):
            return Verdict(
                "wrong",
                f"✗ quantise: values and the gradient of k are right, but the {what} also sends a gradient into the "
                "codebook.\n  likely cause: codebook.detach() is missing. The codes follow their keys as averages; "
                "a gradient would be a second master.",
            )
    if not torch.equal(candidate(*_single())[0], _quantise(*_single())[0]):
        return Verdict(
            "wrong",
            "✗ quantise: right up to rounding, but the codewords do not come out bit for bit.\n  likely cause: "
            "k + (C - k).detach(), where (C - k) has been rounded. C + (k - k.detach()) adds an exact 0.",
        )
    return verdict


def _single() -> tuple[Tensor, Tensor]:
    k, codebook = _keys(1, 1, 200, 3, 8, 110)
    return 30 * k.float(), codebook.float()


# ---- attention over codes --------------------------------------------------------------------------------------------


def _over_codes(q: Tensor, codebook: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    log_count = torch.where(counts > 0, counts.clamp(min=1).log(), -torch.inf).unsqueeze(2)
    mean = sums / counts.clamp(min=1).unsqueeze(-1)
    return torch.softmax(q @ codebook.mT + log_count, dim=-1) @ mean


def _with(
    log_count: Callable[[Tensor], Tensor] = lambda n: torch.where(n > 0, n.clamp(min=1).log(), -torch.inf),
    mean: Callable[[Tensor, Tensor], Tensor] = lambda sums, n: sums / n.clamp(min=1).unsqueeze(-1),
    scale: Callable[[Tensor], float] = lambda q: 1.0,
) -> Callable[..., Tensor]:
    """Attention over codes with one part replaced."""

    def wrong(q: Tensor, codebook: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
        scores = q @ codebook.mT * scale(q) + log_count(counts).unsqueeze(2)
        return torch.softmax(scores, dim=-1) @ mean(sums, counts)

    return wrong


def check_attend_over_codes(candidate: Any) -> Verdict:
    """Exercise 4: ``attend_over_codes(q, codebook, sums, counts)`` -> (B, H, L, e); some codes are empty."""

    def case(batch: int, heads: int, length: int, codes: int, seed: int, far: float = 1.0) -> tuple[Tensor, ...]:
        k, codebook = _keys(batch, heads, length, 3, codes, seed)
        codebook[:, -1] = far * codebook[:, -1].abs()
        z = nearest_code(k, codebook[:, :-1])  # the last code has no key
        return (
            _draw(batch, heads, length, 3, seed=seed + 2),
            codebook,
            *code_sums(_draw(batch, heads, length, 4, seed=seed + 3), z, codes),
        )

    def shifted_by_all(q: Tensor, codebook: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
        """The maximum over all codes, empty ones too."""
        scores = q @ codebook.mT
        weight = torch.exp(scores - scores.amax(-1, keepdim=True))
        return weight @ sums / (weight @ counts.unsqueeze(-1))

    verdict = check(
        candidate,
        _over_codes,
        name="attend_over_codes",
        cases=[case(2, 3, 9, 5, 120), case(1, 1, 1, 3, 130), case(1, 2, 12, 4, 140)],
        suspects={
            "the counts are missing: a code with many keys must weigh as many": _with(torch.zeros_like),
            "the counts are missing, and empty codes are hidden: a code with many keys must weigh as many": _with(
                lambda n: torch.where(n > 0, 0.0, -torch.inf).to(n.dtype)
            ),
            "an empty code counts as one key: clamp(min=1).log() gives 0, but its score has to be -inf": _with(
                lambda n: n.clamp(min=1).log()
            ),
            "sums where means belong: the log count has already counted the keys": _with(mean=lambda sums, n: sums),
            "the count, not its logarithm, is added to the score": _with(lambda n: torch.where(n > 0, n, -torch.inf)),
            "the scores are divided by sqrt(d); here q is taken as it comes": _with(
                scale=lambda q: q.shape[-1] ** -0.5
            ),
            "not normalised: divide by the sum of the weights": lambda q, c, u, n: torch.exp(q @ c.mT) @ u,
        },
        gradients=False,  # counts are no variables; the gradients that matter are asked for below
    )
    if not verdict.ok:
        return verdict
    verdict = check(
        candidate,
        _over_codes,
        name="attend_over_codes",
        cases=[tuple(t.float() for t in case(1, 2, 6, 4, 150, far=1e4))],
        suspects={
            "an empty, far code: either its score is the maximum that is taken off, and all others fall below the "
            "smallest float, or no maximum is taken off and it overflows. Hide the empty codes first": shifted_by_all,
        },
        gradients=False,
    )
    if not verdict.ok:
        return verdict

    def through(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """As a function of the values, which the sums are made of."""
        return lambda q, codebook, v, z: attend(q, codebook, *code_sums(v, z, codebook.shape[1]))

    def attention(q: Tensor, codebook: Tensor, v: Tensor, z: Tensor) -> Tensor:
        return through(_over_codes)(q, codebook, v, z)

    k, codebook = _keys(2, 2, 8, 3, 5, 155)
    return check(
        through(candidate),
        attention,
        name="attend_over_codes",
        cases=[(_draw(2, 2, 8, 3, seed=156), codebook, _draw(2, 2, 8, 4, seed=157), nearest_code(k, codebook))],
        verified="Equal to attention over all keys, and the number of keys does not appear in it.",
    )


# ---- a causal block --------------------------------------------------------------------------------------------------


def _block(
    q: Tensor,
    z: Tensor,
    v: Tensor,
    codebook: Tensor,
    sums: Tensor,
    counts: Tensor,
    *,
    diagonal: int = 1,
    own: bool = True,
    cached: bool = True,
    newest: bool = False,
    carry: float = 1.0,
    add: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block: its own keys one by one, the older ones through their codes. One part replaced at a time."""
    new_sums, new_counts = code_sums(v, z, codebook.shape[1])
    later = carry * sums + add * new_sums, carry * counts + add * new_counts
    u, n = later if newest else (sums, counts)
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(diagonal)
    recent = torch.exp((q @ codewords(codebook, z).mT).masked_fill(past, -torch.inf)) * own
    over_codes = torch.exp(q @ codebook.mT) * cached
    above = recent @ v + over_codes @ u
    below = recent.sum(-1, keepdim=True) + over_codes @ n.unsqueeze(-1)
    return above / below, *later


def check_causal_block(candidate: Any) -> Verdict:
    """Exercise 5: ``causal_block(q, z, v, codebook, sums, counts)`` -> y, new sums, new counts."""

    def causal_block(
        q: Tensor, z: Tensor, v: Tensor, codebook: Tensor, sums: Tensor, counts: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _block(q, z, v, codebook, sums, counts)

    def case(batch: int, heads: int, length: int, codes: int, seed: int, before: int) -> tuple[Tensor, ...]:
        codebook = _draw(heads, codes, 3, seed=seed)
        g = torch.Generator().manual_seed(seed)
        earlier, z = (torch.randint(codes, (batch, heads, n), generator=g) for n in (max(before, 1), length))
        sums, counts = code_sums(_draw(batch, heads, max(before, 1), 4, seed=seed + 2), earlier, codes)
        v = _draw(batch, heads, length, 4, seed=seed + 3)
        return _draw(batch, heads, length, 3, seed=seed + 1), z, v, codebook, sums * (before > 0), counts * (before > 0)

    def wrong(**part: Any) -> Callable[..., Any]:
        return lambda *args: _block(*args, **part)

    def two_softmaxes(*args: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, sums, counts = _block(*args, cached=False)
        older = _over_codes(args[0], args[3], args[4], args[5]).nan_to_num()
        return y + older, sums, counts

    verdict = check(
        candidate,
        causal_block,
        name="causal_block",
        cases=[case(2, 3, 6, 5, 160, 9), case(1, 1, 1, 4, 170, 3), case(1, 2, 7, 4, 180, 0)],
        suspects={
            "the block's own future is seen: mask the keys after the query": wrong(diagonal=100),
            "a query does not see its own key: mask what comes after it, not the diagonal": wrong(diagonal=0),
            "the sums of earlier blocks are not read": wrong(cached=False),
            "the block's own keys are counted twice, and their future with them: y reads the new sums, it has to read "
            "the old ones": wrong(newest=True),
            "the new sums hold this block alone: add it to the old ones": wrong(carry=0.0),
            "the old sums are returned: this block has to be added": wrong(add=False),
            "two softmaxes added up: recent and older keys share one denominator": two_softmaxes,
        },
        gradients=False,  # counts are no variables; the gradients that matter are asked for below
    )
    if not verdict.ok:
        return verdict

    def two_blocks(run: Callable[..., Any]) -> Callable[..., Tensor]:
        """The second block's output, as a function of both blocks' values."""

        def second(q: Tensor, codebook: Tensor, v1: Tensor, z1: Tensor, v2: Tensor, z2: Tensor) -> Tensor:
            codes = codebook.shape[1]
            _, sums, counts = run(q, z1, v1, codebook, *(torch.zeros_like(x) for x in code_sums(v1, z1, codes)))
            return run(q, z2, v2, codebook, sums, counts)[0]

        return second

    def two_causal_blocks(q: Tensor, codebook: Tensor, v1: Tensor, z1: Tensor, v2: Tensor, z2: Tensor) -> Tensor:
        return two_blocks(causal_block)(q, codebook, v1, z1, v2, z2)

    (q, z1, v1, codebook, *_), (_, z2, v2, *_) = case(2, 2, 6, 5, 190, 1), case(2, 2, 6, 5, 200, 1)
    return check(
        two_blocks(candidate),
        two_causal_blocks,
        name="causal_block, two in a row",
        cases=[(q, codebook, v1, z1, v2, z2)],
        verified="Called block after block, it is causal attention over any length with a state of constant size.",
    )
