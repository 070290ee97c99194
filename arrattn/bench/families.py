"""The four families as the comparison calls them, each with its settings in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from arrattn import (
    attention,
    feature_maps,
    linear_attention,
    local_attention,
    sparse_attention,
)
from arrattn._core.typing import Array
from arrattn.bench.settings import Settings

__all__ = ["Family", "choose_families", "dense"]

Function = Callable[[Array, Array, Array], tuple[Array, ...]]


class Family(NamedTuple):
    """
    One family with its settings.

    Attributes
    ----------
    name : str
        Dense, local, sparse or linear, in small letters.
    call : callable
        From q, k, v to ``(out, lse)``; linear, which has no lse, to ``(out,)``.
    setting : str
        The settings in words, for the table.
    parameters : mapping of str to object
        The settings as data, for the record.
    """

    name: str
    call: Function
    setting: str
    parameters: Mapping[str, object]


def choose_families(settings: Settings, width: int) -> tuple[Family, ...]:
    """
    The families asked for, with their settings.

    Parameters
    ----------
    settings : Settings
        The options.
    width : int
        Width `D` of queries and keys.

    Returns
    -------
    tuple of Family
        In the order of `settings.families`.
    """
    make = {"dense": dense, "local": _local, "sparse": _sparse}
    return tuple(
        make[name](settings) if name in make else _linear(settings, width)
        for name in settings.families
    )


def dense(settings: Settings) -> Family:
    """
    Dense attention: what the others are measured against.

    Parameters
    ----------
    settings : Settings
        The options.

    Returns
    -------
    Family
        Dense.
    """

    def call(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        return attention(q, k, v, is_causal=settings.causal, return_lse=True)

    return Family("dense", call, "every key", {})


def _local(settings: Settings) -> Family:
    window = settings.window

    def call(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        return local_attention(q, k, v, window=window, is_causal=settings.causal, return_lse=True)

    left, right = window
    words = f"{left} keys before, {right} after" if right else f"{left} keys before"
    return Family("local", call, f"window {window}: {words}", {"window": list(window)})


def _sparse(settings: Settings) -> Family:
    def call(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        return sparse_attention(
            q, k, v, top_k=settings.top_k, is_causal=settings.causal, return_lse=True
        )

    best = "sqrt(N)" if settings.top_k is None else str(settings.top_k)
    words = f"own block of sqrt(N) keys, best {best} of 8 others"
    return Family("sparse", call, words, {"top_k": settings.top_k})


def _linear(settings: Settings, width: int) -> Family:
    parameters: dict[str, object] = {"feature_map": settings.feature_map}
    if settings.feature_map == "softmax":
        features = feature_maps.softmax(
            dim=width, num_features=settings.num_features, rng=settings.seed
        )
        parameters |= {"num_features": settings.num_features, "rng": settings.seed}
        words = f"{settings.num_features} positive random features of the softmax kernel"
    else:
        features = getattr(feature_maps, settings.feature_map)
        words = f"feature map {settings.feature_map}"

    def call(q: Array, k: Array, v: Array) -> tuple[Array, ...]:
        out = linear_attention(q, k, v, feature_map=features, is_causal=settings.causal)
        return (out,)

    return Family("linear", call, words, parameters)
