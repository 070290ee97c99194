"""Softmax attention and its restrictions, all pairs at once."""

import math
from collections.abc import Sequence
from numbers import Integral
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
    score: str = "mean",
    block_scores: Array | None = None,
    always: Any = None,
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
    return_selection: bool = False,
    **rest: Any,
) -> Any:
    r"""
    Softmax attention over a query's own block and the best keys elsewhere.

    With blocks of `block_size` keys, query `i` sees those keys of the block of `p` that
    are visible to it, those that `always` shows it, and of the other visible keys

    - with ``select="keys"``, the `top_k` with the highest scores among the `route` best blocks;
    - with ``select="blocks"``, those of the `top_k` best blocks.

    A block can be chosen if it holds such a key. Its score is

    - "mean": :math:`\mathrm{scale}\; q_i \cdot \bar k_b`, :math:`\bar k_b` the mean of its keys
      that any query of the head sees [1]_;
    - "bound": :math:`\sum_c \max_j\, \mathrm{scale}\; q_{ic} k_{jc}` over the same keys [2]_;
    - "best": the highest score of the keys that could be chosen;
    - given, as `block_scores`; ``-inf`` forbids the block.

    Where several queries choose together, a score is the sum over those of them for whom
    the block, or the key, can be chosen. Ties go to the lower index.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    block_size : int, optional
        Keys per block, at most `Nk`. Default: ``ceil(sqrt(Nk))``.
    top_k : int, optional
        Keys chosen outside the own block, ``ceil(sqrt(Nk))`` by default, or blocks, 3.
    route : int or None, default: 8
        Blocks searched for keys, the own one not counted; None searches all.
    select : {"keys", "blocks"}, default: "keys"
        What is chosen.
    per : {"query", "block", "group"}, default: "query"
        Who chooses: every query of every head, the queries of a head whose positions lie in
        one block, or the query heads that share a key head.
    score : {"mean", "bound", "best"}, default: "mean"
        What a block is chosen by.
    block_scores : array, shape (..., Hq | Hkv | 1, Nq | query blocks | 1, blocks), optional
        Scores of blocks; those with one row for all who choose together are not summed.
    always : Pattern, optional
        What is seen beside the own block.
    mask, bias, is_causal, window, kv_lengths, segment_ids, pattern : optional
        Who sees whom, as in `softmax_attention`.
    q_offset, scale, softcap : optional
        Positions and scores, as in `softmax_attention`.
    return_selection : bool, default: False
        Whether the indices chosen come along: ascending, then -1.
    **rest : object
        `sinks` and `return_lse`, as in `softmax_attention`.

    Returns
    -------
    array, or tuple of arrays
        As from `softmax_attention`, and the selection.

    References
    ----------
    .. [1] Lu et al., MoBA: mixture of block attention, 2025, arXiv:2502.13189.
    .. [2] Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference,
       2024, arXiv:2406.10774.
    """
    xp = array_namespace(q, k, v)
    q_, k_, _ = (per_query_head(x, q, xp) for x in read(q, k, v, xp))
    nq, nk = q_.shape[-2], k_.shape[-2]
    size = max(min(block_size or _ceil_sqrt(nk), nk), 1)
    shape = (*q_.shape[:-1], nk)
    scores = _scores(q_, k_, scale, softcap, bias, xp)
    hidden_by = (mask, bias, is_causal, window, kv_lengths, segment_ids, pattern, q_offset)
    visible = visible_pairs(shape, *hidden_by, xp=xp, on=device_of(q))
    p = positions(nq, nk, kv_lengths, q_offset, xp, device_of(q))  # (..., 1, Nq, 1)
    j = xp.arange(nk, device=device_of(q))
    own = (p >= 0) & (p < nk) & (p // size == j // size)
    if always is not None:
        none = (None, None, False, None, kv_lengths, None, always, q_offset)
        own = own | visible_pairs(shape, *none, xp=xp, on=device_of(q))
    seen, elsewhere = visible & own, visible & ~own

    heads = (q_.shape[-3], k.shape[-3] if k.ndim > 2 else 1)
    together = _Together(per, heads, p // size, _query_blocks(nq, size, q_offset, kv_lengths, nk))
    holds_one = _any_in_block(elsewhere, size, xp)  # (..., Hq, Nq, blocks)
    if block_scores is not None:
        pooled = together.given(block_scores, holds_one, xp)
    elif score == "best":
        pooled = together.sum(_best_in_block(scores, elsewhere, size, xp), holds_one, xp)
    else:
        times = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
        found = _block_scores(q_, k_, visible, size, times, score, xp)
        pooled = together.scaled(*found, holds_one, xp)
    could = together.any(holds_one, xp) & ~(pooled == -math.inf)
    if select == "blocks":
        count = min(3 if top_k is None else top_k, holds_one.shape[-1])
        chosen = _best(pooled, could, count, xp)
        keys = xp.take(together.each(chosen, holds_one, xp), j // size, axis=-1)
        seen = seen | (elsewhere & keys)
    else:
        if route is not None:
            searched = together.each(_best(pooled, could, route, xp), holds_one, xp)
            elsewhere = elsewhere & xp.take(searched, j // size, axis=-1)
        count = min(_ceil_sqrt(nk) if top_k is None else top_k, nk)
        pooled = together.sum(scores, elsewhere, xp)
        chosen = _best(pooled, together.any(elsewhere, xp), count, xp)
        seen = seen | (elsewhere & together.each(chosen, elsewhere, xp))
    out = softmax_attention(
        q,
        k,
        v,
        mask=seen[..., 0, :, :] if q.ndim == 2 else seen,
        bias=bias,
        scale=scale,
        softcap=softcap,
        **rest,
    )
    if not return_selection:
        return out
    n = chosen.shape[-1]
    index = xp.arange(n, device=device_of(q))
    index = xp.sort(xp.where(chosen, index, xp.full_like(index, n)), axis=-1)[..., :count]
    index = xp.where(index == n, xp.full_like(index, -1), index)
    index = index[..., 0, :, :] if q.ndim == 2 else index
    return (*out, index) if isinstance(out, tuple) else (out, index)


class _Together:
    """
    Who chooses together.

    Parameters
    ----------
    per : str
        "query", "block" or "group".
    heads : tuple of (int, int)
        Query heads and key heads.
    block : array of int, shape (..., 1, Nq, 1)
        The block of every query's position.
    n_blocks : int
        How many of them there are, from the first query's on.
    """

    def __init__(self, per: str, heads: tuple[int, int], block: Array, n_blocks: int) -> None:
        self.per, self.n_blocks = per, n_blocks
        self.heads = (heads[1], heads[0] // max(heads[1], 1))
        self.block = block - block[..., :1, :]

    def sum(self, scores: Array, of: Array, xp: Namespace) -> Array:
        """Add up the scores `of` those who may choose."""
        return self._reduced(xp.where(of, scores, 0.0), xp.sum, xp)

    def scaled(self, scores: Array, counts: Array, times: float, of: Array, xp: Namespace) -> Array:
        """
        Add up ``scores / counts * times``.

        Where counts are the same, the scores are added first: whole numbers then tie as they do.
        """
        if self.per == "block":
            return self.sum(scores, of, xp) / counts * times
        divided = self.sum(scores / counts, of, xp)
        if self.per == "group" and self.heads[1]:
            counts = xp.reshape(counts, (*counts.shape[:-3], *self.heads, *counts.shape[-2:]))
            first = counts[..., :1, :, :]
            same = xp.all(counts == first, axis=-3)
            divided = xp.where(same, self.sum(scores, of, xp) / first[..., 0, :, :], divided)
        return divided * times

    def any(self, of: Array, xp: Namespace) -> Array:
        """Tell whether any of them may."""
        return self._reduced(of, xp.any, xp)

    def _reduced(self, x: Array, reduce: Any, xp: Namespace) -> Array:
        if self.per == "group":
            grouped = xp.reshape(x, (*x.shape[:-3], *self.heads, *x.shape[-2:]))
            return reduce(grouped, axis=-3)
        if self.per == "block":
            none = xp.zeros_like(x)
            rows = [
                reduce(xp.where(self.block == b, x, none), axis=-2) for b in range(self.n_blocks)
            ]
            return xp.stack(rows, axis=-2) if rows else x
        return x

    def given(self, scores: Array, of: Array, xp: Namespace) -> Array:
        """Add up scores that were given, but for those that are given for all together."""
        scores = scores[(None,) * max(3 - scores.ndim, 0)]
        (hkv, g), (lead, n) = self.heads, (of.shape[:-3], of.shape[-1])
        if self.per == "group" and scores.shape[-3] in {1, hkv}:
            return xp.broadcast_to(scores, (*lead, hkv, of.shape[-2], n))
        if scores.shape[-3] == hkv:
            scores = xp.take(scores, xp.arange(hkv * g, device=device_of(scores)) // g, axis=-3)
        if self.per == "block" and scores.shape[-2] in {1, self.n_blocks}:
            return xp.broadcast_to(scores, (*lead, hkv * g, self.n_blocks, n))
        return self.sum(xp.broadcast_to(scores, of.shape), of, xp)

    def each(self, chosen: Array, like: Array, xp: Namespace) -> Array:
        """Hand what was chosen to all who chose it."""
        if self.per == "group":
            shape = (*chosen.shape[:-2], self.heads[1], *chosen.shape[-2:])
            return xp.reshape(xp.broadcast_to(chosen[..., None, :, :], shape), like.shape)
        if self.per == "block":
            out = xp.zeros(like.shape, dtype=xp.bool, device=device_of(like))
            for b in range(self.n_blocks):
                out = out | ((self.block == b) & chosen[..., b : b + 1, :])
            return out
        return chosen


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


def _in_blocks(x: Array, size: int, axis: int, xp: Namespace, fill: float = 0) -> Array:
    """Cut the last axis, or the last but one, into blocks; `fill` fills up the last."""
    n = x.shape[axis]
    blocks = -(-n // size)
    gap = (*x.shape[:axis], blocks * size - n, *(x.shape[-1:] if axis == -2 else ()))
    x = xp.concat([x, xp.full(gap, fill, dtype=x.dtype, device=device_of(x))], axis=axis)
    return xp.reshape(x, (*x.shape[:axis], blocks, size, *(x.shape[-1:] if axis == -2 else ())))


def _any_in_block(table: Array, size: int, xp: Namespace) -> Array:
    """Tell which blocks hold a True, (..., blocks)."""
    return xp.any(_in_blocks(table, size, -1, xp), axis=-1)


def _best_in_block(scores: Array, allowed: Array, size: int, xp: Namespace) -> Array:
    """Find the highest score allowed in every block, NaN first; -inf where there is none."""
    scores = xp.where(xp.isnan(scores), math.inf, scores)
    scores = _in_blocks(xp.where(allowed, scores, -math.inf), size, -1, xp, fill=-math.inf)
    return xp.max(scores, axis=-1)


def _block_scores(
    q: Array, k: Array, visible: Array, size: int, scale: float, score: str, xp: Namespace
) -> tuple[Array, Array, float]:
    """
    Score the sum, or the bounds, of every block's finite keys, (..., Hq, Nq, blocks).

    And by what these are still to be divided, (..., Hq, 1, blocks), and multiplied.
    """
    seen = xp.any(visible, axis=-2)  # (..., Hq, Nk): by some query of the head
    seen = seen & xp.all(xp.isfinite(k), axis=-1)
    count = xp.sum(_in_blocks(xp.astype(seen, k.dtype), size, -1, xp), axis=-1)
    count, none = xp.where(count == 0, 1.0, count)[..., None, :], count[..., None] == 0
    if score == "bound":
        seen = _in_blocks(xp.astype(seen, k.dtype), size, -1, xp)[..., None] > 0
        k = _in_blocks(k, size, -2, xp)
        low = xp.min(xp.where(seen, k, math.inf), axis=-2)
        high = xp.max(xp.where(seen, k, -math.inf), axis=-2)
        low, high = (xp.matrix_transpose(xp.where(none, 0.0, x)) for x in (low, high))
        x = q if scale >= 0 else -q
        up, down = xp.where(x > 0, x, 0.0), xp.where(x < 0, x, 0.0)
        return up @ high + down @ low, xp.ones_like(count), abs(scale)
    total = xp.sum(_in_blocks(xp.where(seen[..., None], k, 0.0), size, -2, xp), axis=-2)
    return q @ xp.matrix_transpose(total), count, scale


def _query_blocks(nq: int, size: int, q_offset: Any, kv_lengths: Any, nk: int) -> int:
    """Count the blocks that the queries' positions lie in; at most, where offsets differ."""
    given = kv_lengths if q_offset is None else q_offset
    if not nq:
        return 0
    if given is not None and not isinstance(given, Integral):
        return (nq + size - 2) // size + 1
    first = int(q_offset) if q_offset is not None else (nk if given is None else int(given)) - nq
    return (first + nq - 1) // size - first // size + 1
