"""Docstrings of all public objects are complete, by numpydoc's own checks."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest
from numpydoc.validate import validate

import arrattn
from arrattn import adapters, feature_maps, patterns, reference, testing
from arrattn.testing import strategies

ROOT = Path(__file__).parent.parent
CHECKS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["numpydoc_validation"]
EXCLUDED = set(CHECKS["checks"]) - {"all"}


def public() -> list[str]:
    names = [f"arrattn.{n}" for n in arrattn.__all__ if callable(getattr(arrattn, n))]
    for module in (adapters, patterns, feature_maps, reference, testing, strategies):
        names += [f"{module.__name__}.{n}" for n in module.__all__ if callable(getattr(module, n))]
    return names


@pytest.mark.parametrize("name", public())
def test_numpydoc(name: str) -> None:
    x = arrattn
    for part in name.split(".")[1:]:
        x = getattr(x, part)
    if not (inspect.isfunction(x) or inspect.isclass(x)):
        name = f"{type(x).__module__}.{type(x).__qualname__}"
    errors = [(code, text) for code, text in validate(name)["errors"] if code not in EXCLUDED]
    assert not errors, f"{name}: {errors}"


FAMILIES = (
    "attention",
    "local_attention",
    "sparse_attention",
    "linear_attention",
    "delta_attention",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_shape_letters_and_a_paper_are_there(name: str) -> None:
    text = inspect.getdoc(getattr(arrattn, name)) or ""
    for words in ("(..., Hq, Nq, D)", "(..., Hkv, Nk, D)", "(..., Hkv, Nk, Dv)", "arXiv:", ">>> "):
        assert words in text
