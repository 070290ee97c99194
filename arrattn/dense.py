"""Dense attention: every query may see every key."""

from __future__ import annotations

from arrattn._core import native, small_heads
from arrattn._core.engine import attend
from arrattn._core.inputs import read_softmax
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

__all__ = ["attention"]


def attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
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
    engine: str = "auto",
) -> Array | tuple[Array, Array]:
    r"""
    Softmax attention [1]_, exact, in memory that does not grow with Nq * Nk.

    .. math:: o_i = \frac{\sum_j \exp(s_{ij})\, v_j}{\sum_j \exp(s_{ij})},
              \qquad s_{ij} = s\, q_i \cdot k_j

    over the keys `j` that query `i` sees. Everything that limits visibility (`mask`,
    `is_causal`, `window`, `kv_lengths`, `segment_ids`, `pattern`, a `bias` of ``-inf``)
    intersects. What a hidden key or value holds never matters, NaN included.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating; 2-D arrays mean one head and no batch.
    k : array, shape (..., Hkv, Nk, D)
        Keys; `Hq` is a multiple of `Hkv`, and query head `h` reads key head
        ``h // (Hq // Hkv)`` (grouped-query attention [3]_). Leading axes broadcast.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
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
    engine : {'auto', 'tiles', 'native'}, default: 'auto'
        What computes: our tiles, on every library; the library's own fused kernel, refused
        with every reason where it cannot do what this page says; or that kernel where it can
        and is expected to be no slower. `explain` says which, and why. It changes rounding,
        never meaning.

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
        If shapes disagree or a number is out of range, or where ``engine='native'`` cannot
        do this call.

    See Also
    --------
    local_attention : Only keys near the query.
    sparse_attention : The query's own block and the best keys elsewhere.
    linear_attention : Kernel feature maps in place of the exponential.
    merge : Combine results over parts of the keys.
    explain : Which path a call takes, and why.
    arrattn.reference.softmax_attention : The defining equation, untiled.

    Notes
    -----
    Query `i` stands at position ``i + q_offset``, key `j` at `j`. Tiles of scores are
    folded with the online softmax [2]_ in at least float32, and tiles in which nothing is
    visible are not computed. Time O(Nq Nk (D + Dv)) over the visible tiles; working
    memory beyond inputs and output is one tile for each worker on NumPy; other libraries
    also copy inputs or output, O(N), while they work.

    The one fused kernel in use is that of ``torch.nn.functional.scaled_dot_product_attention``
    on a CPU. It has no second derivative: for ``create_graph=True`` with torch give
    ``engine='tiles'``. Its gradients take memory O(N), those of the tiles O(N^2).

    References
    ----------
    .. [1] Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762.
    .. [2] Milakov & Gimelshein, Online normalizer calculation for softmax, 2018,
       arXiv:1805.02867; applied as in FlashAttention-2, arXiv:2307.08691.
    .. [3] Ainslie et al., GQA, 2023, arXiv:2305.13245.

    Examples
    --------
    With equal scores each query averages what it sees:

    >>> import numpy as np
    >>> from arrattn import attention
    >>> q = k = np.zeros((1, 4, 2))
    >>> v = np.reshape(np.arange(4.0), (1, 4, 1))
    >>> attention(q, k, v, is_causal=True)[0, :, 0]
    array([0. , 0.5, 1. , 1.5])
    """
    bare = mask is bias is window is kv_lengths is segment_ids is pattern is None
    bare = bare and q_offset is scale is softcap is sinks is None
    if bare and isinstance(is_causal, bool) and return_lse is False and engine == "auto":
        # What a small call costs is its checks.
        out = None if is_causal else small_heads.at_once(q, k, v)
        out = native.at_once(q, k, v, is_causal) if out is None else out
        if out is not None:
            return out
    call = read_softmax(
        "attention",
        q,
        k,
        v,
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
        engine=engine,
    )
    out, lse = call.ungroup(*attend(call))
    return (out, lse) if return_lse else out
