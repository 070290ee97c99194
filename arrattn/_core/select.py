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
from arrattn._core.tiles import ChosenPairs, TilePairs, group_matmul, stack_tiles, unstack_rows
from arrattn._core.typing import Array, Namespace

#: Numbers that one worker may hold for the keys its rows look at.
BUDGET = {"threads": 1 << 21, "batched": 1 << 23, "scan": 1 << 22}


class Keys(NamedTuple):
    """
    The keys of a call, as a tile of queries needs them.

    For exhaustive selection `k` and `v` are ``(..., Hkv, Nk, ·)``; for routed selection the
    blocks of all lanes, ``(lanes * nb, block, ·)``. `means` is ``(..., Hkv, G | 1, nb, D)``.
    """

    k: Array
    v: Array
    means: Array | None


def attend_selected(
    call: SoftmaxInputs, choice: Choice, *, rows: int | None = None
) -> tuple[Array, Array]:
    """
    Sparse attention of the call's queries; returns what `engine.attend` returns.

    `rows` overrides how many queries are handled at once; it never changes the meaning.
    """
    kind = loops.schedule(call.xp)
    if kind != "blocks" and 0 in (*call.batch, *call.heads, *call.lengths):
        return fold.finish(call, fold.start(call, call.q, call.k, call.v))
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return _SCHEDULES[kind](call, choice, rows)


# -- Choosing ---------------------------------------------------------------------------------


def top_mask(s: Array, candidates: Array, k: int, *, xp: Namespace) -> Array:
    """
    The `k` candidates with the highest scores in each row, ties to the lower index.

    A threshold and a running count of ties: no indices, so that every library agrees. A NaN
    score counts as the highest, so that what is not a number shows in the result.
    """
    n = s.shape[-1]
    if k >= n:
        return xp.broadcast_arrays(s, candidates)[1]  # batch axes may be those of v alone
    if k == 0:
        return xp.zeros(s.shape, dtype=xp.bool, device=loops.device_of(s))
    s = loops.stop_gradient(s)
    inf = xp.asarray(math.inf, dtype=s.dtype, device=loops.device_of(s))
    s = xp.where(candidates, xp.where(xp.isnan(s), inf, s), -inf)
    threshold = loops.kth_largest(s, k, xp=xp)
    above, tied = s > threshold, s == threshold
    room = k - xp.count_nonzero(above, axis=-1, keepdims=True)

    def first_ties(tied: Array, room: Array) -> Array:
        return tied & (xp.cumulative_sum(xp.astype(tied, room.dtype), axis=-1) <= room)

    def all_ties(tied: Array, room: Array) -> Array:
        del room
        return tied

    crowded = xp.any(xp.count_nonzero(tied, axis=-1, keepdims=True) > room)
    chosen = above | loops.cond(crowded, first_ties, all_ties, tied, room, xp=xp)
    return chosen & candidates


def own_block(p: Array, choice: Choice, nk: int, *, xp: Namespace) -> Array:
    """The block of each position; the number of blocks where it lies outside the keys."""
    nb = -(-nk // choice.block)
    inside = (p >= 0) & (p < nk)
    return xp.where(inside, p // choice.block, xp.full_like(p, nb))


def routed_blocks(
    call: SoftmaxInputs, choice: Choice, q: Array, means: Array, pairs: TilePairs
) -> Array:
    """
    Blocks to search for each query, ascending, padded with the number of blocks.

    Queries `q` (..., Hkv, G, nq, D) give ids (..., Hkv, G, nq, route).
    """
    xp, nk = call.xp, call.lengths[1]
    nb = means.shape[-2]
    if means.shape[-3] == 1:
        s = group_matmul(q, xp.matrix_transpose(xp.squeeze(means, axis=-3)), xp=xp)
    else:
        s = xp.matmul(q, xp.matrix_transpose(means))
    block = xp.reshape(xp.arange(nb, dtype=pairs.p.dtype, device=call.device), (1, nb))
    allowed = block != own_block(pairs.p, choice, nk, xp=xp)
    allowed = allowed & _holds_visible(call, choice, pairs, block)
    shape = np.broadcast_shapes(tuple(s.shape), tuple(allowed.shape))
    s = xp.broadcast_to(s * call.scale, shape)
    chosen = top_mask(s, allowed, choice.route, xp=xp)
    # The largest of (nb - id) are the lowest ids; 0 stands for "none".
    return nb - loops.largest(
        xp.where(chosen, nb - block, xp.zeros_like(block)), choice.route, xp=xp
    )


def _holds_visible(call: SoftmaxInputs, choice: Choice, pairs: TilePairs, block: Array) -> Array:
    """Whether each block holds a key that each query sees."""
    xp, nk, size = call.xp, call.lengths[1], choice.block
    if call.pattern is None:
        return block >= 0
    span = call.pattern.key_span(pairs)
    if span is not None:
        lo, hi = block * size, xp.minimum((block + 1) * size, xp.full_like(block, nk))
        lo = lo if span[0] is None else xp.maximum(lo, _array(span[0], lo, xp))
        hi = hi if span[1] is None else xp.minimum(hi, _array(span[1], hi, xp))
        return lo < hi
    every = TilePairs(pairs.i0, pairs.nq, 0, nk, call.offset, xp=xp, device=call.device)
    seen = call.pattern.visible(every)
    seen = xp.broadcast_to(seen, (*seen.shape[:-2], pairs.nq, nk))
    return xp.any(_blocked(seen, size, axis=-1, xp=xp), axis=-1)


def _array(x: Array | int, like: Array, xp: Namespace) -> Array:
    return xp.full_like(like, x) if isinstance(x, int) else x


def seen_by_any(call: SoftmaxInputs) -> Array | None:
    """
    Whether any query sees each key, (..., Hkv | 1, G | 1, 1, Nk); None where all are seen.
    """
    xp, (nq, nk) = call.xp, call.lengths
    pattern = call.pattern
    if pattern is None:
        return None
    pairs = TilePairs(0, 1, 0, nk, call.offset, xp=xp, device=call.device)
    span = pattern.query_span(pairs)
    if span is not None:
        lo, hi = pairs.p, pairs.p + nq
        lo = lo if span[0] is None else xp.maximum(lo, span[0])
        hi = hi if span[1] is None else xp.minimum(hi, span[1])
        return lo < hi

    def seen_in(i0: int | Array, n: int) -> Array:
        at = TilePairs(i0, n, 0, nk, call.offset, xp=xp, device=call.device)
        seen = pattern.visible(at)
        seen = xp.broadcast_to(seen, (*seen.shape[:-2], n, nk))
        return xp.any(seen, axis=-2, keepdims=True)

    step = max(1, (1 << 20) // nk)
    if loops.schedule(xp) == "scan" and nq > step:
        starts = xp.minimum(xp.arange(0, nq, step), xp.asarray(nq - step))

        def absorb(seen: tuple[Array], i0: tuple[Array]) -> tuple[tuple[Array], None]:
            return (seen[0] | seen_in(i0[0], step),), None

        first = (seen_in(0, step),)
        return loops.scan(absorb, first, (starts,), xp=xp)[0][0]
    seen = seen_in(0, min(step, nq))
    for i0 in range(step, nq, step):
        seen = seen | seen_in(i0, min(step, nq - i0))
    return seen


def block_means(call: SoftmaxInputs, choice: Choice) -> Array:
    """
    The mean of each block's finite keys that some query sees, (..., Hkv, G | 1, nb, D).

    One key that is not finite would else decide where everyone searches, also those who do
    not see it.
    """
    xp, nk = call.xp, call.lengths[1]
    k = fold.enter(call, call.k)[..., None, :, :]
    seen = seen_by_any(call)
    if seen is None:
        seen = xp.ones((1, nk), dtype=xp.bool, device=call.device)
    seen = xp.matrix_transpose(seen) & xp.all(xp.isfinite(k), axis=-1, keepdims=True)
    totals = xp.sum(
        _blocked(xp.where(seen, k, xp.zeros_like(k)), choice.block, axis=-2, xp=xp), axis=-2
    )
    counts = xp.sum(_blocked(xp.astype(seen, call.acc), choice.block, axis=-2, xp=xp), axis=-2)
    return totals / xp.maximum(counts, xp.ones_like(counts))


def _blocked(x: Array, size: int, *, axis: int, xp: Namespace) -> Array:
    """Split `axis` (negative) in two, (blocks, size), the last block filled with zeros."""
    at = x.ndim + axis
    missing = -x.shape[at] % size
    if missing:
        shape = (*x.shape[:at], missing, *x.shape[at + 1 :])
        x = xp.concat([x, xp.zeros(shape, dtype=x.dtype, device=loops.device_of(x))], axis=at)
    return xp.reshape(x, (*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :]))


# -- A tile of queries ------------------------------------------------------------------------


def prepare(call: SoftmaxInputs, choice: Choice) -> Keys:
    """What all tiles of queries share."""
    if choice.exhaustive:
        return Keys(call.k, call.v, None)
    means = block_means(call, choice) if choice.route else None
    xp, lead = call.xp, (*call.batch, call.heads[0])

    def blocks(x: Array) -> Array:
        x = _blocked(fold.enter(call, x), choice.block, axis=-2, xp=xp)
        x = xp.broadcast_to(x, (*lead, *x.shape[-3:]))
        return xp.reshape(x, (math.prod(x.shape[:-2]), *x.shape[-2:]))

    return Keys(blocks(call.k), blocks(call.v), means)


def select_tile(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    rows: Array,
    i0: int | Array,
    finite: bool | None,
    hull: tuple[int, int] | None = None,
) -> tuple[Array, Array]:
    """Output and log-sum-exp of the queries `rows`, which start at index `i0`."""
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
) -> tuple[Array, Array]:
    xp, (_, nk) = call.xp, call.lengths
    j0, j1 = hull or (0, nk)
    k, v = (fold.enter(call, x[..., j0:j1, :]) for x in (call.k, call.v))
    state = fold.start(call, rows, call.k, call.v)
    if j0 == j1:
        return fold.finish(call, state)
    pairs = TilePairs(i0, rows.shape[-2], j0, j1 - j0, call.offset, xp=xp, device=call.device)
    own = own_block(pairs.p, choice, nk, xp=xp) == pairs.j // choice.block
    visible = xp.ones_like(own) if call.pattern is None else call.pattern.visible(pairs)
    # The scale comes after the product: before it, rounding could part scores that tie.
    q = fold.enter(call, rows)
    s = fold.visible_scores(call, q, k, pairs, finite, scale=call.scale)
    best = top_mask(s, visible & ~own, choice.top_k, xp=xp)
    seen = (visible & own) | best
    return fold.finish(call, online_softmax.absorb(state, s, v, seen, xp=xp, finite=finite))


def _routed_tile(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    rows: Array,
    i0: int | Array,
    finite: bool | None,
) -> tuple[Array, Array]:
    xp, nk, size = call.xp, call.lengths[1], choice.block
    nq, nb = rows.shape[-2], -(-nk // size)
    shape = (*call.batch, *call.heads, nq)
    q = fold.enter(call, rows)
    pairs = TilePairs(i0, nq, 0, 1, call.offset, xp=xp, device=call.device)
    ids = xp.broadcast_to(own_block(pairs.p, choice, nk, xp=xp), (*shape, 1))
    if keys.means is not None:
        found = routed_blocks(call, choice, q, keys.means, pairs)
        found = xp.broadcast_to(found, (*shape, found.shape[-1]))
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
    seen = visible & own
    if n > 1:
        seen = seen | top_mask(s, visible & ~own, choice.top_k, xp=xp)
    state = fold.start(call, rows, call.k, call.v)
    weighted = partial(_block_sums, blocks=keys.v, at=at, n=n, finite=finite, xp=xp)
    return fold.finish(call, online_softmax.absorb_with(state, s, seen, weighted, xp=xp))


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


def _select_threads(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, Array]:
    (hkv, g), (nq, _) = call.heads, call.lengths
    out = np.empty((*call.batch, hkv, g, nq, call.v.shape[-1]), call.acc)
    lse = np.empty((*call.batch, hkv, g, nq), call.acc)
    finite = fold.all_finite(call)
    step = rows or rows_at_once(call, choice)
    for b in np.ndindex(*call.batch):
        item = jobs.batch_item(call, b)
        hulls = _hulls(item, choice, step) if choice.exhaustive else None
        for h in range(hkv):
            head = jobs.head_item(item, h)
            keys = prepare(head, choice)
            loops.run_jobs(
                [
                    partial(
                        _rows_job,
                        head,
                        choice,
                        keys,
                        slice(i0, min(i0 + step, nq)),
                        finite,
                        None if hulls is None else hulls[t],
                        out[b][h],
                        lse[b][h],
                    )
                    for t, i0 in enumerate(range(0, nq, step))
                ]
            )
    return out, lse


def _rows_job(
    call: SoftmaxInputs,
    choice: Choice,
    keys: Keys,
    at: slice,
    finite: bool | None,
    hull: tuple[int, int] | None,
    out: Any,
    lse: Any,
) -> None:
    tile = select_tile(call, choice, keys, call.q[..., at, :], at.start, finite, hull)
    out[:, at], lse[:, at] = (x[0] for x in tile)


def _select_batched(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, Array]:
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
    outs, lses = zip(*tiles, strict=True)
    return xp.concat(outs, axis=-2), xp.concat(lses, axis=-1)


def _select_scan(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, Array]:
    step = rows or rows_at_once(call, choice)
    out, lse = staging.traced(_scan_selected, call, (choice, min(step, call.lengths[0])))
    return out, lse


def _scan_selected(
    call: SoftmaxInputs, extra: tuple[Choice, int], tables: tuple[Array, ...]
) -> tuple[Array, Array]:
    del tables
    (choice, step), xp, nq = extra, call.xp, call.lengths[0]
    keys = prepare(call, choice)

    def body(row: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, i0 = row
        return select_tile(call, choice, keys, rows, i0, None)

    tiles = stack_tiles(call.q, step, xp)
    starts = xp.arange(tiles.shape[0]) * step
    out, lse = loops.map_rematerialised(body, (tiles, starts))
    return unstack_rows(out, lse, nq, xp)


def _select_blocks(call: SoftmaxInputs, choice: Choice, rows: int | None) -> tuple[Array, Array]:
    return staging.blockwise(partial(attend_selected, choice=choice, rows=rows), call)


_SCHEDULES = {
    "threads": _select_threads,
    "batched": _select_batched,
    "scan": _select_scan,
    "blocks": _select_blocks,
}
