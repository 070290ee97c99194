"""
The online softmax: absorb score tiles in any order, merge parts, finish once.

The state is that of Milakov & Gimelshein (arXiv:1805.02867) as FlashAttention-2
(arXiv:2307.08691, section 3.1) arranges it: the division comes last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from arrattn._core import loops, workspace
from arrattn._core.tiles import weigh
from arrattn._core.typing import Array, Namespace


class State(NamedTuple):
    """Running maximum `m` and sum `l`, ``(..., nq, 1)``, and sum of values `o` (..., nq, Dv)."""

    m: Array
    l: Array  # noqa: E741
    o: Array


def empty(o: Array, sinks: Array | None, *, xp: Namespace) -> State:
    """
    The state before any key: zeros `o`, and the sinks ``(Hkv, G, 1, 1)`` in the sum.
    """
    device = loops.device_of(o)
    shape = (*o.shape[:-1], 1)
    if sinks is None:
        m = xp.full(shape, -math.inf, dtype=o.dtype, device=device)
        return State(m, xp.zeros(shape, dtype=o.dtype, device=device), o)
    constant = loops.stop_gradient(sinks)
    m = xp.broadcast_to(constant, shape)
    return State(m, xp.broadcast_to(xp.exp(sinks - _finite(constant, xp=xp)), shape), o)


def absorb(
    state: State | None,
    s: Array,
    v: Array,
    visible: Array | None,
    *,
    xp: Namespace,
    finite: bool | None,
) -> State:
    """
    Add a tile of scores ``(..., nq, nk)`` and its values to the state, None before any.

    `finite` says whether `v` is known to be finite.
    """

    def weighted(p: Array, seen: Array | None) -> Array:
        slot = None if state is None else "values"
        return weigh(p, v, seen, xp=xp, finite=finite, slot=slot)

    return absorb_with(state, s, visible, weighted, xp=xp)


def absorb_with(
    state: State | None,
    s: Array,
    visible: Array | None,
    weighted: Callable[[Array, Array | None], Array],
    *,
    xp: Namespace,
) -> State:
    """
    Add a tile of scores whose values are summed by ``weighted(p, visible)``.

    Hidden scores leave the sum. `s` is used up.
    """
    if visible is not None:
        s = workspace.hide(s, visible, xp=xp)
    # The result does not depend on the maximum, so gradients need not pass through it.
    top = loops.stop_gradient(xp.max(s, axis=-1, keepdims=True))
    m = top if state is None else xp.maximum(state.m, top)
    shift = _finite(m, xp=xp)
    p = workspace.exp_shifted(s, shift, xp=xp)
    if state is None:
        return State(m, workspace.row_sums(p, xp=xp), weighted(p, visible))
    decay = xp.exp(state.m - shift)
    total = state.l * decay + workspace.row_sums(p, xp=xp)
    o = workspace.rescale_add(state.o, decay, weighted(p, visible), xp=xp)
    return State(m, total, o)


def merge(a: State, b: State, *, xp: Namespace) -> State:
    """The state that has absorbed what either has."""
    m = xp.maximum(a.m, b.m)
    shift = _finite(m, xp=xp)
    u, w = xp.exp(a.m - shift), xp.exp(b.m - shift)
    return State(m, a.l * u + b.l * w, a.o * u + b.o * w)


def reopen(out: Array, lse: Array, *, xp: Namespace) -> State:
    """The state that `finish` made `out` (..., nq, Dv) and `lse` (..., nq) from."""
    lse = lse[..., None]
    m = loops.stop_gradient(lse)
    l = xp.exp(lse - _finite(m, xp=xp))  # noqa: E741  (1, or 0 where nothing was seen)
    out = xp.astype(out, lse.dtype, copy=False)
    return State(m, l, xp.where(l == 0, xp.zeros_like(out), out) * l)


def finish(state: State, *, xp: Namespace) -> tuple[Array, Array]:
    """Output ``(..., nq, Dv)`` and log-sum-exp ``(..., nq)``; an empty row gives 0 and -inf."""
    none = state.l == 0
    total = xp.where(none, xp.ones_like(state.l), state.l)
    lse = xp.where(none, state.m, _finite(state.m, xp=xp) + xp.log(total))
    return state.o / total, xp.squeeze(lse, axis=-1)


def _finite(m: Array, *, xp: Namespace) -> Array:
    """`m`, or the least number where nothing has been seen: no ``-inf - -inf`` arises."""
    return xp.maximum(m, float(xp.finfo(m.dtype).min))
