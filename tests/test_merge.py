"""Parts of the keys merge to the whole."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import Lane
from laws import for_all
from softmax import as_held, check_pair
from strategies import Case, cases
from tolerance import eps

from arrattn import attention, merge, reference

#: A few roundings of a number of the size of 1e4.
TINY = 4 * eps("float64") * 1e4


def part_of(case: Case, start: int, stop: int) -> dict[str, Any]:
    """The options of a call on keys ``start:stop`` alone; only pairs of C5 are cut."""
    options = dict(case.options)
    nq, nk = case.lengths
    options["q_offset"] = nk - nq - start
    for name in ("mask", "bias"):
        x = options.get(name)
        if x is not None and x.ndim and x.shape[-1] == nk and nk != 1:
            options[name] = x[..., start:stop]
    return options


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Case, list[int]]:
    """A case and where its keys are cut; parts may be empty."""
    case = draw(cases(sees=False))
    case.options.pop("sinks", None)
    if draw(st.booleans()):
        case.options["is_causal"] = True
    nk = case.lengths[1]
    inner = draw(st.lists(st.integers(0, nk), max_size=3).map(sorted))
    return case, [0, *inner, nk]


def split(lane: Lane, case: Case, at: list[int]) -> list[tuple[Any, Any]]:
    """What attention gives on each part."""
    return [
        lane.call(
            attention,
            case.q,
            case.k[..., a:b, :],
            case.v[..., a:b, :],
            dtype="float64",
            return_lse=True,
            **part_of(case, a, b),
        )
        for a, b in pairwise(at)
    ]


@for_all(cut=cuts())
def test_any_split_of_the_keys_merges_to_the_whole(lane: Lane, cut: tuple[Case, list[int]]) -> None:
    case, at = cut
    got = lane.call(merge, split(lane, case, at), dtype="float64")
    whole = reference.softmax_attention(*case.arrays, return_lse=True, **case.options)
    check_pair(lane, got, whole, as_held(case, "float64"), dtype="float64")


@for_all(cut=cuts())
def test_order_and_grouping_do_not_matter(lane: Lane, cut: tuple[Case, list[int]]) -> None:
    case, at = cut
    parts = split(lane, case, at)
    whole = reference.softmax_attention(*case.arrays, return_lse=True, **case.options)
    held = as_held(case, "float64")
    check_pair(lane, merge(parts[::-1]), whole, held, dtype="float64")
    nested = merge([merge(parts[:1]), *([merge(parts[1:])] if parts[1:] else [])])
    check_pair(lane, nested, whole, held, dtype="float64")


@for_all(case=cases())
def test_one_part_is_itself(lane: Lane, case: Case) -> None:
    part = lane.call(attention, *case.arrays, dtype="float64", return_lse=True, **case.options)
    expected = tuple(map(lane.to_numpy, part))
    check_pair(lane, merge([part]), expected, as_held(case, "float64"), dtype="float64")


@for_all(case=cases())
def test_a_part_that_saw_nothing_does_not_count(lane: Lane, case: Case) -> None:
    part = lane.call(attention, *case.arrays, dtype="float64", return_lse=True, **case.options)
    options = {**case.options, "mask": np.zeros((), bool)}
    options.pop("sinks", None)
    nothing = lane.call(attention, *case.arrays, dtype="float64", return_lse=True, **options)
    expected = tuple(map(lane.to_numpy, part))
    for parts in ([part, nothing], [nothing, part]):
        check_pair(lane, merge(parts), expected, as_held(case, "float64"), dtype="float64")


def test_sinks_belong_to_one_part(lane: Lane) -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 2, 8, 4))
    case = Case(q, k, v, {"sinks": np.asarray([0.5, -1.0])})
    halves = [
        lane.call(attention, q, k[:, a:b], v[:, a:b], dtype="float64", return_lse=True, **options)
        for a, b, options in ((0, 5, case.options), (5, 8, {}))
    ]
    whole = reference.softmax_attention(q, k, v, return_lse=True, **case.options)
    check_pair(lane, merge(halves), whole, case, dtype="float64")


@pytest.mark.parametrize("shift", [1e4, -1e4, 700.0])
def test_logarithms_far_from_zero_do_not_overflow(lane: Lane, shift: float) -> None:
    lses = np.asarray([[0.0, 1.0], [2.0, -np.inf]]) + shift
    outs = np.asarray([[[1.0], [2.0]], [[3.0], [0.0]]])
    out, lse = lane.call(merge, [(outs[n], lses[n]) for n in range(2)], dtype="float64")
    w = np.exp([0.0, 2.0]) / np.exp([0.0, 2.0]).sum()
    lane.check(out, np.asarray([[w @ [1.0, 3.0]], [2.0]]), dtype="float64", within=TINY)
    expected = np.asarray([np.log(np.exp([0.0, 2.0]).sum()), 1.0]) + shift
    lane.check(lse, expected, dtype="float64", within=TINY)
