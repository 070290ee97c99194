"""
``arrattn compare --task selection``: what each way to choose holds of dense attention.

On real activations: the share of dense attention's weight on the keys that are seen, and the
error of the output, for more and more keys seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrattn import attention, local_attention, sparse_attention
from arrattn.bench.files import CannotRun
from arrattn.bench.inputs import Inputs
from arrattn.bench.problem import relative_error

__all__ = ["Curve", "Point", "curves", "draw", "mean_error", "rows"]

Host = np.ndarray[Any, Any]

BUDGETS = (1, 2, 4, 8)  # blocks' worth of keys beside the own block
ROUTE = 8  # blocks searched for single keys, the default

#: Ways to choose: a name, and the options that make it.
WAYS: dict[str, dict[str, Any]] = {
    "keys, exact": {"route": None},
    "keys, routed by mean": {"score": "mean"},
    "keys, routed by bound": {"score": "bound"},
    "keys, routed by best": {"score": "best"},
    "blocks by mean": {"select": "blocks", "score": "mean"},
    "blocks by bound": {"select": "blocks", "score": "bound"},
    "blocks by best": {"select": "blocks", "score": "best"},
    "blocks by mean, per block": {"select": "blocks", "per": "block"},
    "blocks by best, per block": {"select": "blocks", "per": "block", "score": "best"},
    "blocks at random": {"select": "blocks"},
    "a window": {},
}


class Point(NamedTuple):
    """
    One way to choose, with one number of keys.

    Attributes
    ----------
    keys : float
        Keys that a query sees, the mean over queries and heads.
    mass : float
        Share of dense attention's weight that lies on them.
    error : float
        ``|o - dense| / |dense|``.
    """

    keys: float
    mass: float
    error: float


class Curve(NamedTuple):
    """
    One way to choose.

    Attributes
    ----------
    name : str
        Of `WAYS`.
    points : tuple of Point
        One for each of `BUDGETS`.
    """

    name: str
    points: tuple[Point, ...]


def curves(inputs: Inputs, *, causal: bool, seed: int) -> Iterator[Curve]:
    """
    Measure every way to choose.

    Parameters
    ----------
    inputs : Inputs
        Queries, keys and values.
    causal : bool
        Whether a query sees no later key.
    seed : int
        Of the blocks at random.

    Yields
    ------
    Curve
        One for each of `WAYS`.

    Raises
    ------
    CannotRun
        If there are fewer blocks than are to be chosen.
    """
    n = inputs.k.shape[-2]
    block = _block(n)
    if -(-n // block) <= max(BUDGETS):
        msg = f"--lengths: --task selection needs {_fewest()} tokens or more, got {n}"
        raise CannotRun(msg)
    exact, whole = attention(inputs.q, inputs.k, inputs.v, is_causal=causal, return_lse=True)
    for name, way in WAYS.items():
        points = []
        for budget in BUDGETS:
            if name == "a window":
                out, lse, keys = _window(inputs, (budget + 1) * block, causal=causal)
            else:
                options = dict(way)
                if name == "blocks at random":
                    options["block_scores"] = _drawn(inputs, block, seed)
                out, lse, keys = _sparse(inputs, block, budget, options, causal=causal)
            mass = float(np.mean(np.exp(lse.astype(np.float64) - whole)))
            points.append(Point(keys, mass, relative_error(out, exact)))
        yield Curve(name, tuple(points))


def mean_error(inputs: Inputs, *, causal: bool) -> float:
    """
    The error of an answer that looks at no query: the mean of the values that can be seen.

    Parameters
    ----------
    inputs : Inputs
        Queries, keys and values.
    causal : bool
        Whether a query sees no later key.

    Returns
    -------
    float
        ``|mean - dense| / |dense|``.
    """
    exact: Any = attention(inputs.q, inputs.k, inputs.v, is_causal=causal)
    mean: Any = attention(inputs.q, inputs.k, inputs.v, is_causal=causal, scale=0.0)
    return relative_error(mean, exact)


def _block(n: int) -> int:
    return math.isqrt(max(n - 1, 0)) + 1


def _fewest() -> int:
    """Tokens that make one block more than are chosen."""
    return next(n for n in range(1, 10**6) if -(-n // _block(n)) > max(BUDGETS))


def _sparse(
    inputs: Inputs, block: int, budget: int, options: dict[str, Any], *, causal: bool
) -> tuple[Host, Host, float]:
    """The output, its log-sum-exp, and how many keys a query sees."""
    whole = options.get("select") == "blocks"
    out, lse, chosen = sparse_attention(
        inputs.q, inputs.k, inputs.v, block_size=block,
        top_k=budget if whole else budget * block, is_causal=causal,
        return_lse=True, return_selection=True, **({"route": ROUTE} | options),
    )  # fmt: skip
    n = inputs.q.shape[-2]
    at = np.arange(n)
    own = at // block * block
    seen = (at + 1 if causal else np.minimum(own + block, n)) - own
    size = np.where(chosen >= 0, np.minimum(n - chosen * block, block) if whole else 1, 0)
    # Of causal order only the own block is cut: all blocks that can be chosen lie before it.
    rows = np.bincount(own // block) if chosen.shape[-2] != n else np.ones(n)
    more = np.sum(np.sum(size, axis=-1) * rows, axis=-1) / n
    return out, lse, float(np.mean(seen) + np.mean(more))


def _window(inputs: Inputs, keys: int, *, causal: bool) -> tuple[Host, Host, float]:
    """As `_sparse`, of the nearest keys."""
    left, right = (keys - 1, 0) if causal else (keys // 2, keys - 1 - keys // 2)
    out, lse = local_attention(inputs.q, inputs.k, inputs.v, window=(left, right), return_lse=True)
    n = inputs.q.shape[-2]
    at = np.arange(n)
    seen = np.minimum(at + right, n - 1) - np.maximum(at - left, 0) + 1
    return out, lse, float(np.mean(seen))


def _drawn(inputs: Inputs, block: int, seed: int) -> Host:
    """Scores that know nothing."""
    heads, n, _ = inputs.q.shape
    shape = (heads, n, -(-inputs.k.shape[-2] // block))
    return np.random.default_rng(seed).random(shape).astype(inputs.q.dtype)


def rows(found: Sequence[Curve]) -> list[tuple[str, ...]]:
    """
    Set the shares and errors as text, under a head.

    Parameters
    ----------
    found : sequence of Curve
        What was measured.

    Returns
    -------
    list of tuple of str
        The head, and one row for each curve.
    """
    blocks = (f"{budget} block{'s' if budget > 1 else ''}" for budget in BUDGETS)
    body = [
        (curve.name, *(f"{100 * p.mass:.1f} %, {p.error:.3f}" for p in curve.points))
        for curve in found
    ]
    return [("own block and", *blocks), *body]


def draw(path: Path, found: Sequence[Curve], mean: float, title: str) -> None:
    """
    Draw error and share of the weight against keys seen, and write the picture to a file.

    Parameters
    ----------
    path : Path
        Where; the ending chooses the kind of picture.
    found : sequence of Curve
        What was measured.
    mean : float
        Of `mean_error`.
    title : str
        What on.
    """
    from arrattn.bench.plot import INK, describe, save, sheet

    colours = {"mean": "#0072b2", "bound": "#e69f00", "best": "#009e73", "exact": "#222222"}
    figure = sheet((13.5, 5.2), title)
    errors, masses = figure.subplots(1, 2)
    for curve in found:
        kind = next((word for word in colours if word in curve.name), "")
        colour = colours.get(kind, "#d55e00" if curve.name == "a window" else "#999999")
        together = "per block" in curve.name
        style = ":" if together else "-" if curve.name.startswith("keys") else "--"
        x = [p.keys for p in curve.points]
        for axes, y in (
            (errors, [p.error for p in curve.points]),
            (masses, [p.mass for p in curve.points]),
        ):
            axes.plot(
                x, y, color=colour, linestyle=style, marker="o", markersize=4, label=curve.name
            )
    errors.axhline(mean, color=INK, linewidth=0.8, linestyle="--")
    errors.annotate(
        "the mean of the values", (1, mean), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", fontsize=8, color=INK, ha="right",
    )  # fmt: skip
    describe(errors, "Error", "|o - dense| / |dense|")
    describe(masses, "Share of dense attention's weight", "on the keys seen")
    ticks = [round(p.keys) for p in found[0].points]
    for axes in (errors, masses):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks], fontsize=8)
        axes.tick_params(axis="x", which="minor", bottom=False)
        axes.set_xlabel("keys that a query sees, on average", fontsize=9)
        axes.set_ylim(bottom=0)
    masses.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path, dpi=100)
