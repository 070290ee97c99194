"""How much memory a call takes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

__all__ = ["peaks"]

TRIES = 3


def peaks(call: Callable[[], Any]) -> list[int]:
    """
    Measure the memory that a call takes, beyond what was there before it.

    Parameters
    ----------
    call : callable
        It is called without arguments, first to warm up and then three times.

    Returns
    -------
    list of int
        The largest number of bytes at once in each of the three, the result included: what
        Python and NumPy allocate, by `tracemalloc`.
    """
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start()
    try:
        call()
        return [_peak(call) for _ in range(TRIES)]
    finally:
        if not already:
            tracemalloc.stop()


def _peak(call: Callable[[], Any]) -> int:
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    call()
    _, most = tracemalloc.get_traced_memory()
    return most - before
