"""
Which way a call goes: the decisions of the engines, told without doing the work.

What is said here comes from the functions that the engines themselves ask.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from arrattn._core import engine, jobs, loops, native, select, small_heads, sparse_jobs, threads
from arrattn._core.inputs import Choice, SoftmaxInputs
from arrattn._core.plan import Plan


class Way(NamedTuple):
    """What an engine does with a call: what `explain` tells of it."""

    engine: str
    steps: tuple[str, ...] = ()
    kernel: str | None = None
    reasons: tuple[str, ...] = ()
    plan: Plan | None = None
    products: int | None = None


EMPTY = Way("none", ("an axis is empty: there is nothing to compute",), products=0)


def is_empty(call: SoftmaxInputs) -> bool:
    """Whether the engines give zeros without any work."""
    known = loops.schedule(call.xp) != "blocks"
    return known and 0 in (*call.batch, *call.heads, *call.lengths)


def pair_products(call: SoftmaxInputs, pairs: int) -> int:
    """Multiplications of so many pairs in each head, for their scores and their values."""
    per_pair = call.q.shape[-1] + call.v.shape[-1]
    return int(pairs * math.prod((*call.batch, *call.heads)) * per_pair)


def softmax(call: SoftmaxInputs) -> Way:
    """The way of dense and local attention: what `engine.attend` does, step by step."""
    fused = native.choose(call)
    if is_empty(call):
        return EMPTY
    if fused.run is not None:
        return Way("native", ("what it computes is the kernel's own affair",), fused.kernel)
    way = _TILES[loops.schedule(call.xp)](call)
    return way._replace(kernel=fused.kernel, reasons=fused.reasons + fused.slower)


def _threads(call: SoftmaxInputs) -> Way:
    nq, nk = call.lengths
    if small_heads.is_small(call):
        small = ("small heads, many at once, all of their pairs",)
        return Way("tiles", small, products=pair_products(call, nq * nk))
    cuts = [cut for *_, cut in jobs.items(call)]
    first, looked = cuts[0], sum(strip.cost for cut in cuts for strip in cut.strips)
    steps = [f"jobs of some queries of a head or several, on up to {threads.num_threads()} threads"]
    if first.band_rows is not None:
        rows = first.band_rows
        steps.append(f"{rows} queries at a time, with the whole band of keys that they see")
    if len({id(cut) for cut in cuts}) > 1:
        steps.append(f"planned for each of {len(cuts)} items; this is the first")
    products = pair_products(call, looked) // len(cuts)
    return Way("tiles", tuple(steps), plan=first.plan, products=products)


def _batched(call: SoftmaxInputs) -> Way:
    plan = engine.plan_batched(call)
    looked = sum(
        (i1 - i0) * (j1 - j0)
        for t in range(plan.kinds.shape[-2])
        for i0, i1 in [plan.rows(t)]
        for j0, j1, _ in plan.runs(t, 1)
    )
    steps = ("a loop over tiles, each for all items and heads at once",)
    return Way("tiles", steps, plan=plan, products=pair_products(call, looked))


def _scan(call: SoftmaxInputs) -> Way:
    _, plan = engine.plan_scan(call)
    looked = int((plan.kinds > 0).sum()) * math.prod(plan.tile)
    single = ("a single compiled tile for all items and heads",)
    loop = ("a compiled loop over whole tiles, each for all items and heads at once",)
    steps = single if plan.kinds.size == 1 else loop
    looked = math.prod(call.lengths) if plan.kinds.size == 1 else looked
    return Way("tiles", steps, plan=plan, products=pair_products(call, looked))


def _blocks(call: SoftmaxInputs) -> Way:
    del call
    return Way("tiles", ("planned in each block of items and heads, when it is computed",))


_TILES = {"threads": _threads, "batched": _batched, "scan": _scan, "blocks": _blocks}


_GUIDES = {
    "mean": "the means of their keys",
    "bound": "bounds of their keys' scores",
    "best": "their best scores",
    "given": "the scores given",
}
_TOGETHER = {
    "query": "",
    "block": ", chosen by the queries of a block together",
    "group": ", chosen by the query heads of a key head together",
}


def selection(call: SoftmaxInputs, choice: Choice) -> Way:
    """The way of sparse attention."""
    if is_empty(call):
        return EMPTY
    (nq, nk), kind = call.lengths, loops.schedule(call.xp)
    blocks = -(-nk // choice.block)
    by = _GUIDES[choice.score]
    chosen = "keys" if choice.select == "keys" else "blocks"
    if choice.exhaustive:
        looked, searched = nk, f"all {nk} keys are scored: exact selection"
    else:
        looked = (1 + choice.route) * choice.block
        done = "searched" if chosen == "keys" else "taken"
        searched = f"{choice.route} of {blocks} blocks are {done}, by {by}"
    if not choice.exhaustive and choice.route == 0:
        searched = "no block but the query's own is looked into"
    best = f"blocks of {choice.block} keys, and the best {choice.many} {chosen} outside"
    steps = [best + _TOGETHER[choice.per], searched]
    if call.always is not None:
        steps.append(f"and what is always seen: {call.always}")
    if kind == "blocks":
        steps.append("in each block of items and heads, when it is computed")
    elif kind == "threads" and sparse_jobs.takes(call, choice):
        steps.append("each other block once, with all queries that look into it")
    else:
        steps.append(f"{select.rows_at_once(call, choice)} queries at a time")
    lanes = math.prod((*call.batch, *call.heads))
    means = 0 if choice.exhaustive else lanes * nq * blocks * call.q.shape[-1]
    return Way("selection", tuple(steps), products=means + pair_products(call, nq * looked))
