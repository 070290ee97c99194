"""Linear attention done right, in plain NumPy, one step to a method."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np

from arrattn import LinearState
from arrattn.feature_maps import elu_plus_one
from arrattn.feature_maps._read import read_map
from museum.right import Array, Attention, over_batch, taking

LINEAR_OPTIONS: dict[str, Any] = {
    **dict.fromkeys(("key_mask", "kv_lengths", "segment_ids", "initial_state", "log_decay")),
    "feature_map": elu_plus_one,
    "is_causal": False,
    "normalize": True,
    "scale": 1.0,
    "return_state": False,
}


class Linear(Attention):
    """A kernel of features in place of the exponential; all pairs at once where they differ."""

    __signature__ = taking(LINEAR_OPTIONS)

    def __call__(self, q: Array, k: Array, v: Array, /, **options: Any) -> Any:
        o = self.read(q, k, v, **options)
        if q.ndim == 2 and o.initial_state is not None:
            o.initial_state = LinearState(*(x[None] for x in o.initial_state))
        with np.errstate(all="ignore"):
            out, state = self.attend(*self.widen(q, k, v), o)
        if q.ndim == 2:
            out, state = out[0], LinearState(*(x[0] for x in state))
        return (out.astype(q.dtype), state) if o.return_state else out.astype(q.dtype)

    def features(self, x: Array, o: SimpleNamespace, *, of_queries: bool) -> tuple[Array, Array]:
        """Features, and the logarithm that goes with each token's."""
        phi = read_map(o.feature_map)
        f = phi.phi_q(x, np) if of_queries else phi.phi_k(x, np)
        log = np.zeros(f.phi.shape[:-1], f.phi.dtype) if f.log is None else f.log
        return np.asarray(f.phi), np.asarray(log)

    def attend(self, q: Array, k: Array, v: Array, o: SimpleNamespace) -> tuple[Array, Any]:
        phi_q, log_q = self.features(q, o, of_queries=True)
        phi_k, log_k = self.features(k, o, of_queries=False)
        self.decayed = self.decay(k, o)
        g = q.shape[-3] // max(k.shape[-3], 1)
        seen = self.visible((*q.shape[:-1], k.shape[-2]), o)
        heads = [self.per_query_head(x, g) for x in (phi_k, log_k[..., None], v)]
        m = self.largest(heads[1], seen, o)
        top, total = self.sums(phi_q, *heads, seen, m)
        if o.initial_state is not None:
            S, z = (self.per_query_head(x, g) for x in self.past(o.initial_state))
            back = np.exp(-m)
            if self.decayed.any():
                left = self.since_the_start(self.decayed)[..., -q.shape[-2] :, None]
                back = back * np.exp(left)
            top, total = top + back * (phi_q @ S), total + back * (phi_q @ z)
        out = self.normalised(top, total, np.exp(m + log_q[..., None]), o)
        return out, self.state(phi_k * np.exp(log_k)[..., None], v, o)

    def decay(self, k: Array, o: SimpleNamespace) -> Array:
        """Logarithms of the decay of each token, (..., 1, N)."""
        if o.log_decay is None:
            return np.zeros((1, k.shape[-2]))
        return o.log_decay.reshape(1, -1)

    def since_the_start(self, g: Array) -> Array:
        """What is left of the past, by token."""
        return np.cumsum(g, axis=-1)

    def between(self, g: Array) -> Array:
        """The decay from a key to a query, a logarithm."""
        total = np.cumsum(g, axis=-1)
        return total[..., :, None] - total[..., None, :]

    def left_of(self, g: Array) -> Array:
        """The decay from a key to the end, a logarithm."""
        return np.sum(g, axis=-1, keepdims=True) - np.cumsum(g, axis=-1)

    def past(self, state: LinearState) -> tuple[Array, Array]:
        return state.S, state.z[..., None]

    def visible(self, shape: tuple[int, ...], o: SimpleNamespace) -> Array:
        """Who sees whom; in one row where all queries see the same."""
        nq, nk = shape[-2:]
        if not o.is_causal and o.segment_ids is None:
            return np.broadcast_to(self.present(nk, o), (*shape[:-2], 1, nk))
        p, j = np.arange(nq)[:, None] + over_batch(self.offset(nq, nk, o)), np.arange(nk)
        seen = np.broadcast_to(self.present(nk, o), shape)
        if o.is_causal:
            seen = seen & self.causal(p, j)
        return seen if o.segment_ids is None else seen & self.together(o.segment_ids)

    def present(self, nk: int, o: SimpleNamespace) -> Array:
        """The keys that are there, (..., 1, 1, Nk)."""
        there = np.ones((1, 1, nk), bool)
        if o.key_mask is not None:
            there = there & o.key_mask[..., None, None, :]
        if o.kv_lengths is not None:
            there = there & self.there(np.arange(nk), over_batch(o.kv_lengths))
        return there

    def largest(self, log_k: Array, seen: Array, o: SimpleNamespace) -> Array:
        """The largest logarithm that a row sees; what the past left stands at 0."""
        past = -math.inf if o.initial_state is None else 0.0
        logs = np.where(seen, log_k.swapaxes(-1, -2), -math.inf)
        m = np.max(logs, axis=-1, keepdims=True, initial=past)
        return np.where(m == -math.inf, 0, m).astype(log_k.dtype)

    def sums(
        self, phi_q: Array, phi_k: Array, log_k: Array, v: Array, seen: Array, m: Array
    ) -> tuple[Array, Array]:
        """Weighted values and weights, both without the factor exp(m) of their row."""
        if seen.shape[-2] == 1 and not self.decayed.any():  # keys with values first
            f = np.where(seen.swapaxes(-1, -2), phi_k * np.exp(log_k - m), 0)
            S = self.mix(f.swapaxes(-1, -2), v, seen)
            return phi_q @ S, phi_q @ f.sum(-2)[..., None]
        w = phi_q @ phi_k.swapaxes(-1, -2) * np.exp(log_k.swapaxes(-1, -2) - m)
        w = np.where(seen, w, 0)
        if self.decayed.any():
            between = self.between(self.decayed)[..., -w.shape[-2] :, :]  # the last queries
            w = w * np.exp(np.where(seen, between, 0))
        return self.mix(w, v, seen), w.sum(-1, keepdims=True)

    def normalised(self, top: Array, total: Array, factor: Array, o: SimpleNamespace) -> Array:
        if not o.normalize:
            return o.scale * top * factor
        return np.where(total == 0, 0, top / total)

    def state(self, f: Array, v: Array, o: SimpleNamespace) -> LinearState:
        """What is handed on: the sums over every key that is there."""
        there = np.broadcast_to(self.present(f.shape[-2], o)[..., 0, :], f.shape[:-1])
        f, v = np.where(there[..., None], f, 0), np.where(there[..., None], v, 0)
        f = f * np.exp(self.left_of(self.decayed))[..., None]
        S, z = f.swapaxes(-1, -2) @ v, f.sum(-2)
        if o.initial_state is None:
            return LinearState(S, z)
        left = np.exp(np.sum(self.decayed))
        return LinearState(left * o.initial_state.S + S, left * o.initial_state.z + z)
