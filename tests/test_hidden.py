"""What a hidden key or value holds reaches nobody; what a visible one holds does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import Lane
from laws import for_all
from softmax import as_held, in_tiles
from strategies import Case, cases
from tolerance import output_error

from arrattn import attention, linear_attention, local_attention, sparse_attention

POISON = st.sampled_from((np.nan, np.inf, -np.inf))


def hidden_from_all(case: Case) -> np.ndarray[Any, Any]:
    """Keys that no query sees: bool, in the shape of k without its last axis."""
    seen = case.visible().any(-2)  # (*batch, Hq, Nk)
    hq, hkv = case.heads
    seen = seen.reshape(*seen.shape[:-2], hkv, hq // hkv, -1).any(-2)
    if case.k.ndim == 2:
        return ~seen[0]
    # An axis of k that broadcasts is seen if any item of the batch sees it.
    for axis in range(len(case.batch)):
        at = axis - len(case.batch)
        size = case.k.shape[at - 3] if case.k.ndim - 3 >= -at else 1
        size_v = case.v.shape[at - 3] if case.v.ndim - 3 >= -at else 1
        if 1 in (size, size_v):
            seen = np.broadcast_to(seen.any(axis, keepdims=True), seen.shape)
    return ~seen


def poisoned(case: Case, value: float, *, keys: bool, values: bool) -> Case:
    """The case with `value` in every key and value that no query sees."""
    hidden = hidden_from_all(case)

    def spoil(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        lead = x.shape[:-1]
        h = hidden
        while h.ndim > len(lead):
            h = h[0]
        for axis, n in enumerate(lead):
            if n == 1 and h.shape[axis] != 1:
                h = np.take(h, [0], axis=axis)
        return np.where(h[..., None], value, x)

    k = spoil(case.k) if keys else case.k
    return Case(case.q, k, spoil(case.v) if values else case.v, case.options, case.how)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": attention,
    "tiles": in_tiles((3, 4)),
    "local": lambda *a, **o: local_attention(*a, **{"window": (2, 1), **o}),
    "sparse": lambda *a, **o: sparse_attention(*a, block_size=3, top_k=2, route=2, **o),
    "sparse-exact": lambda *a, **o: sparse_attention(*a, block_size=3, top_k=2, route=None, **o),
}


@pytest.mark.parametrize("family", FUNCTIONS)
def test_hidden_keys_and_values_are_absent(lane: Lane, family: str) -> None:
    function = FUNCTIONS[family]

    def law(lane: Lane, case: Case, value: float, where: tuple[bool, bool]) -> None:
        spoiled = poisoned(case, value, keys=where[0], values=where[1])
        clean = lane.call(function, *case.arrays, dtype="float64", **case.options)
        got = lane.call(function, *spoiled.arrays, dtype="float64", **case.options)
        held = as_held(case, "float64")
        # Means of blocks are taken over other numbers: not the same bits, the same choice.
        within = 2 * output_error(*held.arrays, dtype="float64", **held.scores)
        lane.check(got, lane.to_numpy(clean), dtype="float64", within=within)

    where = st.sampled_from(((True, True), (True, False), (False, True)))
    for_all(case=cases(), value=POISON, where=where)(law)(lane)


SPOILED = {name: FUNCTIONS[name] for name in ("dense", "tiles", "local")} | {
    "blocks": lambda *a, **o: sparse_attention(*a, select="blocks", block_size=2, top_k=5, **o)
}


@pytest.mark.parametrize("family", SPOILED)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_see_a_spoiled_value_are_spoiled_and_no_others(
    lane: Lane, family: str, value: float
) -> None:
    rng = np.random.default_rng(4)
    q, k, v = rng.normal(size=(3, 1, 9, 4))
    v[0, 4, 2] = value
    options: dict[str, Any] = {"is_causal": True}
    got = lane.to_numpy(lane.call(SPOILED[family], q, k, v, dtype="float64", **options))
    reach = 2 if family == "local" else 9
    sees = np.asarray([4 <= i <= 4 + reach for i in range(9)])
    assert not np.isfinite(got[0, sees, 2]).any()
    assert np.isfinite(got[0, ~sees]).all()
    assert np.isfinite(got[0][:, [0, 1, 3]]).all(), "another channel was reached"


@pytest.mark.parametrize("family", SPOILED)
def test_rows_that_see_a_spoiled_key_are_spoiled_and_no_others(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, 1, 9, 4))
    k[0, 4, :] = np.nan
    got = lane.to_numpy(lane.call(SPOILED[family], q, k, v, dtype="float64", is_causal=True))
    reach = 2 if family == "local" else 9
    sees = np.asarray([4 <= i <= 4 + reach for i in range(9)])
    assert np.isnan(got[0, sees]).all()
    assert np.isfinite(got[0, ~sees]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_linear_attention_hides_padding_segments_and_the_future(lane: Lane, value: float) -> None:
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(3, 2, 2, 40, 4))
    for options in (
        {"kv_lengths": np.asarray([7, 33]), "q_offset": None},
        {"key_mask": np.arange(40) < np.asarray([[7], [33]])},
        {"segment_ids": (np.zeros((2, 40), int), (np.arange(40) >= np.asarray([[7], [33]])) * 1)},
    ):
        options.pop("q_offset", None)
        spoiled_k, spoiled_v = k.copy(), v.copy()
        for b, n in enumerate((7, 33)):
            spoiled_k[b, :, n:], spoiled_v[b, :, n:] = value, value
        for arrays in ((q, spoiled_k, v), (q, k, spoiled_v), (q, spoiled_k, spoiled_v)):
            clean = lane.call(linear_attention, q, k, v, dtype="float64", **options)
            got = lane.call(linear_attention, *arrays, dtype="float64", **options)
            within = output_error(q, k, v, dtype="float64")
            lane.check(got, lane.to_numpy(clean), dtype="float64", within=within)


@pytest.mark.parametrize("n", [9, 200])
def test_the_future_cannot_reach_the_past(lane: Lane, n: int) -> None:
    rng = np.random.default_rng(8)
    q, k, v = rng.normal(size=(3, 1, n, 4))
    cut = n // 2
    later = slice(cut, None)
    spoiled = [x.copy() for x in (k, v)]
    for x in spoiled:
        x[:, later] = np.nan
    for function in (*FUNCTIONS.values(), linear_attention):
        clean = lane.call(function, q, k, v, dtype="float64", is_causal=True)
        got = lane.call(function, q, *spoiled, dtype="float64", is_causal=True)
        within = output_error(q, k, v, dtype="float64")
        past = lane.to_numpy(clean)[:, :cut]
        lane.check(got[:, :cut, :], past, dtype="float64", within=within)
