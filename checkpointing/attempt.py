"""One try to save, numbered alike on all ranks whatever has become of those before it.

What ranks tell each other about a save bears its number, so that a rank that gives one up (its user's `state_dict()`
raised, or its memory is full) is in step with the others at the next. It leaves word wherever they may wait for it: at
the meetings that make a plan and its memory, at the claim of a generation, and at the votes (`Tiers.refuse`). One whose
state has kept its shape does not come to the meeting of one whose state has not, and says so (`kept`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..dist.errors import PeerLost

MEETINGS = ("plan", "staging", "host", "arena")  # where all ranks do something together, or none
CLAIMS = ("claim", "again")  # where rank 0 says which generation of memory a save gets; again, if not before the state
ANEW = "all ranks plan anew at the next save"


@dataclass(frozen=True)
class Attempt:
    """The `number`-th try, of `step`, into `tiers` by name; it began at the monotonic time `began_s`. `metrics` are
    stored with the checkpoint. `rising`: no try before it was of this step or a later one."""

    number: int
    step: int
    tiers: tuple[str, ...]
    began_s: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    rising: bool = False

    @property
    def name(self) -> str:
        return f"attempt/{self.number}"

    def without(self, tier: str) -> Attempt:
        """The same, less one tier."""
        return replace(self, tiers=tuple(other for other in self.tiers if other != tier))

    def at(self, meeting: str) -> str:
        """The name under which ranks meet: one of `MEETINGS` or of `CLAIMS`."""
        return f"{self.name}/{meeting}"


class SaveLost(RuntimeError):
    """A save that is lost for a reason already in words, the rank's and the error's type among them."""


class Refused(SaveLost):
    """On another rank, by the verdict of rank 0, which says the same there."""


def reason_of(error: BaseException) -> str:
    """Why a save is lost, for its report: an error's type and text, or what other ranks have put in words."""
    return str(error) if isinstance(error, (SaveLost, PeerLost)) else f"{type(error).__name__}: {error}"


def kept(rank: int) -> str:
    """Why that rank will not come to make a plan."""
    return f"the state on rank {rank} has kept its shape, so it saves by the plan that it has; {ANEW}"


@contextmanager
def one_save(rank: int) -> Iterator[None]:
    """What the machine refuses inside (memory, space, an operation of the device) costs one save: `PeerLost`."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        raise PeerLost(f"rank {rank}: {type(error).__name__}: {error}") from error
