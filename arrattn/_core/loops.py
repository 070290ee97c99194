"""
Where array libraries differ: loops, threads, and what the standard lacks.

Each function here is small, says why it exists, and has the standard's way as its
fallback. No other module of the core names an array library.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from typing import Any

import array_api_compat as compat
import numpy as np
from threadpoolctl import ThreadpoolController

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


# -- Work space, for NumPy --------------------------------------------------------------------
#
# A fresh array of a few hundred KiB costs NumPy more in page faults than the arithmetic that
# fills it. These four do in place, in memory that each thread keeps, what the others do
# with new arrays. Their first argument must be no array of the caller's.

_kept = threading.local()
_KEPT_AT_MOST = 1 << 21

#: Bytes of a cache line.
_LINE = 64

#: Rows up to which BLAS is faster at the transposed product than at the product.
_FEW_ROWS = 8


def work_space(slot: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """
    A NumPy array to write on, which lives until this thread asks for the same `slot` again.

    Jobs within jobs, as of a caller's function that calls an attention, have their own.
    """
    size = math.prod(shape)
    if size > _KEPT_AT_MOST:
        return aligned(shape, dtype)
    held: dict[Any, Any] = _kept.__dict__
    key = (slot, dtype, held.get("depth", 0))
    kept = held.get(key)
    if kept is None or kept.size < size:
        kept = held[key] = aligned((size,), dtype)
    return kept[:size].reshape(shape)


def aligned(shape: tuple[int, ...], dtype: Any) -> Array:
    """
    A new NumPy array that begins where a cache line does.

    NumPy's own begin at any multiple of 16 bytes. Where a product reads them 64 bytes at a time,
    each read then takes two lines, which costs it a fifth of its speed.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(size + _LINE, np.uint8)
    start = -room.__array_interface__["data"][0] % _LINE
    return room[start : start + size].view(dtype).reshape(shape)


def laid_out(x: Array, slot: str) -> Array:
    """
    A contiguous NumPy array that begins where a cache line does: `x` itself, or a copy in a `slot`.

    It is not to be written to.
    """
    if x.flags.c_contiguous and x.__array_interface__["data"][0] % _LINE == 0:
        return x
    copy = work_space(slot, x.shape, x.dtype)
    np.copyto(copy, x)
    return copy


def spread_rows(slot: str, shape: tuple[int, ...], dtype: Any) -> Array:
    """
    `work_space` whose rows lie an odd number of cache lines apart.

    Rows a power of two of bytes apart all fall into the same few sets of the first-level cache,
    which costs a product that reads down its columns a fifth of its speed.
    """
    *lead, n = shape
    line = _LINE // np.dtype(dtype).itemsize
    apart = (-(-n // line) | 1) * line
    return work_space(slot, (*lead, apart), dtype)[..., :n]


def turn(x: Array, *, out: Array) -> Array:
    """
    Write a NumPy array (..., n, d) to `out` (..., d, n), of the same dtype.

    A copy goes in the order in which it writes, and so from line to line of the cache for each
    number it reads; a product goes in that of `x`, and takes half of the time.
    """
    np.multiply(x, x.dtype.type(1), out=out.mT)
    return out


def product(a: Array, b: Array, slot: str, *, xp: Namespace) -> Array:
    """``a @ b``; on NumPy it lives until this thread's next product in the same `slot`."""
    if not compat.is_numpy_namespace(xp):
        return xp.matmul(a, b)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    n, m = a.shape[-2], b.shape[-1]
    if n <= _FEW_ROWS < m and b.strides[-1] > b.strides[-2]:
        turned = work_space(slot, (*lead, m, n), a.dtype)
        return np.matmul(b.mT, a.mT, out=turned).mT
    return np.matmul(a, b, out=work_space(slot, (*lead, n, m), a.dtype))


def small_products(a: Array, b: Array, *, out: Array) -> Array:
    """
    ``np.matmul(a, b, out=out)`` of NumPy arrays, a few rows at a time where BLAS is faster at that.

    On some processors OpenBLAS does small products from where the operands lie; larger ones it
    copies first, which takes longer. It is fast at them if the rows of `b` are contiguous.
    """
    (n, k), m = a.shape[-2:], b.shape[-1]
    most = unpacked() // max(1, k * m)
    rows = next((r for r in _ROWS if r <= most), n)
    if n <= max(rows, most):
        return np.matmul(a, b, out=out)
    even = n - n % rows

    def cut(x: Array) -> Array:
        return x[..., :even, :].reshape(*x.shape[:-2], even // rows, rows, x.shape[-1])

    np.matmul(cut(a), b[..., None, :, :], out=cut(out))
    if even < n:
        np.matmul(a[..., even:, :], b, out=out[..., even:, :])
    return out


#: Rows that small products may have.
_ROWS = (128, 64, 32, 16)

#: The processors, as OpenBLAS names them, for which it has kernels for small products, and how many
#: multiplications those have at most.
_SMALL_KERNELS = {"SkylakeX", "Cooperlake", "SapphireRapids"}
_SMALL_PRODUCT = 10**6


@lru_cache(maxsize=1)
def unpacked() -> int:
    """Multiplications of a product up to which BLAS copies no operand; 0 where it always does."""
    found = ThreadpoolController().select(internal_api="openblas").lib_controllers
    return _SMALL_PRODUCT if any(x.architecture in _SMALL_KERNELS for x in found) else 0


def hide(s: Array, visible: Array, *, xp: Namespace) -> Array:
    """`s` where `visible`, else ``-inf``."""
    if compat.is_numpy_namespace(xp) and s.flags.writeable:
        np.copyto(s, -math.inf, where=~visible)
        return s
    return xp.where(visible, s, xp.asarray(-math.inf, dtype=s.dtype, device=device_of(s)))


def exp_shifted(s: Array, shift: Array, *, xp: Namespace) -> Array:
    """``exp(s - shift)``."""
    if compat.is_numpy_namespace(xp) and s.flags.writeable and s.shape[:-1] == shift.shape[:-1]:
        return np.exp(np.subtract(s, shift, out=s), out=s)
    return xp.exp(s - shift)


def sum_of(x: Array, there: Array | None, dtype: Any, *, xp: Namespace) -> Array:
    """The sum of all of `x`; on NumPy, without a copy, only of what is `there`."""
    if there is None or not compat.is_numpy_namespace(xp):
        return xp.sum(x, dtype=dtype)
    return np.sum(x, dtype=dtype, where=there)


def row_sums(p: Array, *, xp: Namespace) -> Array:
    """Sums over the last axis, which stays with length 1."""
    if compat.is_numpy_namespace(xp):
        # To BLAS this is a product, which it is faster at than NumPy at sums.
        return np.matmul(p, ones_column(p.shape[-1], p.dtype))
    return xp.sum(p, axis=-1, keepdims=True)


_ones: dict[Any, Array] = {}


def ones_column(n: int, dtype: Any) -> Array:
    """Ones ``(n, 1)``, a NumPy array not to be written to."""
    held = _ones.get(dtype)
    if held is None or len(held) < n:
        held = _ones[dtype] = np.ones((n, 1), dtype)
    return held[:n]


_zeros: dict[Any, Array] = {}


def zeros_like(x: Array) -> Array:
    """
    Zeros of a NumPy array's shape and dtype, not to be written to.

    Beside a number alone, NumPy takes several times as long for a minimum.
    """
    held = _zeros.get(x.dtype)
    if held is None or len(held) < x.size:
        held = _zeros[x.dtype] = np.zeros(x.size, x.dtype)
    return held[: x.size].reshape(x.shape)


def rescale_add(o: Array, factor: Array, more: Array, *, xp: Namespace) -> Array:
    """``o * factor + more``."""
    if compat.is_numpy_namespace(xp) and o.flags.writeable and o.shape == more.shape:
        return np.add(np.multiply(o, factor, out=o), more, out=o)
    return o * factor + more


class Pieces:
    """
    Pieces of an output along its last axis but one, joined at the end.

    On NumPy they can be written where they belong at once, so that none is held twice.

    Parameters
    ----------
    into : array, optional
        A NumPy array for the whole output.
    """

    def __init__(self, into: Array | None = None) -> None:
        self.into: Any = into
        self.filled = 0
        self.held: list[Array] = []

    def add(self, piece: Array) -> None:
        """Put the next piece behind those that are there."""
        if self.into is None:
            self.held.append(piece)
            return
        stop = self.filled + piece.shape[-2]
        self.into[..., self.filled : stop, :] = piece
        self.filled = stop

    def next(self, n: int) -> Array:
        """The place of the next `n` rows, to write them in any order; only of an `into`."""
        start, self.filled = self.filled, self.filled + n
        return self.into[..., start : self.filled, :]

    def joined(self, *, xp: Namespace) -> Array:
        """The whole."""
        if self.into is not None:
            return self.into
        return self.held[0] if len(self.held) == 1 else xp.concat(self.held, axis=-2)


# -- Threads, for NumPy -----------------------------------------------------------------------


#: Multiplications below which OpenBLAS keeps a product on one thread.
SMALL = 1 << 18


#: What `set_num_threads` was given.
_asked: int | None = None


def num_threads() -> int:
    """Worker threads: as set, ``ARRATTN_NUM_THREADS``, or the processors this process may use."""
    if _asked is not None:
        return _asked
    if within := _kept.__dict__.get("threads"):  # a job's own processors may be fewer
        return int(within)
    asked = os.environ.get("ARRATTN_NUM_THREADS", "")
    if not asked:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        msg = f"ARRATTN_NUM_THREADS: expected a positive integer, got {asked!r}"
        raise ValueError(msg)
    return int(asked)


def ask_num_threads(n: int | None) -> int | None:
    """Set the number of worker threads, None for the default; returns what was set before."""
    global _asked
    before, _asked = _asked, n
    return before


class _Blas:
    """
    Holds BLAS to one thread while any of our pools runs, and gives back what was set before.

    The setting belongs to the process, so calls that overlap share it: the first to come
    sets it, the last to go restores it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before: list[tuple[Callable[[int], None], int]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.before = [
                    (put, many) for get, put in _blas_settings() if (many := get()) not in (None, 1)
                ]
                for put, _ in self.before:
                    put(1)
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self.restore()

    def restore(self) -> None:
        """Give back what was set before."""
        for put, many in self.before:
            put(many)


@lru_cache(maxsize=1)
def _blas_settings() -> list[tuple[Callable[[], int | None], Callable[[int], None]]]:
    """How to read and to set the number of threads of each BLAS that is loaded."""
    # threadpoolctl lets only the thread that made a setting change it again, which calls that
    # overlap cannot keep to; the function under that rule has none.
    return [
        (
            library.get_num_threads,
            getattr(library, "_real_set_num_threads", library.set_num_threads),
        )
        for library in ThreadpoolController().select(user_api="blas").lib_controllers
    ]


class _Pool:
    """
    Threads that do the jobs of a caller that waits, each on processors of its own.

    Linux wakes a thread where the one that woke it is; where few processors share a cache it
    may leave both there for longer than a call takes, and others idle.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.ids: list[int] = []
        self.placed: tuple[set[int], int] | None = None
        self.executor = ThreadPoolExecutor(
            threads, "arrattn", initializer=lambda: self.ids.append(threading.get_native_id())
        )

    def place(self) -> None:
        """Share out among them the processors that the calling thread may use."""
        if not hasattr(os, "sched_setaffinity"):
            return
        allowed, ids = os.sched_getaffinity(0), self.ids.copy()
        if (allowed, len(ids)) == self.placed:
            return
        order = sorted(allowed)
        for n, thread in enumerate(ids):
            with suppress(OSError):  # a thread that is gone, or a system that forbids it
                os.sched_setaffinity(thread, order[n % len(order) :: self.threads])
        self.placed = allowed, len(ids)


@lru_cache(maxsize=4)
def _pool(threads: int) -> _Pool:
    return _Pool(threads)


_blas = _Blas()


def _after_fork() -> None:
    # A child process has none of its parent's threads, and may have copied a held lock.
    global _blas  # noqa: PLW0603
    _pool.cache_clear()
    if _blas.users:
        _blas.restore()
    _blas = _Blas()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_jobs(jobs: Sequence[Callable[[], None]], *, small: bool = False) -> None:
    """
    Run independent jobs, each with a single-threaded BLAS, on the threads of the pool.

    `small` jobs, whose products BLAS would not spread over threads anyway, are run as they are.

    What a job computes does not depend on who runs it, so results are the same bits for any
    number of threads. The first exception is raised, once every worker has stopped.
    """
    if small:
        _run_all(iter(jobs), None)
        return
    queue = iter(jobs)
    take = threading.Lock()

    def shared() -> Iterator[Callable[[], None]]:
        while True:
            with take:
                job = next(queue, None)
            if job is None:
                return
            yield job

    with _blas.held():
        threads = num_threads()
        many, pool = min(threads, len(jobs)), _pool(threads)
        # A caller works, too, where it would else wait for others' jobs, or as one for itself.
        works = many < 2 or _kept.__dict__.get("depth", 0) > 0 or _blas.users > 1
        if not works:
            pool.place()
        futures = [pool.executor.submit(_run_all, shared(), threads) for _ in range(many - works)]
        try:
            if works:
                _run_all(shared(), threads)
            else:
                wait(futures, return_when=FIRST_COMPLETED)  # no job is left, or one failed
        finally:
            with take:
                queue = iter(())
            # A thread that has not begun by now has nothing to do, and waiting for it could be
            # waiting for oneself, where jobs run jobs.
            futures = [future for future in futures if not future.cancel()]
            for future in futures:
                future.exception()
        for future in futures:
            future.result()


def _run_all(jobs: Iterator[Callable[[], None]], threads: int | None) -> None:
    """Run jobs one after the other; `num_threads` in them is `threads`, unless that is None."""
    held: dict[str, Any] = _kept.__dict__
    depth, before = held.get("depth", 0), held.get("threads")
    held["depth"], held["threads"] = depth + 1, threads or before
    try:
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for job in jobs:
                job()
    finally:
        held["depth"], held["threads"] = depth, before
