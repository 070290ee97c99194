"""Features of a trained projection."""

from __future__ import annotations

from typing import Any

import array_api_compat as compat
import numpy as np

from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, Features
from arrattn.feature_maps._elementwise import normalized_exp


class _Hedgehog(FeatureMap):
    non_negative = True
    paper = "Zhang et al., The hedgehog and the porcupine, 2024, arXiv:2402.04347"

    def __init__(self, weights: Array, weights_k: Array | None) -> None:
        self.name = "hedgehog"
        self._given = [weights] if weights_k is None else [weights, weights_k]
        self.dim, self._width = weights.shape

    def output_dim(self, dim: int) -> int:
        del dim
        return 2 * int(self._width)

    def weights(self, like: Array, xp: Namespace) -> Array:
        """Those of queries and those of keys, (1 | 2, D, m)."""
        return xp.stack([self._moved(w, like, xp) for w in self._given])

    def _moved(self, w: Array, like: Array, xp: Namespace) -> Array:
        if isinstance(w, np.ndarray):
            host = np.float64 if like.dtype == xp.float64 else np.float32
            return xp.asarray(w.astype(host), device=device_of(like))
        theirs = compat.array_namespace(w)
        if theirs is not xp:
            msg = (
                "feature_map: expected the weights of hedgehog as NumPy arrays or in the "
                f"library of q, k and v, {xp.__name__}; got {theirs.__name__}"
            )
            raise TypeError(msg)
        return xp.astype(w, like.dtype)

    def phi_q(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features by the first weights."""
        return self._features(x, 0, xp, weights)

    def phi_k(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features by the last weights."""
        return self._features(x, -1, xp, weights)

    phi = phi_q

    def _features(self, x: Array, at: int, xp: Namespace, weights: Array | None) -> Features:
        w = self.weights(x, xp) if weights is None else weights
        u = x @ w[at, :, :]
        return Features(normalized_exp(xp.concat([u, -u], axis=-1), xp), None)

    def kernel(self, x: Array, y: Array) -> Array:
        xp = compat.array_namespace(x, y)
        return self.phi_q(x, xp).phi @ xp.matrix_transpose(self.phi_k(y, xp).phi)

    def problems(self, dim: int) -> list[str]:
        if dim == self.dim:
            return []
        shape = tuple(self._given[0].shape)
        return [f"feature_map: expected weights of shape ({dim}, m), D being {dim}, got {shape}"]

    def __repr__(self) -> str:
        return f"hedgehog(<{self.dim} x {self._width}>)"


def hedgehog(weights: Array, weights_k: Array | None = None) -> FeatureMap:
    r"""
    Make features of trained weights, as in Hedgehog [1]_.

    .. math:: \phi(x) = \mathrm{softmax}\big((W^\top x,\; -W^\top x)\big)

    The weights are yours, trained so that these features stand for another kernel; arrattn
    trains nothing. Gradients reach them on libraries that have gradients.

    Parameters
    ----------
    weights : array, shape (D, m)
        :math:`W`, the same for all heads: a NumPy array, or one of the library of q, k and v.
    weights_k : array, shape (D, m), optional
        Those of keys. Default: those of queries.

    Returns
    -------
    FeatureMap
        The map; ``2 m`` features, all positive.

    References
    ----------
    .. [1] Zhang et al., The hedgehog and the porcupine, 2024, arXiv:2402.04347.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.feature_maps import hedgehog
    >>> hedgehog(np.eye(2)).kernel(np.zeros((1, 2)), np.ones((1, 2)))
    array([[0.25]])
    """
    given: dict[str, Any] = {"weights": weights}
    if weights_k is not None:
        given["weights_k"] = weights_k
    for name, w in given.items():
        if not hasattr(w, "shape"):
            msg = f"{name}: expected an array, got {w!r} ({type(w).__name__})"
            raise TypeError(msg)
        if len(w.shape) != 2 or 0 in w.shape:
            msg = f"{name}: expected shape (D, m), neither of them 0, got {tuple(w.shape)}"
            raise ValueError(msg)
        if tuple(w.shape) != tuple(weights.shape):
            shapes = tuple(weights.shape), tuple(w.shape)
            msg = f"{name}: expected the shape of weights, {shapes[0]}, got {shapes[1]}"
            raise ValueError(msg)
    return _Hedgehog(weights, weights_k)
