"""Right values, wrong gradients: in torch, since NumPy has none."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from museum.exhibit import wrong
from museum.right import DENSE_OPTIONS, Attention, Dense, taking


class Differentiable(Attention):
    """The right sum in torch; who sees whom is plain NumPy's affair."""

    __signature__ = taking(DENSE_OPTIONS)

    def __call__(self, q: Any, k: Any, v: Any, /, **options: Any) -> Any:
        o = self.read(q, k, v, **options)
        arrays = [(x[None] if x.ndim == 2 else x) for x in (q, k, v)]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q_, k_, v_ = (x.to(wide) for x in arrays)
        g = q_.shape[-3] // max(k_.shape[-3], 1)
        k_, v_ = (x.repeat_interleave(g, dim=-3) for x in (k_, v_))
        s = self.scores(q_, k_, o)
        seen = torch.asarray(Dense().visible(tuple(s.shape), self.on_host(o)))
        w, lse = self.softmax(s, seen, o.sinks)
        out = self.mix(w, v_, seen).to(q.dtype)
        out, lse = (out[0], lse[0]) if q.ndim == 2 else (out, lse)
        return (out, lse) if o.return_lse else out

    def on_host(self, o: SimpleNamespace) -> SimpleNamespace:
        """The options with NumPy arrays."""

        def host(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(host, x))
            return x.detach().numpy() if isinstance(x, torch.Tensor) else x

        return SimpleNamespace(**{name: host(x) for name, x in vars(o).items()})

    def scores(self, q: Any, k: Any, o: SimpleNamespace) -> Any:
        s = (max(q.shape[-1], 1) ** -0.5 if o.scale is None else o.scale) * (q @ k.mT)
        s = s if o.softcap is None else o.softcap * torch.tanh(s / o.softcap)
        return s if o.bias is None else s + o.bias.to(s.dtype)

    def softmax(self, s: Any, seen: Any, sinks: Any) -> tuple[Any, Any]:
        """What is hidden leaves before the exponential, and a total of 0 before the division."""
        b = s.new_full((s.shape[-3],), -math.inf) if sinks is None else sinks.to(s.dtype)
        s = torch.cat([s, b[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
        seen = torch.cat([seen, torch.isfinite(s[..., -1:])], dim=-1)
        hidden = torch.where(seen, s.detach(), -math.inf)
        m = hidden.amax(-1, keepdim=True)
        m = torch.where(m == -math.inf, 0.0, m)
        p = torch.where(seen, torch.exp(torch.where(seen, s - m, 0.0)), 0.0)
        total = p.sum(-1, keepdim=True)
        divisor = torch.where(total == 0, 1.0, total)
        lse = torch.where(total == 0, -math.inf, m + torch.log(divisor))
        return (p / divisor)[..., :-1], lse[..., 0]

    def mix(self, w: Any, v: Any, seen: Any) -> Any:
        finite = torch.isfinite(v)
        spoiled = seen.to(w.dtype) @ (~finite).to(w.dtype)
        return torch.where(spoiled > 0, math.nan, w @ torch.where(finite, v, 0.0))


@wrong("dense", library="torch", seen="pytorch/pytorch#41508")
class GradientNaN(Differentiable):
    """The NaN of an empty row is replaced afterwards; its gradient is still there."""

    def softmax(self, s: Any, seen: Any, sinks: Any) -> tuple[Any, Any]:
        w = torch.softmax(s + torch.where(seen, 0.0, -math.inf), dim=-1)
        right, lse = super().softmax(s, seen, sinks)
        if sinks is not None or not s.shape[-1]:
            return right, lse
        return torch.where(seen.any(-1, keepdim=True), w, 0.0), lse


@wrong("dense", library="torch", seen="caches that are detached with the rest")
class GradientStopped(Differentiable):
    """Scores are taken from detached keys, which then learn nothing."""

    def scores(self, q: Any, k: Any, o: SimpleNamespace) -> Any:
        return super().scores(q, k.detach(), o)


@wrong("dense", library="torch", seen="kernels that recompute the weights and drop their sum")
class GradientOfTheTotalForgotten(Differentiable):
    """The total is taken for a constant: weights do not push each other away."""

    def softmax(self, s: Any, seen: Any, sinks: Any) -> tuple[Any, Any]:
        w, lse = super().softmax(s, seen, sinks)
        base = torch.where(torch.isfinite(lse), lse, 0.0).detach()[..., None]
        p = torch.where(seen, torch.exp(torch.where(seen, s - base, 0.0)), 0.0)
        return p + (w - p).detach(), lse


@wrong("dense", library="torch", seen="caches that are detached with the rest")
class GradientOfValuesStopped(Differentiable):
    """Values learn nothing: they are read from a detached copy."""

    def mix(self, w: Any, v: Any, seen: Any) -> Any:
        return super().mix(w, v.detach(), seen)
