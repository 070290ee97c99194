"""
Patterns described twice: how to build one, and, pair by pair, what it means.

The meaning is written as the formula of the pattern's documentation over plain Python
integers, and shares no code with `arrattn.patterns`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from arrattn import patterns

#: Batch item, query index, its position, key: is the pair visible?
Sees = Callable[[tuple[int, ...], int, int, int], bool]
Move = Callable[[np.ndarray[Any, Any]], Any]


@dataclass(frozen=True)
class Sight:
    """
    A pattern, its meaning and how it prints.

    Parameters
    ----------
    text : str
        How it is written.
    build : callable
        Makes the pattern, given what moves its arrays to a library.
    sees : callable
        ``sees(b, i, p, j)``.
    """

    text: str
    build: Callable[[Move], patterns.Pattern]
    sees: Sees

    def __repr__(self) -> str:
        return self.text

    def __and__(self, other: Sight) -> Sight:
        return Sight(
            f"({self} & {other})",
            lambda move: self.build(move) & other.build(move),
            lambda b, i, p, j: self.sees(b, i, p, j) and other.sees(b, i, p, j),
        )

    def __or__(self, other: Sight) -> Sight:
        return Sight(
            f"({self} | {other})",
            lambda move: self.build(move) | other.build(move),
            lambda b, i, p, j: self.sees(b, i, p, j) or other.sees(b, i, p, j),
        )

    def __invert__(self) -> Sight:
        return Sight(
            f"~{self}",
            lambda move: ~self.build(move),
            lambda b, i, p, j: not self.sees(b, i, p, j),
        )

    def table(
        self, nq: int, nk: int, batch: tuple[int, ...], offset: np.ndarray[Any, Any]
    ) -> np.ndarray[Any, Any]:
        """Every pair, one after the other: (*batch, 1, nq, nk). `offset` is over the batch."""
        seen = np.zeros((*batch, 1, nq, nk), bool)
        for b in np.ndindex(*batch):
            for i in range(nq):
                p = i + int(offset[b])
                for j in range(nk):
                    seen[(*b, 0, i, j)] = self.sees(b, i, p, j)
        return seen


def item(x: np.ndarray[Any, Any], b: tuple[int, ...], trailing: int) -> np.ndarray[Any, Any]:
    """Batch item `b` of an array whose batch axes may be fewer, or of length 1."""
    lead = x.shape[: x.ndim - trailing]
    own = b[len(b) - len(lead) :]
    at: np.ndarray[Any, Any] = x[tuple(0 if n == 1 else k for n, k in zip(lead, own, strict=True))]
    return at


def causal() -> Sight:
    """Keys up to the position."""
    return Sight("Causal()", lambda _: patterns.Causal(), lambda b, i, p, j: j <= p)


def window(left: int | None, right: int | None) -> Sight:
    """Keys near the position."""

    def sees(b: tuple[int, ...], i: int, p: int, j: int) -> bool:
        return (left is None or p - left <= j) and (right is None or j <= p + right)

    return Sight(f"Window({left}, {right})", lambda _: patterns.Window(left, right), sees)


def prefix(n: int | np.ndarray[Any, Any]) -> Sight:
    """The first `n` keys, `n` over the batch."""
    if isinstance(n, int):
        return Sight(f"Prefix({n})", lambda _: patterns.Prefix(n), lambda b, i, p, j: j < n)
    return Sight(
        f"Prefix(np.array({n.tolist()}))",
        lambda move: patterns.Prefix(move(n)),
        lambda b, i, p, j: j < int(item(n, b, 0)),
    )


def everywhere(n: int) -> Sight:
    """Some tokens that see all and are seen by all."""
    return Sight(f"Global({n})", lambda _: patterns.Global(n), lambda b, i, p, j: j < n or p < n)


def strided(step: int) -> Sight:
    """Every so many keys from the position."""
    return Sight(
        f"Strided({step})", lambda _: patterns.Strided(step), lambda b, i, p, j: (p - j) % step == 0
    )


def dilated(step: int, left: int | None, right: int | None) -> Sight:
    """Keys near the position, every so many."""

    def sees(b: tuple[int, ...], i: int, p: int, j: int) -> bool:
        m, off = divmod(j - p, step)
        return off == 0 and (left is None or -left <= m) and (right is None or m <= right)

    text = f"Dilated({step}, {left}, {right})"
    return Sight(text, lambda _: patterns.Dilated(step, left, right), sees)


def fixed(size: int, n: int) -> Sight:
    """The own stretch, and the ends of all stretches."""
    return Sight(
        f"Fixed({size}, {n})",
        lambda _: patterns.Fixed(size, n),
        lambda b, i, p, j: p // size == j // size or j % size in range(size - n, size),
    )


def random_keys(n: int, seed: int, size: int, keys: int) -> Sight:
    """Blocks of keys that are drawn."""

    def sees(b: tuple[int, ...], i: int, p: int, j: int) -> bool:
        return j < keys and j // size in drawn_blocks(n, seed, p // size, -(-keys // size))

    text = f"Random({n}, {seed}, size={size}, keys={keys})"
    return Sight(text, lambda _: patterns.Random(n, seed, size=size, keys=keys), sees)


@lru_cache(maxsize=4096)
def drawn_blocks(n: int, seed: int, query: int, blocks: int) -> tuple[int, ...]:
    """The blocks of keys that a block of queries draws, in Python's own integers."""
    if n == 0 or n >= blocks:
        return tuple(range(blocks)) if n else ()
    rounds = np.random.default_rng(seed).integers(0, 1 << 15, size=(8, 2)).tolist()
    cuts = [blocks // n * t + min(t, blocks % n) for t in range(n + 1)]

    def stir(hi: int, lo: int, keys: list[list[int]]) -> tuple[int, int]:
        for a, b in keys:
            lo ^= (hi + a) % 32768 * 27947 // 256 % 32768
            hi ^= (lo + b) % 32768 * 22123 // 256 % 32768
        return hi, lo

    hi, lo = stir(query // 32768 % 32768, query % 32768, rounds[:4])
    drawn = []
    for t in range(n):
        high, low = stir(hi ^ t // 32768, lo ^ t % 32768, rounds[4:])
        drawn.append(cuts[t] + (high * 32768 + low) % (cuts[t + 1] - cuts[t]))
    return tuple(drawn)


def segments(q_ids: np.ndarray[Any, Any], k_ids: np.ndarray[Any, Any]) -> Sight:
    """Keys of the same segment."""
    return Sight(
        f"Segments(np.array({q_ids.tolist()}), np.array({k_ids.tolist()}))",
        lambda move: patterns.Segments(move(q_ids), move(k_ids)),
        lambda b, i, p, j: bool(item(q_ids, b, 1)[i] == item(k_ids, b, 1)[j]),
    )


def blocks(table: np.ndarray[Any, Any], size: int) -> Sight:
    """A table over blocks of positions and of keys."""
    rows, cols = table.shape

    def sees(b: tuple[int, ...], i: int, p: int, j: int) -> bool:
        r, c = p // size, j // size
        return 0 <= r < rows and 0 <= c < cols and bool(table[r, c])

    return Sight(
        f"Blocks(np.array({table.astype(int).tolist()}) > 0, {size})",
        lambda move: patterns.Blocks(move(table), size),
        sees,
    )


def where(a: int, b: int) -> Sight:
    """A rule that is a pattern of no other kind."""

    def rule(p: Any, j: Any) -> Any:
        return (a * p + b * j) % 3 != 0

    return Sight(
        f"Where(lambda p, j: ({a} * p + {b} * j) % 3 != 0)",
        lambda _: patterns.Where(rule),
        lambda _, i, p, j: (a * p + b * j) % 3 != 0,
    )
