"""Calls with decay and by the delta rule, and how far their results may be off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from hypothesis import strategies as st
from lanes import Lane
from softmax import as_held
from strategies import Case, broadcast, id_arrays, over_batch, shapes, values
from sums import MAPS, linear_errors, make_map, options_of
from tolerance import accumulation

from arrattn import DeltaState, LinearState, delta_attention, linear_attention, reference
from arrattn._core import gated
from arrattn.feature_maps._read import read_map
from arrattn.testing.bounds import delta_errors

CHUNKS = st.sampled_from((1, 2, 4, 32))
DECAYS = ("mixed", "slow", "fast", "none", "sudden")
FORMS = ("head", "token", "token", "tokens, one axis more", "channel")


@contextmanager
def chunks_of(size: int, span: int = 2) -> Iterator[None]:
    """Small chunks and spans bring out every edge in small examples."""
    before = gated.CHUNK, gated.SPAN
    gated.CHUNK, gated.SPAN = size, span
    try:
        yield
    finally:
        gated.CHUNK, gated.SPAN = before


def decays(how: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Logarithms of decay, from a millionth to fifty for each step."""
    exponent = {"slow": (-6, -3), "fast": (0, 1.7)}.get(how, (-6, 1.7))
    g = -(10.0 ** rng.uniform(*exponent, size=shape))
    if how == "none":
        return 0.0 * g
    return np.where(rng.random(shape) < 0.2, -np.inf, g) if how == "sudden" else g


@st.composite
def gated_shapes(draw: st.DrawFn) -> Any:
    """Shapes of q, k and v, now and then with more heads of `v` than of `k`."""
    q, k, v = draw(shapes())
    if len(v) < 3 or draw(st.booleans()):
        return q, k, v
    heads = draw(st.sampled_from((2, 3))) * k[-3]
    # As many query heads as key heads, as value heads, or a multiple of those.
    q_heads = draw(st.sampled_from((k[-3], heads, 2 * heads)))
    return (*q[:-3], q_heads, *q[-2:]), k, (*v[:-3], heads, *v[-2:])


def log_decay(
    draw: st.DrawFn, case: Case, width: int, rng: np.random.Generator
) -> np.ndarray[Any, Any]:
    """Draw decay in one of its shapes."""
    n, form = case.lengths[1], draw(st.sampled_from(FORMS))
    heads = () if case.v.ndim == 2 else (case.v.shape[-3],)
    batch = draw(broadcast(case.batch)) if case.v.ndim > 2 else ()
    lead = (*batch, *heads)
    if form == "token" and n in (0, 1, width):
        form = "tokens, one axis more"  # what could be read in two ways is refused
    shape = {
        "head": (*heads, 1, 1),
        "token": (*lead, n),
        "tokens, one axis more": (*lead, n, 1),
        "channel": (*lead, n, width),
    }[form]
    return decays(draw(st.sampled_from(DECAYS)), shape, rng)


@st.composite
def decayed_cases(draw: st.DrawFn, maps: tuple[str, ...] = MAPS, *, state: bool = True) -> Case:
    """Draw a call of linear attention with decay; the map by its name."""
    q, k, v = draw(gated_shapes())
    seed = draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    how = draw(st.sampled_from(("plain", "tied")))
    arrays = values(how, q, rng), values(how, k, rng), rng.normal(size=v)
    case = Case(*arrays, how=f"{how} values of seed {seed}")
    options, name = case.options, draw(st.sampled_from(maps))
    options |= {"feature_map": name, "is_causal": draw(st.booleans())}
    d = case.q.shape[-1]
    width = read_map(make_map(name, d)).output_dim(d)
    options["log_decay"] = log_decay(draw, case, width, rng)
    if draw(st.booleans()):
        options |= {"normalize": False, "scale": draw(st.sampled_from((0.7, -2.0)))}
    draw_tokens(draw, case, rng)
    if state and "segment_ids" not in options and draw(st.booleans()):
        lead = (*case.batch, *case.v.shape[-3:-2])
        z = np.abs(rng.normal(size=(*lead, width)))
        options["initial_state"] = LinearState(rng.normal(size=(*z.shape, case.v.shape[-1])), z)
    return case


@st.composite
def delta_cases(draw: st.DrawFn, *, state: bool = True) -> Case:
    """Draw a call of delta attention, its keys of length 1."""
    q, k, v = draw(gated_shapes())
    seed = draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=k)
    if draw(st.booleans()):  # few different ones: the memory is overwritten
        keys = np.sign(keys)
    keys /= np.sqrt(np.sum(keys**2, axis=-1, keepdims=True))
    case = Case(rng.normal(size=q), keys, rng.normal(size=v), how=f"values of seed {seed}")
    heads = case.v.shape[-3:-2]
    batch = draw(broadcast(case.batch)) if heads else ()
    beta = rng.random((*batch, *heads, case.lengths[1]))
    case.options["beta"] = np.round(beta) if draw(st.booleans()) else beta
    if draw(st.booleans()):
        case.options["log_decay"] = log_decay(draw, case, case.q.shape[-1], rng)
    case.options["scale"] = draw(st.sampled_from((1.0, -0.5)))
    draw_tokens(draw, case, rng)
    if state and "segment_ids" not in case.options and draw(st.booleans()):
        shape = (*case.batch, *heads, case.k.shape[-1], case.v.shape[-1])
        case.options["initial_state"] = DeltaState(rng.normal(size=shape))
    return case


def draw_tokens(draw: st.DrawFn, case: Case, rng: np.random.Generator) -> None:
    """Draw which tokens are there, and their segments."""
    (nq, nk), options = case.lengths, case.options
    names = ("key_mask", "kv_lengths", "segment_ids")
    for name in draw(st.lists(st.sampled_from(names), max_size=2, unique=True)):
        if name == "key_mask":
            options[name] = rng.random((*draw(broadcast(case.batch)), nk)) < 0.7
        elif name == "kv_lengths":
            options[name] = draw(over_batch(case.batch, 0, nk))
        else:
            ids = draw(id_arrays(nq, nk, case.batch))
            options[name] = ids[0] if nq == nk and draw(st.booleans()) else ids


def check_decayed(lane: Lane, case: Case, *, dtype: str = "float64") -> None:
    """Assert that output and state are the float64 reference's, to rounding."""
    with_state = "segment_ids" not in case.options
    options = options_of(case) | {"return_state": with_state}
    got = lane.call(linear_attention, *case.arrays, dtype=dtype, **options)
    held = as_held(case, dtype)
    options |= {"log_decay": held.options["log_decay"]}
    expected = reference.linear_attention(*held.arrays, **options)
    if not with_state:
        got, expected = (got, ()), (expected, ())
    errors = linear_errors(held, dtype, expected[0])
    lane.check(got[0], expected[0], dtype=dtype, within=errors[0])
    for a, b, within in zip(got[1], expected[1], errors[1:], strict=False):
        lane.check(a, b, dtype=accumulation(dtype), within=within)


def check_delta(lane: Lane, case: Case, *, dtype: str = "float64") -> None:
    """The same for delta attention."""
    with_state = "segment_ids" not in case.options
    options = case.options | {"return_state": with_state}
    got = lane.call(delta_attention, *case.arrays, dtype=dtype, **options)
    held = as_held(case, dtype)
    options |= {n: held.options[n] for n in ("beta", "log_decay") if n in options}
    expected = reference.delta_attention(*held.arrays, **options)
    if not with_state:
        got, expected = (got, ()), (expected, ())
    within, state_within = delta_errors(held, dtype, expected[0])
    lane.check(got[0], expected[0], dtype=dtype, within=within)
    for a, b in zip(got[1], expected[1], strict=True):
        lane.check(a, b, dtype=accumulation(dtype), within=state_within)
