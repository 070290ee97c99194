"""``arrattn compare --task``: what is compared besides the families' time and memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from arrattn.bench import features, recall, selection
from arrattn.bench.files import write_file
from arrattn.bench.inputs import Inputs, read_inputs
from arrattn.bench.report import markdown
from arrattn.bench.settings import Settings

__all__ = ["run_task"]

UNWRITTEN = 1


def run_task(settings: Settings) -> int:
    """
    Run a task, print its table, and draw its picture where one is asked for.

    Parameters
    ----------
    settings : Settings
        The task, the seed, where activations come from, and where the picture goes.

    Returns
    -------
    int
        Exit status: 0, or 1 where the picture could not be written.
    """
    tasks = {"recall": _recall, "features": _features, "selection": _selection}
    return tasks[settings.task](settings)


def _recall(settings: Settings) -> int:
    scores = list(recall.run(settings.seed))
    head, *body = recall.rows(scores)
    print(markdown(head, body))
    print("\nshare of questions answered; written: how often each key was")
    return _picture(settings, lambda path: recall.draw(path, scores))


def _progress(what: str, how_far: str) -> None:
    print(f"{what}: {how_far}", file=sys.stderr)


def _inputs(settings: Settings) -> Inputs:
    """Those of the shortest length: tasks form all pairs."""
    return read_inputs(settings._replace(lengths=settings.lengths[:1]), _progress)


def _selection(settings: Settings) -> int:
    inputs = _inputs(settings)
    found: list[selection.Curve] = []
    for curve in selection.curves(inputs, causal=settings.causal, seed=settings.seed):
        found.append(curve)
        _progress("ways to choose", curve.name)
    heads, n, width = inputs.q.shape
    head, *body = selection.rows(found)
    print(markdown(head, body))
    kind = "causal" if settings.causal else "bidirectional"
    mean = selection.mean_error(inputs, causal=settings.causal)
    print(f"\n{inputs.source}; {kind}, {heads} heads of width {width}, {n:,} tokens")
    seen = ", ".join(f"{round(p.keys):,}" for p in found[0].points)
    print(f"share of dense attention's weight on the keys seen, and error; keys seen: {seen}")
    print(f"the plain mean of the values has error {mean:.3f}")
    title = f"arrattn compare --task selection: {inputs.source}, {kind}, {n:,} tokens"
    return _picture(settings, lambda path: selection.draw(path, found, mean, title))


def _features(settings: Settings) -> int:
    inputs = _inputs(settings)
    found: list[features.Curve] = []
    for curve in features.curves(inputs, settings.seed):
        found.append(curve)
        _progress(f"{curve.kernel} kernel", curve.features)
    heads, n, width = inputs.q.shape
    head, *body = features.rows(found)
    print(markdown(head, body))
    print(f"\n{inputs.source}; {heads} heads of width {width}, {n:,} tokens")
    print("error against attention by the exact kernel, the median of draws, by features")
    title = f"arrattn compare --task features: {inputs.source}, {n:,} tokens"
    return _picture(settings, lambda path: features.draw(path, found, title))


def _picture(settings: Settings, draw: Callable[[Path], None]) -> int:
    if settings.plot is None:
        return 0
    return 0 if write_file("compare --plot", settings.plot, draw) else UNWRITTEN
