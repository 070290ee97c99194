"""Features of any kernel, by its values at some chosen points."""

from __future__ import annotations

from typing import Any

import numpy as np

from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, Features

#: Eigenvalues below this, beside the largest, are left out: their features would be made of
#: what single precision rounds off.
SMALLEST = 1e-6


class _Nystrom(FeatureMap):
    paper = "Williams & Seeger, Using the Nystrom method to speed up kernel machines, 2001"

    def __init__(self, of: FeatureMap, landmarks: np.ndarray[Any, Any]) -> None:
        self.name, self.of = "nystrom", of
        self._landmarks = np.array(landmarks, np.float64)
        values, vectors = np.linalg.eigh(of.kernel(self._landmarks, self._landmarks))
        some = values > SMALLEST * values[-1]
        self._whitening = vectors[:, some] * values[some] ** -0.5  # (m, Dphi)

    def output_dim(self, dim: int) -> int:
        del dim
        return int(self._whitening.shape[1])

    def weights(self, like: Array, xp: Namespace) -> Array:
        """The landmarks beside what makes their features orthonormal, (m, D + Dphi)."""
        both = np.concatenate([self._landmarks, self._whitening], axis=-1)
        host = np.float64 if like.dtype == xp.float64 else np.float32
        return xp.asarray(both.astype(host), device=device_of(like))

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        w = self.weights(x, xp) if weights is None else weights
        d = x.shape[-1]
        return Features(self.of.kernel(x, w[:, :d]) @ w[:, d:], None)

    def kernel(self, x: Array, y: Array) -> Array:
        return self.of.kernel(x, y)

    def problems(self, dim: int) -> list[str]:
        d = self._landmarks.shape[-1]
        if d == dim:
            return self.of.problems(dim)
        return [f"feature_map: expected landmarks of width D = {dim}, got {d}"]

    def __repr__(self) -> str:
        return f"nystrom({self.of!r}, <{len(self._landmarks)} landmarks>)"


def nystrom(of: FeatureMap, landmarks: np.ndarray[Any, Any]) -> FeatureMap:
    r"""
    Make features of a kernel's values at chosen points [1]_, as in Nystromformer [2]_.

    .. math:: \phi(x) = K^{-1/2}\, \kappa(L, x), \qquad K = \kappa(L, L)

    with the landmarks `L`. Nothing is random: the error is 0 at the landmarks, and small
    where tokens lie about as they do and the kernel is broad. Then it falls much faster than
    that of random features; with a narrow kernel, as that of peaked attention, it does not
    fall at all. Weights can come out negative, by about the error.

    Parameters
    ----------
    of : FeatureMap
        The map whose exact kernel is meant, symmetric and without positions; its own
        features play no part.
    landmarks : ndarray, shape (m, D)
        Points, such as some tokens of a model's queries and keys; the same for all heads.
        As many features come out, or fewer where landmarks repeat each other.

    Returns
    -------
    FeatureMap
        The map.

    References
    ----------
    .. [1] Williams & Seeger, Using the Nystrom method to speed up kernel machines, 2001.
    .. [2] Xiong et al., Nystromformer, 2021, arXiv:2102.03902.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.feature_maps import gaussian, nystrom
    >>> points = np.random.default_rng(0).normal(size=(32, 4))
    >>> phi = nystrom(gaussian(2.0, dim=4, num_features=2, rng=0), points)
    >>> products = phi.phi(points, np).phi @ phi.phi(points, np).phi.T
    >>> bool(np.allclose(products, phi.kernel(points, points), atol=1e-4))
    True
    """
    if not isinstance(of, FeatureMap) or of.positional:
        msg = f"of: expected a feature map without positions, got {of!r} ({type(of).__name__})"
        raise TypeError(msg)
    if not isinstance(landmarks, np.ndarray) or landmarks.dtype.kind != "f":
        what = getattr(landmarks, "dtype", type(landmarks).__name__)
        msg = f"landmarks: expected a NumPy array of real floating numbers, got {what}"
        raise TypeError(msg)
    if landmarks.ndim != 2 or 0 in landmarks.shape:
        msg = f"landmarks: expected shape (m, D), neither of them 0, got {landmarks.shape}"
        raise ValueError(msg)
    if not np.isfinite(landmarks).all():
        msg = "landmarks: expected finite numbers, got NaN or infinity"
        raise ValueError(msg)
    if problems := of.problems(landmarks.shape[-1]):
        raise ValueError(problems[0].replace("feature_map", "of"))
    return _Nystrom(of, landmarks)
