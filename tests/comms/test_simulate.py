"""The simulator against closed forms and hand-worked timelines; it is deterministic, so times are compared exactly."""

from __future__ import annotations

import math
import random

import pytest

from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.all_to_all import all_to_all
from undertow.comms.builders.draft import Draft
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.cost import buffer_bytes, direct_seconds, overlapped_scatter_seconds, rank_costs, ring_seconds
from undertow.comms.network import Network, fair_rates, of_machine
from undertow.comms.schedule_text import parse
from undertow.comms.simulate import ASSUMED, simulate
from undertow.comms.topologies import PRESETS, preset
from undertow.dist.errors import UserError
from undertow.dist.machine import Link, Machine

FREE = {"add": 0.0, "copy": 0.0, "gemm": 0.0, "attend": 0.0, "merge_lse": 0.0}
LINK = Link(3e-6, 10e9)
MACHINE = Machine("test", links={"nccl": LINK}, copies={"host": 10e9}, flops={"gemm/float32": 1e12})


@pytest.mark.parametrize("topology", ["ports", "pairs"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_rings_take_the_closed_form_where_links_do_not_contend(world, topology):
    network = of_machine(MACHINE, topology=topology)
    for build in (ring_all_gather, ring_reduce_scatter):
        modelled = simulate(build(world, 1000, [25]), MACHINE, network=network, op_seconds=FREE).makespan_s
        assert modelled == pytest.approx(ring_seconds(world, 100_000, LINK), rel=0.01)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_staggered_direct_exchanges_take_the_closed_form(world):
    for build in (direct_reduce_scatter, all_to_all):
        modelled = simulate(build(world, 1000, [25]), MACHINE, op_seconds=FREE).makespan_s
        assert modelled == pytest.approx(direct_seconds(world, 100_000, LINK), rel=0.01)


def test_without_the_stagger_all_ask_for_one_port():
    """1 MB chunks over 1 MB/s ports, by hand; every rank sends in the order 0, 1, 2, 3.

    0-3 s: ranks 1, 2, 3 share port 0, while rank 0 sends to 1, 2, 3 in turn. 3-5 s: ranks 2 and 3 share port 1, while
    rank 1 sends to 2, then 3. 5-6 s: rank 2 sends to 3 and rank 3 to 2.
    """
    network = Network(0.0, port_bytes_per_s=1e6)
    times = [
        simulate(direct_reduce_scatter(4, 1000, [250], staggered=on), network=network, op_seconds=FREE).makespan_s
        for on in (True, False)
    ]
    assert times == pytest.approx([3.0, 6.0])


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("world", "subchunks"), [(2, 1), (2, 4), (4, 1), (4, 4)])
def test_overlapped_gemm_takes_the_closed_form(world, subchunks, ratio):
    scatter_s = (world - 1) * 16 * 4000 / 1e9
    gemm_s = scatter_s / ratio
    costs = {"gemm": gemm_s / world / subchunks, "add": 0.0}
    network = Network(0.0, port_bytes_per_s=1e9)
    times = {
        overlap: simulate(
            gemm_reduce_scatter(world, 16, 1, 1000, subchunks=subchunks, overlap=overlap),
            network=network,
            op_seconds=costs,
        ).makespan_s
        for overlap in (True, False)
    }
    assert times[True] == pytest.approx(overlapped_scatter_seconds(world, gemm_s, scatter_s, subchunks), rel=1e-9)
    assert times[False] == pytest.approx(gemm_s + scatter_s, rel=1e-9)


@pytest.mark.parametrize(("drag", "wanted"), [(0.0, 10.0), (0.5, 13.0), (1.0, 16.0)])
def test_a_merge_beside_attention_takes_its_share(drag, wanted):
    """10 s of products; beside them 4 s of merging, then 2 s more, in another lane. Alone a merge is not slowed."""
    draft = Draft("beside", 1)
    given = draft.value(0, "x", "float32", 4, [1], "input")
    first, second, out = (draft.value(0, name, "float32", 4, [1], role) for name, role in
                          (("a", "scratch"), ("b", "scratch"), ("out", "output")))  # fmt: skip
    draft.compute(0, "gemm", [given], [out], flops=1, engine="gemm/float32")
    draft.compute(0, "copy", [given], [first], kind="copy", lane="merge")
    draft.compute(0, "add", [first, first], [second], kind="reduce", lane="merge")
    times = {"gemm": 10.0, "copy": 4.0, "add": 2.0}
    assert simulate(draft.done(), MACHINE, op_seconds=times, drag=drag).makespan_s == pytest.approx(wanted)
    times["gemm"] = 1.0  # merges end last: at 6 s, whatever the products lose
    assert simulate(draft.done(), MACHINE, op_seconds=times, drag=drag).makespan_s == pytest.approx(
        7.0 if drag == 1 else 6.0
    )


def test_unstaggered_overlap_of_two_ranks_by_hand():
    """W = 2, T = 1, both make chunk 0 first: rank 0's first send waits for the whole product, so nothing is hidden."""
    network = Network(0.0, port_bytes_per_s=1e9)
    schedule = gemm_reduce_scatter(2, 16, 1, 1000, staggered=False)
    modelled = simulate(schedule, network=network, op_seconds={"gemm": 32e-6, "add": 0.0})
    assert modelled.makespan_s == pytest.approx(64e-6 + 64e-6)


def test_half_duplex_links_share_their_two_directions():
    schedule = all_to_all(2, 1000, [250])  # 1 MB each way
    for topology in ("port", "pair"):
        times = [
            simulate(schedule, network=Network(0.0, duplex=duplex, **{f"{topology}_bytes_per_s": 1e6}), op_seconds=FREE)
            for duplex in (True, False)
        ]
        assert [t.makespan_s for t in times] == pytest.approx([1.0, 2.0])


def test_a_bus_is_shared_by_all():
    modelled = simulate(ring_all_gather(4, 1000, [250]), network=Network(0.0, bus_bytes_per_s=1e6), op_seconds=FREE)
    assert modelled.makespan_s == pytest.approx(4 * 3 * 1.0)


def test_a_ring_of_links_carries_what_passes_through():
    """4 ranks; each sends 1 MB to the other three: 1 + 2 + 1 hops. 16 MB of hops, the opposite rank clockwise, on 4
    links clockwise and 4 back at 1 MB/s: a link clockwise carries 3 MB, one back 1 MB."""
    network = Network(0.0, pair_bytes_per_s=1e6, ring=True)
    modelled = simulate(all_to_all(4, 1000, [250]), network=network, op_seconds=FREE)
    carried = {use.resource: use.nbytes for use in modelled.uses}
    assert carried == {f"pair {r} {(r + s) % 4}": 3e6 if s == 1 else 1e6 for r in range(4) for s in (1, -1)}
    assert modelled.makespan_s >= 3.0


def test_between_nodes_the_cards_limit():
    """2 nodes of 2, cards of 1 MB/s: both ranks of a node send 1 MB to the same rank of the other, then both to the
    next, so each card in takes 2 MB at a time: 2 · 2 s, and the latency between nodes."""
    network = Network(1e-3, port_bytes_per_s=1e9, node=2, far_bytes_per_s=1e6, far_latency_s=0.5)
    modelled = simulate(all_to_all(4, 1000, [250]), network=network, op_seconds=FREE)
    assert modelled.makespan_s == pytest.approx(4.5, rel=0.01)
    assert simulate(all_to_all(2, 1000, [250]), network=network, op_seconds=FREE).makespan_s == pytest.approx(2e-3)


def test_presets_have_names_and_limits():
    for name, found in PRESETS.items():
        assert preset(name) is found.network
        assert 0 < found.network.most_bytes_per_s(16) < math.inf
    with pytest.raises(UserError, match="nvswitch"):
        preset("torus")


def _plainly(flows, capacity):
    """Max-min fair rates by the definition: of all resources the tightest, again and again."""
    left, rates = dict(capacity), {}
    crossing = {
        r: [f for f, used in flows.items() if r in used] for r in dict.fromkeys(r for u in flows.values() for r in u)
    }
    while len(rates) < len(flows):
        waiting = {r: [f for f in mine if f not in rates] for r, mine in crossing.items()}
        tightest = min((r for r in waiting if waiting[r]), key=lambda r: left[r] / len(waiting[r]))
        rate = left[tightest] / len(waiting[tightest])
        for flow in waiting[tightest]:
            rates[flow] = rate
            for resource in flows[flow]:
                left[resource] -= rate
    return rates


@pytest.mark.parametrize("topology", ["ports", "pairs and ports", "bus", "nodes"])
def test_rates_are_those_of_the_definition(topology, seed):
    """Bit for bit, also where several resources are equally tight."""
    how = {
        "ports": dict(port_bytes_per_s=450e9),
        "pairs and ports": dict(port_bytes_per_s=90e9, pair_bytes_per_s=64e9, duplex=False),
        "bus": dict(bus_bytes_per_s=100e9, pair_bytes_per_s=64e9, ring=True),
        "nodes": dict(port_bytes_per_s=450e9, node=2, far_bytes_per_s=50e9),
    }[topology]
    network, generator = Network(0.0, **how), random.Random(seed)
    for world in range(2, 40):
        ends = [generator.sample(range(world), 2) for _ in range(generator.randint(1, 60))]
        used = [network.resources(*pair, world) for pair in ends]
        flows = {flow: tuple(resources) for flow, resources in enumerate(used)}
        capacity = {r: rate for resources in used for r, rate in resources.items()}
        assert fair_rates(flows, capacity) == _plainly(flows, capacity)


def test_rates_are_max_min_fair():
    capacity = {("a",): 10.0, ("b",): 4.0, ("c",): 100.0}
    flows = {0: [("a",)], 1: [("a",), ("b",)], 2: [("b",), ("c",)], 3: [("c",)], 4: []}
    rates = fair_rates(flows, capacity)
    assert rates == {0: 8.0, 1: 2.0, 2: 2.0, 3: 98.0, 4: math.inf}


def test_bytes_are_conserved(case_name, make_case):
    """What the ports carried, integrated over time, is what the plan sends; what leaves arrives."""
    schedule = make_case(case_name, 4).schedule
    timeline = simulate(schedule, network=Network(1e-6, port_bytes_per_s=1e6))
    costs = rank_costs(schedule)
    carried = {use.resource: use.nbytes for use in timeline.uses}
    for cost in costs:
        assert carried.get(f"port out {cost.rank}", 0.0) == pytest.approx(cost.sent_bytes)
        assert carried.get(f"port in {cost.rank}", 0.0) == pytest.approx(cost.received_bytes)
    moved = {kind: sum(s.nbytes for s in timeline.spans if s.kind == kind) for kind in ("send", "recv")}
    assert moved["send"] == moved["recv"] == sum(cost.sent_bytes for cost in costs)
    for use in timeline.uses:
        assert use.nbytes <= use.busy_s * 1e6 * (1 + 1e-9)  # no link is faster than it is


def test_timeline_respects_lanes_and_values(case_name, make_case):
    schedule = make_case(case_name, 3).schedule
    for rendezvous in (False, True):
        timeline = simulate(schedule, rendezvous=rendezvous)
        for spans in timeline.lanes().values():
            assert all(a.finish_s <= b.reached_s + 1e-12 for a, b in zip(spans, spans[1:]))
        assert all(span.reached_s <= span.start_s <= span.finish_s <= timeline.makespan_s for span in timeline.spans)
        assert timeline == simulate(schedule, rendezvous=rendezvous)


def test_rendezvous_sends_wait_for_their_receive():
    text = """
    schedule late
    world 2
    value x float32[2] input @ 0
    value t token[1] scratch @ 1
    value z float32[2] input @ 1
    value y float32[2] scratch @ 1
    value out float32[2] output @ 1
    goal 1 out[0:2] = x@0[0:2]
    rank 0
    lane a
    send -> 1 m (x[0:2])
    rank 1
    lane compute
    compute slow(z[0:2]) => y[0:2]
    lane b
    wait (y[0:2])
    recv <- 0 m => out[0:2]
    """
    network = Network(0.0, port_bytes_per_s=8.0)
    ends = {
        rendezvous: {s.kind: s for s in simulate(
            parse(text), network=network, op_seconds={"slow": 10.0}, rendezvous=rendezvous
        ).spans}
        for rendezvous in (False, True)
    }  # fmt: skip
    assert (ends[False]["send"].finish_s, ends[False]["recv"].finish_s) == (1.0, 10.0)
    assert (ends[True]["send"].start_s, ends[True]["send"].finish_s, ends[True]["recv"].finish_s) == (10.0, 11.0, 11.0)


def test_rates_come_from_the_machine():
    timeline = simulate(gemm_reduce_scatter(2, 100, 50, 10), MACHINE)
    by_kind = {span.kind: span.seconds for span in timeline.spans}
    assert by_kind["compute"] == pytest.approx(2 * 100 * 50 * 10 / 1e12)
    assert by_kind["reduce"] == pytest.approx(3 * 100 * 10 * 4 / 2 / 10e9)  # two reads and a write, as half-copies
    with pytest.raises(UserError, match="no rate flops\\['attention_forward/float32'\\]"):
        simulate(ring_attention(2, 4), MACHINE)
    with pytest.raises(UserError, match="no link 'gloo'"):
        of_machine(MACHINE, transport="gloo")
    with pytest.raises(UserError, match="topology 'torus'"):
        of_machine(MACHINE, topology="torus")
    with pytest.raises(UserError, match="symbols"):
        simulate(direct_reduce_scatter(2, 4, ["n"]))


def test_a_deadlock_ends_the_simulation_with_an_error():
    text = str(ring_all_gather(2, 4)).replace("  recv <- 1 chunk.1", "  wait (out[4:8])\n  recv <- 1 chunk.1")
    with pytest.raises(RuntimeError, match="stops before its end"):
        simulate(parse(text))


def test_costs_are_the_closed_forms():
    world, chunk = 5, 4 * 3 * 4
    for schedule in (
        ring_all_gather(world, 4, [3]),
        ring_reduce_scatter(world, 4, [3]),
        direct_reduce_scatter(world, 4, [3]),
    ):
        for cost in rank_costs(schedule):
            assert cost.sent_bytes == cost.received_bytes == (world - 1) * chunk
            assert cost.messages_sent == world - 1
    attention = ring_attention(world, 8, batch=2, q_heads=4, kv_heads=2, head_dim=16)
    assert {c.sent_bytes for c in rank_costs(attention)} == {(world - 1) * 2 * 8 * 2 * 2 * 16 * 4}  # 2(P-1)·S·Hkv·D
    assert {c.flops for c in rank_costs(attention)} == {4 * 8 * 8 * world * 2 * 4 * 16}
    # two K, V buffers, one partial result, and the outputs, which the running result shares
    assert buffer_bytes(attention, 0) == 2 * (8 * 2 * 2 * 2 * 16 * 4) + 2 * (8 * 2 * 4 * 16 * 4 + 8 * 2 * 4 * 4)


def test_the_assumed_machine_says_so():
    assert ASSUMED.name == "assumed" and "not measured" in ASSUMED.facts["source"]
