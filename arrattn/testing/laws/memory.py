"""How much memory the families take that need no table of pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case, NamedMap
from arrattn.testing.laws.registry import law
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject

#: So many that a number for each pair takes far more than all else.
TOKENS = 1024


def alike(subject: Subject, n: int, width: int, dtype: str) -> Case:
    """A call with `n` tokens, all the same."""
    options: dict[str, Any] = {}
    if subject.family == "delta":
        options["beta"] = np.full((1, 1, n), 0.5)
    elif subject.can("feature_map"):
        options["feature_map"] = NamedMap("elu_plus_one")
    x = np.full((1, 1, n, width), 0.25)
    return Case(x, x, x, options, "constant values", dtype)


@law(
    "memory-grows-with-tokens",
    "twice the tokens take less than three times the memory: M(2N) < 3 M(N), where a number for "
    "each pair would take four times",
    source="Katharopoulos et al. 2020, arXiv:2006.16236: one sum over the keys serves all queries",
    given=lambda s: st.tuples(st.integers(2, 8), st.sampled_from(s.dtypes)),
    families=("linear", "delta"),
    needs=("memory",),
    most=3,
)
def memory_grows_with_tokens(run: Run, width: int, dtype: str) -> None:
    n, more = TOKENS, 2 * TOKENS
    # Noise in what is measured may hide a fault, but hardly makes one.
    once = max(run.peaks("once", alike(run.subject, n, width, dtype)))
    twice = min(run.peaks("twice", alike(run.subject, more, width, dtype)))
    text = f"{more} tokens take {twice} bytes, and {n} take {once}"
    run.require(twice < 3 * once, text, "print(once, twice)", "assert min(twice) < 3 * max(once)")
