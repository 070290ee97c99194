"""
Products of many rows with few blocks, each row with blocks of its own choice.

Rows that chose the same block are sorted next to each other and padded to whole chunks, so
that all products are one batched `matmul` of static shape: no loop over rows or blocks, and
the same code where shapes must be known before values (tracing, lazy graphs).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from arrattn._core import loops
from arrattn._core.typing import Array, Namespace


class Grouping(NamedTuple):
    """
    Where each (row, choice) pair of `ids` goes: a slot of a chunk that has one block.

    With P pairs in all and S slots in chunks of C: `slot_pair` (S,) is the pair in each slot
    (any, where the slot is padding), `chunk_block` (S / C,) the block of each chunk,
    `pair_slot` (P,) the slot of each pair.
    """

    slot_pair: Array
    chunk_block: Array
    pair_slot: Array
    chunk: int


class Shared(NamedTuple):
    """Choices of units of `rows` consecutive rows: `ids` (units, n), counted through all lanes."""

    ids: Array
    rows: int


def share(ids: Array, n_blocks: int, rows: int, *, xp: Namespace) -> Shared:
    """
    Choices ``ids (lanes, all rows, n)`` that are alike for every `rows` of them.

    A row without a choice has `n_blocks`; what it is then given means nothing.
    """
    lanes, many, n = ids.shape
    units = xp.min(xp.reshape(ids, (lanes, many // rows, rows, n)), axis=-2)
    lane = xp.arange(lanes, dtype=ids.dtype, device=loops.device_of(ids))
    units = xp.where(units == n_blocks, xp.zeros_like(units), units)
    units = units + xp.reshape(lane, (lanes, 1, 1)) * n_blocks
    return Shared(xp.reshape(units, (-1, n)), rows)


def group(ids: Array, n_blocks: int, *, xp: Namespace) -> Grouping:
    """
    Sort pairs by the block they chose.

    Parameters
    ----------
    ids : array of int, shape (lanes, pairs)
        The block of each pair, in ``[0, n_blocks)``.
    n_blocks : int
        Blocks in each lane; lanes have blocks of their own.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    Grouping
        With blocks counted through all lanes.
    """
    lanes, pairs = ids.shape
    total, groups = lanes * pairs, lanes * n_blocks
    chunk = _chunk_size(total, groups)
    device = loops.device_of(ids)

    def count(n: int) -> Array:
        return xp.arange(n, dtype=ids.dtype, device=device)

    flat = xp.reshape(ids + xp.reshape(count(lanes), (lanes, 1)) * n_blocks, (total,))
    order, place = loops.order_by(flat, groups, xp=xp)
    edges = _search(xp.take(flat, order, axis=0), count(groups + 1), "left", ids.dtype, xp)
    starts, sizes = edges[:-1], edges[1:] - edges[:-1]
    chunks = (sizes + (chunk - 1)) // chunk
    ends = xp.astype(xp.cumulative_sum(chunks), ids.dtype, copy=False)
    # Each group wastes less than one chunk, so this many always suffice.
    n_chunks = total // chunk + min(groups, total)
    block = xp.minimum(
        _search(ends, count(n_chunks), "right", ids.dtype, xp),
        xp.asarray(groups - 1, dtype=ids.dtype, device=device),
    )
    first = (ends - chunks) * chunk  # first slot of each group
    block_of_slot = xp.reshape(
        xp.broadcast_to(xp.reshape(block, (n_chunks, 1)), (n_chunks, chunk)), (-1,)
    )
    rank = count(n_chunks * chunk) - xp.take(first, block_of_slot, axis=0)
    source = xp.take(starts, block_of_slot, axis=0) + rank
    last = xp.asarray(total - 1, dtype=ids.dtype, device=device)
    slot_pair = xp.take(order, xp.minimum(source, last), axis=0)
    pair_slot = place + xp.take(first - starts, flat, axis=0)
    return Grouping(slot_pair, block, pair_slot, chunk)


def _chunk_size(total: int, groups: int) -> int:
    """A power of two near half the mean number of pairs per block, from 8 to 128."""
    mean = max(total // max(groups, 1), 1)
    return min(max(1 << (mean.bit_length() - 2) if mean > 1 else 1, 8), 128)


def _search(edges: Array, x: Array, side: str, dtype: object, xp: Namespace) -> Array:
    return xp.astype(xp.searchsorted(edges, x, side=side), dtype, copy=False)


def grouped_matmul(
    rows: Array, blocks: Array, at: Grouping | Shared, *, per_row: int, xp: Namespace
) -> Array:
    """
    ``rows[pair // per_row] @ blocks[ids[pair]]`` for every pair.

    Parameters
    ----------
    rows : array, shape (lanes * pairs / per_row, n)
        One row for each `per_row` pairs.
    blocks : array, shape (lanes * n_blocks, n, m)
        The blocks of all lanes.
    at : Grouping or Shared
        Of the pairs' choices.
    per_row : int
        Consecutive pairs that share a row.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    array, shape (lanes * pairs, m)
        A row for each pair.
    """
    if isinstance(at, Shared):
        return _shared_matmul(rows, blocks, at, per_row=per_row, xp=xp)
    sources = at.slot_pair // per_row if per_row > 1 else at.slot_pair
    padded = xp.reshape(
        xp.take(rows, sources, axis=0), (at.chunk_block.shape[0], at.chunk, rows.shape[-1])
    )
    chosen = xp.take(blocks, at.chunk_block, axis=0)
    products = xp.matmul(padded, chosen)
    flat = xp.reshape(products, (math.prod(products.shape[:2]), products.shape[-1]))
    return xp.take(flat, at.pair_slot, axis=0)


def _shared_matmul(rows: Array, blocks: Array, at: Shared, *, per_row: int, xp: Namespace) -> Array:
    """`grouped_matmul` where neighbours chose together: a batch of products as they lie."""
    units, n = at.ids.shape
    chosen = xp.take(blocks, xp.reshape(at.ids, (-1,)), axis=0)
    chosen = xp.reshape(chosen, (units, n, *blocks.shape[1:]))
    rows = xp.reshape(rows, (units, at.rows, n // per_row, rows.shape[-1]))
    products = xp.matmul(xp.moveaxis(rows, 2, 1), chosen)  # (units, n, rows, m)
    products = xp.moveaxis(products, 1, 2)
    return xp.reshape(products, (math.prod(products.shape[:-1]), products.shape[-1]))
