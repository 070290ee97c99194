"""Show the table while it grows: live with rich, as lines without it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from arrattn.bench import table
from arrattn.bench.families import Family
from arrattn.bench.measure import Cell

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Display", "open_display"]


def open_display(title: str) -> Display:
    """
    Make the display that this process can have.

    Parameters
    ----------
    title : str
        What is compared, for the head of the table.

    Returns
    -------
    Display
        Live where ``rich`` is installed and somebody watches; lines elsewhere.
    """
    try:
        import rich.live  # noqa: F401 (only to learn whether it is there)
    except ImportError:
        return Display(title)
    return LiveDisplay(title) if sys.stdout.isatty() else RichDisplay(title)


class Display:
    """
    Plain text: progress on standard error, the table at the end.

    Parameters
    ----------
    title : str
        What is compared.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.doing = ""

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None

    def progress(self, what: str, how_far: str) -> None:
        """
        Say what is being done.

        Parameters
        ----------
        what : str
            The piece of work.
        how_far : str
            Where in it.
        """
        if what != self.doing:  # a log wants no line for every step
            print(what, file=sys.stderr, flush=True)
        self.doing = what
        del how_far

    def update(self, cells: Sequence[Cell]) -> None:
        """
        Show the table as far as it goes.

        Parameters
        ----------
        cells : sequence of Cell
            What has been measured.
        """
        print("    " + ", ".join(table.rows(cells)[-1][2:]), file=sys.stderr, flush=True)

    def finish(self, cells: Sequence[Cell], families: Sequence[Family]) -> None:
        """
        Print the tables and the notes under them.

        Parameters
        ----------
        cells : sequence of Cell
            What has been measured.
        families : sequence of Family
            With their settings.
        """
        print(self.title)
        print(table.plain(table.HEAD, table.rows(cells)))
        print()
        print(table.plain(table.SUMMARY_HEAD, table.summary(cells, families)))
        for note in table.notes(cells):
            print(note)


class RichDisplay(Display):
    """
    Tables set by rich, where nobody watches: in a pipe or a file.

    Parameters
    ----------
    title : str
        What is compared.
    """

    def __init__(self, title: str) -> None:
        from rich.console import Console

        super().__init__(title)
        self.console = Console(highlight=False)

    def finish(self, cells: Sequence[Cell], families: Sequence[Family]) -> None:
        """
        Print the tables and the notes under them.

        Parameters
        ----------
        cells : sequence of Cell
            What has been measured.
        families : sequence of Family
            With their settings.
        """
        if self.console.is_terminal is False:
            self.console.print(_grown(self.title, cells))
        self.console.print(_summary(table.summary(cells, families)))
        for note in table.notes(cells):
            self.console.print(note, style="dim")


class LiveDisplay(RichDisplay):
    """
    The table grows on the terminal, with a line below it that says what is being run.

    It is drawn between runs and never by a thread of its own: nothing else computes
    while a run is timed.

    Parameters
    ----------
    title : str
        What is compared.
    """

    def __init__(self, title: str) -> None:
        from rich.live import Live

        super().__init__(title)
        self.cells: Sequence[Cell] = ()
        self.live = Live(console=self.console, auto_refresh=False)

    def __enter__(self) -> Display:
        self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.live.update(_grown(self.title, self.cells) if self.cells else "", refresh=True)
        self.live.stop()

    def progress(self, what: str, how_far: str) -> None:
        """
        Say what is being done.

        Parameters
        ----------
        what : str
            The piece of work.
        how_far : str
            Where in it.
        """
        from rich.console import Group
        from rich.text import Text

        line = Text(f"{what}, {how_far}", style="cyan")
        shown = Group(_grown(self.title, self.cells), line) if self.cells else line
        self.live.update(shown, refresh=True)

    def update(self, cells: Sequence[Cell]) -> None:
        """
        Show the table as far as it goes.

        Parameters
        ----------
        cells : sequence of Cell
            What has been measured.
        """
        self.cells = tuple(cells)


COLOURS = {"dense": "", "local": "cyan", "sparse": "green", "linear": "magenta"}


def _grown(title: str, cells: Sequence[Cell]) -> Table:
    """The table of cells, one section for each length."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    made.padding = (0, 1, 0, 0)  # eight columns in eighty characters
    for title_ in table.HEAD:
        justify: Any = "left" if title_ == "family" else "right"
        made.add_column(title_, justify=justify, no_wrap=True)
    previous = None
    for cell, row in zip(cells, table.rows(cells), strict=True):
        if previous not in {None, cell.length}:
            made.add_section()
        previous = cell.length
        made.add_row(*row, style=COLOURS[cell.family])
    return made


def _summary(body: Sequence[Sequence[str]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD)
    made.padding = (0, 1, 0, 0)
    for title in table.SUMMARY_HEAD:
        made.add_column(title, overflow="fold")
    for row in body:
        made.add_row(*row, style=COLOURS[row[0]])
    return made
