"""Each check of chapter 03 takes the solution, knows the stub, and names the cause of plausible wrong answers."""

import math

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks import gated_attention as checks
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms.gated_attention import (
    LAPLACE_MEAN,
    LAPLACE_STD,
    GatedAttention,
    RelativeBias,
    attend,
    laplace,
    relu2,
)

CHECKS = {
    checks.check_bias_matrix: checks.bias_matrix,
    checks.check_gate_mix: checks.gate_mix,
    checks.check_bell_through: checks.bell_through,
    checks.check_squashed_weights: checks.squashed_weights,
    checks.check_attend_step: checks.attend_step,
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_takes_the_truth_and_knows_a_stub(check):
    def stub(*arguments):
        raise NotImplementedError("your turn: write it")

    assert_accepts(check, CHECKS[check])
    assert_unsolved(check, stub)


# ---- 1: the relative bias


def bias_by_loops(table, length):
    middle = len(table) // 2
    return torch.stack([torch.stack([table[middle + j - i] for j in range(length)]) for i in range(length)])


def bias_with(index):
    def wrong(table, length):
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        return table[index(i, j, len(table) // 2, length)]

    return wrong


def test_bias_takes_another_way_to_write_it():
    assert_accepts(checks.check_bias_matrix, bias_by_loops)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (bias_with(lambda i, j, p, n: i - j + p), "transposed"),
        (lambda table, n: bias_by_loops(table, n).T, "transposed"),
        (bias_with(lambda i, j, p, n: j - i + n - 1), "stands in the middle of the table"),
        (bias_with(lambda i, j, p, n: (j - i + p + 1).clamp(max=2 * p)), "off-by-one"),
        (bias_with(lambda i, j, p, n: j - i), "counts from the end"),
        (bias_with(lambda i, j, p, n: (j - i).abs() + p), "absolute distance"),
        (bias_with(lambda i, j, p, n: (j - i) % n + p), "circulant"),
        (bias_with(lambda i, j, p, n: j.expand(n, n)), "absolute position"),
        (lambda table, n: bias_by_loops(table, n).float(), "dtype"),
        (lambda table, n: bias_by_loops(table.detach(), n), "no gradient reaches table"),
    ],
)
def test_bias_names_the_cause(wrong, words):
    assert_rejects(checks.check_bias_matrix, wrong, words)


# ---- 2: the gates


def test_gate_mix_is_what_the_module_does():
    torch.manual_seed(0)
    unit = GatedAttention(5, 4, 6, max_positions=9).double()
    torch.nn.init.normal_(unit.mx_proj.weight)
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    update, z, reset, candidate = unit.mx_proj(x).split([5, 4, 6, 5], dim=-1)
    q, k = (F.silu(z) * unit.kappa[i] + unit.mu[i] for i in (0, 1))
    found = attend(q, k, F.silu(unit.v_proj(x)), bias=unit.bias(9))
    y = checks.gate_mix(found, reset, update, candidate + unit.h_proj.bias, x, unit.h_proj.weight)
    torch.testing.assert_close(y, unit(x))


def gates(found, reset, update, candidate, x, weight, *, way="right"):
    r = {"sigmoid reset": torch.sigmoid, "raw reset": lambda t: t, "no reset": torch.ones_like}.get(way, F.silu)(reset)
    inside = (found * r) @ weight.T
    h = {"no silu": candidate + inside, "silu of one": candidate + F.silu(inside), "tanh": (candidate + inside).tanh()}
    h = h.get(way, F.silu(inside) if way == "no candidate" else F.silu(candidate + inside))
    phi = {"raw update": update, "silu update": F.silu(update)}.get(way, update.sigmoid())
    if way == "round":
        return x.lerp(h, 1 - phi)
    if way == "residual":
        return x + phi * h
    if way == "lost":
        return phi * h
    if way == "twice":
        return x + x.lerp(h, phi)
    return x + phi * (h - x)


def test_gate_mix_takes_another_way_to_write_it():
    assert_accepts(checks.check_gate_mix, lambda found, r, u, c, x, w: gates(found, r, u, c, x, w))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("round", "wrong way round"),
        ("residual", "a residual too many"),
        ("lost", "the input is lost"),
        ("twice", "ordinary residual"),
        ("raw update", "sigmoid is missing"),
        ("silu update", "it wants a sigmoid"),
        ("sigmoid reset", "the reset gate is a sigmoid"),
        ("raw reset", "raw logit"),
        ("no reset", "the reset gate is missing"),
        ("no silu", "SiLU around the candidate is missing"),
        ("silu of one", "one part only"),
        ("no candidate", "candidate's own part"),
        ("tanh", "tanh"),
    ],
)
def test_gate_mix_names_the_cause(way, words):
    def wrong(found, r, u, c, x, w):
        return gates(found, r, u, c, x, w, way=way)

    assert_rejects(checks.check_gate_mix, wrong, words)


# ---- 3: the Laplace function


def test_bell_through_gives_the_constants_of_the_code_and_meets_its_conditions():
    point = torch.tensor(0.5, dtype=torch.float64).sqrt()
    mean, std = checks.bell_through(point, point**2, 2 * point)
    assert abs(mean - LAPLACE_MEAN) < 1e-6 and abs(std - LAPLACE_STD) < 1e-6
    point, value, slope = torch.tensor([[0.3], [0.8], [0.6]], dtype=torch.float64)
    mean, std = checks.bell_through(point, value, slope)
    x = point.clone().requires_grad_()
    y = torch.distributions.Normal(mean, std).cdf(x)
    torch.testing.assert_close(y.detach(), value)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope)


def bell(point, value, slope, *, way="right"):
    w = math.sqrt(2) * torch.erfinv(2 * value - 1)
    height = torch.distributions.Normal(0.0, 1.0).log_prob(w.float() if way == "single" else w).exp()
    std = {
        "peak": 1 / (slope * math.sqrt(2 * math.pi)),
        "no pi": torch.exp(-w * w / 2) / slope,
        "grows": height * slope,
        "erf": math.sqrt(2) * height / slope,
        "variance": (height / slope) ** 2,
    }.get(way, height / slope)
    mean = {"at the point": point, "other side": point + std * w}.get(way, point - std * w)
    return (std, mean) if way == "order" else (mean, std**2 if way == "variance out" else std)


def test_bell_takes_another_way_to_write_it():
    assert_accepts(checks.check_bell_through, lambda p, v, s: bell(p, v, s))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("order", "wrong order"),
        ("at the point", "always put at the point"),
        ("other side", "wrong side"),
        ("peak", "the one at the mean"),
        ("no pi", "sqrt(2 pi)"),
        ("grows", "divide by the slope"),
        ("erf", "sqrt(2) too many"),
        ("variance", "variance"),
        ("variance out", "the variance is returned"),
        ("single", "float32"),
    ],
)
def test_bell_names_the_cause(way, words):
    assert_rejects(checks.check_bell_through, lambda p, v, s: bell(p, v, s, way=way), words)


# ---- 4: weights of laplace and relu2


def squashed(q, k, bias, mask, causal, squash, *, way="right"):
    length = q.shape[1]
    visible = mask[:, :, None] if way == "rows" else (~mask if way == "inverted" else mask)[:, None, :]
    visible = visible.expand(len(q), length, length)
    if way == "no padding":
        visible = torch.ones_like(visible)
    if causal and way != "not causal":
        every = torch.ones(length, length, dtype=torch.bool)
        past = {"no diagonal": every.tril(-1), "future": every.triu()}.get(way, every.tril())
        visible = visible & past
    count = {
        "L": torch.tensor(length),
        "real": mask.sum(-1).clamp(min=1)[:, None, None],
        "rows i": (torch.arange(length) + 1 if causal else torch.full((length,), length))[:, None],
        "undivided": torch.tensor(1),
        "softmax scale": torch.tensor(math.sqrt(q.shape[-1])),
    }.get(way, visible.sum(-1, keepdim=True).clamp(min=1))
    count = count.to(q.dtype)
    dot = torch.einsum("bid,bjd->bij", q, k)
    if way == "first of all":
        return squash((dot * visible) / count + bias)
    if way == "bias too":
        scores = (dot + bias) / count
    else:
        scores = dot / count + {"no bias": 0, "bias.T": bias.T}.get(way, bias)
    if way == "mask first":
        return squash(scores * visible)
    weights = squash(scores)
    if way == "unhidden":
        return weights
    weights = weights * visible
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12) if way == "sum to 1" else weights


def test_squashed_weights_takes_other_ways_to_write_it():
    assert_accepts(checks.check_squashed_weights, lambda q, k, b, m, c, f: squashed(q, k, b, m, c, f))

    def minus_infinity_first(q, k, b, m, c, f):  # laplace(-inf) and relu2(-inf) are 0: that is right as well
        length = q.shape[1]
        past = torch.ones(length, length).tril() if c else torch.ones(length, length)
        hidden = (m[:, None, :] * past) == 0
        count = (~hidden).sum(-1, keepdim=True).clamp(min=1)
        return f((q @ k.mT / count + b).masked_fill(hidden, -math.inf))

    assert_accepts(checks.check_squashed_weights, minus_infinity_first)


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("mask first", "before the function"),
        ("first of all", "before the bias and the function"),
        ("L", "divided by L"),
        ("real", "a number of its own for each row"),
        ("rows i", "padding among those keys"),
        ("undivided", "not divided"),
        ("softmax scale", "softmax's scale"),
        ("bias too", "the bias is divided"),
        ("no bias", "the bias is missing"),
        ("bias.T", "transposed"),
        ("no diagonal", "diagonal"),
        ("future", "hides the past"),
        ("inverted", "wrong way round"),
        ("rows", "columns (keys)"),
        ("no padding", "padding mask is not applied"),
        ("not causal", "causal mask is not applied"),
        ("unhidden", "keep their weights"),
        ("sum to 1", "normalised"),
    ],
)
def test_squashed_weights_names_the_cause(way, words):
    def wrong(q, k, b, m, c, f):
        return squashed(q, k, b, m, c, f, way=way)

    assert_rejects(checks.check_squashed_weights, wrong, words)


def test_squashed_weights_sees_a_division_by_zero_in_the_gradient():
    def unclamped(q, k, b, m, c, f):
        length = q.shape[1]
        past = torch.ones(length, length, dtype=torch.bool)
        visible = m[:, None, :] & (past.tril() if c else past)
        return f(q @ k.mT / visible.sum(-1, keepdim=True) + b).masked_fill(~visible, 0.0)

    assert_rejects(checks.check_squashed_weights, unclamped, "NaN")


# ---- 5: one step with a cache


def step(q_t, k_t, v_t, keys, values, table, *, way="right"):
    old = keys, values
    ends = [(k_t.unsqueeze(1), keys), (v_t.unsqueeze(1), values)]
    keys, values = (torch.cat(pair if way == "front" else pair[::-1], dim=1) for pair in ends)
    middle, now = (len(table) - 1) // 2, keys.shape[1] - 1
    offsets = torch.arange(-now, 1)
    bias = {
        "i - j": table[middle - offsets],
        "to the right": table[middle : middle + now + 1],
        "flipped": table[middle + offsets].flip(0),
        "start": table[: now + 1],
        "one off": torch.cat([table[:1], table])[middle + offsets],
        "no bias": torch.zeros_like(table[: now + 1]),
    }.get(way, table[middle + offsets])
    scale = {"no scale": 1.0, "z": q_t.shape[1], "keys": now + 1, "root keys": math.sqrt(now + 1)}
    look, read = old if way == "not itself" else (keys, values)
    scores = (look @ q_t[..., None])[..., 0] / scale.get(way, math.sqrt(q_t.shape[1])) + bias[: look.shape[1]]
    weights = scores.exp() if way == "exp" else scores.softmax(0 if way == "batch" else -1)
    found = (weights[..., None] * read).sum(1)
    return (found, *(old if way == "old caches" else (keys, values)))


def test_attend_step_takes_another_way_to_write_it():
    assert_accepts(checks.check_attend_step, lambda q, k, v, ks, vs, table: step(q, k, v, ks, vs, table))


def test_attend_step_is_causal_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, width, dtype=torch.float64) for width in (4, 4, 3))
    bias = RelativeBias(12).double()
    keys, values, rows = k[:, :0], v[:, :0], []
    for t in range(9):
        found, keys, values = checks.attend_step(q[:, t], k[:, t], v[:, t], keys, values, bias.table)
        rows.append(found)
    torch.testing.assert_close(torch.stack(rows, 1), attend(q, k, v, bias=bias(9), causal=True))


@pytest.mark.parametrize(
    ("way", "words"),
    [
        ("not itself", "also sees itself"),
        ("no scale", "scale 1 / sqrt(z) is missing"),
        ("z", "by z, not by sqrt(z)"),
        ("keys", "for laplace and relu2"),
        ("root keys", "width of a key"),
        ("batch", "wrong axis"),
        ("exp", "not normalised"),
        ("i - j", "read at i - j"),
        ("to the right", "middle to the right"),
        ("flipped", "wrong order"),
        ("start", "start of the table"),
        ("one off", "off-by-one"),
        ("no bias", "bias is missing"),
        ("old caches", "have not grown"),
        ("front", "in front"),
    ],
)
def test_attend_step_names_the_cause(way, words):
    def wrong(q, k, v, ks, vs, table):
        return step(q, k, v, ks, vs, table, way=way)

    assert_rejects(checks.check_attend_step, wrong, words)


def test_functions_of_the_cases_are_named_as_the_truth_expects():
    assert laplace.__name__ == "laplace" and relu2.__name__ == "relu2"
