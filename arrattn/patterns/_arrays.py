"""Patterns made of a caller's arrays, or of a caller's function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from arrattn._core import loops
from arrattn._core.tiles import Pairs
from arrattn._core.typing import Array
from arrattn.patterns._base import (
    NO_EDGES,
    Bools,
    Edges,
    Pattern,
    Rectangles,
    brief,
    dtype_name,
    is_array,
    keep,
    read_int,
)


class Segments(Pattern):
    """
    Query and key in the same segment: ``q_ids[i] == k_ids[j]``, by index.

    Parameters
    ----------
    q_ids : array of int, shape (..., Nq)
        The segment of each query. An id that no key has sees nothing.
    k_ids : array of int, shape (..., Nk)
        The segment of each key.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.patterns import Segments
    >>> ids = np.array([0, 0, 1])
    >>> Segments(ids, ids).table(3, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """

    trailing: ClassVar[int] = 1
    q_ids: Array
    k_ids: Array

    def __init__(self, q_ids: Array, k_ids: Array) -> None:
        for name, ids in (("q_ids", q_ids), ("k_ids", k_ids)):
            require_integers(name, ids)
            if ids.ndim == 0:
                msg = f"{name}: expected shape (..., N), got a 0-dimensional array"
                raise ValueError(msg)
        keep(self, q_ids=q_ids, k_ids=k_ids)

    def edges(self, nk: int, at: int) -> Edges:
        del nk, at
        return Edges(*(_changes(loops.host_values(ids)) for ids in (self.q_ids, self.k_ids)))

    def visible(self, pairs: Pairs) -> Array:
        def whole(ids: Array) -> Array:
            return pairs.xp.astype(ids, pairs.j.dtype, copy=False)

        return whole(pairs.of_queries(self.q_ids)) == whole(pairs.of_keys(self.k_ids))

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        q_ids, k_ids = loops.host_values(self.q_ids), loops.host_values(self.k_ids)
        if q_ids is None or k_ids is None:
            return np.True_, np.False_
        q_lo, q_hi = extremes(q_ids, at.i0, at.i1)
        k_lo, k_hi = extremes(k_ids, at.j0, at.j1)
        q_lo, q_hi = q_lo[..., :, None], q_hi[..., :, None]
        k_lo, k_hi = k_lo[..., None, :], k_hi[..., None, :]
        same = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
        return (q_lo <= k_hi) & (k_lo <= q_hi), same

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        out = []
        for name, ids, n in (("query", self.q_ids, nq), ("key", self.k_ids, nk)):
            if ids.shape[-1] != n:
                out.append(
                    f"segment ids: expected one per {name}, shape (..., {n}), "
                    f"got shape {tuple(ids.shape)}"
                )
            else:
                out += batch_problem(f"segment ids of the {name} side", ids.shape[:-1], batch)
        return out


class Blocks(Pattern):
    """
    A table over blocks of positions: ``table[p // size, j // size]``.

    Parameters
    ----------
    table : array of bool, shape (query blocks, key blocks)
        Which key blocks each query block sees. A position outside the table sees nothing
        and is not seen.
    size : int
        Positions per block, at least 1.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.patterns import Blocks
    >>> Blocks(np.array([[True, False], [True, True]]), 2).table(4, 4).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 1],
           [1, 1, 1, 1]])
    """

    trailing: ClassVar[int] = 2
    block_table: Array
    size: int

    def __init__(self, table: Array, size: int) -> None:
        if not is_array(table) or dtype_name(table) != "bool" or table.ndim != 2:
            msg = f"table: expected a 2-dimensional array of bool, got {brief(table)}"
            raise TypeError(msg)
        keep(self, block_table=table, size=read_int(self, "size", size, low=1))

    def edges(self, nk: int, at: int) -> Edges:
        del at
        return every_so_many(self.size, min(nk, self.block_table.shape[1] * self.size))

    def visible(self, pairs: Pairs) -> Array:
        xp, (rows, cols) = pairs.xp, self.block_table.shape
        r, c = pairs.p // self.size, pairs.j // self.size
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < cols)
        if rows * cols == 0:
            return inside
        at = xp.where(inside, r * cols + c, xp.zeros_like(r * cols + c))
        flat = xp.reshape(self.block_table, (-1,))
        return inside & xp.reshape(xp.take(flat, xp.reshape(at, (-1,)), axis=0), at.shape)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        table = loops.host_values(self.block_table)
        if table is None:
            return np.True_, np.False_
        rows, cols = table.shape
        r0, r1 = np.clip(at.p0 // self.size, 0, rows), np.clip(-(-at.p1 // self.size), 0, rows)
        c0, c1 = np.clip(at.j0 // self.size, 0, cols), np.clip(-(-at.j1 // self.size), 0, cols)
        if all(x.size == 1 for x in (r0, c0)):
            count = np.count_nonzero(table[r0.item() : r1.item(), c0.item() : c1.item()])
        else:
            sums = np.zeros((rows + 1, cols + 1), np.int64)
            sums[1:, 1:] = table.cumsum(0).cumsum(1)
            count = sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0]
        inside = (at.p0 >= 0) & (at.p1 <= rows * self.size) & (at.j1 <= cols * self.size)
        return count > 0, inside & (count == (r1 - r0) * (c1 - c0))


class Where(Pattern):
    """
    Any rule of yours: ``fn(p, j) -> array of bool``.

    No tile can be skipped on its account; combine it with a pattern that can.

    Parameters
    ----------
    fn : callable
        Takes integer arrays of positions that broadcast together, gives a boolean array
        that broadcasts to their common shape. Under JAX it is traced: it must depend on
        nothing else that changes.

    Examples
    --------
    >>> from arrattn.patterns import Causal, Where
    >>> (Causal() & Where(lambda p, j: j % 2 == 0)).table(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 0, 0],
           [1, 0, 1]])
    """

    fn: Callable[[Array, Array], Array]

    def __init__(self, fn: Callable[[Array, Array], Array]) -> None:
        if not callable(fn):
            msg = f"fn: expected a callable fn(p, j), got {type(fn).__name__}"
            raise TypeError(msg)
        keep(self, fn=fn)

    @property
    def uniform(self) -> bool:
        return False  # what a caller's function depends on is not ours to know

    def __repr__(self) -> str:
        return f"Where({getattr(self.fn, '__name__', self.fn)})"

    def visible(self, pairs: Pairs) -> Array:
        seen = self.fn(pairs.p, pairs.j)
        if not is_array(seen) or dtype_name(seen) != "bool":
            msg = f"Where: fn(p, j) must return an array of bool, got {brief(seen)}"
            raise TypeError(msg)
        return seen


class Masked(Pattern):
    """A caller's own boolean mask, ``(..., Hkv, G, Nq, Nk)``, any axis 1. Not public."""

    trailing: ClassVar[int] = 4
    mask: Array

    def __init__(self, mask: Array) -> None:
        keep(self, mask=mask)

    def visible(self, pairs: Pairs) -> Array:
        return pairs.of_pairs(self.mask)


class Unforbidden(Pattern):
    """Where a bias, shaped as `Masked`'s mask, is not ``-inf``. Not public."""

    trailing: ClassVar[int] = 4
    bias: Array

    def __init__(self, bias: Array) -> None:
        keep(self, bias=bias)

    def visible(self, pairs: Pairs) -> Array:
        return pairs.of_pairs(self.bias) != -float("inf")


def _changes(ids: Any) -> tuple[int, ...]:
    """Where ids differ from those before, if that is rare."""
    if ids is None or ids.ndim > 1:
        return ()
    found = np.flatnonzero(ids[1:] != ids[:-1]) + 1
    return tuple(found.tolist()) if len(found) < len(ids) // 16 else ()


def require_integers(name: str, x: object) -> None:
    """Refuse what is not an array of integers."""
    if not is_array(x) or "int" not in dtype_name(x):
        msg = f"{name}: expected an array of integers, got {brief(x)}"
        raise TypeError(msg)


def batch_problem(name: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> list[str]:
    """What is wrong with leading axes that should broadcast to the batch axes."""
    try:
        fits = np.broadcast_shapes(shape, batch) == batch
    except ValueError:
        fits = False
    if fits:
        return []
    return [f"{name}: leading axes {tuple(shape)} do not broadcast to the batch axes {batch}"]


def every_so_many(size: int, stop: int) -> Edges:
    """Keys at multiples of `size`, up to and with `stop`; none where they are close."""
    return NO_EDGES if size < 16 else Edges(keys=(*range(size, stop, size), stop))


def extremes(ids: Any, start: Any, stop: Any) -> tuple[Any, Any]:
    """Smallest and largest id in each range ``start:stop`` of the last axis, none empty."""
    if np.size(start) == 0:
        return np.zeros((*ids.shape[:-1], 0), ids.dtype), np.zeros((*ids.shape[:-1], 0), ids.dtype)
    ends = np.minimum(np.stack([np.ravel(start), np.ravel(stop)], -1).ravel(), ids.shape[-1])
    # One more number, so that a range may end behind the last, or lie there.
    ids = np.concatenate([ids, ids[..., -1:]], axis=-1)
    lo, hi = (f.reduceat(ids, ends, axis=-1)[..., ::2] for f in (np.minimum, np.maximum))
    return lo, hi
