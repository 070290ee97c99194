"""
Threads for NumPy: how many there are, what they run, and a BLAS that starts none of its own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import lru_cache

import numpy as np
from threadpoolctl import ThreadpoolController

#: Multiplications below which OpenBLAS keeps a product on one thread.
SMALL = 1 << 18


class _Here(threading.local):
    """What is true of the thread that asks."""

    #: Jobs that it is within, one in the other.
    depth = 0

    #: What `num_threads` says within them; None where they do not decide it.
    threads: int | None = None


here = _Here()

#: What `set_num_threads` was given.
_asked: int | None = None


def num_threads() -> int:
    """Worker threads: as set, ``ARRATTN_NUM_THREADS``, or the processors this process may use."""
    if _asked is not None:
        return _asked
    if here.threads:  # a job's own processors may be fewer
        return here.threads
    asked = os.environ.get("ARRATTN_NUM_THREADS", "")
    if not asked:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not asked.isdecimal() or int(asked) < 1:
        msg = f"ARRATTN_NUM_THREADS: expected a positive integer, got {asked!r}"
        raise ValueError(msg)
    return int(asked)


def ask_num_threads(n: int | None) -> int | None:
    """Set the number of worker threads, None for the default; returns what was set before."""
    global _asked
    before, _asked = _asked, n
    return before


class _Blas:
    """
    Holds BLAS to one thread while any of our pools runs, and gives back what was set before.

    The setting belongs to the process, so calls that overlap share it: the first to come
    sets it, the last to go restores it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before: list[tuple[Callable[[int], None], int]] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        with self.lock:
            if self.users == 0:
                self.before = [
                    (put, many) for get, put in _blas_settings() if (many := get()) not in (None, 1)
                ]
                for put, _ in self.before:
                    put(1)
            self.users += 1
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self.restore()

    def restore(self) -> None:
        """Give back what was set before."""
        for put, many in self.before:
            put(many)


@lru_cache(maxsize=1)
def _blas_settings() -> list[tuple[Callable[[], int | None], Callable[[int], None]]]:
    """How to read and to set the number of threads of each BLAS that is loaded."""
    # threadpoolctl lets only the thread that made a setting change it again, which calls that
    # overlap cannot keep to; the function under that rule has none.
    return [
        (
            library.get_num_threads,
            getattr(library, "_real_set_num_threads", library.set_num_threads),
        )
        for library in ThreadpoolController().select(user_api="blas").lib_controllers
    ]


class _Pool:
    """
    Threads that do the jobs of a caller that waits, each on processors of its own.

    Linux wakes a thread where the one that woke it is; where few processors share a cache it
    may leave both there for longer than a call takes, and others idle.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.ids: list[int] = []
        self.placed: tuple[set[int], int] | None = None
        self.executor = ThreadPoolExecutor(
            threads, "arrattn", initializer=lambda: self.ids.append(threading.get_native_id())
        )

    def place(self) -> None:
        """Share out among them the processors that the calling thread may use."""
        if not hasattr(os, "sched_setaffinity"):
            return
        allowed, ids = os.sched_getaffinity(0), self.ids.copy()
        if (allowed, len(ids)) == self.placed:
            return
        order = sorted(allowed)
        for n, thread in enumerate(ids):
            with suppress(OSError):  # a thread that is gone, or a system that forbids it
                os.sched_setaffinity(thread, order[n % len(order) :: self.threads])
        self.placed = allowed, len(ids)


@lru_cache(maxsize=4)
def _pool(threads: int) -> _Pool:
    return _Pool(threads)


_blas = _Blas()


def _after_fork() -> None:
    # A child process has none of its parent's threads, and may have copied a held lock.
    global _blas  # noqa: PLW0603
    _pool.cache_clear()
    if _blas.users:
        _blas.restore()
    _blas = _Blas()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run_jobs(jobs: Sequence[Callable[[], None]], *, small: bool = False) -> None:
    """
    Run independent jobs, each with a single-threaded BLAS, on the threads of the pool.

    `small` jobs, whose products BLAS would not spread over threads anyway, are run as they are.

    What a job computes does not depend on who runs it, so results are the same bits for any
    number of threads. The first exception is raised, once every worker has stopped.
    """
    if small:
        _run_all(iter(jobs), None)
        return
    queue = iter(jobs)
    take = threading.Lock()

    def shared() -> Iterator[Callable[[], None]]:
        while True:
            with take:
                job = next(queue, None)
            if job is None:
                return
            yield job

    with _blas.held():
        threads = num_threads()
        many, pool = min(threads, len(jobs)), _pool(threads)
        # A caller works, too, where it would else wait for others' jobs, or as one for itself.
        works = many < 2 or here.depth > 0 or _blas.users > 1
        if not works:
            pool.place()
        futures = [pool.executor.submit(_run_all, shared(), threads) for _ in range(many - works)]
        try:
            if works:
                _run_all(shared(), threads)
            else:
                wait(futures, return_when=FIRST_COMPLETED)  # no job is left, or one failed
        finally:
            with take:
                queue = iter(())
            # A thread that has not begun by now has nothing to do, and waiting for it could be
            # waiting for oneself, where jobs run jobs.
            futures = [future for future in futures if not future.cancel()]
            for future in futures:
                future.exception()
        for future in futures:
            future.result()


def _run_all(jobs: Iterator[Callable[[], None]], threads: int | None) -> None:
    """Run jobs one after the other; `num_threads` in them is `threads`, unless that is None."""
    depth, before = here.depth, here.threads
    here.depth, here.threads = depth + 1, threads or before
    try:
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            for job in jobs:
                job()
    finally:
        here.depth, here.threads = depth, before
