"""Pre-flight: what a training job would do on a cluster, from the planners of all systems; pure, no tensor, no process.

Each answer is a `Line` that names the calculation behind it and where its rates come from. All answers are modelled;
what differs is whether the rates below them were measured (a machine file of `undertow probe`) or assumed. The order
is that of a user's questions: does it fit, how long is a step, which attention schedule and which overlap, what do
checkpoints cost, and what is left after failures.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..checkpointing.frequency import Frequency
from ..comms.builders.attention_shape import Heads
from ..comms.builders.gemm_reduce_scatter import gemm_reduce_scatter
from ..comms.cost import ring_seconds
from ..comms.network import fastest
from ..comms.simulate import ASSUMED, simulate
from ..dist.errors import UserError
from ..dist.machine import Link, Machine
from ..dist.units import format_bytes, format_rate, format_seconds
from ..parallel.masks import Mask
from ..parallel.memory_model import DecoderShape, step_flops
from ..parallel.stream.plan import StreamPlan
from ..parallel.stream.planner import plan as plan_stream
from ..parallel.token_ring.planner import Choice, Rates, choose
from ..parallel.token_ring.problem import Problem

DTYPE = "bfloat16"
DISK_BYTES_PER_S = 1.0e9  # assumed, per rank
PCIE_BYTES_PER_S = 25e9  # assumed, pinned device to host
RESTART_S = 180.0  # assumed: notice, start the processes, join, read the checkpoint
COLLECTIVES = 12  # of a layer and step: two gathers and two scatters, in forward, forward again and backward
GAIN = 0.97  # an overlap must be predicted to take at most so much of the sequential time


@dataclass(frozen=True)
class Job:
    """`ranks` = data × context × tensor. `batch` sequences of `tokens` for each data-parallel rank. `state_bytes` of
    the optimizer per parameter. `sharded`: weights, gradients and state are spread over the data axis (ZeRO 3, FSDP).
    `device_bytes`, `host_bytes` per rank. `mtbf_s` of the whole job."""

    shape: DecoderShape
    ranks: int
    tokens: int
    batch: int = 1
    context: int = 1
    tensor: int = 1
    state_bytes: int = 12
    sharded: bool = True
    device_bytes: int = 80_000_000_000
    host_bytes: int = 0
    mtbf_s: float = 6 * 3600.0
    restart_s: float = RESTART_S

    def __post_init__(self) -> None:
        if min(self.ranks, self.tokens, self.batch, self.context, self.tensor) < 1:
            raise UserError("ranks, tokens, batch and degrees", expected="at least 1 each")
        if self.ranks % (self.context * self.tensor):
            raise UserError(
                f"{self.ranks} ranks, context {self.context} × tensor {self.tensor}",
                expected="data × context × tensor = ranks",
                remedy=f"--ranks {self.context * self.tensor * max(1, self.ranks // (self.context * self.tensor))}",
            )
        if self.tokens % self.context:
            raise UserError(f"{self.tokens} tokens over {self.context} ranks", expected="a multiple of the degree")
        if self.shape.heads % self.tensor or self.shape.hidden % self.tensor:
            raise UserError(
                f"{self.shape.heads} heads, {self.shape.hidden} channels over {self.tensor} ranks",
                expected="a tensor degree that divides both",
            )

    @property
    def data(self) -> int:
        return self.ranks // (self.context * self.tensor)

    @property
    def rows(self) -> int:
        """Tokens of one sequence on one rank."""
        return self.tokens // self.context


@dataclass(frozen=True)
class Line:
    """One answer. `source`: 'modelled, measured rates' or 'modelled, assumed rates'."""

    question: str
    answer: str
    calculation: str
    source: str


@dataclass(frozen=True)
class Rated:
    """A rate, and whether a machine file holds it."""

    value: float
    measured: bool


@dataclass(frozen=True)
class Preflight:
    """The answers, with the numbers that a caller may want. `fits`: whether the device's memory suffices."""

    lines: tuple[Line, ...]
    fits: bool
    step_s: float
    goodput: float


def preflight(job: Job, machine: Machine | None = None) -> Preflight:
    """All answers for `job` on `machine` (None: assumed rates)."""
    rates = machine or ASSUMED
    memory, made, fits = _memory(job)
    compute, compute_s = _compute(job, made, machine)
    attention, attention_s = _attention(job, made, machine)
    tensor, tensor_s = _overlap(job, rates, machine)
    sync, sync_s = _gradients(job, rates, machine)
    step_s = compute_s + attention_s + tensor_s + sync_s
    total = Line(
        "step time",
        f"{format_seconds(step_s)}, {job.batch * job.data * job.tokens / step_s:,.0f} tokens/s",
        "compute + attention schedule + exposed tensor-parallel + gradients, nothing of these hidden",
        _source(machine is not None),
    )
    saves, goodput = _checkpoints(job, machine, step_s)
    return Preflight((*memory, compute, *attention, *tensor, *sync, total, *saves), fits, step_s, goodput)


def _source(*measured: bool) -> str:
    return "modelled, measured rates" if all(measured) else "modelled, assumed rates"


def _rate(machine: Machine | None, table: str, keys: tuple[str, ...], assumed: float) -> Rated:
    known: dict[str, float] = getattr(machine, table) if machine else {}
    found = next((known[key] for key in keys if known.get(key)), None)
    return Rated(assumed if found is None else found, found is not None)


def _link(machine: Machine | None, rates: Machine) -> tuple[Link, bool]:
    known = machine is not None and bool(machine.links)
    source = rates if known else ASSUMED
    return source.links[fastest(source)], known


def _memory(job: Job) -> tuple[list[Line], StreamPlan, bool]:
    shape = job.shape
    share = job.tensor * (job.data if job.sharded else 1)
    resident = shape.parameters * (2 * shape.element_size + job.state_bytes) // share
    gathered = 2 * shape.layer_parameters * shape.element_size // job.tensor if job.sharded and job.data > 1 else 0
    budget = job.device_bytes - resident - gathered
    form = f"parameters × ({2 * shape.element_size} + {job.state_bytes} B) / {share} + two gathered layers"
    state = Line("weights, gradients, state", format_bytes(resident + gathered), form, "modelled")
    made = plan_stream(shape, job.batch, job.rows, budget_bytes=max(budget, 1), host_bytes=job.host_bytes)
    fits = budget > 0 and "exceeds" not in made.reason
    peak = resident + gathered + made.device_bytes
    verdict = "yes" if fits else "no"
    answer = f"{verdict}: peak {format_bytes(peak)} of {format_bytes(job.device_bytes)}"
    streamed = f"{len(made.bounds)} chunks of {made.chunk} rows" if len(made.bounds) > 1 else "not needed: one chunk"
    lines = [
        state,
        Line(
            "does it fit", answer, "parallel.memory_model.moments, tensor split of activations not counted", "modelled"
        ),
        Line("streamed backpropagation", streamed, "parallel.stream.planner.plan: least work that fits", "modelled"),
    ]
    return lines, made, fits


def _kept_derived(made: StreamPlan) -> tuple[float, float]:
    """Fractions of the layers whose attention output is kept, and whose input is computed again."""
    kept = sum(place != "none" for place in made.attention) / len(made.attention)
    return kept, made.inputs.count("derived") / len(made.inputs)


def _compute(job: Job, made: StreamPlan, machine: Machine | None) -> tuple[Line, float]:
    kept, derived = _kept_derived(made)
    work = step_flops(job.shape, job.batch, job.tokens, attention_kept=kept, derived=derived, chunks=len(made.bounds))
    if job.context > 1:  # the attention schedule has its own line, with its compute and its messages
        work = {kind: flops for kind, flops in work.items() if not kind.startswith("attention")}
    rates = {kind: _rate(machine, "flops", (f"{kind}/{DTYPE}",), ASSUMED.flops[f"{kind}/{DTYPE}"]) for kind in work}
    seconds = sum(flops / rates[kind].value for kind, flops in work.items()) / (job.context * job.tensor)
    answer = f"{format_seconds(seconds)} for {sum(work.values()) / 1e12 / (job.context * job.tensor):,.1f} TFLOP"
    form = "parallel.memory_model.step_flops ÷ rates, over context × tensor ranks"
    return Line("compute of a rank", answer, form, _source(*(rate.measured for rate in rates.values()))), seconds


def _attention(job: Job, made: StreamPlan, machine: Machine | None) -> tuple[list[Line], float]:
    """All layers' attention with what its schedule cannot hide; 0 without a context axis, where compute has it."""
    if job.context == 1:
        return [Line("attention schedule", "none needed: whole sequences", "context degree 1", "modelled")], 0.0
    shape = job.shape
    q_heads, kv_heads = shape.heads // job.tensor, max(1, shape.kv_heads // job.tensor)
    heads = Heads(job.batch, q_heads, kv_heads, shape.head_dim, shape.head_dim, DTYPE)
    problem = Problem(job.context, job.tokens, job.tokens, heads, Mask(causal=True))
    rates = Rates.of(machine, DTYPE)
    kept, derived = _kept_derived(made)
    lines, total_s = [], 0.0
    for backward in (False, True):
        choice: Choice = choose(problem, rates, backward=backward)
        best = next(estimate for estimate in choice.estimates if estimate.name == choice.name)
        total_s += best.seconds * shape.layers * (1.0 if backward else 2 - kept + derived)  # forward runs again
        answer = f"{choice.name}: {format_seconds(best.seconds)} a layer, {format_bytes(best.sent_bytes)} sent"
        form = "parallel.token_ring.planner.choose: every schedule, simulated"
        source = _source(machine is not None and bool(machine.links))
        lines.append(Line(f"attention schedule, {choice.phase}", answer, form, source))
    return lines, total_s


def _overlap(job: Job, rates: Machine, machine: Machine | None) -> tuple[list[Line], float]:
    """What a layer's collectives add to its products, each taken as the reduce-scatter after a row-parallel one."""
    if job.tensor == 1:
        return [Line("overlap engine", "none needed: no tensor axis", "tensor degree 1", "modelled")], 0.0
    link, measured = _link(machine, rates)
    known = f"gemm/{DTYPE}" in rates.flops
    shape = job.shape
    flops = rates.flops if known else ASSUMED.flops
    copies = rates.copies or ASSUMED.copies
    modelled = Machine(rates.name, links={"link": link}, copies=copies, flops=flops)
    rows = max(job.tensor, job.batch * job.rows) // job.tensor
    exposed_s, gains = 0.0, []
    for inner in (shape.q, shape.hidden):
        k = inner // job.tensor
        overlapped, sequential = (
            simulate(
                gemm_reduce_scatter(job.tensor, rows, k, shape.width, DTYPE, subchunks=4, overlap=overlap), modelled
            ).makespan_s
            for overlap in (True, False)
        )
        gemm_s = 2 * rows * job.tensor * k * shape.width / flops[f"gemm/{DTYPE}"]
        best_s = overlapped if overlapped <= GAIN * sequential else sequential
        gains.append(sequential / overlapped)
        exposed_s += COLLECTIVES / 2 * max(0.0, best_s - gemm_s) * shape.layers
    on = min(gains) >= 1 / GAIN
    answer = f"{'tracked chunks' if on else 'sequential'}: {gains[0]:.2f}× and {gains[1]:.2f}× as fast overlapped"
    form = "comms.simulate of gemm_reduce_scatter, overlapped against sequential, attention and MLP output"
    return [Line("overlap engine", answer, form, _source(measured, known and machine is not None))], exposed_s


def _gradients(job: Job, rates: Machine, machine: Machine | None) -> tuple[list[Line], float]:
    world = job.data * job.context  # ranks that share a row hold the same weights
    if world == 1:
        return [], 0.0
    link, measured = _link(machine, rates)
    nbytes = job.shape.parameters * job.shape.element_size / job.tensor
    passes = 3 if job.sharded else 2  # reduce-scatter and all-gather; sharded weights are gathered twice
    seconds = passes * ring_seconds(world, nbytes / world, link)
    answer = f"{format_seconds(seconds)} over {format_rate(link.bytes_per_s)}"
    form = f"{passes} × comms.cost.ring_seconds({world}, {format_bytes(nbytes / world)}); counted as not hidden"
    return [Line("gradients and weights", answer, form, _source(measured))], seconds


def _checkpoints(job: Job, machine: Machine | None, step_s: float) -> tuple[list[Line], float]:
    nbytes = job.shape.parameters * (job.shape.element_size + job.state_bytes) / job.ranks
    copy = _rate(machine, "copies", ("d2h_pinned", "host"), PCIE_BYTES_PER_S)
    disk = _rate(machine, "disks", ("write_direct", "write_buffered"), DISK_BYTES_PER_S)
    copy_s, commit_s = nbytes / copy.value, nbytes / copy.value + nbytes / disk.value
    stall_s = max(0.0, copy_s - 0.9 * step_s)  # what has not left when the optimizer begins
    frequency = Frequency(mtbf_s=job.mtbf_s)
    interval_s = max(step_s, frequency.interval_s(stall_s=stall_s, commit_s=commit_s))
    steps = max(1, round(interval_s / step_s))
    loss = stall_s / interval_s + (interval_s / 2 + commit_s + job.restart_s) / job.mtbf_s
    goodput = max(0.0, 1.0 - loss)
    source = _source(copy.measured, disk.measured)
    host = nbytes * 2 <= job.host_bytes
    tiers = f"{'host memory and disk' if host else 'disk'}: {format_bytes(nbytes)} a rank"
    kept = "2 generations fit" if host else f"2 generations need {format_bytes(2 * nbytes)}"
    lines = [
        Line("checkpoint tiers", tiers, f"(weights + state) / ranks; {kept} in the host's budget", "modelled"),
        Line(
            "checkpoint cost",
            f"stall {format_seconds(stall_s)}, durable after {format_seconds(commit_s)}",
            f"copy at {format_rate(copy.value)} beyond 90 % of a step; then disk at {format_rate(disk.value)}",
            source,
        ),
        Line(
            "checkpoint interval",
            f"every {steps} steps ({format_seconds(interval_s)})",
            f"checkpointing.frequency (Daly 2006), a failure every {format_seconds(job.mtbf_s)}",
            source,
        ),
        Line(
            "expected goodput",
            f"{goodput:.2%}",
            f"1 - stall/interval - (interval/2 + commit + {format_seconds(job.restart_s)} restart)/mtbf",
            source,
        ),
    ]
    return lines, goodput
