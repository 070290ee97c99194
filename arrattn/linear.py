"""Linear attention: time and memory that grow with the number of tokens, not of pairs."""

from __future__ import annotations

from typing import Any

from arrattn._core import inputs, loops, recurrence
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

    Parameters
    ----------
    q : array, shape (..., Hq, Nq, D)
        Queries, real floating; 2-D arrays mean one head and no batch.
    k : array, shape (..., Hkv, Nk, D)
        Keys; `Hq` is a multiple of `Hkv`, and query head `h` reads key head
        ``h // (Hq // Hkv)``. Leading axes broadcast.
    v : array, shape (..., Hkv, Nk, Dv)
        Values.
    feature_map : FeatureMap, callable or None, default: elu_plus_one
        :math:`\phi`, one of `arrattn.feature_maps` or a function ``phi(x) -> features``
        for queries and keys alike; None is the identity.
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
        the accumulation dtype. Every query sees it, whatever its position and segment.
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
        If shapes disagree, or a number is out of range.

    See Also
    --------
    arrattn.feature_maps : Feature maps, and the kernel that each stands for.
    arrattn.reference.linear_attention : The defining equation, over all pairs.
    arrattn.reference.linear_steps : The same, one token after the other.

    Notes
    -----
    Causal attention goes in chunks: pairs within a chunk directly, earlier chunks through
    the state [2]_. Segments and per-item lengths are sorted into one sequence first.
    Sums are taken in at least float32.

    References
    ----------
    .. [1] Katharopoulos et al., Transformers are RNNs, 2020, arXiv:2006.16236.
    .. [2] Hua et al., Transformer quality in linear time, 2022, arXiv:2202.10447.

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
    """
    x, how, operands = read_call(
        q,
        k,
        v,
        feature_map=feature_map,
        is_causal=is_causal,
        key_mask=key_mask,
        kv_lengths=kv_lengths,
        segment_ids=segment_ids,
        normalize=normalize,
        scale=scale,
        initial_state=initial_state,
        return_state=return_state,
    )
    out, S, z = recurrence.attend(how, operands)
    out = x.xp.astype(x.ungroup(out), q.dtype, copy=False)
    if not return_state:
        return out
    return out, LinearState(S[..., 0, :, :], z[..., 0, :]) if x.no_head else LinearState(S, z)


def read_call(
    q: Array, k: Array, v: Array, **options: Any
) -> tuple[inputs.LinearInputs, recurrence.How, recurrence.Operands]:
    """Check the arguments, and lay out what the recurrence does with them."""
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
        chunk=recurrence.CHUNK,
    )
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
    """Lay out the arrays for the recurrence; a length that is a number cuts the keys."""
    state = x.state
    weights = phi.weights(x.xp.astype(x.k[..., :0, :], x.acc), x.xp)
    if state is not None:
        f = recurrence.features_of(phi, x.k, x.acc, x.xp, weights)
        hkv, dphi = x.k.shape[-3], f.phi.shape[-1]
        heads = () if x.no_head else (hkv,)
        lead = (*x.batch, *heads, dphi)
        inputs.read_state(state, ((*lead, x.v.shape[-1]), lead), x.acc, function)
        if x.no_head:
            state = LinearState(state.S[None, ...], state.z[None, ...])
    operands = recurrence.Operands(
        q=x.q,
        k=x.k,
        v=x.v,
        key_mask=x.key_mask,
        q_ids=x.q_ids,
        k_ids=x.k_ids,
        lengths=None,
        state=state,
        weights=weights,
    )
    if x.kv_lengths is None:
        return operands
    if not isinstance(x.kv_lengths, int):
        return operands._replace(lengths=x.kv_lengths)
    operands = operands.keys(0, x.kv_lengths)
    return operands if padded else operands._replace(key_mask=None)
