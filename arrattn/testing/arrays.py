"""Moving arrays between NumPy and the library of the function under test."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["DTYPES", "ArrayLibrary", "read_library"]

Host = np.ndarray[Any, Any]

DTYPES = ("float64", "float32", "float16", "bfloat16")

#: How a library is imported and called in a counterexample, where it has a short name by custom.
ALIASES = {"numpy": "np", "torch": "torch", "jax.numpy": "jnp", "dask.array": "da"}

#: Names on the command line.
MODULES = {
    "jax": "jax.numpy",
    "dask": "dask.array",
    "array-api-strict": "array_api_strict",
    "strict": "array_api_strict",
    "mlx": "mlx.core",
}


@dataclass(frozen=True)
class ArrayLibrary:
    """
    An array library, as the check uses it.

    Parameters
    ----------
    module : module
        Where ``asarray`` and the dtypes are.
    """

    module: Any

    @property
    def name(self) -> str:
        """The module's name, without the wrapper of `array_api_compat`."""
        name: str = self.module.__name__
        return name.removeprefix("array_api_compat.")

    @property
    def alias(self) -> str:
        """The name by which a counterexample calls it."""
        return ALIASES.get(self.name, "xp")

    @property
    def compiles(self) -> bool:
        """Whether every new shape is compiled, which takes time."""
        return self.name == "jax.numpy"

    @property
    def differentiates(self) -> bool:
        """Whether gradients can be taken."""
        return self.name in {"torch", "jax.numpy"}

    @property
    def traced(self) -> bool:
        """Whether its arrays are NumPy's memory, which `tracemalloc` sees."""
        return self.name in {"numpy", "array_api_strict"}

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The floating dtypes that its arrays can have here."""
        return tuple(name for name in DTYPES if self._has(name))

    def _has(self, dtype: str) -> bool:
        if self.name == "jax.numpy" and dtype == "float64":
            import jax

            return bool(jax.config.jax_enable_x64)
        if self.name == "mlx.core" and dtype == "float64":
            return False  # on one of its devices alone
        if self.name in {"numpy", "dask.array", "cupy"} and dtype == "bfloat16":
            return importlib.util.find_spec("ml_dtypes") is not None
        return hasattr(self.module, dtype)

    def forget(self) -> None:
        """Drop what was compiled, which else fills the memory."""
        if self.compiles:
            import jax

            jax.clear_caches()

    def dtype(self, name: str) -> Any:
        """
        The library's dtype of a name.

        Parameters
        ----------
        name : str
            Such as ``"float32"``.

        Returns
        -------
        dtype
            The library's own.
        """
        found = getattr(self.module, name, None)
        return host_dtype(name) if found is None else found

    def asarray(self, x: Host, dtype: str) -> Any:
        """
        Move a NumPy array here.

        Parameters
        ----------
        x : array
            Of floats, integers or bools.
        dtype : str
            What floats are cast to.

        Returns
        -------
        array
            Of this library.
        """
        if x.dtype.kind != "f":
            return self._move(x)
        if self.name in {"torch", "mlx.core"} and dtype == "bfloat16":
            moved = self._move(x.astype(np.float32))
            to = self.dtype(dtype)
            return moved.to(to) if self.name == "torch" else moved.astype(to)
        return self._move(x.astype(host_dtype(dtype)))

    def _move(self, x: Host) -> Any:
        if self.name == "dask.array":
            return self.module.from_array(x, chunks=tuple(max(1, -(-n // 2)) for n in x.shape))
        make = self.module.array if self.name == "mlx.core" else self.module.asarray
        return make(x.copy())

    def to_numpy(self, x: Any) -> Host:
        """
        Bring a result to the host, floats as float64.

        Parameters
        ----------
        x : array
            Of this library, or of another that NumPy can read.

        Returns
        -------
        array
            In NumPy.
        """
        if hasattr(x, "detach"):
            x = x.detach().cpu()
            x = (x.double() if x.is_floating_point() else x).numpy()
        elif self.name == "cupy":
            x = x.get()
        elif self.name == "mlx.core" and str(x.dtype).endswith("bfloat16"):
            x = x.astype(self.module.float32)
        host: Host = np.asarray(x)
        return host if host.dtype.kind in "biu" else host.astype(np.float64)


def host_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name; its bfloat16 is that of ml_dtypes."""
    if name == "bfloat16":
        if importlib.util.find_spec("ml_dtypes") is None:
            msg = "bfloat16 on the host needs ml_dtypes: pip install ml-dtypes"
            raise ImportError(msg)
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def read_library(xp: Any) -> ArrayLibrary:
    """
    Find an array library by its module or its name.

    Parameters
    ----------
    xp : module or str
        Such as `numpy`, ``"torch"``, ``"jax"`` or ``"array-api-strict"``.

    Returns
    -------
    ArrayLibrary
        What the check uses.

    Raises
    ------
    ValueError
        If there is no such module.
    TypeError
        If it makes no arrays.
    """
    if isinstance(xp, str):
        name = MODULES.get(xp, xp)
        try:
            xp = importlib.import_module(name)
        except ImportError as error:
            msg = f"xp: expected an array library that is installed, got {xp!r} ({error})"
            raise ValueError(msg) from error
    name = getattr(xp, "__name__", "")
    if name == "jax":
        xp = importlib.import_module("jax.numpy")
    xp = sys.modules.get(name.removeprefix("array_api_compat."), xp)
    if not hasattr(xp, "asarray") and not hasattr(xp, "array"):
        msg = f"xp: expected a module that makes arrays, or its name, got {xp!r}"
        raise TypeError(msg)
    return ArrayLibrary(xp)
