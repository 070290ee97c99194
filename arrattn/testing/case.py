"""One call of attention, as NumPy arrays and options, and what it means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from arrattn import feature_maps
from arrattn._state import DeltaState, LinearState
from arrattn.testing import sights

__all__ = ["Case", "NamedMap", "squares"]

Host = np.ndarray[Any, Any]

#: The options that say who sees whom, and those that say how pairs are scored.
SIGHT = ("mask", "is_causal", "window", "kv_lengths", "segment_ids", "pattern", "q_offset")
SCORING = ("scale", "softcap", "bias", "sinks")


def squares(x: Any) -> Any:
    """
    Map `x` to all products of two of its components: the kernel is ``(x . y) ** 2``.

    Parameters
    ----------
    x : array, shape (..., N, D)
        Queries or keys.

    Returns
    -------
    array, shape (..., N, D * D)
        Their features.

    Examples
    --------
    >>> squares(np.asarray([[2.0, 3.0]]))
    array([[4., 6., 6., 9.]])
    """
    *lead, n, d = x.shape
    pairs = x[..., :, None] * x[..., None, :]
    return array_namespace(x).reshape(pairs, (*lead, n, d * d))


@dataclass(frozen=True)
class NamedMap:
    """
    A feature map for linear attention, and how it is written.

    Parameters
    ----------
    name : str
        ``elu_plus_one``, ``relu``, ``softmax``, ``gaussian`` or ``squares``.
    num_features : int, default: 8
        Of the random maps.
    rng : int, default: 3
        Their seed.
    """

    name: str
    num_features: int = 8
    rng: int = 3

    @property
    def random(self) -> bool:
        """Whether its features are drawn."""
        return self.name in {"softmax", "gaussian"}

    def build(self, dim: int) -> Any:
        """
        Make the map.

        Parameters
        ----------
        dim : int
            The width of queries and keys.

        Returns
        -------
        FeatureMap or callable
            What `linear_attention` takes.
        """
        if self.name == "squares":
            return squares
        if not self.random:
            return getattr(feature_maps, self.name)
        drawn: dict[str, Any] = {"dim": dim, "num_features": self.num_features, "rng": self.rng}
        if self.name == "softmax":
            return feature_maps.softmax(scale=1.0, **drawn)
        return feature_maps.gaussian(3.0, **drawn)

    def spell(self, dim: int) -> str:
        """
        Write the map as Python.

        Parameters
        ----------
        dim : int
            The width of queries and keys.

        Returns
        -------
        str
            An expression, with `arrattn` and `squares` in scope.
        """
        if self.name == "squares":
            return "squares"
        if not self.random:
            return f"arrattn.feature_maps.{self.name}"
        drawn = f"dim={dim}, num_features={self.num_features}, rng={self.rng}"
        first = "scale=1.0" if self.name == "softmax" else "3.0"
        return f"arrattn.feature_maps.{self.name}({first}, {drawn})"


@dataclass(frozen=True)
class Case:
    """
    One call: float64 NumPy arrays and options.

    Parameters
    ----------
    q, k, v : array
        In the shapes of `arrattn.attention`, whatever the layout of the function.
    options : dict
        Keyword arguments: arrays in NumPy, patterns as `Sight`, maps as `NamedMap`.
    how : str
        Where the values come from.
    dtype : str, default: "float64"
        The dtype that the call is made in; the values are exact in it.
    top_left : bool, default: False
        Whether the first query stands at the first key unless `q_offset` says otherwise.
    made : dict of str to array
        Expressions that make long arrays of the call, for who writes it down.
    """

    q: Host
    k: Host
    v: Host
    options: dict[str, Any] = field(default_factory=dict)
    how: str = ""
    dtype: str = "float64"
    top_left: bool = False
    made: dict[str, Host] = field(default_factory=dict)

    def __repr__(self) -> str:
        options = "".join(f", {name}={brief(x)}" for name, x in self.options.items())
        shapes = ", ".join(f"{n}{list(getattr(self, n).shape)}" for n in "qkv")
        return f"Case({shapes}, {self.how}{options})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # what Hypothesis prints

    @property
    def arrays(self) -> tuple[Host, Host, Host]:
        """`q`, `k` and `v`."""
        return self.q, self.k, self.v

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch axes of the result."""
        return np.broadcast_shapes(*(x.shape[:-3] for x in self.arrays))

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key heads."""
        return (1, 1) if self.q.ndim == 2 else (self.q.shape[-3], self.k.shape[-3])

    @property
    def lengths(self) -> tuple[int, int]:
        """Number of queries and of keys."""
        return self.q.shape[-2], self.k.shape[-2]

    @property
    def scores(self) -> dict[str, Any]:
        """The options that the size of the rounding error depends on."""
        return {n: self.options[n] for n in ("scale", "bias", "sinks") if n in self.options}

    def but(self, **changes: Any) -> Case:
        """
        The same call with other arrays or options.

        Parameters
        ----------
        **changes : object
            `q`, `k`, `v`, or keyword arguments.

        Returns
        -------
        Case
            A copy.
        """
        arrays = {n: changes.pop(n) for n in ("q", "k", "v") if n in changes}
        return replace(self, options=self.options | changes, **arrays)

    def minus(self, *names: str) -> Case:
        """
        The same call without these of its options.

        Parameters
        ----------
        *names : str
            Keyword arguments to leave out.

        Returns
        -------
        Case
            A copy.
        """
        options = {n: x for n, x in self.options.items() if n not in names}
        return replace(self, options=options)

    def per_key(self, change: Callable[[Host], Host]) -> Case:
        """
        The same call with something done to all that comes key by key.

        Parameters
        ----------
        change : callable
            What is done to `k`, `v`, `beta` and `log_decay`, each as (..., Hkv, Nk, width).

        Returns
        -------
        Case
            A copy.
        """
        gates: dict[str, Any] = {}
        if "beta" in self.options:
            gates["beta"] = change(self.options["beta"][..., None])[..., 0]
        if "log_decay" in self.options:
            gates["log_decay"] = change(self.options["log_decay"])
        return self.but(k=change(self.k), v=change(self.v), **gates)

    @property
    def causal(self) -> Case:
        """The same call, causal; the delta rule always is, and is not told so."""
        return self if "beta" in self.options else self.but(is_causal=True)

    @property
    def meant(self) -> dict[str, Any]:
        """The options for the defining equation in NumPy."""
        d = self.q.shape[-1]
        options = built(self.options, d)
        if self.top_left and not {"feature_map", "beta"} & set(options):
            options.setdefault("q_offset", 0)
        return options

    def visible(self) -> Host:
        """
        Say who sees whom, pair by pair, by the letter of the contract.

        Returns
        -------
        array of bool, shape (*batch, Hq, Nq, Nk)
            True where visible, before any selection by score.
        """
        batch, (nq, nk), o = self.batch, self.lengths, self.options
        lengths = np.broadcast_to(o.get("kv_lengths", nk), batch)
        default = 0 if self.top_left else lengths - nq
        offset = np.broadcast_to(o.get("q_offset", default), batch)
        given = [sights.prefix(np.asarray(lengths)) if batch else sights.prefix(int(lengths))]
        if o.get("is_causal") or "beta" in o:
            given.append(sights.causal())
        if o.get("window") is not None:
            given.append(sights.window(*o["window"]))
        if o.get("segment_ids") is not None:
            ids = o["segment_ids"]
            given.append(sights.segments(*(ids if isinstance(ids, tuple) else (ids, ids))))
        if o.get("pattern") is not None:
            given.append(o["pattern"])
        seen = np.ones((*batch, self.heads[0], nq, nk), bool)
        for sight in given:
            seen = seen & sight.table(nq, nk, batch, np.asarray(offset))
        if o.get("mask") is not None:
            seen = seen & o["mask"]
        if o.get("key_mask") is not None:
            seen = seen & o["key_mask"][..., None, None, :]
        return seen & (o["bias"] != -np.inf) if o.get("bias") is not None else seen

    def full_rows(self) -> Host:
        """
        Say which queries see a key.

        Returns
        -------
        array of bool, shape (*batch, Hq, Nq), without heads where q has none
            True where one is seen.
        """
        rows: Host = np.asarray(np.any(self.visible(), axis=-1))
        return rows[0, ...] if self.q.ndim == 2 else rows


def built(options: Mapping[str, Any], dim: int) -> dict[str, Any]:
    """Options with patterns and maps built, for NumPy."""

    def build(x: Any) -> Any:
        if isinstance(x, sights.Sight):
            return x.build(lambda array: array)
        return x.build(dim) if isinstance(x, NamedMap) else x

    return {name: build(x) for name, x in options.items()}


def brief(x: Any) -> str:
    """Small arrays in full, large ones by shape."""
    if isinstance(x, LinearState | DeltaState):
        return f"{type(x).__name__}({', '.join(map(brief, x))})"
    if isinstance(x, tuple):
        return "(" + ", ".join(map(brief, x)) + ")"
    if not isinstance(x, np.ndarray):
        return repr(x)
    if x.size <= 24 and x.dtype.kind != "f":
        return f"np.array({x.astype(int).tolist()})"
    return f"<{x.dtype}{list(x.shape)}>"
