"""What a law is, and how it joins the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

from arrattn.testing.subject import FAMILIES, Subject

__all__ = ["ALL", "LAWS", "MEANS", "SOFTMAX", "Law", "law"]

ALL = FAMILIES
SOFTMAX = ("dense", "local", "sparse")
#: Where the output is a mean of the visible values.
MEANS = (*SOFTMAX, "linear")

Needs = tuple[str, ...] | Callable[[Subject], tuple[str, ...]]


@dataclass(frozen=True)
class Law:
    """
    Something that holds for every attention of some families.

    Parameters
    ----------
    name : str
        Words joined by hyphens.
    statement : str
        What holds, in mathematics.
    source : str
        The rule of the contract, or the paper, that it comes from.
    families : tuple of str
        For which of dense, local, sparse, linear and delta.
    group : str
        What it is about.
    needs : tuple of str, or callable
        Arguments and capabilities without which it cannot be asked.
    choice : str
        The documented choice, of `arrattn.testing.subject.CHOICES`, that it is about.
    given : callable
        ``given(subject)``, the strategy of its examples.
    check : callable
        ``check(run, *example)``, which raises `BrokenLawError`.
    most : int or None
        How many examples are enough.
    """

    name: str
    statement: str
    source: str
    families: tuple[str, ...]
    group: str
    needs: Needs
    choice: str
    given: Callable[[Subject], SearchStrategy[Any]]
    check: Callable[..., None]
    most: int | None = None

    def missing(self, subject: Subject) -> str | None:
        """
        Say why a function cannot be asked.

        Parameters
        ----------
        subject : Subject
            The function.

        Returns
        -------
        str or None
            The reason.
        """
        if subject.family not in self.families:
            return f"a law of {', '.join(self.families)} attention"
        needs = self.needs(subject) if callable(self.needs) else self.needs
        for name in needs:
            if name == "half" and not subject.half:
                return "no dtype of 16 bits is checked"
            if name == "float64" and "float64" not in subject.dtypes:
                return "float64 is not checked"
            if name == "gradients" and not subject.library.differentiates:
                return f"{subject.library.name} takes no gradients"
            if name == "memory" and not subject.library.traced:
                return f"memory of {subject.library.name} arrays is not traced"
            if name == "visibility" and not sights(subject):
                return "it has no argument about visibility"
            if not subject.can(name):
                return subject.lacks[name]
        return None


LAWS: dict[str, Law] = {}


def law(
    name: str,
    statement: str,
    *,
    source: str,
    given: Callable[[Subject], SearchStrategy[Any]],
    families: tuple[str, ...] = ALL,
    needs: Needs = (),
    choice: str = "",
    most: int | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Register a function as the check of a law.

    Parameters
    ----------
    name, statement, source, given, families, needs, choice, most : object
        As of `Law`.

    Returns
    -------
    callable
        The decorator.
    """

    def register(check: Callable[..., None]) -> Callable[..., None]:
        group = check.__module__.rpartition(".")[2]
        LAWS[name] = Law(
            name, statement, source, families, group, needs, choice, given, check, most
        )
        return check

    return register


def sights(subject: Subject) -> list[str]:
    """The arguments about visibility that a function has."""
    from arrattn.testing.strategies import VISIBILITY

    return [name for name in VISIBILITY[subject.family] if subject.can(name)]
