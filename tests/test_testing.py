"""`arrattn.testing`: our functions keep the laws, wrong ones break them, and it is shown how."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings

import arrattn
from arrattn.cli import main
from arrattn.testing import CHOICES, LAWS, check, conformance, long, pytest_laws
from arrattn.testing.adapters import ADAPTERS, adapter_of
from arrattn.testing.check import check_subject, read_laws, read_subject
from arrattn.testing.memory import peaks
from arrattn.testing.run import BrokenLawError, Run
from arrattn.testing.strategies import cases
from arrattn.testing.subject import FAMILIES, family_of

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": arrattn.attention,
    "local": arrattn.local_attention,
    "sparse": arrattn.sparse_attention,
    "linear": arrattn.linear_attention,
    "delta": arrattn.delta_attention,
}
families = pytest.mark.parametrize("family", FUNCTIONS)

#: Where every new shape is compiled, or becomes a graph.
FEW = ("convex-hull", "causal-ends-at-the-last-key", "hidden-nan-in-values", "empty-rows-are-zero")
FEW_OF_DELTA = ("equals-the-steps", "beta-one-reads-back", "state-hands-over", "causal-future")


# -- Our own functions ------------------------------------------------------------------------


@families
@pytest.mark.parametrize("library", ["numpy", "torch", "array-api-strict"])
def test_our_functions_keep_every_law(library: str, family: str) -> None:
    examples = 6 if library == "numpy" else 2
    report = check(FUNCTIONS[family], xp=library, laws=family, examples=examples)
    assert report.ok, "\n".join(map(str, report.failed.values()))
    lacking = {"gradients", "16 bits"} if library != "torch" else {"not traced"}
    for result in report.skipped.values():
        assert any(word in result.reason for word in lacking), result


@families
@pytest.mark.parametrize("library", ["jax", "dask"])
def test_our_functions_keep_some_laws_where_calls_are_compiled(library: str, family: str) -> None:
    laws = FEW_OF_DELTA if family == "delta" else FEW
    report = check(FUNCTIONS[family], xp=library, laws=laws, dtypes=["float32"], examples=1)
    assert sorted(report.passed) == sorted(laws), list(report.failed.values())


def test_positions_may_come_before_heads() -> None:
    def bnhd(q: Any, k: Any, v: Any, /, **options: Any) -> Any:
        arrays = (np.swapaxes(x, -2, -3) for x in (q, k, v))
        out = arrattn.attention(*arrays, **options)
        if isinstance(out, tuple):
            return np.swapaxes(out[0], -2, -3), np.swapaxes(out[1], -1, -2)
        return np.swapaxes(out, -2, -3)

    laws = ("equals-the-equation", "lse-equals-the-equation", "causal-prefix", "parts-merge")
    report = check(bnhd, layout="bnhd", laws=laws, examples=6)
    assert sorted(report.passed) == sorted(laws), list(report.failed.values())
    swapped = check(arrattn.attention, layout="bnhd", laws=laws, examples=20)
    assert "equals-the-equation" in swapped.failed


# -- The registry -----------------------------------------------------------------------------


def test_there_are_laws_for_everyone() -> None:
    assert len(LAWS) >= 40
    for name, law in LAWS.items():
        assert name == law.name
        assert law.statement
        assert law.source
        assert set(law.families) <= set(FAMILIES)
        assert not law.choice or law.choice in CHOICES
    for family in FAMILIES:
        assert len(read_laws(family, family)) >= 40


def test_families_are_told_by_their_arguments() -> None:
    assert {name: family_of(f) for name, f in FUNCTIONS.items()} == {x: x for x in FAMILIES}


# -- Wrong ones -------------------------------------------------------------------------------


def plain(
    q: Any,
    k: Any,
    v: Any,
    /,
    *,
    is_causal: bool = False,
    mask: Any = None,
    top: Any = None,
    fill: float = -np.inf,
    shift: int = 0,
) -> Any:
    """Softmax attention written out, with a place for each mistake."""
    s = np.asarray(q, np.float64) @ np.swapaxes(np.asarray(k, np.float64), -1, -2)
    s = s * max(q.shape[-1], 1) ** -0.5
    nq, nk = s.shape[-2:]
    seen = np.ones(s.shape, bool)
    if is_causal:
        seen = seen & np.tri(nq, nk, (nk - nq if top is None else 0) + shift, dtype=bool)
    if mask is not None:
        seen = seen & mask
    s = np.where(seen, s, fill)
    m = np.max(s, axis=-1, keepdims=True, initial=-1e300)
    p = np.exp(s - m)
    p = np.where(seen, p, 0.0) if fill == -np.inf else p
    total = p.sum(-1, keepdims=True)
    counts = seen if fill == -np.inf else np.ones_like(seen)
    out = np.where(counts[..., None], p[..., None] * v[..., None, :, :], 0.0).sum(-2)
    return (out / np.where(total == 0, 1.0, total)).astype(q.dtype)


def right(q: Any, k: Any, v: Any, /, *, is_causal: bool = False, mask: Any = None) -> Any:
    return plain(q, k, v, is_causal=is_causal, mask=mask)


def top_left(q: Any, k: Any, v: Any, /, *, is_causal: bool = False, mask: Any = None) -> Any:
    return plain(q, k, v, is_causal=is_causal, mask=mask, top=True)


def one_too_many(q: Any, k: Any, v: Any, /, *, is_causal: bool = False) -> Any:
    return plain(q, k, v, is_causal=is_causal, shift=1)


def unlikely(q: Any, k: Any, v: Any, /, *, mask: Any = None) -> Any:
    return plain(q, k, v, mask=mask, fill=-1e4)


def raising(q: Any, k: Any, v: Any, /) -> Any:
    if q.shape[-2] > k.shape[-2]:
        msg = "more queries than keys"
        raise RuntimeError(msg)
    return right(q, k, v)


LACKS = ("gqa", "broadcast")
WRONG: list[tuple[Callable[..., Any], str]] = [
    (top_left, "causal-ends-at-the-last-key"),
    (one_too_many, "causal-sees-itself-and-before"),
    (unlikely, "hidden-is-not-unlikely"),
    (unlikely, "empty-rows-are-zero"),
    (raising, "zero-queries-are-the-mean"),
]


def run_script(script: str) -> None:
    exec(compile(script, "<pasted>", "exec"), {})


def test_a_plain_one_is_right() -> None:
    report = check(right, laws="dense", examples=20, lacks=LACKS)
    assert report.ok, list(report.failed.values())
    assert "it has no argument `window`" in report.skipped["window-of-itself"].reason
    assert "query heads" in report.skipped["heads-are-grouped"].reason


@pytest.mark.parametrize(("wrong", "name"), WRONG)
def test_a_mistake_is_found_and_its_program_shows_it(
    wrong: Callable[..., Any], name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    report = check(wrong, laws=[name], examples=100, lacks=LACKS, dtypes=["float64"])
    assert list(report.failed) == [name]
    found = report.failed[name].counterexample
    assert found is not None
    assert f"from {__name__} import {wrong.__name__} as attend" in found.script
    monkeypatch.setitem(sys.modules, __name__, sys.modules[wrong.__module__])
    with pytest.raises((AssertionError, RuntimeError)):
        run_script(found.script)
    # The same program holds for the right one.
    run_script(found.script.replace(f"import {wrong.__name__} as", "import right as"))
    assert len(found.script) < 1200, "not the smallest call"
    capsys.readouterr()


def test_a_choice_is_no_failure_and_the_others_make_room() -> None:
    laws = ("options-are-masks", "causal-ends-at-the-last-key", "decoding-is-prefill")
    how: dict[str, Any] = {"laws": laws, "examples": 20, "lacks": LACKS}
    assert sorted(check(top_left, **how).failed) == sorted(laws)
    report = check(top_left, **how, choices={"alignment": "its documentation"})
    assert list(report.passed) == ["options-are-masks"], list(report.failed.values())
    assert "causal-ends-at-the-last-key" in report.differs
    assert report.differs["decoding-is-prefill"].reason == "its documentation"
    undocumented = check(top_left, **how, choices={"alignment": ""})
    assert set(undocumented.failed) == set(report.differs)


def test_the_same_seed_finds_the_same() -> None:
    def seen_by(seed: int) -> list[bytes]:
        calls = []

        def spy(q: Any, k: Any, v: Any, /) -> Any:
            calls.append(b"".join(x.tobytes() for x in (q, k, v)))
            return arrattn.attention(q, k, v)

        check(spy, laws=["equals-the-equation"], examples=10, seed=seed)
        return calls

    assert seen_by(0) == seen_by(0)
    assert seen_by(0) != seen_by(1)


def test_results_that_come_and_go_are_a_failure() -> None:
    rng = np.random.default_rng(0)

    def noisy(q: Any, k: Any, v: Any, /) -> Any:
        return arrattn.attention(q, k, v) + rng.normal()

    report = check(noisy, laws=["same-input-same-bits"], examples=20, lacks=LACKS)
    assert "same-input-same-bits" in report.failed


# -- Several tiles ----------------------------------------------------------------------------

LONG = "equals-the-equation-at-odd-lengths"


def late(q: Any, k: Any, v: Any, /, *, mask: Any = None) -> Any:
    """With a mask, nothing is seen from the second tile of queries on."""
    out = plain(q, k, v, mask=mask)
    if mask is not None:
        out[..., 64:, :] = 0
    return out


def positions_first(attend: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
    out = attend(*(np.swapaxes(x, -2, -3) for x in (q, k, v)), mask=mask)
    return np.swapaxes(out, -2, -3)


def right_bnhd(q: Any, k: Any, v: Any, /, *, mask: Any = None) -> Any:
    return positions_first(right, q, k, v, mask)


def late_bnhd(q: Any, k: Any, v: Any, /, *, mask: Any = None) -> Any:
    return positions_first(late, q, k, v, mask)


@pytest.mark.parametrize(
    ("wrong", "due", "layout"), [(late, right, "bhnd"), (late_bnhd, right_bnhd, "bnhd")]
)
def test_a_mistake_between_tiles_is_found_and_its_program_is_short(
    wrong: Any, due: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"layout": layout, "lacks": LACKS, "examples": 30}
    assert check(due, laws=[LONG], **how).passed
    found = check(wrong, laws=[LONG], **how).failed[LONG].counterexample
    assert found is not None
    assert len(found.script) < 1200
    monkeypatch.setitem(sys.modules, __name__, sys.modules[wrong.__module__])
    with pytest.raises(AssertionError):
        run_script(found.script)
    run_script(found.script.replace(f"import {wrong.__name__} as", f"import {due.__name__} as"))


@families
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_calls_over_tiles_are_written_by_expressions(library: str, family: str) -> None:
    subject = read_subject(FUNCTIONS[family], xp=library, laws=family)

    @settings(database=None, max_examples=20, deadline=None, phases=[Phase.generate])
    @given(long.cases(family, dtypes=subject.wide))
    def written(case: Any) -> None:
        run = Run(subject)
        got = run("got", case).out.array
        run.constants["got_before"] = got.reshape(-1)[:1]
        script = run.script(BrokenLawError("", "assert got.reshape(-1)[0] == got_before[0]"))
        assert len(script) < 1800, script
        run_script(script)

    written()


@families
def test_our_functions_keep_the_law_over_tiles_where_calls_are_compiled(family: str) -> None:
    report = check(FUNCTIONS[family], xp="jax", laws=[LONG], dtypes=["float32"], examples=2)
    assert report.passed, list(report.failed.values())


# -- Memory -----------------------------------------------------------------------------------

MEMORY = "memory-grows-with-tokens"


def all_pairs(q: Any, k: Any, v: Any, /) -> Any:
    w = q @ np.swapaxes(k, -1, -2)
    return w @ v / w.sum(-1, keepdims=True)


def sums_first(q: Any, k: Any, v: Any, /) -> Any:
    total = q @ k.sum(-2)[..., None]
    return q @ (np.swapaxes(k, -1, -2) @ v) / total


@pytest.mark.parametrize("family", ["linear", "delta"])
@pytest.mark.parametrize("library", ["numpy", "array-api-strict"])
def test_our_memory_grows_with_tokens(library: str, family: str) -> None:
    report = check(FUNCTIONS[family], xp=library, laws=[MEMORY])
    assert report.passed, list(report.failed.values())


@pytest.mark.parametrize("library", ["torch", "jax", "dask"])
def test_memory_that_is_not_traced_is_not_judged(library: str) -> None:
    report = check(arrattn.linear_attention, xp=library, laws=[MEMORY])
    assert "is not traced" in report.skipped[MEMORY].reason


def test_a_table_of_pairs_is_found_and_its_program_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert check(sums_first, laws=[MEMORY], family="linear").passed
    found = check(all_pairs, laws=[MEMORY], family="linear").failed[MEMORY].counterexample
    assert found is not None
    twice, once = (int(x) for x in re.findall(r"take (\d+)", found.text))
    assert 1024**2 <= once < twice / 3
    monkeypatch.setitem(sys.modules, __name__, sys.modules[all_pairs.__module__])
    with pytest.raises(AssertionError):
        run_script(found.script)
    assert capsys.readouterr().out.count(",") == 4  # three of each
    run_script(found.script.replace("import all_pairs as", "import sums_first as"))
    assert len(found.script) < 1200, "not the smallest call"


@pytest.mark.parametrize("already", [False, True])
def test_memory_is_measured_and_tracing_left_as_it_was(already: bool) -> None:
    tracing = tracemalloc.is_tracing()
    try:
        (tracemalloc.start if already else tracemalloc.stop)()
        for size in peaks(lambda: np.ones(2**20, np.uint8)):
            assert 2**20 <= size < 2**20 + 2**14
        assert tracemalloc.is_tracing() == already
        with pytest.raises(ZeroDivisionError):
            peaks(lambda: 1 // 0)
        assert tracemalloc.is_tracing() == already
    finally:
        (tracemalloc.start if tracing else tracemalloc.stop)()


def test_what_is_kept_from_the_first_call_is_not_counted() -> None:
    kept: list[Any] = []
    assert max(peaks(lambda: kept or kept.append(np.ones(2**20)))) < 2**14


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"lacks": ["magic"]}, "lacks"),
        ({"laws": ["no-such-law"]}, "no-such-law"),
        ({"xp": "no_such_library"}, "xp"),
        ({"layout": "hbnd"}, "layout"),
        ({"dtypes": ["int8"]}, "dtypes"),
        ({"choices": {"taste": "mine"}}, "choices"),
        ({"family": "square"}, "family"),
    ],
)
def test_wrong_arguments_are_named(how: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(right, **how)
    with pytest.raises(TypeError, match="attend"):
        check(3)  # type: ignore[arg-type]


# -- Examples ---------------------------------------------------------------------------------


def test_examples_shrink_to_what_one_can_read() -> None:
    how = settings(database=None, max_examples=200)
    smallest = find(cases(), lambda case: True, settings=how)
    assert [x.shape for x in smallest.arrays] == [(1, 1, 1, 1)] * 3
    assert smallest.options == {}
    assert not np.any(smallest.q)
    empty = find(cases(sees=("mask",)), lambda case: not case.full_rows().all(), settings=how)
    assert empty.options["mask"].size == 1
    assert empty.q.shape == (1, 1, 1, 1)


def test_empty_rows_patterns_and_grouped_heads_are_drawn() -> None:
    how = settings(database=None, max_examples=500)
    grouped = find(cases(), lambda case: case.heads[0] > case.heads[1], settings=how)
    assert grouped.heads in {(2, 1), (4, 2), (3, 1)}
    for name in ("pattern", "mask", "segment_ids"):
        drawn = cases(sees=(name,), least=1)
        found = find(
            drawn,
            lambda c: c.full_rows().size > 1 and c.full_rows().any() and not c.full_rows().all(),
            settings=how,
        )
        assert name in found.options


# -- Tests of others --------------------------------------------------------------------------


def test_one_line_makes_a_test_of_every_law() -> None:
    test = pytest_laws(top_left, xp="numpy", laws="dense", examples=10, lacks=LACKS)
    (mark,) = test.pytestmark  # type: ignore[attr-defined]
    assert mark.args[0] == "name"
    assert list(mark.args[1]) == [x.name for x in read_laws("dense", "dense")]
    test("weights-sum-to-one")
    with pytest.raises(pytest.skip.Exception, match="window"):
        test("window-of-itself")
    with pytest.raises(
        pytest.fail.Exception, match=r"the last query sees the last key[\s\S]*attend"
    ):
        test("causal-ends-at-the-last-key")
    chosen = pytest_laws(
        top_left, laws="dense", examples=10, lacks=LACKS, choices={"alignment": "x"}
    )
    with pytest.raises(pytest.xfail.Exception, match="choice"):
        chosen("causal-ends-at-the-last-key")


# -- Other libraries --------------------------------------------------------------------------

KNOWN: dict[str, tuple[str, ...]] = {
    "torch": ("hidden-nan-in-values", "causal-ends-at-the-last-key"),
    "jax": (
        "hidden-nan-in-values",
        "causal-ends-at-the-last-key",
        "all-hidden-is-zero",
        "empty-rows-are-zero",
    ),
}


@pytest.mark.parametrize(("peer", "name"), [(p, n) for p, names in KNOWN.items() for n in names])
def test_known_differences_of_peers_reproduce_when_pasted(peer: str, name: str) -> None:
    adapter = adapter_of(peer)
    assert adapter is not None
    report = check_subject(adapter.subject(), laws=[LAWS[name]], examples=40)
    assert list(report.differs) == [name], report
    found = report.differs[name].counterexample
    assert found is not None
    with pytest.raises(AssertionError):
        run_script(found.script)


def test_a_peer_keeps_what_it_promises() -> None:
    adapter = adapter_of("torch")
    assert adapter is not None
    laws = [LAWS[n] for n in ("equals-the-equation", "mask-true-is-visible", "causal-prefix")]
    report = check_subject(adapter.subject(), laws=laws, examples=20)
    assert len(report.passed) == 3, report.failed


def test_the_page_has_every_law_and_every_adapter() -> None:
    page = (Path(__file__).parents[1] / "docs" / "conformance.md").read_text(encoding="utf-8")
    for law in read_laws("dense", "dense"):
        assert f"| `{law.name}` |" in page, (
            "stale: arrattn check --conformance > docs/conformance.md"
        )
    for adapter in ADAPTERS.values():
        assert f"`{adapter.target}`" in page


def test_the_page_is_not_begun_with_a_library_that_does_not_load(monkeypatch: Any) -> None:
    def load() -> Any:
        msg = "no backend"
        raise ModuleNotFoundError(msg)

    whole = ADAPTERS["jax.nn:dot_product_attention"]
    broken = replace(whole, packages=("numpy",), load=load)
    monkeypatch.setattr(conformance, "ADAPTERS", {broken.target: broken})
    monkeypatch.setattr(conformance, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))
    monkeypatch.setattr(conformance, "check", lambda *_, **__: pytest.fail("a check was begun"))
    with pytest.raises(ImportError, match="does not load: ModuleNotFoundError: no backend"):
        conformance.markdown()


# -- The command ------------------------------------------------------------------------------


def test_the_command_says_what_holds(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    laws = "convex-hull,linear-in-v"
    args = ["check", "arrattn:attention", "--laws", laws, "--examples", "3", "--json", str(path)]
    assert main(args) == 0
    assert "2 passed, 0 failed" in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["ok"]
    assert [x["law"] for x in report["laws"]] == laws.split(",")


def test_the_command_shows_what_fails(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "mine_to_check.py").write_text(
        "import numpy as np\n"
        "def attend(q, k, v, /):\n"
        "    return np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)\n"
    )
    monkeypatch.chdir(tmp_path)
    args = ["check", "mine_to_check:attend", "--laws", "weights-sum-to-one,masks-broadcast"]
    assert main([*args, "--lacks", "gqa,broadcast"]) == 1
    out = capsys.readouterr().out
    assert "FAIL    weights-sum-to-one" in out
    assert "skip    masks-broadcast" in out
    script = out[out.index("import numpy as np") : out.rindex("\n\n")]
    with pytest.raises(AssertionError):
        run_script(script)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "MODULE:CALLABLE"),
        (["attention"], "MODULE:CALLABLE"),
        (["arrattn:nothing"], "no 'nothing'"),
        (["no_such_module:f"], "cannot import"),
        (["arrattn:__version__"], "expected a function"),
        (["arrattn:attention", "--laws", "square"], "square"),
        (["arrattn:attention", "--array", "abacus"], "abacus"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(args: list[str], words: str, capsys: Any) -> None:
    assert main(["check", *args]) == 2
    assert words in capsys.readouterr().err


def test_the_command_lists_laws_and_adapters(capsys: Any) -> None:
    assert main(["check", "--list"]) == 0
    out = capsys.readouterr().out
    for name in (*LAWS, *ADAPTERS):
        assert name in out


WITHOUT_HYPOTHESIS = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'hypothesis':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, No())
import arrattn
from arrattn.cli import main
assert 'hypothesis' not in sys.modules
assert main(['check', 'arrattn:attention']) == 2
try:
    import arrattn.testing
except ImportError as error:
    assert 'arrattn[testing]' in str(error)
else:
    raise SystemExit('no error')
"""


def test_only_the_suite_needs_hypothesis() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HYPOTHESIS],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "arrattn[testing]" in done.stderr
