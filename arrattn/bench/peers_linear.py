"""Linear attention by others: written in eager torch, and a package's."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np

from arrattn.bench import ours
from arrattn.bench.contestant import Contestant
from arrattn.bench.problem import Host, Problem

__all__ = ["numpy_steps", "onnx_reference", "performer", "torch_chunks", "torch_linear"]

Arrays = tuple[Host, Host, Host]
CHUNK = 128  # the fastest of 64, 128, 256 and 512 where it was tried


def torch_linear(problem: Problem, arrays: Arrays) -> Contestant:
    """``phi(q) (phi(k)^T v) / phi(q) sum phi(k)`` with ``phi = elu + 1``, both ways."""
    import torch

    del problem
    q, k, v = (torch.from_numpy(x) for x in arrays)

    def call() -> Any:
        a = torch.nn.functional.elu(q) + 1
        b = torch.nn.functional.elu(k) + 1
        total = torch.sum(b, dim=-2)[..., None]
        return (a @ (b.transpose(-1, -2) @ v)) / (a @ total)

    return Contestant("the formula in torch", call)


def torch_chunks(problem: Problem, arrays: Arrays) -> Contestant:
    """The causal formula: pairs within a chunk directly, earlier chunks by cumulative sums."""
    import torch

    n = problem.n
    q, k, v = (torch.from_numpy(x) for x in arrays)

    def cut(x: Any) -> Any:
        x = torch.nn.functional.pad(x, (0, 0, 0, -n % CHUNK)) if n % CHUNK else x
        return x.unflatten(-2, (-1, CHUNK))  # (B, H, chunks, CHUNK, D)

    def call() -> Any:
        a = cut(torch.nn.functional.elu(q) + 1)
        b = cut(torch.nn.functional.elu(k) + 1)
        values = cut(v)
        products = b.transpose(-1, -2) @ values
        sums = torch.sum(b, dim=-2)[..., None]
        before = torch.cumsum(products, dim=-3) - products
        sums_before = torch.cumsum(sums, dim=-3) - sums
        within = torch.tril(a @ b.transpose(-1, -2))
        weights = torch.sum(within, dim=-1, keepdim=True) + a @ sums_before
        return ((within @ values + a @ before) / weights).flatten(-3, -2)[..., :n, :]

    return Contestant("chunked sums in torch", call)


def performer(problem: Problem, arrays: Arrays) -> Contestant:
    """The package performer-pytorch, with 64 features of the softmax kernel."""
    import torch

    q, k, v = (torch.from_numpy(x) for x in arrays)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it finds no CUDA kernel
        from performer_pytorch import FastAttention

        module = FastAttention(dim_heads=problem.width, nb_features=64, causal=problem.causal)

    def call() -> Any:
        with torch.no_grad():
            return module(q, k, v)

    return Contestant("performer-pytorch", call)


def numpy_steps(problem: Problem, arrays: Arrays) -> Contestant:
    """The gated delta rule in NumPy, token by token, all heads of a token at once."""
    q, k, v = arrays
    k, (beta, g) = ours.unit(k), ours.gates(problem)

    def call() -> Any:
        S = np.zeros((*k.shape[:2], k.shape[-1], v.shape[-1]), v.dtype)
        out = np.empty_like(v)
        for t in range(problem.n):
            S = np.exp(g[:, :, t, None, None]) * S
            key = k[:, :, t : t + 1]
            u = beta[:, :, t, None, None] * (v[:, :, t : t + 1] - key @ S)
            S = S + key.swapaxes(-1, -2) * u
            out[:, :, t : t + 1] = q[:, :, t : t + 1] @ S
        return out

    return Contestant("NumPy, step by step", call)


def onnx_reference(problem: Problem, arrays: Arrays) -> Contestant:
    """ONNX's own evaluator of its operator LinearAttention, which is written in NumPy."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    q, k, v = arrays
    beta, g = ours.gates(problem)

    def packed(x: Host) -> Host:
        return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(problem.batch, problem.n, -1)

    feed = dict(zip(("query", "key", "value"), map(packed, (q, ours.unit(k), v)), strict=True))
    feed |= {"decay": g.swapaxes(1, 2), "beta": beta.swapaxes(1, 2)}
    names = ["query", "key", "value", "", "decay", "beta"]
    heads = {"q_num_heads": problem.heads, "kv_num_heads": problem.heads}
    node = helper.make_node("LinearAttention", names, ["out", "state"], scale=1.0, **heads)
    given = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in feed.items()]
    results = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 3)]
    graph = helper.make_graph([node], "delta", given, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)])
    evaluator = ReferenceEvaluator(model)

    def apart(outs: Any) -> Host:
        out: Host = outs[0].reshape(problem.batch, problem.n, problem.heads, -1).swapaxes(1, 2)
        return out

    return Contestant("ONNX reference", lambda: evaluator.run(None, feed), apart)
