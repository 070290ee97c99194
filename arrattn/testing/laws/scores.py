"""Scale, temperature and softcap."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import MODEST, SEES, calls, near
from arrattn.testing.laws.registry import SOFTMAX, law
from arrattn.testing.laws.values import per_query_head
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import eps, largest, longest

Host = np.ndarray[Any, Any]


def scales(subject: Subject) -> st.SearchStrategy[float]:
    """Scales that the subject takes."""
    return st.sampled_from(
        (0.5, 2.0, -1.0)
        if subject.can("any scale") and "scale sign" not in subject.choices
        else (0.5, 2.0)
    )


def mean_of_visible(case: Case) -> Host:
    """The plain mean of what each query sees, 0 where that is nothing."""
    seen = case.visible().astype(float)
    v = per_query_head(case.v, case)
    out: Host = seen @ v / np.maximum(seen.sum(-1, keepdims=True), 1.0)
    return out[0] if case.q.ndim == 2 else out


@law(
    "scale-zero-is-the-mean",
    "scale -> 0: o_i is the mean of the visible values",
    source="C5: equal scores have equal weights",
    given=lambda s: calls(s, sees=SEES),
    families=("dense", "local"),
    needs=("scale", "any scale"),
    choice="scale sign",
)
def scale_zero(run: Run, case: Case) -> None:
    case = case.but(scale=0.0)
    whole = run("whole", case)
    run.same(whole.out, mean_of_visible(case), near(run, (case, whole)), of=case)


@law(
    "zero-queries-are-the-mean",
    "q = 0: o_i is the mean of the visible values",
    source="C5",
    given=lambda s: calls(s, sees=SEES),
    families=("dense", "local"),
)
def zero_queries(run: Run, case: Case) -> None:
    case = case.but(q=np.zeros_like(case.q))
    whole = run("whole", case)
    run.same(whole.out, mean_of_visible(case), near(run, (case, whole)), of=case)


@law(
    "best-key-wins",
    "scale -> infinity: o_i is the value of the key with the highest score",
    source="C5; C8: no overflow where scores are thousands apart",
    given=lambda s: st.tuples(
        calls(s, avoid=("empty",), kinds=MODEST), st.sampled_from((1e3, 1e6))
    ),
    families=SOFTMAX,
    needs=("scale",),
)
def best_key_wins(run: Run, case: Case, scale: float) -> None:
    case = case.but(scale=scale)
    if run.subject.family == "sparse" and run.subject.can("top_k"):
        case = case.but(
            top_k=case.lengths[1], **({"route": None} if run.subject.can("route") else {})
        )
    whole = run("whole", case)
    k, v = per_query_head(case.k, case), per_query_head(case.v, case)
    s = scale * np.where(case.visible(), case.q @ np.swapaxes(k, -1, -2), -np.inf)
    top = np.max(s, axis=-1, keepdims=True, initial=-np.inf)
    best = (s == top) & case.visible()  # eighths: products are exact, and ties true ones
    apart = np.min(np.where(best, np.inf, top - s), axis=-1, initial=np.inf)
    mean = best.astype(float) @ v / np.maximum(best.sum(-1, keepdims=True), 1)
    mean, apart = (mean[0], apart[0]) if case.q.ndim == 2 else (mean, apart)
    # The others share less than exp(-distance); a tie may be parted by a rounding.
    size = eps(run.subject.measured(case.dtype)) * scale * longest(case.q) * longest(case.k)
    ties = best.sum(-1) > 1
    where = (apart > 40.0 + 8 * size) & ~(ties[0] if case.q.ndim == 2 else ties)
    within = near(run, (case.but(scale=0.0), whole)) + 2 * largest(case.v) * case.lengths[
        1
    ] * np.exp(-40.0)
    run.same(whole.out, mean, within, where=where[..., None], of=case)


@law(
    "scale-belongs-to-q",
    "f(q, k, v; scale = c) = f(c q, k, v; scale = 1): a temperature",
    source="C5",
    given=lambda s: st.tuples(calls(s, sees=SEES, kinds=MODEST), scales(s)),
    families=("dense", "local"),
    needs=("scale",),
)
def scale_belongs_to_q(run: Run, case: Case, scale: float) -> None:
    scaled, moved = case.but(scale=scale), case.but(q=scale * case.q, scale=1.0)
    a, b = run("scaled", scaled), run("moved", moved)
    run.same(a.out, b.out, near(run, (scaled, a), (moved, b)), of=case)


@law(
    "default-scale",
    "without `scale` it is D ** -0.5",
    source="C5; Vaswani et al. 2017, section 3.2.1",
    given=lambda s: calls(s, sees=SEES),
    families=("dense", "local"),
    needs=("scale",),
)
def default_scale(run: Run, case: Case) -> None:
    given = case.but(scale=max(case.q.shape[-1], 1) ** -0.5)
    a, b = run("default", case), run("given", given)
    run.same(a.out, b.out, near(run, (case, a), (given, b)), of=case)


@law(
    "default-scale-counts-width",
    "f(q, k, v) = f([2 q, 0, 0, 0], [k, 0, 0, 0], v): four times the width, half the scale",
    source="C5: the default scale is D ** -0.5 of the width that it is given",
    given=lambda s: calls(s, sees=SEES, kinds=MODEST),
    families=("dense", "local"),
    needs=("dv",),
)
def default_scale_counts_width(run: Run, case: Case) -> None:
    q, k = (np.concatenate([x, *[np.zeros_like(x)] * 3], -1) for x in (2 * case.q, case.k))
    wide = case.but(q=q, k=k)
    a, b = run("narrow", case), run("wide", wide)
    run.same(b.out, a.out, near(run, (case, a), (wide, b)), of=case)


@law(
    "large-softcap",
    "softcap -> infinity changes nothing",
    source="C5; Gemma Team 2024, arXiv:2408.00118",
    given=lambda s: calls(s, sees=SEES, kinds=MODEST),
    families=("dense", "local"),
    needs=("softcap",),
)
def large_softcap(run: Run, case: Case) -> None:
    capped = case.but(softcap=2.0**20)
    a, b = run("plain", case), run("capped", capped)
    # tanh(x) = x - x^3 / 3: scores below 16 move by less than 16^3 / 2^40 / 3.
    within = near(run, (case, a), (capped, b)) + 2 * largest(case.v) * 16.0**3 / 2.0**40
    run.same(b.out, a.out, within, of=case)


@law(
    "small-softcap",
    "softcap -> 0 is the mean of the visible values",
    source="C5: the cap comes after the scale and bounds every score",
    given=lambda s: calls(s, sees=SEES),
    families=("dense", "local"),
    needs=("softcap",),
)
def small_softcap(run: Run, case: Case) -> None:
    case = case.but(softcap=2.0**-60)
    whole = run("whole", case)
    run.same(whole.out, mean_of_visible(case), near(run, (case, whole)), of=case)


@law(
    "scores-of-any-size",
    "a row's weights do not change where a large number is added to all its scores",
    source="C8; Milakov & Gimelshein 2018, arXiv:1805.02867",
    given=lambda s: calls(s, avoid=("empty",), sees=SEES, kinds=("tied",)),
    families=("dense", "local"),
)
def scores_of_any_size(run: Run, case: Case) -> None:
    # One more component: +-32 * 64 in every score. No exponential can hold it.
    wide = [
        np.concatenate([x, np.full((*x.shape[:-1], 1), c)], -1)
        for x, c in ((case.q, 32.0), (case.k, 64.0))
    ]
    if not run.subject.can("dv"):
        wide.append(np.concatenate([case.v, case.v[..., :1]], -1))
    scale = {"scale": 1.0} if run.subject.can("scale") else {}
    high = case.but(**dict(zip("qkv", wide, strict=False)), **scale)
    low = high.but(k=np.concatenate([case.k, np.full((*case.k.shape[:-1], 1), -64.0)], -1))
    a, b = run("high", high), run("low", low)
    run.same(b.out, a.out, near(run, (high, a), (low, b)), of=case)
