"""
The schedule for NumPy: jobs of (item, head, queries) on a pool of threads.

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
from arrattn._core.plan import Plan, choose_tile, make_plan
from arrattn._core.tiles import TilePairs, pick_item
from arrattn._core.typing import Array
from arrattn.patterns import Pattern, Rectangles

#: Scores held at once by one worker: a MiB of float32, about a second-level cache.
BUDGET = 1 << 18

#: Pairs of a head, and keys, up to which many heads are done at once.
SMALL, SMALL_KEYS = 1 << 14, 512

#: Keys of a run where rows are so few that reading keys is what takes the time.
FEW_KEYS = 1 << 14

#: Rows of a tile that see none of its keys are left out, so many at a time.
GRAIN = 64

#: Bands of a local window: rows of their tiles, from the smallest.
BAND_ROWS = (32, 64, 128, 256)


class Run(NamedTuple):
    """Keys ``[j0, j1)``, and whether any pair with them has to be hidden."""

    j0: int
    j1: int
    hide: bool


class Strip(NamedTuple):
    """
    What one job does: so many `tiles` of `rows` queries from `i0` on, and their runs of keys.

    The keys of tile ``c`` are those of `runs`, ``c * rows`` further on.
    """

    i0: int
    rows: int
    tiles: int
    runs: tuple[Run, ...]

    @property
    def cost(self) -> int:
        """Pairs that are looked at."""
        return self.tiles * self.rows * sum(run.j1 - run.j0 for run in self.runs)


class Cut(NamedTuple):
    """How one item is cut: into bands of so many rows, or into the tiles of a plan."""

    strips: tuple[Strip, ...]
    band_rows: int | None
    plan: Plan | None


def attend(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    """What `engine.attend` does, for NumPy arrays."""
    (hkv, g), (nq, nk) = call.heads, call.lengths
    out = np.empty((*call.batch, hkv, g, nq, call.v.shape[-1]), call.acc)
    lse = np.empty((*call.batch, hkv, g, nq), call.acc)
    small = g * nq * nk * max(call.q.shape[-1], call.v.shape[-1]) <= loops.SMALL
    if tile is None and is_small(call):
        loops.run_jobs(list(_small_jobs(call, out, lse)), small=small)
        return out, lse
    jobs: list[tuple[int, Any]] = []
    together: list[Few] = []
    for b, item, plan in _parts(call, tile):
        keys = _all_seen(item, plan)
        if keys is not None:
            together.append(Few(item, keys, out[b], lse[b]))
            jobs += together[-1].jobs()
            continue
        for h in range(hkv):
            head = Head(head_item(item, h), out[b][h], lse[b][h])
            jobs += [(strip.cost, partial(head.run, strip)) for strip in plan.strips]
    # The largest first: whoever is done early then finds small ones.
    jobs.sort(key=lambda job: -job[0])
    loops.run_jobs([job for _, job in jobs], small=small)
    for one in together:
        one.finish()
    return out, lse


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
    plain = call.pattern is None or call.pattern.relative
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
        s = loops.product(q * d**-0.5, k.swapaxes(-1, -2), "scores", xp=np)
        top = s.max(axis=-1, keepdims=True)
        if not np.isfinite(top).all():
            return None
        p = loops.exp_shifted(s, top, xp=np)
        total = loops.row_sums(p, xp=np)
        return np.divide(np.matmul(p, v), total)


_EXACT = (np.dtype(np.float32), np.dtype(np.float64))


# -- One item, one head -----------------------------------------------------------------------


def batch_item(call: SoftmaxInputs, b: tuple[int, ...]) -> SoftmaxInputs:
    """One batch item of a call, without batch axes."""
    offset, pattern = call.offset, call.pattern
    return call._replace(
        q=pick_item(call.q, b, 4),
        k=pick_item(call.k, b, 3),
        v=pick_item(call.v, b, 3),
        bias=None if call.bias is None else pick_item(call.bias, b, 4),
        guide=None if call.guide is None else pick_item(call.guide, b, 4),
        offset=offset if isinstance(offset, int) else int(pick_item(offset, b, 4).item()),
        pattern=_picked(pattern, partial(pick_item, b=b)),
        batch=(),
    )


def head_item(call: SoftmaxInputs, h: int) -> SoftmaxInputs:
    """One key head, with its query heads, of a batch item."""

    def pick(x: Array, trailing: int) -> Array:
        return x if trailing != 4 or x.shape[0] == 1 else x[h : h + 1]

    return call._replace(
        q=call.q[h : h + 1],
        k=call.k[h : h + 1],
        v=call.v[h : h + 1],
        bias=None if call.bias is None else pick(call.bias, 4),
        guide=None if call.guide is None else pick(call.guide, 4),
        sinks=None if call.sinks is None else call.sinks[h : h + 1],
        pattern=_picked(call.pattern, pick),
    )


def _picked(pattern: Pattern | None, choose: Any) -> Pattern | None:
    return pattern if pattern is None or pattern.relative else patterns.pick(pattern, choose)


# -- Which keys each job visits ---------------------------------------------------------------


def cut(call: SoftmaxInputs, tile: tuple[int, int] | None) -> Cut:
    """The strips of one item, the same for all its heads."""
    (_, g), (nq, nk), at = call.heads, call.lengths, call.offset
    if call.pattern is None or call.pattern.relative:
        return _cut_relative(call.pattern, g, nq, nk, at, tile, call.bias is None)
    return _cut_tiles(call.pattern, g, nq, nk, at, tile)


# Calls of one shape are planned alike, and a plan can take as long as a short call.
@lru_cache(maxsize=32)
def _cut_relative(
    pattern: Pattern | None,
    g: int,
    nq: int,
    nk: int,
    at: int,
    tile: tuple[int, int] | None,
    free: bool,
) -> Cut:
    band = None if pattern is None or tile or not free else pattern.band
    rows = None if band is None else _band_rows(band, g, nq, nk)
    if band is None or rows is None:
        return _cut_tiles(pattern, g, nq, nk, at, tile)
    return Cut(tuple(_cut_band(band, rows, g, nq, nk, at)), rows, None)


def _cut_tiles(
    pattern: Pattern | None, g: int, nq: int, nk: int, at: int, tile: tuple[int, int] | None
) -> Cut:
    grain = GRAIN if pattern is not None and pattern.relative else None
    shape = tile or choose_tile(pattern, nq, nk, at, lanes=g, budget=BUDGET, grain=grain)
    shape = (min(shape[0], max(nq, 1)), shape[1])
    plan = make_plan(pattern, nq, nk, at, shape)
    pairs = BUDGET // g if g * shape[0] > few.ROWS else min(BUDGET // g, shape[0] * FEW_KEYS)
    strips = []
    for t in range(plan.kinds.shape[-2]):
        i0, i1 = plan.rows(t)
        runs = (Run(*run) for run in plan.runs(t, pairs, apart=True))
        strips.append(Strip(i0, i1 - i0, 1, tuple(runs)))
    return Cut(tuple(strips), None, plan)


def _band_rows(band: tuple[int | None, int | None], g: int, nq: int, nk: int) -> int | None:
    """Rows of a tile whose keys, a band, are all computed at once; None where they are not."""
    lo, hi = band
    if lo is None or hi is None or hi <= lo:
        return None
    width = hi - lo
    fitting = [n for n in BAND_ROWS if g * n * (n + width - 1) <= BUDGET // 2]
    if not fitting or nq < 2 * fitting[0] or nk < 2 * width:
        return None
    # Half of the width: fewer rows make small products, more rows compute more that is hidden.
    return next((n for n in fitting if 2 * n >= width - 1), fitting[-1])


def _cut_band(
    band: tuple[Any, Any], rows: int, g: int, nq: int, nk: int, at: int
) -> Iterator[Strip]:
    lo, hi = band
    width = rows + hi - lo - 1
    # Tiles whose whole band lies among the keys are alike, so many are computed at once.
    first = min(max(0, -lo - at), nq)
    alike = max(0, min(nq, nk - hi + 1 - at) - first) // rows
    most = max(1, BUDGET // (g * rows * width))

    def edge(i0: int, i1: int) -> Iterator[Strip]:
        for i in range(i0, i1, rows):
            n = min(rows, i1 - i)
            j0, j1 = max(0, i + at + lo), min(nk, i + n - 1 + at + hi)
            yield Strip(i, n, 1, (Run(j0, j1, hide=True),) if j0 < j1 else ())

    yield from edge(0, first)
    for t in range(0, alike, most):
        i0 = first + t * rows
        j0 = i0 + at + lo
        yield Strip(i0, rows, min(most, alike - t), (Run(j0, j0 + width, hide=True),))
    yield from edge(first + alike * rows, nq)


class Head:
    """
    One key head of one item: what its jobs share, and where they write.

    Parameters
    ----------
    call : SoftmaxInputs
        Without batch axes, and of a single key head.
    out, lse : array, shapes (G, Nq, Dv) and (G, Nq)
        Where the results go.
    """

    def __init__(self, call: SoftmaxInputs, out: Array, lse: Array) -> None:
        self.call, self.out, self.lse = call, out, lse
        self.lock = threading.Lock()
        self._reach: Array | None = None
        # Softcap and bias change scores after the product, and bounds on them with it.
        self.plain = call.bias is None and call.softcap is None

    def reach(self) -> Array:
        """`gather.reach` of the keys, computed by the first job that asks."""
        with self.lock:
            if self._reach is None:
                self._reach = gather.reach(self.call.k[0], self.call.v[0], self.call.acc)
            return self._reach

    def run(self, strip: Strip) -> None:
        """Compute the rows of a strip."""
        g, i1 = self.call.q.shape[-3], strip.i0 + strip.rows * strip.tiles
        q = _tiles_of(self.call.q[0], strip)
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
        k, v = (enter(call, x[0, run.j0 : run.j1]) for x in (call.k, call.v))
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
            visible = call.pattern.visible(pairs)
            if only is not None:
                visible = visible & only[:, None, None, None, :]
        k, v = (x[:, None] for x in self._keys(strip, run, transposed=False))
        finite = visible is None or bool(np.isfinite(np.sum(k)) and np.isfinite(np.sum(v)))
        return fold(call, state, q, k, v, pairs, visible=visible, finite=finite or None)

    def _keys(self, strip: Strip, run: Run, *, transposed: bool) -> tuple[Array, Array]:
        """Keys (count, m, D), or transposed, and values (count, m, Dv) of a run."""
        call, stop = self.call, run.j1 + strip.rows * (strip.tiles - 1)
        k, v = (enter(call, x[0, run.j0 : stop]) for x in (call.k, call.v))
        m = run.j1 - run.j0
        if not transposed:
            return _overlapping(k, strip, m), _overlapping(v, strip, m)
        if strip.tiles == 1:
            return k.T[None], v[None]
        # Small products are faster from keys that lie transposed.
        kt = loops.work_space("keys", (k.shape[1], k.shape[0]), k.dtype)
        np.copyto(kt, k.T)
        step = (strip.rows * kt.strides[1], *kt.strides)
        return as_strided(kt, (strip.tiles, kt.shape[0], m), step), _overlapping(v, strip, m)

    def _common(self, strip: Strip, run: Run, span: Array) -> Array:
        """What `span` holds for keys that every row of the strip sees, or some of those."""
        if not run.hide:
            return span
        pattern: Any = self.call.pattern
        if pattern.relative and strip.tiles == 1:
            return span[:, self._look(strip, run).common]
        return span[:, :0]

    def _look(self, strip: Strip, run: Run) -> Look:
        call, at, m = self.call, self.call.offset, run.j1 - run.j0
        pattern: Any = call.pattern
        if pattern.relative:
            return _relative_look(pattern, strip.i0 + at - run.j0, strip.rows, m, call.acc)
        pairs = TilePairs(strip.i0, strip.rows, run.j0, m, at, xp=np, device=None)
        every = (0, strip.rows)
        return Look(every, every, pattern.visible(pairs).astype(call.acc), slice(0))


# Calls of one shape need the same few, again and again.
@lru_cache(maxsize=32)
def _relative_look(pattern: Pattern, at: int, n: int, m: int, acc: Any) -> Look:
    """The look of queries at positions ``[at, at + n)`` at keys ``[0, m)``."""
    i0 = np.arange(0, n, GRAIN)[:, None]
    i1 = np.minimum(i0 + GRAIN, n)
    j0, j1 = np.array([[0]]), np.array([[m]])
    some, every = pattern.rectangles(Rectangles(i0, i1, i0 + at, i1 + at, j0, j1))
    some, every = np.broadcast_to(some, i0.shape), np.broadcast_to(every, i0.shape)

    def rows(which: Array) -> tuple[int, int]:
        found = np.flatnonzero(which).tolist()
        return (found[0] * GRAIN, min((found[-1] + 1) * GRAIN, n)) if found else (0, 0)

    partly = rows(some & ~every)
    pairs = TilePairs(partly[0], partly[1] - partly[0], 0, m, at, xp=np, device=None)
    visible = pattern.visible(pairs)
    common = np.broadcast_to(visible.all(axis=-2) & some.all(), (m,))
    return Look(rows(some), partly, visible.astype(acc), np.flatnonzero(common))


def _tiles_of(x: Array, strip: Strip) -> Array:
    """Rows ``(G, N, D)`` of a strip as a view ``(count, G, rows, D)``."""
    rows = x[:, strip.i0 : strip.i0 + strip.rows * strip.tiles]
    g, _, d = x.shape
    return rows.reshape(g, strip.tiles, strip.rows, d).transpose(1, 0, 2, 3)


def _overlapping(x: Array, strip: Strip, m: int) -> Array:
    """``(count, m, D)`` views of `x`, each ``strip.rows`` further on."""
    if strip.tiles == 1:
        return x[None]
    return as_strided(x, (strip.tiles, m, x.shape[1]), (strip.rows * x.strides[0], *x.strides))


def _windows(x: Array, strip: Strip, run: Run) -> Array:
    """What ``x (Nk,)`` holds for the keys of a run, ``(count, m)``."""
    if strip.tiles == 1:
        return x[None, run.j0 : run.j1]
    (step,) = x.strides
    return as_strided(x[run.j0 :], (strip.tiles, run.j1 - run.j0), (strip.rows * step, step))


def _write(results: tuple[Array, Array], out: Array, lse: Array) -> None:
    out[...], lse[..., 0] = results[0][:, 0], results[1][:, 0]
