"""Sparse attention that chooses wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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

    def sum_of(self, k: Array, seen: Array, block: slice) -> tuple[Array, Array]:
        return super().sum_of(k, np.ones_like(seen), block)


@wrong("sparse", seen="pooling with padding")
class MeanOverAFullBlock(Sparse):
    """The last block's sum is divided by the size of a whole one."""

    def sum_of(self, k: Array, seen: Array, block: slice) -> tuple[Array, Array]:
        total, count = super().sum_of(k, seen, block)
        return total, np.full_like(count, block.stop - block.start)


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

    def by_means(self, q: Array, k: Array, seen: Array, at: list[slice]) -> Array:
        return np.zeros((*q.shape[:-1], len(at)))


@wrong("sparse", seen="``argmax`` where the best few were meant")
class OneBlockForAll(Sparse):
    """Only the best block is searched, whatever `route` says."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        route = None if o.route is None else min(o.route, 1)
        return super().choose(s, seen, q, k, SimpleNamespace(**vars(o) | {"route": route}))


# -- Keys or blocks, by whom, by what, and what besides ---------------------------------------


@wrong("sparse", seen="``starts[chosen] + size - 1`` as the index of a block")
class BlocksCutToTheirLastKey(Sparse):
    """Of a block chosen only the last key is seen."""

    def keys_of(self, blocks: Array, size: int, nk: int) -> Array:
        j = np.arange(nk)
        return super().keys_of(blocks, size, nk) & ((j % size == size - 1) | (j == nk - 1))


@wrong("sparse", seen="``argsort(scores)`` where its inverse was meant")
class RanksForScores(Sparse):
    """Scores given for blocks are replaced by the order of them."""

    def given(self, scores: Array, of: Array, o: SimpleNamespace) -> Array:
        ranks = np.where(scores == -np.inf, scores, np.argsort(scores, axis=-1))
        return super().given(ranks.astype(scores.dtype), of, o)


@wrong("sparse", seen="-inf replaced by a large number, and chosen where places are left")
class ForbiddenIfNeeded(Sparse):
    """A block forbidden with ``-inf`` is chosen when there is no better one."""

    def given(self, scores: Array, of: Array, o: SimpleNamespace) -> Array:
        return super().given(np.where(scores == -np.inf, -1e30, scores), of, o)


@wrong("sparse", seen="an indexer whose scores only break ties")
class GivenScoresIgnored(Sparse):
    """Scores given for blocks are not looked at, but for what they forbid."""

    def given(self, scores: Array, of: Array, o: SimpleNamespace) -> Array:
        return super().given(np.where(scores == -np.inf, scores, 0), of, o)


@wrong("sparse", seen="a bound written for queries above 0")
class BoundOfUnsignedQueries(Sparse):
    """The bound takes the largest keys for queries below 0, too."""

    def bound(self, q: Array, low: Array, high: Array) -> Array:
        return q @ high.swapaxes(-1, -2)


@wrong("sparse", seen="bounds from above and from below confused")
class BoundFromBelow(Sparse):
    """The smaller of the two products: what every score of the block exceeds."""

    def bound(self, q: Array, low: Array, high: Array) -> Array:
        return super().bound(q, high, low)


@wrong("sparse", seen="bounds trusted as scores")
class ExactSearchRouted(Sparse):
    """With a score other than the mean, only the best block is searched for keys."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        if o.score != "mean" and o.route is None:
            o = SimpleNamespace(**vars(o) | {"route": 1})
        return super().choose(s, seen, q, k, o)


@wrong("sparse", seen="scores of a group read from its first head")
class FirstOfTheGroupChooses(Sparse):
    """Heads that share keys take what the first of them chooses, not what all would."""

    def pooled(self, x: Array, o: SimpleNamespace) -> Array:
        hq, hkv = o.heads
        if o.per != "group" or not hq:
            return super().pooled(x, o)
        return np.repeat(x[..., :: hq // hkv, :, :], hq // hkv, axis=-3)


@wrong("sparse", seen="``max`` over a group in the place of ``sum``")
class GroupChoosesByTheMaximum(Sparse):
    """Who chooses together goes by the loudest of them."""

    def pooled(self, x: Array, o: SimpleNamespace) -> Array:
        hq, hkv = o.heads
        if o.per != "group" or not hq:
            return super().pooled(x, o)
        groups = x.reshape(*x.shape[:-3], hkv, hq // hkv, *x.shape[-2:])
        return np.repeat(groups.max(-3), hq // hkv, axis=-3)


@wrong("sparse", seen="an option of the kernel that the wrapper drops")
class EveryoneForThemselves(Sparse):
    """`per` does nothing: every query of every head chooses by itself."""

    def pooled(self, x: Array, o: SimpleNamespace) -> Array:
        return x


@wrong("sparse", seen="tiles of queries cut from the first row, not at positions")
class BlocksOfRows(Sparse):
    """Queries that choose together are those of a block of rows, wherever they stand."""

    def pooled(self, x: Array, o: SimpleNamespace) -> Array:
        rows = np.arange(x.shape[-2])[:, None]
        size = int(np.max(np.sum(o.home == o.home.swapaxes(-1, -2), -1), initial=1))
        return super().pooled(x, SimpleNamespace(**vars(o) | {"home": rows // size}))


@wrong("sparse", seen="sinks and windows that are places of the same budget")
class AlwaysCountsAsChosen(Sparse):
    """What is always seen takes one of the `top_k` places."""

    def choose(self, s: Array, seen: Array, q: Array, k: Array, o: SimpleNamespace) -> Array:
        if o.always is not None and o.top_k is not None:
            o = SimpleNamespace(**vars(o) | {"top_k": max(o.top_k - 1, 0)})
        return super().choose(s, seen, q, k, o)


@wrong("sparse", seen="sinks that are kept in the cache and masked out")
class AlwaysIgnored(Sparse):
    """What should always be seen has to be chosen like the rest."""

    def always(self, nq: int, nk: int, offset: Any, o: SimpleNamespace) -> Any:
        return False


@wrong("sparse", seen="windows added after the mask")
class AlwaysInsteadOfOwn(Sparse):
    """`always` replaces the own block."""

    def own_block(self, p: Array, j: Array, size: int, nk: int) -> Array:
        self.own = super().own_block(p, j, size, nk)
        return self.own

    def always(self, nq: int, nk: int, offset: Any, o: SimpleNamespace) -> Any:
        found = super().always(nq, nk, offset, o)
        if found is not False:
            self.own[...] = False
        return found


@wrong("sparse", seen="buffers of indices made with ``zeros``")
class PaddedWithZero(Sparse):
    """What is missing of a selection is 0, which is the first key."""

    def padded(self, index: Array, n: int) -> Array:
        return np.where(index == n, 0, index)


@wrong("sparse", seen="indices as ``topk`` gives them, padded in front")
class PaddedInFront(Sparse):
    """What is missing of a selection comes first."""

    def padded(self, index: Array, n: int) -> Array:
        return np.sort(super().padded(index, n), axis=-1)


@wrong("sparse", seen="indices that go with the scores")
class SelectionDescends(Sparse):
    """The selection is right, and in the opposite order."""

    def padded(self, index: Array, n: int) -> Array:
        return super().padded(index, n)[..., ::-1]


@wrong("sparse", seen="what was routed to, returned for what was chosen")
class SelectionOfTheFirstQuery(Sparse):
    """The selection of the first row is returned for all of them."""

    def named(self, chosen: Array, count: int, o: SimpleNamespace) -> Array:
        found = super().named(chosen, count, o)
        return np.broadcast_to(found[..., :1, :], found.shape).copy()


@wrong("sparse", seen="``if blocks <= top_k: return dense``, compared with keys")
class NeverAllBlocks(Sparse):
    """One block is always left out, however large `top_k` is."""

    def keys_of(self, blocks: Array, size: int, nk: int) -> Array:
        return super().keys_of(blocks & (np.arange(blocks.shape[-1]) > 0), size, nk)


@wrong("sparse", seen="scores with a bonus for what is near")
class EarlierBlocksFavoured(Sparse):
    """Of two blocks the earlier is chosen, unless the other is much better."""

    def scored(self, s: Array, elsewhere: Array, *rest: Any) -> Array:
        found = super().scored(s, elsewhere, *rest)
        return (found - 1e4 * np.arange(found.shape[-1])).astype(found.dtype)
