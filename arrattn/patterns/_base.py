"""What every pattern is and can answer, and how patterns combine."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np

from arrattn._core.tiles import Pairs, TilePairs
from arrattn._core.typing import Array, Device, Namespace

#: Beyond every position; sums of a few of these still fit an int64.
FAR = 1 << 40

Bools = Any
Span = tuple[Any, Any]


class Rectangles(NamedTuple):
    """
    Rectangles of pairs on the host, as integer arrays that broadcast together.

    Query indices ``[i0, i1)``, their positions ``[p0, p1)`` (cautiously wide where the
    offset is not known yet) and keys ``[j0, j1)``. Queries go along the last axis but one, keys
    along the last; batch axes lead where positions have them.
    """

    i0: Any
    i1: Any
    p0: Any
    p1: Any
    j0: Any
    j1: Any


class Edges(NamedTuple):
    """Indices of queries, and of keys, at which something begins or ends."""

    queries: tuple[int, ...] = ()
    keys: tuple[int, ...] = ()


NO_EDGES = Edges()


def joined(a: Edges, b: Edges) -> Edges:
    """The edges of both."""
    return Edges(a.queries + b.queries, a.keys + b.keys)


class Pattern:
    """
    Base of all patterns: the combining operators, and what every pattern can answer.

    A pattern is what its arguments are: it never changes, equal arguments make equal patterns,
    and it is hashable where they are. See `Where` for one made from a function.
    """

    #: How many last axes of a pattern's arrays are not batch axes.
    trailing: ClassVar[int] = 0

    def __setattr__(self, name: str, value: object) -> None:
        msg = f"{type(self).__name__} cannot be changed: make another instead of setting {name}"
        raise AttributeError(msg)

    def __delattr__(self, name: str) -> None:
        self.__setattr__(name, None)

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return False
        parts = zip(vars(self).values(), vars(other).values(), strict=True)
        # An array equals itself alone, whatever it holds.
        return all(a is b or (not (is_array(a) or is_array(b)) and a == b) for a, b in parts)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(brief, vars(self).values()))})"

    @property
    def uniform(self) -> bool:
        """Whether it holds no arrays, so that it is the same for all items, heads and calls."""
        parts = vars(self).values()
        return all(x.uniform if isinstance(x, Pattern) else not is_array(x) for x in parts)

    @property
    def relative(self) -> bool:
        """Whether a pair's visibility depends on ``j - p`` alone."""
        return False

    @property
    def band(self) -> tuple[int | None, int | None] | None:
        """``(lo, hi)`` if a pair is visible exactly where ``lo <= j - p < hi``, None: open."""
        return None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """``(lo, hi)`` such that pairs are visible only where ``lo <= j - p < hi``, None: open."""
        return self.band or (None, None)

    def bound(self, nk: int) -> Pattern:
        """Put in the number of keys, where what is visible depends on it."""
        del nk
        return self

    def edges(self, nk: int, at: int) -> Edges:
        """
        Where what is visible may change for all queries, or for all keys, at once.

        They are hints for a plan, which follows them where they are not too many. `at` is the
        position of the first query.
        """
        del nk, at
        return NO_EDGES

    def visible(self, pairs: Pairs) -> Array:
        """Whether each of these pairs is visible, broadcastable to the pairs."""
        raise NotImplementedError

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        """
        For each rectangle: may any pair be visible, and are all pairs certainly visible.
        """
        del at
        return np.True_, np.False_

    def key_span(self, pairs: Pairs) -> Span | None:
        """
        The keys ``lo <= j < hi`` that each query sees, if they are one interval.

        None in place of the pair means that they are not; None for one end, that it is open.
        """
        del pairs
        return None

    def query_span(self, pairs: Pairs) -> Span | None:
        """The positions ``lo <= p < hi`` that see each key, if they are one interval."""
        del pairs
        return None

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        """What does not fit a call with these lengths and batch axes."""
        del nq, nk, batch
        return []

    def table(
        self,
        nq: int,
        nk: int,
        *,
        q_offset: int | Array | None = None,
        xp: Namespace = np,
        device: Device = None,
    ) -> Array:
        """
        The pattern written out, pair by pair.

        Parameters
        ----------
        nq, nk : int
            Number of queries and of keys.
        q_offset : int or array of int, optional
            Position of the first query. Default: ``nk - nq``.
        xp : namespace, default: numpy
            The library to make the table in; that of the pattern's own arrays.
        device : device, optional
            Where to make it.

        Returns
        -------
        array of bool, shape (nq, nk)
            With the axes (..., 1) before, if the pattern or the offset has batch axes.

        Examples
        --------
        >>> from arrattn.patterns import Causal
        >>> Causal().table(2, 3).astype(int)
        array([[1, 1, 0],
               [1, 1, 1]])
        """
        offset: Any = nk - nq if q_offset is None else q_offset
        if not isinstance(offset, Integral):
            offset = xp.reshape(offset, (*offset.shape, 1, 1, 1, 1))
        pairs = TilePairs(0, nq, 0, nk, offset, xp=xp, device=device)
        seen = self.bound(nk).visible(pairs)
        seen = xp.broadcast_to(seen, (*seen.shape[:-2], nq, nk))
        if seen.ndim == 2:
            return seen
        # One head axis is enough to broadcast; without batch axes, none is.
        return xp.squeeze(seen, axis=-3 if seen.ndim > 4 else (-4, -3))

    def __and__(self, other: Pattern) -> Pattern:
        """Pairs that both see."""
        return And(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: Pattern) -> Pattern:
        """Pairs that either sees."""
        return Or(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> Pattern:
        """Pairs that this one hides."""
        return Not(self)


class And(Pattern):
    """Pairs that both patterns see; written ``a & b``."""

    a: Pattern
    b: Pattern

    def __init__(self, a: Pattern, b: Pattern) -> None:
        keep(self, a=a, b=b)

    def __repr__(self) -> str:
        return " & ".join(f"({x})" if isinstance(x, Or) else f"{x}" for x in (self.a, self.b))

    @property
    def relative(self) -> bool:
        return self.a.relative and self.b.relative

    @property
    def band(self) -> tuple[int | None, int | None] | None:
        return intersect(self.a.band, self.b.band, np)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        return intersect(self.a.reach, self.b.reach, np) or (None, None)

    def bound(self, nk: int) -> Pattern:
        a, b = self.a.bound(nk), self.b.bound(nk)
        return self if a is self.a and b is self.b else And(a, b)

    def edges(self, nk: int, at: int) -> Edges:
        return joined(self.a.edges(nk, at), self.b.edges(nk, at))

    def visible(self, pairs: Pairs) -> Array:
        return self.a.visible(pairs) & self.b.visible(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        (a_any, a_all), (b_any, b_all) = self.a.rectangles(at), self.b.rectangles(at)
        return a_any & b_any, a_all & b_all

    def key_span(self, pairs: Pairs) -> Span | None:
        return intersect(self.a.key_span(pairs), self.b.key_span(pairs), pairs.xp)

    def query_span(self, pairs: Pairs) -> Span | None:
        return intersect(self.a.query_span(pairs), self.b.query_span(pairs), pairs.xp)

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        return self.a.problems(nq, nk, batch) + self.b.problems(nq, nk, batch)


class Or(Pattern):
    """Pairs that either pattern sees; written ``a | b``."""

    a: Pattern
    b: Pattern

    def __init__(self, a: Pattern, b: Pattern) -> None:
        keep(self, a=a, b=b)

    def __repr__(self) -> str:
        return f"{self.a} | {self.b}"

    @property
    def relative(self) -> bool:
        return self.a.relative and self.b.relative

    @property
    def reach(self) -> tuple[int | None, int | None]:
        (a, b), (c, d) = self.a.reach, self.b.reach
        lo = None if a is None or c is None else min(a, c)
        return lo, None if b is None or d is None else max(b, d)

    def bound(self, nk: int) -> Pattern:
        a, b = self.a.bound(nk), self.b.bound(nk)
        return self if a is self.a and b is self.b else Or(a, b)

    def edges(self, nk: int, at: int) -> Edges:
        return joined(self.a.edges(nk, at), self.b.edges(nk, at))

    def visible(self, pairs: Pairs) -> Array:
        return self.a.visible(pairs) | self.b.visible(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        (a_any, a_all), (b_any, b_all) = self.a.rectangles(at), self.b.rectangles(at)
        return a_any | b_any, a_all | b_all

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        return self.a.problems(nq, nk, batch) + self.b.problems(nq, nk, batch)


class Not(Pattern):
    """Pairs that a pattern hides; written ``~a``."""

    a: Pattern

    def __init__(self, a: Pattern) -> None:
        keep(self, a=a)

    def __repr__(self) -> str:
        return f"~({self.a})" if isinstance(self.a, And | Or) else f"~{self.a}"

    @property
    def relative(self) -> bool:
        return self.a.relative

    def bound(self, nk: int) -> Pattern:
        a = self.a.bound(nk)
        return self if a is self.a else Not(a)

    def edges(self, nk: int, at: int) -> Edges:
        return self.a.edges(nk, at)

    def visible(self, pairs: Pairs) -> Array:
        return ~self.a.visible(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        some, every = self.a.rectangles(at)
        return ~np.asarray(every), ~np.asarray(some)

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        return self.a.problems(nq, nk, batch)


# -- Small things -----------------------------------------------------------------------------


def keep(pattern: Pattern, **values: Any) -> None:
    """Store what a pattern is made of, once."""
    vars(pattern).update(values)


def is_array(x: object) -> bool:
    """Whether `x` is an array of some library."""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def dtype_name(x: Array) -> str:
    """The name of an array's dtype, without its library."""
    return str(x.dtype).rpartition(".")[2]


def brief(x: object) -> str:
    """An argument as a pattern prints it: arrays by dtype and shape."""
    if is_array(x):
        return f"<{dtype_name(x)}{list(x.shape)}>"  # type: ignore[attr-defined]
    return repr(x)


def read_int(pattern: Pattern, name: str, value: object, *, low: int) -> int:
    """An argument that has to be an int of at least `low`."""
    kind = f"{type(pattern).__name__}: {name}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{kind}: expected an int, got {value!r} ({type(value).__name__})"
        raise TypeError(msg)
    if value < low:
        msg = f"{kind}: expected at least {low}, got {value}"
        raise ValueError(msg)
    return int(value)


def intersect(a: Span | None, b: Span | None, xp: Namespace) -> Span | None:
    """What lies in both spans; None where one of them is no span."""
    if a is None or b is None:
        return None

    def tighter(x: Any, y: Any, choose: Callable[[Any, Any], Any], host: Any) -> Any:
        if x is None or y is None:
            return y if x is None else x
        if not is_array(x) and not is_array(y):
            return host(x, y)
        return choose(
            *(z if is_array(z) else xp.full_like(x if is_array(x) else y, z) for z in (x, y))
        )

    return tighter(a[0], b[0], xp.maximum, max), tighter(a[1], b[1], xp.minimum, min)
