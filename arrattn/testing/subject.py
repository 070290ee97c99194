"""The function under test: how it is called, and what it lacks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arrattn.testing.arrays import ArrayLibrary

__all__ = ["CAPABILITIES", "CHOICES", "FAMILIES", "Subject", "family_of", "read_lacks"]

FAMILIES = ("dense", "local", "sparse", "linear", "delta")

#: What a function may lack, beside keyword arguments.
CAPABILITIES = {
    "gqa": "more query heads than key heads",
    "cross": "numbers of queries and of keys that differ",
    "dv": "values of another width than the keys",
    "rank": "arrays with no batch axis, with several, or with no heads",
    "broadcast": "batch axes that broadcast",
    "empty": "axes of length 0",
    "short masks": "masks and biases that are not written out in full",
    "any scale": "a scale of 0 or less",
    "combine": "several arguments about visibility in one call",
    "gradients": "gradients",
}

#: Documented choices other than the contract's, which are reported as such.
CHOICES = {
    "alignment": "the first query stands at the first key (top left)",
    "empty rows": "a query that sees no key gives something else than 0",
    "hidden content": "what is hidden has weight 0, so that 0 times NaN is NaN",
    "scale sign": "a scale of 0 or less gives something else",
    "precision": "sums over float64 are taken in float32",
}


@dataclass(frozen=True)
class Subject:
    """
    A function, held to the laws of one family.

    Parameters
    ----------
    attend : callable
        ``attend(q, k, v, /, **options)``.
    library : ArrayLibrary
        Whose arrays it takes.
    family : str
        One of dense, local, sparse, linear and delta.
    layout : str, default: "bhnd"
        The order of its axes; "bnhd" has positions before heads.
    dtypes : tuple of str, default: ("float64", "float32")
        What it is called with.
    lacks : mapping of str to str
        What it cannot do, and why that is known.
    choices : mapping of str to str
        Its documented choices, and where they are documented.
    imported : str, default: ""
        How a counterexample imports it, a line that defines the name `attend`.
    translate : callable, optional
        ``translate(q, k, v, **options) -> (arrays, keywords)``, from our arguments, in NumPy
        and in its own layout, to those of `attend`.
    name : str, default: "attend"
        What a counterexample calls it.
    slow : bool, default: False
        Whether a call takes so long that fewer examples have to do.
    """

    attend: Callable[..., Any]
    library: ArrayLibrary
    family: str
    layout: str = "bhnd"
    dtypes: tuple[str, ...] = ("float64", "float32")
    lacks: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    imported: str = ""
    translate: Callable[..., Any] | None = None
    name: str = "attend"
    slow: bool = False

    def can(self, *names: str) -> bool:
        """
        Say whether it can do all of these.

        Parameters
        ----------
        *names : str
            Keyword arguments, or capabilities.

        Returns
        -------
        bool
            Whether none is lacking.
        """
        return not any(name in self.lacks for name in names)

    @property
    def takes_time(self) -> bool:
        """Whether fewer examples, of fewer shapes, have to do."""
        return self.slow or self.library.compiles

    @property
    def wide(self) -> tuple[str, ...]:
        """Its dtypes of at least 32 bits, or all, where it has none."""
        return tuple(x for x in self.dtypes if x in {"float64", "float32"}) or self.dtypes

    @property
    def half(self) -> tuple[str, ...]:
        """Its dtypes of 16 bits."""
        return tuple(x for x in self.dtypes if x in {"float16", "bfloat16"})

    def measured(self, dtype: str) -> str:
        """
        Name the dtype whose rounding its results are allowed.

        Parameters
        ----------
        dtype : str
            The dtype of a call.

        Returns
        -------
        str
            The same, or float32 where it chose to sum float64 in float32.
        """
        return "float32" if dtype == "float64" and "precision" in self.choices else dtype


def parameters(function: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names that a function takes by keyword, and whether it takes any."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return [], True
    by_name = {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    names = [p.name for p in found if p.kind in by_name]
    return names, any(p.kind is p.VAR_KEYWORD for p in found)


def family_of(function: Callable[..., Any]) -> str:
    """
    Guess a function's family from its keyword arguments.

    Parameters
    ----------
    function : callable
        The function under test.

    Returns
    -------
    str
        linear with `feature_map`, delta with `beta`, sparse with `top_k`, local where
        `window` has to be given, and dense otherwise.
    """
    names, _ = parameters(function)
    if "feature_map" in names:
        return "linear"
    if "beta" in names:
        return "delta"
    if "top_k" in names:
        return "sparse"
    if "window" in names:
        window = inspect.signature(function).parameters["window"]
        return "local" if window.default is inspect.Parameter.empty else "dense"
    return "dense"


def read_lacks(
    function: Callable[..., Any], lacks: Iterable[str] | Mapping[str, str], known: Iterable[str]
) -> dict[str, str]:
    """
    List what a function cannot do, with the reason.

    Parameters
    ----------
    function : callable
        The function under test; its signature tells which arguments it has.
    lacks : iterable of str, or mapping of str to str
        What it is declared to lack, with reasons where it is a mapping.
    known : iterable of str
        The keyword arguments that laws use.

    Returns
    -------
    dict of str to str
        What is lacking, and why.

    Raises
    ------
    ValueError
        If something declared is no capability.
    """
    known = list(known)
    declared = dict(lacks) if isinstance(lacks, Mapping) else dict.fromkeys(lacks, "")
    names, anything = parameters(function)
    found = {
        name: f"it has no argument `{name}`" for name in known if not anything and name not in names
    }
    for name, reason in declared.items():
        if name not in CAPABILITIES and name not in known:
            expected = ", ".join([*CAPABILITIES, *known])
            msg = f"lacks: expected some of {expected}; got {name!r}"
            raise ValueError(msg)
        found[name] = reason or f"declared to lack {CAPABILITIES.get(name, f'`{name}`')}"
    return found
