"""
Many small heads at once, for NumPy: all of their pairs in one go.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from arrattn._core import online_softmax, threads, workspace
from arrattn._core.fold import enter, finish, fold
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.strips import BUDGET
from arrattn._core.tiles import TilePairs
from arrattn._core.typing import Array

#: Pairs of a head, and keys, up to which many heads are done at once.
SMALL, SMALL_KEYS = 1 << 12, 512


def is_small(call: SoftmaxInputs) -> bool:
    """Whether heads are so small that many are done at once."""
    (_, g), (nq, nk) = call.heads, call.lengths
    plain = call.pattern is None or call.pattern.uniform
    fits = g * nq * nk <= SMALL and nk <= SMALL_KEYS
    return fits and plain and call.bias is None and isinstance(call.offset, int)


def small_jobs(call: SoftmaxInputs, out: Array, lse: Array) -> Iterator[Any]:
    """Jobs of many heads each, which write their results where they go."""
    (hkv, g), (nq, nk) = call.heads, call.lengths
    visible = None
    if call.pattern is not None:
        visible = call.pattern.visible(TilePairs(0, nq, 0, nk, call.offset, xp=np, device=None))
    if not call.batch:
        yield partial(_small_job, call, visible, out, lse)
        return
    step = max(1, 4 * BUDGET // (hkv * g * nq * nk))
    for b in np.ndindex(*call.batch[:-1]):
        for start in range(0, call.batch[-1], step):
            at = (*b, slice(start, start + step))
            part = call._replace(
                q=_cut_batch(call.q, at, 4),
                k=_cut_batch(call.k, at, 3),
                v=_cut_batch(call.v, at, 3),
            )
            yield partial(_small_job, part, visible, out[at], lse[at])


def _cut_batch(x: Array, at: tuple[Any, ...], trailing: int) -> Array:
    lead = x.shape[: x.ndim - trailing]
    own = at[len(at) - len(lead) :]
    return x[
        tuple(
            (slice(None) if isinstance(i, slice) else 0) if n == 1 else i
            for n, i in zip(lead, own, strict=True)
        )
    ]


def _small_job(call: SoftmaxInputs, visible: Array | None, out: Array, lse: Array) -> None:
    finite = True if visible is None else None
    state = None
    if call.sinks is not None:
        state = online_softmax.empty(np.zeros(out.shape, call.acc), call.sinks, xp=np)
    q = enter(call, call.q, scale=call.scale)
    state = fold(call, state, q, call.k, call.v, None, visible=visible, finite=finite)
    out[...], lse[...] = finish(call, state)


def at_once(q: Array, k: Array, v: Array) -> Array | None:
    """
    Attention of few NumPy arrays with no options, checked and computed in one go.

    None where the arrays are not plainly right and small, for the door to say what they are.
    It does what `_small_job` does, operation by operation.
    """
    if not (type(q) is type(k) is type(v) is np.ndarray and q.dtype == k.dtype == v.dtype):
        return None
    if q.dtype not in _EXACT or q.ndim < 3 or q.shape[:-2] != k.shape[:-2] or q.size == 0:
        return None
    (nq, d), nk = q.shape[-2:], k.shape[-2]
    if k.shape[-1] != d or v.shape[:-1] != k.shape[:-1] or v.size == 0:
        return None
    products = nq * nk * max(d, v.shape[-1])
    if nq * nk > SMALL or nk > SMALL_KEYS or products > threads.SMALL or q.size * nk > 4 * BUDGET:
        return None
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        s = workspace.product(q * d**-0.5, k.mT, "scores", xp=np)
        top = s.max(axis=-1, keepdims=True)
        if not np.isfinite(top).all():
            return None
        p = workspace.exp_shifted(s, top, xp=np)
        total = workspace.row_sums(p, xp=np)
        return np.divide(np.matmul(p, v), total)


_EXACT = (np.dtype(np.float32), np.dtype(np.float64))
