"""
How calls of attention are drawn: plain functions of Hypothesis's `draw`.

`arrattn.testing.strategies` makes public strategies of them. They are plain, and what they
draw from is kept, because the overhead of a strategy within a strategy is what time goes to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing import sights
from arrattn.testing.case import Case
from arrattn.testing.sights import Sight

Host = np.ndarray[Any, Any]
Shape = tuple[int, ...]
Shapes = tuple[Shape, Shape, Shape]
Draw = Callable[[st.SearchStrategy[Any]], Any]

LENGTHS = (1, 2, 3, 5, 8)
#: Lengths of several blocks, among which there is a choice.
MANY = (1, 8, 5, 8)
BATCHES: tuple[Shape, ...] = ((1,), (2,), (), (2, 2))

#: Small numbers, the simplest first: byte 0 is 0.0, to which a failing example shrinks.
SMALL = np.asarray(
    sorted(np.arange(-16, 17) / 8, key=lambda x: (x % 1 != 0, x % 0.5 != 0, abs(x), x < 0))
)
WHOLE = np.asarray([0.0, 1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0])
TINY = {"float64": 2.0**-1060, "float32": 2.0**-135, "float16": 2.0**-18, "bfloat16": 2.0**-128}
BETAS = np.asarray([1.0, 0.5, 0.0, 0.25, 0.75])
LOG_DECAYS = np.asarray([0.0, -0.5, -0.25, -4.0])
SIDES = (0, 1, 2, 4, None, 40)


@cache
def one_of(*options: Any) -> st.SearchStrategy[Any]:
    """One of these, the first being the simplest."""
    return st.sampled_from(options)


@cache
def upto(low: int, high: int) -> st.SearchStrategy[int]:
    """A whole number between these."""
    return st.integers(low, high)


@cache
def _bytes(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


FLIP = one_of(False, True)


def numbers(draw: Draw, shape: Shape, kind: str = "plain", dtype: str = "float64") -> Host:
    """Real numbers of a kind; see `arrattn.testing.strategies.arrays`."""
    table = {"tied": WHOLE[:3], "whole": WHOLE}.get(kind, SMALL)
    factor = {"large": 32.0, "subnormal": TINY[dtype]}.get(kind, 1.0)
    data = np.frombuffer(draw(_bytes(math.prod(shape))), np.uint8)
    return (table[data % table.size] * factor).reshape(shape)


def bools(draw: Draw, shape: Shape, every: int) -> Host:
    """Mostly True: one in `every` is not."""
    data = np.frombuffer(draw(_bytes(math.prod(shape))), np.uint8)
    return np.asarray(data % every != 1).reshape(shape)


def ints(draw: Draw, shape: Shape, most: int) -> Host:
    """Whole numbers below `most`."""
    data = np.frombuffer(draw(_bytes(math.prod(shape))), np.uint8)
    return (data.astype(np.int64) % most).reshape(shape)


def broadcast(draw: Draw, shape: Shape, *, drop: bool = True) -> Shape:
    """A shape that broadcasts to this one: axes made 1, leading axes left out."""
    if not shape or not draw(FLIP):
        return shape
    left_out = draw(upto(0, len(shape))) if drop else 0
    return tuple(1 if n > 1 and draw(FLIP) else n for n in shape[left_out:])


def shapes(
    draw: Draw,
    without: Collection[str] = (),
    *,
    equal: bool = False,
    few: bool = False,
    many: bool = False,
) -> Shapes:
    """Shapes of q, k and v; `few` different ones where each is compiled, `many` keys to choose."""
    some_lengths = ((3, 8) if many else (1, 3)) if few else MANY if many else LENGTHS
    lengths = one_of(*some_lengths, *(() if "empty" in without else (0,)))
    nq = draw(lengths)
    nk = nq if equal or "cross" in without else draw(lengths)
    d = 2 if few else draw(one_of(1, 2, 4))
    dv = d if few or "dv" in without else draw(one_of(1, 2, 3))
    hkv = draw(one_of(1, 2))
    hq = hkv * (1 if "gqa" in without else draw(one_of(1, 2) if few else one_of(1, 2, 3)))
    free = "rank" not in without and not few
    batch = draw(one_of(*(BATCHES if free else BATCHES[:2])))
    if batch == () and hq == 1 and free and draw(FLIP):
        return (nq, d), (nk, d), (nk, dv)
    a = b = c = batch
    if "broadcast" not in without and draw(FLIP):
        a, b, c = (broadcast(draw, batch, drop=free) for _ in "qkv")
    return (*a, hq, nq, d), (*b, hkv, nk, d), (*c, hkv, nk, dv)


def shorten(dim: int, kind: str) -> float:
    """The power of 2 that makes every vector of this many such numbers no longer than 1."""
    longest = math.sqrt(max(dim, 1)) * {"tied": 1.0, "large": 64.0}.get(kind, 2.0)
    return 2.0 ** -math.ceil(math.log2(longest))


def gates(draw: Draw, case: Case, without: Collection[str] = ()) -> dict[str, Any]:
    """How much each token of the delta rule writes, how the memory fades, and the scale."""
    heads, batch = case.v.shape[-3:-2], case.batch if case.v.ndim > 2 else ()
    lead = (*(batch if "broadcast" in without else broadcast(draw, batch)), *heads)
    shape = (*lead, case.lengths[1])
    options: dict[str, Any] = {"beta": BETAS[ints(draw, shape, len(BETAS))]}
    if "log_decay" not in without and draw(FLIP):
        width = draw(one_of(1, case.k.shape[-1]))
        options["log_decay"] = LOG_DECAYS[ints(draw, (*shape, width), len(LOG_DECAYS))]
    if "scale" not in without and draw(FLIP):
        options["scale"] = draw(one_of(0.5, *(() if "any scale" in without else (-2.0,))))
    return options


def window(draw: Draw) -> tuple[int | None, int | None]:
    """``(left, right)``."""
    return draw(one_of(*SIDES)), draw(one_of(*SIDES))


def mask(draw: Draw, full: Shape, *, expand: bool = False) -> Host:
    """Who sees whom, with rows that see nothing."""
    shape = full if expand else broadcast(draw, full)
    seen = bools(draw, shape, 3)
    if len(shape) > 1 and draw(one_of(False, False, True)):
        seen = seen & bools(draw, shape[:-1], 3)[..., None]
    return seen


def bias(
    draw: Draw, full: Shape, kind: str = "plain", *, hides: bool = True, expand: bool = False
) -> Host:
    """What is added to scores, now and then ``-inf``."""
    shape = full if expand else broadcast(draw, full)
    added = numbers(draw, shape, kind)
    if hides and draw(FLIP):
        added = np.where(bools(draw, shape, 5), added, -np.inf)
    return added


def over_batch(draw: Draw, batch: Shape, low: int, high: int) -> int | Host:
    """An int, or an array of them over the batch axes, some of which broadcast."""
    if not draw(FLIP):
        return int(draw(upto(low, high)))
    shape = broadcast(draw, batch)
    return ints(draw, shape, high - low + 1) + low


def ids(draw: Draw, nq: int, nk: int, batch: Shape) -> tuple[Host, Host]:
    """Segment ids of both sides, now and then one that no key has."""
    q_ids = ints(draw, (*broadcast(draw, batch), nq), 4)
    k_ids = ints(draw, (*broadcast(draw, batch), nk), 3)
    return (np.sort(q_ids), np.sort(k_ids)) if draw(FLIP) else (q_ids, k_ids)


def simple_pattern(draw: Draw, nq: int, nk: int, batch: Shape) -> Sight:
    """One pattern, not composed."""
    kind = draw(upto(0, 10))
    if kind == 0:
        return sights.causal()
    if kind == 1:
        return sights.window(*window(draw))
    if kind == 2:
        return sights.everywhere(draw(upto(0, 5)))
    if kind == 3:
        return sights.strided(draw(upto(1, 4)))
    if kind == 4:
        return sights.prefix(over_batch(draw, batch, 0, nk + 2))
    if kind == 5:
        return sights.segments(*ids(draw, nq, nk, batch))
    if kind == 6:
        table = bools(draw, (draw(upto(1, 3)), draw(upto(1, 3))), 2)
        return sights.blocks(table, draw(upto(1, 4)))
    if kind == 7:
        return sights.dilated(draw(upto(1, 4)), *window(draw))
    if kind == 8:
        size = draw(upto(1, 4))
        return sights.fixed(size, draw(upto(0, size)))
    if kind == 9:
        return sights.random_keys(draw(upto(0, 3)), draw(upto(0, 3)), draw(upto(1, 3)), nk)
    return sights.where(draw(upto(0, 5)), draw(upto(0, 5)))


def pattern(draw: Draw, nq: int, nk: int, batch: Shape) -> Sight:
    """Up to three patterns, composed."""
    sight = simple_pattern(draw, nq, nk, batch)
    for _ in range(draw(upto(0, 2))):
        other = simple_pattern(draw, nq, nk, batch)
        sight = sight & other if draw(FLIP) else sight | other
    return ~sight if draw(upto(0, 4)) == 4 else sight


def some(draw: Draw, names: Sequence[str], least: int, most: int) -> list[str]:
    """A few different names."""
    left, chosen = list(names), []
    for _ in range(draw(upto(min(least, len(left)), min(most, len(left))))):
        chosen += [left.pop(draw(upto(0, len(left) - 1)))]
    return chosen


def visibility(
    draw: Draw,
    case: Case,
    names: Sequence[str],
    *,
    least: int = 0,
    most: int = 3,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Arguments that say who sees whom."""
    return {name: _sight(draw, name, case, without) for name in some(draw, names, least, most)}


def _sight(draw: Draw, name: str, case: Case, without: Collection[str]) -> Any:
    (nq, nk), batch = case.lengths, case.batch
    if name == "is_causal":
        return True
    if name == "mask":
        full = (*batch, case.heads[0], nq, nk)
        return mask(draw, full, expand="short masks" in without)
    if name == "key_mask":
        return bools(draw, (*broadcast(draw, batch), nk), 3)
    if name == "window":
        return window(draw)
    if name == "kv_lengths":
        return over_batch(draw, batch, 0, nk)
    if name == "q_offset":
        return over_batch(draw, batch, -2, nk + 2)
    if name == "segment_ids":
        return ids(draw, nq, nk, batch)
    return pattern(draw, nq, nk, batch)


def scores(
    draw: Draw,
    case: Case,
    names: Sequence[str],
    *,
    most: int = 2,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Arguments that say how pairs are scored."""
    full = (*case.batch, case.heads[0], *case.lengths)
    return {name: _score(draw, name, full, without) for name in some(draw, names, 0, most)}


def _score(draw: Draw, name: str, full: Shape, without: Collection[str]) -> Any:
    if name == "scale":
        scales = (1.0, 0.25, 2.0)
        return draw(one_of(*scales, *(() if "any scale" in without else (-0.5,))))
    if name == "softcap":
        return draw(one_of(1.0, 20.0))
    if name == "bias":
        return bias(draw, full, expand="short masks" in without)
    return numbers(draw, (full[-3],))


def choices(
    draw: Draw, case: Case, names: Sequence[str], *, expand: bool = False
) -> dict[str, Any]:
    """Arguments about what sparse attention chooses, any of these; scores are given or named."""
    options = {n: _choice(draw, n, case, expand=expand) for n in some(draw, names, 0, len(names))}
    if "block_scores" in options:
        options.pop("score", None)
    return options


def _choice(draw: Draw, name: str, case: Case, *, expand: bool) -> Any:
    (nq, nk), heads = case.lengths, case.heads
    if name == "select":
        return draw(one_of("blocks", "keys"))
    if name == "per":
        return draw(one_of("block", "group", "query"))
    if name == "score":
        return draw(one_of("bound", "best", "mean"))
    if name == "always":
        return simple_pattern(draw, nq, nk, case.batch)
    if expand:
        return block_scores(draw, case, (*case.batch, heads[0], nq))
    return block_scores(draw, case, (draw(one_of(1, *heads)), draw(one_of(1, nq))))


def block_scores(draw: Draw, case: Case, rows: Shape) -> Host:
    """Whole scores of blocks, of so many heads and queries; now and then one is forbidden."""
    shape = (*rows, -(-case.lengths[1] // case.options["block_size"]))
    given = ints(draw, shape, 8) - 3.0
    return np.where(given == 4, -np.inf, given)
