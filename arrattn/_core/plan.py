"""
Which key tiles each query tile visits, and which of them need no hiding.

A plan that visits too much is slow, one that visits too little is wrong: *the plan covers
the pattern* is a law of the tests. It costs one look at each tile, none at the pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from arrattn._core import loops
from arrattn._core.typing import Array
from arrattn.patterns import FAR, NO_EDGES, Edges, Pattern, Rectangles

EMPTY, PARTIAL, FULL = 0, 1, 2

#: Tile shapes to choose from, and what starting a run of tiles costs, counted in pairs.
TILES = ((1024, 256), (512, 256), (256, 256), (128, 128), (64, 64))
RUN_OVERHEAD = 1 << 14

#: A pattern's edges are followed where they lie at least so far apart, in the mean.
MEAN_EDGE = 64


class Plan(NamedTuple):
    """
    The tiles of a call: `kinds` is EMPTY, PARTIAL or FULL for each (query tile, key tile).

    Leading axes of `kinds` are batch axes, where the pattern differs by batch item. Tiles begin
    at `starts`, of queries and of keys, and are at most as large as `tile`.
    """

    nq: int
    nk: int
    tile: tuple[int, int]
    kinds: np.ndarray[Any, Any]
    starts: tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]

    def __repr__(self) -> str:
        visited, full = int((self.kinds > 0).sum()), int((self.kinds == FULL).sum())
        share = visited / max(self.kinds.size, 1)
        return (
            f"Plan({self.nq} queries x {self.nk} keys in tiles of {self.tile[0]} x {self.tile[1]}: "
            f"{visited} of {self.kinds.size} visited ({share:.1%}), {full} of them full)"
        )

    def merged(self) -> Plan:
        """One table for all batch items: what any of them visits, full where all are."""
        lead = tuple(range(self.kinds.ndim - 2))
        if not lead:
            return self
        some, every = (self.kinds > 0).any(lead), (self.kinds == FULL).all(lead)
        return self._replace(kinds=_kinds(some, every))

    def rows(self, t: int) -> tuple[int, int]:
        """Query range of query tile `t`."""
        return _range(self.starts[0], t, self.nq)

    def columns(self, u: int) -> tuple[int, int]:
        """Key range of key tile `u`."""
        return _range(self.starts[1], u, self.nk)

    def runs(self, t: int, pairs: int, *, apart: bool = False) -> list[tuple[int, int, bool]]:
        """
        Query tile `t`'s visits as key ranges ``(j0, j1, hide)``.

        Neighbouring tiles go together while a run has at most `pairs` pairs; `hide` is
        False where every pair of the run is visible. With `apart`, tiles where it is False
        go together with none where it is True.
        """
        kinds, (i0, i1) = self.kinds[t], self.rows(t)
        visited = (
            (*self.columns(u), bool(kinds[u] != FULL)) for u in np.flatnonzero(kinds).tolist()
        )
        return join_runs(visited, pairs // max(i1 - i0, 1), apart=apart)

    def visits(self) -> np.ndarray[Any, Any]:
        """
        Where the visited key tiles of each query tile begin, padded with -1.
        """
        visited = self.kinds != EMPTY
        most = int(visited.sum(-1).max(initial=1))
        order = np.argsort(~visited, axis=-1, kind="stable")[:, :most]
        starts = np.where(np.take_along_axis(visited, order, -1), self.starts[1][order], -1)
        return starts.astype(np.int32)


def join_runs(
    visited: Iterable[tuple[int, int, bool]], most: int, *, apart: bool = False
) -> list[tuple[int, int, bool]]:
    """Neighbouring key ranges ``(j0, j1, hide)`` put together, to at most so many keys."""
    runs: list[tuple[int, int, bool]] = []
    for j0, j1, hide in visited:
        if runs and runs[-1][1] == j0 and j1 - runs[-1][0] <= most:
            first, _, hidden = runs[-1]
            if hidden == hide or not apart:
                runs[-1] = (first, j1, hidden or hide)
                continue
        runs.append((j0, j1, hide))
    return runs


def make_plan(
    pattern: Pattern | None,
    nq: int,
    nk: int,
    offset: int | Array,
    tile: tuple[int, int],
    edges: Edges = NO_EDGES,
) -> Plan:
    """
    Classify every tile of `pattern`.

    Parameters
    ----------
    pattern : Pattern or None
        None sees everything.
    nq, nk : int
        Number of queries and keys.
    offset : int or array of int, shape (..., 1, 1, 1, 1)
        Position of the first query.
    tile : tuple of (int, int)
        Queries and keys per tile.
    edges : Edges
        Where further tiles begin; left out where there are too many.

    Returns
    -------
    Plan
        Cautious where offsets or the pattern's arrays have no values yet.
    """
    pattern = None if pattern is None else pattern.bound(nk)
    rows = tile_starts(nq, tile[0], edges.queries)
    cols = tile_starts(nk, tile[1], edges.keys)
    some, every = classify(pattern, rows, _stops(rows, nq), cols, _stops(cols, nk), offset)
    return Plan(nq, nk, tile, _kinds(some, every), (rows, cols))


def tile_starts(n: int, size: int, edges: Iterable[int] = ()) -> np.ndarray[Any, Any]:
    """Where tiles begin: at multiples of `size`, and at edges that are not too many."""
    starts = np.arange(0, n, size)
    more = [x for x in edges if 0 < x < n]
    return np.union1d(starts, more) if 0 < len(more) <= n // MEAN_EDGE + 2 else starts


def _stops(starts: Any, n: int) -> Any:
    return np.append(starts[1:], n) if len(starts) else starts


def _range(starts: Any, t: int, n: int) -> tuple[int, int]:
    return int(starts[t]), int(starts[t + 1]) if t + 1 < len(starts) else n


def classify(
    pattern: Pattern | None, i0: Any, i1: Any, j0: Any, j1: Any, offset: int | Array
) -> tuple[Any, Any]:
    """For each range of queries and each of keys: is anything visible, and is everything."""
    shape: tuple[int, ...] = (len(i0), len(j0))
    i0, i1, j0, j1 = i0[:, None], i1[:, None], j0[None, :], j1[None, :]
    if pattern is None:
        some = every = np.True_
    else:
        p0, p1 = _positions(i0, i1, offset)
        some, every = pattern.rectangles(Rectangles(i0, i1, p0, p1, j0, j1))
    shape = np.broadcast_shapes(np.shape(some), np.shape(every), shape)
    return np.broadcast_to(some, shape), np.broadcast_to(every, shape)


def _positions(i0: Any, i1: Any, offset: int | Array) -> tuple[Any, Any]:
    if isinstance(offset, int):
        return i0 + offset, i1 + offset
    known = loops.host_values(offset)
    if known is None:
        return np.full_like(i0, -FAR), np.full_like(i1, FAR)
    known = known.astype(np.int64).reshape(*known.shape[:-4], 1, 1)
    return i0 + known, i1 + known


def _kinds(some: Any, every: Any) -> np.ndarray[Any, Any]:
    kinds: np.ndarray[Any, Any] = np.where(some, np.where(every, FULL, PARTIAL), EMPTY)
    return kinds.astype(np.uint8)


def choose_tile(
    pattern: Pattern | None,
    nq: int,
    nk: int,
    offset: int | Array,
    *,
    lanes: int,
    budget: int,
    grain: int | None = None,
    edges: Edges = NO_EDGES,
) -> tuple[int, int]:
    """
    The tile shape that promises the least work on this pattern.

    A few query tiles are looked at for each candidate: pairs visited, plus a fixed cost for
    every run of tiles that is computed at once. `lanes` score matrices are computed side by
    side, and together they may hold `budget` numbers. With a `grain`, so many rows of a tile
    that see none of its keys are not computed. `edges` are those that `make_plan` is given.
    """
    # Few queries make few tiles, and tiles are what runs side by side.
    fitting = [t for t in TILES if t[0] * t[1] * lanes <= budget and 4 * t[0] <= max(nq, 2048)]
    fitting = fitting or [TILES[-1]]
    if pattern is None or max(nq, nk) <= TILES[-1][0]:
        return fitting[0]

    def cost(tile: tuple[int, int]) -> float:
        rows = min(tile[0], grain or tile[0])
        starts = np.arange(0, nq, rows)
        looked = starts[:: max(1, len(starts) // 32)]
        cols = tile_starts(nk, tile[1], edges.keys)
        stops = _stops(cols, nk)
        some, _ = classify(pattern, looked, np.minimum(looked + rows, nq), cols, stops, offset)
        visits = float((some * (stops - cols)).sum()) / tile[1] * len(starts) / max(len(looked), 1)
        pairs = visits * rows * tile[1] * lanes
        runs = max(nq / tile[0], visits * rows / tile[0])
        return pairs + RUN_OVERHEAD * runs

    return min(fitting, key=cost)
