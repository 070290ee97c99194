"""
Sparse attention: choose keys or blocks for each query, then attend to those.

Rows of queries are handled a tile at a time. Exhaustive selection scores a tile against
every key; the others score blocks (see `routing`), and then the keys of the few blocks chosen.
Which keys a row sees is a mask over the keys scored. What is always seen beside the own block is
an attention of its own, merged in.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from arrattn import patterns
from arrattn._core import (
    engine,
    fold,
    loops,
    online_softmax,
    routing,
    sparse_jobs,
    staging,
    threads,
)
from arrattn._core.grouped import Grouping, Shared, group, grouped_matmul, share
from arrattn._core.inputs import Choice, SoftmaxInputs
from arrattn._core.plan import make_plan
from arrattn._core.routing import Rows
from arrattn._core.tiles import PickedPairs, TilePairs, stack_tiles, take_rows, unstack_rows
from arrattn._core.typing import Array, Namespace

#: Numbers that one worker may hold for the keys its rows look at.
BUDGET = {"threads": 1 << 21, "batched": 1 << 23, "scan": 1 << 22}


class Keys(NamedTuple):
    """
    The keys of a call, as a tile of queries needs them.

    For exhaustive selection `k` and `v` are ``(..., Hkv, Nk, ·)``; else the blocks of all
    lanes, ``(lanes * nb, block, ·)``. `guide` is what `routing.guides` gives.
    """

    k: Array
    v: Array
    guide: Array | None


def attend_selected(
    call: SoftmaxInputs, choice: Choice, *, rows: int | None = None
) -> tuple[Array, ...]:
    """
    Sparse attention of the call's queries; returns what `engine.attend` returns.

    And, where `choice.selection` asks for it, the indices chosen, (..., Hkv, G | 1, rows, count).
    `rows` overrides how many queries are handled at once; it never changes the meaning.
    """
    kind = loops.schedule(call.xp)
    if kind == "blocks":
        more = (((*choice.selection_rows(call.heads), choice.many), call.xp.int64),)
        run = partial(attend_selected, choice=choice, rows=rows)
        return staging.blockwise(run, call, more if choice.selection else ())
    if 0 in (*call.batch, *call.heads, *call.lengths):
        nothing = fold.finish(call, fold.start(call, call.q, call.k, call.v))
        shape = (*call.batch, call.heads[0], *choice.selection_rows(call.heads), choice.many)
        none = call.xp.full(shape, -1, dtype=call.xp.arange(0).dtype, device=call.device)
        return (*nothing, none) if choice.selection else nothing
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if call.always is None:
            return _selected(call, choice, rows)
        # The keys that are always seen, and all others: each part once, and the sinks.
        own = patterns.OwnBlock(choice.block, call.lengths[1])
        beside = patterns.both(call.pattern, call.always, ~own)
        seen = engine.attend(call._replace(pattern=beside, always=None, block_scores=None))
        out, lse, *rest = _selected(call._replace(sinks=None), choice, rows)
        parts = (online_softmax.reopen(*part, xp=call.xp) for part in (seen, (out, lse)))
        return (*fold.finish(call, online_softmax.merge(*parts, xp=call.xp)), *rest)


def _selected(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    """Attention to the own block and to what is chosen, without what is always seen."""
    if loops.schedule(call.xp) == "threads":
        tiles = partial(_in_tiles, rows=rows)
        return sparse_jobs.attend(call, choice, tiles, plain=rows is None)
    return _in_tiles(call, choice, rows)


def _in_tiles(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    schedule = _SCHEDULES[loops.schedule(call.xp)]
    if choice.per != "block":
        return schedule(call, choice, rows)
    out, lse, *rest = schedule(by_query_blocks(call, choice), choice, rows)
    i = call.xp.reshape(
        call.xp.arange(choice.queries, device=call.device), (choice.queries, 1)
    ) + _shift(call, choice)
    out, lse = (take_rows(x, i, xp=call.xp) for x in (out, lse[..., None]))
    return (out, lse[..., 0], *rest)


# -- Queries laid out by block ----------------------------------------------------------------


def _shift(call: SoftmaxInputs, choice: Choice) -> int | Array:
    """How far into its block the first query lies."""
    return call.offset % choice.block


def by_query_blocks(call: SoftmaxInputs, choice: Choice) -> SoftmaxInputs:
    """The call with whole blocks of queries, so that those who choose together are neighbours."""
    return call._replace(q=take_rows(call.q, _indices(call, choice, 0, None)[0], xp=call.xp))


def _indices(
    call: SoftmaxInputs, choice: Choice, start: int | Array, n: int | None
) -> tuple[Array, Array]:
    """Indices of the queries that were laid out by block, clipped, and as they are."""
    xp = call.xp
    n = choice.query_blocks * choice.block if n is None else n
    i = xp.reshape(xp.arange(n, device=call.device), (n, 1)) + start - _shift(call, choice)
    return xp.clip(i, 0, max(choice.queries - 1, 0)), i


def rows_of(call: SoftmaxInputs, choice: Choice, start: int | Array, n: int) -> Rows:
    """The queries of a tile."""
    if choice.per != "block":
        return Rows(start, n)
    i, raw = _indices(call, choice, start, n)
    return Rows(start, n, i, raw + call.offset, (raw >= 0) & (raw < choice.queries))


# -- A tile of queries ------------------------------------------------------------------------


def prepare(call: SoftmaxInputs, choice: Choice) -> Keys:
    """What all tiles of queries share."""
    if choice.exhaustive:
        return Keys(call.k, call.v, None)
    xp, lead = call.xp, (*call.batch, call.heads[0])

    def blocks(x: Array) -> Array:
        x = routing.blocked(fold.enter(call, x), choice.block, axis=-2, xp=xp)
        x = xp.broadcast_to(x, (*lead, *x.shape[-3:]))
        return xp.reshape(x, (math.prod(x.shape[:-2]), *x.shape[-2:]))

    return Keys(blocks(call.k), blocks(call.v), routing.guides(call, choice))


def select_tile(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    rows: Array,
    i0: int | Array,
    finite: bool | None,
    hull: tuple[int, int] | None = None,
) -> tuple[Array, ...]:
    """Output, log-sum-exp and, if asked for, selection of the queries `rows` from `i0` on."""
    at = rows_of(call, choice, i0, rows.shape[-2])
    if choice.exhaustive:
        return _exhaustive_tile(call, choice, rows, at, finite, hull)
    return _routed_tile(call, choice, keys, rows, at, finite)


def _exhaustive_tile(
    call: SoftmaxInputs,
    choice: Choice,
    rows: Array,
    at: Rows,
    finite: bool | None,
    hull: tuple[int, int] | None,
) -> tuple[Array, ...]:
    xp, nk = call.xp, call.lengths[1]
    j0, j1 = hull or (0, nk)
    k, v = (fold.enter(call, x[..., j0:j1, :]) for x in (call.k, call.v))
    state = fold.start(call, rows, call.k, call.v)
    if j0 == j1:
        return (*fold.finish(call, state), *_no_selection(call, choice, at))
    pairs = at.tile(call, j0, j1 - j0)
    free = routing.elsewhere(call, choice, at, pairs)
    # The scale comes after the product: before it, rounding could part scores that tie.
    q = fold.enter(call, rows)
    s = fold.visible_scores(call, q, k, pairs, finite, scale=call.scale)
    own = routing.own_block(pairs.p, choice, nk, xp=xp) == pairs.j // choice.block
    seen = at.visible(call, pairs) & own
    chosen, selection = _choose_keys(call, choice, s, free, pairs.j)
    state = online_softmax.absorb(state, s, v, seen | chosen, xp=xp, finite=finite)
    return (*fold.finish(call, state), *selection)


def _choose_keys(
    call: SoftmaxInputs, choice: Choice, s: Array, free: Array, j: Array
) -> tuple[Array, tuple[Array, ...]]:
    """Which of the keys `j` that are `free` are chosen, and the selection if it is asked for."""
    xp, nk = call.xp, call.lengths[1]
    shape = np.broadcast_shapes(tuple(s.shape), call.batch + (1,) * 4)
    summed, any_free = routing.together(xp.broadcast_to(s, shape), free, choice, xp=xp)
    chosen = routing.top_mask(summed, any_free, choice.top_k, xp=xp)
    every = routing.each(chosen, choice, shape, xp=xp) & free
    if not choice.selection:
        return every, ()
    # Keys are alike for those who choose together: the first stands for all.
    if choice.per == "group" and j.ndim > 2:
        j = j[..., :1, :, :]
    if choice.per == "block" and j.shape[-2] > 1:
        j = j[..., :: choice.block, :]
    return every, (_padded(routing.smallest(j, chosen, choice.top_k, nk, xp=xp), nk, xp),)


def _padded(index: Array, none: int, xp: Namespace) -> Array:
    """Indices, with -1 for `none`."""
    index = xp.where(index == none, xp.full_like(index, -1), index)
    return xp.astype(index, xp.arange(0).dtype, copy=False)


def _no_selection(call: SoftmaxInputs, choice: Choice, at: Rows) -> tuple[Array, ...]:
    if not choice.selection:
        return ()
    g = choice.selection_rows(call.heads)[0]
    n = at.n // choice.block if choice.per == "block" else at.n
    shape = (*call.batch, call.heads[0], g, n, choice.many)
    dtype = call.xp.arange(0).dtype
    return (call.xp.full(shape, -1, dtype=dtype, device=call.device),)


def _routed_tile(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    rows: Array,
    at: Rows,
    finite: bool | None,
) -> tuple[Array, ...]:
    xp, nk, size = call.xp, call.lengths[1], choice.block
    nq, nb = rows.shape[-2], -(-nk // size)
    shape = (*call.batch, *call.heads, nq)
    q = fold.enter(call, rows)
    own = routing.own_block(at.tile(call, 0, 1).p, choice, nk, xp=xp)
    ids = xp.broadcast_to(own, (*shape, 1))
    twice = xp.zeros_like(ids, dtype=xp.bool)
    selection = _no_selection(call, choice, at)
    if choice.route:
        found = routing.choose_blocks(call, choice, keys.guide, q, at, finite)
        if choice.selection and choice.select == "blocks":
            like = selection[0]
            selection = (xp.broadcast_to(_padded(found, nb, xp), like.shape),)
        found = xp.astype(routing.each(found, choice, (*shape, choice.route), xp=xp), ids.dtype)
        own, ids = ids, xp.concat([ids, found], axis=-1)
        # What others chose together with a query may be the block that it lies in.
        twice = xp.concat([xp.zeros_like(own, dtype=xp.bool), found == own], axis=-1)
    n = ids.shape[-1]
    some, lanes = ids < nb, math.prod(shape[:-2])
    if choice.per == "block":
        grouping: Any = share(xp.reshape(ids, (lanes, -1, n)), nb, size, xp=xp)
    ids = xp.where(some, ids, xp.zeros_like(ids))
    if choice.per != "block":
        grouping = group(xp.reshape(ids, (lanes, -1)), nb, xp=xp)

    # The keys looked at, in the order own block, then the others: (..., nq, n * size).
    within = xp.arange(size, dtype=ids.dtype, device=call.device)
    j = xp.reshape(ids[..., None] * size + within, (*shape, n * size))
    real = xp.broadcast_to((some & ~twice)[..., None], (*ids.shape, size))
    there = xp.reshape(real, j.shape) & (j < nk)
    j = xp.minimum(j, xp.full_like(j, nk - 1))
    pairs = at.picked(call, j)
    visible = there & at.visible(call, pairs)

    q = xp.reshape(xp.broadcast_to(q, (*shape, q.shape[-1])), (math.prod(shape), q.shape[-1]))
    s = _block_scores(q, keys.k, grouping, n, finite, xp=xp)
    s = _adjusted(call, xp.reshape(s, j.shape), pairs, finite)
    own = xp.reshape(xp.arange(n * size, device=call.device) < size, (1, n * size))
    seen = visible & own
    if n > 1:
        free = visible & ~own
        if call.always is not None:
            free = free & ~call.always.visible(pairs)
        if choice.select == "keys":
            free, selection = _choose_keys(call, choice, s, free, j)
        seen = seen | free
    state = fold.start(call, rows, call.k, call.v)
    weighted = partial(_block_sums, blocks=keys.v, at=grouping, n=n, finite=finite, xp=xp)
    state = online_softmax.absorb_with(state, s, seen, weighted, xp=xp)
    return (*fold.finish(call, state), *selection)


def _block_scores(
    q: Array, k: Array, at: Grouping | Shared, n: int, finite: bool | None, *, xp: Namespace
) -> Array:
    """Scores of each query with the keys of its blocks, (pairs, block); NaN of keys not finite."""
    if not finite:
        # What is not finite would reach other keys through gradients: a column brings it in.
        bad = ~xp.isfinite(k)
        device = loops.device_of(k)
        nan = xp.asarray(math.nan, dtype=k.dtype, device=device)
        flag = xp.where(xp.any(bad, axis=-1, keepdims=True), nan, 0.0)
        k = xp.concat([xp.where(bad, 0.0, k), flag], axis=-1)
        one = xp.ones((q.shape[0], 1), dtype=q.dtype, device=device)
        q = xp.concat([q, one], axis=-1)
    return grouped_matmul(q, xp.matrix_transpose(k), at, per_row=n, xp=xp)


def _adjusted(call: SoftmaxInputs, s: Array, pairs: PickedPairs, finite: bool | None) -> Array:
    """Scores with scale, softcap and bias; the slope of tanh at a hidden key's NaN is left out."""
    xp = call.xp
    if finite or call.softcap is None:
        return fold.adjust(call, s, pairs, scale=call.scale)
    lost = xp.isnan(s)
    s = fold.adjust(call, xp.where(lost, xp.zeros_like(s), s), pairs, scale=call.scale)
    return xp.where(lost, xp.full_like(s, math.nan), s)


def _block_sums(
    p: Array,
    seen: Array,
    *,
    blocks: Array,
    at: Grouping | Shared,
    n: int,
    finite: bool | None,
    xp: Namespace,
) -> Array:
    """Values of the chosen blocks, weighted and summed: ``(..., nq, n * block)`` weights."""

    def total(p: Array, blocks: Array) -> Array:
        flat = xp.reshape(p, (-1, blocks.shape[-2]))
        sums = grouped_matmul(flat, blocks, at, per_row=1, xp=xp)
        return xp.sum(xp.reshape(sums, (*p.shape[:-1], n, blocks.shape[-1])), axis=-2)

    if finite:
        return total(p, blocks)
    bad = ~xp.isfinite(blocks)
    out = total(p, xp.where(bad, xp.zeros_like(blocks), blocks))

    def hits(seen: Array, bad: Array) -> Array:
        return total(xp.astype(seen, p.dtype), xp.astype(bad, p.dtype)) > 0

    def none(seen: Array, bad: Array) -> Array:
        del seen, bad
        return xp.zeros(out.shape, dtype=xp.bool, device=loops.device_of(out))

    hit = loops.cond(xp.any(bad), hits, none, seen, bad, xp=xp)
    return xp.where(hit, xp.asarray(math.nan, dtype=out.dtype, device=loops.device_of(out)), out)


# -- Schedules --------------------------------------------------------------------------------


def rows_at_once(call: SoftmaxInputs, choice: Choice) -> int:
    """How many queries a tile has."""
    kind, (nq, nk) = loops.schedule(call.xp), call.lengths
    # A thread holds one key head, the others all that there are.
    lanes = call.heads[1] if kind == "threads" else math.prod((*call.batch, *call.heads))
    looked = nk if choice.exhaustive else (1 + choice.route) * choice.block
    if not choice.exhaustive and choice.route:
        pairs = TilePairs(0, 1, 0, 1, call.offset, xp=call.xp, device=call.device)
        spans = (x is None or x.key_span(pairs) is not None for x in (call.pattern, call.always))
        if choice.score == "best" or not all(spans):
            looked = max(looked, nk)
    rows = max(16, BUDGET[kind] // (looked * lanes))
    if choice.per == "block":  # whole blocks
        nq = choice.query_blocks * choice.block
        rows = max(rows // choice.block, 1) * choice.block
    return min(nq, rows)


def _hulls(call: SoftmaxInputs, choice: Choice, rows: int) -> list[tuple[int, int]]:
    """The range of keys that may be visible to each tile of queries."""
    nq, nk = call.lengths
    if choice.per == "block":  # queries are not where the plan expects them
        return [(0, nk)] * -(-nq // rows)
    plan = make_plan(call.pattern, nq, nk, call.offset, (rows, choice.block)).merged()
    hulls = []
    for kinds in plan.kinds:
        used = np.flatnonzero(kinds)
        hulls.append(
            (plan.columns(int(used[0]))[0], plan.columns(int(used[-1]))[1]) if len(used) else (0, 0)
        )
    return hulls


def _tiles(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[int, list[Any]]:
    """Rows of a tile, and the hull of each where all keys are searched."""
    step = min(rows or rows_at_once(call, choice), call.lengths[0])
    if choice.per == "block":
        step = max(step // choice.block, 1) * choice.block
    many = -(-call.lengths[0] // step)
    return step, _hulls(call, choice, step) if choice.exhaustive else [None] * many


def _select_threads(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    """One key head of one item, as `sparse_jobs` hands it over."""
    (_, g), (nq, _) = call.heads, call.lengths
    out = np.empty((1, g, nq, call.v.shape[-1]), call.acc)
    lse = np.empty((1, g, nq), call.acc)
    shape = (1, *choice.selection_rows(call.heads), choice.many)
    selection = np.empty(shape if choice.selection else (1, 0), np.int64)
    keys, finite = prepare(call, choice), fold.all_finite(call)
    step, hulls = _tiles(call, choice, rows)
    into = (out[0], lse[0], selection[0])
    threads.run_jobs(
        [
            partial(
                _rows_job,
                call,
                choice,
                keys,
                slice(t * step, min((t + 1) * step, nq)),
                finite,
                hull,
                into,
            )
            for t, hull in enumerate(hulls)
        ]
    )
    return (out, lse, selection) if choice.selection else (out, lse)


def _rows_job(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    at: slice,
    finite: bool | None,
    hull: tuple[int, int] | None,
    into: tuple[Any, Any, Any],
) -> None:
    tile = select_tile(call, choice, keys, call.q[..., at, :], at.start, finite, hull)
    out, lse, selection = into
    out[:, at], lse[:, at] = tile[0][0], tile[1][0]
    if choice.selection:
        rows = at
        if choice.per == "block":
            rows = slice(at.start // choice.block, at.stop // choice.block)
        selection[:, rows] = tile[2][0]


def _select_batched(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    xp, nq = call.xp, call.lengths[0]
    step, hulls = _tiles(call, choice, rows)
    keys, finite = prepare(call, choice), fold.all_finite(call)
    tiles = [
        select_tile(
            call,
            choice,
            keys,
            call.q[..., t * step : min((t + 1) * step, nq), :],
            t * step,
            finite,
            hull,
        )
        for t, hull in enumerate(hulls)
    ]
    outs, lses, *rest = zip(*tiles, strict=True)
    joined = (xp.concat(parts, axis=-2) for parts in rest)
    return (xp.concat(outs, axis=-2), xp.concat(lses, axis=-1), *joined)


def _select_scan(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    step, _ = _tiles(call, choice._replace(exhaustive=False), rows)
    results: tuple[Array, ...] = staging.traced(_scan_selected, call, (choice, step))
    return results


def _scan_selected(
    call: SoftmaxInputs, extra: tuple[Choice, int], tables: tuple[Array, ...]
) -> tuple[Array, ...]:
    del tables
    (choice, step), xp, nq = extra, call.xp, call.lengths[0]
    keys = prepare(call, choice)

    def body(row: tuple[Array, Array]) -> tuple[Array, ...]:
        rows, i0 = row
        return select_tile(call, choice, keys, rows, i0, None)

    tiles = stack_tiles(call.q, step, xp)
    starts = xp.arange(tiles.shape[0]) * step
    out, lse, *rest = loops.map_rematerialised(body, (tiles, starts))
    n = choice.selection_rows(call.heads)[1]
    joined = (unstack_rows(x, xp.sum(x, axis=-1), n, xp)[0] for x in rest)
    return (*unstack_rows(out, lse, nq, xp), *joined)


_SCHEDULES = {
    "threads": _select_threads,
    "batched": _select_batched,
    "scan": _select_scan,
}
