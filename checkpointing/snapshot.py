"""One save in flight: its bytes move chunk by chunk from the state into arena slots, and the fence waits for the rest.

Chunks are in the optimizer's order. A background thread fills them during forward and backward; when the optimizer is
about to write, the training thread enters the fence, fills what nobody has claimed yet, and waits only for the chunks
that hold what is about to be written (DataStates-LLM, section 4: lazy copies until the update phase). On CUDA the
fence does not block the host: it makes the training stream wait for the copies that were queued. What is parked on the
device (`park`) leaves from there: the fence waits for the parking, which comes before all copies, not for those chunks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .arena import Memory, copy_bytes
from .copies import HostCopier
from .park import Parking
from .plan import SavePlan
from .seal import Seal
from .staging import Staging

OnChunks = Callable[["Snapshot", int, Sequence[int], Any], None]


class Snapshot:
    """The copy phase of one save of `plan` at `step`.

    `sources` are the lazy tensors in plan order, `staging` holds the eager part. When the copies of chunks into their
    slots of `memory` have been issued, `on_chunks(snapshot, first chunk, slots, mark)` is called, from any thread.
    `addresses` of the sources spare asking each of them. `at_once`: how many chunks are issued in one call. `parking`:
    what parks the last chunks, if anything.
    """

    def __init__(
        self,
        step: int,
        plan: SavePlan,
        sources: Sequence[torch.Tensor],
        staging: Staging,
        copier: HostCopier,
        memory: Memory,
        on_chunks: OnChunks,
        seals: Sequence[Seal] = (),
        addresses: np.ndarray | None = None,
        at_once: int | None = None,
        parking: Parking | None = None,
    ) -> None:
        self.step, self.plan = step, plan
        self.error: BaseException | None = None
        self._sources: Sequence[torch.Tensor] = sources
        known = addresses is not None
        self._bases = addresses if known else np.fromiter(map(torch.Tensor.data_ptr, sources), np.int64, len(sources))
        self._staging = staging
        self._copier, self._memory, self._on_chunks = copier, memory, on_chunks
        self._at_once = at_once or copier.chunks_at_once
        self._next = 0
        self._filled = [False] * plan.image.chunks
        self._through = 0  # all chunks below this one are filled
        self._parking = parking  # until all has left it
        self._parked_from = len(self._filled) if parking is None else parking.first
        self._parked = parking is None  # whether the copies into it, if there are any, have been issued
        self._parks = threading.Lock()
        self._changed = threading.Condition()
        self._seals = list(seals)
        self._verdicts: list[tuple[torch.Tensor, Any]] = []
        self._moved = False
        self._sealing = threading.Lock()
        self._marks: list[tuple[int, Any]] = []  # (first chunk, mark) of what has been issued
        self._behind_all: Any = None  # mark behind all copies and samples, where the fence need not make one

    # -- filling ------------------------------------------------------------------------------------------------

    def issue(self) -> None:
        """Where copies are queued on a device: issue all for which there is room, and behind those of each part its
        samples, so that neither the fence nor the commit need ask the device for anything."""
        if not self._copier.queues:
            return
        try:
            with self._copier.side():
                if self._parking is not None and self._park(wait=False):
                    self._sample_behind()  # nothing else has to leave where all is parked
                while self.fill_next(wait=False):
                    self._sample_behind()
        except BaseException as error:
            self.fail(error)

    def _sample_behind(self) -> None:
        with self._sealing:
            ready = [seal for seal in self._seals if self._safe(seal.chunk + 1) and seal.verdict is None]
            for seal in ready:
                seal.sample(self._copier)
                seal.behind = self._copier.mark()
            if ready and self._safe(len(self._filled)):
                self._behind_all = ready[-1].behind

    def fill_next(self, *, wait: bool = True, parked: bool = True) -> bool:
        """Claim the next few chunks, `parked` ones among them, and issue their copies; False when there are none left,
        or no free slot and not `wait`."""
        try:
            if not self._park(wait=wait):
                return False
            while not (claim := self._claim(parked=parked)):
                if claim is None or not wait:
                    return False
                self._memory.await_room()
            first, slots = claim
            try:
                self._fill(first, slots)
                mark = self._copier.mark()
            except BaseException:
                for slot in slots:
                    self._memory.release(slot)
                raise
        except BaseException as error:
            self.fail(error)
            return False
        self._on_chunks(self, first, slots, mark)
        with self._changed:
            self._marks.append((first, mark))
            self._filled[first : first + len(slots)] = [True] * len(slots)
            if self._through == first:
                self._through += len(slots)
            while self._through < len(self._filled) and self._filled[self._through]:
                self._through += 1
            if self._through == len(self._filled):
                self._leave()
            self._changed.notify_all()
        return True

    def _park(self, *, wait: bool) -> bool:
        """Issue the copies into the parking before all others, since these follow them on the copies' stream; whether
        it is done. The save before must have issued all its copies out of the same memory: without `wait`, not now."""
        parking = self._parking
        if self._parked or parking is None:
            return self._parked
        if not parking.free(wait=wait):
            return False
        with self._parks:
            if self._parked or self.error:
                return self._parked
            table = self.plan.image.table
            rows = slice(table.starts[parking.first], None)
            sources = self._bases[table.item[rows]] + table.source_offset[rows]
            self._copier.copy_within(parking.places(table, rows), sources, table.nbytes[rows])
            mark = self._copier.mark()
            with self._changed:
                self._marks.append((-1, mark))
                self._parked = True
                self._changed.notify_all()
        return True

    def _leave(self) -> None:
        """The next save may park: no copy out of the memory will be issued, or none that matters."""
        parking, self._parking = self._parking, None
        if parking is not None:
            parking.left.set()

    def _claim(self, *, parked: bool) -> tuple[int, Sequence[int]] | tuple[()] | None:
        """The next chunks' first number, and their slots; () without room now, None when no chunk is left.

        Room and chunks are taken in one step: a thread that waited for room while another took the last chunk would
        wait for the disk, although all is copied.
        """
        with self._changed:
            begins_parked = self._next >= self._parked_from  # a mark behind the others must come before parked ones
            left = (len(self._filled) if begins_parked else self._parked_from) - self._next
            if self.error or not left or (begins_parked and not parked):
                return None
            rooms = self._memory.reserve(min(self._at_once, left))
            if not rooms:
                return ()
            first, self._next = self._next, self._next + len(rooms)
        return first, self._memory.places(rooms, first)

    def _fill(self, first: int, slots: Sequence[int]) -> None:
        """Issue the copies of chunks first, first + 1, … into `slots`."""
        image, memory = self.plan.image, self._memory
        addresses = memory.address + np.array(slots, dtype=np.int64) * memory.chunk_bytes
        for chunk in range(first, min(first + len(slots), -(-image.eager_bytes // image.chunk_bytes))):
            self._fill_eager(*image.chunk_range(chunk), int(addresses[chunk - first]))
        if not memory.framed:
            for chunk, slot in enumerate(slots, first):
                if memory.lacks_frames(slot):
                    begin, end = image.chunk_range(chunk)
                    view = memory.view(slot, end - begin)
                    for offset, data in image.static[chunk]:
                        view[offset : offset + len(data)] = data
        table = image.table
        rows = slice(table.starts[first], table.starts[first + len(slots)])
        targets = addresses[table.chunk[rows] - first] + table.chunk_offset[rows]
        parking = self._parking
        if first < self._parked_from:
            sources = self._bases[table.item[rows]] + table.source_offset[rows]
        elif parking is not None:
            sources = parking.places(table, rows)
        else:  # given up meanwhile
            raise self.error or RuntimeError("what was parked has been given up")
        self._copier.copy_many(targets, sources, table.nbytes[rows])

    def _fill_eager(self, begin: int, end: int, target: int) -> None:
        host_end = min(end, self.plan.host_bytes)
        if begin < host_end:
            copy_bytes(target, self._staging.host.data_ptr() + begin, host_end - begin)
        device_begin, device_end = max(begin, self.plan.host_bytes), min(end, self.plan.image.eager_bytes)
        if device_begin < device_end:
            source = self._staging.device.data_ptr() + device_begin - self._staging.device_begin
            self._copier.copy(target + device_begin - begin, source, device_end - device_begin)

    # -- fencing ------------------------------------------------------------------------------------------------

    def _safe(self, last: int) -> bool:
        """Whether whoever writes chunks below `last` need only follow copies that have been issued."""
        return self._parked and self._through >= min(last, self._parked_from)

    def wait_filled(self) -> None:
        """Return when every chunk's copies were issued, or the save has failed."""
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or self._through == len(self._filled))

    def fence(self, chunk: int | None = None) -> None:
        """Return when whatever the caller does next cannot change chunks up to `chunk` (default: all) of this save."""
        last = len(self._filled) if chunk is None else chunk + 1
        while not self._safe(last) and self.error is None:
            # for a part: what the other thread has claimed may take the last slots, and no more are needed
            if not self.fill_next(wait=chunk is None, parked=False):
                with self._changed:
                    self._changed.wait_for(lambda: self._safe(last) or self.error is not None)
        with self._sealing:  # nobody samples meanwhile
            for mark in self._marks_before(last, chunk):
                self._copier.order_after(mark)
            self._seal(last - 1)

    def _marks_before(self, last: int, chunk: int | None) -> list[Any]:
        """What comes after all copies of the chunks below `last`, into the parking for those that are parked, and after
        samples that were queued behind them."""
        if chunk is None and self._behind_all is not None:
            return [self._behind_all]
        behind = [seal for seal in self._seals if seal.chunk < last and seal.behind is not None]
        marks = [seal.behind for seal in behind]
        if behind and behind[-1].chunk == last - 1:
            return marks
        if self._behind_all is not None:
            return [self._behind_all]
        if chunk is None and self._parked_from == len(self._filled):
            return [self._copier.mark()]
        with self._changed:
            return marks + [mark for first, mark in self._marks if first < min(last, self._parked_from)]

    def finish(self) -> None:
        """For the background thread, once all is filled: seal what no fence has sealed, on the copies' own stream."""
        with self._copier.side(), self._sealing:
            self._seal(len(self._filled) - 1)
            if self._behind_all is None:
                self._behind_all = self._copier.mark()

    def _seal(self, chunk: int) -> None:
        """With `_sealing` held: note the verdicts on all parts up to `chunk`."""
        while self._seals and self._seals[0].chunk <= chunk:
            seal = self._seals.pop(0)
            self._moved |= seal.moved()
            if seal.verdict is None:
                seal.sample(self._copier)
            assert seal.verdict is not None
            self._verdicts.append(seal.verdict)

    def release_sources(self) -> None:
        """Forget the state's tensors, once `fence()` has passed."""
        self._sources = ()

    def fail(self, error: BaseException) -> None:
        """Give this save up; the first reason is kept and every waiter goes on."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()
        with self._parks:  # whoever parks now has begun before
            self._leave()

    def torn(self) -> bool:
        """Whether somebody wrote a lazy tensor between snapshot and fence. Waits for the copies, not for the device."""
        for _, mark in self._verdicts:
            self._copier.wait(mark)
        return self._moved or any(bool(flag) for flag, _ in self._verdicts)
