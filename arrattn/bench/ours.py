"""arrattn's side of each pair, and its comparisons with itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import arrattn
from arrattn import feature_maps, patterns
from arrattn.bench.contestant import Build, Contestant
from arrattn.bench.problem import Host, Problem

__all__ = [
    "compiling",
    "decayed",
    "decode",
    "dense",
    "favor",
    "gated_delta",
    "gates",
    "in_float32",
    "jitted",
    "linear",
    "local",
    "pattern",
    "sparse",
    "torch_tensors",
    "unit",
]

Arrays = tuple[Host, Host, Host]


def dense(problem: Problem, arrays: Arrays) -> Contestant:
    """``attention`` on NumPy."""
    call = partial(arrattn.attention, *arrays, is_causal=problem.causal)
    return Contestant("arrattn dense", call)


def decode(problem: Problem, arrays: Arrays) -> Contestant:
    """``attention`` on NumPy of few queries over a long cache."""
    return dense(problem, arrays)._replace(name="arrattn decode")


def local(problem: Problem, arrays: Arrays) -> Contestant:
    """``local_attention`` on NumPy."""
    window = problem.window or (problem.n, problem.n)
    call = partial(arrattn.local_attention, *arrays, window=window, is_causal=problem.causal)
    return Contestant("arrattn local", call)


def pattern(problem: Problem, arrays: Arrays) -> Contestant:
    """``attention`` on NumPy with a window and positions that see all and are seen by all."""
    left, right = problem.window or (problem.n, problem.n)
    seen = patterns.Window(left, right) | patterns.Global(problem.shared)
    call = partial(arrattn.attention, *arrays, pattern=seen, is_causal=problem.causal)
    return Contestant("arrattn pattern", call)


def sparse(**options: Any) -> Build:
    """``sparse_attention`` on NumPy with these options."""

    def build(problem: Problem, arrays: Arrays) -> Contestant:
        call = partial(arrattn.sparse_attention, *arrays, is_causal=problem.causal, **options)
        return Contestant("arrattn sparse", call)

    return build


def linear(problem: Problem, arrays: Arrays) -> Contestant:
    """``linear_attention`` on NumPy with the feature map ``elu + 1``."""
    call = partial(arrattn.linear_attention, *arrays, is_causal=problem.causal)
    return Contestant("arrattn linear", call)


def favor(problem: Problem, arrays: Arrays) -> Contestant:
    """``linear_attention`` on NumPy with 64 positive random features."""
    features = feature_maps.softmax(dim=problem.width, num_features=64, rng=0)
    call = partial(
        arrattn.linear_attention, *arrays, feature_map=features, is_causal=problem.causal
    )
    return Contestant("arrattn linear", call)


def gates(problem: Problem) -> tuple[Host, Host]:
    """Writing strengths and logarithms of decay (B, H, N), the same for ours and a peer."""
    rng = np.random.default_rng(0)
    shape = (problem.batch, problem.heads, problem.n)
    return rng.random(shape, dtype=np.float32), -0.1 * rng.random(shape, dtype=np.float32)


def unit(keys: Host) -> Host:
    """Keys of length 1."""
    length: Host = np.linalg.norm(keys, axis=-1, keepdims=True)
    return keys / length


def decayed(problem: Problem, arrays: Arrays) -> Contestant:
    """``linear_attention`` on NumPy with the map ``elu + 1`` and a decay for each token."""
    _, log_decay = gates(problem)
    call = partial(arrattn.linear_attention, *arrays, log_decay=log_decay, is_causal=problem.causal)
    return Contestant("arrattn linear, decay", call)


def gated_delta(problem: Problem, arrays: Arrays) -> Contestant:
    """``delta_attention`` on NumPy with a decay for each token."""
    q, k, v = arrays
    beta, log_decay = gates(problem)
    call = partial(arrattn.delta_attention, q, unit(k), v, beta=beta, log_decay=log_decay)
    return Contestant("arrattn delta", call)


def in_float32(problem: Problem, arrays: Arrays) -> Contestant:
    """``attention`` on the same numbers in float32, to hold smaller dtypes against."""
    wide = tuple(x.astype(np.float32) for x in arrays)
    call = partial(arrattn.attention, *wide, is_causal=problem.causal)
    return Contestant("arrattn float32", call)


def torch_tensors(problem: Problem, arrays: Arrays) -> Contestant:
    """``attention`` on torch tensors."""
    import torch

    tensors = [torch.from_numpy(x) for x in arrays]
    call = partial(arrattn.attention, *tensors, is_causal=problem.causal)
    return Contestant("arrattn on torch", call)


def jitted(problem: Problem, arrays: Arrays) -> Contestant:
    """``attention`` on JAX arrays, compiled."""
    import jax

    inputs = [jax.numpy.asarray(x) for x in arrays]
    function = jax.jit(partial(arrattn.attention, is_causal=problem.causal))
    return Contestant("arrattn under jit", lambda: function(*inputs).block_until_ready())


def compiling(problem: Problem, arrays: Arrays) -> Contestant:
    """Tracing and compiling ``attention`` anew."""
    import jax

    inputs = [jax.numpy.asarray(x) for x in arrays]

    def call() -> Any:
        jax.clear_caches()  # what an earlier call traced would be found again
        function = jax.jit(partial(arrattn.attention, is_causal=problem.causal))
        return function.lower(*inputs).compile()

    return Contestant("arrattn under jit", call)
