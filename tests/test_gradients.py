"""Gradients flow through every family, equal the reference's, and are finite and 0 where due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
from lanes import close
from tolerance import C, eps, largest, longest

import arrattn
from arrattn import reference

Function = Callable[..., Any]


def pair(name: str, **fixed: Any) -> tuple[Function, Function]:
    """A function and its reference, with some options given."""
    theirs = {"attention": "softmax_attention"}.get(name, name)

    def bind(function: Function) -> Function:
        return lambda *arrays, **options: function(*arrays, **fixed, **options)

    return bind(getattr(arrattn, name)), bind(getattr(reference, theirs))


FAMILIES: dict[str, tuple[Function, Function]] = {
    "dense": pair("attention"),
    "local": pair("local_attention", window=(3, 1)),
    "sparse": pair("sparse_attention", block_size=3, top_k=2, route=2),
    "sparse-exact": pair("sparse_attention", block_size=3, top_k=2, route=None),
    "linear": pair("linear_attention"),
}
families = pytest.mark.parametrize("family", FAMILIES)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "padded": {"kv_lengths": np.asarray([4, 11]), "is_causal": True},
    "all hidden": {"kv_lengths": np.asarray([0, 11])},
}
options_of = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
SHAPES = (2, 4, 9, 3), (2, 2, 11, 3), (2, 2, 11, 5)


def inputs(seed: int = 0) -> tuple[list[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """q, k, v, and the cotangent of the output."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=s) for s in SHAPES], rng.normal(size=(2, 4, 9, 5))


def torch_gradients(
    function: Function, arrays: Any, g: Any, options: dict[str, Any]
) -> list[np.ndarray[Any, Any]]:
    leaves = [torch.asarray(x).requires_grad_() for x in arrays]
    options = {n: torch.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    out = function(*leaves, **options)
    out.backward(torch.asarray(g))
    return [x.grad.numpy() for x in leaves]


def jax_gradients(
    function: Function, arrays: Any, g: Any, options: dict[str, Any]
) -> list[np.ndarray[Any, Any]]:
    options = {
        n: jax.numpy.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()
    }

    def weighed(*arrays: Any) -> Any:
        return (function(*arrays, **options) * jax.numpy.asarray(g)).sum()

    arrays = [jax.numpy.asarray(x) for x in arrays]
    return [np.asarray(x) for x in jax.jit(jax.grad(weighed, (0, 1, 2)))(*arrays)]


def bound(arrays: Any, g: Any) -> float:
    """
    The size of a rounding in a gradient.

    A gradient is a sum over all pairs of products of a cotangent, a value and a query or
    key; each carries the error of its weight.
    """
    q, k, v = arrays
    n = q.shape[-2] + k.shape[-2]
    size = largest(g) * (1 + longest(v)) * (1 + longest(q)) * (1 + longest(k))
    return C * eps("float64") * n * size


@families
@options_of
def test_torch_equals_the_reference(family: str, options: dict[str, Any]) -> None:
    arrays, g = inputs()
    ours, theirs = (torch_gradients(f, arrays, g, options) for f in FAMILIES[family])
    for got, expected in zip(ours, theirs, strict=True):
        assert np.isfinite(expected).all()
        close(got, expected, within=bound(arrays, g))


@families
@options_of
def test_jax_equals_the_reference_of_torch(family: str, options: dict[str, Any]) -> None:
    arrays, g = inputs()
    got = jax_gradients(FAMILIES[family][0], arrays, g, options)
    expected = torch_gradients(FAMILIES[family][1], arrays, g, options)
    for x, y in zip(got, expected, strict=True):
        close(x, y, within=bound(arrays, g))


@families
def test_torch_agrees_with_finite_differences(family: str) -> None:
    arrays, _ = inputs(1)
    leaves = [torch.asarray(x[:1, :, :5]).requires_grad_() for x in arrays]
    function = FAMILIES[family][0]
    assert torch.autograd.gradcheck(lambda *a: function(*a, is_causal=True), leaves)


@pytest.mark.parametrize("family", ["dense", "local", "sparse"])
def test_scores_options_have_gradients(family: str) -> None:
    rng = np.random.default_rng(2)
    q, k, v = (torch.asarray(x) for x in rng.normal(size=(3, 2, 6, 3)))
    bias = torch.asarray(rng.normal(size=(2, 6, 6))).requires_grad_()
    sinks = torch.asarray(rng.normal(size=2)).requires_grad_()
    function = FAMILIES[family][0]

    def both(bias: Any, sinks: Any) -> Any:
        return function(q, k, v, bias=bias, sinks=sinks, softcap=3.0, return_lse=True)

    assert torch.autograd.gradcheck(both, [bias, sinks])


@families
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_gradients_of_empty_rows_are_zero(family: str, library: str) -> None:
    arrays, g = inputs(3)
    options = {"kv_lengths": np.asarray([0, 11])}
    take = torch_gradients if library == "torch" else jax_gradients
    for grad in take(FAMILIES[family][0], arrays, g, options):
        assert (grad[0] == 0).all()
        assert np.isfinite(grad).all()
        assert grad[1].any()


@families
@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_hidden_content_does_not_reach_gradients(family: str, library: str, value: float) -> None:
    (q, k, v), g = inputs(4)
    options: dict[str, Any] = {"kv_lengths": np.asarray([4, 11]), "is_causal": True}
    if family != "linear":  # its slope at a NaN is a NaN
        options["softcap"] = 3.0
    take = torch_gradients if library == "torch" else jax_gradients
    clean = take(FAMILIES[family][0], (q, k, v), g, options)
    spoiled_k, spoiled_v = k.copy(), v.copy()
    spoiled_k[0, :, 4:], spoiled_v[0, :, 4:] = value, value
    got = take(FAMILIES[family][0], (q, spoiled_k, spoiled_v), g, options)
    for x, y in zip(got, clean, strict=True):
        close(x, y, within=bound((q, k, v), g))


def test_gradients_flow_through_merge() -> None:
    arrays, g = inputs(5)

    def parts(q: Any, k: Any, v: Any) -> Any:
        halves = [
            arrattn.attention(q, k[:, :, s], v[:, :, s], return_lse=True)
            for s in (slice(0, 4), slice(4, None))
        ]
        return arrattn.merge(halves)[0]

    whole = torch_gradients(arrattn.attention, arrays, g, {})
    for got, expected in zip(torch_gradients(parts, arrays, g, {}), whole, strict=True):
        close(got, expected, within=bound(arrays, g))
    for got, expected in zip(jax_gradients(parts, arrays, g, {}), whole, strict=True):
        close(got, expected, within=bound(arrays, g))
