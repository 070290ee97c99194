"""The reference against sums written out by hand, one pair at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from lanes import Lane, close
from tolerance import C, eps, output_error

from arrattn import LinearState, feature_maps, patterns, reference

RNG = np.random.default_rng(7)
Q, K, V = (
    RNG.normal(size=(2, 4, 5, 3)),
    RNG.normal(size=(2, 2, 7, 3)),
    RNG.normal(size=(2, 2, 7, 2)),
)
NEAR = output_error(Q, K, V, dtype="float64")


def by_hand(see: Any, score: Any = None, sinks: Any = None) -> tuple[Any, Any]:
    """Softmax attention with ``see(b, h, i, j)`` and ``score(b, h, i, j, s)``, in plain Python."""
    out, lse = np.zeros((2, 4, 5, 2)), np.full((2, 4, 5), -np.inf)
    for b, h, i in np.ndindex(2, 4, 5):
        terms = {}
        for j in range(7):
            s = sum(Q[b, h, i, d] * K[b, h // 2, j, d] for d in range(3)) / math.sqrt(3)
            s = s if score is None else score(b, h, i, j, s)
            if see(b, h, i, j) and s != -math.inf:
                terms[j] = math.exp(s)
        total = sum(terms.values()) + (0 if sinks is None else math.exp(sinks[h]))
        if total:
            lse[b, h, i] = math.log(total)
            out[b, h, i] = sum((w * V[b, h // 2, j] for j, w in terms.items()), np.zeros(2)) / total
    return out, lse


def check(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        close(np.asarray(a), b, within=NEAR)


MASK = RNG.random((2, 4, 5, 7)) < 0.6
BIAS = np.where(RNG.random((4, 5, 7)) < 0.2, -np.inf, RNG.normal(size=(4, 5, 7)))
SINKS = RNG.normal(size=4)
IDS = RNG.integers(0, 3, (2, 5)), RNG.integers(0, 3, (2, 7))
LENGTHS, OFFSETS = np.asarray([4, 7]), np.asarray([-1, 3])

CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "nothing": ({}, lambda b, h, i, j: True, None),
    "mask": ({"mask": MASK}, lambda b, h, i, j: MASK[b, h, i, j], None),
    "causal": ({"is_causal": True}, lambda b, h, i, j: j <= i + 2, None),
    "window": ({"window": (1, 2)}, lambda b, h, i, j: i + 1 <= j <= i + 4, None),
    "half a window": ({"window": (None, 0)}, lambda b, h, i, j: j <= i + 2, None),
    "offset": (
        {"window": (0, 1), "q_offset": OFFSETS},
        lambda b, h, i, j: i + OFFSETS[b] <= j <= i + OFFSETS[b] + 1,
        None,
    ),
    "lengths": (
        {"kv_lengths": LENGTHS, "is_causal": True},
        lambda b, h, i, j: j < LENGTHS[b] and j <= i + LENGTHS[b] - 5,
        None,
    ),
    "segments": ({"segment_ids": IDS}, lambda b, h, i, j: IDS[0][b, i] == IDS[1][b, j], None),
    "pattern": (
        {"pattern": patterns.Strided(2) | patterns.Prefix(1)},
        lambda b, h, i, j: (i + 2 - j) % 2 == 0 or j < 1,
        None,
    ),
    "softcap": (
        {"softcap": 0.5},
        lambda b, h, i, j: True,
        lambda b, h, i, j, s: 0.5 * math.tanh(s / 0.5),
    ),
    "bias": ({"bias": BIAS}, lambda b, h, i, j: True, lambda b, h, i, j, s: s + BIAS[h, i, j]),
    "scale": (
        {"scale": -2.0},
        lambda b, h, i, j: True,
        lambda b, h, i, j, s: -2.0 * math.sqrt(3) * s,
    ),
    "all at once": (
        {"mask": MASK, "is_causal": True, "window": (3, None), "softcap": 2.0, "bias": BIAS},
        lambda b, h, i, j: MASK[b, h, i, j] and i - 1 <= j <= i + 2,
        lambda b, h, i, j, s: 2 * math.tanh(s / 2) + BIAS[h, i, j],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sinks", [None, SINKS])
def test_softmax_attention_is_its_sum(name: str, sinks: Any) -> None:
    options, see, score = CASES[name]
    got = reference.softmax_attention(Q, K, V, sinks=sinks, return_lse=True, **options)
    check(got, by_hand(see, score, sinks))


def test_local_attention_is_softmax_attention_in_a_window() -> None:
    check([reference.local_attention(Q, K, V, window=(1, 2))], by_hand(CASES["window"][1])[:1])


@pytest.mark.parametrize("route", [None, 0, 1, 2, 8])
@pytest.mark.parametrize("top_k", [0, 1, 3])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_sparse_attention_sees_what_its_definition_says(
    size: int, top_k: int, route: int | None
) -> None:
    tied = np.round(K * 1.5)  # scores that tie

    def seen(b: int, h: int, i: int) -> set[int]:
        def score(j: int) -> float:
            return float(Q[b, h, i] @ tied[b, h // 2, j])

        visible = [j for j in range(7) if MASK[b, h, i, j]]
        own = [j for j in visible if j // size == (i + 2) // size]
        rest = [j for j in visible if j not in own]

        def block_score(block: int) -> float:
            keys = [j for j in range(7) if j // size == block and MASK[b, h, :, j].any()]
            return float(Q[b, h, i] @ np.mean([tied[b, h // 2, j] for j in keys], axis=0))

        blocks = sorted({j // size for j in rest}, key=lambda x: (-block_score(x), x))
        searched = [
            j for j in rest if j // size in blocks[: len(blocks) if route is None else route]
        ]
        return {*own, *sorted(searched, key=lambda j: (-score(j), j))[:top_k]}

    table = np.zeros((2, 4, 5, 7), bool)
    for b, h, i in np.ndindex(2, 4, 5):
        table[b, h, i, list(seen(b, h, i))] = True
    got = reference.sparse_attention(
        Q, tied, V, mask=MASK, block_size=size, top_k=top_k, route=route, return_lse=True
    )
    check(got, reference.softmax_attention(Q, tied, V, mask=table, return_lse=True))


def test_sparse_attention_has_its_limits() -> None:
    dense = reference.softmax_attention(Q, K, V, is_causal=True)
    for options in ({"top_k": 7, "route": None}, {"block_size": 9}, {"block_size": 7, "top_k": 0}):
        check([reference.sparse_attention(Q, K, V, is_causal=True, **options)], [dense])
    blocks = np.arange(7) // 3 == (np.arange(5)[:, None] + 2) // 3
    diagonal = reference.softmax_attention(Q, K, V, mask=blocks)
    check([reference.sparse_attention(Q, K, V, block_size=3, top_k=0)], [diagonal])
    # Without sizes: ceil(sqrt(7)) = 3, for blocks and for keys, and eight blocks searched.
    named = {"block_size": 3, "top_k": 3, "route": 8}
    check([reference.sparse_attention(Q, K, V)], [reference.sparse_attention(Q, K, V, **named)])


def linear_by_hand(see: Any, normalize: bool, state: LinearState | None) -> np.ndarray[Any, Any]:
    def phi(x: Any) -> Any:
        return np.asarray([a + 1 if a > 0 else math.exp(a) for a in x])

    out = np.zeros((2, 4, 5, 2))
    for b, h, i in np.ndindex(2, 4, 5):
        weights = [phi(Q[b, h, i]) @ phi(K[b, h // 2, j]) * see(b, i, j) for j in range(7)]
        top = sum(w * V[b, h // 2, j] for j, w in enumerate(weights))
        total = sum(weights)
        if state is not None:
            top = top + phi(Q[b, h, i]) @ state.S[b, h // 2]
            total += phi(Q[b, h, i]) @ state.z[b, h // 2]
        if normalize and total:
            out[b, h, i] = top / total
        elif not normalize:
            out[b, h, i] = 0.3 * top
    return out


STATE = LinearState(RNG.normal(size=(2, 2, 3, 2)), RNG.random((2, 2, 3)))
THERE = np.asarray([[1, 0, 1, 1, 0, 1, 1], [0] * 7], bool)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("state", [None, STATE])
@pytest.mark.parametrize("name", ["nothing", "causal", "lengths", "segments", "key mask"])
def test_linear_attention_is_its_sum(name: str, state: Any, normalize: bool) -> None:
    options, see = {"key_mask": THERE}, lambda b, h, i, j: THERE[b, j]
    if name != "key mask":
        options, see, _ = CASES[name]
    got, after = reference.linear_attention(
        Q, K, V, initial_state=state, normalize=normalize, scale=0.3, return_state=True, **options
    )
    check([got], [linear_by_hand(lambda b, i, j: see(b, 0, i, j), normalize, state)])
    there = {"key mask": THERE, "lengths": np.arange(7) < LENGTHS[:, None]}.get(
        name, np.ones((2, 7))
    )
    phi = np.where(K > 0, K + 1, np.exp(K)) * there[:, None, :, None]
    S, z = (0.0, 0.0) if state is None else state
    check(after, [S + phi.swapaxes(-1, -2) @ V, z + phi.sum(-2)])


@pytest.mark.parametrize("state", [None, STATE])
@pytest.mark.parametrize("normalize", [False, True])
def test_steps_equal_pairs(normalize: bool, state: Any) -> None:
    k, v = K[..., :5, :], V[..., :5, :]
    options = {"normalize": normalize, "scale": 0.3, "initial_state": state}
    options["key_mask"] = THERE[:, :5]
    steps = reference.linear_steps(Q, k, v, **options)
    pairs = reference.linear_attention(Q, k, v, is_causal=True, return_state=True, **options)
    check([steps[0], *steps[1]], [pairs[0], *pairs[1]])


def test_features_that_carry_a_logarithm_are_those_features() -> None:
    phi = feature_maps.softmax(dim=3, num_features=8, rng=0)

    def plain(x: Any) -> Any:
        f = phi.phi(x, np)
        return f.phi * np.exp(f.log)[..., None]

    k, v = K[..., :5, :], V[..., :5, :]
    for normalize in (True, False):
        options = {"normalize": normalize, "is_causal": True, "return_state": True}
        got = reference.linear_attention(Q, k, v, feature_map=phi, **options)
        expected = reference.linear_attention(Q, k, v, feature_map=plain, **options)
        steps = reference.linear_steps(Q, k, v, feature_map=phi, normalize=normalize)
        check([got[0], *got[1]], [expected[0], *expected[1]])
        check([steps[0], *steps[1]], [expected[0], *expected[1]])


def test_parts_merge() -> None:
    whole = reference.softmax_attention(Q, K, V, mask=MASK, return_lse=True)
    parts = [
        reference.softmax_attention(
            Q, K[..., a:b, :], V[..., a:b, :], mask=MASK[..., a:b], return_lse=True
        )
        for a, b in [(0, 3), (3, 3), (3, 4), (4, 7)]
    ]
    check(reference.merge(parts), whole)


def test_who_sees_nothing_gets_nothing() -> None:
    none = np.zeros((5, 7), bool)
    out, lse = reference.softmax_attention(Q, K, V, mask=none, return_lse=True)
    assert np.all(out == 0)
    assert np.all(lse == -np.inf)
    out, lse = reference.softmax_attention(Q, K, V, mask=none, sinks=SINKS, return_lse=True)
    assert np.all(out == 0)
    close(lse, np.broadcast_to(SINKS[:, None], lse.shape), within=C * eps("float64"))
    assert np.all(reference.sparse_attention(Q, K, V, mask=none) == 0)
    assert np.all(reference.linear_attention(Q, K, V, kv_lengths=0) == 0)
    out, lse = reference.merge([(out, np.full(lse.shape, -np.inf))] * 2)
    assert np.all(out == 0)
    assert np.all(lse == -np.inf)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_hidden_content_reaches_nobody(poison: float) -> None:
    k, v = K.copy(), V.copy()
    k[..., 6, :], v[..., 6, :] = poison, poison
    with np.errstate(invalid="ignore"):
        for options in ({"is_causal": True}, {"window": (3, 0)}):
            clean = reference.softmax_attention(Q, K, V, **options)[..., :4, :]
            check([reference.softmax_attention(Q, k, v, **options)[..., :4, :]], [clean])
            v_only = reference.softmax_attention(Q, K, v, **options)
            assert not np.isfinite(v_only[..., 4, :]).any()
        for name in (reference.sparse_attention, reference.linear_attention):
            clean = name(Q, K, V, is_causal=True)[..., :4, :]
            check([name(Q, k, v, is_causal=True)[..., :4, :]], [clean])
        clean = reference.linear_steps(Q, K[..., 2:, :], V[..., 2:, :])[0][..., :4, :]
        check([reference.linear_steps(Q, k[..., 2:, :], v[..., 2:, :])[0][..., :4, :]], [clean])


def test_shapes_broadcast_and_heads_may_be_left_out() -> None:
    one = reference.softmax_attention(Q[:, 0], K[:, 0], V[:, 0], return_lse=True)
    assert one[0].shape == (2, 5, 2)
    bare = reference.softmax_attention(Q[0, 0], K[0, 0], V[0, 0], return_lse=True)
    assert (bare[0].shape, bare[1].shape) == ((5, 2), (5,))
    check(bare, [x[0] for x in one])
    shared = reference.softmax_attention(Q, K[:1], V[0], return_lse=True)
    twice = reference.softmax_attention(Q, K[[0, 0]], V[[0, 0]], return_lse=True)
    check(shared, twice)
    out, state = reference.linear_attention(Q[0, 0], K[0, 0], V[0, 0], return_state=True)
    assert (out.shape, state.S.shape, state.z.shape) == ((5, 2), (3, 2), (3,))


def test_every_library_reads_the_same(lane: Lane) -> None:
    functions: list[tuple[Any, dict[str, Any]]] = [
        (reference.softmax_attention, {"mask": MASK, "bias": BIAS, "sinks": SINKS, "softcap": 2.0}),
        (reference.softmax_attention, {"kv_lengths": LENGTHS, "segment_ids": IDS}),
        (reference.local_attention, {"window": (1, 0)}),
        (reference.sparse_attention, {"block_size": 2, "top_k": 2, "route": 1, "mask": MASK}),
        (reference.linear_attention, {"is_causal": True, "key_mask": THERE}),
        (reference.linear_attention, {"segment_ids": IDS, "initial_state": STATE}),
    ]
    for function, options in functions:
        out = lane.call(function, Q, K, V, dtype="float64", **options)
        lane.check(out, function(Q, K, V, **options), dtype="float64", within=10 * NEAR)
    k, v = K[..., :5, :], V[..., :5, :]
    out, _ = lane.call(reference.linear_steps, Q, k, v, dtype="float64")
    lane.check(out, reference.linear_steps(Q, k, v)[0], dtype="float64", within=10 * NEAR)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_small_dtypes_come_back_as_they_were(lane: Lane, dtype: str) -> None:
    if dtype not in lane.dtypes:
        pytest.skip(f"{lane} does not take {dtype}")
    zeros = np.zeros((1, 2048, 1))
    for function in (reference.softmax_attention, reference.linear_attention):
        out = lane.call(function, zeros[:, :2], zeros, zeros + 1, dtype=dtype)
        lane.check(out, np.ones((1, 2, 1)), dtype=dtype, within=C * eps("float32"))
