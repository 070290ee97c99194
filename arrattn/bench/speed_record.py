"""The record of a benchmark as JSON: every number, and what it was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

import arrattn
from arrattn.bench.cases import Limit
from arrattn.bench.contest import LeftOut, Result
from arrattn.bench.product import Product, blas

__all__ = ["make_record", "unit_of", "versions"]

PEERS = ("torch", "onnxruntime", "jax", "local-attention", "performer-pytorch", "ml-dtypes")


def versions() -> dict[str, str | None]:
    """
    What takes part, and which version of it.

    Returns
    -------
    dict of str to (str or None)
        None where it is not installed.
    """
    found = {"arrattn": arrattn.__version__, "Python": platform.python_version()}
    return found | {"numpy": np.__version__, "BLAS": blas()} | {n: _version(n) for n in PEERS}


def make_record(
    results: Sequence[Result],
    left_out: Sequence[LeftOut],
    product: Product,
    *,
    peers: bool,
    interrupted: bool,
) -> dict[str, Any]:
    """
    Gather a run into what JSON can hold.

    Parameters
    ----------
    results : sequence of Result
        What was measured.
    left_out : sequence of LeftOut
        What was not.
    product : Product
        What the machine's rate was measured with.
    peers : bool
        Whether peers took part.
    interrupted : bool
        Whether more was asked for than was measured.

    Returns
    -------
    dict of str to Any
        Times in seconds.
    """
    return {
        "interrupted": interrupted,
        "peers": peers,
        "versions": versions(),
        "machine": {
            "processors": os.cpu_count(),
            "threads": product.threads,
            "processor": platform.machine(),
            "system": platform.system(),
            "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        },
        "product": {"shape": list(product.shape), "repeats": product.repeats},
        "cases": [_case(result) for result in results],
        "left_out": [{"case": job.words, "why": why} for job, why in left_out],
    }


def _case(result: Result) -> dict[str, Any]:
    job = result.job
    finite = result.apart is not None and np.isfinite(result.apart)
    return {
        "group": job.case.group,
        "case": job.case.what,
        "lengths": list(job.lengths),
        "against": None if job.peer is None else job.peer.name,
        "unit": unit_of(result),
        "values": result.values,
        **result.spread._asdict(),
        "of_matmul_rate": None if result.fraction is None else result.fraction._asdict(),
        "target": result.target,
        "met": result.met,
        "apart": result.apart if finite else None,
        "tolerance": result.tolerance,
        "differ": result.differs,
        "times": result.times,
    }


def unit_of(result: Result) -> str:
    """
    Name what a result's numbers are in.

    Parameters
    ----------
    result : Result
        What was measured.

    Returns
    -------
    str
        A limit's unit, which may be empty, or ``"ratio"``.
    """
    return result.job.case.unit if isinstance(result.job.case, Limit) else "ratio"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
