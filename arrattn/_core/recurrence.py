"""
Linear attention as one recurrence over time, a chunk of tokens at a step.

What the keys of the past leave behind is a `Memory`: ``S = sum_j phi(k_j) (v_j, 1)^T``, the
normaliser being the column that belongs to the 1. Three ways of going through the tokens
are enough for every call: all keys and then all queries, both side by side (causal), and
both in one sequence sorted by segment and position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import array_api_compat as compat
import numpy as np

from arrattn._core import loops, staging, streams, threads, tiles, workspace
from arrattn._core.order import gather_tokens, merged_order, own_order
from arrattn._core.typing import Array, DType, Namespace
from arrattn._state import LinearState
from arrattn.feature_maps import FeatureMap, Features
from arrattn.feature_maps._base import Custom

#: Tokens per step: products within a chunk cost as much as those with the memory.
CHUNK = 128


class How(NamedTuple):
    """What a call does, apart from its arrays; hashable, so that it can name a compilation."""

    xp: Namespace
    feature_map: FeatureMap
    is_causal: bool
    normalize: bool
    scale: float
    batch: tuple[int, ...]
    acc: DType
    same_ids: bool  # one array of ids serves both sides
    chunk: int
    careful: bool = True  # keys or values may hold what is not finite


class Operands(NamedTuple):
    """
    The arrays of a call. `lengths` are those of the keys where an array tells them, and move
    the queries' positions; `weights` belong to the feature map.
    """

    q: Array  # (..., Hkv, G, Nq, D)
    k: Array  # (..., Hkv, Nk, D)
    v: Array  # (..., Hkv, Nk, Dv)
    key_mask: Array | None  # (..., Hkv | 1, Nk)
    q_ids: Array | None  # (..., Nq)
    k_ids: Array | None  # (..., Nk)
    lengths: Array | None  # (...)
    state: LinearState | None
    weights: Array | None
    log_decay: Array | None = None  # (..., Hkv | 1, Nk, Dphi | 1)
    beta: Array | None = None  # (..., Hkv | 1, Nk)

    def keys(self, start: int, stop: int | None = None) -> Operands:
        """Only these keys; without `stop`, to the last."""
        k, v = self.k[..., start:stop, :], self.v[..., start:stop, :]
        mask = None if self.key_mask is None else self.key_mask[..., start:stop]
        ids = None if self.k_ids is None else self.k_ids[..., start:stop]
        decay = None if self.log_decay is None else self.log_decay[..., start:stop, :]
        beta = None if self.beta is None else self.beta[..., start:stop]
        return self._replace(k=k, v=v, key_mask=mask, k_ids=ids, log_decay=decay, beta=beta)

    def item(self, b: tuple[int, ...], h: slice) -> Operands:
        """One batch item and some of its key heads, without batch axes."""

        def pick(x: Array | None, trailing: int, *, heads: int = 0) -> Array | None:
            if x is None:
                return None
            x = tiles.pick_item(x, b, trailing)
            return x[h] if heads and x.shape[0] > 1 else x

        state = self.state and LinearState(
            pick(self.state.S, 3, heads=1), pick(self.state.z, 2, heads=1)
        )
        return Operands(
            q=pick(self.q, 4, heads=1),
            k=pick(self.k, 3, heads=1),
            v=pick(self.v, 3, heads=1),
            key_mask=pick(self.key_mask, 2, heads=1),
            q_ids=pick(self.q_ids, 1),
            k_ids=pick(self.k_ids, 1),
            lengths=pick(self.lengths, 0),
            state=state,
            weights=self.weights,
            log_decay=pick(self.log_decay, 3, heads=1),
            beta=pick(self.beta, 2, heads=1),
        )


class Memory(NamedTuple):
    """
    The sums over past keys, ``S exp(log)``; `log` is None where the features carry none.

    What is not finite stays out of the sums, and `bad` tells in which columns: a NaN in them
    would reach the gradients of queries that do not see it through ``0 * NaN``. It is None
    where all is known to be finite.

    Sorted tokens come one segment after the other: then `ids` names the segment that the
    sums belong to, and they are invisible to every other.
    """

    S: Array  # (..., Hkv, Dphi, Dv + 1)
    log: Any  # (..., Hkv), or None
    bad: Any  # bool, (..., Hkv, 1, Dv + 1), or None
    ids: Any = None  # (...), or None


class Keys(NamedTuple):
    """A chunk of keys as the sums take them up; absent ones are zeros."""

    phi: Array  # (..., Hkv, c, Dphi)
    log: Any  # (..., Hkv, c), or None
    v: Array  # (..., Hkv, c, Dv + 1)
    bad: Array | None  # bool, as v


#: Goes through the tokens of a call: `run`, or another that takes and gives the same.
Run = Callable[..., tuple[Array, Array, Array]]


def attend(
    how: How, x: Operands, through: Run | None = None, *, together: bool = False
) -> tuple[Array, Array, Array]:
    """
    Do a call as suits its library: what `run`, or `through` in its place, gives.

    On NumPy the heads of an item are a job each, or one job `together`, which may make its own.
    """
    through = run if through is None else through
    kind = loops.schedule(how.xp)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        if kind == "threads":
            return run_threads(how, x, through, together=together)
        if kind == "blocks":
            return run_blocks(how, x, through, together=together)
        if isinstance(how.feature_map, Custom):
            # A function may change what it does between calls: never compile it for good.
            return through(how, x)
        out, S, z = loops.staged(through, how, x, xp=how.xp)
        return out, S, z


def run_threads(
    how: How, x: Operands, through: Run, *, together: bool
) -> tuple[Array, Array, Array]:
    """
    `through` on NumPy: a job for each batch item and one or all of its key heads.
    """
    (hkv, g, nq, _), dv = x.q.shape[-4:], x.v.shape[-1]
    f = features_of(how.feature_map, x.k, how.acc, how.xp, x.weights)
    dphi = f.phi.shape[-1]
    out = np.empty((*how.batch, hkv, g, nq, dv), x.q.dtype)
    S = np.empty((*how.batch, hkv, dphi, dv), how.acc)
    z = np.empty((*how.batch, hkv, dphi), how.acc)
    alone = how._replace(batch=())
    # Streams do not sort tokens, and multiply logarithms in where ratios of positive sums result.
    plain = f.log is None or (how.normalize and how.feature_map.non_negative)
    streamed = through is run and plain and form(how, x) != "sorted"

    def job(b: tuple[int, ...], h: slice) -> None:
        at: Any = (*b, h)
        own, into = x.item(b, h), out[at]
        if streamed:
            own, into = _stream(alone, own, f, into)
        if streamed and own.q.shape[-2] == own.k.shape[-2] == 0 and own.state:
            S[at], z[at] = own.state
        else:
            _, S[at], z[at] = through(alone, own, into)

    heads = max(1, hkv) if together else 1
    jobs = [
        partial(job, b, slice(h, min(h + heads, hkv)))
        for b in np.ndindex(*how.batch)
        for h in range(0, hkv, heads)
    ]
    largest = min(how.chunk, max(nq, x.k.shape[-2])) * max(g * dphi, dphi) * max(how.chunk, dv + 1)
    threads.run_jobs(jobs, small=largest <= threads.SMALL)
    return out, S, z


def _stream(how: How, x: Operands, f: Features, out: Array) -> tuple[Operands, Array]:
    """Let `streams` do what it can of one head; what is left, and the state it has reached."""
    state = LinearState(
        np.zeros((f.phi.shape[-1], x.v.shape[-1]), how.acc), np.zeros(f.phi.shape[-1], how.acc)
    )
    if x.state:
        state = LinearState(x.state.S[0], x.state.z[0])
    job = streams.Job(
        feature_map=how.feature_map,
        carries_log=f.log is not None,
        weights=x.weights,
        q=x.q[0],
        k=x.k[0],
        v=x.v[0],
        mask=None if x.key_mask is None else x.key_mask[0],
        is_causal=how.is_causal,
        normalize=how.normalize,
        scale=how.scale,
        acc=how.acc,
        chunk=max(1, how.chunk // 2),
    )
    i, j, state = streams.run(job, state, out[0])
    x = x.keys(j)._replace(q=x.q[..., i:, :])
    return x._replace(state=LinearState(state.S[None], state.z[None])), out[..., i:, :]


def run_blocks(
    how: How, x: Operands, through: Run, *, together: bool
) -> tuple[Array, Array, Array]:
    """
    `through` on blocks of items and heads of a lazy call, when they are computed.
    """
    (hkv, g, nq, _), dv = x.q.shape[-4:], x.v.shape[-1]
    f = features_of(how.feature_map, x.k, how.acc, how.xp)
    sizes = [(g, nq, dv), (f.phi.shape[-1], dv), (f.phi.shape[-1],)]
    dtypes = [x.q.dtype, how.acc, how.acc]
    if 0 in (*how.batch, hkv, g):
        lead = (*how.batch, hkv)
        empty = [
            how.xp.zeros((*lead, *size), dtype=t) for size, t in zip(sizes, dtypes, strict=True)
        ]
        return empty[0], empty[1], empty[2]
    state = x.state or (None, None)
    pieces = [
        staging.Piece(x.q, 3),
        staging.Piece(x.k, 2),
        staging.Piece(x.v, 2),
        staging.Piece(x.key_mask, 1),
        staging.Piece(x.q_ids, 1, has_head=False),
        staging.Piece(x.k_ids, 1, has_head=False),
        staging.Piece(x.lengths, 0, has_head=False),
        staging.Piece(state[0], 2),
        staging.Piece(state[1], 1),
        staging.Piece(x.log_decay, 2),
        staging.Piece(x.beta, 1),
    ]

    def on_block(q: Array, k: Array, v: Array, *rest: Any) -> Any:
        mask, q_ids, k_ids, lengths, S, z, decay, beta = rest
        xp = compat.array_namespace(q)
        block = how._replace(
            xp=xp,
            batch=np.broadcast_shapes(q.shape[:-4], k.shape[:-3], v.shape[:-3]),
            acc=staging.block_dtype(how.acc, xp),
        )
        weights = how.feature_map.weights(xp.astype(k[..., :0, :], block.acc), xp)
        past = None if S is None else LinearState(S, z)
        operands = Operands(q, k, v, mask, q_ids, k_ids, lengths, past, weights, decay, beta)
        if loops.schedule(xp) == "threads":
            return run_threads(block, operands, through, together=together)
        return through(block, operands)

    out, S, z = staging.on_blocks(on_block, pieces, sizes, dtypes)
    return out, S, z


def run(how: How, x: Operands, into: Array | None = None) -> tuple[Array, Array, Array]:
    """
    Do the call: the outputs (..., Hkv, G, Nq, Dv), in the dtype of `q`, and the state.

    Outputs are written to `into`, where that is given.
    """
    xp = how.xp
    q, k, v = (
        xp.broadcast_to(a, (*how.batch, *a.shape[-n:])) for a, n in ((x.q, 4), (x.k, 3), (x.v, 3))
    )
    x = x._replace(q=q, k=k, v=v)
    # A sum tells whether all terms are finite, and needs no array to do so.
    sums = (xp.isfinite(xp.sum(a, dtype=how.acc)) for a in (x.k, x.v))
    how = how._replace(careful=not all(loops.truth(a) for a in sums))
    start, out = start_memory(how, x), workspace.Pieces(into)
    if 0 in q.shape[:-2]:  # no heads, or no items: nothing to sort or to sum
        out.add(zeros_out(how, x))
        memory = start
    else:
        memory = FORMS[form(how, x)](how, x, start, out)
    S = memory.S
    if memory.log is not None:
        S = S * xp.exp(finite(memory.log, xp))[..., None, None]
    if memory.bad is not None:
        S = xp.where(memory.bad, math.nan, S)
    return out.joined(xp=xp), S[..., :-1], S[..., -1]


def form(how: How, x: Operands) -> str:
    """Which way through the tokens a call takes."""
    if x.q_ids is not None or (how.is_causal and x.lengths is not None):
        return "sorted"
    return "side by side" if how.is_causal else "all at once"


def features_of(
    feature_map: FeatureMap, k: Array, acc: DType, xp: Namespace, weights: Array | None = None
) -> Features:
    """The features of no keys at all: their number, and whether logarithms come with them."""
    return feature_map.phi_k(xp.astype(k[..., :0, :], acc), xp, weights)


# -- Three ways through the tokens ------------------------------------------------------------


def _all_at_once(how: How, x: Operands, memory: Memory, out: workspace.Pieces) -> Memory:
    """Every key, and then every query."""
    memory = _absorb_all(how, x, memory)
    read_all(how, x, memory, out)
    return memory


def _absorb_all(how: How, x: Operands, memory: Memory) -> Memory:
    """Take up every key."""

    def step(memory: Memory, part: Any) -> tuple[Memory, None]:
        return _absorb(memory, read_keys(how, x, *part), how.xp), None

    parts = [(x.k, -2), (x.v, -2), (x.key_mask, -1)]
    after: Memory = over_chunks(step, memory, parts, x.k.shape[-2], how, workspace.Pieces())
    return after


def read_all(how: How, x: Operands, memory: Memory, out: workspace.Pieces) -> None:
    """Every query, of the same memory."""

    def step(carry: tuple[()], part: Any) -> tuple[tuple[()], Array]:
        f = how.feature_map.phi_q(how.xp.astype(part[0], how.acc), how.xp, x.weights)
        top = tiles.group_matmul(f.phi, memory.S, xp=how.xp)
        base = None
        if memory.log is not None:
            base = finite(memory.log, how.xp)[..., None, None, None]
        bad = None if memory.bad is None else memory.bad[..., None, :, :]
        return carry, finish(how, x, f, top, base, bad)

    if x.q.shape[-2] == 0:
        out.add(zeros_out(how, x))
    else:
        over_chunks(step, (), [(x.q, -2)], x.q.shape[-2], how, out)


def _side_by_side(how: How, x: Operands, memory: Memory, out: workspace.Pieces) -> Memory:
    """
    Causal, the last query beside the last key: whichever side is longer starts alone.
    """
    ahead = x.k.shape[-2] - x.q.shape[-2]
    if ahead > 0:
        memory = _absorb_all(how, x.keys(0, ahead), memory)
        x = x.keys(ahead)
    elif ahead < 0:
        read_all(how, x._replace(q=x.q[..., :-ahead, :]), memory, out)
        x = x._replace(q=x.q[..., -ahead:, :])
    n = x.k.shape[-2]
    if n == 0:
        read_all(how, x, memory, out)
        return memory
    parts = [(x.q, -2), (x.k, -2), (x.v, -2), (x.key_mask, -1), (None, -1)]
    after: Memory = over_chunks(_causal_step(how, x, None), memory, parts, n, how, out)
    return after


def _sorted(how: How, x: Operands, start: Memory, out: workspace.Pieces) -> Memory:
    """
    Segments in any order, or positions that only the arrays know: sort, then go causally.
    """
    if x.q.shape[-2] == 0 or x.k.shape[-2] == 0:
        read_all(how, x, start, out)
        return _absorb_all(how, x, start)
    xp = how.xp
    aligned = x.lengths is None and x.q.shape[-2] == x.k.shape[-2]
    own = how.is_causal and how.same_ids and aligned
    order = own_order(how, x) if own else merged_order(how, x)
    mask = order.is_key
    if x.key_mask is not None:
        shape = (*how.batch, 1, x.k.shape[-2])
        lifted = xp.reshape(xp.broadcast_to(x.key_mask, shape), (*shape, 1))
        taken = gather_tokens(lifted, order.k, how)[..., 0]
        mask = taken if mask is None else mask & taken
    memory, initial = start, None
    if order.ids is not None:
        # The sums start anew with every segment, so what all queries see stands apart.
        log = None if start.log is None else xp.full_like(start.log, -math.inf)
        memory = Memory(xp.zeros_like(start.S), log, start.bad, order.ids[..., 0])
        initial = None if x.state is None else _seen_past(start, None, xp)
    q, k, v = (
        gather_tokens(a, at, how) for a, at in ((x.q, order.q), (x.k, order.k), (x.v, order.k))
    )
    parts = [(q, -2), (k, -2), (v, -2), (mask, -1), (order.ids, -1)]
    step = _causal_step(how, x, initial)
    mixed = workspace.Pieces()
    after = over_chunks(step, memory, parts, q.shape[-2], how, mixed)
    out.add(gather_tokens(mixed.joined(xp=xp), order.row, how))
    return after if order.ids is None else _absorb_all(how, x, start)


FORMS = {"sorted": _sorted, "side by side": _side_by_side, "all at once": _all_at_once}


# -- The steps --------------------------------------------------------------------------------


def start_memory(how: How, x: Operands) -> Memory:
    """The memory before any key: empty, or the state that came in."""
    xp, device = how.xp, loops.device_of(x.q)
    f = features_of(how.feature_map, x.k, how.acc, xp, x.weights)
    shape = (*how.batch, x.k.shape[-3], f.phi.shape[-1], x.v.shape[-1] + _ones(x))
    if x.state is None:
        S = xp.zeros(shape, dtype=how.acc, device=device)
    else:
        S = xp.broadcast_to(x.state.S, (*shape[:-1], x.v.shape[-1]))
        if _ones(x):
            z = xp.broadcast_to(x.state.z, shape[:-1])
            S = xp.concat([S, z[..., None]], axis=-1)
    bad = None
    if how.careful:
        bad = xp.zeros((*shape[:-2], 1, shape[-1]), dtype=xp.bool, device=device)
    if f.log is None:
        return Memory(S, None, bad)
    # A state of zeros weighs nothing, so that it is the same as none.
    log = xp.zeros(shape[:-2], dtype=how.acc, device=device)
    return Memory(S, xp.where(xp.any(S != 0, axis=(-2, -1)), log, -math.inf), bad)


def _ones(x: Operands) -> int:
    """How many columns of ones stand beside the values: the delta rule has no normaliser."""
    return 1 if x.beta is None else 0


def zeros_out(how: How, x: Operands) -> Array:
    """The output where there is nothing to read or to be read."""
    shape = (*x.q.shape[:-1], x.v.shape[-1])
    return how.xp.zeros(shape, dtype=x.q.dtype, device=loops.device_of(x.q))


def read_keys(how: How, x: Operands, k: Array, v: Array, mask: Array | None) -> Keys:
    """Features of a chunk of keys, and a one beside each value; absent keys leave nothing."""
    xp = how.xp
    k, v = xp.astype(k, how.acc, copy=False), xp.astype(v, how.acc, copy=False)
    if mask is not None:
        k, v = xp.where(mask[..., None], k, 0.0), xp.where(mask[..., None], v, 0.0)
    if _ones(x):
        one = xp.ones((*v.shape[:-1], 1), dtype=v.dtype, device=loops.device_of(v))
        v = xp.concat([v, one], axis=-1)
    bad = None
    if how.careful:
        bad_k = ~xp.all(xp.isfinite(k), axis=-1, keepdims=True)
        bad = ~xp.isfinite(v) | bad_k
        k, v = xp.where(bad_k, 0.0, k), xp.where(bad, 0.0, v)
    phi, log = how.feature_map.phi_k(k, xp, x.weights)
    if mask is not None:
        phi = xp.where(mask[..., None], phi, 0.0)
        log = None if log is None else xp.where(mask, log, -math.inf)
    return Keys(phi, log, v, bad)


def _absorb(memory: Memory, keys: Keys, xp: Namespace) -> Memory:
    """Add keys to the sums, all under the larger of the two logarithms."""
    if keys.bad is not None:
        memory = memory._replace(bad=memory.bad | xp.any(keys.bad, axis=-2, keepdims=True))
    if memory.log is None:
        return memory._replace(S=memory.S + xp.matrix_transpose(keys.phi) @ keys.v)
    top = loops.stop_gradient(xp.max(keys.log, axis=-1))
    log = xp.maximum(memory.log, top)
    base = finite(log, xp)
    phi = keys.phi * xp.exp(keys.log - base[..., None])[..., None]
    S = memory.S * xp.exp(memory.log - base)[..., None, None]
    return memory._replace(S=S + xp.matrix_transpose(phi) @ keys.v, log=log)


def _causal_step(how: How, x: Operands, initial: Past | None) -> Callable[..., Any]:
    """
    A chunk of tokens: pairs within it, the memory of those before, then one more memory.
    """

    def step(memory: Memory, part: Any) -> tuple[Memory, Array]:
        q, k, v, mask, ids = part
        xp = how.xp
        f = how.feature_map.phi_q(xp.astype(q, how.acc), xp, x.weights)
        keys = read_keys(how, x, k, v, mask)
        t = xp.arange(q.shape[-2], device=loops.device_of(q))
        visible, ours = t[None, :] <= t[:, None], None
        if ids is not None:
            visible = visible & (ids[..., :, None] == ids[..., None, :])
            visible = visible[..., None, None, :, :]
            ours = (ids == memory.ids[..., None])[..., None, None, :, None]
        pasts = [_seen_past(memory, ours, xp)] + ([] if initial is None else [initial])

        base = _largest_log(keys, visible, pasts, xp)
        w = tiles.group_matmul(f.phi, xp.matrix_transpose(keys.phi), xp=xp)
        if base is not None:
            log = xp.where(visible, keys.log[..., None, None, :], -math.inf)
            w = w * xp.exp(log - base)
        w = xp.where(visible, w, 0.0)  # (..., Hkv, G, c, c)
        top = tiles.group_matmul(w, keys.v, xp=xp)
        bad = None
        if keys.bad is not None:
            bad = tiles.sees(visible, keys.bad, like=top, nk=t.shape[0], xp=xp)
        for past in pasts:
            term = tiles.group_matmul(f.phi, past.S, xp=xp)
            if base is not None:
                term = term * xp.exp(past.log - base)
            if past.bad is not None:
                bad = bad | (past.bad if past.seen is None else past.bad & past.seen)
            top = top + (term if past.seen is None else xp.where(past.seen, term, 0.0))
        out = finish(how, x, f, top, base, bad)
        if ids is not None:
            memory, keys = _last_segment(memory, keys, ids, xp)
        return _absorb(memory, keys, xp), out

    return step


class Past(NamedTuple):
    """A memory as the rows of a chunk see it."""

    S: Array  # (..., Hkv, Dphi, Dv + 1)
    log: Any  # (..., Hkv, 1, c | 1, 1), -inf where not seen; or None
    bad: Any  # bool, (..., Hkv, 1, 1, Dv + 1), or None
    seen: Array | None  # (..., 1, 1, c, 1); None where every row does


def _seen_past(memory: Memory, seen: Array | None, xp: Namespace) -> Past:
    """Hide a memory from the rows of other segments."""
    bad = None if memory.bad is None else memory.bad[..., None, :, :]
    if memory.log is None:
        return Past(memory.S, None, bad, seen)
    log = memory.log[..., None, None, None]
    return Past(memory.S, log if seen is None else xp.where(seen, log, -math.inf), bad, seen)


def _largest_log(keys: Keys, visible: Array, pasts: list[Past], xp: Namespace) -> Array | None:
    """The largest logarithm that each row sees, never one of its future, (..., Hkv, 1, c, 1)."""
    if keys.log is None:
        return None
    log = xp.where(visible, keys.log[..., None, None, :], -math.inf)
    base = xp.max(log, axis=-1, keepdims=True)
    for past in pasts:
        base = xp.maximum(base, past.log)
    return finite(loops.stop_gradient(base), xp)


def _last_segment(memory: Memory, keys: Keys, ids: Array, xp: Namespace) -> tuple[Memory, Keys]:
    """Keep what belongs to the segment that goes on after this chunk."""
    last = ids[..., -1:]
    same, on = memory.ids[..., None] == last, (ids == last)[..., None, :]  # (..., 1, c)
    S = xp.where(same[..., None, None], memory.S, 0.0)
    phi = xp.where(on[..., None], keys.phi, 0.0)
    log = key_log = before = bad = None
    if memory.log is not None:
        log, key_log = xp.where(same, memory.log, -math.inf), xp.where(on, keys.log, -math.inf)
    if memory.bad is not None:
        before, bad = memory.bad & same[..., None, None], keys.bad & on[..., None]
    return Memory(S, log, before, last[..., 0]), Keys(phi, key_log, keys.v, bad)


def finish(
    how: How, x: Operands, f: Features, top: Array, base: Array | None, bad: Array | None
) -> Array:
    """
    Divide by the normaliser, the last column, or leave the sums as they are.

    NaN goes where a row sees what is `bad`, last of all: no gradient passes through it.
    """
    xp = how.xp
    total = None
    if _ones(x):
        top, total = top[..., :-1], top[..., -1:]
        bad = None if bad is None else bad[..., :-1]
    if how.normalize:
        empty = total == 0
        # Two `where`: the quotient not taken must not spoil gradients either.
        out = xp.where(empty, 0.0, top / xp.where(empty, 1.0, total))
    else:
        out = top if how.scale == 1.0 else how.scale * top
        if base is not None and f.log is not None:
            out = out * xp.exp(base + f.log[..., None])
    if bad is not None:
        out = xp.where(bad, math.nan, out)
    return xp.astype(out, x.q.dtype, copy=False)


def finite(log: Array, xp: Namespace) -> Array:
    """0 where there is nothing yet: ``-inf - -inf`` is no number."""
    return xp.where(log == -math.inf, 0.0, log)


# -- The loop ---------------------------------------------------------------------------------


def over_chunks(
    step: Callable[..., Any],
    carry: Any,
    parts: list[tuple[Array | None, int]],
    n: int,
    how: How,
    out: workspace.Pieces,
) -> Any:
    """
    Fold `step` over chunks of `n` tokens; each of `parts` comes with the axis of its tokens.

    What a step gives beside the carry is added to `out`. A library that traces loops sees
    one step for all whole chunks and one for the rest, so that it compiles as much for a
    long sequence as for a short one.
    """
    xp, size = how.xp, how.chunk

    def cut(start: int, stop: int) -> tuple[Array | None, ...]:
        tail = {-1: (), -2: (slice(None),)}
        return tuple(
            None if x is None else x[(..., slice(start, stop), *tail[axis])] for x, axis in parts
        )

    whole = n // size * size
    if loops.schedule(xp) == "scan" and whole > size:
        xs = tuple(
            None if x is None else chunks_first(x, axis, size, whole, xp) for x, axis in parts
        )
        carry, ys = loops.scan(step, carry, xs, xp=xp)
        if ys is not None:
            out.add(chunks_joined(ys, xp))
    else:
        whole = 0
    for start in range(whole, n, size):
        carry, y = step(carry, cut(start, min(start + size, n)))
        if y is not None:
            out.add(y)
    return carry


def chunks_first(x: Array, axis: int, size: int, n: int, xp: Namespace) -> Array:
    """(..., n, [D]) -> (n / size, ..., size, [D])."""
    lead, tail = (x.shape[:-1], ()) if axis == -1 else (x.shape[:-2], x.shape[-1:])
    x = x[..., :n] if axis == -1 else x[..., :n, :]
    x = xp.reshape(x, (*lead, n // size, size, *tail))
    return xp.moveaxis(x, len(lead), 0)


def chunks_joined(y: Array, xp: Namespace) -> Array:
    """(chunks, ..., size, D) -> (..., chunks * size, D)."""
    chunks, *lead, size, d = y.shape
    return xp.reshape(xp.moveaxis(y, 0, -3), (*lead, chunks * size, d))
