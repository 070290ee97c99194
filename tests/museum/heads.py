"""Heads and items of the batch that read what is not theirs."""

from __future__ import annotations

import math

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Dense


@wrong("dense", seen="onnx/onnx#7274")
class HeadsTiled(Dense):
    """Key heads 0, 1, 0, 1 for query heads that expect 0, 0, 1, 1."""

    def per_query_head(self, x: Array, g: int) -> Array:
        return np.concatenate([x] * g, axis=-3) if g else x[..., :0, :, :]


@wrong("dense", seen="one key head broadcast where there are several")
class FirstHeadForAll(Dense):
    """Every query head reads the first key head."""

    def per_query_head(self, x: Array, g: int) -> Array:
        return np.repeat(x[..., :1, :, :], x.shape[-3] * g, axis=-3)


@wrong("dense", seen="``view`` where ``transpose`` was meant")
class HeadsReshaped(Dense):
    """Heads and tokens are relabelled, not swapped: a head reads pieces of all of them."""

    def per_query_head(self, x: Array, g: int) -> Array:
        mixed = np.ascontiguousarray(x.swapaxes(-3, -2)).reshape(x.shape)
        return super().per_query_head(mixed, g)


@wrong("dense", seen="keys and values expanded in two places")
class ValueHeadsReversed(Dense):
    """Keys go to the right heads, values to those counted from the other end."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return super().mix(w, v[..., ::-1, :, :], seen)


@wrong("dense", seen="caches without a batch axis")
class FirstItemForAll(Dense):
    """Every item of the batch reads the values of the first."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return super().mix(w, np.broadcast_to(v[:1], v.shape) if v.ndim > 3 else v, seen)


@wrong("dense", seen="normalisation over all axes but the last")
class BatchShiftsScores(Dense):
    """The largest score of the whole batch is taken off: rows far below it underflow."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        b = -math.inf if sinks is None else sinks.astype(s.dtype)[:, None, None]
        m = np.max(np.where(seen, s, -math.inf), initial=-1e30)
        p = np.where(seen, np.exp(s - m), 0)
        total = p.sum(-1, keepdims=True) + np.exp(b - m)
        return self.normalised(p, total), (m + np.log(total))[..., 0]


@wrong("dense", seen="pytorch/torchtitan#2211: sinks beside the softmax")
class SinkUnshifted(Dense):
    """The sink joins the total without the maximum taken off it."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        w, lse = super().softmax(s, seen, None)
        if sinks is None:
            return w, lse
        with_sink = np.log(np.exp(lse) + np.exp(sinks.astype(s.dtype)[:, None]))
        m = np.max(np.where(seen, s, -math.inf), -1, keepdims=True, initial=-math.inf)
        p = np.where(seen, np.exp(s - np.where(m == -math.inf, 0, m)), 0)
        total = p.sum(-1, keepdims=True) + np.exp(sinks.astype(s.dtype)[:, None, None])
        return p / total, with_sink


@wrong("dense", seen="loaders that share one parameter")
class SinkOfTheFirst(Dense):
    """Every head has the first head's sink."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        shared = None if sinks is None else np.broadcast_to(sinks[:1], sinks.shape)
        return super().softmax(s, seen, shared)


@wrong("dense", seen="``np.stack`` over the items of a batch")
class StackedItems(Dense):
    """Items one after the other, stacked in the end: a batch of none has nothing to stack."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        parts = zip(*(x.reshape(-1, *x.shape[-2:]) for x in (w, v, seen)), strict=True)
        mixed = np.stack([super(StackedItems, self).mix(*part) for part in parts])
        return mixed.reshape(*w.shape[:-1], v.shape[-1])
