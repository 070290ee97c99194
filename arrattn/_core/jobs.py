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
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from arrattn import patterns
from arrattn._core import few, gather, online_softmax, small_heads, threads, workspace
from arrattn._core.few import Few
from arrattn._core.fold import enter, finish, fold
from arrattn._core.gather import Look
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State
from arrattn._core.strips import BUDGET, Cut, Run, Strip, cut, rows_that_see
from arrattn._core.tiles import TilePairs, pick_item
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

#: Pairs that small jobs have together when one thread does them.
BUNDLE = BUDGET // 2

#: Keys from which on weights are read along diagonals rather than row by row.
WIDE = 512


def attend(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    """What `engine.attend` does, for NumPy arrays."""
    (hkv, g), (nq, nk) = call.heads, call.lengths
    shape = (*call.batch, hkv, g, nq, call.v.shape[-1])
    out, lse = np.empty(shape, call.acc), np.empty(shape[:-1], call.acc)
    small = g * nq * nk * max(call.q.shape[-1], call.v.shape[-1]) <= threads.SMALL
    if tile is None and small_heads.is_small(call):
        threads.run_jobs(list(small_heads.small_jobs(call, out, lse)), small=small)
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
    threads.run_jobs(_bundled(jobs), small=small)
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
    jobs, workers = items * hkv * len(strips), threads.num_threads()

    def fit(strip: Strip) -> int:
        rows, keys = g * strip.rows, max((run.j1 - run.j0 for run in strip.runs), default=1)
        if strip.tiles > 1 or rows <= few.ROWS:
            return 1
        most = min(hkv, BUDGET // max(rows * keys, rows * width, keys * width, 1))
        # Of `n` heads each, ``jobs / n`` are shared out among the threads.
        best = -(-jobs // workers)
        return max(n for n in range(1, max(most, 1) + 1) if n * -(-jobs // (n * workers)) <= best)

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
        if n == m and not workspace.unpacked():
            return k.mT, v
        # Small products are faster from keys that lie transposed and values that begin with a line.
        kt = workspace.turn(k, out=workspace.spread_rows("keys", (h, d, n), k.dtype))
        if n == m:
            return kt, workspace.laid_out(v, "laid out")
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
        rows, partly, _ = rows_that_see(pattern, strip.i0, at, strip.rows, run)
        pairs = TilePairs(
            strip.i0 + partly[0], partly[1] - partly[0], run.j0, m, at, xp=np, device=None
        )
        return Look(rows, partly, pattern.visible(pairs).astype(acc), slice(0))


# Calls of one shape need the same few, again and again.
@lru_cache(maxsize=32)
def _relative_look(pattern: Pattern, at: int, n: int, m: int, acc: Any) -> Look:
    """The look of queries at positions ``[at, at + n)`` at keys ``[0, m)``."""
    rows, partly, everyone = rows_that_see(pattern, 0, at, n, Run(0, m, hide=True))
    at, n = at + partly[0], partly[1] - partly[0]
    # What depends on distance alone is the same along each diagonal: it is asked once.
    line = TilePairs(0, 1, 1 - n - at, n + m - 1, 0, xp=np, device=None)
    seen = np.broadcast_to(pattern.visible(line), (1, n + m - 1))[0].astype(acc)
    (step,) = seen.strides
    weights = as_strided(seen[max(n - 1, 0) :], (n, m), (-step, step))
    common = np.flatnonzero(weights.all(axis=0)) if everyone else slice(0)
    return Look(rows, partly, weights if m >= WIDE else np.ascontiguousarray(weights), common)


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
