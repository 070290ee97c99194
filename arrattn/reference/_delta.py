"""The delta rule, all pairs at once and step by step."""

from typing import Any

from array_api_compat import array_namespace

from arrattn._state import DeltaState
from arrattn.reference._gates import between, decayed_products, read_decay, to_heads, until_end
from arrattn.reference._reading import (
    Array,
    Namespace,
    counts,
    device_of,
    like,
    positions,
    read,
    weighted_sum,
)


def delta_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    beta: Array,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    scale: float = 1.0,
    initial_state: DeltaState | None = None,
    return_state: bool = False,
) -> Any:
    r"""
    The gated delta rule [1]_, in its quadratic form.

    .. math:: u_i = \beta_i \Big(v_i - (e^{G_i} \odot k_i)^\top S_0
                    - \sum_{j < i} a_{ij} u_j\Big), \qquad
              a_{ij} = \sum_c k_{ic} k_{jc}\, e^{G_{ic} - G_{jc}}

    .. math:: o_i = s\, (e^{G_p} \odot q_i)^\top S_0 + s \sum_{j \le p}
                    \Big(\sum_c q_{ic} k_{jc}\, e^{G_{pc} - G_{jc}}\Big) u_j

    where :math:`G` sums the decay `g` up to a position, `p` is that of query `i`, and `j`
    lies in the same segment.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hv, Nk, Dv)
        Values; heads of `v` beyond those of `k` share key heads.
    beta : array, shape (..., Hv, Nk)
        How much of a correction is written.
    log_decay : array, shape (..., Hv, Nk) or (..., Hv, Nk, D), optional
        :math:`g`, at most 0; what broadcasts to the latter is read so.
    key_mask : array of bool, shape (..., Nk), optional
        True where a key is there.
    kv_lengths : int or array of int, shape (...), optional
        Number of keys that are there; then ``p = i + kv_lengths - Nq``.
    segment_ids : array of int, shape (..., N), or pair of arrays, optional
        Every segment has a memory of its own.
    scale : float, default: 1.0
        Factor of the outputs.
    initial_state : DeltaState, optional
        :math:`S_0`.
    return_state : bool, default: False
        Whether the memory after the last key comes along.

    Returns
    -------
    array, shape (..., Hq, Nq, Dv), or tuple of it and a DeltaState
        The outputs, and with `return_state` the memory.

    References
    ----------
    .. [1] Yang et al., Gated delta networks, 2024, arXiv:2412.06464.
    """
    xp = array_namespace(q, k, v)
    q_, k_, v_ = read(q, k, v, xp)
    k_, heads = to_heads(k_, v_.shape[-3], xp), max(q_.shape[-3], v_.shape[-3])
    nq, nk, on = q_.shape[-2], k_.shape[-2], device_of(q)
    j = xp.arange(nk, device=on)
    there = _there(key_mask, kv_lengths, k_, xp)  # (..., 1, Nk, 1)
    k_, v_ = xp.where(there, k_, 0.0), xp.where(there, v_, 0.0)
    b = xp.where(there[..., 0], _beta(beta, k_, q, xp), 0.0)
    g = xp.where(there, read_decay(log_decay, k_, k_.shape[-1], q, xp), 0.0)
    S0 = _initial(initial_state, k_, v_, q, xp)

    same, near = _segments(segment_ids, nq, nk, xp, on)
    pairs, past = between(g, xp.broadcast_to(same, (*k_.shape[:-1], nk)), j[:, None], xp)
    earlier = same & (j[None, :] < j[:, None])
    a = xp.where(earlier, decayed_products(k_, k_, pairs, xp), 0.0)  # (..., Hv, Nk, Nk)
    told = v_ - (k_ * xp.exp(past)) @ S0
    u = xp.zeros_like(v_)
    for i in range(nk):
        row = slice(i, i + 1)
        seen = xp.broadcast_to(earlier[..., row, :], (*k_.shape[:-2], 1, nk))
        known = weighted_sum(a[..., row, :], u, seen, xp)
        new = b[..., row, None] * (told[..., row, :] - known)
        u = xp.where((j == i)[:, None], new, u)

    p = positions(nq, nk, kv_lengths, None, xp, on)
    q_ = to_heads(q_, heads, xp)
    k_q, u_q, g_q, S_q = (to_heads(x, heads, xp) for x in (k_, u, g, S0))
    near = xp.broadcast_to(near, (*q_.shape[:-1], nk))
    pairs, past = between(g_q, near, p, xp)
    visible = near & (j <= p)
    w = xp.where(visible, decayed_products(q_, k_q, pairs, xp), 0.0)
    out = weighted_sum(w, u_q, visible, xp) + (q_ * xp.exp(past)) @ S_q
    out = like(scale * out, q, xp)
    if not return_state:
        return out

    left, whole = (xp.exp(x) for x in until_end(g, there, xp))
    S = S0 * xp.matrix_transpose(whole) + xp.matrix_transpose(k_ * left) @ u
    return out, _state_like(S, q)


def delta_steps(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    beta: Array,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    scale: float = 1.0,
    initial_state: DeltaState | None = None,
) -> tuple[Array, DeltaState]:
    r"""
    The gated delta rule, one token after the other [1]_.

    .. math:: S \leftarrow e^{g_t} S, \qquad u = \beta_t (v_t - S^\top k_t), \qquad
              S \leftarrow S + k_t u^\top, \qquad o_t = s\, S^\top q_t

    Parameters
    ----------
    q : array, shape (..., Hq, N, D)
        Queries.
    k : array, shape (..., Hkv, N, D)
        Keys.
    v : array, shape (..., Hv, N, Dv)
        Values; heads of `v` beyond those of `k` share key heads.
    beta : array, shape (..., Hv, N)
        How much of a correction is written.
    log_decay : array, shape (..., Hv, N) or (..., Hv, N, D), optional
        :math:`g`, at most 0; what broadcasts to the latter is read so.
    key_mask : array of bool, shape (..., N), optional
        True where a key is there.
    scale : float, default: 1.0
        Factor of the outputs.
    initial_state : DeltaState, optional
        What the past left. Default: nothing.

    Returns
    -------
    out : array, shape (..., Hq, N, Dv)
        The outputs.
    state : DeltaState
        The memory after the last token.

    References
    ----------
    .. [1] Yang et al., Gated delta networks, 2024, arXiv:2412.06464.
    """
    xp = array_namespace(q, k, v)
    q_, k_, v_ = read(q, k, v, xp)
    k_, heads = to_heads(k_, v_.shape[-3], xp), max(q_.shape[-3], v_.shape[-3])
    there = _there(key_mask, None, k_, xp)
    k_, v_ = xp.where(there, k_, 0.0), xp.where(there, v_, 0.0)
    b = xp.where(there[..., 0], _beta(beta, k_, q, xp), 0.0)[..., None]
    g = xp.where(there, read_decay(log_decay, k_, k_.shape[-1], q, xp), 0.0)
    q_, S = to_heads(q_, heads, xp), _initial(initial_state, k_, v_, q, xp)
    rows = []
    for t in range(k_.shape[-2]):
        token = slice(t, t + 1)
        S = xp.exp(xp.matrix_transpose(g[..., token, :])) * S
        u = b[..., token, :] * (v_[..., token, :] - k_[..., token, :] @ S)
        S = S + xp.matrix_transpose(k_[..., token, :]) @ u
        rows.append(scale * (q_[..., token, :] @ to_heads(S, heads, xp)))
    none = q_[..., :0, :1] * to_heads(v_, heads, xp)[..., :0, :]
    out = xp.concat(rows, axis=-2) if rows else none
    return like(out, q, xp), _state_like(S, q)


def _there(key_mask: Array | None, kv_lengths: Any, k: Array, xp: Namespace) -> Array:
    """Tell which keys there are, (..., 1, Nk, 1)."""
    j = xp.arange(k.shape[-2], device=device_of(k))
    there = xp.broadcast_to(j >= 0, (*k.shape[:-3], 1, j.shape[0]))[..., None]
    if kv_lengths is not None:
        there = there & (j[:, None] < counts(kv_lengths, j.dtype, xp, device_of(k)))
    return there if key_mask is None else there & key_mask[..., None, :, None]


def _beta(beta: Array, k: Array, q: Array, xp: Namespace) -> Array:
    """Read `beta` as (..., Hv, Nk)."""
    b = xp.astype(beta, k.dtype)
    return xp.broadcast_to(b[None, ...] if q.ndim == 2 else b, k.shape[:-1])


def _segments(ids: Any, nq: int, nk: int, xp: Namespace, on: Any) -> tuple[Array, Array]:
    """Tell which keys share a segment with a key, and with a query, (..., 1, n, Nk)."""
    if ids is None:
        keys, queries = (xp.ones((n, nk), dtype=xp.bool, device=on) for n in (nk, nq))
        return keys, queries
    q_ids, k_ids = ids if isinstance(ids, tuple | list) else (ids, ids)
    keys, queries = (x[..., None, :, None] == k_ids[..., None, None, :] for x in (k_ids, q_ids))
    return keys, queries


def _initial(state: DeltaState | None, k: Array, v: Array, q: Array, xp: Namespace) -> Array:
    """Give the memory to start from, zeros where none is given."""
    shape = (*k.shape[:-2], k.shape[-1], v.shape[-1])
    if state is None:
        return xp.zeros(shape, dtype=v.dtype, device=device_of(v))
    S = state.S[None, ...] if q.ndim == 2 else state.S
    return xp.broadcast_to(xp.astype(S, v.dtype), shape)


def _state_like(S: Array, q: Array) -> DeltaState:
    """Drop the head axis where `q` has none."""
    return DeltaState(S[0, :, :] if q.ndim == 2 else S)
