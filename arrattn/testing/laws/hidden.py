"""What a hidden key or value holds reaches nobody, and who sees nothing gives 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import MODEST, POSITIVE, SEES, calls, near
from arrattn.testing.laws.registry import SOFTMAX, law
from arrattn.testing.laws.scores import mean_of_visible
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject

Host = np.ndarray[Any, Any]
POISON = (np.nan, np.inf, -np.inf)


def hiding(subject: Subject, **how: Any) -> st.SearchStrategy[Case]:
    """Calls in which something is hidden."""
    how = {"sees": SEES, "least": 1, "scoring": ("scale", "bias"), **how}
    return calls(subject, avoid=("broadcast",), **how)


def hidden_from_all(case: Case) -> Host:
    """Keys that no query sees: bool, in the shape of k without its last axis."""
    seen: Host = np.any(case.visible(), axis=-2)  # (*batch, Hq, Nk)
    hq, hkv = case.heads
    seen = np.any(seen.reshape(*seen.shape[:-2], hkv, hq // hkv, -1), axis=-2)
    return ~seen[0] if case.k.ndim == 2 else ~seen


def spoiled(x: Host, hidden: Host, value: float) -> Host:
    """The array with a value in all hidden rows."""
    return np.where(hidden[..., None], value, x)


def unchanged(run: Run, case: Case, other: Case) -> None:
    """Require that what is hidden does not matter."""
    clean, got = run("clean", case), run("spoiled", other)
    run.same(got.out, clean.out, 2 * near(run, (case, clean)), of=case)


@law(
    "hidden-nan-in-values",
    "a NaN or infinity in a value that no query sees changes nothing",
    source="C7",
    given=lambda s: st.tuples(hiding(s), st.sampled_from(POISON)),
    needs=("visibility",),
    choice="hidden content",
)
def hidden_nan_in_values(run: Run, case: Case, value: float) -> None:
    unchanged(run, case, case.but(v=spoiled(case.v, hidden_from_all(case), value)))


@law(
    "hidden-nan-in-keys",
    "a NaN or infinity in a key that no query sees changes nothing",
    source="C7",
    given=lambda s: st.tuples(hiding(s), st.sampled_from(POISON)),
    needs=("visibility",),
    choice="hidden content",
)
def hidden_nan_in_keys(run: Run, case: Case, value: float) -> None:
    unchanged(run, case, case.but(k=spoiled(case.k, hidden_from_all(case), value)))


@law(
    "hidden-numbers",
    "numbers of any size in keys and values that no query sees change nothing",
    source="C7: hidden means absent, not unlikely",
    given=lambda s: st.tuples(hiding(s), st.sampled_from((4096.0, -4096.0, 2.0**40))),
    needs=("visibility",),
)
def hidden_numbers(run: Run, case: Case, value: float) -> None:
    hidden = hidden_from_all(case)
    k, v = spoiled(case.k, hidden, value), spoiled(case.v, hidden, value)
    unchanged(run, case, case.but(k=k, v=v))


@law(
    "hidden-is-not-unlikely",
    "where all scores are -2^14, -2^30 or -2^40, o_i is still the mean of the visible values",
    source="C7: no finite number hides a pair",
    given=lambda s: st.tuples(calls(s, sees=SEES, least=1), st.sampled_from((7, 15, 20))),
    families=("dense", "local"),
    needs=("visibility",),
)
def hidden_is_not_unlikely(run: Run, case: Case, half: int) -> None:
    first = np.arange(case.q.shape[-1]) == 0
    q, k = np.zeros_like(case.q) + first * 2.0**half, np.zeros_like(case.k) - first * 2.0**half
    scale = {"scale": 1.0} if run.subject.can("scale") else {}
    case = case.but(q=q, k=k, **scale)
    whole = run("whole", case)
    # All scores are the same number: the weights are as exact as those of scores of 0.
    within = run.bound(case.but(q=np.zeros_like(q)))
    run.same(whole.out, mean_of_visible(case), within, of=case)


@law(
    "nan-reaches-only-those-who-see",
    "a NaN in v_jc makes o_ic NaN where i sees j, and leaves every other number as it was",
    source="C7",
    given=lambda s: st.tuples(
        hiding(s, kinds=MODEST, maps=POSITIVE, scoring=()), st.integers(0, 7)
    ),
    needs=("visibility",),
    choice="hidden content",
)
def nan_reaches_only_those_who_see(run: Run, case: Case, at: int) -> None:
    if not case.lengths[1] or not case.v.size:
        return
    j = at % case.lengths[1]
    v = case.v.copy()
    v[..., j, 0] = np.nan
    clean, got = run("clean", case), run("spoiled", case.but(v=v))
    seen = case.visible()[..., j]
    seen = (seen[0] if case.q.ndim == 2 else seen)[..., None]
    first = np.arange(v.shape[-1]) == 0
    expected = np.where(seen & first, np.nan, clean.out.array)
    # Sparse attention sees a part of what is visible to it.
    where = ~(seen & first) if run.subject.family == "sparse" else True
    run.same(got.out, expected, 2 * near(run, (case, clean)), where=where, of=case)


@law(
    "empty-rows-are-zero",
    "a query that sees no key gives exactly 0",
    source="C6",
    given=lambda s: hiding(s, scoring=("scale", "bias", "sinks")),
    needs=("visibility",),
    choice="empty rows",
)
def empty_rows_are_zero(run: Run, case: Case) -> None:
    whole = run("whole", case)
    rows = ~case.full_rows()[..., None]
    run.same(whole.out, np.zeros(whole.out.shape), 0.0, where=rows)


@law(
    "all-hidden-is-zero",
    "a call in which everything is hidden gives exactly 0",
    source="C6",
    given=lambda s: st.tuples(calls(s), st.sampled_from(ways_to_hide(s) or [""])),
    needs=("visibility",),
    choice="empty rows",
)
def all_hidden_is_zero(run: Run, case: Case, way: str) -> None:
    nq, nk = case.lengths
    how: dict[str, Any] = {
        "mask": np.zeros((nq, nk), bool),
        "key_mask": np.zeros(nk, bool),
        "kv_lengths": 0,
        "segment_ids": (np.full(nq, 7), np.zeros(nk, int)),
        "bias": np.full((nq, nk), -np.inf),
    }
    if way not in how:
        return
    whole = run("whole", case.but(**{way: how[way]}))
    run.same(whole.out, np.zeros(whole.out.shape), 0.0)


def ways_to_hide(subject: Subject) -> list[str]:
    """The arguments that can hide every key."""
    ways = ("mask", "bias") if subject.family in SOFTMAX else ("key_mask",)
    return [n for n in (*ways, "kv_lengths", "segment_ids") if subject.can(n)]


@law(
    "no-keys-are-zero",
    "with Nk = 0 the output is 0",
    source="C2, C6",
    given=calls,
    needs=("empty", "cross"),
    choice="empty rows",
)
def no_keys_are_zero(run: Run, case: Case) -> None:
    whole = run("whole", case.per_key(lambda x: x[..., :0, :]))
    shape = (*case.batch, *case.q.shape[-3:-1], case.v.shape[-1])
    run.same(whole.out, np.zeros(shape), 0.0)


@law(
    "axes-may-be-empty",
    "with no query, no batch item or no head the output has the shape that C2 says",
    source="C2",
    given=lambda s: st.tuples(
        calls(s, avoid=("broadcast",)), st.sampled_from(("queries", "batch", "both"))
    ),
    needs=("empty",),
)
def axes_may_be_empty(run: Run, case: Case, axis: str) -> None:
    if axis == "batch" and case.q.ndim > 3:
        case = case.per_key(lambda x: x[:0]).but(q=case.q[:0])
    elif run.subject.can("cross"):
        case = case.per_key(lambda x: x[..., :0, :]) if axis == "both" else case
        case = case.but(q=case.q[..., :0, :])
    whole = run("whole", case)
    shape = (*case.batch, *case.q.shape[-3:-1], case.v.shape[-1])
    run.require(
        whole.out.shape == shape,
        f"shape {whole.out.shape} where {shape} is due",
        f"assert whole.shape == {shape}",
    )


@law(
    "lse-of-empty-rows",
    "a query that sees no key has lse = -inf; with a sink b, lse = b",
    source="C6, C9",
    given=lambda s: hiding(s, scoring=("scale", "sinks")),
    families=SOFTMAX,
    needs=("return_lse", "visibility"),
    choice="empty rows",
)
def lse_of_empty_rows(run: Run, case: Case) -> None:
    whole = run("whole", case, return_lse=True)
    sinks = case.options.get("sinks")
    nothing = -np.inf if sinks is None else sinks[0] if case.q.ndim == 2 else sinks[:, None]
    rows = ~case.full_rows()
    run.same(whole.lse, np.broadcast_to(nothing, rows.shape), 0.0, where=rows)
