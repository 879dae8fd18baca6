"""Values that live in the tensor which an operation made, so that nothing is copied to where the schedule wants it.

An attention kernel allocates its results itself. Copied into a slot, each costs its memory twice and a pass over it;
adopted, the kernel's tensor *is* the value. `adoptable` says of which values that can be true, from the schedule and
the names of the operations that give: scratch which one action writes as a whole, and all values of its slot likewise,
so that no memory is declared for it. When a value takes over a slot the tensor of the earlier one is let go, at which
moment `check` has proved that nobody uses it any more; so no more tensors live than the schedule has slots.

On a device with streams only the caller's lane gives: its stream has been ordered behind all readers of the earlier
tensor by then, and whoever gets that memory from the allocator next is in the same stream, later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .actions import Compute, Send
from .graph import Graph
from .ops import Giving, Op
from .storage import Storage


@dataclass(frozen=True)
class Adopted:
    """`former`: for each value that is adopted the one before it in its slot, or ''. `sent`: values that messages read,
    which must be dense."""

    former: Mapping[str, str]
    sent: frozenset[str]


NOTHING = Adopted({}, frozenset())


def adoptable(graph: Graph, rank: int, lane: str, giving: frozenset[str]) -> Adopted:
    """The values of `rank` that actions of `lane` by operations in `giving` write as a whole."""
    values = graph.schedule.by_rank[rank]
    mine = [node for node in graph.nodes if node.rank == rank]
    written = {
        part.value
        for node in mine
        if isinstance(node.action, Compute) and node.lane == lane and node.action.op in giving
        for part in node.action.writes
        if part == values[part.value].all() and values[part.value].role == "scratch"
    }
    slots = dict[str, list[str]]()
    for name, value in values.items():
        slots.setdefault(f"slot {value.slot}" if value.slot else name, []).append(name)
    former = {
        name: before
        for owners in slots.values()
        if written.issuperset(owners)
        for before, name in zip(("", *owners), owners)
    }
    return Adopted(former, frozenset(s.value for n in mine if isinstance(n.action, Send) for s in n.action.reads))


def perform(op: Op, action: Compute, storage: Storage, params: Mapping[str, Any]) -> None:
    """Do an operation: what it gives is adopted where the storage may, everything else is written in place."""
    mine = [part.value for part in action.writes if part.value in storage.former]
    if not mine or not isinstance(op, Giving):
        op(storage.views(action.reads), storage.views(action.writes), **params)
        return
    for name in mine:
        storage.let_go(storage.former[name])
    reads = storage.views(action.reads)
    found = op.give(reads, **params)
    if found is None:
        for name in mine:
            storage.allocate(name)
        op(reads, storage.views(action.writes), **params)
        return
    for at, (part, tensor) in enumerate(zip(action.writes, found)):
        if part.value in storage.former:
            storage.adopt(part.value, tensor, loose=at in op.loose)
        else:
            storage.rows(part).copy_(tensor)
