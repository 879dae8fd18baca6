"""A slow link on a fast host: an emulated bandwidth and latency around any CPU transport, for honest overlap tests.

On one host gloo moves bytes by copying memory, which takes the cores that should compute, so nothing can be seen of
overlap. Here a message is stamped by its sender with the time at which a real link would have delivered it (a token
bucket: the link is free again once the bytes have left) and its receiver sleeps until then. Bytes still travel, and
the answer is still checked; only time is added, never taken away, and a sleeping lane leaves its core to others. The
stamps are read from one clock, so all ranks must run on one host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from .actions import Recv, Send
from .graph import Graph
from .transport import Transport

_STAMP_TAG = 1 << 28  # above every tag of a schedule


@dataclass(frozen=True)
class LinkModel:
    """`bytes_per_s` and `latency_s` of one direction. `per`: 'pair' (each peer has a link of its own, as in a full
    mesh) or 'port' (all messages of a rank share its one way out, and one way in, as behind a switch)."""

    bytes_per_s: float
    latency_s: float = 0.0
    per: str = "port"


@dataclass
class Bucket:
    """One direction of one link: when it will be free. Pure arithmetic on times that the caller gives."""

    bytes_per_s: float
    free_s: float = 0.0
    carried_bytes: int = 0

    def take(self, now_s: float, nbytes: int) -> float:
        """Put `nbytes` on the link at `now_s`; the time when the last of them has left."""
        self.free_s = max(now_s, self.free_s) + nbytes / self.bytes_per_s
        self.carried_bytes += nbytes
        return self.free_s


@dataclass
class _Held:
    """A message that has really been issued, and is held until the emulated link would have carried it."""

    works: list[Any]
    done: Callable[[], float]  # seconds on the monotonic clock; asked once

    def wait(self, timeout: timedelta) -> None:
        for work in self.works:
            work.wait(timeout)
        until_s = self.done()
        while (left := until_s - time.monotonic()) > 0:
            time.sleep(left)


class Wire:
    """One rank's ways in and out under a `LinkModel`; times are the monotonic clock's. Usable from any thread."""

    def __init__(self, model: LinkModel) -> None:
        self.model = model
        self._buckets: dict[tuple[str, int], Bucket] = {}
        self._lock = threading.Lock()

    def leave(self, peer: int, nbytes: int) -> float:
        """Put a message on the way out now; when its last byte has left, which its receiver must be told."""
        return self._take("out", peer, time.monotonic(), nbytes)

    def arrive(self, source: int, gone_s: float, nbytes: int) -> float:
        """When a message that left at `gone_s` is here. The way in is as wide as the way out, so a lone message is not
        slowed down twice."""
        if self.model.per == "port":
            gone_s = max(gone_s, self._take("in", source, gone_s - nbytes / self.model.bytes_per_s, nbytes))
        return gone_s + self.model.latency_s

    def _take(self, way: str, peer: int, now_s: float, nbytes: int) -> float:
        key = (way, peer if self.model.per == "pair" else -1)
        with self._lock:
            return self._buckets.setdefault(key, Bucket(self.model.bytes_per_s)).take(now_s, nbytes)


class EmulatedLink:
    """Wraps the transport of a `P2P` on gloo. `sent_bytes` and `received_bytes` count payload by peer."""

    def __init__(self, inner: Transport, model: LinkModel) -> None:
        self.inner, self.model, self.prepost = inner, model, inner.prepost
        self.sent_bytes: dict[int, int] = {}
        self.received_bytes: dict[int, int] = {}
        self._wire = Wire(model)

    def prepare(self, graph: Graph) -> Mapping[int, Any]:
        return self.inner.prepare(graph)

    def issue(self, address: Any, action: Send | Recv, rows: Sequence[torch.Tensor]) -> list[Any]:
        nbytes = sum(part.numel() * part.element_size() for part in rows)
        stamp = torch.zeros(1, dtype=torch.float64)
        if isinstance(action, Send):
            self.sent_bytes[action.to] = self.sent_bytes.get(action.to, 0) + nbytes
            gone_s = self._wire.leave(action.to, nbytes)
            stamp[0] = gone_s
            works = self.inner.issue(_STAMP_TAG + address, action, [stamp]) + self.inner.issue(address, action, rows)
            return [_Held(works, lambda: gone_s)]
        self.received_bytes[action.source] = self.received_bytes.get(action.source, 0) + nbytes
        works = self.inner.issue(_STAMP_TAG + address, action, [stamp]) + self.inner.issue(address, action, rows)
        return [_Held(works, lambda: self._wire.arrive(action.source, float(stamp[0]), nbytes))]

    def wait(self, works: list[Any], timeout_s: float) -> None:
        self.inner.wait(works, timeout_s)

    def close(self) -> None:
        self.inner.close()
