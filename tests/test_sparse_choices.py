"""Every way to choose in sparse attention: its definition, limits, theory and gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import sights
from array_api_compat import array_namespace
from hypothesis import strategies as st
from lanes import Lane, built
from laws import for_all
from softmax import agrees, as_held, check_pair, in_rows, is_sparse
from strategies import Case, cases
from test_sparse import not_under_jit, unambiguous
from tolerance import output_error

from arrattn import attention, patterns, reference, sparse_attention
from arrattn._core import loops, routing
from arrattn._core.inputs import read_sparse

ALWAYS = (
    None, sights.causal(), sights.window(2, 0), sights.everywhere(2), sights.strided(3),
    sights.window(1, 1) | sights.everywhere(1), sights.prefix(np.array(2)),
)  # fmt: skip


@st.composite
def chosen_cases(draw: st.DrawFn) -> Case:
    """A call with any way to choose; scores of blocks are whole numbers."""
    case = unambiguous(draw(cases()))
    size = draw(st.sampled_from((None, 3, 1, 4, 100)))
    per = draw(st.sampled_from(("query", "block", "group")))
    options: dict[str, Any] = {
        "block_size": size,
        "select": draw(st.sampled_from(("blocks", "keys"))),
        "per": per,
        "top_k": draw(st.sampled_from((None, 1, 0, 2, 5, 40))),
        "route": draw(st.sampled_from((None, 1, 2, 8))),
        "return_selection": True,
    }
    if (always := draw(st.sampled_from(ALWAYS))) is not None:
        options["always"] = always
    if draw(st.booleans()):
        options["score"] = draw(st.sampled_from(("bound", "best", "mean")))
    else:
        (nq, nk), (hq, hkv) = case.lengths, case.heads
        blocks = -(-nk // max(min(size or math.isqrt(max(nk - 1, 0)) + 1, nk), 1))
        shape = (draw(st.sampled_from((hq, 1, hkv))), draw(st.sampled_from((nq, 1))), blocks)
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        given = rng.integers(-3, 4, shape).astype(float)
        options["block_scores"] = np.where(given == 3, -np.inf, given)
    # Sums over those who choose together have to be exact too.
    if options.get("score") == "best" and case.options.get("bias") is not None:
        case.options.pop("bias")
    return Case(case.q, case.k, case.v, case.options | options, case.how)


@for_all(case=chosen_cases(), rows=st.sampled_from((None, 1, 4)))
def test_equals_the_reference(lane: Lane, case: Case, rows: int | None) -> None:
    attend = in_rows(rows) if rows else sparse_attention
    got = lane.call(attend, *case.arrays, dtype="float64", return_lse=True, **case.options)
    expected = reference.sparse_attention(
        *case.arrays, return_lse=True, **built(case.options, lambda x: x)
    )
    check_pair(lane, got[:2], expected[:2], as_held(case, "float64"), dtype="float64")
    selection = lane.to_numpy(got[2])
    assert selection.dtype.kind == "i"
    assert np.array_equal(selection, expected[2]), (selection, expected[2])


# All but what compiles whole calls, for which these are the same.
@pytest.mark.lanes(
    "numpy", "strict", "strict-device1", "torch", "torch-cuda", "cupy", "jax", "dask"
)
@pytest.mark.parametrize("per", ["query", "block", "group"])
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("offset", [-2, 7, 17])
def test_queries_may_begin_inside_a_block(lane: Lane, per: str, rows: int, offset: int) -> None:
    rng = np.random.default_rng(12)
    q, (k, v) = rng.normal(size=(2, 13, 4)), rng.normal(size=(2, 1, 24, 4))
    options = {"per": per, "block_size": 4, "top_k": 40, "window": (1, 1), "q_offset": offset}
    agrees(lane, in_rows(rows), reference.sparse_attention, Case(q, k, v, options))


@pytest.mark.lanes("numpy", "strict", "torch")
@pytest.mark.parametrize("per", ["query", "block"])
@pytest.mark.parametrize("offset", range(7, 18))
def test_queries_may_lie_behind_the_last_key(lane: Lane, per: str, offset: int) -> None:
    rng = np.random.default_rng(12)
    q, (k, v) = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 1, 13, 4))  # 13 is in a block to 16
    for select in ("keys", "blocks"):
        options = {"per": per, "block_size": 4, "top_k": 2, "select": select, "q_offset": offset}
        agrees(lane, sparse_attention, reference.sparse_attention, Case(q, k, v, options))


@pytest.mark.lanes("numpy", "strict", "torch", "dask")
@pytest.mark.parametrize("score", ["mean", "bound"])
def test_heads_that_choose_together_may_see_different_keys(lane: Lane, score: str) -> None:
    rng = np.random.default_rng(14)
    q, (k, v) = rng.normal(size=(4, 13, 3)), rng.normal(size=(2, 2, 17, 3))
    options = {"mask": rng.random((4, 13, 17)) < 0.5, "per": "group", "score": score}
    options |= {"block_size": 4, "top_k": 2, "route": 2, "select": "blocks"}
    for attend in (in_rows(5), sparse_attention):
        agrees(lane, attend, reference.sparse_attention, Case(q, k, v, options))


# Where every new shape is compiled, the draws of `chosen_cases` stand for these.
@pytest.mark.lanes("numpy", "strict", "strict-device1", "torch", "torch-cuda", "cupy", "dask")
@pytest.mark.parametrize("per", ["query", "block", "group"])
@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (1, 13), (2, 1), (4, 13)])
def test_scores_of_blocks_may_be_given_in_any_shape(
    lane: Lane, per: str, heads: int, rows: int
) -> None:
    rng = np.random.default_rng(13)
    q, (k, v) = rng.normal(size=(4, 13, 4)), rng.normal(size=(2, 2, 24, 4))
    given = rng.integers(-9, 9, (heads, rows, 6)).astype(float)
    options = {"block_scores": given, "per": per, "block_size": 4, "top_k": 2, "select": "blocks"}
    # Not all who choose together may choose a block.
    options["mask"] = rng.random((4, 13, 24)) < 0.3
    for attend in (sparse_attention, in_rows(4)):
        agrees(lane, attend, reference.sparse_attention, Case(q, k, v, options))


@pytest.mark.lanes("numpy", "strict", "torch")
@pytest.mark.parametrize("select", ["keys", "blocks"])
def test_items_with_blocks_of_queries_of_their_own_may_have_scores_of_them(
    lane: Lane, select: str
) -> None:
    # The queries of the first item lie in two blocks, those of the second in three.
    rng = np.random.default_rng(15)
    q, (k, v) = rng.normal(size=(2, 2, 6, 4)), rng.normal(size=(2, 2, 1, 24, 4))
    given = rng.integers(-9, 9, (2, 2, 3, 6)).astype(float)
    options = {"block_scores": given, "per": "block", "block_size": 4, "top_k": 2, "route": 2}
    options |= {"select": select, "q_offset": np.asarray([0, 3])}
    agrees(lane, sparse_attention, reference.sparse_attention, Case(q, k, v, options))


def test_what_is_always_seen_may_depend_on_how_many_keys_there_are() -> None:
    q, k, v = np.random.default_rng(16).normal(size=(3, 2, 24, 4))
    how = {"block_size": 4, "top_k": 1}
    got, expected = (
        sparse_attention(q, k, v, always=patterns.Random(1, 0, size=4, keys=keys), **how)
        for keys in (None, 24)
    )
    np.testing.assert_array_equal(got, expected)


def masked(selection: np.ndarray[Any, Any], nk: int, size: int | None) -> np.ndarray[Any, Any]:
    """Which keys a selection names: of keys, or of blocks of `size`."""
    n = nk if size is None else -(-nk // size)
    named = (selection[..., None] == np.arange(n)).any(-2)
    return named if size is None else np.repeat(named, size, axis=-1)[..., :nk]


@pytest.mark.parametrize("route", [None, 3])
@pytest.mark.parametrize("offset", [0, 3, 9])
def test_a_selection_of_queries_that_do_not_fill_their_blocks(
    route: int | None, offset: int
) -> None:
    rng = np.random.default_rng(15)
    q, (k, v) = rng.normal(size=(2, 13, 4)), rng.normal(size=(2, 1, 24, 4))
    options = {"block_size": 4, "top_k": 5, "route": route, "q_offset": offset}
    _, found = sparse_attention(q, k, v, return_selection=True, **options)
    _, expected = reference.sparse_attention(q, k, v, return_selection=True, **options)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("select", ["keys", "blocks"])
@pytest.mark.parametrize("score", ["mean", "bound", "best"])
def test_a_selection_is_of_what_is_visible_elsewhere(select: str, score: str) -> None:
    rng = np.random.default_rng(0)
    n, size = 61, 7
    q, k, v = rng.normal(size=(3, 2, n, 4))
    visible = rng.random((n, n)) < 0.4
    block = np.arange(n) // size
    how = {"select": select, "score": score, "block_size": size, "top_k": 4, "mask": visible}
    out, found = sparse_attention(q, k, v, return_selection=True, **how)
    assert found.shape == (2, n, 4)
    for row in found.reshape(-1, 4):
        real = row[row >= 0]
        assert (np.diff(real) > 0).all(), row
        assert (row[len(real) :] == -1).all(), row
    named = masked(found, n, None if select == "keys" else size)
    assert not (named & (block[:, None] == block)).any()
    if select == "keys":
        assert not (named & ~visible).any()
    seen = visible & (named | (block[:, None] == block))
    dense = attention(q, k, v, mask=seen)
    assert np.allclose(out, dense, atol=output_error(q, k, v, dtype="float64"), rtol=0)


# What a part of the choice says, held against every pair; Dask does these in its blocks.
PARTS = pytest.mark.lanes("numpy", "strict", "strict-device1", "torch", "torch-cuda", "cupy")
SEEN = (
    sights.causal(), sights.window(4, 1), sights.prefix(9), sights.prefix(np.array([9, 0, 13])),
    sights.strided(3) & sights.prefix(7), sights.where(3, 2) & sights.window(3, 0),
    sights.segments(np.arange(10).reshape(1, 10) // 4, np.arange(13).reshape(1, 13) // 3),
)  # fmt: skip


def a_call(sight: sights.Sight, always: sights.Sight | None) -> tuple[Any, dict[str, Any]]:
    """Of lengths, heads, items and widths that are all different."""
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(3, 4, 10, 5)), *rng.normal(size=(2, 3, 2, 13, 5))
    options = {"block_size": 4, "top_k": 2, "route": 2, "select": "keys", "per": "query"}
    return arrays, options | {"pattern": sight} | ({"always": always} if always else {})


def of_one_head(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Without the axis of query heads, where it has one."""
    return x if x.ndim == 2 else x[..., 0, :, :]


@PARTS
@pytest.mark.parametrize("always", [None, sights.window(1, 0), sights.prefix(2), sights.strided(2)])
@pytest.mark.parametrize("sight", SEEN, ids=str)
def test_what_can_be_chosen_is_what_holds_a_free_key(
    lane: Lane, sight: sights.Sight, always: sights.Sight | None
) -> None:
    def holds(*arrays: Any, **options: Any) -> Any:
        call, choice = read_sparse(*arrays, **options)
        return routing.holds(call, choice, routing.Rows(0, call.lengths[0]))

    arrays, options = a_call(sight, always)
    got = of_one_head(lane.to_numpy(lane.call(holds, *arrays, dtype="float64", **options)))
    free = sight.table(10, 13, (3,), np.full(3, 3))
    if always is not None:
        free = free & ~always.table(10, 13, (3,), np.full(3, 3))
    own = np.arange(13) // 4 == (np.arange(10)[:, None] + 3) // 4
    expected = np.stack([(free & ~own)[..., j : j + 4].any(-1) for j in range(0, 13, 4)], axis=-1)
    shape = np.broadcast_shapes(got.shape, expected.shape)
    np.testing.assert_array_equal(np.broadcast_to(got, shape), np.broadcast_to(expected, shape))


@PARTS
@pytest.mark.parametrize("sight", SEEN, ids=str)
def test_keys_seen_by_any_are_those_of_the_table(lane: Lane, sight: sights.Sight) -> None:
    def seen_by_any(*arrays: Any, **options: Any) -> Any:
        return routing.seen_by_any(read_sparse(*arrays, **options)[0], 10)

    arrays, options = a_call(sight, None)
    got = of_one_head(lane.to_numpy(lane.call(seen_by_any, *arrays, dtype="float64", **options)))
    expected = sight.table(10, 13, (3,), np.full(3, 3)).any(-2, keepdims=True)
    np.testing.assert_array_equal(np.broadcast_to(got, expected.shape), expected)


@pytest.mark.parametrize("score", ["mean", "bound", "best"])
@pytest.mark.parametrize("select", ["keys", "blocks"])
@pytest.mark.lanes("numpy", "strict", "torch", "dask")
def test_a_block_of_nothing_finite_is_chosen_by_the_rule(
    lane: Lane, score: str, select: str
) -> None:
    q, k, v = np.random.default_rng(3).normal(size=(3, 2, 24, 4))
    k[0, 8:12], k[1, 15] = np.nan, np.inf
    options = {"block_size": 4, "top_k": 2, "route": 2, "score": score, "select": select}
    options |= {"per": "query", "return_selection": True, "return_lse": True}
    with np.errstate(invalid="ignore"):
        *_, expected = reference.sparse_attention(q, k, v, **options)
    for attend in (in_rows(5), sparse_attention):
        *_, got = lane.call(attend, q, k, v, dtype="float64", **options)
        assert np.array_equal(lane.to_numpy(got), expected)


@pytest.mark.lanes("numpy", "strict", "torch", "dask")
@pytest.mark.parametrize(("nq", "nk"), [(13, 8), (8, 13)])
def test_documents_of_more_queries_than_keys(lane: Lane, nq: int, nk: int) -> None:
    rng = np.random.default_rng(4)
    q, (k, v) = rng.normal(size=(2, nq, 3)), rng.normal(size=(2, 2, nk, 3))
    ids = (np.arange(nq) * 3 // nq, np.arange(nk) * 3 // nk)
    options = {"segment_ids": ids, "block_size": 3, "top_k": 2, "route": 2, "per": "query"}
    for attend in (in_rows(5), sparse_attention):
        agrees(lane, attend, reference.sparse_attention, Case(q, k, v, options))


@pytest.mark.lanes("numpy", "strict", "torch", "dask", "jax")
def test_equal_numbers_are_sorted_as_they_stand(lane: Lane) -> None:
    x = np.random.default_rng(5).integers(0, 3, (2, 5, 40))
    got = lane.call(lambda x: loops.stable_argsort(x, xp=array_namespace(x)), x, dtype="float64")
    np.testing.assert_array_equal(lane.to_numpy(got), np.argsort(x, axis=-1, kind="stable"))


@pytest.mark.lanes("numpy", "strict", "torch", "dask")
@pytest.mark.parametrize("per", ["query", "block"])
def test_a_selection_without_heads_has_none(lane: Lane, per: str) -> None:
    q, k, v = np.random.default_rng(6).normal(size=(3, 1, 14, 4))
    options = {"per": per, "block_size": 4, "top_k": 2, "return_selection": True}

    def attend(*arrays: Any) -> Any:
        return sparse_attention(*arrays, **options)[1]

    one = lane.call(attend, q, k, v, dtype="float64")
    alone = lane.call(attend, q[0], k[0], v[0], dtype="float64")
    assert tuple(alone.shape) == tuple(one.shape[1:])
    np.testing.assert_array_equal(lane.to_numpy(alone), lane.to_numpy(one)[0])


# -- Limits -----------------------------------------------------------------------------------


@not_under_jit
@for_all(case=cases(), size=st.sampled_from((1, 3, 16)))
def test_all_blocks_chosen_is_dense(lane: Lane, case: Case, size: int) -> None:
    dense = lane.to_numpy(lane.call(attention, *case.arrays, dtype="float64", **case.options))
    for per in ("query", "block", "group"):
        options = {"select": "blocks", "top_k": case.lengths[1], "per": per, "block_size": size}
        is_sparse(lane, case, options, dense)


@pytest.mark.parametrize("select", ["keys", "blocks"])
@pytest.mark.parametrize("per", ["query", "block", "group"])
def test_nothing_chosen_leaves_what_is_always_seen(lane: Lane, select: str, per: str) -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(3, 2, 40, 4))
    block, p = np.arange(40) // 6, np.arange(40)
    window = (p[:, None] - p >= 0) & (p[:, None] - p <= 3)
    own = block[:, None] == block
    expected = reference.softmax_attention(q, k, v, mask=own | window | (p < 2) | (p < 2)[:, None])
    always = sights.window(3, 0) | sights.everywhere(2)
    options = {"top_k": 0, "block_size": 6, "select": select, "per": per, "always": always}
    is_sparse(lane, Case(q, k, v), options, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [64, 61])
def test_bounds_leave_out_no_key_that_wins(lane: Lane, n: int, causal: bool) -> None:
    # Keys in clusters, so that most blocks cannot hold a winner.
    rng = np.random.default_rng(3)
    centres = 6 * rng.normal(size=(2, -(-n // 8), 1, 4))
    k = (centres + 0.1 * rng.normal(size=(2, -(-n // 8), 8, 4))).reshape(2, -1, 4)[:, :n]
    q, v = rng.normal(size=(2, 2, n, 4))
    how = {"block_size": 8, "top_k": 5, "route": None, "is_causal": causal}
    exact = reference.sparse_attention(q, k, v, **how)
    is_sparse(lane, Case(q, k, v), {**how, "score": "bound"}, exact)


def test_bounds_leave_out_most_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from arrattn._core import sparse_jobs

    rng = np.random.default_rng(3)
    n, size, scored = 512, 16, []
    centres = 6 * rng.normal(size=(1, n // size, 1, 8))
    k = (centres + 0.1 * rng.normal(size=(1, n // size, size, 8))).reshape(1, n, 8)
    q, v = rng.normal(size=(2, 1, n, 8))
    q[:] = q[:, :1]  # all look for the same
    was = sparse_jobs.Head._all_scores

    def record(head: Any, span: Any, blocks: Any) -> Any:
        scored.append(len(blocks) * size * len(span.q))
        return was(head, span, blocks)

    monkeypatch.setattr(sparse_jobs.Head, "_all_scores", record)
    how = {"block_size": size, "top_k": 5, "route": None}
    exact = sparse_attention(q, k, v, **how)
    whole = sum(scored)
    scored.clear()
    got = sparse_attention(q, k, v, score="bound", **how)
    assert sum(scored) < whole / 4
    assert np.allclose(got, exact, atol=2 * output_error(q, k, v, dtype="float64"), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n", [1, 7, 16, 61])
def test_the_least_exponential_is_what_numpy_says(dtype: str, n: int) -> None:
    # Sparse attention on NumPy takes it off, so that what is hidden weighs 0 exactly.
    least = np.finfo(dtype)
    exponents = np.full((n, 2), least.minexp, dtype)
    for x in (exponents, exponents[:, 0], exponents[::-1].copy()):
        assert (np.exp2(x) == least.tiny).all()


@pytest.mark.lanes("numpy")
@pytest.mark.parametrize(
    "options",
    [{}, {"select": "blocks"}, {"select": "blocks", "per": "block"}, {"route": None}],
    ids=["keys", "blocks", "together", "exact"],
)
def test_scores_far_above_those_of_the_own_block_are_held(
    lane: Lane, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from arrattn._core import sparse_jobs

    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, 2, 96, 8))
    q += 9
    k[:, :24] += 50  # at least a thousand above the others: no exponential of a sum has room
    lost, was = [], sparse_jobs.Head._watched

    def record(head: Any, *args: Any) -> None:
        was(head, *args)
        lost.append(head.lost)

    monkeypatch.setattr(sparse_jobs.Head, "_watched", record)
    how = {"block_size": 8, "top_k": 3, "route": 3, "is_causal": True, "scale": 1.0, **options}
    is_sparse(lane, Case(q, k, v), how, reference.sparse_attention(q, k, v, **how))
    assert lost
    assert not any(lost)


@pytest.mark.parametrize("select", ["keys", "blocks"])
@pytest.mark.parametrize("score", ["mean", "bound", "best"])
def test_the_order_of_blocks_does_not_matter(lane: Lane, select: str, score: str) -> None:
    # Queries behind the keys have no own block.
    rng = np.random.default_rng(4)
    q, (k, v) = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 2, 30, 4))
    order = (5 * rng.permutation(6)[:, None] + np.arange(5)).reshape(-1)
    how = {"select": select, "score": score, "block_size": 5, "top_k": 2, "q_offset": 30}
    expected = reference.sparse_attention(q, k, v, **how)
    is_sparse(lane, Case(q, k[:, order], v[:, order]), how, expected)


@pytest.mark.parametrize("per", ["query", "block", "group"])
def test_blocks_that_tie_are_taken_from_the_first(lane: Lane, per: str) -> None:
    n, size = 24, 3
    q, v = np.ones((2, n, 2)), np.zeros((1, n, 1))
    k = np.ones((1, n, 2))
    how = {"select": "blocks", "block_size": size, "top_k": 2, "per": per}
    _, found = lane.call(sparse_attention, q, k, v, dtype="float64", return_selection=True, **how)
    found = lane.to_numpy(found)
    for i in range(found.shape[-2]):
        own = i if per == "block" else i // size
        expected = [b for b in range(n // size) if b != own][:2]
        assert (found[..., i, :] == expected).all(), (i, found[..., i, :])


@pytest.mark.parametrize("per", ["query", "block", "group"])
@pytest.mark.parametrize("how", [
    {}, {"scale": -0.3}, {"block_size": 16}, {"is_causal": False}, {"score": "bound"},
    {"score": "bound", "scale": -0.3, "block_size": 11},
], ids=str)  # fmt: skip
def test_whole_numbers_tie_where_they_should(lane: Lane, per: str, how: dict[str, Any]) -> None:
    how = {"select": "blocks", "per": per, "is_causal": True, "return_selection": True} | how
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-2, 3, (8, heads, 130, 4)).astype(float) for heads in (4, 2))
    v = rng.normal(size=(8, 2, 130, 3))
    _, found = lane.call(sparse_attention, q, k, v, dtype="float64", **how)
    _, expected = reference.sparse_attention(q, k, v, **how)
    np.testing.assert_array_equal(lane.to_numpy(found), expected)


@pytest.mark.parametrize("score", ["mean", "bound"])
@pytest.mark.parametrize("alike", [True, False])
def test_whole_numbers_tie_for_heads_with_masks_of_their_own(
    lane: Lane, score: str, alike: bool
) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-2, 3, (16, heads, 60, 2)).astype(float) for heads in (4, 2))
    how = {"select": "blocks", "per": "group", "block_size": 6, "top_k": 2, "scale": 0.1}
    how |= {"score": score, "return_selection": True}
    mask = np.ones((4, 1, 60), bool)
    if not alike:  # of blocks of five keys for one head and six for another: whole means, too
        mask[::2, :, 1::6] = False
        k *= 30
    _, found = lane.call(sparse_attention, q, k, k, dtype="float64", mask=mask, **how)
    _, expected = reference.sparse_attention(q, k, k, mask=mask, **how)
    np.testing.assert_array_equal(lane.to_numpy(found), expected)
    if alike:
        _, without = reference.sparse_attention(q, k, k, **how)
        np.testing.assert_array_equal(expected, without)


def test_the_reference_takes_no_heads_at_all() -> None:
    none = np.zeros((0, 4, 2))
    out = reference.sparse_attention(none, none, none, per="group", block_size=2)
    assert out.shape == none.shape


# -- Theory -----------------------------------------------------------------------------------


def test_recall_of_exact_selection_grows_with_the_blocks_searched() -> None:
    rng = np.random.default_rng(5)
    q, k, v = rng.normal(size=(3, 4, 256, 16))

    def chosen(route: int | None) -> np.ndarray[Any, Any]:
        how = {"block_size": 16, "top_k": 16, "route": route}
        _, found = sparse_attention(q, k, v, return_selection=True, **how)
        return masked(found, 256, None)

    exact = chosen(None)
    recalls = [(chosen(route) & exact).sum() / exact.sum() for route in (1, 2, 4, 8, 12, 16)]
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.5
    assert recalls[-1] == 1.0


@pytest.mark.parametrize(("size", "signal"), [(2, 0.6), (8, 1.0), (8, 2.0), (32, 2.0)])
def test_means_find_a_needle_as_often_as_theory_says(size: int, signal: float) -> None:
    # Keys of noise N(0, 1 / D), and one of them with `signal` times a query of length 1 on top.
    # Scores of two means of B keys then differ by N(signal / B, 2 / (D B)): the block of the
    # needle wins with probability Phi(signal * sqrt(D / (2 B))), as in arXiv:2511.11571.
    rng = np.random.default_rng(6)
    d, trials = 16, 600
    q = rng.normal(size=(trials, 1, d))
    q /= np.linalg.norm(q, axis=-1, keepdims=True)
    k = rng.normal(size=(trials, 3 * size, d)) / math.sqrt(d)
    k[:, rng.integers(size)] += signal * q[:, 0]
    how = {"select": "blocks", "block_size": size, "top_k": 1, "q_offset": 2 * size}
    _, found = sparse_attention(q, k, k, return_selection=True, **how)
    due = 0.5 * (1 + math.erf(signal * math.sqrt(d / (2 * size)) / math.sqrt(2)))
    hits = float((found == 0).mean())
    assert abs(hits - due) < 4 * math.sqrt(due * (1 - due) / trials) + 1 / trials, (hits, due)


# -- Gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{}, {"route": None}, {"select": "blocks"}, {"select": "blocks", "per": "block"}],
    ids=str,
)
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gradients_are_those_of_what_was_selected(library: str, how: dict[str, Any]) -> None:
    rng = np.random.default_rng(7)
    n, size = 30, 5
    q, k, v, w = rng.normal(size=(4, 2, n, 4))
    how = {"block_size": size, "top_k": 3, "is_causal": True, **how}
    _, found = sparse_attention(q, k, v, return_selection=True, **how)
    blocks = how.get("select") == "blocks"
    found = np.repeat(found, size, axis=-2)[:, :n] if how.get("per") == "block" else found
    block = np.arange(n) // size
    seen = masked(found, n, size if blocks else None) | (block[:, None] == block)

    def ours(*x: Any) -> Any:
        return sparse_attention(*x, **how)

    def dense(*x: Any) -> Any:
        mask = torch.asarray(seen) if library == "torch" else jnp.asarray(seen)
        return attention(*x, mask=mask, is_causal=True)

    if library == "torch":
        torch = pytest.importorskip("torch")

        def gradients(f: Any) -> list[Any]:
            x = [torch.asarray(a).requires_grad_() for a in (q, k, v)]
            (f(*x) * torch.asarray(w)).sum().backward()
            return [a.grad.numpy() for a in x]
    else:
        jax = pytest.importorskip("jax")
        jnp = jax.numpy

        def gradients(f: Any) -> list[Any]:
            x = [jnp.asarray(a) for a in (q, k, v)]
            return [np.asarray(g) for g in jax.grad(lambda *x: (f(*x) * w).sum(), (0, 1, 2))(*x)]

    for got, expected in zip(gradients(ours), gradients(dense), strict=True):
        size_of = float(np.abs(expected).max())
        error = 64 * output_error(q, k, v, dtype=str(expected.dtype)) * max(size_of, 1)
        assert np.abs(got - expected).max() <= error
        assert size_of > 0


def test_patterns_of_positions_hold_in_the_routed_part() -> None:
    # On NumPy's own schedule, of many blocks: windows, lengths, segments and the last short block.
    rng = np.random.default_rng(8)
    q, k, v = rng.integers(-3, 4, (3, 2, 205, 8)).astype(float)
    ids = np.arange(205) // 64
    for how in (
        {"is_causal": True},
        {"window": (90, 30)},
        {"kv_lengths": 150, "is_causal": True},
        {"segment_ids": ids, "is_causal": True},
        {"pattern": patterns.Random(3, 1, size=8), "is_causal": True},
        {"q_offset": -37},
        {"q_offset": 60},
    ):
        for choice in (
            {"route": 3},
            {"route": None},
            {"select": "blocks"},
            {"select": "blocks", "per": "block"},
            {"select": "blocks", "per": "block", "score": "bound"},
        ):
            options = {"block_size": 16, "top_k": 4, "scale": 0.125, **how, **choice}
            expected = reference.sparse_attention(q, k * 16, v, **options)
            got = sparse_attention(q, k * 16, v, **options)
            within = 2 * output_error(q, k * 16, v, dtype="float64", scale=0.125)
            assert np.abs(got - expected).max() <= within, options
