"""The operators of other standards: our function, their text and their own evaluator."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from lanes import NUMPY_DTYPES, Lane
from tolerance import C, eps

from arrattn import reference
from arrattn.adapters import onnx_linear_attention

RULES = ("linear", "gated", "delta", "gated_delta")


def inputs(rule: str, *, heads: int = 2, groups: int = 1, dk: int = 3, **how: Any) -> Any:
    """Inputs by name, and attributes."""
    rng = np.random.default_rng(heads)
    b, t, dv = 2, how.get("t", 7), 4
    key = rng.normal(size=(b, t, heads, dk))
    key /= np.sqrt(np.sum(key**2, axis=-1, keepdims=True))
    given = {
        "query": rng.normal(size=(b, t, groups * heads * dk)),
        "key": key.reshape(b, t, heads * dk),
        "value": rng.normal(size=(b, t, heads * dv)),
    }
    if how.get("state"):
        given["past_state"] = rng.normal(size=(b, heads, dk, dv))
    if "gated" in rule:
        width = heads * dk if how.get("channels") else heads
        given["decay"] = -rng.random((b, t, width))
    if "delta" in rule:
        given["beta"] = rng.random((b, t, 1 if how.get("one_beta") else heads))
    return given, {"update_rule": rule, "q_num_heads": groups * heads, "kv_num_heads": heads}


WAYS: list[dict[str, Any]] = [
    {},
    {"state": True, "groups": 3},
    {"channels": True, "state": True},
    {"one_beta": True, "groups": 2},
    {"t": 1, "state": True},
    {"t": 0, "state": True},
    {"heads": 1, "dk": 1},
]


def bound(given: dict[str, Any], dtype: str = "float32") -> float:
    """Errors of a memory that no step enlarges: of its size, once for each token."""
    t = given["query"].shape[1]
    written = sum(np.abs(given[n]).max(initial=0.0) for n in ("value", "past_state") if n in given)
    size = max(1.0, np.abs(given["query"]).max(initial=0.0))
    return C * eps(dtype) * (1 + t) ** 2 * written * size * 4


@pytest.mark.parametrize("how", WAYS, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [0.0, 0.7])
def test_equals_the_evaluator_of_onnx(rule: str, how: dict[str, Any], scale: float) -> None:
    onnx = pytest.importorskip("onnx", minversion="1.22", reason="the operator is new in 1.22")
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    given, attributes = inputs(rule, **how)
    given = {n: x.astype(np.float32) for n, x in given.items()}
    names = ("query", "key", "value", "past_state", "decay", "beta")
    node = helper.make_node(
        "LinearAttention", [n if n in given else "" for n in names],
        ["output", "present_state"], scale=scale, **attributes,
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in given.items()],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [None] * axes)
            for n, axes in zip(node.output, (3, 4), strict=True)
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)])
    onnx.checker.check_model(model)
    expected = ReferenceEvaluator(model).run(None, given)
    got = onnx_linear_attention(**given, **attributes, scale=scale)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=bound(given))


@pytest.mark.lanes("numpy", "strict", "torch", "torch-cuda", "dask", "cupy")
@pytest.mark.parametrize("rule", RULES)
def test_equals_its_equation(lane: Lane, rule: str) -> None:
    check_equation(lane, rule)


@pytest.mark.lanes("jax", "jax-gpu")  # each rule is compiled
def test_equals_its_equation_where_it_is_compiled(lane: Lane) -> None:
    check_equation(lane, "gated_delta")


def check_equation(lane: Lane, rule: str) -> None:
    given, attributes = inputs(rule, state=True, groups=2)
    out, state = lane.call(onnx_linear_attention, dtype="float64", **given, **attributes)

    def apart(name: str, heads: int) -> Any:
        x = given[name]
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    q, k, v = apart("query", 4), apart("key", 2), apart("value", 2)
    g = apart("decay", 2) if "gated" in rule else np.zeros((2, 2, 7, 1))
    S, rows = given["past_state"], []
    for t in range(7):
        S = np.exp(g[:, :, t, :, None]) * S
        u = v[:, :, t, None]
        if "delta" in rule:
            u = given["beta"][:, t, :, None, None] * (u - k[:, :, t, None] @ S)
        S = S + k[:, :, t, :, None] * u
        rows.append(3**-0.5 * (q[:, :, t, None] @ np.repeat(S, 2, axis=1)))
    expected = np.concatenate(rows, axis=2).swapaxes(1, 2).reshape(2, 7, -1)
    within = bound(given, "float64")
    lane.check(out, expected, dtype="float64", within=within)
    lane.check(state, S, dtype="float64", within=within)


@pytest.mark.parametrize("state_dtype", ["float32", "float16", "bfloat16", None])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_state_has_its_own_dtype(dtype: str, state_dtype: str | None) -> None:
    given, attributes = inputs("gated_delta", state=state_dtype is not None)
    held = {n: x.astype(NUMPY_DTYPES[dtype]) for n, x in given.items()}
    if state_dtype is not None:
        held["past_state"] = given["past_state"].astype(NUMPY_DTYPES[state_dtype])
    out, state = onnx_linear_attention(**held, **attributes)
    assert out.dtype == NUMPY_DTYPES[dtype]
    assert state.dtype == NUMPY_DTYPES[state_dtype or dtype]
    wide = {n: x.astype(np.float64) for n, x in held.items()}
    expected, after = onnx_linear_attention(**wide, **attributes)
    for got, want in ((out, expected), (state, after)):
        rounding = float(ml_dtypes.finfo(got.dtype).eps) * np.abs(want).max()
        np.testing.assert_allclose(got.astype(float), want, rtol=0, atol=bound(wide) + rounding)


def test_the_operator_lets_a_state_grow() -> None:
    given, attributes = inputs("gated", state=True)
    given["decay"] = np.full((2, 7, 2), 0.5)
    out, _ = onnx_linear_attention(**given, **attributes)
    alone, _ = inputs("gated", state=True)
    alone["value"] *= 0
    _, grown = onnx_linear_attention(**(alone | {"decay": given["decay"]}), **attributes)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(grown, np.exp(3.5) * given["past_state"], rtol=8 * eps("float64"))


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"decay": None}, ValueError, "decay: expected an array with update_rule='gated_delta'"),
        ({"update_rule": "linear"}, ValueError, "beta: expected none with update_rule='linear'"),
        ({"update_rule": "gated-delta"}, ValueError, "did you mean 'gated_delta'?"),
        ({"q_num_heads": 3}, ValueError, "q_num_heads: expected a multiple of kv_num_heads (2)"),
        ({"q_num_heads": 0}, ValueError, "attention: q_num_heads: expected at least 1, got 0"),
        ({"kv_num_heads": 0}, ValueError, "attention: kv_num_heads: expected at least 1, got 0"),
        ({"query": np.ones((2, 7))}, ValueError, "query: expected 3 axes, got shape (2, 7)"),
        ({"key": np.ones((2, 7, 7))}, ValueError, "key: expected shape (2, 7, a multiple of 2)"),
        ({"key": np.ones((2, 6, 6))}, ValueError, "key: expected shape (2, 7, 6), got (2, 6, 6)"),
        ({"decay": np.ones((2, 7, 5))}, ValueError, "expected shape (2, 7, 2) or (2, 7, 6), got"),
        ({"beta": np.ones((2, 7, 3))}, ValueError, "expected shape (2, 7, 2) or (2, 7, 1), got"),
        ({"past_state": np.ones((2, 2, 4, 3))}, ValueError, "past_state: expected shape (2, 2, 3"),
        ({"value": [1.0]}, TypeError, "value: expected an array, got [1.0]"),
        ({"beta": np.ones((2, 7, 2), int)}, TypeError, "beta: expected an array of real floats"),
    ],
    ids=str,
)
def test_bad_input_is_named(change: dict[str, Any], kind: type[Exception], says: str) -> None:
    given, attributes = inputs("gated_delta", state=True)
    with pytest.raises(kind) as caught:
        onnx_linear_attention(**(given | attributes | change))
    assert "onnx_linear_attention" in str(caught.value)
    assert says in str(caught.value)


def test_other_libraries_do_not_mix() -> None:
    import torch

    given, attributes = inputs("delta")
    with pytest.raises(TypeError, match="beta: expected an array of the same library as query"):
        onnx_linear_attention(**(given | {"beta": torch.asarray(given["beta"])}), **attributes)


def test_the_rules_are_those_of_the_families() -> None:
    given, attributes = inputs("gated_delta")
    out, _ = onnx_linear_attention(**given, **attributes, scale=1.0)
    q, k, v = (given[n].reshape(2, 7, 2, -1).swapaxes(1, 2) for n in ("query", "key", "value"))
    gates = {"beta": given["beta"].swapaxes(1, 2), "log_decay": given["decay"].swapaxes(1, 2)}
    expected = reference.delta_attention(q, k, v, **gates).swapaxes(1, 2).reshape(2, 7, -1)
    np.testing.assert_allclose(out, expected, rtol=0, atol=bound(given, "float64"))
