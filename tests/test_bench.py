"""`arrattn bench`: its arithmetic and its words, from numbers that no clock decides."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from arrattn import cli, patterns
from arrattn.bench import contest, limits, peers, product, report, rounds, speed
from arrattn.bench.cases import CASES, GROUPS, Limit, Pair
from arrattn.bench.contest import Job, LeftOut, Result, choose_jobs, run_job
from arrattn.bench.contestant import Contestant
from arrattn.bench.problem import Problem, difference, visible_pairs
from arrattn.bench.product import Product, find_product, one_blas_thread, product_contestant
from arrattn.bench.rounds import Spread, ratios, settle, spread_of, take_turns

SMALL = Product((8, 8, 8), 1, 1)
FULL, CAUSAL = Problem(n=24), Problem(n=24, causal=True)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns of one call, no waiting: how long something takes is not looked at."""
    monkeypatch.setattr(rounds, "LEAST", 1e-9)
    monkeypatch.setattr(product, "LEAST", 1e-9)
    monkeypatch.setattr(rounds, "settle", lambda: None)
    monkeypatch.setattr(product, "BURST", 1e-6)
    monkeypatch.setattr(speed, "find_product", lambda: SMALL)


class Machine:
    """A clock that only work moves, at a speed that may change."""

    def __init__(self, speed_at: Callable[[float], float] = lambda _: 1.0) -> None:
        self.now, self.speed_at = 0.0, speed_at
        self.order: list[str] = []

    def clock(self) -> float:
        return self.now

    def worker(self, name: str, seconds: float, factor: float = 1.0) -> Contestant:
        def call() -> None:
            self.order.append(name)
            self.now += seconds / self.speed_at(self.now)

        return Contestant(name, call, factor=factor)


# --- what is counted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 0), (2, 5), (40, 40)])
@pytest.mark.parametrize("shared", [0, 1, 4])
@pytest.mark.parametrize(("queries", "n"), [(None, 17), (1, 9), (6, 20), (20, 6), (None, 0)])
def test_operations_are_those_of_the_visible_pairs(
    causal: bool, window: tuple[int, int] | None, shared: int, queries: int | None, n: int
) -> None:
    problem = Problem(n=n, queries=queries, causal=causal, window=window, shared=shared)
    problem = problem._replace(batch=3, heads=4, width=5)
    seen = np.ones((problem.nq, n), dtype=bool)
    if causal:
        seen &= patterns.Causal().table(problem.nq, n)
    if window is not None:
        near = patterns.Window(*window) | patterns.Global(shared)
        seen &= near.table(problem.nq, n)
    assert visible_pairs(problem) == np.count_nonzero(seen)
    assert problem.operations() == 4 * 5 * 3 * 4 * np.count_nonzero(seen)


def test_a_product_counts_its_own_operations() -> None:
    assert Product((2, 3, 5), 7, 2).operations == 2 * 2 * 3 * 5 * 7 * 2
    assert Product((4, 2, 3, 5), 7, 2).operations == 4 * Product((2, 3, 5), 7, 2).operations
    product_contestant(Product((4, 2, 3, 5), 7, 2), 1).call()
    contestant = product_contestant(SMALL, 10 * SMALL.operations)
    assert contestant.factor == 10
    contestant.call()


def test_the_best_product_is_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    best = product.SHAPES[2]

    def time(one: Product, clock: object) -> float:
        del clock
        return one.operations / (4e10 if one.shape == best else 2e10)

    monkeypatch.setattr(product, "_time", time)
    found = find_product()
    assert found.shape == best
    assert found.repeats == round(product.BURST * 4e10 / found._replace(repeats=1).operations)


def test_blas_is_held_to_one_thread_and_given_back() -> None:
    def threads() -> list[int]:
        return [x["num_threads"] for x in threadpool_info() if "numpy" in x["filepath"]]

    before = threads()
    with one_blas_thread():
        assert set(threads()) <= {1}
    assert threads() == before
    assert product.blas()


@pytest.mark.parametrize(
    ("found", "name", "said"),
    [
        (["AVX2", "X86_V4"], "openblas 0.3.31 Haswell", True),
        (["AVX512_SKX"], "openblas 0.3.31 Zen", True),
        (["AVX512_SKX"], "openblas 0.3.31 SkylakeX", False),
        (["AVX2", "X86_V3"], "openblas 0.3.31 Haswell", False),
        (["AVX512_SKX"], "accelerate", False),
    ],
)
def test_it_is_said_where_blas_leaves_instructions_unused(
    found: list[str], name: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"found": found}})
    monkeypatch.setattr(report, "blas", lambda: name)
    lines = report.notes([], [], peers=True, product=SMALL)
    assert any("OPENBLAS_CORETYPE" in line for line in lines) is said


def test_threads_are_the_same_for_all_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("ARRATTN_NUM_THREADS", "1")
    affinity = getattr(os, "sched_getaffinity", lambda _: {0})
    before = affinity(0)
    threads = torch.get_num_threads()
    with speed.same_threads(peers=True):
        assert torch.get_num_threads() == 1
        assert len(affinity(0)) == 1
    assert affinity(0) == before
    assert torch.get_num_threads() == threads


# --- turns


def test_turns_alternate_and_ratios_are_those_of_the_work() -> None:
    machine = Machine()
    ours, theirs = machine.worker("ours", 1.0), machine.worker("theirs", 3.0)
    times = take_turns([ours, theirs], rounds=4, clock=machine.clock, pause=lambda: None)
    assert times == [[1.0] * 4, [3.0] * 4]
    assert ratios(*times) == [3.0] * 4
    rest = machine.order[-8:]
    assert rest == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]


def test_short_calls_are_repeated_and_factors_apply() -> None:
    machine = Machine()
    work = [machine.worker("ours", 1e-3), machine.worker("product", 2.0, factor=0.25)]
    times = take_turns(work, rounds=2, clock=machine.clock, pause=lambda: None)
    assert times[0] == pytest.approx([1e-3] * 2)
    assert times[1] == pytest.approx([0.5] * 2)
    # Two to estimate and three for a short one, then in each round one to wake up, five timed.
    assert machine.order.count("ours") == 1 + 1 + 3 + 2 * 6
    assert machine.order.count("product") == 1 + 1 + 2


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    machine = Machine(lambda now: 1.0 if now < 40 else 0.3)
    work = [machine.worker("ours", 1.0), machine.worker("theirs", 2.0)]
    times = take_turns(work, rounds=20, clock=machine.clock, pause=lambda: None)
    assert max(times[0]) > 3 * min(times[0])
    assert spread_of(ratios(*times)).median == pytest.approx(2.0)
    one_after_the_other = np.median(times[1][10:]) / np.median(times[0][:10])
    assert one_after_the_other > 6


@pytest.mark.parametrize(
    ("estimates", "asked", "fewest", "expected"),
    [
        ([1.0, 1.0], None, 5, 5),
        ([1.0, 1.0], None, 3, 3),
        ([0.11, 0.1], None, 5, 21),
        ([0.2, 0.2], None, 5, 12),
        ([9.0, 9.0], 2, 5, 2),
    ],
)
def test_rounds_follow_the_time(
    estimates: list[float], asked: int | None, fewest: int, expected: int
) -> None:
    plan = rounds.plan_rounds(estimates, [0.0, 0.0], rounds=asked, fewest=fewest)
    assert plan.rounds == expected
    assert plan.repeats == (1, 1)


def test_settling_waits_for_idle_threads_and_not_for_ever() -> None:
    now = {"wall": 0.0, "cpu": 0.0}

    def sleeper(busy_for: float) -> Callable[[float], None]:
        def sleep(seconds: float) -> None:
            now["wall"] += seconds
            now["cpu"] += seconds if now["wall"] <= busy_for else 0.0

        return sleep

    # A kernel adds the time of a thread that spins at its ticks, which may be 10 ms apart.
    for tick in (1e-6, 0.01):
        for busy, low, high in ((0.0, 0.0, 0.03), (0.05, 0.04, 0.08), (9.0, 0.1, 2.0)):
            now.update(wall=0.0, cpu=0.0)

            def cpu(tick: float = tick) -> float:
                return now["cpu"] // tick * tick

            settle(cpu=cpu, clock=lambda: now["wall"], sleep=sleeper(busy))
            assert low <= now["wall"] <= high


# --- the table of cases


def test_the_table_is_consistent() -> None:
    names = [(c.group, c.what, c.peer if isinstance(c, Pair) else None) for c in CASES]
    assert len(set(names)) == len(names)
    assert {case.group for case in CASES} == set(GROUPS)
    for case in CASES:
        if isinstance(case, Pair):
            assert case.peer in {*peers.PEERS, "product"}
            assert case.targets
            assert all(target is None or target > 0 for target in case.targets.values())
            # What is counted is what both compute: the visible pairs.
            assert case.alike or not case.counted


def test_lengths_and_peers_choose_the_jobs() -> None:
    def peers_of(jobs: Sequence[Job]) -> set[str]:
        return {job.peer.name for job in jobs if job.peer is not None}

    everything = list(choose_jobs(GROUPS, (), peers=True))
    own = list(choose_jobs(GROUPS, (), peers=False))
    assert len(everything) > len(own) > 0
    assert peers_of(own) == {
        "matrix products", "arrattn dense", "arrattn float32", "arrattn local, the window alone",
        "plain NumPy", "arrattn linear", "NumPy, step by step",
    }  # fmt: skip
    local = list(choose_jobs(("local",), (), peers=True))
    assert {job.case.group for job in local} == {"local"}
    assert {n for job in local for n in job.lengths} == {8192, 16384, 32768}
    assert {job.lengths for job in choose_jobs(("dense",), (7,), peers=True)} == {(7,)}
    memory = [j for j in choose_jobs(("overhead",), (7, 9), peers=False) if "memory" in j.words]
    assert [job.lengths for job in memory] == [(7,), (9,)] * 4
    scaling = list(choose_jobs(("scaling",), (7, 9), peers=False))
    assert {job.lengths for job in scaling} == {(7, 9)}


PAIRS = [job for job in choose_jobs(GROUPS, (24,), peers=True) if isinstance(job.case, Pair)]


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("job", PAIRS, ids=lambda job: job.words)
def test_every_pair_is_built_and_agrees(
    job: Job, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("torch") is not None:
        import torch

        monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    outcome = run_job(job, SMALL, 1)
    if isinstance(outcome, LeftOut):
        if "not installed" in outcome.why or "sparse_attention: select" in outcome.why:
            pytest.skip(outcome.why)
        pytest.fail(outcome.why)
    assert isinstance(job.case, Pair)
    assert (outcome.apart is not None) == (job.case.alike and job.case.peer != "product")
    assert not outcome.differs, f"{outcome.apart} > {outcome.tolerance}"
    assert outcome.met is None  # there is no target at this length
    assert len(outcome.values) == 1
    assert outcome.spread.median > 0


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_peer_that_computes_something_else_is_no_result(
    name: str, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(problem: Problem, arrays: Any) -> Contestant:
        right = peers.numpy_plain(problem, arrays)
        return right._replace(call=lambda: right.call() * np.float32(1.001))

    monkeypatch.setitem(peers.PEERS, name, peers.PEERS[name]._replace(build=wrong, packages=()))
    pair = next(c for c in CASES if isinstance(c, Pair) and c.peer == name)
    outcome = run_job(Job(pair._replace(targets={24: 1e-9}), (24,)), SMALL, 1)
    assert isinstance(outcome, Result)
    assert outcome.differs
    assert outcome.met is None
    (row,) = report.rows([outcome])
    assert row[3] == "no result: they differ"
    assert row[-1] == "1e-09: no result"
    notes = report.notes([outcome], [], peers=True, product=SMALL)
    assert any(line.startswith("THEY DIFFER") for line in notes)


def test_difference_sees_shapes_and_nan() -> None:
    x = np.zeros((2, 3))
    assert difference(x, x + 0.5) == 0.5
    assert difference(x, x[:1]) == float("inf")
    assert difference(x, x + np.nan) == float("inf")


def test_a_peer_that_fails_does_not_end_the_others(
    fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(problem: Problem, arrays: Any) -> Contestant:
        msg = "no compiler here\nand more"
        raise OSError(msg)

    monkeypatch.setitem(peers.PEERS, "numpy", peers.PEERS["numpy"]._replace(build=fail))
    pair = next(c for c in CASES if isinstance(c, Pair) and c.peer == "numpy")
    outcome = run_job(Job(pair, (24,)), SMALL, 1)
    assert isinstance(outcome, LeftOut)
    assert outcome.why == "OSError: no compiler here"


# --- limits


def test_exponents_round_by_round() -> None:
    times = [[3.0 * n**power for power in (1.0, 1.5, 2.0)] for n in (10, 100, 400)]
    found = limits.exponents_of((10, 100, 400), times)
    assert found == pytest.approx((1.0, 1.5, 2.0))


LIMITS = [job for job in choose_jobs(GROUPS, (8, 16), peers=False) if isinstance(job.case, Limit)]


@pytest.mark.parametrize("job", LIMITS, ids=lambda job: job.words)
def test_every_limit_is_measured(job: Job, fast: None) -> None:
    outcome = run_job(job, SMALL, 1)
    assert isinstance(outcome, Result)
    assert len(outcome.values) == 1
    assert np.isfinite(outcome.values[0])
    if job.case.group == "scaling":
        assert list(outcome.times) == ["8", "16"]


def test_an_exponent_needs_two_lengths() -> None:
    limit = next(c for c in CASES if isinstance(c, Limit) and c.group == "scaling")
    outcome = run_job(Job(limit, (8,)), SMALL, 1)
    assert isinstance(outcome, LeftOut)
    assert outcome.why == "an exponent needs two lengths"


def test_targets_hold_at_their_own_lengths() -> None:
    def measure(lengths: tuple[int, ...], rounds: int | None) -> limits.Measured:
        del lengths, rounds
        return limits.Measured((1.0, 3.0, 2.0))

    limit = Limit("overhead", "x", measure, "ms", 2.5, (4, 8), each=True)
    for lengths, met in (((4,), True), ((5,), None)):
        outcome = run_job(Job(limit, lengths), SMALL, None)
        assert isinstance(outcome, Result)
        assert outcome.spread == Spread(2.0, 1.0, 3.0)
        assert outcome.met is met


# --- words


def made(case: Pair | Limit, n: int, *values: float, **other: Any) -> Result:
    target = case.target if isinstance(case, Limit) else case.targets.get(n)
    return Result(Job(case, (n,)), spread_of(values), target, values=list(values), **other)


DENSE = Pair("dense", "full", contest.ours.dense, "torch", FULL, {1024: 0.95, 2048: 1.05})
IMPORT = Limit("overhead", "import", limits.import_time, "ms", 40.0)


def test_rows_say_the_target_and_whether_it_was_met() -> None:
    met, missed, free, low, high = report.rows(
        [
            made(DENSE, 1024, 0.9, 0.96, 1.2, fraction=Spread(0.8, 0.7, 0.9)),
            made(DENSE, 2048, 1.04),
            made(DENSE, 4096, 123.4, 0.012),
            made(IMPORT, 1, 40.0, 39.0, 41.0),
            made(IMPORT, 1, 40.5),
        ]
    )
    assert met == (
        "dense: full", "1,024", "torch SDPA", "0.96", "0.90 to 1.20", "0.80", "0.95: met"
    )  # fmt: skip
    assert missed[3:] == ("1.04", "-", "-", "1.05: missed")
    assert free[4:] == ("0.012 to 123", "-", "-")
    assert low[2:] == ("-", "40.0 ms", "39.0 to 41.0", "-", "at most 40 ms: met")
    assert high[-1] == "at most 40 ms: missed"
    told = report.told(made(DENSE, 1024, 0.9, 0.96, 1.2, fraction=Spread(0.8, 0.7, 0.9)))
    assert told == (
        "0.96 (0.90 to 1.20), 0.80 of the matrix product rate, target 0.95: met"
    )  # fmt: skip


def run_bench(*options: str) -> int:
    return cli.main(["bench", *options])


def test_missing_peers_are_named(
    fast: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run_bench("decode", "local", "--peers", "--lengths", "24", "--rounds", "1") == 0
    out, err = capsys.readouterr()
    assert "left out (not installed: pip install torch): decode: one query" in out
    assert "left out (not installed: pip install local-attention): local: window" in out
    assert "matrix products" in out
    assert "1 of 7: decode: one query, 8 heads on 2, N 24 against matrix products" in err


def test_json_table_and_picture(
    fast: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    record, picture = tmp_path / "x.json", tmp_path / "x.png"
    files = ["--json", str(record), "--plot", str(picture)]
    options = ["scaling", "overhead", "local", "--lengths", "16,24", "--rounds", "2"]
    assert run_bench(*options, *files) == 0
    out = capsys.readouterr().out
    table = [line for line in out.splitlines() if line.startswith("| ")]
    assert table[0].startswith("| case ")
    assert len({line.count("|") for line in table}) == 1
    assert "not asked for: --peers" in out
    assert f"numpy {np.__version__}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(record.read_text())
    assert set(data) == {
        "interrupted", "peers", "versions", "machine", "product", "cases", "left_out"
    }  # fmt: skip
    assert data["versions"]["numpy"] == np.__version__
    assert data["machine"]["threads"] == SMALL.threads
    assert len(data["cases"]) == len(table) - 2
    pair = next(case for case in data["cases"] if case["against"] == "plain NumPy")
    assert set(pair) == {
        "group", "case", "lengths", "against", "unit", "values", "median", "low", "high",
        "of_matmul_rate", "target", "met", "apart", "tolerance", "differ", "times",
    }  # fmt: skip
    assert set(pair["times"]) == {"arrattn dense", "plain NumPy", "matrix product"}
    assert {len(times) for times in pair["times"].values()} == {2}
    ours, theirs = pair["times"]["arrattn dense"], pair["times"]["plain NumPy"]
    assert pair["values"] == ratios(ours, theirs)
    assert pair["median"] == np.median(pair["values"])
    assert 0 <= pair["apart"] <= pair["tolerance"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["spares"], "got 'spares' (did you mean sparse?)"),
        (["dense", "quadratic"], "expected groups from dense, decode, local, sparse, linear, "),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: there is no folder"),
        (["--plot", "x.xyz"], "no picture can be written as .xyz"),
        (["--plot", "x.png", "--json", "x.png"], "would be written to the same file"),
    ],
)
def test_what_cannot_run_is_said(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_bench(*options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("arrattn bench: ")
    assert said in err
    assert not out


def test_a_bad_number_of_threads_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARRATTN_NUM_THREADS", "many")
    assert run_bench("dense") == 2
    assert "ARRATTN_NUM_THREADS: expected a positive integer, got 'many'" in capsys.readouterr().err


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_keeps_what_is_done(
    after: int,
    fast: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    done: list[Job] = []

    def stop(job: Job, *rest: Any) -> Result | LeftOut:
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(job)
        return made(DENSE, 1024, 1.5)

    monkeypatch.setattr(speed, "run_job", stop)
    record = tmp_path / "x.json"
    assert run_bench("dense", "--json", str(record)) == 130
    out, err = capsys.readouterr()
    if after:
        assert out.count("dense: full") == 2
        assert "Interrupted" in out
        assert json.loads(record.read_text())["interrupted"] is True
    else:
        assert "before anything was measured" in err
        assert not record.exists()


def test_a_wide_terminal_gets_richs_table(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    from rich import console

    written = console.Console(record=True, force_terminal=True, width=150)
    monkeypatch.setattr(console, "Console", lambda **_: written)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    report.show([made(DENSE, 1024, 0.9, 0.96, 1.2), made(DENSE, 2048, 1.0)], markdown=False)
    text = written.export_text()
    assert "0.95: met" in text
    assert "1.05: missed" in text


def test_markdown_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report.show([made(DENSE, 1024, 0.96)], markdown=True)
    head, rule, row = capsys.readouterr().out.splitlines()
    assert [title.strip() for title in head.strip("|").split("|")] == list(report.HEAD)
    assert set(rule) == set("| -")
    assert row.startswith("| dense: full | 1,024 | torch SDPA | 0.96 ")
