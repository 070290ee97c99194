"""The arguments of sparse attention."""

from __future__ import annotations

import math
from typing import Any

from arrattn._core.inputs.arguments import (
    FLOATS,
    Reasons,
    broadcasts,
    describe,
    dtype_name,
    is_array,
    pattern_arrays,
    read_count,
    read_flag,
    read_word,
)
from arrattn._core.inputs.calls import Choice, SoftmaxInputs, query_blocks
from arrattn._core.inputs.softmax import read_softmax
from arrattn._core.typing import Array
from arrattn.patterns import Pattern

SELECT, PER, SCORE = ("keys", "blocks"), ("query", "block", "group"), ("mean", "bound", "best")

#: Blocks chosen by default.
BLOCKS = 3


def read_sparse(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: object,
    top_k: object,
    route: object,
    select: object,
    per: object,
    score: object = "mean",
    block_scores: object = None,
    always: object = None,
    return_selection: object = False,
    **shared: Any,
) -> tuple[SoftmaxInputs, Choice]:
    """Read the arguments of sparse attention; `shared` are those of the whole family."""
    read: dict[str, Any] = {}

    def read_choice(reasons: Reasons, shape: tuple[int, ...]) -> None:
        *batch, _, _, nq, nk = shape
        root = math.isqrt(nk - 1) + 1 if nk else 1
        read["what"] = read_word("select", select, SELECT, reasons)
        read["per"] = read_word("per", per, PER, reasons)
        read["score"] = read_word("score", score, SCORE, reasons)
        block = root if block_size is None else read_count("block_size", block_size, reasons, low=1)
        usual = root if read["what"] == "keys" else BLOCKS
        read["count"] = usual if top_k is None else read_count("top_k", top_k, reasons, low=0)
        read["route"] = None if route is None else read_count("route", route, reasons, low=0)
        read["block"] = max(min(block, nk), 1)
        read["selection"] = read_flag("return_selection", return_selection, reasons)
        if isinstance(always, Pattern):
            reasons.values([f"always: {text}" for text in always.problems(nq, nk, tuple(batch))])
        elif always is not None:
            reasons.add(TypeError, f"always: expected an arrattn Pattern, got {describe(always)}")
        if block_scores is not None and not _are_scores(block_scores):
            reasons.add(
                TypeError,
                f"block_scores: expected an array of {' or '.join(FLOATS)}, "
                f"got {describe(block_scores)}",
            )
        if block_scores is not None and score != "mean":
            reasons.add(
                ValueError,
                f"score: expected to be left out where block_scores are given, got {score!r}",
            )

    arrays = pattern_arrays(always, "always") | {"block_scores": block_scores}
    call = read_softmax("sparse_attention", q, k, v, also=read_choice, arrays=arrays, **shared)
    (nq, nk), what, block, count = call.lengths, read["what"], read["block"], read["count"]
    blocks = -(-nk // block)
    # Every block may be another one: a position outside the keys has no own block.
    searched = count if what == "blocks" else blocks if read["route"] is None else read["route"]
    searched = min(searched, blocks) if count else 0
    choice = Choice(
        block=block,
        top_k=min(count, nk),
        route=searched,
        # Blocks are routed all the same where their scores can forbid some.
        exhaustive=what == "keys"
        and 0 < searched == blocks
        and (block_scores is None or read["route"] is None),
        select=what,
        per=read["per"],
        score="given" if block_scores is not None else read["score"],
        queries=nq,
        query_blocks=query_blocks(nq, block, call.offset),
        selection=read["selection"],
    )
    reasons = Reasons("sparse_attention")
    reasons.arrays = {"q": q, "k": k, "v": v}
    beside = always.bound(nk) if isinstance(always, Pattern) else None
    scores = _read_block_scores(block_scores, call, choice, reasons)
    reasons.check()
    return call._replace(always=beside, block_scores=scores), choice


def _are_scores(x: Any) -> bool:
    return is_array(x) and dtype_name(x.dtype) in FLOATS


def _read_block_scores(
    x: Any, call: SoftmaxInputs, choice: Choice, reasons: Reasons
) -> Array | None:
    if x is None:
        return None
    (hkv, g), (nq, nk) = call.heads, call.lengths
    blocks = -(-nk // choice.block)
    shape = (1,) * (3 - x.ndim) + tuple(x.shape)
    *batch, heads, rows, columns = shape
    all_rows = {1, nq} | ({choice.query_blocks} if choice.per == "block" else set())
    fits = heads in {1, hkv, hkv * g} and rows in all_rows and columns == blocks
    if not fits or not broadcasts(tuple(batch), call.batch):
        also = f" or {choice.query_blocks} query blocks" if choice.per == "block" else ""
        reasons.add(
            ValueError,
            f"block_scores: expected a shape that broadcasts to (..., Hq, Nq, blocks) = "
            f"{(*call.batch, hkv * g, nq, blocks)}{also}, with all {blocks} blocks of "
            f"{choice.block} keys, got {tuple(x.shape)}",
        )
        return None
    per_head = (hkv, g) if heads == hkv * g else (heads, 1)
    return call.xp.reshape(x, (*batch, *per_head, rows, columns))
