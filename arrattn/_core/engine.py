"""
The engine of the softmax family: fold the tiles of a plan with the online softmax.

The step, `fold`, is written once. Only how its loop runs differs by library: a pool of
threads over (item, head, query tile), a Python loop over batched tiles, or a traced scan.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from arrattn import patterns
from arrattn._core import loops, native, online_softmax, staging
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State
from arrattn._core.plan import FULL, PARTIAL, Plan, choose_tile, make_plan
from arrattn._core.tiles import Pairs, TilePairs, group_matmul, pick_item
from arrattn._core.typing import Array, Namespace

#: Scores held at once by one worker, as a count of numbers.
BUDGET = {"threads": 1 << 17, "batched": 1 << 22, "scan": 1 << 22}


def attend(
    call: SoftmaxInputs, *, tile: tuple[int, int] | None = None
) -> tuple[Array, Array | None]:
    """
    Softmax attention over all that the call's pattern makes visible.

    Returns the output ``(..., Hkv, G, Nq, Dv)`` and the log-sum-exp ``(..., Hkv, G, Nq)``, in
    the accumulation dtype; from a fused kernel, the output alone and in the dtype of `q`.
    `tile` overrides the choice of tile, and of a kernel; it never changes the meaning.
    """
    fused = None if tile else native.choose(call)
    kind = loops.schedule(call.xp)
    if kind != "blocks" and 0 in (*call.batch, *call.heads, *call.lengths):
        return finish(call, start(call, call.q, call.k, call.v))
    if fused is not None:
        return fused(), None
    call = call._replace(engine="tiles")
    with np.errstate(invalid="ignore", over="ignore"):
        return SCHEDULES[kind](call, tile)


# -- One tile ---------------------------------------------------------------------------------


def adjust(call: SoftmaxInputs, s: Array, pairs: Pairs, *, scale: float | None = None) -> Array:
    """Softcap and bias, on scores that hold the scale already unless it is given."""
    if scale is not None:
        s = s * scale
    if call.softcap is not None:
        s = call.softcap * call.xp.tanh(s / call.softcap)
    return s if call.bias is None else s + call.xp.astype(pairs.of_pairs(call.bias), s.dtype)


def visible_scores(
    call: SoftmaxInputs,
    q: Array,
    k: Array,
    pairs: Pairs,
    finite: bool | None,
    *,
    scale: float | None = None,
) -> Array:
    """
    Scores ``(..., Hkv, G, nq, nk)`` of queries and keys, right where visible.

    Queries are scaled already, unless a `scale` for their products is given.

    Unless the keys are known to be `finite`, keys that are not are taken out of the product
    and their scores set to NaN: a NaN in a hidden key would otherwise reach the gradients of
    every query of the tile through ``0 * NaN``.
    """
    xp = call.xp
    if finite:
        return adjust(
            call, group_matmul(q, xp.matrix_transpose(k), xp=xp, slot="scores"), pairs, scale=scale
        )
    bad = ~xp.all(xp.isfinite(k), axis=-1)
    k = xp.where(bad[..., None], xp.zeros_like(k), k)
    s = adjust(call, group_matmul(q, xp.matrix_transpose(k), xp=xp), pairs, scale=scale)
    nan = xp.asarray(math.nan, dtype=s.dtype, device=loops.device_of(s))
    return xp.where(bad[..., None, None, :], nan, s)


def enter(call: SoftmaxInputs, x: Array, *, scale: float | None = None) -> Array:
    """A tile in the accumulation dtype, scaled."""
    x = call.xp.astype(x, call.acc, copy=False)
    return x if scale is None else x * scale


def start(call: SoftmaxInputs, q: Array, k: Array, v: Array) -> State:
    """
    The state of query rows `q` before any key.

    The zeros come from a product over no keys, so that the output depends on q, k and v
    for a library that records gradients, even where every key is hidden.
    """
    xp = call.xp
    q, k, v = (enter(call, x) for x in (q, k[..., :0, :], v[..., :0, :]))
    zeros = group_matmul(group_matmul(q, xp.matrix_transpose(k), xp=xp), v, xp=xp)
    shape = (*call.batch, *q.shape[-4:-1], v.shape[-1])
    return online_softmax.empty(xp.broadcast_to(zeros, shape), call.sinks, xp=xp)


def fold(
    call: SoftmaxInputs,
    state: State,
    q: Array,
    k: Array,
    v: Array,
    pairs: TilePairs,
    *,
    hide: bool,
    finite: bool | None,
) -> State:
    """Absorb one tile: scaled queries `q`, raw keys and values."""
    visible = call.pattern.visible(pairs) if hide and call.pattern is not None else None
    known = True if visible is None else finite
    s = visible_scores(call, q, enter(call, k), pairs, known)
    return online_softmax.absorb(state, s, enter(call, v), visible, xp=call.xp, finite=known)


def finish(call: SoftmaxInputs, state: State) -> tuple[Array, Array]:
    """Output and log-sum-exp of a finished state."""
    return online_softmax.finish(state, xp=call.xp)


def all_finite(call: SoftmaxInputs) -> bool | None:
    """Whether keys and values hold no NaN or inf; None where that cannot be known yet."""
    xp = call.xp
    # A sum is finite only if every term is: one pass, and no array of flags.
    totals = (xp.isfinite(xp.sum(x, dtype=call.acc)) for x in (call.k, call.v))
    if not loops.is_concrete(call.k) or not loops.is_concrete(call.v):
        return None
    return all(bool(t) for t in totals)


# -- NumPy: a pool of threads -----------------------------------------------------------------


def _attend_threads(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    (hkv, g), (nq, nk) = call.heads, call.lengths
    out = np.empty((*call.batch, hkv, g, nq, call.v.shape[-1]), call.acc)
    lse = np.empty((*call.batch, hkv, g, nq), call.acc)
    jobs: list[Any] = []
    finite = all_finite(call) if call.pattern is not None else True
    for b in np.ndindex(*call.batch):
        item = batch_item(call, b)
        shape = tile or choose_tile(
            item.pattern, nq, nk, item.offset, lanes=g, budget=BUDGET["threads"]
        )
        plan = make_plan(item.pattern, nq, nk, item.offset, shape)
        for h in range(hkv):
            head = head_item(item, h)
            jobs += [
                partial(_tile_job, head, plan, t, finite, out[b][h], lse[b][h])
                for t in range(plan.kinds.shape[-2])
            ]
    width = max(call.q.shape[-1], call.v.shape[-1])
    loops.run_jobs(jobs, small=g * nq * nk * width <= loops.SMALL)
    return out, lse


def _tile_job(
    call: SoftmaxInputs, plan: Plan, t: int, finite: bool | None, out: Any, lse: Any
) -> None:
    i0, i1 = plan.rows(t)
    rows = call.q[..., i0:i1, :]
    state = start(call, rows, call.k, call.v)
    q = enter(call, rows, scale=call.scale)
    for run in plan.runs(t, BUDGET["threads"] // q.shape[-3]):
        state = _fold_run(call, state, q, i0, run, finite)
    out[:, i0:i1], lse[:, i0:i1] = (x[0] for x in finish(call, state))


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
    return fold(call, state, q, k, v, pairs, hide=hide, finite=finite)


def batch_item(call: SoftmaxInputs, b: tuple[int, ...]) -> SoftmaxInputs:
    """One batch item of a call, without batch axes."""
    offset = call.offset
    return call._replace(
        q=pick_item(call.q, b, 4),
        k=pick_item(call.k, b, 3),
        v=pick_item(call.v, b, 3),
        bias=None if call.bias is None else pick_item(call.bias, b, 4),
        offset=offset if isinstance(offset, int) else int(pick_item(offset, b, 4).item()),
        pattern=patterns.pick(call.pattern, partial(pick_item, b=b)),
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
        sinks=None if call.sinks is None else call.sinks[h : h + 1],
        pattern=patterns.pick(call.pattern, pick),
    )


# -- torch, CuPy and others: batched tiles ----------------------------------------------------


def _attend_batched(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    xp, (nq, nk), lanes = call.xp, call.lengths, _lanes(call)
    shape = tile or choose_tile(
        call.pattern, nq, nk, call.offset, lanes=lanes, budget=BUDGET["batched"]
    )
    plan = make_plan(call.pattern, nq, nk, call.offset, shape).merged()
    finite = all_finite(call) if (plan.kinds == PARTIAL).any() else True
    outs, lses = [], []
    for t in range(plan.kinds.shape[-2]):
        i0, i1 = plan.rows(t)
        rows = call.q[..., i0:i1, :]
        state = start(call, rows, call.k, call.v)
        q = enter(call, rows, scale=call.scale)
        for run in plan.runs(t, BUDGET["batched"] // lanes):
            state = _fold_run(call, state, q, i0, run, finite)
        out, lse = finish(call, state)
        outs.append(out)
        lses.append(lse)
    return xp.concat(outs, axis=-2), xp.concat(lses, axis=-1)


def _lanes(call: SoftmaxInputs) -> int:
    return math.prod((*call.batch, *call.heads))


# -- JAX: a traced scan -----------------------------------------------------------------------


def _attend_scan(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    nq, nk = call.lengths
    bq, bk = tile or choose_tile(
        call.pattern, nq, nk, call.offset, lanes=_lanes(call), budget=BUDGET["scan"]
    )
    bq, bk = min(bq, nq), min(bk, nk)
    # Short last tiles are padded, and the padding hidden as any other key is.
    if nk % bk:
        call = call._replace(pattern=patterns.both(call.pattern, patterns.Prefix(nk)))
    plan = make_plan(call.pattern, nq, -(-nk // bk) * bk, call.offset, (bq, bk)).merged()
    if plan.kinds.size == 1:
        out, lse = staging.traced(_one_tile, call, bool(plan.kinds.flat[0] != FULL))
        return out, lse
    tables = tuple(call.xp.asarray(x) for x in plan.visits())
    out, lse = staging.traced(_scan_tiles, call, (bq, bk), tables)
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
            return fold(call, state, q, k_tiles[u], v_tiles[u], pairs, hide=True, finite=None)

        def fully(state: State) -> State:
            return fold(call, state, q, k_tiles[u], v_tiles[u], pairs, hide=False, finite=None)

        return loops.switch(kind, (skip, partly, fully), state), None

    state, _ = loops.scan(visit, start(call, rows, call.k, call.v), (visits, kinds), xp=call.xp)
    return finish(call, state)


def stack_tiles(x: Array, size: int, xp: Namespace) -> Array:
    """``(..., N, D)`` as tiles ``(N / size, ..., size, D)``, the last padded with zeros."""
    missing = -x.shape[-2] % size
    if missing:
        pad = xp.zeros((*x.shape[:-2], missing, x.shape[-1]), dtype=x.dtype)
        x = xp.concat([x, pad], axis=-2)
    x = xp.reshape(x, (*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1]))
    return xp.moveaxis(x, -3, 0)


def unstack_rows(out: Array, lse: Array, nq: int, xp: Namespace) -> tuple[Array, Array]:
    """Tiles of query rows along a first axis, put in their place; padding cut off."""
    out, lse = xp.moveaxis(out, 0, -3), xp.moveaxis(lse, 0, -2)
    n = lse.shape[-2] * lse.shape[-1]
    out = xp.reshape(out, (*out.shape[:-3], n, out.shape[-1]))
    lse = xp.reshape(lse, (*lse.shape[:-2], n))
    return out[..., :nq, :], lse[..., :nq]


# -- Dask: blocks of its arrays ---------------------------------------------------------------


def _attend_blocks(call: SoftmaxInputs, tile: tuple[int, int] | None) -> tuple[Array, Array]:
    return staging.blockwise(partial(attend, tile=tile), call)


SCHEDULES = {
    "threads": _attend_threads,
    "batched": _attend_batched,
    "scan": _attend_scan,
    "blocks": _attend_blocks,
}
