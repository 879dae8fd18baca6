"""One thread queues all lanes: every edge is ordered on the device, both ends of a channel agree, and nothing stops."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from undertow.comms.actions import Recv, Send
from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.attention_shape import Heads
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.graph import Graph, build
from undertow.comms.ops import table
from undertow.comms.p2p_run import part_of
from undertow.comms.queue_order import QueueOrder, global_order, queue_order
from undertow.comms.queue_run import Queued, QueuedRun
from undertow.comms.schedule_text import parse
from undertow.comms.storage import Storage
from undertow.dist.errors import PeerLost
from undertow.dist.trace import Trace
from undertow.parallel.masks import Mask
from undertow.parallel.token_ring.problem import SCHEDULES, Problem

HEADS = Heads(1, 60, 12, 8, 8)  # dealt evenly to 1 to 5 ranks


def _orders(graph: Graph) -> list[QueueOrder]:
    return [queue_order(graph, rank) for rank in range(graph.schedule.world)]


def _covered(graph: Graph, order: QueueOrder) -> None:
    """Streams and events alone put every reader behind its writers, and the caller's stream behind everything."""
    seen: list[set[int]] = []  # per step: the nodes that it is ordered behind, and itself
    lane: dict[str, set[int]] = {}
    for step in order.steps:
        behind = lane.get(step.node.lane, set()).union(*(seen[i] for i in step.waits))
        assert set(graph.writers[step.node.id]) <= behind
        assert all(order.steps[i].marked and order.steps[i].node.lane != step.node.lane for i in step.waits)
        lane[step.node.lane] = behind | {step.node.id}
        seen.append(lane[step.node.lane])
    waits = [(step.node.lane, order.steps[i].node.lane, i) for step in order.steps for i in step.waits]
    assert len(waits) == len(set(waits))  # an event is waited for once by each lane
    ended = lane.get(order.own, set()).union(*(seen[i] for i in order.ends))
    assert ended == {step.node.id for step in order.steps}
    waited = {i for step in order.steps for i in step.waits} | set(order.ends)
    assert waited == {i for i, step in enumerate(order.steps) if step.marked}


def _ends_agree(graph: Graph, orders: list[QueueOrder]) -> None:
    sent: dict[tuple, list[int]] = {}
    received: dict[tuple, list[int]] = {}
    for order in orders:
        for node in (step.node for step in order.steps):
            other = graph.nodes[graph.partner[node.id]]
            if isinstance(node.action, Send):
                sent.setdefault((node.rank, node.lane, other.rank, other.lane), []).append(node.id)
            elif isinstance(node.action, Recv):
                received.setdefault((other.rank, other.lane, node.rank, node.lane), []).append(other.id)
    assert sent == received


def _runs(graph: Graph, orders: list[QueueOrder], queue: Callable[[int, str], object], pick: random.Random) -> None:
    """A machine of in-order queues; a message holds both of its queues until both its ends have come to the front."""
    queues: dict[object, list[tuple[int, int]]] = {}
    for rank, order in enumerate(orders):
        for index, step in enumerate(order.steps):
            queues.setdefault((rank, queue(rank, step.node.lane)), []).append((rank, index))
    at, ended, left = dict.fromkeys(queues, 0), set[int](), len(graph.nodes)
    while left:
        fronts = {q: queues[q][i] for q, i in at.items() if i < len(queues[q])}
        ready: dict[int, object] = {}
        for q, (rank, index) in fronts.items():
            steps = orders[rank].steps
            if all(steps[i].node.id in ended for i in steps[index].waits):
                ready[steps[index].node.id] = q
        able = [n for n in sorted(ready) if graph.partner[n] < 0 or graph.partner[n] in ready]
        assert able, "every queue waits for another"
        node = pick.choice(able)
        for one in {node, graph.partner[node]} - {-1}:
            assert set(graph.writers[one]) <= ended
            at[ready[one]] += 1
            ended.add(one)
            left -= 1


def _holds(graph: Graph, seed: int) -> None:
    orders, pick = _orders(graph), random.Random(seed)
    ids = [step.node.id for order in orders for step in order.steps]
    assert sorted(ids) == list(range(len(graph.nodes)))
    for order in orders:
        _covered(graph, order)
    _ends_agree(graph, orders)
    few = [{}, {}]  # lanes share two hardware queues
    for queue in (
        lambda rank, lane: lane,
        lambda rank, lane: few[0].setdefault((rank, lane), pick.randrange(2)),
        lambda rank, lane: 0,
    ):
        _runs(graph, orders, queue, pick)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_every_attention_schedule(world, seed):
    """Each rank's streams as they are, two hardware queues for all of them, and one."""
    for mask in (Mask(), Mask(causal=True)):
        problem = Problem(world, 4 * world + 1, 4 * world + 1, HEADS, mask)
        for name in SCHEDULES:
            for backward in (False, True):
                if not problem.possible(name):
                    _holds(build(problem.schedule(name, backward=backward, goals=False)), seed)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_collective(world, seed, make_case, case_names):
    for name in case_names:
        _holds(build(make_case(name, world, [(3 * rank + 1) % 4 for rank in range(world)]).schedule), seed)


def test_messages_come_before_what_need_not_be_done_first():
    graph = build(Problem(2, 64, 64, HEADS, Mask(causal=True)).schedule("ring_kv", goals=False))
    kinds = [step.node.action.kind for step in _orders(graph)[0].steps]
    assert kinds[:3] == ["send", "recv", "compute"] and set(kinds[3:]) <= {"compute", "copy", "merge"}


@pytest.mark.parametrize("name", ["ring_kv", "token_ring", "token_ring_bookended"])
def test_a_receive_does_not_stand_on_the_device_while_its_sender_still_computes(name):
    """What comes home is received after as many blocks as its sender computes for it, and no sooner or later."""
    graph = build(Problem(3, 63, 63, HEADS).schedule(name, backward=True, goals=False))
    for order in _orders(graph):
        blocks, behind = 0, dict[int, int]()  # blocks of the own lane up to each step
        for index, step in enumerate(order.steps):
            blocks += step.node.lane == order.own
            behind[index] = blocks
        for step in order.steps:
            if isinstance(step.node.action, Recv) and step.node.lane.startswith("back"):
                sender = graph.nodes[graph.partner[step.node.id]]
                blocks_there = [n.id for n in graph.nodes if n.rank == sender.rank and n.lane == "compute"]
                needed = max(blocks_there.index(w) + 1 for w in graph.writers[sender.id])
                lane = [s for s in order.steps if s.node.lane == step.node.lane and s.node.index <= step.node.index]
                waited = max(behind[i] for s in lane for i in s.waits if order.steps[i].node.lane == order.own)
                assert waited == needed


def test_no_order_where_sends_that_wait_would_stop():
    text = """schedule both
world 2
value x float32[1] input
value y float32[1] output

"""
    each = "rank {0}\nlane a\n  send -> {1} m.{0} (x[0:1])\nlane b\n  recv <- {1} m.{1} => y[0:1]\n"
    assert len(global_order(build(parse(text + each.format(0, 1) + "\n" + each.format(1, 0))))[0]) == 4
    cross = "rank {0}\nlane a\n  wait (y[0:1])\n  send -> {1} m.{0} (x[0:1])\nlane b\n  recv <- {1} m.{1} => y[0:1]\n"
    with pytest.raises(ValueError, match="stops for ever"):
        global_order(build(parse(text + cross.format(0, 1) + "\n" + cross.format(1, 0))))


class _Lossy:
    """Takes `good` messages, then fails."""

    def __init__(self, good: int) -> None:
        self.good = good

    def issue(self, address, action, rows):
        self.good -= 1
        if self.good < 0:
            raise RuntimeError("NCCL communicator was aborted")
        return []

    def wait(self, works, timeout_s): ...


def _queued(schedule, inputs, ops, streams, good: int) -> QueuedRun:
    graph = build(schedule)
    addresses = dict.fromkeys(range(len(graph.nodes)))
    part = part_of(graph, 0, addresses, prepost=False)
    queued = Queued(queue_order(graph, 0), streams)
    owner = SimpleNamespace(_transport=_Lossy(good), trace=Trace(None), timeout_s=0.5)
    return QueuedRun(owner, part, queued, Storage(part.layout, inputs), table(schedule, ops))  # type: ignore


def test_errors_name_the_action_and_give_the_caller_its_stream_back(fake_streams):
    streams = fake_streams()
    inputs = {"x": torch.ones(8, 4), "w": torch.ones(4, 3)}
    with pytest.raises(PeerLost, match=r"rank 0, lane \w+, action 0 `send -> 1 .*that rank is probably dead"):
        _queued(gemm_reduce_scatter(2, 4, 4, 3), inputs, None, streams, 0).go()
    assert streams.now == "caller"

    def broken(reads, writes):
        assert streams.now == "lane reduce"
        raise ZeroDivisionError("not this tensor")

    with pytest.raises(ZeroDivisionError):
        _queued(gemm_reduce_scatter(2, 4, 4, 3), inputs, {"add": broken}, streams, 9).go()
    assert streams.now == "caller"
    run = _queued(ring_all_gather(2, 4), {"x": torch.ones(4)}, None, streams, 9)
    run.go(mark_all=True)
    run.drain()
    late = next(i for i, step in enumerate(run.queued.order.steps) if isinstance(step.node.action, Recv))
    run.queued.events[late].recorded = False
    with pytest.raises(PeerLost, match=r"did not come from rank 1 within 0\.5 s"):
        run.drain()


def test_events_are_recorded_and_waited_for_only_where_lanes_meet(fake_streams):
    streams = fake_streams()
    run = _queued(gemm_reduce_scatter(2, 4, 4, 3), {"x": torch.ones(8, 4), "w": torch.ones(4, 3)}, None, streams, 9)
    for _ in range(2):  # the same events again
        streams.log.clear()
        run.go()
        queued = run.queued
        steps = queued.order.steps
        recorded = [event for kind, event, _ in streams.log if kind == "record"]
        assert recorded == [queued.start, *(queued.events[i] for i, step in enumerate(steps) if step.marked)]
        waits = sum(kind == "wait" for kind, _, _ in streams.log)
        assert waits == len(queued.lanes) + sum(len(step.waits) for step in steps) + len(queued.order.ends)
        assert streams.now == "caller"
