"""Sparse attention: a query's own block, and the best keys elsewhere."""

from __future__ import annotations

from arrattn._core.inputs import read_sparse
from arrattn._core.select import attend_selected
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

__all__ = ["sparse_attention"]


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
    always: Pattern | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: int | Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    pattern: Pattern | None = None,
    q_offset: int | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    return_selection: bool = False,
) -> Array | tuple[Array, ...]:
    r"""
    Softmax attention over the query's own block and the best keys or blocks elsewhere.

    .. math:: o_i = \sum_{j \in B(i) \cup T(i)} \frac{\exp(s_{ij})}
              {\sum_{j' \in B(i) \cup T(i)} \exp(s_{ij'})} v_j

    Keys are cut into blocks of `block_size`. `B` is the block in which the query's
    position lies (none, if it lies outside the keys), with what `always` shows. With
    ``select="keys"``, `T` are the `top_k` visible keys elsewhere with the highest scores, among
    the `route` blocks that score best [2]_; with ``select="blocks"``, the visible keys of the
    `top_k` blocks that score best [1]_. A block is scored by its mean key [1]_, by a bound from
    above of its keys' scores [4]_, by its best score, or by the caller [5]_. Only what is visible
    is chosen: everything that limits visibility intersects, as in `attention`.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating; 2-D arrays mean one head and no batch.
    k : array, shape (..., Hkv, Nk, D)
        Keys; `Hq` is a multiple of `Hkv`, and query head `h` reads key head
        ``h // (Hq // Hkv)`` (grouped-query attention [3]_). Leading axes broadcast.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    block_size : int, optional
        Keys per block, at most `Nk`; the last may be short. Default: ``ceil(sqrt(Nk))``.
    top_k : int, optional
        Keys, or blocks, seen outside the own block. Default: ``ceil(sqrt(Nk))`` keys, 3 blocks.
        0 leaves block-diagonal attention, and what `always` shows.
    route : int or None, default: 8
        Blocks searched for single keys, the own block not counted. None searches all, which
        makes the selection exact and the time O(Nq Nk).
    select : {"keys", "blocks"}, default: "keys"
        What is chosen: single keys, or whole blocks.
    per : {"query", "block", "group"}, default: "query"
        Who chooses: every query of every query head; the queries of a head whose positions lie
        in one block, together [4]_; or the query heads that share a key head [5]_. Scores are
        then summed over those of them who can choose the block, or the key.
    score : {"mean", "bound", "best"}, default: "mean"
        What a block is chosen by: ``scale * q . mean(keys)``; the sum over channels of the
        larger of the products with the smallest and with the largest such channel of its keys,
        which no score of the block exceeds; or the highest score of the keys that can be chosen,
        in time O(Nq Nk).
    block_scores : array, optional
        Scores of blocks from elsewhere, such as a learned indexer's, real floating, of a shape
        that broadcasts to (..., Hq, Nq, blocks), with ``blocks = ceil(Nk / block_size)``;
        ``-inf`` forbids a block. Heads may also be `Hkv`; with ``per="block"`` there may be a
        row for each block of queries. One row for all who choose together is taken as it is.
    always : arrattn.patterns.Pattern, optional
        What is seen beside the own block, where it is visible at all: sinks, a window, the
        previous block. It does not count among what is chosen.
    mask : array of bool, optional
        True = visible; broadcastable to (..., Hq, Nq, Nk).
    bias : array, optional
        Added to the scores after scale and softcap; real floating, broadcastable to
        (..., Hq, Nq, Nk). ``-inf`` hides the pair.
    is_causal : bool, default: False
        Each query sees the keys up to its own position.
    window : pair of (int or None), optional
        ``(left, right)``: keys visible before and after the query's own position, not
        counting it; None is unlimited.
    kv_lengths : int or array of int, optional
        How many of the keys are real, broadcastable over the batch axes; the rest is
        padding, and the last query then stands at the last real key.
    segment_ids : array of int or pair of them, optional
        ``ids (..., N)`` for both sides or ``(q_ids, k_ids)``: a query sees the keys of its
        own segment.
    pattern : arrattn.patterns.Pattern, optional
        Any other rule of visibility.
    q_offset : int or array of int, optional
        Position of the first query on the key axis, broadcastable over the batch axes.
        Default: ``Nk - Nq``, so that the last query sees the last key; 0 is the top-left
        alignment of torch, JAX and Keras.
    scale : float, optional
        The factor :math:`s`. Default: ``D ** -0.5``.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)`` before bias and visibility.
    sinks : array, shape (Hq,), optional
        One logit for each query head that takes part in the denominator alone.
    return_lse : bool, default: False
        Also return the log-sum-exp of each row's scores.
    return_selection : bool, default: False
        Also return what was chosen.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        Of the library, device and dtype of `q`; lazy if the inputs are. A query that sees
        no key gives exactly 0.
    lse : array, shape (..., Hq, Nq)
        Only with `return_lse`: natural logarithm, at least float32; ``-inf`` (with sinks:
        the sink) where no key is seen.
    selection : array of int, shape (..., Hq, Nq, count)
        Only with `return_selection`, and last: the keys, or the blocks, that were chosen,
        ascending, padded with -1 to `top_k` (or all there are). With ``per="group"`` there are
        Hkv heads; with ``per="block"`` a row for each block that queries lie in, from that of
        the first query on.

    Raises
    ------
    TypeError
        If inputs mix array libraries or devices, or have the wrong kind or dtype.
    ValueError
        If shapes disagree or a number is out of range.

    See Also
    --------
    attention : Every key visible: the limit of ``top_k=Nk, route=None``.
    local_attention : Nearby keys only.
    arrattn.reference.sparse_attention : The defining equations, untiled.

    Notes
    -----
    A block takes part in routing if it holds a key that the query can choose; its mean and its
    bounds are over the finite keys that some query sees. Ties
    go to the lower index, for blocks and for keys. With the default sizes time is
    O(Nq sqrt(Nk) (D + Dv)), working memory that of a tile of queries (its rows
    times ``(route + 1) * block_size`` scores), and a copy of keys and values. A rule of
    visibility that is not an interval of keys for each query (a mask, say, or `Strided`) is asked
    about all pairs in routing. The
    selection itself has no gradient; the scores and values that it leaves do.
    The log-sum-exp is over the keys seen: ``exp(lse - lse_dense)`` is the share of dense
    attention's probability that they hold.

    References
    ----------
    .. [1] Lu et al., MoBA: Mixture of Block Attention, 2025, arXiv:2502.13189.
    .. [2] Gupta et al., Memory-efficient Transformers via Top-k Attention, 2021,
       arXiv:2106.06899.
    .. [3] Ainslie et al., GQA, 2023, arXiv:2305.13245.
    .. [4] Tang et al., Quest: query-aware sparsity for efficient long-context LLM inference,
       2024, arXiv:2406.10774.
    .. [5] Yuan et al., Native Sparse Attention, 2025, arXiv:2502.11089.

    Examples
    --------
    Blocks of two keys; the last query also picks key 0, which matches it best:

    >>> import numpy as np
    >>> from arrattn import sparse_attention
    >>> k = np.array([[[9.0], [0.0], [1.0], [1.0]]])
    >>> q, v = np.ones((1, 4, 1)), np.reshape(np.arange(4.0), (1, 4, 1))
    >>> out = sparse_attention(q, k, v, block_size=2, top_k=1)
    >>> out[0, :, 0].round(3)
    array([0.001, 0.001, 0.002, 0.002])
    """
    call, choice = read_sparse(
        q,
        k,
        v,
        block_size=block_size,
        top_k=top_k,
        route=route,
        select=select,
        per=per,
        score=score,
        block_scores=block_scores,
        always=always,
        return_selection=return_selection,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        window=window,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        pattern=pattern,
        q_offset=q_offset,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
    )
    out, lse, *chosen = attend_selected(call, choice)
    results = call.ungroup(out, lse)[: 2 if return_lse else 1]
    results += tuple(call.ungroup_selection(x) for x in chosen)
    return results if len(results) > 1 else results[0]
