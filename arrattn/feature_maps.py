r"""
Feature maps for linear attention: what :math:`\phi` may be, and the kernel it stands for.

A map turns each query and key into `Dphi` features whose products are, or in the mean
over its random weights are, a kernel: :math:`\phi(x) \cdot \phi(y) = \kappa(x, y)`.
Every map here knows its exact kernel, so that what it costs in accuracy can be measured.

- `elu_plus_one` and `relu`: ready to use, elementwise.
- `gaussian`, `laplacian` and `softmax`: random features of a width you choose, drawn once
  from the `rng` you pass; the same seed gives the same weights on every array library.
- Any callable ``phi(x) -> features`` serves too, and None is the identity.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import array_api_compat as compat
import numpy as np

from arrattn._core import loops
from arrattn._core.loops import device_of
from arrattn._core.typing import Array, Namespace

__all__ = [
    "FeatureMap",
    "Features",
    "elu_plus_one",
    "gaussian",
    "laplacian",
    "relu",
    "softmax",
]


LOG2E = math.log2(math.e)


class Features(NamedTuple):
    """
    The features of some tokens, and a logarithm beside them that keeps them in range.

    Parameters
    ----------
    phi : array, shape (..., N, Dphi)
        Features, each token's up to its own factor.
    log : array, shape (..., N), or None
        Logarithms of those factors: the features are ``phi * exp(log[..., None])``.
        None where they are all 1.
    """

    phi: Array
    log: Array | None


class FeatureMap(ABC):
    """
    A function phi whose products ``phi(x) . phi(y)`` stand for a kernel.

    Subclasses give `name`, `non_negative`, `output_dim`, `phi` and `kernel`.
    A map that treats queries and keys differently overrides `phi_q` too.
    """

    #: What the map is called.
    name: str
    #: Whether no feature is ever negative, and so no weight of attention.
    non_negative: bool = False

    @abstractmethod
    def output_dim(self, dim: int) -> int:
        """Number of features `Dphi` of a token of width `dim`."""

    @abstractmethod
    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features of tokens `x` (..., N, D); `weights` are those of `self.weights`."""

    @abstractmethod
    def kernel(self, x: Array, y: Array) -> Array:
        """Evaluate the exact kernel, (..., n, D) and (..., m, D) -> (..., n, m)."""

    def phi_q(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features of queries."""
        return self.phi(x, xp, weights)

    def phi_k(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Features of keys."""
        return self.phi(x, xp, weights)

    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        """
        Write the features of NumPy queries `x` (N, D) on `out` (N, Dphi).

        As `phi_q` gives them, where it gives no logarithms; else each token's up to its own
        factor, which may overflow. It is for maps that can do it with less work.
        """
        out[...] = self.phi_q(x, np, weights).phi

    def write_k(self, x: Array, out: Array, weights: Array | None = None) -> None:
        """
        Write the features of NumPy keys `x` (N, D) on `out` (N, Dphi), logarithms multiplied in.

        What is not finite in `x` comes out as what is not finite.
        """
        f = self.phi_k(x, np, weights)
        out[...] = f.phi if f.log is None else f.phi * np.exp(f.log)[..., None]

    def weights(self, like: Array, xp: Namespace) -> Array | None:
        """Give what was drawn, in the library, dtype and device of `like`; None if nothing."""
        del like, xp
        return None

    def problems(self, dim: int) -> list[str]:
        """Tell what does not fit queries and keys of width `dim`."""
        del dim
        return []

    def __repr__(self) -> str:
        return self.name


class _Elementwise(FeatureMap):
    """A function of each number by itself; its kernel is the product of its features."""

    non_negative = True

    def __init__(self, name: str, function: Callable[[Array, Namespace], Array], doc: str) -> None:
        self.name, self._function, self.__doc__ = name, function, doc

    def output_dim(self, dim: int) -> int:
        return dim

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        del weights
        return Features(self._function(x, xp), None)

    def kernel(self, x: Array, y: Array) -> Array:
        xp = compat.array_namespace(x, y)
        return self._function(x, xp) @ xp.matrix_transpose(self._function(y, xp))


class _EluPlusOne(_Elementwise):
    """``exp(min(x, 0)) + max(x, 0)`` is the same, number by number, in fewer passes."""

    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        zeros = loops.zeros_like(x)
        np.exp(np.minimum(x, zeros, out=out), out=out)
        held = loops.work_space("elu", x.shape, x.dtype)
        np.add(out, np.maximum(x, zeros, out=held), out=out)

    def write_k(self, x: Array, out: Array, weights: Array | None = None) -> None:
        below = np.minimum(x, loops.zeros_like(x), out=out)
        # Unlike the maximum, the difference is a NaN where x is -inf.
        above = np.subtract(x, below, out=loops.work_space("elu", x.shape, x.dtype))
        np.add(np.exp(below, out=out), above, out=out)


# Written so that a NaN fails every comparison and comes out as it went in.
def _elu_plus_one(x: Array, xp: Namespace) -> Array:
    # The inner `where` keeps the branch not taken from overflowing in gradients.
    return xp.where(x < 0, xp.exp(xp.where(x < 0, x, 0.0)), x + 1.0)


def _relu(x: Array, xp: Namespace) -> Array:
    return xp.where(x < 0, 0.0, x)


elu_plus_one: FeatureMap = _EluPlusOne(
    "elu_plus_one",
    _elu_plus_one,
    r""":math:`\phi(x) = \mathrm{elu}(x) + 1`: positive, for every input
    (Katharopoulos et al., 2020, arXiv:2006.16236).""",
)

relu: FeatureMap = _Elementwise(
    "relu",
    _relu,
    r""":math:`\phi(x) = \max(x, 0)`: exact zeros, and rows of nothing else
    (Kasai et al., 2021, arXiv:2103.13076).""",
)


class _Identity(_Elementwise):
    non_negative = False


_identity = _Identity("identity", lambda x, xp: x, r":math:`\phi(x) = x`.")


class Custom(FeatureMap):
    """
    A function of the user's own, the same for queries and keys.

    Parameters
    ----------
    function : callable
        ``function(x (..., N, D)) -> (..., N, Dphi)``, in the arrays' own library.
    """

    def __init__(self, function: Callable[[Array], Array]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.function = function

    def output_dim(self, dim: int) -> int:
        """Ask the function, with a token of zeros."""
        return int(self.function(np.zeros((1, dim))).shape[-1])

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        """Call the function; see `FeatureMap.phi`."""
        del xp, weights
        features = self.function(x)
        if not hasattr(features, "shape"):
            msg = (
                f"feature_map: expected {self.name} to return an array, "
                f"got {features!r} ({type(features).__name__})"
            )
            raise TypeError(msg)
        if tuple(features.shape[:-1]) != tuple(x.shape[:-1]):
            msg = (
                f"feature_map: expected {self.name} to map (..., N, D) to (..., N, Dphi), "
                f"got {tuple(features.shape)} from {tuple(x.shape)}"
            )
            raise ValueError(msg)
        return Features(features, None)

    def kernel(self, x: Array, y: Array) -> Array:
        """Multiply the features; see `FeatureMap.kernel`."""
        return self.function(x) @ compat.array_namespace(x, y).matrix_transpose(self.function(y))


class _Random(FeatureMap):
    """Features by random projections ``x . w``; see the functions below."""

    def __init__(
        self, call: str, *, dim: int, num_features: int, rng: object, projections: int
    ) -> None:
        generator = _read_rng(rng)
        _require_positive_int("dim", dim)
        _require_positive_int("num_features", num_features)
        self.name = call.partition("(")[0]
        seed = f", rng={rng}" if isinstance(rng, Integral) else ""
        self._call = f"{call}dim={dim}, num_features={num_features}{seed})"
        self.dim, self.num_features = int(dim), int(num_features)
        self._drawn = self._draw(generator, projections, int(dim))
        self._drawn.flags.writeable = False

    def _draw(self, rng: np.random.Generator, count: int, dim: int) -> np.ndarray[Any, Any]:
        return _orthogonal_normal(rng, count, dim)

    def output_dim(self, dim: int) -> int:
        del dim
        return self.num_features

    def weights(self, like: Array, xp: Namespace) -> Array:
        # Rounded on the host, so that every library starts from the same bits.
        host = np.float64 if like.dtype == xp.float64 else np.float32
        return xp.asarray(self._drawn.astype(host).T, device=device_of(like))

    def _project(self, x: Array, xp: Namespace, weights: Array | None) -> Array:
        return x @ (self.weights(x, xp) if weights is None else weights)

    def problems(self, dim: int) -> list[str]:
        if dim == self.dim:
            return []
        return [f"feature_map: expected dim={dim}, the width D of q and k, got {self!r}"]

    def __repr__(self) -> str:
        return self._call


class _Positive(_Random):
    r"""
    :math:`\phi_r(x) = e^{w_r \cdot x - c |x|^2} / \sqrt{m}`, after scaling `x`.

    The mean of the products is :math:`e^{|x + y|^2 / 2 - c (|x|^2 + |y|^2)}`: the softmax
    kernel for ``c = 1/2`` and the Gaussian for ``c = 1``.
    The largest exponent of a token is carried as its logarithm.
    """

    non_negative = True

    def __init__(
        self, call: str, *, factor: float, c: float, sign: float, exact: Any, **drawn: Any
    ) -> None:
        super().__init__(call, projections=drawn["num_features"], **drawn)
        self._factor, self._c, self._sign, self._exact = factor, c, sign, exact

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        x = x * self._factor
        u = self._project(x, xp, weights)
        top = xp.max(u, axis=-1, keepdims=True)
        phi = xp.exp(u - top) * self.num_features**-0.5
        return Features(phi, top[..., 0] - self._c * xp.sum(x * x, axis=-1))

    def phi_q(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        return self.phi(x * self._sign, xp, weights)

    # In units of log 2, which NumPy is faster at; constant factors of queries cancel.
    def write_q(self, x: Array, out: Array, weights: Array | None = None) -> None:
        w = (self.weights(x, np) if weights is None else weights) * (
            self._sign * self._factor * LOG2E
        )
        np.exp2(np.matmul(x, w, out=out), out=out)

    def write_k(self, x: Array, out: Array, weights: Array | None = None) -> None:
        w = (self.weights(x, np) if weights is None else weights) * (self._factor * LOG2E)
        lower = np.vecdot(x, x) * (self._c * self._factor**2 * LOG2E)
        lower += 0.5 * math.log2(self.num_features)
        np.matmul(x, w, out=out)
        np.exp2(np.subtract(out, lower[:, None], out=out), out=out)

    def kernel(self, x: Array, y: Array) -> Array:
        out: Array = self._exact(x, y, compat.array_namespace(x, y))
        return out


class _Trigonometric(_Random):
    r""":math:`\phi(x) = (\cos w_r \cdot x, \sin w_r \cdot x)_r / \sqrt{m}`, after scaling `x`."""

    def __init__(self, call: str, *, factor: float, exact: Any, **drawn: Any) -> None:
        self._factor, self._exact = factor, exact
        width = drawn["num_features"]
        _require_positive_int("num_features", width)
        if width % 2:
            msg = (
                "num_features: expected an even number (a cosine and a sine for each "
                f"frequency), got {width}"
            )
            raise ValueError(msg)
        super().__init__(call, projections=width // 2, **drawn)

    def phi(self, x: Array, xp: Namespace, weights: Array | None = None) -> Features:
        u = self._project(x * self._factor, xp, weights)
        phi = xp.concat([xp.cos(u), xp.sin(u)], axis=-1) * (self.num_features // 2) ** -0.5
        return Features(phi, None)

    def kernel(self, x: Array, y: Array) -> Array:
        out: Array = self._exact(x, y, compat.array_namespace(x, y))
        return out


class _Cauchy(_Trigonometric):
    """Frequencies whose characteristic function is the Laplacian kernel."""

    def _draw(self, rng: np.random.Generator, count: int, dim: int) -> np.ndarray[Any, Any]:
        return rng.standard_cauchy((count, dim))


def gaussian(
    sigma: float,
    *,
    dim: int,
    num_features: int,
    rng: int | np.random.Generator,
    features: Literal["positive", "trigonometric"] = "positive",
) -> FeatureMap:
    r"""
    Random features of the Gaussian kernel.

    .. math:: \kappa(x, y) = \exp(-|x - y|^2 / 2 \sigma^2)

    Positive features [1]_ weigh every value with a positive weight, so that the output of
    attention stays among the values; their error grows with :math:`|x + y|^2 / \sigma^2`.
    Trigonometric features [2]_ have a bounded error, at any distance from the origin, but
    it does not shrink with the kernel: weights can come out negative, and where the kernel
    is small everywhere their sum can be near zero, and the output anything.

    Parameters
    ----------
    sigma : float
        Width of the kernel.
    dim : int
        Width `D` of queries and keys.
    num_features : int
        Number of features `Dphi`; the error falls with its square root.
    rng : int or numpy.random.Generator
        Where the weights are drawn from, once.
    features : {"positive", "trigonometric"}, default: "positive"
        Which features; the trigonometric ones need an even number.

    Returns
    -------
    FeatureMap
        The map.

    References
    ----------
    .. [1] Choromanski et al., Rethinking attention with performers, 2020,
       arXiv:2009.14794.
    .. [2] Rahimi & Recht, Random features for large-scale kernel machines, 2007; with
       orthogonal frequencies as in Yu et al., 2016, arXiv:1610.09072.

    Examples
    --------
    >>> from arrattn.feature_maps import gaussian
    >>> gaussian(2.0, dim=16, num_features=64, rng=0)
    gaussian(2.0, features='positive', dim=16, num_features=64, rng=0)
    """
    sigma = _read_sigma(sigma)
    if features not in ("positive", "trigonometric"):
        msg = f"features: expected 'positive' or 'trigonometric', got {features!r}"
        raise ValueError(msg)

    def exact(x: Array, y: Array, xp: Namespace) -> Array:
        return xp.exp(_sum_of_differences(x, y, lambda d: d * d) * (-0.5 / sigma**2))

    call = f"gaussian({sigma}, features={features!r}, "
    drawn: dict[str, Any] = {"dim": dim, "num_features": num_features, "rng": rng}
    if features == "trigonometric":
        return _Trigonometric(call, factor=1.0 / sigma, exact=exact, **drawn)
    return _Positive(call, factor=1.0 / sigma, c=1.0, sign=1.0, exact=exact, **drawn)


def laplacian(
    sigma: float, *, dim: int, num_features: int, rng: int | np.random.Generator
) -> FeatureMap:
    r"""
    Random features of the Laplacian kernel.

    .. math:: \kappa(x, y) = \exp(-|x - y|_1 / \sigma)

    Trigonometric features with Cauchy frequencies [1]_. Weights can come out negative; see
    `gaussian` on what that means where the kernel is small.

    Parameters
    ----------
    sigma : float
        Width of the kernel.
    dim : int
        Width `D` of queries and keys.
    num_features : int
        Number of features `Dphi`, even; the error falls with its square root.
    rng : int or numpy.random.Generator
        Where the weights are drawn from, once.

    Returns
    -------
    FeatureMap
        The map.

    References
    ----------
    .. [1] Rahimi & Recht, Random features for large-scale kernel machines, 2007.

    Examples
    --------
    >>> from arrattn.feature_maps import laplacian
    >>> laplacian(4.0, dim=16, num_features=64, rng=0)
    laplacian(4.0, dim=16, num_features=64, rng=0)
    """
    sigma = _read_sigma(sigma)

    def exact(x: Array, y: Array, xp: Namespace) -> Array:
        return xp.exp(_sum_of_differences(x, y, abs) * (-1.0 / sigma))

    drawn: dict[str, Any] = {"dim": dim, "num_features": num_features, "rng": rng}
    return _Cauchy(f"laplacian({sigma}, ", factor=1.0 / sigma, exact=exact, **drawn)


def softmax(
    *,
    dim: int,
    num_features: int,
    rng: int | np.random.Generator,
    scale: float | None = None,
) -> FeatureMap:
    r"""
    Random features of the softmax kernel: positive and orthogonal [1]_.

    .. math:: \kappa(x, y) = \exp(\mathrm{scale}\; x \cdot y), \qquad
              \phi_r(x) = e^{w_r \cdot x' - |x'|^2 / 2} / \sqrt{m},
              \quad x' = \sqrt{\mathrm{scale}}\; x

    The error grows with :math:`|x' + y'|^2`: with keys and queries of ordinary size, not
    with peaked attention.

    Parameters
    ----------
    dim : int
        Width `D` of queries and keys.
    num_features : int
        Number of features `Dphi`; the error falls with its square root.
    rng : int or numpy.random.Generator
        Where the weights are drawn from, once.
    scale : float, optional
        Factor of the products; may be negative. Default: ``dim ** -0.5``.

    Returns
    -------
    FeatureMap
        The map.

    References
    ----------
    .. [1] Choromanski et al., Rethinking attention with performers, 2020,
       arXiv:2009.14794.

    Examples
    --------
    >>> from arrattn.feature_maps import softmax
    >>> softmax(dim=16, num_features=64, rng=0)
    softmax(scale=0.25, dim=16, num_features=64, rng=0)
    """
    _require_positive_int("dim", dim)
    scale = dim**-0.5 if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, Real):
        msg = f"scale: expected a real number, got {scale!r} ({type(scale).__name__})"
        raise TypeError(msg)
    if not math.isfinite(scale):
        msg = f"scale: expected a finite number, got {scale}"
        raise ValueError(msg)
    size = float(scale)

    def exact(x: Array, y: Array, xp: Namespace) -> Array:
        return xp.exp(size * (x @ xp.matrix_transpose(y)))

    drawn: dict[str, Any] = {"dim": dim, "num_features": num_features, "rng": rng}
    root, sign = abs(size) ** 0.5, math.copysign(1.0, size)
    return _Positive(f"softmax(scale={size}, ", factor=root, c=0.5, sign=sign, exact=exact, **drawn)


def read_map(feature_map: object) -> FeatureMap:
    """
    Make a `FeatureMap` of what the user passed: one, a callable, or None.

    Parameters
    ----------
    feature_map : FeatureMap, callable or None
        None is the identity.

    Returns
    -------
    FeatureMap
        The map.
    """
    if feature_map is None:
        return _identity
    if isinstance(feature_map, FeatureMap):
        return feature_map
    if callable(feature_map) and not isinstance(feature_map, type):
        hint = {gaussian: "sigma, ", laplacian: "sigma, ", softmax: ""}.get(feature_map)  # type: ignore[call-overload]
        if hint is None:
            return Custom(feature_map)
        name = feature_map.__name__  # type: ignore[attr-defined]
        msg = (
            f"feature_map: expected a map, got the function {name} that makes one; "
            f"call it: {name}({hint}dim=..., num_features=..., rng=...)"
        )
        raise TypeError(msg)
    msg = (
        "feature_map: expected one of arrattn.feature_maps, a callable or None, "
        f"got {feature_map!r} ({type(feature_map).__name__})"
    )
    raise TypeError(msg)


def _sum_of_differences(x: Array, y: Array, of: Callable[[Array], Array]) -> Array:
    """Sum ``of(x_d - y_d)`` over `d` for every pair: differences first, so nothing cancels."""
    total = of(x[..., :, None, 0] - y[..., None, :, 0])
    for d in range(1, x.shape[-1]):
        total = total + of(x[..., :, None, d] - y[..., None, :, d])
    return total


def _orthogonal_normal(rng: np.random.Generator, count: int, dim: int) -> np.ndarray[Any, Any]:
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


def _read_rng(rng: object) -> np.random.Generator:
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, bool) or not isinstance(rng, Integral):
        msg = (
            f"rng: expected an int or a numpy.random.Generator, got {rng!r} ({type(rng).__name__})"
        )
        raise TypeError(msg)
    if rng < 0:
        msg = f"rng: expected a seed of at least 0, got {rng}"
        raise ValueError(msg)
    return np.random.default_rng(int(rng))


def _read_sigma(sigma: object) -> float:
    if isinstance(sigma, bool) or not isinstance(sigma, Real):
        msg = f"sigma: expected a real number, got {sigma!r} ({type(sigma).__name__})"
        raise TypeError(msg)
    if not (math.isfinite(sigma) and float(sigma) > 0):
        msg = f"sigma: expected a positive, finite number, got {sigma}"
        raise ValueError(msg)
    return float(sigma)


def _require_positive_int(name: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, Integral):
        msg = f"{name}: expected an int, got {x!r} ({type(x).__name__})"
        raise TypeError(msg)
    if x < 1:
        msg = f"{name}: expected at least 1, got {x}"
        raise ValueError(msg)
