"""``arrattn show``: a pattern's picture, and the plan that is made of it."""

from __future__ import annotations

import argparse
import ast
import difflib
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrattn import patterns
from arrattn._core.plan import EMPTY, FULL, Plan, make_plan
from arrattn._core.tiles import TilePairs
from arrattn.bench.files import CannotRun, require_files, require_plot, write_file
from arrattn.patterns import Pattern

__all__ = ["Picture", "add_arguments", "draw_text", "look", "read_pattern", "run"]

#: Patterns that can be written as text: all but the base, and the one made from a function.
NAMES = {name: getattr(patterns, name) for name in patterns.__all__}
NAMES = {name: x for name, x in NAMES.items() if name not in {"Pattern", "Where"}}

#: From nothing visible to all.
SHADES, ASCII_SHADES = " ░▒▓█", " .:+#"

#: The number of cells of a picture in a file, along each axis.
PIXELS = 512

#: Numbers that a list in an expression may have at most: it is made on the spot.
LONGEST = 1 << 20

UNWRITTEN, CANNOT = 1, 2


# -- An expression, read without running it ---------------------------------------------------


def read_pattern(text: str) -> Pattern:
    """
    Read a pattern as it is written in Python, without running it as Python.

    Parameters
    ----------
    text : str
        Patterns of `arrattn.patterns` by name, with numbers, None and lists of them as
        arguments, combined with ``&``, ``|``, ``~`` and parentheses. Lists can be added, and
        repeated by ``*``; lists of 0 and 1, or of such lists, stand for arrays.

    Returns
    -------
    Pattern
        What the text says.

    Raises
    ------
    ValueError
        If it says something else, or a pattern refuses its arguments.

    Examples
    --------
    >>> from arrattn.show import read_pattern
    >>> read_pattern("Causal() & (Window(64, 0) | Global(4))")
    Causal() & (Window(64, 0) | Global(4))
    >>> read_pattern("Segments([0] * 3 + [1], [0] * 3 + [1])").table(4, 4).astype(int)
    array([[1, 1, 1, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 0],
           [0, 0, 0, 1]])
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" at column {error.offset}" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        msg = f"{text!r} is not an expression{where}: {reason}"
        raise ValueError(msg) from None
    return _pattern(tree.body, text)


def _pattern(node: ast.expr, text: str) -> Pattern:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
        a, b = _pattern(node.left, text), _pattern(node.right, text)
        return a & b if isinstance(node.op, ast.BitAnd) else a | b
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return ~_pattern(node.operand, text)
    if isinstance(node, ast.Call):
        return _called(node, text)
    said = ast.get_source_segment(text.strip(), node) or text
    hint = ""
    if isinstance(node, ast.BoolOp) or (
        isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)
    ):
        hint = "; write & for and, | for or, ~ for not"
    elif isinstance(node, ast.Name):
        known = _nearest(node.id)
        hint = f"; did you mean {known}(...)?" if known else ""
    msg = f"expected patterns combined with &, | and ~, got {said!r}{hint}"
    raise ValueError(msg)


def _nearest(name: str) -> str | None:
    by_small = {known.lower(): known for known in NAMES}
    near = difflib.get_close_matches(name.lower(), by_small, 1)
    return by_small[near[0]] if near else None


def _called(node: ast.Call, text: str) -> Pattern:
    name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
    if name not in NAMES:
        near = _nearest(name)
        hint = f"; did you mean {near}?" if near else ""
        if name == "Where":
            hint = "; Where takes a function, which cannot be written here"
        msg = f"{name}: expected one of {', '.join(NAMES)}{hint}"
        raise ValueError(msg)
    args = [_argument(x, name) for x in node.args]
    options = {}
    for x in node.keywords:
        if x.arg is None:
            msg = f"{name}: expected arguments one by one, got ** {ast.unparse(x.value)}"
            raise ValueError(msg)
        options[x.arg] = _argument(x.value, name)
    if name == "Blocks":
        args = [x.astype(bool) if isinstance(x, np.ndarray) else x for x in args]
    try:
        made: Pattern = NAMES[name](*args, **options)
    except (TypeError, ValueError) as error:
        said = str(error).replace(f"{name}.__init__()", name)
        msg = said if said.startswith(name) else f"{name}: {said}"
        raise ValueError(msg) from None
    return made


def _argument(node: ast.expr, name: str) -> Any:
    value = _value(node, name)
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.dtype.kind not in "iub":
        msg = f"{name}: expected lists of whole numbers, all as long, got {ast.unparse(node)}"
        raise ValueError(msg)
    return array


def _value(node: ast.expr, name: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float | None):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, name)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(x, name) for x in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        return _list(node, name)
    msg = f"{name}: expected numbers, None or lists of them, got {ast.unparse(node)}"
    raise ValueError(msg)


def _list(node: ast.BinOp, name: str) -> list[Any]:
    """Lists added, or one repeated."""
    a, b = _value(node.left, name), _value(node.right, name)
    if isinstance(node.op, ast.Add) and isinstance(a, list) and isinstance(b, list):
        return a + b
    if isinstance(node.op, ast.Mult) and isinstance(a, int) and isinstance(b, list):
        a, b = b, a
    if isinstance(node.op, ast.Mult) and isinstance(a, list) and isinstance(b, int):
        if len(a) * b <= LONGEST:
            return a * b
        msg = f"{name}: expected at most {LONGEST} numbers in a list, got {ast.unparse(node)}"
        raise ValueError(msg)
    msg = f"{name}: expected lists to be added or repeated, got {ast.unparse(node)}"
    raise ValueError(msg)


# -- What there is to see ---------------------------------------------------------------------


class Picture(NamedTuple):
    """
    A pattern at some lengths.

    Attributes
    ----------
    shares : ndarray, shape (rows, columns)
        The share of visible pairs in each cell, queries down and keys to the right.
    visible : int
        Visible pairs.
    plan : Plan
        Which tiles are visited.
    looked : int
        Pairs in the tiles that are visited.
    """

    shares: np.ndarray[Any, Any]
    visible: int
    plan: Plan
    looked: int

    @property
    def sentences(self) -> list[str]:
        """The plan, in words."""
        plan, all_pairs = self.plan, max(self.plan.nq * self.plan.nk, 1)
        full, visited = int((plan.kinds == FULL).sum()), int((plan.kinds > EMPTY).sum())
        share = self.visible / all_pairs
        return [
            f"visible pairs: {self.visible} of {plan.nq * plan.nk} ({share:.1%})",
            f"tiles of {plan.tile[0]} x {plan.tile[1]}: {visited} of {plan.kinds.size} visited "
            f"({full} full, {visited - full} partial), {plan.kinds.size - visited} skipped",
            f"operations: {self.looked / all_pairs:.1%} of dense",
        ]


def look(
    pattern: Pattern,
    nq: int,
    nk: int,
    offset: int,
    tile: tuple[int, int],
    cell: tuple[int, int],
) -> Picture:
    """
    Look at a pattern; only cells that are neither empty nor full are looked into.

    Parameters
    ----------
    pattern : Pattern
        Of one item.
    nq, nk : int
        Number of queries and of keys.
    offset : int
        Position of the first query.
    tile, cell : tuple of (int, int)
        Queries and keys of a tile of the plan, and of a cell of the picture.

    Returns
    -------
    Picture
        What it looks like.
    """
    pattern = pattern.bound(nk)
    cells = make_plan(pattern, nq, nk, offset, cell)
    shares = np.zeros(cells.kinds.shape[-2:])
    visible = 0
    for t, u in np.argwhere(cells.kinds > EMPTY).tolist():
        (i0, i1), (j0, j1) = cells.rows(t), cells.columns(u)
        count = pairs = (i1 - i0) * (j1 - j0)
        if cells.kinds[t, u] != FULL:
            at = TilePairs(i0, i1 - i0, j0, j1 - j0, offset, xp=np, device=None)
            inside = pattern.visible(at)  # with axes of 1 before, where ids have them
            count = int(np.broadcast_to(inside, (*inside.shape[:-2], i1 - i0, j1 - j0)).sum())
        shares[t, u] = count / pairs
        visible += count
    plan = make_plan(pattern, nq, nk, offset, tile)
    sizes = [np.diff(starts, append=n) for starts, n in zip(plan.starts, (nq, nk), strict=True)]
    looked = int(((plan.kinds > EMPTY) * np.outer(*sizes)).sum())
    return Picture(shares, visible, plan, looked)


def draw_text(shares: np.ndarray[Any, Any], *, exact: bool, plain: bool) -> list[str]:
    """
    Draw cells as text.

    Parameters
    ----------
    shares : ndarray, shape (rows, columns)
        The share of visible pairs in each.
    exact : bool
        Whether a cell is one pair, and so two of them fit into one character.
    plain : bool
        Whether to use ASCII alone.

    Returns
    -------
    list of str
        Lines.
    """
    if plain and exact:
        return [" ".join(".#"[int(x)] for x in row) for row in shares.tolist()]
    if exact:
        seen = np.concatenate([shares, np.zeros((len(shares) % 2, shares.shape[1]))]) > 0
        pairs = zip(seen[::2].tolist(), seen[1::2].tolist(), strict=True)
        return ["".join(" ▄▀█"[2 * a + b] for a, b in zip(*both, strict=True)) for both in pairs]
    shades = ASCII_SHADES if plain else SHADES
    # Nothing and everything have shades of their own.
    steps = np.where(shares == 1, 4, np.ceil(np.minimum(shares, 0.999) * 3)).astype(int)
    return ["".join(shades[n] for n in row) for row in steps.tolist()]


# -- The command ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add the options of ``arrattn show``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command's parser.
    """
    from arrattn.bench.settings import read_positive

    add = parser.add_argument
    add("pattern", help='as in Python: "Causal() & (Window(64, 0) | Global(4))"')
    add("--n", type=read_positive, default=256, help="queries and keys (256)")
    add("--nq", type=read_positive, help="queries, where they are not as many as keys")
    add("--nk", type=read_positive, help="keys, where they are not as many as queries")
    add("--q-offset", type=int, help="position of the first query (the last one at the last key)")
    add("--tile", type=_tile, default=(64, 64), metavar="NQ,NK", help="of the plan (64,64)")
    add("--width", type=read_positive, help="characters of a line (as wide as the terminal)")
    add("--ascii", action="store_true", help="draw with ASCII characters only")
    add("--plot", type=Path, metavar="FILE.png", help="write a picture, and print none")
    names = ", ".join(NAMES)
    parser.epilog = f"Patterns: {names}; what each means: arrattn.patterns, docs/patterns.md"


def _tile(text: str) -> tuple[int, int]:
    from arrattn.bench.settings import read_positive

    parts = [read_positive(part) for part in text.split(",")]
    if len(parts) != 2:
        msg = f"expected two whole numbers NQ,NK, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return parts[0], parts[1]


def run(args: argparse.Namespace) -> int:
    """
    Show a pattern.

    Parameters
    ----------
    args : argparse.Namespace
        With the options of `add_arguments`.

    Returns
    -------
    int
        The exit status.
    """
    nq, nk = args.nq or args.n, args.nk or args.n
    offset = nk - nq if args.q_offset is None else args.q_offset
    try:
        pattern = _read_fitting(args.pattern, nq, nk, offset)
        require_files(plot=args.plot, json=None)
        if args.plot is not None:
            require_plot(args.plot)
    except (CannotRun, ValueError) as error:
        print(f"arrattn show: {error}", file=sys.stderr)
        return CANNOT
    if args.plot is not None:
        seen = look(pattern, nq, nk, offset, args.tile, (-(-nq // PIXELS), -(-nk // PIXELS)))
        written = write_file("show --plot", args.plot, lambda path: _plot(path, seen, str(pattern)))
    else:
        seen, written = _print_picture(args, pattern, nq, nk, offset), True
    where = "" if offset == 0 else f" from position {offset} on"
    print(f"{pattern}, {nq} queries{where}, {nk} keys")
    for sentence in seen.sentences:
        print(sentence)
    return 0 if written else UNWRITTEN


def _read_fitting(text: str, nq: int, nk: int, offset: int) -> Pattern:
    if abs(offset) >= patterns.FAR:
        msg = f"--q-offset: expected less than 2**40 in size, got {offset}"
        raise ValueError(msg)
    pattern = read_pattern(text)
    problems = pattern.problems(nq, nk, ())
    if problems:
        raise ValueError("; ".join(problems))
    return pattern


def _print_picture(
    args: argparse.Namespace, pattern: Pattern, nq: int, nk: int, offset: int
) -> Picture:
    plain = args.ascii or not _can_print(SHADES + "▄▀")
    width = args.width or shutil.get_terminal_size().columns
    # In ASCII, a pair is two characters wide and one high.
    exact = (2 * nk - 1 if plain else nk) <= width and nq <= 2 * width
    step = 1 if exact else -(-nk // width)
    cell = (1, 1) if exact else (min(2 * step, nq), step)
    seen = look(pattern, nq, nk, offset, args.tile, cell)
    print("\n".join(line.rstrip() for line in draw_text(seen.shares, exact=exact, plain=plain)))
    print()
    return seen


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _plot(path: Path, seen: Picture, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, wrap=True)
    plan = seen.plan
    extent = (0, plan.nk, plan.nq, 0)
    tiles = ListedColormap(["white", "#9ecae1", "#0072b2"])
    for axes, (image, colours, top, name) in zip(
        figure.subplots(1, 2),
        [
            (seen.shares, "Greys", 1, seen.sentences[0]),
            (plan.kinds, tiles, FULL, seen.sentences[1].replace(" visited ", " visited\n")),
        ],
        strict=True,
    ):
        axes.imshow(
            image, cmap=colours, vmin=0, vmax=top, extent=extent, interpolation="nearest",
            aspect="equal" if plan.nq == plan.nk else "auto",
        )  # fmt: skip
        axes.set(xlabel="key", ylabel="query", title=name)
        axes.title.set_fontsize(9)
    figure.savefig(path, dpi=120)
