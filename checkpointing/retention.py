"""Which checkpoints may go: a pure function of the steps that are committed."""

from __future__ import annotations

from collections.abc import Sequence


def to_remove(steps: Sequence[int], keep: int | None) -> list[int]:
    """The steps to remove so that the `keep` newest remain (None keeps all)."""
    return [] if keep is None else sorted(steps)[:-keep]
