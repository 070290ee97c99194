"""
Calls taken apart into arrays and structure, for libraries that run code of their own making.

JAX compiles a function of arrays once for each structure; Dask runs a function on each block
of its arrays when the result is asked for. Both need the same thing: a call's arrays on one
side, everything else about it on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from arrattn import patterns
from arrattn._core import loops
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.typing import Array
from arrattn.patterns import Pattern


class _Static(NamedTuple):
    """All about a traced call that is not an array."""

    run: Callable[..., Any]
    extra: Hashable
    xp: Any
    pattern: Pattern | None
    offset: int | None
    scale: float
    softcap: float | None
    acc: Any
    batch: tuple[int, ...]


def traced(
    run: Callable[..., Any],
    call: SoftmaxInputs,
    extra: Hashable,
    tables: tuple[Array, ...] = (),
) -> Any:
    """
    ``run(call, extra, tables)``, compiled once for each structure and shape of the call.
    """
    arrays: list[Array] = []
    skeleton = patterns.detach(call.pattern, arrays)
    known = isinstance(call.offset, int)
    static = _Static(
        run,
        extra,
        call.xp,
        skeleton,
        call.offset if known else None,
        call.scale,
        call.softcap,
        call.acc,
        call.batch,
    )
    operands = (
        (call.q, call.k, call.v, call.bias, call.sinks),
        None if known else call.offset,
        tuple(arrays),
        tables,
    )
    return loops.staged(_run_traced, static, operands, xp=call.xp)


def _run_traced(static: _Static, operands: Any) -> Any:
    (q, k, v, bias, sinks), offset, arrays, tables = operands
    call = SoftmaxInputs(
        xp=static.xp,
        device=None,
        q=q,
        k=k,
        v=v,
        bias=bias,
        sinks=sinks,
        pattern=patterns.attach(static.pattern, arrays),
        offset=offset if static.offset is None else static.offset,
        scale=static.scale,
        softcap=static.softcap,
        batch=static.batch,
        acc=static.acc,
        no_head=False,
    )
    return static.run(call, static.extra, tables)


def blockwise(
    run: Callable[[SoftmaxInputs], tuple[Array, Array]], call: SoftmaxInputs
) -> tuple[Array, Array]:
    """
    ``run`` on each block of batch items and heads of a lazy call, when it is computed.

    A block holds its items' queries and keys whole; it is an array of whatever library the
    lazy array is made of, and is planned with its real values.
    """
    arrays: list[Array] = []
    trailing: list[int] = []

    def note(x: Array | None, kept: int, *, has_head: bool = True) -> None:
        # Every array gets a head axis behind its batch axes; blocks are cut along those.
        if x is not None:
            cut = x if has_head else call.xp.expand_dims(x, axis=x.ndim - kept)
            arrays.append(cut)
            trailing.append(kept)

    note(call.q, 3)
    note(call.k, 2)
    note(call.v, 2)
    note(call.bias, 3)
    note(call.sinks, 3)
    lazy_offset = not isinstance(call.offset, int)
    note(call.offset if lazy_offset else None, 4, has_head=False)
    own: list[Array] = []
    skeleton = patterns.detach(call.pattern, own)
    layout: list[int] = []

    def note_layout(x: Array, trailing: int) -> Array:
        layout.append(trailing)
        return x

    patterns.pick(call.pattern, note_layout)
    for x, kept in zip(own, layout, strict=True):
        note(x, min(kept, 3), has_head=kept == 4)

    def on_block(*blocks: Array) -> tuple[Array, Array]:
        parts = iter(blocks)
        q, k, v = next(parts), next(parts), next(parts)
        lead = (*np.broadcast_shapes(q.shape[:-4], k.shape[:-3], v.shape[:-3]),)
        bias = None if call.bias is None else next(parts)
        sinks = None if call.sinks is None else next(parts)
        offset = _without_head(next(parts), 4) if lazy_offset else call.offset
        held = tuple(
            x if kept == 4 else _without_head(x, kept)
            for x, kept in zip(parts, layout, strict=True)
        )
        xp = compat.array_namespace(q)
        block = call._replace(
            xp=xp,
            device=loops.device_of(q),
            q=q,
            k=k,
            v=v,
            bias=bias,
            sinks=sinks,
            offset=offset,
            pattern=patterns.attach(skeleton, held),
            batch=lead,
            acc=getattr(xp, np.dtype(call.acc).name),
        )
        return run(block)

    nq, dv = call.lengths[0], call.v.shape[-1]
    sizes = ((call.heads[1], nq, dv), (call.heads[1], nq))
    return loops.map_blocks(on_block, arrays, trailing, sizes, call.acc)


def _without_head(x: Array, kept: int) -> Array:
    return compat.array_namespace(x).squeeze(x, axis=x.ndim - kept - 1)
