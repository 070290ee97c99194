"""
Laws of attention, to hold any implementation against.

`check` tries a function on drawn examples of every law of its family and reports, for a law
that it breaks, the smallest call found, as Python to paste. `pytest_laws` makes tests of
the same. `LAWS` are the laws by name, `arrattn.testing.strategies` what the examples are
drawn with. It needs the package hypothesis: ``pip install "arrattn[testing]"``.
"""

try:
    import hypothesis  # noqa: F401
except ImportError as error:
    msg = 'arrattn.testing needs the package hypothesis: pip install "arrattn[testing]"'
    raise ImportError(msg) from error

from arrattn.testing.check import Counterexample, Report, Result, check, pytest_laws
from arrattn.testing.laws import LAWS, Law
from arrattn.testing.subject import CAPABILITIES, CHOICES

__all__ = [
    "CAPABILITIES",
    "CHOICES",
    "LAWS",
    "Counterexample",
    "Law",
    "Report",
    "Result",
    "check",
    "pytest_laws",
]
