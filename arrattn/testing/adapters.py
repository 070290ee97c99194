"""
The attentions of other libraries, in terms of ours.

An adapter translates our keyword arguments to those of a function that people use, says
what it lacks, and names its documented choices with where they are documented. What is
tested is the library's own call: nothing is masked, cast or repaired on the way.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from arrattn.testing.arrays import read_library
from arrattn.testing.subject import Subject, read_lacks

__all__ = ["ADAPTERS", "Adapter", "adapter_of"]

Host = np.ndarray[Any, Any]

#: Arguments of dense attention that an adapter may have.
ARGUMENTS = (
    *("is_causal", "mask", "window", "kv_lengths", "q_offset", "segment_ids", "pattern"),
    *("scale", "softcap", "bias", "sinks", "return_lse"),
)


@dataclass(frozen=True)
class Adapter:
    """
    A function of another library.

    Parameters
    ----------
    target : str
        ``MODULE:CALLABLE``, its name on the command line.
    title : str
        For a table.
    packages : tuple of str
        The distributions that it needs, the first giving the version.
    array : str
        The library whose arrays it takes.
    load : callable
        Imports the function.
    imported : str
        The line with which a counterexample imports it.
    name : str
        What the counterexample calls it.
    translate : callable
        From our arguments to its own; its signature says what it has.
    layout : str, default: "bhnd"
        The order of axes.
    dtypes : tuple of str, optional
        What it takes. Default: what the array library has.
    lacks : mapping of str to str
        Capabilities that it lacks, with reasons.
    choices : mapping of str to str
        Choices, with where they are documented; empty where they are not.
    note : str
        What else there is to know.
    slow : bool, default: False
        Whether a call takes long.
    """

    target: str
    title: str
    packages: tuple[str, ...]
    array: str
    load: Callable[[], Callable[..., Any]]
    imported: str
    name: str
    translate: Callable[..., Any]
    layout: str = "bhnd"
    dtypes: tuple[str, ...] | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    slow: bool = False

    @property
    def installed(self) -> bool:
        """Whether all that it needs is installed."""
        return all(map(_version, self.packages))

    @property
    def version(self) -> str:
        """Names and versions of what it needs."""
        return ", ".join(f"{name} {_version(name)}" for name in self.packages)

    def subject(self) -> Subject:
        """
        Import the function, ready to be checked.

        Returns
        -------
        Subject
            The function, with what it lacks and chooses.
        """
        attend = self.load()
        library = read_library(self.array)
        return Subject(
            attend,
            library,
            "dense",
            layout=self.layout,
            dtypes=self.dtypes or library.dtypes,
            lacks=read_lacks(self.translate, self.lacks, ARGUMENTS),
            choices=self.choices,
            imported=self.imported,
            translate=self.translate,
            name=self.name,
            slow=self.slow,
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _four(x: Host | None) -> Host | None:
    """Leading axes of length 1, up to four."""
    return None if x is None else x.reshape((1,) * (4 - x.ndim) + x.shape)


def _given(**keywords: Any) -> dict[str, Any]:
    return {name: x for name, x in keywords.items() if x is not None}


def _added(mask: Host | None, bias: Host | None) -> Host | None:
    """A mask and a bias as one of them: hidden pairs get ``-inf``."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return np.where(mask, bias, -np.inf)


# -- torch ------------------------------------------------------------------------------------


def _torch(
    q: Host,
    k: Host,
    v: Host,
    *,
    mask: Host | None = None,
    bias: Host | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    added = _added(mask, bias)
    if is_causal and added is not None:  # the two together are an error: one table of both
        below = np.tri(q.shape[-2], k.shape[-2], dtype=bool)
        added, is_causal = _added(below, added if added.dtype.kind == "f" else None), False
    keywords = _given(attn_mask=added, scale=scale)
    if is_causal:
        keywords["is_causal"] = True
    if q.ndim > 2 and q.shape[-3] != k.shape[-3]:
        keywords["enable_gqa"] = True
    return (q, k, v), keywords


def _load_torch() -> Callable[..., Any]:
    import torch

    found: Callable[..., Any] = torch.nn.functional.scaled_dot_product_attention
    return found


def flex_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    bias: Any = None,
    scale: float | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """
    Call torch's ``flex_attention``, uncompiled, with mask and scores as functions.

    Parameters
    ----------
    q, k, v : Tensor, shape (B, H, N, D)
        As of `arrattn.attention`.
    mask, bias : Tensor, optional
        Read by a ``mask_mod`` and a ``score_mod``.
    scale, softcap : float, optional
        The factor of the scores, and their bound, in a ``score_mod``.
    return_lse : bool, default: False
        Whether the log-sum-exp comes along.

    Returns
    -------
    Tensor, or pair of them
        What ``flex_attention`` gives.
    """
    import torch
    from torch.nn.attention import flex_attention as flex

    pairs = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    seen = None if mask is None else torch.broadcast_to(mask, pairs)
    added = None if bias is None else torch.broadcast_to(bias, pairs)

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return s if added is None else s + added[b, h, i, j]

    def sees(b: Any, h: Any, i: Any, j: Any) -> Any:
        return seen[b, h, i, j]  # type: ignore[index]

    block = None if seen is None else flex.create_block_mask(sees, *pairs, device="cpu")
    changed = score if (softcap, added) != (None, None) else None
    return flex.flex_attention(
        q,
        k,
        v,
        score_mod=changed,
        block_mask=block,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_lse=return_lse,
    )


def _flex(q: Host, k: Host, v: Host, *, mask: Any = None, bias: Any = None, scale: Any = None,
          softcap: Any = None, return_lse: bool = False) -> Any:  # fmt: skip
    keywords = _given(mask=mask, bias=bias, scale=scale, softcap=softcap)
    return (q, k, v), keywords | ({"return_lse": True} if return_lse else {})


# -- JAX and Keras ----------------------------------------------------------------------------


def _jax(
    q: Host,
    k: Host,
    v: Host,
    *,
    mask: Host | None = None,
    bias: Host | None = None,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    kv_lengths: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    keywords = _given(mask=_four(mask), bias=_four(bias), scale=scale)
    if is_causal:
        keywords["is_causal"] = True
    if window is not None:
        far = q.shape[1] + k.shape[1]
        left, right = (far if side is None else side for side in window)
        keywords["local_window_size"] = (left, right)
    if kv_lengths is not None:
        lengths = np.broadcast_to(np.asarray(kv_lengths, np.int32), q.shape[:1])
        keywords["key_value_seq_lengths"] = lengths.copy()
    if return_lse:
        keywords["return_residual"] = True
    return (q, k, v), keywords


def _load_jax() -> Callable[..., Any]:
    import jax

    found: Callable[..., Any] = jax.nn.dot_product_attention
    return found


def _keras(
    q: Host,
    k: Host,
    v: Host,
    *,
    mask: Host | None = None,
    bias: Host | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    if mask is not None and bias is not None:  # the two together are an error: one table of both
        mask, bias = None, _added(mask, bias)
    keywords = _given(mask=_four(mask), bias=_four(bias), scale=scale)
    return (q, k, v), keywords | ({"is_causal": True} if is_causal else {})


def _load_keras() -> Callable[..., Any]:
    os.environ.setdefault("KERAS_BACKEND", "torch")  # read when Keras is imported
    import keras

    if keras.backend.backend() != "torch":
        msg = "the adapter takes torch tensors: set KERAS_BACKEND=torch"
        raise ImportError(msg)
    attend: Callable[..., Any] = keras.ops.dot_product_attention
    return attend


# -- onnxruntime and MLX ----------------------------------------------------------------------


@cache
def _session(names: tuple[str, ...], dtypes: tuple[str, ...], attributes: Any) -> Any:
    """A model of one Attention operator, opset 23, of any shape."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    kinds = {
        "bool": TensorProto.BOOL,
        "float32": TensorProto.FLOAT,
        "float16": TensorProto.FLOAT16,
    }
    inputs = [
        helper.make_tensor_value_info(name, kinds[dtype], [f"{name}{axis}" for axis in range(4)])
        for name, dtype in zip(names, dtypes, strict=True)
    ]
    output = helper.make_tensor_value_info("Y", kinds[dtypes[0]], [f"Y{a}" for a in range(4)])
    node = helper.make_node("Attention", list(names), ["Y"], **dict(attributes))
    graph = helper.make_graph([node], "attention", inputs, [output])
    opset = [helper.make_opsetid("", 23)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def onnx_attention(
    q: Host,
    k: Host,
    v: Host,
    *,
    attn_mask: Host | None = None,
    is_causal: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
) -> Host:
    """
    Run the Attention operator of ONNX, opset 23, by onnxruntime on the CPU.

    Parameters
    ----------
    q, k, v : array, shape (B, H, N, D)
        Its first three inputs, in NumPy.
    attn_mask : array, optional
        Its fourth, bool or float.
    is_causal, scale, softcap : number, optional
        Its attributes.

    Returns
    -------
    array
        Its first output.
    """
    given = {"Q": q, "K": k, "V": v} | _given(attn_mask=attn_mask)
    attributes = _given(is_causal=is_causal or None, scale=scale, softcap=softcap)
    dtypes = tuple(x.dtype.name for x in given.values())
    session = _session(tuple(given), dtypes, tuple(attributes.items()))
    out: Host = session.run(None, given)[0]
    return out


def _onnx(
    q: Host,
    k: Host,
    v: Host,
    *,
    mask: Host | None = None,
    bias: Host | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
) -> Any:
    keywords = _given(attn_mask=_four(_added(mask, bias)), scale=scale, softcap=softcap)
    return (q, k, v), keywords | ({"is_causal": 1} if is_causal else {})


def _mlx(
    q: Host,
    k: Host,
    v: Host,
    *,
    mask: Host | None = None,
    bias: Host | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    sinks: Host | None = None,
) -> Any:
    added: Any = _added(mask, bias)
    if is_causal and added is not None:  # one argument for both: one table of both
        below = np.tri(q.shape[-2], k.shape[-2], k.shape[-2] - q.shape[-2], dtype=bool)
        added, is_causal = _added(below, added if added.dtype.kind == "f" else None), False
    scale = max(q.shape[-1], 1) ** -0.5 if scale is None else scale
    return (q, k, v), {"scale": scale} | _given(mask="causal" if is_causal else added, sinks=sinks)


def _load_mlx() -> Callable[..., Any]:
    import mlx.core as mx

    found: Callable[..., Any] = mx.fast.scaled_dot_product_attention
    return found


# -- All of them ------------------------------------------------------------------------------

FOUR_AXES = {"rank": "its arrays have four axes", "broadcast": "its batch axes do not broadcast"}
SAME_WIDTH = {"dv": "its documentation gives values the shape of the keys"}
ON_SCORES = "its mask acts on the scores: a hidden value has weight 0, and 0 * NaN is NaN"

ADAPTERS: dict[str, Adapter] = {
    adapter.target: adapter
    for adapter in (
        Adapter(
            "torch.nn.functional:scaled_dot_product_attention",
            "torch SDPA",
            ("torch",),
            "torch",
            _load_torch,
            "from torch.nn.functional import scaled_dot_product_attention",
            "scaled_dot_product_attention",
            _torch,
            lacks={
                "broadcast": FOUR_AXES["broadcast"],
                "short masks": "a mask of one axis raises an IndexError",
                "rank": "with `enable_gqa` its arrays have at least three axes",
                "combine": "`attn_mask` and `is_causal` together are an error",
            },
            choices={
                "alignment": "documented: `torch.ones(L, S).tril(diagonal=0)`",
                "scale sign": "",
                "hidden content": f"documented: `attn_weight @ value`; {ON_SCORES}",
            },
        ),
        Adapter(
            "torch.nn.attention.flex_attention:flex_attention",
            "torch flex_attention",
            ("torch",),
            "torch",
            lambda: flex_attention,
            "from arrattn.testing.adapters import flex_attention",
            "flex_attention",
            _flex,
            dtypes=("float64", "float32"),
            lacks={
                **FOUR_AXES,
                "empty": "its block masks have no axes of length 0",
                "gradients": "it has none on a CPU",
            },
            choices={"hidden content": f"documented: `mask_mod` sets scores to -inf; {ON_SCORES}"},
            slow=True,
            note="run uncompiled, as its own tests do for the expected result",
        ),
        Adapter(
            "jax.nn:dot_product_attention",
            "jax.nn",
            ("jax",),
            "jax",
            _load_jax,
            "from jax.nn import dot_product_attention",
            "dot_product_attention",
            _jax,
            layout="bnhd",
            lacks={**FOUR_AXES, **SAME_WIDTH},
            choices={
                "alignment": "its mask is `jnp.tril(ones(T, S))` (jax/_src/nn/functions.py)",
                "empty rows": "its masks set scores to a large negative number, so that a row of "
                "them is a mean, and a row of biases of -inf is NaN (jax/_src/nn/functions.py)",
                "precision": "its softmax is taken in float32 (jax/_src/nn/functions.py)",
                "hidden content": f"documented: `mask` filters out logits; {ON_SCORES}",
            },
        ),
        Adapter(
            "keras.ops:dot_product_attention",
            "keras.ops on torch",
            ("keras", "torch"),
            "torch",
            _load_keras,
            'import os\nos.environ["KERAS_BACKEND"] = "torch"\n'
            "from keras.ops import dot_product_attention",
            "dot_product_attention",
            _keras,
            layout="bnhd",
            dtypes=("float32",),
            lacks={**FOUR_AXES, **SAME_WIDTH},
            choices={
                "alignment": "as that of its backends, torch and JAX",
                "scale sign": "",
                "empty rows": "",
                "hidden content": f"documented: `mask` filters out logits; {ON_SCORES}",
            },
        ),
        Adapter(
            "onnxruntime:Attention",
            "onnxruntime",
            ("onnxruntime", "onnx"),
            "numpy",
            lambda: onnx_attention,
            "from arrattn.testing.adapters import onnx_attention",
            "onnx_attention",
            _onnx,
            dtypes=("float32",),
            lacks={
                **FOUR_AXES,
                "empty": "it raises where there is no key",
                "short masks": "a mask has to reach over all keys",
                "any scale": "it raises unless the scale is greater than 0",
            },
            choices={
                "alignment": "the operator of opset 23 is documented to be aligned upper left",
                "hidden content": f"defined by MatMul, Softmax and MatMul; {ON_SCORES}",
            },
        ),
        Adapter(
            "mlx.core.fast:scaled_dot_product_attention",
            "MLX",
            ("mlx",),
            "mlx.core",
            _load_mlx,
            "from mlx.core.fast import scaled_dot_product_attention",
            "scaled_dot_product_attention",
            _mlx,
            lacks={
                **FOUR_AXES,
                **SAME_WIDTH,
                "combine": "one argument says `causal` or holds a mask",
            },
            choices={
                "empty rows": "",
                "hidden content": f"documented: O = softmax(Q K^T) V; {ON_SCORES}",
            },
        ),
    )
}

#: Short names on the command line.
SHORT = {
    "torch": "torch.nn.functional:scaled_dot_product_attention",
    "flex_attention": "torch.nn.attention.flex_attention:flex_attention",
    "jax": "jax.nn:dot_product_attention",
    "keras": "keras.ops:dot_product_attention",
    "onnxruntime": "onnxruntime:Attention",
    "mlx": "mlx.core.fast:scaled_dot_product_attention",
}


def adapter_of(target: str) -> Adapter | None:
    """
    Find the adapter of a target on the command line.

    Parameters
    ----------
    target : str
        ``MODULE:CALLABLE``, or a short name.

    Returns
    -------
    Adapter or None
        The adapter, if there is one.
    """
    return ADAPTERS.get(SHORT.get(target, target))
