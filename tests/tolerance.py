"""The tolerances of the suite: those that `arrattn.testing` publishes."""

from arrattn.testing.tolerance import (
    C,
    accumulation,
    eps,
    largest,
    longest,
    output_error,
    score_error,
)

__all__ = ["C", "accumulation", "eps", "largest", "longest", "output_error", "score_error"]
