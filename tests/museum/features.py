"""Linear attention: wrong sums, wrong states, wrong kernels."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from arrattn import LinearState
from museum.exhibit import wrong
from museum.right import Array
from museum.right_linear import Linear


@wrong("linear", seen="fla-org/flash-linear-attention#1263")
class PaddingInTheNormaliser(Linear):
    """Padded values are left out above the line, padded keys not below it."""

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        top, _ = super().sums(phi_q, phi_k, log_k, v, seen, m)
        return top, super().sums(phi_q, phi_k, log_k, v, np.ones_like(seen), m)[1]


@wrong("linear", seen="fla-org/flash-linear-attention#1266: why masks go after the map")
class MaskedBeforeTheMap(Linear):
    """Padded keys are set to 0 before the feature map, and phi(0) is 1."""

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        bare = {"key_mask": None, "kv_lengths": None}
        moved = SimpleNamespace(**vars(o) | bare)
        moved.q_offset = self.offset(*shape[-2:], o)
        self.hidden = ~np.broadcast_to(self.present(shape[-1], o), shape)
        return super().visible(shape, moved)

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        top, total = super().sums(phi_q, phi_k, log_k, v, seen & ~self.hidden, m)
        padded = (self.hidden & seen).sum(-1, keepdims=True)
        return top, total + phi_q.sum(-1, keepdims=True) * padded


@wrong("linear", seen="google-research/google-research#753, lucidrains/performer-pytorch#45")
class MaximumOverTheFuture(Linear):
    """
    Features are held in range by the largest of all keys, and a small number is added: how
    much it counts depends on keys that the query must not see.
    """

    def features(self, x: Array, o: SimpleNamespace, *, of_queries: bool) -> tuple[Array, Array]:
        f, log = super().features(x, o, of_queries=of_queries)
        if of_queries:
            return f, log
        f = f * np.exp(log - log.max(-1, keepdims=True, initial=-1e30))[..., None]
        largest = np.abs(f).max((-1, -2), keepdims=True, initial=1e-30)
        return f / largest + 1e-3, np.zeros_like(log)


@wrong("linear", seen="a softmax put over a kernel that is one already")
class SoftmaxOfTheKernel(Linear):
    """Weights that sum to one go through a softmax once more: nearly equal weights."""

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        w = np.where(seen, phi_q @ phi_k.swapaxes(-1, -2) * np.exp(log_k.swapaxes(-1, -2) - m), 0)
        total = w.sum(-1, keepdims=True)
        w = np.where(seen, np.exp(np.where(total == 0, 0, w / total)), 0)
        return self.mix(w, v, seen), w.sum(-1, keepdims=True)


@wrong("linear", seen="lucidrains/performer-pytorch#40")
class NormaliserNotInverted(Linear):
    """Multiplied by the sum of the weights where it was to be divided."""

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        if not o.normalize:
            return super().normalised(top, total, factor, o)
        return top * total


@wrong("linear", seen="``k.sum`` where ``k.cumsum`` was meant")
class NormaliserOfAllKeys(Linear):
    """The sums above the line are causal, those below it are not."""

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Any]:
        self.everything = super().visible(
            (*q.shape[:-1], k.shape[-2]), SimpleNamespace(**vars(o) | {"is_causal": False})
        )
        return super().attend(q, k, v, o)

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        top, _ = super().sums(phi_q, phi_k, log_k, v, seen, m)
        everything = np.broadcast_to(self.everything, seen.shape)
        return top, super().sums(phi_q, phi_k, log_k, v, everything, m)[1]


@wrong("linear", seen="epsilons against a division by zero")
class EpsilonInTheNormaliser(Linear):
    """Weights sum to a little less than one, and far less where features are small."""

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        if not o.normalize:
            return super().normalised(top, total, factor, o)
        return top / (total + 1e-6)


@wrong("linear", seen="0 / 0 in the first row, or where all is padded")
class NaNWithoutKeys(Linear):
    """Nothing over nothing: who sees nothing gets NaN."""

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        return top / total if o.normalize else super().normalised(top, total, factor, o)


@wrong("linear", seen="a state without the decay of the other tokens, or ``exclusive=True``")
class CausalExcludesItself(Linear):
    """Off by one: a query reads the state before its own token is in it."""

    def causal(self, p: Array, j: Array) -> Array:
        return j < p


@wrong("linear", seen="chunks summed up before they are read")
class CausalByChunks(Linear):
    """Within a chunk of four everything is seen, the future too."""

    def causal(self, p: Array, j: Array) -> Array:
        return j // 4 <= p // 4


@wrong("linear", seen="a prefix sum that starts with the first query")
class LinearTopLeft(Linear):
    """The first query stands at the first key."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return 0


@wrong("linear", seen="huggingface/transformers#46773")
class LinearPaddingSeen(Linear):
    """Padding takes part in sums and state."""

    def present(self, nk: int, o: SimpleNamespace) -> Array:
        return np.ones((1, 1, nk), bool)


@wrong("linear", seen="documents packed into one stream of states")
class LinearSegmentsIgnored(Linear):
    """The state of one document goes on into the next."""

    def together(self, ids: Any) -> Array:
        return np.ones_like(super().together(ids))


@wrong("linear", seen="masks that multiply")
class LinearValueLeaks(Linear):
    """Zero times NaN is NaN: padding and the future reach every sum."""

    def mix(self, w: Array, v: Array, seen: Array) -> Array:
        return w @ v


@wrong("linear", seen="onnx/onnx#7274, in its linear form")
class LinearHeadsTiled(Linear):
    """Key heads 0, 1, 0, 1 for query heads that expect 0, 0, 1, 1."""

    def per_query_head(self, x: Array, g: int) -> Array:
        return np.concatenate([x] * g, axis=-3) if g else x[..., :0, :, :]


@wrong("linear", seen="sums over one axis too many")
class BatchSummed(Linear):
    """The items of a batch share one numerator and one normaliser."""

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        top, total = super().sums(phi_q, phi_k, log_k, v, seen, m)
        if top.ndim < 4:
            return top, total
        return (np.broadcast_to(x.mean(0, keepdims=True), x.shape) for x in (top, total))


@wrong("linear", seen="fla-org/flash-linear-attention#351")
class PastIgnored(Linear):
    """The state handed in is not read."""

    def past(self, state: LinearState) -> tuple[Array, Array]:
        return np.zeros_like(state.S), np.zeros_like(state.z)[..., None]


@wrong("linear", seen="states that carry the sums and not the normaliser")
class PastNotNormalised(Linear):
    """The past counts above the line and not below it."""

    def past(self, state: LinearState) -> tuple[Array, Array]:
        return state.S, np.zeros_like(state.z)[..., None]


@wrong("linear", seen="fla-org/flash-linear-attention#1176: what is handed on is not the sum")
class PastForgotten(Linear):
    """The state handed on starts anew with every call."""

    def state(self, f: Array, v: Array, o: SimpleNamespace) -> LinearState:
        return super().state(f, v, SimpleNamespace(**vars(o) | {"initial_state": None}))


@wrong("linear", seen="a state handed over before its last update")
class LastTokenForgotten(Linear):
    """What is handed on lacks the last token."""

    def state(self, f: Array, v: Array, o: SimpleNamespace) -> LinearState:
        f = np.where(np.arange(f.shape[-2])[:, None] < f.shape[-2] - 1, f, 0)
        return super().state(f, v, o)


@wrong("linear", seen="padding on the right, and a state taken at the end")
class PaddingInTheState(Linear):
    """What is handed on contains the padding."""

    def state(self, f: Array, v: Array, o: SimpleNamespace) -> LinearState:
        return super().state(
            f, v, SimpleNamespace(**vars(o) | {"key_mask": None, "kv_lengths": None})
        )


@wrong("linear", seen="caches in the model's dtype")
class StateRounded(Linear):
    """The state is kept in half precision, and loses what is small beside the past."""

    def state(self, f: Array, v: Array, o: SimpleNamespace) -> LinearState:
        state = super().state(f, v, o)
        return LinearState(*(x.astype(np.float16).astype(x.dtype) for x in state))


@wrong("linear", seen="apache/mxnet#14072, in its linear form")
class LinearHalfSums(Linear):
    """Weights in half precision are infinite from 65520 on, and their sum stalls at 2048."""

    def accumulate_in(self, dtype: Any) -> Any:
        return dtype

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        top, total = super().sums(phi_q, phi_k, log_k, v, seen, m)
        w = np.where(seen, phi_q @ phi_k.swapaxes(-1, -2) * np.exp(log_k.swapaxes(-1, -2) - m), 0)
        in_turn = np.cumsum(w, axis=-1, dtype=w.dtype)[..., -1:]
        return top, in_turn if w.shape[-1] else total


@wrong("linear", seen="feature maps wired to one layer")
class MapIgnored(Linear):
    """Always elu(x) + 1, whatever map was given."""

    def features(self, x: Array, o: SimpleNamespace, *, of_queries: bool) -> tuple[Array, Array]:
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))), np.zeros(x.shape[:-1], x.dtype)


@wrong("linear", seen="softmax features without the norm of the key")
class NormOfTheKeyForgotten(Linear):
    """The factor exp(-|k|^2 / 2) is lost: the weights are those of another kernel."""

    def largest(self, log_k: Array, seen: Array, o: SimpleNamespace) -> Array:
        return super().largest(np.zeros_like(log_k), seen, o)

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        return super().sums(phi_q, phi_k, np.zeros_like(log_k), v, seen, m)


@wrong("linear", seen="features exponentiated as they are")
class FeaturesOverflow(Linear):
    """The logarithm beside the features is applied at once: infinite, or all zero."""

    def features(self, x: Array, o: SimpleNamespace, *, of_queries: bool) -> tuple[Array, Array]:
        f, log = super().features(x, o, of_queries=of_queries)
        return f * np.exp(log)[..., None], np.zeros_like(log)


@wrong("linear", seen="kernels for whole chunks")
class LastChunkDropped(Linear):
    """The keys that do not fill a chunk of four are never summed."""

    def present(self, nk: int, o: SimpleNamespace) -> Array:
        return super().present(nk, o) & (np.arange(nk) < nk // 4 * 4)


@wrong("linear", seen="scales that only softmax attention reads")
class LinearScaleIgnored(Linear):
    """Without a normaliser the weights are to be scaled, and are not."""

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        return super().normalised(top, total, factor, SimpleNamespace(**vars(o) | {"scale": 1.0}))


@wrong("linear", seen="implementations that normalise in any case")
class AlwaysNormalised(Linear):
    """``normalize=False`` changes nothing but the scale."""

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        out = np.where(total == 0, 0, top / total)
        return out if o.normalize else o.scale * out


@wrong("linear", seen="normalisers held above a small number")
class NormaliserClamped(Linear):
    """A sum of weights below 1 counts as 1: small kernels give small outputs."""

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        return super().normalised(top, np.maximum(total, 1), factor, o)


@wrong("linear", seen="normalisers that take the larger of two sums")
class MaximumIsTheSum(Linear):
    """The largest weight stands for their sum."""

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        top, total = super().sums(phi_q, phi_k, log_k, v, seen, m)
        w = np.where(seen, phi_q @ phi_k.swapaxes(-1, -2) * np.exp(log_k.swapaxes(-1, -2) - m), 0)
        return top, w.max(-1, keepdims=True, initial=-math.inf) if w.shape[-1] else total


@wrong("linear", seen="a gate applied after the token was added, where it was to come before")
class DecaysItsOwnToken(Linear):
    """A token decays as soon as it has come."""

    def between(self, g: Array) -> Array:
        return super().between(g) + g[..., None, :]

    def left_of(self, g: Array) -> Array:
        return super().left_of(g) + g


@wrong("linear", seen="a first chunk that takes the state as it comes")
class StateHandedOverUndecayed(Linear):
    """What went before does not decay with the tokens that come."""

    def since_the_start(self, g: Array) -> Array:
        return np.zeros_like(g)


@wrong("linear", seen="a gate's log-sigmoid, taken of what is a logarithm already")
class DecayThroughASigmoid(Linear):
    """Decays go through a log-sigmoid, and 0 becomes the logarithm of a half."""

    def decay(self, k: Array, o: SimpleNamespace) -> Array:
        g = super().decay(k, o)
        return g if o.log_decay is None else -np.log1p(np.exp(-g))


@wrong("linear", seen="``einsum('nd,md->nm')`` of the features before the values", cost=True)
class KernelOfAllPairs(Linear):
    """Right numbers from a table of all pairs: the memory is that of softmax attention."""

    def sums(self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Any, m: Any) -> Any:
        seen = np.broadcast_to(seen, (*phi_q.shape[:-1], seen.shape[-1]))
        return super().sums(phi_q, phi_k, log_k, v, seen, m)
