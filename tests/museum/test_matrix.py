"""Every exhibit is caught, every law catches one, and the right implementations pass."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from arrattn import testing
from museum import EXHIBITS, RIGHT, Exhibit
from museum.matrix import CAUGHT, failed, laws_of, missed, report_of

#: For every exhibit the laws that have to catch it, as museum/matrix.py has found them.
EXPECTED: dict[str, list[str]] = json.loads(CAUGHT.read_text())

BY_TILES = [x for x in EXHIBITS if type(x.attend).__module__ == "museum.tiles"]


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=repr)
def test_every_exhibit_is_caught(exhibit: Exhibit) -> None:
    assert EXPECTED[repr(exhibit)]
    assert not missed(exhibit, EXPECTED[repr(exhibit)])


def test_every_law_catches_an_exhibit() -> None:
    assert {law for laws in EXPECTED.values() for law in laws} == set(testing.LAWS)


@pytest.mark.parametrize("exhibit", BY_TILES, ids=repr)
def test_what_is_right_in_one_tile_is_wrong_at_length_alone(exhibit: Exhibit) -> None:
    (law,) = EXPECTED[repr(exhibit)]
    short = [name for name in laws_of(exhibit) if name != law]
    assert not failed(exhibit, short)


@pytest.mark.parametrize("family", RIGHT)
def test_the_right_implementation_passes_every_law(family: str) -> None:
    laws = [name for name, law in testing.LAWS.items() if family in law.families]
    report = report_of(RIGHT[family], family, laws)
    assert report.ok, report
    assert report.passed


@pytest.mark.parametrize("law", testing.LAWS)
def test_a_law_that_is_emptied_is_missed(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*args: Any, **options: Any) -> None:
        return None

    exhibit = next(x for x in EXHIBITS if law in EXPECTED[repr(x)])
    monkeypatch.setitem(testing.LAWS, law, dataclasses.replace(testing.LAWS[law], check=nothing))
    assert missed(exhibit, [law]) == {law}
