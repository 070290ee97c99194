"""The record of a comparison as JSON: every number, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arrattn
from arrattn import backends
from arrattn.bench.families import Family
from arrattn.bench.findings import exponents, sentences, speedup
from arrattn.bench.inputs import Inputs
from arrattn.bench.measure import Cell
from arrattn.bench.settings import Settings

__all__ = ["make_record", "write_record"]


def make_record(
    settings: Settings,
    inputs: Inputs,
    families: Sequence[Family],
    cells: Sequence[Cell],
    *,
    interrupted: bool,
) -> dict[str, Any]:
    """
    Gather a comparison into what JSON can hold.

    Parameters
    ----------
    settings : Settings
        The options.
    inputs : Inputs
        Queries, keys and values.
    families : sequence of Family
        With their settings.
    cells : sequence of Cell
        What has been measured.
    interrupted : bool
        Whether more was asked for than was measured.

    Returns
    -------
    dict of str to Any
        Times in seconds, memory in bytes.
    """
    (heads, _, width), key_heads = inputs.q.shape, inputs.k.shape[0]
    return {
        "interrupted": interrupted,
        "versions": _versions(settings.array),
        "machine": {
            "cores": _cores(),
            "processor": platform.machine(),
            "system": platform.system(),
        },
        "settings": {
            "source": inputs.source,
            "array": settings.array,
            "device": settings.device,
            "dtype": settings.dtype,
            "causal": settings.causal,
            "lengths": list(settings.lengths),
            "heads": heads,
            "key_heads": key_heads,
            "width": width,
            "value_width": inputs.v.shape[-1],
            "repeat": settings.repeat,
            "seed": settings.seed,
            "families": {family.name: dict(family.parameters) for family in families},
        },
        "cells": [_cell(cell, cells) for cell in cells],
        "exponents": exponents(cells),
        "sentences": sentences(cells),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """
    Write a record to a file.

    Parameters
    ----------
    path : Path
        Where.
    record : dict of str to Any
        From `make_record`.
    """
    path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _cell(cell: Cell, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "family": cell.family,
        "length": cell.length,
        "times": list(cell.times),
        "median": cell.median,
        "min": min(cell.times),
        "max": max(cell.times),
        "compile": cell.compile_seconds,
        "speedup": speedup(cell, cells),
        "memory": cell.peak.size,
        "memory_how": cell.peak.how,
        "error": cell.error,
        "mass": cell.mass,
        "mean_error": cell.mean_error,
    }


def _versions(array: str) -> dict[str, str | None]:
    return {
        "arrattn": arrattn.__version__,
        "python": platform.python_version(),
        "numpy": backends.library("numpy").version,
        array: backends.library(array).version,
    }


def _cores() -> int | None:
    """The cores this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
