"""
The engine of the softmax family: fold the tiles of a plan with the online softmax.

The step, `fold`, is written once. Only how its loop runs differs by library: a pool of
threads over (item, head, query tile) for NumPy, in `jobs`; a Python loop over batched tiles
or a traced scan, here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from arrattn import patterns
from arrattn._core import jobs, loops, native, staging
from arrattn._core.fold import all_finite, enter, finish, fold, fold_finite, mark_bad, start
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State, empty
from arrattn._core.plan import FULL, PARTIAL, Plan, choose_tile, make_plan
from arrattn._core.tiles import TilePairs, unstack_rows, whole_tiles
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

#: Scores held at once, as a count of numbers.
BUDGET = 1 << 22


def attend(
    call: SoftmaxInputs, *, tile: tuple[int, int] | None = None
) -> tuple[Array, Array | None]:
    """
    Softmax attention over all that the call's pattern makes visible.

    Returns the output ``(..., Hkv, G, Nq, Dv)`` and the log-sum-exp ``(..., Hkv, G, Nq)``, in
    the accumulation dtype; from a fused kernel, the output alone and in the dtype of `q`.
    `tile` overrides the choice of tile, and of a kernel; it never changes the meaning.
    """
    fused = None if tile else native.choose(call).run
    kind = loops.schedule(call.xp)
    if kind != "blocks" and 0 in (*call.batch, *call.heads, *call.lengths):
        return finish(call, start(call, call.q, call.k, call.v))
    if fused is not None:
        return fused(), None
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return SCHEDULES[kind](call, tile)


# -- torch, CuPy and others: batched tiles ----------------------------------------------------


def plan_batched(call: SoftmaxInputs, tile: tuple[int, int] | None = None) -> Plan:
    """One plan for all items and heads."""
    (nq, nk), lanes = call.lengths, _lanes(call)
    shape = tile or choose_tile(call.pattern, nq, nk, call.offset, lanes=lanes, budget=BUDGET)
    return make_plan(call.pattern, nq, nk, call.offset, shape).merged()


def _attend_batched(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    xp, lanes, plan = call.xp, _lanes(call), plan_batched(call, tile)
    finite = all_finite(call) if (plan.kinds == PARTIAL).any() else True
    outs, lses = [], []
    for t in range(plan.kinds.shape[-2]):
        i0, i1 = plan.rows(t)
        rows = call.q[..., i0:i1, :]
        state = start(call, rows, call.k, call.v)
        q = enter(call, rows, scale=call.scale)
        for run in plan.runs(t, BUDGET // lanes):
            state = _fold_run(call, state, q, i0, run, finite)
        out, lse = finish(call, state)
        outs.append(out)
        lses.append(lse)
    return xp.concat(outs, axis=-2), xp.concat(lses, axis=-1)


def _fold_run(
    call: SoftmaxInputs,
    state: State,
    q: Array,
    i0: int,
    run: tuple[int, int, bool],
    finite: bool | None,
) -> State:
    j0, j1, hide = run
    k, v = call.k[..., j0:j1, :], call.v[..., j0:j1, :]
    pairs = TilePairs(i0, q.shape[-2], j0, j1 - j0, call.offset, xp=call.xp, device=call.device)
    visible = call.pattern.visible(pairs) if hide and call.pattern is not None else None
    return fold(call, state, q, k, v, pairs, visible=visible, finite=finite)


def _lanes(call: SoftmaxInputs) -> int:
    return math.prod((*call.batch, *call.heads))


# -- JAX: a traced scan -----------------------------------------------------------------------


def plan_scan(
    call: SoftmaxInputs, tile: tuple[int, int] | None = None
) -> tuple[Pattern | None, Plan]:
    """
    One plan for all items and heads, of tiles that are all whole, and the pattern it is of.
    """
    (nq, nk), lanes = call.lengths, _lanes(call)
    bq, bk = tile or choose_tile(call.pattern, nq, nk, call.offset, lanes=lanes, budget=BUDGET)
    bq, bk = min(bq, nq), min(bk, nk)
    # Short last tiles are padded, and the padding hidden as any other key is.
    pattern = patterns.both(call.pattern, patterns.Prefix(nk)) if nk % bk else call.pattern
    return pattern, make_plan(pattern, nq, -(-nk // bk) * bk, call.offset, (bq, bk)).merged()


def _attend_scan(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    pattern, plan = plan_scan(call, tile)
    call = call._replace(pattern=pattern)
    if plan.kinds.size == 1:
        out, lse = staging.traced(_one_tile, call, bool(plan.kinds.flat[0] != FULL))
        return out, lse
    visits = plan.visits()
    loop = _Loop(plan.tile, bool((plan.kinds == PARTIAL).any()), bool((visits < 0).any()))
    out, lse = staging.traced(_scan_tiles, call, loop, (visits,))
    return out, lse


class _Loop(NamedTuple):
    """
    A traced loop over tiles: whether any `hides` a pair, and whether there are `gaps` to skip.

    A loop has one body, for all that it visits: XLA takes its time for each.
    """

    tile: tuple[int, int]
    hides: bool
    gaps: bool


def _scan_tiles(call: SoftmaxInputs, loop: _Loop, tables: tuple[Array]) -> tuple[Array, Array]:
    xp, (bq, bk), nq = call.xp, loop.tile, call.lengths[0]
    q, k, v = (whole_tiles(x, n, xp) for x, n in ((call.q, bq), (call.k, bk), (call.v, bk)))
    total = _total(call) if loop.hides else None
    # Heads are grouped within the loops: XLA copies what enters one with an axis of 1 before rows.
    q = xp.reshape(q, (*q.shape[:-4], math.prod(call.heads), *q.shape[-2:]))
    body = partial(_scan_row, call._replace(q=q, k=k, v=v), loop, call.heads, total)
    starts = np.arange(0, nq, bq, dtype=np.int32)
    out, lse = loops.map_rematerialised(body, (starts, *tables))
    return unstack_rows(out, lse, nq, xp)


def _one_tile(call: SoftmaxInputs, hide: bool, tables: tuple[()]) -> tuple[Array, Array]:
    """A call of a single tile: no loop to compile."""
    del tables
    q = enter(call, call.q, scale=call.scale)
    loop = _Loop(call.lengths, hide, gaps=False)
    state = _unseen(call, call.heads, call.lengths[0])
    total = _total(call) if hide else None
    return finish(call, _absorb_traced(call, loop, total, state, q, (0, 0)))


def _scan_row(
    call: SoftmaxInputs,
    loop: _Loop,
    heads: tuple[int, int],
    total: Array | None,
    row: tuple[Array, Array],
) -> tuple[Array, Array]:
    (i0, visits), xp, bq = row, call.xp, loop.tile[0]
    q = enter(call, loops.rows_at(call.q, i0, bq), scale=call.scale)

    def absorb(state: State, j0: Array) -> State:
        rows = xp.reshape(q, (*q.shape[:-3], *heads, *q.shape[-2:]))
        return _absorb_traced(call, loop, total, state, rows, (i0, j0))

    def visit(state: State, at: tuple[Array]) -> tuple[State, None]:
        (j0,) = at
        if not loop.gaps:
            return absorb(state, j0), None
        return loops.cond(j0 >= 0, absorb, lambda state, _: state, state, j0, xp=xp), None

    state, _ = loops.scan(visit, _unseen(call, heads, bq), (visits,), xp=xp)
    return finish(call, state)


def _total(call: SoftmaxInputs) -> Array:
    """The sum of all values: finite only if every one is."""
    return loops.one_for_all(lambda x: call.xp.sum(x, dtype=call.acc), call.v)


def _unseen(call: SoftmaxInputs, heads: tuple[int, int], rows: int) -> State:
    shape = (*call.batch, *heads, rows, call.v.shape[-1])
    return empty(call.xp.zeros(shape, dtype=call.acc), call.sinks, xp=call.xp)


def _absorb_traced(
    call: SoftmaxInputs,
    loop: _Loop,
    total: Array | None,
    state: State,
    q: Array,
    at: tuple[Any, Any],
) -> State:
    """Absorb the tile at this query and key; `total` is that of all values, if pairs are hidden."""
    xp, (i0, j0), (bq, bk) = call.xp, at, loop.tile

    def pairs() -> TilePairs:
        return TilePairs(i0, bq, j0, bk, call.offset, xp=xp, device=None)

    k, v = loops.rows_at(call.k, j0, bk), loops.rows_at(call.v, j0, bk)
    if total is None or call.pattern is None:
        return fold(call, state, q, k, v, pairs(), visible=None, finite=True)
    seen = call.pattern

    def bad(rows: Array, shape: tuple[int, ...]) -> Array:
        # All is made anew here, or it would be kept for this branch, which is hardly ever taken.
        sums, values = xp.reshape(rows, shape), loops.rows_at(call.v, j0, bk)
        return xp.reshape(mark_bad(call, sums, values, seen.visible(pairs())), rows.shape)

    def mark(sums: Array) -> Array:
        *lead, g, n, dv = sums.shape
        rows = xp.reshape(sums, (*lead, g * n, dv))  # as heads above
        marks = partial(bad, shape=sums.shape)
        rows = loops.cond(xp.isfinite(total), lambda rows: rows, marks, rows, xp=xp)
        return xp.reshape(rows, sums.shape)

    visible = seen.visible(pairs())
    return fold_finite(call, state, q, k, v, pairs(), visible=visible, mark=mark)


# -- Dask: blocks of its arrays ---------------------------------------------------------------


def _attend_blocks(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    return staging.blockwise(partial(attend, tile=tile), call._replace(engine="tiles"))


SCHEDULES = {
    "threads": jobs.attend,
    "batched": _attend_batched,
    "scan": _attend_scan,
    "blocks": _attend_blocks,
}
