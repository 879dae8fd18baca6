"""Waits for counts and writes of counts inside a CUDA graph, whose values move on from launch to launch.

A stream's wait for a value or write of one (`stream_wait`) becomes a node of the graph when it is captured, with the
value that was true then; at a second launch every wait would be over at once. The values of an instantiated graph can
be set before each launch, which leaves launches that are on their way as they are. Counts need no kernel and no reset
so, and a rank that replays its call understands one that queues it anew.
Source: CUDA driver API, "Graph Management", cuGraphExecBatchMemOpNodeSetParams.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from ..dist.errors import UndertowError

_BATCH_MEM_OP = 12  # CU_GRAPH_NODE_TYPE_BATCH_MEM_OP


class _Parameters(ctypes.Structure):
    """CUstreamBatchMemOpParams of a 32-bit wait or write."""

    _fields_ = (
        ("operation", ctypes.c_uint),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("padding", ctypes.c_uint64),
    )


class _Node(ctypes.Structure):
    """CUDA_BATCH_MEM_OP_NODE_PARAMS."""

    _fields_ = (
        ("context", ctypes.c_void_p),
        ("count", ctypes.c_uint),
        ("operations", ctypes.POINTER(_Parameters)),
        ("flags", ctypes.c_uint),
    )


class Count(NamedTuple):
    """A node that waits until the int32 at `address` is `value`, or that writes it."""

    node: int
    context: int
    operation: int
    address: int
    value: int
    flags: int


@cache
def _driver() -> Any:
    library, address = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p
    library.cuGraphGetNodes.argtypes = [address] * 3
    library.cuGraphNodeGetType.argtypes = [address] * 2
    library.cuGraphBatchMemOpNodeGetParams.argtypes = [address] * 2
    library.cuGraphExecBatchMemOpNodeSetParams.argtypes = [address] * 3
    return library


def counts_of(graph: int) -> list[Count]:
    """All nodes of a graph (its handle) that wait for counts or write them."""
    driver, many = _driver(), ctypes.c_size_t()
    _check(driver.cuGraphGetNodes(graph, None, ctypes.byref(many)), "cuGraphGetNodes")
    nodes, found = (ctypes.c_void_p * many.value)(), []
    _check(driver.cuGraphGetNodes(graph, nodes, ctypes.byref(many)), "cuGraphGetNodes")
    for node in nodes:
        kind, all_of = ctypes.c_int(), _Node()
        _check(driver.cuGraphNodeGetType(node, ctypes.byref(kind)), "cuGraphNodeGetType")
        if kind.value != _BATCH_MEM_OP:
            continue
        _check(driver.cuGraphBatchMemOpNodeGetParams(node, ctypes.byref(all_of)), "cuGraphBatchMemOpNodeGetParams")
        if all_of.count != 1:
            raise UndertowError(
                f"a node of {all_of.count} operations in memory; expected one, as each was queued alone"
            )
        one = all_of.operations[0]
        found.append(Count(node, all_of.context, one.operation, one.address, one.value % 2**32, one.flags))
    return found


def set_counts(launchable: int, counts: Sequence[tuple[Count, int]]) -> None:
    """From its next launch on, an instantiated graph (its handle) waits for these values and writes them."""
    change = _driver().cuGraphExecBatchMemOpNodeSetParams
    one, all_of = _Parameters(), _Node(None, 1, None, 0)
    all_of.operations = ctypes.pointer(one)
    for count, value in counts:
        one.operation, one.address, one.flags, one.value = count.operation, count.address, count.flags, value % 2**32
        all_of.context = count.context
        if code := change(launchable, count.node, ctypes.byref(all_of)):
            _check(code, "cuGraphExecBatchMemOpNodeSetParams")


def places(rank: int, counts: Sequence[torch.Tensor]) -> dict[int, tuple[int, int]]:
    """By address, whether a count of `rank` is of what it has sent (0) or received (1), and to or from whom.

    `counts[r]`: of rank r, int32 [2, world]: what has come from each rank, and what each has taken.
    """
    at, world, found = [each.data_ptr() for each in counts], len(counts), dict[int, tuple[int, int]]()
    for peer in set(range(world)) - {rank}:
        found[at[peer] + 4 * rank] = found[at[rank] + 4 * (world + peer)] = 0, peer
        found[at[rank] + 4 * peer] = found[at[peer] + 4 * (world + rank)] = 1, peer
    return found


class Recorded:
    """The counts of one recorded call.

    `graph`, `launchable`: the handles of a CUDA graph and of its instance, which live as long as this. `places`: by
    address, which list a count is of, and where in it. `before`, `after`: these lists as the call found and left them.
    """

    def __init__(
        self,
        graph: int,
        launchable: int,
        places: Mapping[int, tuple[int, int]],
        before: Sequence[Sequence[int]],
        after: Sequence[Sequence[int]],
    ) -> None:
        self._launchable = launchable
        self._counts = [
            (count, which, at, count.value - before[which][at])
            for count in counts_of(graph)
            for which, at in (places[count.address],)
        ]
        self._more = [[high - low for low, high in zip(*ends)] for ends in zip(before, after)]

    def advance(self, now: Sequence[list[int]]) -> None:
        """Let the next launch go on from the lists `now`, and these to where it leaves them."""
        set_counts(self._launchable, [(count, now[which][at] + more) for count, which, at, more in self._counts])
        for counts, more in zip(now, self._more):
            for at, each in enumerate(more):
                counts[at] += each


def _check(code: int, what: str) -> None:
    if code:
        raise UndertowError(f"{what} gave CUDA driver error {code}")
