"""Rows that see nothing, and axes of length nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lanes import Lane
from laws import for_all
from strategies import Case, cases

from arrattn import attention, linear_attention, local_attention, merge, sparse_attention

SOFTMAX: dict[str, Callable[..., Any]] = {
    "dense": attention,
    "local": lambda *a, **o: local_attention(*a, **{"window": (3, 3), **o}),
    "sparse": sparse_attention,
    "sparse-exact": lambda *a, **o: sparse_attention(*a, route=None, **o),
    "sparse-block": lambda *a, **o: sparse_attention(*a, select="blocks", per="block", **o),
}
ALL = {**SOFTMAX, "linear": linear_attention}
families = pytest.mark.parametrize("family", ALL)


@for_all(case=cases())
def test_rows_that_see_nothing_are_zero_and_their_lse_minus_infinity(
    lane: Lane, case: Case
) -> None:
    out, lse = lane.call(attention, *case.arrays, dtype="float64", return_lse=True, **case.options)
    out, lse, empty = lane.to_numpy(out), lane.to_numpy(lse), ~case.visible().any(-1)
    empty = empty[0] if case.q.ndim == 2 else empty
    assert (out[empty] == 0).all()
    sinks = case.options.get("sinks")
    nothing = -np.inf if sinks is None else sinks[0] if case.q.ndim == 2 else sinks[:, None]
    np.testing.assert_array_equal(lse[empty], np.broadcast_to(nothing, lse.shape)[empty])
    assert np.isfinite(lse[~empty]).all()


@pytest.mark.parametrize("family", SOFTMAX)
@pytest.mark.parametrize("sinks", [None, 0.25])
def test_every_way_to_hide_everything(lane: Lane, family: str, sinks: float | None) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 5, 4))
    hidden: list[dict[str, Any]] = [
        {"mask": np.zeros((5, 5), bool)},
        {"bias": np.full((5, 5), -np.inf)},
        {"kv_lengths": 0},
        {"q_offset": -100, "is_causal": True},
        {"q_offset": 100, "window": (3, 3)},
        {"segment_ids": (np.full(5, 7), np.zeros(5, int))},
    ]
    sink = None if sinks is None else np.full(2, sinks)
    for options in hidden:
        out, lse = lane.call(
            SOFTMAX[family], q, k, v, dtype="float64", return_lse=True, sinks=sink, **options
        )
        lane.check(out, np.zeros((2, 5, 4)), dtype="float64", within=0.0)
        expected = np.full((2, 5), -np.inf if sinks is None else sinks)
        lane.check(lse, expected, dtype="float64", within=0.0)


@families
def test_no_keys_give_zeros(lane: Lane, family: str) -> None:
    q, k, v = np.ones((2, 3, 4)), np.ones((2, 0, 4)), np.ones((2, 0, 5))
    out = lane.call(ALL[family], q, k, v, dtype="float64")
    lane.check(out, np.zeros((2, 3, 5)), dtype="float64", within=0.0)


@families
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["all", "causal"])
@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ((2, 0, 4), (2, 3, 4), (2, 3, 5)),
        ((2, 0, 4), (2, 0, 4), (2, 0, 5)),
        ((0, 3, 4), (0, 3, 4), (0, 3, 5)),
        ((0, 2, 3, 4), (0, 2, 3, 4), (0, 2, 3, 5)),
        ((3, 0, 2, 3, 4), (1, 2, 3, 4), (0, 2, 3, 5)),
        ((2, 3, 0), (2, 4, 0), (2, 4, 5)),
        ((2, 3, 4), (2, 4, 4), (2, 4, 0)),
        ((2, 3, 0), (2, 4, 0), (2, 4, 0)),
        ((0, 4), (3, 4), (3, 5)),
        ((3, 4), (0, 4), (0, 5)),
    ],
)
def test_any_axis_may_be_empty(
    lane: Lane,
    family: str,
    q: tuple[int, ...],
    k: tuple[int, ...],
    v: tuple[int, ...],
    options: dict[str, Any],
) -> None:
    out = lane.call(ALL[family], *map(np.ones, (q, k, v)), dtype="float64", **options)
    lead = np.broadcast_shapes(q[:-3], k[:-3], v[:-3])
    shape = (*lead, *q[-3:-1], v[-1])
    assert tuple(out.shape) == shape
    assert np.isfinite(lane.to_numpy(out)).all()


def test_a_selection_of_nothing(lane: Lane) -> None:
    shapes = ((2, 3, 0, 4), (2, 1, 5, 4), (2, 1, 5, 6))
    options: dict[str, Any] = {"top_k": 2, "block_size": 2, "select": "blocks"}
    _, selection = lane.call(
        sparse_attention, *map(np.ones, shapes), dtype="float64", return_selection=True, **options
    )
    lane.check(selection, np.zeros((2, 3, 0, 2)), dtype="int64", within=0.0)


def test_no_heads_in_merge_and_lse(lane: Lane) -> None:
    part = lane.call(attention, *np.ones((3, 0, 3, 4)), dtype="float64", return_lse=True)
    out, lse = merge([part, part])
    lane.check(out, np.zeros((0, 3, 4)), dtype="float64", within=0.0)
    lane.check(lse, np.zeros((0, 3)), dtype="float64", within=0.0)
