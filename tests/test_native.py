"""The library's own kernel in the place of the tiles: the same results, or a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from lanes import Lane, built, close
from laws import for_all
from softmax import as_held
from strategies import Case, cases, shapes, values
from tolerance import C, eps, largest, longest, output_error

from arrattn import attention, reference
from arrattn._core import native
from arrattn._core.inputs import read_softmax

DTYPES = st.sampled_from(("float64", "float32", "bfloat16", "float16"))


def taken(*arrays: Any, **options: Any) -> native.Fused:
    """What the library's own kernel says of this call."""
    return native.consider(read_softmax("attention", *arrays, engine="auto", **options))


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@st.composite
def one_width(draw: st.DrawFn, given: st.SearchStrategy[Case] | None = None) -> Case:
    """A case whose values are as wide as its keys: the others never reach a kernel."""
    case = draw(cases() if given is None else given)
    shape = (*case.v.shape[:-1], case.k.shape[-1])
    v = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
    return Case(case.q, case.k, v, case.options, case.how)


@st.composite
def fitting(draw: st.DrawFn) -> Case:
    """A case that torch's kernel takes, whatever it draws: one thing hidden in one way."""
    q_shape, k_shape, v_shape = draw(shapes(empty=False))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    how = draw(st.sampled_from(("plain", "tied", "zero", "large")))
    case = Case(
        values(how, q_shape, rng),
        values(how, k_shape, rng),
        rng.normal(size=(*v_shape[:-1], k_shape[-1])),
        how=f"{how} values",
    )
    (nq, nk), (hq, _), batch = case.lengths, case.heads, case.batch
    full = (*batch, hq, nq, nk)
    axes = [draw(st.booleans())] * len(batch) + [draw(st.booleans()) for _ in range(3)]
    shape = tuple(n if whole else 1 for n, whole in zip(full, axes, strict=True))
    hidden = {
        "nothing": {},
        "causal": {"is_causal": True, "q_offset": 0},
        "decoding": {"is_causal": True, "q_offset": nk - 1},
        "length": {"kv_lengths": int(rng.integers(1, nk + 1))},
        "lengths": {"kv_lengths": rng.integers(0, nk + 1, size=batch) if batch else nk},
        "mask": {"mask": rng.random(shape) < 0.6},
        "bias": {"bias": np.where(rng.random(shape) < 0.3, -np.inf, rng.normal(size=shape))},
    }
    case.options.update(hidden[draw(st.sampled_from(sorted(hidden)))])
    if np.max(case.options.get("kv_lengths", 1)) == 0:
        case.options.pop("kv_lengths")
    scale = draw(st.sampled_from((None, 0.3, 0.0, -0.5)))
    if "is_causal" not in case.options or scale is None or scale > 0:
        case.options["scale"] = scale
    return case


# -- The law: "auto" changes no result ---------------------------------------------------------


@for_all(case=one_width(), dtype=DTYPES)
def test_auto_is_the_tiles(lane: Lane, case: Case, dtype: str) -> None:
    if dtype not in lane.dtypes:
        return
    held = as_held(case, dtype)
    got, tiles = (
        lane.call(attention, *case.arrays, dtype=dtype, engine=engine, **case.options)
        for engine in ("auto", "tiles")
    )
    within = 2 * output_error(*held.arrays, dtype=dtype, **held.scores)
    lane.check(got, lane.to_numpy(tiles), dtype=dtype, within=within)


@pytest.mark.lanes("torch")  # the one library with a kernel that is used
@for_all(case=fitting(), dtype=DTYPES)
def test_the_kernel_is_within_the_contract(lane: Lane, case: Case, dtype: str) -> None:
    got = lane.call(attention, *case.arrays, dtype=dtype, engine="native", **case.options)
    held = as_held(case, dtype)
    expected = reference.softmax_attention(*held.arrays, **built(held.options, lambda x: x))
    within = output_error(*held.arrays, dtype=dtype, **held.scores)
    lane.check(got, expected, dtype=dtype, within=within)


@pytest.mark.lanes("torch")
@for_all(case=fitting(), value=st.sampled_from((np.nan, np.inf, -np.inf)), spoil=st.integers(0, 2))
def test_auto_is_the_tiles_where_values_are_not_finite(
    lane: Lane, case: Case, value: float, spoil: int
) -> None:
    arrays = [x.copy() for x in case.arrays]
    arrays[spoil][..., -1, 0] = value
    got, tiles = (
        lane.call(attention, *arrays, dtype="float32", engine=engine, **case.options)
        for engine in ("auto", "tiles")
    )
    held = as_held(case, "float32")
    within = 2 * output_error(*held.arrays, dtype="float32", **held.scores)
    got, tiles = lane.to_numpy(got), lane.to_numpy(tiles)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(tiles))
    close(np.nan_to_num(got, nan=0.0), np.nan_to_num(tiles, nan=0.0), within=within)


@pytest.mark.lanes("torch")
@for_all(case=fitting())
def test_gradients_are_those_of_the_tiles(lane: Lane, case: Case) -> None:
    results = []
    for engine in ("native", "tiles"):
        arrays = [lane.asarray(x, "float64").requires_grad_() for x in case.arrays]
        options = built(case.options, lambda x: lane.asarray(x, "float64"))
        out = attention(*arrays, engine=engine, **options)
        cotangent = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).reshape(out.shape)
        results.append(torch.autograd.grad(out, arrays, cotangent))
    q, k, v = case.arrays
    # Sums over rows and heads of products of one score's size and one value's.
    terms = q.size // q.shape[-1] * k.shape[-2]
    size = (1 + largest(q)) * (1 + largest(k)) * (1 + largest(v)) * q.shape[-1] * terms
    for got, tiles in zip(*results, strict=True):
        close(lane.to_numpy(got), lane.to_numpy(tiles), within=C * eps("float64") * size * 8)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"kv_lengths": torch.tensor([2, 5])}, {"mask": torch.eye(5) > 0}],
    ids=["plain", "causal", "lengths", "mask"],
)
def test_gradcheck(options: dict[str, Any]) -> None:
    arrays = [randn(2, h, 5, 3, seed=h).requires_grad_() for h in (4, 2, 2)]
    assert taken(*arrays, **options).reasons == ()
    assert torch.autograd.gradcheck(lambda *x: attention(*x, engine="native", **options), arrays)


# -- What is declined, and why -----------------------------------------------------------------

Q, K = randn(2, 4, 6, 8), randn(2, 2, 9, 8)
NAN = K.clone()
NAN[0, 0, 3, 2] = torch.nan
DECLINED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "lse": ((Q, K, K), {"return_lse": True}, "no log-sum-exp"),
    "sinks": ((Q, K, K), {"sinks": randn(4)}, "no sinks"),
    "softcap": ((Q, K, K), {"softcap": 3.0}, "no softcap"),
    "width": ((Q, K, K[..., :5]), {}, "one width, not 8 and 5"),
    "bottom right": ((Q, K, K), {"is_causal": True}, "the first query stands at key 3"),
    "one key short": ((Q, K, K), {"is_causal": True, "q_offset": 7}, "stands at key 7"),
    "before": ((Q, K, K), {"is_causal": True, "q_offset": -1}, "stands at key -1"),
    "positions": ((Q, K, K), {"is_causal": True, "q_offset": torch.tensor([0, 1])}, "by batch"),
    "no scale": ((Q, Q, Q), {"is_causal": True, "scale": 0.0}, "a positive scale, not 0.0"),
    "upside down": ((Q, Q, Q), {"is_causal": True, "scale": -0.5}, "a positive scale, not -0.5"),
    "window": ((Q, K, K), {"window": (3, 0)}, "Window(3, 0) is not among"),
    "segments": (
        (Q, K, K),
        {"segment_ids": (torch.zeros(6, dtype=int), torch.zeros(9, dtype=int))},
        "Segments(",
    ),
    "two": ((Q, K, K), {"mask": torch.ones(6, 9) > 0, "bias": randn(6, 9)}, "at a time"),
    "spread": (
        (Q[:, None], K[:, None].expand(2, 3, 2, 9, 8), K[:, None]),
        {"mask": torch.ones(2, 1, 1, 6, 9) > 0},
        "copy the mask",
    ),
    "nothing seen": ((Q, K, K), {"kv_lengths": 0}, "no key is visible"),
    "wide bias": ((Q, K, K), {"bias": randn(6, 9, dtype=torch.float32)}, "round a bias"),
    "bias's gradient": ((Q, K, K), {"bias": randn(6, 9).requires_grad_()}, "gradient of a bias"),
    "bias of NaN": ((Q, K, K), {"bias": torch.full((6, 9), torch.nan).double()}, "bias holds NaN"),
    "NaN": ((Q, NAN, K), {}, "not finite"),
    "hidden NaN": ((Q, K, NAN), {"mask": torch.arange(9) != 3}, "not finite"),
    "infinity": ((Q, K, NAN.nan_to_num(nan=torch.inf)), {}, "not finite"),
    "overflow": ((Q * 1e160, K * 1e160, K), {}, "overflow"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_a_reason(name: str) -> None:
    arrays, options, says = DECLINED[name]
    assert any(says in reason for reason in taken(*arrays, **options).reasons)
    with pytest.raises(ValueError, match="engine='native' cannot do this call") as caught:
        attention(*arrays, engine="native", **options)
    assert says in str(caught.value)
    attention(*arrays, engine="auto", **options)


def test_all_reasons_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"no log-sum-exp.*no sinks.*no softcap.*Window") as caught:
        attention(
            Q, K, K, engine="native", return_lse=True, sinks=randn(4), softcap=1.0, window=(1, 1)
        )
    assert "hint: engine='auto'" in str(caught.value)


@pytest.mark.lanes("numpy", "strict", "jax", "jax-jit", "dask", "cupy")
def test_libraries_without_a_kernel_that_keeps_the_contract(lane: Lane) -> None:
    x = np.ones((2, 3, 4))
    says = "forms all Nq x Nk scores" if lane.declared.name == "jax" else "no fused attention"
    with pytest.raises(ValueError, match=says):
        lane.call(attention, x, x, x, dtype="float32", engine="native")


def test_a_mask_over_batch_and_heads_and_a_length_go_together() -> None:
    mask = torch.from_numpy(np.random.default_rng(0).random((2, 4, 6, 9)) < 0.7)
    options = {"pattern": None, "mask": mask, "kv_lengths": 7, "q_offset": 0}
    got = attention(Q, K, K, engine="native", **options)
    close(got.numpy(), attention(Q, K, K, engine="tiles", **options).numpy(), within=1e-14)


def test_what_lies_beyond_a_length_is_not_looked_at() -> None:
    k = K.clone()
    k[:, :, 7:] = torch.nan
    for lengths in (7, torch.tensor([7, 7])):
        got = attention(Q, k, k, engine="native", kv_lengths=lengths)
        close(got.numpy(), attention(Q, K, K, kv_lengths=7).numpy(), within=1e-14)


# -- Which path is taken -----------------------------------------------------------------------


def spied(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls of torch's function from here on."""
    calls: list[dict[str, Any]] = []
    was = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs | {"shapes": [tuple(x.shape) for x in args]})
        return was(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return calls


def test_auto_takes_the_kernel_and_tiles_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    attention(Q, K, K, engine="tiles")
    assert not calls
    attention(Q, K, K)
    attention(Q, K, K, engine="native")
    # Query heads of one key head are rows of one product: 2 heads of 2 * 6 rows.
    assert [x["shapes"][0] for x in calls] == [(2, 2, 12, 8)] * 2
    attention(Q, K[..., :6, :], K[..., :6, :], is_causal=True)
    assert calls[-1]["shapes"][0] == (2, 4, 6, 8)
    assert calls[-1]["enable_gqa"]
    assert calls[-1]["is_causal"]
    attention(Q, K, K, is_causal=True)
    assert len(calls) == 3


def test_auto_takes_the_tiles_where_they_are_quicker(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    attention(*(x.to(torch.float16) for x in (Q, K, K)))
    one = randn(2, 2, 1, 8, dtype=torch.bfloat16)
    attention(one, *(x.to(torch.bfloat16) for x in (K, K)))
    assert not calls
    attention(*(x.to(torch.bfloat16) for x in (Q, K, K)))
    assert len(calls) == 1


def test_torch_told_to_form_the_scores_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    calls = spied(monkeypatch)
    assert SDPBackend.FLASH_ATTENTION.value == native.FLASH
    with sdpa_kernel(SDPBackend.MATH):
        attention(Q, K, K)
        assert taken(Q, K, K).reasons == (
            "torch would take a kernel that forms all Nq x Nk scores",
        )
    assert not calls


def test_an_empty_call_asks_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    for engine in ("auto", "native"):
        assert attention(Q[:, :, :0], K, K, engine=engine).shape == (2, 4, 0, 8)
        assert not attention(Q, K[:, :, :0], K[:, :, :0], engine=engine).any()
        lengths = torch.zeros(0, dtype=int)
        assert attention(Q[:0], K[:0], K[:0], kv_lengths=lengths, engine=engine).shape[0] == 0
    assert not calls


TRANSFORMS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "vmap": lambda f: torch.func.vmap(f)(Q, K, K),
    "jvp": lambda f: torch.func.jvp(lambda q: f(q, K, K), (Q,), (Q,))[1],
    "grad of grad": lambda f: torch.func.grad(
        lambda q: torch.func.grad(lambda q: (f(q, K, K) ** 2).sum())(q).sum()
    )(Q),
    "hessian": lambda f: torch.func.hessian(lambda q: f(q, K, K).sum())(Q[:, :, :1]),
}


# torch's own forward mode compiles a script.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_go_through_the_tiles_as_before(name: str) -> None:
    f = TRANSFORMS[name]
    got, tiles = (
        f(lambda *x, e=engine: attention(*x, engine=e)).numpy() for engine in ("auto", "tiles")
    )
    np.testing.assert_array_equal(got, tiles)


def test_tracing_without_values_is_no_worse_than_before() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.ones(1, 2, 8, 4)
        assert attention(x, x, x).shape == (1, 2, 8, 4)
        assert "cannot be looked at" in taken(x, x, x).reasons[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_forward_mode_takes_the_tiles() -> None:
    import torch.autograd.forward_ad as forward

    with forward.dual_level():
        q = forward.make_dual(Q, torch.ones_like(Q))
        assert "forward-mode" in taken(q, K, K).reasons[0]
        tangents = [
            forward.unpack_dual(attention(q, K, K, engine=engine)).tangent.numpy()
            for engine in ("auto", "tiles")
        ]
    np.testing.assert_array_equal(*tangents)


def test_layouts_without_contiguous_rows() -> None:
    q, k = (x.mT.contiguous().mT for x in (Q, K))
    assert q.stride(-1) != 1
    within = C * eps("float64") * (1 + longest(q.numpy()) * longest(k.numpy())) * 4
    got = attention(q, k, k, engine="native")
    close(got.numpy(), attention(Q, K, K, engine="tiles").numpy(), within=within)


def test_the_results_bits_do_not_depend_on_the_number_of_threads() -> None:
    q, k, v = (randn(1, 2, 900, 32, dtype=torch.float32, seed=n) for n in range(3))
    was, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(attention(q, k, v, is_causal=True, engine="native"))
    finally:
        torch.set_num_threads(was)
    assert all(torch.equal(results[0], x) for x in results)


# -- Calls without options, checked in one go --------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_a_plain_call_is_what_the_door_makes_of_it(n: int, causal: bool) -> None:
    q, k, v = (randn(2, 3, n, 8, dtype=torch.float32, seed=i) for i in range(3))
    run = taken(q, k, v, is_causal=causal).run
    got = native.at_once(q, k, v, causal)
    assert run is not None
    assert got is not None
    np.testing.assert_array_equal(got.numpy(), run().reshape(q.shape).numpy())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spoil", [0, 1, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_plain_call_with_values_that_do_not_fit(value: float, spoil: int, causal: bool) -> None:
    arrays = [randn(1, 2, 7, 4, seed=i) for i in range(3)]
    arrays[spoil][..., -1, 0] = value
    got, tiles = (
        attention(*arrays, is_causal=causal, engine=engine).numpy() for engine in ("auto", "tiles")
    )
    np.testing.assert_array_equal(got, tiles)


def test_numbers_whose_squares_overflow_are_no_scores_that_do() -> None:
    q, k, v = (randn(1, 2, 7, 4, seed=i) for i in range(3))
    got = native.at_once(q * 2.0**-600, k * 2.0**600, v * 2.0**600, False)
    assert got is not None
    close((got * 2.0**-600).numpy(), attention(q, k, v).numpy(), within=1e-14)


@pytest.mark.parametrize("cut", [slice(0, 6), slice(1, 7)])
def test_numbers_that_do_not_lie_in_one_piece(cut: slice) -> None:
    q, k, v = (randn(1, 2, 7, 4, seed=i)[..., cut, :] for i in range(3))
    got = native.at_once(q, k, v, False)
    assert got is not None
    np.testing.assert_array_equal(got.numpy(), attention(q, k, v, engine="native").numpy())
    v[..., 3, 1] = torch.nan
    assert native.at_once(q, k, v, False) is None


X = randn(1, 2, 6, 4)
OTHERS: dict[str, tuple[Any, ...]] = {
    "scores that may overflow": (X * 1e154, X * 1e154, X, False),
    "sums of products that may": (torch.full((1, 2, 3, 64), 2e153, dtype=torch.float64),) * 3
    + (False,),
    "positions": (X[..., :3, :], X, X, True),
    "grouped heads": (torch.cat([X, X], 1), X, X, False),
    "broadcast items": (torch.cat([X, X]), X, X, False),
    "three axes": (X[0], X[0], X[0], False),
    "two dtypes": (X, X.float(), X, False),
    "half precision": (X.half(), X.half(), X.half(), False),
    "wide values": (X, X, torch.cat([X, X], -1), False),
    "no keys": (X, X[..., :0, :], X[..., :0, :], False),
    "rows apart": (X.mT.contiguous().mT, X, X, False),
    "no tensors": (X.numpy(), X.numpy(), X.numpy(), False),
    "two libraries": (X, X.numpy(), X, False),
    "parameters": (torch.nn.Parameter(X), X, X, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_all_others_go_through_the_door(name: str) -> None:
    assert native.at_once(*OTHERS[name]) is None


def test_autocast_leaves_the_dtype_of_q() -> None:
    q = torch.ones((1, 2, 64, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q, q, q).dtype == torch.float32
