"""What the output is, as a function of the values: a mean of the visible ones."""

from __future__ import annotations

from typing import Any

import numpy as np

from arrattn.testing.case import Case
from arrattn.testing.laws.given import SCALING, SEES, calls, means, near
from arrattn.testing.laws.registry import MEANS, law
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import eps

Host = np.ndarray[Any, Any]


def some(subject: Subject) -> Any:
    """Calls with any option that leaves a mean."""
    return means(subject, sees=SEES, scoring=("scale", "softcap", "bias"))


def per_query_head(x: Host, case: Case) -> Host:
    """A key head's array for each of its query heads: (*batch, Hq, ...)."""
    hq, hkv = case.heads
    x = x[None] if case.q.ndim == 2 else np.repeat(x, hq // hkv, axis=-3)
    return np.broadcast_to(x, (*case.batch, *x.shape[-3:]))


@law(
    "weights-sum-to-one",
    "sum_j p_ij = 1: with v = 1, every query that sees a key gives 1",
    source="C5; Vaswani et al. 2017, arXiv:1706.03762",
    given=some,
    families=MEANS,
)
def weights_sum_to_one(run: Run, case: Case) -> None:
    case = case.but(v=np.ones_like(case.v))
    whole = run("whole", case)
    rows = case.full_rows()[..., None]
    run.same(
        whole.out,
        np.ones((*rows.shape[:-1], case.v.shape[-1])),
        near(run, (case, whole)),
        where=rows,
    )


@law(
    "convex-hull",
    "min_j v_jc <= o_ic <= max_j v_jc over the visible keys j",
    source="C5: the weights are positive and sum to 1",
    given=some,
    families=MEANS,
)
def convex_hull(run: Run, case: Case) -> None:
    whole = run("whole", case)
    seen = case.visible()[..., None]
    v = per_query_head(case.v, case)[..., None, :, :]
    low = np.min(np.where(seen, v, np.inf), axis=-2, initial=np.inf)
    high = np.max(np.where(seen, v, -np.inf), axis=-2, initial=-np.inf)
    if case.q.ndim == 2:
        low, high = low[0], high[0]
    rows = case.full_rows()[..., None]
    within = near(run, (case, whole))
    run.same(whole.out, low, within, where=rows, op=">=")
    run.same(whole.out, high, within, where=rows, op="<=")


@law(
    "linear-in-v",
    "f(q, k, 2 v - w) = 2 f(q, k, v) - f(q, k, w)",
    source="C5: the weights do not depend on v",
    given=lambda s: calls(s, sees=SEES, scoring=(*SCALING, "bias", "sinks")),
)
def linear_in_v(run: Run, case: Case) -> None:
    second = case.but(v=case.v[..., ::-1, ::-1].copy())
    third = case.but(v=2 * case.v - second.v)
    a, b, whole = run("a", case), run("b", second), run("whole", third)
    within = near(run, (case, a), (case, a), (second, b), (third, whole))
    run.same(whole.out, 2 * a.out - b.out, within, of=case)


@law(
    "channels-are-separate",
    "f(q, k, v)_ic depends on the column v_c alone",
    source="C5",
    given=lambda s: calls(s, sees=SEES, scoring=SCALING),
)
def channels_are_separate(run: Run, case: Case) -> None:
    v = case.v.copy()
    v[..., 1:] = 3.0 - 2.0 * v[..., 1:]
    other = case.but(v=v)
    whole, changed = run("whole", case), run("changed", other)
    within = near(run, (case, whole), (other, changed))
    within = np.broadcast_to(within, whole.out.shape)[..., :1]
    run.same(changed.out[..., :1], whole.out[..., :1], within)


@law(
    "shift-of-v",
    "f(q, k, v + c) = f(q, k, v) + c for every query that sees a key",
    source="C5: the weights sum to 1",
    given=some,
    families=MEANS,
)
def shift_of_v(run: Run, case: Case) -> None:
    second = case.but(v=case.v + 2.0)
    whole, moved = run("whole", case), run("moved", second)
    within = near(run, (case, whole), (second, moved)) + 8 * eps(case.dtype)
    run.same(moved.out, whole.out + 2.0, within, where=case.full_rows()[..., None])
