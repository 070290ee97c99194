"""
Which keys each job on NumPy visits: strips of queries, and runs of keys for each.

Strips are the tiles of a plan, or bands around the queries, and what is seen beside those.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from arrattn import patterns
from arrattn._core import few
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.plan import (
    RUN_OVERHEAD,
    TILES,
    Plan,
    choose_tile,
    classify,
    join_runs,
    make_plan,
    tile_starts,
)
from arrattn._core.typing import Array
from arrattn.patterns import NO_EDGES, Pattern, Rectangles

#: Scores held at once by one worker: a MiB of float32, about a second-level cache.
BUDGET = 1 << 18

#: Keys of a run where rows are so few that reading keys is what takes the time.
FEW_KEYS = 1 << 14

#: Rows of a tile that see none of its keys are left out, so many at a time.
GRAIN = 64

#: Keys of a step along the edge of what is seen, and what each step costs, counted in pairs.
STEP, STEP_OVERHEAD = 256, 1 << 13

#: Short runs of keys are put together up to so many.
GATHERED = 256

#: Bands of a local window: scores held at once, and rows of their tiles, from the smallest.
BAND = 1 << 19
BAND_ROWS = (32, 64, 128, 256)


class Run(NamedTuple):
    """
    Keys ``[j0, j1)``, and whether any pair with them has to be hidden.

    `moves` is whether the keys of the next tile of a strip are as many keys further on as it has
    rows. `sees` is what the call's pattern comes down to here, where it then depends on distance
    alone; else None. With `parts`, it is those ranges of keys, ``j1 - j0`` in all, which every
    query of the strip sees.
    """

    j0: int
    j1: int
    hide: bool = False
    moves: bool = False
    sees: Pattern | None = None
    parts: tuple[tuple[int, int], ...] = ()


class Strip(NamedTuple):
    """
    What one job does: so many `tiles` of `rows` queries from `i0` on, and their runs of keys.

    Where there is more than one tile, runs that do not move hide nothing, and those that do
    hide by distance.
    """

    i0: int
    rows: int
    tiles: int
    runs: tuple[Run, ...]

    @property
    def stop(self) -> int:
        """The query behind the last."""
        return self.i0 + self.rows * self.tiles

    @property
    def cost(self) -> int:
        """Pairs that are looked at."""
        return self.tiles * self.rows * sum(run.j1 - run.j0 for run in self.runs)

    def keys(self, run: Run) -> tuple[int, int]:
        """The keys of a run, for all tiles together."""
        return run.j0, run.j1 + (self.rows * (self.tiles - 1) if run.moves else 0)


class Cut(NamedTuple):
    """How one item is cut: into bands of so many rows, or into the tiles of a plan."""

    strips: tuple[Strip, ...]
    band_rows: int | None
    plan: Plan | None

    @property
    def cost(self) -> int:
        """Pairs that are looked at, and what it costs to begin with them."""
        return sum(strip.cost + RUN_OVERHEAD * len(strip.runs) for strip in self.strips)


def cut(call: SoftmaxInputs, tile: tuple[int, int] | None) -> Cut:
    """The strips of one item, the same for all its heads."""
    (_, g), (nq, nk), at = call.heads, call.lengths, call.offset
    known = call.pattern is None or call.pattern.uniform
    return (_cut_known if known else _cut)(call.pattern, g, nq, nk, at, tile, call.bias is None)


def _cut(
    pattern: Pattern | None,
    g: int,
    nq: int,
    nk: int,
    at: int,
    tile: tuple[int, int] | None,
    free: bool,
) -> Cut:
    if pattern is None or tile or not free:
        return _cut_tiles(pattern, g, nq, nk, at, tile, free)
    band = pattern.band
    near, rest = patterns.apart(pattern)
    rows = None if near is None else _band_rows(near, g, nq, nk)
    if near is None or rows is None:
        return _cut_tiles(pattern, g, nq, nk, at, tile, free)
    if band is not None:
        return Cut(tuple(_cut_band(band, rows, g, (0, nq), nk, at)), rows, None)
    strips = _cut_near(pattern, near, rest, rows, g, nq, nk, at)
    ways = Cut(tuple(strips), rows, None), _cut_tiles(pattern, g, nq, nk, at, tile, free)
    return min(ways, key=lambda way: way.cost)


# Calls of one shape are planned alike, and a plan can take as long as a short call.
_cut_known = lru_cache(maxsize=32)(_cut)


def _cut_tiles(
    pattern: Pattern | None,
    g: int,
    nq: int,
    nk: int,
    at: int,
    tile: tuple[int, int] | None,
    free: bool,
) -> Cut:
    relative = pattern if pattern is not None and pattern.relative else None
    grain = None if relative is None else GRAIN
    edges = NO_EDGES if pattern is None or tile else pattern.edges(nk, at)
    shape = tile or choose_tile(
        pattern, nq, nk, at, lanes=g, budget=BUDGET, grain=grain, edges=edges
    )
    shape = (min(shape[0], max(nq, 1)), shape[1])
    plan = make_plan(pattern, nq, nk, at, shape, edges)
    strips = []
    for t in range(plan.kinds.shape[-2]):
        i0, i1 = plan.rows(t)
        pairs = _pairs_at_once(g, i1 - i0)
        if relative is not None and g * (i1 - i0) > few.ROWS:
            pairs //= 2  # steps along an edge are short, so there are heads to fill the work space
        runs = (Run(*run) for run in plan.runs(t, pairs, apart=True))
        strip = _settled(Strip(i0, i1 - i0, 1, tuple(runs)), pattern, at)
        strip = strip if relative is None else _stepped(strip, relative, g, at)
        strips.append(_gathered(strip, g) if free else strip)
    return Cut(tuple(strips), None, plan)


def _pairs_at_once(g: int, rows: int) -> int:
    """How many pairs of a head a run may have."""
    return BUDGET // g if g * rows > few.ROWS else min(BUDGET // g, rows * FEW_KEYS)


def _stepped(strip: Strip, pattern: Pattern, g: int, at: int) -> Strip:
    """
    A strip whose runs follow the edge of what is seen in steps, where that leaves out enough.
    """
    runs: list[Run] = []
    for run in strip.runs:
        steps = [run._replace(j0=j, j1=min(j + STEP, run.j1)) for j in range(run.j0, run.j1, STEP)]
        ways = ([run], steps) if run.hide and len(steps) > 1 else ([run],)
        runs += min(ways, key=partial(_cost_of_runs, strip, pattern, g, at))
    return strip._replace(runs=tuple(runs))


def _cost_of_runs(strip: Strip, pattern: Pattern, g: int, at: int, runs: list[Run]) -> int:
    """Pairs that are looked at in these runs of a strip, and what it costs to begin with them."""
    if len(runs) == 1:
        return g * strip.rows * (runs[0].j1 - runs[0].j0)
    pairs = 0
    for run in runs:
        first, stop = rows_that_see(pattern, strip.i0, at, strip.rows, run)[0]
        pairs += g * (stop - first) * (run.j1 - run.j0)
    return pairs + STEP_OVERHEAD * (len(runs) - 1)


def _settled(strip: Strip, pattern: Pattern | None, at: int) -> Strip:
    """A strip whose runs know what the pattern comes down to there."""
    if pattern is None or pattern.relative:
        return strip
    runs = []
    for run in strip.runs:
        seen = (
            patterns.within(pattern, _rectangle(strip, *strip.keys(run), at)) if run.hide else True
        )
        if isinstance(seen, bool):
            runs += [run._replace(hide=False)] if seen else []
        else:
            runs.append(run._replace(sees=seen if seen.relative else None))
    return strip._replace(runs=tuple(runs))


def _gathered(strip: Strip, g: int) -> Strip:
    """A strip whose short runs that every query sees are put together."""
    rows = strip.stop - strip.i0
    most = min(GATHERED, _pairs_at_once(g, rows) // rows)
    short = [r for r in strip.runs if not (r.hide or r.moves) and r.j1 - r.j0 <= most // 2]
    if len(short) < 2:
        return strip
    groups: list[list[Run]] = [[]]
    width = 0
    for run in short:
        width += run.j1 - run.j0
        if width > most:
            groups.append([])
            width = run.j1 - run.j0
        groups[-1].append(run)
    runs = [run for run in strip.runs if run not in short]
    for group in groups:
        parts = tuple((run.j0, run.j1) for run in group)
        runs.append(Run(0, sum(j1 - j0 for j0, j1 in parts), parts=parts))
    return strip._replace(runs=tuple(runs))


def _rectangle(strip: Strip, j0: int, j1: int, at: int) -> Rectangles:
    i0, i1 = strip.i0, strip.stop
    return Rectangles(*(np.array([[x]]) for x in (i0, i1, i0 + at, i1 + at, j0, j1)))


def rows_that_see(
    pattern: Pattern, i0: int, at: int, n: int, run: Run
) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """
    Rows outside which none of `n` sees any key of a run; those of them outside which all see every
    key; and whether all see any.
    """
    starts = np.arange(0, n, GRAIN)
    stops = np.minimum(starts + GRAIN, n)
    j0, j1 = np.array([run.j0]), np.array([run.j1])
    some, every = (x[:, 0] for x in classify(pattern, i0 + starts, i0 + stops, j0, j1, at))

    def rows(which: Array) -> tuple[int, int]:
        found = np.flatnonzero(which).tolist()
        return (found[0] * GRAIN, min((found[-1] + 1) * GRAIN, n)) if found else (0, 0)

    first, stop = rows(some)
    between = (first <= starts) & (starts < stop)  # of which some may see none
    return (first, stop), rows(between & ~every), bool(some.all())


# -- A band around the queries, and what is seen beside it ------------------------------------


def _cut_near(
    pattern: Pattern,
    near: tuple[int, int],
    rest: Pattern | None,
    rows: int,
    g: int,
    nq: int,
    nk: int,
    at: int,
) -> list[Strip]:
    """Bands as of a window; outside of them, what `rest` sees."""
    edges = () if rest is None else rest.edges(nk, at).queries
    marks = [*tile_starts(nq, nq, edges).tolist(), nq]
    strips = [s for rows_of in pairwise(marks) for s in _cut_band(near, rows, g, rows_of, nk, at)]
    strips = [s for strip in strips for s in _alike(strip, pattern, rest, g, nk, at)]
    beside = _runs_beside(rest, strips, g, nk, at)
    joined = (s._replace(runs=s.runs + more) for s, more in zip(strips, beside, strict=True))
    return [_gathered(_settled(strip, pattern, at), g) for strip in joined]


def _alike(
    strip: Strip, pattern: Pattern, rest: Pattern | None, g: int, nk: int, at: int
) -> list[Strip]:
    """A strip, cut in halves until the tiles of each see the same, moved along."""
    if strip.tiles == 1:
        return [strip]
    place = _rectangle(strip, *strip.keys(strip.runs[0]), at)
    seen = patterns.within(pattern, place)
    if isinstance(seen, bool) or seen.relative:
        if rest is None:
            return [strip]
        (beside,) = _runs_beside(rest, [strip], g, nk, at)
        if not any(run.hide for run in beside) and patterns.within(rest, place) is False:
            return [strip]
    half, step = strip.tiles // 2, strip.tiles // 2 * strip.rows
    runs = tuple(run._replace(j0=run.j0 + step, j1=run.j1 + step) for run in strip.runs)
    parts = strip._replace(tiles=half), Strip(strip.i0 + step, strip.rows, strip.tiles - half, runs)
    return [s for part in parts for s in _alike(part, pattern, rest, g, nk, at)]


def _runs_beside(
    rest: Pattern | None, strips: list[Strip], g: int, nk: int, at: int
) -> list[tuple[Run, ...]]:
    """What each strip sees beside its own band."""
    if rest is None:
        return [()] * len(strips)
    first, stops = (np.array([getattr(s, name) for s in strips]) for name in ("i0", "stop"))
    cols = tile_starts(nk, TILES[0][1], rest.edges(nk, at).keys)
    ends = np.append(cols[1:], nk)
    some, every = classify(rest, first, stops, cols, ends, at)
    beside = []
    for t, strip in enumerate(strips):
        n0, n1 = strip.keys(strip.runs[0]) if strip.runs else (0, 0)
        pieces = (
            (a, b, not every[t, u])
            for u in np.flatnonzero(some[t]).tolist()
            for a, b in ((cols[u], min(ends[u], n0)), (max(cols[u], n1), ends[u]))
            if a < b
        )
        rows = strip.stop - strip.i0
        runs = join_runs(pieces, _pairs_at_once(g, rows) // rows, apart=True)
        beside.append(tuple(Run(int(a), int(b), bool(hide)) for a, b, hide in runs))
    return beside


def _band_rows(band: tuple[int, int], g: int, nq: int, nk: int) -> int | None:
    """Rows of a tile whose keys, a band, are all computed at once; None where they are not."""
    width = band[1] - band[0]
    fitting = [n for n in BAND_ROWS if g * n * (n + width - 1) <= BUDGET // 2]
    if not fitting or nq < 2 * fitting[0] or nk < 2 * width:
        return None
    # Fewer rows make small products, more rows compute more that is hidden.
    return next((n for n in fitting if 8 * n >= width - 1), fitting[-1])


def _cut_band(
    band: tuple[Any, Any], rows: int, g: int, queries: tuple[int, int], nk: int, at: int
) -> Iterator[Strip]:
    (lo, hi), (start, stop) = band, queries
    width = rows + hi - lo - 1
    # Tiles whose whole band lies among the keys are alike, so many are computed at once.
    first = min(max(start, -lo - at), stop)
    alike = max(0, min(stop, nk - hi + 1 - at) - first) // rows
    most = max(1, BAND // (g * rows * width))

    def edge(i0: int, i1: int) -> Iterator[Strip]:
        for i in range(i0, i1, rows):
            n = min(rows, i1 - i)
            j0, j1 = max(0, i + at + lo), min(nk, i + n - 1 + at + hi)
            yield Strip(i, n, 1, (Run(j0, j1, hide=True, moves=True),) if j0 < j1 else ())

    yield from edge(start, first)
    for t in range(0, alike, most):
        i0 = first + t * rows
        j0 = i0 + at + lo
        run = Run(j0, j0 + width, hide=True, moves=True)
        yield Strip(i0, rows, min(most, alike - t), (run,))
    yield from edge(first + alike * rows, stop)
