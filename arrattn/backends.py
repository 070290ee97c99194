"""
What each array library supports, declared once.

`LIBRARIES` is the one place that says it. The table of ``arrattn backends``, the page
``docs/backends.md`` and the skips of the test suite are all made from it, so they
cannot disagree.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["LIBRARIES", "Device", "Library", "Limit", "library", "markdown", "rows"]

FAMILIES = ("dense", "local", "sparse", "linear")
DTYPES = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Device:
    """
    A kind of device that a library computes on.

    Parameters
    ----------
    name : str
        The library's own name for it.
    tried : bool, default: True
        Whether the test suite has ever been run on it.
    """

    name: str
    tried: bool = True


@dataclass(frozen=True)
class Limit:
    """
    Something that a library cannot do, and why.

    Parameters
    ----------
    what : str
        What does not work, or works differently.
    why : str
        The reason, which lies in the library and not in arrattn.
    """

    what: str
    why: str


@dataclass(frozen=True)
class Library:
    """
    One array library and what arrattn does on it.

    Parameters
    ----------
    name : str
        The name used on the command line and in the tests.
    module : str
        The module to import.
    namespace : str
        The module with the functions of the array API standard.
    packages : tuple of str
        The distributions that may provide `module`, for the version.
    requirement : str
        What pip is to install: arrattn with an extra, or a package of its own.
    dtypes : tuple of str
        The accepted dtypes of `q`, `k` and `v`.
    devices : tuple of Device
        Where it computes.
    lazy : bool, default: False
        Whether results are graphs, computed only when the caller says so.
    transforms : tuple of str, default: ()
        The program transformations that every family may be put through.
    gradients : str, default: ""
        How gradients are taken; empty where the library has none.
    schedule : str, default: "batched"
        How the loop over tiles runs.
    limits : tuple of Limit, default: ()
        What does not work.
    """

    name: str
    module: str
    namespace: str
    packages: tuple[str, ...]
    requirement: str
    dtypes: tuple[str, ...]
    devices: tuple[Device, ...]
    lazy: bool = False
    transforms: tuple[str, ...] = ()
    gradients: str = ""
    schedule: str = "tiles batched, a Python loop"
    limits: tuple[Limit, ...] = ()

    @property
    def installed(self) -> bool:
        """Whether the library can be imported here; it is not imported to find out."""
        return importlib.util.find_spec(self.module.partition(".")[0]) is not None

    @property
    def install(self) -> str:
        """The command that installs it."""
        return _pip_install(self.requirement)

    @property
    def install_in_checkout(self) -> str:
        """The command that installs it from the root of a checkout of arrattn."""
        package, bracket, extra = self.requirement.partition("[")
        if package != "arrattn":
            return self.install
        return _pip_install(f".{bracket}{extra}", "-e ")

    @property
    def how_to_install(self) -> str:
        """Both commands in one phrase, or the one where they are the same."""
        if self.install == self.install_in_checkout:
            return self.install
        return f"{self.install} (in a checkout: {self.install_in_checkout})"

    @property
    def version(self) -> str | None:
        """The installed version, or None."""
        for package in self.packages:
            try:
                return importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return None

    @property
    def present_devices(self) -> tuple[str, ...]:
        """The devices of this machine that the library can use; imports the library."""
        if not self.installed:
            return ()
        return tuple(d.name for d in self.devices if _is_present(self.module, d.name))

    def supports(self, dtype: str) -> bool:
        """
        Say whether `q`, `k` and `v` may have this dtype.

        Parameters
        ----------
        dtype : str
            A dtype's name, such as ``"float32"``.

        Returns
        -------
        bool
            Whether it is accepted.
        """
        return dtype in self.dtypes


LIBRARIES: tuple[Library, ...] = (
    Library(
        name="numpy",
        module="numpy",
        namespace="array_api_compat.numpy",
        packages=("numpy",),
        requirement="arrattn",
        dtypes=DTYPES,
        devices=(Device("cpu"),),
        schedule="a thread pool over heads and query tiles",
        limits=(
            Limit(
                what="bfloat16 arrays are those of the package `ml_dtypes`",
                why="NumPy has no bfloat16 of its own",
            ),
        ),
    ),
    Library(
        name="torch",
        module="torch",
        namespace="array_api_compat.torch",
        packages=("torch",),
        requirement="arrattn[torch]",
        dtypes=DTYPES,
        devices=(Device("cpu"), Device("cuda", tried=False)),
        gradients="torch.autograd",
    ),
    Library(
        name="jax",
        module="jax",
        namespace="jax.numpy",
        packages=("jax",),
        requirement="arrattn[jax]",
        dtypes=DTYPES,
        devices=(Device("cpu"), Device("gpu", tried=False)),
        transforms=("jit", "vmap", "grad"),
        gradients="jax.grad",
        schedule="lax.scan and lax.map",
        limits=(
            Limit(
                what="float64 needs `jax.config.update('jax_enable_x64', True)`",
                why="JAX turns float64 into float32 otherwise",
            ),
        ),
    ),
    Library(
        name="dask",
        module="dask.array",
        namespace="array_api_compat.dask.array",
        packages=("dask",),
        requirement="arrattn[dask]",
        dtypes=DTYPES,
        devices=(Device("cpu"),),
        lazy=True,
        schedule="one task for each block of the graph",
        limits=(
            Limit(
                what="bfloat16 arrays are those of the package `ml_dtypes`",
                why="its chunks are NumPy arrays",
            ),
        ),
    ),
    Library(
        name="array-api-strict",
        module="array_api_strict",
        namespace="array_api_strict",
        packages=("array-api-strict",),
        requirement="array-api-strict",
        dtypes=("float64", "float32"),
        devices=(Device("CPU_DEVICE"), Device("device1")),
        limits=(
            Limit(
                what="no float16 and no bfloat16",
                why="the standard has neither, and this library is the standard alone",
            ),
        ),
    ),
    Library(
        name="cupy",
        module="cupy",
        namespace="array_api_compat.cupy",
        packages=("cupy", "cupy-cuda12x", "cupy-cuda13x", "cupy-cuda11x"),
        requirement="arrattn[cupy]",
        dtypes=DTYPES,
        devices=(Device("cuda", tried=False),),
        limits=(
            Limit(
                what="bfloat16 arrays are those of the package `ml_dtypes`",
                why="CuPy takes the dtype from there",
            ),
        ),
    ),
)


def library(name: str) -> Library:
    """
    The declaration of one array library.

    Parameters
    ----------
    name : str
        Its name: numpy, torch, jax, dask, array-api-strict or cupy.

    Returns
    -------
    Library
        What arrattn does on it.

    Raises
    ------
    ValueError
        If there is no such declaration.

    Examples
    --------
    >>> library("dask").lazy
    True
    """
    for declared in LIBRARIES:
        if declared.name == name:
            return declared
    names = ", ".join(declared.name for declared in LIBRARIES)
    msg = f"name: expected one of {names}; got {name!r}"
    raise ValueError(msg)


def rows(*, here: bool) -> Iterator[tuple[str, ...]]:
    """
    The table of the libraries, its header first.

    Parameters
    ----------
    here : bool
        Whether to add what is installed on this machine, which imports every library
        that is.

    Yields
    ------
    tuple of str
        One row.
    """
    head = ("library", "dtypes", "devices", "lazy", "transforms", "gradients", "loop over tiles")
    yield ("library", "installed", "here", *head[1:]) if here else head
    for declared in LIBRARIES:
        local: tuple[str, ...] = ()
        if here:
            found = ", ".join(declared.present_devices) or "-"
            local = (declared.version or "no", found)
        yield (
            declared.name,
            *local,
            _joined(declared.dtypes),
            _joined(d.name if d.tried else f"{d.name} (never run yet)" for d in declared.devices),
            "yes" if declared.lazy else "no",
            _joined(declared.transforms),
            declared.gradients or "-",
            declared.schedule,
        )


def markdown() -> str:
    """
    The page ``docs/backends.md``, which says nothing about the machine it is made on.

    Returns
    -------
    str
        The page.
    """
    head, *body = rows(here=False)
    lines = [
        "# Array libraries",
        "",
        "<!-- Made by `arrattn backends --markdown`; change arrattn/backends.py instead. -->",
        "",
        "Every family (dense, local, sparse, linear) runs on every library below, from the",
        "same code. `arrattn backends` prints this table with what is installed on your",
        "machine.",
        "",
        *_table(head, body),
        "",
        "*Never run yet* means what it says: the code for that device is the same as for the",
        "others and the test suite runs there as soon as the device is present, but nobody",
        "has run it.",
        "",
        "## Limits",
        "",
    ]
    for declared in LIBRARIES:
        lines += [f"- **{declared.name}**: {_sentence(limit)}" for limit in declared.limits]
    lines += ["", "## Installing", ""]
    commands = [(d.name, f"`{d.install}`", f"`{d.install_in_checkout}`") for d in LIBRARIES]
    lines += _table(("library", "command", "in a checkout"), commands)
    return "\n".join(lines) + "\n"


def _pip_install(requirement: str, options: str = "") -> str:
    quoted = f'"{requirement}"' if "[" in requirement else requirement  # shells read brackets
    return f"pip install {options}{quoted}"


def _sentence(limit: Limit) -> str:
    return f"{limit.what}: {limit.why}."


def _table(head: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *body)]


def _joined(parts: Iterator[str] | tuple[str, ...]) -> str:
    return ", ".join(parts) or "-"


def _is_present(module: str, device: str) -> bool:
    """Whether the library finds a device of this kind; asked of the library itself."""
    if module == "torch" and device == "cuda":
        import torch

        return bool(torch.cuda.is_available())
    if module == "jax" and device != "cpu":
        import jax

        return any(d.platform == device for d in jax.devices())
    if module == "cupy":
        import cupy

        try:
            return bool(cupy.cuda.runtime.getDeviceCount())
        except cupy.cuda.runtime.CUDARuntimeError:
            return False
    return True
