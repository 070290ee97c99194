"""Merging attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

from arrattn._core import inputs, online_softmax
from arrattn._core.typing import Array

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
    states = [online_softmax.reopen(out, lse, xp=xp) for out, lse in parts]
    whole = reduce(partial(online_softmax.merge, xp=xp), states)
    out, lse = online_softmax.finish(whole, xp=xp)
    return xp.astype(out, parts[0][0].dtype, copy=False), lse
