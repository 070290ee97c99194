"""The best of each row, for NumPy: a threshold from groups first, then the few above it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from arrattn._core.typing import Array

#: The most numbers of one group.
WIDEST = 32

#: Lengths of the lists that are sorted, the best first.
LISTS = (512, 256, 128, 64)


class Best(NamedTuple):
    """
    Some of each row, in order, among them the best.

    Attributes
    ----------
    scores : array, shape (R, m)
        Their scores.
    columns : array of int, shape (R, m)
        Where they stood, ascending; 0 in what only fills up the row.
    chosen : array of bool, shape (R, m)
        Which are the best.
    """

    scores: Array
    columns: Array
    chosen: Array


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
    width = min(m // (2 * k), WIDEST) if k else 0
    if width < 2:
        return _all(s, k)
    many = m // width
    # Neighbours in memory are what maxima are quickly taken of.
    turned = not s.flags.c_contiguous and s.T.flags.c_contiguous
    if turned:
        tops = s.T[: width * many].reshape(width, many, n).max(axis=0).T
    else:
        tops = s[:, : width * many].reshape(n, width, many).max(axis=1)
    tops = np.concatenate([tops, s[:, width * many :]], axis=1)
    if np.isnan(tops).any():
        return _all(s, k)
    at = tops.shape[1] - k
    tops.partition(at, axis=-1)
    bound = np.maximum(tops[:, at], np.finfo(s.dtype).min)
    if turned:
        flat = np.flatnonzero(np.greater_equal(s.T, bound))
        found, columns, rows = s.T.reshape(-1)[flat], *np.divmod(flat, n)
        order = np.argsort(rows.astype(np.int16 if n < 1 << 15 else rows.dtype), kind="stable")
        found, columns, rows = found[order], columns[order], rows[order]
    else:
        flat = np.flatnonzero(s >= bound[:, None])
        found, rows, columns = s.reshape(-1)[flat], *np.divmod(flat, m)
    count = np.bincount(rows, minlength=n)
    widest, ends = int(count.max(initial=0)), np.cumsum(count)
    place = np.arange(len(flat)) + np.repeat(np.arange(n) * widest - (ends - count), count)
    scores, at_column = np.full(n * widest, -math.inf, s.dtype), np.zeros(n * widest, np.int64)
    scores[place], at_column[place] = found, columns
    scores = scores.reshape(n, widest)
    return Best(scores, at_column.reshape(n, widest), _highest(scores, k))


def _all(s: Array, k: int) -> Best:
    s = np.ascontiguousarray(s)
    return Best(s, np.broadcast_to(np.arange(s.shape[1]), s.shape), _highest(s, k))


def _highest(s: Array, k: int) -> Array:
    """Which are the `k` highest of each row."""
    real = s != -math.inf
    m = s.shape[1]
    if k >= m:
        return real
    if k == 0:
        return np.zeros(s.shape, bool)
    if np.isnan(s).any():
        s = np.where(np.isnan(s), math.inf, s)
    threshold = np.partition(s, m - k, axis=-1)[:, m - k : m - k + 1]
    chosen = (s >= threshold) & real
    crowded = np.flatnonzero(np.count_nonzero(chosen, axis=-1) > k)
    if len(crowded):
        above = s[crowded] > threshold[crowded]
        tied = chosen[crowded] & ~above
        room = k - np.count_nonzero(above, axis=-1, keepdims=True)
        chosen[crowded] = above | (tied & (np.cumsum(tied, axis=-1) <= room))
    return chosen
