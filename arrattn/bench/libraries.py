"""
The array libraries as the comparison drives them.

What differs is how arrays get there and back, how to wait for a result, and how to
learn the peak of working memory; `arrattn.bench.memory` has the last.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from arrattn import backends
from arrattn._core.typing import Array, Namespace
from arrattn.bench import memory
from arrattn.bench.files import CannotRun
from arrattn.bench.memory import Peak

__all__ = ["Driver", "open_library"]

Host = np.ndarray[Any, Any]
Function = Callable[..., tuple[Array, ...]]


def open_library(name: str, dtype: str, device: str | None = None) -> Driver:
    """
    Import an array library and make its driver.

    Parameters
    ----------
    name : str
        As `arrattn backends` lists it.
    dtype : str
        Of q, k and v.
    device : str, optional
        The library's name of a device. Default: its own default.

    Returns
    -------
    Driver
        Moves arrays, runs functions, waits for them.

    Raises
    ------
    CannotRun
        If the library is not installed, or lacks the dtype or the device.
    """
    declared = backends.library(name)
    if not declared.supports(dtype):
        msg = f"--dtype {dtype}: {name} supports {', '.join(declared.dtypes)}"
        raise CannotRun(msg)
    # Read when torch is imported: its profiler else writes lines of its own into the table.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    try:
        xp = importlib.import_module(declared.namespace)
    except ImportError as error:
        msg = f"--array {name}: it cannot be imported ({error}); {declared.how_to_install}"
        raise CannotRun(msg) from error
    driver = DRIVERS.get(name, Driver)(xp, dtype)
    driver.choose_device(device)
    return driver


class Driver:
    """
    How to work with one array library; as it stands, with NumPy.

    Parameters
    ----------
    xp : module
        The library's namespace.
    dtype : str
        Of the arrays that `put` makes.
    """

    def __init__(self, xp: Namespace, dtype: str) -> None:
        self.xp = xp
        self.dtype = dtype
        self.device: Any = None

    def choose_device(self, name: str | None) -> None:
        """
        Use the device of this name.

        Parameters
        ----------
        name : str or None
            None is the library's default.
        """
        if name not in {None, "cpu"}:
            msg = f"--device {name}: this library computes on cpu"
            raise CannotRun(msg)

    def put(self, x: Host) -> Array:
        """
        Move a host array to the library, in the dtype of the comparison.

        Parameters
        ----------
        x : ndarray
            Values.

        Returns
        -------
        array
            The same values, rounded to the dtype.
        """
        return self.xp.asarray(_cast(x, self.dtype))

    def fetch(self, x: Array) -> Host:
        """
        Bring an array back to the host.

        Parameters
        ----------
        x : array
            Of this library.

        Returns
        -------
        ndarray
            The same values.
        """
        return np.asarray(x)

    def wait(self, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        """
        Wait until results are there.

        Parameters
        ----------
        outs : tuple of array
            What a function returned.

        Returns
        -------
        tuple of array
            The results, computed.
        """
        return outs

    def prepare(self, function: Function, inputs: tuple[Array, ...]) -> tuple[Function, float]:
        """
        Compile a function where the library compiles.

        Parameters
        ----------
        function : callable
            From arrays to a tuple of arrays.
        inputs : tuple of array
            What it will be called with.

        Returns
        -------
        tuple of (callable, float)
            What to call, and the seconds that compiling took.
        """
        del inputs
        return function, 0.0

    def peak(self, function: Function, inputs: tuple[Array, ...]) -> Peak:
        """
        Peak of working memory over inputs and outputs, in a run of its own.

        Parameters
        ----------
        function : callable
            From `prepare`.
        inputs : tuple of array
            What it is called with.

        Returns
        -------
        Peak
            Bytes and how they were found, or why not.
        """
        return memory.traced(lambda: self.wait(function(*inputs)))


class _Strict(Driver):
    def choose_device(self, name: str | None) -> None:
        if name is None:
            return
        try:
            self.device = self.xp.Device(name)
            self.xp.empty((0,), dtype=getattr(self.xp, self.dtype), device=self.device)
        except ValueError as error:
            msg = f"--device {name}: array-api-strict cannot use it ({error})"
            raise CannotRun(msg) from error

    def put(self, x: Host) -> Array:
        return self.xp.asarray(_cast(x, self.dtype), device=self.device)

    def fetch(self, x: Array) -> Host:
        cpu = self.xp.Device("CPU_DEVICE")
        return np.from_dlpack(self.xp.asarray(x, device=cpu))


class _Dask(Driver):
    def put(self, x: Host) -> Array:
        # Chunks along the tokens: what is parallel and partial in Dask.
        chunks = (x.shape[0], max(1024, x.shape[1] // 8), x.shape[2])
        return self.xp.from_array(_cast(x, self.dtype), chunks=chunks)

    def wait(self, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        import dask

        computed: tuple[Array, ...] = dask.compute(*outs)
        return computed


class _Torch(Driver):
    def choose_device(self, name: str | None) -> None:
        import torch

        try:
            self.device = torch.empty((0,), device=name or "cpu").device
        except (RuntimeError, AssertionError) as error:
            first = str(error).splitlines()[0]
            msg = f"--device {name}: torch cannot use it ({first})"
            raise CannotRun(msg) from error

    def put(self, x: Host) -> Array:
        import torch

        return torch.asarray(x).to(device=self.device, dtype=getattr(torch, self.dtype))

    def fetch(self, x: Array) -> Host:
        import torch

        host: Host = x.detach().to(device="cpu", dtype=torch.float64).numpy()
        return host

    def wait(self, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return outs

    def peak(self, function: Function, inputs: tuple[Array, ...]) -> Peak:
        def run() -> tuple[Array, ...]:
            return self.wait(function(*inputs))

        if self.device.type == "cuda":
            return memory.torch_counted(run, self.device)
        return memory.torch_profiled(run)


class _Jax(Driver):
    def __init__(self, xp: Namespace, dtype: str) -> None:
        import jax

        super().__init__(xp, dtype)
        if dtype == "float64":
            jax.config.update("jax_enable_x64", True)

    def choose_device(self, name: str | None) -> None:
        import jax

        try:
            self.device = jax.devices(name)[0]
        except RuntimeError as error:
            msg = f"--device {name}: JAX cannot use it ({error})"
            raise CannotRun(msg) from error

    def put(self, x: Host) -> Array:
        return self.xp.asarray(x, dtype=self.dtype, device=self.device)

    def wait(self, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        import jax

        done: tuple[Array, ...] = jax.block_until_ready(outs)
        return done

    def prepare(self, function: Function, inputs: tuple[Array, ...]) -> tuple[Function, float]:
        import jax

        start = time.perf_counter()
        compiled: Function = jax.jit(function).lower(*inputs).compile()
        return compiled, time.perf_counter() - start

    def peak(self, function: Function, inputs: tuple[Array, ...]) -> Peak:
        del inputs
        return memory.jax_planned(function)


class _Cupy(Driver):
    def choose_device(self, name: str | None) -> None:
        if name not in {None, "cuda"}:
            msg = f"--device {name}: CuPy computes on cuda"
            raise CannotRun(msg)
        if "cuda" not in backends.library("cupy").present_devices:
            msg = "--array cupy: CuPy finds no CUDA device here"
            raise CannotRun(msg)

    def fetch(self, x: Array) -> Host:
        host: Host = x.get()
        return host

    def wait(self, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        self.xp.cuda.get_current_stream().synchronize()
        return outs

    def peak(self, function: Function, inputs: tuple[Array, ...]) -> Peak:
        return memory.cupy_hooked(lambda: self.wait(function(*inputs)), self.xp)


DRIVERS: dict[str, type[Driver]] = {
    "array-api-strict": _Strict,
    "cupy": _Cupy,
    "dask": _Dask,
    "jax": _Jax,
    "torch": _Torch,
}


def _cast(x: Host, dtype: str) -> Host:
    """Round host values to a dtype; NumPy knows bfloat16 from another package."""
    if dtype != "bfloat16":
        return x.astype(dtype)
    try:
        import ml_dtypes
    except ImportError as error:
        msg = "--dtype bfloat16: NumPy's bfloat16 is in another package; pip install ml-dtypes"
        raise CannotRun(msg) from error
    return x.astype(ml_dtypes.bfloat16)
