"""Softmax attention and its restrictions, all pairs at once."""

import math
from collections.abc import Sequence
from typing import Any

from array_api_compat import array_namespace

from arrattn.reference._reading import (
    Array,
    Namespace,
    device_of,
    like,
    per_query_head,
    positions,
    ratio,
    read,
    visible_pairs,
    weighted_sum,
)


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    pattern: Any = None,
    q_offset: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
) -> Any:
    r"""
    Softmax attention over the visible pairs [1]_.

    .. math:: o_i = \sum_j \frac{e^{s_{ij}}}{e^{b} + \sum_{j'} e^{s_{ij'}}} v_j,
              \qquad j, j' \text{ visible to } i

    with the sink :math:`b` of the head (:math:`e^b = 0` without one).

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries.
    k : array, shape (..., Hkv, Nk, D)
        Keys; query head `h` reads key head ``h // (Hq // Hkv)``.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    mask : array of bool, shape (..., Hq, Nq, Nk), optional
        True where visible.
    bias : array, shape (..., Hq, Nq, Nk), optional
        Added to the scores; ``-inf`` hides.
    is_causal : bool, default: False
        Whether only ``j <= p`` is visible.
    window : tuple of (int or None, int or None), optional
        Keys visible before and after `p`.
    kv_lengths : int or array of int, shape (...), optional
        Number of keys that are there.
    segment_ids : array of int, shape (..., N), or pair of arrays, optional
        Only pairs with the same id are visible.
    pattern : Pattern, optional
        Any further restriction.
    q_offset : int or array of int, shape (...), optional
        Position of the first query. Default: ``Nk - Nq``, or ``kv_lengths - Nq``.
    scale : float, optional
        Factor of the products. Default: ``D ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(s / softcap)``, before the bias.
    sinks : array, shape (Hq,), optional
        Scores that count in the denominator alone.
    return_lse : bool, default: False
        Whether the logarithms of the denominators come along.

    Returns
    -------
    array, shape (..., Hq, Nq, Dv), or tuple of it and an array, shape (..., Hq, Nq)
        The outputs, and with `return_lse` the logarithms of the denominators.
        A row that sees nothing is 0, and its logarithm is ``-inf``, or the sink.

    References
    ----------
    .. [1] Vaswani et al., Attention is all you need, 2017, arXiv:1706.03762.

    Examples
    --------
    >>> import numpy as np
    >>> q = k = np.zeros((3, 1))
    >>> softmax_attention(q, k, np.asarray([[0.0], [1.0], [5.0]]), is_causal=True)
    array([[0. ],
           [0.5],
           [2. ]])
    """
    xp = array_namespace(q, k, v)
    q_, k_, v_ = (per_query_head(x, q, xp) for x in read(q, k, v, xp))
    shape = (*q_.shape[:-1], k_.shape[-2])  # (..., Hq, Nq, Nk)
    s = _scores(q_, k_, scale, softcap, bias, xp)
    visible = visible_pairs(
        shape,
        mask,
        bias,
        is_causal,
        window,
        kv_lengths,
        segment_ids,
        pattern,
        q_offset,
        xp=xp,
        on=device_of(q),
    )

    # A sink is one more key: it has a score, and no value.
    b = xp.full(shape[-3], -math.inf, dtype=s.dtype, device=device_of(q))
    b = b if sinks is None else xp.astype(sinks, s.dtype)
    b = xp.broadcast_to(b[:, None, None], (*shape[:-1], 1))
    s = xp.concat([xp.where(visible, s, -math.inf), b], axis=-1)  # (..., Hq, Nq, Nk + 1)

    m = xp.max(s, axis=-1, keepdims=True)  # subtracted so that no exp overflows
    m = xp.where(m == -math.inf, 0.0, m)
    p = xp.exp(s - m)
    total = xp.sum(p, axis=-1, keepdims=True)
    p = xp.where(visible, p[..., :-1], 0.0)
    out = like(ratio(weighted_sum(p, v_, visible, xp), total, xp), q, xp)
    if not return_lse:
        return out
    lse = xp.where(total == 0, -math.inf, m + xp.log(xp.where(total == 0, 1.0, total)))
    return out, lse[..., 0, :, 0] if q.ndim == 2 else lse[..., 0]


def local_attention(
    q: Array, k: Array, v: Array, /, *, window: tuple[int | None, int | None], **rest: Any
) -> Any:
    r"""
    Softmax attention among neighbours, ``p - left <= j <= p + right`` [1]_.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    window : tuple of (int or None, int or None)
        Keys visible before and after `p`; None is unlimited.
    **rest : object
        The other keywords of `softmax_attention`.

    Returns
    -------
    array, or tuple of arrays
        As from `softmax_attention`.

    References
    ----------
    .. [1] Beltagy et al., Longformer, 2020, arXiv:2004.05150.
    """
    return softmax_attention(q, k, v, window=window, **rest)


def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    block_size: int | None = None,
    top_k: int | None = None,
    route: int | None = 8,
    select: str = "keys",
    per: str = "query",
    mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    pattern: Any = None,
    q_offset: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> Any:
    r"""
    Softmax attention over a query's own block and the best keys elsewhere.

    With blocks of `block_size` keys, query `i` sees those keys of the block of `p` that
    are visible to it, and of the other visible keys the `top_k` with the highest scores
    among the `route` best blocks: those with the highest
    :math:`\mathrm{scale}\; q_i \cdot \bar k_b`, :math:`\bar k_b` the mean of the keys of
    block `b` that any query of the head sees.
    Ties go to the lower index. Block means as a guide are those of [1]_.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    block_size : int, optional
        Keys per block. Default: ``ceil(sqrt(Nk))``.
    top_k : int, optional
        Keys chosen outside the own block. Default: ``ceil(sqrt(Nk))``.
    route : int or None, default: 8
        Blocks searched, the own one not counted; None searches all.
    select : str, default: "keys"
        What is chosen; only "keys" is defined.
    per : str, default: "query"
        For whom it is chosen; only "query" is defined: every query of every head.
    mask, bias, is_causal, window, kv_lengths, segment_ids, pattern : optional
        Who sees whom, as in `softmax_attention`.
    q_offset, scale, softcap : optional
        Positions and scores, as in `softmax_attention`.
    **rest : object
        `sinks` and `return_lse`, as in `softmax_attention`.

    Returns
    -------
    array, or tuple of arrays
        As from `softmax_attention`.

    References
    ----------
    .. [1] Lu et al., MoBA: mixture of block attention, 2025, arXiv:2502.13189.
    """
    if (select, per) != ("keys", "query"):
        msg = f"expected select='keys' and per='query', got {select!r} and {per!r}"
        raise ValueError(msg)
    xp = array_namespace(q, k, v)
    q_, k_, _ = (per_query_head(x, q, xp) for x in read(q, k, v, xp))
    nq, nk = q_.shape[-2], k_.shape[-2]
    size = block_size or _ceil_sqrt(nk)
    scores = _scores(q_, k_, scale, softcap, bias, xp)
    visible = visible_pairs(
        (*q_.shape[:-1], nk),
        mask,
        bias,
        is_causal,
        window,
        kv_lengths,
        segment_ids,
        pattern,
        q_offset,
        xp=xp,
        on=device_of(q),
    )

    p = positions(nq, nk, kv_lengths, q_offset, xp, device_of(q))  # (..., 1, Nq, 1)
    j = xp.arange(nk, device=device_of(q))
    own = visible & (p >= 0) & (p < nk) & (p // size == j // size)
    elsewhere = visible & ~own
    if route is not None:
        block_scores = _block_scores(q_, k_, visible, size, scale, xp)
        holds_one = _any_in_block(elsewhere, size, xp)  # (..., Hq, Nq, blocks)
        searched = _best(block_scores, holds_one, route, xp)
        elsewhere = elsewhere & xp.take(searched, j // size, axis=-1)
    chosen = _best(scores, elsewhere, _ceil_sqrt(nk) if top_k is None else top_k, xp)
    seen = own | chosen
    return softmax_attention(
        q,
        k,
        v,
        mask=seen[..., 0, :, :] if q.ndim == 2 else seen,
        bias=bias,
        scale=scale,
        softcap=softcap,
        **rest,
    )


def merge(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    r"""
    Put together what parts of the keys gave [1]_.

    .. math:: L = \log \sum_r e^{L_r}, \qquad o = \sum_r e^{L_r - L} o_r

    Parameters
    ----------
    parts : sequence of (array, array)
        Outputs (..., Hq, Nq, Dv) and logarithms (..., Hq, Nq), one pair for each part.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        The outputs over all keys.
    lse : array, shape (..., Hq, Nq)
        The logarithms of their denominators.

    References
    ----------
    .. [1] Milakov & Gimelshein, Online normalizer calculation for softmax, 2018,
       arXiv:1805.02867.
    """
    xp = array_namespace(parts[0][0])
    lse = xp.stack([lse for _, lse in parts], axis=0)
    m = xp.max(lse, axis=0)
    m = xp.where(m == -math.inf, 0.0, m)
    weight = xp.exp(lse - m)
    total = xp.sum(weight, axis=0)
    out = xp.stack([xp.astype(o, lse.dtype) for o, _ in parts], axis=0)
    out = ratio(xp.sum(weight[..., None] * out, axis=0), total[..., None], xp)
    lse = xp.where(total == 0, -math.inf, m + xp.log(xp.where(total == 0, 1.0, total)))
    return xp.astype(out, parts[0][0].dtype), lse


def _scores(
    q: Array, k: Array, scale: float | None, softcap: float | None, bias: Array | None, xp: Any
) -> Array:
    """Scale, then softcap, then bias."""
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    s = scale * (q @ xp.matrix_transpose(k))
    if softcap is not None:
        s = softcap * xp.tanh(s / softcap)
    return s if bias is None else s + xp.astype(bias, s.dtype)


def _ceil_sqrt(n: int) -> int:
    """Round the square root up, to 1 at least."""
    return math.isqrt(max(n - 1, 0)) + 1


def _best(scores: Array, allowed: Array, count: int, xp: Namespace) -> Array:
    """Mark the `count` highest scores allowed in each row, NaN first, ties to the lower index."""
    scores = xp.where(xp.isnan(scores), math.inf, scores)
    order = xp.argsort(xp.where(allowed, -scores, math.inf), axis=-1, stable=True)
    rank = xp.argsort(order, axis=-1)
    return allowed & (rank < count)


def _in_blocks(x: Array, size: int, axis: int, xp: Namespace) -> Array:
    """Cut the last axis, or the last but one, into blocks; zeros fill up the last block."""
    n = x.shape[axis]
    blocks = -(-n // size)
    gap = (*x.shape[:axis], blocks * size - n, *(x.shape[-1:] if axis == -2 else ()))
    x = xp.concat([x, xp.zeros(gap, dtype=x.dtype, device=device_of(x))], axis=axis)
    return xp.reshape(x, (*x.shape[:axis], blocks, size, *(x.shape[-1:] if axis == -2 else ())))


def _any_in_block(table: Array, size: int, xp: Namespace) -> Array:
    """Tell which blocks hold a True, (..., blocks)."""
    return xp.any(_in_blocks(table, size, -1, xp), axis=-1)


def _block_scores(
    q: Array, k: Array, visible: Array, size: int, scale: float | None, xp: Namespace
) -> Array:
    """Score the mean of every block's finite keys, (..., Hq, Nq, blocks)."""
    seen = xp.any(visible, axis=-2)  # (..., Hq, Nk): by some query of the head
    seen = seen & xp.all(xp.isfinite(k), axis=-1)
    total = xp.sum(_in_blocks(xp.where(seen[..., None], k, 0.0), size, -2, xp), axis=-2)
    count = xp.sum(_in_blocks(xp.astype(seen, k.dtype), size, -1, xp), axis=-1)
    mean = total / xp.where(count == 0, 1.0, count)[..., None]
    return _scores(q, mean, scale, None, None, xp)
