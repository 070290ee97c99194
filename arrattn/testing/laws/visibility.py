"""Who sees whom, read off the table of weights: v = 1 (the identity) makes it the output."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from arrattn.testing.case import Case
from arrattn.testing.laws.given import MODEST, POSITIVE, SEES, calls, near, probe
from arrattn.testing.laws.registry import MEANS, SOFTMAX, law, sights
from arrattn.testing.run import Run
from arrattn.testing.strategies import VISIBILITY
from arrattn.testing.subject import Subject

Host = np.ndarray[Any, Any]


def table(subject: Subject, *names: str, least: int = 1, **how: Any) -> st.SearchStrategy[Case]:
    """Calls with these arguments about visibility, and weights that do not underflow."""
    how = {"kinds": MODEST, "maps": POSITIVE, **how}
    return calls(subject, sees=names, least=least, most=max(least, 3), **how)


def everything(case: Case, subject: Subject) -> Case:
    """Sparse attention with every key selected, where it can."""
    if subject.family != "sparse":
        return case
    full = {"top_k": case.lengths[1], "route": None}
    return case.but(**{n: x for n, x in full.items() if subject.can(n)})


def weights_say(run: Run, case: Case) -> None:
    """Require weights above 0 exactly where the contract says that a pair is visible."""
    case = everything(probe(case, run.subject), run.subject)
    whole, seen = run("weights", case), case.visible()
    seen = seen[0] if case.q.ndim == 2 else seen
    got = whole.out[..., : case.lengths[1]] > 0
    exact = run.subject.family != "sparse" or run.subject.can("top_k", "route")
    run.same(got, seen, 0.0, op="==" if exact else "<=", of=case)


def visible(name: str, argument: str, statement: str, *, families: Any, **how: Any) -> None:
    """Register the law of one argument."""
    source = how.pop("source", "C4")
    needs = how.pop("needs", (argument,))
    law(
        name,
        f"p_ij > 0 exactly where {statement}",
        source=source,
        given=lambda s: table(s, argument, **how),
        families=families,
        needs=needs,
    )(weights_say)


visible("mask-true-is-visible", "mask", "mask_ij is True", families=SOFTMAX)
visible(
    "causal-sees-itself-and-before",
    "is_causal",
    "j <= i, with as many queries as keys",
    families=MEANS,
    equal=True,
)
visible(
    "window-counts-neighbours",
    "window",
    "p - left <= j <= p + right, the position itself not counted",
    families=("dense", "sparse"),
    equal=True,
    source="C4; Beltagy et al. 2020, arXiv:2004.05150",
)
visible(
    "local-window-counts-neighbours",
    "window",
    "p - left <= j <= p + right, the position itself not counted",
    families=("local",),
    equal=True,
    least=0,
    source="C4; Beltagy et al. 2020, arXiv:2004.05150",
)
visible("kv-lengths-count-keys", "kv_lengths", "j < kv_lengths", families=MEANS)
visible(
    "segments-see-their-own",
    "segment_ids",
    "q_ids_i = k_ids_j, whatever the order of the ids",
    families=MEANS,
)
visible("key-mask-true-is-there", "key_mask", "key_mask_j is True", families=("linear",))
visible(
    "patterns-mean-what-they-say",
    "pattern",
    "the pattern, composed with &, | and ~, says so",
    families=SOFTMAX,
)


@law(
    "causal-ends-at-the-last-key",
    "p_ij > 0 exactly where j <= i + Nk - Nq: the last query sees the last key",
    source="C3: decoding with a cache is right by default",
    given=lambda s: table(s, "is_causal", top_left=False).filter(
        lambda c: c.lengths[0] != c.lengths[1]
    ),
    families=MEANS,
    needs=("is_causal", "cross"),
    choice="alignment",
)
def causal_ends_at_the_last_key(run: Run, case: Case) -> None:
    weights_say(run, case)


@law(
    "q-offset-moves-queries",
    "query i stands at i + q_offset, before the keys and beyond them too",
    source="C3",
    given=lambda s: st.tuples(table(s, "q_offset"), st.booleans()),
    families=SOFTMAX,
    needs=("q_offset", "is_causal", "combine"),
)
def q_offset_moves_queries(run: Run, case: Case, causal: bool) -> None:
    if causal or not run.subject.can("window"):
        weights_say(run, case.but(is_causal=True))
    else:
        weights_say(run, case.but(window=case.options.get("window", (1, 2))))


@law(
    "visibility-intersects",
    "p_ij > 0 exactly where every argument about visibility says so",
    source="C4: no combination is an error, and none overrides another",
    given=lambda s: table(s, *sights(s), least=2),
    families=MEANS,
    needs=("visibility", "combine"),
)
def visibility_intersects(run: Run, case: Case) -> None:
    weights_say(run, case)


@law(
    "masks-broadcast",
    "a mask that broadcasts is the mask written out",
    source="C4",
    given=lambda s: table(s, "mask"),
    families=SOFTMAX,
    needs=("mask", "short masks"),
)
def masks_broadcast(run: Run, case: Case) -> None:
    mask = case.options.get("mask")
    if mask is None:
        return
    lead = (*case.batch, case.heads[0]) if case.q.ndim > 2 else ()
    shape = (*lead, *case.lengths)
    full = case.but(mask=np.broadcast_to(mask, np.broadcast_shapes(mask.shape, shape)).copy())
    a, b = run("short", case), run("full", full)
    run.same(a.out, b.out, near(run, (case, a), (full, b)), of=case)


@law(
    "options-are-masks",
    "any arguments about visibility are the mask that says the same",
    source="C4",
    given=lambda s: calls(s, sees=SEES, least=1, scoring=("scale", "bias")),
    families=("dense",),
    needs=("mask", "visibility"),
)
def options_are_masks(run: Run, case: Case) -> None:
    seen = case.visible()
    masked = case.minus(*VISIBILITY["dense"]).but(mask=seen[0] if case.q.ndim == 2 else seen)
    a, b = run("options", case), run("masked", masked)
    run.same(a.out, b.out, near(run, (case, a), (masked, b)), of=case)
