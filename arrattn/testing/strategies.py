"""
Hypothesis strategies for calls of attention: shapes, values, masks, patterns, options.

Everything is drawn so that it is valid; nothing is drawn and thrown away. Lengths and
options shrink towards one head, one token and no option, values towards zeros and small
numbers that a person can read. All values are exact in every dtype, half precision
included.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn._state import DeltaState, LinearState
from arrattn.feature_maps._read import read_map
from arrattn.testing import draws
from arrattn.testing.case import Case, NamedMap
from arrattn.testing.draws import Shapes, one_of
from arrattn.testing.sights import Sight

__all__ = [
    "CHOOSING",
    "KINDS",
    "VISIBILITY",
    "arrays",
    "biases",
    "cases",
    "masks",
    "patterns",
    "segments",
    "shapes",
    "states",
    "windows",
]

Host = np.ndarray[Any, Any]
Shape = tuple[int, ...]

#: Keyword arguments that limit who sees whom, by family.
SOFTMAX_VISIBILITY = (
    *("is_causal", "mask", "window", "kv_lengths", "q_offset", "segment_ids", "pattern"),
)
VISIBILITY = {
    "dense": SOFTMAX_VISIBILITY,
    "local": SOFTMAX_VISIBILITY,
    "sparse": SOFTMAX_VISIBILITY,
    "linear": ("is_causal", "key_mask", "kv_lengths", "segment_ids"),
    "delta": ("key_mask", "kv_lengths", "segment_ids"),
}

#: Keyword arguments about what sparse attention chooses, beside its sizes.
CHOOSING = ("select", "per", "score", "block_scores", "always")

#: Kinds of numbers, the most usual more often.
KINDS = ("plain", "tied", "plain", "large", "subnormal")

#: Feature maps whose weights are not negative.
MAPS = tuple(map(NamedMap, ("elu_plus_one", "relu", "squares", "softmax", "gaussian")))


@st.composite
def arrays(draw: st.DrawFn, shape: Shape, *, kind: str = "plain", dtype: str = "float64") -> Host:
    """
    Draw real numbers.

    Parameters
    ----------
    shape : tuple of int
        The array's shape; any axis may be 0.
    kind : {"plain", "tied", "large", "subnormal", "whole"}, default: "plain"
        Eighths up to 2; -1, 0 and 1; 32 times the plain ones; plain ones too small for a
        normal number of `dtype`; whole numbers up to 4.
    dtype : str, default: "float64"
        Which numbers are subnormal.

    Returns
    -------
    array
        In float64.
    """
    return draws.numbers(draw, shape, kind, dtype)


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    without: Collection[str] = (),
    equal: bool = False,
    few: bool = False,
) -> Shapes:
    """
    Draw shapes of q, k and v: batch axes that broadcast, grouped heads, any two lengths.

    Parameters
    ----------
    without : collection of str, default: ()
        Capabilities to do without, of `arrattn.testing.CAPABILITIES`.
    equal : bool, default: False
        Whether there are as many queries as keys.
    few : bool, default: False
        Whether only a few shapes are drawn, where every new one is compiled.

    Returns
    -------
    tuple of tuple of int
        The three shapes.
    """
    return draws.shapes(draw, without, equal=equal, few=few)


@st.composite
def windows(draw: st.DrawFn) -> tuple[int | None, int | None]:
    """
    Draw a window.

    Returns
    -------
    tuple of (int or None)
        ``(left, right)``, not counting the position itself.
    """
    return draws.window(draw)


@st.composite
def masks(draw: st.DrawFn, full: Shape, *, expand: bool = False) -> Host:
    """
    Draw who sees whom, with rows that see nothing.

    Parameters
    ----------
    full : tuple of int
        (..., Hq, Nq, Nk).
    expand : bool, default: False
        Whether it has the full shape, or one that broadcasts to it.

    Returns
    -------
    array of bool
        True where visible.
    """
    return draws.mask(draw, full, expand=expand)


@st.composite
def biases(draw: st.DrawFn, full: Shape, *, kind: str = "plain", hides: bool = True) -> Host:
    """
    Draw what is added to scores.

    Parameters
    ----------
    full : tuple of int
        (..., Hq, Nq, Nk).
    kind : str, default: "plain"
        The kind of its numbers, as of `arrays`.
    hides : bool, default: True
        Whether some of it may be ``-inf``.

    Returns
    -------
    array
        In float64, of a shape that broadcasts to `full`.
    """
    return draws.bias(draw, full, kind, hides=hides)


@st.composite
def segments(draw: st.DrawFn, nq: int, nk: int, batch: Shape = ()) -> tuple[Host, Host]:
    """
    Draw segment ids of both sides, now and then one that no key has.

    Parameters
    ----------
    nq, nk : int
        Numbers of queries and keys.
    batch : tuple of int, default: ()
        The batch axes.

    Returns
    -------
    tuple of array of int
        Ids of queries and of keys, sorted or not.
    """
    return draws.ids(draw, nq, nk, batch)


@st.composite
def patterns(draw: st.DrawFn, nq: int, nk: int, batch: Shape = ()) -> Sight:
    """
    Draw a pattern, composed of up to three with ``&``, ``|`` and ``~``.

    Parameters
    ----------
    nq, nk : int
        Numbers of queries and keys.
    batch : tuple of int, default: ()
        The batch axes.

    Returns
    -------
    Sight
        The pattern, with its meaning.
    """
    return draws.pattern(draw, nq, nk, batch)


@st.composite
def cases(
    draw: st.DrawFn,
    family: str = "dense",
    *,
    without: Collection[str] = (),
    dtypes: Sequence[str] = ("float64",),
    sees: Sequence[str] = (),
    least: int = 0,
    most: int = 3,
    scoring: Sequence[str] = (),
    choosing: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    equal: bool = False,
    top_left: bool = False,
    maps: Sequence[NamedMap] = MAPS,
    shape: Shapes | None = None,
    few: bool = False,
) -> Case:
    """
    Draw a call of one family.

    Parameters
    ----------
    family : {"dense", "local", "sparse", "linear", "delta"}, default: "dense"
        Whose arguments there are: local has a window, sparse its sizes and scores that
        are exact in any order of summing, linear a feature map, delta keys no longer than 1
        and its gates.
    without : collection of str, default: ()
        Capabilities and keyword arguments to do without.
    dtypes : sequence of str, default: ("float64",)
        The dtypes to draw from.
    sees : sequence of str, default: ()
        Keyword arguments about visibility that there may be.
    least, most : int
        How many of those at once.
    scoring : sequence of str, default: ()
        Keyword arguments about scores that there may be.
    choosing : sequence of str, default: ()
        Keyword arguments about what sparse attention chooses that there may be.
    kinds : sequence of str
        The kinds of numbers, as of `arrays`.
    equal : bool, default: False
        Whether there are as many queries as keys.
    top_left : bool, default: False
        Whether the first query stands at the first key.
    maps : sequence of NamedMap
        The feature maps of the linear family.
    shape : tuple of tuple of int, optional
        The shapes of q, k and v. Default: drawn.
    few : bool, default: False
        Whether only a few shapes are drawn, where every new one is compiled.

    Returns
    -------
    Case
        The call.
    """
    q_shape, k_shape, v_shape = shape or draws.shapes(
        draw, without, equal=equal, few=few, many=bool(choosing)
    )
    dtype = draw(one_of(*dtypes))
    sparse, delta = family == "sparse", family == "delta"
    kind = "whole" if sparse else draw(one_of(*kinds))
    case = Case(
        draws.numbers(draw, q_shape, kind, dtype),
        draws.numbers(draw, k_shape, kind, dtype)
        * (60.0 if sparse else draws.shorten(k_shape[-1], kind) if delta else 1.0),
        draws.numbers(draw, v_shape, "tied" if kind == "tied" else "plain"),
        how=f"{kind} values",
        dtype=dtype,
        top_left=top_left,
    )
    options = case.options
    names = [n for n in sees if n not in without and n in VISIBILITY[family]]
    if family == "local":
        options["window"] = draws.window(draw)
        names = [n for n in names if n != "window"]
    if family == "linear" and "feature_map" not in without:
        options["feature_map"] = draw(one_of(*maps))
    if delta:
        options |= draws.gates(draw, case, without)
    most = 1 if "combine" in without else most
    options |= draws.visibility(draw, case, names, least=least, most=most, without=without)
    if family not in {"linear", "delta"}:
        allowed = [n for n in scoring if n not in without]
        options |= draws.scores(draw, case, allowed, without=without)
    if sparse:
        _make_exact(options, without)
        sizes = {"block_size": (2, 1, 3, 4), "top_k": (1, 2, 5), "route": (None, 1, 2, 8)}
        options |= {n: draw(one_of(*x)) for n, x in sizes.items() if n not in without}
        allowed = [n for n in choosing if n not in without]
        if "block_size" in without:  # nobody knows how many blocks there are
            allowed = [n for n in allowed if n != "block_scores"]
        options |= draws.choices(draw, case, allowed, expand="short masks" in without or few)
    return case


def _make_exact(options: dict[str, Any], without: Collection[str]) -> None:
    """
    Leave scores that are exact in any order of summing, so that only true ties are tied.

    Selection is a jump: where two scores differ by a rounding, two right ways to compute
    them may choose differently. Keys are multiples of 60, so that means of up to six of
    them are whole numbers too.
    """
    options.pop("softcap", None)  # tanh is not exact
    if "bias" in options:
        options["bias"] = np.asarray(np.round(options["bias"]))
    if "scale" not in without:
        options["scale"] = math.copysign(2.0**-7, options.get("scale", 1.0))


def states(case: Case) -> st.SearchStrategy[LinearState | DeltaState]:
    """
    Draw a state as a past of a few tokens might leave it.

    Parameters
    ----------
    case : Case
        The call that it goes into.

    Returns
    -------
    strategy of LinearState, or of DeltaState
        In NumPy.
    """
    d = case.q.shape[-1]
    lead = (*case.batch, *(case.heads[1:] if case.q.ndim > 2 else ()))
    if "beta" in case.options:
        return st.builds(DeltaState, arrays((*lead, d, case.v.shape[-1])))
    width = read_map(case.meant.get("feature_map", MAPS[0].build(d))).output_dim(d)
    S = arrays((*lead, width, case.v.shape[-1]))
    return st.builds(LinearState, S, arrays((*lead, width)).map(np.abs))
