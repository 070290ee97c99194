"""Where q, k and v come from: a real model, the user's file, or random numbers."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrattn.bench.files import CannotRun
from arrattn.bench.settings import Settings

__all__ = ["Inputs", "Progress", "read_inputs"]

Host = np.ndarray[Any, Any]
#: Told what is being done, and how far.
Progress = Callable[[str, str], None]

RANDOM_WIDTH = 32  # as wide as the model's heads, so the two can be compared


class Inputs(NamedTuple):
    """
    Queries, keys and values on the host, as long as the longest length.

    Attributes
    ----------
    q : ndarray, shape (Hq, N, D)
        Queries.
    k : ndarray, shape (Hkv, N, D)
        Keys.
    v : ndarray, shape (Hkv, N, Dv)
        Values.
    source : str
        Where they come from, in words.
    """

    q: Host
    k: Host
    v: Host
    source: str


def read_inputs(settings: Settings, progress: Progress) -> Inputs:
    """
    Make or read the arrays that every family is given.

    Parameters
    ----------
    settings : Settings
        Says which.
    progress : callable
        Told what is being done, and how far.

    Returns
    -------
    Inputs
        As many heads as asked for, as long as the longest length.

    Raises
    ------
    CannotRun
        If the source is missing, too short, or not what it should be.
    """
    n = max(settings.lengths)
    if settings.qkv is not None:
        found = _read_file(settings.qkv)
    elif settings.random:
        found = _draw(n, settings.heads or 4, settings.seed)
    else:
        found = _run_model(n, settings.layer, progress)
    return _cut(found, n, settings.heads)


def _draw(n: int, heads: int, seed: int) -> Inputs:
    """Draw standard normal numbers: scores of unit variance."""
    rng = np.random.default_rng(seed)
    shape = (heads, n, RANDOM_WIDTH)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for _ in range(3))
    return Inputs(q, k, v, f"standard normal numbers, seed {seed}, head width {RANDOM_WIDTH}")


def _run_model(n: int, layer: int, progress: Progress) -> Inputs:
    """Capture one layer of all-MiniLM-L6-v2 along the Python language reference."""
    from arrattn.bench import minilm

    progress("all-MiniLM-L6-v2", "loading")
    model = minilm.load_model()
    if layer >= model.layers:
        msg = f"--layer {layer}: the model has layers 0 to {model.layers - 1}"
        raise CannotRun(msg)
    ids = model.tokenizer.encode(_language_reference(), add_special_tokens=False).ids
    if len(ids) < n:
        msg = f"--lengths: the text holds {len(ids)} tokens, got {n}; --random has no end"
        raise CannotRun(msg)

    def say(done: int, total: int) -> None:
        progress("all-MiniLM-L6-v2 reads the text", f"{done:,} of {total:,} tokens")

    q, k, v = minilm.capture(model, ids[:n], layer, progress=say)
    source = (
        f"all-MiniLM-L6-v2, layer {layer}, reading the Python language reference "
        f"in windows of {minilm.WINDOW} tokens"
    )
    return Inputs(q, k, v, source)


def _language_reference() -> str:
    """The text that every CPython carries for its `help()`, always in the same order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_file(path: Path) -> Inputs:
    """Read q, k, v from an ``.npz`` file and say everything that is wrong with it."""
    arrays = _load(path)
    reasons = [f"{name} is missing" for name in "qkv" if name not in arrays]
    if not reasons:
        reasons = [reason for name in "qkv" for reason in _faults(name, arrays[name])]
    if not reasons:
        arrays = {name: _three_axes(arrays[name]) for name in "qkv"}
        reasons = _disagreements(*(arrays[name].shape for name in "qkv"))
    if reasons:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        msg = (
            f"--qkv {path}: {'; '.join(reasons)}. Found {shapes or 'no arrays'}. "
            "Hint: np.savez(file, q=q, k=k, v=v) with q (Hq, N, D), k (Hkv, N, D), v (Hkv, N, Dv)."
        )
        raise CannotRun(msg)
    return Inputs(arrays["q"], arrays["k"], arrays["v"], f"{path.name}")


def _load(path: Path) -> dict[str, Host]:
    """Every array of an ``.npz`` file, nothing unpickled."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            msg = f"--qkv {path}: expected an .npz file with arrays q, k, v; got a single array"
            raise CannotRun(msg)
        with file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        msg = f"--qkv {path}: there is no such file"
        raise CannotRun(msg) from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        msg = (
            f"--qkv {path}: expected an .npz file with arrays q, k, v; it cannot be read ({error})"
        )
        raise CannotRun(msg) from error


def _faults(name: str, array: Host) -> list[str]:
    """What is wrong with one array, by itself."""
    if array.ndim not in {2, 3, 4} or (array.ndim == 4 and array.shape[0] != 1):
        return [f"{name} should be (heads, N, width), with a batch axis of 1 at most"]
    if array.dtype.kind != "f":
        return [f"{name} should be real floating, it is {array.dtype}"]
    if 0 in array.shape:
        return [f"{name} is empty"]
    if not np.all(np.isfinite(array)):
        return [f"{name} holds NaN or infinity"]
    return []


def _three_axes(array: Host) -> Host:
    return array.reshape((1, *array.shape)[-3:])


def _disagreements(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> list[str]:
    """What is wrong with the three shapes together."""
    reasons = []
    if q[2] != k[2]:
        reasons.append(f"q and k differ in width ({q[2]} and {k[2]})")
    if not q[1] == k[1] == v[1]:
        reasons.append(f"q, k and v differ in length ({q[1]}, {k[1]} and {v[1]})")
    if k[0] != v[0]:
        reasons.append(f"k and v differ in heads ({k[0]} and {v[0]})")
    elif q[0] % k[0]:
        reasons.append(f"the {q[0]} query heads are no multiple of the {k[0]} key heads")
    return reasons


def _cut(found: Inputs, n: int, heads: int | None) -> Inputs:
    """The first tokens and the first heads, whole groups of query heads where they share."""
    q, k, v, source = found
    if q.shape[1] < n:
        msg = f"--lengths: {source} is {q.shape[1]} tokens long, got {n}"
        raise CannotRun(msg)
    heads = q.shape[0] if heads is None else heads
    group = q.shape[0] // k.shape[0]
    if heads > q.shape[0] or heads % group:
        msg = f"--heads: expected a multiple of {group}, at most {q.shape[0]}; got {heads}"
        raise CannotRun(msg)
    few = heads // group
    q, k, v = (np.ascontiguousarray(x[:, :n]) for x in (q[:heads], k[:few], v[:few]))
    return Inputs(q, k, v, source)
