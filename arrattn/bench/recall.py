"""
``arrattn compare --task recall``: who finds the value that was written under a key?

Multi-query associative recall [1]_ with weights set by hand: tokens that write pairs of a key
and a value, and then tokens that ask for each key, in another order. An answer counts if the
output is nearer to the right value than to any other that was written.

References
----------
.. [1] Arora et al., Zoology, 2023, arXiv:2312.04927.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrattn import (
    attention,
    delta_attention,
    feature_maps,
    linear_attention,
    local_attention,
    patterns,
    sparse_attention,
)

__all__ = ["Contender", "Score", "Writing", "contenders", "draw", "rows", "run", "write"]

Host = np.ndarray[Any, Any]

WIDTH = 64  # of keys and values
PAIRS = (8, 16, 32, 64, 128, 256, 512)
ITEMS = 4  # sequences over which a score is the mean
SHARPNESS = 128.0  # of softmax: no other key is worth anything beside the right one
NEWNESS = 24.0  # how much the newest key is ahead of the oldest, in scores


class Writing(NamedTuple):
    """
    Sequences of writes and then questions.

    Attributes
    ----------
    q, k, v : ndarray, shape (items, 1, N, width)
        Zeros where a token does not ask, or does not write.
    writes : int
        How many tokens write; they come first.
    values : ndarray, shape (items, writes, width)
        What was written.
    right : ndarray of int, shape (items, questions)
        Which of `values` is the answer.
    """

    q: Host
    k: Host
    v: Host
    writes: int
    values: Host
    right: Host


class Contender(NamedTuple):
    """
    One way to answer.

    Attributes
    ----------
    name : str
        What it is called.
    kept : str
        How many numbers it keeps of the past, per head.
    answer : callable
        From a `Writing` to outputs, (items, 1, N, width).
    family : str
        Whose colour it has.
    """

    name: str
    kept: str
    answer: Callable[[Writing], Host]
    family: str


class Score(NamedTuple):
    """
    How often one contender is right.

    Attributes
    ----------
    contender : Contender
        Whose it is.
    twice : bool
        Whether every key was written twice, its second value being the right one.
    shares : tuple of float
        Of the questions, for each of `PAIRS`.
    """

    contender: Contender
    twice: bool
    shares: tuple[float, ...]


def write(pairs: int, seed: int, *, twice: bool) -> Writing:
    """
    Draw sequences: keys and values of random direction and length 1.

    Parameters
    ----------
    pairs : int
        Number of keys.
    seed : int
        Of the directions and orders.
    twice : bool
        Whether every key is written again, with another value.

    Returns
    -------
    Writing
        The sequences.
    """
    rng = np.random.default_rng(seed)
    writes = 2 * pairs if twice else pairs
    n = writes + pairs

    def directions(count: int) -> Host:
        x = rng.standard_normal((ITEMS, count, WIDTH), dtype=np.float32)
        return np.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True))

    keys, values = directions(pairs), directions(writes)
    order = rng.permuted(np.tile(np.arange(pairs), (ITEMS, 1)), axis=-1)
    q, k, v = (np.zeros((ITEMS, 1, n, WIDTH), np.float32) for _ in range(3))
    k[:, 0, :writes], v[:, 0, :writes] = np.tile(keys, (1, writes // pairs, 1)), values
    q[:, 0, writes:] = np.take_along_axis(keys, order[..., None], axis=1)
    return Writing(q, k, v, writes, values, order + (writes - pairs))


def share_right(writing: Writing, out: Host) -> float:
    """
    Say how many of the questions are answered.

    Parameters
    ----------
    writing : Writing
        The questions.
    out : ndarray, shape (items, 1, N, width)
        Outputs.

    Returns
    -------
    float
        Their share.
    """
    likeness = out[:, 0, writing.writes :] @ np.swapaxes(writing.values, -1, -2)
    return float(np.mean(np.argmax(likeness, axis=-1) == writing.right))


def contenders() -> list[Contender]:
    """
    List the ways to answer, of all families.

    Returns
    -------
    list of Contender
        Softmax first, the delta rule last.
    """

    def softmax(function: Callable[..., Any], **options: Any) -> Callable[[Writing], Host]:
        def answer(w: Writing) -> Host:
            # What asks writes nothing.
            there = patterns.Prefix(w.writes)
            return np.asarray(function(w.q, w.k, w.v, pattern=there, scale=SHARPNESS, **options))

        return answer

    def newest(w: Writing) -> Host:
        n = w.k.shape[-2]
        bias = np.linspace(0.0, NEWNESS, n, dtype=np.float32)[None, None, :]
        return softmax(attention, bias=bias)(w)

    def linear(feature_map: Any) -> Callable[[Writing], Host]:
        def answer(w: Writing) -> Host:
            there = np.arange(w.k.shape[-2]) < w.writes
            out: Any = linear_attention(
                w.q, w.k, w.v,
                feature_map=feature_map, is_causal=True, key_mask=there, normalize=False,
            )  # fmt: skip
            return np.asarray(out)

        return answer

    def delta(w: Writing) -> Host:
        beta = np.zeros(w.k.shape[:-1], np.float32)
        beta[..., : w.writes] = 1
        return np.asarray(delta_attention(w.q, w.k, w.v, beta=beta))

    def kept(features: int) -> str:
        return f"{features * WIDTH:,}"

    squared, elu = feature_maps.squared, feature_maps.elu_plus_one
    favor = feature_maps.softmax(dim=WIDTH, num_features=256, rng=0, scale=8.0)
    near, best = {"window": (128, 0)}, {"top_k": 8}
    return [
        Contender("softmax", "all", softmax(attention), "dense"),
        Contender("softmax, newest first", "all", newest, "dense"),
        Contender(
            "local, window 128", f"{256 * WIDTH:,}", softmax(local_attention, **near), "local"
        ),
        Contender("sparse, best 8", "all", softmax(sparse_attention, **best), "sparse"),
        Contender("linear, elu + 1", kept(WIDTH), linear(elu), "linear"),
        Contender("linear, 256 features", kept(256), linear(favor), "linear"),
        Contender("linear, identity", kept(WIDTH), linear(None), "linear"),
        Contender("linear, squared", kept(squared.output_dim(WIDTH)), linear(squared), "linear"),
        Contender("delta rule", kept(WIDTH), delta, "delta"),
    ]


def run(seed: int) -> Iterator[Score]:
    """
    Ask everyone, of keys written once and of keys written twice.

    Parameters
    ----------
    seed : int
        Of what is written.

    Yields
    ------
    Score
        One contender's, over `PAIRS`.
    """
    for twice in (False, True):
        writings = [write(pairs, seed, twice=twice) for pairs in PAIRS]
        for contender in contenders():
            shares = tuple(share_right(w, contender.answer(w)) for w in writings)
            yield Score(contender, twice, shares)


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """
    Set the scores as text, under a head.

    Parameters
    ----------
    scores : sequence of Score
        What was found.

    Returns
    -------
    list of tuple of str
        The head, and one row for each.
    """
    head = ("", "numbers kept", "written", *(f"{n} pairs" for n in PAIRS))
    return [
        head,
        *(
            (
                score.contender.name,
                score.contender.kept,
                "twice" if score.twice else "once",
                *(f"{100 * share:.0f} %" for share in score.shares),
            )
            for score in scores
        ),
    ]


def draw(path: Path, scores: Sequence[Score]) -> None:
    """
    Draw the scores against the number of pairs, and write the picture to a file.

    Parameters
    ----------
    path : Path
        Where; the ending chooses the kind of picture.
    scores : sequence of Score
        What was found.
    """
    from arrattn.bench.plot import COLOURS, describe, save, sheet

    colours = COLOURS | {"delta": "#cc79a7"}
    figure = sheet((13.0, 4.2), "arrattn compare --task recall: 64 wide, weights set by hand")
    for axes, twice in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        seen: dict[str, int] = {}
        for score in (s for s in scores if s.twice == twice):
            family, name = score.contender.family, score.contender.name
            seen[family] = nth = seen.get(family, -1) + 1
            style = ("-", "--", "-.", ":")[nth]
            axes.plot(
                PAIRS, score.shares, style, color=colours[family], linewidth=1.8,
                marker="o", markersize=3.5, label=f"{name} ({score.contender.kept})",
            )  # fmt: skip
        describe(axes, "Every key written " + ("twice: the newer value" if twice else "once"), "")
        axes.set_xscale("log", base=2)
        axes.set_xticks(PAIRS, [str(n) for n in PAIRS])
        axes.set_xlabel("pairs of key and value", fontsize=9)
        axes.set_ylim(-0.03, 1.05)
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right center", fontsize=8,
        title="(numbers kept of the past, per head)", title_fontsize=8,
    )  # fmt: skip
    save(figure, path, dpi=100)
