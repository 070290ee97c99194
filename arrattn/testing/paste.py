"""Writing calls as Python that can be pasted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from arrattn._state import DeltaState, LinearState
from arrattn.testing.case import NamedMap
from arrattn.testing.sights import Sight
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import accumulation
from arrattn.testing.values import literal

__all__ = ["Call", "script"]

Host = np.ndarray[Any, Any]
PATTERNS = (
    "Blocks", "Causal", "Dilated", "Fixed", "Global", "Prefix", "Random", "Segments", "Strided",
    "Where", "Window",
)  # fmt: skip

#: More numbers than these are not written one by one where they need not be.
SHORT = 512

HOST = {
    "torch": "x.detach().double().numpy()",
    "cupy": "np.asarray(x.get(), np.float64)",
    "mlx.core": "np.asarray(x.astype(xp.float32), np.float64)",
}


@dataclass
class Call:
    """
    A call as the function was given it.

    Parameters
    ----------
    name : str
        What its result is called.
    dtype : str
        What floats are cast to.
    arrays : list of array
        Positional arguments, in the function's layout.
    keywords : dict
        Keyword arguments, the function's own.
    lse : bool
        Whether the log-sum-exp comes beside the output.
    state : str
        The names of the arrays of the state that comes beside the output.
    selection : bool
        Whether what was chosen comes last.
    dim : int
        The width of queries and keys.
    weights : array, optional
        Where gradients are taken: the weights of the output in the sum.
    measured : bool
        Whether its memory is measured in place of its result.
    sent : list, optional
        The arrays that were handed over.
    made : dict of str to array
        Expressions that make arrays of the call, in our layout.
    """

    name: str
    dtype: str
    arrays: list[Host]
    keywords: dict[str, Any]
    lse: bool
    state: str
    selection: bool
    dim: int
    weights: Host | None = None
    measured: bool = False
    sent: list[Any] = field(default_factory=list)
    made: Mapping[str, Host] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many numbers it is made of."""
        given = [*self.arrays, *self.keywords.values()]
        return sum(getattr(x, "size", 1) for x in given)


class _Writer:
    """Collects lines; an array that comes twice is written once."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.library = subject, subject.library
        self.lines: list[str] = []
        self.names: dict[Any, str] = {}
        self.taken: set[str] = set()
        self.expressions: dict[str, Host] = {}

    def array(self, name: str, x: Host, dtype: str) -> str:
        """Define an array, or find that it is there; its name."""
        key = (x.shape, x.dtype.str, x.tobytes(), dtype)
        if key in self.names:
            return self.names[key]
        number, own = 1, name
        while own in self.taken:
            number += 1
            own = f"{name}{number}"
        self.taken.add(own)
        self.names[key] = own
        self.lines.append(f"{own} = {self.made(x, dtype)}")
        return own

    def made(self, x: Host, dtype: str) -> str:
        alias = self.library.alias
        make = f"{alias}.array" if self.library.name == "mlx.core" else f"{alias}.asarray"
        if self.library.name == "dask.array":
            make = "as_dask"
        kind = f", dtype={self.dtype(dtype)}" if x.dtype.kind == "f" else ""
        if x.dtype.kind in "iu" and x.dtype != np.int64:
            kind = f", dtype={self.dtype(x.dtype.name)}"
        if x.size > SHORT and np.all(x == x.flat[0]) and x.dtype.kind == "f":
            return f"{alias}.full({x.shape}, {x.flat[0].item()!r}{kind})"
        if x.size == 0:
            kind = kind or f", dtype={alias}.{'bool' if x.dtype.kind == 'b' else 'int64'}"
            return f"{alias}.zeros({x.shape}{kind})"
        return f"{make}({self.expression(x) or literal(x)}{kind})"

    def expression(self, x: Host) -> str:
        """What makes an array, if that is known: as it is, in the other layout, or reshaped."""
        for text, array in self.expressions.items():
            forms = {text: array}
            if array.ndim > 2:
                forms[f"np.swapaxes({text}, -2, -3)"] = np.swapaxes(array, -2, -3)
            for form, y in forms.items():
                if x.dtype == y.dtype and np.array_equal(x.reshape(-1), y.reshape(-1)):
                    return form if x.shape == y.shape else f"np.reshape({form}, {x.shape})"
        return ""

    def dtype(self, name: str) -> str:
        if hasattr(self.library.module, name):
            return f"{self.library.alias}.{name}"
        return f"ml_dtypes.{name}"

    def option(self, name: str, x: Any, call: Call) -> str:
        if isinstance(x, np.ndarray):
            return self.array(name, x, call.dtype)
        if isinstance(x, LinearState | DeltaState):
            dtype = accumulation(call.dtype)
            parts = (self.array(n, y, dtype) for n, y in zip(x._fields, x, strict=True))
            return f"arrattn.{type(x).__name__}({', '.join(parts)})"
        if isinstance(x, tuple):
            return "(" + ", ".join(self.option(name, y, call) for y in x) + ")"
        if isinstance(x, Sight):
            make = (
                "as_dask" if self.library.name == "dask.array" else f"{self.library.alias}.asarray"
            )
            return x.text.replace("np.array(", f"{make}(")
        return x.spell(call.dim) if isinstance(x, NamedMap) else repr(x)

    def call(self, call: Call) -> None:
        self.expressions.update(call.made)
        arrays = [self.array(n, x, call.dtype) for n, x in zip("qkv", call.arrays, strict=True)]
        options = [f"{n}={self.option(n, x, call)}" for n, x in call.keywords.items()]
        if call.weights is not None:
            self.gradients(call, arrays, options)
            return
        text = f"{self.subject.name}({', '.join([*arrays, *options])})"
        name = call.name
        if call.measured:
            self.lines.append(f"{name} = peaks(lambda: {text})")
            return
        if call.lse or call.selection:
            beside = [f"{name}_lse"] * call.lse + [f"{name}_selection"] * call.selection
            self.lines.append(f"{', '.join([name, *beside])} = map(host, {text})")
        elif call.state:
            self.lines.append(f"{name}, state = {text}")
            self.lines.append(f"{name} = host({name})")
            self.lines += [f"{name}_{n} = host(state.{n})" for n in call.state]
        else:
            self.lines += [f"{name}_raw = {text}", f"{name} = host({name}_raw)"]
        if self.subject.layout == "bnhd":
            self.lines.append(f"{name} = np.swapaxes({name}, -2, -3)  # heads first")
            if call.lse:
                self.lines.append(f"{name}_lse = np.swapaxes({name}_lse, -1, -2)")
            if call.selection:
                self.lines.append(f"{name}_selection = np.swapaxes({name}_selection, -2, -3)")

    def gradients(self, call: Call, arrays: list[str], options: list[str]) -> None:
        weights = self.array("weights", call.weights, call.dtype)  # type: ignore[arg-type]
        names = [f"{call.name}_{n}" for n in "qkv"]
        if self.library.name == "torch":
            leaves = [f"leaf_{n}" for n in "qkv"]
            given = ", ".join(f"{x}.clone().requires_grad_()" for x in arrays)
            self.lines.append(f"{', '.join(leaves)} = {given}")
            text = f"{self.subject.name}({', '.join([*leaves, *options])})"
            self.lines.append(f"({text} * {weights}).sum().backward()")
            found = ", ".join(f"host({n}.grad)" for n in leaves)
        else:
            text = f"{self.subject.name}({', '.join(['q_', 'k_', 'v_', *options])})"
            self.lines.append("def weighed(q_, k_, v_):")
            self.lines.append(f"    return ({text} * {weights}).sum()")
            self.lines.append(f"found = jax.grad(weighed, (0, 1, 2))({', '.join(arrays)})")
            found = "map(host, found)"
        self.lines.append(f"{', '.join(names)} = {found}")
        if self.subject.layout == "bnhd":
            self.lines += [f"{n} = np.swapaxes({n}, -2, -3)" for n in names]


def script(
    subject: Subject,
    calls: Sequence[Call],
    constants: Mapping[str, Host],
    check: Sequence[str],
) -> str:
    """
    Write calls and a check as a program of its own.

    Parameters
    ----------
    subject : Subject
        The function.
    calls : sequence of Call
        What it was given, in order.
    constants : mapping of str to array
        Arrays that the check names.
    check : sequence of str
        The lines after the calls.

    Returns
    -------
    str
        Lines of Python.
    """
    writer = _Writer(subject)
    for call in calls:
        writer.call(call)
    body = writer.lines
    used = "\n".join(check)
    for name, x in constants.items():
        if re.search(rf"\b{name}\b", used.replace(f"{name} = ", "")):
            body.append(f"{name} = np.array({literal(x)})")
    return "\n".join([*_imports(subject, "\n".join([*body, *check])), "", *body, *check]) + "\n"


def _imports(subject: Subject, body: str) -> list[str]:
    library = subject.library
    lines = ["import numpy as np"]
    if re.search(r"\b(nan|inf)\b", body):
        lines.insert(0, "from math import inf, nan")
    if library.name == "jax.numpy":
        lines += ["import jax", "import jax.numpy as jnp"]
    elif library.name == "torch":
        lines.append("import torch")
    elif library.name != "numpy":
        lines.append(f"import {library.name} as {library.alias}")
    if "ml_dtypes." in body:
        lines.append("import ml_dtypes")
    if "arrattn." in body:
        lines.append("import arrattn")
    if "squares" in body:
        lines.append("from arrattn.testing.case import squares")
    if "peaks(" in body:
        lines.append("from arrattn.testing.memory import peaks")
    patterns = [name for name in PATTERNS if re.search(rf"\b{name}\(", body)]
    if patterns:
        lines.append(f"from arrattn.patterns import {', '.join(patterns)}")
    lines.append(subject.imported or f"# {subject.name} is the function under test")
    if library.name == "jax.numpy" and "float64" in body:
        lines.append('jax.config.update("jax_enable_x64", True)')
    lines.append("")
    if library.name == "dask.array":
        lines.append("def as_dask(x, dtype=None): return da.from_array(np.asarray(x, dtype))")
    lines.append(f"def host(x): return {HOST.get(library.name, 'np.asarray(x, np.float64)')}")
    return lines
