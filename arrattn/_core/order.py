"""
One sequence in which all that a query may see lies before it.

Queries and keys of segments in any order, or with positions that only arrays know, are
sorted into it; then a recurrence can go through them from front to back. A call comes as its
`recurrence.How` and `recurrence.Operands`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from arrattn._core import loops, tiles
from arrattn._core.typing import Array


class Order(NamedTuple):
    """
    One sequence of T tokens in which all that a query may see lies before it.

    By segment, then position; of two tokens at one position, the key comes first.
    """

    q: Array  # (..., T): the query at each place (any, if it is a key)
    k: Array  # (..., T): the key at each place (any, if it is a query)
    is_key: Array | None  # (..., 1, T): None where every token is both
    ids: Array | None  # (..., T)
    row: Array  # (..., Nq): the place of each query


def own_order(how: Any, x: Any) -> Order:
    """Causal self-attention: each token is query and key at once."""
    ids = _ids_of(how, x.q_ids)
    order = loops.stable_argsort(ids, xp=how.xp)
    row = loops.stable_argsort(order, xp=how.xp)
    return Order(order, order, None, tiles.gather_last(ids, order, xp=how.xp), row)


def merged_order(how: Any, x: Any) -> Order:
    """Queries and keys in one sequence; without causality a segment's keys come first."""
    xp, nq, nk = how.xp, x.q.shape[-2], x.k.shape[-2]
    device = loops.device_of(x.q)
    i, j = xp.arange(nq, device=device), xp.arange(nk, device=device)
    if how.is_causal:
        last = nk if x.lengths is None else xp.astype(x.lengths, i.dtype)[..., None]
        i = 2 * (i + last - nq) + 1  # between the key at its position and the next one
    else:
        i = i + 2 * nk
    i, j = (xp.broadcast_to(n, (*how.batch, n.shape[-1])) for n in (i, 2 * j))
    order = loops.stable_argsort(xp.concat([j, i], axis=-1), xp=xp)
    ids = None
    if x.q_ids is not None:
        ids = xp.concat([_ids_of(how, x.k_ids), _ids_of(how, x.q_ids)], axis=-1)
        ids = tiles.gather_last(ids, order, xp=xp)
        by_segment = loops.stable_argsort(ids, xp=xp)
        order = tiles.gather_last(order, by_segment, xp=xp)
        ids = tiles.gather_last(ids, by_segment, xp=xp)
    row = loops.stable_argsort(order, xp=xp)[..., nk:]
    is_key = order < nk
    zero = xp.zeros_like(order)
    q, k = xp.where(is_key, zero, order - nk), xp.where(is_key, order, zero)
    return Order(q, k, is_key[..., None, :], ids, row)


def _ids_of(how: Any, ids: Array) -> Array:
    """The ids of every item of the batch, in the dtype of indices."""
    whole = how.xp.arange(0).dtype
    return how.xp.broadcast_to(how.xp.astype(ids, whole), (*how.batch, ids.shape[-1]))


def gather_tokens(x: Array, index: Array, how: Any) -> Array:
    """``x (..., heads, N, D)`` at ``index (..., T)``, the same for all heads of an item."""
    heads = x.shape[len(how.batch) : -2]
    *lead, n, d = x.shape
    rows = how.xp.arange(math.prod(lead), dtype=index.dtype, device=loops.device_of(index))
    index = how.xp.reshape(index, (*how.batch, *(1 for _ in heads), index.shape[-1]))
    flat = how.xp.reshape(rows, (*lead, 1)) * n + index
    flat_x = how.xp.reshape(x, (math.prod(lead) * n, d))
    taken = how.xp.take(flat_x, how.xp.reshape(flat, (math.prod(flat.shape),)), axis=0)
    return how.xp.reshape(taken, (*flat.shape, d))
