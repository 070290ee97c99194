"""
How much a call does on NumPy, counted: a mistake that costs only time is a mistake, too.

Products, exponentials and what is gathered are counted where NumPy does them, on one thread, and
held against what the family is documented to cost, by the shapes and the sizes that the schedules
are made of. No clock is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import array_api_compat.numpy as compat_numpy
import numpy as np
import pytest
from lanes import close
from softmax import in_rows
from tolerance import output_error

from arrattn import (
    attention,
    delta_attention,
    dense,
    feature_maps,
    linear_attention,
    local_attention,
    set_num_threads,
    sparse_attention,
)
from arrattn._core import (
    decay,
    few,
    gated,
    grouped,
    plan,
    routing,
    select,
    sparse_jobs,
    streams,
    strips,
    threads,
    workspace,
)
from arrattn.patterns import Blocks, Causal, Global, Random, Rectangles, Segments, Window, _random


@dataclass
class Work:
    """What was done: multiplications, exponentials, numbers gathered; and what stood out."""

    products: int = 0
    exps: int = 0
    taken: int = 0
    lowest: float = 0.0  # exponent
    stable: set[str] = field(default_factory=set)  # dtypes that were sorted in order
    wide: set[str] = field(default_factory=set)  # functions that made or took float64


MAKERS = (
    *("empty", "zeros", "ones", "full"),
    *("matmul", "exp2", "exp", "log", "divide", "multiply", "partition"),
)


@contextmanager
def counted() -> Iterator[Work]:
    """Count what NumPy does in this block, on the calling thread alone."""
    work = Work()

    def notes(name: str, was: Any) -> Any:
        def function(*args: Any, **options: Any) -> Any:
            if name == "exp2" and args[0].shape[-1] > 1 and args[0].size:  # scores, not factors
                work.lowest = min(work.lowest, float(np.min(args[0])))
            if name == "argsort" and options.get("kind") == "stable":
                work.stable.add(str(args[0].dtype))
            result = was(*args, **options)
            if name == "matmul":
                work.products += result.size * args[0].shape[-1]
            elif name in ("exp2", "exp"):
                work.exps += result.size
            elif name == "take":
                work.taken += result.size
            held = (x for x in (result, *args) if isinstance(x, np.ndarray) and x.ndim)
            if name in (*MAKERS, "work_space") and any(x.dtype == np.float64 for x in held):
                work.wide.add(name)
            return result

        return function

    with pytest.MonkeyPatch.context() as patch, set_num_threads(1):
        for name in (*MAKERS, "take", "argsort"):
            noted = notes(name, getattr(np, name))
            for module in (np, compat_numpy):
                patch.setattr(module, name, noted)
        patch.setattr(workspace, "work_space", notes("work_space", workspace.work_space))
        yield work


def qkv(n: int, m: int | None = None, *, h: int = 1, g: int = 1, d: int = 8, dv: int = 24) -> Any:
    """Of shapes that tell their axes apart, with small scores."""
    rng = np.random.default_rng(0)
    m = n if m is None else m
    shapes = [(h * g, n, d), (h, m, d), (h, m, dv)]
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def done(function: Callable[..., Any], *arrays: Any, **options: Any) -> Work:
    with counted() as work:
        function(*arrays, **options)
    return work


def per_pair(arrays: Any) -> int:
    """Multiplications of a pair: for its score, for its value, and for its row's sum."""
    return int(arrays[0].shape[-1] + arrays[2].shape[-1] + 1)


# -- Dense and local --------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1500, 700), (100, 90), (7, 5000), (1, 20000)])
@pytest.mark.parametrize(("h", "g"), [(1, 1), (2, 3)])
def test_every_pair_is_done_once(n: int, m: int, h: int, g: int) -> None:
    arrays = qkv(n, m, h=h, g=g)
    work = done(attention, *arrays)
    pairs = h * g * n * m
    # A few queries take their keys in parts, each merged by two factors of a row.
    merged = 2 * h * g * n * -(-m // few.PART) if g * n <= few.ROWS else 0
    assert work.exps == pairs + merged
    assert work.products == pairs * per_pair(arrays)


@pytest.mark.parametrize("n", [40, 64, 100])
def test_every_pair_of_many_items_is_done_once(n: int) -> None:
    q, k, v = (np.broadcast_to(x, (100, *x.shape)).copy() for x in qkv(n, h=4, g=2))
    for options in ({}, {"is_causal": True}):
        assert done(attention, q, k, v, **options).products == 100 * 8 * n * n * per_pair((q, k, v))


def test_a_bare_call_of_few_numbers_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    short = attention(*qkv(16, h=2))
    monkeypatch.setattr(dense, "read_softmax", refuse)
    np.testing.assert_array_equal(attention(*qkv(16, h=2)), short)
    with pytest.raises(AssertionError):
        attention(*qkv(16, h=2), engine="tiles")


@pytest.mark.parametrize(("n", "m"), [(2048, 2048), (1500, 2100), (300, 300)])
def test_causal_order_costs_what_it_shows_and_the_tiles_along_the_diagonal(n: int, m: int) -> None:
    arrays = qkv(n, m)
    work = done(attention, *arrays, is_causal=True)
    shown = sum(range(m - n + 1, m + 1))
    assert shown <= work.exps <= shown + n * (strips.STEP + strips.GRAIN)
    assert work.products == work.exps * per_pair(arrays)


def test_what_lies_behind_a_length_costs_nothing() -> None:
    q, k, v = (np.stack([x, x]) for x in qkv(600, 900))
    lengths = np.array([333, 801])
    work = done(attention, q, k, v, kv_lengths=lengths)
    assert work.exps == 600 * lengths.sum()
    assert work.products == work.exps * per_pair((q, k, v))


@pytest.mark.parametrize(("left", "right"), [(16, 0), (40, 20), (300, 0), (255, 256)])
@pytest.mark.parametrize("g", [1, 3])
def test_a_window_costs_itself_and_the_corners_of_its_tiles(left: int, right: int, g: int) -> None:
    n, width = 4000, left + right + 1
    arrays = qkv(n, g=g)
    work = done(local_attention, *arrays, window=(left, right))
    # Rows of a tile: as few as make an eighth of the window, or the fewest that there are.
    rows = min(x for x in strips.BAND_ROWS if 8 * x >= width - 1)
    assert work.exps <= g * n * (width + rows - 1)
    assert work.products <= work.exps * per_pair(arrays)


def test_documents_cost_what_they_are() -> None:
    arrays, ids = qkv(3000), np.repeat(np.arange(6), 500)
    work = done(attention, *arrays, segment_ids=ids)
    assert work.products == 6 * 500 * 500 * per_pair(arrays)
    assert work.exps - 6 * 500 * 500 <= 2 * 3000  # merging what is left over of a document's tiles


@pytest.mark.parametrize("size", [64, 128, 256])
def test_blocks_of_a_table_cost_no_more_than_one_by_one(size: int) -> None:
    arrays, many = qkv(4096), 4096 // size
    table = np.eye(many, dtype=bool) | np.eye(many, k=3, dtype=bool)
    work = done(attention, *arrays, pattern=Blocks(table, size))
    assert work.exps <= table.sum() * (size * size + plan.RUN_OVERHEAD)


def test_rows_whose_largest_scores_come_first_are_done_once() -> None:
    q, k, v = qkv(1000)
    q, k[:, :256] = q * 40, k[:, :256] * 4
    work = done(attention, q, k, v)
    # What is taken off the scores is one more column of them.
    assert work.products == 1000 * 1000 * (per_pair((q, k, v)) + 1)


@pytest.mark.parametrize(("apart", "times"), [(100, 1.1), (2, 2.0)])
def test_of_rows_whose_scores_grow_late_only_few_are_done_again(apart: int, times: float) -> None:
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 1024, 16), dtype=np.float32)
    k[:, 512:] *= 5
    q[:, ::apart] *= 300
    with set_num_threads(1), counted() as work:
        attention(q, k, v)
    assert times - 0.5 <= work.exps / 1024**2 <= times


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"kv_lengths": 1990}])
def test_products_read_what_begins_with_cache_lines_and_fills_the_cache_evenly(
    options: dict[str, Any],
    layout: str,
    times: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workspace, "unpacked", lambda: 10**6)
    read, do = [], workspace.small_products

    def note(a: Any, b: Any, *, out: Any) -> Any:
        read.append((b.__array_interface__["data"][0], *b.strides[-2:]))
        return do(a, b, out=out)

    monkeypatch.setattr(workspace, "small_products", note)
    rng = np.random.default_rng(0)
    room = rng.standard_normal(3 * 2 * 2048 * 64 + 64, dtype=np.float32)
    first = -room.ctypes.data // 4 % 16 + 5  # between two lines
    x = room[first : first + 3 * 2 * 2048 * 64]
    if layout == "heads first":
        q, k, v = x.reshape(3, 2, 2048, 64)
    else:
        q, k, v = x.reshape(3, 2048, 2, 64).swapaxes(1, 2)
    attention(q * np.float32(times), k, v, **options)
    assert read
    for address, apart, step in read:
        assert step == 4
        assert address % 64 == 0
        assert apart // 64 % 2 == 1 or apart <= 512


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 1), (7,), (2, 64, 256)])
def test_arrays_that_are_laid_out_hold_the_same(shape: tuple[int, ...], dtype: str) -> None:
    x = np.random.default_rng(0).standard_normal((*shape, 2)).astype(dtype)[..., 0]
    there = workspace.laid_out(x, "tests")
    np.testing.assert_array_equal(there, x)
    assert there.ctypes.data % 64 == 0
    assert workspace.laid_out(there, "tests") is there
    apart = workspace.spread_rows("tests apart", shape, dtype)
    assert apart.shape == shape
    assert apart.ctypes.data % 64 == 0
    assert len(shape) < 2 or apart.strides[-2] // 64 % 2 == 1


def test_positions_that_all_see_cost_themselves() -> None:
    arrays, n = qkv(4096), 4096
    bare, more = (
        done(attention, *arrays, pattern=x).exps
        for x in (Window(32, 32), Window(32, 32) | Global(4))
    )
    assert more - bare <= 2 * 4 * n


def test_a_pattern_is_asked_only_where_it_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    was = Segments.visible

    def visible(self: Segments, pairs: Any) -> Any:
        asked.append(np.broadcast(pairs.p, pairs.j).size)
        return was(self, pairs)

    monkeypatch.setattr(Segments, "visible", visible)
    n = 1500
    one, two = np.zeros(n, int), np.arange(n) // 700
    attention(*qkv(n), pattern=Causal() & Segments(one, one))
    assert not asked
    attention(*qkv(n), pattern=Causal() & Segments(two, two))
    assert not asked  # tiles begin where documents do


def test_keys_drawn_one_by_one_are_not_looked_at_where_there_surely_are_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[int] = []
    was = _random._table
    monkeypatch.setattr(_random, "_table", lambda x, c: (looked.append(c), was(x, c))[1])
    place = Rectangles(*(np.array([[x]]) for x in (0, 500, 0, 500, 0, 256)))
    some, every = Random(16, 0, keys=2000).rectangles(place)
    assert (bool(some), bool(every), looked) == (True, False, [])
    assert bool(Random(16, 0, size=2, keys=2000).rectangles(place)[0])
    assert looked


def test_small_calls_wake_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(workers: int) -> Any:
        raise AssertionError(workers)

    monkeypatch.setattr(threads, "_pool", refuse)
    with set_num_threads(2):
        for n, m in ((16, 16), (8, 1000), (2, 1500)):
            attention(*qkv(n, m, h=2))
            attention(*qkv(n, m, h=2), is_causal=True, return_lse=True)
        linear_attention(*qkv(16, h=2), is_causal=True)
        with pytest.raises(AssertionError):
            attention(*qkv(1000))


# -- Sparse -----------------------------------------------------------------------------------


def routed(arrays: Any, b: int, chosen: int, pooled: int, *, rows: int = 0) -> int:
    """Multiplications at most: of blocks' sums and scores, of own blocks and those chosen."""
    (h, n, d), m = arrays[0].shape, arrays[1].shape[-2]
    blocks, rows = -(-m // b), rows or n
    sums, scores = arrays[1].size // d * (d + 1), h * rows // pooled * blocks * d
    pairs = h * n * (1 + chosen) * b
    parts = 0 if pooled > 1 else h * n * chosen * (arrays[2].shape[-1] + 1)
    return sums + scores + pairs * per_pair(arrays) + parts


@pytest.mark.parametrize("g", [1, 3])
@pytest.mark.parametrize(("per", "b"), [("query", 32), ("block", 32), ("block", 64)])
def test_blocks_cost_themselves_and_the_search(per: str, b: int, g: int) -> None:
    n, top_k = 2048, 3
    arrays = qkv(n, g=g)
    how = {"block_size": b, "top_k": top_k, "select": "blocks", "per": per}
    work = done(sparse_attention, *arrays, **how)
    assert work.exps == g * n * (1 + top_k) * b
    assert work.products <= routed(arrays, b, top_k, b if per == "block" else 1)
    ordered = done(sparse_attention, *arrays, is_causal=True, **how)
    assert ordered.exps <= work.exps
    assert ordered.products <= work.products


def test_keys_of_a_few_blocks_cost_these_blocks() -> None:
    n, b, route = 2048, 32, 4
    arrays = qkv(n)
    work = done(sparse_attention, *arrays, block_size=b, top_k=20, route=route)
    assert work.exps == n * (1 + route) * b
    assert work.products <= routed(arrays, b, route, 1)


def test_keys_of_all_cost_their_scores_and_no_more_than_the_best() -> None:
    n, b, top_k = 2048, 32, 20
    arrays = qkv(n)
    d, dv = arrays[0].shape[-1], arrays[2].shape[-1]
    work = done(sparse_attention, *arrays, block_size=b, top_k=top_k, route=None)
    assert work.exps == n * (b + top_k)
    assert work.products == n * n * d + n * b * per_pair(arrays) + n * top_k * (dv + 1)
    assert work.taken == n * top_k * dv


def test_bounds_spare_blocks_that_hold_none_of_the_best() -> None:
    n, b, top_k = 2048, 32, 20
    q, k, v = qkv(n)
    k[:, 64:] *= np.float32(1e-3)
    options = {"block_size": b, "top_k": top_k, "route": None}
    whole = done(sparse_attention, q, k, v, **options).products
    spared = done(sparse_attention, q, k, v, score="bound", **options).products
    guides = n * (n // b) * 2 * q.shape[-1]
    assert spared <= whole / 2 + guides


CALLS: dict[str, Callable[..., Any]] = {
    "full": attention,
    "causal": partial(attention, is_causal=True),
    "lse": partial(attention, is_causal=True, return_lse=True),
    "window": partial(attention, window=(30, 3)),
    "sparse keys": partial(sparse_attention, is_causal=True, block_size=32, top_k=9, route=3),
    "sparse blocks": partial(
        sparse_attention, is_causal=True, block_size=32, top_k=3, select="blocks"
    ),
    "sparse blocks in a window": partial(
        sparse_attention, window=(75, 0), block_size=32, top_k=3, select="blocks"
    ),
    "blocks of blocks": partial(
        sparse_attention, block_size=32, top_k=3, select="blocks", per="block"
    ),
    "among all": partial(sparse_attention, is_causal=True, block_size=32, top_k=9, route=None),
    "by bounds": partial(sparse_attention, block_size=32, top_k=9, route=None, score="bound"),
}


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("name", CALLS)
def test_no_exponential_is_of_a_number_that_underflows(name: str, times: float) -> None:
    # NumPy takes many times as long for those.
    q, k, v = qkv(600)
    work = done(CALLS[name], q * np.float32(times), k, v)
    assert work.exps
    assert work.lowest >= np.finfo(np.float32).minexp


WIDTHS: dict[str, Callable[..., Any]] = CALLS | {
    "selection": partial(sparse_attention, block_size=32, top_k=3, return_selection=True),
    "by tiles": partial(sparse_attention, block_size=32, top_k=3, softcap=9.0),
    "linear": linear_attention,
    "linear causal": partial(linear_attention, is_causal=True),
    "linear of second order": partial(linear_attention, feature_map=feature_maps.taylor2),
    "linear sums": partial(linear_attention, is_causal=True, normalize=False),
    "decay": partial(
        linear_attention, is_causal=True, log_decay=np.full((1, 600), -0.1, np.float32)
    ),
    "delta": partial(delta_attention, beta=np.full((1, 600), 0.5, np.float32)),
}


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("name", WIDTHS)
def test_nothing_is_held_in_a_wider_dtype(name: str, times: float) -> None:
    q, k, v = qkv(600)
    assert done(WIDTHS[name], q * np.float32(times), k, v).wide == set()


def test_blocks_are_scored_by_all_heads_of_a_group_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    was = routing.group_matmul

    def group_matmul(q: Any, *args: Any, **options: Any) -> Any:
        rows.append(q.shape[-3])
        return was(q, *args, **options)

    monkeypatch.setattr(routing, "group_matmul", group_matmul)
    sparse_attention(*qkv(600, g=3), block_size=32, top_k=3, softcap=9.0)
    assert set(rows) == {3}


def test_few_blocks_and_rows_are_sorted_as_short_numbers() -> None:
    # Those are what NumPy sorts in one pass over each byte.
    for name in ("sparse keys", "sparse blocks", "among all", "by bounds"):
        assert done(CALLS[name], *qkv(600)).stable <= {"int16"}


def test_what_a_head_sees_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def classify(*args: Any) -> Any:
        asked.append(args[0])
        return plan.classify(*args)

    monkeypatch.setattr(sparse_jobs, "classify", classify)
    options = {"is_causal": True, "block_size": 32, "top_k": 3}
    sparse_attention(*qkv(600, h=2), **options)
    assert len(asked) == 2
    sparse_attention(*qkv(600, h=2), **options, always=Window(3, 0))
    assert len(asked) == 2 + 4


def test_where_keys_seen_are_a_span_no_pair_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError(args)

    monkeypatch.setattr(routing, "elsewhere", refuse)
    options: dict[str, Any] = {"block_size": 32, "top_k": 3, "route": 3}
    for sight in ({"is_causal": True}, {"window": (50, 0)}, {"kv_lengths": 501}):
        sparse_attention(*qkv(600), **options, **sight)
        sparse_attention(*qkv(600), **options, **sight, always=Window(3, 0))


@pytest.mark.parametrize("offset", [0, 10, 12, 13, 15, 16, 40])
def test_only_queries_behind_the_keys_of_a_block_are_left_to_tiles(
    offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    was = select._in_tiles

    def in_tiles(call: Any, *args: Any, **options: Any) -> Any:
        taken.append(call)
        return was(call, *args, **options)

    monkeypatch.setattr(select, "_in_tiles", in_tiles)
    sparse_attention(*qkv(3, 13), block_size=4, top_k=2, q_offset=offset)  # keys end within a block
    assert bool(taken) == any(13 <= p < 16 for p in range(offset, offset + 3))


# -- Sizes -----------------------------------------------------------------------------------


DECAY = {"is_causal": True, "log_decay": np.full((1, 300), -0.1)}
SPARSE: dict[str, Any] = {"block_size": 20, "top_k": 9, "route": 3, "is_causal": True}
#: The functions that mutation testing leaves out, sizes that they may give, and who asks for them.
SIZES: dict[str, tuple[Any, str, list[Any], Callable[..., Any]]] = {
    "tiles": (strips, "choose_tile", [(1, 7), (100, 3), (999, 999)], CALLS["causal"]),
    "pairs": (strips, "_pairs_at_once", [0, 1, 5000, 1 << 40], CALLS["causal"]),
    "steps": (strips, "_cost_of_runs", [-1, 1], CALLS["causal"]),
    "rows": (select, "rows_at_once", [1, 7, 999], partial(sparse_attention, softcap=9.0, **SPARSE)),
    "pairs of a block": (
        grouped,
        "_chunk_size",
        [1, 5, 999],
        partial(in_rows(50), per="query", **SPARSE),
    ),
    "chunks": (gated, "_chunks_at_once", [1, 3, 999], partial(linear_attention, **DECAY)),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_decide_how_much_is_done_at_once_and_nothing_else(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function, sizes, call = SIZES[name]
    arrays = [x.astype(np.float64) for x in qkv(300)]
    expected = call(*arrays)
    asked: list[str] = []
    for size in sizes:

        def give(*args: Any, size: Any = size, **options: Any) -> Any:
            asked.append(name)
            return size * len(args[-1]) if function == "_cost_of_runs" else size

        monkeypatch.setattr(module, function, give)
        strips._cut_known.cache_clear()
        got = call(*arrays)
        monkeypatch.undo()
        close(got, expected, within=2 * output_error(*arrays, dtype="float64"))
    strips._cut_known.cache_clear()
    assert asked


# -- Linear -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2048, 2048), (500, 3000), (1500, 700)])
@pytest.mark.parametrize("g", [1, 3])
def test_linear_attention_reads_each_token_once(n: int, m: int, g: int) -> None:
    arrays = qkv(n, m, g=g)
    d, dv = arrays[0].shape[-1], arrays[2].shape[-1]
    work = done(linear_attention, *arrays, feature_map=feature_maps.relu)
    # The features' sums, with values and without, and whether all keys are finite.
    assert work.products == (m + g * n) * d * (dv + 1) + m * d


@pytest.mark.parametrize(("n", "m"), [(2048, 2048), (500, 3000), (1500, 700)])
@pytest.mark.parametrize("g", [1, 3])
def test_causal_linear_attention_costs_its_chunks_beside(n: int, m: int, g: int) -> None:
    arrays = qkv(n, m, g=g)
    d, dv = arrays[0].shape[-1], arrays[2].shape[-1]
    work = done(linear_attention, *arrays, is_causal=True, feature_map=feature_maps.relu)
    chunk = 64
    within = g * min(n, m) * chunk * (d + dv + 1)
    assert work.products <= (m + g * n) * d * (dv + 1) + m * d + within


@pytest.mark.parametrize("delta", [False, True])
def test_decay_by_feature_halves_a_chunk_once(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    was = decay.products

    def products(rows: Any, keys: Any, *args: Any) -> Any:
        calls.append(keys.shape[-2])
        return was(rows, keys, *args)

    monkeypatch.setattr(decay, "products", products)
    n = gated.CHUNK
    q, k, v = qkv(n)
    steps = np.full((1, n, 8), -0.1, np.float32)
    if delta:
        delta_attention(q, k / 4, v, beta=np.full((1, n), 0.5, np.float32), log_decay=steps)
    else:
        linear_attention(q, k, v, is_causal=True, log_decay=steps, normalize=False)
    assert calls == [n >> i for i in range(n.bit_length())]


MAPS = {
    "elu_plus_one": feature_maps.elu_plus_one,
    "relu": feature_maps.relu,
    "identity": None,
    "exp": feature_maps.exp,
    "softmax_features": feature_maps.softmax_features,
    "taylor2": feature_maps.taylor2,
    "softmax": feature_maps.softmax(dim=8, num_features=16, rng=0),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trigonometric"])
def test_random_weights_are_made_once_for_a_call(
    features: Any, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    phi = feature_maps.softmax(dim=8, num_features=16, rng=0, features=features)
    made: list[int] = []
    was = type(phi).weights

    def weights(self: Any, *args: Any) -> Any:
        made.append(1)
        return was(self, *args)

    monkeypatch.setattr(type(phi), "weights", weights)
    counts = []
    for n in (50, 3000):
        q, k, v = qkv(n)
        linear_attention(q / 4, k / 4, v, is_causal=causal, feature_map=phi)
        counts.append(len(made))
    assert counts[1] == 2 * counts[0]


def streamed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many queries and keys each job of `streams` does, as they are done."""
    found: list[tuple[int, int]] = []
    was = streams.run

    def run(*args: Any) -> Any:
        found.append((result := was(*args))[:2])
        return result

    monkeypatch.setattr(streams, "run", run)
    return found


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_calm_tokens_are_all_streamed(
    name: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = streamed(monkeypatch)
    # Where weights carry logarithms, queries before the first key are too little to divide by.
    longer = () if causal and name in ("exp", "softmax") else ((300, 170), (300, 1))
    for n, m in ((300, 300), (170, 300), (1, 300), *longer):
        q, k, v = qkv(n, m)
        linear_attention(q / 4, k / 4, v, is_causal=causal, feature_map=MAPS[name])
        assert found.pop() == (n, m)


def test_blocks_of_dask_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    da = pytest.importorskip("dask.array")
    found = streamed(monkeypatch)
    linear_attention(*map(da.from_array, qkv(300)), is_causal=True).compute()
    assert found == [(300, 300)]
