"""What `explain` says is what the call does, and it does no attention to say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from lanes import Lane
from laws import for_all
from strategies import Case
from test_native import one_width, spied

from arrattn import (
    attention,
    delta_attention,
    explain,
    linear_attention,
    local_attention,
    sparse_attention,
)
from arrattn._core import (
    engine,
    gated,
    jobs,
    native,
    recurrence,
    select,
    sparse_jobs,
    streams,
    threads,
)
from arrattn._core.plan import Plan
from arrattn._core.strips import Cut
from arrattn.explain import Explanation
from arrattn.patterns import Global, Pattern, Window


def draw(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).normal(size=shape)


X = draw(2, 2, 300, 8)
FAMILIES: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "local_attention": local_attention,
    "sparse_attention": sparse_attention,
    "linear_attention": linear_attention,
}
families = pytest.mark.parametrize("family", FAMILIES)


def explained(lane: Lane, function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
    """The explanation of a call down this lane; under ``jit``, of what is traced."""
    found: list[Explanation] = []

    def inside(*arrays: Any, **options: Any) -> Any:
        found.append(explain(function, *arrays, **options))
        return arrays[0]

    lane.call(inside, *arrays, dtype="float32", **options)
    return found[0]


def options_of(family: str) -> dict[str, Any]:
    return {"window": (20, 0)} if family == "local_attention" else {"is_causal": True}


# -- On every library --------------------------------------------------------------------------


@families
def test_every_library_is_explained_and_nothing_is_computed(lane: Lane, family: str) -> None:
    why = explained(lane, FAMILIES[family], X, X, X, **options_of(family))
    assert why.function == family
    assert why.library == lane.namespace.__name__.removeprefix("array_api_compat.")
    assert (why.dtype, why.accumulation) == ("float32", "float32")
    kinds = {"sparse_attention": "selection", "linear_attention": "recurrence"}
    assert why.engine in {kinds.get(family, "tiles"), "native"}
    text = str(why)
    for words in (family, why.library, f"engine: {why.engine}", f"pattern: {why.pattern}"):
        assert words in text
    assert all(f"  {step}" in text for step in why.steps)


@pytest.mark.parametrize("name", ["threads.run_jobs", "native._run_torch", "engine.fold"])
def test_no_work_is_done(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        msg = f"{name} was called with {len(args)} and {len(kwargs)} arguments"
        raise AssertionError(msg)

    module, _, function = name.partition(".")
    monkeypatch.setattr(
        {"threads": threads, "native": native, "engine": engine}[module], function, refuse
    )
    for family, f in FAMILIES.items():
        for x in (X, torch.from_numpy(X)):
            explain(f, x, x, x, **options_of(family))


# -- It is true --------------------------------------------------------------------------------


@pytest.mark.lanes("torch")  # the one library where a kernel may be taken
@for_all(case=one_width())
def test_the_engine_named_is_the_engine_taken(lane: Lane, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        calls = spied(patch)
        why = explained(lane, attention, *case.arrays, **case.options)
        assert not calls
        lane.call(attention, *case.arrays, dtype="float32", **case.options)
    assert (why.engine == "native") == bool(calls)
    assert (why.engine == "native") <= (why.reasons == ())
    assert (why.engine == "tiles") <= (why.reasons != ())


def test_reasons_are_those_that_native_raises() -> None:
    x = torch.from_numpy(X)
    options: dict[str, Any] = {"softcap": 2.0, "window": (3, 0)}
    why = explain(attention, x, x, x, **options)
    assert len(why.reasons) == 2
    with pytest.raises(ValueError, match="softcap") as caught:
        attention(x, x, x, engine="native", **options)
    assert all(reason in str(caught.value) for reason in why.reasons)
    assert "not torch.nn.functional.scaled_dot_product_attention:" in str(why)
    assert explain(attention, x, x, x, engine="tiles").reasons == ()
    half = x.to(torch.float16)
    assert "quicker" in explain(attention, half, half, half).reasons[0]
    assert explain(attention, half, half, half, engine="native").engine == "native"


PLANNERS = {
    "numpy": (jobs, "cut"),
    "torch": (engine, "plan_batched"),
    "jax": (engine, "plan_scan"),
}


@pytest.mark.lanes("numpy", "torch", "jax", "strict")  # Dask plans when it is computed
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"kv_lengths": np.asarray([90, 260])}]
)
def test_the_plan_named_is_the_plan_made(
    lane: Lane, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = PLANNERS.get(lane.declared.name, PLANNERS["torch"])
    made: list[Any] = []
    was = getattr(module, name)

    def record(*args: Any, **kwargs: Any) -> Any:
        made.append(was(*args, **kwargs))
        return made[-1]

    why = explained(lane, attention, X, X, X, engine="tiles", **options)
    monkeypatch.setattr(module, name, record)
    lane.call(attention, X, X, X, dtype="float32", engine="tiles", **options)
    if isinstance(made[0], Cut):
        made = [cut.plan for cut in made]
    plans = [x if isinstance(x, Plan) else x[1] for x in made]
    assert repr(why.plan) == repr(plans[0])
    assert str(why.plan) in str(why)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"pattern": Window(9, 3)}])
def test_the_products_named_are_those_of_the_folds(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, pairs = torch.from_numpy(X), 0
    was = engine.fold

    def count(call: Any, state: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal pairs
        pairs += q[..., 0].numel() * k.shape[-2]
        return was(call, state, q, k, *args, **kwargs)

    why = explain(attention, x, x, x, engine="tiles", **options)
    monkeypatch.setattr(engine, "fold", count)
    attention(x, x, x, engine="tiles", **options)
    assert why.products == pairs * 16
    assert why.dense_products == 4 * 300 * 300 * 16
    assert why.steps == ("a loop over tiles, each for all items and heads at once",)


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"window": (20, 0)}, {"kv_lengths": np.asarray([90, 260])}]
)
def test_the_products_named_are_those_of_the_jobs(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, was = 0, jobs.Head.run

    def count(self: Any, strip: Any) -> None:
        nonlocal pairs
        pairs += strip.cost * self.call.heads[0]
        was(self, strip)

    why = explain(attention, X, X, X, **options)
    monkeypatch.setenv("ARRATTN_NUM_THREADS", "1")
    monkeypatch.setattr(jobs.Head, "run", count)
    attention(X, X, X, **options)
    assert why.products == pairs * 16
    assert type(why.products) is int
    small = explain(attention, *(X[:, :, :20],) * 3)
    assert small.engine == "tiles"
    assert "small heads" in small.steps[0]
    pairs = 0
    attention(*(X[:, :, :20],) * 3)
    assert pairs == 0


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "all at once"),
        ({"is_causal": True}, "side by side"),
        ({"kv_lengths": np.asarray([9, 300])}, "all at once"),
        ({"kv_lengths": np.asarray([9, 300]), "is_causal": True}, "sorted"),
        ({"segment_ids": np.arange(300) // 70}, "sorted"),
    ],
)
def test_the_form_named_is_the_form_run(
    options: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arrattn.explain import _FORMS

    taken: list[str] = []
    for name, was in recurrence.FORMS.items():

        def record(*args: Any, name: str = name, was: Any = was) -> Any:
            taken.append(name)
            return was(*args)

        monkeypatch.setitem(recurrence.FORMS, name, record)

    def stream(job: streams.Job, *args: Any) -> Any:
        taken.append("side by side" if job.is_causal else "all at once")
        return streamed(job, *args)

    streamed = streams.run
    monkeypatch.setattr(streams, "run", stream)
    why = explain(linear_attention, X, X, X, **options)
    assert not taken
    linear_attention(X, X, X, **options)
    assert set(taken) == {form}
    assert why.steps[0] == _FORMS[form]
    assert "state 8 x 8" in why.steps[1]


@pytest.mark.parametrize("pattern", [Window(20, 20), Window(20, 20) | Global(4)])
def test_a_band_is_named_whatever_is_seen_beside_it(pattern: Pattern) -> None:
    x = np.zeros((4, 600, 16), np.float32)
    assert "32 queries at a time" in explain(attention, x, x, x, pattern=pattern).steps[1]


@pytest.mark.parametrize(("nq", "window"), [(60, 20), (600, 160)])
def test_few_queries_and_windows_of_most_keys_take_no_band(nq: int, window: int) -> None:
    q, k = np.zeros((4, nq, 16), np.float32), np.zeros((4, 600, 16), np.float32)
    why = explain(attention, q, k, k, pattern=Window(window, window))
    assert "jobs of some queries" in why.steps[0]
    assert not any("whole band" in step for step in why.steps)


DECAY = np.full((2, 300), -0.1)


@pytest.mark.parametrize(
    ("function", "options", "form", "gates"),
    [
        (linear_attention, {"log_decay": DECAY, "is_causal": True}, "side by side", "decay"),
        (linear_attention, {"log_decay": DECAY}, "both ways", "decay"),
        (delta_attention, {"beta": -DECAY}, "side by side", "delta rule"),
        (
            delta_attention,
            {"beta": -DECAY, "log_decay": DECAY, "kv_lengths": np.asarray([3, 300])},
            "sorted",
            "decay, delta rule",
        ),
    ],
)
def test_the_form_of_gates_named_is_the_form_run(
    function: Any, options: dict[str, Any], form: str, gates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    for name, was in gated.FORMS.items():

        def record(*args: Any, name: str = name, was: Any = was) -> Any:
            taken.append(name)
            return was(*args)

        monkeypatch.setitem(gated.FORMS, name, record)
    why = explain(function, X, X, X, **options)
    assert not taken
    function(X, X, X, **options)
    assert set(taken) == {form}
    assert why.function == function.__name__
    assert why.steps[2] == f"gates: {gates}"
    assert "chunks of 32 tokens" in why.steps[1]


@pytest.mark.parametrize(
    ("options", "job", "tile", "says"),
    [
        ({"route": None}, "_exact_job", "_exhaustive_tile", "all 300 keys are scored"),
        ({"route": 3}, "_others_job", "_routed_tile", "3 of 17 blocks are searched"),
        ({"top_k": 0}, "_others_job", "_routed_tile", "no block but the query's own"),
        (
            {"select": "blocks"},
            "_others_job",
            "_routed_tile",
            "3 of 17 blocks are taken, by the means",
        ),
        ({"select": "blocks", "score": "bound"}, "_others_job", "_routed_tile", "by bounds"),
    ],
)
def test_the_selection_named_is_the_selection_made(
    options: dict[str, Any], job: str, tile: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_done, rows = [], []
    run, was = getattr(sparse_jobs.Head, job), getattr(select, tile)

    def record_job(head: Any, span: Any) -> None:
        jobs_done.append(span)
        run(head, span)

    def record_tile(call: Any, choice: Any, *args: Any) -> Any:
        rows.append(next(x.shape[-2] for x in args if hasattr(x, "shape")))
        return was(call, choice, *args)

    monkeypatch.setattr(sparse_jobs.Head, job, record_job)
    monkeypatch.setattr(select, tile, record_tile)
    why = explain(sparse_attention, X, X, X, **options)
    sparse_attention(X, X, X, **options)
    assert says in why.steps[1]
    assert "each other block once" in why.steps[2]
    assert jobs_done
    assert not rows
    # A softcap is not for those jobs.
    why = explain(sparse_attention, X, X, X, softcap=9.0, **options)
    jobs_done.clear()
    sparse_attention(X, X, X, softcap=9.0, **options)
    assert why.steps[2] == f"{max(rows)} queries at a time"
    assert not jobs_done


# Of X: 4 lanes of 300 queries and 17 blocks of 18 keys; 8 wide, and 8 more of values.
OWN, BLOCK, MEANS, KEYS = "blocks of 18 keys, and the best ", 18, 300 * 17 * 8, 300 * 16


@pytest.mark.parametrize(
    ("options", "steps", "products"),
    [
        (
            {"route": None},
            (OWN + "18 keys outside", "all 300 keys are scored: exact selection"),
            300 * KEYS,
        ),
        (
            {"top_k": 0},
            (OWN + "0 keys outside", "no block but the query's own is looked into"),
            MEANS + BLOCK * KEYS,
        ),
        (
            {"route": 2, "top_k": 9},
            (OWN + "9 keys outside", "2 of 17 blocks are searched, by the means of their keys"),
            MEANS + 3 * BLOCK * KEYS,
        ),
        (
            {"select": "blocks", "score": "bound", "top_k": 4},
            (OWN + "4 blocks outside", "4 of 17 blocks are taken, by bounds of their keys' scores"),
            MEANS + 5 * BLOCK * KEYS,
        ),
        (
            {"select": "blocks", "score": "best", "top_k": 1},
            (OWN + "1 blocks outside", "1 of 17 blocks are taken, by their best scores"),
            MEANS + 2 * BLOCK * KEYS,
        ),
        (
            {"select": "blocks", "block_scores": np.zeros((1, 17)), "top_k": 1},
            (OWN + "1 blocks outside", "1 of 17 blocks are taken, by the scores given"),
            MEANS + 2 * BLOCK * KEYS,
        ),
        (
            {"per": "group", "route": 1},
            (
                OWN + "18 keys outside, chosen by the query heads of a key head together",
                "1 of 17 blocks are searched, by the means of their keys",
            ),
            MEANS + 2 * BLOCK * KEYS,
        ),
    ],
)
def test_a_selection_is_told_in_full(
    options: dict[str, Any], steps: tuple[str, ...], products: int
) -> None:
    why = explain(sparse_attention, X, X, X, **options)
    assert why.steps[:2] == steps
    assert why.products == 4 * products


def test_what_is_always_seen_and_who_chooses_together_is_told() -> None:
    options = {"select": "blocks", "per": "block", "always": Window(9, 0)}
    why = explain(sparse_attention, X, X, X, **options)
    assert "by the queries of a block together" in why.steps[0]
    assert "Window(9, 0)" in why.steps[2]


def test_an_empty_call_has_no_engine() -> None:
    for f in (attention, sparse_attention):
        why = explain(f, X[:, :, :0], X, X)
        assert (why.engine, why.products) == ("none", 0)


# -- It raises what the call raises ------------------------------------------------------------

BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "too few": ((X, X), {}),
    "unknown": ((X, X, X), {"causal": True}),
    "kinds": ((X, 3, None), {}),
    "shapes": ((X, X[..., :3], X), {}),
    "options": ((X, X, X), {"is_causal": 1, "scale": np.inf}),
}


@families
@pytest.mark.parametrize("name", BAD)
def test_bad_input_raises_as_the_call_does(family: str, name: str) -> None:
    arrays, options = BAD[name]
    with pytest.raises((TypeError, ValueError)) as call:
        FAMILIES[family](*arrays, **options)
    with pytest.raises(call.type) as explanation:
        explain(FAMILIES[family], *arrays, **options)
    assert str(explanation.value) == str(call.value)


def test_an_engine_that_cannot_raises_here_too() -> None:
    for engine_ in ("native", "tile"):
        with pytest.raises(ValueError, match="engine") as call:
            attention(X, X, X, engine=engine_)
        with pytest.raises(ValueError, match="engine") as explanation:
            explain(attention, X, X, X, engine=engine_)
        assert str(explanation.value) == str(call.value)
    assert "did you mean 'tiles'?" in str(call.value)


def test_only_the_four_families_are_explained() -> None:
    with pytest.raises(TypeError, match="function: expected one of attention, local_attention"):
        explain(max, X, X, X)
