"""The schedule for NumPy: its short cuts give the same, and let nothing through."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from lanes import close
from tolerance import C, eps, output_error

from arrattn import attention, set_num_threads
from arrattn._core.jobs import at_once
from arrattn.patterns import Strided, Where, Window
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


def test_strict_floating_point_errors_of_the_caller_are_not_ours() -> None:
    with np.errstate(all="raise"):
        for n in (8, 600):
            q, k, v = standard_normal(n)
            attention(q * 100, k, v)


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
