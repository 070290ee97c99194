"""Results that know how they are written, so that a failure can be pasted into Python."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__all__ = ["Value", "joined"]

Host = np.ndarray[Any, Any]


class Value:
    """
    A NumPy array and the expression that gives it.

    Parameters
    ----------
    text : str
        The expression.
    array : array
        What it is.
    simple : bool, default: True
        Whether it can be indexed without parentheses.
    """

    __array_ufunc__ = None  # so that `array * value` asks this class

    def __init__(self, text: str, array: Host, *, simple: bool = True) -> None:
        self.text, self.array = text if simple else f"({text})", array

    def __repr__(self) -> str:
        return self.text

    def __getitem__(self, key: Any) -> Value:
        return Value(f"{self.text}[{index_text(key)}]", self.array[key])

    def __mul__(self, other: Any) -> Value:
        return _combined("*", operator.mul, self, other)

    def __rmul__(self, other: Any) -> Value:
        return _combined("*", operator.mul, other, self)

    def __add__(self, other: Any) -> Value:
        return _combined("+", operator.add, self, other)

    def __sub__(self, other: Any) -> Value:
        return _combined("-", operator.sub, self, other)

    def __truediv__(self, other: Any) -> Value:
        return _combined("/", operator.truediv, self, other)

    def __gt__(self, other: Any) -> Value:
        return _combined(">", operator.gt, self, other)

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return tuple(self.array.shape)


def _combined(sign: str, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Value:
    def text(x: Any) -> str:
        return x.text if isinstance(x, Value) else repr(x)

    def array(x: Any) -> Any:
        return x.array if isinstance(x, Value) else x

    return Value(f"{text(a)} {sign} {text(b)}", function(array(a), array(b)), simple=False)


def joined(values: Sequence[Value], axis: int) -> Value:
    """
    Put values one after the other.

    Parameters
    ----------
    values : sequence of Value
        What to join.
    axis : int
        Along which axis.

    Returns
    -------
    Value
        All of them.
    """
    text = f"np.concatenate([{', '.join(x.text for x in values)}], axis={axis})"
    return Value(text, np.concatenate([x.array for x in values], axis=axis))


def index_text(key: Any) -> str:
    """Write an index as it is typed."""
    if isinstance(key, tuple):
        return ", ".join(map(index_text, key))
    if key is Ellipsis:
        return "..."
    if isinstance(key, slice):
        ends = ("" if x is None else str(x) for x in (key.start, key.stop))
        return ":".join(ends)
    return repr(key.tolist() if isinstance(key, np.ndarray) else key)


def literal(x: Host) -> str:
    """Write an array as nested lists; long ones with a line for each row."""
    text = repr(x.tolist())
    if len(text) <= 80 or x.ndim < 2:
        return text
    rows = ",\n".join(literal(row) for row in x)
    return "[\n" + "\n".join("    " + line for line in rows.splitlines()) + ",\n]"
