"""Delta attention: a memory of fixed size in which a new value replaces the old one."""

from __future__ import annotations

from arrattn._core import gated, inputs, recurrence
from arrattn._core.typing import Array
from arrattn._state import DeltaState
from arrattn.feature_maps._read import read_map
from arrattn.linear import lay_out

__all__ = ["delta_attention"]


def delta_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    beta: Array,
    log_decay: Array | None = None,
    key_mask: Array | None = None,
    kv_lengths: int | Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    scale: float = 1.0,
    initial_state: DeltaState | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, DeltaState]:
    r"""
    Attention by the delta rule [1]_, or the gated delta rule [2]_: a memory that overwrites.

    .. math:: u_t = \beta_t \left(v_t - (e^{g_t} S_{t-1})^\top k_t\right), \qquad
              S_t = e^{g_t} S_{t-1} + k_t u_t^\top, \qquad o_t = s\, S_t^\top q_t

    The memory :math:`S` maps keys to values. Where linear attention adds each value to what
    is there, this one first asks the memory for the key, and writes only the difference:
    :math:`\beta_t = 1` with a key of length 1 replaces the value, 0 leaves the memory as it is.
    With `log_decay` :math:`g` the memory fades first. Always causal: query `i` reads the memory
    after the key at its own position, ``i + Nk - Nq``.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating; 2-D arrays mean one head and no batch.
    k : array, shape (..., Hkv, Nk, D)
        Keys, of length 1 or less for a memory that stays bounded: nothing is normalised here.
        `Hq` is a multiple of `Hkv`. Leading axes broadcast.
    v : array, shape (..., Hkv, Nk, Dv)
        Values. They may have a multiple `Hv` of the heads of `k`: value head `h` then stands
        under key head ``h // (Hv // Hkv)``, `Hq` divides `Hv` or is a multiple of it, and the
        output has the larger of `Hq` and `Hv` heads.
    beta : array, shape (..., Hv, Nk)
        How much of the difference is written: between 0 and 1, or up to 2 for memories that
        may also turn around.
    log_decay : array, shape (..., Hv, Nk) or (..., Hv, Nk, D), optional
        Natural logarithm of what is left of the memory when token `t` comes, at most 0, for
        each token or each row of the memory; broadcasts as in `linear_attention`.
    key_mask : array of bool, shape (..., Nk), optional
        True where a key is there; batch axes, not heads. A token that is not there leaves
        the memory as it is, and lets no time pass.
    kv_lengths : int or array of int, optional
        Only keys ``j < kv_lengths`` are there, and the last query stands at the last of
        them; an array has the batch axes.
    segment_ids : array of int (..., N), or pair (q_ids, k_ids), optional
        Every segment starts from an empty memory; ids may come in any order.
    scale : float, default: 1.0
        The factor :math:`s` of the output.
    initial_state : DeltaState, optional
        The memory to start from, ``S (..., Hv, D, Dv)`` in the accumulation dtype. Does not
        go with `segment_ids`.
    return_state : bool, default: False
        Also return the memory after the last key. Does not go with `segment_ids`.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        Same namespace, device and dtype as `q`; lazy if the inputs are. A query before the
        first key reads the initial memory, or gives 0.
    state : DeltaState
        Only with `return_state`; without head axis where q, k and v have none.

    Raises
    ------
    TypeError
        If inputs mix array libraries or devices, or are not of the kinds above.
    ValueError
        If shapes disagree, a decay is above 0, or segments would cut a state.

    See Also
    --------
    linear_attention : Values add up under their keys.
    arrattn.reference.delta_attention : The same by all pairs.
    arrattn.reference.delta_steps : The same, one token after the other.

    Notes
    -----
    Time is :math:`O((Nq + Nk)\, D\, Dv)`. The corrections :math:`u` of a chunk of 32 tokens
    solve a triangular system [3]_; its matrix is inverted by halves, and chunks follow each
    other through the memory. Sums are taken in at least float32. Decay by feature is that of
    [4]_.

    References
    ----------
    .. [1] Schlag et al., Linear transformers are secretly fast weight programmers, 2021,
       arXiv:2102.11174.
    .. [2] Yang et al., Gated delta networks, 2024, arXiv:2412.06464.
    .. [3] Yang et al., Parallelizing linear transformers with the delta rule over sequence
       length, 2024, arXiv:2406.06484.
    .. [4] Kimi team, Kimi linear, 2025, arXiv:2510.26692.

    Examples
    --------
    The third token writes under the first one's key again, and the last one asks for it:

    >>> import numpy as np
    >>> from arrattn import delta_attention, linear_attention
    >>> k = np.eye(2)[[0, 1, 0, 1]]
    >>> v = np.asarray([[1.0], [2.0], [5.0], [2.0]])
    >>> q = np.eye(2)[[0, 0, 0, 0]]
    >>> delta_attention(q, k, v, beta=np.ones(4))[:, 0]
    array([1., 1., 5., 5.])
    >>> linear_attention(q, k, v, feature_map=None, is_causal=True, normalize=False)[:, 0]
    array([1., 1., 6., 6.])
    """
    x = inputs.read_delta(
        "delta_attention",
        q,
        k,
        v,
        beta=beta,
        log_decay=log_decay,
        key_mask=key_mask,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
    )
    out, state = attend(x, padded=key_mask is not None)
    return (out, state) if return_state else out


def attend(x: inputs.LinearInputs, *, padded: bool) -> tuple[Array, DeltaState]:
    """Do a call that has been read."""
    how, operands = lay_out_delta(x, padded=padded)
    out, S, _ = recurrence.attend(how, operands, gated.run, together=True)
    S = x.join_heads(S, 2)
    return x.ungroup(out), DeltaState(S[..., 0, :, :] if x.no_head else S)


def lay_out_delta(
    x: inputs.LinearInputs, *, padded: bool
) -> tuple[recurrence.How, recurrence.Operands]:
    """What the recurrence does, and with which arrays."""
    how = recurrence.How(
        xp=x.xp,
        feature_map=read_map(None),
        is_causal=True,
        normalize=False,
        scale=x.scale,
        batch=x.batch,
        acc=x.acc,
        same_ids=x.q_ids is not None and x.q_ids is x.k_ids,
        chunk=gated.CHUNK,
    )
    return how, lay_out(x, None, padded=padded)
