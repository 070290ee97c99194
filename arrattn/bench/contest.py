"""Run the benchmark's cases: choose them, check that a pair agrees, time it, judge it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from arrattn.bench import ours
from arrattn.bench.cases import CASES, Limit, Pair
from arrattn.bench.contestant import Contestant
from arrattn.bench.peers import PEERS, Peer, missing
from arrattn.bench.problem import Problem, difference
from arrattn.bench.product import Product, product_contestant
from arrattn.bench.rounds import Spread, ratios, spread_of, take_turns

__all__ = ["Job", "LeftOut", "Result", "choose_jobs", "run_job"]

PRODUCT = Peer("matrix products", ours.dense, own=True)


class Job(NamedTuple):
    """
    One case at its length or lengths.

    Attributes
    ----------
    case : Pair or Limit
        A line of the table.
    lengths : tuple of int
        One for a pair.
    """

    case: Pair | Limit
    lengths: tuple[int, ...]

    @property
    def peer(self) -> Peer | None:
        """Whom it is against."""
        if isinstance(self.case, Limit):
            return None
        return PRODUCT if self.case.peer == "product" else PEERS[self.case.peer]

    @property
    def length(self) -> str:
        """Its lengths in words."""
        spans = [f"{n:,}" for n in self.lengths]
        return spans[0] if len(spans) == 1 else f"{spans[0]} to {spans[-1]}" if spans else "-"

    @property
    def words(self) -> str:
        """The whole in a few words."""
        against = "" if self.peer is None else f" against {self.peer.name}"
        length = f", N {self.length}" if self.lengths else ""
        return f"{self.case.group}: {self.case.what}{length}{against}"


class LeftOut(NamedTuple):
    """
    A job that was not run.

    Attributes
    ----------
    job : Job
        Which.
    why : str
        The reason.
    """

    job: Job
    why: str


class Result(NamedTuple):
    """
    What a job measured.

    Attributes
    ----------
    job : Job
        Which.
    spread : Spread
        Ratio of times, peer over ours; of a limit, the number itself.
    target : float or None
        At least this ratio; of a limit, at most this number.
    fraction : Spread or None
        Of the machine's rate of matrix products that ours reached.
    apart : float or None
        The largest distance between the two results, where they should agree.
    tolerance : float or None
        How far they may lie apart.
    times : dict of str to list of float
        Seconds by contestant and round; a product's are for the same operations.
    values : list of float
        Of every round, what `spread` is of.
    """

    job: Job
    spread: Spread
    target: float | None
    fraction: Spread | None = None
    apart: float | None = None
    tolerance: float | None = None
    times: dict[str, list[float]] = {}  # noqa: RUF012 (never changed)
    values: list[float] = []  # noqa: RUF012

    @property
    def differs(self) -> bool:
        """Whether results that should agree do not."""
        if self.apart is None or self.tolerance is None:
            return False
        return not self.apart <= self.tolerance

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one, or where the results differ."""
        if self.target is None or self.differs:
            return None
        middle = self.spread.median
        return middle <= self.target if isinstance(self.job.case, Limit) else middle >= self.target


def choose_jobs(
    groups: Sequence[str],
    lengths: Sequence[int],
    *,
    peers: bool,
    cases: Sequence[Pair | Limit] = CASES,
) -> Iterator[Job]:
    """
    Choose what is to be run.

    Parameters
    ----------
    groups : sequence of str
        Which groups.
    lengths : sequence of int
        At these lengths; empty: at those of the table.
    peers : bool
        Whether the peers from other packages take part.
    cases : sequence of Pair or Limit
        The table.

    Yields
    ------
    Job
        In the table's order.
    """
    for case in (case for case in cases if case.group in groups):
        if isinstance(case, Limit):
            chosen = tuple(lengths or case.lengths) if case.lengths else ()
            spans = [(n,) for n in chosen] if case.each else [chosen]
        else:
            spans = [(n,) for n in (lengths or sorted(case.targets))]
        for span in spans:
            job = Job(case, span)
            if peers or job.peer is None or job.peer.own:
                yield job


def run_job(job: Job, product: Product, rounds: int | None) -> Result | LeftOut:
    """
    Run one job.

    Parameters
    ----------
    job : Job
        From `choose_jobs`.
    product : Product
        The machine's best matrix product.
    rounds : int or None
        How many rounds; None lets the time decide.

    Returns
    -------
    Result or LeftOut
        What was measured, or why nothing was.
    """
    needed = job.case.needs if isinstance(job.case, Pair) else ()
    needed += () if job.peer is None else job.peer.packages
    lacking = missing(tuple(dict.fromkeys(needed)))
    if lacking:
        names = " ".join(name.replace("_", "-") for name in lacking)
        return LeftOut(job, f"not installed: pip install {names}")
    try:
        if isinstance(job.case, Limit):
            return _measure(job, job.case, rounds)
        return _time_pair(job, job.case, product, rounds)
    except Exception as error:  # whatever a peer raises must not end the others
        first = (str(error).strip().splitlines() or [""])[0]
        return LeftOut(job, f"{type(error).__name__}: {first}")


def _measure(job: Job, case: Limit, rounds: int | None) -> Result | LeftOut:
    if len(case.lengths) > 1 and not case.each and len(set(job.lengths)) < 2:
        return LeftOut(job, "an exponent needs two lengths")
    measured = case.measure(job.lengths, rounds)
    times = {f"{n:,}": list(each) for n, each in zip(job.lengths, measured.times, strict=False)}
    values = list(measured.values)
    known = job.lengths == case.lengths or (case.each and job.lengths[0] in case.lengths)
    target = case.target if known else None
    return Result(job, spread_of(values), target, times=times, values=values)


def _time_pair(job: Job, case: Pair, product: Product, rounds: int | None) -> Result:
    (n,) = job.lengths
    problem = case.problem._replace(n=n)
    arrays = problem.arrays()
    contestants = [case.ours(problem, arrays)]
    apart = tolerance = None
    if case.peer != "product":
        contestants.append(PEERS[case.peer].build(problem, arrays))
        if case.alike:
            apart, tolerance = _agreement(problem, arrays, contestants)
    if case.counted:
        contestants.append(product_contestant(product, problem.operations()))
    times = take_turns(contestants, rounds=rounds, fewest=case.fewest)
    values = ratios(times[0], times[1])
    fraction = ratios(times[0], times[2]) if len(times) > 2 else None
    return Result(
        job=job,
        spread=spread_of(values),
        target=case.targets.get(n),
        fraction=None if fraction is None else spread_of(fraction),
        apart=apart,
        tolerance=tolerance,
        times={each.name: list(own) for each, own in zip(contestants, times, strict=True)},
        values=values,
    )


def _agreement(
    problem: Problem, arrays: ours.Arrays, contestants: Sequence[Contestant]
) -> tuple[float, float]:
    one, other = (each.read(each.call()) for each in contestants)
    return difference(one, other), problem.tolerance(*arrays)
