"""The best of each row, in every way in which they are found, against sorting the row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lanes import Lane

from arrattn._core import loops, routing, topk

NAN, INF = np.nan, np.inf


def rows(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Scores ``(12, n)``: distinct ones, ties, NaN and infinities."""
    rng = np.random.default_rng(seed)
    s = rng.normal(size=(12, n))
    s[3:9] = rng.integers(-2, 3, (6, n))
    s[5:7] = np.where(rng.random((2, n)) < 0.3, INF, s[5:7])
    s[7] = 0
    return s


def best(s: Any, may: Any, k: int) -> np.ndarray[Any, Any]:
    """Which are the first `k` of each row: the highest, NaN as inf, ties to the lower index."""
    s = np.where(may, np.where(np.isnan(s), INF, s), -INF)
    chosen = np.zeros(s.shape, bool)
    np.put_along_axis(chosen, np.argsort(-s, axis=-1, kind="stable")[:, :k], True, axis=-1)
    return chosen & may


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_the_best_candidates_are_chosen(lane: Lane, n: int) -> None:
    rng = np.random.default_rng(n)
    s, may = rows(n), rng.random((12, n)) < 0.7
    s[9:11] = np.where(rng.random((2, n)) < 0.3, NAN, s[9:11])
    for k in {0, 1, min(3, n - 1), n - 1, n, n + 1}:
        expected = best(s, may, k)
        got = lane.call(routing.top_mask, s, may, k, dtype="float32", xp=lane.namespace)
        lane.check(got, np.broadcast_to(expected, got.shape), dtype="bool", within=0)
        with np.errstate(invalid="ignore"):  # as every attention does
            got = lane.call(routing.best_indices, s, may, k, n, dtype="float32", xp=lane.namespace)
        first = np.sort(np.where(expected, np.arange(n), n), axis=-1)[:, :k]
        first = np.pad(first, ((0, 0), (0, k - first.shape[1])), constant_values=n)
        np.testing.assert_array_equal(lane.to_numpy(got), first)
        if not lane.shrinks:  # where every shape is compiled
            continue
        axes = s.reshape(2, 1, 6, n), may.reshape(2, 1, 6, n), k, n
        with np.errstate(invalid="ignore"):
            got = lane.call(routing.best_indices, *axes, dtype="float32", xp=lane.namespace)
        np.testing.assert_array_equal(lane.to_numpy(got), first.reshape(2, 1, 6, k))


@pytest.mark.parametrize("k", [1, 2, 7, 20])
def test_the_largest_are_those_of_sorting(lane: Lane, k: int) -> None:
    s = rows(20)
    expected = -np.sort(-s, axis=-1)[:, :k]
    for function, part in ((loops.largest, expected), (loops.kth_largest, expected[:, -1:])):
        got = lane.call(function, s, k, dtype="float64", xp=lane.namespace)
        lane.check(got, part, dtype="float64", within=0)


@pytest.mark.parametrize("m", [0, 1, 3, 64, 65, 130, 200, 700])
def test_a_tournament_ends_as_sorting_does(m: int) -> None:
    for k in (1, 2, 63, 64, 65, 150):
        s = rows(m) if m else np.zeros((12, 0))
        expected = np.sort(s, axis=-1)[:, m - k] if k <= m else np.full(12, -INF)
        np.testing.assert_array_equal(topk.kth_largest(s, k), expected)


@pytest.mark.parametrize("m", [0, 1, 5, 32, 131, 600])
def test_a_few_above_a_threshold_hold_the_best(m: int) -> None:
    rng = np.random.default_rng(m)
    s = rows(m) if m else np.zeros((12, 0))
    s = np.where(rng.random(s.shape) < 0.2, -INF, s)
    s[8] = -INF
    poisoned = np.where(rng.random(s.shape) < 0.1, NAN, s)
    for x in (s, poisoned):
        for k in (0, 1, 2, 15, m // 3, m, m + 1):
            expected = best(x, x != -INF, k)
            some = topk.best_of(x.copy(), k)
            row, place = np.nonzero(some.scores != -INF)
            found = np.zeros(x.shape, bool)
            found[row, some.columns[row, place]] = True
            np.testing.assert_array_equal(found, expected)
            assert len(row) == expected.sum()
            at = some.columns[row, place]
            np.testing.assert_array_equal(some.scores[row, place], x[row, at])
            assert (np.diff(at) > 0)[np.diff(row) == 0].all()


@pytest.mark.parametrize("n", [0, 7, 64, 4096, 4101])
@pytest.mark.parametrize("share", [0, 0.001, 0.02, 0.3, 1])
def test_flags_are_found_however_few(n: int, share: float) -> None:
    flags = np.random.default_rng(n).random(n) < share
    np.testing.assert_array_equal(topk.true_of(flags), np.flatnonzero(flags))
