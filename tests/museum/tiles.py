"""Right in the first tile, and wrong from the second or the third on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from museum.exhibit import wrong
from museum.parts import InTiles
from museum.right import Array, Dense, Local
from museum.right_linear import Linear

TILE = 64


def tile_of(x: Array) -> Array:
    return x // TILE


def rows(p: Array) -> Array:
    """The numbers of queries, beside their positions."""
    return np.arange(p.shape[-2])[:, None]


@wrong("dense", seen="first drafts of the online softmax, tried on one tile and a bit")
class SecondTileNotRescaled(InTiles):
    """From the second tile on, what was summed before keeps its old factor."""

    tile = TILE

    def rescaled(self, p: Array, total: Array, factor: Array) -> tuple[Array, Array]:
        return (p, total) if p.any() else super().rescaled(p, total, factor)


@wrong("dense", seen="offsets of query tiles that are rounded up")
class CausalShiftedByTile(Dense):
    """From the second tile of queries on, each sees the key after its own."""

    def causal(self, p: Array, j: Array) -> Array:
        return j <= p + (tile_of(rows(p)) > 0)


@wrong("dense", seen="this library, in which rows from the first that sees to the last saw all")
class HiddenBetweenSeen(Dense):
    """Hidden blocks of a mask count as seen between blocks that are, down the queries."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        return super().visible(shape, SimpleNamespace(**vars(o) | {"mask": self.between(o, shape)}))

    def between(self, o: SimpleNamespace, shape: tuple[int, ...]) -> Any:
        if o.mask is None:
            return None
        mask = np.broadcast_to(o.mask, shape).copy()
        for a in range(TILE, shape[-2] - TILE, TILE):
            for b in range(0, shape[-1], TILE):
                at = slice(b, b + TILE)
                here = mask[..., a : a + TILE, at]
                around = mask[..., :a, at], mask[..., a + TILE :, at]
                above, below = (x.any((-1, -2), keepdims=True) for x in around)
                here |= above & below & ~here.any((-1, -2), keepdims=True)
        return mask


@wrong("linear", seen="chunked forms that hand over the last chunk alone")
class EarlierChunksForgotten(Linear):
    """From the third chunk on, a query finds nothing of the chunks before its own."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        seen = super().visible(shape, o)
        i, j = tile_of(np.arange(shape[-2]))[:, None], tile_of(np.arange(shape[-1]))
        return seen & ((i < 2) | (j >= i)) if o.is_causal else seen


@wrong("local", seen="tiles of a window that begin one key late")
class WindowCutAtATile(Local):
    """The first key of a window is missed where it is the last of a tile."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        seen = super().in_window(p, j, left, right)
        return seen if left is None else seen & ~((j % TILE == TILE - 1) & (j == p - left))
