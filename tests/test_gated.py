"""Linear attention with decay against its equation, its steps, and itself in other pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gates import CHUNKS, check_decayed, chunks_of, decayed_cases, decays
from hypothesis import strategies as st
from lanes import CHOSEN, Lane, close
from laws import for_all
from softmax import as_held
from strategies import Case
from sums import exponent, linear_errors, make_map
from tolerance import C, eps, largest

from arrattn import LinearState, linear_attention, reference

# Where every new shape is compiled, or becomes a graph, a few calls stand for the laws.
eager = pytest.mark.lanes(
    "numpy", "numpy-readonly", "strict", "strict-device1", "torch", "torch-cuda", "cupy"
)
compiled = pytest.mark.lanes("jax-jit", "jax-gpu", "dask")
other = [x for x in CHOSEN if x.missing is None and x.name != "jax-jit"]


@eager
@for_all(case=decayed_cases(), chunk=CHUNKS)
def test_equals_the_reference(lane: Lane, case: Case, chunk: int) -> None:
    with chunks_of(chunk):
        check_decayed(lane, case)


@eager
@for_all(
    case=decayed_cases(maps=("relu", "softmax"), state=False),
    dtype=st.sampled_from(("float32", "float16", "bfloat16")),
)
def test_equals_the_reference_in_every_dtype(lane: Lane, case: Case, dtype: str) -> None:
    if dtype in lane.dtypes:
        with chunks_of(4):
            check_decayed(lane, case, dtype=dtype)


def tokens(
    name: str = "elu_plus_one", n: int = 11, channels: int | None = None, how: str = "mixed"
) -> Case:
    rng = np.random.default_rng(n)
    q, k, v = (rng.normal(size=s) for s in ((2, 4, n, 3), (2, 2, n, 3), (2, n, 5)))
    g = decays(how, (2, 2, n, channels or 1), rng)
    return Case(q, k, v, {"feature_map": name, "is_causal": True, "log_decay": g})


@compiled
def test_equals_the_reference_where_loops_are_compiled(lane: Lane) -> None:
    check_kind(lane, "logarithms and segments")


@pytest.mark.lanes("jax", "dask")  # compiled chunk by chunk, without jit around the call
def test_equals_the_reference_where_loops_are_staged(lane: Lane) -> None:
    check_kind(lane, "both ways by channel")


def check_kind(lane: Lane, kind: str) -> None:
    case = tokens(channels=3 if "channel" in kind else None)
    ids = np.asarray([2] * 5 + [0] * 6)
    if "logarithms" in kind:
        case = tokens("softmax")
        case.options.update(segment_ids=ids, key_mask=np.arange(11) != 7)
    if "both ways" in kind:
        case.options.update(is_causal=False, kv_lengths=np.asarray([4, 11]))
    with chunks_of(2):
        check_decayed(lane, case)


@eager
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("n", [31, 33, 1100])
def test_lengths_around_the_real_chunk_and_span(lane: Lane, n: int, channels: int | None) -> None:
    case = tokens(n=n, channels=channels)
    expected, after = reference.linear_steps(
        *case.arrays, log_decay=case.options["log_decay"], normalize=False
    )
    case.options["normalize"] = False
    out, state = lane.call(
        linear_attention, *case.arrays, dtype="float64", is_causal=True, normalize=False,
        log_decay=case.options["log_decay"], return_state=True,
    )  # fmt: skip
    # Decay is all that keeps these sums small: the sums without it bound them.
    size = C * eps("float64") * np.abs(case.v).sum() * np.prod(case.q.shape[-1:])
    within = size * (1 + largest(case.q)) ** 2
    lane.check(out, expected, dtype="float64", within=within)
    lane.check(state.S, after.S, dtype="float64", within=within)


def test_steps_over_no_tokens_are_no_rows() -> None:
    q, k, v = np.ones((2, 6, 0, 3)), np.ones((2, 3, 0, 3)), np.ones((2, 3, 0, 5))
    out, state = reference.linear_steps(q, k, v)
    assert out.shape == (2, 6, 0, 5)
    assert state.S.shape == (2, 3, 3, 5)
    assert not state.S.any()


STEPS = [("elu_plus_one", None), ("relu", 3), ("softmax", None), ("softmax", 8), ("identity", 3)]


@eager
@pytest.mark.parametrize(("name", "channels"), STEPS)
def test_equals_the_steps(lane: Lane, name: str, channels: int | None) -> None:
    case = tokens(name, channels=channels)
    options = {"feature_map": make_map(name, 3), "log_decay": case.options["log_decay"]}
    mask = np.arange(11) != 4
    expected, after = reference.linear_steps(*case.arrays, key_mask=mask, **options)
    with chunks_of(4):
        out, state = lane.call(
            linear_attention, *case.arrays, dtype="float64", is_causal=True, key_mask=mask,
            return_state=True, **options,
        )  # fmt: skip
    errors = linear_errors(
        Case(*case.arrays, case.options | {"key_mask": mask}), "float64", expected
    )
    for got, want, within in zip((out, *state), (expected, *after), errors, strict=True):
        lane.check(got, want, dtype="float64", within=within)


@eager
@pytest.mark.parametrize(("name", "channels"), STEPS)
@pytest.mark.parametrize("cut", [0, 1, 6, 11])
def test_prefill_and_decode_are_one_run(
    lane: Lane, name: str, channels: int | None, cut: int
) -> None:
    case = tokens(name, channels=channels)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": True}
    q, k, v, g = (lane.asarray(x, "float64") for x in (*case.arrays, case.options["log_decay"]))
    with chunks_of(4):
        whole, end = linear_attention(q, k, v, log_decay=g, return_state=True, **options)
        parts, state = [], None
        for at in [slice(0, cut), *(slice(t, t + 1) for t in range(cut, 11))]:
            out, state = linear_attention(
                *(x[..., at, :] for x in (q, k, v)), log_decay=g[..., at, :],
                initial_state=state, return_state=True, **options,
            )  # fmt: skip
            parts.append(lane.to_numpy(out))
    whole = lane.to_numpy(whole)
    errors = linear_errors(case, "float64", whole)
    close(np.concatenate(parts, axis=-2), whole, within=2 * errors[0])
    for a, b, within in zip(state, end, errors[1:], strict=True):
        close(lane.to_numpy(a), lane.to_numpy(b), within=2 * within)


@pytest.mark.parametrize("after", other, ids=repr)
def test_a_state_goes_on_in_another_library(after: Lane) -> None:
    case = tokens()
    g, options = case.options["log_decay"], {"is_causal": True, "return_state": True}
    whole, end = linear_attention(*case.arrays, log_decay=g, **options)
    head, tail = slice(0, 7), slice(7, 11)
    _, state = linear_attention(
        *(x[..., head, :] for x in case.arrays), log_decay=g[..., head, :], **options
    )
    out, last = after.call(
        linear_attention, *(x[..., tail, :] for x in case.arrays), dtype="float64",
        log_decay=g[..., tail, :], initial_state=state, **options,
    )  # fmt: skip
    errors = linear_errors(case, "float64", whole)
    after.check(out, whole[..., tail, :], dtype="float64", within=2 * errors[0][..., tail, :])
    after.check(last.S, end.S, dtype="float64", within=2 * errors[1])


@eager
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["elu_plus_one", "softmax"])
def test_packed_equals_one_by_one(lane: Lane, name: str, is_causal: bool) -> None:
    case = tokens(name, n=17)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": is_causal}
    ids = np.asarray([5] * 4 + [2] * 1 + [9] * 8 + [5] * 4)  # 5 goes on where it stopped
    g = case.options["log_decay"]
    with chunks_of(4):
        out = lane.call(
            linear_attention, *case.arrays, dtype="float64", segment_ids=ids, log_decay=g, **options
        )
    got = lane.to_numpy(out)
    for segment in np.unique(ids):
        at = ids == segment
        alone = Case(*(x[..., at, :] for x in case.arrays), case.options | options)
        alone.options.update(feature_map=name, log_decay=g[..., at, :])
        expected = reference.linear_attention(*alone.arrays, log_decay=g[..., at, :], **options)
        close(got[..., at, :], expected, within=linear_errors(alone, "float64", expected)[0])


@eager
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("how", ["mixed", "slow", "fast", "sudden"])
def test_single_precision_loses_nothing(lane: Lane, how: str, channels: int | None) -> None:
    # A sum from the beginning would reach -700 here, where a step of -1e-6 is nothing.
    case = as_held(tokens(n=66, channels=channels, how=how), "float32")
    g = case.options["log_decay"] if how == "sudden" else np.maximum(case.options["log_decay"], -50)
    case.options["log_decay"] = g
    expected, _ = reference.linear_steps(*case.arrays, log_decay=g)
    got = lane.call(linear_attention, *case.arrays, dtype="float32", is_causal=True, log_decay=g)
    lane.check(got, expected, dtype="float32", within=linear_errors(case, "float32", expected)[0])


@eager
@pytest.mark.parametrize("name", ["elu_plus_one", "softmax"])
def test_what_is_older_weighs_less(lane: Lane, name: str) -> None:
    # The same key over and over, and values that tell them apart: rows of weights.
    n = 9
    q, k = np.ones((1, n, 3)), np.ones((1, n, 3))
    for is_causal in (True, False):
        with chunks_of(4):
            out = lane.call(
                linear_attention, q, k, np.eye(n)[None], dtype="float64", is_causal=is_causal,
                feature_map=make_map(name, 3), log_decay=np.full((1, n), -0.3),
            )  # fmt: skip
        i, j = np.arange(n)[:, None], np.arange(n)
        weights = np.exp(-0.3 * np.abs(i - j)) * ((j <= i) | (not is_causal))
        expected = weights / weights.sum(axis=-1, keepdims=True)
        lane.check(out[0, ...], expected, dtype="float64", within=C * n * eps("float64"))


@eager
@pytest.mark.parametrize("what", ["k", "v", "log_decay"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("poison", [np.nan, -np.inf])
def test_hidden_tokens_reach_nobody(lane: Lane, what: str, is_causal: bool, poison: float) -> None:
    case = tokens("softmax")
    there = np.arange(11) % 4 != 1
    ids = np.asarray([0] * 6 + [1] * 5)
    options: dict[str, Any] = {"is_causal": is_causal, "key_mask": there, "segment_ids": ids}
    call: dict[str, Any] = options | {"feature_map": make_map("softmax", 3)}
    clean = {"k": case.k, "v": case.v, "log_decay": case.options["log_decay"]}
    expected = reference.linear_attention(*case.arrays, log_decay=clean["log_decay"], **call)
    spoiled = {n: x.copy() for n, x in clean.items()}
    spoiled[what][..., ~there, :] = poison
    with chunks_of(4):
        got = lane.call(
            linear_attention, case.q, spoiled["k"], spoiled["v"], dtype="float64",
            log_decay=spoiled["log_decay"], **call,
        )  # fmt: skip
    within = linear_errors(Case(*case.arrays, case.options | options), "float64", expected)[0]
    lane.check(got, expected, dtype="float64", within=within)

    # One token of segment 1 is spoiled, and seen: no row of segment 0 is any worse.
    spoiled = {n: x.copy() for n, x in clean.items()}
    spoiled[what][..., 8, :] = np.nan
    with chunks_of(4), np.errstate(invalid="ignore"):
        out = lane.call(
            linear_attention, case.q, spoiled["k"], spoiled["v"], dtype="float64",
            log_decay=spoiled["log_decay"], **call,
        )  # fmt: skip
    got = lane.to_numpy(out)
    close(got[..., :6, :], expected[..., :6, :], within=within[..., :6, :])
    early = slice(6, 8)
    if is_causal:
        close(got[..., early, :], expected[..., early, :], within=within[..., early, :])
    assert np.isnan(got[..., 8:, :]).all()

    # And one of segment 0, in whatever span: segment 1 is another world.
    spoiled = {n: x.copy() for n, x in clean.items()}
    spoiled[what][..., 3, :] = np.nan
    with chunks_of(2, span=1), np.errstate(invalid="ignore"):
        out = lane.call(
            linear_attention, case.q, spoiled["k"], spoiled["v"], dtype="float64",
            log_decay=spoiled["log_decay"], **call,
        )  # fmt: skip
    close(lane.to_numpy(out)[..., 6:, :], expected[..., 6:, :], within=within[..., 6:, :])


@eager
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("falling", [False, True])
def test_features_of_any_size_stay_in_range(lane: Lane, is_causal: bool, falling: bool) -> None:
    # Single precision ends at e^88; these exponents reach hundreds, on one side of a query.
    rng = np.random.default_rng(0)
    n = 12
    x = np.linspace(30.0, 1.0, n)[None, :, None] * np.ones(3)
    x, v = x if falling else x[:, ::-1], np.abs(rng.normal(size=(1, n, 2)))
    g = np.full((1, n), -20.0)
    case = as_held(
        Case(x / 30, x, v, {"feature_map": "softmax", "is_causal": is_causal}), "float32"
    )
    options = {"feature_map": make_map("softmax", 3), "is_causal": is_causal, "log_decay": g}
    with chunks_of(2):
        out = lane.call(linear_attention, *case.arrays, dtype="float32", **options)
    expected = reference.linear_attention(*case.arrays, **options)
    # Weights without a sign: each is off by its exponent's error, and so is their mean.
    size = 1 + exponent(options["feature_map"], case) + n * 20.0
    lane.check(out, expected, dtype="float32", within=2 * C * eps("float32") * size * largest(v))


def test_no_tokens_leave_the_state_as_it_was(lane: Lane) -> None:
    q, k, v = np.zeros((2, 4, 0, 3)), np.zeros((2, 2, 0, 3)), np.zeros((2, 2, 0, 5))
    some = LinearState(np.ones((2, 2, 3, 5)), np.ones((2, 2, 3)))
    out, state = lane.call(
        linear_attention, q, k, v, dtype="float32", initial_state=some, is_causal=True,
        log_decay=np.zeros((2, 2, 0)), return_state=True,
    )  # fmt: skip
    lane.check(out, np.zeros((2, 4, 0, 5)), dtype="float32", within=0.0)
    lane.check(state.S, some.S, dtype="float32", within=0.0)
    lane.check(state.z, some.z, dtype="float32", within=0.0)
