"""Patterns as data: taken apart, put together, cut down to what matters at one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product
from operator import or_
from typing import Any, NamedTuple

import numpy as np

from arrattn._core.typing import Array
from arrattn.patterns._base import And, Not, Or, Pattern, Rectangles, is_array, keep
from arrattn.patterns._positions import Prefix


class Slot(NamedTuple):
    """The place of an array that `detach` took out."""

    number: int


def detach(pattern: Pattern | None, arrays: list[Array]) -> Pattern | None:
    """
    `pattern` with its arrays moved to the end of `arrays`: hashable, for use as a key.
    """
    if pattern is None:
        return None

    def take(x: Array, owner: Pattern) -> Slot:
        del owner
        arrays.append(x)
        return Slot(len(arrays) - 1)

    return _rebuilt(pattern, take, is_array)


def attach(pattern: Pattern | None, arrays: tuple[Array, ...]) -> Pattern | None:
    """Put back what `detach` took out."""
    if pattern is None:
        return None
    return _rebuilt(pattern, lambda x, _: arrays[x.number], lambda x: isinstance(x, Slot))


def _rebuilt(
    pattern: Pattern, swap: Callable[[Any, Pattern], Any], wanted: Callable[[Any], bool]
) -> Pattern:
    new = object.__new__(type(pattern))
    for name, value in vars(pattern).items():
        if isinstance(value, Pattern):
            keep(new, **{name: _rebuilt(value, swap, wanted)})
        else:
            keep(new, **{name: swap(value, pattern) if wanted(value) else value})
    return new


def pick(pattern: Pattern | None, choose: Callable[..., Array]) -> Pattern | None:
    """`pattern` with ``choose(x, trailing=n)`` for each array `x`; `n` axes are no batch axes."""
    if pattern is None:
        return None
    return _rebuilt(pattern, lambda x, owner: choose(x, trailing=owner.trailing), is_array)


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


def within(pattern: Pattern, at: Rectangles) -> Pattern | bool:
    """What a pattern comes down to in one rectangle; True where it sees all, False for none."""
    if isinstance(pattern, Not):
        a = within(pattern.a, at)
        return (not a) if isinstance(a, bool) else Not(a)
    if not isinstance(pattern, And | Or):
        some, every = pattern.rectangles(at)
        return bool(np.all(every)) or (bool(np.any(some)) and pattern)
    end = isinstance(pattern, Or)  # what decides a whole by itself
    a = within(pattern.a, at)
    if a is end:
        return a
    b = within(pattern.b, at)
    if isinstance(a, bool) or isinstance(b, bool):
        return b if isinstance(a, bool) or b is end else a
    return type(pattern)(a, b)


#: Intersections that a pattern is written out into at most.
TERMS = 16


def apart(pattern: Pattern) -> tuple[tuple[int, int] | None, Pattern | None]:
    """
    The band ``lo <= j - p < hi`` around the queries, and what sees pairs outside of it.

    None for the band where the pattern is nowhere confined to one.
    """
    near, rest = [], []
    for term in _terms(pattern):
        lo, hi = term.reach
        if lo is None or hi is None:
            rest.append(term)
        else:
            near.append((lo, max(lo, hi)))
    if not near:
        return None, pattern
    band = min(lo for lo, _ in near), max(hi for _, hi in near)
    return band, reduce(or_, rest) if rest else None


def _terms(pattern: Pattern) -> list[Pattern]:
    """Patterns of which any sees a pair that `pattern` sees."""
    if isinstance(pattern, Or):
        return _terms(pattern.a) + _terms(pattern.b)
    if isinstance(pattern, And):
        a, b = _terms(pattern.a), _terms(pattern.b)
        if len(a) * len(b) <= TERMS:
            return [And(x, y) for x, y in product(a, b)] if len(a) * len(b) > 1 else [pattern]
    return [pattern]
