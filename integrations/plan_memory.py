"""Does a job fit: resident bytes, and what a step holds above them; plain where that fits, streamed where it must.

A plain step drops its gradients before it begins (`zero_grad(set_to_none=True)`), so they are born as the saved values
of the layers die, and the peak is the larger of both ends; a streamed step is planned above weights and gradients. With
a context axis attention is one call over the rows of all its ranks, whose buffers count too; with a tensor axis layers
stay in one chunk, and with sharded weights every layer's input is kept, as when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..dist.units import format_bytes
from ..parallel.memory_model import plain_bytes, plain_flops, saved_bytes, step_flops
from ..parallel.stream.plan import StreamPlan
from ..parallel.stream.planner import plan as plan_stream
from ..parallel.stream.ring_memory import ring_bytes
from .plan_job import Job, Line

PASSES = 6  # reads and writes of each saved value: made, read by the next, read in backward, its gradient made and read
UPDATE_LISTS = 2  # copies of the weights that AdamW's for-each form makes beside the gradients
STREAM_PASSES = 8  # forward runs again


@dataclass(frozen=True)
class Footprint:
    """`streamed`: the plan, None for a plain step. `peak_bytes` on the device; `host_bytes` for offload."""

    lines: tuple[Line, ...]
    fits: bool
    peak_bytes: int
    streamed: StreamPlan | None

    @property
    def host_bytes(self) -> int:
        return self.streamed.host_bytes if self.streamed else 0

    def work(self, job: Job) -> dict[str, float]:
        """FLOPs of all ranks that share a row, by kind."""
        if self.streamed is None:
            return plain_flops(job.shape, job.batch, job.tokens)
        how = {"chunks": len(self.streamed.bounds), "ranks": _attention_ranks(job), **self.streamed.fractions}
        mine = step_flops(job.shape, job.batch, job.tokens // job.context, **how)
        return {kind: amount * job.context for kind, amount in mine.items()}

    def traffic_bytes(self, job: Job) -> float:
        """Reads and writes of a rank's memory outside products: element-wise operations, clipping, the optimizer."""
        rows = job.batch * job.rows
        saved = job.shape.layers * saved_bytes(job.shape, rows) + rows * job.shape.vocab * 4
        update = (2 * job.weight + 4 * job.weight + 2 * job.state_bytes) * job.shape.parameters / share(job)
        return saved * (STREAM_PASSES if self.streamed else PASSES) + update


def share(job: Job) -> int:
    """Ranks over which weights and state are spread."""
    return job.tensor * (job.data * job.context if job.sharded else 1)


def _attention_ranks(job: Job) -> int:
    """As the planner of streaming counts: 0, or the ranks over whose rows attention is one call."""
    return job.context if job.context > 1 else 0


def kept_derived(made: StreamPlan | None) -> tuple[float, float]:
    """Fractions of the layers whose attention output is kept, and whose input is computed again."""
    if made is None:
        return 1.0, 0.0
    return made.fractions["attention_kept"] + made.fractions["graphs"], made.fractions["derived"]


def footprint(job: Job) -> Footprint:
    """What fits, and how."""
    shape, weight = job.shape, job.weight
    weights, state = (shape.parameters * each // share(job) for each in (weight, job.state_bytes))
    gathered = 2 * shape.layer_parameters * weight // job.tensor if job.sharded and share(job) > job.tensor else 0
    rows, whole = job.batch * job.rows, job.batch * (job.tokens // job.context)
    inputs = 2 * whole * shape.width * shape.element_size if job.tensor > 1 else 0  # gathered for a layer's products
    resident = weights + state + gathered + inputs
    update = (1 + UPDATE_LISTS) * weights
    ring = max(ring_bytes(shape, rows, job.context, batch=job.batch)) if job.context > 1 else 0
    in_attention = shape.layers * saved_bytes(shape, rows) + ring
    plain = resident + max(plain_bytes(shape, rows), in_attention, weights + saved_bytes(shape, rows), update)
    form = f"parameters × (2 × {weight} + {job.state_bytes} B) / {share(job)}"
    extra = f" + {format_bytes(gathered)} of two gathered layers" if gathered else ""
    lines = [Line("weights, gradients, state", format_bytes(resident + weights - inputs), form + extra, "modelled")]
    if job.stream == "off" or (job.stream == "auto" and plain <= job.device_bytes):
        fits, peak, made = plain <= job.device_bytes, plain, None
        how, model = "not needed" if job.stream == "auto" else "off", "saved values of all layers, whole logits"
    else:
        budget = job.device_bytes - resident - weights
        made = plan_stream(
            shape, job.batch, job.rows, budget_bytes=max(budget, 1), host_bytes=job.host_bytes,
            chunk=job.rows if job.tensor > 1 else None, every=1 if gathered else None, ranks=_attention_ranks(job),
        )  # fmt: skip
        fits = budget > 0 and "exceeds" not in made.reason
        peak = resident + max(weights + made.device_bytes, update)
        several = f"{len(made.bounds)} chunks of {made.chunk} rows"
        how = f"on: {several if len(made.bounds) > 1 else 'whole layers, the loss in pieces'}"
        how += f"; a plain step needs {format_bytes(plain)}" if job.stream == "auto" else ""
        model = "parallel.memory_model.moments"
    answer = f"{'yes' if fits else 'no'}: peak {format_bytes(peak)} of {format_bytes(job.device_bytes)}"
    name = model if made else f"parallel.memory_model.plain_bytes: {model}"
    if ring:
        form = "parallel.stream.ring_memory.ring_bytes: what schedule ring_kv allocates; counted in the peak"
        lines.append(Line("buffers of ring attention", format_bytes(ring), form, "modelled"))
    lines.append(Line("does it fit", answer, name, "modelled"))
    lines.append(
        Line("streamed backpropagation", how, "parallel.stream.planner.plan: least work that fits", "modelled")
    )
    return Footprint(tuple(lines), fits, int(peak), made)
