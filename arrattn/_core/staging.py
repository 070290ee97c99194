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


class Piece(NamedTuple):
    """An array of a lazy call, its last `kept` axes whole in every block."""

    array: Array | None
    kept: int
    has_head: bool = True  # whether the axis before those is the key heads'


def on_blocks(
    function: Callable[..., Any],
    pieces: list[Piece],
    sizes: list[tuple[int, ...]],
    dtypes: list[Any],
) -> tuple[Array, ...]:
    """
    ``function(*arrays)`` on each block of batch items and heads, when it is computed.

    It gets a block of each of `pieces` (None for None), an array of whatever library the
    lazy arrays are made of. The results have the leading axes, then `sizes`.
    """
    # Blocks are cut along a head axis, so every array gets one while it travels.
    arrays = [
        x if has_head else compat.array_namespace(x).expand_dims(x, axis=x.ndim - kept)
        for x, kept, has_head in pieces
        if x is not None
    ]
    layout = [(x is not None, kept, has_head) for x, kept, has_head in pieces]

    def unpack(*blocks: Array) -> Any:
        parts = iter(blocks)
        return function(
            *(
                None if not there else next(parts) if has_head else _beheaded(next(parts), kept)
                for there, kept, has_head in layout
            )
        )

    trailing = [kept for there, kept, _ in layout if there]
    return loops.map_blocks(unpack, arrays, trailing, sizes, dtypes)


def _beheaded(x: Array, kept: int) -> Array:
    return compat.array_namespace(x).squeeze(x, axis=x.ndim - kept - 1)


def block_dtype(dtype: Any, xp: Any) -> Any:
    """A lazy array's dtype as the library of its blocks names it."""
    return getattr(xp, np.dtype(dtype).name)


def blockwise(
    run: Callable[[SoftmaxInputs], tuple[Array, Array]], call: SoftmaxInputs
) -> tuple[Array, Array]:
    """
    ``run`` on each block of batch items and heads of a lazy call, when it is computed.

    A block holds its items' queries and keys whole, and is planned with its real values.
    """
    (hkv, g), (nq, _), dv = call.heads, call.lengths, call.v.shape[-1]
    if 0 in (*call.batch, hkv, g):
        shape = (*call.batch, hkv, g, nq)
        zeros = call.xp.zeros((*shape, dv), dtype=call.acc)
        return zeros, call.xp.zeros(shape, dtype=call.acc)
    own: list[Array] = []
    skeleton = patterns.detach(call.pattern, own)
    layout: list[int] = []

    def note_layout(x: Array, trailing: int) -> Array:
        layout.append(trailing)
        return x

    patterns.pick(call.pattern, note_layout)
    offset = None if isinstance(call.offset, int) else call.offset
    pieces = [
        Piece(call.q, 3),
        Piece(call.k, 2),
        Piece(call.v, 2),
        Piece(call.bias, 3),
        Piece(call.sinks, 3),
        Piece(offset, 4, has_head=False),
        *(Piece(x, min(n, 3), has_head=n == 4) for x, n in zip(own, layout, strict=True)),
    ]
    bare = call._replace(q=None, k=None, v=None, bias=None, sinks=None, pattern=None)
    known = call.offset if offset is None else None
    bare = bare._replace(offset=0)

    def on_block(q: Array, k: Array, v: Array, bias: Any, sinks: Any, at: Any, *held: Array) -> Any:
        xp = compat.array_namespace(q)
        block = bare._replace(
            xp=xp,
            device=loops.device_of(q),
            q=q,
            k=k,
            v=v,
            bias=bias,
            sinks=sinks,
            offset=at if known is None else known,
            pattern=patterns.attach(skeleton, held),
            batch=np.broadcast_shapes(q.shape[:-4], k.shape[:-3], v.shape[:-3]),
            acc=block_dtype(bare.acc, xp),
        )
        return run(block)

    out, lse = on_blocks(on_block, pieces, [(g, nq, dv), (g, nq)], [call.acc, call.acc])
    return out, lse
