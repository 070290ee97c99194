"""
The schedule for NumPy: jobs of (item, heads, queries) on a pool of threads.

A pass over a tile of scores costs NumPy about a tenth of the tile's products, so the fold
is done here with as few passes as can be, in memory that each thread keeps: see `gather`.
What that cannot do goes through `fold`, as on every other library.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import as_strided

from arrattn import patterns
from arrattn._core import few, gather, loops, online_softmax
from arrattn._core.few import Few
from arrattn._core.fold import enter, finish, fold
from arrattn._core.gather import Look
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State
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
from arrattn._core.tiles import TilePairs, pick_item
from arrattn._core.typing import Array
from arrattn.patterns import NO_EDGES, Pattern, Rectangles

#: Scores held at once by one worker: a MiB of float32, about a second-level cache.
BUDGET = 1 << 18

#: Pairs that small jobs have together when one thread does them.
BUNDLE = BUDGET // 2

#: Pairs of a head, and keys, up to which many heads are done at once.
SMALL, SMALL_KEYS = 1 << 12, 512

#: Keys of a run where rows are so few that reading keys is what takes the time.
FEW_KEYS = 1 << 14

#: Rows of a tile that see none of its keys are left out, so many at a time.
GRAIN = 64

#: Keys of a step along the edge of what is seen, and what each step costs, counted in pairs.
STEP, STEP_OVERHEAD = 256, 1 << 13

#: Keys from which on weights are read along diagonals rather than row by row.
WIDE = 512

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


def attend(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    """What `engine.attend` does, for NumPy arrays."""
    (hkv, g), (nq, nk) = call.heads, call.lengths
    shape = (*call.batch, hkv, g, nq, call.v.shape[-1])
    out, lse = np.empty(shape, call.acc), np.empty(shape[:-1], call.acc)
    small = g * nq * nk * max(call.q.shape[-1], call.v.shape[-1]) <= loops.SMALL
    if tile is None and is_small(call):
        loops.run_jobs(list(_small_jobs(call, out, lse)), small=small)
        return out, lse
    call, out, lse = _items_as_heads(call, out, lse)
    jobs: list[tuple[int, Any]] = []
    together: list[Few] = []
    for b, item, plan in _parts(call, tile):
        keys = _all_seen(item, plan)
        if keys is not None:
            together.append(Few(item, keys, out[b], lse[b]))
            jobs += together[-1].jobs()
            continue
        # Where they take little time, norms are computed before there are threads to wait for.
        reach = gather.reach(item.k, item.v, call.acc) if item.k.size <= BUDGET else None
        whole = Head(item, out[b], lse[b], reach)
        sizes = _heads_at_once(item, plan, math.prod(call.batch))
        alone = whole.cut(1) if len(set(sizes)) > 1 else None
        heads = {many: whole.cut(many, alone) for many in set(sizes)}
        for strip, many in zip(plan.strips, sizes, strict=True):
            for head in heads[many]:
                jobs.append((head.call.heads[0] * strip.cost, partial(head.run, strip)))
    loops.run_jobs(_bundled(jobs), small=small)
    for one in together:
        one.finish()
    return out.reshape(shape), lse.reshape(shape[:-1])


def _items_as_heads(
    call: SoftmaxInputs, out: Array, lse: Array
) -> tuple[SoftmaxInputs, Array, Array]:
    """A call as one of a single item, all heads of all items being its heads, if they are alike."""
    alike = isinstance(call.offset, int) and (call.pattern is None or call.pattern.uniform)
    arrays = (call.q, 4), (call.k, 3), (call.v, 3)
    own = all(x.shape[:-n] == call.batch and x.flags.c_contiguous for x, n in arrays)
    if not (alike and own and call.bias is call.sinks is None):
        return call, out, lse
    heads = math.prod(call.batch) * call.heads[0]
    q, k, v, out, lse = (
        x.reshape(heads, *x.shape[x.ndim - n + 1 :]) for x, n in (*arrays, (out, 4), (lse, 3))
    )
    return call._replace(q=q, k=k, v=v, batch=()), out, lse


def _bundled(jobs: list[tuple[int, Any]]) -> list[Any]:
    """
    The largest jobs first, for whoever is done early to find small ones, and those in bundles.

    Two threads that do many small things at once mostly wait for the interpreter.
    """
    bundles: list[list[Any]] = []
    room = 0
    for cost, job in sorted(jobs, key=lambda job: -job[0]):
        if not bundles or cost > room:
            bundles.append([])
            room = BUNDLE
        bundles[-1].append(job)
        room -= cost
    return [partial(_run_bundle, bundle) for bundle in bundles]


def _run_bundle(bundle: list[Any]) -> None:
    for job in bundle:
        job()


def _parts(
    call: SoftmaxInputs, tile: tuple[int, int] | None
) -> Iterator[tuple[tuple[int, ...], SoftmaxInputs, Cut]]:
    """What `items` gives, or the whole batch where few queries see the same keys in all of it."""
    alike = call.pattern is None or call.pattern.relative
    if alike and isinstance(call.offset, int):
        plan = cut(call, tile)
        if _all_seen(call, plan) is not None:
            yield (), call, plan
            return
    yield from items(call, tile)


def _all_seen(call: SoftmaxInputs, plan: Cut) -> tuple[int, int] | None:
    """The range of keys that all queries, being few, see, where they see no others."""
    plain = call.bias is None and call.softcap is None
    if not plain or math.prod(call.q.shape[-3:-1]) > few.ROWS or len(plan.strips) != 1:
        return None
    runs = plan.strips[0].runs
    gaps = any(a.j1 != b.j0 for a, b in itertools.pairwise(runs))
    if not runs or gaps or any(run.hide for run in runs):
        return None
    return runs[0].j0, runs[-1].j1


def items(
    call: SoftmaxInputs, tile: tuple[int, int] | None = None
) -> Iterator[tuple[tuple[int, ...], SoftmaxInputs, Cut]]:
    """Each item of the batch, where it is, and how it is cut."""
    plan: Cut | None = None
    for b in np.ndindex(*call.batch):
        item = _without_padding(batch_item(call, b))
        # One plan serves all items, unless they differ.
        if plan is None or call.pattern is not item.pattern or not isinstance(call.offset, int):
            plan = cut(item, tile)
        yield b, item, plan


def _without_padding(item: SoftmaxInputs) -> SoftmaxInputs:
    """Drop keys that no query sees because they lie behind ``kv_lengths``."""
    if item.pattern is None or item.bias is not None:
        return item
    rest, n = patterns.within_prefix(item.pattern, item.k.shape[-2])
    return item._replace(k=item.k[..., :n, :], v=item.v[..., :n, :], pattern=rest)


# -- Many small heads at once -----------------------------------------------------------------


def is_small(call: SoftmaxInputs) -> bool:
    """Whether heads are so small that many are done at once."""
    (_, g), (nq, nk) = call.heads, call.lengths
    plain = call.pattern is None or call.pattern.uniform
    fits = g * nq * nk <= SMALL and nk <= SMALL_KEYS
    return fits and plain and call.bias is None and isinstance(call.offset, int)


def _small_jobs(call: SoftmaxInputs, out: Array, lse: Array) -> Iterator[Any]:
    (hkv, g), (nq, nk) = call.heads, call.lengths
    visible = None
    if call.pattern is not None:
        visible = call.pattern.visible(TilePairs(0, nq, 0, nk, call.offset, xp=np, device=None))
    if not call.batch:
        yield partial(_small_job, call, visible, out, lse)
        return
    step = max(1, 4 * BUDGET // (hkv * g * nq * nk))
    for b in np.ndindex(*call.batch[:-1]):
        for start in range(0, call.batch[-1], step):
            at = (*b, slice(start, start + step))
            part = call._replace(
                q=_cut_batch(call.q, at, 4),
                k=_cut_batch(call.k, at, 3),
                v=_cut_batch(call.v, at, 3),
            )
            yield partial(_small_job, part, visible, out[at], lse[at])


def _cut_batch(x: Array, at: tuple[Any, ...], trailing: int) -> Array:
    lead = x.shape[: x.ndim - trailing]
    own = at[len(at) - len(lead) :]
    return x[
        tuple(
            (slice(None) if isinstance(i, slice) else 0) if n == 1 else i
            for n, i in zip(lead, own, strict=True)
        )
    ]


def _small_job(call: SoftmaxInputs, visible: Array | None, out: Array, lse: Array) -> None:
    finite = True if visible is None else None
    state = None
    if call.sinks is not None:
        state = online_softmax.empty(np.zeros(out.shape, call.acc), call.sinks, xp=np)
    q = enter(call, call.q, scale=call.scale)
    state = fold(call, state, q, call.k, call.v, None, visible=visible, finite=finite)
    out[...], lse[...] = finish(call, state)


def at_once(q: Array, k: Array, v: Array) -> Array | None:
    """
    Attention of few NumPy arrays with no options, checked and computed in one go.

    None where the arrays are not plainly right and small, for the door to say what they are.
    It does what `_small_job` does, operation by operation.
    """
    if not (type(q) is type(k) is type(v) is np.ndarray and q.dtype == k.dtype == v.dtype):
        return None
    if q.dtype not in _EXACT or q.ndim < 3 or q.shape[:-2] != k.shape[:-2] or q.size == 0:
        return None
    (nq, d), nk = q.shape[-2:], k.shape[-2]
    if k.shape[-1] != d or v.shape[:-1] != k.shape[:-1] or v.size == 0:
        return None
    products = nq * nk * max(d, v.shape[-1])
    if nq * nk > SMALL or nk > SMALL_KEYS or products > loops.SMALL or q.size * nk > 4 * BUDGET:
        return None
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        s = loops.product(q * d**-0.5, k.mT, "scores", xp=np)
        top = s.max(axis=-1, keepdims=True)
        if not np.isfinite(top).all():
            return None
        p = loops.exp_shifted(s, top, xp=np)
        total = loops.row_sums(p, xp=np)
        return np.divide(np.matmul(p, v), total)


_EXACT = (np.dtype(np.float32), np.dtype(np.float64))


# -- One item, and its heads ------------------------------------------------------------------


def batch_item(call: SoftmaxInputs, b: tuple[int, ...]) -> SoftmaxInputs:
    """One batch item of a call, without batch axes."""
    offset, pattern = call.offset, call.pattern
    return call._replace(
        q=pick_item(call.q, b, 4),
        k=pick_item(call.k, b, 3),
        v=pick_item(call.v, b, 3),
        bias=None if call.bias is None else pick_item(call.bias, b, 4),
        offset=offset if isinstance(offset, int) else int(pick_item(offset, b, 4).item()),
        pattern=_picked(pattern, partial(pick_item, b=b)),
        always=_picked(call.always, partial(pick_item, b=b)),
        block_scores=None if call.block_scores is None else pick_item(call.block_scores, b, 4),
        batch=(),
    )


def head_item(call: SoftmaxInputs, h: int, many: int = 1) -> SoftmaxInputs:
    """One key head, or several from `h` on, with their query heads, of a batch item."""
    some = slice(h, h + many)

    def pick(x: Array, trailing: int) -> Array:
        return x if trailing != 4 or x.shape[0] == 1 else x[some]

    return call._replace(
        q=call.q[some],
        k=call.k[some],
        v=call.v[some],
        bias=None if call.bias is None else pick(call.bias, 4),
        sinks=None if call.sinks is None else call.sinks[some],
        pattern=_picked(call.pattern, pick),
        always=_picked(call.always, pick),
        block_scores=None if call.block_scores is None else pick(call.block_scores, 4),
    )


def _picked(pattern: Pattern | None, choose: Any) -> Pattern | None:
    return pattern if pattern is None or pattern.uniform else patterns.pick(pattern, choose)


# -- Which keys each job visits ---------------------------------------------------------------


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
        first, stop = _rows_that_see(pattern, strip.i0, at, strip.rows, run)[0]
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


def _heads_at_once(item: SoftmaxInputs, plan: Cut, items: int) -> list[int]:
    """
    How many key heads of an item a job has, for each strip.

    Small tiles of several heads fill the work space together: fewer calls of NumPy, and fewer
    turns at the interpreter. There are no more than leave every thread as much to do.
    """
    (hkv, g), strips = item.heads, plan.strips
    plain = item.bias is item.softcap is item.sinks is None
    if not plain or _differs_by_head(item.pattern):
        return [1] * len(strips)
    width = max(item.q.shape[-1], item.v.shape[-1])
    jobs, threads = items * hkv * len(strips), loops.num_threads()

    def fit(strip: Strip) -> int:
        rows, keys = g * strip.rows, max((run.j1 - run.j0 for run in strip.runs), default=1)
        if strip.tiles > 1 or rows <= few.ROWS:
            return 1
        most = min(hkv, BUDGET // max(rows * keys, rows * width, keys * width, 1))
        # Of `n` heads each, ``jobs / n`` are shared out among the threads.
        best = -(-jobs // threads)
        return max(n for n in range(1, max(most, 1) + 1) if n * -(-jobs // (n * threads)) <= best)

    return [fit(strip) for strip in strips]


def _differs_by_head(pattern: Pattern | None) -> bool:
    """Whether the heads of an item may see different keys."""
    heads = {1}

    def note(x: Array, trailing: int) -> Array:
        heads.add(x.shape[0] if trailing == 4 else 1)
        return x

    _picked(pattern, note)
    return heads != {1}


class Head:
    """
    One key head of one item, or several: what their jobs share, and where they write.

    Parameters
    ----------
    call : SoftmaxInputs
        Without batch axes.
    out, lse : array, shapes (Hkv, G, Nq, Dv) and (Hkv, G, Nq)
        Where the results go.
    reach : array, shape (Hkv, Nk), optional
        `gather.reach` of the keys, where it is known.
    alone : list of Head, optional
        Each of several heads by itself, where that exists: it shares what it computes.
    """

    def __init__(
        self,
        call: SoftmaxInputs,
        out: Array,
        lse: Array,
        reach: Array | None = None,
        alone: list[Head] | None = None,
    ) -> None:
        self.call, self.out, self.lse, self.alone = call, out, lse, alone
        self.lock = threading.Lock()
        self._reach = reach
        # Softcap and bias change scores after the product, and bounds on them with it.
        self.plain = call.bias is None and call.softcap is None

    def reach(self) -> Array:
        """`gather.reach` of the keys, ``(Hkv, Nk)``, computed by the first job that asks."""
        with self.lock:
            if self._reach is None and self.alone is not None:
                self._reach = np.concatenate([head.reach() for head in self.alone])
            elif self._reach is None:
                self._reach = gather.reach(self.call.k, self.call.v, self.call.acc)
            return self._reach

    def cut(self, many: int, alone: list[Head] | None = None) -> list[Head]:
        """These heads, so `many` at a time; those that are `alone` as they are."""
        if many == 1 and alone is not None:
            return alone
        parts = []
        for h in range(0, self.call.heads[0], many):
            arrays = self.out, self.lse, self._reach, alone
            own = (None if x is None else x[h : h + many] for x in arrays)
            parts.append(Head(head_item(self.call, h, many), *own))
        return parts

    def run(self, strip: Strip) -> None:
        """Compute the rows of a strip."""
        g, i1 = self.call.q.shape[-3], strip.stop
        q = _tiles_of(self.call.q, strip)
        out, lse = _tiles_of(self.out, strip), _tiles_of(self.lse[..., None], strip)
        if self.plain and g * (i1 - strip.i0) > few.ROWS:
            self._gather(strip, q, out, lse)
            return
        state = self._empty(out.shape)
        for run in strip.runs:
            state = self._absorb(state, q, strip, run)
        _write(finish(self.call, state), out, lse)

    def _absorb(self, state: State, q: Array, strip: Strip, run: Run) -> State:
        """Absorb a run of keys of a strip that is of few rows, or not plain."""
        call = self.call
        _, g, n, d = q.shape
        if not self.plain or run.hide or g * n > few.ROWS:
            return self._fold(state, enter(call, q[:, None], scale=call.scale), strip, run, None)
        k, v = (enter(call, _of_run(x, strip, run)[0]) for x in (call.k, call.v))
        rows = few.gather(enter(call, q.reshape(g * n, d)), k, v, call.scale)
        part = State(*(x.reshape(1, 1, g, n, -1) for x in rows))
        return online_softmax.merge(state, part, xp=np)

    def _empty(self, shape: tuple[int, ...]) -> State:
        zeros = np.zeros((shape[0], 1, *shape[1:]), self.call.acc)
        return online_softmax.empty(zeros, self.call.sinks, xp=np)

    def _gather(self, strip: Strip, q: Array, out: Array, lse: Array) -> None:
        """Compute the rows of a strip by `gather`, and by `fold` what that leaves."""
        call, reach = self.call, self.reach()
        spans = [_windows(reach, strip, run) for run in strip.runs]
        rows = gather.Rows(q, call.scale, call.v.shape[-1], call.acc)
        if len(reach) > 1 and not all((span <= rows.limit).all() for span in spans):
            # What one head needs is no business of the others.
            for head in self.cut(1, self.alone):
                head.run(strip)
            return
        rows.choose([self._common(strip, *pair) for pair in zip(strip.runs, spans, strict=True)])
        rest = None if call.sinks is None else self._empty(out.shape)
        raw = None
        for run, span in zip(strip.runs, spans, strict=True):
            near = span <= rows.limit
            far = None if near.all() else ~near
            look = self._look(strip, run) if run.hide else None
            if far is None or (run.hide and near.any()):
                k, v = self._keys(strip, run, transposed=True)
                rows.absorb(k, v, look, far)
            if far is not None:
                if rest is None:
                    rest = self._empty(out.shape)
                if raw is None:
                    raw = enter(call, q[:, None], scale=call.scale)
                rest = self._fold(rest, raw, strip, run, far)
        if rest is None:
            rows.finish(out, lse)
            return
        state = rows.state()
        _write(finish(call, online_softmax.merge(state, rest, xp=np)), out, lse)

    def _fold(self, state: State, q: Array, strip: Strip, run: Run, only: Array | None) -> State:
        """Absorb a run of keys, of these `only`, by the fold that all libraries share."""
        call, visible = self.call, None
        pairs = TilePairs(
            strip.i0, strip.rows, run.j0, run.j1 - run.j0, call.offset, xp=np, device=None
        )
        if run.hide and call.pattern is not None:
            visible = (run.sees or call.pattern).visible(pairs)
            if only is not None:
                visible = visible & only[:, None, None, None, :]
        k, v = (x[:, None] for x in self._keys(strip, run, transposed=False))
        finite = visible is None or bool(np.isfinite(np.sum(k)) and np.isfinite(np.sum(v)))
        return fold(call, state, q, k, v, pairs, visible=visible, finite=finite or None)

    def _keys(self, strip: Strip, run: Run, *, transposed: bool) -> tuple[Array, Array]:
        """Keys (count, m, D), or transposed, and values (count, m, Dv) of a run."""
        call, m = self.call, run.j1 - run.j0
        k, v = (_of_run(x, strip, run) for x in (call.k, call.v))
        # A copy lies as that of one head would.
        k, v = (x if x.dtype == call.acc else x.astype(call.acc, order="C") for x in (k, v))
        if not transposed:
            return _overlapping(k, strip, m), _overlapping(v, strip, m)
        h, n, d = k.shape
        if n == m and not loops.unpacked():
            return k.mT, v
        # Small products are faster from keys that lie transposed and values that begin with a line.
        kt = loops.turn(k, out=loops.spread_rows("keys", (h, d, n), k.dtype))
        if n == m:
            return kt, loops.laid_out(v, "laid out")
        step = (strip.rows * kt.strides[2], *kt.strides[1:])
        return as_strided(kt, (strip.tiles, d, m), step), _overlapping(v, strip, m)

    def _common(self, strip: Strip, run: Run, span: Array) -> Array:
        """What `span` holds for keys that every row of the strip sees, or some of those."""
        if not run.hide:
            return span
        pattern: Any = run.sees or self.call.pattern
        if pattern.relative and strip.tiles == 1:
            return span[:, self._look(strip, run).common]
        return span[:, :0]

    def _look(self, strip: Strip, run: Run) -> Look:
        at, m, acc = self.call.offset, run.j1 - run.j0, self.call.acc
        pattern: Any = run.sees or self.call.pattern
        if pattern.relative:
            return _relative_look(pattern, strip.i0 + at - run.j0, strip.rows, m, acc)
        rows, partly, _ = _rows_that_see(pattern, strip.i0, at, strip.rows, run)
        pairs = TilePairs(
            strip.i0 + partly[0], partly[1] - partly[0], run.j0, m, at, xp=np, device=None
        )
        return Look(rows, partly, pattern.visible(pairs).astype(acc), slice(0))


# Calls of one shape need the same few, again and again.
@lru_cache(maxsize=32)
def _relative_look(pattern: Pattern, at: int, n: int, m: int, acc: Any) -> Look:
    """The look of queries at positions ``[at, at + n)`` at keys ``[0, m)``."""
    rows, partly, everyone = _rows_that_see(pattern, 0, at, n, Run(0, m, hide=True))
    at, n = at + partly[0], partly[1] - partly[0]
    # What depends on distance alone is the same along each diagonal: it is asked once.
    line = TilePairs(0, 1, 1 - n - at, n + m - 1, 0, xp=np, device=None)
    seen = np.broadcast_to(pattern.visible(line), (1, n + m - 1))[0].astype(acc)
    (step,) = seen.strides
    weights = as_strided(seen[max(n - 1, 0) :], (n, m), (-step, step))
    common = np.flatnonzero(weights.all(axis=0)) if everyone else slice(0)
    return Look(rows, partly, weights if m >= WIDE else np.ascontiguousarray(weights), common)


def _rows_that_see(
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


def _tiles_of(x: Array, strip: Strip) -> Array:
    """Rows ``(Hkv, G, N, D)`` of a strip as a view ``(count, G, rows, D)``."""
    rows = x[:, :, strip.i0 : strip.stop]
    if strip.tiles == 1:
        return rows
    _, g, _, d = x.shape
    return rows[0].reshape(g, strip.tiles, strip.rows, d).transpose(1, 0, 2, 3)


def _of_run(x: Array, strip: Strip, run: Run) -> Array:
    """Keys ``(Hkv, Nk, ...)`` of a run, for all tiles together."""
    if run.parts:
        parts = [x[:, j0:j1] for j0, j1 in run.parts]
        return np.ascontiguousarray(np.concatenate(parts, axis=1))
    j0, j1 = strip.keys(run)
    return x[:, j0:j1]


def _overlapping(x: Array, strip: Strip, m: int) -> Array:
    """``(count, m, D)`` views of `x`, each ``strip.rows`` further on; `x` where that is all."""
    _, n, d = x.shape
    if n == m:
        return x
    return as_strided(x, (strip.tiles, m, d), (strip.rows * x.strides[1], *x.strides[1:]))


def _windows(x: Array, strip: Strip, run: Run) -> Array:
    """What ``x (Hkv, Nk)`` holds for the keys of a run, ``(count, m)`` or ``(Hkv, m)``."""
    if strip.tiles == 1 or not run.moves:
        return _of_run(x, strip, run)
    step = x.strides[1]
    return as_strided(x[:, run.j0 :], (strip.tiles, run.j1 - run.j0), (strip.rows * step, step))


def _write(results: tuple[Array, Array], out: Array, lse: Array) -> None:
    out[...], lse[..., 0] = results[0][:, 0], results[1][:, 0]
