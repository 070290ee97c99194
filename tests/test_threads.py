"""Threads change speed and nothing else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from arrattn import (
    attention,
    delta_attention,
    get_num_threads,
    linear_attention,
    local_attention,
    set_num_threads,
    sparse_attention,
)
from arrattn._core import threads

FAMILIES: dict[str, Callable[..., Any]] = {
    "dense": attention,
    "local": lambda *a, **o: local_attention(*a, window=(50, 10), **o),
    "sparse": sparse_attention,
    "linear": linear_attention,
    "decayed": lambda *a, **o: linear_attention(*a, log_decay=np.full((4, 1, 1), -0.1), **o),
    "delta": lambda *a, is_causal: delta_attention(*a, beta=np.full((4, 700), 0.01)),
}
families = pytest.mark.parametrize("family", FAMILIES)


def arrays(seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(3, 2, 4, 700, 16)).astype(np.float32)


@families
def test_the_same_bits_for_any_number_of_threads(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for n in (1, 2, 3, 8):
        monkeypatch.setattr(threads, "num_threads", lambda n=n: n)
        results.append(FAMILIES[family](*arrays(), is_causal=True))
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@families
def test_the_same_bits_every_time(family: str) -> None:
    first = FAMILIES[family](*arrays(), is_causal=True)
    for _ in range(3):
        np.testing.assert_array_equal(FAMILIES[family](*arrays(), is_causal=True), first)


@families
def test_several_callers_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "num_threads", lambda: 2)
    expected = [FAMILIES[family](*arrays(seed), is_causal=True) for seed in range(4)]
    got: dict[int, Any] = {}
    start = threading.Barrier(4)

    def call(seed: int) -> None:
        start.wait()
        got[seed] = FAMILIES[family](*arrays(seed), is_causal=True)

    callers = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for seed in range(4):
        np.testing.assert_array_equal(got[seed], expected[seed])


def test_an_error_in_a_job_reaches_the_caller_and_later_calls_work() -> None:
    done: list[int] = []

    def fail() -> None:
        msg = "on purpose"
        raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="on purpose"):
        threads.run_jobs([fail, *(lambda n=n: done.append(n) for n in range(20))])
    threads.run_jobs([lambda: done.append(-1)])
    assert done[-1] == -1


def test_by_default_as_many_threads_as_processors_that_may_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ARRATTN_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5, 7, 11}, raising=False)
    assert get_num_threads() == 5


def test_blas_is_given_back_when_the_last_of_the_calls_that_overlap_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    many = [4]
    settings = lambda: [(lambda: many[-1], many.append)]  # noqa: E731
    monkeypatch.setattr(threads, "_blas_settings", settings)
    blas = threads._Blas()
    with blas.held():
        assert many == [4, 1]
        with blas.held():
            pass
        assert many == [4, 1]
    assert many == [4, 1, 4]


def test_jobs_within_jobs_finish() -> None:
    done: list[int] = []
    inner = [lambda n=n: done.append(n) for n in range(5)]
    threads.run_jobs([lambda: threads.run_jobs(inner) for _ in range(8)])
    assert sorted(done) == sorted(list(range(5)) * 8)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be placed")
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_each_thread_has_processors_of_its_own(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = threads._Pool(workers)
    gate = threading.Barrier(workers, timeout=60)
    for future in [pool.executor.submit(gate.wait) for _ in range(workers)]:
        future.result()
    mine = os.sched_getaffinity(0)
    for allowed in ({5}, {0, 1}, {1, 4, 6, 7}):
        placed: dict[int, set[int]] = {}
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        monkeypatch.setattr(
            os, "sched_setaffinity", lambda i, on, placed=placed: placed.update({i: set(on)})
        )
        pool.place()
        assert sorted(placed) == sorted(pool.ids)
        assert set().union(*placed.values()) == set(sorted(allowed)[:workers]) | (
            allowed if workers < len(allowed) else set()
        )
        shared = sum(len(on) for on in placed.values())
        assert shared == max(workers, len(allowed))  # disjoint, as far as they go
        placed.clear()
        pool.place()
        assert not placed  # nothing has changed since
    monkeypatch.undo()
    assert os.sched_getaffinity(0) == mine


def test_the_caller_waits_while_others_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "num_threads", lambda: 2)
    ran: list[int] = []
    threads.run_jobs([lambda: ran.append(threading.get_ident())] * 4)
    assert len(ran) == 4
    assert threading.get_ident() not in ran
    threads.run_jobs([lambda: ran.append(threading.get_ident())])  # one job is nothing to share
    assert ran[-1] == threading.get_ident()


def test_a_call_does_not_wait_for_the_jobs_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "num_threads", lambda: 2)
    running, go = threading.Barrier(3, timeout=60), threading.Event()
    told: list[bool] = []

    def long() -> None:
        running.wait()
        told.append(go.wait(20))

    other = threading.Thread(target=threads.run_jobs, args=([long, long],))
    other.start()
    running.wait()  # both threads of the pool are taken
    done: list[int] = []
    threads.run_jobs([lambda: done.append(1)] * 4)
    assert len(done) == 4
    go.set()
    other.join()
    assert told == [True, True]


def test_jobs_see_the_threads_of_their_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARRATTN_NUM_THREADS", raising=False)
    n = get_num_threads()  # as many as processors, of which helpers are kept off one
    seen: list[int] = []
    gate = threading.Barrier(n, timeout=60)

    def job() -> None:
        gate.wait()
        seen.append(get_num_threads())

    for _ in range(3):
        threads.run_jobs([job] * n)
    assert seen == [n] * 3 * n


def test_a_system_that_lets_no_thread_be_placed_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(threads, "_pool", threads._Pool)
    monkeypatch.setattr(os, "sched_setaffinity", refuse, raising=False)
    done: list[int] = []
    for _ in range(2):
        threads.run_jobs([lambda: done.append(1)] * 4)
    assert len(done) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform cannot fork")
def test_a_forked_child_can_compute() -> None:
    program = """
import os, numpy as np
from arrattn import attention
x = np.ones((4, 600, 8))
attention(x, x, x)
child = os.fork()
if child == 0:
    attention(x, x, x)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


def test_the_number_of_threads_is_set_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRATTN_NUM_THREADS", "5")
    assert get_num_threads() == 5
    with set_num_threads(3):
        assert get_num_threads() == 3
        with set_num_threads(None):
            assert get_num_threads() == 5
        assert get_num_threads() == 3
    assert get_num_threads() == 5
    with contextlib.suppress(ZeroDivisionError), set_num_threads(2):
        _ = 1 / (get_num_threads() - 2)
    assert get_num_threads() == 5
    set_num_threads(4)
    try:
        assert get_num_threads() == 4
    finally:
        set_num_threads(None)


@pytest.mark.parametrize(
    ("n", "kind"), [(0, ValueError), (-2, ValueError), (True, TypeError), (1.0, TypeError)]
)
def test_a_wrong_number_of_threads_is_refused(n: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="n: expected"):
        set_num_threads(n)


def blas_threads() -> list[int]:
    return [info["num_threads"] for info in threadpoolctl.threadpool_info()]


def test_blas_is_held_while_jobs_run_and_then_restored() -> None:
    threads._blas_settings.cache_clear()  # other tests may have loaded one since
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        seen: list[list[int]] = []

        def job() -> None:
            seen.append(blas_threads())

        threads.run_jobs([job, job])
        blas = [i["user_api"] == "blas" for i in threadpoolctl.threadpool_info()]
        for counts in seen:
            assert all(n == 1 for n, held in zip(counts, blas, strict=True) if held)
        assert blas_threads() == before

        def interrupted() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            threads.run_jobs([interrupted])
        assert blas_threads() == before
