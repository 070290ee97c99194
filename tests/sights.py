"""Patterns described twice, as `arrattn.testing` publishes them."""

from arrattn.testing.sights import (
    Sight,
    blocks,
    causal,
    dilated,
    everywhere,
    fixed,
    item,
    prefix,
    random_keys,
    segments,
    strided,
    where,
    window,
)

__all__ = [
    "Sight",
    "blocks",
    "causal",
    "dilated",
    "everywhere",
    "fixed",
    "item",
    "prefix",
    "random_keys",
    "segments",
    "strided",
    "where",
    "window",
]
