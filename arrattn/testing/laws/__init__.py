"""The laws: each a statement that holds for every attention of some families."""

from arrattn.testing.laws import values
from arrattn.testing.laws.registry import LAWS, Law

__all__ = ["LAWS", "Law", "values"]
