"""Who sees whom, wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Dense, over_batch


@wrong("dense", seen="huggingface/transformers#38094, pytorch/pytorch#170404")
class MaskInverted(Dense):
    """True is taken for hidden: every query sees just what it must not."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        flipped = None if o.mask is None else ~o.mask
        return super().visible(shape, SimpleNamespace(**vars(o) | {"mask": flipped}))


@wrong("dense", seen="huggingface/pytorch-image-models#2236")
class MaskAfterSoftmax(Dense):
    """Weights are hidden once they are normalised, and no longer sum to one."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        w, lse = super().softmax(s, np.ones_like(seen), sinks)
        return np.where(seen, w, 0), lse


@wrong("dense", seen="wrappers in which is_causal and a mask exclude each other")
class CausalOverridesMask(Dense):
    """With both given, one of them is dropped without a word."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        mask = None if o.is_causal else o.mask
        return super().visible(shape, SimpleNamespace(**vars(o) | {"mask": mask}))


@wrong("dense", seen="masks put together with the wrong operator")
class MaskOrCausal(Dense):
    """A pair is seen if either rule allows it, where both have to."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        seen = super().visible(shape, o)
        return seen if o.mask is None or not o.is_causal else seen | o.mask


@wrong("dense", seen="line/lighthouse#77")
class MaskTiled(Dense):
    """A mask for each item, copied for the heads in the wrong order: another item's."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        mask = o.mask
        if mask is not None and mask.ndim == 4 and mask.shape[1] == 1:
            mask = np.tile(mask[:, 0], (shape[1], 1, 1)).reshape(-1, shape[1], *mask.shape[-2:])
        return super().visible(shape, SimpleNamespace(**vars(o) | {"mask": mask}))


@wrong("dense", seen="``np.tril(..., k=-1)`` and ``i > j``")
class CausalExcludesItself(Dense):
    """Off by one: no query sees the key at its own position."""

    def causal(self, p: Array, j: Array) -> Array:
        return j < p


@wrong("dense", seen="``np.tril(..., k=1)`` and slices with ``i + 2``")
class CausalSeesTheNext(Dense):
    """Off by one: every query sees the key after its own, which it is to predict."""

    def causal(self, p: Array, j: Array) -> Array:
        return j <= p + 1


@wrong("dense", seen="masks built with their axes swapped")
class CausalTransposed(Dense):
    """Sees the future, and not the past."""

    def causal(self, p: Array, j: Array) -> Array:
        return j >= p


@wrong("dense", seen="pytorch/pytorch#103082, NVIDIA/cutlass#2336")
class TopLeft(Dense):
    """The first query stands at the first key: one query and a cache see one key."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return 0 if o.q_offset is None else o.q_offset


@wrong("dense", seen="ml-explore/mlx#2967")
class TopLeftWhereQueriesAreMore(Dense):
    """From the end where keys are more, from the start where queries are."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return np.maximum(super().offset(nq, nk, o), 0) if o.q_offset is None else o.q_offset


@wrong("dense", seen="caches with room to spare")
class PositionsOfThePadding(Dense):
    """With lengths given, the last query still stands at the last slot of the cache."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return nk - nq if o.q_offset is None else o.q_offset


@wrong("dense", seen="offsets that one layer drops")
class OffsetIgnored(Dense):
    """Where the queries were said to stand is forgotten."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return super().offset(nq, nk, SimpleNamespace(**vars(o) | {"q_offset": None}))


@wrong("dense", seen="``cache[: length + 1]``")
class OnePaddedKey(Dense):
    """Off by one: the first slot of the padding is seen."""

    def there(self, j: Array, lengths: Array) -> Array:
        return j <= lengths


@wrong("dense", seen="AI4Bharat/IndicBERT#20, OpenNMT/OpenNMT-py#2532")
class PaddingSeen(Dense):
    """Lengths move the positions and hide nothing: padding takes part."""

    def there(self, j: Array, lengths: Array) -> Array:
        return np.ones(np.broadcast_shapes(j.shape, lengths.shape), bool)


@wrong("dense", seen="batches decoded with one length for all")
class LengthOfTheFirst(Dense):
    """The first item's length is used for the whole batch."""

    def there(self, j: Array, lengths: Array) -> Array:
        return j < (lengths.flat[0] if lengths.size else lengths)


@wrong("dense", seen="batches decoded with one length for all")
class LengthOfTheLongest(Dense):
    """Padding up to the longest item is seen: an item's rows depend on its neighbours."""

    def there(self, j: Array, lengths: Array) -> Array:
        return j < (lengths.max() if lengths.size else lengths)


@wrong("dense", seen="huggingface/nanoVLM#204, alex-hh/profam#495")
class SegmentsIgnored(Dense):
    """Packed documents see each other."""

    def together(self, ids: Any) -> Array:
        return np.ones_like(super().together(ids))


@wrong("dense", seen="segment masks with the order of their ids in them")
class EarlierSegmentsSeen(Dense):
    """``>=`` for ``==``: a document sees those with a smaller number."""

    def together(self, ids: Any) -> Array:
        a, b = ids if isinstance(ids, tuple) else (ids, ids)
        return a[..., None, :, None] >= b[..., None, None, :]


@wrong("dense", seen="causal kernels that mask whole tiles")
class CausalByTiles(Dense):
    """The tile on the diagonal is not cut: up to three keys of the future are seen."""

    def causal(self, p: Array, j: Array) -> Array:
        return j // 4 <= p // 4


@wrong("dense", seen="patterns that start from a row, not from a position")
class PatternFromTheTopLeft(Dense):
    """A pattern is laid out as if the first query stood at the first key."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        seen = super().visible(shape, SimpleNamespace(**vars(o) | {"pattern": None}))
        if o.pattern is None:
            return seen
        return seen & o.pattern.table(*shape[-2:], q_offset=0, xp=np)


@wrong("dense", seen="padding read from the wrong end")
class PaddedOnTheLeft(Dense):
    """The first keys are taken for padding, where the last are."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        seen = super().visible(shape, SimpleNamespace(**vars(o) | {"kv_lengths": None}))
        if o.kv_lengths is None:
            return seen
        return seen & (np.arange(shape[-1]) >= shape[-1] - over_batch(o.kv_lengths))
