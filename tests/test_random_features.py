"""How far random features are off: the closed forms, and how the error falls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from sums import ALL_RANDOM, make_map
from test_feature_maps import by_features

from arrattn import linear_attention
from arrattn.feature_maps import FeatureMap, gaussian, laplacian, softmax

D, M, SEEDS = 4, 8, 2000

#: Standard errors that one run in a hundred thousand leaves on either side.
SIGMAS = 4.5

Make = Callable[..., FeatureMap]


def pairs(size: float, dim: int = D) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Some points: near each other, opposite, orthogonal, and just anywhere."""
    rng = np.random.default_rng(1)
    x = size * rng.normal(size=(4, dim))
    return x, np.stack([x[0] + 0.1 * size, -0.8 * x[1], x[2] - 0.5 * x[3], x[3, ::-1]])


def squared_errors(make: Make, x: Any, y: Any, seeds: int = SEEDS) -> np.ndarray[Any, Any]:
    """Of the kernel at each pair ``x_i, y_i``, seed by seed: (seeds, n)."""
    maps = [make(rng=s) for s in range(seeds)]
    off = [np.diagonal(by_features(phi, x, y) - phi.kernel(x, y)) for phi in maps]
    return np.square(off)


def mean_and_error(samples: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    """The mean over the seeds, and its standard error."""
    return samples.mean(axis=0), samples.std(axis=0, ddof=1) / np.sqrt(len(samples))


def softmax_mse(features: str, x: Any, y: Any, projections: int) -> Any:
    """Lemma 2 of Choromanski et al., 2020, for ``exp(x . y)``."""
    near, far = (np.exp(-np.square(x + sign * y).sum(-1)) for sign in (1, -1))
    sm = np.exp((x * y).sum(-1))
    of_one = {
        "trigonometric": 0.5 / near / sm**2 * (1 - far) ** 2,
        "positive": sm**2 / near * (1 - near),
        "hyperbolic": 0.5 * sm**2 / near * (1 - near) ** 2,
    }
    return of_one[features] / projections


def gaussian_mse(features: str, x: Any, y: Any, projections: int) -> Any:
    """The same features times ``exp(-(|x|^2 + |y|^2) / 2)``."""
    lengths = np.square(x).sum(-1) + np.square(y).sum(-1)
    return np.exp(-lengths) * softmax_mse(features, x, y, projections)


def cauchy_mse(x: Any, y: Any, projections: int) -> Any:
    """The variance of ``cos(w . (x - y))``."""
    kernel = np.exp(-np.abs(x - y).sum(-1))
    return ((1 + kernel**2) / 2 - kernel**2) / projections


def binning_mse(x: Any, y: Any, grids: int, bins: int) -> Any:
    """The variance of whether two tokens share a bin."""
    kernel = np.exp(-np.abs(x - y).sum(-1))
    kernel = kernel + (1 - kernel) / bins
    return kernel * (1 - kernel) / grids


KINDS = ("positive", "hyperbolic", "trigonometric")
DRAWN = {"dim": D, "num_features": M}


def count(features: str) -> int:
    return M if features == "positive" else M // 2


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize("make", [softmax, gaussian])
def test_independent_projections_are_off_by_the_closed_form(make: Any, features: str) -> None:
    x, y = pairs(0.3)
    if make is softmax:
        make, mse = partial(softmax, scale=1.0), softmax_mse
    else:
        make, mse = partial(gaussian, 1.0), gaussian_mse
    make = partial(make, **DRAWN, features=features, orthogonal=False)
    mean, error = mean_and_error(squared_errors(make, x, y))
    assert np.all(np.abs(mean - mse(features, x, y, count(features))) <= SIGMAS * error)


def test_cauchy_frequencies_are_off_by_the_closed_form() -> None:
    x, y = pairs(0.3)
    mean, error = mean_and_error(squared_errors(partial(laplacian, 1.0, **DRAWN), x, y))
    assert np.all(np.abs(mean - cauchy_mse(x, y, M // 2)) <= SIGMAS * error)


@pytest.mark.parametrize("bins", [2, 4, 256])
def test_random_binning_is_off_by_the_closed_form(bins: int) -> None:
    x, y = pairs(0.3)
    n = max(M, bins)
    make = partial(laplacian, 1.0, dim=D, num_features=n, features="binning", bins=bins)
    mean, error = mean_and_error(squared_errors(make, x, y))
    assert np.all(np.abs(mean - binning_mse(x, y, n // bins, bins)) <= SIGMAS * error)


@pytest.mark.parametrize("features", KINDS)
def test_orthogonal_projections_are_closer(features: str) -> None:
    dim = 16  # and as many projections: one block, of which more directions exclude each other
    drawn = {"dim": dim, "num_features": dim if features == "positive" else 2 * dim}
    x, y = pairs(0.12, dim)
    make = partial(softmax, scale=1.0, **drawn, features=features)
    samples = squared_errors(make, x, y, seeds=2 * SEEDS) / softmax_mse(features, x, y, dim)
    mean, error = mean_and_error(samples.mean(axis=1))
    assert mean + SIGMAS * error < 1


@pytest.mark.parametrize("name", ALL_RANDOM)
def test_the_mean_square_error_is_inverse_to_the_number_of_features(name: str) -> None:
    x, y = pairs(0.5)

    def times_features(m: int) -> tuple[Any, Any]:
        samples = m * squared_errors(partial(make_map, name, D, m), x, y, seeds=300)
        return mean_and_error(samples)

    # Orthogonal blocks, and grids, are independent of each other: twice as many, half the error.
    (few, few_error), (many, many_error) = times_features(16), times_features(128)
    assert np.all(np.abs(few - many) <= SIGMAS * np.hypot(few_error, many_error))


@pytest.mark.parametrize("name", ["softmax", "softmax hyperbolic", "gaussian", "laplacian"])
def test_attention_tends_to_that_of_the_kernel(name: str) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (
        0.5 * rng.normal(size=(30, D)),
        0.5 * rng.normal(size=(40, D)),
        rng.normal(size=(40, 3)),
    )
    weights = make_map(name, D).kernel(q, k)
    expected = weights @ v / weights.sum(-1, keepdims=True)

    def mean_square(m: int) -> tuple[float, float]:
        maps = (make_map(name, D, num_features=m, rng=s) for s in range(40))
        outs = np.stack([linear_attention(q, k, v, feature_map=phi) for phi in maps])
        mean, error = mean_and_error(np.square(outs - expected).mean(axis=(1, 2)))
        return float(mean), float(error)

    (few, few_error), (many, many_error) = mean_square(256), mean_square(4096)
    # A logarithm is off by the relative error of what it is taken of.
    slope = np.log(many / few) / np.log(4096 / 256)
    error = np.hypot(few_error / few, many_error / many) / np.log(4096 / 256)
    assert abs(slope + 1) <= SIGMAS * error
