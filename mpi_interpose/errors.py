"""This room's one error: a sentence with the value and the remedy; the command line prints it and exits 2."""

from __future__ import annotations


class InterposeError(Exception):
    """Something the user can change: a missing compiler, an unknown MPI, a bad option."""

    exit_code = 2
