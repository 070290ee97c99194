"""The peers: who they are, how they are installed, and how each call is made."""

from __future__ import annotations

import importlib.util
import os
from typing import Any, NamedTuple

import numpy as np

from arrattn._core.threads import num_threads
from arrattn.bench import ours, peers_linear, peers_sparse
from arrattn.bench.contestant import Build, Contestant
from arrattn.bench.problem import Host, Problem

__all__ = ["PEERS", "Peer", "missing"]

Arrays = tuple[Host, Host, Host]


class Peer(NamedTuple):
    """
    Somebody to compare with.

    Attributes
    ----------
    name : str
        For the table.
    build : callable
        From a problem and its arrays to a contestant.
    packages : tuple of str
        What is imported.
    own : bool
        Whether it is arrattn itself, or NumPy, which is always there.
    """

    name: str
    build: Build
    packages: tuple[str, ...] = ()
    own: bool = False

    @property
    def how_to_install(self) -> str:
        """The command that installs it."""
        return f"pip install {' '.join(name.replace('_', '-') for name in self.packages)}"


def missing(packages: tuple[str, ...]) -> list[str]:
    """
    List the packages that are not installed.

    Parameters
    ----------
    packages : tuple of str
        Import names.

    Returns
    -------
    list of str
        Those that are not there.
    """
    return [name for name in packages if importlib.util.find_spec(name) is None]


def numpy_plain(problem: Problem, arrays: Arrays) -> Contestant:
    """Softmax of the scores times the values, written out in NumPy."""
    q, k, v = arrays

    def call() -> Host:
        s = np.matmul(q, np.swapaxes(k, -1, -2)) * np.float32(problem.scale)
        weights = np.exp(s - np.max(s, axis=-1, keepdims=True))
        out: Host = np.matmul(weights, v) / np.sum(weights, axis=-1, keepdims=True)
        return out

    return Contestant("plain NumPy", call)


def torch_sdpa(problem: Problem, arrays: Arrays) -> Contestant:
    """Fused attention of torch; its causal mask is ours where Nq equals Nk."""
    import torch

    q, k, v = (torch.from_numpy(x) for x in arrays)
    grouped = problem.key_heads not in {None, problem.heads}

    def call() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=problem.causal, enable_gqa=grouped
        )

    return Contestant("torch SDPA", call)


def torch_flex(problem: Problem, arrays: Arrays) -> Contestant:
    """The compiled flex_attention of torch, its block mask made beforehand."""
    # Read when torch compiles: it else keeps a pool of processes for it.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch
    from torch.nn.attention import flex_attention as flex

    q, k, v = (torch.from_numpy(x) for x in arrays)
    left, right = problem.window or (problem.n, problem.n)

    def near(b: Any, h: Any, i: Any, j: Any) -> Any:
        del b, h
        return (j >= i - left) & (j <= i + right)

    def shared(b: Any, h: Any, i: Any, j: Any) -> Any:
        return near(b, h, i, j) | (i < problem.shared) | (j < problem.shared)

    seen = shared if problem.shared else near
    block = flex.create_block_mask(seen, None, None, problem.nq, problem.n, device="cpu")
    torch.compiler.reset()  # else it stops compiling after a handful of lengths
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def call() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=block)

    return Contestant("torch flex_attention", call)


def lucidrains_local(problem: Problem, arrays: Arrays) -> Contestant:
    """The package local-attention; a window of exactly so many keys before each query."""
    import torch
    from local_attention import LocalAttention

    q, k, v = (torch.from_numpy(x) for x in arrays)
    left, _ = problem.window or (problem.n, 0)
    module = LocalAttention(
        window_size=left,
        causal=True,
        look_backward=1,
        exact_windowsize=True,
        autopad=True,
        use_rotary_pos_emb=False,
    )

    def call() -> Any:
        with torch.no_grad():
            return module(q, k, v)

    return Contestant("local-attention", call)


def onnx_attention(problem: Problem, arrays: Arrays) -> Contestant:
    """The kernel of onnxruntime for the Attention operator of opset 23."""
    import onnxruntime
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT
    shapes = dict(zip("QKV", (x.shape for x in arrays), strict=True))
    node = helper.make_node("Attention", list("QKV"), ["Y"], is_causal=int(problem.causal))
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("Y", kind, shapes["Q"])
    graph = helper.make_graph([node], "attention", inputs, [output])
    opset = helper.make_opsetid("", 23)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feed = dict(zip("QKV", arrays, strict=True))
    return Contestant(
        "onnxruntime Attention", lambda: session.run(None, feed), lambda outs: np.asarray(outs[0])
    )


def _jax_inputs(arrays: Arrays) -> list[Any]:
    """JAX wants ``(B, N, H, D)``: laid out so beforehand, which costs its call nothing."""
    import jax

    return [jax.numpy.asarray(np.swapaxes(x, 1, 2)) for x in arrays]


def jax_attention(problem: Problem, arrays: Arrays) -> Contestant:
    """JAX's own attention, compiled."""
    import jax

    inputs = _jax_inputs(arrays)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, is_causal=problem.causal)

    function = jax.jit(attend)
    return Contestant(
        "jax.nn, jitted",
        lambda: function(*inputs).block_until_ready(),
        lambda out: np.swapaxes(np.asarray(out), 1, 2),
    )


def jax_compiling(problem: Problem, arrays: Arrays) -> Contestant:
    """Tracing and compiling JAX's own attention anew."""
    import jax

    inputs = _jax_inputs(arrays)

    def call() -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return jax.nn.dot_product_attention(q, k, v, is_causal=problem.causal)

        jax.clear_caches()
        return jax.jit(attend).lower(*inputs).compile()

    return Contestant("jax.nn, compiling", call)


PEERS = {
    "dense": Peer("arrattn dense", ours.dense, own=True),
    "float32": Peer("arrattn float32", ours.in_float32, own=True),
    "window": Peer("arrattn local, the window alone", ours.local, own=True),
    "numpy": Peer("plain NumPy", numpy_plain, own=True),
    "torch": Peer("torch SDPA", torch_sdpa, ("torch",)),
    "flex": Peer("torch flex_attention, compiled", torch_flex, ("torch",)),
    "local-attention": Peer("local-attention", lucidrains_local, ("local_attention",)),
    "onnxruntime": Peer("onnxruntime Attention", onnx_attention, ("onnx", "onnxruntime")),
    "jax": Peer("jax.nn, jitted", jax_attention, ("jax",)),
    "jax compiling": Peer("jax.nn, compiling", jax_compiling, ("jax",)),
    "moba": Peer("MoBA in torch", peers_sparse.torch_moba, ("torch",)),
    "flex blocks": Peer("torch flex_attention, told", peers_sparse.torch_flex_blocks, ("torch",)),
    "torch linear": Peer("the formula in torch", peers_linear.torch_linear, ("torch",)),
    "torch chunks": Peer("chunked sums in torch", peers_linear.torch_chunks, ("torch",)),
    "linear": Peer("arrattn linear", ours.linear, own=True),
    "steps": Peer("NumPy, step by step", peers_linear.numpy_steps, own=True),
    "onnx reference": Peer("ONNX reference", peers_linear.onnx_reference, ("onnx",)),
    "performer": Peer("performer-pytorch", peers_linear.performer, ("performer_pytorch",)),
}
