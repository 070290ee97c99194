"""Limit cases of windows and of selection."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn import reference
from arrattn.testing.case import Case
from arrattn.testing.laws.given import SCALING, calls, near, probe
from arrattn.testing.laws.registry import law
from arrattn.testing.laws.scores import mean_of_visible
from arrattn.testing.laws.values import per_query_head
from arrattn.testing.run import Run

Host = np.ndarray[Any, Any]

SOME = ("is_causal", "mask", "kv_lengths", "segment_ids")
KEEP = ("block_size", "top_k", "route")


def dense(case: Case) -> Host:
    """The defining equation over all keys that are visible."""
    out: Host = reference.softmax_attention(*case.arrays, **case.minus(*KEEP).meant)
    return out


@law(
    "wide-window-is-dense",
    "a window of all keys, or of None, is no window",
    source="C4; Beltagy et al. 2020, arXiv:2004.05150",
    given=lambda s: st.tuples(
        calls(s, sees=SOME, scoring=SCALING), st.sampled_from(((None, None), (64, 64), (None, 64)))
    ),
    families=("dense", "local"),
    needs=("window",),
)
def wide_window(run: Run, case: Case, window: tuple[int | None, int | None]) -> None:
    case = case.minus("window")
    whole = run("whole", case.but(window=window))
    run.same(whole.out, dense(case), run.bound(case), of=case)


@law(
    "window-of-itself",
    "window = (0, 0): o_i = v_p, the value at the query's own position",
    source="C4: a window does not count the position itself",
    given=lambda s: calls(s, scoring=SCALING),
    families=("dense", "local"),
    needs=("window",),
)
def window_of_itself(run: Run, case: Case) -> None:
    case = case.but(window=(0, 0))
    whole = run("whole", case)
    run.same(whole.out, mean_of_visible(case), run.bound(case), of=case)


@law(
    "window-to-the-left-is-causal",
    "window = (None, 0) is is_causal",
    source="C4",
    given=lambda s: calls(s, scoring=SCALING),
    families=("dense", "local", "sparse"),
    needs=("window", "is_causal"),
)
def window_to_the_left(run: Run, case: Case) -> None:
    left = case.but(window=(None, 0))
    causal = case.but(is_causal=True)
    causal = causal.but(window=(None, None)) if run.subject.family == "local" else causal
    a, b = run("window", left), run("causal", causal)
    run.same(a.out, b.out, near(run, (left, a), (causal, b)), of=left)


# -- Selection --------------------------------------------------------------------------------


@law(
    "all-keys-selected-is-dense",
    "top_k >= Nk with every block searched is dense attention",
    source="the definition of sparse attention; Gupta et al. 2021, arXiv:2106.06899",
    given=lambda s: st.tuples(calls(s, sees=SOME, scoring=("scale", "bias")), st.integers(0, 3)),
    families=("sparse",),
    needs=("top_k", "route"),
)
def all_keys_selected(run: Run, case: Case, more: int) -> None:
    case = case.but(top_k=case.lengths[1] + more, route=None)
    whole = run("whole", case)
    run.same(whole.out, dense(case), run.bound(case), of=case)


@law(
    "nothing-selected-is-block-diagonal",
    "top_k = 0: query i sees the block of its own position and nothing else",
    source="the definition of sparse attention",
    given=lambda s: st.tuples(calls(s, sees=SOME), st.sampled_from((1, 2, 3, 4))),
    families=("sparse",),
    needs=("top_k", "block_size"),
)
def nothing_selected(run: Run, case: Case, size: int) -> None:
    case = case.but(top_k=0, block_size=size)
    (nq, nk), lengths = case.lengths, np.asarray(case.options.get("kv_lengths", case.lengths[1]))
    start = np.zeros_like(lengths) if case.top_left else lengths - nq
    p = (start[..., None] + np.arange(nq))[..., None]
    own = (p // size == np.arange(nk) // size) & (p >= 0) & (p < nk)
    own = own[..., None, :, :] if own.ndim > 2 else own
    seen = own & case.visible()
    seen = seen[0] if case.q.ndim == 2 else seen
    keep = case.minus(*KEEP, *SOME).but(mask=seen)
    whole = run("whole", case)
    run.same(whole.out, dense(keep), run.bound(case), of=keep)


@law(
    "one-block-is-dense",
    "block_size >= Nk is dense for queries that stand within the keys",
    source="the definition of sparse attention",
    given=lambda s: calls(s, sees=("is_causal", "mask"), equal=True),
    families=("sparse",),
    needs=("block_size",),
)
def one_block(run: Run, case: Case) -> None:
    case = case.but(block_size=max(case.lengths[1], 1) + 1)
    whole = run("whole", case)
    run.same(whole.out, dense(case), run.bound(case), of=case)


@law(
    "ties-go-to-the-lower-index",
    "of keys with equal scores the ones with the lowest index are selected",
    source="the definition of sparse attention: the same on every library",
    given=lambda s: st.tuples(calls(s, equal=True), st.sampled_from((1, 2, 3))),
    families=("sparse",),
    needs=("block_size", "top_k", "route"),
)
def ties_go_to_the_lower_index(run: Run, case: Case, count: int) -> None:
    size = case.options["block_size"]
    case = probe(case.but(q=np.zeros_like(case.q), top_k=count, route=None), run.subject)
    whole, n = run("weights", case), case.lengths[1]
    own = np.arange(n)[:, None] // size == np.arange(n) // size
    seen = own | (~own & (np.cumsum(~own, axis=-1) <= count))
    due = np.broadcast_to(seen, (*whole.out.shape[:-1], n)) if n else whole.out.array > 0
    run.same(whole.out[..., :n] > 0, due, 0.0)


@law(
    "the-best-key-is-found",
    "a key elsewhere that outscores all others by far is selected: o_i is its value",
    source="the definition of sparse attention; Lu et al. 2025, arXiv:2502.13189",
    given=lambda s: st.tuples(calls(s, avoid=("empty",)), st.integers(0, 7)),
    families=("sparse",),
)
def the_best_key_is_found(run: Run, case: Case, at: int) -> None:
    best = at % case.lengths[1]
    q, k = np.ones_like(case.q), np.zeros_like(case.k)
    k[..., best, :] = 2.0**14
    case = case.but(q=q, k=k, **({"scale": 2.0**-7} if run.subject.can("scale") else {}))
    whole = run("whole", case)
    v = per_query_head(case.v, case)[..., best : best + 1, :]
    v = np.broadcast_to(v, (*v.shape[:-2], case.lengths[0], v.shape[-1]))
    within = run.bound(case) + 2 * np.exp(-40.0) * case.lengths[1] * np.max(np.abs(v), initial=0)
    run.same(whole.out, v[0] if case.q.ndim == 2 else v, within)


@law(
    "no-more-than-top-k-elsewhere",
    "query i sees at most top_k keys outside its own block",
    source="the definition of sparse attention: O(N top_k) memory",
    given=lambda s: calls(s, sees=SOME),
    families=("sparse",),
    needs=("block_size", "top_k"),
)
def no_more_than_top_k(run: Run, case: Case) -> None:
    size, count = case.options["block_size"], case.options["top_k"]
    case = probe(case, run.subject)
    whole = run("weights", case)
    seen = (whole.out.array > 0).sum(-1).astype(float)
    most = np.full(seen.shape, float(size + count))
    run.same(run.let("seen", seen), most, 0.0, op="<=")
    rows = case.full_rows()
    run.same(run.let("seen", seen), rows.astype(float), 0.0, op=">=", where=rows)


@law(
    "hidden-keys-take-no-place",
    "a hidden key is never selected: the next best visible one is",
    source="the definition of sparse attention: hidden keys are never selected",
    given=lambda s: st.tuples(calls(s, sees=SOME, least=1)),
    families=("sparse",),
    needs=("top_k", "route"),
)
def hidden_keys_take_no_place(run: Run, case: Case) -> None:
    case = probe(case.but(route=None), run.subject)
    whole = run("weights", case)
    due = reference.sparse_attention(*case.arrays, **case.meant)
    run.same(whole.out > 0, due > 0, 0.0, of=case)


@law(
    "every-block-searched-is-exact",
    "route >= the number of blocks selects what route = None does",
    source="the definition of sparse attention",
    given=lambda s: calls(s, sees=SOME),
    families=("sparse",),
    needs=("route",),
)
def every_block_searched(run: Run, case: Case) -> None:
    routed, exact = case.but(route=case.lengths[1] + 1), case.but(route=None)
    a, b = run("routed", routed), run("exact", exact)
    run.same(a.out, b.out, near(run, (routed, a), (exact, b)), of=case)
