"""
Which blocks a query looks into: their scores, who may choose them, and the choice.

Scores are computed for a tile of queries against all blocks. Those who choose together (the
queries of a block, the query heads of a key head) add theirs up, and the best are taken by a
threshold: no order of indices, so that every library agrees.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from arrattn._core import fold, loops
from arrattn._core.inputs import Choice, SoftmaxInputs
from arrattn._core.tiles import (
    Pairs,
    PickedPairs,
    TilePairs,
    group_matmul,
    take_range,
)
from arrattn._core.topk import kth_largest
from arrattn._core.typing import Array, Namespace

#: Up to so many of a row are found by sorting it.
FEW = 16


class Rows(NamedTuple):
    """
    A tile of queries: `n` from place `start` on.

    Where queries are laid out by block (see `select.by_query_blocks`), `i` are their indices,
    clipped to those that are there, `real` says which are, and `p` are positions, each
    (n, 1) or (..., 1, 1, n, 1). Elsewhere `i` is None.
    """

    start: int | Array
    n: int
    i: Array | None = None
    p: Array | None = None
    real: Array | None = None

    def tile(self, call: SoftmaxInputs, j0: int, m: int) -> Pairs:
        """Pairs with all keys of a range."""
        if self.i is None:
            return TilePairs(self.start, self.n, j0, m, call.offset, xp=call.xp, device=call.device)
        j = call.xp.reshape(call.xp.arange(m, device=call.device), (1, m)) + j0
        return self.picked(call, j)

    def picked(self, call: SoftmaxInputs, j: Array) -> PickedPairs:
        """Pairs with keys `j` (..., Hkv, G, n | 1, m) of their own."""
        xp, i, p = call.xp, self.i, self.p
        if i is None or p is None:
            i = xp.reshape(xp.arange(self.n, device=call.device), (self.n, 1)) + self.start
            p = i + call.offset
            i = xp.minimum(i, xp.full_like(i, max(call.lengths[0] - 1, 0)))
        return PickedPairs(i, j, p, xp=xp, device=call.device)

    def visible(self, call: SoftmaxInputs, pairs: Pairs) -> Array:
        """Which of the pairs are visible."""
        if call.pattern is None:
            seen = pairs.j == pairs.j
            seen = seen & (pairs.p == pairs.p)
        else:
            seen = call.pattern.visible(pairs)
        return seen if self.real is None else seen & self.real


# -- The best of a row ------------------------------------------------------------------------


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


# -- What stands for a block ------------------------------------------------------------------


def seen_by_any(call: SoftmaxInputs, nq: int) -> Array | None:
    """
    Whether any of `nq` queries sees each key, (..., Hkv | 1, G | 1, 1, Nk).

    None where all are seen.
    """
    xp, nk = call.xp, call.lengths[1]
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


def guides(call: SoftmaxInputs, choice: Choice) -> Array | None:
    """
    What queries are held against to score blocks, (..., Hkv, G | 1, nb, width).

    Made of each block's finite keys that some query sees: for "mean" their sum, and how many
    they are in one more column, for "bound" their largest and their smallest number in each
    channel, one after the other.
    One key that is not finite would else decide where everyone searches, also those who do
    not see it.
    """
    if choice.score not in ("mean", "bound") or not choice.route:
        return None
    xp, nk, size = call.xp, call.lengths[1], choice.block
    k = fold.enter(call, call.k)[..., None, :, :]
    seen = seen_by_any(call, choice.queries)
    if seen is None:
        seen = xp.ones((1, nk), dtype=xp.bool, device=call.device)
    seen = xp.matrix_transpose(seen) & xp.all(xp.isfinite(k), axis=-1, keepdims=True)
    counts = xp.sum(blocked(xp.astype(seen, call.acc), size, axis=-2, xp=xp), axis=-2)
    if choice.score == "mean":
        kept = xp.where(seen, k, xp.zeros_like(k))
        totals = xp.sum(blocked(kept, size, axis=-2, xp=xp), axis=-2)
        return xp.concat([totals, xp.maximum(counts, xp.ones_like(counts))], axis=-1)
    inf = xp.asarray(math.inf, dtype=k.dtype, device=loops.device_of(k))
    parts = []
    for extreme, fill in ((xp.max, -math.inf), (xp.min, math.inf)):
        kept = blocked(xp.where(seen, k, inf * fill), size, axis=-2, xp=xp, fill=fill)
        found = extreme(kept, axis=-2)
        parts.append(xp.where(counts > 0, found, xp.zeros_like(found)))
    return xp.concat(parts, axis=-1)


def blocked(x: Array, size: int, *, axis: int, xp: Namespace, fill: float = 0.0) -> Array:
    """Split `axis` (negative) in two, (blocks, size), the last block filled up."""
    at = x.ndim + axis
    missing = -x.shape[at] % size
    if missing:
        shape = (*x.shape[:at], missing, *x.shape[at + 1 :])
        value = xp.asarray(fill, dtype=x.dtype, device=loops.device_of(x))
        x = xp.concat([x, xp.broadcast_to(value, shape)], axis=at)
    return xp.reshape(x, (*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :]))


# -- Scores of blocks -------------------------------------------------------------------------


def block_scores(
    call: SoftmaxInputs,
    choice: Choice,
    guide: Array | None,
    q: Array,
    rows: Rows,
    finite: bool | None,
) -> Array:
    """
    Scores of all blocks for each query ``q (..., Hkv, G, n, D)``: (..., Hkv, G, n, nb).

    Those by guides are sums, and have still to be `scaled`.
    """
    xp, given = call.xp, call.block_scores
    if choice.score == "best":
        return _best_scores(call, choice, q, rows, finite)
    if guide is None or given is not None:
        blocks = xp.reshape(xp.arange(given.shape[-1], device=call.device), (1, -1))  # type: ignore[union-attr]
        return fold.enter(call, rows.picked(call, blocks).of_pairs(given))
    if choice.score == "bound":
        q = q if call.scale >= 0 else -q
        zero = xp.zeros_like(q)
        q = xp.concat([xp.maximum(q, zero), xp.minimum(q, zero)], axis=-1)
    keys = guide[..., : q.shape[-1]]
    if guide.shape[-3] == 1:
        return group_matmul(q, xp.matrix_transpose(xp.squeeze(keys, axis=-3)), xp=xp)
    return xp.matmul(q, xp.matrix_transpose(keys))


def scaled(s: Array, call: SoftmaxInputs, choice: Choice, guide: Array) -> Array:
    """
    Scores by guides, times the scale, and those by sums over the number of keys.

    This comes last, after sums: products of whole numbers, which it rounds, then tie as they do.
    Of heads that choose together it takes the first one's numbers of keys.
    """
    if choice.score == "bound":
        return s * abs(call.scale)
    counts = call.xp.matrix_transpose(guide[..., -1:])
    return s / (counts[..., :1, :, :] if choice.per == "group" else counts) * call.scale


def _of_unlike_heads(
    s: Array, one: Array, may: Array, call: SoftmaxInputs, choice: Choice, guide: Array
) -> Array:
    """Scores `scaled` of what all heads of a group choose, where their numbers of keys differ."""
    xp = call.xp
    if choice.score != "mean" or choice.per != "group" or guide.shape[-3] == 1:
        return s
    counts = xp.matrix_transpose(guide[..., -1:])
    alike = xp.all(counts == counts[..., :1, :, :], axis=-3, keepdims=True)
    return xp.where(alike, s, together(one / counts, may, choice, xp=xp)[0] * call.scale)


def _best_scores(
    call: SoftmaxInputs, choice: Choice, q: Array, rows: Rows, finite: bool | None
) -> Array:
    """The highest score in each block of the keys that can be chosen, NaN first."""
    xp, nk = call.xp, call.lengths[1]
    pairs = rows.tile(call, 0, nk)
    s = fold.visible_scores(call, q, fold.enter(call, call.k), pairs, finite, scale=call.scale)
    inf = xp.asarray(math.inf, dtype=s.dtype, device=loops.device_of(s))
    s = xp.where(elsewhere(call, choice, rows, pairs), xp.where(xp.isnan(s), inf, s), -inf)
    return xp.max(blocked(s, choice.block, axis=-1, xp=xp, fill=-math.inf), axis=-1)


def elsewhere(call: SoftmaxInputs, choice: Choice, rows: Rows, pairs: Pairs) -> Array:
    """Which pairs can be chosen: visible, not of the own block, not seen always."""
    own = own_block(pairs.p, choice, call.lengths[1], xp=call.xp) == pairs.j // choice.block
    free = rows.visible(call, pairs) & ~own
    return free if call.always is None else free & ~call.always.visible(pairs)


def holds(call: SoftmaxInputs, choice: Choice, rows: Rows) -> Array:
    """Which blocks each query can choose: those with a key that it can choose."""
    xp, nk, size = call.xp, call.lengths[1], choice.block
    first = rows.tile(call, 0, 1)
    block = xp.reshape(
        xp.arange(-(-nk // size), dtype=first.p.dtype, device=call.device), (1, -(-nk // size))
    )
    everything = (None, None)
    seen = everything if call.pattern is None else call.pattern.key_span(first)
    taken = everything if call.always is None else call.always.key_span(first)
    if seen is None or taken is None:
        every = rows.tile(call, 0, nk)
        free = elsewhere(call, choice, rows, every)
        free = xp.broadcast_to(free, (*free.shape[:-2], rows.n, nk))
        return xp.any(blocked(free, size, axis=-1, xp=xp), axis=-1)
    lo, hi = block * size, xp.minimum((block + 1) * size, xp.full_like(block, nk))
    lo, hi = _within((lo, hi), seen, xp)
    left = hi - lo
    if call.always is not None:
        a, b = _within((lo, hi), taken, xp)
        left = left - xp.maximum(b - a, xp.zeros_like(b - a))
    free = (left > 0) & (block != own_block(first.p, choice, nk, xp=xp))
    return free if rows.real is None else free & rows.real


def _within(span: tuple[Array, Array], by: tuple[Array, Array], xp: Namespace) -> tuple[Array, ...]:
    """What two intervals have in common; open ends of the second are None."""
    (lo, hi), (a, b) = span, by
    lo = lo if a is None else xp.maximum(*_alike(lo, a, xp))
    hi = hi if b is None else xp.minimum(*_alike(hi, b, xp))
    return lo, hi


def _alike(x: Array, y: Array | int, xp: Namespace) -> tuple[Array, Array]:
    return x, xp.full_like(x, y) if isinstance(y, int) else xp.astype(y, x.dtype, copy=False)


# -- Choosing together ------------------------------------------------------------------------


def together(s: Array, may: Array, choice: Choice, *, xp: Namespace) -> tuple[Array, Array]:
    """
    Scores (..., Hkv, G, n, m) summed over those who choose together and `may` choose.

    And whether any of them may: of shapes (..., Hkv, G | 1, n | n / block, m).
    """
    shape = np.broadcast_shapes(tuple(s.shape), tuple(may.shape))
    s, may = xp.broadcast_to(s, shape), xp.broadcast_to(may, shape)
    if choice.per == "query":
        return s, may
    s = xp.where(may, s, xp.zeros_like(s))
    if choice.per == "group":
        return xp.sum(s, axis=-3, keepdims=True), xp.any(may, axis=-3, keepdims=True)
    rows = (*shape[:-2], shape[-2] // choice.block, choice.block, shape[-1])
    s, may = xp.reshape(s, rows), xp.reshape(may, rows)
    return xp.sum(s, axis=-2), xp.any(may, axis=-2)


def each(x: Array, choice: Choice, shape: tuple[int, ...], *, xp: Namespace) -> Array:
    """What was chosen together, for each of those who chose it: of this shape."""
    if choice.per == "block":
        x = x[..., None, :]
        x = xp.broadcast_to(x, (*x.shape[:-2], choice.block, x.shape[-1]))
        x = xp.reshape(x, (*x.shape[:-3], x.shape[-3] * choice.block, x.shape[-1]))
    return xp.broadcast_to(x, shape)


def choose_blocks(
    call: SoftmaxInputs,
    choice: Choice,
    guide: Array | None,
    q: Array,
    rows: Rows,
    finite: bool | None,
    may: Array | None = None,
) -> Array:
    """
    The blocks that are taken or searched, ascending, padded with the number of blocks.

    Ids (..., Hkv, G | 1, n | n / block, route): a row for those who choose together. `may` is
    what `holds` gives, where that is known.
    """
    xp = call.xp
    may = holds(call, choice, rows) if may is None else may
    nb = may.shape[-1]
    s = _for_all(call, choice, rows) if choice.score == "given" else None
    if s is None:
        one, of = block_scores(call, choice, guide, q, rows, finite), may
        s, may = together(one, of, choice, xp=xp)
        if guide is not None:
            s = scaled(s, call, choice, guide)
            s = _of_unlike_heads(s, one, of, call, choice, guide)
    else:
        shape = (*call.batch, *call.heads, rows.n, nb)
        _, may = together(xp.zeros(shape, dtype=s.dtype, device=call.device), may, choice, xp=xp)
        s = xp.broadcast_to(fold.enter(call, s), may.shape)
    return best_indices(s, may & ~(s == -math.inf), choice.route, nb, xp=xp)


def _for_all(call: SoftmaxInputs, choice: Choice, rows: Rows) -> Array | None:
    """The caller's scores of blocks, where there is one row for all who choose together."""
    s: Array = call.block_scores
    if choice.per == "group" and s.shape[-3] == 1:
        if s.shape[-2] == 1:
            return s
        blocks = call.xp.reshape(call.xp.arange(s.shape[-1], device=call.device), (1, -1))
        return rows.picked(call, blocks).of_pairs(s)
    if choice.per == "block" and s.shape[-2] in (1, choice.query_blocks):
        return take_range(
            s, rows.start // choice.block, rows.n // choice.block, axis=-2, xp=call.xp
        )
    return None


def best_indices(s: Array, may: Array, k: int, none: int, *, xp: Namespace) -> Array:
    """Where the `k` highest scores of each row are, ascending, then `none`; ties as `top_mask`."""
    if k <= FEW and loops.schedule(xp) == "threads":
        return _best_few(s, may, k, none)
    chosen = top_mask(s, may, k, xp=xp)
    index = xp.reshape(xp.arange(s.shape[-1], device=loops.device_of(s)), (1, s.shape[-1]))
    return smallest(index, chosen, k, none, xp=xp)


def _best_few(s: Array, may: Array, k: int, none: int) -> Array:
    """The same for NumPy: what reaches the `k`-th of a row, found by sorting it."""
    if k == 0:
        return np.empty((*may.shape[:-1], 0), np.int64)
    m = s.shape[-1]
    s = np.where(may, s, -math.inf).reshape(-1, m).astype(s.dtype, copy=False)
    if np.isnan(s.sum()):
        s[np.isnan(s)] = math.inf
    # Columns behind the last stand for what a row has too few of.
    chosen = np.zeros((len(s), m + k), bool)
    bound = np.maximum(kth_largest(s.copy(), k), np.finfo(s.dtype).min)
    np.greater_equal(s, bound[:, None], out=chosen[:, :m])
    count = np.count_nonzero(chosen, axis=-1)
    for r in np.flatnonzero(count > k).tolist():  # ties: the first ones
        above = s[r] > bound[r]
        tied = chosen[r, :m] & ~above
        chosen[r, :m] = above | (tied & (np.cumsum(tied) <= k - np.count_nonzero(above)))
    chosen[:, m:] = np.arange(k) < (k - count)[:, None]
    found = np.flatnonzero(chosen).reshape(-1, k) % (m + k)
    return np.where(found < m, found, none).reshape(*may.shape[:-1], k)


def smallest(index: Array, chosen: Array, k: int, none: int, *, xp: Namespace) -> Array:
    """The indices that are chosen, at most `k`, ascending, then `none`, which is above all."""
    left = xp.where(chosen, none - index, xp.zeros_like(index))
    found = loops.largest(left, min(k, left.shape[-1]), xp=xp)
    missing = k - found.shape[-1]
    if missing > 0:
        pad = xp.zeros(
            (*found.shape[:-1], missing), dtype=found.dtype, device=loops.device_of(found)
        )
        found = xp.concat([found, pad], axis=-1)
    return none - found
