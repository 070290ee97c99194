"""The state of linear attention: what the keys and values of the past sum up to."""

from typing import Any, NamedTuple

__all__ = ["LinearState"]


class LinearState(NamedTuple):
    r"""
    The sums that linear attention keeps of every key and value it has seen.

    :math:`S = \sum_j \phi(k_j) v_j^\top` and :math:`z = \sum_j \phi(k_j)`, in the
    accumulation dtype (at least float32).
    States of two stretches of keys add up to the state of both.

    Parameters
    ----------
    S : array, shape (..., Hkv, Dphi, Dv)
        The values, gathered under every feature.
    z : array, shape (..., Hkv, Dphi)
        The features themselves, from which the normaliser comes.
    """

    S: Any
    z: Any
