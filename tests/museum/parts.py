"""Wrong logarithms, tiles and merges."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Dense


@wrong("dense", seen="sgl-project/sglang#40903, lightseekorg/tokenspeed#571")
class LseInBits(Dense):
    """A logarithm of base 2, merged as one of base e."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        w, lse = super().softmax(s, seen, sinks)
        return w, lse / s.dtype.type(math.log(2))


@wrong("dense", seen="Dao-AILab/flash-attention#404 asks which of the two it is")
class LseWithoutMaximum(Dense):
    """The logarithm of the shifted sum; the shift is forgotten."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        w, lse = super().softmax(s, seen, sinks)
        m = np.max(np.where(seen, s, -math.inf), axis=-1, initial=-math.inf)
        return w, lse - np.where(m == -math.inf, 0, m)


@wrong("dense", seen="logarithms kept away from zero")
class LseOfNothing(Dense):
    """Who sees nothing reports a number, and weighs in when parts are merged."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        w, lse = super().softmax(s, seen, sinks)
        return w, np.where(lse == -math.inf, 0, lse).astype(s.dtype)


@wrong("dense", seen="sinks that reach one of the two results")
class LseWithoutSinks(Dense):
    """The sink is in the weights and not in the logarithm."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        return super().softmax(s, seen, sinks)[0], super().softmax(s, seen, None)[1]


@wrong("dense", seen="logarithms stored like the output")
class LseRounded(Dense):
    """The logarithm has the output's dtype: in half precision, three digits."""

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        result = super().__call__(q, k, v, **options)
        return (result[0], result[1].astype(q.dtype)) if isinstance(result, tuple) else result


@wrong("dense", seen="training kernels: what the backward pass wants to read")
class LseOfTheScoresBeforeBias(Dense):
    """The logarithm is that of the scores without their bias."""

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Array]:
        plain = SimpleNamespace(**vars(o) | {"bias": None})
        return super().attend(q, k, v, o)[0], super().attend(q, k, v, plain)[1]


class InTiles(Dense):
    """The right sum, over tiles of four keys: what the exhibits below have in common."""

    tile = 4

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        s, rows = np.where(seen, s, -math.inf), s.shape[:-1]
        b = np.full(s.shape[-3], -math.inf) if sinks is None else sinks
        m = np.broadcast_to(b.astype(s.dtype)[:, None, None], (*rows, 1))
        total = np.where(m == -math.inf, 0, 1).astype(s.dtype)
        p = np.zeros_like(s)
        for at in self.tiles(s.shape[-1]):
            new = np.maximum(m, s[..., at].max(-1, keepdims=True))
            base = np.where(new == -math.inf, 0, new)
            p, total = self.rescaled(p, total, np.exp(m - base))
            p[..., at] = np.exp(s[..., at] - base)
            total, m = total + p[..., at].sum(-1, keepdims=True), new
        lse = np.where(m == -math.inf, m, m + np.log(total))
        return self.normalised(p, total), lse[..., 0]

    def tiles(self, nk: int) -> list[slice]:
        return [slice(a, min(a + self.tile, nk)) for a in range(0, nk, self.tile)]

    def rescaled(self, p: Array, total: Array, factor: Array) -> tuple[Array, Array]:
        return p * factor, total * factor


@wrong("dense", seen="jax-ml/jax#27224")
class LastTileDropped(InTiles):
    """Whole tiles only: the keys that do not fill one are never read."""

    def tiles(self, nk: int) -> list[slice]:
        return [x for x in super().tiles(nk) if x.stop - x.start == self.tile]


@wrong("dense", seen="flashinfer-ai/flashinfer#5090")
class LastTilePadded(InTiles):
    """The last tile is filled up with zeros, whose scores are 0 and not hidden."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        nk = s.shape[-1]
        fill = ((0, 0),) * (s.ndim - 1) + ((0, -nk % self.tile),)
        seen = np.pad(seen, fill, constant_values=True)
        w, lse = super().softmax(np.pad(s, fill), seen, sinks)
        return w[..., :nk], lse


@wrong("dense", seen="first drafts of the online softmax")
class SumNotRescaled(InTiles):
    """When the maximum rises, what was summed before keeps its old factor."""

    def rescaled(self, p: Array, total: Array, factor: Array) -> tuple[Array, Array]:
        return p, total


@wrong("dense", seen="first drafts of the online softmax")
class TotalNotRescaled(InTiles):
    """The numerator follows the maximum, the denominator does not."""

    def rescaled(self, p: Array, total: Array, factor: Array) -> tuple[Array, Array]:
        return p * factor, total


class InHalves(Dense):
    """The right sum, from two halves of the keys."""

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Array]:
        g = q.shape[-3] // max(k.shape[-3], 1)
        k, v = self.per_query_head(k, g), self.per_query_head(v, g)
        s = self.scores(q, k, o)
        seen, half = self.visible(s.shape, o), -(-k.shape[-2] // 2)
        parts = []
        for at, sinks in [(slice(0, half), o.sinks), (slice(half, None), None)]:
            w, lse = self.softmax(s[..., at], seen[..., at], sinks)
            parts.append((self.mix(w, v[..., at, :], seen[..., at]), lse))
        return self.merged(*parts)

    def merged(self, a: Any, b: Any) -> tuple[Array, Array]:
        lse = np.logaddexp(a[1], b[1])
        base = np.where(lse == -math.inf, 0, lse)
        return sum(np.exp(x[1] - base)[..., None] * x[0] for x in (a, b)), lse


@wrong("dense", seen="split caches merged with plain exponentials")
class MergedUnstably(InHalves):
    """``exp(lse)`` as it is: infinity over infinity from 89 on."""

    def merged(self, a: Any, b: Any) -> tuple[Array, Array]:
        total = np.exp(a[1]) + np.exp(b[1])
        out = sum(np.exp(x[1])[..., None] * x[0] for x in (a, b))
        return np.where(total[..., None] == 0, 0, out / total[..., None]), np.log(total)


@wrong("dense", seen="shards averaged like gradients")
class MergedByTheMean(InHalves):
    """Each half counts the same, however little it saw."""

    def merged(self, a: Any, b: Any) -> tuple[Array, Array]:
        return (a[0] + b[0]) / 2, super().merged(a, b)[1]


@wrong("dense", seen="zhuzilin/ring-flash-attention#20 asks for it")
class LseAdded(InHalves):
    """Logarithms of sums are added, as if they were sums of logarithms."""

    def merged(self, a: Any, b: Any) -> tuple[Array, Array]:
        return super().merged(a, b)[0], a[1] + b[1]
