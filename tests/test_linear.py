"""Linear attention against its defining equation, and the laws that need no equation."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import Lane, close
from laws import for_all
from softmax import as_held
from strategies import Case
from sums import (
    ALL_MAPS,
    MAPS,
    NON_NEGATIVE,
    check_linear,
    chunks_of,
    exponent,
    linear_cases,
    linear_errors,
    make_map,
    options_of,
)
from tolerance import C, eps, largest

from arrattn import LinearState, feature_maps, linear_attention, reference, set_num_threads

CHUNKS = st.sampled_from((1, 2, 3, 5, 128))

# Where every new shape is compiled, or becomes a graph, laws run on one feature map each.
eager = pytest.mark.lanes(
    "numpy", "numpy-readonly", "strict", "strict-device1", "torch", "torch-cuda", "cupy"
)
compiled = pytest.mark.lanes("jax", "jax-jit", "jax-gpu", "dask")


@for_all(case=linear_cases(), chunk=CHUNKS)
def test_equals_the_reference(lane: Lane, case: Case, chunk: int) -> None:
    with chunks_of(chunk):
        check_linear(lane, case)


@for_all(case=linear_cases(state=False), dtype=st.sampled_from(("float32", "float16", "bfloat16")))
def test_equals_the_reference_in_every_dtype(lane: Lane, case: Case, dtype: str) -> None:
    if dtype in lane.dtypes:
        with chunks_of(3):
            check_linear(lane, case, dtype=dtype)


@pytest.mark.parametrize(("nq", "nk"), [(1, 129), (127, 257), (300, 129)])
@pytest.mark.parametrize("name", ["elu_plus_one", "softmax"])
def test_lengths_around_the_real_chunk(lane: Lane, nq: int, nk: int, name: str) -> None:
    rng = np.random.default_rng(nq + nk)
    q, k = rng.normal(size=(2, 4, nq, 8)), rng.normal(size=(2, 2, nk, 8))
    case = Case(q, k, rng.normal(size=(2, 2, nk, 5)), {"feature_map": name, "is_causal": True})
    check_linear(lane, case)


@eager
@for_all(case=linear_cases(), chunk=CHUNKS)
def test_chunks_do_not_change_meaning(lane: Lane, case: Case, chunk: int) -> None:
    options = options_of(case)
    with chunks_of(chunk):
        a = lane.to_numpy(lane.call(linear_attention, *case.arrays, dtype="float64", **options))
    b = lane.to_numpy(lane.call(linear_attention, *case.arrays, dtype="float64", **options))
    close(a, b, within=2 * linear_errors(case, "float64", b)[0])


def self_attention(name: str, n: int = 11, seed: int = 0) -> Case:
    rng = np.random.default_rng(seed)
    q, k, v = (
        rng.normal(size=(2, 4, n, 3)),
        rng.normal(size=(2, 2, n, 3)),
        rng.normal(size=(2, n, 5)),
    )
    return Case(q, k, v, {"feature_map": name, "is_causal": True})


@pytest.mark.lanes("numpy", "torch")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ALL_MAPS)
def test_sums_that_are_not_divided(lane: Lane, name: str, causal: bool) -> None:
    case = self_attention(name, n=40)
    options = {"feature_map": name, "is_causal": causal, "normalize": False, "scale": 0.7}
    check_linear(lane, Case(*case.arrays, options))


@eager
@pytest.mark.parametrize("name", MAPS)
def test_equals_the_steps(lane: Lane, name: str) -> None:
    case = self_attention(name)
    options = {"feature_map": make_map(name, 3)}
    expected, after = reference.linear_steps(*case.arrays, **options)
    with chunks_of(4):
        out, state = lane.call(
            linear_attention, *case.arrays, dtype="float64", is_causal=True, return_state=True,
            **options,
        )  # fmt: skip
    errors = linear_errors(case, "float64", expected)
    lane.check(out, expected, dtype="float64", within=errors[0])
    lane.check(state.S, after.S, dtype="float64", within=errors[1])
    lane.check(state.z, after.z, dtype="float64", within=errors[2])


@eager
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("cut", [0, 1, 4, 7, 11])
def test_state_hands_over(lane: Lane, name: str, cut: int) -> None:
    case = self_attention(name)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": True}
    q, k, v = (lane.asarray(x, "float64") for x in case.arrays)
    with chunks_of(3):
        whole, end = linear_attention(q, k, v, return_state=True, **options)
        first, state = linear_attention(
            *(x[..., :cut, :] for x in (q, k, v)), return_state=True, **options
        )
        second, last = linear_attention(
            *(x[..., cut:, :] for x in (q, k, v)), initial_state=state, return_state=True, **options
        )
    got = np.concatenate([lane.to_numpy(first), lane.to_numpy(second)], axis=-2)
    whole = lane.to_numpy(whole)
    errors = linear_errors(case, "float64", whole)
    close(got, whole, within=2 * errors[0])
    close(lane.to_numpy(last.S), lane.to_numpy(end.S), within=2 * errors[1])
    close(lane.to_numpy(last.z), lane.to_numpy(end.z), within=2 * errors[2])


@eager
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["elu_plus_one", "softmax"])
def test_packed_equals_one_by_one(lane: Lane, name: str, is_causal: bool) -> None:
    case = self_attention(name, n=17)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": is_causal}
    ids = np.asarray([5] * 4 + [2] * 1 + [9] * 8 + [0] * 4)
    with chunks_of(3):
        out = lane.call(linear_attention, *case.arrays, dtype="float64", segment_ids=ids, **options)
    got = lane.to_numpy(out)
    for segment in np.unique(ids):
        q, k, v = (x[..., ids == segment, :] for x in case.arrays)
        alone = Case(q, k, v, {"feature_map": name, "is_causal": is_causal})
        expected = reference.linear_attention(q, k, v, **options)
        within = linear_errors(alone, "float64", expected)[0]
        close(got[..., ids == segment, :], expected, within=within)


@eager
@pytest.mark.parametrize("factor", [3.0, 1e3, np.nan])
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_future_cannot_change_the_past(
    lane: Lane, name: str, factor: float, dtype: str
) -> None:
    case = self_attention(name)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": True}
    k, v = case.k.copy(), case.v.copy()
    k[..., -1, :] *= factor
    v[..., -1, :] *= factor
    with chunks_of(4):
        before = lane.call(linear_attention, *case.arrays, dtype=dtype, **options)
        after = lane.call(linear_attention, case.q, k, v, dtype=dtype, **options)
    before, after = lane.to_numpy(before)[..., :-1, :], lane.to_numpy(after)[..., :-1, :]
    # A NaN is taken out of the products, another order of sums: rounding may differ.
    expected = reference.linear_attention(*case.arrays, **options)
    within = 2 * linear_errors(case, dtype, expected)[0][..., :-1, :] if factor != factor else 0.0
    close(after, before, within=within)


@eager
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_hidden_keys_and_values_reach_nobody(
    lane: Lane, name: str, poison: float, is_causal: bool
) -> None:
    case = self_attention(name)
    there = np.asarray([True] * 3 + [False] * 2 + [True] * 5 + [False])
    ids = np.asarray([0] * 4 + [1] * 3 + [0] * 4)
    hidden = {"key_mask": there, "segment_ids": ids}
    options = {"feature_map": make_map(name, 3), "is_causal": is_causal} | hidden
    expected, after = reference.linear_attention(*case.arrays, return_state=True, **options)
    bad = Case(case.q, case.k.copy(), case.v.copy())
    bad.k[..., ~there, :] = poison
    bad.v[..., ~there, :] = poison
    ones = ids == 1  # seen by the rows of segment 1, and by no other
    bad.v[..., ones, 2] = poison
    # NumPy says so where a product of what is visible is no number; that is as it should be.
    with chunks_of(4), np.errstate(invalid="ignore"):
        out, state = lane.call(
            linear_attention, *bad.arrays, dtype="float64", return_state=True, **options
        )
    clean = Case(*case.arrays, case.options | {"is_causal": is_causal} | hidden)
    errors = linear_errors(clean, "float64", expected)
    got, other = lane.to_numpy(out), [0, 1, 3, 4]
    close(got[..., ~ones, :], expected[..., ~ones, :], within=errors[0][..., ~ones, :])
    at = np.ix_(range(2), range(4), np.flatnonzero(ones), other)
    close(got[at], expected[at], within=np.broadcast_to(errors[0], expected.shape)[at])
    # A row whose weights are all 0 is 0, whatever the values: relu makes such rows.
    heard = np.any(expected != 0, axis=-1)
    assert not np.isfinite(got[..., 2][heard & ones]).any()
    S = lane.to_numpy(state.S)
    close(
        S[..., other], after.S[..., other], within=np.broadcast_to(errors[1], S.shape)[..., other]
    )


@eager
@pytest.mark.parametrize("name", [n for n in ALL_MAPS if n not in MAPS])
def test_no_map_looks_at_the_future(lane: Lane, name: str) -> None:
    test_the_future_cannot_change_the_past(lane, name, 3.0, "float32")


@pytest.mark.lanes("numpy")  # where blocks of chunks are done at once
@pytest.mark.parametrize("name", ["elu_plus_one", "softmax", "exp", "binning"])
@pytest.mark.parametrize("factor", [3.0, 1e30, np.inf, -np.inf, np.nan])
def test_blocks_before_a_change_keep_their_bits(lane: Lane, name: str, factor: float) -> None:
    # Chunks of 2, and 16 chunks in a block: what is done with the last of 80 tokens, and by
    # which way, is nothing to the blocks before.
    case = self_attention(name, n=80)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": True}
    k = np.where(np.arange(80)[:, None] == 79, factor * np.abs(case.k), case.k)
    with chunks_of(4):
        before = linear_attention(*case.arrays, **options)
        after = linear_attention(case.q, k, case.v, **options)
    np.testing.assert_array_equal(after[..., :64, :], before[..., :64, :])
    errors = linear_errors(case, "float64", before)[0]
    close(after[..., :-1, :], before[..., :-1, :], within=2 * errors[..., :-1, :])


@pytest.mark.lanes("numpy")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("large", ["q", "k", "v"])
@pytest.mark.parametrize("name", ["exp", "softmax"])
def test_blocks_that_do_not_fit_are_taken_up_where_they_begin(
    lane: Lane, name: str, large: str, is_causal: bool
) -> None:
    # Too large for what is multiplied out, and in range with a logarithm beside it.
    case = self_attention(name, n=80)
    getattr(case, large)[..., 33, :] *= 2.0**40 if large == "v" else 10.0
    case.options["is_causal"] = is_causal
    with chunks_of(4):
        check_linear(lane, case)


def cosformers() -> list[dict[str, Any]]:
    segments = np.asarray([3] * 4 + [1] * 7)
    return [
        {},
        {"is_causal": True},
        {"kv_lengths": np.asarray([9, 4])},
        {"kv_lengths": np.asarray([9, 4]), "is_causal": True},
        {"kv_lengths": 7, "normalize": False},
        {"segment_ids": segments, "is_causal": True},
        {"key_mask": np.arange(11) % 3 > 0},
    ]


@eager
@pytest.mark.parametrize("options", cosformers(), ids=lambda o: "-".join(o) or "full")
def test_cosformer_equals_the_reference(lane: Lane, options: dict[str, Any]) -> None:
    case = self_attention("relu")
    options = options | {"feature_map": feature_maps.cosformer(40)}
    expected = reference.linear_attention(*case.arrays, **options)
    out = lane.call(linear_attention, *case.arrays, dtype="float64", **options)
    within = linear_errors(Case(*case.arrays, options), "float64", expected)[0]
    lane.check(out, expected, dtype="float64", within=within)


@compiled
def test_cosformer_equals_the_reference_where_loops_are_compiled(lane: Lane) -> None:
    test_cosformer_equals_the_reference(lane, cosformers()[3])


def test_cosformer_weighs_by_its_kernel() -> None:
    case = self_attention("relu")
    q, (k, v) = case.q[..., 4:, :], (np.repeat(x, 2, axis=-3) for x in (case.k, case.v))
    phi = feature_maps.cosformer(40)
    w = phi.kernel(q, k)
    visible = np.arange(11) <= np.arange(4, 11)[:, None]
    w = np.where(visible, w, 0.0)
    total = w.sum(-1, keepdims=True)
    expected = np.where(total == 0, 0.0, (w @ v) / np.where(total == 0, 1.0, total))
    out = linear_attention(q, k, v, feature_map=phi, is_causal=True)
    within = linear_errors(
        Case(q, k, v, {"feature_map": phi, "is_causal": True}), "float64", expected
    )[0]
    close(out, expected, within=within)


def test_cosformer_goes_on_from_where_it_is_told() -> None:
    q, k, v = self_attention("relu").arrays
    make = feature_maps.cosformer
    whole = linear_attention(q, k, v, feature_map=make(40), is_causal=True)
    _, state = linear_attention(
        *(x[..., :6, :] for x in (q, k, v)),
        feature_map=make(40), is_causal=True, return_state=True,
    )  # fmt: skip
    rest = linear_attention(
        *(x[..., 6:, :] for x in (q, k, v)),
        feature_map=make(40, start=6), is_causal=True, initial_state=state,
    )  # fmt: skip
    case = Case(q, k, v, {"feature_map": make(40), "is_causal": True})
    within = 2 * linear_errors(case, "float64", whole)[0]
    close(rest, whole[..., 6:, :], within=within[..., 6:, :])
    half = linear_attention(*(x.astype(np.float16) for x in (q, k, v)), feature_map=make(40))
    assert half.dtype == np.float16


@pytest.mark.lanes("torch", "jax", "strict")
def test_trained_weights_may_be_of_the_arrays_library(lane: Lane) -> None:
    q, k, v = self_attention("relu").arrays
    w = np.random.default_rng(0).normal(size=(3, 4))
    expected = linear_attention(q, k, v, feature_map=feature_maps.hedgehog(w), is_causal=True)
    phi = feature_maps.hedgehog(lane.asarray(w, "float64"))
    out = lane.call(linear_attention, q, k, v, dtype="float64", feature_map=phi, is_causal=True)
    case = Case(q, k, v, {"feature_map": feature_maps.hedgehog(w), "is_causal": True})
    within = 2 * linear_errors(case, "float64", expected)[0]
    lane.check(out, expected, dtype="float64", within=within)
    with pytest.raises(TypeError, match="expected the weights of hedgehog as NumPy arrays"):
        linear_attention(q, k, v, feature_map=phi)


def test_gradients_reach_trained_weights() -> None:
    import torch

    q, k, v = (torch.from_numpy(x) for x in self_attention("relu").arrays)
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 4))).requires_grad_()

    def loss(w: Any) -> Any:
        return linear_attention(q, k, v, feature_map=feature_maps.hedgehog(w)).square().sum()

    assert torch.autograd.gradcheck(loss, (w,))


@compiled
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_laws_hold_where_loops_are_compiled(lane: Lane, is_causal: bool) -> None:
    test_hidden_keys_and_values_reach_nobody(lane, "softmax", np.nan, is_causal)
    test_packed_equals_one_by_one(lane, "softmax", is_causal)
    if is_causal and not lane.compiled:
        test_the_future_cannot_change_the_past(lane, "softmax", np.nan, "float32")
    test_no_items_and_no_heads(lane, (0, 2, 5))


@eager
@for_all(case=linear_cases(state=False, maps=NON_NEGATIVE))
def test_weights_are_those_of_a_mean(lane: Lane, case: Case) -> None:
    options = options_of(case) | {"normalize": True}
    v = np.concatenate([case.v, np.ones_like(case.v[..., :1])], axis=-1)
    widened = Case(case.q, case.k, v, case.options | {"normalize": True})
    with chunks_of(3):
        out = lane.call(linear_attention, *widened.arrays, dtype="float64", **options)
    got = lane.to_numpy(out)
    within = linear_errors(widened, "float64", got)[0]
    ones = got[..., -1:]
    assert np.all((got == 0) | (np.abs(ones - 1) <= within))  # 0: a row that sees nothing
    assert np.all(got[..., :-1] <= np.max(case.v, initial=0.0) + within[..., :-1])
    assert np.all(got[..., :-1] >= np.min(case.v, initial=0.0) - within[..., :-1])


def test_no_tokens_leave_the_state_as_it_was(lane: Lane) -> None:
    q, k, v = np.zeros((2, 4, 0, 3)), np.zeros((2, 2, 0, 3)), np.zeros((2, 2, 0, 5))
    for name in ("elu_plus_one", "softmax"):
        options = {"feature_map": make_map(name, 3), "is_causal": True, "return_state": True}
        width = 3 if name == "elu_plus_one" else 8
        out, state = lane.call(linear_attention, q, k, v, dtype="float32", **options)
        lane.check(out, np.zeros((2, 4, 0, 5)), dtype="float32", within=0.0)
        lane.check(state.S, np.zeros((2, 2, width, 5)), dtype="float32", within=0.0)
        some = LinearState(np.ones((2, 2, width, 5)), np.ones((2, 2, width)))
        _, state = lane.call(
            linear_attention, q, k, v, dtype="float32", initial_state=some, **options
        )
        lane.check(state.S, some.S, dtype="float32", within=0.0)
        lane.check(state.z, some.z, dtype="float32", within=0.0)


@eager
@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 0, 5), (0, 5)])
def test_no_items_and_no_heads(lane: Lane, shape: tuple[int, ...]) -> None:
    x = np.zeros((*shape, 3))
    for options in ({}, {"is_causal": True}, {"segment_ids": np.zeros(shape[-1], int)}):
        with chunks_of(2):
            out = lane.call(linear_attention, x, x, x, dtype="float64", **options)
        lane.check(out, x, dtype="float64", within=0.0)


@pytest.mark.parametrize("name", ["softmax", "gaussian"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_features_of_any_size_stay_in_range(lane: Lane, name: str, is_causal: bool) -> None:
    # Single precision ends at e^88; these exponents reach some thousands.
    rng = np.random.default_rng(0)
    x, v = np.abs(rng.normal(size=(2, 9, 1)) * 40.0), rng.normal(size=(2, 9, 3))
    case = as_held(Case(x, x, v, {"feature_map": name, "is_causal": is_causal}), "float32")
    options = options_of(case)
    with chunks_of(4):
        out = lane.call(linear_attention, *case.arrays, dtype="float32", **options)
    # Weights without a sign: each is off by its exponent's error, and so is their mean.
    bound = 2 * C * eps("float32") * (1 + exponent(options["feature_map"], case)) * largest(v)
    expected = reference.linear_attention(*case.arrays, **options)
    lane.check(out, expected, dtype="float32", within=bound)


MODES = ("plain", "empty rows", "segments", "no keys")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["elu_plus_one", "relu", "softmax", "trigonometric"])
@pytest.mark.lanes("torch", "torch-cuda")  # with gradients, and without compiling
def test_gradients_are_those_of_the_reference(
    lane: Lane, name: str, mode: str, is_causal: bool
) -> None:
    check_gradients(lane, name, mode, is_causal)


@pytest.mark.parametrize(
    ("name", "mode", "is_causal"),
    [
        ("elu_plus_one", "empty rows", True),
        ("softmax", "segments", True),
        ("softmax", "no keys", False),
    ],
)
@pytest.mark.lanes("jax", "jax-gpu")  # with gradients, each case compiled
def test_gradients_are_those_of_the_reference_where_loops_are_compiled(
    lane: Lane, name: str, mode: str, is_causal: bool
) -> None:
    check_gradients(lane, name, mode, is_causal)


def check_gradients(lane: Lane, name: str, mode: str, is_causal: bool) -> None:
    case = self_attention(name)
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": is_causal}
    if mode == "empty rows":
        options["key_mask"] = np.arange(11) > 3
    if mode == "no keys":
        options["key_mask"] = np.arange(11) > 11
    if mode == "segments":
        options["segment_ids"] = np.asarray([0, 1, 2, 0, 1, 2, 0, 1, 1, 1, 7])
    with chunks_of(4):
        got = gradients(lane, linear_attention, case, options)
    expected = gradients(lane, reference.linear_attention, case, options)
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all()
        # Both sides differentiate the same sums; their condition is that of the sums.
        close(a, b, within=1e-9 * (1 + np.abs(b).max()))


def gradients(lane: Lane, function: Any, case: Case, options: dict[str, Any]) -> list[Any]:
    options = {n: lane.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    arrays = [lane.asarray(x, "float64") for x in case.arrays]
    if lane.declared.name == "torch":
        arrays = [x.requires_grad_() for x in arrays]
        (function(*arrays, **options) ** 2).sum().backward()
        return [lane.to_numpy(x.grad) for x in arrays]
    import jax

    def loss(*arrays: Any) -> Any:
        return (function(*arrays, **options) ** 2).sum()

    # Compiled as a whole: much less work than one operation at a time.
    return [lane.to_numpy(g) for g in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)]


def test_what_jax_compiles_does_not_grow_with_the_length() -> None:
    import jax

    def equations(n: int) -> int:
        x = jax.numpy.zeros((2, n, 4))
        traced = jax.make_jaxpr(lambda x: linear_attention(x, x, x, is_causal=True))(x)
        return str(traced).count(" = ")

    assert equations(1000) == equations(8000)


@pytest.mark.parametrize("is_causal", [False, True])
def test_working_memory_does_not_grow_with_the_length(is_causal: bool) -> None:
    def beyond_outputs(n: int) -> int:
        x = np.ones((2, n, 32), np.float32)
        fm = feature_maps.softmax(dim=32, num_features=256, rng=0)
        tracemalloc.start()
        linear_attention(x, x, x, feature_map=fm, is_causal=is_causal)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak - x.nbytes  # the output

    # How many workers find a job depends on the machine's mood; the memory is that of each.
    with set_num_threads(1):
        beyond_outputs(2048)  # what a first call loads and keeps does not count
        assert beyond_outputs(16384) < 1.2 * beyond_outputs(2048)


def test_a_function_may_change_between_calls() -> None:
    import jax.numpy as jnp

    class Powers:
        power = 1.0

        def __call__(self, x: Any) -> Any:
            return abs(x) ** self.power

    phi, x = Powers(), jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    before = linear_attention(x, x, x, feature_map=phi)
    phi.power = 2.0
    assert not jnp.allclose(before, linear_attention(x, x, x, feature_map=phi))


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"feature_map": 3}, TypeError, "feature_map: expected one of"),
        ({"feature_map": feature_maps.softmax}, TypeError, "call it: softmax"),
        ({"feature_map": feature_maps.gaussian}, TypeError, "call it: gaussian"),
        ({"feature_map": feature_maps.cosformer}, TypeError, "call it: cosformer"),
        ({"feature_map": feature_maps.hedgehog}, TypeError, "call it: hedgehog"),
        ({"feature_map": feature_maps.nystrom}, TypeError, "call it: nystrom"),
        (
            {"feature_map": feature_maps.nystrom(feature_maps.taylor2, np.ones((2, 5)))},
            ValueError,
            "expected landmarks of width D = 3, got 5",
        ),
        (
            {"feature_map": feature_maps.softmax(dim=5, num_features=4, rng=0)},
            ValueError,
            "expected dim=3",
        ),
        (
            {"feature_map": feature_maps.hedgehog(np.ones((5, 2)))},
            ValueError,
            r"expected weights of shape \(3, m\)",
        ),
        ({"feature_map": lambda x: x[..., 0]}, ValueError, "to map"),
        ({"initial_state": np.zeros((3, 2))}, TypeError, "initial_state: expected a LinearState"),
        (
            {"initial_state": LinearState(np.zeros((2, 2, 7, 5)), np.zeros((2, 2, 3)))},
            ValueError,
            "initial_state.S: expected shape",
        ),
        (
            {"initial_state": LinearState(np.zeros((2, 2, 3, 5), np.float32), np.zeros((2, 2, 3)))},
            TypeError,
            "initial_state.S: expected the accumulation dtype",
        ),
        ({"key_mask": np.ones((2, 11))}, TypeError, "key_mask: expected an array of bool"),
        ({"key_mask": np.ones((2, 4, 11), bool)}, ValueError, "key_mask: expected shape"),
        ({"kv_lengths": 12}, ValueError, "kv_lengths: expected values from 0"),
        ({"scale": "big"}, TypeError, "scale: expected a real number"),
        ({"normalize": 1}, TypeError, "normalize: expected True or False"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        linear_attention(*self_attention("relu").arrays, **options)


@pytest.mark.parametrize("heads", [(2, 2, 4), (4, 2, 4), (2, 1, 2), (4, 1, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_documents_differ_by_item_where_values_have_more_heads(
    heads: tuple[int, int, int], causal: bool, apart: bool
) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rng.random((2, h, 9, d)) for h, d in zip(heads, (3, 3, 5), strict=True))
    ids = np.array([[0, 0, 0, 1, 1, 1, 2, 2, 2], [3, 3, 1, 1, 1, 1, 1, 0, 0]])
    of = (lambda x: (x, x.copy())) if apart else (lambda x: x)
    got = linear_attention(q, k, v, segment_ids=of(ids), is_causal=causal)
    for b in range(2):
        alone = linear_attention(q[b], k[b], v[b], segment_ids=of(ids[b]), is_causal=causal)
        close(got[b], alone, within=C * eps("float64"))
