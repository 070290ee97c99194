"""Cutting arrays into tiles, and the products of a tile that must not leak."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from arrattn._core import loops, workspace
from arrattn._core.typing import Array, Device, Namespace


def take_range(x: Array, start: int | Array, size: int, *, axis: int, xp: Namespace) -> Array:
    """
    `x` from `start` on, `size` long, along `axis` (negative).

    A length-1 axis broadcasts and is left as it is. Under tracing `start` is an array;
    indices past the end then repeat the last entry, for the caller to hide.
    """
    if x.shape[axis] == 1:
        return x
    if isinstance(start, int):
        index = (..., slice(start, start + size)) + (slice(None),) * (-axis - 1)
        return x[index]
    last = x.shape[axis] - 1
    steps = xp.arange(size, dtype=start.dtype, device=loops.device_of(x))
    index = xp.minimum(start + steps, xp.asarray(last, dtype=start.dtype))
    return xp.take(x, index, axis=x.ndim + axis)


def pick_item(x: Array, b: tuple[int, ...], trailing: int) -> Array:
    """Batch item `b` of `x`, whose last `trailing` axes are not batch axes; axes of 1 broadcast."""
    lead = x.shape[: x.ndim - trailing]
    own = b[len(b) - len(lead) :]
    return x[tuple(0 if n == 1 else i for n, i in zip(lead, own, strict=True))]


def gather_last(x: Array, index: Array, *, xp: Namespace) -> Array:
    """
    ``x[..., index]`` with leading axes that broadcast, by one flattened take.

    Parameters
    ----------
    x : array, shape (..., n)
        Its leading axes may be 1 where those of `index` are not.
    index : array of int, shape (..., m)
        Values in ``[0, n)``.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    array, shape (..., m)
        The leading axes are those of `index` and `x`, broadcast.
    """
    lead = x.shape[:-1]
    rows = xp.arange(math.prod(lead), dtype=index.dtype, device=loops.device_of(x))
    flat = xp.reshape(rows, (*lead, 1)) * x.shape[-1] + index
    taken = xp.take(xp.reshape(x, (-1,)), xp.reshape(flat, (-1,)))
    return xp.reshape(taken, flat.shape)


def take_rows(x: Array, i: Array, *, xp: Namespace) -> Array:
    """
    Rows ``i (..., n, 1)`` of ``x (..., N, D)``; leading axes broadcast.
    """
    *lead, n, d = x.shape
    lead = list(np.broadcast_shapes(tuple(lead), tuple(i.shape[:-2])))
    if n == 0:
        return xp.broadcast_to(x[..., :0, :], (*lead, 0, d))
    x = xp.reshape(xp.broadcast_to(x, (*lead, n, d)), (math.prod(lead) * n, d))
    lanes = xp.arange(math.prod(lead), dtype=i.dtype, device=loops.device_of(x))
    rows = xp.reshape(lanes, (*lead, 1, 1)) * n + i
    return xp.reshape(xp.take(x, xp.reshape(rows, (-1,)), axis=0), (*lead, i.shape[-2], d))


def whole_tiles(x: Array, size: int, xp: Namespace) -> Array:
    """``(..., N, D)``, padded with zeros to a multiple of `size` rows."""
    missing = -x.shape[-2] % size
    if not missing:
        return x
    pad = xp.zeros((*x.shape[:-2], missing, x.shape[-1]), dtype=x.dtype)
    return xp.concat([x, pad], axis=-2)


def stack_tiles(x: Array, size: int, xp: Namespace) -> Array:
    """``(..., N, D)`` as tiles ``(N / size, ..., size, D)``, the last padded with zeros."""
    x = whole_tiles(x, size, xp)
    x = xp.reshape(x, (*x.shape[:-2], x.shape[-2] // size, size, x.shape[-1]))
    return xp.moveaxis(x, -3, 0)


def unstack_rows(out: Array, lse: Array, nq: int, xp: Namespace) -> tuple[Array, Array]:
    """Tiles of query rows along a first axis, put in their place; padding cut off."""
    out, lse = xp.moveaxis(out, 0, -3), xp.moveaxis(lse, 0, -2)
    n = lse.shape[-2] * lse.shape[-1]
    out = xp.reshape(out, (*out.shape[:-3], n, out.shape[-1]))
    lse = xp.reshape(lse, (*lse.shape[:-2], n))
    return out[..., :nq, :], lse[..., :nq]


class Pairs(Protocol):
    """
    Some (query, key) pairs, as a pattern sees them.

    `p` and `j` are integer arrays that broadcast to ``(..., Hkv, G, nq, nk)``, two head
    axes always. The three methods read the caller's arrays at these pairs.
    """

    p: Array
    j: Array
    xp: Namespace
    device: Device

    def of_batch(self, x: Array) -> Array:
        """``(...)`` over the batch axes -> broadcastable to the pairs."""

    def of_queries(self, x: Array) -> Array:
        """``(..., Nq)`` -> broadcastable to the pairs."""

    def of_keys(self, x: Array) -> Array:
        """``(..., Nk)`` -> broadcastable to the pairs."""

    def of_pairs(self, x: Array) -> Array:
        """``(..., Hkv, G, Nq, Nk)``, any of them 1 -> broadcastable to the pairs."""


class _Rows:
    """What both kinds of pairs share: the queries are a range."""

    def __init__(
        self, i0: int | Array, nq: int, offset: int | Array, *, xp: Namespace, device: Device
    ) -> None:
        self.xp, self.device, self.i0, self.nq = xp, device, i0, nq
        i = xp.reshape(xp.arange(nq, device=device), (nq, 1))
        self.p = i + (i0 + offset)  # (nq, 1) or (..., 1, 1, nq, 1)

    def of_batch(self, x: Array) -> Array:
        return self.xp.reshape(x, (*x.shape, 1, 1, 1, 1))

    def of_queries(self, x: Array) -> Array:
        rows = take_range(x, self.i0, self.nq, axis=-1, xp=self.xp)
        return self.xp.reshape(rows, (*x.shape[:-1], 1, 1, rows.shape[-1], 1))


class TilePairs(_Rows):
    """Every pair of a range of queries and a range of keys."""

    def __init__(
        self,
        i0: int | Array,
        nq: int,
        j0: int | Array,
        nk: int,
        offset: int | Array,
        *,
        xp: Namespace,
        device: Device,
    ) -> None:
        super().__init__(i0, nq, offset, xp=xp, device=device)
        self.j0, self.nk = j0, nk
        self.j = xp.reshape(xp.arange(nk, device=device), (1, nk)) + j0

    def of_keys(self, x: Array) -> Array:
        cols = take_range(x, self.j0, self.nk, axis=-1, xp=self.xp)
        return self.xp.reshape(cols, (*x.shape[:-1], 1, 1, 1, cols.shape[-1]))

    def of_pairs(self, x: Array) -> Array:
        rows = take_range(x, self.i0, self.nq, axis=-2, xp=self.xp)
        return take_range(rows, self.j0, self.nk, axis=-1, xp=self.xp)


class PickedPairs:
    """
    Any pairs: query indices `i` and keys `j`, that broadcast to (..., Hkv, G, nq, m).

    `i` is (nq, 1), or (..., 1, 1, nq, 1) where items of the batch differ; indices are those
    of queries that are there. `p` are their positions.
    """

    def __init__(self, i: Array, j: Array, p: Array, *, xp: Namespace, device: Device) -> None:
        self.i, self.j, self.p, self.xp, self.device = i, j, p, xp, device

    def of_batch(self, x: Array) -> Array:
        """``(...)`` over the batch axes -> broadcastable to the pairs."""
        return self.xp.reshape(x, (*x.shape, 1, 1, 1, 1))

    def of_queries(self, x: Array) -> Array:
        """``(..., Nq)`` -> broadcastable to the pairs."""
        lifted = self.xp.reshape(x, (*x.shape[:-1], 1, 1, 1, x.shape[-1]))
        return gather_last(lifted, self.i, xp=self.xp)

    def of_keys(self, x: Array) -> Array:
        """``(..., Nk)`` -> broadcastable to the pairs."""
        lifted = self.xp.reshape(x, (*x.shape[:-1], 1, 1, 1, x.shape[-1]))
        return gather_last(lifted, self.j, xp=self.xp)

    def of_pairs(self, x: Array) -> Array:
        """``(..., Hkv, G, Nq, Nk)``, any of them 1 -> broadcastable to the pairs."""
        *lead, rows, columns = x.shape
        index = self.xp.zeros_like(self.i) if rows == 1 else self.i * columns
        index = index + (self.xp.zeros_like(self.j[..., :1]) if columns == 1 else self.j)
        flat = self.xp.reshape(x, (*lead, 1, rows * columns))
        return gather_last(flat, index, xp=self.xp)


def group_matmul(rows: Array, keys: Array, *, xp: Namespace, slot: str | None = None) -> Array:
    """
    ``(..., Hkv, G, n, d) @ (..., Hkv, d, m)``: one product per key head, no key repeated.

    With a `slot` it is short-lived: see `workspace.product`.
    """
    *lead, g, n, d = rows.shape
    rows = xp.reshape(rows, (*lead, g * n, d))
    out = xp.matmul(rows, keys) if slot is None else workspace.product(rows, keys, slot, xp=xp)
    return xp.reshape(out, (*out.shape[:-2], g, n, out.shape[-1]))


def weigh(
    p: Array,
    v: Array,
    visible: Array | None,
    *,
    xp: Namespace,
    finite: bool | None = None,
    slot: str | None = None,
) -> Array:
    """
    Sum the values with weights `p`, so that no hidden value is ever multiplied.

    A weight of 0 does not stop a NaN, so non-finite values are taken out of the product;
    rows that do see one are made NaN, in that channel, afterwards.

    Parameters
    ----------
    p : array, shape (..., Hkv, G, nq, nk)
        Weights, 0 where hidden.
    v : array, shape (..., Hkv, nk, Dv)
        Values, of the dtype of `p`.
    visible : array of bool or None
        Broadcastable to the shape of `p`; None where every pair is visible.
    xp : namespace
        The arrays' namespace.
    finite : bool, optional
        Whether all of `v` is known to be finite; None when it is not known.
    slot : str, optional
        For a result that is used up at once: see `workspace.product`.

    Returns
    -------
    array, shape (..., Hkv, G, nq, Dv)
        The weighted sums.
    """
    if visible is None or finite:
        return group_matmul(p, v, xp=xp, slot=slot)
    bad = ~xp.isfinite(v)
    out = group_matmul(p, xp.where(bad, xp.zeros_like(v), v), xp=xp, slot=slot)
    nan = xp.asarray(math.nan, dtype=out.dtype, device=loops.device_of(out))
    return xp.where(sees(visible, bad, like=out, nk=p.shape[-1], xp=xp), nan, out)


def sees(visible: Array, bad: Array, *, like: Array, nk: int, xp: Namespace) -> Array:
    """
    In which channels each row sees a value that is `bad`.

    Parameters
    ----------
    visible : array of bool
        Broadcastable to (..., Hkv, G, nq, nk).
    bad : array of bool, shape (..., Hkv, nk, Dv)
        Which values are bad.
    like : array, shape (..., Hkv, G, nq, Dv)
        Something of the shape of the result, and of a floating dtype to count in.
    nk : int
        Number of keys.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    array of bool, shape (..., Hkv, G, nq, Dv)
        True where at least one is seen.
    """

    def count(visible: Array, bad: Array) -> Array:
        return hits(visible, bad, like=like, nk=nk, xp=xp)

    def none(visible: Array, bad: Array) -> Array:
        del visible, bad
        return xp.zeros(like.shape, dtype=xp.bool, device=loops.device_of(like))

    return loops.cond(xp.any(bad), count, none, visible, bad, xp=xp)


def hits(visible: Array, bad: Array, *, like: Array, nk: int, xp: Namespace) -> Array:
    """What `sees` says, by a product in any case."""
    pairs = xp.astype(xp.broadcast_to(visible, (*like.shape[:-1], nk)), like.dtype)
    return group_matmul(pairs, xp.astype(bad, like.dtype), xp=xp) > 0
