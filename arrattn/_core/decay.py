"""
What decay leaves of the past, from logarithms that are only ever summed, never subtracted.

The logarithm between two tokens is the sum over the steps between them. A difference of
sums from the beginning would lose a slow decay behind a fast one, and a quotient of their
exponentials would overflow; sums of what is at most 0 do neither.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from arrattn._core import loops
from arrattn._core.typing import Array, Namespace

#: No decay is faster than this: its exponential is 0 in every dtype.
FASTEST = -1e4

#: The logarithm of a step from one segment into the next, beyond all sums of decays.
RESET = -1e30


class Gates(NamedTuple):
    """
    Decay of chunks of tokens: `steps`, the same for all features, and what is beyond them.

    Of decay that differs by feature, `steps` is the slowest one of each token and `beyond`
    the rest, at most 0 too. A segment's first token has `RESET` in `steps`.
    """

    steps: Array  # (..., c, 1)
    beyond: Array | None  # (..., c, Dphi)


def read_steps(decay: Array, xp: Namespace) -> Gates:
    """Split decay ``(..., N, 1 or Dphi)`` into `Gates`."""
    decay = xp.where(decay < FASTEST, FASTEST, decay)
    if decay.shape[-1] == 1:
        return Gates(decay, None)
    slowest = loops.stop_gradient(xp.max(decay, axis=-1, keepdims=True))
    return Gates(slowest, decay - slowest)


def at_or_before(size: int, like: Array, *, strict: bool, xp: Namespace) -> Array:
    """Ones (size, size) where the column is at or before the row, or, if `strict`, before it."""
    t = xp.arange(size, device=loops.device_of(like))
    seen = t[None, :] < t[:, None] if strict else t[None, :] <= t[:, None]
    return xp.astype(seen, like.dtype)


def between(steps: Array, xp: Namespace) -> Array:
    """``(..., c, 1)`` -> ``(..., c, c)``: the sum over the steps after `j` through `i`."""
    return loops.running_sums(
        steps * at_or_before(steps.shape[-2], steps, strict=True, xp=xp), xp=xp
    )


def until_end(steps: Array, xp: Namespace) -> Array:
    """``(..., c, E)``: the sum over the steps after each one."""
    later = xp.concat([steps[..., 1:, :], xp.zeros_like(steps[..., :1, :])], axis=-2)
    return xp.flip(loops.running_sums(xp.flip(later, axis=-2), xp=xp), axis=-2)


def logs(steps: Array, xp: Namespace) -> Array:
    """Sums of steps as logarithms of weights: ``-inf`` across a reset."""
    return xp.where(steps < RESET / 2, -math.inf, steps)


def products(rows: Array, keys: Array, beyond: Array | None, xp: Namespace) -> Array:
    """
    ``sum_d rows_id keys_jd exp(sum of beyond_d after j through i)`` for ``j <= i``.

    Where features decay alike, `beyond` is None, this is a product of matrices. Otherwise a
    chunk is halved: between its halves, decay goes from the key to the middle and from there
    to the row, and both factors are at most 1; within each half, the same again.

    Parameters
    ----------
    rows : array, shape (..., R, c, Dphi)
        Several rows for each token; `c` is a power of two.
    keys : array, shape (..., c, Dphi)
        Keys.
    beyond : array, shape (..., c, Dphi), or None
        Logarithms, at most 0.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    array, shape (..., R, c, c)
        The products; entries with ``j > i`` mean nothing.
    """
    if beyond is None:
        *lead, r, c, d = rows.shape
        flat = xp.reshape(rows, (*lead, r * c, d)) @ xp.matrix_transpose(keys)
        return xp.reshape(flat, (*flat.shape[:-2], r, c, c))
    c = keys.shape[-2]
    if c == 1:
        return xp.sum(rows * keys[..., None, :, :], axis=-1, keepdims=True)
    h = c // 2
    halves = products(_halves(rows, xp), _halves(keys, xp), _halves(beyond, xp), xp)
    to_middle = xp.exp(until_end(beyond[..., :h, :], xp))
    from_middle = xp.exp(loops.running_sums(beyond[..., h:, :], xp=xp))
    near = rows[..., h:, :] * from_middle[..., None, :, :]
    far = keys[..., :h, :] * to_middle
    across = near @ xp.matrix_transpose(far)[..., None, :, :]
    return lower(halves[0, ...], across, halves[1, ...], xp)


def _halves(x: Array, xp: Namespace) -> Array:
    """Cut the last axis but one in two, and stack the halves."""
    h = x.shape[-2] // 2
    return xp.stack([x[..., :h, :], x[..., h:, :]])


def lower(first: Array, below: Array, second: Array, xp: Namespace) -> Array:
    """The lower triangular matrix of these three blocks."""
    top = xp.concat([first, xp.zeros_like(below)], axis=-1)
    return xp.concat([top, xp.concat([below, second], axis=-1)], axis=-2)


def inverse(x: Array, xp: Namespace) -> Array:
    """
    Invert ``1 + x``, `x` (..., c, c) strictly lower triangular, `c` a power of two.

    By halves, which is as stable as solving row by row; no powers of `x` are formed.
    """
    c = x.shape[-1]
    if c <= 2:
        return xp.eye(c, dtype=x.dtype, device=loops.device_of(x)) - x
    h = c // 2
    halves = inverse(xp.stack([x[..., :h, :h], x[..., h:, h:]]), xp)
    first, second = halves[0, ...], halves[1, ...]
    return lower(first, -(second @ (x[..., h:, :h] @ first)), second, xp)
