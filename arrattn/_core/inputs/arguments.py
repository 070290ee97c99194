"""One argument at a time: what it is to be, and what is said where it is not."""

from __future__ import annotations

import difflib
import math
from numbers import Integral, Real
from typing import Any

import array_api_compat as compat
import numpy as np

from arrattn import patterns
from arrattn._core import loops
from arrattn._core.typing import Array, Device, DType, Namespace
from arrattn.patterns import Pattern

FLOATS = ("float64", "float32", "float16", "bfloat16")


class Reasons:
    """Complaints, collected so that they can be raised together."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.found: list[tuple[type[Exception], str]] = []
        self.arrays: dict[str, Array] = {}

    def add(self, kind: type[Exception], text: str) -> None:
        """Note one complaint."""
        self.found.append((kind, text))

    def values(self, texts: list[str]) -> None:
        """Note several complaints about shapes and ranges."""
        self.found += [(ValueError, text) for text in texts]

    def check(self) -> None:
        """Raise all that was found: TypeError if any is one."""
        if not self.found:
            return
        kind = TypeError if any(k is TypeError for k, _ in self.found) else ValueError
        lines = [f"{self.function}: " + "; ".join(text for _, text in self.found)]
        if self.arrays:
            shapes = (f"{n} {tuple(x.shape)} {dtype_name(x.dtype)}" for n, x in self.arrays.items())
            lines.append(f"got {', '.join(shapes)}")
            lines.append(
                "hint: shapes are q (..., Hq, Nq, D), k (..., Hkv, Nk, D), v (..., Hkv, Nk, Dv), "
                "with Hq a multiple of Hkv; heads come before positions"
            )
        raise kind("\n".join(lines))


def is_array(x: object) -> bool:
    """Whether `x` is an array of some library that follows the standard."""
    return bool(compat.is_array_api_obj(x)) and not isinstance(x, np.generic)


def dtype_name(dtype: DType) -> str:
    """The dtype's name without its library: "float32"."""
    return str(dtype).rpartition(".")[2].removesuffix("'>")


def describe(x: object) -> str:
    """What came, for an error message."""
    if is_array(x):
        return f"an array of {dtype_name(x.dtype)}, shape {tuple(x.shape)}"  # type: ignore[attr-defined]
    return f"{x!r} ({type(x).__name__})"


# -- One namespace, one device ----------------------------------------------------------------


def read_namespace(named: dict[str, Any], reasons: Reasons) -> tuple[Namespace, Device]:
    """The one library and device of the arrays; raises if there are several or none."""
    for name in ("q", "k", "v"):
        if not is_array(named[name]):
            reasons.add(TypeError, f"{name}: expected an array, got {describe(named[name])}")
        elif named[name].ndim < 2:
            reasons.add(
                ValueError,
                f"{name}: expected at least 2 axes (positions, width), "
                f"got shape {tuple(named[name].shape)}",
            )
    reasons.check()
    reasons.arrays = {n: named[n] for n in ("q", "k", "v")}
    xp = compat.array_namespace(named["q"])
    arrays = {n: x for n, x in named.items() if x is not None and is_array(x)}
    for name, x in arrays.items():
        other = xp if type(x) is type(named["q"]) else compat.array_namespace(x)
        if other is not xp:
            reasons.add(
                TypeError,
                f"{name}: expected an array of the same library as q ({library_name(xp)}), got "
                f"one of {library_name(other)}; convert it first, nothing is converted silently",
            )
    reasons.check()
    device = loops.device_of(named["q"])
    for name, x in arrays.items() if device is not None else ():
        own = loops.device_of(x)
        if own is not None and own != device:
            reasons.add(
                TypeError,
                f"{name}: expected an array on the device of q ({device}), got one on {own}",
            )
    reasons.check()
    return xp, device


def library_name(xp: Namespace) -> str:
    """The library's name, as an error message has it."""
    return str(xp.__name__).removeprefix("array_api_compat.")


# -- q, k and v -------------------------------------------------------------------------------


def read_qkv(
    q: Array, k: Array, v: Array, xp: Namespace, reasons: Reasons, *, shared_keys: bool = False
) -> tuple[Array, Array, Array, tuple[int, ...], bool]:
    """
    Check dtypes and shapes; group query heads; give the common batch axes.

    With `shared_keys`, `v` may have more heads than `k`; q, k and v are then left as they are.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if dtype_name(x.dtype) not in FLOATS:
            reasons.add(
                TypeError,
                f"{name}: expected one of {', '.join(FLOATS)}, got {dtype_name(x.dtype)}",
            )
        elif x.dtype != q.dtype:
            reasons.add(
                TypeError,
                f"{name}: expected the dtype of q ({dtype_name(q.dtype)}), "
                f"got {dtype_name(x.dtype)}",
            )
        if any(type(n) is not int and not isinstance(n, Integral) for n in x.shape):
            reasons.add(ValueError, f"{name}: expected known lengths, got shape {x.shape}")
    reasons.check()
    no_head = q.ndim == k.ndim == v.ndim == 2
    q, k, v = (x[None, ...] if x.ndim == 2 else x for x in (q, k, v))
    (hq, _, d), (hk, nk, dk), (hv, nv, _) = q.shape[-3:], k.shape[-3:], v.shape[-3:]
    if d != dk:
        reasons.add(ValueError, f"k: expected the width D of q ({d}), got {dk}")
    if nk != nv:
        reasons.add(ValueError, f"v: expected the length Nk of k ({nk}), got {nv}")
    shared = shared_keys and 0 < hk < hv and hv % hk == 0
    if hk != hv and not shared:
        several = "; a multiple of them would do too" if shared_keys else ""
        reasons.add(ValueError, f"v: expected the heads Hkv of k ({hk}), got {hv}{several}")
    if hq != hk and (hk == 0 or hq % hk):
        reasons.add(ValueError, f"q: expected heads Hq a multiple of Hkv ({hk}), got {hq}")
    elif shared and (hq == 0 or (hq % hv and hv % hq)):
        reasons.add(
            ValueError,
            f"q: expected heads Hq a multiple of the heads Hv of v ({hv}), or a divisor, got {hq}",
        )
    batch: tuple[int, ...] = ()
    try:
        batch = np.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
    except ValueError:
        reasons.add(ValueError, "q, k, v: leading (batch) axes do not broadcast together")
    reasons.check()
    if shared:
        return q, k, v, batch, no_head
    g = hq // hk if hk else 1
    q = xp.reshape(q, (*q.shape[:-3], hk, g, *q.shape[-2:]))
    return q, k, v, batch, no_head


def accumulation_dtype(x: Array, xp: Namespace) -> DType:
    """At least float32: the dtype of scores, normalisers and sums."""
    return xp.float64 if dtype_name(x.dtype) == "float64" else xp.float32


# -- The other arguments ----------------------------------------------------------------------


def read_number(name: str, x: object, reasons: Reasons, *, positive: bool) -> float:
    """A finite real number."""
    if isinstance(x, bool) or not isinstance(x, Real):
        reasons.add(TypeError, f"{name}: expected a real number, got {describe(x)}")
        return 1.0
    value = float(x)
    if not math.isfinite(value) or (positive and value <= 0):
        kind = "positive, finite" if positive else "finite"
        reasons.add(ValueError, f"{name}: expected a {kind} number, got {value}")
    return value


def read_flag(name: str, x: object, reasons: Reasons) -> bool:
    """True or False, and nothing that merely looks so."""
    if isinstance(x, bool | np.bool_):
        return bool(x)
    reasons.add(TypeError, f"{name}: expected True or False, got {describe(x)}")
    return bool(x) if not is_array(x) else False


def read_word(name: str, x: object, known: tuple[str, ...], reasons: Reasons) -> str:
    """One of a few words."""
    if isinstance(x, str) and x in known:
        return x
    expected = ", ".join(map(repr, known))
    near = difflib.get_close_matches(x, known, 1) if isinstance(x, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    reasons.add(ValueError, f"{name}: expected one of {expected}, got {x!r}{hint}")
    return known[0]


def read_count(name: str, x: object, reasons: Reasons, *, low: int) -> int:
    """An int of at least `low`."""
    if isinstance(x, bool) or not isinstance(x, Integral):
        reasons.add(TypeError, f"{name}: expected an int, got {describe(x)}")
        return max(low, 1)
    if x < low:
        reasons.add(ValueError, f"{name}: expected at least {low}, got {int(x)}")
    return int(x)


def read_window(window: object, reasons: Reasons) -> Pattern | None:
    """``(left, right)`` as a pattern."""
    if window is None:
        return None
    if not isinstance(window, tuple | list) or len(window) != 2:
        reasons.add(
            TypeError,
            f"window: expected a pair (left, right) of int or None, got {describe(window)}; "
            "a window of k keys around each query is (k // 2, k // 2), a causal one (k - 1, 0)",
        )
        return None
    try:
        return patterns.Window(*window)
    except (TypeError, ValueError) as error:
        reasons.add(type(error), f"window: {error}")
        return None


def read_integers(
    name: str, x: object, batch: tuple[int, ...], reasons: Reasons
) -> int | Array | None:
    """None, an int, or an integer array that broadcasts over the batch axes."""
    if x is None or (isinstance(x, Integral) and not isinstance(x, bool)):
        return None if x is None else int(x)
    if not is_array(x) or "int" not in dtype_name(x.dtype):  # type: ignore[attr-defined]
        reasons.add(
            TypeError, f"{name}: expected an int or an array of integers, got {describe(x)}"
        )
        return None
    if not broadcasts(x.shape, batch):  # type: ignore[attr-defined]
        reasons.add(
            ValueError,
            f"{name}: expected a shape that broadcasts to the batch axes {batch}, "
            f"got {tuple(x.shape)}",  # type: ignore[attr-defined]
        )
        return None
    # Differences of narrow or unsigned integers would wrap around.
    xp = compat.array_namespace(x)
    return xp.astype(x, xp.arange(0).dtype, copy=False)


def read_lengths(
    x: object, nk: int, batch: tuple[int, ...], reasons: Reasons
) -> int | Array | None:
    """`kv_lengths`, in ``[0, Nk]`` wherever the values can be known."""
    lengths = read_integers("kv_lengths", x, batch, reasons)
    values = loops.host_values(lengths) if is_array(lengths) else lengths
    if values is not None and np.size(values):
        low, high = int(np.min(values)), int(np.max(values))
        if low < 0 or high > nk:
            reasons.add(
                ValueError,
                f"kv_lengths: expected values from 0 to Nk ({nk}), got {low} to {high}",
            )
    return lengths


def read_segments(
    x: object, nq: int, nk: int, batch: tuple[int, ...], reasons: Reasons
) -> patterns.Segments | None:
    """One array of ids for both sides, or a pair ``(q_ids, k_ids)``."""
    if x is None:
        return None
    if isinstance(x, tuple | list) and len(x) == 2:
        q_ids, k_ids = x
    elif is_array(x):
        q_ids = k_ids = x
        if nq != nk:
            reasons.add(
                ValueError,
                f"segment_ids: one array serves both sides only when Nq == Nk, got Nq {nq} and "
                f"Nk {nk}; pass a pair (q_ids, k_ids)",
            )
            return None
    else:
        reasons.add(
            TypeError,
            "segment_ids: expected an integer array (..., N) or a pair (q_ids, k_ids), "
            f"got {describe(x)}",
        )
        return None
    try:
        segments = patterns.Segments(q_ids, k_ids)
    except (TypeError, ValueError) as error:
        reasons.add(type(error), f"segment_ids: {error}")
        return None
    problems = segments.problems(nq, nk, batch)
    reasons.values(problems)
    return None if problems else segments


def read_scores_array(
    name: str, x: object, grouped: tuple[int, ...], xp: Namespace, reasons: Reasons
) -> Array | None:
    """
    A mask or bias as ``(..., Hkv | 1, G | 1, Nq | 1, Nk | 1)``; `grouped` is the full shape.
    """
    if x is None:
        return None
    *batch, hkv, g, nq, nk = grouped
    full = (*batch, hkv * g, nq, nk)
    wanted = ("bool",) if name == "mask" else FLOATS
    if not is_array(x) or dtype_name(x.dtype) not in wanted:  # type: ignore[attr-defined]
        hint = "; True means visible" if name == "mask" else ""
        reasons.add(
            TypeError,
            f"{name}: expected an array of {' or '.join(wanted)}, got {describe(x)}{hint}",
        )
        return None
    array: Array = x
    if not broadcasts(array.shape, full):
        reasons.add(
            ValueError,
            f"{name}: expected a shape that broadcasts to (..., Hq, Nq, Nk) = {full}, "
            f"got {tuple(array.shape)}",
        )
        return None
    shape = (1,) * (3 - array.ndim) + tuple(array.shape)
    heads = (hkv, g) if shape[-3] == hkv * g else (1, 1)
    return xp.reshape(array, (*shape[:-3], *heads, *shape[-2:]))


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return bool(np.broadcast_shapes(tuple(shape), to) == to)
    except ValueError:
        return False


def pattern_arrays(pattern: object, name: str = "pattern") -> dict[str, Array]:
    if not isinstance(pattern, Pattern):
        return {}
    arrays: list[Array] = []
    patterns.detach(pattern, arrays)
    return {f"{name} (its array {n})": x for n, x in enumerate(arrays)}


def segment_arrays(x: object) -> dict[str, Any]:
    if isinstance(x, tuple | list):
        return {f"segment_ids[{n}]": ids for n, ids in enumerate(x)}
    return {"segment_ids": x}
