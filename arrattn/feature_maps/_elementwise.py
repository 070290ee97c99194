"""Maps of each number by itself, or of a token's numbers beside each other."""

from __future__ import annotations

from collections.abc import Callable

import array_api_compat as compat
import numpy as np

from arrattn._core import loops, workspace
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps._base import FeatureMap, Features


class _Plain(FeatureMap):
    """A map without weights whose kernel is the product of its features."""

    non_negative = True

    def __init__(
        self, name: str, function: Callable[[Array, Namespace], Array], paper: str, doc: str
    ) -> None:
        self.name, self._function, self.paper, self.__doc__ = name, function, paper, doc

    def output_dim(self, dim: int) -> int:
        return dim

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        del weights
        return Features(self._function(x, xp), None)

    def kernel(self, x: Array, y: Array) -> Array:
        xp = compat.array_namespace(x, y)
        return self._function(x, xp) @ xp.matrix_transpose(self._function(y, xp))


class _Signed(_Plain):
    non_negative = False


class _EluPlusOne(_Plain):
    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        del weights
        zeros, held = workspace.zeros_like(x), workspace.work_space("elu", x.shape, x.dtype)
        np.exp(np.minimum(x, zeros, out=out), out=out)
        np.add(out, np.maximum(x, zeros, out=held), out=out)

    write_k = write_q


class _Relu(_Plain):
    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        del weights
        np.maximum(x, workspace.zeros_like(x), out=out)

    write_k = write_q


class _Exp(_Plain):
    """The largest exponent of a token is carried as its logarithm."""

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        del weights
        top = xp.max(x, axis=-1, keepdims=True)
        return Features(xp.exp(x - top), top[..., 0])

    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        del weights
        np.exp(x, out=out)

    write_k = write_q


def _elu_plus_one(x: Array, xp: Namespace) -> Array:
    # NaN stays NaN, nothing overflows in gradients, and at 0 both halves of the slope add up to 1.
    zero = xp.zeros((), dtype=x.dtype, device=loops.device_of(x))
    return xp.exp(xp.minimum(x, zero)) + xp.maximum(x, zero)


# Written so that a NaN fails the comparison and comes out as it went in.
def _relu(x: Array, xp: Namespace) -> Array:
    return xp.where(x < 0, 0.0, x)


def normalized_exp(x: Array, xp: Namespace) -> Array:
    """Softmax over the last axis."""
    e = xp.exp(x - xp.max(x, axis=-1, keepdims=True))
    return e / xp.sum(e, axis=-1, keepdims=True)


elu_plus_one: FeatureMap = _EluPlusOne(
    "elu_plus_one",
    _elu_plus_one,
    "Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236",
    r""":math:`\phi(x) = \mathrm{elu}(x) + 1`: positive, for every input
    (Katharopoulos et al., 2020, arXiv:2006.16236).""",
)

relu: FeatureMap = _Relu(
    "relu",
    _relu,
    "Kasai et al., Finetuning pretrained transformers into RNNs, 2021, arXiv:2103.13076",
    r""":math:`\phi(x) = \max(x, 0)`: exact zeros, and rows of nothing else
    (Kasai et al., 2021, arXiv:2103.13076).""",
)

identity: FeatureMap = _Signed(
    "identity",
    lambda x, xp: x,
    "Schlag et al., Linear transformers are secretly fast weight programmers, 2021, "
    "arXiv:2102.11174",
    r""":math:`\phi(x) = x`, of any sign, so that sums of weights can be 0; the same as None
    (Schlag et al., 2021, arXiv:2102.11174).""",
)

exp: FeatureMap = _Exp(
    "exp",
    lambda x, xp: xp.exp(x),
    "Zhang et al., The hedgehog and the porcupine, 2024, arXiv:2402.04347",
    r""":math:`\phi(x) = e^x`, number by number: positive and without a bound; of any size,
    for its logarithm is carried (Zhang et al., 2024, arXiv:2402.04347).""",
)

softmax_features: FeatureMap = _Plain(
    "softmax_features",
    normalized_exp,
    "Shen et al., Efficient attention, 2018, arXiv:1812.01243",
    r""":math:`\phi(x) = e^x / \sum_d e^{x_d}`: positive features that sum to 1. Efficient
    attention (Shen et al., 2018, arXiv:1812.01243) has them for queries; its keys it
    normalises over the tokens instead, which would look at the future.""",
)
