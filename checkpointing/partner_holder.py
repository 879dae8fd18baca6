"""The way in: what this rank holds for the ranks whose partner it is, and what it hands out to a restore.

Called on the threads of the `Server`'s connections. A copy that arrives damaged, or for which there is no room any
more, is read to its end and refused when the sender asks, so that the connection stays good.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..dist.units import format_bytes
from .generation import REMOVED, still_there
from .manifest import COMMIT, MANIFEST, SAFE_NAME, checksum
from .partner_memory import OPS, Held, PartnerMemory, invalidate, seal
from .partner_wire import Head, Wire

Room = tuple[int, int, int]  # whose, of which plan, which slot
BOUNCE = 1 << 20


@dataclass
class _Copy:
    """What is arriving from one rank."""

    held: Held
    head: Head
    problem: str = ""


class Holder:
    """Receives into `rooms` and reads from `memory`."""

    memory: PartnerMemory

    def __init__(self) -> None:
        self.rooms: dict[Room, Held] = {}
        self._copies: dict[int, _Copy | None] = {}

    def handle(self, rank: int, wire: Wire, head: Head) -> None:
        """Act upon one line of `rank`. `OSError` and `ValueError` end the connection."""
        act = {"begin": self._begin, "chunk": self._chunk, "file": self._file, "seal": self._seal, "sync": self._sync}
        if head["do"] == "read":
            self._read(wire, head)
        else:
            act[head["do"]](rank, wire, head)

    def _begin(self, rank: int, wire: Wire, head: Head) -> None:
        held = self.rooms.get((rank, head["plan"], head["slot"]))
        self._copies[rank] = None
        if held is not None:
            invalidate(held.path)
            problem = "" if held.nbytes == head["nbytes"] else f"it has room for {format_bytes(held.nbytes)}"
            self._copies[rank] = _Copy(held, head, problem)

    def _chunk(self, rank: int, wire: Wire, head: Head) -> None:
        copy, begin, nbytes = self._copies.get(rank), int(head["begin"]), int(head["nbytes"])
        if copy is None or copy.problem:
            self._drain(wire, nbytes)
            return
        with copy.held.view(begin, nbytes) as view:
            wire.fill(view)
            if checksum(view) != head["sum"]:
                copy.problem = f"bytes [{begin}, {begin + nbytes}) arrived damaged"

    def _file(self, rank: int, wire: Wire, head: Head) -> None:
        copy, name, nbytes = self._copies.get(rank), str(head["name"]), int(head["nbytes"])
        if copy is None or copy.problem:
            self._drain(wire, nbytes)
            return
        data = bytearray(nbytes)
        with memoryview(data) as view:
            wire.fill(view)
        if checksum(data) != head["sum"] or not (SAFE_NAME.fullmatch(name) or name in (MANIFEST, COMMIT)):
            copy.problem = f"the file {name!r} arrived damaged"
            return
        self._act(copy, lambda: OPS.write_file(copy.held.path / name, bytes(data)))

    def _seal(self, rank: int, wire: Wire, head: Head) -> None:
        copy = self._copies.get(rank)
        if copy is not None and not copy.problem:
            what = (str(copy.head["save"]), int(copy.head["step"]), int(copy.head["number"]))
            self._act(copy, lambda: (still_there(copy.held.file), seal(copy.held.path, *what)))
        self._sync(rank, wire, head)

    def _sync(self, rank: int, wire: Wire, head: Head) -> None:
        copy = self._copies.get(rank)
        problem = "it has no room for this copy" if copy is None else copy.problem
        wire.send({"problem": problem} if problem else {})

    @staticmethod
    def _act(copy: _Copy, act: Any) -> None:
        try:
            act()
        except FileNotFoundError:  # its folder, or the shard in it
            copy.problem = f"{copy.held.file} {REMOVED}"
        except OSError as error:
            copy.problem = f"{type(error).__name__}: {error}"

    @staticmethod
    def _drain(wire: Wire, nbytes: int) -> None:
        bounce = bytearray(min(nbytes, BOUNCE))
        with memoryview(bounce) as view:
            while nbytes:
                with view[: min(nbytes, BOUNCE)] as part:
                    wire.fill(part)
                    nbytes -= len(part)

    def _read(self, wire: Wire, head: Head) -> None:
        nbytes = int(head["nbytes"])
        try:
            data = read(self.memory, str(head["entry"]), str(head["file"]), int(head["begin"]), nbytes)
        except (OSError, ValueError) as error:
            wire.send({"problem": f"{type(error).__name__}: {error}"})
            return
        wire.send({"nbytes": len(data)}, data)


def read(memory: PartnerMemory, entry: str, file: str, begin: int, nbytes: int) -> bytes:
    """Bytes of a file in this machine's memory; fewer where it ends. `OSError`, `ValueError` where there is none."""
    handle = os.open(memory.path(entry, file), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.pread(handle, nbytes, begin)
    finally:
        os.close(handle)
