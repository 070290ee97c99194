"""What a pattern says of every pair, against its formula; and that plans cover patterns."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sights
from hypothesis import given
from hypothesis import strategies as st
from lanes import Lane
from laws import for_all
from sights import Sight
from strategies import over_batch, sights_of

from arrattn import attention, patterns
from arrattn._core.plan import EMPTY, FULL, choose_tile, make_plan


@st.composite
def views(draw: st.DrawFn) -> tuple[Sight, int, int, tuple[int, ...], Any]:
    """A pattern, the lengths, the batch axes and the offset."""
    nq, nk = draw(st.integers(0, 20)), draw(st.integers(0, 20))
    batch = draw(st.sampled_from(((), (2,), (2, 3))))
    offset = draw(over_batch(batch, -5, 25))
    return draw(sights_of(nq, nk, batch)), nq, nk, batch, offset


@for_all(view=views())
def test_the_table_is_the_formula(lane: Lane, view: Any) -> None:
    sight, nq, nk, batch, offset = view

    def table(pattern: Any, offset: Any) -> Any:
        xp = lane.namespace
        device = None if lane.declared.name in ("numpy", "dask") else device_of(lane)
        return pattern.table(nq, nk, q_offset=offset, xp=xp, device=device)

    got = lane.to_numpy(lane.call(table, sight, offset, dtype="float64"))
    truth = sight.table(nq, nk, batch, np.broadcast_to(offset, batch))
    got = got if got.ndim > 2 else got[None]
    np.testing.assert_array_equal(np.broadcast_to(got, truth.shape), truth)


def device_of(lane: Lane) -> Any:
    """The device of this lane's arrays."""
    from array_api_compat import device

    return device(lane.asarray(np.zeros(1)))


@given(view=views(), rows=st.integers(1, 6), cols=st.integers(1, 6))
def test_a_plan_covers_its_pattern(view: Any, rows: int, cols: int) -> None:
    sight, nq, nk, batch, offset = view
    offset = offset if isinstance(offset, int) else offset[..., None, None, None, None]
    plan = make_plan(sight.build(lambda x: x), nq, nk, offset, (rows, cols))
    offsets = offset if isinstance(offset, int) else offset[..., 0, 0, 0, 0]
    truth = sight.table(nq, nk, batch, np.broadcast_to(offsets, batch))[..., 0, :, :]
    kinds = np.broadcast_to(plan.kinds, (*batch, *plan.kinds.shape[-2:]))
    merged = plan.merged().kinds
    for t in range(kinds.shape[-2]):
        for u in range(kinds.shape[-1]):
            tile = truth[..., slice(*plan.rows(t)), slice(*plan.columns(u))]
            kind = kinds[..., t, u]
            assert not tile[kind == EMPTY].any(), "a tile that holds a visible pair is left out"
            assert tile[kind == FULL].all(), "a tile with a hidden pair is taken for full"
            if merged[t, u] == EMPTY:
                assert not tile.any()
            if merged[t, u] == FULL:
                assert tile.all()


@pytest.mark.parametrize(
    ("pattern", "share"),
    [
        (patterns.Causal(), 0.6),
        (patterns.Window(64, 64), 0.1),
        (patterns.Window(64, 64) | patterns.Global(64), 0.15),
        (patterns.Causal() & patterns.Window(64, 0), 0.06),
        (patterns.Prefix(256), 0.07),
        (patterns.Segments(*(2 * [np.arange(4096) // 512])), 0.14),
        (patterns.Blocks(np.eye(16, dtype=bool), 256), 0.07),
        (~patterns.Window(None, 4000), 0.02),
    ],
    ids=str,
)
def test_a_plan_leaves_out_what_nobody_sees(pattern: patterns.Pattern, share: float) -> None:
    plan = make_plan(pattern, 4096, 4096, 0, (64, 64))
    assert (plan.kinds > 0).mean() <= share
    assert f"{int((plan.kinds > 0).sum())} of 4096 visited" in repr(plan)


def test_the_chosen_tile_fits_the_budget() -> None:
    for lanes in (1, 4, 64):
        bq, bk = choose_tile(patterns.Causal(), 1000, 1000, 0, lanes=lanes, budget=1 << 18)
        assert bq * bk * lanes <= 1 << 18 or (bq, bk) == (64, 64)


def test_patterns_print_as_they_are_written() -> None:
    p = patterns
    for text in (
        "Causal()",
        "Window(3, None)",
        "Window(2, 2) | Global(1)",
        "Causal() & (Window(4, 0) | Global(4))",
        "~Strided(3)",
        "~(Causal() & Prefix(2))",
    ):
        names = {name: getattr(p, name) for name in p.__all__}
        assert repr(eval(text, names)) == text


@given(view=views())
def test_printing_names_no_values_of_large_arrays(view: Any) -> None:
    sight = view[0]
    assert len(repr(sight.build(lambda x: x))) < 300


@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (lambda: patterns.Window(-1, 0), ValueError, "left: expected at least 0, got -1"),
        (lambda: patterns.Window(1.5, 0), TypeError, "left: expected an int, got 1.5"),
        (lambda: patterns.Window(True, 0), TypeError, "left: expected an int, got True"),
        (lambda: patterns.Strided(0), ValueError, "step: expected at least 1, got 0"),
        (lambda: patterns.Global(-2), ValueError, "n: expected at least 0, got -2"),
        (lambda: patterns.Prefix(-2), ValueError, "n: expected at least 0, got -2"),
        (lambda: patterns.Prefix(np.zeros(2)), TypeError, "n: expected an array of integers"),
        (
            lambda: patterns.Blocks(np.zeros((2, 2)), 4),
            TypeError,
            "table: expected a 2-dimensional array of bool",
        ),
        (lambda: patterns.Blocks(np.eye(2) > 0, 0), ValueError, "size: expected at least 1"),
        (
            lambda: patterns.Segments(np.zeros(3), np.zeros(3, int)),
            TypeError,
            "q_ids: expected an array of integers",
        ),
        (lambda: patterns.Where(3), TypeError, "fn: expected a callable"),
    ],
)
def test_patterns_refuse_what_makes_no_sense(make: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        make()
    assert says in str(caught.value)


def test_a_rule_that_gives_no_booleans_is_refused() -> None:
    x = np.ones((1, 3, 2))
    with pytest.raises(TypeError, match="must return an array of bool"):
        attention(x, x, x, pattern=patterns.Where(lambda p, j: p + j))


def test_a_pattern_combines_with_patterns_only() -> None:
    with pytest.raises(TypeError):
        patterns.Causal() & True


def test_named_examples() -> None:
    p = patterns
    longformer = p.Window(1, 1) | p.Global(1)
    assert longformer.table(4, 4).astype(int).tolist() == [
        [1, 1, 1, 1],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [1, 0, 1, 1],
    ]
    streaming = p.Causal() & (p.Window(1, 0) | p.Prefix(1))
    assert streaming.table(4, 4).astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 1, 1],
    ]
    assert sights.causal().table(2, 2, (), np.asarray(0))[0].tolist() == [
        [True, False],
        [True, True],
    ]
