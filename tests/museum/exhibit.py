"""What hangs in the museum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

EXHIBITS: list[Exhibit] = []


@dataclass(frozen=True)
class Exhibit:
    """
    One wrong attention.

    Parameters
    ----------
    name : str
        Of the class that gets it wrong.
    family : str
        "dense", "local", "sparse", "linear" or "delta".
    note : str
        What is wrong, and what comes of it.
    seen : str
        Where it was seen: ``owner/repository#number``, or the kind of code.
    attend : callable
        The wrong function, with our own signature.
    library : str
        Whose arrays it takes: "numpy", but where gradients are wrong "torch".
    cost : bool
        Whether its numbers are right, and what it takes to compute them is wrong.
    """

    name: str
    family: str
    note: str
    seen: str
    attend: Callable[..., Any]
    library: str = "numpy"
    cost: bool = False

    def __repr__(self) -> str:
        return f"{self.family}: {self.name}"


def wrong(
    family: str, *, seen: str, library: str = "numpy", cost: bool = False
) -> Callable[[type], type]:
    """Hang up a class; its docstring is the note."""

    def hang(cls: type) -> type:
        note = " ".join((cls.__doc__ or "").split())
        EXHIBITS.append(Exhibit(cls.__name__, family, note, seen, cls(), library, cost))
        return cls

    return hang
