"""Sparse attention: its definition, its limits, and ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import LANES, Lane
from laws import for_all
from softmax import agrees, is_sparse
from strategies import Case, cases
from tolerance import output_error

from arrattn import attention, reference, sparse_attention
from arrattn.patterns import Dilated, Window

COUNTS = st.sampled_from((None, 1, 0, 2, 5, 40))


# On JAX such a call is compiled with jit around it and without: one is enough for some laws.
not_under_jit = pytest.mark.lanes(*(lane.name for lane in LANES if lane.name != "jax-jit"))


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    """Block size, top-k and route."""
    return {
        "block_size": draw(st.sampled_from((None, 3, 1, 4, 100))),
        "top_k": draw(COUNTS),
        "route": draw(st.sampled_from((None, 1, 2, 8))),
    }


def unambiguous(case: Case) -> Case:
    """
    The case with whole numbers for q and k, whose scores are exact in any order of summing.

    Selection is a jump: where two scores differ by a rounding, two right ways to compute
    them may choose differently. Exact scores leave only true ties, which are defined. Keys
    are multiples of 60, so that means of up to six of them are whole numbers too.
    """
    q = np.clip(np.round(case.q), -4, 4)
    k = np.clip(np.round(case.k), -4, 4) * 60
    options = {n: np.asarray(np.round(x)) if n == "bias" else x for n, x in case.options.items()}
    options.pop("softcap", None)  # tanh is not exact: it has a test of its own
    options["scale"] = {None: 1, 0.3: 0.5, 0.0: 0, -0.5: -1}[options.get("scale")] * 2.0**-7
    return Case(q, k, case.v, options, case.how)


@for_all(case=cases().map(unambiguous), choice=choices())
def test_equals_the_reference(lane: Lane, case: Case, choice: dict[str, Any]) -> None:
    case.options.update(choice)
    agrees(lane, sparse_attention, reference.sparse_attention, case)


@not_under_jit
@for_all(case=cases().map(unambiguous), choice=choices())
def test_equals_the_reference_in_single_precision(
    lane: Lane, case: Case, choice: dict[str, Any]
) -> None:
    case.options.update(choice)
    agrees(lane, sparse_attention, reference.sparse_attention, case, dtype="float32")


@pytest.mark.parametrize("route", [None, 2])
def test_softcap_comes_before_the_choice(lane: Lane, route: int | None) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 30, 4))
    bias = rng.normal(size=(30, 30))
    case = Case(q, k, v, {"softcap": 0.5, "bias": bias, "route": route, "top_k": 4})
    agrees(lane, sparse_attention, reference.sparse_attention, case)


@pytest.mark.lanes("numpy", "torch")  # parts of blocks are NumPy's; one of the others beside it
@pytest.mark.parametrize("size", [33, 64, 100])
@pytest.mark.parametrize("spread", [1, 30])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"window": (20, 0)},
        {"window": (5, 60)},
        {"pattern": ~Window(40, 40)},
        {"pattern": ~Window(70, 70)},
        {"window": (0, 5), "is_causal": True, "kv_lengths": 201},
        {"pattern": Dilated(3, 30, 30)},
    ],
    ids=str,
)
def test_own_blocks_of_many_rows(
    lane: Lane, options: dict[str, Any], size: int, spread: int
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 230, 8))
    more = {"block_size": size, "select": "blocks", "top_k": 1}
    case = Case(q * spread, k, v, {**options, **more})
    agrees(lane, sparse_attention, reference.sparse_attention, case)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (90, 40)}], ids=str)
@pytest.mark.parametrize("route", [None, 3, 8])
@pytest.mark.parametrize(("nq", "nk"), [(300, 300), (65, 257)])
def test_many_blocks(
    lane: Lane, options: dict[str, Any], route: int | None, nq: int, nk: int
) -> None:
    rng = np.random.default_rng(1)
    q, (k, v) = rng.normal(size=(4, nq, 8)), rng.normal(size=(2, 2, nk, 8))
    case = Case(q, k, v, {**options, "route": route})
    agrees(lane, sparse_attention, reference.sparse_attention, case)


@pytest.mark.parametrize("choice", [{"route": 3}, {"select": "blocks", "top_k": 4}], ids=str)
@pytest.mark.parametrize(("nq", "nk"), [(200, 200), (65, 257)])
def test_many_blocks_of_which_every_head_sees_something_else(
    lane: Lane, choice: dict[str, Any], nq: int, nk: int
) -> None:
    rng = np.random.default_rng(2)
    q, (k, v) = rng.normal(size=(4, nq, 8)), rng.normal(size=(2, 2, nk, 8))
    mask = rng.random((4, nq, nk)) < 0.7
    mask[:, 40:60] = True
    agrees(
        lane, sparse_attention, reference.sparse_attention, Case(q, k, v, {"mask": mask} | choice)
    )


@pytest.mark.parametrize("window", [(None, 0), (1, None)], ids=str)
def test_the_mean_of_a_block_leaves_out_what_nobody_sees(
    lane: Lane, window: tuple[int | None, int | None]
) -> None:
    # Queries at 5..8 of 16 keys: blocks are cut by what any of them sees.
    rng = np.random.default_rng(11)
    q, (k, v) = rng.normal(size=(2, 4, 3)), rng.normal(size=(2, 2, 16, 3))
    k[..., [2, 3, 9, 10, 15], :] *= 50  # would turn the route, were they in a mean
    options = {"window": window, "q_offset": 5, "block_size": 3, "top_k": 2, "route": 1}
    agrees(lane, sparse_attention, reference.sparse_attention, Case(q, k, v, options))


# -- Limits -----------------------------------------------------------------------------------


@not_under_jit
@for_all(case=cases(), size=st.sampled_from((1, 3, 16)))
def test_all_keys_chosen_is_dense(lane: Lane, case: Case, size: int) -> None:
    dense = lane.call(attention, *case.arrays, dtype="float64", **case.options)
    nk = case.lengths[1]
    for top_k in (nk, nk + 5):
        options = {"top_k": top_k, "route": None, "block_size": size}
        is_sparse(lane, case, options, lane.to_numpy(dense))


@for_all(case=cases(empty=False), route=st.sampled_from((None, 1)))
def test_one_block_is_dense_for_queries_inside(lane: Lane, case: Case, route: int | None) -> None:
    case.options.pop("q_offset", None)
    case.options.pop("kv_lengths", None)
    nq, nk = case.lengths
    if nq > nk:  # those before the first key have no own block
        case = Case(case.q[..., :1, :], case.k, case.v, {})
    dense = lane.call(attention, *case.arrays, dtype="float64", **case.options)
    options = {"block_size": nk + 2, "top_k": 0, "route": route}
    is_sparse(lane, case, options, lane.to_numpy(dense))


@pytest.mark.parametrize("route", [None, 2])
@pytest.mark.parametrize("n", [12, 13, 100])
def test_nothing_chosen_is_block_diagonal(lane: Lane, route: int | None, n: int) -> None:
    rng = np.random.default_rng(2)
    q, k, v = rng.normal(size=(3, 2, n, 4))
    block = np.arange(n) // 5
    case = Case(q, k, v)
    diagonal = reference.softmax_attention(q, k, v, mask=block[:, None] == block)
    is_sparse(lane, case, {"top_k": 0, "block_size": 5, "route": route}, diagonal)


def test_positions_outside_the_keys_have_no_own_block(lane: Lane) -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 1, 4, 4))
    for offset in (-4, 4, 1000):
        options = {"q_offset": offset, "top_k": 0, "block_size": 2}
        is_sparse(lane, Case(q, k, v), options, np.zeros((1, 4, 4)))


@pytest.mark.parametrize("route", [None, 1])
def test_every_block_routed_is_exact(lane: Lane, route: int | None) -> None:
    rng = np.random.default_rng(4)
    q, k, v = rng.normal(size=(3, 2, 40, 4))
    exact = reference.sparse_attention(q, k, v, block_size=4, top_k=6, route=None)
    options = {"block_size": 4, "top_k": 6, "route": 10 if route else None}
    is_sparse(lane, Case(q, k, v), options, exact)


# -- Ties -------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [None, 1, 2])
def test_ties_go_to_the_lower_index(lane: Lane, route: int | None) -> None:
    # All scores are equal; v tells which keys were taken, one power of two for each.
    n, size, top_k = 12, 3, 2
    q = k = np.zeros((1, n, 2))
    v = (2.0 ** np.arange(n))[None, :, None]
    expected = np.zeros((1, n, 1))
    for i in range(n):
        own = [j for j in range(n) if j // size == i // size]
        others = [j for j in range(n) if j // size != i // size][:top_k]
        expected[0, i, 0] = sum(2.0**j for j in own + others) / (size + top_k)
    options = {"block_size": size, "top_k": top_k, "route": route}
    is_sparse(lane, Case(q, k, v), options, expected)


@pytest.mark.parametrize("route", [None, 3])
def test_hidden_keys_are_never_chosen(lane: Lane, route: int | None) -> None:
    # The best key by far is hidden; the next best has to be taken in its place.
    q, k = np.ones((1, 12, 1)), np.zeros((1, 12, 1))
    k[0, 7], k[0, 10] = 100.0, 50.0
    v = np.zeros((1, 12, 1))
    v[0, 7], v[0, 10] = 9.0, 1.0
    seen = np.ones((12, 12), bool)
    seen[:, 7] = False
    for options in ({"mask": seen}, {"bias": np.where(seen, 0.0, -np.inf)}):
        choice = {"top_k": 1, "block_size": 2, "route": route}
        got = lane.call(sparse_attention, q, k, v, dtype="float64", **choice, **options)
        within = 2 * output_error(q, k, v, dtype="float64") + 12 * np.exp(-50.0)
        lane.check(got, np.ones((1, 12, 1)), dtype="float64", within=within)


@pytest.mark.lanes("numpy", "strict", "strict-device1", "torch", "jax", "dask")  # jit adds nothing
@pytest.mark.parametrize("per", ["query", "block", "group"])
@pytest.mark.parametrize("score", ["mean", "bound", "best"])
def test_the_choice_follows_the_sign_of_the_scale(lane: Lane, score: str, per: str) -> None:
    rng = np.random.default_rng(5)
    q, (k, v) = rng.normal(size=(4, 24, 4)), rng.normal(size=(2, 2, 24, 4))
    how = {"score": score, "per": per, "route": 2, "top_k": 3, "block_size": 4}
    for scale in (-0.5, 0.5):
        case = Case(q, k, v, {"scale": scale} | how)
        agrees(lane, sparse_attention, reference.sparse_attention, case)
