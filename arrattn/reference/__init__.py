r"""
The defining equations, written to be read.

Every function of arrattn as its equation: all N x N pairs at once, or one token after
the other, in the array API standard alone and for any array library.
Nothing here is tiled, fused or fast, and nothing is shared with the engines that are;
the tests hold those to this file, usually in float64 under NumPy.

Letters: `...` batch axes, `Hq` query heads, `Hkv` key/value heads, `Nq` queries, `Nk`
keys, `D` key width, `Dv` value width, `Dphi` features, `p` a query's position.
"""

from arrattn.reference._delta import delta_attention, delta_steps
from arrattn.reference._linear import linear_attention, linear_steps
from arrattn.reference._softmax import local_attention, merge, softmax_attention, sparse_attention

__all__ = [
    "delta_attention",
    "delta_steps",
    "linear_attention",
    "linear_steps",
    "local_attention",
    "merge",
    "softmax_attention",
    "sparse_attention",
]
