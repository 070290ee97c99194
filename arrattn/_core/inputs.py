"""
The one door: what came in, checked once, in the shapes that the engines work on.

Every complaint about a call is written here (patterns and feature maps check themselves when
made).
All reasons that hold are raised together, with the shapes of q, k and v.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from arrattn import patterns
from arrattn._core import loops
from arrattn._core.typing import Array, Device, DType, Namespace
from arrattn._state import DeltaState, LinearState
from arrattn.feature_maps._read import read_map
from arrattn.patterns import Pattern

FLOATS = ("float64", "float32", "float16", "bfloat16")
ENGINES = ("auto", "tiles", "native")


class SoftmaxInputs(NamedTuple):
    """
    The operands of the softmax family, query heads grouped by the key head that they read.

    `offset` is an int or an integer array that broadcasts to the scores' axes.
    """

    xp: Namespace
    device: Device
    q: Array  # (..., Hkv, G, Nq, D)
    k: Array  # (..., Hkv, Nk, D)
    v: Array  # (..., Hkv, Nk, Dv)
    bias: Array | None  # (..., Hkv | 1, G | 1, Nq | 1, Nk | 1)
    sinks: Array | None  # (Hkv, G, 1, 1), accumulation dtype
    pattern: Pattern | None
    offset: int | Array
    scale: float
    softcap: float | None
    batch: tuple[int, ...]
    acc: DType
    no_head: bool
    engine: str = "tiles"
    return_lse: bool = True
    always: Pattern | None = None  # of sparse attention, as is what follows
    block_scores: Array | None = None  # (..., Hkv | 1, G | 1, Nq | query blocks | 1, blocks)

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.q.shape[-2], self.k.shape[-2]

    @property
    def heads(self) -> tuple[int, int]:
        """Key heads, and query heads for each of them."""
        return self.q.shape[-4], self.q.shape[-3]

    def ungroup(self, out: Array, lse: Array | None) -> tuple[Array, Array | None]:
        """``(..., Hkv, G, Nq, Dv)`` and ``(..., Hkv, G, Nq)`` in the caller's shapes."""
        xp, (nq, _) = self.xp, self.lengths
        heads = () if self.no_head else (math.prod(self.heads),)
        out = xp.reshape(out, (*self.batch, *heads, nq, self.v.shape[-1]))
        lse = None if lse is None else xp.reshape(lse, (*self.batch, *heads, nq))
        return xp.astype(out, self.q.dtype, copy=False), lse

    def ungroup_selection(self, chosen: Array) -> Array:
        """``(..., Hkv, G | 1, rows, count)`` in the caller's shape."""
        *_, hkv, g, rows, count = chosen.shape
        heads = () if self.no_head else (hkv * g,)
        return self.xp.reshape(chosen, (*self.batch, *heads, rows, count))


class LinearInputs(NamedTuple):
    """
    The operands of the linear family, grouped as in `SoftmaxInputs`.

    `key_mask` joins the caller's mask and lengths; `kv_lengths` stays beside it because it moves
    the queries' positions.
    """

    xp: Namespace
    device: Device
    q: Array  # (..., Hkv, G, Nq, D)
    k: Array  # (..., Hkv, Nk, D)
    v: Array  # (..., Hkv, Nk, Dv)
    key_mask: Array | None  # bool, (..., Hkv | 1, Nk), True = visible
    kv_lengths: int | Array | None  # int or (...)
    q_ids: Array | None  # (..., Nq)
    k_ids: Array | None  # (..., Nk)
    state: LinearState | None
    scale: float
    batch: tuple[int, ...]
    acc: DType
    no_head: bool
    log_decay: Array | None = None  # (..., Hkv | 1, Nk, Dphi | 1)
    beta: Array | None = None  # (..., Hkv | 1, Nk)
    split: tuple[int, int] | None = None  # the last batch axes, if heads of `v` share keys

    @property
    def outer(self) -> tuple[int, ...]:
        """The batch axes of the caller."""
        return self.batch if self.split is None else self.batch[:-2]

    def ungroup(self, out: Array) -> Array:
        """``(..., Hkv, G, Nq, Dv)`` in the caller's shape and dtype."""
        g, nq = self.q.shape[-3:-1]
        out = self.join_heads(out, 3)
        heads = () if self.no_head else (out.shape[-4] * g,)
        out = self.xp.reshape(out, (*self.outer, *heads, nq, self.v.shape[-1]))
        return self.xp.astype(out, self.q.dtype, copy=False)

    def join_heads(self, x: Array, trailing: int) -> Array:
        """``(..., [r, s,] Hkv, ...)`` -> ``(..., Hkv * r * s, ...)``."""
        if self.split is None:
            return x
        tail = x.shape[x.ndim - trailing :]
        x = self.xp.moveaxis(x, -trailing - 1, -trailing - 3)
        return self.xp.reshape(x, (*self.outer, self.value_heads, *tail))

    @property
    def value_heads(self) -> int:
        """Heads of `v`, and of the state."""
        return int(self.k.shape[-3] * math.prod(self.split or ()))

    def split_heads(self, x: Array, trailing: int) -> Array:
        """The inverse of `join_heads`; an axis of 1 stays so."""
        if self.split is None:
            return x
        lead, tail = x.shape[: x.ndim - trailing - 1], x.shape[x.ndim - trailing :]
        heads = x.shape[x.ndim - trailing - 1]
        parts = (1, 1, 1) if heads == 1 else (heads // math.prod(self.split), *self.split)
        x = self.xp.reshape(x, (*lead, *parts, *tail))
        return self.xp.moveaxis(x, -trailing - 3, -trailing - 1)


class Choice(NamedTuple):
    """
    What sparse attention chooses; sizes cut to what the keys hold.

    `route` counts blocks to take or to search beside the own one; `exhaustive` means that
    keys are searched in all. `queries` is the number of them, and `query_blocks` that of the
    blocks they lie in (the most that can be, where offsets differ).
    """

    block: int
    top_k: int
    route: int
    exhaustive: bool
    select: str
    per: str
    score: str
    queries: int
    query_blocks: int
    selection: bool

    @property
    def many(self) -> int:
        """How many keys, or blocks, are chosen."""
        return self.top_k if self.select == "keys" else self.route

    def selection_rows(self, heads: tuple[int, int]) -> tuple[int, int]:
        """Query heads for each key head, and rows, that choose on their own."""
        rows = self.query_blocks if self.per == "block" else self.queries
        return 1 if self.per == "group" else heads[1], rows


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
    if not _broadcasts(x.shape, batch):  # type: ignore[attr-defined]
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
    if not _broadcasts(array.shape, full):
        reasons.add(
            ValueError,
            f"{name}: expected a shape that broadcasts to (..., Hq, Nq, Nk) = {full}, "
            f"got {tuple(array.shape)}",
        )
        return None
    shape = (1,) * (3 - array.ndim) + tuple(array.shape)
    heads = (hkv, g) if shape[-3] == hkv * g else (1, 1)
    return xp.reshape(array, (*shape[:-3], *heads, *shape[-2:]))


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    try:
        return bool(np.broadcast_shapes(tuple(shape), to) == to)
    except ValueError:
        return False


def _read_sinks(
    x: object, heads: tuple[int, int], acc: DType, xp: Namespace, reasons: Reasons
) -> Array | None:
    if x is None:
        return None
    if not is_array(x) or dtype_name(x.dtype) not in FLOATS:  # type: ignore[attr-defined]
        reasons.add(TypeError, f"sinks: expected an array of real floats, got {describe(x)}")
    elif tuple(x.shape) != (math.prod(heads),):  # type: ignore[attr-defined]
        reasons.add(
            ValueError,
            f"sinks: expected shape (Hq,) = ({math.prod(heads)},), got {tuple(x.shape)}",  # type: ignore[attr-defined]
        )
    else:
        return xp.reshape(xp.astype(x, acc), (*heads, 1, 1))
    return None


def _pattern_arrays(pattern: object, name: str = "pattern") -> dict[str, Array]:
    if not isinstance(pattern, Pattern):
        return {}
    arrays: list[Array] = []
    patterns.detach(pattern, arrays)
    return {f"{name} (its array {n})": x for n, x in enumerate(arrays)}


def _segment_arrays(x: object) -> dict[str, Any]:
    if isinstance(x, tuple | list):
        return {f"segment_ids[{n}]": ids for n, ids in enumerate(x)}
    return {"segment_ids": x}


# -- The doors --------------------------------------------------------------------------------


def read_softmax(
    function: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: int | Array | None = None,
    segment_ids: Any = None,
    pattern: Pattern | None = None,
    q_offset: int | Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    return_lse: bool = False,
    engine: str = "tiles",
    also: Callable[[Reasons, int], None] | None = None,
    arrays: dict[str, Any] | None = None,
) -> SoftmaxInputs:
    """
    Read the arguments of dense, local and sparse attention.

    ``also(reasons, nk)`` checks what a function takes beside them, so that all complaints
    come together; `arrays` are those among it, for library and device.
    """
    reasons = Reasons(function)
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "sinks": sinks}
    named |= {"kv_lengths": kv_lengths, "q_offset": q_offset}
    named |= _segment_arrays(segment_ids) | _pattern_arrays(pattern) | (arrays or {})
    xp, device = read_namespace(named, reasons)
    q, k, v, batch, no_head = read_qkv(q, k, v, xp, reasons)
    acc = accumulation_dtype(q, xp)
    *_, hkv, g, nq, d = q.shape
    nk = k.shape[-2]
    grouped = (*batch, hkv, g, nq, nk)
    mask = read_scores_array("mask", mask, grouped, xp, reasons)
    bias = read_scores_array("bias", bias, grouped, xp, reasons)
    sinks = _read_sinks(sinks, (hkv, g), acc, xp, reasons)
    lengths = read_lengths(kv_lengths, nk, batch, reasons)
    offset = read_integers("q_offset", q_offset, batch, reasons)
    if isinstance(offset, int) and abs(offset) >= patterns.FAR:
        reasons.add(ValueError, f"q_offset: expected less than 2**40 in size, got {offset}")
    if pattern is not None and not isinstance(pattern, Pattern):
        reasons.add(TypeError, f"pattern: expected an arrattn Pattern, got {describe(pattern)}")
    elif pattern is not None:
        reasons.values([f"pattern: {text}" for text in pattern.problems(nq, nk, batch)])
        pattern = pattern.bound(nk)
    causal = read_flag("is_causal", is_causal, reasons)
    lse_too = read_flag("return_lse", return_lse, reasons)
    engine = read_word("engine", engine, ENGINES, reasons)
    if scale is not None:
        scale = read_number("scale", scale, reasons, positive=False)
    if softcap is not None:
        softcap = read_number("softcap", softcap, reasons, positive=True)
    seen_by = read_window(window, reasons)
    segments = read_segments(segment_ids, nq, nk, batch, reasons)
    if also is not None:
        also(reasons, nk)
    reasons.check()
    if offset is None:
        offset = (nk if lengths is None else lengths) - nq
    return SoftmaxInputs(
        xp=xp,
        device=device,
        q=q,
        k=k,
        v=v,
        bias=bias,
        sinks=sinks,
        pattern=patterns.both(
            patterns.Causal() if causal else None,
            seen_by,
            None if lengths is None else patterns.Prefix(lengths),
            segments,
            pattern,
            None if mask is None else patterns.Masked(mask),
            None if bias is None else patterns.Unforbidden(bias),
        ),
        offset=_lift(offset, xp),
        scale=(d**-0.5 if d else 1.0) if scale is None else scale,
        softcap=softcap,
        batch=batch,
        acc=acc,
        no_head=no_head,
        engine=engine,
        return_lse=lse_too,
    )


def _lift(x: int | Array, xp: Namespace) -> int | Array:
    return x if isinstance(x, int) else xp.reshape(x, (*x.shape, 1, 1, 1, 1))


def read_linear(
    function: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    feature_map: Any,
    is_causal: bool,
    key_mask: Array | None,
    kv_lengths: int | Array | None,
    segment_ids: Any,
    normalize: bool,
    scale: float,
    initial_state: LinearState | None,
    return_state: bool,
    log_decay: Array | None = None,
) -> LinearInputs:
    """Read the arguments of linear attention; what depends on the features waits for them."""
    reasons = Reasons(function)
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "key_mask": key_mask, "log_decay": log_decay}
    named |= {"kv_lengths": kv_lengths} | _segment_arrays(segment_ids)
    if isinstance(initial_state, tuple) and [is_array(x) for x in initial_state] == [True] * 2:
        named |= {f"initial_state.{n}": x for n, x in zip("Sz", initial_state, strict=True)}
    elif initial_state is not None:
        reasons.add(
            TypeError, f"initial_state: expected a LinearState, got {describe(initial_state)}"
        )
    xp, device = read_namespace(named, reasons)
    q, k, v, batch, no_head = read_qkv(q, k, v, xp, reasons, shared_keys=True)
    nq, nk, hkv = q.shape[-2], k.shape[-2], k.shape[-3]
    lengths = read_lengths(kv_lengths, nk, batch, reasons)
    for name, flag in (
        ("is_causal", is_causal),
        ("normalize", normalize),
        ("return_state", return_state),
    ):
        read_flag(name, flag, reasons)
    scale = read_number("scale", scale, reasons, positive=False)
    segments = read_segments(segment_ids, nq, nk, batch, reasons)
    mask = _read_key_mask(key_mask, (*batch, hkv, nk), reasons)
    try:
        reasons.values(read_map(feature_map).problems(q.shape[-1]))
    except TypeError as error:
        reasons.add(TypeError, str(error))
    if log_decay is not None:
        _read_floats("log_decay", log_decay, reasons)
        _refuse_cut_state(segments, initial_state, return_state, reasons)
    reasons.check()
    if lengths is not None:
        mask = _both_masks(mask, _within(lengths, nk, xp, device))
    x = LinearInputs(
        xp=xp,
        device=device,
        q=q,
        k=k,
        v=v,
        key_mask=mask,
        kv_lengths=lengths,
        q_ids=None if segments is None else segments.q_ids,
        k_ids=None if segments is None else segments.k_ids,
        state=initial_state,
        scale=scale,
        batch=batch,
        acc=accumulation_dtype(q, xp),
        no_head=no_head,
    )
    return x if k.shape[-3] == v.shape[-3] else _shared_keys(x)


def _shared_keys(x: LinearInputs) -> LinearInputs:
    """
    More heads of `v` than of `k`: value heads become batch axes, over which keys broadcast.

    Value head `h` is written under key head ``h // (Hv // Hkv)``. The two axes (r, s) are the
    value heads of a key head, by the query heads that read them.
    """
    hq, hk, hv = (a.shape[-3] for a in (x.q, x.k, x.v))
    r = min(hq, hv) // hk
    split = (r, hv // (hk * r))

    def beside(a: Any, trailing: int) -> Any:
        if not is_array(a):
            return a
        cut = a.ndim - trailing
        return x.xp.reshape(a, (*a.shape[:cut], 1, 1, *a.shape[cut:]))

    q = x.xp.reshape(x.q, (*x.q.shape[:-3], hk, r, 1, hq // (hk * r), *x.q.shape[-2:]))
    q_ids = beside(x.q_ids, 1)
    x = x._replace(
        q=x.xp.moveaxis(q, -6, -4),
        k=beside(x.k, 3),
        key_mask=beside(x.key_mask, 2),
        kv_lengths=beside(x.kv_lengths, 0),
        q_ids=q_ids,
        k_ids=q_ids if x.k_ids is x.q_ids else beside(x.k_ids, 1),
        batch=(*x.batch, *split),
        split=split,
    )
    return x._replace(v=x.split_heads(x.v, 2))


def _read_floats(name: str, x: object, reasons: Reasons) -> bool:
    """Whether `x` is an array of real floats."""
    if is_array(x) and dtype_name(x.dtype) in FLOATS:  # type: ignore[attr-defined]
        return True
    reasons.add(TypeError, f"{name}: expected an array of real floats, got {describe(x)}")
    return False


def _refuse_cut_state(
    segments: object, initial_state: object, return_state: object, reasons: Reasons
) -> None:
    """A state that decays, or corrects itself, belongs to one segment alone."""
    if segments is None:
        return
    for name, given in (
        ("initial_state", initial_state is not None),
        ("return_state", return_state),
    ):
        if given:
            reasons.add(
                ValueError,
                f"{name}: segment_ids reset the memory at every boundary, which would cut the "
                "state silently; call each segment by itself",
            )


def read_decay(
    x: Array, full: tuple[int, ...], reasons: Reasons, *, no_head: bool, growing: bool = False
) -> Array | None:
    """
    `log_decay` as ``(..., Hv | 1, Nk, width | 1)``; `full` is the full shape.

    `growing` allows values above 0.
    """
    xp = compat.array_namespace(x)
    *batch, heads, n, width = full
    shape = tuple(x.shape)
    own = (1, *shape) if no_head else shape
    by_channel = len(own) > 2 and own[-1] in (1, width) and _broadcasts(own, full)
    by_token = len(own) > 1 and own[-1] == n and _broadcasts(own, (*batch, heads, n))
    head = "" if no_head else "Hkv, "
    if by_channel and by_token and own[-1] != 1:
        reasons.add(
            ValueError,
            f"log_decay: {shape} can be read as (..., {head}Nk) and as (..., {head}Nk, Dphi); "
            "add a last axis of 1 for the former, or broadcast it to all axes for the latter",
        )
        return None
    if not by_channel and not by_token:
        shown = (*batch, n, width) if no_head else full
        reasons.add(
            ValueError,
            f"log_decay: expected a shape that broadcasts to (..., {head}Nk, Dphi) = {shown}, "
            f"its last axis 1 or {width}, or (..., {head}Nk) = {shown[:-1]}, got {shape}",
        )
        return None
    if not growing and loops.truth(xp.any(x > 0)):
        reasons.add(
            ValueError,
            f"log_decay: expected logarithms of at most 0, got up to {float(xp.max(x)):.3g}",
        )
    own = own if by_channel else (*own, 1)
    x = xp.reshape(x, (1,) * (len(full) - len(own)) + own)
    return xp.broadcast_to(x, (*x.shape[:-2], n, x.shape[-1]))


def read_beta(x: Array, full: tuple[int, ...], reasons: Reasons, *, no_head: bool) -> Array | None:
    """`beta` as ``(..., Hv | 1, Nk)``; `full` is the full shape."""
    own = (1, *x.shape) if no_head else tuple(x.shape)
    if len(own) < 2 or not _broadcasts(own, full):
        shown, head = ((*full[:-2], full[-1]), "") if no_head else (full, "Hv, ")
        reasons.add(
            ValueError,
            f"beta: expected a shape that broadcasts to (..., {head}Nk) = {shown}, "
            f"got {tuple(x.shape)}",
        )
        return None
    xp = compat.array_namespace(x)
    x = xp.reshape(x, (1,) * (len(full) - len(own)) + own)
    return xp.broadcast_to(x, (*x.shape[:-1], full[-1]))


def read_delta(
    function: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    beta: Array,
    log_decay: Array | None,
    key_mask: Array | None,
    kv_lengths: int | Array | None,
    segment_ids: Any,
    scale: float,
    initial_state: DeltaState | None,
    return_state: bool,
    growing: bool = False,
) -> LinearInputs:
    """Read the arguments of delta attention."""
    reasons = Reasons(function)
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay}
    named |= {"key_mask": key_mask, "kv_lengths": kv_lengths} | _segment_arrays(segment_ids)
    if isinstance(initial_state, tuple) and [is_array(x) for x in initial_state] == [True]:
        named["initial_state.S"] = initial_state[0]
    elif initial_state is not None:
        reasons.add(
            TypeError, f"initial_state: expected a DeltaState, got {describe(initial_state)}"
        )
    xp, device = read_namespace(named, reasons)
    q, k, v, batch, no_head = read_qkv(q, k, v, xp, reasons, shared_keys=True)
    (hkv, nk, d), (hv, _, dv) = k.shape[-3:], v.shape[-3:]
    lengths = read_lengths(kv_lengths, nk, batch, reasons)
    read_flag("return_state", return_state, reasons)
    scale = read_number("scale", scale, reasons, positive=False)
    segments = read_segments(segment_ids, q.shape[-2], nk, batch, reasons)
    mask = _read_key_mask(key_mask, (*batch, hkv, nk), reasons)
    _refuse_cut_state(segments, initial_state, return_state, reasons)
    if _read_floats("beta", beta, reasons):
        beta = read_beta(beta, (*batch, hv, nk), reasons, no_head=no_head)
    if log_decay is not None and _read_floats("log_decay", log_decay, reasons):
        full = (*batch, hv, nk, d)
        log_decay = read_decay(log_decay, full, reasons, no_head=no_head, growing=growing)
    acc = accumulation_dtype(q, xp)
    if initial_state is not None:
        heads = () if no_head else (hv,)
        check_state("S", initial_state[0], (*batch, *heads, d, dv), acc, reasons)
    reasons.check()
    if lengths is not None:
        mask = _both_masks(mask, _within(lengths, nk, xp, device))
    state = None
    if initial_state is not None:
        S = lead_with_ones(initial_state[0], len(batch) + 3, no_head=no_head)
        z = xp.zeros(S.shape[:-1], dtype=S.dtype, device=loops.device_of(S))
        state = LinearState(S, z)
    x = LinearInputs(
        xp=xp,
        device=device,
        q=q,
        k=k,
        v=v,
        key_mask=mask,
        kv_lengths=lengths,
        q_ids=None if segments is None else segments.q_ids,
        k_ids=None if segments is None else segments.k_ids,
        state=state,
        scale=scale,
        batch=batch,
        acc=acc,
        no_head=no_head,
        log_decay=log_decay,
        beta=beta,
    )
    return x if hkv == hv else _with_gates(_shared_keys(x))


def lead_with_ones(x: Array, ndim: int, *, no_head: bool) -> Array:
    """Give an array that broadcasts all its axes, and a head axis where there is none."""
    x = x[None, ...] if no_head else x
    xp = compat.array_namespace(x)
    return xp.reshape(x, (1,) * (ndim - x.ndim) + tuple(x.shape))


def _with_gates(x: LinearInputs) -> LinearInputs:
    """Lay out state and gates, which have the heads of `v`, as `v` is."""

    def split(a: Array | None, trailing: int) -> Any:
        return None if a is None else x.split_heads(a, trailing)

    state = x.state and LinearState(split(x.state.S, 2), split(x.state.z, 1))
    return x._replace(log_decay=split(x.log_decay, 2), beta=split(x.beta, 1), state=state)


def with_decay(
    x: LinearInputs, log_decay: Array, width: int, function: str, *, growing: bool
) -> LinearInputs:
    """Add `log_decay`, now that the number of features is known."""
    reasons = Reasons(function)
    full = (*x.outer, x.value_heads, x.k.shape[-2], width)
    decay = read_decay(log_decay, full, reasons, no_head=x.no_head, growing=growing)
    reasons.check()
    return x._replace(log_decay=None if decay is None else x.split_heads(decay, 2))


def _read_key_mask(x: object, full: tuple[int, ...], reasons: Reasons) -> Array | None:
    if x is None:
        return None
    if not is_array(x) or dtype_name(x.dtype) != "bool":  # type: ignore[attr-defined]
        reasons.add(
            TypeError, f"key_mask: expected an array of bool (True = visible), got {describe(x)}"
        )
        return None
    shape = tuple(x.shape)  # type: ignore[attr-defined]
    # A key mask belongs to batch items, not to heads: (..., Nk).
    *batch, _, nk = full
    if len(shape) == 0 or shape[-1] != nk or not _broadcasts(shape[:-1], tuple(batch)):
        reasons.add(
            ValueError,
            f"key_mask: expected shape (..., Nk), broadcasting to {(*batch, nk)}, got {shape}",
        )
        return None
    return x[..., None, :]  # type: ignore[index]


def _within(lengths: int | Array, nk: int, xp: Namespace, device: Device) -> Array:
    j = xp.reshape(xp.arange(nk, device=device), (1, nk))
    return j < (lengths if isinstance(lengths, int) else lengths[..., None, None])


def _both_masks(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


def read_state(
    state: LinearState, shapes: tuple[tuple[int, ...], tuple[int, ...]], acc: DType, function: str
) -> None:
    """Check a state that comes in against the shapes that this call would give out."""
    reasons = Reasons(function)
    for name, x, shape in zip("Sz", state, shapes, strict=True):
        check_state(name, x, shape, acc, reasons)
    reasons.check()


def check_state(name: str, x: Array, shape: tuple[int, ...], acc: DType, reasons: Reasons) -> None:
    """Check one array of a state."""
    if x.dtype != acc:
        reasons.add(
            TypeError,
            f"initial_state.{name}: expected the accumulation dtype {dtype_name(acc)}, "
            f"got {dtype_name(x.dtype)}",
        )
    if not _broadcasts(x.shape, shape):
        reasons.add(
            ValueError,
            f"initial_state.{name}: expected shape {shape}, got {tuple(x.shape)}",
        )


SELECT, PER, SCORE = ("keys", "blocks"), ("query", "block", "group"), ("mean", "bound", "best")

#: Blocks chosen by default.
BLOCKS = 3


def read_sparse(
    q: Array,
    k: Array,
    v: Array,
    *,
    block_size: object,
    top_k: object,
    route: object,
    select: object,
    per: object,
    score: object = "mean",
    block_scores: object = None,
    always: object = None,
    return_selection: object = False,
    **shared: Any,
) -> tuple[SoftmaxInputs, Choice]:
    """Read the arguments of sparse attention; `shared` are those of the whole family."""
    read: dict[str, Any] = {}

    def read_choice(reasons: Reasons, nk: int) -> None:
        root = math.isqrt(nk - 1) + 1 if nk else 1
        read["what"] = read_word("select", select, SELECT, reasons)
        read["per"] = read_word("per", per, PER, reasons)
        read["score"] = read_word("score", score, SCORE, reasons)
        block = root if block_size is None else read_count("block_size", block_size, reasons, low=1)
        usual = root if read["what"] == "keys" else BLOCKS
        read["count"] = usual if top_k is None else read_count("top_k", top_k, reasons, low=0)
        read["route"] = None if route is None else read_count("route", route, reasons, low=0)
        read["block"] = max(min(block, nk), 1)
        read["selection"] = read_flag("return_selection", return_selection, reasons)
        if always is not None and not isinstance(always, Pattern):
            reasons.add(TypeError, f"always: expected an arrattn Pattern, got {describe(always)}")
        if block_scores is not None and score != "mean":
            reasons.add(
                ValueError,
                f"score: expected to be left out where block_scores are given, got {score!r}",
            )

    arrays = _pattern_arrays(always, "always") | {"block_scores": block_scores}
    call = read_softmax("sparse_attention", q, k, v, also=read_choice, arrays=arrays, **shared)
    (nq, nk), what, block, count = call.lengths, read["what"], read["block"], read["count"]
    blocks = -(-nk // block)
    # Every block may be another one: a position outside the keys has no own block.
    searched = count if what == "blocks" else blocks if read["route"] is None else read["route"]
    searched = min(searched, blocks) if count else 0
    choice = Choice(
        block=block,
        top_k=min(count, nk),
        route=searched,
        # Blocks are routed all the same where their scores can forbid some.
        exhaustive=what == "keys"
        and 0 < searched == blocks
        and (block_scores is None or read["route"] is None),
        select=what,
        per=read["per"],
        score="given" if block_scores is not None else read["score"],
        queries=nq,
        query_blocks=query_blocks(nq, block, call.offset),
        selection=read["selection"],
    )
    reasons = Reasons("sparse_attention")
    reasons.arrays = {"q": q, "k": k, "v": v}
    beside = always if isinstance(always, Pattern) else None
    if beside is not None:
        reasons.values([f"always: {text}" for text in beside.problems(nq, nk, call.batch)])
    scores = _read_block_scores(block_scores, call, choice, reasons)
    reasons.check()
    return call._replace(always=beside, block_scores=scores), choice


def query_blocks(nq: int, size: int, offset: int | Array) -> int:
    """How many blocks the queries' positions lie in; the most, where offsets differ."""
    if nq == 0:
        return 0
    if not isinstance(offset, int):
        return (nq + size - 2) // size + 1
    return (offset + nq - 1) // size - offset // size + 1


def _read_block_scores(
    x: Any, call: SoftmaxInputs, choice: Choice, reasons: Reasons
) -> Array | None:
    if x is None:
        return None
    if not is_array(x) or dtype_name(x.dtype) not in FLOATS:
        reasons.add(
            TypeError,
            f"block_scores: expected an array of {' or '.join(FLOATS)}, got {describe(x)}",
        )
        return None
    (hkv, g), (nq, nk) = call.heads, call.lengths
    blocks = -(-nk // choice.block)
    shape = (1,) * (3 - x.ndim) + tuple(x.shape)
    *batch, heads, rows, columns = shape
    all_rows = {1, nq} | ({choice.query_blocks} if choice.per == "block" else set())
    fits = heads in {1, hkv, hkv * g} and rows in all_rows and columns == blocks
    if not fits or not _broadcasts(tuple(batch), call.batch):
        also = f" or {choice.query_blocks} query blocks" if choice.per == "block" else ""
        reasons.add(
            ValueError,
            f"block_scores: expected a shape that broadcasts to (..., Hq, Nq, blocks) = "
            f"{(*call.batch, hkv * g, nq, blocks)}{also}, with all {blocks} blocks of "
            f"{choice.block} keys, got {tuple(x.shape)}",
        )
        return None
    per_head = (hkv, g) if heads == hkv * g else (heads, 1)
    return call.xp.reshape(x, (*batch, *per_head, rows, columns))


def read_local(
    q: Array, k: Array, v: Array, *, window: tuple[int | None, int | None], **shared: Any
) -> SoftmaxInputs:
    """Read the arguments of local attention, which needs a window."""

    def require_window(reasons: Reasons, nk: int) -> None:
        del nk
        if window is None:
            reasons.add(TypeError, "window: expected a pair (left, right), got None")

    return read_softmax("local_attention", q, k, v, window=window, also=require_window, **shared)


def read_parts(parts: Any) -> Namespace:
    """Check what `merge` is given; the parts' namespace."""
    reasons = Reasons("merge")
    if not isinstance(parts, tuple | list):
        reasons.add(TypeError, f"parts: expected a list of (out, lse), got {describe(parts)}")
        reasons.check()
    if not parts:
        reasons.add(ValueError, "parts: expected at least one (out, lse), got none")
    for n, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2 or not all(map(is_array, part)):
            reasons.add(
                TypeError, f"parts[{n}]: expected a pair of arrays (out, lse), got {describe(part)}"
            )
    reasons.check()
    (out0, lse0), xp = parts[0], compat.array_namespace(parts[0][0])
    for n, (out, lse) in enumerate(parts):
        for name, x, first in (("out", out, out0), ("lse", lse, lse0)):
            what = f"parts[{n}].{name}"
            if compat.array_namespace(x) is not xp:
                other = library_name(compat.array_namespace(x))
                reasons.add(TypeError, f"{what}: expected {library_name(xp)}, got {other}")
            elif loops.device_of(x) != loops.device_of(out0):
                reasons.add(TypeError, f"{what}: expected the device of parts[0].out")
            elif x.dtype != first.dtype or dtype_name(x.dtype) not in FLOATS:
                reasons.add(
                    TypeError,
                    f"{what}: expected the floating dtype of parts[0].{name} "
                    f"({dtype_name(first.dtype)}), got {dtype_name(x.dtype)}",
                )
            elif tuple(x.shape) != tuple(first.shape):
                reasons.add(
                    ValueError,
                    f"{what}: expected shape {tuple(first.shape)}, got {tuple(x.shape)}",
                )
        if tuple(lse.shape) != tuple(out.shape[:-1]):
            reasons.add(
                ValueError,
                f"parts[{n}].lse: expected shape (..., Nq) = {tuple(out.shape[:-1])}, "
                f"got {tuple(lse.shape)}",
            )
    reasons.check()
    return xp
