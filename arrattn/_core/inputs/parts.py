"""What `merge` is given."""

from __future__ import annotations

from typing import Any

import array_api_compat as compat

from arrattn._core import loops
from arrattn._core.inputs.arguments import (
    FLOATS,
    Reasons,
    describe,
    dtype_name,
    is_array,
    library_name,
)
from arrattn._core.typing import Namespace


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
