"""Run a schedule over torch.distributed, gloo for CPU tensors and NCCL for CUDA tensors, or over MPI.

On the CPU each lane is a thread (the caller's own for the first lane of operations) with a loop of four lines: wait for
what the action reads, do it, say that it has finished; one communication thread issues all messages (see `p2p_run`). On
CUDA each lane is a stream, and the caller's thread alone queues the actions of all lanes in an order that cannot stop
(see `queue_order`, `queue_run`). What is not in the schedule is not waited for: no barrier, no device-wide synchronise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..dist.errors import PeerLost, UndertowError, UserError
from ..dist.trace import Trace
from .board import Worker
from .check import check, out_of_order
from .graph import need
from .link import EmulatedLink, LinkModel
from .mpi_group import MpiGroup, MpiTransport
from .ops import Op, Ops, table
from .p2p_run import Part, Run, part_of
from .problems import ScheduleError
from .queue_order import queue_order
from .queue_run import CudaStreams, Queued, QueuedRun, Streams
from .schedule import Schedule
from .storage import Storage
from .transport import Gloo, Nccl, Transport, private_store

_KEPT = 256  # schedules whose proofs are remembered
_TABLES = 8  # sets of operations with which one schedule is rehearsed: others have kernels of their own


class P2P:
    """Executes schedules on the ranks of `group` (default: all). Construct, `run` and `close` on every rank alike.

    A schedule's rank r is the group's r-th rank. `device`: CPU (gloo, or MPI) or a CUDA device (NCCL). `timeout_s`: the
    longest that a message may make its lane wait. After an error the executor refuses to run again, because messages
    of the broken run may still be on their way. `trace` records a span for each action. `link` makes gloo as slow as a
    given link (see `link`).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | MpiGroup | None = None,
        *,
        device: torch.device | str = "cpu",
        timeout_s: float = 300.0,
        trace: Trace | None = None,
        link: LinkModel | None = None,
    ) -> None:
        self.device, self.timeout_s, self.trace = torch.device(device), timeout_s, trace or Trace(None)
        self._gloo: Gloo | MpiTransport  # also of small CPU tensors beside NCCL
        self._transport: Transport
        if isinstance(group, MpiGroup):
            if self.device.type != "cpu":
                raise UserError(f"tensors on {self.device} over MPI", expected="CPU tensors; NCCL moves those of GPUs")
            self.rank, self.world = group.rank, group.world
            self._gloo = self._transport = group.transport()
        else:
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            self.rank, self.world = ranks.index(dist.get_rank()), len(ranks)
            store = private_store(group)
            self._gloo = self._transport = Gloo(store, self.rank, self.world, timeout_s)
            if self.device.type != "cpu":
                self._transport = Nccl(store, ranks, self.rank, self.device, timeout_s)
        if link is not None:
            if self.device.type != "cpu":
                raise UserError(
                    "an emulated link around NCCL", expected="device='cpu': the emulation holds host threads"
                )
            self._transport = EmulatedLink(self._transport, link)
        self._ready: dict[str, Part] = {}  # by digest, the latest used last
        self._queued: dict[str, Queued] = {}  # likewise, where lanes are streams
        self._rehearsed: dict[str, list[list[Op]]] = {}  # by digest: with which operations it was
        self._workers: dict[str, Worker] = {}
        self._streams: Streams | None = CudaStreams(self.device) if self.device.type == "cuda" else None
        self._broken: list[Any] = []  # the failed run: its tensors must outlive messages on their way

    def prepare(self, schedule: Schedule) -> None:
        """Check the schedule and open its channels; collective. `run` does it when it sees a schedule first."""
        self._prepared(schedule)

    def _prepared(self, schedule: Schedule) -> Part:
        found = self._ready.pop(schedule.digest, None) or self._prepare(schedule)
        self._ready[schedule.digest] = found
        if len(self._ready) > _KEPT:
            oldest = next(iter(self._ready))
            del self._ready[oldest]
            self._queued.pop(oldest, None)
            self._rehearsed.pop(oldest, None)
        return found

    def _prepare(self, schedule: Schedule) -> Part:
        if schedule.world != self.world:
            raise UserError(f"schedule {schedule.name} is for {schedule.world} ranks, the group has {self.world}")
        check(schedule, rendezvous=True)
        graph = need(schedule)
        if not self._transport.prepost and (problems := out_of_order(graph)):
            raise ScheduleError(schedule, tuple(problems))
        self._agree(schedule)
        part = part_of(graph, self.rank, self._transport.prepare(graph), prepost=self._transport.prepost)
        if self._streams is not None:
            self._queued[schedule.digest] = Queued(queue_order(graph, self.rank), self._streams)
        return part

    def run(
        self,
        schedule: Schedule,
        inputs: Mapping[str, torch.Tensor],
        ops: Ops | None = None,
        *,
        outputs: Mapping[str, torch.Tensor] | None = None,
        blocking: bool = True,
    ) -> dict[str, torch.Tensor]:
        """This rank's part of the schedule: its inputs by name → its outputs by name, on `device`.

        All ranks of the group must call it with the same schedules in the same order. `outputs`: tensors to fill.
        `blocking=False` (CUDA only) returns when all work is queued; the current stream is then behind it. Raises
        `PeerLost`, naming rank, action and value, when a peer dies or gives nothing for `timeout_s`, and whatever an
        operation raises.
        """
        if self._broken:
            raise UndertowError(
                f"rank {self.rank}: this executor has failed before, and its messages may still be on their way; "
                "close it and make a new one"
            )
        part = self._prepared(schedule)
        with torch.no_grad():
            functions = table(schedule, ops)
            kept = part.adopted(functions)
            storage = Storage(
                part.layout, inputs, outputs=outputs, device=self.device, former=kept.former, sent=kept.sent
            )
            if queued := self._queued.get(schedule.digest):
                run = QueuedRun(self, part, queued, storage, functions)
                called = [functions[name] for name in sorted(schedule.operations)]
                rehearsed = self._rehearsed.setdefault(schedule.digest, [])
                if called not in rehearsed and len(rehearsed) < _TABLES:
                    run.rehearse()
                    rehearsed.append(called)
            else:
                run = Run(self, part, storage, functions)
            try:
                if isinstance(run, Run):
                    run.go()
                else:
                    run.go(mark_all=blocking)
                    if blocking:
                        run.drain()
            except BaseException:
                self._broken.append(run)
                raise
        return storage.outputs

    def gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's small CPU tensor of one shape, in rank order; collective, beside any schedule. `PeerLost` when
        not all have come within `timeout_s`."""
        try:
            return self._gloo.gather(mine, self.timeout_s)
        except RuntimeError as error:
            raise PeerLost(f"rank {self.rank}: not all ranks made the same call ({error})") from error

    @property
    def link(self) -> EmulatedLink | None:
        """The emulated link, which counts the bytes that it carries; None where there is none."""
        return self._transport if isinstance(self._transport, EmulatedLink) else None

    def worker(self, role: str) -> Worker:
        """The thread of this role, made when first asked for."""
        if role not in self._workers:
            self._workers[role] = Worker(f"undertow-{role}-{self.rank}")
        return self._workers[role]

    def close(self) -> None:
        """End the threads and, unless a run has failed, the process groups; collective."""
        for worker in self._workers.values():
            worker.stop()
        self._workers.clear()
        if not self._broken:
            self._transport.close()
            if self._transport is not self._gloo:
                self._gloo.close()

    def __enter__(self) -> P2P:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _agree(self, schedule: Schedule) -> None:
        """Refuse a schedule that is not the same on all ranks: it would hang, or mix up messages."""
        mine = torch.frombuffer(bytearray.fromhex(schedule.digest), dtype=torch.uint8)
        found = self.gather(mine)
        others = [rank for rank, digest in enumerate(found) if not torch.equal(digest, mine)]
        if others:
            raise UserError(
                f"rank {self.rank} runs schedule {schedule.name} ({schedule.digest[:12]}), rank(s) "
                f"{', '.join(map(str, others))} run another one",
                expected="the same schedule on all ranks",
                remedy="build it from values that all ranks share, and compare str(schedule)",
            )
