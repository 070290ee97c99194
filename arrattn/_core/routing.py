"""
Which blocks of keys each query looks into, and which keys it takes there.

A block is rated by something cheaper than its keys: their mean (MoBA), a bound from their
smallest and largest channels (Quest), their best score, or what the caller says. A choice may be
shared by the query heads of a key head, or by the queries of a block: ratings are then summed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from arrattn._core import fold, loops
from arrattn._core.inputs import Choice, SoftmaxInputs
from arrattn._core.tiles import (
    TilePairs,
    group_matmul,
    stack_tiles,
    take_range,
)
from arrattn._core.typing import Array, Namespace


class Guide(NamedTuple):
    """
    What blocks are rated by, and what was chosen for the queries of a block together.

    Attributes
    ----------
    low, high : array or None
        What positive and negative channels of a query are multiplied with,
        (..., Hkv, G | 1, nb, D): the mean in both, or bounds.
    shared : array or None
        Blocks chosen for the queries of a block, (lanes, query blocks, route).
    """

    low: Array | None
    high: Array | None
    shared: Array | None = None


def make_guide(call: SoftmaxInputs, choice: Choice, step: int) -> Guide:
    """What all tiles of queries share; `step` queries are looked at at once."""
    guide = Guide(None, None)
    if choice.score in ("mean", "bound"):
        guide = _block_means(call, choice) if choice.score == "mean" else _bounds(call, choice)
    if choice.per == "block":
        guide = guide._replace(shared=_shared_blocks(call, choice, guide, step))
    return guide


def routed_blocks(
    call: SoftmaxInputs, choice: Choice, q: Array, guide: Guide, pairs: TilePairs
) -> Array:
    """
    Blocks chosen for each query, ascending, padded with the number of blocks.

    Queries `q` (..., Hkv, G, nq, D) give ids (..., Hkv, G | 1, nq, route).
    """
    xp = call.xp
    if guide.shared is not None:
        lanes, queries, _ = guide.shared.shape
        shape = (*call.batch, *call.heads, pairs.nq)
        at = xp.broadcast_to(_query_block(call, choice, pairs)[..., 0], shape)
        at = xp.reshape(at, (lanes, math.prod(shape) // max(lanes, 1)))
        lane = xp.reshape(xp.arange(lanes, dtype=at.dtype, device=call.device), (lanes, 1))
        flat = xp.reshape(guide.shared, (lanes * queries, guide.shared.shape[-1]))
        rows = xp.take(flat, xp.reshape(at + lane * queries, (-1,)), axis=0)
        return xp.reshape(rows, (*shape, rows.shape[-1]))
    s, allowed = _ratings(call, choice, q, guide, pairs)
    if choice.per == "group":
        s = xp.sum(xp.where(allowed, s, xp.zeros_like(s)), axis=-3, keepdims=True)
        allowed = xp.any(allowed, axis=-3, keepdims=True)
    return _best_blocks(choice, s, allowed, xp=xp)


def _best_blocks(choice: Choice, s: Array, allowed: Array, *, xp: Namespace) -> Array:
    """The allowed blocks that are rated best, ascending, padded with the number of blocks."""
    return padded_indices(top_mask(s, allowed, choice.route, xp=xp), choice.route, xp=xp)


def padded_indices(chosen: Array, count: int, *, xp: Namespace) -> Array:
    """Where each row is True, ascending, at most `count`; padded with the length of a row."""
    n = chosen.shape[-1]
    index = xp.arange(n, device=loops.device_of(chosen))
    # The largest of (n - index) are the lowest indices; 0 stands for "none".
    return n - loops.largest(xp.where(chosen, n - index, xp.zeros_like(index)), count, xp=xp)


def _ratings(
    call: SoftmaxInputs, choice: Choice, q: Array, guide: Guide, pairs: TilePairs
) -> tuple[Array, Array]:
    """Ratings of all blocks for each query, and which of them it may look into."""
    xp, nk = call.xp, call.lengths[1]
    nb = -(-nk // choice.block)
    block = xp.reshape(xp.arange(nb, dtype=pairs.p.dtype, device=call.device), (1, nb))
    allowed = block != own_block(pairs.p, choice, nk, xp=xp)
    allowed = allowed & holds_visible(call, choice, pairs, block)
    if call.guide is not None:
        s = fold.enter(call, take_range(call.guide, pairs.i0, pairs.nq, axis=-2, xp=xp))
    elif choice.score == "best":
        every = TilePairs(pairs.i0, pairs.nq, 0, nk, call.offset, xp=xp, device=call.device)
        s = fold.visible_scores(call, q, fold.enter(call, call.k), every, None, scale=call.scale)
        if call.pattern is not None:
            s = loops.hide(s, call.pattern.visible(every), xp=xp)
        s = xp.max(blocked(s, choice.block, axis=-1, xp=xp, fill=-math.inf), axis=-1)
    else:
        s = _against(q, guide, call.scale, xp=xp)
    shape = (*call.batch, *call.heads, pairs.nq, nb)
    return xp.broadcast_to(s, shape), xp.broadcast_to(allowed, shape)


def _against(q: Array, guide: Guide, scale: float, *, xp: Namespace) -> Array:
    def product(q: Array, table: Any) -> Array:
        if table.shape[-3] == 1:
            return group_matmul(q, xp.matrix_transpose(xp.squeeze(table, axis=-3)), xp=xp)
        return xp.matmul(q, xp.matrix_transpose(table))

    if guide.low is guide.high:
        return product(q, guide.high) * scale
    # A bound from above: each channel of a key is taken where the product is largest.
    q, none = q * scale, xp.zeros_like(q)
    return product(xp.maximum(q, none), guide.high) + product(xp.minimum(q, none), guide.low)


def _query_block(call: SoftmaxInputs, choice: Choice, pairs: TilePairs) -> Array:
    """Which block of queries each query is in, counted from the first, (..., nq, 1)."""
    first = TilePairs(0, 1, 0, 1, call.offset, xp=call.xp, device=call.device)
    return pairs.p // choice.block - first.p // choice.block


def _shared_blocks(call: SoftmaxInputs, choice: Choice, guide: Guide, step: int) -> Array:
    """Blocks chosen for the queries of a block together, (lanes, query blocks, route)."""
    xp, (nq, nk) = call.xp, call.lengths
    queries, nb = (nq + choice.block - 2) // choice.block + 1, -(-nk // choice.block)
    number = xp.reshape(xp.arange(queries, device=call.device), (queries, 1))

    def gathered(rows: Array, i0: int | Array) -> Array:
        """Sums, and how many were summed, and how many of those were not finite."""
        n = rows.shape[-2]
        pairs = TilePairs(i0, n, 0, 1, call.offset, xp=xp, device=call.device)
        s, allowed = _ratings(call, choice, fold.enter(call, rows), guide, pairs)
        live = xp.arange(n, device=call.device) + i0 < nq
        inside = (xp.matrix_transpose(_query_block(call, choice, pairs)) == number) & live
        finite = xp.isfinite(s)
        parts = (xp.where(finite & allowed, s, xp.zeros_like(s)), allowed, allowed & ~finite)
        member = xp.astype(inside, call.acc)
        return xp.stack([xp.matmul(member, xp.astype(x, call.acc)) for x in parts])

    shape = (3, *call.batch, *call.heads, queries, nb)
    total = xp.zeros(shape, dtype=call.acc, device=call.device)
    if loops.schedule(xp) == "scan":
        tiles = stack_tiles(call.q, step, xp)
        starts = xp.arange(tiles.shape[0]) * step

        def add(total: tuple[Array], x: tuple[Array, Array]) -> tuple[tuple[Array], None]:
            return (total[0] + gathered(*x),), None

        total = loops.scan(add, (total,), (tiles, starts), xp=xp)[0][0]
    else:
        for i0 in range(0, nq, step):
            total = total + gathered(call.q[..., i0 : min(i0 + step, nq), :], i0)
    sums, counts, bad = total[0, ...], total[1, ...], total[2, ...]
    sums = xp.where(bad > 0, xp.asarray(math.inf, dtype=sums.dtype, device=call.device), sums)
    ids = _best_blocks(choice, sums, counts > 0, xp=xp)
    return xp.reshape(ids, (math.prod(ids.shape[:-2]), *ids.shape[-2:]))


def _rated_keys(call: SoftmaxInputs) -> tuple[Array, Array]:
    """
    Keys (..., Hkv, 1, Nk, D), and which rate their block (..., Hkv, G | 1, Nk, 1).

    Those are finite and seen by some query: one key that is not finite would else decide where
    everyone searches, also those who do not see it.
    """
    xp, nk = call.xp, call.lengths[1]
    k = fold.enter(call, call.k)[..., None, :, :]
    seen = seen_by_any(call)
    if seen is None:
        seen = xp.ones((1, nk), dtype=xp.bool, device=call.device)
    return k, xp.matrix_transpose(seen) & xp.all(xp.isfinite(k), axis=-1, keepdims=True)


def _block_means(call: SoftmaxInputs, choice: Choice) -> Guide:
    xp = call.xp
    k, seen = _rated_keys(call)
    totals = xp.sum(
        blocked(xp.where(seen, k, xp.zeros_like(k)), choice.block, axis=-2, xp=xp), axis=-2
    )
    counts = xp.sum(blocked(xp.astype(seen, call.acc), choice.block, axis=-2, xp=xp), axis=-2)
    means = totals / xp.maximum(counts, xp.ones_like(counts))
    return Guide(means, means)


def _bounds(call: SoftmaxInputs, choice: Choice) -> Guide:
    """The smallest and largest of each channel; 0 where a block has no key that counts."""
    xp = call.xp
    k, seen = _rated_keys(call)

    def extreme(sign: int) -> Array:
        none = xp.full_like(k, -math.inf)
        x = blocked(xp.where(seen, k * sign, none), choice.block, axis=-2, xp=xp, fill=-math.inf)
        x = xp.max(x, axis=-2)
        return xp.where(x == -math.inf, xp.zeros_like(x), x) * sign

    return Guide(extreme(-1), extreme(1))


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


def holds_visible(call: SoftmaxInputs, choice: Choice, pairs: TilePairs, block: Array) -> Array:
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
    return xp.any(blocked(seen, size, axis=-1, xp=xp), axis=-1)


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


def blocked(x: Array, size: int, *, axis: int, xp: Namespace, fill: float | bool = False) -> Array:
    """Split `axis` (negative) in two, (blocks, size), the last block filled up."""
    at = x.ndim + axis
    missing = -x.shape[at] % size
    if missing:
        shape = (*x.shape[:at], missing, *x.shape[at + 1 :])
        x = xp.concat([x, xp.full(shape, fill, dtype=x.dtype, device=loops.device_of(x))], axis=at)
    return xp.reshape(x, (*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :]))
