"""How far linear and delta attention may be off: forward errors of sums of products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from arrattn import reference
from arrattn._state import LinearState
from arrattn.feature_maps import FeatureMap, Features, elu_plus_one
from arrattn.feature_maps._read import read_map
from arrattn.testing.case import Case
from arrattn.testing.tolerance import C, accumulation, eps, largest, longest

__all__ = ["case_errors", "delta_errors", "exponent", "linear_errors"]

Host = np.ndarray[Any, Any]


class Norms(FeatureMap):
    """The length of another map's features, one bound for all products with them."""

    name = "norms"

    def __init__(self, of: FeatureMap) -> None:
        self.of = of

    def output_dim(self, dim: int) -> int:
        del dim
        return 1

    def phi(self, x: Any, xp: Any, weights: Any = None) -> Features:
        del xp, weights
        phi, log = self.of.phi(x, np)
        return Features(np.sqrt(np.sum(phi * phi, axis=-1, keepdims=True)), log)

    def kernel(self, x: Any, y: Any) -> Any:
        return self.phi(x, np).phi @ self.phi(y, np).phi.swapaxes(-1, -2)


def case_errors(case: Case, dtype: str, out: Host) -> tuple[Any, Any, Any]:
    """
    How far output, `S` and `z` of a call may be off.

    Parameters
    ----------
    case : Case
        The call.
    dtype : str
        The dtype whose rounding counts.
    out : array
        The exact output.

    Returns
    -------
    tuple of float or array
        The three bounds.
    """
    return linear_errors(case.arrays, case.meant, dtype, out)


def linear_errors(
    arrays: Sequence[Host], options: Mapping[str, Any], dtype: str, out: Host
) -> tuple[Any, Any, Any]:
    """
    How far output, `S` and `z` may be off.

    Sums of ``a_i b_i`` carry an error of ``eps |a| |b|``, features one of `eps` times their
    exponent; a quotient has the errors of both its sums over the size of the lower one.
    A weight that decays by `e^-x` is off by `1 + x` units, less than 2 of a decay half as fast.

    Parameters
    ----------
    arrays : sequence of array
        `q`, `k` and `v`.
    options : mapping
        Keyword arguments of `arrattn.reference.linear_attention`.
    dtype : str
        The dtype whose rounding counts.
    out : array
        The exact output.

    Returns
    -------
    tuple of float or array
        The three bounds.
    """
    q, k, v = arrays
    options = {n: x for n, x in options.items() if n != "return_state"}
    phi = read_map(options.pop("feature_map", elu_plus_one))
    unit = C * eps(accumulation(dtype)) * (1 + exponent(phi, q, k))
    state, norms = options.pop("initial_state", None), Norms(phi)
    plain = options | {"normalize": False, "scale": 1.0}
    ones, top_v = np.ones_like(v[..., :1]), np.full_like(v[..., :1], largest(v))
    lower_state = bound_state = ones_state = None
    if state is not None:
        z_norm = np.linalg.norm(state.z, axis=-1, keepdims=True)
        S_norm = np.linalg.norm(state.S, axis=-2).max(-1, initial=0.0)[..., None, None]
        lower_state = LinearState(state.z[..., None], state.z)
        ones_state = LinearState(z_norm[..., None], z_norm)
        bound_state = LinearState(S_norm, z_norm)
    by_norms = plain | {"feature_map": norms}
    if (g := options.get("log_decay")) is not None:
        unit, width = 2 * unit, phi.output_dim(q.shape[-1])
        by_channel = g.ndim >= min(v.ndim, 3) and g.shape[-1] in (1, width)
        by_norms["log_decay"] = 0.5 * (np.max(g, axis=-1, keepdims=True) if by_channel else g)
    upper, after = reference.linear_attention(
        q, k, top_v, initial_state=bound_state, return_state=True, **by_norms
    )
    if options.get("normalize", True):
        total = reference.linear_attention(
            q, k, ones, initial_state=lower_state, feature_map=phi, **plain
        )
        size = reference.linear_attention(q, k, ones, initial_state=ones_state, **by_norms)
        least = np.where(total == 0, np.inf, np.abs(total))
        within = unit * (upper + np.abs(out) * size) / least
        # Where the lower sum is all error, the quotient can be anything.
        within = np.where(unit * size > 0.1 * least, np.inf, within)
    else:
        within = unit * abs(options.get("scale", 1.0)) * upper
    if dtype != accumulation(dtype):
        within = within + eps(dtype) * np.abs(out)
    return within, unit * after.S, unit * after.z


def delta_errors(case: Any, dtype: str, out: Host) -> tuple[Any, float]:
    """
    How far output and memory of the delta rule may be off.

    With keys of length 1 or less and `beta` up to 1 a step never enlarges an error, and makes
    one of the size of the memory and the value; the memory holds no more than what was written.

    Parameters
    ----------
    case : Case
        The call, or what has its arrays, lengths and options.
    dtype : str
        The dtype whose rounding counts.
    out : array
        The exact output.

    Returns
    -------
    tuple of (array, float)
        The two bounds.
    """
    n, state = case.lengths[1], case.options.get("initial_state")
    written = longest(case.v) * n + (0.0 if state is None else longest(state.S.swapaxes(-1, -2)))
    memory = C * eps(accumulation(dtype)) * (1 + n) * written * max(1.0, longest(case.k)) ** 2
    scale = abs(case.options.get("scale", 1.0))
    within = scale * longest(case.q) * memory
    # Products below the normal numbers are off by no share of theirs, but by a step between those.
    step = (1 + n) * case.q.shape[-1] * float(np.finfo(accumulation(dtype)).smallest_subnormal)
    within, memory = within + max(1.0, scale) * step, memory + step
    rounding = eps(dtype) * np.abs(out) if dtype != accumulation(dtype) else 0.0
    return within + rounding, memory


def exponent(phi: FeatureMap, q: Host, k: Host) -> float:
    """
    Bound the exponents and angles that a map's features are made of.

    Parameters
    ----------
    phi : FeatureMap
        The map.
    q, k : array
        What it is applied to.

    Returns
    -------
    float
        The bound.
    """
    x = max(longest(q), longest(k))
    weights: Any = phi.weights(np.zeros(1), np)
    if weights is None:
        return float(x + q.shape[-1])
    factor: float | None = getattr(phi, "_factor", None)
    if phi.name == "hedgehog":
        return float(x + longest(weights.swapaxes(-1, -2)) * x)
    if phi.name == "nystrom":  # features are differences of values of the kernel
        d, of = q.shape[-1], phi.of  # type: ignore[attr-defined]
        points = (y.reshape(-1, d) for y in (q, k))
        values = max(longest(of.kernel(y, weights[:, :d])) for y in points)
        return float(x + values * np.linalg.norm(weights[:, d:], 2))
    if factor is None:  # a grid's cells
        return float(x)
    features: int = phi.num_features  # type: ignore[attr-defined]
    return longest(weights.T) * factor * x + 2 * (factor * x) ** 2 + features
