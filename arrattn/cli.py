"""The command ``arrattn``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence

from arrattn import __version__, backends

TABLE_WIDTH = 140  # in a narrower terminal the table's cells would be broken inside words


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments. Default: those of the process.

    Returns
    -------
    int
        The exit status.
    """
    args = _parser().parse_args(argv)
    status: int = args.run(args)
    return status


def _parser() -> argparse.ArgumentParser:
    from arrattn import check_command, show
    from arrattn.bench import compare, speed

    parser = argparse.ArgumentParser(
        prog="arrattn",
        description="Attention written once, for any array: dense, local, sparse and linear.",
        epilog="Each command has its own help: arrattn compare --help",
    )
    parser.add_argument("--version", action="version", version=f"arrattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "run the four families side by side on a real model's activations"
    command = commands.add_parser("compare", help=about, description=_sentence(about))
    compare.add_arguments(command)
    command.set_defaults(run=compare.run)

    about = "time arrattn beside its peers and beside the machine's own matrix products"
    command = commands.add_parser("bench", help=about, description=_sentence(about))
    speed.add_arguments(command)
    command.set_defaults(run=speed.run)

    about = "hold a function against the laws of attention"
    command = commands.add_parser("check", help=about, description=_sentence(about))
    check_command.add_arguments(command)
    command.set_defaults(run=check_command.run)
    about = "draw a pattern, and say which tiles it lets an attention skip"
    command = commands.add_parser("show", help=about, description=_sentence(about))
    show.add_arguments(command)
    command.set_defaults(run=show.run)

    about = "list the array libraries: what is installed here, and what each supports"
    command = commands.add_parser("backends", help=about, description=_sentence(about))
    command.add_argument(
        "--markdown",
        action="store_true",
        help="print docs/backends.md, which says nothing about this machine",
    )
    command.set_defaults(run=_backends)
    return parser


def _sentence(about: str) -> str:
    return about[0].upper() + about[1:] + "."


def _backends(args: argparse.Namespace) -> int:
    if args.markdown:
        sys.stdout.write(backends.markdown())
        return 0
    head, *body = backends.rows(here=True)
    if not (importlib.util.find_spec("rich") and sys.stdout.isatty() and _print_rich(head, body)):
        _print_plain(head, body)
    return 0


def _print_rich(head: Sequence[str], body: Sequence[Sequence[str]]) -> bool:
    """Print a table where the terminal is wide enough for one, and say whether it was."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if console.width < TABLE_WIDTH:
        return False
    table = Table(title="Array libraries")
    for column in zip(head, *body, strict=True):
        longest = max(len(word) for cell in column for word in cell.split())
        table.add_column(column[0], min_width=longest)
    for row in body:
        table.add_row(*row)
    console.print(table)
    return True


def _print_plain(head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """One paragraph per library: the table is too wide for a plain terminal."""
    width = max(map(len, head))
    for row in body:
        print(row[0])
        for title, cell in zip(head[1:], row[1:], strict=True):
            print(f"  {title:<{width}}  {cell}")
