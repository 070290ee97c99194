"""Laws that need no reference: what may change about the input without changing the result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from lanes import Lane
from laws import for_all
from softmax import as_held, in_tiles
from strategies import Case, cases, lengths
from tolerance import eps, longest, output_error

from arrattn import attention, linear_attention, local_attention, sparse_attention
from arrattn.patterns import Causal, Window

#: Dense in tiles: that another kernel gives the same is a law of its own (test_native).
FAMILIES: dict[str, Callable[..., Any]] = {
    "dense": partial(attention, engine="tiles"),
    "local": lambda *a, **o: local_attention(*a, **{"window": (4, 4), **o}),
    "sparse": lambda *a, **o: sparse_attention(*a, block_size=4, top_k=3, route=2, **o),
    "sparse-exact": lambda *a, **o: sparse_attention(*a, block_size=4, top_k=3, route=None, **o),
    "linear": linear_attention,
}
families = pytest.mark.parametrize("family", FAMILIES)


def bound(case: Case) -> float:
    """The error of two results, each off by its own rounding."""
    held = as_held(case, "float64")
    return 2 * output_error(*held.arrays, dtype="float64", **held.scores)


def run(lane: Lane, function: Callable[..., Any], case: Case, **options: Any) -> Any:
    return lane.call(function, *case.arrays, dtype="float64", **{**case.options, **options})


# -- Keys -------------------------------------------------------------------------------------


@for_all(case=cases(empty=False, sees=False, scores=False), seed=st.integers(0, 9))
def test_keys_may_come_in_any_order(lane: Lane, case: Case, seed: int) -> None:
    rng = np.random.default_rng(seed)
    (nq, nk), order = case.lengths, rng.permutation(case.lengths[1])
    seen = rng.random((nq, nk)) < 0.7
    bias = rng.normal(size=(nq, nk))
    was = run(lane, attention, case, mask=seen, bias=bias)
    moved = Case(case.q, case.k[..., order, :], case.v[..., order, :])
    got = run(lane, attention, moved, mask=seen[:, order], bias=bias[:, order])
    within = bound(Case(*case.arrays, {"bias": bias}))
    lane.check(got, lane.to_numpy(was), dtype="float64", within=within)


@for_all(case=cases(empty=False, scores=False), seed=st.integers(0, 9))
def test_one_vector_added_to_all_keys_changes_nothing(lane: Lane, case: Case, seed: int) -> None:
    shift = np.random.default_rng(seed).normal(size=case.k.shape[-1])
    moved = Case(case.q, case.k + shift, case.v, case.options)
    was = lane.to_numpy(run(lane, attention, case))
    lane.check(run(lane, attention, moved), was, dtype="float64", within=bound(moved))


@families
def test_key_heads_are_read_in_groups_not_repeated(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(0)
    q, (k, v) = rng.normal(size=(2, 6, 11, 4)), rng.normal(size=(2, 2, 2, 11, 4))
    grouped = lane.call(FAMILIES[family], q, k, v, dtype="float64", is_causal=True)
    repeated = (np.repeat(x, 3, axis=-3) for x in (k, v))
    each = lane.call(FAMILIES[family], q, *repeated, dtype="float64", is_causal=True)
    within = 2 * output_error(q, k, v, dtype="float64")
    lane.check(grouped, lane.to_numpy(each), dtype="float64", within=within)


# -- Values -----------------------------------------------------------------------------------


@families
def test_the_result_is_linear_in_v(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(1)
    q, k, v, w = rng.normal(size=(4, 2, 13, 4))

    def f(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return lane.to_numpy(lane.call(FAMILIES[family], q, k, v, dtype="float64", is_causal=True))

    whole = lane.call(FAMILIES[family], q, k, 2 * v - 3 * w, dtype="float64", is_causal=True)
    within = 6 * output_error(q, k, np.abs(v) + np.abs(w), dtype="float64")
    lane.check(whole, 2 * f(v) - 3 * f(w), dtype="float64", within=within)


@families
def test_weights_sum_to_one(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(2)
    q, k = rng.normal(size=(2, 2, 21, 4))
    ones = np.ones((2, 21, 3))
    out = lane.call(FAMILIES[family], q, k, ones, dtype="float64", is_causal=True)
    within = 2 * output_error(q, k, ones, dtype="float64")
    lane.check(out, ones, dtype="float64", within=within)


@for_all(case=cases())
def test_the_output_lies_in_the_hull_of_the_visible_values(lane: Lane, case: Case) -> None:
    case.options.pop("sinks", None)
    out = lane.to_numpy(run(lane, attention, case))
    seen, (hq, hkv) = case.visible(), case.heads
    v = case.v[None] if case.v.ndim == 2 else np.repeat(case.v, hq // hkv, axis=-3)
    v = np.where(seen[..., None], v[..., None, :, :], np.nan)  # (..., Hq, Nq, Nk, Dv)
    some = seen.any(-1)[..., None]
    low = np.where(some, np.min(np.where(np.isnan(v), np.inf, v), axis=-2, initial=np.inf), 0)
    high = np.where(some, np.max(np.where(np.isnan(v), -np.inf, v), axis=-2, initial=-np.inf), 0)
    slack = 4 * eps("float64") * (1 + np.abs(case.v).max(initial=0.0))
    out = out[None] if case.q.ndim == 2 else out
    assert (out >= low - slack).all()
    assert (out <= high + slack).all()


@families
def test_channels_do_not_touch_each_other(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(3, 2, 13, 4))
    whole = lane.to_numpy(lane.call(FAMILIES[family], q, k, v, dtype="float64"))
    within = 2 * output_error(q, k, v, dtype="float64")
    for c in range(4):
        one = lane.call(FAMILIES[family], q, k, v[..., c : c + 1], dtype="float64")
        lane.check(one, whole[..., c : c + 1], dtype="float64", within=within)


# -- Batch ------------------------------------------------------------------------------------


@families
def test_a_batch_item_does_not_depend_on_the_others(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(4)
    q, k, v = rng.normal(size=(3, 3, 2, 19, 4))
    alone = lane.call(FAMILIES[family], q[1:2], k[1:2], v[1:2], dtype="float64", is_causal=True)
    for array in (q, k, v):
        array[[0, 2]] *= 50
    packed = lane.call(FAMILIES[family], q, k, v, dtype="float64", is_causal=True)
    exact = lane.declared.name == "numpy"
    within = 0.0 if exact else 2 * output_error(q[1], k[1], v[1], dtype="float64")
    lane.check(packed[1:2, ...], lane.to_numpy(alone), dtype="float64", within=within)


@families
@pytest.mark.parametrize("lead", [((2, 3), (3,), (1, 1)), ((1,), (4,), ()), ((), (2, 1), (1, 3))])
def test_batch_axes_broadcast(lane: Lane, family: str, lead: tuple[tuple[int, ...], ...]) -> None:
    rng = np.random.default_rng(5)
    q, k, v = (rng.normal(size=(*x, 2, 9, 4)) for x in lead)
    batch = np.broadcast_shapes(*lead)
    full = [np.broadcast_to(x, (*batch, 2, 9, 4)).copy() for x in (q, k, v)]
    got = lane.call(FAMILIES[family], q, k, v, dtype="float64", is_causal=True)
    expected = lane.call(FAMILIES[family], *full, dtype="float64", is_causal=True)
    within = 2 * output_error(q, k, v, dtype="float64")
    lane.check(got, lane.to_numpy(expected), dtype="float64", within=within)


# -- Tiles ------------------------------------------------------------------------------------


@for_all(case=cases(), a=st.sampled_from(((2, 3), (7, 1))), b=st.sampled_from(((4, 4), (64, 64))))
def test_tile_sizes_change_nothing_but_rounding(
    lane: Lane, case: Case, a: tuple[int, int], b: tuple[int, int]
) -> None:
    first = lane.to_numpy(run(lane, in_tiles(a), case))
    lane.check(run(lane, in_tiles(b), case), first, dtype="float64", within=bound(case))


# -- Time -------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("cut", [1, 16, 70])
def test_the_prefix_of_a_causal_run_is_the_run_of_the_prefix(
    lane: Lane, family: str, cut: int
) -> None:
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(3, 2, 71, 4))
    whole = lane.call(FAMILIES[family], q, k, v, dtype="float64", is_causal=True)
    prefix = (x[:, :cut] for x in (q, k, v))
    part = lane.call(FAMILIES[family], *prefix, dtype="float64", is_causal=True)
    within = 2 * output_error(q, k, v, dtype="float64")
    lane.check(part, lane.to_numpy(whole)[:, :cut], dtype="float64", within=within)


@families
def test_decoding_step_by_step_is_prefill(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(3, 2, 6, 4))
    whole = lane.to_numpy(lane.call(FAMILIES[family], q, k, v, dtype="float64", is_causal=True))
    within = 2 * output_error(q, k, v, dtype="float64")
    for t in range(1, 7):
        # The last query sees the last key: the default alignment fits a cache as it is.
        step = q[:, t - 1 : t], k[:, :t], v[:, :t]
        got = lane.call(FAMILIES[family], *step, dtype="float64", is_causal=True)
        lane.check(got, whole[:, t - 1 : t], dtype="float64", within=within)


@families
def test_a_cache_longer_than_its_content_is_the_content(lane: Lane, family: str) -> None:
    rng = np.random.default_rng(8)
    q = rng.normal(size=(2, 2, 3, 4))
    k, v = rng.normal(size=(2, 2, 2, 20, 4))
    filled = np.asarray([5, 14])
    got = lane.call(FAMILIES[family], q, k, v, dtype="float64", kv_lengths=filled, is_causal=True)
    within = 2 * output_error(q, k, v, dtype="float64")
    for b, n in enumerate(filled):
        item = q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n]
        alone = lane.call(FAMILIES[family], *item, dtype="float64", is_causal=True)
        lane.check(got[b : b + 1, ...], lane.to_numpy(alone), dtype="float64", within=within)


@families
def test_packed_documents_are_documents_one_by_one(lane: Lane, family: str) -> None:
    if family.startswith("sparse"):
        pytest.skip("blocks are cut along the packed keys, not along each document")
    rng = np.random.default_rng(9)
    q, k, v = rng.normal(size=(3, 2, 30, 4))
    ids = np.repeat([0, 1, 2], [7, 19, 4])
    got = lane.call(FAMILIES[family], q, k, v, dtype="float64", segment_ids=ids, is_causal=True)
    within = 2 * output_error(q, k, v, dtype="float64")
    for document in range(3):
        rows = ids == document
        alone = lane.call(
            FAMILIES[family], q[:, rows], k[:, rows], v[:, rows], dtype="float64", is_causal=True
        )
        at = slice(int(rows.argmax()), int(rows.argmax() + rows.sum()))
        lane.check(got[:, at, :], lane.to_numpy(alone), dtype="float64", within=within)


# -- Options that say the same ----------------------------------------------------------------


@for_all(case=cases(scores=False), extra=st.booleans(), n=lengths())
def test_shorthand_and_pattern_are_one(lane: Lane, case: Case, extra: bool, n: int) -> None:
    case.options.pop("pattern", None)
    case.options.pop("is_causal", None)
    case.options["window"] = (n, 1)
    was = run(lane, attention, case, is_causal=extra)
    case.options.pop("window")
    pattern = Window(n, 1) & Causal() if extra else Window(n, 1)
    got = run(lane, attention, case, pattern=pattern)
    lane.check(got, lane.to_numpy(was), dtype="float64", within=bound(case))


@for_all(case=cases())
def test_a_mask_that_says_what_the_options_say_is_the_same(lane: Lane, case: Case) -> None:
    scoring = {n: x for n, x in case.options.items() if n in ("scale", "softcap", "bias", "sinks")}
    seen = case.visible()
    masked = Case(*case.arrays, {**scoring, "mask": seen[0] if case.q.ndim == 2 else seen})
    was = lane.to_numpy(run(lane, attention, case))
    lane.check(run(lane, attention, masked), was, dtype="float64", within=bound(case))


@for_all(case=cases(scores=False), scale=st.sampled_from((0.5, 2.0, -1.0)))
def test_scale_belongs_to_q(lane: Lane, case: Case, scale: float) -> None:
    was = lane.to_numpy(run(lane, attention, case, scale=scale))
    got = run(lane, attention, Case(case.q * scale, case.k, case.v, case.options), scale=1.0)
    size = 1 + abs(scale) * longest(case.q) * longest(case.k)
    within = 8 * eps("float64") * size * np.abs(case.v).max(initial=0.0)
    lane.check(got, was, dtype="float64", within=within)


@for_all(case=cases(scores=False), sink=st.sampled_from((-1.0, 0.0, 3.0)))
def test_a_sink_is_a_key_without_a_value(lane: Lane, case: Case, sink: float) -> None:
    hq = case.heads[0]
    out, lse = run(lane, attention, case, return_lse=True)
    got = run(lane, attention, case, sinks=np.full(hq, sink))
    # exp(lse) / (exp(lse) + exp(sink)) of the mass is left for the values.
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(sink - lane.to_numpy(lse)))
    expected = lane.to_numpy(out) * share[..., None]
    lane.check(got, expected, dtype="float64", within=bound(case))
