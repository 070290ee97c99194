"""``arrattn show``: what it reads, draws and counts; and that the page shows what it prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrattn import patterns
from arrattn.cli import main
from arrattn.show import draw_text, look, read_pattern

PAGE = Path(__file__).parents[1] / "docs" / "patterns.md"
COMMANDS = re.findall(r"```console\n\$ arrattn (show .*?)\n(.*?)\n```", PAGE.read_text(), re.S)


@pytest.mark.parametrize(("command", "printed"), COMMANDS, ids=[x[0] for x in COMMANDS])
def test_the_page_shows_what_the_command_prints(
    command: str, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.rstrip() == printed.rstrip()


def test_the_page_has_pictures() -> None:
    assert len(COMMANDS) >= 9


leaves = st.sampled_from(
    [
        "Causal()", "Window(3, None)", "Window(None, 0)", "Global(4)", "Prefix(2)", "Strided(3)",
        "Dilated(2, 1, None)", "Fixed(8, 2)", "Random(3, 7)", "Random(3, 7, size=4, keys=20)",
    ]
)  # fmt: skip
expressions = st.recursive(
    leaves,
    lambda x: st.one_of(
        st.builds("({} & {})".format, x, x),
        st.builds("({} | {})".format, x, x),
        st.builds("~({})".format, x),
    ),
    max_leaves=6,
)


@given(text=expressions)
def test_what_is_read_is_what_python_reads(text: str) -> None:
    names: dict[str, Any] = {name: getattr(patterns, name) for name in patterns.__all__}
    pattern = read_pattern(text)
    assert pattern == eval(text, names)
    assert str(read_pattern(str(pattern))) == str(pattern)


def test_lists_stand_for_arrays() -> None:
    blocks = read_pattern("Blocks([[1, 0], [1, 1]], 2)")
    np.testing.assert_array_equal(
        blocks.table(4, 4), np.kron([[1, 0], [1, 1]], np.ones((2, 2))).astype(bool)
    )
    ids = np.array([0, 0, 2, 3, 3])
    np.testing.assert_array_equal(
        read_pattern("Segments([0] * 2 + [2] + 2 * [3], (0, 0, 2, 3, 3))").table(5, 5),
        ids[:, None] == ids,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("windw(3, 4)", "did you mean Window?"),
        ("causal()", "did you mean Causal?"),
        ("Nothing()", "Nothing: expected one of Blocks, Causal"),
        ("Causal", "did you mean Causal(...)?"),
        ("Causal() and Window(3, 0)", "write & for and"),
        ("not Causal()", "~ for not"),
        ("Window(3)", "Window missing 1 required positional argument: 'right'"),
        ("Window(3, 4, far=1)", "Window got an unexpected keyword argument 'far'"),
        ("Window(-1, 0)", "Window: left: expected at least 0, got -1"),
        ("Window(True, 0)", "Window: left: expected an int, got True"),
        ("Random(1, 'a')", "Random: expected numbers, None or lists of them, got 'a'"),
        ("Window(2 + 1, 0)", "lists to be added or repeated, got 2 + 1"),
        ("Global(*[4])", "Global: expected numbers, None or lists of them, got *[4]"),
        ("Global(**{'n': 4})", "arguments one by one"),
        ("Where(lambda p, j: p == j)", "Where takes a function"),
        ("Pattern()", "Pattern: expected one of"),
        ("__import__('os').getcwd()", "__import__('os').getcwd: expected one of"),
        ("Global([].append(4))", "got [].append(4)"),
        ("Blocks([[1, 0], [1]], 4)", "Blocks: expected lists of whole numbers"),
        ("Segments([0] * 10**9, [0])", "got 10 ** 9"),
        ("Segments([0] * 1000000000, [0])", "at most 1048576 numbers"),
        ("Window(3, 4", "is not an expression at column 7"),
        ("", "is not an expression"),
        ("(" * 5000 + "Causal()", "is not an expression"),
        ("4", "got '4'"),
        ("Causal() + Causal()", "got 'Causal() + Causal()'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        read_pattern(text)
    assert main(["show", text]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("arrattn show: ")
    assert says in printed.err


def test_ids_that_do_not_fit_the_lengths_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "Segments([0], [0, 1])", "--nq", "1", "--nk", "3"]) == 2
    assert "expected one per key, shape (..., 3), got shape (2,)" in capsys.readouterr().err


@given(
    text=expressions,
    nq=st.integers(1, 40),
    nk=st.integers(1, 40),
    offset=st.integers(-5, 30),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    cell=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    segments=st.booleans(),
)
def test_counts_are_those_of_the_table(
    text: str,
    nq: int,
    nk: int,
    offset: int,
    tile: tuple[int, int],
    cell: tuple[int, int],
    segments: bool,
) -> None:
    pattern = read_pattern(text)
    if segments:
        ids = np.arange(nq) // 4, np.arange(nk) // 5
        pattern = pattern | patterns.Segments(*ids)
    table = pattern.table(nq, nk, q_offset=offset)
    table = table.reshape(nq, nk)
    seen = look(pattern, nq, nk, offset, tile, cell)
    assert seen.visible == table.sum()
    assert seen.visible <= seen.looked <= nq * nk
    for (t, u), share in np.ndenumerate(seen.shares):
        part = table[t * cell[0] : (t + 1) * cell[0], u * cell[1] : (u + 1) * cell[1]]
        assert share == part.mean()
    assert f"visible pairs: {seen.visible} of {nq * nk} (" in seen.sentences[0]
    assert f"{int((seen.plan.kinds > 0).sum())} of {seen.plan.kinds.size} visited" in str(
        seen.sentences
    )


def test_each_pair_is_drawn_where_there_is_room() -> None:
    table = (patterns.Window(2, 0) | patterns.Global(1)).table(5, 5)
    plain = draw_text(table.astype(float), exact=True, plain=True)
    assert [[x == "#" for x in line.split()] for line in plain] == table.tolist()
    halves = draw_text(table.astype(float), exact=True, plain=False)
    upper = [[x in "▀█" for x in line] for line in halves]
    lower = [[x in "▄█" for x in line] for line in halves]
    assert upper == table[::2].tolist()
    assert lower == [*table[1::2].tolist(), [False] * 5]


@pytest.mark.parametrize("plain", [False, True])
def test_nothing_and_everything_have_shades_of_their_own(plain: bool) -> None:
    line = draw_text(np.array([[0.0, 1e-9, 0.5, 1 - 1e-9, 1.0]]), exact=False, plain=plain)[0]
    assert line == (" .:+#" if plain else " ░▒▓█")


def test_a_large_pattern_is_scaled_to_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "Causal()", "--n", "1000", "--width", "50", "--ascii"]) == 0
    picture, words = capsys.readouterr().out.split("\n\n")
    lines = picture.splitlines()
    assert len(lines) == 25
    assert max(map(len, lines)) == 50
    assert words.splitlines()[:2] == [
        "Causal(), 1000 queries, 1000 keys",
        "visible pairs: 500500 of 1000000 (50.0%)",
    ]
    assert words.isascii()
    assert picture.isascii()


def test_fewer_queries_stand_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nq", "2", "--nk", "4", "--ascii"]
    assert main(["show", "Causal()", *options]) == 0
    assert capsys.readouterr().out.startswith("# # # .\n# # # #\n")
    assert main(["show", "Causal()", *options, "--q-offset", "0"]) == 0
    assert capsys.readouterr().out.startswith("# . . .\n# # . .\n")


def test_a_picture_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "longformer.png"
    assert main(["show", "Window(20, 20) | Global(3)", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "tiles of 64 x 64: " in capsys.readouterr().out
    assert main(["show", "Causal()", "--plot", str(tmp_path / "no" / "x.png")]) == 2
    assert main(["show", "Causal()", "--plot", str(tmp_path / "x.nothing")]) == 2
