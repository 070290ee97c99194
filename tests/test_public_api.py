"""The names that users rely on, and their signatures."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

import arrattn

SCORES = (
    "mask=None, bias=None, is_causal=False, window=None, kv_lengths=None, segment_ids=None, "
    "pattern=None, q_offset=None, scale=None, softcap=None, sinks=None, return_lse=False"
)
SIGNATURES = {
    "attention": f"(q, k, v, /, *, {SCORES}, engine='auto')",
    "local_attention": "(q, k, v, /, *, window, " + SCORES.replace("window=None, ", "") + ")",
    "sparse_attention": (
        "(q, k, v, /, *, block_size=None, top_k=None, route=8, select='keys', per='query', "
        f"score='mean', block_scores=None, always=None, {SCORES}, return_selection=False)"
    ),
    "linear_attention": (
        "(q, k, v, /, *, feature_map=elu_plus_one, log_decay=None, is_causal=False, "
        "key_mask=None, kv_lengths=None, segment_ids=None, normalize=True, scale=1.0, "
        "initial_state=None, return_state=False)"
    ),
    "delta_attention": (
        "(q, k, v, /, *, beta, log_decay=None, key_mask=None, kv_lengths=None, "
        "segment_ids=None, scale=1.0, initial_state=None, return_state=False)"
    ),
    "merge": "(parts, /)",
    "explain": "(function, /, *args, **kwargs)",
}

EXPORTS = {
    "adapters": ["onnx_linear_attention"],
    "patterns": [
        "Blocks", "Causal", "Dilated", "Fixed", "Global", "Pattern", "Prefix", "Random", "Segments",
        "Strided", "Where", "Window",
    ],
    "feature_maps": [
        "FeatureMap", "Features", "cosformer", "elu_plus_one", "exp", "gaussian", "hedgehog",
        "identity", "laplacian", "nystrom", "relu", "softmax", "softmax_features", "squared",
        "taylor2",
    ],
    "reference": [
        "delta_attention", "delta_steps", "linear_attention", "linear_steps", "local_attention",
        "merge", "softmax_attention", "sparse_attention",
    ],
    "delta": ["delta_attention"],
    "dense": ["attention"],
    "explain": ["Explanation", "explain"],
    "local": ["local_attention"],
    "sparse": ["sparse_attention"],
    "linear": ["linear_attention"],
    "merge": ["merge"],
    "testing": [
        "CAPABILITIES", "CHOICES", "LAWS", "Counterexample", "Law", "Report", "Result", "check",
        "pytest_laws",
    ],
    "testing.strategies": [
        "CHOOSING", "KINDS", "VISIBILITY", "arrays", "biases", "cases", "masks", "patterns",
        "segments", "shapes", "states", "windows",
    ],
}  # fmt: skip


def test_the_package_exports_this_and_nothing_else() -> None:
    assert arrattn.__all__ == [
        "DeltaState",
        "LinearState",
        "__version__",
        "adapters",
        "attention",
        "delta_attention",
        "explain",
        "feature_maps",
        "get_num_threads",
        "linear_attention",
        "local_attention",
        "merge",
        "patterns",
        "reference",
        "set_num_threads",
        "sparse_attention",
    ]
    for name in arrattn.__all__:
        assert hasattr(arrattn, name)


@pytest.mark.parametrize("module", EXPORTS)
def test_modules_export_this_and_nothing_else(module: str) -> None:
    found = importlib.import_module(f"arrattn.{module}")
    assert sorted(found.__all__) == sorted(EXPORTS[module])
    order = sorted(found.__all__, key=lambda x: (not x.isupper(), not x[0].isupper(), x))
    assert list(found.__all__) == order  # constants, classes, functions
    for name in found.__all__:
        assert hasattr(found, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name: str) -> None:
    def bare(p: inspect.Parameter) -> inspect.Parameter:
        return p.replace(annotation=inspect.Parameter.empty)

    signature = inspect.signature(getattr(arrattn, name))
    plain = signature.replace(
        parameters=[bare(p) for p in signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(plain) == SIGNATURES[name]


def test_the_reference_takes_the_same_arguments() -> None:
    from arrattn import reference

    for name in ("local_attention", "sparse_attention", "linear_attention", "delta_attention"):
        theirs = inspect.signature(getattr(reference, name)).parameters
        ours = inspect.signature(getattr(arrattn, name)).parameters
        if any(p.kind is p.VAR_KEYWORD for p in theirs.values()):
            continue
        assert list(theirs) == list(ours), name


def test_importing_loads_no_array_library_but_numpy() -> None:
    program = (
        "import sys, arrattn; "
        "heavy = {'torch', 'jax', 'dask', 'cupy', 'array_api_strict', 'ml_dtypes', 'rich', "
        "'matplotlib', 'scipy'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_a_call_on_one_library_loads_no_other() -> None:
    program = (
        "import sys, numpy as np, arrattn; x = np.ones((1, 3, 2)); "
        "[getattr(arrattn, f)(x, x, x) for f in ('attention', 'sparse_attention', "
        "'linear_attention')]; arrattn.local_attention(x, x, x, window=(1, 1)); "
        "print(sorted({'torch', 'jax', 'dask', 'cupy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_the_package_is_typed() -> None:
    from importlib.resources import files

    assert (files("arrattn") / "py.typed").is_file()
