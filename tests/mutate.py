"""
How many mistakes do the tests notice? mutmut over the algorithms, and the score.

Every mutant is a copy of the library with one small mistake in one function; it is killed
when a test that runs this function fails. Works on a copy of the checkout:

    python tests/mutate.py --keep DIR              every mutant, for hours; goes on in DIR
    python tests/mutate.py --sample 200 --seed 1   a sample
    python tests/mutate.py --files 3 --sample 25 --lanes numpy --examples 15
                                                   quick: of three files, run on NumPy alone

What is mutated, and which tests are run, stands in pyproject.toml under [tool.mutmut].
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COPIED = ("arrattn", "tests", "pyproject.toml", "README.md")
LANES = "numpy,strict,strict-device1,torch,dask"
NOT_KILLED = ("survived", "no tests", "suspicious", "not run")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mutation testing: prints the score")
    parser.add_argument("--sample", type=int, help="so many mutants (default: all)")
    parser.add_argument("--files", type=int, help="of so many files only (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which of them (default: 0)")
    parser.add_argument("--floor", type=float, default=0.0, help="fail below this percentage")
    parser.add_argument("--lanes", default=LANES, help=f"ways of running (default: {LANES})")
    parser.add_argument("--examples", type=int, default=40, help="of a law (default: 40)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    return parser.parse_args()


def prepare(folder: Path, lanes: str, examples: int) -> None:
    """A copy of the checkout, and the settings under which its tests run."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
    os.environ |= {
        "ARRATTN_EXAMPLES": str(examples),
        "ARRATTN_LANES": lanes,
        "ARRATTN_NUM_THREADS": "1",
        "HYPOTHESIS_PROFILE": "mutation",
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
    }
    os.chdir(folder)
    sys.path.insert(0, "")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Send what mutmut and its children print to a file; show the end of it if they fail."""
    log = Path("mutmut.log").absolute()
    terminal = os.dup(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        except BaseException:
            sys.stderr.write(log.read_text(errors="replace")[-3000:])
            raise
        finally:
            sys.stdout.flush()
            os.dup2(terminal, 1)


def run(arguments: argparse.Namespace) -> list[tuple[Any, str, int | None]]:
    """Let mutmut work on a sample; each mutant with its file and its exit code."""
    import mutmut.__main__ as mutmut
    from mutmut.configuration import config
    from mutmut.state import state
    from mutmut.utils.file_utils import walk_mutatable_files

    draw, chosen = random.Random(arguments.seed), []
    if arguments.files:
        paths = sorted(map(str, walk_mutatable_files()))
        config().only_mutate = draw.sample(paths, min(arguments.files, len(paths)))
    everything = mutmut.collect_source_file_mutation_data

    def sampled(**options: Any) -> Any:
        mutants, files = everything(**options)
        mutants = sorted(mutants, key=lambda x: str(x[1]))
        count = min(arguments.sample or len(mutants), len(mutants))
        chosen.extend(draw.sample(mutants, count))
        return list(chosen), files

    def first_test(names: Any) -> set[str]:
        return set(list(state().duration_by_test)[:1])

    mutmut.collect_source_file_mutation_data = sampled
    # All tests have just passed once, to see which functions they run: one more time is enough.
    mutmut.tests_for_mutant_names = first_test
    with quietly():
        mutmut._run((), arguments.jobs)
    return [(data, name, data.exit_code_by_key[name]) for data, name, _ in chosen]


def report(mutants: list[tuple[Any, str, int | None]]) -> float:
    """Print who lives on, and the score; the percentage of killed ones."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    counts: Counter[str] = Counter()
    for data, name, code in sorted(mutants, key=lambda x: str(x[1])):
        # mutmut calls it a timeout, too, when pytest could not find a test.
        status = "not run" if code == 255 else status_by_exit_code[code]
        counts[status] += 1
        if status in NOT_KILLED:
            lines = get_diff_for_mutant(name, path=data.path).splitlines()[2:]
            changed = [line for line in lines if line[:1] in {"+", "-"}]
            print(f"\n{name}: {status}", *changed, sep="\n    ")
    lived = sum(counts[status] for status in NOT_KILLED)
    score = 100 * (1 - lived / max(counts.total(), 1))
    print("\n" + ", ".join(f"{n} {status}" for status, n in counts.most_common()))
    print(f"mutation score: {score:.1f} % of {counts.total()} mutants")
    return score


def main() -> int:
    arguments = read_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder, arguments.lanes, arguments.examples)
        score = report(run(arguments))
        os.chdir(ROOT)
    if score < arguments.floor:
        print(f"below the floor of {arguments.floor} %", file=sys.stderr)
    return int(score < arguments.floor)


if __name__ == "__main__":
    sys.exit(main())
