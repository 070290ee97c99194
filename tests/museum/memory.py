"""The delta rule, wrongly: what is written, kept, faded and handed on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from museum.exhibit import wrong
from museum.right import Array
from museum.right_delta import Delta


@wrong("delta", seen="linear attention with a gate on its values")
class NeverCorrects(Delta):
    """Values add up under their keys: the memory is not asked before it is written."""

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        return self.written(self.faded(S, g), k, beta * v)


@wrong("delta", seen="``(I - k k^T) S + beta k v^T``")
class ErasesWhole(Delta):
    """What was under the key is erased whole, whatever `beta` says, and `beta` of v written."""

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        S = self.faded(S, g)
        return self.written(S, k, beta * v - k @ S)


@wrong("delta", seen="kernels that expect logits for their gates")
class BetaThroughASigmoid(Delta):
    """`beta` goes through a sigmoid once more: nothing is ever replaced, nor left alone."""

    def gates(self, o: SimpleNamespace, k: Array, *, flat: bool) -> tuple[Array, Array]:
        beta, g = super().gates(o, k, flat=flat)
        return 1 / (1 + np.exp(-beta)), g


@wrong("delta", seen="``beta`` taken for a switch")
class AnyBetaIsOne(Delta):
    """A token is written whole or not at all."""

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        return super().step(S, k, v, np.ceil(beta), g)


@wrong("delta", seen="chunks whose tokens all read the memory before the chunk")
class CorrectsByChunks(Delta):
    """The writes of a chunk of two do not see each other: a key that comes twice adds up."""

    def attend(
        self, q: Array, k: Array, v: Array, beta: Array, g: Array, S: Array, o: SimpleNamespace
    ) -> tuple[Array, Array]:
        self.t, self.chunk = 0, S
        return super().attend(q, k, v, beta, g, S, o)

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        self.chunk = S if self.t % 2 == 0 else self.chunk
        self.t += 1
        S, before = self.faded(S, g), self.faded(self.chunk, g)
        return self.written(S, k, beta * (v - k @ before))


@wrong("delta", seen="the decay folded into the write, not into what is asked")
class AsksBeforeFading(Delta):
    """The correction is that of the memory before it has faded."""

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        return self.written(self.faded(S, g), k, beta * (v - k @ S))


@wrong("delta", seen="a gate applied after the token was written")
class FadesWhatItWrites(Delta):
    """A token fades as soon as it has come."""

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        return self.faded(self.written(S, k, beta * (v - k @ S)), g)


@wrong("delta", seen="decays handed over as logarithms, and taken for factors")
class LogarithmForTheFactor(Delta):
    """``1 + g`` for ``exp(g)``, which is right for no decay, and near it."""

    def faded(self, S: Array, g: Array) -> Array:
        return (1 + g).swapaxes(-1, -2) * S


@wrong("delta", seen="a gate's log-sigmoid, taken of what is a logarithm already")
class FadesThroughASigmoid(Delta):
    """Decays go through a log-sigmoid, and 0 becomes the logarithm of a half."""

    def faded(self, S: Array, g: Array) -> Array:
        return super().faded(S, -np.log1p(np.exp(-g)))


@wrong("delta", seen="padding on the left, and gates computed from it")
class TimePassesInPadding(Delta):
    """A token that is not there writes nothing, and the memory fades all the same."""

    def kept(self, S: Array, new: Array, g: Array, there: Array) -> Array:
        return np.where(there, new, self.faded(S, g))


@wrong("delta", seen="a mask applied to the outputs alone")
class PaddingWrites(Delta):
    """Tokens that are not there are written like any other."""

    def present(self, nk: int, o: SimpleNamespace) -> Array:
        return np.ones((1, nk), bool)


@wrong("delta", seen="masks that multiply")
class MaskMultiplies(Delta):
    """Zero times NaN is NaN: what padding holds spoils the memory."""

    def kept(self, S: Array, new: Array, g: Array, there: Array) -> Array:
        return np.where(there, 1, 0) * new + np.where(there, 0, 1) * S


@wrong("delta", seen="huggingface/transformers: packed sequences without cu_seqlens")
class MemoryOfTheDocumentBefore(Delta):
    """Packed documents write into one memory."""

    def ids(self, o: SimpleNamespace, nq: int, nk: int, k: Array) -> tuple[Array, Array]:
        return super().ids(SimpleNamespace(**vars(o) | {"segment_ids": None}), nq, nk, k)


@wrong("delta", seen="segments told by their boundaries, as ``cu_seqlens`` does")
class SegmentsEndWhereTheyStop(Delta):
    """The memory starts anew wherever the id changes: a segment that comes back has lost all."""

    def ids(self, o: SimpleNamespace, nq: int, nk: int, k: Array) -> tuple[Array, Array]:
        a, b = super().ids(o, nq, nk, k)
        if nq != nk or a.shape != b.shape or not np.array_equal(a, b) or nk == 0:
            return a, b
        runs = np.cumsum(np.diff(b, axis=-1, prepend=b[..., :1]) != 0, axis=-1)
        return runs, runs


@wrong("delta", seen="off by one: ``o_t = S_{t-1}^T q_t``")
class ReadsBeforeItWrites(Delta):
    """A query reads the memory before its own token is in it."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return super().offset(nq, nk, o) - 1


@wrong("delta", seen="loops that start with the first query and the first key")
class DeltaTopLeft(Delta):
    """One query and a past of keys: it reads the memory after the first of them."""

    def offset(self, nq: int, nk: int, o: SimpleNamespace) -> Any:
        return 0


@wrong("delta", seen="``use_qk_l2norm_in_kernel``, left on")
class KeysMadeUnits(Delta):
    """Keys are divided by their length: short ones write more than they should."""

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        return super().step(S, k / np.linalg.norm(k, axis=-1, keepdims=True), v, beta, g)


@wrong("delta", seen="defaults taken over from softmax attention")
class ScaledByTheWidth(Delta):
    """Outputs are multiplied by ``D ** -0.5``, as scores are elsewhere."""

    def asked(self, S: Array, q: Array, r: int, o: SimpleNamespace) -> Array:
        return max(q.shape[-1], 1) ** -0.5 * super().asked(S, q, r, o)


@wrong("delta", seen="matrices kept with their axes swapped")
class MemoryTransposed(Delta):
    """The memory handed in is read the other way round, where it is square."""

    def attend(
        self, q: Array, k: Array, v: Array, beta: Array, g: Array, S: Array, o: SimpleNamespace
    ) -> tuple[Array, Array]:
        S = S.swapaxes(-1, -2) if S.shape[-1] == S.shape[-2] else S
        return super().attend(q, k, v, beta, g, S, o)


@wrong("delta", seen="fla-org/flash-linear-attention#351, by the delta rule")
class MemoryNotRead(Delta):
    """What went before is not known to the tokens that come."""

    def attend(
        self, q: Array, k: Array, v: Array, beta: Array, g: Array, S: Array, o: SimpleNamespace
    ) -> tuple[Array, Array]:
        return super().attend(q, k, v, beta, g, np.zeros_like(S), o)


@wrong("delta", seen="caches in the model's dtype")
class MemoryRounded(Delta):
    """The memory is kept in half precision from token to token."""

    def written(self, S: Array, k: Array, u: Array) -> Array:
        return super().written(S, k, u).astype(np.float16).astype(S.dtype)


@wrong("delta", seen="one gate for all heads")
class GatesOfTheFirstHead(Delta):
    """What the first head writes and forgets, all of them do."""

    def gates(self, o: SimpleNamespace, k: Array, *, flat: bool) -> tuple[Array, Array]:
        beta, g = super().gates(o, k, flat=flat)
        return (
            np.broadcast_to(beta[..., :1, :], beta.shape),
            np.broadcast_to(g[..., :1, :, :], g.shape),
        )


@wrong("delta", seen="onnx/onnx#7274, by the delta rule")
class MemoryOfAnotherHead(Delta):
    """Memories 0, 1, 0, 1 for query heads that expect 0, 0, 1, 1."""

    def per_query_head(self, x: Array, g: int) -> Array:
        return np.concatenate([x] * g, axis=-3) if g else x[..., :0, :, :]
