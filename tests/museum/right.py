"""
Attention done right, in plain NumPy, one step to a method.

Every exhibit of the museum is one of these classes with one step replaced: what it gets
wrong is all that it says. Nothing here is fast, and nothing is shared with the library but
the description of patterns and of feature maps.
"""

from __future__ import annotations

import inspect
import math
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIGHT = ("mask", "bias", "window", "kv_lengths", "segment_ids", "pattern", "q_offset")
DENSE_OPTIONS: dict[str, Any] = dict.fromkeys((*SIGHT, "scale", "softcap", "sinks"))
DENSE_OPTIONS |= {"is_causal": False, "return_lse": False}
SPARSE_OPTIONS = DENSE_OPTIONS | {"block_size": None, "top_k": None, "route": 8}


def taking(options: dict[str, Any], *required: str) -> inspect.Signature:
    """The signature of a function that takes these options, some of which have no default."""
    arrays = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in "qkv"]
    empty, keyword = inspect.Parameter.empty, inspect.Parameter.KEYWORD_ONLY
    defaults = {name: empty if name in required else x for name, x in options.items()}
    by_name = [inspect.Parameter(name, keyword, default=x) for name, x in defaults.items()]
    return inspect.Signature(arrays + by_name)


def over_batch(x: Any) -> Array:
    """An int or an array of them over the batch axes, beside (..., Hq, Nq, Nk)."""
    return np.asarray(x)[..., None, None, None]


class Attention:
    """What all families share: options, dtypes, heads, positions."""

    __signature__: inspect.Signature

    def read(self, *arrays: Array, **options: Any) -> SimpleNamespace:
        """The options by name, defaults filled in."""
        call = self.__signature__.bind(*arrays, **options)
        call.apply_defaults()
        return SimpleNamespace(**call.kwargs)

    def accumulate_in(self, dtype: Any) -> Any:
        """Sums are taken in single precision at least."""
        return np.float64 if dtype == np.float64 else np.float32

    def widen(self, *arrays: Array) -> list[Array]:
        """A head axis for all, common batch axes, and the dtype of sums."""
        wide = self.accumulate_in(arrays[0].dtype)
        arrays = tuple((x[None] if x.ndim == 2 else x).astype(wide) for x in arrays)
        batch = np.broadcast_shapes(*(x.shape[:-3] for x in arrays))
        return [np.broadcast_to(x, (*batch, *x.shape[-3:])) for x in arrays]

    def per_query_head(self, x: Array, g: int) -> Array:
        """Query head h reads key head h // g."""
        return np.repeat(x, g, axis=-3)

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        """Where the first query stands: the last one sees the last key."""
        if getattr(o, "q_offset", None) is not None:
            return o.q_offset
        return (nk if o.kv_lengths is None else np.asarray(o.kv_lengths)) - nq

    def causal(self, p: Array, j: Array) -> Array:
        return j <= p

    def there(self, j: Array, lengths: Array) -> Array:
        return j < lengths

    def together(self, ids: Any) -> Array:
        a, b = ids if isinstance(ids, tuple) else (ids, ids)
        return a[..., None, :, None] == b[..., None, None, :]

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        """The weighted sum. Zero times NaN is NaN: what is not finite stays out of it."""
        finite = np.isfinite(v)
        spoiled = seen.astype(w.dtype) @ (~finite).astype(w.dtype)
        return np.where(spoiled > 0, np.nan, w @ np.where(finite, v, 0))


class Dense(Attention):
    """Softmax attention."""

    __signature__ = taking(DENSE_OPTIONS)

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        o = self.read(q, k, v, **options)
        with np.errstate(all="ignore"):
            out, lse = self.attend(*self.widen(q, k, v), o)
        if q.ndim == 2:
            out, lse = out[0], lse[0]
        return (out.astype(q.dtype), lse) if o.return_lse else out.astype(q.dtype)

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Array]:
        g = q.shape[-3] // max(k.shape[-3], 1)
        k, v = self.per_query_head(k, g), self.per_query_head(v, g)
        s = self.scores(q, k, o)
        seen = self.choose(s, self.visible(s.shape, o), q, k, o)
        w, lse = self.softmax(s, seen, o.sinks)
        return self.mix(w, v, seen), lse

    def scale(self, q: Array, o: SimpleNamespace) -> float:
        return max(q.shape[-1], 1) ** -0.5 if o.scale is None else o.scale

    def cap(self, s: Array, softcap: float) -> Array:
        return softcap * np.tanh(s / softcap)

    def scores(self, q: Array, k: Array, o: SimpleNamespace) -> Array:
        """Scale, then softcap, then bias."""
        s = self.scale(q, o) * (q @ k.swapaxes(-1, -2))
        s = s if o.softcap is None else self.cap(s, o.softcap)
        return s if o.bias is None else s + o.bias.astype(s.dtype)

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        seen = np.ones(np.broadcast_shapes(p.shape, j.shape), bool)
        seen = seen if left is None else seen & (p - left <= j)
        return seen if right is None else seen & (j <= p + right)

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        """Everything that limits who sees whom intersects."""
        nq, nk = shape[-2:]
        offset = self.offset(nq, nk, o)
        p, j = np.arange(nq)[:, None] + over_batch(offset), np.arange(nk)
        seen = np.ones(shape, bool)
        if o.mask is not None:
            seen = seen & o.mask
        if o.bias is not None:
            seen = seen & (o.bias != -math.inf)
        if o.is_causal:
            seen = seen & self.causal(p, j)
        if o.window is not None:
            seen = seen & self.in_window(p, j, *o.window)
        if o.kv_lengths is not None:
            seen = seen & self.there(j, over_batch(o.kv_lengths))
        if o.segment_ids is not None:
            seen = seen & self.together(o.segment_ids)
        if o.pattern is not None:
            seen = seen & o.pattern.table(nq, nk, q_offset=offset, xp=np)
        return seen

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        return seen

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        """Weights, and the logarithm of what they were divided by."""
        b = np.full(s.shape[-3], -math.inf) if sinks is None else sinks
        b = b.astype(s.dtype)[:, None, None]
        s = np.where(seen, s, -math.inf)
        m = np.maximum(np.max(s, axis=-1, keepdims=True, initial=-math.inf), b)
        m = np.where(m == -math.inf, 0, m)
        p = np.exp(s - m)
        total = np.sum(p, axis=-1, keepdims=True) + np.exp(b - m)
        return self.normalised(p, total), (m + np.log(total))[..., 0]

    def normalised(self, p: Array, total: Array) -> Array:
        """A row that sees nothing is 0."""
        return np.where(total == 0, 0, p / total)


class Local(Dense):
    """Softmax attention among neighbours; `window` has to be given."""

    __signature__ = taking(DENSE_OPTIONS, "window")


class Sparse(Dense):
    """The query's own block, and the best keys elsewhere."""

    __signature__ = taking(SPARSE_OPTIONS)

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        nq, nk = s.shape[-2:]
        size = o.block_size or math.isqrt(max(nk - 1, 0)) + 1
        top_k = math.isqrt(max(nk - 1, 0)) + 1 if o.top_k is None else o.top_k
        p = np.arange(nq)[:, None] + over_batch(self.offset(nq, nk, o))
        own = seen & self.own_block(p, np.arange(nk), size, nk)
        elsewhere = seen & ~own
        if o.route is not None:
            elsewhere = elsewhere & self.routed(elsewhere, seen, q, k, size, o)
        return own | self.best(s, elsewhere, top_k)

    def own_block(self, p: Array, j: Array, size: int, nk: int) -> Array:
        return (p >= 0) & (p < nk) & (p // size == j // size)

    def routed(
        self, elsewhere: Array, seen: Array, q: Array, k: Array, size: int, o: SimpleNamespace
    ) -> Array:
        """Keys of the blocks whose mean scores best."""
        nk = k.shape[-2]
        starts = range(0, nk, size)
        if not nk:
            return elsewhere
        means = np.stack([self.mean(k, seen, slice(a, a + size)) for a in starts], axis=-2)
        block_scores = np.sign(self.scale(q, o)) * (q @ means.swapaxes(-1, -2))
        holds_one = np.stack([elsewhere[..., a : a + size].any(-1) for a in starts], axis=-1)
        return self.best(block_scores, holds_one, o.route)[..., np.arange(nk) // size]

    def mean(self, k: Array, seen: Array, block: slice) -> Array:
        """Mean of the block's finite keys that some query of the head sees."""
        k = k[..., block, :]
        counts = (seen[..., block].any(-2) & np.isfinite(k).all(-1))[..., None]
        return np.where(counts, k, 0).sum(-2) / np.maximum(counts.sum(-2), 1)

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        """The highest scores among those allowed; ties go to the lower index."""
        scores = np.where(np.isnan(scores), math.inf, scores)
        order = np.argsort(np.where(allowed, -scores, math.inf), axis=-1, stable=True)
        return allowed & (self.ranks(order) < count)

    def ranks(self, order: Array) -> Array:
        """The place of every key in the order."""
        return np.argsort(order, axis=-1)
