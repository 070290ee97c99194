"""
The schedule of sparse attention for NumPy: jobs of (head, span of queries) on a pool of threads.

The queries of a span that look at the same block of keys are brought together, so that all
scores come from dense products; see `online_softmax` for what is kept of each query. What
`select` does for all libraries is done here with no padding and as few passes as can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from arrattn import patterns
from arrattn._core import fold, jobs, loops, routing
from arrattn._core.gather import LOG2E
from arrattn._core.inputs import Choice, SoftmaxInputs
from arrattn._core.plan import make_plan
from arrattn._core.routing import Rows
from arrattn._core.tiles import TilePairs
from arrattn._core.topk import Best, best_of
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

#: Scores held at once by one worker: those of a span with the keys of its blocks, and those of
#: a tile, which should stay in the caches.
SPAN, TILE = 1 << 22, 1 << 19

#: Scores of a tile with all keys: its products are the faster the more queries there are.
EXACT = 1 << 21

#: Queries that a block of keys should be visited with, on average.
MANY = 128


class Sight(NamedTuple):
    """Who sees whom, and where that need not be asked: ``kinds`` by ``rows`` and block."""

    pattern: Pattern | None
    kinds: Array | None
    rows: int

    def full(self, i: Array, block: int) -> bool:
        """Whether queries `i` all see the whole of a block."""
        if self.pattern is None:
            return True
        return self.kinds is not None and bool((self.kinds[i // self.rows, block] == 2).all())


def look(call: SoftmaxInputs, pattern: Pattern | None, rows: int, size: int) -> Sight:
    """The sight of one item through a pattern."""
    if pattern is None:
        return Sight(None, None, rows)
    plan = make_plan(pattern, *call.lengths, call.offset, (rows, size)).merged()
    return Sight(pattern, plan.kinds, rows)


class FlatPairs:
    """
    Pairs of one head group of one item: rows ``(g, i)`` and keys, (R, 1) and (1 | R, m).
    """

    def __init__(self, g: Array, i: Array, j: Array, offset: int) -> None:
        self.g, self.i, self.j, self.p = g, i, j, i + offset
        self.xp: Any = np
        self.device: Any = None

    def of_batch(self, x: Array) -> Array:
        """A number of the item."""
        return np.reshape(x, (1, 1))

    def of_queries(self, x: Array) -> Array:
        """``(Nq,)`` -> (R, 1)."""
        return x.reshape(-1)[self.i]

    def of_keys(self, x: Array) -> Array:
        """``(Nk,)`` -> as `j`."""
        return x.reshape(-1)[self.j]

    def of_pairs(self, x: Array) -> Array:
        """``(1, G, Nq, Nk)``, any of them 1 -> broadcastable to the pairs."""
        at = (self.g, self.i, self.j)
        return x[0][tuple(0 if n == 1 else a for n, a in zip(x.shape[-3:], at, strict=True))]


class Head:
    """
    One key head of one item, with its query heads: what its jobs share.

    Parameters
    ----------
    call : SoftmaxInputs
        Without batch axes, and of a single key head.
    choice : Choice
        What is chosen.
    into : tuple of arrays
        Where output, log-sum-exp and selection go: (G, Nq, ·), (G, Nq) and (G | 1, rows, count).
    sights : tuple of Sight, optional
        Of the own block, and of what can be chosen; made here where heads differ.
    """

    def __init__(
        self,
        call: SoftmaxInputs,
        choice: Choice,
        into: tuple[Array, Array, Array],
        sights: tuple[Sight, Sight] | None,
    ) -> None:
        self.call, self.choice = call, choice
        self.own, self.free = sights or _sights(call, choice)
        self.out, self.lse, self.selection = into
        self.k, self.bad_keys = _clean(fold.enter(call, call.k[0]), whole=True)
        self.v, self.bad_values = _clean(fold.enter(call, call.v[0]), whole=False)
        # A positive power of two changes no digit: it can come before the product.
        exact = call.scale > 0 and math.frexp(call.scale)[0] == 0.5
        self.before, self.after = (call.scale, 1.0) if exact else (1.0, call.scale)
        self.plain = call.softcap is None and call.bias is None
        self.unit = LOG2E
        if self.plain and choice.select == "blocks":  # no choice depends on these scores
            self.before, self.after, self.unit = call.scale * LOG2E, 1.0, 1.0
        bounds = choice.exhaustive and (choice.score != "bound" or call.bias is not None)
        self.guide = None if bounds else routing.guides(call, choice)
        self.size, self.nk = choice.block, call.lengths[1]
        self.n_blocks = -(-self.nk // self.size)

    def block(self, b: int) -> slice:
        """The keys of a block."""
        return slice(b * self.size, min((b + 1) * self.size, self.nk))

    def scores(self, q: Array, g: Array, i: Array, keys: slice, sight: Sight) -> Array:
        """
        Scores of rows ``q (R, D)`` with a range of keys, ``-inf`` where hidden.

        In units of which `unit` makes log 2, in memory that lives until this thread's next.
        """
        s = np.matmul(
            q,
            self.k[keys].T,
            out=loops.work_space("scores", (len(q), keys.stop - keys.start), q.dtype),
        )
        if self.after != 1.0:
            s *= np.asarray(self.after, s.dtype)
        full = sight.full(i, keys.start // self.size) and keys.stop - keys.start <= self.size
        if full and self.plain and self.bad_keys is None:
            return s
        columns = np.arange(keys.start, keys.stop)[None, :]
        pairs = FlatPairs(g[:, None], i[:, None], columns, int(self.call.offset))
        if not self.plain:
            s = fold.adjust(self.call, s, pairs)
        if self.bad_keys is not None:
            s[:, self.bad_keys[keys]] = math.nan
        if not full and sight.pattern is not None:
            seen = sight.pattern.visible(pairs)
            np.copyto(s, -math.inf, where=~seen)
        return s

    def values(self, p: Array, seen: Array | None, keys: slice, slot: str) -> Array:
        """Values of a range of keys, weighted with `p` and summed; NaN where a bad one is seen."""
        v = self.v[keys]
        o = np.matmul(p, v, out=loops.work_space(slot, (len(p), v.shape[1]), p.dtype))
        if seen is not None and self.bad_values is not None and self.bad_values[keys].any():
            o[seen.astype(p.dtype) @ self.bad_values[keys].astype(p.dtype) > 0] = math.nan
        return o


def _clean(x: Array, *, whole: bool) -> tuple[Array, Array | None]:
    """`x (Nk, D)` without what is not finite, and where that was: in `whole` rows, or each."""
    if np.isfinite(x.sum()):
        return x, None
    bad = ~np.isfinite(x)
    if not bad.any():
        return x, None
    bad = bad.any(axis=-1) if whole else bad
    return np.where(bad[:, None] if whole else bad, 0, x), bad


class State:
    """
    Maximum, sum and weighted sum of `n` rows, in units of log 2; `sinks` (n, 1) or None.
    """

    def __init__(self, n: int, head: Head, sinks: Array | None) -> None:
        dv, dtype = head.v.shape[1], head.v.dtype
        self.watched, self.unit = head.bad_values is not None, head.unit
        self.m = loops.work_space("maxima", (n, 1), dtype)
        self.l = loops.work_space("totals", (n, 1), dtype)
        self.o = loops.work_space("sums", (n, dv), dtype)
        self.m[...] = -math.inf if sinks is None else sinks * LOG2E
        self.l[...] = 0 if sinks is None else np.where(sinks == -math.inf, 0, 1)
        self.o[...] = 0

    def absorb(
        self,
        at: Any,
        s: Array,
        values: Callable[[Array, Array | None], Array],
    ) -> None:
        """
        Add scores ``s (r, m)``, in the head's units, of the rows `at`, which differ; uses `s` up.

        ``values(p, seen)`` weighs and sums the values.
        """
        if self.unit != 1.0:
            np.multiply(s, np.asarray(self.unit, s.dtype), out=s)
        before = self.m[at]
        top = np.maximum(before, s.max(axis=-1, keepdims=True, initial=-math.inf))
        shift = np.where(top == -math.inf, 0, top)
        seen = s != -math.inf if self.watched else None
        np.exp2(np.subtract(s, shift, out=s), out=s)
        decay = np.exp2(before - shift)
        self.l[at] = self.l[at] * decay + loops.row_sums(s, xp=np)
        self.o[at] = self.o[at] * decay + values(s, seen)
        self.m[at] = top

    def finish(self, out: Array, lse: Array) -> None:
        """Write outputs (R, Dv) and log-sum-exps (R,)."""
        none = self.l == 0
        total = np.where(none, 1, self.l)
        np.divide(self.o, total, out=self.o)
        m = np.where(self.m == -math.inf, 0, self.m) if none.any() else self.m
        found = (m + np.log2(total)) * np.asarray(1 / LOG2E, total.dtype)
        np.copyto(found, self.m * np.asarray(1 / LOG2E, total.dtype), where=none)
        out[...] = self.o.reshape(out.shape)
        lse[...] = found.reshape(lse.shape)


# -- Jobs -------------------------------------------------------------------------------------


def takes(choice: Choice) -> bool:
    """Whether this schedule does such a call: all but keys that several choose together."""
    return choice.select == "blocks" or choice.per == "query"


def attend(call: SoftmaxInputs, choice: Choice) -> tuple[Array, ...]:
    """What `select.attend_selected` does, for NumPy arrays, without what is always seen."""
    (hkv, g), nq = call.heads, choice.queries
    out = np.empty((*call.batch, hkv, g, nq, call.v.shape[-1]), call.acc)
    lse = np.empty((*call.batch, hkv, g, nq), call.acc)
    shape = (*call.batch, hkv, *choice.selection_rows(call.heads), choice.many)
    selection = np.empty(shape if choice.selection else (*call.batch, hkv, 0), np.int64)
    for b in np.ndindex(*call.batch):
        item = jobs.batch_item(call, b)
        alike = item.pattern is None or item.pattern.relative
        alike = alike and (item.always is None or item.always.relative)
        sights = _sights(item, choice) if alike else None
        heads: list[Any] = [None] * hkv
        loops.run_jobs(
            [
                partial(
                    _begin, heads, h, item, choice, (out[b][h], lse[b][h], selection[b][h]), sights
                )
                for h in range(hkv)
            ]
        )
        loops.run_jobs([job for head in heads for job in _jobs(head)])
    return (out, lse, selection) if choice.selection else (out, lse)


def _begin(
    heads: list[Any],
    h: int,
    item: SoftmaxInputs,
    choice: Choice,
    into: tuple[Array, Array, Array],
    sights: tuple[Sight, Sight] | None,
) -> None:
    heads[h] = Head(jobs.head_item(item, h), choice, into, sights)


def _sights(call: SoftmaxInputs, choice: Choice) -> tuple[Sight, Sight]:
    not_always = None if call.always is None else ~call.always
    free = patterns.both(call.pattern, not_always)
    rows = choice.block
    if choice.exhaustive:
        rows = _tile_rows(call, choice)
        free = patterns.both(free, ~patterns.OwnBlock(choice.block, call.lengths[1]))
    return look(call, call.pattern, rows, choice.block), look(call, free, rows, choice.block)


def _tile_rows(call: SoftmaxInputs, choice: Choice) -> int:
    (_, g), (_, nk) = call.heads, call.lengths
    return min(max(EXACT // (g * nk), 16), max(choice.queries, 1))


def _span(call: SoftmaxInputs, choice: Choice) -> int:
    """How many queries a job has."""
    (_, g), nk = call.heads, call.lengths[1]
    nq, size = choice.queries, choice.block
    if choice.exhaustive:
        return _tile_rows(call, choice) * 4
    if choice.select == "blocks":
        span = max(MANY * -(-nk // size) // (max(choice.route, 1) * g), -(-nq // 8))
    else:
        span = SPAN // (max(choice.route, 1) * size * g)
    return max(min(-(-span // 64) * 64, nq), 64)


def _jobs(head: Head) -> Iterator[Callable[[], None]]:
    call, choice = head.call, head.choice
    if choice.per == "block":
        ids = _chosen_together(head)
        step = max(1, TILE // (2 * choice.block * choice.block * (choice.route + 1)))
        for t in range(0, choice.query_blocks, step):
            stop = min(t + step, choice.query_blocks)
            yield partial(_query_blocks, head, t, stop, ids[:, t:stop])
        return
    run = _exact_job if choice.exhaustive else _span_job
    step = _span(call, choice)
    for i0 in range(0, choice.queries, step):
        yield partial(run, head, i0, min(i0 + step, choice.queries))


def _rows_of(head: Head, i0: int, i1: int) -> tuple[Array, Array, Array, State]:
    """Queries (R, D) of all query heads, ``g`` and ``i`` of each row, and an empty state."""
    call = head.call
    g = call.heads[1]
    q = fold.enter(call, call.q[0, :, i0:i1]).reshape(g * (i1 - i0), -1)
    q = np.multiply(q, np.asarray(head.before, q.dtype))
    gs, at = np.repeat(np.arange(g), i1 - i0), np.tile(np.arange(i0, i1), g)
    sinks = None
    if call.sinks is not None:
        sinks = np.repeat(call.sinks.reshape(g, 1), i1 - i0, axis=0)
    return q, gs, at, State(len(q), head, sinks)


def _absorb_own(head: Head, q: Array, g: Array, i: Array, state: State, i0: int, i1: int) -> None:
    """The own blocks of queries ``[i0, i1)``."""
    offset, size = int(head.call.offset), head.size
    first, last = max(i0, -offset), min(i1, head.nk - offset)
    many, n = head.call.heads[1], i1 - i0
    while first < last:
        b = (first + offset) // size
        stop = min(last, (b + 1) * size - offset)
        rows: Any = slice(first - i0, stop - i0)
        if many > 1:
            rows = (np.arange(many)[:, None] * n + np.arange(first - i0, stop - i0)).reshape(-1)
        keys = head.block(b)
        s = _own_scores(head, q[rows], g[rows], i[rows], keys, (first, stop))
        state.absorb(rows, s, partial(head.values, keys=keys, slot="values"))
        first = stop


def _own_scores(
    head: Head, q: Array, g: Array, i: Array, keys: slice, span: tuple[int, int]
) -> Array:
    pattern, offset = head.own.pattern, int(head.call.offset)
    if pattern is None or not pattern.relative or head.own.full(i, keys.start // head.size):
        return head.scores(q, g, i, keys, head.own)
    s = head.scores(q, g, i, keys, Sight(None, None, 1))
    n, m = span[1] - span[0], keys.stop - keys.start
    hidden = _hidden(pattern, span[0] + offset - keys.start, n, m)
    np.copyto(s.reshape(-1, n, m), -math.inf, where=hidden)
    return s


@lru_cache(maxsize=32)
def _hidden(pattern: Pattern, at: int, n: int, m: int) -> Array:
    """What queries at positions ``[at, at + n)`` do not see of keys ``[0, m)``."""
    seen = ~pattern.visible(TilePairs(0, n, 0, m, at, xp=np, device=None))
    return np.broadcast_to(seen, (n, m))


# -- Blocks chosen for each query, and keys within them ---------------------------------------


def _span_job(head: Head, i0: int, i1: int) -> None:
    choice = head.choice
    q, g, i, state = _rows_of(head, i0, i1)
    _absorb_own(head, q, g, i, state, i0, i1)
    if choice.route:
        ids = _chosen_blocks(head, i0, i1)
        if choice.select == "blocks":
            for pairs, b in _by_block(ids, head.n_blocks):
                rows, keys = pairs // choice.route, head.block(b)
                s = head.scores(np.take(q, rows, axis=0), g[rows], i[rows], keys, head.free)
                state.absorb(rows, s, partial(head.values, keys=keys, slot="values"))
        else:
            _absorb_keys(head, q, g, i, ids, state)
    elif choice.selection:
        head.selection[:, i0:i1] = -1
    state.finish(head.out[:, i0:i1], head.lse[:, i0:i1])


def _chosen_blocks(head: Head, i0: int, i1: int) -> Array:
    """The blocks of each row, ``(R, route)``, ascending, padded with the number of blocks."""
    call, choice, step = head.call, head.choice, 512
    (_, many), n = call.heads, i1 - i0
    ids = np.empty((many, n, choice.route), np.int64)
    for a in range(i0, i1, step):
        b = min(a + step, i1)
        q = fold.enter(call, call.q[..., a:b, :])
        found = routing.choose_blocks(call, choice, head.guide, q, Rows(a, b - a), None)
        ids[:, a - i0 : b - i0] = found[0]
        if choice.selection and choice.select == "blocks":
            head.selection[:, a:b] = np.where(found[0] == head.n_blocks, -1, found[0])
    return ids.reshape(many * n, choice.route)


def _by_block(ids: Array, n_blocks: int) -> Iterator[tuple[Array, int]]:
    """Each block that anyone chose, with the pairs (row, choice) that chose it, ascending."""
    flat = ids.reshape(-1)
    order = np.argsort(flat.astype(np.int16 if n_blocks < 1 << 15 else np.int64), kind="stable")
    edges = np.searchsorted(flat[order], np.arange(n_blocks + 1)).tolist()
    for b in range(n_blocks):
        if edges[b] < edges[b + 1]:
            yield order[edges[b] : edges[b + 1]], b


def _absorb_keys(head: Head, q: Array, g: Array, i: Array, ids: Array, state: State) -> None:
    """The best keys of the blocks that each row looks into."""
    choice, size = head.choice, head.size
    n = ids.shape[1]
    s = np.empty((len(q), n, size), q.dtype)
    flat = s.reshape(len(q) * n, size)
    flat[ids.reshape(-1) == head.n_blocks] = -math.inf
    for pairs, b in _by_block(ids, head.n_blocks):
        rows, keys = pairs // n, head.block(b)
        found = head.scores(np.take(q, rows, axis=0), g[rows], i[rows], keys, head.free)
        if found.shape[1] == size:
            flat[pairs] = found
        else:
            flat[pairs] = np.pad(
                found, ((0, 0), (0, size - found.shape[1])), constant_values=-math.inf
            )
    start = np.where(ids == head.n_blocks, 0, ids * size)
    step = max(TILE // (4 * n * size), 16)
    for r0 in range(0, len(q), step):
        r = slice(r0, r0 + step)
        best = best_of(s[r].reshape(-1, n * size), choice.top_k)
        slot = best.columns // size
        first = np.take_along_axis(start[r], slot, axis=1)
        j = np.minimum(first + (best.columns - slot * size), head.nk - 1)
        _absorb_best(head, g[r], i[r], best, j, r, state)


def _absorb_best(
    head: Head, g: Array, i: Array, best: Best, j: Array, rows: slice, state: State
) -> None:
    """Add the best keys of each row to its state, and to the selection."""
    choice = head.choice
    s, chosen = best.scores, best.chosen
    if choice.selection:
        found = routing.smallest(j, chosen, choice.top_k, head.nk, xp=np)
        head.selection[g, i] = np.where(found == head.nk, -1, found)
    np.copyto(s, -math.inf, where=~chosen)
    state.absorb(rows, s, partial(_picked_values, head, j))


def _picked_values(head: Head, j: Array, p: Array, seen: Array | None) -> Array:
    o = np.empty((len(j), head.v.shape[1]), p.dtype)
    step = max(1, (1 << 16) // max(j.shape[1] * head.v.shape[1], 1))
    for a in range(0, len(j), step):
        here = j[a : a + step]
        v = loops.work_space("picked", (*here.shape, head.v.shape[1]), p.dtype)
        np.take(head.v, here, axis=0, out=v, mode="clip")
        np.matmul(p[a : a + step, None, :], v, out=o[a : a + step, None, :])
    if head.bad_values is not None and seen is not None:
        o[(head.bad_values[j] & seen[..., None]).any(axis=1)] = math.nan
    return o


# -- Keys chosen among all --------------------------------------------------------------------


def _exact_job(head: Head, i0: int, i1: int) -> None:
    step = _tile_rows(head.call, head.choice)
    for a in range(i0, i1, step):
        _exact_tile(head, a, min(a + step, i1))


def _exact_tile(head: Head, i0: int, i1: int) -> None:
    q, g, i, state = _rows_of(head, i0, i1)
    _absorb_own(head, q, g, i, state, i0, i1)
    kinds = None if head.free.kinds is None else head.free.kinds[i0 // head.free.rows]
    blocks = np.arange(head.n_blocks) if kinds is None else np.flatnonzero(kinds)
    if len(blocks) and head.guide is not None:
        blocks = _needed(head, q, g, i, blocks, kinds)
    if len(blocks):
        s, j = _all_scores(head, q, g, i, blocks, kinds)
        best = best_of(s.T, head.choice.top_k)
        _absorb_best(head, g, i, best, j[best.columns], slice(0, len(q)), state)
    elif head.choice.selection:
        head.selection[:, i0:i1] = -1
    state.finish(head.out[:, i0:i1], head.lse[:, i0:i1])


def _all_scores(
    head: Head, q: Array, g: Array, i: Array, blocks: Array, kinds: Array | None
) -> tuple[Array, Array]:
    """
    Scores of a tile with all keys of these blocks, ``(m, R)``, and which keys they are.

    Keys come first: BLAS is faster at the product that has many rows.
    """
    parts = [head.block(b) for b in blocks.tolist()]
    j = np.concatenate([np.arange(at.start, at.stop) for at in parts])
    whole = parts[-1].stop - parts[0].start == len(j)
    k = head.k[parts[0].start : parts[-1].stop] if whole else head.k[j]
    s = loops.work_space("all scores", (len(j), len(q)), q.dtype)
    np.matmul(k, q.T, out=s)
    if head.after != 1.0:
        s *= np.asarray(head.after, s.dtype)
    rows, columns = g[:, None], i[:, None]
    if not head.plain:
        pairs = FlatPairs(rows, columns, j[None, :], int(head.call.offset))
        s[...] = fold.adjust(head.call, s.T, pairs).T
    if head.bad_keys is not None:
        s[head.bad_keys[j]] = math.nan
    if kinds is None:
        return s, j
    pattern: Any = head.free.pattern
    for b in blocks[kinds[blocks] == 1].tolist():
        at = head.block(b)
        pairs = FlatPairs(rows, columns, np.arange(at.start, at.stop)[None], int(head.call.offset))
        first = int(np.searchsorted(j, at.start))
        part = s[first : first + at.stop - at.start]
        np.copyto(part, -math.inf, where=~pattern.visible(pairs).T)
    return s, j


def _needed(head: Head, q: Array, g: Array, i: Array, blocks: Array, kinds: Array | None) -> Array:
    """
    Those of the blocks that may hold one of the best keys of a query, by their bounds.

    A few blocks give each query a score that at least `top_k` keys reach. A block whose bound
    is lower has none of the best.
    """
    call, choice = head.call, head.choice
    guide: Any = head.guide
    d = q.shape[1]
    x = (q * np.asarray(head.after, q.dtype)).reshape(call.heads[1], -1, d)
    guides = np.broadcast_to(guide[0], (len(x), *guide.shape[-2:]))
    both = np.concatenate([np.maximum(x, 0), np.minimum(x, 0)], axis=-1)
    bound = np.matmul(both, guides.swapaxes(-1, -2)).reshape(len(q), -1)
    far = np.maximum(np.abs(guides[..., :d]), np.abs(guides[..., d:]))
    size = np.sqrt(np.vecdot(x, x))[..., None] * np.sqrt(np.vecdot(far, far))[:, None, :]
    # What rounding may add to a score or take off its bound.
    bound += size.reshape(bound.shape) * (4 * (d + 4) * np.finfo(q.dtype).eps)
    if call.softcap is not None:
        bound = call.softcap * np.tanh(bound / call.softcap)
        bound += 4 * call.softcap * np.finfo(q.dtype).eps
    if head.bad_keys is not None:
        bound[:, np.flatnonzero(head.bad_keys) // head.size] = math.inf
    bound = bound[:, blocks]
    few = min(-(-choice.top_k // head.size) + 1, len(blocks))
    first = np.unique(np.argpartition(-bound, few - 1, axis=-1)[:, :few])
    s, _ = _all_scores(head, q, g, i, blocks[first], kinds)
    if len(s) < choice.top_k:
        return blocks
    at = len(s) - choice.top_k
    reached = np.partition(s.T, at, axis=-1)[:, at : at + 1]
    return blocks[~(bound < reached).all(axis=0)]


# -- Blocks chosen for each block of queries --------------------------------------------------


def _chosen_together(head: Head) -> Array:
    """The blocks of each block of queries, ``(G, query blocks, route)``."""
    call, choice, size = head.call, head.choice, head.size
    g, n = call.heads[1], choice.query_blocks
    ids = np.full((g, n, choice.route), head.n_blocks)
    if choice.route:
        found, step = _pooled(head), max(1, (1 << 12) // size)
        if found is not None:  # there may be fewer blocks than there is room for
            ids[:, : found.shape[1]] = found
        for t in range(0, n if found is None else 0, step):
            rows = slice(t, min(t + step, n))
            ids[:, rows] = _routed(head, rows)
    if choice.selection:
        head.selection[...] = np.where(ids == head.n_blocks, -1, ids)
    return ids


def _routed(head: Head, at: slice) -> Array:
    call, choice, size = head.call, head.choice, head.size
    offset = int(call.offset)
    raw = np.arange(at.start * size, at.stop * size)[:, None] - offset % size
    there = (raw >= 0) & (raw < choice.queries)
    i = np.clip(raw, 0, choice.queries - 1)
    q = np.where(there, fold.enter(call, call.q[..., i[:, 0], :]), 0)
    rows = Rows(at.start * size, len(i), i, raw + offset, there)
    found: Array = routing.choose_blocks(call, choice, head.guide, q, rows, None)[0]
    return found


def _pooled(head: Head) -> Array | None:
    """The same where all queries of a block may choose the same: from the sum of the queries."""
    call, choice, size, guide = head.call, head.choice, head.size, head.guide
    n, nb, offset = -(-choice.queries // size), head.n_blocks, int(call.offset)
    if guide is None or offset % size:
        return None
    kinds = np.full((n, nb), 2) if head.free.kinds is None else head.free.kinds
    own = np.arange(n)[:, None] + offset // size == np.arange(nb)
    if (kinds[~own] == 1).any():
        return None
    q = np.multiply(fold.enter(call, call.q[0]), np.asarray(call.scale, call.acc))
    starts = np.arange(0, choice.queries, size)
    if choice.score == "bound":
        q = np.concatenate([np.maximum(q, 0), np.minimum(q, 0)], axis=-1)
    s = np.matmul(np.add.reduceat(q, starts, axis=1), guide[0].swapaxes(-1, -2))
    may = np.broadcast_to((kinds == 2) & ~own, s.shape)
    return routing.best_indices(s, may & (s != -math.inf), choice.route, nb, xp=np)


def _query_blocks(head: Head, t0: int, t1: int, ids: Array) -> None:
    """Blocks of queries ``[t0, t1)``, each with the key blocks that its queries chose together."""
    offset, size = int(head.call.offset), head.size
    alike = _alike(head, t0, t1, ids)
    if alike.any():
        _many_query_blocks(head, t0 + np.flatnonzero(alike), ids[:, alike])
    for t in np.flatnonzero(~alike).tolist():
        first = (t0 + t) * size - offset % size
        i0, i1 = max(first, 0), min(first + size, head.choice.queries)
        for h in range(ids.shape[0]):
            _query_block(head, h, i0, i1, (i0 + offset) // size, ids[h, t].tolist())


def _alike(head: Head, t0: int, t1: int, ids: Array) -> Array:
    """Which of these can be done together: whole blocks of queries and keys, none hidden."""
    call, size, offset = head.call, head.size, int(head.call.offset)
    t = np.arange(t0, t1)
    own = t + offset // size
    simple = head.plain and head.bad_keys is None and head.bad_values is None
    simple = simple and offset % size == 0 and head.choice.route > 0
    pattern, whole = head.own.pattern, head.nk // size
    if not simple or (pattern is not None and not pattern.relative):
        return np.zeros(len(t), bool)
    fits = (own >= 0) & (own < whole) & ((t + 1) * size <= call.lengths[0])
    fits &= (ids < whole).all(axis=(0, -1))
    if head.free.kinds is not None:
        chosen = np.minimum(ids, head.n_blocks - 1)
        fits &= (head.free.kinds[t[:, None], chosen] == 2).all(axis=(0, -1))
    return fits


def _many_query_blocks(head: Head, t: Array, ids: Array) -> None:
    call, size = head.call, head.size
    (g, many, n), d, dv = ids.shape, head.k.shape[1], head.v.shape[1]
    own = np.broadcast_to(t + int(call.offset) // size, (g, many))
    ids = np.concatenate([ids, own[..., None]], axis=-1).reshape(g * many, n + 1)
    rows = (t[:, None] * size + np.arange(size)).reshape(-1)
    q = fold.enter(call, call.q[0][:, rows]).reshape(g * many, size, d)
    q = np.multiply(q, np.asarray(head.before, q.dtype))
    whole = head.nk // size * size

    def taken(x: Array, slot: str) -> Array:
        width = x.shape[1]
        out = loops.work_space(slot, (g * many, n + 1, size, width), x.dtype)
        np.take(x[:whole].reshape(-1, size, width), ids, axis=0, out=out, mode="clip")
        return out.reshape(g * many, (n + 1) * size, width)

    k, v = taken(head.k, "block keys"), taken(head.v, "block values")
    s = loops.work_space("row scores", (g * many, size, k.shape[1]), q.dtype)
    np.matmul(q, k.swapaxes(-1, -2), out=s)
    if head.own.pattern is not None:
        hidden = _hidden(head.own.pattern, 0, size, size)
        np.copyto(s[..., n * size :], -math.inf, where=hidden)
    sinks = None
    if call.sinks is not None:
        sinks = np.repeat(call.sinks.reshape(g, 1), many * size, axis=0)
    state = State(g * many * size, head, sinks)

    def values(p: Array, seen: Array | None) -> Array:
        del seen
        o = loops.work_space("values", (g * many, size, dv), p.dtype)
        return np.matmul(p.reshape(s.shape), v, out=o).reshape(-1, dv)

    state.absorb(slice(None), s.reshape(-1, s.shape[-1]), values)
    out, lse = (np.empty((g, many * size, *x.shape[2:]), x.dtype) for x in (head.out, head.lse))
    state.finish(out, lse)
    head.out[:, rows], head.lse[:, rows] = out, lse


def _query_block(head: Head, h: int, i0: int, i1: int, own: int, ids: list[int]) -> None:
    call = head.call
    q = np.multiply(fold.enter(call, call.q[0, h, i0:i1]), np.asarray(head.before, call.acc))
    g, i = np.full(i1 - i0, h), np.arange(i0, i1)
    blocks = [b for b in ids if b < head.n_blocks]
    widths = [head.block(b).stop - head.block(b).start for b in blocks]
    there = 0 <= own < head.n_blocks and i0 + int(call.offset) < head.nk
    if there:
        # Of the last block, positions may lie beyond the keys.
        blocks, widths = [*blocks, own], [*widths, head.block(own).stop - head.block(own).start]
    s = loops.work_space("row scores", (len(q), sum(widths)), q.dtype)
    v = loops.work_space("row values", (sum(widths), head.v.shape[1]), q.dtype)
    a = 0
    for n, (b, width) in enumerate(zip(blocks, widths, strict=True)):
        keys, part = head.block(b), slice(a, a + width)
        if there and n == len(blocks) - 1:
            s[:, part] = _own_scores(head, q, g, i, keys, (i0, i1))
            s[i + int(call.offset) >= head.nk, part] = -math.inf
        else:
            s[:, part] = head.scores(q, g, i, keys, head.free)
        v[part] = head.v[keys]
        a += width
    bad = None
    if head.bad_values is not None and blocks:
        bad = np.concatenate([head.bad_values[head.block(b)] for b in blocks])
    sinks = None if call.sinks is None else np.broadcast_to(call.sinks[0, h], (len(q), 1))
    state = State(len(q), head, sinks)

    def values(p: Array, seen: Array | None) -> Array:
        o = np.matmul(p, v, out=loops.work_space("values", (len(p), v.shape[1]), p.dtype))
        if bad is not None and seen is not None:
            o[seen.astype(p.dtype) @ bad.astype(p.dtype) > 0] = math.nan
        return o

    state.absorb(slice(None), s, values)
    state.finish(head.out[h, i0:i1], head.lse[h, i0:i1])
