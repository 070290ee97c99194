"""Inputs and outputs of ONNX's LinearAttention, whose heads are packed into the last axis."""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat as compat

from arrattn._core.inputs import (
    Reasons,
    accumulation_dtype,
    describe,
    is_array,
    library_name,
    read_count,
    read_number,
    read_word,
)
from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn._state import LinearState

RULES = ("linear", "gated", "delta", "gated_delta")


class PackedInputs(NamedTuple):
    """The operator's inputs with heads apart, as `linear_attention` takes them."""

    q: Array  # (B, H_q, T, d_k)
    k: Array  # (B, H_kv, T, d_k)
    v: Array  # (B, H_kv, T, d_v)
    state: Array | None  # (B, H_kv, d_k, d_v), accumulation dtype
    decay: Array | None  # (B, H_kv, T, d_k | 1)
    beta: Array | None  # (B, H_kv | 1, T)
    scale: float


def read_packed(
    function: str,
    arrays: dict[str, Any],
    *,
    q_num_heads: int,
    kv_num_heads: int,
    scale: float,
    update_rule: str,
    chunk_size: int,
) -> PackedInputs:
    """
    Check inputs and attributes, and take the heads apart.

    `arrays` are the operator's inputs by their names; None where one is not given.
    """
    reasons = Reasons(function)
    heads_q = read_count("q_num_heads", q_num_heads, reasons, low=1)
    heads = read_count("kv_num_heads", kv_num_heads, reasons, low=1)
    read_count("chunk_size", chunk_size, reasons, low=1)
    if heads_q % max(heads, 1):
        reasons.add(
            ValueError,
            f"q_num_heads: expected a multiple of kv_num_heads ({heads}), got {heads_q}",
        )
    scale = read_number("scale", scale, reasons, positive=False)
    _read_rule(arrays, read_word("update_rule", update_rule, RULES, reasons), reasons)
    xp = _read_arrays(arrays, reasons)
    widths = _read_shapes(arrays, heads_q, heads, reasons)

    def apart(name: str, n: int) -> Any:
        x = arrays[name]
        if x is None:
            return None
        x = xp.reshape(x, (*x.shape[:2], n, x.shape[-1] // n))
        return xp.permute_dims(x, (0, 2, 1, 3))

    state, beta = arrays["past_state"], arrays["beta"]
    acc = accumulation_dtype(arrays["query"], xp)
    return PackedInputs(
        q=apart("query", heads_q),
        k=apart("key", heads),
        v=apart("value", heads),
        state=None if state is None else xp.astype(state, acc),
        decay=apart("decay", heads),
        beta=None if beta is None else xp.permute_dims(beta, (0, 2, 1)),
        scale=scale or max(widths[0], 1) ** -0.5,
    )


def _read_rule(arrays: dict[str, Any], rule: str, reasons: Reasons) -> None:
    """A rule needs its gates, and no others."""
    for name, rules in (("decay", ("gated", "gated_delta")), ("beta", ("delta", "gated_delta"))):
        needed, given = rule in rules, arrays[name] is not None
        if needed != given:
            expected = "an array" if needed else "none"
            reasons.add(
                ValueError,
                f"{name}: expected {expected} with update_rule={rule!r}, "
                f"got {'one' if given else 'none'}",
            )


def _read_arrays(arrays: dict[str, Any], reasons: Reasons) -> Namespace:
    """All arrays are of one library, and have three axes, the state four; raises otherwise."""
    for name, x in arrays.items():
        axes = 4 if name == "past_state" else 3
        optional = name not in ("query", "key", "value")
        if x is None and optional:
            continue
        if not is_array(x):
            reasons.add(TypeError, f"{name}: expected an array, got {describe(x)}")
        elif x.ndim != axes:
            reasons.add(ValueError, f"{name}: expected {axes} axes, got shape {tuple(x.shape)}")
    reasons.check()
    xp = compat.array_namespace(arrays["query"])
    for name, x in arrays.items():
        if x is not None and compat.array_namespace(x) is not xp:
            other = library_name(compat.array_namespace(x))
            reasons.add(
                TypeError,
                f"{name}: expected an array of the same library as query ({library_name(xp)}), "
                f"got one of {other}",
            )
    reasons.check()
    return xp


def _read_shapes(
    arrays: dict[str, Any], heads_q: int, heads: int, reasons: Reasons
) -> tuple[int, int]:
    """Check shapes against each other; the widths of a key and of a value."""
    b, t, width = arrays["query"].shape
    for name, n in (("query", heads_q), ("key", heads), ("value", heads)):
        shape = tuple(arrays[name].shape)
        if shape[-1] % n or shape[:2] != (b, t):
            reasons.add(
                ValueError,
                f"{name}: expected shape ({b}, {t}, a multiple of {n}), got {shape}",
            )
    dk, dv = width // heads_q, arrays["value"].shape[-1] // heads
    wanted: dict[str, list[tuple[int, ...]]] = {
        "key": [(b, t, heads * dk)],
        "decay": [(b, t, heads), (b, t, heads * dk)],
        "beta": [(b, t, heads), (b, t, 1)],
        "past_state": [(b, heads, dk, dv)],
    }
    for name, shapes in wanted.items():
        x = arrays[name]
        if x is not None and tuple(x.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            reasons.add(ValueError, f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    reasons.check()
    return dk, dv


def without_normaliser(S: Array) -> LinearState:
    """A state of the operator, which divides by nothing, as `linear_attention` takes it."""
    z = compat.array_namespace(S).zeros(S.shape[:-1], dtype=S.dtype, device=device_of(S))
    return LinearState(S, z)


def pack(out: Array, S: Array, query: Array, past_state: Array | None) -> tuple[Array, Array]:
    """``(B, H, T, D)`` as ``(B, T, H * D)``, and the state in the dtype that belongs to it."""
    xp = compat.array_namespace(out)
    b, h, t, d = out.shape
    packed = xp.reshape(xp.permute_dims(out, (0, 2, 1, 3)), (b, t, h * d))
    like = query if past_state is None else past_state
    return packed, xp.astype(S, like.dtype, copy=False)
