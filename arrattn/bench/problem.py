"""One problem of the benchmark: its inputs, its operations, and how far results may lie apart."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Host", "Problem", "difference", "relative_error", "visible_pairs"]

Host = np.ndarray[Any, Any]

EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
C = 4.0  # the constant of the test suite's tolerance


class Problem(NamedTuple):
    """
    Sizes and visibility of one attention problem.

    Attributes
    ----------
    n : int
        Keys `Nk`.
    queries : int or None
        Queries `Nq`; None is as many as keys.
    batch : int
        Items.
    heads : int
        Query heads `Hq`.
    key_heads : int or None
        Key heads `Hkv`; None is as many as query heads.
    width : int
        Width of queries, keys and values.
    causal : bool
        Whether a query sees no later key.
    window : tuple of (int, int) or None
        Keys visible before and after a query.
    shared : int
        How many first positions see all and are seen by all, beside the window.
    spread : float
        Factor on the queries: standard deviation of the scores.
    dtype : str
        Of the inputs.
    """

    n: int = 0
    queries: int | None = None
    batch: int = 1
    heads: int = 4
    key_heads: int | None = None
    width: int = 64
    causal: bool = False
    window: tuple[int, int] | None = None
    shared: int = 0
    spread: float = 1.0
    dtype: str = "float32"

    @property
    def nq(self) -> int:
        """Number of queries."""
        return self.n if self.queries is None else self.queries

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return float(self.width**-0.5)

    def arrays(self) -> tuple[Host, Host, Host]:
        """
        Draw queries, keys and values, the same numbers each time.

        Returns
        -------
        tuple of ndarray
            ``q (B, Hq, Nq, D)``, ``k`` and ``v (B, Hkv, Nk, D)``.
        """
        rng = np.random.default_rng(0)
        key_heads = self.key_heads or self.heads

        def draw(heads: int, length: int) -> Host:
            return rng.standard_normal((self.batch, heads, length, self.width), dtype=np.float32)

        q = draw(self.heads, self.nq) * np.float32(self.spread)
        k, v = draw(key_heads, self.n), draw(key_heads, self.n)
        if self.dtype == "bfloat16":
            import ml_dtypes

            return tuple(x.astype(ml_dtypes.bfloat16) for x in (q, k, v))  # type: ignore[return-value]
        return q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype)

    def operations(self) -> int:
        """
        Count the multiplications and additions that no exact algorithm can spare.

        Returns
        -------
        int
            ``4 D`` for every visible pair of every query head: two for each number of the
            score's product and two for each number of the value's.
        """
        return 4 * self.width * self.batch * self.heads * visible_pairs(self)

    def tolerance(self, q: Host, k: Host, v: Host) -> float:
        """
        How far two correct results of softmax attention may lie apart.

        Parameters
        ----------
        q, k, v : ndarray
            The inputs.

        Returns
        -------
        float
            Twice the bound that the test suite holds a result to: both results are rounded.
        """
        # Enough for linear attention too: its weight, a sum of D products, is off by D eps.
        size = 1 + self.scale * _longest(q) * _longest(k)
        rounding = 0.0 if self.dtype == "float32" else EPS[self.dtype]
        top = float(np.max(np.abs(v.astype(np.float32)), initial=0.0))
        return 2 * (C * EPS["float32"] * size + rounding) * top


def visible_pairs(problem: Problem) -> int:
    """
    Count the pairs of a query and a key it sees, in one head of one item.

    Parameters
    ----------
    problem : Problem
        Its lengths, causality, window and shared positions; the last query stands at the last key.

    Returns
    -------
    int
        At most ``Nq * Nk``.

    Examples
    --------
    >>> from arrattn.bench.problem import Problem, visible_pairs
    >>> visible_pairs(Problem(n=4)), visible_pairs(Problem(n=4, causal=True))
    (16, 10)
    """
    position = np.arange(problem.nq, dtype=np.int64) + problem.n - problem.nq
    first, last = np.zeros_like(position), np.full_like(position, problem.n)
    if problem.causal:
        last = np.minimum(last, position + 1)
    stop = last
    if problem.window is not None:
        left, right = problem.window
        first = np.maximum(first, position - left)
        stop = np.minimum(stop, position + right + 1)
    last, stop = np.maximum(last, 0), np.maximum(stop, first)
    # Shared keys on top of those in the window; a shared query sees all that order lets it.
    early = np.minimum(problem.shared, last)
    beside = early - np.clip(np.minimum(stop, early) - first, 0, None)
    seen = np.where(position < problem.shared, last, stop - first + beside)
    return int(np.sum(seen))


def difference(one: Host, other: Host) -> float:
    """
    The largest distance between two results.

    Parameters
    ----------
    one, other : ndarray
        Of the same shape.

    Returns
    -------
    float
        Infinite where the shapes differ or a number is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.bench.problem import difference
    >>> difference(np.zeros(2), np.asarray([0.0, 0.5])), difference(np.zeros(2), np.zeros(3))
    (0.5, inf)
    """
    if one.shape != other.shape:
        return float("inf")
    apart = np.max(np.abs(one.astype(np.float32) - other.astype(np.float32)), initial=0.0)
    return float("inf") if np.isnan(apart) else float(apart)


def relative_error(out: Any, exact: Any) -> float:
    """
    How far a result is from the exact one, as a share of that.

    Parameters
    ----------
    out, exact : ndarray
        Of the same shape.

    Returns
    -------
    float
        ``|out - exact| / |exact|``.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn.bench.problem import relative_error
    >>> relative_error(np.asarray([3.0, 3.0]), np.asarray([3.0, 4.0]))
    0.2
    """
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


def _longest(x: Host) -> float:
    squares = np.sum(np.square(x.astype(np.float32)), axis=-1)
    return math.sqrt(float(np.max(squares, initial=0.0)))
