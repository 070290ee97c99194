"""From what a user passes as ``feature_map`` to a `FeatureMap`."""

from __future__ import annotations

from arrattn.feature_maps._base import Custom, FeatureMap
from arrattn.feature_maps._cosformer import cosformer
from arrattn.feature_maps._elementwise import identity
from arrattn.feature_maps._gaussian import gaussian
from arrattn.feature_maps._hedgehog import hedgehog
from arrattn.feature_maps._laplacian import laplacian
from arrattn.feature_maps._nystrom import nystrom
from arrattn.feature_maps._softmax import softmax

#: The functions that make maps, with the arguments that they need.
MAKERS = {
    cosformer: "length",
    gaussian: "sigma, dim=..., num_features=..., rng=...",
    hedgehog: "weights",
    laplacian: "sigma, dim=..., num_features=..., rng=...",
    nystrom: "of, landmarks",
    softmax: "dim=..., num_features=..., rng=...",
}


def read_map(feature_map: object) -> FeatureMap:
    """
    Make a `FeatureMap` of what the user passed: one, a callable, or None.

    Parameters
    ----------
    feature_map : FeatureMap, callable or None
        None is the identity.

    Returns
    -------
    FeatureMap
        The map.
    """
    if feature_map is None:
        return identity
    if isinstance(feature_map, FeatureMap):
        return feature_map
    if callable(feature_map) and not isinstance(feature_map, type):
        needs = MAKERS.get(feature_map)  # type: ignore[call-overload]
        if needs is None:
            return Custom(feature_map)
        name = feature_map.__name__  # type: ignore[attr-defined]
        msg = (
            f"feature_map: expected a map, got the function {name} that makes one; "
            f"call it: {name}({needs})"
        )
        raise TypeError(msg)
    msg = (
        "feature_map: expected one of arrattn.feature_maps, a callable or None, "
        f"got {feature_map!r} ({type(feature_map).__name__})"
    )
    raise TypeError(msg)
