"""
The engine of the softmax family: fold the tiles of a plan with the online softmax.

The step, `fold`, is written once. Only how its loop runs differs by library: a pool of
threads over (item, head, query tile) for NumPy, in `jobs`; a Python loop over batched tiles
or a traced scan, here.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from arrattn import patterns
from arrattn._core import jobs, loops, native, staging
from arrattn._core.fold import all_finite, enter, finish, fold, start
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State
from arrattn._core.plan import FULL, PARTIAL, Plan, choose_tile, make_plan
from arrattn._core.tiles import TilePairs, stack_tiles, unstack_rows
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
    tables = tuple(call.xp.asarray(x) for x in plan.visits())
    out, lse = staging.traced(_scan_tiles, call, plan.tile, tables)
    return out, lse


def _scan_tiles(
    call: SoftmaxInputs, tile: tuple[int, int], tables: tuple[Array, Array]
) -> tuple[Array, Array]:
    xp, (bq, bk), (visits, kinds) = call.xp, tile, tables
    k_tiles, v_tiles = stack_tiles(call.k, bk, xp), stack_tiles(call.v, bk, xp)
    body = partial(_scan_row, call, k_tiles, v_tiles, bk)
    starts = xp.arange(visits.shape[0], dtype=visits.dtype) * bq
    tiles = (stack_tiles(call.q, bq, xp), starts, visits, kinds)
    out, lse = loops.map_rematerialised(body, tiles)
    return unstack_rows(out, lse, call.lengths[0], xp)


def _one_tile(call: SoftmaxInputs, hide: bool, tables: tuple[()]) -> tuple[Array, Array]:
    """A call of a single tile: no loop to compile."""
    del tables
    state = start(call, call.q, call.k, call.v)
    q = enter(call, call.q, scale=call.scale)
    run = (0, call.lengths[1], hide)
    return finish(call, _fold_run(call, state, q, 0, run, None))


def _scan_row(
    call: SoftmaxInputs, k_tiles: Array, v_tiles: Array, bk: int, row: Any
) -> tuple[Array, Array]:
    rows, i0, visits, kinds = row
    q = enter(call, rows, scale=call.scale)

    def visit(state: State, at: tuple[Array, Array]) -> tuple[State, None]:
        u, kind = at
        pairs = TilePairs(i0, q.shape[-2], u * bk, bk, call.offset, xp=call.xp, device=None)

        def skip(state: State) -> State:
            return state

        def partly(state: State) -> State:
            seen = None if call.pattern is None else call.pattern.visible(pairs)
            return fold(call, state, q, k_tiles[u], v_tiles[u], pairs, visible=seen, finite=None)

        def fully(state: State) -> State:
            return fold(call, state, q, k_tiles[u], v_tiles[u], pairs, visible=None, finite=None)

        return loops.switch(kind, (skip, partly, fully), state), None

    state, _ = loops.scan(visit, start(call, rows, call.k, call.v), (visits, kinds), xp=call.xp)
    return finish(call, state)


# -- Dask: blocks of its arrays ---------------------------------------------------------------


def _attend_blocks(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    return staging.blockwise(partial(attend, tile=tile), call._replace(engine="tiles"))


SCHEDULES = {
    "threads": jobs.attend,
    "batched": _attend_batched,
    "scan": _attend_scan,
    "blocks": _attend_blocks,
}
