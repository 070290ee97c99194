"""
The online softmax in as few passes over the scores as NumPy can do it in.

Scores are kept in units of ``log 2``, so that `exp2` does, and hidden pairs are multiplied by
0 after it. Where ``|q| |k|`` (Cauchy-Schwarz) bounds all scores of a strip, nothing has to
be subtracted before it; else a row's maximum so far is, which is brought up to date only when
a score has grown far beyond it. Sums of weights tell in which rows one may have; where those are
a good part of all, the scores of the next run are looked at before they are exponentiated. Neither
choice depends on what a hidden key or value holds: the first is made by keys that every row sees,
the second changes no bit of other rows, and keys that are out of bounds are left, one by one, to
`fold`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from arrattn._core import workspace
from arrattn._core.online_softmax import State
from arrattn._core.typing import Array, DType

#: Scores of at most this size, in units of log 2, are exponentiated as they are.
CALM = 60.0

#: Keys and values whose norms are within these bounds, or 0, have products and weighted sums
#: that neither overflow nor are lost.
SMALLEST, LARGEST = 2.0**-40, 2.0**30

#: Beyond this size a product could overflow before it is looked at.
UNSAFE = 2.0**100

#: What is subtracted from a row's scores is its maximum so far and this much more: room for
#: the maximum to grow, at no loss.
ROOM = 20.0

#: Exponents are cut here, and at `lowest`.
HIGH = 100.0

#: How far a score may lie above what is subtracted from its row before that is brought up to
#: date, and a sum of weights that no such score is part of.
GROWN = 68.0
CLEAR = 2.0**67

#: Of a tile's rows, one in so many may have grown before all are looked at.
SOME = 4

LOG2E = math.log2(math.e)


class Look(NamedTuple):
    """
    What hides pairs of a tile.

    Attributes
    ----------
    rows : tuple of (int, int)
        Rows of the tile outside which none sees any key; may be empty.
    partly : tuple of (int, int)
        Those of them outside which all see every key.
    weights : array
        1 where a pair of the rows `partly` is visible, else 0; broadcastable to
        (count, G, rows, m).
    common : index
        Keys that every row sees, or some of those.
    """

    rows: tuple[int, int]
    partly: tuple[int, int]
    weights: Array
    common: Array | slice


def lowest(dtype: DType) -> float:
    """
    The exponent at which smaller ones are cut: nothing beside a row's largest weight, 2 ** -ROOM.

    A processor is a hundred times slower at numbers below the least normal one. A weight cut here
    lies so far above that it stays normal when multiplied with a value.
    """
    return float(np.finfo(dtype).minexp + 26)


def reach(k: Array, v: Array, acc: DType) -> Array:
    """
    The norm of each key, ``(..., Nk)``; inf or NaN where it or its value is not to be gathered.

    Those are the keys and values that are not finite, too large or too small.
    """
    norm, size = (np.sqrt(np.vecdot(x, x, dtype=acc)) for x in (k, v))
    for x, length in ((k, norm), (v, size)):
        small = ~(length >= SMALLEST)
        if small.any():
            # Nothing is lost of what is exactly zero, and a NaN is any but zero.
            length[small] = np.where(x[small].any(axis=-1), math.inf, 0)
    norm[~((size <= LARGEST) & (norm <= LARGEST))] = math.inf
    return norm


class Rows:
    """
    What a strip's queries have gathered so far.

    Parameters
    ----------
    q : array, shape (count, G, n, D)
        Queries as they came.
    scale : float
        The factor of the scores.
    dv : int
        Width of the values.
    acc : dtype
        Of scores and sums.
    """

    def __init__(self, q: Array, scale: float, dv: int, acc: DType) -> None:
        self.shape = q.shape[:-1]
        self.q = workspace.work_space("queries", q.shape, acc)
        np.multiply(q, np.asarray(scale * LOG2E, acc), out=self.q, casting="same_kind")
        self.o = workspace.work_space("sums", (*self.shape, dv), acc)
        self.l = workspace.work_space("totals", (*self.shape, 1), acc)
        self.m: Array | None = None
        self.growing = False
        self.began = False
        self.norm = math.sqrt(np.vecdot(self.q, self.q).max(initial=0.0))
        self.limit = self._within(CALM)

    def _within(self, bound: float) -> float:
        """Up to which norm of a key no score is larger than `bound`; below inf always."""
        return min(bound / self.norm if self.norm else math.inf, LARGEST)

    def choose(self, full: list[Array]) -> None:
        """Choose whether a maximum is kept, by the `reach` of the keys that every row sees."""
        if all((span <= self.limit).all() for span in full):
            return
        self.limit = self._within(UNSAFE)
        self.m = np.full((*self.shape, 1), -math.inf, self.l.dtype)
        # One more column, beside keys with a 1 there, takes what is subtracted from the
        # scores along in the product.
        d = self.q.shape[-1]
        wider = workspace.work_space("wider", (*self.shape, d + 1), self.q.dtype)
        wider[..., :d], wider[..., d:] = self.q, 0
        self.q = wider

    def absorb(self, k: Array, v: Array, look: Look | None, far: Array | None) -> None:
        """
        Add keys ``(count, D, m)`` and values ``(count, m, Dv)``, but for those that are `far`.
        """
        rows = (0, self.shape[2]) if look is None else look.rows
        if rows[0] == rows[1]:
            return
        if far is not None:
            k, v = np.where(far[:, None, :], 0, k), np.where(far[:, :, None], 0, v)
        p, sums = self._weights(k, look, rows, far)
        self._add(p, sums, v, rows)

    def _product(self, k: Array, rows: tuple[int, int]) -> Array:
        """Scores ``(count, G, n, m)``, less what the last column of the queries takes off."""
        t, g, _ = self.shape
        if self.m is not None:
            d, m = k.shape[-2:]
            if k.strides[-1] == k.itemsize:
                beside = workspace.spread_rows("beside", (t, d + 1, m), k.dtype)
            else:
                beside = workspace.work_space("beside", (t, m, d + 1), k.dtype).mT
            beside[:, :d], beside[:, d] = k, 1
            k = beside
        n = rows[1] - rows[0]
        q = self.q[:, :, rows[0] : rows[1]].reshape(t, g * n, -1)
        s = workspace.work_space("scores", (t, g * n, k.shape[-1]), self.q.dtype)
        return workspace.small_products(q, k, out=s).reshape(t, g, n, -1)

    def _weights(
        self, k: Array, look: Look | None, rows: tuple[int, int], far: Array | None
    ) -> tuple[Array, Array | None]:
        """
        ``exp(score - maximum)`` of a run of keys, 0 where hidden or `far`; its sums if at hand.
        """
        s = self._product(k, rows)
        if self.m is None:
            return _hidden(np.exp2(s, out=s), look, far), None
        m = self.m[:, :, rows[0] : rows[1]]
        if self.began and not self.growing:
            p = _exp2(s, look, far, out=workspace.work_space("weights", s.shape, s.dtype))
            sums = workspace.row_sums(p, xp=np)
            # Weights are never negative, so a sum is no less than any of them.
            grown = np.nonzero(((sums > CLEAR) | ((m == -math.inf) & (sums > 0)))[..., 0])
            if not len(grown[0]):
                return p, sums
            if len(grown[0]) * SOME <= sums.size:
                hidden = p[grown] == 0
                own = s[grown]
                top = np.where(hidden, -math.inf, own).max(axis=-1, keepdims=True)
                self._raise(own, top, grown, rows[0])
                p[grown] = np.where(hidden, 0, _exp2(own, None, None, out=own))
                return p, None
        top = _top(s, look, far)
        grown = np.nonzero(((top > GROWN) | ((m == -math.inf) & (top > -math.inf)))[..., 0])
        self.growing = self.began and len(grown[0]) * SOME > m.size
        own = s[grown]
        self._raise(own, top[grown], grown, rows[0])
        s[grown] = own
        return _exp2(s, look, far, out=s), None

    def _raise(self, s: Array, top: Array, at: tuple[Array, ...], first: int) -> None:
        """
        Bring maxima up to date, and with them sums, and the scores ``s (R, m)``, in place.

        They are those of the rows `at` of a run whose first is `first`; `top` is their largest.
        """
        whole = (*at[:2], at[2] + first)
        m: Any = self.m
        old, minus = m[whole], self.q[..., -1:][whole]
        grown = (top > GROWN) | (old == -math.inf)
        new = np.where(grown, np.maximum(old, top - minus + ROOM), old)
        if self.began:
            decay = np.exp2(old - new)
            self.o[whole] *= decay
            self.l[whole] *= decay
        s -= minus + new
        m[whole], self.q[(*whole, -1)] = new, -new[:, 0]

    def _add(self, p: Array, sums: Array | None, v: Array, rows: tuple[int, int]) -> None:
        t, g, n = self.shape
        r0, r1 = rows
        flat = p.reshape(t, g * (r1 - r0), -1)
        sums = workspace.row_sums(p, xp=np) if sums is None else sums
        if not self.began and (r0, r1) == (0, n):
            workspace.small_products(flat, v, out=self.o.reshape(t, g * n, -1))
            self.l[...] = sums
            self.began = True
            return
        self._begin()
        more = workspace.work_space("values", (*flat.shape[:2], v.shape[-1]), flat.dtype)
        workspace.small_products(flat, v, out=more)
        for x, y in (
            (self.o, more.reshape(t, g, r1 - r0, -1)),
            (self.l, sums),
        ):
            part = x[:, :, r0:r1]
            np.add(part, y, out=part)

    def _begin(self) -> None:
        if not self.began:
            self.o[...] = 0
            self.l[...] = 0
            self.began = True

    def finish(self, out: Array, lse: Array) -> None:
        """Write outputs and log-sum-exps."""
        self._begin()
        none = self.l == 0
        some = none.any()
        if some:
            self.l[none] = 1
        np.divide(self.o, self.l, out=out)
        np.log(self.l, out=lse)
        if self.m is not None:
            lse += self.m * (1 / LOG2E)
        if some:
            lse[none] = -math.inf

    def state(self) -> State:
        """The same as the state of the online softmax, for it to go on from."""
        self._begin()
        m = 0.0 if self.m is None else self.m * (1 / LOG2E)
        m = np.where(self.l == 0, np.asarray(-math.inf, self.l.dtype), m)
        return State(*(x[:, None].copy() for x in (m, self.l, self.o)))


def _top(s: Array, look: Look | None, far: Array | None) -> Array:
    """Each row's largest score that is neither hidden nor `far`; -inf where there is none."""
    if far is not None:
        s = np.where(far[:, None, None, :], -math.inf, s)
    top = s.max(axis=-1, keepdims=True)
    if look is not None:
        first, (h0, h1) = look.rows[0], look.partly
        part = slice(h0 - first, h1 - first)
        seen = np.where(look.weights != 0, s[:, :, part], -math.inf)
        top[:, :, part] = seen.max(axis=-1, keepdims=True)
    return top


def _exp2(s: Array, look: Look | None, far: Array | None, *, out: Array) -> Array:
    """``exp2(s)``, 0 where hidden or `far`; cut where the exponent is extreme."""
    return _hidden(np.exp2(np.clip(s, lowest(s.dtype), HIGH, out=out), out=out), look, far)


def _hidden(p: Array, look: Look | None, far: Array | None) -> Array:
    """`p`, in place, with 0 where hidden or `far`."""
    if look is not None:
        first, (h0, h1) = look.rows[0], look.partly
        part = p[:, :, h0 - first : h1 - first]
        np.multiply(part, look.weights, out=part)
    if far is not None:
        np.multiply(p, ~far[:, None, None, :], out=p)
    return p
