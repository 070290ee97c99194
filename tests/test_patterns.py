"""What a pattern says of every pair, against its formula; and that plans cover patterns."""

from __future__ import annotations

import pickle
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
from arrattn._core.tiles import TilePairs
from arrattn.patterns import Rectangles


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
        at = device_of(lane)
        return pattern.table(nq, nk, q_offset=offset, xp=lane.namespace, device=at)

    got = lane.to_numpy(lane.call(table, sight, offset, dtype="float64"))
    truth = sight.table(nq, nk, batch, np.broadcast_to(offset, batch))
    got = got if got.ndim > 2 else got[None]
    np.testing.assert_array_equal(np.broadcast_to(got, truth.shape), truth)


def device_of(lane: Lane) -> Any:
    """The device of this lane's arrays, None where there is but one."""
    from array_api_compat import device

    single = lane.declared.name in ("numpy", "dask")
    return None if single else device(lane.asarray(np.zeros(1)))


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


EVERY_OTHER = np.arange(9).reshape(3, 3) % 2 == 0
PRECISE = [
    patterns.Causal(),
    patterns.Window(2, 1),
    patterns.Window(None, 2),
    patterns.Window(3, None),
    ~patterns.Window(2, 1),
    patterns.Prefix(0),
    patterns.Prefix(4),
    patterns.Global(3),
    patterns.Dilated(1, 2, 1),
    patterns.Dilated(2, None, 1),
    patterns.Dilated(3, 1, 2),
    patterns.Strided(3),
    patterns.Blocks(EVERY_OTHER, 3),
    patterns.Blocks(~EVERY_OTHER, 2),
    patterns.Segments(*(2 * [np.arange(9) // 4])),
    patterns.Random(0, 0),
    patterns.Random(2, 0, size=2),
    patterns.Random(3, 1, size=2, keys=7),
    patterns.Random(9, 0),
    patterns.OwnBlock(3, 9),
    patterns.OwnBlock(2, 5),
]
CAUTIOUS = [  # in some rectangle, part of which is seen for one reason and part for another
    patterns.Fixed(3, 1),
    patterns.Fixed(2, 2),
    patterns.Fixed(4, 0),
    patterns.Random(2, 0),
    patterns.Causal() & patterns.Strided(2),
    patterns.Window(1, 0) | patterns.Global(2),
    patterns.Segments(*(2 * [np.arange(9) % 3])),
]


@pytest.mark.parametrize("offset", [-3, 0, 4])
@pytest.mark.parametrize(
    ("pattern", "precise"),
    [*((x, True) for x in PRECISE), *((x, False) for x in CAUTIOUS)],
    ids=str,
)
def test_what_is_said_of_a_rectangle_holds_there(
    pattern: patterns.Pattern, precise: bool, offset: int
) -> None:
    n = 9
    lo, hi = np.array([(i, j) for i in range(n) for j in range(i + 1, n + 1)]).T
    i0, i1, j0, j1 = lo[:, None], hi[:, None], lo[None, :], hi[None, :]
    pattern = pattern.bound(n)
    some, every = pattern.rectangles(Rectangles(i0, i1, i0 + offset, i1 + offset, j0, j1))
    sums = np.pad(pattern.table(n, n, q_offset=offset).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    seen = sums[i1, j1] - sums[i0, j1] - sums[i1, j0] + sums[i0, j0]
    all_of_it = seen == (i1 - i0) * (j1 - j0)
    assert not (~np.asarray(some) & (seen > 0)).any(), "a visible pair is left out"
    assert not (every & ~all_of_it).any(), "a hidden pair is taken for visible"
    if precise or isinstance(pattern, patterns.Fixed):
        assert not (some & (seen == 0)).any(), "nothing to look at is looked at"
    if precise:
        assert not (~np.asarray(every) & all_of_it).any(), "what is full is not known to be"


@pytest.mark.parametrize("pattern", [x for x in PRECISE + CAUTIOUS if x.uniform], ids=str)
def test_a_table_is_the_same_on_every_library(lane: Lane, pattern: patterns.Pattern) -> None:
    got = pattern.table(5, 9, q_offset=2, xp=lane.namespace, device=device_of(lane))
    expected = pattern.table(5, 9, q_offset=2)
    np.testing.assert_array_equal(lane.to_numpy(got), expected)


SPANS = [
    patterns.Causal(),
    patterns.Window(2, 1),
    patterns.Window(None, None),
    patterns.Prefix(4),
    patterns.Causal() & patterns.Prefix(3),
    patterns.Prefix(6) & patterns.Window(1, 3),
    patterns.Window(3, None) & patterns.Window(None, 1),
    patterns.Window(1, None) & patterns.Window(2, 2) & patterns.Causal(),
]


@pytest.mark.parametrize("offset", [-3, 0, 4])
@pytest.mark.parametrize("pattern", SPANS, ids=str)
def test_what_is_seen_is_one_span_each_way(pattern: patterns.Pattern, offset: int) -> None:
    n = 9
    pairs = TilePairs(0, n, 0, n, offset, xp=np, device=None)
    table = pattern.table(n, n, q_offset=offset)
    for span, x in ((pattern.key_span(pairs), pairs.j), (pattern.query_span(pairs), pairs.p)):
        assert span is not None
        lo, hi = (y if y is not None else x + d for y, d in zip(span, (0, 1), strict=True))
        np.testing.assert_array_equal(np.broadcast_to((x >= lo) & (x < hi), (n, n)), table)


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
        (patterns.Dilated(4, 16, 0), 0.04),
        (patterns.Random(2, 0, size=64), 0.04),
        (patterns.Causal() & patterns.Fixed(2048, 64), 0.41),
        (patterns.Window(64, 0) | patterns.Random(3, 0, size=64), 0.08),
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
        "Dilated(2, 3, None) | Fixed(8, 2)",
        "Random(3, 7) & ~Random(3, 7, size=4, keys=20)",
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
        (
            lambda: patterns.Dilated(0, 1, 1),
            ValueError,
            "Dilated: step: expected at least 1",
        ),
        (lambda: patterns.Dilated(2, -1, 1), ValueError, "Dilated: left: expected at least 0"),
        (
            lambda: patterns.Dilated(2, 1, 0.5),
            TypeError,
            "right: expected an int, got 0.5",
        ),
        (lambda: patterns.Fixed(0), ValueError, "Fixed: size: expected at least 1, got 0"),
        (lambda: patterns.Fixed(4, 5), ValueError, "Fixed: n: expected at most size (4), got 5"),
        (lambda: patterns.Random(-1, 0), ValueError, "Random: n: expected at least 0, got -1"),
        (lambda: patterns.Random(1, -1), ValueError, "Random: rng: expected at least 0, got -1"),
        (
            lambda: patterns.Random(1, "x"),
            TypeError,
            "Random: rng: expected an int or a numpy.random.Generator, got 'x'",
        ),
        (lambda: patterns.Random(1, 0, size=0), ValueError, "Random: size: expected at least 1"),
        (lambda: patterns.Random(1, 0, keys=-2), ValueError, "Random: keys: expected at least 0"),
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


# -- Random keys ------------------------------------------------------------------------------


@given(n=st.integers(0, 9), seed=st.integers(0, 99), size=st.integers(1, 5), nk=st.integers(0, 40))
def test_each_query_draws_so_many_blocks_of_keys(n: int, seed: int, size: int, nk: int) -> None:
    whole = -(-nk // size) * size  # so that the last block is as long as the others
    seen = patterns.Random(n, seed, size=size).table(30, whole, q_offset=0)
    np.testing.assert_array_equal(seen.sum(-1), min(n * size, whole))
    for i, j in np.argwhere(seen):
        block = seen[i // size * size : (i // size + 1) * size, j // size * size :][:, :size]
        assert block.all()


def test_draws_are_even_and_those_of_different_queries_are_independent() -> None:
    rows, nk = 20_000, 64
    for n, seed in ((1, 0), (4, 0), (4, 1)):
        seen = patterns.Random(n, seed).table(rows, nk, q_offset=0).astype(float)
        share = n / nk
        deviation = np.sqrt(rows * share * (1 - share))
        # The most extreme of 64 counts lies beyond 5 deviations once in some ten thousand.
        assert np.abs(seen.sum(0) - rows * share).max() < 5 * deviation
        together = (seen[1:] * seen[:-1]).sum()
        expected = (rows - 1) * n * share
        assert abs(together - expected) < 6 * np.sqrt(expected)


def test_another_seed_draws_other_keys_and_a_generator_is_drawn_from() -> None:
    tables = [patterns.Random(3, rng).table(50, 50) for rng in (0, 1, np.random.default_rng(0))]
    assert not (tables[0] == tables[1]).all()
    assert not (tables[0] == tables[2]).all()
    again = patterns.Random(3, np.random.default_rng(0))
    np.testing.assert_array_equal(again.table(50, 50), tables[2])
    assert eval(repr(again), {"Random": patterns.Random}) == again


def test_with_keys_given_a_draw_does_not_change_with_the_length() -> None:
    pattern = patterns.Random(3, 0, keys=64)
    long = pattern.table(64, 64)
    np.testing.assert_array_equal(pattern.table(1, 40, q_offset=39)[0], long[39, :40])
    assert patterns.Random(3, 0).bound(64) == pattern
    assert not pattern.table(8, 100)[:, 64:].any()


def test_without_keys_an_attention_draws_from_its_own() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 50, 4)) for _ in range(3))
    pattern = patterns.Window(1, 1) | ~patterns.Random(40, 3)
    expected = attention(q, k, v, mask=pattern.table(50, 50))
    np.testing.assert_allclose(attention(q, k, v, pattern=pattern), expected, atol=1e-13)


def test_pairs_alone_do_not_say_how_many_keys_there_are() -> None:
    pairs = TilePairs(0, 2, 0, 2, 0, xp=np, device=None)
    with pytest.raises(ValueError, match="give keys="):
        patterns.Random(3, 0).visible(pairs)


# -- Patterns as values -----------------------------------------------------------------------


@given(view=views())
def test_patterns_are_values(view: Any) -> None:
    sight, nq, nk, _, offset = view
    pattern = sight.build(lambda x: x)
    if "Where" not in repr(pattern):
        twin = pickle.loads(pickle.dumps(pattern))
        assert repr(twin) == repr(pattern)
        one, other = (x.table(nq, nk, q_offset=offset) for x in (pattern, twin))
        np.testing.assert_array_equal(one, other)
        if pattern.uniform:
            assert twin == pattern
            assert hash(twin) == hash(pattern)
    arrays: list[Any] = []
    bare = patterns.detach(pattern, arrays)
    hash(bare)
    assert (len(arrays) == 0) == (pattern.uniform or ("Where" in repr(pattern) and not arrays))
    again = patterns.attach(bare, tuple(arrays))
    assert repr(again) == repr(pattern)


def test_patterns_do_not_change() -> None:
    pattern = patterns.Window(1, 2)
    with pytest.raises(AttributeError, match="Window cannot be changed"):
        pattern.left = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del pattern.left
    assert pattern == patterns.Window(1, 2) != patterns.Window(1, 3)
    assert patterns.Strided(2) != patterns.Dilated(2, None, None)
    assert {patterns.Causal(), patterns.Causal()} == {patterns.Causal()}


def test_different_patterns_have_different_hashes() -> None:
    windows = [patterns.Window(left, right) for left in range(5) for right in range(5)]
    others = [patterns.Causal(), patterns.Prefix(3), patterns.Global(3), patterns.Strided(3)]
    assert len({hash(x) for x in [*windows, *others]}) == 29


def test_patterns_are_equal_if_they_hold_the_same_arrays() -> None:
    table = np.eye(3, dtype=bool)
    pattern = patterns.Blocks(table, 2)
    assert pattern == patterns.Blocks(table, 2)
    with pytest.raises(TypeError, match="unhashable"):  # its table may change
        hash(pattern)
    assert pattern != patterns.Blocks(table.copy(), 2)
    assert pattern != patterns.Blocks(table, 3)
    assert patterns.Prefix(3) != patterns.Prefix(np.array([3, 3]))
    assert patterns.Causal() & pattern == patterns.Causal() & patterns.Blocks(table, 2)


def test_patterns_are_known_by_their_public_names() -> None:
    for name in patterns.__all__:
        assert getattr(patterns, name).__module__ == "arrattn.patterns"


@given(view=views(), corner=st.tuples(*[st.integers(0, 19)] * 4))
def test_what_a_pattern_comes_down_to_is_the_same_there(view: Any, corner: Any) -> None:
    sight, nq, nk, batch, offset = view
    i0, i1 = sorted(min(x, nq) for x in corner[:2])
    j0, j1 = sorted(min(x, nk) for x in corner[2:])
    if batch or not isinstance(offset, int) or i0 == i1 or j0 == j1:
        return
    pattern = sight.build(lambda x: x)
    place = Rectangles(*(np.array([[x]]) for x in (i0, i1, i0 + offset, i1 + offset, j0, j1)))
    seen = patterns.within(pattern, place)
    expected = pattern.table(nq, nk, q_offset=offset)[i0:i1, j0:j1]
    if isinstance(seen, bool):
        assert (expected == seen).all()
    else:
        got = seen.table(nq, nk, q_offset=offset)[i0:i1, j0:j1]
        np.testing.assert_array_equal(got, expected)


@given(view=views())
def test_nothing_is_seen_beside_the_band_but_by_the_rest(view: Any) -> None:
    sight, nq, nk, _, offset = view
    pattern = sight.build(lambda x: x)
    band, rest = patterns.apart(pattern)
    table = pattern.table(nq, nk, q_offset=offset)
    start = np.asarray(offset)[..., None, None, None]
    away = np.arange(nk) - np.arange(nq)[:, None] - start
    lo, hi = band or (1, 0)
    beside = table & ~((away >= lo) & (away < hi))
    if rest is None:
        assert not beside.any()
    else:
        assert not (beside & ~rest.table(nq, nk, q_offset=offset)).any()
        assert not (rest.table(nq, nk, q_offset=offset) & ~table).any()


def test_a_product_of_unions_has_the_bands_of_its_terms() -> None:
    a = patterns.Window(3, 0) | patterns.Global(2)
    b = patterns.Window(0, 5) | patterns.Prefix(4)
    assert patterns.apart(a & b)[0] == (-3, 6)
    assert patterns.apart(patterns.Causal() & b)[0] == (0, 1)
    assert patterns.apart(patterns.Causal() & patterns.Prefix(3))[0] is None


def test_edges_are_those_of_blocks_that_are_not_small() -> None:
    for n in (16, 17, 100):
        assert tuple(sorted(patterns.Fixed(n, 2).edges(250, 0).keys)) == tuple(
            sorted({*range(n, 250, n), 250} | {x - 2 for x in (*range(n, 250, n), 250)})
        )
    assert patterns.Fixed(15, 2).edges(250, 0).keys == ()


@pytest.mark.parametrize("n", [1, 100, 128, 129, 640])
def test_no_tile_of_a_plan_is_empty(n: int) -> None:
    for pattern in (patterns.Fixed(64), patterns.Global(n), patterns.Prefix(n), patterns.Causal()):
        plan = make_plan(pattern, n, n, 0, (128, 64), pattern.edges(n, 0))
        for starts in plan.starts:
            assert (np.diff([*starts, n]) > 0).all()


def test_a_plan_visits_keys_in_their_order() -> None:
    rng = np.random.default_rng(0)
    for most in (400, 3, 1, 0):
        table = (rng.random((40, 400)) < 0.5) & (np.arange(400) < most)
        visits = make_plan(patterns.Blocks(table, 1), 40, 400, 0, (1, 1)).visits()
        assert visits.shape[-1] == max(table.sum(-1).max(), 1)
        for row, expected in zip(visits, table, strict=True):
            real = row[row >= 0]
            np.testing.assert_array_equal(real, np.flatnonzero(expected))
            assert (row[len(real) :] == -1).all()


def test_random_blocks_of_queries_that_begin_at_different_places() -> None:
    pattern, offsets = patterns.Random(2, 0), np.asarray([[0, 3], [5, 1], [7, 7]])
    whole = pattern.table(4, 12, q_offset=offsets)
    for at in np.ndindex(offsets.shape):
        alone = pattern.table(4, 12, q_offset=int(offsets[at]))
        np.testing.assert_array_equal(np.squeeze(whole[at]), alone)
