"""What the benchmark found, as a table, as notes, and as a record."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from arrattn.bench.cases import Limit
from arrattn.bench.contest import LeftOut, Result
from arrattn.bench.product import Product, blas, narrow
from arrattn.bench.speed_record import unit_of, versions

__all__ = ["HEAD", "markdown", "notes", "rows", "show", "told"]

HEAD = ("case", "N", "against", "result", "min to max", "of matmul rate", "target")


def rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """
    The table's rows as text, under `HEAD`.

    Parameters
    ----------
    results : sequence of Result
        What was measured.

    Returns
    -------
    list of tuple of str
        One for each result.
    """
    return [
        (
            f"{result.job.case.group}: {result.job.case.what}",
            result.job.length,
            "-" if result.job.peer is None else result.job.peer.name,
            _middle(result),
            _range(result),
            "-" if result.fraction is None else _number(result.fraction.median),
            _verdict(result),
        )
        for result in results
    ]


def told(result: Result) -> str:
    """
    One result in one line.

    Parameters
    ----------
    result : Result
        What was measured.

    Returns
    -------
    str
        The number, its range and whether the target is met.
    """
    _, _, _, middle, span, fraction, verdict = rows([result])[0]
    parts = [f"{middle} ({span})"]
    parts += [f"{fraction} of the matrix product rate"] if fraction != "-" else []
    parts += [f"target {verdict}"] if verdict != "-" else []
    return ", ".join(parts)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """
    Set a table in markdown, its columns aligned for who reads it plain.

    Parameters
    ----------
    head : sequence of str
        The columns' titles.
    body : sequence of sequence of str
        The rows.

    Returns
    -------
    str
        Lines.

    Examples
    --------
    >>> from arrattn.bench.report import markdown
    >>> print(markdown(("case", "N"), [("dense", "16")]))
    | case  | N  |
    | ----- | -- |
    | dense | 16 |
    """
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return "\n".join(
        "| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |"
        for line in (head, rule, *body)
    )


def show(results: Sequence[Result], *, markdown: bool) -> None:
    """
    Print the table: by rich on a terminal that has room for it, else as markdown.

    Parameters
    ----------
    results : sequence of Result
        What was measured.
    markdown : bool
        Whether it is to be markdown in any case.
    """
    body = rows(results)
    if not markdown and sys.stdout.isatty() and _show_rich(body):
        return
    print(_markdown(HEAD, body))


_markdown = markdown  # where an option has the name


def _show_rich(body: Sequence[Sequence[str]]) -> bool:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        return False
    console = Console(highlight=False)
    table = Table(title="arrattn bench", title_justify="left")
    needed = 1
    for i, title in enumerate(HEAD):
        table.add_column(title, justify="left" if i in {0, 2, 6} else "right", no_wrap=True)
        needed += max(len(title), *(len(row[i]) for row in body), 0) + 3
    if not body or console.width < needed:
        return False
    for row in body:
        colour = "red" if row[-1].endswith("missed") or "differ" in row[3] else ""
        table.add_row(*row, style=colour)
    console.print(table)
    return True


def notes(
    results: Sequence[Result], left_out: Sequence[LeftOut], *, peers: bool, product: Product
) -> list[str]:
    """
    Say what the columns are, what was left out, and what it was measured on.

    Parameters
    ----------
    results : sequence of Result
        What was measured.
    left_out : sequence of LeftOut
        What was not.
    peers : bool
        Whether peers took part.
    product : Product
        What the machine's rate was measured with.

    Returns
    -------
    list of str
        Lines under the table.
    """
    shape = " x ".join(map(str, product.shape))
    said = [
        "",
        "result: the peer's time over ours, median over rounds taken in turn (above 1: ours is "
        "faster); or the number itself, with its unit",
        f"of matmul rate: ours against float32 products of {shape} on {product.threads} threads",
    ]
    said += [
        f"THEY DIFFER: {result.job.words}: by {result.apart:.2g}, expected at most "
        f"{result.tolerance:.2g}"
        for result in results
        if result.differs
    ]
    reasons: dict[str, list[str]] = {}
    for job, why in left_out:
        reasons.setdefault(why, []).append(job.words)
    said += [f"left out ({why}): {'; '.join(words)}" for why, words in reasons.items()]
    if not peers:
        said.append("peers from other packages were not asked for: --peers")
    judged = [result.met for result in results if result.met is not None]
    if judged:
        said.append(f"targets met: {sum(judged)} of {len(judged)}")
    if narrow(blas()):
        said.append(
            "NumPy's OpenBLAS leaves this processor's AVX-512 unused: where it does not know one, "
            "OPENBLAS_CORETYPE=SkylakeX in the environment says which kernels to take"
        )
    named = [f"{name} {version}" for name, version in versions().items() if version]
    return [*said, f"{', '.join(named)}; {product.threads} threads, {os.cpu_count()} processors"]


def _number(value: float) -> str:
    """Three digits, and not more than two where it is small."""
    if abs(value) >= 99.5:
        return f"{value:.0f}"
    if abs(value) >= 9.995:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.2g}"


def _middle(result: Result) -> str:
    if result.differs:
        return "no result: they differ"
    number, unit = _number(result.spread.median), unit_of(result)
    return f"{number} {unit}" if unit in {"ms", "MiB"} else number


def _range(result: Result) -> str:
    if len(result.values) < 2:
        return "-"
    return f"{_number(result.spread.low)} to {_number(result.spread.high)}"


def _verdict(result: Result) -> str:
    if result.target is None:
        return "-"
    limit = isinstance(result.job.case, Limit)
    target = (
        f"at most {result.target:g} {unit_of(result)}".strip() if limit else f"{result.target:g}"
    )
    return f"{target}: {'no result' if result.met is None else 'met' if result.met else 'missed'}"
