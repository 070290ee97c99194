"""
Which law catches which exhibit: the whole matrix.

    python tests/museum/matrix.py            computes it, and writes caught.json beside this
    python tests/museum/matrix.py --print    the same as a table

`caught.json` says for every exhibit which laws have to catch it: at least one, and between
them all laws. It is what the test looks at; run this when laws or exhibits change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from museum import EXHIBITS, Exhibit

CAUGHT = Path(__file__).with_name("caught.json")
EXAMPLES = 12
DTYPES = ("float64", "float32", "float16")


def laws_of(family: str) -> list[str]:
    """The laws that are checked on NumPy arrays for a family."""
    from arrattn.testing import LAWS

    return [name for name, law in LAWS.items() if family in law.families]


def failed(exhibit: Exhibit, laws: list[str]) -> set[str]:
    """Those of the laws that catch the exhibit."""
    from arrattn.testing import check

    report = check(
        exhibit.attend,
        xp=exhibit.library,
        family=exhibit.family,
        laws=laws,
        dtypes=DTYPES,
        examples=EXAMPLES,
        seed=0,
    )
    return set(report.failed)


def whole_matrix() -> dict[str, list[str]]:
    """Each exhibit with every law that catches it."""
    matrix = {}
    for exhibit in EXHIBITS:
        matrix[repr(exhibit)] = sorted(failed(exhibit, laws_of(exhibit.family)))
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
    from arrattn.testing import LAWS

    parser = argparse.ArgumentParser(description="which law catches which exhibit")
    parser.add_argument("--print", action="store_true", help="a table in Markdown")
    as_table = parser.parse_args().print
    matrix = whole_matrix()
    CAUGHT.write_text(json.dumps(few(matrix), indent=1, sort_keys=True) + "\n")
    toothless = set(LAWS) - {law for laws in matrix.values() for law in laws}
    print(f"laws without an exhibit: {', '.join(sorted(toothless)) or 'none'}", file=sys.stderr)
    if as_table:
        print("| exhibit | where it was seen | laws that catch it |\n| --- | --- | --- |")
        for exhibit in EXHIBITS:
            print(f"| {exhibit} | {exhibit.seen} | {', '.join(matrix[repr(exhibit)])} |")


if __name__ == "__main__":
    main()
