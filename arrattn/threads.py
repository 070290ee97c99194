"""How many threads NumPy arrays are worked on with."""

from __future__ import annotations

from numbers import Integral
from types import TracebackType

from arrattn._core import threads

__all__ = ["get_num_threads", "set_num_threads"]


class _Restore:
    """Gives back, at the end of a ``with`` block, what was set before."""

    def __init__(self, before: int | None) -> None:
        self.before = before

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        threads.ask_num_threads(self.before)


def set_num_threads(n: int | None) -> _Restore:
    """
    Set how many threads work on NumPy arrays, from now on or within a ``with`` block.

    Results are the same bits for any number. Other libraries have their own settings.

    Parameters
    ----------
    n : int or None
        At least 1; None returns to the default, the environment variable
        ``ARRATTN_NUM_THREADS`` or else the processors that this process may use.

    Returns
    -------
    context manager
        Restores what was set before when a ``with`` block ends; to be ignored otherwise.

    Raises
    ------
    TypeError
        If `n` is not an int.
    ValueError
        If `n` is less than 1.

    See Also
    --------
    get_num_threads : The number in force.

    Notes
    -----
    The setting belongs to the process, so a block in one thread counts for all of them.

    Examples
    --------
    >>> import arrattn
    >>> with arrattn.set_num_threads(1):
    ...     arrattn.get_num_threads()
    1
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, Integral)):
        msg = f"n: expected an int or None, got {n!r} ({type(n).__name__})"
        raise TypeError(msg)
    if n is not None and n < 1:
        msg = f"n: expected at least 1, got {n}"
        raise ValueError(msg)
    return _Restore(threads.ask_num_threads(None if n is None else int(n)))


def get_num_threads() -> int:
    """
    How many threads work on NumPy arrays.

    Returns
    -------
    int
        As set by `set_num_threads`; else ``ARRATTN_NUM_THREADS``; else the processors that
        this process may use.

    Raises
    ------
    ValueError
        If ``ARRATTN_NUM_THREADS`` is no positive integer.

    See Also
    --------
    set_num_threads : Set it.

    Examples
    --------
    >>> import arrattn
    >>> arrattn.get_num_threads() >= 1
    True
    """
    return threads.num_threads()
