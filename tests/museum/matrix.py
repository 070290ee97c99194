"""
Which law catches which exhibit: the whole matrix.

    python tests/museum/matrix.py            computes it, and writes caught.json beside this
    python tests/museum/matrix.py --print    the same as a table

`caught.json` says for every exhibit which laws have to catch it: at least one, and between
them all laws. It is what the test looks at; run this when laws or exhibits change.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

from museum import EXHIBITS, RIGHT, Exhibit

CAUGHT = Path(__file__).with_name("caught.json")
#: Examples of each law, and of one that has not caught what it should.
EXAMPLES, MORE = 8, 40


def laws_of(exhibit: Exhibit) -> list[str]:
    """The laws that the exhibit may break: those of gradients where it has some."""
    laws = [law for law in testing().LAWS.values() if exhibit.family in law.families]
    return [x.name for x in laws if (x.group == "gradients") == (exhibit.library == "torch")]


def testing() -> Any:
    """The module of laws."""
    return importlib.import_module("arrattn.testing")


def report_of(
    attend: Any, family: str, laws: list[str], *, library: str = "numpy", examples: int = EXAMPLES
) -> Any:
    """What `check` says of a function, on few examples, the smallest not looked for."""
    check = importlib.import_module("arrattn.testing.check")
    with mock.patch.object(check, "SHRINKS", 0):
        return testing().check(
            attend,
            xp=library,
            family=family,
            laws=laws,
            dtypes=("float64", "float32", "float16"),
            examples=examples,
            seed=0,
        )


def failed(exhibit: Exhibit, laws: list[str], *, examples: int = EXAMPLES) -> set[str]:
    """Those of the laws that catch the exhibit."""
    how = {"library": exhibit.library, "examples": examples}
    return set(report_of(exhibit.attend, exhibit.family, laws, **how).failed)


def missed(exhibit: Exhibit, laws: list[str]) -> set[str]:
    """Those that do not, with more examples neither."""
    left = set(laws) - failed(exhibit, laws)
    return left - failed(exhibit, sorted(left), examples=MORE) if left else left


def broken_by_the_right_one() -> set[str]:
    """Laws that prove nothing, since the right implementation breaks them too: none."""
    found: set[str] = set()
    for family, attend in RIGHT.items():
        names = [x.name for x in testing().LAWS.values() if family in x.families]
        found |= set(report_of(attend, family, names).failed)
    return found


def whole_matrix() -> dict[str, list[str]]:
    """Each exhibit with every law that catches it."""
    matrix, wrong = {}, broken_by_the_right_one()
    if wrong:
        print(f"broken by the right one: {', '.join(sorted(wrong))}", file=sys.stderr)
    for exhibit in EXHIBITS:
        laws = laws_of(exhibit)
        found = failed(exhibit, laws) - wrong
        matrix[repr(exhibit)] = sorted(found or failed(exhibit, laws, examples=MORE) - wrong)
        print(f"{exhibit}: {', '.join(matrix[repr(exhibit)]) or 'NOTHING'}", file=sys.stderr)
    return matrix


def few(matrix: dict[str, list[str]]) -> dict[str, list[str]]:
    """One law for every exhibit and one exhibit for every law, the rarest laws first."""
    count = Counter(law for laws in matrix.values() for law in laws)
    kept = {exhibit: set[str]() for exhibit in matrix}
    for law in sorted(count, key=lambda name: (count[name], name)):
        by = [exhibit for exhibit, laws in matrix.items() if law in laws]
        kept[min(by, key=lambda exhibit: (len(kept[exhibit]), by.index(exhibit)))].add(law)
    for exhibit, laws in matrix.items():
        if laws and not kept[exhibit]:
            kept[exhibit].add(min(laws, key=lambda name: (count[name], name)))
    return {exhibit: sorted(laws) for exhibit, laws in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="which law catches which exhibit")
    parser.add_argument("--print", action="store_true", help="a table in Markdown")
    as_table = parser.parse_args().print
    matrix = whole_matrix()
    CAUGHT.write_text(json.dumps(few(matrix), indent=1, sort_keys=True) + "\n")
    toothless = set(testing().LAWS) - {law for laws in matrix.values() for law in laws}
    print(f"laws without an exhibit: {', '.join(sorted(toothless)) or 'none'}", file=sys.stderr)
    if as_table:
        print("| exhibit | where it was seen | laws that catch it |\n| --- | --- | --- |")
        for exhibit in EXHIBITS:
            print(f"| {exhibit} | {exhibit.seen} | {', '.join(matrix[repr(exhibit)])} |")


if __name__ == "__main__":
    main()
