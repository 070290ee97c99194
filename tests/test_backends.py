"""The declaration of array libraries, and what is made from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lanes import LANES, Lane

from arrattn import attention, backends, cli

PAGE = Path(__file__).parent.parent / "docs" / "backends.md"


def test_the_page_is_the_declaration() -> None:
    assert PAGE.read_text() == backends.markdown(), (
        "docs/backends.md is stale: arrattn backends --markdown > docs/backends.md"
    )


def test_every_library_and_device_has_a_lane() -> None:
    declared = {(x.name, d.name) for x in backends.LIBRARIES for d in x.devices}
    assert {(lane.declared.name, lane.device) for lane in LANES} == declared


def test_the_lane_is_what_it_says(lane: Lane) -> None:
    assert lane.missing is None
    out = lane.call(attention, *np.ones((3, 1, 2, 2)), dtype="float32")
    assert lane.lazy == hasattr(out, "compute")


@pytest.mark.parametrize("dtype", backends.DTYPES)
def test_the_declared_dtypes_are_those_that_work(lane: Lane, dtype: str) -> None:
    if lane.declared.supports(dtype):
        out = lane.call(attention, *np.ones((3, 1, 2, 2)), dtype=dtype)
        lane.check(out, np.ones((1, 2, 2)), dtype=dtype, within=0.0)
        return
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the library says
        lane.call(attention, *np.ones((3, 1, 2, 2)), dtype=dtype)


def test_devices_without_a_run_are_marked() -> None:
    untried = {d.name for x in backends.LIBRARIES for d in x.devices if not d.tried}
    assert untried == {"cuda", "gpu"}
    assert "cuda (never run yet)" in backends.markdown()


def test_a_library_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="expected one of numpy, torch"):
        backends.library("tensorflow")


def test_the_command_lists_what_is_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends"]) == 0
    text = capsys.readouterr().out
    for declared in backends.LIBRARIES:
        assert declared.name in text
    assert np.__version__ in text


@pytest.mark.parametrize("width", [80, 139, 140, 200])
def test_no_word_is_broken_in_a_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", "50")
    monkeypatch.setenv("TERM", "dumb")
    assert cli.main(["backends"]) == 0
    text = capsys.readouterr().out
    assert ("Array libraries" in text) == (width >= cli.TABLE_WIDTH)
    for row in backends.rows(here=True):
        titles = row[0] == "library" and width < cli.TABLE_WIDTH  # its own is not in lines
        for word in " ".join(row[titles:]).split():
            assert word in text


def test_what_installs_each_library() -> None:
    torch, strict = backends.library("torch"), backends.library("array-api-strict")
    assert torch.install == 'pip install "arrattn[torch]"'
    assert torch.install_in_checkout == 'pip install -e ".[torch]"'
    assert backends.library("numpy").install_in_checkout == "pip install -e ."
    assert strict.how_to_install == strict.install == "pip install array-api-strict"


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["backends", "--markdown"]) == 0
    assert capsys.readouterr().out == backends.markdown()


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, says in (
        (["--help"], "side by side"),
        (["compare", "--help"], "--lengths"),
        (["backends", "--help"], "--markdown"),
        (["--version"], "arrattn "),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(argv)
        assert left.value.code == 0
        assert says in capsys.readouterr().out


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([])
    assert left.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
