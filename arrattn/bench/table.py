"""The table: its cells as text, in rich's hands or plain."""

from __future__ import annotations

from collections.abc import Sequence

from arrattn.bench.families import Family
from arrattn.bench.findings import exponents, speedup
from arrattn.bench.measure import Cell

__all__ = ["HEAD", "SUMMARY_HEAD", "notes", "plain", "rows", "seconds", "size", "summary"]

HEAD = ("N", "family", "time", "min - max", "speed", "memory", "error", "mass")
SUMMARY_HEAD = ("family", "time grows as", "setting")


def rows(cells: Sequence[Cell]) -> list[tuple[str, ...]]:
    """
    The table's rows as text, under `HEAD`.

    Parameters
    ----------
    cells : sequence of Cell
        What has been measured.

    Returns
    -------
    list of tuple of str
        One row for each cell.
    """
    return [
        (
            f"{cell.length:,}",
            cell.family,
            seconds(cell.median),
            _span(min(cell.times), max(cell.times)),
            _ratio(speedup(cell, cells)),
            "n/a" if cell.peak.size is None else size(cell.peak.size),
            "-" if cell.family == "dense" else f"{cell.error:.3f}",
            "-" if cell.mass is None or cell.family == "dense" else f"{100 * cell.mass:.1f} %",
        )
        for cell in cells
    ]


def summary(cells: Sequence[Cell], families: Sequence[Family]) -> list[tuple[str, ...]]:
    """
    One row for each family, under `SUMMARY_HEAD`: its exponent and its setting.

    Parameters
    ----------
    cells : sequence of Cell
        What has been measured.
    families : sequence of Family
        With their settings.

    Returns
    -------
    list of tuple of str
        One row for each family that has a cell.
    """
    growth = exponents(cells)
    return [
        (
            family.name,
            "-" if (power := growth[family.name]) is None else f"N^{power:.2f}",
            family.setting,
        )
        for family in families
        if family.name in growth
    ]


def notes(cells: Sequence[Cell]) -> list[str]:
    """
    Say what the columns rest on, where that differs by library.

    Parameters
    ----------
    cells : sequence of Cell
        What has been measured.

    Returns
    -------
    list of str
        Lines under the table.
    """
    longest = max(cells, key=lambda cell: cell.length)
    said = ["speed: times as fast as dense; error: |o - dense| / |dense|"]
    said.append(
        f"for scale: the plain mean of the values has error {longest.mean_error:.3f} "
        f"at N = {longest.length:,}, an output of zeros has 1"
    )
    said += [f"memory: {how}" for how in dict.fromkeys(cell.peak.how for cell in cells)]
    compiling = [cell.compile_seconds for cell in cells if cell.compile_seconds]
    if compiling:
        span = f"{seconds(min(compiling))} to {seconds(max(compiling))}"
        said.append(f"compiling took {span} a cell, in no run's time")
    return said


def plain(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """
    Set a table in plain text.

    Parameters
    ----------
    head : sequence of str
        The columns' titles.
    body : sequence of sequence of str
        The rows.

    Returns
    -------
    str
        Lines, columns aligned to the right but for the last where it is prose.

    Examples
    --------
    >>> from arrattn.bench.table import plain
    >>> print(plain(("N", "family"), [("16", "dense"), ("1,024", "local")]))
        N  family
       16   dense
    1,024   local
    """
    lines = [head, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    prose = head[-1] == "setting"

    def align(i: int, text: str) -> str:
        return text if prose and i == len(head) - 1 else text.rjust(widths[i])

    return "\n".join("  ".join(align(i, text) for i, text in enumerate(line)) for line in lines)


def seconds(t: float) -> str:
    """
    Write a duration with three digits.

    Parameters
    ----------
    t : float
        Seconds.

    Returns
    -------
    str
        In milliseconds below a second.

    Examples
    --------
    >>> from arrattn.bench.table import seconds
    >>> seconds(0.01234), seconds(2.5)
    ('12.3 ms', '2.50 s')
    """
    amount, unit = (t, "s") if t >= 0.9995 else (t * 1000, "ms")
    return f"{_three(amount)} {unit}"


def _span(low: float, high: float) -> str:
    """Two durations in the unit of the larger."""
    factor, unit = (1, "s") if high >= 0.9995 else (1000, "ms")
    return f"{_three(low * factor)} - {_three(high * factor)} {unit}"


def size(count: int) -> str:
    """
    Write a number of bytes with three digits.

    Parameters
    ----------
    count : int
        Bytes.

    Returns
    -------
    str
        In KiB, MiB or GiB.

    Examples
    --------
    >>> from arrattn.bench.table import size
    >>> size(1536), size(5 * 2**20)
    ('1.50 KiB', '5.00 MiB')
    """
    amount, unit = float(count) / 1024, "KiB"
    for larger in ("MiB", "GiB"):
        if amount >= 1024:
            amount, unit = amount / 1024, larger
    return f"{_three(amount)} {unit}"


def _three(amount: float) -> str:
    if amount < 9.995:
        return f"{amount:.2f}"
    return f"{amount:.1f}" if amount < 99.95 else f"{amount:.0f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{_three(ratio)} x"
