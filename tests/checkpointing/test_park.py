"""The end of the state, parked on its device: a save's bytes are those of its moment, whenever they leave and whoever
writes then. Copies are done at once here and memory has room when a test says so; `test_queued_copies` has a queue in
the place of a stream, and whole `Checkpointer`s."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from undertow.checkpointing import Checkpointer, park
from undertow.checkpointing.copies import HostCopier
from undertow.checkpointing.frames import frame
from undertow.checkpointing.layout import PAGE, place
from undertow.checkpointing.park import Park, Parking, first_parked
from undertow.checkpointing.plan import SavePlan
from undertow.checkpointing.sample import Sampler
from undertow.checkpointing.seal import Seal
from undertow.checkpointing.snapshot import Snapshot
from undertow.checkpointing.staging import Staging
from undertow.dist.errors import UserError

CHUNK = 2 * PAGE
WAIT_S = 60.0


class Stream(HostCopier):
    """Copies that are done at once by a copier that says it queues them, and what it was asked for, in order."""

    queues, chunks_at_once = True, 3

    def __init__(self) -> None:
        self.log: list[Any] = []

    def copy_many(self, targets, sources, sizes):
        self.log.append("copy")
        super().copy_many(targets, sources, sizes)

    def copy_within(self, targets, sources, sizes):
        self.log.append("park")
        HostCopier.copy_many(self, targets, sources, sizes)

    def mark(self):
        return len(self.log)

    def order_after(self, mark):
        self.log.append(("after", mark))

    def bring(self, flag):
        self.log.append("sample")
        return flag, None


class Room:
    """The `Memory` of a whole image, with room for as many chunks as a test has given."""

    framed, chunk_bytes = False, CHUNK

    def __init__(self, chunks: int, room: int) -> None:
        self.bytes = np.zeros(chunks * CHUNK, dtype=np.uint8)
        self.address, self.room, self.changed = self.bytes.ctypes.data, room, threading.Condition()

    def give(self, chunks: int) -> None:
        with self.changed:
            self.room += chunks
            self.changed.notify_all()

    def reserve(self, count):
        with self.changed:
            taken = min(count, self.room)
            self.room -= taken
            return [0] * taken

    def await_room(self):
        with self.changed:
            self.changed.wait_for(lambda: self.room, timeout=0.01)

    def places(self, rooms, first):
        return range(first, first + len(rooms))

    def lacks_frames(self, slot):
        return True

    def release(self, slot):
        self.give(1)

    def slot_address(self, slot):
        return self.address + slot * CHUNK

    def view(self, slot, nbytes):
        return self.bytes.data[slot * CHUNK : slot * CHUNK + nbytes]


class State:
    """Eager and lazy tensors of many sizes, and the plan to save them."""

    def __init__(self, seed: int, eager: int = 3, lazy: int = 7) -> None:
        rng = random.Random(seed)
        sizes = [rng.randrange(1, 9000) for _ in range(eager)] + [rng.randrange(1, 5 * CHUNK) for _ in range(lazy)]
        made = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
        framed = [(str(index), frame(tuple(t.shape), t.dtype)) for index, t in enumerate(made)]
        self.eager, self.lazy = made[:eager], made[eager:]
        image = place(framed[:eager], framed[eager:], chunk_bytes=CHUNK)
        names = tuple(MetadataIndex(name) for name, _ in framed)
        self.plan = SavePlan(0, 1, image, eager, names[:eager], names[eager:], ())
        self.chunks, self.staging = image.chunks, Staging(self.plan, torch.device("cpu"))
        self.before = [tensor.clone() for tensor in made]

    def change(self) -> None:
        """As an optimizer does: every element, through a way that no version counter sees."""
        for tensor in (*self.eager, *self.lazy):
            tensor.numpy()[:] ^= 0xFF

    def begin(self, memory: Room, copier: HostCopier, parking: Parking | None, on: Callable | None = None) -> Snapshot:
        self.before = [tensor.clone() for tensor in (*self.eager, *self.lazy)]
        self.staging.fill(self.eager)
        seals = [Seal(self.chunks - 1, self.lazy, Sampler(self.lazy))]
        way = (self.staging, copier, memory, on or (lambda *what: None), seals)
        return Snapshot(1, self.plan, self.lazy, *way, parking=parking)

    def wrong(self, memory: Room) -> list[str]:
        """The tensors that `memory` does not hold as they were when the save began."""
        image = self.plan.image
        found = [memory.bytes[p.payload : p.payload + p.frame.nbytes] for p in (*image.eager, *image.lazy)]
        pairs = zip((*image.eager, *image.lazy), found, self.before)
        return [placed.key for placed, bytes_, before in pairs if not np.array_equal(bytes_, before.numpy())]


def run(act: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def fill(snapshot: Snapshot) -> None:
    """What the background thread does."""
    snapshot.issue()
    while snapshot.fill_next():
        pass


def ended(thread: threading.Thread) -> bool:
    thread.join(WAIT_S)
    return not thread.is_alive()


@pytest.mark.parametrize("copier", [HostCopier, Stream])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("eager", [0, 3])
def test_parked_chunks_may_leave_after_the_fence(seed, copier, background, eager):
    """Parts of every size, all of the state among them; the arena has room for just what is not parked."""
    rng = random.Random(seed)
    for _ in range(8):
        state = State(rng.randrange(2**30), eager=eager)
        size, one = state.plan.image.size, copier()
        memory_park, one.queues = Park(rng.choice([CHUNK, size // 3, size // 2, size, 2 * size])), True
        parking = memory_park.lend(state.plan.image, one)
        one.queues = copier.queues
        assert parking is not None
        memory = Room(state.chunks, parking.first)
        snapshot = state.begin(memory, one, parking)
        filler = run(partial(fill, snapshot)) if background else None
        assert ended(run(snapshot.fence)), "the fence waits for parked chunks"
        snapshot.release_sources()
        state.change()
        assert not parking.left.is_set()
        memory.give(state.chunks)
        filler = filler or run(partial(fill, snapshot))
        assert ended(filler) and parking.left.is_set()
        snapshot.wait_filled()
        snapshot.finish()
        assert snapshot.error is None and not snapshot.torn()
        assert not state.wrong(memory)


@pytest.mark.parametrize("copier", [HostCopier, Stream])
def test_a_write_before_the_parking_is_found(seed, copier):
    state, one = State(seed), copier()
    one.queues = True
    parking = Park(state.plan.image.size // 2).lend(state.plan.image, one)
    snapshot = state.begin(Room(state.chunks, state.chunks), one, parking)
    state.lazy[-1].numpy()[:] ^= 0xFF  # parked, and nobody has copied it
    snapshot.fence()
    fill(snapshot)
    snapshot.finish()
    assert snapshot.error is None and snapshot.torn()


def test_the_samples_follow_the_parking_and_the_fence_waits_for_no_parked_chunk(seed):
    state, one = State(seed, lazy=12), Stream()
    parking = Park(state.plan.image.size // 2).lend(state.plan.image, one)
    assert parking is not None
    snapshot = state.begin(Room(state.chunks, state.chunks), one, parking)
    snapshot.issue()
    kept, parked = -(-parking.first // 3), -(-(state.chunks - parking.first) // 3)  # calls for three chunks each
    assert kept > 1 and parked > 1
    assert one.log == ["park", *["copy"] * kept, "sample", *["copy"] * parked]
    snapshot.fence()
    assert one.log[-1] == ("after", 1 + kept + 1)  # behind the samples, before the first parked chunk
    one.log.clear()
    lot = Park(state.plan.image.size // 2).lend(state.plan.image, one)
    late = state.begin(Room(state.chunks, state.chunks), one, lot)
    while late.fill_next():  # nobody samples between: the fence does
        pass
    late.fence()
    after = [("after", mark) for mark in range(1, 1 + kept + 1)]  # the parking, and each call for what is not parked
    assert one.log == ["park", *["copy"] * (kept + parked), *after, "sample"]


def test_where_all_is_parked_nothing_has_to_leave(seed):
    state, one = State(seed, eager=0), Stream()
    snapshot = state.begin(Room(state.chunks, 2), one, Park(2**40).lend(state.plan.image, one))
    snapshot.issue()
    snapshot.fence()
    assert one.log == ["park", "sample", "copy", ("after", 2)]


def test_an_arena_smaller_than_what_is_not_parked(seed):
    state, one = State(seed, lazy=9), Stream()
    parking = Park(state.plan.image.size // 3).lend(state.plan.image, one)
    assert parking is not None
    memory = Room(state.chunks, 1)
    snapshot = state.begin(memory, one, parking)
    filler, fence = run(lambda: fill(snapshot)), run(snapshot.fence)
    memory.give(parking.first - 2)
    fence.join(0.05)
    assert fence.is_alive()  # one chunk that is not parked has no room
    memory.give(1)
    assert ended(fence)
    state.change()
    memory.give(state.chunks)
    assert ended(filler)
    snapshot.finish()
    assert not snapshot.torn() and not state.wrong(memory)


def test_a_group_waits_for_its_part(seed):
    """The first group lies before the parked chunks, the second among them."""
    state, one = State(seed, lazy=9), Stream()
    parking = Park(state.plan.image.size // 2).lend(state.plan.image, one)
    assert parking is not None
    first = parking.first // 2
    memory = Room(state.chunks, first + 1)
    snapshot = state.begin(memory, one, parking)
    filler = run(lambda: fill(snapshot))
    assert ended(run(lambda: snapshot.fence(first)))
    second = run(lambda: snapshot.fence(state.chunks - 2))
    memory.give(parking.first - first - 1)
    assert ended(second)
    assert ended(run(snapshot.fence))
    state.change()
    memory.give(state.chunks)
    assert ended(filler)
    snapshot.finish()
    assert not snapshot.torn() and not state.wrong(memory)


@pytest.mark.parametrize("part", [False, True])
def test_the_next_save_parks_when_all_has_left(seed, part):
    state, one = State(seed), Stream()
    lot = Park(state.plan.image.size // 2)
    rooms, snapshots, expected = [], [], []

    def begin() -> None:
        parking = lot.lend(state.plan.image, one)
        assert parking is not None
        rooms.append(Room(state.chunks, parking.first))
        snapshots.append(state.begin(rooms[-1], one, parking))
        expected.append(state.before)

    def background() -> None:  # one save after the other
        for snapshot in snapshots:
            fill(snapshot)

    begin()
    assert ended(run(snapshots[0].fence))
    state.change()
    begin()
    fence = run(lambda: snapshots[1].fence(state.chunks - 1 if part else None))
    filler = run(background)
    fence.join(0.05)
    assert fence.is_alive() and one.log.count("park") == 1
    rooms[0].give(state.chunks)
    assert ended(fence) and one.log.count("park") == 2
    state.change()
    rooms[1].give(state.chunks)
    assert ended(filler)
    for room, state.before in zip(rooms, expected):
        assert not state.wrong(room)


def test_a_save_that_fails_lets_the_next_one_park(seed):
    state, one = State(seed), Stream()
    lot = Park(state.plan.image.size // 2)
    parking = lot.lend(state.plan.image, one)
    assert parking is not None
    memory = Room(state.chunks, parking.first)
    failed = state.begin(memory, one, parking)
    filler = run(lambda: fill(failed))
    assert ended(run(failed.fence))
    failed.fail(OSError("the disk is gone"))
    failed.wait_filled()
    assert ended(filler) and parking.left.is_set()
    state.change()
    memory = Room(state.chunks, state.chunks)
    good = state.begin(memory, one, lot.lend(state.plan.image, one))
    fill(good)
    good.fence()
    good.finish()
    assert good.error is None and not good.torn() and not state.wrong(memory)


class Refusing(Stream):
    def copy_within(self, targets, sources, sizes):
        raise RuntimeError("CUDA error 1")


def test_a_device_that_refuses_the_copy_fails_the_save_and_frees_the_next(seed):
    state, one = State(seed), Refusing()
    lot = Park(state.plan.image.size)
    parking = lot.lend(state.plan.image, one)
    assert parking is not None
    snapshot = state.begin(Room(state.chunks, state.chunks), one, parking)
    fill(snapshot)
    snapshot.fence()
    assert "CUDA error" in str(snapshot.error) and parking.left.is_set()


def test_which_chunks_are_parked(seed):
    rng = random.Random(seed)
    for _ in range(50):
        image = State(rng.randrange(2**30)).plan.image
        wanted = rng.randrange(2 * image.size)
        first = first_parked(image, wanted)
        parked = max(0, image.size - first * CHUNK)
        assert parked <= wanted and first * CHUNK >= image.eager_bytes
        if first and first * CHUNK - CHUNK >= image.eager_bytes:
            assert parked + CHUNK > wanted  # another one would not fit
    last = image.size - (image.chunks - 1) * CHUNK
    assert first_parked(image, last - 1) == image.chunks
    assert first_parked(image, last) == image.chunks - 1
    assert Park(last - 1).lend(image, Stream()) is None


def test_a_save_that_fails_early_does_not_let_the_next_one_park_over_an_earlier_one(seed):
    image, one = State(seed).plan.image, Stream()
    lot = Park(image.size // 2)
    slow, failed, late = (lot.lend(image, one) for _ in range(3))
    assert slow is not None and failed is not None and late is not None
    assert slow.free(wait=False) and not failed.free(wait=False)
    failed.left.set()
    assert not late.free(wait=False)
    slow.left.set()
    assert late.free(wait=True)


def test_a_full_device_is_said_once_and_saves_go_on(seed, monkeypatch):
    image, one = State(seed).plan.image, Stream()
    said = []

    def full(*unused, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    lot = Park(image.size // 2)
    with monkeypatch.context() as patch:
        patch.setattr(park, "warn_once", lambda log, *what: said.append(what))
        patch.setattr(park.torch, "empty", full)
        assert lot.lend(image, one) is None and lot.lend(image, one) is None
    assert len(said) == 1 and "not free" in lot.explain(image, one)
    assert lot.lend(image, one) is None  # until another plan
    lot.drop()
    assert lot.lend(image, one) is not None and "are parked" in lot.explain(image, one)


def test_state_in_host_memory_is_not_parked_and_the_option_is_checked(tmp_path):
    wrong: Any
    for wrong in (-1, 2.5, True, "1 GiB", None):
        with pytest.raises(UserError, match="device_bytes"):
            Checkpointer(tmp_path, model=torch.nn.Linear(2, 2), device_bytes=wrong)
    with Checkpointer(tmp_path, model=torch.nn.Linear(512, 512), device_bytes=2**30) as ckpt:
        ckpt.save(1)
        assert ckpt.wait()[-1].ok
        assert "the state is in host memory" in ckpt.explain()
