"""The delta rule done right, in plain NumPy: one token after the other, one step to a method."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from arrattn import DeltaState
from museum.right import Array, Attention, over_batch, taking

DELTA_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("beta", "log_decay", "key_mask", "kv_lengths", "segment_ids")),
    "scale": 1.0,
    "initial_state": None,
    "return_state": False,
}


class Delta(Attention):
    """A memory that is corrected by every token, and read by queries at their positions."""

    __signature__ = taking(DELTA_OPTIONS, "beta")

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        o = self.read(q, k, v, **options)
        dtype, flat, widths = q.dtype, q.ndim == 2, (k.shape[-1], v.shape[-1])
        with np.errstate(all="ignore"):
            q, k, v = self.widen(q, k, v)
            beta, g = self.gates(o, k, flat=flat)
            start = np.zeros((*k.shape[:-2], *widths), k.dtype)
            if o.initial_state is not None:
                start = start + (o.initial_state.S[None] if flat else o.initial_state.S)
            out, S = self.attend(q, k, v, beta, g, start, o)
        if flat:
            out, S = out[0], S[0]
        out = out.astype(dtype)
        return (out, DeltaState(S)) if o.return_state else out

    def gates(self, o: SimpleNamespace, k: Array, *, flat: bool) -> tuple[Array, Array]:
        """`beta` and the decay, (..., Hkv, Nk) and (..., Hkv, Nk, D)."""
        beta = o.beta[None] if flat else o.beta
        g = np.zeros((1, 1, 1)) if o.log_decay is None else o.log_decay
        g = g[None] if flat and o.log_decay is not None else g
        beta = np.broadcast_to(beta, k.shape[:-1]).astype(k.dtype)
        return beta, np.broadcast_to(g, k.shape).astype(k.dtype)

    def attend(
        self, q: Array, k: Array, v: Array, beta: Array, g: Array, S: Array, o: SimpleNamespace
    ) -> tuple[Array, Array]:
        (nq, nk), r = (q.shape[-2], k.shape[-2]), q.shape[-3] // max(k.shape[-3], 1)
        there = np.broadcast_to(self.present(nk, o), (*k.shape[:-3], 1, nk))
        a, b = self.ids(o, nq, nk, k)
        out = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype)
        position = np.arange(nq) + np.asarray(self.offset(nq, nk, o))[..., None]
        for segment in np.unique(np.concatenate([a.ravel(), b.ravel()])):
            S = S if o.segment_ids is None else np.zeros_like(S)
            mine = there & (b == segment)[..., None, :]
            reads = (a == segment)[..., None, :, None]
            before = position[..., None, :, None] < 0
            out = np.where(reads & before, self.asked(S, q, r, o), out)
            for t in range(nk):
                token = (..., slice(t, t + 1), slice(None))
                S_t = self.step(S, k[token], v[token], beta[..., t, None, None], g[token])
                S = self.kept(S, S_t, g[token], mine[..., t, None, None])
                now = reads & (position == t)[..., None, :, None]
                out = np.where(now, self.asked(S, q, r, o), out)
        return out, S

    def kept(self, S: Array, new: Array, g: Array, there: Array) -> Array:
        """The memory after a token: the old one, if the token is not there."""
        return np.where(there, new, S)

    def step(self, S: Array, k: Array, v: Array, beta: Array, g: Array) -> Array:
        """Fade, ask the memory for the key, write the difference."""
        S = self.faded(S, g)
        return self.written(S, k, beta * (v - k @ S))

    def faded(self, S: Array, g: Array) -> Array:
        return np.exp(g).swapaxes(-1, -2) * S

    def written(self, S: Array, k: Array, u: Array) -> Array:
        return S + k.swapaxes(-1, -2) @ u

    def asked(self, S: Array, q: Array, r: int, o: SimpleNamespace) -> Array:
        """What all queries would get from this memory."""
        return o.scale * (q @ self.per_query_head(S, r))

    def present(self, nk: int, o: SimpleNamespace) -> Array:
        """The keys that are there, (..., 1, Nk)."""
        there = np.ones((1, nk), bool)
        if o.key_mask is not None:
            there = there & o.key_mask[..., None, :]
        if o.kv_lengths is not None:
            there = there & self.there(np.arange(nk), over_batch(o.kv_lengths)[..., 0])
        return there

    def ids(self, o: SimpleNamespace, nq: int, nk: int, k: Array) -> tuple[Array, Array]:
        """Segments of queries and of keys, (..., N); one for all, where none are given."""
        if o.segment_ids is None:
            return np.zeros(nq, int), np.zeros(nk, int)
        return o.segment_ids if isinstance(o.segment_ids, tuple) else (o.segment_ids,) * 2
