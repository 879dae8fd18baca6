"""A slow link around a messenger of the overlap engine: `comms.link` for messages that belong to no schedule.

Each message travels with a stamp, the time at which the emulated link would have carried it, and is held until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .link import LinkModel, Wire
from .trigger import Messenger

_STAMP = 1 << 28  # added to the tag of a message; above every tag of the engine


class SlowMessenger:
    """Wraps a `Messenger` of CPU tensors whose ranks are all on one host, because stamps are read from one clock."""

    def __init__(self, inner: Messenger, model: LinkModel) -> None:
        self.inner, self.rank, self.world = inner, inner.rank, inner.world
        self._wire = Wire(model)

    def post_send(self, rows: torch.Tensor, to: int, tag: int) -> Any:
        gone_s = self._wire.leave(to, rows.numel() * rows.element_size())
        stamp = torch.tensor([gone_s], dtype=torch.float64)
        works = [self.inner.post_send(stamp, to, _STAMP + tag), self.inner.post_send(rows, to, tag)]
        return works, lambda: gone_s, stamp

    def post_recv(self, rows: torch.Tensor, source: int, tag: int) -> Any:
        stamp, nbytes = torch.empty(1, dtype=torch.float64), rows.numel() * rows.element_size()
        works = [self.inner.post_recv(stamp, source, _STAMP + tag), self.inner.post_recv(rows, source, tag)]
        return works, lambda: self._wire.arrive(source, float(stamp[0]), nbytes), stamp

    def wait(self, handle: Any, timeout_s: float) -> None:
        works, until, _ = handle
        for work in works:
            self.inner.wait(work, timeout_s)
        _sleep(until)

    def close(self) -> None:
        self.inner.close()


def _sleep(until: Callable[[], float]) -> None:
    until_s = until()
    while (left_s := until_s - time.monotonic()) > 0:
        time.sleep(left_s)
