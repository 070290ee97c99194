"""
The ways of running a test: one array library, on one device, compiled or not.

A test takes NumPy arrays, sends them down its lane with `Lane.call`, and checks what
comes out with `Lane.check`, which looks at library, dtype, shape and device before it
looks at a single value.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
from array_api_compat import array_namespace, device, to_device

from arrattn.backends import Library, library

#: NumPy dtypes by name, bfloat16 included.
NUMPY_DTYPES = {
    "float64": np.dtype("float64"),
    "float32": np.dtype("float32"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def rounded(x: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """`x` as its dtype holds it, in float64: what the reference is given."""
    return np.asarray(x).astype(NUMPY_DTYPES[dtype]).astype(np.float64)


@dataclass(frozen=True)
class Lane:
    """
    One way of running a test.

    Parameters
    ----------
    name : str
        Shown in the test's id.
    declared : Library
        What the library supports.
    device : str
        One of its devices.
    examples : int
        How many examples a law is tried on; few where every new shape is compiled.
    compiled : bool
        Whether calls go through ``jax.jit``.
    readonly : bool
        Whether inputs are write-protected, so that writing into them raises.
    """

    name: str
    declared: Library
    device: str
    examples: int
    compiled: bool = False
    readonly: bool = False

    def __repr__(self) -> str:
        return self.name

    @property
    def missing(self) -> str | None:
        """Why this lane cannot be run here, or None."""
        if not self.declared.installed:
            return f"{self.declared.name} is not installed"
        if self.device not in self.declared.present_devices:
            return f"{self.declared.name} finds no device {self.device!r}"
        return None

    @cached_property
    def namespace(self) -> Any:
        """The module with the functions of the standard."""
        return importlib.import_module(self.declared.namespace)

    @property
    def lazy(self) -> bool:
        """Whether nothing may be computed before the caller says so."""
        return self.declared.lazy

    @property
    def shrinks(self) -> bool:
        """Whether a failure is worth shrinking here: not where each shape is compiled."""
        return self.declared.name != "jax"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The supported dtypes."""
        return self.declared.dtypes

    def asarray(self, x: Any, dtype: str | None = None) -> Any:
        """A NumPy array as this lane's; floats are cast to `dtype`."""
        x = np.asarray(x)
        if dtype is not None and (x.dtype.kind == "f" or x.dtype == NUMPY_DTYPES["bfloat16"]):
            x = x.astype(NUMPY_DTYPES[dtype])
        return getattr(self, "_" + self.declared.name.replace("-", "_"))(x)

    def _numpy(self, x: np.ndarray[Any, Any]) -> Any:
        if self.readonly:
            x = x.copy()
            x.flags.writeable = False
        return x

    def _torch(self, x: np.ndarray[Any, Any]) -> Any:
        import torch

        if x.dtype == NUMPY_DTYPES["bfloat16"]:
            return torch.asarray(x.astype(np.float32), device=self.device).to(torch.bfloat16)
        return torch.asarray(np.array(x), device=self.device)

    def _jax(self, x: np.ndarray[Any, Any]) -> Any:
        import jax

        return jax.numpy.asarray(x, device=jax.devices(self.device)[0])

    def _dask(self, x: np.ndarray[Any, Any]) -> Any:
        import dask.array as da

        return da.from_array(x, chunks=tuple(max(1, -(-n // 2)) for n in x.shape))

    def _array_api_strict(self, x: np.ndarray[Any, Any]) -> Any:
        import array_api_strict

        return array_api_strict.asarray(x, device=array_api_strict.Device(self.device))

    def _cupy(self, x: np.ndarray[Any, Any]) -> Any:
        import cupy

        return cupy.asarray(x)

    def to_numpy(self, x: Any) -> np.ndarray[Any, Any]:
        """A result on the host; floats become float64. Only tests may do this."""
        name = self.declared.name
        if name == "torch":
            x = x.detach().cpu()
            x = (x.double() if x.is_floating_point() else x).numpy()
        elif name == "dask":
            x = x.compute(scheduler="synchronous")
        elif name == "array-api-strict":
            import array_api_strict

            x = to_device(x, array_api_strict.Device("CPU_DEVICE"))
        elif name == "cupy":
            x = x.get()
        x = np.asarray(x)
        return x if x.dtype.kind in "biu" else x.astype(np.float64)

    def call(self, function: Callable[..., Any], *args: Any, dtype: str, **options: Any) -> Any:
        """
        ``function(*args, **options)`` with every NumPy array in them moved to this lane.

        Floating arrays are cast to `dtype`. Descriptions of patterns are built. Under
        ``jit`` every array is a tracer, those inside patterns and pairs included.
        """
        if self.compiled:
            return self._compiled_call(function, args, options, dtype)
        args, options = built((args, options), lambda x: self.asarray(x, dtype))
        with self._no_compute():
            return function(*args, **options)

    def _compiled_call(
        self, function: Callable[..., Any], args: Any, options: Any, dtype: str
    ) -> Any:
        import jax

        arrays: list[Any] = []

        def collect(x: np.ndarray[Any, Any]) -> Any:
            arrays.append(self.asarray(x, dtype))
            return arrays[-1]

        built((args, options), collect)

        def traced(tracers: list[Any]) -> Any:
            # The same walk again, so that the tracers come in the order of the arrays.
            in_order = iter(tracers)
            traced_args, traced_options = built((args, options), lambda _: next(in_order))
            return function(*traced_args, **traced_options)

        return jax.jit(traced)(arrays)

    @contextmanager
    def _no_compute(self) -> Iterator[None]:
        if not self.lazy:
            yield
            return
        import dask

        def refuse(*args: Any, **kwargs: Any) -> None:
            msg = "a Dask graph was computed behind the user's back"
            raise RuntimeError(msg)

        with dask.config.set(scheduler=refuse):
            yield

    def check(
        self,
        got: Any,
        expected: np.ndarray[Any, Any],
        *,
        dtype: str,
        within: float | np.ndarray[Any, Any],
        like: Any = None,
    ) -> None:
        """
        Library, dtype, shape and device of `got`, and only then its values.

        NaN and infinities of `expected` have to be met exactly.
        """
        xp = array_namespace(got)
        assert xp.__name__ == self.namespace.__name__
        assert got.dtype == (getattr(xp, dtype, None) or NUMPY_DTYPES[dtype])
        assert tuple(got.shape) == expected.shape
        example = self.asarray(np.zeros(1), "float32") if like is None else like
        assert device(got) == device(example)
        close(self.to_numpy(got), expected, within=within)


def close(
    got: np.ndarray[Any, Any],
    expected: np.ndarray[Any, Any],
    *,
    within: float | np.ndarray[Any, Any],
) -> None:
    """Assert that values agree; what is not finite agrees exactly."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    error = np.abs(np.where(finite, got, 0.0) - np.where(finite, expected, 0.0))
    # `not <=` rather than `>`: a NaN where a number belongs has to fail.
    worse = ~(error <= within)
    assert not worse.any(), (
        f"{int(worse.sum())} of {worse.size} values off by up to {np.nanmax(error[worse]):.3g}, "
        f"where {np.max(within):.3g} is allowed; first at {tuple(np.argwhere(worse)[0].tolist())}"
    )


def built(tree: Any, move: Callable[[np.ndarray[Any, Any]], Any]) -> Any:
    """The tree with its NumPy arrays moved and its descriptions of patterns built."""
    if isinstance(tree, np.ndarray):
        return move(tree)
    if isinstance(tree, dict):
        return {name: built(x, move) for name, x in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(built(x, move) for x in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(built(x, move) for x in tree)
    return tree.build(move) if hasattr(tree, "build") else tree


def _lane(name: str, of: str, device: str, examples: int, **how: bool) -> Lane:
    return Lane(name, library(of), device, examples, **how)


LANES = (
    _lane("numpy", "numpy", "cpu", 150),
    _lane("numpy-readonly", "numpy", "cpu", 25, readonly=True),
    _lane("strict", "array-api-strict", "CPU_DEVICE", 25),
    _lane("strict-device1", "array-api-strict", "device1", 5),
    _lane("torch", "torch", "cpu", 50),
    _lane("torch-cuda", "torch", "cuda", 20),
    _lane("jax", "jax", "cpu", 3),
    _lane("jax-jit", "jax", "cpu", 4, compiled=True),
    _lane("jax-gpu", "jax", "gpu", 4, compiled=True),
    _lane("dask", "dask", "cpu", 4),
    _lane("cupy", "cupy", "cuda", 20),
)
_asked_for = os.environ.get("ARRATTN_LANES", "").split(",")
#: Those that the environment asks for, as in ``ARRATTN_LANES=numpy,torch``; without it, all.
CHOSEN = tuple(x for x in LANES if x.name in _asked_for) or LANES
