"""What may be done to the keys, and to the scores, without changing the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import KEYED, MODEST, SCALING, SEES, calls, near
from arrattn.testing.laws.registry import law
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject

Host = np.ndarray[Any, Any]
Sorted = tuple[Case, list[int]]


@st.composite
def shuffled(draw: st.DrawFn, subject: Subject, axis: int) -> Sorted:
    """A call, and another order of its keys (axis 1) or queries (axis 0)."""
    case = draw(calls(subject, avoid=("segment_ids",), sees=KEYED, scoring=(*SCALING, "bias")))
    return case, draw(st.permutations(range(case.lengths[axis])))


def reordered(x: Host | None, order: list[int], axis: int) -> Host | None:
    """A table of pairs in another order, unless it broadcasts along that axis."""
    if x is None or x.ndim < -axis or x.shape[axis] != len(order):
        return x
    return np.take(x, order, axis=axis)


@law(
    "key-order",
    "f(q, P k, P v) = f(q, k, v) for a permutation P of the keys, masks permuted along",
    source="C5: a sum has no order; Lee et al. 2019, arXiv:1810.00825",
    given=lambda s: shuffled(s, 1),
    families=("dense", "linear"),
)
def key_order(run: Run, case: Case, order: list[int]) -> None:
    moved = case.but(k=case.k[..., order, :], v=case.v[..., order, :])
    for name in {"mask", "bias", "key_mask"} & set(case.options):
        moved = moved.but(**{name: reordered(case.options[name], order, -1)})
    a, b = run("a", case), run("b", moved)
    run.same(b.out, a.out, near(run, (case, a), (moved, b)), of=case)


@law(
    "query-order",
    "f(P q, k, v) = P f(q, k, v) for a permutation P of the queries, masks permuted along",
    source="C5: queries do not see each other",
    given=lambda s: shuffled(s, 0),
    families=("dense", "linear"),
)
def query_order(run: Run, case: Case, order: list[int]) -> None:
    moved = case.but(q=case.q[..., order, :])
    for name in {"mask", "bias"} & set(case.options):
        moved = moved.but(**{name: reordered(case.options[name], order, -2)})
    a, b = run("a", case), run("b", moved)
    within = near(run, (case, a), (moved, b))
    if np.ndim(within):
        within = run.bound(moved, b.out.array) * 2
    run.same(b.out, a.out[..., order, :], within, of=moved)


@law(
    "key-shift",
    "f(q, k + c, v) = f(q, k, v) for one vector c",
    source="C5: softmax does not change where all scores of a row move together",
    given=lambda s: calls(s, sees=SEES, scoring=("scale",), kinds=MODEST),
    families=("dense", "local"),
)
def key_shift(run: Run, case: Case) -> None:
    shift = np.asarray([1.0, -2.0, 0.5, 1.5])[: case.k.shape[-1]]
    moved = case.but(k=case.k + shift)
    a, b = run("a", case), run("b", moved)
    run.same(b.out, a.out, near(run, (case, a), (moved, b)), of=case)


@law(
    "keys-twice",
    "f(q, [k; k], [v; v]) = f(q, k, v)",
    source="C5: weights of copies are halved",
    given=lambda s: calls(s, scoring=SCALING),
    families=("dense", "linear"),
    needs=("cross",),
)
def keys_twice(run: Run, case: Case) -> None:
    twice = case.but(k=np.concatenate([case.k] * 2, -2), v=np.concatenate([case.v] * 2, -2))
    a, b = run("a", case), run("b", twice)
    run.same(b.out, a.out, near(run, (case, a), (twice, b)), of=case)


@law(
    "bias-of-a-row",
    "a bias that is the same for all keys of a row changes nothing",
    source="C5",
    given=lambda s: st.tuples(
        calls(s, sees=SEES, scoring=SCALING), st.sampled_from((1.0, -3.0, 64.0))
    ),
    families=("dense", "local", "sparse"),
    needs=("bias",),
)
def bias_of_a_row(run: Run, case: Case, size: float) -> None:
    rows = size * np.arange(1.0, case.lengths[0] + 1)[:, None]
    biased = case.but(bias=np.broadcast_to(rows, case.lengths).copy())
    a, b = run("a", case), run("b", biased)
    run.same(b.out, a.out, near(run, (case, a), (biased, b)), of=case)


@law(
    "bias-counts-copies",
    "a bias of ln 2 on a key is the key twice",
    source="C5: exp(s + ln 2) = 2 exp(s)",
    given=lambda s: calls(s, avoid=("empty",), scoring=("scale",)),
    families=("dense",),
    needs=("bias", "cross"),
)
def bias_counts_copies(run: Run, case: Case) -> None:
    doubled = case.but(
        k=case.k[..., [0, *range(case.lengths[1])], :],
        v=case.v[..., [0, *range(case.lengths[1])], :],
    )
    added = np.zeros(case.lengths)
    added[:, 0] = np.log(2.0)
    biased = case.but(bias=added)
    a, b = run("twice", doubled), run("biased", biased)
    run.same(b.out, a.out, near(run, (doubled, a), (biased, b)))


@law(
    "bias-of-minus-infinity-hides",
    "a bias of -inf is a mask",
    source="C5",
    given=lambda s: st.tuples(calls(s, scoring=SCALING), st.integers(2, 4)),
    families=("dense", "local", "sparse"),
    needs=("bias", "mask"),
)
def bias_hides(run: Run, case: Case, every: int) -> None:
    (nq, nk) = case.lengths
    seen = (np.arange(nq)[:, None] + np.arange(nk)) % every != 0
    masked, biased = case.but(mask=seen), case.but(bias=np.where(seen, 0.0, -np.inf))
    a, b = run("masked", masked), run("biased", biased)
    run.same(b.out, a.out, near(run, (masked, a), (biased, b)), of=masked)


@law(
    "sink-is-a-key-without-a-value",
    "sinks b add exp(b) to the denominator: one more key of score b with v = 0",
    source="C5; Xiao et al. 2023, arXiv:2309.17453",
    given=lambda s: calls(s, avoid=("empty",), scoring=("sinks", "scale")),
    families=("dense",),
    needs=("bias", "sinks", "cross"),
)
def sink_is_a_key(run: Run, case: Case) -> None:
    sinks = case.options.get("sinks", np.full(case.heads[0], 0.5))
    with_sinks = case.but(sinks=sinks)
    added = np.zeros((case.heads[0], case.lengths[0], case.lengths[1] + 1))
    added[..., 0] = sinks[:, None]
    added = added[0] if case.q.ndim == 2 else added
    k, v = (np.concatenate([np.zeros_like(x[..., :1, :]), x], -2) for x in (case.k, case.v))
    padded = case.minus("sinks").but(k=k, v=v, bias=added)
    a, b = run("sunk", with_sinks), run("padded", padded)
    run.same(a.out, b.out, near(run, (with_sinks, a), (padded, b)))
