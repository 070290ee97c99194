"""Wrong attentions, each a mistake that people really make, and the laws that catch them."""

from museum import (
    choices,
    features,
    gradients,
    heads,
    hidden,
    memory,
    parts,
    scores,
    tiles,
    visibility,
    windows,
)
from museum.exhibit import EXHIBITS, Exhibit
from museum.right import Dense, Local, Sparse
from museum.right_delta import Delta
from museum.right_linear import Linear

#: The right implementation of each family.
RIGHT = {
    "dense": Dense(),
    "local": Local(),
    "sparse": Sparse(),
    "linear": Linear(),
    "delta": Delta(),
}

__all__ = ["EXHIBITS", "RIGHT", "Exhibit"]
del choices, features, gradients, heads, hidden, memory, parts, scores, tiles, visibility, windows
