"""Errors: the message holds value, expectation and remedy, and survives the trip between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from undertow.dist.errors import MissingPackage, PeerLost, UndertowError, UserError


class Sub(UserError):
    """A subclass with an `__init__` of its own, as other rooms write them."""

    def __init__(self, path: str, *, step: int) -> None:
        super().__init__(f"no {path}", expected="a file")
        self.path, self.step = path, step


@pytest.mark.parametrize(
    "error",
    [
        UserError("degree 3", expected="a divisor of 8", remedy="set 2"),
        UserError("only a problem"),
        MissingPackage("mpi4py", extra="mpi", needed_for="the MPI probe"),
        PeerLost("rank 3 is gone"),
        Sub("p", step=4),
        UndertowError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickle_and_copy(error):
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error) and twin.args == error.args and twin.__dict__ == error.__dict__
        assert twin.exit_code == error.exit_code


def test_the_message_is_one_line_with_all_three_parts():
    error = UserError("degree 3", expected="a divisor of 8", remedy="set 2")
    assert str(error) == "degree 3; expected a divisor of 8; to mend it: set 2"
    assert "undertow[mpi]" in str(MissingPackage("mpi4py", extra="mpi", needed_for="x"))
