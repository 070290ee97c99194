"""The picture of a benchmark: each ratio with its range and its target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arrattn.bench.cases import Limit
from arrattn.bench.contest import Result
from arrattn.bench.plot import FAINT, INK

__all__ = ["draw"]

# Blue and vermilion of Okabe and Ito, which every kind of colour vision tells apart.
FINE, SHORT, FREE = "#0072b2", "#d55e00", "#777777"


def draw(path: Path, results: Sequence[Result]) -> None:
    """
    Draw the ratios and write the picture to a file.

    Parameters
    ----------
    path : Path
        Where; the ending chooses the kind of picture.
    results : sequence of Result
        What was measured; only ratios are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [r for r in results if not isinstance(r.job.case, Limit) and not r.differs]
    height = 1.6 + 0.24 * max(len(shown), 4)
    figure = Figure(figsize=(11, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for y, result in enumerate(shown):
        colour = FREE if result.met is None else FINE if result.met else SHORT
        middle, low, high = result.spread
        axes.hlines(y, low, high, color=colour, linewidth=5, alpha=0.3)
        axes.plot([middle], [y], marker="o", markersize=5, color=colour)
        if result.target is not None:
            axes.plot([result.target], [y], marker="|", markersize=11, color=INK, linewidth=0)
    axes.set_yticks(range(len(shown)), [_label(result) for result in shown], fontsize=8)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
    axes.grid(visible=True, which="major", axis="x", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    words = "the peer's time over ours (dot: median; bar: min to max; tick: target)"
    axes.set_xlabel(words, color=INK, fontsize=9)
    axes.set_title("arrattn bench", loc="left", fontsize=11, fontweight="bold", color=INK)
    figure.savefig(path, dpi=130)


def _label(result: Result) -> str:
    peer = "" if result.job.peer is None else f" / {result.job.peer.name}"
    return f"{result.job.case.group}: {result.job.case.what}, {result.job.length}{peer}"
