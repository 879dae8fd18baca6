"""Cases that every reader of schedules is tried on: a schedule, inputs, operations, and the answer by other means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from undertow.comms.builders.all_gather import ring_all_gather
from undertow.comms.builders.all_to_all import all_to_all
from undertow.comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from undertow.comms.builders.reduce_scatter import direct_reduce_scatter, ring_reduce_scatter
from undertow.comms.builders.ring_attention import ring_attention
from undertow.comms.ops import Ops
from undertow.comms.schedule import Schedule


@dataclass
class Case:
    schedule: Schedule
    inputs: list[dict[str, torch.Tensor]]
    expected: list[dict[str, torch.Tensor]]
    ops: Ops
    exact: bool = True  # integers in floats: every order of summation gives the same bits

    def matches(self, outputs: list[dict[str, torch.Tensor]]) -> bool:
        """Exact cases bit for bit; attention to 2e-6: float32 storage of a few merges of values below 4."""
        return all(
            torch.equal(got[name], want)
            if self.exact
            else torch.allclose(got[name].double(), want.double(), rtol=2e-6, atol=2e-6)
            for got, wanted in zip(outputs, self.expected)
            for name, want in wanted.items()
        )


def attend(reads, writes, causal=False):
    """One block of attention in float64, straight from the definition."""
    q_lbhd, kv = reads
    k_lbhd, v_lbhd = (kv[:, i].double().repeat_interleave(q_lbhd.shape[2] // kv.shape[3], dim=2) for i in (0, 1))
    scores = torch.einsum("qbhd,kbhd->bhqk", q_lbhd.double(), k_lbhd) * q_lbhd.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    writes[0].copy_(torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), v_lbhd))
    writes[1].copy_(scores.logsumexp(-1).permute(2, 0, 1))


def merge_lse(reads, writes):
    """Join two partial (out, log-sum-exp); may be asked to write over what it reads."""
    out, lse, more, more_lse = (part.double() for part in reads)
    total = torch.logaddexp(lse, more_lse)
    joined = out * (lse - total).exp()[..., None] + more * (more_lse - total).exp()[..., None]
    writes[0].copy_(joined)
    writes[1].copy_(total)


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


def _sizes(rows, world: int) -> list[int]:
    return [rows] * world if isinstance(rows, int) else list(rows)


def _gather(world: int, rows) -> Case:
    x = [whole(n, 3) for n in _sizes(rows, world)]
    return Case(ring_all_gather(world, rows, [3]), [{"x": t} for t in x], [{"out": torch.cat(x)}] * world, {})


def _scatter(build: Callable[..., Schedule], **options):
    def make(world: int, rows) -> Case:
        sizes = _sizes(rows, world)
        x = [whole(sum(sizes), 3) for _ in sizes]
        parts = torch.stack(x).sum(0).split(sizes)
        return Case(build(world, rows, [3], **options), [{"x": t} for t in x], [{"out": t} for t in parts], {})

    return make


def _to_all(world: int, rows) -> Case:
    sizes = _sizes(rows, world)
    table = rows if isinstance(rows, int) else [[(n + i) % 4 for n in sizes] for i in range(world)]
    counts = [[rows] * world] * world if isinstance(rows, int) else table
    x = [[whole(n, 3) for n in line] for line in counts]
    expected = [{"out": torch.cat([x[i][j] for i in range(world)])} for j in range(world)]
    return Case(all_to_all(world, table, [3]), [{"x": torch.cat(line)} for line in x], expected, {})


def _gemm(**options):
    def make(world: int, rows) -> Case:
        sizes = _sizes(rows, world)
        x, w = [whole(sum(sizes), 4) for _ in sizes], [whole(4, 5) for _ in sizes]
        parts = sum((a @ b for a, b in zip(x, w)), torch.zeros(sum(sizes), 5)).split(sizes)
        schedule = gemm_reduce_scatter(world, rows, 4, 5, **options)
        return Case(schedule, [{"x": a, "w": b} for a, b in zip(x, w)], [{"out": t} for t in parts], {})

    return make


def _attention(causal: bool):
    def make(world: int, rows) -> Case:
        sizes = _sizes(rows, world)
        q, kv = [torch.randn(n, 2, 4, 8) for n in sizes], [torch.randn(n, 2, 2, 2, 8) for n in sizes]
        out, lse = torch.empty(sum(sizes), 2, 4, 8), torch.empty(sum(sizes), 2, 4)
        attend((torch.cat(q), torch.cat(kv)), (out, lse), causal=causal)
        schedule = ring_attention(world, rows, batch=2, q_heads=4, kv_heads=2, head_dim=8, causal=causal)
        expected = [{"out": a, "lse": b} for a, b in zip(out.split(sizes), lse.split(sizes))]
        inputs = [{"q": a, "kv": b} for a, b in zip(q, kv)]
        return Case(schedule, inputs, expected, {"attend": attend, "merge_lse": merge_lse}, exact=False)

    return make


MAKERS: dict[str, Callable[..., Case]] = {
    "all_gather": _gather,
    "all_to_all": _to_all,
    "reduce_scatter_direct": _scatter(direct_reduce_scatter, subchunks=2),
    "reduce_scatter_by_distance": _scatter(direct_reduce_scatter, sum_order="distance"),
    "reduce_scatter_unstaggered": _scatter(direct_reduce_scatter, staggered=False),
    "reduce_scatter_ring": _scatter(ring_reduce_scatter),
    "reduce_scatter_ring_subchunks": _scatter(ring_reduce_scatter, subchunks=3),
    "gemm_direct": _gemm(subchunks=2),
    "gemm_ring": _gemm(algorithm="ring", subchunks=2),
    "gemm_sequential": _gemm(overlap=False),
    "attention": _attention(False),
    "attention_causal": _attention(True),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        metafunc.parametrize("case_name", list(MAKERS))


@pytest.fixture
def make_case(seed: int) -> Callable[..., Case]:
    """`make_case(name, world, rows=4)`: rows per rank, one number or one for each rank."""
    return lambda name, world, rows=4: MAKERS[name](world, rows)


@pytest.fixture
def case_names() -> list[str]:
    return list(MAKERS)


class FakeEvent:
    """A wait for an event that nobody has recorded would order nothing on a device; here it raises."""

    def __init__(self, streams: FakeStreams) -> None:
        self.streams, self.recorded = streams, False

    def record(self, stream: str) -> None:
        self.recorded = True
        self.streams.log.append(("record", self, stream))

    def wait(self, stream: str) -> None:
        assert self.recorded, "a wait for an event that has not been recorded"
        self.streams.log.append(("wait", self, stream))

    def query(self) -> bool:
        return self.recorded


class FakeStreams:
    """Streams that only write down what they are told; a stream is its name, the caller's is called 'caller'."""

    def __init__(self) -> None:
        self.log: list[tuple[str, FakeEvent, str]] = []
        self.now = "caller"

    def current(self) -> str:
        return self.now

    def use(self, stream: str) -> None:
        self.now = stream

    def lane(self, name: str) -> str:
        return f"lane {name}"

    def event(self) -> FakeEvent:
        return FakeEvent(self)


@pytest.fixture
def fake_streams() -> type[FakeStreams]:
    """What a device's streams look like to an executor that queues."""
    return FakeStreams
