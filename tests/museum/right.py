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
SPARSE_OPTIONS |= {"select": "keys", "per": "query", "score": "mean", "block_scores": None}
SPARSE_OPTIONS |= {"always": None, "return_selection": False}


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
    """The query's own block, and the best keys or blocks elsewhere."""

    __signature__ = taking(SPARSE_OPTIONS)

    def read(self, *arrays: Array, **options: Any) -> SimpleNamespace:
        """Options, heads, and a place for what will be found chosen."""
        o = super().read(*arrays, **options)
        o.heads = tuple(1 if x.ndim == 2 else x.shape[-3] for x in arrays[:2])
        o.found = []
        return o

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        o = self.read(q, k, v, **options)
        with np.errstate(all="ignore"):
            out, lse = self.attend(*self.widen(q, k, v), o)
        results = (out.astype(q.dtype), *([lse] if o.return_lse else []))
        results += (self.named(*o.found[-1], o),) if o.return_selection else ()
        results = tuple(x[0] for x in results) if q.ndim == 2 else results
        return results if len(results) > 1 else results[0]

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        nq, nk = s.shape[-2:]
        root = math.isqrt(max(nk - 1, 0)) + 1
        size = max(min(o.block_size or root, nk), 1)
        offset = self.offset(nq, nk, o)
        p, j = np.arange(nq)[:, None] + over_batch(offset), np.arange(nk)
        beside = self.own_block(p, j, size, nk) | self.always(nq, nk, offset, o)
        own, elsewhere = seen & beside, seen & ~beside
        o.home = p // size - p[..., :1, :] // size
        o.rows = self.rows(p, size)
        blocks = self.searched(s, elsewhere, seen, q, k, size, o)
        if o.select == "blocks":
            count = min(3 if o.top_k is None else o.top_k, -(-nk // size))
            chosen = self.best(*blocks, count)
            taken = self.keys_of(chosen, size, nk)
        else:
            if o.route is not None:
                elsewhere = elsewhere & self.keys_of(self.best(*blocks, o.route), size, nk)
            count = min(root if o.top_k is None else o.top_k, nk)
            totals = self.total(s, elsewhere, o), self.anyone(elsewhere, o)
            taken = chosen = self.best(*totals, count)
        o.found.append((chosen, count))
        return own | (elsewhere & taken)

    def own_block(self, p: Array, j: Array, size: int, nk: int) -> Array:
        return (p >= 0) & (p < nk) & (p // size == j // size)

    def always(self, nq: int, nk: int, offset: Any, o: SimpleNamespace) -> Any:
        return False if o.always is None else o.always.table(nq, nk, q_offset=offset, xp=np)

    def keys_of(self, blocks: Array, size: int, nk: int) -> Array:
        """The keys of blocks."""
        return blocks[..., np.arange(nk) // size]

    def searched(
        self, s: Array, elsewhere: Array, seen: Array, q: Array, k: Array, size: int, o: Any
    ) -> tuple[Array, Array]:
        """The scores of blocks, and which of them can be chosen."""
        at = [slice(a, a + size) for a in range(0, k.shape[-2], size)]
        if not at:
            return np.zeros((*s.shape[:-1], 0)), np.zeros((*s.shape[:-1], 0), bool)
        holds_one = np.stack([elsewhere[..., x].any(-1) for x in at], axis=-1)
        if o.block_scores is not None:
            scores = self.given(o.block_scores.astype(s.dtype), holds_one, o)
        else:
            scores = self.total(self.scored(s, elsewhere, seen, q, k, at, o), holds_one, o)
        return scores, self.anyone(holds_one, o) & (scores != -math.inf)

    def scored(
        self, s: Array, elsewhere: Array, seen: Array, q: Array, k: Array, at: Any, o: Any
    ) -> Array:
        """Blocks by their mean, by a bound from above, or by the best score in them."""
        if o.score == "best":
            s = np.where(elsewhere, np.where(np.isnan(s), math.inf, s), -math.inf)
            return np.stack([s[..., x].max(-1) for x in at], axis=-1)
        if o.score == "bound":
            low, high = np.stack([np.stack(self.bounds(k, seen, x)) for x in at], axis=-2)
            return self.bound(self.scale(q, o) * q, low, high)
        return np.sign(self.scale(q, o)) * self.by_means(q, k, seen, at)

    def by_means(self, q: Array, k: Array, seen: Array, at: list[slice]) -> Array:
        """Products with the means, all times one number: so those of whole numbers stay whole."""
        parts = zip(*(self.sum_of(k, seen, x) for x in at), strict=True)
        total, count = (np.stack(x, axis=-2) for x in parts)
        whole = total * (np.lcm.reduce(count.reshape(-1), initial=1) // count)
        return q.astype(float) @ whole.swapaxes(-1, -2)

    def sum_of(self, k: Array, seen: Array, block: slice) -> tuple[Array, Array]:
        """Sum of the block's finite keys that some query of the head sees, and their number."""
        k = k[..., block, :]
        counts = (seen[..., block].any(-2) & np.isfinite(k).all(-1))[..., None]
        return np.where(counts, k, 0).sum(-2), np.maximum(counts.sum(-2), 1)

    def bounds(self, k: Array, seen: Array, block: slice) -> tuple[Array, Array]:
        """The smallest and the largest number in each channel of the same keys."""
        k = k[..., block, :]
        counts = (seen[..., block].any(-2) & np.isfinite(k).all(-1))[..., None]
        none = ~counts.any(-2)
        low, high = np.where(counts, k, math.inf).min(-2), np.where(counts, k, -math.inf).max(-2)
        return np.where(none, 0, low), np.where(none, 0, high)

    def bound(self, q: Array, low: Array, high: Array) -> Array:
        """The larger of the two products, summed over channels."""
        return np.maximum(q, 0) @ high.swapaxes(-1, -2) + np.minimum(q, 0) @ low.swapaxes(-1, -2)

    def total(self, x: Array, of: Array, o: SimpleNamespace) -> Array:
        """The sum over those who choose together and can choose it, for each of them."""
        return self.pooled(np.where(of, x, 0), o)

    def anyone(self, of: Array, o: SimpleNamespace) -> Array:
        return self.pooled(of.astype(int), o) > 0

    def pooled(self, x: Array, o: SimpleNamespace) -> Array:
        hq, hkv = o.heads
        if o.per == "group" and hq:
            groups = x.reshape(*x.shape[:-3], hkv, hq // hkv, *x.shape[-2:])
            return np.repeat(groups.sum(-3), hq // hkv, axis=-3)
        if o.per == "block":
            together = (o.home == o.home.swapaxes(-1, -2))[..., None]
            return np.where(together, x[..., None, :, :], 0).sum(-2)
        return x

    def given(self, scores: Array, of: Array, o: SimpleNamespace) -> Array:
        """Scores from elsewhere; one row for all who choose together is taken as it is."""
        scores = scores[(None,) * max(3 - scores.ndim, 0)]
        hq, hkv = o.heads
        alone = o.per == "group" and scores.shape[-3] in {1, hkv}
        if scores.shape[-3] == hkv:
            scores = np.repeat(scores, hq // hkv, axis=-3)
        if o.per == "block" and scores.shape[-2] in {1, o.rows}:
            alone = True
            if scores.shape[-2] == o.rows:
                home = np.broadcast_to(o.home, (*of.shape[:-1], 1))
                scores = np.broadcast_to(scores, (*of.shape[:-2], *scores.shape[-2:]))
                scores = np.take_along_axis(scores, home, axis=-2)
        scores = np.broadcast_to(scores, of.shape)
        return scores if alone else self.total(scores, of, o)

    def rows(self, p: Array, size: int) -> int:
        """How many blocks the queries lie in, at most, where they begin at different places."""
        nq = p.shape[-2]
        if not nq:
            return 0
        if p.ndim > 3:
            return (nq + size - 2) // size + 1
        return int(p[0, -1, 0] // size - p[0, 0, 0] // size) + 1

    def named(self, chosen: Array, count: int, o: SimpleNamespace) -> Array:
        """The indices chosen, ascending, then -1: a row for all who chose together."""
        if o.per == "group":
            chosen = chosen[..., :: max(o.heads[0] // max(o.heads[1], 1), 1), :, :]
        if o.per == "block":
            home = np.broadcast_to(o.home, (*chosen.shape[:-1], 1))
            here = [(home == row) & chosen for row in range(o.rows)]
            chosen = np.stack([x.any(-2) for x in here], axis=-2) if here else chosen
        n = chosen.shape[-1]
        index = np.sort(np.where(chosen, np.arange(n), n), axis=-1)[..., :count]
        return self.padded(index, n)

    def padded(self, index: Array, n: int) -> Array:
        return np.where(index == n, -1, index)

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        """The highest scores among those allowed; ties go to the lower index."""
        scores = np.where(np.isnan(scores), math.inf, scores)
        order = np.argsort(np.where(allowed, -scores, math.inf), axis=-1, stable=True)
        return allowed & (self.ranks(order) < count)

    def ranks(self, order: Array) -> Array:
        """The place of every key in the order."""
        return np.argsort(order, axis=-1)
