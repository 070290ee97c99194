"""
How far a result may lie from the float64 reference: derived, never set by hand.

A score carries an error of about ``eps * |scale| * |q| * |k|`` from its product, and
``eps * |bias|`` from the sum; the exponential turns that into a relative error of a
weight, and a weighted mean of values multiplies it by ``max|v|``. One rounding to the
output's dtype comes last. `C` is one constant for the whole suite.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = [
    "C",
    "accumulation",
    "eps",
    "largest",
    "longest",
    "output_error",
    "score_error",
]

C = 4.0

#: The distance from 1 to the next number; NumPy alone knows no bfloat16.
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def eps(dtype: str) -> float:
    """The distance from 1 to the next number."""
    return EPS[dtype]


def accumulation(dtype: str) -> str:
    """The dtype in which sums are taken."""
    return "float64" if dtype == "float64" else "float32"


def score_error(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    *,
    dtype: str,
    scale: float | None = None,
    bias: np.ndarray[Any, Any] | None = None,
    sinks: np.ndarray[Any, Any] | None = None,
) -> float:
    """How far a score, or a logarithm of a sum of their exponentials, may be off."""
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    size: float = 1 + abs(scale) * longest(q) * longest(k)
    size += sum(largest(x) for x in (bias, sinks) if x is not None)
    return C * eps(accumulation(dtype)) * size


def output_error(
    q: np.ndarray[Any, Any],
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    *,
    dtype: str,
    **scores: Any,
) -> float:
    """How far an output of softmax attention may be off."""
    rounding = eps(dtype) if dtype != accumulation(dtype) else 0.0
    return (score_error(q, k, dtype=dtype, **scores) + rounding) * largest(v)


def longest(x: np.ndarray[Any, Any]) -> float:
    """The largest Euclidean length along the last axis, of finite vectors."""
    return largest(np.sqrt(np.sum(np.square(np.asarray(x, np.float64)), axis=-1)))


def largest(x: np.ndarray[Any, Any]) -> float:
    """The largest finite magnitude."""
    x = np.abs(np.asarray(x, np.float64))
    return float(np.max(x[np.isfinite(x)], initial=0.0))
