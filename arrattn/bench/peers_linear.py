"""Linear attention by others: written in eager torch, and a package's."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from arrattn.bench.contestant import Contestant
from arrattn.bench.problem import Host, Problem

__all__ = ["performer", "torch_chunks", "torch_linear"]

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
