"""Linear attention on NumPy: what does not fit its work space is done as elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lanes import close
from softmax import as_held
from strategies import Case
from sums import chunks_of, linear_errors, make_map
from tolerance import C, eps, largest

from arrattn import feature_maps, linear_attention, reference

N = 40


def draw(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=shape)


def check_mean(case: Case, phi: Any) -> None:
    """Assert that single precision is as close to the reference as its exponents allow."""
    held = as_held(case, "float32")
    options: dict[str, Any] = case.options | {"feature_map": phi}
    with chunks_of(4):
        out = linear_attention(*(x.astype(np.float32) for x in held.arrays), **options)
    expected = reference.linear_attention(*held.arrays, **options)
    size = max(float(np.square(x).sum(-1).max()) for x in (held.q, held.k))
    w = phi.weights(np.zeros(1), np)
    reach = float(np.linalg.norm(w, axis=0).max()) * (size * phi._factor**2) ** 0.5
    bound = 2 * C * eps("float32") * (1 + reach + size * phi._factor**2) * largest(held.v)
    close(out, expected, within=bound)


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_that_are_small_everywhere_are_not_lost(is_causal: bool) -> None:
    # Of keys of length 20, features are about e^-150: single precision ends at e^-103.
    k = draw(N, 3)
    k *= 20 * 3**0.25 / np.linalg.norm(k, axis=-1, keepdims=True)
    case = Case(0.1 * draw(N, 3, seed=1), k, draw(N, 2, seed=2), {"is_causal": is_causal})
    check_mean(case, make_map("softmax", 3))


@pytest.mark.parametrize("is_causal", [False, True])
def test_large_values_under_large_weights_do_not_overflow(is_causal: bool) -> None:
    # Sums of such weights times values of 2^122 are beyond single precision, and means are not.
    phi = make_map("softmax", 3)
    w = phi.weights(np.zeros(1), np).T
    longest = w[np.argmax(np.linalg.norm(w, axis=-1))]
    x = np.broadcast_to(2 * longest / phi._factor, (N, 3))
    assert phi.kernel(x[:1], x[:1]) > 2**10
    check_mean(Case(x, x, 2.0**122 * draw(N, 2), {"is_causal": is_causal}), phi)


def test_products_with_later_keys_may_overflow() -> None:
    q, k, v = draw(N, 3), draw(N, 3, seed=1), draw(N, 2, seed=2)
    q[-3:], k[-1] = 1e20, 1e30
    case = as_held(Case(q, k, v, {"feature_map": "elu_plus_one", "is_causal": True}), "float32")
    with chunks_of(8):
        out = linear_attention(*(x.astype(np.float32) for x in case.arrays), is_causal=True)
    expected = reference.linear_attention(*case.arrays, is_causal=True)
    errors = linear_errors(case, "float32", expected)[0]
    close(out[:-1], expected[:-1], within=errors[:-1])


@pytest.mark.parametrize("name", ["elu_plus_one", "relu", "exp", "softmax", "binning"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_key_that_is_not_finite_is_what_it_is_elsewhere(
    name: str, bad: float, is_causal: bool
) -> None:
    import array_api_strict as strict

    q, k, v = np.abs(draw(N, 3)), draw(N, 3, seed=1), draw(N, 2, seed=2)
    k[17, 1] = bad
    options: dict[str, Any] = {"feature_map": make_map(name, 3), "is_causal": is_causal}
    ours = linear_attention(q, k, v, **options)
    theirs = np.asarray(linear_attention(*map(strict.asarray, (q, k, v)), **options))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    assert np.isfinite(ours).any() == is_causal


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = draw(N, 3), draw(N, 3, seed=1), draw(N, 2, seed=2)
    there = np.arange(N) % 5 > 0
    expected = linear_attention(q, k[there], v[there])
    k[~there], v[~there] = np.nan, np.inf
    out = linear_attention(q, k, v, key_mask=there)
    case = Case(q, k[there], v[there], {"feature_map": "elu_plus_one"})
    close(out, expected, within=2 * linear_errors(case, "float64", expected)[0])


def test_features_are_written_as_they_are_given() -> None:
    x = draw(N, 4)
    maps = [make_map(name, 4) for name in ("elu_plus_one", "relu", "exp", "taylor2", "squared")]
    maps += [make_map(name, 4) for name in ("softmax", "gaussian", "softmax hyperbolic")]
    for phi in [*maps, feature_maps.softmax(dim=4, num_features=8, rng=0, scale=-0.5)]:
        out = np.empty((N, phi.output_dim(4)))
        f = phi.phi_k(x, np)
        phi.write_k(x, out)
        expected = f.phi if f.log is None else f.phi * np.exp(f.log)[:, None]
        exponents = np.abs(np.log(expected[expected > 0])).max()
        close(out, expected, within=C * eps("float64") * (1 + exponents) * (1 + np.abs(expected)))
        # Of queries, each by a factor of its own where there are logarithms.
        f = phi.phi_q(x, np)
        phi.write_q(x, out)
        expected = f.phi
        if f.log is not None:
            out, expected = (y / y.max(axis=-1, keepdims=True) for y in (out, expected))
        close(out, expected, within=16 * C * eps("float64") * (1 + np.abs(expected)))
