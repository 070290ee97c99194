"""The arguments of dense and of local attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from arrattn import patterns
from arrattn._core.inputs.arguments import (
    FLOATS,
    Reasons,
    accumulation_dtype,
    describe,
    dtype_name,
    is_array,
    pattern_arrays,
    read_flag,
    read_integers,
    read_lengths,
    read_namespace,
    read_number,
    read_qkv,
    read_scores_array,
    read_segments,
    read_window,
    read_word,
    segment_arrays,
)
from arrattn._core.inputs.calls import SoftmaxInputs
from arrattn._core.typing import Array, DType, Namespace
from arrattn.patterns import Pattern

ENGINES = ("auto", "tiles", "native")


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
    also: Callable[[Reasons, tuple[int, ...]], None] | None = None,
    arrays: dict[str, Any] | None = None,
) -> SoftmaxInputs:
    """
    Read the arguments of dense, local and sparse attention.

    ``also(reasons, shape)`` checks what a function takes beside them, so that all complaints
    come together; the `shape` is (..., Hkv, G, Nq, Nk). `arrays` are those among it, for library
    and device.
    """
    reasons = Reasons(function)
    named: dict[str, Any] = {"q": q, "k": k, "v": v, "mask": mask, "bias": bias, "sinks": sinks}
    named |= {"kv_lengths": kv_lengths, "q_offset": q_offset}
    named |= segment_arrays(segment_ids) | pattern_arrays(pattern) | (arrays or {})
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
    if isinstance(offset, int) and (far := _too_far(offset, nq + nk, xp)):
        reasons.add(ValueError, f"q_offset: expected less than {far} in size, got {offset}")
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
        also(reasons, grouped)
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


def _too_far(offset: int, tokens: int, xp: Namespace) -> str | None:
    """What an offset would have to be below for positions not to wrap around; None if it is."""
    if abs(offset) >= patterns.FAR:
        return "2**40"
    if abs(offset) < 1 << 30:
        return None
    most = xp.iinfo(xp.arange(0).dtype).max - tokens
    return str(most) if abs(offset) >= most else None


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


def _lift(x: int | Array, xp: Namespace) -> int | Array:
    return x if isinstance(x, int) else xp.reshape(x, (*x.shape, 1, 1, 1, 1))


def read_local(
    q: Array, k: Array, v: Array, *, window: tuple[int | None, int | None], **shared: Any
) -> SoftmaxInputs:
    """Read the arguments of local attention, which needs a window."""

    def require_window(reasons: Reasons, shape: tuple[int, ...]) -> None:
        del shape
        if window is None:
            reasons.add(TypeError, "window: expected a pair (left, right), got None")

    return read_softmax("local_attention", q, k, v, window=window, also=require_window, **shared)
