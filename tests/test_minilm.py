"""The sentence model: our forward pass against torch's, on the same weights."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

from arrattn.bench import minilm
from arrattn.bench.erf import erf, gelu

EPS = float(np.finfo(np.float32).eps)

SENTENCES = [
    "Short.",
    "",
    "A list of eight sentences, of different lengths.",
    "Was it a car or a cat I saw?",
    "Attention written once runs on every array library that follows the standard.",
    "The quick brown fox jumps over the lazy dog, again and again, until both are tired of it.",
    "Keys that a query cannot see have no part in its result, whatever they hold.",
    " ".join(["A long one, cut at the length that the model was trained for."] * 30),
]

needs_model = pytest.mark.skipif(
    importlib.util.find_spec(minilm.PACKAGE) is None
    or importlib.util.find_spec("safetensors") is None
    or importlib.util.find_spec("tokenizers") is None,
    reason="the model's package, safetensors or tokenizers is not installed",
)


@pytest.fixture(scope="module")
def model() -> minilm.MiniLM:
    return minilm.load_model()


@pytest.fixture(scope="module")
def expected() -> Any:
    """Embeddings by transformers' BertModel, one sentence at a time: no padding at all."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder = minilm._model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bert = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = []
    for sentence in SENTENCES:
        inputs = tokenizer(sentence, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            mean = bert(**inputs).last_hidden_state[0].mean(0)
        rows.append((mean / mean.norm()).numpy())
    return np.stack(rows)


@needs_model
@pytest.mark.parametrize("library", ["numpy", "torch", "jax.numpy"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_embeddings_equal_torch(library: str, expected: Any) -> None:
    xp = pytest.importorskip(library)
    got = minilm.embed(SENTENCES, xp)
    assert array_namespace(got) is array_namespace(xp.asarray([0.0]))
    assert got.dtype == xp.float32
    np.testing.assert_allclose(np.asarray(got), expected, rtol=0, atol=1e-5)


@needs_model
def test_embedding_does_not_depend_on_the_batch(model: minilm.MiniLM) -> None:
    alone = minilm.embed(SENTENCES[:1], model=model)
    among = minilm.embed(SENTENCES, model=model, batch_size=3)
    assert among.shape == (8, 384)
    np.testing.assert_allclose(among[:1], alone, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(among, axis=-1), 1, rtol=1e-6)
    assert minilm.embed([], model=model).shape == (0, 384)


@needs_model
def test_captured_rows_belong_to_their_tokens(model: minilm.MiniLM) -> None:
    ids = list(range(2000, 2300))  # one window of 254 tokens and a short one
    told: list[tuple[int, int]] = []
    q, k, v = minilm.capture(model, ids, 1, progress=lambda *x: told.append(x), batch_size=1)
    assert q.shape == k.shape == v.shape == (12, 300, 32)
    assert told == [(254, 300), (300, 300)]
    for whole, window in zip((q, k, v), minilm.capture(model, ids[254:], 1), strict=True):
        np.testing.assert_allclose(whole[:, 254:], window, rtol=0, atol=1e-5)
    # The first window is the model's own: its layer 1 sees what layer 0 made of it.
    padded, lengths = minilm._pad(model, [minilm._mark(model, ids[:254])])
    x = minilm._transform(model, 0, minilm._embed_tokens(model, padded), lengths)
    for whole, own in zip((q, k, v), minilm._project(model, 1, x), strict=True):
        np.testing.assert_allclose(whole[:, :254], own[0, :, 1:-1], rtol=0, atol=1e-5)


def test_erf_is_below_float32_rounding() -> None:
    x = np.linspace(-7, 7, 20_001)
    true = np.asarray([math.erf(t) for t in x])
    assert np.max(np.abs(erf(x, xp=np) - true)) < EPS / 4
    in_float32 = erf(x.astype(np.float32), xp=np)
    assert in_float32.dtype == np.float32
    # The approximation adds nothing; what is left is float32 arithmetic.
    assert np.max(np.abs(in_float32 - true)) < 4 * EPS


def test_erf_is_odd_and_ends_at_one() -> None:
    x = np.asarray([0.0, 0.3, 2.0, 50.0, math.inf], dtype=np.float32)
    np.testing.assert_array_equal(erf(-x, xp=np), -erf(x, xp=np))
    np.testing.assert_allclose(erf(x, xp=np)[-2:], 1, rtol=0, atol=4 * EPS)
    assert np.isnan(erf(np.asarray(math.nan), xp=np))


def test_gelu_is_the_exact_form() -> None:
    x = np.linspace(-9, 9, 1001)
    true = [t * 0.5 * math.erfc(-t / math.sqrt(2)) for t in x]
    np.testing.assert_allclose(gelu(x, xp=np), true, rtol=0, atol=1e-7)
