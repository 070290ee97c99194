"""Dtypes, determinism, and sums in half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import SCALING, SEES, calls
from arrattn.testing.laws.registry import MEANS, law
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject
from arrattn.testing.tolerance import eps

Host = np.ndarray[Any, Any]


@law(
    "dtype-and-shape-of-q",
    "the output has the library and dtype of q and the shape (..., Hq, Nq, Dv)",
    source="C1, C2",
    given=lambda s: calls(s, dtypes=s.dtypes, sees=SEES, scoring=SCALING),
)
def dtype_and_shape(run: Run, case: Case) -> None:
    whole = run("whole", case)
    sent = run.calls[-1].sent[0]
    got, due = str(whole.raw.dtype), str(sent.dtype)
    run.require(
        got == due,
        f"dtype {got} where {due} is due",
        "print(whole_raw.dtype)",
        f'assert "{due.rpartition(".")[2]}" in str(whole_raw.dtype)',
    )
    shape = (*case.batch, *case.q.shape[-3:-1], case.v.shape[-1])
    run.require(
        whole.out.shape == shape,
        f"shape {whole.out.shape} where {shape} is due",
        f"assert whole.shape == {shape}",
    )
    run.require(
        type(whole.raw) is type(sent),
        f"{type(whole.raw)} where {type(sent)} is due",
        f"assert type(whole_raw) is type({'q'})",
    )


@law(
    "same-input-same-bits",
    "f(q, k, v) twice gives the same bits",
    source="C10",
    given=lambda s: calls(s, dtypes=s.dtypes, sees=SEES, scoring=SCALING),
)
def same_input_same_bits(run: Run, case: Case) -> None:
    a, b = run("a", case), run("b", case)
    run.same(b.out, a.out, 0.0)


@law(
    "inputs-are-left-alone",
    "q, k and v are after the call what they were before",
    source="C1",
    given=lambda s: calls(s, sees=SEES, scoring=SCALING),
)
def inputs_are_left_alone(run: Run, case: Case) -> None:
    run("whole", case)
    call = run.calls[-1]
    for name, sent, was in zip("qkv", call.sent, call.arrays, strict=True):
        now = run.subject.library.to_numpy(sent)
        run.require(
            bool(np.array_equal(now, was)),
            f"{name} was changed",
            f"print({name})",
            f"assert np.array_equal(host({name}), np.array({was.tolist()}))",
        )


def halves(subject: Subject) -> st.SearchStrategy[Case]:
    """One shape: as many equal keys as a sum in half precision cannot count."""
    q, k = np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 4096, 4))
    return st.sampled_from(subject.half or ("float32",)).map(
        lambda dtype: Case(q, k, np.ones_like(k), dtype=dtype)
    )


@law(
    "half-precision-sums-in-single",
    "4096 equal keys with v = 1 give 1, in float16 and bfloat16",
    source="C8: sums are taken in at least float32",
    given=halves,
    families=("dense", "local", "linear"),
    needs=("half", "cross"),
    most=8,
)
def half_sums(run: Run, case: Case) -> None:
    if run.subject.family == "local":
        case = case.but(window=(None, None))
    whole = run("whole", case)
    run.same(whole.out, np.ones(whole.out.shape), 2 * eps(case.dtype))


@law(
    "lse-is-not-rounded-to-half",
    "4096 equal keys with scores of 0 have lse = log 4096 to single precision",
    source="C9: the log-sum-exp has the dtype of the sums",
    given=halves,
    families=("dense", "local"),
    needs=("half", "cross", "return_lse"),
    most=8,
)
def lse_is_not_rounded(run: Run, case: Case) -> None:
    if run.subject.family == "local":
        case = case.but(window=(None, None))
    lse = run("whole", case, return_lse=True).lse
    assert lse is not None  # noqa: S101 (it was asked for)
    run.same(lse, np.full(lse.shape, np.log(4096)), 64 * eps("float32"))


@law(
    "float64-stays-float64",
    "1 + 2^-40 comes back from values that are all 1 + 2^-40, in float64",
    source="C8: float64 stays float64 throughout",
    given=lambda s: calls(s, dtypes=("float64",), kinds=("tied",), scoring=("scale",)),
    families=MEANS,
    needs=("float64",),
    choice="precision",
)
def float64_stays(run: Run, case: Case) -> None:
    v = np.full_like(case.v, 1.0 + 2.0**-40)
    case = case.but(v=v)
    whole = run("whole", case)
    rows = (
        case.full_rows() & (whole.out.array[..., 0] != 0)
        if run.subject.family == "linear"
        else case.full_rows()
    )[..., None]
    run.same(
        whole.out,
        np.full(whole.out.shape, v.flat[0] if v.size else 1.0),
        64 * eps("float64"),
        where=rows,
    )
