"""
Who may see whom: small objects that combine with ``&``, ``|`` and ``~``.

A pattern is a statement about a query's position `p` and a key's position `j`; no (Nq, Nk)
array stands behind it. Each answers two questions: is this pair visible, and is this
rectangle of pairs empty, full or in between. The second is what lets an attention skip
tiles, and it may be cautious ("in between" is always a right answer); the first is exact.

Longformer is ``Window(w, w) | Global(g)`` [1]_, a streaming window with sinks is
``Causal() & (Window(w, 0) | Global(4))`` [2]_, packed documents are
``Causal() & Segments(ids, ids)``.

References
----------
.. [1] Beltagy et al., Longformer, 2020, arXiv:2004.05150.
.. [2] Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
   arXiv:2309.17453.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, NamedTuple

import numpy as np

from arrattn._core import loops
from arrattn._core.tiles import Pairs, TilePairs
from arrattn._core.typing import Array, Device, Namespace

__all__ = [
    "Blocks",
    "Causal",
    "Global",
    "Pattern",
    "Prefix",
    "Segments",
    "Strided",
    "Where",
    "Window",
]

#: Beyond every position; sums of a few of these still fit an int64.
FAR = 1 << 40

Bools = Any
Span = tuple[Any, Any]


class Rectangles(NamedTuple):
    """
    Rectangles of pairs on the host, as integer arrays that broadcast together.

    Query indices ``[i0, i1)``, their positions ``[p0, p1)`` (cautiously wide where the
    offset is not known yet) and keys ``[j0, j1)``. Batch axes lead where positions have them.
    """

    i0: Any
    i1: Any
    p0: Any
    p1: Any
    j0: Any
    j1: Any


class Pattern:
    """
    Base of all patterns: the combining operators, and what every pattern can answer.

    Subclasses are frozen dataclasses; see `Where` for one made from a function.
    """

    #: How many last axes of a pattern's arrays are not batch axes.
    trailing: ClassVar[int] = 0

    @property
    def relative(self) -> bool:
        """Whether a pair's visibility depends on ``j - p`` alone."""
        return False

    @property
    def band(self) -> tuple[int | None, int | None] | None:
        """``(lo, hi)`` if a pair is visible exactly where ``lo <= j - p < hi``, None: open."""
        return None

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
        seen = self.visible(pairs)
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


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                _store_int(self, name, low=0)

    def __repr__(self) -> str:
        return f"Window({self.left}, {self.right})"

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
        return _inside(pairs.j, self.key_span(pairs))

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


@dataclass(frozen=True)
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

    left: int | None = dataclasses.field(default=None, init=False)
    right: int | None = dataclasses.field(default=0, init=False)

    def __repr__(self) -> str:
        return "Causal()"


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        if _is_array(self.n) and not isinstance(self.n, Integral):
            _require_integer_array("n", self.n)
        else:
            _store_int(self, "n", low=0)

    def __repr__(self) -> str:
        return f"Prefix({_brief(self.n)})"

    def _lifted(self, pairs: Pairs) -> Array:
        if not _is_array(self.n):
            return self.n
        return pairs.xp.astype(pairs.of_batch(self.n), pairs.j.dtype, copy=False)

    def visible(self, pairs: Pairs) -> Array:
        return pairs.j < self._lifted(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        n: Any = self.n
        if _is_array(n):
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
        return _batch_problem("Prefix's n", self.n.shape, batch) if _is_array(self.n) else []


@dataclass(frozen=True)
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

    def __post_init__(self) -> None:
        _store_int(self, "n", low=0)

    def __repr__(self) -> str:
        return f"Global({self.n})"

    def visible(self, pairs: Pairs) -> Array:
        return (pairs.j < self.n) | (pairs.p < self.n)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        return (at.j0 < self.n) | (at.p0 < self.n), (at.j1 <= self.n) | (at.p1 <= self.n)


@dataclass(frozen=True)
class Strided(Pattern):
    """
    Every `step`-th key, counted from the query: ``(p - j) % step == 0``.

    Parameters
    ----------
    step : int
        The stride, at least 1.

    Examples
    --------
    >>> from arrattn.patterns import Strided
    >>> Strided(2).table(3, 3).astype(int)
    array([[1, 0, 1],
           [0, 1, 0],
           [1, 0, 1]])
    """

    step: int

    def __post_init__(self) -> None:
        _store_int(self, "step", low=1)

    def __repr__(self) -> str:
        return f"Strided({self.step})"

    @property
    def relative(self) -> bool:
        return True

    def visible(self, pairs: Pairs) -> Array:
        return (pairs.p - pairs.j) % self.step == 0

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        lo, hi = at.p0 - at.j1 + 1, at.p1 - 1 - at.j0
        single = (lo == hi) & (lo % self.step == 0)
        return hi // self.step * self.step >= lo, single | np.equal(self.step, 1)


@dataclass(frozen=True)
class Segments(Pattern):
    """
    Query and key in the same segment: ``q_ids[i] == k_ids[j]``, by index.

    Parameters
    ----------
    q_ids : array of int, shape (..., Nq)
        The segment of each query. An id that no key has sees nothing.
    k_ids : array of int, shape (..., Nk)
        The segment of each key.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.patterns import Segments
    >>> ids = np.array([0, 0, 1])
    >>> Segments(ids, ids).table(3, 3).astype(int)
    array([[1, 1, 0],
           [1, 1, 0],
           [0, 0, 1]])
    """

    trailing: ClassVar[int] = 1
    q_ids: Array
    k_ids: Array

    def __post_init__(self) -> None:
        for name in ("q_ids", "k_ids"):
            _require_integer_array(name, getattr(self, name))
            if getattr(self, name).ndim == 0:
                msg = f"{name}: expected shape (..., N), got a 0-dimensional array"
                raise ValueError(msg)

    def __repr__(self) -> str:
        return f"Segments({_brief(self.q_ids)}, {_brief(self.k_ids)})"

    def visible(self, pairs: Pairs) -> Array:
        def whole(ids: Array) -> Array:
            return pairs.xp.astype(ids, pairs.j.dtype, copy=False)

        return whole(pairs.of_queries(self.q_ids)) == whole(pairs.of_keys(self.k_ids))

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        q_ids, k_ids = loops.host_values(self.q_ids), loops.host_values(self.k_ids)
        if q_ids is None or k_ids is None:
            return np.True_, np.False_
        q_lo, q_hi = _extremes(q_ids, at.i0, at.i1)
        k_lo, k_hi = _extremes(k_ids, at.j0, at.j1)
        q_lo, q_hi = q_lo[..., :, None], q_hi[..., :, None]
        k_lo, k_hi = k_lo[..., None, :], k_hi[..., None, :]
        same = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
        return (q_lo <= k_hi) & (k_lo <= q_hi), same

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        out = []
        for name, ids, n in (("query", self.q_ids, nq), ("key", self.k_ids, nk)):
            if ids.shape[-1] != n:
                out.append(
                    f"segment ids: expected one per {name}, shape (..., {n}), "
                    f"got shape {tuple(ids.shape)}"
                )
            else:
                out += _batch_problem(f"segment ids of the {name} side", ids.shape[:-1], batch)
        return out


@dataclass(frozen=True)
class Blocks(Pattern):
    """
    A table over blocks of positions: ``table[p // size, j // size]``.

    Parameters
    ----------
    table : array of bool, shape (query blocks, key blocks)
        Which key blocks each query block sees. A position outside the table sees nothing
        and is not seen.
    size : int
        Positions per block, at least 1.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.patterns import Blocks
    >>> Blocks(np.array([[True, False], [True, True]]), 2).table(4, 4).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 1],
           [1, 1, 1, 1]])
    """

    trailing: ClassVar[int] = 2
    block_table: Array
    size: int

    def __init__(self, table: Array, size: int) -> None:
        object.__setattr__(self, "block_table", table)
        object.__setattr__(self, "size", size)
        if not _is_array(table) or _dtype_name(table) != "bool" or table.ndim != 2:
            msg = f"table: expected a 2-dimensional array of bool, got {_brief(table)}"
            raise TypeError(msg)
        _store_int(self, "size", low=1)

    def __repr__(self) -> str:
        return f"Blocks({_brief(self.block_table)}, {self.size})"

    def visible(self, pairs: Pairs) -> Array:
        xp, (rows, cols) = pairs.xp, self.block_table.shape
        r, c = pairs.p // self.size, pairs.j // self.size
        inside = (r >= 0) & (r < rows) & (c >= 0) & (c < cols)
        if rows * cols == 0:
            return inside
        at = xp.where(inside, r * cols + c, xp.zeros_like(r * cols + c))
        flat = xp.reshape(self.block_table, (-1,))
        return inside & xp.reshape(xp.take(flat, xp.reshape(at, (-1,)), axis=0), at.shape)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        table = loops.host_values(self.block_table)
        if table is None:
            return np.True_, np.False_
        rows, cols = table.shape
        sums = np.zeros((rows + 1, cols + 1), np.int64)
        sums[1:, 1:] = table.cumsum(0).cumsum(1)
        r0, r1 = np.clip(at.p0 // self.size, 0, rows), np.clip(-(-at.p1 // self.size), 0, rows)
        c0, c1 = np.clip(at.j0 // self.size, 0, cols), np.clip(-(-at.j1 // self.size), 0, cols)
        count = sums[r1, c1] - sums[r0, c1] - sums[r1, c0] + sums[r0, c0]
        inside = (at.p0 >= 0) & (at.p1 <= rows * self.size) & (at.j1 <= cols * self.size)
        return count > 0, inside & (count == (r1 - r0) * (c1 - c0))


@dataclass(frozen=True)
class Where(Pattern):
    """
    Any rule of yours: ``fn(p, j) -> array of bool``.

    No tile can be skipped on its account; combine it with a pattern that can.

    Parameters
    ----------
    fn : callable
        Takes integer arrays of positions that broadcast together, gives a boolean array
        that broadcasts to their common shape. Under JAX it is traced: it must depend on
        nothing else that changes.

    Examples
    --------
    >>> from arrattn.patterns import Causal, Where
    >>> (Causal() & Where(lambda p, j: j % 2 == 0)).table(3, 3).astype(int)
    array([[1, 0, 0],
           [1, 0, 0],
           [1, 0, 1]])
    """

    fn: Callable[[Array, Array], Array]

    def __post_init__(self) -> None:
        if not callable(self.fn):
            msg = f"fn: expected a callable fn(p, j), got {type(self.fn).__name__}"
            raise TypeError(msg)

    def __repr__(self) -> str:
        return f"Where({getattr(self.fn, '__name__', self.fn)})"

    def visible(self, pairs: Pairs) -> Array:
        seen = self.fn(pairs.p, pairs.j)
        if not _is_array(seen) or _dtype_name(seen) != "bool":
            msg = f"Where: fn(p, j) must return an array of bool, got {_brief(seen)}"
            raise TypeError(msg)
        return seen


@dataclass(frozen=True)
class Masked(Pattern):
    """A caller's own boolean mask, ``(..., Hkv, G, Nq, Nk)``, any axis 1. Not public."""

    trailing: ClassVar[int] = 4
    mask: Array

    def __repr__(self) -> str:
        return f"Masked({_brief(self.mask)})"

    def visible(self, pairs: Pairs) -> Array:
        return pairs.of_pairs(self.mask)


@dataclass(frozen=True)
class Unforbidden(Pattern):
    """Where a bias, shaped as `Masked`'s mask, is not ``-inf``. Not public."""

    trailing: ClassVar[int] = 4
    bias: Array

    def __repr__(self) -> str:
        return f"Unforbidden({_brief(self.bias)})"

    def visible(self, pairs: Pairs) -> Array:
        return pairs.of_pairs(self.bias) != -float("inf")


@dataclass(frozen=True)
class OwnBlock(Pattern):
    """Keys of the block of `size` in which the query lies, of `n` keys. Not public."""

    size: int
    n: int

    def __repr__(self) -> str:
        return f"OwnBlock({self.size})"

    def visible(self, pairs: Pairs) -> Array:
        return (pairs.p // self.size == pairs.j // self.size) & (pairs.p < self.n)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        size, n = self.size, self.n
        p0, p1 = at.p0 // size, (np.minimum(at.p1, n) - 1) // size
        j0, j1 = at.j0 // size, (at.j1 - 1) // size
        some = (p0 <= j1) & (p1 >= j0) & (at.p0 < n)
        return some, (p0 == p1) & (j0 == j1) & (p0 == j0) & (at.p1 <= n)


@dataclass(frozen=True)
class And(Pattern):
    """Pairs that both patterns see; written ``a & b``."""

    a: Pattern
    b: Pattern

    def __repr__(self) -> str:
        return " & ".join(f"({x})" if isinstance(x, Or) else f"{x}" for x in (self.a, self.b))

    @property
    def relative(self) -> bool:
        return self.a.relative and self.b.relative

    @property
    def band(self) -> tuple[int | None, int | None] | None:
        return _intersect(self.a.band, self.b.band, np)

    def visible(self, pairs: Pairs) -> Array:
        return self.a.visible(pairs) & self.b.visible(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        (a_any, a_all), (b_any, b_all) = self.a.rectangles(at), self.b.rectangles(at)
        return a_any & b_any, a_all & b_all

    def key_span(self, pairs: Pairs) -> Span | None:
        return _intersect(self.a.key_span(pairs), self.b.key_span(pairs), pairs.xp)

    def query_span(self, pairs: Pairs) -> Span | None:
        return _intersect(self.a.query_span(pairs), self.b.query_span(pairs), pairs.xp)

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        return self.a.problems(nq, nk, batch) + self.b.problems(nq, nk, batch)


@dataclass(frozen=True)
class Or(Pattern):
    """Pairs that either pattern sees; written ``a | b``."""

    a: Pattern
    b: Pattern

    def __repr__(self) -> str:
        return f"{self.a} | {self.b}"

    @property
    def relative(self) -> bool:
        return self.a.relative and self.b.relative

    def visible(self, pairs: Pairs) -> Array:
        return self.a.visible(pairs) | self.b.visible(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        (a_any, a_all), (b_any, b_all) = self.a.rectangles(at), self.b.rectangles(at)
        return a_any | b_any, a_all | b_all

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        return self.a.problems(nq, nk, batch) + self.b.problems(nq, nk, batch)


@dataclass(frozen=True)
class Not(Pattern):
    """Pairs that a pattern hides; written ``~a``."""

    a: Pattern

    def __repr__(self) -> str:
        return f"~({self.a})" if isinstance(self.a, And | Or) else f"~{self.a}"

    @property
    def relative(self) -> bool:
        return self.a.relative

    def visible(self, pairs: Pairs) -> Array:
        return ~self.a.visible(pairs)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        some, every = self.a.rectangles(at)
        return ~np.asarray(every), ~np.asarray(some)

    def problems(self, nq: int, nk: int, batch: tuple[int, ...]) -> list[str]:
        return self.a.problems(nq, nk, batch)


# -- Patterns as data: their arrays apart from their structure --------------------------------


@dataclass(frozen=True)
class Slot:
    """The place of an array that `detach` took out."""

    index: int


def detach(pattern: Pattern | None, arrays: list[Array]) -> Pattern | None:
    """
    `pattern` with its arrays moved to the end of `arrays`: hashable, for use as a key.
    """
    if pattern is None:
        return None

    def keep(x: Array, owner: Pattern) -> Slot:
        del owner
        arrays.append(x)
        return Slot(len(arrays) - 1)

    return _rebuilt(pattern, keep, _is_array)


def attach(pattern: Pattern | None, arrays: tuple[Array, ...]) -> Pattern | None:
    """Put back what `detach` took out."""
    if pattern is None:
        return None
    return _rebuilt(pattern, lambda x, _: arrays[x.index], lambda x: isinstance(x, Slot))


def _rebuilt(
    pattern: Pattern, swap: Callable[[Any, Pattern], Any], wanted: Callable[[Any], bool]
) -> Pattern:
    new = object.__new__(type(pattern))
    for field in dataclasses.fields(pattern):  # type: ignore[arg-type]
        value = getattr(pattern, field.name)
        if isinstance(value, Pattern):
            value = _rebuilt(value, swap, wanted)
        elif wanted(value):
            value = swap(value, pattern)
        object.__setattr__(new, field.name, value)
    return new


def pick(pattern: Pattern | None, choose: Callable[..., Array]) -> Pattern | None:
    """`pattern` with ``choose(x, trailing=n)`` for each array `x`; `n` axes are no batch axes."""
    if pattern is None:
        return None
    return _rebuilt(pattern, lambda x, owner: choose(x, trailing=owner.trailing), _is_array)


def within_prefix(pattern: Pattern | None, nk: int) -> tuple[Pattern | None, int]:
    """
    `pattern` without the prefixes of known length in its intersection, and how many of
    `nk` keys they leave.
    """
    if isinstance(pattern, And):
        a, nk = within_prefix(pattern.a, nk)
        b, nk = within_prefix(pattern.b, nk)
        return both(a, b), nk
    if isinstance(pattern, Prefix) and np.ndim(pattern.n) == 0:
        return None, min(nk, int(pattern.n))
    return pattern, nk


def both(*parts: Pattern | None) -> Pattern | None:
    """The intersection of those that are given; None where none is."""
    out: Pattern | None = None
    for part in parts:
        if part is not None:
            out = part if out is None else out & part
    return out


# -- Small things -----------------------------------------------------------------------------


def _is_array(x: object) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


def _dtype_name(x: Array) -> str:
    return str(x.dtype).rpartition(".")[2]


def _brief(x: object) -> str:
    if _is_array(x):
        return f"<{_dtype_name(x)}{list(x.shape)}>"  # type: ignore[attr-defined]
    return repr(x)


def _require_integer_array(name: str, x: object) -> None:
    if not _is_array(x) or "int" not in _dtype_name(x):
        msg = f"{name}: expected an array of integers, got {_brief(x)}"
        raise TypeError(msg)


def _store_int(pattern: Pattern, name: str, *, low: int) -> None:
    value = getattr(pattern, name)
    kind = f"{type(pattern).__name__}: {name}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        msg = f"{kind}: expected an int, got {value!r} ({type(value).__name__})"
        raise TypeError(msg)
    if value < low:
        msg = f"{kind}: expected at least {low}, got {value}"
        raise ValueError(msg)
    object.__setattr__(pattern, name, int(value))


def _batch_problem(name: str, shape: tuple[int, ...], batch: tuple[int, ...]) -> list[str]:
    try:
        fits = np.broadcast_shapes(shape, batch) == batch
    except ValueError:
        fits = False
    if fits:
        return []
    return [f"{name}: leading axes {tuple(shape)} do not broadcast to the batch axes {batch}"]


def _inside(j: Array, span: Span) -> Array:
    lo, hi = span
    if lo is None and hi is None:
        return j == j  # noqa: PLR0124
    if lo is None:
        return j < hi
    return j >= lo if hi is None else (j >= lo) & (j < hi)


def _intersect(a: Span | None, b: Span | None, xp: Namespace) -> Span | None:
    if a is None or b is None:
        return None

    def tighter(x: Any, y: Any, choose: Callable[[Any, Any], Any], host: Any) -> Any:
        if x is None or y is None:
            return y if x is None else x
        if not _is_array(x) and not _is_array(y):
            return host(x, y)
        return choose(
            *(z if _is_array(z) else _like(z, x if _is_array(x) else y, xp) for z in (x, y))
        )

    return tighter(a[0], b[0], xp.maximum, max), tighter(a[1], b[1], xp.minimum, min)


def _like(value: int, array: Array, xp: Namespace) -> Array:
    return xp.full_like(array, value)


def _extremes(ids: Any, start: Any, stop: Any) -> tuple[Any, Any]:
    """Smallest and largest id in each range ``start:stop`` of the last axis."""
    ranges = list(zip(np.ravel(start).tolist(), np.ravel(stop).tolist(), strict=True))
    lead = ids.shape[:-1]
    if not ranges:
        return np.zeros((*lead, 0), ids.dtype), np.zeros((*lead, 0), ids.dtype)
    lo = np.stack([ids[..., a:b].min(-1) for a, b in ranges], -1)
    hi = np.stack([ids[..., a:b].max(-1) for a, b in ranges], -1)
    return lo, hi
