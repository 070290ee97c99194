"""Prefixes, decoding, packing, padding, and parts that merge."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import MODEST, SCALING, calls, near
from arrattn.testing.laws.registry import law
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import eps, largest

Host = np.ndarray[Any, Any]

causal_needs = ("is_causal",)


def in_order(subject: Subject, **how: Any) -> st.SearchStrategy[Case]:
    """Calls of self-attention: as many queries as keys."""
    how = {"scoring": SCALING, "equal": True, **how}
    return calls(subject, avoid=("broadcast", *how.pop("avoid", ())), **how)


def cut_keys(case: Case, part: slice) -> Case:
    """The call on some of its keys."""
    return case.per_key(lambda x: x[..., part, :])


def rows_of(within: Any, shape: tuple[int, ...], rows: slice) -> Any:
    """The part of a bound that belongs to some rows."""
    return np.broadcast_to(within, shape)[..., rows, :]


@law(
    "causal-future",
    "keys and values after position p change nothing in the rows up to p, to the rounding",
    source="C4; Vaswani et al. 2017, section 3.2.3",
    given=lambda s: st.tuples(in_order(s), st.integers(0, 8), st.sampled_from((-32.0, 32.0, 8.0))),
    needs=causal_needs,
)
def causal_future(run: Run, case: Case, cut: int, factor: float) -> None:
    case, cut = case.causal, cut % (case.lengths[1] + 1)
    later = np.arange(case.lengths[1]) >= cut
    k, v = (np.where(later[:, None], factor * x, x) for x in (case.k, case.v))
    before, after = run("before", case), run("after", case.but(k=k, v=v))
    within = rows_of(2 * near(run, (case, before)), before.out.shape, slice(None, cut))
    run.same(after.out[..., :cut, :], before.out[..., :cut, :], within)


@law(
    "causal-prefix",
    "the first t rows of a causal run are the run of the first t tokens",
    source="C4, C10",
    given=lambda s: st.tuples(in_order(s), st.integers(0, 8)),
    needs=causal_needs,
)
def causal_prefix(run: Run, case: Case, cut: int) -> None:
    case, cut = case.causal, cut % (case.lengths[1] + 1)
    if not cut and not run.subject.can("empty"):
        return
    prefix = cut_keys(case, slice(None, cut)).but(q=case.q[..., :cut, :])
    whole, part = run("whole", case), run("part", prefix)
    within = rows_of(near(run, (case, whole)), whole.out.shape, slice(None, cut))
    run.same(part.out, whole.out[..., :cut, :], 2 * within)


@law(
    "decoding-is-prefill",
    "one query over a cache of t keys is row t of the causal run over all",
    source="C3: the last query sees the last key",
    given=in_order,
    needs=("is_causal", "cross"),
    choice="alignment",
)
def decoding_is_prefill(run: Run, case: Case) -> None:
    case = case.causal
    whole = run("whole", case)
    within = np.broadcast_to(near(run, (case, whole)), whole.out.shape)
    for t in sorted({1, case.lengths[1] // 2, case.lengths[1]} - {0}):
        if not case.lengths[1]:
            return
        step = cut_keys(case, slice(None, t)).but(q=case.q[..., t - 1 : t, :])
        one = run(f"step{t}", step)
        run.same(one.out, whole.out[..., t - 1 : t, :], 2 * within[..., t - 1 : t, :])


@law(
    "chunked-prefill-is-prefill",
    "the queries from t on over all keys are the rows from t on of the causal run",
    source="C3",
    given=lambda s: st.tuples(in_order(s, avoid=("empty",)), st.integers(0, 7)),
    needs=("is_causal", "cross"),
    choice="alignment",
)
def chunked_prefill(run: Run, case: Case, cut: int) -> None:
    case, cut = case.causal, cut % case.lengths[1]
    whole = run("whole", case)
    rest = run("rest", case.but(q=case.q[..., cut:, :]))
    within = rows_of(near(run, (case, whole)), whole.out.shape, slice(cut, None))
    run.same(rest.out, whole.out[..., cut:, :], 2 * within)


@law(
    "packed-is-one-by-one",
    "documents packed with segment_ids give what each of them gives alone",
    source="C4; Krell et al. 2021, arXiv:2107.02027",
    given=lambda s: st.tuples(
        in_order(s, avoid=("empty",)), st.booleans(), st.sampled_from(((1, 9), (2, 3), (3, 4)))
    ),
    families=("dense", "local", "linear", "delta"),
    needs=("segment_ids",),
)
def packed_is_one_by_one(run: Run, case: Case, causal: bool, cuts: tuple[int, int]) -> None:
    if causal and run.subject.can("is_causal", "combine"):
        case = case.causal
    n = case.lengths[1]
    ids = np.searchsorted(np.asarray(cuts), np.arange(n), side="right") * 3 % 7
    packed = run("packed", case.but(segment_ids=ids))
    for start, stop in zip((0, *cuts), (*cuts, n), strict=True):
        part = slice(min(start, n), min(stop, n))
        if part.start < part.stop:
            document = cut_keys(case, part).but(q=case.q[..., part, :])
            alone = run(f"document{start}", document)
            within = 2 * near(run, (document, alone))
            run.same(packed.out[..., part, :], alone.out, within)


@law(
    "padding-is-absent",
    "keys beyond kv_lengths = n are as if they were cut off, whatever they hold",
    source="C3, C4",
    given=lambda s: st.tuples(calls(s, scoring=SCALING), st.integers(0, 8), st.booleans()),
    needs=("kv_lengths", "cross"),
)
def padding_is_absent(run: Run, case: Case, length: int, causal: bool) -> None:
    length = length % (case.lengths[1] + 1)
    if not length and not run.subject.can("empty"):
        return
    if causal and run.subject.can("is_causal", "combine"):
        case = case.causal
    short = cut_keys(case, slice(None, length))
    a, b = run("padded", case.but(kv_lengths=length)), run("cut", short)
    run.same(a.out, b.out, 2 * near(run, (short, b)), of=short)


@law(
    "lengths-of-a-batch",
    "kv_lengths of a batch item is the call of that item with its own length",
    source="C4",
    given=lambda s: st.tuples(
        calls(s, avoid=("broadcast",)), st.lists(st.integers(0, 8), min_size=4, max_size=4)
    ),
    needs=("kv_lengths",),
)
def lengths_of_a_batch(run: Run, case: Case, lengths: list[int]) -> None:
    if case.q.ndim < 4:
        return
    nk, batch = case.lengths[1], case.batch
    each = np.asarray(lengths[: int(np.prod(batch))]).reshape(batch) % (nk + 1)
    whole = run("whole", case.but(kv_lengths=each))
    b = (0,) * (len(batch) - 1) + (batch[-1] - 1,)
    at = tuple(slice(i, i + 1) for i in b)
    alone = case.per_key(lambda x: x[at]).but(q=case.q[at], kv_lengths=int(each[b]))
    one = run("alone", alone)
    run.same(whole.out[at], one.out, 2 * near(run, (alone, one)), of=alone)


def merged(parts: list[tuple[Host, Host]]) -> tuple[Host, Host]:
    """Put parts together: L = log sum exp L_r, o = sum exp(L_r - L) o_r."""
    lse = np.stack([x for _, x in parts])
    top = np.max(lse, axis=0)
    top = np.where(np.isneginf(top), 0.0, top)
    weights = np.exp(lse - top)
    total = weights.sum(0)
    outs = np.stack([out for out, _ in parts])
    out = (weights[..., None] * outs).sum(0) / np.where(total == 0, 1.0, total)[..., None]
    with np.errstate(divide="ignore"):
        return out, np.where(total == 0, -np.inf, top + np.log(total))


def part_of(case: Case, part: slice, subject: Subject) -> Case:
    """The call on some of its keys, which stay where they stood."""
    (nq, nk), cut = case.lengths, cut_keys(case, part)
    for name in {"mask", "bias"} & set(case.options):
        x = case.options[name]
        if x.ndim and x.shape[-1] == nk and nk != 1:
            cut = cut.but(**{name: x[..., part]})
    if subject.can("q_offset"):
        default = 0 if case.top_left else nk - nq
        cut = cut.but(q_offset=default - part.start)
    return cut


def split_cases(subject: Subject) -> st.SearchStrategy[Case]:
    """Calls whose keys can be cut."""
    order = ("is_causal", "window") if subject.can("q_offset", "combine") else ()
    return calls(subject, sees=("mask", *order), scoring=("scale", "softcap", "bias"))


@law(
    "parts-merge",
    "(out, lse) over any split of the keys merge to the whole: o = sum exp(L_r - L) o_r",
    source="C9; Milakov & Gimelshein 2018, arXiv:1805.02867",
    given=lambda s: st.tuples(split_cases(s), st.integers(0, 8)),
    families=("dense", "local"),
    needs=lambda s: ("return_lse", "cross", *(("q_offset",) if s.family == "local" else ())),
)
def parts_merge(run: Run, case: Case, cut: int) -> None:
    nk = case.lengths[1]
    cut %= nk + 1
    parts = [part_of(case, x, run.subject) for x in (slice(0, cut), slice(cut, nk))]
    if not run.subject.can("empty"):
        parts = [x for x in parts if x.lengths[1]]
    case = case.but(return_lse=True)
    whole = run("whole", case)
    found = [run(f"part{n}", x, return_lse=True) for n, x in enumerate(parts)]
    out, lse = merged([(x.out.array, x.lse.array) for x in found])
    within = 2 * near(run, (case, whole))
    run.same(whole.out, run.let("merged", out), within, of=case)
    size = 2 * run.score_bound(case) + 4 * eps(run.subject.measured(case.dtype)) * largest(lse)
    run.same(whole.lse, run.let("merged_lse", lse), size, of=case)


@law(
    "lse-counts-ties",
    "with scores of 0, lse_i is the natural logarithm of the number of visible keys",
    source="C9",
    given=lambda s: calls(s, sees=("is_causal", "mask", "kv_lengths", "window")),
    families=("dense", "local"),
    needs=("return_lse",),
)
def lse_counts_ties(run: Run, case: Case) -> None:
    case = case.but(q=np.zeros_like(case.q))
    whole = run("whole", case, return_lse=True)
    count = case.visible().sum(-1)
    count = count[0] if case.q.ndim == 2 else count
    with np.errstate(divide="ignore"):
        run.same(whole.lse, np.log(count), 2 * run.score_bound(case), of=case)


@law(
    "lse-shifts-with-the-bias",
    "a bias of b in every pair adds b to lse",
    source="C9",
    given=lambda s: st.tuples(
        calls(s, scoring=SCALING, kinds=MODEST), st.sampled_from((3.0, -8.0))
    ),
    families=("dense", "local", "sparse"),
    needs=("return_lse", "bias"),
)
def lse_shifts(run: Run, case: Case, shift: float) -> None:
    biased = case.but(bias=np.full(case.lengths, shift))
    a, b = run("plain", case, return_lse=True), run("biased", biased, return_lse=True)
    within = run.score_bound(case) + 2 * run.score_bound(biased)
    run.same(b.lse, a.lse + shift, within, of=case)
