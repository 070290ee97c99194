"""Linear attention: time and memory that grow with the number of tokens, not of pairs."""

from __future__ import annotations

from typing import Any

from arrattn._core import gated, inputs, loops, recurrence
from arrattn._core.typing import Array
from arrattn._state import LinearState
from arrattn.feature_maps import FeatureMap, elu_plus_one, identity
from arrattn.feature_maps._read import read_map

__all__ = ["linear_attention"]


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    feature_map: FeatureMap | Any | None = elu_plus_one,
    log_decay: Array | None = None,
    is_causal: bool = False,
    key_mask: Array | None = None,
    kv_lengths: int | Array | None = None,
    segment_ids: Array | tuple[Array, Array] | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    initial_state: LinearState | None = None,
    return_state: bool = False,
) -> Array | tuple[Array, LinearState]:
    r"""
    Linear attention [1]_: a kernel of features in place of the exponential.

    .. math:: o_i = \frac{\phi(q_i)^\top S_i}{\phi(q_i)^\top z_i}, \qquad
              S_i = S_0 + \sum_j \phi(k_j) v_j^\top, \quad z_i = z_0 + \sum_j \phi(k_j)

    over the keys `j` that query `i` sees. Keys are summed up before queries read, so time
    is :math:`O((Nq + Nk)\, Dphi\, Dv)`, and on NumPy the working memory does not grow with
    either length (other libraries copy inputs or output). A query whose weights sum to 0,
    such as one that sees no key, gives 0.

    With `log_decay` :math:`g \le 0` the past fades: key `j` weighs
    :math:`\phi(q_i)^\top (e^{-|G_i - G_j|} \odot \phi(k_j))` where :math:`G` sums `g` up to
    the position. Without `is_causal` that is decay with the distance on both sides.

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating; 2-D arrays mean one head and no batch.
    k : array, shape (..., Hkv, Nk, D)
        Keys; `Hq` is a multiple of `Hkv`, and query head `h` reads key head
        ``h // (Hq // Hkv)``. Leading axes broadcast.
    v : array, shape (..., Hkv, Nk, Dv)
        Values. They may have a multiple `Hv` of the heads of `k`: value head `h` then stands
        under key head ``h // (Hv // Hkv)``, `Hq` divides `Hv` or is a multiple of it, and the
        output has the larger of `Hq` and `Hv` heads. State and `log_decay` have `Hv` heads.
    feature_map : FeatureMap, callable or None, default: elu_plus_one
        :math:`\phi`, one of `arrattn.feature_maps` or a function ``phi(x) -> features``
        for queries and keys alike; None is the identity.
    log_decay : array, shape (..., Hkv, Nk) or (..., Hkv, Nk, Dphi), optional
        Natural logarithm of what is left of the past when token `j` comes, at most 0, for
        each token or each of its features. The latter broadcasts: ``(Hkv, 1, 1)`` is a
        constant for each head, ``(..., Hkv, Nk, 1)`` one number for each token. A token that
        is not there lets no time pass.
    is_causal : bool, default: False
        Each query sees the keys up to its own position, ``i + Nk - Nq``, or
        ``i + kv_lengths - Nq``.
    key_mask : array of bool, shape (..., Nk), optional
        True where a key is there; batch axes, not heads.
    kv_lengths : int or array of int, optional
        Only keys ``j < kv_lengths`` are there; an array has the batch axes.
    segment_ids : array of int (..., N), or pair (q_ids, k_ids), optional
        A query sees only keys of its own segment; ids may come in any order.
    normalize : bool, default: True
        Divide by the sum of the weights; otherwise the weights are
        ``scale * phi(q) . phi(k)`` as they stand.
    scale : float, default: 1.0
        Factor of the weights; it matters only without `normalize`.
    initial_state : LinearState, optional
        What earlier tokens left, ``S (..., Hkv, Dphi, Dv)`` and ``z (..., Hkv, Dphi)`` in
        the accumulation dtype. Every query sees it, whatever its position and segment. With
        `log_decay` it fades like a key before the first, and does not go with `segment_ids`.
    return_state : bool, default: False
        Also return the state for the tokens that follow.

    Returns
    -------
    out : array, shape (..., Hq, Nq, Dv)
        Same namespace, device and dtype as `q`; lazy if the inputs are.
    state : LinearState
        Only with `return_state`: the initial state plus every key that is there, of
        whatever segment. Without head axes where q, k and v have none.

    Raises
    ------
    TypeError
        If inputs mix array libraries or devices, or are not of the kinds above.
    ValueError
        If shapes disagree, a number is out of range, a decay is above 0, or segments would
        cut a state that decays.

    See Also
    --------
    delta_attention : A memory that corrects itself instead of adding up.
    arrattn.feature_maps : Feature maps, and the kernel that each stands for.
    arrattn.reference.linear_attention : The defining equation, over all pairs.
    arrattn.reference.linear_steps : The same, one token after the other.

    Notes
    -----
    Causal attention goes in chunks: pairs within a chunk directly, earlier chunks through
    the state [2]_. Segments and per-item lengths are sorted into one sequence first.
    Sums are taken in at least float32.

    Decay by head is that of RetNet [3]_, by token that of Mamba-2 [4]_, by feature that of
    gated linear attention [5]_. Its logarithms are summed over the tokens between a key and a
    query, so that neither fast nor slow decay is lost beside the other.

    References
    ----------
    .. [1] Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236.
    .. [2] Hua et al., Transformer quality in linear time, 2022, arXiv:2202.10447.
    .. [3] Sun et al., Retentive network, 2023, arXiv:2307.08621.
    .. [4] Dao & Gu, Transformers are SSMs, 2024, arXiv:2405.21060.
    .. [5] Yang et al., Gated linear attention transformers, 2023, arXiv:2312.06635.

    Examples
    --------
    Equal weights average the values so far; the state carries on where a call ended:

    >>> import numpy as np
    >>> from arrattn import linear_attention
    >>> x, v = np.zeros((4, 2)), np.asarray([[0.0], [2.0], [4.0], [10.0]])
    >>> out, state = linear_attention(x[:3], x[:3], v[:3], is_causal=True, return_state=True)
    >>> out[:, 0]
    array([0., 1., 2.])
    >>> linear_attention(x[3:], x[3:], v[3:], is_causal=True, initial_state=state)[:, 0]
    array([4.])

    What is older weighs less, here by half for each step:

    >>> half = np.full((1, 1), np.log(0.5))
    >>> linear_attention(x, x, v, is_causal=True, normalize=False, log_decay=half)[:, 0] / 2
    array([ 0. ,  2. ,  5. , 12.5])
    """
    x, how, operands = read_call(
        q,
        k,
        v,
        feature_map=feature_map,
        log_decay=log_decay,
        is_causal=is_causal,
        key_mask=key_mask,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        normalize=normalize,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
    )
    out, state = attend(x, how, operands)
    out = x.xp.astype(out, q.dtype, copy=False)  # placed features have no other dtype
    return (out, state) if return_state else out


def attend(
    x: inputs.LinearInputs, how: recurrence.How, operands: recurrence.Operands
) -> tuple[Array, LinearState]:
    """Do a call that has been read."""
    if operands.log_decay is None:
        out, S, z = recurrence.attend(how, operands)
    else:
        out, S, z = recurrence.attend(how, operands, gated.run, together=True)
    S, z = x.join_heads(S, 2), x.join_heads(z, 1)
    state = LinearState(S[..., 0, :, :], z[..., 0, :]) if x.no_head else LinearState(S, z)
    return x.ungroup(out), state


def read_call(
    q: Array, k: Array, v: Array, *, growing: bool = False, **options: Any
) -> tuple[inputs.LinearInputs, recurrence.How, recurrence.Operands]:
    """
    Check the arguments, and lay out what the recurrence does with them.

    `growing` allows a `log_decay` above 0.
    """
    function = "linear_attention"
    x = inputs.read_linear(function, q, k, v, **options)
    phi = read_map(options["feature_map"])
    if phi.positional:
        x, phi = _placed(x, phi), identity
    how = recurrence.How(
        xp=x.xp,
        feature_map=phi,
        is_causal=bool(options["is_causal"]),
        normalize=bool(options["normalize"]),
        scale=x.scale,
        batch=x.batch,
        acc=x.acc,
        same_ids=x.q_ids is not None and x.q_ids is x.k_ids,
        chunk=recurrence.CHUNK if options["log_decay"] is None else gated.CHUNK,
    )
    if options["log_decay"] is not None:
        width = recurrence.features_of(phi, x.k, x.acc, x.xp).phi.shape[-1]
        x = inputs.with_decay(x, options["log_decay"], width, function, growing=growing)
    return x, how, _operands(x, phi, function, padded=options["key_mask"] is not None)


def _placed(x: inputs.LinearInputs, phi: FeatureMap) -> inputs.LinearInputs:
    """Features in the place of queries and keys, for a map that asks where they are."""
    xp, (nq, nk) = x.xp, (x.q.shape[-2], x.k.shape[-2])
    on = loops.device_of(x.q)
    last = nk if x.kv_lengths is None else x.kv_lengths
    if not isinstance(last, int):
        last = xp.reshape(last, (*last.shape, 1, 1, 1))  # beside heads, groups and queries
    p, j = xp.arange(nq, device=on) + (last - nq), xp.arange(nk, device=on)
    at: Any = phi  # only these maps take positions
    q = at.phi_q(xp.astype(x.q, x.acc), xp, positions=p).phi
    return x._replace(q=q, k=at.phi_k(xp.astype(x.k, x.acc), xp, positions=j).phi)


def _operands(
    x: inputs.LinearInputs, phi: FeatureMap, function: str, *, padded: bool
) -> recurrence.Operands:
    """Check a state against the number of features, and lay out the arrays."""
    state, weights = x.state, phi.weights(x.xp.astype(x.k[..., :0, :], x.acc), x.xp)
    if state is not None:
        dphi = recurrence.features_of(phi, x.k, x.acc, x.xp, weights).phi.shape[-1]
        heads = () if x.no_head else (x.value_heads,)
        lead = (*x.outer, *heads, dphi)
        inputs.read_state(state, ((*lead, x.v.shape[-1]), lead), x.acc, function)
        full = len(x.outer) + 2
        S, z = inputs.lead_with_ones(state.S, full + 1), inputs.lead_with_ones(state.z, full)
        x = x._replace(state=LinearState(x.split_heads(S, 2), x.split_heads(z, 1)))
    return lay_out(x, weights, padded=padded)


def lay_out(x: inputs.LinearInputs, weights: Array | None, *, padded: bool) -> recurrence.Operands:
    """The arrays for the recurrence; a length that is a number cuts the keys."""
    operands = recurrence.Operands(
        q=x.q,
        k=x.k,
        v=x.v,
        key_mask=x.key_mask,
        q_ids=x.q_ids,
        k_ids=x.k_ids,
        lengths=None,
        state=x.state,
        weights=weights,
        log_decay=x.log_decay,
        beta=x.beta,
    )
    if x.kv_lengths is None:
        return operands
    if not isinstance(x.kv_lengths, int):
        return operands._replace(lengths=x.kv_lengths)
    operands = operands.keys(0, x.kv_lengths)
    return operands if padded else operands._replace(key_mask=None)
