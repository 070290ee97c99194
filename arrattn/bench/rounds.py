"""
Timing in turn: ours, peer, ours, peer, in one process.

A machine's speed changes while it runs: other programs, clock rates, heat. Two programs
timed one after the other are then measured on two machines. Timed in turn, with the
ratio taken within each round, both meet the same conditions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from arrattn.bench.contestant import Contestant

__all__ = [
    "Clock",
    "Plan",
    "Spread",
    "plan_rounds",
    "ratios",
    "settle",
    "spread_of",
    "take_turns",
]

Clock = Callable[[], float]

LEAST = 5e-3  # seconds that one turn lasts at least: shorter ones measure the clock
SHORT = 0.1  # seconds of a call below which waking threads and filling caches would tell
BUDGET = 5.0  # seconds for one case, where that leaves the fewest rounds
FEWEST, MOST = 5, 21
TICK = 12e-3  # seconds within which a kernel takes note of a thread that does not stop


class Plan(NamedTuple):
    """
    How many rounds, and how many calls in a turn.

    Attributes
    ----------
    rounds : int
        Rounds; each contestant has one turn in each.
    repeats : tuple of int
        Timed calls in a turn, by contestant.
    warm : tuple of bool
        Whether a call that is not timed comes before them, by contestant.
    """

    rounds: int
    repeats: tuple[int, ...]
    warm: tuple[bool, ...]


class Spread(NamedTuple):
    """
    What several rounds say.

    Attributes
    ----------
    median : float
        The middle one.
    low, high : float
        The smallest and the largest.
    """

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """
    Median and range.

    Parameters
    ----------
    values : sequence of float
        At least one.

    Returns
    -------
    Spread
        Of these values.

    Examples
    --------
    >>> from arrattn.bench.rounds import spread_of
    >>> spread_of([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=3.0)
    """
    return Spread(float(np.median(values)), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """
    How many times as long the peer took, round by round.

    Parameters
    ----------
    ours, theirs : sequence of float
        Seconds, one for each round.

    Returns
    -------
    list of float
        Above 1 where ours is faster.

    Examples
    --------
    >>> from arrattn.bench.rounds import ratios
    >>> ratios([1.0, 2.0], [2.0, 1.0])
    [2.0, 0.5]
    """
    return [peer / own for own, peer in zip(ours, theirs, strict=True)]


def take_turns(
    contestants: Sequence[Contestant],
    *,
    rounds: int | None = None,
    fewest: int = FEWEST,
    clock: Clock = time.perf_counter,
    pause: Callable[[], None] | None = None,
) -> list[list[float]]:
    """
    Time the contestants in turn; who begins changes from round to round.

    Everyone runs before the first round, unmeasured: to compile, to fill caches, and to
    learn how long a call takes.

    Parameters
    ----------
    contestants : sequence of Contestant
        Who takes turns.
    rounds : int, optional
        How many rounds. Default: as many as the time allows, within limits.
    fewest : int, default: 5
        Rounds at least.
    clock : callable
        Seconds, from any start.
    pause : callable, optional
        Runs before each turn. Default: `settle`.

    Returns
    -------
    list of list of float
        Seconds of one call, times the factor: for each contestant, by round.
    """
    pause = settle if pause is None else pause
    estimates = [_estimate(contestant, clock, pause) for contestant in contestants]
    least = [contestant.least for contestant in contestants]
    plan = plan_rounds(estimates, least, rounds=rounds, fewest=fewest)
    times: list[list[float]] = [[] for _ in contestants]
    for round_ in range(plan.rounds):
        for turn in range(len(contestants)):
            i = (round_ + turn) % len(contestants)
            pause()
            if plan.warm[i]:
                contestants[i].call()
            seconds = _turn(contestants[i].call, plan.repeats[i], clock)
            times[i].append(seconds * contestants[i].factor)
    return times


def plan_rounds(
    estimates: Sequence[float], least: Sequence[float], *, rounds: int | None, fewest: int
) -> Plan:
    """
    Choose rounds and repeats from how long one call takes.

    Parameters
    ----------
    estimates : sequence of float
        Seconds of one call, by contestant.
    least : sequence of float
        Seconds that a turn lasts at least, by contestant, where that is more than `LEAST`.
    rounds : int or None
        As asked for.
    fewest : int
        Rounds at least, where none are asked for.

    Returns
    -------
    Plan
        Turns of at least `LEAST` seconds; rounds within `BUDGET` seconds, but not fewer
        than `fewest`.

    Examples
    --------
    >>> from arrattn.bench.rounds import plan_rounds
    >>> plan_rounds([0.001, 0.5], [0.0, 0.0], rounds=None, fewest=5)
    Plan(rounds=9, repeats=(5, 1), warm=(True, False))
    """
    repeats = tuple(
        max(1, math.ceil(max(LEAST, lasts) / max(t, 1e-7)))
        for t, lasts in zip(estimates, least, strict=True)
    )
    one = sum(t * n for t, n in zip(estimates, repeats, strict=True))
    chosen = min(MOST, max(fewest, int(BUDGET / max(one, 1e-7))))
    return Plan(rounds or chosen, repeats, tuple(t < SHORT for t in estimates))


def settle(
    *,
    cpu: Clock = time.process_time,
    clock: Clock = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """
    Wait until this process's threads are idle.

    Worker threads of OpenMP and of onnxruntime spin for some milliseconds after their
    work, OpenBLAS's for a tenth of a second: on a processor that the next contestant needs.
    The time of a thread that spins is known at the kernel's ticks, every 10 ms on some machines.

    Parameters
    ----------
    cpu : callable
        Seconds that all threads of this process have computed.
    clock : callable
        Seconds of the wall's clock.
    sleep : callable
        Waits so many seconds.
    """
    for _ in range(100):
        busy, start = cpu(), clock()
        sleep(TICK)
        if cpu() - busy < 0.1 * (clock() - start):
            return


def _estimate(contestant: Contestant, clock: Clock, pause: Callable[[], None]) -> float:
    contestant.call()
    pause()
    first = _turn(contestant.call, 1, clock)
    # A first short call after a pause is slow: ask again.
    return first if first > SHORT else _turn(contestant.call, 3, clock)


def _turn(call: Callable[[], Any], repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats
