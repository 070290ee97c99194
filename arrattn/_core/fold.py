"""
One tile of the softmax family: score it, hide what is hidden, absorb it.

This step is written once; `engine` and `jobs` say how its loop runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from arrattn._core import loops, online_softmax
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.online_softmax import State
from arrattn._core.tiles import Pairs, group_matmul, hits
from arrattn._core.typing import Array


def adjust(
    call: SoftmaxInputs, s: Array, pairs: Pairs | None, *, scale: float | None = None
) -> Array:
    """Softcap and bias, on scores that hold the scale already unless it is given."""
    if scale is not None:
        s = s * scale
    if call.softcap is not None:
        s = call.softcap * call.xp.tanh(s / call.softcap)
    if call.bias is None or pairs is None:
        return s
    return s + call.xp.astype(pairs.of_pairs(call.bias), s.dtype)


def visible_scores(
    call: SoftmaxInputs,
    q: Array,
    k: Array,
    pairs: Pairs | None,
    finite: bool | None,
    *,
    scale: float | None = None,
) -> Array:
    """
    Scores ``(..., Hkv, G, nq, nk)`` of queries and keys, right where visible.

    Queries are scaled already, unless a `scale` for their products is given.

    Unless the keys are known to be `finite`, numbers that are not are left out of the product
    and the scores of their keys set to NaN: a NaN in a hidden key would otherwise reach the
    gradients of every query of the tile through ``0 * NaN``.
    """
    xp = call.xp
    if finite:
        return adjust(
            call, group_matmul(q, xp.matrix_transpose(k), xp=xp, slot="scores"), pairs, scale=scale
        )
    there = xp.isfinite(k)
    zero, nan = (xp.asarray(x, dtype=k.dtype, device=loops.device_of(k)) for x in (0, math.nan))
    k = xp.where(there, k, zero)
    # The same product as above, for the bits of rows that see none of them.
    s = group_matmul(q, xp.matrix_transpose(k), xp=xp, slot="scores")
    s = adjust(call, s, pairs, scale=scale)
    # XLA compiles a sum, NaN if any term is, in a fraction of the time that it takes for `all`.
    return s + xp.sum(xp.where(there, zero, nan), axis=-1)[..., None, None, :]


def enter(call: SoftmaxInputs, x: Array, *, scale: float | None = None) -> Array:
    """A tile in the accumulation dtype, scaled."""
    x = call.xp.astype(x, call.acc, copy=False)
    return x if scale is None else x * scale


def start(call: SoftmaxInputs, q: Array, k: Array, v: Array) -> State:
    """
    The state of query rows `q` before any key.

    The zeros come from a product over no keys, so that the output depends on q, k and v
    for a library that records gradients, even where every key is hidden.
    """
    xp = call.xp
    q, k, v = (enter(call, x) for x in (q, k[..., :0, :], v[..., :0, :]))
    zeros = group_matmul(group_matmul(q, xp.matrix_transpose(k), xp=xp), v, xp=xp)
    shape = (*call.batch, *q.shape[-4:-1], v.shape[-1])
    return online_softmax.empty(xp.broadcast_to(zeros, shape), call.sinks, xp=xp)


def fold(
    call: SoftmaxInputs,
    state: State | None,
    q: Array,
    k: Array,
    v: Array,
    pairs: Pairs | None,
    *,
    visible: Array | None,
    finite: bool | None,
) -> State:
    """
    Absorb one tile: scaled queries `q`, raw keys and values.

    `visible` is None where every pair of the tile is; `pairs` may be None without a bias.
    """
    known = True if visible is None else finite
    s = visible_scores(call, q, enter(call, k), pairs, known)
    return online_softmax.absorb(state, s, enter(call, v), visible, xp=call.xp, finite=known)


def fold_finite(
    call: SoftmaxInputs,
    state: State,
    q: Array,
    k: Array,
    v: Array,
    pairs: Pairs,
    *,
    visible: Array,
    mark: Callable[[Array], Array],
) -> State:
    """
    `fold` without what is not finite in `v`: the sums of values go through `mark`, to find it.
    """
    xp = call.xp
    s = visible_scores(call, q, enter(call, k), pairs, None)
    v = enter(call, v)
    v = xp.where(xp.isfinite(v), v, 0)
    return online_softmax.absorb_with(
        state, s, visible, lambda p, _: mark(group_matmul(p, v, xp=xp)), xp=xp
    )


def mark_bad(call: SoftmaxInputs, sums: Array, v: Array, visible: Array) -> Array:
    """Sums of values, NaN where a value that is not finite is seen."""
    xp = call.xp
    hit = hits(visible, ~xp.isfinite(v), like=sums, nk=v.shape[-2], xp=xp)
    nan = xp.asarray(math.nan, dtype=sums.dtype, device=loops.device_of(sums))
    return xp.where(hit, nan, sums)


def finish(call: SoftmaxInputs, state: State) -> tuple[Array, Array]:
    """Output and log-sum-exp of a finished state."""
    return online_softmax.finish(state, xp=call.xp)


def all_finite(call: SoftmaxInputs) -> bool | None:
    """Whether keys and values hold no NaN or inf; None where that cannot be known yet."""
    xp = call.xp
    # A sum is finite only if every term is: one pass, and no array of flags.
    totals = (xp.isfinite(xp.sum(x, dtype=call.acc)) for x in (call.k, call.v))
    if not loops.is_concrete(call.k) or not loops.is_concrete(call.v):
        return None
    return all(bool(t) for t in totals)
