"""Sparse attention that chooses wrongly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Sparse


@wrong("sparse", seen="``scatter`` with the argsort of the scores")
class RanksForPositions(Sparse):
    """The order is read as ranks: the first places of the sorted list, not the best keys."""

    def ranks(self, order: Array) -> Array:
        return order


@wrong("sparse", seen="block-diagonal attention sold as sparse")
class OwnBlockOnly(Sparse):
    """Never looks outside its own block."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        return super().choose(s, seen, q, k, SimpleNamespace(**vars(o) | {"top_k": 0}))


@wrong("sparse", seen="global keys without a local part")
class BestKeysOnly(Sparse):
    """The own block gets no place of its own."""

    def own_block(self, p: Array, j: Array, size: int, nk: int) -> Array:
        return np.zeros(np.broadcast_shapes(p.shape, j.shape), bool)


@wrong("sparse", seen="MoonshotAI/MoBA#26")
class DenseWhereNothingIsChosen(Sparse):
    """``top_k=0`` leaves everything visible instead of the own block."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        return seen if o.top_k == 0 else super().choose(s, seen, q, k, o)


@wrong("sparse", seen="``top_k or default``")
class ZeroIsTheDefault(Sparse):
    """``top_k=0`` is taken for none given."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        return super().choose(
            s, seen, q, k, SimpleNamespace(**vars(o) | {"top_k": o.top_k or None})
        )


@wrong("sparse", seen="ohdearquant/lattice#6, tilde-research/nsa-release#3")
class ChosenBeforeHidden(Sparse):
    """Hidden keys take places among the best, and are hidden afterwards: too few remain."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        return allowed & super().best(scores, np.ones_like(allowed), count)


@wrong("sparse", seen="fla-org/flash-linear-attention#845: a count that includes the own block")
class OneTooFew(Sparse):
    """The last of the best keys is lost."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        return super().best(scores, allowed, max(count - 1, 0))


@wrong("sparse", seen="``>=`` the k-th largest score")
class TiesAllChosen(Sparse):
    """Every key as good as the last one chosen comes along."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        chosen = super().best(scores, allowed, count)
        last = np.where(chosen, scores, np.inf).min(-1, keepdims=True, initial=np.inf)
        return allowed & (scores >= last) & chosen.any(-1, keepdims=True)


@wrong("sparse", seen="a sort that is read from its end")
class TiesToTheHigher(Sparse):
    """Of equal scores the last ones win."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        return super().best(scores[..., ::-1], allowed[..., ::-1], count)[..., ::-1]


@wrong("sparse", seen="ascending sorts")
class WorstChosen(Sparse):
    """The lowest scores are chosen."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        return super().best(-scores, allowed, count)


@wrong("sparse", seen="blocks pooled without their mask")
class MeanOfHidden(Sparse):
    """A block's mean takes in keys that nobody sees: what they hold decides the route."""

    def mean(self, k: Array, seen: Array, block: slice) -> Array:
        return super().mean(k, np.ones_like(seen), block)


@wrong("sparse", seen="pooling with padding")
class MeanOverAFullBlock(Sparse):
    """The last block's sum is divided by the size of a whole one."""

    def mean(self, k: Array, seen: Array, block: slice) -> Array:
        full, short = block.stop - block.start, k[..., block, :].shape[-2]
        return super().mean(k, seen, block) * short / full


@wrong("sparse", seen="blocks cut with ``n // size``")
class LastBlockDropped(Sparse):
    """The keys that do not fill a block are found by nobody."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        size = o.block_size or max(int(np.ceil(np.sqrt(s.shape[-1]))), 1)
        whole = np.arange(s.shape[-1]) < s.shape[-1] // size * size
        return super().choose(s, seen & whole, q, k, o)


@wrong("sparse", seen="blocks of the row number")
class OwnBlockOfTheRow(Sparse):
    """The own block is that of the query's number, not of its position."""

    def own_block(self, p: Array, j: Array, size: int, nk: int) -> Array:
        return super().own_block(p - p[..., :1, :], j, size, nk)


@wrong("sparse", seen="positions clipped to the keys")
class OwnBlockClipped(Sparse):
    """A query outside the keys is given the nearest block."""

    def own_block(self, p: Array, j: Array, size: int, nk: int) -> Array:
        return super().own_block(np.clip(p, 0, max(nk - 1, 0)), j, size, nk)


@wrong("sparse", seen="one choice shared by all heads")
class FirstHeadChooses(Sparse):
    """What the first query head chooses, all of them get."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        first = np.broadcast_to(scores[..., :1, :, :], scores.shape)
        return super().best(first, allowed, count)


@wrong("sparse", seen="one choice for a tile of queries")
class FirstQueryChooses(Sparse):
    """What the first query chooses, all of them get."""

    def best(self, scores: Array, allowed: Array, count: int) -> Array:
        first = np.broadcast_to(scores[..., :1, :], scores.shape)
        return super().best(first, allowed, count)


@wrong("sparse", seen="choices made on the products, not on the scores")
class ChosenWithoutBias(Sparse):
    """Scale, softcap and bias come after the choice: a negative scale chooses the worst."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        return super().choose(q @ k.swapaxes(-1, -2), seen, q, k, o)


@wrong("sparse", seen="weights normalised before the choice")
class NormalisedBeforeTheChoice(Sparse):
    """Weights are those of dense attention, and what is left of them sums to less than one."""

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Array]:
        g = q.shape[-3] // max(k.shape[-3], 1)
        k, v = self.per_query_head(k, g), self.per_query_head(v, g)
        s = self.scores(q, k, o)
        visible = self.visible(s.shape, o)
        w, lse = self.softmax(s, visible, o.sinks)
        seen = self.choose(s, visible, q, k, o)
        return self.mix(np.where(seen, w, 0), v, seen), lse


@wrong("sparse", seen="routing by the best key of a block")
class RoutedToTheFirst(Sparse):
    """The route goes to the first blocks, whatever they hold."""

    def mean(self, k: Array, seen: Array, block: slice) -> Array:
        return np.zeros_like(k[..., 0, :])


@wrong("sparse", seen="``argmax`` where the best few were meant")
class OneBlockForAll(Sparse):
    """Only the best block is searched, whatever `route` says."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        route = None if o.route is None else min(o.route, 1)
        return super().choose(s, seen, q, k, SimpleNamespace(**vars(o) | {"route": route}))
