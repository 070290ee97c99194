"""
Work space for NumPy: memory that each thread keeps, and arithmetic that is done in place.

A fresh array of a few hundred KiB costs NumPy more in page faults than the arithmetic that
fills it. `product`, `hide`, `exp_shifted` and `rescale_add` do in place, in memory that each
thread keeps, what they do on other libraries with new arrays. The first argument of the last
three must be no array of the caller's.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import Any

import array_api_compat as compat
import numpy as np
from threadpoolctl import ThreadpoolController

from arrattn._core.loops import device_of
from arrattn._core.threads import here
from arrattn._core.typing import Array, Namespace

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
    key = (slot, dtype, here.depth)
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
