"""
Where array libraries differ: loops, and what the standard lacks.

Each function here is small, says why it exists, and has the standard's way as its
fallback. Beside it only `native` and `staging` name an array library; what NumPy alone needs
stands in `workspace` and `threads`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from typing import Any

import array_api_compat as compat
import numpy as np

from arrattn._core.typing import Array, Device, Namespace


def schedule(xp: Namespace) -> str:
    """
    How loops over tiles run.

    "threads" (NumPy), "scan" (JAX), "blocks" (Dask) or "batched" (all others).
    """
    if compat.is_numpy_namespace(xp):
        return "threads"
    if compat.is_dask_namespace(xp):
        return "blocks"
    return "scan" if compat.is_jax_namespace(xp) else "batched"


def device_of(x: Array) -> Device:
    """The device to create arrays beside `x` on; None under tracing, where JAX places them."""
    # Dask and NumPy arrays live on "cpu", a name their creation functions do not all take.
    if compat.is_numpy_array(x) or compat.is_dask_array(x):
        return None
    if compat.is_torch_array(x):  # what `compat.device` says, after asking for all others
        return x.device
    return None if compat.is_jax_array(x) and not is_concrete(x) else compat.device(x)


def is_concrete(x: Array) -> bool:
    """Whether the values of `x` exist now: not for Dask graphs and JAX tracers."""
    if compat.is_dask_array(x):
        return False
    if compat.is_jax_array(x):
        import jax

        return not isinstance(x, jax.core.Tracer)
    return True


def host_values(x: Array) -> np.ndarray[Any, Any] | None:
    """
    A small control array (offsets, lengths, ids) on the host; None where it has no values yet.

    Planning needs these few integers to skip tiles; q, k and v never come this way.
    """
    if not is_concrete(x):
        return None
    if compat.is_numpy_array(x) or compat.is_jax_array(x):
        return np.asarray(x)
    if compat.is_torch_array(x):
        return np.asarray(x.detach().cpu())
    if compat.is_cupy_array(x):
        return np.asarray(x.get())
    return None


def truth(x: Array) -> bool | None:
    """A boolean scalar as a Python bool; None where it has no value yet."""
    return bool(x) if is_concrete(x) else None


def stop_gradient(x: Array) -> Array:
    """`x` as a constant of differentiation; the standard knows no gradients."""
    if compat.is_torch_array(x):
        return x.detach()
    if compat.is_jax_array(x):
        import jax

        return jax.lax.stop_gradient(x)
    return x


def cond(
    predicate: Array,
    yes: Callable[..., Any],
    no: Callable[..., Any],
    *args: Any,
    xp: Namespace,
) -> Any:
    """``yes(*args) if predicate else no(*args)``, also where the predicate is traced or lazy."""
    known = truth(predicate)
    if known is not None:
        return yes(*args) if known else no(*args)
    if compat.is_jax_namespace(xp):
        import jax

        return jax.lax.cond(predicate, yes, no, *args)
    return xp.where(predicate, yes(*args), no(*args))


def largest(x: Array, k: int, *, xp: Namespace) -> Array:
    """
    The `k` largest values along the last axis, descending; the standard has no top-k.
    """
    if compat.is_torch_namespace(xp):
        return xp.topk(x, k, dim=-1).values
    if compat.is_jax_namespace(xp):
        import jax

        flat = xp.reshape(x, (math.prod(x.shape[:-1]), x.shape[-1]))  # else XLA sorts whole rows
        return xp.reshape(jax.lax.top_k(flat, k)[0], (*x.shape[:-1], k))
    if compat.is_dask_namespace(xp):
        import dask.array as da

        return da.topk(x, k, axis=-1)
    if compat.is_numpy_namespace(xp) or compat.is_cupy_namespace(xp):
        if 0 < k < x.shape[-1]:
            x = xp.partition(x, x.shape[-1] - k, axis=-1)[..., -k:]
        return xp.sort(x, axis=-1)[..., ::-1][..., :k]
    return xp.sort(x, axis=-1, descending=True)[..., :k]


def kth_largest(x: Array, k: int, *, xp: Namespace) -> Array:
    """The `k`-th largest value along the last axis, kept as an axis of length 1; none is NaN."""
    if compat.is_numpy_namespace(xp) or compat.is_cupy_namespace(xp):
        at = x.shape[-1] - k
        return xp.partition(x, at, axis=-1)[..., at : at + 1]
    if compat.is_jax_namespace(xp):
        return _kth_by_bits(x, k, xp)
    return largest(x, k, xp=xp)[..., k - 1 : k]


def _kth_by_bits(x: Array, k: int, xp: Namespace) -> Array:
    """
    `kth_largest` for JAX, bit by bit: XLA's sorting takes several times as long on the CPU.

    Numbers are read as integers in the same order. A bit belongs to the answer if at least `k`
    numbers are no less than what is known of it with this bit.
    """
    import jax

    width = x.dtype.itemsize * 8
    number = getattr(xp, f"uint{width}")
    top = number(1 << (width - 1))

    def flip(bits: Array) -> Array:  # negative numbers: all bits; others: the sign's
        return bits ^ xp.where(bits >= top, ~number(0), top)

    ordered = flip(jax.lax.bitcast_convert_type(x, number))

    def next_bit(i: Array, known: Array) -> Array:
        more = known | (top >> xp.astype(i, number))
        enough = xp.count_nonzero(ordered >= more, axis=-1, keepdims=True) >= k
        return xp.where(enough, more, known)

    known = jax.lax.fori_loop(0, width, next_bit, xp.zeros((*x.shape[:-1], 1), dtype=number))
    back = known ^ xp.where(known >= top, top, ~number(0))
    return jax.lax.bitcast_convert_type(back, x.dtype)


def stable_argsort(x: Array, *, xp: Namespace) -> Array:
    """
    Ascending stable argsort along the last axis; Dask has none, so there one task a chunk.
    """
    if compat.is_dask_namespace(xp):

        def sort_chunk(chunk: Array) -> Array:
            return compat.array_namespace(chunk).argsort(chunk, stable=True)

        return x.rechunk({x.ndim - 1: -1}).map_blocks(sort_chunk, dtype=np.int64)
    return xp.argsort(x, stable=True)


def order_by(ids: Array, below: int, *, xp: Namespace) -> tuple[Array, Array]:
    """
    Stable argsort of whole numbers ``0 <= ids < below``, (P,), and the place of each in it.
    """
    n, dtype = ids.shape[0], ids.dtype
    if not compat.is_jax_namespace(xp):
        order = stable_argsort(ids, xp=xp)
        return order, xp.astype(stable_argsort(order, xp=xp), dtype, copy=False)
    place = xp.arange(n, dtype=dtype)
    if below * n <= xp.iinfo(dtype).max:  # XLA sorts pairs more slowly than single numbers
        order = xp.sort(ids * n + place, stable=False) % n
    else:
        order = xp.argsort(ids, stable=True)
    return order, xp.zeros_like(order).at[order].set(place, unique_indices=True)


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    xs: Any,
    *,
    xp: Namespace,
) -> tuple[Any, Any]:
    """
    Fold `step` over the leading axis of the arrays `xs`; `lax.scan` where there is one.

    Parameters
    ----------
    step : callable
        ``step(carry, x) -> (carry, y)``, with `x` and `y` tuples of arrays.
    carry : tuple of arrays
        The first carry.
    xs : tuple of arrays
        Each with the loop's axis first.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    carry, ys
        The last carry, and the `y` stacked along a new first axis.
    """
    if compat.is_jax_namespace(xp):
        import jax

        folded: tuple[Any, Any] = jax.lax.scan(step, carry, xs)
        return folded
    ys = []
    for t in range(xs[0].shape[0]):
        carry, y = step(carry, tuple(x[t, ...] for x in xs))
        ys.append(y)
    return carry, tuple(xp.stack(parts) for parts in zip(*ys, strict=True))


def running_sums(x: Array, *, xp: Namespace) -> Array:
    """Sums along the last axis but one, from its beginning through each place."""
    if compat.is_numpy_namespace(xp) and x.shape[-1] > 1:
        # BLAS is several times faster at the product than NumPy at sums over rows.
        return np.matmul(np.tri(x.shape[-2], dtype=x.dtype), x)
    return xp.cumulative_sum(x, axis=-2)


def recomputed(function: Callable[..., Any], *args: Any, xp: Namespace) -> Any:
    """
    ``function(*args)``; for gradients its inner values are computed again, not kept.
    """
    if compat.is_jax_namespace(xp):
        import jax

        return jax.checkpoint(function)(*args)
    if compat.is_torch_namespace(xp):
        import torch

        # Transforms of torch.func have no hooks for what is saved: they keep it.
        transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
        if torch.is_grad_enabled() and not transformed():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def one_for_all(function: Callable[[Array], Array], x: Array) -> Array:
    """
    ``function(x)``, a scalar about all of `x`; JAX alone traces.

    Under ``jax.vmap`` it is one for all items: of a `cond` on one for each, both branches
    would be computed.
    """
    import jax

    def mapped(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
        del axis_size, in_batched
        return one_for_all(function, x), False

    whole = jax.custom_batching.custom_vmap(function)
    whole.def_vmap(mapped)
    answer: Array = whole(jax.lax.stop_gradient(x))
    return answer


def rows_at(x: Array, start: int | Array, n: int) -> Array:
    """`n` entries along the last axis but one from a traced `start` on; JAX alone traces."""
    import jax

    rows: Array = jax.lax.dynamic_slice_in_dim(x, start, n, axis=x.ndim - 2)
    return rows


def map_rematerialised(body: Callable[..., Any], xs: Any) -> Any:
    """
    `body` over the leading axis of `xs` on JAX, its inner values recomputed for gradients.
    """
    import jax

    if xs[0].shape[0] == 1:  # no loop to compile
        return jax.tree.map(lambda y: y[None], body(tuple(x[0] for x in xs)))
    return jax.lax.map(jax.checkpoint(body), xs)


@lru_cache(maxsize=512)
def _compiled(function: Callable[..., Any], static: Hashable) -> Callable[..., Any]:
    import jax

    compiled: Callable[..., Any] = jax.jit(partial(function, static))
    return compiled


def staged(function: Callable[..., Any], static: Hashable, operands: Any, *, xp: Namespace) -> Any:
    """
    ``function(static, operands)``; on JAX compiled once for each `static` and shape.

    JAX would otherwise trace and compile a loop anew at every eager call. `function` must be
    a module-level function, `static` hashable, `operands` a tuple of arrays and None.
    """
    if compat.is_jax_namespace(xp):
        return _compiled(function, static)(operands)
    return function(static, operands)


def map_blocks(
    function: Callable[..., Any],
    arrays: Sequence[Array],
    trailing: Sequence[int],
    sizes: Sequence[tuple[int, ...]],
    dtypes: Sequence[Any],
) -> tuple[Array, ...]:
    """
    `function` on blocks of Dask arrays, cut along all but their last `trailing` axes.

    Leading axes broadcast; the results have the leading axes and then `sizes`.
    """
    import dask.array as da

    # Leading axes are cut alike, as the first array that does not broadcast there is cut.
    cuts: dict[int, Any] = {}
    for x, t in zip(arrays, trailing, strict=True):
        for i in range(t, x.ndim):
            if x.shape[x.ndim - 1 - i] != 1:
                cuts.setdefault(i - t, x.chunks[x.ndim - 1 - i])
    arrays = [
        x.rechunk(
            {
                x.ndim - 1 - i: -1 if i < t or x.shape[x.ndim - 1 - i] == 1 else cuts[i - t]
                for i in range(x.ndim)
            }
        )
        for x, t in zip(arrays, trailing, strict=True)
    ]
    names = [[f"a{n}x{i}" for i in range(t)] for n, t in enumerate(trailing)]
    outs = [[f"r{n}x{i}" for i in range(len(size))] for n, size in enumerate(sizes)]

    def spell(groups: list[list[str]]) -> str:
        return ",".join(f"({','.join(g)})" for g in groups)

    flat = {
        name: n
        for out, size in zip(outs, sizes, strict=True)
        for name, n in zip(out, size, strict=True)
    }
    results: tuple[Array, ...] = da.apply_gufunc(
        function,
        f"{spell(names)}->{spell(outs)}",
        *arrays,
        output_sizes=flat,
        meta=tuple(da.utils.meta_from_array(arrays[0], dtype=dtype) for dtype in dtypes),
    )
    return results
