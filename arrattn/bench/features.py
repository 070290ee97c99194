"""
``arrattn compare --task features``: how far random features are from their kernel.

On real activations: the output of linear attention by so many features, against attention by
the exact kernel over all pairs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrattn import feature_maps, linear_attention
from arrattn.bench.inputs import Inputs
from arrattn.feature_maps import FeatureMap

__all__ = ["HEAD", "Curve", "curves", "draw", "rows"]

Host = np.ndarray[Any, Any]

WIDTHS = (32, 64, 128, 256, 512, 1024, 2048)
DRAWS = 5
HEAD = ("kernel", "features", *(f"{m:,}" for m in WIDTHS))

#: The kernels, and of which features each has a curve: a name, and the options that make it.
KINDS: dict[str, dict[str, dict[str, Any]]] = {
    "softmax": {
        "positive": {},
        "positive, independent": {"orthogonal": False},
        "hyperbolic": {"features": "hyperbolic"},
        "trigonometric": {"features": "trigonometric"},
    },
    "gaussian": {
        "positive": {},
        "positive, independent": {"orthogonal": False},
        "hyperbolic": {"features": "hyperbolic"},
        "trigonometric": {"features": "trigonometric"},
    },
    "laplacian": {
        "trigonometric": {},
        "binning, 4 bins": {"features": "binning", "bins": 4},
        "binning, 16 bins": {"features": "binning", "bins": 16},
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
        make = _maker(kernel, q, k)
        w = make(num_features=16, rng=0).kernel(q, k)
        exact = w @ v / np.sum(w, axis=-1, keepdims=True)
        mean = np.broadcast_to(np.mean(v, axis=-2, keepdims=True), exact.shape)
        for features, options in kinds.items():
            errors = tuple(
                tuple(
                    _off(
                        linear_attention(
                            q, k, v, feature_map=make(num_features=m, rng=seed + i, **options)
                        ),
                        exact,
                    )
                    for i in range(DRAWS)
                )
                for m in WIDTHS
            )
            yield Curve(kernel, features, errors, _off(mean, exact))


def _maker(kernel: str, q: Host, k: Host) -> Callable[..., FeatureMap]:
    """How maps of a kernel are made; half of all distances are below the bandwidth."""
    dim = q.shape[-1]
    make = getattr(feature_maps, kernel)
    if kernel == "softmax":
        return lambda **options: make(dim=dim, **options)
    apart = q[:, ::8, None, :] - k[:, None, ::8, :]
    order = 1 if kernel == "laplacian" else 2
    sigma = float(np.median(np.linalg.norm(apart, ord=order, axis=-1)))
    return lambda **options: make(sigma, dim=dim, **options)


def _off(out: Host, exact: Host) -> float:
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


def rows(found: Sequence[Curve]) -> list[tuple[str, ...]]:
    """
    Set the medians over the draws as text, under `HEAD`.

    Parameters
    ----------
    found : sequence of Curve
        What was measured.

    Returns
    -------
    list of tuple of str
        One row for each curve.
    """
    return [
        (
            curve.kernel,
            curve.features,
            *(f"{statistics.median(errors):.3g}" for errors in curve.errors),
        )
        for curve in found
    ]


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
    figure = sheet((13.5, 4.6), title)
    for axes, kernel in zip(figure.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        own = [curve for curve in found if curve.kernel == kernel]
        for curve, colour in zip(own, colours, strict=False):
            middle = [statistics.median(errors) for errors in curve.errors]
            axes.plot(WIDTHS, middle, color=colour, marker="o", markersize=4, label=curve.features)
            low, high = ([f(errors) for errors in curve.errors] for f in (min, max))
            axes.fill_between(WIDTHS, low, high, color=colour, alpha=0.15, linewidth=0)
        # What the law of large numbers promises, as steep as it is anywhere.
        start = 0.5 * min(statistics.median(curve.errors[0]) for curve in own)
        promised = [start * (WIDTHS[0] / m) ** 0.5 for m in WIDTHS]
        axes.plot(WIDTHS, promised, color=INK, linewidth=0.8, linestyle=":", label="1 / sqrt(m)")
        axes.axhline(own[0].mean_error, color=INK, linewidth=0.8, linestyle="--")
        axes.annotate(
            "the mean of the values", (WIDTHS[0], own[0].mean_error), xytext=(0, 3),
            textcoords="offset points", fontsize=8, color=INK,
        )  # fmt: skip
        describe(axes, f"{kernel} kernel", "error: |o - exact| / |exact|")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(WIDTHS, [f"{m:,}" for m in WIDTHS], fontsize=8)
        axes.set_xlabel("features (line: median of 5 draws; band: min to max)", fontsize=9)
        axes.legend(fontsize=8)
    save(figure, path)
