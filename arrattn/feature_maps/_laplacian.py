"""Random features of the Laplacian kernel."""

from __future__ import annotations

from typing import Any, Literal

import array_api_compat as compat
import numpy as np

from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, Features, read_sigma, require_int
from arrattn.feature_maps._random import (
    Drawn,
    Random,
    Trigonometric,
    read_features,
    sum_of_differences,
)

PAPER = "Rahimi & Recht, Random features for large-scale kernel machines, 2007"


class _Cauchy(Trigonometric):
    """Frequencies whose characteristic function is the Laplacian kernel."""

    def draw(self, rng: np.random.Generator, drawn: Drawn) -> np.ndarray[Any, Any]:
        del drawn
        return rng.standard_cauchy((self.num_features // 2, self.dim))


#: Cells are told apart up to so many along an axis.
CELLS = 256


class _Binning(Random):
    """
    Which of `bins` a token falls into, for each of several random grids, one-hot.

    A cell of a grid has a whole number for each axis. These are put into bins by
    multiplication and a shift (Dietzfelbinger, 1996): any two cells share a bin with
    probability ``1 / bins``, a power of two.
    """

    non_negative = True

    def __init__(self, call: str, drawn: Drawn, *, sigma: float, bins: int) -> None:
        self._sigma, self._bins, self._modulus = sigma, bins, CELLS * bins // 2
        super().__init__(call, drawn, PAPER)

    def draw(self, rng: np.random.Generator, drawn: Drawn) -> np.ndarray[Any, Any]:
        """The grids' inverse pitches and shifts, and their bins' factors and summands."""
        del drawn
        shape = (self.num_features // self._bins, self.dim)
        pitch, shift = rng.gamma(2.0, self._sigma, shape), rng.random(shape)
        factor, summand = (rng.integers(0, self._modulus, shape) for _ in range(2))
        return np.stack([1.0 / pitch, shift, factor, summand])

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        w = self.weights(x, xp) if weights is None else weights  # (4, D, grids)
        cell = _modulo(xp.floor(x[..., :, None] * w[0, :, :] + w[1, :, :]), CELLS, xp)
        # Whole numbers below 2 ** 24, exact in single precision.
        terms = _modulo(cell * w[2, :, :] + w[3, :, :], self._modulus, xp)
        total = _modulo(xp.sum(terms, axis=-2), self._modulus, xp)[..., None]
        at = xp.floor(total / (CELLS // 2))  # (..., N, grids, 1)
        bins = xp.arange(self._bins, dtype=x.dtype, device=device_of(x))
        # A NaN is in no bin, and stays one.
        hot = xp.astype(at == bins, x.dtype) + 0.0 * at
        hot = hot * (self.num_features // self._bins) ** -0.5
        return Features(xp.reshape(hot, (*x.shape[:-1], self.num_features)), None)

    def kernel(self, x: Array, y: Array) -> Array:
        exact = _exact(x, y, compat.array_namespace(x, y), self._sigma)
        return exact + (1.0 - exact) / self._bins


def _modulo(x: Array, m: int, xp: Namespace) -> Array:
    return x - m * xp.floor(x / m)


def _exact(x: Array, y: Array, xp: Namespace, sigma: float) -> Array:
    return xp.exp(sum_of_differences(x, y, xp.abs) * (-1.0 / sigma))


def laplacian(
    sigma: float,
    *,
    dim: int,
    num_features: int,
    rng: int | np.random.Generator,
    features: Literal["trigonometric", "binning"] = "trigonometric",
    bins: int = 16,
) -> FeatureMap:
    r"""
    Random features of the Laplacian kernel [1]_.

    .. math:: \kappa(x, y) = \exp(-|x - y|_1 / \sigma)

    Trigonometric features have Cauchy frequencies. Weights can come out negative; see
    `gaussian` on what that means where the kernel is small.

    Random binning lays grids over the tokens, with pitches and shifts of their own on each
    axis: two tokens share a cell with probability :math:`\kappa`. Cells are put into `bins`
    at random [2]_, so the kernel that is met in the mean is
    :math:`\kappa + (1 - \kappa) / \mathrm{bins}`, a `bins`-th above at most. No weight is
    negative, whatever the distance, but for as many features the error is larger, and
    features are constant within a cell: their gradients are 0.

    Parameters
    ----------
    sigma : float
        Width of the kernel.
    dim : int
        Width `D` of queries and keys.
    num_features : int
        Number of features `Dphi`; the error falls with its square root. Even, or a multiple
        of `bins`: one for each bin of each grid.
    rng : int or numpy.random.Generator
        Where the weights are drawn from, once.
    features : {"trigonometric", "binning"}, default: "trigonometric"
        Which features.
    bins : int, default: 16
        Number of bins, a power of two up to 256; for binning alone.

    Returns
    -------
    FeatureMap
        The map.

    References
    ----------
    .. [1] Rahimi & Recht, Random features for large-scale kernel machines, 2007.
    .. [2] Dietzfelbinger, Universal hashing and k-wise independent random variables via
       integer arithmetic without primes, 1996.

    Examples
    --------
    >>> from arrattn.feature_maps import laplacian
    >>> laplacian(4.0, dim=16, num_features=64, rng=0)
    laplacian(4.0, features='trigonometric', dim=16, num_features=64, rng=0)
    """
    sigma, kind = read_sigma(sigma), read_features(features, ("trigonometric", "binning"))
    drawn = Drawn(dim, num_features, rng)
    call = f"laplacian({sigma}, features={kind!r}, "
    if kind == "trigonometric":

        def exact(x: Array, y: Array, xp: Namespace) -> Array:
            return _exact(x, y, xp, sigma)

        return _Cauchy(call, drawn, PAPER, factor=1.0 / sigma, c=0.0, exact=exact)
    require_int("bins", bins)
    require_int("num_features", num_features)
    if bins & (bins - 1) or not 2 <= bins <= CELLS:
        msg = f"bins: expected a power of two from 2 to {CELLS}, got {bins}"
        raise ValueError(msg)
    if num_features % bins:
        msg = f"num_features: expected a multiple of bins={bins}, got {num_features}"
        raise ValueError(msg)
    return _Binning(f"{call}bins={bins}, ", drawn, sigma=sigma, bins=int(bins))
