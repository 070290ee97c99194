"""Merging attention over parts of the keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

from arrattn._core import inputs, loops
from arrattn._core.typing import Array, Namespace

__all__ = ["merge"]


def merge(parts: Sequence[tuple[Array, Array]], /) -> tuple[Array, Array]:
    r"""
    Combine attention over disjoint sets of keys into attention over their union [1]_.

    .. math:: \ell = \log \sum_p \exp(\ell_p), \qquad o = \sum_p \exp(\ell_p - \ell)\, o_p

    Each part is what an attention function gives with ``return_lse=True`` for the same
    queries and some of the keys. Any number of parts, in any order and any grouping.

    Parameters
    ----------
    parts : sequence of (out, lse)
        `out` of shape (..., Nq, Dv) and `lse` of shape (..., Nq), natural logarithm. At
        least one; all of one library, device and shape.

    Returns
    -------
    out : array, shape (..., Nq, Dv)
        In the dtype of the parts.
    lse : array, shape (..., Nq)
        Log-sum-exp over the union, in the dtype of the parts' `lse`.

    Raises
    ------
    TypeError
        If a part is no pair of arrays, or parts mix libraries or dtypes.
    ValueError
        If there are no parts, or their shapes disagree.

    See Also
    --------
    attention : Gives parts with ``return_lse=True``.

    Notes
    -----
    A part in which a query saw nothing (``lse = -inf``) does not count. Sinks are part of
    a denominator: give them to one part alone. Time and memory grow with the size of the
    parts; keys are not touched again.

    References
    ----------
    .. [1] Dao et al., FlashAttention, 2022, arXiv:2205.14135, section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn import attention, merge
    >>> q, k, v = np.random.default_rng(0).normal(size=(3, 1, 6, 4))
    >>> whole = attention(q, k, v)
    >>> parts = [attention(q, k[:, s], v[:, s], return_lse=True)
    ...          for s in (slice(0, 4), slice(4, 6))]
    >>> out, lse = merge(parts)
    >>> bool(np.allclose(out, whole))
    True
    """
    xp = inputs.read_parts(parts)
    outs = [out for out, _ in parts]
    lses = [lse for _, lse in parts]
    m = loops.stop_gradient(lses[0])
    for lse in lses[1:]:
        m = xp.maximum(m, loops.stop_gradient(lse))
    shift = xp.where(m == -math.inf, xp.zeros_like(m), m)
    weights = [xp.exp(lse - shift) for lse in lses]
    total, summed = weights[0], _weighted(outs[0], weights[0], xp)
    for out, weight in zip(outs[1:], weights[1:], strict=True):
        total, summed = total + weight, summed + _weighted(out, weight, xp)
    none = total == 0
    safe = xp.where(none, xp.ones_like(total), total)
    merged = xp.astype(summed / safe[..., None], outs[0].dtype, copy=False)
    return merged, xp.where(none, m, shift + xp.log(safe))


def _weighted(out: Array, weight: Array, xp: Namespace) -> Array:
    return xp.astype(out, weight.dtype, copy=False) * weight[..., None]
