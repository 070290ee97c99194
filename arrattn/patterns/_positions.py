"""Patterns of nearness and of the first positions."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from arrattn._core import loops
from arrattn._core.tiles import Pairs
from arrattn._core.typing import Array
from arrattn.patterns._arrays import batch_problem, require_integers
from arrattn.patterns._base import (
    NO_EDGES,
    Bools,
    Edges,
    Pattern,
    Rectangles,
    Span,
    is_array,
    keep,
    read_int,
)


class Window(Pattern):
    """
    Keys near the query: ``p - left <= j <= p + right``.

    Parameters
    ----------
    left, right : int or None
        Keys visible before and after the query's own position, not counting it;
        None is unlimited.

    Examples
    --------
    >>> from arrattn.patterns import Window
    >>> Window(1, 0).table(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [0, 1, 1]])
    """

    left: int | None
    right: int | None

    def __init__(self, left: int | None, right: int | None) -> None:
        for name, side in (("left", left), ("right", right)):
            read = None if side is None else read_int(self, name, side, low=0)
            keep(self, **{name: read})

    @property
    def relative(self) -> bool:
        return True

    @property
    def band(self) -> tuple[int | None, int | None]:
        return (
            None if self.left is None else -self.left,
            None if self.right is None else self.right + 1,
        )

    def visible(self, pairs: Pairs) -> Array:
        return inside(pairs.j, self.key_span(pairs))

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        # Every difference j - p between the corners occurs, so both answers are exact.
        lo, hi = at.j0 - at.p1 + 1, at.j1 - 1 - at.p0
        yes = np.True_
        after, before = (
            self.right is None or lo <= self.right,
            self.left is None or hi >= -self.left,
        )
        inside = self.left is None or lo >= -self.left, self.right is None or hi <= self.right
        return yes & after & before, yes & inside[0] & inside[1]

    def key_span(self, pairs: Pairs) -> Span:
        lo = None if self.left is None else pairs.p - self.left
        hi = None if self.right is None else pairs.p + (self.right + 1)
        return lo, hi

    def query_span(self, pairs: Pairs) -> Span:
        lo = None if self.right is None else pairs.j - self.right
        hi = None if self.left is None else pairs.j + (self.left + 1)
        return lo, hi


class Causal(Window):
    """
    Keys up to the query's own position: ``j <= p``.

    Examples
    --------
    >>> from arrattn.patterns import Causal
    >>> Causal().table(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """

    def __init__(self) -> None:
        super().__init__(None, 0)

    def __repr__(self) -> str:
        return "Causal()"


class Prefix(Pattern):
    """
    The first `n` keys: ``j < n``.

    Parameters
    ----------
    n : int or array of int, shape (...)
        How many; an array gives one number for each batch item.

    Examples
    --------
    >>> from arrattn.patterns import Causal, Prefix
    >>> (Causal() | Prefix(2)).table(3, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [1, 1, 1]])
    """

    n: Any

    def __init__(self, n: Any) -> None:
        if is_array(n) and not isinstance(n, Integral):
            require_integers("n", n)
            keep(self, n=n)
        else:
            keep(self, n=read_int(self, "n", n, low=0))

    def _lifted(self, pairs: Pairs) -> Array:
        if not is_array(self.n):
            return self.n
        return pairs.xp.astype(pairs.of_batch(self.n), pairs.j.dtype, copy=False)

    def edges(self, nk: int, at: int) -> Edges:
        del nk, at
        return NO_EDGES if np.ndim(self.n) else Edges(keys=(int(self.n),))

    def visible(self, pairs: Pairs) -> Array:
        return pairs.j < self._lifted(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        n: Any = self.n
        if is_array(n):
            n = loops.host_values(n)
            if n is None:
                return np.True_, np.False_
            n = n.reshape(*n.shape, 1, 1)
        return at.j0 < n, at.j1 <= n

    def key_span(self, pairs: Pairs) -> Span:
        return None, self._lifted(pairs)

    def query_span(self, pairs: Pairs) -> Span:
        # A key below n is seen from everywhere, another from nowhere: an end beyond all.
        xp = pairs.xp
        inside = pairs.j < self._lifted(pairs)
        ends = xp.asarray([-(1 << 30), 1 << 30], dtype=pairs.j.dtype, device=pairs.device)
        return xp.where(inside, ends[0], ends[1]), None

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        del nq, nk
        return batch_problem("Prefix's n", self.n.shape, batch) if is_array(self.n) else []


class Global(Pattern):
    """
    The first `n` positions see all and are seen by all: ``j < n or p < n``.

    Parameters
    ----------
    n : int
        How many positions.

    Examples
    --------
    >>> from arrattn.patterns import Global, Window
    >>> (Window(0, 0) | Global(1)).table(3, 3).astype(int)
    array([[1, 1, 1],
           [1, 1, 0],
           [1, 0, 1]])
    """

    n: int

    def __init__(self, n: int) -> None:
        keep(self, n=read_int(self, "n", n, low=0))

    def edges(self, nk: int, at: int) -> Edges:
        del nk
        return Edges((self.n - at,), (self.n,))

    def visible(self, pairs: Pairs) -> Array:
        return (pairs.j < self.n) | (pairs.p < self.n)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        return (at.j0 < self.n) | (at.p0 < self.n), (at.j1 <= self.n) | (at.p1 <= self.n)


def inside(j: Array, span: Span) -> Array:
    """Whether keys lie in a span."""
    lo, hi = span
    if lo is None and hi is None:
        return j == j  # noqa: PLR0124
    if lo is None:
        return j < hi
    return j >= lo if hi is None else (j >= lo) & (j < hi)
