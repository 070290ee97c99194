"""
Linear attention on NumPy: whole blocks of tokens, in memory that each thread keeps.

A fresh array for every step of a chunk costs NumPy more than the products do, so here the
features, sums and outputs of a block go where the last block's were, and logarithms beside
features are multiplied in. What that cannot hold, whether out of range or not finite, is left
to `recurrence`, which goes on from the state reached.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from arrattn._core import loops
from arrattn._core.typing import Array, DType
from arrattn._state import LinearState
from arrattn.feature_maps import FeatureMap

#: Chunks done by one product, as far as their features are no more than so many numbers: with
#: sums and outputs they then fill a second-level cache.
CHUNKS, BLOCK = 16, 1 << 16

#: Features, and a row's sum of weights, that products neither lose nor overflow. They matter
#: where logarithms are multiplied in: else features are what they are.
MOST_FEATURE, LEAST_TOTAL, MOST_TOTAL = 2.0**40, 2.0**-30, 2.0**90

#: Within these bounds, or all 0, values times such weights are not lost either.
LEAST_VALUE, MOST_VALUE = 2.0**-60, 2.0**30


class Job(NamedTuple):
    """
    One key head of one item. `chunk` is how many tokens of a causal call form pairs.
    """

    feature_map: FeatureMap
    carries_log: bool
    weights: Array | None
    q: Array  # (G, Nq, D)
    k: Array  # (Nk, D)
    v: Array  # (Nk, Dv)
    mask: Array | None  # (Nk,)
    is_causal: bool
    normalize: bool
    scale: float
    acc: DType
    chunk: int


def run(job: Job, state: LinearState, out: Array) -> tuple[int, int, LinearState]:
    """
    Do a job as far as it can be done here.

    Parameters
    ----------
    job : Job
        What is to be done.
    state : LinearState
        ``S (Dphi, Dv)`` and ``z (Dphi,)`` before the first key.
    out : array, shape (G, Nq, Dv)
        Where the outputs go.

    Returns
    -------
    i, j : int
        How many queries are done, and how many keys are in the state: all, or all that fit.
        With logarithms it is all or none, for sums that are too small hold too little of them.
    state : LinearState
        The state after those keys.
    """
    head = _Head(job, state, out)
    i, j = head.run()
    if job.carries_log and (i, j) != (job.q.shape[-2], len(job.k)):
        return i, 0, state
    return i, j, LinearState(head.S[:, :-1], head.S[:, -1])


class _Head:
    """A job, its sums ``S (Dphi, Dv + 1)`` so far, and where it writes."""

    def __init__(self, job: Job, state: LinearState, out: Array) -> None:
        self.job, self.out = job, out
        self.S = np.concatenate([state.S, state.z[:, None]], axis=-1, dtype=job.acc)
        widest = max(1, self.S.shape[0], job.k.shape[-1], job.v.shape[-1])
        self.block = job.chunk * max(1, min(CHUNKS, BLOCK // (job.chunk * widest)))

    def run(self) -> tuple[int, int]:
        """Go through queries and keys; say how far that was."""
        nq, nk = self.job.q.shape[-2], self.job.k.shape[-2]
        if not self.job.is_causal:
            j = self._absorb(0, nk)
            return (0, j) if j < nk else (self._read(0, nq), nk)
        # The last query beside the last key: whichever side is longer starts alone.
        i, j = self._read(0, max(0, nq - nk)), self._absorb(0, max(0, nk - nq))
        if i < nq - nk or j < nk - nq:
            return i, j
        done = self._side_by_side(i, j, nq - i)
        return i + done, j + done

    def _absorb(self, start: int, stop: int) -> int:
        """Take up keys, up to the first block that does not fit."""
        for j in range(start, stop, self.block):
            phi, v = self._keys(j, min(j + self.block, stop))
            S = self._sums(phi, v)
            if not self._holds(S, v):
                return j
            self.S = S
        return stop

    def _read(self, start: int, stop: int) -> int:
        """Write the outputs of queries that see the sums, up to a block that does not fit."""
        for i in range(start, stop, self.block):
            rows = slice(i, min(i + self.block, stop))
            for g in range(len(self.out)):
                phi = self._queries(g, rows)
                if not self._finish(phi, self._times_sums(phi), self.out[g, rows]):
                    return i
        return stop

    def _times_sums(self, phi: Array) -> Array:
        """``phi @ S``."""
        top = self._space("outputs", (len(phi), self.S.shape[1]))
        runs, rest = self._runs(phi)
        more, last = self._runs(top)
        np.matmul(runs, self.S, out=more)
        np.matmul(rest, self.S, out=last)
        return top

    def _runs(self, x: Array) -> tuple[Array, Array]:
        """Tokens in runs of a length that BLAS is fast at, and those left over."""
        run = 2 * self.job.chunk
        even = len(x) - len(x) % run
        return x[:even].reshape(even // run, run, x.shape[1]), x[even:]

    def _side_by_side(self, i: int, j: int, n: int) -> int:
        """`n` queries from `i` on, each up to its own key, which are those from `j` on."""
        c, done = self.job.chunk, 0
        while done < n:
            # Whole chunks side by side, and then what is left, a shorter one.
            size = c if n - done >= c else n - done
            count = min(self.block, n - done) // size
            if not self._chunks(i + done, j + done, count, size):
                break
            done += count * size
        return done

    def _chunks(self, i: int, j: int, count: int, c: int) -> bool:
        """`count` chunks of `c` tokens, from query `i` and key `j` on."""
        k, v = (x.reshape(count, c, -1) for x in self._keys(j, j + count * c))
        before = self._space("sums", (count, *self.S.shape))
        products = self._space("products", before.shape)
        kt = self._space("turned", (count, self.S.shape[0], c))
        kt[...] = k.swapaxes(-1, -2)  # small products are faster from keys that lie transposed
        np.matmul(kt, v, out=products)
        before[0] = self.S
        for t in range(1, count):
            np.add(before[t - 1], products[t - 1], out=before[t])
        S = before[-1] + products[-1]
        if not self._holds(S, v):
            return False
        rows = slice(i, i + count * c)
        for g in range(len(self.out)):
            q = self._queries(g, rows).reshape(count, c, -1)
            w = self._space("weights", (count, c, c))
            np.matmul(q, kt, out=w)
            np.multiply(w, _lower(c, w.dtype), out=w)
            top, past = (self._space(slot, v.shape) for slot in ("outputs", "pasts"))
            np.add(np.matmul(w, v, out=top), np.matmul(q, before, out=past), out=top)
            if not self._finish(q, top.reshape(count * c, -1), self.out[g, rows]):
                return False
        self.S = S
        return True

    def _space(self, slot: str, shape: tuple[int, ...]) -> Array:
        return loops.work_space(f"linear {slot}", shape, self.job.acc)

    def _held(self, x: Array) -> Array:
        """Tokens in the accumulation dtype."""
        if x.dtype == self.job.acc:
            return x
        held = self._space("tokens", x.shape)
        held[...] = x
        return held

    def _queries(self, g: int, rows: slice) -> Array:
        """Features of some queries of a query head, (n, Dphi)."""
        q = self._held(self.job.q[g, rows])
        phi = self._space("queries", (len(q), self.S.shape[0]))
        self.job.feature_map.write_q(q, phi, self.job.weights)
        return phi

    def _keys(self, j0: int, j1: int) -> tuple[Array, Array]:
        """
        Features of some keys (n, Dphi), and their values beside a one (n, Dv + 1).

        What is not finite in keys or values leaves something that is not, for `_holds` to see.
        """
        job, n = self.job, j1 - j0
        held = self._held(job.k[j0:j1])
        phi, v = (
            self._space(s, (n, m)) for s, m in zip(("keys", "values"), self.S.shape, strict=True)
        )
        job.feature_map.write_k(held, phi, job.weights)
        v[:, :-1], v[:, -1] = job.v[j0:j1], 1
        if job.mask is not None:
            there = job.mask[j0:j1]
            phi[~there], v[~there], held = 0, 0, held[there]
        # Some maps make a feature of 0, and others one of 1, of a key at infinity.
        if not np.isfinite(np.matmul(loops.ones_column(len(held), held.dtype).T, held)).all():
            v[0, -1] = math.nan
        return phi, v

    def _sums(self, phi: Array, v: Array) -> Array:
        """The sums with these keys."""
        (k, rest), (v, last) = self._runs(phi), self._runs(v)
        S = self.S + np.matmul(rest.T, last)
        products = self._space("products", (len(k), *S.shape))
        for product in np.matmul(k.swapaxes(-1, -2), v, out=products):
            np.add(S, product, out=S)
        return S

    def _holds(self, S: Array, v: Array) -> bool:
        """Whether these sums, and the keys in them, are all that they should be."""
        if not np.isfinite(S).all():
            return False
        if not self.job.carries_log:
            return True
        v = v[..., :-1]
        size = max(v.max(initial=0), -v.min(initial=0))
        return bool(
            S[:, -1].max(initial=0) <= MOST_FEATURE
            and (size == 0 or LEAST_VALUE <= size <= MOST_VALUE)
        )

    def _finish(self, phi: Array, top: Array, out: Array) -> bool:
        """Divide by the normaliser, the last column; False where it is no good one."""
        top, total = top[:, :-1], top[:, -1:]
        least, most = total.min(initial=1), total.max(initial=1)
        if self.job.carries_log:
            in_range = least >= LEAST_TOTAL and most <= MOST_TOTAL
            if not (in_range and phi.max(initial=0) <= MOST_FEATURE):
                return False
        elif not (np.isfinite(least) and np.isfinite(most)):
            return False
        if not self.job.normalize:
            np.multiply(top, np.asarray(self.job.scale, top.dtype), out=top)
        else:
            if least <= 0:
                empty = total == 0
                np.copyto(top, 0, where=empty)
                total[empty] = 1
            np.divide(top, total, out=out if out.dtype == top.dtype else top)
            if out.dtype == top.dtype:
                return True
        out[...] = top
        return True


_masks: dict[Any, Array] = {}


def _lower(n: int, dtype: DType) -> Array:
    """1 where a query sees a key of its chunk, else 0; not to be written to."""
    held = _masks.get(dtype)
    if held is None or len(held) < n:
        held = _masks[dtype] = np.tril(np.ones((n, n), dtype))
    return held[:n, :n]
