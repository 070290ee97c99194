"""What a call is once it was read: operands in the shapes that the engines work on."""

from __future__ import annotations

import math
from typing import NamedTuple

from arrattn._core.typing import Array, Device, DType, Namespace
from arrattn._state import LinearState
from arrattn.patterns import Pattern


class SoftmaxInputs(NamedTuple):
    """
    The operands of the softmax family, query heads grouped by the key head that they read.

    `offset` is an int or an integer array that broadcasts to the scores' axes.
    """

    xp: Namespace
    device: Device
    q: Array  # (..., Hkv, G, Nq, D)
    k: Array  # (..., Hkv, Nk, D)
    v: Array  # (..., Hkv, Nk, Dv)
    bias: Array | None  # (..., Hkv | 1, G | 1, Nq | 1, Nk | 1)
    sinks: Array | None  # (Hkv, G, 1, 1), accumulation dtype
    pattern: Pattern | None
    offset: int | Array
    scale: float
    softcap: float | None
    batch: tuple[int, ...]
    acc: DType
    no_head: bool
    engine: str = "tiles"
    return_lse: bool = True
    always: Pattern | None = None  # of sparse attention, as is what follows
    block_scores: Array | None = None  # (..., Hkv | 1, G | 1, Nq | query blocks | 1, blocks)

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.q.shape[-2], self.k.shape[-2]

    @property
    def heads(self) -> tuple[int, int]:
        """Key heads, and query heads for each of them."""
        return self.q.shape[-4], self.q.shape[-3]

    def ungroup(self, out: Array, lse: Array | None) -> tuple[Array, Array | None]:
        """``(..., Hkv, G, Nq, Dv)`` and ``(..., Hkv, G, Nq)`` in the caller's shapes."""
        xp, (nq, _) = self.xp, self.lengths
        heads = () if self.no_head else (math.prod(self.heads),)
        out = xp.reshape(out, (*self.batch, *heads, nq, self.v.shape[-1]))
        lse = None if lse is None else xp.reshape(lse, (*self.batch, *heads, nq))
        return xp.astype(out, self.q.dtype, copy=False), lse

    def ungroup_selection(self, chosen: Array) -> Array:
        """``(..., Hkv, G | 1, rows, count)`` in the caller's shape."""
        *_, hkv, g, rows, count = chosen.shape
        heads = () if self.no_head else (hkv * g,)
        return self.xp.reshape(chosen, (*self.batch, *heads, rows, count))


class LinearInputs(NamedTuple):
    """
    The operands of the linear family, grouped as in `SoftmaxInputs`.

    `key_mask` joins the caller's mask and lengths; `kv_lengths` stays beside it because it moves
    the queries' positions.
    """

    xp: Namespace
    device: Device
    q: Array  # (..., Hkv, G, Nq, D)
    k: Array  # (..., Hkv, Nk, D)
    v: Array  # (..., Hkv, Nk, Dv)
    key_mask: Array | None  # bool, (..., Hkv | 1, Nk), True = visible
    kv_lengths: int | Array | None  # int or (...)
    q_ids: Array | None  # (..., Nq)
    k_ids: Array | None  # (..., Nk)
    state: LinearState | None
    scale: float
    batch: tuple[int, ...]
    acc: DType
    no_head: bool
    log_decay: Array | None = None  # (..., Hkv | 1, Nk, Dphi | 1)
    beta: Array | None = None  # (..., Hkv | 1, Nk)
    split: tuple[int, int] | None = None  # the last batch axes, if heads of `v` share keys

    @property
    def outer(self) -> tuple[int, ...]:
        """The batch axes of the caller."""
        return self.batch if self.split is None else self.batch[:-2]

    def ungroup(self, out: Array) -> Array:
        """``(..., Hkv, G, Nq, Dv)`` in the caller's shape and dtype."""
        g, nq = self.q.shape[-3:-1]
        out = self.join_heads(out, 3)
        heads = () if self.no_head else (out.shape[-4] * g,)
        out = self.xp.reshape(out, (*self.outer, *heads, nq, self.v.shape[-1]))
        return self.xp.astype(out, self.q.dtype, copy=False)

    def join_heads(self, x: Array, trailing: int) -> Array:
        """``(..., [r, s,] Hkv, ...)`` -> ``(..., Hkv * r * s, ...)``."""
        if self.split is None:
            return x
        tail = x.shape[x.ndim - trailing :]
        x = self.xp.moveaxis(x, -trailing - 1, -trailing - 3)
        return self.xp.reshape(x, (*self.outer, self.value_heads, *tail))

    @property
    def value_heads(self) -> int:
        """Heads of `v`, and of the state."""
        return int(self.k.shape[-3] * math.prod(self.split or ()))

    def split_heads(self, x: Array, trailing: int) -> Array:
        """The inverse of `join_heads`; an axis of 1 stays so."""
        if self.split is None:
            return x
        lead, tail = x.shape[: x.ndim - trailing - 1], x.shape[x.ndim - trailing :]
        heads = x.shape[x.ndim - trailing - 1]
        parts = (1, 1, 1) if heads == 1 else (heads // math.prod(self.split), *self.split)
        x = self.xp.reshape(x, (*lead, *parts, *tail))
        return self.xp.moveaxis(x, -trailing - 3, -trailing - 1)


class Choice(NamedTuple):
    """
    What sparse attention chooses; sizes cut to what the keys hold.

    `route` counts blocks to take or to search beside the own one; `exhaustive` means that
    keys are searched in all. `queries` is the number of them, and `query_blocks` that of the
    blocks they lie in (the most that can be, where offsets differ).
    """

    block: int
    top_k: int
    route: int
    exhaustive: bool
    select: str
    per: str
    score: str
    queries: int
    query_blocks: int
    selection: bool

    @property
    def many(self) -> int:
        """How many keys, or blocks, are chosen."""
        return self.top_k if self.select == "keys" else self.route

    def selection_rows(self, heads: tuple[int, int]) -> tuple[int, int]:
        """Query heads for each key head, and rows, that choose on their own."""
        rows = self.query_blocks if self.per == "block" else self.queries
        return 1 if self.per == "group" else heads[1], rows


def query_blocks(nq: int, size: int, offset: int | Array) -> int:
    """How many blocks the queries' positions lie in; the most, where offsets differ."""
    if nq == 0:
        return 0
    if not isinstance(offset, int):
        return (nq + size - 2) // size + 1
    return (offset + nq - 1) // size - offset // size + 1
