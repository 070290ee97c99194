"""
Peak of working memory over inputs and outputs: one way for each kind of library.

Every way counts what the library asks its allocator for, none reads the size of the
process: memory that an allocator keeps back for later would hide the peak of the next
run. Where there is no honest count, the answer is None, with the reason.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from arrattn._core.typing import Array, Namespace

__all__ = [
    "Peak",
    "cupy_hooked",
    "highest",
    "jax_planned",
    "torch_counted",
    "torch_profiled",
    "traced",
]

Run = Callable[[], tuple[Array, ...]]


class Peak(NamedTuple):
    """
    A peak of memory and how it was found.

    Attributes
    ----------
    size : int or None
        Bytes; None where it cannot be found honestly.
    how : str
        How it was found, or why not.
    """

    size: int | None
    how: str


def traced(run: Run) -> Peak:
    """
    What Python and NumPy allocate, by ``tracemalloc``.

    Parameters
    ----------
    run : callable
        Computes and returns the outputs.

    Returns
    -------
    Peak
        Without the outputs; the inputs exist before.
    """
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        outs = run()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        if not already:
            tracemalloc.stop()
    return Peak(max(peak - before - _outputs(outs), 0), "tracemalloc")


def torch_profiled(run: Run) -> Peak:
    """
    What torch's CPU allocator hands out, from the profiler's events.

    Parameters
    ----------
    run : callable
        Computes and returns the outputs.

    Returns
    -------
    Peak
        Without the outputs; the inputs exist before.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        outs = run()
    results = getattr(profiled.profiler, "kineto_results", None)
    if results is None:
        return Peak(None, "this version of torch does not list its allocations")
    events = [event for event in results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak = highest(event.nbytes() for event in events)
    return Peak(max(peak - _outputs(outs), 0), "torch profiler")


def torch_counted(run: Run, device: Any) -> Peak:
    """
    What torch's CUDA allocator hands out, by its own counter.

    Parameters
    ----------
    run : callable
        Computes and returns the outputs.
    device : torch.device
        The device.

    Returns
    -------
    Peak
        Without the outputs; the inputs exist before.
    """
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outs = run()
    peak = torch.cuda.max_memory_allocated(device) - before - _outputs(outs)
    return Peak(max(peak, 0), "torch.cuda.max_memory_allocated")


def jax_planned(compiled: Any) -> Peak:
    """
    The temporary buffers that XLA plans for a compiled function.

    Parameters
    ----------
    compiled : jax.stages.Compiled
        The compiled function.

    Returns
    -------
    Peak
        Inputs and outputs are buffers of their own, not counted here.
    """
    analysis = compiled.memory_analysis()
    planned = getattr(analysis, "temp_size_in_bytes", None)
    if planned is None:
        return Peak(None, "XLA does not tell its plan on this device")
    return Peak(int(planned), "planned by XLA")


def cupy_hooked(run: Run, cupy: Namespace) -> Peak:
    """
    What CuPy's memory pool hands out, by a hook on it.

    Parameters
    ----------
    run : callable
        Computes and returns the outputs.
    cupy : module
        The library.

    Returns
    -------
    Peak
        Without the outputs; the inputs exist before.
    """
    sizes: list[int] = []

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]  # CuPy is untyped
        name = "arrattn"

        def malloc_postprocess(self, **event: int) -> None:
            sizes.append(event["mem_size"])

        def free_postprocess(self, **event: int) -> None:
            sizes.append(-event["mem_size"])

    with Hook():
        outs = run()
    return Peak(max(highest(sizes) - _outputs(outs), 0), "hook on CuPy's memory pool")


def highest(changes: Iterable[int]) -> int:
    """
    Highest running total of allocations (positive) and releases (negative).

    Parameters
    ----------
    changes : iterable of int
        In the order of time.

    Returns
    -------
    int
        At least 0.

    Examples
    --------
    >>> from arrattn.bench.memory import highest
    >>> highest([5, -2, 4, -7])
    7
    """
    total = top = 0
    for change in changes:
        total += change
        top = max(top, total)
    return top


def _outputs(outs: Iterable[Array]) -> int:
    return sum(int(out.nbytes) for out in outs if hasattr(out, "nbytes"))
