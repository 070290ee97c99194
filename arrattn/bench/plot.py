"""The picture: time and memory against N, error against speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from arrattn.bench.findings import exponents, speedup
from arrattn.bench.measure import Cell

__all__ = ["COLOURS", "describe", "draw", "file_types", "require_matplotlib", "save", "sheet"]

# Okabe and Ito's colours, which every kind of colour vision tells apart.
COLOURS = {"dense": "#222222", "local": "#0072b2", "sparse": "#009e73", "linear": "#d55e00"}
MARKERS = {"dense": "o", "local": "s", "sparse": "D", "linear": "^"}
INK, FAINT = "#333333", "#dddddd"
Value = Callable[[Cell], float | None]


def require_matplotlib() -> None:
    """Raise ImportError where matplotlib is missing, before anything is measured."""
    import matplotlib.figure  # noqa: F401


def file_types() -> tuple[str, ...]:
    """
    List the kinds of picture that matplotlib can write here.

    Returns
    -------
    tuple of str
        File name endings without the dot, in alphabetical order.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return tuple(sorted(FigureCanvasAgg.get_supported_filetypes()))


def draw(path: Path, cells: Sequence[Cell], title: str) -> None:
    """
    Draw the comparison and write it to a file.

    Parameters
    ----------
    path : Path
        Where; the ending chooses the kind of picture.
    cells : sequence of Cell
        What has been measured.
    title : str
        What was compared.
    """
    figure = sheet((13.5, 4.9), title)
    times, memory, errors = figure.subplots(1, 3)
    powers = {name: _power(power) for name, power in exponents(cells).items()}
    _curves(times, cells, lambda cell: cell.median, powers, spread=True)
    describe(times, "Time", "seconds, median (bars: min to max)")
    _curves(memory, cells, _mebibytes, {})
    describe(memory, "Peak working memory", "MiB over inputs and output")
    _errors(errors, cells)
    save(figure, path)


def sheet(size: tuple[float, float], title: str) -> Any:
    """
    Take a new sheet.

    Parameters
    ----------
    size : tuple of float
        Width and height, in inches.
    title : str
        What is above it.

    Returns
    -------
    matplotlib.figure.Figure
        Without axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=size, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=INK)
    return figure


def save(figure: Any, path: Path, dpi: int = 130) -> None:
    """
    Write a picture to a file.

    Parameters
    ----------
    figure : matplotlib.figure.Figure
        The picture.
    path : Path
        Where; the ending chooses its kind.
    dpi : int, default: 130
        Dots per inch.
    """
    figure.savefig(path, dpi=dpi)


def _curves(
    axes: Any, cells: Sequence[Cell], value: Value, powers: dict[str, str], *, spread: bool = False
) -> None:
    """One curve for each family against N, both axes logarithmic, named at its end."""
    ends = []
    for name in dict.fromkeys(cell.family for cell in cells):
        own = [cell for cell in cells if cell.family == name and value(cell)]
        if not own:
            continue
        x, y = [cell.length for cell in own], [value(cell) for cell in own]
        style = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 5}
        axes.plot(x, y, linewidth=1.8, **style)
        if spread:
            low, high = ([f(cell.times) for cell in own] for f in (min, max))
            axes.vlines(x, low, high, color=COLOURS[name], linewidth=5, alpha=0.25)
        ends.append((y[-1], x[-1], f"{name}{powers.get(name, '')}", COLOURS[name]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    _name_ends(axes, ends)
    lengths = sorted({cell.length for cell in cells})
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=8)
    axes.tick_params(axis="x", which="minor", bottom=False)
    axes.set_xlabel("tokens N", color=INK, fontsize=9)
    # Room at the right for the names.
    axes.set_xlim(lengths[0] / 1.15, lengths[-1] * (lengths[-1] / lengths[0]) ** 0.42 * 1.3)


def _name_ends(axes: Any, ends: list[tuple[Any, ...]]) -> None:
    """Write each curve's name beside its last point, names pushed apart where curves meet."""
    if not ends:
        return
    low, high = axes.get_ylim()
    gap = (high / low) ** 0.065
    placed = 0.0
    for y, x, text, colour in sorted(ends):
        at = max(y, placed * gap)
        placed = at
        axes.annotate(
            text, (x, at), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=9, color=colour, fontweight="bold",
        )  # fmt: skip


def _errors(axes: Any, cells: Sequence[Cell]) -> None:
    """Error against speed-up: each family's path from the shortest to the longest N."""
    shown = False
    for name in dict.fromkeys(cell.family for cell in cells):
        own = [cell for cell in cells if cell.family == name]
        points = [(speedup(cell, cells), cell.error) for cell in own]
        x, y = [p[0] for p in points if p[0]], [p[1] for p in points if p[0]]
        if not x or name == "dense":
            continue
        shown = True
        colour, marker = COLOURS[name], MARKERS[name]
        axes.plot(x, y, linewidth=1.2, alpha=0.5, color=colour)
        axes.scatter(x[:-1], y[:-1], s=16, color=colour, marker=marker, alpha=0.5)
        axes.scatter(x[-1:], y[-1:], s=60, color=colour, marker=marker)
        axes.annotate(
            name, (x[-1], y[-1]), xytext=(9, 0), textcoords="offset points",
            va="center", fontsize=9, color=colour, fontweight="bold",
        )  # fmt: skip
    describe(axes, "Error against speed", "error: |o - dense| / |dense|")
    axes.set_xlabel("times as fast as dense (large mark: longest N)", color=INK, fontsize=9)
    if not shown:
        axes.text(0.5, 0.5, "dense was not timed", ha="center", transform=axes.transAxes)
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if str(f"{x:e}")[0] in "25" else "")
    axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]) * 1.08)
    mean = max(cells, key=lambda cell: cell.length).mean_error
    for level, words in ((1.0, "an output of zeros"), (mean, "the mean of the values")):
        axes.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(
            words, (0.98, level), xycoords=("axes fraction", "data"), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color=INK, ha="right",
        )  # fmt: skip
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the last name


def describe(axes: Any, title: str, label: str) -> None:
    """
    Title, label and look of one pair of axes.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
        Which.
    title : str
        What they show.
    label : str
        What the upright axis counts.
    """
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_ylabel(label, color=INK, fontsize=9)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(visible=True, which="major", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _mebibytes(cell: Cell) -> float | None:
    return None if cell.peak.size is None else cell.peak.size / 2**20


def _power(power: float | None) -> str:
    return "" if power is None else f"  $N^{{{power:.2f}}}$"
