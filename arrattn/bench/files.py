"""Files that a command is to write: checked before it measures, written after it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["INSTALL", "CannotRun", "require_files", "require_plot", "write_file"]

INSTALL = (
    'install it with\n    pip install "arrattn[demo]"\n(in a checkout: pip install -e ".[demo]")'
)


class CannotRun(Exception):  # noqa: N818 (it is told to a person, not traced)
    """Why a command cannot run, in words for the one who asked for it."""


def require_files(*, plot: Path | None, json: Path | None) -> None:
    """
    Find out before the measuring, writing nothing, that a file could not be written.

    Parameters
    ----------
    plot : Path or None
        Where the picture goes.
    json : Path or None
        Where the record goes.

    Raises
    ------
    CannotRun
        If one could not be written, or both are the same file.
    """
    for option, path in (("--plot", plot), ("--json", json)):
        if path is not None:
            _require_writable(option, path)
    if plot is not None and json is not None and plot.resolve() == json.resolve():
        msg = f"--plot {plot}: --json would be written to the same file"
        raise CannotRun(msg)


def require_plot(path: Path) -> None:
    """
    Find out before the measuring that the picture could not be drawn after it.

    Parameters
    ----------
    path : Path
        Where the picture goes; its ending says which kind it is.

    Raises
    ------
    CannotRun
        If matplotlib is missing, or cannot write such a picture.
    """
    from arrattn.bench.plot import file_types, require_matplotlib

    try:
        require_matplotlib()
    except ImportError as error:
        msg = f"--plot needs the package {error.name}; {INSTALL}, or leave out --plot"
        raise CannotRun(msg) from error
    ending, kinds = path.suffix.strip(".").lower(), file_types()
    if ending not in kinds:
        what = f"no picture can be written as .{ending}" if ending else "the name has no ending"
        msg = f"--plot {path}: {what}; expected one of {', '.join(f'.{kind}' for kind in kinds)}"
        raise CannotRun(msg)


def write_file(option: str, path: Path, write: Callable[[Path], None]) -> bool:
    """
    Write one file; a failure is told, so that the other file is still written.

    Parameters
    ----------
    option : str
        The command and its option, such as ``"compare --json"``.
    path : Path
        Where.
    write : callable
        Writes it.

    Returns
    -------
    bool
        Whether it was written.
    """
    try:
        write(path)
    except (OSError, RuntimeError) as error:  # matplotlib's, where a kind of file needs LaTeX
        command, _, flag = option.partition(" ")
        why = getattr(error, "strerror", None) or error
        print(f"arrattn {command}: {flag} {path}: it was not written ({why})", file=sys.stderr)
        return False
    print(f"Wrote {path}")
    return True


def _require_writable(option: str, path: Path) -> None:
    parent = path.absolute().parent
    try:
        if path.is_dir():
            msg = f"{option} {path}: this is a folder, expected the name of a file"
            raise CannotRun(msg)
        if not parent.is_dir():
            msg = f"{option} {path}: there is no folder {path.parent}"
            raise CannotRun(msg)
        if not path.exists() and not os.access(parent, os.W_OK | os.X_OK):
            msg = f"{option} {path}: no file can be made in the folder {path.parent}"
            raise CannotRun(msg)
        if path.exists() and not os.access(path, os.W_OK):
            msg = f"{option} {path}: this file cannot be written"
            raise CannotRun(msg)
    except OSError as error:  # such as a name that is too long
        msg = f"{option} {path}: it cannot be written ({error.strerror})"
        raise CannotRun(msg) from error
