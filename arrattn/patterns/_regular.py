"""Patterns that repeat: every so many positions, or a summary at the end of each block."""

from __future__ import annotations

import numpy as np

from arrattn._core.tiles import Pairs
from arrattn._core.typing import Array
from arrattn.patterns._arrays import every_so_many
from arrattn.patterns._base import (
    Bools,
    Edges,
    Pattern,
    Rectangles,
    joined,
    keep,
    read_int,
)


class Dilated(Pattern):
    """
    Keys `step` apart around the query: ``j = p + m * step`` for ``-left <= m <= right`` [1]_.

    ``Dilated(1, left, right)`` is ``Window(left, right)``.

    Parameters
    ----------
    step : int
        Distance from one key to the next, at least 1.
    left, right : int or None
        How many keys are visible before and after the query's own position, not counting it;
        None is unlimited.

    References
    ----------
    .. [1] Beltagy et al., Longformer, 2020, arXiv:2004.05150, the dilated sliding window.

    Examples
    --------
    >>> from arrattn.patterns import Dilated
    >>> Dilated(2, 1, 0).table(4, 4).astype(int)
    array([[1, 0, 0, 0],
           [0, 1, 0, 0],
           [1, 0, 1, 0],
           [0, 1, 0, 1]])
    """

    step: int
    left: int | None
    right: int | None

    def __init__(self, step: int, left: int | None, right: int | None) -> None:
        keep(self, step=read_int(self, "step", step, low=1))
        for name, side in (("left", left), ("right", right)):
            read = None if side is None else read_int(self, name, side, low=0)
            keep(self, **{name: read})

    @property
    def relative(self) -> bool:
        return True

    @property
    def band(self) -> tuple[int | None, int | None] | None:
        return self.reach if self.step == 1 else None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        lo = None if self.left is None else -self.left * self.step
        return lo, None if self.right is None else self.right * self.step + 1

    def visible(self, pairs: Pairs) -> Array:
        away = pairs.j - pairs.p
        seen = away % self.step == 0
        lo, hi = self.reach
        if lo is not None:
            seen = seen & (away >= lo)
        return seen if hi is None else seen & (away < hi)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        # Every difference j - p between the corners occurs, so both answers are exact.
        lo, hi = at.j0 - at.p1 + 1, at.j1 - 1 - at.p0
        first, last = -(-lo // self.step), hi // self.step
        every = (first * self.step == lo) & ((lo == hi) | np.equal(self.step, 1))
        if self.left is not None:
            first, every = np.maximum(first, -self.left), every & (first >= -self.left)
        if self.right is not None:
            last, every = np.minimum(last, self.right), every & (last <= self.right)
        return first <= last, every


class Strided(Dilated):
    """
    Every `step`-th key, counted from the query: ``(p - j) % step == 0`` [1]_.

    Parameters
    ----------
    step : int
        The stride, at least 1.

    References
    ----------
    .. [1] Child et al., Generating Long Sequences with Sparse Transformers, 2019,
       arXiv:1904.10509: ``Causal() & (Window(step, 0) | Strided(step))``.

    Examples
    --------
    >>> from arrattn.patterns import Strided
    >>> Strided(2).table(3, 3).astype(int)
    array([[1, 0, 1],
           [0, 1, 0],
           [1, 0, 1]])
    """

    def __init__(self, step: int) -> None:
        super().__init__(step, None, None)

    def __repr__(self) -> str:
        return f"Strided({self.step})"


class Fixed(Pattern):
    """
    The query's own block, and the last keys of every block [1]_.

    ``j // size == p // size or j % size >= size - n``: the last `n` keys of a block stand for
    all of it. It looks ahead unless ``Causal()`` is with it.

    Parameters
    ----------
    size : int
        Positions per block, at least 1.
    n : int, default: 1
        How many keys at the end of each block every query sees.

    References
    ----------
    .. [1] Child et al., Generating Long Sequences with Sparse Transformers, 2019,
       arXiv:1904.10509, the fixed pattern: ``Causal() & Fixed(size, n)``.

    Examples
    --------
    >>> from arrattn.patterns import Causal, Fixed
    >>> (Causal() & Fixed(2)).table(5, 5).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [0, 1, 1, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 1, 0, 1, 1]])
    """

    size: int
    n: int

    def __init__(self, size: int, n: int = 1) -> None:
        keep(self, size=read_int(self, "size", size, low=1), n=read_int(self, "n", n, low=0))
        if self.n > self.size:
            msg = f"Fixed: n: expected at most size ({self.size}), got {n}"
            raise ValueError(msg)

    def edges(self, nk: int, at: int) -> Edges:
        del at
        ends = every_so_many(self.size, nk)
        return joined(ends, Edges(keys=tuple(j - self.n for j in ends.keys)))

    def visible(self, pairs: Pairs) -> Array:
        own = pairs.j // self.size == pairs.p // self.size
        return own | (pairs.j % self.size >= self.size - self.n)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        size, width = self.size, at.j1 - at.j0
        blocks = at.p0 // size, (at.p1 - 1) // size, at.j0 // size, (at.j1 - 1) // size
        overlap = (blocks[0] <= blocks[3]) & (blocks[2] <= blocks[1])
        same = (blocks[0] == blocks[1]) & (blocks[2] == blocks[3]) & overlap
        last = self._last_before(at.j1) - self._last_before(at.j0)
        return overlap | (last > 0), same | (last == width)

    def _last_before(self, j: Bools) -> Bools:
        """How many keys before `j` are among the last of their blocks."""
        return j // self.size * self.n + np.maximum(j % self.size - (self.size - self.n), 0)


class OwnBlock(Pattern):
    """Keys of the block of `size` in which the query lies, of `n` keys. Not public."""

    size: int
    n: int

    def __init__(self, size: int, n: int) -> None:
        keep(self, size=size, n=n)

    def visible(self, pairs: Pairs) -> Array:
        return (pairs.p // self.size == pairs.j // self.size) & (pairs.p < self.n)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        size, n = self.size, self.n
        p0, p1 = at.p0 // size, (np.minimum(at.p1, n) - 1) // size
        j0, j1 = at.j0 // size, (at.j1 - 1) // size
        some = (p0 <= j1) & (p1 >= j0) & (at.p0 < n)
        return some, (p0 == p1) & (j0 == j1) & (p0 == j0) & (at.p1 <= n)
