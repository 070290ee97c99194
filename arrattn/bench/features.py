"""
``arrattn compare --task features``: how far features are from the kernel they stand for.

On real activations: the output of linear attention by so many features, against attention by
the exact kernel over all pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrattn import feature_maps, linear_attention
from arrattn.bench.inputs import Inputs
from arrattn.bench.problem import relative_error
from arrattn.feature_maps import FeatureMap

__all__ = ["Curve", "curves", "draw", "rows"]

Host = np.ndarray[Any, Any]

WIDTHS = (32, 64, 128, 256, 512, 1024)
DRAWS = 5
TOP = 3.0  # of the picture: an output of zeros has an error of 1

#: Features of exponentials: a name, and the options that make them.
_EXPONENTIAL: dict[str, dict[str, Any]] = {
    "positive": {},
    "positive, independent": {"orthogonal": False},
    "hyperbolic": {"features": "hyperbolic"},
    "trigonometric": {"features": "trigonometric"},
    "nystrom, some of the tokens": {"landmarks": True},
}

#: The kernels, and of which features each has a curve.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "softmax": _EXPONENTIAL,
    "softmax, scale / 4": _EXPONENTIAL,
    "gaussian": _EXPONENTIAL,
    "laplacian": {
        "trigonometric": {},
        "binning, 4 bins": {"features": "binning", "bins": 4},
        "binning, 16 bins": {"features": "binning", "bins": 16},
        "nystrom, some of the tokens": {"landmarks": True},
    },
}


class Curve(NamedTuple):
    """
    The error of one kind of features.

    Attributes
    ----------
    kernel, features : str
        Which.
    errors : tuple of tuple of float
        For each of `WIDTHS`, one for each draw: ``|o - exact| / |exact|``.
    mean_error : float
        That of the plain mean of the values.
    """

    kernel: str
    features: str
    errors: tuple[tuple[float, ...], ...]
    mean_error: float


def curves(inputs: Inputs, seed: int) -> Iterator[Curve]:
    """
    Measure every kind of features.

    Parameters
    ----------
    inputs : Inputs
        Queries, keys and values; all pairs of them are formed.
    seed : int
        Of the first draw.

    Yields
    ------
    Curve
        One for each kernel and kind of features.
    """
    group = inputs.q.shape[0] // inputs.k.shape[0]
    q = inputs.q.astype(np.float64)
    k, v = (np.repeat(x.astype(np.float64), group, axis=0) for x in (inputs.k, inputs.v))
    for kernel, kinds in KINDS.items():
        make = _maker(kernel, q, k, seed)
        w = make(16, 0).kernel(q, k)
        exact = w @ v / np.sum(w, axis=-1, keepdims=True)
        mean = np.broadcast_to(np.mean(v, axis=-2, keepdims=True), exact.shape)
        for features, options in kinds.items():
            errors = []
            for m in WIDTHS:
                maps = (make(m, draw, **options) for draw in range(DRAWS))
                outs = (linear_attention(q, k, v, feature_map=phi) for phi in maps)
                errors.append(tuple(relative_error(out, exact) for out in outs))
            yield Curve(kernel, features, tuple(errors), relative_error(mean, exact))


def _maker(kernel: str, q: Host, k: Host, seed: int) -> Callable[..., FeatureMap]:
    """How maps of a kernel are made; the bandwidth is half of the median distance."""
    dim = q.shape[-1]
    name, _, softer = kernel.partition(",")
    if name == "softmax":
        make = partial(feature_maps.softmax, scale=dim**-0.5 / (4 if softer else 1))
    else:
        apart = q[:, ::8, None, :] - k[:, None, ::8, :]
        order = 1 if name == "laplacian" else 2
        sigma = 0.5 * float(np.median(np.linalg.norm(apart, ord=order, axis=-1)))
        make = partial(getattr(feature_maps, name), sigma)
    tokens = np.concatenate([q, k]).reshape(-1, dim)

    def made(m: int, draw: int, *, landmarks: bool = False, **options: Any) -> FeatureMap:
        phi: FeatureMap = make(dim=dim, num_features=m, rng=seed + draw, **options)
        if not landmarks:
            return phi
        chosen = np.random.default_rng(seed + draw).choice(tokens, m, replace=len(tokens) < m)
        return feature_maps.nystrom(phi, chosen)

    return made


def rows(found: Sequence[Curve]) -> list[tuple[str, ...]]:
    """
    Set the medians over the draws as text, under a head.

    Parameters
    ----------
    found : sequence of Curve
        What was measured.

    Returns
    -------
    list of tuple of str
        The head, and one row for each curve.
    """
    body = [
        (curve.kernel, curve.features, *(f"{statistics.median(e):.3g}" for e in curve.errors))
        for curve in found
    ]
    return [("kernel", "features", *(f"{m:,}" for m in WIDTHS)), *body]


def draw(path: Path, found: Sequence[Curve], title: str) -> None:
    """
    Draw error against number of features, and write the picture to a file.

    Parameters
    ----------
    path : Path
        Where; the ending chooses the kind of picture.
    found : sequence of Curve
        What was measured.
    title : str
        What on.
    """
    from arrattn.bench.plot import INK, describe, save, sheet

    colours = ("#d55e00", "#e69f00", "#0072b2", "#009e73")
    figure = sheet((16.0, 4.2), title)
    for axes, kernel in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        own = [curve for curve in found if curve.kernel == kernel]
        for i, curve in enumerate(own):
            colour = "#cc79a7" if curve.features.startswith("nystrom") else colours[i]
            middle = [statistics.median(errors) for errors in curve.errors]
            beyond = " (off the scale)" if min(middle) > TOP else ""
            label = f"{curve.features}{beyond}"
            axes.plot(WIDTHS, middle, color=colour, marker="o", markersize=4, label=label)
            low, high = ([f(errors) for errors in curve.errors] for f in (min, max))
            axes.fill_between(WIDTHS, low, high, color=colour, alpha=0.15, linewidth=0)
        # What the law of large numbers promises, as steep as it is anywhere.
        start = 0.5 * min(statistics.median(curve.errors[0]) for curve in own)
        promised = [start * (WIDTHS[0] / m) ** 0.5 for m in WIDTHS]
        axes.plot(WIDTHS, promised, color=INK, linewidth=0.8, linestyle=":", label="1 / sqrt(m)")
        axes.axhline(own[0].mean_error, color=INK, linewidth=0.8, linestyle="--")
        axes.annotate(
            "the mean of the values", (WIDTHS[-1], own[0].mean_error), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color=INK, ha="right",
        )  # fmt: skip
        describe(axes, f"kernel: {kernel}", "error: |o - exact| / |exact|")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=TOP)
        axes.set_xticks(WIDTHS, [f"{m:,}" for m in WIDTHS], fontsize=7)
        axes.set_xlabel("features m (median; min to max)", fontsize=9)
        axes.legend(fontsize=7, loc="lower left")
    save(figure, path, dpi=100)
