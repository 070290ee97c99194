"""Linear attention, all pairs at once and step by step."""

import math
from typing import Any

from array_api_compat import array_namespace

from arrattn import feature_maps
from arrattn._state import LinearState
from arrattn.feature_maps._read import read_map
from arrattn.reference._gates import (
    between,
    decayed_products,
    read_decay,
    to_heads,
    until_end,
)
from arrattn.reference._reading import (
    Array,
    Namespace,
    counts,
    device_of,
    like,
    per_query_head,
    positions,
    ratio,
    read,
    visible_pairs,
    weighted_sum,
)


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    feature_map: Any = feature_maps.elu_plus_one,
    log_decay: Array | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    kv_lengths: Any = None,
    segment_ids: Any = None,
    normalize: bool = True,
    scale: float = 1.0,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> Any:
    r"""
    Linear attention, in its quadratic form [1]_.

    .. math:: o_i = \frac{\phi(q_i)^\top S_0 + \sum_j w_{ij} v_j}
                         {\phi(q_i)^\top z_0 + \sum_j w_{ij}},
              \qquad w_{ij} = \phi(q_i) \cdot \phi(k_j), \; j \text{ visible to } i

    or `scale` times the numerator where `normalize` is False. With decay `g`, summed up to
    :math:`G`, :math:`w_{ij} = \sum_c \phi(q_i)_c \phi(k_j)_c e^{-|G_{ic} - G_{jc}|}`, and the
    initial state fades by :math:`e^{G_{ic}}`.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries.
    k : array, shape (..., Hkv, Nk, D)
        Keys.
    v : array, shape (..., Hkv, Nk, Dv)
        Values; heads of `v` beyond those of `k` share key heads.
    feature_map : FeatureMap, callable or None, default: elu_plus_one
        :math:`\phi`; None is the identity.
    log_decay : array, shape (..., Hkv, Nk) or (..., Hkv, Nk, Dphi), optional
        :math:`g`, at most 0; what broadcasts to the latter is read so.
    is_causal : bool, default: False
        Whether only ``j <= p`` is visible, where ``p = i + Nk - Nq``, or
        ``p = i + kv_lengths - Nq``.
    key_mask : array of bool, shape (..., Nk), optional
        True where a key is there.
    kv_lengths : int or array of int, shape (...), optional
        Number of keys that are there.
    segment_ids : array of int, shape (..., N), or pair of arrays, optional
        Only pairs with the same id are visible.
    normalize : bool, default: True
        Whether the weights of a row are divided by their sum.
    scale : float, default: 1.0
        Factor of the weights.
    initial_state : LinearState, optional
        :math:`S_0` and :math:`z_0`; visible to every query.
    return_state : bool, default: False
        Whether the state after all keys comes along.

    Returns
    -------
    array, shape (..., Hq, Nq, Dv), or tuple of it and a LinearState
        The outputs, and with `return_state` the initial state plus every key that is
        there, whatever its segment.

    References
    ----------
    .. [1] Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236.
    """
    xp = array_namespace(q, k, v)
    q_, k_, v_ = _with_heads(*read(q, k, v, xp), xp)
    f_q, f_k = _features(feature_map, q_, k_, xp, kv_lengths)
    S0, z0 = _initial(initial_state, f_k.phi, v_, q, xp)
    g = read_decay(log_decay, k_, f_k.phi.shape[-1], q, xp)
    there = _there(key_mask, kv_lengths, k_, xp)  # (..., 1, 1, Nk)
    phi_q, log_q = f_q.phi, _log(f_q, xp)
    phi_k, log_k, values, S, z, steps = (
        per_query_head(x, q_, xp, axis)
        for x, axis in [
            (f_k.phi, -3), (_log(f_k, xp), -2), (v_, -3), (S0, -3), (z0, -2), (g, -3),
        ]
    )  # fmt: skip
    shape = (*phi_q.shape[:-1], phi_k.shape[-2])  # (..., Hq, Nq, Nk)
    near = there & visible_pairs(
        shape,
        None,
        None,
        False,
        None,
        kv_lengths,
        segment_ids,
        None,
        None,
        xp=xp,
        on=device_of(q),
    )
    p = positions(shape[-2], shape[-1], kv_lengths, None, xp, device_of(q))
    visible = near & (xp.arange(shape[-1], device=device_of(q)) <= p) if is_causal else near
    products, before = phi_q @ xp.matrix_transpose(phi_k), phi_q
    if log_decay is not None:
        pairs, past = between(steps, near, p, xp)
        products = decayed_products(phi_q, phi_k, pairs, xp)
        before = phi_q * xp.exp(past)

    # phi(k_j) is phi_k exp(log_k): the largest log_k that a row sees, m, leaves both sums.
    seen = xp.where(visible, log_k[..., None, :], -math.inf)
    past = 0.0 if initial_state is not None else -math.inf
    past = xp.full((*shape[:-1], 1), past, dtype=seen.dtype, device=device_of(q))
    m = xp.max(xp.concat([seen, past], axis=-1), axis=-1, keepdims=True)
    m = xp.where(m == -math.inf, 0.0, m)  # (..., Hq, Nq, 1)
    w = xp.where(visible, products * xp.exp(seen - m), 0.0)
    top = weighted_sum(w, values, visible, xp)
    total = xp.sum(w, axis=-1, keepdims=True)
    if initial_state is not None:
        top = top + xp.exp(-m) * (before @ S)
        total = total + xp.exp(-m) * (before @ z[..., None])
    rescale = m + log_q[..., None]
    out = ratio(top, total, xp) if normalize else scale * top * xp.exp(rescale)
    out = like(out, q, xp)
    if not return_state:
        return out

    f = xp.where(there[..., 0, :, None], f_k.phi * xp.exp(_log(f_k, xp))[..., None], 0.0)
    if log_decay is not None:
        left, whole = (xp.exp(x) for x in until_end(g, there[..., 0, :, None], xp))
        f, S0, z0 = f * left, S0 * xp.matrix_transpose(whole), z0 * whole[..., 0, :]
    seen = xp.broadcast_to(there, (*f.shape[:-2], f.shape[-1], f.shape[-2]))
    S = S0 + weighted_sum(xp.matrix_transpose(f), v_, seen, xp)
    return out, _state_like(S, z0 + xp.sum(f, axis=-2), q)


def linear_steps(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    feature_map: Any = feature_maps.elu_plus_one,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    initial_state: LinearState | None = None,
) -> tuple[Array, LinearState]:
    r"""
    Causal linear attention, one token after the other [1]_.

    .. math:: S_t = e^{g_t} S_{t-1} + \phi(k_t) v_t^\top, \quad
              z_t = e^{g_t} z_{t-1} + \phi(k_t), \quad
              o_t = \frac{\phi(q_t)^\top S_t}{\phi(q_t)^\top z_t}

    Parameters
    ----------
    q : array, shape (..., Hq, N, D)
        Queries.
    k : array, shape (..., Hkv, N, D)
        Keys.
    v : array, shape (..., Hkv, N, Dv)
        Values; heads of `v` beyond those of `k` share key heads.
    feature_map : FeatureMap, callable or None, default: elu_plus_one
        :math:`\phi`; None is the identity.
    log_decay : array, shape (..., Hkv, Nk) or (..., Hkv, Nk, Dphi), optional
        :math:`g`, at most 0; what broadcasts to the latter is read so.
    key_mask : array of bool, shape (..., N), optional
        True where a key is there.
    normalize : bool, default: True
        Whether the weights of a row are divided by their sum.
    scale : float, default: 1.0
        Factor of the weights.
    initial_state : LinearState, optional
        What the past left. Default: nothing.

    Returns
    -------
    out : array, shape (..., Hq, N, Dv)
        The outputs.
    state : LinearState
        The state after the last token.

    References
    ----------
    .. [1] Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236.
    """
    xp = array_namespace(q, k, v)
    q_, k_, v_ = _with_heads(*read(q, k, v, xp), xp)
    f_q, f_k = _features(feature_map, q_, k_, xp)
    S, z = _initial(initial_state, f_k.phi, v_, q, xp)
    there = _there(key_mask, None, k_, xp)[..., 0, :, None]  # (..., 1, N, 1)
    phi_k, v_ = xp.where(there, f_k.phi, 0.0), xp.where(there, v_, 0.0)
    log_k = xp.where(there[..., 0], _log(f_k, xp), -math.inf)  # (..., Hkv, N)
    g = xp.where(there, read_decay(log_decay, k_, z.shape[-1], q, xp), 0.0)

    # S and z stand for S exp(m) and z exp(m); m is the largest log_k so far.
    m = xp.full_like(z[..., 0], -math.inf if initial_state is None else 0.0)
    rows = []
    for t in range(q_.shape[-2]):
        larger = xp.maximum(m, log_k[..., t])
        base = xp.where(larger == -math.inf, 0.0, larger)
        shrink = xp.exp((m - base)[..., None] + g[..., t, :])
        enter = xp.exp(log_k[..., t] - base)[..., None]
        S = S * shrink[..., None] + (phi_k[..., t, :] * enter)[..., None] * v_[..., t, None, :]
        z = z * shrink + phi_k[..., t, :] * enter
        m = larger

        phi_t = f_q.phi[..., t : t + 1, :]  # (..., Hq, 1, Dphi)
        top = phi_t @ per_query_head(S, q_, xp)
        total = phi_t @ per_query_head(z[..., None], q_, xp)
        log = _log(f_q, xp)[..., t] + per_query_head(base, q_, xp, axis=-1)
        row = ratio(top, total, xp) if normalize else scale * top * xp.exp(log)[..., None, None]
        rows.append(row)
    none = xp.zeros_like(q_[..., :1]) * per_query_head(v_, q_, xp)
    out = xp.concat(rows, axis=-2) if rows else none
    base = xp.exp(xp.where(m == -math.inf, 0.0, m))[..., None]
    return like(out, q, xp), _state_like(S * base[..., None], z * base, q)


def _there(key_mask: Array | None, kv_lengths: Any, k: Array, xp: Namespace) -> Array:
    """Tell which keys there are, (..., 1, 1, Nk)."""
    j = xp.arange(k.shape[-2], device=device_of(k))
    there = xp.broadcast_to(j >= 0, (*k.shape[:-3], 1, 1, j.shape[0]))
    if kv_lengths is not None:
        there = there & (j < counts(kv_lengths, j.dtype, xp, device_of(k)))
    return there if key_mask is None else there & key_mask[..., None, None, :]


def _with_heads(q: Array, k: Array, v: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Give every value head its own key head, and an output head its query head."""
    k = to_heads(k, v.shape[-3], xp)
    return to_heads(q, max(q.shape[-3], v.shape[-3]), xp), k, v


def _features(feature_map: Any, q: Array, k: Array, xp: Namespace, kv_lengths: Any = None) -> Any:
    """Return the features of queries and of keys."""
    phi = read_map(feature_map)
    if phi.positional:
        at: Any = phi  # only these maps take positions
        p, j = (xp.arange(x.shape[-2], device=device_of(x)) for x in (q, k))
        last = k.shape[-2]
        if kv_lengths is not None:  # (..., 1, 1, 1): beside heads, queries and keys
            last = counts(kv_lengths, j.dtype, xp, device_of(k))[..., 0]
        p = p + (last - q.shape[-2])
        return at.phi_q(q, xp, positions=p), at.phi_k(k, xp, positions=j)
    return phi.phi_q(q, xp), phi.phi_k(k, xp)


def _log(features: feature_maps.Features, xp: Namespace) -> Array:
    """Return the logarithms beside the features, 0 where there are none."""
    if features.log is not None:
        return features.log
    shape = features.phi.shape[:-1]
    return xp.zeros(shape, dtype=features.phi.dtype, device=device_of(features.phi))


def _initial(
    state: LinearState | None, phi_k: Array, v: Array, q: Array, xp: Namespace
) -> tuple[Array, Array]:
    """Return the sums to start from, zeros where none are given."""
    shape = (*phi_k.shape[:-2], phi_k.shape[-1])  # (..., Hkv, Dphi)
    zeros = xp.zeros((*shape, v.shape[-1]), dtype=v.dtype, device=device_of(v))
    if state is None:
        return zeros, xp.zeros(shape, dtype=v.dtype, device=device_of(v))
    S, z = (x[None, ...] if q.ndim == 2 else x for x in state)
    S = xp.broadcast_to(xp.astype(S, v.dtype), zeros.shape)
    return S, xp.broadcast_to(xp.astype(z, v.dtype), shape)


def _state_like(S: Array, z: Array, q: Array) -> LinearState:
    """Drop the head axis where `q` has none."""
    return LinearState(S[0, :, :], z[0, :]) if q.ndim == 2 else LinearState(S, z)
