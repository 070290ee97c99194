"""Calls of linear attention, and how far their results may be off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st
from lanes import Lane
from softmax import as_held
from strategies import Case, broadcast, id_arrays, over_batch, shapes, values
from tolerance import accumulation

from arrattn import LinearState, feature_maps, linear_attention, reference
from arrattn._core import recurrence
from arrattn.feature_maps import FeatureMap
from arrattn.feature_maps._read import read_map
from arrattn.testing import bounds

RANDOM = ("softmax", "gaussian", "trigonometric", "laplacian")
MAPS = ("elu_plus_one", "relu", "identity", "square", *RANDOM)

# More of each kind: they have to hold what the maps above hold, with fewer examples.
MORE_RANDOM = (
    "softmax hyperbolic", "softmax trigonometric", "softmax independent", "gaussian hyperbolic",
    "binning",
)  # fmt: skip
MORE_FINITE = ("exp", "softmax_features", "taylor2", "squared", "hedgehog")
BY_LANDMARKS = ("nystrom",)
ALL_RANDOM = (*RANDOM, *MORE_RANDOM)
ALL_MAPS = (*MAPS, *MORE_FINITE, *MORE_RANDOM, *BY_LANDMARKS)
NON_NEGATIVE = (
    "elu_plus_one", "relu", "square", "softmax", "gaussian", *MORE_FINITE, "softmax hyperbolic",
    "softmax independent", "gaussian hyperbolic", "binning",
)  # fmt: skip


def square(x: Any) -> Any:
    """Map as a user might write one."""
    return x * x + 1.0


def make_map(name: str, dim: int, num_features: int = 8, rng: int = 3) -> Any:
    """Build a feature map by name, as `linear_attention` takes it."""
    drawn: dict[str, Any] = {"dim": dim, "num_features": num_features, "rng": rng}
    kind, _, features = name.partition(" ")
    if features == "independent":
        return feature_maps.softmax(**drawn, orthogonal=False)
    if features:
        width = {"sigma": 3.0} if kind == "gaussian" else {}
        return getattr(feature_maps, kind)(**width, **drawn, features=features)
    if name == "binning":
        return feature_maps.laplacian(8.0, **drawn, features="binning", bins=4)
    if name == "hedgehog":
        both = np.random.default_rng(rng).normal(size=(2, dim, num_features // 2))
        return feature_maps.hedgehog(*both)
    if name == "nystrom":
        points = np.random.default_rng(rng).normal(size=(20, dim))
        return feature_maps.nystrom(feature_maps.taylor2, points)
    if name == "softmax":
        return feature_maps.softmax(**drawn)
    if name == "laplacian":
        return feature_maps.laplacian(8.0, **drawn)
    if name in ("gaussian", "trigonometric"):
        features = "positive" if name == "gaussian" else name
        return feature_maps.gaussian(3.0, features=features, **drawn)
    plain = {"identity": None, "square": square}
    return plain[name] if name in plain else getattr(feature_maps, name)


@contextmanager
def chunks_of(size: int) -> Iterator[None]:
    """Small chunks bring out every edge in small examples."""
    before, recurrence.CHUNK = recurrence.CHUNK, size
    try:
        yield
    finally:
        recurrence.CHUNK = before


@st.composite
def linear_cases(draw: st.DrawFn, *, state: bool = True, maps: tuple[str, ...] = ALL_MAPS) -> Case:
    """Draw a call of linear attention; the map by its name."""
    q_shape, k_shape, v_shape = draw(shapes())
    seed = draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    how = draw(st.sampled_from(("plain", "tied", "zero")))
    case = Case(
        values(how, q_shape, rng),
        values(how, k_shape, rng),
        rng.normal(size=v_shape),
        how=f"{how} values of seed {seed}",
    )
    (nq, nk), options = case.lengths, case.options
    options["feature_map"] = draw(st.sampled_from(maps))
    options["is_causal"] = draw(st.booleans())
    names = ("key_mask", "kv_lengths", "segment_ids", "unnormalized", "initial_state")
    for name in draw(st.lists(st.sampled_from(names), max_size=3, unique=True)):
        if name == "key_mask":
            options[name] = rng.random((*draw(broadcast(case.batch)), nk)) < 0.7
        elif name == "kv_lengths":
            options[name] = draw(over_batch(case.batch, 0, nk))
        elif name == "segment_ids":
            ids = draw(id_arrays(nq, nk, case.batch))
            options[name] = ids[0] if nq == nk and draw(st.booleans()) else ids
        elif name == "unnormalized":
            options |= {"normalize": False, "scale": draw(st.sampled_from((0.7, -2.0)))}
        elif state:
            options[name] = some_state(case, rng)
    return case


def some_state(case: Case, rng: np.random.Generator) -> LinearState:
    """Make a state as a past of a few tokens might leave it."""
    d = case.q.shape[-1]
    dphi = read_map(make_map(case.options["feature_map"], d)).output_dim(d)
    lead = (*case.batch, *(case.heads[1:] if case.q.ndim > 2 else ()))
    z = np.abs(rng.normal(size=(*lead, dphi)))
    return LinearState(rng.normal(size=(*lead, dphi, case.v.shape[-1])), z)


def options_of(case: Case) -> dict[str, Any]:
    """Give the options of a call, with the map itself for its name."""
    name = case.options["feature_map"]
    if isinstance(name, FeatureMap):
        return case.options
    return case.options | {"feature_map": make_map(name, case.q.shape[-1])}


def check_linear(lane: Lane, case: Case, *, dtype: str = "float64") -> None:
    """Assert that output and state are the float64 reference's, to rounding."""
    options = options_of(case) | {"return_state": True}
    out, state = lane.call(linear_attention, *case.arrays, dtype=dtype, **options)
    held = as_held(case, dtype)
    expected, after = reference.linear_attention(*held.arrays, **options)
    errors = linear_errors(held, dtype, expected)
    lane.check(out, expected, dtype=dtype, within=errors[0])
    acc = accumulation(dtype)
    for got, want, within in zip(state, after, errors[1:], strict=True):
        lane.check(got, want, dtype=acc, within=within)


def linear_errors(case: Case, dtype: str, out: np.ndarray[Any, Any]) -> tuple[Any, Any, Any]:
    """How far output, `S` and `z` may be off."""
    return bounds.linear_errors(case.arrays, options_of(case), dtype, out)


def exponent(phi: FeatureMap, case: Case) -> float:
    """Bound the exponents and angles that a map's features are made of."""
    return bounds.exponent(phi, case.q, case.k)
