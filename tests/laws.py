"""``@for_all``: a law, tried on drawn examples, on every lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis.strategies import SearchStrategy
from lanes import Lane


def for_all(**drawn: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """
    Turn ``law(lane, **drawn)`` into a test over lanes and examples.

    A lane says how many examples it can afford: where every new shape is compiled, few.
    """

    def decorate(law: Callable[..., None]) -> Callable[..., None]:
        def test(lane: Lane) -> None:
            def check(**values: Any) -> None:
                law(lane, **values)

            # Hypothesis derives its draws and its database key from the name.
            check.__name__ = law.__name__
            check.__qualname__ = f"{law.__qualname__}[{lane}]"
            check.__module__ = law.__module__
            profile = settings.default
            phases = [x for x in profile.phases if lane.shrinks or x != Phase.shrink]
            examples = min(lane.examples, profile.max_examples)
            settings(max_examples=examples, phases=phases)(given(**drawn)(check))()

        test.__name__, test.__qualname__ = law.__name__, law.__qualname__
        test.__module__, test.__doc__ = law.__module__, law.__doc__
        test.pytestmark = getattr(law, "pytestmark", [])  # type: ignore[attr-defined]
        return test

    return decorate
