"""
The one door: what came in, checked once, in the shapes that the engines work on.

Every complaint about a call is written here (patterns and feature maps check themselves when
made).
All reasons that hold are raised together, with the shapes of q, k and v.
"""

from arrattn._core.inputs.arguments import (
    Reasons,
    accumulation_dtype,
    describe,
    dtype_name,
    is_array,
    library_name,
    read_count,
    read_number,
    read_word,
)
from arrattn._core.inputs.calls import Choice, LinearInputs, SoftmaxInputs, query_blocks
from arrattn._core.inputs.linear import (
    lead_with_ones,
    read_delta,
    read_linear,
    read_state,
    with_decay,
)
from arrattn._core.inputs.parts import read_parts
from arrattn._core.inputs.softmax import read_local, read_softmax
from arrattn._core.inputs.sparse import read_sparse

__all__ = [
    "Choice",
    "LinearInputs",
    "Reasons",
    "SoftmaxInputs",
    "accumulation_dtype",
    "describe",
    "dtype_name",
    "is_array",
    "lead_with_ones",
    "library_name",
    "query_blocks",
    "read_count",
    "read_delta",
    "read_linear",
    "read_local",
    "read_number",
    "read_parts",
    "read_softmax",
    "read_sparse",
    "read_state",
    "read_word",
    "with_decay",
]
