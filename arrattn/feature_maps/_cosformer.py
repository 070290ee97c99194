"""Weights that fall with distance, by features that turn with the position."""

from __future__ import annotations

import math
from typing import Any

import array_api_compat as compat

from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, Features, require_int


class _Cosformer(FeatureMap):
    positional = True
    paper = "Qin et al., cosFormer, 2022, arXiv:2202.08791"

    def __init__(self, length: int, start: int) -> None:
        self.name, self.length, self.start = "cosformer", length, start

    def output_dim(self, dim: int) -> int:
        return 2 * dim

    def phi(
        self,
        x: Array,
        xp: Namespace,
        weights: Array | None = None,
        *,
        positions: Array | None = None,
    ) -> Features:
        del weights
        if positions is None:
            positions = xp.arange(x.shape[-2], device=device_of(x))
        angle = xp.astype(positions + self.start, x.dtype) * (0.5 * math.pi / self.length)
        x = xp.where(x < 0, 0.0, x)
        turned = [x * of(angle)[..., None] for of in (xp.cos, xp.sin)]
        return Features(xp.concat(turned, axis=-1), None)

    # Positions are for these two alone.
    def phi_q(self, x: Array, xp: Namespace, weights: Array | None = None, **at: Any) -> Features:
        return self.phi(x, xp, weights, **at)

    def phi_k(self, x: Array, xp: Namespace, weights: Array | None = None, **at: Any) -> Features:
        return self.phi(x, xp, weights, **at)

    def kernel(self, x: Array, y: Array) -> Array:
        """Evaluate the kernel, the last of `x` at the position of the last of `y`."""
        xp = compat.array_namespace(x, y)
        n, m = x.shape[-2], y.shape[-2]
        p, j = (xp.arange(count, dtype=x.dtype, device=device_of(x)) for count in (n, m))
        apart = (p + (m - n))[:, None] - j[None, :]
        products = xp.where(x < 0, 0.0, x) @ xp.matrix_transpose(xp.where(y < 0, 0.0, y))
        return products * xp.cos(apart * (0.5 * math.pi / self.length))

    def __repr__(self) -> str:
        start = f", start={self.start}" if self.start else ""
        return f"cosformer({self.length}{start})"


def cosformer(length: int, *, start: int = 0) -> FeatureMap:
    r"""
    Weigh products of :math:`\max(x, 0)` down with distance [1]_.

    .. math:: \kappa(q_i, k_j) = \max(q_i, 0) \cdot \max(k_j, 0)\,
              \cos\!\left(\frac{\pi}{2} \frac{p_i - j}{\mathrm{length}}\right)

    with `p_i` the query's position, ``i + Nk - Nq`` or ``i + kv_lengths - Nq``. The cosine of
    a difference is a product of features, :math:`(x \cos, x \sin)`, so this is exact. Weights
    are not negative as long as no two positions are further apart than `length`.

    `linear_attention` makes these features for all tokens at once: they take the memory of
    queries and keys twice over.

    Parameters
    ----------
    length : int
        Distance at which a weight reaches 0; at least that of the longest sequence.
    start : int, default: 0
        Position of the first key; what an `initial_state` holds lies before it.

    Returns
    -------
    FeatureMap
        The map; ``2 D`` features.

    References
    ----------
    .. [1] Qin et al., cosFormer: rethinking softmax in attention, 2022, arXiv:2202.08791.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.feature_maps import cosformer
    >>> cosformer(4).kernel(np.ones((1, 1)), np.ones((4, 1))).round(2)
    array([[0.38, 0.71, 0.92, 1.  ]])
    """
    require_int("length", length)
    require_int("start", start, least=0)
    return _Cosformer(int(length), int(start))
