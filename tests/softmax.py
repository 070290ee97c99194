"""Comparing a function of the softmax family with its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from lanes import Lane, built, rounded
from strategies import Case
from tolerance import accumulation, eps, largest, output_error, score_error

from arrattn import sparse_attention
from arrattn._core.engine import attend
from arrattn._core.inputs import read_softmax, read_sparse
from arrattn._core.select import attend_selected


def agrees(
    lane: Lane,
    function: Callable[..., Any],
    reference: Callable[..., Any],
    case: Case,
    *,
    dtype: str = "float64",
) -> None:
    """Assert that output and log-sum-exp are the float64 reference's, to rounding."""
    got = lane.call(function, *case.arrays, dtype=dtype, return_lse=True, **case.options)
    held = as_held(case, dtype)
    expected = reference(*held.arrays, return_lse=True, **built(held.options, lambda x: x))
    check_pair(lane, got, expected, held, dtype=dtype)


def check_pair(lane: Lane, got: Any, expected: Any, held: Case, *, dtype: str) -> None:
    """Assert that ``(out, lse)`` is what a call of this case should give."""
    within = output_error(*held.arrays, dtype=dtype, **held.scores)
    lane.check(got[0], expected[0], dtype=dtype, within=within)
    within = score_error(*held.arrays[:2], dtype=dtype, **held.scores)
    within += eps(accumulation(dtype)) * largest(expected[1])
    lane.check(got[1], expected[1], dtype=accumulation(dtype), within=within)


def as_held(case: Case, dtype: str) -> Case:
    """The case with the values that `dtype` can hold, in float64."""

    def hold(x: Any) -> Any:
        return rounded(x, dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x

    options = {name: hold(x) for name, x in case.options.items()}
    return Case(*map(hold, case.arrays), options, case.how)


def in_tiles(tile: tuple[int, int]) -> Callable[..., Any]:
    """Dense attention, told its tile: small ones bring out every edge in small examples."""

    def attention(*arrays: Any, return_lse: bool = False, **options: Any) -> Any:
        call = read_softmax("attention", *arrays, **options)
        out, lse = call.ungroup(*attend(call, tile=tile))
        return (out, lse) if return_lse else out

    return attention


def in_rows(rows: int) -> Callable[..., Any]:
    """Sparse attention, told how many queries to handle at once."""

    def sparse_attention(*arrays: Any, return_lse: bool = False, **options: Any) -> Any:
        given = dict.fromkeys(("top_k", "route", "block_size")) | {"select": "keys"} | options
        call, choice = read_sparse(*arrays, return_lse=return_lse, **given)
        out, lse, *chosen = attend_selected(call, choice, rows=rows)
        results = (*call.ungroup(out, lse), *map(call.ungroup_selection, chosen))
        return results if return_lse else results[0]

    return sparse_attention


def is_sparse(
    lane: Lane, case: Case, options: dict[str, Any], expected: np.ndarray[Any, Any]
) -> None:
    """Sparse attention of the case, with these options too, equals what another one gave."""
    held = as_held(case, "float64")
    within = 2 * output_error(*held.arrays, dtype="float64", **held.scores)
    got = lane.call(sparse_attention, *case.arrays, dtype="float64", **case.options, **options)
    lane.check(got, expected, dtype="float64", within=within)
