"""The loop that every workload is trained by: one variant, one seed, the systems as switched.

Data-parallel ranks take their rows of each batch; with `--context-parallel`, `--halo` or `--overlap` they share each
row instead, and a workload's loss is then scaled so that the mean over ranks is that of the whole batch. Either way
the gradients are averaged in a fixed order, so a resumed run repeats every addition.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ...dist.errors import UserError
from ...parallel.stream import enable
from ..train import hash_of
from .contract import Config, Metrics, Place, Workload
from .gradients import Gradients
from .keeper import keeper
from .tensor_ranks import TensorRanks


@dataclass(frozen=True)
class Outcome:
    """One run: what it reached, what it cost, and the proof of which systems ran (`evidence`).

    `ended`: it made all its updates, or diverged; else its claims are open, and stopped runs have no metrics.
    """

    workload: str
    variant: str
    preset: str
    seed: int
    metrics: Metrics
    losses: list[float]
    updates: int
    diverged: bool
    weights: str
    cpu_s: float
    ranks: int
    systems: list[str]
    evidence: dict[str, dict[str, float]] = field(default_factory=dict)
    ended: bool = True

    def dump(self, place: Place) -> None:
        """Write result.json into the run's folder."""
        place.folder.mkdir(parents=True, exist_ok=True)
        content = {**asdict(self), "losses": len(self.losses), "final_loss": self.losses[-1] if self.losses else None}
        (place.folder / "result.json").write_text(json.dumps(content, indent=2) + "\n")


def optimizer_of(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = config.weight_decay
    foreach = False if any(isinstance(p, DTensor) for p in parameters) else None  # which cannot mix the two kinds
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, weight_decay=decay, foreach=foreach)
    if config.optimizer != "adamw":
        raise UserError(f"optimizer {config.optimizer}", expected="adamw or sgd")
    return torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=decay, foreach=foreach)


def rows_of(config: Config, place: Place) -> slice:
    """This rank's rows of every batch."""
    ranks = place.here.world_size
    if place.switches.context > 1 or place.switches.halo != "off" or place.switches.overlap != "off":
        return slice(0, config.batch)
    if config.batch % ranks:
        raise UserError(f"batch {config.batch} over {ranks} ranks", expected="a whole number of rows on each")
    each = config.batch // ranks
    return slice(place.here.rank * each, (place.here.rank + 1) * each)


def run(
    workload: Workload,
    variant: str,
    preset: str,
    config: Config,
    place: Place,
    *,
    resume: bool = False,
    stop_at: int | None = None,
    enough: Callable[[], bool] = lambda: False,
    tell: Callable[..., None] = lambda **fields: None,
    note: Callable[[int, float], None] = lambda step, loss: None,
) -> Outcome:
    """Train and evaluate. Every rank calls it; all return the same metrics.

    `resume` goes on from the newest checkpoint of the run's folder; `stop_at` ends early, as a fault would, after what
    was saved is durable. `enough`, asked by all ranks before each update, ends the run early too: it is saved, to be
    resumed, and not evaluated. Of each update `tell` hears the loss, and `note` (see `journal`) its number too.
    """
    place.switches.check(workload.name, workload.exercises, place.here.world_size)
    began_s = time.process_time()
    rows = rows_of(config, place)
    if place.switches.overlap != "off":
        place.tensor = TensorRanks(place.here, place.switches.overlap, place.device)
    torch.manual_seed(config.seed)
    data = workload.data(config, place)
    model = workload.model(config, data, place).to(place.device)
    engine = enable(model, chunk=place.switches.stream_chunk) if place.switches.stream else None
    optimizer = optimizer_of(config, model)
    tracked = getattr(model, "tracked", None)
    gradients = Gradients(model, tracked)
    more = workload.state(data, model) if workload.state else {}
    keep = keeper(place, config.checkpoint_every, workload.roll_back is not None, model, optimizer, more)
    losses: list[float] = []
    updates, step, diverged, stopped = 0, 0, False, False
    try:
        step = (keep.restore() or 0) if resume else 0
        last = config.steps if stop_at is None else min(stop_at, config.steps)
        while step < last and not diverged and not (stopped := enough()):
            keep.step(step)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step)
            batch = to_device(data.batch(step, rows), place.device)
            optimizer.zero_grad(set_to_none=True)
            loss = workload.loss(model, batch)
            loss.backward()
            if engine is not None and engine.last_plan is not None:
                layers = sum(verdict == "streamed" for verdict in engine.report().values())
                place.count("stream", chunks=layers * len(engine.last_plan.bounds), passes=1)
            gradients.reduce()
            if place.here.world_size > 1 and gradients.nbytes:
                place.count("average", passes=1, bytes=gradients.nbytes)
            if config.clip:
                gradients.clip(config.clip)
            value = mean(loss, place)
            optimizer.step()
            losses.append(value)
            note(step, value)
            updates, step = updates + 1, step + 1
            diverged = not math.isfinite(value)  # a legal end of some baselines
            tell(loss=value)
            if workload.after is not None:
                workload.after(model, data, step)
            back = workload.roll_back(model, data, step) if workload.roll_back else None
            if back is not None:
                step = go_back(keep, *back)
                place.count("checkpoint" if "checkpoint" in place.switches.on else "copies", rollbacks=1)
        if stop_at is None and not diverged:
            keep.save(step)
    finally:
        keep.close()
        if tracked is not None:
            tracked.close()
    model.eval()
    metrics = {} if stopped else {k: float(value) for k, value in workload.evaluate(model, data, config).items()}
    weights = hash_of(model.state_dict())
    if place.tensor is not None:
        place.count("overlap", **place.tensor.close())
        place.tensor = None
    return Outcome(
        workload.name,
        variant,
        preset,
        config.seed,
        metrics,
        losses,
        updates,
        diverged,
        weights,
        time.process_time() - began_s,
        place.here.world_size,
        place.switches.on,
        place.evidence,
        diverged or step >= config.steps,
    )


def go_back(keep: Any, step: int, then: Callable[[], None]) -> int:
    """Restore `step`, change what is to be done otherwise from there, and save that, so that a restart keeps to it."""
    keep.restore(step)
    then()
    keep.save(step)
    return step


def mean(loss: torch.Tensor, place: Place) -> float:
    value = loss.detach().double()
    if place.here.world_size > 1:
        dist.all_reduce(value)
        value /= place.here.world_size
    return value.item()


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch on `device`."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(to_device(value, device) for value in batch)
    return batch
