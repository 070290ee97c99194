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
) -> Array | tuple[Array, Array]:
    r"""
    Softmax attention over the query's own block and the best `top_k` keys elsewhere.

    .. math:: o_i = \sum_{j \in B(i) \cup T(i)} \frac{\exp(s_{ij})}
              {\sum_{j' \in B(i) \cup T(i)} \exp(s_{ij'})} v_j

    Keys are cut into blocks of `block_size`. `B` is the block in which the query's
    position lies (none, if it lies outside the keys); `T` the `top_k` visible keys outside
    it with the highest scores, among the `route` blocks whose mean key scores best against
    the query [1]_ [2]_. Both are chosen for every query of every query head, and only among
    what is visible: everything that limits visibility intersects, as in `attention`.

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
        Keys per block; the last may be short. Default: ``ceil(sqrt(Nk))``.
    top_k : int, optional
        Keys seen outside the own block. Default: ``ceil(sqrt(Nk))``. 0 leaves
        block-diagonal attention.
    route : int or None, default: 8
        Blocks searched for each query, the own block not counted. None searches all, which
        makes the selection exact and the time O(Nq Nk).
    select : {"keys"}, default: "keys"
        What is chosen: single keys.
    per : {"query"}, default: "query"
        For whom: every query of every query head on its own.
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

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        Of the library, device and dtype of `q`; lazy if the inputs are. A query that sees
        no key gives exactly 0.
    lse : array, shape (..., Hq, Nq)
        Only with `return_lse`: natural logarithm, at least float32; ``-inf`` (with sinks:
        the sink) where no key is seen.

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
    A block takes part in routing if it holds a key that the query sees; its mean is over the
    finite keys that some query sees, and its score is ``q . mean`` times the sign of `scale`. Ties
    go to the lower index, for blocks and for keys. With the default sizes time is
    O(Nq sqrt(Nk) (D + Dv)), working memory that of a tile of queries (its rows
    times ``(route + 1) * block_size`` scores), and a copy of keys and values. The
    selection itself has no gradient; the scores and values that it leaves do.
    The log-sum-exp is over the keys seen: ``exp(lse - lse_dense)`` is the share of dense
    attention's probability that they hold.

    References
    ----------
    .. [1] Lu et al., MoBA: Mixture of Block Attention, 2025, arXiv:2502.13189.
    .. [2] Gupta et al., Memory-efficient Transformers via Top-k Attention, 2021,
       arXiv:2106.06899.
    .. [3] Ainslie et al., GQA, 2023, arXiv:2305.13245.

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
    out, lse = call.ungroup(*attend_selected(call, choice))
    return (out, lse) if return_lse else out
