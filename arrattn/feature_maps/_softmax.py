"""Random features of the softmax kernel."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

import numpy as np

from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, require_int
from arrattn.feature_maps._random import KINDS, Drawn, read_features


def softmax(
    *,
    dim: int,
    num_features: int,
    rng: int | np.random.Generator,
    scale: float | None = None,
    features: Literal["positive", "hyperbolic", "trigonometric"] = "positive",
    orthogonal: bool = True,
) -> FeatureMap:
    r"""
    Random features of the softmax kernel [1]_.

    .. math:: \kappa(x, y) = \exp(\mathrm{scale}\; x \cdot y)

    With :math:`x' = \sqrt{\mathrm{scale}}\; x` and normal :math:`w_r`, positive features
    (FAVOR+) are :math:`e^{w_r \cdot x' - |x'|^2 / 2} / \sqrt{m}`. Their error grows with
    :math:`|x' + y'|^2`: with keys and queries of ordinary size, not with peaked attention.
    Hyperbolic ones take :math:`w_r` and :math:`-w_r`: for as many features, an error that is
    smaller where :math:`x'` and :math:`y'` are nearly opposite or small.
    Trigonometric ones, :math:`e^{|x'|^2 / 2} (\cos w_r \cdot x', \sin w_r \cdot x')`, are
    good where the weight is large and hopeless where it is small; weights can come out
    negative, and the output anything.

    Parameters
    ----------
    dim : int
        Width `D` of queries and keys.
    num_features : int
        Number of features `Dphi`; the error falls with its square root. Even for
        hyperbolic and trigonometric features.
    rng : int or numpy.random.Generator
        Where the weights are drawn from, once.
    scale : float, optional
        Factor of the products; may be negative. Default: ``dim ** -0.5``.
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

    Examples
    --------
    >>> from arrattn.feature_maps import softmax
    >>> softmax(dim=16, num_features=64, rng=0)
    softmax(scale=0.25, features='positive', dim=16, num_features=64, rng=0)
    """
    require_int("dim", dim)
    scale = dim**-0.5 if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, Real):
        msg = f"scale: expected a real number, got {scale!r} ({type(scale).__name__})"
        raise TypeError(msg)
    if not math.isfinite(scale):
        msg = f"scale: expected a finite number, got {scale}"
        raise ValueError(msg)
    size, kind = float(scale), read_features(features, tuple(KINDS))

    def exact(x: Array, y: Array, xp: Namespace) -> Array:
        return xp.exp(size * (x @ xp.matrix_transpose(y)))

    make, paper = KINDS[kind]
    independent = "" if orthogonal else f"orthogonal={orthogonal}, "
    return make(
        f"softmax(scale={size}, features={kind!r}, {independent}",
        Drawn(dim, num_features, rng, orthogonal),
        paper,
        factor=abs(size) ** 0.5,
        c=-0.5 if kind == "trigonometric" else 0.5,
        sign=math.copysign(1.0, size),
        exact=exact,
    )
