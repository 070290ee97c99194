"""The states of linear and delta attention: what the past has left."""

from typing import Any, NamedTuple

__all__ = ["DeltaState", "LinearState"]


class DeltaState(NamedTuple):
    r"""
    The memory of `delta_attention`: a linear map from keys to the values written under them.

    In the accumulation dtype (at least float32). The memory answers the key `k` with
    :math:`S^\top k`. Two memories do not add up: each write depends on what was there.

    Parameters
    ----------
    S : array, shape (..., Hv, D, Dv)
        The map, one for each value head.
    """

    S: Any


class LinearState(NamedTuple):
    r"""
    The sums that linear attention keeps of every key and value it has seen.

    :math:`S = \sum_j \phi(k_j) v_j^\top` and :math:`z = \sum_j \phi(k_j)`, in the
    accumulation dtype (at least float32).
    States of two stretches of keys add up to the state of both, unless they decay.

    Parameters
    ----------
    S : array, shape (..., Hv, Dphi, Dv)
        The values, gathered under every feature.
    z : array, shape (..., Hv, Dphi)
        The features themselves, from which the normaliser comes.
    """

    S: Any
    z: Any
