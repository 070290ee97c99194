"""Feature maps: what they stand for, how far off they are, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from lanes import Lane, close
from sums import MAPS, RANDOM, make_map
from tolerance import C, eps, largest

from arrattn import feature_maps, linear_attention, reference
from arrattn.feature_maps import FeatureMap, read_map

D = 4


def points(n: int = 6, dim: int = D, seed: int = 0) -> tuple[np.ndarray[Any, Any], ...]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dim)), rng.normal(size=(n + 1, dim))


def by_features(phi: FeatureMap, x: Any, y: Any) -> np.ndarray[Any, Any]:
    """The kernel as a map's features have it."""
    a, b = phi.phi_q(x, np), phi.phi_k(y, np)
    products = a.phi @ b.phi.T
    if a.log is None or b.log is None:
        return np.asarray(products)
    return np.asarray(products * np.exp(a.log[:, None] + b.log[None, :]))


def elu(x: float) -> float:
    return x + 1 if x > 0 else float(np.exp(x))


# The defining formulas, for one pair, written apart from the package.
FORMULAS = {
    "elu_plus_one": lambda x, y: sum(elu(a) * elu(b) for a, b in zip(x, y, strict=True)),
    "relu": lambda x, y: sum(max(a, 0) * max(b, 0) for a, b in zip(x, y, strict=True)),
    "identity": lambda x, y: sum(a * b for a, b in zip(x, y, strict=True)),
    "square": lambda x, y: sum((a * a + 1) * (b * b + 1) for a, b in zip(x, y, strict=True)),
    "softmax": lambda x, y: np.exp(np.dot(x, y) / np.sqrt(len(x))),
    "gaussian": lambda x, y: np.exp(-np.dot(x - y, x - y) / 18.0),
    "trigonometric": lambda x, y: np.exp(-np.dot(x - y, x - y) / 18.0),
    "laplacian": lambda x, y: np.exp(-np.abs(x - y).sum() / 8.0),
}


@pytest.mark.parametrize("name", MAPS)
def test_the_kernel_is_the_formula(lane: Lane, name: str) -> None:
    x, y = points()
    expected = np.asarray([[FORMULAS[name](a, b) for b in y] for a in x])
    phi = read_map(make_map(name, D))
    got = lane.call(phi.kernel, x, y, dtype="float64")
    lane.check(got, expected, dtype="float64", within=C * D * eps("float64") * largest(expected))


@pytest.mark.parametrize("name", [n for n in MAPS if n not in RANDOM])
def test_finite_features_are_the_kernel(name: str) -> None:
    x, y = points()
    phi = read_map(make_map(name, D))
    expected = phi.kernel(x, y)
    close(by_features(phi, x, y), expected, within=C * D * eps("float64") * largest(expected))
    assert phi.phi_k(y, np).phi.shape[-1] == phi.output_dim(D)


@pytest.mark.parametrize("name", [*RANDOM, "negative scale"])
def test_random_features_are_unbiased(name: str) -> None:
    x, y = (0.5 * p for p in points(3))
    seeds = range(600)
    if name == "negative scale":
        maps = [feature_maps.softmax(dim=D, num_features=8, rng=s, scale=-0.7) for s in seeds]
        expected = np.exp(-0.7 * x @ y.T)
    else:
        maps = [make_map(name, D, num_features=8, rng=s) for s in seeds]
        expected = maps[0].kernel(x, y)
    samples = np.stack([by_features(phi, x, y) for phi in maps])
    close(maps[0].kernel(x, y), expected, within=1e3 * eps("float64"))
    standard_error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    # Twelve pairs: beyond four and a half standard errors lies one run in ten thousand.
    assert np.all(np.abs(samples.mean(axis=0) - expected) <= 4.5 * standard_error)


@pytest.mark.parametrize("name", RANDOM)
def test_the_error_falls_with_the_square_root_of_the_features(name: str) -> None:
    x, y = (0.5 * p for p in points(8))

    def error(m: int) -> float:
        maps = [make_map(name, D, num_features=m, rng=s) for s in range(60)]
        off = [by_features(phi, x, y) - phi.kernel(x, y) for phi in maps]
        return float(np.sqrt(np.mean(np.square(off))))

    slope = np.log(error(1024) / error(64)) / np.log(1024 / 64)
    assert -0.6 < slope < -0.4


@pytest.mark.parametrize(
    ("name", "most"), [("softmax", 0.1), ("gaussian", 0.1), ("laplacian", 0.1)]
)
def test_attention_comes_close_to_that_of_the_kernel(name: str, most: float) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (
        0.5 * rng.normal(size=(40, D)),
        0.5 * rng.normal(size=(50, D)),
        rng.normal(size=(50, 3)),
    )
    weights = make_map(name, D).kernel(q, k)
    expected = weights @ v / weights.sum(-1, keepdims=True)
    if name == "softmax":
        np.testing.assert_allclose(reference.softmax_attention(q, k, v), expected, rtol=1e-12)

    def error(m: int) -> float:
        outs = [
            linear_attention(q, k, v, feature_map=make_map(name, D, num_features=m, rng=s))
            for s in range(10)
        ]
        return float(np.sqrt(np.mean([np.square(o - expected) for o in outs])) / np.std(expected))

    assert error(4096) < most
    assert error(4096) < error(256) / 2  # 1/4 is expected


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_seed_gives_the_same_weights_everywhere(lane: Lane, name: str, dtype: str) -> None:
    like = lane.asarray(np.zeros((2, D)), dtype)
    got = make_map(name, D).weights(like, lane.namespace)
    expected = make_map(name, D).weights(np.zeros((2, D), dtype), np)
    lane.check(got, expected.astype(np.float64), dtype=dtype, within=0.0)


def test_drawing_leaves_no_trace_and_generators_go_on() -> None:
    before = np.random.get_state()[1].copy()  # noqa: NPY002 (what must not change)
    a, b = (make_map("softmax", D, rng=3).weights(np.zeros(1), np) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    rng = np.random.default_rng(3)
    first, second = (make_map("softmax", D, rng=rng).weights(np.zeros(1), np) for _ in range(2))
    np.testing.assert_array_equal(first, a)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_projections_are_orthogonal_and_of_normal_length() -> None:
    w = feature_maps.softmax(dim=16, num_features=4096, rng=0).weights(np.zeros(1), np).T
    block = w[:16] @ w[:16].T
    close(block - np.diag(np.diagonal(block)), np.zeros((16, 16)), within=1e3 * eps("float64"))
    # Squared lengths have mean 16 and variance 32.
    assert abs(np.square(w).sum(-1).mean() - 16) < 4.5 * np.sqrt(32 / 4096)


@pytest.mark.parametrize("name", MAPS)
def test_signs_are_as_declared(name: str) -> None:
    x, _ = points(50)
    phi = read_map(make_map(name, D))
    if phi.non_negative:
        assert np.all(phi.phi_q(x, np).phi >= 0)


@pytest.mark.parametrize("name", ["elu_plus_one", "relu"])
def test_numbers_that_are_none_are_not_swallowed(lane: Lane, name: str) -> None:
    x = lane.asarray(np.asarray([[np.nan, 1.0, np.inf]]), "float32")
    got = lane.to_numpy(read_map(make_map(name, 3)).phi(x, lane.namespace).phi)
    assert np.isnan(got[0, 0])
    assert got[0, 2] == np.inf


def test_maps_print_as_they_are_written() -> None:
    for name in ("softmax", "gaussian", "laplacian"):
        phi = make_map(name, D)
        scope = {name: getattr(feature_maps, name)}
        again = eval(repr(phi), scope)
        np.testing.assert_array_equal(again._drawn, phi._drawn)
        assert repr(again) == repr(phi)
    assert repr(feature_maps.elu_plus_one) == "elu_plus_one"
    assert "arXiv" in (feature_maps.relu.__doc__ or "")


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda d: feature_maps.gaussian(0.0, **d), ValueError, "sigma: expected a positive"),
        (lambda d: feature_maps.gaussian(np.inf, **d), ValueError, "sigma: expected a positive"),
        (lambda d: feature_maps.laplacian("1", **d), TypeError, "sigma: expected a real number"),
        (lambda d: feature_maps.gaussian(1.0, features="sin", **d), ValueError, "features: "),
        (lambda d: feature_maps.laplacian(1.0, **d | {"num_features": 3}), ValueError, "even"),
        (lambda d: feature_maps.softmax(**d | {"num_features": 0}), ValueError, "num_features: "),
        (lambda d: feature_maps.softmax(**d | {"num_features": 2.0}), TypeError, "num_features: "),
        (lambda d: feature_maps.softmax(**d | {"dim": 0}), ValueError, "dim: expected at least 1"),
        (lambda d: feature_maps.softmax(scale=np.nan, **d), ValueError, "scale: expected a finite"),
        (lambda d: feature_maps.softmax(scale=None, **d | {"rng": "0"}), TypeError, "rng: "),
        (lambda d: feature_maps.softmax(**d | {"rng": np.random}), TypeError, "rng: "),
        (lambda d: feature_maps.softmax(**d | {"rng": -1}), ValueError, "rng: expected a seed"),
        (lambda d: feature_maps.softmax(**d | {"rng": True}), TypeError, "rng: "),
    ],
)
def test_bad_input_is_named(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make({"dim": D, "num_features": 4, "rng": 0})
