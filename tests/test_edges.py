"""Edges where wrong answers once hid: narrow integers, ties, chunks, states, gradients."""

from __future__ import annotations

import numpy as np
import pytest

from arrattn import (
    attention,
    feature_maps,
    linear_attention,
    local_attention,
    merge,
    reference,
    sparse_attention,
)
from arrattn._core import tiles
from arrattn.patterns import Prefix, Segments


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def test_a_range_may_start_where_only_an_array_tells() -> None:
    (x,) = draw((2, 5, 3))
    for start in range(6):
        got = tiles.take_range(x, np.asarray(start), 3, axis=-2, xp=np)
        assert np.array_equal(got, x[:, np.minimum(np.arange(start, start + 3), 4)])
        alike = tiles.take_range(x[:, :1], np.asarray(start), 3, axis=-2, xp=np)
        assert np.array_equal(alike, x[:, :1])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "uint32", "uint64", "int32"])
def test_lengths_of_any_integer_dtype(dtype: str) -> None:
    q, k, v = draw((2, 1, 5, 3), (2, 1, 4, 3), (2, 1, 4, 2))
    lengths = np.array([3, 4])
    expected = attention(q, k, v, kv_lengths=lengths, is_causal=True)
    narrow = lengths.astype(dtype)
    assert np.array_equal(attention(q, k, v, kv_lengths=narrow, is_causal=True), expected)
    by_pattern = attention(q, k, v, pattern=Prefix(narrow))
    assert np.array_equal(by_pattern, attention(q, k, v, kv_lengths=lengths, q_offset=0))


def test_segments_of_different_integer_dtypes() -> None:
    q, k, v = draw((1, 4, 3), (1, 4, 3), (1, 4, 2))
    ids = np.array([0, 0, 1, 1])
    mixed = Segments(ids.astype("uint64"), ids.astype("int8"))
    expected = attention(q, k, v, segment_ids=ids)
    assert np.array_equal(attention(q, k, v, pattern=mixed), expected)


@pytest.mark.parametrize("route", [None, 2])
def test_scores_that_tie_before_the_scale_tie_after_it(route: int | None) -> None:
    # Width 5: the default scale is no power of two, and rounding could part equal products.
    import torch

    for seed in range(30):
        rng = np.random.default_rng(seed)
        q, k = np.round(rng.normal(size=(2, 1, 19, 5)))
        v = rng.normal(size=(1, 19, 2))
        ours = sparse_attention(q, k, v, top_k=3, route=route)
        theirs = sparse_attention(*map(torch.from_numpy, (q, k, v)), top_k=3, route=route)
        expected = reference.sparse_attention(q, k, v, top_k=3, route=route)
        room = 64 * np.finfo(np.float64).eps * np.max(np.abs(v))
        assert np.max(np.abs(ours - expected)) <= room
        assert np.max(np.abs(theirs.numpy() - expected)) <= room


def test_far_positions() -> None:
    q, k, v = draw((1, 5, 3), (1, 5, 3), (1, 5, 2))
    far = attention(q, k, v, is_causal=True, q_offset=1 << 39)
    assert np.array_equal(far, attention(q, k, v))
    with pytest.raises(ValueError, match="q_offset"):
        attention(q, k, v, q_offset=1 << 41)


def test_a_state_of_zeros_is_no_state() -> None:
    q, k, v = draw((1, 6, 4), (1, 6, 4), (1, 6, 3))
    k = 60 * k  # features so small that an exponent of 0 would drown them
    phi = feature_maps.softmax(dim=4, num_features=16, rng=0)
    fresh, state = linear_attention(
        q[:, :0], k[:, :0], v[:, :0], feature_map=phi, is_causal=True, return_state=True
    )
    assert fresh.shape == (1, 0, 3)
    expected = linear_attention(q, k, v, feature_map=phi, is_causal=True)
    got = linear_attention(q, k, v, feature_map=phi, is_causal=True, initial_state=state)
    assert np.any(expected != 0)
    assert np.array_equal(got, expected)


def test_a_part_that_saw_nothing_does_not_count() -> None:
    seen = (np.ones((2, 1)), np.zeros(2))
    nothing = (np.array([[1.0], [np.nan]]), np.array([0.0, -np.inf]))
    out, _ = merge([seen, nothing])
    assert np.array_equal(out, np.ones((2, 1)))


@pytest.mark.parametrize("family", [attention, sparse_attention, linear_attention])
def test_dask_arrays_cut_differently(family: object) -> None:
    import dask.array as da

    x = draw((4, 4, 6, 3))[0]
    whole, halves = (da.from_array(x, chunks=c) for c in (-1, (2, 4, 6, 3)))
    lengths = da.from_array(np.array([1, 2, 3, 4]), chunks=1)
    got = family(halves, whole, whole, kv_lengths=lengths).compute()  # type: ignore[operator]
    expected = family(x, x, x, kv_lengths=np.array([1, 2, 3, 4]))  # type: ignore[operator]
    assert np.max(np.abs(got - expected)) <= 16 * np.finfo(np.float64).eps * np.max(np.abs(x))


def test_several_tiles_of_exact_sparse_on_the_strict_library() -> None:
    import array_api_strict as xp

    x = xp.ones((1, 3000, 1))
    assert sparse_attention(x, x, x, route=None).shape == (1, 3000, 1)


@pytest.mark.parametrize("bad", ["k", "v"])
@pytest.mark.parametrize("hidden", ["future", "segment"])
def test_gradients_of_linear_attention_ignore_hidden_nan(bad: str, hidden: str) -> None:
    import torch

    q, k, v = (torch.from_numpy(x) for x in draw((1, 64, 8), (1, 64, 8), (1, 64, 8)))
    (k if bad == "k" else v)[:, 40] = torch.nan
    for x in (q, k, v):
        x.requires_grad_()
    ids = torch.arange(64) // 32
    options = {"is_causal": True} if hidden == "future" else {"segment_ids": ids}
    out = linear_attention(q, k, v, **options)
    assert not torch.isfinite(out[:, 40:]).all()
    out[:, :32].sum().backward()
    for x in (q, k, v):
        assert torch.isfinite(x.grad[:, :32]).all()
    assert (q.grad[:, :32] != 0).any()


@pytest.mark.parametrize(
    ("family", "n", "options", "mebibytes"),
    [
        (attention, 16_384, {"is_causal": True}, 256),
        (local_attention, 65_536, {"window": (128, 0)}, 1024),
        (linear_attention, 65_536, {}, 1024),
        (linear_attention, 65_536, {"is_causal": True}, 1024),
        (sparse_attention, 65_536, {}, 1024),
    ],
)
@pytest.mark.slow
def test_peak_memory_over_the_inputs(
    family: object, n: int, options: dict[str, object], mebibytes: int
) -> None:
    import tracemalloc

    q, k, v = np.random.default_rng(0).standard_normal((3, 4, n, 64), dtype=np.float32)
    tracemalloc.start()
    family(q, k, v, **options)  # type: ignore[operator]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < mebibytes << 20
