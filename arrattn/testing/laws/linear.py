"""Linear attention: states, kernels, the normaliser and random features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn import reference
from arrattn._state import DeltaState, LinearState
from arrattn.testing.bounds import case_errors, delta_errors
from arrattn.testing.case import Case, NamedMap
from arrattn.testing.laws.given import MODEST, POSITIVE, calls, near
from arrattn.testing.laws.registry import law
from arrattn.testing.laws.values import per_query_head
from arrattn.testing.run import Outcome, Run
from arrattn.testing.strategies import states
from arrattn.testing.subject import Subject
from arrattn.testing.values import joined

Host = np.ndarray[Any, Any]

LINEAR = ("linear",)


State = LinearState | DeltaState


def with_state(subject: Subject, **how: Any) -> st.SearchStrategy[tuple[Case, State]]:
    """Calls, and a state that goes into them."""
    drawn = calls(subject, avoid=("broadcast",), **how)
    return drawn.flatmap(lambda case: st.tuples(st.just(case), states(case)))


def cut(case: Case, tokens: Any) -> Case:
    """The call on some of its tokens, queries and keys alike."""
    return case.per_key(lambda x: x[..., tokens, :]).but(q=case.q[..., tokens, :])


def state_errors(run: Run, case: Case, out: Host) -> tuple[Any, ...]:
    """How far the state may be off."""
    errors = delta_errors if run.subject.family == "delta" else case_errors
    return errors(case, run.subject.measured(case.dtype), out)[1:]


def state_of(case: Case, outcome: Outcome) -> State:
    """The state that came out, to go in again."""
    if "beta" in case.options:
        return DeltaState(outcome.S.array)
    return LinearState(outcome.S.array, outcome.z.array)


def same_state(run: Run, got: Outcome, due: Sequence[Any], errors: Sequence[Any]) -> None:
    """Require a state."""
    for found, expected, within in zip((got.S, got.z), due, errors, strict=False):
        run.same(found, expected, within)


@law(
    "state-hands-over",
    "tokens in any parts, each started from the state of the one before, are the whole run",
    source="Katharopoulos et al. 2020, arXiv:2006.16236: S_t depends on S_{t-1} and token t",
    given=lambda s: st.tuples(
        calls(s, avoid=("broadcast",), equal=True), st.integers(0, 8), st.integers(0, 8)
    ),
    families=(*LINEAR, "delta"),
    needs=("is_causal", "initial_state", "return_state"),
)
def state_hands_over(run: Run, case: Case, a: int, b: int) -> None:
    n, case = case.lengths[1], case.causal.but(return_state=True)
    ends = sorted({0, a % (n + 1), b % (n + 1), n})
    whole = run("whole", case)
    state: State | None = None
    parts: list[Outcome] = []
    for start, stop in pairwise(ends):
        before: dict[str, Any] = {} if state is None else {"initial_state": state}
        part = cut(case, slice(start, stop)).but(**before)
        parts.append(run(f"part{len(parts)}", part))
        state = state_of(case, parts[-1])
    if parts:
        run.same(joined([x.out for x in parts], -2), whole.out, 2 * near(run, (case, whole)))
        errors = [2 * x for x in state_errors(run, case, whole.out.array)]
        same_state(run, parts[-1], (whole.S, whole.z), errors)


@law(
    "state-is-the-sum",
    "S = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j) over the keys that are there",
    source="Katharopoulos et al. 2020, arXiv:2006.16236",
    given=lambda s: with_state(s, sees=("is_causal", "key_mask", "kv_lengths", "segment_ids")),
    families=LINEAR,
    needs=("initial_state", "return_state"),
)
def state_is_the_sum(run: Run, case: Case, state: LinearState) -> None:
    case = case.but(initial_state=state, return_state=True)
    whole = run("whole", case)
    with np.errstate(all="ignore"):
        out, due = reference.linear_attention(*case.arrays, **case.meant)
    same_state(run, whole, due, state_errors(run, case, out))


@law(
    "a-state-goes-in",
    "with a state, o_i = (phi(q_i) S_0 + sum w_ij v_j) / (phi(q_i) z_0 + sum w_ij)",
    source="Katharopoulos et al. 2020, arXiv:2006.16236",
    given=lambda s: with_state(s, sees=("is_causal", "key_mask", "kv_lengths", "segment_ids")),
    families=LINEAR,
    needs=("initial_state",),
)
def a_state_goes_in(run: Run, case: Case, state: LinearState) -> None:
    case = case.but(initial_state=state)
    whole = run("whole", case)
    with np.errstate(all="ignore"):
        due = reference.linear_attention(*case.arrays, **case.meant)
    run.same(whole.out, due, run.bound(case, due))


@law(
    "no-tokens-leave-the-state",
    "a call over no tokens returns the state that went in",
    source="the definition of LinearState, and of DeltaState",
    given=with_state,
    families=(*LINEAR, "delta"),
    needs=("initial_state", "return_state", "empty"),
)
def no_tokens(run: Run, case: Case, state: State) -> None:
    case = cut(case, slice(0, 0)).but(initial_state=state, return_state=True)
    same_state(run, run("whole", case), state, (0.0, 0.0))


@law(
    "kernel-of-products",
    "with phi(x) = (x_a x_b)_ab the weights are (q_i . k_j)^2, exactly",
    source="the definition of a feature map: phi(x) . phi(y) is the kernel",
    given=lambda s: calls(s, kinds=MODEST, maps=(NamedMap("squares"),)),
    families=LINEAR,
    needs=("feature_map",),
)
def kernel_of_products(run: Run, case: Case) -> None:
    whole = run("whole", case)
    k, v = per_query_head(case.k, case), per_query_head(case.v, case)
    w = (case.q @ np.swapaxes(k, -1, -2)) ** 2
    total = w.sum(-1, keepdims=True)
    due = w @ v / np.where(total == 0, 1.0, total)
    due = due[0] if case.q.ndim == 2 else due
    run.same(whole.out, due, run.bound(case, due))


@law(
    "kernel-may-be-scaled",
    "relu(c k) = c relu(k): normalised, a factor of the keys changes nothing",
    source="Katharopoulos et al. 2020, eq. 4: the normaliser holds the same kernel",
    given=lambda s: calls(
        s, sees=("is_causal", "kv_lengths"), kinds=MODEST, maps=(NamedMap("relu"),)
    ),
    families=LINEAR,
    needs=("feature_map",),
)
def kernel_may_be_scaled(run: Run, case: Case) -> None:
    other = case.but(k=4.0 * case.k)
    a, b = run("plain", case), run("scaled", other)
    run.same(b.out, a.out, near(run, (case, a), (other, b)))


@law(
    "padding-leaves-the-normaliser",
    "keys with key_mask False are as if they were cut off, in the normaliser too",
    source="C4, C7",
    given=lambda s: st.tuples(
        calls(s, avoid=("broadcast",), maps=POSITIVE, kinds=MODEST), st.integers(0, 8)
    ),
    families=LINEAR,
    needs=("key_mask", "cross"),
)
def padding_leaves(run: Run, case: Case, length: int) -> None:
    length %= case.lengths[1] + 1
    there = np.arange(case.lengths[1]) < length
    short = case.but(k=case.k[..., :length, :], v=case.v[..., :length, :])
    a, b = run("masked", case.but(key_mask=there)), run("cut", short)
    run.same(a.out, b.out, 2 * near(run, (short, b)))


@law(
    "normalised-is-a-quotient",
    "f(v) f(1; not normalised) = f(v; not normalised)",
    source="Katharopoulos et al. 2020, eq. 4",
    given=lambda s: calls(s, sees=("is_causal", "key_mask"), kinds=MODEST, maps=POSITIVE),
    families=LINEAR,
    needs=("normalize",),
)
def normalised_is_a_quotient(run: Run, case: Case) -> None:
    sums = case.but(normalize=False)
    ones = sums.but(v=np.ones_like(case.v))
    a, b, total = run("mean", case), run("sums", sums), run("total", ones)
    size = np.abs(a.out.array), np.abs(total.out.array)
    within = (
        near(run, (sums, b)) + near(run, (case, a)) * size[1] + near(run, (ones, total)) * size[0]
    )
    run.same(a.out * total.out, b.out, 2 * within)


@law(
    "scale-multiplies-weights",
    "not normalised, scale = c is c times the sums",
    source="the definition of linear attention",
    given=lambda s: st.tuples(calls(s, sees=("is_causal",)), st.sampled_from((2.0, -0.5))),
    families=LINEAR,
    needs=("normalize", "scale"),
)
def scale_multiplies(run: Run, case: Case, scale: float) -> None:
    sums = case.but(normalize=False)
    scaled = sums.but(scale=scale)
    a, b = run("plain", sums), run("scaled", scaled)
    run.same(b.out, scale * a.out, 2 * near(run, (scaled, b)) + 2 * near(run, (sums, a)))


#: Decays of tokens, one after the other.
DECAYS = st.lists(st.sampled_from((0.0, -0.5, -0.25)), min_size=4, max_size=4)


def decay(case: Case, values: list[float]) -> Host:
    """`log_decay` of each token, (1, N, 1), or (N, 1) where there are no heads."""
    g = np.resize(np.asarray(values), (case.lengths[1], 1))
    return g if case.k.ndim == 2 else g[None]


@law(
    "no-decay-changes-nothing",
    "with log_decay = 0 the result is what it is without",
    source="Sun et al. 2023, arXiv:2307.08621, eq. 5; Yang et al. 2024, arXiv:2412.06464",
    given=lambda s: calls(s, avoid=("log_decay",), sees=("is_causal",), equal=True),
    families=(*LINEAR, "delta"),
    needs=("log_decay",),
)
def no_decay(run: Run, case: Case) -> None:
    still = case.but(log_decay=decay(case, [0.0]))
    a, b = run("plain", case), run("still", still)
    run.same(b.out, a.out, near(run, (case, a), (still, b)))


@law(
    "decay-weighs-the-distance",
    "w_ij = exp(g_{j+1} + ... + g_i) phi(q_i) . phi(k_j): a key decays by what comes after it",
    source="Yang et al. 2023, arXiv:2312.06635, eq. 3: S_t = diag(exp g_t) S_{t-1} + k_t v_t^T",
    given=lambda s: st.tuples(calls(s, equal=True), DECAYS),
    families=LINEAR,
    needs=("log_decay", "is_causal", "normalize"),
)
def decay_weighs(run: Run, case: Case, values: list[float]) -> None:
    case = case.but(is_causal=True, normalize=False)
    g = decay(case, values)
    total = np.exp(np.cumsum(g, axis=-2))
    other = case.but(v=case.v / total)
    case = case.but(log_decay=g)
    a, b = run("decayed", case), run("by_hand", other)
    run.same(a.out, total * b.out, 2 * near(run, (case, a)) + 2 * total * near(run, (other, b)))


@law(
    "the-state-decays-first",
    "tokens in two parts, the second started from the state of the first, are the whole run",
    source="Yang et al. 2023, arXiv:2312.06635, eq. 3: the decay of a token meets all before it",
    given=lambda s: st.tuples(
        calls(s, avoid=("broadcast",), equal=True), DECAYS, st.integers(0, 8)
    ),
    families=LINEAR,
    needs=("log_decay", "is_causal", "initial_state", "return_state"),
)
def state_decays_first(run: Run, case: Case, values: list[float], at: int) -> None:
    at %= case.lengths[1] + 1
    case = case.but(is_causal=True, return_state=True, log_decay=decay(case, values))
    whole, parts = run("whole", case), []
    state: dict[str, Any] = {}
    for name, tokens in (("first", slice(0, at)), ("second", slice(at, None))):
        part = run(name, cut(case, tokens).but(**state))
        state = {"initial_state": state_of(case, part)}
        parts.append(part)
    run.same(joined([x.out for x in parts], -2), whole.out, 2 * near(run, (case, whole)))
    errors = [2 * x for x in state_errors(run, case, whole.out.array)]
    same_state(run, parts[-1], (whole.S, whole.z), errors)


@st.composite
def small_vectors(draw: st.DrawFn, subject: Subject) -> Case:
    """Calls with short vectors and many random features."""
    map_ = NamedMap("softmax", 512, draw(st.integers(0, 5)))
    case = draw(calls(subject, kinds=("tied",), maps=(map_,), avoid=("broadcast",)))
    return case.but(q=case.q / 4, k=case.k / 4)


@law(
    "random-features-have-their-error",
    "|phi(q) . phi(k) - exp(q . k)| <= 6 sigma, "
    "sigma^2 = e^{|q+k|^2} e^{2 q.k} (1 - e^{-|q+k|^2}) / m",
    source="Choromanski et al. 2021, arXiv:2009.14794, lemma 2",
    given=small_vectors,
    families=LINEAR,
    needs=("feature_map", "normalize", "dv"),
    most=60,
)
def random_features(run: Run, case: Case) -> None:
    nk = case.lengths[1]
    eye = np.broadcast_to(np.eye(nk), (*case.v.shape[:-1], nk)).copy()
    case = case.but(v=eye, normalize=False)
    whole = run("kernel", case)
    q, k = (case.q[None] if case.q.ndim == 2 else case.q), per_query_head(case.k, case)
    x = q @ np.swapaxes(k, -1, -2)
    size = np.sum(q * q, -1)[..., None] + 2 * x + np.sum(k * k, -1)[..., None, :]
    sigma = np.sqrt(np.exp(size + 2 * x) * (1 - np.exp(-size)) / 512)
    due, sigma = (np.exp(x)[0], sigma[0]) if case.q.ndim == 2 else (np.exp(x), sigma)
    run.same(whole.out, due, 6 * sigma + near(run, (case, whole)))


@law(
    "features-of-any-size",
    "features whose exponents no dtype holds give a finite mean of the values",
    source="C8; the stabiliser must not look at the future nor at other rows",
    given=lambda s: st.tuples(
        calls(s, equal=True, kinds=MODEST, maps=(NamedMap("softmax"),)),
        st.sampled_from((64.0, 16.0)),
    ),
    families=LINEAR,
    needs=("feature_map",),
)
def features_of_any_size(run: Run, case: Case, size: float) -> None:
    # One direction for all: the features of a query and of a key have the same largest one.
    d = case.q.shape[-1]
    q, k = (
        np.broadcast_to(size * (1 + np.abs(x[..., :1])), (*x.shape[:-1], d)).copy()
        for x in (case.q, case.k)
    )
    causal = {"is_causal": True} if run.subject.can("is_causal") else {}
    case = case.but(q=q, k=k, **causal)
    whole = run("whole", case)
    v = per_query_head(case.v, case)
    low, high = (
        f(v, axis=-2, keepdims=True, initial=x) for f, x in ((np.min, np.inf), (np.max, -np.inf))
    )
    low, high = (
        np.broadcast_to(x, (*x.shape[:-2], *case.q.shape[-2:-1], x.shape[-1])) for x in (low, high)
    )
    low, high = (low[0], high[0]) if case.q.ndim == 2 else (low, high)
    within = 2.0**-12 * np.max(np.abs(case.v), initial=0.0)
    run.same(whole.out, low, within, op=">=")
    run.same(whole.out, high, within, op="<=")
