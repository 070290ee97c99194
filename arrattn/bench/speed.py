"""``arrattn bench``: how fast arrattn is beside its peers and beside the machine."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from arrattn._core.threads import num_threads
from arrattn.bench import report, speed_record
from arrattn.bench.cases import GROUPS
from arrattn.bench.contest import Job, LeftOut, Result, choose_jobs, run_job
from arrattn.bench.files import CannotRun, require_files, require_plot, write_file
from arrattn.bench.peers import missing
from arrattn.bench.product import Product, find_product, one_blas_thread
from arrattn.bench.settings import read_lengths, read_positive

__all__ = ["Options", "add_arguments", "read_options", "run"]

UNWRITTEN, CANNOT, INTERRUPTED = 1, 2, 130


class Options(NamedTuple):
    """
    The options of one run.

    Attributes
    ----------
    groups : tuple of str
        Which groups.
    peers : bool
        Whether the peers from other packages take part.
    lengths : tuple of int
        Lengths in place of the table's; empty: the table's.
    rounds : int or None
        Rounds of every case; None lets the time decide.
    markdown : bool
        Whether the table is printed as markdown even on a terminal.
    plot : Path or None
        Where the picture goes.
    json : Path or None
        Where the record goes.
    """

    groups: tuple[str, ...] = GROUPS
    peers: bool = False
    lengths: tuple[int, ...] = ()
    rounds: int | None = None
    markdown: bool = False
    plot: Path | None = None
    json: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add the options of ``arrattn bench``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command's parser.
    """
    add = parser.add_argument
    names = ", ".join(GROUPS)
    add("groups", nargs="*", metavar="GROUP", help=f"which of {names} (all)")
    add("--peers", action="store_true", help="beside other packages, as far as installed")
    add("--lengths", type=read_lengths, metavar="N,N,...", help="in place of the table's own")
    add("--rounds", type=read_positive, help="rounds of each case (as time allows, at least 5)")
    add("--markdown", action="store_true", help="print a table ready to paste")
    add("--plot", type=Path, metavar="FILE.png", help="write a picture")
    add("--json", type=Path, metavar="FILE.json", help="write every number")
    parser.epilog = (
        "The environment variable ARRATTN_NUM_THREADS sets the threads of all contestants; "
        "peers are installed with: pip install 'arrattn[bench]'"
    )


def read_options(args: argparse.Namespace) -> Options:
    """
    Read the parsed options.

    Parameters
    ----------
    args : argparse.Namespace
        With the options of `add_arguments`.

    Returns
    -------
    Options
        What is to be run.

    Raises
    ------
    CannotRun
        If a group is unknown or a file could not be written.
    """
    for name in args.groups:
        if name not in GROUPS:
            near = difflib.get_close_matches(name, GROUPS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            msg = f"expected groups from {', '.join(GROUPS)}; got {name!r}{hint}"
            raise CannotRun(msg)
    require_files(plot=args.plot, json=args.json)
    if args.plot is not None:
        require_plot(args.plot)
    try:
        num_threads()
    except ValueError as error:
        raise CannotRun(str(error)) from error
    return Options(
        groups=tuple(name for name in GROUPS if name in args.groups) or GROUPS,
        peers=args.peers,
        lengths=args.lengths or (),
        rounds=args.rounds,
        markdown=args.markdown,
        plot=args.plot,
        json=args.json,
    )


def run(args: argparse.Namespace) -> int:
    """
    Run the benchmark, print its table, and write the files asked for.

    Parameters
    ----------
    args : argparse.Namespace
        With the options of `add_arguments`.

    Returns
    -------
    int
        Exit status: 0, 1 where a file could not be written, 2 where it cannot run, 130
        where Ctrl-C ended it. Missed targets do not matter.
    """
    try:
        options = read_options(args)
    except CannotRun as error:
        print(f"arrattn bench: {error}", file=sys.stderr)
        return CANNOT
    results: list[Result] = []
    left_out: list[LeftOut] = []
    interrupted = False
    with ExitStack() as held:
        held.enter_context(same_threads(peers=options.peers))
        held.enter_context(one_blas_thread())
        try:
            product = find_product()
            _run_all(options, product, results, left_out)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted and not results:
        print("arrattn bench: interrupted before anything was measured", file=sys.stderr)
        return INTERRUPTED
    written = _report(options, product, results, left_out, interrupted=interrupted)
    if interrupted:
        return INTERRUPTED
    return 0 if written else UNWRITTEN


def _run_all(
    options: Options, product: Product, results: list[Result], left_out: list[LeftOut]
) -> None:
    """Run job after job, and say on standard error how far it is."""
    jobs: Sequence[Job] = list(choose_jobs(options.groups, options.lengths, peers=options.peers))
    for i, job in enumerate(jobs):
        print(f"{i + 1} of {len(jobs)}: {job.words}", file=sys.stderr, flush=True)
        outcome = run_job(job, product, options.rounds)
        if isinstance(outcome, Result):
            results.append(outcome)
            print(f"    {report.told(outcome)}", file=sys.stderr, flush=True)
        else:
            left_out.append(outcome)
            print(f"    left out: {outcome.why}", file=sys.stderr, flush=True)


def _report(
    options: Options,
    product: Product,
    results: Sequence[Result],
    left_out: Sequence[LeftOut],
    *,
    interrupted: bool,
) -> bool:
    """Print what there is, write the files; say whether all were written."""
    report.show(results, markdown=options.markdown)
    for line in report.notes(results, left_out, peers=options.peers, product=product):
        print(line)
    if interrupted:
        print("Interrupted: the table holds what was done by then.")
    written = True
    if options.json is not None:
        from arrattn.bench.record import write_record

        record = speed_record.make_record(
            results, left_out, product, peers=options.peers, interrupted=interrupted
        )
        written &= write_file("bench --json", options.json, lambda p: write_record(p, record))
    if options.plot is not None:
        from arrattn.bench.speed_plot import draw

        written &= write_file("bench --plot", options.plot, lambda p: draw(p, results))
    return written


@contextmanager
def same_threads(*, peers: bool) -> Iterator[None]:
    """
    Give the peers as many threads as ours has.

    Parameters
    ----------
    peers : bool
        Whether peers take part.

    Yields
    ------
    None
        What was set before comes back afterwards.
    """
    threads = num_threads()
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    with ExitStack() as held:
        if threads < len(before):
            # JAX has no setting for it: it takes the processors that the process may use.
            os.sched_setaffinity(0, set(sorted(before)[:threads]))
            held.callback(os.sched_setaffinity, 0, before)
        if peers and not missing(("torch",)):
            import torch

            held.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield
