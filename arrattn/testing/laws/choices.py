"""What sparse attention chooses: keys or blocks, by whom, by what score, and what besides."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn import reference
from arrattn.testing import draws
from arrattn.testing.case import Case
from arrattn.testing.laws.agreement import agrees, exact
from arrattn.testing.laws.given import SEES, calls, near, probe
from arrattn.testing.laws.hidden import unchanged
from arrattn.testing.laws.limits import SOME
from arrattn.testing.laws.registry import law
from arrattn.testing.run import Outcome, Run
from arrattn.testing.strategies import CHOOSING
from arrattn.testing.subject import Subject
from arrattn.testing.values import Value

Host = np.ndarray[Any, Any]

SPARSE = ("sparse",)
SIZES = ("block_size", "top_k")
MOBA = "Lu et al. 2025, arXiv:2502.13189: whole blocks, by the score of their mean"
QUEST = "Tang et al. 2024, arXiv:2406.10774: a bound from above of a block's scores"
NSA = "Yuan et al. 2025, arXiv:2502.11089: heads that share keys share the choice"
TOPK = "Gupta et al. 2021, arXiv:2106.06899: the keys with the highest scores"


def chosen(subject: Subject, *names: str, **how: Any) -> st.SearchStrategy[Case]:
    """Calls with any of these arguments about the choice."""
    return calls(subject, choosing=names or CHOOSING, **how)


def some_choice(subject: Subject) -> tuple[str, ...]:
    """`select`, unless there is another argument about the choice."""
    return () if any(subject.can(name) for name in CHOOSING) else ("select",)


def starts(case: Case) -> Host:
    """Where the first query stands, over the batch or for all of it."""
    nq, nk = case.lengths
    ends = np.asarray(case.options.get("kv_lengths", nk))
    return np.asarray(case.options.get("q_offset", 0 if case.top_left else ends - nq))


def query_blocks(case: Case) -> Host:
    """The block in which each query's position lies, (..., Nq)."""
    blocks: Host = (starts(case)[..., None] + np.arange(case.lengths[0])) // block_size(case)
    return blocks


def block_size(case: Case) -> int:
    """At most the number of keys."""
    return max(min(int(case.options["block_size"]), case.lengths[1]), 1)


def key_blocks(case: Case) -> Host:
    """The block of each key."""
    return np.arange(case.lengths[1]) // block_size(case)


def beside(case: Case) -> Host:
    """What is seen without being chosen, where it is visible: (*batch, Hq, Nq, Nk)."""
    p = starts(case)[..., None] + np.arange(case.lengths[0])
    seen = query_blocks(case)[..., None] == key_blocks(case)
    seen = (seen & ((p >= 0) & (p < case.lengths[1]))[..., None])[..., None, :, :]
    if (always := case.options.get("always")) is not None:
        offset = np.broadcast_to(starts(case), case.batch)
        seen = seen | always.table(*case.lengths, case.batch, offset)
    return np.broadcast_to(seen, (*case.batch, case.heads[0], *case.lengths))


def like(x: Host, case: Case) -> Host:
    """Without heads, where q has none."""
    return np.asarray(x[0] if case.q.ndim == 2 else x)


def attend_over(case: Case, seen: Host) -> Host:
    """Dense attention over these pairs."""
    scale = {n: case.options[n] for n in ("scale",) if n in case.options}
    out: Host = reference.softmax_attention(*case.arrays, mask=like(seen, case), **scale)
    return out


def pairs_seen(run: Run, case: Case) -> Value:
    """Where weights are above 0, (..., Hq, Nq, Nk)."""
    whole = run("weights", probe(case, run.subject))
    return whole.out[..., : case.lengths[1]] > 0


def named(run: Run, case: Case, whole: Outcome) -> Host:
    """The selection as a table of pairs, (*batch, Hq, Nq, Nk)."""
    (hq, hkv), per = case.heads, case.options.get("per", "query")
    n, blocks = case.lengths[1], case.options.get("select", "keys") == "blocks"
    n = -(-n // block_size(case)) if blocks else n
    row = query_blocks(case)
    row = row - row[..., :1] if per == "block" else np.arange(case.lengths[0])
    got, rows = whole.selection.array, int(np.max(row, initial=-1)) + 1
    if per == "block" and row.ndim > 1 and got.ndim > 1:  # not as many in each batch item
        rows = max(rows, got.shape[-2])
    heads = () if case.q.ndim == 2 else (hkv if per == "group" else hq,)
    shape = (*case.batch, *heads, rows, min(case.options["top_k"], n))
    text = whole.selection.text
    run.require(
        got.shape == shape,
        f"a selection of shape {got.shape} where {shape} is due",
        f"assert {text}.shape == {shape}",
    )
    table = (got[None] if case.q.ndim == 2 else got)[..., None] == np.arange(n)
    table = table.any(-2)[..., key_blocks(case)] if blocks else table.any(-2)
    table = np.repeat(table, hq // hkv, axis=-3) if per == "group" else table
    full = (*case.batch, hq, *case.lengths)
    return np.take_along_axis(table, np.broadcast_to(row[..., None, :, None], full), axis=-2)


# -- The equation -----------------------------------------------------------------------------


@law(
    "equals-the-equation-in-choices",
    "so it is with any of select, per, score, block_scores and always",
    source=f"the definition of sparse attention; {MOBA}",
    given=lambda s: chosen(s, sees=SEES, most=2, scoring=("scale",)),
    families=SPARSE,
    needs=some_choice,
)
def equals_choices(run: Run, case: Case) -> None:
    agrees(run, case)


@law(
    "selection-equals-the-equation",
    "what was chosen is what the defining equation chooses, row by row",
    source="the definition of sparse attention",
    given=lambda s: chosen(s, sees=SEES, most=2, scoring=("scale",)),
    families=SPARSE,
    needs=("return_selection",),
)
def selection_equals(run: Run, case: Case) -> None:
    case = case.but(return_selection=True)
    run.same(run("whole", case).selection, exact(run, case)[-1], 0.0)


# -- Who chooses ------------------------------------------------------------------------------


@law(
    "queries-of-a-block-choose-together",
    'per = "block": queries whose positions lie in one block see the same keys',
    source=QUEST,
    given=lambda s: chosen(s, "select", "score", "block_scores"),
    families=SPARSE,
    needs=("per", "block_size", "scale"),
)
def queries_choose_together(run: Run, case: Case) -> None:
    case = case.but(per="block")
    seen, block = pairs_seen(run, case), query_blocks(case)
    first = np.searchsorted(block, block)  # positions ascend
    run.same(seen, seen[..., first, :], 0.0)


@law(
    "heads-of-a-group-choose-together",
    'per = "group": query heads that share a key head see the same keys',
    source=NSA,
    given=lambda s: chosen(
        s, "select", "score", "block_scores", "always", sees=("is_causal", "window", "kv_lengths")
    ),
    families=SPARSE,
    needs=("per", "gqa", "scale"),
)
def heads_choose_together(run: Run, case: Case) -> None:
    seen, (hq, hkv) = pairs_seen(run, case.but(per="group")), case.heads
    first = np.arange(hq) // (hq // hkv) * (hq // hkv)
    if case.q.ndim > 2:
        run.same(seen, seen[..., first, :, :], 0.0)


@st.composite
def scored(draw: st.DrawFn, subject: Subject, *names: str) -> Case:
    """A call with a score for every block, by query and query head."""
    case = draw(chosen(subject, *names, avoid=("empty",)))
    rows = (case.heads[0], case.lengths[0])
    return case.but(block_scores=draws.block_scores(draw, case, rows))


@law(
    "scores-are-summed-over-who-chooses",
    "who chooses together chooses by the sum: its scores, or one row of their sums, are the same",
    source=f"{NSA}; {QUEST}",
    given=lambda s: st.tuples(scored(s, "select"), st.sampled_from(("block", "group"))),
    families=SPARSE,
    needs=("per", "block_scores", "block_size", "gqa"),
)
def scores_are_summed(run: Run, case: Case, per: str) -> None:
    each, (hq, hkv) = case.but(per=per), case.heads
    given = each.options["block_scores"]
    if per == "group":
        total = given.reshape(hkv, hq // hkv, *given.shape[1:]).sum(1)
    else:
        block = query_blocks(case)
        total = np.add.reduceat(given, np.unique(block, return_index=True)[1], axis=-2)
    together = each.but(block_scores=total)
    a, b = run("each", each), run("summed", together)
    run.same(a.out, b.out, near(run, (each, a), (together, b)))


# -- By what ----------------------------------------------------------------------------------


@law(
    "given-scores-decide",
    "block_scores: the top_k blocks given the highest scores are seen; -inf forbids a block",
    source=f"{NSA}: scores from elsewhere",
    given=lambda s: scored(s, "select"),
    families=SPARSE,
    needs=("select", "block_scores", *SIZES, "scale"),
)
def given_scores_decide(run: Run, case: Case) -> None:
    case = case.but(select="blocks")
    given, own = case.options["block_scores"], beside(case)
    blocks = np.arange(given.shape[-1])
    home = (own[..., None] & (key_blocks(case)[:, None] == blocks)).any(-2)
    left = np.where(home, -np.inf, given)
    place = np.argsort(np.argsort(-left, axis=-1, kind="stable"), axis=-1)
    best = (place < case.options["top_k"]) & (left > -np.inf)
    run.same(pairs_seen(run, case), like(own | best[..., key_blocks(case)], case), 0.0)


@law(
    "exact-search-needs-no-score",
    "route = None: bounds leave out no key that wins, and any score of blocks chooses the same",
    source=QUEST,
    given=lambda s: st.tuples(
        chosen(s, "per", "always", sees=SOME), st.sampled_from(("bound", "best"))
    ),
    families=SPARSE,
    needs=("score", "route"),
)
def exact_search(run: Run, case: Case, score: str) -> None:
    plain = case.but(route=None)
    other = plain.but(score=score)
    a, b = run("plain", plain), run("scored", other)
    run.same(b.out, a.out, near(run, (plain, a), (other, b)), of=case)


@law(
    "blocks-of-one-key-are-keys",
    "block_size = 1: mean, bound and best score are the key's: blocks chosen are keys chosen",
    source=f"{TOPK}; {QUEST}",
    given=lambda s: st.tuples(
        chosen(s, "per", "always", sees=SOME, scoring=("scale",)),
        st.sampled_from(("bound", "mean", "best") if s.can("score") else ("",)),
    ),
    families=SPARSE,
    needs=("select", "route", *SIZES),
)
def blocks_of_one_key(run: Run, case: Case, score: str) -> None:
    keys = case.but(block_size=1, route=None)
    blocks = keys.but(select="blocks", **({"score": score} if score else {}))
    a, b = run("keys", keys), run("blocks", blocks)
    run.same(b.out, a.out, near(run, (keys, a), (blocks, b)), of=case)


@law(
    "bounds-of-one-channel-are-best",
    "keys that differ in one channel alone: the bound is met, and chooses what the best score does",
    source=QUEST,
    given=lambda s: chosen(s, "select", "per", scoring=("scale",)),
    families=SPARSE,
    needs=("score", "scale"),
)
def bounds_of_one_channel(run: Run, case: Case) -> None:
    k = case.k.copy()
    k[..., 1:] = 60.0
    bound, best = (case.but(k=k, score=x) for x in ("bound", "best"))
    a, b = run("bound", bound), run("best", best)
    run.same(a.out, b.out, near(run, (bound, a), (best, b)))


@st.composite
def in_order(draw: st.DrawFn, subject: Subject) -> tuple[Case, list[int]]:
    """Blocks no two of which have keys alike, before all queries, and another order of them."""
    case = draw(chosen(subject, "select", "per", "score", avoid=("empty",)))
    size, count = case.options["block_size"], draw(st.sampled_from((4, 2, 3)))
    at = np.arange(size * count)
    k, v = (np.take(x, at % case.lengths[1], axis=-2) for x in (case.k, case.v))
    rank = np.asarray(draw(st.permutations(range(count))))
    k[..., 0] += 60.0 * 16 * rank[at // size]
    q = np.zeros_like(case.q)
    q[..., 0] = 1 + np.abs(case.q[..., 0])
    case = case.but(q=q, k=k, v=v, q_offset=len(at))
    return case, draw(st.permutations(range(count)))


@law(
    "block-order",
    "f(q, P k, P v) = f(q, k, v) for a permutation P of blocks; what is chosen moves along",
    source="a set has no order",
    given=in_order,
    families=SPARSE,
    needs=("select", "q_offset", *SIZES, "scale"),
)
def block_order(run: Run, case: Case, order: list[int]) -> None:
    size, blocks = case.options["block_size"], case.options.get("select") == "blocks"
    names = case.options | {"return_selection": run.subject.can("return_selection")}
    case = case.but(**{n: x for n, x in names.items() if run.subject.can(n)})
    at = (size * np.asarray(order)[:, None] + np.arange(size)).reshape(-1)
    moved = case.but(k=case.k[..., at, :], v=case.v[..., at, :])
    a, b = run("a", case), run("b", moved)
    run.same(b.out, a.out, near(run, (case, a), (moved, b)))
    if case.options.get("return_selection"):
        was = np.append(order if blocks else at, len(at))  # -1 reads the last, and comes last
        back = np.sort(was[b.selection.array.astype(int)], axis=-1)
        run.same(a.selection, np.where(back == len(at), -1, back), 0.0)


@st.composite
def half_hidden(draw: st.DrawFn, subject: Subject) -> tuple[Case, list[int]]:
    """Four blocks of two keys, the second of which no query sees, and an order of the blocks."""
    case = draw(calls(subject, avoid=("empty",)))
    k, v = (np.take(x, np.arange(8) % case.lengths[1], axis=-2) for x in (case.k, case.v))
    mask = np.broadcast_to(np.arange(8) % 2 == 0, (case.lengths[0], 8)).copy()
    case = case.but(k=k, v=v, mask=mask, block_size=2, top_k=1, route=1)
    return case, draw(st.permutations(range(4)))


@law(
    "hidden-keys-do-not-route",
    "what keys hold that no query sees changes neither which blocks are searched nor the output",
    source="C7: hidden means absent, also from what stands for a block",
    given=half_hidden,
    families=SPARSE,
    needs=("mask", "route", *SIZES),
)
def hidden_keys_do_not_route(run: Run, case: Case, order: list[int]) -> None:
    k = case.k.copy()
    k[..., 1::2, :] = 4096.0 * np.asarray(order)[:, None] - 8192.0
    unchanged(run, case, case.but(k=k))


# -- What is seen -----------------------------------------------------------------------------


@law(
    "nothing-chosen-leaves-always",
    "top_k = 0: the own block and what `always` shows are seen, where visible, and nothing else",
    source="the definition of sparse attention; Xiao et al. 2024, arXiv:2402.04617",
    given=lambda s: chosen(s, sees=SEES, most=2),
    families=SPARSE,
    needs=("always", *SIZES),
)
def nothing_chosen(run: Run, case: Case) -> None:
    case = case.but(top_k=0)
    whole = run("whole", case)
    run.same(whole.out, attend_over(case, beside(case) & case.visible()), run.bound(case), of=case)


@law(
    "always-takes-no-place",
    "what `always` shows is seen, and top_k visible keys beside it, or all there are",
    source="the definition of sparse attention",
    given=lambda s: chosen(s, "always", "score", sees=SOME),
    families=SPARSE,
    needs=("always", "route", *SIZES, "scale"),
)
def always_takes_no_place(run: Run, case: Case) -> None:
    case, visible = case.but(route=None), case.visible()
    seen = pairs_seen(run, case)
    always = like(beside(case) & visible, case)
    run.same(seen, always, 0.0, op="==", where=always)
    elsewhere = like(visible, case) & ~always
    count = (seen.array & elsewhere).sum(-1)
    due = np.minimum(elsewhere.sum(-1), case.options["top_k"])
    run.same(run.let("chosen", count), due, 0.0)


@law(
    "blocks-are-seen-whole",
    "blocks chosen: of a block every visible key is seen or none, and of top_k blocks at most",
    source=MOBA,
    given=lambda s: chosen(s, "score", "block_scores", sees=SOME),
    families=SPARSE,
    needs=("select", *SIZES, "scale"),
)
def blocks_are_whole(run: Run, case: Case) -> None:
    case = case.but(select="blocks")
    seen, blocks = pairs_seen(run, case), key_blocks(case)
    same = blocks[:, None] == blocks
    any_of = ((seen.array[..., None] & same).any(-2)) & like(case.visible(), case)
    run.same(seen, any_of, 0.0)
    first = np.diff(blocks, prepend=-1) > 0
    elsewhere = ~like(beside(case), case) & first
    count = ((seen.array[..., None] & same).any(-2) & elsewhere).sum(-1)
    most = np.full(count.shape, case.options["top_k"])
    run.same(run.let("blocks", count), most, 0.0, op="<=")


@law(
    "all-blocks-chosen-is-dense",
    "top_k of all blocks is dense attention, whoever chooses by whatever score",
    source=MOBA,
    given=lambda s: chosen(s, "per", "score", "always", sees=SEES),
    families=SPARSE,
    needs=("select", "top_k"),
)
def all_blocks(run: Run, case: Case) -> None:
    case = case.but(select="blocks", top_k=case.lengths[1])
    whole = run("whole", case)
    run.same(whole.out, attend_over(case, case.visible()), run.bound(case), of=case)


# -- What is returned -------------------------------------------------------------------------


@law(
    "selection-is-what-is-seen",
    "o is dense attention over own block, `always` and selection, where visible",
    source="the definition of sparse attention",
    given=lambda s: chosen(s, sees=SEES, most=2),
    families=SPARSE,
    needs=("return_selection", *SIZES),
)
def selection_is_seen(run: Run, case: Case) -> None:
    whole = run("whole", case.but(return_selection=True))
    seen = (beside(case) | named(run, case, whole)) & case.visible()
    run.same(whole.out, attend_over(case, seen), run.bound(case), of=case)


@law(
    "selection-ascends",
    "a row of the selection ascends, names nothing twice, and ends with -1 for what is missing",
    source="the definition of sparse attention",
    given=lambda s: chosen(s, sees=SOME),
    families=SPARSE,
    needs=("return_selection",),
)
def selection_ascends(run: Run, case: Case) -> None:
    found = run("whole", case.but(return_selection=True)).selection
    end = case.lengths[1]
    due = np.sort(np.where(found.array < 0, end, found.array), axis=-1)
    run.same(found, np.where(due == end, -1, due), 0.0)
    twice = (np.diff(due, axis=-1) == 0) & (due[..., 1:] < end)
    run.same(run.let("twice", twice), np.zeros_like(twice), 0.0)


@law(
    "selection-is-of-what-is-elsewhere",
    "top_k of what is visible outside own block and `always` are chosen, or all there are",
    source="the definition of sparse attention: hidden keys are never chosen",
    given=lambda s: chosen(s, "select", "score", "always", sees=SOME),
    families=SPARSE,
    needs=("return_selection", "route", *SIZES),
)
def selection_is_elsewhere(run: Run, case: Case) -> None:
    case = case.but(route=None, return_selection=True)
    whole = run("whole", case)
    table = named(run, case, whole)
    could = case.visible() & ~beside(case)
    blocks = key_blocks(case)
    total = could.sum(-1)
    if case.options.get("select", "keys") == "blocks":
        could = (could[..., None] & (blocks[:, None] == blocks)).any(-2)
        total = (could & (np.diff(blocks, prepend=-1) > 0)).sum(-1)
    run.same(run.let("chosen", table & ~could), np.zeros_like(could), 0.0)
    count = (whole.selection.array >= 0).sum(-1)
    due = np.minimum(total, case.options["top_k"])
    run.same(run.let("count", count), like(due, case), 0.0)
