"""
Hypothesis strategies for calls of attention: shapes, values, masks, patterns, options.

Everything is drawn so that it is valid; nothing is drawn and thrown away. Lengths and
options shrink towards one head, one token and no option, values towards zeros and small
numbers that a person can read. All values are exact in every dtype, half precision
included, unless they are subnormal there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn._state import LinearState
from arrattn.testing import sights
from arrattn.testing.case import Case, NamedMap
from arrattn.testing.sights import Sight

__all__ = [
    "VISIBILITY",
    "arrays",
    "biases",
    "cases",
    "feature_maps",
    "masks",
    "patterns",
    "scores",
    "segments",
    "shapes",
    "visibility",
    "windows",
]

Host = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]

LENGTHS = (1, 2, 3, 5, 8)
BATCHES: tuple[Shape, ...] = ((1,), (2,), (), (2, 2))

#: Keyword arguments that limit who sees whom, by family.
SOFTMAX_VISIBILITY = ("is_causal", "mask", "window", "kv_lengths", "q_offset", "segment_ids", "pattern")
VISIBILITY = {
    "dense": SOFTMAX_VISIBILITY,
    "local": SOFTMAX_VISIBILITY,
    "sparse": SOFTMAX_VISIBILITY,
    "linear": ("is_causal", "key_mask", "kv_lengths", "segment_ids"),
}

#: Small numbers, the simplest first: byte 0 is 0.0, to which a failing example shrinks.
SMALL = np.asarray(sorted(np.arange(-16, 17) / 8, key=lambda x: (x % 1 != 0, x % 0.5 != 0, abs(x), x < 0)))
WHOLE = np.asarray([0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0])
KINDS = ("plain", "plain", "tied", "large", "subnormal")
TINY = {"float64": 2.0**-1060, "float32": 2.0**-135, "float16": 2.0**-18, "bfloat16": 2.0**-128}


@st.composite
def arrays(draw: st.DrawFn, shape: Shape, *, kind: str = "plain", dtype: str = "float64") -> Host:
    """
    Draw real numbers.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
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
    data = np.frombuffer(draw(_bytes(math.prod(shape))), np.uint8)
    table = {"tied": WHOLE[:3], "whole": WHOLE}.get(kind, SMALL)
    factor = {"large": 32.0, "subnormal": TINY[dtype]}.get(kind, 1.0)
    return (table[data % table.size] * factor).reshape(shape)


def _bytes(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


@st.composite
def _bools(draw: st.DrawFn, shape: Shape, *, every: int) -> Host:
    """Mostly True: one in `every` is not."""
    data = np.frombuffer(draw(_bytes(math.prod(shape))), np.uint8)
    return (data % every != 1).reshape(shape)


@st.composite
def shapes(draw: st.DrawFn, *, without: Collection[str] = (), equal: bool = False) -> Shapes:
    """
    Draw shapes of q, k and v: batch axes that broadcast, grouped heads, any two lengths.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    without : collection of str, default: ()
        Capabilities to do without, of `arrattn.testing.subject.CAPABILITIES`.
    equal : bool, default: False
        Whether there are as many queries as keys.

    Returns
    -------
    tuple of tuple of int
        The three shapes.
    """
    lengths = st.sampled_from(LENGTHS if "empty" in without else (*LENGTHS, 0))
    nq = draw(lengths)
    nk = nq if equal or "cross" in without else draw(lengths)
    d = draw(st.sampled_from((1, 2, 4)))
    dv = d if "dv" in without else draw(st.sampled_from((1, 2, 3)))
    hkv = draw(st.sampled_from((1, 2)))
    hq = hkv * (1 if "gqa" in without else draw(st.sampled_from((1, 2, 3))))
    batch = draw(st.sampled_from(BATCHES[:2] if "rank" in without else BATCHES))
    if batch == () and hq == 1 and "rank" not in without and draw(st.booleans()):
        return (nq, d), (nk, d), (nk, dv)
    leads = (batch,) * 3
    if "broadcast" not in without and draw(st.integers(0, 3)) == 3:
        keep_rank = "rank" in without
        leads = tuple(draw(_broadcast(batch, drop=not keep_rank)) for _ in "qkv")  # type: ignore[assignment]
    a, b, c = leads
    return (*a, hq, nq, d), (*b, hkv, nk, d), (*c, hkv, nk, dv)


@st.composite
def _broadcast(draw: st.DrawFn, shape: Shape, *, drop: bool = True) -> Shape:
    """A shape that broadcasts to this one: axes made 1, leading axes left out."""
    left_out = draw(st.integers(0, len(shape))) if drop else 0
    return tuple(1 if n > 1 and draw(st.booleans()) else n for n in shape[left_out:])


@st.composite
def windows(draw: st.DrawFn) -> tuple[int | None, int | None]:
    """
    Draw a window.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.

    Returns
    -------
    tuple of (int or None)
        ``(left, right)``, not counting the position itself.
    """
    side = st.sampled_from((0, 1, 2, 4, None, 40))
    return draw(side), draw(side)


@st.composite
def masks(draw: st.DrawFn, full: Shape, *, expand: bool = False) -> Host:
    """
    Draw who sees whom, with rows that see nothing.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    full : tuple of int
        (..., Hq, Nq, Nk).
    expand : bool, default: False
        Whether it has the full shape, or one that broadcasts to it.

    Returns
    -------
    array of bool
        True where visible.
    """
    shape = full if expand else draw(_broadcast(full))
    mask: Host = draw(_bools(shape, every=3))
    if len(shape) > 1 and draw(st.integers(0, 2)) == 2:  # rows that see nothing
        mask = mask & draw(_bools(shape[:-1], every=3))[..., None]
    return mask


@st.composite
def _key_masks(draw: st.DrawFn, batch: Shape, nk: int) -> Host:
    """Which keys are there: batch axes, no heads."""
    return draw(_bools((*draw(_broadcast(batch)), nk), every=3))  # type: ignore[no-any-return]


@st.composite
def biases(draw: st.DrawFn, full: Shape, *, kind: str = "plain", hides: bool = True) -> Host:
    """
    Draw what is added to scores.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
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
    shape = draw(_broadcast(full))
    bias: Host = draw(arrays(shape, kind=kind))
    if hides and draw(st.booleans()):
        bias = np.where(draw(_bools(shape, every=5)), bias, -np.inf)
    return bias


@st.composite
def over_batch(draw: st.DrawFn, batch: Shape, low: int, high: int) -> Any:
    """An int, or an array of them over the batch axes, some of which broadcast."""
    if not draw(st.booleans()):
        return draw(st.integers(low, high))
    shape = draw(_broadcast(batch))
    size = math.prod(shape)
    items = draw(st.lists(st.integers(low, high), min_size=size, max_size=size))
    return np.asarray(items, np.int64).reshape(shape)


@st.composite
def segments(draw: st.DrawFn, nq: int, nk: int, batch: Shape) -> tuple[Host, Host]:
    """
    Draw segment ids of both sides, now and then one that no key has.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    nq, nk : int
        Numbers of queries and keys.
    batch : tuple of int
        The batch axes.

    Returns
    -------
    tuple of array of int
        Ids of queries and of keys, sorted or not.
    """
    def ids(n: int, most: int) -> Host:
        shape = (*draw(_broadcast(batch)), n)
        data = np.frombuffer(draw(_bytes(math.prod(shape))), np.uint8)
        return (data % most).astype(np.int64).reshape(shape)

    q_ids, k_ids = ids(nq, 4), ids(nk, 3)
    return (np.sort(q_ids), np.sort(k_ids)) if draw(st.booleans()) else (q_ids, k_ids)


def _simple_patterns(nq: int, nk: int, batch: Shape) -> st.SearchStrategy[Sight]:
    few = st.integers(0, 5)
    return st.one_of(
        st.just(sights.causal()),
        windows().map(lambda w: sights.window(*w)),
        few.map(sights.everywhere),
        st.integers(1, 4).map(sights.strided),
        over_batch(batch, 0, nk + 2).map(sights.prefix),
        segments(nq, nk, batch).map(lambda ids: sights.segments(*ids)),
        st.builds(sights.blocks, _tables(), st.integers(1, 4)),
        st.builds(sights.where, few, few),
    )


@st.composite
def _tables(draw: st.DrawFn) -> Host:
    """A table over blocks, which need not reach the last key."""
    return draw(_bools((draw(st.integers(1, 3)), draw(st.integers(1, 3))), every=2))  # type: ignore[no-any-return]


@st.composite
def patterns(draw: st.DrawFn, nq: int, nk: int, batch: Shape) -> Sight:
    """
    Draw a pattern, composed of up to three with ``&``, ``|`` and ``~``.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    nq, nk : int
        Numbers of queries and keys.
    batch : tuple of int
        The batch axes.

    Returns
    -------
    Sight
        The pattern, with its meaning.
    """
    simple = _simple_patterns(nq, nk, batch)
    sight = draw(simple)
    for _ in range(draw(st.integers(0, 2))):
        other = draw(simple)
        sight = sight & other if draw(st.booleans()) else sight | other
    return ~sight if draw(st.integers(0, 4)) == 4 else sight


@st.composite
def visibility(
    draw: st.DrawFn, case: Case, names: Sequence[str], *, most: int = 3, least: int = 0
) -> dict[str, Any]:
    """
    Draw arguments that say who sees whom.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    case : Case
        The call they are for.
    names : sequence of str
        Which of them there may be.
    most, least : int
        How many of them at once.

    Returns
    -------
    dict
        Keyword arguments.
    """
    if not names:
        return {}
    chosen = draw(st.lists(st.sampled_from(list(names)), min_size=min(least, len(names)), max_size=most, unique=True))
    return {name: draw(_visibility(name, case)) for name in chosen}


def _visibility(name: str, case: Case) -> st.SearchStrategy[Any]:
    (nq, nk), batch = case.lengths, case.batch
    hq = case.heads[0]
    if name == "is_causal":
        return st.just(True)
    if name == "mask":
        return masks((*batch, hq, nq, nk))
    if name == "key_mask":
        return _key_masks(batch, nk)
    if name == "window":
        return windows()
    if name == "kv_lengths":
        return over_batch(batch, 0, nk)
    if name == "q_offset":
        return over_batch(batch, -2, nk + 2)
    if name == "segment_ids":
        return segments(nq, nk, batch)
    return patterns(nq, nk, batch)


@st.composite
def scores(draw: st.DrawFn, case: Case, names: Sequence[str], *, most: int = 2) -> dict[str, Any]:
    """
    Draw arguments that say how pairs are scored.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    case : Case
        The call they are for.
    names : sequence of str
        Which of `scale`, `softcap`, `bias` and `sinks` there may be.
    most : int, default: 2
        How many of them at once.

    Returns
    -------
    dict
        Keyword arguments.
    """
    if not names:
        return {}
    full = (*case.batch, case.heads[0], *case.lengths)
    kinds: dict[str, st.SearchStrategy[Any]] = {
        "scale": st.sampled_from((1.0, 0.25, 2.0, 0.0, -0.5)),
        "softcap": st.sampled_from((1.0, 20.0)),
        "bias": biases(full),
        "sinks": arrays((full[-3],)),
    }
    chosen = draw(st.lists(st.sampled_from(list(names)), min_size=1, max_size=most, unique=True))
    return {name: draw(kinds[name]) for name in chosen}


def feature_maps(*, random: bool = True) -> st.SearchStrategy[NamedMap]:
    """
    Draw a feature map.

    Parameters
    ----------
    random : bool, default: True
        Whether random features are among them.

    Returns
    -------
    strategy of NamedMap
        The maps with weights that are not negative.
    """
    names = ("elu_plus_one", "relu", "squares", "softmax", "gaussian")
    return st.sampled_from([NamedMap(name) for name in (names if random else names[:3])])


@st.composite
def cases(
    draw: st.DrawFn,
    family: str = "dense",
    *,
    without: Collection[str] = (),
    dtypes: Sequence[str] = ("float64",),
    sees: Sequence[str] = (),
    most: int = 3,
    least: int = 0,
    scoring: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    equal: bool = False,
    top_left: bool = False,
    maps: Sequence[NamedMap] = (),
    shape: Shapes | None = None,
) -> Case:
    """
    Draw a call of one family.

    Parameters
    ----------
    draw : callable
        Given by Hypothesis.
    family : {"dense", "local", "sparse", "linear"}, default: "dense"
        Whose arguments there are: local has a window, sparse its sizes and scores that
        are exact in any order of summing, linear a feature map.
    without : collection of str, default: ()
        Capabilities and keyword arguments to do without.
    dtypes : sequence of str, default: ("float64",)
        The dtypes to draw from.
    sees : sequence of str, default: ()
        Keyword arguments about visibility that there may be.
    most, least : int
        How many of those at once.
    scoring : sequence of str, default: ()
        Keyword arguments about scores that there may be.
    kinds : sequence of str
        The kinds of numbers, as of `arrays`.
    equal : bool, default: False
        Whether there are as many queries as keys.
    top_left : bool, default: False
        Whether the first query stands at the first key.
    maps : sequence of NamedMap, default: ()
        The feature maps of the linear family; none means all.
    shape : tuple of tuple of int, optional
        The shapes of q, k and v. Default: drawn.

    Returns
    -------
    Case
        The call.
    """
    q_shape, k_shape, v_shape = shape or draw(shapes(without=without, equal=equal))
    dtype = draw(st.sampled_from(list(dtypes)))
    kind = "whole" if family == "sparse" else draw(st.sampled_from(list(kinds)))
    v_kind = "plain" if kind == "subnormal" else kind
    case = Case(
        draw(arrays(q_shape, kind=kind, dtype=dtype)),
        draw(arrays(k_shape, kind=kind, dtype=dtype)) * (60.0 if family == "sparse" else 1.0),
        draw(arrays(v_shape, kind="plain" if v_kind == "large" else v_kind, dtype=dtype)),
        how=f"{kind} values",
        dtype=dtype,
        top_left=top_left,
    )
    options = case.options
    names = [n for n in sees if n not in without and n in VISIBILITY[family]]
    if family == "local":
        options["window"] = draw(windows())
        names = [n for n in names if n != "window"]
    if family == "linear" and "feature_map" not in without:
        options["feature_map"] = draw(st.sampled_from(list(maps)) if maps else feature_maps())
    if "combine" in without:
        most = 1
    options |= draw(visibility(case, names, most=most, least=least))
    if family != "linear":
        options |= draw(scores(case, [n for n in scoring if n not in without]))
    if family == "sparse":
        _make_exact(options, case)
        options |= draw(_choices(without))
    return case


def _make_exact(options: dict[str, Any], case: Case) -> None:
    """
    Leave scores that are exact in any order of summing, so that only true ties are tied.

    Selection is a jump: where two scores differ by a rounding, two right ways to compute
    them may choose differently. Keys are multiples of 60, so that means of up to six of
    them are whole numbers too.
    """
    options.pop("softcap", None)  # tanh is not exact
    if "bias" in options:
        options["bias"] = np.asarray(np.round(options["bias"]))
    options["scale"] = math.copysign(2.0**-7, options.get("scale", 1.0))


@st.composite
def _choices(draw: st.DrawFn, without: Collection[str]) -> dict[str, Any]:
    """Block size, top-k and route of sparse attention."""
    drawn = {
        "block_size": st.sampled_from((2, 1, 3, 4)),
        "top_k": st.sampled_from((1, 2, 0, 5)),
        "route": st.sampled_from((None, 1, 2, 8)),
    }
    return {name: draw(x) for name, x in drawn.items() if name not in without}


def states(case: Case) -> st.SearchStrategy[LinearState]:
    """
    Draw a state as a past of a few tokens might leave it.

    Parameters
    ----------
    case : Case
        The call it goes into.

    Returns
    -------
    strategy of LinearState
        In NumPy.
    """
    from arrattn.feature_maps import read_map

    d = case.q.shape[-1]
    width = read_map(case.options["feature_map"].build(d)).output_dim(d)
    lead = (*case.batch, *(case.heads[1:] if case.q.ndim > 2 else ()))
    S = arrays((*lead, width, case.v.shape[-1]))
    return st.builds(LinearState, S, arrays((*lead, width)).map(np.abs))
