"""Polynomials of ``x . y``: finitely many features, with no error."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np

from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, Features


@lru_cache(maxsize=16)
def _pairs(dim: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Indices of the pairs ``i <= j``, and the root of how often each is in ``(x . y)^2``."""
    i, j = np.triu_indices(dim)
    return i, j, np.where(i == j, 1.0, math.sqrt(2.0))


class _Squared(FeatureMap):
    r""":math:`\phi(x) = (x_i x_j)_{i \le j}`, times the root of 2 where ``i < j``."""

    name, non_negative = "squared", True
    paper = "Kacham et al., PolySketchFormer, 2023, arXiv:2310.01655"

    def output_dim(self, dim: int) -> int:
        return dim * (dim + 1) // 2

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        del weights
        return Features(self._products(x, xp, 1.0), None)

    def _products(self, x: Array, xp: Namespace, factor: float) -> Array:
        i, j, often = _pairs(x.shape[-1])
        on = device_of(x)
        left, right = (xp.take(x, xp.asarray(n, device=on), axis=x.ndim - 1) for n in (i, j))
        return left * right * xp.asarray(factor * often, dtype=x.dtype, device=on)

    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        del weights
        self._write(x, out, 1.0)

    def write_k(self, x: Array, out: Array, weights: Array | None = None) -> None:
        self.write_q(x, out, weights)

    def _write(self, x: Array, out: Array, factor: float) -> None:
        d, at = x.shape[-1], 0
        for i in range(d):
            np.multiply(x[:, i:], x[:, i : i + 1], out=out[:, at : at + d - i])
            at += d - i
        np.multiply(out, (factor * _pairs(d)[2]).astype(out.dtype), out=out)

    def kernel(self, x: Array, y: Array) -> Array:
        t = x @ compat.array_namespace(x, y).matrix_transpose(y)
        return t * t


class _Taylor2(_Squared):
    r""":math:`\phi(x) = (1, x, \phi_{\mathrm{squared}}(x) / \sqrt 2)`."""

    name = "taylor2"
    paper = "Arora et al., Simple linear attention language models, 2024, arXiv:2402.18668"

    def output_dim(self, dim: int) -> int:
        return 1 + dim + super().output_dim(dim)

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        del weights
        one = xp.ones((*x.shape[:-1], 1), dtype=x.dtype, device=device_of(x))
        return Features(xp.concat([one, x, self._products(x, xp, math.sqrt(0.5))], axis=-1), None)

    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        del weights
        d = x.shape[-1]
        out[:, 0], out[:, 1 : d + 1] = 1, x
        self._write(x, out[:, d + 1 :], math.sqrt(0.5))

    def kernel(self, x: Array, y: Array) -> Array:
        t = x @ compat.array_namespace(x, y).matrix_transpose(y)
        return 1.0 + t + 0.5 * t * t


squared: FeatureMap = _Squared()
squared.__doc__ = r"""
:math:`\kappa(x, y) = (x \cdot y)^2`, of ``D (D + 1) / 2`` features: no weight is negative
(Kacham et al., 2023, arXiv:2310.01655).
"""

taylor2: FeatureMap = _Taylor2()
taylor2.__doc__ = r"""
:math:`\kappa(x, y) = 1 + x \cdot y + (x \cdot y)^2 / 2`, the exponential to second order, of
``1 + D + D (D + 1) / 2`` features: no weight is below 1/2. Multiply queries and keys by
``D ** -0.25`` to stand for softmax attention (Arora et al., 2024, arXiv:2402.18668).
"""
