"""Pathfinder's pictures: two long dashed paths, short dashed distractors, and two dots to be joined or not.

    label 1: both dots lie on the ends of one path            label 0: they lie on two different paths

The rule is Linsley et al.'s (2018) with the settings that the Long Range Arena documents. A path is a chain of
short strokes, "paddles". The next paddle starts from a ring around the last one's head, rather straight on than
round a bend, and never where a paddle would touch another. Most pairs of paths get stuck and are thrown away: at
32 x 32 pixels about one in twenty-five is ever finished.

So the trick is to make a failure cheap. Hundreds of pairs grow side by side, each on a small map of what is taken,
and nothing is painted before a pair is whole. Every paddle is a stamp made beforehand, for 360 + K directions, and
the map dilated by the margin, which the rule asks for at every step, is never computed: dilation commutes with the
maximum, so we keep a second map into which the dilated stamps go.

Coordinates are (row, column), rows downwards; a direction o moves by (sin o, cos o), rounded up. Maps and stamps
hold 0 to 255 for 0 to 1, on a canvas with a margin on all sides, addressed by flat index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .base import DataError

DEGREES = 360  # whole degrees that the first paddle of a path may point in; stamp d has the direction d - 180
BLOCKED = 459  # 1.8 * 255: a paddle may not be placed where map + footprint reach this ...
CORE = BLOCKED - 255  # ... which only the footprint's pixels from here on can
FREE = 76  # 0.3 * 255: a distractor starts where the map is no higher
TRIES = 3  # draws of a place before a step fails
PATIENCE = 5  # tries at a distractor before it is left out
SLOTS = 512  # pairs that grow side by side


@dataclass(frozen=True)
class Shape:
    """What the pictures look like. `SHAPES` has the published ones."""

    size: int = 32  # pixels a side
    margins: tuple[int, ...] = (1,)  # half the gap between two paddles, in pixels; one is drawn for each picture
    length: int = 2  # of a paddle
    thickness: float = 0.5  # of a paddle; doubled, it must be whole, for strokes are drawn at twice the size
    radius: float = 1.5  # of the dots
    paddles: int = 14  # in each of the two paths; 14 is the published "hard" set, 6 and 9 are the easier ones
    distractors: int = 5  # paths of a third as many paddles that are tried; the crowded ones are left out
    continuity: float = 1.0  # how straight the paths are
    distance: int = 7  # between the starts of the two paths
    contrast: float = 1.5  # brightness of the paths ...
    distractor_contrast: float = 2.0  # ... and of the distractors

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 256 or not self.margins or min(self.margins) < 1 or max(self.margins) > 8:
            raise DataError(f"need size from 16 to 256 and margins from 1 to 8; got {self.size} and {self.margins}.")
        if self.paddles < 2 or self.distractors < 0 or self.length < 1 or self.radius <= 0 or self.continuity <= 0:
            raise DataError(
                "need paddles >= 2, distractors >= 0, length >= 1, radius > 0 and continuity > 0; got "
                f"{self.paddles}, {self.distractors}, {self.length}, {self.radius} and {self.continuity}."
            )
        if self.thickness <= 0 or (2 * self.thickness) % 1:
            raise DataError(f"thickness must be a positive multiple of 0.5; got {self.thickness}.")
        if not 1 <= self.distance < (self.size - 1) / 4:
            raise DataError(f"distance must be at least 1 and under a quarter of {self.size}; got {self.distance}.")


# 32 and 128 are the Long Range Arena's; 64 and 256 lie between and beyond them, and are this project's own.
SHAPES = {
    32: Shape(),
    64: Shape(64, (1, 2), 3, 1.0, 2.0, 14, 6, 1.4, 12, 0.9, 0.9),
    128: Shape(128, (2, 3), 5, 1.5, 3.0, 14, 8, 1.8, 20, 0.9, 0.9),
    256: Shape(256, (4, 6), 10, 3.0, 6.0, 14, 8, 1.8, 40, 0.9, 0.9),
}


class Pictures(NamedTuple):
    """Pictures with what is needed to recompute their labels."""

    images: np.ndarray  # (n, size * size) uint8, row by row
    labels: np.ndarray  # (n,) uint8: 1 where both dots lie on one path
    paths: np.ndarray  # (n, 2, paddles + 1, 2) uint8: the tail of the first paddle, then every head, as (row, column)
    dots: np.ndarray  # (n, 2, 2) uint8: where the two dots are
    margins: np.ndarray  # (n,) uint8: the margin drawn for each picture


def draw(rng: np.random.Generator, count: int, shape: Shape) -> Pictures:
    """`count` pictures. Equal generators give equal pictures."""
    margins = rng.choice(np.array(shape.margins, dtype=np.uint8), count)
    labels = rng.integers(0, 2, count, dtype=np.uint8)
    origin = rng.integers(0, 2, count)  # which path carries the first dot, on its first tail
    images = np.empty((count, shape.size**2), np.uint8)
    paths = np.empty((count, 2, shape.paddles + 1, 2), np.uint8)
    dots = np.empty((count, 2, 2), np.uint8)
    for margin in shape.margins:
        chosen = np.flatnonzero(margins == margin)
        if not len(chosen):
            continue
        tables = make_tables(shape, margin)
        maps = _Maps(tables, len(chosen))
        main = _grow_pairs(rng, tables, maps)  # (n, 2, paddles): where each paddle's stamp goes, and which stamp
        short = _grow_distractors(rng, tables, maps, shape)
        rows = np.arange(len(chosen))
        paths[chosen] = _ends(tables, *main)
        start, end = origin[chosen], np.where(labels[chosen] == 1, origin[chosen], 1 - origin[chosen])
        dots[chosen, 0], dots[chosen, 1] = paths[chosen][rows, start, 0], paths[chosen][rows, end, -1]
        images[chosen] = _paint(tables, shape, main, short, dots[chosen])
    return Pictures(images, labels, paths, dots, margins)


def label_of(paths: np.ndarray, dots: np.ndarray) -> np.ndarray:
    """The labels, from the recorded paths alone: does the path that begins at one dot end at the other?

    paths, dots: as in `Pictures`. Raises `DataError` where a dot does not lie on an end.
    """
    starts = (paths[:, :, 0] == dots[:, None, 0]).all(-1)  # (n, 2): path j begins at the first dot
    ends = (paths[:, :, -1] == dots[:, None, 1]).all(-1)
    if not (starts.any(1) & ends.any(1)).all():
        raise DataError("a dot lies on the end of neither path.")
    return (starts & ends).any(1).astype(np.uint8)


# --- stamps -----------------------------------------------------------------------------------------------------


class Stamps(NamedTuple):
    """One short list of pixels for each direction: flat offsets from the anchor, and values there.

    Shorter lists repeat their first pixel, which changes no maximum.
    """

    at: np.ndarray  # (directions, pixels) int32
    value: np.ndarray  # (directions, pixels) uint8


@dataclass(frozen=True)
class Tables:
    """What depends on the shape and the margin only. Directions: 360 whole degrees, then the K of the ring."""

    size: int
    pad: int
    side: int  # size + 2 * pad: the canvas
    paddles: int
    distance: int
    ring: np.ndarray  # (K,) flat offsets from a ring's centre to the heads it offers
    turn: np.ndarray  # (360 + K, K) float32: weight of ring pixel k after direction d
    head: np.ndarray  # (360,) flat offset from the tail of a first paddle to its head ...
    pivot: np.ndarray  # (360,) ... and to its pivot, where the next step starts from
    reach: np.ndarray  # (360, 2, 2) the same two as (row, column)
    forward: np.ndarray  # (360 + K,) flat offset from a pivot to the next ring's centre
    paddle: Stamps  # brightness
    footprint: Stamps  # what it takes, a margin included
    dilated: Stamps  # the footprint, dilated by the margin
    core: Stamps  # the footprint's core, with the map value from which a pixel is in the way
    clear: Stamps  # pixels that must be free around the tail of a distractor's first paddle
    usable: np.ndarray  # (360,) bool: directions in which a distractor can start
    first: np.ndarray  # (f, 5): direction, and the rows and columns from, to (exclusive) where a path can start
    dot: Stamps  # one stamp: the dot
    empty: np.ndarray  # (2, side * side) uint8: the map and the dilated map of an empty picture


@lru_cache(maxsize=16)
def make_tables(shape: Shape, margin: int) -> Tables:
    """All tables for one margin; a fraction of a second."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise DataError("making Pathfinder needs Pillow: run `pip install pillow`.") from None
    size, length, step = shape.size, shape.length, shape.length + margin
    window = length + math.ceil(shape.thickness) + margin  # a stamp reaches this far
    pad = max(window + margin + 2, 2 * length + 3 * margin + 3, math.ceil(shape.radius) + 4)
    side = size + 2 * pad

    angles = np.arange(0, 360, 360 / (2 * step * math.pi)) * math.pi / 180  # one pixel of arc apart
    ring = np.unique(np.floor(step * np.stack([np.sin(angles), np.cos(angles)], 1)).astype(int), axis=0)  # (K, 2)
    onward = np.arctan2(ring[:, 0], ring[:, 1])
    degrees = np.arange(-180, 180) * math.pi / 180
    directions = np.concatenate([degrees, onward])  # the direction in which a path goes on after each stamp
    drawn = np.concatenate([degrees, onward + math.pi])  # ... and that in which its stroke is drawn from the anchor

    bend = np.abs(directions[:, None] - onward)
    bend = np.minimum(np.minimum(bend, 2 * math.pi - bend) * shape.continuity, math.pi / 2)

    def moved(direction: np.ndarray, distance: int) -> np.ndarray:
        exact = distance * np.stack([np.sin(direction), np.cos(direction)], -1)
        return np.ceil(exact - 1e-9).astype(int)  # (..., 2)

    def flat(offset: np.ndarray) -> np.ndarray:
        return (offset[..., 0] * side + offset[..., 1]).astype(np.int32)

    head = moved(degrees, length)
    pivot = head + moved(degrees + math.pi, step)

    disc = _disc(margin)
    large_disc = _disc(2 * margin)
    strokes, footprints = [], []
    for direction in drawn:
        large = Image.new("L", (4 * window + 1, 4 * window + 1))
        row, column = (2 * window + moved(direction, 2 * length)).tolist()
        line = [(2 * window, 2 * window), (column, row)]
        ImageDraw.Draw(large).line(line, fill=255, width=round(2 * shape.thickness))
        small = (2 * window + 1, 2 * window + 1)
        strokes.append(np.asarray(large.resize(small, Image.Resampling.LANCZOS)))
        fat = Image.fromarray(_dilate(np.asarray(large), large_disc))
        footprints.append(np.asarray(fat.resize(small, Image.Resampling.LANCZOS)))
    dilated = [_dilate(np.pad(footprint, margin), disc) for footprint in footprints]

    clear, usable, first = [], [], []
    low, high = 2 * shape.distance, size - 2 * shape.distance
    for number in range(DEGREES):
        # The published check lies one pixel off the paddle, and knows the footprint's full pixels only.
        offsets = np.argwhere(footprints[number] == 255) - window + 1
        offsets = offsets[(np.abs(offsets) <= step).all(1)]
        rows, columns = offsets[:, 0], offsets[:, 1]
        # In a direction without a pixel in each quadrant, a corner of the picture has nothing to look at, and the
        # published program then finds no room at all.
        sees_all = all((a & b).any() for a in (rows >= 0, rows <= 0) for b in (columns >= 0, columns <= 0))
        usable.append(sees_all)
        clear.append(offsets if len(offsets) else np.zeros((1, 2), int))
        if sees_all:
            box = [low - rows.min(), high - rows.max(), low - columns.min(), high - columns.max()]
            if box[0] < box[1] and box[2] < box[3]:
                first.append([number, *box])
    if not first:
        raise DataError(f"with these settings no path can start: {shape}. Take a smaller distance.")

    radius = math.ceil(shape.radius) + 3  # Lanczos looks three pixels further
    rows, columns = np.ogrid[-2 * radius : 2 * radius + 2, -2 * radius : 2 * radius + 2]
    disc_image = Image.fromarray(((rows**2 + columns**2 <= (2 * shape.radius) ** 2) * 255).astype(np.uint8))
    dot = np.asarray(disc_image.resize((2 * radius + 1, 2 * radius + 1), Image.Resampling.LANCZOS))

    inside = np.zeros((side, side), np.uint8)
    inside[pad:-pad, pad:-pad] = 255
    frame = inside.copy()
    frame[pad + 1 : -pad - 1, pad + 1 : -pad - 1] = 0  # the outermost ring of pixels is taken
    # Outside the picture the dilated map is full, so the ring never offers a pixel there.
    empty = np.stack([frame, np.maximum(_dilate(frame, disc), 255 - inside)]).reshape(2, -1)

    def stamps(images: list[np.ndarray], least: int = 1) -> Stamps:
        lists = []
        for image in images:
            places = np.argwhere(image >= least)
            lists.append((flat(places - image.shape[0] // 2), image[tuple(places.T)]))
        return _stamps(lists)

    core = stamps(footprints, CORE)
    return Tables(
        size=size,
        pad=pad,
        side=side,
        paddles=shape.paddles,
        distance=shape.distance,
        ring=flat(ring),
        turn=(np.cos(bend).clip(0) ** 2).astype(np.float32),
        head=flat(head),
        pivot=flat(pivot),
        reach=np.stack([head, pivot], 1),
        forward=flat(moved(directions, length + 2 * margin)),
        paddle=stamps(strokes),
        footprint=stamps(footprints),
        dilated=stamps(dilated),
        core=Stamps(core.at, (BLOCKED - core.value.astype(int)).astype(np.uint8)),
        clear=_stamps([(flat(offsets), np.zeros(len(offsets), np.uint8)) for offsets in clear]),
        usable=np.array(usable),
        first=np.array(first),
        dot=stamps([dot]),
        empty=empty,
    )


def _disc(radius: int) -> np.ndarray:
    rows, columns = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(rows**2 + columns**2 <= radius**2) - radius  # (pixels, 2)


def _dilate(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Each pixel becomes the largest of those at `offsets` from it."""
    reach = int(np.abs(offsets).max())
    padded = np.pad(image, reach)
    height, width = image.shape
    pieces = [padded[reach + r : reach + r + height, reach + c : reach + c + width] for r, c in offsets]
    result: np.ndarray = np.maximum.reduce(pieces)
    return result


def _stamps(lists: list[tuple[np.ndarray, np.ndarray]]) -> Stamps:
    pixels = max(len(at) for at, _ in lists)
    at = np.empty((len(lists), pixels), np.int32)
    value = np.empty((len(lists), pixels), np.uint8)
    for number, (places, values) in enumerate(lists):
        at[number], value[number] = places[0], values[0]
        at[number, : len(places)], value[number, : len(places)] = places, values
    return Stamps(at, value)


# --- growing ----------------------------------------------------------------------------------------------------


class _Maps:
    """What is taken (`taken`), and the same dilated by the margin (`near`), for many pictures side by side."""

    def __init__(self, tables: Tables, count: int) -> None:
        self.tables, self.count, self.area = tables, count, tables.side**2
        self.taken = np.empty((count, self.area), np.uint8)
        self.near = np.empty((count, self.area), np.uint8)

    def clear(self, slots: np.ndarray) -> None:
        self.taken[slots], self.near[slots] = self.tables.empty

    def add(self, slots: np.ndarray, anchors: np.ndarray, stamps: np.ndarray) -> None:
        """Merge a paddle's footprint into the maps of each slot."""
        base = (slots * self.area + anchors)[:, None]
        for flat, table in ((self.taken.ravel(), self.tables.footprint), (self.near.ravel(), self.tables.dilated)):
            at = base + table.at[stamps]
            flat[at] = np.maximum(flat[at], table.value[stamps])


class _Tips(NamedTuple):
    """Where each of n paths has got to: arrays (n,)."""

    pivot: np.ndarray  # flat place from which the next paddle is reached
    direction: np.ndarray  # the direction it goes on in
    anchor: np.ndarray  # flat place of the last paddle's stamp, which the maps do not hold yet
    stamp: np.ndarray  # which stamp


def _grow(rng: np.random.Generator, maps: _Maps, slots: np.ndarray, tips: _Tips) -> tuple[np.ndarray, _Tips]:
    """One more paddle for the path of each slot: which succeeded (bool), and the new tips of those that did.

    The paddle before is merged into the maps only now, so a paddle never collides with its neighbour.
    """
    tables = maps.tables
    taken, near = maps.taken.ravel(), maps.near.ravel()
    centre = tips.pivot + tables.forward[tips.direction]
    base = slots * maps.area + centre
    weight = tables.turn[tips.direction] * (255 - near[base[:, None] + tables.ring])  # (n, K)
    cumulated = weight.cumsum(1)
    total = cumulated[:, -1]
    choice = np.full(len(slots), -1)
    trying = np.flatnonzero(total > 0.0255)  # else the path has run into a dead end
    for _ in range(TRIES):
        if not len(trying):
            break
        drawn = rng.random(len(trying), dtype=np.float32) * total[trying]
        pick = np.minimum((cumulated[trying] <= drawn[:, None]).sum(1), len(tables.ring) - 1)
        stamp = DEGREES + pick
        place = (base[trying] + tables.ring[pick])[:, None] + tables.core.at[stamp]
        hit = (taken[place] >= tables.core.value[stamp]).any(1)
        choice[trying[~hit]] = pick[~hit]
        trying = trying[hit]
    good = choice >= 0
    maps.add(slots[good], tips.anchor[good], tips.stamp[good])
    pick, centre = choice[good], centre[good]
    stamp = DEGREES + pick
    return good, _Tips(centre, stamp, centre + tables.ring[pick], stamp)


def _grow_pairs(rng: np.random.Generator, tables: Tables, maps: _Maps) -> tuple[np.ndarray, np.ndarray]:
    """A pair of whole paths for each picture of `maps`, which is filled with them: anchors and stamps, (n, 2, paddles).

    Pairs grow in slots; who fails starts anew at once. Every success takes equally many steps, so taking the first
    ones to finish favours no kind of pair.
    """
    wanted, paddles = maps.count, tables.paddles
    slots = min(SLOTS, 8 * wanted + 64)
    work = _Maps(tables, slots)
    tips = [_Tips(*(np.zeros(slots, np.int64) for _ in range(4))) for _ in range(2)]
    anchors, stamps = (np.zeros((slots, 2, paddles), np.int64) for _ in range(2))
    placed = np.zeros(slots, int)  # paddles in each path; 0: to be started
    results: tuple[np.ndarray, np.ndarray] = (np.empty((wanted, 2, paddles), int), np.empty((wanted, 2, paddles), int))
    done = 0
    while done < wanted:
        fresh = np.flatnonzero(placed == 0)
        if len(fresh):
            work.clear(fresh)
            fits, starts = _first_paddles(rng, tables, len(fresh))
            placed[fresh[fits]] = 1
            for j in range(2):
                for old, new in zip(tips[j], starts[j], strict=True):
                    old[fresh] = new
                anchors[fresh, j, 0], stamps[fresh, j, 0] = starts[j].anchor, starts[j].stamp
        alive = np.flatnonzero(placed)
        for j in range(2):
            good, grown = _grow(rng, work, alive, _Tips(*(part[alive] for part in tips[j])))
            placed[alive[~good]] = 0
            alive = alive[good]
            for old, new in zip(tips[j], grown, strict=True):
                old[alive] = new
            anchors[alive, j, placed[alive]], stamps[alive, j, placed[alive]] = grown.anchor, grown.stamp
        placed[alive] += 1
        # The first path's last paddle is in no map yet, so in half a per cent of the small pictures both paths end
        # on one pixel, and the label would be true and false. The published program keeps those; we do not.
        apart = anchors[:, 0, -1] != anchors[:, 1, -1]
        whole = np.flatnonzero((placed == paddles) & apart)[: wanted - done]
        if len(whole):
            # The second path's last paddle is merged at the end, the first one's is forgotten: as published.
            work.add(whole, tips[1].anchor[whole], tips[1].stamp[whole])
            there = slice(done, done + len(whole))
            maps.taken[there], maps.near[there] = work.taken[whole], work.near[whole]
            results[0][there], results[1][there] = anchors[whole], stamps[whole]
            done += len(whole)
        placed[placed == paddles] = 0
    return results


def _first_paddles(rng: np.random.Generator, tables: Tables, count: int) -> tuple[np.ndarray, list[_Tips]]:
    """The first paddles of two paths: one in the middle, the other a fixed distance from it. Which fit (bool)."""
    chosen = tables.first[rng.integers(0, len(tables.first), count)]
    direction = chosen[:, 0]
    tail = np.stack([rng.integers(chosen[:, 1], chosen[:, 2]), rng.integers(chosen[:, 3], chosen[:, 4])], 1)
    other = rng.integers(0, DEGREES, count)
    angle = rng.integers(0, 360, count) * math.pi / 180
    offset = tables.distance * np.stack([np.sin(angle), np.cos(angle)], 1)
    second = np.rint(tail + offset).astype(int)
    fits = _inside(tables, tail, direction) & _inside(tables, second, other)
    return fits, [_tips(tables, tail, direction), _tips(tables, second, other)]


def _inside(tables: Tables, tail: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Whether head and pivot lie in the picture."""
    places = tail[:, None] + tables.reach[direction]  # (n, 2, 2)
    return ((places >= 0) & (places < tables.size)).all((1, 2))


def _tips(tables: Tables, tail: np.ndarray, direction: np.ndarray) -> _Tips:
    at = (tail[:, 0] + tables.pad) * tables.side + tail[:, 1] + tables.pad
    return _Tips(at + tables.pivot[direction], direction, at, direction)


def _grow_distractors(
    rng: np.random.Generator, tables: Tables, maps: _Maps, shape: Shape
) -> tuple[np.ndarray, np.ndarray]:
    """Short paths between the long ones: anchors and stamps, (n, distractors, paddles); stamp -1: none is there."""
    paddles = shape.paddles // 3
    anchors = np.zeros((maps.count, shape.distractors, paddles), int)
    stamps = np.full_like(anchors, -1)
    for j in range(shape.distractors if paddles else 0):
        missing = np.arange(maps.count)
        for _ in range(PATIENCE):
            fits, start = _seed_distractors(rng, maps, missing)
            slots = missing[fits]
            before = maps.taken[slots], maps.near[slots]
            alive = np.arange(len(slots))  # places in slots
            placed = [(start.anchor, start.stamp)]
            tips = start
            for _ in range(paddles - 1):
                good, tips = _grow(rng, maps, slots[alive], tips)
                placed = [(a[good], s[good]) for a, s in placed] + [(tips.anchor, tips.stamp)]
                alive = alive[good]
            maps.add(slots[alive], tips.anchor, tips.stamp)
            for i, (anchor, stamp) in enumerate(placed):
                anchors[slots[alive], j, i], stamps[slots[alive], j, i] = anchor, stamp
            failed = np.setdiff1d(np.arange(len(slots)), alive, assume_unique=True)
            maps.taken[slots[failed]], maps.near[slots[failed]] = before[0][failed], before[1][failed]
            missing = np.setdiff1d(missing, slots[alive], assume_unique=True)
    return anchors, stamps


def _seed_distractors(rng: np.random.Generator, maps: _Maps, slots: np.ndarray) -> tuple[np.ndarray, _Tips]:
    """A first paddle where there is room for it: which slots found one (bool), and the tips of those."""
    tables = maps.tables
    taken = maps.taken.ravel()
    direction, tail = np.zeros(len(slots), int), np.zeros((len(slots), 2), int)
    fits = np.zeros(len(slots), bool)
    trying = np.arange(len(slots))
    for _ in range(TRIES):  # a paddle that would leave the picture is drawn anew
        direction[trying] = rng.integers(0, DEGREES, len(trying))
        looking = trying = trying[tables.usable[direction[trying]]]
        found = np.zeros(len(slots), bool)
        for _ in range(8):  # rounds of 32 places each: the first free one is a uniform draw among the free ones
            if not len(looking):
                break
            places = rng.integers(0, tables.size, (2, len(looking), 32))
            at = (places[0] + tables.pad) * tables.side + places[1] + tables.pad
            around = at[:, :, None] + tables.clear.at[direction[looking]][:, None]
            free = (taken[(slots[looking] * maps.area)[:, None, None] + around] <= FREE).all(2)  # (n, 32)
            there, which = free.any(1), free.argmax(1)
            rows = np.flatnonzero(there)
            tail[looking[rows]] = places[:, rows, which[rows]].T
            found[looking[rows]] = True
            looking = looking[~there]
        trying = trying[found[trying]]
        inside = _inside(tables, tail[trying], direction[trying])
        fits[trying[inside]] = True
        trying = trying[~inside]
    return fits, _tips(tables, tail[fits], direction[fits])


# --- painting ---------------------------------------------------------------------------------------------------


def _ends(tables: Tables, anchors: np.ndarray, stamps: np.ndarray) -> np.ndarray:
    """The tail of the first paddle and all heads, (n, 2, paddles + 1, 2). Later stamps are anchored at their head."""
    places = np.concatenate([anchors[:, :, :1], anchors], axis=2)
    places[:, :, 1] += tables.head[stamps[:, :, 0]]
    return np.stack(np.divmod(places, tables.side), -1) - tables.pad


def _paint(
    tables: Tables,
    shape: Shape,
    main: tuple[np.ndarray, np.ndarray],
    short: tuple[np.ndarray, np.ndarray],
    dots: np.ndarray,
) -> np.ndarray:
    """The pictures, (n, size * size) uint8: the maximum of all strokes and dots, stretched to 0 to 255."""
    count, area = len(dots), tables.side**2
    canvas = np.zeros((count, area), np.float32)
    flat = canvas.ravel()

    def stamp(rows: np.ndarray, anchors: np.ndarray, at: np.ndarray, value: np.ndarray) -> None:
        place = (rows * area + anchors)[:, None] + at
        flat[place] = np.maximum(flat[place], value)

    for (anchors, stamps), contrast in ((main, shape.contrast), (short, shape.distractor_contrast)):
        bright = tables.paddle.value * np.float32(contrast)
        anchors, stamps = anchors.reshape(count, -1), stamps.reshape(count, -1)
        for i in range(anchors.shape[1]):
            rows = np.flatnonzero(stamps[:, i] >= 0)
            chosen = stamps[rows, i]
            stamp(rows, anchors[rows, i], tables.paddle.at[chosen], bright[chosen])
    for i in range(2):
        anchors = (dots[:, i, 0].astype(int) + tables.pad) * tables.side + dots[:, i, 1] + tables.pad
        stamp(np.arange(count), anchors, tables.dot.at, tables.dot.value.astype(np.float32))
    inner = slice(tables.pad, tables.pad + tables.size)
    pictures = canvas.reshape(count, tables.side, tables.side)[:, inner, inner].reshape(count, -1)
    return (pictures * (255 / pictures.max(1, keepdims=True)) + 0.5).astype(np.uint8)
