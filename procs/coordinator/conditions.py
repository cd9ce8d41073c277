"""What must be true before the engine starts. A condition says what it waits for, or nothing when it is met."""

from collections.abc import Callable, Sequence

Condition = Callable[[], str | None]
"""What is waited for, in an operator's words; None when the condition is met."""


def waiting_for(conditions: Sequence[Condition]) -> str:
    """The first unmet condition's words; empty when the engine may start."""
    return next((unmet for condition in conditions if (unmet := condition())), "")
