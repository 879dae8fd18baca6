"""Who is still alive, known at once: a TCP connection from every rank to rank 0, open as long as the process lives.

The kernel closes a dead process's sockets, so a peer that was killed shows as an end of file within milliseconds, where
a time-out would need minutes to be sure; keep-alive probes find a host that fell silent. A rank that leaves in order
says so first. The same connections carry the few short messages that cannot wait for somebody to ask for them
(`preemption`). One thread per rank serves its sockets; everything else only reads what it has noted.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

Listener = Callable[[int, Any], None]  # (rank, message), called on the lifeline's thread


class Lifeline:
    """This rank's end. `listen` on rank 0 first, then `connect` on the others; a world of one needs neither.

    `on_message(rank, message)` and `on_gone(rank)` are called on the lifeline's thread; `on_wake` there too, after
    `wake`, which alone may be called from a signal handler.
    """

    def __init__(self, rank: int, world: int, token: str) -> None:
        self.rank, self.world = rank, world
        self.gone: set[int] = set()  # dead
        self.left: set[int] = set()  # in order, after their last words
        self.on_message: Listener = lambda rank, message: None
        self.on_gone: Callable[[int], None] = lambda rank: None
        self.on_wake: Callable[[], float | None] = lambda: None
        self._token = token
        self._peers: dict[int, socket.socket] = {}
        self._buffers: dict[socket.socket, bytes] = {}
        self._server: socket.socket | None = None
        self._wake_out, self._wake_in = os.pipe()
        for handle in (self._wake_out, self._wake_in):
            os.set_blocking(handle, False)
        self._thread: threading.Thread | None = None
        self._closing = False

    def listen(self, host: str) -> int:
        """Rank 0: open the port that the others connect to."""
        self._server = socket.create_server((host if host.startswith("127.") else "", 0), backlog=self.world)
        return self._server.getsockname()[1]

    def connect(self, host: str, port: int, *, timeout_s: float) -> None:
        """Any other rank: connect to rank 0."""
        peer = socket.create_connection((host, port), timeout=timeout_s)
        peer.sendall(_line([self._token, self.rank]))
        self._adopt(0, peer)

    def start(self) -> None:
        _LIVES.add(self)
        self._thread = threading.Thread(target=self._serve, name="undertow-lifeline", daemon=True)
        self._thread.start()

    def send(self, rank: int, message: Any) -> None:
        """From the lifeline's thread: a message to `rank`; one that is gone hears nothing."""
        if rank == self.rank:
            self.on_message(rank, message)
        elif rank in self._peers:
            with suppress(OSError):  # its end will be seen as an end of file
                self._peers[rank].sendall(_line(message))

    def broadcast(self, message: Any) -> None:
        """Rank 0, from the lifeline's thread: to every rank, this one last."""
        for rank in [*range(1, self.world), 0]:
            self.send(rank, message)

    def wake(self) -> None:
        """Have `on_wake` called soon. It returns the seconds after which it wants to be called again, or None."""
        with suppress(BlockingIOError, OSError):  # full: it will wake anyway; closed: nobody is left to wake
            os.write(self._wake_in, b"!")

    def close(self) -> None:
        """Leave in order, so that nobody takes it for a death."""
        self._closing = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        for peer in self._peers.values():
            with suppress(OSError):
                peer.sendall(_line("part"))
            peer.close()
        if self._server is not None:
            self._server.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    # -- the thread -------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._wake_out, selectors.EVENT_READ)
            if self._server is not None:
                self._selector.register(self._server, selectors.EVENT_READ)
            for rank, peer in self._peers.items():
                self._selector.register(peer, selectors.EVENT_READ, rank)
            pause_s = None
            while not self._closing:
                for key, _ in self._selector.select(pause_s):
                    if key.fileobj is self._server:
                        self._accept()
                    elif isinstance(key.fileobj, socket.socket):
                        self._read(key.data, key.fileobj)
                    else:
                        os.read(self._wake_out, 4096)
                pause_s = self.on_wake()

    def _accept(self) -> None:
        assert self._server is not None
        with suppress(OSError):
            peer, _ = self._server.accept()
            self._buffers[peer] = b""
            self._selector.register(peer, selectors.EVENT_READ, None)  # a stranger until it has said who it is

    def _adopt(self, rank: int, peer: socket.socket) -> None:
        peer.settimeout(5.0)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._peers[rank] = peer
        self._buffers.setdefault(peer, b"")

    def _read(self, rank: int | None, peer: socket.socket) -> None:
        try:
            data = peer.recv(4096)
        except OSError:
            data = b""
        *lines, self._buffers[peer] = (self._buffers[peer] + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if rank is None:
                rank = self._admit(peer, message)
                if rank is None:
                    return
            elif message == "part":
                self._drop(peer)
                self.left.add(rank)
                return
            else:
                self.on_message(rank, message)
        if not data:
            self._drop(peer)
            if rank is not None:
                self.gone.add(rank)
                self.on_gone(rank)

    def _admit(self, peer: socket.socket, hello: Any) -> int | None:
        if not (isinstance(hello, list) and len(hello) == 2 and hello[0] == self._token):
            self._drop(peer)
            return None
        self._selector.modify(peer, selectors.EVENT_READ, hello[1])
        self._adopt(hello[1], peer)
        return hello[1]

    def _drop(self, peer: socket.socket) -> None:
        self._selector.unregister(peer)
        self._buffers.pop(peer)
        self._peers = {rank: other for rank, other in self._peers.items() if other is not peer}
        peer.close()


_LIVES: weakref.WeakSet[Lifeline] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A forked child, a data loader's worker for example, must not hold its parent's connections open."""
    for life in _LIVES:
        for peer in life._peers.values():
            peer.close()


os.register_at_fork(after_in_child=_let_go_in_child)


def _line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"
