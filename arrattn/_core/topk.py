"""The best of each row, for NumPy: a bound from groups first, then the few that reach it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from arrattn._core import workspace
from arrattn._core.typing import Array

#: The most numbers of one group.
WIDEST = 32

#: Lengths of the lists that are sorted, the best first.
LISTS = (512, 256, 128, 64)


class Best(NamedTuple):
    """
    The best of each row, in order.

    Attributes
    ----------
    scores : array, shape (R, m)
        Their scores, to be written on; ``-inf`` where there are fewer.
    columns : array of int, shape (R, m)
        Where they stood, ascending.
    """

    scores: Array
    columns: Array


def kth_largest(s: Array, k: int) -> Array:
    """
    The `k`-th largest of each row of ``s (R, m)``, which it uses up; ``-inf`` if there is none.

    A tournament of sorted lists: of two of them, the greater of what is first in one and last
    in the other, and so on, are the best of both.
    """
    n, m = s.shape
    width = max(k, min(LISTS, key=lambda w: (-m % w, -w)))
    if m <= width:
        s.sort(axis=-1)
        return s[:, m - k].copy() if k <= m else np.full(n, -math.inf, s.dtype)
    many = -(-m // width)
    if many * width > m:
        s = np.concatenate([s, np.full((n, many * width - m), -math.inf, s.dtype)], axis=-1)
    s = s.reshape(n, many, width)
    s.sort(axis=-1)
    while many > 1:
        half = many // 2
        won = s[:, many - half : many]
        np.maximum(s[:, :half], won[..., ::-1], out=s[:, :half])
        many -= half
        s[:, :half].sort(axis=-1)
    return s[:, 0, width - k].copy()


def best_of(s: Array, k: int) -> Best:
    """
    The `k` highest of each row of ``s (R, m)``, ties to the first, NaN above all, ``-inf`` never.

    Each group of a row has one that is at least its maximum. So the `k`-th of the maxima is
    a bound: none that is lower can be among the best.
    """
    n, m = s.shape
    width = min(m // (4 * k), WIDEST) if k else 0
    every = np.broadcast_to(np.arange(m), s.shape)
    if width < 2:
        return _highest(s, every, k)
    grouped = s[:, : m - m % width].reshape(n, width, -1)  # neighbours are in different groups
    tops = np.concatenate([grouped.max(axis=1), s[:, m - m % width :]], axis=1)
    if np.isnan(tops).any():
        return _highest(s, every, k)
    bound = np.maximum(kth_largest(tops, k), np.finfo(s.dtype).min)
    above = np.greater_equal(s, bound[:, None], out=workspace.work_space("above", s.shape, bool))
    flat = true_of(above.reshape(-1))
    starts = np.arange(n)[:, None] * m
    edges = np.searchsorted(flat, np.arange(n + 1) * m)
    count = np.diff(edges)[:, None]
    there = np.arange(count.max()) < count
    at = np.where(there, 0, starts)
    at[there] = flat
    scores = np.where(there, s.reshape(-1)[at], -math.inf)
    return _highest(scores, at - starts, k)


def true_of(flags: Array) -> Array:
    """
    ``np.flatnonzero`` of contiguous booleans.

    Where few of many are True it takes several times as long to find each: then eight at a time
    are looked at as one number, and only those that are not 0 one by one.
    """
    if len(flags) % 8 or np.count_nonzero(flags) >= len(flags) / 10:
        return np.flatnonzero(flags)
    eights = flags.view(np.uint64)
    at = true_of(eights != 0)
    within = np.flatnonzero(eights[at].view(bool))
    return at[within >> 3] * 8 + (within & 7)


def _highest(s: Array, columns: Array, k: int) -> Best:
    """The `k` highest of each row, which stand in these columns."""
    n, m = s.shape
    if k >= m:
        return Best(s.copy(), columns)
    if k == 0:
        return Best(s[:, :0], columns[:, :0])
    ranked = np.where(np.isnan(s), math.inf, s) if np.isnan(s).any() else s
    threshold = np.sort(ranked, axis=-1)[:, m - k : m - k + 1]
    chosen = ranked >= threshold
    if np.count_nonzero(chosen) > n * k:
        above = ranked > threshold
        tied = chosen & ~above
        room = k - np.count_nonzero(above, axis=-1, keepdims=True)
        chosen = above | (tied & (np.cumsum(tied, axis=-1) <= room))
    at = np.flatnonzero(chosen).reshape(n, k)
    return Best(s.reshape(-1)[at], columns.reshape(-1)[at])
