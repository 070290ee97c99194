"""What the exhibits are variations of is right, and each of them is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from lanes import Lane, close
from laws import for_all
from softmax import agrees
from strategies import Case, cases, windows
from sums import linear_cases, linear_errors, options_of

from arrattn import DeltaState, LinearState, attention, feature_maps, reference
from arrattn.patterns import Global, Window
from arrattn.testing import strategies
from arrattn.testing.bounds import delta_errors
from museum import EXHIBITS, RIGHT, Exhibit
from museum.gradients import Differentiable
from museum.right import Array

on_numpy = pytest.mark.lanes("numpy")  # plain NumPy is all that they are


@on_numpy
@for_all(case=cases())
def test_dense(lane: Lane, case: Case) -> None:
    agrees(lane, RIGHT["dense"], reference.softmax_attention, case)


@on_numpy
@for_all(case=cases(), window=windows())
def test_local(lane: Lane, case: Case, window: Any) -> None:
    case.options["window"] = window
    agrees(lane, RIGHT["local"], reference.local_attention, case)


@on_numpy
@for_all(
    case=cases(),
    top_k=st.sampled_from((None, 0, 2)),
    route=st.sampled_from((None, 1)),
    select=st.sampled_from(("keys", "blocks")),
    per=st.sampled_from(("query", "block", "group")),
    score=st.sampled_from(("mean", "bound", "best")),
)
def test_sparse(lane: Lane, case: Case, **choice: Any) -> None:
    case.options.update(choice, block_size=3)
    agrees(lane, RIGHT["sparse"], reference.sparse_attention, case)


@on_numpy
@for_all(case=linear_cases())
def test_linear(lane: Lane, case: Case) -> None:
    options = options_of(case) | {"return_state": True}
    out, state = RIGHT["linear"](*case.arrays, **options)
    expected, after = reference.linear_attention(*case.arrays, **options)
    errors = linear_errors(case, "float64", expected)
    for got, want, within in zip((out, *state), (expected, *after), errors, strict=True):
        close(got, want, within=within)


@on_numpy
@for_all(case=strategies.cases("delta", sees=("key_mask", "kv_lengths", "segment_ids")))
def test_delta(lane: Lane, case: Any) -> None:
    out, state = RIGHT["delta"](*case.arrays, **case.options, return_state=True)
    expected = reference.delta_attention(*case.arrays, **case.options)
    within, state_within = delta_errors(case, "float64", expected)
    close(out, expected, within=within)
    if "segment_ids" not in case.options:
        _, after = reference.delta_attention(*case.arrays, **case.options, return_state=True)
        close(state.S, after.S, within=state_within)


def test_linear_with_decay() -> None:
    options = LINEAR[-1] | {"return_state": True}
    got, expected = (
        RIGHT["linear"](Q, K, V, **options),
        reference.linear_attention(Q, K, V, **options),
    )
    for x, want in zip((got[0], *got[1]), (expected[0], *expected[1]), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-12)


# -- And each of them is wrong ----------------------------------------------------------------

RNG = np.random.default_rng(0)
Q, (K, V) = RNG.normal(size=(2, 4, 6, 4)), RNG.normal(size=(2, 2, 2, 9, 4))
MASK = RNG.random((2, 1, 6, 9)) < 0.6
MASK[:, :, 3] = False
IDS = np.arange(6) // 4, np.arange(9) // 5
LENGTHS = np.asarray([4, 8])


def with_last(x: Array, value: float) -> Array:
    """The array with another last key."""
    x = x.copy()
    x[..., -1, :] = value
    return x


HIDES_THE_LAST: dict[str, Any] = {"mask": np.arange(9) < 8}
LONG = (
    np.full((1, 1, 2), 200.0),
    np.full((1, 5000, 2), 200.0),
    np.arange(5000.0)[None, :, None] // 2500,
)
CALLS: list[tuple[tuple[Array, ...], dict[str, Any]]] = [
    ((Q, K, V), {}),
    ((Q, K, V), {"scale": 0.3, "mask": MASK}),
    ((Q, K, V), {"kv_lengths": LENGTHS}),
    ((Q, K, V), {"q_offset": 0}),
    ((Q, K, V), {"q_offset": 6}),
    ((Q, K, V), {"is_causal": True, "mask": MASK}),
    ((Q, K, V), {"is_causal": True, "q_offset": 1}),
    ((Q, K, V), {"is_causal": True, "q_offset": -2}),
    ((Q, K, V), {"is_causal": True, "kv_lengths": LENGTHS}),
    ((Q, K, V), {"segment_ids": IDS}),
    ((Q, K, V), {"pattern": Window(1, 1) | Global(1)}),
    ((Q, K, V), {"softcap": 1.0, "bias": 2 * RNG.normal(size=(6, 9)), "mask": MASK}),
    ((Q, K, V), {"sinks": np.asarray([0.0, 1, 2, 3])}),
    ((Q, K, V), {"scale": -200.0, "mask": MASK, "is_causal": True}),
    ((100 * Q, 100 * K, V), {"mask": MASK}),
    ((Q, K, with_last(V, np.nan)), HIDES_THE_LAST),
    ((Q, with_last(K, np.nan), V), HIDES_THE_LAST),
    ((Q, with_last(K, 1e6), V), HIDES_THE_LAST),
    ((Q, K, with_last(V, np.nan)), {}),
    ((K[:, :, :6], Q[:, :2, :4], Q[:, :2, :4]), {"is_causal": True}),
    (tuple(x.astype(np.float16) for x in LONG), {}),
    ((Q[:0], K[:0], V[:0]), {}),
]
WINDOWS = [(2, 1), (0, 2), (1, 0), (None, None), (None, 1), (2, None)]
CHOICES = [
    {"top_k": 2, "route": None, "block_size": 3},
    {"top_k": 2, "route": 1, "block_size": 2},
    {"top_k": 3, "route": 3, "block_size": 2},
    {"top_k": 0, "block_size": 4},
    {"top_k": 1, "route": 1, "block_size": 4, "scale": 0.0},
    *(
        {"block_size": 2, "top_k": 2, "return_selection": True, "select": s, "per": p, "score": b}
        for s in ("keys", "blocks")
        for p in ("query", "block", "group")
        for b in ("mean", "bound", "best")
    ),
    {"block_size": 1, "top_k": 9, "select": "blocks"},
    {"block_size": 2, "top_k": 1, "route": None, "score": "bound", "return_selection": True},
    {"block_size": 3, "top_k": 0, "always": Window(1, 0), "return_selection": True},
    {"block_size": 3, "top_k": 1, "always": Global(1), "return_selection": True},
]
TILES = tuple(RNG.normal(size=(1, 200, 2)) for _ in "qkv")
BY_BLOCKS = np.kron([[1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 0], [1, 0, 1, 1]], np.ones((64, 64)))
LENGTHY: dict[str, Any] = {"mask": BY_BLOCKS[:200, :200] > 0}
GIVEN = np.where(RNG.random((4, 6, 5)) < 0.3, -np.inf, RNG.normal(size=(4, 6, 5)))
WITH_GIVEN: list[tuple[tuple[Array, ...], dict[str, Any]]] = [
    ((Q, K, V), {"block_size": 2, "block_scores": GIVEN, "select": s, "top_k": n, "route": n})
    for s in ("keys", "blocks")
    for n in (1, 4)
]
THERE = np.asarray([1, 1, 0, 1, 1, 1, 1, 1, 0], bool)
MAP = feature_maps.softmax(dim=4, num_features=8, rng=0)
STATE = LinearState(RNG.normal(size=(2, 2, 4, 4)), RNG.random((2, 2, 4)))
LINEAR: list[dict[str, Any]] = [
    {},
    {"is_causal": True, "initial_state": STATE},
    {"is_causal": True, "key_mask": THERE},
    {"kv_lengths": LENGTHS, "is_causal": True},
    {"kv_lengths": 0},
    {"segment_ids": IDS, "normalize": False, "scale": 0.3},
    {"feature_map": MAP, "is_causal": True},
    {"feature_map": None, "initial_state": STATE},
    {"is_causal": True, "initial_state": STATE, "log_decay": -RNG.random((1, 9, 1))},
]
MEMORY = DeltaState(STATE.S)
BETA, FADING = RNG.random((2, 2, 9)), -RNG.random((2, 2, 9, 4))
DELTA: list[dict[str, Any]] = [
    {"beta": BETA},
    {"beta": BETA, "log_decay": FADING, "initial_state": MEMORY, "return_state": True},
    {"beta": BETA, "log_decay": FADING, "key_mask": THERE},
    {"beta": BETA, "kv_lengths": LENGTHS},
    {"beta": BETA, "segment_ids": IDS, "scale": 0.3},
]


def calls_of(family: str) -> list[tuple[tuple[Array, ...], dict[str, Any]]]:
    """Calls in which a wrong attention of the family may give itself away."""
    if family == "local":
        near = [(x, o | {"window": w}) for x, o in CALLS for w in WINDOWS]
        return [*near, (TILES, {"window": (8, 0)})]
    if family == "sparse":
        return [*((x, o | c) for x, o in CALLS for c in CHOICES), *WITH_GIVEN]
    if family == "dense":
        calls = [*CALLS, (TILES, LENGTHY), (TILES, {"is_causal": True})]
        return [(x, o | {"return_lse": True}) for x, o in calls]
    if family == "delta":
        found = [((Q, x, V), o) for o in DELTA for x in (K / 4, with_last(K / 4, np.nan))]
        nine = np.concatenate([Q, Q[..., :3, :]], axis=-2)
        return [*found, ((nine, K / 4, V), {"beta": BETA, "segment_ids": np.arange(9) % 2})]
    scaled = [(Q, K, V), (Q, 40 * K, V), (Q, 0.01 * K, with_last(V, np.nan))]
    half = tuple(x.astype(np.float16) for x in LONG)
    found = [(x, o | {"return_state": True}) for o in LINEAR for x in scaled]
    return [*found, (half, {}), (TILES, {"is_causal": True})]


def results(function: Any, arrays: tuple[Array, ...], options: dict[str, Any]) -> list[Array]:
    """Everything that a call returns, and what it leaves of its arrays."""
    arrays = tuple(x.copy() for x in arrays)
    out = function(*arrays, **options)
    first, rest = out if isinstance(out, tuple) else (out, ())
    return [first, *(rest if isinstance(rest, tuple) else (rest,)), *arrays]


def differ(a: Array, b: Array) -> bool:
    return a.dtype != b.dtype or not np.allclose(a, b, rtol=1e-8, atol=1e-8, equal_nan=True)


def is_wrong(exhibit: Exhibit) -> bool:
    """Whether it differs from the right one somewhere."""
    for arrays, options in calls_of(exhibit.family):
        right = results(RIGHT[exhibit.family], arrays, options)
        try:
            got = results(exhibit.attend, arrays, options)
        except ValueError:
            return True
        if any(differ(a, b) for a, b in zip(got, right, strict=True)):
            return True
    return False


@pytest.mark.parametrize("exhibit", [x for x in EXHIBITS if x.library == "numpy"], ids=repr)
def test_every_exhibit_is_wrong_in_its_numbers_or_in_its_cost_alone(exhibit: Exhibit) -> None:
    assert is_wrong(exhibit) != exhibit.cost


def gradients_of(function: Any, mask: Any) -> list[Array]:
    arrays = [torch.tensor(x, requires_grad=True) for x in (Q, K, V)]
    function(*arrays, mask=torch.tensor(mask)).pow(2).sum().backward()
    return [np.zeros(1) if x.grad is None else x.grad.numpy() for x in arrays]


@pytest.mark.parametrize("exhibit", [x for x in EXHIBITS if x.library == "torch"], ids=repr)
def test_every_gradient_is_wrong_and_every_value_right(exhibit: Exhibit) -> None:
    tensors = [torch.tensor(x) for x in (Q, K, V)]
    got = exhibit.attend(*tensors, mask=torch.tensor(MASK))
    assert not differ(got.numpy(), RIGHT["dense"](Q, K, V, mask=MASK))
    right = gradients_of(Differentiable(), MASK)
    for x, y in zip(right, gradients_of(attention, MASK), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
    wrong = gradients_of(exhibit.attend, MASK)
    assert any(x.shape != y.shape or differ(x, y) for x, y in zip(wrong, right, strict=True))


def test_every_exhibit_says_what_and_where() -> None:
    assert len(EXHIBITS) >= 40
    assert {x.family for x in EXHIBITS} == set(RIGHT)
    assert len({repr(x) for x in EXHIBITS}) == len(EXHIBITS)
    assert all(x.note and x.seen for x in EXHIBITS)
