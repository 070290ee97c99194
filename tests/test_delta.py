"""The delta rule against its equation, its steps, and itself in other pieces."""

from __future__ import annotations

import itertools
import threading
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from gates import CHUNKS, check_delta, chunks_of, decays, delta_cases, delta_errors
from hypothesis import strategies as st
from lanes import CHOSEN, Lane, close
from laws import for_all
from softmax import as_held
from strategies import Case
from tolerance import C, eps

from arrattn import (
    DeltaState,
    delta_attention,
    linear_attention,
    reference,
    set_num_threads,
)
from arrattn._core import gated, threads

# Where every new shape is compiled, or becomes a graph, a few calls stand for the laws.
eager = pytest.mark.lanes(
    "numpy", "numpy-readonly", "strict", "strict-device1", "torch", "torch-cuda", "cupy"
)
other = [x for x in CHOSEN if x.missing is None and x.name != "jax-jit"]


@eager
@for_all(case=delta_cases(), chunk=CHUNKS)
def test_equals_the_reference(lane: Lane, case: Case, chunk: int) -> None:
    with chunks_of(chunk):
        check_delta(lane, case)


@eager
@for_all(case=delta_cases(state=False), dtype=st.sampled_from(("float32", "float16", "bfloat16")))
def test_equals_the_reference_in_every_dtype(lane: Lane, case: Case, dtype: str) -> None:
    if dtype in lane.dtypes:
        with chunks_of(4):
            check_delta(lane, case, dtype=dtype)


def tokens(n: int = 11, channels: int | None = 1, how: str = "mixed") -> Case:
    """Four query heads, two key heads, four value heads."""
    rng = np.random.default_rng(n)
    q, k, v = (rng.normal(size=s) for s in ((2, 4, n, 3), (2, 2, n, 3), (2, 4, n, 5)))
    k /= np.sqrt(np.sum(k**2, axis=-1, keepdims=True))
    options: dict[str, Any] = {"beta": rng.random((2, 4, n))}
    if channels is not None:
        options["log_decay"] = decays(how, (2, 4, n, channels), rng)
    return Case(q, k, v, options)


RULES = pytest.mark.parametrize("channels", [None, 1, 3], ids=["delta", "gated", "by channel"])


@pytest.mark.lanes("jax-jit", "jax-gpu", "dask")
def test_equals_the_reference_where_loops_are_compiled(lane: Lane) -> None:
    check_rule(lane, 3)


@pytest.mark.lanes("jax", "dask")  # compiled chunk by chunk, without jit around the call
def test_equals_the_reference_where_loops_are_staged(lane: Lane) -> None:
    check_rule(lane, None)


def check_rule(lane: Lane, channels: int | None) -> None:
    case = tokens(channels=channels)
    if channels is None:
        case.options.update(segment_ids=np.asarray([2] * 5 + [0] * 6), key_mask=np.arange(11) != 7)
    if channels == 3:
        case.options.update(kv_lengths=np.asarray([4, 11]))
    with chunks_of(2):
        check_delta(lane, case)


@eager
def test_a_length_and_a_mask_both_hide(lane: Lane) -> None:
    case = tokens(40, None)
    mask = np.arange(40) % 7 != 4
    options: dict[str, Any] = {"key_mask": mask, "kv_lengths": 33, **case.options}
    expected = reference.delta_attention(*case.arrays, **options)
    within, _ = delta_errors(case, "float64", expected)
    lane.check(
        lane.call(delta_attention, *case.arrays, dtype="float64", **options),
        expected, dtype="float64", within=within,
    )  # fmt: skip


@eager
@RULES
@pytest.mark.parametrize("n", [31, 33, 1100])
def test_equals_the_steps(lane: Lane, n: int, channels: int | None) -> None:
    case = tokens(n, channels)
    mask = np.arange(n) % 7 != 4
    expected, after = reference.delta_steps(*case.arrays, key_mask=mask, **case.options)
    out, state = lane.call(
        delta_attention, *case.arrays, dtype="float64", key_mask=mask, return_state=True,
        **case.options,
    )  # fmt: skip
    within, state_within = delta_errors(case, "float64", expected)
    lane.check(out, expected, dtype="float64", within=within)
    lane.check(state.S, after.S, dtype="float64", within=state_within)


@eager
@RULES
@pytest.mark.parametrize("cut", [0, 1, 6, 11])
def test_prefill_and_decode_are_one_run(lane: Lane, channels: int | None, cut: int) -> None:
    case = tokens(channels=channels)
    q, k, v = (lane.asarray(x, "float64") for x in case.arrays)
    gates = {n: lane.asarray(x, "float64") for n, x in case.options.items()}

    def at(tokens: slice) -> dict[str, Any]:
        cut = {n: x[..., tokens] if n == "beta" else x[..., tokens, :] for n, x in gates.items()}
        return cut | {"return_state": True}

    with chunks_of(4):
        whole, end = delta_attention(q, k, v, **at(slice(0, 11)))
        parts, state = [], None
        for part in [slice(0, cut), *(slice(t, t + 1) for t in range(cut, 11))]:
            out, state = delta_attention(
                *(x[..., part, :] for x in (q, k, v)), initial_state=state, **at(part)
            )
            parts.append(lane.to_numpy(out))
    whole = lane.to_numpy(whole)
    within, state_within = delta_errors(case, "float64", whole)
    close(np.concatenate(parts, axis=-2), whole, within=2 * within)
    close(lane.to_numpy(state.S), lane.to_numpy(end.S), within=2 * state_within)


@pytest.mark.parametrize("after", other, ids=repr)
def test_a_state_goes_on_in_another_library(after: Lane) -> None:
    case = tokens()
    q, k, v = case.arrays
    beta, g = case.options["beta"], case.options["log_decay"]
    whole, end = delta_attention(q, k, v, return_state=True, **case.options)
    head, tail = slice(0, 7), slice(7, 11)
    _, state = delta_attention(
        *(x[..., head, :] for x in (q, k, v)), beta=beta[..., head], log_decay=g[..., head, :],
        return_state=True,
    )  # fmt: skip
    out, last = after.call(
        delta_attention, *(x[..., tail, :] for x in (q, k, v)), dtype="float64",
        beta=beta[..., tail], log_decay=g[..., tail, :], initial_state=state, return_state=True,
    )  # fmt: skip
    within, state_within = delta_errors(case, "float64", whole)
    after.check(out, whole[..., tail, :], dtype="float64", within=2 * within)
    after.check(last.S, end.S, dtype="float64", within=2 * state_within)


@eager
@RULES
def test_packed_equals_one_by_one(lane: Lane, channels: int | None) -> None:
    case = tokens(17, channels)
    ids = np.asarray([5] * 4 + [2] * 1 + [9] * 8 + [5] * 4)  # 5 goes on where it stopped
    with chunks_of(4):
        out = lane.call(
            delta_attention, *case.arrays, dtype="float64", segment_ids=ids, **case.options
        )
    got = lane.to_numpy(out)
    for segment in np.unique(ids):
        at = ids == segment
        gates = {n: x[..., at] if n == "beta" else x[..., at, :] for n, x in case.options.items()}
        alone = Case(*(x[..., at, :] for x in case.arrays), gates)
        expected, _ = reference.delta_steps(*alone.arrays, **gates)
        close(got[..., at, :], expected, within=delta_errors(alone, "float64", expected)[0])


@eager
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["mixed", "slow", "fast"])
def test_single_precision_loses_nothing(lane: Lane, how: str, channels: int) -> None:
    case = as_held(tokens(66, channels, how), "float32")
    case.options["log_decay"] = np.maximum(case.options["log_decay"], -50)
    expected, _ = reference.delta_steps(*case.arrays, **case.options)
    got = lane.call(delta_attention, *case.arrays, dtype="float32", **case.options)
    # No memory here is larger than some values: what is written for good is overwritten.
    q, size = np.abs(case.q).max(), np.abs(case.v).max()
    within = C * eps("float32") * np.sqrt(66.0) * q * size * case.q.shape[-1]
    lane.check(got, expected, dtype="float32", within=within)


@eager
def test_a_key_that_comes_again_is_overwritten(lane: Lane) -> None:
    # Orthogonal keys and beta 1: the memory is a table, whatever was written before.
    n, d = 37, 5
    rng = np.random.default_rng(0)
    written, asked = rng.integers(0, d, size=(2, n))
    v = rng.normal(size=(1, n, 4))
    eye = np.eye(d)
    with chunks_of(4):
        out = lane.call(
            delta_attention, eye[asked][None], eye[written][None], v, dtype="float64",
            beta=np.ones((1, n)),
        )  # fmt: skip
    expected = np.zeros((1, n, 4))
    for t in range(n):
        before = np.flatnonzero(written[: t + 1] == asked[t])
        if before.size:
            expected[0, t] = v[0, before[-1]]
    lane.check(out, expected, dtype="float64", within=C * n * eps("float64") * np.abs(v).max())


@eager
def test_the_same_key_many_times_is_solved_without_growth(lane: Lane) -> None:
    # Powers of this triangular matrix of ones have entries as large as 2^31.
    n = 64
    k, v = np.ones((1, n, 1)), np.random.default_rng(0).normal(size=(1, n, 3))
    out = lane.call(delta_attention, k, k, v, dtype="float32", beta=np.ones((1, n)))
    held = v.astype(np.float32).astype(np.float64)
    lane.check(out, held, dtype="float32", within=C * n * eps("float32") * np.abs(v).max())


@eager
def test_without_correction_it_is_linear_attention(lane: Lane) -> None:
    # Orthogonal keys, each once: nothing is there to correct.
    n = 16
    rng = np.random.default_rng(0)
    q, v = rng.normal(size=(1, n, n)), rng.normal(size=(1, n, 3))
    k, g = np.eye(n)[None], -rng.random((1, n, 1))
    with chunks_of(4):
        got = lane.call(
            delta_attention, q, k, v, dtype="float64", beta=np.ones((1, n)), log_decay=g
        )
        expected = lane.call(
            linear_attention, q, k, v, dtype="float64", feature_map=None, is_causal=True,
            normalize=False, log_decay=g,
        )  # fmt: skip
    within = C * n * eps("float64") * np.abs(q).max() * np.abs(v).max()
    close(lane.to_numpy(got), lane.to_numpy(expected), within=within)


@eager
@pytest.mark.parametrize("what", ["k", "v", "beta", "log_decay"])
def test_hidden_tokens_reach_nobody(lane: Lane, what: str) -> None:
    case = tokens()
    there, ids = np.arange(11) % 4 != 1, np.asarray([0] * 6 + [1] * 5)
    clean = {"k": case.k, "v": case.v, **case.options}
    expected = reference.delta_attention(
        *case.arrays, key_mask=there, segment_ids=ids, **case.options
    )
    within = delta_errors(case, "float64", expected)[0]

    def call(arrays: dict[str, Any]) -> Any:
        gates = {n: arrays[n] for n in ("beta", "log_decay")}
        with chunks_of(4), np.errstate(invalid="ignore"):
            out = lane.call(
                delta_attention, case.q, arrays["k"], arrays["v"], dtype="float64",
                key_mask=there, segment_ids=ids, **gates,
            )  # fmt: skip
        return lane.to_numpy(out)

    tail = () if what == "beta" else (slice(None),)
    spoiled = {n: x.copy() for n, x in clean.items()}
    spoiled[what][(..., ~there, *tail)] = np.nan
    close(call(spoiled), expected, within=within)
    # One token of segment 1 is spoiled, and seen: nothing before it is any worse.
    spoiled = {n: x.copy() for n, x in clean.items()}
    spoiled[what][(..., 10, *tail)] = np.nan
    got = call(spoiled)
    close(got[..., :10, :], expected[..., :10, :], within=within)
    assert np.isnan(got[..., 10:, :]).all()


@eager
@pytest.mark.parametrize("what", ["k", "v", "beta", "log_decay"])
@pytest.mark.parametrize("at", [5, 6, 10])
def test_a_token_that_is_not_finite_is_read_by_nobody_before(
    lane: Lane, what: str, at: int
) -> None:
    case = tokens()
    expected = reference.delta_attention(*case.arrays, **case.options)
    within = delta_errors(case, "float64", expected)[0]
    arrays = {"k": case.k, "v": case.v, **case.options}
    arrays[what] = arrays[what].copy()
    arrays[what][(..., at, *(() if what == "beta" else (slice(None),)))] = np.nan
    with chunks_of(4), np.errstate(invalid="ignore"):
        qkv = case.q, arrays.pop("k"), arrays.pop("v")
        got = lane.to_numpy(lane.call(delta_attention, *qkv, dtype="float64", **arrays))
    close(got[..., :at, :], expected[..., :at, :], within=within)
    assert np.isnan(got[..., at:, :]).all()


def test_no_tokens_leave_the_state_as_it_was(lane: Lane) -> None:
    q, k, v = np.zeros((2, 4, 0, 3)), np.zeros((2, 2, 0, 3)), np.zeros((2, 2, 0, 5))
    some = DeltaState(np.ones((2, 2, 3, 5)))
    out, state = lane.call(
        delta_attention, q, k, v, dtype="float32", initial_state=some, return_state=True,
        beta=np.zeros((2, 2, 0)),
    )  # fmt: skip
    lane.check(out, np.zeros((2, 4, 0, 5)), dtype="float32", within=0.0)
    lane.check(state.S, some.S, dtype="float32", within=0.0)
    # And queries without keys read the state.
    out = lane.call(
        delta_attention, np.ones((2, 4, 3, 3)), k, v, dtype="float32", initial_state=some,
        beta=np.zeros((2, 2, 0)),
    )  # fmt: skip
    lane.check(out, np.full((2, 4, 3, 5), 3.0), dtype="float32", within=0.0)


SHAPES = [
    ((2, 0, 4), (2, 3, 4), (2, 3, 5)),
    ((0, 3, 4), (0, 3, 4), (0, 3, 5)),
    ((0, 2, 3, 4), (0, 2, 3, 4), (0, 2, 3, 5)),
    ((3, 0, 2, 3, 4), (1, 2, 3, 4), (0, 2, 3, 5)),
    ((2, 3, 0), (2, 4, 0), (2, 4, 5)),
    ((2, 3, 4), (2, 4, 4), (2, 4, 0)),
    ((2, 3, 4), (2, 4, 4), (4, 4, 5)),
    ((0, 4), (3, 4), (3, 5)),
    ((3, 4), (0, 4), (0, 5)),
]


@eager
@pytest.mark.parametrize(("q", "k", "v"), SHAPES)
def test_any_axis_may_be_empty(lane: Lane, q: Any, k: Any, v: Any) -> None:
    batch = np.broadcast_shapes(q[:-3], k[:-3], v[:-3])
    heads = () if len(v) == 2 else (max(q[-3], v[-3]),)
    arrays = [*map(np.ones, (q, k, v))]
    gates = {"beta": np.ones(v[-3:-1]), "log_decay": np.zeros((*v[-3:-1], 1))}
    options = {"dtype": "float64", "return_state": True}
    for function in (delta_attention, linear_attention):
        both = [gates] if function is delta_attention else [{"log_decay": gates["log_decay"]}]
        for gate in (*both, both[0] | {"kv_lengths": 0}):
            out, state = lane.call(function, *arrays, **options, **gate)
            assert tuple(out.shape) == (*batch, *heads, q[-2], v[-1])
            assert tuple(state.S.shape) == (*batch, *v[-3:-2], k[-1], v[-1])
            assert np.isfinite(lane.to_numpy(out)).all()


def test_an_item_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    # Heads share a job, as many as there are too many for the threads.
    case = tokens(100)
    whole = delta_attention(*case.arrays, **case.options)
    monkeypatch.setattr(threads, "num_threads", lambda: 5)
    alone = {n: x[1:] for n, x in case.options.items()}
    got = delta_attention(*(x[1:] for x in case.arrays), **alone)
    np.testing.assert_array_equal(got, whole[1:])


@RULES
def test_spans_hand_the_memory_on_in_turn(
    channels: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, read, calls = tokens(41, channels), gated._read, itertools.count()

    def late(*args: Any) -> Any:
        if next(calls) % 3 == 0:
            time.sleep(0.01)  # the spans behind it are ready first
        return read(*args)

    monkeypatch.setattr(gated, "_read", late)
    expected, after = reference.delta_steps(*case.arrays, **case.options)
    results = []
    for workers in (1, 2, 3, 7):
        with chunks_of(2), set_num_threads(workers):  # eleven spans
            results.append(delta_attention(*case.arrays, return_state=True, **case.options))
    within, state_within = delta_errors(case, "float64", expected)
    for out, state in results:
        np.testing.assert_array_equal(out, results[0][0])
        np.testing.assert_array_equal(state.S, results[0][1].S)
    close(results[0][0], expected, within=within)
    close(results[0][1].S, after.S, within=state_within)


def test_absent_tokens_change_no_bit() -> None:
    case, there = tokens(65), np.arange(65) < 40  # more than a chunk
    clean = delta_attention(*case.arrays, key_mask=there, **case.options)
    k, v, beta = case.k.copy(), case.v.copy(), case.options["beta"].copy()
    k[..., 40:, :], v[..., 40:, :], beta[..., 40:] = np.nan, np.inf, np.nan
    got = delta_attention(case.q, k, v, key_mask=there, **case.options | {"beta": beta})
    np.testing.assert_array_equal(got, clean)


def test_a_span_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    read, calls = gated._read, itertools.count()

    def fails(*args: Any) -> Any:
        if next(calls) == 1:
            time.sleep(0.05)  # by now the next spans wait for this one
            msg = "no room"
            raise MemoryError(msg)
        return read(*args)

    monkeypatch.setattr(gated, "_read", fails)
    case = tokens(41)
    with chunks_of(2), set_num_threads(3), pytest.raises(MemoryError, match="no room"):
        delta_attention(*(x[0] for x in case.arrays), beta=case.options["beta"][0])


def test_what_jax_compiles_does_not_grow_with_the_length() -> None:
    import jax

    def equations(n: int) -> int:
        x, beta = jax.numpy.zeros((2, n, 4)), jax.numpy.zeros((2, n))
        traced = jax.make_jaxpr(lambda x: delta_attention(x, x, x, beta=beta, log_decay=-abs(x)))
        return str(traced(x)).count(" = ")

    assert equations(2124) == equations(9292)  # whole spans, and the same rest


@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize("channels", [1, 16], ids=["gated", "by channel"])
@pytest.mark.parametrize("rule", ["delta", "linear", "sums"])
def test_working_memory_does_not_grow_with_the_length(rule: str, channels: int, rest: int) -> None:
    peaks: dict[int, int] = {}

    def beyond_outputs(n: int) -> None:
        x, decay = np.ones((2, n, 16), np.float32) / 6, -np.ones((2, n, channels), np.float32)
        tracemalloc.start()
        with set_num_threads(1):
            if rule == "delta":
                delta_attention(x, x, x, beta=x[..., 0], log_decay=decay)
            else:
                how = {"feature_map": None, "normalize": rule == "linear", "is_causal": True}
                linear_attention(x, x, x, log_decay=decay, **how)
        peaks[n] = tracemalloc.get_traced_memory()[1] - x.nbytes  # without the output
        tracemalloc.stop()

    short, long = 4 * gated.SPAN * gated.CHUNK + rest, 128 * gated.SPAN * gated.CHUNK + rest
    for n in (64, short, long):  # what a first call loads stays, and does not count
        thread = threading.Thread(target=beyond_outputs, args=[n])  # with no work space yet
        thread.start()
        thread.join()
    # Spans are counted, but nothing is kept of tokens: half a number for each and each head.
    assert peaks[long] < peaks[short] + (long - short) * 2 * 4 / 2
