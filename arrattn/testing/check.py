"""Holding a function against the laws."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Flaky

from arrattn.testing.arrays import DTYPES, read_library
from arrattn.testing.laws import LAWS
from arrattn.testing.laws.registry import Law
from arrattn.testing.run import BrokenLawError, Run
from arrattn.testing.strategies import CHOOSING, VISIBILITY
from arrattn.testing.subject import CHOICES, FAMILIES, Subject, family_of, read_lacks

__all__ = ["Counterexample", "Report", "Result", "check", "pytest_laws"]

#: Keyword arguments that laws use, by family.
SCORING = ("scale", "softcap", "bias", "sinks", "return_lse")
ARGUMENTS = {
    "dense": (*VISIBILITY["dense"], *SCORING),
    "local": (*VISIBILITY["local"], *SCORING),
    "sparse": (
        *VISIBILITY["sparse"],
        *SCORING,
        *("block_size", "top_k", "route", *CHOOSING, "return_selection"),
    ),
    "linear": (
        *VISIBILITY["linear"],
        *("feature_map", "normalize", "scale", "initial_state", "return_state", "log_decay"),
    ),
    "delta": (
        *VISIBILITY["delta"],
        *("beta", "scale", "initial_state", "return_state", "log_decay"),
    ),
}

#: How often a failing example is tried in smaller forms.
SHRINKS, COMPILED_SHRINKS = 600, 100

LAYOUTS = ("bhnd", "bnhd")

EXAMPLES, COMPILED_EXAMPLES = 200, 10


@dataclass(frozen=True)
class Counterexample:
    """
    A call that breaks a law.

    Parameters
    ----------
    text : str
        Where the result differs, and by how much.
    script : str
        Lines to paste into Python, which fail as the law did.
    """

    text: str
    script: str

    def __str__(self) -> str:
        return f"{self.text}\n\n{self.script}"


@dataclass(frozen=True)
class Result:
    """
    What became of one law.

    Parameters
    ----------
    law : str
        Its name.
    status : {"passed", "failed", "skipped", "differs"}
        "differs" means by a documented choice.
    reason : str
        Why it was skipped, what is wrong, or where the choice is documented.
    examples : int
        On how many examples it was tried.
    counterexample : Counterexample or None
        Where it fails or differs: the smallest call found.
    """

    law: str
    status: str
    reason: str = ""
    examples: int = 0
    counterexample: Counterexample | None = None


@dataclass(frozen=True)
class Report:
    """
    What became of all laws that were asked for.

    Parameters
    ----------
    results : dict of str to Result
        By the name of the law.
    """

    results: dict[str, Result] = field(default_factory=dict)

    def _of(self, status: str) -> dict[str, Result]:
        return {name: x for name, x in self.results.items() if x.status == status}

    @property
    def passed(self) -> dict[str, Result]:
        """The laws that hold."""
        return self._of("passed")

    @property
    def failed(self) -> dict[str, Result]:
        """The laws that do not."""
        return self._of("failed")

    @property
    def skipped(self) -> dict[str, Result]:
        """The laws that could not be asked."""
        return self._of("skipped")

    @property
    def differs(self) -> dict[str, Result]:
        """The laws that a documented choice goes against."""
        return self._of("differs")

    @property
    def ok(self) -> bool:
        """Whether no law failed."""
        return not self.failed


class _Enough(BaseException):
    """Ends the search for a smaller example."""


def check(
    attend: Callable[..., Any],
    *,
    xp: Any = "numpy",
    laws: str | Sequence[str] | None = None,
    layout: str = "bhnd",
    dtypes: Sequence[str] | None = None,
    examples: int | None = None,
    seed: int = 0,
    lacks: Iterable[str] | Mapping[str, str] = (),
    choices: Mapping[str, str] | None = None,
    family: str | None = None,
) -> Report:
    """
    Hold a function against the laws of attention.

    Parameters
    ----------
    attend : callable
        ``attend(q, k, v, /, **options)``, with the keyword arguments of `arrattn.attention`
        (or of the function of its family) that it supports.
    xp : module or str, default: "numpy"
        The library whose arrays it takes.
    laws : {"dense", "local", "sparse", "linear", "delta"} or sequence of str, optional
        All laws of a family, or laws by name. Default: those of the family that the
        keyword arguments tell.
    layout : {"bhnd", "bnhd"}, default: "bhnd"
        Heads before positions, or positions before heads, in `q`, `k`, `v` and the output;
        a mask has heads first in both.
    dtypes : sequence of str, optional
        What it is called with. Default: every floating dtype that the library has.
    examples : int, optional
        How many examples each law is tried on. Default: 200, or 10 where every new shape
        is compiled.
    seed : int, default: 0
        The same seed draws the same examples.
    lacks : collection of str, or mapping of str to str, default: ()
        Capabilities that it lacks, of `arrattn.testing.CAPABILITIES`, or keyword arguments
        that it takes and does nothing with; in a mapping with the reason. Arguments that
        its signature does not have are found.
    choices : mapping of str to str, optional
        Documented choices, of `arrattn.testing.CHOICES`, with where they are documented: a
        law about one of them is reported as "differs", and the other laws make room for it.
        With ``""`` for where, the other laws do so, and the law about it fails.
    family : str, optional
        The family, where `laws` are names and the keyword arguments do not tell.

    Returns
    -------
    Report
        What became of every law.

    Raises
    ------
    TypeError
        If `attend` cannot be called, or `xp` makes no arrays.
    ValueError
        If a name is unknown or `xp` is not installed.

    See Also
    --------
    pytest_laws : The same as tests.

    Notes
    -----
    A law that the function lacks something for is skipped, with the reason. An exception
    of the function is a failure.

    Examples
    --------
    >>> import numpy as np
    >>> import arrattn
    >>> from arrattn.testing import check
    >>> def mean(q, k, v, /):
    ...     return np.broadcast_to(np.mean(v, -2, keepdims=True), (*q.shape[:-1], v.shape[-1]))
    >>> laws = ["convex-hull", "query-order", "equals-the-equation"]
    >>> report = check(mean, xp=np, laws=laws, lacks=["gqa", "broadcast", "empty"])
    >>> sorted(report.passed), sorted(report.failed)
    (['convex-hull', 'query-order'], ['equals-the-equation'])
    """
    subject = read_subject(
        attend,
        xp=xp,
        laws=laws,
        layout=layout,
        dtypes=dtypes,
        lacks=lacks,
        choices=choices,
        family=family,
    )
    return check_subject(
        subject, laws=read_laws(laws, subject.family), examples=examples, seed=seed
    )


def read_subject(
    attend: Callable[..., Any],
    *,
    xp: Any = "numpy",
    laws: str | Sequence[str] | None = None,
    layout: str = "bhnd",
    dtypes: Sequence[str] | None = None,
    lacks: Iterable[str] | Mapping[str, str] = (),
    choices: Mapping[str, str] | None = None,
    family: str | None = None,
) -> Subject:
    """Read the arguments of `check`."""
    if not callable(attend):
        msg = f"attend: expected a function, got {attend!r}"
        raise TypeError(msg)
    if layout not in LAYOUTS:
        msg = f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}"
        raise ValueError(msg)
    library = read_library(xp)
    if family is None:
        family = laws if isinstance(laws, str) and laws in FAMILIES else _family(attend, laws)
    if family not in FAMILIES:
        msg = f"family: expected one of {', '.join(FAMILIES)}, got {family!r}"
        raise ValueError(msg)
    unknown = [x for x in dtypes or () if x not in DTYPES]
    if unknown:
        msg = f"dtypes: expected some of {', '.join(DTYPES)}, got {unknown}"
        raise ValueError(msg)
    if set(choices or ()) - set(CHOICES):
        msg = f"choices: expected some of {', '.join(CHOICES)}, got {list(choices or ())}"
        raise ValueError(msg)
    missing = read_lacks(attend, lacks, ARGUMENTS[family])
    if layout == "bnhd":
        missing.setdefault("rank", "with positions before heads there is always a head axis")
    return Subject(
        attend,
        library,
        family,
        layout=layout,
        dtypes=tuple(dtypes or library.dtypes),
        lacks=missing,
        choices=dict(choices or {}),
        imported=imported(attend),
    )


def _family(attend: Callable[..., Any], laws: str | Sequence[str] | None) -> str:
    """The family that the signature tells, unless the laws by name are of none but others."""
    guessed = family_of(attend)
    names = [laws] if isinstance(laws, str) else list(laws or ())
    named = [LAWS[name].families for name in names if name in LAWS]
    possible = [f for f in FAMILIES if all(f in x for x in named)]
    return guessed if guessed in possible or not possible else possible[0]


def imported(function: Callable[..., Any]) -> str:
    """The line that imports a function under the name `attend`, where there is one."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or "<" in name or module == "__main__":
        return ""
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return ""
    if found is not function:
        return ""
    first, _, rest = name.partition(".")
    if rest:
        return f"from {module} import {first}\nattend = {name}"
    return f"from {module} import {name} as attend"


def read_laws(laws: str | Sequence[str] | None, family: str) -> list[Law]:
    """List laws by family or by name."""
    if laws is None or laws in FAMILIES:
        return [x for x in LAWS.values() if family in x.families]
    names = [laws] if isinstance(laws, str) else list(laws)
    unknown = [name for name in names if name not in LAWS]
    if unknown:
        msg = f"laws: expected a family or names of laws, got {', '.join(map(repr, unknown))}"
        raise ValueError(msg)
    return [LAWS[name] for name in names]


def check_subject(
    subject: Subject,
    *,
    laws: Iterable[Law],
    examples: int | None = None,
    seed: int = 0,
    progress: Callable[[Result], None] | None = None,
) -> Report:
    """Try laws one after the other, and say what became of each as soon as it is known."""
    if examples is None:
        examples = COMPILED_EXAMPLES if subject.takes_time else EXAMPLES
    results = {}
    for n, x in enumerate(laws):
        results[x.name] = check_law(x, subject, examples=examples, seed=seed)
        if n % 10 == 9:
            subject.library.forget()
        if progress:
            progress(results[x.name])
    return Report(results)


def check_law(law: Law, subject: Subject, *, examples: int, seed: int) -> Result:
    """Try one law."""
    missing = law.missing(subject)
    if missing is not None:
        return Result(law.name, "skipped", missing)
    examples = examples if law.most is None else min(examples, law.most)
    search = _Search(law, subject)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # Flaky: the function gave another result to the same input; the example stands.
        with contextlib.suppress(BrokenLawError, Flaky, _Enough):
            search.go(examples, seed)
    if search.smallest is None:
        return Result(law.name, "passed", "", search.tried)
    found = search.smallest
    if subject.choices.get(law.choice):
        return Result(law.name, "differs", subject.choices[law.choice], search.tried, found)
    return Result(law.name, "failed", found.text, search.tried, found)


class _Search:
    """Tries a law on examples, and keeps the smallest that breaks it."""

    def __init__(self, law: Law, subject: Subject) -> None:
        self.law, self.subject = law, subject
        self.tried = self.since = 0
        self.smallest: Counterexample | None = None
        self.size = 0

    def go(self, examples: int, seed: int) -> None:
        test = given(self.law.given(self.subject))(self.one)
        how = settings(
            max_examples=examples,
            database=None,
            deadline=None,
            derandomize=False,
            phases=(Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
        )
        seeded(seed)(how(test))()

    def one(self, example: Any) -> None:
        if self.smallest is None:
            self.tried += 1
        else:
            self.since += 1
            if self.since > (COMPILED_SHRINKS if self.subject.takes_time else SHRINKS):
                raise _Enough
        run = Run(self.subject)
        try:
            self.law.check(run, *(example if isinstance(example, tuple) else (example,)))
        except BrokenLawError as broken:
            self.keep(run, broken)
            raise

    def keep(self, run: Run, broken: BrokenLawError) -> None:
        """Write the example down if it is no larger than the smallest so far."""
        size = sum(call.size for call in run.calls)
        if self.smallest is None or size <= self.size:
            self.size = size
            self.smallest = Counterexample(broken.text, run.script(broken))


def pytest_laws(attend: Callable[..., Any], **how: Any) -> Callable[[str], None]:
    """
    Make a pytest test of every law.

    Parameters
    ----------
    attend : callable
        The function under test.
    **how : object
        Keyword arguments of `check`.

    Returns
    -------
    callable
        A test with one parameter, the name of the law.

    See Also
    --------
    check : The same, as a report.

    Examples
    --------
    In a test file, one line:

    >>> import arrattn
    >>> from arrattn.testing import pytest_laws
    >>> test_laws = pytest_laws(arrattn.attention, xp="numpy", laws="dense")
    """
    import pytest

    laws = how.pop("laws", None)
    subject_how = {n: x for n, x in how.items() if n not in {"examples", "seed"}}
    subject = read_subject(attend, laws=laws, **subject_how)
    search = {"examples": how.get("examples"), "seed": how.get("seed", 0)}

    @pytest.mark.parametrize("name", [x.name for x in read_laws(laws, subject.family)])
    def test_laws(name: str) -> None:
        result = check_subject(subject, laws=[LAWS[name]], **search).results[name]
        if result.status == "skipped":
            pytest.skip(result.reason)
        if result.status == "differs":
            pytest.xfail(f"differs by choice: {result.reason}")
        if result.status == "failed":
            pytest.fail(f"{LAWS[name].statement}\n{result.counterexample}", pytrace=False)

    return test_laws
