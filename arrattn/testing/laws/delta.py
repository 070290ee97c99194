"""The delta rule: what is written, what is kept, and what fades."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn import reference
from arrattn._state import DeltaState
from arrattn.testing.case import Case
from arrattn.testing.laws.agreement import exact
from arrattn.testing.laws.given import calls
from arrattn.testing.laws.linear import DECAYS, cut, decay, same_state, state_errors, with_state
from arrattn.testing.laws.registry import law
from arrattn.testing.laws.values import per_query_head
from arrattn.testing.run import Run
from arrattn.testing.subject import Subject

Host = np.ndarray[Any, Any]

DELTA = ("delta",)
RULE = "Yang et al. 2024, arXiv:2406.06484: S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T"
GATED = "Yang et al. 2024, arXiv:2412.06464: the memory fades before it is asked and written"

#: Which tokens are left, one after the other.
KEPT = st.lists(st.booleans(), min_size=8, max_size=8)


def tokens(subject: Subject, *, avoid: tuple[str, ...] = (), **how: Any) -> Any:
    """Calls with a query for every key, whose gates are written out."""
    return calls(subject, avoid=("broadcast", *avoid), equal=True, **how)


def directions(x: Host) -> Host:
    """The unit vector of the largest component: any two are the same or orthogonal."""
    found: Host = np.eye(x.shape[-1])[np.argmax(x, axis=-1)]
    return found


def all_ones(case: Case) -> dict[str, Host]:
    """`beta` of 1 for every token."""
    return {"beta": np.ones_like(case.options["beta"])}


def as_q(x: Host, case: Case) -> Host:
    """What belongs to key heads, for each query head, in the axes of q."""
    x = per_query_head(x, case)
    return x[0] if case.q.ndim == 2 else x


@law(
    "equals-the-steps",
    "one token after the other: S <- e^g S, u = beta (v - S^T k), S <- S + k u^T, o = s S^T q",
    source=GATED,
    given=lambda s: tokens(s, sees=("key_mask",)),
    families=DELTA,
)
def equals_the_steps(run: Run, case: Case) -> None:
    whole = run("whole", case)
    due, _ = reference.delta_steps(*case.arrays, **case.meant)
    run.same(whole.out, due, run.bound(case, due))


@law(
    "a-memory-goes-in-and-out",
    "with a memory to start from, outputs and the memory after the last key are the equation's",
    source=GATED,
    given=lambda s: with_state(s, sees=("key_mask", "kv_lengths")),
    families=DELTA,
    needs=("initial_state", "return_state"),
)
def a_memory_goes_in_and_out(run: Run, case: Case, state: DeltaState) -> None:
    case = case.but(initial_state=state, return_state=True)
    whole = run("whole", case)
    due, after = exact(run, case)
    run.same(whole.out, due, run.bound(case, due))
    same_state(run, whole, after, state_errors(run, case, due))


# -- Writing ----------------------------------------------------------------------------------


@law(
    "beta-one-reads-back",
    "beta = 1 and |k_t| = 1: the memory answers k_t with v_t, whatever was there and faded",
    source=RULE,
    given=tokens,
    families=DELTA,
)
def beta_one_reads_back(run: Run, case: Case) -> None:
    k = directions(case.k)
    case = case.minus("scale").but(k=k, q=as_q(k, case).copy(), **all_ones(case))
    whole = run("whole", case)
    due = as_q(case.v, case)
    run.same(whole.out, due, run.bound(case, due))


@law(
    "the-last-write-counts",
    "beta = 1, orthogonal keys: o_i is the last value that was written under q_i, or 0",
    source=RULE,
    given=lambda s: tokens(s, avoid=("log_decay",)),
    families=DELTA,
)
def the_last_write_counts(run: Run, case: Case) -> None:
    q, k = directions(case.q), directions(case.k)
    case = case.minus("scale").but(q=q, k=k, **all_ones(case))
    whole, n = run("whole", case), case.lengths[1]
    written = (q @ np.swapaxes(as_q(k, case), -1, -2) > 0) & np.tri(n, dtype=bool)
    last = written & (np.cumsum(written[..., ::-1], axis=-1)[..., ::-1] == 1)
    due = last.astype(float) @ as_q(case.v, case)
    run.same(whole.out, due, run.bound(case, due))


@law(
    "one-key-averages-its-values",
    "all keys the same unit vector: o_t = (1 - beta_t) o_{t-1} + beta_t v_t",
    source=RULE,
    given=lambda s: tokens(s, avoid=("log_decay",)),
    families=DELTA,
)
def one_key_averages(run: Run, case: Case) -> None:
    case = case.minus("scale").but(q=directions(0 * case.q), k=directions(0 * case.k))
    whole = run("whole", case)
    beta, v = (as_q(x, case) for x in (case.options["beta"][..., None], case.v))
    due, mean = np.zeros_like(v), np.zeros_like(v[..., :1, :])
    for t in range(case.lengths[1]):
        b = beta[..., t : t + 1, :]
        mean = (1 - b) * mean + b * v[..., t : t + 1, :]
        due[..., t : t + 1, :] = mean
    run.same(whole.out, due, run.bound(case, due))


@law(
    "beta-zero-writes-nothing",
    "a token with beta = 0 that lets nothing fade is as if it were not there",
    source=RULE,
    given=lambda s: st.tuples(tokens(s), KEPT),
    families=DELTA,
)
def beta_zero_writes_nothing(run: Run, case: Case, kept: list[bool]) -> None:
    stays = np.asarray(kept[: case.lengths[1]], bool)
    gates = {"beta": case.options["beta"] * stays}
    if "log_decay" in case.options:
        gates["log_decay"] = case.options["log_decay"] * stays[:, None]
    as_if_cut(run, case, case.but(**gates), stays)


@law(
    "masked-tokens-do-nothing",
    "a token with key_mask False writes nothing and lets nothing fade: as if it were not there",
    source="C4, C7",
    given=lambda s: st.tuples(tokens(s), KEPT),
    families=DELTA,
    needs=("key_mask",),
)
def masked_tokens_do_nothing(run: Run, case: Case, kept: list[bool]) -> None:
    stays = np.asarray(kept[: case.lengths[1]], bool)
    as_if_cut(run, case, case.but(key_mask=stays), stays)


def as_if_cut(run: Run, case: Case, other: Case, stays: Host) -> None:
    """Require of the tokens that stay what they give without the others."""
    if not stays.any() and not run.subject.can("empty"):
        return
    at = np.flatnonzero(stays)
    short = cut(case, at)
    whole, alone = run("whole", other), run("cut", short)
    run.same(whole.out[..., at, :], alone.out, run.bound(other, alone.out.array) * 2)


# -- Fading, and segments ---------------------------------------------------------------------


@law(
    "the-memory-fades",
    "one write, at token 0: o_t = s e^{g_1 + ... + g_t} (q_t . k_0) v_0",
    source=GATED,
    given=lambda s: st.tuples(tokens(s), DECAYS),
    families=DELTA,
    needs=("log_decay",),
)
def the_memory_fades(run: Run, case: Case, values: list[float]) -> None:
    g, n = decay(case, values), case.lengths[1]
    beta = np.broadcast_to(np.arange(n) == 0, case.options["beta"].shape).astype(float)
    case = case.but(log_decay=g, beta=beta)
    whole = run("whole", case)
    first = [as_q(x[..., :1, :], case) for x in (case.k, case.v)]
    left = np.exp(np.cumsum(g, axis=-2) - g[..., :1, :])
    known = case.q @ np.swapaxes(first[0], -1, -2)
    due = case.options.get("scale", 1.0) * left * (known @ first[1])
    run.same(whole.out, due, run.bound(case, due))


@law(
    "segments-have-their-own-memory",
    "the tokens of a segment give what they give alone, wherever the others stand between",
    source="C4",
    given=lambda s: st.tuples(tokens(s), st.lists(st.integers(0, 2), min_size=8, max_size=8)),
    families=DELTA,
    needs=("segment_ids",),
)
def segments_have_their_own(run: Run, case: Case, ids: list[int]) -> None:
    each = np.asarray(ids[: case.lengths[1]], np.int64)
    packed = run("packed", case.but(segment_ids=each))
    for segment in sorted(set(each.tolist())):
        at = np.flatnonzero(each == segment)
        document = cut(case, at)
        alone = run(f"document{segment}", document)
        within = 2 * run.bound(case, alone.out.array)
        run.same(packed.out[..., at, :], alone.out, within)
