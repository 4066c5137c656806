"""Checks of chapter 05's exercises: the gate, extract, compress, the gradient of the choice, the memory of a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.classroom.watching import without_a_loop
from longseq_tutorial.mechanisms.sparse_activation import compress, extract

__all__ = ["check_choice_gradient", "check_compress", "check_extract", "check_gate", "check_remember"]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _active(batch: int, length: int, seed: int) -> Tensor:
    return _draw(batch, length, seed=seed) > 0


# ---- the gate ----------------------------------------------------------------------------------------------------


def _gate(logits: Tensor, log_temperature: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(logits / log_temperature.exp(), dim=-1)
    active = p[..., 1] > p[..., 0]
    return active, p.max(-1).values * active


def check_gate(candidate: Any) -> Verdict:
    """Exercise 1: ``gate(logits, log_temperature) -> (active, gate)``."""
    tied = _draw(2, 6, 2, seed=500)
    tied[0, 2] = tied[1, 5] = 0.7

    def with_softmax(finish: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
        return lambda u, t: finish(torch.softmax(u / t.exp(), dim=-1), u)

    def chosen(p: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        return active, p.max(-1).values * active

    def decided(p: Tensor) -> tuple[Tensor, Tensor]:
        return chosen(p, p[..., 1] > p[..., 0])

    return check(
        candidate,
        _gate,
        name="gate",
        cases=[
            (tied, torch.tensor([0.4], dtype=torch.float64)),
            (_draw(1, 1, 2, seed=501), torch.tensor([-0.3], dtype=torch.float64)),
            (_draw(3, 5, 2, seed=502), torch.tensor([1.1], dtype=torch.float64)),
        ],
        suspects={
            "ties count as active: wanted p[1] > p[0], strictly (argmax, too, takes the first of equals)": with_softmax(
                lambda p, u: chosen(p, p[..., 1] >= p[..., 0])
            ),
            "the two choices are swapped: index 0 is skip, index 1 activate": with_softmax(
                lambda p, u: chosen(p, p[..., 0] > p[..., 1])
            ),
            "the logits are divided by log_temperature itself: the temperature is its exponential": lambda u, t: (
                decided(torch.softmax(u / t, -1))
            ),
            "the logits are multiplied by the temperature: dividing is what softens": lambda u, t: decided(
                torch.softmax(u * t.exp(), -1)
            ),
            "the temperature is missing": lambda u, t: decided(torch.softmax(u, -1)),
            "the confidence is given to sleeping tokens too: the gate is 0 there": with_softmax(
                lambda p, u: (p[..., 1] > p[..., 0], p.max(-1).values)
            ),
            "the gate is 1 for every active token: the confidence is missing": with_softmax(
                lambda p, u: (p[..., 1] > p[..., 0], (p[..., 1] > p[..., 0]).to(p.dtype))
            ),
            "the softmax runs along the sequence: it is over the two choices of each token, dim=-1": lambda u, t: (
                chosen(torch.softmax(u / t.exp(), 1), u[..., 1] > u[..., 0])
            ),
        },
        verified="The decision has no gradient, the confidence has.",
    )


# ---- extract -------------------------------------------------------------------------------------------------------


def check_extract(candidate: Any) -> Verdict:
    """Exercise 2: ``extract(y, index) -> (B, L, d)``."""

    def case(batch: int, length: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
        active = _active(batch, length, seed)
        active[0], active[1, 0] = False, True
        packed, index = compress(_draw(batch, length, dim, seed=seed + 1), active)
        return packed + 1, index

    def rows(y: Tensor, index: Tensor) -> Tensor:
        return y.gather(1, index.unsqueeze(-1).expand(-1, -1, y.shape[2]))

    def wrapped(y: Tensor, index: Tensor) -> Tensor:
        return rows(y, (index - 1) % y.shape[1])

    def first_sample(y: Tensor, index: Tensor) -> Tensor:
        return extract(y[:1].expand_as(y), index)

    verdict = check(
        candidate,
        extract,
        name="extract",
        cases=[case(3, 9, 2, 510), case(2, 1, 3, 513), case(2, 12, 1, 516)],
        suspects={
            "sleeping tokens (index 0) read the last row: index - 1 is -1 there, and Python counts -1 from the end": (
                wrapped
            ),
            "sleeping tokens (index 0) read the first row: they must get zeros": lambda y, i: rows(
                y, (i - 1).clamp(min=0)
            ),
            "an off-by-one: ranks begin at 1, rows at 0": lambda y, i: (
                rows(y, i.clamp(max=y.shape[1] - 1)) * (i > 0).unsqueeze(-1)
            ),
            "every sample reads from the first sample's rows": first_sample,
            "the rows come back packed, not at the positions they had": lambda y, i: extract(
                y, torch.arange(1, i.shape[1] + 1).clamp(max=y.shape[1]).expand_as(i)
            ),
        },
        verified="Sleeping tokens get exactly 0.",
    )
    cause = "a loop over positions. The ranks are addresses: gather, or index_select, reads all rows at once."
    return without_a_loop(verdict, "extract", candidate, case(2, 20, 2, 516), case(2, 200, 2, 516), cause)


# ---- compress ------------------------------------------------------------------------------------------------------


def check_compress(candidate: Any) -> Verdict:
    """Exercise 3: ``compress(x, active) -> (packed, index)``, without a loop."""

    def case(batch: int, length: int, dim: int, seed: int, asleep: bool = False) -> tuple[Tensor, Tensor]:
        active = _active(batch, length, seed)
        active[0, ::2] = True
        x = _draw(batch, length, dim, seed=seed + 1)
        # Nobody awake, no gradient to ask for: whole numbers have none.
        return ((10 * x).long(), torch.zeros_like(active)) if asleep else (x, active)

    def right_aligned(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        packed, index = compress(x, active)
        free = packed.shape[1] - index.amax(1)
        return torch.stack([row.roll(int(n), 0) for row, n in zip(packed, free, strict=True)]), index

    def backwards(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        packed, index = compress(x.flip(1), active.flip(1))
        return packed, index.flip(1)

    def whole(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        packed, index = compress(x, active)
        return torch.nn.functional.pad(packed, (0, 0, 0, x.shape[1] - packed.shape[1])), index

    def with_waste(x: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        packed, index = compress(x, active)
        return torch.nn.functional.pad(packed, (0, 0, 1, 0)), index

    verdict = check(
        candidate,
        compress,
        name="compress",
        cases=[case(3, 9, 2, 520), case(1, 1, 3, 522), case(2, 12, 1, 524), case(2, 5, 2, 526, asleep=True)],
        suspects={
            "ranks are counted from 0: then 0 could not mean 'asleep'": lambda x, a: (
                compress(x, a)[0],
                ((a.cumsum(1) - 1) * a),
            ),
            "sleeping tokens keep a rank: multiply the running count by active": lambda x, a: (
                compress(x, a)[0],
                a.cumsum(1),
            ),
            "the count runs over the batch, not along the sequence: cumsum(1)": lambda x, a: (
                compress(x, a)[0],
                a.cumsum(0) * a,
            ),
            "the rows stand at the end, zeros before them: zeros come last": right_aligned,
            "the tokens come out last first: order is kept": backwards,
            "packed has L rows: cut it to M, the largest count in the batch (at least 1)": whole,
            "the waste bin for sleeping tokens is still there: drop row 0": with_waste,
            "nothing is packed: x * active leaves every token where it was": lambda x, a: (
                x * a.unsqueeze(-1),
                compress(x, a)[1],
            ),
        },
        verified="And extract(compress(x)) = x * active.",
    )
    cause = "a loop over positions. The ranks are addresses: scatter, or index_copy, writes all rows at once."
    return without_a_loop(verdict, "compress", candidate, case(2, 20, 2, 520), case(2, 200, 2, 520), cause)


# ---- the gradient of the choice --------------------------------------------------------------------------------------


def _choice_gradient(logits: Tensor, log_temperature: Tensor, attended: Tensor, upstream: Tensor) -> Tensor:
    tau = log_temperature.exp()
    p = torch.softmax(logits / tau, dim=-1)
    c = p.max(-1).values
    pull = c * (1 - c) / tau * (upstream * attended).sum(-1) * (p[..., 1] > p[..., 0])  # (B, L)
    return torch.stack([-pull, pull], dim=-1)


def check_choice_gradient(candidate: Any) -> Verdict:
    """Exercise 4: ``choice_gradient(logits, log_temperature, attended, upstream) -> (B, L, 2)``."""

    def case(batch: int, length: int, dim: int, seed: int) -> tuple[Tensor, ...]:
        temperature = 0.3 + 0.2 * _draw(1, seed=seed + 3)
        logits = _draw(batch, length, 2, seed=seed)
        logits[0, 0] = torch.tensor([-0.5, 0.6])  # awake, also in the shortest case
        return logits, temperature, _draw(batch, length, dim, seed=seed + 1), _draw(batch, length, dim, seed=seed + 2)

    def wrong(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``change(c, tau, product (B, L, D), active)`` gives the pull (B, L)."""

        def gradient(logits: Tensor, log_temperature: Tensor, attended: Tensor, upstream: Tensor) -> Tensor:
            tau = log_temperature.exp()
            p = torch.softmax(logits / tau, dim=-1)
            pull = change(p.max(-1).values, tau, upstream * attended, p[..., 1] > p[..., 0])
            return torch.stack([-pull, pull], dim=-1)

        return gradient

    return check(
        candidate,
        _choice_gradient,
        name="choice_gradient",
        cases=[case(2, 7, 3, 530), case(1, 1, 2, 540), case(3, 4, 1, 550)],
        suspects={
            "sleeping tokens get a gradient too: their output is 0 whatever c is, so multiply by active": wrong(
                lambda c, tau, product, active: c * (1 - c) / tau * product.sum(-1)
            ),
            "1/tau is missing: the softmax saw logits / tau": wrong(
                lambda c, tau, product, active: c * (1 - c) * product.sum(-1) * active
            ),
            "tau multiplies instead of dividing": wrong(
                lambda c, tau, product, active: c * (1 - c) * tau * product.sum(-1) * active
            ),
            "the derivative of the softmax, c (1 - c), is only c": wrong(
                lambda c, tau, product, active: c / tau * product.sum(-1) * active
            ),
            "the derivative of the softmax, c (1 - c), is only 1 - c": wrong(
                lambda c, tau, product, active: (1 - c) / tau * product.sum(-1) * active
            ),
            "the derivative of the softmax is missing": wrong(
                lambda c, tau, product, active: product.sum(-1) / tau * active
            ),
            "the two logits are exchanged: the activate logit, index 1, is the one that raises c": lambda *a: (
                -_choice_gradient(*a)
            ),
            "only the activate logit gets a gradient: raising the skip logit lowers c by as much": lambda *a: (
                _choice_gradient(*a) * torch.tensor([0.0, 1.0], dtype=a[0].dtype)
            ),
            "both logits get the same sign: what one gains the other loses": lambda *a: (
                _choice_gradient(*a) * torch.tensor([-1.0, 1.0], dtype=a[0].dtype)
            ),
            "the channels are averaged: the scalar product is a sum": wrong(
                lambda c, tau, product, active: c * (1 - c) / tau * product.mean(-1) * active
            ),
        },
        gradients=False,
        verified="That is all the configurator ever learns from.",
    )


# ---- the memory of a stream ------------------------------------------------------------------------------------------


def _remember(keys: Tensor, filled: Tensor, new: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    moved = torch.cat([keys[:, 1:], new.unsqueeze(1)], dim=1)
    return torch.where(active[:, None, None], moved, keys), (filled + active).clamp(max=keys.shape[1])


def check_remember(candidate: Any) -> Verdict:
    """Exercise 5: ``remember(keys, filled, new, active) -> (keys, filled)``."""

    def case(batch: int, slots: int, width: int, active: list[bool], seed: int) -> tuple[Tensor, ...]:
        filled = torch.arange(batch) % (slots + 1)
        filled[-1] = slots  # one is full
        keys = _draw(batch, slots, width, seed=seed)
        return keys, filled, _draw(batch, width, seed=seed + 1), torch.tensor(active)

    def together(keys: Tensor, filled: Tensor, new: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        return _remember(keys, filled, new, active.any().expand_as(active))

    def newest_first(keys: Tensor, filled: Tensor, new: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.cat([new.unsqueeze(1), keys[:, :-1]], dim=1)
        return torch.where(active[:, None, None], moved, keys), (filled + active).clamp(max=keys.shape[1])

    def no_shift(keys: Tensor, filled: Tensor, new: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.cat([keys[:, :-1], new.unsqueeze(1)], dim=1)
        return torch.where(active[:, None, None], moved, keys), (filled + active).clamp(max=keys.shape[1])

    def growing(keys: Tensor, filled: Tensor, new: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([keys, new.unsqueeze(1)], dim=1), filled + active

    def zeros_for_sleepers(keys: Tensor, filled: Tensor, new: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        moved = torch.cat([keys[:, 1:], (new * active.unsqueeze(1)).unsqueeze(1)], dim=1)
        return moved, (filled + active).clamp(max=keys.shape[1])

    verdict = check(
        candidate,
        _remember,
        name="remember",
        cases=[
            case(4, 3, 2, [True, False, True, True], 560),
            case(1, 1, 3, [True], 570),
            case(3, 5, 1, [False, False, False], 580),
            case(3, 2, 2, [False, True, False], 590),
        ],
        suspects={
            "one active sample moves the memory of all: the sleeping ones must keep theirs (torch.where on active)": (
                together
            ),
            "sleeping samples take in a row of zeros: they must keep their memory as it is": zeros_for_sleepers,
            "the newest token stands first: it comes last, and the first, the oldest, falls out": newest_first,
            "the newest overwrites the last slot and nothing moves: the oldest, the first, must fall out": no_shift,
            "filled grows beyond the number of slots": lambda k, f, n, a: (_remember(k, f, n, a)[0], f + a),
            "filled counts sleeping samples too": lambda k, f, n, a: (
                _remember(k, f, n, a)[0],
                (f + 1).clamp(max=k.shape[1]),
            ),
            "filled is not counted up": lambda k, f, n, a: (_remember(k, f, n, a)[0], f),
            "nothing is ever forgotten: the memory must keep its size": growing,
        },
        verified="Its size is the same after ten steps and after ten million.",
    )
    cause = "a loop over the batch. torch.where(active[:, None, None], moved, keys) decides for all at once."
    return without_a_loop(
        verdict, "remember", candidate, case(4, 3, 2, [True] * 4, 560), case(40, 3, 2, [True] * 40, 560), cause
    )
