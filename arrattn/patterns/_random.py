"""Random keys: drawn by a hash of the position, so that no table of pairs is needed."""

from __future__ import annotations

from functools import lru_cache
from numbers import Integral
from typing import Any

import numpy as np

from arrattn._core.tiles import Pairs, gather_last
from arrattn._core.typing import Array, Device, Namespace
from arrattn.patterns._arrays import every_so_many
from arrattn.patterns._base import Bools, Edges, Pattern, Rectangles, keep, read_int

#: Words of the hash: their products stay within 31 bits, as the integers of some libraries are.
BITS = 15
WORD = (1 << BITS) - 1
ROUNDS = 8

#: Blocks of queries whose draws are kept together for a plan.
CHUNK = 256

#: Where a rectangle should hold so many visible pairs, it is taken to hold one.
SURE = 24


class Random(Pattern):
    """
    For each query `n` keys at random, the same whenever it is asked [1]_.

    The keys are cut into `n` stretches of equal length, to within one, and each query draws one
    key from each: never the same key twice, and any key of a stretch as likely as another.

    Parameters
    ----------
    n : int
        How many keys each query sees; all, where there are no more.
    rng : int or numpy.random.Generator
        The seed. The same seed gives the same pattern on every library.
    size : int, default: 1
        Positions per block, where whole blocks are drawn: the queries of a block see the same
        `n` blocks of keys. A call can skip tiles only where blocks are about as large as they.
    keys : int, optional
        Keys to draw from are those before this one. Default: all keys of the call. What a
        query draws depends on it, so give it where that has to stay the same while the number
        of keys changes, as it does when decoding or padding.

    Notes
    -----
    BigBird is ``Window(w, w) | Global(g) | Random(n, rng, size=w)``. A plan costs O(Nq n / size),
    and no memory is needed beyond the pairs that are looked at.

    References
    ----------
    .. [1] Zaheer et al., Big Bird: Transformers for Longer Sequences, 2020, arXiv:2007.14062.

    Examples
    --------
    >>> from arrattn.patterns import Random
    >>> Random(2, 0).table(4, 6).astype(int)
    array([[0, 1, 0, 0, 0, 1],
           [1, 0, 0, 1, 0, 0],
           [0, 0, 1, 1, 0, 0],
           [0, 1, 0, 1, 0, 0]])
    """

    n: int
    rng: int
    size: int
    keys: int | None

    def __init__(
        self,
        n: int,
        rng: int | np.random.Generator,
        *,
        size: int = 1,
        keys: int | None = None,
    ) -> None:
        keep(
            self,
            n=read_int(self, "n", n, low=0),
            rng=_read_seed(self, rng),
            size=read_int(self, "size", size, low=1),
            keys=None if keys is None else read_int(self, "keys", keys, low=0),
        )

    def __repr__(self) -> str:
        size = "" if self.size == 1 else f", size={self.size}"
        keys = "" if self.keys is None else f", keys={self.keys}"
        return f"Random({self.n}, {self.rng}{size}{keys})"

    def bound(self, nk: int) -> Pattern:
        return self if self.keys is not None else Random(self.n, self.rng, size=self.size, keys=nk)

    def edges(self, nk: int, at: int) -> Edges:
        del at
        return every_so_many(self.size, nk)

    def visible(self, pairs: Pairs) -> Array:
        seen = pairs.j < self._keys
        if self.n == 0 or self._all:
            return seen & (pairs.j < (self._keys if self._all else 0))
        c, xp = pairs.j // self.size, pairs.xp
        width, more = divmod(self._blocks, self.n)
        # The first `more` stretches are longer by one.
        split = more * (width + 1)
        stretch = xp.where(c < split, c // (width + 1), more + (c - split) // width)
        stretch = xp.minimum(stretch, xp.full_like(stretch, self.n - 1))
        drawn = self.drawn(pairs.p // self.size, xp, pairs.device)  # (..., nq, n)
        lead = np.broadcast_shapes(drawn.shape[:-1], stretch.shape[:-1])
        drawn = xp.broadcast_to(drawn, (*lead, self.n))
        stretch = xp.broadcast_to(stretch, (*lead, stretch.shape[-1]))
        return seen & (gather_last(drawn, stretch, xp=xp) == c)

    def rectangles(self, at: Rectangles) -> tuple[Bools, Bools]:
        before, inside = at.j0 < self._keys, at.j1 <= self._keys
        if self.n == 0 or self._all:
            return (before, inside) if self._all else (np.False_, np.False_)
        p0, p1 = np.ravel(at.p0), np.ravel(at.p1)
        if p0.size and (p1 - p0).max() >= 1 << 30:  # where the offset is not known yet
            return before, np.False_
        c0 = at.j0 // self.size
        c1 = -(-np.minimum(at.j1, self._keys) // self.size)
        if self.size == 1 and self._sure(p1 - p0, c1 - c0):
            return before, np.False_
        firsts, stops = p0 // self.size, -(-p1 // self.size)
        counts, sizes = [], []
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
            chunks = range(first // CHUNK, -(-stop // CHUNK))
            tables = [_table(self, c)[max(first - c * CHUNK, 0) : stop - c * CHUNK] for c in chunks]
            drawn = np.sort(np.concatenate(tables), axis=None)
            counts.append((drawn.searchsorted(c1) - drawn.searchsorted(c0)).ravel())
            sizes.append(stop - first)
        shape = (*np.shape(at.p0)[:-1], np.shape(at.j0)[-1])
        count = np.reshape(counts, shape)
        blocks = np.reshape(sizes, np.shape(at.p0))
        return before & (count > 0), inside & (count == blocks * (c1 - c0))

    def _sure(self, queries: Any, keys: Any) -> bool:
        """Whether so many pairs are expected in each rectangle that to look is not worth while."""
        pairs = int(np.min(queries, initial=1 << 30)) * int(np.min(keys, initial=1 << 30))
        return pairs * self.n >= SURE * self._keys

    @property
    def _keys(self) -> int:
        if self.keys is None:
            msg = f"{self}: how many keys there are is not known here; give keys="
            raise ValueError(msg)
        return self.keys

    @property
    def _blocks(self) -> int:
        return -(-self._keys // self.size)

    @property
    def _all(self) -> bool:
        return self.n >= self._blocks

    def drawn(self, block: Array, xp: Namespace, device: Device) -> Array:
        """The blocks of keys, ascending, that blocks of queries ``(..., 1)`` see: ``(..., n)``."""
        width, more = divmod(self._blocks, self.n)
        t = xp.arange(self.n, dtype=block.dtype, device=device)
        longer = xp.astype(t < more, block.dtype)
        first = t * width + xp.minimum(t, xp.full_like(t, more))
        keys = _round_keys(self.rng)
        half = ROUNDS // 2
        hi, lo = _mixed((block >> BITS) & WORD, block & WORD, keys[:half])
        hi, lo = _mixed(hi ^ (t >> BITS), lo ^ (t & WORD), keys[half:])
        drawn: Array = first + ((hi << BITS) | lo) % (width + longer)
        return drawn


def _mixed(hi: Array, lo: Array, keys: tuple[tuple[int, int], ...]) -> tuple[Array, Array]:
    """Two words, stirred: a Feistel network, in which every round can be undone."""
    for a, b in keys:
        lo = lo ^ ((((hi + a) & WORD) * 27947 >> 8) & WORD)
        hi = hi ^ ((((lo + b) & WORD) * 22123 >> 8) & WORD)
    return hi, lo


# A plan asks again and again.
@lru_cache(maxsize=64)
def _table(pattern: Random, chunk: int) -> np.ndarray[Any, Any]:
    """What the blocks of queries of a chunk draw, ``(CHUNK, n)``, on the host."""
    blocks = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
    return np.asarray(pattern.drawn(blocks[:, None], np, None))


@lru_cache(maxsize=64)
def _round_keys(seed: int) -> tuple[tuple[int, int], ...]:
    drawn = np.random.default_rng(seed).integers(0, WORD + 1, size=(ROUNDS, 2))
    return tuple((int(a), int(b)) for a, b in drawn)


def _read_seed(pattern: Pattern, rng: Any) -> int:
    if isinstance(rng, np.random.Generator):
        return int(rng.integers(1 << 31))
    if isinstance(rng, bool) or not isinstance(rng, Integral):
        msg = (
            "Random: rng: expected an int or a numpy.random.Generator, "
            f"got {rng!r} ({type(rng).__name__})"
        )
        raise TypeError(msg)
    return read_int(pattern, "rng", rng, low=0)
