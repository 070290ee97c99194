r"""
Feature maps for linear attention: what :math:`\phi` may be, and the kernel it stands for.

A map turns each query and key into `Dphi` features whose products are, or in the mean
over its random weights are, a kernel: :math:`\phi(x) \cdot \phi(y) = \kappa(x, y)`.
Every map here knows its exact kernel, so that what it costs in accuracy can be measured.

- `elu_plus_one`, `relu`, `identity`, `exp`, `softmax_features`, `taylor2` and `squared` are
  ready to use; `cosformer` weighs by distance, and `hedgehog` has weights of yours.
- `gaussian`, `laplacian` and `softmax`: random features of a width you choose, drawn once
  from the `rng` you pass; the same seed gives the same weights on every array library.
- `nystrom`: features of any of these kernels by its values at points you choose.
- Any callable ``phi(x) -> features`` serves too, and None is the identity.
"""

from __future__ import annotations

from arrattn.feature_maps._base import FeatureMap, Features
from arrattn.feature_maps._cosformer import cosformer
from arrattn.feature_maps._elementwise import (
    elu_plus_one,
    exp,
    identity,
    relu,
    softmax_features,
)
from arrattn.feature_maps._gaussian import gaussian
from arrattn.feature_maps._hedgehog import hedgehog
from arrattn.feature_maps._laplacian import laplacian
from arrattn.feature_maps._nystrom import nystrom
from arrattn.feature_maps._polynomial import squared, taylor2
from arrattn.feature_maps._softmax import softmax

__all__ = [
    "FeatureMap",
    "Features",
    "cosformer",
    "elu_plus_one",
    "exp",
    "gaussian",
    "hedgehog",
    "identity",
    "laplacian",
    "nystrom",
    "relu",
    "softmax",
    "softmax_features",
    "squared",
    "taylor2",
]
