"""Bad input is refused before any work, in words that say what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from typing import Any

import array_api_strict
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from array_api_compat import array_namespace
from lanes import Lane

import arrattn
from arrattn import (
    DeltaState,
    LinearState,
    attention,
    delta_attention,
    linear_attention,
    local_attention,
    merge,
    patterns,
    sparse_attention,
)

FAMILIES: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "local_attention": lambda *a, **o: local_attention(*a, **{"window": (1, 1), **o}),
    "sparse_attention": sparse_attention,
    "linear_attention": linear_attention,
    "delta_attention": lambda *a, **o: delta_attention(*a, **{"beta": beta_like(a[0]), **o}),
}
LINEAR = ("linear_attention", "delta_attention")
families = pytest.mark.parametrize("family", FAMILIES)
softmax = pytest.mark.parametrize("family", [n for n in FAMILIES if n not in LINEAR])
ONES = np.ones((2, 5, 4))


def beta_like(q: Any) -> Any:
    """Writing strengths of the library and device of `q`, where it is an array."""
    if not hasattr(q, "shape") or len(q.shape) < 2:
        return ONES[..., 0]
    xp = array_namespace(q)
    return xp.ones_like(q[..., 0], dtype=xp.float64)


def refused(kind: type[Exception], *says: str, by: Callable[[], Any]) -> str:
    """Assert that a call raises this kind, with all of these words; the message."""
    with pytest.raises(kind) as caught:
        by()
    message = str(caught.value)
    for words in says:
        assert words in message, f"{words!r} is not in: {message}"
    return message


def short(x: object) -> str:
    """What a test is called: no arrays."""
    return str(x) if len(str(x)) < 60 else type(x).__name__


# -- q, k, v ----------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("x", [[[1.0]], None, 3.0, "keys"], ids=str)
def test_not_an_array(family: str, position: int, x: Any) -> None:
    arrays: list[Any] = [ONES] * 3
    arrays[position] = x
    says = (f"{'qkv'[position]}: expected an array", f"{family}:")
    refused(TypeError, *says, by=lambda: FAMILIES[family](*arrays))


@families
@pytest.mark.parametrize("dtype", [np.int64, np.complex128, np.bool_])
def test_not_real_floating(family: str, dtype: Any) -> None:
    x = ONES.astype(dtype)
    says = [
        f"{x}: expected one of float64, float32, float16, bfloat16, got {np.dtype(dtype).name}"
        for x in "qkv"
    ]
    refused(TypeError, *says, by=lambda: FAMILIES[family](x, x, x))


def test_a_decay_of_the_wrong_shape_names_the_function() -> None:
    for function, gates in ((linear_attention, {}), (delta_attention, {"beta": np.ones((2, 5))})):
        name = f"{function.__name__}: "
        decay = {"log_decay": np.zeros((2, 5, 3))} | ({} if gates else {"is_causal": True})
        refused(ValueError, name, by=lambda f=function, o=gates | decay: f(ONES, ONES, ONES, **o))
    x, gone = ONES[0], {"log_decay": np.zeros((5, 3)), "is_causal": True}
    refused(ValueError, "Dphi) = (5, 4), ", by=lambda: linear_attention(x, x, x, **gone))


@families
def test_different_dtypes(family: str) -> None:
    says = ("k: expected the dtype of q (float64), got float32",)
    refused(TypeError, *says, by=lambda: FAMILIES[family](ONES, ONES.astype(np.float32), ONES))


@families
def test_different_libraries(family: str) -> None:
    for other, name in ((torch.ones(2, 5, 4), "torch"), (jnp.ones((2, 5, 4)), "jax")):
        says = ("v: expected an array of the same library as q (numpy)", name)
        refused(TypeError, *says, by=lambda x=other: FAMILIES[family](ONES, ONES, x))


@families
def test_different_devices(family: str) -> None:
    here = array_api_strict.ones((2, 5, 4))
    there = array_api_strict.ones((2, 5, 4), device=array_api_strict.Device("device1"))
    says = ("k: expected an array on the device of q", "device1")
    refused(TypeError, *says, by=lambda: FAMILIES[family](here, there, here))


def seen(xp: Any) -> dict[str, Any]:
    """Arguments about visibility whose arrays are of this library, by what errors call them."""
    ids = xp.zeros(5, dtype=xp.int32)
    return {
        "kv_lengths": {"kv_lengths": xp.asarray(3)},
        "segment_ids": {"segment_ids": ids},
        "segment_ids[1]": {"segment_ids": (np.zeros(5, int), ids)},
    }


def softmax_arrays(xp: Any) -> dict[str, Any]:
    here, there = np.zeros(5, int), xp.zeros(5, dtype=xp.int32)
    return {
        **seen(xp),
        "mask": {"mask": xp.ones((5, 5), dtype=xp.bool)},
        "bias": {"bias": xp.ones((5, 5))},
        "sinks": {"sinks": xp.ones(2)},
        "q_offset": {"q_offset": xp.asarray(0)},
        "pattern (its array 1)": {"pattern": patterns.Segments(here, there)},
    }


def linear_arrays(xp: Any) -> dict[str, Any]:
    return {
        **seen(xp),
        "key_mask": {"key_mask": xp.ones(5, dtype=xp.bool)},
        "log_decay": {"log_decay": -xp.ones((2, 5, 4))},
    }


ARRAYS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "attention": softmax_arrays,
    "local_attention": softmax_arrays,
    "sparse_attention": lambda xp: {
        **softmax_arrays(xp),
        "block_scores": {"block_scores": xp.ones((2, 5, 2)), "select": "blocks", "block_size": 3},
        "always (its array 0)": {"always": patterns.Prefix(xp.asarray(1))},
    },
    "linear_attention": lambda xp: {
        **linear_arrays(xp),
        "initial_state.z": {"initial_state": LinearState(np.zeros((2, 4, 4)), xp.ones((2, 4)))},
    },
    "delta_attention": lambda xp: {
        **linear_arrays(xp),
        "beta": {"beta": xp.ones((2, 5))},
        "initial_state.S": {"initial_state": DeltaState(xp.ones((2, 4, 4)))},
    },
}


@families
def test_every_array_of_another_library_is_named(family: str) -> None:
    for name, options in ARRAYS[family](torch).items():
        says = f"{name}: expected an array of the same library as q (numpy), got one of torch"
        refused(TypeError, says, by=lambda o=options: FAMILIES[family](*[ONES] * 3, **o))


@families
def test_every_argument_that_makes_no_sense_is_named(family: str) -> None:
    for name, parameter in signature(getattr(arrattn, family)).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            with pytest.raises((TypeError, ValueError)) as caught:
                FAMILIES[family](ONES, ONES, ONES, **{name: object()})
            assert re.match(f"{family}: {name}: .*<object object", str(caught.value))


@families
@pytest.mark.parametrize(
    ("q", "k", "v", "says"),
    [
        ((4,), (5, 4), (5, 4), "q: expected at least 2 axes"),
        ((2, 5, 4), (2, 5, 3), (2, 5, 4), "k: expected the width D of q (4), got 3"),
        ((2, 5, 4), (2, 5, 4), (2, 6, 4), "v: expected the length Nk of k (5), got 6"),
        ((2, 5, 4), (2, 5, 4), (1, 5, 4), "v: expected the heads Hkv of k (2), got 1"),
        ((3, 5, 4), (2, 5, 4), (2, 5, 4), "q: expected heads Hq a multiple of Hkv (2), got 3"),
        ((2, 5, 4), (0, 5, 4), (0, 5, 4), "q: expected heads Hq a multiple of Hkv (0), got 2"),
        ((3, 2, 5, 4), (2, 2, 5, 4), (1, 2, 5, 4), "do not broadcast together"),
    ],
)
def test_shapes_that_disagree(family: str, q: Any, k: Any, v: Any, says: str) -> None:
    arrays = [np.ones(shape) for shape in (q, k, v)]
    message = refused(ValueError, says, by=lambda: FAMILIES[family](*arrays))
    if len(q) > 1:
        for name, shape in zip("qkv", (q, k, v), strict=True):
            assert f"{name} {shape}" in message
        assert "hint:" in message


@families
def test_all_reasons_come_at_once(family: str) -> None:
    arrays = np.ones((3, 5, 4)), np.ones((2, 5, 3)), np.ones((1, 6, 4))
    says = ("k: expected the width", "v: expected the length", "v: expected the heads", "q: ")
    refused(ValueError, *says, by=lambda: FAMILIES[family](*arrays))


# -- Visibility -------------------------------------------------------------------------------


@softmax
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"mask": np.ones((5, 5))}, TypeError, "mask: expected an array of bool"),
        ({"mask": True}, TypeError, "mask: expected an array of bool"),
        ({"mask": np.ones((5, 4), bool)}, ValueError, "mask: expected a shape that broadcasts to"),
        ({"mask": np.ones((3, 2, 5, 5), bool)}, ValueError, "mask: expected a shape that"),
        ({"bias": np.ones((5, 5), int)}, TypeError, "bias: expected an array of float64"),
        ({"bias": np.ones((4, 5))}, ValueError, "bias: expected a shape that broadcasts to"),
        ({"is_causal": 1}, TypeError, "is_causal: expected True or False, got 1"),
        ({"is_causal": "yes"}, TypeError, "is_causal: expected True or False"),
        ({"return_lse": None}, TypeError, "return_lse: expected True or False"),
        ({"window": 3}, TypeError, "window: expected a pair (left, right)"),
        ({"window": (1, 2, 3)}, TypeError, "window: expected a pair (left, right)"),
        ({"window": (-1, 0)}, ValueError, "left: expected at least 0, got -1"),
        ({"window": (0, 0.5)}, TypeError, "right: expected an int, got 0.5"),
        ({"kv_lengths": 6}, ValueError, "kv_lengths: expected values from 0 to Nk (5), got 6"),
        ({"kv_lengths": -1}, ValueError, "kv_lengths: expected values from 0 to Nk (5), got -1"),
        ({"kv_lengths": 2.0}, TypeError, "kv_lengths: expected an int or an array of integers"),
        ({"kv_lengths": np.ones(2, int)}, ValueError, "kv_lengths: expected a shape that"),
        ({"q_offset": True}, TypeError, "q_offset: expected an int or an array of integers"),
        ({"q_offset": np.ones(())}, TypeError, "q_offset: expected an int or an array"),
        ({"q_offset": np.ones(3, int)}, ValueError, "q_offset: expected a shape that"),
        ({"segment_ids": [0, 1]}, TypeError, "segment_ids"),
        ({"segment_ids": np.ones(5)}, TypeError, "segment_ids"),
        ({"segment_ids": np.ones(4, int)}, ValueError, "segment ids: expected one per query"),
        ({"segment_ids": np.ones((2, 5), int)}, ValueError, "segment ids of the query side"),
        ({"pattern": "causal"}, TypeError, "pattern: expected an arrattn Pattern"),
        (
            {"pattern": patterns.Segments(np.ones(4, int), np.ones(5, int))},
            ValueError,
            "pattern: segment ids: expected one per query",
        ),
        ({"pattern": patterns.Prefix(np.ones(2, int))}, ValueError, "Prefix's n"),
        ({"scale": "1"}, TypeError, "scale: expected a real number"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
        ({"softcap": 0}, ValueError, "softcap: expected a positive"),
        ({"softcap": -2.0}, ValueError, "softcap: expected a positive"),
        ({"sinks": 1.0}, TypeError, "sinks: expected an array of real floats"),
        ({"sinks": np.ones(3)}, ValueError, "sinks: expected shape (Hq,) = (2,), got (3,)"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_options(family: str, options: dict[str, Any], kind: type[Exception], says: str) -> None:
    message = refused(kind, says, by=lambda: FAMILIES[family](ONES, ONES, ONES, **options))
    assert "q (2, 5, 4) float64, k (2, 5, 4) float64, v (2, 5, 4) float64" in message


@softmax
def test_options_of_another_library(family: str) -> None:
    for name, x in (
        ("mask", torch.ones(5, 5, dtype=torch.bool)),
        ("bias", torch.ones(5, 5)),
        ("sinks", torch.ones(2)),
        ("kv_lengths", torch.asarray(3)),
        ("q_offset", torch.asarray(0)),
        ("segment_ids", torch.zeros(5, dtype=torch.int64)),
        ("pattern", patterns.Prefix(torch.asarray(3))),
    ):
        says = (name, "of the same library as q (numpy)", "torch")

        def call(option: Any = {name: x}) -> Any:  # noqa: B006 - read only
            return FAMILIES[family](ONES, ONES, ONES, **option)

        refused(TypeError, *says, by=call)


@softmax
def test_one_array_of_ids_for_two_lengths(family: str) -> None:
    says = ("segment_ids: one array serves both sides only when Nq == Nk", "(q_ids, k_ids)")
    ids = np.zeros(5, int)
    few = ONES[:, :3]
    refused(ValueError, *says, by=lambda: FAMILIES[family](ONES, few, few, segment_ids=ids))


@softmax
def test_options_and_shapes_are_reported_together(family: str) -> None:
    says = ("scale: ", "softcap: ", "is_causal: ", "window: ", "mask: ")
    options = {"scale": "x", "softcap": -1, "is_causal": 2, "window": 7, "mask": np.ones(5)}
    refused(TypeError, *says, by=lambda: FAMILIES[family](ONES, ONES, ONES, **options))


def test_local_attention_needs_a_window() -> None:
    with pytest.raises(TypeError, match="window"):
        local_attention(ONES, ONES, ONES)  # type: ignore[call-arg]
    refused(
        TypeError,
        "window: expected a pair (left, right), got None",
        by=lambda: local_attention(ONES, ONES, ONES, window=None),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"block_size": 0}, ValueError, "block_size: expected at least 1, got 0"),
        ({"block_size": 2.0}, TypeError, "block_size: expected an int, got 2.0"),
        ({"top_k": -1}, ValueError, "top_k: expected at least 0, got -1"),
        ({"top_k": True}, TypeError, "top_k: expected an int, got True"),
        ({"route": -1}, ValueError, "route: expected at least 0, got -1"),
        ({"route": "all"}, TypeError, "route: expected an int, got 'all'"),
        (
            {"select": "key"},
            ValueError,
            "select: expected one of 'keys', 'blocks', got 'key'; did you mean 'keys'?",
        ),
        ({"per": "blok"}, ValueError, "did you mean 'block'?"),
        ({"per": 3}, ValueError, "per: expected one of"),
        ({"score": "means"}, ValueError, "did you mean 'mean'?"),
        ({"return_selection": 1}, TypeError, "return_selection: expected"),
        ({"always": "Causal()"}, TypeError, "an arrattn Pattern, got 'Causal()' (str)"),
        (
            {"always": patterns.Segments(np.ones(3, int), np.ones(3, int))},
            ValueError,
            "always: segment ids",
        ),
        ({"always": patterns.Prefix(np.ones(3, int))}, ValueError, "always: "),
        ({"block_scores": [1.0]}, TypeError, "block_scores: expected an array"),
        ({"block_scores": ONES > 0}, TypeError, "block_scores: expected an array of float64"),
        ({"block_scores": np.ones((2, 5, 9))}, ValueError, "block_scores: expected a shape"),
        ({"block_scores": np.ones(1), "block_size": 99, "score": "best"}, ValueError, "score: "),
    ],
    ids=str,
)
def test_sparse_options(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    refused(kind, says, by=lambda: sparse_attention(ONES, ONES, ONES, **options))


def test_what_sparse_attention_chooses_by_is_named_with_all_else() -> None:
    options = {"always": patterns.Prefix(np.ones(3, int)), "block_scores": [1.0], "top_k": -1}
    refused(
        TypeError,
        *("top_k: ", "always: Prefix's n", "block_scores: expected an array"),
        by=lambda: sparse_attention(ONES, ONES, ONES, **options),
    )


def state(s: tuple[int, ...], z: tuple[int, ...], dtype: Any = np.float64) -> LinearState:
    return LinearState(np.zeros(s, dtype), np.zeros(z, dtype))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"feature_map": "elu"}, TypeError, "feature_map: expected"),
        ({"is_causal": 0}, TypeError, "is_causal: expected True or False"),
        ({"normalize": None}, TypeError, "normalize: expected True or False"),
        ({"return_state": 1}, TypeError, "return_state: expected True or False"),
        ({"scale": None}, TypeError, "scale: expected a real number"),
        ({"key_mask": np.ones(5)}, TypeError, "key_mask: expected an array of bool"),
        ({"key_mask": np.ones(4, bool)}, ValueError, "key_mask: expected shape (..., Nk)"),
        ({"kv_lengths": 9}, ValueError, "kv_lengths: expected values from 0 to Nk (5)"),
        ({"segment_ids": np.ones(4, int)}, ValueError, "segment ids: expected one per query"),
        ({"initial_state": 3}, TypeError, "initial_state: expected a LinearState"),
        (
            {"initial_state": state((2, 3, 4), (2, 3))},
            ValueError,
            "initial_state.S: expected shape",
        ),
        (
            {"initial_state": state((2, 4, 4), (2, 4), np.float32)},
            TypeError,
            "initial_state.S: expected the accumulation dtype float64",
        ),
    ],
    ids=short,
)
def test_linear_options(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    refused(kind, says, by=lambda: linear_attention(ONES, ONES, ONES, **options))


DECAY = np.full((2, 5), -0.1)
BETA = np.ones((2, 5))


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"log_decay": -0.1}, TypeError, "log_decay: expected an array of real floats, got -0.1"),
        (
            {"log_decay": np.zeros((2, 5), int)},
            TypeError,
            "log_decay: expected an array of real floats, got an array of int64",
        ),
        ({"log_decay": torch.zeros(2, 5)}, TypeError, "log_decay: expected an array of the same"),
        ({"log_decay": -DECAY}, ValueError, "log_decay: expected logarithms of at most 0, got up"),
        (
            {"log_decay": DECAY[:, :4]},
            ValueError,
            "(..., Hkv, Nk, Dphi) = (2, 5, 4), its last axis 1 or 4, or (..., Hkv, Nk) = (2, 5)",
        ),
        ({"log_decay": np.zeros((2, 5, 3))}, ValueError, "its last axis 1 or 4"),
        ({"log_decay": np.zeros((2, 5, 3))}, ValueError, "Dphi) = (2, 5, 4), "),
        ({"log_decay": np.zeros((3, 1, 1))}, ValueError, "log_decay: expected a shape that"),
        (
            {"log_decay": DECAY, "segment_ids": np.zeros(5, int), "return_state": True},
            ValueError,
            "return_state: segment_ids reset the memory at every boundary",
        ),
        (
            {
                "log_decay": DECAY,
                "segment_ids": np.zeros(5, int),
                "initial_state": state((2, 4, 4), (2, 4)),
            },
            ValueError,
            "initial_state: segment_ids reset the memory at every boundary",
        ),
    ],
    ids=str,
)
def test_decay(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    refused(kind, says, by=lambda: linear_attention(ONES, ONES, ONES, **options))
    if "initial_state" in options:
        options = options | {"initial_state": DeltaState(np.zeros((2, 4, 4)))}
    refused(kind, says, by=lambda: delta_attention(ONES, ONES, ONES, beta=BETA, **options))


def test_decay_that_can_be_read_in_two_ways() -> None:
    q, g = np.ones((1, 1, 4, 4)), np.zeros((1, 1, 4))
    says = "log_decay: (1, 1, 4) can be read as (..., Hkv, Nk) and as (..., Hkv, Nk, Dphi)"
    refused(ValueError, says, by=lambda: linear_attention(q, q, q, log_decay=g))
    assert linear_attention(q, q, q, log_decay=g[..., None]).shape == q.shape


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"beta": 0.5}, TypeError, "beta: expected an array of real floats, got 0.5"),
        ({"beta": np.ones((2, 5), int)}, TypeError, "beta: expected an array of real floats"),
        ({"beta": torch.ones((2, 5))}, TypeError, "beta: expected an array of the same library"),
        ({"beta": np.ones((2, 4))}, ValueError, "(..., Hv, Nk) = (2, 5), got (2, 4)"),
        ({"beta": np.ones((2, 5, 1))}, ValueError, "(..., Hv, Nk) = (2, 5), got (2, 5, 1)"),
        ({"beta": np.ones(5)}, ValueError, "(..., Hv, Nk) = (2, 5), got (5,)"),
        ({"scale": "1"}, TypeError, "scale: expected a real number"),
        ({"return_state": 1}, TypeError, "return_state: expected True or False"),
        ({"key_mask": np.ones(5)}, TypeError, "key_mask: expected an array of bool"),
        ({"kv_lengths": 9}, ValueError, "kv_lengths: expected values from 0 to Nk (5)"),
        ({"initial_state": 3}, TypeError, "initial_state: expected a DeltaState, got 3"),
        (
            {"initial_state": state((2, 4, 4), (2, 4))},
            TypeError,
            "initial_state: expected a DeltaState",
        ),
        (
            {"initial_state": DeltaState(np.zeros((2, 4, 3)))},
            ValueError,
            "initial_state.S: expected shape (2, 4, 4), got (2, 4, 3)",
        ),
        (
            {"initial_state": DeltaState(np.zeros((2, 4, 4), np.float32))},
            TypeError,
            "initial_state.S: expected the accumulation dtype float64, got float32",
        ),
    ],
    ids=str,
)
def test_delta_options(options: dict[str, Any], kind: type[Exception], says: str) -> None:
    options = {"beta": BETA, **options}
    refused(kind, says, by=lambda: delta_attention(ONES, ONES, ONES, **options))


def test_more_value_heads_than_key_heads() -> None:
    q, k, v = np.ones((3, 5, 4)), np.ones((1, 5, 4)), np.ones((2, 5, 4))
    says = "q: expected heads Hq a multiple of the heads Hv of v (2), or a divisor, got 3"
    for name in LINEAR:
        beta = {"beta": np.ones((2, 5))} if name == "delta_attention" else {}
        refused(ValueError, says, by=lambda n=name, b=beta: getattr(arrattn, n)(q, k, v, **b))
    says = "v: expected the heads Hkv of k (2), got 3; a multiple of them would do too"
    refused(ValueError, says, by=lambda: linear_attention(v, v, q))


@pytest.mark.parametrize(
    ("parts", "kind", "says"),
    [
        (None, TypeError, "parts: expected a list of (out, lse)"),
        ([], ValueError, "parts: expected at least one"),
        ([ONES], TypeError, "parts[0]: expected a pair of arrays (out, lse)"),
        ([(ONES, None)], TypeError, "parts[0]: expected a pair of arrays"),
        ([(ONES, ONES)], ValueError, "parts[0].lse: expected shape"),
        (
            [(ONES, ONES[..., 0]), (ONES[:1], ONES[:1, :, 0])],
            ValueError,
            "parts[1].out: expected shape (2, 5, 4), got (1, 5, 4)",
        ),
        (
            [(ONES, ONES[..., 0]), (ONES.astype(np.float32), ONES[..., 0])],
            TypeError,
            "parts[1].out: expected the floating dtype of parts[0].out",
        ),
        (
            [(ONES, ONES[..., 0]), (ONES, ONES[..., 0].astype(np.float32))],
            TypeError,
            "parts[1].lse: expected the floating dtype of parts[0].lse",
        ),
        (
            [(ONES, ONES[..., 0]), (torch.ones(2, 5, 4), torch.ones(2, 5))],
            TypeError,
            "parts[1].out: expected numpy, got torch",
        ),
    ],
    ids=short,
)
def test_merge(parts: Any, kind: type[Exception], says: str) -> None:
    refused(kind, says, by=lambda: merge(parts))


def test_unknown_keywords_are_refused() -> None:
    for name in ("attention", "local_attention", "sparse_attention", *LINEAR):
        with pytest.raises(TypeError, match="causal"):
            getattr(arrattn, name)(ONES, ONES, ONES, causal=True)
        with pytest.raises(TypeError):
            getattr(arrattn, name)(q=ONES, k=ONES, v=ONES)


def test_every_library_is_refused_the_same_things(lane: Lane) -> None:
    q, k = lane.asarray(np.ones((3, 5, 4))), lane.asarray(np.ones((2, 5, 4)))
    for function in FAMILIES.values():
        refused(ValueError, "q: expected heads Hq a multiple", by=lambda f=function: f(q, k, k))
        x = lane.asarray(np.ones((2, 5, 4), int))
        refused(TypeError, "int64", by=lambda f=function, x=x: f(x, x, x))
