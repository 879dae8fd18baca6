"""A run of `undertow train` beside its plan: what each answer predicted, what the run's own traces and checkpoints say.

The job is read from the run's config.json, so that nobody has to repeat it; rates come from the machine file, and
without one the times are those of an assumed accelerator. Numbers of the slowest rank; the first step and the first
save, which allocate, are left out. Host memory is the growth of the process since the model was made, so that
interpreter and libraries do not count; the arena that a checkpoint leaves by is part of the host's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..dist.errors import UserError
from ..parallel.memory_model import DecoderShape
from .plan import Preflight
from .plan_job import DTYPES, Job
from .report_data import RunData

ADAMW_BYTES = 8  # of state per parameter, float32


@dataclass(frozen=True)
class Compared:
    """`predicted` and `measured` in `unit` ('B', 's', 'steps'); `how` it was measured. Both are None where unknown."""

    question: str
    unit: str
    predicted: float | None
    measured: float | None
    how: str

    @property
    def ratio(self) -> float | None:
        advice = self.unit == "steps"
        return self.measured / self.predicted if self.predicted and self.measured is not None and not advice else None


def job_of(run: RunData, **changes: Any) -> Job:
    """The job that `run` was. `UserError` when its config.json does not hold one."""
    try:
        config, systems = run.config["config"], run.config["systems"]
        model, ranks, cuda = config["model"], int(run.config["ranks"]), run.config["device"] == "cuda"
        context, tensor = int(systems["context_parallel"]), int(systems["tensor_parallel"])
        return Job(
            shape=_shape(model, DTYPES["bfloat16" if cuda else "float32"]),
            ranks=ranks,
            tokens=int(config["length"]),
            batch=int(config["batch"]) * context * tensor // ranks,
            context=context,
            tensor=tensor,
            weight_bytes=4,
            state_bytes=ADAMW_BYTES,
            sharded=False,
            stream="on" if systems["stream"] else "off",
            **changes,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{run.folder}/config.json does not say what ran ({type(error).__name__}: {error})",
            expected="a run of this version's `undertow train`",
            remedy="train again, or leave --compare out and describe the job",
        ) from error


def _shape(model: Mapping[str, Any], element_size: int) -> DecoderShape:
    """Of the byte-level model of `undertow train`."""
    named = {
        "hidden_size": model["width"],
        "num_attention_heads": model["heads"],
        "num_key_value_heads": model["kv_heads"],
        "num_hidden_layers": model["layers"],
        "intermediate_size": model["hidden"],
        "vocab_size": model["vocab"],
        "tie_word_embeddings": model["tied"],
    }
    return DecoderShape.from_config(named, element_size)


def compare(run: RunData, job: Job, found: Preflight) -> list[Compared]:
    """Every answer that the run measured."""
    steps = _steps(run)
    commits = _commits(run)
    rank_bytes = found.saves.rank_bytes
    whole = [entry for entry in run.checkpoints if entry.usable]
    stalls = [run.stalls[step] / 1e3 for step in sorted(run.stalls)][1:]
    every = int(run.config["config"].get("checkpoint_every") or 0)
    return [
        _memory(run, job, found),
        Compared("checkpoint on disk", "B", rank_bytes * job.ranks, whole[-1].nbytes if whole else None, "newest one"),
        Compared("step time", "s", found.step_s, median(steps) if steps else None, f"median of {len(steps)} steps"),
        Compared(
            "stall of a save", "s", found.saves.stall_s, median(stalls) if stalls else None, f"{len(stalls)} saves"
        ),
        Compared(
            "until durable",
            "s",
            found.saves.commit_s,
            median(commits) if commits else None,
            f"snapshot to commit, {len(commits)} saves",
        ),
        Compared(
            "interval",
            "steps",
            max(1, round(found.saves.interval_s / found.step_s)),
            float(every) if every else None,
            "advised, and what the run was told",
        ),
    ]


def _memory(run: RunData, job: Job, found: Preflight) -> Compared:
    """Peak of the rank that held most: on the device as torch counted it, on the host what the process grew by."""
    if any(name.endswith(": device_peak") for name in run.memory):
        peaks = [max(value for _, value in points) for name, points in run.memory.items() if "device_peak" in name]
        return Compared("memory", "B", float(found.peak_bytes), max(peaks), "peak allocated on the device")
    weights = job.shape.parameters * job.weight / job.tensor
    predicted = found.peak_bytes + (found.saves.rank_bytes if run.config["config"].get("checkpoint_every") else 0)
    grown = []
    for rank in run.starts:
        first, most = run.memory.get(f"rank {rank}: rss"), run.memory.get(f"rank {rank}: peak_rss")
        if first and most:
            grown.append(max(value for _, value in most) - first[0][1] + weights)
    how = "growth of the process: tensors, the checkpoint's arena, and what allocator and libraries keep"
    return Compared("memory", "B", float(predicted), max(grown) if grown else None, how)


def _steps(run: RunData) -> list[float]:
    """Seconds of each step but the first on its slowest rank."""
    slowest: dict[int, float] = {}
    for span in run.spans:
        if span.name == "step" and span.step is not None and not span.killed:
            slowest[span.step] = max(slowest.get(span.step, 0.0), span.seconds)
    return [seconds for step, seconds in sorted(slowest.items())][1:]


def _commits(run: RunData) -> list[float]:
    """Seconds from a save's call to its commit, without the first."""
    begun: dict[int, float] = {}
    ended: dict[int, float] = {}
    for span in run.spans:
        if span.step is None or span.killed:
            continue
        if span.name == "snapshot":
            begun[span.step] = min(begun.get(span.step, span.begin_s), span.begin_s)
        elif span.name == "commit":
            ended[span.step] = max(ended.get(span.step, 0.0), span.begin_s + span.seconds)
    return [ended[step] - begun[step] for step in sorted(begun) if step in ended][1:]
