"""The CUDA form of the overlap engine: its patterns over gloo with stand-ins for streams, and itself on a GPU.

Also a program, for a machine without pytest: ``torchrun --nproc-per-node 2 tests/comms/test_overlap_cuda.py``.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch

from undertow.benchmarks import overlap_cuda
from undertow.comms import cuda_driver
from undertow.comms.chunk_plan import chunk_rows
from undertow.comms.cuda_events import Call
from undertow.comms.cuda_graph_counts import Count
from undertow.comms.cuda_messengers import CudaMessenger, PinnedMessenger
from undertow.comms.cuda_watch import Exchange, Watch
from undertow.comms.overlap_cuda import CudaOverlapEngine
from undertow.comms.overlap_engine import add_pieces
from undertow.comms.placement import Placement
from undertow.comms.stream_wait import Counted, can_wait
from undertow.comms.symmetric_messenger import Mapped, Seat, SymmetricMessenger, _refusal, apart, why_not
from undertow.comms.trigger import GlooMessenger
from undertow.dist.errors import PeerLost
from undertow.parallel.overlap_arms import CUDA_ARMS, REPLAYED_ARMS
from undertow.parallel.overlap_gate import Gate
from undertow.parallel.overlap_queueing import measure
from undertow.parallel.overlap_team import Team
from undertow.parallel.overlap_ways import Ways


class _Now:
    """Work is done when it is queued, so every event has happened once it is recorded; `made`: how many there are."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.recorded = False

    def record(self, stream: _Stream) -> None:
        assert isinstance(stream, _Stream)
        self.recorded = True

    def wait(self, stream: _Stream) -> None:
        assert isinstance(stream, _Stream) and self.recorded

    def query(self) -> bool:
        return True


class _Stream:
    """It offers nothing that makes an event; `set` counts how often the current one was changed."""

    set = 0

    def __init__(self, *_: Any, priority: int = 0) -> None: ...

    def synchronize(self) -> None: ...


def _stand_in(patch: pytest.MonkeyPatch) -> None:
    """Streams and events of a GPU that is never late; whoever enters a stream's context fails."""
    stream = _Stream()

    def change(_: _Stream) -> None:
        _Stream.set += 1

    patch.setattr(torch.cuda, "Stream", _Stream)
    patch.setattr(torch.cuda, "Event", _Now)
    patch.setattr(torch.cuda, "stream", None)
    patch.setattr(torch.cuda, "set_stream", change)
    patch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    patch.setattr("undertow.comms.cuda_recorder._current", lambda _: 1)


def _copied(stream: _Stream, target: int, source: int, nbytes: int) -> None:
    ctypes.memmove(target, source, nbytes)


def _all_copied(stream: _Stream, each: Any) -> None:
    for copy in each:
        _copied(stream, *copy)


class _Eager(CudaMessenger):
    """A messenger whose exchange is over when it returns."""

    def __init__(self) -> None:
        self._gloo = GlooMessenger(None, 30.0)
        self.rank, self.world = self._gloo.rank, self._gloo.world

    def exchange(self, call: Any, after: Any, sends: Any, receives: Any, *, pull: bool = False) -> tuple[Any, Any]:
        if isinstance(after, Counted):
            assert after.before is not None and int(after.counters[after.at]) == after.value
        handles = [self._gloo.post_recv(span.numbers(), source, 0) for span, source in receives]
        handles += [self._gloo.post_send(span.numbers(), to, 0) for span, to in sends]
        for handle in handles:
            self._gloo.wait(handle, 30.0)
        done = call.event(_Stream())
        return done if sends else None, done if receives else None

    def close(self) -> None:
        self._gloo.close()


def tracked(y: torch.Tensor, mine: torch.Tensor, sleep: int = 0) -> Any:
    """A product in the order that it is given, three tiles a piece; each may sleep on the device before it is made."""

    def product(pieces: Any, counters: torch.Tensor) -> list[int]:
        for at, (low, high) in enumerate(pieces):
            if sleep:
                torch.cuda._sleep(sleep)
            y[low:high] = mine[low:high]
            for _ in range(3):
                counters[at] += 1
        return [3] * len(pieces)

    return product


def right(engine: CudaOverlapEngine, device: torch.device, rows: int, seed: int) -> bool:
    """Whole numbers in poisoned memory: equal to the sum, bit for bit, whatever the pieces, by events and by counts."""
    rank, world, ok = engine.rank, engine.world, True
    generator = torch.Generator().manual_seed(seed)
    for subchunks, overlap in ((1, False), (1, True), (3, True)):
        everyone = torch.randint(-9, 9, (world, rows, 5), generator=generator).float().to(device)
        plan = engine.plan(chunk_rows(rows, world), subchunks)
        for pattern in (engine.reduce_scatter, engine.all_reduce):
            y = torch.full((rows, 5), torch.nan, device=device)

            def product(low: int, high: int, y: torch.Tensor = y, mine: torch.Tensor = everyone[rank]) -> None:
                y[low:high] = mine[low:high]

            where = slice(*plan.own) if pattern == engine.reduce_scatter else slice(None)
            ok &= torch.equal(pattern(plan, product, y, overlap=overlap), everyone.sum(0)[where])
            if device.type == "cpu" or not can_wait():
                y.fill_(torch.nan)
                out = pattern(plan, product, y, overlap=overlap, tracked=tracked(y, everyone[rank]))
                ok &= torch.equal(out, everyone.sum(0)[where])
        y, by_columns = torch.full((rows, 5), torch.nan, device=device), engine.plan(plan.sizes, subchunks, 5)
        panels = engine.plan(plan.sizes, subchunks, 5, whole=True)

        def panel(low: int, high: int, left: int, right: int, into: torch.Tensor, all: Any = everyone[rank]) -> None:
            into.copy_(all[low:high, left:right])

        for each in (by_columns, panels):
            out = engine.reduce_scatter(each, lambda *_: None, y, panel=panel)
            ok &= torch.equal(out, everyone.sum(0)[slice(*plan.own)])
            y.fill_(torch.nan)
        ok &= torch.equal(engine.all_reduce(by_columns, lambda *_: None, y, panel=panel), everyone.sum(0))
        whole, seen = torch.full((rows, 5), torch.nan, device=device), torch.zeros(rows, 5, device=device)

        def use(low: int, high: int, seen: torch.Tensor = seen, whole: torch.Tensor = whole) -> None:
            seen[low:high] = whole[low:high]

        shard = everyone.sum(0)[slice(*plan.own)]
        engine.all_gather(plan, shard, whole, use, overlap=overlap)
        ok &= torch.equal(seen, everyone.sum(0))
    return ok


def _with_stand_ins(rank: int, world: int, seed: int) -> None:
    _stand_in(pytest.MonkeyPatch())  # a process of its own
    engine = CudaOverlapEngine(device=torch.device("cpu"), messenger=_Eager())
    for rows in (0, 1, 7, 24):
        assert right(engine, torch.device("cpu"), rows, seed), rows
    queueing = measure(engine, time.perf_counter)
    assert min(queueing.call_s, queueing.piece_s) >= 0 and queueing.seconds(CUDA_ARMS[1], world) > 0
    engine.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_its_patterns_are_right_with_eager_streams(ranks, seed, world):
    ranks(world, _with_stand_ins, seed)


def _every_way(rank: int, world: int, seed: int) -> None:
    """Zeros and ones, so that every order of sums gives the same bits."""
    _stand_in(pytest.MonkeyPatch())  # a process of its own
    team = Team(overlap="off")
    of_cpus, team.engine = team.engine, CudaOverlapEngine(device=torch.device("cpu"), messenger=_Eager())
    team._making = Ways(team.engine, team.group, team.engine.recorder)
    generator = torch.Generator().manual_seed(seed)
    for at, arm in enumerate(CUDA_ARMS):
        if arm.tracked:  # no Triton here
            continue
        team.gate = Gate(CUDA_ARMS, team._gather, fixed=at)
        team.ways.clear()
        team._guesses.plain.clear()
        for rows in (12, 13):
            sizes = chunk_rows(rows, world)
            everyone = torch.randint(0, 2, (world, rows, 4), generator=generator).float()
            b = torch.randint(0, 2, (4, 24), generator=generator).float()
            summed, mine = everyone.sum(0) @ b, slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            for _ in range(2):
                assert torch.equal(team.reduce_scatter(everyone[rank], b, sizes), summed[mine]), (arm, rows)
                assert torch.equal(team.all_reduce(everyone[rank], b, sizes), summed), (arm, rows)
                whole, (out,) = team.all_gather(everyone[0][mine].contiguous(), [b], sizes)
                assert torch.equal(whole, everyone[0]) and torch.equal(out, everyone[0] @ b), (arm, rows)
    team.close()
    of_cpus.close()


@pytest.mark.parametrize("world", [2, 3])
def test_a_team_of_gpus_is_right_in_every_way_that_it_can_be_told_to_take(ranks, seed, world):
    ranks(world, _every_way, seed)


_failed = threading.Event()  # some rank; the others must not wait for it


def _wait(stream: _Stream, counts: torch.Tensor, at: int, value: int) -> None:
    while int(counts.view(-1)[at]) < value:
        assert not _failed.wait(1e-4), "another rank failed"


def _write(stream: _Stream, counts: torch.Tensor, at: int, value: int) -> None:
    counts.view(-1)[at] = value


class _Shared:
    """Mapped memory of ranks that are threads; asked for by all of them at once, as the real one is."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier, self.made = world, threading.Barrier(world), list[Mapped]()

    def __call__(self, nbytes: int) -> Mapped:
        if self.barrier.wait() == 0:
            self.made.append(
                Mapped(
                    [torch.full((self.world, nbytes), 255, dtype=torch.uint8) for _ in range(self.world)],
                    [torch.zeros(2, self.world, dtype=torch.int32) for _ in range(self.world)],
                    wait=_wait,
                    write=_write,
                    copy=_copied,
                )
            )
        self.barrier.wait()
        return self.made[-1]


@pytest.mark.parametrize("world", [2, 3])
def test_mapped_memory_carries_every_pattern_in_one_queue(monkeypatch, seed, world):
    """Ranks are threads, and what a rank queues runs at once: an order that one hardware queue could not keep hangs."""
    _stand_in(monkeypatch)
    monkeypatch.setattr("undertow.comms.stream_wait.wait_value", _wait)
    monkeypatch.setattr("undertow.comms.symmetric_messenger._UNIT", 16)  # so that it grows
    _failed.clear()
    shared, cpu = _Shared(world), torch.device("cpu")

    def rank_of(rank: int) -> bool:
        try:
            messenger = SymmetricMessenger(None, cpu, rank=rank, world=world, memory=shared)
            engine = CudaOverlapEngine(device=cpu, messenger=messenger, timeout_s=1e6)
            ok = all(right(engine, cpu, rows, seed) for rows in (0, 1, 7, 24, 7))
            engine.close()
            assert not messenger.begin(1 << 40)
            return ok
        except BaseException:
            _failed.set()
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        assert list(pool.map(rank_of, range(world))) == [True] * world
    assert len(shared.made) >= 3
    for counts in shared.made[-1].counts:  # all that came was taken
        assert counts.sum() > 0
    for rank, counts in enumerate(shared.made[-1].counts):
        for peer in range(world):
            assert counts[1, peer] == shared.made[-1].counts[peer][0, rank]


class _Log:
    """What a rank would capture, in order: [function, its arguments]; `none` while it is not capturing."""

    mine = threading.local()

    def __init__(self, messenger: SymmetricMessenger) -> None:
        self.messenger, self.steps = messenger, list[list[Any]]()

    @classmethod
    def do(cls, step: Any, *arguments: Any) -> None:
        log = getattr(cls.mine, "log", None)
        if log is None:
            step(*arguments)
        else:
            log.steps.append([step, *arguments])

    def record(self, queue: Any) -> Any:
        end, self.steps, _Log.mine.log = self.messenger.recording(), [], self
        try:
            queue()
        finally:
            _Log.mine.log = None
        steps: Any = self.steps  # the graph and its instance
        before = end((steps, steps))

        def replay(_: Any) -> None:
            before()
            for step, *arguments in steps:
                step(*arguments)

        return replay, None


def _counts_of(steps: Any) -> list[Count]:
    found = [(at, step) for at, step in enumerate(steps) if step[0] in (_wait, _write)]
    return [Count(at, 0, 0, step[2].data_ptr() + 4 * step[3], step[4], 0) for at, step in found]


def _set_counts(steps: Any, counts: Any) -> None:
    for count, value in counts:
        steps[count.node][4] = value


@pytest.mark.parametrize(("columns", "whole"), [(0, False), (5, False), (5, True)])
@pytest.mark.parametrize("world", [2, 3])
def test_counts_of_a_recording_go_on_where_others_left_them(monkeypatch, seed, world, columns, whole):
    """Ranks are threads, of which one never finds its operands where they were; calls of another pattern in between."""
    _stand_in(monkeypatch)
    monkeypatch.setattr("undertow.comms.cuda_graph_counts.counts_of", _counts_of)
    monkeypatch.setattr("undertow.comms.cuda_graph_counts.set_counts", _set_counts)
    _failed.clear()
    shared, cpu, rows = _Shared(world), torch.device("cpu"), 7
    generator = torch.Generator().manual_seed(seed)
    turns = [torch.randint(-9, 9, (world, rows, 5), generator=generator).float() for _ in range(12)]

    def logged(nbytes: int) -> Mapped:
        mapped = shared(nbytes)
        calls = {name: partial(_Log.do, step) for name, step in (("wait", _wait), ("write", _write), ("copy", _copied))}
        return Mapped(mapped.areas, mapped.counts, **calls)

    def rank_of(rank: int) -> int:
        try:
            messenger = SymmetricMessenger(None, cpu, rank=rank, world=world, memory=logged)
            add = partial(_Log.do, add_pieces)
            engine = CudaOverlapEngine(device=cpu, messenger=messenger, timeout_s=1e6, add=add)
            engine.recorder._record = _Log(messenger).record
            plan = engine.plan(chunk_rows(rows, world), 2, columns, whole=whole)
            mine = torch.empty(rows, 5)
            for turn, everyone in enumerate(turns):
                mine = mine.clone() if rank == 0 else mine
                mine.copy_(everyone[rank])

                def queue(y: torch.Tensor, out: Any, mine: torch.Tensor = mine) -> torch.Tensor:
                    def product(low: int, high: int) -> None:
                        _Log.do(torch.Tensor.copy_, y[low:high], mine[low:high])

                    def panel(low: int, high: int, left: int, right: int, into: torch.Tensor) -> None:
                        _Log.do(torch.Tensor.copy_, into, mine[low:high, left:right])

                    return engine.reduce_scatter(plan, product, y, panel=panel, out=out)

                found = engine.recorder.run(plan, (mine,), 5, queue)
                assert torch.equal(found, everyone.sum(0)[slice(*plan.own)]), turn
                if turn % 4 == 3:
                    by_rows, y = engine.plan(plan.sizes, 1), mine.clone()
                    assert torch.equal(engine.all_reduce(by_rows, lambda low, high: None, y), everyone.sum(0)), turn
            replayed = sum(case.replayed for case in engine.recorder.replays.cases.values())
            engine.close()
            return replayed
        except BaseException:
            _failed.set()
            shared.barrier.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        replayed = list(pool.map(rank_of, range(world)))
    assert replayed[1:] == [10] * (world - 1)  # the first is queued, the second recorded


def test_ranks_map_memory_only_where_they_can_know_that_they_reach_it():
    here = [Seat("", "a", "gpu 0", 0), Seat("", "a", "gpu 1", 1)]
    assert apart(here) == ""
    for other, reason in (
        (Seat("", "b", "gpu 2", 1), "several hosts"),
        (Seat("", "a", "gpu 0", 1), "share a GPU"),
        (Seat("", "a", "gpu 1", 0), "sees its own GPU only"),
        (Seat("no driver", "a", "gpu 1", 1), "no driver"),
    ):
        assert reason in apart([here[0], other])


@pytest.mark.parametrize("set_by_user", [None, "0"])
def test_memory_is_mapped_without_multicast(monkeypatch, set_by_user):
    import torch.distributed._symmetric_memory as symmetric

    name, seen = "TORCH_SYMM_MEM_DISABLE_MULTICAST", list[Any]()
    monkeypatch.delenv(name, raising=False)
    if set_by_user is not None:
        monkeypatch.setenv(name, set_by_user)

    def rendezvous(memory: Any, group: Any) -> None:
        seen.append(os.environ.get(name))
        raise RuntimeError("no GPU\nno trace")

    monkeypatch.setattr(symmetric, "empty", lambda *_, **__: None)
    monkeypatch.setattr(symmetric, "rendezvous", rendezvous)
    assert _refusal(object(), torch.device("cpu")) == "torch cannot map the GPUs' memory (no GPU)"
    assert seen == ["1"] and os.environ.get(name) == set_by_user


class _Event:
    def __init__(self) -> None:
        self.done = False

    def record(self, stream: None) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_a_piece_that_does_not_come_is_named():
    seconds = [0.0]
    watch, first, second = Watch(1e6, now=lambda: seconds[0]), _Event(), _Event()
    watch.expect("rank 0: part 0 from rank 1", [first])
    watch.expect("rank 0: part 1 from rank 2", [second])
    seconds[0] = 0.9e6
    first.done = True
    watch.look()  # the second one's time begins here
    seconds[0] = 1.8e6
    watch.look()
    watch.expect("rank 0: part 2 from rank 1", [])
    seconds[0] = 2.0e6
    watch.look()
    with pytest.raises(PeerLost, match="part 1 from rank 2: not complete after 1e\\+06 s"):
        watch.expect("rank 0: part 3 from rank 1", [second])
    watch.close()


def test_an_event_that_is_recorded_again_says_nothing_of_the_call_before():
    seconds, call = [0.0], Call(_Event)
    watch = Watch(1e6, now=lambda: seconds[0])
    event = call.event(None)
    watch.expect("the first call", [event], call)
    event.done = True
    assert call.over()
    call.again()
    assert call.event(None) is event
    watch.expect(Exchange(0, "rows", 1, None, 2), [event], call)
    seconds[0] = 1.1e6
    watch.look()
    watch.expect("nothing is overdue", [])
    seconds[0] = 2.2e6
    watch.look()
    with pytest.raises(PeerLost, match="^rank 0: rows, part 1 of a chunk, from rank 2: not complete after 1e\\+06 s"):
        watch.expect("the third call", [event], call)
    watch.close()


def test_a_transport_without_a_time_out_of_its_own_ends_the_process():
    seconds, ended = [0.0], list[float]()
    watch = Watch(1e6, lambda: seconds[0], end_s=1.5e6, end=lambda: ended.append(seconds[0]))
    watch.expect("rank 0: part 0 from rank 1", [_Event()])
    for seconds[0] in (1.1e6, 1.6e6):
        watch.look()
    watch.close()
    assert ended == [1.6e6]


def test_a_tracked_product_that_fails_leaves_no_counts_behind():
    with pytest.MonkeyPatch.context() as patch:
        _stand_in(patch)
        engine = CudaOverlapEngine(device=torch.device("cpu"), messenger=_Nobody())
        plan, y, mine = engine.plan((4,), 2), torch.zeros(4, 5), torch.ones(4, 5)

        def broken(pieces: Any, counters: torch.Tensor) -> list[int]:
            counters[0] += 1
            raise RuntimeError("no memory")

        with pytest.raises(RuntimeError, match="no memory"):
            engine.reduce_scatter(plan, lambda low, high: None, y, tracked=broken)
        out = engine.reduce_scatter(plan, lambda low, high: None, y, tracked=tracked(y, mine))
        assert torch.equal(out, mine)
        assert [held.counts.tolist() == held.need for held in engine._counts.held.values()] == [True]


class _Nobody(CudaMessenger):
    """The only rank."""

    rank, world = 0, 1

    def exchange(self, call: Any, after: Any, sends: Any, receives: Any, *, pull: bool = False) -> tuple[Any, Any]:
        raise AssertionError("a message, and nobody to take it")


@pytest.mark.parametrize("overlap", [True, False])
def test_only_the_first_call_makes_events_and_no_call_enters_a_stream(overlap):
    """On pinned memory, of which every byte is looked at; a call during a late one gets events of its own."""
    here, width = torch.device("cpu"), 5
    theirs = torch.arange(2.0 * 4 * width).view(2, 4, width)

    with pytest.MonkeyPatch.context() as patch:
        _stand_in(patch)
        messenger = PinnedMessenger(0, 3, here, theirs, copies=_all_copied, pinned=False)
        engine = CudaOverlapEngine(device=here, messenger=messenger, timeout_s=1e6)
        made, changed = [], []
        for call in range(5):
            y = torch.full((12, width), torch.nan)
            before = _Now.made, _Stream.set
            patch.setattr(_Now, "query", lambda _, call=call: call != 2)  # as if the calls before were on their way

            def product(low: int, high: int, y: torch.Tensor = y, call: int = call) -> None:
                y[low:high] = call

            out = engine.reduce_scatter(engine.plan((4, 4, 4), 2), product, y, overlap=overlap)
            assert torch.equal(out, call + theirs.sum(0))
            assert bool((messenger.sent(y[4:]).view(torch.float32) == call).all())
            made.append(_Now.made - before[0])
            changed.append(_Stream.set - before[1])
        assert made[0] > 0 and made == [made[0], 0, made[0], 0, 0]
        assert changed == [2 * 6 * overlap] * 5  # to each piece's stream and back
        engine.close()


def test_no_pattern_makes_an_event_again():
    here, nothing, y = torch.device("cpu"), torch.zeros(60), torch.ones(12, 5)

    with pytest.MonkeyPatch.context() as patch:
        _stand_in(patch)
        patch.setattr("undertow.comms.stream_wait.wait_value", lambda *_: None)
        messenger = PinnedMessenger(1, 3, here, nothing, copies=_all_copied, pinned=False)
        engine = CudaOverlapEngine(device=here, messenger=messenger, timeout_s=1e6)
        plan = engine.plan((4, 4, 4), 2)
        calls = {
            "scatter": lambda: engine.reduce_scatter(plan, lambda low, high: None, y),
            "sum": lambda: engine.all_reduce(plan, lambda low, high: None, y),
            "columns": lambda: engine.all_reduce(
                engine.plan(plan.sizes, 2, 5), lambda *_: None, y, panel=lambda *_: None
            ),
            "gather": lambda: engine.all_gather(plan, y[4:8], torch.empty(12, 5), lambda low, high: None),
            "counted": lambda: engine.reduce_scatter(plan, lambda low, high: None, y, tracked=tracked(y, y.clone())),
        }
        for what, call in sorted(calls.items(), reverse=True):
            made = []
            for _ in range(3):
                before = _Now.made
                call()
                made.append(_Now.made - before)
            assert made[1:] == [0, 0], (what, made)
        assert engine.plan((4, 4, 4), 2) is plan
        engine.close()


@pytest.mark.parametrize("rows", [128, 20])  # the last of eight ranks has none of 20
def test_the_benchmark_of_one_gpu_is_right(rows, seed):
    """bf16 products of whole numbers below 2^8 and sums below 2^8: exact."""
    here = torch.device("cpu")
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randint(-2, 3, shape, generator=generator).bfloat16() for shape in ((rows, 8), (8, 16)))
    sizes = chunk_rows(rows, overlap_cuda.WORLD)
    theirs = torch.randint(-9, 10, (overlap_cuda.WORLD - 1, sizes[0], 16), generator=generator).bfloat16()
    want = a[: sizes[0]] @ b

    with pytest.MonkeyPatch.context() as patch:
        _stand_in(patch)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        messenger = PinnedMessenger(0, overlap_cuda.WORLD, here, theirs, copies=_all_copied, pinned=False)
        engine = CudaOverlapEngine(device=here, messenger=messenger)
        engine.recorder._record = lambda queue: (lambda _: queue(), None)  # what is replayed is queued
        rank = overlap_cuda._Rank(a, b, theirs, engine, messenger, sizes)
        for arm in CUDA_ARMS:
            if not arm.tracked:  # no Triton here
                assert torch.equal(rank.scatter(arm, check=True), rank.wanted(arm, want)), arm
        messenger._mirror.fill_(1)
        patch.setattr(messenger, "_copies", lambda *_: None)
        with pytest.raises(AssertionError, match="other bytes"):
            rank.scatter(CUDA_ARMS[0], check=True)
        overlap_cuda.copies(rank)
        engine.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("queue", [cuda_driver.copies, cuda_driver.copy_all])
def test_several_copies_carry_what_was_made_before_them(seed, queue):
    """Both ways between a GPU and pinned memory, of pieces that do not lie in order, behind a late write."""
    made = torch.randint(0, 255, (9, 1000), dtype=torch.uint8, device="cuda")
    late, there = torch.zeros_like(made), torch.zeros(made.shape, dtype=torch.uint8, pin_memory=True)
    back, stream = torch.zeros_like(made), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late.copy_(made)
    order = [4 * row % 9 for row in range(8)]  # each once, one row left out
    places = [tuple(x.data_ptr() + row * 1000 for x in (late, there, back)) for row in order]
    queue(stream, [(target, source, 1000) for source, target, _ in places])
    queue(stream, [(target, source, 1000) for _, source, target in places])
    stream.synchronize()
    for row in range(9):
        want = made[row] if row in order else torch.zeros_like(made[row])
        assert torch.equal(back[row], want) and torch.equal(there[row], want.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["rows", "counts", "columns", "panels"])
def test_a_late_product_reaches_the_host_whole(seed, way):
    """Each piece sleeps on the device before it is made: a wait that is missing would copy what was there before."""
    device = torch.device("cuda", 0)
    theirs = torch.randint(-9, 9, (2, 8, 256)).float().pin_memory()

    messenger = PinnedMessenger(0, 3, device, theirs)
    engine = CudaOverlapEngine(device=device, messenger=messenger)
    for call in range(20):
        mine = torch.full((24, 256), float(call), device=device)
        y = torch.full((24, 256), torch.nan, device=device)

        def product(low: int, high: int, y: torch.Tensor = y, mine: torch.Tensor = mine) -> None:
            torch.cuda._sleep(1_000_000)
            y[low:high] = mine[low:high]

        def panel(low: int, high: int, left: int, right: int, into: torch.Tensor, mine: torch.Tensor = mine) -> None:
            torch.cuda._sleep(1_000_000)
            into.copy_(mine[low:high, left:right])

        columns = 256 if way in ("columns", "panels") else 0
        plan = engine.plan((8, 8, 8), 1 + call % 3, columns, whole=way == "panels")
        late = tracked(y, mine, 1_000_000) if way == "counts" else None
        out = engine.reduce_scatter(plan, product, y, tracked=late, panel=panel).cpu()
        torch.cuda.synchronize()  # the messenger's memory is read by the host
        place, come = Placement(plan, torch.empty(24, 256)), theirs.sum(0)
        for piece in plan.scatter_order:
            if piece.owner == 0:
                want = call + place.landed(come, piece)
                torch.testing.assert_close(place.summed(out, piece), want, rtol=0, atol=0)
            else:
                sent = messenger.sent(Placement(plan, y).made(piece)).view(torch.float32)
                assert bool((sent == call).all())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("columns", [0, 256])
def test_a_call_is_captured_while_the_watch_looks_at_another(seed, columns):
    """The watch asks for the events of an eager call while a graph is captured: CUDA forbids that to most threads."""
    device = torch.device("cuda", 0)
    theirs = torch.randint(-9, 9, (2, 8, 256), generator=torch.Generator().manual_seed(seed)).float().pin_memory()

    engine = CudaOverlapEngine(device=device, messenger=PinnedMessenger(0, 3, device, theirs), timeout_s=60.0)
    begun, asked, asking = threading.Event(), threading.Event(), engine._watch.look

    def look() -> None:
        begun.wait(60)
        asking()
        asked.set()

    engine._watch.look = look  # type: ignore[method-assign]
    plan, mine = engine.plan((8, 8, 8), 2, columns), torch.zeros(24, 256, device=device)
    come = theirs.sum(0).clone()
    for piece in plan.chunk(0):
        place = Placement(plan, mine)
        place.summed(come, piece).copy_(place.landed(theirs.sum(0), piece))

    def call() -> torch.Tensor:
        y = torch.empty_like(mine)

        def panel(low: int, high: int, left: int, right: int, into: torch.Tensor) -> None:
            into.copy_(mine[low:high, left:right])

        def product(low: int, high: int) -> None:
            y[low:high] = mine[low:high]

        return engine.reduce_scatter(plan, product, y, panel=panel)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
        assert engine._watch._pending
        begun.set()
        assert asked.wait(60)
    for value in (1.0, 2.0):
        mine.fill_(value)
        graph.replay()
        torch.testing.assert_close(out.cpu(), value + come, rtol=0, atol=0)
    torch.testing.assert_close(call().cpu(), 2.0 + come, rtol=0, atol=0)
    engine.close()


def main() -> None:
    """NCCL between the GPUs of one host; the layers' functions beside torch's collectives."""
    import torch.distributed as dist

    from undertow.parallel import Team, all_gather_matmul, matmul_all_reduce, matmul_reduce_scatter

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    reason = why_not(None, device)
    print(f"rank {rank} of {world}: mapped memory of peers: {reason or 'yes'}", flush=True)
    for messenger in (None, *([] if reason else [SymmetricMessenger(None, device)])):
        engine = CudaOverlapEngine(device=device, messenger=messenger)
        for rows in (1, 7, 24, 4096):
            assert right(engine, device, rows, 3), (messenger, rows)
        engine.close()
    team = Team(device=device)
    torch.manual_seed(rank)
    a, b = (torch.randint(0, 2, shape, device=device).bfloat16() for shape in ((512, 128), (128, 256)))
    want = a.float() @ b.float()
    dist.all_reduce(want)
    for _ in range(50):  # until the gate has decided
        got = matmul_reduce_scatter(a, b, "sum", 0, team)
        assert torch.equal(got, want.bfloat16().chunk(world)[rank])
        assert torch.equal(matmul_all_reduce(a, b, "sum", team), want.bfloat16())
        whole, (out,) = all_gather_matmul(got, [b.t().contiguous()], 0, team)
        assert whole is not None and torch.equal(whole, want.bfloat16()) and bool(out.isfinite().all())
    print(f"rank {rank} of {world}: all right\n{team.explain()}", flush=True)
    team.close()
    for arm in REPLAYED_ARMS:  # ranks need not agree who replays: the last one's operands lie elsewhere at times
        team = Team(device=device, overlap=arm.name)
        for turn in range(40):
            values = torch.full((), float(turn % 3), device=device)
            a.copy_((torch.rand(a.shape, device=device) < 0.5) * values)
            mine = a.clone() if rank == world - 1 and turn % 7 > 3 else a
            want = a.float() @ b.float()
            dist.all_reduce(want)
            got = matmul_reduce_scatter(mine, b, "sum", 0, team)
            assert torch.equal(got, want.bfloat16().chunk(world)[rank]), (arm.name, turn)
            if turn % 5 == 4:  # calls that are not replayed, on the same memory
                assert torch.equal(matmul_all_reduce(a, b, "sum", team), want.bfloat16()), (arm.name, turn)
        print(f"rank {rank} of {world}: {arm.name}: all right\n{team.explain()}", flush=True)
        team.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
