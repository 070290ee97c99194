"""Sparse attention by others, of which none is installed with pip: written in torch, ours."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

import arrattn
from arrattn.bench.contestant import Contestant
from arrattn.bench.problem import Host, Problem

__all__ = ["TOP", "torch_flex_blocks", "torch_moba"]

Arrays = tuple[Host, Host, Host]

#: Blocks chosen beside the own one.
TOP = 3


def torch_moba(problem: Problem, arrays: Arrays) -> Contestant:
    """
    Blocks routed by mean keys in eager torch, causal: each block with the queries that chose it.

    Blocks of sqrt(N) keys; the last is filled up, which its causal mask hides.
    """
    import torch

    size = math.isqrt(problem.n - 1) + 1
    count = -(-problem.n // size)
    n = count * size
    q, k, v = (
        torch.nn.functional.pad(torch.from_numpy(x)[0], (0, 0, 0, n - problem.n)) for x in arrays
    )
    heads, _, d = q.shape
    scale = d**-0.5
    later = torch.triu(torch.ones(size, size, dtype=torch.bool), 1)
    past = torch.arange(count)[None, :] < (torch.arange(n) // size)[:, None]

    def head(q: Any, k: Any, v: Any) -> Any:
        keys, values = k.view(count, size, d), v.view(count, size, -1)
        gate = (q @ keys.mean(1).T).masked_fill(~past, -math.inf)
        best, ids = gate.topk(min(TOP, count), dim=-1)
        chosen = torch.zeros(n, count, dtype=torch.bool).scatter_(1, ids, best > -math.inf)
        s = (q.view(count, size, d) @ keys.mT * scale).masked_fill(later, -math.inf)
        m = s.amax(-1, keepdim=True)
        p = torch.exp(s - m)
        total, out = p.sum(-1).view(-1), (p @ values).view(n, -1)
        m = m.view(-1)
        for b in range(count):
            rows = chosen[:, b].nonzero()[:, 0]
            if not len(rows):
                continue
            s = q[rows] @ keys[b].T * scale
            top = torch.maximum(m[rows], s.amax(-1))
            decay, p = torch.exp(m[rows] - top), torch.exp(s - top[:, None])
            total[rows] = total[rows] * decay + p.sum(-1)
            out[rows] = out[rows] * decay[:, None] + p @ values[b]
            m[rows] = top
        return out / total[:, None]

    def call() -> Any:
        with torch.no_grad():
            out = torch.stack([head(q[h], k[h], v[h]) for h in range(heads)])
            return out[None, :, : problem.n]

    return Contestant("MoBA in torch", call)


def torch_flex_blocks(problem: Problem, arrays: Arrays) -> Contestant:
    """The compiled flex_attention of torch, told beforehand which blocks see which."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    import torch
    from torch.nn.attention import flex_attention as flex

    n, heads = problem.n, problem.heads
    size = math.isqrt(n - 1) + 1
    _, ids = arrattn.sparse_attention(
        *arrays, select="blocks", per="block", top_k=TOP, is_causal=True, return_selection=True
    )
    blocks = np.arange(-(-n // size))
    seen = (ids[0][..., None] == blocks).any(-2) | (blocks[:, None] == blocks)
    table = torch.from_numpy(seen)

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        del b
        return table[h, i // size, j // size] & (j <= i)

    q, k, v = (torch.from_numpy(x) for x in arrays)
    tile = size if size % 16 == 0 else 128
    mask = flex.create_block_mask(sees, None, heads, n, n, device="cpu", BLOCK_SIZE=tile)
    torch.compiler.reset()
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def call() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=mask)

    return Contestant("torch flex_attention", call)
