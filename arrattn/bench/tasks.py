"""``arrattn compare --task``: what is compared besides the families' time and memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from arrattn.bench import features, recall
from arrattn.bench.files import write_file
from arrattn.bench.inputs import read_inputs
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
    return _recall(settings) if settings.task == "recall" else _features(settings)


def _recall(settings: Settings) -> int:
    scores = list(recall.run(settings.seed))
    head, *body = recall.rows(scores)
    print(markdown(head, body))
    print("\nshare of questions answered; written: how often each key was")
    return _picture(settings, lambda path: recall.draw(path, scores))


def _features(settings: Settings) -> int:
    def progress(what: str, how_far: str) -> None:
        print(f"{what}: {how_far}", file=sys.stderr)

    # Attention by an exact kernel forms all pairs, so the shortest length will do.
    inputs = read_inputs(settings._replace(lengths=settings.lengths[:1]), progress)
    found: list[features.Curve] = []
    for curve in features.curves(inputs, settings.seed):
        found.append(curve)
        progress(f"{curve.kernel} kernel", curve.features)
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
