"""What the measured numbers say: exponents, speed-ups, and a few sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from arrattn.bench.measure import Cell

__all__ = ["exponents", "fit_exponent", "sentences", "speedup", "times_as_fast"]


def fit_exponent(lengths: Sequence[int], seconds: Sequence[float]) -> float | None:
    """
    Fit the power of N that times grow with, by least squares on the logarithms.

    Parameters
    ----------
    lengths : sequence of int
        Lengths N.
    seconds : sequence of float
        Times at those lengths.

    Returns
    -------
    float or None
        The exponent; None where there are fewer than two lengths.

    Examples
    --------
    >>> from arrattn.bench.findings import fit_exponent
    >>> fit_exponent([1, 2, 4], [3.0, 12.0, 48.0])
    2.0
    """
    if len(set(lengths)) < 2:
        return None
    x = [math.log(n) for n in lengths]
    y = [math.log(t) for t in seconds]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return slope / sum((a - middle) ** 2 for a in x)


def exponents(cells: Sequence[Cell]) -> dict[str, float | None]:
    """
    Fit the exponent of every family's median times.

    Parameters
    ----------
    cells : sequence of Cell
        What has been measured.

    Returns
    -------
    dict of str to (float or None)
        By family, in the order of the cells.
    """
    names = dict.fromkeys(cell.family for cell in cells)
    mine = {name: [cell for cell in cells if cell.family == name] for name in names}
    return {
        name: fit_exponent([cell.length for cell in own], [cell.median for cell in own])
        for name, own in mine.items()
    }


def speedup(cell: Cell, cells: Sequence[Cell]) -> float | None:
    """
    How many times as fast as dense a family is at one length.

    Parameters
    ----------
    cell : Cell
        The family at that length.
    cells : sequence of Cell
        All cells.

    Returns
    -------
    float or None
        Ratio of median times; None where dense was not timed.
    """
    for other in cells:
        if other.family == "dense" and other.length == cell.length:
            return other.median / cell.median
    return None


def sentences(cells: Sequence[Cell]) -> list[str]:
    """
    Say what the numbers mean.

    Parameters
    ----------
    cells : sequence of Cell
        What has been measured.

    Returns
    -------
    list of str
        None, one or two sentences, true of these numbers.
    """
    if not cells:
        return []
    growth, longest = exponents(cells), max(cell.length for cell in cells)
    said = []
    grown = [f"{name} as N^{power:.2f}" for name, power in growth.items() if power is not None]
    if grown:
        shortest = min(cell.length for cell in cells)
        said.append(f"From N = {shortest:,} to {longest:,}, time grew: {', '.join(grown)}.")
    others = [cell for cell in cells if cell.length == longest and cell.family != "dense"]
    if others:
        said.append(_compare(others, {cell.family: speedup(cell, cells) for cell in others}))
    return said


def _compare(cells: Sequence[Cell], speedups: Mapping[str, float | None]) -> str:
    """Name the fastest and the closest to dense at one length."""
    fastest = min(cells, key=lambda cell: cell.median)
    closest = min(cells, key=lambda cell: cell.error)

    def told(cell: Cell, before: str) -> str:
        # Where dense was not timed there is nothing to say of the speed.
        ratio = speedups[cell.family]
        return _cost(cell) if ratio is None else f"{before} {times_as_fast(ratio)}{_cost(cell)}"

    start = f"At N = {cells[0].length:,}"
    if len(cells) == 1:
        only = cells[0]
        if speedups[only.family] is None:
            return f"{start}, {only.family} has {_closeness(only)}."
        return f"{start}, {only.family}{told(only, ' is')}."
    if fastest is closest:
        both = "both the fastest of the approximations and the closest to dense"
        return f"{start}, {fastest.family} is {both}{told(fastest, ':')}."
    return (
        f"{start}, {closest.family} comes closest to dense{told(closest, ',')}; "
        f"{fastest.family} is the fastest{told(fastest, ',')}."
    )


def times_as_fast(ratio: float) -> str:
    """
    Put a speed-up into words.

    Parameters
    ----------
    ratio : float
        Time of dense over time of the family.

    Returns
    -------
    str
        In words.

    Examples
    --------
    >>> from arrattn.bench.findings import times_as_fast
    >>> times_as_fast(12.3), times_as_fast(0.5)
    ('12 times as fast', '2.0 times as slow')
    """
    factor, word = (ratio, "fast") if ratio >= 1 else (1 / ratio, "slow")
    return f"{factor:.0f} times as {word}" if factor >= 10 else f"{factor:.1f} times as {word}"


def _cost(cell: Cell) -> str:
    return f" ({_closeness(cell)})"


def _closeness(cell: Cell) -> str:
    held = "" if cell.mass is None else f", holding {cell.mass:.0%} of dense's probability"
    return f"error {cell.error:.2g}{held}"
