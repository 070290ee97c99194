"""The arguments of linear attention and of the delta rule: gates and states."""

from __future__ import annotations

from typing import Any

import array_api_compat as compat

from arrattn._core import loops
from arrattn._core.inputs.arguments import (
    FLOATS,
    Reasons,
    accumulation_dtype,
    broadcasts,
    describe,
    dtype_name,
    is_array,
    read_flag,
    read_lengths,
    read_namespace,
    read_number,
    read_qkv,
    read_segments,
    segment_arrays,
)
from arrattn._core.inputs.calls import LinearInputs
from arrattn._core.typing import Array, Device, DType, Namespace
from arrattn._state import DeltaState, LinearState
from arrattn.feature_maps._read import read_map


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
    named |= {"kv_lengths": kv_lengths} | segment_arrays(segment_ids)
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
    named |= {"key_mask": key_mask, "kv_lengths": kv_lengths} | segment_arrays(segment_ids)
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
        S = lead_with_ones(initial_state[0], len(batch) + 3)
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


def _with_gates(x: LinearInputs) -> LinearInputs:
    """Lay out state and gates, which have the heads of `v`, as `v` is."""

    def split(a: Array | None, trailing: int) -> Any:
        return None if a is None else x.split_heads(a, trailing)

    state = x.state and LinearState(split(x.state.S, 2), split(x.state.z, 1))
    return x._replace(log_decay=split(x.log_decay, 2), beta=split(x.beta, 1), state=state)


def lead_with_ones(x: Array, ndim: int) -> Array:
    """Give an array that broadcasts all its axes, and a head axis where there is none."""
    xp = compat.array_namespace(x)
    return xp.reshape(x, (1,) * (ndim - x.ndim) + tuple(x.shape))


# -- Gates ------------------------------------------------------------------------------------


def _read_floats(name: str, x: object, reasons: Reasons) -> bool:
    """Whether `x` is an array of real floats."""
    if is_array(x) and dtype_name(x.dtype) in FLOATS:  # type: ignore[attr-defined]
        return True
    reasons.add(TypeError, f"{name}: expected an array of real floats, got {describe(x)}")
    return False


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
    by_channel = len(own) > 2 and own[-1] in (1, width) and broadcasts(own, full)
    by_token = len(own) > 1 and own[-1] == n and broadcasts(own, (*batch, heads, n))
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


def with_decay(
    x: LinearInputs, log_decay: Array, width: int, function: str, *, growing: bool
) -> LinearInputs:
    """Add `log_decay`, now that the number of features is known."""
    reasons = Reasons(function)
    full = (*x.outer, x.value_heads, x.k.shape[-2], width)
    decay = read_decay(log_decay, full, reasons, no_head=x.no_head, growing=growing)
    reasons.check()
    return x._replace(log_decay=None if decay is None else x.split_heads(decay, 2))


def read_beta(x: Array, full: tuple[int, ...], reasons: Reasons, *, no_head: bool) -> Array | None:
    """`beta` as ``(..., Hv | 1, Nk)``; `full` is the full shape."""
    own = (1, *x.shape) if no_head else tuple(x.shape)
    if len(own) < 2 or not broadcasts(own, full):
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


# -- What is there ----------------------------------------------------------------------------


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
    if len(shape) == 0 or shape[-1] != nk or not broadcasts(shape[:-1], tuple(batch)):
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


# -- States -----------------------------------------------------------------------------------


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
    if not broadcasts(x.shape, shape):
        reasons.add(
            ValueError,
            f"initial_state.{name}: expected shape {shape}, got {tuple(x.shape)}",
        )
