"""What the equations share: heads, positions, who sees whom, sums that do not leak."""

import math
from typing import Any

import array_api_compat as compat
import numpy as np

Array = Any  # an array of the standard, of whichever library
Namespace = Any


def read(q: Array, k: Array, v: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Give every array a head axis, the batch axes of all, and at least float32."""
    wide = xp.float64 if q.dtype == xp.float64 else xp.float32
    arrays = [xp.astype(x[None, :, :] if x.ndim == 2 else x, wide) for x in (q, k, v)]
    batch = np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
    q, k, v = (xp.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays)
    return q, k, v


def device_of(x: Array) -> Any:
    """Give the device to make arrays on beside `x`; None where the library sees to it."""
    placed = compat.is_numpy_array(x) or compat.is_jax_array(x) or compat.is_dask_array(x)
    return None if placed else compat.device(x)


def per_query_head(x: Array, q: Array, xp: Namespace, axis: int = -3) -> Array:
    """Hand every query head what is its key head's: head `h` reads ``h // (Hq // Hkv)``."""
    heads = 1 if q.ndim == 2 else q.shape[-3]
    h = xp.arange(heads, device=device_of(x)) * x.shape[axis] // max(heads, 1)
    return xp.take(x, h, axis=axis)


def positions(nq: int, nk: int, kv_lengths: Any, q_offset: Any, xp: Any, on: Any) -> Array:
    """Compute the positions of the queries, (..., 1, Nq, 1)."""
    i = xp.arange(nq, device=on)
    if q_offset is None and kv_lengths is None:
        q_offset = nk - nq
    if q_offset is None:
        return counts(kv_lengths, i.dtype, xp, on) - nq + i[:, None]
    return counts(q_offset, i.dtype, xp, on) + i[:, None]


def counts(x: Any, dtype: Any, xp: Namespace, on: Any) -> Array:
    """Make an integer or an array of them over the batch axes (..., 1, 1, 1)."""
    return xp.astype(xp.asarray(x, device=on), dtype)[..., None, None, None]


def visible_pairs(
    shape: tuple[int, ...],
    mask: Array | None,
    bias: Array | None,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    kv_lengths: Any,
    segment_ids: Any,
    pattern: Any,
    q_offset: Any,
    *,
    xp: Namespace,
    on: Any,
) -> Array:
    """Tell who sees whom, (..., Hq, Nq, Nk): whatever is given intersects."""
    nq, nk = shape[-2:]
    p = positions(nq, nk, kv_lengths, q_offset, xp, on)
    j = xp.arange(nk, device=on)
    left, right = (None, None) if window is None else window
    tables = [xp.ones(shape, dtype=xp.bool, device=on)]
    if mask is not None:
        tables.append(mask)
    if bias is not None:
        tables.append(bias != -math.inf)
    if is_causal:
        tables.append(j <= p)
    if left is not None:
        tables.append(p - left <= j)
    if right is not None:
        tables.append(j <= p + right)
    if kv_lengths is not None:
        tables.append(j < counts(kv_lengths, j.dtype, xp, on))
    if segment_ids is not None:
        a, b = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids,) * 2
        tables.append(a[..., None, :, None] == b[..., None, None, :])
    if pattern is not None:
        offset = q_offset
        if offset is None:
            offset = nk - nq if kv_lengths is None else kv_lengths - nq
        tables.append(pattern.table(nq, nk, q_offset=offset, xp=xp, device=on))
    visible = tables[0]
    for table in tables[1:]:
        visible = visible & table
    return visible


def weighted_sum(p: Array, v: Array, visible: Array, xp: Namespace) -> Array:
    """
    Sum ``p_ij v_j`` over `j`, hidden values left out whatever they hold.

    Zero times NaN is NaN, so values that are not finite stay out of the product; rows
    that see one are then spoiled on purpose.
    """
    finite = xp.isfinite(v)
    total = p @ xp.where(finite, v, 0.0)
    spoiled = xp.astype(visible, v.dtype) @ xp.astype(~finite, v.dtype)
    return xp.where(spoiled > 0, math.nan, total)


def ratio(top: Array, total: Array, xp: Namespace) -> Array:
    """Divide by the sum of the weights; a row without weights is 0."""
    return xp.where(total == 0, 0.0, top / xp.where(total == 0, 1.0, total))


def like(out: Array, q: Array, xp: Namespace) -> Array:
    """Give the dtype of `q`, and no head axis where it has none."""
    return xp.astype(out[..., 0, :, :] if q.ndim == 2 else out, q.dtype)
