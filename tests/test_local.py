"""Local attention against its equation, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import Lane
from laws import for_all
from softmax import agrees, as_held
from strategies import Case, cases, windows
from tolerance import output_error

from arrattn import attention, local_attention, reference


@for_all(case=cases(), window=windows())
def test_equals_the_reference(
    lane: Lane, case: Case, window: tuple[int | None, int | None]
) -> None:
    case.options["window"] = window
    agrees(lane, local_attention, reference.local_attention, case)


@for_all(case=cases(), dtype=st.sampled_from(("float32", "float16", "bfloat16")))
def test_equals_the_reference_in_every_dtype(lane: Lane, case: Case, dtype: str) -> None:
    if dtype in lane.dtypes:
        case.options["window"] = (2, 1)
        agrees(lane, local_attention, reference.local_attention, case, dtype=dtype)


@pytest.mark.parametrize("window", [(0, 0), (1, 0), (130, 7), (0, 64), (None, 3)])
def test_windows_over_many_tiles(lane: Lane, window: tuple[int | None, int]) -> None:
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(3, 1, 517, 4))
    agrees(lane, local_attention, reference.local_attention, Case(q, k, v, {"window": window}))


@pytest.mark.parametrize("window", [(20, 7), (None, 3)])
def test_many_tiles_of_grouped_heads_some_of_whose_keys_are_far(
    lane: Lane, window: tuple[int | None, int]
) -> None:
    rng = np.random.default_rng(8)
    q, (k, v) = rng.normal(size=(2, 4, 260, 4)), rng.normal(size=(2, 2, 2, 263, 4))
    k[0, 1, ::50] *= 1e3
    segments = np.arange(260) // 90, np.arange(263) // 90
    for more in ({}, {"q_offset": -100, "segment_ids": segments}):
        case = Case(q, k, v, {"window": window, **more})
        agrees(lane, local_attention, reference.local_attention, case)


@for_all(case=cases())
def test_a_window_of_all_keys_is_dense(lane: Lane, case: Case) -> None:
    case.options.pop("window", None)
    reach = sum(case.lengths) + 10
    held = as_held(case, "float64")
    dense = lane.call(attention, *case.arrays, dtype="float64", **case.options)
    within = 2 * output_error(*held.arrays, dtype="float64", **held.scores)
    for wide in ((reach, reach), (None, None)):
        local = lane.call(
            local_attention, *case.arrays, dtype="float64", window=wide, **case.options
        )
        lane.check(local, lane.to_numpy(dense), dtype="float64", within=within)


@for_all(case=cases(sees=False))
def test_a_window_of_nothing_but_itself_gives_the_value_there(lane: Lane, case: Case) -> None:
    for name in ("sinks", "bias"):
        case.options.pop(name, None)
    nq, nk = case.lengths
    out = lane.call(local_attention, *case.arrays, dtype="float64", window=(0, 0), **case.options)
    g = case.heads[0] // case.heads[1]
    v = case.v[None] if case.v.ndim == 2 else np.repeat(case.v, g, axis=-3)
    v = np.broadcast_to(v, (*case.batch, case.heads[0], *v.shape[-2:]))
    expected = np.zeros((*v.shape[:-2], nq, v.shape[-1]))
    for i in range(nq):
        if nq - nk <= i:
            expected[..., i, :] = v[..., i + nk - nq, :]
    expected = expected[0] if case.q.ndim == 2 else expected
    lane.check(out, expected, dtype="float64", within=0.0)
