"""The loop that the rule programs share: all ranks run each rule, and one that breaks a rule ends the job."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence

from mpi4py import MPI


def keep(rules: Sequence[Callable[[], None]], names: Sequence[str] = (), note: str = "") -> None:
    """Run the rules (only those in `names`, if any); rank 0 prints "kept NAME" after each, "ok N note" at the end."""
    comm = MPI.COMM_WORLD
    for rule in rules:
        if names and rule.__name__ not in names:
            continue
        comm.Barrier()
        try:
            rule()
        except BaseException as error:
            sys.stderr.write(f"rank {comm.rank}: {rule.__name__}: {type(error).__name__}: {error}\n")
            traceback.print_exc()
            sys.stderr.flush()
            comm.Abort(1)
        if comm.rank == 0:
            print("kept", rule.__name__)
    comm.Barrier()
    if comm.rank == 0:
        print("ok", len(rules), note)
