"""
Efficient attention for any array.

Attention algorithms written once against the Python array API standard: whatever kind of
array goes in, the same kind comes out. Four families: dense, local, sparse and linear.
"""

from arrattn import adapters, feature_maps, patterns, reference
from arrattn._state import DeltaState, LinearState
from arrattn.delta import delta_attention
from arrattn.dense import attention
from arrattn.explain import explain
from arrattn.linear import linear_attention
from arrattn.local import local_attention
from arrattn.merge import merge
from arrattn.sparse import sparse_attention
from arrattn.threads import get_num_threads, set_num_threads

__all__ = [
    "DeltaState",
    "LinearState",
    "__version__",
    "adapters",
    "attention",
    "delta_attention",
    "explain",
    "feature_maps",
    "get_num_threads",
    "linear_attention",
    "local_attention",
    "merge",
    "patterns",
    "reference",
    "set_num_threads",
    "sparse_attention",
]

__version__ = "0.1.0"
