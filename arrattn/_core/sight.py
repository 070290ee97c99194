"""A call's pattern in the terms that fused kernels share: a length, causal order or a mask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from arrattn import patterns
from arrattn._core import loops
from arrattn._core.inputs import SoftmaxInputs
from arrattn._core.typing import Array
from arrattn.patterns import Pattern


class Sight(NamedTuple):
    """
    The first `nk` keys, in causal order counted from key 0, or masked.

    A mask is bool, or of the dtype of `q` and added to the scores.
    """

    nk: int
    is_causal: bool = False
    mask: Array | None = None  # (..., Hkv | 1, G | 1, Nq | 1, Nk | 1)
    problems: tuple[str, ...] = ()


def _parts(pattern: Pattern | None) -> Iterator[Pattern]:
    if isinstance(pattern, patterns.And):
        yield from _parts(pattern.a)
        yield from _parts(pattern.b)
    elif pattern is not None:
        yield pattern


def read_sight(call: SoftmaxInputs) -> Sight:
    """The call's pattern, and what of it such a kernel cannot say."""
    nk, causal, masks, problems = call.lengths[1], False, [], []
    for part in _parts(call.pattern):
        if isinstance(part, patterns.Causal):
            causal = True
        elif isinstance(part, patterns.Prefix) and isinstance(part.n, int):
            nk = min(nk, part.n)
        elif isinstance(part, patterns.Prefix):
            longest, mask = _within(part.n, nk, call)
            nk = min(nk, longest)
            masks.append(mask)
        elif isinstance(part, patterns.Masked):
            masks.append(part.mask)
        elif isinstance(part, patterns.Unforbidden):
            masks.append(part.bias)
        else:
            problems.append(f"{part} is not among what it can hide")
    masks = [x for x in masks if x is not None]
    if nk == 0:
        problems.append("no key is visible")
    if causal:
        causal, problem = _read_causal(call.offset, nk)
        problems += problem
    if len(masks) + causal > 1:
        problems.append("it takes one of causal order, lengths, mask and bias at a time")
    mask = masks[0] if masks else None
    if mask is not None and mask.shape[-1] > nk:
        mask = mask[..., :nk]
    return Sight(nk, causal, mask, tuple(problems))


def _read_causal(offset: int | Array, nk: int) -> tuple[bool, list[str]]:
    """Whether causal order hides anything, and what the kernel's alignment has against it."""
    if not isinstance(offset, int):
        return False, ["the queries' positions differ by batch item"]
    if offset >= nk - 1:  # the first query sees the last key
        return False, []
    if offset != 0:
        return False, [f"the first query stands at key {offset}, where it puts it at key 0"]
    return True, []


def _within(n: Array, nk: int, call: SoftmaxInputs) -> tuple[int, Array | None]:
    """The longest of these lengths, and a mask of the keys up to it where they differ."""
    known = loops.host_values(n)
    longest = nk if known is None else max(0, min(nk, int(known.max())))
    if known is not None and known.min() >= longest:
        return longest, None
    j = call.xp.arange(longest, device=call.device)
    return longest, j < n[..., None, None, None, None]
