"""
What the benchmark runs, as data: one line for each kind of comparison.

A pair's targets are by length: how many times as long as ours the peer should take, in the
median over the rounds, on two processors. None is a comparison without a target. The targets
say what was aimed at when the line was written; a run says whether they are met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from arrattn.bench import limits, ours
from arrattn.bench.contestant import Build
from arrattn.bench.problem import Problem

__all__ = ["CASES", "GROUPS", "Limit", "Pair"]


class Pair(NamedTuple):
    """
    Ours against a peer.

    Attributes
    ----------
    group : str
        Of `GROUPS`.
    what : str
        What is computed, in a few words.
    ours : callable
        Builds our side.
    peer : str
        A key of `peers.PEERS`, or ``"product"``: the machine's matrix products.
    problem : Problem
        What is computed; its length comes from `targets`.
    targets : mapping of int to (float or None)
        Least ratio by length.
    alike : bool
        Whether both compute the same thing, so that their results must agree.
    counted : bool
        Whether the visible pairs are what is computed: then its operations are known.
    fewest : int
        Rounds at least.
    needs : tuple of str
        Packages that our side needs.
    """

    group: str
    what: str
    ours: Build
    peer: str
    problem: Problem
    targets: Mapping[int, float | None]
    alike: bool = True
    counted: bool = True
    fewest: int = 5
    needs: tuple[str, ...] = ()


class Limit(NamedTuple):
    """
    A number of ours that should stay below a limit.

    Attributes
    ----------
    group : str
        Of `GROUPS`.
    what : str
        What is measured.
    measure : callable
        From lengths and a number of rounds to the numbers measured.
    unit : str
        Of the numbers.
    target : float or None
        The most it should be.
    lengths : tuple of int
        Lengths that it is measured at; empty where it has none.
    each : bool
        Whether each length is measured on its own.
    """

    group: str
    what: str
    measure: limits.Measure
    unit: str
    target: float | None
    lengths: tuple[int, ...] = ()
    each: bool = False


GROUPS = ("dense", "decode", "local", "sparse", "linear", "overhead", "scaling")

FULL = Problem()
CAUSAL = Problem(causal=True)
CACHE = Problem(batch=8, heads=8, key_heads=2, queries=1)
NEAR = Problem(window=(128, 0))
LONGFORMER = Problem(window=(256, 256), shared=4)
SENTENCES = Problem(batch=8, heads=12)
LARGE = Problem(spread=100.0)  # scores in the hundreds
HALF, BRAIN = Problem(dtype="float16"), Problem(dtype="bfloat16")

SHORT = {512: 0.95, 1024: 0.95}
LONG = (2048, 4096, 8192)
RATE = {2048: None, 4096: 0.90, 8192: 0.90}
TORCH, JAX = ("torch",), ("jax",)


def _unlike(
    group: str,
    what: str,
    build: Build,
    peer: str,
    problem: Problem,
    targets: Mapping[int, float | None],
    *,
    fewest: int = 5,
) -> Pair:
    """A pair of which ours approximates what the peer computes, or computes something else."""
    pair = Pair(group, what, build, peer, problem, targets, fewest=fewest)
    return pair._replace(alike=False, counted=False)


def _linear(what: str, peer: str, problem: Problem, targets: Mapping[int, float | None]) -> Pair:
    return Pair("linear", what, ours.linear, peer, problem, targets, counted=False)


def _delta(peer: str, targets: Mapping[int, float | None]) -> Pair:
    pair = Pair("linear", "gated delta rule", ours.gated_delta, peer, CAUSAL, targets)
    return pair._replace(counted=False, fewest=3)


_KEYS = ours.sparse()
_EXACT = ours.sparse(route=None)
_BLOCKS = ours.sparse(select="blocks", top_k=3)
_PER_BLOCK = ours.sparse(select="blocks", top_k=3, per="block")

CASES: tuple[Pair | Limit, ...] = (
    Pair("dense", "full", ours.dense, "product", FULL, RATE),
    Pair("dense", "causal", ours.dense, "product", CAUSAL, RATE),
    Pair("dense", "full", ours.dense, "torch", FULL, SHORT | {2048: 1.05, 4096: 1.05, 8192: 1.15}),
    Pair("dense", "causal", ours.dense, "torch", CAUSAL, SHORT | {2048: 1.1, 4096: 1.1, 8192: 1.2}),
    Pair("dense", "8 items of 12 heads", ours.dense, "torch", SENTENCES, {128: None, 256: None}),
    Pair("dense", "full", ours.dense, "onnxruntime", FULL, dict.fromkeys(LONG, 1.1)),
    Pair("dense", "causal", ours.dense, "onnxruntime", CAUSAL, dict.fromkeys(LONG, 1.1)),
    Pair("dense", "full", ours.dense, "jax", FULL, dict.fromkeys(LONG, 3.0)),
    Pair("dense", "causal", ours.dense, "jax", CAUSAL, dict.fromkeys(LONG, 3.0)),
    Pair("dense", "large scores", ours.dense, "torch", LARGE, {4096: 0.95}),
    Pair("dense", "float16", ours.dense, "float32", HALF, {4096: 0.8}),
    Pair("dense", "bfloat16", ours.dense, "float32", BRAIN, {4096: 0.8}, needs=("ml_dtypes",)),
    Pair("dense", "torch tensors, full", ours.torch_tensors, "torch", FULL,
         {1024: 0.95, 4096: 0.95}, needs=TORCH),
    Pair("dense", "torch tensors, causal", ours.torch_tensors, "torch", CAUSAL,
         {1024: 0.95, 4096: 0.95}, needs=TORCH),
    Pair("dense", "JAX arrays, jitted, causal", ours.jitted, "jax", CAUSAL, {4096: 1.5}, needs=JAX),
    _unlike("dense", "JAX arrays, compiling", ours.compiling, "jax compiling", CAUSAL,
            {4096: 0.35}),
    Pair("decode", "one query, 8 heads on 2", ours.decode, "product", CACHE,
         {4096: None, 16384: None}),
    Pair("decode", "one query, 8 heads on 2", ours.decode, "torch", CACHE, {4096: 1.5, 16384: 2.5}),
    Pair("local", "window (128, 0)", ours.local, "product", NEAR, dict.fromkeys((8192, 32768))),
    _unlike("local", "window (128, 0)", ours.local, "dense", CAUSAL._replace(window=(128, 0)),
            {8192: None}),
    Pair("local", "window (128, 0)", ours.local, "flex", NEAR,
         dict.fromkeys((8192, 16384, 32768), 2.0)),
    Pair("local", "window (128, 0)", ours.local, "local-attention", NEAR,
         dict.fromkeys((8192, 16384, 32768), 7.0)),
    _unlike("local", "window (128, 0)", ours.local, "torch", CAUSAL._replace(window=(128, 0)),
            {32768: 65.0}, fewest=3),
    _unlike("sparse", "keys, routed", _KEYS, "dense", CAUSAL, {16384: None}),
    _unlike("sparse", "keys, routed", _KEYS, "torch", CAUSAL, {16384: 2.5, 65536: None},
            fewest=3),
    _unlike("sparse", "keys, exact", _EXACT, "torch", CAUSAL, {16384: 1.0}),
    _unlike("sparse", "3 blocks", _BLOCKS, "torch", CAUSAL, {16384: 4.5, 65536: None}, fewest=3),
    _unlike("sparse", "3 blocks per block", _PER_BLOCK, "torch", CAUSAL,
            {16384: 10.0, 65536: None}, fewest=3),
    Pair("sparse", "3 blocks", _BLOCKS, "moba", CAUSAL, {16384: 1.7}, counted=False),
    Pair("sparse", "3 blocks per block", _PER_BLOCK, "flex blocks", CAUSAL, {16384: 1.5},
         counted=False),
    _unlike("sparse", "Longformer, 256 + 4", ours.pattern, "window", LONGFORMER, {16384: 0.77}),
    Pair("sparse", "Longformer, 256 + 4", ours.pattern, "flex", LONGFORMER, {16384: 1.0}),
    _unlike("linear", "elu + 1, full", ours.linear, "dense", FULL, {16384: None}),
    _linear("elu + 1, full", "torch linear", FULL, {16384: 1.0, 65536: 2.5}),
    _linear("elu + 1, causal", "torch chunks", CAUSAL, {16384: 1.4}),
    _unlike("linear", "elu + 1, full", ours.linear, "torch", FULL, {16384: 50.0}),
    _unlike("linear", "elu + 1, causal", ours.linear, "torch", CAUSAL, {16384: 20.0}),
    _unlike("linear", "FAVOR+ 64, full", ours.favor, "performer", FULL, {16384: 2.2}),
    _unlike("linear", "FAVOR+ 64, causal", ours.favor, "performer", CAUSAL, {16384: 25.0}),
    _unlike("linear", "elu + 1, causal, decay", ours.decayed, "linear", CAUSAL, {16384: 0.5}),
    _delta("steps", {16384: 20.0}),
    _delta("onnx reference", {16384: 20.0}),
    Pair("overhead", "full", ours.dense, "numpy", FULL, {16: 0.6, 64: 0.6}),
    Limit("overhead", "import beyond NumPy's", limits.import_time, "ms", 40.0),
    Limit("overhead", "memory, dense", limits.memory("dense"), "MiB", 16.0, (16384,), each=True),
    Limit("overhead", "memory, local", limits.memory("local"), "MiB", 16.0, (16384,), each=True),
    Limit("overhead", "memory, sparse", limits.memory("sparse"), "MiB", None,
          (4096, 16384, 65536), each=True),
    Limit("overhead", "memory, linear", limits.memory("linear"), "MiB", 16.0, (16384, 65536),
          each=True),
    Limit("scaling", "dense", limits.exponent(ours.dense, FULL), "", None, (1024, 2048, 4096)),
    Limit("scaling", "local", limits.exponent(ours.local, NEAR), "", 1.05,
          (4096, 8192, 16384, 32768)),
    Limit("scaling", "sparse", limits.exponent(_KEYS, CAUSAL), "", 1.6,
          (4096, 8192, 16384, 32768, 65536)),
    Limit("scaling", "sparse, 3 blocks", limits.exponent(_BLOCKS, CAUSAL), "", 1.6,
          (4096, 8192, 16384, 32768, 65536)),
    Limit("scaling", "linear", limits.exponent(ours.linear, FULL), "", 1.1,
          (4096, 16384, 65536, 131072)),
    Limit("scaling", "linear, causal", limits.exponent(ours.linear, CAUSAL), "", 1.1,
          (4096, 16384, 65536, 131072)),
    Limit("scaling", "gated delta rule", limits.exponent(ours.gated_delta, CAUSAL), "", 1.1,
          (4096, 8192, 16384, 32768)),
)  # fmt: skip
