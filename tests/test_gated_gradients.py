"""Gradients through decay and the delta rule, and what training keeps in memory."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
from gates import chunks_of, decays
from lanes import close
from sums import make_map
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from arrattn import DeltaState, LinearState, delta_attention, linear_attention, reference

N = 6


def arrays(channels: int = 1, width: int = 3) -> dict[str, np.ndarray[Any, Any]]:
    """Small inputs of both functions."""
    rng = np.random.default_rng(channels)
    q, k, v = (rng.normal(size=(2, N, d)) for d in (3, 3, 2))
    k /= np.sqrt(np.sum(k**2, axis=-1, keepdims=True))
    g = np.maximum(decays("mixed", (2, N, channels), rng), -3.0)
    S, z = rng.normal(size=(2, width, 2)), np.abs(rng.normal(size=(2, width)))
    return {"q": q, "k": k, "v": v, "g": g, "beta": rng.random((2, N)), "S": S, "z": z}


IDS = np.asarray([1, 1, 0, 0, 0, 1])


def linear(function: Any, *, state: bool = True, name: str = "elu_plus_one", **options: Any) -> Any:
    """A function of all that has a gradient; outputs and state."""

    def call(q: Any, k: Any, v: Any, g: Any, beta: Any, S: Any, z: Any) -> Any:
        how = {"feature_map": make_map(name, 3), "log_decay": g, **options}
        if not state:
            return (function(q, k, v, **how),)
        if function is not reference.linear_steps:
            how["return_state"] = True
        out, after = function(q, k, v, initial_state=LinearState(S, z), **how)
        return (out, *after)

    return call


def delta(function: Any, *, state: bool = True, gate: bool = True, **options: Any) -> Any:
    """The same of the delta rule."""

    def call(q: Any, k: Any, v: Any, g: Any, beta: Any, S: Any, z: Any) -> Any:
        how = {"beta": beta, "log_decay": g if gate else None, **options}
        if not state:
            return (function(q, k, v, **how),)
        if function is not reference.delta_steps:
            how["return_state"] = True
        out, after = function(q, k, v, initial_state=DeltaState(S), **how)
        return (out, *after)

    return call


def forms(make: Any, chunked: Any, pairs: Any, steps: Any, **options: Any) -> Any:
    """The three forms of one call."""
    causal = {} if make is delta else {"is_causal": True}
    return (
        make(chunked, **causal, **options),
        make(pairs, **causal, **options),
        make(steps, **options),
    )


LINEAR = (linear, linear_attention, reference.linear_attention, reference.linear_steps)
DELTA = (delta, delta_attention, reference.delta_attention, reference.delta_steps)
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "by token": (forms(*LINEAR), {}),
    "by channel": (forms(*LINEAR, normalize=False), {"channels": 3}),
    "logarithms": (forms(*LINEAR, name="softmax"), {"width": 8}),
    "delta": (forms(*DELTA, gate=False), {}),
    "gated delta": (forms(*DELTA), {}),
    "gated delta by channel": (forms(*DELTA), {"channels": 3}),
    "both ways": ((linear(linear_attention), linear(reference.linear_attention)), {}),
    "segments": (
        tuple(
            linear(f, state=False, name="softmax", segment_ids=torch.asarray(IDS), is_causal=True)
            for f in LINEAR[1:3]
        ),
        {},
    ),
    "delta in segments": (
        tuple(delta(f, state=False, segment_ids=torch.asarray(IDS)) for f in DELTA[1:3]),
        {},
    ),
}
calls = pytest.mark.parametrize("name", CALLS)


def leaves(**sizes: int) -> list[Any]:
    return [torch.asarray(x).requires_grad_() for x in arrays(**sizes).values()]


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name, (variants, _) in CALLS.items() for form in range(len(variants))],
)
def test_torch_agrees_with_finite_differences(name: str, form: int) -> None:
    variants, sizes = CALLS[name]
    with chunks_of(2):
        assert torch.autograd.gradcheck(variants[form], leaves(**sizes), fast_mode=True)


def gradients(function: Any, sizes: dict[str, int]) -> list[np.ndarray[Any, Any]]:
    inputs = leaves(**sizes)
    sum((x**2).sum() for x in function(*inputs)).backward()
    return [np.zeros(x.shape) if x.grad is None else x.grad.numpy() for x in inputs]


@calls
def test_torch_equals_the_reference(name: str) -> None:
    (ours, theirs, *_), sizes = CALLS[name]
    with chunks_of(2):
        got = gradients(ours, sizes)
    for a, b in zip(got, gradients(theirs, sizes), strict=True):
        # Both sides differentiate the same sums; their condition is that of the sums.
        close(a, b, within=1e-9 * (1 + np.abs(b).max()))


@pytest.mark.parametrize("name", ["by token", "gated delta"])
def test_transforms_of_torch_give_the_same_gradients(name: str) -> None:
    (ours, *_), sizes = CALLS[name]
    inputs = [torch.asarray(x) for x in arrays(**sizes).values()]

    def loss(*inputs: Any) -> Any:
        return sum((x**2).sum() for x in ours(*inputs))

    with chunks_of(2):
        got = torch.func.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)
        expected = gradients(ours, sizes)
    for a, b in zip(got, expected, strict=True):
        close(a.numpy(), b, within=1e-12 * (1 + np.abs(b).max()))


@pytest.mark.parametrize("name", ["gated delta by channel"])  # the others' steps are among its
def test_jax_equals_the_reference_of_torch(name: str) -> None:
    (ours, theirs, *_), sizes = CALLS[name]
    inputs = [jax.numpy.asarray(x) for x in arrays(**sizes).values()]

    def loss(*inputs: Any) -> Any:
        return sum((x**2).sum() for x in ours(*inputs))

    with chunks_of(2, span=1):
        got = jax.jit(jax.grad(loss, argnums=tuple(range(len(inputs)))))(*inputs)
    for a, b in zip(got, gradients(theirs, sizes), strict=True):
        close(np.asarray(a), b, within=1e-9 * (1 + np.abs(b).max()))


@calls
def test_decay_beyond_all_numbers_has_gradients(name: str) -> None:
    (ours, *_), sizes = CALLS[name]
    inputs = arrays(**sizes)
    inputs["g"][:, ::2] = -np.inf
    inputs["g"][:, 1] = -1e5
    tensors = [torch.asarray(x).requires_grad_() for x in inputs.values()]
    with chunks_of(2):
        sum((x**2).sum() for x in ours(*tensors)).backward()
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in tensors)


class Alive(TorchDispatchMode):
    """Counts the bytes that calls under it made and somebody still holds."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        """How many."""
        return sum(n for ref, n in self.made.values() if not ref.expired())


@pytest.mark.parametrize("rule", ["decay", "delta"])
def test_training_keeps_no_memory_for_each_token(rule: str) -> None:
    n, d, dv = 2048, 16, 64
    rng = np.random.default_rng(0)
    q, k, v = (torch.asarray(rng.normal(size=(1, n, w))).requires_grad_() for w in (d, d, dv))
    g = torch.asarray(-rng.random((1, n, d))).requires_grad_()
    with Alive() as alive:
        if rule == "decay":
            out = linear_attention(q, k, v, log_decay=g, is_causal=True)
        else:
            out = delta_attention(q, k, v, beta=torch.ones(1, n), log_decay=g)
    inputs = sum(x.nbytes for x in (q, k, v, g))
    # A memory for each chunk would be `d * dv / 32` numbers a token, for each token `d * dv`.
    assert out.requires_grad
    assert alive.bytes() <= 2 * (inputs + out.nbytes)
