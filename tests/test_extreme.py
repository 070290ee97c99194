"""Scores that are huge, tied or minus infinity."""

from __future__ import annotations

import numpy as np
import pytest
from lanes import Lane
from softmax import agrees
from strategies import Case

from arrattn import attention, reference


@pytest.mark.parametrize("size", [1e3, 1e10])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_huge_scores_pick_the_largest(lane: Lane, size: float, dtype: str) -> None:
    # One key stands out in every row by far more than the exponential can hold.
    n = 7
    q, k = np.eye(n)[None] * size, np.eye(n)[None, ::-1] * size
    v = np.arange(n, dtype=float)[None, :, None]
    out, lse = lane.call(attention, q, k, v, dtype=dtype, return_lse=True, scale=1.0)
    lane.check(out, v[:, ::-1], dtype=dtype, within=0.0)
    assert np.isfinite(lane.to_numpy(lse)).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_shifted_far_from_zero_keep_their_differences(lane: Lane, sign: float) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 6, 4))
    bias = np.asarray(sign * 2.0**20)  # a power of two: adding it rounds little
    agrees(lane, attention, reference.softmax_attention, Case(q, k, v, {"bias": bias}))


@pytest.mark.parametrize("n", [1, 3, 100, 257])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_tied_scores_average(lane: Lane, n: int, dtype: str) -> None:
    v = np.arange(float(n))[None, :, None]
    zeros = np.zeros((1, n, 4))
    case = Case(zeros, zeros, v)
    agrees(lane, attention, reference.softmax_attention, case, dtype=dtype)


def test_a_bias_of_minus_infinity_hides_like_a_mask(lane: Lane) -> None:
    rng = np.random.default_rng(1)
    q, k, v = rng.normal(size=(3, 2, 6, 4))
    seen = rng.random((2, 6, 6)) < 0.4
    v[:, 3] = np.where(seen[:, :, 3].any(-1)[:, None], v[:, 3], np.nan)
    masked = lane.call(attention, q, k, v, dtype="float64", mask=seen)
    biased = lane.call(attention, q, k, v, dtype="float64", bias=np.where(seen, 0.0, -np.inf))
    lane.check(biased, lane.to_numpy(masked), dtype="float64", within=0.0)


def test_a_large_softcap_changes_little_and_a_small_one_flattens(lane: Lane) -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(3, 1, 6, 4))
    plain = lane.to_numpy(lane.call(attention, q, k, v, dtype="float64"))
    loose = lane.to_numpy(lane.call(attention, q, k, v, dtype="float64", softcap=1e6))
    tight = lane.to_numpy(lane.call(attention, q, k, v, dtype="float64", softcap=1e-9))
    # tanh(x) = x - x^3 / 3: with |x| below 1e-5 the cap moves a score by less than 1e-9.
    np.testing.assert_allclose(loose, plain, rtol=0, atol=1e-9 * np.abs(v).max())
    mean = np.broadcast_to(v.mean(-2, keepdims=True), plain.shape)
    np.testing.assert_allclose(tight, mean, rtol=0, atol=4e-9 * np.abs(v).max())
