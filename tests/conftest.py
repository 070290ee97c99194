"""Fixtures and settings of the whole suite."""

from __future__ import annotations

import os

# One thread per library: the suite's own workers use the cores. Before any import.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")
os.environ.setdefault("MPLBACKEND", "Agg")

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from lanes import CHOSEN, Lane

PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci", derandomize=True, deadline=None, print_blob=True, database=None,
    max_examples=150, phases=PHASES, suppress_health_check=QUIET,
)  # fmt: skip
settings.register_profile(
    "random", derandomize=False, deadline=None, print_blob=True,
    max_examples=150, phases=PHASES, suppress_health_check=QUIET,
)  # fmt: skip
# For mutation testing: a failure is all that is asked for, not the smallest.
settings.register_profile(
    "mutation", derandomize=True, deadline=None, database=None,
    max_examples=int(os.environ.get("ARRATTN_EXAMPLES", "40")), report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate), suppress_health_check=QUIET,
)  # fmt: skip
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    """Settings that are global to a library; each is made once per process."""
    del config
    import array_api_strict
    import jax
    import torch

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)  # compiling is what takes time
    torch.set_num_threads(1)
    array_api_strict.set_array_api_strict_flags(
        api_version="2024.12", boolean_indexing=False, data_dependent_shapes=False
    )


def _params(lanes: tuple[Lane, ...]) -> list[Any]:
    def marks(lane: Lane) -> Any:
        return pytest.mark.skipif(lane.missing is not None, reason=lane.missing or "present")

    return [pytest.param(lane, id=lane.name, marks=marks(lane)) for lane in lanes]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """
    Run a test that asks for `lane` on every way there is.

    ``@pytest.mark.lanes("numpy", "jax")`` leaves only those; it is for what a lane cannot
    even express, and says why beside it. So does ``ARRATTN_LANES=numpy,torch`` for all tests.
    """
    if "lane" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("lanes")
    chosen = CHOSEN if marker is None else tuple(x for x in CHOSEN if x.name in marker.args)
    metafunc.parametrize("lane", _params(chosen))
