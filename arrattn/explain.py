"""Which path a call takes, and why: the door and the plan, without the attention."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import array_api_compat as compat

from arrattn import delta, linear
from arrattn._core import gated, inputs, loops, recurrence, ways
from arrattn._core.inputs import LinearInputs, SoftmaxInputs, dtype_name
from arrattn._core.plan import Plan
from arrattn._core.ways import Way
from arrattn.delta import delta_attention
from arrattn.dense import attention
from arrattn.linear import linear_attention
from arrattn.local import local_attention
from arrattn.sparse import sparse_attention

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True, repr=False)
class Explanation:
    """
    The path of one call; it prints as a list of what was decided.

    Parameters
    ----------
    function : str
        The function that was asked about.
    library, device : str
        Where the arrays live.
    dtype, accumulation : str
        The dtype of the arrays, and that of scores, sums and states.
    engine : str
        "native" (the library's own kernel), "tiles", "selection" (sparse), "recurrence"
        (linear), or "none" where there is nothing to compute.
    steps : tuple of str
        How that engine goes about it.
    kernel : str or None
        The library's own kernel, taken or not.
    reasons : tuple of str
        Why it is not taken.
    pattern : str or None
        Who sees whom; None is everyone.
    plan : Plan or None
        Which tiles are visited, where tiles are planned ahead.
    products : int or None
        Multiplications in the products of arrays, where they are known ahead: of what is
        looked at, hidden pairs inside of it included.
    dense_products : int
        Those of a dense attention of the same shapes in which all is visible.
    """

    function: str
    library: str
    device: str
    dtype: str
    accumulation: str
    engine: str
    steps: tuple[str, ...] = ()
    kernel: str | None = None
    reasons: tuple[str, ...] = ()
    pattern: str | None = None
    plan: Plan | None = None
    products: int | None = None
    dense_products: int = 0

    def __repr__(self) -> str:
        sums = f"{self.dtype}, sums in {self.accumulation}"
        taken = f"{self.engine}, {self.kernel}" if self.engine == "native" else self.engine
        lines = [
            f"{self.function} on {self.library} ({self.device}), {sums}",
            f"engine: {taken}",
            *(f"  {step}" for step in self.steps),
        ]
        if self.reasons:
            lines.append(f"not {self.kernel or 'native'}:")
            lines += [f"  {reason}" for reason in self.reasons]
        lines.append(f"pattern: {self.pattern or 'everything is visible'}")
        if self.plan is not None:
            lines.append(f"plan: {self.plan!r}")
        if self.products is not None:
            share = self.products / max(self.dense_products, 1)
            lines.append(f"products: {self.products:.3g} multiplications, {share:.1%} of dense")
        return "\n".join(lines)


def explain(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """
    Say which path ``function(*args, **kwargs)`` takes, and why, without computing it.

    The arguments are checked, and refused, as the call itself does it. Only the few numbers
    that planning needs are looked at, and, where a library's own kernel is considered,
    whether the arrays hold what is not finite.

    Parameters
    ----------
    function : callable
        `attention`, `local_attention`, `sparse_attention`, `linear_attention` or
        `delta_attention`.
    *args, **kwargs : object
        The arguments of the call.

    Returns
    -------
    Explanation
        Print it, or ask its attributes.

    Raises
    ------
    TypeError
        If `function` is none of these, or where the call raises it.
    ValueError
        Where the call raises it.

    See Also
    --------
    attention : Takes the `engine` that is explained.

    Examples
    --------
    >>> import numpy as np
    >>> from arrattn import explain, local_attention
    >>> x = np.zeros((2, 4096, 64), np.float32)
    >>> why = explain(local_attention, x, x, x, window=(128, 0))
    >>> why.engine, why.pattern
    ('tiles', 'Window(128, 0)')
    >>> bool(why.products < 0.1 * why.dense_products)
    True
    """
    name = next((n for n, (known, _) in _DOORS.items() if known is function), None)
    if name is None:
        msg = f"function: expected one of {', '.join(_DOORS)}, got {inputs.describe(function)}"
        raise TypeError(msg)
    try:
        bound = inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        function(*args, **kwargs)  # raises the same, in Python's own words
        raise
    bound.apply_defaults()
    return _DOORS[name][1](*bound.args, **bound.kwargs)


# -- The softmax family -----------------------------------------------------------------------


def _explain_tiled(
    name: str, read: Callable[..., SoftmaxInputs], *args: Any, **kwargs: Any
) -> Explanation:
    call = read(*args, **kwargs)
    return _explanation(name, call, ways.softmax(call))


def _explain_selected(*args: Any, **kwargs: Any) -> Explanation:
    call, choice = inputs.read_sparse(*args, **kwargs)
    return _explanation("sparse_attention", call, ways.selection(call, choice))


def _explanation(name: str, call: SoftmaxInputs, way: Way) -> Explanation:
    pattern = None if call.pattern is None else str(call.pattern)
    nq, nk = call.lengths
    return _about(name, call, way, pattern, ways.pair_products(call, nq * nk))


def _about(
    name: str, call: SoftmaxInputs | LinearInputs, way: Way, pattern: str | None, dense: int
) -> Explanation:
    return Explanation(
        function=name,
        library=inputs.library_name(call.xp),
        device=str(compat.device(call.q)) if loops.is_concrete(call.q) else "traced or lazy",
        dtype=dtype_name(call.q.dtype),
        accumulation=dtype_name(call.acc),
        pattern=pattern,
        dense_products=dense,
        **way._asdict(),
    )


# -- Linear attention -------------------------------------------------------------------------

_FORMS = {
    "sorted": "queries and keys in one sequence, sorted by segment and position",
    "side by side": "queries and keys side by side, each chunk after the one before",
    "all at once": "every key into one state, then every query of it",
    "both ways": "decay on both sides: keys up to a query in order, those after it in reverse",
}


def _explain_linear(*args: Any, **kwargs: Any) -> Explanation:
    x, how, operands = linear.read_call(*args, **kwargs)
    return _explain_recurrence("linear_attention", x, how, operands)


def _explain_delta(*args: Any, **kwargs: Any) -> Explanation:
    x = inputs.read_delta("delta_attention", *args, **kwargs)
    how, operands = delta.lay_out_delta(x, padded=kwargs["key_mask"] is not None)
    return _explain_recurrence("delta_attention", x, how, operands)


def _explain_recurrence(
    function: str, x: LinearInputs, how: recurrence.How, operands: recurrence.Operands
) -> Explanation:
    hkv, g, nq, d = x.q.shape[-4:]
    nk, dv, lanes = x.k.shape[-2], x.v.shape[-1], math.prod(x.batch) * hkv
    features = recurrence.features_of(how.feature_map, x.k, x.acc, x.xp).phi.shape[-1]
    has_gates = operands.log_decay is not None or operands.beta is not None
    form = (gated if has_gates else recurrence).form(how, operands)
    steps: tuple[str, ...] = (
        _FORMS[form],
        f"chunks of {how.chunk} tokens, {features} features, state {features} x {dv} per key head",
    )
    gates = (("decay", operands.log_decay is not None), ("delta rule", operands.beta is not None))
    if has_gates:
        steps = (*steps, "gates: " + ", ".join(text for text, given in gates if given))
    seen = [text for text, given in _limits(how, operands) if given]
    products = None
    # Sorting decides how many tokens there are, and gates how much is done with each.
    if form != "sorted" and not has_gates:
        within = g * nq * min(how.chunk, nk) if form == "side by side" else 0
        products = lanes * ((nk + g * nq) * features * (dv + 1) + within * (features + dv + 1))
    way = Way("recurrence", steps, products=products)
    dense = lanes * g * nq * nk * (d + dv)
    return _about(function, x, way, " & ".join(seen) or None, dense)


def _limits(how: recurrence.How, x: recurrence.Operands) -> list[tuple[str, bool]]:
    padded = x.key_mask is not None or x.lengths is not None
    return [
        ("Causal()", how.is_causal),
        ("key mask or lengths", padded),
        ("segments", x.q_ids is not None),
    ]


_DOORS: dict[str, tuple[Callable[..., Any], Callable[..., Explanation]]] = {
    "attention": (
        attention,
        partial(_explain_tiled, "attention", partial(inputs.read_softmax, "attention")),
    ),
    "local_attention": (
        local_attention,
        partial(_explain_tiled, "local_attention", inputs.read_local),
    ),
    "sparse_attention": (sparse_attention, _explain_selected),
    "linear_attention": (linear_attention, _explain_linear),
    "delta_attention": (delta_attention, _explain_delta),
}
