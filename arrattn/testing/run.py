"""One try of a law: the calls that it makes, and what it finds of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np

from arrattn._state import DeltaState, LinearState
from arrattn.testing import paste
from arrattn.testing.bounds import case_errors, delta_errors
from arrattn.testing.case import Case, NamedMap
from arrattn.testing.memory import peaks
from arrattn.testing.sights import Sight
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import accumulation, output_error, score_error
from arrattn.testing.values import Value

__all__ = ["BrokenLawError", "Outcome", "Run"]

Host = np.ndarray[Any, Any]
#: Of more numbers than these, a counterexample names the one that is missed.
SHORT = 64
NOTHING = Value("nothing", np.zeros(0))


class BrokenLawError(AssertionError):
    """
    A law does not hold.

    Parameters
    ----------
    text : str
        Where the result differs, and by how much.
    check : sequence of str
        Lines of Python that show it, after the calls.
    """

    def __init__(self, text: str, *check: str) -> None:
        super().__init__(text)
        self.text, self.check = text, check
        self.script = ""


class CrashError(BrokenLawError):
    """The function raised an exception of its own."""


@dataclass
class Outcome:
    """
    What a call gave.

    Parameters
    ----------
    out : Value
        The output, shape (..., Hq, Nq, Dv).
    raw : array
        The same as the library's own array.
    lse : Value
        The log-sum-exp, shape (..., Hq, Nq), where it was asked for.
    selection : Value
        What sparse attention chose, shape (..., heads, rows, count), where it was asked for.
    S, z : Value
        The state of linear attention, or the memory of the delta rule, where it was asked for.
    """

    out: Value
    raw: Any
    lse: Value = NOTHING
    selection: Value = NOTHING
    S: Value = NOTHING
    z: Value = NOTHING


class Run:
    """
    Calls the function under test, and keeps what is needed to write the calls down.

    Parameters
    ----------
    subject : Subject
        The function under test.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.calls: list[paste.Call] = []
        self.constants: dict[str, Host] = {}

    # -- Calling ------------------------------------------------------------------------------

    def __call__(self, name: str, case: Case, **options: Any) -> Outcome:
        """
        Call the function.

        Parameters
        ----------
        name : str
            What a counterexample calls the result.
        case : Case
            The call.
        **options : object
            Further keyword arguments.

        Returns
        -------
        Outcome
            Its results, in NumPy.
        """
        call = self._record(name, case.but(**options))
        result = self._guarded(lambda: self._send(call))
        return self._read(call, result)

    def gradients(self, name: str, case: Case, weights: Host) -> tuple[Value, Value, Value]:
        """
        Differentiate the sum of the output times `weights`.

        Parameters
        ----------
        name : str
            What a counterexample calls the result.
        case : Case
            The call.
        weights : array
            Of the output's shape.

        Returns
        -------
        tuple of Value
            The gradients by q, k and v.
        """
        call = self._record(name, case)
        call.weights = self._laid_out(weights)
        found = self._guarded(lambda: self._differentiate(call))
        names = (f"{name}_{n}" for n in "qkv")
        arrays = (self._laid_out(self.subject.library.to_numpy(x)) for x in found)
        q, k, v = (Value(n, x) for n, x in zip(names, arrays, strict=True))
        return q, k, v

    def peaks(self, name: str, case: Case) -> list[int]:
        """
        Measure the memory that the function takes.

        Parameters
        ----------
        name : str
            What a counterexample calls the result.
        case : Case
            The call.

        Returns
        -------
        list of int
            Bytes beyond the arguments, of several tries.
        """
        call = self._record(name, case)
        call.measured = True
        arrays, keywords = self._moved(call)
        found: list[int] = self._guarded(
            lambda: peaks(lambda: self.subject.attend(*arrays, **keywords))
        )
        return found

    def _record(self, name: str, case: Case) -> paste.Call:
        arrays = [self._laid_out(x) for x in case.arrays]
        keywords = dict(case.options)
        lse, chosen = (bool(keywords.get(x)) for x in ("return_lse", "return_selection"))
        state = {"linear": "Sz", "delta": "S"}.get(self.subject.family, "")
        state = state if keywords.get("return_state") else ""
        if self.subject.translate is not None:
            arrays, keywords = self.subject.translate(*arrays, **keywords)
        beside = (lse, state, chosen)
        call = paste.Call(name, case.dtype, list(arrays), keywords, *beside, case.q.shape[-1])
        call.made = case.made
        self.calls.append(call)
        return call

    def _laid_out(self, x: Host) -> Host:
        return np.swapaxes(x, -2, -3) if self.subject.layout == "bnhd" else x

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:
            text = f"raised {type(error).__name__}: {error}"
            raise CrashError(text) from error

    def _moved(self, call: paste.Call) -> tuple[list[Any], dict[str, Any]]:
        def move(x: Any, dtype: str = call.dtype) -> Any:
            if isinstance(x, np.ndarray):
                return self.subject.library.asarray(x, dtype)
            if isinstance(x, LinearState | DeltaState):
                return type(x)(*(move(y, accumulation(dtype)) for y in x))
            if isinstance(x, tuple):
                return tuple(move(y) for y in x)
            if isinstance(x, Sight):
                return x.build(move)
            return x.build(call.dim) if isinstance(x, NamedMap) else x

        return [move(x) for x in call.arrays], {n: move(x) for n, x in call.keywords.items()}

    def _send(self, call: paste.Call) -> Any:
        arrays, keywords = self._moved(call)
        call.sent = arrays
        return self.subject.attend(*arrays, **keywords)

    def _differentiate(self, call: paste.Call) -> Any:
        arrays, keywords = self._moved(call)
        weights = self.subject.library.asarray(call.weights, call.dtype)  # type: ignore[arg-type]
        attend = self.subject.attend
        if self.subject.library.name == "torch":
            leaves = [x.requires_grad_() for x in arrays]
            (attend(*leaves, **keywords) * weights).sum().backward()
            return [x.new_zeros(x.shape) if x.grad is None else x.grad for x in leaves]
        import jax

        def weighed(*arrays: Any) -> Any:
            return (attend(*arrays, **keywords) * weights).sum()

        return jax.grad(weighed, (0, 1, 2))(*arrays)

    def _read(self, call: paste.Call, result: Any) -> Outcome:
        host, name = self.subject.library.to_numpy, call.name
        beside = bool(call.lse or call.state or call.selection)
        out, *others = result if beside else (result,)

        def read(what: str, x: Any) -> Value:
            def convert() -> Value:
                array = host(x)
                if self.subject.layout == "bnhd" and what == f"{name}_lse":
                    array = np.swapaxes(array, -1, -2)
                elif self.subject.layout == "bnhd":
                    array = np.swapaxes(array, -2, -3)
                return Value(what, array)

            converted: Value = self._guarded(convert)
            return converted

        outcome = Outcome(read(name, out), out)
        if call.lse:
            outcome.lse = read(f"{name}_lse", others[0])
        if call.selection:
            outcome.selection = read(f"{name}_selection", others[-1])
        for n in call.state:
            setattr(outcome, n, Value(f"{name}_{n}", host(getattr(others[0], n))))
        return outcome

    # -- Finding ------------------------------------------------------------------------------

    def let(self, name: str, array: Any) -> Value:
        """
        Name an array that the law computed itself.

        Parameters
        ----------
        name : str
            What a counterexample calls it.
        array : array
            What it is.

        Returns
        -------
        Value
            For `same`.
        """
        array = np.asarray(array)
        self.constants[name] = array
        return Value(name, array)

    def same(
        self,
        got: Value,
        expected: Any,
        within: Any,
        *,
        where: Any = True,
        of: Case | None = None,
        op: str = "==",
    ) -> None:
        """
        Require that values agree.

        Parameters
        ----------
        got : Value
            What the function gave.
        expected : Value or array
            What it should have given.
        within : float or array
            How far it may be off; what is not finite has to be met exactly.
        where : array of bool, optional
            What counts.
        of : Case, optional
            The call, whose empty rows do not count where the function chose another
            result for them.
        op : {"==", "<=", ">="}, default: "=="
            Whether `expected` is a bound.

        Raises
        ------
        BrokenLawError
            If they do not.
        """
        if not isinstance(expected, Value):
            expected = np.asarray(expected)
            short = expected.size <= SHORT
            expected = self.let("expected", expected) if short else Value("", expected)
        shape = expected.shape
        if got.shape != shape:
            text = f"shape {got.shape} where {shape} is due"
            raise BrokenLawError(text, f"assert {got.text}.shape == {shape}")
        where = np.broadcast_to(where, shape)
        if of is not None and "empty rows" in self.subject.choices:
            rows = of.full_rows()
            where = where & (rows[..., None] if rows.ndim == len(shape) - 1 else rows)
        bad = where & ~_meets(got.array, expected.array, within, op)
        if not bad.any():
            return
        at = tuple(np.argwhere(bad)[0].tolist())
        within = np.broadcast_to(within, shape)[at]
        a, b = got.array[at], expected.array[at]
        raise BrokenLawError(
            _difference(at, a, b, within, op), *_check(got, expected, at, b, within, op)
        )

    def require(self, true: bool, text: str, *check: str) -> None:
        """
        Require something that is not a comparison of numbers.

        Parameters
        ----------
        true : bool
            Whether it holds.
        text : str
            What is wrong otherwise.
        *check : str
            Lines of Python that show it.

        Raises
        ------
        BrokenLawError
            If it does not.
        """
        if not true:
            raise BrokenLawError(text, *check)

    # -- Tolerances ---------------------------------------------------------------------------

    def bound(self, case: Case, out: Host | None = None) -> Any:
        """
        How far one output of this call may be off.

        Parameters
        ----------
        case : Case
            The call.
        out : array, optional
            The exact output, which the error of a sum that is not a mean depends on.

        Returns
        -------
        float or array
            The bound.
        """
        dtype = self.subject.measured(case.dtype)
        if self.subject.family == "linear":
            return case_errors(case, dtype, np.zeros(()) if out is None else out)[0]
        if self.subject.family == "delta":
            return delta_errors(case, dtype, np.zeros(()) if out is None else out)[0]
        return output_error(*case.arrays, dtype=dtype, **case.scores)

    def score_bound(self, case: Case) -> float:
        """
        How far a score, or a log-sum-exp, may be off.

        Parameters
        ----------
        case : Case
            The call.

        Returns
        -------
        float
            The bound.
        """
        dtype = self.subject.measured(case.dtype)
        return score_error(case.q, case.k, dtype=dtype, **case.scores)

    def script(self, broken: BrokenLawError) -> str:
        """
        Write the calls so far, and what is wrong with them, as Python.

        Parameters
        ----------
        broken : BrokenLawError
            What was found.

        Returns
        -------
        str
            A program that fails as the law did.
        """
        return paste.script(self.subject, self.calls, self.constants, broken.check)


def _meets(got: Host, expected: Host, within: Any, op: str) -> Host:
    if op != "==":
        signed = got - expected if op == "<=" else expected - got
        return np.asarray(signed <= within)
    finite = np.isfinite(expected)
    exactly = (got == expected) | (np.isnan(got) & np.isnan(expected))
    error = np.abs(np.where(finite, got, 0.0) - np.where(finite, expected, 0.0))
    # `<=` and not `>`: a NaN where a number belongs has to fail.
    return np.asarray(np.where(finite, error <= within, exactly))


def _difference(at: tuple[int, ...], got: Any, expected: Any, within: float, op: str) -> str:
    due = {"==": "", "<=": "at most ", ">=": "at least "}[op]
    text = f"at {at}: {got} where {due}{expected} is due"
    if np.isfinite(got) and np.isfinite(expected) and got.dtype.kind == "f":
        text += f", off by {abs(operator.sub(got, expected)):.3g}, {within:.3g} allowed"
    return text


def _check(
    got: Value, expected: Value, at: tuple[int, ...], value: Any, within: float, op: str
) -> list[str]:
    due = f"{expected.text}[{index(at)}]" if expected.text else repr(value.item())
    lines = [f"got = {got.text}[{index(at)}]", f"expected = {due}"]
    lines.append("print(got, expected)")
    if op == "==" and np.isnan(value):
        return [*lines, "assert np.isnan(got)"]
    if op == "==" and (not np.isfinite(value) or not within):
        return [*lines, "assert got == expected"]
    if op == "==":
        return [*lines, f"assert abs(got - expected) <= {float(within)!r}"]
    sign = "+" if op == "<=" else "-"
    return [*lines, f"assert got {op} expected {sign} {float(within)!r}"]


def index(at: tuple[int, ...]) -> str:
    """Write an index; the empty one as ``()``."""
    return ", ".join(map(str, at)) if at else "()"
