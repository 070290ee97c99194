"""Random features of the Gaussian kernel."""

from __future__ import annotations

from typing import Literal

import numpy as np

from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, read_sigma
from arrattn.feature_maps._random import KINDS, Drawn, read_features, sum_of_differences


def gaussian(
    sigma: float,
    *,
    dim: int,
    num_features: int,
    rng: int | np.random.Generator,
    features: Literal["positive", "hyperbolic", "trigonometric"] = "positive",
    orthogonal: bool = True,
) -> FeatureMap:
    r"""
    Random features of the Gaussian kernel.

    .. math:: \kappa(x, y) = \exp(-|x - y|^2 / 2 \sigma^2)

    Positive features [1]_ weigh every value with a positive weight, so that the output of
    attention stays among the values; their error grows with :math:`|x + y|^2 / \sigma^2`.
    Hyperbolic ones are the same for each projection and its negative.
    Trigonometric features [2]_ have a bounded error, at any distance from the origin, but
    it does not shrink with the kernel: weights can come out negative, and where the kernel
    is small everywhere their sum can be near zero, and the output anything.

    Parameters
    ----------
    sigma : float
        Width of the kernel.
    dim : int
        Width `D` of queries and keys.
    num_features : int
        Number of features `Dphi`; the error falls with its square root. Even for
        hyperbolic and trigonometric features.
    rng : int or numpy.random.Generator
        Where the weights are drawn from, once.
    features : {"positive", "hyperbolic", "trigonometric"}, default: "positive"
        Which features.
    orthogonal : bool, default: True
        Whether projections are orthogonal, `dim` at a time, which takes variance away;
        otherwise they are independent.

    Returns
    -------
    FeatureMap
        The map.

    References
    ----------
    .. [1] Choromanski et al., Rethinking attention with performers, 2020,
       arXiv:2009.14794.
    .. [2] Rahimi & Recht, Random features for large-scale kernel machines, 2007; with
       orthogonal frequencies as in Yu et al., 2016, arXiv:1610.09072.

    Examples
    --------
    >>> from arrattn.feature_maps import gaussian
    >>> gaussian(2.0, dim=16, num_features=64, rng=0)
    gaussian(2.0, features='positive', dim=16, num_features=64, rng=0)
    """
    sigma, kind = read_sigma(sigma), read_features(features, tuple(KINDS))

    def exact(x: Array, y: Array, xp: Namespace) -> Array:
        return xp.exp(sum_of_differences(x, y, lambda d: d * d) * (-0.5 / sigma**2))

    make, paper = KINDS[kind]
    independent = "" if orthogonal else f"orthogonal={orthogonal}, "
    return make(
        f"gaussian({sigma}, features={kind!r}, {independent}",
        Drawn(dim, num_features, rng, orthogonal),
        paper,
        factor=1.0 / sigma,
        c=0.0 if kind == "trigonometric" else 1.0,
        exact=exact,
    )
