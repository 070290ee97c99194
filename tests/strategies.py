"""
What Hypothesis draws: shapes and patterns by structure, values by seed.

Everything is drawn so that it is valid; nothing is drawn and thrown away. A case prints
as what one would type to see it again: its shapes, its seed and its options.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sights
from hypothesis import strategies as st
from sights import Sight

#: Awkward on purpose: nothing, one, odd, and around powers of two.
LENGTHS = (1, 2, 3, 5, 7, 16, 17)
BATCHES: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (2, 3))


@dataclass(frozen=True)
class Case:
    """
    One call: float64 NumPy arrays and options.

    Parameters
    ----------
    q, k, v : array
        What the shapes below and `seed` give.
    options : dict
        Keyword arguments; patterns as `Sight`, arrays in NumPy.
    how : str
        Where the values come from.
    """

    q: np.ndarray[Any, Any]
    k: np.ndarray[Any, Any]
    v: np.ndarray[Any, Any]
    options: dict[str, Any] = field(default_factory=dict)
    how: str = ""

    def __repr__(self) -> str:
        options = "".join(f", {name}={brief(x)}" for name, x in self.options.items())
        shapes = ", ".join(f"{n}{list(getattr(self, n).shape)}" for n in "qkv")
        return f"Case({shapes}, {self.how}{options})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what Hypothesis prints

    @property
    def arrays(self) -> tuple[np.ndarray[Any, Any], ...]:
        """`q`, `k` and `v`."""
        return self.q, self.k, self.v

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes of the result."""
        return np.broadcast_shapes(*(x.shape[:-3] for x in self.arrays))

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key heads."""
        return (1, 1) if self.q.ndim == 2 else (self.q.shape[-3], self.k.shape[-3])

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.q.shape[-2], self.k.shape[-2]

    @property
    def scores(self) -> dict[str, Any]:
        """The options that the size of the rounding error depends on."""
        return {n: self.options[n] for n in ("scale", "bias", "sinks") if n in self.options}

    def visible(self) -> np.ndarray[Any, Any]:
        """Who sees whom by the letter of the contract: bool, (*batch, Hq, Nq, Nk)."""
        batch, (nq, nk), o = self.batch, self.lengths, self.options
        lengths = np.broadcast_to(o.get("kv_lengths", nk), batch)
        offset = np.broadcast_to(o.get("q_offset", lengths - nq), batch)
        given = [sights.prefix(np.asarray(lengths)) if batch else sights.prefix(int(lengths))]
        if o.get("is_causal"):
            given.append(sights.causal())
        if o.get("window") is not None:
            given.append(sights.window(*o["window"]))
        if o.get("segment_ids") is not None:
            ids = o["segment_ids"]
            given.append(sights.segments(*(ids if isinstance(ids, tuple) else (ids, ids))))
        if o.get("pattern") is not None:
            given.append(o["pattern"])
        seen = np.ones((*batch, self.heads[0], nq, nk), bool)
        for sight in given:
            seen = seen & sight.table(nq, nk, batch, np.asarray(offset))
        if o.get("mask") is not None:
            seen = seen & o["mask"]
        return seen & (o["bias"] != -np.inf) if o.get("bias") is not None else seen


def brief(x: Any) -> str:
    """Small arrays in full, large ones by shape."""
    if isinstance(x, tuple):
        return "(" + ", ".join(map(brief, x)) + ")"
    if not isinstance(x, np.ndarray):
        return repr(x)
    if x.size <= 24 and x.dtype.kind != "f":
        return f"np.array({x.astype(int).tolist()})"
    return f"<{x.dtype}{list(x.shape)}>"


def lengths(*, empty: bool = True) -> st.SearchStrategy[int]:
    """A number of queries or keys."""
    return st.sampled_from((*LENGTHS, 0) if empty else LENGTHS)


@st.composite
def windows(draw: st.DrawFn) -> tuple[int | None, int | None]:
    """``(left, right)``."""
    side = st.sampled_from((0, 1, 2, 5, 40, None))
    return draw(side), draw(side)


@st.composite
def over_batch(
    draw: st.DrawFn, batch: tuple[int, ...], low: int, high: int
) -> int | np.ndarray[Any, Any]:
    """An int, or an array of them over the batch axes, some of which broadcast."""
    if draw(st.booleans()):
        return draw(st.integers(low, high))
    shape = draw(broadcast(batch))
    seed = draw(st.integers(0, 99))
    return np.random.default_rng(seed).integers(low, high + 1, size=shape)


@st.composite
def broadcast(draw: st.DrawFn, shape: tuple[int, ...], *, drop: bool = True) -> tuple[int, ...]:
    """A shape that broadcasts to this one: axes made 1, leading axes left out."""
    kept = draw(st.integers(0, len(shape))) if drop else len(shape)
    tail = shape[len(shape) - kept :]
    return tuple(1 if n > 1 and draw(st.booleans()) else n for n in tail)


@st.composite
def id_arrays(
    draw: st.DrawFn, nq: int, nk: int, batch: tuple[int, ...]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Segment ids of both sides: contiguous or shuffled, now and then one that no key has."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    q_shape, k_shape = draw(broadcast(batch)), draw(broadcast(batch))
    q_ids = rng.integers(-1, 3, size=(*q_shape, nq))
    k_ids = rng.integers(0, 3, size=(*k_shape, nk))
    return (np.sort(q_ids), np.sort(k_ids)) if draw(st.booleans()) else (q_ids, k_ids)


_sides = st.sampled_from((0, 1, 3, None))


def simple_sights(nq: int, nk: int, batch: tuple[int, ...]) -> st.SearchStrategy[Sight]:
    """One pattern, not composed."""
    few = st.integers(0, 6)
    return st.one_of(
        st.just(sights.causal()),
        st.builds(lambda w: sights.window(*w), windows()),
        st.builds(sights.prefix, over_batch(batch, 0, nk + 2)),
        st.builds(sights.everywhere, few),
        st.builds(sights.strided, st.integers(1, 5)),
        st.builds(sights.dilated, st.integers(1, 4), _sides, _sides),
        st.integers(1, 6).flatmap(
            lambda size: st.builds(sights.fixed, st.just(size), st.integers(0, size))
        ),
        st.builds(sights.random_keys, few, few, st.integers(1, 4), st.integers(0, nk + 2)),
        st.builds(lambda ids: sights.segments(*ids), id_arrays(nq, nk, batch)),
        st.builds(sights.blocks, tables(), st.integers(1, 6)),
        st.builds(sights.where, few, few),
    )


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """A table over blocks, which need not reach the last key."""
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    seen = draw(st.lists(st.booleans(), min_size=rows * cols, max_size=rows * cols))
    return np.reshape(np.asarray(seen), (rows, cols))


@st.composite
def sights_of(draw: st.DrawFn, nq: int, nk: int, batch: tuple[int, ...]) -> Sight:
    """A pattern, composed of up to three."""
    sight = draw(simple_sights(nq, nk, batch))
    for _ in range(draw(st.integers(0, 2))):
        other = draw(simple_sights(nq, nk, batch))
        sight = sight & other if draw(st.booleans()) else sight | other
    return ~sight if draw(st.integers(0, 4)) == 0 else sight


VALUES = ("plain", "tied", "large", "plain", "zero")


def values(how: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Values of one kind: Gaussian, few distinct rows, all zero, or far apart."""
    x = rng.normal(size=shape)
    if how == "tied":
        return np.round(x)
    return x * {"plain": 1.0, "zero": 0.0, "large": 30.0}[how]


@st.composite
def shapes(
    draw: st.DrawFn, *, empty: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shapes of q, k and v: batch axes that broadcast, grouped heads, any two lengths."""
    nq, nk = draw(lengths(empty=empty)), draw(lengths(empty=empty))
    d, dv = draw(st.sampled_from((4, 1, 8))), draw(st.sampled_from((3, 1)))
    batch = draw(st.sampled_from(BATCHES))
    hkv, g = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3)))
    if batch == () and hkv * g == 1 and draw(st.booleans()):
        return (nq, d), (nk, d), (nk, dv)
    lead = batch
    if draw(st.booleans()):  # most often, all three have the same batch axes
        return (*lead, hkv * g, nq, d), (*lead, hkv, nk, d), (*lead, hkv, nk, dv)
    a, b, c = draw(broadcast(batch)), draw(broadcast(batch)), draw(broadcast(batch))
    return (*a, hkv * g, nq, d), (*b, hkv, nk, d), (*c, hkv, nk, dv)


@st.composite
def visibility(
    draw: st.DrawFn, nq: int, nk: int, hq: int, batch: tuple[int, ...]
) -> dict[str, Any]:
    """Some of the options of C4 and C3, any number of them at once."""
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["is_causal"] = True
    names = ("window", "kv_lengths", "q_offset", "segment_ids", "pattern", "mask")
    for name in draw(
        st.lists(st.sampled_from(names), min_size=draw(st.integers(0, 2)), max_size=3, unique=True)
    ):
        if name == "window":
            options[name] = draw(windows())
        elif name == "kv_lengths":
            options[name] = draw(over_batch(batch, 0, nk))
        elif name == "q_offset":
            options[name] = draw(over_batch(batch, -3, nk + 3))
        elif name == "segment_ids":
            ids = draw(id_arrays(nq, nk, batch))
            options[name] = ids[0] if nq == nk and draw(st.booleans()) else ids
        elif name == "pattern":
            options[name] = draw(sights_of(nq, nk, batch))
        else:
            options[name] = draw(masks((*batch, hq, nq, nk)))
    return options


@st.composite
def masks(draw: st.DrawFn, full: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """A mask that broadcasts, of any density."""
    shape = draw(broadcast(full))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return np.asarray(rng.random(shape) < draw(st.sampled_from((0.5, 0.9, 0.1, 0.0))))


@st.composite
def scoring(draw: st.DrawFn, full: tuple[int, ...]) -> dict[str, Any]:
    """Some of the options of C5."""
    options: dict[str, Any] = {}
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    names = ("scale", "softcap", "bias", "sinks")
    for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        if name == "scale":
            options[name] = draw(st.sampled_from((0.3, 0.0, -0.5)))
        elif name == "softcap":
            options[name] = draw(st.sampled_from((1.0, 20.0)))
        elif name == "bias":
            bias = rng.normal(size=draw(broadcast(full)))
            hide = rng.random(bias.shape) < draw(st.sampled_from((0.0, 0.3)))
            options[name] = np.where(hide, -np.inf, bias)
        else:
            options[name] = rng.normal(size=full[-3])
    return options


@st.composite
def cases(draw: st.DrawFn, *, empty: bool = True, sees: bool = True, scores: bool = True) -> Case:
    """A call of the softmax family."""
    q_shape, k_shape, v_shape = draw(shapes(empty=empty))
    how, seed = draw(st.sampled_from(VALUES)), draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    case = Case(
        values(how, q_shape, rng),
        values(how, k_shape, rng),
        rng.normal(size=v_shape),
        how=f"{how} values of seed {seed}",
    )
    (nq, nk), (hq, _) = case.lengths, case.heads
    if sees:
        case.options.update(draw(visibility(nq, nk, hq, case.batch)))
    if scores:
        case.options.update(draw(scoring((*case.batch, hq, nq, nk))))
    return case
