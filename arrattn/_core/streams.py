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

from arrattn._core import workspace
from arrattn._core.typing import Array, DType
from arrattn._state import LinearState
from arrattn.feature_maps import FeatureMap

#: Chunks done by one product, as far as their features are no more than so many numbers; half of
#: that in the causal form, which keeps more beside them. Fewer would fit a smaller cache, but two
#: threads that do short things in turn wait for the interpreter.
CHUNKS, BLOCK = 64, 1 << 18

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
    return i, j, LinearState(head.S, head.z)


class _Head:
    """A job, its sums ``S (Dphi, Dv)`` and ``z (Dphi,)`` so far, and where it writes."""

    def __init__(self, job: Job, state: LinearState, out: Array) -> None:
        self.job, self.out = job, out
        self.S, self.z = (np.asarray(x, job.acc) for x in state)
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
            S, z = self._sums(phi, v)
            if not self._holds(S, z, v):
                return j
            self.S, self.z = S, z
        return stop

    def _read(self, start: int, stop: int) -> int:
        """Write the outputs of queries that see the sums, up to a block that does not fit."""
        S = workspace.laid_out(self.S, "linear memory")
        for i in range(start, stop, self.block):
            rows = slice(i, min(i + self.block, stop))
            for g in range(len(self.out)):
                phi, out = self._queries(g, rows), self.out[g, rows]
                top = self._tops(out)
                workspace.small_products(phi, S, out=top)
                if not self._finish(phi, top, np.matmul(phi, self.z[:, None]), out):
                    return i
        return stop

    def _tops(self, out: Array) -> Array:
        """Where weighted sums go before they are divided: `out` itself where it holds them."""
        return out if out.dtype == self.job.acc else self._space("outputs", out.shape)

    def _side_by_side(self, i: int, j: int, n: int) -> int:
        """`n` queries from `i` on, each up to its own key, which are those from `j` on."""
        c, done = self.job.chunk, 0
        while done < n:
            # Whole chunks side by side, and then what is left, a shorter one.
            size = c if n - done >= c else n - done
            count = min(max(c, self.block // 2), n - done) // size
            if not self._chunks(i + done, j + done, count, size):
                break
            done += count * size
        return done

    def _chunks(self, i: int, j: int, count: int, c: int) -> bool:
        """`count` chunks of `c` tokens, from query `i` and key `j` on."""
        k, v = (x.reshape(count, c, x.shape[1]) for x in self._keys(j, j + count * c))
        before = self._space("sums", (count, *self.S.shape))
        products = self._space("products", before.shape)
        totals = self._space("totals", (count + 1, len(self.z), 1))
        kt = self._space("turned", (count, len(self.z), c))
        kt[...] = k.mT  # small products are faster from keys that lie transposed
        one = workspace.ones_column(c, kt.dtype)
        np.matmul(kt, v, out=products)
        np.matmul(kt, one, out=totals[1:])
        before[0], totals[0, :, 0] = self.S, self.z
        for t in range(1, count):
            np.add(before[t - 1], products[t - 1], out=before[t])
        S, totals = before[-1] + products[-1], np.cumsum(totals, axis=0)
        if not self._holds(S, totals[-1], v):
            return False
        rows = slice(i, i + count * c)
        for g in range(len(self.out)):
            q, out = self._queries(g, rows).reshape(count, c, -1), self.out[g, rows]
            w = self._space("weights", (count, c, c))
            np.matmul(q, kt, out=w)
            np.multiply(w, _lower(c, w.dtype), out=w)
            top = self._tops(out)
            more, past = top.reshape(v.shape), self._space("pasts", v.shape)
            np.add(np.matmul(w, v, out=more), np.matmul(q, before, out=past), out=more)
            total = np.matmul(w, one) + np.matmul(q, totals[:-1])
            if not self._finish(q, top, total.reshape(-1, 1), out):
                return False
        self.S, self.z = S, totals[-1, :, 0]
        return True

    def _space(self, slot: str, shape: tuple[int, ...]) -> Array:
        return workspace.work_space(f"linear {slot}", shape, self.job.acc)

    def _held(self, x: Array, slot: str) -> Array:
        """Tokens in the accumulation dtype, as BLAS can read them."""
        near = x.strides[1] == x.itemsize and x.strides[0] >= x.shape[1] * x.itemsize
        if x.dtype == self.job.acc and near:
            return x
        held = self._space(slot, x.shape)
        held[...] = x
        return held

    def _queries(self, g: int, rows: slice) -> Array:
        """Features of some queries of a query head, (n, Dphi)."""
        q = self._held(self.job.q[g, rows], "tokens")
        phi = self._space("queries", (len(q), len(self.z)))
        self.job.feature_map.write_q(q, phi, self.job.weights)
        return phi

    def _keys(self, j0: int, j1: int) -> tuple[Array, Array]:
        """
        Features of some keys (n, Dphi), and their values (n, Dv).

        What is not finite in keys or values leaves something that is not, for `_holds` to see.
        """
        job = self.job
        held, v = self._held(job.k[j0:j1], "tokens"), self._held(job.v[j0:j1], "values")
        phi = self._space("keys", (j1 - j0, len(self.z)))
        job.feature_map.write_k(held, phi, job.weights)
        if job.mask is not None:
            there = job.mask[j0:j1]
            v = np.where(there[:, None], v, 0)
            phi[~there], held = 0, held[there]
        # Some maps make a feature of 0, and others one of 1, of a key at infinity.
        if not np.isfinite(np.matmul(workspace.ones_column(len(held), held.dtype).T, held)).all():
            phi[0] = math.nan
        return phi, v

    def _sums(self, phi: Array, v: Array) -> tuple[Array, Array]:
        """The sums with these keys, a run of them at a time: so BLAS is faster."""
        run = 2 * self.job.chunk
        even = len(phi) - len(phi) % run
        k, values = (x[:even].reshape(even // run, run, x.shape[1]) for x in (phi, v))
        S = self.S + np.matmul(phi[even:].T, v[even:])
        products = self._space("products", (len(k), *S.shape))
        for product in np.matmul(k.mT, values, out=products):
            np.add(S, product, out=S)
        return S, self.z + np.matmul(workspace.ones_column(len(phi), phi.dtype).T, phi)[0]

    def _holds(self, S: Array, z: Array, v: Array) -> bool:
        """Whether these sums, and the keys in them, are all that they should be."""
        if not (np.isfinite(S).all() and np.isfinite(z).all()):
            return False
        if not self.job.carries_log:
            return True
        size = max(v.max(initial=0), -v.min(initial=0))
        return bool(
            z.max(initial=0) <= MOST_FEATURE and (size == 0 or LEAST_VALUE <= size <= MOST_VALUE)
        )

    def _finish(self, phi: Array, top: Array, total: Array, out: Array) -> bool:
        """Divide by the normaliser ``(n, 1)``; False where it is no good one."""
        least, most = total.min(initial=1), total.max(initial=1)
        if self.job.carries_log:
            in_range = least >= LEAST_TOTAL and most <= MOST_TOTAL
            if not (in_range and phi.max(initial=0) <= MOST_FEATURE):
                return False
        elif not (np.isfinite(least) and np.isfinite(most)):
            return False
        if not self.job.normalize:
            np.multiply(top, self.job.scale, out=top)
        else:
            if least <= 0:
                empty = total == 0
                np.copyto(top, 0, where=empty)
                total[empty] = 1
            np.divide(top, total, out=top)
        if top is not out:
            out[...] = top
        return True


_masks: dict[Any, Array] = {}


def _lower(n: int, dtype: DType) -> Array:
    """1 where a query sees a key of its chunk, else 0; not to be written to."""
    held = _masks.get(dtype)
    if held is None or len(held) < n:
        held = _masks[dtype] = np.tril(np.ones((n, n), dtype))
    return held[:n, :n]
