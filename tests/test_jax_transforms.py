"""jit, vmap and grad of JAX, and programs whose size does not grow with N."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import close
from softmax import in_rows, in_tiles
from tolerance import output_error

from arrattn import attention, explain, linear_attention, local_attention, sparse_attention
from arrattn._core import loops, routing
from arrattn._core.inputs import read_sparse
from arrattn.patterns import Causal, Prefix, Where, Window

FAMILIES: dict[str, Callable[..., Any]] = {
    "dense": attention,
    "local": lambda *a, **o: local_attention(*a, window=(5, 2), **o),
    "sparse": lambda *a, **o: sparse_attention(*a, block_size=4, top_k=3, route=2, **o),
    "linear": linear_attention,
}
families = pytest.mark.parametrize("family", FAMILIES)


def arrays(n: int = 12) -> list[np.ndarray[Any, Any]]:
    return list(np.random.default_rng(0).normal(size=(3, 3, 2, n, 4)))


@families
def test_vmap_is_a_batch_axis(family: str) -> None:
    q, k, v = arrays()
    function = FAMILIES[family]
    expected = np.asarray(function(q, k, v, is_causal=True))
    got = jax.vmap(lambda *a: function(*a, is_causal=True))(*map(jnp.asarray, (q, k, v)))
    close(np.asarray(got), expected, within=2 * output_error(q, k, v, dtype="float64"))


@families
def test_lengths_may_be_traced(family: str) -> None:
    q, k, v = arrays()
    lengths = np.asarray([3, 12, 0])
    function = FAMILIES[family]
    expected = np.asarray(function(q, k, v, kv_lengths=lengths, is_causal=True))
    traced = jax.jit(lambda n, *a: function(*a, kv_lengths=n, is_causal=True))
    got = traced(jnp.asarray(lengths), *map(jnp.asarray, (q, k, v)))
    close(np.asarray(got), expected, within=2 * output_error(q, k, v, dtype="float64"))


@pytest.mark.parametrize("tile", [(4, 6), (4, 5)])  # all whole, or the last one short
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_are_scanned(tile: tuple[int, int], causal: bool) -> None:
    q, k, v = arrays()
    qkv = np.concatenate([q, k], axis=1)[..., :11, :], k, v  # two query heads to a key head
    got = in_tiles(tile)(*map(jnp.asarray, qkv), is_causal=causal)
    expected = attention(*qkv, is_causal=causal)
    close(np.asarray(got), expected, within=2 * output_error(*qkv, dtype="float64"))


def test_keys_seen_by_any_are_found_a_few_queries_at_a_time() -> None:
    n, few = 1 << 19, 5  # two queries to a step
    x = jnp.zeros((1, n, 1))
    for name, pattern in (("last", 4), ("first", 0), ("none", 5)):
        call, _ = read_sparse(
            x[:, :few], x, x, pattern=Where(lambda p, j, at=pattern: (p == at) & (j % 7 == 3)),
            q_offset=0, block_size=None, top_k=None, route=None, select="keys", per="query",
        )  # fmt: skip
        seen = np.asarray(routing.seen_by_any(call, few)).reshape(-1)
        expected = (np.arange(n) % 7 == 3) & (pattern < few)
        np.testing.assert_array_equal(seen, expected, err_msg=name)


@pytest.mark.parametrize("per", ["query", "group", "block"])
def test_a_selection_by_tiles_has_a_row_for_each_who_chooses(per: str) -> None:
    q, k, v = arrays()
    options: dict[str, Any] = {"block_size": 4, "top_k": 1, "select": "blocks", "per": per}
    options |= {"return_lse": True, "return_selection": True}
    *_, expected = sparse_attention(q, k, v, **options)
    *_, got = in_rows(8)(*map(jnp.asarray, (q, k, v)), **options)
    np.testing.assert_array_equal(np.asarray(got), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_kth_largest_is_found_bit_by_bit(dtype: str) -> None:
    rows = [[0.0, -1.0, 2.0, -np.inf], [5e-300, -0.0, -2.0, np.inf], [1.0, 1.0, -1.0, -1.0]]
    x = np.asarray(rows, dtype)
    for k in (1, 2, 3, 4):
        got = np.asarray(loops.kth_largest(jnp.asarray(x), k, xp=jnp))
        np.testing.assert_array_equal(got, np.sort(x, axis=-1)[:, 4 - k : 5 - k])


def test_what_is_always_seen_may_be_told_by_arrays() -> None:
    q, k, v = arrays()[:3]
    options: dict[str, Any] = {"block_size": 4, "top_k": 1, "select": "blocks"}
    n = np.asarray([1, 5, 2])
    expected = sparse_attention(q, k, v, always=Prefix(n), **options)
    got = sparse_attention(*map(jnp.asarray, (q, k, v)), always=Prefix(jnp.asarray(n)), **options)
    close(np.asarray(got), expected, within=2 * output_error(q, k, v, dtype="float64"))


@pytest.mark.parametrize("pattern", [None, Causal(), Window(5, 0), ~Causal()])
def test_the_products_named_are_those_of_whole_tiles(pattern: Any) -> None:
    for n in (300, 1500):
        x = jnp.zeros((2, n, 8), jnp.float32)
        why = explain(attention, x, x, x, pattern=pattern, q_offset=0)
        tiles = int((why.plan.kinds > 0).sum())
        # Of a single tile all pairs are computed, whether any is seen or not.
        pairs = n * n if why.plan.kinds.size == 1 else tiles * np.prod(why.plan.tile)
        assert why.products == 2 * pairs * (8 + 8)
        blind = explain(attention, x, x, x, pattern=Window(0, 0), q_offset=9 * n)
        assert blind.products == (2 * n * n * 16 if blind.plan.kinds.size == 1 else 0)


def test_a_loop_asks_for_gaps_only_where_there_are_some() -> None:
    q, k, v = map(jnp.asarray, arrays())
    for causal in (False, True):
        traced = jax.make_jaxpr(lambda *x, c=causal: in_tiles((4, 4))(*x, is_causal=c, q_offset=0))
        assert ("cond" in str(traced(q, k, v))) == causal


SHARED: dict[str, Any] = {
    "mask": np.random.default_rng(1).random((12, 12)) < 0.8,
    "kv_lengths": np.asarray([9, 12, 1]),
    "segment_ids": np.arange(12) // 5,
    "q_offset": np.asarray([0, 1, -1]),
    "bias": np.random.default_rng(2).normal(size=(2, 12, 12)),
    "sinks": np.asarray([0.3, -1.0]),
}


@pytest.mark.parametrize("family", ["dense", "local", "sparse"])
@pytest.mark.parametrize("names", [*((x,) for x in SHARED), tuple(SHARED)], ids=",".join)
def test_arrays_about_scores_and_visibility_may_be_traced(
    family: str, names: tuple[str, ...]
) -> None:
    options = {n: SHARED[n] for n in names}
    function, qkv = FAMILIES[family], arrays()
    expected = np.asarray(function(*qkv, **options))
    traced = jax.jit(lambda o, *a: function(*a, **o))
    got = traced({n: jnp.asarray(x) for n, x in options.items()}, *map(jnp.asarray, qkv))
    within = 2 * output_error(*qkv, dtype="float64", bias=options.get("bias"))
    close(np.asarray(got), expected, within=within)


@families
def test_lengths_may_be_mapped(family: str) -> None:
    q, k, v = arrays()
    lengths = np.asarray([3, 12, 0])
    function = FAMILIES[family]
    expected = np.asarray(function(q, k, v, kv_lengths=lengths, is_causal=True))
    mapped = jax.vmap(lambda n, *a: function(*a, kv_lengths=n, is_causal=True))
    got = mapped(jnp.asarray(lengths), *map(jnp.asarray, (q, k, v)))
    close(np.asarray(got), expected, within=2 * output_error(q, k, v, dtype="float64"))


@families
def test_the_program_does_not_grow_with_the_length(family: str) -> None:
    def lines(n: int) -> int:
        like = jax.ShapeDtypeStruct((1, n, 8), jnp.float32)
        make = jax.make_jaxpr(lambda *a: FAMILIES[family](*a, is_causal=True))
        program = str(make(like, like, like))
        assert not re.search(r":f64\[\d", program)  # nothing is held in a wider dtype
        return program.count("\n")

    # Sixteen times the tokens: a loop that is unrolled would be sixteen times as long.
    assert lines(16 * 1024) <= 1.5 * lines(1024)


@families
def test_a_second_call_of_the_same_shape_traces_nothing(family: str) -> None:
    seen: list[tuple[int, ...]] = []

    def function(*a: Any) -> Any:
        seen.append(a[0].shape)
        return FAMILIES[family](*a, is_causal=True)

    compiled = jax.jit(function)
    for _ in range(3):
        compiled(*map(jnp.asarray, arrays()))
    assert len(seen) == 1


@pytest.mark.parametrize("mapped", [False, True])
def test_a_loop_over_tiles_has_one_body(mapped: bool) -> None:
    # What XLA takes to compile grows with the bodies, and under vmap a branch that is hardly
    # ever taken would be computed beside the other if each item chose for itself.
    like = jax.ShapeDtypeStruct((2, 1, 2048, 8), jnp.float32)

    def function(*a: Any) -> Any:
        return attention(*a, is_causal=True)

    program = str(jax.make_jaxpr(jax.vmap(function) if mapped else function)(like, like, like))
    assert program.count("dot_general[") == 3  # scores, sums of values, who sees a bad one
    assert program.count("cond[") == 2  # whether to visit, whether any value is bad


@pytest.mark.parametrize("key", [0, 10])  # 10: some of its tile see it
def test_a_bad_value_stays_with_who_sees_it(key: int) -> None:
    q, k, v = arrays(13)
    v[1, :, key] = np.nan
    expected = np.asarray(attention(q, k, v, is_causal=True))
    tiled = jax.vmap(lambda *a: in_tiles((4, 3))(*a, is_causal=True))
    got = np.asarray(tiled(*map(jnp.asarray, (q, k, v))))
    finite = np.isfinite(expected)
    assert not finite.all()
    assert np.array_equal(np.isfinite(got), finite)
    within = 2 * output_error(q, k, np.nan_to_num(v), dtype="float64")
    close(got[finite], expected[finite], within=within)


def test_values_whose_sum_overflows_are_summed_all_the_same() -> None:
    q, k, v = arrays(13)
    v = np.full_like(v, 1e306)  # 312 of them
    got = in_tiles((4, 3))(*map(jnp.asarray, (q, k, v)), is_causal=True)
    close(np.asarray(got), v, within=2 * output_error(q, k, v, dtype="float64"))


@pytest.mark.parametrize("offset", [2**31 - 1, -(2**31) + 5, 2**33])
def test_positions_that_would_wrap_around_are_refused(offset: int) -> None:
    with jax.enable_x64(False):
        x = jnp.ones((1, 40, 3))
        with pytest.raises(ValueError, match="q_offset: expected less than"):
            attention(x, x, x, is_causal=True, q_offset=offset)
        near = attention(x, x, x, is_causal=True, q_offset=2**31 - 200)
    ones = np.ones(x.shape, np.float32)
    close(np.asarray(near), ones, within=output_error(ones, ones, ones, dtype="float32"))
