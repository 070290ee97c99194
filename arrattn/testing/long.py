"""
Calls over several tiles, chunks or blocks.

Their arrays are too long to be drawn number by number, and to be read. Short expressions make
them, of which seeds, sizes and tables are drawn; `Case.made` keeps these for a counterexample.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing import draws, sights
from arrattn.testing.case import Case, NamedMap
from arrattn.testing.draws import FLIP, Draw, one_of, upto
from arrattn.testing.sights import Sight
from arrattn.testing.strategies import KINDS, MAPS, VISIBILITY

__all__ = ["cases"]

Host = np.ndarray[Any, Any]
Shape = tuple[int, ...]

LENGTHS = (130, 257, 256, 65, 192, 257, 127, 320)
#: Those of the delta rule, whose definition goes token by token.
SHORTER = (130, 65, 192, 127)
#: Sizes of blocks, those of tiles more often.
SIZES = (64, 128, 64, 65, 64, 100, 64)
#: Arguments that may hide whole tiles between others: in most calls there is one.
BY_TILES = ("pattern", "mask", "key_mask")
#: How far a window reaches, and where something begins or ends.
SIDES = (0, 1, 40, 63, 64, 65, 127, 129, None)
PLACES = (64, 0, 1, 63, 65, 127, 128, 129, 192, 200)
#: Decay that leaves something of a token after several tiles, after one, and of the next alone.
DECAYS = (-1024, -64, -2)

#: Whole numbers up to the first, times the second; see `arrattn.testing.strategies.arrays`.
NUMBERS = {"tied": (1, 1.0), "whole": (4, 1.0), "large": (16, 4.0)}


class Maker:
    """Makes arrays by expressions, and keeps both."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.made = draw, dict[str, Host]()
        self.seed = draw(upto(0, 9999)) * 10

    def make(self, text: str) -> Host:
        """The array that an expression makes."""
        array: Host = eval(text, {"np": np})
        self.made[text] = array
        return array

    def ints(self, shape: Shape, low: int, high: int, then: str = "") -> Host:
        """Random whole numbers, each time of another seed, and what is done to them."""
        self.seed += 1
        return self.make(
            f"np.random.default_rng({self.seed}).integers({low}, {high}, {shape}){then}"
        )

    def numbers(self, shape: Shape, kind: str, dtype: str, factor: float = 1.0) -> Host:
        """Real numbers of a kind."""
        tiny = draws.TINY[dtype] if kind == "subnormal" else 1.0
        most, unit = NUMBERS.get(kind, (16, tiny / 8))
        return self.ints(shape, -most, most + 1, f" * {unit * factor}")

    def table(self, shape: Shape) -> Host:
        """A few blocks: of a seed, since drawn one by one they are too much alike."""
        self.seed += 1
        return np.random.default_rng(self.seed).random(shape) < 0.7

    def blocks(self, *lengths: int, lead: Shape = ()) -> Host:
        """True and False by blocks of one size in all of the last axes."""
        size = self.draw(one_of(*SIZES))
        shape = (*lead, *(-(-n // size) for n in lengths))
        table = self.table(shape).astype(int).tolist()
        cut = ", ".join(f":{n}" for n in lengths)
        block = (size,) * len(lengths)
        return self.make(f"np.kron({table}, np.ones({block}))[..., {cut}] > 0")

    def scattered(self, *lengths: int, lead: Shape = ()) -> Host:
        """Mostly True."""
        return self.ints((*lead, *lengths), 0, self.draw(one_of(8, 2)), " > 0")

    def sight(self, *lengths: int, lead: Shape = ()) -> Host:
        """Who is seen: by blocks, or scattered."""
        make = self.scattered if self.draw(one_of(False, False, True)) else self.blocks
        return make(*lengths, lead=lead)

    def ids(self, n: int, batch: Shape) -> Host:
        """Segment ids: of runs, two of which may be of one segment, or scattered."""
        if self.draw(one_of(False, False, True)):
            return self.ints((*batch, n), 0, 3)
        return self.make(f"np.arange({n}) // {self.draw(one_of(*SIZES))} % {self.draw(upto(1, 4))}")


@st.composite
def cases(
    draw: st.DrawFn,
    family: str = "dense",
    *,
    without: Collection[str] = (),
    dtypes: Sequence[str] = ("float64",),
    kinds: Sequence[str] = KINDS,
    top_left: bool = False,
    maps: Sequence[NamedMap] = MAPS,
    few: bool = False,
) -> Case:
    """
    Draw a call over several tiles, as `arrattn.testing.strategies.cases` draws short ones.

    Parameters
    ----------
    family, without, dtypes, kinds, top_left, maps, few : object
        As there.

    Returns
    -------
    Case
        The call, and the expressions that its arrays are made by.
    """
    sparse, delta = family == "sparse", family == "delta"
    lengths = one_of(*(LENGTHS[:2] if few else SHORTER if delta else LENGTHS))
    nq = draw(lengths)
    nk = nq if "cross" in without or draw(FLIP) else draw(lengths)
    alone = few or delta
    hkv = 1 if alone else draw(one_of(1, 2))
    hq = hkv * (1 if alone or "gqa" in without else draw(one_of(1, 2)))
    batch = (1,) if alone else draw(one_of((1,), (2,)))
    dtype = draw(one_of(*dtypes))
    kind = "whole" if sparse else draw(one_of(*kinds))
    maker = Maker(draw)
    shorter = 60.0 if sparse else draws.shorten(2, kind) if delta else 1.0
    case = Case(
        maker.numbers((*batch, hq, nq, 2), kind, dtype),
        maker.numbers((*batch, hkv, nk, 2), kind, dtype, shorter),
        maker.numbers((*batch, hkv, nk, 2), "tied" if kind == "tied" else "plain", dtype),
        how=f"{kind} values",
        dtype=dtype,
        top_left=top_left,
        made=maker.made,
    )
    options = case.options
    names = [n for n in VISIBILITY[family] if n not in without]
    if family == "local":
        options["window"] = _window(draw)
        names.remove("window")
    if family == "linear" and "feature_map" not in without:
        options["feature_map"] = draw(one_of(*maps))
    if delta:
        options["beta"] = maker.ints((*batch, hkv, nk), 0, 5, " / 4")
    if delta and "log_decay" not in without and draw(FLIP):
        options["log_decay"] = maker.ints((hkv, nk, 1), 0, 9, f" / {draw(one_of(*DECAYS))}")
    by_tiles = [n for n in BY_TILES if n in names]
    chosen = draws.some(draw, by_tiles, 1, 1) if draw(one_of(True, False, True)) else []
    if not chosen or ("combine" not in without and draw(FLIP)):
        chosen += draws.some(draw, [n for n in names if n not in by_tiles], 0, 1)
    for name in chosen:
        options[name] = _sight(maker, name, case, without)
    if sparse:
        options |= _choices(draw, without)
    return case


def _window(draw: Draw) -> tuple[int | None, int | None]:
    return draw(one_of(*SIDES)), draw(one_of(*SIDES))


def _sight(maker: Maker, name: str, case: Case, without: Collection[str]) -> Any:
    draw, (nq, nk), batch = maker.draw, case.lengths, case.batch
    if name == "is_causal":
        return True
    if name == "mask":
        full = (*batch, case.heads[0])
        leads = (full,) if "short masks" in without else ((), full)
        return maker.sight(nq, nk, lead=draw(one_of(*leads)))
    if name == "key_mask":
        return maker.sight(nk, lead=draw(one_of((), batch)))
    if name == "window":
        return _window(draw)
    if name == "segment_ids":
        return maker.ids(nq, batch), maker.ids(nk, batch)
    if name == "pattern":
        return _pattern(maker, nq, nk)
    places = one_of(*(min(x, nk) for x in PLACES), nk)
    if draw(FLIP):
        return draw(places)
    return np.asarray([draw(places) for _ in range(batch[0])])


def _pattern(maker: Maker, nq: int, nk: int) -> Sight:
    """Up to two patterns, composed."""
    draw, sight = maker.draw, _simple_pattern(maker, nq, nk)
    if draw(upto(0, 3)) == 3:
        other = _simple_pattern(maker, nq, nk)
        sight = sight & other if draw(FLIP) else sight | other
    return ~sight if draw(upto(0, 7)) == 7 else sight


def _simple_pattern(maker: Maker, nq: int, nk: int) -> Sight:
    """Most often a table of blocks."""
    draw = maker.draw
    kind, size = draw(upto(0, 17)), draw(one_of(*SIZES))
    if kind == 0:
        return sights.causal()
    if kind == 1:
        return sights.window(*_window(draw))
    if kind == 2:
        return sights.everywhere(size)
    if kind == 3:
        return sights.dilated(draw(one_of(2, 64)), *_window(draw))
    if kind == 4:
        return sights.fixed(size, draw(one_of(1, 16)))
    if kind == 5:
        return sights.random_keys(draw(upto(1, 2)), draw(upto(0, 3)), size, nk)
    shape = (max(nq, nk) // size + 1, nk // size + 1)
    return sights.blocks(maker.table(shape), size)


def _choices(draw: Draw, without: Collection[str]) -> dict[str, Any]:
    """Sizes and scores; those that are exact for small blocks alone have small ones."""
    score = "mean" if "score" in without else draw(one_of("mean", "bound", "mean", "best"))
    options = {
        "block_size": draw(one_of(*((4, 2, 3) if score == "mean" else SIZES))),
        "top_k": draw(one_of(2, 1, 5, 70)),
        "route": draw(one_of(1, None, 2)),
        "score": score,
        "scale": 2.0**-7,
    }
    return {n: x for n, x in options.items() if n not in without}
