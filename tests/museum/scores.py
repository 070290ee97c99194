"""Wrong scores, and wrong sums over them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from museum.exhibit import wrong
from museum.right import Array, Dense


@wrong("dense", seen="mlc-ai/mlc-llm#3426")
class ScaleForgotten(Dense):
    """Without a scale the scores are as they come, D ** 0.5 too large: weights too sharp."""

    def scale(self, q: Array, o: SimpleNamespace) -> float:
        return 1.0 if o.scale is None else o.scale


@wrong("dense", seen="callers that scale q for a function that scales too")
class ScaledTwice(Dense):
    """The query is scaled before, and the product again: weights too flat."""

    def scale(self, q: Array, o: SimpleNamespace) -> float:
        return super().scale(q, o) ** 2


@wrong("dense", seen="lucidrains/vit-pytorch#65, karpathy/ng-video-lecture#6")
class ScaleOfTheModel(Dense):
    """The width of all heads together in the scale, where one head's belongs."""

    def scale(self, q: Array, o: SimpleNamespace) -> float:
        return (q.shape[-3] * q.shape[-1]) ** -0.5 if o.scale is None else o.scale


@wrong("dense", seen="esceptico/perceiver-io#9")
class DividedByScale(Dense):
    """Divides by what was to be multiplied with."""

    def scale(self, q: Array, o: SimpleNamespace) -> float:
        scale = super().scale(q, o)
        return 1 / scale if scale else 0.0


@wrong("dense", seen="labmlai/annotated_deep_learning_paper_implementations#282")
class SoftmaxOverQueries(Dense):
    """Each key's weights sum to one over the queries; a row's do not."""

    def normalised(self, p: Array, total: Array) -> Array:
        total = p.sum(-2, keepdims=True)
        return np.where(total == 0, 0, p / total)


@wrong("dense", seen="PetrochukM/PyTorch-NLP#2: softmax along the first axis")
class SoftmaxOverHeads(Dense):
    """The axis before last but one: heads share a total, and so do not stand alone."""

    def normalised(self, p: Array, total: Array) -> Array:
        total = p.sum(-3, keepdims=True).sum(-1, keepdims=True)
        return np.where(total == 0, 0, p / total)


@wrong("dense", seen="onnx/onnx#7865")
class CapAfterBias(Dense):
    """Caps the biased scores: what the bias adds is flattened with them."""

    def scores(self, q: Array, k: Array, o: SimpleNamespace) -> Array:
        s = self.scale(q, o) * (q @ k.swapaxes(-1, -2))
        s = s if o.bias is None else s + o.bias.astype(s.dtype)
        return s if o.softcap is None else self.cap(s, o.softcap)


@wrong("dense", seen="onnx/onnx#7865, Dao-AILab/flash-attention#1025")
class CapAfterMask(Dense):
    """Caps scores already hidden: minus infinity becomes -softcap, and the hidden is seen."""

    def scores(self, q: Array, k: Array, o: SimpleNamespace) -> Array:
        s = super().scores(q, k, o)
        hidden = ~super().visible(s.shape, o)
        return s if o.softcap is None else np.where(hidden, -o.softcap, s)

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        return super().visible(shape, o) if o.softcap is None else np.ones(shape, bool)


@wrong("dense", seen="unslothai/unsloth-zoo#593")
class CapTimesScore(Dense):
    """``s * tanh(s / softcap)``: even in s, and without a bound."""

    def cap(self, s: Array, softcap: float) -> Array:
        return s * np.tanh(s / softcap)


@wrong("dense", seen="ports of relative position biases")
class BiasScaled(Dense):
    """The bias joins before the scale, and is scaled with the product."""

    def scores(self, q: Array, k: Array, o: SimpleNamespace) -> Array:
        bias = 0 if o.bias is None else o.bias.astype(q.dtype)
        s = self.scale(q, o) * (q @ k.swapaxes(-1, -2) + bias)
        return s if o.softcap is None else self.cap(s, o.softcap)


@wrong("dense", seen="apache/mxnet#14072")
class HalfSums(Dense):
    """Sums in half precision stall at 2048, and scores overflow at 65504."""

    def accumulate_in(self, dtype: Any) -> Any:
        return dtype

    def normalised(self, p: Array, total: Array) -> Array:
        in_turn = np.cumsum(p, axis=-1, dtype=p.dtype)[..., -1:]
        return super().normalised(p, in_turn if p.shape[-1] else total)


@wrong("dense", seen="kernels that mix precisions")
class SingleSums(Dense):
    """Float64 goes in and comes out, with the error of float32."""

    def accumulate_in(self, dtype: Any) -> Any:
        return np.float32


@wrong("dense", seen="pyg-team/pytorch_geometric#53")
class NoMaximum(Dense):
    """Exponentials of the scores as they are: infinity over infinity from 89 on."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        b = -math.inf if sinks is None else sinks.astype(s.dtype)[:, None, None]
        p = np.where(seen, np.exp(s), 0)
        total = p.sum(-1, keepdims=True) + np.exp(b)
        return self.normalised(p, total), np.log(total)[..., 0]


@wrong("dense", seen="kernels that take the maximum before the mask")
class MaximumOfHidden(Dense):
    """The largest score is that of a hidden key: what is seen underflows to nothing."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        b = -math.inf if sinks is None else sinks.astype(s.dtype)[:, None, None]
        m = np.max(s, axis=-1, keepdims=True, initial=-1e30)
        p = np.where(seen, np.exp(s - m), 0)
        total = p.sum(-1, keepdims=True) + np.exp(b - m)
        return self.normalised(p, total), (m + np.log(total))[..., 0]


@wrong("dense", seen="epsilons against a division by zero")
class EpsilonInTheTotal(Dense):
    """A row's weights sum to a little less than one, and far less where they are small."""

    def normalised(self, p: Array, total: Array) -> Array:
        return p / (total + 1e-6)


@wrong("dense", seen="training code without a switch for evaluation")
class DropoutLeftOn(Dense):
    """A tenth of the weights falls out by chance, on every call."""

    rng = np.random.default_rng(0)

    def normalised(self, p: Array, total: Array) -> Array:
        kept = self.rng.random(p.shape) < 0.9
        return super().normalised(p, total) * kept / 0.9


@wrong("dense", seen="wrappers that forget the cast back")
class WideOutput(Dense):
    """Half precision goes in, and the sums' precision comes out."""

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        return super().__call__(
            *(x.astype(self.accumulate_in(x.dtype)) for x in (q, k, v)), **options
        )


@wrong("dense", seen="kernels that scale the query in its place")
class QueryOverwritten(Dense):
    """The right result, and a caller whose query is another one afterwards."""

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        result = super().__call__(q, k, v, **options)
        q *= q.dtype.type(0.5)
        return result


@wrong("dense", seen="softmax1 given to a model that was trained without")
class OneInTheTotal(Dense):
    """A one in the denominator that nobody asked for: weights sum to less than one."""

    def softmax(self, s: Array, seen: Array, sinks: Array | None) -> tuple[Array, Array]:
        return super().softmax(s, seen, np.zeros(s.shape[-3]) if sinks is None else sinks)
