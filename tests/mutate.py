"""
How many mistakes do the tests notice? mutmut's mutants of the algorithms, and the score.

Every mutant is a copy of the library with one small mistake in one function; it is killed
when a test that runs this function fails. Works on a copy of the checkout:

    python tests/mutate.py --keep DIR              every mutant, for hours; goes on in DIR
    python tests/mutate.py --sample 200 --seed 1   a sample
    python tests/mutate.py --only "*/select.py" --sample 50
                                                   of one file, or of any pattern of paths
    python tests/mutate.py --files 3 --sample 25 --lanes numpy --examples 15
                                                   quick: of three files, run on NumPy alone
    python tests/mutate.py --mutants NAME NAME     these, by the names that a report gives them

What is mutated, and which tests are run, stands in pyproject.toml under [tool.mutmut].

mutmut makes the mutants; running them is done here. The tests are collected once, and every
mutant is tried in a fork of the process that has done so: first the tests that killed other
mutants of the same function, then the fastest.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("arrattn", "tests", "pyproject.toml", "README.md")
LANES = "numpy,strict,strict-device1,torch,dask"
SURVIVED, KILLED, BROKEN, UNTESTED = 0, 1, 3, 33
STATUS = {
    SURVIVED: "survived",
    KILLED: "killed",
    UNTESTED: "no tests",
    -signal.SIGXCPU: "endless",
    -signal.SIGALRM: "asleep",
    -signal.SIGSEGV: "crashed",
}
LIVES = ("survived", "no tests", "broken")
#: What a mutant may say in another way and mean the same: no test can tell, and none is asked to.
SAME = (
    (r",( strict=\w+|\s*(?=\)))", ""),  # of a `zip` whose parts are equally long
    (r"((?:work_)?space\()(?:f?\"[^\"]*\"|None)", r"\1"),  # what a work space is called
    (r"(_held\([^()]*, )(?:\"[^\"]*\"|None)", r"\1"),  # and another
    (r"(\.reshape\([^()]*-)\d(?=[,)])", r"\g<1>1"),  # NumPy reads any negative length as -1
)
#: Functions that give nothing but how much is done at once, or which of two equal ways is taken:
#: whatever they say, a call gives the same (tests call with other sizes), only at another time. No
#: test can tell what lives of them, so they are left out, killed or not.
SIZES = (
    "arrattn._core.gated._chunks_at_once",
    "arrattn._core.grouped._chunk_size",
    "arrattn._core.plan.choose_tile",
    "arrattn._core.select.rows_at_once",
    "arrattn._core.strips._cost_of_runs",
    "arrattn._core.strips._pairs_at_once",
)
#: A test of a mutant may take so many seconds, and so many times as long as it did before.
PATIENCE = (10, 20)
#: What waits for something that does not come is ended after so many seconds.
ASLEEP = 300


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="mutation testing: prints the score")
    parser.add_argument("--sample", type=int, help="so many mutants (default: all)")
    parser.add_argument("--files", type=int, help="of so many files only (default: all)")
    parser.add_argument("--only", help="of files only whose path matches this pattern")
    parser.add_argument("--mutants", nargs="+", help="these only, by name", metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="which of them (default: 0)")
    parser.add_argument("--floor", type=float, default=0.0, help="fail below this percentage")
    parser.add_argument("--lanes", default=LANES, help=f"ways of running (default: {LANES})")
    parser.add_argument("--examples", type=int, default=40, help="of a law (default: 40)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--keep", type=Path, help="work in this folder, and leave it")
    arguments = parser.parse_args()
    if arguments.keep and (arguments.files or arguments.only):
        parser.error("--keep is for mutants of all files: it would not find the others again")
    return arguments


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
        "PY_IGNORE_IMPORTMISMATCH": "1",
        "PYTHONUTF8": "1",
    }
    os.chdir(folder)
    sys.path.insert(0, "")


def make_mutants(arguments: argparse.Namespace) -> list[tuple[Any, str]]:
    """Let mutmut write the mutants; those of the sample, each with its file."""
    import mutmut.__main__ as mutmut
    from mutmut.configuration import config
    from mutmut.utils.file_utils import walk_mutatable_files

    draw = random.Random(arguments.seed)
    if arguments.files or arguments.only:
        paths = sorted(map(str, walk_mutatable_files()))
        paths = fnmatch.filter(paths, arguments.only or "*")
        if not paths:
            sys.exit(f"no file that is mutated matches {arguments.only}")
        config().only_mutate = draw.sample(paths, min(arguments.files or len(paths), len(paths)))
    Path("mutants").mkdir(exist_ok=True)
    with contextlib.redirect_stdout(None):
        mutmut.copy_src_dir()
        mutmut.copy_also_copy_files()
        mutmut.setup_source_paths()
        mutmut.create_mutants(arguments.jobs)
    everything, _ = mutmut.collect_source_file_mutation_data(mutant_names=())
    named = sorted(((data, name) for data, name, _ in everything), key=lambda x: x[1])
    if arguments.mutants:
        return asked_for(arguments.mutants, named)
    named = without_sizes(named, all_files=not (arguments.files or arguments.only))
    return draw.sample(named, min(arguments.sample or len(named), len(named)))


def asked_for(names: list[str], mutants: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """The mutants of these names, to be tried again."""
    found = [(data, name) for data, name in mutants if name in names]
    if missing := set(names) - {name for _, name in found}:
        sys.exit(f"no such mutants: {', '.join(sorted(missing))}")
    for data, name in found:
        data.exit_code_by_key[name] = None
    return found


def without_sizes(mutants: list[tuple[Any, str]], *, all_files: bool) -> list[tuple[Any, str]]:
    """The mutants, without those of `SIZES`."""
    left_out = Counter(x for _, name in mutants if (x := plain_name(name)) in SIZES)
    if all_files and (missing := set(SIZES) - set(left_out)):
        sys.exit(f"no such functions: {', '.join(sorted(missing))}")
    print(f"left out: {left_out.total()} of {len(mutants)} mutants, in functions that give sizes")
    return [(data, name) for data, name in mutants if plain_name(name) not in SIZES]


class Trial:
    """A pytest plugin: in place of the tests, those of every mutant, each mutant in a fork."""

    def __init__(self, mutants: list[tuple[Any, str]], jobs: int) -> None:
        self.mutants = mutants
        self.jobs = jobs
        self.failure = ""  # of the last test that failed, in pytest's words
        self.running: dict[int, tuple[Any, str, int]] = {}
        self.seconds: dict[int, float] = {}  # of a test
        self.tests: dict[str, set[int]] = defaultdict(set)  # that run a function
        self.killers: dict[str, list[int]] = defaultdict(list)  # of a function's mutants, so far

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Run all tests once, to see which functions they run; then try the mutants."""
        warnings.simplefilter("ignore")  # JAX's, of forks: this process has run nothing on it
        self.know_tests([item.nodeid for item in session.items], session)
        for data, name in self.mutants:
            if data.exit_code_by_key[name] is not None:
                continue
            order = self.order(name)
            if not order:
                self.note(data, name, UNTESTED)
                continue
            while len(self.running) >= self.jobs:
                self.reap()
            pid, answer = forked(lambda write, n=name, o=order: self.attempt(session, n, o, write))
            self.running[pid] = data, name, answer
        while self.running:
            self.reap()
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failure = report.longreprtext or self.failure

    def know_tests(self, names: list[str], session: pytest.Session) -> None:
        """What the tests do, from an earlier run over the same ones, or by running them."""
        file = Path("../tests.json").absolute()
        known, parts = json.loads(file.read_text()) if file.exists() else (None, [])
        if known != names:
            parts = self.measure(session)
            file.write_text(json.dumps((names, parts)))
        for seconds, seen in parts:
            self.seconds |= {int(i): x for i, x in seconds.items()}
            for function, tests in seen.items():
                self.tests[function].update(tests)

    def measure(self, session: pytest.Session) -> list[tuple[Any, Any]]:
        """In forks, so that this process stays as it is: threads do not outlive a fork."""
        running = [
            forked(lambda write, i=i: self.watch(session, i, write)) for i in range(self.jobs)
        ]
        parts = []
        for pid, answer in running:
            with os.fdopen(answer) as file:
                text = file.read()
            if os.waitpid(pid, 0)[1]:
                pytest.exit(f"without a mutant: {text or 'the tests broke off'}", 1)
            parts.append(json.loads(text))
        return parts

    def watch(self, session: pytest.Session, part: int, write: int) -> None:
        """A part of the tests, unchanged: how long each takes, and which functions it runs."""
        from mutmut.mutation.trampoline import set_mutant_under_test
        from mutmut.state import state

        set_mutant_under_test("stats")
        seconds, seen = {}, defaultdict(list)
        chosen = range(part, len(session.items), self.jobs)
        for i, after in itertools.pairwise([*chosen, None]):
            start = time.process_time()
            run_test(session, i, after)
            seconds[i] = time.process_time() - start
            for function in state()._stats:
                seen[function].append(i)
            state()._stats.clear()
            if session.testsfailed:
                text = f"{session.items[i].nodeid} fails\n{self.failure[-3000:]}"
                os.write(write, text.encode())
                os._exit(KILLED)
        with os.fdopen(write, "w") as file:
            json.dump((seconds, seen), file)

    def order(self, name: str) -> list[int]:
        """Tests that run the mutant's function; first what has killed others of it, then fast."""
        killers, fast = self.killers[function_of(name)], self.tests[function_of(name)]
        return list(dict.fromkeys([*killers, *sorted(fast, key=self.seconds.__getitem__)]))

    def attempt(self, session: pytest.Session, name: str, order: list[int], write: int) -> None:
        """Run tests until one fails, and say which; end without a word if none does."""
        from mutmut.mutation.trampoline import set_mutant_under_test

        set_mutant_under_test(name.replace("__init__.", ""))
        for i, after in itertools.pairwise([*order, None]):
            limit = int(time.process_time() + PATIENCE[0] + PATIENCE[1] * self.seconds[i])
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            signal.alarm(ASLEEP)
            run_test(session, i, after)
            if session.testsfailed:
                os.write(write, str(i).encode())
                os._exit(KILLED)

    def reap(self) -> None:
        """Wait for one of the mutants."""
        pid, status = os.wait()
        data, name, answer = self.running.pop(pid)
        with os.fdopen(answer) as file:
            if killer := file.read():
                killers = self.killers[function_of(name)]
                self.killers[function_of(name)] = list(dict.fromkeys([int(killer), *killers]))
        self.note(data, name, os.waitstatus_to_exitcode(status))

    def note(self, data: Any, name: str, code: int) -> None:
        data.exit_code_by_key[name] = code
        data.save()
        os.write(2, b"." if code == KILLED else b"s" if code == SURVIVED else b"?")


def function_of(name: str) -> str:
    """The function of a mutant, as mutmut writes it."""
    return name.replace("__init__.", "").rpartition("__mutmut_")[0]


def plain_name(name: str) -> str:
    """The function of a mutant, as it is written."""
    module, _, own = function_of(name).rpartition(".")
    return f"{module}.{own.removeprefix('x_').removeprefix('xǁ').replace('ǁ', '.')}"


def run_test(session: pytest.Session, i: int, after: int | None) -> None:
    session.config.hook.pytest_runtest_protocol(
        item=session.items[i], nextitem=None if after is None else session.items[after]
    )


def forked(work: Callable[[int], None]) -> tuple[int, int]:
    """Do the work in a process of its own; its number, and where to read what it writes."""
    read, write = os.pipe()
    if pid := os.fork():
        os.close(write)
        return pid, read
    code = SURVIVED
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        work(write)
    except BaseException:  # pytest's own exits among them
        code = BROKEN
    os._exit(code)


def run(arguments: argparse.Namespace) -> list[tuple[Any, str]]:
    """Try the mutants of the sample, in the folder that they and the tests are in."""
    from mutmut.configuration import config

    mutants = make_mutants(arguments)
    for data, _ in mutants:
        data.meta_path = data.meta_path.absolute()
    # pytest's own tracebacks parse the file that failed, which holds all of its mutants.
    options = ["-q", "--tb=native", "--capture=sys", "--rootdir=.", *config().pytest_add_cli_args]
    os.chdir("mutants")
    code = pytest.main(
        [*config().pytest_add_cli_args_test_selection, *options],
        plugins=[Trial(mutants, arguments.jobs)],
    )
    os.chdir("..")
    if code:
        sys.exit(f"pytest ended with {code}")
    return mutants


def report(mutants: list[tuple[Any, str]]) -> float:
    """Print who lives on, and the score; the percentage of killed ones."""
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    counts: Counter[str] = Counter()
    for data, name in sorted(mutants, key=lambda x: x[1]):
        status = STATUS.get(data.exit_code_by_key[name], "broken")
        counts[status] += 1
        if status != "killed":
            lines = get_diff_for_mutant(name, path=data.path).splitlines()[2:]
            changed = [line for line in lines if line[:1] in {"+", "-"}]
            if means_the_same(changed):
                counts[status] -= 1
                counts["the same"] += 1
                continue
            print(f"\n{name}: {status}", *changed, sep="\n    ")
    lived = sum(counts[status] for status in LIVES)
    told = counts.total() - counts["the same"]
    score = 100 * (1 - lived / max(told, 1))
    print("\n" + ", ".join(f"{n} {status}" for status, n in counts.most_common() if n))
    print(f"mutation score: {score:.1f} % of {told} mutants")
    return score


def means_the_same(changed: list[str]) -> bool:
    """Whether the lines taken out and those put in differ in what `SAME` names alone."""
    sides = []
    for sign in "-+":
        side = "\n".join(line[1:] for line in changed if line[0] == sign)
        for pattern, instead in SAME:
            side = re.sub(pattern, instead, side)
        sides.append(side)
    return sides[0] == sides[1]


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
