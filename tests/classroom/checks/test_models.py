import pytest

from longseq_tutorial.classroom.checks.models import check_mega_layer_parameters, check_products_a_token
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved


def layer(dim, n, z, v, positions, directions=2):
    ema = directions * dim * 4 * n + dim
    linear = (dim + 1) * v + (dim + 1) * (2 * dim + z + v) + (v + 1) * dim
    return ema + linear + 4 * z + (2 * positions - 1) + 2 * dim


def products(kind, length, z, v, size):
    things = {"full": length, "chunk": size, "window": 2 * size + 1}
    return 4 * size * v if kind == "features" else 2 * things[kind] * (z + v)


def test_solutions():
    assert_accepts(check_mega_layer_parameters, layer)
    assert_accepts(check_products_a_token, products)


@pytest.mark.parametrize("exercise", [check_mega_layer_parameters, check_products_a_token])
def test_stubs(exercise):
    def stub(*arguments):
        raise NotImplementedError("your turn: think")

    assert_unsolved(exercise, stub)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda *a: layer(*a, directions=1), ["one direction only"]),
        (lambda d, n, z, v, p: layer(d, n, z, v, p) + d, ["skip weight for each direction"]),
        (lambda d, n, z, v, p: layer(d, n, z, v, p) - d, ["no skip weight"]),
        (lambda d, n, z, v, p: layer(d, n, z, v, p) - (v + d + d + z + v + d + d) + d, ["without their biases"]),
        (lambda d, n, z, v, p: layer(d, n, z, v, p) - (2 * p - 1) + p, ["one number a position"]),
        (lambda d, n, z, v, p: layer(d, n, z, v, p) - 2 * z, ["scale and shift once"]),
        (lambda d, n, z, v, p: layer(d, n, z, v, p) - 2 * d, ["no norm"]),
    ],
)
def test_layers_that_weigh_something_else(wrong, words):
    assert_rejects(check_mega_layer_parameters, wrong, *words)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda *a: products(*a) // 2, ["counted as one"]),
        (lambda k, n, z, v, s: products(k, n, z, 0 if k != "features" else v, s), ["only the scores"]),
        (lambda k, n, z, v, s: products(k, n, 0, v, s), ["only the values"]),
        (lambda k, n, z, v, s: 4 * s * (z + v) if k == "window" else products(k, n, z, v, s), ["own position"]),
        (lambda k, n, z, v, s: products("full" if k == "chunk" else k, n, z, v, s), ["its own chunk only"]),
        (lambda k, n, z, v, s: 2 * s * v if k == "features" else products(k, n, z, v, s), ["counted once"]),
    ],
)
def test_other_bills(wrong, words):
    assert_rejects(check_products_a_token, wrong, *words)
