"""``arrattn compare --task``: recall, the error of features, and ways to choose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arrattn import cli
from arrattn.bench import features, recall, selection
from arrattn.bench.inputs import Inputs

pytest.importorskip("matplotlib")


def share(name: str, pairs: int, *, twice: bool) -> float:
    contender = next(c for c in recall.contenders() if c.name == name)
    writing = recall.write(pairs, 0, twice=twice)
    return recall.share_right(writing, contender.answer(writing))


def test_what_is_written_can_be_read_off() -> None:
    for twice in (False, True):
        w = recall.write(5, 0, twice=twice)
        assert w.k.shape == (recall.ITEMS, 1, w.writes + 5, recall.WIDTH)
        assert w.writes == (10 if twice else 5)
        np.testing.assert_array_equal(w.v[:, 0, : w.writes], w.values)
        # Whoever knows the last key like the question knows the answer.
        likeness = w.q[:, 0, w.writes :] @ np.swapaxes(w.k[:, 0, : w.writes], -1, -2)
        last = w.writes - 1 - np.argmax(likeness[..., ::-1] > 1 - 1e-6, axis=-1)
        np.testing.assert_array_equal(last, w.right)
        out = np.zeros_like(w.v)
        out[:, 0, w.writes :] = np.take_along_axis(w.values, w.right[..., None], axis=1)
        assert recall.share_right(w, out) == 1.0
        assert recall.share_right(w, -out) == 0.0


def test_softmax_forgets_nothing() -> None:
    assert share("softmax", 256, twice=False) == 1.0
    assert share("softmax, newest first", 256, twice=True) == 1.0


def test_a_sum_is_limited_by_its_state() -> None:
    name = "linear, identity"
    assert share(name, 16, twice=False) == 1.0
    assert share(name, 512, twice=False) < 0.5
    assert share("linear, squared", 512, twice=False) == 1.0  # 32 times as many numbers


def test_the_delta_rule_alone_overwrites() -> None:
    assert share("delta rule", 16, twice=True) == 1.0
    for name in ("softmax", "linear, identity", "linear, squared"):
        assert share(name, 16, twice=False) == 1.0
        assert share(name, 16, twice=True) < 0.75


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "PAIRS", (4, 8))
    monkeypatch.setattr(features, "WIDTHS", (32, 64))
    monkeypatch.setattr(features, "DRAWS", 2)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("task", ["recall", "features", "selection"])
def test_a_table_and_a_picture(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "it.png"
    options = ["--random", "--lengths", "80", "--heads", "2", "--plot", str(path)]
    assert cli.main(["compare", "--task", task, *options]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    words = {"recall": "| delta rule", "features": "| laplacian", "selection": "| blocks by mean"}
    assert words[task] in out


def test_tasks_write_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--json", str(tmp_path / "it.json")]
    assert cli.main(["compare", "--task", "recall", *options]) == 2
    assert "--json: --task recall writes no record" in capsys.readouterr().err


@pytest.mark.usefixtures("few")
def test_errors_are_those_of_the_exact_kernel() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (0.1 * rng.standard_normal((2, 40, 8)) for _ in range(3))
    found = list(features.curves(Inputs(q, k, v + 1.0, "here"), 0))
    assert [(c.kernel, c.features) for c in found] == [
        (kernel, name) for kernel, kinds in features.KINDS.items() for name in kinds
    ]
    # Of values that are all near 1, every mean is near 1, and so is every error near 0.
    assert all(0 < c.mean_error < 0.1 for c in found)
    positive = [c for c in found if c.features in ("positive", "hyperbolic")]
    assert all(0 < error < 0.2 for c in positive for errors in c.errors for error in errors)


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_ways_to_choose_are_counted_and_weighed(causal: bool) -> None:
    rng = np.random.default_rng(0)
    n, block = 90, 10
    q, k, v = (rng.standard_normal((2, n, 8)) for _ in range(3))
    found = {c.name: c for c in selection.curves(Inputs(q, k, v, "here"), causal=causal, seed=0)}
    assert list(found) == list(selection.WAYS)
    weights = np.exp(q @ np.swapaxes(k, 1, 2) / 8**0.5)
    weights = np.tril(weights) if causal else weights
    weights /= weights.sum(axis=-1, keepdims=True)
    at = np.arange(n)
    for nth, budget in enumerate(selection.BUDGETS):
        own = at[:, None] // block == at // block
        best = np.sort(np.where(own, -1.0, weights), axis=-1)[..., -budget * block :]
        held = np.sum(np.where(own, weights, 0.0), axis=-1) + np.sum(np.maximum(best, 0), axis=-1)
        exact = found["keys, exact"].points[nth]
        assert exact.mass == pytest.approx(float(np.mean(held)))
        some = np.sum(np.where(own, 0, 1) * (weights[0] > 0), axis=-1)
        seen = np.sum(own * (weights[0] > 0), axis=-1) + np.minimum(some, budget * block)
        # What a query sees is the same for all who choose as many; a window is cut at the ends.
        for name, curve in found.items():
            if name != "a window":
                assert curve.points[nth].keys == pytest.approx(float(np.mean(seen))), name
            assert curve.points[nth].mass <= exact.mass + 1e-12, name
    # Eight blocks beside the own one are all of the nine; a window has as many on both sides.
    for curve in found.values():
        every = causal or curve.name != "a window"
        assert (curve.points[-1].mass == pytest.approx(1.0)) == every
        assert (curve.points[-1].error < 1e-12) == every


def test_few_blocks_are_nothing_to_choose_from(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--random", "--lengths", "64", "--heads", "1"]
    assert cli.main(["compare", "--task", "selection", *options]) == 2
    assert "--task selection needs 73 tokens or more, got 64" in capsys.readouterr().err
