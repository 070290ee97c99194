"""Local attention with the wrong neighbours."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Local, over_batch


@wrong("local", seen="huggingface/transformers#39408, zml/zml#763")
class WindowTooLong(Local):
    """Off by one: a key more to the left than was asked for."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, None if left is None else left + 1, right)


@wrong("local", seen="NVIDIA-NeMo/Megatron-Bridge#2656, the other way round")
class WindowTooShort(Local):
    """Off by one: the position itself is counted, and the last key to the left is lost."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, None if left is None else left - 1, right)


@wrong("local", seen="windows written for decoders")
class WindowLooksBackOnly(Local):
    """Keys to the right are never seen, whatever `right` says."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, left, 0)


@wrong("local", seen="windows with a single size")
class WindowSymmetric(Local):
    """The left width serves for both sides."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, left, left)


@wrong("local", seen="pairs read in the wrong order")
class WindowMirrored(Local):
    """Left and right change places."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, right, left)


@wrong("local", seen="``if left:``")
class WindowOfNoneIsAll(Local):
    """A width of 0 is taken for none given: unlimited."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, left or None, right or None)


@wrong("local", seen="proger/hippogriff#7")
class WindowIgnored(Local):
    """The width arrives with a sign that means unlimited: dense attention, at its cost."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, None, None)


@wrong("local", seen="windows laid around the row number")
class WindowFromTheTopLeft(Local):
    """The window goes around the query's number, not around its position."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p - p[..., :1, :], j, left, right)


@wrong("local", seen="windows that take the mask's place")
class WindowOverridesCausal(Local):
    """With a window the future is seen as far as it reaches, causal or not."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        causal = o.is_causal and o.window == (None, None)
        return super().visible(shape, SimpleNamespace(**vars(o) | {"is_causal": causal}))


@wrong("local", seen="negative indices")
class WindowWraps(Local):
    """What would lie before the first key is read from the end: the last keys."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        seen = super().in_window(p, j, left, right)
        wrapped = super().in_window(p, j - j.size, left, right) if left is not None else seen
        return seen | wrapped


@wrong("local", seen="neighbours gathered from a padded array")
class PaddingAtTheEdges(Local):
    """Places before the first key count as keys of score 0 whose value is 0."""

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Array]:
        out, lse = super().attend(q, k, v, o)
        left = o.window[0] or 0
        first = over_batch(self.offset(q.shape[-2], k.shape[-2], o))[..., 0]
        outside = np.clip(left - (np.arange(q.shape[-2]) + first), 0, left)
        more = np.logaddexp(lse, np.log(outside)).astype(lse.dtype)
        share = np.where(more == -math.inf, 0, np.exp(lse - more))
        return out * share[..., None], more


@wrong("local", seen="block-local attention sold as a sliding window")
class WindowInItsChunk(Local):
    """No window reaches over the border of a chunk of four keys."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, left, right) & (p // 4 == j // 4)


@wrong("local", seen="strides taken twice")
class WindowDilated(Local):
    """Every other neighbour is passed over."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, left, right) & ((p - j) % 2 == 0)


@wrong("local", seen="edges without a test of their own")
class EdgesEmpty(Local):
    """A query whose window is cut by the first key gets nothing."""

    def in_window(self, p: Array, j: Array, left: int | None, right: int | None) -> Array:
        return super().in_window(p, j, left, right) & (p >= (left or 0))


@wrong("local", seen="sums over windows of a fixed size")
class DividedByTheWindow(Local):
    """Weights are divided by how many keys fit the window, not by how many are there."""

    def softmax(self, s: Array, seen: Array, sinks: Any) -> tuple[Array, Array]:
        w, lse = super().softmax(s, seen, sinks)
        count = seen.sum(-1, keepdims=True)
        return w * count / np.maximum(count.max(initial=1), 1), lse
