"""What ``arrattn check`` does; imports the suite, and with it hypothesis, only when run."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arrattn.testing.check import Report, Result
    from arrattn.testing.subject import Subject

__all__ = ["add_arguments", "run"]

MARKS = {"passed": "pass", "failed": "FAIL", "skipped": "skip", "differs": "differs"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add the options of the command.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Where to add them.
    """
    add = parser.add_argument
    add(
        "target",
        nargs="?",
        metavar="MODULE:CALLABLE",
        help="the function, such as arrattn:attention or mine.py's mine:attend; or one with a "
        "ready adapter, listed by --list",
    )
    add("--array", metavar="LIBRARY", help="whose arrays it takes (default: numpy)")
    add("--laws", metavar="LAWS", help="a family, or names of laws with commas between")
    add("--layout", choices=("bhnd", "bnhd"), default="bhnd", help="the order of its axes")
    add("--dtypes", metavar="NAMES", help="with commas between (default: all of the library)")
    add("--lacks", metavar="NAMES", default="", help="what it lacks, with commas between")
    add("--examples", type=int, metavar="N", help="for each law (default: 200; 10 on JAX)")
    add("--seed", type=int, default=0, help="the same seed draws the same examples")
    add("--json", metavar="FILE", help="also write the report there")
    add("--list", action="store_true", help="list the laws and the ready adapters, and stop")
    add(
        "--conformance",
        action="store_true",
        help="print docs/conformance.md: every adapter that is installed, and arrattn itself",
    )


def run(args: argparse.Namespace) -> int:
    """
    Run the command.

    Parameters
    ----------
    args : argparse.Namespace
        What was parsed.

    Returns
    -------
    int
        0 if no law failed, 1 if one did, 2 if the call makes no sense.
    """
    try:
        import arrattn.testing  # noqa: F401
    except ImportError as error:
        return _refuse(str(error))
    if args.list:
        return _list(args)
    if args.conformance:
        from arrattn.testing import conformance

        try:
            page = conformance.markdown(examples=args.examples or 40, seed=args.seed)
        except ImportError as error:
            return _refuse(str(error))
        sys.stdout.write(page)
        return 0
    if args.target is None:
        return _refuse("expected MODULE:CALLABLE, or --list")
    try:
        subject = _subject(args)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        return _refuse(str(error))
    return _check(subject, args)


def _refuse(text: str) -> int:
    print(f"arrattn check: error: {text}", file=sys.stderr)
    return 2


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _laws(args: argparse.Namespace) -> Any:
    names = _names(args.laws)
    return names[0] if len(names) == 1 else names or None


def _subject(args: argparse.Namespace) -> Subject:
    from arrattn.testing.adapters import adapter_of
    from arrattn.testing.check import read_laws, read_subject

    adapter = adapter_of(args.target)
    if adapter is not None:
        if not adapter.installed:
            msg = f"{args.target} needs: pip install {' '.join(adapter.packages)}"
            raise ImportError(msg)
        wide_jax("jax" if adapter.array == "jax" else "")
        read_laws(_laws(args), "dense")
        return adapter.subject()
    wide_jax(args.array or "")
    attend = load(args.target)
    subject = read_subject(
        attend,
        xp=args.array or "numpy",
        laws=_laws(args),
        layout=args.layout,
        dtypes=_names(args.dtypes) or None,
        lacks=_names(args.lacks),
    )
    read_laws(_laws(args), subject.family)
    module, _, name = args.target.partition(":")
    line = f"import {module}\nattend = {module}.{name}"
    return replace(subject, imported=line)


def wide_jax(array: str) -> None:
    """Let JAX have float64, in this process, which is the command's own."""
    if array in {"jax", "jax.numpy"}:
        import jax

        jax.config.update("jax_enable_x64", True)


def load(target: str) -> Callable[..., Any]:
    """
    Import a function by ``MODULE:CALLABLE``, from the working directory too.

    Parameters
    ----------
    target : str
        Both names, with a colon between.

    Returns
    -------
    callable
        The function.

    Raises
    ------
    ValueError
        If the target is not of that form.
    ImportError
        If there is no such module.
    AttributeError
        If the module has no such name.
    TypeError
        If it cannot be called.
    """
    module, colon, name = target.partition(":")
    if not colon or not module or not name:
        msg = f"expected MODULE:CALLABLE, such as arrattn:attention, got {target!r}"
        raise ValueError(msg)
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        msg = f"cannot import {module!r}: {error}"
        raise ImportError(msg) from error
    for part in name.split("."):
        if not hasattr(found, part):
            msg = f"{module} has no {name!r}"
            raise AttributeError(msg)
        found = getattr(found, part)
    if not callable(found):
        msg = f"expected a function, got {target} = {found!r}"
        raise TypeError(msg)
    function: Callable[..., Any] = found
    return function


def _list(args: argparse.Namespace) -> int:
    from arrattn.testing import LAWS
    from arrattn.testing.adapters import ADAPTERS
    from arrattn.testing.subject import FAMILIES

    wanted = [name for name in _names(args.laws) if name in FAMILIES]
    for law in LAWS.values():
        if not wanted or set(wanted) & set(law.families):
            print(f"{law.name}  ({', '.join(law.families)})")
            print(f"    {law.statement}\n    {law.source}")
    print("\nReady adapters:")
    for adapter in ADAPTERS.values():
        print(f"    {adapter.target}  {adapter.version if adapter.installed else 'not installed'}")
    return 0


def _check(subject: Subject, args: argparse.Namespace) -> int:
    from arrattn.testing.check import check_subject, read_laws

    laws = read_laws(_laws(args), subject.family)
    width = max(len(law.name) for law in laws)

    def show(result: Result) -> None:
        reason = "" if result.status == "passed" else result.reason.partition("\n")[0]
        print(
            f"{MARKS[result.status]:<8}{result.law:<{width}}  {reason[:160]}".rstrip(), flush=True
        )

    report = check_subject(
        subject, laws=laws, examples=args.examples, seed=args.seed, progress=show
    )
    for result in report.results.values():
        if result.counterexample is not None:
            _explain(result)
    print(_summary(report))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(as_json(args.target, subject, report), file, indent=2)
            file.write("\n")
    return 0 if report.ok else 1


def _explain(result: Result) -> None:
    from arrattn.testing import LAWS

    law, found = LAWS[result.law], result.counterexample
    assert found is not None  # noqa: S101
    print(f"\n== {MARKS[result.status]}: {law.name}")
    print(f"law:      {law.statement}\nsource:   {law.source}\nfound:    {found.text}")
    if result.status == "differs":
        print(f"choice:   {result.reason}")
    print(f"\n{found.script}")


def _summary(report: Report) -> str:
    counts = dict.fromkeys(MARKS, 0)
    for result in report.results.values():
        counts[result.status] += 1
    return (
        f"{counts['passed']} passed, {counts['failed']} failed, {counts['differs']} differ by a "
        f"documented choice, {counts['skipped']} skipped"
    )


def as_json(target: str, subject: Subject, report: Report) -> dict[str, Any]:
    """
    Give a report as what JSON can hold.

    Parameters
    ----------
    target : str
        The function's name.
    subject : Subject
        The function.
    report : Report
        What became of the laws.

    Returns
    -------
    dict
        Names, numbers and texts.
    """
    results: Sequence[Any] = [
        {
            "law": x.law,
            "status": x.status,
            "reason": x.reason,
            "examples": x.examples,
            "counterexample": None if x.counterexample is None else x.counterexample.script,
        }
        for x in report.results.values()
    ]
    return {
        "target": target,
        "family": subject.family,
        "array": subject.library.name,
        "dtypes": list(subject.dtypes),
        "ok": report.ok,
        "laws": results,
    }
