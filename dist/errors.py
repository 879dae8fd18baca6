"""Errors that teach: every message a user can cause states the value, what was expected, and the remedy.

`UserError` is for what users typed, configured or own (paths, degrees, files); the command line prints it as one line
and exits with its code. Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from typing import Any


class UndertowError(Exception):
    """Base of all errors this package raises on purpose."""

    exit_code = 2

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without a second `__init__`, whose arguments are not the message; ranks send errors to parents."""
        return _rebuild, (type(self), self.args, self.__dict__)


class UserError(UndertowError):
    """A value the user can change. `problem` names the value; `expected` and `remedy` complete the sentence."""

    def __init__(self, problem: str, *, expected: str = "", remedy: str = "") -> None:
        self.problem, self.expected, self.remedy = problem, expected, remedy
        parts = [problem]
        if expected:
            parts.append(f"expected {expected}")
        if remedy:
            parts.append(f"to mend it: {remedy}")
        super().__init__("; ".join(parts))


class MissingPackage(UserError):
    """An optional package is not installed; names the extra that brings it."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"the package '{package}' is not installed, and {needed_for} needs it",
            remedy=f"pip install 'undertow[{extra}]'",
        )


class PeerLost(UndertowError):
    """Another rank died or did not answer in time; the message names it where that is known."""

    exit_code = 3


def _rebuild(cls: type[UndertowError], args: tuple[Any, ...], state: dict[str, Any]) -> UndertowError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error
