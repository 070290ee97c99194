"""
Sparse attention: choose keys for each query, then attend to those.

Rows of queries are handled a tile at a time. Exhaustive selection scores a tile against
every key; routed selection scores it against the mean keys of the blocks, and then against
the keys of the few blocks chosen. Which keys a row sees is a mask over the keys scored.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from arrattn._core import fold, jobs, loops, online_softmax, staging
from arrattn._core.grouped import Grouping, group, grouped_matmul
from arrattn._core.inputs import Choice, SoftmaxInputs
from arrattn._core.plan import make_plan
from arrattn._core.routing import (
    Guide,
    blocked,
    make_guide,
    own_block,
    padded_indices,
    routed_blocks,
    top_mask,
)
from arrattn._core.tiles import ChosenPairs, TilePairs, gather_last, stack_tiles, unstack
from arrattn._core.typing import Array, Namespace

#: Numbers that one worker may hold for the keys its rows look at.
BUDGET = {"threads": 1 << 21, "batched": 1 << 23, "scan": 1 << 22}


class Keys(NamedTuple):
    """
    The keys of a call, as a tile of queries needs them.

    For exhaustive selection `k` and `v` are ``(..., Hkv, Nk, ·)``; for routed selection the
    blocks of all lanes, ``(lanes * nb, block, ·)``, and `guide` says how to find some.
    """

    k: Array
    v: Array
    guide: Guide | None


def attend_selected(
    call: SoftmaxInputs, choice: Choice, *, rows: int | None = None
) -> tuple[Array, ...]:
    """
    Sparse attention of the call's queries: what `engine.attend` returns, and what was chosen.

    The latter, only if ``choice.listed``, is (..., Hkv, G, Nq, listed), ascending and padded
    with -1. `rows` overrides how many queries are handled at once; it never changes the meaning.
    """
    kind = loops.schedule(call.xp)
    if kind != "blocks" and 0 in (*call.batch, *call.heads, *call.lengths):
        return _finish(call, choice, fold.start(call, call.q, call.k, call.v), None, 0)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return _SCHEDULES[kind](call, choice, rows)


# -- A tile of queries ------------------------------------------------------------------------


def prepare(call: SoftmaxInputs, choice: Choice) -> Keys:
    """What all tiles of queries share."""
    if choice.exhaustive:
        return Keys(call.k, call.v, None)
    guide = make_guide(call, choice, rows_at_once(call, choice)) if choice.route else None
    xp, lead = call.xp, (*call.batch, call.heads[0])

    def blocks(x: Array) -> Array:
        x = blocked(fold.enter(call, x), choice.block, axis=-2, xp=xp)
        x = xp.broadcast_to(x, (*lead, *x.shape[-3:]))
        return xp.reshape(x, (math.prod(x.shape[:-2]), *x.shape[-2:]))

    return Keys(blocks(call.k), blocks(call.v), guide)


def select_tile(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    rows: Array,
    i0: int | Array,
    finite: bool | None,
    hull: tuple[int, int] | None = None,
) -> tuple[Array, ...]:
    """Output, log-sum-exp and, if asked for, choice of the queries `rows` from index `i0` on."""
    if choice.exhaustive:
        return _exhaustive_tile(call, choice, rows, i0, finite, hull)
    return _routed_tile(call, choice, keys, rows, i0, finite)


def _exhaustive_tile(
    call: SoftmaxInputs,
    choice: Choice,
    rows: Array,
    i0: int | Array,
    finite: bool | None,
    hull: tuple[int, int] | None,
) -> tuple[Array, ...]:
    xp, (_, nk) = call.xp, call.lengths
    j0, j1 = hull or (0, nk)
    k, v = (fold.enter(call, x[..., j0:j1, :]) for x in (call.k, call.v))
    state = fold.start(call, rows, call.k, call.v)
    if j0 == j1:
        return _finish(call, choice, state, None, nk)
    pairs = TilePairs(i0, rows.shape[-2], j0, j1 - j0, call.offset, xp=xp, device=call.device)
    own = own_block(pairs.p, choice, nk, xp=xp) == pairs.j // choice.block
    visible = xp.ones_like(own) if call.pattern is None else call.pattern.visible(pairs)
    # The scale comes after the product: before it, rounding could part scores that tie.
    q = fold.enter(call, rows)
    s = fold.visible_scores(call, q, k, pairs, finite, scale=call.scale)
    best = top_mask(s, visible & ~own, choice.top_k, xp=xp)
    seen = (visible & own) | best
    found = None
    if choice.listed:
        found = padded_indices(best, min(choice.top_k, j1 - j0), xp=xp)
        found = xp.where(found == j1 - j0, xp.full_like(found, nk), found + j0)
    state = online_softmax.absorb(state, s, v, seen, xp=xp, finite=finite)
    return _finish(call, choice, state, found, nk)


def _finish(
    call: SoftmaxInputs, choice: Choice, state: online_softmax.State, found: Array | None, none: int
) -> tuple[Array, ...]:
    """Finish, with the indices `found`, of which `none` stands for no index."""
    out, lse = fold.finish(call, state)
    if choice.listed is None:
        return out, lse
    xp, shape = call.xp, (*call.batch, *call.heads, out.shape[-2])
    if found is None:
        found = xp.full((1, 0), none, device=call.device)
    short = choice.listed - found.shape[-1]
    found = xp.broadcast_to(found, (*shape, found.shape[-1]))
    if short:
        pad = xp.full((*shape, short), none, dtype=found.dtype, device=call.device)
        found = xp.concat([found, pad], axis=-1)
    return out, lse, xp.where(found == none, xp.full_like(found, -1), found)


def _routed_tile(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    rows: Array,
    i0: int | Array,
    finite: bool | None,
) -> tuple[Array, ...]:
    xp, nk, size = call.xp, call.lengths[1], choice.block
    nq, nb = rows.shape[-2], -(-nk // size)
    shape = (*call.batch, *call.heads, nq)
    q = fold.enter(call, rows)
    pairs = TilePairs(i0, nq, 0, 1, call.offset, xp=xp, device=call.device)
    ids = xp.broadcast_to(own_block(pairs.p, choice, nk, xp=xp), (*shape, 1))
    found = None
    if keys.guide is not None:
        found = routed_blocks(call, choice, q, keys.guide, pairs)
        found = xp.broadcast_to(found, (*shape, found.shape[-1]))
        # Chosen for a query of its block that lies beyond the keys and has no block of its own.
        found = xp.where(found == ids, xp.full_like(found, nb), found)
        ids = xp.concat([ids, xp.astype(found, ids.dtype)], axis=-1)
    n = ids.shape[-1]
    some = ids < nb
    ids = xp.where(some, ids, xp.zeros_like(ids))
    lanes = math.prod(shape[:-2])
    at = group(xp.reshape(ids, (lanes, -1)), nb, xp=xp)

    # The keys looked at, in the order own block, then routed blocks: (..., nq, n * size).
    within = xp.arange(size, dtype=ids.dtype, device=call.device)
    j = xp.reshape(ids[..., None] * size + within, (*shape, n * size))
    real = xp.broadcast_to(some[..., None], (*ids.shape, size))
    visible = xp.reshape(real, j.shape) & (j < nk)
    j = xp.minimum(j, xp.full_like(j, nk - 1))
    chosen = ChosenPairs(i0, j, call.offset, xp=xp, device=call.device)
    if call.pattern is not None:
        visible = visible & call.pattern.visible(chosen)

    q = xp.reshape(xp.broadcast_to(q, (*shape, q.shape[-1])), (math.prod(shape), q.shape[-1]))
    s = _block_scores(q, keys.k, at, n, finite, xp=xp)
    s = fold.adjust(call, xp.reshape(s, j.shape), chosen, scale=call.scale)
    own = xp.reshape(xp.arange(n * size, device=call.device) < size, (1, n * size))
    seen, none = visible, nb
    if choice.select == "keys":
        best = top_mask(s, visible & ~own, choice.top_k, xp=xp)
        seen, none = (visible & own) | best, nk
        if choice.listed:
            # Blocks are looked at in ascending order, so the first place is the lowest index.
            places = padded_indices(best, min(choice.listed, n * size), xp=xp)
            some = places < n * size
            places = xp.where(some, places, xp.zeros_like(places))
            found = xp.where(some, gather_last(j, places, xp=xp), xp.full_like(places, nk))
    state = fold.start(call, rows, call.k, call.v)
    weighted = partial(_block_sums, blocks=keys.v, at=at, n=n, finite=finite, xp=xp)
    state = online_softmax.absorb_with(state, s, seen, weighted, xp=xp)
    return _finish(call, choice, state, found, none)


def _block_scores(
    q: Array, k: Array, at: Grouping, n: int, finite: bool | None, *, xp: Namespace
) -> Array:
    """Scores of each query with the keys of its blocks, (pairs, block)."""
    if finite:
        return grouped_matmul(q, xp.matrix_transpose(k), at, per_row=n, xp=xp)
    bad = ~xp.isfinite(k)
    clean = xp.where(bad, xp.zeros_like(k), k)
    s = grouped_matmul(q, xp.matrix_transpose(clean), at, per_row=n, xp=xp)
    flags = xp.astype(xp.any(bad, axis=-1), s.dtype)[:, None, :]
    ones = xp.ones((q.shape[0], 1), dtype=s.dtype, device=loops.device_of(s))
    hit = grouped_matmul(ones, flags, at, per_row=n, xp=xp) > 0
    return xp.where(hit, xp.asarray(math.nan, dtype=s.dtype, device=loops.device_of(s)), s)


def _block_sums(
    p: Array,
    seen: Array,
    *,
    blocks: Array,
    at: Grouping,
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
    hit = total(xp.astype(seen, p.dtype), xp.astype(bad, p.dtype)) > 0
    return xp.where(hit, xp.asarray(math.nan, dtype=out.dtype, device=loops.device_of(out)), out)


# -- Schedules --------------------------------------------------------------------------------


def rows_at_once(call: SoftmaxInputs, choice: Choice) -> int:
    """How many queries a tile has."""
    kind, (nq, nk) = loops.schedule(call.xp), call.lengths
    # A thread holds one key head, the others all that there are.
    lanes = call.heads[1] if kind == "threads" else math.prod((*call.batch, *call.heads))
    looked = nk if choice.exhaustive else (1 + choice.route) * choice.block
    if choice.score == "best" and choice.route:
        looked = max(looked, nk)
    if call.pattern is not None and not choice.exhaustive:
        pairs = TilePairs(0, 1, 0, 1, call.offset, xp=call.xp, device=call.device)
        if call.pattern.key_span(pairs) is None:
            looked = max(looked, nk)
    return min(nq, max(16, BUDGET[kind] // (looked * lanes)))


def _hulls(call: SoftmaxInputs, choice: Choice, rows: int) -> list[tuple[int, int]]:
    """The range of keys that may be visible to each tile of queries."""
    nq, nk = call.lengths
    plan = make_plan(call.pattern, nq, nk, call.offset, (rows, choice.block)).merged()
    hulls = []
    for kinds in plan.kinds:
        used = np.flatnonzero(kinds)
        hulls.append(
            (plan.columns(int(used[0]))[0], plan.columns(int(used[-1]))[1]) if len(used) else (0, 0)
        )
    return hulls


def _select_threads(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    (hkv, g), (nq, _) = call.heads, call.lengths
    shape = (*call.batch, hkv, g, nq)
    results = [np.empty((*shape, call.v.shape[-1]), call.acc), np.empty(shape, call.acc)]
    if choice.listed is not None:
        results.append(np.empty((*shape, choice.listed), np.int64))
    finite = fold.all_finite(call)
    step = rows or rows_at_once(call, choice)
    heads: list[_Head] = []
    for b in np.ndindex(*call.batch):
        item = jobs.batch_item(call, b)
        hulls = _hulls(item, choice, step) if choice.exhaustive else None
        for h in range(hkv):
            to = [x[b][h] for x in results]
            heads.append(_Head(jobs.head_item(item, h), choice, finite, hulls, step, to))
    loops.run_jobs([head.prepare for head in heads])
    loops.run_jobs(
        [
            partial(head.run, t, i0)
            for head in heads
            for t, i0 in reversed(list(enumerate(range(0, nq, step))))
        ]
    )
    return tuple(results)


class _Head:
    """One key head of one item: what its jobs share, and where they write."""

    def __init__(
        self,
        call: SoftmaxInputs,
        choice: Choice,
        finite: bool | None,
        hulls: list[tuple[int, int]] | None,
        step: int,
        results: list[Any],
    ) -> None:
        self.call, self.choice, self.finite, self.results = call, choice, finite, results
        self.hulls, self.step = hulls, step
        self.keys = Keys(call.k, call.v, None)

    def prepare(self) -> None:
        self.keys = prepare(self.call, self.choice)

    def run(self, t: int, i0: int) -> None:
        at = slice(i0, min(i0 + self.step, self.call.lengths[0]))
        hull = None if self.hulls is None else self.hulls[t]
        q = self.call.q[..., at, :]
        tile = select_tile(self.call, self.choice, self.keys, q, i0, self.finite, hull)
        for result, part in zip(self.results, tile, strict=True):
            result[:, at] = part[0]


def _select_batched(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    xp, nq = call.xp, call.lengths[0]
    step = rows or rows_at_once(call, choice)
    hulls = _hulls(call, choice, step) if choice.exhaustive else None
    keys, finite = prepare(call, choice), fold.all_finite(call)
    tiles = [
        select_tile(
            call,
            choice,
            keys,
            call.q[..., i0 : min(i0 + step, nq), :],
            i0,
            finite,
            None if hulls is None else hulls[t],
        )
        for t, i0 in enumerate(range(0, nq, step))
    ]
    axis = len(call.batch) + 2
    return tuple(xp.concat(parts, axis=axis) for parts in zip(*tiles, strict=True))


def _select_scan(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    step = rows or rows_at_once(call, choice)
    results: tuple[Array, ...] = staging.traced(
        _scan_selected, call, (choice, min(step, call.lengths[0]))
    )
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
    at = len(call.batch) + 2
    return tuple(unstack(x, at, nq, xp) for x in loops.map_rematerialised(body, (tiles, starts)))


def _select_blocks(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, ...]:
    run = partial(attend_selected, choice=choice, rows=rows)
    return staging.blockwise(run, call, listed=choice.listed)


_SCHEDULES = {
    "threads": _select_threads,
    "batched": _select_batched,
    "scan": _select_scan,
    "blocks": _select_blocks,
}
