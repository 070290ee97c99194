"""Agreement with the defining equation, inside the derived tolerance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from arrattn import reference
from arrattn.testing import long
from arrattn.testing.case import Case
from arrattn.testing.laws.given import SEES, calls
from arrattn.testing.laws.registry import SOFTMAX, law
from arrattn.testing.run import Run
from arrattn.testing.tolerance import eps, largest

Host = np.ndarray[Any, Any]

EQUATIONS: dict[str, Callable[..., Any]] = {
    "dense": reference.softmax_attention,
    "local": reference.local_attention,
    "sparse": reference.sparse_attention,
    "linear": reference.linear_attention,
    "delta": reference.delta_attention,
}
SCORING = ("scale", "softcap", "bias", "sinks")


def exact(run: Run, case: Case, **how: Any) -> Any:
    """The defining equation's answer, in float64 NumPy."""
    with np.errstate(all="ignore"):
        return EQUATIONS[run.subject.family](*case.arrays, **case.meant, **how)


def agrees(run: Run, case: Case) -> None:
    """Require the equation's output."""
    whole, due = run("whole", case), exact(run, case)
    run.same(whole.out, due, run.bound(case, due), of=case)


@law(
    "equals-the-equation",
    "f(q, k, v) is the defining equation's result within C eps (1 + scale |q| |k|) max |v|",
    source="C8",
    given=calls,
)
def equals_the_equation(run: Run, case: Case) -> None:
    agrees(run, case)


@law(
    "equals-the-equation-in-what-is-visible",
    "so it is with any arguments about visibility",
    source="C4, C8",
    given=lambda s: calls(s, sees=SEES, least=1),
    needs=("visibility",),
)
def equals_visible(run: Run, case: Case) -> None:
    agrees(run, case)


@law(
    "equals-the-equation-in-scores",
    "so it is with any of scale, softcap, bias and sinks: scale, then softcap, then bias",
    source="C5, C8",
    given=lambda s: calls(s, sees=SEES, most=1, scoring=SCORING),
    families=SOFTMAX,
    needs=("scale",),
)
def equals_scores(run: Run, case: Case) -> None:
    agrees(run, case)


@law(
    "equals-the-equation-in-half-precision",
    "so it is in float16 and bfloat16, with sums in float32 and one rounding at the end",
    source="C8",
    given=lambda s: calls(s, dtypes=s.half or s.dtypes, sees=SEES),
    needs=("half",),
)
def equals_half(run: Run, case: Case) -> None:
    agrees(run, case)


@law(
    "equals-the-equation-at-odd-lengths",
    "so it is over several tiles, chunks and blocks, with lengths and edges around theirs",
    source="C2, C10: tile and chunk sizes never change meaning",
    given=lambda s: calls(s, of=long.cases),
    most=200,
)
def equals_long(run: Run, case: Case) -> None:
    agrees(run, case)


@law(
    "lse-equals-the-equation",
    "lse_i = ln sum_j exp(s_ij), natural, in the accumulation dtype",
    source="C9",
    given=lambda s: calls(s, sees=SEES, most=2, scoring=SCORING),
    families=SOFTMAX,
    needs=("return_lse",),
)
def lse_equals(run: Run, case: Case) -> None:
    whole = run("whole", case, return_lse=True)
    _, due = exact(run, case, return_lse=True)
    within = run.score_bound(case) + eps(run.subject.measured(case.dtype)) * largest(due)
    run.same(whole.lse, due, within, of=case)
