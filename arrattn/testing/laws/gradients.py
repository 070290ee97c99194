"""Gradients, where the library has them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import MODEST, SEES, calls, means
from arrattn.testing.laws.hidden import hidden_from_all, spoiled
from arrattn.testing.laws.registry import MEANS, law
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import C, accumulation, eps, longest

Host = np.ndarray[Any, Any]

NEEDS = ("gradients",)


def some(subject: Subject, **how: Any) -> st.SearchStrategy[Case]:
    """Calls whose gradients are looked at."""
    how = {"sees": SEES, "kinds": MODEST, **how}
    return calls(subject, avoid=("broadcast", "empty"), **how)


def weights_of(case: Case) -> Host:
    """What the outputs are multiplied by before they are summed: 1, -2, 3, ..."""
    shape = (*case.batch, *case.q.shape[-3:-1], case.v.shape[-1])
    n = np.arange(int(np.prod(shape)))
    return ((n % 4 + 1.0) * (-1.0) ** n).reshape(shape)


def bound(run: Run, case: Case) -> float:
    """
    How far a gradient may be off.

    It is a sum over all pairs of products of a weight of the sum, a value and a query or
    key; each carries the error of its attention weight.
    """
    n = sum(case.lengths) * case.heads[0]
    dtype = accumulation(run.subject.measured(case.dtype))
    sizes = [1 + longest(x) for x in case.arrays]
    scale = 1 + abs(case.options.get("scale", 1.0))
    return float(C * eps(dtype) * n * 4.0 * scale * np.prod(sizes) * max(sizes))


@law(
    "gradient-of-values-is-the-weights",
    "sum_j do_ic / dv_jc = 1: the gradients of v sum to the weights of the rows that see a key",
    source="C5: o is linear in v with weights that sum to 1",
    given=lambda s: means(s, avoid=("broadcast", "empty"), sees=SEES, kinds=MODEST),
    families=MEANS,
    needs=NEEDS,
    most=60,
)
def gradient_of_values(run: Run, case: Case) -> None:
    g = weights_of(case)
    _, _, dv = run.gradients("d", case, g)
    rows = case.full_rows()[..., None]
    total = (g * rows).sum(-2)  # (*batch, Hq, Dv)
    if case.q.ndim > 2:
        hq, hkv = case.heads
        total = total.reshape(*total.shape[:-2], hkv, hq // hkv, total.shape[-1]).sum(-2)
    got = run.let("sums", dv.array.sum(-2))
    counted = True if "empty rows" not in run.subject.choices else bool(rows.all())
    run.same(got, total, bound(run, case), where=counted)


@law(
    "hidden-gradients-are-zero",
    "dk_j = dv_j = 0 for keys that no query sees, whatever they hold, and all is finite",
    source="C7",
    given=lambda s: st.tuples(some(s, least=1), st.sampled_from((np.nan, 1.0))),
    needs=(*NEEDS, "visibility"),
    choice="hidden content",
    most=60,
)
def hidden_gradients(run: Run, case: Case, value: float) -> None:
    hidden = hidden_from_all(case)
    other = case.but(k=spoiled(case.k, hidden, value), v=spoiled(case.v, hidden, value))
    dq, dk, dv = run.gradients("d", other, weights_of(case))
    rows = case.full_rows()
    counted = rows[..., None] if "empty rows" in run.subject.choices else True
    for found in (dk, dv):
        run.same(found, np.zeros(found.shape), 0.0, where=hidden[..., None])
    finite = np.where(np.isfinite(dq.array), dq.array, 0.0)
    run.same(dq, run.let("finite", finite), 0.0, where=counted)


@law(
    "gradients-of-empty-rows-are-zero",
    "dq_i = 0 for a query that sees no key",
    source="C6",
    given=lambda s: some(s, least=1),
    needs=(*NEEDS, "visibility"),
    choice="empty rows",
    most=60,
)
def gradients_of_empty_rows(run: Run, case: Case) -> None:
    dq, _, _ = run.gradients("d", case, weights_of(case))
    rows = ~case.full_rows()[..., None]
    run.same(dq, np.zeros(dq.shape), 0.0, where=rows)


@law(
    "gradients-of-keys-cancel",
    "sum_j dk_j = 0: one vector added to all keys changes nothing",
    source="C5",
    given=some,
    families=("dense", "local"),
    needs=NEEDS,
    most=60,
)
def gradients_of_keys_cancel(run: Run, case: Case) -> None:
    _, dk, _ = run.gradients("d", case, weights_of(case))
    total = run.let("sums", dk.array.sum(-2))
    run.same(total, np.zeros(total.shape), bound(run, case))


@law(
    "gradients-balance",
    "sum_i q_i . dq_i = sum_j k_j . dk_j for every key head: scores depend on q . k alone",
    source="C5, by Euler's theorem on functions of c q and k / c",
    given=some,
    families=("dense", "local", "sparse"),
    needs=NEEDS,
    most=60,
)
def gradients_balance(run: Run, case: Case) -> None:
    dq, dk, _ = run.gradients("d", case, weights_of(case))
    q, k = (case.q * dq.array).sum((-1, -2)), (case.k * dk.array).sum((-1, -2))
    if case.q.ndim > 2:
        hq, hkv = case.heads
        q = q.reshape(*q.shape[:-1], hkv, hq // hkv).sum(-1)
    run.same(run.let("from_q", q), k, bound(run, case) * 4 * sum(case.lengths))


@law(
    "gradients-equal-the-equation's",
    "dq, dk and dv are those of the defining equation",
    source="C8; Baydin et al. 2018, arXiv:1502.05767",
    given=lambda s: some(s, scoring=("scale",)),
    families=MEANS,
    needs=NEEDS,
    most=60,
)
def gradients_equal(run: Run, case: Case) -> None:
    from dataclasses import replace

    from arrattn.testing.laws.agreement import EQUATIONS

    equation: Any = EQUATIONS[run.subject.family]
    plain = replace(run.subject, attend=equation, translate=None, layout="bhnd")
    options = {"q_offset": 0} if case.top_left and "q_offset" not in case.options else {}
    meant = case.but(**(options if run.subject.family != "linear" else {}))
    due = Run(plain).gradients("due", meant, weights_of(case))
    found = run.gradients("d", case, weights_of(case))
    rows = case.full_rows()
    if "empty rows" in run.subject.choices and not rows.all():
        return
    for got, want in zip(found, due, strict=True):
        run.same(got, want.array, bound(run, case))
