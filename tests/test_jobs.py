"""The schedule for NumPy: its short cuts give the same, and let nothing through."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from lanes import close
from tolerance import C, eps, largest, output_error, score_error

from arrattn import (
    attention,
    delta_attention,
    linear_attention,
    local_attention,
    set_num_threads,
    sparse_attention,
)
from arrattn._core import few, gather, jobs, small_heads, strips, threads, workspace
from arrattn._core.inputs import read_softmax
from arrattn._core.small_heads import at_once
from arrattn.patterns import (
    Blocks,
    Causal,
    Dilated,
    Fixed,
    Global,
    Pattern,
    Prefix,
    Random,
    Segments,
    Strided,
    Where,
    Window,
)
from arrattn.reference import softmax_attention


@pytest.mark.parametrize("shape", [(1, 16, 8), (2, 3, 30, 4), (3, 1, 5, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_small_call_is_the_same_bits_by_the_short_path_and_through_the_door(
    shape: tuple[int, ...], dtype: str
) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=shape).astype(dtype) for _ in range(3))
    assert at_once(q, k, v) is not None
    np.testing.assert_array_equal(attention(q, k, v), attention(q, k, v, return_lse=True)[0])


def test_the_short_path_takes_only_what_is_plainly_right() -> None:
    x = np.ones((2, 4, 3), np.float32)
    wide, long, other = np.ones((2, 4, 5), np.float32), x[:, :2], x.astype(np.float64)
    assert at_once(x, x, wide) is not None
    assert at_once(x[:, :1], x, x) is not None
    for q, k, v in [
        (x, wide, x),
        (x, long, x),
        (x, x, long),
        (x, x[:1], x[:1]),
        (x, x, other),
        (x[0], x[0], x[0]),
        (x[:, :0], x, x),
        (x, x[:, :0], x[:, :0]),
        (x.astype(np.int64),) * 3,
        (x.astype(np.float16),) * 3,
        (x.tolist(), x, x),
        (x, np.where(x > 0, np.nan, x), x),
        (x, np.full_like(x, -np.inf), x),
    ]:
        assert at_once(q, k, v) is None


def standard_normal(n: int, m: int | None = None, *, heads: int = 1, d: int = 16) -> Any:
    rng = np.random.default_rng(0)
    shapes = [(heads, n, d), (heads, m or n, d), (heads, m or n, d)]
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


@pytest.mark.parametrize("scale", [0.0, 1e-30, None])
@pytest.mark.parametrize(
    ("times_q", "times_k"), [(0, 1), (1e-10, 1e13), (1e-25, 3e27), (4, 40), (1, 12)]
)
def test_what_hidden_keys_hold_changes_no_bit(
    scale: float | None, times_q: float, times_k: float
) -> None:
    q, k, v = standard_normal(1100)
    q *= np.float32(times_q)
    k *= np.float32(times_k)
    clean = attention(q, k, v, is_causal=True, scale=scale, return_lse=True)
    for what in (np.nan, np.inf, 1e38, 3e3, 1e-40, 0):
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, 1000:], dirty_v[:, 1010:] = what, what
        dirty = attention(q, dirty_k, dirty_v, is_causal=True, scale=scale, return_lse=True)
        for x, y in zip(clean, dirty, strict=True):
            np.testing.assert_array_equal(x[:, :1000], y[:, :1000])


@pytest.mark.parametrize("n", [2, 3, 8, 40])
def test_what_hidden_keys_hold_changes_no_bit_of_a_few_rows(n: int) -> None:
    for options in ({"is_causal": True}, {"window": (40, 0)}):
        q, k, v = standard_normal(n, 1500)
        clean = attention(q, k, v, **options)
        for x in (k, v):
            x[:, -1] = np.inf
            np.testing.assert_array_equal(attention(q, k, v, **options)[:, :-1], clean[:, :-1])


@pytest.mark.parametrize("what", [np.nan, np.inf, 1e6])
def test_what_hidden_keys_hold_changes_no_bit_of_the_bands_beside(what: float) -> None:
    q, k, v = standard_normal(1100)
    clean = attention(q, k, v, window=(40, 20))
    k[:, 500] = what
    dirty = attention(q, k, v, window=(40, 20))
    blind = np.abs(np.arange(1100) - 510) > 30
    np.testing.assert_array_equal(dirty[:, blind], clean[:, blind])


@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_grow_from_tile_to_tile(*, causal: bool) -> None:
    q, k, v = standard_normal(1500)
    q *= 30
    k *= np.linspace(1, 20, 1500, dtype=np.float32)[None, :, None]
    clean = attention(q, k, v, is_causal=causal, return_lse=True)
    expected = softmax_attention(
        *(x.astype(np.float64) for x in (q, k, v)), is_causal=causal, return_lse=True
    )
    # Scores are in the thousands: what float32 rounds of them shows.
    np.testing.assert_allclose(clean[0], expected[0], atol=5e-3)
    np.testing.assert_allclose(clean[1], expected[1], rtol=1e-5)


@pytest.mark.parametrize(("times_q", "times_k"), [(1e-25, 3e27), (3e27, 1e-25), (0, 3e30)])
def test_norms_that_leave_float32_on_the_way(times_q: float, times_k: float) -> None:
    q, k, v = standard_normal(600)
    q, k = q * np.float32(times_q), k * np.float32(times_k)
    out, lse = attention(q, k, v, return_lse=True)
    expected = softmax_attention(*(x.astype(np.float64) for x in (q, k, v)), return_lse=True)
    # The scores are in the hundreds: what float32 rounds of them shows.
    np.testing.assert_allclose(out, expected[0], atol=2e-3)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-4, atol=1e-4)


def test_zero_queries_and_a_key_that_is_nan() -> None:
    q, k, v = standard_normal(600)
    k[:, 3] = np.nan
    assert np.isnan(attention(q * 0, k, v)).all()


def test_a_tile_in_which_no_group_of_rows_sees_any_key() -> None:
    pattern = Strided(190) & Window(63, 63) & ~Window(0, 0)
    q, k, v = standard_normal(512, 300)
    out = attention(q, k, v, pattern=pattern, q_offset=333)
    expected = softmax_attention(q, k, v, pattern=pattern, q_offset=333)
    np.testing.assert_allclose(out, expected, atol=1e-5)


#: Bands, and beside them: first positions, a prefix, blocks, rules, documents; few or many rows.
BESIDE = [
    Window(20, 20) | Global(4),
    Window(256, 0) | Global(100),
    Causal() & (Window(30, 0) | Global(4)),
    Causal() & (Window(30, 0) | Strided(30)),
    Window(64, 0) & Strided(4),
    Window(5, 5) | Random(3, 0, size=64) | Global(2),
    Window(30, 30) | Prefix(50),
    Causal() & Fixed(64, 4),
    Causal() & Fixed(128, 1),
    Window(30, 3) | Where(lambda p, j: (p * j) % 97 == 0),
    Window(3, 3) | ~Window(500, 500),
    Dilated(5, 10, 10) | Blocks(np.eye(4, dtype=bool), 100),
    Window(10, 10) & ~Window(0, 0),
]


@pytest.mark.parametrize("pattern", BESIDE, ids=str)
@pytest.mark.parametrize(
    ("nq", "nk", "offset", "heads"),
    [(1000, 1000, 0, 1), (700, 1000, 300, 3), (600, 800, -30, 1), (900, 700, 50, 2)],
)
def test_a_band_and_what_is_seen_beside_it(
    pattern: Pattern, nq: int, nk: int, offset: int, heads: int
) -> None:
    q, k, v = standard_normal(nq, nk)
    q = np.concatenate([q * 30, q, q * 0][:heads])  # scores in the hundreds too
    got = attention(q, k, v, pattern=pattern, q_offset=offset, return_lse=True)
    table = pattern.table(nq, nk, q_offset=offset)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    expected = attention(*wide, mask=table, engine="tiles", return_lse=True)
    close(got[0], expected[0], within=output_error(*wide, dtype="float32"))
    within = score_error(*wide[:2], dtype="float32") + eps("float32") * largest(expected[1])
    close(got[1], expected[1], within=within)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [3, 70, 400])
def test_documents_side_by_side(causal: bool, size: int) -> None:
    q, k, v = standard_normal(1000, heads=2)
    ids = np.sort(np.random.default_rng(1).integers(0, 1000 // size, size=1000))
    got = attention(q, k, v, segment_ids=ids, is_causal=causal)
    for each in np.unique(ids):
        own = [x[:, ids == each] for x in (q, k, v)]
        expected = attention(*own, is_causal=causal)
        close(got[:, ids == each], expected, within=output_error(*own, dtype="float32"))


def test_documents_side_by_side_look_only_at_their_own_keys() -> None:
    ids = np.repeat(np.arange(8), 500)
    found = strips._cut(Segments(ids, ids), 1, 4000, 4000, 0, None, True).strips
    assert sum(strip.cost for strip in found) == 8 * 500 * 500
    assert not any(run.hide for strip in found for run in strip.runs)


@pytest.mark.parametrize(("n", "at"), [(2048, 0), (2000, 0), (700, 1300), (512, -100)])
def test_hardly_more_than_what_causal_order_shows_is_computed(n: int, at: int) -> None:
    pattern = Causal()
    found = strips._cut(pattern, 1, n, n + max(at, 0), at, None, True).strips
    rows = [
        (strips.rows_that_see(pattern, strip.i0, at, strip.rows, run)[0], run)
        for strip in found
        for run in strip.runs
    ]
    looked = sum((stop - first) * (run.j1 - run.j0) for (first, stop), run in rows)
    shown = sum(max(0, i + at + 1) for i in range(n))
    assert shown <= looked <= shown + n * (strips.STEP + strips.GRAIN)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("size", [strips.GRAIN, 2 * strips.GRAIN, 100])
def test_rows_between_those_that_see_a_run_may_see_nothing_of_it(size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = rng.random(rng.integers(1, 6, 2)) < rng.choice([0.3, 0.7])
    n, m = table.shape[0] * size, table.shape[1] * size
    q, k, v = standard_normal(n, m, d=4)
    pattern = Blocks(table, size)
    if seed % 3 == 0:
        pattern = pattern & Causal()
    out, lse = attention(q, k, v, pattern=pattern, q_offset=0, return_lse=True)
    expected = softmax_attention(q, k, v, pattern=pattern, q_offset=0, return_lse=True)
    close(out, expected[0], within=output_error(q, k, v, dtype="float32"))
    within = score_error(q, k, dtype="float32") + eps("float32") * largest(expected[1])
    close(lse, expected[1], within=within)


def test_a_pattern_that_shows_some_of_everything_is_not_cut_into_steps() -> None:
    (strip,) = strips._cut(Strided(2), 1, 256, 512, 0, None, True).strips
    assert len(strip.runs) == 1


@pytest.mark.parametrize("costs", [[0, 0], [9, 0, 1], [jobs.BUNDLE + 1, 1, jobs.BUNDLE], []])
def test_every_job_is_in_one_bundle_and_no_bundle_is_large(costs: list[int]) -> None:
    done: list[int] = []
    bundles = jobs._bundled([(cost, lambda i=i: done.append(i)) for i, cost in enumerate(costs)])
    for bundle in bundles:
        before = len(done)
        bundle()
        own = [costs[i] for i in done[before:]]
        assert len(own) == 1 or sum(own) <= jobs.BUNDLE
    assert sorted(done) == list(range(len(costs)))


@pytest.mark.parametrize("width", [16, 256])
def test_global_positions_beside_a_window_cost_what_they_see(width: int) -> None:
    n = 8192
    bare, more = (
        sum(strip.cost for strip in strips._cut(pattern, 1, n, n, 0, None, True).strips)
        for pattern in (Window(width, width), Window(width, width) | Global(4))
    )
    assert more - bare <= 2 * 4 * n


def test_what_hidden_keys_hold_beside_a_band_changes_no_bit() -> None:
    pattern = Causal() & (Window(40, 0) | Global(4) | Random(2, 0, size=64))
    q, k, v = standard_normal(1500)
    clean = attention(q, k, v, pattern=pattern)
    for what in (np.nan, np.inf, 1e38):
        dirty_k, dirty_v = k.copy(), v.copy()
        dirty_k[:, 1300:], dirty_v[:, 1310:] = what, what
        dirty = attention(q, dirty_k, dirty_v, pattern=pattern)
        np.testing.assert_array_equal(dirty[:, :1300], clean[:, :1300])
    k[:, 2] = np.nan  # seen by all from its own position on
    assert (
        np.isnan(attention(q, k, v, pattern=pattern)).all(-1)[0].tolist()
        == [False] * 2 + [True] * 1498
    )


@pytest.mark.parametrize("widths", [(4, 0), (0, 4)])
def test_few_rows_of_no_width(widths: tuple[int, int]) -> None:
    d, dv = widths
    q, k, v = np.ones((1, 1, d)), np.ones((1, 1025, d)), np.ones((1, 1025, dv))
    np.testing.assert_array_equal(attention(q, k, v), np.ones((1, 1, dv)))


def test_a_rule_may_call_an_attention_itself() -> None:
    q, k, v = standard_normal(600, heads=8)
    inner = standard_normal(300)

    def rule(p: Any, j: Any) -> Any:
        attention(*inner, is_causal=True)
        return (p - j) % 3 < 2

    expected = attention(q, k, v, pattern=Where(lambda p, j: (p - j) % 3 < 2))
    results: list[Any] = []
    callers = [
        threading.Thread(target=lambda: results.append(attention(q, k, v, pattern=Where(rule))))
        for _ in range(3)
    ]
    with set_num_threads(2):
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
    assert len(results) == 3
    for result in results:
        np.testing.assert_array_equal(result, expected)


FAMILIES: dict[str, Callable[..., Any]] = {
    "dense": attention,
    "local": partial(local_attention, window=(3, 2)),
    "sparse": sparse_attention,
    "linear": linear_attention,
    "decay": partial(linear_attention, log_decay=np.full((1, 1, 1), -700.0), is_causal=True),
    "delta": partial(delta_attention, beta=np.ones((1, 1))),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_strict_floating_point_errors_of_the_caller_are_not_ours(family: str) -> None:
    with np.errstate(all="raise"):
        for n in (8, 600):
            q, k, v = standard_normal(n)
            k[..., 1, :] = 1e-320
            v[..., 1, :] = np.inf
            FAMILIES[family](q * 100, k, v)


@pytest.mark.parametrize(
    ("batch", "k_batch", "hkv", "nk"),
    [((2, 3), (1, 3), 2, 1500), ((20,), (20,), 2, 1100), ((2,), (), 3, 9000), ((), (), 1, 2100)],
)
def test_few_queries_of_every_item_head_and_part(
    batch: tuple[int, ...], k_batch: tuple[int, ...], hkv: int, nk: int
) -> None:
    rng = np.random.default_rng(3)
    q = rng.normal(size=(*batch, 2 * hkv, 2, 4))
    k, v = rng.normal(size=(2, *k_batch, hkv, nk, 4))
    options = {"sinks": rng.normal(size=2 * hkv), "window": (None, 1), "return_lse": True}
    got = attention(q, k, v, **options)
    within = output_error(q, k, v, dtype="float64", sinks=options["sinks"])
    for x, expected in zip(got, softmax_attention(q, k, v, **options), strict=True):
        close(x, expected, within=2 * within + C * eps("float64") * np.log(nk))


@pytest.mark.parametrize("most", [0, 10**4, 10**6])
@pytest.mark.parametrize(
    ("n", "k", "m"), [(1, 64, 128), (128, 64, 128), (300, 64, 250), (77, 3, 1)]
)
def test_products_of_a_few_rows_each_are_the_product(
    monkeypatch: pytest.MonkeyPatch, most: int, n: int, k: int, m: int
) -> None:
    monkeypatch.setattr(workspace, "unpacked", lambda: most)
    rng = np.random.default_rng(0)
    a = rng.integers(-9, 9, (5, 2, k, n)).astype(np.float32).swapaxes(-1, -2)
    b = rng.integers(-9, 9, (5, 1, k, m)).astype(np.float32)
    space = np.full((5, n, 2, m), np.nan, np.float32)
    workspace.small_products(a, b, out=space.swapaxes(1, 2))
    np.testing.assert_array_equal(space.swapaxes(1, 2), a @ b)


@pytest.mark.parametrize("most", [10**5, 10**6])
@pytest.mark.parametrize("attend", [
    partial(attention, is_causal=True),
    partial(attention, scale=100.0),
    partial(local_attention, window=(40, 3)),
    partial(sparse_attention, is_causal=True, block_size=100, route=None),
    partial(sparse_attention, is_causal=True, block_size=100, select="blocks", top_k=2),
    partial(sparse_attention, block_size=100, select="blocks", top_k=2, per="block"),
])  # fmt: skip
def test_the_products_that_a_processor_is_fast_at_change_only_rounding(
    monkeypatch: pytest.MonkeyPatch, most: int, attend: partial[Any]
) -> None:
    q, k, v = np.random.default_rng(1).standard_normal((3, 2, 700, 16))
    monkeypatch.setattr(workspace, "unpacked", lambda: 0)
    whole = attend(q, k, v)
    monkeypatch.setattr(workspace, "unpacked", lambda: most)
    scale = attend.keywords.get("scale")
    close(attend(q, k, v), whole, within=2 * output_error(q, k, v, scale=scale, dtype="float64"))


@pytest.mark.parametrize("far", [1e10, 1e25])
def test_keys_that_are_left_to_the_fold_leave_the_others_counted_once(far: float) -> None:
    q, k, v = standard_normal(300, 400)
    v[..., 7, :] = far
    exact = [x.astype(np.float64) for x in (q, k, v)]
    within = output_error(*exact, dtype="float32")
    close(attention(q, k, v), softmax_attention(*exact), within=within)


@pytest.mark.parametrize("apart", [3, 60])
@pytest.mark.parametrize(("options", "clean"), [
    ({}, 700),
    ({"is_causal": True}, 700),
    ({"is_causal": True}, 440),
    ({"kv_lengths": 850}, 700),
    ({"pattern": Causal() & Segments(np.arange(700) // 650, np.arange(900) // 650)}, 700),
    ({"pattern": Window(30, 30) | Prefix(50)}, 700),
])  # fmt: skip
def test_rows_whose_scores_grow_late_are_brought_up_to_date(
    options: dict[str, Any], clean: int, apart: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = standard_normal(700, 900, heads=2)
    loud = np.arange(5, 700, apart)
    q[:, loud] *= np.linspace(20, 400, len(loud))[:, None]
    k[:, 550:] *= 5  # the largest scores come late
    exact = [x.astype(np.float64) for x in (q[:, :clean], k, v)]
    if clean < 700:  # what only the other rows see
        k[:, clean + 200], k[:, clean + 203], v[:, clean + 210, 3] = 1e20, np.nan, 1e35
    many = []
    lift = gather.Rows._raise

    def count(self: Any, s: Any, top: Any, at: Any, first: int) -> None:
        many.append(len(top) if self.began else 0)
        lift(self, s, top, at, first)

    monkeypatch.setattr(gather.Rows, "_raise", count)
    out, lse = attention(q, k, v, **options, return_lse=True)
    assert any(many)
    own = {"q_offset": 200} if clean < 700 else {}
    expected = softmax_attention(*exact, **options, **own, return_lse=True)
    close(out[:, :clean], expected[0], within=output_error(*exact, dtype="float32"))
    within = score_error(*exact[:2], dtype="float32") + eps("float32") * largest(expected[1])
    close(lse[:, :clean], expected[1], within=within)


@pytest.mark.parametrize("seed", range(150))
def test_what_rows_gather_is_what_they_see(seed: int) -> None:
    rng = np.random.default_rng(seed)
    t, g, n, m, d = rng.integers(1, 4), rng.integers(1, 3), 24, 40, 8
    q = rng.standard_normal((t, g, n, d), dtype=np.float32)
    q[:, :, rng.choice(n, rng.choice([2, 12]), replace=False)] *= 60
    rows = gather.Rows(q, 1.0, 5, q.dtype)
    rows.choose([np.array([gather.LARGEST])])
    ks, vs, sights = [], [], []
    for loud in (1, 1, 4, 2, 9):
        own = rng.choice([1, t])
        k = loud * rng.standard_normal((own, m, d), dtype=np.float32)
        v = rng.standard_normal((own, m, 5), dtype=np.float32)
        look, far, seen = None, None, np.ones((t, g, n, m), bool)
        if rng.random() < 0.6:
            r0, p0, p1, r1 = np.sort(rng.choice(n + 1, 4)).tolist()
            weights = rng.random((p1 - p0, m)) < 0.5
            look = gather.Look((r0, r1), (p0, p1), weights.astype(q.dtype), slice(0))
            seen[:, :, :r0] = seen[:, :, r1:] = False
            seen[:, :, p0:p1] = weights
        for arrays, x in ((ks, k), (vs, v)):
            arrays.append(np.repeat(x.astype(np.float64), t // own, axis=0)[:, None])
        if rng.random() < 0.4:
            far = rng.random((own, m)) < 0.2
            seen &= ~far[:, None, None]
            k[far], v[far] = np.nan, np.inf
        sights.append(seen)
        rows.absorb(k.mT, v, look, far)
    out, lse = np.empty((t, g, n, 5), q.dtype), np.empty((t, g, n, 1), q.dtype)
    rows.finish(out, lse)
    k, v, exact = np.concatenate(ks, axis=2), np.concatenate(vs, axis=2), q.astype(np.float64)
    s = np.where(np.concatenate(sights, axis=-1), exact @ k.mT, -np.inf)
    top = s.max(axis=-1, keepdims=True)
    p = np.exp(s - np.where(top == -np.inf, 0, top))
    total = p.sum(axis=-1, keepdims=True)
    some = np.maximum(total, np.finfo(np.float64).tiny)
    close(lse, np.where(total == 0, -np.inf, top + np.log(some)),
          within=score_error(exact, k, dtype="float32", scale=1.0))  # fmt: skip
    close(out, p @ v / some, within=output_error(exact, k, v, dtype="float32", scale=1.0))


def test_a_row_that_begins_late_takes_nothing_from_what_it_does_not_see() -> None:
    n, m, d = 24, 4, 4
    q, k = np.ones((1, 1, n, d), np.float32), np.full((1, m, d), -100, np.float32)
    rows = gather.Rows(q, 1.0, 1, q.dtype)
    rows.choose([np.array([gather.LARGEST])])
    some = gather.Look((0, n - 1), (0, 0), np.ones((0, m), q.dtype), slice(0))
    v = np.full((1, m, 1), 2.0**-38, np.float32)
    rows.absorb(k.mT, v, some, None)
    weights, far = np.ones((n, m), q.dtype), np.array([[True, False, False, False]])
    weights[:, 1], v[:, 1] = 0, 2.0**29
    rows.absorb(k.mT, v, gather.Look((0, n), (0, n), weights, slice(0)), far)
    out, lse = np.empty((1, 1, n, 1), q.dtype), np.empty((1, 1, n, 1), q.dtype)
    rows.finish(out, lse)
    seen = np.repeat([6.0, 2.0], [n - 1, 1])
    np.testing.assert_allclose(out[0, 0, :, 0], 2.0**-38, rtol=1e-6)
    np.testing.assert_allclose(lse[0, 0, :, 0], np.log(seen) - 400, rtol=1e-6)


@pytest.mark.parametrize("n", [1, 60, 200])
def test_how_many_other_rows_grow_changes_no_bit_of_a_row(n: int) -> None:
    q, k, v = standard_normal(1024, 2048)
    q[..., 0], k[..., 0] = 1, 0
    q[:, ::20] *= 15
    k[:, 1024 : 1024 + n, 0] = np.linspace(55, 65, n)  # about as far as weights may grow
    out, lse = attention(q, k, v, is_causal=True, return_lse=True)
    for size in (800, -800, 1e4):
        other = k.copy()
        other[:, 1024 + n : 1280, 0] = size  # nothing to the rows before
        changed = attention(q, other, v, is_causal=True, return_lse=True)
        np.testing.assert_array_equal(changed[0][:, :n], out[:, :n])
        np.testing.assert_array_equal(changed[1][:, :n], lse[:, :n])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponents_are_cut_where_weights_neither_count_nor_vanish(dtype: str) -> None:
    least = 2.0 ** gather.lowest(np.dtype(dtype))
    assert least * 2.0**-26 >= np.finfo(dtype).smallest_normal  # times a small value, too
    assert least * 2.0**20 < 2.0**-gather.ROOM * eps(dtype)  # a million of them beside the largest


def _one_head_loud(q: Any, k: Any, v: Any) -> None:
    q[:, 1] *= 1e3  # its scores need their maximum


def _one_key_far(q: Any, k: Any, v: Any) -> None:
    k[0, 2, 5], v[1, 0, 3] = 1e20, 1e35


def _hidden_nan(q: Any, k: Any, v: Any) -> None:
    k[:, :, -1], v[:, 0, -2:] = np.nan, np.inf


@pytest.mark.parametrize("spoil", [None, _one_head_loud, _one_key_far, _hidden_nan])
@pytest.mark.parametrize("options", [
    {},
    {"is_causal": True},
    {"kv_lengths": 158},
    {"mask": np.arange(160) < 158},
    {"mask": np.arange(160) < np.repeat([158, 100, 31, 1], 2)[:, None, None]},
    {"pattern": Global(2) | Window(30, 2), "is_causal": True},
])  # fmt: skip
def test_heads_that_a_job_does_at_once_have_the_bits_of_each_alone(
    options: dict[str, Any], spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    q = rng.standard_normal((2, 8, 160, 16), dtype=np.float32)
    k, v = rng.standard_normal((2, 2, 4, 160, 16), dtype=np.float32)
    if spoil is not None:
        spoil(q, k, v)
    heads = Counter[int]()
    was = jobs.Head.run

    def count(self: Any, strip: Any) -> None:
        heads[self.call.heads[0]] += 1
        was(self, strip)

    monkeypatch.setattr(jobs.Head, "run", count)
    with set_num_threads(1):
        out, lse = attention(q, k, v, **options, return_lse=True)
        by_head = "mask" in options and options["mask"].ndim > 1
        assert (max(heads) == 1) is by_head
        for b, h in np.ndindex(2, 4):
            at = (slice(b, b + 1), slice(2 * h, 2 * h + 2))
            alone = dict(options)
            if by_head:
                alone["mask"] = options["mask"][2 * h : 2 * h + 2]
            one = (slice(b, b + 1), slice(h, h + 1))
            o, l = attention(q[at], k[one], v[one], **alone, return_lse=True)  # noqa: E741
            np.testing.assert_array_equal(out[at], o)
            np.testing.assert_array_equal(lse[at], l)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_arrays_that_lie_otherwise_have_the_same_bits_for_any_number_of_threads(
    axis: int, dtype: str
) -> None:
    rng = np.random.default_rng(3)
    arrays = [
        np.moveaxis(np.moveaxis(rng.standard_normal((12, 160, d)), axis, -1).copy(), -1, axis)
        for d in (8, 8, 5)
    ]
    q, k, v = (x.astype(dtype) for x in arrays)
    ids = np.arange(160) // 8 % 5
    beside = Window(5, 5) | Segments(ids, ids)
    for options in ({}, {"is_causal": True}, {"window": (9, 2)}, {"pattern": beside}):
        results = []
        for n in (1, 3, 12):
            with set_num_threads(n):
                results.append(attention(q, k, v, **options, return_lse=True))
        for out, lse in results[1:]:
            np.testing.assert_array_equal(out, results[0][0])
            np.testing.assert_array_equal(lse, results[0][1])


@pytest.mark.parametrize(
    ("heads", "n", "m", "d", "workers", "together"),
    [
        (12, 256, 256, 64, 1, 4),  # as many tiles as fill the work space
        (12, 256, 256, 64, 2, 3),
        (8, 360, 360, 64, 3, 1),  # two at once would leave a thread with four heads to do
        (64, 2048, 4, 128, 1, 4),  # few keys, but as many queries: tiles of 512
        (64, 20, 2000, 64, 1, 2),  # few queries, but as many keys
    ],
)
def test_so_many_heads_are_done_at_once(
    heads: int, n: int, m: int, d: int, workers: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Counter[int]()
    monkeypatch.setattr(jobs.Head, "run", lambda self, _: seen.update([self.call.heads[0]]))
    rng = np.random.default_rng(0)
    shapes = (heads, n, d), (heads, m, d), (heads, m, d)
    with set_num_threads(workers):
        attention(*(rng.standard_normal(x, dtype=np.float32) for x in shapes))
    assert max(seen) == together


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_thread_reads_keys_for_a_few_queries(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[int] = []
    was = threads.run_jobs
    monkeypatch.setattr(
        threads, "run_jobs", lambda x, **how: (given.append(len(x)), was(x, **how))[1]
    )
    rng = np.random.default_rng(0)
    shapes = (8, 8, 1, 8), (8, 2, 4096, 8), (8, 2, 4096, 8)
    with set_num_threads(workers):
        attention(*(rng.standard_normal(x, dtype=np.float32) for x in shapes))
    assert given[0] >= workers


def test_heads_are_small_up_to_so_many_pairs_and_keys() -> None:
    for n, m, small in ((64, 64, True), (65, 64, False), (1, 512, True), (1, 513, False)):
        call = read_softmax("attention", *standard_normal(n, m))
        assert small_heads.is_small(call) is small


@pytest.mark.parametrize("batch", [(), (3,), (2, 5)])
@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 100])
def test_few_queries_of_every_head_are_done_once(batch: tuple[int, ...], lanes: int) -> None:
    times = np.zeros((*batch, 4), int)
    for at in few._boxes(batch, 4, lanes):
        assert times[at].size <= max(lanes, 1)
        times[at] += 1
    assert (times == 1).all()
