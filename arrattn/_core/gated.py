r"""
Linear attention whose memory decays, or corrects itself, as one recurrence over time.

.. math:: S_t = e^{g_t} S_{t-1} + k_t u_t^\top, \qquad o_t = q_t^\top S_t

with :math:`u_t = v_t`, or by the delta rule :math:`u_t = \beta_t (v_t - e^{g_t} S_{t-1}^\top
k_t)`. A span of chunks is taken at once: what does not depend on the memory for all its
chunks together, then the memory from chunk to chunk, then the outputs together. Within a chunk
the delta rule is a triangular system, solved by the inverse of its matrix.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from arrattn._core import decay, loops, recurrence, threads, tiles, workspace
from arrattn._core.chunks import Chunks, Room
from arrattn._core.decay import Gates
from arrattn._core.order import Order, gather_tokens, merged_order, own_order
from arrattn._core.recurrence import How, Keys, Memory, Operands, finite
from arrattn._core.typing import Array, Namespace
from arrattn.feature_maps import Features, identity

#: Tokens of a chunk, a power of two: pairs within it are computed one by one.
CHUNK = 32

#: Chunks of a span at most.
SPAN = 32

#: Numbers on which a thread writes, where all heads' chunks of a span are taken at once.
WORK_SPACE = 9 << 18


def run(how: How, x: Operands, into: Array | None = None) -> tuple[Array, Array, Array]:
    """
    Do the call: what `recurrence.run` gives; the delta rule has no `z`, and gives zeros.
    """
    x = _broadcast(how, x)
    if x.beta is not None and into is not None:
        # What is not finite stays in the memory to the end, so one need not look for it before.
        found = _run(how._replace(careful=False), x, into)
        if loops.truth(how.xp.all(how.xp.isfinite(found[1]))):
            return found
    xp = how.xp
    lifted = None if x.key_mask is None else x.key_mask[..., None]
    gates = (x.log_decay, None if x.beta is None else x.beta[..., None])
    arrays = [a for a in (x.k, x.v, *gates) if a is not None]
    sums = (xp.isfinite(workspace.sum_of(a, lifted, how.acc, xp=xp)) for a in arrays)
    return _run(how._replace(careful=not all(loops.truth(a) for a in sums)), x, into)


def _run(how: How, x: Operands, into: Array | None) -> tuple[Array, Array, Array]:
    """Do it, knowing whether there may be something that is not finite."""
    xp = how.xp
    memory, out = recurrence.start_memory(how, x), workspace.Pieces(into)
    if 0 in x.q.shape[:-1]:  # nothing that reads
        out.add(recurrence.zeros_out(how, x))
    if 0 not in x.q.shape[:-2]:
        memory = FORMS[form(how, x)](how, x, memory, out)
    S = memory.S
    if memory.log is not None:
        S = S * xp.exp(finite(memory.log, xp))[..., None, None]
    if memory.bad is not None:
        S = xp.where(memory.bad, math.nan, S)
    if x.beta is not None:
        z = xp.zeros(S.shape[:-1], dtype=S.dtype, device=loops.device_of(S))
        return out.joined(xp=xp), S, z
    return out.joined(xp=xp), S[..., :-1], S[..., -1]


def form(how: How, x: Operands) -> str:
    """Which way through the tokens a call takes."""
    if not how.is_causal:
        return "both ways"
    return "sorted" if x.q_ids is not None or x.lengths is not None else "side by side"


def _broadcast(how: How, x: Operands) -> Operands:
    """Give every array of tokens the batch axes of all."""

    def full(a: Array | None, trailing: int) -> Any:
        if a is None:
            return None
        return how.xp.broadcast_to(a, (*how.batch, *a.shape[a.ndim - trailing :]))

    return x._replace(
        q=full(x.q, 4),
        k=full(x.k, 3),
        v=full(x.v, 3),
        key_mask=full(x.key_mask, 2),
        log_decay=full(x.log_decay, 3),
        beta=full(x.beta, 2),
    )


# -- Three ways through the tokens ------------------------------------------------------------


class Sequence(NamedTuple):
    """Tokens in the order that the recurrence takes them; queries may be missing."""

    q: Array | None  # (..., Hkv, G, T, D)
    k: Array  # (..., Hkv, T, D)
    v: Array  # (..., Hkv, T, Dv)
    mask: Array | None  # (..., Hkv | 1, T)
    decay: Array | None  # (..., Hkv | 1, T, Dphi | 1), 0 where no token is
    beta: Array | None  # (..., Hkv | 1, T)
    ids: Array | None  # (..., T)


#: The axis of the tokens in each array of a `Sequence`.
AXES = (-2, -2, -2, -1, -2, -1, -1)


def _fold(
    how: How, x: Operands, memory: Memory, s: Sequence, out: workspace.Pieces, step: Any = None
) -> Memory:
    """Go through a sequence span by span."""
    plain = step is None and s.ids is None and memory.bad is None and memory.log is None
    several = s.k.shape[-2] > how.chunk
    if plain and several and s.q is not None and out.into is not None:
        return _relay(how, x, memory, s, out)
    spans = how._replace(chunk=how.chunk * SPAN)
    span = partial(step or _span, how, x)

    def one(memory: Memory, part: Any) -> Any:
        return loops.recomputed(span, memory, Sequence(*part), xp=how.xp)

    parts = list(zip(s, AXES, strict=True))
    after: Memory = recurrence.over_chunks(one, memory, parts, s.k.shape[-2], spans, out)
    return after


def _relay(how: How, x: Operands, memory: Memory, s: Sequence, out: workspace.Pieces) -> Memory:
    """
    `_fold` on NumPy's threads: each job a span, and the memory handed from one to the next.

    Only the way from chunk to chunk waits for its turn. It consists of many small products,
    and two threads that do those at once mostly wait for the interpreter.
    """
    n, c, many = s.k.shape[-2], how.chunk, _chunks_at_once(how, s, memory)
    turns = [threading.Event() for _ in range(-(-n // (c * many)) + 1)]
    turns[0].set()
    S, into = memory.S.copy(), out.next(n)
    alike = s.decay is None or s.decay.shape[-1] == 1
    ways: dict[Any, Any] = {}  # of each thread
    whole = _as_it_lies(how, s) if alike else None
    # Nothing is left to do to what is read.
    direct = alike and x.beta is not None and how.scale == 1.0 and into.dtype == how.acc

    def read(i: int) -> Tokens:
        if whole is not None:
            return whole.chunks_of(i * many, many)
        cut = slice(i * many * c, min(n, (i + 1) * many * c))
        parts = (
            None if a is None else a[(..., cut, *(slice(None),) * (-1 - axis))]
            for a, axis in zip(s, AXES, strict=True)
        )
        return _read(how, x, memory, Sequence(*parts))

    def job(i: int) -> None:
        try:
            own = read(i)
            way = ways.get(key := (threading.get_ident(), own.chunks.k.shape))
            if way is None:
                way = ways[key] = Room(own.chunks) if alike else _ByFeature(how.xp)
            way.read(own.chunks)
            turns[i].wait()
            S[...] = way.pass_on(S)
            turns[i + 1].set()
            at = i * many * c
            rows = into[..., at : at + own.n, :]
            if direct and own.n % c == 0:
                way.outputs(recurrence.chunks_first(rows, -2, c, own.n, how.xp))
                return
            top = recurrence.chunks_joined(way.outputs(), how.xp)
            top = recurrence.finish(how, x, own.f, top, None, None)
            rows[...] = top[..., : own.n, :]
        finally:
            turns[i + 1].set()  # after an error too: nobody may wait for it

    threads.run_jobs([partial(job, i) for i in range(len(turns) - 1)])
    return memory._replace(S=S)


class _ByFeature:
    """What `Room` does, where decay differs by feature."""

    def __init__(self, xp: Namespace) -> None:
        self.xp = xp

    def read(self, x: Chunks) -> None:
        self.ready = _prepared(x, self.xp)

    def pass_on(self, memory: Array) -> Array:
        memory, self.ys = loops.scan(self.ready.step, memory, self.ready.xs, xp=self.xp)
        return memory

    def outputs(self, out: Array | None = None) -> Array:
        del out  # it is never given one
        return _outputs(self.ready, self.ys, False, self.xp)


def _chunks_at_once(how: How, s: Sequence, memory: Memory) -> int:
    """As many chunks as fit a thread's work space; all heads are taken together."""
    q: Any = s.q
    c, g, (heads, d, columns) = how.chunk, q.shape[-3], memory.S.shape
    pairs, tokens = (3 + g) * c * c, c * (2 * d + (1 + 2 * g) * columns)
    numbers = heads * (pairs + tokens + d * columns)
    return int(max(1, min(SPAN, WORK_SPACE // max(1, numbers))))


def _all_tokens(how: How, x: Operands, *, queries: bool) -> Sequence:
    """The tokens as they come."""
    decay = _present(x.log_decay, x.key_mask, how.xp)
    return Sequence(x.q if queries else None, x.k, x.v, x.key_mask, decay, x.beta, None)


def _present(log_decay: Array | None, mask: Array | None, xp: Namespace) -> Any:
    """Absent tokens let no time pass."""
    if log_decay is None or mask is None:
        return log_decay
    return xp.where(mask[..., None], log_decay, 0.0)


def _side_by_side(how: How, x: Operands, memory: Memory, out: workspace.Pieces) -> Memory:
    """
    The last query beside the last key: whichever side is longer starts alone.
    """
    nq, nk = x.q.shape[-2], x.k.shape[-2]
    both = min(nq, nk)
    if nk > both:
        early = _all_tokens(how, x.keys(0, nk - both), queries=False)
        memory = _fold(how, x, memory, early, workspace.Pieces())
    if nq > both:
        recurrence.read_all(how, x._replace(q=x.q[..., : nq - both, :]), memory, out)
    if both == 0:
        return memory
    rest = x.keys(nk - both)._replace(q=x.q[..., nq - both :, :])
    return _fold(how, rest, memory, _all_tokens(how, rest, queries=True), out)


def _sorted(how: How, x: Operands, memory: Memory, out: workspace.Pieces) -> Memory:
    """
    Segments in any order, or positions that only the arrays know: sort first.
    """
    if x.q.shape[-2] == 0 or x.k.shape[-2] == 0:
        return _side_by_side(how, x, memory, out)
    sequence, order = _in_order(how, x)
    if sequence.ids is not None:
        memory = memory._replace(ids=sequence.ids[..., 0])
    mixed = workspace.Pieces()
    memory = _fold(how, x, memory, sequence, mixed)
    out.add(gather_tokens(mixed.joined(xp=how.xp), order.row, how))
    return memory


def _both_ways(how: How, x: Operands, memory: Memory, out: workspace.Pieces) -> Memory:
    """
    Decay on both sides: the keys up to a query in order, and those after it in reverse.

    Going back, the step from one token to the next belongs to the later of the two.
    """
    if x.q.shape[-2] == 0 or x.k.shape[-2] == 0:
        return _side_by_side(how, x, memory, out)
    xp = how.xp
    aligned = x.q.shape[-2] == x.k.shape[-2] and x.lengths is None and x.q_ids is None
    order = None
    if aligned:
        ahead = _all_tokens(how, x, queries=True)
    else:
        ahead, order = _in_order(how._replace(is_causal=True), x)
    ids = ahead.ids
    start = recurrence.start_memory(how, x._replace(state=None))
    if ids is not None:
        memory, start = memory._replace(ids=ids[..., 0]), start._replace(ids=ids[..., -1])
    back = Sequence(
        *(a if a is None else xp.flip(a, axis=axis) for a, axis in zip(ahead, AXES, strict=True))
    )
    g: Any = ahead.decay
    later = xp.concat([g[..., 1:, :], xp.zeros_like(g[..., :1, :])], axis=-2)
    back = back._replace(decay=xp.flip(later, axis=-2))
    one, other = workspace.Pieces(), workspace.Pieces()
    memory = _fold(how, x, memory, ahead, one, partial(_span, raw=True))
    _fold(how, x, start, back, other, partial(_span, raw=True, strict=True))
    sums = [one.joined(xp=xp), xp.flip(other.joined(xp=xp), axis=-2)]
    if order is not None:
        sums = [gather_tokens(a, order.row, how) for a in sums]
    out.add(_finish_both(how, x, *sums))
    return memory


FORMS = {"sorted": _sorted, "side by side": _side_by_side, "both ways": _both_ways}


def _in_order(how: How, x: Operands) -> tuple[Sequence, Order]:
    """The tokens as `order` sorts them."""
    nk = x.k.shape[-2]
    own = how.same_ids and x.lengths is None and x.q.shape[-2] == nk
    order = own_order(how, x) if own else merged_order(how, x)

    def taken(a: Array | None, *, tail: int) -> Any:
        if a is None:
            return None
        lifted = a if tail else a[..., None]
        picked = gather_tokens(lifted, order.k, how)
        return picked if tail else picked[..., 0]

    mask = order.is_key
    if x.key_mask is not None:
        there = taken(x.key_mask, tail=0)
        mask = there if mask is None else mask & there
    q = gather_tokens(x.q, order.q, how)
    k, v, g = (taken(a, tail=1) for a in (x.k, x.v, x.log_decay))
    g = _present(g, mask, how.xp)
    return Sequence(q, k, v, mask, g, taken(x.beta, tail=0), order.ids), order


# -- A span -----------------------------------------------------------------------------------


def _span(
    how: How, x: Operands, memory: Memory, s: Sequence, *, strict: bool = False, raw: bool = False
) -> tuple[Memory, Array | None]:
    """
    Go through a span; `strict` reads before it writes, `raw` leaves the sums unfinished.
    """
    xp = how.xp
    n, f, keys, chunks, first = _read(how, x, memory, s)
    bad = None
    if keys.bad is not None:
        bad, after_bad = _spoiled(keys.bad, memory.bad, first, strict=strict, xp=xp)
        memory = memory._replace(bad=after_bad)
    if s.ids is not None:
        memory = memory._replace(ids=s.ids[..., -1])
    through = _through_plain if keys.log is None else _through_logs
    memory, top, base = through(memory, chunks, strict, xp)
    if f is None:
        return memory, None
    top = recurrence.chunks_joined(top, xp)
    base = None if base is None else recurrence.chunks_joined(base, xp)
    if raw:
        top = top if bad is None else xp.where(bad, math.nan, top)
        if base is not None:
            base = xp.broadcast_to(base, (*top.shape[:-1], 1))
            top = xp.concat([top, base], axis=-1)
        out = top
    else:
        base = None if base is None else finite(base, xp)
        out = recurrence.finish(how, x, f, top, base, bad)
    return memory, out[..., :n, :]


class Tokens(NamedTuple):
    """Tokens as they were read, filled up to whole chunks."""

    n: int  # tokens, before it was filled up
    f: Any  # Features, or None without queries
    keys: Keys
    chunks: Chunks
    first: Array | None  # where a segment begins, (..., T)

    def chunks_of(self, start: int, count: int) -> Tokens:
        """So many of its chunks, if it was not filled up."""
        own = self.chunks.of(slice(start, start + count))
        return self._replace(n=own.k.shape[0] * own.k.shape[-2], chunks=own)


def _read(how: How, x: Operands, memory: Memory, s: Sequence) -> Tokens:
    """Read the tokens of a span; of the memory, only which segment it belongs to."""
    xp, n = how.xp, s.k.shape[-2]
    size = _chunk_size(n, how.chunk)
    s = _padded(s, -n % size, xp)
    keys = recurrence.read_keys(how, x, s.k, s.v, s.mask)
    gates, beta, keys, first = _read_gates(how, s, keys, memory)
    f = None
    if s.q is not None:
        f = how.feature_map.phi_q(xp.astype(s.q, how.acc, copy=False), xp, x.weights)
    return Tokens(n, f, keys, _cut(f, keys, gates, beta, size, xp), first)


def _as_it_lies(how: How, s: Sequence) -> Tokens | None:
    """All tokens of a delta rule at once, where reading them makes no copy; else None."""
    xp, (n, _) = how.xp, s.k.shape[-2:]
    arrays = [a for a in (s.q, s.k, s.v, s.decay, s.beta) if a is not None]
    plain = s.mask is None and how.feature_map is identity and s.beta is not None
    if not plain or n % how.chunk or any(a.dtype != how.acc for a in arrays):
        return None
    g = xp.broadcast_to(xp.zeros(1, dtype=how.acc), (1, n, 1)) if s.decay is None else s.decay
    f, beta = Features(s.q, None), s.beta
    keys = Keys(s.k, None, s.v, None)
    return Tokens(n, f, keys, _cut(f, keys, Gates(g, None), beta, how.chunk, xp), None)


def _chunk_size(n: int, most: int) -> int:
    """The least power of two that holds `n` tokens, or `most`."""
    return min(most, 1 << max(n - 1, 0).bit_length())


def _padded(s: Sequence, more: int, xp: Namespace) -> Sequence:
    """Fill up with tokens that are not there."""
    if more == 0:
        return s
    n, device = s.k.shape[-2], loops.device_of(s.k)

    def fill(a: Array | None, axis: int) -> Any:
        if a is None:
            return None
        last = a[..., -1:] if axis == -1 else a[..., -1:, :]
        shape = list(a.shape)
        shape[axis] = more
        return xp.concat([a, xp.broadcast_to(last, tuple(shape))], axis=axis)

    there = xp.arange(n + more, device=device) < n
    filled = Sequence(*(fill(a, axis) for a, axis in zip(s, AXES, strict=True)))
    if filled.decay is not None:
        filled = filled._replace(decay=xp.where(there[:, None], filled.decay, 0.0))
    mask = there if filled.mask is None else filled.mask & there
    return filled._replace(mask=xp.reshape(mask, (1,) * (s.k.ndim - 1 - mask.ndim) + mask.shape))


def _read_gates(
    how: How, s: Sequence, keys: Keys, memory: Memory
) -> tuple[Gates, Array | None, Keys, Array | None]:
    """
    Decay and `beta` of tokens that are there, and where a segment begins, (..., T).
    """
    xp, n = how.xp, s.k.shape[-2]
    beta = None if s.beta is None else xp.astype(s.beta, how.acc, copy=False)
    if s.decay is None:
        device = loops.device_of(s.k)
        g = xp.zeros((1,) * (s.k.ndim - 2) + (n, 1), dtype=how.acc, device=device)
    else:
        g = xp.astype(s.decay, how.acc, copy=False)
    if beta is not None and s.mask is not None:
        beta = xp.where(s.mask, beta, 0.0)
    if keys.bad is not None:
        unknown = xp.any(xp.isnan(g), axis=-1)
        g = xp.where(xp.isnan(g), 0.0, g)
        if beta is not None:
            unknown = unknown | ~xp.isfinite(beta)
            beta = xp.where(xp.isfinite(beta), beta, 0.0)
        keys = keys._replace(bad=keys.bad | unknown[..., None])
    gates = decay.read_steps(g, xp)
    if s.ids is None:
        return gates, beta, keys, None
    before = xp.concat([memory.ids[..., None], s.ids[..., :-1]], axis=-1)
    first = s.ids != before
    steps = xp.where(first[..., None, :, None], decay.RESET, gates.steps)
    return gates._replace(steps=steps), beta, keys, first


def _spoiled(
    bad: Array, before: Array, first: Array | None, *, strict: bool, xp: Namespace
) -> tuple[Array, Array]:
    """
    Which numbers of the outputs see what is `bad` (..., Hkv, 1, T, C), and of the memory.
    """
    n = bad.shape[-2]
    t = xp.arange(n, device=loops.device_of(bad))
    seen = t[None, :] < t[:, None] if strict else t[None, :] <= t[:, None]
    past = last = fresh = None
    if first is not None:
        segment = xp.cumulative_sum(xp.astype(first, t.dtype), axis=-1)  # (..., T)
        seen = seen & (segment[..., :, None] == segment[..., None, :])
        seen = seen[..., None, None, :, :]
        past = (segment == 0)[..., None, None, :, None]
        last = (segment == segment[..., -1:])[..., None, :, None]
        fresh = (segment[..., -1:] == 0)[..., None, None]
    like = xp.zeros(
        (*bad.shape[:-2], 1, *bad.shape[-2:]), dtype=xp.float32, device=loops.device_of(bad)
    )
    rows = tiles.sees(seen, bad, like=like, nk=n, xp=xp)
    held = before[..., None, :, :]
    rows = rows | (held if past is None else held & past)
    own = xp.any(bad if last is None else bad & last, axis=-2, keepdims=True)
    return rows, own | (before if fresh is None else before & fresh)


def _cut(
    f: Features | None, keys: Keys, gates: Gates, beta: Array | None, size: int, xp: Namespace
) -> Chunks:
    def cut(a: Array | None, axis: int = -2) -> Any:
        n = keys.v.shape[-2]
        return None if a is None else recurrence.chunks_first(a, axis, size, n, xp)

    return Chunks(
        q=None if f is None else cut(f.phi),
        k=cut(keys.phi),
        v=cut(keys.v),
        log=cut(keys.log, -1),
        gates=Gates(cut(gates.steps), cut(gates.beyond)),
        beta=None if beta is None else cut(beta[..., None]),
    )


class Factors(NamedTuple):
    """What is left, at each token of a chunk, of the memory before it, and at the end of it."""

    since_start: Array  # (C, ..., c, 1 | Dphi)
    until_end: Array  # (C, ..., c, 1 | Dphi)
    whole: Array  # (C, ..., 1 | Dphi, 1): of the memory, once the chunk is over


def _factors(steps: Array, until_end: Array, xp: Namespace) -> Factors:
    start = xp.exp(loops.running_sums(steps, xp=xp))
    return Factors(start, xp.exp(until_end), xp.matrix_transpose(start[..., -1:, :]))


class Ready(NamedTuple):
    """What a span does that no memory is needed for."""

    step: Callable[..., Any]
    xs: tuple[Array, ...]
    pairs: Array | None  # (C, ..., Hkv, G, c, c), not yet cut at the diagonal
    within: Array  # (C, ..., c, c), decay from column to row
    v: Array | None  # as in `Chunks`; None where the steps find what is written


def _through_plain(
    memory: Memory, x: Chunks, strict: bool, xp: Namespace
) -> tuple[Memory, Array | None, None]:
    """
    Memory and outputs (C, ..., Hkv, G, c, columns) of features without logarithms.
    """
    ready = _prepared(x, xp)
    S, ys = loops.scan(ready.step, memory.S, ready.xs, xp=xp)
    memory = memory._replace(S=S)
    return memory, None if x.q is None else _outputs(ready, ys, strict, xp), None


def _prepared(x: Chunks, xp: Namespace) -> Ready:
    """All products of a span but those with the memory."""
    steps, beyond = x.gates
    between = decay.between(steps, xp)
    within, to_end = xp.exp(between), xp.matrix_transpose(between[..., -1:, :])
    left = _factors(steps, to_end, xp)
    if beyond is not None:
        slower = _factors(beyond, decay.until_end(beyond, xp), xp)
        left = Factors(*(a * b for a, b in zip(left, slower, strict=True)))
    into = xp.matrix_transpose(x.k * left.until_end)
    readers = () if x.q is None else (x.q * left.since_start[..., None, :, :],)
    if x.beta is None:
        pairs = None if x.q is None else decay.products(x.q, x.k, beyond, xp)
        xs = (left.whole, into @ x.v, *readers)
        return Ready(partial(_add, xp=xp), xs, pairs, within, x.v)
    pairs, solved = _solved(x, beyond, within, xp)
    told = x.k * left.since_start
    xs = (left.whole, into, solved @ x.v, solved @ told, *readers)
    return Ready(partial(_correct, xp=xp), xs, pairs, within, None)


def _outputs(ready: Ready, ys: tuple[Array, ...], strict: bool, xp: Namespace) -> Array:
    """What queries read of the memory before their chunk, and of the pairs within it."""
    top, u = ys if ready.v is None else (*ys, ready.v)
    seen = ready.within * decay.at_or_before(
        ready.within.shape[-1], ready.within, strict=strict, xp=xp
    )
    return top + tiles.group_matmul(ready.pairs * seen[..., None, :, :], u, xp=xp)


def _solved(
    x: Chunks, beyond: Array | None, within: Array, xp: Namespace
) -> tuple[Array | None, Array]:
    """
    Products of queries and keys (C, ..., G, c, c), and what solves the delta rule (C, ..., c, c).

    The corrections of a chunk solve ``u_i + sum_(j < i) beta_i a_ij u_j = beta_i (v_i - ...)``
    with ``a_ij`` the product of keys `i` and `j` and the decay between them: the inverse of
    that triangular matrix, times `beta`.
    """
    pairs, own = None, x.k[..., None, :, :]
    if x.q is not None and beyond is not None:  # halving a chunk is done once for both
        both = decay.products(xp.concat([x.q, own], axis=-3), x.k, beyond, xp)
        pairs, own = both[..., :-1, :, :], both[..., -1, :, :]
    else:
        pairs = None if x.q is None else decay.products(x.q, x.k, beyond, xp)
        own = decay.products(own, x.k, beyond, xp)[..., 0, :, :]
    earlier = decay.at_or_before(within.shape[-1], within, strict=True, xp=xp)
    solved = decay.inverse(own * (within * earlier * x.beta), xp)
    return pairs, solved * xp.matrix_transpose(x.beta)


def _add(S: Array, x: Any, *, xp: Namespace) -> tuple[Array, tuple[Array, ...]]:
    """One chunk: what queries read before it, what is left of the memory, what it adds."""
    whole, added, *q = x
    return S * whole + added, tuple(tiles.group_matmul(rows, S, xp=xp) for rows in q)


def _correct(S: Array, x: Any, *, xp: Namespace) -> tuple[Array, tuple[Array, ...]]:
    """One chunk of the delta rule, with its corrections."""
    whole, into, target, told, *q = x
    u = target - told @ S
    ys = tuple(y for rows in q for y in (tiles.group_matmul(rows, S, xp=xp), u))
    return S * whole + into @ u, ys


def _through_logs(
    memory: Memory, x: Chunks, strict: bool, xp: Namespace
) -> tuple[Memory, Array | None, Array | None]:
    """
    The same where features carry logarithms: with the steps, they stay logarithms.

    Outputs stand under the largest logarithm that their row sees, (C, ..., Hkv, 1, c, 1), or
    -inf where it sees nothing.
    """
    steps, beyond = x.gates
    between, slower = decay.between(steps, xp), None
    if beyond is not None:
        slower = _factors(beyond, decay.until_end(beyond, xp), xp)
    start = decay.logs(loops.running_sums(steps, xp=xp), xp)  # (C, ..., c, 1)
    end = decay.logs(between[..., -1, :], xp) + x.log  # (C, ..., c)
    top_log = loops.stop_gradient(xp.max(end, axis=-1))
    k = x.k * xp.exp(end - finite(top_log, xp)[..., None])[..., None]
    k = k if slower is None else k * slower.until_end
    whole = xp.ones_like(start[..., -1:, :]) if slower is None else slower.whole
    xs = (xp.matrix_transpose(k) @ x.v, whole, start[..., -1, 0], top_log)
    (S, log), (before, before_log) = loops.scan(
        partial(_add_under_logs, xp=xp), (memory.S, memory.log), xs, xp=xp
    )
    memory = memory._replace(S=S, log=log)
    if x.q is None:
        return memory, None, None

    pairs = decay.logs(between, xp) + x.log[..., None, :]
    seen = decay.at_or_before(pairs.shape[-1], x.k, strict=strict, xp=xp) > 0
    pairs = xp.where(seen, pairs, -math.inf)  # (C, ..., Hkv, c, c)
    past = start + before_log[..., None, None]  # (C, ..., Hkv, c, 1)
    base = loops.stop_gradient(xp.maximum(xp.max(pairs, axis=-1, keepdims=True), past))
    shift = finite(base, xp)
    weights = decay.products(x.q, x.k, beyond, xp) * xp.exp(pairs - shift)[..., None, :, :]
    q = x.q if slower is None else x.q * slower.since_start[..., None, :, :]
    top = tiles.group_matmul(weights, x.v, xp=xp)
    term = tiles.group_matmul(q, before, xp=xp) * xp.exp(past - shift)[..., None, :, :]
    return memory, top + term, base[..., None, :, :]


def _add_under_logs(carry: Any, x: Any, *, xp: Namespace) -> Any:
    """One chunk: memory and addition under the larger of their logarithms."""
    (S, log), (added, whole, passed, top) = carry, x
    larger = loops.stop_gradient(xp.maximum(log + passed, top))
    base = finite(larger, xp)
    shrink, enter = xp.exp(log + passed - base), xp.exp(top - base)
    after = S * whole * shrink[..., None, None] + added * enter[..., None, None]
    return (after, larger), (S, log)


def _finish_both(how: How, x: Operands, ahead: Array, back: Array) -> Array:
    """Add the sums of both directions, and finish."""
    xp = how.xp
    f = how.feature_map.phi_q(xp.astype(x.q, how.acc), xp, x.weights)
    base = None
    if f.log is not None:
        bases = ahead[..., -1:], back[..., -1:]
        ahead, back = ahead[..., :-1], back[..., :-1]
        base = finite(xp.maximum(*bases), xp)
        ahead, back = (a * xp.exp(b - base) for a, b in zip((ahead, back), bases, strict=True))
    return recurrence.finish(how, x, f, ahead + back, base, None)
