"""
The fused attention of the libraries themselves, where it means what ours means.

One adapter for each library: it says in words what its kernel cannot do of a call, and
computes the rest. All that can be told without running the kernel is told before, so that a
call which is declined costs no attention, and the tiles do it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import array_api_compat as compat

from arrattn._core.inputs import SoftmaxInputs, dtype_name, library_name
from arrattn._core.sight import Sight, read_sight
from arrattn._core.typing import Array


class Fused(NamedTuple):
    """
    What a library's own kernel can do of a call.

    `reasons` say what it cannot, `slower` why the tiles are quicker all the same; `run` gives
    the output ``(..., Hkv, G, Nq, Dv)``, and is None where the kernel is not to be taken.
    """

    kernel: str | None
    reasons: tuple[str, ...] = ()
    slower: tuple[str, ...] = ()
    run: Callable[[], Array] | None = None


def choose(call: SoftmaxInputs) -> Fused:
    """The fused kernel for this call, if it is to be taken; raises if it has to and cannot."""
    if call.engine == "tiles":
        return Fused(None)
    fused = consider(call)
    if call.engine == "native" and fused.reasons:
        msg = (
            f"attention: engine='native' cannot do this call: {'; '.join(fused.reasons)}\n"
            "hint: engine='auto' takes the tiles where the library's own kernel does not fit"
        )
        raise ValueError(msg)
    return fused._replace(run=None) if call.engine == "auto" and fused.slower else fused


def consider(call: SoftmaxInputs) -> Fused:
    """What the call's library offers for it."""
    if compat.is_torch_namespace(call.xp):
        return _torch(call)
    if compat.is_jax_namespace(call.xp):
        # On a GPU its cuDNN implementation could serve; nothing is claimed that was not run.
        return Fused(
            "jax.nn.dot_product_attention",
            ("it forms all Nq x Nk scores on a CPU, and has not been verified elsewhere",),
        )
    return Fused(None, (f"{library_name(call.xp)} has no fused attention",))


# -- torch ------------------------------------------------------------------------------------
#
# `scaled_dot_product_attention` picks one of several kernels. Only its CPU flash kernel is
# used: "math" forms all scores, and those for GPUs have not been run.

#: `torch.nn.attention.SDPBackend.FLASH_ATTENTION`.
FLASH = 1


def _torch(call: SoftmaxInputs) -> Fused:
    kernel = "torch.nn.functional.scaled_dot_product_attention"
    if 0 in (*call.batch, *call.heads, *call.lengths):
        return Fused(kernel)
    sight = read_sight(call)
    reasons = [*_unsupported(call), *_unsupported_sight(call, sight)]
    # Values are looked at last: it is the one thing here that takes a pass over the arrays.
    reasons = reasons or _unfit_values(call, sight)
    if reasons:
        return Fused(kernel, tuple(reasons))
    arrays, options = _lay_out(call, sight)
    if not _takes_flash(arrays, options):
        return Fused(kernel, ("torch would take a kernel that forms all Nq x Nk scores",))
    slower = _slower(arrays[0])
    return Fused(kernel, (), slower, partial(_run_torch, call, arrays, options))


def at_once(q: Array, k: Array, v: Array, is_causal: bool) -> Array | None:
    """
    Attention of torch tensors with no other options, checked and computed in one go.

    None where the tensors are not plainly right, for the door to say what they are. What a
    short call costs is its checks; this makes those of `_torch` that are left to make.
    """
    if not compat.is_torch_array(q):
        return None
    import torch

    if not (type(q) is type(k) is type(v) is torch.Tensor and q.dtype == k.dtype == v.dtype):
        return None
    if torch.is_autocast_enabled("cpu"):  # gives another dtype, which the door undoes
        return None
    if q.dtype not in (torch.float32, torch.float64) or q.ndim != 4 or k.shape != v.shape:
        return None
    (*lead, nq, d), (*key_lead, nk, key_d) = q.shape, k.shape
    if lead != key_lead or d != key_d or (is_causal and nq != nk) or 0 in (*lead, nq, nk, d):
        return None
    arrays = [q, k, v]
    if any(x.device.type != "cpu" or x.stride(-1) != 1 for x in arrays) or any(_transforms(arrays)):
        return None
    options = {"is_causal": is_causal and nq > 1, "scale": d**-0.5}
    try:
        fit = not any(_unfit_sizes(q, k, v, d**-0.5, q.dtype))
    except RuntimeError:  # of tensors without values
        return None
    if not fit or not _takes_flash((q, k, v), options):
        return None
    out: Array = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    return out


def _unsupported(call: SoftmaxInputs) -> Iterator[str]:
    d, dv = call.q.shape[-1], call.v.shape[-1]
    if call.q.device.type != "cpu":
        yield f"it has not been verified on {call.q.device.type} devices"
    if call.return_lse:
        yield "it gives no log-sum-exp"
    if call.sinks is not None:
        yield "it knows no sinks"
    if call.softcap is not None:
        yield "it knows no softcap"
    if d != dv or d == 0:
        yield f"it takes keys and values of one width, not {d} and {dv}"
    yield from _transforms([x for x in (call.q, call.k, call.v, call.bias) if x is not None])


def _transforms(arrays: list[Array]) -> Iterator[str]:
    """Its first derivative in reverse is all that it has, and transforms may ask for any other."""
    import torch

    if any(map(torch._C._functorch.is_functorch_wrapped_tensor, arrays)):
        yield "it does not go through the transforms of torch.func"
    elif any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in arrays):
        yield "it has no forward-mode derivative"


def _unsupported_sight(call: SoftmaxInputs, sight: Sight) -> Iterator[str]:
    import torch

    yield from sight.problems
    if sight.is_causal and call.scale <= 0:
        # It hides a score by -inf before it multiplies by the scale.
        yield f"in causal order it takes a positive scale, not {call.scale}"
    lead = (1,) if sight.mask is None else sight.mask.shape[:-4]
    if math.prod(lead) not in (1, math.prod(call.batch)):
        yield "it would copy the mask for each item of a batch axis"
    bias = call.bias
    if bias is not None and bias.dtype != call.q.dtype:
        yield f"it would round a bias of {dtype_name(bias.dtype)} to {dtype_name(call.q.dtype)}"
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        yield "it has no gradient of a bias"


def _unfit_values(call: SoftmaxInputs, sight: Sight) -> list[str]:
    """
    Whether any value is one that the kernel treats in its own way.

    It adds ``-inf`` to hidden scores and multiplies hidden values by 0, which hides nothing
    where they are infinite or NaN, and a row with nothing but NaN for scores may come out 0.
    (On a GPU these questions would wait for the device.)
    """
    try:
        k, v = (x[..., : sight.nk, :] for x in (call.k, call.v))
        found = list(_unfit_sizes(call.q, k, v, call.scale, call.acc))
        # Its sum is NaN, too, where -inf meets inf.
        if call.bias is not None and math.isnan(call.bias.detach().sum(dtype=call.acc).item()):
            found.append("bias holds NaN")
    except RuntimeError:  # of tensors without values, as tracing makes them
        return ["the values of q, k and v cannot be looked at here"]
    return found


def _unfit_sizes(q: Array, k: Array, v: Array, scale: float, acc: Any) -> Iterator[str]:
    import torch

    most, width = torch.finfo(acc).max, q.shape[-1]
    length_q, length_k, length_v = map(_length, (q, k, v))
    if length_q * length_k * max(1.0, abs(scale)) <= most and math.isfinite(length_v):
        return
    largest_q, largest_k, largest_v = map(_size, (q, k, v))
    if not math.isfinite(largest_q + largest_k + largest_v):
        yield "q, k or v holds a value that is not finite"
    elif largest_q * largest_k * width * max(1.0, abs(scale)) > most:
        yield "a score may overflow"


def _length(x: Array) -> float:
    """
    The root of the sum of all squares, which is quick; infinite or NaN where that says nothing.
    """
    import torch

    if x.dtype not in (torch.float32, torch.float64) or not x.is_contiguous():
        return math.inf
    flat = x.detach().view(-1)
    return math.sqrt(float(torch.dot(flat, flat)))


def _size(x: Array) -> float:
    """The largest magnitude; NaN where there is one."""
    low, high = x.detach().aminmax()
    return max(-float(low), float(high))


def _lay_out(
    call: SoftmaxInputs, sight: Sight
) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """
    The operands as ``(B, H, N, D)``.

    Query heads that share a key head, and what hides keys from it, are rows of one product.
    """
    (hkv, g), (nq, _), n = call.heads, call.lengths, math.prod(call.batch)
    mask = sight.mask
    alike = not sight.is_causal and (mask is None or mask.shape[-3:-1] == (1, 1))
    heads, rows = (hkv, g * nq) if g == 1 or alike else (hkv * g, nq)

    def flat(x: Array, *shape: int) -> Array:
        own = x.ndim - (4 if x is call.q or x is mask else 3)
        x = x.expand(*call.batch, *x.shape[own:]).reshape(n, *shape, x.shape[-1])
        return x if x.stride(-1) == 1 else x.contiguous()

    q = flat(call.q, heads, rows)
    k, v = (flat(x[..., : sight.nk, :], hkv, sight.nk) for x in (call.k, call.v))
    if mask is not None:
        shape = (1 if mask.shape[-4:-2] == (1, 1) else heads, *mask.shape[-2:])
        same = math.prod(mask.shape[:-4]) == 1
        mask = mask.reshape(1, *shape) if same else flat(mask, *shape[:2])
    options = {
        "attn_mask": mask,
        "is_causal": sight.is_causal,
        "scale": call.scale,
        "enable_gqa": heads != hkv,
    }
    return (q, k, v), options


def _takes_flash(arrays: tuple[Array, ...], options: dict[str, Any]) -> bool:
    """Whether torch would take its flash kernel, by the function that it asks itself."""
    import torch

    return bool(torch._fused_sdp_choice(*arrays, **options) == FLASH)


def _slower(q: Array) -> tuple[str, ...]:
    """Where its products of half precision were measured slower than the tiles' in single."""
    dtype = dtype_name(q.dtype)
    if dtype == "float16":
        return ("the tiles are quicker in float16 on a CPU",)
    if dtype == "bfloat16" and q.shape[-2] == 1:
        return ("the tiles are quicker for one query in bfloat16 on a CPU",)
    return ()


def _run_torch(call: SoftmaxInputs, arrays: tuple[Array, ...], options: dict[str, Any]) -> Array:
    from torch.nn.functional import scaled_dot_product_attention

    (hkv, g), (nq, _) = call.heads, call.lengths
    out = scaled_dot_product_attention(*arrays, **options)
    return out.reshape(*call.batch, hkv, g, nq, call.v.shape[-1])
