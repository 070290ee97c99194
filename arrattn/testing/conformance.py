"""The page ``docs/conformance.md``: who keeps which law, with versions and counterexamples."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import arrattn
from arrattn.testing.adapters import ADAPTERS, Adapter
from arrattn.testing.arrays import MODULES
from arrattn.testing.check import Report, check, check_subject, read_laws
from arrattn.testing.laws import LAWS

__all__ = ["markdown"]

LIBRARIES = {
    "numpy": "numpy",
    "torch": "torch",
    "jax": "jax",
    "array-api-strict": "array-api-strict",
}
WORKERS = 2
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "dense": arrattn.attention,
    "local": arrattn.local_attention,
    "sparse": arrattn.sparse_attention,
    "linear": arrattn.linear_attention,
    "delta": arrattn.delta_attention,
}
MARKS = {"passed": "pass", "failed": "**fails**", "differs": "choice", "skipped": "-"}

HEAD = """# Conformance

Attention functions that people use, held against the laws of
[`arrattn.testing`](testing.md). This page is generated, by

```
arrattn check --conformance > docs/conformance.md
```

on a machine with all of these libraries, CPU versions:

"""

LEGEND = """
In the tables

- **pass**: the law held on every example drawn;
- **choice**: the function does something else, and says so in its documentation, its source or
  its definition; where, stands below;
- **fails**: an example breaks the law, and nothing found says that it should. The laws are those
  of arrattn's contract: a failure is a difference from it, and not always a mistake of the
  other side;
- **-**: the function has no argument for it, or says that it does not take such input; the
  reasons stand below.

What a function is not asked in one law it is not asked in the others: where it has chosen
another alignment, the other laws use that; rows without a key do not count where they are not
promised to be 0; half precision, axes of length 0 and masks that broadcast are drawn only for
those that take them. Every counterexample is a program: paste it, and its last line fails.
"""


def markdown(*, examples: int = 40, seed: int = 0) -> str:
    """
    Check everything that is installed, and write the page.

    Parameters
    ----------
    examples : int, default: 40
        For each law; a quarter of that where every new shape is compiled.
    seed : int, default: 0
        The same seed draws the same examples.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    ImportError
        If a library is installed whose function does not load.
    """
    ours = [(family, name) for family in FUNCTIONS for name in LIBRARIES if _installed(name)]
    others = [x for x in ADAPTERS.values() if x.installed]
    # A process for each: what one library sets or fills up does not reach the next.
    with ProcessPoolExecutor(WORKERS, get_context("spawn"), max_tasks_per_child=1) as pool:
        # What does not import is to be known now, and not at the end.
        for loaded in [pool.submit(_load, x.target) for x in others]:
            loaded.result()
        found = [pool.submit(_peer, x.target, examples, seed) for x in others]
        also = [pool.submit(_own, *x, examples, seed) for x in ours]
        peers = {x.title: report.result() for x, report in zip(others, found, strict=True)}
        own = {x: report.result() for x, report in zip(ours, also, strict=True)}
    return "".join(f"{line}\n" for line in _page(own, peers)).rstrip() + "\n"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES.get(name, name).partition(".")[0]) is not None


def _load(target: str) -> None:
    try:
        ADAPTERS[target].load()
    except Exception as error:
        msg = f"{target} is installed, and does not load: {type(error).__name__}: {error}"
        raise ImportError(msg) from None


def _fewer(examples: int, name: str) -> int:
    return max(4, examples // 4) if name == "jax" else examples


def _own(family: str, name: str, examples: int, seed: int) -> Report:
    _say(f"arrattn {family} on {name}")
    if name == "jax":
        _wide()
    few = _fewer(examples, name)
    return check(FUNCTIONS[family], xp=name, laws=family, examples=few, seed=seed)


def _peer(target: str, examples: int, seed: int) -> Report:
    _say(target)
    adapter = ADAPTERS[target]
    if adapter.array == "jax":
        _wide()
    few = _fewer(examples, "jax" if adapter.slow else adapter.array)
    laws = read_laws("dense", "dense")
    return check_subject(adapter.subject(), laws=laws, examples=few, seed=seed)


def _wide() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _page(own: Mapping[tuple[str, str], Report], peers: Mapping[str, Report]) -> Iterator[str]:
    adapters = {x.title: x for x in ADAPTERS.values()}
    yield HEAD.rstrip()
    yield ""
    yield "| column | function | version |"
    yield "| --- | --- | --- |"
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in LIBRARIES if _installed(n))
    yield f"| arrattn | `arrattn.attention` | {arrattn.__version__} on {versions} |"
    for title in peers:
        yield f"| {title} | `{adapters[title].target}` | {adapters[title].version} |"
    yield LEGEND
    yield "## Dense attention"
    yield ""
    yield from _table(own, peers)
    yield ""
    yield "## arrattn, all families"
    yield ""
    yield from _families(own)
    for title, report in peers.items():
        yield ""
        yield from _section(adapters[title], report)


def _table(own: Mapping[tuple[str, str], Report], peers: Mapping[str, Report]) -> Iterator[str]:
    ours = {name: report for (family, name), report in own.items() if family == "dense"}
    yield "| law | " + " | ".join([*(f"arrattn, {n}" for n in ours), *peers]) + " |"
    yield "| --- |" + " --- |" * (len(ours) + len(peers))
    for law in LAWS.values():
        if "dense" in law.families:
            cells = [MARKS[x.results[law.name].status] for x in (*ours.values(), *peers.values())]
            yield f"| `{law.name}` | " + " | ".join(cells) + " |"


def _families(own: Mapping[tuple[str, str], Report]) -> Iterator[str]:
    names = list(dict.fromkeys(name for _, name in own))
    yield "Laws that hold, of those that could be asked:"
    yield ""
    yield "| family | " + " | ".join(names) + " |"
    yield "| --- |" + " --- |" * len(names)
    for family in FUNCTIONS:
        cells = []
        for name in names:
            report = own[family, name]
            cells.append(f"{len(report.passed)} of {len(report.results) - len(report.skipped)}")
        yield f"| {family} | " + " | ".join(cells) + " |"


def _section(adapter: Adapter, report: Report) -> Iterator[str]:
    yield f"## {adapter.title}"
    if adapter.note:
        yield ""
        yield f"{adapter.note[0].upper()}{adapter.note[1:]}."
    for title, results in (("Fails", report.failed), ("Differs by choice", report.differs)):
        for result in results.values():
            law, found = LAWS[result.law], result.counterexample
            yield ""
            yield f"### {title}: `{law.name}`"
            yield ""
            yield f"The law: {law.statement}."
            if result.status == "differs":
                yield ""
                yield f"The choice: {result.reason}."
            yield ""
            yield f"Found: {found.text.partition(chr(10))[0]}" if found else ""
            yield ""
            yield "```python"
            yield found.script.rstrip() if found else ""
            yield "```"
    yield ""
    yield "### Not asked"
    yield ""
    reasons: dict[str, list[str]] = {}
    for result in report.skipped.values():
        reasons.setdefault(result.reason, []).append(f"`{result.law}`")
    for reason, laws in reasons.items():
        yield f"- {reason}: {', '.join(laws)}"
