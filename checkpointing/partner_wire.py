"""How a shard reaches its partner's memory and comes back: one TCP connection, lines of JSON, and bytes after them.

Plain sockets, so that neither the training's communicator nor its threads are touched, whatever the backend. Payloads
go from the sender's mapped memory to the kernel and from the kernel into the receiver's, without another buffer. Every
payload bears its checksum, which the receiver computes again: a copy counts only when it has arrived. A receiver that
cannot take something reads on, and says why when it is asked.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..dist.errors import PeerLost

Head = dict[str, Any]
LINE = 1 << 16  # longest line of JSON
LATER_S = 0.05
_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child, a data loader's worker for example, must not hold its parent's connections open."""
    for peer in list(_OPEN):
        with suppress(OSError):
            os.close(peer.detach())


os.register_at_fork(after_in_child=_close_in_child)


class Wire:
    """One end of a connection. Blocking: one system call moves a payload, and no lock of Python is held meanwhile."""

    def __init__(self, peer: socket.socket, *, patience_s: float) -> None:
        peer.settimeout(None)
        pause = struct.pack("ll", int(patience_s), int(patience_s % 1 * 1e6) or 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, pause)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peer, self._rest, self._pause = peer, b"", pause
        _OPEN.add(peer)

    def hurry(self, now: bool = True) -> None:
        """From now on receiving gives up as sending does (an answer is due), or no more."""
        self._peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, self._pause if now else struct.pack("ll", 0, 0))

    def send(self, head: Head, payload: Any = b"") -> None:
        line = json.dumps(head).encode() + b"\n"
        if not len(payload):
            self._peer.sendall(line)
            return
        sent = self._peer.sendmsg([line, payload])  # in one call, which is all there is most of the time
        if sent < len(line):
            self._peer.sendall(line[sent:])
        done = max(0, sent - len(line))
        if done < len(payload):
            with memoryview(payload) as view:
                self._peer.sendall(view[done:])

    def head(self) -> Head | None:
        """The next line; None when the other end has closed."""
        while b"\n" not in self._rest:
            data = self._peer.recv(4096)
            if not data:
                return None
            self._rest += data
            if len(self._rest) > LINE:
                raise OSError("no line of ours")
        line, self._rest = self._rest.split(b"\n", 1)
        head = json.loads(line)
        if not isinstance(head, dict):
            raise OSError("no line of ours")
        return head

    def fill(self, view: memoryview) -> None:
        """The next bytes, into all of `view`."""
        begun = min(len(self._rest), len(view))
        view[:begun] = self._rest[:begun]
        self._rest = self._rest[begun:]
        while begun < len(view):
            count = self._peer.recv_into(view[begun:], flags=socket.MSG_WAITALL)
            if not count:
                raise OSError("the other end has closed in the middle of a payload")
            begun += count

    def close(self) -> None:
        with suppress(OSError):
            self._peer.shutdown(socket.SHUT_RDWR)
        self._peer.close()


class Link:
    """From this rank to one other's `Server`; connected when first used, and again after an error. One thread."""

    def __init__(self, rank: int, address: str, port: int, secret: str, *, purpose: str, timeout_s: float) -> None:
        self._to, self._hello = (address, port), {"secret": secret, "rank": rank, "purpose": purpose}
        self._timeout_s, self._wire, self._deadline_s = timeout_s, None, 0.0

    def start(self) -> None:
        """Connect, if need be; from now the time-out runs. `PeerLost` when nobody answers."""
        self._deadline_s = time.monotonic() + self._timeout_s
        if self._wire is None:
            with self._lost():
                peer = socket.create_connection(self._to, timeout=self._timeout_s)
                self._wire = Wire(peer, patience_s=self._timeout_s)
                self._wire.hurry()
                self._wire.send(self._hello)
                self._answer()

    def tell(self, head: Head, payload: Any = b"") -> None:
        """Send without waiting for an answer."""
        with self._lost():
            if time.monotonic() > self._deadline_s:
                raise TimeoutError
            assert self._wire is not None, "start() comes first"
            self._wire.send(head, payload)

    def ask(self, head: Head) -> Head:
        """Send and wait for the answer. `PeerLost` bears the other end's reason against what it was told."""
        self.tell(head)
        with self._lost():
            return self._answer()

    def read(self, head: Head, view: memoryview) -> None:
        """Ask for bytes, and receive them into `view`."""
        self.tell(head)
        with self._lost():
            assert self._wire is not None
            if self._answer()["nbytes"] != len(view):
                raise OSError(f"it has not the {len(view)} bytes that were asked for")
            self._wire.fill(view)

    def _answer(self) -> Head:
        assert self._wire is not None
        if (head := self._wire.head()) is None:
            raise OSError("it has closed the connection")
        if "problem" in head:
            raise _Refused(head["problem"])
        return head

    def _lost(self) -> _Lost:
        return _Lost(self)

    def close(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()

    def __str__(self) -> str:
        return f"{self._to[0]}:{self._to[1]}"


class _Refused(Exception):
    """What the other end says against something; the connection is as good as before."""


class _Lost:
    """Inside, whatever goes wrong becomes a `PeerLost`, and the connection is given up but for a plain refusal."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, _Refused):
            raise PeerLost(f"the partner at {self._link} refuses: {error}") from error
        if isinstance(error, (OSError, ValueError, KeyError)):
            self._link.close()
            late = isinstance(error, (TimeoutError, BlockingIOError))
            why = "is too slow" if late else f"is lost ({type(error).__name__}: {error})"
            raise PeerLost(f"the partner at {self._link} {why}") from error


Handler = Callable[[int, Wire, Head], None]  # (rank, wire, head): act upon one line, and read what follows it


class Server:
    """Listens for the other ranks, who know the `secret`. `handle(rank, wire, head)` is called on a thread of each
    connection. Of two connections for sending from one rank the older is ended first."""

    def __init__(self, address: str, secret: Callable[[], str], handle: Handler) -> None:
        self._socket = socket.create_server((address if address.startswith("127.") else "", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._secret, self._handle = secret, handle
        self._wires: dict[Wire, threading.Thread] = {}
        self._senders: dict[int, tuple[Wire, threading.Thread]] = {}
        self._lock, self._closing = threading.Lock(), False
        _OPEN.add(self._socket)
        self._thread = threading.Thread(target=self._accept, name="undertow-partner", daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                peer, _ = self._socket.accept()
                wire = Wire(peer, patience_s=60.0)
            except OSError:  # the caller has gone already, or this process has no handle left: later, perhaps
                time.sleep(LATER_S)
                continue
            thread = threading.Thread(target=self._serve, args=(wire,), name="undertow-partner-copy", daemon=True)
            with self._lock:
                self._wires[wire] = thread
            thread.start()

    def _serve(self, wire: Wire) -> None:
        # an end is no event: the copy that was under way never becomes valid, and the sender knows
        with suppress(OSError, ValueError, KeyError, TypeError):
            wire.hurry()
            hello, secret = wire.head(), self._secret()
            if hello is not None and secret and hmac.compare_digest(str(hello.get("secret")), secret):
                wire.hurry(False)
                if hello["purpose"] == "send":
                    self._end_older(int(hello["rank"]), wire)
                wire.send({})
                while (head := wire.head()) is not None:
                    self._handle(int(hello["rank"]), wire, head)
        wire.close()
        with self._lock:
            self._wires.pop(wire, None)

    def _end_older(self, rank: int, wire: Wire) -> None:
        with self._lock:
            older, self._senders[rank] = self._senders.get(rank), (wire, threading.current_thread())
        if older is not None:
            older[0].close()
            older[1].join()  # nothing of the older copy is written any more

    def close(self) -> None:
        self._closing = True
        name = self._socket.getsockname()[0]
        with suppress(OSError):  # wakes the thread that accepts
            socket.create_connection(("127.0.0.1" if name == "0.0.0.0" else name, self.port), timeout=5.0).close()
        self._thread.join()
        self._socket.close()
        with self._lock:
            wires = dict(self._wires)
        for wire, thread in wires.items():
            wire.close()
            thread.join()
