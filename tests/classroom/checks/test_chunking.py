"""Chapter 04's checks take the solution, see the stub, and name the cause of every plausible mistake."""

import math

import pytest
import torch
from torch.nn import functional as F

from longseq_tutorial.classroom.checks.chunking import (
    causal_bucket,
    check_causal_bucket,
    check_chunk_attention,
    check_first_felt,
    check_window_attention,
    check_window_mask,
    first_felt,
    window_mask,
)
from longseq_tutorial.classroom.exercises import assert_accepts, assert_rejects, assert_unsolved
from longseq_tutorial.mechanisms import chunking

# ---- the solutions, as a reader may write them -------------------------------------------------------------------


def mask(length, window, causal):
    rows = []
    for i in range(length):
        rows.append([(0 if causal else -window) <= i - j <= window for j in range(length)])
    return torch.tensor(rows)


def reach(position, layers, size):
    return size * (position // size), max(position - size * layers, 0)


def chunks(q, k, v, chunk):
    length = q.shape[1]
    missing = -length % chunk
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, chunk)) for x in (q, k, v))
    real = (torch.arange(length + missing) < length).view(-1, 1, chunk)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~real, -torch.inf)
    return (torch.softmax(scores, dim=-1) @ v).flatten(1, 2)[:, :length]


def bucket(distance, buckets, max_distance):
    half = buckets // 2
    wide = torch.log(distance.clamp(min=1) / half) / math.log(max_distance / half) * (buckets - half)
    return torch.where(distance < half, distance, half + wide.floor().long()).clamp(max=buckets - 1)


def windowed(q, k, v, window, table):
    length = q.shape[1]
    missing = -length % window
    q = F.pad(q, (0, 0, 0, missing)).unflatten(1, (-1, window))

    def views(x):
        blocks = F.pad(x, (0, 0, window, missing + window)).unflatten(1, (-1, window))
        return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2)

    real = views(torch.ones(1, length, 1, dtype=torch.bool)).mT
    offset = torch.arange(3 * window)[None, :] - window - torch.arange(window)[:, None]
    scores = q @ views(k).mT / math.sqrt(q.shape[-1]) + table[(offset + window).clamp(0, 2 * window)]
    scores = scores.masked_fill(~(real & (offset.abs() <= window)), -1e30)
    return (torch.softmax(scores, dim=-1) @ views(v)).flatten(1, 2)[:, :length]


def stub(*args):
    raise NotImplementedError("your turn: write it")


SOLVED = {
    check_window_mask: mask,
    check_first_felt: reach,
    check_chunk_attention: chunks,
    check_causal_bucket: bucket,
    check_window_attention: windowed,
}


@pytest.mark.parametrize("check", SOLVED)
def test_solution_is_accepted_and_stub_seen(check):
    assert_accepts(check, SOLVED[check])
    assert_unsolved(check, stub)
    assert not check(lambda *args: None).ok


def test_other_ways_to_the_same_are_accepted():
    assert_accepts(check_window_mask, window_mask)
    assert_accepts(check_first_felt, first_felt)
    assert_accepts(check_causal_bucket, causal_bucket)
    assert_accepts(check_window_attention, lambda q, k, v, w, t: chunking.window_attention(q, k, v, w, bias=t))
    assert_accepts(check_window_attention, lambda q, k, v, w, t: chunking.window_attention_slow(q, k, v, w, bias=t))


# ---- wrong answers -------------------------------------------------------------------------------------------------


def offsets(length):
    return torch.arange(length)[None, :] - torch.arange(length)[:, None]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda n, w, c: (offsets(n).abs() < w) & ((offsets(n) <= 0) | (not c)), ["off-by-one"]),
        (lambda n, w, c: window_mask(n, w, c).T, ["ahead instead of back"]),
        (lambda n, w, c: window_mask(n, w, False), ["future is not hidden"]),
        (lambda n, w, c: window_mask(n, w, True), ["causal always"]),
        (lambda n, w, c: window_mask(n, w, c) & ~(torch.eye(n, dtype=torch.bool) & c), ["does not see itself"]),
        (lambda n, w, c: window_mask(n, w // 2, c), ["half of it to each side"]),
        (lambda n, w, c: ~window_mask(n, w, c), ["exchanged"]),
        (lambda n, w, c: (offsets(n) >= -w) & ((offsets(n) <= 0) | (not c)), ["only the past is limited"]),
        (lambda n, w, c: window_mask(n, w, c).double(), ["dtype"]),
        (lambda n, w, c: window_mask(n, w, c)[0], ["shape"]),
    ],
)
def test_mask_mistakes(wrong, words):
    assert_rejects(check_window_mask, wrong, *words)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda p, n, s: reach(p, n, s)[::-1], ["wrong order"]),
        (lambda p, n, s: (max(0, p - p % s - (n - 1) * s), reach(p, n, s)[1]), ["do not add up"]),
        (lambda p, n, s: (max(0, p - s + 1), reach(p, n, s)[1]), ["only to the border"]),
        (lambda p, n, s: (max(0, p - n * s), reach(p, n, s)[1]), ["not reach back like a window"]),
        (lambda p, n, s: (p // s, reach(p, n, s)[1]), ["number of the chunk"]),
        (lambda p, n, s: (p % s, reach(p, n, s)[1]), ["distance to the border"]),
        (lambda p, n, s: (reach(p, n, s)[0], max(0, p - s)), ["grows with every layer"]),
        (lambda p, n, s: (reach(p, n, s)[0], max(0, p - n * (s - 1))), ["not w - 1"]),
        (lambda p, n, s: (reach(p, n, s)[0], p - n * s), ["nothing to feel"]),
        (lambda p, n, s: reach(p, n, s)[0], ["2 results"]),
    ],
)
def test_reach_mistakes(wrong, words):
    assert_rejects(check_first_felt, wrong, *words)


def chunks_with(pad="right", hide=True, cut=lambda x, c: x.unflatten(1, (-1, c)), scale=None, axis=-1):
    def go(q, k, v, chunk):
        length = q.shape[1]
        missing = -length % chunk
        around = (0, 0, 0, missing) if pad == "right" else (0, 0, missing, 0)
        real = cut(F.pad(torch.ones(1, length, 1), around), chunk)[..., 0][:, :, None, :] > 0
        q, k, v = (cut(F.pad(x, around), chunk) for x in (q, k, v))
        scores = q @ k.mT / (math.sqrt(q.shape[-1]) if scale is None else scale(q))
        scores = scores.masked_fill(~real, -1e30) if hide else scores
        y = (torch.softmax(scores, dim=axis) @ v).flatten(1, 2)
        return y[:, :length] if pad == "right" else y[:, missing:]

    return go


def every_nth(q, k, v, chunk):
    """Cut the wrong way around: positions 0, N, 2N .. together."""
    length, missing = q.shape[1], -q.shape[1] % chunk
    real = F.pad(torch.ones(1, length, 1), (0, 0, 0, missing)).unflatten(1, (chunk, -1)).transpose(1, 2)
    q, k, v = (F.pad(x, (0, 0, 0, missing)).unflatten(1, (chunk, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(real.mT == 0, -1e30)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(1, 2)[:, :length]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (chunks_with(hide=False), ["zeros that fill the last chunk"]),
        (chunks_with(pad="left"), ["shifts every border"]),
        (chunks_with(pad="left", hide=False), ["on the left, and the zeros"]),
        (chunks_with(cut=lambda x, c: x.unflatten(1, (c, -1))), ["pieces of length"]),
        (every_nth, ["every N-th position"]),
        (chunks_with(scale=lambda q: 1.0), ["1 / sqrt(z) is missing"]),
        (chunks_with(scale=lambda q: math.sqrt(q.shape[-2])), ["chunk length"]),
        (chunks_with(axis=-2), ["axis -2"]),
        (lambda q, k, v, c: F.scaled_dot_product_attention(q, k, v), ["nothing is cut"]),
        (lambda q, k, v, c: chunking.chunk_attention(q, k, v, c, causal=True), ["causal"]),
        (lambda q, k, v, c: chunking.window_attention(q, k, v, c), ["a window, not a chunk"]),
        (lambda q, k, v, c: chunks(q, k, v, c)[:, : q.shape[1] // c * c], ["shape"]),
        (lambda q, k, v, c: chunks(q.detach(), k, v, c), ["gradient"]),
    ],
)
def test_chunk_mistakes(wrong, words):
    assert_rejects(check_chunk_attention, wrong, *words)


def bucket_with(half=lambda b: b // 2, top=lambda b: b - 1, whole=torch.floor, ratio=None):
    def go(n, buckets, farthest):
        e = half(buckets)
        share = (
            (torch.log(n.clamp(min=1).double() / e) / math.log(farthest / e))
            if ratio is None
            else ratio(n, e, farthest)
        )
        return torch.where(n < e, n, (e + whole(share * (buckets - e)).long()).clamp(max=top(buckets)))

    return go


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (bucket_with(top=lambda b: 10**6), ["Clamp"]),
        (bucket_with(top=lambda b: b), ["off-by-one at the end"]),
        (bucket_with(whole=torch.round), ["floor"]),
        (bucket_with(whole=torch.ceil), ["rounded up"]),
        (bucket_with(half=lambda b: b // 4), ["a quarter"]),
        (bucket_with(ratio=lambda n, e, m: (n - e) / (m - e)), ["logarithm is missing"]),
        (bucket_with(ratio=lambda n, e, m: torch.log(n.clamp(min=1).double()) / math.log(m)), ["begins at 1"]),
        (
            bucket_with(ratio=lambda n, e, m: torch.log(n.clamp(min=1).double() / e) / math.log(m)),
            ["max_distance / half"],
        ),
        (lambda n, b, m: n.clamp(max=b - 1), ["a bucket of its own"]),
        (lambda n, b, m: bucket(n, b, m).double(), ["dtype"]),
    ],
)
def test_bucket_mistakes(wrong, words):
    assert_rejects(check_causal_bucket, wrong, *words)


def windowed_with(
    hide_ends=True,
    hide_fill=True,
    band=lambda o, w: o.abs() <= w,
    index=lambda o, w: (o + w).clamp(0, 2 * w),
    roll=False,
):
    def go(q, k, v, window, table):
        length, missing = q.shape[1], -q.shape[1] % window

        def views(x, ends=0.0, fill=0.0):
            x = F.pad(F.pad(x, (0, 0, 0, missing), value=fill), (0, 0, window, window), value=ends)
            blocks = x.unflatten(1, (-1, window))
            if roll:
                own = blocks[:, 1:-1]
                return torch.cat([own.roll(1, 1), own, own.roll(-1, 1)], dim=2)
            return torch.cat([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], dim=2)

        real = views(torch.ones(1, length, 1), float(not hide_ends), float(not hide_fill)).mT > 0
        q = F.pad(q, (0, 0, 0, missing)).unflatten(1, (-1, window))
        offset = torch.arange(3 * window)[None, :] - window - torch.arange(window)[:, None]
        scores = q @ views(k).mT / math.sqrt(q.shape[-1]) + table[index(offset, window)]
        scores = scores.masked_fill(~(real & band(offset, window)), -1e30)
        return (torch.softmax(scores, dim=-1) @ views(v)).flatten(1, 2)[:, :length]

    return go


def through_the_full_matrix(q, k, v, window, table):
    offset = offsets(q.shape[1])
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + table[(offset + window).clamp(0, 2 * window)]
    return torch.softmax(scores.masked_fill(offset.abs() > window, -torch.inf), dim=-1) @ v


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (windowed_with(hide_ends=False, hide_fill=False), ["before the first and after the last"]),
        (windowed_with(hide_ends=False), ["beyond the two ends"]),
        (windowed_with(hide_fill=False), ["fill the last block"]),
        (windowed_with(band=lambda o, w: o.abs() < 3 * w), ["all three blocks"]),
        (windowed_with(band=lambda o, w: o.abs() < max(w, 1)), ["off-by-one"]),
        (windowed_with(band=lambda o, w: (o <= 0) & (o >= -w)), ["future is hidden"]),
        (windowed_with(index=lambda o, w: (w - o).clamp(0, 2 * w)), ["turned around"]),
        (windowed_with(roll=True), ["rolled"]),
        (lambda q, k, v, w, t: windowed(q, k, v, w, 0 * t), ["bias is missing"]),
        (lambda q, k, v, w, t: windowed(q, k, v, w, t / math.sqrt(q.shape[-1])), ["before the scores are divided"]),
        (lambda q, k, v, w, t: windowed(2 * q, k, v, w, t), ["1 / sqrt(z) is missing"]),
        (lambda q, k, v, w, t: windowed(q, k, v, w, t.detach()), ["gradient"]),
        (through_the_full_matrix, ["still quadratic", "Reshape to blocks"]),
    ],
)
def test_window_mistakes(wrong, words):
    assert_rejects(check_window_attention, wrong, *words)


def test_a_loop_over_the_chunks_and_a_hidden_matrix_are_seen():
    def masked(q, k, v, chunk):
        place = torch.arange(q.shape[1]) // chunk
        return F.scaled_dot_product_attention(q, k, v, attn_mask=place[:, None] == place)

    assert_rejects(check_chunk_attention, chunking.chunk_attention_slow, "values are right", "loop over the chunks")
    assert_rejects(check_chunk_attention, masked, "values are right", "400 x 400")
