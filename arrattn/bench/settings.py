"""What is to be compared: the options of ``arrattn compare``, checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from arrattn.backends import DTYPES, FAMILIES, LIBRARIES
from arrattn.bench.files import INSTALL, CannotRun, require_files

__all__ = [
    "INSTALL_DEMO",
    "Settings",
    "add_arguments",
    "read_lengths",
    "read_positive",
    "read_settings",
]

INSTALL_DEMO = (
    f"{INSTALL}, or compare on random numbers, which need no model:\n    arrattn compare --random"
)
LENGTHS = (1024, 2048, 4096, 8192)
TASKS = ("families", "selection", "recall", "features")
FEATURE_MAPS = ("elu_plus_one", "relu", "softmax")


class Settings(NamedTuple):
    """
    The options of one comparison.

    Attributes
    ----------
    lengths : tuple of int
        Lengths N, growing.
    families : tuple of str
        Which families, dense first.
    array : str
        The array library's name, as `arrattn backends` lists it.
    device : str or None
        The library's name of a device; None is its default.
    dtype : str
        Of q, k and v.
    causal : bool
        Whether a query sees no later key.
    heads : int or None
        Query heads used; None is all there are.
    layer : int
        The model's layer whose q, k and v are captured, from 0.
    repeat : int
        Timed runs of each cell.
    window : tuple of (int, int)
        Of the local family.
    top_k : int or None
        Of the sparse family; None is its default, the square root of N.
    feature_map : str
        Of the linear family.
    num_features : int
        Random features of the softmax map.
    seed : int
        Of random inputs and random features.
    random : bool
        Random numbers instead of the model.
    qkv : Path or None
        The user's own arrays instead of the model.
    plot : Path or None
        Where the picture goes.
    json : Path or None
        Where the record goes.
    task : str
        Of `TASKS`: what is compared.
    """

    lengths: tuple[int, ...] = LENGTHS
    families: tuple[str, ...] = FAMILIES
    array: str = "numpy"
    device: str | None = None
    dtype: str = "float32"
    causal: bool = False
    heads: int | None = 4
    layer: int = 3
    repeat: int = 5
    window: tuple[int, int] = (128, 128)
    top_k: int | None = None
    feature_map: str = "relu"
    num_features: int = 256
    seed: int = 0
    random: bool = False
    qkv: Path | None = None
    plot: Path | None = None
    json: Path | None = None
    task: str = "families"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """
    Add the options of ``arrattn compare``.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        The command's parser.
    """
    add = parser.add_argument
    about = "families side by side; ways to choose in sparse attention; recall of pairs; random"
    add("--task", choices=TASKS, default="families", help=f"{about} features (families)")
    add("--lengths", type=read_lengths, metavar="N,N,...", help="lengths (1024,2048,4096,8192)")
    add("--families", type=_families, default=FAMILIES, metavar="NAME,...", help="(all four)")
    names = [library.name for library in LIBRARIES]
    add("--array", choices=names, default="numpy", help="the array library (numpy)")
    add("--device", help="the library's name of a device, such as cuda (its default)")
    add("--dtype", choices=DTYPES, default="float32", help="of q, k and v (float32)")
    add("--causal", action="store_true", help="no query sees a later key")
    add("--heads", type=read_positive, help="query heads used (4; all with --qkv)")
    add("--layer", type=_count, default=3, help="layer of the model, from 0 (3, of 0 to 5)")
    add("--repeat", type=read_positive, default=5, help="timed runs of each cell (5)")
    add("--window", type=_window, metavar="L,R", help="of local (128,128; causal 256,0)")
    add("--top-k", type=_count, help="keys beside its own block, of sparse (square root of N)")
    add("--feature-map", choices=FEATURE_MAPS, default="relu", help="of linear (relu)")
    add("--num-features", type=read_positive, default=256, help="of the softmax feature map (256)")
    add("--seed", type=_count, default=0, help="of random inputs and features (0)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--qkv", type=Path, metavar="FILE.npz", help="your own arrays q, k, v")
    source.add_argument("--random", action="store_true", help="random numbers: needs no model")
    add("--plot", type=Path, metavar="FILE.png", help="write a picture")
    add("--json", type=Path, metavar="FILE.json", help="write every number")


def read_settings(args: argparse.Namespace) -> Settings:
    """
    Read the parsed options, filling in what depends on others.

    Parameters
    ----------
    args : argparse.Namespace
        With the options of `add_arguments`.

    Returns
    -------
    Settings
        What is to be compared.

    Raises
    ------
    CannotRun
        If options contradict each other or a file could not be written.
    """
    require_files(plot=args.plot, json=args.json)
    if args.task != "families" and args.json is not None:
        msg = f"--json: --task {args.task} writes no record"
        raise CannotRun(msg)
    window = args.window or ((256, 0) if args.causal else (128, 128))
    return Settings(
        lengths=args.lengths or LENGTHS,
        families=args.families,
        array=args.array,
        device=args.device,
        dtype=args.dtype,
        causal=args.causal,
        heads=args.heads or (4 if args.qkv is None else None),
        layer=args.layer,
        repeat=args.repeat,
        window=window,
        top_k=args.top_k,
        feature_map=args.feature_map,
        num_features=args.num_features,
        seed=args.seed,
        random=args.random,
        qkv=args.qkv,
        plot=args.plot,
        json=args.json,
        task=args.task,
    )


def read_positive(text: str) -> int:
    """Read an option's whole number of at least 1."""
    number = _whole(text)
    if number < 1:
        msg = f"expected a whole number of at least 1, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def _count(text: str) -> int:
    number = _whole(text)
    if number < 0:
        msg = f"expected a whole number of at least 0, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        msg = f"expected a whole number, got {text!r}"
        raise argparse.ArgumentTypeError(msg) from None


def read_lengths(text: str) -> tuple[int, ...]:
    """Read an option's lengths, growing."""
    return tuple(sorted({read_positive(part) for part in text.split(",")}))


def _families(text: str) -> tuple[str, ...]:
    asked = [part.strip() for part in text.split(",")]
    unknown = [name for name in asked if name not in FAMILIES]
    if unknown:
        msg = f"expected names from {', '.join(FAMILIES)}, got {', '.join(map(repr, unknown))}"
        raise argparse.ArgumentTypeError(msg)
    return tuple(name for name in FAMILIES if name in asked)


def _window(text: str) -> tuple[int, int]:
    parts = [_count(part) for part in text.split(",")]
    if len(parts) != 2:
        msg = f"expected two whole numbers LEFT,RIGHT, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return parts[0], parts[1]
