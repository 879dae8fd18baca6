"""The executor over gloo: the bits of `local`, and errors that name what did not happen."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import signal
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from undertow.comms import local
from undertow.comms.actions import Send
from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.ops import gemm, table
from undertow.comms.p2p import P2P
from undertow.comms.queue_order import queue_order
from undertow.comms.queue_run import Queued, QueuedRun, queueing
from undertow.comms.schedule_text import parse
from undertow.comms.storage import Storage
from undertow.comms.transport import Nccl, private_store
from undertow.dist.errors import UndertowError, UserError
from undertow.dist.trace import Trace
from undertow.parallel.masks import Mask
from undertow.parallel.token_ring.block_ops import ops
from undertow.parallel.token_ring.problem import Problem


def _execute(rank, world, cases):
    """Each case three times, so that buffers, tags and threads are used again."""
    with P2P(timeout_s=240) as executor:
        runs = [[executor.run(c.schedule, c.inputs[rank], c.ops) for c in cases] for _ in range(3)]
    return [[{name: tensor.numpy() for name, tensor in outputs.items()} for outputs in run] for run in runs]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_same_object_gives_the_same_bits_as_local(world, ranks, make_case, case_names):
    ragged = [(3 * rank + 1) % 5 for rank in range(world)]
    cases = [make_case(name, world, rows) for name in case_names for rows in (4, ragged)]
    results = ranks(world, _execute, cases)
    for at, case in enumerate(cases):
        wanted = local.run(case.schedule, case.inputs, case.ops)
        for rank in range(world):
            for run in results[rank]:
                for name, tensor in wanted[rank].items():
                    assert torch.equal(torch.from_numpy(run[at][name]), tensor), (case.schedule.name, rank, name)


class _Grouped:
    """A gloo group of two that offers what `Nccl` takes of torch's NCCL groups: calls between start and end are one
    piece of work, and calls outside of them are refused (torch would open a second communicator for those)."""

    def __init__(self, group):
        self.group, self.open, self.groups, self.parts = group, None, 0, 0

    def _start_coalescing(self):
        assert self.open is None
        self.open = []

    def send(self, tensors, to, tag):
        self.open.append(self.group.send(tensors, to, tag))

    def recv(self, tensors, source, tag):
        self.open.append(self.group.recv(tensors, source, tag))

    def _end_coalescing(self):
        works, self.open = self.open, None
        self.groups, self.parts = self.groups + 1, self.parts + len(works)
        return SimpleNamespace(wait=lambda timeout: [work.wait(timeout) for work in works])

    def shutdown(self):
        self.group.shutdown()


class _Pairwise(Nccl):
    """The channels of the NCCL transport, each a gloo group of two: no tags, messages matched by order."""

    def _open(self, channel):
        self.opened = [*getattr(self, "opened", []), channel]
        sending = self.rank == channel[0]
        store = dist.PrefixStore(str(channel), self.store)
        found = dist.ProcessGroupGloo(store, 0 if sending else 1, 2, timedelta(seconds=self.timeout_s))
        self.all = [*getattr(self, "all", []), _Grouped(found)]
        return self.all[-1]

    def issue(self, address, action, rows):
        if isinstance(action, Send):
            self.sent_bytes = getattr(self, "sent_bytes", 0) + sum(part.nbytes for part in rows)
        return super().issue(address, action, rows)

    def wait(self, works, timeout_s):
        for work in works:
            work.wait(timedelta(seconds=timeout_s))


def _execute_pairwise(rank, world, cases, streams):
    with P2P(timeout_s=240) as executor:
        transport = _Pairwise(private_store(None), list(range(world)), rank, torch.device("cpu"), 240)
        executor._transport = transport
        executor._streams = streams and streams()
        runs = [[executor.run(c.schedule, c.inputs[rank], c.ops) for c in cases] for _ in range(2)]
    assert len(set(transport.opened)) == len(transport.opened)
    sends = [(c.schedule, a) for c in cases for r, _, _, a in c.schedule.actions() if r == rank and a.kind == "send"]
    tokens = sum(s.rows for c, a in sends for s in a.reads if c.value(s.value, rank).dtype == "token")
    assert transport.sent_bytes == 2 * (sum(c.nbytes(rank, *a.reads) for c, a in sends) + tokens)
    messages = [a for c in cases for r, _, _, a in c.schedule.actions() if r == rank and a.kind in ("send", "recv")]
    parts = sum(len(a.reads) + (len(a.writes) if a.kind == "recv" else 0) for a in messages)
    assert sum(g.groups for g in transport.all) == 2 * len(messages)  # one for each message, whatever its slices
    assert sum(g.parts for g in transport.all) == 2 * parts
    mine = [a for a in messages if a.tag.startswith("kv_0")]  # keys and values
    assert len(mine) == 2 * (world - 1) and all(len(a.reads or a.writes) == 2 for a in mine)
    return [[{name: tensor.numpy() for name, tensor in outputs.items()} for outputs in run] for run in runs]


def _keys_and_values(world):
    """The backward of a ring: messages of two slices, out and home."""
    problem = Problem(world, 6 * world, 6 * world, Heads(1, 2, 2, 8, 8), Mask(True))
    schedule, table = problem.schedule("ring_kv", backward=True), ops(problem, 1, 0.3)
    inputs = [
        {n: torch.randn(v.rows, *v.shape[1:]) for n, v in values.items() if v.role == "input"}
        for values in schedule.by_rank
    ]
    wanted = local.run(schedule, inputs, table)

    def matches(found):
        return all(torch.equal(a[name], b[name]) for a, b in zip(found, wanted) for name in ("dq", "dk", "dv"))

    return SimpleNamespace(schedule=schedule, inputs=inputs, ops=table, matches=matches)


@pytest.mark.parametrize("queued", [False, True])
@pytest.mark.parametrize("world", [2, 4])
def test_one_channel_for_each_pair_of_lanes_needs_no_tags(world, queued, ranks, make_case, case_names, fake_streams):
    """What NCCL gets: a channel per pair of lanes, opened in one order by both ends, and messages in that order.

    Queued, one thread does everything of a rank and waits for each message: nothing may stand in the way of another.
    """
    cases = [*(make_case(name, world) for name in case_names), _keys_and_values(world)]
    results = ranks(world, _execute_pairwise, cases, fake_streams if queued else None)
    for at, case in enumerate(cases):
        outputs = [{k: torch.from_numpy(v) for k, v in results[rank][1][at].items()} for rank in range(world)]
        assert case.matches(outputs), case.schedule.name


def test_a_group_ends_where_one_of_its_calls_fails():
    """Otherwise NCCL would wait for its end at every later call of the thread."""
    done: list[str] = []

    def fail(tensors, peer, tag):
        done.append("send")
        raise RuntimeError("NCCL communicator was aborted")

    group = SimpleNamespace(
        _start_coalescing=lambda: done.append("start"), send=fail, _end_coalescing=lambda: done.append("end")
    )
    with pytest.raises(RuntimeError, match="aborted"):
        Nccl.issue(None, group, Send(1, "m", ()), [torch.zeros(1)] * 2)  # type: ignore[arg-type]
    assert done == ["start", "send", "end"]


def _with_delays(rank, world, schedule, inputs, rounds, seed):
    generator = random.Random(seed + rank)

    def slow_gemm(reads, writes):
        time.sleep(generator.random() * 2e-3)
        writes[0].fill_(float("nan"))
        gemm(reads, writes)

    def slow_add(reads, writes):
        time.sleep(generator.random() * 2e-3)
        total = reads[0] + reads[1]
        writes[0].copy_(total)

    with P2P(timeout_s=240) as executor:
        return [
            executor.run(schedule, inputs[rank], {"gemm": slow_gemm, "add": slow_add})["out"].tolist()
            for _ in range(rounds)
        ]


@pytest.mark.parametrize("algorithm", ["direct", "ring"])
def test_random_delays_change_nothing(algorithm, ranks, seed):
    schedule = gemm_reduce_scatter(4, 6, 4, 3, algorithm=algorithm, subchunks=2)
    inputs = [{"x": torch.randn(24, 4), "w": torch.randn(4, 3)} for _ in range(4)]
    wanted = [out["out"].tolist() for out in local.run(schedule, inputs)]
    results = ranks(4, _with_delays, schedule, inputs, 25, seed)
    assert all(got == wanted[rank] for rank in range(4) for got in results[rank])


def _traced(rank, world, folder):
    path, made = Path(f"{folder}/trace-{rank:05d}.json"), 0

    def slow_gemm(reads, writes):
        """The second product ends after the first send has begun, or after a minute if that waits for all products."""
        nonlocal made
        made += 1
        deadline_s = time.monotonic() + 60
        while made == 2 and '"name":"send' not in path.read_text().replace(" ", "") and time.monotonic() < deadline_s:
            time.sleep(0.01)
        gemm(reads, writes)

    trace = Trace(path, rank)
    with P2P(timeout_s=240, trace=trace) as executor:
        for overlap in (True, False):
            schedule = gemm_reduce_scatter(world, 4, 4, 3, overlap=overlap)
            executor.run(schedule, {"x": torch.ones(4 * world, 4), "w": torch.ones(4, 3)}, {"gemm": slow_gemm})
    trace.close()


def test_the_first_send_begins_before_the_last_product_ends_only_when_overlapped(ranks, tmp_path):
    ranks(2, _traced, str(tmp_path))
    lines = (tmp_path / "trace-00000.json").read_text().splitlines()
    events = [json.loads(line.rstrip(",")) for line in lines if line.startswith("{")]
    lane = {e["args"]["name"]: e["tid"] for e in events if e["name"] == "thread_name"}
    sends = [e["ts"] for e in events if e["ph"] == "B" and e["tid"] == lane["out"] and e["name"].startswith("send")]
    products = [e["ts"] for e in events if e["ph"] == "E" and e["tid"] == lane["compute"]]
    assert len(sends) == 2 and len(products) == 4
    assert sends[0] < products[1]  # begun while the second product was still being made
    assert sends[1] > products[3]  # the sequential schedule's send waited for all of it


def _failing(rank, world, schedule, lane):
    def broken(reads, writes, **params):
        if rank == 0:
            raise ZeroDivisionError("not this tensor")
        time.sleep(0.01)
        torch.add(reads[0], reads[1], out=writes[0]) if lane == "reduce" else gemm(reads, writes)

    executor = P2P(timeout_s=240)
    executor.prepare(schedule)
    if lane == "compute":
        executor.timeout_s = 3  # for the message that never comes; in the other case all that are needed do
    inputs = {"x": torch.ones(8, 4), "w": torch.ones(4, 3)}
    try:
        executor.run(schedule, inputs, {"add" if lane == "reduce" else "gemm": broken})
        outcome = "no error"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    executor.timeout_s = 3
    try:
        executor.run(schedule, inputs)
        return outcome, "no error"
    except UndertowError as error:
        return outcome, str(error)


@pytest.mark.parametrize("lane", ["compute", "reduce"])
def test_what_an_operation_raises_reaches_the_caller(lane, ranks):
    """From the caller's own lane and from a thread's; the other rank waits for its message and names it."""
    (first, again), (second, _) = ranks(2, _failing, gemm_reduce_scatter(2, 4, 4, 3), lane)
    assert first == "ZeroDivisionError: not this tensor"
    assert "this executor has failed before" in again
    if lane == "compute":
        assert "PeerLost" in second and "rank 1, lane in, action 0 `recv <- 0 part.0 => from.0[0:4]`" in second
        assert "value from.0 did not come from rank 0 within 3 s" in second
    else:
        assert second == "no error"  # it has been sent all that it needs


def _dying(rank, pipe, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)

    def die(reads, writes):
        os.kill(os.getpid(), signal.SIGKILL)

    try:
        schedule = gemm_reduce_scatter(2, 4, 4, 3)
        executor = P2P(timeout_s=600)
        executor.run(schedule, {"x": torch.ones(8, 4), "w": torch.ones(4, 3)}, {"gemm": die} if rank else None)
    except BaseException as error:
        pipe.send(f"{type(error).__name__}: {error}")
    finally:
        pipe.close()
        os._exit(0)


def test_a_killed_peer_gives_peer_lost_without_waiting_for_the_time_out(tmp_path):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    processes = [context.Process(target=_dying, args=(rank, theirs, tmp_path / "store")) for rank in (0, 1)]
    for process in processes:
        process.start()
    try:
        assert ours.poll(240), "rank 0 still waits for a dead peer"
        message = ours.recv()
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert message.startswith("PeerLost: rank 0, lane ")
    assert re.search("rank 1 because the connection failed: that rank is probably dead", message)


def _disagreeing(rank, world):
    executor = P2P(timeout_s=240)
    try:
        executor.run(direct_reduce_scatter(world, 4 + (rank == 2)), {"x": torch.ones((4 + (rank == 2)) * world)})
    except UserError as error:
        return str(error)


def test_ranks_with_different_schedules_are_told(ranks):
    messages = ranks(3, _disagreeing)
    assert all("the same schedule on all ranks" in message for message in messages)
    assert "rank 2 runs schedule direct_reduce_scatter" in messages[2] and "rank(s) 0, 1 run another" in messages[2]


def _refusals(rank, world):
    found = []
    with P2P(timeout_s=240) as executor:
        for schedule in (
            ring_all_gather(3, 4),
            parse(str(ring_all_gather(2, 4)).replace("goal 0 out[0:4] = x@0[0:4]\n", "")),
        ):
            try:
                executor.run(schedule, {"x": torch.ones(4)})
            except UserError as error:
                found.append(str(error))
        out = torch.empty(8)
        result = executor.run(ring_all_gather(2, 4), {"x": torch.full((4,), float(rank))}, outputs={"out": out})
        assert result["out"] is out and out.tolist() == [0.0] * 4 + [1.0] * 4
        needs_grad = torch.ones(2 * 4, requires_grad=True)
        assert not executor.run(ring_reduce_scatter(2, 4), {"x": needs_grad})["out"].requires_grad
    return found


def test_refusals_leave_the_executor_usable(ranks):
    for messages in ranks(2, _refusals):
        assert "is for 3 ranks, the group has 2" in messages[0]
        assert "no goal: rank 0, value out" in messages[1]


def _two_groups(rank, world):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with P2P(pairs[rank // 2], timeout_s=30) as pair, P2P(timeout_s=240) as everyone:
        both = pair.run(ring_all_gather(2, 1), {"x": torch.tensor([float(rank)])})["out"].tolist()
        total = everyone.run(ring_reduce_scatter(4, 1), {"x": torch.arange(4.0)})["out"].tolist()
        again = pair.run(direct_reduce_scatter(2, 1), {"x": torch.tensor([1.0, 2.0]) * (rank + 1)})["out"].tolist()
    return both, total, again


def _after_uneven_groups(rank, world):
    """torch names a locally synchronised group by how many groups a rank has: executors must not depend on that."""
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)
    with P2P(timeout_s=240) as executor:
        return executor.run(ring_reduce_scatter(world, 1), {"x": torch.arange(float(world))})["out"].tolist()


def test_ranks_may_have_made_different_groups_before(ranks):
    assert ranks(3, _after_uneven_groups) == [[0], [3], [6]]


def test_two_executors_over_two_groups(ranks):
    results = ranks(4, _two_groups)
    assert [both for both, _, _ in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [total for _, total, _ in results] == [[0], [4], [8], [12]]
    assert [again for _, _, again in results] == [[3], [6], [7], [14]]


def _rehearsing(rank, world, schedule, streams):
    """Each kind of operation once, on memory of its own: on a GPU, kernels are loaded before any message stands."""
    with P2P(timeout_s=240) as executor:
        x, w = torch.randn(sum_of_rows(schedule, rank), 6), torch.randn(6, 5)
        wanted = executor.run(schedule, {"x": x, "w": w})["out"].clone()
        calls: list[tuple[str, ...]] = []
        finite: list[bool] = []
        queued_by: list[bool] = []

        def counted(name, op):
            def call(reads, writes, **params):
                queued_by.append(queueing())
                calls.append((name, *(str(tuple(t.shape)) for t in (*reads, *writes))))
                finite.extend(bool(t.isfinite().all()) for t in reads)
                op(reads, writes, **params)

            return call

        part = executor._prepared(schedule)
        queued = Queued(queue_order(part.graph, rank), streams())
        ops = {name: counted(name, op) for name, op in table(schedule, None).items()}
        storage = Storage(part.layout, {"x": x, "w": w})
        run = QueuedRun(executor, part, queued, storage, ops)
        before = {name: tensor.clone() for name, tensor in storage.tensors.items()}
        for name, tensor in storage.tensors.items():
            if name not in ("x", "w"):
                tensor.fill_(float("nan"))  # whatever the memory held before
        run.rehearse()
        same = all(torch.equal(before[name], storage.tensors[name]) for name in ("x", "w")) and all(finite)
        rehearsed = list(calls)
        apart = not any(queued_by)
        calls.clear()
        queued_by.clear()
        run.go()
        apart = apart and all(queued_by) and not queueing()
        return same, rehearsed, sorted(set(calls)), torch.equal(storage.outputs["out"], wanted), apart


def _with_other_operations(rank, world, schedule, streams):
    """A second table for the same schedule is rehearsed too; the tables that came before are not again."""
    with P2P(timeout_s=240) as executor:
        executor._streams = streams()
        x, w = torch.randn(sum_of_rows(schedule, rank), 6), torch.randn(6, 5)
        during: list[bool] = []

        def gemm(reads, writes, **params):
            during.append(queueing())
            torch.mm(*reads, out=writes[0])

        found = []
        for ops in (None, {"gemm": gemm}, None, {"gemm": gemm}):
            during.clear()
            executor.run(schedule, {"x": x, "w": w}, ops)
            found.append((during.count(False) > 0, during.count(True) > 0))
        return found


def test_other_operations_are_rehearsed_for_themselves(ranks, fake_streams):
    schedule = gemm_reduce_scatter(2, 4, 6, 5, algorithm="ring", subchunks=2)
    for found in ranks(2, _with_other_operations, schedule, fake_streams):
        assert found == [(False, False), (True, True), (False, False), (False, True)]


def sum_of_rows(schedule, rank):
    return schedule.value("x", rank).rows


def test_a_rehearsal_does_each_kind_of_operation_once_and_sends_nothing(ranks, fake_streams):
    schedule = gemm_reduce_scatter(2, 4, 6, 5, algorithm="ring", subchunks=2)
    for same, rehearsed, kinds, right, apart in ranks(2, _rehearsing, schedule, fake_streams):
        assert same and right
        assert apart, "operations of a rehearsal may measure, those of a run must not"
        assert sorted(rehearsed) == kinds and len(kinds) >= 2
