"""
The schedule of sparse attention for NumPy: jobs of (head, span of queries) on a pool of threads.

Queries are laid out by the blocks that their positions lie in, so that all own blocks are one
product. Those that look at the same other block are brought together: its keys are visited once,
with all of them. Exponentials are summed as they are where no score can be large, and below the
highest score of the own block elsewhere. What that cannot hold (scores out of range, keys or
values that are not finite, a bias, a softcap) is left to what all libraries do, in `select`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from arrattn import patterns
from arrattn._core import fold, jobs, routing, threads, workspace
from arrattn._core.gather import LOG2E
from arrattn._core.inputs import Choice, SoftmaxInputs, query_blocks
from arrattn._core.plan import classify
from arrattn._core.routing import Rows
from arrattn._core.tiles import TilePairs
from arrattn._core.topk import best_of, kth_largest
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

#: Jobs that an item is cut into, if it has so many blocks of queries.
JOBS = 8

#: Scores held at once: of the keys chosen from, of a batch of own blocks, and of a tile with all
#: keys, whose products are the faster the more queries it has. And values picked at once.
CHOICES, TILE, EXACT, PICKED = 1 << 21, 1 << 19, 1 << 21, 1 << 18

#: Rows of own blocks whose keys are cut to those that one of them sees.
OWN_ROWS = 32

#: Numbers that exponentials may be taken of without a shift, and of values beside them.
CALM, MOST_VALUE = 40.0, 1e12

#: `select` on a head: output, log-sum-exp and selection of it.
Tiles = Callable[[SoftmaxInputs, Choice], tuple[Array, ...]]


def takes(call: SoftmaxInputs, choice: Choice) -> bool:
    """Whether this schedule knows of such calls."""
    plain = call.softcap is None and call.bias is None
    plain = plain and 0 not in (call.q.shape[-1], call.v.shape[-1])
    return plain and (choice.select == "blocks" or choice.per == "query")


def attend(call: SoftmaxInputs, choice: Choice, tiles: Tiles, *, plain: bool) -> tuple[Array, ...]:
    """
    What `select.attend_selected` does, for NumPy arrays, without what is always seen.

    ``tiles(head, choice=...)`` does one head of one item where this cannot, or is not `plain`.
    """
    (hkv, g), nq = call.heads, choice.queries
    out = np.empty((*call.batch, hkv, g, nq, call.v.shape[-1]), call.acc)
    lse = np.empty((*call.batch, hkv, g, nq), call.acc)
    shape = (*call.batch, hkv, *choice.selection_rows(call.heads), choice.many)
    selection = np.full(shape if choice.selection else (*call.batch, hkv, 0), -1, np.int64)
    plain = plain and takes(call, choice)
    for b in np.ndindex(*call.batch):
        item = jobs.batch_item(call, b)
        own = choice._replace(query_blocks=query_blocks(nq, choice.block, item.offset))
        scores = item.block_scores
        if scores is not None and choice.per == "block" and scores.shape[-2] == choice.query_blocks:
            item = item._replace(block_scores=scores[..., : own.query_blocks, :])
        calls = [jobs.head_item(item, h) for h in range(hkv)]
        into = [(out[b][h], lse[b][h], selection[b][h]) for h in range(hkv)]
        heads: list[Head | None] = [None] * hkv

        def begin(
            h: int,
            calls: list[SoftmaxInputs] = calls,
            own: Choice = own,
            into: list[tuple[Array, ...]] = into,
            heads: list[Head | None] = heads,
        ) -> None:
            heads[h] = Head.of(calls[h], own, into[h], hkv)

        if plain:
            threads.run_jobs([partial(begin, h) for h in range(hkv)])
            threads.run_jobs([job for head in heads if head for job in head.jobs()])
        for h, head in enumerate(heads):
            if head is None or head.lost:
                found = tiles(calls[h], own)
                into[h][0][...], into[h][1][...] = found[0][0], found[1][0]
                if choice.selection:
                    into[h][2][..., : found[2].shape[-2], :] = found[2][0]
    return (out, lse, selection) if choice.selection else (out, lse)


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


class Part(NamedTuple):
    """Rows of a block, the keys of it that any of them sees, and which of the pairs are hidden."""

    rows: tuple[int, int]
    keys: tuple[int, int]
    hidden: Array | None = None


class Span(NamedTuple):
    """
    Query blocks ``[t0, t1)`` of all query heads, as rows (G * blocks * size), and their sums.

    Rows that are no queries of the call stand in the first and the last block of all.
    """

    t0: int
    t1: int
    q: Array  # (R, D), scaled
    i: Array  # (blocks * size,), indices of queries, clipped to those there are
    real: slice  # which of these are queries
    m: Array | None  # (R, 1), what is taken off the scores, if anything is
    total: Array  # (R, 1), sums of exponentials
    sums: Array  # (R, Dv), sums of values times exponentials


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
    k, v : arrays, shapes (Nk, D) and (Nk, Dv)
        Finite keys and values.
    calm : bool
        Whether no score is above `CALM`.
    heads : int
        How many there are of them in the item.
    """

    def __init__(
        self,
        call: SoftmaxInputs,
        choice: Choice,
        into: tuple[Array, ...],
        k: Array,
        v: Array,
        *,
        calm: bool,
        heads: int,
    ) -> None:
        self.call, self.choice, self.calm, self.heads = call, choice, calm, heads
        self.out, self.lse, self.selection = into
        self.lost = False
        self.g, self.nk, self.size = call.heads[1], call.lengths[1], choice.block
        offset = int(call.offset)
        self.lead, self.first = offset % self.size, offset // self.size
        self.n_blocks = -(-self.nk // self.size)
        self.query_blocks = -(-(self.lead + choice.queries) // self.size)
        self.k, self.v = k, v
        self.kt = _blocks(k, self.size).mT
        if workspace.unpacked():
            self.kt = np.ascontiguousarray(self.kt)
        self.values = _blocks(v, self.size)
        # A positive power of two changes no digit: it can come before the product.
        exact = call.scale > 0 and math.frexp(call.scale)[0] == 0.5
        self.before, self.after = (call.scale, 1.0) if exact else (1.0, call.scale)
        self.unit = LOG2E
        if choice.select == "blocks":  # no choice depends on these scores
            self.before, self.after, self.unit = call.scale * LOG2E, 1.0, 1.0
        self.free = patterns.both(call.pattern, None if call.always is None else ~call.always)
        self.own_kinds = self._kinds(call.pattern)
        self.kinds = self.own_kinds if call.always is None else self._kinds(self.free)
        if self.kinds is not None and call.always is None:
            self.kinds = self.kinds.copy()
        elif self.kinds is None:
            self.kinds = np.full((self.query_blocks, self.n_blocks), 2, np.uint8)
        own = np.arange(self.query_blocks) + self.first
        there = np.flatnonzero((own >= 0) & (own < self.n_blocks))
        self.own = slice(int(there[0]), int(there[-1]) + 1) if len(there) else slice(0, 0)
        self.kinds[there, own[there]] = 0
        self.ragged = (self.kinds == 1).any(axis=0)
        # Where all keys are searched, bounds alone are of use.
        bare = choice.exhaustive and choice.score != "bound"
        self.guide = None if bare else self._guide()

    @classmethod
    def of(
        cls, call: SoftmaxInputs, choice: Choice, into: tuple[Array, ...], heads: int
    ) -> Head | None:
        """The head, or None if its numbers are not for this schedule."""
        k, v = (fold.enter(call, x[0]) for x in (call.k, call.v))
        (nq, nk), offset = (choice.queries, len(k)), int(call.offset)
        if nk % choice.block and offset < nk + -nk % choice.block and nk < offset + nq:
            return None  # queries that lie in the last block, but behind its keys, have no own one
        if not (np.isfinite(_square(k)) and np.isfinite(_largest(v))):
            seen = routing.seen_by_any(call, choice.queries)
            if seen is None:
                return None
            seen = seen.any(axis=tuple(range(seen.ndim - 1)))[:, None]
            k, v = np.where(seen, k, 0), np.where(seen, v, 0)
        q = fold.enter(call, call.q[0])
        reach = math.sqrt(_square(q) * _square(k)) * abs(call.scale)
        most = _largest(v)
        if call.sinks is not None:
            sink = np.abs(call.sinks[call.sinks != -math.inf])
            reach = max(reach, float(sink.max(initial=0)))
        if not reach < 1e30 or not most < MOST_VALUE:
            return None
        return cls(call, choice, into, k, v, calm=reach <= CALM, heads=heads)

    def _guide(self) -> Array | None:
        """What `routing.guides` gives; sums by one product where all heads see the same keys."""
        choice = self.choice
        seen = routing.seen_by_any(self.call, choice.queries)
        alike = seen is None or seen.size == self.nk
        if choice.score != "mean" or not choice.route or not alike:
            return routing.guides(self.call, choice)
        weight = np.ones((self.nk, 1), self.k.dtype)
        if seen is not None:
            weight[:, 0] = seen.reshape(-1)
        weight = _blocks(weight, self.size).mT  # (blocks, 1, size)
        counts = np.maximum(np.sum(weight, axis=-1), 1)
        sums = np.matmul(weight, _blocks(self.k, self.size))[:, 0]
        return np.concatenate([sums, counts], axis=-1)[None, None]

    def _kinds(self, pattern: Pattern | None) -> Array | None:
        """Kinds of tiles, (query blocks, key blocks); None where everything is visible."""
        if pattern is None:
            return None
        nq, size = self.choice.queries, self.size
        starts = np.arange(self.query_blocks) * size - self.lead
        at = np.arange(self.n_blocks) * size
        stops = np.minimum(starts + size, nq)
        ends = np.minimum(at + size, self.nk)
        offset = int(self.call.offset)
        some, every = classify(pattern, np.maximum(starts, 0), stops, at, ends, offset)
        lead = tuple(range(some.ndim - 2))
        some, every = some.any(lead), every.all(lead)
        return np.where(some, np.where(every, 2, 1), 0).astype(np.uint8)

    def jobs(self) -> Iterator[Callable[[], None]]:
        """All that is to be done."""
        choice, many = self.choice, self.query_blocks
        step = max(1, -(-many * self.heads // JOBS))
        run = self._others_job
        if choice.exhaustive:
            run = self._exact_job
            step = max(1, min(step, EXACT // (self.g * self.nk * self.size)))
        for t in range(0, many, step):
            yield partial(self._watched, run, t, min(t + step, many))

    def _watched(self, run: Callable[[Span], None], t0: int, t1: int) -> None:
        if self.lost:
            return
        span = self._span(t0, t1)
        self._own_blocks(span)
        if span.m is not None and not self._shifted(span):
            self.lost = True
            return
        run(span)
        self._finish(span)

    # -- Spans --------------------------------------------------------------------------------

    def _span(self, t0: int, t1: int) -> Span:
        """The rows of query blocks, with empty sums."""
        call, size, nq, acc = self.call, self.size, self.choice.queries, self.call.acc
        n, i0 = (t1 - t0) * size, t0 * size - self.lead
        i = np.arange(i0, i0 + n)
        real = slice(max(-i0, 0), min(nq - i0, n))
        q = workspace.work_space("queries", (self.g, n, call.q.shape[-1]), acc)
        q[:, : real.start], q[:, real.stop :] = 0, 0
        here = call.q[0, :, i0 + real.start : i0 + real.stop]
        np.multiply(here, self.before, out=q[:, real], dtype=acc)
        rows = self.g * n
        m = None if self.calm else workspace.work_space("shifts", (rows, 1), acc)
        total = workspace.work_space("totals", (rows, 1), acc)
        sums = workspace.work_space("sums", (rows, self.v.shape[1]), acc)
        for x, value in ((m, -math.inf), (total, 0), (sums, 0)):
            if x is not None:
                x[...] = value
        q = q.reshape(rows, -1)
        return Span(t0, t1, q, np.clip(i, 0, max(nq - 1, 0)), real, m, total, sums)

    def _shifted(self, span: Span) -> bool:
        """Whether every query has a shift; rows that are no queries are given one."""
        m: Any = span.m
        by_head = m.reshape(self.g, -1)
        by_head[:, : span.real.start], by_head[:, span.real.stop :] = 0, 0
        return bool((m != -math.inf).all())

    def _finish(self, span: Span) -> None:
        """Write output and log-sum-exp."""
        call, (_, _, _, _, real, m, total, sums) = self.call, span
        none = total == 0
        empty: Any = -math.inf
        if call.sinks is not None:
            empty = np.repeat(call.sinks.reshape(-1, 1), len(span.i), axis=0)
            sinks = empty * LOG2E
            total += np.exp2(sinks if m is None else sinks - m * self.unit)
        if not (np.isfinite(total.sum()) and np.isfinite(sums.sum())):
            self.lost = True
            return
        total[total == 0] = 1
        np.divide(sums, total, out=sums)
        found = np.log(total, out=total)
        if m is not None:
            found += m * (self.unit / LOG2E)
        np.copyto(found, empty, where=none, casting="same_kind")
        at = slice(int(span.i[real.start]), int(span.i[real.start]) + real.stop - real.start)
        self.out[:, at] = sums.reshape(self.g, -1, sums.shape[1])[:, real]
        self.lse[:, at] = found.reshape(self.g, -1)[:, real]

    def _lift(self, span: Span, rows: slice, top: Array) -> None:
        """Let what is taken off the scores of rows be no less than `top`, and keep their sums."""
        m: Any = span.m
        new = np.maximum(m[rows], top)
        factor = np.exp2((m[rows] - new) * self.unit)
        for x in (span.sums, span.total):
            x[rows] *= factor
        m[rows] = new

    def _exp(self, s: Array, m: Array | None, *, hidden: bool = True) -> Array:
        """
        Exponentials of scores, in place; `m` is taken off them.

        NumPy is many times slower where they underflow, as those of scores that are `hidden`
        do: what would is first raised to the least that does not, and that subtracted again.
        """
        if m is not None:
            s -= m
        if self.unit != 1.0:
            s *= self.unit
        least = np.finfo(s.dtype)
        if m is None and not hidden:
            return np.exp2(s, out=s)
        np.exp2(np.maximum(s, least.minexp, out=s), out=s)
        return np.subtract(s, least.tiny, out=s)

    # -- The own block ------------------------------------------------------------------------

    def _own_blocks(self, span: Span) -> None:
        a, b = max(self.own.start, span.t0), min(self.own.stop, span.t1)
        relative = self.call.pattern is not None and self.call.pattern.relative
        for part in _own_parts(self.call.pattern if relative else None, self.size):
            rows = part.rows[1] - part.rows[0]
            at_once = max(1, TILE // (self.g * rows * self.size))
            for t in range(a, b, at_once):
                self._own_part(span, t, min(t + at_once, b), part)

    def _own_part(self, span: Span, t: int, stop: int, part: Part) -> None:
        """Some rows and keys of the own blocks ``[t, stop)``."""
        (r0, r1), (j0, j1) = part.rows, part.keys
        by_block = (self.g, span.t1 - span.t0, self.size, -1)

        def cut(x: Array) -> Array:
            return x.reshape(by_block)[:, t - span.t0 : stop - span.t0, r0:r1]

        q, total, m = cut(span.q), cut(span.total), None if span.m is None else cut(span.m)
        keys = slice(t + self.first, stop + self.first)
        s = workspace.work_space("scores", (self.g, stop - t, r1 - r0, j1 - j0), self.k.dtype)
        workspace.small_products(q, self.kt[keys, :, j0:j1], out=s)
        if self.after != 1.0:
            s *= self.after
        hidden = self._hide_own(s, span, t, part)
        if m is not None:
            np.max(s, axis=-1, keepdims=True, initial=-math.inf, out=m)
        self._exp(s, None if m is None else np.where(m == -math.inf, 0, m), hidden=hidden)
        total[...] = np.matmul(s, workspace.ones_column(j1 - j0, s.dtype))
        workspace.small_products(s, self.values[keys, j0:j1], out=cut(span.sums))

    def _hide_own(self, s: Any, span: Span, t: int, part: Part) -> bool:
        """Hide what is not seen of own blocks from `t` on, in the scores of a part; whether any."""
        size, pattern, kinds = self.size, self.call.pattern, self.own_kinds
        last = self.n_blocks - 1 - self.first - t
        filled = bool(last < s.shape[1] and self.nk % size)
        if filled:
            s[:, last, :, max(self.nk % size - part.keys[0], 0) :] = -math.inf
        if part.hidden is not None:
            np.copyto(s, -math.inf, where=part.hidden)
            return True
        if pattern is None or kinds is None or pattern.relative:
            return filled
        every = np.arange(t, t + s.shape[1])
        some = np.flatnonzero(kinds[every, every + self.first] != 2)
        for n in some.tolist():
            rows = np.arange(size) + (t + n - span.t0) * size
            for h in range(self.g):
                at = rows + h * len(span.i)
                self._hide(s[h, n], pattern, span, at, t + n + self.first)
        return filled or bool(len(some))

    def _each_head(self, rows: Array, span: Span) -> Array:
        return (np.arange(self.g)[:, None] * len(span.i) + rows).reshape(-1)

    def _hide(self, s: Array, pattern: Pattern, span: Span, rows: Array, block: int) -> None:
        """Hide what rows of a span do not see of a block, in ``s (r, size)``."""
        g, at = np.divmod(rows, len(span.i))
        j0 = block * self.size
        j = np.arange(j0, min(j0 + self.size, self.nk))[None, :]
        pairs = FlatPairs(g[:, None], span.i[at][:, None], j, int(self.call.offset))
        np.copyto(s[:, : j.shape[1]], -math.inf, where=~pattern.visible(pairs))

    # -- Other blocks -------------------------------------------------------------------------

    def _others_job(self, span: Span) -> None:
        """Other blocks that rows chose, or the best keys of them."""
        choice, size = self.choice, self.size
        if not choice.route:
            return
        together = choice.per == "block"
        ids = self._chosen_together(span) if together else self._chosen(span)
        if together and not self.ragged.any() and choice.route * size * size <= EXACT:
            self._units(span, ids)
            return
        if together:
            ids = np.repeat(ids, size, axis=0)
        held = choice.select == "keys" or span.m is not None
        wide = size if held else span.q.shape[1] + self.v.shape[1]
        step = max(CHOICES // (choice.route * wide), 1)
        for a in range(0, len(ids), step):
            self._visit(span, a, ids[a : a + step], held=held)

    def _visit(self, span: Span, first: int, ids: Array, *, held: bool) -> None:
        """
        The blocks ``ids (rows, route)`` of the rows from `first` on, each block once.

        All their scores are `held` at once where a row's choice or its maximum depends on them.
        """
        (n, route), (size, dv), acc = ids.shape, self.values.shape[1:], span.q.dtype
        order, visits = self._by_block(ids)
        row = order // route
        none = slice(visits[-1][0].stop if visits else 0, len(order))
        q = workspace.work_space("chosen queries", (len(order), span.q.shape[1]), acc)
        np.take(span.q, row + first, axis=0, out=q, mode="clip")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        o = workspace.work_space("chosen values", (len(order), dv), acc)
        total = workspace.work_space("chosen totals", (len(order), 1), acc)
        most = len(order) if held else max((at.stop - at.start for at, _ in visits), default=0)
        s = workspace.work_space("chosen scores", (most, size), acc)
        hidden = none.start < none.stop
        for at, block in visits:
            part = s[at] if held else s[: at.stop - at.start]
            some = self._scores(q[at], span, row[at] + first, block, part)
            hidden = hidden or some
            if not held:
                p = self._exp(part, None, hidden=some)
                np.matmul(p, self.values[block], out=o[at])
                total[at] = workspace.row_sums(p, xp=np)
        if held:
            s[none] = -math.inf
            p = self._weights(span, first, ids, s, place, row, hidden=hidden)
            for at, block in visits:
                np.matmul(p[at], self.values[block], out=o[at])
            total[...] = workspace.row_sums(p, xp=np)
        o[none], total[none] = 0, 0
        one = workspace.ones_column(route, acc).T
        for x, parts in ((span.sums, o), (span.total, total)):
            by_row = workspace.work_space("by row", parts.shape, acc)
            np.take(parts, place, axis=0, out=by_row, mode="clip")
            x[first : first + n] += np.matmul(one, by_row.reshape(n, route, -1))[:, 0]

    def _scores(self, q: Array, span: Span, rows: Array, block: int, out: Array) -> bool:
        """Scores ``out (r, size)`` of rows with the keys of a block; whether any are hidden."""
        np.matmul(q, self.kt[block], out=out)
        if self.after != 1.0:
            out *= self.after
        if self.ragged[block]:
            pattern: Any = self.free
            self._hide(out, pattern, span, rows, block)
        filled = block == self.n_blocks - 1 and self.nk % self.size
        if filled:
            out[:, self.nk % self.size :] = -math.inf
        return bool(self.ragged[block] or filled)

    def _weights(
        self,
        span: Span,
        first: int,
        ids: Array,
        s: Array,
        place: Array,
        row: Array,
        *,
        hidden: bool,
    ) -> Array:
        """Exponentials of the scores ``s (pairs, size)`` of what is chosen of the blocks."""
        n, route = ids.shape
        chosen = None
        if self.choice.select == "keys":
            chosen = self._best(s, place, row, n)
            if self.choice.selection:
                self._note_keys(span, chosen, ids, place, first)
        if span.m is not None:
            top = np.max(s, axis=-1)[place].reshape(n, route).max(axis=-1, keepdims=True)
            self._lift(span, slice(first, first + n), top)
        p = self._exp(s, None if span.m is None else span.m[row + first], hidden=hidden)
        if chosen is not None:
            p *= chosen
        return p

    def _by_block(self, ids: Array) -> tuple[Array, list[tuple[slice, int]]]:
        """The places in ``ids (rows, route)`` in the order of their blocks, and each one's part."""
        flat = ids.reshape(-1)
        narrow = flat.astype(np.int16 if self.n_blocks < 1 << 15 else np.int64, copy=False)
        order = np.argsort(narrow, kind="stable")
        edges = np.searchsorted(narrow[order], np.arange(self.n_blocks + 1)).tolist()
        parts = zip(edges[:-1], edges[1:], range(self.n_blocks), strict=True)
        return order, [(slice(a, e), block) for a, e, block in parts if a < e]

    def _units(self, span: Span, ids: Array) -> None:
        """Blocks of queries, each with all the blocks ``ids (units, route)`` that it chose."""
        size, (many, route) = self.size, ids.shape
        wide = route * size
        q, total, sums = (x.reshape(many, size, -1) for x in (span.q, span.total, span.sums))
        m = None if span.m is None else span.m.reshape(many, size, 1)
        small = workspace.unpacked() > 0
        keys = self.kt if small else self.kt.mT
        at_once = max(1, TILE // (size * wide))
        for a in range(0, many, at_once):
            here, part = slice(a, a + at_once), ids[a : a + at_once]
            n = len(part)
            none = part == self.n_blocks
            part = np.where(none, 0, part)
            k, v = (
                np.take(x, part, axis=0, mode="clip", out=workspace.work_space(
                    slot, (n, route, *x.shape[1:]), q.dtype
                ))
                for slot, x in (("keys of units", keys), ("values of units", self.values))
            )  # fmt: skip
            v = v.reshape(n, wide, -1)
            s = workspace.work_space("scores", (n, size, wide), q.dtype)
            by_block = s.reshape(n, size, route, size).swapaxes(1, 2)
            if small:
                workspace.small_products(q[here, None], k, out=by_block)
            else:
                np.matmul(q[here], k.reshape(n, wide, -1).mT, out=s)
            by_block[none] = -math.inf
            if self.nk % self.size:
                for unit, which in np.argwhere(part == self.n_blocks - 1).tolist():
                    by_block[unit, which, :, self.nk % size :] = -math.inf
            if m is not None:
                rows = slice(a * size, (a + n) * size)
                self._lift(span, rows, np.max(s, axis=-1).reshape(-1, 1))
            hidden = bool(none.any() or self.nk % size)
            p = self._exp(s, None if m is None else m[here], hidden=hidden)
            more = workspace.work_space("values", (n, size, sums.shape[-1]), q.dtype)
            sums[here] += workspace.small_products(p, v, out=more)
            total[here] += np.matmul(p, workspace.ones_column(wide, p.dtype))

    def _chosen(self, span: Span) -> Array:
        """The blocks of each row, ``(R, route)``, ascending, padded with the number of blocks."""
        call, choice = self.call, self.choice
        many = 1 if choice.per == "group" else self.g
        ids = np.full((many, len(span.i), choice.route), self.n_blocks)
        real = np.arange(len(span.i))[span.real]
        for a in range(0, len(real), 512):
            part = real[a : a + 512]
            i0, i1 = int(span.i[part[0]]), int(span.i[part[-1]]) + 1
            may = None
            if not self.ragged.any():
                kinds: Any = self.kinds
                may = kinds[span.t0 + part // self.size] == 2
            q = fold.enter(call, call.q[..., i0:i1, :])
            rows = Rows(i0, i1 - i0)
            found = routing.choose_blocks(call, choice, self.guide, q, rows, None, may)[0]
            ids[:, part] = found
            if choice.selection and choice.select == "blocks":
                self.selection[:, i0:i1] = np.where(found == self.n_blocks, -1, found)
        return np.broadcast_to(ids, (self.g, *ids.shape[1:])).reshape(-1, choice.route)

    def _chosen_together(self, span: Span) -> Array:
        """The blocks of each block of queries, ``(G * blocks, route)``."""
        call, choice, size = self.call, self.choice, self.size
        ids = self._pooled(span)
        if ids is None:
            parts = []
            step = max(1, (1 << 12) // size)
            for t in range(span.t0, span.t1, step):
                n = (min(t + step, span.t1) - t) * size
                raw = np.arange(t * size, t * size + n)[:, None] - self.lead
                there = (raw >= 0) & (raw < choice.queries)
                i = np.clip(raw, 0, choice.queries - 1)
                q = np.where(there, fold.enter(call, call.q[..., i[:, 0], :]), 0)
                rows = Rows(t * size, n, i, raw + call.offset, there)
                parts.append(routing.choose_blocks(call, choice, self.guide, q, rows, None)[0])
            ids = np.concatenate(parts, axis=-2)
        if choice.selection:
            self.selection[:, span.t0 : span.t1] = np.where(ids == self.n_blocks, -1, ids)
        return np.broadcast_to(ids, (self.g, *ids.shape[1:])).reshape(-1, choice.route)

    def _pooled(self, span: Span) -> Array | None:
        """The same from the sum of the queries, where all of a block may choose the same."""
        choice, size, guide = self.choice, self.size, self.guide
        kinds: Any = self.kinds
        if guide is None or (kinds[span.t0 : span.t1] == 1).any():
            return None
        i0, i1 = int(span.i[span.real.start]), int(span.i[span.real.stop - 1]) + 1
        q = fold.enter(self.call, self.call.q[0, :, i0:i1])
        if choice.score == "bound":
            q = q if self.call.scale >= 0 else -q
            q = np.concatenate([np.maximum(q, 0), np.minimum(q, 0)], axis=-1)
        starts = np.maximum(np.arange(span.t0, span.t1) * size - self.lead - i0, 0)
        q = np.add.reduceat(q, starts, axis=1)
        s = np.matmul(q, guide[0, ..., : q.shape[-1]].mT)
        s = routing.scaled(s[None], self.call, choice, guide)[0]
        may = np.broadcast_to(kinds[span.t0 : span.t1] == 2, s.shape)
        return routing.best_indices(s, may, choice.route, self.n_blocks, xp=np)

    def _best(self, s: Array, place: Array, row: Array, n: int) -> Array:
        """Which of the scores ``s (pairs, size)`` are the best of their row of `n`."""
        k, size = self.choice.top_k, self.size
        wide = workspace.work_space("by row", (len(place), size), s.dtype)
        np.take(s, place, axis=0, out=wide, mode="clip")
        reached = kth_largest(wide.reshape(n, -1), k)
        bound = np.maximum(reached, np.finfo(s.dtype).min)
        chosen = workspace.work_space("chosen", s.shape, bool)
        np.greater_equal(s, bound[row, None], out=chosen)
        if (reached > -math.inf).all() and np.count_nonzero(chosen) == n * k:
            return chosen  # as at least `k` of each row are
        count = np.count_nonzero(chosen, axis=-1)[place].reshape(n, -1).sum(axis=-1)
        for r in np.flatnonzero(count > k).tolist():  # ties: the first ones
            at = place.reshape(n, -1)[r]
            mine = chosen[at].reshape(-1)
            tied = mine & (s[at].reshape(-1) == bound[r])
            mine &= ~tied | (np.cumsum(tied) <= k - np.count_nonzero(mine & ~tied))
            chosen[at] = mine.reshape(-1, size)
        return chosen

    def _note_keys(self, span: Span, chosen: Array, ids: Array, place: Array, first: int) -> None:
        """Write down which keys were chosen, ascending."""
        n = len(ids)
        rows, at = np.nonzero(chosen[place].reshape(n, -1))
        slot, within = np.divmod(at, self.size)
        self._note(span, rows + first, ids[rows, slot] * self.size + within)

    def _note(self, span: Span, rows: Array, keys: Array) -> None:
        """Write down keys of rows, which ascend."""
        starts = np.searchsorted(rows, rows)
        g, at = np.divmod(rows, len(span.i))
        real = (at >= span.real.start) & (at < span.real.stop)
        place = (g, span.i[at], np.arange(len(rows)) - starts)
        self.selection[tuple(x[real] for x in place)] = keys[real]

    # -- Keys among all -----------------------------------------------------------------------

    def _exact_job(self, span: Span) -> None:
        """The best of all keys outside the own block."""
        kinds: Any = self.kinds
        blocks = np.flatnonzero(kinds[span.t0 : span.t1].any(axis=0))
        if self.guide is not None and len(blocks):
            blocks = self._needed(span, blocks)
        if not len(blocks):
            return
        s, j = self._all_scores(span, blocks)
        best = best_of(s, self.choice.top_k)
        keys = j[best.columns]
        if self.choice.selection:
            real = best.scores != -math.inf
            self._note(span, np.nonzero(real)[0], keys[real])
        self._pick(span, keys, best.scores)

    def _all_scores(self, span: Span, blocks: Array) -> tuple[Array, Array]:
        """Scores with all keys of these blocks, ``(R, m)``, and which keys they are."""
        size = self.size
        j = (blocks[:, None] * size + np.arange(size)).reshape(-1)
        whole = j[-1] - j[0] == len(j) - 1
        at: Any = slice(int(blocks[0]), int(blocks[-1]) + 1) if whole else blocks
        s = workspace.work_space("all scores", (len(span.q), len(j)), span.q.dtype)
        by_block = s.reshape(len(s), -1, size).swapaxes(0, 1)
        if workspace.unpacked():
            workspace.small_products(span.q, self.kt[at], out=by_block)
        else:
            np.matmul(span.q, self.kt.mT[at].reshape(len(j), -1).T, out=s)
        if self.after != 1.0:
            s *= self.after
        s[:, np.searchsorted(j, self.nk) :] = -math.inf
        kinds: Any = self.kinds
        odd = (kinds[span.t0 : span.t1, blocks] != 2).any(axis=0)
        for n, block in zip(np.flatnonzero(odd).tolist(), blocks[odd].tolist(), strict=True):
            part = by_block[n]
            for t in np.flatnonzero(kinds[span.t0 : span.t1, block] != 2).tolist():
                rows = self._each_head(np.arange(t * size, (t + 1) * size), span)
                if kinds[span.t0 + t, block] == 0:
                    part[rows] = -math.inf
                    continue
                pattern: Any = self.free
                hidden = part[rows]
                self._hide(hidden, pattern, span, rows, block)
                part[rows] = hidden
        return s, j

    def _needed(self, span: Span, blocks: Array) -> Array:
        """
        Those of the blocks that may hold one of the best keys of a row, by their bounds.

        A few blocks give each row a score that at least `top_k` keys reach. A block whose bound
        is lower has none of the best.
        """
        guide: Any = self.guide
        k, d = self.choice.top_k, span.q.shape[1]
        x = (span.q * self.after).reshape(self.g, -1, d)
        both = np.concatenate([np.maximum(x, 0), np.minimum(x, 0)], axis=-1)
        guides = np.broadcast_to(guide[0], (self.g, *guide.shape[-2:]))
        bound = np.matmul(both, guides.mT)
        far = np.maximum(np.abs(guides[..., :d]), np.abs(guides[..., d:]))
        length = np.sqrt(np.vecdot(x, x))[..., None] * np.sqrt(np.vecdot(far, far))[:, None, :]
        # What rounding may add to a score or take off its bound.
        bound += length * (4 * (d + 4) * np.finfo(bound.dtype).eps)
        bound = bound.reshape(len(span.q), -1)[:, blocks]
        few = min(-(-k // self.size) + 1, len(blocks))
        first = np.unique(np.argpartition(-bound, few - 1, axis=-1)[:, :few])
        s, _ = self._all_scores(span, blocks[first])
        reached = kth_largest(s, k)
        at = np.tile(np.arange(len(span.i)), self.g)
        real = (at >= span.real.start) & (at < span.real.stop)
        return blocks[(bound >= reached[:, None])[real].any(axis=0)]

    def _pick(self, span: Span, keys: Array, s: Array) -> None:
        """Add to the sums of each row its `keys` ``(R, m)``, whose scores `s` it uses up."""
        if span.m is not None:
            top = np.max(s, axis=-1, keepdims=True, initial=-math.inf)
            self._lift(span, slice(0, len(s)), top)
        p = self._exp(s, span.m)
        dv = self.v.shape[1]
        step = max(1, PICKED // max(1, keys.shape[1] * dv))
        for a in range(0, len(p), step):
            here = keys[a : a + step]
            v = workspace.work_space("picked", (*here.shape, dv), p.dtype)
            np.take(self.v, here, axis=0, out=v, mode="clip")
            span.sums[a : a + step] += np.matmul(p[a : a + step, None, :], v)[:, 0]
        span.total[...] += workspace.row_sums(p, xp=np)


def _square(x: Array) -> float:
    """The largest sum of squares of a row."""
    return float(np.vecdot(x, x).max(initial=0))


def _largest(x: Array) -> float:
    """The largest absolute value; NaN where there is one."""
    return float(np.maximum(np.max(x), -np.min(x)))


def _blocks(x: Array, size: int) -> Array:
    """``(Nk, D)`` as blocks, the last filled up with zeros."""
    return routing.blocked(np.ascontiguousarray(x), size, axis=-2, xp=np)


@lru_cache(maxsize=32)
def _own_parts(pattern: Pattern | None, size: int) -> tuple[Part, ...]:
    """A block's queries with its own keys: in parts where distance alone hides some."""
    whole = (Part((0, size), (0, size)),)
    if pattern is None:
        return whole
    hidden = ~pattern.visible(TilePairs(0, size, 0, size, 0, xp=np, device=None))
    hidden = np.broadcast_to(hidden, (size, size))
    if not hidden.any():
        return whole
    parts = []
    for r0 in range(0, size, OWN_ROWS):
        r1 = min(r0 + OWN_ROWS, size)
        seen = np.flatnonzero(~hidden[r0:r1].all(axis=0))
        j0, j1 = (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)
        parts.append(Part((r0, r1), (j0, j1), hidden[r0:r1, j0:j1]))
    return tuple(parts)
