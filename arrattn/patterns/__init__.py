"""
Who may see whom: small objects that combine with ``&``, ``|`` and ``~``.

A pattern is a statement about a query's position `p` and a key's position `j`; no (Nq, Nk)
array stands behind it. Each answers two questions: is this pair visible, and is this
rectangle of pairs empty, full or in between. The second is what lets an attention skip
tiles, and it may be cautious ("in between" is always a right answer); the first is exact.

Longformer is ``Window(w, w) | Global(g)`` [1]_, a streaming window with sinks is
``Causal() & (Window(w, 0) | Global(4))`` [2]_, packed documents are
``Causal() & Segments(ids, ids)``.

References
----------
.. [1] Beltagy et al., Longformer, 2020, arXiv:2004.05150.
.. [2] Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
   arXiv:2309.17453.
"""

from arrattn.patterns._arrays import Blocks, Segments, Where
from arrattn.patterns._arrays import Masked as Masked
from arrattn.patterns._arrays import Unforbidden as Unforbidden
from arrattn.patterns._base import FAR as FAR
from arrattn.patterns._base import NO_EDGES as NO_EDGES
from arrattn.patterns._base import And as And
from arrattn.patterns._base import Edges as Edges
from arrattn.patterns._base import Not as Not
from arrattn.patterns._base import Or as Or
from arrattn.patterns._base import Pattern
from arrattn.patterns._base import Rectangles as Rectangles
from arrattn.patterns._positions import Causal, Global, Prefix, Window
from arrattn.patterns._random import Random
from arrattn.patterns._regular import Dilated, Fixed, Strided
from arrattn.patterns._regular import OwnBlock as OwnBlock
from arrattn.patterns._tree import apart as apart
from arrattn.patterns._tree import attach as attach
from arrattn.patterns._tree import both as both
from arrattn.patterns._tree import detach as detach
from arrattn.patterns._tree import pick as pick
from arrattn.patterns._tree import within as within
from arrattn.patterns._tree import within_prefix as within_prefix

__all__ = [
    "Blocks",
    "Causal",
    "Dilated",
    "Fixed",
    "Global",
    "Pattern",
    "Prefix",
    "Random",
    "Segments",
    "Strided",
    "Where",
    "Window",
]

# They are known, printed and pickled by their public names.
for _name in __all__:
    globals()[_name].__module__ = __name__
