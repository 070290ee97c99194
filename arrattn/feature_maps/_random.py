"""Random features: how projections are drawn, and what is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace
from arrattn._core.workspace import small_products, work_space
from arrattn.feature_maps._base import FeatureMap, Features, read_rng, require_int

LOG2E = math.log2(math.e)

#: The exact kernel of all pairs: ``exact(x, y, xp)``.
Exact = Callable[[Array, Array, Namespace], Array]


class Drawn(NamedTuple):
    """What a random map is asked for: its arguments as they came."""

    dim: int
    num_features: int
    rng: int | np.random.Generator
    orthogonal: bool = True


class Random(FeatureMap):
    """
    A map whose weights are drawn once, on the host.

    Parameters
    ----------
    call : str
        How the map was asked for, up to what `drawn` says.
    drawn : Drawn
        What was asked for.
    paper : str
        Where the features were published.
    """

    #: Features that come from one projection.
    per_projection = 1

    def __init__(self, call: str, drawn: Drawn, paper: str) -> None:
        generator = read_rng(drawn.rng)
        for name in ("dim", "num_features"):
            require_int(name, getattr(drawn, name))
        if not isinstance(drawn.orthogonal, bool):
            msg = (
                f"orthogonal: expected True or False, got {drawn.orthogonal!r} "
                f"({type(drawn.orthogonal).__name__})"
            )
            raise TypeError(msg)
        if drawn.num_features % self.per_projection:
            msg = (
                "num_features: expected an even number (two features of each projection), "
                f"got {drawn.num_features}"
            )
            raise ValueError(msg)
        self.name, self.paper = call.partition("(")[0], paper
        seed = f", rng={drawn.rng}" if isinstance(drawn.rng, Integral) else ""
        self.dim, self.num_features = int(drawn.dim), int(drawn.num_features)
        self._call = f"{call}dim={self.dim}, num_features={self.num_features}{seed})"
        self._drawn = self.draw(generator, drawn)
        self._drawn.flags.writeable = False

    def draw(self, rng: np.random.Generator, drawn: Drawn) -> np.ndarray[Any, Any]:
        """Draw the projections, (m, D)."""
        count = self.num_features // self.per_projection
        if drawn.orthogonal:
            return orthogonal_normal(rng, count, self.dim)
        return rng.standard_normal((count, self.dim))

    def output_dim(self, dim: int) -> int:
        del dim
        return self.num_features

    def weights(self, like: Array, xp: Namespace) -> Array:
        # Rounded on the host, so that every library starts from the same bits.
        host = np.float64 if like.dtype == xp.float64 else np.float32
        return xp.asarray(np.moveaxis(self._drawn.astype(host), -1, -2), device=device_of(like))

    def problems(self, dim: int) -> list[str]:
        if dim == self.dim:
            return []
        return [f"feature_map: expected dim={dim}, the width D of q and k, got {self!r}"]

    def __repr__(self) -> str:
        return self._call


class _Projected(Random):
    r"""
    Functions of :math:`w_r \cdot x`, times :math:`e^{-c |x|^2}`, `x` having been scaled.

    Parameters
    ----------
    call, drawn, paper
        As for `Random`.
    factor, sign : float
        What tokens are multiplied by, and queries once more.
    c : float
        How much of the squared length goes into the exponent.
    exact : callable
        The kernel.
    """

    def __init__(
        self,
        call: str,
        drawn: Drawn,
        paper: str,
        *,
        factor: float,
        c: float,
        exact: Exact,
        sign: float = 1.0,
    ) -> None:
        super().__init__(call, drawn, paper)
        self._factor, self._c, self._sign, self._exact = factor, c, sign, exact

    def phi_q(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        return self.phi(x * self._sign, xp, weights)

    def kernel(self, x: Array, y: Array) -> Array:
        return self._exact(x, y, compat.array_namespace(x, y))

    def _project(self, x: Array, xp: Namespace, weights: Array | None) -> Array:
        return x @ (self.weights(x, xp) if weights is None else weights)


class Positive(_Projected):
    r"""
    :math:`\phi_r(x) = e^{w_r \cdot x - c |x|^2} / \sqrt{m}`.

    The mean of the products is :math:`e^{|x + y|^2 / 2 - c (|x|^2 + |y|^2)}`: the softmax
    kernel for ``c = 1/2`` and the Gaussian for ``c = 1``.
    The largest exponent of a token is carried as its logarithm.
    """

    non_negative = True

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        x = x * self._factor
        u = self._exponents(self._project(x, xp, weights), xp)
        top = xp.max(u, axis=-1, keepdims=True)
        phi = xp.exp(u - top) * self.num_features**-0.5
        return Features(phi, top[..., 0] - self._c * xp.sum(x * x, axis=-1))

    def _exponents(self, u: Array, xp: Namespace) -> Array:
        del xp
        return u

    # In units of log 2, which NumPy is faster at; factors of a query cancel.
    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        self._write_exponents(x, out, weights, self._sign)
        np.exp2(out, out=out)

    def write_k(self, x: Array, out: Array, weights: Array | None = None) -> None:
        self._write_exponents(x, out, weights, 1.0)
        less = np.vecdot(x, x)[:, None] * (self._c * self._factor**2 * LOG2E)
        np.subtract(out, less + 0.5 * math.log2(self.num_features), out=out)
        np.exp2(out, out=out)

    def _write_exponents(self, x: Array, out: Array, weights: Array | None, sign: float) -> None:
        w = self.weights(x, np) if weights is None else weights
        factor = w.dtype.type(sign * self._factor * LOG2E)
        w = np.multiply(w, factor, out=work_space("projection", w.shape, w.dtype))
        small_products(x, w, out=out)


class Hyperbolic(Positive):
    """Of each projection the features of `Positive`, and those of its negative."""

    per_projection = 2

    def _exponents(self, u: Array, xp: Namespace) -> Array:
        return xp.concat([u, -u], axis=-1)

    def _write_exponents(self, x: Array, out: Array, weights: Array | None, sign: float) -> None:
        half = self.num_features // 2
        super()._write_exponents(x, out[:, :half], weights, sign)
        np.negative(out[:, :half], out=out[:, half:])


class Trigonometric(_Projected):
    r""":math:`\phi(x) = (\cos w_r \cdot x, \sin w_r \cdot x)_r\, e^{-c |x|^2} / \sqrt{m}`."""

    per_projection = 2

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        x = x * self._factor
        u = self._project(x, xp, weights)
        phi = xp.concat([xp.cos(u), xp.sin(u)], axis=-1) * (self.num_features // 2) ** -0.5
        return Features(phi, -self._c * xp.sum(x * x, axis=-1) if self._c else None)


#: By the word for them: the features, and where they were published.
KINDS: dict[str, tuple[type[_Projected], str]] = {
    "positive": (
        Positive,
        "Choromanski et al., Rethinking attention with performers, 2020, arXiv:2009.14794",
    ),
    "hyperbolic": (
        Hyperbolic,
        "Choromanski et al., Rethinking attention with performers, 2020, arXiv:2009.14794",
    ),
    "trigonometric": (
        Trigonometric,
        "Rahimi & Recht, Random features for large-scale kernel machines, 2007",
    ),
}


def read_features(features: object, kinds: tuple[str, ...]) -> str:
    """
    Check which features are asked for.

    Parameters
    ----------
    features : str
        What was passed.
    kinds : tuple of str
        What there is.

    Returns
    -------
    str
        One of `kinds`.
    """
    if features not in kinds:
        *first, last = map(repr, kinds)
        msg = f"features: expected {', '.join(first)} or {last}, got {features!r}"
        raise ValueError(msg)
    return str(features)


def orthogonal_normal(rng: np.random.Generator, count: int, dim: int) -> np.ndarray[Any, Any]:
    """
    Draw `count` standard normal vectors, orthogonal within each run of `dim`.

    Each by itself is standard normal, so means are unbiased; orthogonality only takes
    variance away.
    """
    blocks = []
    for _ in range(-(-count // dim)):
        directions, r = np.linalg.qr(rng.standard_normal((dim, dim)))
        directions = directions * np.where(np.diagonal(r) < 0, -1.0, 1.0)
        lengths = np.sqrt(np.sum(rng.standard_normal((dim, dim)) ** 2, axis=1))
        blocks.append(lengths[:, None] * directions.T)
    return np.concatenate(blocks)[:count]


def sum_of_differences(x: Array, y: Array, of: Callable[[Array], Array]) -> Array:
    """Sum ``of(x_d - y_d)`` over `d` for every pair: differences first, so nothing cancels."""
    total = of(x[..., :, None, 0] - y[..., None, :, 0])
    for d in range(1, x.shape[-1]):
        total = total + of(x[..., :, None, d] - y[..., None, :, d])
    return total
