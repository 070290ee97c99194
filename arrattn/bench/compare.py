"""``arrattn compare``: the four families side by side on real activations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from arrattn.bench import findings
from arrattn.bench.display import Display, open_display
from arrattn.bench.families import Family, choose_families
from arrattn.bench.files import CannotRun, require_plot, write_file
from arrattn.bench.inputs import Inputs, read_inputs
from arrattn.bench.libraries import open_library
from arrattn.bench.measure import Cell, measure
from arrattn.bench.settings import Settings, add_arguments, read_settings
from arrattn.bench.tasks import run_task

__all__ = ["add_arguments", "run"]

UNWRITTEN = 1
INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended


def run(args: argparse.Namespace) -> int:
    """
    Run the comparison, show it, and write the files asked for.

    Parameters
    ----------
    args : argparse.Namespace
        With the options of `add_arguments`.

    Returns
    -------
    int
        Exit status: 0, 1 where a file could not be written, 2 where it cannot run, 130
        where Ctrl-C ended it.
    """
    try:
        settings = read_settings(args)
        if settings.plot is not None:
            require_plot(settings.plot)
        if settings.task != "families":
            return run_task(settings)
        return _compare(settings)
    except CannotRun as error:
        print(f"arrattn compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("arrattn compare: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED


def _compare(settings: Settings) -> int:
    """Measure until done or interrupted, then show and write what there is."""
    driver = open_library(settings.array, settings.dtype, settings.device)
    cells: list[Cell] = []
    interrupted = False
    display = open_display(_title(settings))
    with display:
        inputs = read_inputs(settings, display.progress)
        try:
            for cell in measure(settings, inputs, driver, display.progress):
                cells.append(cell)
                display.update(cells)
        except KeyboardInterrupt:
            interrupted = True
    if not cells:
        raise KeyboardInterrupt
    families = choose_families(settings, inputs.q.shape[-1])
    written = _report(settings, inputs, families, cells, display, interrupted=interrupted)
    if interrupted:
        return INTERRUPTED
    return 0 if written else UNWRITTEN


def _report(
    settings: Settings,
    inputs: Inputs,
    families: Sequence[Family],
    cells: Sequence[Cell],
    display: Display,
    *,
    interrupted: bool,
) -> bool:
    """Print the tables and the sentences, write the files; say whether all were written."""
    display.finish(cells, families)
    heads, _, width = inputs.q.shape
    print(f"q, k, v: {inputs.source}; {heads} heads of width {width}\n")
    for sentence in findings.sentences(cells):
        print(sentence)
    if interrupted:
        print("Interrupted: the table holds what was done by then.")
    written = True
    if settings.json is not None:
        from arrattn.bench.record import make_record, write_record

        record = make_record(settings, inputs, families, cells, interrupted=interrupted)
        written &= write_file(
            "compare --json", settings.json, lambda path: write_record(path, record)
        )
    if settings.plot is not None:
        from arrattn.bench.plot import draw

        title = f"{_title(settings)}: {inputs.source}"
        written &= write_file(
            "compare --plot", settings.plot, lambda path: draw(path, cells, title)
        )
    return written


def _title(settings: Settings) -> str:
    """Array library, dtype and kind of attention, in a few words."""
    kind = "causal" if settings.causal else "bidirectional"
    where = "" if settings.device is None else f" on {settings.device}"
    return f"arrattn compare: {settings.array}{where}, {settings.dtype}, {kind}"
