"""What is measured of arrattn alone: exponents, import time, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arrattn
from arrattn.bench.contestant import Build
from arrattn.bench.findings import fit_exponent
from arrattn.bench.problem import Problem
from arrattn.bench.rounds import take_turns

__all__ = ["Measure", "Measured", "exponent", "exponents_of", "import_time", "memory"]

# NumPy first, so that what is left is ours, in the same interpreter.
IMPORT = """
import time
import numpy
start = time.perf_counter()
import arrattn
print(time.perf_counter() - start)
"""
# The small call makes what is made once: threads, and what they keep.
MEMORY = """
import sys
import numpy as np
from arrattn import attention, linear_attention, local_attention, sparse_attention
from arrattn.bench.memory import traced
n = int(sys.argv[2])
runs = {"dense": attention, "local": local_attention, "linear": linear_attention}
run = runs.get(sys.argv[1], sparse_attention)
options = {"window": (128, 0)} if sys.argv[1] == "local" else {}
draw = np.random.default_rng(0).standard_normal
q, k, v = (draw((1, 4, n, 64), dtype=np.float32) for _ in range(3))
run(*(x[:, :, :16] for x in (q, k, v)), **options)
print(traced(lambda: (run(q, k, v, **options),)).size)
"""


class Measured(NamedTuple):
    """
    Numbers of several rounds, and what they were made of.

    Attributes
    ----------
    values : tuple of float
        One for each round.
    times : tuple of tuple of float
        Seconds by length and round, where the numbers come from times.
    """

    values: tuple[float, ...]
    times: tuple[tuple[float, ...], ...] = ()


#: From lengths and a number of rounds to the numbers measured.
Measure = Callable[[tuple[int, ...], int | None], Measured]


def exponents_of(lengths: Sequence[int], times: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """
    Fit the exponent of time over length, round by round.

    Parameters
    ----------
    lengths : sequence of int
        At least two different ones.
    times : sequence of sequence of float
        Seconds: for each length, by round.

    Returns
    -------
    tuple of float
        One for each round.

    Examples
    --------
    >>> from arrattn.bench.limits import exponents_of
    >>> exponents_of([1, 2], [[1.0, 1.0], [2.0, 4.0]])
    (1.0, 2.0)
    """
    fitted = (fit_exponent(lengths, each) for each in zip(*times, strict=True))
    return tuple(power for power in fitted if power is not None)


def exponent(build: Build, problem: Problem) -> Measure:
    """
    The power of N that time grows with, all lengths timed in turn.

    Parameters
    ----------
    build : callable
        Makes the contestant.
    problem : Problem
        Without its length.

    Returns
    -------
    callable
        From lengths and rounds to the exponents.
    """

    def measure(lengths: tuple[int, ...], rounds: int | None) -> Measured:
        problems = [problem._replace(n=n) for n in lengths]
        times = take_turns([build(each, each.arrays()) for each in problems], rounds=rounds)
        return Measured(exponents_of(lengths, times), tuple(map(tuple, times)))

    return measure


def import_time(lengths: tuple[int, ...], rounds: int | None) -> Measured:
    """
    Milliseconds of ``import arrattn`` after ``import numpy``, each in a fresh interpreter.

    Parameters
    ----------
    lengths : tuple of int
        Of no matter here.
    rounds : int or None
        Interpreters; None is 9. One more comes first, which compiles the files as an
        installation does.

    Returns
    -------
    Measured
        One number for each interpreter.
    """
    del lengths
    with tempfile.TemporaryDirectory() as compiled:
        cache = {"PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        seconds = [float(_fresh(IMPORT, env=cache)) for _ in range((rounds or 9) + 1)][1:]
    return Measured(tuple(1000 * t for t in seconds))


def memory(family: str) -> Measure:
    """
    Peak of memory beyond inputs and output, in a fresh interpreter.

    Parameters
    ----------
    family : str
        Dense, local or linear, in small letters.

    Returns
    -------
    callable
        From one length to MiB.
    """
    return partial(_memory, family)


def _memory(family: str, lengths: tuple[int, ...], rounds: int | None) -> Measured:
    del rounds  # it is counted, and comes out alike each time
    return Measured(tuple(int(_fresh(MEMORY, family, str(n))) / 2**20 for n in lengths))


def _fresh(program: str, *args: str, env: dict[str, str] | None = None) -> str:
    """What a program prints in an interpreter of its own, with the arrattn that runs here."""
    here = str(Path(arrattn.__file__).parents[1])
    paths = [here, os.environ.get("PYTHONPATH", "")]
    both = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | (env or {})
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        check=True,
        capture_output=True,
        text=True,
        env=both,
    )
    return done.stdout
