"""Dense attention against its defining equation, on every library and dtype."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import NUMPY_DTYPES, Lane
from laws import for_all
from softmax import agrees, in_tiles
from strategies import Case, cases

from arrattn import attention, reference

TILES = st.sampled_from(((4, 4), (1, 3), (5, 2), (16, 16)))


@for_all(case=cases())
def test_equals_the_reference(lane: Lane, case: Case) -> None:
    agrees(lane, attention, reference.softmax_attention, case)


@for_all(case=cases(), tile=TILES)
def test_equals_the_reference_tile_by_tile(lane: Lane, case: Case, tile: tuple[int, int]) -> None:
    agrees(lane, in_tiles(tile), reference.softmax_attention, case)


@for_all(case=cases(), dtype=st.sampled_from(("float32", "float16", "bfloat16")))
def test_equals_the_reference_in_every_dtype(lane: Lane, case: Case, dtype: str) -> None:
    if dtype in lane.dtypes:
        agrees(lane, attention, reference.softmax_attention, case, dtype=dtype)


@pytest.mark.parametrize("nq", [127, 300])
@pytest.mark.parametrize("nk", [129, 513])
def test_lengths_around_the_real_tiles(lane: Lane, nq: int, nk: int) -> None:
    rng = np.random.default_rng(nq + nk)
    case = Case(
        rng.normal(size=(4, nq, 8)),
        rng.normal(size=(2, nk, 8)),
        rng.normal(size=(2, nk, 5)),
        {"window": (200, 30)},
    )
    agrees(lane, attention, reference.softmax_attention, case)


def test_pairs_of_bias_and_mask_may_broadcast_over_heads_queries_and_keys(lane: Lane) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 4, 6, 3))
    for shape in [(6, 6), (1, 6), (6, 1), (4, 1, 6), (2, 1, 6, 6), (2, 4, 1, 1), ()]:
        options = {"mask": rng.random(shape) < 0.7, "bias": rng.normal(size=shape)}
        options = {name: np.asarray(x) for name, x in options.items()}
        agrees(lane, attention, reference.softmax_attention, Case(q, k, v, options))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_of_half_precision_are_taken_in_single(lane: Lane, dtype: str) -> None:
    # 4096 equal weights: a sum in half precision stalls long before the end.
    if dtype not in lane.dtypes:
        pytest.skip(f"{lane} does not take {dtype}")
    v = np.ones((1, 4096, 1))
    out = lane.call(attention, np.zeros((1, 2, 4)), np.zeros((1, 4096, 4)), v, dtype=dtype)
    lane.check(out, np.ones((1, 2, 1)), dtype=dtype, within=0.0)
    assert NUMPY_DTYPES[dtype].itemsize == 2


def test_inputs_are_left_as_they_were(lane: Lane) -> None:
    rng = np.random.default_rng(1)
    arrays = [lane.asarray(rng.normal(size=(2, 9, 4)), "float64") for _ in range(3)]
    before = [lane.to_numpy(x).copy() for x in arrays]
    attention(*arrays, is_causal=True, softcap=2.0)
    for x, was in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(lane.to_numpy(x), was)
