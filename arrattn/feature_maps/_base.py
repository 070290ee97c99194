"""What a feature map is, and how its parameters are read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple

import array_api_compat as compat
import numpy as np

from arrattn._core.typing import Array, Namespace


class Features(NamedTuple):
    """
    The features of some tokens, and a logarithm beside them that keeps them in range.

    Parameters
    ----------
    phi : array, shape (..., N, Dphi)
        Features, each token's up to its own factor.
    log : array, shape (..., N), or None
        Logarithms of those factors: the features are ``phi * exp(log[..., None])``.
        None where they are all 1.
    """

    phi: Array
    log: Array | None


class FeatureMap(ABC):
    """
    A function phi whose products ``phi(x) . phi(y)`` stand for a kernel.

    Subclasses give `name`, `non_negative`, `output_dim`, `phi` and `kernel`.
    A map that treats queries and keys differently overrides `phi_q` too.
    """

    #: What the map is called.
    name: str
    #: Whether no weight ``phi(x) . phi(y)`` is ever negative.
    non_negative: bool = False
    #: Whether features depend on the token's position: `phi_q` and `phi_k` then take
    #: ``positions``, integers (..., N), by default ``0, 1, ...``.
    positional: bool = False
    #: Where the map, or its use in attention, was published.
    paper: str = ""

    @abstractmethod
    def output_dim(self, dim: int) -> int:
        """Number of features `Dphi` of a token of width `dim`."""

    @abstractmethod
    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """
        Features of tokens `x` (..., N, D); `weights` are those of `self.weights`.

        Those of a token depend on that token alone, so that nothing looks at the future.
        """

    @abstractmethod
    def kernel(self, x: Array, y: Array) -> Array:
        """Evaluate the exact kernel, (..., n, D) and (..., m, D) -> (..., n, m)."""

    def phi_q(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features of queries."""
        return self.phi(x, xp, weights)

    def phi_k(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features of keys."""
        return self.phi(x, xp, weights)

    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        """
        Write the features of NumPy queries `x` (N, D) on `out` (N, Dphi): less work than `phi_q`.

        Where that gives logarithms, each token's features are right up to a factor of its own,
        and may overflow.
        """
        out[...] = self.phi_q(x, np, weights).phi

    def write_k(self, x: Array, out: Array, weights: Array | None = None) -> None:
        """
        Write the features of NumPy keys `x` (N, D) on `out` (N, Dphi): less work than `phi_k`.

        Logarithms are multiplied in, and features may overflow.
        """
        f = self.phi_k(x, np, weights)
        out[...] = f.phi if f.log is None else f.phi * np.exp(f.log)[..., None]

    def weights(self, like: Array, xp: Namespace) -> Array | None:
        """Give what was drawn, in the library, dtype and device of `like`; None if nothing."""
        del like, xp
        return None

    def problems(self, dim: int) -> list[str]:
        """Tell what does not fit queries and keys of width `dim`."""
        del dim
        return []

    def __repr__(self) -> str:
        return self.name


class Custom(FeatureMap):
    """
    A function of the user's own, the same for queries and keys.

    Parameters
    ----------
    function : callable
        ``function(x (..., N, D)) -> (..., N, Dphi)``, in the arrays' own library.
    """

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.function = function

    def output_dim(self, dim: int) -> int:
        """Ask the function, with a token of zeros."""
        return int(self.function(np.zeros((1, dim))).shape[-1])

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Call the function; see `FeatureMap.phi`."""
        del xp, weights
        features = self.function(x)
        if not hasattr(features, "shape"):
            msg = (
                f"feature_map: expected {self.name} to return an array, "
                f"got {features!r} ({type(features).__name__})"
            )
            raise TypeError(msg)
        if tuple(features.shape[:-1]) != tuple(x.shape[:-1]):
            msg = (
                f"feature_map: expected {self.name} to map (..., N, D) to (..., N, Dphi), "
                f"got {tuple(features.shape)} from {tuple(x.shape)}"
            )
            raise ValueError(msg)
        return Features(features, None)

    def kernel(self, x: Array, y: Array) -> Array:
        """Multiply the features; see `FeatureMap.kernel`."""
        return self.function(x) @ compat.array_namespace(x, y).matrix_transpose(self.function(y))


def read_rng(rng: object) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, bool) or not isinstance(rng, Integral):
        msg = (
            f"rng: expected an int or a numpy.random.Generator, got {rng!r} ({type(rng).__name__})"
        )
        raise TypeError(msg)
    if rng < 0:
        msg = f"rng: expected a seed of at least 0, got {rng}"
        raise ValueError(msg)
    return np.random.default_rng(int(rng))


def read_sigma(sigma: object) -> float:
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        msg = f"sigma: expected a real number, got {sigma!r} ({type(sigma).__name__})"
        raise TypeError(msg)
    if not (math.isfinite(sigma) and float(sigma) > 0):
        msg = f"sigma: expected a positive, finite number, got {sigma}"
        raise ValueError(msg)
    return float(sigma)


def require_int(name: str, x: object, least: int = 1) -> None:
    if isinstance(x, bool) or not isinstance(x, Integral):
        msg = f"{name}: expected an int, got {x!r} ({type(x).__name__})"
        raise TypeError(msg)
    if x < least:
        msg = f"{name}: expected at least {least}, got {x}"
        raise ValueError(msg)
