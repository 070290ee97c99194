"""One who takes turns: a function to time, and how to read what it returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from arrattn.bench.problem import Host, Problem

__all__ = ["Build", "Contestant"]


def _host(out: Any) -> Host:
    return np.asarray(out)


class Contestant(NamedTuple):
    """
    One who takes turns.

    Attributes
    ----------
    name : str
        Who.
    call : callable
        Does the work once, to its end, and returns the result.
    read : callable
        The result as an array of the host, in the layout ``(B, Hq, Nq, D)``.
    factor : float
        What its time is multiplied by, where it does another amount of the work.
    least : float
        Seconds that its turn lasts at least.
    """

    name: str
    call: Callable[[], Any]
    read: Callable[[Any], Host] = _host
    factor: float = 1.0
    least: float = 0.0


#: Makes a contestant of a problem and its arrays q, k and v.
Build = Callable[[Problem, tuple[Host, Host, Host]], Contestant]
