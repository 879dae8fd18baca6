"""Pre-flight: what a training job would do on a cluster, from the planners of all systems; pure, no tensor, no process.

Each answer is a `Line` that names the calculation behind it and where its rates come from. All answers are modelled;
what differs is whether the rates below them were measured (a machine file of `undertow probe`) or assumed. The order
is that of a user's questions: does it fit, how long is a step, which attention schedule and which overlap, what do
checkpoints cost, and what is left after failures. `plan_compare` puts a run's measured numbers beside these.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..comms.builders.attention_shape import Heads
from ..comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from ..comms.cost import ring_seconds
from ..comms.simulate import ASSUMED, simulate
from ..dist.machine import Machine
from ..dist.units import format_bytes, format_rate, format_seconds
from ..parallel.masks import Mask
from ..parallel.token_ring.planner import Choice, Rates, choose
from ..parallel.token_ring.problem import Problem
from .plan_job import Job, Line, flops, link_of, rate, source, torch_links
from .plan_memory import Footprint, footprint, kept_derived
from .plan_saves import Saves, saves

COLLECTIVES = 12  # of a layer and step: two gathers and two scatters, in forward, forward again and backward
GAIN = 0.97  # an overlap must be predicted to take at most so much of the sequential time
OPERATIONS = 250  # of a layer's forward and backward and of its weights' update
LAUNCH_S = 20e-6  # assumed: host time of one, with its part of autograd
TRAFFIC_BYTES_PER_S = 3.0e12  # assumed: reads and writes of a device's memory


@dataclass(frozen=True)
class Preflight:
    """The answers, with the numbers that a caller may want. `fits`: whether the device's memory suffices; `peak_bytes`
    on the device; `saves`: what checkpoints cost; `goodput` under failures."""

    lines: tuple[Line, ...]
    fits: bool
    peak_bytes: int
    step_s: float
    saves: Saves

    @property
    def goodput(self) -> float:
        return self.saves.goodput


def preflight(job: Job, machine: Machine | None = None) -> Preflight:
    """All answers for `job` on `machine` (None: assumed rates)."""
    machine = torch_links(machine)
    memory = footprint(job)
    compute, compute_s = _compute(job, memory, machine)
    between, between_s = _between(job, memory, machine)
    attention, attention_s = _attention(job, memory, machine)
    tensor, tensor_s = _overlap(job, memory, machine)
    sync, sync_s = _gradients(job, machine)
    launches_s = OPERATIONS * LAUNCH_S * job.shape.layers * (len(memory.streamed.bounds) if memory.streamed else 1)
    device_s = compute_s + between_s + attention_s + tensor_s + sync_s
    step_s = max(device_s, launches_s)
    launches = Line(
        "launches",
        f"{format_seconds(launches_s)}{', the longer' if launches_s > device_s else ', hidden'}",
        f"{OPERATIONS} operations of a layer and chunk × {format_seconds(LAUNCH_S)} of the host",
        source(False),
    )
    total = Line(
        "step time",
        f"{format_seconds(step_s)}, {job.batch * job.data * job.tokens / step_s:,.0f} tokens/s",
        "products + between products + attention schedule + exposed tensor-parallel + gradients; at least launches",
        source(all("assumed" not in line.source for line in (compute, between, *attention, *tensor, *sync))),
    )
    kept = saves(job, machine, step_s)
    lines = (*memory.lines, compute, between, *attention, *tensor, *sync, launches, total, *kept.lines)
    return Preflight(lines, memory.fits, memory.peak_bytes, step_s, kept)


def _compute(job: Job, memory: Footprint, machine: Machine | None) -> tuple[Line, float]:
    work = memory.work(job)
    if job.context > 1:  # the attention schedule has its own line, with its compute and its messages
        work = {kind: amount for kind, amount in work.items() if not kind.startswith("attention")}
    rates = {kind: flops(machine, kind, job.dtype) for kind in work}
    ranks = job.context * job.tensor
    seconds = sum(amount / rates[kind].value for kind, amount in work.items()) / ranks
    answer = f"{format_seconds(seconds)} for {sum(work.values()) / 1e12 / ranks:,.3g} TFLOP in {job.dtype}"
    name = "step_flops" if memory.streamed else "plain_flops"
    form = f"parallel.memory_model.{name} ÷ rates, over context × tensor ranks"
    return Line("products of a rank", answer, form, source(*(each.measured for each in rates.values()))), seconds


def _between(job: Job, memory: Footprint, machine: Machine | None) -> tuple[Line, float]:
    """Memory traffic of everything that is no product. A copy's rate counts each byte once, here both ways count."""
    nbytes = memory.traffic_bytes(job)
    copy = rate(machine, "copies", ("d2d", "host"), TRAFFIC_BYTES_PER_S / 2)
    seconds = nbytes / (2 * copy.value)
    form = f"plan_memory.traffic_bytes: {format_bytes(nbytes)} read and written ÷ {format_rate(2 * copy.value)}"
    line = Line("between products", format_seconds(seconds), form, source(copy.measured))
    return line, seconds


def _attention(job: Job, memory: Footprint, machine: Machine | None) -> tuple[list[Line], float]:
    """All layers' attention with what its schedule cannot hide; 0 without a context axis, where compute has it."""
    if job.context == 1:
        return [Line("attention schedule", "none needed: whole sequences", "context degree 1", "modelled")], 0.0
    shape = job.shape
    q_heads, kv_heads = shape.heads // job.tensor, max(1, shape.kv_heads // job.tensor)
    heads = Heads(job.batch, q_heads, kv_heads, shape.head_dim, shape.head_dim, job.dtype)
    problem = Problem(job.context, job.tokens, job.tokens, heads, Mask(causal=True))
    rates = Rates.of(machine, job.dtype)
    kept, derived = kept_derived(memory.streamed)
    lines, total_s = [], 0.0
    for backward in (False, True):
        choice: Choice = choose(problem, rates, backward=backward)
        best = next(estimate for estimate in choice.estimates if estimate.name == choice.name)
        again = 2 - kept + derived if memory.streamed else 1.0  # forward runs again
        total_s += best.seconds * shape.layers * (1.0 if backward else again)
        answer = f"{choice.name}: {format_seconds(best.seconds)} a layer, {format_bytes(best.sent_bytes)} sent"
        answer += f", {format_bytes(best.buffer_bytes)} of buffers" if best.buffer_bytes else ""
        form = "parallel.token_ring.planner.choose: every schedule, simulated"
        lines.append(Line(f"attention schedule, {choice.phase}", answer, form, source(link_of(machine)[2])))
    return lines, total_s


def _overlap(job: Job, memory: Footprint, machine: Machine | None) -> tuple[list[Line], float]:
    """What a layer's collectives add to its products, each taken as the reduce-scatter after a row-parallel one."""
    if job.tensor == 1:
        return [Line("overlap engine", "none needed: no tensor axis", "tensor degree 1", "modelled")], 0.0
    _, link, measured = link_of(machine)
    gemm, shape = flops(machine, "gemm", job.dtype), job.shape
    copies = machine.copies if machine is not None and machine.copies else ASSUMED.copies
    modelled = Machine(
        "plan", links={"link": link}, copies=dict(copies), flops={**ASSUMED.flops, f"gemm/{job.dtype}": gemm.value}
    )
    rows = max(1, job.batch * job.rows)
    exposed_s, gains = 0.0, []
    collectives = COLLECTIVES if memory.streamed else COLLECTIVES * 2 // 3
    for inner in (shape.q, shape.hidden):
        k = inner // job.tensor
        overlapped, sequential = (
            simulate(
                gemm_reduce_scatter(job.tensor, rows, k, shape.width, job.dtype, subchunks=4, overlap=overlap), modelled
            ).makespan_s
            for overlap in (True, False)
        )
        gemm_s = 2 * rows * job.tensor * k * shape.width / gemm.value
        best_s = overlapped if overlapped <= GAIN * sequential else sequential
        gains.append(sequential / overlapped)
        exposed_s += collectives / 2 * max(0.0, best_s - gemm_s) * shape.layers
    on = min(gains) >= 1 / GAIN
    answer = f"{'tracked chunks' if on else 'sequential'}: {gains[0]:.2f}× and {gains[1]:.2f}× as fast overlapped"
    form = "comms.simulate of gemm_reduce_scatter, overlapped against sequential, attention and MLP output"
    return [Line("overlap engine", answer, form, source(measured, gemm.measured))], exposed_s


def _gradients(job: Job, machine: Machine | None) -> tuple[list[Line], float]:
    world = job.data * job.context  # ranks that share a row hold the same weights
    if world == 1:
        return [], 0.0
    name, link, measured = link_of(machine)
    nbytes = job.shape.parameters * job.weight / job.tensor
    passes = 3 if job.sharded else 2  # reduce-scatter and all-gather; sharded weights are gathered twice
    seconds = passes * ring_seconds(world, nbytes / world, link)
    answer = f"{format_seconds(seconds)} over {name} at {format_rate(link.bytes_per_s)}"
    form = f"{passes} × comms.cost.ring_seconds({world}, {format_bytes(nbytes / world)}); counted as not hidden"
    return [Line("gradients and weights", answer, form, source(measured))], seconds
