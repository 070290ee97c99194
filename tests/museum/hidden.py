"""What is hidden, and shows all the same; and rows that see nothing."""

from __future__ import annotations

import math

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Dense, Local, Sparse


@wrong("dense", seen="huggingface/transformers#17306, #10484")
class TenThousandLess(Dense):
    """Hidden scores are 10000 less, which is not hidden: large ones come through."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        return super().softmax(np.where(seen, s, s - 1e4), np.ones_like(seen), sinks)


@wrong("dense", seen="NVIDIA/apex#1390")
class MeanRows(Dense):
    """Hidden scores are the least number there is: who sees nothing gets the mean of all."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        least = np.finfo(s.dtype).min
        return super().softmax(np.where(seen, s, least), np.ones_like(seen), sinks)


@wrong("dense", seen="pytorch/pytorch#103749, tracel-ai/burn#4694")
class NaNRows(Dense):
    """Nothing over nothing: who sees nothing gets NaN."""

    def normalised(self, p: Array, total: Array) -> Array:
        return p / total


@wrong("dense", seen="ml-explore/mlx#2395")
class FirstKeyRows(Dense):
    """Who sees nothing gets the first value, since the first maximum lies there."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        w, lse = super().softmax(s, seen, sinks)
        w[..., :1] = np.where(seen.any(-1, keepdims=True), w[..., :1], 1)
        return w, lse


@wrong("dense", seen="pytorch/pytorch#101967")
class ValueLeaks(Dense):
    """Zero times NaN is NaN: what a hidden value holds reaches everybody."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return w @ v


@wrong("local", seen="kernels whose window is padded with what the memory held")
class LocalValueLeaks(Local):
    """Zero times NaN is NaN, outside the window too."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return w @ v


@wrong("sparse", seen="pytorch/pytorch#101967, behind a choice of keys")
class SparseValueLeaks(Sparse):
    """Zero times NaN is NaN, for keys that were not chosen too."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return w @ v


@wrong("dense", seen="pytorch/pytorch#101967: additive masks")
class KeyLeaks(Dense):
    """Minus infinity is added to the score: NaN stays NaN, whoever may see it."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        s = s + np.where(seen, 0, -math.inf).astype(s.dtype)
        return super().softmax(s, seen | np.isnan(s), sinks)


@wrong("dense", seen="``nan_to_num`` as a remedy for empty rows")
class NaNForgiven(Dense):
    """Every NaN becomes 0, and with it those that a query does see."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return np.nan_to_num(super().mix(np.nan_to_num(w), v, seen), posinf=0, neginf=0)
