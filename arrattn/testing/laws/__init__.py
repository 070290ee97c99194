"""The laws: each a statement that holds for every attention of some families."""

from arrattn.testing.laws import (
    agreement,
    choices,
    delta,
    gradients,
    heads,
    hidden,
    keys,
    limits,
    linear,
    memory,
    precision,
    scores,
    time,
    values,
    visibility,
)
from arrattn.testing.laws.registry import LAWS, Law

__all__ = [
    "LAWS",
    "Law",
    "agreement",
    "choices",
    "delta",
    "gradients",
    "heads",
    "hidden",
    "keys",
    "limits",
    "linear",
    "memory",
    "precision",
    "scores",
    "time",
    "values",
    "visibility",
]
