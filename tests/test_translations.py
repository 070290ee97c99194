"""
The tables of docs/conventions.md, row by row, against torch's and JAX's own attention.

Both sides get the same arrays; only the arguments are translated.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import tolerance
import torch
from lanes import close
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from arrattn import attention
from arrattn.patterns import Where

NQ, NK = 5, 8
rng = np.random.default_rng(0)
Q = rng.normal(size=(2, 4, NQ, 16))
K, V = rng.normal(size=(2, 2, 2, NK, 16))
MASK = rng.random((2, 1, NQ, NK)) < 0.6
MASK[0, 0, 2] = False
BIAS = rng.normal(size=(4, NQ, NK))
LENGTHS = np.asarray([8, 5], np.int32)
Q_LENGTHS = np.asarray([3, 5], np.int32)


def same(
    theirs: Any, ours: Any, *, dtype: str, scale: float | None = None, bias: Any = None
) -> None:
    # Two results, each as far from the truth as the tolerance allows.
    within = 2 * tolerance.output_error(Q, K, V, dtype=dtype, scale=scale, bias=bias)
    assert tuple(theirs.shape) == tuple(ours.shape)
    close(np.asarray(theirs, np.float64), np.asarray(ours, np.float64), within=within)


# -- torch ------------------------------------------------------------------------------------

TQ, TK, TV = (torch.asarray(x) for x in (Q, K, V))

TORCH_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "attn_mask of bool": ({"attn_mask": torch.asarray(MASK)}, {"mask": torch.asarray(MASK)}),
    "attn_mask of float": ({"attn_mask": torch.asarray(BIAS)}, {"bias": torch.asarray(BIAS)}),
    "is_causal": ({"is_causal": True}, {"is_causal": True, "q_offset": 0}),
    "scale": ({"scale": 0.7}, {"scale": 0.7}),
}


@pytest.mark.parametrize("row", TORCH_ROWS)
def test_torch_scaled_dot_product_attention(row: str) -> None:
    theirs, ours = TORCH_ROWS[row]
    expected = scaled_dot_product_attention(TQ, TK, TV, enable_gqa=True, **theirs)
    same(
        expected,
        attention(TQ, TK, TV, **ours),
        dtype="float64",
        scale=ours.get("scale"),
        bias=ours.get("bias"),
    )


def test_torch_causal_lower_right() -> None:
    k, v = (x.repeat_interleave(2, dim=1) for x in (TK, TV))
    expected = scaled_dot_product_attention(TQ, k, v, attn_mask=causal_lower_right(NQ, NK))
    same(expected, attention(TQ, TK, TV, is_causal=True), dtype="float64")


def test_torch_key_padding_mask_is_the_other_way_round() -> None:
    layer = torch.nn.MultiheadAttention(16, 1, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        layer.in_proj_weight.copy_(torch.eye(16, dtype=torch.float64).repeat(3, 1))
        layer.out_proj.weight.copy_(torch.eye(16, dtype=torch.float64))
        padding = torch.arange(NK) >= torch.asarray(LENGTHS)[:, None]
        q, k, v = TQ[:, 0], TK[:, 0], TV[:, 0]
        expected, _ = layer(q, k, v, key_padding_mask=padding)
    one_head = (x[:, None] for x in (q, k, v))
    ours = attention(*one_head, mask=~padding[:, None, None, :])
    same(expected, ours[:, 0], dtype="float64")


def in_window(p: Any, j: Any) -> Any:
    return (j <= p) & (p - j <= 2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_torch_flex_attention() -> None:
    q, k, v = (x.float() for x in (TQ, TK, TV))
    bias = torch.asarray(BIAS, dtype=torch.float32)

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return 2.0 * torch.tanh(score / 2.0) + bias[h, i, j]

    block_mask = create_block_mask(
        lambda b, h, i, j: in_window(i, j), None, None, NQ, NK, device="cpu"
    )
    expected, aux = flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=0.7, enable_gqa=True,
        return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    out, lse = attention(
        q, k, v, softcap=2.0, bias=bias, pattern=Where(in_window), scale=0.7, q_offset=0,
        return_lse=True,
    )  # fmt: skip
    same(expected, out, dtype="float32", scale=0.7, bias=BIAS)
    within = 2 * tolerance.score_error(Q, K, dtype="float32", scale=0.7, bias=BIAS)
    close(aux.lse.double().numpy(), lse.double().numpy(), within=within)


# -- JAX --------------------------------------------------------------------------------------

JAX_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}),
    "bias": ({"bias": BIAS[None]}, {"bias": BIAS}),
    # A row with nothing visible is where the two differ: see the table.
    "mask": ({"mask": MASK | (np.arange(NK) == 0)}, {"mask": MASK | (np.arange(NK) == 0)}),
    "is_causal": ({"is_causal": True}, {"is_causal": True, "q_offset": 0}),
    "scale": ({"scale": 0.7}, {"scale": 0.7}),
    "key_value_seq_lengths": ({"key_value_seq_lengths": LENGTHS}, {"kv_lengths": LENGTHS}),
    "both lengths, causal": (
        {"key_value_seq_lengths": LENGTHS, "query_seq_lengths": Q_LENGTHS, "is_causal": True},
        {
            "kv_lengths": LENGTHS,
            "mask": np.arange(NQ)[:, None] < Q_LENGTHS[:, None, None, None],
            "is_causal": True,
            "q_offset": 0,
        },
    ),
    "local_window_size of an int": (
        {"local_window_size": 2},
        {"window": (2, 2), "q_offset": 0},
    ),
    "local_window_size of a pair": (
        {"local_window_size": (3, 1)},
        {"window": (3, 1), "q_offset": 0},
    ),
}


def moved(options: dict[str, Any]) -> dict[str, Any]:
    def move(x: Any) -> Any:
        if not isinstance(x, np.ndarray):
            return x
        return jax.numpy.asarray(x, dtype="float32" if x.dtype.kind == "f" else None)

    return {name: move(x) for name, x in options.items()}


@pytest.mark.parametrize("row", JAX_ROWS)
def test_jax_dot_product_attention(row: str) -> None:
    theirs, ours = (moved(options) for options in JAX_ROWS[row])
    q, k, v = (jax.numpy.asarray(x, dtype="float32") for x in (Q, K, V))
    positions_first = (jax.numpy.swapaxes(x, 1, 2) for x in (q, k, v))
    expected, residual = jax.nn.dot_product_attention(
        *positions_first, return_residual=True, **theirs
    )
    out, lse = attention(q, k, v, return_lse=True, **ours)
    scores = {"dtype": "float32", "scale": ours.get("scale"), "bias": ours.get("bias")}
    same(jax.numpy.swapaxes(expected, 1, 2), out, **scores)
    residual = np.asarray(jax.numpy.swapaxes(residual, 1, 2), np.float64)
    seen = np.isfinite(np.asarray(lse))
    within = 2 * tolerance.score_error(Q, K, **scores)
    close(residual[seen], np.asarray(lse, np.float64)[seen], within=within)
