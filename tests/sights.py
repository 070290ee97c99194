"""Patterns described twice, as `arrattn.testing` publishes them."""

from arrattn.testing.sights import (
    Sight,
    blocks,
    causal,
    everywhere,
    item,
    prefix,
    segments,
    strided,
    where,
    window,
)

__all__ = [
    "Sight",
    "blocks",
    "causal",
    "everywhere",
    "item",
    "prefix",
    "segments",
    "strided",
    "where",
    "window",
]
