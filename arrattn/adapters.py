"""
Functions with exactly the semantics of operators that other standards define.

For those who write a runtime and want a reference, or have a graph and want to run it: the
operator's own layouts, defaults and rules, on any array library.
"""

from __future__ import annotations

from arrattn import delta, linear
from arrattn._core import inputs, packed
from arrattn._core.typing import Array
from arrattn._state import DeltaState

__all__ = ["onnx_linear_attention"]


def onnx_linear_attention(
    query: Array,
    key: Array,
    value: Array,
    past_state: Array | None = None,
    decay: Array | None = None,
    beta: Array | None = None,
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
    chunk_size: int = 64,
) -> tuple[Array, Array]:
    r"""
    Compute the ONNX operator LinearAttention, which is in the standard from opset 27 [1]_.

    .. math:: S_t = e^{g_t} S_{t-1} + k_t u_t^\top, \qquad o_t = s\, S_t^\top q_t

    with :math:`u_t = v_t` for the rules "linear" (without `g`) and "gated", and :math:`u_t =
    \beta_t (v_t - e^{g_t} S_{t-1}^\top k_t)` for "delta" (without `g`) and "gated_delta".

    Parameters
    ----------
    query : array, shape (B, T, q_num_heads * d_k)
        Queries, the heads packed into the last axis.
    key : array, shape (B, T, kv_num_heads * d_k)
        Keys.
    value : array, shape (B, T, kv_num_heads * d_v)
        Values.
    past_state : array, shape (B, kv_num_heads, d_k, d_v), optional
        The state to start from, of any floating dtype. Default: zeros.
    decay : array, shape (B, T, kv_num_heads) or (B, T, kv_num_heads * d_k), optional
        :math:`g`, natural logarithm; needed by "gated" and "gated_delta", and only by them.
        The operator sets no bound: values above 0 grow the state.
    beta : array, shape (B, T, kv_num_heads) or (B, T, 1), optional
        Needed by "delta" and "gated_delta", and only by them.
    q_num_heads : int
        Query heads, a multiple of the key heads; they share them in groups.
    kv_num_heads : int
        Heads of keys, values and states.
    scale : float, default: 0.0
        The factor :math:`s`; 0 stands for ``d_k ** -0.5``.
    update_rule : {"linear", "gated", "delta", "gated_delta"}, default: "gated_delta"
        How the state changes.
    chunk_size : int, default: 64
        The operator's hint for speed; it has no effect here, nor on the results anywhere.

    Returns
    -------
    output : array, shape (B, T, q_num_heads * d_v)
        In the dtype of `query`.
    present_state : array, shape (B, kv_num_heads, d_k, d_v)
        In the dtype of `past_state`, or, without it, of `query`.

    Raises
    ------
    TypeError
        If inputs mix array libraries or devices, or are not of the kinds above.
    ValueError
        If shapes disagree, or an input is missing or given beside a rule without it.

    See Also
    --------
    arrattn.linear_attention : The rules "linear" and "gated", and more.
    arrattn.delta_attention : The rules "delta" and "gated_delta", and more.

    Notes
    -----
    Sums are taken in at least float32, and rounded once at the end.

    References
    ----------
    .. [1] ONNX, operator LinearAttention, since version 27.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.adapters import onnx_linear_attention
    >>> x = np.ones((1, 3, 2))  # one item, three tokens, two heads of width 1
    >>> out, state = onnx_linear_attention(
    ...     x, x, x, update_rule="linear", q_num_heads=2, kv_num_heads=2
    ... )
    >>> out[0, :, 0], state.shape
    (array([1., 2., 3.]), (1, 2, 1, 1))
    """
    function = "onnx_linear_attention"
    given = {"query": query, "key": key, "value": value}
    given |= {"past_state": past_state, "decay": decay, "beta": beta}
    x = packed.read_packed(
        function,
        given,
        q_num_heads=q_num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        update_rule=update_rule,
        chunk_size=chunk_size,
    )
    shared = {"kv_lengths": None, "segment_ids": None, "key_mask": None}
    if x.beta is None:
        state = None if x.state is None else packed.without_normaliser(x.state)
        read = linear.read_call(
            x.q,
            x.k,
            x.v,
            feature_map=None,
            log_decay=x.decay,
            is_causal=True,
            normalize=False,
            scale=x.scale,
            initial_state=state,
            return_state=True,
            growing=True,
            **shared,
        )
        out, after = linear.attend(*read)
        S = after.S
    else:
        call = inputs.read_delta(
            function,
            x.q,
            x.k,
            x.v,
            beta=x.beta,
            log_decay=x.decay,
            scale=x.scale,
            initial_state=None if x.state is None else DeltaState(x.state),
            return_state=True,
            growing=True,
            **shared,
        )
        out, (S,) = delta.attend(call, padded=False)
    return packed.pack(out, S, query, past_state)
