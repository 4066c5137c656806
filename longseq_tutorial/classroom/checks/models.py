"""The exercises of chapter 09: what a layer weighs, and what a token costs."""

from __future__ import annotations

from typing import Any

from longseq_tutorial.classroom.exercises import Verdict, check
from longseq_tutorial.models.configs import MegaConfig
from longseq_tutorial.models.mega import MegaLayer

__all__ = ["check_mega_layer_parameters", "check_products_a_token"]


def mega_layer_parameters(dim: int, n: int, z: int, v: int, positions: int) -> int:
    """Counted on the layer itself, as the package builds it."""
    config = MegaConfig(dim=dim, n=n, z_dim=z, v_dim=v, max_positions=positions, norm="layernorm")
    return sum(p.numel() for p in MegaLayer(config).parameters())


def check_mega_layer_parameters(candidate: Any) -> Verdict:
    """Exercise 1: ``mega_layer_parameters(dim, n, z, v, positions)``, a whole number."""
    true = mega_layer_parameters
    return check(
        candidate,
        true,
        name="mega_layer_parameters",
        cases=[(8, 4, 6, 12, 10), (5, 1, 3, 7, 1), (80, 16, 64, 160, 2002)],
        suspects={
            "the EMA of one direction only: a bidirectional one has two, with coefficients of their own": (
                lambda d, n, z, v, p: true(d, n, z, v, p) - 4 * d * n
            ),
            "a skip weight for each direction: both share one": lambda d, n, z, v, p: true(d, n, z, v, p) + d,
            "no skip weight: the EMA adds omega * x": lambda d, n, z, v, p: true(d, n, z, v, p) - d,
            "linear layers without their biases": lambda d, n, z, v, p: true(d, n, z, v, p) - (2 * d + z + 2 * v) - d,
            "a bias table with one number a position: distances run both ways, 2 * positions - 1 of them": (
                lambda d, n, z, v, p: true(d, n, z, v, p) - (p - 1)
            ),
            "2 * positions numbers in the table: distance 0 counts once": lambda d, n, z, v, p: true(d, n, z, v, p) + 1,
            "scale and shift once: queries and keys have their own": lambda d, n, z, v, p: true(d, n, z, v, p) - 2 * z,
            "no norm": lambda d, n, z, v, p: true(d, n, z, v, p) - 2 * d,
        },
        gradients=False,
        verified="For ListOps' layer (the last case) that is what the published code has, too.",
    )


def products_a_token(kind: str, length: int, z: int, v: int, size: int) -> int:
    """Operations of attention's matrix products for one token; a multiplication and an addition are two."""
    if kind == "features":
        return 4 * size * v
    return 2 * {"full": length, "chunk": size, "window": 2 * size + 1}[kind] * (z + v)


def check_products_a_token(candidate: Any) -> Verdict:
    """Exercise 2: ``products_a_token(kind, length, z, v, size)``, a number."""
    true = products_a_token

    def where(condition: str, wrong: Any) -> Any:
        return lambda kind, *rest: wrong(kind, *rest) if kind == condition else true(kind, *rest)

    return check(
        candidate,
        true,
        name="products_a_token",
        cases=[
            ("full", 1024, 64, 128, 1),
            ("chunk", 4096, 32, 48, 128),
            ("window", 4096, 32, 48, 16),
            ("features", 512, 64, 32, 256),
            ("full", 7, 3, 5, 2),
        ],
        suspects={
            "a multiplication and its addition counted as one": lambda *a: true(*a) // 2,
            "only the scores: the weighted values cost 2 v for each key as well": (
                lambda kind, length, z, v, size: true(kind, length, z, 0, size) if kind != "features" else 4 * size * v
            ),
            "only the values: a score costs 2 z": (lambda kind, length, z, v, size: true(kind, length, 0, v, size)),
            "a window of 2 w keys: the query's own position is one more": where(
                "window", lambda kind, length, z, v, size: 2 * 2 * size * (z + v)
            ),
            "a window to one side only": where("window", lambda kind, length, z, v, size: 2 * (size + 1) * (z + v)),
            "the whole sequence in each chunk: a query sees its own chunk only": where(
                "chunk", lambda kind, length, z, v, size: 2 * length * (z + v)
            ),
            "features counted once: each key writes the state, and each query reads it": where(
                "features", lambda kind, length, z, v, size: 2 * size * v
            ),
            "features that grow with the length: the state does not": where(
                "features", lambda kind, length, z, v, size: 4 * size * v * length
            ),
        },
        gradients=False,
        verified="Compare it with the figure above: these are most of what PyTorch counted.",
    )
