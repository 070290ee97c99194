"""Run the families over growing lengths and measure each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from arrattn._core.typing import Array
from arrattn.bench.families import Family, choose_families, dense
from arrattn.bench.inputs import Inputs, Progress
from arrattn.bench.libraries import Driver
from arrattn.bench.memory import Peak
from arrattn.bench.settings import Settings

__all__ = ["Cell", "held_mass", "mean_of_values", "measure", "relative_error"]

Host = np.ndarray[Any, Any]

ROWS = 1024  # rows compared at a time: the float64 copies stay small


class Cell(NamedTuple):
    """
    One family at one length.

    Attributes
    ----------
    family : str
        Its name.
    length : int
        N.
    times : tuple of float
        Seconds of every timed run, in order.
    compile_seconds : float
        Seconds of compiling, in no run's time; 0 where nothing compiles.
    peak : Peak
        Working memory over inputs and outputs.
    error : float
        Against dense, ``|o - o_dense| / |o_dense|``.
    mass : float or None
        Share of dense attention's probability that the visible keys hold.
    mean_error : float
        What `error` would be for the plain mean of the values that dense sees.
    """

    family: str
    length: int
    times: tuple[float, ...]
    compile_seconds: float
    peak: Peak
    error: float
    mass: float | None
    mean_error: float

    @property
    def median(self) -> float:
        """Median seconds of the timed runs."""
        return median(self.times)


def measure(
    settings: Settings, inputs: Inputs, driver: Driver, progress: Progress
) -> Iterator[Cell]:
    """
    Measure every family at every length, one after the other.

    Parameters
    ----------
    settings : Settings
        What to compare.
    inputs : Inputs
        Queries, keys and values, of which each length takes the first rows.
    driver : Driver
        Of the array library.
    progress : callable
        Told what is being done, and how far.

    Yields
    ------
    Cell
        As soon as it is complete.
    """
    families = choose_families(settings, inputs.q.shape[-1])
    for n in settings.lengths:
        arrays = tuple(driver.put(x[:, :n]) for x in (inputs.q, inputs.k, inputs.v))
        mean = mean_of_values(inputs.v[:, :n], inputs.q.shape[0], causal=settings.causal)
        truth: tuple[Host, ...] | None = None
        if "dense" not in settings.families:
            progress(f"N = {n:,}: dense", "once, to measure errors against")
            call, _ = driver.prepare(dense(settings).call, arrays)
            truth = _fetch(driver, driver.wait(call(*arrays)))
        for family in families:
            timed, outs = _run_one(settings, family, arrays, driver, progress)
            truth = outs if truth is None else truth
            yield Cell(
                family=family.name,
                length=n,
                times=timed.times,
                compile_seconds=timed.compile_seconds,
                peak=timed.peak,
                error=relative_error(outs[0], truth[0]),
                mass=held_mass(outs[1], truth[1]) if len(outs) > 1 else None,
                mean_error=relative_error(mean, truth[0]),
            )


class _Timed(NamedTuple):
    """What the clock and the allocator say of one family at one length."""

    times: tuple[float, ...]
    compile_seconds: float
    peak: Peak


def _run_one(
    settings: Settings,
    family: Family,
    arrays: tuple[Array, ...],
    driver: Driver,
    progress: Progress,
) -> tuple[_Timed, tuple[Host, ...]]:
    """Compile, run once for the values, time, and run once more for the memory."""
    place = f"N = {arrays[0].shape[-2]:,}: {family.name}"
    progress(place, "first run")
    call, compile_seconds = driver.prepare(family.call, arrays)
    outs = _fetch(driver, driver.wait(call(*arrays)))
    times = []
    for i in range(settings.repeat):
        progress(place, f"timed run {i + 1} of {settings.repeat}")
        start = time.perf_counter()
        driver.wait(call(*arrays))
        times.append(time.perf_counter() - start)
    progress(place, "memory")
    return _Timed(tuple(times), compile_seconds, driver.peak(call, arrays)), outs


def mean_of_values(v: Host, heads: int, *, causal: bool) -> Host:
    """
    Average the values that dense attention sees: the answer that knows no query.

    Parameters
    ----------
    v : ndarray, shape (Hkv, N, Dv)
        Values.
    heads : int
        Query heads, a multiple of `Hkv`.
    causal : bool
        Whether a row sees no later value.

    Returns
    -------
    ndarray, shape (heads, N, Dv)
        In float64.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.bench.measure import mean_of_values
    >>> mean_of_values(np.asarray([[[1.0], [3.0]]]), 1, causal=True)[0, :, 0]
    array([1., 2.])
    """
    v = np.repeat(v.astype(np.float64), heads // v.shape[0], axis=0)
    if causal:
        return np.cumsum(v, axis=1) / np.arange(1, v.shape[1] + 1)[:, None]
    return np.broadcast_to(np.mean(v, axis=1, keepdims=True), v.shape)


def relative_error(out: Host, truth: Host) -> float:
    """
    Distance of an output from the true one, relative to the size of the true one.

    Parameters
    ----------
    out : ndarray, shape (..., N, Dv)
        An approximation.
    truth : ndarray, shape (..., N, Dv)
        What it approximates.

    Returns
    -------
    float
        ``|out - truth| / |truth|``, both Frobenius norms in float64; an output of
        zeros has 1.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.bench.measure import relative_error
    >>> relative_error(np.asarray([[3.0, 0.0]]), np.asarray([[3.0, 4.0]]))
    0.8
    """
    difference = size = 0.0
    for start in range(0, out.shape[-2], ROWS):
        rows = slice(start, start + ROWS)
        true = truth[..., rows, :].astype(np.float64)
        difference += float(np.sum((out[..., rows, :].astype(np.float64) - true) ** 2))
        size += float(np.sum(true**2))
    return (difference / size) ** 0.5 if size else float(difference > 0)


def held_mass(lse: Host, dense_lse: Host) -> float:
    r"""
    Share of dense attention's probability that a family's visible keys hold.

    .. math:: \frac{1}{N} \sum_i \sum_{j \in V(i)} \operatorname{softmax}_j(s_i)
              = \frac{1}{N} \sum_i e^{\mathrm{lse}_i - \mathrm{lse}^{\mathrm{dense}}_i}

    Exact, and nothing of size N x N is needed for it.

    Parameters
    ----------
    lse : ndarray, shape (..., N)
        Log-sum-exp of the scores of the visible keys.
    dense_lse : ndarray, shape (..., N)
        Log-sum-exp of the scores of all keys.

    Returns
    -------
    float
        Mean over queries and heads, at most 1 but for rounding.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.bench.measure import held_mass
    >>> held_mass(np.log([[1.0, 3.0]]), np.log([[4.0, 4.0]]))
    0.5
    """
    difference = lse.astype(np.float64) - dense_lse.astype(np.float64)
    return float(np.mean(np.exp(difference)))


def _fetch(driver: Driver, outs: Sequence[Array]) -> tuple[Host, ...]:
    return tuple(driver.fetch(out) for out in outs)
