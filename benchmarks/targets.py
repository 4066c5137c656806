"""How fast each mechanism has to be: sizes, and the bars that hold there, beside the best peer of the same run.

* `bar`: the peer's time over ours, forward and backward, at least.
* `memory`: our peak over that peer's, at most.
* `floor`, `forward_floor`: our time over what the machine could do at best (`limits.py`), at most, with and without
  backward.
* `forbidden`: numbers in a tensor that must not be made.
* `share`: how much of our time a named part may take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longseq_tutorial import models

from .cases import QUADRATIC_MODELS, STEP
from .limits import CODES, POLES, STATE
from .measure import Ratio, Row, ratio
from .problems import Size


def every_pair(size: Size) -> int:
    return size.length**2


def every_pole(size: Size) -> int:
    return size.length * POLES * size.dim


def every_state(size: Size) -> int:
    return size.length * STATE // 2 * size.dim


def every_code(size: Size) -> int:
    return size.length * CODES * size.dim


@dataclass(frozen=True)
class Target:
    """One row of the table. `against` names the peer if it must be a certain one; else the best of the run."""

    case: str
    size: Size
    bar: float | None = None
    memory: float | None = None
    floor: float | None = None
    forward_floor: float | None = None
    forbidden: Callable[[Size], int] | None = every_pair
    share: tuple[str, float] | None = None
    against: str | None = None


TARGETS = [
    Target("ema", Size(2, 16384, 64), 10, forward_floor=6, forbidden=every_pole),
    Target("ema", Size(1, 16384, 256), 14, forward_floor=6, forbidden=every_pole),
    Target("ema-bidirectional", Size(2, 16384, 64), 14, forward_floor=6, forbidden=every_pole),
    Target("ema-bidirectional", Size(1, 16384, 256), 22, forward_floor=6, forbidden=every_pole),
    Target("s4d", Size(2, 4096, 64), 8, forbidden=every_state),
    Target("s4d", Size(1, 16384, 64), 16, forbidden=every_state),
    Target("s4", Size(2, 4096, 64), 6, memory=1 / 10, forbidden=every_state),
    Target("mega-chunk-layer", Size(2, 4096, 128), 5, floor=2.5, forbidden=every_pole),
    Target("mega-chunk-layer", Size(1, 16384, 128), 7, floor=2.5, forbidden=every_pole),
    Target("seqboat-layer", Size(2, 4096, 64), share=("EMA", 0.4)),
    Target("chunk-softmax", Size(2, 4096, 128), 0.95, floor=2.5),
    Target("chunk-laplace", Size(2, 4096, 128), 1.1, floor=2.5),
    Target("attention", Size(1, 4096, 64), 0.95, floor=2.5),
    Target("attention-wide-values", Size(1, 4096, 128), 1.15, floor=2.5),
    Target("vq-assignment", Size(2, 4096, 64), 1.2, against="torch cdist"),
    Target("vq", Size(2, 4096, 64), 7, forbidden=every_code),
    Target("vq-causal", Size(2, 4096, 64), 3, forbidden=every_code),
    Target("linear-causal", Size(1, 16384, 64), 1.2),
    Target("fft-bias", Size(2, 4096, 64), 1.4, forward_floor=1.3),
    Target("convolution", Size(2, 4096, 64), 1),
    Target("convolution", Size(2, 16384, 64), forward_floor=1.3),
    Target("convolution", Size(2, 4099, 64), 3, against="torch rfft of 2L"),
    Target("convolution", Size(2, 10007, 64), 3, against="torch rfft of 2L"),
    # A training step beside the Transformer's of the same width: from L = 2k on the linear models have to be faster.
    *(
        Target(STEP + name, Size(1, length, 128), 1 if length >= 2048 and name not in QUADRATIC_MODELS else None,
               forbidden=None)
        for name in models.NAMES
        for length in (1024, 2048, 4096)
        if name != "transformer"
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a row of the table came to. `failed` says which bars were missed."""

    target: Target
    ours: Row
    peer: Row | None
    ratio: Ratio | None
    share: float | None  # of our time, that the target's part took
    failed: list[str]

    @property
    def reached(self) -> bool:
        return not self.failed


def judge(target: Target, rows: list[Row]) -> Verdict:
    """Hold the rows of a target's run against its bars. Raises `ValueError` if what it needs was not measured."""
    ours = next(row for row in rows if row.candidate == "ours")
    peer = best_peer(target, rows)
    if peer is None and (target.bar is not None or target.memory is not None):
        raise ValueError(f"{target.case}: {target.against or 'a peer to compare with'} was not there.")
    beside = None if peer is None else ratio(peer, ours)
    failed = []
    if beside is not None and target.bar is not None and beside.median < target.bar:
        failed.append(f"time {beside.median:.2f}, wanted {target.bar:g}")
    if peer is not None and target.memory is not None and ours.bytes > target.memory * peer.bytes:
        failed.append(f"memory {ours.bytes / peer.bytes:.2f} of the peer's, wanted {target.memory:.2f}")
    for most, times, what in (
        (target.floor, ours.above_floor, "the floor"),
        (target.forward_floor, ours.forward_above_floor, "the floor of forward"),
    ):
        if most is not None and times is None:
            raise ValueError(f"{target.case}: no floor was measured.")
        if most is not None and times is not None and times > most:
            failed.append(f"{times:.1f} times {what}, wanted {most:g}")
    if target.forbidden is not None and ours.largest >= target.forbidden(target.size):
        failed.append(f"a tensor of {ours.largest:,} numbers, wanted fewer than {target.forbidden(target.size):,}")
    share = None
    if target.share is not None:
        name, most = target.share
        share = ratio(next(row for row in rows if row.candidate == name), ours).median
        if share > most:
            failed.append(f"{name} takes more than {most:.0%}")
    return Verdict(target, ours, peer, beside, share, failed)


def best_peer(target: Target, rows: list[Row]) -> Row | None:
    """The fastest of those that do all that ours does: one without a gradient is no match for one with."""
    ours = next(row for row in rows if row.candidate == "ours")
    peers = [row for row in rows if row is not ours and not row.part and bool(row.both) == bool(ours.both)]
    if target.against is not None:
        peers = [row for row in peers if row.candidate == target.against]
    return min(peers, key=lambda row: row.seconds, default=None)
