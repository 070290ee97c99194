"""
A few queries that see every key of a range: reading keys and values is what takes the time.

Each key is read once for all queries of its head, many heads at once, so that the
interpreter, which threads take turns in, is asked for little. A long range is cut where no
number of threads or of heads decides, and the parts are merged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import numpy as np

from arrattn._core import online_softmax, threads, workspace
from arrattn._core.fold import enter, finish
from arrattn._core.gather import LOG2E, lowest
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State
from arrattn._core.typing import Array

#: Rows of a head up to which this is worth while.
ROWS = 16

#: Keys of a part, and scores of a job.
PART, TOGETHER = 1 << 13, 1 << 17

#: Scores of one product, which BLAS is fastest at while they are few, and keys of a weighted sum.
SCORES, SUMMED = 1 << 10, 512


class Few:
    """
    One call, or one item of it, whose few queries see the keys ``[j0, j1)`` and no others.

    Parameters
    ----------
    call : SoftmaxInputs
        Without bias and softcap; its pattern is not looked at.
    keys : tuple of (int, int)
        The range.
    out, lse : array, shapes (..., Hkv, G, Nq, Dv) and (..., Hkv, G, Nq)
        Where the results go.
    """

    def __init__(self, call: SoftmaxInputs, keys: tuple[int, int], out: Array, lse: Array) -> None:
        self.call, self.out, self.lse = call, out, lse
        self.parts = [(j, min(j + PART, keys[1])) for j in range(*keys, PART)]
        self.boxes: list[tuple[tuple[Any, ...], list[State | None]]] = []

    def jobs(self) -> Iterator[tuple[int, Callable[[], None]]]:
        """What is to be run, in any order, each with its cost: reading keys is that of `ROWS`."""
        (hkv, g), (nq, _), workers = self.call.heads, self.call.lengths, threads.num_threads()
        longest = max((j1 - j0 for j0, j1 in self.parts), default=1)
        each = -(-math.prod(self.call.batch) * hkv * len(self.parts) // workers)
        lanes = max(1, min(TOGETHER // (g * nq * longest), each))
        for at in _boxes(self.call.batch, self.call.heads[0], lanes):
            q = _cut(self.call.q, at, 4)
            k, v = (_cut(x, at, 3) for x in (self.call.k, self.call.v))
            states: list[State | None] = [None] * len(self.parts)
            self.boxes.append((at, states))
            for n, (j0, j1) in enumerate(self.parts):
                part = (x[..., j0:j1, :] for x in (k, v))
                yield ROWS * lanes * (j1 - j0), partial(self._run, states, n, q, *part)

    def _run(self, states: list[State | None], n: int, q: Array, k: Array, v: Array) -> None:
        call = self.call
        rows = q.reshape(*q.shape[:-3], q.shape[-3] * q.shape[-2], q.shape[-1])
        q, k, v = (enter(call, x) for x in (rows, k, v))
        states[n] = gather(q, k, v, call.scale)

    def finish(self) -> None:
        """Merge the parts and write the results."""
        for at, states in self.boxes:
            out, lse = self.out[at], self.lse[at]
            sinks = self.call.sinks
            if sinks is not None:
                sinks = sinks[at[-1]]
            empty = online_softmax.empty(np.zeros(out.shape, out.dtype), sinks, xp=np)
            parts = (
                State(*(x.reshape(*out.shape[:-1], x.shape[-1]) for x in state))
                for state in states
                if state is not None
            )
            whole = reduce(partial(online_softmax.merge, xp=np), parts, empty)
            out[...], lse[...] = finish(self.call, whole)


def _boxes(batch: tuple[int, ...], heads: int, lanes: int) -> Iterator[tuple[Any, ...]]:
    """Index (..., Hkv) so that no more than so many lanes, if not one, are together."""
    if not batch or heads >= lanes:
        for b in np.ndindex(*batch):
            for h in range(0, heads, lanes):
                yield (*b, slice(h, h + lanes))
        return
    step = lanes // max(heads, 1)
    for b in np.ndindex(*batch[:-1]):
        for i in range(0, batch[-1], step):
            yield (*b, slice(i, i + step), slice(heads))


def _cut(x: Array, at: tuple[Any, ...], trailing: int) -> Array:
    """``x[at]``, where `x` may lack batch axes or have them of length 1."""
    lead = x.shape[: x.ndim - trailing]
    own = at[len(at) - 1 - len(lead) : -1]
    whole = (slice(None) if isinstance(i, slice) else 0 for i in own)
    picked = (w if n == 1 else i for w, i, n in zip(whole, own, lead, strict=True))
    return x[(*picked, at[-1])]


def gather(q: Array, k: Array, v: Array, scale: float) -> State:
    """
    The state of queries that see all of these keys.

    Parameters
    ----------
    q : array, shape (..., R, D)
        Queries, in the accumulation dtype.
    k, v : array, shapes (..., m, D) and (..., m, Dv)
        Keys and values, in the accumulation dtype; leading axes broadcast.
    scale : float
        The factor of the scores.

    Returns
    -------
    State
        Of shapes (..., R, 1), (..., R, 1) and (..., R, Dv).
    """
    lead = np.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v)))
    r, m = q.shape[-2], k.shape[-2]
    q = q * (scale * LOG2E)
    s = workspace.work_space("scores", (*lead, r, m), q.dtype)
    for rows, keys in _chunks(s, k, 1 << max(SCORES // r, 1).bit_length() - 1):
        np.matmul(q[..., None, :, :], keys.mT, out=rows)
    top = s.max(axis=-1, keepdims=True, initial=-math.inf)
    np.subtract(s, np.where(top == -math.inf, 0, top), out=s)
    np.exp2(np.maximum(s, lowest(s.dtype), out=s), out=s)
    total = np.matmul(s, workspace.ones_column(m, s.dtype))
    o = sum(np.matmul(rows, values).sum(axis=-3) for rows, values in _chunks(s, v, SUMMED))
    return State(top * (1 / LOG2E), total, o)


def _chunks(s: Array, x: Array, n: int) -> Iterator[tuple[Array, Array]]:
    """
    Columns of ``s (..., R, m)`` with their keys or values ``x (..., m, E)``, `n` at a time.

    Views ``(..., chunks, R, n)`` and ``(..., chunks, n, E)``, and one of a shorter chunk.
    """
    m = x.shape[-2]
    even = m - m % n
    for start, stop, size in ((0, even, n), (even, m, m - even)):
        if start < stop:
            rows = s[..., start:stop].reshape(*s.shape[:-1], (stop - start) // size, size)
            keys = x[..., start:stop, :]
            yield (
                rows.swapaxes(-3, -2),
                keys.reshape(*x.shape[:-2], (stop - start) // size, size, x.shape[-1]),
            )
