"""Heads and batch items: which of them read which, and that they do not touch."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import SCALING, calls, near
from arrattn.testing.laws.registry import law
from arrattn.testing.run import Run

Host = np.ndarray[Any, Any]

#: Visibility that is the same for every head and batch item.
SHARED = ("is_causal", "window")


@law(
    "heads-are-grouped",
    "query head h reads key head h // (Hq / Hkv): as if key heads were repeated in place",
    source="C2; Ainslie et al. 2023, arXiv:2305.13245",
    given=lambda s: calls(s, avoid=("broadcast",), sees=SHARED, scoring=SCALING),
    needs=("gqa",),
)
def heads_are_grouped(run: Run, case: Case) -> None:
    if case.q.ndim == 2:
        return
    hq, hkv = case.heads
    each = case.per_key(lambda x: np.repeat(x, hq // hkv, -3))
    a, b = run("grouped", case), run("repeated", each)
    run.same(a.out, b.out, near(run, (case, a), (each, b)), of=case)


@law(
    "heads-are-independent",
    "f(q, k, v)[h] = f(q[h], k[h], v[h]) for every head",
    source="C2",
    given=lambda s: st.tuples(
        calls(s, avoid=("gqa", "broadcast"), sees=SHARED, scoring=SCALING), st.integers(0, 1)
    ),
)
def heads_are_independent(run: Run, case: Case, h: int) -> None:
    if case.q.ndim == 2:
        return
    h %= case.heads[0]
    head = (..., slice(h, h + 1), slice(None), slice(None))
    alone = case.per_key(lambda x: x[head]).but(q=case.q[head])
    a, b = run("all", case), run("alone", alone)
    within = 2 * np.asarray(near(run, (alone, b)))
    run.same(a.out[..., h : h + 1, :, :], b.out, within, of=alone)


@law(
    "batch-items-are-independent",
    "f(q, k, v)[b] = f(q[b], k[b], v[b]), whatever the other items hold, NaN included",
    source="C10",
    given=lambda s: st.tuples(
        calls(s, avoid=("broadcast",), sees=SHARED, scoring=SCALING), st.integers(0, 1)
    ),
)
def batch_items_are_independent(run: Run, case: Case, b: int) -> None:
    if case.q.ndim < 4 or case.q.shape[0] < 2:
        return
    others = np.arange(case.q.shape[0]) != b
    spoiled = {n: getattr(case, n).copy() for n in "qkv"}
    for x in spoiled.values():
        x[others] = np.nan
    packed = case.but(**spoiled)
    alone = case.per_key(lambda x: x[b : b + 1]).but(q=case.q[b : b + 1])
    whole, one = run("whole", packed), run("alone", alone)
    run.same(whole.out[b : b + 1], one.out, 2 * near(run, (alone, one)), of=alone)


@law(
    "batch-axes-broadcast",
    "batch axes of q, k and v broadcast as if they were written out",
    source="C2",
    given=lambda s: calls(s, sees=SHARED, scoring=SCALING),
    needs=("broadcast",),
)
def batch_axes_broadcast(run: Run, case: Case) -> None:
    if case.q.ndim == 2:
        return
    full = {
        n: np.broadcast_to(x, (*case.batch, *x.shape[-3:])).copy()
        for n, x in zip("qkv", case.arrays, strict=True)
    }
    written = case.but(**full)
    a, b = run("short", case), run("written", written)
    run.same(a.out, b.out, near(run, (case, a), (written, b)), of=case)


@law(
    "no-head-axis-is-one-head",
    "2-D arrays are one head without a batch",
    source="C2",
    given=lambda s: calls(s, avoid=("broadcast",), sees=SHARED, scoring=SCALING),
    needs=("rank",),
)
def no_head_axis_is_one_head(run: Run, case: Case) -> None:
    if case.q.ndim > 2:
        first = (0,) * (case.q.ndim - 2)
        case = case.per_key(lambda x: x[first]).but(q=case.q[first])
    one = case.per_key(lambda x: x[None]).but(q=case.q[None])
    a, b = run("flat", case), run("one", one)
    run.same(a.out, b.out[0], near(run, (case, a), (case, a)), of=case)
