"""Feature maps: what they stand for, how far off they are, and what they refuse."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace
from lanes import Lane, close
from strategies import Case
from sums import ALL_MAPS, ALL_RANDOM, BY_LANDMARKS, exponent, make_map
from tolerance import C, eps, largest

from arrattn import feature_maps
from arrattn.feature_maps import FeatureMap
from arrattn.feature_maps._read import read_map

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
    "exp": lambda x, y: np.exp(x + y).sum(),
    "softmax_features": lambda x, y: share(x) @ share(y),
    "taylor2": lambda x, y: 1 + np.dot(x, y) + np.dot(x, y) ** 2 / 2,
    "squared": lambda x, y: np.dot(x, y) ** 2,
    "nystrom": lambda x, y: 1 + np.dot(x, y) + np.dot(x, y) ** 2 / 2,
    "hedgehog": lambda x, y: hedged(x, 0) @ hedged(y, 1),
    "binning": lambda x, y: 0.25 + 0.75 * np.exp(-np.abs(x - y).sum() / 8.0),
}


def formula(name: str, x: Any, y: Any) -> Any:
    """Which formula a map is to meet; kinds of random features of one kernel share theirs."""
    return FORMULAS[name if name in FORMULAS else name.partition(" ")[0]](x, y)


def share(x: Any) -> Any:
    return np.exp(x) / np.exp(x).sum()


def hedged(x: Any, which: int) -> Any:
    w = np.random.default_rng(3).normal(size=(2, D, 4))[which]
    return share(np.concatenate([w.T @ x, -(w.T @ x)]))


@pytest.mark.parametrize("name", ALL_MAPS)
def test_the_kernel_is_the_formula(lane: Lane, name: str) -> None:
    x, y = points()
    expected = np.asarray([[formula(name, a, b) for b in y] for a in x])
    phi = read_map(make_map(name, D))
    got = lane.call(phi.kernel, x, y, dtype="float64")
    lane.check(got, expected, dtype="float64", within=C * D * eps("float64") * largest(expected))


@pytest.mark.parametrize("name", [n for n in ALL_MAPS if n != "square"])
def test_every_map_cites_a_paper_and_is_called_as_it_is_made(name: str) -> None:
    phi = read_map(make_map(name, D))
    assert re.search(r", (19|20)\d\d\b", phi.paper)
    assert hasattr(feature_maps, phi.name)
    assert repr(phi).startswith(phi.name)


def test_the_map_of_distances_is_called_as_it_is_made() -> None:
    phi = feature_maps.cosformer(9, start=2)
    assert phi.name == "cosformer"
    assert repr(phi) == "cosformer(9, start=2)"
    assert repr(feature_maps.cosformer(9)) == "cosformer(9)"


def test_weights_of_large_numbers_are_those_of_their_differences(lane: Lane) -> None:
    x, phi = (
        np.array([[400.0, 401.0, 399.0], [-800.0, -800.0, -900.0]]),
        feature_maps.softmax_features,
    )
    got = lane.to_numpy(lane.call(lambda x: phi.phi(x, array_namespace(x)).phi, x, dtype="float64"))
    p = np.exp([[-1.0, 0.0, -2.0], [0.0, 0.0, -100.0]])
    close(got, p / p.sum(-1, keepdims=True), within=C * eps("float64"))


@pytest.mark.parametrize("name", [n for n in ALL_MAPS if n not in (*ALL_RANDOM, *BY_LANDMARKS)])
def test_finite_features_are_the_kernel(name: str) -> None:
    x, y = points()
    phi = read_map(make_map(name, D))
    expected = phi.kernel(x, y)
    close(by_features(phi, x, y), expected, within=C * D * eps("float64") * largest(expected))
    assert phi.phi_k(y, np).phi.shape[-1] == phi.output_dim(D)


@pytest.mark.parametrize("name", [*ALL_RANDOM, "negative scale"])
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


@pytest.mark.parametrize("name", ALL_RANDOM)
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


@pytest.mark.parametrize("name", [n for n in ALL_MAPS if n not in BY_LANDMARKS])
def test_signs_are_as_declared(name: str) -> None:
    x, y = (3 * p for p in points(50))
    phi = read_map(make_map(name, D))
    # Weights without a sign show one among so many pairs.
    assert phi.non_negative == bool(np.all(by_features(phi, x, y) >= 0)) or name == "square"


@pytest.mark.parametrize("name", ["elu_plus_one", "relu", "squared"])
def test_numbers_that_are_none_are_not_swallowed(lane: Lane, name: str) -> None:
    x = lane.asarray(np.asarray([[np.nan, 1.0, np.inf]]), "float32")
    got = lane.to_numpy(read_map(make_map(name, 3)).phi(x, lane.namespace).phi)
    assert np.isnan(got[0, 0])
    assert got[0, -1] == np.inf


def test_landmarks_that_span_the_features_leave_no_error() -> None:
    # Of ``1 + D + D (D + 1) / 2`` dimensions, 20 points in general position leave none out.
    x, y = points()
    phi = make_map("nystrom", D)
    assert phi.output_dim(D) == feature_maps.taylor2.output_dim(D) == 15
    case = Case(x, y, y[:, :1], {"feature_map": phi})
    lengths = np.sqrt([np.diagonal(phi.kernel(z, z)).max() for z in (x, y)])
    within = C * eps("float64") * (1 + exponent(phi, case)) * np.prod(lengths)
    close(by_features(phi, x, y), phi.kernel(x, y), within=within)


def test_landmarks_that_repeat_each_other_count_once() -> None:
    some = points()[0]
    phi = feature_maps.nystrom(feature_maps.taylor2, np.concatenate([some, some]))
    assert phi.output_dim(D) == len(some)


def test_landmarks_are_closer_than_as_many_random_features() -> None:
    rng = np.random.default_rng(2)
    x, y, landmarks = (rng.normal(size=(n, D)) for n in (40, 50, 64))
    make = functools.partial(feature_maps.gaussian, 2.0, dim=D, num_features=64)
    exact = make(rng=0).kernel(x, y)
    random = [by_features(make(rng=s, features="hyperbolic"), x, y) - exact for s in range(30)]
    phi = feature_maps.nystrom(make(rng=0), landmarks)
    assert np.linalg.norm(by_features(phi, x, y) - exact) < min(map(np.linalg.norm, random))


def test_maps_print_as_they_are_written() -> None:
    for name in ALL_RANDOM:
        phi = make_map(name, D)
        scope = {phi.name: getattr(feature_maps, phi.name)}
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
        (lambda d: feature_maps.softmax(features="sin", **d), ValueError, "'hyperbolic' or "),
        (
            lambda d: feature_maps.softmax(features="hyperbolic", **d | {"num_features": 3}),
            ValueError,
            "even",
        ),
        (lambda d: feature_maps.softmax(orthogonal=1, **d), TypeError, "orthogonal: expected True"),
        (lambda d: feature_maps.laplacian(1.0, features="sin", **d), ValueError, "or 'binning'"),
        (
            lambda d: feature_maps.laplacian(1.0, features="binning", bins=3, **d),
            ValueError,
            "bins: expected a power of two",
        ),
        (
            lambda d: feature_maps.laplacian(1.0, features="binning", bins=512, **d),
            ValueError,
            "bins: expected a power of two from 2 to 256, got 512",
        ),
        (
            lambda d: feature_maps.laplacian(1.0, features="binning", bins=2.0, **d),
            TypeError,
            "bins: expected an int",
        ),
        (
            lambda d: feature_maps.laplacian(1.0, features="binning", bins=8, **d),
            ValueError,
            "num_features: expected a multiple of bins=8, got 4",
        ),
        (lambda d: feature_maps.laplacian(-1.0, **d), ValueError, "sigma: expected a positive"),
        (lambda d: feature_maps.gaussian(True, **d), TypeError, "sigma: expected a real number"),
        (lambda d: feature_maps.nystrom(np.ones, np.ones((2, D))), TypeError, "of: expected a"),
        (
            lambda d: feature_maps.nystrom(feature_maps.cosformer(3), np.ones((2, D))),
            TypeError,
            "without positions",
        ),
        (
            lambda d: feature_maps.nystrom(feature_maps.taylor2, [[1.0]]),
            TypeError,
            "landmarks: expected a NumPy array",
        ),
        (
            lambda d: feature_maps.nystrom(feature_maps.taylor2, np.ones(D)),
            ValueError,
            r"landmarks: expected shape \(m, D\)",
        ),
        (
            lambda d: feature_maps.nystrom(feature_maps.taylor2, np.full((2, D), np.nan)),
            ValueError,
            "landmarks: expected finite",
        ),
        (
            lambda d: feature_maps.nystrom(feature_maps.softmax(**d), np.ones((2, D + 1))),
            ValueError,
            "of: expected dim=5",
        ),
        (lambda d: feature_maps.cosformer(0), ValueError, "length: expected at least 1, got 0"),
        (lambda d: feature_maps.cosformer(4.0), TypeError, "length: expected an int"),
        (lambda d: feature_maps.cosformer(4, start=-1), ValueError, "start: expected at least 0"),
        (lambda d: feature_maps.hedgehog([[1.0]]), TypeError, "weights: expected an array"),
        (lambda d: feature_maps.hedgehog(np.ones(3)), ValueError, "weights: expected shape"),
        (
            lambda d: feature_maps.hedgehog(np.ones((3, 2)), np.ones((3, 1))),
            ValueError,
            "weights_k: expected the shape of weights",
        ),
    ],
)
def test_bad_input_is_named(make: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        make({"dim": D, "num_features": 4, "rng": 0})
