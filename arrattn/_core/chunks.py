"""
The recurrence of `gated` on NumPy: a span of chunks written in place, on kept work space.

Chunks are so small that what NumPy does around a product takes as long as the product. So
all chunks and heads of a span are taken by one call wherever no memory is needed, and the way
of the memory from chunk to chunk is two to five calls a chunk, on views made beforehand.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from arrattn._core import decay, workspace
from arrattn._core.decay import Gates
from arrattn._core.typing import Array, DType


class Chunks(NamedTuple):
    """The tokens of a span by chunks, which are the first axis."""

    q: Array | None  # (C, ..., Hkv, G, c, Dphi)
    k: Array  # (C, ..., Hkv, c, Dphi)
    v: Array  # (C, ..., Hkv, c, Dv + 1), or without the column of ones
    log: Any  # (C, ..., Hkv, c), or None
    gates: Gates  # (C, ..., Hkv | 1, c, 1) and (C, ..., Hkv | 1, c, Dphi)
    beta: Array | None  # (C, ..., Hkv | 1, c, 1)

    def of(self, cut: slice) -> Chunks:
        """Some of them."""
        arrays = (None if a is None else a[cut] for a in (*self[:4], *self.gates, self.beta))
        q, k, v, log, steps, beyond, beta = arrays
        return Chunks(q, k, v, log, Gates(steps, beyond), beta)


class Room:
    """
    Room for chunks of tokens whose decay is the same for all features.

    Parameters
    ----------
    x : Chunks
        The first of those that are to be read, without batch axes.
    """

    def __init__(self, x: Chunks) -> None:
        q: Any = x.q
        n, heads, groups, c, d = q.shape
        columns = x.v.shape[-1]

        def space(slot: str, *shape: int) -> Array:
            return workspace.work_space(f"span {slot}", shape, q.dtype)

        lead = x.gates.steps.shape[:-2]
        steps = space("steps", *lead, c + 1)
        self.steps, self.ones, self.rows = steps[..., :c], steps[..., c], steps.reshape(-1, c + 1)
        self.logs = space("decays", len(self.rows), c * c + c)
        self.sums = _sums(c, q.dtype)
        decays = self.logs.reshape(*lead, c * c + c)
        self.within = decays[..., : c * c].reshape(*lead, c, c)
        self.since_start = decays[..., c * c :]
        self.k = space("keys", n, heads, d, c)
        self.pairs = space("pairs", n, heads, groups, c, c)
        # Heads lie a row apart: where they touch, NumPy scales them by way of a buffer.
        self.S = space("S", n + 1, heads, d + 1, columns)[:, :, :d]
        self.q: Any = None
        self.v: Any = None
        self.more = space("more", heads, d, columns)
        self.top, self.near = (
            space(slot, n, heads, groups, c, columns) for slot in ("top", "near")
        )
        whole = self.since_start[..., -1:, None]  # (C, H | 1, 1, 1)
        self.steps_on: list[Any] = list(zip(self.S[:-1], whole, self.S[1:], strict=True))
        self.corrects = x.beta is not None
        if not self.corrects:
            return
        self.factors = space("factors", n, heads, c, c)
        self.solved = space("solved", n, heads, c, c)
        self.diagonal = self.solved.reshape(n, heads, c * c)[..., :: c + 1]
        self.blocks = _pairs_of_blocks(self.solved)
        self.told = space("told", n, heads, c, d)
        self.found = space("found", heads, c, columns)
        self.v = space("written", n, heads, c, columns)
        self.steps_on = list(
            zip(self.S[:-1], whole, self.S[1:], self.told, self.v, self.k, strict=True)
        )

    def read(self, x: Chunks) -> None:
        """
        Do all that needs no memory.

        By the delta rule, what is written is held without its `beta`, and with the sign turned:
        both are in the factors of whatever reads it.
        """
        k, self.q = x.k, x.q
        np.copyto(self.k, k.mT)
        if x.beta is not None:
            np.matmul(k, self.k, out=self.solved)
        np.matmul(self.q, self.k[:, :, None], out=self.pairs)
        np.maximum(x.gates.steps[..., 0], decay.FASTEST, out=self.steps)
        self.ones.fill(1.0)
        np.matmul(self.rows, self.sums, out=self.logs)
        np.exp(self.logs, out=self.logs)
        factors: Any = self.within
        if x.beta is not None:
            factors = np.multiply(self.within, -x.beta.mT, out=self.factors)
        self.pairs *= factors[:, :, None]
        self.k *= factors[..., -1:, :]
        if x.beta is None:
            np.matmul(self.k, x.v, out=self.S[1:])
            self.v = x.v
            return
        solved = self.solved
        solved *= factors
        self.diagonal.fill(1.0)
        for first, below, second, space in self.blocks:
            np.matmul(below, first, out=space)
            np.matmul(second, space, out=below)
        np.matmul(solved, x.v, out=self.v)
        solved *= self.since_start[..., None, :]
        np.matmul(solved, k, out=self.told)

    def pass_on(self, memory: Array) -> Array:
        """Take the memory (H, Dphi, columns) from before the span through it; it is no copy."""
        multiply, add, matmul, subtract = np.multiply, np.add, np.matmul, np.subtract
        np.copyto(self.S[0], memory)
        more = self.more
        if not self.corrects:
            for S, whole, after in self.steps_on:
                multiply(S, whole, more)
                add(after, more, after)
            return self.S[-1]
        found = self.found
        for S, whole, after, told, written, k in self.steps_on:
            matmul(told, S, found)
            subtract(found, written, written)
            multiply(S, whole, after)
            matmul(k, written, more)
            add(after, more, after)
        return self.S[-1]

    def outputs(self, out: Array | None = None) -> Array:
        """What queries read of the memory before their chunk and of the pairs in it."""
        np.matmul(self.q, self.S[:-1, :, None], out=self.top)
        self.top *= self.since_start[:, :, None, :, None]
        np.matmul(self.pairs, self.v[:, :, None], out=self.near)
        return np.add(self.top, self.near, out=self.top if out is None else out)


@lru_cache(maxsize=16)
def _sums(c: int, dtype: DType) -> Array:
    """
    What sums logarithms of decay, and a 1 after them: (c + 1, c * c + c).

    The first columns are the sums over the steps after `j` through `i`, by rows, far below
    every logarithm where ``j > i``; the last are the sums up to each step.
    """
    s, i, j = np.ogrid[: c + 1, :c, :c]
    between = ((j < s) & (s <= i)).astype(dtype)
    between[c] = np.where(j > i, decay.RESET, 0.0)[0]
    until = (np.arange(c + 1)[:, None] <= np.arange(c)).astype(dtype)
    return np.concatenate([between.reshape(c + 1, -1), until], axis=-1)


def _pairs_of_blocks(x: Array) -> list[tuple[Array, ...]]:
    """
    What inverts ``1 - x`` in its place, once ones stand on its diagonal; work space comes with it.

    As `decay.inverse` does, but from small blocks on the diagonal to large ones; those of two
    are inverted as they are. `x` (..., c, c) is strictly lower triangular, `c` a power of two.
    """
    lead, c, found, half = x.shape[:-2], x.shape[-1], [], 2
    while half < c:
        m = c // (2 * half)
        cut = x.reshape(*lead, m, 2, half, m, 2, half)
        on_diagonal = np.moveaxis(np.diagonal(cut, axis1=-6, axis2=-3), -1, -5)
        on_diagonal.flags.writeable = True  # a view of work space
        first, below, second = (on_diagonal[..., i, :, j, :] for i, j in ((0, 0), (1, 0), (1, 1)))
        space = workspace.work_space("span blocks", below.shape, x.dtype)
        found.append((first, below, second, space))
        half *= 2
    return found
