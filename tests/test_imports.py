"""Imports point one way, and the algorithms name no array library."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

import arrattn

ROOT = Path(arrattn.__file__).parent
LIBRARIES = {"torch", "jax", "cupy", "dask", "array_api_strict", "tensorflow", "mlx", "ndonnx"}
FAMILIES = [
    ROOT / f"{name}.py" for name in ("dense", "local", "sparse", "linear", "delta", "adapters")
]
CORE = sorted((ROOT / "_core").rglob("*.py"))
PATTERNS = sorted((ROOT / "patterns").glob("*.py"))

#: Files whose purpose is to hold what differs between libraries.
NAMED_FOR_IT = {"loops.py", "native.py", "staging.py"}

#: Who may import whom: only from a level below, or from beside on the same level.
LEVELS = [
    {"_core.typing", "_state"},
    {"_core.loops", "_core.threads"},
    {"_core.workspace"},
    {"_core.tiles", "_core.decay"},
    {"_core.order", "_core.chunks", "patterns._base"},
    {"patterns._arrays"},
    {"patterns._positions", "patterns._regular", "patterns._random"},
    {"patterns._tree"},
    {"patterns", "feature_maps", "_core.online_softmax"},
    {"_core.inputs.arguments"},
    {"_core.inputs.calls"},
    {"_core.inputs.softmax", "_core.inputs.linear", "_core.inputs.parts"},
    {"_core.inputs.sparse"},
    {"_core.inputs", "_core.plan", "_core.staging"},
    {"_core.sight", "_core.packed"},
    {"_core.native"},
    {"_core.fold", "_core.gather", "_core.streams"},
    {"_core.few", "_core.routing", "_core.topk"},
    {"_core.strips"},
    {"_core.small_heads"},
    {"_core.jobs"},
    {"_core.sparse_jobs", "_core.grouped"},
    {"_core.engine", "_core.select", "_core.recurrence"},
    {"_core.ways", "_core.gated"},
    {"dense", "local", "sparse", "linear", "merge"},
    {"delta"},
    {"adapters"},
    {"explain"},
    {"", "reference"},
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> set[str]:
    """Modules that a file imports, in full."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(module: str) -> int | None:
    return next((n for n, names in enumerate(LEVELS) if module in names), None)


@pytest.mark.parametrize("path", CORE + FAMILIES + PATTERNS, ids=lambda p: p.stem)
def test_imports_point_downwards(path: Path) -> None:
    own = level(module_of(path))
    assert own is not None or path.name == "__init__.py", f"{path.name} stands on no level"
    for name in imports(path):
        if name.split(".")[0] != "arrattn" or own is None:
            continue
        below = level(name.removeprefix("arrattn").removeprefix("."))
        if below is not None and name != "arrattn":
            assert below <= own, f"{path.name} imports {name}, which stands above it"


@pytest.mark.parametrize("path", sorted((ROOT / "reference").glob("*.py")), ids=lambda p: p.stem)
def test_the_reference_shares_nothing_with_the_engines(path: Path) -> None:
    assert not [n for n in imports(path) if n.startswith("arrattn._core")]


@pytest.mark.parametrize("path", CORE + FAMILIES + PATTERNS, ids=lambda p: p.stem)
def test_no_file_imports_an_array_library(path: Path) -> None:
    if path.name in NAMED_FOR_IT:
        pytest.skip("holds what differs between libraries")
    assert not {n.split(".")[0] for n in imports(path)} & LIBRARIES


@pytest.mark.parametrize("path", CORE + FAMILIES + PATTERNS, ids=lambda p: p.stem)
def test_no_code_names_an_array_library(path: Path) -> None:
    # Names and strings that are code; docstrings and comments may speak of libraries.
    if path.name in NAMED_FOR_IT:
        pytest.skip("holds what differs between libraries")
    source = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    named = {t.string for t in tokens if t.type == tokenize.NAME}
    found = {n for n in named for x in LIBRARIES if x == n or n.startswith((f"is_{x}", f"_{x}"))}
    assert not found


def test_the_search_would_find_one() -> None:
    loops = ROOT / "_core" / "loops.py"
    assert {n.split(".")[0] for n in imports(loops)} & LIBRARIES


@pytest.mark.parametrize("path", CORE + FAMILIES + PATTERNS, ids=lambda p: p.stem)
def test_no_forbidden_ways(path: Path) -> None:
    """No einsum, and nothing that moves arrays between libraries."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not names & {"einsum", "from_dlpack", "__dlpack__"}
