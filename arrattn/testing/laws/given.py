"""Examples for a law, cut to what the function under test can take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing import strategies
from arrattn.testing.case import Case, NamedMap
from arrattn.testing.run import Outcome, Run
from arrattn.testing.strategies import SOFTMAX_VISIBILITY
from arrattn.testing.subject import Subject

__all__ = ["KEYED", "MODEST", "SCALING", "SEES", "calls", "means", "near", "probe"]

Host = np.ndarray[Any, Any]

#: Maps with weights greater than 0.
POSITIVE = (NamedMap("elu_plus_one"), NamedMap("softmax"))

#: Numbers whose weights do not underflow.
MODEST = ("plain", "tied")

SEES = (*SOFTMAX_VISIBILITY, "key_mask")
#: Visibility that says nothing about positions.
KEYED = ("mask", "key_mask", "segment_ids")
SCALING = ("scale", "softcap")


def calls(
    subject: Subject,
    *,
    avoid: tuple[str, ...] = (),
    of: Callable[..., st.SearchStrategy[Case]] = strategies.cases,
    **how: Any,
) -> st.SearchStrategy[Case]:
    """Calls of the subject's family that it can take, `avoid` left out of them."""
    how = {"dtypes": subject.wide, "top_left": "alignment" in subject.choices, **how}
    if subject.family == "linear":  # kernels of long vectors underflow, and so do those of 0
        how = {"kinds": MODEST, **how}
    if "scale sign" in subject.choices:
        avoid = (*avoid, "any scale")
    how["few"] = subject.takes_time
    return of(subject.family, without={*subject.lacks, *avoid}, **how)


def means(subject: Subject, **how: Any) -> st.SearchStrategy[Case]:
    """Calls whose output is a mean of the visible values."""
    if subject.family == "linear":  # other kernels may be 0
        how = {"maps": POSITIVE, **how}
    return calls(subject, **how)


def near(run: Run, *pairs: tuple[Case, Outcome]) -> Any:
    """The errors that these outputs may have, added up."""
    return sum(run.bound(case, outcome.out.array) for case, outcome in pairs)


def probe(case: Case, subject: Subject) -> Case:
    """
    The call with the identity for values: its output is the table of weights.

    Where values may be no wider than keys, queries and keys get components of 0.
    """
    nk, q, k = case.lengths[1], case.q, case.k
    width = nk if subject.can("dv") else max(nk, q.shape[-1])
    v = np.broadcast_to(np.eye(nk, width), (*case.v.shape[:-1], width)).copy()
    if not subject.can("dv"):
        q, k = (np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])]) for x in (q, k))
    return case.but(q=q, k=k, v=v)
