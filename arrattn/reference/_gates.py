"""Decay and writing strengths, as the equations use them."""

from typing import Any

from arrattn.reference._reading import Array, Namespace, device_of


def read_decay(log_decay: Array | None, k: Array, width: int, q: Array, xp: Namespace) -> Any:
    """Read decay as (..., Hv, Nk, width or 1); 0 where none is given."""
    heads, n = k.shape[-3:-1]
    if log_decay is None:
        return xp.zeros_like(k[..., :1])
    g = xp.astype(log_decay, k.dtype)
    g = g[None, ...] if q.ndim == 2 else g
    by_channel = g.ndim > 2 and g.shape[-1] in (1, width) and g.shape[-2] in (1, n)
    by_channel = by_channel and g.shape[-3] in (1, heads)
    g = g if by_channel else g[..., None]
    g = xp.where(g < -1e4, -1e4, g)  # differences of -inf are no numbers; this is 0 as well
    return xp.broadcast_to(g, (*k.shape[:-1], g.shape[-1]))


def between(g: Array, passes: Array, p: Array, xp: Namespace) -> tuple[Array, Array]:
    r"""
    Sum decay over the tokens between queries and keys that lie in one segment.

    Parameters
    ----------
    g : array, shape (..., H, Nk, E)
        Logarithms.
    passes : array of bool, shape (..., H, Nq, Nk)
        Whether a token lets time pass for a query: it is there, in the query's segment.
    p : array of int, shape (..., 1, Nq, 1)
        Positions of the queries.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    pairs : array, shape (..., H, Nq, Nk, E)
        :math:`-|G_p - G_j|`.
    past : array, shape (..., H, Nq, E)
        :math:`G_p`, what is left of all that was before the first key.
    """
    t = xp.arange(g.shape[-2], device=device_of(g))
    j, p = t[:, None], p[..., None]
    gap = ((j < t) & (t <= p)) | ((p < t) & (t <= j))  # (..., 1, Nq, Nk, Nk)
    # Sums over what lies between, not differences of sums, which would cancel.
    pairs = xp.astype(gap & passes[..., None, :], g.dtype) @ g[..., None, :, :]
    past = xp.astype((t <= p[..., 0]) & passes, g.dtype) @ g
    return pairs, past


def until_end(g: Array, there: Array, xp: Namespace) -> tuple[Array, Array]:
    """Sum decay over the tokens after each key, and over all of them; (..., H, Nk, E)."""
    g = xp.where(there, g, 0.0)
    t = xp.arange(g.shape[-2], device=device_of(g))
    return xp.astype(t > t[:, None], g.dtype) @ g, xp.sum(g, axis=-2, keepdims=True)


def decayed_products(q: Array, k: Array, pairs: Array, xp: Namespace) -> Array:
    """Sum ``q_i k_j`` over the features, each with its own decay, (..., H, Nq, Nk)."""
    return xp.sum(q[..., :, None, :] * k[..., None, :, :] * xp.exp(pairs), axis=-1)


def to_heads(x: Array, heads: int, xp: Namespace) -> Array:
    """Hand each of `heads` its own of the heads of `x`, (..., H, N, D)."""
    h = xp.arange(heads, device=device_of(x)) * x.shape[-3] // max(heads, 1)
    return xp.take(x, h, axis=-3)
