"""Local attention: each query sees the keys near it."""

from __future__ import annotations

from arrattn._core.engine import attend
from arrattn._core.inputs import read_local
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

__all__ = ["local_attention"]


def local_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    window: tuple[int | None, int | None],
    mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
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
    Softmax attention in which each query sees only nearby keys [1]_.

    .. math:: o_i = \sum_{j \in N(i)} \frac{\exp(s\, q_i \cdot k_j)}
              {\sum_{j' \in N(i)} \exp(s\, q_i \cdot k_{j'})} v_j,
              \qquad N(i) = \{\, j : p_i - \ell \le j \le p_i + r \,\}

    with `p` the query's position. Key tiles outside the window are never read, so time
    grows with the window and not with `Nk`. It equals ``attention(..., window=window)``.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating; 2-D arrays mean one head and no batch.
    k : array, shape (..., Hkv, Nk, D)
        Keys; `Hq` is a multiple of `Hkv`, and query head `h` reads key head
        ``h // (Hq // Hkv)`` (grouped-query attention [3]_). Leading axes broadcast.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    window : pair of (int or None)
        ``(left, right)``: keys visible before and after the query's own position, not
        counting it; None is unlimited. A window of k keys is ``(k // 2, k // 2)``.
    mask : array of bool, optional
        True = visible; broadcastable to (..., Hq, Nq, Nk).
    bias : array, optional
        Added to the scores after scale and softcap; real floating, broadcastable to
        (..., Hq, Nq, Nk). ``-inf`` hides the pair.
    is_causal : bool, default: False
        Each query sees the keys up to its own position.
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
    attention : Every key visible.
    arrattn.patterns.Window : The same window, to combine with other patterns.
    arrattn.reference.local_attention : The defining equation, untiled.

    Notes
    -----
    Time O(Nq (left + right + tile) (D + Dv)); working memory is that of
    `attention`. Tiles are folded with the online softmax [2]_ in at least float32. Other libraries'
    windows::

        jax.nn.dot_product_attention(local_window_size=(l, r)) -> window=(l, r), q_offset=0
        flash_attn_func(window_size=(l, r))                    -> window=(l, r), -1 is None

    References
    ----------
    .. [1] Beltagy et al., Longformer, 2020, arXiv:2004.05150.
    .. [2] Milakov & Gimelshein, Online normalizer calculation for softmax, 2018,
       arXiv:1805.02867.
    .. [3] Ainslie et al., GQA, 2023, arXiv:2305.13245.

    Examples
    --------
    With equal scores each query averages itself and the key before it:

    >>> import numpy as np
    >>> from arrattn import local_attention
    >>> q = k = np.zeros((1, 4, 2))
    >>> v = np.reshape(np.arange(4.0), (1, 4, 1))
    >>> local_attention(q, k, v, window=(1, 0))[0, :, 0]
    array([0. , 0.5, 1.5, 2.5])
    """
    call = read_local(
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
    )
    out, lse = call.ungroup(*attend(call))
    return (out, lse) if return_lse else out
